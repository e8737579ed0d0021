"""A merged folder holds base + scaling · B · A, whatever the base is stored in and whatever the LoRA is on."""

import json

import pytest
import torch
from peft import LoraConfig

import chatglm_tuning.new_folder as writing
from chatglm_tuning.checkpoint import read_lora
from chatglm_tuning.config.export import ExportArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.export.run import export
from chatglm_tuning.loading import add_trained_lora, load_base
from tests.export.adapters import write_lora
from tests.model_folder import dequantize_linear
from tests.weight_layouts import LAYOUTS, copy_without_weights, read_released_state, write_weights

QKV = "transformer.layers.1.attention.query_key_value"
OUT = "transformer.layers.0.mlp.dense_4h_to_h"


def merge(base_folder, adapter, output, **more):
    export(ExportArguments("lora", adapter, output, str(base_folder), **more))
    return json.loads((output / "certificate.json").read_text(encoding="utf-8"))


def state_of(folder):
    return dict(load_base(str(folder)).model.named_parameters(remove_duplicate=False))


def delta(adapter, name, scaling):
    tensors = read_lora(adapter)
    first, second = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    return scaling * second @ first


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_base_plus_the_product(base_folder, lora, tmp_path, layout, monkeypatch):
    monkeypatch.setattr(writing, "_BYTES_OF_A_FILE", 20_000)
    state = read_released_state(base_folder)
    source = write_weights(state, copy_without_weights(base_folder, tmp_path / "model"), layout)
    certificate = merge(source, lora, tmp_path / "output", dtype="float32")
    assert certificate["holds"] is True
    assert certificate["measured"]["greedy_agreement"] == 1.0
    merged = state_of(tmp_path / "output")
    for name in (QKV, OUT):
        expected = state[f"{name}.weight"].float() + delta(lora, name, 2.0)
        torch.testing.assert_close(merged[f"{name}.weight"].data, expected, rtol=1e-6, atol=1e-7)
        assert (expected - state[f"{name}.weight"].float()).abs().max() > 0.01
    assert torch.equal(merged[f"{QKV}.bias"], state[f"{QKV}.bias"].float())
    assert merged["lm_head.weight"] is merged["transformer.word_embeddings.weight"]
    assert len(list((tmp_path / "output").glob("model-*.safetensors"))) > 3
    assert json.loads((tmp_path / "output" / "config.json").read_text())["torch_dtype"] == "float32"


VARIANTS = {
    "rank and alpha patterns": (
        {"rank_pattern": {"dense_4h_to_h": 2}, "alpha_pattern": {"query_key_value": 32}},
        {QKV: 8.0, OUT: 4.0},
    ),
    "rslora": ({"use_rslora": True}, {QKV: 4.0, OUT: 4.0}),
    "one linear": ({"target_modules": ["query_key_value"]}, {QKV: 2.0, OUT: 0.0}),
    "dora": ({"use_dora": True}, {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_lora(base_folder, tmp_path, name):
    changes, scalings = VARIANTS[name]
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    given = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **changes}
    adapter = write_lora(tmp_path / "lora", base_folder, config=LoraConfig(**given))
    assert merge(base_folder, adapter, tmp_path / "output", dtype="float32")["holds"] is True
    before, merged = state_of(base_folder), state_of(tmp_path / "output")
    for module, scaling in scalings.items():
        expected = before[f"{module}.weight"].data + (delta(adapter, module, scaling) if scaling else 0.0)
        torch.testing.assert_close(merged[f"{module}.weight"].data, expected, rtol=1e-6, atol=1e-6)
    library = add_trained_lora(load_base(str(base_folder)), adapter).merge_and_unload()
    for key, value in library.state_dict().items():
        torch.testing.assert_close(merged[key].data, value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_stored", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_lora_of_a_quantised_base_is_merged_onto_what_it_was_trained_on(base_folder, tmp_path, bits, is_stored):
    from chatglm_tuning.quantized_folder import write_quantized_folder

    adapter = write_lora(tmp_path / "lora", base_folder, bits=bits)
    source = base_folder
    if is_stored:
        source = tmp_path / "stored"
        write_quantized_folder(str(base_folder), source, bits)
    certificate = merge(source, adapter, tmp_path / "output", dtype="float32")
    assert certificate["compared_with"] == f"base (held in int{bits}) + LoRA"
    merged = state_of(tmp_path / "output")[f"{QKV}.weight"].data
    held = load_base(str(base_folder), quantization_bit=bits).model.get_submodule(QKV)
    torch.testing.assert_close(merged, dequantize_linear(held) + delta(adapter, QKV, 2.0), rtol=1e-6, atol=1e-7)
    assert not json.loads((tmp_path / "output" / "config.json").read_text()).get("quantization_bit")


def test_the_full_precision_weights_may_be_chosen_instead(base_folder, lora_int4, tmp_path):
    certificate = merge(base_folder, lora_int4, tmp_path / "output", dtype="float32", merge_onto="full")
    assert certificate["compared_with"] == "base + LoRA"
    merged = state_of(tmp_path / "output")[f"{QKV}.weight"].data
    expected = state_of(base_folder)[f"{QKV}.weight"].data + delta(lora_int4, QKV, 2.0)
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("dtype", "stored"), [(None, torch.float16), ("bfloat16", torch.bfloat16)])
def test_the_type_is_the_base_s_own_or_the_one_asked_for(base_folder, lora, tmp_path, dtype, stored):
    from safetensors import safe_open

    certificate = merge(base_folder, lora, tmp_path / "output", dtype=dtype)
    assert certificate["weights"] == str(stored).removeprefix("torch.")
    measured, limits = certificate["measured"], certificate["limits"]
    assert 0 < measured["mean_logit_gap"] < limits["mean_logit_gap"] < measured["mean_effect_of_adapter"]
    (file,) = (tmp_path / "output").glob("*.safetensors")
    with safe_open(file, framework="pt") as tensors:
        assert {tensors.get_tensor(key).dtype for key in tensors.keys()} == {stored}  # noqa: SIM118


def test_a_result_in_int8_is_in_the_released_layout(base_folder, lora_int4, tmp_path):
    certificate = merge(base_folder, lora_int4, tmp_path / "output", output_quantization_bit=8)
    assert certificate["weights"] == "int8"
    config = json.loads((tmp_path / "output" / "config.json").read_text())
    assert config["quantization_bit"] == 8
    module = load_base(str(tmp_path / "output")).model.get_submodule(QKV)
    held = load_base(str(base_folder), quantization_bit=4).model.get_submodule(QKV)
    expected = dequantize_linear(held) + delta(lora_int4, QKV, 2.0)
    step = module.weight_scale.float()[:, None]
    # Half a step, and what rounding the scale to fp16 moves the 127th level by; the weight is fp16 before, too.
    assert ((dequantize_linear(module) - expected).abs() <= step * (0.5 + 2 * 127 / 2**11)).all()


def test_a_head_of_its_own_is_kept(base_folder, lora, tmp_path):
    state = read_released_state(base_folder)
    state["lm_head.weight"] = state["lm_head.weight"].flip(0)
    source = write_weights(state, copy_without_weights(base_folder, tmp_path / "model"), "bin")
    merge(source, lora, tmp_path / "output")
    merged = state_of(tmp_path / "output")
    assert torch.equal(merged["lm_head.weight"].data, state["lm_head.weight"].float())
    assert json.loads((tmp_path / "output" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_weight_too_large_for_its_type_is_refused(base_folder, tmp_path):
    adapter = write_lora(tmp_path / "lora", base_folder, strength=1e7)
    with pytest.raises(UserError, match=r"not finite in float16.*--dtype bfloat16"):
        merge(base_folder, adapter, tmp_path / "output")
    assert not (tmp_path / "output").exists()
