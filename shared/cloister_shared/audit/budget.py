"""Epsilon, recomputed from what the logs say was done, by dp-accounting alone: RDP at every prefix, PLD where a number was published.

The site's own accountant (PRV, and PLD beside it) is not used here. A block's history is every Gaussian release of every entry that was
charged to it and not given back. RDP (Mironov 2017; Mironov, Talwar and Zhang 2019) bounds from above: where it is within the cap, so is
the truth; where it is not, PLD (Doroshenko et al. 2022) decides. The same history is worked out once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from cloister_shared.audit.federation import Aborted, History, RoundCommit
from cloister_shared.audit.findings import Findings, many
from cloister_shared.audit.reading import MALFORMED, number
from cloister_shared.audit.sites import Entry, Ledger, Step

Steps = tuple[tuple[Step, int], ...]
# A published figure may be above this accountant's, never below it by more than the two's numerical error.
TOLERANCE = 0.02
_FAR_ABOVE = 100.0
# How often PLD is worked out for the way there, over all blocks: each takes about 0.1 s.
_SURE_POINTS = 60
# Integers: at fractional orders the series does not converge for small noise, and the bound holds at any set of orders.
_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)


@dataclass(frozen=True)
class Point:
    """A block's budget after an entry.

    Attributes:
        at: When it was reserved, seconds since 1970.
        entry: The entry.
        rdp: Epsilon by RDP, an upper bound.
        pld: By PLD, which decides; None where it was not worked out.
    """

    at: float
    entry: int
    rdp: float
    pld: float | None = None


@dataclass(frozen=True)
class Period:
    """What one calendar month cost a block, alone; the lifetime beside it is what counts.

    Attributes:
        month: For example 2026-11, UTC, by the site's clock.
        rounds: Entries charged in it.
        epsilon: Of the month alone, by PLD.
        lifetime: Of everything up to its end.
        sure: Whether that is by PLD; else by RDP, an upper bound.
    """

    month: str
    rounds: int
    epsilon: float
    lifetime: float
    sure: bool


@dataclass(frozen=True)
class Block:
    """What one block of text has spent.

    Attributes:
        client: The site's key id.
        site: Its name.
        block: The block's number.
        epsilon: By PLD, of all that is charged.
        rdp: By RDP.
        delta: At which.
        cap: The cap of its last reservation.
        rounds: Entries charged.
        steps: Gaussian releases in all.
        points: Its way there.
        periods: What each month cost.
        alone: Epsilon of each round by itself, by PLD: terms and how many rounds had them.
    """

    client: str
    site: str
    block: int
    epsilon: float
    rdp: float
    delta: float
    cap: float
    rounds: int
    steps: int
    points: tuple[Point, ...]
    periods: tuple[Period, ...]
    alone: tuple[tuple[float, int], ...]


def _event(steps: Steps) -> Any:
    import dp_accounting

    each = [
        dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), count
        )
        for (sigma, rate), count in steps
    ]
    return dp_accounting.ComposedDpEvent(each)


@cache
def by_rdp(steps: Steps, delta: float) -> float:
    """Epsilon by dp-accounting's RDP."""
    from dp_accounting.rdp import RdpAccountant

    return float(RdpAccountant(orders=_ORDERS).compose(_event(steps)).get_epsilon(delta))


@cache
def by_pld(steps: Steps, delta: float) -> float:
    """Epsilon by dp-accounting's PLD."""
    from dp_accounting.pld import PLDAccountant

    return float(PLDAccountant(value_discretization_interval=1e-3).compose(_event(steps)).get_epsilon(delta))


def check_budgets(ledgers: Mapping[str, Ledger], findings: Findings) -> list[Block]:
    """Recomputes every block of every site and holds it against its caps."""
    out, count = [], sum(len({b for e in one.entries.values() for b in e.blocks}) for one in ledgers.values())
    for ledger in ledgers.values():
        blocks = sorted({b for e in ledger.entries.values() for b in e.blocks})
        for block in blocks:
            out.append(_block(ledger, block, max(2, _SURE_POINTS // max(1, count)), findings))
    if out:
        worst = max(out, key=lambda b: b.epsilon)
        most = f"{worst.epsilon:.3f} ({worst.site}, block {worst.block})"
        findings.held.append(f"{many(len(out), 'block')} recomputed by dp-accounting; the most is {most}")
    return sorted(out, key=lambda b: (b.site, b.block))


def _epsilon(steps: Steps, delta: float) -> tuple[float, float]:
    """By PLD and by RDP; where RDP is far above anything that is allowed, RDP for both: PLD would only take its time."""
    bound = by_rdp(steps, delta)
    return (by_pld(steps, delta) if bound < _FAR_ABOVE else bound), bound


def _block(ledger: Ledger, block: int, sure: int, findings: Findings) -> Block:
    charged = [e for e in ledger.entries.values() if block in e.blocks and e.state != "void"]
    # Of all that were stated, the least: an epsilon at a larger delta says less.
    delta = min((e.terms[3] for e in charged), default=1e-5)
    whole, points, where = Counter[Step](), list[Point](), f"site {ledger.name} block {block}"
    by_both = {round(i * (len(charged) - 1) / (sure - 1)) for i in range(sure)}
    for place, entry in enumerate(charged):
        whole += entry.steps
        bound = by_rdp(tuple(sorted(whole.items())), delta)
        known = _epsilon(tuple(sorted(whole.items())), delta)[0] if place in by_both or bound > entry.cap else None
        points.append(Point(entry.at, entry.number, bound, known))
        if known is not None and known > entry.cap + TOLERANCE:
            findings.violation(
                "cap", f"{where} entry {entry.number}", f"epsilon {known:.4f} is above the cap {entry.cap:g}"
            )
    final, bound = _epsilon(tuple(sorted(whole.items())), delta) if whole else (0.0, 0.0)
    cap = charged[-1].cap if charged else 0.0
    months, kinds = dict[str, list[Entry]](), Counter[Steps]()
    for entry in charged:
        months.setdefault(_month(entry.at), []).append(entry)
        kinds[tuple(sorted(entry.steps.items()))] += 1
    ends = {_month(point.at): (point.rdp, False) if point.pld is None else (point.pld, True) for point in points}
    periods = tuple(
        Period(month, len(found), _epsilon(_together(found), delta)[0], *ends[month]) for month, found in months.items()
    )
    alone = tuple((_epsilon(steps, delta)[0], count) for steps, count in kinds.items())
    return Block(
        *(ledger.client, ledger.name, block, final, bound, delta, cap, len(charged), sum(whole.values())),
        *(tuple(points), periods, alone),
    )


def _month(at: float) -> str:
    return time.strftime("%Y-%m", time.gmtime(at)) if 0 <= at < 1e11 else "at no time"


def _together(entries: list[Entry]) -> Steps:
    whole = Counter[Step]()
    for entry in entries:
        whole += entry.steps
    return tuple(sorted(whole.items()))


def check_published(history: History, findings: Findings) -> None:
    """What the coordinator published may nowhere be less than what its own log comes to: for each client, and for whole clients."""
    whole, good = dict[str, Counter[Step]](), set[str]()
    # Charged, though the round came to nothing; a commit of the same round counts these attempts again.
    lost = dict[tuple[str, str, int], Counter[Step]]()
    told: list[RoundCommit | Aborted] = sorted([*history.commits, *history.aborted], key=lambda leaf: leaf.index)
    for leaf in told:
        if isinstance(leaf, Aborted):
            if leaf.terms is not None:
                sigma, rate, steps = leaf.terms
                of = whole.setdefault(leaf.client, Counter())
                of.subtract(lost.pop((leaf.client, leaf.run, leaf.number), Counter()))
                lost[leaf.client, leaf.run, leaf.number] = Counter({(sigma, rate): steps * leaf.charged})
                of.update(lost[leaf.client, leaf.run, leaf.number])
            continue
        for one in leaf.asked:
            of = whole.setdefault(one.client, Counter())
            of.subtract(lost.pop((one.client, leaf.run, leaf.number), Counter()))
            if not one.took_part:
                continue
            # An attempt that was charged counts, whatever came of it: its text was used.
            of[one.noise_multiplier, one.sample_rate] += one.steps * max(1, one.charged)
            least, _ = _epsilon(tuple(sorted((+of).items())), one.delta)
            if one.epsilon < least - TOLERANCE:
                where = f"site {one.name}, round {leaf.number} of run {leaf.run[:8]}"
                findings.violation("published", where, f"epsilon {one.epsilon:.4f} was published, {least:.4f} is right")
            else:
                good.add(one.client)
    if good:
        findings.held.append(
            f"the epsilon published for {many(len(good), 'site')} is not below what dp-accounting makes of their rounds"
        )
    sums = Counter[Step]()
    for record in history.records:
        if record.get("kind") == "spend":
            where = f"leaf {record.get('index')}"
            try:
                sums[number(record, "noise_multiplier", 0.05, 1e6), 1.0] += 1
                mine, _ = _epsilon(tuple(sorted(sums.items())), number(record, "delta", 1e-10, 0.5))
                if number(record, "epsilon", 0, 1e6) < mine - TOLERANCE:
                    findings.violation(
                        "published", where, f"client level: {record['epsilon']:.4f} was published, {mine:.4f} is right"
                    )
            except MALFORMED as error:
                findings.violation("leaf", where, f"malformed: {error}"[:300])
