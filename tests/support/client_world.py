"""What the client's tests share: a coordinator, a site, records, plans and the envelopes around them, with real keys."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cloister_client.budget import Ledger
from cloister_client.data import add as register_text
from cloister_client.policy import Policy
from cloister_client.round import Desk
from cloister_client.site import Site, enrol, read_site
from cloister_client.status import Status, StatusFile
from cloister_client.sums import Sums
from cloister_client.train import Device
from cloister_client.units import Units
from cloister_client.witness import Witness
from cloister_model.base import BaseModel, find_base
from cloister_model.build import build, schema_of
from cloister_model.text import Record, Source
from cloister_shared.answers import Preface, read_answer
from cloister_shared.cards import CoordinatorCard
from cloister_shared.encoding import digest
from cloister_shared.merkle import leaf_hash
from cloister_shared.notes import Checkpoint
from cloister_shared.plan import Plan, PlanCore
from cloister_shared.processes import free_port
from cloister_shared.receipts import Closing, Receipt
from cloister_shared.sealing import Codec, Direction, Header, OpeningKey, open_envelope, seal
from cloister_shared.signing import SigningKey
from cloister_shared.specs import TaskSpec, TrainingSpec
from cloister_shared.vectors import F32, Schema, bounded, vector_to_bytes
from cloister_shared.witness import View, log_of_federation, log_of_site

LABELS = ("billing", "delivery", "quality")
SECRET = "zqxj"
RUN = "ab" * 16
CPU = Device("cpu", False, "cpu: asked for")
BERT_TASK = TaskSpec("text-classification", LABELS, 48, ("query", "value"), (), 2, 4.0)
GPT2_TASK = TaskSpec("causal-lm", (), 24, ("c_attn",), (), 2, 4.0)
TRAINING = TrainingSpec(
    steps=2,
    sample_rate=0.5,
    expected_batch=12.0,
    noise_multiplier=4.0,
    clipping_norm=1.0,
    adapter_rate=1e-3,
    head_rate=1e-2,
    delta=1e-5,
)
_WORDS = ("card", "charged", "twice", "parcel", "not", "arrived", "screen", "broke", "refund", "login", "app", "rude")


def make_records(count: int, seed: int = 0) -> tuple[Record, ...]:
    """Records of 1 to 24 words, each with a word that nobody outside may ever see."""
    rng = np.random.default_rng(seed)
    return tuple(
        Record(f"{SECRET} {' '.join(rng.choice(_WORDS, int(rng.integers(1, 25))))}", LABELS[i % len(LABELS)])
        for i in range(count)
    )


def write_records(path: Path, records: Sequence[Record]) -> Path:
    """The records as JSONL."""
    path.write_text("".join(json.dumps({"text": r.text, "label": r.label}) + "\n" for r in records))
    return path


def random_vector(schema: Schema, seed: int = 1, scale: float = 0.1) -> F32:
    """A parent adapter that is zero nowhere, so that every parameter has a gradient."""
    # A head's features are 28 long: larger weights saturate the logits, and leave gradients of rounding alone.
    each = np.concatenate([np.full(int(np.prod(s)), 0.15 if n.startswith("head.") else 1.0) for n, s in schema.tensors])
    drawn = np.asarray(np.random.default_rng(seed).normal(0, scale, schema.size) * each, dtype=np.float32)
    return np.asarray(0.9 * bounded(drawn, schema), dtype=np.float32)


def policy_for(card: CoordinatorCard, **changes: Any) -> Policy:
    """A policy that allows what the card says."""
    allowed = Policy((card.base,), (card.task,), card.target_modules, card.rank, 8.0, 1e-5, 0.3, 2, 1000, "required")
    return replace(allowed, **changes)


@dataclass
class World:
    """A coordinator and what it trains.

    Attributes:
        base: The base model.
        task: What is learnt.
        schema: The adapter's schema.
        parent: The adapter to start from.
        signing: The coordinator's key.
        card: Its card.
    """

    base: BaseModel
    task: TaskSpec
    schema: Schema
    parent: F32
    signing: SigningKey
    card: CoordinatorCard

    def core(self, client: bytes, **changes: Any) -> PlanCore:
        """A plan's work for ``client``."""
        mine = client.hex()
        core = PlanCore(
            federation=self.card.federation,
            run=RUN,
            round=1,
            rounds=3,
            client=mine,
            cohort=tuple(sorted({mine, "0" * 32})),
            weight=1.0,
            rule="average",
            base=self.base.digest,
            schema=self.schema.digest,
            parent=digest(vector_to_bytes(self.parent)),
            task=self.task,
            training=TRAINING,
        )
        return replace(core, **changes)

    def header(self, core: PlanCore, attempt: int, length: int, codec: Codec = Codec.PLAN) -> Header:
        """The header that belongs to a plan."""
        return Header(
            direction=Direction.TO_CLIENT,
            codec=codec,
            run=bytes.fromhex(core.run),
            round=core.round,
            attempt=attempt,
            client=bytes.fromhex(core.client),
            server=self.signing.verify_key.id,
            base=bytes.fromhex(core.base),
            schema=bytes.fromhex(core.schema),
            plan=bytes.fromhex(core.digest),
            parameters=self.schema.size,
            length=length,
            time=int(time.time()),
            nonce=os.urandom(16),
        )


@dataclass
class Asked:
    """One envelope to a client and the key that opens the answer.

    Attributes:
        core: The work.
        attempt: The attempt.
        key: The round's key.
        envelope: The bytes.
    """

    core: PlanCore
    attempt: int
    key: OpeningKey
    envelope: bytes


def make_world(folder: Path, task: TaskSpec = BERT_TASK) -> World:
    """A coordinator for the base model in ``folder``."""
    torch.set_num_threads(1)  # of two busy cores, for tiny models
    base = find_base(str(folder), "test")
    schema = schema_of(build(base, task, "test"))
    signing = SigningKey.generate()
    card = CoordinatorCard(
        federation="testing",
        address="127.0.0.1:9",
        ca="no certificate is needed here",
        key=signing.verify_key.raw.hex(),
        bundle="cd" * 32,
        base=base.digest,
        base_source=str(folder),
        task=task.kind,
        labels=task.labels,
        target_modules=task.target_modules,
        rank=task.rank,
    )
    return World(base, task, schema, random_vector(schema), signing, card)


def make_site(world: World, home: Path, data: Path, **changes: Any) -> Site:
    """Enrols a site whose text is ``data``."""
    label = "label" if world.task.labels else ""
    enrol(
        home,
        "site-1",
        world.card,
        policy_for(world.card, **changes),
        base=str(world.base.path),
        records=24,
        runtime_port=free_port(),
        device="cpu",
        threads=1,
    )
    site = read_site(home)
    register_text(site, Source(data, "text", label))
    return site


def units_of(records: Sequence[Record]) -> Units:
    """The records as registered units of one record each, in block 1."""
    return Units(tuple(records), tuple((i,) for i in range(len(records))), (1,) * len(records), 0, 0)


def open_desk(world: World, site: Site, records: tuple[Record, ...], **changes: Any) -> Desk:
    """The agent's desk over a site's folder, as a new process would make it."""
    agent, policy = site.agent_home, policy_for(world.card, **changes)
    ledger = Ledger(agent / "ledger.db", site.counter, policy.limits)
    ledger.close_open(agent / "kept")
    signing = SigningKey.load(agent / "sign.key")
    return Desk(
        site.name,
        site.coordinator(),
        policy,
        signing,
        OpeningKey.load(agent / "seal.key"),
        ledger,
        world.base,
        units_of(records),
        CPU,
        agent / "kept",
        StatusFile(agent / "status.json", Status(site.name)),
        Sums(agent / "sums", signing, policy.peers, policy.least_cohort, 4, len(records)),
        Alone(ledger, signing, world.signing.verify_key, log_of_site((agent / "unit.key").read_bytes()), {}, 0),
    )


def ask(
    world: World,
    signing_id: bytes,
    opening: OpeningKey,
    core: PlanCore | None = None,
    *,
    attempt: int = 1,
    receipts: tuple[Receipt, ...] = (),
    by: SigningKey | None = None,
    header: dict[str, Any] | None = None,
    parent: F32 | None = None,
) -> Asked:
    """A sealed plan; ``by`` signs plan and envelope in the coordinator's place, ``header`` changes header fields."""
    core, key = core or world.core(signing_id), OpeningKey.generate()
    plan = Plan(core, attempt, key.sealing_key, int(time.time()), first_view(world.signing), receipts)
    plaintext = plan.to_bytes(world.parent if parent is None else parent, by or world.signing)
    head = replace(world.header(core, attempt, len(plaintext)), **(header or {}))
    return Asked(core, attempt, key, seal(head, plaintext, opening.sealing_key, by or world.signing))


# What answers to closing messages are sealed to.
CLOSING_KEY = OpeningKey.generate()


def closing(world: World, signing_id: bytes, opening: OpeningKey, receipts: tuple[Receipt, ...]) -> bytes:
    """A sealed closing message."""
    core = world.core(signing_id)
    said = Closing(core.run, CLOSING_KEY.sealing_key, receipts, first_view(world.signing))
    plaintext = said.to_bytes(world.signing)
    head = world.header(core, 1, len(plaintext), Codec.CLOSING)
    return seal(replace(head, plan=bytes(32)), plaintext, opening.sealing_key, world.signing)


def open_answer(world: World, asked: Asked, answer: bytes, site_key: SigningKey) -> tuple[Header, bytes]:
    """Opens an answer as the coordinator does; what it says of logs is taken off."""
    header, plaintext = open_envelope(
        answer,
        by=site_key.verify_key,
        key=asked.key,
        expect={
            "direction": Direction.TO_COORDINATOR,
            "client": site_key.verify_key.id,
            "server": world.signing.verify_key.id,
            "run": bytes.fromhex(asked.core.run),
            "round": asked.core.round,
            "attempt": asked.attempt,
            "plan": bytes.fromhex(asked.core.digest),
        },
        max_bytes=1 << 24,
        where="answer",
    )
    return header, read_answer(plaintext, "answer")[1]


def receipt_for(world: World, core: PlanCore, update: bytes) -> Receipt:
    """The receipt that an accepted update gets."""
    made = Receipt(core.run, core.round, core.digest, digest(update), "accepted", "ef" * 32, 1, "cd" * 32)
    return made.by(world.signing)


def spec(**changes: Any) -> TrainingSpec:
    """The usual training with changes."""
    return TrainingSpec(**(asdict(TRAINING) | changes))


def first_view(signing: SigningKey) -> View:
    """A coordinator's log with the leaf that a run begins with."""
    leaf = leaf_hash(b"policy")
    return View(Checkpoint(log_of_federation(signing.verify_key), 1, leaf).signed(signing), 0, (), (leaf,), {})


class Alone(Witness):
    """A witness of a coordinator that keeps no log: rounds here are never acknowledged (tests/server/test_witnessing.py has those)."""

    def acknowledged(self, view: View, run: str, number: int) -> None:
        """Asks for nothing."""


class Bare(Preface):
    """Nothing said of logs, not even that: for looking at what comes after."""

    def before(self, answer: bytes) -> bytes:
        """The answer alone."""
        return answer
