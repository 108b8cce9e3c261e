"""Whatever order things happen in: the ledger against a simple model, and the faults that the model must find."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cloister_client.budget import Ledger
from cloister_client.standing import Limits, Reservation
from cloister_model.text import Source
from cloister_shared.encoding import canonical, digest, write_durably
from cloister_shared.errors import RefusedError, StateError, VerificationError
from cloister_shared.plan import VOID_PURPOSE, PlanCore
from cloister_shared.privacy import DpSgd, epsilon, epsilon_rdp
from cloister_shared.signing import SigningKey
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.client_ledgers import DELTA, core, event, open_ledger, tags

CAP = 0.6  # five steps of the usual kind
PERIOD = Limits(CAP, DELTA, 10, 0.47)  # and three in any ten days
DAY = 86_400.0
CALM = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
# No power is cut here: what is durable need not be on a disk.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
KEY = SigningKey.generate()


def _fits(steps: int, cap: float) -> bool:
    return steps == 0 or epsilon([event(steps)], DELTA) <= cap


def _reserve(ledger: Ledger, plan: PlanCore) -> tuple[str, Reservation | None]:
    try:
        return "", ledger.reserve(plan, 1_000_000)
    except RefusedError as refused:
        return refused.rule, None


class Budget(RuleBasedStateMachine):
    """The ledger and a model that only counts: per block, steps and when; per entry, what has become of it."""

    ledger_type: type[Ledger] = Ledger
    plans = Bundle("plans")
    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="clstm", dir=MEMORY))
        (self.folder / "counter").mkdir()
        self.now = 1_000_000.0
        self.clock = mock.patch("cloister_client.budget.time.time", self._time)
        self.clock.start()
        self.blocks: dict[int, set[int]] = {}
        self.charged: dict[int, tuple[PlanCore, float, tuple[int, ...]]] = {}
        self.state: dict[int, str] = {}
        self.released: list[tuple[PlanCore, tuple[int, ...]]] = []
        self.newest: dict[str, int] = {}
        self.own: set[int] = set()
        self.ledger = self._open()

    def _time(self) -> float:
        return self.now

    def _open(self) -> Ledger:
        return self.ledger_type(self.folder / "ledger.db", self.folder / "counter" / "ledger.json", PERIOD)

    def teardown(self) -> None:
        self.clock.stop()
        self.ledger.close()
        shutil.rmtree(self.folder)

    def _steps(self, block: int, since: float = 0.0) -> int:
        return sum(
            plan.training.steps
            for entry, (plan, at, blocks) in self.charged.items()
            if block in blocks and at > since and self.state[entry] != "void"
        )

    @initialize(units=st.sets(st.integers(1, 6), min_size=1))
    def first_text(self, units: set[int]) -> None:
        self.register(units)

    @rule(units=st.sets(st.integers(1, 12), min_size=1))
    def register(self, units: set[int]) -> None:
        known = set().union(*self.blocks.values())
        name, new = self.ledger.register(Source(Path(f"/{len(units)}.jsonl"), "text", ""), tags(*units))
        assert new == len(units - known)
        self.blocks[len(self.blocks) + 1] = units - known
        assert name == f"block-{len(self.blocks)}"

    @rule(target=plans, number=st.integers(1, 6), steps=st.integers(1, 3), run=st.sampled_from(["0a", "0b"]))
    def plan(self, number: int, steps: int, run: str) -> PlanCore:
        return core(number, steps=steps, run=run)

    def _allowed(self, plan: PlanCore) -> tuple[str, tuple[int, ...]]:
        done = {self.charged[e][0].digest for e, state in self.state.items() if state in ("reserved", "spent")}
        if plan.digest in done:
            return "budget.already_done", ()
        if plan.round < self.newest.get(plan.run, 0):
            return "budget.round_order", ()
        steps = plan.training.steps
        bear = tuple(
            block
            for block in self.blocks
            if _fits(self._steps(block) + steps, PERIOD.cap)
            and _fits(self._steps(block, self.now - PERIOD.period_days * DAY) + steps, PERIOD.period_cap)
        )
        return ("" if bear else "budget.epsilon_cap"), bear

    @rule(target=held, plan=plans)
    def reserve(self, plan: PlanCore) -> Any:
        rule_of, bear = self._allowed(plan)
        told, made = _reserve(self.ledger, plan)
        assert told == rule_of
        if made is None:
            return multiple()
        assert (made.blocks, made.left_out) == (bear, tuple(b for b in self.blocks if b not in bear))
        assert made.entry == len(self.charged) + 1
        self.charged[made.entry] = (plan, self.now, bear)
        self.state[made.entry] = "reserved"
        self.newest[plan.run] = max(plan.round, self.newest.get(plan.run, 0))
        self.own.add(made.entry)
        return made.entry

    @rule(target=held, steps=st.integers(1, 3))
    def reserve_the_next_round(self, steps: int) -> Any:
        return self.reserve(core(self.newest.get("0c" * 16, 0) + 1, steps=steps, run="0c"))

    @rule(entry=held)
    def spend_and_release(self, entry: int) -> None:
        update = f"{entry:064x}"
        if self.state[entry] == "reserved":
            self.ledger.spend(entry, update)
            self.state[entry] = "spent"
            self.released.append((self.charged[entry][0], self.charged[entry][2]))
            assert self.ledger.spent_on(self.charged[entry][0].digest) == update
        else:
            with pytest.raises(StateError):
                self.ledger.spend(entry, update)

    @rule(entry=held)
    def lose(self, entry: int) -> None:
        self.ledger.lose(entry)
        if self.state[entry] == "reserved":
            self.state[entry] = "lost"

    @rule(entry=consumes(held))
    def void(self, entry: int) -> None:
        if self.state[entry] == "reserved" and entry in self.own:
            self.ledger.void(entry, KEY)
            self.state[entry] = "void"
        else:
            with pytest.raises(StateError):
                self.ledger.void(entry, KEY)

    @rule(kept=st.booleans())
    def crash(self, kept: bool) -> None:
        """The agent dies and starts again; with ``kept``, the newest open reservation's update was on disk."""
        self.ledger.close()
        opened = [entry for entry, state in self.state.items() if state == "reserved"]
        folder = self.folder / "kept"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        if kept and opened:
            plan = self.charged[opened[-1]][0]
            write_durably(folder / f"{plan.digest}.f32", plan.digest.encode())
            self.state[opened[-1]] = "spent"
            self.released.append((plan, self.charged[opened[-1]][2]))
        self.ledger = self._open()
        lost = self.ledger.close_open(folder)
        for entry in opened:
            if self.state[entry] == "reserved":
                self.state[entry] = "lost"
        assert lost == sum(self.state[entry] == "lost" for entry in opened)
        if kept and opened:
            assert self.ledger.spent_on(plan.digest) == digest(plan.digest.encode())
        self.own.clear()

    @rule()
    def open_beside(self) -> None:
        """Another process, `site status`, opens it: nothing is closed by that, and it cannot give back what is not its own."""
        with closing(self._open()) as other:
            assert [s.steps for s in other.standings()] == [self._steps(block) for block in self.blocks]
            for entry, state in self.state.items():
                if state == "reserved":
                    with pytest.raises(StateError):
                        other.void(entry, KEY)

    @rule(days=st.sampled_from([0.5, 3.0, 11.0]))
    def later(self, days: float) -> None:
        self.now += days * DAY

    @precondition(lambda self: self.blocks)
    @invariant()
    def the_model_agrees(self) -> None:
        since = self.now - PERIOD.period_days * DAY
        for standing in self.ledger.standings():
            block = standing.block
            steps = self._steps(block)
            assert standing.units == len(self.blocks[block])
            assert standing.steps == steps
            assert standing.epsilon == (epsilon([event(steps)], DELTA) if steps else 0.0)
            assert standing.epsilon <= CAP
            recent = self._steps(block, since)
            assert standing.period_epsilon == (epsilon([event(recent)], DELTA) if recent else 0.0)
            left = sum(plan.training.steps for plan, blocks in self.released if block in blocks)
            assert standing.epsilon >= (epsilon([event(left)], DELTA) if left else 0.0)
            opened = any(s == "reserved" and block in self.charged[e][2] for e, s in self.state.items())
            assert (standing.reserved > 0) == opened
        assert self.ledger.units() == {tags(u)[0]: block for block, units in self.blocks.items() for u in units}


class RefundAtRestart(Ledger):
    """Gives back at its start what a process that died had reserved."""

    def close_open(self, kept: Path | None = None) -> int:
        with self._chain.transaction() as (db, events):
            for (entry,) in db.execute("SELECT id FROM entry WHERE state = 'reserved'").fetchall():
                self._close(db, entry, "void", None, 1.0)
                events.append({"event": "void", "entry": entry, "at": 1.0})
        return 0


class RefundOfLost(Ledger):
    """Gives back what training had lost."""

    def lose(self, entry: int) -> None:
        with self._chain.transaction() as (db, events):
            if self._close(db, entry, "void", None, 1.0):
                events.append({"event": "void", "entry": entry, "at": 1.0})


class ForgetsAtEachPeriod(Ledger):
    """Resets the history with a new period."""

    def reserve(self, core: PlanCore, rounds_per_day: int) -> Reservation:
        full, self.limits = self.limits, Limits(900.0, DELTA, self.limits.period_days, self.limits.period_cap)
        try:
            return super().reserve(core, rounds_per_day)
        finally:
            self.limits = full


class AnybodyVoids(Ledger):
    """Lets any process give back any reservation."""

    def void(self, entry: int, by: SigningKey) -> None:
        self._own = {(os.getpid(), entry)}
        super().void(entry, by)


def test_the_ledger_does_as_the_model_does() -> None:
    run_state_machine_as_test(Budget, settings=CALM)


@pytest.mark.parametrize("fault", [RefundAtRestart, RefundOfLost, ForgetsAtEachPeriod, AnybodyVoids])
def test_the_machine_finds_a_planted_fault(fault: type[Ledger]) -> None:
    planted = type("Planted", (Budget,), {"ledger_type": fault})
    found = settings(CALM, max_examples=300, phases=[Phase.generate], report_multiple_bugs=False, database=None)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_state_machine_as_test(planted, settings=found)


PLANS = st.lists(
    st.tuples(
        st.sampled_from([4.0, 5.0, 8.0]),  # noise multiplier
        st.integers(1, 40),
        st.sampled_from(["before text", "training", "before spend", "spent", "released"]),
        st.sampled_from(["0a", "0b", "0c"]),
    ),
    max_size=8,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PLANS)
def test_epsilon_charged_is_never_below_epsilon_of_what_was_released(story: list[tuple[float, int, str, str]]) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        (folder / "counter").mkdir()
        (folder / "kept").mkdir()

        def start() -> Ledger:
            ledger = Ledger(folder / "ledger.db", folder / "counter" / "ledger.json", Limits(3.0, DELTA))
            ledger.close_open(folder / "kept")
            return ledger

        ledger = start()
        ledger.register(Source(Path("/text.jsonl"), "text", ""), tags(1))
        released: list[DpSgd] = []
        for number, (sigma, steps, dies, run) in enumerate(story, start=1):
            plan = core(number, steps=steps, sigma=sigma, run=run)
            told, made = _reserve(ledger, plan)
            assert told in ("", "budget.epsilon_cap")
            if made is None:
                continue
            update = plan.digest.encode()
            if dies not in ("before text", "training"):
                write_durably(folder / "kept" / f"{plan.digest}.f32", update)
            if dies in ("spent", "released"):
                ledger.spend(made.entry, digest(update))
            if dies == "released":
                released.append(plan.training.event)
            else:
                ledger.close()
                ledger = start()
                # Its retry: what was made before the death leaves now.
                if ledger.spent_on(plan.digest) == digest(update):
                    released.append(plan.training.event)
            charged = ledger.standing().epsilon
            assert charged >= (epsilon(released, DELTA) if released else 0.0)
            assert charged <= 3.0
        ledger.close()


def test_a_void_statement_verifies_under_the_sites_key_and_only_there(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, 50.0)
    entry = ledger.reserve(core(1), 1000).entry
    ledger.void(entry, KEY)
    assert ledger.standing().steps == 0
    with closing(sqlite3.connect(ledger.path)) as db:
        told = json.loads(db.execute("SELECT record FROM event ORDER BY seq DESC LIMIT 1").fetchone()[0])
    signature = bytes.fromhex(told.pop("signature"))
    assert (told["event"], told["entry"], told["plan"], told["left"]) == ("void", entry, core(1).digest, "nothing")
    KEY.verify_key.verify(VOID_PURPOSE, canonical(told), signature, "")
    for key, statement in ((SigningKey.generate(), told), (KEY, told | {"entry": 2})):
        with pytest.raises(VerificationError):
            key.verify_key.verify(VOID_PURPOSE, canonical(statement), signature, "")
    again = ledger.reserve(core(1), 1000).entry  # given back, so that the same work may be asked for again
    assert again == entry + 1
    with pytest.raises(StateError, match="no open reservation"):
        ledger.void(entry, KEY)


@pytest.mark.parametrize("close", ["spend", "lose", "void"])
def test_nothing_that_is_closed_is_given_back(tmp_path: Path, close: str) -> None:
    ledger = open_ledger(tmp_path, 50.0)
    entry = ledger.reserve(core(1), 1000).entry
    acts: dict[str, Callable[[], None]] = {
        "spend": lambda: ledger.spend(entry, "ab" * 32),
        "lose": lambda: ledger.lose(entry),
        "void": lambda: ledger.void(entry, KEY),
    }
    acts[close]()
    before = ledger.standing()
    with pytest.raises(StateError, match="no open reservation"):
        ledger.void(entry, KEY)
    assert ledger.standing() == before


def test_a_restart_ends_the_right_to_give_back(tmp_path: Path) -> None:
    with closing(open_ledger(tmp_path, 50.0)) as ledger:
        entry = ledger.reserve(core(1), 1000).entry
    fresh = open_ledger(tmp_path, 50.0)
    for _ in range(2):  # before and after its open reservations are closed
        with pytest.raises(StateError, match="did not make the reservation"):
            fresh.void(entry, KEY)
        fresh.close_open()
    assert fresh.standing().steps == 1


def test_the_cheap_bound_is_above_the_charge() -> None:
    """What the model and the admission lean on."""
    for steps in range(1, 8):
        assert epsilon_rdp([event(steps)], DELTA) >= epsilon([event(steps)], DELTA) - 0.01
