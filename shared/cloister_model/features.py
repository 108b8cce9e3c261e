"""What the classification head sees of a record: three blocks side by side, each centred and scaled, together of one length.

    words      hashed counts of its word pieces, ``words`` wide, at length 1; the first block, absent where that is 0
    embedded   mean of the base's static word embeddings, each piece by its weight
    last       mean of the last layer's states

A piece weighs the logarithm of its number in the vocabulary: WordPiece and BPE number the frequent ones first, so this stands for an
inverse document frequency that nobody's text was asked for (the idea of Arora et al., ICLR 2017). What is taken off a block and what
it is divided by are constants of the plan, made of the coordinator's own text. Every record is computed alone and gets
the same length, so that none has more pull on a clipped sum than another. Nothing here is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Of a record's features. The head's constant 1 for the bias has so little of a gradient's norm beside it.
LENGTH = 28.0
# What words, embedded and last weigh beside each other: measured on text apart from the tables' (bench/results).
BLOCK_WEIGHTS = (1.15, 0.63, 1.0)
# Nothing shorter is stretched to it: a record that equals the centre stays small. A usual one is about 1.6 long before.
SHORTEST = 0.3
# Below lie a BERT vocabulary's special pieces; a constant elsewhere, where it only shifts the curve.
_FIRST = 990


def weights(ids: Tensor, mask: Tensor) -> Tensor:
    """The weight of each piece, ``(n, t)``; 0 where the mask is."""
    return torch.log((ids - _FIRST).clamp(min=2).to(torch.float64)) * mask


def hashed_words(ids: Tensor, mask: Tensor, width: int) -> Tensor:
    """Bags of pieces, hashed with signs (Weinberger et al., ICML 2009): ``(n, width) float64`` of length 1; counts are sublinear.

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
    out = torch.zeros((len(ids), width), dtype=torch.float64, device=ids.device).scatter_add_(1, code % width, each)
    return functional.normalize(out, dim=1)


def mean(states: Tensor, share: Tensor) -> Tensor:
    """Mean of ``(n, t, h)`` states over tokens by their ``(n, t)`` share, in the states' dtype."""
    # In float64, so that how many zeros of padding are among the shares does not show.
    whole = share.to(torch.float64)
    part = (whole / whole.sum(1, keepdim=True).clamp(min=0.1)).to(states.dtype)
    return (states * part.unsqueeze(-1)).sum(1)


def raw(words: Tensor | None, embedded: Tensor, last: Tensor) -> Tensor:
    """The blocks as they are, ``(n, words + 2 h)``, in the dtype of ``last``."""
    blocks = (embedded, last) if words is None else (words, embedded, last)
    return torch.cat([block.to(last.dtype) for block in blocks], 1)


def scaled(blocks: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
    """The head's input: ``blocks`` minus ``centre``, over ``spread``, every row of length ``LENGTH``.

    Args:
        blocks: ``(n, d)`` from ``raw``.
        centre: ``(d,)``.
        spread: ``(d,)``, > 0, one number for each block.
    """
    return LENGTH * functional.normalize((blocks - centre) / spread, dim=1, eps=SHORTEST)
