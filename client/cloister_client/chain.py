"""The ledger's file: transactions, the hash chain of its events, and the counter kept apart from it.

Every change of the ledger appends one event in the same SQLite transaction: ``head = SHA-256(head before || canonical record)``.
What an event has that says something of the text (how many units, their tags, un-noised numbers) is kept in a table beside it and stands
in it as a salted hash, so that events can be shown to an auditor whole.
After COMMIT the event's number and head go to a small file in another folder. Opening replays the events: a chain that does not hold,
rows other than the events tell, or a ledger that does not contain the counter's point is refused with exit code 3; each later
transaction checks the counter's point again, so that a file put back under a running agent is found before it is used.
A crash between COMMIT and the counter leaves the ledger ahead, which is well: what was not acknowledged was not acted on.

WAL, synchronous=EXTRA: one fsync a commit, and a power cut takes back nothing that was acknowledged (DELETE with FULL may: the
folder is not synced after the journal is gone). A snapshot of the whole machine restores ledger and counter together; only a witness
elsewhere sees that. It knows no budgets: ``budget`` does.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import RollbackError, StateError
from cloister_shared.merkle import Tree, leaf_hash

from cloister_client.counter import ORIGIN, Counter, Point, link
from cloister_client.schema import SCHEMA

# What stands under this name in an event is kept beside it and chained as a salted hash.
PRIVATE = "private"


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
        self._lock = threading.Lock()
        self._db, self._file, self._pid = self._connect()
        with self._locked("DEFERRED") as db:
            known, whole = self.counter.read(), _objects(db) == _expected()
            last = self._verify(db, known) if whole and known else None
        if last is None:
            with self._locked("IMMEDIATE") as db:
                for statement in SCHEMA.split(";\n"):
                    if statement.strip():
                        db.execute(statement)
                if _objects(db) != _expected():
                    raise self._broken("other tables or triggers", "those of this version")
                known = self.counter.read()
                last = self._verify(db, known)
                if known is None:
                    self.counter.create()
        self.counter.advance(last)
        self._last = last
        self._tree = Tree()

    def tree(self) -> Tree:
        """The events as leaves of a Merkle log: the site's own, whose head others may hold."""
        with self.reading() as db:
            for (data,) in db.execute("SELECT record FROM event WHERE seq > ? ORDER BY seq", (len(self._tree),)):
                self._tree.append(leaf_hash(data))
        return self._tree

    def records(self) -> list[bytes]:
        """Every event's canonical bytes, oldest first."""
        with self.reading() as db:
            return [bytes(data) for (data,) in db.execute("SELECT record FROM event ORDER BY seq")]

    def _connect(self) -> tuple[sqlite3.Connection, os.stat_result, int]:
        db = folder = None
        try:
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
            # One at a time: two that turn a fresh file to WAL at once do not wait for each other, one is told that it is locked.
            fcntl.flock(folder, fcntl.LOCK_EX)
            # The file's mode before SQLite writes to it: its -wal and -shm take the same. Never opened again beside SQLite, since
            # closing it would drop the locks of this process's other connections.
            if not self.path.exists():
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            self.path.chmod(0o600)
            db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=EXTRA")
            db.execute("PRAGMA foreign_keys=ON")
            found = self.path.stat()
        except (sqlite3.Error, OSError) as error:
            if db is not None:
                db.close()
            raise self._unusable(error) from error
        finally:
            if folder is not None:
                os.close(folder)
        self.close = weakref.finalize(self, _close, db, os.getpid())
        return db, found, os.getpid()

    def _unusable(self, error: Exception) -> StateError:
        return StateError(
            "the ledger cannot be used",
            where=str(self.path),
            got=str(error),
            mend="free space, or see to the file's owner and mode; restore no older copy",
        )

    def _found(self) -> os.stat_result:
        try:
            return self.path.stat()
        except FileNotFoundError as error:
            raise self._broken("no file", "the one that was opened") from error
        except OSError as error:
            raise self._unusable(error) from error

    @contextmanager
    def _locked(self, how: Literal["DEFERRED", "IMMEDIATE"]) -> Iterator[sqlite3.Connection]:
        if os.getpid() != self._pid:
            raise StateError("a ledger does not outlive a fork", where=str(self.path), mend="open it again")
        with self._lock:
            db = self._db
            try:
                now = self._found()
                if (now.st_dev, now.st_ino) != (self._file.st_dev, self._file.st_ino):
                    raise self._broken("another file", "the one that was opened")
                db.execute(f"BEGIN {how}")
                try:
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                    raise
            except sqlite3.IntegrityError:
                raise
            except sqlite3.Error as error:
                raise self._unusable(error) from error

    @contextmanager
    def transaction(self, *, sync: bool = True) -> Iterator[tuple[sqlite3.Connection, list[dict[str, Any]]]]:
        """One writing transaction; the events put into the yielded list are chained in it and the counter follows the commit.

        Args:
            sync: Whether the counter's own write is synced as well; the ledger's always is.
        """
        events: list[dict[str, Any]] = []
        with self._locked("IMMEDIATE") as db:
            last = self._newest(db, self.counter.read())
            yield db, events
            for record in events:
                private = record.pop(PRIVATE, None)
                if private is not None:
                    salt, facts = os.urandom(32), canonical(private)
                    record["facts"] = committed(salt, facts)
                data = canonical(record)
                last = Point(last.seq + 1, link(last.head, data))
                db.execute("INSERT INTO event (seq, head, record) VALUES (?, ?, ?)", (last.seq, last.head, data))
                if private is not None:
                    db.execute("INSERT INTO fact VALUES (?, ?, ?, ?)", (last.seq, record["event"], salt, facts))
        if events:
            self.counter.advance(last, sync=sync)
        self._last = last

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One reading transaction; it waits for nobody."""
        known = self.counter.read()  # before the snapshot, which then is no older
        with self._locked("DEFERRED") as db:
            last = self._newest(db, known)
            yield db
        self._last = last

    def _newest(self, db: sqlite3.Connection, known: Point | None) -> Point:
        for point in (known, self._last):
            if point is None:
                raise self._missing()
            if point != ORIGIN and db.execute("SELECT head FROM event WHERE seq = ?", (point.seq,)).fetchone() != (
                point.head,
            ):
                raise self._gone_back(point, f"{self._end(db).seq} events")
        return self._end(db)

    @staticmethod
    def _end(db: sqlite3.Connection) -> Point:
        row = db.execute("SELECT seq, head FROM event ORDER BY seq DESC LIMIT 1").fetchone()
        return Point(row[0], row[1]) if row else ORIGIN

    def _verify(self, db: sqlite3.Connection, known: Point | None) -> Point:
        point, story = ORIGIN, _Story()
        found = known == point
        whole = (
            "SELECT event.seq, head, event.record, salt, fact.record FROM event LEFT JOIN fact ON fact.seq = event.seq"
            " ORDER BY event.seq"
        )
        for seq, head, data, salt, facts in db.execute(whole):
            if not isinstance(data, bytes):
                raise self._broken(f"event {seq}", "bytes")
            point = Point(point.seq + 1, link(point.head, data))
            if (seq, head) != (point.seq, point.head):
                raise self._broken(f"event {seq}", "the chain of hashes")
            found = found or point == known
            try:
                story.tell(_whole(json.loads(data), salt, facts))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._broken(f"event {seq}", "an event that may follow those before it") from error
        if known is None and point.seq:
            raise self._missing()
        if known is not None and not found:
            raise self._gone_back(known, f"{point.seq} events", forked=known.seq <= point.seq)
        for table, there, told in story.against(db):
            if there != told:
                raise self._broken(f"table {table}", "what the events tell")
        return point

    def _missing(self) -> RollbackError:
        return RollbackError(
            "the ledger's counter is missing",
            where=str(self.counter.path),
            expected=f"a point of {self.path}",
            mend="put it back from where it was moved to",
        )

    def _gone_back(self, known: Point, got: str, *, forked: bool = False) -> RollbackError:
        return RollbackError(
            "the ledger's history was changed" if forked else "the ledger went back in time",
            where=str(self.path),
            expected=f"event {known.seq} with head {known.head.hex()[:16]} ({self.counter.path})",
            got=got,
            mend="put the newest ledger back; if it is lost, its text counts as spent: register none of it again",
        )

    def _broken(self, got: str, expected: str) -> RollbackError:
        return RollbackError(
            "the ledger was changed by hand",
            where=str(self.path),
            expected=expected,
            got=got,
            mend="put the newest back",
        )


def _close(db: sqlite3.Connection, pid: int) -> None:
    # A forked child holds the parent's file and none of its locks.
    if os.getpid() == pid:
        db.close()


def _objects(db: sqlite3.Connection) -> set[tuple[str, str, str | None]]:
    return set(db.execute("SELECT type, name, sql FROM sqlite_master"))


def _expected() -> set[tuple[str, str, str | None]]:
    db = sqlite3.connect(":memory:")
    try:
        db.executescript(SCHEMA)
        return _objects(db)
    finally:
        db.close()


def committed(salt: bytes, facts: bytes) -> str:
    """What an event says of its private part: a salted hash, hex. The event itself may be shown to an auditor."""
    return hashlib.sha256(b"cloister facts\0" + salt + facts).hexdigest()


def _whole(record: dict[str, Any], salt: bytes | None, facts: bytes | None) -> dict[str, Any]:
    """An event with its private part.

    Raises:
        ValueError: The part is missing, or another than the event says.
    """
    if ("facts" in record) != (facts is not None):
        raise ValueError("a private part is missing")
    if facts is None or salt is None:
        return record
    if committed(salt, facts) != record["facts"]:
        raise ValueError("another private part")
    return record | dict(json.loads(facts))


class _Story:
    """What the events tell that the tables must hold."""

    ENTRY = ("run", "round", "plan", "base", "noise_multiplier", "sample_rate", "steps")
    CLOSED: ClassVar = {"spend": "spent", "lose": "lost", "void": "void"}

    def __init__(self) -> None:
        self.entries: dict[int, tuple[Any, ...]] = {}
        self.charges: dict[tuple[int, int], tuple[float, float, float]] = {}
        self.noised: dict[tuple[int, str], float] = {}
        self.blocks: dict[int, tuple[Any, ...]] = {}
        self.texts: dict[int, str] = {}
        self.batches = 0
        self.seen: list[tuple[str, int, str]] = []
        self.receipts: dict[str, str] = {}

    def tell(self, record: dict[str, Any]) -> None:
        """One event.

        Raises:
            ValueError: It cannot follow those before it.
        """
        kind = record["event"]
        if kind == "data":
            _next(record["block"], self.blocks)
            self.blocks[record["block"]] = (
                record["name"],
                record["field"],
                record["at"],
                record["units"],
                record["tags"],
            )
        elif kind == "text":
            self.batches += 1
            if record["batch"] != self.batches:
                raise ValueError("numbers do not follow")
            if record["texts"]:
                self.texts[record["batch"]] = record["tags"]
        elif kind == "witness":
            self.seen.append((record["log"], record["size"], record["root"]))
        elif kind == "receipt":
            own = {name: value for name, value in record.items() if name not in ("event", "at")}
            self.receipts[record["plan"]] = digest(canonical(own))
        elif kind == "reserve":
            _next(record["entry"], self.entries)
            facts = tuple(record[name] for name in self.ENTRY)
            self.entries[record["entry"]] = ("reserved", None, record["at"], None, record["plan"], *facts)
            for block, admitted in zip(record["blocks"], record["admitted"], strict=True):
                self.charges[record["entry"], block] = (admitted, record["cap"], record["delta"])
            self.noised |= {(record["entry"], name): sigma for name, sigma in record.get("noised", [])}
        elif kind in self.CLOSED:
            state, _, reserved_at, _, *rest = self.entries[record["entry"]]
            if state != "reserved":
                raise ValueError("closed already")
            now = (self.CLOSED[kind], record.get("update"), reserved_at, record["at"], *rest)
            self.entries[record["entry"]] = now

    def against(self, db: sqlite3.Connection) -> Iterator[tuple[str, object, object]]:
        """Each table's name, what it holds, and what it must hold."""
        yield (
            "entry",
            {
                row[0]: (*row[1:5], digest(row[5]), *row[6:])
                for row in db.execute(
                    f"SELECT id, state, update_digest, reserved_at, closed_at, record, {', '.join(self.ENTRY)} FROM entry"  # noqa: S608
                )
            },
            self.entries,
        )
        charges = db.execute("SELECT entry, block, admitted, cap, delta FROM charge")
        yield "charge", {(row[0], row[1]): tuple(row[2:]) for row in charges}, self.charges
        numbers = db.execute("SELECT entry, name, noise_multiplier FROM noised")
        yield "noised", {(row[0], row[1]): row[2] for row in numbers}, self.noised
        yield "receipt", dict(db.execute("SELECT plan, record FROM receipt")), self.receipts
        yield "seen", list(db.execute("SELECT log, size, root FROM seen ORDER BY seq")), self.seen
        counts = dict.fromkeys(self.blocks, 0)
        hashes = {block: hashlib.sha256() for block in self.blocks}
        for tag, block in db.execute("SELECT tag, block FROM unit ORDER BY tag"):
            if block not in hashes:
                yield "unit", block, None
            counts[block] += 1
            hashes[block].update(tag)
        blocks = {
            row[0]: (*row[1:], counts.get(row[0], 0), hashes[row[0]].hexdigest() if row[0] in hashes else "")
            for row in db.execute("SELECT id, name, field, added_at FROM block")
        }
        yield "block or unit", blocks, self.blocks
        batches: dict[int, list[tuple[bytes, int]]] = {}
        for tag, block, batch in db.execute("SELECT tag, block, batch FROM text ORDER BY tag"):
            batches.setdefault(batch, []).append((tag, block))
        yield "text", {batch: digest_of(rows) for batch, rows in batches.items()}, self.texts


def digest_of(rows: Iterable[tuple[bytes, int]]) -> str:
    """Digest of texts and their blocks, in order of their tags."""
    return digest(b"".join(tag + block.to_bytes(8, "big") for tag, block in rows))


def _next(number: object, before: dict[int, Any]) -> None:
    if number != len(before) + 1:
        raise ValueError("numbers do not follow")
