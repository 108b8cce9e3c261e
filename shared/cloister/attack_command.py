"""The ``cloister attack`` command: hostile clients against the product's own defence, and what came of each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from cloister_shared import console
from cloister_shared.errors import InputError

WORLD = {"sites": 20, "attackers": 4, "rounds": 2, "steps": 2, "batch": 48}
QUICK = {"sites": 10, "attackers": 2, "rounds": 2, "steps": 2, "batch": 32}
QUICK_RULES = ("mean", "nnm+geometric-median", "pipeline", "groups of 4")


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("attack")(attack)


def attack(
    quick: Annotated[
        bool, typer.Option("--quick", help="A few minutes: ten sites, text made here, four rules.")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Labelled text; made here where left out.")] = None,
    text: Annotated[str, typer.Option(help="The text's field.")] = "text",
    label: Annotated[str, typer.Option(help="The label's field.")] = "label",
    records: Annotated[int, typer.Option(min=200, help="At most so many records of it.")] = 8000,
    sites: Annotated[int, typer.Option(min=3, max=200, help="Clients, attackers among them.")] = WORLD["sites"],
    attackers: Annotated[int, typer.Option(min=1, help="How many of them attack.")] = WORLD["attackers"],
    alpha: Annotated[float, typer.Option(help="Dirichlet's, of labels over sites: less is more uneven.")] = 0.5,
    epsilon: Annotated[float, typer.Option(help="Epsilon of the run at every site; 0 for no privacy.")] = 0.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = WORLD["rounds"],
    steps: Annotated[int, typer.Option(min=1, help="Steps a round.")] = WORLD["steps"],
    batch: Annotated[int, typer.Option(min=1, help="Expected records a step.")] = WORLD["batch"],
    only: Annotated[list[str] | None, typer.Option(help="Attacks; all where left out.")] = None,
    rules: Annotated[list[str] | None, typer.Option(help="Rules; all where left out.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of partition and attacks; never of noise or samples.")] = 7,
    out: Annotated[
        Path | None, typer.Option(help="Keep each result as a JSON line; what is there is not run again.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Attack a federation on this machine with hostile clients, and tell what each rule let in."""
    console.choose(json_output, None)
    if not (2 * attackers < sites and 0 < alpha < 1e6 and (epsilon == 0 or 0.05 <= epsilon <= 1000)):
        raise InputError(
            "the world is out of range",
            where="--attackers, --alpha, --epsilon",
            expected="attackers below half the sites, alpha > 0, epsilon 0 or 0.05 to 1000",
            got=f"{attackers} of {sites}, {alpha:g}, {epsilon:g}",
        )
    from cloister_model.quiet import quieten

    quieten()
    from cloister_model.text import Record, Source, read

    from cloister.arena import GROUPED, RULES, Arena, Setting, cells
    from cloister.attacks import ATTACKS
    from cloister.malformed import try_all
    from cloister.synthetic import make_silo

    world = {"sites": sites, "attackers": attackers, "rounds": rounds, "steps": steps, "batch": batch}
    if quick and (said := [name for name, now in world.items() if now != WORLD[name]]):
        raise InputError("--quick is a world of its own", where=f"--{said[0]}", mend="leave out --quick, or the other")
    if data is not None and not data.is_file():
        raise InputError("no such file", where="--data", got=str(data))
    _among("--only", only, list(ATTACKS))
    _among("--rules", rules, [*RULES, GROUPED])
    accepted = _malformed(try_all())
    setting = Setting(**(QUICK if quick else world), alpha=alpha, epsilon=epsilon or None, seed=seed)
    if data is None:
        made = [r for silo in range(setting.sites) for r in make_silo(silo, 200, seed)]
        rows = [Record(r["text"], r["label"]) for r in made]
    else:
        rows = list(read(Source(data, text, label)))[:records]
    where = f"epsilon {epsilon:g}" if epsilon else "no privacy"
    source = "text made here" if data is None else str(data)
    console.emit(
        {"setting": vars(setting), "text": source},
        f"{setting.attackers} of {setting.sites} clients attack; Dirichlet {alpha:g}, {where}, {setting.rounds} rounds of LoRA; {source}",
    )
    kept = [json.loads(line) for line in out.read_text().splitlines()] if out is not None and out.exists() else []
    mine = [r for r in kept if all(r[name] == value for name, value in vars(setting).items())]
    known = {(r["attack"], r["rule"]): r for r in mine}
    arena = Arena(rows, setting)
    chosen = rules or list(QUICK_RULES if quick else (*RULES, GROUPED))
    for got in cells(arena, only or list(ATTACKS), chosen, lambda a, r: (a, r) in known):
        known[got["attack"], got["rule"]] = got
        if out is not None:
            with out.open("a") as handle:
                handle.write(json.dumps(got) + "\n")
        console.emit(got, _line(got))
    _report(list(known.values()), chosen)
    if accepted:
        raise typer.Exit(1)


def _among(option: str, given: list[str] | None, choices: Sequence[str]) -> None:
    if odd := sorted(set(given or ()) - set(choices)):
        raise InputError("no such name", where=option, expected=", ".join(choices), got=", ".join(odd))


def _malformed(replies: dict[str, Any]) -> list[str]:
    """Prints what malformed frames came to; returns those that were accepted."""
    wrong = [name for name, reply in replies.items() if (reply.verdict == "accepted") != (name == "honest")]
    for name, reply in replies.items():
        told = f"  {name:38} {reply.verdict:13} {reply.reason.splitlines()[0][:90] if reply.reason else ''}"
        console.emit({"malformed": name, "verdict": reply.verdict, "reason": reply.reason}, told)
    summary = f"malformed frames: {len(replies) - 1 - len(wrong)} of {len(replies) - 1} refused"
    console.emit({"malformed_accepted": wrong}, summary + (f"; WRONG: {', '.join(wrong)}" if wrong else ""))
    return wrong


def _line(got: dict[str, Any]) -> str:
    refused = "" if got["refused"] is None else f", {got['refused']:g} honest sites without weight"
    weight = "" if got["weight"] is None else f", attackers' weight {got['weight']:.2f}"
    held = f", {got['held']} rounds held" if got["held"] else ""
    return (
        f"  {got['attack']:17} {got['rule']:21} accuracy {got['accuracy']:.3f}, trigger works {got['triggered']:.2f}"
        f"{refused}{weight}{held}"
    )


def success(got: dict[str, Any], clean: dict[str, Any] | None) -> float:
    """What an attack reached, 0 to 1: a backdoor's share of triggered records, a free rider's or a copy's weight, else accuracy lost."""
    if got["attack"] == "backdoor":
        return float(got["triggered"])
    if got["attack"] == "free rider":
        return math.nan if got["weight"] is None else float(got["weight"])
    return math.nan if clean is None else max(0.0, float(clean["accuracy"] - got["accuracy"]))


def _report(found: list[dict[str, Any]], rules: Sequence[str]) -> None:
    """The table: accuracy and success by attack and rule, and honest sites without weight."""
    by = {(r["attack"], r["rule"]): r for r in found}
    rows = []
    for attack in dict.fromkeys(r["attack"] for r in found):
        cells = []
        for rule in rules:
            got = by.get((attack, rule))
            cells.append("" if got is None else _cell(got, by.get(("none", rule))))
        rows.append([attack, *cells])
    title = (
        "accuracy / success (accuracy lost; of a backdoor: triggered records that went its way; of a free rider: its weight)"
        " / honest sites without weight"
    )
    if not console.OUTPUT.json:
        console.table({}, title, ["attack", *rules], rows)


def _cell(got: dict[str, Any], clean: dict[str, Any] | None) -> str:
    reached = success(got, clean)
    told = "-" if math.isnan(reached) else f"{reached:.2f}"
    refused = "-" if got["refused"] is None else f"{got['refused']:g}"
    return f"{got['accuracy']:.3f} / {told} / {refused}"
