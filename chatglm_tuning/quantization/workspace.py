"""Where stored levels become a matrix of floats for one product: buffers that are used again and again.

A fresh tensor of a hundred megabytes costs more in page faults than unpacking into it.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from chatglm_tuning.kernels import spread_int4
from chatglm_tuning.quantization.decode import spread_on_cpu

WorkspaceSize = Literal["chunk", "matrix", "layer"]
"""chunk: some megabytes, through which a weight passes in parts. matrix: the largest weight. layer: one weight of each
shape, so that what a recomputed forward pass has unpacked still stands for the backward pass of its layer."""

_CHUNK_ELEMENTS = 2**23
_ALL = slice(None)
_Key = tuple[torch.device, torch.dtype, tuple[int, int] | None]
_State = tuple[weakref.ref[Tensor], int, int]


def _state(tensor: Tensor) -> _State:
    """What tells `tensor`, as it is now, from any other, and from itself after a change."""
    return weakref.ref(tensor), tensor._version, tensor.data_ptr()


def _is_state_of(state: _State, tensor: Tensor) -> bool:
    # A tensor given other memory through `.data` keeps its version.
    return state[0]() is tensor and state[1:] == (tensor._version, tensor.data_ptr())


class Workspace:
    """Buffers of one process. A buffer that still holds the wanted weight is not filled again.

    A change of a weight in place is noticed, but one of `weight.data` in place is not, for torch does not count it.
    Within `use` the workspace is the caller's: another thread waits.
    """

    def __init__(self) -> None:
        self._size: WorkspaceSize = "matrix"
        self._lock = threading.RLock()
        self._buffers: dict[_Key, Tensor] = {}
        self._held: dict[_Key, tuple[_State, ...]] = {}

    @property
    def size(self) -> WorkspaceSize:
        """How much memory the workspace may take."""
        return self._size

    def set_size(self, size: WorkspaceSize) -> None:
        """Choose how much memory the workspace may take, and free what it holds."""
        with self._lock:
            self._size = size
            self._buffers.clear()
            self._held.clear()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Keep other threads out while unpacked weights are in use."""
        with self._lock:
            yield

    def parts(self, length: int, width: int) -> Iterator[slice]:
        """Cut `length` rows or columns of `width` elements each into parts that fit; all at once unless in chunks."""
        step = max(1, _CHUNK_ELEMENTS // width) if self._size == "chunk" else length
        yield from (slice(start, min(start + step, length)) for start in range(0, length, step))

    def unpack(
        self,
        weight: Tensor,
        bits: int,
        dtype: torch.dtype,
        *,
        rows: slice = _ALL,
        columns: slice = _ALL,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Return the levels of a part of a stored weight as floats; valid until the next call.

        weight: int8 `(out, in)` for 8 bits or `(out, in / 2)` for 4; rows, columns: of this tensor.
        scale: `(out,)`, what the levels are multiplied with, if anything.
        Returns `(rows, columns)` for 8 bits; for 4, `(rows, 2 · columns)`: the levels of the even columns, then those
        of the odd ones.
        """
        part = weight[rows, columns]
        shape = (part.shape[0], part.shape[1] * (2 if bits == 4 else 1))
        key: _Key = (weight.device, dtype, shape if self._size == "layer" else None)
        is_whole = part.shape == weight.shape
        matrix = self._buffer(key, shape)
        sources = (weight,) if scale is None else (weight, scale)
        held = self._held.get(key, ())
        if is_whole and len(held) == len(sources) and all(map(_is_state_of, held, sources)):
            return matrix
        if bits == 8:
            matrix.copy_(part)
        else:
            even, odd = matrix.chunk(2, dim=1)
            if not spread_on_cpu(part, even, odd):
                spread_int4(part, even, odd)
        if scale is not None:
            matrix.mul_(scale[rows, None])
        if is_whole:
            self._held[key] = tuple(map(_state, sources))
        else:
            self._held.pop(key, None)
        return matrix

    def _buffer(self, key: _Key, shape: tuple[int, int]) -> Tensor:
        elements = shape[0] * shape[1]
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < elements:
            self._held.pop(key, None)
            device, dtype, _ = key
            with torch.inference_mode(mode=False):  # a buffer made in that mode could not be written to outside it
                buffer = self._buffers[key] = torch.empty(elements, dtype=dtype, device=device)
        return buffer[:elements].view(shape)


workspace = Workspace()
"""The buffers of this process."""
