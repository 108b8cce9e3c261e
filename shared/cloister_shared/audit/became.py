"""What became of rounds, told in the log's order: aliases that moved and by whom, exports, imports, holds, adapters that were given up.

It only tells; whether each line may be so is ``releases``' to check.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cloister_shared.audit.federation import History
from cloister_shared.audit.reading import when
from cloister_shared.errors import VerificationError
from cloister_shared.signing import VerifyKey


def round_of(record: Mapping[str, Any], number: str = "round") -> str:
    """A round, as lines name it."""
    return f"round {record.get(number)} of run {str(record.get('run'))[:8]}"


def key_id(guard: object) -> str:
    """The id of a public key, as commands print it; what is no key stands as it is."""
    try:
        return VerifyKey.from_hex(str(guard), "guard").id.hex()
    except VerificationError:
        return str(guard)[:32]


def became(history: History) -> list[str]:
    """Every line, in order; each says where nobody else saw its leaf yet."""
    return [
        f"leaf {index}, {when(history.records[index].get('at'))}: {what}"
        + ("; nobody else saw this leaf yet" if index >= history.covered else "")
        for index, what in _told(history)
    ]


def _told(history: History) -> Iterator[tuple[int, str]]:
    aliases = dict[str, Mapping[str, Any]]()
    for index, record in enumerate(history.records):
        kind, why = record.get("kind"), f": {record['why']}" if record.get("why") else ""
        if kind == "alias_set":
            name = str(record.get("alias"))
            yield index, _moved(aliases.get(name), record) + why
            aliases[name] = record
        elif kind == "export":
            yield index, f"{round_of(record)} was exported, statement {str(record.get('statement'))[:16]}"
        elif kind == "hold" and record.get("released"):
            yield index, f"the hold of leaf {record.get('hold')} on {round_of(record)} ended{why}"
        elif kind == "hold":
            yield index, f"{round_of(record)} is held, whatever happens{why}"
        elif kind == "tombstone":
            yield index, f"{round_of(record)}: its adapter was given up{why}"
        elif came := imported(record):
            yield index, f"round 0 of run {str(record.get('run'))[:8]} was imported: {came}"


def _moved(before: Mapping[str, Any] | None, record: Mapping[str, Any]) -> str:
    """One move: where to, or who guards the alias from then on; and by whom."""
    name, last = record.get("alias"), before or {}
    was, now = last.get("guard") or "", record.get("guard") or ""
    by = f"by its operator, key {key_id(was or now)}" if was or now else "by whoever has the coordinator's key"
    place = ("run", "round", "adapter")
    if before is not None and was != now and [last.get(n) for n in place] == [record.get(n) for n in place]:
        if not was:
            return f"{name} moves only with key {key_id(now)} from here on; set with that key"
        return f"{name} {f'was handed on to key {key_id(now)}' if now else 'moves without a key from here on'}, {by}"
    back = "went back" if record.get("rollback") else "was set"
    return f"{name} {back} to {round_of(record)}, {by}"


def imported(record: Mapping[str, Any]) -> str:
    """Where a run's first adapter was imported from; empty where it was not."""
    came = record.get("imported") if record.get("kind") == "policy" else None
    if not isinstance(came, dict):
        return ""
    return f"{round_of(came)} of {came.get('federation')}, by its statement {str(came.get('statement'))[:16]}"
