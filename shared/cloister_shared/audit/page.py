"""The audit's report as one HTML page that prints, and as rows for CSV.

The page has no script and loads nothing; what a bundle says is escaped.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from cloister_shared.audit.budget import Block
from cloister_shared.audit.charts import accuracies, budgets
from cloister_shared.audit.federation import History
from cloister_shared.audit.findings import Findings, listed
from cloister_shared.audit.reading import printable
from cloister_shared.audit.report import VERDICTS, Answer
from cloister_shared.audit.tables import Table

_WORDS = (
    "A leaf is one signed entry of a log; a head is a log's length and fingerprint, signed; a commit is the leaf of a finished round;"
    " a block is text that was registered together and has one budget; a site that cosigned a head saw all leaves up to it."
)
# Rows of a table that a page shows: a browser can print no more.
_MOST_ROWS = 500
_COLUMNS = (
    "verdict", "federation", "violations", "forks", "incomplete", "site", "block", "entry", "reserved_at", "epsilon_pld",
    "epsilon_rdp", "delta", "cap", "epsilon_pld_final",
)  # fmt: skip


def as_csv(findings: Findings, blocks: Sequence[Block], federation: str) -> str:
    """Budgets over time, a row for each charged entry: PLD where it was worked out, RDP at every one.

    In each row stand the verdict, whose federation it is, and how many findings of each kind the other forms of the report tell.
    """
    out, kinds = io.StringIO(), Counter(f.kind for f in findings.found)
    about = (VERDICTS[findings.exit_code], _plain(federation), kinds["violation"], kinds["fork"], kinds["incomplete"])
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for b in blocks:
        for p in b.points:
            sure = "" if p.pld is None else f"{p.pld:.6f}"
            row = (p.entry, f"{p.at:.0f}", sure, f"{p.rdp:.6f}", b.delta, b.cap, f"{b.epsilon:.6f}")
            writer.writerow((*about, _plain(b.site), b.block, *row))
    if not any(b.points for b in blocks):
        writer.writerow((*about, *[""] * (len(_COLUMNS) - len(about))))
    return out.getvalue()


def _plain(name: str) -> str:
    # What begins so is a formula to a spreadsheet.
    return f"'{name}" if name[:1] in ("=", "+", "-", "@") else name


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
    # What is the same of many places is one row.
    places = dict[tuple[str, str, str], list[str]]()
    for f in findings.found:
        places.setdefault((f.kind, f.code, f.what), []).append(f.where)
    rows = tuple((kind, code, listed(where), what) for (kind, code, what), where in places.items())
    table = (
        _table(Table(("kind", "code", "where", "what"), rows), "found")
        if rows
        else "<p>No finding: nothing that was checked fails, and nothing that is needed is missing.</p>"
    )
    parts = "".join(
        f"<section><h2>{i}. {escape(one.question)}</h2>{''.join(f'<p>{escape(line)}</p>' for line in one.lines)}"
        f"{_table(one.table) if one.table is not None and one.table.rows else ''}</section>"
        for i, one in enumerate(said, 1)
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>{escape(title)}</title><style>body{{font:15px/1.45 sans-serif;max-width:52em;margin:2em auto;padding:0 1em;color:#222}}"
        "h1{font-size:1.5em}h2{font-size:1.05em;margin:1.4em 0 .3em}p{margin:.25em 0;overflow-wrap:anywhere}"
        "table{border-collapse:collapse;width:100%;font-size:13px}td,th{border:1px solid #ccc;padding:.3em .5em;text-align:left;"
        "overflow-wrap:anywhere;vertical-align:top}th{overflow-wrap:normal}.found td:nth-child(-n+2){white-space:nowrap}"
        ".found td:nth-child(3){min-width:11em}"
        ".verdict{font-size:1.3em;font-weight:bold}svg{max-width:100%;height:auto}"
        "@media print{body{margin:0;max-width:none;font-size:11pt}section{break-inside:avoid}}</style>"
        f"<h1>{escape(title)}</h1><p class=verdict style='color:{colour}'>{verdict}</p>"
        f"{''.join(f'<p>{escape(name)}: {escape(printable(text))}</p>' for name, text in about.items())}"
        f"<p>{escape(_WORDS)}</p><h2>Findings</h2>{table}"
        f"<h2>What was checked and held</h2>{''.join(f'<p>{escape(line)}</p>' for line in findings.held) or '<p>Nothing.</p>'}"
        f"{budgets(blocks)}{accuracies(history)}{parts}</html>\n"
    )


def _table(table: Table, kind: str = "") -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows[:_MOST_ROWS])
    more = len(table.rows) - _MOST_ROWS
    rest = f"<p>and {more} rows more: the JSON report has all</p>" if more > 0 else ""
    return f"<table class='{kind}'><tr>{head}</tr>{rows}</table>{rest}"
