"""Faults: each syscall of a commit failed once, a full disk, deaths at any moment, in each state of a round, clocks that are a day off."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from cloister_server.fsck import check
from cloister_server.rounds import run_rounds
from cloister_server.storage import write_storage
from cloister_server.store import Store
from cloister_server.tables import Run
from cloister_shared.audit.bundle import Bundle, SignedLeaf, SiteLog
from cloister_shared.audit.command import audit
from cloister_shared.audit.trust import trust_of
from cloister_shared.encoding import digest
from cloister_shared.signing import SigningKey

from support import fault_worker
from support.client_ledgers import core, open_ledger
from support.registry import a_model, a_row, planned
from support.server_world import make_world

NEEDED = "CLOISTER_TEST_STRACE"
RUN = fault_worker.RUN
# Whatever a commit asks of the file system; each is failed at each of its calls.
CALLS = (
    "openat", "pread64", "pwrite64", "write", "fsync", "fdatasync", "unlink", "rename", "ftruncate", "mkdir", "fcntl",
    "newfstatat", "utimensat", "chmod",
)  # fmt: skip


def a_registry(home: Path, clients: int = 1) -> None:
    """A registry whose round 1 is about to be committed."""
    home.mkdir(parents=True, exist_ok=True)
    SigningKey.generate().save(home / "sign.key")
    store = Store(home)
    texts = dict.fromkeys(("federation", "base", "task", "rule", "tensors", "config", "code"), "{}")
    store.start_run(Run.model_validate(texts | {"id": RUN, "created": 1.0, "rounds": 900}), b"zero", a_model())
    planned(store, RUN, 1, [a_row(1, chr(97 + i)) for i in range(clients)])
    store.close()


class Worker:
    """The forking worker, and strace on its children.

    Args:
        kind: ``registry`` or ``ledger``.
    """

    def __init__(self, kind: str) -> None:
        command = [sys.executable, "-m", "support.fault_worker", kind]
        places = os.pathsep.join(str(Path(__file__).parents[2] / p) for p in ("tests", "server", "client", "shared"))
        environment = os.environ | {"PYTHONPATH": places}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def said(self) -> str:
        """Its next word's argument."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().partition(" ")[2]

    def traced(self, folder: Path, *options: str) -> list[str]:
        """One child in ``folder`` under strace with these options; what came of its tries."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        pid = int(self.said())
        command = ["strace", "-f", "-p", str(pid), "-o", str(folder / "trace"), "-e", f"trace={','.join(CALLS)}"]
        with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            first = strace.stderr.readline()
            assert "attached" in first, first
            os.kill(pid, signal.SIGCONT)
            said = json.loads(self.said())
            strace.stderr.read()
        assert isinstance(said, list)
        return said

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(params=["registry", "ledger"])
def worker(request: pytest.FixtureRequest) -> Iterator[tuple[str, Worker]]:
    """A worker of each kind."""
    if shutil.which("strace") is None:
        assert not os.environ.get(NEEDED), f"{NEEDED} is set and strace is not installed"
        pytest.skip("strace is not installed")
    made = Worker(request.param)
    yield request.param, made
    made.close()


def start(kind: str, folder: Path) -> None:
    """What the worker's child finds."""
    if kind == "registry":
        a_registry(folder)
    else:
        folder.mkdir()
        open_ledger(folder, 900.0).close()


def look(kind: str, folder: Path, said: list[str]) -> None:
    """Opens it as the next process would: whole, with all that was acknowledged, and ready to go on."""
    assert not any(word.startswith("crashed") for word in said), said
    if kind == "registry":
        store = Store(folder)
        wrong = list(check(store))
        assert wrong == [], (said, wrong)
        state = store.rounds(RUN)[1].state
        assert (state == "committed") or said[-1] != "done", said
        if state != "committed":
            planned(store, RUN, 1)
            fault_worker.commit(store)
        assert sum(leaf.kind == "round_commit" for leaf in store.leaves()) == 1
        store.close()
        return
    ledger = open_ledger(folder, 900.0)
    ledger.close_open(None)
    spent = ledger.spent_on(core(1).digest)
    assert spent == fault_worker.UPDATE or said[-1] != "done", said
    assert ledger.standing().rounds <= 1
    ledger.close()


def calls_of(trace: Path) -> Counter[str]:
    """How often each call was made."""
    return Counter(m[1] for line in trace.read_text().splitlines() if (m := re.match(r"\d+ +(\w+)\(", line)))


def test_each_file_syscall_of_a_commit_failed_once_leaves_all_whole(worker: tuple[str, Worker], tmp_path: Path) -> None:
    """Every one of them, with EIO and where it asks for room with ENOSPC; the same process goes on at once, or says why not."""
    kind, made = worker
    start(kind, tmp_path / "start")
    plain = tmp_path / "plain"
    shutil.copytree(tmp_path / "start", plain)
    assert made.traced(plain) == ["done"]
    counts = calls_of(plain / "trace")
    assert counts["fsync"] + counts["fdatasync"] >= 2
    assert counts["pwrite64"] >= 2
    cases = [(call, nth, "EIO") for call, count in counts.items() for nth in range(1, count + 1) if call != "fcntl"]
    cases += [(call, nth, "ENOSPC") for call, nth, _ in cases if call in ("pwrite64", "write", "openat", "mkdir")]
    refused = 0
    for number, (call, nth, error) in enumerate(cases):
        folder = tmp_path / f"case-{number}"
        shutil.copytree(tmp_path / "start", folder)
        said = made.traced(folder, "-e", f"inject={call}:error={error}:when={nth}")
        assert "INJECTED" in (folder / "trace").read_text(), (call, nth)
        refused += said[0] != "done"
        try:
            look(kind, folder, said)
        except AssertionError as failure:
            raise AssertionError(f"{kind}: call {nth} of {call} with {error}: {said}") from failure
        shutil.rmtree(folder)
    # Most failures are told; those that are not (a hint, a file that is looked for) change nothing.
    assert refused > len(cases) / 3


def test_a_disk_that_is_full_from_some_point_on_refuses_and_later_goes_on(
    worker: tuple[str, Worker], tmp_path: Path
) -> None:
    kind, made = worker
    start(kind, tmp_path / "start")
    plain = tmp_path / "plain"
    shutil.copytree(tmp_path / "start", plain)
    made.traced(plain)
    writes = calls_of(plain / "trace")["pwrite64"]
    for nth in range(1, writes + 1):
        folder = tmp_path / f"full-{nth}"
        shutil.copytree(tmp_path / "start", folder)
        said = made.traced(folder, "-e", f"inject=pwrite64,write:error=ENOSPC:when={nth}+")
        assert len(said) == 2 or said == ["done"], said
        look(kind, folder, said)


KILLED = """
import sys
from pathlib import Path
from cloister_server.store import Commit, Store
from cloister_server.tables import AGGREGATING, OPEN, Round
from support.registry import a_cost, a_row
store, run = Store(Path(sys.argv[1])), "ab" * 16
number = store.last_committed(run).number
while True:
    number += 1
    store.plan_round(Round(run=run, number=number, opened=1.0), [a_row(number, "a")])
    store.advance(run, number, OPEN)
    store.advance(run, number, AGGREGATING)
    name = store.blobs.put(b"adapter %d" % number)
    changes, costs = {"a": {"verdict": "accepted"}}, [a_cost(number, "a", run)]
    store.commit_round(run, number, Commit(name, 1.0, 0.0, changes, {}, privacy=costs))
    print(number, flush=True)
    store.set_alias("newest", run, number, name, (store.alias("newest") or type("", (), {"version": 0})).version, "")
"""


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_coordinator_killed_at_any_moment_loses_nothing_that_it_acknowledged(
    request: pytest.FixtureRequest, tmp_path: Path, database: str
) -> None:
    home = tmp_path / "coordinator"
    home.mkdir()
    if database == "postgresql":
        write_storage(home, request.getfixturevalue("postgres").database(), "")
    a_registry(home)
    tests = str(Path(__file__).parents[1])
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")  # shown where it fails
    rng, last = random.Random(seed), 0
    for _ in range(12):
        command = [sys.executable, "-c", KILLED, str(home)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": tests}
        ) as child:
            assert child.stdout is not None
            acknowledged = [child.stdout.readline() for _ in range(rng.randrange(1, 4))]
            spin = time.perf_counter() + rng.random() * 0.03  # anywhere in the next round's transactions
            while time.perf_counter() < spin:
                pass
            child.kill()
            acknowledged += child.stdout.readlines()
        told = [int(line) for line in acknowledged if line.endswith("\n")]
        assert told, "it never got as far as a commit"
        store = Store(home)
        assert list(check(store)) == []
        assert store.last_committed(RUN).number >= max(told) > last
        last = store.last_committed(RUN).number
        commits = [json.loads(x.record)["round"] for x in store.leaves() if x.kind == "round_commit"]
        assert commits == list(range(1, last + 1))
        store.close()


STATES = ("planned", "open", "aggregating")


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
@pytest.mark.parametrize("state", STATES)
def test_a_round_whose_coordinator_died_in_a_state_is_planned_anew_or_aborted_and_committed_once(
    request: pytest.FixtureRequest, tmp_path: Path, database: str, state: str
) -> None:
    home = tmp_path / "coordinator"
    home.mkdir()
    if database == "postgresql":
        write_storage(home, request.getfixturevalue("postgres").database(), "")
    a_registry(home)
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom cloister_server.store import Store\n"
        "from cloister_server.tables import Round\n"
        "store = Store(Path(sys.argv[1]))\nstore.take_fence()\n"
        "store.plan_round(Round(run=sys.argv[2], number=1, opened=1.0), [])\n"
        "for state in ('open', 'aggregating')[: int(sys.argv[3])]:\n    store.advance(sys.argv[2], 1, state)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(home), RUN, str(STATES.index(state))])
    assert done.returncode == -9
    store = Store(home)
    assert (store.rounds(RUN)[1].state, store.rounds(RUN)[1].attempt) == (state, 2)
    store.take_fence()
    store.abort_round(RUN, 1, {})
    assert store.rounds(RUN)[1].state == "aborted"
    assert planned(store, RUN, 1).attempt == 3
    fault_worker.commit(store)
    assert [json.loads(x.record)["round"] for x in store.leaves() if x.kind == "round_commit"] == [1]
    assert list(check(store)) == []
    store.close()


@pytest.mark.parametrize("off", [-86_400.0, 86_400.0])
def test_order_is_by_index_where_a_clock_is_a_day_off(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    """The coordinator's clock jumps between two rounds: history stays whole for sites, fsck and an auditor."""
    world = make_world(tmp_path, tiny_bert, sites=2, rounds=3)
    world.store.log_members(world.coordinator.sites)
    jumps = iter(range(1_000_000))
    clock = SimpleNamespace(time=lambda: time.time() + (off if next(jumps) % 2 else 0.0))
    monkeypatch.setattr("cloister_server.log.time", clock)
    run_rounds(world.context(), world.link)
    monkeypatch.undo()
    times = [json.loads(leaf.record)["at"] for leaf in world.store.leaves()]
    assert times != sorted(times)
    assert list(check(world.store)) == []
    leaves = tuple(SignedLeaf(x.record, x.key, x.signature) for x in world.store.leaves())
    sites = {
        world.id_of(n): SiteLog(tuple(d.ledger.records()), d.ledger.head(d.witness.name).signed(d.signing))
        for n, d in world.desks.items()
    }
    keys = {m.id: (m.card.name, m.card.verify_key) for m in world.members}
    at = world.store.checkpoint()
    trust = trust_of("fed", world.coordinator.signing.verify_key, keys, [at])
    bundle = Bundle(1.0, leaves, world.store.signed_checkpoint(at), world.store.cosignatures(), sites)
    assert audit(bundle, trust).findings.exit_code == 0


def test_gc_and_fsck_survive_blobs_that_are_missing_or_damaged(tmp_path: Path) -> None:
    a_registry(tmp_path)
    store = Store(tmp_path)
    fault_worker.commit(store)
    path = Path(store.blobs.address(digest(fault_worker.ADAPTER)))
    for damage in (lambda: path.write_bytes(b"x" * path.stat().st_size), path.unlink):
        damage()
        found = [one.what for one in check(store)]
        assert len(found) == 1
        assert found[0] in ("blob was changed", "blob is missing")
    # Whoever makes the same again mends it.
    store.blobs.put(fault_worker.ADAPTER)
    assert list(check(store)) == []
    store.close()
