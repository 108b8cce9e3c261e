"""What the coordinator's commands share: their usual options, and the registry in the folder of state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from cloister_shared import console
from cloister_shared.errors import InputError, StateError, VerificationError
from cloister_shared.signing import VerifyKey

from cloister_server.storage import has_registry
from cloister_server.store import Store

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Home = Annotated[Path | None, typer.Option("--home", help="Folder of state.")]
RunName = Annotated[str | None, typer.Option("--run", help="Beginning of the run's id; the newest by default.")]


def because(why: str) -> str:
    """Why something is done, as it stays in the log.

    Raises:
        InputError: It says nothing, or more than one line.
    """
    if not why.strip() or not why.isprintable() or len(why) > 1000:
        raise InputError("why?", where="--why", expected="one line of words that stay in the log", got=repr(why)[:80])
    return why.strip()


def public_key(text: str, option: str) -> VerifyKey:
    """A public key that somebody typed.

    Raises:
        InputError: It is none.
    """
    try:
        return VerifyKey.from_hex(text, option)
    except VerificationError as error:
        raise InputError(error.what, where=option, expected=error.expected, got=text[:80]) from error


def registry_to_change() -> Store:
    """The registry of the coordinator that is here, whose log is still the one that sites saw.

    Raises:
        StateError: There is none.
        RollbackError: It is not.
    """
    store = registry()
    store.check_history()
    return store


def registry() -> Store:
    """The registry of the coordinator that is here.

    Raises:
        StateError: There is none.
    """
    home = console.coordinator_home()
    if not has_registry(home):
        raise StateError(
            "no registry here",
            where=str(home),
            mend="cloister coordinator init FEDERATION.toml, or --home; one that was here: restore it from a copy",
        )
    return Store(home)
