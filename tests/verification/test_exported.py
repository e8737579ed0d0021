"""`verify` of what `export` wrote: its files, and what a package holds."""

import json
import shutil

import pytest

from chatglm_tuning.cli.main import run_command
from tests.export.adapters import write_lora, write_prefix
from tests.model_folder import write_rows, write_tiny_model
from tests.training.commands import FAST

FORMS = {
    "merged": ("lora", []),
    "original": ("lora", ["--format", "original"]),
    "packaged": ("ptuning", []),
    "packaged with its base": ("ptuning", ["--include_base"]),
    "ggml": ("lora", ["--format", "ggml"]),
}
PACKAGES = ("packaged", "packaged with its base")
CHANGED = {
    "merged": "model-00001-of-00001.safetensors",
    "original": "adapter_model.bin",
    "packaged": "adapter/prefix_encoder.safetensors",
    "packaged with its base": "base/pytorch_model.bin",
    "ggml": "chatglm-ggml.bin",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a LoRA and a prefix, and an export of each form."""
    root = tmp_path_factory.mktemp("exported")
    base = write_tiny_model(root / "model", inner_hidden_size=128)  # as chatglm.cpp wants it
    adapters = {"lora": write_lora(root / "lora", base), "ptuning": write_prefix(root / "prefix", base)}
    for form, (method, flags) in FORMS.items():
        argv = ["--model_name_or_path", base, f"--{method}_checkpoint", adapters[method], "--output_dir", root / form]
        assert run_command("export", [*map(str, argv), *flags]) == 0
    return root


def verify(folder, capsys, *flags):
    code = run_command("verify", [str(folder), *flags])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("form", list(FORMS))
def test_an_export_is_verified_and_a_file_that_was_changed_fails(place, tmp_path, capsys, form):
    folder = shutil.copytree(place / form, tmp_path / "export")
    flags = ["--model_name_or_path", str(place / "model")] if form in ("original", "packaged") else []
    code, told = verify(folder, capsys, *flags)
    assert code == 0, told
    assert "holds    certificate.json: all " in told
    assert ("answers as when it was saved" in told) == (form in ("original", *PACKAGES))
    assert told.count("values of the base") == (form != "ggml")
    assert ("for another program" in told) == (form == "ggml")

    file = folder / CHANGED[form]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    code, told = verify(folder, capsys, *flags)
    assert code == 1
    assert f"FAILED   certificate.json: {CHANGED[form]} is not the file that was exported (1 differ)" in told


@pytest.mark.parametrize(("trained", "packaged"), [(None, 4), (4, 8), (4, None)])
def test_a_base_of_another_precision_in_a_package_is_no_failure(tmp_path, capsys, trained, packaged):
    base = write_tiny_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.json", 12)
    settings = {**FAST, "max_steps": 1, "save_strategy": "no", "output_dir": str(tmp_path / "prefix")}
    (tmp_path / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    argv = ["--train_args_file", tmp_path / "run.json", "--model_name_or_path", base, "--data_path", rows]
    argv += ["--pre_seq_len", 4, "--dtype", "float32", "--max_input_length", 64, "--max_output_length", 96]
    argv += ["--quantization_bit", trained] if trained else []
    assert run_command("train-ptuning", [str(word) for word in argv]) == 0
    shipped = base
    if packaged:
        shipped = tmp_path / "quantized"
        argv = ["--model_name_or_path", base, "--quantization_bit", packaged, "--output_dir", shipped]
        assert run_command("quantize", [str(word) for word in argv]) == 0
    argv = ["--model_name_or_path", shipped, "--ptuning_checkpoint", tmp_path / "prefix", "--include_base"]
    assert run_command("export", [str(word) for word in [*argv, "--output_dir", tmp_path / "package"]]) == 0
    capsys.readouterr()
    code, told = verify(tmp_path / "package", capsys)
    assert code == 0, told
    is_as_trained = packaged is None  # the base in full precision is held as it was then
    assert ("holds    answers as when it was saved" in told) == is_as_trained
    assert ("not seen answers as when it was saved: it was recorded on a base in" in told) != is_as_trained
