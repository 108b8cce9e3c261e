"""The options that every command of a site takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Home = Annotated[Path | None, typer.Option("--home", help="Folder of state.")]
Site = Annotated[str | None, typer.Option("--site", help="The site; the only one by default.")]
