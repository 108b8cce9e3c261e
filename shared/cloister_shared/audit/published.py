"""Every epsilon that the coordinator published, held against its own log and against the sites' own ledgers: nowhere less than either.

Of a client: everything that its commits and aborted rounds say was charged, attempts included; and every entry of its own ledger that is of
a run of this log, block by block, noised numbers included. Of whole clients: every sum that noise was drawn for.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from cloister_shared.audit.accountant import Step, Steps, epsilon_of, sure
from cloister_shared.audit.budget import TOLERANCE
from cloister_shared.audit.federation import Aborted, Asked, History, RoundCommit
from cloister_shared.audit.findings import Findings, many
from cloister_shared.audit.reading import MALFORMED, hexes, integer, number, words
from cloister_shared.audit.sites import Ledger
from cloister_shared.audit.stated import Stated, too_low

# What a coordinator states of a client whose card it has no more.
_NO_UNIT = "not said"


@dataclass(frozen=True)
class _Said:
    """What a leaf states of one client's cost.

    Attributes:
        where: Site, round and run, in words.
        row: The client's row.
        epsilon: As stated.
        steps: All releases that it is of.
    """

    where: str
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
    whole = dict[tuple[str, str], Counter[Step]]()
    # In the order of the log, of each site, and of each site's part of a run.
    lifetimes, runs = dict[str, list[_Said]](), dict[tuple[str, str], list[_Said]]()
    # Charged, though the round came to nothing; a commit of the same round counts these attempts again.
    lost, most = dict[tuple[str, str, int], Counter[Step]](), dict[tuple[str, str, int], int]()
    for leaf in history.told:
        if isinstance(leaf, RoundCommit) and not {one.client for one in leaf.asked} >= set(leaf.privacy):
            where = f"round {leaf.number} of run {leaf.run[:8]}"
            findings.violation("published", where, "the commit states the cost of a site that was not asked")
        for one in leaf.asked:
            where = f"site {one.name}, round {leaf.number} of run {leaf.run[:8]}"
            key = one.client, leaf.run, leaf.number
            if one.charged < most.get(key, 0):
                was = f"{many(most[key], 'attempt')} {'was' if most[key] == 1 else 'were'}"
                findings.violation("charged", where, f"{was} charged by an earlier leaf, {one.charged} by this one")
            most[key] = max(one.charged, most.get(key, 0))
            # Under whichever key: a site that joined again has the same text and the same name.
            ledger = of.get(one.client)
            whose = one.name if ledger is None else ledger.name
            sum_of, run_of = (whole.setdefault((whose, of_run), Counter()) for of_run in ("", leaf.run))
            before = lost.pop(key, Counter())
            sum_of.subtract(before)
            run_of.subtract(before)
            # An attempt that was charged counts, whatever came of it: its text was used.
            times = max(most[key], int(one.verdict == "accepted"))
            events = Counter({(one.noise_multiplier, one.sample_rate): one.steps * times})
            sum_of.update(events)
            run_of.update(events)
            if isinstance(leaf, Aborted):
                lost[key] = events
                if not times:
                    continue  # nothing is stated of what cost nothing
            elif leaf.privacy:
                said = _of_run(leaf.privacy.get(one.client), one, history.units.get(one.client), findings, where)
                if said is not None and +run_of:
                    mine = _Said(where, one, said, tuple(sorted((+run_of).items())))
                    runs.setdefault((whose, leaf.run), []).append(mine)
            if +sum_of:
                mine = _Said(where, one, one.epsilon, tuple(sorted((+sum_of).items())))
                lifetimes.setdefault(whose, []).append(mine)
    _lifetimes(list(lifetimes.values()), findings, of, history)
    for each in runs.values():
        for said_of in [each[place] for place in too_low([one.stated for one in each], TOLERANCE)]:
            _tell(said_of, " for its run", findings)
    _whole_clients(history, findings)


def _tell(said: _Said, whose: str, findings: Findings) -> None:
    least = epsilon_of(Counter(dict(said.steps)), said.row.delta)
    if sure(said.steps, said.row.delta):
        what = f"epsilon {said.epsilon:.4f} was published{whose}, {least:.4f} is right"
        findings.violation("published", said.where, what)
    else:
        what = f"epsilon {said.epsilon:.4f} was published{whose}; it is at most {least:.4f} by RDP, and too large to be worked out"
        findings.incomplete("published", said.where, what)


def _lifetimes(lifetimes: list[list[_Said]], findings: Findings, of: Mapping[str, Ledger], history: History) -> None:
    told, bad, mine = set[str](), set[str](), set[str]()
    own = {ledger.client: _Own(ledger, history) for ledger in of.values()}
    for each in lifetimes:
        low = set(too_low([one.stated for one in each], TOLERANCE))
        for place, said in enumerate(each):
            if place in low:
                _tell(said, "", findings)
                bad.add(said.row.name)
                continue
            told.add(said.row.name)
            ledger = of.get(said.row.client)
            if ledger is not None:
                mine.add(said.row.name)
                bad |= set() if own[ledger.client].check(said, findings) else {said.row.name}
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


class _Own:
    """A site's own ledger, as far as entries of this federation's runs go, walked up to one work after the other."""

    def __init__(self, ledger: Ledger, history: History) -> None:
        charged = [e for e in ledger.entries.values() if e.state != "void" and e.run in history.runs]
        self._entries, self._at = charged, 0
        self._last = {e.plan: place for place, e in enumerate(charged)}
        self._sure, self._all = dict[int, Counter[Step]](), dict[int, Counter[Step]]()

    def check(self, said: _Said, findings: Findings) -> bool:
        """Whether what was published after a work is not below the ledger's entries up to it."""
        plan, told, epsilon, where = said.row.plan, Counter(dict(said.steps)), said.epsilon, said.where
        while self._at <= self._last.get(plan, -1):
            entry = self._entries[self._at]
            for block in entry.blocks:
                self._all.setdefault(block, Counter()).update(entry.steps)
                if entry.state == "spent":
                    self._sure.setdefault(block, Counter()).update(entry.steps)
            self._at += 1
        for kinds, lost in ((self._sure, False), (self._all, True)):
            # What the log tells as well, or more of it, was looked at above.
            worst = max(
                (epsilon_of(steps, said.row.delta) for steps in kinds.values() if not steps <= told), default=0.0
            )
            if epsilon >= worst - TOLERANCE:
                continue
            if not lost:
                what = f"epsilon {epsilon:.4f} was published, the site's own ledger comes to {worst:.4f}"
                findings.violation("published", where, what)
            else:
                what = (
                    f"with charges that no update came of the site's own ledger comes to {worst:.4f}, not {epsilon:.4f}"
                )
                findings.incomplete("published", where, f"{what}: its own figure is the right one")
            return False
        return True


def _whole_clients(history: History, findings: Findings) -> None:
    sums, committed = Counter[Step](), {(c.run, c.number): c for c in history.commits}
    for index, record in enumerate(history.records):
        if record.get("kind") != "spend":
            continue
        where = f"leaf {index}"
        try:
            sums[number(record, "noise_multiplier", 0.05, 1e6), 1.0] += 1
            mine = epsilon_of(sums, number(record, "delta", 1e-10, 0.5))
            said = number(record, "epsilon", 0, 1e6)
            if said < mine - TOLERANCE:
                findings.violation("published", where, f"client level: {said:.4f} was published, {mine:.4f} is right")
            sigma, clip = number(record, "noise_multiplier", 0.05, 1e6), number(record, "clipping_norm", 0, 1e9)
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
