"""The site's own ledger: what was reserved and spent on its text, for good, and the cap that it enforces.

Order of a round: ``reserve`` commits durably before text is read -> training -> the noised update is kept on disk -> ``spend``
commits before anything leaves. What is reserved counts as spent from that moment; an open reservation found at start
becomes ``lost`` and counts for ever. Nothing is refunded. One ledger is one budget block: all text of this site, over all runs, models
and coordinators. SQLite with ``BEGIN IMMEDIATE`` and ``synchronous=FULL``, so that racing processes are serialised.

It does not defend against its own administrator restoring an older file; that needs a witness outside.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cloister_shared.errors import RefusedError, StateError
from cloister_shared.plan import PlanCore
from cloister_shared.privacy import DpSgd, admit, epsilon, grouped

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  state TEXT NOT NULL CHECK (state IN ('reserved', 'spent', 'lost')),
  run TEXT NOT NULL,
  round INTEGER NOT NULL CHECK (round >= 1),
  plan TEXT NOT NULL CHECK (length(plan) = 64),
  noise_multiplier REAL NOT NULL CHECK (noise_multiplier > 0),
  sample_rate REAL NOT NULL CHECK (sample_rate > 0 AND sample_rate <= 1),
  steps INTEGER NOT NULL CHECK (steps >= 1),
  epsilon_after REAL NOT NULL,
  delta REAL NOT NULL,
  cap REAL NOT NULL CHECK (epsilon_after <= cap),
  record BLOB NOT NULL,
  update_digest TEXT,
  reserved_at REAL NOT NULL,
  closed_at REAL,
  CHECK ((state = 'spent') = (update_digest IS NOT NULL))
);
CREATE UNIQUE INDEX IF NOT EXISTS one_open_or_spent ON entry (plan) WHERE state <> 'lost';
CREATE TRIGGER IF NOT EXISTS never_deleted BEFORE DELETE ON entry BEGIN SELECT RAISE(ABORT, 'entries are for good'); END;
CREATE TRIGGER IF NOT EXISTS never_replaced BEFORE INSERT ON entry WHEN EXISTS
  (SELECT 1 FROM entry WHERE id = NEW.id OR (NEW.state <> 'lost' AND plan = NEW.plan AND state <> 'lost'))
  BEGIN SELECT RAISE(ABORT, 'entries are for good'); END;
CREATE TRIGGER IF NOT EXISTS never_reopened BEFORE UPDATE ON entry WHEN OLD.state <> 'reserved'
  OR NEW.noise_multiplier <> OLD.noise_multiplier OR NEW.sample_rate <> OLD.sample_rate OR NEW.steps <> OLD.steps OR NEW.plan <> OLD.plan
  BEGIN SELECT RAISE(ABORT, 'entries only close'); END;
"""
_DAY = 86_400.0


@dataclass(frozen=True)
class Standing:
    """Where a budget stands.

    Attributes:
        epsilon: Epsilon of the whole history, open reservations included.
        cap: The cap.
        delta: Delta of both.
        rounds: Entries in the history.
        steps: DP-SGD steps in the history.
    """

    epsilon: float
    cap: float
    delta: float
    rounds: int
    steps: int

    @property
    def left(self) -> float:
        """What is left below the cap; never negative."""
        return max(0.0, self.cap - self.epsilon)


class Ledger:
    """The ledger in one SQLite file.

    Args:
        path: The file; made where missing.
        cap: The policy's epsilon cap.
        delta: The policy's delta.

    Raises:
        StateError: The file cannot be opened or is damaged.
    """

    def __init__(self, path: Path, cap: float, delta: float) -> None:
        self.path, self.cap, self.delta = path, cap, delta
        with self._transaction() as db:
            for statement in _SCHEMA.split(";\n"):
                if statement.strip():
                    db.execute(statement)
        path.chmod(0o600)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        db = None
        try:
            db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            db.execute("PRAGMA synchronous=FULL")
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise StateError(
                "the ledger cannot be used",
                where=str(self.path),
                got=str(error),
                mend="free space, or restore nothing: ask `cloister doctor`",
            ) from error
        finally:
            if db is not None:
                db.close()

    def _history(self, db: sqlite3.Connection) -> tuple[DpSgd, ...]:
        rows = db.execute(
            "SELECT noise_multiplier, sample_rate, SUM(steps) FROM entry GROUP BY noise_multiplier, sample_rate"
        )
        return grouped(DpSgd(*row) for row in rows)

    def close_open(self) -> int:
        """Turns open reservations of a process that died into ``lost``, which stay charged; returns how many."""
        with self._transaction() as db:
            return db.execute(
                "UPDATE entry SET state = 'lost', closed_at = ? WHERE state = 'reserved'", (time.time(),)
            ).rowcount

    def reserve(self, core: PlanCore, rounds_per_day: int) -> int:
        """Reserves the cost of ``core`` durably; returns the entry's id.

        Raises:
            RefusedError: The cap or the daily limit would be passed, or this very work was done or is being done.
        """
        event = core.training.event
        where = f"plan of round {core.round}"
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM entry WHERE plan = ? AND state <> 'lost'", (core.digest,)).fetchone():
                raise RefusedError(
                    "budget.already_done",
                    "this work was done already",
                    where=where,
                    expected="a new plan",
                    got=core.digest[:16],
                )
            today = db.execute("SELECT COUNT(*) FROM entry WHERE reserved_at > ?", (time.time() - _DAY,)).fetchone()[0]
            if today >= rounds_per_day:
                raise RefusedError(
                    "policy.rounds_per_day",
                    "too many rounds today",
                    where=where,
                    expected=f"<= {rounds_per_day}",
                    got=str(today + 1),
                )
            history = self._history(db)
            after = admit(history, [event], self.cap, self.delta, where)
            cursor = db.execute(
                "INSERT INTO entry (state, run, round, plan, noise_multiplier, sample_rate, steps, epsilon_after, delta, cap,"
                " record, reserved_at)"
                " VALUES ('reserved', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    core.run,
                    core.round,
                    core.digest,
                    event.noise_multiplier,
                    event.sample_rate,
                    event.steps,
                    after,
                    self.delta,
                    self.cap,
                    core.to_bytes(),
                    time.time(),
                ),
            )
            return int(cursor.lastrowid or 0)

    def spend(self, entry: int, update_digest: str) -> None:
        """Marks a reservation as spent, before its update leaves.

        Raises:
            StateError: There is no such open reservation.
        """
        with self._transaction() as db:
            done = db.execute(
                "UPDATE entry SET state = 'spent', update_digest = ?, closed_at = ? WHERE id = ? AND state = 'reserved'",
                (update_digest, time.time(), entry),
            ).rowcount
            if done != 1:
                raise StateError("no open reservation to spend", where=str(self.path), got=f"entry {entry}")

    def lose(self, entry: int) -> None:
        """Closes a reservation whose training failed; it stays charged."""
        with self._transaction() as db:
            db.execute(
                "UPDATE entry SET state = 'lost', closed_at = ? WHERE id = ? AND state = 'reserved'",
                (time.time(), entry),
            )

    def knows(self, plan: str) -> bool:
        """Whether this work was ever reserved here."""
        with self._transaction() as db:
            return db.execute("SELECT 1 FROM entry WHERE plan = ?", (plan,)).fetchone() is not None

    def standing(self) -> Standing:
        """Epsilon of the whole history, spent, lost and open."""
        with self._transaction() as db:
            history = self._history(db)
            rounds = db.execute("SELECT COUNT(*) FROM entry").fetchone()[0]
        return Standing(epsilon(history, self.delta), self.cap, self.delta, rounds, sum(e.steps for e in history))
