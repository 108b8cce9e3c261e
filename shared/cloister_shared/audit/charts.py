"""The audit's two charts as SVG: budgets over rounds against their caps, and accuracy against epsilon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from cloister_shared.audit.budget import Block
from cloister_shared.audit.federation import History
from cloister_shared.audit.findings import listed

_COLOURS = ("#2f6690", "#b5651d", "#2b7a4b", "#7a2b6d", "#8a6d00", "#444")
_WIDE, _LEFT, _TOP = 640, 50, 30


def _ticks(most: float, least: float) -> list[float]:
    """Round values from 0 up to ``most``: about five of them, at 1, 2 or 5 times a power of ten, none less than ``least`` apart."""
    power = 10.0 ** math.floor(math.log10(most / 5))
    step = next(power * times for times in (1, 2, 5, 10) if most / (power * times) <= 6)
    step = max(step, least)
    return [step * n for n in range(int(most / step + 1e-9) + 1)]


def _frame(tall: int, across: tuple[float, str, float], up: tuple[float, str], inside: str, height: int) -> str:
    """An SVG with two axes around ``inside``: of each how far it goes and what it is; across also the least step."""
    line = '<line x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}" stroke="{}"/>'
    foot, out = _TOP + tall, list[str]()
    for value in _ticks(across[0], across[2]):
        x = _LEFT + value / across[0] * _WIDE
        out.append(line.format(x, x, foot, foot + 4, "#222"))
        out.append(f'<text x="{x:.1f}" y="{foot + 17}" text-anchor="middle">{value:.3g}</text>')
    for value in _ticks(up[0], 0.0):
        y = foot - value / up[0] * tall
        out.append(line.format(_LEFT, _LEFT + _WIDE, y, y, "#ddd"))
        out.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    out.append(line.format(_LEFT, _LEFT, _TOP, foot, "#222") + line.format(_LEFT, _LEFT + _WIDE, foot, foot, "#222"))
    return (
        f'<svg viewBox="0 0 {_LEFT + _WIDE + 30} {height}" font-family="sans-serif" font-size="12" role="img">'
        f'{"".join(out)}<text x="{_LEFT + _WIDE}" y="{foot + 34}" text-anchor="end">{across[1]}</text>'
        f'<text x="6" y="14">{up[1]}</text>{inside}</svg>'
    )


def budgets(blocks: Sequence[Block]) -> str:
    """Budget over rounds, a line for each history, against its cap; empty where nothing was charged."""
    ways = dict[tuple[tuple[tuple[int, float], ...], float], list[str]]()
    for b in blocks:
        xy = tuple((n, p.pld) for n, p in enumerate(b.points, 1) if p.pld is not None)
        if xy:
            ways.setdefault((xy, b.cap), []).append(f"{b.site} block {b.block}")
    if not ways:
        return ""
    tall = 220
    most = max(max(cap, *(y for _, y in xy)) for xy, cap in ways) or 1.0
    count = max(xy[-1][0] for xy, _ in ways)
    lines = []
    for i, ((xy, cap), names) in enumerate(ways.items()):
        places = ((_LEFT + x * _WIDE / count, tall + _TOP - y / most * tall) for x, y in ((0, 0.0), *xy))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        level, colour = tall + _TOP - cap / most * tall, _COLOURS[i % len(_COLOURS)]
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        dashed = f'stroke="{colour}" stroke-dasharray="4 4"'
        lines.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDE}" y1="{level:.1f}" y2="{level:.1f}" {dashed}/>')
        place = f'x="{_LEFT + 8}" y="{tall + 84 + 18 * i}"'
        lines.append(f'<text {place} fill="{colour}">{escape(listed(names))}</text>')
    return "<h2>Budget over time</h2>" + _frame(
        tall,
        (count, "charges", 1.0),
        (most, "epsilon by PLD; dashed: the cap"),
        "".join(lines),
        tall + 86 + 18 * len(ways),
    )


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
    across = (most, "epsilon by then, as published, the most of any site", 0.0)
    return "<h2>Accuracy against epsilon</h2>" + _frame(tall, across, (1.0, "accuracy"), marks, tall + 76)
