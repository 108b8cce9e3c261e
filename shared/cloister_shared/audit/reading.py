"""Strict reading of what a bundle says: a field is of its type and in its range, or the record is malformed. Nothing is coerced."""

from __future__ import annotations

import math
import re
import time
from typing import Any

from cloister_shared.encoding import canonical, parse_record

_HEX = re.compile(r"[0-9a-f]*")
# What reading a record may raise: each is one malformed record, and never the end of an audit.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, ArithmeticError, IndexError)


def record_of(data: bytes, where: str) -> dict[str, Any]:
    """One canonical JSON object.

    Raises:
        VerificationError: It is not one.
        ValueError: It is another spelling of one.
    """
    record = parse_record(data, where)
    if canonical(record) != data:
        raise ValueError("not canonical")
    return record


def integer(record: dict[str, Any], name: str, low: int, high: int) -> int:
    """An integer field.

    Raises:
        ValueError: It is missing, of another type or out of range.
    """
    value = record.get(name)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is not an integer from {low} to {high}")
    return value


def number(record: dict[str, Any], name: str, low: float, high: float) -> float:
    """A finite number field.

    Raises:
        ValueError: It is missing, of another type or out of range.
    """
    value: Any = record.get(name)
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not low <= value <= high or not math.isfinite(value):
        raise ValueError(f"{name} is not a number from {low:g} to {high:g}")
    return float(value)


def hexes(record: dict[str, Any], name: str, size: int, *, empty: bool = False) -> str:
    """A field of ``size`` bytes in lower-case hex; nothing, where that is allowed.

    Raises:
        ValueError: It is not.
    """
    value = record.get(name)
    if (
        not isinstance(value, str)
        or not _HEX.fullmatch(value)
        or (len(value) != 2 * size and not (empty and not value))
    ):
        raise ValueError(f"{name} is not {size} bytes in hex")
    return value


def words(record: dict[str, Any], name: str) -> str:
    """A text field, printable.

    Raises:
        ValueError: It is missing, or of another type.
    """
    value = record.get(name)
    if not isinstance(value, str) or len(value) > 100_000:
        raise ValueError(f"{name} is not a text")
    return printable(value)


def printable(text: str) -> str:
    """A text that moves no cursor and begins no line: what a bundle says reaches a terminal and a page."""
    return "".join(c if c.isprintable() else "?" for c in text)


def when(at: object) -> str:
    """A time as a log says it, for people."""
    if not isinstance(at, int | float) or not 0 <= at < 1e11:
        return "at no time"
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))


def rows(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A list of objects.

    Raises:
        ValueError: It is not one.
    """
    value = record.get(name)
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ValueError(f"{name} is not a list of records")
    return value
