"""``cloister rounds export | import``: a round as a folder that PEFT loads and anybody can check, and such a folder into a registry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from cloister_shared import console
from cloister_shared.audit.trust import read_trust
from cloister_shared.errors import InputError

from cloister_server.here import Home, Json, RunName, public_key, registry_to_change


def register(app: typer.Typer) -> None:
    """Adds the commands to the rounds' group."""
    app.command()(export)
    app.command("import")(import_folder)


def export(
    number: Annotated[int | None, typer.Argument(help="The round; the last committed by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make.")] = None,
    run_name: RunName = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Export a registered round: a folder that PEFT loads, with its card and its signed statement."""
    console.choose(json, home)
    store = registry_to_change()
    found = store.find_run(run_name)
    chosen = number if number is not None else store.last_committed(found.id).number
    console.begin(f"checking round {chosen} of run {found.id[:8]} against the log, and writing it")
    # Brings torch and PEFT along.
    from cloister_server.export import export_round

    default = console.OUTPUT.home / "exports" / f"{found.federation}-{found.id[:8]}-round-{chosen}"
    folder = export_round(store, found, chosen, out or default)
    console.emit(
        {"run": found.id, "round": chosen, "path": str(folder), "key": store.signing.verify_key.raw.hex()},
        f"round {chosen} of run {found.id[:8]}: {folder}; its statement is signed by {store.signing.verify_key.id.hex()}",
    )


def import_folder(
    folder: Annotated[Path, typer.Argument(help="An export of another federation.")],
    trust: Annotated[
        Path | None, typer.Option(help="Trust file of that federation, from elsewhere: cloister audit trust.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Or its key, 64 hex digits, from elsewhere.")] = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Register a round that another federation exported, after everything of it was checked."""
    console.choose(json, home)
    if (trust is None) == (key is None):
        raise InputError("whose export is it?", where="rounds import", expected="--trust TRUST.json, or --key HEX")
    store = registry_to_change()
    console.begin(f"checking {folder}")
    from cloister_server.coordinator import open_coordinator
    from cloister_server.importing import import_round

    coordinator = open_coordinator(console.coordinator_home())
    by = read_trust(trust).federation if trust is not None else public_key(key or "", "--key")
    run = import_round(store, folder, by, coordinator.card.federation, coordinator.card.base)
    adapter = store.rounds(run.id)[0].adapter or ""
    console.emit(
        {"run": run.id, "round": 0, "adapter": adapter, "key": by.raw.hex()},
        [
            f"{folder}: signature, log proof, files and tensors hold; registered as round 0 of run {run.id[:8]}, adapter {adapter[:16]}",
            f"next: cloister rounds promote ALIAS 0 --run {run.id[:8]}",
        ],
    )
