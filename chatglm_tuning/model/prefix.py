"""The prefix of P-Tuning v2: trained keys and values that every layer sees before its own.

Source: THUDM/chatglm-6b, modeling_chatglm.py, `PrefixEncoder` and `get_prompt` (revision 8b7d335);
Liu et al., P-Tuning v2, arXiv:2110.07602.
"""

import torch
from torch import Tensor, nn

from chatglm_tuning.model.configuration import ChatGLMConfig


class PrefixEncoder(nn.Module):
    """Makes the key and value of `pre_seq_len` virtual tokens for every layer."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        if config.pre_seq_len is None:
            raise ValueError("a prefix encoder needs config.pre_seq_len")
        self.config = config
        width = config.num_layers * 2 * config.hidden_size
        if config.prefix_projection:
            self.embedding = nn.Embedding(config.pre_seq_len, config.hidden_size)
            self.trans = nn.Sequential(
                nn.Linear(config.hidden_size, config.hidden_size), nn.Tanh(), nn.Linear(config.hidden_size, width)
            )
        else:
            self.embedding = nn.Embedding(config.pre_seq_len, width)
        self.dropout = nn.Dropout(config.prefix_dropout)

    def forward(self, batch: int, dtype: torch.dtype) -> Tensor:
        """Return the prefix for `batch` rows in `dtype`, with dropout while training.

        Returns `(layers * 2, batch, heads, prefix, head_dim)`; entries 2 l and 2 l + 1 are layer l's key and value.
        """
        prefix = self._keys_and_values().to(dtype)
        return self.dropout(prefix.expand(batch, -1, -1, -1, -1)).permute(2, 0, 3, 1, 4)

    def shared(self) -> tuple[Tensor, ...]:
        """Return the prefix once for all samples of a batch, in the dtype it is trained in, before dropout.

        Returns `layers * 2` tensors `(prefix, heads, head_dim)`; 2 l and 2 l + 1 are layer l's key and value.
        """
        return self._keys_and_values().unbind(dim=1)

    def _keys_and_values(self) -> Tensor:
        """`(prefix, layers * 2, heads, head_dim)`."""
        prefix = self.embedding.weight
        if self.config.prefix_projection:
            prefix = self.trans(prefix)
        return prefix.view(-1, self.config.num_layers * 2, self.config.num_attention_heads, self.config.head_dim)
