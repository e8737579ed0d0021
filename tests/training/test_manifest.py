"""What the manifest says of data, settings and progress."""

import hashlib
import json

import pytest

from chatglm_tuning.checkpoint import read_manifest
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.training.callbacks import read_log
from tests.model_folder import write_rows, write_tiny_model
from tests.training.commands import FAST

BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "greater_is_better": True,  # the wrong way round: the first is best, and cannot be taken for the last
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("manifest")
    write_tiny_model(root / "model")
    write_rows(root / "rows.json", 12)
    write_rows(root / "eval.json", 4)
    return root


@pytest.fixture
def tune(place, tmp_path, monkeypatch):
    monkeypatch.setenv("CHATGLM_TUNING_CACHE", str(place / "cache"))

    def start(*flags, **changes):
        folder = tmp_path / "run"
        settings = {**FAST, "max_steps": 3, "output_dir": str(folder), "learning_rate": 0.01, **changes}
        (tmp_path / "run.json").write_text(json.dumps(settings), encoding="utf-8")
        argv = ["--train_args_file", tmp_path / "run.json", "--model_name_or_path", place / "model"]
        argv += ["--data_path", place / "rows.json", "--eval_path", place / "eval.json", "--dtype", "float32"]
        argv += ["--max_input_length", 64, "--max_output_length", 96, *flags]
        assert run_command("train-lora", list(map(str, argv))) == 0
        return folder

    return start


def settings_of(folder):
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest.settings


def test_the_manifest_names_the_bytes_of_the_data_and_every_setting(tune, place):
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "lr_scheduler_type": "constant"}
    found = settings_of(tune(save_strategy="no", seed=7, label_smoothing_factor=0.1, **changes))
    content = (place / "rows.json").read_bytes()
    assert found["data_files"] == [
        {"name": "rows.json", "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    ]
    assert found["eval_files"][0]["name"] == "eval.json"
    expected = {
        **changes,
        "data_path": ["rows.json"],
        "train_rows": 12,
        "dtype": "float32",
        "seed": 7,
        "learning_rate": 0.01,
        "label_smoothing_factor": 0.1,
        "optim": FAST.get("optim", "adamw_torch_fused"),
        "max_steps": 3,
        "processes": 1,
        "loss_average": "tokens",
        "steps": 3,
        "result_step": 3,
        "epochs": 1.5,
        "best": None,
    }
    assert {name: found[name] for name in expected} == expected


def test_a_token_budget_has_no_number_of_rows(tune):
    found = settings_of(tune("--max_tokens_per_batch", 400, save_strategy="no"))
    assert (found["per_device_train_batch_size"], found["max_tokens_per_batch"]) == (None, 400)


def test_the_manifest_tells_the_best_step_from_the_last(tune):
    folder = tune("--tripwires", "warn", **BEST)  # the best step has learned nothing
    losses = [line["eval_loss"] for line in read_log(folder) if line["step"] == 1 and "eval_loss" in line]
    best = {"step": 1, "metric": "loss", "value": pytest.approx(losses[0])}
    found = settings_of(folder)
    assert (found["steps"], found["result_step"], found["best"]) == (3, 1, best)
    checkpoint = settings_of(folder / "checkpoint-2")
    assert (checkpoint["steps"], checkpoint["result_step"], checkpoint["best"]) == (2, 2, best)
    before = settings_of(folder)
    (folder / "adapter_model.safetensors").unlink()
    assert settings_of(tune("--tripwires", "warn", "--resume_from_checkpoint", folder, **BEST)) == before
