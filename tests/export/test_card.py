"""The model card says how an export was made, how good it is and how to use it."""

import json
import shlex
import shutil
from dataclasses import replace

import pytest
import yaml

from chatglm_tuning.checkpoint import read_manifest, write_manifest
from chatglm_tuning.config.export import ExportArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.export.run import export


@pytest.fixture
def trained(lora, tmp_path):
    """The folder of a run, with its picture and scores."""
    folder = tmp_path / "trained"
    shutil.copytree(lora, folder)
    (folder / "loss.png").write_bytes(b"a picture")
    metrics = {
        "rouge-1": {"value": 31.25, "low": 30.5, "high": 32.0},
        "bleu-4": {"value": 8.0, "low": None, "high": None},
    }
    (folder / "scores.json").write_text(json.dumps(scores_of(metrics)))
    return folder


def scores_of(metrics):
    return {
        "references": "each",
        "convention": "every pair is a row",
        "confidence": 0.95,
        "data_files": ["dev.json"],
        "systems": {"lora": {"prompts": 7, "metrics": metrics}},
    }


def card_of(base_folder, adapter, output, **more):
    export(ExportArguments("lora", adapter, output, str(base_folder), **more))
    return (output / "README.md").read_text(encoding="utf-8")


def test_it_has_settings_scores_picture_licence_and_certificate(base_folder, trained, tmp_path):
    card = card_of(base_folder, trained, tmp_path / "output")
    assert (tmp_path / "output" / "loss.png").read_bytes() == b"a picture"
    for part in (
        "license: other",
        'base_model: "model"',
        "# output\n",
        "LoRA",
        "| seed | 3 |",
        "| data_path | rows.json |",
        "| lora: rouge-1 | 31.25 [30.5, 32] |",
        "| lora: bleu-4 | 8 |",
        "Data: dev.json. References: `each` (every pair is a row). Intervals of 95 %",
        "![loss](loss.png)",
        "MODEL_LICENSE",
        "chatglm-tuning chat --model_name_or_path output",
        "greedy agreement | 1.0",
        "许可",
        "Licence",
    ):
        assert part in card, part


def test_scores_may_lie_elsewhere_or_be_missing(base_folder, lora, tmp_path):
    assert "None were given" in card_of(base_folder, lora, tmp_path / "without")
    scores = tmp_path / "others.json"
    scores.write_text(json.dumps(scores_of({"rouge-1": {"value": 31.25}})))
    assert "| lora: rouge-1 | 31.25 |" in card_of(base_folder, lora, tmp_path / "with", scores=scores)


def test_without_scores_the_last_evaluation_of_training_is_told(base_folder, lora, tmp_path):
    folder = shutil.copytree(lora, tmp_path / "trained")
    lines = [{"step": 2, "eval_loss": 3.5}, {"step": 4, "eval_loss": 2.25, "eval_rouge-1": 12.5, "eval_runtime": 9}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "eval_lo'
    (folder / "trainer_log.jsonl").write_text(text)
    card = card_of(base_folder, folder, tmp_path / "output")
    assert "| loss | 2.25 |" in card
    assert "| rouge-1 | 12.5 |" in card
    assert "Measured by training at its last evaluation" in card
    assert "runtime" not in card


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        ("{", "no JSON"),
        ("[1]", "no JSON object"),
        ('{"references": "each", "systems": {"a": 1}}', "not as eval"),
        ('{"scores": {"rouge-1": 0.3125}}', "not as eval"),
    ],
)
def test_scores_that_are_none_are_refused(base_folder, lora, tmp_path, content, reason):
    scores = tmp_path / "scores.json"
    if content is not None:
        scores.write_text(content)
    with pytest.raises(UserError, match=reason):
        card_of(base_folder, lora, tmp_path / "output", scores=scores)
    assert not (tmp_path / "output").exists()


def test_the_settings_have_the_data_s_fingerprint_and_nothing_that_was_not_set(base_folder, lora, tmp_path):
    folder = shutil.copytree(lora, tmp_path / "trained")
    manifest = read_manifest(folder)
    settings = {
        "max_tokens_per_batch": None,
        "eval_files": [],
        "data_files": [{"name": "rows.json", "bytes": 9, "sha256": "ab12"}],
        "learning_rate": 0.0002,
        "best": {"step": 4, "metric": "rouge-l", "value": 12.0},
    }
    write_manifest(folder, replace(manifest, settings=settings), list(manifest.files))
    card = card_of(base_folder, folder, tmp_path / "output")
    for line in (
        "| data_files | rows.json (sha256 `ab12`) |",
        "| learning_rate | 0.0002 |",
        "| best | step 4, metric rouge-l, value 12.0 |",
    ):
        assert line in card
    assert "None |" not in card
    assert "eval_files" not in card


def test_odd_names_are_quoted_for_shell_and_yaml(base_folder, lora, tmp_path):
    base = shutil.copytree(base_folder, tmp_path / "a #1: b")
    name = "my ex 中 'a'"
    card = card_of(base, lora, tmp_path / name)
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "a #1: b"
    command = text.split("```bash\n")[1].split("```")[0]
    assert shlex.split(command) == ["chatglm-tuning", "chat", "--model_name_or_path", name]


def test_a_prefix_s_card_says_how_to_chat_with_it(base_folder, prefix, tmp_path):
    export(ExportArguments("ptuning", prefix, tmp_path / "output", str(base_folder), format="folder"))
    card = (tmp_path / "output" / "README.md").read_text(encoding="utf-8")
    assert "chatglm-tuning chat --model_name_or_path model --ptuning_checkpoint output/adapter" in card
    assert "| pre_seq_len | 3 |" in card
    assert "bit for bit" in card
