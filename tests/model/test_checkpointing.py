"""What the backward pass recomputes: equal gradients, and no more products than it should."""

import pytest
import torch

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape, add_prefix_encoder
from chatglm_tuning.loading import load_base
from chatglm_tuning.model.frozen_linear import _FrozenProduct
from chatglm_tuning.quantization.linear import _QuantizedProduct
from tests.model_folder import write_tiny_model

MODES = ["off", "mlp", "on"]
LINEARS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
# Times that each linear multiplies in a forward pass and what the backward pass repeats of it.
PRODUCTS = {"off": [1, 1, 1, 1], "mlp": [1, 1, 2, 1], "on": [2, 2, 2, 1]}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model", num_layers=3)


def make_model(model_folder, method, bits):
    torch.manual_seed(2)
    model = load_base(str(model_folder), quantization_bit=bits).model
    if method == "ptuning":
        model.config.prefix_dropout = 0.3
        add_prefix_encoder(model, PrefixShape(4, prefix_projection=True), None, "")
    elif method == "lora":
        targets = ("query_key_value", "dense_4h_to_h")
        model = add_lora(model, make_lora_config(rank=2, alpha=4, dropout=0.3, targets=targets))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    else:
        model.requires_grad_(True)
    return model.train()


def base_of(model):
    return model.get_base_model() if hasattr(model, "peft_config") else model


def make_batch(config):
    ids = torch.randint(10, 60, (2, 15), generator=torch.Generator().manual_seed(3))
    ids[0, 4], ids[0, 5] = config.gmask_token_id, config.bos_token_id
    ids[1, 8], ids[1, 9] = config.gmask_token_id, config.bos_token_id
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loss_and_gradients(model, mode):
    base_of(model).set_activation_checkpointing(mode)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    loss = model(**make_batch(model.config), return_logits=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("is_padding_free", [True, False])
@pytest.mark.parametrize(
    ("method", "bits"), [("lora", None), ("lora", 8), ("lora", 4), ("ptuning", None), ("ptuning", 4), ("full", None)]
)
def test_gradients_are_the_same_whatever_is_recomputed(model_folder, method, bits, is_padding_free):
    model = make_model(model_folder, method, bits)
    base_of(model).transformer.is_padding_free = is_padding_free
    expected = loss_and_gradients(model, "off")
    assert len(expected) > 3
    for mode in ("mlp", "on", "off"):
        actual = loss_and_gradients(model, mode)
        assert all(torch.equal(ours, value) for ours, value in zip(actual, expected, strict=True)), mode


def count_products(model, monkeypatch):
    """Return the products that every layer has made of each of its linears, in the order of LINEARS."""
    layers = base_of(model).transformer.layers
    owners = [(layer.attention, name) for layer in layers for name in LINEARS[:2]]
    owners += [(layer.mlp, name) for layer in layers for name in LINEARS[2:]]
    places = {getattr(owner, name).weight.data_ptr(): (index // 2 % len(layers), name)
              for index, (owner, name) in enumerate(owners)}  # fmt: skip
    counts = {}
    for function in (_FrozenProduct, _QuantizedProduct):
        unpatched = function.forward

        def forward(ctx, states, weight, *others, unpatched=unpatched):
            place = places[weight.data_ptr()]
            counts[place] = counts.get(place, 0) + 1
            return unpatched(ctx, states, weight, *others)

        monkeypatch.setattr(function, "forward", staticmethod(forward))
    return counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_no_product_is_repeated_in_vain(model_folder, mode, bits, monkeypatch):
    model = make_model(model_folder, "ptuning", bits)
    # The first layer's states need a gradient, as those of every other layer do.
    model.transformer.word_embeddings.weight.requires_grad_(True)
    counts = count_products(model, monkeypatch)
    # A mode replaces the one before it.
    for now in (mode, *MODES):
        counts.clear()
        loss_and_gradients(model, now)
        for layer in range(3):
            assert [counts.get((layer, name), 0) for name in LINEARS] == PRODUCTS[now], (now, layer)


def kept_elements(model, mode):
    """Numbers that a forward pass keeps for the backward pass, without parameters."""
    base_of(model).set_activation_checkpointing(mode)
    kept = {}
    parameters = {p.data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**make_batch(model.config), return_logits=False)
    return sum(tensor.numel() for tensor in kept.values())


@pytest.mark.parametrize("bits", [None, 4])
def test_the_more_is_recomputed_the_less_is_kept(model_folder, bits):
    model = make_model(model_folder, "lora", bits)
    off, mlp, on = (kept_elements(model, mode) for mode in MODES)
    assert off > mlp > on > 0


def test_evaluation_recomputes_nothing(model_folder, monkeypatch):
    model = make_model(model_folder, "ptuning", None).eval()
    expected = loss_and_gradients(model, "off")
    for mode in ("mlp", "on"):
        counts = count_products(model, monkeypatch)
        actual = loss_and_gradients(model, mode)
        assert set(counts.values()) == {1}
        assert all(torch.equal(ours, value) for ours, value in zip(actual, expected, strict=True))
        monkeypatch.undo()
