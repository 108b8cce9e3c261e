"""The coordinator's commands: ``cloister coordinator init | admit | invite | revoke | up``, ``cloister run``, ``cloister rounds …``."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from cloister_shared import console
from cloister_shared.cards import SiteCard, split_address
from cloister_shared.errors import InputError, StateError
from cloister_shared.processes import Group, check_port
from cloister_shared.signing import SigningKey, VerifyKey

from cloister_server import export_commands, keeping_commands, release_commands, round_commands, upkeep
from cloister_server.coordinator import admit_site, open_coordinator
from cloister_server.coordinator import init as make_coordinator
from cloister_server.federation import read_federation
from cloister_server.here import Home, Json
from cloister_server.operators import sign_file, whose_move
from cloister_server.progress import event_line
from cloister_server.store import Store

_TELLS = 3
coordinator_app = typer.Typer(no_args_is_help=True, help="Create and serve a federation.")
rounds_app = typer.Typer(no_args_is_help=True, help="Look at registered rounds.")
for _commands in (round_commands, release_commands, keeping_commands, export_commands):
    _commands.register(rounds_app)


def register(app: typer.Typer) -> None:
    """Adds the coordinator's commands."""
    app.add_typer(coordinator_app, name="coordinator")
    app.add_typer(rounds_app, name="rounds")
    app.add_typer(upkeep.registry_app, name="registry")
    app.command("run")(run)


@coordinator_app.command()
def init(
    federation: Annotated[Path, typer.Argument(help="FEDERATION.toml.")], json: Json = False, home: Home = None
) -> None:
    """Make the coordinator's keys, and the card that sites enrol with."""
    console.choose(json, home)
    from cloister_flower.bundle import build_bundle
    from cloister_model.base import find_base

    settings = read_federation(federation)
    if settings.held_out is not None and not settings.held_out.path.is_file():
        raise InputError(
            "the held-out text is not there", where=f"{federation} [held_out] path", got=str(settings.held_out.path)
        )
    folder = console.coordinator_home()
    card = make_coordinator(folder, settings, find_base(settings.base, f"{federation} base").digest, build_bundle()[1])
    store = Store(folder)  # a registry that is missing from now on was lost
    store.blobs.claim(store.origin)
    store.close()
    console.emit(
        {
            "federation": card.federation,
            "home": str(folder),
            "card": str(folder / "card.json"),
            "fingerprint": card.fingerprint,
            "base": card.base,
        },
        [
            f"federation {card.federation}: made in {folder}",
            f"hand to each site: {folder / 'card.json'} (fingerprint {card.fingerprint})",
            "next: cloister coordinator admit SITE-CARD.json, for each site; cloister coordinator up"
            if settings.service is None
            else "next: cloister coordinator up; cloister coordinator invite SITE, for each",
        ],
    )


@coordinator_app.command()
def admit(
    card: Annotated[Path, typer.Argument(help="A site's card.json, from a channel you trust.")],
    json: Json = False,
    home: Home = None,
) -> None:
    """Admit a site by its card."""
    console.choose(json, home)
    coordinator = open_coordinator(console.coordinator_home())
    site = admit_site(coordinator.home, card)
    Store(coordinator.home).log_members(coordinator.sites)
    key = site.verify_key.id.hex()
    console.emit(
        {"site": site.name, "key": key, "records": site.records},
        f"site {site.name}: admitted, fingerprint {key} (compare it with theirs), {site.records} records declared",
    )


@coordinator_app.command("invite")
def invite_site(
    site: Annotated[str, typer.Argument(help="The site's name; the token is good for no other.")],
    minutes: Annotated[float, typer.Option(min=0.1, max=60 * 24 * 7, help="How long it is good.")] = 60.0,
    auditor: Annotated[
        bool, typer.Option("--auditor", help="For an auditor, who reads the log and no adapter, and trains nothing.")
    ] = False,
    json: Json = False,
    home: Home = None,
) -> None:
    """Print a token with which one site can join once, or one auditor read the log."""
    console.choose(json, home)
    from cloister_server.enrolment import invite

    coordinator = open_coordinator(console.coordinator_home())
    made = invite(coordinator, site, 60 * minutes, auditor=auditor)
    token = made.to_token()
    if auditor:
        lines = [token, f"good once, for auditor {site}, for {minutes:g} minutes; send it over a channel you trust",
                 "at the auditor: cloister audit fetch --out BUNDLE --trust TRUST.json, and paste it"]  # fmt: skip
        console.emit({"auditor": site, "token": token, "address": made.address, "minutes": minutes}, lines)
        return
    console.emit(
        {"site": site, "token": token, "address": made.address, "minutes": minutes},
        [
            token,
            f"good once, for {site}, for {minutes:g} minutes; send it over a channel you trust: whoever has it can join as {site}",
            f"at the site: cloister site enrol - --data FILE, and paste it (it enrols at {made.address})",
        ],
    )


@coordinator_app.command("revoke")
def revoke_site(
    site: Annotated[str, typer.Argument(help="The site's name, or the auditor's.")],
    auditor: Annotated[bool, typer.Option("--auditor", help="It is an auditor.")] = False,
    json: Json = False,
    home: Home = None,
) -> None:
    """Put a site out: from its next call on, and from the next round on. Its key is never admitted again."""
    console.choose(json, home)
    from cloister_flower.control import Control

    from cloister_server.enrolment import revoke, revoke_auditor

    coordinator = open_coordinator(console.coordinator_home())
    if auditor:
        revoke_auditor(coordinator.home, site)
        console.emit({"auditor": site}, f"auditor {site}: reads nothing more, from the next call on")
        return
    card = revoke(coordinator.home, site)
    Store(coordinator.home).log_members(coordinator.sites)
    link = ""
    # One that has much to do may refuse once; one that is not there says so at once.
    for _ in range(_TELLS):
        try:
            with Control(coordinator.card.address, coordinator.ca, coordinator.token) as control:
                control.unregister(card.node.encode())
            link = "SuperLink lets it in no more"
            break
        except StateError as error:
            link = f"SuperLink was not told ({error.what}); it is when it is up (cloister coordinator up)"
    console.emit(
        {"site": site, "key": card.verify_key.id.hex(), "superlink": link},
        f"site {site}: revoked, fingerprint {card.verify_key.id.hex()}; {link}",
    )


@coordinator_app.command("operator-key")
def operator_key(
    out: Annotated[Path, typer.Option(help="The key file to make; keep it elsewhere than this machine.")],
    json: Json = False,
) -> None:
    """Make a key with which an operator guards aliases: cloister rounds protect ALIAS --key FILE."""
    console.choose(json, None)
    if out.exists():
        raise InputError("there is a file already", where=str(out), mend="choose another --out")
    key = SigningKey.generate()
    key.save(out)
    console.emit(
        {"key": key.verify_key.raw.hex(), "id": key.verify_key.id.hex(), "path": str(out)},
        [
            f"{out}: public key {key.verify_key.raw.hex()} (id {key.verify_key.id.hex()})",
            "who has this file moves the aliases that it guards, and nobody else does",
        ],
    )


@coordinator_app.command("operator-sign")
def operator_sign(
    move: Annotated[Path, typer.Argument(help="What somebody asks to have signed: cloister rounds … --ask MOVE.")],
    key: Annotated[Path, typer.Option(help="The operator's key.")],
    out: Annotated[Path, typer.Option(help="The signature to make.")],
    json: Json = False,
) -> None:
    """Sign a move of a guarded alias; needs no federation, so that the key can stay on a machine of its own."""
    console.choose(json, None)
    if out.exists():
        raise InputError("there is a file already", where=str(out), mend="choose another --out")
    own = SigningKey.load(key)
    said = sign_file(move, own, out)
    guard = VerifyKey.from_hex(said["guard"], str(move)).id.hex() if said["guard"] else ""
    console.emit(
        {"signature": str(out), "move": said},
        [
            f"signed: move {said['version']} of {said['alias']} in {said['log']}{', a rollback' if said['rollback'] else ''}",
            f"  to round {said['round']} of run {said['run'][:8]}, adapter {said['adapter']}",
            f"  guarded from then on by {f'key {guard}' if guard else 'nobody'}",
            *filter(None, [whose_move(said, own)]),
            f"{out}: back to the coordinator, for --signature",
        ],
    )


@coordinator_app.command()
def up(json: Json = False, home: Home = None) -> None:
    """Serve the federation's SuperLink until stopped; admitted sites are registered with it as they come."""
    console.choose(json, home)
    from cloister_flower.control import Control

    coordinator = open_coordinator(console.coordinator_home())
    host, port = split_address(coordinator.card.address, "address")
    check_port(host, port, "SuperLink")
    service = coordinator.federation.service
    for address in (service.address, service.enrolment) if service else ():
        check_port(*split_address(address, "[registry]"), "the registry's service")
    stop, store = threading.Event(), Store(coordinator.home)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    log = coordinator.home / "superlink.log"
    with Group() as group:
        group.start("superlink", "cloister_server.superlink", ["--home", str(coordinator.home)], log)
        for name in ("registry", "enrolment") if service else ():
            # Apart: whoever is let in nowhere yet can wear out the one process alone.
            arguments = ["--home", str(coordinator.home), "--serve", name]
            group.start(name, "cloister_server.service", arguments, coordinator.home / f"{name}.log")
        known: dict[str, SiteCard] = {}
        ready, end = False, time.monotonic() + 60
        while not stop.is_set():
            for part in group.children:
                if part.process.poll() is not None:
                    raise StateError(f"{part.name} ended", where=str(part.log), got=part.error_line()[:300])
            sites = coordinator.sites()
            new = [card for card in sites if card.key not in known]
            gone = [card for card in known.values() if card not in sites]
            if new or gone or not ready:
                store.log_members(coordinator.sites)
                try:
                    with Control(coordinator.card.address, coordinator.ca, coordinator.token) as control:
                        control.nodes()
                        for card in gone:
                            control.unregister(card.node.encode())
                        for card in new:
                            control.register(card.node.encode(), card.name)
                except StateError as error:
                    if "token" in error.what or time.monotonic() > end:
                        raise
                    stop.wait(0.2)
                    continue
                end = time.monotonic() + 60
                if not ready:
                    ready = True
                    listens = [f"SuperLink of {coordinator.card.federation} listens on {coordinator.card.address}"]
                    if service:
                        listens += [f"registry on {service.address}, enrolment by token on {service.enrolment}"]
                    named = asdict(service) if service else {}
                    console.emit({"event": "ready", "address": coordinator.card.address} | named, listens)
                for card in gone:
                    del known[card.key]
                    console.emit({"event": "unregistered", "site": card.name}, f"site {card.name}: may connect no more")
                for card in new:
                    known[card.key] = card
                    console.emit({"event": "registered", "site": card.name}, f"site {card.name}: may connect")
            else:
                end = time.monotonic() + 60
            stop.wait(1.0)


def run(
    federation: Annotated[Path, typer.Argument(help="FEDERATION.toml.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the last run, from its last committed round.")
    ] = False,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for all admitted sites.")] = 60.0,
    json: Json = False,
    home: Home = None,
) -> None:
    """Start or resume a run; progress as lines, or as JSON lines with --json."""
    console.choose(json, home)
    coordinator = open_coordinator(console.coordinator_home(), read_federation(federation))
    from cloister_model.quiet import quieten

    quieten()
    from cloister_server.run import start

    def tell(kind: str, **fields: Any) -> None:
        line = event_line(kind, fields)
        if line is not None or console.OUTPUT.json:
            console.emit({"event": kind} | fields, line or "")

    start(coordinator, resume=resume, wait=wait, tell=tell)
