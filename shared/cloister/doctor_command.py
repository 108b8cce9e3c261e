"""``cloister doctor``: says what is wrong with this installation and with what is here, and the mend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from cloister_shared import console

from cloister.doctor import NOTE, OK, WRONG, Look, looks

_WORDS = {OK: "ok   ", NOTE: "note ", WRONG: "WRONG"}
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Home = Annotated[Path | None, typer.Option("--home", help="Folder of state.")]


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("doctor")(doctor)


def doctor(json: Json = False, home: Home = None) -> None:
    """Say what is wrong here, and the mend; exit code 1 where something is."""
    console.choose(json, home)
    console.begin("looking at what is installed, the coordinator and the sites here")
    found = list(looks(console.OUTPUT.home, console.coordinator_home(), console.site_homes()))
    wrong = [one for one in found if one.state == WRONG]
    lines = [f"{_WORDS[one.state]}  {one.what}: {one.found}" + _mend(one) for one in found]
    lines.append(f"{len(wrong)} of {len(found)} looks found something wrong" if wrong else "nothing is wrong")
    console.emit({"looks": [vars(one) for one in found], "wrong": len(wrong)}, lines)
    if wrong:
        raise typer.Exit(1)


def _mend(one: Look) -> str:
    return f"\n       mend: {one.mend}" if one.mend and one.state != OK else ""
