"""Many requests in one batch: each gets what it gets alone."""

import functools
import threading
import time

import pytest
import torch

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape, add_prefix_encoder
from chatglm_tuning.adapters.served import BASE_ALONE, AdapterSet
from chatglm_tuning.checkpoint import save_adapter_files
from chatglm_tuning.errors import UserError
from chatglm_tuning.inference import engine as engine_module
from chatglm_tuning.inference.engine import (
    BatchEngine,
    EngineClosedError,
    Finished,
    QueueFullError,
    Request,
    stream_from,
)
from chatglm_tuning.inference.stream import GenerationSettings, stream_tokens
from chatglm_tuning.loading import add_served_adapter, load_base, load_for_inference
from tests.conftest import load_golden_model
from tests.model_folder import EMBEDDED

NAMES = ("base", "lora_a", "lora_b", "prefix")


def greedy(ids, new_tokens=24):
    return GenerationSettings(max_length=len(ids) + new_tokens, do_sample=False, temperature=1.0, top_p=1.0)


def sampled(ids, seed):
    return GenerationSettings(max_length=len(ids) + 24, do_sample=True, temperature=0.95, top_p=0.7, seed=seed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The embedded base, two LoRA adapters of different rank and targets, and a prefix."""
    root = tmp_path_factory.mktemp("served")
    (root / "base").symlink_to(EMBEDDED)
    for seed, (name, rank, targets) in enumerate(
        [("lora_a", 2, ["query_key_value"]), ("lora_b", 4, ["query_key_value", "dense"])]
    ):
        torch.manual_seed(seed)
        model = add_lora(
            load_base(str(root / "base")).model,
            make_lora_config(rank=rank, alpha=rank, dropout=0.0, targets=targets),
        )
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        save_adapter_files(model, root / name, for_original=False)
    torch.manual_seed(7)
    model = load_base(str(root / "base")).model
    add_prefix_encoder(model, PrefixShape(5, prefix_projection=True), None, "")
    save_adapter_files(model, root / "prefix", for_original=False)
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def prompts():
    """Prompts of 3 to 23 tokens; the second half of every id range is unlike the first."""
    generator = torch.Generator().manual_seed(3)
    lengths = [3, 9, 4, 23, 5, 12, 7, 16]
    return [torch.randint(100, 900, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module", params=[None, 4], ids=["full", "int4"])
def served(request, folders):
    """The engine, its adapters by name, and a finished prompt's special tokens."""
    base = load_base(str(folders["base"]), quantization_bit=request.param)
    adapters = AdapterSet(base.model)
    by_name = {"base": BASE_ALONE}
    by_name |= {name: add_served_adapter(base, adapters, folders[name]) for name in NAMES[1:]}
    engine = BatchEngine(adapters, max_rows=5, max_waiting=64)
    yield engine, by_name, [base.tokenizer.gmask_token_id, base.tokenizer.bos_token_id], request.param
    engine.close()


@pytest.fixture(scope="module")
def alone(folders):
    """What the usual loading and `generate` answer: a function of adapter, prompt, settings and quantization."""
    checkpoint = {"lora_a": "lora_checkpoint", "lora_b": "lora_checkpoint", "prefix": "ptuning_checkpoint"}

    @functools.cache
    def load(name, bits):
        flags = {checkpoint[name]: folders[name]} if name in checkpoint else {}
        return load_for_inference(str(folders["base"]), quantization_bit=bits, dtype="float32", **flags)[0]

    def answer(name, prompt_ids, settings, bits):
        return list(stream_tokens(load(name, bits), torch.tensor([prompt_ids]), settings=settings))

    return answer


def collect(engine, requests):
    """Submit all requests at once; the tokens and the end of each."""
    events = [[] for _ in requests]
    for request, into in zip(requests, events, strict=True):
        engine.submit(request, into.append)
    deadline = time.monotonic() + 60
    while not all(into and isinstance(into[-1], Finished) for into in events):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [(into[:-1], into[-1]) for into in events]


@pytest.mark.parametrize("settings_of", [greedy, lambda ids: sampled(ids, seed=5)], ids=["greedy", "sampled"])
def test_mixed_rows_get_what_each_gets_alone(served, alone, prompts, settings_of):
    engine, by_name, special, bits = served
    names = [NAMES[index % len(NAMES)] for index in range(2 * len(prompts))]
    all_ids = [[*prompts[index % len(prompts)], *special] for index in range(len(names))]
    requests = [
        Request(prompt_ids=ids, settings=settings_of(ids), adapter=by_name[name])
        for ids, name in zip(all_ids, names, strict=True)
    ]
    together = collect(engine, requests)
    expected = [alone(name, ids, settings_of(ids), bits) for ids, name in zip(all_ids, names, strict=True)]
    assert [tokens for tokens, _ in together] == expected
    assert len({str(expected[start :: len(NAMES)]) for start in range(len(NAMES))}) == len(NAMES)
    for (tokens, finished), ids in zip(together, all_ids, strict=True):
        assert finished.reason == ("length" if len(ids) + len(tokens) >= len(ids) + 24 else "stop")


@pytest.mark.parametrize("name", ["single0", "single1", "single2", "single3"])
def test_a_row_equals_the_released_model(golden, golden_model, name):
    facts = golden.json("generation")
    ids = facts[name]["input_ids"][0]
    engine = BatchEngine(AdapterSet(golden_model))
    try:
        assert list(stream_from(engine, Request(prompt_ids=ids, settings=greedy(ids, 32)))) == facts[name]["new_ids"][0]
    finally:
        engine.close()


def test_a_row_with_a_prefix_equals_the_released_model(golden):
    facts = golden.json("generation")
    adapters = AdapterSet(load_golden_model(golden))
    weight = golden.tensors("ptuning")["param/transformer.prefix_encoder.embedding.weight"]
    prefix = adapters.add_prefix(PrefixShape(8), {"embedding.weight": weight}, "")
    names = ["single0", "single1", "single2", "single3"]
    requests = [
        Request(prompt_ids=facts[name]["input_ids"][0], settings=greedy(facts[name]["input_ids"][0], 32), adapter=kind)
        for name in names
        for kind in (prefix, BASE_ALONE)
    ]
    engine = BatchEngine(adapters)
    try:
        answers = [tokens for tokens, _ in collect(engine, requests)]
    finally:
        engine.close()
    assert answers == [facts[kind + name]["new_ids"][0] for name in names for kind in ("ptuning_", "")]


def test_eop_ends_an_answer_and_is_not_handed_out(golden):
    ids = golden.json("generation")["single0"]["input_ids"][0]
    new_ids = golden.json("generation")["single0"]["new_ids"][0]
    model = load_golden_model(golden)
    model.config.eos_token_id = new_ids[5]
    engine = BatchEngine(AdapterSet(model))
    try:
        [(tokens, finished)] = collect(engine, [Request(prompt_ids=ids, settings=greedy(ids, 32))])
    finally:
        engine.close()
    assert tokens == new_ids[: new_ids.index(new_ids[5])]
    assert finished == Finished("stop")


def test_a_cancelled_row_leaves_and_the_others_go_on(served, prompts, alone):
    engine, _, special, bits = served
    long, short = [*prompts[1], *special], [*prompts[0], *special]
    drawn = threading.Event()
    events = []

    def deliver(event):
        events.append(event)
        drawn.set()

    cancelled = engine.submit(Request(prompt_ids=long, settings=greedy(long, 200)), deliver)
    drawn.wait(10)
    cancelled.cancel()
    assert list(stream_from(engine, Request(prompt_ids=short, settings=greedy(short)))) == alone(
        "base", short, greedy(short), bits
    )
    assert events[-1] == Finished("cancelled")
    assert len(events) < 200


def test_a_full_queue_and_a_closed_engine_refuse(golden_model, prompts):
    """As many as have a row and may wait are taken, however fast they come; several at once are taken or refused."""
    special = [golden_model.config.gmask_token_id, golden_model.config.bos_token_id]
    ids = [*prompts[0], *special]
    engine = BatchEngine(AdapterSet(golden_model), max_rows=2, max_waiting=1)
    request = Request(prompt_ids=ids, settings=greedy(ids, 20))
    events = []
    assert engine.capacity == 3
    with engine.paused():
        engine.submit(request, events.append)
        with pytest.raises(QueueFullError):
            engine.submit_all([(request, events.append)] * 3)
        engine.submit_all([(request, events.append)] * 2)
        with pytest.raises(QueueFullError):
            engine.submit(request, events.append)
    later = collect_when_free(engine, request)
    engine.close(drain_seconds=None)
    assert [event.reason for event in events if isinstance(event, Finished)] == ["length"] * 3
    assert len(events) == 3 * 21
    assert len(later) == 21
    with pytest.raises(EngineClosedError):
        engine.submit(request, events.append)


def collect_when_free(engine, request):
    """Ask until the engine takes the request; what it answers."""
    deadline = time.monotonic() + 30
    while True:
        assert time.monotonic() < deadline
        try:
            [(tokens, finished)] = collect(engine, [request])
        except QueueFullError:
            time.sleep(0.01)
        else:
            return [*tokens, finished]


def count_reads(engine, monkeypatch):
    """A list that grows by the size `(rows, tokens)` of everything that the engine's model reads of prompts."""
    sizes = []
    read = engine._read_prompts

    def note(generations):
        sizes.append((len(generations), max(len(generation.request.prompt_ids) for generation in generations)))
        return read(generations)

    monkeypatch.setattr(engine, "_read_prompts", note)
    return sizes


def test_prompts_that_wait_are_read_together(served, prompts, monkeypatch):
    """In the order in which they came, as many as there are rows and within a number of tokens."""
    engine, by_name, special, _ = served
    all_ids = [[*prompt, *special] for prompt in prompts]
    requests = [
        Request(prompt_ids=ids, settings=greedy(ids, 2), adapter=by_name[NAMES[len(ids) % 4]]) for ids in all_ids
    ]
    sizes = count_reads(engine, monkeypatch)
    with engine.paused():
        collected = threading.Thread(target=collect, args=(engine, requests))
        collected.start()
        wait_until(lambda: engine.waiting == len(requests))
    collected.join()
    assert sizes == [(5, 25), (3, 18)]
    sizes.clear()
    monkeypatch.setattr(engine_module, "_TOKENS_READ_TOGETHER", 30)
    with engine.paused():
        collected = threading.Thread(target=collect, args=(engine, requests[:5]))
        collected.start()
        wait_until(lambda: engine.waiting == 5)
    collected.join()
    assert sizes == [(2, 11), (1, 6), (1, 25), (1, 7)]


def test_the_head_is_not_copied_for_every_prompt(golden_model):
    """Nor is there a product for each: in bf16 on a CPU that took most of the time of reading several prompts."""
    read = []
    with golden_model.lm_head.register_forward_pre_hook(lambda _, given: read.append(given[0])):
        ids = torch.full((8, 6), 9)
        ids[:, -2:] = torch.tensor([golden_model.config.gmask_token_id, golden_model.config.bos_token_id])
        golden_model(input_ids=ids, logits_to_keep=1)
    assert [(states.shape[:2], states.is_contiguous()) for states in read] == [((8, 1), True)]


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_prompt_that_cannot_be_read_fails_alone(served, alone, prompts):
    engine, _, special, bits = served
    good, bad = [*prompts[1], *special], [10**6, *prompts[2], *special]
    requests = [Request(prompt_ids=ids, settings=greedy(ids)) for ids in (good, bad, good)]
    (first, _), (_, failed), (last, _) = collect(engine, requests)
    assert isinstance(failed.error, IndexError)
    assert first == last == alone("base", good, greedy(good), bits)


def test_a_pause_gets_its_turn_while_rows_are_drawn(golden_model, prompts):
    special = [golden_model.config.gmask_token_id, golden_model.config.bos_token_id]
    ids = [*prompts[0], *special]
    engine = BatchEngine(AdapterSet(golden_model))
    try:
        busy = engine.submit(Request(prompt_ids=ids, settings=greedy(ids, 230)), lambda _: None)
        for _ in range(10):
            before = engine.drawn_tokens
            with engine.paused():
                drawn = engine.drawn_tokens
                time.sleep(0.005)
                assert engine.drawn_tokens == drawn
            assert drawn - before <= 3
            wait_until(lambda drawn=drawn: engine.drawn_tokens > drawn)  # it goes on by itself
        busy.cancel()
    finally:
        engine.close()


def test_closing_without_patience_cancels(golden_model, prompts):
    special = [golden_model.config.gmask_token_id, golden_model.config.bos_token_id]
    ids = [*prompts[0], *special]
    engine = BatchEngine(AdapterSet(golden_model), max_rows=1)
    events = [[], []]
    for into in events:
        engine.submit(Request(prompt_ids=ids, settings=greedy(ids, 240)), into.append)
    engine.close()
    assert [into[-1] for into in events] == [Finished("cancelled")] * 2


def test_a_row_with_nan_fails_alone(served, prompts, alone):
    engine, by_name, special, bits = served
    ids = [*prompts[2], *special]
    with engine.paused() as adapters:
        healthy = by_name["prefix"].prefix
        broken = type(by_name["prefix"])(prefix=torch.full_like(healthy, float("nan")))
        assert adapters.model is not None
    wanted = [Request(prompt_ids=ids, settings=greedy(ids), adapter=adapter) for adapter in (broken, BASE_ALONE)]
    (_, failed), (tokens, finished) = collect(engine, wanted)
    assert isinstance(failed.error, UserError)
    assert "NaN" in str(failed.error)
    assert tokens == alone("base", ids, greedy(ids), bits)
    assert finished.error is None


def test_a_cancelled_request_leaves_the_queue_while_all_rows_are_busy(golden_model, prompts):
    special = [golden_model.config.gmask_token_id, golden_model.config.bos_token_id]
    ids = [*prompts[0], *special]
    engine = BatchEngine(AdapterSet(golden_model), max_rows=1, max_waiting=1)
    is_running, has_left = threading.Event(), threading.Event()
    ends = []

    def note(event):
        if isinstance(event, Finished):
            ends.append(event)
            has_left.set()

    try:
        busy = engine.submit(Request(prompt_ids=ids, settings=greedy(ids, 230)), lambda _: is_running.set())
        assert is_running.wait(10)
        waiting = engine.submit(Request(prompt_ids=ids, settings=greedy(ids)), note)
        waiting.cancel()
        assert has_left.wait(10)
        assert engine.running == 1
        engine.submit(Request(prompt_ids=ids, settings=greedy(ids)), note)
        busy.cancel()
    finally:
        engine.close(drain_seconds=None)
    assert ends == [Finished("cancelled"), Finished("length")]


def test_an_error_while_rows_are_put_together_ends_them_all_and_not_the_engine(golden_model, prompts, monkeypatch):
    special = [golden_model.config.gmask_token_id, golden_model.config.bos_token_id]
    ids = [*prompts[0], *special]
    engine = BatchEngine(AdapterSet(golden_model))
    is_running = threading.Event()
    first = []

    def note(event):
        first.append(event)
        if len(first) > 24:
            is_running.set()

    def fail(*_):
        raise MemoryError("no room")

    try:
        engine.submit(Request(prompt_ids=ids, settings=greedy(ids, 230)), note)
        assert is_running.wait(10)
        with monkeypatch.context() as patch:
            patch.setattr(engine_module, "GrowingLayer", fail)
            [(_, second)] = collect(engine, [Request(prompt_ids=ids, settings=greedy(ids))])
        assert isinstance(first[-1].error, MemoryError)
        assert isinstance(second.error, MemoryError)
        [(tokens, finished)] = collect(engine, [Request(prompt_ids=ids, settings=greedy(ids))])
    finally:
        engine.close()
    assert finished == Finished("length")
    assert tokens == first[: len(tokens)]
