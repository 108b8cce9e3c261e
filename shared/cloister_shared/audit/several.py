"""Several logs of one site: whether they are of the same text nobody can see, so that its caps are held against all of them together.

At each entry, in the order of the site's clock, the block of each log that cost most by then counts (by RDP); their sum is held against
that entry's cap. What is above it makes an audit incomplete and accuses nobody.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from cloister_shared.audit.accountant import Step, Steps, by_both, by_rdp, sure
from cloister_shared.audit.budget import MOST_KINDS, MOST_ON_THE_WAY, TOLERANCE
from cloister_shared.audit.findings import Findings
from cloister_shared.audit.sites import Entry, Ledger
from cloister_shared.audit.stated import Stated, too_low

# What a site with several logs is told by.
SEVERAL = "logs, of one text or of several"


def check_several(ledgers: Mapping[str, Ledger], findings: Findings) -> None:
    """Holds the caps of each site that has several logs with charges against all of them.

    Args:
        ledgers: Sites' own logs, by client id.
        findings: Where what is found goes.
    """
    logs = defaultdict[str, list[Ledger]](list)
    for ledger in ledgers.values():
        if any(entry.state != "void" and entry.blocks for entry in ledger.entries.values()):
            logs[ledger.name].append(ledger)
    for name, mine in logs.items():
        if len(mine) < 2:
            continue
        each = [_histories(ledger) for ledger in mine]
        kinds = {step for of in each for entries in of for entry in entries for step in entry.steps}
        if len(kinds) > MOST_KINDS or len(kinds) * sum(len(entries) for of in each for entries in of) > MOST_ON_THE_WAY:
            what = f"it has several logs, with releases of more than {MOST_KINDS} kinds, or too many entries: not worked out together"
            findings.incomplete("cap", f"site {name}", what)
            continue
        caps = _together(each)
        together = f"together they come to epsilon {_figure(caps[-1].steps, caps[-1].delta)}"
        findings.held.append(f"{name} has charges in {len(mine)} {SEVERAL}: {together}")
        if low := too_low(caps, TOLERANCE):
            over = caps[low[-1]]
            what = (
                "it has several logs: each is within its cap; if they are of the same text, epsilon was"
                f" {_figure(over.steps, over.delta)} of a cap of {over.epsilon:g}"
            )
            findings.incomplete("cap", f"site {name}", what)


def _histories(ledger: Ledger) -> list[list[Entry]]:
    """What each block was charged, in order; blocks that always were in the same rounds are one history."""
    of = defaultdict[int, list[Entry]](list)
    for entry in ledger.entries.values():
        for block in entry.blocks if entry.state != "void" else ():
            of[block].append(entry)
    return list({tuple(entry.number for entry in entries): entries for entries in of.values()}.values())


def _together(logs: list[list[list[Entry]]]) -> list[Stated]:
    """The cap of each entry from when a second log was charged, and what all logs had come to with it."""
    inside = defaultdict[tuple[int, int], list[int]](list)
    for log, histories in enumerate(logs):
        for place, history in enumerate(histories):
            for entry in history:
                inside[log, entry.number].append(place)
    entries = {(log, entry.number): entry for log, of in enumerate(logs) for one in of for entry in one}
    steps, cost = defaultdict[tuple[int, int], Counter[Step]](Counter), dict[tuple[int, int], float]()
    heaviest, out = dict[int, int](), list[Stated]()
    for (log, number), entry in sorted(entries.items(), key=lambda one: one[1].at):
        for place in inside[log, number]:
            steps[log, place] += entry.steps
            cost[log, place] = by_rdp(tuple(sorted(steps[log, place].items())), entry.terms[3])
            if cost[log, place] >= cost.get((log, heaviest.get(log, place)), 0.0):
                heaviest[log] = place
        if len(heaviest) > 1:
            whole = sum((steps[one] for one in heaviest.items()), Counter[Step]())
            out.append(Stated(entry.cap, tuple(sorted(whole.items())), entry.terms[3]))
    return out


def _figure(steps: Steps, delta: float) -> str:
    own = by_both(steps, delta)[0]
    return f"{own:.4f}" if sure(steps, delta) else f"at most {own:.4f} by RDP"
