"""The model card says how an export was made, how good it is and how to use it."""

import json
import shutil

import pytest

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
    content = {"seed": 0, "systems": {"lora": {"prompts": 7, "metrics": metrics}}}
    (folder / "scores.json").write_text(json.dumps(content))
    return folder


def card_of(base_folder, adapter, output, **more):
    export(ExportArguments("lora", adapter, output, str(base_folder), **more))
    return (output / "README.md").read_text(encoding="utf-8")


def test_it_has_settings_scores_picture_licence_and_certificate(base_folder, trained, tmp_path):
    card = card_of(base_folder, trained, tmp_path / "output")
    assert (tmp_path / "output" / "loss.png").read_bytes() == b"a picture"
    for part in (
        "license: other",
        "base_model: model",
        "# output\n",
        "LoRA",
        "| seed | 3 |",
        "| data_path | rows.json |",
        "| lora: rouge-1 | 31.25 [30.5, 32] |",
        "| lora: bleu-4 | 8 |",
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
    scores.write_text(json.dumps({"scores": {"rouge-1": 0.3125}}))
    assert "| scores.rouge-1 | 0.3125 |" in card_of(base_folder, lora, tmp_path / "with", scores=scores)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot be read"), ("{", "no JSON"), ("[1]", "no JSON object"), ('{"systems": {"a": 1}}', "not as eval")],
)
def test_scores_that_are_none_are_refused(base_folder, lora, tmp_path, content, reason):
    scores = tmp_path / "scores.json"
    if content is not None:
        scores.write_text(content)
    with pytest.raises(UserError, match=reason):
        card_of(base_folder, lora, tmp_path / "output", scores=scores)
    assert not (tmp_path / "output").exists()


def test_a_prefix_s_card_says_how_to_chat_with_it(base_folder, prefix, tmp_path):
    export(ExportArguments("ptuning", prefix, tmp_path / "output", str(base_folder), format="folder"))
    card = (tmp_path / "output" / "README.md").read_text(encoding="utf-8")
    assert "chatglm-tuning chat --model_name_or_path model --ptuning_checkpoint output/adapter" in card
    assert "| pre_seq_len | 3 |" in card
    assert "bit for bit" in card
