"""The audit's two charts as SVG: budgets over time against their caps, and accuracy against epsilon."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from html import escape
from itertools import accumulate, pairwise

from cloister_shared.audit.budget import Block
from cloister_shared.audit.federation import History
from cloister_shared.audit.findings import listed, many

_COLOURS = ("#2f6690", "#b5651d", "#2b7a4b", "#7a2b6d", "#8a6d00", "#444")
_WIDE, _LEFT, _TOP = 640, 50, 30
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
# Seconds between two marks of a time axis.
_STEPS = (
    *(1, 5, 15, 30),
    *(n * _MINUTE for n in (1, 5, 15, 30)),
    *(n * _HOUR for n in (1, 3, 6, 12)),
    *(n * _DAY for n in (1, 2, 7, 30, 90, 365)),
)
# Histories that are nowhere further apart than this part of the axis are one line.
_TOGETHER = 0.01
# Lines of one chart, and times that a date can be made of.
_LINES, _FAR = 30, 1e11

# Of an axis: how far along (0 to 1), and the words there.
Tick = tuple[float, str]
# A history: when, and epsilon from then on.
Way = tuple[tuple[float, float], ...]


def _ticks(most: float) -> list[Tick]:
    """Round values from 0 up to ``most``: about five of them, at 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(most / 5))
    step = next(power * times for times in (1, 2, 5, 10) if most / (power * times) <= 6)
    return [(step * n / most, f"{step * n:.3g}") for n in range(int(most / step + 1e-9) + 1)]


def _times(first: float, last: float) -> list[Tick]:
    """Round times (UTC) from ``first`` to ``last``, seconds since 1970: at most six of them, and ``first`` where there is none."""
    span = last - first
    step = next((step for step in _STEPS if span / step <= 5), math.ceil(span / 5 / _STEPS[-1]) * _STEPS[-1])
    form = "%H:%M:%S" if step < _MINUTE else "%m-%d %H:%M" if step < _DAY else "%Y-%m-%d"
    whole: list[float] = [at for n in range(6) if (at := (math.ceil(first / step) + n) * step) <= last] or [first]
    return [((at - first) / span, time.strftime(form, time.gmtime(at))) for at in whole]


def _frame(
    tall: int, across: tuple[str, Sequence[Tick]], up: tuple[str, Sequence[Tick]], inside: str, height: int
) -> str:
    """An SVG with two axes around ``inside``: of each what it is, and its marks."""
    line = '<line x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}" stroke="{}"/>'
    foot, out = _TOP + tall, list[str]()
    for part, words in across[1]:
        x = _LEFT + part * _WIDE
        out.append(line.format(x, x, foot, foot + 4, "#222"))
        out.append(f'<text x="{x:.1f}" y="{foot + 17}" text-anchor="middle">{words}</text>')
    for part, words in up[1]:
        y = foot - part * tall
        out.append(line.format(_LEFT, _LEFT + _WIDE, y, y, "#ddd"))
        out.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{words}</text>')
    out.append(line.format(_LEFT, _LEFT, _TOP, foot, "#222") + line.format(_LEFT, _LEFT + _WIDE, foot, foot, "#222"))
    return (
        f'<svg viewBox="0 0 {_LEFT + _WIDE + 30} {height}" font-family="sans-serif" font-size="12" role="img">'
        f'{"".join(out)}<text x="{_LEFT + _WIDE}" y="{foot + 34}" text-anchor="end">{across[0]}</text>'
        f'<text x="6" y="14">{up[0]}</text>{inside}</svg>'
    )


def budgets(blocks: Sequence[Block]) -> str:
    """Budget over time, a line for each history, against its cap; empty where nothing was charged.

    Histories of the same steps at the same times (``_TOGETHER``) are one line. A site whose clock went back is drawn as if it had stood.
    """
    found = [(f"{b.site} block {b.block}", _way(b), b.cap) for b in blocks]
    told = [(name, way, cap) for name, way, cap in found if way]
    if not told:
        return ""
    tall, first = 220, min(way[0][0] for _, way, _ in told)
    most = max(max(cap, *(y for _, y in way)) for _, way, cap in told) or 1.0
    span = max(way[-1][0] for _, way, _ in told) - first or 1.0
    ways = sorted(_alike(told, span * _TOGETHER), key=lambda one: -one[0][-1][1])
    drawn = min(len(ways), _LINES)
    lines = []
    for i, (way, cap, names) in enumerate(ways[:_LINES]):
        begun, ended = (way[0][0], 0.0), (first + span, way[-1][1])
        places = ((_LEFT + (x - first) * _WIDE / span, tall + _TOP - y / most * tall) for x, y in (begun, *way, ended))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        level, colour = tall + _TOP - cap / most * tall, _COLOURS[i % len(_COLOURS)]
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        dashed = f'stroke="{colour}" stroke-dasharray="4 4"'
        lines.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDE}" y1="{level:.1f}" y2="{level:.1f}" {dashed}/>')
        place = f'x="{_LEFT + 8}" y="{tall + 84 + 18 * i}"'
        lines.append(f'<text {place} fill="{colour}">{escape(listed(names))}</text>')
    if len(ways) > drawn:
        less = many(len(ways) - drawn, "history", "histories")
        lines.append(
            f'<text x="{_LEFT + 8}" y="{tall + 84 + 18 * drawn}">and {less} that spent no more; tables have all</text>'
        )
    return "<h2>Budget over time</h2>" + _frame(
        tall,
        (
            f"UTC, by the sites' clocks, from {time.strftime('%Y-%m-%d %H:%M', time.gmtime(first))}",
            _times(first, first + span),
        ),
        ("epsilon by PLD; dashed: the cap", _ticks(most)),
        "".join(lines),
        tall + 86 + 18 * (drawn + 1),
    )


def _way(block: Block) -> Way:
    """A block's epsilon where PLD was worked out: in steps where that is at every charge, else straight from one to the next."""
    known = [(min(point.at, _FAR), point.pld) for point in block.points if point.pld is not None]
    way = list(zip(accumulate((at for at, _ in known), max), (y for _, y in known), strict=True))
    if len(known) < len(block.points):
        return tuple(way)
    return tuple(way[:1] + [place for (_, before), (at, y) in pairwise(way) for place in ((at, before), (at, y))])


def _alike(told: Sequence[tuple[str, Way, float]], near: float) -> list[tuple[Way, float, list[str]]]:
    """Each history once, with its cap and the names of all that have it."""
    of = dict[tuple[tuple[float, ...], float], list[tuple[Way, list[str]]]]()
    for name, way, cap in told:
        same = of.setdefault((tuple(y for _, y in way), cap), [])
        names = next(
            (names for one, names in same if all(abs(a - b) <= near for (a, _), (b, _) in zip(one, way, strict=True))),
            None,
        )
        if names is None:
            same.append((way, [name]))
        else:
            names.append(name)
    return [(way, cap, names) for (_, cap), same in of.items() for way, names in same]


def accuracies(history: History) -> str:
    """Accuracy of each round against the most epsilon that was published for a site by then; empty where no round was scored."""
    dots = []
    for commit in history.commits:
        score, spent = commit.metrics.get("accuracy"), [one.epsilon for one in commit.asked]
        if score is not None and spent:
            dots.append((max(spent), score, commit.number))
    if not dots:
        return ""
    tall = 180
    most = max(1e-6, *(x for x, _, _ in dots))
    places = [(_LEFT + x / most * _WIDE, tall + _TOP - min(max(y, 0.0), 1.0) * tall, n, y) for x, y, n in dots]
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#2f6690"/>' for x, y, _, _ in places)
    # Beyond a dozen the words would lie on each other; the table of rounds has them all.
    told = places if len(places) <= 12 else [places[0], places[-1]]
    marks += "".join(
        f'<text x="{x:.1f}" y="{y - 10 - 14 * (i % 2):.1f}" text-anchor="end">round {n}: {score:.3f}</text>'
        for i, (x, y, n, score) in enumerate(told)
    )
    across = "epsilon by then, as published, the most of any site", _ticks(most)
    return "<h2>Accuracy against epsilon</h2>" + _frame(tall, across, ("accuracy", _ticks(1.0)), marks, tall + 76)
