"""`verify` of what `export` wrote: its files, and what a package holds."""

import shutil

import pytest

from chatglm_tuning.cli.main import run_command
from tests.export.adapters import write_lora, write_prefix
from tests.model_folder import write_tiny_model

FORMS = {
    "merged": ("lora", []),
    "original": ("lora", ["--format", "original"]),
    "packaged": ("ptuning", []),
    "packaged with its base": ("ptuning", ["--include_base"]),
    "ggml": ("lora", ["--format", "ggml"]),
}
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
    assert ("adapter: answers" in told) == form.startswith("packaged")
    assert ("base: values of the base" in told) == (form == "packaged with its base")
    assert ("for another program" in told) == (form == "ggml")

    file = folder / CHANGED[form]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    code, told = verify(folder, capsys, *flags)
    assert code == 1
    assert f"FAILED   certificate.json: {CHANGED[form]} is not the file that was exported (1 differ)" in told
