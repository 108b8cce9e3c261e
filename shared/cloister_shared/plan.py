"""The plan of a round: what one client is asked to do, signed by the coordinator.

``PlanCore`` is what training and its price depend on; its digest names the work, so that a new attempt at the same round
is the same work. ``Plan`` adds what may change between attempts: the round's sealing key, the attempt, receipts.
On the wire: u32 length | signed plan JSON | 64-byte signature | parent adapter as float32 bytes, all inside an envelope.

Reading validates every field's type and range; the client's policy judges what they ask for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from cloister_shared.draw import LEAST_GROUP, MOST_GROUP
from cloister_shared.encoding import canonical, digest, parse_record
from cloister_shared.errors import InputError, VerificationError
from cloister_shared.masks import Fixed
from cloister_shared.privacy import MAX_SIGMA, DpSgd
from cloister_shared.sealing import SealingKey
from cloister_shared.signing import SIGNATURE_BYTES, SigningKey, VerifyKey
from cloister_shared.vectors import F32, Schema, check_bounded, vector_from_bytes, vector_to_bytes
from cloister_shared.witness import View

PURPOSE = "plan"
CLOSING_PURPOSE, RECEIPT_PURPOSE = "closing", "receipt"
# What a site signs where a work that was reserved came to nothing.
VOID_PURPOSE = "nothing-left"
FORMAT = "cloister-plan/1"
TaskKind = Literal["text-classification", "causal-lm"]
TASK_KINDS = ("text-classification", "causal-lm")
UNITS = ("record", "field")
REPORTS = ("loss",)
NOISED = ("loss", "parent_loss", "units")
Rule = Literal["average", "freeze-a", "exact"]
RULES: tuple[Rule, ...] = ("average", "freeze-a", "exact")
LINEAR_RULES: tuple[Rule, ...] = ("average", "freeze-a")
MAX_LABELS = 1000
# Hashed words of a head, the base's width, and a centre's largest number.
MAX_WORDS, MAX_HIDDEN, MAX_CENTRE = 1 << 16, 1 << 14, 1000.0
# A block's spread: a smaller one would stretch the rounding of a block until records of a batch touch each other.
LEAST_SPREAD, MAX_SPREAD = 0.01, 1000.0
# What a site's declared size and unit set in its training, and nobody else's.
_OF_SITE = {"sample_rate", "unit", "unit_records"}
# In a sum under masks: how much less, and how much more than the batch that all divide by, a member's own may be expected to be.
LEAST_SHARE, MOST_SHARE = 0.25, 2**0.25
# Largest LoRA scale alpha / rank; see ``vectors.bounded``.
MAX_SCALE = 4.0


def _must(good: bool, what: str, got: object) -> None:
    if not good:
        raise VerificationError(f"plan: {what}", got=repr(got)[:80])


def _hex(value: Any, size: int, what: str) -> None:
    _must(
        isinstance(value, str) and len(value) == 2 * size and set(value) <= set("0123456789abcdef"),
        f"{what} is not {size} bytes in hex",
        value,
    )


def _number(value: Any, low: float, high: float, what: str) -> None:
    # The range comes first: math.isfinite overflows on an integer beyond the floats, and NaN is in no range.
    good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    _must(good and math.isfinite(value), f"{what} is not from {low:g} to {high:g}", value)


def _integer(value: Any, low: int, high: int, what: str) -> None:
    _must(
        isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        f"{what} is not an integer from {low} to {high}",
        value,
    )


def _read(
    value: Any, kind: type[TaskSpec | TrainingSpec | NoisedNumber | SecureSum | PlanCore], *lists: str
) -> dict[str, Any]:
    """A record's JSON form, of which every field must be there and no other; ``lists`` as tuples."""
    record = dict(value)
    # Defaults are for code that makes plans; one that is read says everything.
    _must(set(record) == {f.name for f in fields(kind)}, f"other fields than a {kind.__name__}'s", sorted(record))
    for name in lists:
        _must(isinstance(record[name], list), f"{name} is not a list", record[name])
        record[name] = tuple(record[name])
    return record


@dataclass(frozen=True)
class TaskSpec:
    """What is learnt and which parameters are trained.

    Attributes:
        kind: ``text-classification`` or ``causal-lm``.
        labels: Class names in order; empty for ``causal-lm``.
        max_tokens: Tokens per record, the rest is cut; 4 to 4096.
        target_modules: Names of the linear layers that get LoRA.
        layers: Indices of the transformer layers that get LoRA; empty for all.
        rank: LoRA rank; 1 to 256.
        alpha: LoRA scale numerator, at most 4 ranks; the update is ``alpha / rank * B A``.
        freeze_a: Whether A is not trained (FFA-LoRA, Sun et al. 2024): then it is ``frozen_a``'s everywhere and never sent.
        words: Width of the block of hashed words that a classification head sees; 0 for none.
        centre: Little-endian float16, hex: what is taken off the features that the head sees; empty for nothing.
        spread: What each block of them is divided by, 0.01 to 1000; empty where there is no centre.
    """

    kind: TaskKind
    labels: tuple[str, ...]
    max_tokens: int
    target_modules: tuple[str, ...]
    layers: tuple[int, ...]
    rank: int
    alpha: float
    freeze_a: bool = False
    words: int = 0
    centre: str = ""
    spread: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _must(self.kind in TASK_KINDS, "unknown task", self.kind)
        texts = (*self.labels, *self.target_modules)
        _must(
            all(isinstance(v, str) and 0 < len(v) <= 200 for v in texts), "labels or modules are not short texts", texts
        )
        _must(
            len(set(self.labels)) == len(self.labels) <= MAX_LABELS, "labels repeat or are too many", len(self.labels)
        )
        _must(
            (len(self.labels) >= 2) == (self.kind == "text-classification"),
            "labels do not fit the task",
            self.labels[:3],
        )
        _must(bool(self.target_modules), "no target modules", self.target_modules)
        _integer(self.max_tokens, 4, 4096, "max_tokens")
        _integer(self.rank, 1, 256, "rank")
        _number(self.alpha, 1e-3, MAX_SCALE * self.rank, "alpha")
        _must(isinstance(self.freeze_a, bool), "freeze_a is neither true nor false", self.freeze_a)
        for layer in self.layers:
            _integer(layer, 0, 1000, "layer")
        _integer(self.words, 0, MAX_WORDS if self.labels else 0, "words")
        self._check_centre()

    @classmethod
    def from_dict(cls, value: Any) -> TaskSpec:
        """Reads the JSON form strictly.

        Raises:
            VerificationError: A field is missing, unknown, of another type or out of range.
        """
        try:
            return cls(**_read(value, cls, "labels", "target_modules", "layers", "spread"))
        except (TypeError, ValueError) as error:
            raise VerificationError("task is malformed", got=str(error)[:200]) from error

    def _check_centre(self) -> None:
        _must(
            isinstance(self.centre, str)
            and len(self.centre) <= 4 * (MAX_WORDS + 2 * MAX_HIDDEN)
            and set(self.centre) <= set("0123456789abcdef")
            and len(self.centre) % 4 == 0,
            "centre is not hex of float16 numbers",
            self.centre,
        )
        _must(not self.centre or bool(self.labels), "a centre without a head", self.centre)
        # NaN is within nothing.
        _must(
            bool((np.abs(_centre_values(self)) <= MAX_CENTRE).all()),
            f"centre is not within {MAX_CENTRE:g}",
            self.centre,
        )
        _must(bool(self.centre) == bool(self.spread) and len(self.spread) <= 3, "spread without centre", self.spread)
        for number in self.spread:
            _number(number, LEAST_SPREAD, MAX_SPREAD, "spread")


def _centre_values(task: TaskSpec) -> F32:
    return np.frombuffer(bytes.fromhex(task.centre), dtype="<f2").astype(np.float32)


def centre_and_spread(task: TaskSpec, size: int, where: str) -> tuple[F32, F32]:
    """What is taken off a head's ``size`` features and what they are divided by, ``(size,) float32`` each; 0 and 1 where there is none.

    Raises:
        InputError: The task's are of another size.
    """
    values, blocks = _centre_values(task), [task.words] * bool(task.words) + [(size - task.words) // 2] * 2
    if not len(values):
        return np.zeros(size, dtype=np.float32), np.ones(size, dtype=np.float32)
    if (len(values), len(task.spread)) != (size, len(blocks)):
        raise InputError(
            "the centre is of another base",
            where=where,
            expected=f"{size} numbers, {len(blocks)} spreads",
            got=f"{len(values)}, {len(task.spread)}",
        )
    return values, np.repeat(np.array(task.spread, dtype=np.float32), blocks)


@dataclass(frozen=True)
class TrainingSpec:
    """How a client trains in one round.

    Attributes:
        steps: DP-SGD steps.
        sample_rate: Probability that a privacy unit is in a batch.
        expected_batch: Denominator of the mean gradient: ``sample_rate`` times the declared number of units; in a sum under masks the
            same for all members, as the noise multiplier is.
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        clipping_norm: L2 bound on the summed gradient of one unit's records, 1e-3 to 1e6.
        adapter_rate: Learning rate of LoRA's parameters.
        head_rate: Learning rate of the classification head, which plain SGD trains.
        delta: Delta at which epsilon is stated.
        unit: What one privacy unit is: a ``record``, or all records that share a ``field`` (say, a patient's).
        unit_records: At most so many records of a unit are used, the first ones; 1 to 1000, and 1 where the unit is a record.
        head_only: Whether LoRA rests in this round: no gradient, no noise, no move; only the head is trained.
    """

    steps: int
    sample_rate: float
    expected_batch: float
    noise_multiplier: float
    clipping_norm: float
    adapter_rate: float
    head_rate: float
    delta: float
    unit: str = "record"
    unit_records: int = 1
    head_only: bool = False

    def __post_init__(self) -> None:
        _integer(self.steps, 1, 100_000, "steps")
        _number(self.sample_rate, 1e-9, 1.0, "sample_rate")
        _number(self.expected_batch, 1e-3, 1e9, "expected_batch")
        _number(self.noise_multiplier, 1e-6, MAX_SIGMA, "noise_multiplier")
        _number(self.clipping_norm, 1e-3, 1e6, "clipping_norm")
        _number(self.adapter_rate, 0, 10, "adapter_rate")
        _number(self.head_rate, 0, 10, "head_rate")
        _number(self.delta, 1e-10, 0.5, "delta")
        _must(self.unit in UNITS, "unknown privacy unit", self.unit)
        _integer(self.unit_records, 1, 1000 if self.unit == "field" else 1, "unit_records")
        _must(isinstance(self.head_only, bool), "head_only is neither true nor false", self.head_only)

    @property
    def event(self) -> DpSgd:
        """What one round of this costs."""
        return DpSgd(self.noise_multiplier, self.sample_rate, self.steps)


@dataclass(frozen=True)
class NoisedNumber:
    """A sum over all units of a client that is asked for with noise: a Gaussian release of its own, charged with the round.

    Attributes:
        name: ``loss``: each unit's mean loss under the trained adapter, cut at ``bound``; ``parent_loss``: the same under the plan's
            parent, which is how a site judges the last round. ``units``: how many there are.
        noise_multiplier: Standard deviation of the noise over ``bound``.
        bound: What one unit can move the sum by: nats for losses; 1 for ``units``.
    """

    name: str
    noise_multiplier: float
    bound: float

    def __post_init__(self) -> None:
        _must(self.name in NOISED, "unknown noised number", self.name)
        _number(self.noise_multiplier, 1e-6, MAX_SIGMA, "noise_multiplier of a number")
        _number(self.bound, 1e-3, 1e3, "bound of a number")
        _must(self.name != "units" or self.bound == 1, "a unit counts as 1", self.bound)

    @property
    def event(self) -> DpSgd:
        """What it costs: every unit takes part, once."""
        return DpSgd(self.noise_multiplier, 1.0, 1)


@dataclass(frozen=True)
class SecureSum:
    """That an update leaves under masks that cancel in its group's sum alone.

    Attributes:
        members: Key ids of the group, hex, sorted, the client among them; 3 to 100, and no others for the whole run.
        adapter_range: Largest move of a LoRA number that the sum's fixed point holds; > 0.
        head_range: The head's.
        rates: The members' sample rates, in their order.
        units: Their privacy units, and how many records of one count: with the rates all that they are asked unlike.
    """

    members: tuple[str, ...]
    adapter_range: float
    head_range: float
    rates: tuple[float, ...]
    units: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        for member in self.members:
            _hex(member, 16, "member")
        _must(
            list(self.members) == sorted(set(self.members)) and LEAST_GROUP <= len(self.members) <= MOST_GROUP,
            f"a group is not sorted, distinct and of {LEAST_GROUP} to {MOST_GROUP}",
            self.members,
        )
        same = len(self.rates) == len(self.members) == len(self.units)
        _must(same, "a group has other rates or units than members", self.rates)
        for unit, records in self.units:
            _must(unit in UNITS, "unknown privacy unit of a member", unit)
            _integer(records, 1, 1000 if unit == "field" else 1, "a member's unit_records")
        for rate in self.rates:
            _number(rate, 1e-9, 1.0, "a member's rate")
        _number(self.adapter_range, 1e-9, 1e9, "adapter_range")
        _number(self.head_range, 1e-9, 1e9, "head_range")

    def fixed(self, schema: Schema) -> Fixed:
        """The fixed point of this sum."""
        return Fixed(schema, len(self.members), self.adapter_range, self.head_range)


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
        _must(
            isinstance(self.federation, str) and 0 < len(self.federation) <= 100,
            "federation has no name",
            self.federation,
        )
        _hex(self.run, 16, "run")
        _integer(self.rounds, 1, 1_000_000, "rounds")
        _integer(self.round, 1, self.rounds, "round")
        for member in (self.client, *self.cohort):
            _hex(member, 16, "client")
        _must(
            list(self.cohort) == sorted(set(self.cohort)) and self.client in self.cohort,
            "cohort is not sorted, distinct and with the client",
            self.cohort,
        )
        _number(self.weight, 1e-9, 1e9, "weight")
        _must(self.rule in RULES, "unknown aggregation rule", self.rule)
        _must(
            not self.training.head_only or bool(self.task.labels), "only the head of a task without one", self.task.kind
        )
        _must(
            (self.rule == "freeze-a") == self.task.freeze_a, "rule and task disagree on whether A is frozen", self.rule
        )
        if self.update_norm is not None:
            _number(self.update_norm, 1e-6, 1e6, "update_norm")
        _must(
            set(self.reports) <= set(REPORTS) and len(set(self.reports)) == len(self.reports),
            "unknown reports",
            self.reports,
        )
        _must(
            len({n.name for n in self.noised}) == len(self.noised) and not (self.noised and self.reports),
            "noised numbers repeat, or stand beside reports",
            self.noised,
        )
        if self.secure is not None:
            _must(
                self.client in self.secure.members and set(self.secure.members) <= set(self.cohort),
                "the group is not of the cohort, or without the client",
                self.secure.members,
            )
            _must(
                self.rule in LINEAR_RULES
                and not (self.reports or self.noised)
                and self.weight == 1.0
                and self.update_norm is None,
                "a sum under masks is of updates alone, all of weight 1, uncut, and of a linear rule",
                self.rule,
            )
            spec, place = self.training, self.secure.members.index(self.client)
            _must(
                (self.secure.rates[place], self.secure.units[place])
                == (spec.sample_rate, (spec.unit, spec.unit_records)),
                "the group is told another sample rate or unit than the client",
                self.training.sample_rate,
            )
        for name in ("base", "schema", "parent"):
            _hex(getattr(self, name), 32, name)

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
            record = _read(record, cls, "cohort", "reports", "noised")
            record["task"] = TaskSpec.from_dict(record["task"])
            record["training"] = TrainingSpec(**_read(record["training"], TrainingSpec))
            record["noised"] = tuple(NoisedNumber(**_read(number, NoisedNumber)) for number in record["noised"])
            if record["secure"] is not None:
                secure = _read(record["secure"], SecureSum, "members", "rates", "units")
                pairs = tuple((unit, records) for unit, records in secure["units"])
                record["secure"] = SecureSum(**secure | {"units": pairs})
            return cls(**record)
        except (TypeError, KeyError, ValueError) as error:
            raise VerificationError("plan is malformed", got=str(error)[:200]) from error


@dataclass(frozen=True)
class Receipt:
    """What became of a client's update, told with the next plan and signed by itself: the client keeps it in its own log.

    Attributes:
        run: 16-byte run id, hex.
        round: Number of the committed round.
        plan: Digest of the core that the update answered.
        update: SHA-256 of the update's bytes that were accepted, or empty where none was.
        verdict: ``accepted`` or the admission code.
        adapter: SHA-256 of the committed adapter.
        index: Where the round's commit is in the coordinator's log.
        leaf: The hash of that leaf (RFC 6962), hex.
        signature: The coordinator's, over all of it, hex.
    """

    run: str
    round: int
    plan: str
    update: str
    verdict: str
    adapter: str
    index: int
    leaf: str
    signature: str = ""

    @property
    def _signed(self) -> bytes:
        return canonical({name: value for name, value in asdict(self).items() if name != "signature"})

    def by(self, key: SigningKey) -> Receipt:
        """Signed by the coordinator."""
        return replace(self, signature=key.sign(RECEIPT_PURPOSE, self._signed).hex())

    def check(self, key: VerifyKey, where: str) -> None:
        """Checks the signature.

        Raises:
            VerificationError: It does not hold.
        """
        key.verify(RECEIPT_PURPOSE, self._signed, bytes.fromhex(self.signature), where)

    @classmethod
    def from_dict(cls, value: Any) -> Receipt:
        """Reads the JSON form.

        Raises:
            VerificationError: It is malformed.
        """
        try:
            receipt = cls(**value)
        except TypeError as error:
            raise VerificationError("receipt is malformed", got=str(error)[:200]) from error
        _hex(receipt.run, 16, "receipt.run")
        _integer(receipt.round, 1, 1_000_000, "receipt.round")
        for digest_hex in (receipt.plan, receipt.update, receipt.adapter):
            if digest_hex != "":
                _hex(digest_hex, 32, "receipt digest")
        _integer(receipt.index, 0, 1 << 62, "receipt.index")
        _hex(receipt.leaf, 32, "receipt.leaf")
        _hex(receipt.signature, SIGNATURE_BYTES, "receipt.signature")
        _must(
            isinstance(receipt.verdict, str) and 0 < len(receipt.verdict) <= 100,
            "receipt has no verdict",
            receipt.verdict,
        )
        return receipt


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
        own_head: The newest head of the client's own log that the coordinator has, as the client signed it; or empty.
    """

    core: PlanCore
    attempt: int
    round_key: SealingKey
    issued: int
    view: View
    receipts: tuple[Receipt, ...] = ()
    sharers: Mapping[str, str] = field(default_factory=dict)
    shares: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    own_head: str = ""

    def to_bytes(self, parent: F32, by: SigningKey) -> bytes:
        """The signed plaintext of the envelope."""
        record = canonical(
            {
                "core": {"format": FORMAT} | asdict(self.core),
                "attempt": self.attempt,
                "round_key": self.round_key.raw.hex(),
                "issued": self.issued,
                "view": self.view.as_dict(),
                "own_head": self.own_head,
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
        names = {"core", "attempt", "round_key", "issued", "view", "own_head", "receipts", "sharers", "shares"}
        _must(
            set(record) == names
            and isinstance(record["receipts"], list)
            and isinstance(record["sharers"], dict)
            and isinstance(record["shares"], dict)
            and isinstance(record["own_head"], str),
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
                record["own_head"],
            )
        except (KeyError, TypeError) as error:
            raise VerificationError("plan is malformed", where=where, got=str(error)) from error
        _integer(plan.attempt, 1, 1_000_000, "attempt")
        _integer(plan.issued, 0, 1 << 62, "issued")
        for sharer, work in plan.sharers.items():
            _hex(sharer, 16, "sharer")
            _hex(work, 32, "a sharer's work")
        members = () if plan.core.secure is None else plan.core.secure.members
        _must(set(plan.sharers) <= set(members), "who takes part is not of the group", plan.sharers)
        _must(
            set(plan.shares) == set(plan.sharers) - {plan.core.client},
            "shares are not those of the sharers",
            plan.shares,
        )
        return plan, rest[SIGNATURE_BYTES:]


def _three(parts: Any) -> tuple[str, str, str]:
    good = isinstance(parts, list) and len(parts) == 3 and all(isinstance(p, str) and len(p) < 1000 for p in parts)
    _must(good, "a share is not three texts", parts)
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


@dataclass(frozen=True)
class Closing:
    """What a client is told after a run's last round.

    Attributes:
        run: The run's id, hex.
        reply_to: The key that its answer is sealed to.
        receipts: Of rounds that it took part in.
        view: The coordinator's log.
        own_head: The newest head of the client's own log that it signed, or empty.
    """

    run: str
    reply_to: SealingKey
    receipts: tuple[Receipt, ...]
    view: View
    own_head: str = ""

    def to_bytes(self, by: SigningKey) -> bytes:
        """The signed plaintext."""
        record = canonical(
            {
                "run": self.run,
                "reply_to": self.reply_to.raw.hex(),
                "receipts": [asdict(receipt) for receipt in self.receipts],
                "view": self.view.as_dict(),
                "own_head": self.own_head,
            }
        )
        return struct.pack(">I", len(record)) + record + by.sign(CLOSING_PURPOSE, record)

    @classmethod
    def from_bytes(cls, data: bytes, by: VerifyKey, where: str) -> Closing:
        """Checks and reads it.

        Raises:
            VerificationError: The signature or the form does not hold.
        """
        if len(data) < 4 + SIGNATURE_BYTES:
            raise VerificationError("closing message is cut short", where=where)
        (size,) = struct.unpack(">I", data[:4])
        record_bytes, signature = data[4 : 4 + size], data[4 + size :]
        by.verify(CLOSING_PURPOSE, record_bytes, signature, where)
        try:
            record = parse_record(record_bytes, where)
            receipts = tuple(Receipt.from_dict(r) for r in record["receipts"])
            key, view = SealingKey.from_hex(record["reply_to"], where), View.from_dict(record["view"], where)
            if not isinstance(record["own_head"], str):
                raise TypeError("own_head")
            return cls(str(record["run"]), key, receipts, view, record["own_head"])
        except (KeyError, TypeError, AttributeError) as error:
            raise VerificationError("closing message is malformed", where=where, got=str(error)) from error
