"""``cloister registry fsck | gc``: says what is wrong with a registry, and takes away blobs that nothing points at.

fsck reads everything and changes nothing: blobs against their digests, rounds against their leaves, leaves against their signatures and
places, aliases against their moves, triggers against those that this version makes. gc deletes a blob only where no round, no alias, no
open group and no leaf names it and it is older than the grace period: blobs are written before the rows that name them, so a young one
may be about to be named. A crash at any point leaves a blob too many, never one too few.
"""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from cloister_shared import console
from cloister_shared.encoding import canonical
from cloister_shared.errors import CloisterError, StateError
from cloister_shared.signing import SigningKey
from cloister_shared.witness import LEAF_PURPOSE

from cloister_server.here import Home, Json, registry
from cloister_server.store import Store, triggers

registry_app = typer.Typer(no_args_is_help=True, help="Look after the registry.")
GRACE_DAYS = 7.0


@dataclass(frozen=True)
class Wrong:
    """One thing that is wrong.

    Attributes:
        where: Which row, leaf or blob.
        what: What is wrong with it.
        mend: What its owner can do.
    """

    where: str
    what: str
    mend: str


def reachable(store: Store) -> set[str]:
    """Digests of the blobs that a round, an alias, an opening or a leaf names."""
    named = {alias.adapter for alias in store.aliases()}
    for run in store.runs():
        rows = store.rounds(run.id)
        named |= {row.adapter for row in rows if row.adapter}
        named |= {one.mean for row in rows for one in store.openings(run.id, row.number) if one.mean}
    for leaf in store.leaves():
        adapter = jsonlib.loads(leaf.record).get("adapter")
        named |= {adapter} if isinstance(adapter, str) else set()
    return named - {""}


def unreachable(store: Store, now: float, grace_days: float) -> list[Path]:
    """Blobs that nothing names, older than the grace period."""
    keep, oldest = reachable(store), now - 86_400 * grace_days
    found = (path for path in store.blobs.root.glob("??/*") if path.is_file())
    return sorted(p for p in found if p.name not in keep and p.stat().st_mtime < oldest)


def check(store: Store) -> Iterator[Wrong]:
    """Everything that is wrong, first what everything else rests on."""
    if missing := sorted(set(triggers()) - store.triggers()):
        yield Wrong(
            "database",
            f"triggers are missing or changed: {', '.join(missing)[:200]}",
            "it was changed by hand: restore it",
        )
    yield from _leaves(store)
    by_index = {leaf.index: leaf for leaf in store.leaves()}
    for run in store.runs():
        rows = store.rounds(run.id)
        where = f"run {run.id[:8]}"
        if [row.number for row in rows] != list(range(len(rows))):
            yield Wrong(where, "its rounds have gaps", "restore the registry")
        for row in rows:
            at = f"{where} round {row.number}"
            if row.state == "committed":
                yield from _blob(store, row.adapter or "", at)
            if row.state == "committed" and row.number:
                leaf = by_index.get(-1 if row.leaf is None else row.leaf)
                said = jsonlib.loads(leaf.record) if leaf is not None else {}
                if (said.get("run"), said.get("round"), said.get("adapter")) != (run.id, row.number, row.adapter):
                    yield Wrong(at, "its leaf is missing or says something else", "restore the registry")
    for alias in store.aliases():
        moves = store.alias_events(alias.name)
        last = moves[-1] if moves else None
        if last is None or (last.version, last.run, last.number, last.adapter) != (
            alias.version, alias.run, alias.number, alias.adapter,
        ):  # fmt: skip
            yield Wrong(f"alias {alias.name}", "it points elsewhere than its last move", "cloister rounds promote")
        yield from _blob(store, alias.adapter, f"alias {alias.name}")


def _leaves(store: Store) -> Iterator[Wrong]:
    key = SigningKey.load(store.home / "sign.key").verify_key
    for place, leaf in enumerate(store.leaves()):
        where = f"leaf {leaf.index}"
        if leaf.index != place:
            yield Wrong(where, f"stands at place {place}", "a leaf is missing: restore the registry")
            return
        try:
            key.verify(LEAF_PURPOSE, leaf.record, bytes.fromhex(leaf.signature), where)
            record = jsonlib.loads(leaf.record)
            if (record["index"], record["log"], canonical(record)) != (place, store.origin, leaf.record):
                raise StateError("it says that it is another leaf", where=where)
        except (CloisterError, ValueError, KeyError, TypeError) as error:
            yield Wrong(where, str(error)[:200], "the log was changed by hand: restore the registry")


def _blob(store: Store, name: str, where: str) -> Iterator[Wrong]:
    try:
        store.blobs.get(name)
    except CloisterError as error:
        yield Wrong(where, error.what, error.mend or "restore the blob from a copy")


@registry_app.command()
def fsck(json: Json = False, home: Home = None) -> None:
    """Check the whole registry; exit code 1 where something is wrong."""
    console.choose(json, home)
    found = list(check(registry()))
    record: dict[str, Any] = {"wrong": [vars(one) for one in found]}
    lines = [f"{one.where}: {one.what}; mend: {one.mend}" for one in found] or ["the registry is whole"]
    console.emit(record, lines)
    if found:
        raise typer.Exit(1)


@registry_app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    grace_days: Annotated[float, typer.Option(min=0.0, help="Younger blobs stay.")] = GRACE_DAYS,
    json: Json = False,
    home: Home = None,
) -> None:
    """Take away blobs that no round, alias, opening or leaf names."""
    console.choose(json, home)
    store = registry()
    gone = unreachable(store, time.time(), grace_days)
    size = sum(path.stat().st_size for path in gone)
    for path in () if dry_run else gone:
        path.unlink()
    verb = "would go" if dry_run else "gone"
    console.emit(
        {"blobs": [path.name for path in gone], "bytes": size, "dry_run": dry_run},
        f"{len(gone)} blobs that nothing names, {size:,} bytes: {verb}; {len(reachable(store))} stay",
    )
