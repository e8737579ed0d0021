"""Our LoRA linears against peft's own, and what is left to peft."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from chatglm_tuning.adapters.lora import (
    LeanLoraLinear,
    QuantizedLoraLinear,
    add_lora,
    lora_state_dict,
    make_lora_config,
)
from chatglm_tuning.model.frozen_linear import FrozenLinear
from chatglm_tuning.quantization.linear import QuantizedLinear
from chatglm_tuning.quantization.packing import quantize_rows
from tests.model_folder import write_tiny_model


def make_base(bits=None):
    torch.manual_seed(0)
    if bits is None:
        return FrozenLinear(24, 16).requires_grad_(False)
    base = QuantizedLinear(24, 16, bits)
    base.weight.data, base.weight_scale.data = quantize_rows(torch.randn(16, 24), bits)
    nn.init.normal_(base.bias)
    return base.requires_grad_(False)


def make_layer(kind, bits=None, dtype=torch.float32, **settings):
    base = make_base(bits).to(dtype)
    layer = kind(base, "default", config=LoraConfig(r=3, lora_alpha=6, **settings), r=3, lora_alpha=6)
    torch.manual_seed(1)
    for name, parameter in sorted(layer.named_parameters()):
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return layer


# peft does not know the layer, and says so when none but this test makes it.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type .*QuantizedLinear")


def make_pair(bits=None, dtype=torch.float32, **settings):
    lean = LeanLoraLinear if bits is None else QuantizedLoraLinear
    return [make_layer(kind, bits, dtype, **settings) for kind in (LoraLinear, lean)]


def run(layer, states, is_watched=True):
    states = states.clone().requires_grad_(is_watched)
    torch.manual_seed(2)
    product = layer(states)
    (product.float() ** 2).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {"product": product.detach(), "states": states.grad if is_watched else product, **gradients}


def sums_of(monkeypatch):
    """Count the sums that are made in place."""
    from chatglm_tuning.adapters import lora

    calls, unpatched = [], lora._LoraSum.apply
    monkeypatch.setattr(lora._LoraSum, "apply", lambda *given: calls.append(1) or unpatched(*given))
    return calls


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)])
@pytest.mark.parametrize("is_watched", [True, False])
def test_product_and_gradients_equal_peft_s(bits, dropout, shape, is_watched, monkeypatch):
    sums = sums_of(monkeypatch)
    plain, lean = make_pair(bits, lora_dropout=dropout)
    states = torch.randn(shape)
    expected = run(plain, states, is_watched)
    assert not sums
    actual = run(lean, states, is_watched)
    assert sums
    assert len(expected) == 4
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 4])
def test_in_bf16_the_gradients_are_near_peft_s_which_multiplies_in_fp32(bits):
    plain, lean = make_pair(bits, torch.bfloat16)
    for layer in (plain, lean):
        layer.lora_A.float(), layer.lora_B.float()
    states = torch.randn(2, 3, 24, dtype=torch.bfloat16)
    expected, actual = run(plain, states), run(lean, states)
    assert actual["product"].dtype == torch.bfloat16
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        # x, A and B are rounded to bf16 once each, and what they give once more.
        assert (actual[name] - value).float().norm() < 2**-6 * value.float().norm(), name


def test_under_autocast_a_step_gives_peft_s_gradients():
    plain, lean = make_pair()
    states = torch.randn(2, 3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = run(plain, states), run(lean, states)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        assert (actual[name] - value).float().norm() < 2**-6 * value.float().norm(), name


def disable(layer):
    layer.enable_adapters(False)


def merge(layer):
    layer.merge()


def add_another(layer):
    layer.update_layer("other", 2, lora_alpha=2, config=LoraConfig(r=2, lora_alpha=2, init_lora_weights=True))
    layer.set_adapter(["default", "other"])


@pytest.mark.parametrize("change", [disable, merge, add_another])
def test_what_is_no_plain_training_is_left_to_peft(change, monkeypatch):
    sums = sums_of(monkeypatch)
    plain, lean = make_pair()
    states = torch.randn(5, 24)
    before = lean(states).detach()
    assert len(sums) == 1
    change(plain)
    change(lean)
    torch.manual_seed(3)
    assert torch.equal(lean(states), plain(states))
    assert len(sums) == 1
    assert torch.allclose(lean(states), before, rtol=1e-4, atol=1e-5) == (change is not disable)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_without_a_gradient_and_for_variants_peft_s_own_forward_runs(settings, monkeypatch):
    sums = sums_of(monkeypatch)
    plain, lean = make_pair(**settings)
    states = torch.randn(5, 24)
    with torch.set_grad_enabled(bool(settings)):
        assert torch.equal(lean(states), plain(states))
    assert not sums


def test_an_adapter_that_is_switched_on_again_adds_as_before():
    _, lean = make_pair()
    states = torch.randn(5, 24)
    before = lean(states)
    lean.enable_adapters(False)
    assert torch.equal(lean(states), lean.base_layer(states))
    lean.enable_adapters(True)
    assert torch.equal(lean(states), before)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_model_under_autocast_has_nearly_the_gradients_of_fp32(tmp_path, bits):
    from chatglm_tuning.loading import load_base

    folder = write_tiny_model(tmp_path / "model")
    targets = ("query_key_value", "dense")
    model = load_base(str(folder), quantization_bit=bits).model
    model = add_lora(model, make_lora_config(rank=2, alpha=4, dropout=0.0, targets=targets)).train()
    ids = torch.randint(10, 60, (2, 12))
    ids[:, 4], ids[:, 5] = model.config.gmask_token_id, model.config.bos_token_id
    results = []
    for is_cast in (False, True):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            loss = model(input_ids=ids, labels=ids, return_logits=False).loss
        loss.backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (results[1] - results[0]).norm() < 0.05 * results[0].norm()
    assert not torch.equal(*results)


def test_the_state_dict_has_peft_s_names(tmp_path):
    from chatglm_tuning.loading import load_base

    folder = write_tiny_model(tmp_path / "model")
    targets = ("query_key_value", "dense_4h_to_h")
    ours = add_lora(load_base(str(folder)).model, make_lora_config(rank=2, alpha=4, dropout=0.1, targets=targets))
    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=list(targets), task_type="CAUSAL_LM")
    theirs = get_peft_model(load_base(str(folder)).model, config)
    assert any(type(module) is LeanLoraLinear for module in ours.modules())
    assert not any(isinstance(module, LeanLoraLinear) for module in theirs.modules())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert lora_state_dict(ours).keys() == lora_state_dict(theirs).keys()
