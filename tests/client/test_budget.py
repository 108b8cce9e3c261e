"""The ledger: what is reserved counts for good, through crashes and races, and the cap holds."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import pytest
from cloister_client.budget import Ledger
from cloister_client.standing import Limits
from cloister_model.text import Source
from cloister_shared.errors import RefusedError, StateError
from cloister_shared.privacy import DpSgd, epsilon
from cloister_shared.signing import SigningKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import client_budget_worker
from support.client_ledgers import DELTA, core, event, open_ledger, tags

UPDATE = "ab" * 32
CAP = 0.9  # twelve steps of the usual kind fit, thirteen do not


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A fresh ledger."""
    return open_ledger(tmp_path, CAP)


def _again(ledger: Ledger, cap: float | None = None) -> Ledger:
    """The same file as a new process finds it, open reservations closed."""
    fresh = open_ledger(ledger.path.parent, cap if cap is not None else ledger.limits.cap)
    fresh.close_open()
    return fresh


def _states(ledger: Ledger) -> list[str]:
    with sqlite3.connect(ledger.path) as db:
        found = [str(row[0]) for row in db.execute("SELECT state FROM entry ORDER BY id")]
    db.close()
    return found


def _refused(ledger: Ledger, number: int, *, steps: int = 1, rounds_per_day: int = 1000) -> str:
    with pytest.raises(RefusedError) as refused:
        ledger.reserve(core(number, steps=steps), rounds_per_day)
    return refused.value.rule


def test_an_empty_ledger_has_spent_nothing(ledger: Ledger) -> None:
    standing = ledger.standing()
    assert (standing.epsilon, standing.cap, standing.delta, standing.rounds, standing.steps) == (0.0, CAP, DELTA, 0, 0)
    assert standing.left == CAP


def test_the_charge_is_the_epsilon_of_the_whole_history(ledger: Ledger) -> None:
    history: list[DpSgd] = []
    for number, (steps, sigma) in enumerate(((3, 4.0), (2, 6.0), (3, 4.0)), start=1):
        entry = ledger.reserve(core(number, steps=steps, sigma=sigma), 1000).entry
        history.append(event(steps, sigma))
        assert ledger.standing().epsilon == epsilon(history, DELTA)
        ledger.spend(entry, UPDATE)
        assert ledger.standing().epsilon == epsilon(history, DELTA)
    standing = ledger.standing()
    assert (standing.rounds, standing.steps) == (3, 8)
    assert standing.left == CAP - standing.epsilon
    assert _states(ledger) == ["spent"] * 3


def test_a_round_over_the_cap_is_refused_and_reserves_nothing(ledger: Ledger) -> None:
    ledger.spend(ledger.reserve(core(1, steps=2), 1000).entry, UPDATE)
    before = ledger.standing()
    with pytest.raises(RefusedError) as refused:
        ledger.reserve(core(2, steps=100), 1000)
    assert refused.value.rule == "budget.epsilon_cap"
    assert f"epsilon <= {CAP:g}" in refused.value.expected
    assert float(refused.value.got.split()[0]) > CAP
    assert ledger.standing() == before
    assert not ledger.charged_for(core(2).run, 2)
    ledger.reserve(core(2, steps=1), 1000)


def test_a_round_has_one_work(ledger: Ledger) -> None:
    """A coordinator whose registry was put back may ask for another in its place."""
    first, other = core(1, steps=1), core(1, steps=2)
    ledger.lose(ledger.reserve(first, 1000).entry)
    with pytest.raises(RefusedError) as refused:
        ledger.reserve(other, 1000)
    assert refused.value.rule == "budget.other_work"
    assert ledger.charged_for(other.run, 1)
    ledger.reserve(first, 1000)


def test_what_was_given_back_was_no_work_of_its_round(ledger: Ledger) -> None:
    ledger.void(ledger.reserve(core(1, steps=1), 1000).entry, SigningKey.generate())
    ledger.reserve(core(1, steps=2), 1000)


def test_an_attempt_is_new_once_and_attempts_only_grow(ledger: Ledger) -> None:
    plan, other, before = "ab" * 32, "cd" * 32, ledger.records()
    assert [ledger.attempted(plan, n) for n in (2, 2, 1, 3, 3)] == [True, False, False, True, False]
    assert ledger.attempted(other, 1)
    assert not _again(ledger).attempted(plan, 3)
    assert ledger.records() == before
    for statement in (
        "DELETE FROM attempt",
        "UPDATE attempt SET newest = 2",
        "UPDATE attempt SET plan = 'ef', newest = 9",
        f"INSERT OR REPLACE INTO attempt VALUES ('{plan}', 1)",
    ):
        with closing(sqlite3.connect(ledger.path)) as db, pytest.raises(sqlite3.IntegrityError):
            db.execute(statement)


def test_open_reservations_count_against_the_cap_at_once(ledger: Ledger) -> None:
    ledger.reserve(core(1, steps=12), 1000)
    assert _refused(ledger, 2) == "budget.epsilon_cap"
    assert _refused(_again(ledger), 2) == "budget.epsilon_cap"


def test_lost_and_open_reservations_stay_charged_when_the_ledger_is_opened_again(ledger: Ledger) -> None:
    first, second = (ledger.reserve(core(n), 1000).entry for n in (1, 2))
    ledger.lose(first)
    charged = epsilon([event(2)], DELTA)
    assert ledger.standing().epsilon == charged
    assert _states(ledger) == ["lost", "reserved"]
    assert open_ledger(ledger.path.parent, CAP).standing().epsilon == charged
    assert _states(ledger) == ["lost", "reserved"]
    assert open_ledger(ledger.path.parent, CAP).close_open() == 1
    assert open_ledger(ledger.path.parent, CAP).close_open() == 0
    assert _states(ledger) == ["lost", "lost"]
    assert ledger.standing().epsilon == charged
    with pytest.raises(StateError, match="no open reservation"):
        ledger.spend(second, UPDATE)


def test_work_that_was_lost_may_be_done_again_and_is_charged_again(ledger: Ledger) -> None:
    ledger.lose(ledger.reserve(core(1), 1000).entry)
    ledger.spend(ledger.reserve(core(1), 1000).entry, UPDATE)
    assert ledger.standing().epsilon == epsilon([event(2)], DELTA)
    assert _refused(ledger, 1) == "budget.already_done"


@pytest.mark.parametrize("spent", [False, True])
def test_the_same_work_is_never_reserved_twice(ledger: Ledger, spent: bool) -> None:
    entry = ledger.reserve(core(1), 1000).entry
    if spent:
        ledger.spend(entry, UPDATE)
    assert _refused(ledger, 1) == "budget.already_done"
    assert ledger.standing().rounds == 1
    assert ledger.charged_for(core(1).run, 1)
    assert not ledger.charged_for(core(2).run, 2)


@pytest.mark.parametrize("entry", [0, 2, 99])
def test_only_an_open_reservation_is_spent(ledger: Ledger, entry: int) -> None:
    ledger.spend(ledger.reserve(core(1), 1000).entry, UPDATE)
    with pytest.raises(StateError, match="no open reservation"):
        ledger.spend(entry, UPDATE)
    with pytest.raises(StateError, match="no open reservation"):
        ledger.spend(1, UPDATE)
    ledger.lose(1)
    assert _states(ledger) == ["spent"]


def test_rounds_per_day(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        ledger.reserve(core(number), 2)
    assert _refused(ledger, 3, rounds_per_day=2) == "policy.rounds_per_day"
    assert ledger.standing().rounds == 2
    tomorrow = time.time() + 86_500
    monkeypatch.setattr("cloister_client.budget.time.time", lambda: tomorrow)
    for number in (3, 4):
        ledger.reserve(core(number), 2)
    assert _refused(ledger, 5, rounds_per_day=2) == "policy.rounds_per_day"


TAMPERING = [
    "DELETE FROM entry",
    "DELETE FROM entry WHERE state = 'lost'",
    "UPDATE entry SET state = 'reserved', update_digest = NULL WHERE state = 'spent'",
    "UPDATE entry SET state = 'lost', update_digest = NULL WHERE state = 'spent'",
    "UPDATE entry SET state = 'reserved' WHERE state = 'lost'",
    "UPDATE entry SET steps = 1 WHERE state = 'reserved'",
    "UPDATE entry SET noise_multiplier = 100.0 WHERE state = 'reserved'",
    "UPDATE entry SET sample_rate = 0.001 WHERE state = 'reserved'",
    "UPDATE entry SET steps = 1 WHERE state = 'spent'",
    "UPDATE entry SET state = 'refunded' WHERE state = 'reserved'",
    "UPDATE entry SET state = 'spent' WHERE state = 'reserved'",
    "UPDATE entry SET state = 'void' WHERE state IN ('spent', 'lost')",
    "INSERT INTO charge SELECT entry, 2, cap + 1, cap, delta FROM charge WHERE entry = 2",
    "DELETE FROM charge",
    "UPDATE charge SET admitted = 0",
    "UPDATE charge SET block = 2",
    "DELETE FROM event",
    "UPDATE event SET head = zeroblob(32)",
    "DELETE FROM unit",
    "UPDATE unit SET block = 2",
    "REPLACE INTO unit SELECT tag, 2 FROM unit",
    "DELETE FROM block",
]


@pytest.mark.parametrize("statement", TAMPERING)
def test_entries_are_neither_deleted_nor_reopened_nor_made_cheaper(ledger: Ledger, statement: str) -> None:
    ledger.spend(ledger.reserve(core(1, steps=2), 1000).entry, UPDATE)
    ledger.lose(ledger.reserve(core(2, steps=2), 1000).entry)
    ledger.reserve(core(3, steps=2), 1000)
    before = ledger.standing()
    db = sqlite3.connect(ledger.path)
    with pytest.raises(sqlite3.IntegrityError):
        db.execute(statement)
    db.rollback()
    db.close()
    assert ledger.standing() == before


@pytest.mark.parametrize("place", ["id", "NULL"])
def test_entries_are_not_replaced(ledger: Ledger, place: str) -> None:
    """Neither by their number nor by a cheaper entry for the same work."""
    ledger.spend(ledger.reserve(core(1, steps=2), 1000).entry, UPDATE)
    before = ledger.standing()
    db = sqlite3.connect(ledger.path)
    try:
        with pytest.raises(sqlite3.IntegrityError):
            db.execute(
                f"REPLACE INTO entry SELECT {place}, state, run, round, plan, base, 900.0, sample_rate, steps, record,"
                " update_digest, reserved_at, closed_at FROM entry WHERE id = 1"
            )
    finally:
        db.close()
    assert ledger.standing() == before


def test_the_file_is_the_owners_alone(ledger: Ledger) -> None:
    ledger.reserve(core(1), 1000)
    assert ledger.path.stat().st_mode & 0o777 == 0o600
    old = os.umask(0)
    try:
        other = Ledger(ledger.path.with_name("other.db"), ledger.path.with_name("other.json"), Limits(CAP, DELTA))
    finally:
        os.umask(old)
    assert other.path.stat().st_mode & 0o777 == 0o600


def test_a_lower_cap_holds_for_an_older_history(ledger: Ledger) -> None:
    ledger.spend(ledger.reserve(core(1, steps=2), 1000).entry, UPDATE)
    strict = _again(ledger, cap=0.1)
    assert strict.standing().left == 0.0
    assert _refused(strict, 2) == "budget.epsilon_cap"
    assert _again(ledger, cap=CAP).reserve(core(2), 1000).entry == 2


def test_a_file_that_is_no_ledger_is_told_in_one_error(tmp_path: Path, ledger: Ledger) -> None:
    (tmp_path / "broken.db").write_bytes(b"this is no database, however long one looks at it" * 100)
    with pytest.raises(StateError, match="ledger cannot be used"):
        Ledger(tmp_path / "broken.db", tmp_path / "counter.json", Limits(CAP, DELTA))
    assert open_ledger(ledger.path.parent, CAP).standing().rounds == 0


@pytest.mark.parametrize("name", ["nowhere/ledger.db", "."])
def test_a_file_that_cannot_be_opened_is_told_in_one_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(StateError, match="ledger cannot be used"):
        Ledger(tmp_path / name, tmp_path / "counter.json", Limits(CAP, DELTA))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_refuses_the_reservation_and_leaves_the_ledger_whole(tmp_path: Path) -> None:
    """A file size limit makes SQLite's writes fail as a full disk does."""
    path = tmp_path / "ledger.db"
    open_ledger(tmp_path, CAP).reserve(core(1), 1000)
    before = path.stat().st_size
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from cloister_shared.errors import StateError\n"
        "from support.client_ledgers import core, open_ledger\n"
        "ledger = open_ledger(Path(sys.argv[1]), 50.0)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "for number in range(2, 40):\n"
        "    try:\n"
        "        ledger.reserve(core(number), 1000)\n"
        "    except StateError as error:\n"
        "        print('told:', error)\n"
        "        break\n"
    )
    done = _python(["-c", script, str(tmp_path), str(before)])
    assert done.returncode == 0, done.stderr
    assert "told:" in done.stdout
    assert "the ledger cannot be used" in done.stdout
    whole = open_ledger(tmp_path, CAP)
    assert whole.standing().rounds >= 1
    whole.reserve(core(1000), 1000)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.integers(1, 6), st.integers(1, 4)),
        st.tuples(st.sampled_from(["spend", "lose", "crash"]), st.integers(1, 6), st.just(0)),
    ),
    max_size=14,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_whatever_happens_nothing_spent_is_forgotten_and_the_cap_holds(story: list[tuple[str, int, int]]) -> None:
    cap = 0.6  # five steps
    with tempfile.TemporaryDirectory() as folder:
        ledger = open_ledger(Path(folder), cap)
        opened: dict[int, tuple[int, int]] = {}
        charged, spent = 0, 0
        for what, number, steps in story:
            if what == "reserve":
                try:
                    opened[number] = (ledger.reserve(core(number, steps=steps, run=f"{number:02x}"), 1000).entry, steps)
                    charged += steps
                except RefusedError as error:
                    refused = error.rule
                else:
                    refused = ""
                over = refused == "" or epsilon([event(charged + steps)], DELTA) > cap
                assert over or refused in ("budget.already_done", "budget.other_work")
            elif what == "crash":
                ledger = _again(ledger)
                opened.clear()
            elif number in opened:
                entry, steps_of = opened.pop(number)
                if what == "spend":
                    ledger.spend(entry, UPDATE)
                    spent += steps_of
                else:
                    ledger.lose(entry)
            now = ledger.standing()
            assert now.steps == charged >= spent
            assert now.epsilon <= cap
            assert now.epsilon >= (epsilon([event(spent)], DELTA) if spent else 0.0)
        final = _again(ledger).standing()
        assert final.epsilon == (epsilon([event(charged)], DELTA) if charged else 0.0)


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def _python(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=_environment(), capture_output=True, text=True, timeout=60, check=False
    )


def test_eight_processes_that_race_never_overspend(tmp_path: Path) -> None:
    fits, rounds = 5, 2
    cap = 0.6
    done = _python([client_budget_worker.__file__, "race", str(tmp_path), str(cap), str(rounds)])
    assert done.returncode == 0, done.stderr
    racers = client_budget_worker.RACERS
    assert sorted(done.stdout.split()) == ["budget.epsilon_cap"] * (racers * rounds - fits) + ["granted"] * fits
    standing = open_ledger(tmp_path, cap).standing()
    assert standing.rounds == fits
    assert standing.epsilon == epsilon([event(fits)], DELTA) <= cap
    assert epsilon([event(fits + 1)], DELTA) > cap
    assert _states(open_ledger(tmp_path, cap)) == ["spent"] * fits


def test_eight_processes_race_for_two_blocks_and_a_period(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The older block has two steps of its life left, the newer one four of its period."""
    cap, period_cap = (sum(epsilon([event(n + i)], DELTA) for i in (0, 1)) / 2 for n in (5, 4))
    with closing(open_ledger(tmp_path, cap)) as ledger, monkeypatch.context() as earlier:
        past = time.time() - 60 * 86_400
        earlier.setattr("cloister_client.budget.time.time", lambda: past)
        ledger.spend(ledger.reserve(core(1, steps=3, run="ff"), 1000).entry, UPDATE)
        ledger.register(Source(Path("/more.jsonl"), "text", ""), tags(8, 9), "newer")
    done = _python([client_budget_worker.__file__, "race", str(tmp_path), str(cap), "2", str(period_cap)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split().count("granted") == 4
    older, newer = open_ledger(tmp_path, cap, period_days=30, period_cap=period_cap).standings()
    assert (older.steps, newer.steps) == (5, 4)
    assert older.epsilon == epsilon([event(5)], DELTA) <= cap
    assert older.period_epsilon == epsilon([event(2)], DELTA)
    assert newer.period_epsilon == newer.epsilon == epsilon([event(4)], DELTA) <= period_cap


def test_a_process_killed_between_reserving_and_spending_stays_charged(tmp_path: Path) -> None:
    done = _python([client_budget_worker.__file__, "die", str(tmp_path), str(CAP), "1"])
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "granted\n"
    ledger = open_ledger(tmp_path, CAP)
    assert _states(ledger) == ["reserved"]
    assert ledger.standing().epsilon == epsilon([event(1)], DELTA)
    assert ledger.close_open() == 1
    assert _states(ledger) == ["lost"]
    assert ledger.standing().epsilon == epsilon([event(1)], DELTA)
