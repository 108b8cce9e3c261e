"""What clients were charged and were told of it, worked out from the federation's leaves alone: rows can be changed, leaves cannot.

A leaf of a round that was broken off and one of its commit tell of the same attempts, the later one of at least as many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloister_shared.audit.accountant import Step
from cloister_shared.audit.budget import TOLERANCE
from cloister_shared.audit.stated import Stated, too_low
from cloister_shared.encoding import digest, parse_record
from cloister_shared.specs import NoisedNumber

from cloister_server.log import ABORTED_CLIENT

# What stays the same in every attempt at a work.
_SAME = ("name", "plan", "noise_multiplier", "sample_rate", "steps", "delta")
_TOLD = {*ABORTED_CLIENT}


@dataclass(frozen=True)
class BrokenOff:
    """What leaves of a round that was broken off tell of it.

    Attributes:
        leaf: The newest of them.
        attempt: The attempt that it is of.
        clients: What they say of each client, by id, the newest leaf's word.
    """

    leaf: int
    attempt: int
    clients: dict[str, dict[str, Any]]

    def unlike(self, attempt: int, rows: Mapping[str, Any]) -> str:
        """What rows say otherwise, or nothing; a new attempt keeps the work and what was charged before it.

        Args:
            attempt: By the round's row.
            rows: Rows of the round's clients, by id.
        """
        if attempt < self.attempt:
            return f"it is at attempt {attempt}, leaf {self.leaf} is of attempt {self.attempt}"
        for client, told in self.clients.items():
            row, name = rows.get(client), str(told["name"])
            if row is None:
                return f"the row of {name} is missing: leaf {self.leaf} tells of it"
            if row.charged < told["charged"]:
                return f"{name} was charged {told['charged']} times by leaf {self.leaf}, {row.charged} by its row"
            if others := [n for n in _SAME if told[n] != getattr(row, n)]:
                return f"leaf {self.leaf} says something else of the {', '.join(others)} of {name}"
        return ""


def broken_off(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], BrokenOff]:
    """Rounds that were broken off at some time, whatever became of them later, by run and number.

    Args:
        records: Leaves in the log's order.
    """
    found = dict[tuple[str, int], BrokenOff]()
    for record in records:
        if record.get("kind") == "incident" and (asked := _asked(record)):
            key = str(record["run"]), int(record["round"])
            before = found[key].clients if key in found else {}
            clients = before | {str(one["client"]): dict(one) for one in asked}
            found[key] = BrokenOff(int(record["index"]), int(record.get("attempt", 1)), clients)
    return found


@dataclass(frozen=True)
class Figure:
    """What a commit states of one client's lifetime.

    Attributes:
        run: The run.
        number: The round.
        client: Its id.
        name: Its name.
        part: Whether it may have been charged for this round.
        stated: The figure and what it is of, by all leaves up to the commit.
    """

    run: str
    number: int
    client: str
    name: str
    part: bool
    stated: Stated


def figures(records: Sequence[Mapping[str, Any]], cores: Mapping[str, str]) -> dict[str, list[Figure]]:
    """What commits state of clients' lifetimes, in order, by name: a site that joined again has another key and the same text.

    Args:
        records: Leaves in the log's order.
        cores: Works as rows have them, by digest; one that is not of its digest says nothing.
    """
    whole, times = dict[str, Counter[Step]](), Counter[tuple[str, str, int]]()
    out = dict[str, list[Figure]]()
    for record in records:
        commit = record.get("kind") == "round_commit"
        for one in _asked(record) if commit or record.get("kind") == "incident" else ():
            key, name = (one["client"], record["run"], record["round"]), str(one["name"])
            # An attempt that was charged counts, whatever came of it.
            newest = max(times[key], int(one["charged"]), int(one["verdict"] == "accepted"))
            sum_of = whole.setdefault(name, Counter())
            for step, count in _steps(one, cores):
                sum_of[step] += count * (newest - times[key])
            times[key] = newest
            if commit and +sum_of:
                stated = Stated(float(one["epsilon"]), tuple(sorted((+sum_of).items())), float(one["delta"]))
                out.setdefault(name, []).append(Figure(key[1], key[2], key[0], name, newest > 0, stated))
    return out


def _asked(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a leaf says of each client; those of older versions name clients of a broken-off round and say nothing of them."""
    return [one for one in record.get("clients") or () if isinstance(one, Mapping) and set(one) >= _TOLD]


def _steps(one: Mapping[str, Any], cores: Mapping[str, str]) -> Iterator[tuple[Step, int]]:
    yield (float(one["noise_multiplier"]), float(one["sample_rate"])), int(one["steps"])
    core = cores.get(one["plan"], "").encode()
    if digest(core) == one["plan"]:
        for said in parse_record(core, "work").get("noised", []):
            event = NoisedNumber(**said).event
            yield (event.noise_multiplier, event.sample_rate), event.steps


def understated(found: Sequence[Figure]) -> list[Figure]:
    """Those of one site's figures, in order, that are less than what leaves say was charged by then."""
    return [found[place] for place in too_low([one.stated for one in found], TOLERANCE)]
