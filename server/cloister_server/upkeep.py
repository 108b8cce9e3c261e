"""``cloister registry fsck | gc | migrate``: says what is wrong with a registry, and takes away blobs that nothing points at.

fsck reads everything and changes nothing: blobs against their digests, rounds against their leaves, leaves against their signatures and
places, aliases against their moves, the database's rules against those that this version lays. gc deletes a blob only where no round, no
alias, no hold, no open group and no statement names it (an adapter that was given up is named by its rounds no more) and it is older than
the grace period: blobs are written before the rows that name them, so a young one may be about to be named. A crash at any point leaves
a blob too many, never one too few.
"""

from __future__ import annotations

import json as jsonlib
import operator
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from cloister_shared import console
from cloister_shared.encoding import canonical
from cloister_shared.errors import CloisterError, StateError
from cloister_shared.signing import SigningKey
from cloister_shared.witness import LEAF_PURPOSE

from cloister_server import rules
from cloister_server.blobs import Stored
from cloister_server.database import Database
from cloister_server.here import Home, Json, registry
from cloister_server.storage import has_registry, read_storage
from cloister_server.store import Store
from cloister_server.tables import COMMITTED, Blob, Hold, Leaf, Round, Tombstone

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


def unreachable(store: Store, now: float, grace_days: float) -> list[Stored]:
    """Blobs that nothing names and that are older than the grace period; one of unknown age stays."""
    keep, oldest = reachable(store), now - 86_400 * grace_days
    return [b for b in store.blobs.stored() if b.name not in keep and b.modified is not None and b.modified < oldest]


def check(store: Store) -> Iterator[Wrong]:
    """Everything that is wrong, first what everything else rests on."""
    if missing := sorted(rules.expected(store.database.dialect) ^ store.database.rules()):
        yield Wrong(
            "database",
            f"rules are missing, changed or another's: {', '.join(missing)[:200]}",
            "it was changed by hand: compare it with a copy and with the log, then cloister registry migrate lays them anew",
        )
    yield from _leaves(store)
    by_index, gone = {leaf.index: leaf for leaf in store.leaves()}, store.tombstones()
    for name, blob in store.named_blobs().items():
        size = store.blobs.size(name)
        if size is not None and blob.bytes and size != blob.bytes:
            yield Wrong(f"blob {name[:16]}", f"has {size} bytes instead of {blob.bytes}", "restore it from a copy")
    for run in store.runs():
        rows = store.rounds(run.id)
        where = f"run {run.id[:8]}"
        if [row.number for row in rows] != list(range(len(rows))):
            yield Wrong(where, "its rounds have gaps", "restore the registry")
        for row in rows:
            at = f"{where} round {row.number}"
            if row.state == COMMITTED and row.adapter not in gone:
                yield from _blob(store, row.adapter or "", at)
            if row.state == COMMITTED and row.number:
                leaf = by_index.get(-1 if row.leaf is None else row.leaf)
                said = _said(leaf)
                yield from _costs(store, row, said, at)
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
    for hold in store.holds():
        if hold.released is None:
            yield from _blob(store, hold.adapter, f"hold {hold.id}")
    for made in store.statements():
        yield from _blob(store, made.statement, f"statement of run {made.run[:8]} round {made.number}")
    yield from _unmarked(store, by_index)


def _unmarked(store: Store, by_index: Mapping[int, Leaf]) -> Iterator[Wrong]:
    """Holds and tombstones whose leaf says something else."""
    rows: list[Hold | Tombstone] = [*store.holds(), *store.tombstones().values()]
    for row in rows:
        leaf = by_index.get(row.leaf)
        said = _said(leaf)
        if (said.get("run"), said.get("round"), said.get("adapter")) != (row.run, row.number, row.adapter):
            at = f"{type(row).__name__.lower()} of run {row.run[:8]} round {row.number}"
            yield Wrong(at, "its leaf is missing or says something else", "restore the registry")


def _said(leaf: Leaf | None) -> dict[str, Any]:
    """What a leaf says; nothing where it is missing or no record."""
    try:
        said = jsonlib.loads(leaf.record) if leaf is not None else {}
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _costs(store: Store, row: Round, said: Mapping[str, Any], at: str) -> Iterator[Wrong]:
    """Rows of a committed round, against its leaf: who was asked and charged what, scores, and what is stated of privacy."""
    names = (
        "client",
        "name",
        "plan",
        "verdict",
        "weight",
        "update",
        "noise_multiplier",
        "sample_rate",
        "steps",
        "delta",
        "epsilon",
        "charged",
    )
    rows = [{n: getattr(c, n) for n in names} for c in store.clients(row.run, row.number)]
    told = [{n: c.get(n) for n in names} for c in said.get("clients") or [] if isinstance(c, dict)]
    key = operator.itemgetter("client")
    if sorted(rows, key=key) != sorted(told, key=key):
        yield Wrong(at, "its clients are others than its leaf says, or were charged otherwise", "restore the registry")
    if store.metrics(row.run, row.number) != said.get("metrics"):
        yield Wrong(at, "its scores are others than its leaf says", "restore the registry")
    lifetime = {c["client"]: c["epsilon"] for c in told}
    costs = [p for p in store.privacy(row.run) if p.number == row.number and p.scope == "record"]
    if any(p.lifetime != lifetime.get(p.client) or not 0 <= p.epsilon <= p.lifetime + 0.02 for p in costs):
        yield Wrong(at, "what is stated of its privacy is not what its leaf says", "restore the registry")


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
    now = time.time()
    if dry_run:
        gone, young = unreachable(store, now, grace_days), unreachable(store, now, 0.0)
    else:
        # Under the lock that whoever names a blob takes: none is named between the look and the deed.
        with store.database.writing() as session:
            gone, young = unreachable(store, now, grace_days), unreachable(store, now, 0.0)
            for blob in gone:
                store.blobs.delete(blob.name)
                if (row := session.get(Blob, blob.name)) is not None:
                    session.delete(row)
    verb, size = "would go" if dry_run else "gone", sum(blob.bytes for blob in gone)
    waiting = len(young) - len(gone)
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
    database = Database(read_storage(folder).database, migrating=True)
    try:
        done = database.migrate()
    finally:
        database.close()
    line = "is at this version" if done.before == done.after else f"version {done.before or 'none'} -> {done.after}"
    console.emit({"before": done.before, "after": done.after}, f"{database.where}: {line}; its rules are laid")
