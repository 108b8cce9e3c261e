"""What a site's ledger remembers of another's log: heads that it saw and fetched, receipts, and what was odd.

Each is an event of the site's own log, chained before anything is done upon it. It decides nothing: ``witness`` does.
"""

from __future__ import annotations

import json
import sqlite3
import time
from typing import Any

from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import RefusedError
from cloister_shared.notes import Checkpoint

from cloister_client.chain import Chain

# Nobody did anything wrong: the same again is held against what is kept by now.
MEANWHILE = "witness.meanwhile"
# Heads of another's log: the newest that this site saw in a round, and fetched beside.
Known = tuple[Checkpoint | None, Checkpoint | None]


class Remembered:
    """The part of a ledger that is about logs of others.

    Args:
        chain: The ledger's file.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    def seen_head(self, log: str, most: int | None = None) -> Checkpoint | None:
        """The newest head of another's log that this site saw in a round, of at most so many leaves; None before the first."""
        with self._chain.reading() as db:
            return self._seen(db, log, most)

    def fetched_head(self, log: str) -> Checkpoint | None:
        """The newest head of another's log that this site fetched beside its rounds; None before the first."""
        with self._chain.reading() as db:
            return self._fetched(db, log)

    def heads_of(self, log: str) -> Known:
        """The newest heads of another's log that this site saw in a round, and fetched beside."""
        with self._chain.reading() as db:
            return self._seen(db, log), self._fetched(db, log)

    def known_head(self, log: str) -> Checkpoint | None:
        """The newest head of another's log that this site saw in a round or fetched beside; None before the first."""
        return max((head for head in self.heads_of(log) if head is not None), key=lambda head: head.size, default=None)

    def saw(self, head: Checkpoint) -> bool:
        """Whether this site saw this very head of another's log at some time."""
        values = (head.origin, head.size, head.root.hex())
        with self._chain.reading() as db:
            row = db.execute("SELECT 1 FROM seen WHERE log = ? AND size = ? AND root = ? LIMIT 1", values).fetchone()
        return row is not None

    def witness(self, head: Checkpoint, note: str, known: Known) -> None:
        """Chains a head of another's log that this site saw, with its keeper's signature, before it is cosigned.

        Args:
            head: The head.
            note: It, signed.
            known: What ``heads_of`` had when this one was held against it.

        Raises:
            RefusedError: Another head was chained meanwhile, against which this one was held by nobody.
        """
        with self._chain.transaction() as (db, events):
            self._still(db, head.origin, known)
            values = (head.origin, head.size, head.root.hex())
            db.execute("INSERT INTO seen (log, size, root) VALUES (?, ?, ?)", values)
            named = dict(zip(("log", "size", "root"), values, strict=True))
            events.append({"event": "witness", "at": time.time(), "note": note} | named)

    def fetched(self, head: Checkpoint, note: str, known: Known) -> None:
        """Chains a head of another's log that this site fetched beside its rounds, with its keeper's signature: no quorum for it.

        Raises:
            RefusedError: As ``witness``.
        """
        with self._chain.transaction() as (db, events):
            self._still(db, head.origin, known)
            named = {"log": head.origin, "size": head.size, "root": head.root.hex()}
            events.append({"event": "fetched", "at": time.time(), "note": note} | named)

    def reservations(self, log: str) -> list[tuple[str, int, int]]:
        """Every reservation, oldest first: its run, its round, and how many leaves of another's log this site had seen in a round."""
        event = "CAST(record AS TEXT)"
        of = [f"json_extract({event}, '$.{name}')" for name in ("event", "run", "round", "size")]
        with self._chain.reading() as db:
            found = db.execute(
                f"SELECT {', '.join(of)} FROM event WHERE {of[0]} = 'reserve'"  # noqa: S608
                f" OR ({of[0]} = 'witness' AND json_extract({event}, '$.log') = ?) ORDER BY seq",
                (log,),
            )
            newest, out = 0, list[tuple[str, int, int]]()
            for kind, run, number, size in found:
                if kind == "witness":
                    newest = int(size)
                else:
                    out.append((str(run), int(number), newest))
            return out

    def receipt(self, record: dict[str, object]) -> None:
        """Chains what the coordinator says became of an update, once for each work."""
        with self._chain.transaction() as (db, events):
            known = db.execute("SELECT 1 FROM receipt WHERE plan = ?", (record["plan"],)).fetchone()
            if known is None:
                db.execute("INSERT INTO receipt VALUES (?, ?)", (record["plan"], digest(canonical(record))))
                events.append({"event": "receipt", "at": time.time()} | record)

    def receipts_of(self, run: str) -> list[dict[str, Any]]:
        """Receipts of a run, oldest first."""
        event = "CAST(record AS TEXT)"
        with self._chain.reading() as db:
            found = db.execute(
                f"SELECT record FROM event WHERE json_extract({event}, '$.event') = 'receipt'"  # noqa: S608
                f" AND json_extract({event}, '$.run') = ? ORDER BY seq",
                (run,),
            )
            return [json.loads(record) for (record,) in found]

    def incident(self, record: dict[str, object]) -> None:
        """Chains what was odd, with its evidence; the same as the last one is not chained again."""
        event = "CAST(record AS TEXT)"
        with self._chain.transaction() as (db, events):
            last = db.execute(
                f"SELECT record FROM event WHERE json_extract({event}, '$.event') = 'incident' ORDER BY seq DESC LIMIT 1"  # noqa: S608
            ).fetchone()
            known = {} if last is None else json.loads(last[0])
            if {n: v for n, v in known.items() if n not in ("event", "at")} != record:
                events.append({"event": "incident", "at": time.time()} | record)

    @staticmethod
    def _seen(db: sqlite3.Connection, log: str, most: int | None = None) -> Checkpoint | None:
        found = "SELECT size, root FROM seen WHERE log = ? AND size <= ? ORDER BY seq DESC LIMIT 1"
        row = db.execute(found, (log, 2**62 if most is None else most)).fetchone()
        return None if row is None else Checkpoint(log, row[0], bytes.fromhex(row[1]))

    @staticmethod
    def _fetched(db: sqlite3.Connection, log: str) -> Checkpoint | None:
        event = "CAST(record AS TEXT)"
        row = db.execute(
            f"SELECT json_extract({event}, '$.size'), json_extract({event}, '$.root') FROM event"  # noqa: S608
            f" WHERE json_extract({event}, '$.event') = 'fetched' AND json_extract({event}, '$.log') = ?"
            " ORDER BY seq DESC LIMIT 1",
            (log,),
        ).fetchone()
        return None if row is None else Checkpoint(log, row[0], bytes.fromhex(row[1]))

    def _still(self, db: sqlite3.Connection, log: str, known: Known) -> None:
        if (now := (self._seen(db, log), self._fetched(db, log))) != known:
            raise RefusedError(
                MEANWHILE,
                "another head of this log was kept meanwhile",
                where=log,
                expected=" and ".join("none" if head is None else f"{head.size} leaves" for head in known),
                got=" and ".join("none" if head is None else f"{head.size} leaves" for head in now),
                mend="the same again",
            )
