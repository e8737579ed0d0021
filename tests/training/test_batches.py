"""Padding and bucketing change neither the loss nor a gradient."""

import pytest
import torch

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape, add_prefix_encoder
from chatglm_tuning.data.collate import LengthBucketSampler, PrefixLMCollator
from chatglm_tuning.data.dataset import build_dataset
from chatglm_tuning.data.encode import EncodingSettings
from chatglm_tuning.loading import connect_layers, load_base, spread_layers
from tests.model_folder import write_rows, write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model", prefix_dropout=0.0)


@pytest.fixture(scope="module")
def rows(folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("rows")
    tokenizer = load_base(str(folder)).tokenizer
    file = write_rows(work / "rows.json", 13)
    return list(build_dataset([file], tokenizer, EncodingSettings(64, 96), cache_dir=work / "cache").dataset)


def make_model(folder, method, bits, *, is_connected=False):
    base = load_base(str(folder), quantization_bit=bits)
    if is_connected:
        device_of = spread_layers(base.config, [torch.device("cpu")] * 2)
        connect_layers(base.model, device_of, force_hooks=True)
    torch.manual_seed(0)
    if method == "lora":
        model = add_lora(base.model, make_lora_config(rank=4, alpha=8, dropout=0.0, targets=["query_key_value"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    else:
        add_prefix_encoder(base.model, PrefixShape(4), None, "")
        model = base.model
        model.transformer.prefix_encoder.requires_grad_(True)
    return model.train()


def loss_and_gradients(model, batches, total):
    model.zero_grad()
    loss = 0.0
    for batch in batches:
        part = model(**batch, return_logits=False, num_items_in_batch=total).loss
        part.backward()
        loss += part.item()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["lora", "ptuning"])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_padded_and_bucketed_batches_equal_single_rows(folder, rows, method, bits):
    model = make_model(folder, method, bits)
    pad = model.config.pad_token_id
    total = sum(sum(label != -100 for label in row["labels"]) for row in rows)
    order = list(LengthBucketSampler([row["length"] for row in rows], 4, seed=1))
    arrangements = {
        "right": [PrefixLMCollator(pad)(rows)],
        "left": [PrefixLMCollator(pad, padding_side="left")(rows)],
        "bucketed": [PrefixLMCollator(pad)([rows[i] for i in order[k : k + 4]]) for k in range(0, len(rows), 4)],
    }
    assert (arrangements["right"][0]["attention_mask"] == 0).sum() > 20
    expected_loss, expected = loss_and_gradients(model, [PrefixLMCollator(pad)([row]) for row in rows], total)
    for name, batches in arrangements.items():
        loss, gradients = loss_and_gradients(model, batches, total)
        assert loss == pytest.approx(expected_loss, rel=1e-5), name
        for key, gradient in gradients.items():
            assert (gradient - expected[key]).norm() <= 1e-5 * expected[key].norm(), (name, key)


@pytest.mark.parametrize("method", ["lora", "ptuning"])
def test_hooks_between_devices_change_nothing(folder, rows, method):
    """What --model_parallel adds, on one device: the hooks alone, with activations recomputed."""
    batch = [PrefixLMCollator(3)(rows)]
    results = []
    for is_connected in (False, True):
        model = make_model(folder, method, 4, is_connected=is_connected)
        inner = model.get_base_model() if method == "lora" else model
        inner.activation_checkpointing_enable({"use_reentrant": False})
        assert hasattr(inner.transformer.layers[1], "_hf_hook") == is_connected
        results.append(loss_and_gradients(model, batch, 10))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][key], results[1][1][key]) for key in results[0][1])


def test_layers_are_spread_in_equal_shares(folder):
    config = load_base(str(folder)).config
    device_of = spread_layers(config, [torch.device("cuda", 0), torch.device("cuda", 1)])
    places = [device_of(f"transformer.layers.{layer}.mlp.dense_4h_to_h.bias").index for layer in range(2)]
    assert places == [0, 1]
    assert device_of("lm_head.weight") == device_of("transformer.word_embeddings.weight") == torch.device("cuda", 0)
    assert device_of("transformer.final_layernorm.weight").index == 1
