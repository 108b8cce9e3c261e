"""The plan of a round: what one client is asked to do, signed by the coordinator.

``PlanCore`` is what training and its price depend on; its digest names the work, so that a new attempt at the same round
is the same work. ``Plan`` adds what may change between attempts: the round's sealing key, the attempt, receipts.
On the wire: u32 length | signed plan JSON | 64-byte signature | parent adapter as float32 bytes, all inside an envelope.

Reading validates every field's type and range; the client's policy judges what they ask for.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cloister_shared.encoding import canonical, digest, parse_record
from cloister_shared.errors import VerificationError
from cloister_shared.plan_fields import are_notes, must, must_be_hex, must_be_integer, must_be_number, read_fields
from cloister_shared.privacy import DpSgd
from cloister_shared.receipts import Receipt
from cloister_shared.sealing import SealingKey
from cloister_shared.signing import SIGNATURE_BYTES, SigningKey, VerifyKey
from cloister_shared.specs import LINEAR_RULES, REPORTS, RULES, NoisedNumber, Rule, SecureSum, TaskSpec, TrainingSpec
from cloister_shared.vectors import F32, Schema, check_bounded, vector_from_bytes, vector_to_bytes
from cloister_shared.witness import View

PURPOSE = "plan"
# What a site signs where a work that was reserved came to nothing.
VOID_PURPOSE = "nothing-left"
FORMAT = "cloister-plan/1"
# What a site's declared size and unit set in its training, and nobody else's.
_OF_SITE = {"sample_rate", "unit", "unit_records"}


@dataclass(frozen=True)
class PlanCore:
    """The work of one client in one round.

    Attributes:
        federation: The federation's name.
        run: 16-byte run id, hex.
        round: 1-based number.
        rounds: Rounds planned for the whole run.
        client: Key id of the client, hex.
        cohort: Key ids of all clients asked in this round, hex, sorted.
        weight: Weight of this client in the aggregate, set by the coordinator; > 0.
        rule: Aggregation rule; ``freeze-a`` exactly where the task freezes A.
        base: Digest of the base model.
        schema: Digest of the adapter's schema.
        parent: SHA-256 of the parent adapter's float32 bytes.
        task: What is learnt.
        training: How, and under which privacy parameters.
        update_norm: L2 bound that the whole update is clipped to, at the client and again at the aggregator; None for none.
        reports: Un-noised numbers asked for beside the update; a client's policy permits each by name or refuses the plan.
        noised: Numbers asked for with noise, each under another name; none beside ``reports``.
        secure: That the update leaves under masks, with no number beside it and weight 1; None where it leaves by itself.
    """

    federation: str
    run: str
    round: int
    rounds: int
    client: str
    cohort: tuple[str, ...]
    weight: float
    rule: Rule
    base: str
    schema: str
    parent: str
    task: TaskSpec
    training: TrainingSpec
    update_norm: float | None = None
    reports: tuple[str, ...] = ()
    noised: tuple[NoisedNumber, ...] = ()
    secure: SecureSum | None = None

    def __post_init__(self) -> None:
        must(
            isinstance(self.federation, str) and 0 < len(self.federation) <= 100,
            "federation has no name",
            self.federation,
        )
        must_be_hex(self.run, 16, "run")
        must_be_integer(self.rounds, 1, 1_000_000, "rounds")
        must_be_integer(self.round, 1, self.rounds, "round")
        for member in (self.client, *self.cohort):
            must_be_hex(member, 16, "client")
        must(
            list(self.cohort) == sorted(set(self.cohort)) and self.client in self.cohort,
            "cohort is not sorted, distinct and with the client",
            self.cohort,
        )
        must_be_number(self.weight, 1e-9, 1e9, "weight")
        must(self.rule in RULES, "unknown aggregation rule", self.rule)
        must(
            not self.training.head_only or bool(self.task.labels), "only the head of a task without one", self.task.kind
        )
        must(
            (self.rule == "freeze-a") == self.task.freeze_a, "rule and task disagree on whether A is frozen", self.rule
        )
        if self.update_norm is not None:
            must_be_number(self.update_norm, 1e-6, 1e6, "update_norm")
        must(
            set(self.reports) <= set(REPORTS) and len(set(self.reports)) == len(self.reports),
            "unknown reports",
            self.reports,
        )
        must(
            len({n.name for n in self.noised}) == len(self.noised) and not (self.noised and self.reports),
            "noised numbers repeat, or stand beside reports",
            self.noised,
        )
        if self.secure is not None:
            must(
                self.client in self.secure.members and set(self.secure.members) <= set(self.cohort),
                "the group is not of the cohort, or without the client",
                self.secure.members,
            )
            must(
                self.rule in LINEAR_RULES
                and not (self.reports or self.noised)
                and self.weight == 1.0
                and self.update_norm is None,
                "a sum under masks is of updates alone, all of weight 1, uncut, and of a linear rule",
                self.rule,
            )
            spec, place = self.training, self.secure.members.index(self.client)
            must(
                (self.secure.rates[place], self.secure.units[place])
                == (spec.sample_rate, (spec.unit, spec.unit_records)),
                "the group is told another sample rate or unit than the client",
                self.training.sample_rate,
            )
        for name in ("base", "schema", "parent"):
            must_be_hex(getattr(self, name), 32, name)

    @property
    def events(self) -> tuple[DpSgd, ...]:
        """What one round costs: its training and every noised number."""
        return (self.training.event, *(n.event for n in self.noised))

    def to_bytes(self) -> bytes:
        """Canonical form."""
        return canonical({"format": FORMAT} | asdict(self))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form, hex: the name of this work."""
        return digest(self.to_bytes())

    @property
    def common(self) -> str:
        """SHA-256 of all that the members of one sum must have been asked alike, hex.

        That is everything but who the client is and how its size and unit make it sample: a sum of one real update and of others that
        were asked for something that comes to nothing, or is all noise, would be that update. How often each samples is in ``secure``,
        for all to see.
        """
        training = {k: v for k, v in asdict(self.training).items() if k not in _OF_SITE}
        return digest(canonical(asdict(self) | {"client": "", "training": training}))

    def of_member(self, member: str) -> PlanCore:
        """The work of another member of the same sum: it follows from this one, so that nobody can be told of another.

        Raises:
            VerificationError: There is no such member.
        """
        if self.secure is None or member not in self.secure.members:
            raise VerificationError("not a member of this sum", got=member[:16])
        place = self.secure.members.index(member)
        unit, records = self.secure.units[place]
        theirs = replace(self.training, sample_rate=self.secure.rates[place], unit=unit, unit_records=records)
        return replace(self, client=member, training=theirs)

    @classmethod
    def from_dict(cls, value: Any) -> PlanCore:
        """Reads the JSON form strictly.

        Raises:
            VerificationError: A field is missing, unknown, of another type or out of range.
        """
        try:
            record = dict(value)
            if record.pop("format") != FORMAT:
                raise VerificationError("plan of another format", expected=FORMAT)
            record = read_fields(record, cls, "cohort", "reports", "noised")
            record["task"] = TaskSpec.from_dict(record["task"])
            record["training"] = TrainingSpec(**read_fields(record["training"], TrainingSpec))
            record["noised"] = tuple(NoisedNumber(**read_fields(number, NoisedNumber)) for number in record["noised"])
            if record["secure"] is not None:
                secure = read_fields(record["secure"], SecureSum, "members", "rates", "units")
                pairs = tuple((unit, records) for unit, records in secure["units"])
                record["secure"] = SecureSum(**secure | {"units": pairs})
            return cls(**record)
        except (TypeError, KeyError, ValueError) as error:
            raise VerificationError("plan is malformed", got=str(error)[:200]) from error


@dataclass(frozen=True)
class Plan:
    """A plan as it is sent: the work, this attempt at it, and receipts.

    Attributes:
        core: The work.
        attempt: 1-based attempt.
        round_key: The key that updates of this attempt are sealed to.
        issued: Seconds since 1970.
        view: The coordinator's log, from what the client saw last to now.
        receipts: What became of this client's earlier updates.
        sharers: Under masks: the members of its group that take part in this attempt, by key id, and the digest of each one's
            work; else none.
        shares: Under masks: by each other sharer, its sealed share for this client and what it said of the two in it
            (``masks.share_digest`` of ``mask`` and of ``seed``), hex.
        own_heads: The newest heads of the client's own logs that the coordinator has, as the client signed them, one for each key.
    """

    core: PlanCore
    attempt: int
    round_key: SealingKey
    issued: int
    view: View
    receipts: tuple[Receipt, ...] = ()
    sharers: Mapping[str, str] = field(default_factory=dict)
    shares: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    own_heads: tuple[str, ...] = ()

    def to_bytes(self, parent: F32, by: SigningKey) -> bytes:
        """The signed plaintext of the envelope."""
        record = canonical(
            {
                "core": {"format": FORMAT} | asdict(self.core),
                "attempt": self.attempt,
                "round_key": self.round_key.raw.hex(),
                "issued": self.issued,
                "view": self.view.as_dict(),
                "own_heads": list(self.own_heads),
                "receipts": [asdict(receipt) for receipt in self.receipts],
                "sharers": dict(self.sharers),
                "shares": {name: list(parts) for name, parts in self.shares.items()},
            }
        )
        return struct.pack(">I", len(record)) + record + by.sign(PURPOSE, record) + vector_to_bytes(parent)

    @classmethod
    def from_bytes(cls, data: bytes, by: VerifyKey, where: str) -> tuple[Plan, bytes]:
        """Checks and reads a plan; the parent adapter's bytes are returned as they came, for ``read_parent``.

        Args:
            data: The envelope's plaintext.
            by: The coordinator's pinned key.
            where: For messages.

        Raises:
            VerificationError: The signature or the form does not hold.
        """
        if len(data) < 4 + SIGNATURE_BYTES:
            raise VerificationError("plan is cut short", where=where)
        (size,) = struct.unpack(">I", data[:4])
        record_bytes, rest = data[4 : 4 + size], data[4 + size :]
        by.verify(PURPOSE, record_bytes, rest[:SIGNATURE_BYTES], where)
        record = parse_record(record_bytes, where)
        names = {"core", "attempt", "round_key", "issued", "view", "own_heads", "receipts", "sharers", "shares"}
        must(
            set(record) == names
            and isinstance(record["receipts"], list)
            and isinstance(record["sharers"], dict)
            and isinstance(record["shares"], dict)
            and are_notes(record["own_heads"]),
            "other fields than a plan's",
            sorted(record),
        )
        try:
            plan = cls(
                PlanCore.from_dict(record["core"]),
                record["attempt"],
                SealingKey.from_hex(record["round_key"], where),
                record["issued"],
                View.from_dict(record["view"], where),
                tuple(Receipt.from_dict(r) for r in record["receipts"]),
                record["sharers"],
                {name: _three(parts) for name, parts in record["shares"].items()},
                tuple(record["own_heads"]),
            )
        except (KeyError, TypeError) as error:
            raise VerificationError("plan is malformed", where=where, got=str(error)) from error
        must_be_integer(plan.attempt, 1, 1_000_000, "attempt")
        must_be_integer(plan.issued, 0, 1 << 62, "issued")
        for sharer, work in plan.sharers.items():
            must_be_hex(sharer, 16, "sharer")
            must_be_hex(work, 32, "a sharer's work")
        members = () if plan.core.secure is None else plan.core.secure.members
        must(set(plan.sharers) <= set(members), "who takes part is not of the group", plan.sharers)
        must(
            set(plan.shares) == set(plan.sharers) - {plan.core.client},
            "shares are not those of the sharers",
            plan.shares,
        )
        return plan, rest[SIGNATURE_BYTES:]


def _three(parts: Any) -> tuple[str, str, str]:
    good = isinstance(parts, list) and len(parts) == 3 and all(isinstance(p, str) and len(p) < 1000 for p in parts)
    must(good, "a share is not three texts", parts)
    return parts[0], parts[1], parts[2]


def read_parent(core: PlanCore, data: bytes, schema: Schema, where: str) -> F32:
    """Reads the parent adapter that came with a plan.

    Args:
        core: The plan's work.
        data: The bytes after the plan.
        schema: The schema that our own model has.
        where: For messages.

    Raises:
        VerificationError: The plan is for another schema, the bytes are not the parent it names, or a number in it is too large.
    """
    if core.schema != schema.digest:
        raise VerificationError(
            "plan is for another adapter schema", where=where, expected=schema.digest[:16], got=core.schema[:16]
        )
    if digest(data) != core.parent:
        raise VerificationError(
            "parent adapter has another digest", where=where, expected=core.parent[:16], got=digest(data)[:16]
        )
    parent = vector_from_bytes(data, schema, where)
    check_bounded(parent, schema, where)
    return parent
