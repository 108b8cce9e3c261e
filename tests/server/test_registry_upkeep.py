"""Commands beside each other at one registry: what each looks at is so while it acts on it, and none waits longer than it must."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cloister_server import upkeep
from cloister_server.export_commands import import_folder
from cloister_server.fsck import check
from cloister_server.release_commands import promote, protect
from cloister_server.rounds import one_round
from cloister_server.storage import write_storage
from cloister_server.store import Store
from cloister_server.tables import Opening, Run
from cloister_shared import console
from cloister_shared.cards import SiteCard
from cloister_shared.errors import InputError, StateError
from cloister_shared.signing import SigningKey
from sqlmodel import Session

from support.registry import a_model, a_row, planned
from support.server_world import World, make_world
from support.tampering import edit


@pytest.fixture
def world(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """One committed round of two sites."""
    made = make_world(tmp_path, tiny_bert, sites=2, rounds=3)
    made.store.log_members(made.coordinator.sites)
    one_round(made.context(), made.link, 1)
    monkeypatch.setattr(console.OUTPUT, "home", made.coordinator.home.parent)
    yield made
    made.store.close()


def is_free(store: Store) -> bool:
    """Whether somebody else could write now."""
    other = sqlite3.connect(store.home / "registry.db", timeout=0, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError:
        return False
    finally:
        other.close()
    return True


def test_runs_go_by_the_log_and_not_by_a_clock(world: World) -> None:
    first = world.store.adapter(world.store.rounds(world.run.id)[0].adapter or "")
    later = {"id": "9" * 32, "created": time.time() - 86_400}
    world.store.start_run(Run(**(world.run.model_dump() | later)), first, a_model(world.run.base))
    assert [run.id for run in world.store.runs()] == [world.run.id, "9" * 32]
    assert world.store.find_run(None).id == "9" * 32
    edit(world.store, "UPDATE log_leaf SET kind = 'x' WHERE kind = 'policy'")
    assert [run.id for run in world.store.runs()] == ["9" * 32, world.run.id]


def test_cards_are_read_while_nobody_else_logs_them(world: World) -> None:
    free = list[bool]()

    def cards() -> tuple[SiteCard, ...]:
        free.append(is_free(world.store))
        return world.coordinator.sites()[:1]

    world.store.log_members(cards)
    assert free == [False]
    assert world.store.leaves()[-1].kind == "revoke"


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_whoever_waits_too_long_is_told_that_another_writes(
    database: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "coordinator"
    home.mkdir()
    SigningKey.generate().save(home / "sign.key")
    if database == "postgresql":
        write_storage(home, request.getfixturevalue("postgres").database(), "")
    # 0 would be for ever at PostgreSQL.
    monkeypatch.setattr("cloister_server.database.SECONDS", 1)
    store, other = Store(home), Store(home)
    with store.database.writing(), pytest.raises(StateError, match=r"another command is writing.*try again"):
        other.log("incident", {"what": "a test"})
    other.log("incident", {"what": "a test"})
    store.close()
    other.close()


def test_blobs_are_taken_away_a_few_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "BATCH", 1)
    store, other = world.store, Store(world.store.home)
    made = [b'{"signature":"%d"}' % n for n in range(3)]
    names = sorted(store.blobs.put(data) for data in made)
    data_of = {store.blobs.put(data): data for data in made}
    real, taken = store.database.writing, list[int]()

    @contextmanager
    def writing() -> Iterator[Session]:
        # Between two batches somebody names the next one.
        if taken == [1]:
            other.add_statement(world.run.id, 1, data_of[names[1]], "00" * 32)
        taken.append(1)
        with real() as session:
            yield session

    monkeypatch.setattr(store.database, "writing", writing)
    found = upkeep.unreachable(store)
    assert sorted(blob.name for blob in found) == names
    gone = upkeep.take_away(store, found, time.time() + 3600)
    assert [blob.name for blob in gone] == [names[0], names[2]]
    assert store.blobs.size(names[1]) is not None
    assert len(taken) == 3
    other.close()


def test_a_blob_that_is_written_again_meanwhile_waits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store, oldest = world.store, time.time() + 3600
    store.blobs.put(b"about to be named")
    found = upkeep.unreachable(store)
    monkeypatch.setattr(store.blobs, "modified", lambda _: oldest + 1)
    assert upkeep.take_away(store, found, oldest) == []


def test_fsck_lets_others_write_while_it_reads_blobs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store, real, free = world.store, world.store.blobs.get, list[bool]()
    promote("production", 1)
    edit(store, "UPDATE alias_event SET why = 'another'")
    store.blobs.delete(store.rounds(world.run.id)[0].adapter or "")

    def get(name: str) -> bytes:
        free.append(is_free(store))
        return real(name)

    monkeypatch.setattr(store.blobs, "get", get)
    assert [one.what for one in check(store)] == ["its leaf says something else of its why", "blob is missing"]
    assert free
    assert all(free)


def test_means_that_groups_opened_are_looked_for(world: World) -> None:
    store, run = world.store, world.run.id
    planned(store, run, 2, [a_row(2, world.id_of(100), run)], upto="open")
    store.keep_opening(Opening(run=run, number=2, group="group-1", clients="[]"))
    mean = store.blobs.put(b"a mean")
    store.keep_mean(run, 2, "group-1", mean)
    assert check(store) == []
    store.blobs.delete(mean)
    found = check(store)
    assert [(one.where, one.what) for one in found] == [(f"mean of group-1, run {run[:8]} round 2", "blob is missing")]


def test_a_fence_that_went_back_is_told(world: World) -> None:
    world.store.take_fence()
    world.store.take_fence()
    one_round(world.context(), world.link, 2)
    assert check(world.store) == []
    edit(world.store, "UPDATE fence SET number = 1")
    assert ["two coordinators" in one.what for one in check(world.store)] == [True]


def test_a_key_that_was_typed_wrongly_is_the_callers_error(world: World, tmp_path: Path) -> None:
    promote("production", 1)
    calls: list[tuple[Any, dict[str, Any]]] = [
        (protect, {"alias": "production", "to": "zz"}),
        (import_folder, {"folder": tmp_path, "key": "zz"}),
    ]
    for command, arguments in calls:
        with pytest.raises(InputError, match="not an Ed25519 public key") as caught:
            command(**arguments)
        assert caught.value.exit_code == 2
