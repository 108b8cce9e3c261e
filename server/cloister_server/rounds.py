"""The story of a round at the coordinator.

    plan -> open in the registry -> seal, send -> open, admit -> compare, aggregate, judge -> commit in one transaction -> receipts

Under secure aggregation what is compared and aggregated are means of groups (``secure``), and nobody's update is seen.
Everything called here is a leaf. A malformed or missing reply costs one client, not the round; fewer than ``min_clients`` accepted
updates abort the round, which a resumed run opens again as the same work. A new attempt has a new round key; the work's digest
stays, so a client that has done it answers with the same noised bytes and is not charged again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache

import numpy as np
from cloister_flower.frames import frame_of
from cloister_shared.answers import Preface
from cloister_shared.encoding import digest
from cloister_shared.errors import CloisterError, RefusedError, StateError
from cloister_shared.installed import code_version, lock_digest
from cloister_shared.plan import PlanCore
from cloister_shared.sealing import OpeningKey
from cloister_shared.specs import SecureSum
from cloister_shared.vectors import (
    F32,
    bounded,
    from_safetensors,
    to_safetensors,
    vector_from_bytes,
    vector_to_bytes,
)

from cloister_server.accounting import Cost, charge, close_abandoned, foresee, record_costs, spending
from cloister_server.admission import reaches
from cloister_server.aggregation import Aggregate, noised_mean
from cloister_server.context import Context, Exchange, Member
from cloister_server.coordinator import is_admitted
from cloister_server.defence import Cohort, Entered, enter, explained, lost_at_sites, reputation
from cloister_server.federation import PIPELINE
from cloister_server.intake import WENT_BACK, Intake, Prefaced, read_acknowledgement, read_preface, take
from cloister_server.peers import predicted_norm
from cloister_server.planning import in_round, summed_rate
from cloister_server.secure import collect, opened_before
from cloister_server.sending import Shown, check_kept, receipts_of, seal_closing, seal_plan
from cloister_server.store import Commit, Store
from cloister_server.tables import (
    AGGREGATING,
    OPEN,
    Evidence,
    Judgement,
    NoisedSum,
    Opening,
    Round,
    RoundClient,
    Summed,
)

MOST_HOLDS = 3
CLOSING_SECONDS = 15.0


def run_rounds(context: Context, link: Exchange) -> None:
    """Runs every round that is not committed yet, then tells the clients that it is over.

    Raises:
        RefusedError: A round had too few clients, or ``MOST_HOLDS`` in a row kept their parent; the run can be resumed.
        StateError: The database was put back beneath this process.
    """
    store, run = context.store, context.run
    for name, number in close_abandoned(store, run.id):
        context.tell("abandoned", run=name, number=number)
    holds = 0
    for number in range(store.last_committed(run.id).number + 1, run.rounds + 1):
        context = admitted(context)
        held = one_round(context, link, number)
        holds = holds + 1 if held else 0
        if holds == MOST_HOLDS and number < run.rounds:
            raise RefusedError(
                "defence.paused",
                "rounds in a row kept their parent",
                where=f"run {run.id[:8]} round {number}",
                expected=f"< {MOST_HOLDS}",
                got=f"{holds} ({held})"[:600],
                mend="look at cloister rounds show, see to the sites or to [defence], then cloister run --resume",
            )
    close(context, link)
    last = store.last_committed(run.id).number
    if last < run.rounds:
        raise StateError(
            "rounds that were committed are not any more: the database was put back beneath this process",
            where=f"run {run.id[:8]}",
            expected=f"{run.rounds} rounds committed",
            got=str(last),
            mend="put the newest database back; if this is it: cloister registry fsck, then cloister run --resume",
        )
    store.finish_run(run.id)


def close(context: Context, link: Exchange) -> None:
    """Sends the last receipts of a run; a client that does not hear them keeps its update a little longer, nothing else.

    What clients cosign in answer is kept: the last commit has its witnesses without waiting for the next run.
    """
    check_kept(context)
    receipts, shown, key = receipts_of(context, context.run.rounds), Shown.now(context), OpeningKey.generate()
    asked = {m.node: m for m in context.members if m.id in receipts}
    frames = {node: seal_closing(context, m, receipts[m.id], shown, key) for node, m in asked.items()}
    server, schema = context.signing.verify_key.id, context.schema.digest
    with remembering(context) as keep:
        for node, message in link.exchange(
            frames, "closing", CLOSING_SECONDS, lambda replies: len(replies) == len(frames)
        ):
            card, before = asked[node].card, shown.heads_of(asked[node].id)
            try:
                frame = frame_of(message, f"acknowledgement of {card.name}")
                found = read_acknowledgement(frame, card, context.run, key, schema, server, shown.at, before)
            except CloisterError as error:
                context.tell("unacknowledged", site=card.name, reason=str(error)[:500])
            else:
                keep(asked[node].id, shown, found)
        key.erase()


def admitted(context: Context) -> Context:
    """The run with those of its members that are still admitted: a site that was revoked has no part in the next round."""
    here = tuple(m for m in context.members if is_admitted(context.store.home, m.card))
    for member in context.members:
        if member not in here:
            context.tell("revoked", site=member.card.name)
    return replace(context, members=here)


def one_round(context: Context, link: Exchange, number: int) -> str:
    """Plans, exchanges, aggregates and commits one round; returns why its parent was kept, or nothing."""
    started = time.monotonic()
    store, federation = context.store, context.federation
    if not context.members:
        raise RefusedError(
            "round.min_clients",
            "none of the sites that are there has a part in this run",
            where=f"run {context.run.id[:8]} round {number}",
            expected=f">= {federation.min_clients}",
            got="0",
            mend="see to the sites; those that joined again under another key have their part in a new run: cloister run",
        )
    check_kept(context)
    if federation.client_level is not None:
        foresee(store, federation.client_level, 1)
    before = store.last_committed(context.run.id)
    parent = from_safetensors(store.adapter(before.adapter or ""), context.schema, "parent adapter")
    row, clients = plan_round(context, number, parent)
    cores = {c.client: PlanCore.from_dict(json.loads(c.core)) for c in clients}
    members = {m.id: m for m in context.members if m.id in cores}
    key = OpeningKey.generate()
    context.tell("round", number=number, rounds=context.run.rounds, attempt=row.attempt, cohort=len(members))
    store.advance(context.run.id, number, OPEN)
    try:
        intake = (gather if context.draw is None else gather_sums)(context, link, members, cores, row, parent, key)
    finally:
        key.erase()
    store.advance(context.run.id, number, AGGREGATING)
    context.tell("aggregating", number=number)
    for client, change in intake.changes.items():
        if change["verdict"] == WENT_BACK:
            said = {"what": "a site's own log went back", "client": client, "reason": change["reason"]}
            store.log("incident", said | {"run": context.run.id, "round": number})
    for client in [i for i in intake.updates if i in members and not is_admitted(store.home, members[i].card)]:
        # Revoked while it worked: as if it had not come. Under secure aggregation it is in its group's sum already.
        del intake.updates[client], intake.members[client]
        intake.changes[client] |= {"verdict": "revoked", "reason": "revoked while the round ran", "report": ""}
    costs = intake.costs or spending(store, cores)
    units = {card.verify_key.id.hex(): card.unit for card in (*context.cards, *(m.card for m in context.members))}
    known = {c.client: c for c in clients}
    privacy = record_costs(intake.changes, intake.asked, costs, known, units, row.attempt)
    if sum(map(len, intake.members.values())) < federation.min_clients:
        store.abort_round(context.run.id, number, intake.changes, privacy)
        inside = {client for group in intake.members.values() for client in group}
        why = "; ".join(
            f"{m.card.name}: {intake.changes[m.id].get('reason') or intake.changes[m.id]['verdict']}"
            for m in members.values()
            if m.id not in inside
        )
        away = [f"{c.name}: not there with key {c.client}" for c in clients if c.client not in members]
        why = "; ".join([*([why] if why else []), *away])
        raise RefusedError(
            "round.min_clients",
            "too few updates for a commit",
            where=f"run {context.run.id[:8]} round {number}",
            expected=f">= {federation.min_clients}",
            got=f"{len(inside)} ({why})"[:600],
            mend="see to the sites, then cloister run --resume; one that joined again under another key has its part in a new run",
        )
    past = store.evidence(context.run.id)
    back = taken_back(context, number, cores, intake)
    if back:
        entered, charged = nothing_of(parent, intake, store.metrics(context.run.id, number - 2), back), None
    else:
        entered, charged = make_candidate(context, row, before.number, cores, parent, intake, past)
    order = sorted(intake.updates)
    held = entered.held
    names, left_out = {m.id: m.card.name for m in context.members}, refused(past, order, entered)
    for name, reason in left_out.items():
        for client in intake.members[name]:
            intake.changes[client] |= {
                "verdict": "held" if held else "refused-by-peers",
                "reason": reason,
                "report": "",
            }
    made = entered.made
    # A round that is taken back leaves the adapter of the one before it.
    adapter = (before if not back else store.round(context.run.id, number - 2)).adapter or ""
    if not held:
        named = {"run": context.run.id, "round": str(number), "base": context.run.base}
        adapter = store.blobs.put(to_safetensors(made.vector, context.schema, named))
    seconds = time.monotonic() - started - entered.seconds
    residual = made.residual if federation.rule == "exact" else None
    judgement, evidence = register(context, number, order, entered)
    store.commit_round(
        context.run.id,
        number,
        Commit(
            adapter,
            seconds,
            entered.seconds,
            intake.changes,
            entered.metrics,
            residual,
            judgement,
            evidence,
            seen(context, number, cores, intake),
            heads_of(store, intake),
            privacy,
        ),
    )
    context.tell(
        "committed",
        number=number,
        rounds=context.run.rounds,
        accepted=sum(len(intake.members[name]) for name, inside in zip(order, entered.entered, strict=True) if inside),
        cohort=len(members),
        groups=None if context.draw is None else len(order),
        stages_seconds=intake.stages_seconds,
        adapter=adapter,
        seconds=seconds,
        judging_seconds=entered.seconds,
        metrics=entered.metrics,
        rule=federation.rule,
        residual=residual,
        client_level=None if charged is None else charged.model_dump(exclude={"clients"}),
        defence=entered.rule,
        held=held,
        refused={} if held else {names.get(name, name): reason for name, reason in left_out.items()},
    )
    return held


def heads_of(store: Store, intake: Intake) -> dict[str, str]:
    """The heads of their own logs that clients answered with; of those whose sum an earlier attempt opened, the one that is kept."""
    known = store.site_heads()
    kept = {i: known[i] for i, change in intake.changes.items() if change["verdict"] == "accepted" and i in known}
    return kept | {client: one.note for client, one in intake.prefaces.items()}


def gather(
    context: Context,
    link: Exchange,
    members: dict[str, Member],
    cores: dict[str, PlanCore],
    row: Round,
    parent: F32,
    key: OpeningKey,
) -> Intake:
    """Sends every member its plan and takes in what comes back."""
    intake, by_node = Intake(), {m.node: m for m in members.values()}
    receipts, shown = receipts_of(context, row.number - 1), Shown.now(context)
    frames = {
        m.node: seal_plan(context, m, cores[m.id], parent, row.attempt, key, shown, receipts.get(m.id, ()))
        for m in members.values()
    }
    intake.asked = {by_node[node].id: len(frame) for node, frame in frames.items()}
    with remembering(context) as keep, ThreadPoolExecutor(1) as pool:
        # Accounting takes a core for a moment: from the first reply on, when a site here is done, not when all begin.
        spent: Future[dict[str, Cost]] | None = None
        for node, message in link.exchange(
            frames,
            f"{row.number}.{row.attempt}",
            context.federation.deadline,
            lambda replies: len(replies) == len(frames),
        ):
            member = by_node[node]
            past = shown.heads_of(member.id)
            take(context, intake, member, cores[member.id], row.attempt, key, shown.at, past, message)
            if member.id in intake.prefaces:
                keep(member.id, shown, intake.prefaces[member.id])
            spent = spent or pool.submit(spending, context.store, cores)
        intake.costs = None if spent is None else spent.result()
    intake.members = {client: (client,) for client in intake.updates}
    return intake


@contextmanager
def remembering(context: Context) -> Iterator[Callable[[str, Shown, Prefaced], None]]:
    """Keeps what a site cosigned and the head of its own log as it comes, whatever becomes of the round or of this process.

    Raises:
        CloisterError: One could not be kept, the first of them; the others were.
    """
    failed = list[CloisterError]()

    def keep(client: str, shown: Shown, said: Prefaced) -> None:
        try:
            context.store.keep_witness(client, shown.at, said.line, said.head, said.note, shown.heads_of(client))
        except CloisterError as error:  # what others say is kept first
            failed.append(error)

    yield keep
    if failed:
        raise failed[0]


def gather_sums(
    context: Context,
    link: Exchange,
    members: dict[str, Member],
    cores: dict[str, PlanCore],
    row: Round,
    parent: F32,
    key: OpeningKey,
) -> Intake:
    """The same under secure aggregation: what comes in are means of groups, by the groups' names."""
    if context.draw is None:
        raise StateError("a run under secure aggregation has no draw", where=f"run {context.run.id[:8]}")
    receipts = receipts_of(context, row.number - 1)

    @cache
    def shown() -> Shown:
        # When the first plan is made: messages before it take their time, and sites may fetch the log meanwhile.
        return Shown.now(context)

    def plan_for(member: Member, sharers: Mapping[str, str], shares: Mapping[str, tuple[str, str, str]]) -> bytes:
        told = receipts.get(member.id, ())
        return seal_plan(context, member, cores[member.id], parent, row.attempt, key, shown(), told, sharers, shares)

    def said(member: Member, preface: Preface, where: str) -> Prefaced:
        found = read_preface(preface, member.card, shown().at, shown().heads_of(member.id), where)
        keep(member.id, shown(), found)
        return found

    store, run = context.store, context.run.id
    known = {s.group: s for s in store.openings(run, row.number)}
    before = {name: tuple(json.loads(s.clients)) for name, s in known.items()}
    done = {name for name, s in known.items() if s.mean}

    def opening(group: str, alive: Sequence[str]) -> None:
        # Written down before it is asked: the members open for these again, and for no others.
        if group not in known:
            store.keep_opening(Opening(run=run, number=row.number, group=group, clients=json.dumps(alive)))

    with remembering(context) as keep:
        got = collect(
            context, link, context.draw, members, cores, row.attempt, key, plan_for, said, before, done, opening
        )
    for name, mean in got.means.items():
        store.keep_mean(run, row.number, name, store.blobs.put(vector_to_bytes(mean)))
    for name in done:
        got.means[name] = vector_from_bytes(store.blobs.get(known[name].mean), context.schema, name)
        got.alive[name] = before[name]
        got.changes |= {client: opened_before(name) for client in before[name]}
    return Intake(got.means, got.changes, got.alive, got.asked, got.seconds, prefaces=got.prefaces)


def make_candidate(
    context: Context,
    row: Round,
    before: int,
    cores: dict[str, PlanCore],
    parent: F32,
    intake: Intake,
    past: list[Evidence],
) -> tuple[Entered, NoisedSum | None]:
    """The accepted updates, or means of groups, made into a candidate, judged.

    With client-level noise it is charged first and noised here, so that nothing that is judged, told or stored was made without.
    """
    order, federation, judge = sorted(intake.updates), context.federation, context.judge
    rows, level = np.stack([intake.updates[name] for name in order]), federation.client_level
    if level is not None:
        charged = charge(context.store, level, row, len(cores), order)
        mean = noised_mean(rows, level.clipping_norm, level.noise_multiplier, len(cores))
        vector = bounded(np.asarray(parent + mean, dtype=np.float32), context.schema)
        metrics, seconds = judge.judge(vector)
        every = np.ones(len(order), dtype=bool)
        return Entered(Aggregate(vector, 0.0), ((),) * len(order), every, None, "mean", "", metrics, seconds), charged
    groups = [[cores[client] for client in intake.members[name]] for name in order]
    left_out = [reputation(history(past, name))[1] for name in order]
    cohort = Cohort(
        rows,
        np.array([sum(core.weight for core in group) for group in groups]),
        np.array([np.mean([predicted_norm(core.training, context.schema) for core in group]) for group in groups]),
        np.array(left_out, dtype=bool),
    )
    defence, scores = federation.defence, context.store.metrics(context.run.id, before)
    if not scores and (defence.rule == PIPELINE or defence.gated):
        scores, _ = judge.judge(parent)
    # Where LoRA rested, there are no products to put in a mean's place.
    rested = all(core.training.head_only for group in groups for core in group)
    return enter(defence, "average" if rested else federation.rule, parent, cohort, context.schema, judge, scores), None


def taken_back(context: Context, number: int, cores: dict[str, PlanCore], intake: Intake) -> str:
    """Why the last round's adapter is taken back by what the sites tell of it now, or nothing."""
    margin = context.federation.defence.sites_margin
    if margin is None or number < 2:
        return ""
    told = "noised_parent_loss"
    now = {i: json.loads(c["report"])[told] for i, c in intake.changes.items() if told in (c.get("report") or "")}
    rows = context.store.clients(context.run.id, number - 1)
    before = {c.client: json.loads(c.report)[told] for c in rows if told in c.report}
    numbers = {i: n for i, core in cores.items() for n in core.noised if n.name == "parent_loss"}
    std = {i: n.noise_multiplier * n.bound for i, n in numbers.items()}
    units = {m.id: float(m.card.records) for m in context.members}
    return lost_at_sites(before, {i: v for i, v in now.items() if i in units}, std, units, margin)


def nothing_of(parent: F32, intake: Intake, scores: dict[str, float], why: str) -> Entered:
    """A round of which nothing enters: its updates began at an adapter that is taken back."""
    count = len(intake.updates)
    return Entered(Aggregate(parent, 0.0), ((),) * count, np.zeros(count, dtype=bool), None, "mean", why, scores, 0.0)


def history(past: list[Evidence], client: str) -> list[list[str]]:
    """What a client was flagged for, round by round."""
    rounds: dict[int, list[str]] = {}
    for test in past:
        if test.client == client:
            rounds.setdefault(test.number, []).extend([test.code] if test.code != "ok" else [])
    return [rounds[number] for number in sorted(rounds)]


def refused(past: list[Evidence], order: list[str], entered: Entered) -> dict[str, str]:
    """Why each update that did not enter did not, by client id."""
    out = {}
    for client, found, inside in zip(order, entered.findings, entered.entered, strict=True):
        if not inside:
            codes = [f.code for f in found if f.flagged]
            out[client] = explained(found, reputation([*history(past, client), codes]), entered.held)
    return out


def register(
    context: Context, number: int, order: list[str], entered: Entered
) -> tuple[Judgement | None, list[Evidence]]:
    """The registry's rows of what the defence did; none where there is none."""
    defence = context.federation.defence
    if context.federation.client_level is not None or (
        defence.rule == "mean" and not defence.gated and defence.sites_margin is None
    ):
        return None, []
    run = context.run.id
    shares = None if entered.shares is None else dict(zip(order, map(float, entered.shares), strict=True))
    judgement = Judgement(
        run=run,
        number=number,
        rule=entered.rule,
        attackers=defence.attackers,
        judged=len(order),
        entered=int(entered.entered.sum()),
        held=entered.held,
        shares=json.dumps(shares),
    )
    evidence = [
        Evidence(run=run, number=number, client=client, **asdict(found))
        for client, tests in zip(order, entered.findings, strict=True)
        for found in tests
    ]
    return judgement, evidence


def seen(context: Context, number: int, cores: dict[str, PlanCore], intake: Intake) -> list[Summed]:
    """The registry's rows of what was seen under secure aggregation; none without."""
    if context.draw is None:
        return []
    groups = [(name, clients, cores[clients[0]].secure) for name, clients in sorted(intake.members.items())]
    return [
        Summed(
            run=context.run.id,
            number=number,
            group=name,
            members=len(secure.members) if secure else 1,
            clients=json.dumps(clients),
        )
        for name, clients, secure in groups
    ]


def _unlike(context: Context, group: tuple[str, ...]) -> tuple[tuple[float, ...], tuple[tuple[str, int], ...]]:
    """What a group's members are asked unlike, whether they are online or not: sample rates and units.

    A rate follows from the size that the member signed in the draw, a unit from its card.
    """
    if context.draw is None:
        raise StateError("a run without secure aggregation has no groups", where=f"run {context.run.id[:8]}")
    online = {m.id: m.training for m in context.members}
    first, found = next(iter(online.values())), dict[str, tuple[float, tuple[str, int]]]()
    cards = {card.verify_key.id.hex(): card for card in context.cards}
    for i in group:
        if i in online:
            found[i] = online[i].sample_rate, (online[i].unit, online[i].unit_records)
        else:
            unit = cards[i].unit if i in cards else first.unit
            records = context.federation.unit_records if unit == "field" else 1
            rate = summed_rate(first.expected_batch, context.draw.commitments[i].records)
            found[i] = rate, (unit, records)
    return tuple(found[i][0] for i in group), tuple(found[i][1] for i in group)


def plan_round(context: Context, number: int, parent: F32) -> tuple[Round, list[RoundClient]]:
    """Writes down what will be asked, before it is asked; a round that was open keeps its work."""
    # Once: every signature of the draw is checked for it.
    group_of = {} if context.draw is None else {site: group for group in context.draw.groups() for site in group}
    before = [PlanCore.from_dict(json.loads(c.core)) for c in context.store.clients(context.run.id, number)]
    cohort = tuple(sorted({m.id for m in context.members} | set(group_of) | {core.client for core in before}))
    trainings = {m.id: in_round(context.federation, m.training, number) for m in context.members}
    # One fixed point for all: of whoever may move farthest.
    lora, head = map(max, zip(*map(reaches, trainings.values()), strict=True))
    equal = context.federation.client_level is not None or context.draw is not None
    # Who comes later to a sum is asked as the others of it were, whatever settings and sites there are by now, or all would refuse it.
    summed = {core.secure.members: core for core in before if core.secure is not None}
    parent_digest, level = digest(vector_to_bytes(parent)), context.federation.client_level
    entries = []
    for member in context.members:
        group = group_of.get(member.id, ())
        if group in summed:
            entries.append(_open_row(summed[group].of_member(member.id), member))
            continue
        core = PlanCore(
            federation=context.federation.name,
            run=context.run.id,
            round=number,
            rounds=context.run.rounds,
            client=member.id,
            cohort=cohort,
            # With client-level noise all count the same: a sum's sensitivity is one client's clip. In a sum under masks they must.
            weight=1.0 if equal else float(member.card.records),
            rule=context.federation.rule,
            base=context.run.base,
            schema=context.schema.digest,
            parent=parent_digest,
            task=context.task,
            training=trainings[member.id],
            update_norm=None if level is None else level.clipping_norm,
            reports=context.federation.reports,
            noised=context.federation.noised,
            secure=None if context.draw is None else SecureSum(group, lora, head, *_unlike(context, group)),
        )
        entries.append(_open_row(core, member))
    row = Round(
        run=context.run.id,
        number=number,
        parent=parent_digest,
        opened=time.time(),
        config=context.federation.digest,
        code=code_version(),
        lock=lock_digest(),
    )
    return context.store.plan_round(row, entries)


def _open_row(core: PlanCore, member: Member) -> RoundClient:
    spec = core.training
    return RoundClient(
        run=core.run,
        number=core.round,
        client=member.id,
        name=member.card.name,
        plan=core.digest,
        core=core.to_bytes().decode(),
        weight=core.weight,
        noise_multiplier=spec.noise_multiplier,
        sample_rate=spec.sample_rate,
        steps=spec.steps,
        delta=spec.delta,
    )
