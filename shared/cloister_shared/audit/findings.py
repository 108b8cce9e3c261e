"""What an audit finds, and the exit code that it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cloister_shared.audit.reading import printable

Kind = Literal["violation", "incomplete", "fork"]
_CODES: dict[Kind, int] = {"violation": 1, "incomplete": 2, "fork": 3}


def many(count: int, one: str, more: str = "") -> str:
    """A number of things, in words that fit it."""
    return f"{count} {one if count == 1 else more or one + 's'}"


def listed(names: Sequence[str]) -> str:
    """Several names on a line; of many the first and how many more."""
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


@dataclass(frozen=True)
class Finding:
    """One thing that does not hold, or that could not be looked at.

    Attributes:
        kind: ``violation``, ``incomplete`` or ``fork`` (a fork or a rollback of a log).
        code: A word for programs.
        where: Log, leaf, client, round.
        what: One line.
    """

    kind: Kind
    code: str
    where: str
    what: str


@dataclass
class Findings:
    """All of them, and what was checked and held."""

    found: list[Finding] = field(default_factory=list)
    held: list[str] = field(default_factory=list)

    def violation(self, code: str, where: str, what: str) -> None:
        """Something that may not be."""
        self._add("violation", code, where, what)

    def incomplete(self, code: str, where: str, what: str) -> None:
        """Something that could not be checked."""
        self._add("incomplete", code, where, what)

    def fork(self, code: str, where: str, what: str) -> None:
        """A log that went back or has two histories."""
        self._add("fork", code, where, what)

    def hold(self, what: str, *codes: str) -> None:
        """Something that was checked and held: nothing of these codes was found."""
        if not {one.code for one in self.found} & set(codes):
            self.held.append(what)

    def _add(self, kind: Kind, code: str, where: str, what: str) -> None:
        # What a bundle says is in both.
        self.found.append(Finding(kind, code, printable(where), printable(what)))

    @property
    def exit_code(self) -> int:
        """0 pass, 3 fork or rollback, 1 violation, 2 incomplete; the gravest of them."""
        codes = {_CODES[one.kind] for one in self.found}
        return next((code for code in (3, 1, 2) if code in codes), 0)
