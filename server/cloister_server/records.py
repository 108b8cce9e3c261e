"""What the registry's rows say: every question that is asked of runs, rounds and what belongs to them. It writes nothing."""

from __future__ import annotations

import json
from typing import Any

from cloister_shared.encoding import canonical, digest, parse_record
from cloister_shared.errors import InputError, StateError, VerificationError
from cloister_shared.notes import claimed, is_of_key
from cloister_shared.signing import VerifyKey
from cloister_shared.statement import Proof
from sqlmodel import Session, col, select

from cloister_server.log import DAMAGED, column, said
from cloister_server.releases import Releases
from cloister_server.tables import (
    COMMITTED,
    Blob,
    Draw,
    Evidence,
    Fence,
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
    Witnessed,
)


class Records(Releases):
    """The registry, as far as its rows are read."""

    def runs(self) -> list[Run]:
        """All runs, in the order in which the log has them: clocks go back. Those that it does not tell of come first."""
        with self.database.reading() as session:
            leaves = session.exec(select(Leaf).where(Leaf.kind == "policy"))
            places = {_run_of(leaf.record): leaf.index for leaf in leaves}
            return sorted(session.exec(select(Run)), key=lambda run: (places.get(run.id, -1), run.created))

    def find_run(self, name: str | None) -> Run:
        """A run by a prefix of its id; for None the newest, of imported ones only where there are no others.

        Raises:
            InputError: None or several.
        """
        known = self.runs()
        own = [r for r in known if r.rounds] or known
        found = own if name is None else [r for r in known if r.id.startswith(name)]
        if not found or (name is not None and len(found) > 1):
            raise InputError(
                "no such run" if not found else "several runs begin so",
                where=str(self.home),
                got=name or "none yet",
                mend="cloister rounds list" if known else "cloister run FEDERATION.toml",
            )
        return found[-1]

    @staticmethod
    def labels(run: Run) -> tuple[str, ...]:
        """The run's labels."""
        return tuple(column(run.task, f"run {run.id[:8]} task").get("labels", ()))

    def imported(self, run: Run) -> dict[str, Any] | None:
        """Where an imported run's adapter comes from, as its leaf says; None for a run of this federation's own."""
        came = None if run.rounds else said(self.policy_leaf(run.id)).get("imported")
        return dict(came) if isinstance(came, dict) else None

    def rounds(self, run: str) -> list[Round]:
        """Rounds of a run, by number."""
        with self.database.reading() as session:
            return list(session.exec(select(Round).where(Round.run == run).order_by(Round.number)))  # type: ignore[arg-type]

    def round(self, run: str, number: int) -> Round:
        """A round of a run.

        Raises:
            StateError: There is none.
        """
        with self.database.reading() as session:
            row = session.get(Round, (run, number))
        if row is None:
            raise StateError("no such round", where=f"run {run[:8]}", got=str(number), mend=DAMAGED)
        return row

    def last_committed(self, run: str) -> Round:
        """The newest committed round of a run; round 0 at least.

        Raises:
            StateError: Not even that: rows were changed by hand.
        """
        found = [r for r in self.rounds(run) if r.state == COMMITTED]
        if not found:
            raise StateError("the run has no committed round", where=f"run {run[:8]}", expected="round 0", mend=DAMAGED)
        return found[-1]

    def clients(self, run: str, number: int) -> list[RoundClient]:
        """Clients of a round, by name."""
        with self.database.reading() as session:
            found = (
                select(RoundClient)
                .where(RoundClient.run == run, RoundClient.number == number)
                .order_by(RoundClient.name)
            )
            return list(session.exec(found))

    def asked(self, client: str) -> list[RoundClient]:
        """Everything that was ever asked of this key, over all runs."""
        with self.database.reading() as session:
            return list(session.exec(select(RoundClient).where(RoundClient.client == client)))

    def keys_by_name(self) -> dict[str, list[str]]:
        """Each key under which a site was ever asked for anything or enrolled, by the site's name; the last that the log took in last."""
        with self.database.reading() as session:
            return keys_by_name(session)

    def enrolled_keys(self) -> dict[str, VerifyKey]:
        """Every key under which the log ever took a site in, by its id."""
        with self.database.reading() as session:
            records = [said(leaf) for leaf in session.exec(select(Leaf).where(Leaf.kind == "enrol"))]
        cards = [record["card"] for record in records if isinstance(record.get("card"), dict)]
        found = [_key(str(card.get("key"))) for card in cards]
        return {key.id.hex(): key for key in found if key is not None}

    def history_of(self, client: str) -> list[RoundClient]:
        """Everything that the site of this key was ever asked, under each key of its name: one that joined again has the same text."""
        with self.database.reading() as session:
            names = select(RoundClient.name).where(RoundClient.client == client)
            return list(session.exec(select(RoundClient).where(RoundClient.name.in_(names))))  # type: ignore[attr-defined]

    def adapter(self, digest: str) -> bytes:
        """An adapter's safetensors file, digest checked."""
        return self.blobs.get(digest)

    def is_committed(self, adapter: str) -> bool:
        """Whether a committed round has this adapter."""
        with self.database.reading() as session:
            chosen = select(Round).where(Round.adapter == adapter, Round.state == COMMITTED)
            return session.exec(chosen).first() is not None

    def metrics(self, run: str, number: int) -> dict[str, float]:
        """Scores of a round."""
        with self.database.reading() as session:
            return {
                m.name: m.value for m in session.exec(select(Metric).where(Metric.run == run, Metric.number == number))
            }

    def privacy(self, run: str) -> list[Privacy]:
        """What the rounds of a run cost, by round."""
        with self.database.reading() as session:
            found = select(Privacy).where(Privacy.run == run)
            return list(session.exec(found.order_by(Privacy.number, Privacy.scope, Privacy.client)))  # type: ignore[arg-type]

    def models(self) -> dict[str, Model]:
        """The base models that runs trained on, by digest."""
        with self.database.reading() as session:
            return {row.digest: row for row in session.exec(select(Model))}

    def evidence(self, run: str) -> list[Evidence]:
        """Every test of a run, by round."""
        with self.database.reading() as session:
            return list(session.exec(select(Evidence).where(Evidence.run == run).order_by(Evidence.number)))  # type: ignore[arg-type]

    def judgements(self, run: str) -> list[Judgement]:
        """What the defence did in a run, by round."""
        with self.database.reading() as session:
            return list(session.exec(select(Judgement).where(Judgement.run == run).order_by(Judgement.number)))  # type: ignore[arg-type]

    def openings(self, run: str, number: int) -> list[Opening]:
        """Groups of a round that were asked to open in any attempt."""
        with self.database.reading() as session:
            return list(session.exec(select(Opening).where(Opening.run == run, Opening.number == number)))

    def summed(self, run: str) -> list[Summed]:
        """What was seen of each group, by round."""
        with self.database.reading() as session:
            return list(session.exec(select(Summed).where(Summed.run == run).order_by(Summed.number, Summed.group)))  # type: ignore[arg-type]

    def transcript(self, run: str) -> str | None:
        """A run's draw, JSON; None without secure aggregation."""
        with self.database.reading() as session:
            found = session.get(Draw, run)
            return None if found is None else found.transcript

    def draws(self) -> dict[str, Any]:
        """Every run's draw, JSON by digest."""
        with self.database.reading() as session:
            found = [json.loads(row.transcript) for row in session.exec(select(Draw))]
        return {digest(canonical(one)): one for one in found}

    def noised_sums(self) -> list[NoisedSum]:
        """Every charge of the federation, over all runs, oldest first."""
        with self.database.reading() as session:
            return list(session.exec(select(NoisedSum).order_by(NoisedSum.charged)))  # type: ignore[arg-type]

    def statements(self) -> list[Signature]:
        """Every signed statement of a round."""
        with self.database.reading() as session:
            return list(session.exec(select(Signature).order_by(Signature.at)))  # type: ignore[arg-type]

    def named_blobs(self) -> dict[str, Blob]:
        """Blobs that rows name or named, by digest."""
        with self.database.reading() as session:
            return {row.digest: row for row in session.exec(select(Blob))}

    def newest_fence(self) -> int:
        """The fence number that was taken last; 0 before the first."""
        with self.database.reading() as session:
            row = session.get(Fence, 1)
            return 0 if row is None else row.number

    def commit_leaf(self, run: str, number: int) -> Leaf | None:
        """The leaf of a round's commit, by its row; None where that names none."""
        with self.database.reading() as session:
            row = session.get(Round, (run, number))
            return None if row is None or row.leaf is None else session.get(Leaf, row.leaf)

    def proof(self, run: str, number: int) -> Proof:
        """That the log has a round: its commit, or for round 0 the leaf that its run began with.

        Raises:
            StateError: That leaf is missing.
            RollbackError: The log is not the one that was read before, or that sites cosigned.
        """
        leaf, at = self.commit_leaf(run, number) if number else self.policy_leaf(run), self.checkpoint()
        if leaf is None:
            raise StateError("the leaf of its commit is missing", where=f"run {run[:8]} round {number}", mend=DAMAGED)
        path = self.tree().inclusion(leaf.index, at.size)
        return Proof(leaf.record, leaf.signature, leaf.index, path, self.signed_checkpoint(at))


def _run_of(record: bytes) -> str:
    try:
        return str(parse_record(record, "log").get("run"))
    except VerificationError:
        return ""  # changed by hand: fsck's to tell


def keys_by_name(session: Session) -> dict[str, list[str]]:
    """``Records.keys_by_name`` within a transaction."""
    out = dict[str, list[str]]()
    for name, client in session.exec(select(RoundClient.name, RoundClient.client).distinct()):
        out.setdefault(name, []).append(client)
    for leaf in session.exec(select(Leaf).where(Leaf.kind == "enrol").order_by(col(Leaf.index))):
        record = said(leaf)
        keys, card = out.setdefault(str(record.get("site")), []), record.get("card")
        if isinstance(card, dict) and (found := _key(str(card.get("key")))) is not None:
            keys[:] = [*(key for key in keys if key != found.id.hex()), found.id.hex()]
    return out


def is_kept(row: Witnessed, key: VerifyKey | None) -> bool:
    """Whether a row's head of a site's own log is one that this key signed, and as long as it says; of no key the length alone."""
    if not row.head:
        return row.head_size == 0
    try:
        return claimed(row.head, "head").size == row.head_size and (key is None or is_of_key(row.head, key, "head"))
    except VerificationError:
        return False


def _key(text: str) -> VerifyKey | None:
    """A public key, or nothing where it is none."""
    try:
        return VerifyKey.from_hex(text, "enrol leaf")
    except VerificationError:
        return None
