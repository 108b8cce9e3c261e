"""The registry on both its databases: one transaction a round, what is committed stays, readers see old or new, work is kept."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cloister_server import rules
from cloister_server.storage import read_storage, write_storage
from cloister_server.store import Commit, Store
from cloister_server.tables import AGGREGATING, OPEN, Privacy, Round, RoundClient, Run
from cloister_shared.errors import InputError, RefusedError, StateError, VerificationError
from cloister_shared.signing import SigningKey
from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError, IntegrityError

from support.registry import a_model, planned

RUN = "ab" * 16
ADAPTER = b"adapter zero"
_COLUMNS = "run, number, state, attempt, opened, seconds, judging_seconds, sent_bytes, received_bytes"


def a_run(run: str = RUN, created: float = 1.0) -> Run:
    """A run's row."""
    return Run(
        id=run,
        federation="fed",
        created=created,
        rounds=3,
        base="00" * 32,
        task='{"labels": ["a", "b"]}',
        rule="average",
        tensors="[]",
        config="{}",
        code="test",
    )


def a_client(name: str, *, run: str = RUN, number: int = 1, core: str = "{}") -> RoundClient:
    """What one client is asked."""
    return RoundClient(
        run=run,
        number=number,
        client=name,
        name=f"site-{name}",
        plan="11" * 32,
        core=core,
        weight=10.0,
        noise_multiplier=1.0,
        sample_rate=0.1,
        steps=2,
        delta=1e-5,
    )


def a_commit(adapter: str, *clients: str, metrics: dict[str, float] | None = None) -> Commit:
    """A commit in which every client was accepted."""
    changes: dict[str, dict[str, Any]] = {
        c: {"verdict": "accepted", "epsilon": 1.5, "sent_bytes": 7, "received_bytes": 5, "update": "22" * 32}
        for c in clients
    }
    return Commit(adapter, 1.0, 0.5, changes, {"accuracy": 0.5} if metrics is None else metrics)


@pytest.fixture(params=["sqlite", "postgresql"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A coordinator's folder whose registry is in one of the two databases."""
    folder = tmp_path / "coordinator"
    folder.mkdir()
    SigningKey.generate().save(folder / "sign.key")
    if request.param == "postgresql":
        write_storage(folder, request.getfixturevalue("postgres").database(), "")
    return folder


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    """A registry with one run whose round 1 is being aggregated for clients a and b."""
    made = Store(home)
    made.start_run(a_run(), ADAPTER, a_model())
    planned(made, RUN, 1, [a_client("a"), a_client("b")])
    yield made
    made.close()


def blob(store: Store, number: int) -> str:
    """A blob that is there."""
    return store.blobs.put(f"adapter {number}".encode())


def raw(store: Store, statement: str) -> list[Any]:
    """Runs SQL behind the registry's back."""
    engine = create_engine(read_storage(store.home).database)
    try:
        with engine.begin() as connection:
            done = connection.exec_driver_sql(statement)
            return [tuple(row) for row in done] if done.returns_rows else []
    finally:
        engine.dispose()


def everything(store: Store) -> list[Any]:
    """All rows of all tables."""
    return [
        raw(store, f"SELECT * FROM {table} ORDER BY 1, 2, 3") for table in ("run", "round", "round_client", "metric")
    ]


def test_a_commit_writes_round_clients_and_metrics_together(store: Store) -> None:
    name = store.blobs.put(b"adapter one")
    store.commit_round(RUN, 1, a_commit(name, "a", "b"))
    row = store.last_committed(RUN)
    assert (row.number, row.state, row.adapter, row.sent_bytes, row.received_bytes) == (1, "committed", name, 14, 10)
    assert store.metrics(RUN, 1) == {"accuracy": 0.5}
    assert [(c.name, c.verdict, c.epsilon) for c in store.clients(RUN, 1)] == [
        ("site-a", "accepted", 1.5),
        ("site-b", "accepted", 1.5),
    ]
    assert store.adapter(name) == b"adapter one"


@pytest.mark.parametrize("fault", ["metric-there", "unknown-client", "bad-value"])
def test_a_commit_that_fails_midway_changes_nothing(store: Store, fault: str) -> None:
    commit = a_commit(blob(store, 3), "a", "b")
    if fault == "metric-there":
        raw(store, f"INSERT INTO metric VALUES ('{RUN}', 1, 'accuracy', 0.1)")
    elif fault == "unknown-client":
        commit.clients["nobody"] = {"verdict": "accepted"}
    else:
        commit.clients["b"]["verdict"] = None
    before = everything(store)
    with pytest.raises(StateError):
        store.commit_round(RUN, 1, commit)
    assert everything(store) == before
    assert store.rounds(RUN)[-1].state == AGGREGATING


def test_a_round_is_committed_once(store: Store) -> None:
    store.commit_round(RUN, 1, a_commit(blob(store, 3), "a"))
    before = everything(store)
    with pytest.raises(StateError, match="not aggregating"):
        store.commit_round(RUN, 1, a_commit(blob(store, 4), "a"))
    with pytest.raises(StateError, match="committed"):
        store.plan_round(Round(run=RUN, number=1, opened=2.0), [])
    with pytest.raises(StateError, match="not aggregating"):
        store.commit_round(RUN, 2, a_commit(blob(store, 4)))
    assert everything(store) == before


def test_an_aborted_round_is_not_committed_but_reopened(store: Store) -> None:
    store.abort_round(RUN, 1, {"a": {"verdict": "missing"}})
    with pytest.raises(StateError, match="not aggregating"):
        store.commit_round(RUN, 1, a_commit(blob(store, 3), "a"))
    assert planned(store, RUN, 1, opened=9.0).attempt == 2
    store.commit_round(RUN, 1, a_commit(blob(store, 3), "a", "b"))
    with pytest.raises(StateError):
        store.abort_round(RUN, 1, {})
    assert store.rounds(RUN)[-1].state == "committed"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE round SET adapter = 'x' WHERE number = 1",
        "UPDATE round SET state = 'open' WHERE number = 1",
        "DELETE FROM round WHERE number = 1",
        "UPDATE round SET number = 1 WHERE number = 0",
    ],
)
def test_a_committed_round_cannot_be_changed_with_sql(store: Store, statement: str) -> None:
    store.commit_round(RUN, 1, a_commit(blob(store, 3), "a", "b"))
    before = everything(store)
    with pytest.raises(DBAPIError, match="committed round never"):
        raw(store, statement)
    assert everything(store) == before


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE round_client SET verdict = 'accepted', epsilon = 0 WHERE number = 1",
        "DELETE FROM round_client WHERE number = 1",
        "UPDATE metric SET value = 1.0 WHERE number = 1",
        "DELETE FROM metric WHERE number = 1",
        f"INSERT INTO metric VALUES ('{RUN}', 1, 'later', 1.0)",
    ],
)
def test_clients_and_scores_of_a_committed_round_cannot_be_changed_with_sql(store: Store, statement: str) -> None:
    store.commit_round(RUN, 1, a_commit(blob(store, 3), "a", "b"))
    with pytest.raises(IntegrityError):
        raw(store, statement)


def test_a_committed_round_cannot_be_replaced_with_sql(store: Store) -> None:
    store.commit_round(RUN, 1, a_commit(blob(store, 3), "a", "b"))
    columns = _COLUMNS
    insert = f"INTO round ({columns}) VALUES ('{RUN}', 1, 'planned', 1, 0, 0, 0, 0, 0)"
    over = f"INSERT {insert} ON CONFLICT (run, number) DO UPDATE SET state = 'aborted'"
    for statement in (over, f"INSERT OR REPLACE {insert}") if store.database.sqlite else (over,):
        with pytest.raises(IntegrityError):
            raw(store, statement)


def test_run_and_number_are_unique(store: Store) -> None:
    columns = _COLUMNS
    with pytest.raises(IntegrityError, match=r"(?i)unique"):
        raw(store, f"INSERT INTO round ({columns}) VALUES ('{RUN}', 1, 'planned', 1, 0, 0, 0, 0, 0)")
    with pytest.raises(StateError, match="refused"):
        store.start_run(a_run(), ADAPTER, a_model())
    assert [r.number for r in store.rounds(RUN)] == [0, 1]


def test_planning_again_gives_a_new_attempt_at_the_same_work(store: Store) -> None:
    store.close()
    again = Store(store.home)
    others = [a_client("a", core='{"other": 1}'), a_client("z")]
    row, clients = again.plan_round(Round(run=RUN, number=1, parent="x", opened=50.0), others)
    assert (row.attempt, row.opened, row.parent) == (2, 1.0, None)
    asked = [(c.client, c.core) for c in sorted(clients, key=lambda c: c.client)]
    # Who has a part in it by now gets one; the others' stays.
    assert asked == [("a", "{}"), ("b", "{}"), ("z", "{}")]
    assert again.plan_round(Round(run=RUN, number=1, opened=60.0), [])[0].attempt == 3
    again.close()


def test_find_run_by_prefix(store: Store) -> None:
    assert store.find_run(None).id == RUN
    store.start_run(a_run("ac" * 16, created=5.0), ADAPTER, a_model())
    assert store.find_run(None).id == "ac" * 16
    assert store.find_run("ab").id == RUN
    for name in ("a", "ff", ""):
        with pytest.raises(InputError) as caught:
            store.find_run(name)
        assert caught.value.exit_code == 2
    with pytest.raises(InputError, match="several runs begin so"):
        store.find_run("a")


def test_find_run_in_an_empty_registry(home: Path) -> None:
    store = Store(home)
    with pytest.raises(InputError, match="no such run"):
        store.find_run(None)
    store.close()


def test_asked_is_over_all_runs(store: Store) -> None:
    store.start_run(a_run("cd" * 16), ADAPTER, a_model())
    store.plan_round(Round(run="cd" * 16, number=1, opened=2.0), [a_client("a", run="cd" * 16)])
    assert sorted(c.run for c in store.asked("a")) == [RUN, "cd" * 16]
    assert [c.run for c in store.asked("b")] == [RUN]
    assert store.asked("nobody") == []


def test_a_sites_history_is_of_all_its_keys(store: Store) -> None:
    again = a_client("c", run="cd" * 16)
    again.name = "site-a"
    store.start_run(a_run("cd" * 16), ADAPTER, a_model())
    store.plan_round(Round(run="cd" * 16, number=1, opened=2.0), [again])
    for key in ("a", "c"):
        assert sorted(c.client for c in store.history_of(key)) == ["a", "c"]
    assert [c.client for c in store.history_of("b")] == ["b"]
    assert store.history_of("nobody") == []


def test_start_run_registers_round_zero_and_finish_marks(store: Store) -> None:
    zero = store.rounds(RUN)[0]
    assert (zero.number, zero.state) == (0, "committed")
    assert store.adapter(zero.adapter or "") == ADAPTER
    store.set_flower_run(RUN, 2**64 - 1)
    store.finish_run(RUN)
    found = store.find_run(RUN)
    assert found.flower_run == str(2**64 - 1)
    assert found.finished is not None
    assert Store.labels(found) == ("a", "b")


def test_a_row_never_points_at_a_blob_that_is_gone(store: Store) -> None:
    zero = store.rounds(RUN)[0]
    Path(store.blobs.address(zero.adapter or "")).unlink()
    with pytest.raises(VerificationError, match="missing"):
        store.adapter(zero.adapter or "")


def test_only_its_owner_reads_the_registry(store: Store) -> None:
    if store.database.sqlite:
        assert (store.home / "registry.db").stat().st_mode & 0o777 == 0o600
    assert (store.home / "blobs").stat().st_mode & 0o777 == 0o700
    adapter = Path(store.blobs.address(store.rounds(RUN)[0].adapter or ""))
    assert adapter.stat().st_mode & 0o777 == 0o600


def test_a_damaged_registry_is_a_state_error(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StateError, match="database fails"):
        Store(tmp_path)


def test_two_stores_at_once_commit_once(store: Store) -> None:
    """Two coordinators on one folder: of two commits of the same round exactly one wins."""
    others = [Store(store.home) for _ in range(4)]
    start, outcomes = threading.Barrier(4), list[str]()
    names = [blob(store, number) for number in range(4)]

    def commit(number: int) -> None:
        start.wait()
        try:
            others[number].commit_round(RUN, 1, a_commit(names[number], "a", "b"))
            outcomes.append(names[number])
        except StateError:
            outcomes.append("refused")

    threads = [threading.Thread(target=commit, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [o for o in outcomes if o != "refused"]
    assert len(won) == 1
    assert store.last_committed(RUN).adapter == won[0]
    for other in others:
        assert other.last_committed(RUN).adapter == won[0]
        other.close()


READER = """
import sys
from pathlib import Path
from cloister_server import rules
from cloister_server.storage import read_storage, write_storage
from cloister_server.store import Commit, Store
store = Store(Path(sys.argv[1]))
print("ready", flush=True)
seen = set()
while True:
    rows = [(r.number, r.state, r.adapter) for r in store.rounds(sys.argv[2])]
    seen.add(str(rows[-1]) if rows else "empty")
    if rows[-1][1] == "committed":
        break
print(len(seen), rows[-1], len(store.metrics(sys.argv[2], 1)), flush=True)
"""


def test_a_reader_process_sees_the_old_or_the_new(store: Store) -> None:
    """Another process that reads all the while sees the round open, then committed with all its parts, and nothing between."""
    command = [sys.executable, "-c", READER, str(store.home), RUN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        metrics = {f"m{i}": float(i) for i in range(200)}
        store.commit_round(RUN, 1, a_commit(blob(store, 3), "a", "b", metrics=metrics))
        out, err = reader.communicate(timeout=60)
    assert err == ""
    seen, row = out.split(maxsplit=1)
    assert int(seen) <= 2
    assert row.strip() == f"(1, 'committed', '{blob(store, 3)}') 200"


KILLED = """
import os, sys
from pathlib import Path
from cloister_server.store import Store
from cloister_server.tables import Metric, RoundClient
from sqlmodel import select
store = Store(Path(sys.argv[1]))
with store.database.writing() as session:
    for row in session.exec(select(RoundClient)):
        row.verdict = "half"
    session.add_all([Metric(run=sys.argv[2], number=1, name=str(i) * 50, value=1.0) for i in range(500)])
    session.flush()
    os.kill(os.getpid(), 9)
"""


def test_an_interrupted_writer_leaves_the_old(store: Store) -> None:
    """A process killed inside its transaction leaves what was committed before, and the registry usable."""
    before = everything(store)
    done = subprocess.run([sys.executable, "-c", KILLED, str(store.home), RUN])
    assert done.returncode == -9
    assert everything(store) == before
    store.commit_round(RUN, 1, a_commit(blob(store, 3), "a", "b"))
    assert store.last_committed(RUN).number == 1


def test_a_round_moves_as_its_states_allow_and_no_other_way(store: Store) -> None:
    with pytest.raises(StateError, match="not planned"):
        store.advance(RUN, 1, OPEN)
    store.plan_round(Round(run=RUN, number=1, opened=2.0), [])
    with pytest.raises(StateError, match="not open"):
        store.advance(RUN, 1, AGGREGATING)
    with pytest.raises(StateError, match="not aggregating"):
        store.commit_round(RUN, 1, a_commit(blob(store, 3), "a", "b"))
    for state in ("committed", "aggregating", "whatever"):
        with pytest.raises(DBAPIError, match="does not move so"):
            raw(store, f"UPDATE round SET state = '{state}' WHERE number = 1")
    for state in ("open", "committed"):
        with pytest.raises(DBAPIError, match="begins as planned"):
            raw(store, f"INSERT INTO round ({_COLUMNS}) VALUES ('{RUN}', 7, '{state}', 1, 0, 0, 0, 0, 0)")


def test_a_commit_names_only_blobs_that_are_there(store: Store) -> None:
    with pytest.raises(StateError, match="not there"):
        store.commit_round(RUN, 1, a_commit("33" * 32, "a", "b"))
    assert store.rounds(RUN)[-1].state == AGGREGATING
    name = blob(store, 3)
    store.commit_round(RUN, 1, a_commit(name, "a", "b"))
    assert {(b.digest, b.kind, b.bytes) for b in store.named_blobs().values()} == {
        (name, "adapter", 9), (store.rounds(RUN)[0].adapter, "adapter", len(ADAPTER)),
    }  # fmt: skip


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE run SET base = 'x'",
        "DELETE FROM run",
        "UPDATE fence SET number = number",
        "DELETE FROM fence",
        "UPDATE log_leaf SET kind = 'x' WHERE \"index\" = 0",
        "DELETE FROM log_leaf",
        "UPDATE model SET source = 'x'",
        "DELETE FROM model",
        "UPDATE hold SET why = 'x'",
        "DELETE FROM hold",
        "UPDATE tombstone SET why = 'x'",
        "DELETE FROM tombstone",
        "UPDATE alias SET number = 0",
        "DELETE FROM alias",
        "UPDATE alias_event SET number = 0",
        "UPDATE privacy SET epsilon = 0 WHERE number = 1",
        "DELETE FROM privacy WHERE number = 1",
        "UPDATE signature SET signature = 'x'",
        "DELETE FROM signature",
    ],
)
def test_what_is_registered_for_good_stays(store: Store, statement: str) -> None:
    store.take_fence()
    cost = Privacy(run=RUN, number=1, client="a", scope="record", unit="record", epsilon=1.0, delta=1e-5, lifetime=2.0)
    planned(store, RUN, 1)
    store.commit_round(RUN, 1, replace(a_commit(blob(store, 3), "a", "b"), privacy=[cost]))
    store.set_alias("production", RUN, 1, blob(store, 3), 0, "")
    store.hold(RUN, 1, "asked by the court")
    store.finish_run(RUN)
    store.give_up(RUN, 0, "no longer needed")
    store.add_statement(RUN, 1, b'{"signature": "s"}', "k")
    before = raw(store, "SELECT * FROM log_leaf ORDER BY 1")
    with pytest.raises(DBAPIError):
        raw(store, statement)
    assert raw(store, "SELECT * FROM log_leaf ORDER BY 1") == before
    assert store.privacy(RUN) == [cost]


def test_the_rules_are_those_of_this_version_and_a_missing_one_is_seen(store: Store) -> None:
    assert store.database.rules() == rules.expected(store.database.dialect)
    on = "" if store.database.sqlite else " ON fence"
    raw(store, f"DROP TRIGGER kept_fence_delete{on}")
    missing = rules.expected(store.database.dialect) - store.database.rules()
    assert len(missing) == 1
    assert "fence" in missing.pop()
    store.database.migrate()
    assert store.database.rules() == rules.expected(store.database.dialect)


@pytest.mark.parametrize("home", ["postgresql"], indirect=True)  # SQLite can do neither
def test_a_rule_that_was_switched_off_is_seen_and_no_table_is_emptied(store: Store) -> None:
    raw(store, "ALTER TABLE round DISABLE TRIGGER ALL")
    assert rules.expected("postgresql") - store.database.rules()
    for table in ("log_leaf", "alias_event", "round_client"):
        with pytest.raises(DBAPIError, match="not emptied"):
            raw(store, f"TRUNCATE {table}")


def test_what_a_round_cost_is_there_with_scope_and_unit(store: Store) -> None:
    cost = Privacy(run=RUN, number=1, client="a", scope="record", unit="record", epsilon=1.0, delta=1e-5, lifetime=2.0)
    store.abort_round(RUN, 1, {"a": {"verdict": "missing"}}, [cost])
    planned(store, RUN, 1)
    again = cost.model_copy(update={"epsilon": 1.5})
    store.commit_round(RUN, 1, replace(a_commit(blob(store, 3), "a", "b"), privacy=[again]))
    assert [(p.scope, p.unit, p.epsilon, p.lifetime) for p in store.privacy(RUN)] == [("record", "record", 1.5, 2.0)]


def test_a_lower_fence_writes_nothing(store: Store) -> None:
    store.take_fence()
    newer = Store(store.home)
    newer.take_fence()
    before = everything(store)
    for deed in (
        lambda: store.plan_round(Round(run=RUN, number=1, opened=1.0), []),
        lambda: store.commit_round(RUN, 1, a_commit(blob(store, 3), "a", "b")),
        lambda: store.abort_round(RUN, 1, {}),
        lambda: store.advance(RUN, 1, OPEN),
    ):
        with pytest.raises(RefusedError, match="another coordinator has taken over"):
            deed()
    assert everything(store) == before
    newer.commit_round(RUN, 1, a_commit(blob(store, 3), "a", "b"))
    assert (newer.last_committed(RUN).number, newer.last_committed(RUN).fence) == (1, 2)
    newer.close()


def test_leaves_that_many_write_at_once_have_each_a_place(store: Store) -> None:
    others = [Store(store.home) for _ in range(4)]

    def write(number: int) -> None:
        for _ in range(5):
            others[number].log("incident", {"what": f"{number}"})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    leaves = store.leaves()
    assert [leaf.index for leaf in leaves] == list(range(len(leaves)))
    assert sum(leaf.kind == "incident" for leaf in leaves) == 20
    for other in others:
        other.close()


@pytest.mark.parametrize("home", ["sqlite"], indirect=True)  # PostgreSQL has no REPLACE and no rowid
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE OR REPLACE round SET number = 1 WHERE number = 2",
        "UPDATE OR REPLACE round_client SET number = 1 WHERE number = 2",
        "UPDATE OR REPLACE privacy SET number = 1 WHERE number = 2",
        "UPDATE OR REPLACE privacy SET rowid = 1 WHERE number = 2",
        "INSERT OR REPLACE INTO privacy (rowid, run, number, client, scope, unit, epsilon, delta, lifetime)"
        " SELECT 1, run, 9, client, scope, unit, 0, delta, 0 FROM privacy WHERE number = 2",
        "INSERT OR REPLACE INTO hold SELECT id, run, number, adapter, why, at, leaf, 1.0 FROM hold",
        "INSERT OR REPLACE INTO fence VALUES (1, 0)",
        "INSERT OR REPLACE INTO alias SELECT name, run, 0, adapter, version, guard FROM alias",
        "DELETE FROM round_client WHERE number = 2",
        "UPDATE round SET attempt = 0 WHERE number = 2",
        "UPDATE fence SET id = 9, number = number + 1",
    ],
)
def test_no_row_takes_anothers_place(store: Store, statement: str) -> None:
    store.take_fence()
    cost = Privacy(run=RUN, number=1, client="a", scope="record", unit="record", epsilon=1.0, delta=1e-5, lifetime=2.0)
    other = Privacy(**cost.model_dump() | {"number": 2})
    planned(store, RUN, 1)
    store.commit_round(RUN, 1, replace(a_commit(blob(store, 3), "a", "b"), privacy=[cost]))
    planned(store, RUN, 2, [a_client("a", number=2)])
    store.abort_round(RUN, 2, {}, [other])
    store.set_alias("production", RUN, 1, blob(store, 3), 0, "")
    store.hold(RUN, 1, "asked by the court")
    tables = ("round", "round_client", "privacy", "hold", "fence", "alias")
    before = [raw(store, f"SELECT * FROM {table} ORDER BY 1, 2") for table in tables]
    with pytest.raises(DBAPIError):
        raw(store, statement)
    assert [raw(store, f"SELECT * FROM {table} ORDER BY 1, 2") for table in tables] == before
