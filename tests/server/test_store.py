"""The registry: one transaction a round, committed rounds stay, readers see old or new, resumed rounds keep their work."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cloister_server.store import Commit, Round, RoundClient, Run, Store
from cloister_shared.errors import InputError, StateError, VerificationError
from cloister_shared.signing import SigningKey

RUN = "ab" * 16
ADAPTER = b"adapter zero"


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


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A registry with one run whose round 1 is open for clients a and b."""
    SigningKey.generate().save(tmp_path / "sign.key")
    made = Store(tmp_path)
    made.start_run(a_run(), ADAPTER)
    made.open_round(Round(run=RUN, number=1, state="open", opened=2.0), [a_client("a"), a_client("b")])
    yield made
    made.close()


def raw(store: Store, statement: str) -> list[Any]:
    """Runs SQL behind the registry's back."""
    connection = sqlite3.connect(store.home / "registry.db", isolation_level=None)
    try:
        return connection.execute(statement).fetchall()
    finally:
        connection.close()


def everything(store: Store) -> list[Any]:
    """All rows of all tables."""
    return [
        raw(store, f"SELECT * FROM {table} ORDER BY 1, 2, 3") for table in ("run", "round", "round_client", "metric")
    ]


def test_a_commit_writes_round_clients_and_metrics_together(store: Store) -> None:
    blob = store.blobs.put(b"adapter one")
    store.commit_round(RUN, 1, a_commit(blob, "a", "b"))
    row = store.last_committed(RUN)
    assert (row.number, row.state, row.adapter, row.sent_bytes, row.received_bytes) == (1, "committed", blob, 14, 10)
    assert store.metrics(RUN, 1) == {"accuracy": 0.5}
    assert [(c.name, c.verdict, c.epsilon) for c in store.clients(RUN, 1)] == [
        ("site-a", "accepted", 1.5),
        ("site-b", "accepted", 1.5),
    ]
    assert store.adapter(blob) == b"adapter one"


@pytest.mark.parametrize("fault", ["metric-there", "unknown-client", "bad-value"])
def test_a_commit_that_fails_midway_changes_nothing(store: Store, fault: str) -> None:
    commit = a_commit("33" * 32, "a", "b")
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
    assert store.rounds(RUN)[-1].state == "open"


def test_a_round_is_committed_once(store: Store) -> None:
    store.commit_round(RUN, 1, a_commit("33" * 32, "a"))
    before = everything(store)
    with pytest.raises(StateError, match="not open"):
        store.commit_round(RUN, 1, a_commit("44" * 32, "a"))
    with pytest.raises(StateError, match="committed"):
        store.open_round(Round(run=RUN, number=1, state="open", opened=2.0), [])
    with pytest.raises(StateError, match="not open"):
        store.commit_round(RUN, 2, a_commit("44" * 32))
    assert everything(store) == before


def test_an_aborted_round_is_not_committed_but_reopened(store: Store) -> None:
    store.abort_round(RUN, 1, {"a": {"verdict": "missing"}})
    with pytest.raises(StateError, match="not open"):
        store.commit_round(RUN, 1, a_commit("33" * 32, "a"))
    row, _ = store.open_round(Round(run=RUN, number=1, state="open", opened=9.0), [])
    assert (row.state, row.attempt) == ("open", 2)
    store.commit_round(RUN, 1, a_commit("33" * 32, "a", "b"))
    with pytest.raises(StateError):
        store.abort_round(RUN, 1, {})
    assert store.rounds(RUN)[-1].state == "committed"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE round SET adapter = 'x' WHERE number = 1",
        "UPDATE round SET state = 'open' WHERE number = 1",
        "DELETE FROM round WHERE number = 1",
        "UPDATE OR REPLACE round SET number = 1 WHERE number = 0",
    ],
)
def test_a_committed_round_cannot_be_changed_with_sql(store: Store, statement: str) -> None:
    store.commit_round(RUN, 1, a_commit("33" * 32, "a", "b"))
    before = everything(store)
    with pytest.raises(sqlite3.IntegrityError, match="committed round never"):
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
    store.commit_round(RUN, 1, a_commit("33" * 32, "a", "b"))
    with pytest.raises(sqlite3.IntegrityError):
        raw(store, statement)


def test_a_committed_round_cannot_be_replaced_with_sql(store: Store) -> None:
    store.commit_round(RUN, 1, a_commit("33" * 32, "a", "b"))
    columns = "run, number, state, attempt, opened, seconds, judging_seconds, sent_bytes, received_bytes"
    with pytest.raises(sqlite3.IntegrityError):
        raw(store, f"INSERT OR REPLACE INTO round ({columns}) VALUES ('{RUN}', 1, 'open', 1, 0, 0, 0, 0, 0)")


def test_run_and_number_are_unique(store: Store) -> None:
    columns = "run, number, state, attempt, opened, seconds, judging_seconds, sent_bytes, received_bytes"
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        raw(store, f"INSERT INTO round ({columns}) VALUES ('{RUN}', 1, 'open', 1, 0, 0, 0, 0, 0)")
    with pytest.raises(StateError, match="refused"):
        store.start_run(a_run(), ADAPTER)
    assert [r.number for r in store.rounds(RUN)] == [0, 1]


def test_reopening_gives_a_new_attempt_at_the_same_work(store: Store, tmp_path: Path) -> None:
    store.close()
    again = Store(tmp_path)
    others = [a_client("a", core='{"other": 1}'), a_client("z")]
    row, clients = again.open_round(Round(run=RUN, number=1, state="open", parent="x", opened=50.0), others)
    assert (row.attempt, row.opened, row.parent) == (2, 2.0, None)
    assert [(c.client, c.core) for c in sorted(clients, key=lambda c: c.client)] == [("a", "{}"), ("b", "{}")]
    assert again.open_round(Round(run=RUN, number=1, state="open", opened=60.0), [])[0].attempt == 3
    again.close()


def test_find_run_by_prefix(store: Store) -> None:
    assert store.find_run(None).id == RUN
    store.start_run(a_run("ac" * 16, created=5.0), ADAPTER)
    assert store.find_run(None).id == "ac" * 16
    assert store.find_run("ab").id == RUN
    for name in ("a", "ff", ""):
        with pytest.raises(InputError) as caught:
            store.find_run(name)
        assert caught.value.exit_code == 2
    with pytest.raises(InputError, match="several runs begin so"):
        store.find_run("a")


def test_find_run_in_an_empty_registry(tmp_path: Path) -> None:
    SigningKey.generate().save(tmp_path / "sign.key")
    store = Store(tmp_path)
    with pytest.raises(InputError, match="no such run"):
        store.find_run(None)
    store.close()


def test_asked_is_over_all_runs(store: Store) -> None:
    store.start_run(a_run("cd" * 16), ADAPTER)
    store.open_round(Round(run="cd" * 16, number=1, state="open", opened=2.0), [a_client("a", run="cd" * 16)])
    assert sorted(c.run for c in store.asked("a")) == [RUN, "cd" * 16]
    assert [c.run for c in store.asked("b")] == [RUN]
    assert store.asked("nobody") == []


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
    store.blobs.path(zero.adapter or "").unlink()
    with pytest.raises(VerificationError, match="missing"):
        store.adapter(zero.adapter or "")


def test_only_its_owner_reads_the_registry(store: Store, tmp_path: Path) -> None:
    assert (tmp_path / "registry.db").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "blobs").stat().st_mode & 0o777 == 0o700
    assert store.blobs.path(store.rounds(RUN)[0].adapter or "").stat().st_mode & 0o777 == 0o600


def test_a_damaged_registry_is_a_state_error(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StateError, match="cannot be opened"):
        Store(tmp_path)


def test_two_stores_at_once_commit_once(store: Store) -> None:
    """Two coordinators on one folder: of two commits of the same round exactly one wins."""
    others = [Store(store.home) for _ in range(4)]
    start, outcomes = threading.Barrier(4), list[str]()

    def commit(number: int) -> None:
        start.wait()
        try:
            others[number].commit_round(RUN, 1, a_commit(f"{number}" * 64, "a", "b"))
            outcomes.append(f"{number}" * 64)
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
from cloister_server.store import Store
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
        store.commit_round(RUN, 1, a_commit("33" * 32, "a", "b", metrics=metrics))
        out, err = reader.communicate(timeout=60)
    assert err == ""
    seen, row = out.split(maxsplit=1)
    assert int(seen) <= 2
    assert row.strip() == f"(1, 'committed', '{'33' * 32}') 200"


def test_an_interrupted_writer_leaves_the_old(store: Store) -> None:
    """A process killed inside its transaction leaves what was committed before, and the registry usable."""
    script = (
        "import os, sqlite3, sys\n"
        "db = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "db.execute('PRAGMA cache_size=1')\n"
        "db.execute('BEGIN IMMEDIATE')\n"
        "db.execute(\"UPDATE round_client SET verdict = 'half'\")\n"
        "db.executemany('INSERT INTO metric VALUES (?, 1, ?, 1.0)', [(sys.argv[2], str(i) * 50) for i in range(500)])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    before = everything(store)
    done = subprocess.run([sys.executable, "-c", script, str(store.home / "registry.db"), RUN])
    assert done.returncode == -9
    assert everything(store) == before
    store.commit_round(RUN, 1, a_commit("33" * 32, "a", "b"))
    assert store.last_committed(RUN).number == 1
