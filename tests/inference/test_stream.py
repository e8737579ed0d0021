"""Streaming, token for token against `generate`."""

import copy
import threading
import time
from contextlib import closing

import pytest
import torch

from chatglm_tuning.errors import UserError
from chatglm_tuning.inference.stream import GenerationSettings, stream_tokens
from tests.conftest import load_golden_model

SINGLES = ["single0", "single1", "single2", "single3"]
GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0}


def prompt_of(golden, name):
    return torch.tensor(golden.json("generation")[name]["input_ids"])


def greedy_settings(ids, new_tokens=32):
    return GenerationSettings(max_length=ids.shape[1] + new_tokens, **GREEDY)


@pytest.fixture(scope="module")
def prefix_model(golden):
    model = load_golden_model(golden, pre_seq_len=8)
    key = "transformer.prefix_encoder.embedding.weight"
    model.transformer.prefix_encoder.embedding.weight.data.copy_(golden.tensors("ptuning")[f"param/{key}"])
    return model


def ending_at(model, token):
    """The model with `token` in the place of <eop>."""
    twin = copy.copy(model)
    twin.config = copy.deepcopy(model.config)
    twin.config.eos_token_id = token
    return twin


@pytest.mark.parametrize("name", SINGLES)
def test_greedy_equals_the_released_model_to_the_last_token(golden, golden_model, name):
    ids = prompt_of(golden, name)
    streamed = list(stream_tokens(golden_model, ids, settings=greedy_settings(ids)))
    assert streamed == golden.json("generation")[name]["new_ids"][0]


@pytest.mark.parametrize("name", SINGLES)
def test_a_prefix_streams_as_the_released_model_generates(golden, prefix_model, name):
    ids = prompt_of(golden, name)
    streamed = list(stream_tokens(prefix_model, ids, settings=greedy_settings(ids)))
    assert streamed == golden.json("generation")[f"ptuning_{name}"]["new_ids"][0]


def test_the_token_before_eop_is_yielded_and_eop_is_not(golden, golden_model):
    ids = prompt_of(golden, "single0")
    new_ids = golden.json("generation")["single0"]["new_ids"][0]
    end = new_ids.index(17525)
    assert 0 < end < 31
    streamed = list(stream_tokens(ending_at(golden_model, 17525), ids, settings=greedy_settings(ids)))
    assert streamed == new_ids[:end]


@pytest.mark.parametrize("seed", [1, 2])
def test_sampling_equals_generate_with_the_same_seed(golden, golden_model, seed):
    ids = prompt_of(golden, "single1")
    settings = GenerationSettings(max_length=25, do_sample=True, temperature=0.95, top_p=0.7, seed=seed)
    streamed = list(stream_tokens(golden_model, ids, settings=settings))
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": 0.95, "top_p": 0.7, "top_k": 50}
    whole = golden_model.generate(ids, max_length=25, pad_token_id=3, **sampling)
    assert streamed == whole[0, ids.shape[1] :].tolist()


def test_every_sampling_setting_has_its_effect(golden, golden_model):
    ids = prompt_of(golden, "single1")
    base = {"max_length": 25, "do_sample": True, "temperature": 5.0, "top_p": 1.0, "top_k": 50, "seed": 1}

    def draw(**changes):
        return list(stream_tokens(golden_model, ids, settings=GenerationSettings(**{**base, **changes})))

    assert draw() == draw()
    greedy = golden.json("generation")["single1"]["new_ids"][0][:20]
    assert draw(temperature=0.001) == draw(top_p=0.0001) == draw(top_k=1) == draw(do_sample=False) == greedy
    for change in ({"seed": 2}, {"temperature": 0.9}, {"top_p": 0.3}, {"top_k": 3}):
        assert draw(**change) != draw()


def test_max_length_counts_the_prompt(golden, golden_model):
    ids = prompt_of(golden, "single2")
    settings = GenerationSettings(max_length=ids.shape[1] + 3, **GREEDY)
    assert len(list(stream_tokens(golden_model, ids, settings=settings))) == 3


def test_stop_ends_the_stream(golden, golden_model):
    ids = prompt_of(golden, "single0")
    got = []
    for token in stream_tokens(golden_model, ids, settings=greedy_settings(ids), stop=lambda: len(got) >= 5):
        got.append(token)
    assert got == golden.json("generation")["single0"]["new_ids"][0][:5]


class SlowModel:
    """Generates as `model` does, but each pass waits for `gate`; counts its passes."""

    def __init__(self, model):
        self.model = copy.copy(model)
        self.config = model.config
        self.gate = threading.Event()
        self.passes = 0

    def generate(self, **arguments):
        def wait(*_):
            self.passes += 1
            self.gate.wait(10)

        handle = self.model.transformer.register_forward_pre_hook(wait)
        try:
            return self.model.generate(**arguments)
        finally:
            handle.remove()


def test_stop_does_not_wait_for_a_slow_pass_and_the_next_answer_is_whole(golden, golden_model):
    ids = prompt_of(golden, "single0")
    slow = SlowModel(golden_model)
    is_stopped = threading.Event()
    threading.Timer(0.2, is_stopped.set).start()
    start = time.perf_counter()
    assert list(stream_tokens(slow, ids, settings=greedy_settings(ids), stop=is_stopped.is_set)) == []
    assert time.perf_counter() - start < 5
    slow.gate.set()
    following = list(stream_tokens(golden_model, ids, settings=greedy_settings(ids)))
    assert following == golden.json("generation")["single0"]["new_ids"][0]
    assert slow.passes == 1


def test_closing_the_stream_ends_the_generation(golden, golden_model):
    ids = prompt_of(golden, "single0")
    slow = SlowModel(golden_model)
    slow.gate.set()
    with closing(stream_tokens(slow, ids, settings=greedy_settings(ids, 2000))) as tokens:
        next(tokens)
    following = list(stream_tokens(golden_model, ids, settings=greedy_settings(ids, 1)))
    assert len(following) == 1
    assert slow.passes < 100


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_are_told_and_not_hidden(golden, value):
    model = load_golden_model(golden)
    model.lm_head.register_forward_hook(lambda *args: torch.full_like(args[-1], value))
    ids = prompt_of(golden, "single0")
    with pytest.raises(UserError, match=r"NaN.*--dtype float32"):
        list(stream_tokens(model, ids, settings=greedy_settings(ids)))


def test_one_broken_logit_among_many_is_told_while_sampling(golden):
    model = load_golden_model(golden)

    def spoil(_module, _inputs, logits):
        logits = logits.clone()
        logits[..., 7] = float("nan")
        return logits

    model.lm_head.register_forward_hook(spoil)
    ids = prompt_of(golden, "single0")
    settings = GenerationSettings(max_length=20, do_sample=True, temperature=0.95, top_p=0.7)
    with pytest.raises(UserError, match="NaN"):
        list(stream_tokens(model, ids, settings=settings))


def test_an_error_of_the_model_reaches_the_reader(golden, golden_model):
    broken = copy.copy(golden_model)
    broken.generate = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(stream_tokens(broken, prompt_of(golden, "single0"), settings=GenerationSettings(max_length=9, **GREEDY)))
