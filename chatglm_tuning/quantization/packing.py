"""The released int8 and int4 format: per output row, symmetric, two int4 columns a byte.

Source: THUDM/chatglm-6b, quantization.py and its kernels (revision 8b7d335).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

_LARGEST_LEVEL = {8: 127, 4: 7}
# Values of a block and of its intermediate results: on a CPU they stay in a core's cache, and are never new memory.
_VALUES_AT_ONCE_ON_CPU = 1 << 19
_VALUES_AT_ONCE_ELSEWHERE = 1 << 26
_MOST_THREADS = 8  # more would wait for the interpreter, which starts every operator
# Adding 1.5 * 2**10 rounds an fp16 below 2**9 half to even, and leaves the sum's low bits as a whole number.
_ROUNDING = 1536.0
_PACKING_FACTOR = (1 << 20) + 1  # times two fp16 sums, as one int32: 16 times the even level plus the odd, in byte 2
_SIGNS_OF_NIBBLES = 0x88 - 0x100
_ALL_BUT_SIGN = 0x7FFF


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise a weight `(out, in)` of any float dtype to `bits` (8 or 4).

    scale = fp16(largest magnitude of the row / 127 or 7); level = round-half-even(fp16(w / scale)). The weight and
    the quotient are fp16: computed in fp32, 1 to 5 % of the levels would differ from the released checkpoints'.
    A row of zeros gets scale 0 and levels 0.
    Returns the stored weight, int8 `(out, in)` or, packed for 4 bits, `(out, in / 2)`, and the scale, fp16 `(out,)`.
    """
    rows, columns = weight.shape
    stored = torch.empty(rows, columns * bits // 8, dtype=torch.int8, device=weight.device)
    scale = torch.empty(rows, dtype=torch.float16, device=weight.device)
    if weight.device.type != "cpu":
        _quantize_blocks(weight, stored, scale, bits, _VALUES_AT_ONCE_ELSEWHERE)
        return stored, scale
    threads = min(torch.get_num_threads(), _MOST_THREADS, weight.numel() // _VALUES_AT_ONCE_ON_CPU)
    if threads < 2:
        _quantize_blocks(weight, stored, scale, bits, _VALUES_AT_ONCE_ON_CPU)
        return stored, scale
    shares = zip(weight.chunk(threads), stored.chunk(threads), scale.chunk(threads), strict=True)
    with _single_threaded_workers(threads) as pool:
        running = [pool.submit(_quantize_blocks, *share, bits, _VALUES_AT_ONCE_ON_CPU) for share in shares]
    for share in running:
        share.result()
    return stored, scale


@contextmanager
def _single_threaded_workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Give threads in which torch's operators start no others.

    Operators on a block take less than a millisecond. Shared out by torch, each would wait for its slowest thread:
    where another process takes turns on a core, that made loading fifteen times slower.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)  # threads that start later would otherwise have 1, too


def _quantize_blocks(weight: Tensor, stored: Tensor, scale: Tensor, bits: int, values_at_once: int) -> None:
    """Quantise rows into `stored` and `scale`, so many values at a time."""
    rows, columns = weight.shape
    rows_at_once = min(rows, max(1, values_at_once // columns))
    quotients = torch.empty(rows_at_once, columns, dtype=torch.float16, device=weight.device)
    words = torch.empty(rows_at_once, columns, dtype=torch.int16, device=weight.device)
    for part, part_stored, part_scale in zip(
        weight.split(rows_at_once), stored.split(rows_at_once), scale.split(rows_at_once), strict=True
    ):
        quotient, word = quotients[: len(part)], words[: len(part)]
        part16 = _to_half(part, quotient)
        _store_scale(part16, bits, word, part_scale)
        _divide_and_round(part16, part_scale, bits, quotient)
        _store_levels(quotient, bits, word, part_stored)


def _to_half(part: Tensor, buffer: Tensor) -> Tensor:
    if part.dtype == torch.float16:
        return part
    # Through fp32: torch converts bf16 to fp16 one value at a time.
    return buffer.copy_(part.float())


def _store_scale(part: Tensor, bits: int, word: Tensor, scale: Tensor) -> None:
    """Write the scales of fp16 rows. Without the sign, the bits of fp16 are in the order of what they stand for."""
    magnitude = torch.bitwise_and(part.view(torch.int16), _ALL_BUT_SIGN, out=word)
    largest = magnitude.amax(dim=1).view(torch.float16)
    scale.copy_(largest.float() / _LARGEST_LEVEL[bits])


def _divide_and_round(part: Tensor, scale: Tensor, bits: int, quotient: Tensor) -> None:
    """Write into `quotient` an fp16 whose low bits are the level: plus 8, for 4 bits, which makes it positive."""
    # A row whose scale is 0 gets the quotients 0.
    torch.div(part, scale.masked_fill(scale == 0, torch.inf)[:, None], out=quotient)
    # Only a subnormal scale is rounded so coarsely that a quotient can round to more than the largest level.
    if scale.device.type != "cpu" or scale.min() < torch.finfo(torch.float16).smallest_normal:
        largest = _LARGEST_LEVEL[bits]
        quotient.clamp_(-largest, largest)
    quotient.add_(_ROUNDING + 8 if bits == 4 else _ROUNDING)


def _store_levels(rounded: Tensor, bits: int, word: Tensor, stored: Tensor) -> None:
    """Write the low bits of what `_divide_and_round` left as int8 levels or as `pack_int4` packs them."""
    if bits == 8:
        stored.copy_(rounded.view(torch.int16))
        return
    pair = torch.mul(rounded.view(torch.int32), _PACKING_FACTOR, out=word.view(torch.int32))
    stored.copy_(pair.bitwise_right_shift_(16))  # keeps the low byte
    stored.bitwise_xor_(_SIGNS_OF_NIBBLES)  # from level + 8 to two's complement


def pack_int4(levels: Tensor) -> Tensor:
    """Pack int4 levels, int8 `(out, in)` with `in` even, into `(out, in / 2)`: the even column in the high nibble."""
    return (levels[:, 0::2] << 4) | (levels[:, 1::2] & 15)


def unpack_int4(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sign-extended even and odd columns of `packed` int8 `(out, in / 2)`, each int8 `(out, in / 2)`."""
    return packed >> 4, (packed << 4) >> 4


def dequantize_rows(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return level · scale as `(out, in)` in `dtype`, rounded once.

    weight and scale: what `quantize_rows` returns.
    """
    levels = torch.stack(unpack_int4(weight), dim=-1).flatten(1) if bits == 4 else weight
    if dtype == torch.float16:
        return levels.to(dtype) * scale[:, None]
    return (levels.float() * scale.float()[:, None]).to(dtype)
