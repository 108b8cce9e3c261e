"""``cloister audit export | fetch | trust``: what this machine holds, or may fetch, of a federation, as one file for an auditor.

A site exports its own log, in which what says something of its text is a salted hash, and beside it the federation's as its coordinator
shows it, whose head it remembers; a coordinator exports the federation's; where both are here (a demo, a laptop), both. An auditor with a
token fetches the federation's log alone, and remembers its head.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from cloister_client.remembered import MEANWHILE
from cloister_shared import console
from cloister_shared.audit.bundle import Bundle, SignedLeaf, SiteLog, write_bundle
from cloister_shared.audit.findings import many
from cloister_shared.audit.trust import AT_COORDINATOR, read_trust, trust_of, write_trust
from cloister_shared.cards import read_coordinator_card, read_site_card
from cloister_shared.errors import CloisterError, InputError, RefusedError, RollbackError, VerificationError
from cloister_shared.invitation import Invitation
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import Checkpoint, claimed
from cloister_shared.signing import SigningKey, VerifyKey, read_secret
from cloister_shared.witness import View, log_of_federation, log_of_site

if TYPE_CHECKING:
    from cloister_client.witness import Witness

# Fetches of the federation's log, where rounds go on beside an export.
_TRIES = 3
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Home = Annotated[Path | None, typer.Option("--home", help="Folder of state.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the audit's group."""
    app.command("export")(export)
    app.command("fetch")(fetch)
    app.command("trust")(trust)


def _witness(home: Path) -> Witness:
    """A site that is here, as a witness of its coordinator's log."""
    from cloister_client.data import open_ledger
    from cloister_client.site import act_as_agent, pulled_note, read_site
    from cloister_client.witness import Witness

    site = read_site(home)
    act_as_agent(site)
    ledger, signing = open_ledger(site), SigningKey.load(site.agent_home / "sign.key")
    origin = log_of_site(read_secret(site.agent_home / "unit.key", 32))
    return Witness(ledger, signing, site.coordinator().verify_key, origin, {}, 0, partial(pulled_note, site))


def _seen_by(site: Witness, before: Checkpoint | None, federation: Bundle) -> None:
    """A site remembers the federation's log as it is in the bundle, where that is its coordinator's."""
    if federation.note.partition("\n")[0] == site.origin:
        hashes = tuple(leaf_hash(leaf.record) for leaf in federation.leaves)
        site.fetched(View(federation.note, 0, (), hashes, {}), before)


def _known(site: Witness) -> Checkpoint | None:
    """What a site knows of the federation's log; where what a pull kept cannot be read, ``fetched`` says so."""
    try:
        return site.known()
    except RefusedError:
        return None


def _site_log(site: Witness) -> SiteLog:
    events = tuple(site.ledger.records())
    # Of exactly what was read: a round may go on beside this.
    head = Checkpoint(site.name, len(events), Tree(map(leaf_hash, events)).root())
    return SiteLog(events, head.signed(site.signing))


def _federation(made: float, *, adapters: bool) -> Bundle:
    """What the coordinator that is here holds."""
    from cloister_server.store import Store
    from cloister_server.tables import COMMITTED

    store = Store(console.coordinator_home())
    try:
        # Cosignatures first: one of a head that is made meanwhile would be of more leaves than are here.
        cosignatures, heads = store.cosignatures(), store.site_heads()
        at, gone = store.checkpoint(), store.tombstones()
        rounds = [row for run in store.runs() for row in store.rounds(run.id)] if adapters else []
        names = {r.adapter for r in rounds if r.adapter and r.state == COMMITTED and r.adapter not in gone}
        return Bundle(
            made,
            tuple(SignedLeaf(one.record, one.key, one.signature) for one in store.leaves(0, at.size)),
            store.signed_checkpoint(at),
            cosignatures,
            {},
            {name: store.adapter(name) for name in sorted(names)},
            store.draws(),
            heads,
        )
    finally:
        store.close()


def _fetched(made: float, sites: list[Path]) -> Bundle:
    """The federation's log from its coordinator, for a site that joined by token; nothing where none can be asked."""
    from cloister_client.fetching import fetch_log
    from cloister_client.registry import IDENTITY
    from cloister_client.site import read_site

    joined = [home for home in sites if (home / IDENTITY).is_file()]
    if not joined:
        return Bundle(made, (), "")
    leaves, note, cosignatures, heads = fetch_log(read_site(joined[0]))
    return Bundle(made, tuple(SignedLeaf(*one) for one in leaves), note, cosignatures, heads=heads)


def export(
    out: Annotated[Path, typer.Option(help="The bundle to write.")],
    adapters: Annotated[bool, typer.Option("--adapters", help="Put the adapters of committed rounds into it.")] = False,
    json: Json = False,
    home: Home = None,
) -> None:
    """Write what this machine holds of a federation's history into one file for an auditor."""
    console.choose(json, home)
    coordinator, sites = console.coordinator_home(), console.site_homes()
    here = (coordinator / "sign.key").is_file()
    if not here and not sites:
        raise InputError(
            "nothing to export here", where=str(console.OUTPUT.home), mend="--home, at a site or a coordinator"
        )
    if os.path.lexists(out):
        raise InputError("there is a file already", where=str(out), mend="choose another --out")
    made, left_out, code = round(time.time()), list[str](), 0
    witnesses: dict[str, Witness] = {}
    for folder in sites:
        try:
            witnesses[folder.name] = _witness(folder)
        except CloisterError as error:
            if not here:
                raise
            left_out.append(f"left out: the log of {folder.name}: {error}")
            code = max(code, error.exit_code if isinstance(error, RollbackError) else 0)
    federation, logs = Bundle(made, (), ""), dict[str, SiteLog]()
    for left in reversed(range(_TRIES)):
        before, again = {name: _known(site) for name, site in witnesses.items()}, False
        try:
            federation = _federation(made, adapters=adapters) if here else _fetched(made, sites)
        except CloisterError as error:
            if here:
                raise
            # Its own log a site can show without its coordinator.
            federation = Bundle(made, (), "")
            left_out.append(f"left out: the federation's log: {error}")
            code = max(code, error.exit_code)
        for name, site in witnesses.items():
            try:
                _seen_by(site, before[name], federation)
            except RefusedError as error:
                if error.rule == MEANWHILE and left:
                    again = True
                    continue
                left_out.append(f"{name} does not follow the federation's log: {error}")
                code = max(code, RollbackError.exit_code if error.rule == "witness.history" else error.exit_code)
        # Read before they are held against what is here: a round that goes on beside this adds to them.
        logs = {site.signing.verify_key.id.hex(): _site_log(site) for site in witnesses.values()}
        mine = [_known(site) for site in witnesses.values() if federation.note.partition("\n")[0] == site.origin]
        behind = any(head is not None and head.size > len(federation.leaves) for head in mine)
        if code or not (again or behind):
            break
    else:
        left_out.append(
            "rounds went on during each fetch: sites saw more of the federation's log than is here; export again"
        )
        code = 2
    bundle = replace(federation, sites=logs)
    write_bundle(out, bundle)
    console.emit(
        {
            "bundle": str(out),
            "leaves": len(bundle.leaves),
            "sites": len(bundle.sites),
            "adapters": len(bundle.adapters),
            "bytes": out.stat().st_size,
            "left_out": left_out,
        },
        [
            *left_out,
            f"{out}: {len(bundle.leaves)} leaves of the federation's log, {len(bundle.sites)} sites' own logs,"
            f" {len(bundle.adapters)} adapters, {out.stat().st_size:,} bytes",
            "give it to the auditor; the trust file goes another way: cloister audit trust --out TRUST.json",
        ],
    )
    if code:
        raise typer.Exit(code)


def fetch(
    out: Annotated[Path, typer.Option(help="The bundle to write.")],
    trust: Annotated[
        Path,
        typer.Option(
            help="The auditor's trust file: made with the key that the token names, or held against and brought up to date."
        ),
    ],
    json: Json = False,
) -> None:
    """Fetch a federation's log as an auditor, with a token on standard input; held against its key and what the trust file remembers."""
    console.choose(json, None)
    from cloister_client.fetching import fetch_as_auditor
    from cloister_client.registry import look

    if os.path.lexists(out):
        raise InputError("there is a file already", where=str(out), mend="choose another --out")
    known = read_trust(trust) if trust.exists() else None
    if sys.stdin.isatty():
        print("token: ", end="", file=sys.stderr, flush=True)
    invitation = Invitation.from_token(sys.stdin.readline())
    card = look(invitation)
    origin = log_of_federation(card.verify_key)
    if known is not None and known.federation.raw != card.verify_key.raw:
        raise VerificationError(
            "the trust file is of another federation",
            where=str(trust),
            expected=f"key {known.federation.id.hex()}",
            got=f"key {card.fingerprint}",
        )
    seen = [] if known is None or origin not in known.remembered else [known.remembered[origin]]
    leaves, note, cosignatures, heads = fetch_as_auditor(invitation, card, seen)
    head = claimed(note, "head of the log")
    bundle = Bundle(round(time.time()), tuple(SignedLeaf(*one) for one in leaves), note, cosignatures, heads=heads)
    write_bundle(out, bundle)
    mine = trust_of(card.federation, card.verify_key, {}, [], "auditor") if known is None else known
    write_trust(trust, replace(mine, remembered=dict(mine.remembered) | {origin: head}))
    console.emit(
        {"bundle": str(out), "trust": str(trust), "leaves": head.size, "federation": card.federation},
        [
            f"{out}: {head.size} leaves of the log of {card.federation}, signed by the key that the token names ({card.fingerprint})",
            f"{trust}: remembers them"
            + (f"; the {seen[0].size} of the last time are among them, unchanged" if seen else "")
            + (
                ", and names no sites yet: take their keys from the sites (cloister audit trust)"
                if not mine.sites
                else ""
            ),
        ],
    )


def trust(
    out: Annotated[Path, typer.Option(help="The trust file to write.")],
    site: Annotated[
        str | None,
        typer.Option("--site", help="The site whose pins these are; else the coordinator's, where it is here."),
    ] = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Write the keys that this site or operator pinned at enrolment, and the heads of logs that it remembers."""
    console.choose(json, home)
    if os.path.lexists(out):
        # It may be the only memory of a head that the log has gone behind since.
        raise InputError("there is a file already", where=str(out), mend="choose another --out, and keep the old one")
    coordinator, heads = console.coordinator_home(), list[Checkpoint]()
    if site is None and (coordinator / "card.json").is_file():
        from cloister_server.store import Store

        card, written_at = read_coordinator_card(coordinator / "card.json"), AT_COORDINATOR
        folders = [*sorted((coordinator / "sites").glob("*.json")), *sorted((coordinator / "revoked").glob("*.json"))]
        cards = [read_site_card(path) for path in folders]
        known = {c.verify_key.id.hex(): (c.name, c.verify_key) for c in cards}
        if (coordinator / "sign.key").is_file():
            store = Store(coordinator)
            heads.append(store.checkpoint())
            store.close()
    else:
        from cloister_client.data import open_ledger
        from cloister_client.fetching import heads_known
        from cloister_client.policy import read_policy
        from cloister_client.site import act_as_agent, earlier_cards, read_site

        own = read_site(console.site_home(site))
        card, mine = own.coordinator(), read_site_card(own.home / "card.json")
        written_at = f"site {mine.name}"
        peers = [VerifyKey.from_hex(text, "policy.toml peers") for text in read_policy(own.home / "policy.toml").peers]
        known = {key.id.hex(): (key.id.hex()[:16], key) for key in peers}
        known |= {c.verify_key.id.hex(): (c.name, c.verify_key) for c in (*earlier_cards(own.home), mine)}
        act_as_agent(own)
        ledger = open_ledger(own)
        heads.append(ledger.head(log_of_site(read_secret(own.agent_home / "unit.key", 32))))
        heads += sorted(heads_known(own, ledger), key=lambda head: head.size)[-1:]
    write_trust(out, trust_of(card.federation, card.verify_key, known, heads, written_at))
    sites, memory = many(len(known), "site"), many(len(heads), "remembered head")
    lines = [f"{out}: the key of {card.federation} ({card.fingerprint}), {sites} by key, {memory}"]
    if written_at == AT_COORDINATOR:
        lines.append("written at the coordinator: what it remembers nobody else saw; a site's file says more (--site)")
    console.emit(
        {"trust": str(out), "federation": card.federation, "sites": len(known), "heads": len(heads), "at": written_at},
        lines,
    )
