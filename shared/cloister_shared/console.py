"""How commands talk: JSON where asked for, plain lines otherwise, one line for an error, stable exit codes; and where state lives.

State lives under ``--home``, or CLOISTER_HOME, or ``./.cloister``: ``coordinator/`` and ``sites/NAME/``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cloister_shared.errors import CloisterError, InputError


@dataclass
class Output:
    """The choices of this call.

    Attributes:
        json: Whether to print JSON.
        home: The folder of state.
    """

    json: bool = False
    home: Path = Path(".cloister")


OUTPUT = Output()


def choose(json_output: bool, home: Path | None) -> None:
    """Sets the choices of this call; a sub-command's option counts over the outer one."""
    OUTPUT.json = OUTPUT.json or json_output
    if home is not None:
        OUTPUT.home = home
    OUTPUT.home = OUTPUT.home.expanduser()


def default_home() -> Path:
    """CLOISTER_HOME, or ``./.cloister``."""
    return Path(os.environ.get("CLOISTER_HOME") or ".cloister")


def coordinator_home() -> Path:
    """The coordinator's folder."""
    return OUTPUT.home / "coordinator"


def site_homes() -> list[Path]:
    """Folders of the sites here, by name."""
    return sorted(path.parent for path in (OUTPUT.home / "sites").glob("*/site.toml"))


def site_home(name: str | None) -> Path:
    """A site's folder; the only one where no name is given.

    Raises:
        InputError: There is none, or several.
    """
    if name is not None:
        return OUTPUT.home / "sites" / name
    found = site_homes()
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(
            "which site?",
            where=str(OUTPUT.home),
            expected="one site, or its name",
            got=names,
            mend="name the site, or choose --home",
        )
    return found[0]


def begin(what: str) -> None:
    """Says on stderr what takes its time now; nothing where JSON was asked for."""
    if not OUTPUT.json:
        print(_printable(f"{what} …"), file=sys.stderr, flush=True)


def dumps(record: dict[str, Any]) -> str:
    """A record as JSON for a file."""
    return json.dumps(record, sort_keys=True, indent=1) + "\n"


def emit(record: dict[str, Any], lines: str | Iterable[str]) -> None:
    """Prints one JSON line, or the lines."""
    if OUTPUT.json:
        print(json.dumps(record, sort_keys=True), flush=True)
    else:
        for line in [lines] if isinstance(lines, str) else lines:
            print(line, flush=True)


def table(
    record: dict[str, Any], title: str | Sequence[str], columns: Sequence[str], rows: Iterable[Sequence[object]]
) -> None:
    """Prints one JSON line, or a table under its title, of one line or several."""
    if OUTPUT.json:
        print(json.dumps(record, sort_keys=True), flush=True)
        return
    grid = Table(header_style="bold", box=None, pad_edge=False)
    for column in columns:
        grid.add_column(
            column,
            justify="left" if column in (columns[0], "reason", "verdict", "state") else "right",
            no_wrap=column not in ("reason",),
        )
    for row in rows:
        grid.add_row(*[Text(_printable(str(cell))) for cell in row])
    console = Console(width=None if sys.stdout.isatty() else 160)
    for line in [title] if isinstance(title, str) else title:
        console.print(Text(_printable(line)), soft_wrap=True)
    console.print(grid)


def fail(error: CloisterError) -> int:
    """Says an error to a person or a program; returns the exit code."""
    if OUTPUT.json:
        print(json.dumps(error.as_dict(), sort_keys=True), flush=True)
    else:
        print(_printable(f"error: {error}"), file=sys.stderr, flush=True)
    return error.exit_code


def _printable(text: str) -> str:
    # What a file or a peer says stands in messages and tables too: it moves no cursor and begins no line.
    return "".join(c if c.isprintable() else "?" for c in text)
