"""A registry that is not what was left here: emptied, put back beneath a process, without its key or a leaf."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cloister_server import upkeep
from cloister_server.export_commands import export as export_folder
from cloister_server.fsck import check
from cloister_server.keeping_commands import give_up, hold
from cloister_server.release_commands import aliases, diff, promote, rollback
from cloister_server.round_commands import show
from cloister_server.rounds import one_round
from cloister_server.storage import write_storage
from cloister_server.store import Store
from cloister_shared import console
from cloister_shared.errors import CloisterError, RollbackError, StateError
from cloister_shared.notes import Checkpoint
from cloister_shared.signing import SigningKey

from support.server_world import World, make_world
from support.tampering import edit

# Text in a column of bytes, as SQLite lets whoever has the file.
_TEXT = 'UPDATE log_leaf SET record = \'{"a":1}\' WHERE "index" = 3'


@pytest.fixture
def world(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Two committed rounds of two sites, an alias and a statement."""
    made = make_world(tmp_path, tiny_bert, sites=2, rounds=3)
    made.store.log_members(made.coordinator.sites)
    for number in (1, 2):
        one_round(made.context(), made.link, number)
    monkeypatch.setattr(console.OUTPUT, "home", made.coordinator.home.parent)
    yield made
    made.store.close()


def blobs_of(home: Path) -> list[Path]:
    """Every blob's file."""
    return sorted(path for path in (home / "blobs").rglob("*") if len(path.name) == 64)


@pytest.mark.parametrize("claimed", [True, False])
@pytest.mark.parametrize("how", ["emptied", "gone"])
def test_an_emptied_database_is_no_new_registry(world: World, how: str, claimed: bool) -> None:
    home = world.store.home
    world.store.close()
    before, path = blobs_of(home), home / "registry.db"
    if claimed:
        world.store.blobs.claim(world.store.origin)
    else:
        (home / "blobs" / "owner").unlink(missing_ok=True)
    path.unlink()
    if how == "emptied":
        path.touch()
    with pytest.raises(StateError, match=r"database is empty, and its place for blobs is not.*restore"):
        Store(home)
    # What is left of the attempt is not taken for a registry by the next command either.
    assert path.read_bytes() == b""
    commands: tuple[Callable[[], None], ...] = (upkeep.fsck, upkeep.migrate, upkeep.gc)
    for command in commands:
        with pytest.raises(StateError, match=r"database is empty"):
            command()
    assert (blobs_of(home), path.read_bytes()) == (before, b"")


def test_an_emptied_postgresql_database_is_no_new_registry(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    home, server = tmp_path / "coordinator", request.getfixturevalue("postgres")
    home.mkdir()
    SigningKey.generate().save(home / "sign.key")
    write_storage(home, server.database(), "")
    store = Store(home)
    store.blobs.claim(store.origin)  # as init does; no run ever was
    store.close()
    Store(home).close()
    write_storage(home, server.database(), "")
    with pytest.raises(StateError, match=r"database is empty.*cloister/federation/"):
        Store(home)


def test_a_database_whose_rows_are_gone_takes_nothing_away(world: World) -> None:
    store, other = world.store, world.store.home.parent / "other"
    other.mkdir()
    store.close()
    Store(other).close()
    shutil.copy(other / "registry.db", store.home / "registry.db")
    before = blobs_of(store.home)
    with pytest.raises(StateError, match=r"knows of nothing.*restore the database"):
        upkeep.gc(grace_days=0.0)
    assert blobs_of(store.home) == before
    again = Store(store.home)
    assert [one.where for one in check(again)] == ["log"]
    again.close()


@pytest.mark.parametrize("grown", [0, 5])
def test_a_log_that_was_put_back_beneath_a_process_is_signed_no_further(world: World, grown: int) -> None:
    served, path = Store(world.store.home), world.store.home / "registry.db"
    world.store.close()
    shutil.copy(path, path.with_name("older"))
    for number in range(3):
        world.store.log("incident", {"what": f"a test {number}"})
    seen = served.checkpoint()
    served.close()
    world.store.close()
    shutil.move(path.with_name("older"), path)
    other = Store(path.parent)
    for number in range(grown):
        other.log("incident", {"what": f"another test {number}"})
    for deed in (served.checkpoint, served.tree, lambda: served.signed_checkpoint(seen), served.check_history):
        with pytest.raises(RollbackError, match=r"was put back.*start this process again"):
            deed()
    # Whoever starts again sees the log that is.
    assert other.checkpoint().size == seen.size - 3 + grown
    other.close()
    served.close()


def test_a_gap_is_signed_by_nobody(world: World) -> None:
    edit(world.store, 'DELETE FROM log_leaf WHERE "index" = 1')
    with pytest.raises(RollbackError, match=r"leaf 1: a leaf of the log is missing; got leaf 2; mend: .*fsck"):
        Store(world.store.home).checkpoint()


@pytest.mark.parametrize("change", ["kind = 'note'", "record = '{}'", "record = 'no record'"])
def test_a_run_whose_leaf_is_gone_is_an_answer(world: World, change: str) -> None:
    """A bare StopIteration would leave whoever asks the service waiting until its deadline."""
    edit(world.store, f"UPDATE log_leaf SET {change} WHERE kind = 'policy'")
    with pytest.raises(StateError, match=r"run began with is missing.*fsck"):
        world.store.proof(world.run.id, 0)


@pytest.mark.parametrize("how", ["gone", "another"])
def test_a_missing_key_accuses_no_leaf(world: World, how: str) -> None:
    path = world.store.home / "sign.key"
    path.unlink()
    if how == "another":
        SigningKey.generate().save(path)
    store = Store(world.store.home)
    (wrong,) = check(store)
    assert (wrong.where, "back from a copy" in wrong.mend) == ("sign.key", True)
    edit(store, "UPDATE log_leaf SET signature = '00' WHERE \"index\" = 2")
    assert [one.where for one in check(store)][:2] == ["sign.key", "leaf 2"]
    store.close()


def test_a_gap_is_named_and_accuses_nobody_else(world: World) -> None:
    # Of a round's commit, whose row names it.
    place = world.store.round(world.run.id, 1).leaf
    edit(world.store, f'DELETE FROM log_leaf WHERE "index" = {place}')
    store = Store(world.store.home)
    assert [(one.where, one.what) for one in check(store)] == [(f"leaf {place}", "missing: the log has a gap")]
    edit(
        store,
        f'DELETE FROM log_leaf WHERE "index" = {(place or 0) - 1}',
        "UPDATE round SET residual = 1 WHERE number = 2",
    )
    found = {one.where: one.what for one in check(store)}
    assert found[f"leaves {(place or 0) - 1} to {place}"] == "missing: the log has a gap"
    assert "residual" in found[f"run {world.run.id[:8]} round 2"]
    store.close()


ENDED: list[tuple[list[str], Callable[[], None]]] = [
    (["DELETE FROM round"], lambda: show(1)),
    (["DELETE FROM round"], lambda: diff(1, 2)),
    (["DELETE FROM round"], lambda: promote("new", 1)),
    (["DELETE FROM round"], lambda: export_folder(None)),
    (["UPDATE round SET state = 'open'"], lambda: promote("new", 1)),
    (["UPDATE round SET state = 'open'"], lambda: export_folder(1)),
    (["UPDATE alias_event SET rollback = 1"], lambda: rollback("production")),
    (["UPDATE alias_event SET at = 1e300"], aliases),
    (["UPDATE run SET config = 'x'"], lambda: diff(1, 2)),
    (["UPDATE run SET tensors = '{}'"], lambda: diff(1, 2)),
    (["UPDATE round_client SET report = 'x', verdict = 'open', reason = ''"], lambda: show(1)),
    (["UPDATE round_client SET report = '{\"a\": \"x\"}', reason = ''"], lambda: show(1)),
    ([_TEXT], lambda: export_folder(1)),
    ([_TEXT], lambda: promote("new", 1)),
    ([_TEXT], lambda: rollback("production")),
    ([_TEXT], lambda: hold(1, why="a test")),
    ([_TEXT], lambda: give_up(1, why="a test")),
]


@pytest.mark.parametrize(("statements", "command"), ENDED)
def test_a_damaged_registry_ends_commands_in_words(
    world: World, statements: list[str], command: Callable[[], None]
) -> None:
    for number in (1, 2):
        promote("production", number)
    for card in world.coordinator.sites():
        at = world.store.checkpoint()
        world.store.keep_witness(card.verify_key.id.hex(), at, "a line", Checkpoint("x", 0, bytes(32)), "", ())
    world.store.close()
    edit(world.store, *statements)
    with pytest.raises(CloisterError) as caught:
        command()
    assert "fsck" in caught.value.mend
