"""``cloister registry fsck | gc | migrate``: says what is wrong with a registry, and takes away blobs that nothing points at.

What is wrong is ``fsck``'s to say. gc deletes a blob only where no round, no alias, no hold, no open group and no statement names it (an
adapter that was given up is named by its rounds no more) and it is older than the grace period: blobs are written before the rows that
name them, so a young one may be about to be named. A crash at any point leaves a blob too many, never one too few.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated, Any

import typer
from cloister_shared import console
from cloister_shared.errors import StateError

from cloister_server.blobs import Blobs, Stored
from cloister_server.database import Database
from cloister_server.fsck import check
from cloister_server.here import Home, Json, registry
from cloister_server.storage import has_registry, read_storage
from cloister_server.store import Store
from cloister_server.tables import Blob

registry_app = typer.Typer(no_args_is_help=True, help="Look after the registry.")
GRACE_DAYS = 7.0
# Blobs that are taken away while others wait: at a remote place each takes a tenth of a second.
BATCH = 50


def reachable(store: Store) -> set[str]:
    """Digests of the blobs that a round, an alias, a hold, an opening or a statement names, but for adapters that were given up."""
    named = {one.statement for one in store.statements()}
    for run in store.runs():
        rows = store.rounds(run.id)
        named |= {row.adapter for row in rows if row.adapter}
        named |= {one.mean for row in rows for one in store.openings(run.id, row.number) if one.mean}
    named -= set(store.tombstones())
    named |= {alias.adapter for alias in store.aliases()}
    named |= {hold.adapter for hold in store.holds() if hold.released is None}
    return named - {""}


def unreachable(store: Store) -> list[Stored]:
    """Blobs that nothing names, whatever their age.

    Raises:
        StateError: The registry has not a single leaf, and so knows nothing of what it may let go.
    """
    keep = reachable(store)
    found = [blob for blob in store.blobs.stored() if blob.name not in keep]
    if found and not store.leaves(0, 1):
        raise StateError(
            "the registry knows of nothing, and blobs are there: it was emptied",
            where=store.database.where,
            got=f"no leaf, {len(found)} blobs",
            mend="restore the database from a copy; where the first run was broken off, cloister run",
        )
    return found


def _older(found: list[Stored], oldest: float) -> list[Stored]:
    # One of unknown age may be about to be named, for all that anybody knows.
    return [blob for blob in found if blob.modified is not None and blob.modified < oldest]


def take_away(store: Store, found: list[Stored], oldest: float) -> list[Stored]:
    """Deletes blobs that nothing names, a few at a time: whoever writes rounds waits no longer for the lock than for those.

    Args:
        store: The registry.
        found: Candidates, from ``unreachable``.
        oldest: Younger ones stay, seconds since 1970.

    Returns:
        Those that are gone.

    Raises:
        StateError: The place for blobs is another federation's, or fails.
    """
    store.blobs.claim(store.origin)
    gone, candidates = list[Stored](), _older(found, oldest)
    for first in range(0, len(candidates), BATCH):
        # Under the lock that whoever names a blob takes: none is named between the look and the deed.
        with store.database.writing() as session:
            keep = reachable(store)
            batch = [blob for blob in candidates[first : first + BATCH] if blob.name not in keep]
            # Somebody may have written one again, to name it.
            for blob in _older([replace(blob, modified=store.blobs.modified(blob.name)) for blob in batch], oldest):
                store.blobs.delete(blob.name)
                if (row := session.get(Blob, blob.name)) is not None:
                    session.delete(row)
                gone.append(blob)
    return gone


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
    store, oldest = registry(), time.time() - 86_400 * grace_days
    found = unreachable(store)
    gone = _older(found, oldest) if dry_run else take_away(store, found, oldest)
    verb, size, waiting = "would go" if dry_run else "gone", sum(b.bytes for b in gone), len(found) - len(gone)
    late = f"; {waiting} more are younger than {grace_days:g} days and wait" if waiting else ""
    console.emit(
        {"blobs": [b.name for b in gone], "bytes": size, "waiting": waiting, "dry_run": dry_run},
        f"{len(gone)} blobs that nothing names, {size:,} bytes: {verb}; {len(reachable(store))} stay{late}",
    )


@registry_app.command()
def migrate(json: Json = False, home: Home = None) -> None:
    """Bring the registry's tables to this version, whole or not at all; rules that are missing are laid anew."""
    console.choose(json, home)
    folder = console.coordinator_home()
    if not has_registry(folder):
        raise StateError("no registry here", where=str(folder), mend="--home, at a coordinator")
    storage = read_storage(folder)
    database = Database(storage.database, Blobs(storage.blobs).held, migrating=True)
    try:
        done = database.migrate()
    finally:
        database.close()
    line = "is at this version" if done.before == done.after else f"version {done.before or 'none'} -> {done.after}"
    laid = f"{len(done.laid)} of its rules were missing or changed and are laid anew: {', '.join(done.laid)}"
    console.emit(vars(done), f"{database.where}: {line}; {laid if done.laid else 'its rules are laid'}")
