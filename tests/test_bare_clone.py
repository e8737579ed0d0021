"""Parity with the released model from the repository alone: a cut of the golden values, and weights made by recipe."""

import hashlib
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm_tuning.prompt import build_prompt, process_response
from chatglm_tuning.quantization.packing import quantize_rows

FIXTURES = Path(__file__).resolve().parent / "fixtures"
FACTS = json.loads((FIXTURES / "parity.json").read_text(encoding="utf-8"))
TENSORS = load_file(FIXTURES / "parity.safetensors")
STD_BY_NAME = {
    "word_embeddings": "emb",
    "query_key_value": "qkv",
    "attention.dense": "dense",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
}
LOGITS = {"rtol": 1e-5, "atol": 5e-6}


def weight_by_recipe(name: str, shape) -> np.ndarray:
    recipe = FACTS["recipe"]
    seed = (zlib.crc32(name.encode()) ^ recipe["seed"]) & 0xFFFFFFFF
    noise = np.random.RandomState(seed).standard_normal(tuple(shape))
    if "layernorm" in name and name.endswith("weight"):
        value = 1 + 0.1 * noise
    elif name.endswith("bias"):
        value = 0.02 * noise
    else:
        value = next(recipe["std"][key] for part, key in STD_BY_NAME.items() if part in name) * noise
    return value.astype(np.float16).astype(np.float32)


@pytest.fixture(scope="module")
def weights():
    return make_weights()


def make_weights():
    config = ChatGLMConfig(**{**FACTS["config"], "dtype": "float32"})
    with torch.device("meta"):
        shapes = {k: p.shape for k, p in ChatGLMForConditionalGeneration(config).named_parameters()}
    made = {name: weight_by_recipe(name, shape) for name, shape in shapes.items()}
    digests = {name: hashlib.sha256(value.astype("<f4").tobytes()).hexdigest() for name, value in made.items()}
    assert digests == FACTS["recipe"]["sha256_fp32_le_bytes"]
    return {name: torch.from_numpy(value) for name, value in made.items()}


def load(weights, attention="sdpa", **changes):
    config = ChatGLMConfig(**{**FACTS["config"], "dtype": "float32", **changes})
    config._attn_implementation = attention
    model = ChatGLMForConditionalGeneration(config)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("case", list(FACTS["loss"]))
def test_forward(weights, case):
    model = load(weights)
    with torch.no_grad():
        inputs = {name: TENSORS[f"{case}/{name}"] for name in ("input_ids", "labels")}
        output = model(**inputs, use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states[-1], TENSORS[f"{case}/h_final_ln"], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(output.logits[..., :64], TENSORS[f"{case}/logits_first64"], **LOGITS)
    assert output.loss.item() == pytest.approx(FACTS["loss"][case], abs=5e-6)


@pytest.mark.parametrize("case", list(FACTS["loss"]))
def test_fp16_is_bit_equal(case):
    # In a process of its own, and with fp16 products that sum in fp32: see tests/model/test_parity.py.
    code = f"from {__name__} import compare_fp16; compare_fp16({case!r})"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=Path(__file__).parents[1])


def compare_fp16(case):
    model = load(make_weights(), attention="eager").half()
    with torch.no_grad():
        output = model(input_ids=TENSORS[f"{case}/input_ids"], use_cache=False, output_hidden_states=True)
    assert torch.equal(output.hidden_states[-1].float(), TENSORS[f"{case}/fp16_h_final_ln"].float())


def lora_model(weights):
    config = LoraConfig(r=8, lora_alpha=32, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    return get_peft_model(load(weights), config)


def prefix_model(weights):
    model = load(weights, pre_seq_len=8, prefix_dropout=0.0).requires_grad_(False)
    model.transformer.prefix_encoder.requires_grad_(True)
    return model


@pytest.mark.parametrize(("name", "make"), [("lora", lora_model), ("ptuning", prefix_model)])
def test_loss_and_gradients(weights, name, make):
    model = make(weights).train()
    trained = {key.replace(".default", ""): p for key, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == FACTS["adapters"][name]["trainable"]
    for key, parameter in trained.items():
        parameter.data.copy_(TENSORS[f"{name}/param/{key}"])
    loss = model(input_ids=TENSORS[f"{name}/input_ids"], labels=TENSORS[f"{name}/labels"], return_logits=False).loss
    loss.backward()
    assert loss.item() == pytest.approx(FACTS["adapters"][name]["loss"], abs=5e-6)
    for key, parameter in trained.items():
        expected = TENSORS[f"{name}/grad/{key}"]
        assert (parameter.grad - expected).norm() < 1e-4 * expected.norm(), key


@pytest.mark.parametrize("name", list(FACTS["generation"]))
def test_generation(weights, name):
    model = load(weights, pre_seq_len=8 if "ptuning" in name else None)
    if "ptuning" in name:
        prefix = TENSORS["ptuning/param/transformer.prefix_encoder.embedding.weight"]
        model.transformer.prefix_encoder.embedding.weight.data.copy_(prefix)
    case = FACTS["generation"][name]
    ids, steps = torch.tensor(case["input_ids"]), len(case["new_ids"][0])
    beams = 3 if name.startswith("beam3") else 1
    out = model.generate(ids, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, num_beams=beams)
    assert out[:, ids.shape[1] :].tolist() == case["new_ids"]


@pytest.mark.parametrize("key", list(FACTS["quant_digests"]))
def test_quantised_bytes(weights, key):
    name, kind = key.split("|")
    packed, scale = quantize_rows(weights[name], int(kind[3:]))
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest() == FACTS["quant_digests"][key]["packed_sha256"]
    assert hashlib.sha256(scale.numpy().tobytes()).hexdigest() == FACTS["quant_digests"][key]["scale_sha256"]


def test_chat_texts():
    for case in FACTS["chat"]:
        assert build_prompt(case["query"], [tuple(pair) for pair in case["history"]]) == case["prompt"]
    for raw, expected in FACTS["process_response"]:
        assert process_response(raw) == expected
