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
from cloister_shared.errors import CloisterError, InputError, StateError
from cloister_shared.processes import Group, check_port
from cloister_shared.signing import SigningKey, VerifyKey

from cloister_server import export_commands, keeping_commands, release_commands, upkeep
from cloister_server.accounting import client_level_line, client_level_statement, stated_epsilon
from cloister_server.coordinator import admit_site, open_coordinator
from cloister_server.coordinator import init as make_coordinator
from cloister_server.federation import read_federation
from cloister_server.fsck import check_round, check_rounds
from cloister_server.here import Home, Json, RunName, registry
from cloister_server.log import DAMAGED, column, items
from cloister_server.operators import sign_file, whose_move
from cloister_server.store import Store

_TELLS = 3
coordinator_app = typer.Typer(no_args_is_help=True, help="Create and serve a federation.")
rounds_app = typer.Typer(no_args_is_help=True, help="Look at registered rounds.")
for _commands in (release_commands, keeping_commands, export_commands):
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


def _scores(metrics: dict[str, float]) -> str:
    named = {"accuracy": "accuracy", "macro_f1": "macro-F1", "perplexity": "perplexity"}
    return ", ".join(f"{named[k]} {metrics[k]:.4f}" for k in named if k in metrics)


def _noised(s: dict[str, Any]) -> str:
    return (
        f"client level: attempt {s['attempt']}, {s['participants']} of {s['planned']} clients in the sum, noise {s['noise_std']:g} on it,"
        f" epsilon {s['epsilon']:.3f} so far at delta {s['delta']:g}"
    )


def event_line(kind: str, e: dict[str, Any]) -> str | None:
    """An event of a run as a line for a person, or None."""
    if kind == "run":
        return f"run {e['run'][:8]}: {e['rounds']} rounds, {e['parameters']} trained parameters{', resumed' if e['resumed'] else ''}"
    if kind == "waiting":
        away = f"; away: {', '.join(e['away'][:8])}{' …' if len(e['away']) > 8 else ''}" if e["away"] else ""
        return f"{e['online']} of {e['sites']} sites online{away}"
    if kind == "settings":
        kept = f"the run keeps what it began with: {', '.join(e['kept'])}" if e["kept"] else ""
        taken = f"from here on as they say now: {', '.join(e['taken'])}" if e["taken"] else ""
        return f"settings changed since the run began; {'; '.join(filter(None, (kept, taken)))}"
    if kind == "delta":
        said = ", ".join(f"{site} {delta:g}" for site, delta in e["sites"].items())
        return f"delta here is {e['delta']:g}; at enrolment sites said another, and refuse unless their owners changed it: {said}"
    if kind == "member":
        how = f"noise multiplier {e['noise_multiplier']:g}, sample rate {e['sample_rate']:.4g}"
        return f"  {e['site']}: {how}, whole run epsilon {e['epsilon']:.3f} at delta {e['delta']:g}"
    if kind == "client_level":
        how = f"noise multiplier {e['noise_multiplier']:g} on updates clipped to {e['clipping_norm']:g}"
        return (
            f"client level (one client's whole update, against whoever sees rounds): {how}, epsilon now {e['epsilon']:.3f},"
            f" after {e['rounds']} more rounds {e['epsilon_end']:.3f} of {e['epsilon_cap']:g} at delta {e['delta']:g}"
        )
    if kind == "abandoned":
        return f"round {e['number']} of run {e['run'][:8]}: left open by a coordinator that ended; aborted, and told in the log"
    if kind == "unacknowledged":
        return f"site {e['site']}: the run's end was not acknowledged: {e['reason']}"
    if kind == "revoked":
        return f"site {e['site']}: revoked, no part in this round"
    if kind == "groups":
        sizes = f"{e['sizes'][0]}" if e["sizes"][0] == e["sizes"][-1] else f"{e['sizes'][0]} to {e['sizes'][-1]}"
        stands = (
            "the rule mean stands no hostile one"
            if e["rule"] == "mean"
            else f"the rule {e['rule']} stands {e['withstands']} groups with a hostile site in them"
        )
        groups = f"{e['groups']} group{'s' if e['groups'] > 1 else ''}"
        return f"secure aggregation: {groups} of {sizes} sites, drawn by all; one sum a group is seen; {stands}"
    if kind == "group":
        return f"  {e['name']}: {e['what']}"
    if kind == "round":
        attempt = f", attempt {e['attempt']}" if e["attempt"] > 1 else ""
        return f"round {e['number']}/{e['rounds']}: sent to {e['cohort']} sites{attempt}"
    if kind == "reply":
        return f"  {e['site']}: {e['verdict']}{' (' + e['reason'] + ')' if e['reason'] else ''}, {e['bytes']:,} bytes"
    if kind == "committed":
        scores = _scores(e["metrics"])
        masks = f", {e['stages_seconds']:.1f} s of it for masks" if e["groups"] is not None else ""
        took = f"{e['seconds']:.1f} s{masks} + {e['judging_seconds']:.1f} s judging"
        who = f"{e['accepted']} of {e['cohort']} accepted"
        lost = "" if e["residual"] is None else f"residual {e['residual']:.2%}"
        done = f"HELD, parent kept: {e['held']}" if e["held"] else "committed"
        lines = [f"round {e['number']}/{e['rounds']}: {done}, {', '.join(filter(None, (who, scores, lost, took)))}"]
        lines += [f"  {site} left out: {reason}" for site, reason in e["refused"].items()]
        lines += [] if e["client_level"] is None else [f"  {_noised(e['client_level'])}"]
        return "\n".join(lines)
    return f"run {e['run'][:8]}: finished" if kind == "finished" else None


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


def round_rows(store: Store, run_id: str) -> list[dict[str, Any]]:
    """The rounds of a run as records, for tables and JSON."""
    rows, sums, gone = [], [s for s in store.noised_sums() if s.run == run_id], store.tombstones()
    held = {j.number for j in store.judgements(run_id) if j.held}
    for row in store.rounds(run_id):
        clients = store.clients(run_id, row.number)
        rows.append(
            {
                "round": row.number,
                "state": "held" if row.number in held else row.state,
                "attempts": row.attempt,
                "adapter": row.adapter,
                "given_up": row.adapter in gone,
                "residual": row.residual,
                "metrics": store.metrics(run_id, row.number),
                "participants": sum(c.verdict == "accepted" for c in clients),
                "refused": sum(c.verdict not in ("accepted", "missing", "open") for c in clients),
                "missing": sum(c.verdict == "missing" for c in clients),
                "epsilon": {c.name: stated_epsilon(store, c) for c in clients},
                "sent_bytes": row.sent_bytes,
                "received_bytes": row.received_bytes,
                "client_level": [s.model_dump(exclude={"run", "number"}) for s in sums if s.number == row.number],
                "seconds": row.seconds,
                "judging_seconds": row.judging_seconds,
            }
        )
    return rows


def rounds_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the table of rounds."""
    names = [n for n in ("accuracy", "macro_f1", "perplexity") if any(n in r["metrics"] for r in rows)]
    lossy = any(r["residual"] is not None for r in rows)
    sites = sorted({s for r in rows for s in r["epsilon"]})
    columns = [
        "round",
        "state",
        *(n.replace("_", "-") for n in names),
        *(["residual"] if lossy else []),
        "sites",
        "refused",
        *(f"eps {s}" for s in sites[:8]),
        "kB out",
        "kB in",
        "seconds",
    ]
    cells = [
        [
            str(r["round"]),
            r["state"] + (", given up" if r["given_up"] else ""),
            *(f"{r['metrics'][n]:.4f}" if n in r["metrics"] else "" for n in names),
            *(["" if r["residual"] is None else f"{r['residual']:.2%}"] if lossy else []),
            str(r["participants"]),
            str(r["refused"]),
            *(f"{r['epsilon'][s]:.3f}" if s in r["epsilon"] else "" for s in sites[:8]),
            f"{r['sent_bytes'] / 1e3:.0f}",
            f"{r['received_bytes'] / 1e3:.0f}",
            f"{r['seconds']:.1f}",
        ]
        for r in rows
    ]
    return columns, cells


@rounds_app.command("list")
def list_rounds(run_name: RunName = None, json: Json = False, home: Home = None) -> None:
    """List the rounds of a run, and the runs there are."""
    console.choose(json, home)
    store = registry()
    found = store.find_run(run_name)
    rows = round_rows(store, found.id)
    columns, cells = rounds_table(rows)
    others, came = [r for r in store.runs() if r.id != found.id], store.imported(found)
    said, damaged = client_level_statement(store), None
    title = [f"run {found.id[:8]} of {found.federation}, rule {found.rule}", *_came(came)]
    try:
        check_rounds(store, found, [r["round"] for r in rows if r["state"] in ("committed", "held")])
    except CloisterError as error:
        damaged = error
        title.append(f"NOT AS THE LOG SAYS: {error.where}: {error.what}")
    console.table(
        {
            "run": found.id,
            "rule": found.rule,
            "finished": found.finished is not None,
            "rounds": rows,
            "client_level": said,
            "imported": came,
            "other_runs": [r.id for r in others],
        },
        title,
        columns,
        cells,
    )
    _second_statement(said)
    if damaged is not None:
        raise damaged
    if others and not console.OUTPUT.json:
        console.emit({}, f"other runs: {', '.join(r.id[:8] + ('' if r.rounds else ' (imported)') for r in others)}")


def _came(came: dict[str, Any] | None) -> list[str]:
    """Where an imported adapter comes from, for a title."""
    if came is None:
        return []
    where = f"round {came['round']} of run {str(came['run'])[:8]} of {came['federation']}"
    return [f"imported: {where}; what it cost its own sites stands in its statement {str(came['statement'])[:16]}"]


def _second_statement(said: dict[str, Any] | None) -> None:
    """Prints the client-level statement under a table of record-level ones, apart from it."""
    if said is not None and not console.OUTPUT.json:
        above = (
            "record level: the table's epsilons, unit one record of a site, against everyone outside that site's agent"
        )
        console.emit({}, [above, client_level_line(said)])


@rounds_app.command()
def show(
    number: Annotated[int, typer.Argument(help="The round.")],
    run_name: RunName = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Show one round: every client, its verdict and why."""
    console.choose(json, home)
    store = registry()
    found = store.find_run(run_name)
    row = next((r for r in round_rows(store, found.id) if r["round"] == number), None)
    if row is None:
        newest = max(store.last_committed(found.id).number, *(r.number for r in store.rounds(found.id)))
        raise StateError(
            "no such round",
            where=f"run {found.id[:8]}",
            expected=f"0 to {newest}",
            got=str(number),
        )
    clients = [
        c.model_dump(exclude={"core"}) | {"epsilon": stated_epsilon(store, c)} for c in store.clients(found.id, number)
    ]
    gone = store.tombstones().get(row["adapter"] or "")
    state, damaged = "digest checked" if gone is None else f"given up: {gone.why}", None
    if row["adapter"] and gone is None:
        try:
            store.adapter(row["adapter"])
        except CloisterError as error:
            damaged = error
            state = f"NOT THERE AS IT SHOULD BE: {error.what}; {error.mend}"
    columns = ["site", "verdict", "weight", "noise", "rate", "steps", "epsilon", "kB in", "update", "reason"]
    cells = [
        [
            c["name"],
            c["verdict"],
            f"{c['weight']:g}",
            f"{c['noise_multiplier']:g}",
            f"{c['sample_rate']:.4g}",
            c["steps"],
            f"{c['epsilon']:.4f}",
            f"{c['received_bytes'] / 1e3:.0f}",
            c["update"][:12],
            c["reason"] or _told(c["report"], f"run {found.id[:8]} round {number}, {c['name']}"),
        ]
        for c in clients
    ]
    scores = _scores(row["metrics"])
    lost = "" if row["residual"] is None else f"residual {row['residual']:.2%}"
    facts = ", ".join(filter(None, (row["state"], scores, f"rule {found.rule}", lost)))
    title = [f"run {found.id[:8]} round {number}: {facts}"]
    title.append(f"adapter {row['adapter']}, {state}" if row["adapter"] else "no adapter")
    title += [*map(_noised, row["client_level"]), *_came(came := store.imported(found))]
    judgement = next((j.model_dump() for j in store.judgements(found.id) if j.number == number), None)
    if judgement is not None:
        title.append(
            f"defence: {judgement['rule']}, {judgement['attackers']} attackers assumed,"
            f" {judgement['entered']} of {judgement['judged']} updates entered"
            + (f"; HELD: {judgement['held']}" if judgement["held"] else "")
        )
    sums = [s.model_dump(exclude={"run", "number"}) for s in store.summed(found.id) if s.number == number]
    names = {c["client"]: c["name"] for c in clients}
    for one in sums:
        where = f"run {found.id[:8]} round {number}, {one['group']}"
        one["sites"] = [names.get(str(client), str(client)) for client in items(one.pop("clients"), where)]
    if sums:
        seen = "; ".join(f"{s['group']} ({len(s['sites'])} of {s['members']}: {', '.join(s['sites'])})" for s in sums)
        title.append(f"secure aggregation: no update was seen, only the sums of {seen}")
    evidence = [e.model_dump(exclude={"run", "number"}) for e in store.evidence(found.id) if e.number == number]
    said = client_level_statement(store)
    if row["state"] in ("committed", "held") and damaged is None:
        try:
            check_round(store, found, number)
        except CloisterError as error:
            damaged = error
            title.append(f"NOT AS THE LOG SAYS: {error.what}")
    record = {"run": found.id, "rule": found.rule, "client_level_statement": said} | row | {"clients": clients}
    record |= {"defence": judgement, "evidence": evidence, "secure_sums": sums, "imported": came}
    console.table(record, title, columns, cells)
    _second_statement(said)
    if damaged is not None:
        raise damaged


def _told(report: str, where: str) -> str:
    """What a client told of itself, for a table.

    Raises:
        StateError: Its row was changed by hand, and is no report.
    """
    told = column(report or "{}", f"{where}, report")
    if any(type(value) not in (int, float) for value in told.values()):
        raise StateError("a report that has no numbers", where=where, got=report[:60], mend=DAMAGED)
    return ", ".join(
        f"{name.removeprefix('noised_')} {value:.4g} ({'noised' if name.startswith('noised_') else 'not private'})"
        for name, value in told.items()
    )
