"""The audit's report: one answer a question, in a fixed order, as JSON, as rows for CSV, and as one HTML page that prints.

The page has no script and loads nothing. What a bundle says is escaped; what could not be checked is said where the answer would be.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from cloister_shared.audit.budget import Block
from cloister_shared.audit.bundle import Bundle
from cloister_shared.audit.federation import History
from cloister_shared.audit.findings import Findings
from cloister_shared.audit.reading import printable
from cloister_shared.audit.sites import Ledger
from cloister_shared.audit.trust import Trust

VERDICTS = {0: "PASS", 1: "VIOLATION", 2: "INCOMPLETE", 3: "FORK OR ROLLBACK"}
UNITS = (
    "One privacy unit is a record, or all records of one person where a site registered its text so. Neighbours: with and without one"
    " unit (add/remove). Each site's ledger is the authority over its own text."
)
ACCOUNTANTS = (
    "RDP bounds from above and is loose: a line or figure of it above a cap says nothing by itself; where it is above, PLD decides."
    " The sites charge the larger of PRV's upper bound and PLD, so that their own figures lie up to 0.02 above this PLD: numerical"
    " error, on the safe side."
)
NOT_PROVEN = (
    "That a client really added the noise that its ledger says: short of attestation of its machine nobody outside can see that.",
    "That a site registered all of its text, or that two units are not the same person under two names.",
    "What happened before the first head that anybody here remembers, where nobody witnessed it.",
    "That no site and coordinator act together against the others beyond what signatures of third parties show.",
    "That a model trained on these texts says nothing of them beyond epsilon: epsilon is the statement.",
)


@dataclass(frozen=True)
class Answer:
    """One question and what the bundle answers.

    Attributes:
        question: The question.
        lines: The answer, a line each.
    """

    question: str
    lines: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "lines", tuple(map(printable, self.lines)))


def _when(at: object) -> str:
    if not isinstance(at, int | float) or not 0 <= at < 1e11:
        return "at no time"
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(at))


def _unit(card: object) -> str:
    """What a site declared at enrolment."""
    known = card if isinstance(card, dict) else {}
    return f"{known.get('name')}: one unit is one {known.get('unit')}; {known.get('records')} declared at enrolment"


def _moved(r: Mapping[str, Any]) -> str:
    guard = r.get("guard")
    parts = (
        "a rollback" if r.get("rollback") else "",
        f"guarded by {str(guard)[:16]}" if guard else "",
        str(r.get("why") or ""),
    )
    return "".join(f"; {part}" for part in parts if part)


def _round(r: Mapping[str, Any]) -> str:
    return f"round {r.get('round')} of run {str(r.get('run'))[:8]}"


def answers(
    bundle: Bundle,
    trust: Trust,
    history: History,
    ledgers: Mapping[str, Ledger],
    blocks: Sequence[Block],
    findings: Findings,
) -> list[Answer]:
    """Every question, in order."""
    records = history.records
    of = {
        kind: [r for r in records if r.get("kind") == kind]
        for kind in ("policy", "spend", "incident", "alias_set", "export", "enrol", "hold", "tombstone", "round_commit")
    }
    names = sorted({one.name for commit in history.commits for one in commit.asked})
    caps = [
        f"{ledger.name}: epsilon {cap:g} at delta {delta:g} from {_when(at)}"
        for ledger in ledgers.values()
        for at, cap, delta in ledger.caps
    ]
    overruns = [f"{f.where}: {f.what}" for f in findings.found if f.code in ("cap", "counter", "order", "void")]
    sums = [c for c in history.commits if c.sums]
    releases = [f"{ledger.name}: {line}" for ledger in ledgers.values() for line in ledger.releases]
    lost = [
        f"{ledger.name}: {sum(e.state == 'spent' for e in ledger.entries.values())} rounds spent,"
        f" {sum(e.state == 'lost' for e in ledger.entries.values())} lost (charged, nothing left),"
        f" {sum(e.state == 'void' for e in ledger.entries.values())} given back before text was read"
        for ledger in ledgers.values()
    ]
    final = [
        f"{b.site} block {b.block}: epsilon {b.epsilon:.4f} (PLD), {b.rdp:.4f} (RDP) of {b.cap:g} at delta {b.delta:g};"
        f" {b.rounds} rounds, {b.steps} Gaussian steps; lifetime"
        for b in blocks
    ]
    rounds = [
        f"{b.site} block {b.block}: a round alone: epsilon {', '.join(f'{e:.4f} ({n} rounds)' for e, n in sorted(b.alone))}"
        for b in blocks
        if b.alone
    ]
    periods = [
        f"{b.site} block {b.block}, {p.month}: epsilon {p.epsilon:.4f} (PLD) for {p.rounds} rounds of that month alone;"
        f" its lifetime by then {p.lifetime:.4f} (RDP). Months do not add up, and none resets anything"
        for b in blocks
        for p in b.periods
    ]
    units = sorted({_unit(r.get("card")) for r in of["enrol"]})
    whole = [
        f"client level: epsilon {r.get('epsilon'):.4f} at delta {r.get('delta'):g} after {_round(r | {'round': r.get('number')})}"
        for r in of["spend"]
        if isinstance(r.get("epsilon"), float) and isinstance(r.get("delta"), float)
    ]
    absent = (
        ""
        if records
        else "cannot be said from these bundles: the federation's log is not in them, or is not what was signed"
    )
    none = (absent or "nothing in the logs",)
    kinds = {e.terms for ledger in ledgers.values() for e in ledger.entries.values()}
    noise = [f"noise multiplier {a:g}, sample rate {b:.4g}, {c} steps, delta {d:g}" for a, b, c, d in sorted(kinds)]
    models = [
        f"round {c.number} of run {c.run[:8]}: adapter {c.adapter[:16]} holds"
        f" {', '.join(sorted(one.name for one in c.asked if one.verdict == 'accepted')) or 'no text'}"
        for c in history.commits
    ]
    code = sorted(
        {
            f"{r.get('code')}, lock file {str(r.get('lock') or 'not said')[:16]}, base {str(r.get('base'))[:16]},"
            f" settings {str(r.get('settings') or r.get('config'))[:16]}"
            for r in (*of["policy"], *of["round_commit"])
        }
    )
    incidents = [f"leaf {r.get('index')}: {r.get('what')}" for r in of["incident"]]
    incidents += [f"{ledger.name}: {line}" for ledger in ledgers.values() for line in ledger.incidents]
    members = [
        f"leaf {r.get('index')}: {r.get('kind')} {r.get('site')}, {_when(r.get('at'))}"
        for r in records
        if r.get("kind") in ("enrol", "revoke")
    ]
    by = ", ".join(sorted(trust.names[i] for i in history.seen)) or "nobody who is trusted"
    log = [
        f"{len(history.tree)} leaves; cosigned by {by}",
        f"the first {history.covered} leaves were seen by a witness or are remembered in the trust file",
    ]
    log += [
        f"{f.kind}: {f.where}: {f.what}"
        for f in findings.found
        if f.kind == "fork" or f.code in ("no-witness", "nothing-remembered")
    ]
    return [
        Answer(
            "Whose text, which unit, which neighbours?",
            (", ".join(names) or absent or "no site took part", *units, UNITS),
        ),
        Answer(
            "Epsilon and delta, per round, period and lifetime?",
            (*rounds, *periods, *final, *whole) or ("no site's own log is here: incomplete",),
        ),
        Answer(
            "Who was trusted with what?",
            (
                f"The coordinator of {trust.name} saw single noised updates in {len(history.commits) - len(sums)} rounds"
                f" and only sums of groups in {len(sums)}.",
                "Everybody who sees rounds sees the adapters.",
            ),
        ),
        Answer("Caps, and who changed them when?", tuple(caps) or none),
        Answer("Any overrun or reset?", tuple(overruns) or ("none found",)),
        Answer(
            "Did the sampling match the accountant?",
            (
                "Poisson over units, as reservations state and commits repeat.",
                *(f"{f.where}: {f.what}" for f in findings.found if f.code == "terms"),
            ),
        ),
        Answer("Realised participants and noise?", (*lost, *noise) or none),
        Answer("What left without noise, and to whom?", tuple(releases) or ("nothing that a site's ledger here says",)),
        Answer(
            "Does an independent accountant agree?",
            tuple(x for x in findings.held if "dp-accounting" in x)
            + tuple(f"{f.where}: {f.what}" for f in findings.found if f.code in ("cap", "published"))
            + ((ACCOUNTANTS,) if blocks else ())
            or none,
        ),
        Answer("Which model holds which text?", tuple(models) or none),
        Answer(
            "Who promoted it, exported it, kept it or gave it up?",
            (
                *(
                    f"leaf {r.get('index')}: {r.get('alias')} to {_round(r)}, {_when(r.get('at'))}{_moved(r)}"
                    for r in of["alias_set"]
                ),
                *(f"leaf {r.get('index')}: {_round(r)} was exported, {_when(r.get('at'))}" for r in of["export"]),
                *(
                    f"leaf {r.get('index')}: {_round(r)}: hold {'released' if r.get('released') else 'set'}: {r.get('why')}"
                    for r in of["hold"]
                ),
                *(
                    f"leaf {r.get('index')}: {_round(r)}: its adapter was given up: {r.get('why')}"
                    for r in of["tombstone"]
                ),
            )
            or (absent or "nobody",),
        ),
        Answer("Which code?", tuple(code) or none),
        Answer("Who was enrolled then?", tuple(members) or none),
        Answer("Is the log whole, append-only, seen by others?", tuple(log)),
        Answer("Incidents?", tuple(incidents) or (absent or "none in the logs",)),
        Answer("What does this not prove?", NOT_PROVEN),
    ]


def as_record(said: Sequence[Answer], findings: Findings, blocks: Sequence[Block]) -> dict[str, Any]:
    """The report for programs."""
    return {
        "verdict": VERDICTS[findings.exit_code],
        "exit_code": findings.exit_code,
        "findings": [asdict(one) for one in findings.found],
        "held": findings.held,
        "answers": [asdict(one) for one in said],
        "blocks": [asdict(one) for one in blocks],
    }


def as_csv(blocks: Sequence[Block]) -> str:
    """Budgets over time, a row for each charged entry."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["site", "block", "entry", "reserved_at", "epsilon_rdp", "delta", "cap", "epsilon_pld_final"])
    for b in blocks:
        for p in b.points:
            writer.writerow(
                [b.site, b.block, p.entry, f"{p.at:.0f}", f"{p.rdp:.6f}", b.delta, b.cap, f"{b.epsilon:.6f}"]
            )
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
        else "<p>Nothing was found.</p>"
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
        "overflow-wrap:anywhere;vertical-align:top}.verdict{font-size:1.3em;font-weight:bold}svg{max-width:100%;height:auto}"
        "@media print{body{margin:0;max-width:none;font-size:11pt}section{break-inside:avoid}}</style>"
        f"<h1>{escape(title)}</h1><p class=verdict style='color:{colour}'>{verdict}</p>"
        f"{''.join(f'<p>{escape(name)}: {escape(printable(text))}</p>' for name, text in about.items())}{table}"
        f"<h2>What was checked and held</h2>{''.join(f'<p>{escape(line)}</p>' for line in findings.held) or '<p>Nothing.</p>'}"
        f"{_plot(blocks)}{_accuracy(history)}{parts}</html>\n"
    )


def _frame(wide: int, tall: int, left: int, most: str, right: str, top: str, inside: str, height: int) -> str:
    """An SVG with two axes around ``inside``."""
    line = '<line x1="{}" x2="{}" y1="{}" y2="{}" stroke="#222"/>'
    return (
        f'<svg viewBox="0 0 {left + wide + 20} {height}" font-family="sans-serif" font-size="12" role="img">'
        + line.format(left, left, 20, tall + 20)
        + line.format(left, left + wide, tall + 20, tall + 20)
        + f'<text x="{left - 6}" y="24" text-anchor="end">{most}</text>'
        + f'<text x="{left - 6}" y="{tall + 24}" text-anchor="end">0</text>'
        + f'<text x="{left + wide}" y="{tall + 38}" text-anchor="end">{right}</text>'
        + f'<text x="6" y="14">{top}</text>{inside}</svg>'
    )


def _plot(blocks: Sequence[Block]) -> str:
    """Budget over entries, a line for each block, against its cap."""
    drawn = [b for b in blocks if b.points]
    if not drawn:
        return ""
    wide, tall, left = 640, 220, 50
    most = max(max(b.cap, b.rdp) for b in drawn) or 1.0
    count = max(len(b.points) for b in drawn)
    colours = ("#2f6690", "#b5651d", "#2b7a4b", "#7a2b6d", "#8a6d00", "#444")
    lines = []
    for i, b in enumerate(drawn):
        xy = [(0, 0.0), *((n, p.rdp) for n, p in enumerate(b.points, 1))]
        path = " ".join(f"{left + x * wide / count:.1f},{tall + 20 - y / most * tall:.1f}" for x, y in xy)
        cap, colour = tall + 20 - b.cap / most * tall, colours[i % len(colours)]
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines.append(
            f'<circle cx="{left + wide}" cy="{tall + 20 - b.epsilon / most * tall:.1f}" r="4" fill="{colour}"/>'
        )
        dashed = f'stroke="{colour}" stroke-dasharray="4 4"'
        lines.append(f'<line x1="{left}" x2="{left + wide}" y1="{cap:.1f}" y2="{cap:.1f}" {dashed}/>')
        place = f'x="{left + 8 + 150 * (i % 4)}" y="{tall + 60 + 18 * (i // 4)}"'
        lines.append(f'<text {place} fill="{colour}">{escape(b.site)} block {b.block}</text>')
    height, top = (
        tall + 70 + 18 * (len(drawn) // 4),
        "epsilon by RDP, an upper bound; dot: by PLD, which decides; dashed: cap",
    )
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
        f'<circle cx="{left + x / most * wide:.1f}" cy="{tall + 20 - y * tall:.1f}" r="4" fill="#2f6690"/>'
        f'<text x="{left + x / most * wide:.1f}" y="{tall + 10 - y * tall:.1f}" text-anchor="end">{n}: {y:.3f}</text>'
        for x, y, n in dots
    )
    right = f"epsilon, the most of any site: {most:.3g}"
    return "<h2>Accuracy against epsilon</h2>" + _frame(wide, tall, left, "1", right, "accuracy", marks, tall + 45)
