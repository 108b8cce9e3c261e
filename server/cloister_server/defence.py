"""What becomes of admitted updates: compared, cut, combined, and the candidate held against its parent.

    norms, by part too -> harm on held-out text
    -> more than half odd: hold -> cut to the median norm -> rule -> gate -> stricter rule -> keep the parent

The rule ``pipeline`` is all of it, with nearest-neighbour mixing and the geometric median; another rule is that rule alone, then the
gate. A round that is held keeps its parent: what is left over is never averaged. Sites' own DP makes all of this post-processing.
Nothing here may run beside client-level noise, whose sensitivity is one client's clip and not a rule's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cloister_shared.specs import Rule
from cloister_shared.vectors import F32, Schema, bounded

from cloister_server.aggregation import Aggregate, aggregate, exact_products
from cloister_server.federation import PIPELINE, STRONGEST, Defence, of_rows
from cloister_server.judge import RECALL, Judge
from cloister_server.peers import (
    Finding,
    harm_test,
    majority_flagged,
    norm_test,
    norms_of,
    part_norms,
    parts_test,
    to_median,
)
from cloister_server.robust import combine, least

F64 = npt.NDArray[np.float64]
# Reputation: a share of what it was and a share of the newest round's; and where a client is left out for a while.
_MEMORY, LEAST_REPUTATION = 0.7, 0.5


@dataclass(frozen=True)
class Cohort:
    """Admitted updates, by row.

    Attributes:
        updates: ``(n, d) float32``, all finite.
        weights: ``(n,) float64``, > 0, the server's; only the rule ``mean`` looks at them.
        predicted: ``(n,) float64``, > 0: how long each is about, by its plan.
        quarantined: ``(n,) bool``: left out for what they did before.
    """

    updates: F32
    weights: F64
    predicted: F64
    quarantined: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Entered:
    """What entered.

    Attributes:
        made: The candidate; the parent where the round is held.
        findings: Each row's tests.
        entered: ``(n,) bool``: rows that the rule was given.
        shares: ``(n,) float64``: what each row brought; None where the rule goes by coordinate.
        rule: The rule that made it.
        held: Why the parent is kept, empty where it is not.
        metrics: Scores of what is kept.
        seconds: Seconds of judging.
    """

    made: Aggregate
    findings: tuple[tuple[Finding, ...], ...]
    entered: npt.NDArray[np.bool_]
    shares: F64 | None
    rule: str
    held: str
    metrics: dict[str, float]
    seconds: float


def reputation(rounds: Sequence[Sequence[str]]) -> tuple[float, bool]:
    """A client's reputation, 1 at first, and whether it is left out for now.

    Args:
        rounds: What it was flagged for, round by round, oldest first.

    Returns:
        Reputation in [0, 1]; True where it is below ``LEAST_REPUTATION`` and there are two distinct reasons: unusual data alone has one.
    """
    value = 1.0
    for codes in rounds:
        value = _MEMORY * value + (1 - _MEMORY) * (not codes)
    return value, value < LEAST_REPUTATION and len({code for codes in rounds for code in codes}) >= 2


def explained(found: Sequence[Finding], standing: tuple[float, bool], held: str) -> str:
    """Why an update did not enter, for the operator: what was observed, the limit, the cohort's median, and what follows."""
    value, left_out = standing
    said = []
    for test in found:
        if test.code == "harm":
            said.append(
                f"loss on held-out text moved by {test.observed:.4g}, limit {test.threshold:.4g}, peers' median {test.median:.4g}"
            )
        elif test.flagged:
            times, limit = (x / test.median for x in (test.observed, test.threshold))
            said.append(f"{test.test} {times:.2g} times the peers' median, limit {limit:.2g}")
    if said:
        said.append("unusual data or an attack")
    elif held:
        return f"round held: {held}"
    return "; ".join(
        [*said, *(["left out for now"] if left_out else []), f"reputation {value:.2f}, least {LEAST_REPUTATION:g}"]
    )


def enter(
    defence: Defence, rule: Rule, parent: F32, cohort: Cohort, schema: Schema, judge: Judge, before: dict[str, float]
) -> Entered:
    """Makes the round's candidate and judges it.

    Args:
        defence: The run's settings.
        rule: How A and B are aggregated.
        parent: ``(d,) float32``.
        cohort: The updates.
        schema: Names and shapes.
        judge: Who scores.
        before: The parent's scores.

    Raises:
        VerificationError: Shapes differ, or a number is not finite.
    """
    count = len(cohort.updates)
    findings, seconds = [list[Finding]() for _ in range(count)], 0.0
    norms = norms_of(cohort.updates)
    if defence.rule == PIPELINE:
        whole = norm_test(norms, cohort.predicted)
        by_part = parts_test(part_norms(parent, cohort.updates, schema), cohort.predicted)
        for tests, *both in zip(findings, whole, by_part, strict=True):
            tests.extend(both)
        if "loss" in before:
            losses = []
            for update in cohort.updates:
                scores, took = judge.judge(bounded(np.asarray(parent + update, dtype=np.float32), schema))
                losses.append(scores.get("loss", np.inf))
                seconds += took
            for tests, found in zip(findings, harm_test(np.array(losses), before["loss"]), strict=True):
                tests.append(found)
    flagged = [any(found.flagged for found in tests) for tests in findings]
    entered = ~(np.array(flagged, dtype=bool) | cohort.quarantined)
    told = tuple(map(tuple, findings))

    def kept(why: str, strict: str) -> Entered:
        nothing = np.zeros(count, dtype=bool)
        return Entered(Aggregate(parent, 0.0), told, nothing, None, strict, why, before, seconds)

    if majority_flagged(flagged):
        return kept(f"{sum(flagged)} of {count} updates are odd: more than half", defence.rule)
    attempts = [of_rows(defence.rule)]
    attempts += [STRONGEST] if defence.gated else []
    why = ""
    for number, name in enumerate(attempts):
        own = cohort.updates[entered]
        # The second try believes in as many attackers as its rule can stand, and cuts twice as deep.
        attackers = defence.attackers if number == 0 else (len(own) - 1) // 2
        if len(own) < least(name, attackers):
            return kept(
                f"{len(own)} updates are left: {name} wants {least(name, attackers)} at {attackers} attackers", name
            )
        scales = to_median(norms[entered]) / (1 + number) if defence.rule == PIPELINE or number else np.ones(len(own))
        made, shares = candidate(name, rule, parent, own, cohort.weights[entered], attackers, scales, schema)
        made = Aggregate(bounded(made.vector, schema), made.residual)
        metrics, took = judge.judge(made.vector)
        seconds += took
        why = lost(before, metrics, defence.margin, defence.label_margin)
        if not why:
            every = None if shares is None else np.zeros(count)
            if every is not None:
                every[entered] = shares
            return Entered(made, told, entered, every, name, "", metrics, seconds)
    return kept(why, attempts[-1])


def candidate(
    name: str,
    rule: Rule,
    parent: F32,
    updates: F32,
    weights: F64,
    attackers: int,
    scales: F64,
    schema: Schema,
) -> tuple[Aggregate, F64 | None]:
    """The parent moved by what the robust rule makes of the updates; with ``exact``, by their products."""
    if name == "mean":
        return aggregate(rule, parent, updates, weights, schema), weights / weights.sum()
    combined = combine(name, updates, attackers, scales)
    mean = np.asarray(parent + combined.vector, dtype=np.float32)
    shares = combined.coefficients
    if rule == "exact" and shares is not None:
        some = shares > 0
        scaled = (updates[some] * scales[some, None]).astype(np.float32)
        return exact_products(mean, parent, scaled, shares[some], schema), shares
    return Aggregate(mean, 0.0), shares


def lost(
    before: dict[str, float], after: dict[str, float], margin: float | None, label_margin: float | None = None
) -> str:
    """Why a candidate is not let in, or nothing.

    It lost more than ``margin`` of accuracy (of loss where there is no accuracy), or ``label_margin`` of one label's recall.
    """
    for one in sorted(before) if label_margin is not None else ():
        if one.startswith(RECALL) and label_margin is not None and before[one] - after.get(one, 0.0) > label_margin:
            return f"{one} would go from {before[one]:.4f} to {after.get(one, 0.0):.4f}: limit {label_margin:g}"
    name, sign = ("accuracy", 1.0) if "accuracy" in before else ("loss", -1.0)
    if margin is None or name not in before:
        return ""
    down = sign * (before[name] - after.get(name, -sign * np.inf))
    return (
        f"{name} would go from {before[name]:.4f} to {after.get(name, float('nan')):.4f}: limit {margin:g}"
        if down > margin
        else ""
    )


def lost_at_sites(
    before: dict[str, float], now: dict[str, float], std: dict[str, float], units: dict[str, float], margin: float
) -> str:
    """Why the last round is taken back, or nothing: its adapter's loss on the sites' own text rose by more than noise and ``margin``.

    Args:
        before: Noised sum of the units' losses under the adapter before it, by client, as told in the last round.
        now: The same under its own adapter, as told in this one.
        std: Standard deviation of the noise on each such sum.
        units: Declared units.
        margin: Nats a unit.
    """
    both = sorted(set(before) & set(now))
    if not both:
        return ""
    count = sum(units[client] for client in both)
    rose = sum(now[client] - before[client] for client in both) / count
    # Three standard deviations of the difference of two sums, each noised at every site.
    room = margin + 3 * (2 * sum(std[client] ** 2 for client in both)) ** 0.5 / count
    if rose <= room:
        return ""
    return f"loss on the own text of {len(both)} sites rose by {rose:.4f} nats a unit in the round before: limit {room:.4f}; taken back"
