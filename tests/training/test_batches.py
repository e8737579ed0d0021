"""Padding and bucketing change neither the loss nor a gradient."""

import pytest
import torch

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape, add_prefix_encoder
from chatglm_tuning.data.collate import LengthBucketSampler, PrefixLMCollator
from chatglm_tuning.data.dataset import build_dataset
from chatglm_tuning.data.encode import EncodingSettings
from chatglm_tuning.loading import load_base
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


def make_model(folder, method, bits):
    base = load_base(str(folder), quantization_bit=bits)
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
