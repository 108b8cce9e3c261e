"""How the fields of a plan that was received are read: types and ranges, nothing of what they mean."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from cloister_shared.errors import VerificationError


def must(good: bool, what: str, got: object) -> None:
    """Sees that a field is as it has to be.

    Raises:
        VerificationError: It is not.
    """
    if not good:
        raise VerificationError(f"plan: {what}", got=repr(got)[:80])


def must_be_hex(value: Any, size: int, what: str) -> None:
    """Sees that a field is ``size`` bytes in lowercase hex.

    Raises:
        VerificationError: It is not.
    """
    must(
        isinstance(value, str) and len(value) == 2 * size and set(value) <= set("0123456789abcdef"),
        f"{what} is not {size} bytes in hex",
        value,
    )


def must_be_number(value: Any, low: float, high: float, what: str) -> None:
    """Sees that a field is a finite number in a range.

    Raises:
        VerificationError: It is not.
    """
    # The range comes first: math.isfinite overflows on an integer beyond the floats, and NaN is in no range.
    good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    must(good and math.isfinite(value), f"{what} is not from {low:g} to {high:g}", value)


def must_be_integer(value: Any, low: int, high: int, what: str) -> None:
    """Sees that a field is an integer in a range.

    Raises:
        VerificationError: It is not.
    """
    must(
        isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        f"{what} is not an integer from {low} to {high}",
        value,
    )


def are_notes(value: Any) -> bool:
    """Whether a field is a list of texts."""
    return isinstance(value, list) and all(isinstance(note, str) for note in value)


def read_fields(value: Any, kind: type[Any], *lists: str) -> dict[str, Any]:
    """A record's JSON form, of which every field must be there and no other; ``lists`` as tuples."""
    record = dict(value)
    # Defaults are for code that makes plans; one that is read says everything.
    must(set(record) == {f.name for f in fields(kind)}, f"other fields than a {kind.__name__}'s", sorted(record))
    for name in lists:
        must(isinstance(record[name], list), f"{name} is not a list", record[name])
        record[name] = tuple(record[name])
    return record
