"""Epsilon, recomputed from what the logs say was done, by dp-accounting alone: RDP at every prefix, PLD where a number was published.

The site's own accountant (PRV, and PLD beside it) is not used here. A block's history is every Gaussian release of every entry that was
charged to it and not given back. RDP (Mironov 2017; Mironov, Talwar and Zhang 2019) bounds from above: where it is within the cap, so is
the truth; where it is not, PLD (Doroshenko et al. 2022) decides. The same history is worked out once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from cloister_shared.audit.federation import History
from cloister_shared.audit.findings import Findings
from cloister_shared.audit.sites import Ledger

Step = tuple[float, float]
Steps = tuple[tuple[Step, int], ...]
# A published figure may be above this accountant's, never below it by more than the two's numerical error.
TOLERANCE = 0.02
# Integers: at fractional orders the series does not converge for small noise, and the bound holds at any set of orders.
_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)


@dataclass(frozen=True)
class Point:
    """A block's budget after an entry.

    Attributes:
        at: When it was reserved, seconds since 1970.
        entry: The entry.
        rdp: Epsilon by RDP, an upper bound.
    """

    at: float
    entry: int
    rdp: float


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


def steps_of(record: Mapping[str, Any]) -> Counter[Step]:
    """The Gaussian releases of one reservation."""
    counted = Counter({(float(record["noise_multiplier"]), float(record["sample_rate"])): int(record["steps"])})
    for _, sigma in record.get("noised", []):
        counted[float(sigma), 1.0] += 1
    return counted


def check_budgets(ledgers: Mapping[str, Ledger], findings: Findings) -> list[Block]:
    """Recomputes every block of every site and holds it against its caps."""
    out = []
    for ledger in ledgers.values():
        blocks = sorted({b for e in ledger.entries.values() for b in e.reserve["blocks"]})
        for block in blocks:
            out.append(_block(ledger, block, findings))
    if out:
        worst = max(out, key=lambda b: b.epsilon)
        findings.held.append(
            f"{len(out)} blocks recomputed by dp-accounting; the most is {worst.epsilon:.3f} ({worst.site}, block {worst.block})"
        )
    return out


def _block(ledger: Ledger, block: int, findings: Findings) -> Block:
    whole, points, where = Counter[Step](), list[Point](), f"site {ledger.name} block {block}"
    cap, delta, rounds = 0.0, 1e-5, 0
    for number, entry in ledger.entries.items():
        if block not in entry.reserve["blocks"] or entry.state == "void":
            continue
        whole += steps_of(entry.reserve)
        cap, delta = float(entry.reserve["cap"]), float(entry.reserve["delta"])
        rounds += 1
        steps = tuple(sorted(whole.items()))
        bound = by_rdp(steps, delta)
        points.append(Point(float(entry.reserve["at"]), number, bound))
        if bound > cap and (sure := by_pld(steps, delta)) > cap + TOLERANCE:
            findings.violation("cap", f"{where} entry {number}", f"epsilon {sure:.4f} is above the cap {cap:g}")
    steps = tuple(sorted(whole.items()))
    final = by_pld(steps, delta) if steps else 0.0
    return Block(
        ledger.client,
        ledger.name,
        block,
        final,
        points[-1].rdp if points else 0.0,
        delta,
        cap,
        rounds,
        sum(whole.values()),
        tuple(points),
    )


def check_published(history: History, findings: Findings) -> None:
    """The epsilon that the coordinator published for each client may not be less than what its own commits come to."""
    whole, last = dict[str, Counter[Step]](), dict[str, tuple[float, float, str]]()
    for commit in history.commits:
        for client in commit.get("clients", ()):
            if client.get("verdict") != "accepted":
                continue
            name = str(client["client"])
            step = (float(client["noise_multiplier"]), float(client["sample_rate"]))
            whole.setdefault(name, Counter())[step] += int(client["steps"])
            last[name] = float(client["epsilon"]), float(client["delta"]), str(client["name"])
    agreed = 0
    for name, (published, delta, site) in last.items():
        mine = by_pld(tuple(sorted(whole[name].items())), delta)
        if published < mine - TOLERANCE:
            findings.violation(
                "published", f"site {site}", f"epsilon {published:.4f} was published, {mine:.4f} is right"
            )
        else:
            agreed += 1
    if agreed:
        findings.held.append(
            f"the epsilon published for {agreed} sites is not below what dp-accounting makes of their rounds"
        )
