"""A cache of keys and values that appends a token without copying those before it."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

_TOKENS_OF_ROOM = 256


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, `(batch, heads, seq, head_dim)`, with room behind them for tokens to come.

    transformers' own layer copies all of it for every token. Not for training: tokens are written in place.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms: dict[str, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `(batch, heads, new, head_dim)` each; return all keys and all values, as views of their room."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._append("keys", self.keys, key_states)
        self.values = self._append("values", self.values, value_states)
        return self.keys, self.values

    def _append(self, name: str, held: Tensor | None, new: Tensor) -> Tensor:
        length = 0 if held is None or not held.numel() else held.shape[2]
        total = length + new.shape[2]
        room = self._rooms.get(name)
        # What was cropped, reordered or moved elsewhere is no longer the beginning of its room.
        is_in_room = room is not None and held is not None and held.data_ptr() == room.data_ptr()
        if room is None or not is_in_room or total > room.shape[2] or room.shape[0] != new.shape[0]:
            batch, heads, _, head_dim = new.shape
            room = torch.empty(batch, heads, total + _TOKENS_OF_ROOM, head_dim, dtype=new.dtype, device=new.device)
            if held is not None and length:
                room[:, :, :length] = held
            self._rooms[name] = room
        room[:, :, length:total] = new
        return room[:, :, :total]


def make_cache() -> Cache:
    """Return an empty cache for one call of `generate`."""
    return Cache(layer_class_to_replicate=GrowingLayer)
