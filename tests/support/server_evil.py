"""A malicious coordinator: it holds the coordinator's keys, speaks to honest sites directly, and keeps to no order."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from cloister_client.round import execute
from cloister_server.admission import reaches
from cloister_shared import masks, shamir
from cloister_shared.answers import read_answer
from cloister_shared.draw import Commitment, Reveal, Transcript, threshold_of
from cloister_shared.encoding import canonical, digest
from cloister_shared.masks import U32, attempt_name, work_name
from cloister_shared.plan import Plan, PlanCore
from cloister_shared.receipts import Closing, Receipt
from cloister_shared.sealing import Codec, Direction, Header, OpeningKey, open_envelope, seal
from cloister_shared.specs import SecureSum
from cloister_shared.vectors import F32, from_safetensors, vector_from_bytes, vector_to_bytes

from support.server_world import World

SIZE = 4


class RefusedBySite(Exception):  # noqa: N818
    """What a site said no to."""


class Evil:
    """The coordinator.

    Args:
        world: Whose keys it holds.
        run: The run that it speaks of; the world's by default.
    """

    def __init__(self, world: World, run: str | None = None) -> None:
        self.world, self.run = world, run or world.run.id
        self.ids = {world.id_of(node): node for node in world.desks}
        self.key = OpeningKey.generate()
        row = world.store.last_committed(world.run.id)
        self.parent = from_safetensors(world.store.adapter(row.adapter or ""), world.schema, "evil")

    def send(self, site: str, codec: Codec, number: int, attempt: int, plaintext: bytes, plan: str = "00" * 32) -> Any:
        """Sends anything; what came back, opened."""
        world, desk = self.world, self.world.desks[self.ids[site]]
        header = Header(
            direction=Direction.TO_CLIENT,
            codec=codec,
            run=bytes.fromhex(self.run),
            round=number,
            attempt=attempt,
            client=bytes.fromhex(site),
            server=world.coordinator.signing.verify_key.id,
            base=bytes.fromhex(world.run.base),
            schema=bytes.fromhex(world.schema.digest),
            plan=bytes.fromhex(plan),
            parameters=world.schema.size,
            length=len(plaintext),
            time=int(time.time()),
            nonce=os.urandom(16),
        )
        answer = execute(desk, seal(header, plaintext, desk.opening.sealing_key, world.coordinator.signing))
        back, said = open_envelope(
            answer, by=desk.signing.verify_key, key=self.key, expect={}, max_bytes=1 << 28, where="evil"
        )
        if codec in (Codec.PLAN, Codec.CLOSING):
            _, said = read_answer(said, "evil")
        if back.codec == Codec.ACK:
            return None
        if back.codec == Codec.MASKED_U32:
            return np.frombuffer(said, dtype="<u4").astype(np.uint32)
        record = json.loads(said)
        if back.codec == Codec.REFUSAL:
            raise RefusedBySite(f"{record['rule']}: {record.get('what')}")
        return record

    def ask(self, site: str, number: int, attempt: int, **record: Any) -> Any:
        """A message of the protocol."""
        plaintext = canonical(record | {"reply_to": self.key.sealing_key.raw.hex()})
        return self.send(site, Codec.SECURE, number, attempt, plaintext)

    def draw(self, size: int = SIZE) -> Transcript:
        """A whole draw."""
        commitments = {i: Commitment(**self.ask(i, 0, 1, stage="commit")) for i in self.ids}
        shown = {i: asdict(c) for i, c in commitments.items()}
        reveals = {i: Reveal(**self.ask(i, 0, 1, stage="reveal", size=size, commitments=shown)) for i in self.ids}
        return Transcript(self.run, size, commitments, reveals)

    def core(self, site: str, group: tuple[str, ...], **changes: Any) -> PlanCore:
        """A site's work; ``training`` and ``ranges`` among what may be changed."""
        member = next(m for m in self.world.members if m.id == site)
        training = replace(member.training, **changes.pop("training", {}))
        rates = tuple(next(m for m in self.world.members if m.id == i).training.sample_rate for i in group)
        lora, head = changes.pop("ranges", reaches(member.training))
        units = changes.pop("units", (("record", 1),) * len(group))
        secure = SecureSum(group, lora, head, changes.pop("rates", rates), units)
        fields: dict[str, Any] = {
            "federation": "fed",
            "run": self.run,
            "round": 1,
            "rounds": self.world.run.rounds,
            "client": site,
            "cohort": tuple(sorted(self.ids)),
            "weight": 1.0,
            "rule": "average",
            "base": self.world.run.base,
            "schema": self.world.schema.digest,
            "parent": digest(vector_to_bytes(self.parent)),
            "task": self.world.coordinator.federation.task,
            "training": training,
            "secure": secure,
        }
        return PlanCore(**(fields | changes))

    def plan(self, site: str, core: PlanCore, attempt: int, sharers: Mapping[str, str], said: Mapping[str, Any]) -> Any:
        """Sends a plan with the shares that ``said`` has for the site; the masked update."""
        shares = {j: self.share_for(said[j], site) for j in sharers if j != site}
        store = self.world.store
        view = store.view_for(site, store.checkpoint(), store.witnessed())
        made = Plan(core, attempt, self.key.sealing_key, int(time.time()), view, (), sharers, shares)
        plaintext = made.to_bytes(self.parent, self.world.coordinator.signing)
        return self.send(site, Codec.PLAN, core.round, attempt, plaintext, core.digest)

    @staticmethod
    def share_for(said: Mapping[str, Any], site: str) -> tuple[str, str, str]:
        """What one member said for another, as a plan carries it."""
        return said["shares"][site], said["of_masks"][site], said["of_seeds"][site]

    def opening(
        self, openers: Sequence[str], attempt: int, alive: Sequence[str], dead: Sequence[str]
    ) -> dict[str, Any]:
        """Agreement and opening by ``openers``; what they gave."""
        lists = {"alive": list(alive), "dead": list(dead)}
        agreed = {i: self.ask(i, 1, attempt, stage="agree", **lists)["signature"] for i in openers}
        return {i: self.ask(i, 1, attempt, stage="open", agreed=agreed) for i in openers}

    def close(self, site: str, work: str) -> None:
        """A receipt for a work, at a moment of its own choice."""
        receipt = Receipt(self.run, 1, work, "", "accepted", "", 1, "ab" * 32).by(self.world.coordinator.signing)
        at = self.world.store.checkpoint()
        self.send(
            site,
            Codec.CLOSING,
            1,
            1,
            Closing(
                self.run,
                self.key.sealing_key,
                (receipt,),
                self.world.store.view_for(site, at, self.world.store.witnessed()),
            ).to_bytes(self.world.coordinator.signing),
        )

    def truth(self, site: str, core: PlanCore) -> F32:
        """What the site's own update is: for comparing."""
        data = (self.world.desks[self.ids[site]].kept / f"{core.digest}.f32").read_bytes()
        return vector_from_bytes(data, self.world.schema, "evil")

    def attempt(
        self,
        drawn: Transcript,
        group: Sequence[str],
        attempt: int,
        cores: Mapping[str, PlanCore],
        dead: Sequence[str] = (),
        between: Callable[[], None] = lambda: None,
        works: Mapping[str, str] | None = None,
    ) -> U32:
        """Every stage of one attempt, and what taking off the masks gives, as if all had been asked what the first was."""
        keys = {i: self.ask(i, 1, attempt, stage="keys", transcript=drawn.as_dict()) for i in group}
        said = {i: self.ask(i, 1, attempt, stage="shares", keys=keys) for i in group}
        works = works or {i: cores[i].digest for i in group}
        got = {i: self.plan(i, cores[i], attempt, works, said) for i in group}
        alive = [i for i in group if i not in dead]
        between()
        given = self.opening(alive, attempt, alive, dead)
        total = masks.added([got[i] for i in alive])
        name = attempt_name(self.run, drawn.digest, 1, attempt)
        least = threshold_of(len(group))
        for i in alive:
            total = total - masks.self_mask(recovered(group, given, "alive", i, least), name, len(total))
        for i in dead:
            own = recovered(group, given, "dead", i, least)
            others = {j: bytes.fromhex(keys[j]["mask"]) for j in alive}
            work = work_name(cores[alive[0]].common, works)
            total = total + masks.pair_masks(own, i, others, name + work, len(total))
        return total


def recovered(group: Sequence[str], given: Mapping[str, Any], kind: str, site: str, least: int) -> bytes:
    """A secret out of ``least`` shares."""
    places = {
        sorted(group).index(h) + 1: bytes.fromhex(said[kind][site]) for h, said in given.items() if site in said[kind]
    }
    return shamir.join(dict(list(places.items())[:least]))
