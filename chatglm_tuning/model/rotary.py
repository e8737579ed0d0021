"""The two half-width rotaries: the first half of a head turns by position, the second by block position.

Source: THUDM/chatglm-6b, modeling_chatglm.py, `RotaryEmbedding` (revision 8b7d335).
"""

import torch
from torch import Tensor


def rotary_angles(position_ids: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin for the two rows of `position_ids` `(batch, 2, seq)`, each `(batch, seq, 1, 2, head_dim / 4)`.

    The inverse frequencies are rounded to fp16 whatever `dtype` is, as the released model's are. In fp16 the angle is
    computed in fp16 too; bf16 cannot hold positions above 256, so its table is built the fp16 way and cast.
    """
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, dtype=torch.float32, device=position_ids.device) / half
    angle_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    inverse_frequency = (1.0 / (10000**exponent)).to(torch.float16).to(angle_dtype)
    angle = position_ids.transpose(1, 2)[..., None].to(angle_dtype) * inverse_frequency  # (batch, seq, 2, head_dim / 4)
    return angle.cos().to(dtype)[:, :, None], angle.sin().to(dtype)[:, :, None]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys `(batch, seq, heads, head_dim)` by the angles of `rotary_angles`; same shape."""
    batch, seq, heads, head_dim = states.shape
    first, second = states.view(batch, seq, heads, 2, 2, head_dim // 4).unbind(dim=-2)
    rotated = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-2)
    return rotated.view(batch, seq, heads, head_dim)
