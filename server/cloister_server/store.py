"""The registry of runs and rounds: SQLModel tables on SQLite, one transaction a round.

States of a round: open -> committed | aborted. A committed round never changes (a trigger holds it); ``(run, number)`` is unique.
What is registered for good is a leaf of the federation's log in the same transaction (``log``). A coordinator takes a fence number before
it runs rounds: from then on one that holds a lower number writes nothing of a round. Blobs are written before the transaction that names
them, so that a row never points at nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cloister_shared.cards import SiteCard
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import InputError, RefusedError, StateError
from cloister_shared.merkle import Tree
from cloister_shared.notes import Checkpoint
from cloister_shared.signing import SigningKey
from cloister_shared.witness import MAX_HASHES, Cosignature, View, log_of_federation
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlmodel import Field, Session, SQLModel, create_engine, select

from cloister_server.blobs import Blobs
from cloister_server.log import Leaf, Witnessed, append, commit_body, leaves, membership, size


class Run(SQLModel, table=True):
    """A run: what every round of it shares."""

    id: str = Field(primary_key=True)
    federation: str
    created: float
    rounds: int
    base: str
    task: str
    rule: str
    tensors: str
    config: str
    code: str
    flower_run: str | None = None  # Flower counts in unsigned 64 bits, SQLite in signed
    finished: float | None = None


class Round(SQLModel, table=True):
    """A round. Number 0 is the adapter that the run starts from."""

    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    state: str
    attempt: int = 1
    parent: str | None = None
    adapter: str | None = None
    residual: float | None = None
    opened: float
    committed: float | None = None
    seconds: float = 0.0
    judging_seconds: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    leaf: int | None = None  # of the commit, in the log


class RoundClient(SQLModel, table=True):
    """What one client was asked in a round and what came of it."""

    __tablename__ = "round_client"
    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    client: str = Field(primary_key=True)
    name: str
    plan: str
    core: str
    verdict: str = "open"
    reason: str = ""
    weight: float
    update: str = ""
    noise_multiplier: float
    sample_rate: float
    steps: int
    epsilon: float = 0.0
    delta: float
    charged: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    report: str = ""


class Metric(SQLModel, table=True):
    """A score of a round's adapter on the coordinator's held-out text."""

    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    name: str = Field(primary_key=True)
    value: float


class NoisedSum(SQLModel, table=True):
    """A sum of client updates that noise was drawn for: the federation's ledger, whatever became of the round.

    Written before the noise is drawn; never changed. An attempt draws once. Nothing here is about a site's own ledger.
    """

    __tablename__ = "noised_sum"
    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    attempt: int = Field(primary_key=True)
    charged: float
    noise_multiplier: float
    clipping_norm: float
    noise_std: float  # of every element of the sum, whoever took part
    planned: int  # the denominator
    participants: int
    clients: str  # their ids, JSON
    delta: float
    epsilon: float = 0.0  # of all sums of this federation up to this one, at delta


class Evidence(SQLModel, table=True):
    """One test of one client's update against its cohort."""

    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    client: str = Field(primary_key=True)
    test: str = Field(primary_key=True)
    code: str
    observed: float
    threshold: float
    median: float
    mad: float


class Draw(SQLModel, table=True):
    """The groups of a run under secure aggregation: its whole draw, from which anybody can check them. Never changed."""

    run: str = Field(primary_key=True, foreign_key="run.id")
    transcript: str


class Opening(SQLModel, table=True):
    """For whom a group was asked to open its sum, in whatever attempt at a round: it opens for the same again and for no others.

    Written before the group is asked; the mean once it is known, so that it need not be asked again.
    """

    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    group: str = Field(primary_key=True)
    clients: str  # ids of the living, JSON
    mean: str = ""  # digest of the mean's float32 bytes


class Summed(SQLModel, table=True):
    """What the coordinator saw of one group in a round under secure aggregation: the sum of these clients' updates, and no other."""

    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    group: str = Field(primary_key=True)
    members: int
    clients: str  # ids of those in the sum, JSON


class Judgement(SQLModel, table=True):
    """What a round's defence did."""

    run: str = Field(primary_key=True, foreign_key="run.id")
    number: int = Field(primary_key=True)
    rule: str
    attackers: int
    judged: int
    entered: int
    held: str  # why the parent was kept, empty where it was not
    shares: str  # what each client's update brought, JSON by client id; null where the rule goes by coordinate


class Alias(SQLModel, table=True):
    """A name that points at a committed round; moved by compare-and-set on ``version``."""

    name: str = Field(primary_key=True)
    run: str = Field(foreign_key="run.id")
    number: int
    adapter: str
    version: int


class AliasEvent(SQLModel, table=True):
    """One move of an alias. Never changed."""

    __tablename__ = "alias_event"
    name: str = Field(primary_key=True)
    version: int = Field(primary_key=True)
    run: str
    number: int
    adapter: str
    rollback: bool
    why: str
    at: float
    leaf: int


class Fence(SQLModel, table=True):
    """The newest coordinator's number: whoever holds a lower one writes no rounds."""

    id: int = Field(primary_key=True)
    number: int


def _triggers() -> Iterator[str]:
    """Nothing of a committed round, and no charge, changes, goes, comes or is replaced (REPLACE deletes without a DELETE trigger)."""
    yield (
        "CREATE TRIGGER IF NOT EXISTS round_replaced BEFORE INSERT ON round"
        " WHEN EXISTS (SELECT 1 FROM round WHERE run = NEW.run AND number = NEW.number AND state = 'committed')"
        " BEGIN SELECT RAISE(ABORT, 'UNIQUE: a committed round never changes'); END"
    )
    for deed in ("UPDATE", "DELETE"):
        yield (
            f"CREATE TRIGGER IF NOT EXISTS round_{deed.lower()} BEFORE {deed} ON round WHEN OLD.state = 'committed'"
            " BEGIN SELECT RAISE(ABORT, 'a committed round never changes'); END"
        )
    same = "run = NEW.run AND number = NEW.number AND attempt = NEW.attempt"
    again = f"WHEN EXISTS (SELECT 1 FROM noised_sum WHERE {same})"  # noqa: S608
    for deed, when in (("UPDATE", ""), ("DELETE", ""), ("INSERT", again)):
        yield (
            f"CREATE TRIGGER IF NOT EXISTS noised_sum_{deed.lower()} BEFORE {deed} ON noised_sum {when}"
            " BEGIN SELECT RAISE(ABORT, 'UNIQUE: what was charged stays'); END"
        )
    for deed in ("UPDATE", "DELETE"):
        yield (
            f"CREATE TRIGGER IF NOT EXISTS alias_event_{deed.lower()} BEFORE {deed} ON alias_event"
            " BEGIN SELECT RAISE(ABORT, 'what an alias did stays'); END"
        )
    for deed in ("UPDATE", "DELETE", "INSERT"):
        known = "" if deed != "INSERT" else 'WHEN EXISTS (SELECT 1 FROM log_leaf WHERE "index" = NEW."index")'
        yield (
            f"CREATE TRIGGER IF NOT EXISTS log_leaf_{deed.lower()} BEFORE {deed} ON log_leaf {known}"
            " BEGIN SELECT RAISE(ABORT, 'UNIQUE: the log is only added to'); END"
        )
    for table in ("round_client", "metric", "evidence", "judgement", "summed"):
        for deed, row in (("UPDATE", "OLD"), ("DELETE", "OLD"), ("INSERT", "NEW")):
            known = f"SELECT 1 FROM round WHERE run = {row}.run AND number = {row}.number AND state = 'committed'"  # noqa: S608
            yield (
                f"CREATE TRIGGER IF NOT EXISTS {table}_{deed.lower()} BEFORE {deed} ON {table} WHEN EXISTS ({known})"
                " BEGIN SELECT RAISE(ABORT, 'a committed round never changes'); END"
            )


@dataclass(frozen=True)
class Commit:
    """What a commit writes.

    Attributes:
        adapter: Digest of the new adapter's blob.
        seconds: Seconds from plan to commit, judging apart.
        judging_seconds: Seconds of judging.
        clients: Changes per client id.
        metrics: Scores by name.
        residual: What the rule ``exact`` could not keep, relative; None for the linear rules.
        judgement: What the defence did; None where there is none.
        evidence: Its tests.
        summed: The groups' sums under secure aggregation.
        heads: Signed notes of the sites' own logs, by client id.
    """

    adapter: str
    seconds: float
    judging_seconds: float
    clients: dict[str, dict[str, Any]]
    metrics: dict[str, float]
    residual: float | None = None
    judgement: Judgement | None = None
    evidence: Sequence[Evidence] = ()
    summed: Sequence[Summed] = ()
    heads: Mapping[str, str] = field(default_factory=dict)


class Store:
    """The registry in a coordinator's folder.

    Args:
        home: The folder; ``registry.db`` and ``blobs/`` are made where missing.

    Raises:
        StateError: The database cannot be opened.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.blobs = Blobs(home / "blobs")
        self._engine: Engine = create_engine(f"sqlite:///{home / 'registry.db'}", connect_args={"timeout": 30})

        @event.listens_for(self._engine, "connect")
        def _connected(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # the driver's own BEGIN would be deferred
            connection.execute("PRAGMA foreign_keys=ON")
            connection.execute("PRAGMA synchronous=FULL")

        @event.listens_for(self._engine, "begin")
        def _begun(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        try:
            SQLModel.metadata.create_all(self._engine)
            with self._engine.begin() as connection:
                for statement in _triggers():
                    connection.execute(text(statement))
        except SQLAlchemyError as error:
            raise StateError(
                "the registry cannot be opened", where=str(home / "registry.db"), got=str(error).splitlines()[0]
            ) from error
        (home / "registry.db").chmod(0o600)
        self._tree, self._fence = Tree(), 0

    @cached_property
    def _signing(self) -> SigningKey:
        """The log's key: the coordinator's own."""
        return SigningKey.load(self.home / "sign.key")

    @property
    def origin(self) -> str:
        """The log's name."""
        return log_of_federation(self._signing.verify_key)

    def take_fence(self) -> int:
        """Takes the next fence number: coordinators before this one write no rounds from now on."""
        with self._session() as session:
            row = session.get(Fence, 1) or Fence(id=1, number=0)
            row.number += 1
            session.add(row)
            self._fence = row.number
        return self._fence

    def _fenced(self, session: Session) -> None:
        row = session.get(Fence, 1)
        newest = row.number if row is not None else 0
        if newest != self._fence and self._fence:
            raise RefusedError(
                "registry.fence",
                "another coordinator has taken over",
                where=str(self.home / "registry.db"),
                expected=f"fence {newest}",
                got=str(self._fence),
                mend="let the newer one run, or start again: cloister run --resume",
            )

    def log(self, kind: str, body: Mapping[str, Any]) -> Leaf:
        """Adds a leaf to the federation's log, in a transaction of its own."""
        with self._session() as session:
            return append(session, kind, body, self._signing)

    def leaves(self, start: int = 0, end: int | None = None) -> list[Leaf]:
        """Leaves of the log from ``start`` up to ``end``."""
        with Session(self._engine) as session:
            return leaves(session, start, end)

    def alias(self, name: str) -> Alias | None:
        """Where an alias points now."""
        with Session(self._engine) as session:
            return session.get(Alias, name)

    def aliases(self) -> list[Alias]:
        """Every alias, by name."""
        with Session(self._engine) as session:
            return list(session.exec(select(Alias).order_by(Alias.name)))

    def alias_events(self, name: str) -> list[AliasEvent]:
        """Every move of an alias, oldest first."""
        with Session(self._engine) as session:
            found = select(AliasEvent).where(AliasEvent.name == name).order_by(AliasEvent.version)  # type: ignore[arg-type]
            return list(session.exec(found))

    def set_alias(
        self, name: str, run: str, number: int, adapter: str, expected: int, why: str, *, rollback: bool = False
    ) -> Alias:
        """Moves an alias, where it is at the version that the caller saw; the move is a leaf in the same transaction.

        Raises:
            StateError: Somebody moved it meanwhile, or the round is not committed with that adapter.
        """
        with self._session() as session:
            row, target = session.get(Alias, name), session.get(Round, (run, number))
            if (0 if row is None else row.version) != expected:
                got = "none" if row is None else f"move {row.version}, round {row.number} of run {row.run[:8]}"
                raise StateError("the alias was moved meanwhile", where=name, expected=f"move {expected}", got=got)
            if target is None or target.state != "committed" or target.adapter != adapter:
                raise StateError("only a committed round can be released", where=f"run {run[:8]} round {number}")
            row = row or Alias(name=name, run=run, number=number, adapter=adapter, version=0)
            row.run, row.number, row.adapter, row.version = run, number, adapter, expected + 1
            body = {"alias": name, "run": run, "round": number, "adapter": adapter, "version": row.version}
            leaf = append(session, "alias_set", body | {"rollback": rollback, "why": why}, self._signing)
            session.add(row)
            session.add(AliasEvent(**row.model_dump(), rollback=rollback, why=why, at=time.time(), leaf=leaf.index))
        return row

    def commit_leaf(self, run: str, number: int) -> Leaf | None:
        """The leaf of a round's commit; None for round 0, which is none."""
        with Session(self._engine) as session:
            row = session.get(Round, (run, number))
            return None if row is None or row.leaf is None else session.get(Leaf, row.leaf)

    def policy_leaf(self, run: str) -> Leaf:
        """The leaf that a run began with."""
        with Session(self._engine) as session:
            found = session.exec(select(Leaf).where(Leaf.kind == "policy"))
            return next(leaf for leaf in found if json.loads(leaf.record)["run"] == run)

    def is_committed(self, adapter: str) -> bool:
        """Whether a committed round has this adapter."""
        with Session(self._engine) as session:
            chosen = select(Round).where(Round.adapter == adapter, Round.state == "committed")
            return session.exec(chosen).first() is not None

    def tree(self) -> Tree:
        """The log's tree, as far as it goes now."""
        for leaf in self.leaves(len(self._tree)):
            self._tree.append(leaf.hash)
        return self._tree

    def checkpoint(self) -> Checkpoint:
        """The log's head now."""
        tree = self.tree()
        return Checkpoint(self.origin, len(tree), tree.root())

    def signed_checkpoint(self, at: Checkpoint) -> str:
        """A head as a signed note."""
        return at.signed(self._signing)

    def log_members(self, cards: Sequence[SiteCard]) -> None:
        """Sees that the log has exactly these sites as enrolled; what is missing is added, so that a crash between leaves no gap."""
        with self._session() as session:
            known, now = membership(leaves(session)), {card.name: asdict(card) for card in cards}
            named = {name: digest(canonical(card)) for name, card in now.items()}
            for name in sorted(known):
                if named.get(name) != known[name]:
                    append(session, "revoke", {"site": name}, self._signing)
            for name in sorted(now):
                if named[name] != known.get(name):
                    append(session, "enrol", {"site": name, "card": now[name]}, self._signing)

    def view_for(self, client: str, at: Checkpoint, known: Mapping[str, Witnessed]) -> View:
        """What a site is shown of the log: its head, the way there from what the site cosigned last, and others' cosignatures.

        Args:
            client: The site.
            at: The head.
            known: From ``witnessed``.
        """
        tree = self.tree()
        seen = known[client].size if client in known else 0
        start = max(min(seen, at.size), at.size - MAX_HASHES)
        others = {i: Cosignature(row.size, row.line) for i, row in known.items() if i != client and row.line}
        return View(at.signed(self._signing), start, tree.range(start).tops, tuple(tree.hashes(start, at.size)), others)

    def keep_witness(self, client: str, at: Checkpoint, line: str, head: Checkpoint, note: str) -> None:
        """Remembers what a site cosigned and the head of its own log; neither goes back."""
        with self._session() as session:
            row = session.get(Witnessed, client) or Witnessed(client=client)
            if line and at.size >= row.size:
                row.size, row.root, row.line = at.size, at.root.hex(), line
            if head.size >= row.head_size:
                row.head_size, row.head = head.size, note
            session.add(row)

    def witnessed(self) -> dict[str, Witnessed]:
        """What each site saw and signed last, by client."""
        with Session(self._engine) as session:
            return {row.client: row for row in session.exec(select(Witnessed))}

    def cosignatures(self) -> dict[str, tuple[int, str, str]]:
        """The newest head that each site cosigned, by client: size, root (hex) and signature line."""
        return {i: (row.size, row.root, row.line) for i, row in self.witnessed().items() if row.line}

    def triggers(self) -> set[str]:
        """The triggers that the database has, as they were made."""
        with Session(self._engine) as session:
            found = session.connection().exec_driver_sql("SELECT sql FROM sqlite_master WHERE type = 'trigger'")
            return {str(row[0]) for row in found}

    def close(self) -> None:
        """Closes every connection."""
        self._engine.dispose()

    @contextmanager
    def _session(self) -> Iterator[Session]:
        try:
            with Session(self._engine, expire_on_commit=False) as session:
                yield session
                session.commit()
        except IntegrityError as error:
            raise StateError(
                "the registry refused", where=str(self.home / "registry.db"), got=str(error.orig)
            ) from error
        except SQLAlchemyError as error:
            raise StateError(
                "the registry cannot be written",
                where=str(self.home / "registry.db"),
                got=str(error).splitlines()[0],
                mend="free space",
            ) from error

    def start_run(self, run: Run, adapter: bytes) -> None:
        """Registers a run with the adapter that it starts from, as round 0."""
        name = self.blobs.put(adapter)
        with self._session() as session:
            session.add(run)
            session.flush()
            session.add(
                Round(run=run.id, number=0, state="committed", adapter=name, opened=run.created, committed=run.created)
            )
            append(session, "policy", _run_facts(run) | {"rounds": run.rounds, "adapter": name}, self._signing)

    def set_flower_run(self, run: str, flower_run: int) -> None:
        """Remembers Flower's id of the run's present attempt."""
        with self._session() as session:
            row = session.get_one(Run, run)
            row.flower_run = str(flower_run)

    def register_draw(self, run: str, transcript: str) -> None:
        """Writes a run's draw, once.

        Raises:
            StateError: There is one.
        """
        with self._session() as session:
            session.add(Draw(run=run, transcript=transcript))

    def transcript(self, run: str) -> str | None:
        """A run's draw, JSON; None without secure aggregation."""
        with Session(self._engine) as session:
            found = session.get(Draw, run)
            return None if found is None else found.transcript

    def keep_opening(self, row: Opening) -> None:
        """Writes down for whom a group is asked to open, once.

        Raises:
            StateError: It is there.
        """
        with self._session() as session:
            session.add(row)

    def keep_mean(self, run: str, number: int, group: str, mean: str) -> None:
        """Writes down what a group's opening gave."""
        with self._session() as session:
            session.get_one(Opening, (run, number, group)).mean = mean

    def openings(self, run: str, number: int) -> list[Opening]:
        """Groups of a round that were asked to open in any attempt."""
        with Session(self._engine) as session:
            return list(session.exec(select(Opening).where(Opening.run == run, Opening.number == number)))

    def summed(self, run: str) -> list[Summed]:
        """What was seen of each group, by round."""
        with Session(self._engine) as session:
            return list(session.exec(select(Summed).where(Summed.run == run).order_by(Summed.number, Summed.group)))  # type: ignore[arg-type]

    def finish_run(self, run: str) -> None:
        """Marks a run as finished."""
        with self._session() as session:
            row = session.get_one(Run, run)
            row.finished = time.time()

    def open_round(self, row: Round, clients: Sequence[RoundClient]) -> tuple[Round, list[RoundClient]]:
        """Opens a round durably before anything is sent; where it is open already, the same work gets a new attempt.

        Raises:
            StateError: It is committed.
        """
        with self._session() as session:
            self._fenced(session)
            known = session.get(Round, (row.run, row.number))
            if known is None:
                session.add(row)
                session.add_all(clients)
                return row, list(clients)
            if known.state == "committed":
                raise StateError("the round is committed", where=f"run {row.run[:8]} round {row.number}")
            known.state, known.attempt = "open", known.attempt + 1
            return known, list(
                session.exec(select(RoundClient).where(RoundClient.run == row.run, RoundClient.number == row.number))
            )

    def commit_round(self, run: str, number: int, commit: Commit) -> None:
        """Commits a round, whole, in one transaction.

        Raises:
            StateError: It is not open.
        """
        with self._session() as session:
            self._fenced(session)
            row = session.get(Round, (run, number))
            if row is None or row.state != "open":
                raise StateError(
                    "the round is not open", where=f"run {run[:8]} round {number}", got=row.state if row else "none"
                )
            for client, changes in commit.clients.items():
                entry = session.get_one(RoundClient, (run, number, client))
                for key, value in changes.items():
                    setattr(entry, key, value)
                row.sent_bytes += entry.sent_bytes
                row.received_bytes += entry.received_bytes
            for name, value in commit.metrics.items():
                session.add(Metric(run=run, number=number, name=name, value=value))
            session.add_all([*commit.evidence, *commit.summed])
            if commit.judgement is not None:
                session.add(commit.judgement)
            session.flush()  # the triggers let nothing follow the commit
            clients = list(
                session.exec(select(RoundClient).where(RoundClient.run == run, RoundClient.number == number))
            )
            of_run, row.leaf = session.get_one(Run, run), size(session)
            row.state, row.adapter, row.committed = "committed", commit.adapter, time.time()
            row.seconds, row.judging_seconds, row.residual = commit.seconds, commit.judging_seconds, commit.residual
            extra = _run_facts(of_run) | {
                "metrics": commit.metrics,
                "defence": None if commit.judgement is None else commit.judgement.model_dump(exclude={"run", "number"}),
                "sums": [one.model_dump(exclude={"run", "number"}) for one in commit.summed],
            }
            before = session.get(Round, (run, number - 1))
            start = "" if before is None else before.adapter or ""
            append(session, "round_commit", commit_body(row, start, clients, extra, commit.heads), self._signing)

    def abort_round(self, run: str, number: int, clients: dict[str, dict[str, Any]]) -> None:
        """Marks an open round as aborted, with what is known of its clients; a resumed run opens it again."""
        with self._session() as session:
            self._fenced(session)
            row = session.get_one(Round, (run, number))
            row.state = "aborted"
            for client, changes in clients.items():
                entry = session.get_one(RoundClient, (run, number, client))
                for key, value in changes.items():
                    setattr(entry, key, value)
            verdicts = {client: str(changes.get("verdict", "")) for client, changes in clients.items()}
            body = {"what": "round aborted", "run": run, "round": number, "attempt": row.attempt, "clients": verdicts}
            append(session, "incident", body, self._signing)

    def charge_noised_sum(self, row: NoisedSum, price: Callable[[list[NoisedSum]], float]) -> NoisedSum:
        """Charges the federation's ledger durably; only then may the noise be drawn.

        Args:
            row: The charge.
            price: Epsilon of all charges, this one last; raises where it is too much.

        Raises:
            RefusedError: ``price`` says no; nothing is written.
            StateError: This attempt was charged before.
        """
        with self._session() as session:
            # In one transaction with the reading: two coordinators cannot both take the last of a budget.
            if session.get(NoisedSum, (row.run, row.number, row.attempt)) is not None:
                where = f"run {row.run[:8]} round {row.number} attempt {row.attempt}"
                raise StateError("noise was drawn for this attempt before", where=where, mend="cloister run --resume")
            earlier = list(session.exec(select(NoisedSum).order_by(NoisedSum.charged)))  # type: ignore[arg-type]
            row.epsilon = price([*earlier, row])
            session.add(row)
            append(session, "spend", {"scope": "client"} | row.model_dump(), self._signing)
        return row

    def noised_sums(self) -> list[NoisedSum]:
        """Every charge of the federation, over all runs, oldest first."""
        with Session(self._engine) as session:
            return list(session.exec(select(NoisedSum).order_by(NoisedSum.charged)))  # type: ignore[arg-type]

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        with Session(self._engine) as session:
            return list(session.exec(select(Run).order_by(Run.created)))  # type: ignore[arg-type]

    def find_run(self, name: str | None) -> Run:
        """A run by a prefix of its id; the newest for None.

        Raises:
            InputError: None or several.
        """
        found = [r for r in self.runs() if name is None or r.id.startswith(name)]
        if not found or (name is not None and len(found) > 1):
            raise InputError(
                "no such run" if not found else "several runs begin so",
                where=str(self.home),
                got=name or "none yet",
                mend="cloister rounds list" if self.runs() else "cloister run FEDERATION.toml",
            )
        return found[-1]

    def rounds(self, run: str) -> list[Round]:
        """Rounds of a run, by number."""
        with Session(self._engine) as session:
            return list(session.exec(select(Round).where(Round.run == run).order_by(Round.number)))  # type: ignore[arg-type]

    def last_committed(self, run: str) -> Round:
        """The newest committed round of a run; round 0 at least."""
        return [r for r in self.rounds(run) if r.state == "committed"][-1]

    def clients(self, run: str, number: int) -> list[RoundClient]:
        """Clients of a round, by name."""
        with Session(self._engine) as session:
            found = (
                select(RoundClient)
                .where(RoundClient.run == run, RoundClient.number == number)
                .order_by(RoundClient.name)
            )
            return list(session.exec(found))

    def asked(self, client: str) -> list[RoundClient]:
        """Everything a client was ever asked, over all runs."""
        with Session(self._engine) as session:
            return list(session.exec(select(RoundClient).where(RoundClient.client == client)))

    def metrics(self, run: str, number: int) -> dict[str, float]:
        """Scores of a round."""
        with Session(self._engine) as session:
            return {
                m.name: m.value for m in session.exec(select(Metric).where(Metric.run == run, Metric.number == number))
            }

    def evidence(self, run: str) -> list[Evidence]:
        """Every test of a run, by round."""
        with Session(self._engine) as session:
            return list(session.exec(select(Evidence).where(Evidence.run == run).order_by(Evidence.number)))  # type: ignore[arg-type]

    def judgements(self, run: str) -> list[Judgement]:
        """What the defence did in a run, by round."""
        with Session(self._engine) as session:
            return list(session.exec(select(Judgement).where(Judgement.run == run).order_by(Judgement.number)))  # type: ignore[arg-type]

    def adapter(self, digest: str) -> bytes:
        """An adapter's safetensors file, digest checked."""
        return self.blobs.get(digest)

    @staticmethod
    def labels(run: Run) -> tuple[str, ...]:
        """The run's labels."""
        return tuple(json.loads(run.task)["labels"])


def _run_facts(run: Run) -> dict[str, Any]:
    """What a leaf says of a run: what it trained, with which settings and which code, by digests."""
    return {
        "run": run.id,
        "federation": run.federation,
        "base": run.base,
        "rule": run.rule,
        "task": digest(run.task.encode()),
        "tensors": digest(run.tensors.encode()),
        "config": digest(run.config.encode()),
        "code": run.code,
    }


def triggers() -> set[str]:
    """The triggers of this version, as a database keeps them."""
    return {statement.replace("IF NOT EXISTS ", "", 1).strip() for statement in _triggers()}
