"""Text to token ids, and batches of them. The tokeniser is the base model's own; nothing is kept or written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cloister_shared.errors import StateError
from torch import Tensor
from transformers import AutoTokenizer

from cloister_model.base import BaseModel

# Tokens of a batch are a multiple of this.
STEP = 4
# Stands for "every record is a unit of its own"; never a value of ``Encoded.units`` itself, since a unit is not empty.
EACH_ALONE: tuple[tuple[int, ...], ...] = ((),)


def padded(length: int) -> int:
    """To how many tokens a batch is padded whose longest record has ``length``: the next multiple of ``STEP``.

    With it, and with ``attention`` over whole vectors, what a record gives is the same to the bit whatever it is padded to and beside
    how many others; without, a longer record moves all others of its batch by their rounding (tests/client/test_coupling.py).
    """
    return -(-length // STEP) * STEP


@dataclass(frozen=True)
class Encoded:
    """Tokenised records, and whose they are.

    Attributes:
        ids: Token ids per record; at least one each.
        labels: Class index per record; zeros where the task has none.
        pad: Padding id.
        units: Record indices of each privacy unit, no record in two of them; a record in none is never trained on.

    Raises:
        StateError: A unit is empty, names a record that is not there, or shares one with another unit.
    """

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    pad: int
    units: tuple[tuple[int, ...], ...] = EACH_ALONE

    def __post_init__(self) -> None:
        if self.units is EACH_ALONE:
            object.__setattr__(self, "units", tuple((row,) for row in range(len(self.ids))))
            return
        rows = [row for unit in self.units for row in unit]
        if not all(self.units) or len(set(rows)) != len(rows) or not set(rows) <= set(range(len(self.ids))):
            raise StateError(
                "privacy units do not fit the records",
                where="units",
                expected=f"units of one record or more among {len(self.ids)}, no record in two",
            )

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int] | np.ndarray[Any, Any], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Pads ``rows`` to ``padded`` of their longest: ``(n, t) int64`` ids, the same mask, ``(n,) int64`` labels."""
        chosen = [self.ids[int(i)] for i in rows]
        width = padded(max(len(ids) for ids in chosen))
        ids = torch.full((len(chosen), width), self.pad, dtype=torch.int64)
        mask = torch.zeros((len(chosen), width), dtype=torch.int64)
        for row, tokens in enumerate(chosen):
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[row, : len(tokens)] = 1
        labels = torch.tensor([self.labels[int(i)] for i in rows], dtype=torch.int64)
        return ids.to(device), mask.to(device), labels.to(device)


def encode(
    base: BaseModel,
    texts: Sequence[str],
    labels: Sequence[int],
    max_tokens: int,
    units: tuple[tuple[int, ...], ...] = EACH_ALONE,
) -> Encoded:
    """Tokenises ``texts``, cut to ``max_tokens``; an empty result becomes the padding id alone. ``units``: see ``Encoded``."""
    tokeniser = AutoTokenizer.from_pretrained(str(base.path), local_files_only=True, trust_remote_code=False)
    pad = tokeniser.pad_token_id if tokeniser.pad_token_id is not None else (tokeniser.eos_token_id or 0)
    rows = tokeniser(list(texts), truncation=True, max_length=max_tokens, padding=False)["input_ids"] if texts else []
    return Encoded(tuple(tuple(row) or (pad,) for row in rows), tuple(int(v) for v in labels), int(pad), units)
