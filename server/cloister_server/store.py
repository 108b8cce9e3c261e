"""The registry of runs and rounds: one transaction a round.

States of a round: planned (its work is written down), open (it is being sent), aggregating (what came is being made into a candidate),
committed or aborted; a resumed run plans an unfinished one anew. A committed round never changes (``rules``); ``(run, number)`` is unique.
What is registered for good is a leaf of the federation's log in the same transaction (``log``). A coordinator takes a fence number before
it runs rounds: from then on one that holds a lower number writes nothing of a round. Blobs are written before the transaction that names
them and looked for under its lock, so that a row never points at nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cloister_shared.errors import StateError
from cloister_shared.notes import Checkpoint
from sqlmodel import Session, select

from cloister_server.facts import commit_facts, run_facts
from cloister_server.log import ABORTED_CLIENT, append, commit_body, now, said, size
from cloister_server.records import Records, keys_by_name
from cloister_server.tables import (
    ABORTED,
    AGGREGATING,
    COMMITTED,
    OPEN,
    PLANNED,
    Blob,
    Draw,
    Evidence,
    Judgement,
    Leaf,
    Metric,
    Model,
    NoisedSum,
    Opening,
    Privacy,
    Round,
    RoundClient,
    Run,
    Signature,
    Summed,
    Tombstone,
    Witnessed,
)

# What the client-level statement is about.
CLIENT_UNIT = "one client's whole update in a round"


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
        privacy: What it cost whom.
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
    privacy: Sequence[Privacy] = ()


@dataclass(frozen=True)
class Origin:
    """Where an imported adapter comes from.

    Attributes:
        statement: The signed statement that it came with.
        key: The key that signed it, hex.
        said: What the log is told of it.
    """

    statement: bytes
    key: str
    said: Mapping[str, Any]


class Store(Records):
    """The registry."""

    def keep_witness(
        self, client: str, at: Checkpoint, line: str, head: Checkpoint, note: str, before: Sequence[str]
    ) -> None:
        """Remembers what a site cosigned and the head of its own log; neither goes back.

        Args:
            client: The site's key id.
            at: The head of this log that it was shown.
            line: Its cosignature of it, or empty.
            head: The head of its own log.
            note: The same, as it was signed; empty where it told none.
            before: The heads of its logs, under each of its keys, that its answer was held against.

        Raises:
            RefusedError: Another coordinator has taken over, and has a head of this site that is none of those by now.
        """
        with self.database.writing() as session:
            if self._taken_over(session):
                keys = next((keys for keys in keys_by_name(session).values() if client in keys), [client])
                if any(row.head not in ("", *before) for key in keys if (row := session.get(Witnessed, key))):
                    self._fenced(session)
            row = session.get(Witnessed, client) or Witnessed(client=client)
            if line and at.size >= row.size:
                row.size, row.root, row.line = at.size, at.root.hex(), line
            if head.size >= row.head_size:
                row.head_size, row.head = head.size, note
            session.add(row)

    def add_statement(self, run: str, number: int, statement: bytes, key: str) -> str:
        """Keeps a signed statement of a round, whose export is a leaf in the same transaction; returns the statement's digest.

        Raises:
            StateError: The round's adapter was given up meanwhile.
        """
        name = self.blobs.put(statement)
        with self.database.writing() as session:
            adapter = session.get_one(Round, (run, number)).adapter
            _not_given_up(session, adapter or "")
            self._stated(session, run, number, name, key, statement, at := now())
            body = {"run": run, "round": number, "adapter": adapter, "statement": name}
            append(session, "export", body, self.signing, at)
        return name

    def _stated(
        self, session: Session, run: str, number: int, name: str, key: str, statement: bytes, at: float
    ) -> None:
        self._named(session, name, "statement")
        if session.get(Signature, (name, key)) is None:
            signature = str(json.loads(statement)["signature"])
            made = Signature(statement=name, key=key, run=run, number=number, signature=signature, at=at)
            session.add(made)

    def _named(self, session: Session, name: str, kind: str) -> None:
        """Writes down that a row names this blob; it must be there, and ``registry gc`` waits for the same lock."""
        size_now = self.blobs.size(name)
        if size_now is None:
            raise StateError(
                "the blob is not there", where=self.blobs.place, got=name[:16],
                mend="the same command again; for a run, cloister run --resume",
            )  # fmt: skip
        _not_given_up(session, name)
        if session.get(Blob, name) is None:
            session.add(Blob(digest=name, kind=kind, bytes=size_now, created=time.time()))

    def start_run(self, run: Run, adapter: bytes, model: Model, origin: Origin | None = None) -> None:
        """Registers a run with the adapter that it starts from, as round 0.

        Args:
            run: The run.
            adapter: Its first adapter, a safetensors file.
            model: The base model that it trains on.
            origin: Where that adapter comes from, where it was another registry's.

        Raises:
            StateError: It is there, or the same statement was imported before.
        """
        name = self.blobs.put(adapter)
        statement = "" if origin is None else self.blobs.put(origin.statement)
        with self.database.writing() as session:
            self._fenced(session)
            self._named(session, name, "adapter")
            if session.get(Model, model.digest) is None:
                session.add(model)
            session.add(run)
            session.flush()
            session.add(
                Round(run=run.id, number=0, state=COMMITTED, adapter=name, opened=run.created, committed=run.created)
            )
            body, at = run_facts(run) | {"rounds": run.rounds, "adapter": name}, now()
            if origin is not None:
                for leaf in session.exec(select(Leaf).where(Leaf.kind == "policy")):
                    before = (record := said(leaf)).get("imported") or {}
                    if (before.get("log"), before.get("leaf")) == (origin.said["log"], origin.said["leaf"]):
                        raise StateError(
                            "this round was imported before",
                            where=f"leaf {leaf.index}",
                            got=f"run {str(record.get('run'))[:8]} began with it",
                            mend="cloister rounds show 0 --run RUN",
                        )
                self._stated(session, run.id, 0, statement, origin.key, origin.statement, at)
                body["imported"] = dict(origin.said) | {"statement": statement}
            append(session, "policy", body, self.signing, at)

    def set_flower_run(self, run: str, flower_run: int) -> None:
        """Remembers Flower's id of the run's present attempt."""
        with self.database.writing() as session:
            self._fenced(session)
            row = session.get_one(Run, run)
            row.flower_run = str(flower_run)

    def register_draw(self, run: str, transcript: str) -> None:
        """Writes a run's draw, once.

        Raises:
            StateError: There is one.
        """
        with self.database.writing() as session:
            self._fenced(session)
            session.add(Draw(run=run, transcript=transcript))

    def keep_opening(self, row: Opening) -> None:
        """Writes down for whom a group is asked to open, once.

        Raises:
            StateError: It is there.
        """
        with self.database.writing() as session:
            self._fenced(session)
            session.add(row)

    def keep_mean(self, run: str, number: int, group: str, mean: str) -> None:
        """Writes down what a group's opening gave."""
        with self.database.writing() as session:
            self._fenced(session)
            self._named(session, mean, "mean")
            session.get_one(Opening, (run, number, group)).mean = mean

    def finish_run(self, run: str) -> None:
        """Marks a run as finished."""
        with self.database.writing() as session:
            self._fenced(session)
            row = session.get_one(Run, run)
            row.finished = time.time()

    def plan_round(self, row: Round, clients: Sequence[RoundClient]) -> tuple[Round, list[RoundClient]]:
        """Writes a round's work down before anything is sent; where it is there already, the same work gets a new attempt.

        Who has a part in it by now and had none gets one, but for a site that has one under another key.

        Raises:
            StateError: It is committed, or the one before it is not: the database was put back beneath this process.
        """
        with self.database.writing() as session:
            self._fenced(session)
            where, last = f"run {row.run[:8]} round {row.number}", session.get(Round, (row.run, row.number - 1))
            if last is None or last.state != COMMITTED:
                raise StateError(
                    "the round before it is not committed: the database was put back beneath this process",
                    where=where,
                    expected=f"round {row.number - 1} committed",
                    got="no such round" if last is None else last.state,
                    mend="put the newest database back; if this is it: cloister registry fsck, then cloister run --resume",
                )
            row.state, row.fence = PLANNED, self._fence
            known = session.get(Round, (row.run, row.number))
            if known is None:
                session.add(row)
                session.add_all(clients)
                return row, list(clients)
            if known.state == COMMITTED:
                raise StateError("the round is committed", where=where)
            known.state, known.attempt, known.fence = PLANNED, known.attempt + 1, self._fence
            known.config, known.code, known.lock = row.config, row.code, row.lock
            asked = select(RoundClient).where(RoundClient.run == row.run, RoundClient.number == row.number)
            before = list(session.exec(asked))
            names = {one.name for one in before}
            added = [one for one in clients if one.name not in names]
            for one in added:
                # Nothing of an earlier attempt was sent to it: unlike what a coordinator that died left open, it is free.
                one.verdict = "missing"
            session.add_all(added)
            return known, before + added

    def advance(self, run: str, number: int, state: str) -> None:
        """Moves a round on: to ``open`` before its plans are sent, to ``aggregating`` when what comes has come.

        Raises:
            StateError: It does not move so from where it is.
        """
        with self.database.writing() as session:
            self._fenced(session)
            before = {OPEN: PLANNED, AGGREGATING: OPEN}[state]
            _in_state(session, run, number, before).state = state
            if state == OPEN:
                # From here on a site may be charged for this attempt: should this process die, its row says that nobody knows.
                for row in session.exec(
                    select(RoundClient).where(RoundClient.run == run, RoundClient.number == number)
                ):
                    row.verdict = "open"

    def commit_round(self, run: str, number: int, commit: Commit) -> None:
        """Commits a round, whole, in one transaction.

        Raises:
            StateError: It is not being aggregated.
        """
        with self.database.writing() as session:
            self._fenced(session)
            row = _in_state(session, run, number, AGGREGATING)
            self._named(session, commit.adapter, "adapter")
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
            for cost in commit.privacy:
                session.merge(cost)
            session.flush()  # the rules let nothing follow the commit
            clients = list(
                session.exec(select(RoundClient).where(RoundClient.run == run, RoundClient.number == number))
            )
            of_run, row.leaf = session.get_one(Run, run), size(session)
            row.state, row.adapter, row.committed, row.fence = COMMITTED, commit.adapter, (at := now()), self._fence
            row.seconds, row.judging_seconds, row.residual = commit.seconds, commit.judging_seconds, commit.residual
            drawn = session.get(Draw, run)
            transcript = None if drawn is None else drawn.transcript
            facts = commit_facts(
                of_run, row, transcript, commit.metrics, commit.judgement, commit.summed, commit.privacy
            )
            before = session.get(Round, (run, number - 1))
            start = "" if before is None else before.adapter or ""
            append(session, "round_commit", commit_body(row, start, clients, facts, commit.heads), self.signing, at)

    def abort_round(
        self, run: str, number: int, clients: dict[str, dict[str, Any]], privacy: Sequence[Privacy] = ()
    ) -> None:
        """Marks an unfinished round as aborted, with what is known of its clients; a resumed run plans it again."""
        with self.database.writing() as session:
            self._fenced(session)
            row = session.get_one(Round, (run, number))
            row.state = ABORTED
            for cost in privacy:
                session.merge(cost)
            for client, changes in clients.items():
                entry = session.get_one(RoundClient, (run, number, client))
                for key, value in changes.items():
                    setattr(entry, key, value)
            asked = session.exec(select(RoundClient).where(RoundClient.run == run, RoundClient.number == number))
            body = {
                "what": "round aborted",
                "run": run,
                "round": number,
                "attempt": row.attempt,
                "clients": [{n: getattr(c, n) for n in ABORTED_CLIENT} for c in sorted(asked, key=lambda c: c.client)],
            }
            append(session, "incident", body, self.signing)

    def charge_noised_sum(self, row: NoisedSum, price: Callable[[list[NoisedSum]], float]) -> NoisedSum:
        """Charges the federation's ledger durably; only then may the noise be drawn.

        Args:
            row: The charge.
            price: Epsilon of all charges, this one last; raises where it is too much.

        Raises:
            RefusedError: ``price`` says no; nothing is written.
            StateError: This attempt was charged before.
        """
        with self.database.writing() as session:
            self._fenced(session)
            # In one transaction with the reading: two coordinators cannot both take the last of a budget.
            if session.get(NoisedSum, (row.run, row.number, row.attempt)) is not None:
                where = f"run {row.run[:8]} round {row.number} attempt {row.attempt}"
                raise StateError("noise was drawn for this attempt before", where=where, mend="cloister run --resume")
            earlier = list(session.exec(select(NoisedSum).order_by(NoisedSum.charged)))  # type: ignore[arg-type]
            row.epsilon = price([*earlier, row])
            session.add(row)
            of_run = [one for one in earlier if one.run == row.run]
            session.merge(
                Privacy(
                    run=row.run,
                    number=row.number,
                    client="",
                    scope="client",
                    unit=CLIENT_UNIT,
                    epsilon=price([*of_run, row]),
                    delta=row.delta,
                    lifetime=row.epsilon,
                )
            )
            append(session, "spend", {"scope": "client"} | row.model_dump(), self.signing)
        return row


def _not_given_up(session: Session, adapter: str) -> None:
    if (grave := session.get(Tombstone, adapter)) is not None:
        raise StateError("this adapter was given up", where=f"run {grave.run[:8]} round {grave.number}", got=grave.why)


def _in_state(session: Session, run: str, number: int, state: str) -> Round:
    row = session.get(Round, (run, number))
    if row is None or row.state != state:
        got = row.state if row else "none"
        raise StateError(f"the round is not {state}", where=f"run {run[:8]} round {number}", got=got)
    return row
