"""The pool of blocks that large results lie on: when a block comes back, and how much is held."""

import gc
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from chatglm_tuning import allocator
from chatglm_tuning.allocator import BlockPool, step_empty

ROUNDING = allocator._ROUNDING_BYTES


def make(pool, bytes_, dtype=torch.uint8):
    return pool.empty((bytes_ // dtype.itemsize,), dtype)


def free_bytes(pool):
    return sum(size for size, _, _ in (*pool._free, *pool._returned))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (129, 1000)])
def test_a_tensor_is_as_asked_for(dtype, shape):
    tensor = BlockPool().empty(shape, dtype)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == (shape, dtype, "cpu")
    assert tensor.is_contiguous()
    assert not tensor._is_view()
    tensor.copy_(torch.arange(tensor.numel()).view(shape) % 100)
    assert torch.equal(tensor.flatten().long(), torch.arange(tensor.numel()) % 100)


@pytest.mark.parametrize(
    "hold",
    [
        lambda tensor: tensor[10:20],
        lambda tensor: tensor.view(torch.int16),
        lambda tensor: tensor.detach(),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: tensor.numpy(),
    ],
)
def test_a_block_comes_back_when_the_last_view_is_gone(hold):
    pool = BlockPool()
    tensor = make(pool, ROUNDING)
    address = tensor.data_ptr()
    view = hold(tensor)
    del tensor
    gc.collect()
    assert make(pool, ROUNDING).data_ptr() != address
    assert pool.held_bytes == 2 * ROUNDING
    del view
    gc.collect()
    addresses = {block.data_ptr() for block in [make(pool, ROUNDING) for _ in range(2)]}
    assert address in addresses
    assert pool.held_bytes == 2 * ROUNDING


def test_a_block_that_autograd_keeps_does_not_come_back_before_the_backward_pass():
    pool = BlockPool()
    factor = pool.empty((100,), torch.float32).fill_(3)
    address = factor.data_ptr()
    leaf = torch.ones(100, requires_grad=True)
    product = leaf * factor
    del factor
    other = pool.empty((100,), torch.float32).fill_(7)
    assert other.data_ptr() != address
    product.sum().backward()
    assert torch.equal(leaf.grad, torch.full((100,), 3.0))
    del product
    assert pool.empty((100,), torch.float32).data_ptr() == address


def test_live_tensors_never_share_a_block():
    pool = BlockPool()
    generator = torch.Generator().manual_seed(0)
    alive = {}
    for number in range(300):
        size = int(torch.randint(1, 8 * ROUNDING, (1,), generator=generator))
        alive[number] = make(pool, size).fill_(number % 251)
        for key in [key for key in alive if torch.rand(1, generator=generator) < 0.3]:
            assert (alive.pop(key) == key % 251).all()
        spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in alive.values())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all((tensor == key % 251).all() for key, tensor in alive.items())


def test_a_smaller_tensor_takes_a_free_block_of_up_to_twice_its_size():
    pool = BlockPool()
    address = make(pool, 4 * ROUNDING).data_ptr()
    assert make(pool, 2 * ROUNDING).data_ptr() == address
    assert pool.held_bytes == 4 * ROUNDING
    smaller = make(pool, ROUNDING)  # which is too small for it: it goes
    assert pool.held_bytes == ROUNDING
    assert smaller.nbytes == ROUNDING


def test_the_smallest_block_that_serves_is_taken():
    pool = BlockPool()
    blocks = {size: make(pool, size * ROUNDING) for size in (5, 4, 6)}
    address = blocks[4].data_ptr()
    blocks.clear()
    assert make(pool, 3 * ROUNDING + 1).data_ptr() == address


def test_free_blocks_go_before_a_new_one_is_made():
    pool = BlockPool()
    blocks = [make(pool, size * ROUNDING) for size in (1, 2, 3)]
    blocks.clear()
    assert pool.held_bytes == 6 * ROUNDING
    made = [make(pool, 4 * ROUNDING)]  # the two largest, which make room for it
    assert pool.held_bytes == 5 * ROUNDING
    made.append(make(pool, 8 * ROUNDING))
    assert pool.held_bytes == 12 * ROUNDING
    made.clear()
    sizes = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    for size in sizes:
        make(pool, size * ROUNDING)
        assert pool.held_bytes <= max(12, 2 * max(sizes)) * ROUNDING


def test_a_block_that_comes_back_in_the_middle_of_a_request_neither_waits_for_it_nor_disturbs_it():
    pool = BlockPool()
    cycle = [make(pool, ROUNDING)]
    cycle.append(cycle)  # freed by the garbage collector, whenever that runs
    make(pool, ROUNDING)
    make(pool, 3 * ROUNDING)
    del cycle
    with pool._lock:
        before = list(pool._free)
        gc.collect()
        assert pool._free == before
    address = make(pool, ROUNDING).data_ptr()
    assert make(pool, ROUNDING).data_ptr() == address


def test_threads_may_make_and_free_at_the_same_time():
    pool, failures = BlockPool(), []

    def work(number):
        for _ in range(200):
            tensor = make(pool, ROUNDING * (1 + number % 3)).fill_(number)
            time.sleep(0)
            if not (tensor == number).all():
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    gc.collect()
    assert free_bytes(pool) == pool.held_bytes <= 48 * ROUNDING  # two blocks a thread, of up to twice the size


def test_only_large_results_on_the_cpu_are_pooled_and_only_when_asked_for(monkeypatch):
    pool = BlockPool()
    monkeypatch.setattr(allocator, "_pool", pool)
    elements = allocator._LEAST_POOLED_BYTES // 4
    # A training run of another test may have left it on.
    monkeypatch.setitem(allocator._switch, "is_on", False)
    step_empty((elements,), torch.empty(0))
    assert pool.held_bytes == 0
    monkeypatch.setitem(allocator._switch, "is_on", True)
    step_empty((elements - 1,), torch.empty(0))
    assert step_empty((elements,), torch.empty(0, device="meta")).device.type == "meta"
    assert pool.held_bytes == 0
    tensor = step_empty((2, elements), torch.empty(0, dtype=torch.bfloat16))
    assert (tensor.dtype, tensor.shape, pool.held_bytes) == (torch.bfloat16, (2, elements), 4 * elements)


def compare_steps() -> None:
    """Three steps of a model whose results are pooled, against the same without; in a process of its own."""
    from chatglm_tuning.kernels import set_compiling
    from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration

    set_compiling(False)
    allocator._LEAST_POOLED_BYTES = 1024
    results = []
    for is_on in (False, True):
        torch.manual_seed(0)
        config = ChatGLMConfig(
            vocab_size=200, hidden_size=64, inner_hidden_size=256, num_attention_heads=2, num_layers=2, pre_seq_len=4,
            bos_token_id=190, gmask_token_id=191, mask_token_id=192, eos_token_id=193,
        )  # fmt: skip
        model = ChatGLMForConditionalGeneration(config).requires_grad_(False).train()
        model.transformer.prefix_encoder.requires_grad_(True)
        if is_on:
            allocator.keep_freed_memory()
        optimizer = torch.optim.SGD(model.transformer.prefix_encoder.parameters(), lr=1e-2)
        losses = []
        for seq in (60, 37, 60):
            ids = torch.randint(0, 190, (3, seq))
            ids[:, 4], ids[:, 5] = 191, 190
            loss = model(input_ids=ids, labels=ids, return_logits=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        results.append([*losses, model.transformer.prefix_encoder.embedding.weight.detach().clone()])
    assert 0 < free_bytes(allocator._pool) <= allocator._pool.held_bytes
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    allocator.keep_freed_memory(False)
    before = allocator._pool.held_bytes
    step_empty((10**6,), torch.empty(0))
    assert allocator._pool.held_bytes == before


def test_results_with_and_without_freed_memory_kept_are_equal():
    code = f"from {__name__} import compare_steps; compare_steps()"
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_goes_back_to_the_system():
    """In a process of its own: what mallopt sets cannot be asked for or taken back."""
    program = """
import psutil, sys, torch
from chatglm_tuning import allocator
if sys.argv[1] == "return":
    allocator.return_freed_memory()
else:
    allocator.keep_freed_memory()
resident = lambda: psutil.Process().memory_info().rss
before = resident()
tensors = [torch.ones(2**20) for _ in range(64)]
pins = [tensor.clone()[:1].clone() for tensor in tensors]
assert resident() - before > 2**27
del tensors
print((resident() - before) // 2**20)
"""
    left = {}
    for mode in ("return", "keep"):
        done = subprocess.run([sys.executable, "-c", program, mode], capture_output=True, text=True, check=True)
        left[mode] = int(done.stdout)
    assert left["return"] < 32
    assert left["keep"] > 128
