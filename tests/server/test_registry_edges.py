"""A registry that several use at once or that somebody changed by hand: what is looked at stays so, what is signed is so."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cloister_client.fetching import _adapter, _whole_log
from cloister_server import accounting, importing
from cloister_server.accounting import REFUSED, stated_epsilon
from cloister_server.export import REGISTERED, export_round, peft_files
from cloister_server.fsck import check
from cloister_server.importing import import_round
from cloister_server.intake import FAILED, said_no
from cloister_server.keeping_commands import hold
from cloister_server.release_commands import promote
from cloister_server.round_commands import round_rows
from cloister_server.rounds import one_round, run_rounds
from cloister_server.store import Store
from cloister_server.tables import Run
from cloister_shared import console
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import InputError, RollbackError, StateError, VerificationError
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import Checkpoint
from cloister_shared.signing import SigningKey
from cloister_shared.specs import TaskSpec
from cloister_shared.statement import FILE, Proof, check_statement, make_statement
from cloister_shared.vectors import F32, Schema, from_safetensors, to_safetensors
from cloister_shared.witness import LEAF_PURPOSE, log_of_federation

from support.registry import a_model
from support.server_world import World, make_world
from support.tampering import edit

LEVEL = "[privacy.client_level]\nnoise_multiplier = 5.0\nclipping_norm = 0.5\ndelta = 1e-5\nepsilon_cap = 100"


class KilledError(BaseException):
    """As a signal that nobody handles."""


@pytest.fixture
def world(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Two committed rounds of three sites of whom one was not asked again."""
    made = make_world(tmp_path, tiny_bert, sites=3, rounds=3)
    made.store.log_members(made.coordinator.sites)
    one_round(made.context(), made.link, 1)
    one_round(made.context(members=made.members[:2]), made.link, 2)
    monkeypatch.setattr(console.OUTPUT, "home", made.coordinator.home.parent)
    yield made
    made.store.close()


def test_whoever_writes_has_the_lock_before_anything_is_looked_at(world: World) -> None:
    with world.store.database.writing(), sqlite3.connect(world.store.home / "registry.db", timeout=0) as other:
        other.isolation_level = None
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")


def test_heads_that_are_made_at_once_are_of_the_log_that_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store, heads, threads = Store(world.store.home), list[Checkpoint](), list[Thread]()
    real = store.leaves

    def slow(start: int = 0, end: int | None = None) -> Any:
        found = real(start, end)
        if not threads:
            threads.append(Thread(target=lambda: heads.append(store.checkpoint())))
            threads[0].start()
            # Ends at once where nothing holds it, else it waits for what is under way here.
            threads[0].join(0.5)
        return found

    monkeypatch.setattr(store, "leaves", slow)
    heads.append(store.checkpoint())
    threads[0].join()
    assert heads == [world.store.checkpoint()] * 2
    store.close()


def test_a_tree_that_was_given_stays_as_it_was(world: World) -> None:
    before = world.store.tree()
    size, root = len(before), before.root()
    world.store.log("incident", {"what": "a test"})
    assert len(world.store.tree()) == size + 1
    assert (len(before), before.root()) == (size, root)


def test_a_cosignature_that_comes_while_the_log_is_read_accuses_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real = world.store, world.store.tree

    def grown() -> Tree:
        made = real()
        store.log("incident", {"what": "a test"})
        tree = real()
        at, none = Checkpoint(store.origin, len(tree), tree.root()), Checkpoint("x", 0, bytes(32))
        store.keep_witness(world.id_of(100), at, "a line", none, "", ())
        return made

    monkeypatch.setattr(store, "tree", grown)
    store.check_history()
    assert list(store.unlike()) == []


def test_what_is_written_while_fsck_reads_is_nothing_wrong(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store, real, moved = world.store, world.store.leaves, list[int]()

    def then_moved(start: int = 0, end: int | None = None) -> Any:
        found = real(start, end)
        if not moved:
            moved.append(1)
            row = store.rounds(world.run.id)[1]
            store.set_alias("production", world.run.id, 1, row.adapter or "", 0, "")
        return found

    monkeypatch.setattr(store, "leaves", then_moved)
    assert check(store) == []
    assert moved
    # What is wrong whenever it is looked at is told all the same.
    edit(store, "UPDATE alias_event SET why = 'another'")
    assert [one.where for one in check(store)] == ["move 1 of alias production"]


def test_heads_of_sites_that_commits_have_are_kept(world: World) -> None:
    client = world.id_of(100)
    for statement in (
        f"DELETE FROM witnessed WHERE client = '{client}'",
        f"UPDATE witnessed SET head_size = 1 WHERE client = '{client}'",
        f"UPDATE witnessed SET line = 'another' WHERE client = '{client}'",
        f"UPDATE witnessed SET head = 'another' WHERE client = '{client}'",
    ):
        kept = world.store.home / "registry.db"
        shutil.copy(kept, kept.with_suffix(".kept"))
        assert check(world.store) == []
        edit(world.store, statement)
        assert f"site of key {client}" in {one.where for one in check(world.store)}, statement
        shutil.copy(kept.with_suffix(".kept"), kept)


def gone_cheaper(world: World) -> list[str]:
    client = world.id_of(300)
    return [
        f"UPDATE round_client SET epsilon = 0.001 WHERE client = '{client}'",
        f"UPDATE privacy SET epsilon = 0.001, lifetime = 0.001 WHERE client = '{client}'",
    ]


def gone_for_good(world: World) -> list[str]:
    return [f"DELETE FROM {table} WHERE client = '{world.id_of(300)}'" for table in ("round_client", "privacy")]


@pytest.mark.parametrize("change", [gone_cheaper, gone_for_good])
def test_what_is_signed_of_earlier_rounds_is_what_their_leaves_say(
    world: World, tmp_path: Path, change: Callable[[World], list[str]]
) -> None:
    """Site 3 was in round 1 alone; round 2's statement is of its text too."""
    export_round(world.store, world.run, 2, tmp_path / "before")
    edit(world.store, *change(world))
    with pytest.raises(VerificationError, match="not as its log says"):
        export_round(world.store, world.run, 2, tmp_path / "after")


@pytest.fixture
def noised(tmp_path: Path, tiny_bert: Path) -> Iterator[World]:
    """Noise at the aggregator; round 1 took two attempts, the clock a day back at the second."""
    made = make_world(tmp_path, tiny_bert, sites=3, rounds=3, settings={"[defence]": LEVEL})
    made.store.log_members(made.coordinator.sites)
    yield made
    made.store.close()


class Dying:
    """A judge whose process dies."""

    def judge(self, vector: F32) -> Any:
        raise KilledError


def test_charges_of_whole_clients_go_by_attempts_and_not_by_a_clock(
    noised: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(KilledError):
        one_round(replace(noised.context(), judge=Dying()), noised.link, 1)
    monkeypatch.setattr(accounting, "time", SimpleNamespace(time=lambda: time.time() - 86_400))
    one_round(noised.context(), noised.link, 1)
    assert [s.attempt for s in noised.store.noised_sums()] == [2, 1]
    assert check(noised.store) == []
    export_round(noised.store, noised.run, 1, tmp_path / "honest")
    for statement in ("UPDATE noised_sum SET noise_multiplier = 50", "DELETE FROM noised_sum WHERE attempt = 1"):
        edit(noised.store, statement)
        with pytest.raises(VerificationError, match="not as its log says"):
            export_round(noised.store, noised.run, 1, tmp_path / "x")


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM privacy WHERE scope = 'client' AND number = 2",
        "UPDATE privacy SET epsilon = 0.001 WHERE scope = 'client' AND number = 2",
        "UPDATE privacy SET unit = 'galaxy' WHERE scope = 'client'",
    ],
)
def test_what_is_stated_of_whole_clients_is_what_was_charged(noised: World, tmp_path: Path, statement: str) -> None:
    for number in (1, 2):
        one_round(noised.context(), noised.link, number)
    # Of a second run, whose own figure is less than that of both.
    second = Run(**(noised.run.model_dump() | {"id": "9" * 32}))
    noised.store.start_run(second, noised.store.adapter(noised.store.rounds(noised.run.id)[0].adapter or ""), a_model())
    one_round(replace(noised.context(), run=second), noised.link, 1)
    assert check(noised.store) == []
    edit(noised.store, statement)
    assert "whole clients" in check(noised.store)[0].what
    with pytest.raises(VerificationError, match=r"not as its log says.*whole clients"):
        export_round(noised.store, noised.run, 2, tmp_path / "x")
    noised.store.close()


def test_a_base_models_row_is_as_its_runs_say(world: World) -> None:
    run = Run(**(world.run.model_dump() | {"id": "9" * 32, "tokenizer": "77" * 32}))
    first = world.store.adapter(world.store.rounds(world.run.id)[0].adapter or "")
    world.store.start_run(run, first, a_model(run.base))
    assert check(world.store) == []
    edit(world.store, "UPDATE model SET tokenizer = 'ff'")
    assert [one.what for one in check(world.store)] == ["no run on it has its tokenizer"]


def test_what_is_signed_of_a_round_is_what_its_leaf_says(world: World, tmp_path: Path) -> None:
    """Round 0 too, whose row has no leaf of its own."""
    signed = dict[int, Any]()
    for number in (0, 2):
        export_round(world.store, world.run, number, tmp_path / f"e{number}")
        signed[number] = json.loads((tmp_path / f"e{number}" / FILE).read_text())
        leaf = json.loads(signed[number]["leaf"]["record"])
        stated = signed[number]["statement"]
        assert (stated["committed"], stated["leaf"]) == (leaf["at"], leaf["index"])
        assert (stated["parent"], stated["residual"]) == (leaf.get("parent"), leaf.get("residual"))
    # The row too, to the last digit: a clock may jump between two looks at it.
    assert world.store.round(world.run.id, 2).committed == signed[2]["statement"]["committed"]
    for number, change in (
        (2, "committed = 1.0 WHERE number = 2"),
        (0, "residual = 0.5 WHERE number = 0"),
        (0, "parent = 'ff' WHERE number = 0"),
        (0, "leaf = 5 WHERE number = 0"),
    ):
        edit(world.store, f"UPDATE round SET {change}")
        with pytest.raises(VerificationError, match="not as its log says"):
            export_round(world.store, world.run, number, tmp_path / "x")
    # Whoever has the key states another all the same.
    key = world.coordinator.signing
    others: tuple[tuple[int, dict[str, Any]], ...] = (
        (2, {"committed": 1.0}),
        (0, {"residual": 0.5}),
        (0, {"parent": "ff"}),
    )
    for number, other in others:
        record = signed[number]
        leaf = record["leaf"]
        proof = Proof(leaf["record"].encode(), leaf["signature"], leaf["index"],
                      [bytes.fromhex(one) for one in record["path"]], record["head"])  # fmt: skip
        check_statement(make_statement(record["statement"], proof, key), key.verify_key, "test")
        with pytest.raises(VerificationError, match=f"something else than the statement.*{next(iter(other))}"):
            check_statement(make_statement(record["statement"] | other, proof, key), key.verify_key, "test")


def test_a_row_that_is_open_is_told_as_if_it_were_charged(world: World) -> None:
    class Gone(type(world.link)):  # type: ignore[misc]
        def exchange(self, *_: Any, **__: Any) -> Any:
            raise KilledError

    before = {c.name: c.epsilon for c in world.store.clients(world.run.id, 2)}
    with pytest.raises(KilledError):
        one_round(world.context(members=world.members[:2]), Gone(world.desks), 3)
    last = round_rows(world.store, world.run.id)[-1]
    assert last["round"] == 3
    assert all(last["epsilon"][name] > before[name] for name in before)
    rows = world.store.clients(world.run.id, 3)
    assert {row.verdict for row in rows} == {"open"}
    assert {row.name: stated_epsilon(world.store, row) for row in rows} == last["epsilon"]


@pytest.mark.parametrize(
    ("rule", "verdict"),
    [
        ("secure.again", FAILED), ("secure.stale", FAILED), ("secure.agreed", FAILED), ("", FAILED),
        ("secure.group", REFUSED), ("secure.batch", REFUSED), ("policy.rounds_per_day", REFUSED), ("budget.x", REFUSED),
    ],
)  # fmt: skip
def test_who_may_have_spent_is_not_said_to_have_been_charged_nothing(rule: str, verdict: str) -> None:
    assert said_no({"rule": rule, "what": "no"}).verdict == verdict


def forge(
    world: World,
    folder: Path,
    change: Callable[[F32], None] = lambda _: None,
    number: int = 2,
    said: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """An export of another adapter, of which other things are ``said``, signed by the federation's own key from its leaf to its files."""
    export_round(world.store, world.run, number, folder)
    key, record = world.coordinator.signing, json.loads((folder / FILE).read_text())
    stated, leaf = record["statement"], json.loads(record["leaf"]["record"])
    schema = Schema.from_list(json.loads(stated["run_tensors"]), "test")
    vector = from_safetensors((folder / REGISTERED).read_bytes(), schema, "test").copy()
    change(vector)
    data = to_safetensors(vector, schema, {})
    stated["adapter"] = leaf["adapter"] = digest(data)
    stated["vector"], stated["leaf"], leaf["index"] = digest(vector.tobytes()), 0, 0
    stated |= said
    leaf |= {name: value for name, value in said.items() if name in leaf}
    task = TaskSpec.from_dict(json.loads(stated["run_task"]))
    for name, part in (peft_files(world.run, task, schema, vector) | {REGISTERED: data}).items():
        (folder / name).write_bytes(part)
    stated["files"] = {p.name: digest(p.read_bytes()) for p in folder.iterdir() if p.name != FILE}
    signed = canonical(leaf)
    tree = Tree([leaf_hash(signed)])
    head = Checkpoint(log_of_federation(key.verify_key), 1, tree.root()).signed(key)
    proof = Proof(signed, key.sign(LEAF_PURPOSE, signed).hex(), 0, tree.inclusion(0), head)
    (folder / FILE).write_bytes(make_statement(stated, proof, key))
    return folder


@pytest.mark.parametrize("value", [0.25, np.nan, np.inf, 1e30])
def test_an_import_is_of_numbers_that_may_be_trained_on(world: World, tmp_path: Path, value: float) -> None:
    def change(vector: F32) -> None:
        vector[0] = value

    (tmp_path / "other").mkdir()
    SigningKey.generate().save(tmp_path / "other" / "sign.key")
    store, folder = Store(tmp_path / "other"), forge(world, tmp_path / "x", change)
    key = world.coordinator.signing.verify_key
    if value < 1:
        import_round(store, folder, key, "other", world.run.base)
    else:
        with pytest.raises(VerificationError, match="larger than may be trained"):
            import_round(store, folder, key, "other", world.run.base)
    assert len(store.runs()) == int(value < 1)
    store.close()


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Store]:
    """Another federation's registry."""
    (tmp_path / "other").mkdir()
    SigningKey.generate().save(tmp_path / "other" / "sign.key")
    store = Store(tmp_path / "other")
    yield store
    store.close()


@pytest.mark.parametrize(
    "said",
    [
        {"rule": "\x1b[2J"}, {"rule": "average`\n\n## Privacy"}, {"rule": "r" * 1_500_000}, {"run": "\x1b[2J" + "a" * 28},
        {"run": "a" * 5000}, {"tokenizer": "zz"}, {"code": "x\x1b[2J"}, {"code": "x" * 201}, {"round": True},
    ],
    ids=lambda said: str(said)[:40],
)  # fmt: skip
def test_what_is_kept_of_an_import_is_of_its_form(
    world: World, elsewhere: Store, tmp_path: Path, said: dict[str, Any]
) -> None:
    folder = forge(world, tmp_path / "x", number=1, said=said)
    with pytest.raises(VerificationError, match=f"no federation states so.*{next(iter(said))}"):
        import_round(elsewhere, folder, world.coordinator.signing.verify_key, "other", world.run.base)
    assert elsewhere.runs() == []


def test_an_import_reads_and_lays_out_no_more_than_an_export_has(
    world: World, elsewhere: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = world.coordinator.signing.verify_key
    tensors = [["base_model.model.encoder.layer.0.attention.self.query.lora_A.weight", [1 << 14, 1 << 14]]]
    large = forge(world, tmp_path / "large", said={"frozen": {"tensors": tensors, "digest": "00" * 32}})
    monkeypatch.setattr(importing, "peft_files", lambda *_: pytest.fail("laid out"))
    with pytest.raises(VerificationError, match="larger than what PEFT would load"):
        import_round(elsewhere, large, key, "other", world.run.base)
    read, real = list[str](), importing._read

    def reading(folder: Path, name: str) -> bytes:
        read.append(name)
        return real(folder, name)

    monkeypatch.setattr(importing, "_read", reading)
    record = json.loads((forge(world, tmp_path / "more") / FILE).read_text())
    record["statement"]["files"]["x.bin"] = "00" * 32
    leaf = record["leaf"]
    path = [bytes.fromhex(part) for part in record["path"]]
    proof = Proof(leaf["record"].encode(), leaf["signature"], leaf["index"], path, record["head"])
    (tmp_path / "more" / FILE).write_bytes(make_statement(record["statement"], proof, world.coordinator.signing))
    with pytest.raises(VerificationError, match="no export makes"):
        import_round(elsewhere, tmp_path / "more", key, "other", world.run.base)
    assert read == [FILE]
    (large / "README.md").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(InputError, match="too large"):
        import_round(elsewhere, large, key, "other", world.run.base)


def test_tables_move_no_cursor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.OUTPUT, "json", False)
    console.table({}, "a \x1b[2J", ["name"], [["b \x1b[31m\nc"]])
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines] == ["a ?[2J", "name", "b ?[31m?c"]


def test_what_is_given_up_while_it_is_exported_is_not_stated(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, real = world.store, world.store.proof
    store.finish_run(world.run.id)

    def then_given_up(run: str, number: int) -> Proof:
        proof = real(run, number)
        store.give_up(run, number, "asked to")
        return proof

    monkeypatch.setattr(store, "proof", then_given_up)
    with pytest.raises(StateError, match="given up; got asked to"):
        export_round(store, world.run, 1, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert store.leaves()[-1].kind == "tombstone"


class Flood:
    """Pieces without an end."""

    def __init__(self, **one: Any) -> None:
        self.one, self.told, self.cancelled = SimpleNamespace(**one), 0, False

    def __iter__(self) -> Iterator[Any]:
        while not self.cancelled:
            self.told += 1
            yield self.one

    def cancel(self) -> None:
        """No more."""
        self.cancelled = True


def test_what_is_fetched_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    flood = Flood(data=bytes(1000))
    with pytest.raises(VerificationError, match="larger than its tensors"):
        _adapter(flood, 5000, "test")
    assert (flood.told, flood.cancelled) == (6, True)
    monkeypatch.setattr("cloister_client.fetching._LOG_BYTES", 5000)
    for one in (
        {"record": b"", "key": "", "signature": "x" * 1000},
        {"record": b"", "key": "x" * 1000, "signature": ""},
    ):
        leaves = Flood(**one)
        head = SimpleNamespace(note=Checkpoint("x", 20, bytes(32)).text + "\n")
        stub = SimpleNamespace(Head=lambda *_, head=head, **__: head, Log=lambda *_, leaves=leaves, **__: leaves)
        with pytest.raises(VerificationError, match="too large"):
            _whole_log(stub)
        assert leaves.told == 5


def test_nobody_is_put_out_or_let_in_on_a_log_that_sites_did_not_cosign(world: World) -> None:
    newest = len(world.store.leaves()) - 1
    edit(world.store, f'DELETE FROM log_leaf WHERE "index" >= {newest - 1}')
    store = Store(world.store.home)
    cards = world.coordinator.sites()
    store.log_members(lambda: cards)
    with pytest.raises(RollbackError, match="cosigned"):
        store.log_members(lambda: cards[:2])
    assert len(store.leaves()) == newest - 1
    store.close()


def test_commands_end_in_words(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "x", tmp_path / ("n" * 300), Path("/proc/none/x")):
        with pytest.raises(StateError, match="folder"):
            export_round(world.store, world.run, 1, out)
    with pytest.raises(StateError, match="refused"):
        hold(10**25, "a reason")
    for why in ("two\nlines", "\x1b[2J", "x" * 1001, "\udcff"):
        with pytest.raises(InputError, match="why"):
            promote("production", 1, why=why)
    assert world.store.aliases() == []
    promote("production", 1)


def test_run_rounds_goes_on_after_all_that(world: World) -> None:
    run_rounds(world.context(), world.link)
    assert check(world.store) == []
