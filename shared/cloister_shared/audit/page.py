"""The audit's report as one HTML page that prints, and as rows for CSV.

The page has no script and loads nothing; what a bundle says is escaped.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from html import escape

from cloister_shared.audit.budget import Block
from cloister_shared.audit.federation import History
from cloister_shared.audit.findings import Findings
from cloister_shared.audit.reading import printable
from cloister_shared.audit.report import VERDICTS, Answer, merged

_COLOURS = ("#2f6690", "#b5651d", "#2b7a4b", "#7a2b6d", "#8a6d00", "#444")
_WORDS = (
    "A leaf is one signed entry of a log; a head is a log's length and fingerprint, signed; a commit is the leaf of a finished round;"
    " a block is text that was registered together and has one budget; a site that cosigned a head saw all leaves up to it."
)
_COLUMNS = (
    "verdict", "site", "block", "entry", "reserved_at", "epsilon_pld", "epsilon_rdp", "delta", "cap", "epsilon_pld_final",
)  # fmt: skip


def as_csv(findings: Findings, blocks: Sequence[Block]) -> str:
    """Budgets over time, a row for each charged entry, the verdict in each; PLD where it was worked out, RDP at every one."""
    out, verdict = io.StringIO(), VERDICTS[findings.exit_code]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for b in blocks:
        for p in b.points:
            sure = "" if p.pld is None else f"{p.pld:.6f}"
            row = (p.entry, f"{p.at:.0f}", sure, f"{p.rdp:.6f}", b.delta, b.cap, f"{b.epsilon:.6f}")
            writer.writerow((verdict, b.site, b.block, *row))
    if not any(b.points for b in blocks):
        writer.writerow((verdict, *[""] * (len(_COLUMNS) - 1)))
    return out.getvalue()


def as_html(
    said: Sequence[Answer],
    findings: Findings,
    blocks: Sequence[Block],
    history: History,
    title: str,
    about: Mapping[str, str],
) -> str:
    """The page."""
    verdict = VERDICTS[findings.exit_code]
    colour = {0: "#2b7a4b", 1: "#b3261e", 2: "#8a6d00", 3: "#b3261e"}[findings.exit_code]
    rows = "".join(
        f"<tr><td>{escape(f.kind)}</td><td>{escape(f.code)}</td><td>{escape(f.where)}</td><td>{escape(f.what)}</td></tr>"
        for f in findings.found
    )
    table = (
        f"<table><tr><th>kind</th><th>code</th><th>where</th><th>what</th></tr>{rows}</table>"
        if rows
        else "<p>No finding: nothing that was checked fails, and nothing that is needed is missing.</p>"
    )
    parts = "".join(
        f"<section><h2>{i}. {escape(one.question)}</h2>{''.join(f'<p>{escape(line)}</p>' for line in one.lines)}</section>"
        for i, one in enumerate(said, 1)
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>{escape(title)}</title><style>body{{font:15px/1.45 sans-serif;max-width:52em;margin:2em auto;padding:0 1em;color:#222}}"
        "h1{font-size:1.5em}h2{font-size:1.05em;margin:1.4em 0 .3em}p{margin:.25em 0;overflow-wrap:anywhere}"
        "table{border-collapse:collapse;width:100%;font-size:13px}td,th{border:1px solid #ccc;padding:.3em .5em;text-align:left;"
        "overflow-wrap:anywhere;vertical-align:top}td:nth-child(-n+2){white-space:nowrap}td:nth-child(3){min-width:11em}.verdict{font-size:1.3em;font-weight:bold}svg{max-width:100%;height:auto}"
        "@media print{body{margin:0;max-width:none;font-size:11pt}section{break-inside:avoid}}</style>"
        f"<h1>{escape(title)}</h1><p class=verdict style='color:{colour}'>{verdict}</p>"
        f"{''.join(f'<p>{escape(name)}: {escape(printable(text))}</p>' for name, text in about.items())}"
        f"<p>{escape(_WORDS)}</p><h2>Findings</h2>{table}"
        f"<h2>What was checked and held</h2>{''.join(f'<p>{escape(line)}</p>' for line in findings.held) or '<p>Nothing.</p>'}"
        f"{_plot(blocks)}{_accuracy(history)}{parts}</html>\n"
    )


def _frame(wide: int, tall: int, left: int, most: str, right: str, top: str, inside: str, height: int) -> str:
    """An SVG with two axes around ``inside``."""
    line = '<line x1="{}" x2="{}" y1="{}" y2="{}" stroke="#222"/>'
    return (
        f'<svg viewBox="0 0 {left + wide + 20} {height}" font-family="sans-serif" font-size="12" role="img">'
        + line.format(left, left, 30, tall + 30)
        + line.format(left, left + wide, tall + 30, tall + 30)
        + f'<text x="{left - 6}" y="34" text-anchor="end">{most}</text>'
        + f'<text x="{left - 6}" y="{tall + 34}" text-anchor="end">0</text>'
        + f'<text x="{left + wide}" y="{tall + 48}" text-anchor="end">{right}</text>'
        + f'<text x="6" y="14">{top}</text>{inside}</svg>'
    )


def _plot(blocks: Sequence[Block]) -> str:
    """Budget over entries, a line for each history, against its cap."""
    ways = dict[tuple[tuple[tuple[int, float], ...], float], list[str]]()
    for b in blocks:
        xy = tuple((n, p.pld) for n, p in enumerate(b.points, 1) if p.pld is not None)
        if xy:
            ways.setdefault((xy, b.cap), []).append(f"{b.site} block {b.block}")
    if not ways:
        return ""
    wide, tall, left = 640, 220, 50
    most = max(max(cap, *(y for _, y in xy)) for xy, cap in ways) or 1.0
    count = max(xy[-1][0] for xy, _ in ways)
    lines = []
    for i, ((xy, cap), names) in enumerate(ways.items()):
        path = " ".join(f"{left + x * wide / count:.1f},{tall + 30 - y / most * tall:.1f}" for x, y in ((0, 0.0), *xy))
        level, colour = tall + 30 - cap / most * tall, _COLOURS[i % len(_COLOURS)]
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        dashed = f'stroke="{colour}" stroke-dasharray="4 4"'
        lines.append(f'<line x1="{left}" x2="{left + wide}" y1="{level:.1f}" y2="{level:.1f}" {dashed}/>')
        place = f'x="{left + 8}" y="{tall + 68 + 18 * i}"'
        lines.append(f'<text {place} fill="{colour}">{escape(merged(names))}</text>')
    top, height = "epsilon by PLD; dashed: the cap", tall + 70 + 18 * len(ways)
    return "<h2>Budget over time</h2>" + _frame(
        wide, tall, left, f"{most:.3g}", "rounds charged", top, "".join(lines), height
    )


def _accuracy(history: History) -> str:
    """Accuracy of each round against the most epsilon that was published for a site by then."""
    dots = []
    for commit in history.commits:
        score, spent = commit.metrics.get("accuracy"), [one.epsilon for one in commit.asked]
        if score is not None and spent:
            dots.append((max(spent), score, commit.number))
    if not dots:
        return ""
    wide, tall, left = 640, 180, 50
    most = max(x for x, _, _ in dots) or 1.0
    marks = "".join(
        f'<circle cx="{left + x / most * wide:.1f}" cy="{tall + 30 - y * tall:.1f}" r="4" fill="#2f6690"/>'
        f'<text x="{left + x / most * wide:.1f}" y="{tall + 20 - y * tall - 14 * (i % 2):.1f}" text-anchor="end">{n}: {y:.3f}</text>'
        for i, (x, y, n) in enumerate(dots)
    )
    right = f"epsilon, the most of any site: {most:.3g}"
    return "<h2>Accuracy against epsilon</h2>" + _frame(wide, tall, left, "1", right, "accuracy", marks, tall + 55)
