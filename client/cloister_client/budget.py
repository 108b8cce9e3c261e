"""The site's own ledger: what was reserved and spent on each block of its text, for good, and the caps that it enforces.

Order of a round: ``reserve`` commits durably before text is read -> training -> the noised update is kept on disk -> ``spend``
commits before anything leaves. What is reserved counts as spent from that moment, in every block that the round trains on; an open
reservation found at start becomes ``lost`` and counts for ever. ``void`` alone gives back: a reservation whose text was not read yet, in
the process that made it, with a statement under the site's key that nothing left. A block has one history over all rounds, runs, models
and coordinators, and a cap for good; a cap per period stands beside it, never in its place.

``chain`` keeps the file. What a history costs is said by ``privacy``; RDP may admit in microseconds, so the charge shown is at most what
was admitted plus PRV's numerical error.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from cloister_model.text import Source
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import InputError, RefusedError, StateError
from cloister_shared.notes import Checkpoint
from cloister_shared.plan import VOID_PURPOSE, PlanCore
from cloister_shared.privacy import DpSgd, admit, epsilon
from cloister_shared.signing import SigningKey

from cloister_client.chain import PRIVATE, Chain, digest_of
from cloister_client.remembered import Remembered
from cloister_client.standing import CHARGED, Limits, Reservation, Share, Standing, history_of, shares_of

_DAY = 86_400.0


class Ledger(Remembered):
    """The ledger of one site.

    Args:
        path: The SQLite file; made where missing.
        counter: The counter's file, in a folder of its own.
        limits: The policy's caps.

    Raises:
        StateError: A file cannot be used.
        RollbackError: The ledger went back in time, forked, or was changed by hand.
    """

    def __init__(self, path: Path, counter: Path, limits: Limits) -> None:
        super().__init__(Chain(path, counter))
        self.path, self.limits = path, limits
        # Reservations made by this process: only these can be void.
        self._own: set[tuple[int, int]] = set()

    def close(self) -> None:
        """Closes the file; what would happen by itself when the ledger is forgotten."""
        self._chain.close()

    def register(
        self,
        source: Source,
        tags: Iterable[bytes],
        name: str = "",
        texts: Mapping[bytes, Collection[bytes]] | None = None,
        as_new: bool = False,
    ) -> tuple[str, int]:
        """Registers a file and puts its units that are not known yet into one new block.

        There is a new block also where all are known: whether there is one decides what the agent answers to plans, which must be
        the owner's doing and not one unit's.

        Args:
            source: File and fields.
            tags: The units' names, 32 bytes each.
            name: The new block's name; ``block-N`` by default.
            texts: Names of each unit's texts, where a unit is a field.
            as_new: The owner says that units whose texts are known under other names are other units all the same.

        Returns:
            The new block's name and its number of units, 0 where all are known.

        Raises:
            InputError: The block's name is taken, this ledger has units of another kind, or half of a new unit's texts are known.
        """
        wanted = sorted(set(tags))
        with self._chain.transaction() as (db, events):
            # Of the blocks, which stay, and not of the files: forgetting a file does not change what a unit is.
            row = db.execute("SELECT field FROM block").fetchone()
            if row is not None and row[0] != source.unit:
                raise InputError(
                    "this site's privacy unit is fixed",
                    where=str(source.path),
                    expected=f"field {row[0]!r}" if row[0] else "one record",
                    got=f"field {source.unit!r}" if source.unit else "one record",
                    mend="register it with the same unit",
                )
            before = db.execute("SELECT text FROM source WHERE path = ?", (str(source.path),)).fetchone()
            if before is not None and before[0] != source.text:
                raise InputError(
                    "this file is registered with another text field",
                    where=str(source.path),
                    expected=f"field {before[0]!r}",
                    got=f"field {source.text!r}",
                    mend="register it with the same field: another would be the same rows with a new budget",
                )
            known = dict(db.execute("SELECT tag, block FROM unit"))
            seen = {tag for (tag,) in db.execute("SELECT tag FROM text")}
            new = [tag for tag in wanted if tag not in known]
            again = [tag for tag in new if texts and 2 * len(seen.intersection(texts[tag])) >= len(texts[tag])]
            if again and not as_new:
                # To leave them out, as to let them in, would let one unit's text decide whether others are trained on: the owner says.
                raise InputError(
                    "units have texts that are known under other names",
                    where=str(source.path),
                    expected="new texts, or the names that the units had before",
                    got=f"{len(again)} of {len(new)} new units",
                    mend="where they are the same units, give them their old names or take them out; where others say the same, --as-new",
                )
            db.execute(
                "INSERT INTO source VALUES (?, ?, ?, ?) ON CONFLICT (path) DO UPDATE SET label = excluded.label",
                (str(source.path), source.text, source.label, source.unit),
            )
            block = db.execute("SELECT COALESCE(MAX(id), 0) + 1 FROM block").fetchone()[0]
            taken = {name for (name,) in db.execute("SELECT name FROM block")}
            name = name or next(n for n in (f"block-{i}" for i in itertools.count(block)) if n not in taken)
            if name in taken:
                raise InputError("a block of this name is there", where="--block", got=name, mend="choose another name")
            now = time.time()
            db.execute("INSERT INTO block VALUES (?, ?, ?, ?)", (block, name, source.unit, now))
            db.executemany("INSERT INTO unit VALUES (?, ?)", ((tag, block) for tag in new))
            private = {"name": name, "field": source.unit, "units": len(new), "tags": digest(b"".join(new))}
            events.append({"event": "data", "block": block, "at": now, PRIVATE: private})
            _keep_texts(db, events, known | dict.fromkeys(new, block), seen, texts or {})
        return name, len(new)

    def sources(self) -> tuple[Source, ...]:
        """The registered files."""
        with self._chain.reading() as db:
            return tuple(
                Source(Path(path), text, label, field)
                for path, text, label, field in db.execute("SELECT path, text, label, field FROM source ORDER BY path")
            )

    def unit_field(self) -> str:
        """Name of the field whose value makes a unit; empty where each record is one."""
        with self._chain.reading() as db:
            row = db.execute("SELECT field FROM block").fetchone()
        return str(row[0]) if row else ""

    def units(self) -> dict[bytes, int]:
        """Block by unit."""
        with self._chain.reading() as db:
            return dict(db.execute("SELECT tag, block FROM unit"))

    def forget(self, path: Path) -> bool:
        """Stops reading a file; its units stay known, with their spend. Returns whether it was registered."""
        with self._chain.transaction() as (db, _):
            return bool(db.execute("DELETE FROM source WHERE path = ?", (str(path),)).rowcount)

    def close_open(self, kept: Path | None = None) -> int:
        """Closes reservations that somebody left open, dead or unable to write; returns how many are ``lost``, which stay charged.

        Args:
            kept: Folder of noised updates. One that is there whole was made before the process died: it is ``spent``, and may leave.
        """
        lost, still = 0, "SELECT id, plan FROM entry WHERE state = 'reserved' ORDER BY id"
        with self._chain.reading() as db:
            none = db.execute(still).fetchone() is None
        if none:
            return 0
        with self._chain.transaction() as (db, events):
            for entry, plan in db.execute(still).fetchall():
                update = kept / f"{plan}.f32" if kept is not None else None
                if update is not None and update.is_file():
                    self._spend(db, events, entry, digest(update.read_bytes()))
                else:
                    self._lose(db, events, entry)
                    lost += 1
        for broken_off in kept.glob(".*.tmp") if kept is not None else ():
            broken_off.unlink(missing_ok=True)
        return lost

    def attempted(self, plan: str, attempt: int) -> bool:
        """Remembers that an attempt at a work is here, before anything is answered; whether it is the first time.

        Whoever carries messages may bring one again after its answer: what that answer said of charges must stay true. Attempts are no
        part of the log: they say nothing of the text, and there may be many.
        """
        with self._chain.transaction() as (db, _):
            row = db.execute("SELECT newest FROM attempt WHERE plan = ?", (plan,)).fetchone()
            if row is not None and attempt <= row[0]:
                return False
            how = (
                "UPDATE attempt SET newest = ? WHERE plan = ?"
                if row
                else "INSERT INTO attempt (newest, plan) VALUES (?, ?)"
            )
            db.execute(how, (attempt, plan))
            return True

    def reserve(self, core: PlanCore, rounds_per_day: int) -> Reservation:
        """Reserves the cost of ``core`` durably in every block that can bear it.

        Raises:
            RefusedError: No block's cap allows it, the daily limit would be passed, this very work was done or is being done, or a
                later round of its run was reserved already.
        """
        where, now = f"plan of round {core.round}", time.time()
        # Its counter's write becomes durable with the spend's: until then nothing has left.
        with self._chain.transaction(sync=False) as (db, events):
            self._refuse_again(db, core, rounds_per_day, where, now)
            admitted, refusals, left_out = {}, [], []
            known: dict[tuple[tuple[DpSgd, ...], tuple[DpSgd, ...]], float | RefusedError] = {}
            for (block,) in db.execute("SELECT id FROM block ORDER BY id").fetchall():
                history, recent = history_of(db, block), self._recent(db, block, now)
                if (history, recent) not in known:
                    known[history, recent] = self._admit(history, recent, core.events, where)
                found = known[history, recent]
                if isinstance(found, RefusedError):
                    refusals.append(found)
                    left_out.append(block)
                else:
                    admitted[block] = found
            if not admitted:
                raise (refusals or [RefusedError("budget.no_data", "no text is registered here", where=where)])[0]
            reservation = self._insert(db, events, core, admitted, tuple(left_out), now)
        self._own.add((os.getpid(), reservation.entry))
        return reservation

    def _refuse_again(self, db: sqlite3.Connection, core: PlanCore, per_day: int, where: str, now: float) -> None:
        done = "SELECT 1 FROM entry WHERE plan = ? AND state IN ('reserved', 'spent')"
        if db.execute(done, (core.digest,)).fetchone():
            raise RefusedError(
                "budget.already_done",
                "this work was done already",
                where=where,
                expected="a new plan",
                got=core.digest[:16],
            )
        # A coordinator keeps a round's work for good: where its registry was put back it may ask for another in its place.
        other = "SELECT plan FROM entry WHERE run = ? AND round = ? AND plan <> ? AND state <> 'void'"
        if row := db.execute(other, (core.run, core.round, core.digest)).fetchone():
            raise RefusedError(
                "budget.other_work",
                "another work of this round was done",
                where=where,
                expected=f"plan {row[0][:16]}",
                got=core.digest[:16],
            )
        newest = db.execute("SELECT MAX(round) FROM entry WHERE run = ?", (core.run,)).fetchone()[0]
        if newest is not None and core.round < newest:
            raise RefusedError(
                "budget.round_order",
                "a later round of this run was done",
                where=where,
                expected=f">= {newest}",
                got=str(core.round),
            )
        today = db.execute("SELECT COUNT(*) FROM entry WHERE reserved_at > ?", (now - _DAY,)).fetchone()[0]
        if today >= per_day:
            raise RefusedError(
                "policy.rounds_per_day",
                "too many rounds today",
                where=where,
                expected=f"<= {per_day}",
                got=str(today + 1),
            )

    def _admit(
        self, history: tuple[DpSgd, ...], recent: tuple[DpSgd, ...], events: tuple[DpSgd, ...], where: str
    ) -> float | RefusedError:
        limits = self.limits
        try:
            if limits.period_days:
                admit(recent, events, limits.period_cap, limits.delta, f"{where}, any {limits.period_days} days")
            return admit(history, events, limits.cap, limits.delta, where)
        except RefusedError as error:
            return error
        except StateError as error:
            raise RefusedError("budget.accountants", error.what, where=where, got=error.got) from error

    def _insert(
        self,
        db: sqlite3.Connection,
        events: list[dict[str, object]],
        core: PlanCore,
        admitted: dict[int, float],
        left_out: tuple[int, ...],
        now: float,
    ) -> Reservation:
        spec = core.training
        entry = int(db.execute("SELECT COALESCE(MAX(id), 0) + 1 FROM entry").fetchone()[0])
        values = (
            entry,
            core.run,
            core.round,
            core.digest,
            core.base,
            spec.noise_multiplier,
            spec.sample_rate,
            spec.steps,
        )
        db.execute(
            "INSERT INTO entry (state, id, run, round, plan, base, noise_multiplier, sample_rate, steps, record, reserved_at)"
            " VALUES ('reserved', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, core.to_bytes(), now),
        )
        db.executemany(
            "INSERT INTO charge VALUES (?, ?, ?, ?, ?)",
            ((entry, block, bound, self.limits.cap, self.limits.delta) for block, bound in admitted.items()),
        )
        numbers = [(n.name, n.noise_multiplier) for n in core.noised]
        db.executemany("INSERT INTO noised VALUES (?, ?, ?)", ((entry, *number) for number in numbers))
        names = ("entry", "run", "round", "plan", "base", "noise_multiplier", "sample_rate", "steps")
        charged = {
            "blocks": sorted(admitted),
            "admitted": [admitted[block] for block in sorted(admitted)],
            "cap": self.limits.cap,
            "delta": self.limits.delta,
            "noised": [list(number) for number in numbers],
            "secure": "" if core.secure is None else digest(canonical(core.secure.members)),
        }
        events.append({"event": "reserve", "at": now} | charged | dict(zip(names, values, strict=True)))
        return Reservation(entry, tuple(sorted(admitted)), left_out)

    def spend(self, entry: int, update_digest: str, vector_digest: str = "") -> None:
        """Marks a reservation as spent, before its update leaves; ``vector_digest`` is of the update without numbers beside it.

        Raises:
            StateError: There is no such open reservation.
        """
        with self._chain.transaction() as (db, events):
            self._spend(db, events, entry, update_digest, vector_digest)

    def _spend(
        self, db: sqlite3.Connection, events: list[dict[str, object]], entry: int, update_digest: str, vector: str = ""
    ) -> None:
        now = time.time()
        if not self._close(db, entry, "spent", update_digest, now):
            raise StateError("no open reservation to spend", where=str(self.path), got=f"entry {entry}")
        events.append({"event": "spend", "entry": entry, "update": update_digest, "vector": vector, "at": now})

    def lose(self, entry: int) -> None:
        """Closes a reservation whose training failed; it stays charged."""
        with self._chain.transaction() as (db, events):
            self._lose(db, events, entry)

    def _lose(self, db: sqlite3.Connection, events: list[dict[str, object]], entry: int) -> None:
        now = time.time()
        if self._close(db, entry, "lost", None, now):
            events.append({"event": "lose", "entry": entry, "at": now})

    def void(self, entry: int, by: SigningKey) -> None:
        """Gives a reservation back whose text was not read: the caller's word, under the site's key.

        Raises:
            StateError: It is not open, or another process made it: nobody here can say that nothing left.
        """
        if (os.getpid(), entry) not in self._own:
            raise StateError("this process did not make the reservation", where=str(self.path), got=f"entry {entry}")
        with self._chain.transaction() as (db, events):
            plan = db.execute("SELECT plan FROM entry WHERE id = ?", (entry,)).fetchone()
            now = time.time()
            if not self._close(db, entry, "void", None, now):
                raise StateError("no open reservation to void", where=str(self.path), got=f"entry {entry}")
            statement = {"event": "void", "entry": entry, "plan": plan[0], "left": "nothing", "at": now}
            events.append(statement | {"signature": by.sign(VOID_PURPOSE, canonical(statement)).hex()})

    def spent_before(self, run: str, number: int) -> list[int]:
        """Rounds of a run before ``number`` that this site spent on, in order."""
        with self._chain.reading() as db:
            found = "SELECT DISTINCT round FROM entry WHERE run = ? AND round < ? AND state = 'spent' ORDER BY round"
            return [int(row[0]) for row in db.execute(found, (run, number))]

    def head(self, log: str) -> Checkpoint:
        """The head of this ledger as a Merkle log of that name."""
        tree = self._chain.tree()
        return Checkpoint(log, len(tree), tree.root())

    def contains(self, head: Checkpoint) -> bool:
        """Whether this ledger begins with what ``head`` is of."""
        tree = self._chain.tree()
        return head.size <= len(tree) and tree.root(head.size) == head.root

    def records(self) -> list[bytes]:
        """Every event's canonical bytes, oldest first: the leaves."""
        return self._chain.records()

    def note(self, record: dict[str, object], numbers: Mapping[str, float]) -> None:
        """Chains a record of numbers that left without being private, before they leave; their values stay in the ledger."""
        with self._chain.transaction() as (_, events):
            public = {"event": "nonprivate_release", "numbers": sorted(numbers)}
            events.append(public | record | {PRIVATE: dict(numbers)})

    @staticmethod
    def _close(db: sqlite3.Connection, entry: int, state: str, update_digest: str | None, now: float) -> bool:
        return bool(
            db.execute(
                "UPDATE entry SET state = ?, update_digest = ?, closed_at = ? WHERE id = ? AND state = 'reserved'",
                (state, update_digest, now, entry),
            ).rowcount
        )

    def charged_for(self, run: str, number: int) -> bool:
        """Whether any work of a round was charged here, whatever came of it: what was given back alone does not count."""
        with self._chain.reading() as db:
            found = "SELECT 1 FROM entry WHERE run = ? AND round = ? AND state <> 'void' LIMIT 1"
            row = db.execute(found, (run, number)).fetchone()
        return row is not None

    def works(self, run: str, number: int) -> list[str]:
        """Digests of the works of a round that were reserved here."""
        with self._chain.reading() as db:
            found = "SELECT DISTINCT plan FROM entry WHERE run = ? AND round = ?"
            return [str(plan) for (plan,) in db.execute(found, (run, number))]

    def spent_on(self, plan: str) -> str | None:
        """Digest of the update that this work was spent on: the one that may leave; None where nothing was."""
        with self._chain.reading() as db:
            row = db.execute("SELECT update_digest FROM entry WHERE plan = ? AND state = 'spent'", (plan,)).fetchone()
        return str(row[0]) if row else None

    def _recent(self, db: sqlite3.Connection, block: int, now: float) -> tuple[DpSgd, ...]:
        return history_of(db, block, after=now - self.limits.period_days * _DAY) if self.limits.period_days else ()

    def standings(self) -> tuple[Standing, ...]:
        """Where each block stands, in order of registration.

        Raises:
            StateError: The accountants disagree.
        """
        return self._standings(shares=True)

    def _standings(self, *, shares: bool) -> tuple[Standing, ...]:
        now = time.time()
        with self._chain.reading() as db:
            blocks = db.execute(
                "SELECT id, name, (SELECT COUNT(*) FROM unit WHERE block = block.id) FROM block ORDER BY id"
            ).fetchall()
            found = [
                (*b, history_of(db, b[0]), history_of(db, b[0], closed=True), self._recent(db, b[0], now))
                for b in blocks
            ]
            runs = {b[0]: shares_of(db, b[0]) if shares else [] for b in blocks}
            rounds = dict(
                db.execute(
                    f"SELECT block, COUNT(*) FROM charge JOIN entry ON id = entry WHERE state IN {CHARGED} GROUP BY block"  # noqa: S608
                ).fetchall()
            )
        delta = self.limits.delta
        return tuple(
            Standing(
                block,
                name,
                units,
                epsilon(whole, delta),
                epsilon(closed, delta),
                self.limits.cap,
                delta,
                epsilon(recent, delta),
                rounds.get(block, 0),
                sum(e.steps for e in whole),
                tuple(
                    Share(run, base, n, sum(e.steps for e in h), epsilon(h, delta)) for run, base, n, h in runs[block]
                ),
            )
            for block, name, units, whole, closed, recent in found
        )

    def standing(self) -> Standing:
        """Where the block stands that has the least left, without its shares; an empty one where nothing is registered."""
        none = Standing(0, "", 0, 0.0, 0.0, self.limits.cap, self.limits.delta, 0.0, 0, 0)
        return max(self._standings(shares=False), key=lambda s: s.epsilon, default=none)


def _keep_texts(
    db: sqlite3.Connection,
    events: list[dict[str, object]],
    blocks: Mapping[bytes, int],
    seen: set[bytes],
    texts: Mapping[bytes, Collection[bytes]],
) -> None:
    if not texts:
        return
    new = {text: blocks[unit] for unit in sorted(texts) if unit in blocks for text in texts[unit] if text not in seen}
    # Also where none is new: how many events there are must be the owner's doing and not one text's.
    batch = db.execute("SELECT COUNT(*) + 1 FROM fact WHERE kind = 'text'").fetchone()[0]
    rows = sorted(new.items())
    db.executemany("INSERT INTO text VALUES (?, ?, ?)", ((text, block, batch) for text, block in rows))
    private = {"texts": len(rows), "tags": digest_of(rows)}
    events.append({"event": "text", "batch": batch, "at": time.time(), PRIVATE: private})
