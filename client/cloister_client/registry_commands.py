"""What a site asks of the coordinator's registry: ``cloister site registered | rounds | pull``; what is kept is verified first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from cloister_shared import console
from cloister_shared.encoding import canonical, write_durably
from cloister_shared.errors import InputError, RefusedError, StateError
from cloister_shared.signing import VerifyKey

from cloister_client.data import open_ledger
from cloister_client.options import Home, Json, Site
from cloister_client.site import read_site


def register(app: typer.Typer) -> None:
    """Adds the commands to the site's group."""
    app.command()(registered)
    app.command("rounds")(list_rounds)
    app.command()(pull)


def registered(
    site: Site = None,
    run: Annotated[str, typer.Option("--run", help="A run's whole id; all by default.")] = "",
    json: Json = False,
    home: Home = None,
) -> None:
    """Ask the coordinator's registry what it holds about this site's part in rounds."""
    console.choose(json, home)
    from cloister_client.registry import rounds

    own = read_site(console.site_home(site))
    found = rounds(own, run)
    cells = [
        [r["run"][:8], r["number"], r["state"], r["verdict"], f"{r['epsilon']:.4f}", f"{r['delta']:g}", r["reason"]]
        for r in found
    ]
    title = f"site {own.name}: what the coordinator registered of it; the ledger here is the authority on epsilon"
    columns = ["run", "round", "state", "verdict", "epsilon", "delta", "reason"]
    console.table({"site": own.name, "rounds": found}, title, columns, cells)


def list_rounds(
    number: Annotated[int | None, typer.Argument(help="A round to prove; without it, all are listed.")] = None,
    run: Annotated[str, typer.Option(help="The run's id; with a round, the newest by default.")] = "",
    site: Site = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """List the federation's rounds, or fetch one with the proof that the log has it."""
    console.choose(json, home)
    from cloister_client.fetching import fetch_round, fetch_rounds, heads_known

    own = read_site(console.site_home(site))
    found = fetch_rounds(own, run)
    if number is None:
        cells = [[r["run"][:8], r["number"], r["state"], r["adapter"][:12], r["rule"]] for r in found]
        console.table(
            {"rounds": found}, "rounds, by the coordinator's word", ["run", "round", "state", "adapter", "rule"], cells
        )
        return
    if not found:
        raise InputError("the federation has no rounds yet", where=own.name)
    said = fetch_round(own, run or found[-1]["run"], number, heads_known(own, open_ledger(own)))
    console.emit(
        said,
        f"round {number} of run {said['run'][:8]}: leaf {said['index']} of the log, proven; adapter {said['adapter'][:16]},"
        f" {len(said.get('clients', []))} clients, code {said['code']}",
    )


def pull(
    alias: Annotated[str, typer.Argument(help="The alias that the coordinator promoted.")],
    guard: Annotated[
        str, typer.Option(help="Take it only where this operator's public key (64 hex digits) guards the alias.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder to make; pulled/ALIAS in the site's folder by default.")
    ] = None,
    site: Site = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Fetch the adapter that an alias points at; log, moves and operator's signatures are checked before anything is kept."""
    console.choose(json, home)
    from cloister_client.fetching import fetch_release, heads_known

    own = read_site(console.site_home(site))
    ledger = open_ledger(own)
    wanted = VerifyKey.from_hex(guard, "--guard").raw.hex() if guard else ""
    got = fetch_release(own, alias, lambda: heads_known(own, ledger))
    if wanted and got.guard != wanted:
        raise RefusedError(
            "registry.guarded",
            "this operator does not guard the alias",
            where=alias,
            expected=f"key {_key_id(wanted)}",
            got=f"key {_key_id(got.guard)}" if got.guard else "nobody's key",
            mend="ask the operator that you trust whether the alias is theirs",
        )
    folder = out or own.home / "pulled" / f"{alias}-{got.run[:8]}-{got.number}"
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise InputError("there is a folder already", where=str(folder), mend="choose another --out") from error
    except OSError as error:
        raise StateError(
            "no folder can be made there",
            where=str(folder)[:200],
            got=error.strerror or "",
            mend="choose another --out",
        ) from error
    write_durably(folder / "adapter.safetensors", got.adapter, mode=0o644)
    write_durably(folder / "release.json", canonical(got.record) + b"\n", mode=0o644)
    name = got.record["commit"]["adapter"]
    by = f"guarded by its operator, key {_key_id(got.guard)}" if got.guard else "guarded by no operator's key"
    console.emit(
        {"alias": alias, "run": got.run, "round": got.number, "adapter": name, "guard": got.guard, "path": str(folder)},
        [
            f"{alias}: round {got.number} of run {got.run[:8]}, adapter {name[:16]}, its newest move in the log and {by}: {folder}",
            "it is the adapter as the registry has it; what PEFT loads is the coordinator's `cloister rounds export`, whose"
            " registered.safetensors is this very file",
        ],
    )


def _key_id(key: str) -> str:
    return VerifyKey.from_hex(key, "key").id.hex()
