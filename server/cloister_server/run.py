"""Preparing a run: members, noise calibrated for the whole run, model, judge, Flower's task; then ``rounds`` tells the story.

The noise multiplier is calibrated once for all planned steps, per site, from its declared public size. A resumed run takes
the training parameters from the registry as they were.
"""

from __future__ import annotations

import json
import secrets
import time
import tomllib
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

from cloister_flower.bundle import build_bundle
from cloister_flower.control import Control
from cloister_flower.grid import Link
from cloister_model.base import find_base
from cloister_model.build import Adapted, build, frozen_schema, read_vector, schema_of, set_centre
from cloister_shared.cards import SiteCard
from cloister_shared.draw import Transcript
from cloister_shared.errors import InputError, StateError
from cloister_shared.frozen_a import frozen_digest
from cloister_shared.installed import code_version
from cloister_shared.plan import PlanCore
from cloister_shared.privacy import epsilon
from cloister_shared.specs import TaskSpec, TrainingSpec
from cloister_shared.vectors import Schema, to_safetensors

from cloister_server.accounting import foresee
from cloister_server.context import Context, Exchange, Member, Tell
from cloister_server.coordinator import Coordinator
from cloister_server.federation import Federation, check_together, read_federation
from cloister_server.groups import draw_groups, groups_of, withstands
from cloister_server.judge import HeldOutJudge, Judge, NoJudge
from cloister_server.own_text import begin, check_apart, read_own
from cloister_server.planning import run_events, training_for
from cloister_server.rounds import run_rounds
from cloister_server.store import Store
from cloister_server.tables import Model, Run

# What a resumed run takes from the registry, whatever its settings say by now: how they are called there, and here.
KEPT = {
    "privacy.delta": "delta",
    "privacy.epsilon": "epsilon",
    "privacy.noise_multiplier": "noise_multiplier",
    "secure_aggregation.group": "secure_group",
    "training.batch": "batch",
    "training.clipping_norm": "clipping_norm",
    "training.rounds": "rounds",
    "training.steps": "steps",
    "training.unit_records": "unit_records",
}


def with_kept(federation: Federation, begun: str) -> Federation:
    """The settings as they are by now, with those of the run that it keeps: who comes to it later is asked as the others were.

    Args:
        federation: The settings.
        begun: FEDERATION.toml as it was when the run began.

    Raises:
        InputError: They do not go together.
    """
    before = read_federation(federation.path, begun)
    kept = replace(federation, **{name: getattr(before, name) for name in KEPT.values()})
    check_together(kept)
    return kept


def earlier_training(store: Store, run: str, card: SiteCard) -> TrainingSpec | None:
    """How this site was asked to train in this run before, or as the others of its group were: they know what follows for it; or None."""
    client = card.verify_key.id.hex()
    asked = [c for c in store.asked(client) if c.run == run]
    if asked:
        return PlanCore.from_dict(json.loads(max(asked, key=lambda c: c.number).core)).training
    for row in reversed(store.rounds(run)) if store.transcript(run) is not None else ():
        for other in store.clients(run, row.number):
            core = PlanCore.from_dict(json.loads(other.core))
            if core.secure is not None and client in core.secure.members:
                return core.of_member(client).training
    return None


def wait_online(
    control: Control, cards: tuple[SiteCard, ...], least: int, seconds: float, tell: Tell
) -> dict[str, int]:
    """Registers every admitted site's node and waits for them to come online.

    Returns:
        Node ids of the sites that are online, by site name.

    Raises:
        StateError: Fewer than ``least`` came.
    """
    nodes = {card.name: control.register(card.node.encode(), card.name) for card in cards}
    end, shown = time.monotonic() + seconds, -1
    while True:
        online = control.online()
        here = {name: node for name, node in nodes.items() if node in online}
        if len(here) != shown:
            shown = len(here)
            tell("waiting", online=shown, sites=len(nodes), away=sorted(set(nodes) - set(here)))
        if len(here) == len(nodes):
            return here
        if time.monotonic() > end:
            if len(here) >= least:
                return here
            away = ", ".join(sorted(set(nodes) - set(here)))
            raise StateError(
                "too few sites are online",
                expected=f">= {least}",
                got=f"{len(here)} (away: {away})",
                mend="cloister site up, at those sites",
            )
        time.sleep(0.2)


def start(coordinator: Coordinator, *, resume: bool, wait: float, tell: Tell) -> Run:
    """Starts or resumes a run and sees it through; returns its row.

    Raises:
        CloisterError: Settings, state or a round do not allow it.
    """
    federation, store = coordinator.federation, Store(coordinator.home)
    cards = coordinator.sites()
    store.log_members(coordinator.sites)
    store.take_fence()
    if len(cards) < federation.min_clients:
        raise InputError(
            "too few sites are admitted",
            where=str(coordinator.home / "sites"),
            expected=f">= {federation.min_clients}",
            got=str(len(cards)),
            mend="cloister coordinator admit CARD",
        )
    if odd := {card.name: card.delta for card in cards if card.delta != federation.delta}:
        tell("delta", delta=federation.delta, sites=odd)
    base = find_base(federation.base, f"{federation.path} base")
    base.check(coordinator.card.base, f"{federation.path} base")
    model = build(base, federation.task, str(federation.path))
    held, known = federation.held_out, None if resume else federation.public
    held_out = None if held is None else read_own(held, federation.task, base)
    public = None if known is None else read_own(known, federation.task, base)
    check_apart(held_out, public, f"{federation.path} [public]")
    schema = schema_of(model)
    judge: Judge = NoJudge() if held_out is None else HeldOutJudge(model, federation.task, held_out)
    with Control(coordinator.card.address, coordinator.ca, coordinator.token) as control:
        control.wait_up(wait)
        run = find_unfinished(store, schema.digest, federation, base.digest) if resume else None
        if (level := federation.client_level) is not None:
            left = federation.rounds if run is None else run.rounds - store.last_committed(run.id).number
            now, end = foresee(store, level, left)
            tell("client_level", epsilon=now, epsilon_end=end, rounds=left, **asdict(level))
        if run is None:
            task = begin(model, federation.task, base, held_out, public)
            run = Run(
                id=secrets.token_hex(16),
                federation=federation.name,
                created=time.time(),
                rounds=federation.rounds,
                base=base.digest,
                task=json.dumps(asdict(task)),
                rule=federation.rule,
                tensors=json.dumps(schema.as_list()),
                code=code_version(),
                tokenizer=base.tokenizer,
                config=json.dumps(run_config(federation, model, base.digest)),
            )
            named = {"run": run.id, "round": "0", "base": base.digest}
            used = Model(digest=base.digest, source=federation.base, tokenizer=base.tokenizer, kind=task.kind)
            store.start_run(run, to_safetensors(read_vector(model), schema, named), used)
        else:
            begun = json.loads(run.config)["settings"]
            federation = with_kept(federation, begun)
            if changed := changed_settings(begun, federation.path.read_text()):
                tell("settings", kept=[k for k in changed if k in KEPT], taken=[k for k in changed if k not in KEPT])
            if run.flower_run is not None:
                control.stop_if_running(int(run.flower_run))
        task = TaskSpec.from_dict(json.loads(run.task))
        set_centre(model, task, f"run {run.id[:8]}")
        tell("run", run=run.id, rounds=run.rounds, parameters=schema.size, resumed=resume)
        online = wait_online(control, cards, federation.min_clients, wait, tell)
        members = []
        for card in cards:
            if card.name in online:
                training = earlier_training(store, run.id, card) or training_for(federation, card, cards)
                cost = epsilon(run_events(federation, training, run.rounds), training.delta)
                tell(
                    "member",
                    site=card.name,
                    noise_multiplier=training.noise_multiplier,
                    sample_rate=training.sample_rate,
                    epsilon=cost,
                    delta=training.delta,
                )
                members.append(Member(card, online[card.name], training))
        content, digest = build_bundle()
        if digest != coordinator.card.bundle:
            raise StateError(
                "the Flower bundle is another than sites enrolled for",
                expected=coordinator.card.bundle[:16],
                got=digest[:16],
                mend="reinstall the version that made this federation",
            )
        flower_run = control.start_run(content, digest)
        store.set_flower_run(run.id, flower_run)
    link = Link(coordinator.card.address, coordinator.ca, coordinator.secret, flower_run)
    failed = True
    try:
        context = Context(
            federation, coordinator.signing, store, run, task, schema, tuple(members), judge, tell, cards=cards
        )
        if federation.secure_group is not None:
            context = drawn(context, link, federation.secure_group)
        run_rounds(context, link)
        failed = False
    finally:
        link.close(failed=failed)
        store.close()
    tell("finished", run=run.id)
    return run


def drawn(context: Context, link: Exchange, size: int) -> Context:
    """The run with its groups, drawn now or read from the registry, and of its members those that are in them.

    Raises:
        CloisterError: They cannot be drawn, or the defence does not fit them.
    """
    store, run = context.store, context.run
    known = store.transcript(run.id)
    if known is None:
        groups_of(context.federation, len(context.members))
        draw = draw_groups(context, link, size)
        groups_of(context.federation, len(draw.commitments))
        store.register_draw(run.id, json.dumps(draw.as_dict()))
    else:
        draw = Transcript.from_dict(json.loads(known))
        groups_of(context.federation, len(draw.commitments))
    groups = draw.groups()
    context.tell(
        "groups",
        groups=len(groups),
        sizes=sorted(map(len, groups)),
        withstands=withstands(len(groups)),
        rule=context.federation.defence.rule,
    )
    members = tuple(m for m in context.members if m.id in draw.commitments)
    return replace(context, members=members, draw=draw)


def _noise_of(federation: Federation) -> dict[str, float] | None:
    """The client-level noise that a run keeps to its end; the cap may change."""
    level = federation.client_level
    return None if level is None else {k: v for k, v in asdict(level).items() if k != "epsilon_cap"}


def run_config(federation: Federation, model: Adapted, base: str) -> dict[str, Any]:
    """What a run keeps beyond the task.

    Settings, client-level noise, the digest of the public text that its head started from; for exports, where PEFT transposes and
    what a frozen A is.
    """
    frozen = frozen_schema(model)
    return {
        "settings": federation.path.read_text(),
        "client_level": _noise_of(federation),
        "fan_in_fan_out": bool(next(iter(model.encoder.peft_config.values())).fan_in_fan_out),
        "public": None if federation.public is None else sha256(federation.public.path.read_bytes()).hexdigest(),
        "frozen": None if frozen is None else {"tensors": frozen.as_list(), "digest": frozen_digest(base, frozen)},
    }


def changed_settings(before: str, now: str) -> list[str]:
    """Settings that differ between two texts of FEDERATION.toml, as ``table.key``, sorted."""
    flat = [
        {
            f"{table}.{key}" if isinstance(values, dict) else table: value
            for table, values in found.items()
            for key, value in (values.items() if isinstance(values, dict) else [("", values)])
        }
        for found in (tomllib.loads(before), tomllib.loads(now))
    ]
    return sorted(key for key in flat[0] | flat[1] if flat[0].get(key) != flat[1].get(key))


def find_unfinished(store: Store, schema: str, federation: Federation, base: str) -> Run:
    """The newest run, if it is not finished.

    Raises:
        InputError: There is none to resume, or the settings have changed its adapter.
    """
    run = store.find_run(None)
    if run.finished is not None:
        raise InputError(
            "nothing to resume",
            where=str(store.home),
            got=f"run {run.id[:8]} is finished",
            mend="cloister run, without --resume",
        )
    if run.rule != federation.rule:
        raise InputError(
            "the settings have another aggregation rule than the run",
            where=f"{federation.path} [aggregation]",
            expected=run.rule,
            got=federation.rule,
            mend=f'rule = "{run.rule}", or start a new run',
        )
    if (noise := json.loads(run.config)["client_level"]) != _noise_of(federation):
        # A round without it, or with less, would make the statement about the others worthless.
        raise InputError(
            "the settings have other client-level noise than the run",
            where=f"{federation.path} [privacy.client_level]",
            expected=str(noise),
            got=str(_noise_of(federation)),
            mend="restore it, or start a new run",
        )
    if Schema.from_list(json.loads(run.tensors), "registry").digest != schema:
        raise InputError(
            "the settings would make another adapter than the run has",
            where=str(store.home),
            mend="restore the task's settings",
        )
    # The centre is the run's own: held-out text that grew since must not move what the head sees.
    if replace(TaskSpec.from_dict(json.loads(run.task)), centre="", spread=()) != federation.task or run.base != base:
        raise InputError(
            "the settings are not those of the run",
            where=str(federation.path),
            mend="restore [task] and base, or start a new run",
        )
    return run
