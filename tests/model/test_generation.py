"""Greedy, batched, beam and prefix generation, token for token against the released model."""

import pytest
import torch

from tests.conftest import load_golden_model

SINGLES = ["single0", "single1", "single2", "single3"]
NO_PADDING_TOKEN = {"do_sample": False, "pad_token_id": 3}


def greedy(model, ids, steps=32, **kwargs):
    # No fixture reaches <eop> in its tokens; min_new_tokens only keeps a wrong <eop> from shortening the comparison.
    ids = torch.tensor(ids)
    out = model.generate(ids, max_new_tokens=steps, min_new_tokens=steps, **NO_PADDING_TOKEN, **kwargs)
    return out[:, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def prefix_model(golden):
    model = load_golden_model(golden, pre_seq_len=8)
    key = "transformer.prefix_encoder.embedding.weight"
    model.transformer.prefix_encoder.embedding.weight.data.copy_(golden.tensors("ptuning")[f"param/{key}"])
    return model


@pytest.mark.parametrize("name", [*SINGLES, "batch4_left_padded", "single1_model_masks", "mask_prompt_model_masks"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_the_released_model(golden, golden_model, name, use_cache):
    case = golden.json("generation")[name]
    assert greedy(golden_model, case["input_ids"], use_cache=use_cache) == case["new_ids"]


@pytest.mark.parametrize("name", SINGLES)
def test_greedy_with_eager_attention_equals_the_released_model(golden, name):
    case = golden.json("generation")[name]
    assert greedy(load_golden_model(golden, attention="eager"), case["input_ids"]) == case["new_ids"]


def test_given_position_ids_are_kept_and_continued(golden, golden_model):
    """The released tokenizer's own positions, which prefer [MASK]: `<sop>` stays at position 3."""
    case = golden.json("generation")["mask_prompt_via_tokenizer"]
    positions = torch.tensor(golden.json("tokenizer")["mask_prompt"]["position_ids"])
    assert greedy(golden_model, case["input_ids"], position_ids=positions) == case["new_ids"]


def test_stream_of_the_released_model_is_a_prefix_of_ours(golden, golden_model):
    case = golden.json("generation")
    ours = greedy(golden_model, case["single1"]["input_ids"])
    streamed = case["stream_single1"]["new_ids"][0]
    assert len(streamed) == 31
    assert ours[0][:31] == streamed


def test_beam_search_equals_the_released_model(golden, golden_model):
    case = golden.json("generation")["beam3_single0"]
    steps = len(case["new_ids"][0])
    assert greedy(golden_model, case["input_ids"], steps, num_beams=3) == case["new_ids"]


@pytest.mark.parametrize("name", ["ptuning_batch4_left_padded", *(f"ptuning_{single}" for single in SINGLES)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_prefix_generation_equals_the_released_model(golden, prefix_model, name, use_cache):
    case = golden.json("generation")[name]
    assert greedy(prefix_model, case["input_ids"], use_cache=use_cache) == case["new_ids"]


def test_beams_of_a_padded_batch_equal_those_of_single_rows(golden, golden_model):
    generation = golden.json("generation")
    batch = generation["batch4_left_padded"]["input_ids"]
    together = greedy(golden_model, batch, 12, num_beams=3)
    alone = [greedy(golden_model, generation[name]["input_ids"], 12, num_beams=3)[0] for name in SINGLES]
    assert together == alone


def test_sampling_is_seeded_and_stays_within_top_p(golden, golden_model):
    ids = torch.tensor(golden.json("generation")["single0"]["input_ids"])
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out = golden_model.generate(ids, max_new_tokens=8, do_sample=True, top_p=0.7, temperature=0.95, pad_token_id=3)
        draws.append(out.tolist())
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


def test_cached_steps_equal_one_full_forward(golden, golden_model):
    """Logits of a cached left-padded batch, step by step, against one uncached pass over the finished rows."""
    case = golden.json("generation")["batch4_left_padded"]
    ids = torch.tensor(case["input_ids"])
    out = golden_model.generate(
        ids, max_new_tokens=8, min_new_tokens=8, output_logits=True, return_dict_in_generate=True, **NO_PADDING_TOKEN
    )
    mask = torch.cat([(ids != 3).long(), torch.ones(4, 8, dtype=torch.long)], dim=1)
    with torch.no_grad():
        full = golden_model(out.sequences, attention_mask=mask, use_cache=False).logits
    steps = torch.stack(out.logits, dim=1)
    torch.testing.assert_close(steps, full[:, ids.shape[1] - 1 : -1], rtol=1e-4, atol=1e-5)
