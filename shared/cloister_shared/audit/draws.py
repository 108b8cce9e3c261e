"""Checks of secure sums' groups: each sum is of sites that one draw put into one group, and all committed and revealed for that draw.

A commit names its run's draw by digest; the draw itself is in the bundle, signed by each site that was in it. Which updates were inside a
sum nobody can tell from it: that is what it is for.
"""

from __future__ import annotations

from cloister_shared.audit.bundle import Bundle
from cloister_shared.audit.federation import History
from cloister_shared.audit.findings import Findings, many
from cloister_shared.audit.reading import MALFORMED
from cloister_shared.draw import Transcript
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import CloisterError

_DIFFER = "two of its sums are of one group: their difference is somebody's own update"


def check_draws(bundle: Bundle, history: History, findings: Findings) -> dict[tuple[int, str], str]:
    """Holds every sum of every commit against its run's draw; returns the digest of its drawn group, by commit's leaf and client.

    Args:
        bundle: The bundle.
        history: The federation's log.
        findings: Where what is found goes.
    """
    drawn = dict[tuple[int, str], str]()
    groups, of_run, good = dict[tuple[str, str], tuple[frozenset[str], ...]](), dict[str, str](), 0
    for commit in history.commits:
        if not commit.sums:
            continue
        where = f"round {commit.number} of run {commit.run[:8]}"
        if len(frozenset().union(*commit.sums)) < sum(map(len, commit.sums)):
            findings.violation("sums", where, _DIFFER)
        if of_run.setdefault(commit.run, commit.draw) != commit.draw:
            findings.violation("draw", where, "its groups are of another draw than its run began with")
            continue
        if commit.draw not in bundle.draws:
            findings.incomplete(
                "no-draw", where, "the draw of its groups is not here: ask the coordinator for its export"
            )
            continue
        key = commit.run, commit.draw
        if key not in groups:
            try:
                groups[key] = _groups(bundle, commit.run, commit.draw)
            except (CloisterError, *MALFORMED) as error:
                findings.violation("draw", where, f"the draw of its groups does not hold: {error}"[:300])
                groups[key] = ()
        drawn |= {
            (commit.index, client): name
            for group in groups[key]
            for name in [digest(canonical(sorted(group)))]
            for one in commit.sums
            if one <= group
            for client in one
        }
        inside = [any(one <= group for group in groups[key]) for one in commit.sums]
        parts = [sum(bool(one & group) for one in commit.sums) for group in groups[key]]
        if max(parts, default=0) > 1:
            findings.violation("sums", where, _DIFFER)
        if groups[key] and not all(inside):
            findings.violation("draw", where, "a sum is of sites that were not drawn into one group")
        good += sum(inside)
    if good:
        findings.held.append(
            f"{many(good, 'secure sum is', 'secure sums are each')} of sites that one draw of all members put together"
        )

    return drawn


def _groups(bundle: Bundle, run: str, named: str) -> tuple[frozenset[str], ...]:
    draw = Transcript.from_dict(bundle.draws[named])
    if (draw.digest, draw.run) != (named, run):
        raise ValueError("it is another one than the commit names")
    return tuple(map(frozenset, draw.groups()))
