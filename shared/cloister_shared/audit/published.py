"""Every epsilon that the coordinator published, held against its own log and against the sites' own ledgers: nowhere less than either.

Of a client: everything that its commits and aborted rounds say was charged, attempts included; and every entry of its own ledger that is of
a run of this log, block by block, noised numbers included. Of whole clients: every sum that noise was drawn for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from cloister_shared.audit.accountant import Step, covers, epsilon_of, sure
from cloister_shared.audit.budget import TOLERANCE
from cloister_shared.audit.federation import Aborted, Asked, History
from cloister_shared.audit.findings import Findings, many
from cloister_shared.audit.reading import MALFORMED, number
from cloister_shared.audit.sites import Ledger


def check_published(history: History, findings: Findings, of: Mapping[str, Ledger]) -> None:
    """Walks commits and aborted rounds in the log's order.

    Args:
        history: The federation's log.
        findings: Where what is found goes.
        of: Sites' own ledgers, by each key that their site had.
    """
    whole, told, bad, mine = dict[tuple[str, str], Counter[Step]](), set[str](), set[str](), set[str]()
    # Charged, though the round came to nothing; a commit of the same round counts these attempts again.
    lost, most = dict[tuple[str, str, int], Counter[Step]](), dict[tuple[str, str, int], int]()
    own = {ledger.client: _Own(ledger, history) for ledger in of.values()}
    for leaf in history.told:
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
                _stated(leaf.privacy.get(one.client), one, +run_of, findings, where)
            so_far = +sum_of
            steps = tuple(sorted(so_far.items()))
            if not steps:
                continue
            if not covers(one.epsilon + TOLERANCE, steps, one.delta):
                least = epsilon_of(so_far, one.delta)
                if sure(steps, one.delta):
                    findings.violation(
                        "published", where, f"epsilon {one.epsilon:.4f} was published, {least:.4f} is right"
                    )
                else:
                    what = f"epsilon {one.epsilon:.4f} was published; it is at most {least:.4f} by RDP, and too large to be worked out"
                    findings.incomplete("published", where, what)
                bad.add(one.name)
                continue
            told.add(one.name)
            if ledger is not None:
                mine.add(one.name)
                good = own[ledger.client].check(one.plan, so_far, one.epsilon, one.delta, findings, where)
                bad |= set() if good else {one.name}
    for names, against in (
        (told & mine - bad, " and of their own ledgers"),
        (told - mine - bad, ", by the coordinator's own commits alone"),
    ):
        if names:
            what = f"the epsilon published for {many(len(names), 'site')} is not below what dp-accounting makes of their rounds"
            findings.held.append(what + against)
    _whole_clients(history, findings)


def _stated(
    said: tuple[float, float, float] | None, one: Asked, of_run: Counter[Step], findings: Findings, where: str
) -> None:
    """What a commit states of its cost beside the clients' rows: the same for the lifetime, and not below what its run came to."""
    if said is None:
        findings.violation("published", where, "the commit states what it cost others, and not what it cost this site")
        return
    run, lifetime, delta = said
    if (lifetime, delta) != (one.epsilon, one.delta):
        what = f"two epsilons are stated for its lifetime: {one.epsilon:.4f} at {one.delta:g} and {lifetime:.4f} at {delta:g}"
        findings.violation("published", where, what)
    steps = tuple(sorted(of_run.items()))
    if steps and sure(steps, delta) and not covers(run + TOLERANCE, steps, delta):
        what = f"epsilon {run:.4f} was published for its run, {epsilon_of(of_run, delta):.4f} is right"
        findings.violation("published", where, what)


class _Own:
    """A site's own ledger, as far as entries of this federation's runs go, walked up to one work after the other."""

    def __init__(self, ledger: Ledger, history: History) -> None:
        charged = [e for e in ledger.entries.values() if e.state != "void" and e.run in history.runs]
        self._entries, self._at = charged, 0
        self._last = {e.plan: place for place, e in enumerate(charged)}
        self._sure, self._all = dict[int, Counter[Step]](), dict[int, Counter[Step]]()

    def check(
        self, plan: str, told: Counter[Step], epsilon: float, delta: float, findings: Findings, where: str
    ) -> bool:
        """Whether what was published after a work is not below the ledger's entries up to it."""
        while self._at <= self._last.get(plan, -1):
            entry = self._entries[self._at]
            for block in entry.blocks:
                self._all.setdefault(block, Counter()).update(entry.steps)
                if entry.state == "spent":
                    self._sure.setdefault(block, Counter()).update(entry.steps)
            self._at += 1
        for kinds, lost in ((self._sure, False), (self._all, True)):
            # What the log tells as well, or more of it, was looked at above.
            worst = max((epsilon_of(steps, delta) for steps in kinds.values() if not steps <= told), default=0.0)
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
    sums, committed = Counter[Step](), dict[tuple[object, object], int]()
    for commit in history.commits:
        committed[commit.run, commit.number] = commit.index
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
            if index > committed.get((record.get("run"), record.get("number")), len(history.records)):
                findings.violation("order", where, "noise was charged after its round was committed")
        except MALFORMED as error:
            findings.violation("leaf", where, f"malformed: {error}"[:300])
