"""The original's commands, unchanged but for paths, on the real tokenizer and real ADGEN rows (`make slow-original`).

The model is small and random. The argument files are the repository's with a shorter run: 40 steps, not 3,000.
"""

import json
import random
import subprocess
import sys

import pytest

from tests.model_folder import REPOSITORY, write_tiny_model
from tests.training.commands import adapter_bytes, environment, losses, run, run_until_killed

RUNS = {
    "lora": (
        "train_lora.py",
        "chatglm_6b_lora.json",
        ["--max_input_length", "128", "--max_output_length", "256"],
        "--lora_checkpoint",
    ),
    "ptuning": (
        "train_ptuning.py",
        "chatglm_6b_ptuning.json",
        ["--pre_seq_len", "128", "--quantization_bit", "4"],
        "--ptuning_checkpoint",
    ),
}
STEPS = 40

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "chatglm-6b"
    return write_tiny_model(folder, shared / "chatglm-6b", max_sequence_length=2048)


@pytest.fixture(scope="module")
def rows(shared, tmp_path_factory):
    """The first 900 rows of the real dev file, converted by the original's command."""
    folder = tmp_path_factory.mktemp("data")
    lines = (shared / "data" / "AdvertiseGen" / "dev.json").read_text(encoding="utf-8").splitlines()[:900]
    (folder / "train.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    script = REPOSITORY / "data" / "AdvertiseGen" / "convert_to_instruct.py"
    argv = [sys.executable, str(script), "--input_file", "train.json", "--output_file", "train.jsonl"]
    subprocess.run(argv, cwd=folder, check=True)
    assert len((folder / "train.jsonl").read_text(encoding="utf-8").splitlines()) == 900
    return folder / "train.jsonl"


def command(name, folder, model, rows, *more, **changes):
    script, arguments, flags, _ = RUNS[name]
    content = json.loads((REPOSITORY / arguments).read_text(encoding="utf-8"))
    file = folder.with_suffix(".json")
    file.write_text(json.dumps({**content, "output_dir": str(folder), "max_steps": STEPS, **changes}), encoding="utf-8")
    argv = [sys.executable, str(REPOSITORY / script), "--train_args_file", str(file)]
    return [*argv, "--model_name_or_path", str(model), "--data_path", str(rows), *flags, *more]


@pytest.mark.parametrize("name", list(RUNS))
def test_the_command_trains_and_chat_loads_its_result(name, model, rows, tmp_path):
    output = tmp_path / "run"
    run(command(name, output, model, rows), tmp_path / "cache")
    found = [loss for _, loss in losses(output)]
    print(f"{name}: loss {found[0]:.4f} → {found[-1]:.4f} in {STEPS} steps")
    assert found[-1] < found[0]
    chat = [sys.executable, str(REPOSITORY / "cli_demo.py"), "--model_name_or_path", str(model)]
    chat += [RUNS[name][3], str(output), "--no_history", "--max_length", "64"]
    if name == "ptuning":
        chat += ["--quantization_bit", "4"]
    done = subprocess.run(
        chat, input="类型#裤*风格#潮\n", capture_output=True, text=True, env=environment(tmp_path), check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("name", list(RUNS))
def test_a_killed_run_resumes_to_the_same_losses_and_bytes(name, model, rows, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 1, "max_steps": 16}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(command(name, whole, model, rows, **changes), tmp_path / "cache")
    at = random.Random(name).randint(5, 14)
    argv = command(name, killed, model, rows, **changes)
    run_until_killed(argv, tmp_path / "cache", killed, at_step=at, delay=random.Random(name).random())
    argv = command(name, killed, model, rows, "--resume_from_checkpoint", str(killed), **changes)
    run(argv, tmp_path / "cache")
    print(f"{name}: killed after step {at}, resumed")
    assert losses(killed) == losses(whole)
    assert adapter_bytes(killed) == adapter_bytes(whole)
