"""The ledger's file: schema, transactions, the hash chain of its events, and the counter kept apart from it.

Every change of the ledger appends one event in the same SQLite transaction: ``head = SHA-256(head before || canonical record)``.
After COMMIT the event's number and head go, durably, to a small file in another folder. Opening replays the events: a chain that does
not hold, entries other than the events tell, or a ledger that does not contain the counter's head is refused with exit code 3.
A crash between COMMIT and the counter leaves the ledger ahead, which is well: what was not acknowledged was not acted on.

A snapshot of the whole machine restores both together; only a witness elsewhere sees that. It knows no budgets: ``budget`` does.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister_shared.encoding import canonical, parse_record, write_durably
from cloister_shared.errors import RollbackError, StateError

START = bytes(32)
SCHEMA = """
CREATE TABLE IF NOT EXISTS event (
  seq INTEGER PRIMARY KEY CHECK (seq >= 1),
  head BLOB NOT NULL CHECK (length(head) = 32),
  record BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS source (
  path TEXT NOT NULL PRIMARY KEY,
  text TEXT NOT NULL,
  label TEXT NOT NULL,
  field TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS block (
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  added_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS unit (
  tag BLOB NOT NULL PRIMARY KEY CHECK (length(tag) = 32),
  block INTEGER NOT NULL REFERENCES block (id)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entry (
  id INTEGER PRIMARY KEY,
  state TEXT NOT NULL CHECK (state IN ('reserved', 'spent', 'lost', 'void')),
  run TEXT NOT NULL,
  round INTEGER NOT NULL CHECK (round >= 1),
  plan TEXT NOT NULL CHECK (length(plan) = 64),
  base TEXT NOT NULL CHECK (length(base) = 64),
  noise_multiplier REAL NOT NULL CHECK (noise_multiplier > 0),
  sample_rate REAL NOT NULL CHECK (sample_rate > 0 AND sample_rate <= 1),
  steps INTEGER NOT NULL CHECK (steps >= 1),
  record BLOB NOT NULL,
  update_digest TEXT,
  reserved_at REAL NOT NULL,
  closed_at REAL,
  CHECK ((state = 'spent') = (update_digest IS NOT NULL))
);
CREATE TABLE IF NOT EXISTS charge (
  entry INTEGER NOT NULL REFERENCES entry (id),
  block INTEGER NOT NULL REFERENCES block (id),
  admitted REAL NOT NULL,
  cap REAL NOT NULL CHECK (admitted <= cap),
  delta REAL NOT NULL,
  PRIMARY KEY (entry, block)
) WITHOUT ROWID;
CREATE UNIQUE INDEX IF NOT EXISTS one_open_or_spent ON entry (plan) WHERE state IN ('reserved', 'spent');
CREATE TRIGGER IF NOT EXISTS entry_stays BEFORE DELETE ON entry BEGIN SELECT RAISE(ABORT, 'entries are for good'); END;
CREATE TRIGGER IF NOT EXISTS entry_not_replaced BEFORE INSERT ON entry WHEN EXISTS (SELECT 1 FROM entry WHERE id = NEW.id
  OR (NEW.state IN ('reserved', 'spent') AND plan = NEW.plan AND state IN ('reserved', 'spent')))
  BEGIN SELECT RAISE(ABORT, 'entries are for good'); END;
CREATE TRIGGER IF NOT EXISTS entry_only_closes BEFORE UPDATE ON entry WHEN OLD.state <> 'reserved' OR NEW.id <> OLD.id
  OR NEW.noise_multiplier <> OLD.noise_multiplier OR NEW.sample_rate <> OLD.sample_rate OR NEW.steps <> OLD.steps
  OR NEW.plan <> OLD.plan OR NEW.run <> OLD.run OR NEW.reserved_at <> OLD.reserved_at
  BEGIN SELECT RAISE(ABORT, 'entries only close'); END;
"""
for _table, _key in (
    ("event", "seq = NEW.seq"),
    ("unit", "tag = NEW.tag"),
    ("block", "id = NEW.id OR name = NEW.name"),
    ("charge", "entry = NEW.entry AND block = NEW.block"),
):
    SCHEMA += f"""CREATE TRIGGER IF NOT EXISTS {_table}_stays BEFORE DELETE ON {_table} BEGIN SELECT RAISE(ABORT, 'for good'); END;
CREATE TRIGGER IF NOT EXISTS {_table}_fixed BEFORE UPDATE ON {_table} BEGIN SELECT RAISE(ABORT, 'for good'); END;
CREATE TRIGGER IF NOT EXISTS {_table}_not_replaced BEFORE INSERT ON {_table} WHEN EXISTS (SELECT 1 FROM {_table} WHERE {_key})
  BEGIN SELECT RAISE(ABORT, 'for good'); END;
"""  # noqa: S608  # our own names


@dataclass(frozen=True)
class Point:
    """A place in the chain.

    Attributes:
        seq: Number of the last event; 0 before the first.
        head: SHA-256 over everything up to it, 32 bytes.
    """

    seq: int
    head: bytes


def link(head: bytes, record: bytes) -> bytes:
    """The head after ``record``."""
    return hashlib.sha256(head + record).digest()


class Counter:
    """The newest point of a ledger, in a file of its own that never goes back.

    Args:
        path: The file; its folder must not be the ledger's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Point | None:
        """The newest point, or None before the first.

        Raises:
            RollbackError: The file is damaged.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError("the ledger's counter cannot be read", where=str(self.path), got=str(error)) from error
        try:
            record = parse_record(data, str(self.path))
            point = Point(int(record["seq"]), bytes.fromhex(record["head"]))
        except (ValueError, KeyError, TypeError) as error:
            raise RollbackError(
                "the ledger's counter is damaged", where=str(self.path), got=str(error)[:100]
            ) from error
        return point

    def advance(self, point: Point) -> None:
        """Writes ``point`` unless a newer one is there; racing processes are serialised by a lock."""
        lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            now = self.read()
            if now is None or now.seq < point.seq:
                write_durably(self.path, canonical({"seq": point.seq, "head": point.head.hex()}))
        finally:
            os.close(lock)


class Chain:
    """The SQLite file and its counter.

    Args:
        path: The ledger's file; made where missing.
        counter: The counter's file, in another folder.

    Raises:
        StateError: A file cannot be used.
        RollbackError: The ledger is older than its counter, forked, or changed by hand.
    """

    def __init__(self, path: Path, counter: Path) -> None:
        self.path, self.counter = path, Counter(counter)
        with self._connection() as db:
            for statement in SCHEMA.split(";\n"):
                if statement.strip():
                    db.execute(statement)
            last = self._verify(db)
        path.chmod(0o600)
        self.counter.advance(last)

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        db = None
        try:
            db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            db.execute("PRAGMA synchronous=FULL")
            db.execute("PRAGMA foreign_keys=ON")
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
                mend="free space, or see to the file's owner and mode; restore no older copy",
            ) from error
        finally:
            if db is not None:
                db.close()

    @contextmanager
    def transaction(self, *records: dict[str, Any]) -> Iterator[tuple[sqlite3.Connection, list[dict[str, Any]]]]:
        """One transaction; the events put into the yielded list are chained in it and the counter follows the commit."""
        events = list(records)
        point = None
        with self._connection() as db:
            yield db, events
            if events:
                point = self._last(db)
                for record in events:
                    data = canonical(record)
                    point = Point(point.seq + 1, link(point.head, data))
                    db.execute("INSERT INTO event (seq, head, record) VALUES (?, ?, ?)", (point.seq, point.head, data))
        if point is not None:
            self.counter.advance(point)

    @staticmethod
    def _last(db: sqlite3.Connection) -> Point:
        row = db.execute("SELECT seq, head FROM event ORDER BY seq DESC LIMIT 1").fetchone()
        return Point(row[0], row[1]) if row else Point(0, START)

    def _verify(self, db: sqlite3.Connection) -> Point:
        known, point = self.counter.read(), Point(0, START)
        found = known == point
        entries: dict[int, tuple[Any, ...]] = {}
        charges: set[tuple[int, int]] = set()
        for seq, head, data in db.execute("SELECT seq, head, record FROM event ORDER BY seq"):
            point = Point(point.seq + 1, link(point.head, data))
            if (seq, head) != (point.seq, point.head):
                raise self._broken(f"event {seq}", "the chain of hashes")
            found = found or point == known
            _replay(json.loads(data), entries, charges)
        if known is not None and not found:
            forked = known.seq <= point.seq
            raise RollbackError(
                "the ledger's history was changed" if forked else "the ledger went back in time",
                where=str(self.path),
                expected=f"event {known.seq} with head {known.head.hex()[:16]} ({self.counter.path})",
                got=f"{point.seq} events",
                mend="put the newest ledger back; if it is lost, its text counts as spent: register none of it again",
            )
        if known is None and point.seq:
            raise RollbackError(
                "the ledger's counter is missing",
                where=str(self.counter.path),
                expected=f"a point at or before event {point.seq}",
                mend="put it back from where it was moved to",
            )
        rows = db.execute("SELECT id, state, run, round, plan, noise_multiplier, sample_rate, steps FROM entry")
        if {row[0]: tuple(row[1:]) for row in rows} != entries:
            raise self._broken("table entry", "what the events tell")
        if set(db.execute("SELECT entry, block FROM charge")) != charges:
            raise self._broken("table charge", "what the events tell")
        return point

    def _broken(self, got: str, expected: str) -> RollbackError:
        return RollbackError(
            "the ledger was changed by hand",
            where=str(self.path),
            expected=expected,
            got=got,
            mend="put the newest back",
        )


def _replay(record: dict[str, Any], entries: dict[int, tuple[Any, ...]], charges: set[tuple[int, int]]) -> None:
    kind = record["event"]
    if kind == "reserve":
        names = ("run", "round", "plan", "noise_multiplier", "sample_rate", "steps")
        entries[record["entry"]] = ("reserved", *(record[n] for n in names))
        charges.update((record["entry"], block) for block in record["blocks"])
    elif kind in ("spend", "lose", "void"):
        state = {"spend": "spent", "lose": "lost", "void": "void"}[kind]
        entries[record["entry"]] = (state, *entries[record["entry"]][1:])
