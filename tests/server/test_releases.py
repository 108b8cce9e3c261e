"""Rounds as releases: aliases move by compare-and-set, each move stays and is a leaf; differences are those of the products themselves."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from cloister_server.compare import fields, modules
from cloister_server.release_commands import aliases, diff, promote, rollback
from cloister_server.rounds import run_rounds
from cloister_server.store import Store
from cloister_server.upkeep import check, fsck, gc, unreachable
from cloister_shared import console
from cloister_shared.errors import CloisterError, StateError, VerificationError
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
    with pytest.raises(StateError, match="only a committed round"):
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
    assert unreachable(world.store, time.time(), 1.0) == []  # it may be about to be named
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
        (["DROP TRIGGER kept_log_leaf_delete", 'DELETE FROM log_leaf WHERE "index" = 1'], "stands at place"),
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


def test_a_missing_and_a_changed_blob_are_named(world: World) -> None:
    first, second = (blob_path(world.store, world.store.rounds(world.run.id)[n].adapter) for n in (1, 2))
    first.unlink()
    second.chmod(0o600)
    second.write_bytes(bytes(second.stat().st_size))
    assert {one.split(": ")[1] for one in whole(world)} == {"blob is missing", "blob was changed"}
