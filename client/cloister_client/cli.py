"""The site's commands: ``cloister site enrol | rejoin | peer | up | status``, and those of its text, the registry and the audit."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from cloister_model.text import Source, read
from cloister_shared import console
from cloister_shared.cards import read_coordinator_card, read_site_card
from cloister_shared.errors import CloisterError, InputError, StateError
from cloister_shared.invitation import Invitation
from cloister_shared.processes import Group, free_port

from cloister_client import audit_command, data_commands, registry_commands
from cloister_client.data import add as add_text
from cloister_client.options import Home, Json, Site
from cloister_client.policy import Policy, add_peer, read_policy
from cloister_client.site import AGAIN, begin_again, held_up, is_up, read_site, take_over
from cloister_client.site import enrol as make_site
from cloister_client.status import Status, read_status
from cloister_client.supervise import Running, check_users, link_line

site_app = typer.Typer(no_args_is_help=True, help="What an organisation that owns text runs.")
site_app.add_typer(data_commands.data_app, name="data")


def register(app: typer.Typer) -> None:
    """Adds the site's commands and the audit's."""
    registry_commands.register(site_app)
    app.add_typer(site_app, name="site")
    audit_command.register(app)


@site_app.command()
def enrol(
    name: Annotated[
        str, typer.Argument(help="A token; - reads one from standard input; or, with --coordinator, the site's name.")
    ],
    data: Annotated[Path, typer.Option(help="Private text: JSONL, CSV or Parquet, plain or gzipped.")],
    coordinator: Annotated[
        Path | None,
        typer.Option(help="The coordinator's card.json, from a channel you trust, where there is no token."),
    ] = None,
    text: Annotated[str, typer.Option(help="The text's field.")] = "text",
    label: Annotated[str, typer.Option(help="The label's field.")] = "label",
    unit_field: Annotated[
        str,
        typer.Option(help="Field whose value makes a privacy unit (a patient's id); each record is one by default."),
    ] = "",
    records: Annotated[
        int, typer.Option(min=1, help="Declared, public number of units; it fixes the sample rate.")
    ] = 1000,
    epsilon_cap: Annotated[float, typer.Option(help="Lifetime cap on epsilon for this text.")] = 8.0,
    delta: Annotated[float, typer.Option(help="Delta of the cap.")] = 1e-5,
    least_noise: Annotated[float, typer.Option(help="Least noise multiplier.")] = 0.3,
    least_cohort: Annotated[int, typer.Option(min=1, help="Fewest clients in a round.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    base: Annotated[str, typer.Option(help="Base model: minilm or a folder; the coordinator's by default.")] = "",
    json: Json = False,
    home: Home = None,
) -> None:
    """Make this site's keys and policy here, and join: with a token, or by handing over a card."""
    console.choose(json, home)
    invitation = None
    if coordinator is None:
        from cloister_client.registry import look

        invitation = Invitation.from_token(_token(name))
        name, card = invitation.site, look(invitation)
    else:
        card = read_coordinator_card(coordinator)
    if device not in ("auto", "cpu", "cuda"):
        raise InputError("unknown device", where="--device", expected="auto, cpu or cuda", got=device)
    classify = card.task == "text-classification"
    source = Source(data.expanduser().resolve(), text, label if classify else "", unit_field)
    found = sum(1 for _ in read(source, card.labels if classify else None))
    policy = Policy(
        (card.base,),
        (card.task,),
        card.target_modules,
        card.rank,
        epsilon_cap,
        delta,
        least_noise,
        least_cohort,
        1000,
        "preferred",
    )
    folder = console.OUTPUT.home / "sites" / name
    fresh = not folder.exists()
    own = make_site(
        folder,
        name,
        card,
        policy,
        base=base or card.base_source,
        records=records,
        runtime_port=free_port(),
        unit="field" if unit_field else "record",
        device=device,
    )
    if invitation is not None:
        from cloister_client.registry import enrol as join

        try:
            join(invitation, card, folder, name)
        except CloisterError:
            # No text is registered yet, and keys that nobody certified are worth nothing.
            if fresh:
                shutil.rmtree(folder)
            raise
    added = add_text(read_site(folder), source)
    console.emit(
        {
            "site": name,
            "joined": invitation is not None,
            "home": str(folder),
            "units": added.units,
            "card": str(folder / "card.json"),
            "coordinator": card.fingerprint,
            "key": own.verify_key.id.hex(),
        },
        [
            f"site {name}: {found} records read and checked, {added.units} units registered, {records} declared",
            f"coordinator {card.federation}: fingerprint {card.fingerprint} (compare it with theirs)",
            f"policy: {folder / 'policy.toml'} (yours to edit)",
            f"hand over: {folder / 'card.json'} (fingerprint {own.verify_key.id.hex()})"
            if invitation is None
            else f"joined: the coordinator has this site's card (fingerprint {own.verify_key.id.hex()}) and certified its key",
            f"next: cloister site up {name}",
        ],
    )


@site_app.command()
def rejoin(
    token: Annotated[str, typer.Argument(help="A token for this site's name; - reads one from standard input.")],
    json: Json = False,
    home: Home = None,
) -> None:
    """Join again after a revocation: fresh keys, the old ledger. What was spent on this site's text stays spent."""
    console.choose(json, home)
    from cloister_client.registry import IDENTITY, look
    from cloister_client.registry import enrol as join

    invitation = Invitation.from_token(_token(token))
    site = read_site(console.site_home(invitation.site))
    with held_up(site.home):
        if not (site.home / AGAIN / IDENTITY).is_file():
            card = look(invitation)
            again = begin_again(site.home, card, read_policy(site.home / "policy.toml"))
            join(invitation, card, again, site.name)
        # Else an earlier call broke off with its certificate in hand: it is finished, and this token is not spent.
        own = take_over(site.home)
    key = own.verify_key.id.hex()
    console.emit(
        {"site": site.name, "key": key, "coordinator": site.coordinator().fingerprint},
        [
            f"site {site.name}: joined again with fresh keys (fingerprint {key}); ledger, registered text and policy are as they were",
            "sites under secure aggregation accept it as a peer anew: cloister site peer, with its new card",
            f"next: cloister site up {site.name}",
        ],
    )


def _token(given: str) -> str:
    if given == "-" and sys.stdin.isatty():
        print("paste the token, then Enter:", file=sys.stderr, flush=True)
    return sys.stdin.readline() if given == "-" else given


@site_app.command()
def peer(
    card: Annotated[Path, typer.Argument(help="Another site's card.json, from a channel you trust.")],
    site: Site = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Accept another site as a peer: in sums under masks only accepted peers count as company."""
    console.choose(json, home)
    own, other = read_site(console.site_home(site)), read_site_card(card)
    if other.key == read_site_card(own.home / "card.json").key:
        raise InputError(
            "this is the site's own card", where=str(card), expected="another site's", mend="ask theirs for it"
        )
    peers = add_peer(own.home / "policy.toml", other.key)
    key = other.verify_key.id.hex()
    console.emit(
        {"site": own.name, "peer": other.name, "key": key, "peers": len(peers)},
        [
            f"site {own.name}: accepts {other.name}, fingerprint {key} (compare it with theirs); {len(peers)} peers now",
            "the agent reads it at its next start: cloister site up",
        ],
    )


@site_app.command()
def up(
    name: Annotated[str | None, typer.Argument(help="The site; the only one by default.")] = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Run this site: agent, relay and SuperNode, until stopped."""
    console.choose(json, home)
    site = read_site(console.site_home(name))
    check_users(site)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with held_up(site.home), Group() as group:

        def ended(line: str) -> None:
            console.emit({"event": "ended", "what": line}, f"site {site.name}: {line}")

        running = Running(site, group, ended)
        console.emit({"event": "starting", "site": site.name}, f"site {site.name}: starting the agent")
        running.start_agent()
        status = running.wait_agent()
        running.start_link()
        console.emit({"event": "ready"} | asdict(status), _ready_lines(status))
        last = status
        from cloister_client.registry import Renewer

        renewer = Renewer(
            site, lambda line: console.emit({"event": "certificate", "what": line}, f"site {site.name}: {line}")
        )
        while not stop.wait(0.5):
            running.check()
            renewer.check()
            try:
                status = read_status(site.agent_home / "status.json")
            except StateError:
                continue
            if (status.round, status.step, status.state, status.refusal) != (
                last.round,
                last.step,
                last.state,
                last.refusal,
            ):
                console.emit({"event": "status"} | asdict(status), progress_line(status))
                last = status


def _ready_lines(status: Status) -> list[str]:
    apart = (
        "agent and relay are different users"
        if status.isolated
        else "NOT ISOLATED: agent and relay run as one user (see [processes] in site.toml)"
    )
    return [
        f"site {status.site}: ready with {status.records} records",
        f"  device   {status.device}",
        f"  sandbox  {status.sandbox}",
        f"  users    {apart}",
        f"  budget   epsilon {status.epsilon:.3f} of {status.cap:g} spent at delta {status.delta:g}",
    ]


def progress_line(status: Status) -> str:
    """One line on where a site stands; shown to its owner alone."""
    if status.refusal and status.state == "ready":
        return f"site {status.site}: refused: {status.refusal}"
    loss = f"loss {status.loss:.3f}  " if status.loss is not None else ""
    left = max(0.0, status.cap - status.epsilon)
    place = f"round {status.round}/{status.rounds} step {status.step}/{status.steps}"
    return f"site {status.site}: {place}  {loss}budget left {left:.3f} of {status.cap:g}"


@site_app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="The site; all by default.")] = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Say how this site stands: its agent, isolation and budget."""
    console.choose(json, home)
    folders = [console.site_home(name)] if name else console.site_homes()
    if not folders:
        raise InputError("no site here", where=str(console.OUTPUT.home), mend="cloister site enrol, or --home")
    for folder in folders:
        site = read_site(folder)
        try:
            one = read_status(site.agent_home / "status.json")
        except StateError:
            one = Status(site.name, state="never started")
        running, link = is_up(folder), link_line(folder)
        lines = [
            f"site {one.site}: {one.state if running or not one.updated else f'not running (cloister site up); was {one.state}'}",
            *(_ready_lines(one)[1:] if one.updated else []),
            *([f"  link     {link}"] if link and running else []),
            *([progress_line(one)] if one.round else []),
        ]
        console.emit(asdict(one) | {"running": running, "link": link if running else ""}, lines)
