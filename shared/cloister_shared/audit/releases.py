"""Checks of what became of rounds: aliases that point at them and who let them, holds, adapters that were given up, exports.

Each names an adapter that the log's own rounds made. An alias moves one version at a time; a guarded one only with the signature of the
operator who guarded it before the move, so that a coordinator's key alone does not release.
"""

from __future__ import annotations

from cloister_shared.aliases import Move
from cloister_shared.audit.federation import History
from cloister_shared.audit.findings import Findings, many
from cloister_shared.audit.reading import MALFORMED, hexes, integer
from cloister_shared.errors import CloisterError, VerificationError

_KINDS = ("alias_set", "hold", "tombstone", "export")


def check_releases(history: History, findings: Findings) -> None:
    """Walks the log's leaves in order.

    Args:
        history: The federation's log.
        findings: Where what is found goes.
    """
    held = dict[int, str]()
    made, gone, aliases, guarded = dict[tuple[str, int], str](), set[str](), dict[str, Move](), 0
    for index, record in enumerate(history.records):
        where, kind = f"leaf {index}", record.get("kind")
        try:
            if kind == "policy":
                made[hexes(record, "run", 16), 0] = began = hexes(record, "adapter", 32)
                if began in gone:
                    findings.violation("release", where, "a run began with an adapter that was given up before")
            elif kind == "round_commit":
                made[hexes(record, "run", 16), integer(record, "round", 1, 1_000_000)] = hexes(record, "adapter", 32)
            if kind not in _KINDS:
                continue
            place = hexes(record, "run", 16), integer(record, "round", 0, 1_000_000)
            adapter = hexes(record, "adapter", 32)
            if made.get(place) != adapter:
                what = f"{kind} names an adapter that round {place[1]} of run {place[0][:8]} did not make"
                findings.violation("release", where, what)
            if kind == "hold" and not record.get("released"):
                held[index] = adapter
            elif kind == "hold" and held.pop(integer(record, "hold", 0, index), None) != adapter:
                findings.violation("release", where, "a hold ended that was none, or had ended")
            if kind in ("tombstone", "export", "hold") and adapter in gone:
                findings.violation("release", where, f"{kind} of an adapter that was given up before")
            if kind == "tombstone":
                if adapter in held.values() or any(last.adapter == adapter for last in aliases.values()):
                    findings.violation("release", where, "an adapter was given up that a hold or an alias keeps")
                gone.add(adapter)
            if kind == "alias_set":
                if adapter in gone:
                    findings.violation("release", where, "an alias points at an adapter that was given up before")
                guarded += _move(Move.read(record), aliases, findings, where)
        except (CloisterError, *MALFORMED) as error:
            findings.violation("leaf", where, f"malformed: {error}"[:300])
    if aliases:
        signed = f", {guarded} signed by the operator who guards the alias" if guarded else ""
        moves = many(sum(last.version for last in aliases.values()), "move")
        what = f"{moves} of {many(len(aliases), 'alias', 'aliases')}, each at a round that the log has{signed}"
        findings.hold(what, "release", "alias", "operator", "leaf", "leaf-signature")


def _move(move: Move, aliases: dict[str, Move], findings: Findings, where: str) -> bool:
    """One move; whether an operator had to sign it and did."""
    before = aliases.get(move.alias)
    aliases[move.alias] = move
    try:
        move.check_order(before, where)
    except VerificationError as error:
        findings.violation("alias", where, error.what)
    try:
        return move.check_operator(before, where)
    except VerificationError as error:
        findings.violation("operator", where, error.what)
        return False
