"""What the coordinator's commands share: their usual options, and the registry in the folder of state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from cloister_shared import console
from cloister_shared.errors import StateError

from cloister_server.storage import has_registry
from cloister_server.store import Store

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Home = Annotated[Path | None, typer.Option("--home", help="Folder of state.")]
RunName = Annotated[str | None, typer.Option("--run", help="Beginning of the run's id; the newest by default.")]


def registry() -> Store:
    """The registry of the coordinator that is here.

    Raises:
        StateError: There is none.
    """
    home = console.coordinator_home()
    if not has_registry(home):
        raise StateError("no registry here", where=str(home), mend="cloister demo, cloister run, or --home")
    return Store(home)
