"""The released int8 and int4 format: per output row, symmetric, two int4 columns a byte.

Source: THUDM/chatglm-6b, quantization.py and its kernels (revision 8b7d335).
"""

import torch
from torch import Tensor

_LARGEST_LEVEL = {8: 127, 4: 7}
_ROWS_AT_ONCE = 1024  # bounds the fp32 copy that dividing makes


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise a weight `(out, in)` of any float dtype to `bits` (8 or 4).

    scale = fp16(largest magnitude of the row / 127 or 7); level = round-half-even(fp16(w / scale)). The weight and
    the quotient are fp16: computed in fp32, 1 to 5 % of the levels would differ from the released checkpoints'.
    A row of zeros gets scale 0 and levels 0.
    Returns the stored weight, int8 `(out, in)` or, packed for 4 bits, `(out, in / 2)`, and the scale, fp16 `(out,)`.
    """
    largest = _LARGEST_LEVEL[bits]
    levels = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float16, device=weight.device)
    for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        part = weight[rows].to(torch.float16).float()
        part_scale = (part.abs().amax(dim=1) / largest).to(torch.float16)
        divisor = torch.where(part_scale == 0, 1.0, part_scale.float())[:, None]
        quotient = part.div_(divisor).to(torch.float16).float()
        levels[rows] = quotient.round_().clamp_(-largest, largest).to(torch.int8)
        levels[rows].masked_fill_((part_scale == 0)[:, None], 0)
        scale[rows] = part_scale
    return (pack_int4(levels) if bits == 4 else levels), scale


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
