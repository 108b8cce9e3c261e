"""What the classification head sees of a record: three blocks, each of one length, side by side.

    words      hashed counts of its word pieces, ``words`` wide; the first block, absent where that is 0
    embedded   mean of the base's static word embeddings, each piece by its weight; ``centre`` taken off
    last       mean of the last layer's states; ``centre`` taken off

A piece weighs the logarithm of its number in the vocabulary: WordPiece and BPE number the frequent ones first, so this stands for an
inverse document frequency that nobody's text was asked for (the idea of Arora et al., ICLR 2017). ``centre`` is a
constant of the plan, made of the coordinator's own text. Every record is computed alone and gets the same length, so
that none has more pull on a clipped sum than another. Nothing here is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Of a record's features. The head's constant 1 for the bias has so little of a gradient's norm beside it.
LENGTH = 28.0
# A block is not stretched by more than 1 over this: states that equal the centre stay small.
SHORTEST = 0.1
# Below lie a BERT vocabulary's special pieces; a constant elsewhere, where it only shifts the curve.
_FIRST = 990


def weights(ids: Tensor, mask: Tensor) -> Tensor:
    """The weight of each piece, ``(n, t)``; 0 where the mask is."""
    return torch.log((ids - _FIRST).clamp(min=2).to(torch.float64)) * mask


def hashed_words(ids: Tensor, mask: Tensor, width: int) -> Tensor:
    """Bags of pieces, hashed with signs (Weinberger et al., ICML 2009): ``(n, width) float64``; counts are sublinear.

    Args:
        ids: ``(n, t) int64``.
        mask: ``(n, t)``, 1 where there is a piece.
        width: At least 1.
    """
    same = (ids.unsqueeze(2) == ids.unsqueeze(1)) & (mask.unsqueeze(1) != 0)
    count = same.sum(2).clamp(min=1).to(torch.float64)
    code = (ids * 2654435761 + 97) % 4294967291
    sign = 1 - 2 * ((code >> 7) & 1)
    # Each of a piece's occurrences brings its share of the piece's 1 + log(count).
    each = (1 + torch.log(count)) / count * weights(ids, mask) * sign
    return torch.zeros((len(ids), width), dtype=torch.float64, device=ids.device).scatter_add_(1, code % width, each)


def mean(states: Tensor, share: Tensor) -> Tensor:
    """Mean of ``(n, t, h)`` states over tokens by their ``(n, t)`` share, in the states' dtype."""
    share = share.to(states.dtype)
    return (states * share.unsqueeze(-1)).sum(1) / share.sum(1, keepdim=True).clamp(min=SHORTEST)


def join(words: Tensor | None, embedded: Tensor, last: Tensor, centre: Tensor) -> Tensor:
    """The head's input, ``(n, words + 2 h)``, in the dtype of ``last``.

    Args:
        words: ``(n, words)`` or None.
        embedded: ``(n, h)``.
        last: ``(n, h)``.
        centre: ``(2 h,)``: of ``embedded`` and ``last``.
    """
    width = last.shape[1]
    blocks = [embedded.to(last.dtype) - centre[:width].to(last.dtype), last - centre[width:].to(last.dtype)]
    if words is not None:
        blocks.insert(0, words.to(last.dtype))
    scale = LENGTH / len(blocks) ** 0.5
    return torch.cat([functional.normalize(block, dim=1, eps=SHORTEST) * scale for block in blocks], 1)
