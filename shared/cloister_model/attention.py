"""Attention over whole vectors of keys, so that padding changes nothing that a record gives, to the bit.

A CPU's kernel computes the rest of a row that fills no whole vector by other code, whose rounding is another: a longer record in a batch
would move all others by their rounding. Here keys and values get masked zeros up to the next multiple of ``LANES``; queries need none.
What is computed is Transformers' own scaled dot product attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "cloister-whole-vectors"
# As many float32 numbers as the widest vectors of a CPU hold.
LANES = 16


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    """Transformers' attention on ``(n, heads, t, h)`` tensors; masks are bool, or added floats."""
    queries, keys, rest = query.shape[2], key.shape[2], -key.shape[2] % LANES
    if attention_mask is None:
        # Always a mask, also where nothing is padded: without one another kernel runs, and whether it does is its neighbours' affair.
        causal = named["is_causal"] if named.get("is_causal") is not None else getattr(module, "is_causal", True)
        attention_mask = torch.ones((1, 1, queries, keys), dtype=torch.bool, device=key.device)
        attention_mask = attention_mask.tril() if causal else attention_mask
    if rest:
        key, value = (nn.functional.pad(x, (0, 0, 0, rest)) for x in (key, value))
        out = False if attention_mask.dtype == torch.bool else torch.finfo(attention_mask.dtype).min
        attention_mask = nn.functional.pad(attention_mask, (0, rest), value=out)
    made: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **(named | {"is_causal": False})
    )
    return made


def register() -> None:
    """Makes it known to Transformers under ``NAME``."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
