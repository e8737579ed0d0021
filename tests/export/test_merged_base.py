"""A base with an adapter in its weights is known as such, and a folder that differs from its certificate is told of."""

import json
import logging
import shutil

import pytest

from chatglm_tuning.checkpoint import check_certificate
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.config.export import ExportArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.export.run import export
from chatglm_tuning.loading import load_base, load_for_inference
from chatglm_tuning.quantized_folder import write_quantized_folder
from tests.export.adapters import write_lora


@pytest.fixture(scope="module")
def merged(base_folder, lora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "merged"
    export(ExportArguments("lora", lora, folder, str(base_folder)))
    return folder


@pytest.mark.parametrize("form", ["as it was", "of peft 0.3"])
def test_a_lora_is_not_merged_twice(base_folder, merged, lora, tmp_path, capsys, form):
    given = lora
    if form == "of peft 0.3":
        given = tmp_path / "old"
        export(ExportArguments("lora", lora, given, str(base_folder), format="original"))
    argv = ["--model_name_or_path", str(merged), "--lora_checkpoint", str(given)]
    assert run_command("export", [*argv, "--output_dir", str(tmp_path / "output")]) == 2
    message = capsys.readouterr().err
    assert f"error [E110]: {merged}: this base already has that LoRA (as lora) merged into its weights" in message
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("is_quantised", [False, True])
def test_an_adapter_of_the_base_alone_is_warned_of(merged, prefix, tmp_path, caplog, is_quantised):
    folder = merged
    if is_quantised:
        folder = tmp_path / "int8"
        write_quantized_folder(str(merged), folder, 8)
    load_for_inference(str(folder), ptuning_checkpoint=prefix, dtype="float32")
    assert "was trained on another base model (the base) than the one loaded" in caplog.text
    assert "which already has the adapter lora merged into its weights" in caplog.text


def test_an_adapter_without_a_manifest_is_warned_of(merged, lora, tmp_path, caplog):
    folder = shutil.copytree(lora, tmp_path / "lora")
    (folder / "chatglm_tuning.json").unlink()
    load_for_inference(str(merged), lora_checkpoint=folder, dtype="float32")
    assert "already has the adapter lora merged into its weights" in caplog.text


def test_an_adapter_of_the_merged_base_fits_it_and_not_the_one_before(base_folder, merged, tmp_path, caplog):
    second = write_lora(tmp_path / "second", merged, strength=0.06)
    load_for_inference(str(merged), lora_checkpoint=second, dtype="float32")
    assert caplog.text == ""
    export(ExportArguments("lora", second, tmp_path / "output", str(merged), dtype="float32"))
    content = json.loads((tmp_path / "output" / "config.json").read_text())
    assert [entry["name"] for entry in content["merged_adapters"]] == ["lora", "second"]
    load_for_inference(str(base_folder), lora_checkpoint=second, dtype="float32")
    assert "was trained on another base model" in caplog.text


def test_a_merge_onto_another_base_is_warned_of_once(another_base, lora, tmp_path, caplog):
    export(ExportArguments("lora", lora, tmp_path / "output", str(another_base)))
    assert caplog.text.count("was trained on another base model") == 1


def test_a_merge_onto_full_precision_was_asked_for_and_is_not_warned_of(base_folder, lora_int4, tmp_path, caplog):
    export(ExportArguments("lora", lora_int4, tmp_path / "output", str(base_folder), merge_onto="full"))
    assert "was trained on" not in caplog.text


def test_a_whole_folder_passes(merged, caplog):
    with caplog.at_level(logging.INFO):
        check_certificate(merged)
    assert caplog.text == ""


def test_weights_of_another_size_are_refused(merged, tmp_path):
    folder = shutil.copytree(merged, tmp_path / "copy")
    (weights,) = folder.glob("model-*.safetensors")
    with weights.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(UserError, match=r"weights are not those that were exported \(model-00001"):
        check_certificate(folder)


def test_a_changed_config_and_a_certificate_that_is_none_are_warned_of(merged, tmp_path, caplog):
    folder = shutil.copytree(merged, tmp_path / "copy")
    with (folder / "config.json").open("a") as stream:
        stream.write(" ")
    load_base(str(folder))
    assert "config.json was changed after the export" in caplog.text
    (folder / "certificate.json").write_text("{}")
    load_base(str(folder))
    assert "certificate.json is no certificate of an export" in caplog.text


@pytest.mark.parametrize("kind", ["lora", "prefix", "the original's prefix"])
def test_an_adapter_given_as_the_model_is_told(base_folder, lora, prefix, tmp_path, capsys, kind):
    folder = {"lora": lora, "prefix": prefix}.get(kind, tmp_path / "old")
    if kind == "the original's prefix":
        export(ExportArguments("ptuning", prefix, folder, str(base_folder), format="original"))
    assert run_command("chat", ["--model_name_or_path", str(folder)]) == 2
    message = capsys.readouterr().err
    flag = "--lora_checkpoint" if kind == "lora" else "--ptuning_checkpoint"
    assert f"which is no model by itself. Give it as the adapter ({flag})" in message
    assert ("(the base)" in message) == (kind != "the original's prefix")
