"""Keeps what the frozen layers make of each record, so that they are computed once per record and not once per step.

In memory only, never on disk: the states are as private as the text. They are computed when a record is first sampled (so training
reads only sampled records), stored unpadded in blocks that are overwritten before they are given back, and dropped when other
data come. A record for which there is no room is computed anew each time and gives the same states: what is used always
went through the stored precision, kept or not.

Stored as float16, not bfloat16: states lie behind a layer norm or in a residual stream of a few thousand at most, so that the three
more bits of fraction are worth more than range. Measured on MiniLM's top two layers, the summed gradient moves by 3e-4 of its
norm (bfloat16: 2e-3), far less than the noise of any private run. A float64 model keeps float64.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cloister_model.prefix import Prefix
from cloister_model.tokens import Encoded, padded
from torch import Tensor

LIMIT_BYTES = 1 << 30
BLOCK_BYTES = 16 << 20
# What is left to the rest of the machine: no block is added when less than this many times the block is free.
SPARE_BLOCKS = 16


def spare_bytes() -> int | None:
    """Memory that can still be had, of the machine and of our control group; None where the system does not say."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        bound = (group / "memory.max").read_text().strip()
        if bound != "max":
            found.append(int(bound) - int((group / "memory.current").read_text()))
    except OSError:
        pass  # no Linux, or no control group: what was found so far counts
    return min(found, default=None)


def _wipe(blocks: list[Tensor]) -> None:
    for block in blocks:
        block.zero_()
    blocks.clear()


class Activations:
    """The states that enter the lowest trained layer, per record of one ``Encoded``.

    Args:
        prefix: The frozen layers.
        limit: Most bytes to keep.

    Attributes:
        prefix: The frozen layers.
        limit: Most bytes to keep.
        stored: In which precision: float16, or float64 for a float64 model; never by what the text is.
    """

    def __init__(self, prefix: Prefix, limit: int = LIMIT_BYTES) -> None:
        self.prefix, self.limit = prefix, limit
        self._data: Encoded | None = None
        self._entries: dict[int, Tensor] = {}
        self._blocks: list[Tensor] = []
        self._used = 0
        self._full = False
        self.stored, self._given = torch.float16, torch.float32
        # Also when the model is dropped without a word: nothing readable stays in freed memory.
        weakref.finalize(self, _wipe, self._blocks)

    @property
    def kept(self) -> int:
        """Records that are kept."""
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Bytes taken from the system."""
        return sum(block.numel() * block.element_size() for block in self._blocks)

    def forget(self) -> None:
        """Overwrites and drops everything."""
        self._entries.clear()
        _wipe(self._blocks)
        self._data, self._used, self._full = None, 0, False

    def hold(self, data: Encoded) -> None:
        """From now on keeps states of ``data``; those of any other object are forgotten, equal or not."""
        if self._data is not data:
            self.forget()
            self._data = data

    def states(self, data: Encoded, rows: Sequence[int] | np.ndarray[Any, Any], device: str = "cpu") -> Tensor:
        """States of ``rows``, padded with zeros as ``Encoded.batch`` pads them.

        Args:
            data: All records; see ``hold``.
            rows: ``(n,)`` record indices.
            device: Where the model is and where the result goes.

        Returns:
            ``(n, tokens, hidden)`` in the dtype in which the layers gave them, rounded to the stored one.
        """
        self.hold(data)
        wanted = [int(row) for row in rows]
        missing = [row for row in dict.fromkeys(wanted) if row not in self._entries]
        fresh = self._compute(data, missing, device) if missing else {}
        if fresh is None:
            return self.states(data, wanted, device)
        found = [self._entries[row] if row in self._entries else fresh[row] for row in wanted]
        out = torch.zeros((len(found), padded(max(map(len, found))), found[0].shape[1]), dtype=self.stored)
        for row, state in zip(out, found, strict=True):
            row[: len(state)] = state
        return out.to(device).to(self._given)

    def _compute(self, data: Encoded, rows: list[int], device: str) -> dict[int, Tensor] | None:
        """States of ``rows``, kept where there is room; None where the stored precision had to change, and nothing is kept."""
        ids, mask, _ = data.batch(rows, device)
        computed = self.prefix.enter(ids, mask)
        self._given = computed.dtype
        if computed.dtype == torch.float64 and self.stored != torch.float64:
            self.forget()
            self._data, self.stored = data, torch.float64
            return None
        # Clamped, never widened: the precision of one record's states must not depend on another record.
        most = torch.finfo(self.stored).max
        rounded = computed.clamp(-most, most).to(self.stored)
        each = {row: state[: len(data.ids[row])] for row, state in zip(rows, rounded.cpu(), strict=True)}
        for row, state in each.items():
            self._keep(row, state)
        return each

    def _keep(self, row: int, state: Tensor) -> None:
        size = state.numel()
        if not self._blocks or self._used + size > self._blocks[-1].numel():
            room = self.limit - self.bytes
            wanted = min(max(BLOCK_BYTES, size * state.element_size()), room)
            if self._full or wanted < size * state.element_size():
                return
            spare = spare_bytes()
            if spare is not None and spare < SPARE_BLOCKS * wanted:
                self._full = True
                return
            self._blocks.append(torch.empty(wanted // state.element_size(), dtype=state.dtype))
            self._used = 0
        place = self._blocks[-1][self._used : self._used + size].view(state.shape)
        place.copy_(state)
        self._used += size
        self._entries[row] = place
