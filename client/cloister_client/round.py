"""The story of a round at the client.

    open envelope -> verify plan -> attempt -> log -> receipts -> policy -> kept update? -> reserve -> account -> train with DP -> keep
    -> spend -> release -> (mask) -> seal

Under secure aggregation the plan comes between messages of ``sums``, which are answered here too and need no text.
Everything called here is a leaf. What leaves passed ``release``, or is one of its fixed words. A refusal never depends on the
text: labels and records are checked at the agent's start, where only the data owner sees the error.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from cloister_model.base import BaseModel
from cloister_model.build import build, schema_of
from cloister_model.tokens import Encoded, encode
from cloister_shared.answers import Preface
from cloister_shared.cards import CoordinatorCard
from cloister_shared.encoding import digest, parse_record, write_durably
from cloister_shared.errors import CloisterError, RefusedError, VerificationError
from cloister_shared.plan import Plan, PlanCore, read_parent
from cloister_shared.receipts import NOT_ASKED, Closing, Receipt
from cloister_shared.sealing import Codec, Direction, Header, OpeningKey, SealingKey, open_envelope, seal
from cloister_shared.signing import SigningKey
from cloister_shared.specs import TaskSpec
from cloister_shared.vectors import F32, clipped, vector_from_bytes, vector_to_bytes

from cloister_client.budget import Ledger
from cloister_client.numbers import noised_numbers
from cloister_client.policy import Policy, check
from cloister_client.release import (
    NoisedUpdate,
    NonPrivateRelease,
    acknowledgement,
    protocol,
    refusal,
    release,
    with_numbers,
)
from cloister_client.sums import Sums
from cloister_client.train import Device, Trainer
from cloister_client.units import Units
from cloister_client.witness import Witness

MAX_PLAN_BYTES = 256 * 1024 * 1024
# A plan that somebody on the way held back is worth nothing after a day.
PLAN_SECONDS = 86_400


class Teller(Protocol):
    """Where progress goes: the owner's status file."""

    def update(self, **changes: object) -> None:
        """Changes what the owner sees."""


@dataclass
class Desk:
    """What the agent holds.

    Attributes:
        name: The site's name.
        card: The pinned coordinator.
        policy: What the data owner allows.
        signing: The site's signing key.
        opening: The site's opening key.
        ledger: The budget.
        base: The base model, digest checked.
        units: The registered private records and their units.
        device: Where to train.
        kept: Folder of noised updates that no receipt has come for.
        tell: The owner's status.
        sums: This site's part in sums under masks.
    """

    name: str
    card: CoordinatorCard
    policy: Policy
    signing: SigningKey
    opening: OpeningKey
    ledger: Ledger
    base: BaseModel
    units: Units
    device: Device
    kept: Path
    tell: Teller
    sums: Sums
    witness: Witness
    _warm: tuple[TaskSpec, tuple[int, ...], Trainer, Encoded] | None = None

    def cool(self) -> None:
        """Forgets the warm model and what it kept of the text: after training broke off, its hooks may hold half a step."""
        if self._warm is not None:
            self._warm[2].forget()
        self._warm = None

    def trainer(self, task: TaskSpec) -> Trainer:
        """The trainer of ``task``, made once and kept; no text is read for it."""
        if self._warm is None or self._warm[0] != task:
            self.cool()
            self._warm = (task, (), Trainer(build(self.base, task, "plan"), task, self.device), Encoded((), (), 0))
        return self._warm[2]

    def text(self, task: TaskSpec, blocks: tuple[int, ...]) -> Encoded:
        """The tokenised text of ``blocks``, made once and kept."""
        trainer = self.trainer(task)
        if self._warm is None or self._warm[1] != blocks:
            trainer.forget()
            records, units = self.units.within(blocks)
            labels = [task.labels.index(r.label) if task.labels else 0 for r in records]
            data = encode(self.base, [r.text for r in records], labels, task.max_tokens, units)
            self._warm = (task, blocks, trainer, data)
        return self._warm[3]


def execute(desk: Desk, envelope: bytes) -> bytes:
    """Executes one envelope from the coordinator.

    Returns:
        The sealed answer.

    Raises:
        VerificationError: The envelope is not a plan of the pinned coordinator for this client; nothing can be answered under seal.
    """
    started = time.time()
    header, plaintext = _open(desk, envelope)
    if header.codec == Codec.CLOSING:
        return _closed(desk, header, Closing.from_bytes(plaintext, desk.card.verify_key, "closing message"))
    if header.codec == Codec.SECURE:
        return _secure(desk, header, plaintext)
    plan, rest = Plan.from_bytes(plaintext, desk.card.verify_key, "plan")
    core = plan.core
    _same(header, plan)
    # Not in what is answered: whoever cannot remember an attempt says nothing of it.
    first = desk.ledger.attempted(core.digest, plan.attempt)
    try:
        desk.witness.own(plan.own_heads)
    except RefusedError as error:
        # A ledger that was put back signs no head: one that grew since would take the place of the head that tells.
        return _refused(desk, plan, header, error, Preface)
    # Told also where the log is refused: how far this site's own ledger goes hides nothing.
    preface: Callable[[], Preface] = partial(desk.witness.preface, "")
    try:
        before, cosignature = desk.witness.look(plan.view)
        # After it: receipts of a history that is refused are no receipts.
        settle(desk, plan.receipts)
        preface = partial(desk.witness.preface, cosignature)
        desk.witness.enough(plan.view, before)
        desk.witness.acknowledged(plan.view, core.run, core.round)
        # Policy first: what the data owner forbids by now does not leave, kept or not.
        check(desk.policy, core, time.gmtime().tm_hour)
        if abs(time.time() - plan.issued) > PLAN_SECONDS:
            raise RefusedError("policy.plan_age", "the plan is stale", expected=f"issued within {PLAN_SECONDS} s")
        desk.sums.expect(core, plan.attempt, plan.sharers, plan.shares)
        # One plan at a time is worked on here: what is open was left so by one that could not write its end.
        desk.ledger.close_open(desk.kept)
        kept = kept_update(desk, core)
        if not kept and not first:
            raise RefusedError(
                "budget.attempt_again",
                "this attempt was here before",
                expected="a newer attempt",
                got=f"attempt {plan.attempt}",
            )
        update, others = (kept, ()) if kept else work(desk, core, rest)
        mask = None if core.secure is None else partial(_masked, desk, plan)
        passed = NoisedUpdate(update)
        # The ledger went on meanwhile: the head that goes out has this round's spend in it.
        preface = partial(desk.witness.preface, cosignature)
        answer = _seal(
            desk, plan.round_key, header, *release(desk.ledger, desk.policy, core, passed, preface, others, mask)
        )
        desk.tell.update(state="ready", seconds=time.time() - started, epsilon=desk.ledger.standing().epsilon)
    except CloisterError as error:
        return _refused(desk, plan, header, error, preface)
    return answer


def _refused(desk: Desk, plan: Plan, header: Header, error: CloisterError, preface: Callable[[], Preface]) -> bytes:
    desk.tell.update(state="ready", refusal=f"round {plan.core.round}: {error}")
    # This round may have been charged before, by this plan or by another: whoever reads of a refusal must not count it as free.
    charged = desk.ledger.charged_for(plan.core.run, plan.core.round)
    return _seal(desk, plan.round_key, header, *refusal(error, preface, charged=charged))


def _closed(desk: Desk, header: Header, said: Closing) -> bytes:
    """Keeps a run's last receipts, and answers what this site has seen of the log by now; no text is read for it."""
    preface: Callable[[], Preface] = Preface
    try:
        desk.witness.own(said.own_heads)
        preface = partial(desk.witness.preface, "")
        _, cosignature = desk.witness.look(said.view)
        preface = partial(desk.witness.preface, cosignature)
        settle(desk, said.receipts)
    except RefusedError as error:
        desk.tell.update(refusal=str(error))
    return _seal(desk, said.reply_to, header, *acknowledgement(preface()))


def _secure(desk: Desk, header: Header, plaintext: bytes) -> bytes:
    """Answers one message of a secure sum's protocol: no text is read for it, and nothing charged."""
    record = parse_record(plaintext, "message of a secure sum")
    to = SealingKey.from_hex(str(record.get("reply_to", "")), "message of a secure sum")
    try:
        said = desk.sums.answer(header.run.hex(), header.round, header.attempt, record)
        return _seal(desk, to, header, *protocol(said))
    except CloisterError as error:
        desk.tell.update(refusal=f"secure sum, round {header.round}: {error}")
        return _seal(desk, to, header, *refusal(error, None))


def _masked(desk: Desk, plan: Plan, update: bytes) -> bytes:
    schema = schema_of(desk.trainer(plan.core.task).model)
    vector = vector_from_bytes(update, schema, "kept update")
    return desk.sums.mask(plan.core, plan.attempt, plan.sharers, vector, schema).astype("<u4").tobytes()


def _open(desk: Desk, envelope: bytes) -> tuple[Header, bytes]:
    header, plaintext = open_envelope(
        envelope,
        by=desk.card.verify_key,
        key=desk.opening,
        expect={
            "direction": Direction.TO_CLIENT,
            "client": desk.signing.verify_key.id,
            "server": desk.card.verify_key.id,
        },
        max_bytes=MAX_PLAN_BYTES,
        where="envelope from the coordinator",
    )
    if header.codec not in (Codec.PLAN, Codec.CLOSING, Codec.SECURE):
        raise VerificationError(
            "envelope is neither plan nor closing nor of a secure sum",
            where="envelope from the coordinator",
            got=header.codec.name,
        )
    return header, plaintext


def _same(header: Header, plan: Plan) -> None:
    core = plan.core
    stated = (
        header.run.hex(),
        header.round,
        header.attempt,
        header.client.hex(),
        header.base.hex(),
        header.schema.hex(),
        header.plan.hex(),
    )
    if stated != (core.run, core.round, plan.attempt, core.client, core.base, core.schema, core.digest):
        raise VerificationError("envelope and plan disagree", where="plan")


def settle(desk: Desk, receipts: tuple[Receipt, ...]) -> None:
    """Keeps receipts in the ledger, and forgets kept updates that one has come for.

    Raises:
        VerificationError: A receipt's signature does not hold.
    """
    for receipt in receipts:
        receipt.check(desk.card.verify_key, "receipt")
        desk.ledger.receipt(asdict(receipt))
        plans = [receipt.plan]
        if receipt.verdict == NOT_ASKED:
            plans = desk.ledger.works(receipt.run, receipt.round)
        for plan in filter(None, plans):
            (desk.kept / f"{plan}.f32").unlink(missing_ok=True)


def kept_update(desk: Desk, core: PlanCore) -> bytes | None:
    """The noised update of this very work, if it was made before: a retry neither trains nor charges again."""
    path = desk.kept / f"{core.digest}.f32"
    spent = desk.ledger.spent_on(core.digest)
    if spent is None or not path.is_file():
        return None
    update = path.read_bytes()
    return update if digest(update) == spent else None


def work(desk: Desk, core: PlanCore, rest: bytes) -> tuple[bytes, tuple[NonPrivateRelease, ...]]:
    """Policy, budget, training: the noised update's bytes, kept on disk and spent in the ledger, and what else the plan asked for.

    Raises:
        CloisterError: Refused; what was reserved stays charged.
    """
    if core.federation != desk.card.federation:
        raise RefusedError(
            "policy.federation",
            "the plan is for another federation",
            expected=desk.card.federation,
            got=core.federation,
        )
    if core.task.kind == "text-classification" and core.task.labels != desk.card.labels:
        raise RefusedError(
            "policy.labels",
            "the plan has other labels than were agreed at enrolment",
            expected=", ".join(desk.card.labels)[:200],
        )
    if core.base != desk.base.digest:
        raise RefusedError(
            "policy.base_models",
            "another base model is loaded here",
            expected=desk.base.digest[:16],
            got=core.base[:16],
        )
    field = desk.ledger.unit_field()
    if (core.training.unit == "field") != bool(field):
        raise RefusedError(
            "policy.unit",
            "the plan protects another unit than this site registered",
            expected="field" if field else "record",
            got=core.training.unit,
        )
    trainer = desk.trainer(core.task)
    parent = read_parent(core, rest, schema_of(trainer.model), "plan")
    # Of an attempt whose spend could not be written: a reservation is spent on what it made itself.
    (desk.kept / f"{core.digest}.f32").unlink(missing_ok=True)
    reservation = desk.ledger.reserve(core, desk.policy.rounds_per_day)
    entry = reservation.entry
    try:
        # Both accountants, before any text is read: where they disagree, neither is believed and nothing is released.
        standing = desk.ledger.standing()
    except CloisterError as error:
        desk.ledger.void(entry, desk.signing)
        raise RefusedError("budget.accountants", error.what, got=error.got) from error
    desk.tell.update(
        state="training",
        run=core.run,
        round=core.round,
        rounds=core.rounds,
        step=0,
        steps=core.training.steps,
        epsilon=standing.epsilon,
        cap=standing.cap,
        delta=standing.delta,
        refusal="",
    )
    try:
        data = desk.text(core.task, reservation.blocks)
        vector, loss = _train(desk, trainer, core, parent, data)
        update = with_numbers(vector_to_bytes(vector), noised_numbers(trainer, core, parent, data))
        write_durably(desk.kept / f"{core.digest}.f32", update)
        desk.ledger.spend(entry, digest(update), digest(vector_to_bytes(vector)))
    except BaseException as error:
        # First: where the ledger cannot be written either, the next plan must not find half a step.
        desk.cool()
        desk.ledger.lose(entry)
        if isinstance(error, Exception):
            what = "training failed; what was reserved stays charged"
            raise RefusedError("train.failed", what, got=f"{type(error).__name__}: {error}"[:300]) from error
        raise
    return update, tuple(NonPrivateRelease(name, loss) for name in core.reports)


def _train(desk: Desk, trainer: Trainer, core: PlanCore, parent: F32, data: Encoded) -> tuple[F32, float]:
    """The update, and the mean of the steps' losses (private; NaN where every batch was empty)."""
    losses = []

    def progress(step: int, steps: int, loss: float) -> None:
        desk.tell.update(step=step, steps=steps, loss=None if math.isnan(loss) else loss)
        losses.extend([] if math.isnan(loss) else [loss])

    update = trainer.run(core.training, parent, data, progress)
    mean = sum(losses) / len(losses) if losses else math.nan
    return (update if core.update_norm is None else clipped(update, core.update_norm)), mean


def _seal(desk: Desk, to: SealingKey, header: Header, codec: Codec, plaintext: bytes) -> bytes:
    back = Header(
        direction=Direction.TO_COORDINATOR,
        codec=codec,
        run=header.run,
        round=header.round,
        attempt=header.attempt,
        client=header.client,
        server=header.server,
        base=header.base,
        schema=header.schema,
        plan=header.plan,
        parameters=header.parameters if codec in (Codec.UPDATE_F32, Codec.MASKED_U32) else 0,
        length=len(plaintext),
        time=int(time.time()),
        nonce=os.urandom(16),
    )
    return seal(back, plaintext, to, desk.signing)
