"""`chatglm-tuning export`: its flags, what it prints, and every mistake in one message before anything is read."""

import json
import logging
import shutil
import subprocess
import sys

import pytest

import chatglm_tuning.export.weights as weights_module
from chatglm_tuning.cli.main import run_command
from tests.export.adapters import write_lora, write_prefix
from tests.model_folder import write_tiny_model

LORA = ("--lora_checkpoint", "lora")
PREFIX = ("--ptuning_checkpoint", "prefix")
OUTPUT = ("--output_dir", "output")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    parent = tmp_path_factory.mktemp("folders")
    base = write_tiny_model(parent / "model")
    write_lora(parent / "lora", base)
    write_lora(parent / "lora-int4", base, bits=4)
    write_prefix(parent / "prefix", base)
    return parent


def test_it_says_what_it_wrote(folders, tmp_path, capsys):
    argv = ["--model_name_or_path", str(folders / "model"), "--lora_checkpoint", str(folders / "lora-int4")]
    assert run_command("export", [*argv, "--output_dir", str(tmp_path / "output")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'output'}: float16 weights that answer as base (held in int4) + LoRA: largest")
    assert out.endswith("greedy tokens equal\n")


def test_off_a_terminal_every_part_says_how_long_it_took(folders, tmp_path, caplog):
    argv = ["--model_name_or_path", str(folders / "model"), "--lora_checkpoint", str(folders / "lora")]
    with caplog.at_level(logging.INFO):
        assert run_command("export", [*argv, "--output_dir", str(tmp_path / "output")]) == 0
    said = [record.getMessage() for record in caplog.records if record.name == "chatglm_tuning.evaluation.progress"]
    parts = ("asking base and adapter", "asking the base alone", "merging", "asking the export", "taking digests")
    assert [line.split(":")[0] for line in said] == list(parts)


def test_a_wrong_output_is_told_before_libraries_are_loaded(tmp_path):
    (tmp_path / "file").write_text("x")
    argv = ["--lora_checkpoint", "lora", "--output_dir", str(tmp_path / "file" / "sub")]
    code = "import sys; from chatglm_tuning.cli.main import run_command as run; code = run('export', sys.argv[1:]); "
    code += "sys.exit(9 if 'torch' in sys.modules else code)"
    done = subprocess.run([sys.executable, "-c", code, *argv], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "file/sub: output_dir cannot be written (Not a directory)" in done.stderr


def test_help_is_answered(capsys):
    assert run_command("export", ["--help"]) == 0
    shown = capsys.readouterr().out
    for flag in ("--format", "--merge_onto", "--output_quantization_bit", "--include_base", "--probe_tokens"):
        assert flag in shown


def nothing(_folder):
    pass


def change(name, text):
    def write(folder):
        (folder / name).write_text(text, encoding="utf-8")

    return write


def edit_config(name, **changes):
    def write(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return write


def without_manifest(then):
    def write(folder):
        (folder / "lora" / "chatglm_tuning.json").unlink()
        then(folder)

    return write


def lora_config(**changes):
    return without_manifest(edit_config("lora/adapter_config.json", **changes))


BAD = {
    "no adapter": (nothing, OUTPUT, ["there is no adapter to export"]),
    "two adapters": (nothing, [*LORA, *PREFIX, *OUTPUT], ["are both given"]),
    "no output": (nothing, LORA, ["--output_dir is missing"]),
    "a format": (nothing, [*LORA, *OUTPUT, "--format", "ggm"], ["If ggml was meant"]),
    "a flag": (nothing, [*LORA, *OUTPUT, "--formt", "ggml"], ["no flag of chatglm-tuning export"]),
    "bits": (nothing, [*LORA, *OUTPUT, "--output_quantization_bit", "3"], ["must be 4 or 8"]),
    "a prefix as ggml": (nothing, [*PREFIX, *OUTPUT, "--format", "ggml"], ["reads none for ChatGLM-6B"]),
    "a prefix merged": (nothing, [*PREFIX, *OUTPUT, "--dtype", "float16"], ["--dtype has no effect"]),
    "a dtype for ggml": (nothing, [*LORA, *OUTPUT, "--format", "ggml", "--dtype", "float16"], ["--ggml_type"]),
    "a ggml type": (nothing, [*LORA, *OUTPUT, "--ggml_type", "f16"], ["is for --format ggml alone"]),
    "a base beside a merge": (nothing, [*LORA, *OUTPUT, "--include_base"], ["is for packaging a prefix"]),
    "two bases": (
        nothing,
        [*LORA, *OUTPUT, "--merge_onto", "full", "--quantization_bit", "4"],
        ["Keep one of the two"],
    ),
    "no tokens": (nothing, [*LORA, *OUTPUT, "--probe_tokens", "0"], ["of at least 1"]),
    "no model": (nothing, [*LORA, *OUTPUT, "--model_name_or_path", "./no"], ["there is no such folder"]),
    "no lora": (nothing, ["--lora_checkpoint", "no", *OUTPUT], ["no: ", "there is no such folder"]),
    "a prefix as lora": (nothing, ["--lora_checkpoint", "prefix", *OUTPUT], ["Give it with --ptuning_checkpoint"]),
    "a lora as prefix": (nothing, ["--ptuning_checkpoint", "lora", *OUTPUT], ["Give it with --lora_checkpoint"]),
    "damaged": (change("lora/adapter_model.safetensors", "x"), [*LORA, *OUTPUT], ["the adapter is damaged"]),
    "other bits": (
        nothing,
        ["--lora_checkpoint", "lora-int4", *OUTPUT, "--quantization_bit", "8"],
        ["says 8, and the adapter was trained on int4"],
    ),
    "bits of no training": (
        nothing,
        [*LORA, *OUTPUT, "--quantization_bit", "4"],
        ["says 4, and the adapter was trained on full-precision weights", "--output_quantization_bit 4 writes"],
    ),
    "scores that are a certificate": (
        change("certificate.json", '{"holds": true, "output": {"files": {"a": {"bytes": 3}}}}'),
        [*LORA, *OUTPUT, "--scores", "certificate.json"],
        ["certificate.json: the scores are not as eval writes them"],
    ),
    "full of a quantised base": (
        edit_config("model/config.json", quantization_bit=4),
        [*LORA, *OUTPUT, "--merge_onto", "full"],
        ["holds int4 weights, which --merge_onto full cannot use"],
    ),
    "whole modules": (
        lora_config(modules_to_save=["word_embeddings"]),
        [*LORA, *OUTPUT],
        ["cannot be merged: it trains whole modules"],
    ),
    "biases": (lora_config(bias="all"), [*LORA, *OUTPUT], ["cannot be merged: it trains biases (bias all)"]),
    "changed weights": (lora_config(init_lora_weights="pissa"), [*LORA, *OUTPUT], ["begun from changed base weights"]),
    "dora on int4": (
        lora_config(use_dora=True),
        [*LORA, *OUTPUT, "--quantization_bit", "4"],
        ["it is a DoRA on an int4 base"],
    ),
    "a size that ggml has not": (nothing, [*LORA, *OUTPUT, "--format", "ggml"], ["is not 4 times hidden_size"]),
    "no rows": (nothing, [*LORA, *OUTPUT, "--data_path", "no.json"], ["no.json"]),
    "bad rows": (
        change("rows.json", '{"content": 1, "summary": "a"}\n'),
        [*LORA, *OUTPUT, "--data_path", "rows.json"],
        ["rows.json:1"],
    ),
    "no scores": (nothing, [*LORA, *OUTPUT, "--scores", "no.json"], ["no.json: the scores cannot be read"]),
    "the output is a file": (change("output", "x"), [*LORA, *OUTPUT], ["output: output_dir is a file"]),
    "the output is the model": (nothing, [*LORA, "--output_dir", "model"], ["model: the output is there already"]),
    "the output lies in a file": (
        nothing,
        [*LORA, "--output_dir", "model/config.json/output"],
        ["cannot be written (Not a directory)"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, folders, tmp_path, monkeypatch, capsys):
    make, flags, fragments = BAD[name]
    for folder in folders.iterdir():
        shutil.copytree(folder, tmp_path / folder.name)
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights_module, "iterate_tensors", lambda _files: pytest.fail("the weights were read"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    given = [] if "--model_name_or_path" in flags else ["--model_name_or_path", "model"]
    assert run_command("export", [*given, *flags]) == 2
    out, message = capsys.readouterr()
    assert out == ""
    message = message[message.index("error [") :]
    assert message.count("\n") == 1 or name == "bad rows"
    for fragment in fragments:
        assert fragment in message
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}.keys() == before.keys()
