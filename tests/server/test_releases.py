"""Rounds as releases: aliases move by compare-and-set, each move stays and is a leaf; differences are those of the products themselves."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from cloister import bundle_command
from cloister_client.budget import Ledger
from cloister_client.witness import Witness
from cloister_server.cli import operator_sign
from cloister_server.compare import fields, modules
from cloister_server.export import export_round
from cloister_server.export_commands import export as export_command
from cloister_server.fsck import check
from cloister_server.keeping_commands import give_up, hold, holds, release
from cloister_server.release_commands import aliases, diff, moves, promote, protect, rollback
from cloister_server.round_commands import list_rounds, show
from cloister_server.rounds import run_rounds
from cloister_server.store import Store
from cloister_server.tables import Alias, AliasEvent
from cloister_server.upkeep import fsck, gc, unreachable
from cloister_shared import console
from cloister_shared.aliases import ALIAS_PURPOSE, alias_move
from cloister_shared.audit.became import became
from cloister_shared.audit.bundle import Bundle, SignedLeaf, SiteLog, read_bundle
from cloister_shared.audit.command import audit
from cloister_shared.audit.trust import trust_of
from cloister_shared.encoding import canonical
from cloister_shared.errors import CloisterError, InputError, RefusedError, RollbackError, StateError, VerificationError
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import Checkpoint
from cloister_shared.signing import SigningKey
from cloister_shared.vectors import Schema
from hypothesis import given
from hypothesis import strategies as st

from support.registry import blob_path
from support.server_calm import calm
from support.server_world import World, make_world

SCHEMA = Schema(
    (("x.lora_A.weight", (2, 6)), ("x.lora_B.weight", (5, 2)), ("head.weight", (3, 20)), ("head.bias", (3,)))
)


@pytest.fixture
def world(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Three committed rounds, and the command line set up for them."""
    made = make_world(tmp_path, tiny_bert, sites=2, rounds=3)
    made.store.log_members(made.coordinator.sites)
    run_rounds(made.context(), made.link)
    monkeypatch.setattr(console.OUTPUT, "home", made.coordinator.home.parent)
    monkeypatch.setattr(console.OUTPUT, "json", True)
    return made


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_an_alias_moves_forward_and_back_and_all_of_it_stays(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2, 3):
        promote("production", number, why=f"try {number}")
    rollback("production")
    back = said(capsys)
    assert (back["round"], back["refunded"]) == (2, 0.0)
    rollback("production")
    assert said(capsys)["round"] == 1
    with pytest.raises(StateError, match="nothing to go back to"):
        rollback("production")
    promote("production", 3, expect=1)
    with pytest.raises(StateError, match="points elsewhere"):
        promote("production", 2, expect=1)
    aliases()
    record = said(capsys)
    assert [(e["number"], e["rollback"]) for e in record["events"]] == [
        (1, False), (2, False), (3, False), (2, True), (1, True), (3, False),
    ]  # fmt: skip
    leaves = [json.loads(leaf.record) for leaf in world.store.leaves() if leaf.kind == "alias_set"]
    assert [(r["alias"], r["round"], r["version"]) for r in leaves] == [
        ("production", n, v) for v, n in enumerate((1, 2, 3, 2, 1, 3), 1)
    ]
    assert [e["leaf"] for e in record["events"]] == [r["index"] for r in leaves]


def test_what_is_not_committed_or_not_whole_is_not_released(world: World) -> None:
    with pytest.raises(StateError, match="not a committed round"):
        promote("production", 9)
    with pytest.raises(CloisterError):
        promote("../x", 1)
    row = world.store.rounds(world.run.id)[1]
    blob = next(p for p in (world.store.home / "blobs").rglob("*") if p.is_file() and p.name in (row.adapter or ""))
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(VerificationError):
        promote("production", 1)
    assert world.store.alias("production") is None


def test_one_of_many_at_once_wins(world: World) -> None:
    row = world.store.rounds(world.run.id)[1]
    outcomes = list[str]()

    def race() -> None:
        try:
            Store(world.store.home).set_alias("a", world.run.id, 1, row.adapter or "", 0, "")
            outcomes.append("won")
        except StateError as error:
            outcomes.append(error.what)

    threads = [threading.Thread(target=race) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["the alias was moved meanwhile"] * 5 + ["won"]
    with pytest.raises(StateError):
        world.store.set_alias("a", world.run.id, 2, row.adapter or "", 1, "")


@pytest.mark.parametrize("statement", ["UPDATE alias_event SET number = 1", "DELETE FROM alias_event"])
def test_moves_are_for_good(world: World, statement: str) -> None:
    promote("production", 2)
    with sqlite3.connect(world.store.home / "registry.db") as db, pytest.raises(sqlite3.Error, match="stays"):
        db.execute(statement)


def test_rounds_are_compared(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    diff(1, 3)
    record = said(capsys)
    assert {c["name"] for c in record["changed"]} >= {"epsilon of site-1", "epsilon of site-2"}
    assert any(m["module"].endswith("B A") for m in record["modules"])
    assert any(m["module"] == "head.weight" for m in record["modules"])
    diff(2, 2)
    same = said(capsys)
    assert same["changed"] == []
    assert all(m["between"] < 1e-6 for m in same["modules"])
    console.OUTPUT.json = False
    diff(1, 2)
    assert "cosine" in capsys.readouterr().out


@given(st.integers(0, 2**32 - 1))
@calm(50)
def test_products_are_compared_as_if_they_were_made(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = (rng.normal(size=SCHEMA.size).astype(np.float32) for _ in range(2))
    found = {m.module: m for m in modules(one, two, SCHEMA)}
    parts = [SCHEMA.split(v) for v in (one, two)]
    products = [(p["x.lora_B.weight"] @ p["x.lora_A.weight"]).astype(np.float64) for p in parts]
    got = found["x B A"]
    assert got.before == pytest.approx(np.linalg.norm(products[0]), rel=1e-4)
    assert got.between == pytest.approx(np.linalg.norm(products[0] - products[1]), rel=1e-3)
    cosine = (products[0] * products[1]).sum() / np.linalg.norm(products[0]) / np.linalg.norm(products[1])
    assert got.cosine == pytest.approx(cosine, abs=1e-4)
    assert set(found) == {"x B A", "head.weight", "head.bias"}
    assert np.isnan(next(modules(np.zeros_like(one), two, SCHEMA)).cosine)
    assert fields({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == [("b", 2, 3), ("c", None, 4)]
    assert replace(got, module="y").module == "y"


_IDLE = "CREATE TRIGGER kept_round_update BEFORE UPDATE ON round WHEN 0 BEGIN SELECT 1; END"


def whole(world: World) -> list[str]:
    return [f"{one.where}: {one.what}" for one in check(world.store)]


def test_a_whole_registry_is_whole_and_what_nothing_names_goes(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    promote("production", 2)
    assert whole(world) == []
    lone = world.store.blobs.put(b"nobody names me")
    gc(dry_run=True)
    assert (said(capsys)["blobs"], len(unreachable(world.store))) == ([], 1)  # it may be about to be named
    os.utime(blob_path(world.store, lone), (1.0, 1.0))
    gc(dry_run=True)
    assert said(capsys)["blobs"] == [lone]
    assert blob_path(world.store, lone).exists()
    gc()
    assert not blob_path(world.store, lone).exists()
    gc(grace_days=0.0)
    assert said(capsys)["blobs"] == []
    fsck()
    assert said(capsys) == {"wrong": []}
    assert whole(world) == []


@pytest.mark.parametrize(
    ("statements", "what"),
    [
        (["DROP TRIGGER kept_round_update"], "rules are missing"),
        (["DROP TRIGGER kept_round_update", _IDLE], "rules are missing"),
        (["DROP TRIGGER kept_log_leaf_delete", 'DELETE FROM log_leaf WHERE "index" = 1'], "the log has a gap"),
        (
            ["DROP TRIGGER kept_log_leaf_update", "UPDATE log_leaf SET record = x'7b7d' WHERE \"index\" = 2"],
            "signature",
        ),
        (
            ["DROP TRIGGER kept_round_update", "UPDATE round SET adapter = '" + "00" * 32 + "' WHERE number = 1"],
            "its leaf",
        ),
        (["DROP TRIGGER kept_alias_update", "UPDATE alias SET number = 1"], "points elsewhere"),
    ],
)
def test_what_was_changed_by_hand_is_named(
    world: World, statements: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    promote("production", 2)
    with sqlite3.connect(world.store.home / "registry.db") as db:
        for statement in statements:
            db.execute(statement)
    with pytest.raises(typer.Exit):
        fsck()
    assert any(what in one["what"] for one in said(capsys)["wrong"])


_CHANGES = [
    ("run", "rule = 'exact'", "rule"),
    ("run", "task = '{}'", "task"),
    ("run", "rounds = 4", "rounds"),
    ("round", "fence = 7 WHERE number = 2", "fence"),
    ("round", "code = 'other' WHERE number = 2", "code"),
    ("round", "leaf = 1 WHERE number = 2", "index"),
    ("round", f"adapter = '{'00' * 32}' WHERE number = 0", "adapter"),
    ("round_client", "charged = 0 WHERE number = 1", "clients"),
    ("round_client", "epsilon = 0.01 WHERE number = 3", "clients"),
    ("privacy", "lifetime = 0.01 WHERE number = 1", "privacy"),
    ("privacy", "epsilon = 0 WHERE number = 3", "privacy"),
    ("privacy", "unit = 'nothing of anybody' WHERE number = 2", "privacy"),
    ("privacy", "delta = 0.1", "privacy"),
    ("round_client", "core = '{}' WHERE number = 2", "work is another"),
    ("round", "committed = 1.0 WHERE number = 2", "time"),
    ("round", "committed = NULL WHERE number = 1", "time"),
    ("round", "committed = 1.0 WHERE number = 0", "committed"),
    ("round", "residual = 0.5 WHERE number = 0", "residual"),
    ("round", "parent = 'ff' WHERE number = 0", "parent"),
    ("round", "leaf = 5 WHERE number = 0", "leaf"),
    ("round", "state = 'planned' WHERE number = 0", "state"),
    ("round", "state = 'odd' WHERE number = 0", "state"),
    ("model", "kind = 'causal-lm'", "kind"),
    ("log_leaf", "key = 'another' WHERE \"index\" = 3", "another leaf"),
    ("blob", "digest = 'zz' WHERE kind = 'adapter' AND rowid = 1", "cannot be read"),
    ("alias_event", "why = 'another' WHERE version = 1", "why"),
    ("alias_event", "number = 3 WHERE version = 2", "round"),
    ("alias_event", "guard = '' WHERE version = 3", "guard"),
    ("alias_event", "rollback = 1 WHERE version = 1", "rollback"),
    ("alias", "guard = ''", "points elsewhere"),
    ("alias_event", "at = 1.0 WHERE version = 2", "time"),
    ("hold", "at = 1.0", "time"),
    ("tombstone", "at = 1.0", "time"),
    ("signature", "at = 1.0", "time"),
    ("signature", "key = 'ff'", "key"),
    ("hold", "why = 'another'", "why"),
    ("hold", "released = 1.0", "release of the hold"),
    ("tombstone", "why = 'another'", "why"),
    ("signature", "number = 1", "round"),
    ("signature", "signature = '00'", "signature"),
    ("witnessed", "size = 900", "the newest are missing"),
    ("witnessed", f"root = '{'00' * 32}'", "cosigned other leaves"),
]


@pytest.mark.parametrize(("table", "change", "what"), _CHANGES)
def test_a_row_that_its_leaf_does_not_tell_is_named(busy: World, table: str, change: str, what: str) -> None:
    assert whole(busy) == []
    by_hand(busy, table, f"UPDATE {table} SET {change}")
    assert any(what in one for one in whole(busy)), whole(busy)


@pytest.mark.parametrize("table", ["alias_event", "hold", "tombstone", "signature", "round_client", "privacy"])
def test_a_row_that_was_taken_out_is_named(busy: World, table: str) -> None:
    by_hand(busy, table, f"DELETE FROM {table}")
    assert whole(busy) != []


def test_a_score_that_no_leaf_tells_is_named(busy: World) -> None:
    values = (busy.run.id, 1, "accuracy", 0.99)
    by_hand(busy, "metric", f"INSERT INTO metric (run, number, name, value) VALUES {values}")
    assert any("metrics" in one for one in whole(busy))


def test_a_log_without_its_newest_leaf_is_named(busy: World) -> None:
    newest = len(busy.store.leaves()) - 1
    by_hand(busy, "log_leaf", f'DELETE FROM log_leaf WHERE "index" = {newest}')
    store = Store(busy.store.home)
    assert any("its leaf is missing" in one.what for one in check(store))
    store.close()


def test_a_move_that_its_operator_did_not_sign_is_named(busy: World) -> None:
    """By a coordinator that has its own log's key: the row and the leaf say the same."""
    row, last = busy.store.rounds(busy.run.id)[3], busy.store.alias_events("production")[-1]
    body = {"log": busy.store.origin, "alias": "production", "run": busy.run.id, "round": 3, "adapter": row.adapter}
    body |= {"version": last.version + 1, "rollback": False, "guard": "", "why": "", "operator": ""}
    leaf = busy.store.log("alias_set", body)
    with busy.store.database.writing() as session:
        now = session.get_one(Alias, "production")
        now.number, now.adapter, now.version, now.guard = 3, row.adapter or "", last.version + 1, ""
        session.add(AliasEvent(**now.model_dump(), rollback=False, why="", at=time.time(), leaf=leaf.index))
    assert [one for one in whole(busy) if "signature of the operator" in one] != []
    assert len(whole(busy)) == 1


def by_hand(world: World, table: str, statement: str) -> None:
    """A change by whoever has the database, its rules put back afterwards."""
    with sqlite3.connect(world.store.home / "registry.db") as db:
        rules = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ?", (table,))
        kept = rules.fetchall()
        for name, _ in kept:
            db.execute(f"DROP TRIGGER {name}")
        assert db.execute(statement).rowcount > 0
        for _, rule in kept:
            db.execute(rule)


def test_rows_that_are_not_as_the_log_says_are_signed_by_nobody(world: World, tmp_path: Path, capsys: Any) -> None:
    for number, table, statement in (
        (3, "round_client", "UPDATE round_client SET noise_multiplier = 99 WHERE number = 3"),
        (2, "privacy", "UPDATE privacy SET epsilon = 1.0 WHERE number = 2"),
        (1, "metric", "INSERT INTO metric SELECT run, number, 'accuracy', 0.99 FROM round WHERE number = 1"),
    ):
        export_round(world.store, world.run, number, tmp_path / f"before-{number}")
        by_hand(world, table, statement)
        with pytest.raises(VerificationError, match="not as its log says"):
            export_round(world.store, world.run, number, tmp_path / f"after-{number}")
        with pytest.raises(VerificationError, match="not as its log says"):
            show(number)
    export_round(world.store, world.run, 0, tmp_path / "zero")
    by_hand(world, "run", "UPDATE run SET code = 'another'")
    with pytest.raises(VerificationError, match="not as its log says"):
        export_round(world.store, world.store.runs()[0], 0, tmp_path / "other")


def test_a_log_that_is_not_what_sites_cosigned_is_signed_no_further(world: World, tmp_path: Path) -> None:
    promote("production", 1)
    hold(1, "asked by the court")
    by_hand(world, "log_leaf", "UPDATE log_leaf SET record = x'7b7d' WHERE \"index\" = 2")
    before = len(world.store.leaves())
    deeds: list[Callable[[], object]] = [
        lambda: promote("production", 2),
        lambda: rollback("production"),
        lambda: protect("production", to=SigningKey.generate().verify_key.raw.hex()),
        lambda: hold(2, "why"),
        lambda: release(1, "why"),
        lambda: give_up(2, "why"),
        lambda: export_command(1, out=tmp_path / "x"),
        lambda: Store(world.store.home).signed_checkpoint(world.store.checkpoint()),
    ]
    for deed in deeds:
        with pytest.raises(RollbackError, match="not the one that a site cosigned"):
            deed()
    assert len(world.store.leaves()) == before


def test_an_export_without_a_log_that_was_put_back_says_so_by_its_exit_code(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put_back(_: Path) -> Any:
        raise RollbackError("the ledger was put back", where="site-1")

    monkeypatch.setattr(bundle_command, "_witness", put_back)
    monkeypatch.setattr(console, "site_homes", lambda: [tmp_path / "site-1"])
    with pytest.raises(typer.Exit) as left:
        bundle_command.export(tmp_path / "bundle.zip")
    assert left.value.exit_code == 3
    assert read_bundle(tmp_path / "bundle.zip").sites == {}


def test_a_site_that_exports_knows_of_the_federations_log_what_is_in_its_bundle(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = world.desks[100].witness
    monkeypatch.setattr(bundle_command, "_witness", lambda _: witness)
    monkeypatch.setattr(console, "site_homes", lambda: [tmp_path / "site-1"])
    world.store.log("recovery", {"what": "told after the last round"})
    bundle_command.export(tmp_path / "one.zip")
    bundle = read_bundle(tmp_path / "one.zip")
    (log,) = bundle.sites.values()
    assert json.loads(log.events[-1])["size"] == len(bundle.leaves) == len(world.store.leaves())
    # A round that goes on beside it: what its log saw is in what is read once more.
    real, asked = bundle_command._federation, list[int]()

    def slow(made: float, *, adapters: bool) -> Bundle:
        found = real(made, adapters=adapters)
        asked.append(len(found.leaves))
        if len(asked) == 1:
            world.store.log("recovery", {"what": "seen by the agent meanwhile"})
            at = world.store.checkpoint()
            witness.ledger.witness(at, world.store.signed_checkpoint(at), witness.ledger.heads_of(witness.origin))
        return found

    monkeypatch.setattr(bundle_command, "_federation", slow)
    bundle_command.export(tmp_path / "two.zip")
    assert asked == [len(bundle.leaves), len(bundle.leaves) + 1]
    assert len(read_bundle(tmp_path / "two.zip").leaves) == asked[1]
    # Another history than the site saw: both are in the bundle, and the site's log says so.
    monkeypatch.setattr(bundle_command, "_federation", lambda *_, **__: bundle)
    with pytest.raises(typer.Exit) as left:
        bundle_command.export(tmp_path / "three.zip")
    assert left.value.exit_code == 3
    three = read_bundle(tmp_path / "three.zip")
    assert len(three.leaves) == len(bundle.leaves)
    assert json.loads(three.sites[witness.signing.verify_key.id.hex()].events[-1])["event"] == "incident"


@pytest.fixture
def exporting(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Witness:
    """The witness of the one site that exports."""
    witness = world.desks[100].witness
    monkeypatch.setattr(bundle_command, "_witness", lambda _: witness)
    monkeypatch.setattr(console, "site_homes", lambda: [tmp_path / "site-1"])
    return witness


def test_what_an_agent_keeps_while_an_export_looks_is_looked_at_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exporting: Witness
) -> None:
    """The export has a fork, and a plan brings the true log between its check and its writing."""
    ledger = exporting.ledger
    leaves = world.store.leaves()
    fork = SignedLeaf(*_forked(world, leaves[-1].record))
    signed = [SignedLeaf(one.record, one.key, one.signature) for one in leaves[:-1]]
    several = [*signed, fork, fork]
    head = Checkpoint(exporting.origin, len(several), Tree(leaf_hash(one.record) for one in several).root())
    monkeypatch.setattr(
        bundle_command,
        "_federation",
        lambda made, **_: Bundle(made, tuple(several), head.signed(world.coordinator.signing)),
    )
    append, done = type(ledger).fetched, list[int]()

    def slowly(self: Ledger, *what: Any) -> None:
        if not done:
            done.append(1)
            at = world.store.checkpoint()
            self.witness(at, world.store.signed_checkpoint(at), self.heads_of(exporting.origin))
        append(self, *what)

    monkeypatch.setattr(type(ledger), "fetched", slowly)
    with pytest.raises(typer.Exit) as left:
        bundle_command.export(tmp_path / "one.zip")
    assert left.value.exit_code == 3
    assert "fetched" not in [json.loads(e)["event"] for e in ledger.records()]


def _forked(world: World, record: bytes) -> tuple[bytes, str, str]:
    key = world.coordinator.signing
    other = canonical(json.loads(record) | {"at": 1.0})
    return other, key.verify_key.id.hex(), key.sign("log-leaf", other).hex()


def test_a_damaged_head_of_a_pull_keeps_no_export_back(world: World, tmp_path: Path, exporting: Witness) -> None:
    damaged = replace(exporting, pulled=lambda: "no note")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_command, "_witness", lambda _: damaged)
        with pytest.raises(typer.Exit) as left:
            bundle_command.export(tmp_path / "one.zip")
    assert left.value.exit_code == 1
    assert len(read_bundle(tmp_path / "one.zip").sites) == 1


@pytest.mark.parametrize("times", [1, 9])
def test_an_export_beside_rounds_has_what_its_site_saw_or_says_that_it_has_not(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exporting: Witness, times: int
) -> None:
    real, done = bundle_command._site_log, list[int]()

    def slow(site: Witness) -> SiteLog:
        if len(done) < times:
            done.append(1)
            world.store.log("recovery", {"what": "seen by the agent meanwhile"})
            at = world.store.checkpoint()
            site.ledger.witness(at, world.store.signed_checkpoint(at), site.ledger.heads_of(site.origin))
        return real(site)

    monkeypatch.setattr(bundle_command, "_site_log", slow)
    if times == 1:
        bundle_command.export(tmp_path / "one.zip")
    else:
        with pytest.raises(typer.Exit) as left:
            bundle_command.export(tmp_path / "one.zip")
        assert left.value.exit_code == 2
    bundle = read_bundle(tmp_path / "one.zip")
    (log,) = bundle.sites.values()
    saw = max(json.loads(e).get("size", 0) for e in log.events)
    assert (saw <= len(bundle.leaves)) == (times == 1)


def test_a_site_shows_its_own_log_though_its_coordinator_does_not_answer(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object) -> Bundle:
        raise StateError("nobody answers", where="the coordinator")

    monkeypatch.setattr(bundle_command, "_witness", lambda _: world.desks[100].witness)
    monkeypatch.setattr(bundle_command, "_fetched", down)
    monkeypatch.setattr(console, "coordinator_home", lambda: tmp_path / "none")
    monkeypatch.setattr(console, "site_homes", lambda: [tmp_path / "site-1"])
    with pytest.raises(typer.Exit) as left:
        bundle_command.export(tmp_path / "bundle.zip")
    assert left.value.exit_code == 2
    bundle = read_bundle(tmp_path / "bundle.zip")
    assert (bundle.leaves, len(bundle.sites)) == ((), 1)


def test_a_signature_that_nobody_asked_for_is_not_dropped_silently(world: World, tmp_path: Path) -> None:
    SigningKey.generate().save(tmp_path / "key")
    (tmp_path / "signature").write_text("00" * 64)
    with pytest.raises(StateError, match="nobody guards this alias"):
        promote("production", 1, key=tmp_path / "key")
    with pytest.raises(StateError, match="nobody guards this alias"):
        promote("production", 1, signature=tmp_path / "signature")
    assert world.store.alias("production") is None


def test_whoever_signs_with_a_key_that_will_not_guard_is_told(tmp_path: Path, world: World, capsys: Any) -> None:
    keys = [SigningKey.generate() for _ in range(2)]
    for number, key in enumerate(keys):
        key.save(tmp_path / f"{number}.key")
    promote("production", 1)
    protect("production", tmp_path / "0.key")
    promote("production", 2, ask=tmp_path / "move")
    for number, told in ((0, False), (1, True)):
        console.OUTPUT.json = False
        operator_sign(tmp_path / "move", tmp_path / f"{number}.key", tmp_path / f"{number}.signature")
        assert ("must be the one that guards" in capsys.readouterr().out) == told
    console.OUTPUT.json = True
    with pytest.raises(RefusedError, match="operator"):
        promote("production", 2, signature=tmp_path / "1.signature")


@pytest.fixture
def busy(world: World, tmp_path: Path) -> World:
    """A registry with something of every kind in it."""
    SigningKey.generate().save(tmp_path / "operator.key")
    promote("production", 1, why="first")
    promote("production", 2)
    protect("production", tmp_path / "operator.key")
    hold(3, "asked by the court")
    give_up(0, "no longer needed")
    export_round(world.store, world.run, 2, tmp_path / "exported")
    world.store.keep_witness("ab" * 16, world.store.checkpoint(), "a line", Checkpoint("x", 0, bytes(32)), "", ())
    return world


def test_a_missing_and_a_changed_blob_are_named(world: World) -> None:
    first, second = (blob_path(world.store, world.store.rounds(world.run.id)[n].adapter) for n in (1, 2))
    first.unlink()
    second.chmod(0o600)
    second.write_bytes(bytes(second.stat().st_size))
    assert {one.split(": ")[1] for one in whole(world)} == {"blob is missing", "blob was changed"}


def test_a_guarded_alias_moves_with_its_operators_key_alone(world: World, tmp_path: Path) -> None:
    keys = [tmp_path / name for name in ("one.key", "two.key")]
    for path in keys:
        SigningKey.generate().save(path)
    one, two = (SigningKey.load(path) for path in keys)
    promote("production", 1)
    protect("production", keys[0])
    deeds: list[Callable[[], None]] = [
        lambda: promote("production", 2),
        lambda: promote("production", 2, key=keys[1]),
        lambda: rollback("production"),
        lambda: protect("production", keys[1]),
        lambda: protect("production", keys[1], off=True),
    ]
    for deed in deeds:
        with pytest.raises(CloisterError):
            deed()
    now = world.store.alias("production")
    assert now is not None
    assert (now.number, now.version, now.guard) == (1, 2, one.verify_key.raw.hex())
    promote("production", 2, key=keys[0])
    protect("production", keys[0], to=two.verify_key.raw.hex())
    with pytest.raises(RefusedError, match="operator"):
        promote("production", 3, key=keys[0])
    rollback("production", key=keys[1])
    protect("production", keys[1], off=True)
    promote("production", 3)
    events = world.store.alias_events("production")
    assert [(e.number, e.rollback, bool(e.guard)) for e in events] == [
        (1, False, False), (1, False, True), (2, False, True), (2, False, True), (1, True, True), (1, False, False),
        (3, False, False),
    ]  # fmt: skip
    assert [what for _, what in moves(events)] == [
        "promoted", "protected", "promoted", "handed on", "rolled back", "no longer protected", "promoted",
    ]  # fmt: skip
    assert whole(world) == []


def test_an_operators_key_stays_on_a_machine_of_its_own(world: World, tmp_path: Path) -> None:
    """Asked for here, signed elsewhere, moved here; a signature is of one move, and of that once."""
    key, here = tmp_path / "elsewhere" / "operator.key", tmp_path / "here"
    key.parent.mkdir()
    here.mkdir()
    SigningKey.generate().save(key)
    public = SigningKey.load(key).verify_key.raw.hex()

    def sign(name: str) -> Path:
        operator_sign(here / f"{name}.move", key, here / f"{name}.sig")
        return here / f"{name}.sig"

    promote("production", 1)
    with pytest.raises(StateError, match="nobody guards"):
        promote("production", 2, ask=here / "free.move")
    protect("production", to=public, ask=here / "guard.move")
    now = world.store.alias("production")
    assert now is not None
    assert (now.guard, now.version) == ("", 1)
    protect("production", to=public, signature=sign("guard"))
    promote("production", 3, ask=here / "third.move")
    promote("production", 2, ask=here / "second.move")
    third, second = sign("third"), sign("second")
    with pytest.raises(RefusedError, match="this very move"):
        promote("production", 3, signature=second)
    promote("production", 2, signature=second)
    for wrong in (second, third, here / "nothing.sig", here / "third.move"):
        with pytest.raises(CloisterError):
            promote("production", 3, signature=wrong)
    rollback("production", ask=here / "back.move")
    rollback("production", signature=sign("back"))
    protect("production", off=True, ask=here / "off.move")
    protect("production", off=True, signature=sign("off"))
    promote("production", 3)
    with pytest.raises(InputError, match="which of them"):
        promote("production", 2, key=key, signature=second)
    with pytest.raises(InputError, match="already"):
        operator_sign(here / "back.move", key, here / "back.sig")
    moves = [(e.number, e.rollback, bool(e.guard)) for e in world.store.alias_events("production")]
    assert moves == [
        (1, False, False), (1, False, True), (2, False, True), (1, True, True), (1, False, False), (3, False, False),
    ]  # fmt: skip
    assert whole(world) == []
    assert audited(world) == set()


ODD = canonical(
    dict.fromkeys(("log", "alias", "run", "round", "adapter", "version", "rollback"), "x") | {"guard": 5, "round": -1}
)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"alias":"x"}', b"\xff\xfe", ODD])
def test_what_is_no_move_is_not_signed(tmp_path: Path, data: bytes) -> None:
    SigningKey.generate().save(tmp_path / "operator.key")
    (tmp_path / "x.move").write_bytes(data)
    with pytest.raises(InputError, match="not a move"):
        operator_sign(tmp_path / "x.move", tmp_path / "operator.key", tmp_path / "x.sig")
    assert not (tmp_path / "x.sig").exists()


def test_a_move_that_nobody_signed_is_a_violation_for_whoever_audits(world: World, tmp_path: Path) -> None:
    key = tmp_path / "operator.key"
    SigningKey.generate().save(key)
    promote("production", 1)
    protect("production", key)
    promote("production", 2, key=key)
    assert audited(world) == set()
    # A coordinator that writes its own log as it likes, but has not the operator's key.
    row = world.store.rounds(world.run.id)[3]
    body = {"log": world.store.origin, "alias": "production", "run": world.run.id, "round": 3, "adapter": row.adapter}
    body |= {"version": 4, "rollback": False, "guard": "", "why": ""}
    forged = world.coordinator.signing.sign(ALIAS_PURPOSE, alias_move(body)).hex()
    world.store.log("alias_set", body | {"operator": forged})
    assert audited(world) == {"operator"}


@pytest.mark.parametrize(
    ("kind", "changes", "code"),
    [
        ("alias_set", {"round": 2}, "release"),
        ("alias_set", {"adapter": "00" * 32}, "release"),
        ("alias_set", {"version": 7}, "alias"),
        ("alias_set", {"version": "1"}, "leaf"),
        ("export", {"adapter": "00" * 32}, "release"),
        ("hold", {"round": 9}, "release"),
        ("tombstone", {"run": "00" * 16}, "release"),
    ],
)
def test_what_names_a_round_that_the_log_has_not_is_a_violation(
    world: World, kind: str, changes: dict[str, Any], code: str
) -> None:
    row = world.store.rounds(world.run.id)[1]
    body = {"alias": "a", "run": world.run.id, "round": 1, "adapter": row.adapter, "version": 1, "guard": ""}
    world.store.log(kind, body)
    assert audited(world) == set()
    world.store.log(kind, body | {"version": 2} | changes)
    assert audited(world) == {code}


def test_the_report_tells_what_became_of_rounds_in_order(world: World, tmp_path: Path) -> None:
    keys = [tmp_path / name for name in ("one.key", "two.key")]
    for path in keys:
        SigningKey.generate().save(path)
    one, two = (SigningKey.load(path).verify_key for path in keys)
    promote("production", 1, why="first")
    protect("production", keys[0])
    seen = world.store.checkpoint()
    protect("production", keys[0], to=two.raw.hex(), why="left the company")
    promote("production", 2, key=keys[1])
    hold(3, "asked by the court")
    rollback("production", key=keys[1])
    release(1, "the court is done")
    protect("production", keys[1], off=True)
    give_up(0, "no longer needed")
    export_round(world.store, world.run, 2, tmp_path / "exported")
    leaves = tuple(SignedLeaf(x.record, x.key, x.signature) for x in world.store.leaves())
    trust = trust_of("fed", world.coordinator.signing.verify_key, {}, [seen])
    done = audit(Bundle(1.0, leaves, world.store.signed_checkpoint(world.store.checkpoint())), trust)
    run = world.run.id[:8]
    told = [what + ("" if seen == "yes" else "*") for _, _, what, seen in became(done.history).rows]
    by = f"signed by its operator, key {two.id.hex()}"
    said, keeper = "; the coordinator's reason: ", "by whoever has the coordinator's key"
    held = next(row.leaf for row in world.store.holds())
    assert [line.split(", statement")[0] for line in told] == [
        f"production was set to round 1 of run {run}, by whoever has the coordinator's key{said}first",
        f"production moves only with key {one.id.hex()} from here on, signed by its operator, key {one.id.hex()}",
        f"production moves only with key {two.id.hex()} from here on, signed by its operator, key {one.id.hex()}"
        f"{said}left the company*",
        f"production was set to round 2 of run {run}, {by}*",
        f"round 3 of run {run} is held, whatever happens, {keeper}{said}asked by the court*",
        f"production went back to round 1 of run {run}, {by}*",
        f"the hold of leaf {held} on round 3 of run {run} ended, {keeper}{said}the court is done*",
        f"production moves without a key from here on, {by}*",
        f"round 0 of run {run}: its adapter was given up, {keeper}{said}no longer needed*",
        f"round 2 of run {run} was exported",
    ]


def audited(world: World) -> set[str]:
    """Violations that an audit of the federation's log alone finds."""
    leaves = tuple(SignedLeaf(one.record, one.key, one.signature) for one in world.store.leaves())
    trust = trust_of("fed", world.coordinator.signing.verify_key, {}, [])
    bundle = Bundle(1.0, leaves, world.store.signed_checkpoint(world.store.checkpoint()))
    return {f.code for f in audit(bundle, trust).findings.found if f.kind == "violation"}


def test_what_is_held_stays_and_what_is_given_up_goes(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    names = [row.adapter or "" for row in world.store.rounds(world.run.id)]
    for name in names:
        os.utime(blob_path(world.store, name), (1.0, 1.0))
    promote("production", 3)
    hold(1, "asked by the court")
    give_up(0, "no longer needed")
    for number, why in ((1, "hold 1"), (3, "alias production")):
        with pytest.raises(RefusedError, match="needed") as caught:
            give_up(number, "no longer needed")
        assert why in caught.value.got
    with pytest.raises(StateError, match="given up before"):
        give_up(0, "again")
    list_rounds()
    assert [r["round"] for r in said(capsys)["rounds"] if r["given_up"]] == [0]
    gc()
    assert said(capsys)["blobs"] == [names[0]]
    assert [blob_path(world.store, n).exists() for n in names] == [False, True, True, True]
    assert whole(world) == []
    with pytest.raises(CloisterError):
        promote("production", 0)
    with pytest.raises(StateError, match="given up"):
        world.store.set_alias("production", world.run.id, 0, names[0], 1, "")
    with pytest.raises(InputError, match="given up"):
        export_round(world.store, world.run, 0, world.store.home / "out")
    show(0)  # its record stays
    release(1, "the court is done")
    with pytest.raises(StateError, match="no such hold"):
        release(1, "again")
    give_up(1, "no longer needed")
    gc()
    assert not blob_path(world.store, names[1]).exists()
    assert whole(world) == []
    assert audited(world) == set()
    holds()
    told = said(capsys)
    assert [h["released"] is not None for h in told["holds"]] == [True]
    assert {t["number"] for t in told["given_up"]} == {0, 1}


def test_a_rollback_to_what_was_given_up_says_so_and_what_to_do(world: World) -> None:
    promote("production", 1)
    promote("production", 2)
    give_up(1, "no longer needed")
    with pytest.raises(
        StateError, match="its adapter was given up; got no longer needed; mend: choose a round"
    ) as caught:
        rollback("production")
    assert "round 1" in caught.value.where
    assert [row.number for row in world.store.aliases()] == [2]


def test_an_unfinished_runs_adapters_are_not_given_up(tmp_path: Path, tiny_bert: Path) -> None:
    made = make_world(tmp_path, tiny_bert, sites=2, rounds=3)
    with pytest.raises(RefusedError, match="needed") as caught:
        made.store.give_up(made.run.id, 0, "too early")
    assert "unfinished run" in caught.value.got


def test_a_blob_that_is_about_to_be_named_is_not_taken(world: World) -> None:
    """gc waits for whoever names a blob, and whoever names one after it finds it gone and says so."""
    lone = world.store.blobs.put(b"about to be named")
    os.utime(blob_path(world.store, lone), (1.0, 1.0))
    world.store.blobs.put(b"about to be named")  # a coordinator that made the same again: young
    gc()
    assert blob_path(world.store, lone).exists()


def test_a_registry_is_one_federations(world: World, tmp_path: Path) -> None:
    """Another coordinator on the same database, by mistake: it writes nothing into this one's log."""
    SigningKey.generate().save(tmp_path / "sign.key")
    other = shutil.copytree(world.store.home, tmp_path / "other", ignore=shutil.ignore_patterns("sign.key"))
    shutil.copy(tmp_path / "sign.key", other / "sign.key")
    store, size = Store(other), len(world.store.leaves())
    row = world.store.rounds(world.run.id)[1]
    with pytest.raises(StateError, match="another federation"):
        store.set_alias("a", world.run.id, 1, row.adapter or "", 0, "")
    with pytest.raises(StateError, match="another federation"):
        store.log("incident", {"what": "x"})
    assert len(store.leaves()) == size
    assert store.aliases() == []
    store.close()


@pytest.mark.parametrize("why", ["", "  ", "two\nlines", "x" * 2000])
def test_what_is_kept_or_given_up_says_why(world: World, why: str) -> None:
    with pytest.raises(InputError, match="why"):
        hold(1, why)
    with pytest.raises(InputError, match="why"):
        give_up(1, why)
    assert (world.store.holds(), world.store.tombstones()) == ([], {})


def test_a_guard_that_changes_nothing_is_no_move(world: World, tmp_path: Path) -> None:
    key = tmp_path / "operator.key"
    SigningKey.generate().save(key)
    promote("production", 1)
    with pytest.raises(StateError, match="changes nothing"):
        protect("production", key, off=True)
    protect("production", key, why="for the board")
    with pytest.raises(StateError, match="changes nothing"):
        protect("production", key)
    assert [e.why for e in world.store.alias_events("production")] == ["", "for the board"]


def test_a_difference_to_nothing_has_no_angle(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    diff(0, 1)
    said_as = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert None in {m["cosine"] for m in said_as["modules"]}
    console.OUTPUT.json = False
    diff(1, 1)
    assert "nothing but the adapters" in capsys.readouterr().out


def test_what_was_given_up_is_compared_without_its_adapter(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    os.utime(blob_path(world.store, world.store.rounds(world.run.id)[1].adapter), (1.0, 1.0))
    give_up(1, "no longer needed")
    gc()
    capsys.readouterr()
    diff(1, 2)
    record = said(capsys)
    assert {"name": "adapter of round 1", "first": "given up", "second": "not compared"} in record["changed"]
    assert record["modules"] == []


def test_a_key_that_guards_nothing_is_told_though_nothing_moves(world: World, tmp_path: Path) -> None:
    for name in ("one.key", "two.key"):
        SigningKey.generate().save(tmp_path / name)
    promote("production", 1)
    protect("production", tmp_path / "one.key")
    promote("production", 1, key=tmp_path / "one.key")
    with pytest.raises(RefusedError, match="operator"):
        promote("production", 1, key=tmp_path / "two.key")
    with pytest.raises(CloisterError):
        promote("production", 1, key=tmp_path)


def test_an_alias_that_looks_like_another_is_no_alias(world: World) -> None:
    promote("production", 1)
    row = world.store.rounds(world.run.id)[2]
    body = {"run": world.run.id, "round": 2, "adapter": row.adapter, "version": 1, "guard": "", "rollback": False}
    world.store.log("alias_set", body | {"alias": "production\u200b"})
    assert audited(world) == {"leaf"}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("hold", {"released": True, "hold": 2}),
        ("export", {"statement": "ab" * 32}),
        ("hold", {"released": False}),
    ],
)
def test_what_cannot_follow_is_a_violation(world: World, kind: str, changes: dict[str, Any]) -> None:
    """The end of a hold that was none; an export or a hold of an adapter that was given up."""
    row = world.store.rounds(world.run.id)[1]
    body = {"run": world.run.id, "round": 1, "adapter": row.adapter, "why": "x"}
    world.store.log("tombstone", body)
    assert audited(world) == set()
    world.store.log(kind, body | changes)
    assert audited(world) == {"release"}


def test_what_is_held_is_not_given_up_unseen(world: World) -> None:
    row = world.store.rounds(world.run.id)[1]
    hold(1, "asked by the court")
    world.store.log("tombstone", {"run": world.run.id, "round": 1, "adapter": row.adapter, "why": "x"})
    assert audited(world) == {"release"}
