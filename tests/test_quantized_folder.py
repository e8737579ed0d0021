"""A quantised folder: the tensors that loading the full base quantised gives, whole or not there at all."""

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel

import chatglm_tuning.new_folder as writing
import chatglm_tuning.quantized_folder as module
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.errors import UserError
from chatglm_tuning.loading import load_base
from chatglm_tuning.quantized_folder import write_quantized_folder
from tests.model_folder import TOKENIZER_FILES, write_tiny_model
from tests.weight_layouts import LAYOUTS, copy_without_weights, read_released_state, write_weights


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def state(model_folder):
    return read_released_state(model_folder)


def parameters_of(folder: Path, **flags):
    base = load_base(str(folder), **flags)
    return base, dict(base.model.named_parameters(remove_duplicate=False))


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [8, 4])
def test_it_loads_as_the_base_quantised(state, model_folder, tmp_path, layout, bits, monkeypatch):
    monkeypatch.setattr(writing, "_BYTES_OF_A_FILE", 5_000)
    source = write_weights(state, copy_without_weights(model_folder, tmp_path / "model"), layout)
    output = tmp_path / "new" / "output"
    size_bytes = write_quantized_folder(str(source), output, bits)
    expected, expected_parameters = parameters_of(source, quantization_bit=bits, dtype=torch.float16)
    for flags in ({}, {"quantization_bit": bits}):
        base, parameters = parameters_of(output, dtype=torch.float16, **flags)
        assert_same(parameters, expected_parameters)
        assert base.identity.fingerprint == expected.identity.fingerprint
        assert base.config.quantization_bit == bits
    assert_same(
        dict(AutoModel.from_pretrained(output, dtype=torch.float16).named_parameters(remove_duplicate=False)),
        expected_parameters,
    )
    files = sorted(output.glob("model-*.safetensors"))
    assert len(files) > 3
    assert sorted(path.name for path in output.iterdir()) == sorted(
        ["config.json", "SHA256SUMS", "model.safetensors.index.json", *TOKENIZER_FILES, *(path.name for path in files)]
    )
    assert list(output.parent.iterdir()) == [output]
    assert size_bytes == sum(p.nbytes for k, p in expected_parameters.items() if k != "lm_head.weight")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            assert set(tensors.keys()) == {key for key, name in index["weight_map"].items() if name == path.name}
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((output / "config.json").stat().st_mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_quantised_keeps_its_precision(state, model_folder, tmp_path, dtype):
    generator = torch.Generator().manual_seed(1)
    changed = {key: (torch.randn(value.shape, generator=generator) / 1000).to(dtype) for key, value in state.items()}
    changed["lm_head.weight"] = changed["transformer.word_embeddings.weight"]
    source = write_weights(changed, copy_without_weights(model_folder, tmp_path / "model"), "bin")
    write_quantized_folder(str(source), tmp_path / "output", 4)
    _, expected = parameters_of(source, quantization_bit=4, dtype=torch.float32)
    _, actual = parameters_of(tmp_path / "output", dtype=torch.float32)
    assert_same(actual, expected)


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_a_head_of_its_own_is_kept(state, model_folder, tmp_path, layout):
    changed = {**state, "lm_head.weight": state["lm_head.weight"].flip(0)}
    source = write_weights(changed, copy_without_weights(model_folder, tmp_path / "model"), layout)
    write_quantized_folder(str(source), tmp_path / "output", 8)
    base, parameters = parameters_of(tmp_path / "output", dtype=torch.float16)
    assert base.config.tie_word_embeddings is False
    assert torch.equal(parameters["lm_head.weight"], changed["lm_head.weight"])


def test_a_prefix_beside_the_base_is_left_out(state, model_folder, tmp_path, caplog):
    folder = copy_without_weights(model_folder, tmp_path / "model", pre_seq_len=3)
    prefix = {"transformer.prefix_encoder.embedding.weight": torch.randn(3, 128)}
    write_quantized_folder(str(write_weights({**state, **prefix}, folder, "bin")), tmp_path / "output", 4)
    assert "holds a prefix beside the base model" in caplog.text
    assert "pre_seq_len" not in json.loads((tmp_path / "output" / "config.json").read_text())
    assert parameters_of(tmp_path / "output")[0].model.transformer.prefix_encoder is None


def test_an_empty_folder_and_what_a_killed_run_left_are_written_over(model_folder, tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    left = tmp_path / ".output.part"
    left.mkdir()
    (left / "config.json").write_text("{}")
    write_quantized_folder(str(model_folder), output, 4)
    assert list(tmp_path.iterdir()) == [output]
    load_base(str(output))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_is_left_of_a_run_that_breaks_off(model_folder, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(writing, "_BYTES_OF_A_FILE", 20_000)
    save_file, written = writing.save_file, []

    def save_some(tensors, path, **more):
        if written:
            raise error
        written.append(path)
        save_file(tensors, path, **more)

    monkeypatch.setattr(writing, "save_file", save_some)
    output = tmp_path / "output"
    argv = ["--model_name_or_path", str(model_folder), "--quantization_bit", "4", "--output_dir", str(output)]
    assert run_command("quantize", argv) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert written
    assert list(tmp_path.iterdir()) == []
    message = capsys.readouterr().err
    assert ("cannot be written (No space left on device)" in message) == isinstance(error, OSError)


KILLED = """
import os, signal, sys
import chatglm_tuning.new_folder as writing
import chatglm_tuning.quantized_folder as module
save_file = writing.save_file
def save_and_die(*arguments, **more):
    save_file(*arguments, **more)
    os.kill(os.getpid(), signal.SIGKILL)
writing.save_file = save_and_die
module.write_quantized_folder(sys.argv[1], module.Path(sys.argv[2]), 4)
"""


def test_a_killed_run_leaves_no_folder_that_could_be_taken_for_whole(model_folder, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, model_folder, tmp_path / "output"], check=False)
    assert done.returncode == -9
    assert {path.name for path in tmp_path.iterdir()} == {".output.part", ".output.lock"}
    write_quantized_folder(str(model_folder), tmp_path / "output", 4)
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_the_command_says_what_it_wrote_and_shows_how_far_it_is(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setattr("rich.console.Console.is_dumb_terminal", False)
    argv = ["--model_name_or_path", str(model_folder), "--int8", "--output_dir", str(tmp_path / "output")]
    assert run_command("quantize", argv) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{tmp_path / 'output'}: int8, 0.00 GiB of weights\n"
    assert "quantising" in shown.err


def config(**changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def rewrite(**changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model" / "pytorch_model.bin"
        state = torch.load(path, weights_only=True)
        state |= {key.replace("__", "."): value for key, value in changes.items()}
        torch.save({key: value for key, value in state.items() if value is not None}, path)

    return change


def nothing(_folder: Path) -> None:
    pass


OUTPUT = ("--quantization_bit", "4", "--output_dir", "output")
BAD = {
    "no bits": (nothing, ["--output_dir", "output"], ["--quantization_bit is missing", "Give 4 or 8"]),
    "bits": (nothing, ["--quantization_bit", "3", "--output_dir", "output"], ["must be 4 or 8, not 3"]),
    "no output": (nothing, ["--quantization_bit", "4"], ["--output_dir is missing"]),
    "a flag": (nothing, [*OUTPUT, "--ouput_dir", "b"], ["no flag of chatglm-tuning quantize", "--output_dir"]),
    "no model": (nothing, [*OUTPUT, "--model_name_or_path", "./no"], ["./no", "there is no such folder"]),
    "quantised": (config(quantization_bit=8), OUTPUT, ["model: ", "holds int8 weights already"]),
    "int8 tensors": (
        rewrite(transformer__layers__0__attention__dense__weight=torch.ones(32, 32, dtype=torch.int8)),
        OUTPUT,
        ["torch.int8", "needs a quantization_bit in config.json"],
    ),
    "a missing tensor": (
        rewrite(transformer__layers__1__attention__dense__bias=None),
        OUTPUT,
        ["1 of its tensors are missing: transformer.layers.1.attention.dense.bias"],
    ),
    "an unknown tensor": (rewrite(other=torch.ones(2)), OUTPUT, ["a tensor 'other', which ChatGLM-6B has not"]),
    "the output is a file": (lambda folder: (folder / "output").touch(), OUTPUT, ["output: the output is there"]),
    "the output is a model": (
        lambda folder: shutil.copytree(folder / "model", folder / "output"),
        OUTPUT,
        ["output: the output is there already", "new folder with --output_dir"],
    ),
    "the output lies in a file": (
        nothing,
        ["--quantization_bit", "4", "--output_dir", "model/config.json/output"],
        ["model/config.json/output: output_dir cannot be written (Not a directory)"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, model_folder, tmp_path, monkeypatch, capsys):
    change, flags, fragments = BAD[name]
    shutil.copytree(model_folder, tmp_path / "model")
    change(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    given = [] if "--model_name_or_path" in flags else ["--model_name_or_path", "model"]
    assert run_command("quantize", [*given, *flags]) == 2
    out, message = capsys.readouterr()
    assert out == ""
    assert message.startswith("error [")
    assert message.endswith(" explains)\n")
    assert message.count("\n") == 1
    for fragment in fragments:
        assert fragment in message
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}.keys() == before.keys()


def test_too_little_room_is_told_before_anything_is_written(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "iterate_tensors", lambda _files: pytest.fail("the weights were read"))
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    argv = ["--model_name_or_path", str(model_folder), *OUTPUT[:3], str(tmp_path / "output")]
    assert run_command("quantize", argv) == 2
    assert "KiB are needed and 1000 bytes are free. Make room" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(state, model_folder, tmp_path, value):
    key = "transformer.layers.1.mlp.dense_h_to_4h.weight"
    broken = {**state, key: state[key].clone()}
    broken[key][3, 5] = value
    source = write_weights(broken, copy_without_weights(model_folder, tmp_path / "model"), LAYOUTS[0])
    with pytest.raises(UserError, match=f"{key} cannot be quantised: in row 3 a number is not finite"):
        write_quantized_folder(str(source), tmp_path / "output", 8)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(UserError, match=f"{key} cannot be quantised: in row 3 a number is not finite"):
        load_base(str(source), quantization_bit=4)


def test_what_is_not_of_a_killed_run_is_not_removed(model_folder, tmp_path):
    mine = tmp_path / ".output.part" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("keep", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds other files \(notes.txt\)"):
        write_quantized_folder(str(model_folder), tmp_path / "output", 8)
    assert mine.read_text(encoding="utf-8") == "keep"
