"""Where the large tensors of a step on a CPU live.

The C library maps a large block anew for every tensor, and the page faults of a fresh hundred megabytes take longer
than most work on them; keeping freed blocks on its heap instead lets them splinter, step by step, by a gigabyte. So
large results come from a pool of blocks of their own, which are reused when the tensors on them are gone. Where memory
is scarcer than time there is no pool, and every freed block goes back to the system at once.
"""

import bisect
import ctypes
import math
import mmap
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_M_TRIM_THRESHOLD = -1  # the names and numbers of glibc's malloc.h
_M_MMAP_THRESHOLD = -3
_LARGEST_ON_HEAP = 2**25  # the most that glibc takes for it
_NEVER = 2**31 - 1
_RETURNED_FROM = 2**20

_LEAST_POOLED_BYTES = 2**20
_ROUNDING_BYTES = 2**16
_LARGEST_EXCESS = 2.0  # a block may serve a tensor of half its size


class BlockPool:
    """Blocks of memory that outlive the tensors on them.

    A block too large or too small for what is wanted goes before a new one is made, so that the pool never holds more
    than was in use at one time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # A tensor may be freed, and its block come back, between any two steps of `empty`: it waits here.
        self._returned: deque[tuple[int, int, mmap.mmap]] = deque()
        self._free: list[tuple[int, int, mmap.mmap]] = []  # (bytes, serial number, block), sorted
        self._made = 0
        self.held_bytes = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor on the CPU."""
        size = math.prod(shape) * dtype.itemsize
        block_size = -(-size // _ROUNDING_BYTES) * _ROUNDING_BYTES
        with self._lock:
            while self._returned:
                bisect.insort(self._free, self._returned.pop())
            entry = self._take(block_size) or self._make(block_size)
        values = np.frombuffer(entry[2], dtype=np.uint8, count=size)
        # The tensor keeps `values` alive until its storage is gone.
        weakref.finalize(values, self._returned.append, entry).atexit = False
        storage = torch.from_numpy(values).untyped_storage()
        # Not a view of another tensor: what is none may be changed in place after a custom function has returned it.
        return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))  # pyright: ignore[reportCallIssue]

    def _take(self, size: int) -> tuple[int, int, mmap.mmap] | None:
        place = bisect.bisect_left(self._free, (size,))
        if place < len(self._free) and self._free[place][0] <= size * _LARGEST_EXCESS:
            return self._free.pop(place)
        return None

    def _make(self, size: int) -> tuple[int, int, mmap.mmap]:
        dropped = 0
        while self._free and dropped < size:
            dropped += self._free.pop()[0]
        self.held_bytes += size - dropped
        self._made += 1
        if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux, which makes shared memory of it where nothing is said
            block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            block.madvise(mmap.MADV_HUGEPAGE)
        else:
            block = mmap.mmap(-1, size)
        return size, self._made, block


_pool = BlockPool()
_switch = {"is_on": False}


def step_empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return an uninitialised tensor of the dtype and on the device of `like`, for a result of a step."""
    is_pooled = _switch["is_on"] and like.device.type == "cpu"
    if is_pooled and math.prod(shape) * like.dtype.itemsize >= _LEAST_POOLED_BYTES:
        return _pool.empty(shape, like.dtype)
    return like.new_empty(tuple(shape))


def keep_freed_memory(is_on: bool = True) -> None:
    """Let this process reuse the memory of freed tensors from now on.

    To be called once a model is loaded. On a C library other than glibc, smaller tensors stay as they are.
    """
    _switch["is_on"] = is_on
    if is_on:
        _set_up_heap(_LARGEST_ON_HEAP, _NEVER)


def return_freed_memory() -> None:
    """Let this process give the memory of freed tensors back from now on, and what its heap holds unused.

    Left alone, glibc raises by itself what it keeps on the heap, until that holds most results of a step, with gaps.
    """
    _switch["is_on"] = False
    _set_up_heap(_RETURNED_FROM, _RETURNED_FROM)


def _set_up_heap(mmap_threshold: int, trim_threshold: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
        mallopt(_M_TRIM_THRESHOLD, trim_threshold)
