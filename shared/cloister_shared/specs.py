"""What a plan asks of training: the task, its training, numbers that leave with noise, the sum that an update enters.

Every field's type and range is seen when one is made; the client's policy judges what they ask for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cloister_shared.draw import LEAST_GROUP, MOST_GROUP
from cloister_shared.errors import InputError, VerificationError
from cloister_shared.masks import Fixed
from cloister_shared.plan_fields import must, must_be_hex, must_be_integer, must_be_number, read_fields
from cloister_shared.privacy import MAX_SIGMA, DpSgd
from cloister_shared.vectors import F32, Schema

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
# In a sum under masks: how much less, and how much more than the batch that all divide by, a member's own may be expected to be.
LEAST_SHARE, MOST_SHARE = 0.25, 2**0.25
# Largest LoRA scale alpha / rank; see ``vectors.bounded``.
MAX_SCALE = 4.0


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
        must(self.kind in TASK_KINDS, "unknown task", self.kind)
        texts = (*self.labels, *self.target_modules)
        must(
            all(isinstance(v, str) and 0 < len(v) <= 200 for v in texts), "labels or modules are not short texts", texts
        )
        must(len(set(self.labels)) == len(self.labels) <= MAX_LABELS, "labels repeat or are too many", len(self.labels))
        must(
            (len(self.labels) >= 2) == (self.kind == "text-classification"),
            "labels do not fit the task",
            self.labels[:3],
        )
        must(bool(self.target_modules), "no target modules", self.target_modules)
        must_be_integer(self.max_tokens, 4, 4096, "max_tokens")
        must_be_integer(self.rank, 1, 256, "rank")
        must_be_number(self.alpha, 1e-3, MAX_SCALE * self.rank, "alpha")
        must(isinstance(self.freeze_a, bool), "freeze_a is neither true nor false", self.freeze_a)
        for layer in self.layers:
            must_be_integer(layer, 0, 1000, "layer")
        must_be_integer(self.words, 0, MAX_WORDS if self.labels else 0, "words")
        self._check_centre()

    @classmethod
    def from_dict(cls, value: Any) -> TaskSpec:
        """Reads the JSON form strictly.

        Raises:
            VerificationError: A field is missing, unknown, of another type or out of range.
        """
        try:
            return cls(**read_fields(value, cls, "labels", "target_modules", "layers", "spread"))
        except (TypeError, ValueError) as error:
            raise VerificationError("task is malformed", got=str(error)[:200]) from error

    def _check_centre(self) -> None:
        must(
            isinstance(self.centre, str)
            and len(self.centre) <= 4 * (MAX_WORDS + 2 * MAX_HIDDEN)
            and set(self.centre) <= set("0123456789abcdef")
            and len(self.centre) % 4 == 0,
            "centre is not hex of float16 numbers",
            self.centre,
        )
        must(not self.centre or bool(self.labels), "a centre without a head", self.centre)
        # NaN is within nothing.
        must(
            bool((np.abs(_centre_values(self)) <= MAX_CENTRE).all()),
            f"centre is not within {MAX_CENTRE:g}",
            self.centre,
        )
        must(bool(self.centre) == bool(self.spread) and len(self.spread) <= 3, "spread without centre", self.spread)
        for number in self.spread:
            must_be_number(number, LEAST_SPREAD, MAX_SPREAD, "spread")


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
        must_be_integer(self.steps, 1, 100_000, "steps")
        must_be_number(self.sample_rate, 1e-9, 1.0, "sample_rate")
        must_be_number(self.expected_batch, 1e-3, 1e9, "expected_batch")
        must_be_number(self.noise_multiplier, 1e-6, MAX_SIGMA, "noise_multiplier")
        must_be_number(self.clipping_norm, 1e-3, 1e6, "clipping_norm")
        must_be_number(self.adapter_rate, 0, 10, "adapter_rate")
        must_be_number(self.head_rate, 0, 10, "head_rate")
        must_be_number(self.delta, 1e-10, 0.5, "delta")
        must(self.unit in UNITS, "unknown privacy unit", self.unit)
        must_be_integer(self.unit_records, 1, 1000 if self.unit == "field" else 1, "unit_records")
        must(isinstance(self.head_only, bool), "head_only is neither true nor false", self.head_only)

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
        must(self.name in NOISED, "unknown noised number", self.name)
        must_be_number(self.noise_multiplier, 1e-6, MAX_SIGMA, "noise_multiplier of a number")
        must_be_number(self.bound, 1e-3, 1e3, "bound of a number")
        must(self.name != "units" or self.bound == 1, "a unit counts as 1", self.bound)

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
            must_be_hex(member, 16, "member")
        must(
            list(self.members) == sorted(set(self.members)) and LEAST_GROUP <= len(self.members) <= MOST_GROUP,
            f"a group is not sorted, distinct and of {LEAST_GROUP} to {MOST_GROUP}",
            self.members,
        )
        same = len(self.rates) == len(self.members) == len(self.units)
        must(same, "a group has other rates or units than members", self.rates)
        for unit, records in self.units:
            must(unit in UNITS, "unknown privacy unit of a member", unit)
            must_be_integer(records, 1, 1000 if unit == "field" else 1, "a member's unit_records")
        for rate in self.rates:
            must_be_number(rate, 1e-9, 1.0, "a member's rate")
        must_be_number(self.adapter_range, 1e-9, 1e9, "adapter_range")
        must_be_number(self.head_range, 1e-9, 1e9, "head_range")

    def fixed(self, schema: Schema) -> Fixed:
        """The fixed point of this sum."""
        return Fixed(schema, len(self.members), self.adapter_range, self.head_range)
