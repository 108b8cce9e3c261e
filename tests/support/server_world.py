"""A federation inside one process: real coordinator code, real site code, and an exchange that replaces Flower's transport."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cloister_client.budget import Ledger
from cloister_client.policy import Policy
from cloister_client.round import Desk, execute
from cloister_client.sums import Sums
from cloister_client.train import Device
from cloister_client.units import Units
from cloister_client.witness import Witness
from cloister_flower.frames import outgoing, reply
from cloister_model.base import BaseModel, find_base
from cloister_model.build import build, read_vector, schema_of
from cloister_model.text import Record, Source
from cloister_server.context import Context, Member
from cloister_server.coordinator import Coordinator, admit_site, init, open_coordinator
from cloister_server.federation import Federation, read_federation
from cloister_server.judge import Judge, NoJudge
from cloister_server.run import run_config
from cloister_server.store import Store
from cloister_server.tables import Run
from cloister_shared.answers import Preface
from cloister_shared.cards import SiteCard
from cloister_shared.plan import Plan
from cloister_shared.sealing import Codec, Direction, Header, OpeningKey, SealingKey, open_envelope, seal
from cloister_shared.signing import SigningKey
from cloister_shared.specs import TrainingSpec
from cloister_shared.tls import make_node_key
from cloister_shared.vectors import F32, Schema, to_safetensors, vector_to_bytes
from cloister_shared.witness import log_of_site
from flwr.supercore.task_identity import TaskIdentity

from support.registry import a_model

LABELS = ("billing", "delivery")
TRAINING = TrainingSpec(
    steps=2,
    sample_rate=0.5,
    expected_batch=12.0,
    noise_multiplier=20.0,
    clipping_norm=1.0,
    adapter_rate=1e-3,
    head_rate=3e-2,
    delta=1e-5,
)
RECORDS = 24
Behaviour = Callable[["Loopback", int, bytes, Any], Any]


def identify() -> None:
    """Gives this process the task identity that Flower's messages ask for."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def federation_text(folder: Path, **changes: str) -> str:
    """A FEDERATION.toml for the tiny BERT; ``changes`` replace whole lines by their key, empty text removes the line."""
    lines = {
        "name": 'name = "fed"',
        "address": 'address = "127.0.0.1:9092"',
        "base": f"base = {json.dumps(str(folder))}",
        "[task]": "[task]",
        "kind": 'kind = "text-classification"',
        "labels": 'labels = ["billing", "delivery"]',
        "max_tokens": "max_tokens = 16",
        "target_modules": 'target_modules = ["query", "value"]',
        "rank": "rank = 2",
        "alpha": "alpha = 4",
        "[training]": "[training]",
        "rounds": "rounds = 3",
        "steps": "steps = 2",
        "batch": "batch = 12",
        "clipping_norm": "clipping_norm = 1.0",
        "adapter_rate": "adapter_rate = 1e-3",
        "head_rate": "head_rate = 3e-2",
        "[privacy]": "[privacy]",
        "noise_multiplier": "noise_multiplier = 4.0",
        "epsilon": "",
        "delta": "delta = 1e-5",
        "[aggregation]": "",
        "[round]": "[round]",
        "deadline_seconds": "deadline_seconds = 30",
        "min_clients": "min_clients = 2",
    }
    return "\n".join(line for line in (lines | changes).values() if line) + "\n"


def write_federation(path: Path, folder: Path, **changes: str) -> Path:
    """Writes ``federation_text`` to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(federation_text(folder, **changes))
    return path


class Mute:
    """A site's status that nobody reads."""

    def update(self, **changes: object) -> None:
        """Forgets."""


@dataclass
class Loopback:
    """An exchange that calls the sites' own code in this process.

    Attributes:
        desks: Site desks by node id.
        behaviours: What a node does instead of answering honestly.
        sent: Every frame sent, by group then node.
        answers: Every honest answer, by group then node.
        group: The group being exchanged.
    """

    desks: dict[int, Desk]
    behaviours: dict[int, Behaviour] = field(default_factory=dict)
    sent: dict[str, dict[int, bytes]] = field(default_factory=dict)
    answers: dict[str, dict[int, bytes]] = field(default_factory=dict)
    group: str = ""

    def honest(self, node: int, frame: bytes) -> bytes:
        """The site's own answer."""
        answer = execute(self.desks[node], frame)
        self.answers.setdefault(self.group, {})[node] = answer
        return answer

    def exchange(
        self,
        frames: dict[int, bytes],
        group: str,
        seconds: float,
        enough: Callable[[dict[int, Any]], bool],
        tick: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Any]]:
        """Yields each node's reply, in node order."""
        identify()
        self.group = group
        self.sent[group] = dict(frames)
        replies: dict[int, Any] = {}
        for node, frame in frames.items():
            message = outgoing(frame, node, group, seconds)
            behave = self.behaviours.get(node)
            if behave is None or group == "closing":
                answer = reply(self.honest(node, frame), message)
            else:
                answer = behave(self, node, frame, message)
            tick()
            if answer is not None:
                replies[node] = answer
                yield node, answer
            if enough(replies):
                return


@dataclass
class World:
    """A coordinator and its sites in one process."""

    coordinator: Coordinator
    store: Store
    run: Run
    schema: Schema
    members: tuple[Member, ...]
    desks: dict[int, Desk]
    link: Loopback
    events: list[tuple[str, dict[str, Any]]]
    judge: Judge

    def context(self, *, members: tuple[Member, ...] | None = None, min_clients: int | None = None) -> Context:
        """A fresh context, as a started or resumed run has."""
        federation = self.coordinator.federation
        if min_clients is not None:
            federation = replace(federation, min_clients=min_clients)
        return Context(
            federation,
            self.coordinator.signing,
            self.store,
            self.run,
            federation.task,
            self.schema,
            self.members if members is None else members,
            self.judge,
            lambda kind, **fields: self.events.append((kind, fields)),
        )

    def id_of(self, node: int) -> str:
        """The key id of the site at a node."""
        return next(m.id for m in self.members if m.node == node)

    def kept(self, node: int) -> list[str]:
        """Digests of the works whose updates a site still keeps."""
        return sorted(p.stem for p in self.desks[node].kept.glob("*.f32"))

    def charged(self, node: int) -> int:
        """Rounds that a site's ledger was charged for."""
        return self.desks[node].ledger.standing().rounds

    def verdicts(self, number: int) -> dict[str, str]:
        """Verdicts of a round by site name."""
        return {c.name: c.verdict for c in self.store.clients(self.run.id, number)}


def site_text(number: int) -> tuple[Record, ...]:
    """A few dozen records of a site; alternating labels."""
    words = (("my card was charged twice", LABELS[0]), ("my parcel has not arrived", LABELS[1]))
    return tuple(Record(f"{words[i % 2][0]} {'abcdefgh'[(i + number) % 8]}", words[i % 2][1]) for i in range(RECORDS))


def units_of(records: tuple[Record, ...]) -> Units:
    """The records as registered units of one record each, in block 1."""
    return Units(records, tuple((i,) for i in range(len(records))), (1,) * len(records), 0, 0)


def make_desk(home: Path, name: str, coordinator: Coordinator, base: BaseModel) -> tuple[Desk, SiteCard]:
    """A site's desk with fresh keys, and its card, admitted."""
    home.mkdir(parents=True)
    (home / "kept").mkdir()
    signing, opening = SigningKey.generate(), OpeningKey.generate()
    policy = Policy(
        (base.digest,), ("text-classification",), ("query", "value"), 8, 1000.0, 1e-5, 0.1, 1, 1000, "preferred"
    )
    node = make_node_key(home / "node.key").decode()
    card = SiteCard(
        name, signing.verify_key.raw.hex(), opening.sealing_key.raw.hex(), node, RECORDS, "record", 1000.0, 1e-5
    )
    card.save(home / "card.json", signing)
    admit_site(coordinator.home, home / "card.json")
    (home / "counter").mkdir()
    ledger = Ledger(home / "ledger.db", home / "counter" / "ledger.json", policy.limits)
    ledger.register(Source(home / "text.jsonl", "text", "label"), [b"1" * 32])
    desk = Desk(
        name,
        coordinator.card,
        policy,
        signing,
        opening,
        ledger,
        base,
        units_of(site_text(int(name[-1]))),
        Device("cpu", False, "cpu"),
        home / "kept",
        Mute(),
        Sums(home / "sums", signing, policy.peers, policy.least_cohort, 4, RECORDS),
        Witness(ledger, signing, coordinator.card.verify_key, log_of_site(name.encode()), {}, 0),
    )
    return desk, card


def start_store(home: Path, federation: Federation, base: BaseModel, rounds: int) -> tuple[Store, Run, Schema]:
    """A registry with a run whose first adapter is the model's own."""
    model = build(base, federation.task, "test")
    schema, first = schema_of(model), read_vector(model)
    run = Run(
        id=f"{rounds:032x}",
        federation=federation.name,
        created=time.time(),
        rounds=rounds,
        base=base.digest,
        task=json.dumps(asdict(federation.task)),
        rule=federation.rule,
        tensors=json.dumps(schema.as_list()),
        code="cloister test",
        config=json.dumps(run_config(federation, model, base.digest)),
    )
    if not (home / "sign.key").exists():
        SigningKey.generate().save(home / "sign.key")
    store = Store(home)
    store.start_run(run, to_safetensors(first, schema, {"round": "0"}), a_model(base.digest))
    return store, run, schema


def make_world(
    home: Path,
    folder: Path,
    *,
    sites: int = 3,
    rounds: int = 3,
    judge: Judge | None = None,
    settings: dict[str, str] | None = None,
) -> World:
    """Makes the whole federation in ``home`` over the base model in ``folder``; one torch thread, as the model is tiny.

    ``settings`` are ``federation_text``'s changes.
    """
    torch.set_num_threads(1)
    changes = {"rounds": f"rounds = {rounds}"} | (settings or {})
    federation = read_federation(write_federation(home / "FEDERATION.toml", folder, **changes))
    base = find_base(federation.base, "test")
    init(home / "coordinator", federation, base.digest, "ab" * 32)
    coordinator = open_coordinator(home / "coordinator")
    store, run, schema = start_store(coordinator.home, federation, base, rounds)
    desks, members = {}, []
    for number in range(1, sites + 1):
        desk, card = make_desk(home / f"site-{number}", f"site-{number}", coordinator, base)
        desks[number * 100] = desk
        members.append(Member(card, number * 100, TRAINING))
    return World(coordinator, store, run, schema, tuple(members), desks, Loopback(desks), [], judge or NoJudge())


def opened(desk: Desk, frame: bytes) -> tuple[Header, Plan]:
    """A plan as its site reads it, without doing it."""
    header, plaintext = open_envelope(
        frame, by=desk.card.verify_key, key=desk.opening, expect={}, max_bytes=1 << 28, where="test"
    )
    return header, Plan.from_bytes(plaintext, desk.card.verify_key, "test")[0]


def forged(
    desk: Desk,
    frame: bytes,
    plaintext: bytes,
    *,
    codec: Codec = Codec.UPDATE_F32,
    signing: SigningKey | None = None,
    to: SealingKey | None = None,
    bare: bool = False,
    preface: Preface | None = None,
    **changes: Any,
) -> bytes:
    """A well-formed, properly signed and sealed answer to ``frame`` with any content; ``changes`` falsify the header."""
    header, plan = opened(desk, frame)
    size = len(plaintext) // 4
    plaintext = plaintext if bare else (preface or desk.witness.preface("")).before(plaintext)
    fields: dict[str, Any] = {
        "direction": Direction.TO_COORDINATOR,
        "codec": codec,
        "parameters": size if codec == Codec.UPDATE_F32 else 0,
        "length": len(plaintext),
    }
    return seal(replace(header, **(fields | changes)), plaintext, to or plan.round_key, signing or desk.signing)


def forged_vector(desk: Desk, frame: bytes, vector: F32, **changes: Any) -> bytes:
    """``forged`` with a vector."""
    return forged(desk, frame, vector_to_bytes(np.asarray(vector, dtype=np.float32)), **changes)
