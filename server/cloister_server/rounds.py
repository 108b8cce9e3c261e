"""The story of a round at the coordinator.

    plan -> open in the registry -> seal and send -> open, admit -> aggregate -> judge -> commit in one transaction -> receipts next time

Everything called here is a leaf. A malformed or missing reply costs one client, not the round; fewer than ``min_clients`` accepted
updates abort the round, which a resumed run opens again as the same work. A new attempt has a new round key; the work's digest
stays, so a client that has done it answers with the same noised bytes and is not charged again.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from cloister_shared.encoding import digest
from cloister_shared.errors import RefusedError
from cloister_shared.plan import Plan, PlanCore, Receipt, closing_bytes
from cloister_shared.sealing import Codec, Direction, Header, OpeningKey, seal
from cloister_shared.vectors import (
    F32,
    bounded,
    from_safetensors,
    to_safetensors,
    vector_to_bytes,
)

from cloister_server.accounting import charge, foresee, record_costs, spending
from cloister_server.aggregation import Aggregate, aggregate, noised_mean
from cloister_server.context import Context, Exchange, Member
from cloister_server.intake import Intake, take
from cloister_server.planning import in_round
from cloister_server.store import Commit, NoisedSum, Round, RoundClient

CLOSING_SECONDS = 15.0


def run_rounds(context: Context, link: Exchange) -> None:
    """Runs every round that is not committed yet, then tells the clients that it is over.

    Raises:
        RefusedError: A round had too few clients; the run can be resumed.
    """
    store, run = context.store, context.run
    for number in range(store.last_committed(run.id).number + 1, run.rounds + 1):
        one_round(context, link, number)
    close(context, link)
    store.finish_run(run.id)


def one_round(context: Context, link: Exchange, number: int) -> None:
    """Plans, exchanges, aggregates and commits one round."""
    started = time.monotonic()
    store, federation = context.store, context.federation
    if federation.client_level is not None:
        foresee(store, federation.client_level, 1)
    before = store.last_committed(context.run.id)
    parent = from_safetensors(store.adapter(before.adapter or ""), context.schema, "parent adapter")
    row, clients = open_round(context, number, parent)
    cores = {c.client: PlanCore.from_dict(json.loads(c.core)) for c in clients}
    by_node = {member.node: member for member in context.members if member.id in cores}
    key = OpeningKey.generate()
    receipts = receipts_of(context, before.number)
    frames = {
        m.node: seal_plan(context, m, cores[m.id], parent, row.attempt, key, receipts.get(m.id, ()))
        for m in by_node.values()
    }
    context.tell("round", number=number, rounds=context.run.rounds, attempt=row.attempt, cohort=len(frames))
    intake = Intake()
    try:
        with ThreadPoolExecutor(1) as pool:
            # Accounting takes a core for a moment: from the first reply on, when a site here is done, not when all begin.
            spent: Future[dict[str, tuple[float, float]]] | None = None
            for node, message in link.exchange(
                frames, f"{number}.{row.attempt}", federation.deadline, lambda replies: len(replies) == len(frames)
            ):
                take(context, intake, by_node[node], cores[by_node[node].id], row.attempt, key, message)
                spent = spent or pool.submit(spending, store, cores)
            costs = (spent or pool.submit(spending, store, cores)).result()
            sizes = {by_node[node].id: len(frame) for node, frame in frames.items()}
            record_costs(intake.changes, sizes, costs, {c.client: c for c in clients})
    finally:
        key.erase()
    if len(intake.updates) < federation.min_clients:
        store.abort_round(context.run.id, number, intake.changes)
        why = "; ".join(
            f"{m.card.name}: {intake.changes[m.id].get('reason') or intake.changes[m.id]['verdict']}"
            for m in by_node.values()
            if m.id not in intake.updates
        )
        raise RefusedError(
            "round.min_clients",
            "too few updates for a commit",
            where=f"run {context.run.id[:8]} round {number}",
            expected=f">= {federation.min_clients}",
            got=f"{len(intake.updates)} ({why})"[:600],
            mend="see to the sites, then cloister run --resume",
        )
    candidate, charged = make_candidate(context, row, cores, parent, intake.updates)
    candidate = replace(candidate, vector=bounded(candidate.vector, context.schema))
    residual = candidate.residual if federation.rule == "exact" else None
    metrics, judging = context.judge.judge(candidate.vector)
    blob = to_safetensors(
        candidate.vector, context.schema, {"run": context.run.id, "round": str(number), "base": context.run.base}
    )
    adapter = store.blobs.put(blob)
    seconds = time.monotonic() - started - judging
    store.commit_round(context.run.id, number, Commit(adapter, seconds, judging, intake.changes, metrics, residual))
    context.tell(
        "committed",
        number=number,
        rounds=context.run.rounds,
        accepted=len(intake.updates),
        cohort=len(frames),
        adapter=adapter,
        seconds=seconds,
        judging_seconds=judging,
        metrics=metrics,
        rule=federation.rule,
        residual=residual,
        client_level=None if charged is None else charged.model_dump(exclude={"clients"}),
    )


def make_candidate(
    context: Context, row: Round, cores: dict[str, PlanCore], parent: F32, updates: dict[str, F32]
) -> tuple[Aggregate, NoisedSum | None]:
    """The accepted updates made into a candidate by the federation's rule.

    With client-level noise it is charged first and noised here, so that nothing that is judged, told or stored was made without.
    """
    order, level = sorted(updates), context.federation.client_level
    rows = np.stack([updates[c] for c in order])
    if level is None:
        weights = np.array([cores[c].weight for c in order], dtype=np.float64)
        # Where LoRA rested, there are no products to put in a mean's place.
        rested = all(core.training.head_only for core in cores.values())
        return aggregate("average" if rested else context.federation.rule, parent, rows, weights, context.schema), None
    charged = charge(context.store, level, row, len(cores), order)
    mean = noised_mean(rows, level.clipping_norm, level.noise_multiplier, len(cores))
    return Aggregate(np.asarray(parent + mean, dtype=np.float32), 0.0), charged


def open_round(context: Context, number: int, parent: F32) -> tuple[Round, list[RoundClient]]:
    """Writes down what will be asked, before it is asked; a round that was open keeps its work."""
    cohort = tuple(sorted(m.id for m in context.members))
    parent_digest, level = digest(vector_to_bytes(parent)), context.federation.client_level
    entries = []
    for member in context.members:
        core = PlanCore(
            federation=context.federation.name,
            run=context.run.id,
            round=number,
            rounds=context.run.rounds,
            client=member.id,
            cohort=cohort,
            # With client-level noise all count the same: a sum's sensitivity is one client's clip.
            weight=float(member.card.records) if level is None else 1.0,
            rule=context.federation.rule,
            base=context.run.base,
            schema=context.schema.digest,
            parent=parent_digest,
            task=context.task,
            training=in_round(context.federation, member.training, number),
            update_norm=None if level is None else level.clipping_norm,
            reports=context.federation.reports,
            noised=context.federation.noised,
        )
        spec = core.training
        entries.append(
            RoundClient(
                run=core.run,
                number=number,
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
        )
    return context.store.open_round(
        Round(run=context.run.id, number=number, state="open", parent=parent_digest, opened=time.time()), entries
    )


def seal_plan(
    context: Context,
    member: Member,
    core: PlanCore,
    parent: F32,
    attempt: int,
    key: OpeningKey,
    receipts: tuple[Receipt, ...],
) -> bytes:
    """One client's plan, signed and sealed to it."""
    plan = Plan(core, attempt, key.sealing_key, int(time.time()), receipts)
    return _seal(context, member, Codec.PLAN, plan.to_bytes(parent, context.signing), core.round, attempt, core.digest)


def _seal(
    context: Context, member: Member, codec: Codec, plaintext: bytes, number: int, attempt: int, plan: str
) -> bytes:
    header = Header(
        direction=Direction.TO_CLIENT,
        codec=codec,
        run=bytes.fromhex(context.run.id),
        round=number,
        attempt=attempt,
        client=member.card.verify_key.id,
        server=context.signing.verify_key.id,
        base=bytes.fromhex(context.run.base),
        schema=bytes.fromhex(context.schema.digest),
        plan=bytes.fromhex(plan),
        parameters=context.schema.size,
        length=len(plaintext),
        time=int(time.time()),
        nonce=os.urandom(16),
    )
    return seal(header, plaintext, member.card.sealing_key, context.signing)


def receipts_of(context: Context, number: int) -> dict[str, tuple[Receipt, ...]]:
    """Receipts for the last committed round, by client id; none for round 0."""
    rows = {r.number: r for r in context.store.rounds(context.run.id)}
    out: dict[str, tuple[Receipt, ...]] = {}
    for client in context.store.clients(context.run.id, number):
        update = client.update if client.verdict == "accepted" else ""
        out[client.client] = (
            Receipt(context.run.id, number, client.plan, update, client.verdict, rows[number].adapter or ""),
        )
    return out


def close(context: Context, link: Exchange) -> None:
    """Sends the last round's receipts; a client that does not hear them keeps its update a little longer, nothing else."""
    receipts = receipts_of(context, context.run.rounds)
    frames = {
        member.node: _seal(
            context,
            member,
            Codec.CLOSING,
            closing_bytes(context.run.id, receipts[member.id], context.signing),
            context.run.rounds,
            1,
            "00" * 32,
        )
        for member in context.members
        if member.id in receipts
    }
    for _ in link.exchange(frames, "closing", CLOSING_SECONDS, lambda replies: len(replies) == len(frames)):
        pass
