"""Prefix-LM attention masks and the two rows of position ids.

Source: THUDM/chatglm-6b, modeling_chatglm.py, `get_masks` and `get_position_ids` (revision 8b7d335).
"""

import torch
from torch import Tensor


def first_index(input_ids: Tensor, token_id: int, missing: int) -> Tensor:
    """Return where `token_id` first stands in every row of `input_ids` `(batch, seq)`; `missing` where it does not.

    Returns `(batch,)`, long.
    """
    hits = input_ids == token_id
    return torch.where(hits.any(dim=-1), hits.int().argmax(dim=-1), missing)


def build_position_ids(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    bos_token_id: int,
    gmask_token_id: int,
    mask_token_id: int,
) -> Tensor:
    """Return the position ids of whole sequences that start at their prompt.

    input_ids: `(batch, seq)`; attention_mask: `(batch, seq)`, 1 = a real token, or None (all are).
    Row 0 counts the prompt's real tokens from 0 and stays at the mask token's position from `<sop>` on; the mask
    token is the first [gMASK], or the first [MASK] where there is no [gMASK]. Row 1 is 0 in the prompt and counts
    1, 2, 3, … from `<sop>`.
    Returns `(batch, 2, seq)`, long.
    """
    seq = input_ids.shape[-1]
    index = torch.arange(seq, device=input_ids.device)
    context = first_index(input_ids, bos_token_id, seq)[:, None]
    if attention_mask is None:
        position = index.expand_as(input_ids)
    else:
        position = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    mask_index = first_index(input_ids, gmask_token_id, -1)
    mask_index = torch.where(mask_index >= 0, mask_index, first_index(input_ids, mask_token_id, -1))
    mask_index = torch.where(mask_index >= 0, mask_index, context[:, 0] - 1).clamp(min=0)
    mask_position = position.gather(-1, mask_index[:, None])
    row_0 = torch.where(index < context, position, mask_position)
    row_1 = (index - context + 1).clamp(min=0)
    return torch.stack([row_0, row_1], dim=1)


def build_prefix_lm_mask(position_ids: Tensor, attention_mask: Tensor | None, past_length: int) -> Tensor | None:
    """Return which keys every query may see: the prompt sees all of itself, what follows is causal.

    position_ids: `(batch, 2, query)`, of the queries; attention_mask: `(batch, past + query)`, 1 = a real token, or
    None; past_length: keys that stand in the cache, all of them before the queries.
    Returns `(batch, 1, query, past + query)`, bool, True = may be seen; None where one query sees everything.
    """
    queries = position_ids.shape[-1]
    keep = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
    if queries == 1:
        return keep
    keys = torch.arange(past_length + queries, device=position_ids.device)
    causal = keys[None, :] <= keys[past_length:, None]
    in_prompt = torch.nn.functional.pad(position_ids[:, 1] == 0, (past_length, 0))
    visible = causal[None, None] | in_prompt[:, None, None, :]
    return visible if keep is None else visible & keep
