"""Checks of secure sums' groups: each sum is of sites that one draw put into one group, and all committed and revealed for that draw.

A commit names its run's draw by digest; the draw itself is in the bundle, signed by each site that was in it. Which updates were inside a
sum nobody can tell from it: that is what it is for.
"""

from __future__ import annotations

from collections import Counter

from cloister_shared.audit.alike import named_so
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
    whole = dict[str, bool]()
    groups, of_run, good = dict[tuple[str, str], tuple[frozenset[str], ...]](), dict[str, str](), 0
    read = _Draws(bundle)
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
            what = "the draw of its groups is not here: ask the coordinator for its export"
            findings.incomplete("no-draw", where, what)
            continue
        if commit.draw not in whole:
            whole[commit.draw] = named_so(commit.draw, bundle.draws[commit.draw])
        if not whole[commit.draw]:
            # Anybody can put something under its name.
            what = "what is here as the draw of its groups is another: ask the coordinator for its export"
            findings.incomplete("no-draw", where, what)
            continue
        key = commit.run, commit.draw
        if key not in groups:
            try:
                groups[key] = read.groups(commit.run, commit.draw)
            except (CloisterError, *MALFORMED) as error:
                findings.violation("draw", where, f"the draw of its groups does not hold: {error}"[:300])
                groups[key] = ()
        group_of = {client: place for place, group in enumerate(groups[key]) for client in group}
        touched = [{group_of.get(client, -1) for client in one} for one in commit.sums]
        inside = [len(places) == 1 and -1 not in places for places in touched]
        for one, places, good_one in zip(commit.sums, touched, inside, strict=True):
            if good_one:
                name = digest(canonical(sorted(groups[key][min(places)])))
                drawn |= {(commit.index, client): name for client in one}
        if max(Counter(place for places in touched for place in places - {-1}).values(), default=0) > 1:
            findings.violation("sums", where, _DIFFER)
        if groups[key] and not all(inside):
            findings.violation("draw", where, "a sum is of sites that were not drawn into one group")
        good += sum(inside)
    if good:
        findings.held.append(
            f"{many(good, 'secure sum is', 'secure sums are each')} of sites that one draw of all members put together"
        )

    return drawn


class _Draws:
    """A bundle's draws, each read once: any number of runs may name one."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._read = bundle, dict[str, Transcript]()

    def groups(self, run: str, named: str) -> tuple[frozenset[str], ...]:
        """The groups of a run's draw."""
        if named not in self._read:
            self._read[named] = Transcript.from_dict(self._bundle.draws[named])
        draw = self._read[named]
        if draw.run != run or draw.digest != named:
            raise ValueError("it is another one than the commit names")
        return tuple(map(frozenset, draw.groups()))
