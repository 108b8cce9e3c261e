"""``cloister rounds hold | release | holds | give-up``: which adapters are kept whatever happens, and which are given up."""

from __future__ import annotations

from typing import Annotated

import typer
from cloister_shared import console

from cloister_server.here import Home, Json, RunName, because, registry, registry_to_change

Why = Annotated[str, typer.Option(help="A word for whoever reads the log.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the rounds' group."""
    app.command()(hold)
    app.command()(release)
    app.command()(holds)
    app.command("give-up")(give_up)


def hold(
    number: Annotated[int, typer.Argument(help="The round.")],
    why: Why,
    run_name: RunName = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Keep a round's adapter until the hold is released, whoever gives the round up."""
    console.choose(json, home)
    store = registry_to_change()
    run = store.find_run(run_name)
    made = store.hold(run.id, number, because(why))
    console.emit(made.model_dump(), f"hold {made.id}: round {number} of run {run.id[:8]}, adapter {made.adapter[:16]}")


def release(
    hold_id: Annotated[int, typer.Argument(metavar="HOLD", help="The hold's number.")],
    why: Why,
    json: Json = False,
    home: Home = None,
) -> None:
    """End a hold."""
    console.choose(json, home)
    ended = registry_to_change().release_hold(hold_id, because(why))
    line = f"hold {hold_id}, of round {ended.number} of run {ended.run[:8]}: released; {why}"
    console.emit(ended.model_dump() | {"released_why": why}, line)


def holds(json: Json = False, home: Home = None) -> None:
    """List holds, and adapters that were given up."""
    console.choose(json, home)
    store = registry()
    found, gone = store.holds(), store.tombstones()
    cells = [
        [h.id, h.run[:8], h.number, h.adapter[:12], "released" if h.released is not None else "held", h.why]
        for h in found
    ]
    cells += [["", t.run[:8], t.number, t.adapter[:12], "given up", t.why] for t in gone.values()]
    record = {"holds": [h.model_dump() for h in found], "given_up": [t.model_dump() for t in gone.values()]}
    console.table(record, "holds", ["hold", "run", "round", "adapter", "state", "why"], cells)


def give_up(
    number: Annotated[int, typer.Argument(help="The round.")],
    why: Why,
    run_name: RunName = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Give up a round's adapter: its record and its leaf stay, its file goes with the next registry gc."""
    console.choose(json, home)
    store = registry_to_change()
    run = store.find_run(run_name)
    gone = store.give_up(run.id, number, because(why))
    console.emit(
        gone.model_dump() | {"refunded": 0.0},
        [
            f"round {number} of run {run.id[:8]}: adapter {gone.adapter[:16]} is given up; cloister registry gc takes its file",
            "no privacy is refunded, and copies that others have are theirs",
        ],
    )
