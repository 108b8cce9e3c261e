"""Physical batches of one sampled batch: whole privacy units, longest first, by what fits into memory.

Splitting changes nothing that is summed. Records of like length lie together, so little padding is computed. A unit that does
not fit by itself is split over several parts, whose gradients are added before the unit is clipped. A unit with a long record
is a part by itself: attention's kernel is another from 192 tokens on, and a shorter record beside it would be padded into that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cloister_model.tokens import Encoded, padded

# Padded tokens of the longest record that shares a part with other units.
ALONE = 188


@dataclass(frozen=True)
class Part:
    """One physical batch.

    Attributes:
        rows: Record indices.
        slots: For each record the unit of this part that it belongs to, from 0.
        units: How many units.
        whole: False where the part holds some of one unit, which goes on in the next part.
    """

    rows: tuple[int, ...]
    slots: tuple[int, ...]
    units: int
    whole: bool


def physical_batches(units: Sequence[tuple[int, ...]], data: Encoded, tokens: int, records: int) -> list[Part]:
    """Splits sampled units into physical batches.

    Args:
        units: Record indices of each sampled unit.
        data: All records.
        tokens: Most tokens of a part, padding counted; a single longer record is a part by itself.
        records: Most records of a part.

    Returns:
        Parts that hold each record of each unit once.
    """
    by_length = [tuple(sorted(unit, key=lambda row: -len(data.ids[row]))) for unit in units]
    by_length.sort(key=lambda unit: -len(data.ids[unit[0]]))
    parts: list[Part] = []
    filled: list[tuple[int, ...]] = []
    room = 0

    def close() -> None:
        if filled:
            rows = tuple(row for unit in filled for row in unit)
            slots = tuple(slot for slot, unit in enumerate(filled) for _ in unit)
            parts.append(Part(rows, slots, len(filled), True))
            filled.clear()

    for unit in by_length:
        length = padded(len(data.ids[unit[0]]))
        if not filled or len(unit) > room or length > ALONE:
            close()
            # Units come longest first: the first record's length is that of the whole part.
            room = max(1, min(tokens // length, records))
        rest = unit
        while len(rest) > room:
            parts.append(Part(rest[:room], (0,) * room, 1, False))
            rest = rest[room:]
        filled.append(rest)
        room -= len(rest)
        # The end of a split unit stays by itself, so that only its own sum is carried over.
        if rest is not unit or length > ALONE:
            close()
    close()
    return parts
