"""A registry that is not what was left here: emptied, put back beneath a process, without its key or a leaf."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cloister_server import rounds, upkeep
from cloister_server.export_commands import export as export_folder
from cloister_server.fsck import check
from cloister_server.keeping_commands import give_up, hold
from cloister_server.release_commands import aliases, diff, promote, rollback
from cloister_server.round_commands import show
from cloister_server.rounds import one_round, run_rounds
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


def snapshot(source: Path, target: Path) -> None:
    """A database is copied over another, whoever has it open."""
    with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target)) as other:
        one.backup(other)


@pytest.mark.parametrize("when", ["planned", "committed"])
def test_a_database_that_is_put_back_between_two_rounds_is_not_gone_on_with(
    tmp_path: Path, tiny_bert: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PostgreSQL does that fails over to a replica without the last commit: the process notices before it plans on."""
    world = make_world(tmp_path, tiny_bert, sites=2, rounds=4)
    world.store.log_members(world.coordinator.sites)
    for number in (1, 2):
        one_round(world.context(), world.link, number)
    file, kept = world.store.home / "registry.db", world.store.home / "copy.db"
    step = "plan_round" if when == "planned" else "commit_round"
    real = getattr(Store, step)

    def copied_before(store: Store, *rest: Any) -> Any:
        snapshot(file, kept)
        return real(store, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Store, step, copied_before)
        one_round(world.context(), world.link, 3)
    snapshot(kept, file)
    before, charged = world.store.leaves(), [world.charged(node) for node in world.desks]
    with pytest.raises(StateError, match="put back beneath this process"):
        one_round(world.context(), world.link, 4)
    assert world.store.leaves() == before
    assert [world.charged(node) for node in world.desks] == charged
    world.store.close()
    world.store = Store(world.store.home)
    for number in (3, 4):
        one_round(world.context(), world.link, number)
        assert set(world.verdicts(number).values()) == {"accepted"}
    assert check(world.store) == []


def test_a_run_whose_last_commit_is_gone_is_not_finished(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    file, kept = world.store.home / "registry.db", world.store.home / "copy.db"
    snapshot(file, kept)
    with monkeypatch.context() as patched:
        # Put back when the last round is over, during its closing.
        patched.setattr(rounds, "close", lambda *_: snapshot(kept, file))
        with pytest.raises(StateError, match="put back beneath this process"):
            run_rounds(world.context(), world.link)
    world.store.close()
    world.store = Store(world.store.home)
    assert world.store.find_run(world.run.id).finished is None
    run_rounds(world.context(), world.link)
    assert world.store.find_run(world.run.id).finished is not None
    assert check(world.store) == []


@pytest.mark.parametrize(
    "change",
    [
        "head = 'x' || head",
        "head_size = head_size + 1",
        "head = ''",
        "head = replace(head, '=' || char(10), 'A' || char(10))",
    ],
)
def test_a_damaged_row_accuses_no_site(world: World, change: str) -> None:
    """The registry's own damage: nothing is asked of anybody, and fsck names the site's row."""
    name = world.id_of(100)
    edit(world.store, f"UPDATE witnessed SET {change} WHERE client = '{name}'")
    before = world.store.leaves()
    with pytest.raises(StateError, match="not what it signed"):
        one_round(world.context(), world.link, 3)
    assert world.store.leaves() == before
    assert len(world.store.rounds(world.run.id)) == 3
    assert [one.where for one in check(world.store)] == [f"site of key {name}"]


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
