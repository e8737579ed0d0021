"""The model card says how an export was made, how good it is and how to use it."""

import json
import shlex
import shutil
from dataclasses import replace

import pytest
import yaml

from chatglm_tuning.checkpoint import digest_tensors, read_lora, read_manifest, write_manifest
from chatglm_tuning.config.export import ExportArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.export.run import export
from chatglm_tuning.loading import read_identity


@pytest.fixture
def trained(base_folder, lora, tmp_path):
    """The folder of a run, with its picture and scores."""
    folder = tmp_path / "trained"
    shutil.copytree(lora, folder)
    (folder / "loss.png").write_bytes(b"a picture")
    metrics = {
        "rouge-1": {"value": 31.25, "low": 30.5, "high": 32.0},
        "bleu-4": {"value": 8.0, "low": None, "high": None},
    }
    (folder / "scores.json").write_text(json.dumps(scores_of(metrics, who(folder, base_folder))))
    return folder


def who(adapter, base_folder):
    digest = None if adapter is None else digest_tensors(read_lora(adapter))
    return {"adapter": digest, "base": read_identity(str(base_folder)).fingerprint}


def scores_of(metrics, answered_by, **others):
    systems = {"lora": answered_by, **others}
    return {
        "references": "each",
        "convention": "every pair is a row",
        "confidence": 0.95,
        "data_files": ["dev.json"],
        "systems": {name: {"prompts": 7, "metrics": metrics, "answered_by": found} for name, found in systems.items()},
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
        "Data: dev.json. References: `each` (every pair is a row). Intervals of 95 % (bootstrap over the prompts).",
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
    scores.write_text(json.dumps(scores_of({"rouge-1": {"value": 31.25}}, who(lora, base_folder))))
    card = card_of(base_folder, lora, tmp_path / "with", scores=scores)
    assert "| lora: rouge-1 | 31.25 |" in card
    assert "Intervals" not in card


def test_of_a_comparison_the_adapters_own_scores_and_the_bases_are_told(base_folder, lora, tmp_path):
    metrics = {"distinct-2": {"value": 31.25, "low": 30, "high": 32}, "loss": {"value": 2, "low": 1, "high": 3}}
    base = who(None, base_folder)
    others = {"base": base, "second": {**base, "adapter": "of another"}, "file": None}
    scores = tmp_path / "compared.json"
    scores.write_text(json.dumps(scores_of(metrics, who(lora, base_folder), **others)))
    card = card_of(base_folder, lora, tmp_path / "output", scores=scores)
    assert "| lora: distinct-2 | 31.25 [30, 32] |" in card
    assert "| base: loss | 2 [1, 3] |" in card
    assert "second" not in card
    assert "file:" not in card
    assert "Intervals of 95 % (bootstrap over the prompts; of distinct-2 the jackknife)." in card


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"adapter": "of another"}, "the scores are of lora, and none of this adapter as it is now"),
        ({"adapter": None}, "the scores are of lora, and none of this adapter as it is now"),
        ({"base": "another"}, "the scores are of this adapter on another base model"),
        (None, "it does not say which adapter and base the scores are of"),
    ],
)
def test_scores_of_others_are_no_scores_of_this_one(base_folder, lora, tmp_path, caplog, change, says):
    folder = shutil.copytree(lora, tmp_path / "trained")
    answered_by = None if change is None else who(lora, base_folder) | change
    (folder / "scores.json").write_text(json.dumps(scores_of({"rouge-1": {"value": 31.25}}, answered_by)))
    (folder / "trainer_log.jsonl").write_text('{"step": 2, "eval_loss": 3.5}\n')
    card = card_of(base_folder, folder, tmp_path / "output")
    assert "31.25" not in card
    assert "| loss | 3.5 |" in card
    assert caplog.text.count(f"{says}. They are not put into the model card. Run ") == 1
    with pytest.raises(UserError, match=f"scores.json: {says}. Run .*chatglm-tuning eval"):
        card_of(base_folder, lora, tmp_path / "other", scores=folder / "scores.json")
    assert not (tmp_path / "other").exists()


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
