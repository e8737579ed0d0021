"""A GGML file: read back it holds the merged weights, and chatglm.cpp answers from it as we do."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from chatglm_tuning.adapters.ptuning import PrefixShape, add_prefix_encoder
from chatglm_tuning.base_folder import read_config
from chatglm_tuning.checkpoint import read_lora
from chatglm_tuning.config.export import ExportArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.export.ggml import (
    GgmlWeights,
    begin_tensor,
    ggml_size_bytes,
    tensor_names,
    write_ggml,
    write_header,
)
from chatglm_tuning.export.run import GGML_NAME, export
from chatglm_tuning.export.weights import StoredWeights
from chatglm_tuning.loading import add_trained_lora, load_base
from tests.export.adapters import write_lora
from tests.model_folder import EMBEDDED, write_tiny_model
from tests.weight_layouts import copy_without_weights, read_released_state, write_weights

KINDS = ("f32", "f16", "q8_0", "q4_0")
NAME = "transformer.layers.0.attention.dense.weight"
QUESTIONS = ("类型#裤*版型#宽松", "你好", "类型#上衣*颜色#红色*风格#简约", "Who are you?")


@pytest.fixture(scope="module")
def ggml_base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("ggml") / "model", inner_hidden_size=128)


@pytest.fixture(scope="module")
def ggml_lora(ggml_base):
    return write_lora(ggml_base.parent / "lora", ggml_base, strength=0.2)


def write(folder, path, kind):
    config = read_config(folder)
    write_ggml(path, config, (folder / "ice_text.model").read_bytes(), StoredWeights(folder), kind, lambda _: None)
    return config


# Of a block's largest magnitude: half a step of q8_0, and what rounding the scale to fp16 moves the 127th level by; a
# whole step of q4_0, whose levels reach to 7 on the side of the smaller extreme.
@pytest.mark.parametrize(
    ("kind", "tolerance"), [("f32", 0.0), ("f16", 0.0), ("q8_0", 0.5 / 127 + 2**-11), ("q4_0", 1 / 8 + 2**-11)]
)
def test_what_is_written_is_read_back(ggml_base, tmp_path, kind, tolerance):
    config = write(ggml_base, tmp_path / "file", kind)
    found, stored = GgmlWeights(tmp_path / "file"), StoredWeights(ggml_base)
    for name in tensor_names(config.num_layers):
        expected, actual = stored.read(name), found.read(name)
        if expected.dim() == 1 or not tolerance:
            assert torch.equal(actual, expected), name
            continue
        blocks = expected.view(-1, 32)
        step = blocks.abs().amax(dim=1, keepdim=True) * tolerance
        assert ((actual.view(-1, 32) - blocks).abs() <= step + 1e-8).all(), name
        assert not torch.equal(actual, expected)
    header = len((ggml_base / "ice_text.model").read_bytes()) + 64 * len(tensor_names(config.num_layers)) + 200
    assert 0 < (tmp_path / "file").stat().st_size - ggml_size_bytes(config, kind) < 2 * header


def test_blocks_of_zeros_stay_zeros(ggml_base, tmp_path):
    state = read_released_state(ggml_base)
    state[NAME][3] = 0
    folder = write_weights(state, copy_without_weights(ggml_base, tmp_path / "model"), "bin")
    for kind in ("q8_0", "q4_0"):
        write(folder, tmp_path / kind, kind)
        assert not GgmlWeights(tmp_path / kind).read(NAME)[3].any()


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_a_lora_is_merged_into_it(ggml_base, ggml_lora, tmp_path, kind):
    arguments = ExportArguments(
        "lora", ggml_lora, tmp_path / "output", str(ggml_base), format="ggml", ggml_type=kind, probe_tokens=4
    )
    export(arguments)
    names = {path.name for path in (tmp_path / "output").iterdir()}
    assert names == {GGML_NAME, "README.md", "certificate.json"}
    certificate = json.loads((tmp_path / "output" / "certificate.json").read_text())
    assert (certificate["holds"], certificate["weights"]) == (True, kind)
    tensors = read_lora(ggml_lora)
    first, second = (tensors[f"base_model.model.{NAME[:-7]}.lora_{letter}.weight"] for letter in "AB")
    expected = StoredWeights(ggml_base).read(NAME) + 2.0 * second @ first
    tolerance = {"f32": 1e-6, "f16": 1e-3, "q8_0": 1e-2}[kind]
    difference = (GgmlWeights(tmp_path / "output" / GGML_NAME).read(NAME) - expected).abs().max()
    assert difference <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    ("changes", "reason"), [({}, "is not 4 times hidden_size"), ({"residual_scale": 2.0}, "residual_scale 2.0 is not")]
)
def test_a_model_that_its_reader_cannot_hold_is_refused(ggml_base, ggml_lora, tmp_path, changes, reason):
    if not changes:
        changes = {"inner_hidden_size": 64}
    folder = write_tiny_model(tmp_path / "model", **{"inner_hidden_size": 128, **changes})
    adapter = write_lora(tmp_path / "lora", folder)
    arguments = ExportArguments("lora", adapter, tmp_path / "output", str(folder), format="ggml")
    with pytest.raises(UserError, match=reason):
        export(arguments)
    assert not (tmp_path / "output").exists()


def engine_python() -> str | None:
    """The Python that has chatglm-cpp: named by CHATGLM_CPP_PYTHON, or this one."""
    named = os.environ.get("CHATGLM_CPP_PYTHON")
    return named or (sys.executable if importlib.util.find_spec("chatglm_cpp") else None)


needs_engine = pytest.mark.skipif(engine_python() is None, reason="no chatglm_cpp, and no CHATGLM_CPP_PYTHON")
ASK = """
import json, sys
import chatglm_cpp
pipeline = chatglm_cpp.Pipeline(sys.argv[1])
settings = chatglm_cpp._C.GenerationConfig(max_length=64, do_sample=False)
ids = [pipeline.tokenizer.encode(text, 512) for text in json.loads(sys.argv[2])]
print(json.dumps([[row, pipeline._sync_generate_ids(row, None, settings)] for row in ids]))
"""


def ask_engine(file: Path):
    argv = [engine_python(), "-c", ASK, str(file), json.dumps(QUESTIONS)]
    return json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)


def ask_ours(model, tokenizer):
    answers = []
    for text in QUESTIONS:
        ids = [*tokenizer.encode_text(text), tokenizer.gmask_token_id, tokenizer.bos_token_id]
        config = model.config
        found = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_length=64,
            do_sample=False,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        answers.append([ids, found[0, len(ids) :].tolist()])
    return answers


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_chatglm_cpp_answers_as_base_and_lora(tmp_path, kind, bits):
    adapter = write_lora(tmp_path / "lora", EMBEDDED, bits=bits, strength=0.1)
    export(ExportArguments("lora", adapter, tmp_path / "output", str(EMBEDDED), format="ggml", ggml_type=kind))
    base = load_base(str(EMBEDDED), quantization_bit=bits)
    before = ask_ours(base.model, base.tokenizer)
    expected = ask_ours(add_trained_lora(base, adapter), base.tokenizer)
    assert ask_engine(tmp_path / "output" / GGML_NAME) == expected
    assert expected != before


def write_with_prefix(path: Path, past: torch.Tensor) -> None:
    """Write the embedded base with keys and values `(layers * 2, heads, prefix, head_dim)`, as ChatGLM2 has them."""
    config = read_config(EMBEDDED)
    header = io.BytesIO()
    write_header(header, config, (EMBEDDED / "ice_text.model").read_bytes(), "f32")
    fields = bytearray(header.getvalue())
    place = 8 + 9 * 4  # behind magic and kind, the tenth number: virtual tokens
    assert fields[place : place + 4] == bytes(4)
    fields[place] = past.shape[2]
    weights = StoredWeights(EMBEDDED)
    with path.open("wb") as file:
        file.write(fields)
        begin_tensor(file, "past_key_values", tuple(past.shape), "f16")
        file.write(past.half().numpy().tobytes())
        for name in tensor_names(config.num_layers):
            tensor = weights.read(name)
            begin_tensor(file, name, tuple(tensor.shape), "f32")
            file.write(tensor.numpy().tobytes())


@needs_engine
@pytest.mark.slow
def test_chatglm_cpp_reads_no_prefix_of_this_model(tmp_path):
    """Why a prefix is refused: its reader of ChatGLM-6B passes over the keys and values that it takes for ChatGLM2."""
    base = load_base(str(EMBEDDED))
    config, answers = base.config, []
    for seed in (0, 1):
        past = 3 * torch.randn(
            (2 * config.num_layers, config.num_attention_heads, 8, config.head_dim),
            generator=torch.Generator().manual_seed(seed),
        )
        write_with_prefix(tmp_path / str(seed), past)
        table = past.permute(2, 0, 1, 3).reshape(8, -1)  # as the encoder's embedding has it
        ours = load_base(str(EMBEDDED))
        add_prefix_encoder(ours.model, PrefixShape(8), {"embedding.weight": table}, "test")
        answers.append(ask_ours(ours.model.eval(), ours.tokenizer))
        assert ask_engine(tmp_path / str(seed)) != answers[-1]
    assert answers[0] != answers[1]
    assert ask_engine(tmp_path / "0") == ask_engine(tmp_path / "1")


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_are_those_of_its_own_converter(tmp_path, monkeypatch, kind):
    find = "import importlib.util; print(importlib.util.find_spec('chatglm_cpp').submodule_search_locations[0])"
    package = subprocess.run([engine_python(), "-c", find], capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setitem(sys.modules, "tabulate", types.SimpleNamespace(tabulate=lambda *_args, **_more: ""))
    spec = importlib.util.spec_from_file_location("converter", Path(package) / "convert.py")
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    write(EMBEDDED, tmp_path / "ours", kind)
    base = load_base(str(EMBEDDED))
    proto = types.SimpleNamespace(serialized_model_proto=(EMBEDDED / "ice_text.model").read_bytes)
    tokenizer = types.SimpleNamespace(
        sp_tokenizer=types.SimpleNamespace(text_tokenizer=types.SimpleNamespace(sp=proto))
    )
    with (tmp_path / "theirs").open("wb") as file:
        converter.ChatGLMConverter.convert(file, base.model, tokenizer, converter.GGMLType[kind.upper()])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
