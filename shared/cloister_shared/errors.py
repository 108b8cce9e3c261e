"""The one tree of errors.

    CloisterError                 exit 1
    |-- InputError                exit 2   something a person wrote is wrong: a file, a row, a setting, an argument
    |-- StateError                exit 2   this machine's state does not allow it: missing, busy, half there
    |-- RefusedError              exit 1   a rule said no: policy, budget, admission
    |-- VerificationError         exit 1   a signature, digest, seal or structure does not hold
    `-- RollbackError             exit 3   history went back or forked

Each message says what, where, expected, got and the mend. Nothing is caught and swallowed here.
"""

from __future__ import annotations


class CloisterError(Exception):
    """An error that is told to a person in one line.

    Args:
        what: What is wrong, without a full stop.
        where: File and row, key, process or peer it was found at.
        expected: What would have been right.
        got: What was found; never a secret and, towards a peer, never private text.
        mend: What the reader can do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", expected: str = "", got: str = "", mend: str = "") -> None:
        self.what, self.where, self.expected, self.got, self.mend = what, where, expected, got, mend
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.got:
            parts.append(f"got {self.got}")
        if self.mend:
            parts.append(f"mend: {self.mend}")
        return "; ".join(parts)

    def as_dict(self) -> dict[str, str | int]:
        """The same, for ``--json``."""
        named = {"what": self.what, "where": self.where, "expected": self.expected, "got": self.got, "mend": self.mend}
        head: dict[str, str | int] = {"error": type(self).__name__, "exit_code": self.exit_code}
        return head | {k: v for k, v in named.items() if v}


class InputError(CloisterError):
    """Something that a person wrote is wrong."""

    exit_code = 2


class StateError(CloisterError):
    """This machine's state does not allow what was asked."""

    exit_code = 2


class RefusedError(CloisterError):
    """A rule said no.

    Args:
        rule: The rule's dotted name, e.g. ``policy.max_rank``; the only part that travels to a peer.
    """

    def __init__(
        self, rule: str, what: str, *, where: str = "", expected: str = "", got: str = "", mend: str = ""
    ) -> None:
        self.rule = rule
        super().__init__(what, where=where, expected=expected, got=got, mend=mend)


class VerificationError(CloisterError):
    """A signature, digest, seal or structure does not hold."""


class RollbackError(CloisterError):
    """History went back in time or forked."""

    exit_code = 3
