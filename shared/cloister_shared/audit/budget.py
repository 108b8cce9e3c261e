"""Epsilon of what the logs say was done, by an accountant of its own: RDP at every prefix, PLD where a number was published.

A block's history is every Gaussian release of every entry that was
charged to it and not given back. RDP bounds from above: where it is within the cap, so is the truth; where it is not, PLD decides. The
same history is worked out once (``accountant``).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cloister_shared.audit.accountant import Step, Steps, allowed, by_both, by_rdp, sure
from cloister_shared.audit.findings import Findings, many
from cloister_shared.audit.sites import Entry, Ledger
from cloister_shared.audit.stated import MOST_LOW, Stated, too_low

# A published figure may be above this accountant's, never below it by more than the two's numerical error.
TOLERANCE = 0.02
# Kinds of release (noise multiplier and rate) of one site: a text that grew three hundred times.
MOST_KINDS = 300
# Kinds in all distinct histories of one site's blocks together: each is laid out by itself.
MOST_IN_ALL = 3000
# Entries of all blocks together, each counted with its block's kinds: so much is held against caps.
MOST_ON_THE_WAY = 1_000_000
# How often PLD is worked out for the way there, over all blocks: each takes about 0.1 s.
_SURE_POINTS = 60


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
        rounds: Rounds with charges in it.
        epsilon: Of the month alone, by PLD.
        lifetime: Of everything up to its end.
        sure: Whether that is by PLD; else by RDP, an upper bound.
        alone_sure: The same of the month alone.
    """

    month: str
    rounds: int
    epsilon: float
    lifetime: float
    sure: bool
    alone_sure: bool


@dataclass(frozen=True)
class Block:
    """What one block of text has spent.

    Attributes:
        client: The site's key id.
        site: Its name.
        block: The block's number.
        epsilon: By PLD, of all that is charged; by RDP where that is not ``sure``.
        rdp: By RDP.
        delta: At which.
        cap: The cap of its last reservation.
        rounds: Rounds that were charged.
        charges: Entries charged: a round that was begun again may have several.
        steps: Gaussian releases in all.
        points: Its way there.
        periods: What each month cost.
        alone: Epsilon of each round by itself, of all its charges, by PLD (by RDP beyond ``MOST_KINDS``), and how many rounds had it.
        sure: Whether ``epsilon`` is by PLD.
    """

    client: str
    site: str
    block: int
    epsilon: float
    rdp: float
    delta: float
    cap: float
    rounds: int
    charges: int
    steps: int
    points: tuple[Point, ...]
    periods: tuple[Period, ...]
    alone: tuple[tuple[float, int], ...]
    sure: bool


def check_budgets(ledgers: Mapping[str, Ledger], findings: Findings) -> list[Block]:
    """Recomputes every block of every site and holds it against its caps."""
    out, charged = list[Block](), list[tuple[Ledger, int, list[Entry]]]()
    for ledger in ledgers.values():
        of = dict[int, list[Entry]]()
        for entry in ledger.entries.values():
            for block in entry.blocks:
                of.setdefault(block, []).extend([entry] if entry.state != "void" else [])
        charged += [(ledger, block, of[block]) for block in sorted(of)]
    known, in_all, beyond = dict[tuple[str, tuple[int, ...]], Block](), Counter[str](), dict[str, str]()
    on_the_way = 0
    for ledger, block, entries in charged:
        # Blocks that always were in the same rounds are one history.
        same = ledger.client, tuple(entry.number for entry in entries)
        if same not in known:
            kinds = len({step for entry in entries for step in entry.steps})
            in_all[ledger.client] += kinds
            on_the_way += kinds * len(entries)
            if kinds and (kinds > MOST_KINDS or in_all[ledger.client] > MOST_IN_ALL or on_the_way > MOST_ON_THE_WAY):
                known[same] = _bounded(ledger, block, entries)
                beyond.setdefault(ledger.client, f"site {ledger.name} block {block}")
            else:
                known[same] = _block(ledger, block, entries, max(2, _SURE_POINTS // len(charged)), findings)
        out.append(replace(known[same], block=block))
    for where in beyond.values():
        what = (
            f"releases of more than {MOST_KINDS} kinds, or {MOST_IN_ALL} with blocks before it, or too many entries of as many:"
            " not worked out, nor others"
        )
        findings.incomplete("cap", where, what)
    if out:
        worst = max(out, key=lambda b: b.epsilon)
        most = f"{worst.epsilon:.3f} ({worst.site}, block {worst.block})"
        findings.held.append(f"{many(len(out), 'block')} recomputed by dp-accounting; the most is {most}")
    return sorted(out, key=lambda b: (b.site, b.block))


def _bounded(ledger: Ledger, block: int, charged: list[Entry]) -> Block:
    """A block whose releases are too unlike, or unlike other blocks', to be worked out in good time: by RDP alone."""
    delta = min(e.terms[3] for e in charged)
    bound, steps = by_rdp(_together(charged), delta), sum(sum(entry.steps.values()) for entry in charged)
    return Block(
        *(ledger.client, ledger.name, block, bound, bound, delta, charged[-1].cap, _rounds(charged), len(charged)),
        *(steps, (), (), (), False),
    )


def _block(ledger: Ledger, block: int, charged: list[Entry], looks: int, findings: Findings) -> Block:
    # Of all that were stated, the least: an epsilon at a larger delta says less.
    delta = min((e.terms[3] for e in charged), default=1e-5)
    whole, points, where = Counter[Step](), list[Point](), f"site {ledger.name} block {block}"
    sure_at, caps = {round(i * (len(charged) - 1) / (looks - 1)) for i in range(looks)}, list[Stated]()
    for place, entry in enumerate(charged):
        whole += entry.steps
        so_far = tuple(sorted(whole.items()))
        known = by_both(so_far, delta)[0] if place in sure_at and sure(so_far, delta) else None
        points.append(Point(entry.at, entry.number, by_rdp(so_far, delta), known))
        # Its cap was for the delta that its owner stated then.
        caps.append(Stated(entry.cap, so_far, entry.terms[3]))
    _over(charged, caps, where, findings)
    final, bound = by_both(tuple(sorted(whole.items())), delta) if whole else (0.0, 0.0)
    cap = charged[-1].cap if charged else 0.0
    months, of_rounds = dict[str, list[Entry]](), dict[tuple[str, int], list[Entry]]()
    for entry in charged:
        months.setdefault(_month(entry.at), []).append(entry)
        of_rounds.setdefault((entry.run, entry.round), []).append(entry)
    kinds = Counter(_together(found) for found in of_rounds.values())
    # A site's clock may go back: by a month's end is what was charged up to its last entry, and to those of months before it.
    last = {_month(point.at): place for place, point in enumerate(points)}
    upto = {month: points[max(at for other, at in last.items() if other <= month)] for month in last}
    ends = {month: (one.rdp, False) if one.pld is None else (one.pld, True) for month, one in upto.items()}
    of_months = {month: _together(found) for month, found in months.items()}
    if sum(map(len, set(of_months.values()))) <= MOST_KINDS:
        alone_in = {month: (by_both(of, delta)[0], sure(of, delta)) for month, of in of_months.items()}
    else:
        alone_in = {month: (by_rdp(of, delta), False) for month, of in of_months.items()}
    periods = tuple(
        Period(month, _rounds(found), alone_in[month][0], *ends[month], alone_in[month][1])
        for month, found in months.items()
    )
    few = sum(len(of) for of in kinds) <= MOST_KINDS
    alone = tuple((by_both(of, delta)[0] if few else by_rdp(of, delta), count) for of, count in kinds.items())
    return Block(
        client=ledger.client,
        site=ledger.name,
        block=block,
        epsilon=final,
        rdp=bound,
        delta=delta,
        cap=cap,
        rounds=len(of_rounds),
        charges=len(charged),
        steps=sum(whole.values()),
        points=tuple(points),
        periods=periods,
        alone=alone,
        sure=not whole or sure(tuple(sorted(whole.items())), delta),
    )


def _over(charged: list[Entry], caps: list[Stated], where: str, findings: Findings) -> None:
    """Entries after which a block is above the cap that they were reserved under."""
    low = too_low(caps, TOLERANCE)
    for place in low:
        entry, (cap, so_far, delta) = charged[place], (caps[place].epsilon, caps[place].steps, caps[place].delta)
        at, own = f"{where} entry {entry.number}", by_both(so_far, delta)[0]
        surely = Counter(dict(so_far))
        for one in charged[: place + 1]:
            surely.subtract(one.steps if one.disputed else ())
        undisputed = tuple(sorted((+surely).items()))
        if not sure(so_far, delta):
            what = f"epsilon at delta {delta:g} is at most {own:.4f} by RDP, too much for PLD; the cap is {cap:g}"
            findings.incomplete("cap", at, what)
        elif undisputed == so_far or (undisputed and by_both(undisputed, delta)[0] > allowed(cap, TOLERANCE)):
            findings.violation("cap", at, f"epsilon {own:.4f} at delta {delta:g} is above the cap {cap:g}")
        else:
            what = f"epsilon {own:.4f} at delta {delta:g} is above the cap {cap:g}, where what was given back counts"
            findings.incomplete("cap", at, what)
    if len(low) == MOST_LOW:
        what = f"{MOST_LOW} entries are above their cap up to this one: none after it was looked at"
        findings.incomplete("cap", f"{where} entry {charged[low[-1]].number}", what)


def _rounds(charged: list[Entry]) -> int:
    return len({(entry.run, entry.round) for entry in charged})


def _month(at: float) -> str:
    return time.strftime("%Y-%m", time.gmtime(at)) if 0 <= at < 1e11 else "at no time"


def _together(entries: list[Entry]) -> Steps:
    whole = Counter[Step]()
    for entry in entries:
        whole.update(entry.steps)
    return tuple(sorted(whole.items()))
