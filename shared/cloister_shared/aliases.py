"""Aliases in a federation's log: what one move says, what its operator signs of it, and which move may follow which.

One rule for whoever reads the log, an auditor or a site that fetches a release: versions follow each other without a gap, and a guarded
alias moves only with the signature of the operator who guarded it before. Whether the round that a move names is in the log is the
reader's to check.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cloister_shared.audit.reading import MALFORMED, hexes, integer, words
from cloister_shared.cards import check_name
from cloister_shared.encoding import canonical
from cloister_shared.errors import CloisterError, VerificationError
from cloister_shared.signing import VerifyKey

# What the operator of a guarded alias signs a move of it for.
ALIAS_PURPOSE = "alias-move"
_SIGNED = ("log", "alias", "run", "round", "adapter", "version", "rollback", "guard")


def alias_move(body: Mapping[str, Any]) -> bytes:
    """What an operator signs of a move of an alias: the canonical bytes of where it goes, of which log, and who guards it from then on.

    Args:
        body: A leaf ``alias_set``, or what one will say.

    Raises:
        VerificationError: Something of it is missing.
    """
    if missing := [name for name in _SIGNED if name not in body]:
        raise VerificationError("not a move of an alias", where="alias", expected=", ".join(missing), got="nothing")
    return canonical({name: body[name] for name in _SIGNED})


@dataclass(frozen=True)
class Move:
    """One move of an alias.

    Attributes:
        alias: The alias.
        version: Which move of it this is, from 1.
        run: Where it points from then on: the run's id, hex.
        number: And its round.
        adapter: Digest of that round's adapter, hex.
        guard: Public key that guards it from then on, hex; empty for nobody's.
        record: The whole leaf.
    """

    alias: str
    version: int
    run: str
    number: int
    adapter: str
    guard: str
    record: Mapping[str, Any]

    @classmethod
    def read(cls, record: dict[str, Any]) -> Move:
        """Reads a leaf ``alias_set`` strictly.

        Raises:
            ValueError: It is malformed.
            InputError: Its name is none.
        """
        return cls(
            # One that looks like another is another's bait.
            check_name(words(record, "alias"), "alias"),
            integer(record, "version", 1, 1_000_000),
            hexes(record, "run", 16),
            integer(record, "round", 0, 1_000_000),
            hexes(record, "adapter", 32),
            # Leaves from before aliases could be guarded say nothing of it.
            hexes(record, "guard", 32, empty=True) if "guard" in record else "",
            record,
        )

    def check_order(self, before: Move | None, where: str) -> None:
        """Sees that it is the next after ``before``.

        Raises:
            VerificationError: A move is missing between them.
        """
        last = 0 if before is None else before.version
        if self.version != last + 1:
            raise VerificationError(f"move {self.version} of {self.alias} follows move {last}", where=where)

    def check_operator(self, before: Move | None, where: str) -> bool:
        """Sees that whoever guarded the alias before signed it, or who guards it from this first time on; whether anybody had to.

        Raises:
            VerificationError: Nobody who may did.
        """
        if not (by := (before.guard if before is not None else "") or self.guard):
            return False
        try:
            signature = bytes.fromhex(words(dict(self.record), "operator"))
            VerifyKey.from_hex(by, where).verify(ALIAS_PURPOSE, alias_move(self.record), signature, where)
        except (CloisterError, *MALFORMED) as error:
            raise VerificationError(
                f"{self.alias} was moved without the signature of the operator who guards it",
                where=where,
                mend="ask whoever released it; a coordinator alone cannot move a guarded alias",
            ) from error
        return True


def newest_move(records: Iterable[dict[str, Any]], alias: str, where: str) -> Move | None:
    """Walks a whole log for one alias, from its first move to its newest; None where it has none.

    Args:
        records: Every leaf, in order.
        alias: The alias.
        where: For messages.

    Raises:
        VerificationError: A move is malformed, missing, or without its operator's signature.
    """
    last: Move | None = None
    for index, record in enumerate(records):
        if record.get("kind") != "alias_set" or record.get("alias") != alias:
            continue
        at = f"{where}, leaf {index}"
        try:
            move = Move.read(record)
        except (CloisterError, *MALFORMED) as error:
            raise VerificationError("a move of an alias is malformed", where=at, got=str(error)[:200]) from error
        move.check_order(last, at)
        move.check_operator(last, at)
        last = move
    return last
