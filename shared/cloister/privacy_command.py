"""``cloister privacy status | plan``: what is spent and left at the sites here, and what a run would cost before it starts."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from cloister_shared import console
from cloister_shared.encoding import write_durably
from cloister_shared.errors import InputError
from cloister_shared.privacy import ACCOUNTANT, NEIGHBOURS, DpSgd, calibrate, epsilon

from cloister.privacy_plot import bars, svg

if TYPE_CHECKING:
    from cloister_client.standing import Standing

privacy_app = typer.Typer(no_args_is_help=True, help="Privacy budgets: what is spent and left, what a run would cost.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Home = Annotated[Path | None, typer.Option("--home", help="Folder of state.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.add_typer(privacy_app, name="privacy")


@privacy_app.command()
def status(
    site: Annotated[str | None, typer.Argument(help="The site; all by default.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the plot as SVG.")] = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Say per block of text what is spent, reserved and left, by run and model; from the site's own ledger."""
    console.choose(json, home)
    from cloister_client.data import open_ledger
    from cloister_client.site import act_as_agent, read_site

    folders = [console.site_home(site)] if site else console.site_homes()
    if not folders:
        raise InputError("no site here", where=str(console.OUTPUT.home), mend="cloister site enrol, or --home")
    own = [read_site(folder) for folder in folders]
    if len(own) > 1 and os.getuid() == 0 and any(s.isolated for s in own):
        raise InputError(
            "which site?",
            where=str(console.OUTPUT.home),
            got=", ".join(s.name for s in own),
            mend="name one: it has a user of its own",
        )
    found: dict[str, tuple[Standing, ...]] = {}
    units: dict[str, str] = {}
    for each in own:
        act_as_agent(each)
        ledger = open_ledger(each)
        found[each.name], units[each.name] = ledger.standings(), ledger.unit_field() or "record"
    record = {
        "accountant": ACCOUNTANT,
        "neighbours": NEIGHBOURS,
        "sites": [
            {
                "site": name,
                "unit": units[name],
                "blocks": [asdict(s) | {"left": s.left, "reserved": s.reserved} for s in standings],
            }
            for name, standings in found.items()
        ],
    }
    blocks = [(f"{name} {s.name}", s.spent, s.reserved, s.cap) for name, standings in found.items() for s in standings]
    if plot is not None:
        write_durably(plot, svg("Privacy budget by block of text", blocks).encode(), mode=0o644)
        record["plot"] = str(plot)
    _status_tables(record, found, units)
    if not console.OUTPUT.json:
        console.emit({}, ["", *bars(blocks), *([f"plot: {plot}"] if plot else [])])


def _status_tables(record: dict[str, Any], found: dict[str, tuple[Standing, ...]], units: dict[str, str]) -> None:
    console.table(
        record,
        f"{ACCOUNTANT}; a block's epsilon is for good, over all runs, models and coordinators",
        ("site", "block", "unit", "delta", "cap", "spent", "reserved", "left", "rounds", "steps"),
        [
            (
                name,
                s.name,
                units[name],
                f"{s.delta:g}",
                f"{s.cap:g}",
                f"{s.spent:.3f}",
                f"{s.reserved:.3f}",
                f"{s.left:.3f}",
                s.rounds,
                s.steps,
            )
            for name, standings in found.items()
            for s in standings
        ],
    )
    shares = [(name, s.name, share) for name, standings in found.items() for s in standings for share in s.shares]
    if console.OUTPUT.json or not shares:
        return
    console.table(
        {},
        ["", "by run and model, each alone (they do not add up: together they cost less than their sum)"],
        ("site", "block", "run", "model", "rounds", "steps", "epsilon"),
        [(n, b, x.run[:8], x.base[:8], x.rounds, x.steps, f"{x.epsilon:.3f}") for n, b, x in shares],
    )


@privacy_app.command()
def plan(
    federation: Annotated[Path | None, typer.Argument(help="FEDERATION.toml; without it, the options below.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Noise multiplier; prints epsilon.")] = None,
    target: Annotated[float | None, typer.Option("--epsilon", help="Target epsilon; prints sigma.")] = None,
    sample_rate: Annotated[float | None, typer.Option(help="Probability that a unit is in a batch.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="DP-SGD steps.")] = None,
    delta: Annotated[float, typer.Option(help="Delta.")] = 1e-5,
    json: Json = False,
    home: Home = None,
) -> None:
    """Say what a run costs before it starts, and which sites cannot finish it; or the cost of some steps."""
    console.choose(json, home)
    if federation is not None:
        if any(v is not None for v in (sigma, target, sample_rate, steps)):
            raise InputError(
                "a file and numbers", where="privacy plan", expected="FEDERATION.toml, or --sigma and the rest"
            )
        _plan_file(federation)
        return
    if sample_rate is None or steps is None or (sigma is None) == (target is None):
        raise InputError(
            "too little or too much to plan with",
            where="privacy plan",
            expected="FEDERATION.toml; or --sample-rate, --steps and one of --sigma and --epsilon",
        )
    if target is not None:
        sigma = calibrate(sample_rate, steps, target, delta)
    cost = epsilon([DpSgd(sigma or 0.0, sample_rate, steps)], delta)
    head = {} if target is None else {"sigma": sigma}
    console.emit(
        head | {"epsilon": cost},
        f"sigma {sigma:g}: epsilon {cost:.4f} at delta {delta:g} ({steps} steps at rate {sample_rate:g}; {ACCOUNTANT})",
    )


def _plan_file(path: Path) -> None:
    from cloister_server.accounting import charged_events
    from cloister_server.coordinator import open_coordinator
    from cloister_server.federation import read_federation
    from cloister_server.planning import forecast, knobs
    from cloister_server.store import Store

    started = time.monotonic()
    settings = read_federation(path)
    coordinator = open_coordinator(console.coordinator_home(), settings)
    cards = coordinator.sites()
    if not cards:
        raise InputError(
            "no site is admitted", where=str(coordinator.home / "sites"), mend="cloister coordinator admit CARD"
        )
    store = Store(coordinator.home)
    try:
        histories = {card.name: charged_events(store.history_of(card.verify_key.id.hex())) for card in cards}
    finally:
        store.close()
    found = [forecast(settings, card, histories[card.name], cards) for card in cards]
    middle = sorted(cards, key=lambda c: c.records)[len(cards) // 2]
    turned = knobs(settings, middle, cards)
    unable = [f.site for f in found if f.rounds < settings.rounds]
    deltas = [card.name for card in cards if card.delta != settings.delta]
    record = {
        "rounds": settings.rounds,
        "steps": settings.steps,
        "delta": settings.delta,
        "accountant": ACCOUNTANT,
        "sites": [asdict(f) for f in found],
        "knobs": {"site": middle.name, "changes": [asdict(k) for k in turned]},
        "cannot_finish": unable,
        "other_delta": deltas,
        "seconds": time.monotonic() - started,
    }
    console.table(
        record,
        f"{settings.rounds} rounds of {settings.steps} steps at delta {settings.delta:g} ({ACCOUNTANT})",
        (
            "site",
            "unit",
            "declared",
            "rate",
            "sigma",
            "epsilon of the run",
            "spent before",
            "together",
            "cap",
            "rounds it can do",
        ),
        [
            (
                f.site,
                f.unit,
                f.records,
                f"{f.sample_rate:.4f}",
                f"{f.noise_multiplier:.2f}",
                f"{f.epsilon:.3f}",
                f"{f.before:.3f}",
                f"{f.after:.3f}",
                f"{f.cap:g}",
                f"{f.rounds} of {settings.rounds}",
            )
            for f in found
        ],
    )
    if console.OUTPUT.json:
        return
    console.table(
        {},
        ["", f"what each knob costs, at {middle.name} ({middle.records} declared)"],
        ("change", "epsilon at this sigma", "sigma that keeps the target"),
        [
            (k.change, f"{k.epsilon:.3f}", "" if k.noise_multiplier is None else f"{k.noise_multiplier:.2f}")
            for k in turned
        ],
    )
    console.emit(
        {},
        [
            "",
            f"cannot finish within their caps: {', '.join(unable)}"
            if unable
            else "every site can finish within its cap, as far as this coordinator knows",
            *([f"would refuse this delta: {', '.join(deltas)}"] if deltas else []),
            "a site's own ledger is the authority: it may have spent elsewhere",
        ],
    )
