"""Tables of the audit's report: what rounds realised, caps and who set them, which code, who was enrolled.

They only tell, in the log's order; what may not be so is found elsewhere. A page shows the first rows of a long table, JSON all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloister_shared.audit.federation import Aborted, History, RoundCommit
from cloister_shared.audit.findings import listed
from cloister_shared.audit.reading import printable, when
from cloister_shared.audit.sites import Ledger
from cloister_shared.audit.spends import unsure


@dataclass(frozen=True)
class Table:
    """Columns and rows, all of them text.

    Attributes:
        columns: What stands in each column.
        rows: A row each; as many cells as there are columns.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(tuple(map(printable, row)) for row in self.rows))


def spans(numbers: Iterable[int]) -> str:
    """Integers as spans: 0 to 3, 7."""
    out = list[list[int]]()
    for n in sorted(set(numbers)):
        if out and n == out[-1][1] + 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in out)


def rounds_table(history: History, ledgers: Mapping[str, Ledger]) -> Table:
    """Each round, those that were broken off too: who is in it, who was charged and is not, with which noise.

    Args:
        history: The federation's log.
        ledgers: Sites' own, by client id.
    """
    columns = ("round", "leaf", "in it", "charged, and not in it", "noise multiplier", "sample rate", "steps",
               "epsilon published, the most", "accuracy")  # fmt: skip
    return Table(columns, tuple(_round(one, ledgers) for one in history.told))


def _round(leaf: RoundCommit | Aborted, ledgers: Mapping[str, Ledger]) -> tuple[str, ...]:
    asked, commit = [one for one in leaf.asked if one.took_part], leaf if isinstance(leaf, RoundCommit) else None
    new = sorted(one.name for one in asked if commit is not None and one.verdict == "accepted")
    told = {one.name for one in asked if one.name not in new} | set(unsure(ledgers, leaf))
    return (
        f"{leaf.number} of run {leaf.run[:8]}" + (", broken off" if commit is None else ""),
        str(leaf.index),
        listed(new) or "nobody",
        listed(sorted(told)),
        _range(one.noise_multiplier for one in asked),
        _range(one.sample_rate for one in asked),
        _range(one.steps for one in asked),
        f"{max((one.epsilon for one in asked), default=0.0):.4f}",
        f"{commit.metrics['accuracy']:.3f}" if commit is not None and "accuracy" in commit.metrics else "",
    )


def _range(values: Iterable[float]) -> str:
    known = sorted(set(values))
    if not known:
        return ""
    low, high = f"{known[0]:.4g}", f"{known[-1]:.4g}"
    return low if low == high else f"{low} to {high}"


def caps_table(ledgers: Sequence[Ledger]) -> Table:
    """Every cap that reservations of a site were made under, in order: its own agent sets it, nobody else can."""
    rows = ((one.name, f"{cap:g}", f"{delta:g}", when(at)) for one in ledgers for at, cap, delta in one.caps)
    return Table(("site, which set it itself", "epsilon, for life", "at delta", "since a reservation at"), tuple(rows))


def code_table(history: History) -> Table:
    """What runs began with and rounds were made with; round 0 is what a run began with."""
    of, committed = dict[tuple[str, ...], list[int]](), {c.index: c for c in history.commits}
    for index, record in enumerate(history.records):
        commit = committed.get(index)
        if commit is None and record.get("kind") != "policy":
            continue
        made = (
            str(record.get("run"))[:8],
            str(record.get("code")),
            str(record.get("lock") or "not said")[:16],
            str(record.get("base"))[:16],
            str(record.get("settings") or record.get("config"))[:16],
        )
        of.setdefault(made, []).append(0 if commit is None else commit.number)
    rows = tuple((spans(numbers), *made) for made, numbers in of.items())
    return Table(("rounds", "run", "code", "lock file", "base model", "settings"), rows)


def enrolled_table(history: History) -> Table:
    """Who was enrolled when each round was committed; rounds after another with the same sites are one row."""
    here, out = dict[str, Any](), list[tuple[str, list[int], str]]()
    committed = {c.index: c for c in history.commits}
    for index, record in enumerate(history.records):
        if record.get("kind") == "enrol":
            here[str(record.get("site"))[:40]] = None
        elif record.get("kind") == "revoke":
            here.pop(str(record.get("site"))[:40], None)
        elif (commit := committed.get(index)) is not None:
            names = ", ".join(sorted(here)) or "nobody"
            if out and (out[-1][0], out[-1][2]) == (commit.run, names):
                out[-1][1].append(commit.number)
            else:
                out.append((commit.run, [commit.number], names))
    return Table(("rounds", "run", "enrolled"), tuple((spans(ns), run[:8], names) for run, ns, names in out))
