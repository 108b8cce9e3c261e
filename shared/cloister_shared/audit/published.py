"""Every epsilon that the coordinator published, held against its own log and against the sites' own ledgers: nowhere less than either.

Of a client: everything that its commits and aborted rounds say was charged, attempts included; and every entry of its own ledger that is of
a run of this log, block by block, noised numbers included. Of whole clients: every sum that noise was drawn for.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from cloister_shared.audit.accountant import Step, Steps, allowed, by_both, by_rdp, epsilon_of, sure
from cloister_shared.audit.budget import MOST_IN_ALL, MOST_KINDS, TOLERANCE
from cloister_shared.audit.federation import Aborted, Asked, History, RoundCommit
from cloister_shared.audit.findings import Findings, listed, many
from cloister_shared.audit.reading import MALFORMED, hexes, integer, number, words
from cloister_shared.audit.sites import Ledger
from cloister_shared.audit.stated import MOST_LOW, Stated, too_low

# Kinds of release in all histories of a site's own ledger that are worked out.
_MOST_TRIED = 20_000
# Kinds of release in all figures together: each is held against all that it is of.
_MOST_TOLD = 3_000_000
# Kinds that are laid out for all figures: of one series once, and again wherever it does not grow or has a new delta.
_MOST_LAID = 40_000
# What a coordinator states of a client whose card it has no more.
_NO_UNIT = "not said"


@dataclass(frozen=True)
class _Said:
    """What a leaf states of one client's cost.

    Attributes:
        where: Site, round and run, in words.
        leaf: Its place in the log.
        row: The client's row.
        epsilon: As stated.
        steps: All releases that it is of.
    """

    where: str
    leaf: int
    row: Asked
    epsilon: float
    steps: Steps

    @property
    def stated(self) -> Stated:
        """The figure alone."""
        return Stated(self.epsilon, self.steps, self.row.delta)


def check_published(history: History, findings: Findings, of: Mapping[str, Ledger]) -> None:
    """Walks commits and aborted rounds in the log's order.

    Args:
        history: The federation's log.
        findings: Where what is found goes.
        of: Sites' own ledgers, by each key that their site had.
    """
    whole, beyond = dict[tuple[str, str], Counter[Step]](), set[str]()
    # Each time that a series does not grow, or is stated at a new delta, all of its kinds are laid out again.
    deltas, laid, told_in_all = set[tuple[str, str, float]](), Counter[str](), 0
    # In the order of the log, of each site, and of each site's part of a run.
    lifetimes, runs = dict[str, list[_Said]](), dict[tuple[str, str], list[_Said]]()
    # Charged, though the round came to nothing; a commit of the same round counts these attempts again.
    lost, most = dict[tuple[str, str, int], Counter[Step]](), dict[tuple[str, str, int], int]()
    # Works that each round's leaves so far say were charged, by client: what is charged stays told, and stays the same work.
    works = dict[tuple[str, int], dict[str, str]]()
    for leaf in history.told:
        if isinstance(leaf, RoundCommit) and not {one.client for one in leaf.asked} >= set(leaf.privacy):
            where = f"round {leaf.number} of run {leaf.run[:8]}"
            findings.violation("published", where, "the commit states the cost of a site that was not asked")
        charged = works.setdefault((leaf.run, leaf.number), {})
        if gone := charged.keys() - {one.client for one in leaf.asked}:
            names = listed(sorted(history.names.get(client, client[:16]) for client in gone))
            what = "an earlier leaf of the round says that it was charged, this one nothing of it"
            findings.violation("charged", f"site {names}, round {leaf.number} of run {leaf.run[:8]}", what)
            # Once: what later leaves say of it is held against its figures alone.
            works[leaf.run, leaf.number] = charged = {i: plan for i, plan in charged.items() if i not in gone}
        for one in leaf.asked:
            where = f"site {one.name}, round {leaf.number} of run {leaf.run[:8]}"
            if (one.took_part or one.client in charged) and charged.setdefault(one.client, one.plan) != one.plan:
                findings.violation("charged", where, "an earlier leaf of the round says that another work was charged")
            key = one.client, leaf.run, leaf.number
            if one.charged < most.get(key, 0):
                was = f"{many(most[key], 'attempt')} {'was' if most[key] == 1 else 'were'}"
                findings.violation("charged", where, f"{was} charged by an earlier leaf, {one.charged} by this one")
            most[key] = max(one.charged, int(one.took_part), most.get(key, 0))
            # Under whichever key: a site that joined again has the same text and the same name.
            ledger = of.get(one.client)
            whose = one.name if ledger is None else ledger.name
            sum_of, run_of = (whole.setdefault((whose, of_run), Counter()) for of_run in ("", leaf.run))
            before = lost.pop(key, Counter())
            sum_of.subtract(before)
            run_of.subtract(before)
            # An attempt that was charged counts, whatever came of it: its text was used.
            times = most[key]
            events = Counter({(one.noise_multiplier, one.sample_rate): one.steps * times})
            sum_of.update(events)
            run_of.update(events)
            for of_run, kinds in (("", sum_of), (leaf.run, run_of)):
                if not before <= events or (whose, of_run, one.delta) not in deltas:
                    laid[whose] += len(kinds)
                    deltas.add((whose, of_run, one.delta))
            told_in_all += len(sum_of) + len(run_of)
            far = laid[whose] > MOST_IN_ALL or laid.total() > _MOST_LAID or told_in_all > _MOST_TOLD
            if len(sum_of) > MOST_KINDS or far:
                if whose not in beyond:
                    what = (
                        f"its releases are of more than {MOST_KINDS} kinds, or stated at too many deltas, or too many are before them:"
                        " what is published from here on was not worked out"
                    )
                    findings.incomplete("published", where, what)
                beyond.add(whose)
                continue
            if isinstance(leaf, Aborted):
                lost[key] = events
                if not times and not one.epsilon:
                    continue  # nothing is stated of what cost nothing
            elif leaf.privacy:
                said = _of_run(leaf.privacy.get(one.client), one, history.units.get(one.client), findings, where)
                if said is not None and +run_of:
                    mine = _Said(where, leaf.index, one, said, tuple(sorted((+run_of).items())))
                    runs.setdefault((whose, leaf.run), []).append(mine)
            if +sum_of:
                mine = _Said(where, leaf.index, one, one.epsilon, tuple(sorted((+sum_of).items())))
                lifetimes.setdefault(whose, []).append(mine)
    bad, tried = set[str](), _Tried.of(history)
    for (whose, run), each in runs.items():
        low, own = _low(each), _Owns(of, {run}, tried)
        for place, said_of in enumerate(_up_to(each, low, findings)):
            if place in low:
                _tell(said_of, " for its run", findings)
            if place in low or not own.check(said_of, " for its run", findings):
                bad.add(whose)
    _lifetimes(list(lifetimes.values()), bad, findings, of, history, tried)
    _whole_clients(history, findings)


def _low(each: list[_Said]) -> set[int]:
    """Places of figures that are too low, the first ``MOST_LOW`` of them; those at one delta grow from each other, whatever is between."""
    of = dict[float, list[int]]()
    for place, one in enumerate(each):
        of.setdefault(one.row.delta, []).append(place)
    found = [p[i] for p in of.values() for i in too_low([each[place].stated for place in p], TOLERANCE)]
    return set(sorted(found)[:MOST_LOW])


def _up_to(each: list[_Said], low: set[int], findings: Findings) -> list[_Said]:
    """A series as far as it was looked at."""
    if len(low) < MOST_LOW:
        return each
    last = each[max(low)]
    findings.incomplete(
        "published", last.where, f"{MOST_LOW} figures are too low up to this one: none after it was looked at"
    )
    return each[: max(low) + 1]


def _lower(steps: Counter[Step], delta: float, least: float, said: str, where: str, findings: Findings) -> None:
    """A figure below what these releases come to; RDP's bound alone calls none wrong."""
    if sure(tuple(sorted(steps.items())), delta):
        findings.violation("published", where, f"{said}, {least:.4f} is right")
    else:
        what = f"{said}; it is at most {least:.4f} by RDP, and too large to be worked out"
        findings.incomplete("published", where, what)


def _tell(said: _Said, whose: str, findings: Findings) -> None:
    steps, delta = Counter(dict(said.steps)), said.row.delta
    _lower(
        steps, delta, epsilon_of(steps, delta), f"epsilon {said.epsilon:.4f} was published{whose}", said.where, findings
    )


def _lifetimes(
    lifetimes: list[list[_Said]],
    bad: set[str],
    findings: Findings,
    of: Mapping[str, Ledger],
    history: History,
    tried: _Tried,
) -> None:
    told, mine = set[str](), set[str]()
    for each in lifetimes:
        low, own = _low(each), _Owns(of, history.runs, tried)
        for place, said in enumerate(_up_to(each, low, findings)):
            if place in low:
                _tell(said, "", findings)
                bad.add(said.row.name)
                continue
            told.add(said.row.name)
            if said.row.client in of:
                mine.add(said.row.name)
                bad |= set() if own.check(said, "", findings) else {said.row.name}
    for names, against in (
        (told & mine - bad, " and of their own ledgers"),
        (told - mine - bad, ", by the coordinator's own commits alone"),
    ):
        if names:
            what = f"the epsilon published for {many(len(names), 'site')} is not below what dp-accounting makes of their rounds"
            findings.held.append(what + against)


def _of_run(
    said: tuple[float, float, float, str] | None, one: Asked, declared: str | None, findings: Findings, where: str
) -> float | None:
    """What a commit states of its run's cost beside the clients' rows; what it states of the lifetime there must be the same as theirs."""
    if said is None:
        findings.violation("published", where, "the commit states what it cost others, and not what it cost this site")
        return None
    run, lifetime, delta, unit = said
    if unit not in (declared, _NO_UNIT):
        findings.violation("published", where, f"the commit states a cost per {unit}; the site declared {declared}")
    if (lifetime, delta) != (one.epsilon, one.delta):
        what = f"two epsilons are stated for its lifetime: {one.epsilon:.4f} at {one.delta:g} and {lifetime:.4f} at {delta:g}"
        findings.violation("published", where, what)
        return None
    return run


class _Walk:
    """A site's own ledger, as far as entries of some runs go, walked up to one work after the other: its releases by block."""

    def __init__(self, ledger: Ledger, runs: Collection[str], places: Mapping[tuple[str, int], int]) -> None:
        self._entries = [e for e in ledger.entries.values() if e.state != "void" and e.run in runs]
        self._at, self._last = 0, {e.plan: place for place, e in enumerate(self._entries)}
        # Of blocks that were always in the same rounds one stands for all.
        charged = dict[int, list[int]]()
        for place, entry in enumerate(self._entries):
            for block in entry.blocks:
                charged.setdefault(block, []).append(place)
        self._blocks = dict[int, list[int]]()
        for together, block in {tuple(mine): block for block, mine in charged.items()}.items():
            for place in together:
                self._blocks.setdefault(place, []).append(block)
        self._told = [places.get((e.run, e.round), sys.maxsize) for e in self._entries]
        self.spent, self.all = dict[int, Counter[Step]](), dict[int, Counter[Step]]()

    def up_to(self, plan: str, leaf: int) -> None:
        """On to the work's last entry, and over all whose rounds were told before a leaf: no clock says what was first."""
        until = self._last.get(plan, -1)
        while self._at < len(self._entries) and (self._at <= until or self._told[self._at] < leaf):
            entry = self._entries[self._at]
            for block in self._blocks.get(self._at, ()):
                self.all.setdefault(block, Counter()).update(entry.steps)
                if entry.state == "spent":
                    self.spent.setdefault(block, Counter()).update(entry.steps)
            self._at += 1


@dataclass
class _Tried:
    """Histories of sites' own ledgers that were worked out, and what the log tells of rounds: once for all sites and runs.

    Attributes:
        kinds: Of release, in all of them.
        known: The histories.
        places: Where each round is told first.
        final: By client and leaf: the last leaf that tells of its part in a round, and those after which nothing more was charged.
    """

    kinds: int = 0
    known: set[Steps] = field(default_factory=set)
    places: dict[tuple[str, int], int] = field(default_factory=dict)
    final: set[tuple[str, int]] = field(default_factory=set)

    @classmethod
    def of(cls, history: History) -> _Tried:
        """Nothing yet."""
        told = history.told
        rows = [(leaf, one) for leaf in told for one in leaf.asked]
        last = {(one.client, leaf.run, leaf.number): one.charged for leaf, one in rows}
        final = {
            (one.client, leaf.index) for leaf, one in rows if one.charged >= last[one.client, leaf.run, leaf.number]
        }
        return cls(places={(leaf.run, leaf.number): leaf.index for leaf in reversed(told)}, final=final)

    def add(self, steps: Steps) -> None:
        """One more, where it is."""
        self.kinds += len(steps) if steps not in self.known else 0
        self.known.add(steps)


class _Owns:
    """The ledgers of one site, under whichever key and in however many logs: what is published of it is not below any, nor all together.

    Args:
        of: Sites' own ledgers, by each key that their site had.
        runs: Whose entries count.
        tried: What was worked out before this.
    """

    def __init__(self, of: Mapping[str, Ledger], runs: Collection[str], tried: _Tried) -> None:
        self._of, self._runs, self._walks, self._tried = of, runs, dict[str, _Walk](), tried
        self._places, self._final = tried.places, tried.final

    def check(self, said: _Said, whose: str, findings: Findings) -> bool:
        """Whether what was published after a work is not below the ledgers' entries up to it."""
        ledger, delta = self._of.get(said.row.client), said.row.delta
        if ledger is None:
            return True
        if not self._walks:
            same = {id(one): one for one in self._of.values() if one.name == ledger.name}.values()
            self._walks = {one.origin: _Walk(one, self._runs, self._places) for one in same}
        mine = self._walks[ledger.origin]
        told, what = Counter(dict(said.steps)), f"epsilon {said.epsilon:.4f} was published{whose}"
        # A round that was broken off may be tried again, and other runs go on before that: which of its entries are of which attempt
        # the ledger does not say. All of them are held against the first leaf after which nothing more was charged.
        plan = said.row.plan if (said.row.client, said.leaf) in self._final else ""
        for walk in self._walks.values():
            walk.up_to(plan, -1 if walk is mine else said.leaf)
        # What the log tells as well, or more of it, was looked at before.
        for kinds, lost in ((mine.spent, False), (mine.all, True)):
            most = self._heaviest([steps for steps in kinds.values() if not steps <= told], delta)
            if self._tried.kinds > _MOST_TRIED:
                what = (
                    "its own ledger has too many histories beside the log's: from here on nothing was held against it"
                )
                findings.incomplete("published", f"site {ledger.name}", what)
                return False
            if not most or allowed(said.epsilon, TOLERANCE) >= (worst := epsilon_of(most, delta)):
                continue
            if lost:
                what += f"; with charges that no update came of the site's own ledger comes to {worst:.4f}: its own figure is the right one"
                findings.incomplete("published", said.where, what)
            else:
                _lower(most, delta, worst, f"{what} and the site's own ledger says more", said.where, findings)
            return False
        return len(self._walks) < 2 or self._together(said, told, what, findings)

    def _heaviest(self, blocks: Collection[Counter[Step]], delta: float) -> Counter[Step]:
        """The one that costs most; nothing where there is none."""
        distinct = {tuple(sorted(steps.items())): steps for steps in blocks}
        heaviest, most = Counter[Step](), -1.0
        # RDP bounds from above: those that it puts below what was found need no more.
        for steps in sorted(distinct, key=lambda steps: by_rdp(steps, delta), reverse=True):
            if by_rdp(steps, delta) <= most or self._tried.kinds > _MOST_TRIED:
                break
            self._tried.add(steps)
            if (epsilon := by_both(steps, delta)[0]) > most:
                heaviest, most = distinct[steps], epsilon
        return heaviest

    def _together(self, said: _Said, told: Counter[Step], what: str, findings: Findings) -> bool:
        """Several logs of a site may be of one text."""
        delta, whole = said.row.delta, Counter[Step]()
        for walk in self._walks.values():
            whole += self._heaviest(walk.all.values(), delta)
        if not whole or whole <= told or allowed(said.epsilon, TOLERANCE) >= (worst := epsilon_of(whole, delta)):
            return True
        what += f"; if its several logs are of one text, they come to {worst:.4f}"
        findings.incomplete("published", said.where, what)
        return False


def _whole_clients(history: History, findings: Findings) -> None:
    sums, committed = Counter[Step](), {(c.run, c.number): c for c in history.commits}
    series, wheres = list[Stated](), list[str]()
    for index, record in enumerate(history.records):
        if record.get("kind") != "spend":
            continue
        where = f"leaf {index}"
        if len(sums) > MOST_KINDS:
            what = f"client level: its noise is of more than {MOST_KINDS} kinds: what is published from here on was not worked out"
            findings.incomplete("published", where, what)
            break
        try:
            sums[number(record, "noise_multiplier", 0.05, 1e6), 1.0] += 1
            delta, said = number(record, "delta", 1e-10, 0.5), number(record, "epsilon", 0, 1e6)
            series.append(Stated(said, tuple(sorted(sums.items())), delta))
            wheres.append(where)
            sigma, clip = number(record, "noise_multiplier", 0.05, 1e6), number(record, "clipping_norm", 1e-9, 1e9)
            if not math.isclose(number(record, "noise_std", 0, 1e15), sigma * clip, rel_tol=1e-9):
                findings.violation("published", where, "client level: its noise is not its multiplier times the clip")
            commit = committed.get((hexes(record, "run", 16), integer(record, "number", 1, 1_000_000)))
            if commit is None or integer(record, "attempt", 1, 1_000_000) != commit.attempt:
                continue
            if index > commit.index:
                findings.violation("order", where, "noise was charged after its round was committed")
            if sorted(json.loads(words(record, "clients"))) != sorted(commit.accepted):
                what = "client level: noise was charged for a sum of others than those whose updates entered"
                findings.violation("published", where, what)
        except MALFORMED as error:
            findings.violation("leaf", where, f"malformed: {error}"[:300])
    low = too_low(series, TOLERANCE)
    for place in low:
        one, of = series[place], Counter(dict(series[place].steps))
        said_of = f"client level: {one.epsilon:.4f} was published"
        _lower(of, one.delta, epsilon_of(of, one.delta), said_of, wheres[place], findings)
    if len(low) == MOST_LOW:
        what = f"client level: {MOST_LOW} figures are too low up to this one: none after it was looked at"
        findings.incomplete("published", wheres[low[-1]], what)
