"""``cloister-verify BUNDLE --trust TRUST.json``: checks a bundle offline, with no server, no database, no torch and no network.

    trust -> federation's log -> each site's log -> spends against commits -> epsilon by dp-accounting -> adapters -> report

Exit codes: 0 pass, 1 violation, 2 incomplete, 3 fork or rollback. Without keys that the auditor brings nothing passes.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from cloister_shared import __version__, console
from cloister_shared.audit.alike import check_alike, merged
from cloister_shared.audit.budget import Block, check_budgets
from cloister_shared.audit.bundle import Bundle, read_bundle
from cloister_shared.audit.draws import check_draws
from cloister_shared.audit.federation import History, check_covered, check_federation
from cloister_shared.audit.findings import Findings
from cloister_shared.audit.heads import check_remembered, elsewhere, logs_of_keys, one_of_each
from cloister_shared.audit.page import as_csv, as_html
from cloister_shared.audit.published import check_published
from cloister_shared.audit.reading import printable, when
from cloister_shared.audit.releases import check_releases
from cloister_shared.audit.report import VERDICTS, answers, as_record
from cloister_shared.audit.several import check_several
from cloister_shared.audit.sites import Ledger, check_site
from cloister_shared.audit.spends import check_spends, ledgers_by_client
from cloister_shared.audit.trust import Trust, read_trust
from cloister_shared.encoding import digest
from cloister_shared.errors import CloisterError, InputError
from cloister_shared.witness import log_of_federation


@dataclass(frozen=True)
class Audit:
    """What came of an audit.

    Attributes:
        findings: What was found, and what held.
        trust: What was trusted, with names for the keys that had none.
        history: The federation's log.
        ledgers: Sites' ledgers by client id.
        blocks: Budgets, recomputed.
    """

    findings: Findings
    trust: Trust
    history: History
    ledgers: dict[str, Ledger]
    blocks: list[Block]


def audit(bundle: Bundle, trust: Trust) -> Audit:
    """Checks a bundle against what is trusted; pure, and never trusts what the bundle brings."""
    findings = Findings()
    history = check_federation(bundle, trust, findings)
    if history.foreign:
        return Audit(findings, trust, history, {}, [])
    trust = trust.naming(history.names)
    bundle = one_of_each(bundle, trust)
    known, ledgers = logs_of_keys(bundle, trust, history, findings), dict[str, Ledger]()
    for client, log in sorted(bundle.sites.items(), key=lambda one: trust.called(one[0])):
        if elsewhere(client, log, known, bundle, trust):
            what = "a bundle has something else under a key whose log is here whole: it is left out"
            findings.incomplete("other-bundle", f"site {trust.called(client)}", what)
            continue
        found = check_site(client, log, bundle, trust, history, known, findings)
        if found is not None:
            ledgers[client] = found
    seen = {log_of_federation(trust.federation), *(ledger.origin for ledger in ledgers.values())}
    check_remembered(known, seen, trust, findings)
    check_alike(bundle, trust, history, findings)
    check_releases(history, findings)
    drawn = check_draws(bundle, history, findings)
    check_spends(ledgers, trust, history, drawn, findings)
    check_covered(history, findings)
    blocks = check_budgets(ledgers, findings)
    check_several(ledgers, findings)
    check_published(history, findings, ledgers_by_client(ledgers, trust))
    for name, data in bundle.adapters.items():
        if digest(data) != name:
            findings.violation("adapter", f"adapter {name[:16]}", f"its bytes have digest {digest(data)[:16]}")
    made = {commit.adapter for commit in history.commits} | {str(r.get("adapter")) for r in history.records}
    # Where the log is not here, or not what was signed, that is the finding.
    for name in set(bundle.adapters) - made if history.records else ():
        findings.violation("adapter", f"adapter {name[:16]}", "no round in the log has it")
    return Audit(findings, trust, history, ledgers, blocks)


def verify(
    bundle: Annotated[
        list[Path],
        typer.Argument(help="Bundles, from the coordinator and from sites: cloister audit export --out BUNDLE."),
    ],
    trust: Annotated[
        list[Path] | None,
        typer.Option(help="Keys and heads that you trust, from somewhere else than the bundle: cloister audit trust."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write the report: .html, .json or .csv.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Verify bundles offline, together: the federation's log from whoever has most of it, each site's own from its own."""
    console.OUTPUT.json = json
    if report is not None and report.suffix not in (".html", ".json", ".csv"):
        raise InputError(
            "no such form of report", where=str(report), expected=".html, .json or .csv", got=report.suffix
        )
    if report is not None and os.path.lexists(report):
        raise InputError("there is a file already", where=str(report), mend="choose another --report")
    if trust and len(trust) > 1:
        raise InputError(
            "one trust file", where="--trust", got=f"{len(trust)} of them", mend="put what you trust into one"
        )
    read = [read_bundle(path) for path in bundle]
    digests = [_digest_of(path) for path in bundle]
    if not trust:
        nothing, mend = (
            "nobody's keys are trusted, so nothing can be checked",
            "--trust TRUST.json, from a site (cloister audit trust)",
        )
        findings = Findings()
        findings.incomplete("no-trust", "--trust", f"{nothing}: {mend} or by hand from fingerprints")
        lines = [f"INCOMPLETE: {nothing}{'; no report is written' if report else ''}",
                 f"mend: {mend} or by hand from fingerprints"]  # fmt: skip
        console.emit(as_record((), findings, ()), lines)
        raise typer.Exit(2)
    keys = read_trust(trust[0])
    own = merged(read, keys)
    done = audit(own, keys)
    said = answers(own, done.trust, done.history, done.ledgers, done.blocks, done.findings)
    about = {
        "verified": f"{when(time.time())} by cloister {__version__}, dp-accounting {version('dp-accounting')}",
        "federation": f"{keys.name}, key {keys.federation.id.hex()}",
        "trust": f"{trust[0]}, of {keys.written_at or 'whoever wrote it by hand'}, SHA-256 {digest(trust[0].read_bytes())}",
        **{
            f"bundle {i}": f"{path}, by its own word made {when(one.made)}, SHA-256 {name}"
            for i, (path, one, name) in enumerate(zip(bundle, read, digests, strict=True), 1)
        },
    }
    record = as_record(said, done.findings, done.blocks) | {"about": about}
    if report is not None:
        title = f"Audit of {keys.name}"
        text = {
            ".html": lambda: as_html(said, done.findings, done.blocks, done.history, title, about),
            ".csv": lambda: as_csv(done.findings, done.blocks, f"{keys.name} {keys.federation.id.hex()}"),
            ".json": lambda: console.dumps(record),
        }[report.suffix]()
        _write_new(report, text.encode())
    lines = [f"{f.kind}: {f.where}: {f.what} ({f.code})" for f in done.findings.found]
    lines += [f"held: {printable(line)}" for line in done.findings.held]
    lines += [VERDICTS[done.findings.exit_code] + (f"; report in {report}" if report else "")]
    console.emit(record, lines)
    raise typer.Exit(done.findings.exit_code)


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_new(path: Path, data: bytes) -> None:
    """Writes a file that was not there; of two at once one does."""
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError as error:
        raise InputError("there is a file already", where=str(path), mend="choose another --report") from error
    except OSError as error:
        raise InputError("cannot write the report", where=str(path), got=error.strerror or "") from error


def main() -> None:
    """The command."""
    typer.core.HAS_RICH = False  # its plain help would be written with rich's escapes
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(verify)
    try:
        code = app(standalone_mode=False)
    except CloisterError as error:
        code = console.fail(error)
    except MemoryError:
        code = console.fail(
            InputError("there is not enough memory here for these bundles", mend="verify them on a larger machine")
        )
    except typer.Abort:
        code = 130
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own words on how it is used
            print(f"error: {error.format_message()}", file=sys.stderr)
            sys.exit(2)
        raise
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
