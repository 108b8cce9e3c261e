"""The site's commands: ``cloister site enrol | up | status``; those of the audit come with them."""

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
from cloister_shared.encoding import canonical, write_durably
from cloister_shared.errors import CloisterError, InputError, RefusedError, StateError
from cloister_shared.invitation import Invitation
from cloister_shared.processes import Group, free_port
from cloister_shared.signing import VerifyKey

from cloister_client import audit_command
from cloister_client.data import add as add_text
from cloister_client.data import open_ledger
from cloister_client.data import remove as remove_text
from cloister_client.policy import Policy, add_peer, read_policy
from cloister_client.site import AGAIN, act_as_agent, begin_again, held_up, is_up, read_site, take_over
from cloister_client.site import enrol as make_site
from cloister_client.status import Status, read_status
from cloister_client.supervise import Running, check_users, link_line

site_app = typer.Typer(no_args_is_help=True, help="What an organisation that owns text runs.")

data_app = typer.Typer(no_args_is_help=True, help="The text that may be trained on.")
site_app.add_typer(data_app, name="data")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Home = Annotated[Path | None, typer.Option("--home", help="Folder of state.")]


def register(app: typer.Typer) -> None:
    """Adds the site's commands and the audit's."""
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
def registered(
    site: Annotated[str | None, typer.Option("--site", help="The site; the only one by default.")] = None,
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


@site_app.command("rounds")
def list_rounds(
    number: Annotated[int | None, typer.Argument(help="A round to prove; without it, all are listed.")] = None,
    run: Annotated[str, typer.Option(help="The run's id; with a round, the newest by default.")] = "",
    site: Annotated[str | None, typer.Option("--site", help="The site; the only one by default.")] = None,
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


@site_app.command()
def pull(
    alias: Annotated[str, typer.Argument(help="The alias that the coordinator promoted.")],
    guard: Annotated[
        str, typer.Option(help="Take it only where this operator's public key (64 hex digits) guards the alias.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder to make; pulled/ALIAS in the site's folder by default.")
    ] = None,
    site: Annotated[str | None, typer.Option("--site", help="The site; the only one by default.")] = None,
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


@site_app.command()
def peer(
    card: Annotated[Path, typer.Argument(help="Another site's card.json, from a channel you trust.")],
    site: Annotated[str | None, typer.Option("--site", help="The site; the only one by default.")] = None,
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


@data_app.command("add")
def data_add(
    data: Annotated[Path, typer.Argument(help="Private text: JSONL, CSV or Parquet, plain or gzipped.")],
    site: Annotated[str | None, typer.Option("--site", help="The site; the only one by default.")] = None,
    text: Annotated[str, typer.Option(help="The text's field.")] = "text",
    label: Annotated[str, typer.Option(help="The label's field.")] = "label",
    unit_field: Annotated[str, typer.Option(help="Field whose value makes a privacy unit; as at the first time.")] = "",
    block: Annotated[str, typer.Option(help="Name of the block for what is new.")] = "",
    as_new: Annotated[
        bool,
        typer.Option("--as-new", help="Units whose texts are known under other names are other units all the same."),
    ] = False,
    json: Json = False,
    home: Home = None,
) -> None:
    """Register text: what is new makes a block with a budget of its own, what is known keeps its spend."""
    console.choose(json, home)
    own = read_site(console.site_home(site))
    act_as_agent(own)
    classify = own.coordinator().task == "text-classification"
    source = Source(data.expanduser().resolve(), text, label if classify else "", unit_field)
    added = add_text(own, source, block, as_new=as_new)
    what = (
        f"{added.new} new, in {added.block}"
        if added.new
        else f"all known, each keeps its spend; {added.block} is empty"
    )
    console.emit(
        {"site": own.name, "file": str(source.path)} | asdict(added),
        [
            f"site {own.name}: {added.records} records make {added.units} units: {what}",
            "the agent reads them at its next start: cloister site up",
        ],
    )


@data_app.command("remove")
def data_remove(
    data: Annotated[Path, typer.Argument(help="A registered file.")],
    site: Annotated[str | None, typer.Option("--site", help="The site; the only one by default.")] = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Stop reading a file; what was spent on its text stays spent."""
    console.choose(json, home)
    own = read_site(console.site_home(site))
    act_as_agent(own)
    path = data.expanduser().resolve()
    remove_text(own, path)
    line = f"site {own.name}: {path} is read no more; its units stay known, each keeps its spend"
    console.emit({"site": own.name, "file": str(path)}, line)


@data_app.command("list")
def data_list(
    site: Annotated[str | None, typer.Option("--site", help="The site; the only one by default.")] = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """List registered files and blocks."""
    console.choose(json, home)
    own = read_site(console.site_home(site))
    act_as_agent(own)
    ledger = open_ledger(own)
    sources = [
        {"file": str(s.path), "text": s.text, "label": s.label, "unit": s.unit or "record"} for s in ledger.sources()
    ]
    blocks = [{"block": s.name, "units": s.units, "rounds": s.rounds} for s in ledger.standings()]
    console.emit(
        {"site": own.name, "sources": sources, "blocks": blocks},
        [
            *(f"{s['file']}  text {s['text']}, label {s['label'] or 'none'}, unit {s['unit']}" for s in sources),
            *(f"{b['block']}: {b['units']} units, trained on in {b['rounds']} rounds" for b in blocks),
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
