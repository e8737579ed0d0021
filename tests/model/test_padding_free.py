"""Batches in one row against padded batches: losses, gradients, what dropout does, and where there is no row."""

import pytest
import torch
from torch.nn import functional

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape, add_prefix_encoder
from chatglm_tuning.loading import load_base
from chatglm_tuning.model import padding_free
from chatglm_tuning.model.masks import build_prefix_lm_mask
from chatglm_tuning.model.padding_free import Sample, SharedPrefix, pack_batch, packed_attention, random_mask
from chatglm_tuning.model.rotary import rotary_angles, rotate
from tests.model_folder import write_tiny_model

LENGTHS = [(5, 9), (11, 3), (2, 14)]  # tokens of prompt and answer
SIDES = ["right", "left", "single"]
# Queries at a time: 3 of the first sample of 14 tokens (no prefix), so that blocks end in the prompt and beyond it.
FEW_SCORES = 2 * 14 * 3


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model")


def make_model(model_folder, method, bits=None, dtype=torch.float32, dropout=0.0):
    torch.manual_seed(2)
    model = load_base(str(model_folder), quantization_bit=bits, dtype=dtype).model
    if method == "lora":
        model = add_lora(model, make_lora_config(rank=2, alpha=4, dropout=0.0, targets=("query_key_value", "dense")))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    else:
        model.config.prefix_dropout = dropout
        add_prefix_encoder(model, PrefixShape(4), None, "")
    return model.train()


def make_batch(config, side):
    generator = torch.Generator().manual_seed(3)
    lengths = LENGTHS[:1] if side == "single" else LENGTHS
    longest = max(sum(pair) for pair in lengths)
    rows = []
    for prompt, answer in lengths:
        ids = torch.randint(10, 60, (prompt + answer,), generator=generator)
        ids[prompt - 1], ids[prompt] = config.gmask_token_id, config.bos_token_id
        labels = torch.where(torch.arange(len(ids)) < prompt, -100, ids)
        missing = longest - len(ids)
        pads = (missing, 0) if side == "left" else (0, missing)
        columns = ((ids, config.pad_token_id), (labels, -100), (torch.ones_like(ids), 0))
        rows.append([functional.pad(column, pads, value=value) for column, value in columns])
    ids, labels, mask = (torch.stack(column) for column in zip(*rows, strict=True))
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def transformer_of(model):
    return (model.get_base_model() if hasattr(model, "peft_config") else model).transformer


def loss_and_gradients(model, batch, is_padding_free):
    transformer_of(model).is_padding_free = is_padding_free
    model.zero_grad(set_to_none=True)
    loss = model(**batch, return_logits=False).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert all(gradient.norm() > 0 for gradient in gradients.values())
    return {"loss": loss.detach(), **gradients}


def largest_distance(actual, expected):
    """The largest distance of two results, relative to the norm of the expected one."""
    assert actual.keys() == expected.keys()
    return max(((actual[key].float() - value.float()).norm() / value.float().norm()).item()
               for key, value in expected.items())  # fmt: skip


def calls_of(monkeypatch, name):
    """Return a list that grows with every call that the model makes of the function `name` of padding_free."""
    calls, unpatched = [], getattr(padding_free, name)
    monkeypatch.setattr(f"chatglm_tuning.model.modeling.{name}", lambda *given: calls.append(1) or unpatched(*given))
    return calls


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("method", ["lora", "ptuning"])
@pytest.mark.parametrize("scores_at_once", [None, FEW_SCORES])
def test_loss_and_gradients_equal_those_of_a_padded_batch(
    model_folder, method, bits, side, scores_at_once, monkeypatch
):
    if scores_at_once is not None:
        monkeypatch.setattr(padding_free, "_SCORES_AT_ONCE", scores_at_once)
    model = make_model(model_folder, method, bits)
    batch = make_batch(model.config, side)
    packed = calls_of(monkeypatch, "packed_attention")
    expected = loss_and_gradients(model, batch, False)
    assert not packed
    actual = loss_and_gradients(model, batch, True)
    assert len(packed) == model.config.num_layers
    assert largest_distance(actual, expected) < 1e-5


def test_small_blocks_end_inside_the_prompt_and_after_it(monkeypatch):
    monkeypatch.setattr(padding_free, "_SCORES_AT_ONCE", FEW_SCORES)
    fused, rotary = torch.randn(1, 14, 2, 12), rotary_angles(torch.arange(14).expand(1, 2, -1), 4, torch.float32)
    work = padding_free._SampleAttention(fused, *rotary, (None, None), Sample(0, 14, 5))
    assert [(block.queries.start, block.queries.stop, block.keys) for block in work.blocks()] == [
        (0, 3, 5), (3, 6, 6), (6, 9, 9), (9, 12, 12), (12, 14, 14)]  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "ptuning"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_in_bf16_both_paths_are_as_far_from_the_fp32_gradients(model_folder, method, side):
    exact_model = make_model(model_folder, method)
    batch = make_batch(exact_model.config, side)
    exact = loss_and_gradients(exact_model, batch, False)
    model = make_model(model_folder, method, dtype=torch.bfloat16)
    padded, packed = (
        torch.cat([(result[key].float() - exact[key]).flatten() / exact[key].norm() for key in exact])
        for result in (loss_and_gradients(model, batch, False), loss_and_gradients(model, batch, True))
    )
    # Scores and prefix stay fp32 in the packed path; what is rounded besides is the same: measured 0.95 to 1.04.
    assert packed.norm() < 1.25 * padded.norm()
    assert 0 < padded.norm() < 0.1
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


@pytest.mark.parametrize("method", ["lora", "ptuning"])
@pytest.mark.parametrize("side", SIDES)
def test_fp16_whose_attention_is_padded_inside_is_equal_within_its_rounding(model_folder, method, side, monkeypatch):
    model = make_model(model_folder, method, dtype=torch.float16)
    batch = make_batch(model.config, side)
    attended, packed = calls_of(monkeypatch, "packed_attention"), calls_of(monkeypatch, "pack_batch")
    expected = loss_and_gradients(model, batch, False)
    assert not packed
    actual = loss_and_gradients(model, batch, True)
    assert packed
    assert not attended
    assert largest_distance(actual, expected) < 1e-2


@pytest.mark.parametrize("method", ["lora", "ptuning"])
@pytest.mark.parametrize("side", SIDES)
@torch.no_grad()
def test_without_a_cache_logits_equal_those_with_one_and_padding_is_zero(model_folder, method, side):
    model = make_model(model_folder, method).eval()
    batch = make_batch(model.config, side)
    batch.pop("labels")
    real = batch["attention_mask"].bool()
    expected = model(**batch, use_cache=True)
    actual = model(**batch, use_cache=False, output_hidden_states=True)
    assert actual.past_key_values is None
    torch.testing.assert_close(actual.logits[real], expected.logits[real], rtol=1e-4, atol=1e-5)
    assert not actual.logits[~real].any()
    for states in actual.hidden_states:
        assert (states[real].norm(dim=-1) > 0).all()
        assert not states[~real].any()


def test_positions_whose_prompt_is_not_the_beginning_are_not_packed(model_folder, monkeypatch):
    model = make_model(model_folder, "lora")
    batch = make_batch(model.config, "right")
    positions = transformer_of(model).build_position_ids(batch["input_ids"], batch["attention_mask"])
    assert pack_batch(positions, batch["attention_mask"]) is not None
    positions[1, 1] = torch.tensor([1, 2, 3, *[0] * (positions.shape[-1] - 3)])
    assert pack_batch(positions, batch["attention_mask"]) is None
    packed = calls_of(monkeypatch, "packed_attention")
    expected = loss_and_gradients(model, {**batch, "position_ids": positions}, False)
    actual = loss_and_gradients(model, {**batch, "position_ids": positions}, True)
    assert not packed
    assert largest_distance(actual, expected) == 0


def test_a_packed_batch_is_its_samples_one_after_the_other(model_folder):
    batch = make_batch(load_base(str(model_folder)).model.config, "left")
    model = make_model(model_folder, "lora")
    positions = transformer_of(model).build_position_ids(batch["input_ids"], batch["attention_mask"])
    packed = pack_batch(positions, batch["attention_mask"])
    assert packed.samples == (Sample(0, 14, 5), Sample(14, 14, 11), Sample(28, 16, 2))
    assert packed.shape == (3, 16)
    row = packed.pack(batch["input_ids"])
    assert torch.equal(row[0], batch["input_ids"][batch["attention_mask"].bool()])
    assert torch.equal(packed.unpack(row), batch["input_ids"] * batch["attention_mask"])


@pytest.mark.parametrize("shape", [(), (3,), (2, 5, 2, 7)])
def test_a_random_mask_has_the_shape(shape):
    mask = random_mask(shape, 0.5, torch.device("cpu"))
    assert (mask.shape, mask.dtype) == (shape, torch.bool)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_a_random_mask_leaves_out_the_share_of_dropout(dropout):
    torch.manual_seed(5)
    count = 1_000_002
    first, second = (random_mask((count,), dropout, torch.device("cpu")) for _ in range(2))
    deviation = (dropout * (1 - dropout) / count) ** 0.5
    assert (~first).double().mean().item() == pytest.approx(dropout, abs=5 * deviation)
    assert (first == second).double().mean().item() == pytest.approx(dropout**2 + (1 - dropout) ** 2, abs=0.005)
    # Four numbers come of one draw: neighbours are independent.
    both = (~first[1:] & ~first[:-1]).double().mean().item()
    assert both == pytest.approx(dropout**2, abs=0.005)


def plain_attention(fused, rotary, key, value, mask):
    """The attention of a padded batch `(batch, seq, heads, 3 · head_dim)`, by torch's own operators."""
    query, own_key, own_value = fused.chunk(3, dim=-1)
    query, own_key = rotate(query, *rotary), rotate(own_key, *rotary)
    batch = len(fused)
    key = torch.cat([key.expand(batch, -1, -1, -1), own_key], dim=1)
    value = torch.cat([value.expand(batch, -1, -1, -1), own_value], dim=1)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~functional.pad(mask, (key.shape[1] - mask.shape[-1], 0), value=True), -1e9).softmax(
        -1
    )
    return torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2)


def test_dropout_of_the_prefix_has_the_gradient_of_a_masked_prefix(monkeypatch):
    torch.manual_seed(6)
    key, value = torch.randn(3, 2, 8, requires_grad=True), torch.randn(3, 2, 8, requires_grad=True)
    fused = torch.randn(2, 6, 2, 24, requires_grad=True)
    positions = torch.tensor([[[0, 1, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4]], [[0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]]])
    attention_mask = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    cos, sin = rotary_angles(positions, 8, torch.float32)
    is_kept = torch.rand(2, *key.shape) < 0.6
    assert not is_kept.all()
    monkeypatch.setattr(padding_free, "random_mask", lambda *_: is_kept)

    packed = pack_batch(positions, attention_mask)
    row = packed_attention(
        packed.pack(fused), (packed.pack(cos), packed.pack(sin)), SharedPrefix(key, value, 0.4), packed
    )
    wanted = torch.randn_like(row)
    actual = torch.autograd.grad(row, (fused, key, value), wanted)

    mask = build_prefix_lm_mask(positions, attention_mask, 0)
    expected_row = packed.pack(
        plain_attention(fused, (cos, sin), key * is_kept[0] / 0.6, value * is_kept[1] / 0.6, mask)
    )
    torch.testing.assert_close(row, expected_row, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(actual, torch.autograd.grad(expected_row, (fused, key, value), wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_dropout_of_the_prefix_is_there_only_in_training(model_folder):
    model = make_model(model_folder, "ptuning", dropout=0.5)
    batch = make_batch(model.config, "right")
    losses = {torch.manual_seed(seed) and model(**batch).loss.item() for seed in (0, 0, 1)}
    assert len(losses) == 2
    model.eval()
    model.transformer.is_padding_free = True
    with torch.no_grad():
        first, second = (model(**batch, use_cache=False).loss.item() for _ in range(2))
        model.transformer.is_padding_free = False
        assert first == second == pytest.approx(model(**batch, use_cache=False).loss.item(), rel=1e-5)


def test_a_prefix_that_dropout_leaves_out_whole_is_zero(model_folder):
    model = make_model(model_folder, "ptuning", dropout=1.0)
    batch = make_batch(model.config, "right")
    losses = []
    for is_padding_free in (True, False):
        model.transformer.is_padding_free = is_padding_free
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)
