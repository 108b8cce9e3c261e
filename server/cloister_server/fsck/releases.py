"""Moves of aliases, holds, adapters that were given up and statements, against their leaves."""

from __future__ import annotations

from collections.abc import Iterator

from cloister_shared.aliases import newest_move
from cloister_shared.errors import CloisterError

from cloister_server.fsck.against import Leaves, Wrong, pairs
from cloister_server.store import Store


def wrong_releases(store: Store, log: Leaves) -> Iterator[Wrong]:
    """Moves, holds, tombstones and statements that are not as the log tells of them, and aliases off their last move."""
    names = store.aliases()
    # Where leaves are missing, so may moves be.
    for name in sorted({str(r.get("alias")) for r in log.kinds["alias_set"] if not log.gaps}):
        try:
            newest_move(log.records, name, "log")
        except CloisterError as error:
            yield Wrong(
                f"alias {name}", f"{error.what} ({error.where})", "the log was written by hand: ask its operator"
            )
    moves = [event for alias in names for event in store.alias_events(alias.name)]
    yield from pairs(
        log,
        {
            (e.name, e.version): {
                "run": e.run, "round": e.number, "adapter": e.adapter, "rollback": e.rollback, "why": e.why,
                "guard": e.guard, "index": e.leaf, "at": e.at,
            }
            for e in moves
        },
        {(r.get("alias"), r.get("version")): r for r in log.kinds["alias_set"]},
        lambda key: f"move {key[1]} of alias {key[0]}",
    )  # fmt: skip
    for alias in names:
        last = [e for e in moves if e.name == alias.name][-1:]
        if [alias.model_dump()] != [e.model_dump(include=set(alias.model_dump())) for e in last]:
            yield Wrong(f"alias {alias.name}", "it points elsewhere than its last move", "cloister rounds promote")
    held = store.holds()
    yield from pairs(
        log,
        {
            h.leaf: {"run": h.run, "round": h.number, "adapter": h.adapter, "why": h.why, "index": h.leaf, "at": h.at}
            for h in held
        },
        {r["index"]: r for r in log.kinds["hold"] if not r.get("released")},
        lambda key: f"hold of leaf {key}",
    )
    yield from pairs(
        log,
        {
            h.leaf: {"run": h.run, "round": h.number, "adapter": h.adapter, "at": h.released}
            for h in held
            if h.released is not None
        },
        {r.get("hold"): r for r in log.kinds["hold"] if r.get("released")},
        lambda key: f"release of the hold of leaf {key}",
    )
    yield from pairs(
        log,
        {
            t.adapter: {"run": t.run, "round": t.number, "why": t.why, "index": t.leaf, "at": t.at}
            for t in store.tombstones().values()
        },
        {str(r.get("adapter")): r for r in log.kinds["tombstone"]},
        lambda key: f"adapter {key[:16]}, given up",
    )
    stated = {str(r.get("statement")): r for r in log.kinds["export"]}
    for record in log.kinds["policy"]:
        if isinstance(came := record.get("imported"), dict):
            stated[str(came.get("statement"))] = {"run": record.get("run"), "round": 0} | {
                n: record[n] for n in ("index", "at")
            }
    yield from pairs(
        log,
        {s.statement: {"run": s.run, "round": s.number, "at": s.at} for s in store.statements()},
        stated,
        lambda key: f"statement {key[:16]}",
    )
