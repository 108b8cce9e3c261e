"""A site's round in miniature, killed at any instant, again and again; what left must have been paid for each time.

``python client_kill_worker.py FOLDER KILLS SEED [FAULT]``: a process that has imported all forks children that reserve, train, keep,
spend and release; half are killed after a random time, half before or after a random one of their calls into C (SQLite, ``write``,
``fsync``, ``rename``). After each death the ledger is opened and checked. Prints what the deaths left behind; exits 1 with what was free.
"""

from __future__ import annotations

import collections
import json
import os
import random
import select
import signal
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

from cloister_client.budget import Ledger
from cloister_shared.encoding import digest, write_durably
from cloister_shared.plan import PlanCore
from cloister_shared.privacy import DpSgd, epsilon, epsilon_rdp, grouped

from support.client_ledgers import DELTA, RATE, core, event, open_ledger

CAP = 900.0
ROUNDS = 3
SIGMAS = (4.0, 6.0, 9.0)


def plan(number: int) -> PlanCore:
    """The work of a round."""
    return core(number, steps=1 + number % 4, sigma=SIGMAS[number % 3])


class Site:
    """What the agent does, without a model.

    Args:
        folder: Ledger, counter, kept updates and the outbox.
        fault: ``early`` to release before the ledger knows, ``forgetful`` to spend on another digest.
    """

    def __init__(self, folder: Path, fault: str = "") -> None:
        self.folder, self.fault, self.kept, self.outbox = folder, fault, folder / "kept", folder / "outbox"

    def released(self) -> list[tuple[str, str]]:
        """Plan and digest of each update that left."""
        lines = self.outbox.read_text().splitlines() if self.outbox.exists() else []
        return [(line.split()[0], line.split()[1]) for line in lines]

    def release(self, work: PlanCore, update: bytes) -> None:
        """Lets an update go, for ever."""
        file = os.open(self.outbox, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(file, f"{work.digest} {digest(update)}\n".encode())
        os.fsync(file)
        os.close(file)

    def start(self) -> Ledger:
        """The agent's start."""
        ledger = open_ledger(self.folder, CAP)
        ledger.close_open(self.kept)
        return ledger

    def round(self, ledger: Ledger) -> None:
        """One round, as ``cloister_client.round`` walks it."""
        work = plan(len(self.released()) + 1)
        path = self.kept / f"{work.digest}.f32"
        spent = ledger.spent_on(work.digest)
        if spent is not None and path.is_file() and digest(path.read_bytes()) == spent:
            self.release(work, path.read_bytes())
        else:
            entry = ledger.reserve(work, 1_000_000).entry
            update = os.urandom(64)
            if self.fault == "early":
                self.release(work, update)
            write_durably(path, update)
            ledger.spend(entry, digest(b"" if self.fault == "forgetful" else update))
            if self.fault != "early":
                self.release(work, update)
        path.unlink()

    def check(self) -> str:
        """What the last death left behind.

        Raises:
            AssertionError: Something left for free, or the ledger cannot be used.
        """
        with closing(open_ledger(self.folder, CAP)) as ledger:
            standing_steps = sum(e.steps for e in self.charged(ledger))
        with closing(sqlite3.connect(ledger.path)) as db:
            rows = db.execute("SELECT plan, state, update_digest FROM entry ORDER BY id").fetchall()
        spent = {(work, update) for work, state, update in rows if state == "spent"}
        released = self.released()
        assert set(released) <= spent, f"free: {sorted(set(released) - spent)}"
        assert len(set(released)) == len(released), "one update left twice"
        assert len({work for work, _ in spent}) == len(spent), "one work spent twice"
        costs = [plan(n).training.event for n in range(1, len(released) + 1)]
        assert standing_steps >= sum(e.steps for e in costs)
        assert {p.name for p in (self.folder / "counter").iterdir()} == {"ledger.json"}
        if not rows:
            return "nothing"
        work, state, _ = rows[-1]
        kept = (self.kept / f"{work}.f32").exists()
        left = (work, rows[-1][2]) in released
        return f"{state}{', kept' if kept else ''}{', released' if left else ''}"

    @staticmethod
    def charged(ledger: Ledger) -> tuple[DpSgd, ...]:
        """The history that the ledger charges."""
        with closing(sqlite3.connect(ledger.path)) as db:
            rows = db.execute(
                "SELECT noise_multiplier, sample_rate, steps FROM entry JOIN charge ON id = entry WHERE state <> 'void'"
            ).fetchall()
        return grouped(DpSgd(*row) for row in rows)


def _child(site: Site, ready: int, at: int | None) -> int:
    ledger = site.start()
    calls = 0

    def count(frame: object, what: str, function: object) -> None:
        nonlocal calls
        if what in ("c_call", "c_return"):
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)

    os.write(ready, b"s")
    if at is not None:
        sys.setprofile(count)
    for _ in range(ROUNDS):
        site.round(ledger)
    sys.setprofile(None)
    ledger.close()
    return calls


def _run(site: Site, at: int | None, wait: float | None) -> tuple[int, float, int]:
    """One child; returns how it ended, the seconds of its work, and its calls into C where it lived."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.close(ready)
            os.write(tell, b"%8d" % _child(site, tell, at))
            code = 0
        finally:
            os._exit(code)
    os.close(tell)
    os.read(ready, 1)
    started = time.monotonic()
    if wait is not None:
        select.select([ready], [], [], wait)  # its end is the pipe's end: whichever comes first
        os.kill(child, signal.SIGKILL)
    end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - started
    said = os.read(ready, 8)
    os.close(ready)
    return end, seconds, int(said or 0)


def main() -> None:
    """All the deaths."""
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    site, rng = Site(folder, *sys.argv[4:5]), random.Random(seed)
    site.kept.mkdir()
    epsilon_rdp([event(1, sigma) for sigma in SIGMAS], DELTA)
    end, seconds, _ = _run(site, None, None)
    assert end == 0
    end, _, calls = _run(site, sys.maxsize, None)
    assert end == 0
    left: collections.Counter[str] = collections.Counter()
    done = 0
    while done < kills:
        if done % 2:
            end, _, _ = _run(site, rng.randint(1, calls), None)
        else:
            end, _, _ = _run(site, None, rng.uniform(0, seconds))
        assert end in (0, -signal.SIGKILL), end
        done += end != 0
        left[site.check()] += end != 0
    with closing(site.start()) as ledger:
        charged = ledger.standing().epsilon
    released = site.released()
    costs = [plan(number).training.event for number in range(1, len(released) + 1)]
    assert {cost.sample_rate for cost in costs} == {RATE}
    assert charged >= epsilon(costs, DELTA), (charged, epsilon(costs, DELTA))
    print(json.dumps({"released": len(released), "charged": charged, "cost": epsilon(costs, DELTA), "left": left}))


if __name__ == "__main__":
    try:
        main()
    except AssertionError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
