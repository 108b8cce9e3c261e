"""What became of rounds, told in the log's order: aliases that moved and by whom, exports, imports, holds, adapters that were given up.

It only tells; whether each line may be so is ``releases``' to check.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cloister_shared.aliases import Move
from cloister_shared.audit.federation import History
from cloister_shared.audit.reading import MALFORMED, when
from cloister_shared.audit.tables import Table
from cloister_shared.errors import CloisterError, VerificationError
from cloister_shared.signing import VerifyKey

_KEEPER = "by whoever has the coordinator's key"


def round_of(record: Mapping[str, Any], number: str = "round") -> str:
    """A round, as lines name it."""
    return f"round {record.get(number)} of run {str(record.get('run'))[:8]}"


def key_id(guard: object) -> str:
    """The id of a public key, as commands print it; what is no key stands as it is."""
    try:
        return VerifyKey.from_hex(str(guard), "guard").id.hex()
    except VerificationError:
        return str(guard)[:32]


def became(history: History) -> Table:
    """Everything, in order; each row says whether somebody else saw its leaf."""
    rows = (
        (str(index), when(history.records[index].get("at")), what, "yes" if index < history.covered else "not yet")
        for index, what in _told(history)
    )
    return Table(("leaf", "when", "what, and by whom", "seen by others"), tuple(rows))


def standing(history: History) -> list[str]:
    """Where each alias points at the log's end, what is held then, and what was given up."""
    last, held, gone = dict[str, Move](), dict[int, str](), list[str]()
    for index, record in enumerate(history.records):
        if record.get("kind") == "hold" and not record.get("released"):
            held[index] = f"now held, by the hold of leaf {index}: {round_of(record)}"
        elif record.get("kind") == "hold" and isinstance(record.get("hold"), int):
            held.pop(record["hold"], None)
        elif record.get("kind") == "tombstone":
            gone.append(f"given up: the adapter of {round_of(record)}")
        if record.get("kind") == "alias_set":
            try:
                move = Move.read(record)
            except (CloisterError, *MALFORMED):
                continue
            last[move.alias] = move
    return [
        f"now {name} points at round {m.number} of run {m.run[:8]}, adapter {m.adapter[:16]}; "
        + (f"guarded by key {key_id(m.guard)}" if m.guard else "guarded by nobody's key")
        for name, m in sorted(last.items())
    ] + [*held.values(), *gone]


def _told(history: History) -> Iterator[tuple[int, str]]:
    aliases = dict[str, Move]()
    for index, record in enumerate(history.records):
        # Nobody but the coordinator signs why.
        kind, why = record.get("kind"), f"; the coordinator's reason: {record['why']}" if record.get("why") else ""
        if kind == "alias_set":
            try:
                move = Move.read(record)
            except (CloisterError, *MALFORMED):
                yield index, "a move of an alias that is malformed"
                continue
            yield index, _moved(aliases.get(move.alias), move) + why
            aliases[move.alias] = move
        elif kind == "export":
            yield index, f"{round_of(record)} was exported, statement {str(record.get('statement'))[:16]}, {_KEEPER}"
        elif kind == "hold" and record.get("released"):
            yield index, f"the hold of leaf {record.get('hold')} on {round_of(record)} ended, {_KEEPER}{why}"
        elif kind == "hold":
            yield index, f"{round_of(record)} is held, whatever happens, {_KEEPER}{why}"
        elif kind == "tombstone":
            yield index, f"{round_of(record)}: its adapter was given up, {_KEEPER}{why}"
        elif came := imported(record):
            yield index, f"round 0 of run {str(record.get('run'))[:8]} was imported, {_KEEPER}: {came}"


def _moved(before: Move | None, move: Move) -> str:
    """One move: where to, or who guards the alias from then on; and by whom."""
    was = before.guard if before is not None else ""
    by = _KEEPER
    if was or move.guard:
        key = key_id(was or move.guard)
        try:
            move.check_operator(before, "")
            by = f"signed by its operator, key {key}"
        except CloisterError:
            by = f"WITHOUT the signature of its operator, key {key}"
    here = before is not None and (before.run, before.number, before.adapter) == (move.run, move.number, move.adapter)
    if here and was != move.guard:
        then = f"moves only with key {key_id(move.guard)}" if move.guard else "moves without a key"
        return f"{move.alias} {then} from here on, {by}"
    back = "went back" if move.record.get("rollback") else "was set"
    return f"{move.alias} {back} to round {move.number} of run {move.run[:8]}, {by}"


def imported(record: Mapping[str, Any]) -> str:
    """Where a run's first adapter was imported from; empty where it was not."""
    came = record.get("imported") if record.get("kind") == "policy" else None
    if not isinstance(came, dict):
        return ""
    return f"{round_of(came)} of {came.get('federation')}, by its statement {str(came.get('statement'))[:16]}"
