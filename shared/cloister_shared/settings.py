"""Reading TOML that a person wrote, with messages that say file, key, expected and got.

``Table`` hands out values by key with their type and range checked; ``finish`` refuses keys nobody asked for, so that a
misspelt limit is an error and not a silent default.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloister_shared.errors import InputError

_REQUIRED: Any = object()


class Table:
    """One TOML table.

    Args:
        values: Its keys and values.
        where: File and table, for messages.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self._values, self.where, self._seen = values, where, set[str]()

    @property
    def written(self) -> frozenset[str]:
        """The keys that the file has."""
        return frozenset(self._values)

    def has(self, key: str) -> bool:
        """Whether the file has ``key``, which it may."""
        self._seen.add(key)
        return key in self._values

    def _get(self, key: str, kind: str, accept: Callable[[Any], bool], default: Any) -> Any:
        self._seen.add(key)
        if key not in self._values:
            if default is _REQUIRED:
                raise InputError(
                    f"key {key!r} is missing",
                    where=self.where,
                    expected=kind,
                    got=f"keys {', '.join(sorted(self._values)) or 'none'}",
                )
            return default
        value = self._values[key]
        if not accept(value):
            raise InputError(f"key {key!r} is wrong", where=self.where, expected=kind, got=repr(value)[:80])
        return value

    def text(
        self,
        key: str,
        default: Any = _REQUIRED,
        *,
        choices: tuple[str, ...] = (),
        pattern: Callable[[str], bool] = bool,
    ) -> str:
        """A non-empty string, of ``choices`` where given."""
        kind = f"one of {', '.join(choices)}" if choices else "a text"
        value: str = self._get(
            key,
            kind,
            lambda v: isinstance(v, str) and bool(v) and (not choices or v in choices) and pattern(v),
            default,
        )
        return value

    def number(self, key: str, low: float, high: float, default: Any = _REQUIRED) -> float:
        """A finite number in ``[low, high]``."""

        def accept(value: Any) -> bool:
            # The range first: math.isfinite overflows on an integer beyond the floats, and NaN is in no range.
            good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
            return good and math.isfinite(value)

        return float(self._get(key, f"a finite number from {low:g} to {high:g}", accept, default))

    def integer(self, key: str, low: int, high: int, default: Any = _REQUIRED) -> int:
        """An integer in ``[low, high]``."""

        def accept(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

        return int(self._get(key, f"an integer from {low} to {high}", accept, default))

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        return bool(self._get(key, "true or false", lambda v: isinstance(v, bool), default))

    def texts(self, key: str, default: Any = _REQUIRED, *, choices: tuple[str, ...] = ()) -> tuple[str, ...]:
        """A list of distinct non-empty strings, of ``choices`` where given."""

        def accept(value: Any) -> bool:
            if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
                return False
            return len(set(value)) == len(value) and (not choices or set(value) <= set(choices))

        kind = f"a list of distinct texts{' of ' + ', '.join(choices) if choices else ''}"
        return tuple(self._get(key, kind, accept, default))

    def integers(self, key: str, low: int, high: int, default: Any = _REQUIRED) -> tuple[int, ...]:
        """A list of distinct integers in ``[low, high]``."""

        def accept(value: Any) -> bool:
            return (
                isinstance(value, list)
                and all(isinstance(v, int) and not isinstance(v, bool) and low <= v <= high for v in value)
                and len(set(value)) == len(value)
            )

        return tuple(self._get(key, f"a list of distinct integers from {low} to {high}", accept, default))

    def table(self, key: str) -> Table:
        """A sub-table; empty where it is missing."""
        return Table(self._get(key, "a table", lambda v: isinstance(v, dict), {}), f"{self.where} [{key}]")

    def tables(self, key: str) -> list[Table]:
        """An array of tables."""
        values = self._get(
            key, "an array of tables", lambda v: isinstance(v, list) and all(isinstance(i, dict) for i in v), []
        )
        return [Table(value, f"{self.where} [[{key}]] #{i + 1}") for i, value in enumerate(values)]

    def finish(self) -> None:
        """Refuses keys that nobody asked for.

        Raises:
            InputError: There is one.
        """
        odd = sorted(set(self._values) - self._seen)
        if odd:
            raise InputError(
                f"key {odd[0]!r} is not known here", where=self.where, expected=", ".join(sorted(self._seen))
            )


def read_toml(path: Path, what: str) -> Table:
    """Reads a TOML file.

    Raises:
        InputError: Missing, not UTF-8 or not TOML.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {what}", where=str(path), got=error.strerror or str(error)) from error
    return parse_toml(data, str(path), what)


def parse_toml(data: bytes, where: str, what: str) -> Table:
    """Reads a TOML file's bytes; arguments and errors as of ``read_toml``."""
    try:
        return Table(tomllib.loads(data.decode("utf-8")), where)
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8", where=where, got=f"byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not TOML", where=where, got=str(error)[:200]) from error


def quote(value: str) -> str:
    """``value`` as a TOML basic string, for files that we write."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value) + '"'
