"""The audit's report: one answer a question, in a fixed order, for people (``page``) and programs.

What could not be checked is said where the answer would be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cloister_shared.audit.became import became, imported, round_of, standing
from cloister_shared.audit.budget import Block
from cloister_shared.audit.bundle import Bundle
from cloister_shared.audit.federation import History, RoundCommit
from cloister_shared.audit.findings import Findings, listed, many
from cloister_shared.audit.reading import MALFORMED, printable, when
from cloister_shared.audit.several import SEVERAL
from cloister_shared.audit.sites import Ledger
from cloister_shared.audit.spends import idle, ledgers_by_client, unsure
from cloister_shared.audit.tables import Table, caps_table, code_table, enrolled_table, rounds_table, spans
from cloister_shared.audit.trust import Trust
from cloister_shared.cards import site_card_of
from cloister_shared.errors import CloisterError
from cloister_shared.witness import log_of_federation

VERDICTS = {0: "PASS", 1: "VIOLATION", 2: "INCOMPLETE", 3: "FORK OR ROLLBACK"}
# Which findings answer which question.
_RESETS = (
    "cap", "counter", "order", "void", "unspent", "uncharged", "untold", "charged", "elsewhere", "newest-head", "anchored-head",
    "remembered-log", "leaf", "event",
)  # fmt: skip
_SAMPLING = ("terms", "unspent", "update", "sums", "uncharged", "untold", "event")
_LOG = (
    "no-witness",
    "nothing-remembered",
    "head",
    "head-signature",
    "leaf",
    "leaf-signature",
    "leaf-order",
    "unwitnessed",
    "other-bundle",
)
UNITS = (
    "One privacy unit is a record, or all records of one person where a site registered its text so. Neighbours: with and without one"
    " unit (add/remove). Each site's ledger is the authority over its own text."
)
ACCOUNTANTS = (
    "RDP bounds from above and is loose: a line or figure of it above a cap says nothing by itself; where it is above, PLD decides."
    " The sites charge the larger of PRV's upper bound and PLD, so that their own figures lie up to 0.02 above this PLD: numerical"
    " error, on the safe side."
)
_SAMPLED = (
    "Yes: Poisson over units, as reservations state and commits repeat; that they drew so is the sites' own word."
)
_ALONE = "As far as is here, by the sites' own word: Poisson over units, as reservations state; no commits are here to hold them against."
NOT_PROVEN = (
    "That an update of which the coordinator says that it came late, was refused or was left out did not enter an adapter.",
    "That the coordinator really added the noise of a client-level statement: it alone draws it.",
    "Which text an adapter holds that a run began with and no round here made: its coordinator brought it.",
    "What a site was asked after its export that is here, or while the log says that it was not enrolled, or no round was told.",
    "Which text is a block, where a site's ledger says that it has several: budgets are of blocks.",
    "That a client really drew, clipped and added noise as its ledger says: short of attestation of its machine nobody sees that.",
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
        table: What is told best in rows, under them.
    """

    question: str
    lines: tuple[str, ...]
    table: Table | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lines", tuple(map(printable, self.lines)))


def _figures(record: Mapping[str, Any], *names: str) -> bool:
    """Whether these fields are figures that can be printed; what is malformed is a finding elsewhere."""
    return all(isinstance(record.get(name), int | float) and 0 <= record[name] < 1e9 for name in names)


def _by(block: Block) -> str:
    if not block.sure:
        return "by RDP, from above: too much for PLD"
    return f"by PLD; RDP's looser bound is {block.rdp:.4f}"


def _charges(block: Block) -> str:
    return f", charged {block.charges} times" if block.charges != block.rounds else ""


def _each(epsilon: float, count: int) -> str:
    return f"{epsilon:.4f} ({many(count, 'round')})"


def _alike(said: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of whom they are true: what is the same of several is one line."""
    whose = dict[str, list[str]]()
    for name, words in said:
        whose.setdefault(words, []).append(name)
    return [f"{listed(sorted(names))}: {words}" for words, names in whose.items()]


def _unit(card: object) -> str:
    """What a site declared at enrolment."""
    known = card if isinstance(card, dict) else {}
    try:
        site_card_of(dict(known), "card")
    except (CloisterError, *MALFORMED):
        return f"{known.get('name')}: its card in the log is none that a site signed"
    return f"{known.get('name')}: one unit is one {known.get('unit')}; {known.get('records')} declared at enrolment"


def _remembering(trust: Trust, history: History) -> str:
    """How far the trust file remembers this log, and whose memory that is."""
    if trust.at_coordinator:
        return (
            "The trust file was written at the coordinator, the party that is audited: what it remembers of this log"
            " shows nothing. Take one from a site or an auditor."
        )
    whose, known = (
        trust.written_at or "whoever wrote it by hand",
        trust.remembered.get(log_of_federation(trust.federation)),
    )
    if known is None:
        return f"the trust file, of {whose}, remembers nothing of it"
    same = "" if history.remembered == known.size else ", which are not the first ones here"
    return f"the trust file, of {whose}, remembers the first {known.size}{same}"


def _trusted(
    trust: Trust, history: History, sums: Sequence[RoundCommit], here: Mapping[str, Ledger], findings: Findings
) -> list[str]:
    """What the coordinator saw, and on whose word."""
    broken = {(lost.run, lost.number) for lost in history.aborted} - {(c.run, c.number) for c in history.commits}
    bare = {
        (e.run, e.round)
        for ledger in here.values()
        for e in ledger.entries.values()
        if e.state == "spent" and not e.secure
    }
    bare |= {(leaf.run, leaf.number) for leaf in history.told if any(one.update for one in leaf.asked)}
    # Of a round that was broken off only the sites themselves can say how they answered.
    single = {(c.run, c.number) for c in history.commits if not c.sums or (c.run, c.number) in bare} | broken & bare
    broken -= bare
    lines = [f"The coordinator of {trust.name} saw single noised updates in {many(len(single), 'round')}."]
    if sums:
        checked = not any(f.code in ("no-draw", "draw", "sums") for f in findings.found)
        how = "as the draws of its groups bear out" if checked else "by its own word"
        lines.append(f"In {many(len(sums), 'round')} it saw sums of groups, {how}.")
    if broken:
        lines.append(f"What it saw of {many(len(broken), 'round')} that came to nothing the log does not say.")
    return lines


def _models(history: History, of: Mapping[str, Ledger]) -> list[str]:
    """Whose text each adapter holds: of its own round, and of all that it descends from."""
    holds, made, lines = dict[str, frozenset[str]](), {c.index: c for c in history.commits}, list[str]()
    for index, record in enumerate(history.records):
        adapter = str(record.get("adapter"))
        if record.get("kind") == "policy":
            here = f"round 0 of run {str(record.get('run'))[:8]}: adapter {adapter[:16]}"
            if came := imported(record):
                holds[adapter] = holds.get(adapter, frozenset()) | {f"sites of another federation ({came})"}
            if adapter in holds:
                lines.append(f"{here} was trained on text of {', '.join(sorted(holds[adapter]))}")
            else:
                lines.append(f"{here} was made by no round here: what its coordinator began with")
        elif (commit := made.get(index)) is not None:
            new = {one.name for one in commit.asked if one.verdict == "accepted"}
            line = f"round {commit.number} of run {commit.run[:8]}: adapter {commit.adapter[:16]}"
            if new:
                old = holds.get(commit.start, frozenset()) - new
                holds[commit.adapter] = holds.get(commit.adapter, frozenset()) | new | old
                line += f" was trained on text of {listed(sorted(new))}"
            else:
                # It was there before, and holds what it held.
                old = holds.get(commit.adapter, frozenset())
                line += " again: nobody's update of this round entered"
            line += f"; in earlier rounds of {listed(sorted(old))}" if old else ""
            left_out = unsure(of, commit)
            lines.append(line + (f"; by the coordinator's word not in it: {listed(left_out)}" if left_out else ""))
    return lines


def _seen(trust: Trust, history: History) -> list[str]:
    """How far who saw the log, by signatures and by sites' own ledgers."""
    leaves = many(len(history.tree), "leaf", "leaves")
    by = dict[int, list[str]]()
    for client, size in history.seen.items():
        by.setdefault(size, []).append(trust.called(client))
    lines = [f"the first {size} cosigned by {', '.join(sorted(by[size]))}" for size in sorted(by, reverse=True)]
    own = f"{leaves}; the first {history.witnessed} seen by sites, as their cosignatures or their own ledgers say"
    return [own, *(lines or ["cosigned by nobody who is trusted"])]


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
    of = {kind: [r for r in records if r.get("kind") == kind] for kind in ("spend", "enrol")}
    names = sorted({one.name for leaf in history.told for one in leaf.asked if one.took_part})
    own = sorted(ledgers.values(), key=lambda ledger: ledger.name)
    here = ledgers_by_client(ledgers, trust)
    asked = [(one.client, one.name) for leaf in history.told for one in leaf.asked if one.took_part]
    silent = sorted({name for client, name in asked if client not in here} | set(idle(history, here).values()))
    unsaid = (
        (
            f"Of {listed(silent)} this cannot be said: their own logs are not here, or no key that is trusted signed them.",
        )
        if silent
        else ()
    )
    unread = (
        (f"leaf {spans(history.unread)} of the federation's log cannot be read: what it told is not here",)
        if history.unread
        else ()
    )
    moved = became(history)
    caps, rounded, code, enrolled = (
        caps_table(own),
        rounds_table(history, here),
        code_table(history),
        enrolled_table(history),
    )
    overruns = [f"{f.kind}: {f.where}: {f.what}" for f in findings.found if f.code in _RESETS or f.kind == "fork"]
    overruns += [one for one in findings.held if SEVERAL in one]
    broken = [f"{f.kind}: {f.where}: {f.what}" for f in findings.found if f.code in _SAMPLING]
    sums = [c for c in history.commits if c.sums]
    releases = [f"{ledger.name}: {line}" for ledger in own for line in ledger.releases]
    states = [(ledger.name, Counter(e.state for e in ledger.entries.values())) for ledger in own]
    lost = _alike(
        (
            name,
            f"{many(n['spent'], 'charge')} spent, {n['lost']} lost (charged, nothing left), {n['void']} given back before text was read",
        )
        for name, n in states
    )
    held = [(f"{b.site} block {b.block}", b) for b in blocks]
    final = _alike(
        (
            name,
            f"lifetime epsilon {b.epsilon:.4f} of a cap of {b.cap:g}, at delta {b.delta:g}: {many(b.rounds, 'round')}{_charges(b)},"
            f" {b.steps} Gaussian steps ({_by(b)})",
        )
        for name, b in held
    )
    bare = {ledger.name for client, ledger in ledgers.items() if not any(b.client == client for b in blocks)}
    final += [f"{name}: its ledger, as it is here, has no charge at all" for name in sorted(bare)]
    rounds = _alike(
        (name, f"each round by itself: epsilon {', '.join(_each(e, n) for e, n in sorted(b.alone))}")
        for name, b in held
        if b.alone
    )
    periods = _alike(
        (
            name,
            f"{p.month}: epsilon {p.epsilon:.4f} ({'PLD' if p.alone_sure else 'RDP'}) for the rounds of that month alone,"
            f" {p.rounds} of them; lifetime by then"
            f" {p.lifetime:.4f} ({'PLD' if p.sure else 'RDP'}). Months do not add up, and none resets anything",
        )
        for name, b in held
        for p in b.periods
    )
    units = sorted({_unit(r.get("card")) for r in of["enrol"]})
    whole = [
        f"client level: epsilon {r['epsilon']:.4f} at delta {r['delta']:g} with the noise of attempt {r['attempt']}"
        f" at {round_of(r, 'number')}"
        for r in of["spend"]
        if _figures(r, "epsilon", "delta", "attempt")
    ]
    drawn = {(str(r.get("run")), str(r.get("number")), str(r.get("attempt"))) for r in of["spend"]}
    if whole and (without := [c for c in history.commits if (c.run, str(c.number), str(c.attempt)) not in drawn]):
        told = listed([f"{c.number} of run {c.run[:8]}" for c in without])
        whole.append(f"client level: no such noise in rounds {told}: of their updates it says nothing")
    absent = (
        ""
        if records
        else "cannot be said from these bundles: the federation's log is not in them, or is not what was signed"
    )
    none = (absent or "nothing in the logs",)
    well = "none found" + (
        " in the sites' own logs that are here; of the federation's it cannot be said" if absent else ""
    )
    kinds = {e.terms for ledger in own for e in ledger.entries.values()}
    noise = [f"noise multiplier {a:g}, sample rate {b:.4g}, {c} steps, delta {d:g}" for a, b, c, d in sorted(kinds)]
    models = _models(history, here)
    incidents = [
        f"leaf {index}: {r.get('kind')}: {r.get('what')}"
        + ("; nobody else saw this leaf yet" if index >= history.covered else "")
        for index, r in enumerate(records)
        if r.get("kind") in ("incident", "recovery")
    ]
    incidents += [f"{f.kind}: {f.where}: {f.what}" for f in findings.found if f.kind == "fork"]
    incidents += [f"{ledger.name}: {line}" for ledger in own for line in ledger.incidents]
    members = [
        f"leaf {index}: {r.get('kind')} {r.get('site')}, {when(r.get('at'))}"
        + ("" if index < history.covered else "; nobody else saw this leaf yet")
        for index, r in enumerate(records)
        if r.get("kind") in ("enrol", "revoke")
    ]
    log = [*(_seen(trust, history) if history.tree else (absent,)), _remembering(trust, history)]
    log += [f"{f.kind}: {f.where}: {f.what}" for f in findings.found if f.kind == "fork" or f.code in _LOG]
    return [
        Answer(
            "Whose text, which unit, which neighbours?",
            (", ".join(names) or absent or "no site took part", *units, UNITS),
        ),
        Answer(
            "Epsilon and delta, per round, period and lifetime?",
            (*final, *rounds, *periods, *unsaid, *whole) or (absent or "nothing was spent",),
        ),
        Answer(
            "Who was trusted with what?",
            (
                *unread,
                *_trusted(trust, history, sums, here, findings),
                "Everybody who sees rounds sees the adapters.",
            )
            if history.commits or history.aborted
            else none,
        ),
        Answer("Caps, and who changed them when?", unsaid or (() if caps.rows else none), caps),
        Answer("Any overrun or reset?", (*(overruns or ([well] if own else [])), *unsaid) or none),
        Answer(
            "Did the sampling match the accountant?",
            (
                *([_SAMPLED if history.commits else _ALONE] if kinds and not broken else []),
                *broken,
                *unsaid,
            )
            or none,
        ),
        Answer("Realised participants and noise?", (*unread, *lost, *noise, *unsaid) or none, rounded),
        Answer(
            "What left without noise, and to whom?",
            (*(releases or (["nothing that a site's ledger here says"] if own else [])), *unsaid) or none,
        ),
        Answer(
            "Does an independent accountant agree?",
            tuple(x for x in findings.held if "dp-accounting" in x)
            + tuple(f"{f.where}: {f.what}" for f in findings.found if f.code in ("cap", "published"))
            + ((ACCOUNTANTS,) if blocks else ())
            + unsaid
            or none,
        ),
        Answer("Which model holds which text?", (*unread, *models) or none),
        Answer(
            "Who promoted it, exported it, kept it or gave it up?",
            (*unread, *standing(history)) or (() if moved.rows else (absent or "nobody",)),
            moved,
        ),
        Answer("Which code?", unread or (() if code.rows else none), code),
        Answer("Who was enrolled then?", (*unread, *members) or none, enrolled),
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
