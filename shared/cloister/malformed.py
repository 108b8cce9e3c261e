"""Frames that are no honest reply: each is made by a client that owns a real key, and read as the coordinator reads every reply.

The client is enrolled and signs whatever it likes; only what its plan asked for may be accepted. The vector spans several chunks of an
envelope. Nothing here opens a socket; what arithmetic can do is ``attacks``'s.
"""

from __future__ import annotations

import gzip
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256

import numpy as np
from cloister_server.intake import Reply, read_reply
from cloister_shared.answers import Preface
from cloister_shared.cards import SiteCard
from cloister_shared.merkle import EMPTY
from cloister_shared.notes import Checkpoint
from cloister_shared.plan import PlanCore
from cloister_shared.sealing import CHUNK_BYTES, PURPOSE, Codec, Direction, Header, OpeningKey, envelope_bytes, seal
from cloister_shared.signing import SIGNATURE_BYTES, SigningKey
from cloister_shared.specs import TaskSpec, TrainingSpec
from cloister_shared.vectors import F32, Schema, vector_to_bytes

_WIDTH = 600_000
_TENSORS = (("layer.lora_A.weight", (2, _WIDTH // 4)), ("layer.lora_B.weight", (_WIDTH // 4, 2)))
_TRAINING = TrainingSpec(2, 0.1, 10.0, 1.0, 1.0, 1e-3, 0.1, 1e-5)
_TASK = TaskSpec("causal-lm", (), 64, ("x",), (0,), 2, 4.0)
_BOMB = 64 << 20


@dataclass(frozen=True)
class Forge:
    """A hostile client's tools: its keys, its plan, and an honest neighbour's last envelope."""

    site: SigningKey
    neighbour: SigningKey
    server: SigningKey
    key: OpeningKey
    schema: Schema
    core: PlanCore

    @classmethod
    def make(cls) -> Forge:
        """Fresh keys and a plan."""
        site, neighbour, server = (SigningKey.generate() for _ in range(3))
        schema, mine = Schema(_TENSORS), site.verify_key.id.hex()
        core = PlanCore(
            federation="attack",
            run=os.urandom(16).hex(),
            round=2,
            rounds=5,
            client=mine,
            cohort=tuple(sorted((mine, neighbour.verify_key.id.hex()))),
            weight=1.0,
            rule="average",
            base="ab" * 32,
            schema=schema.digest,
            parent="cd" * 32,
            task=_TASK,
            training=_TRAINING,
        )
        return cls(site, neighbour, server, OpeningKey.generate(), schema, core)

    @property
    def card(self) -> SiteCard:
        """The client's card."""
        key, sealing = self.site.verify_key.raw.hex(), OpeningKey.generate().sealing_key.raw.hex()
        return SiteCard("mallory", key, sealing, "", 100, "record", 8.0, 1e-5)

    def vector(self, value: float = 1e-4) -> F32:
        """An update that a plan would allow."""
        return np.full(self.schema.size, value, dtype=np.float32)

    def frame(
        self, plaintext: bytes, by: SigningKey | None = None, key: OpeningKey | None = None, **fields: object
    ) -> bytes:
        """A signed, sealed reply; ``fields`` falsify its header."""
        core, by, plaintext = self.core, by or self.site, Preface().before(plaintext)
        header = Header(
            direction=Direction.TO_COORDINATOR,
            codec=Codec.UPDATE_F32,
            run=bytes.fromhex(core.run),
            round=core.round,
            attempt=1,
            client=by.verify_key.id,
            server=self.server.verify_key.id,
            base=bytes.fromhex(core.base),
            schema=bytes.fromhex(core.schema),
            plan=bytes.fromhex(core.digest),
            parameters=self.schema.size,
            length=len(plaintext),
            time=int(time.time()),
            nonce=os.urandom(16),
        )
        return seal(replace(header, **fields), plaintext, (key or self.key).sealing_key, by)  # type: ignore[arg-type]

    def honest(self) -> bytes:
        """A reply as it should be."""
        return self.frame(vector_to_bytes(self.vector()))

    def signed(self, body: bytes) -> bytes:
        """Any bytes with the client's own signature in place of the last 64."""
        body = body[:-SIGNATURE_BYTES]
        return body + self.site.sign(PURPOSE, sha256(body).digest())

    def poked(self, value: float) -> bytes:
        """An update with one number changed."""
        vector = self.vector()
        vector[len(vector) // 2] = value
        return self.frame(vector_to_bytes(vector))

    def reordered(self) -> bytes:
        """Two sealed chunks changed places, signed anew."""
        frame, size = bytearray(self.honest()), CHUNK_BYTES + 16
        at = envelope_bytes(0) - 16 - SIGNATURE_BYTES
        frame[at : at + 2 * size] = frame[at + size : at + 2 * size] + frame[at : at + size]
        return self.signed(bytes(frame))

    def renamed(self) -> bytes:
        """Tensors of other names, of the same sizes."""
        other = Schema(tuple((f"other.{name}", shape) for name, shape in self.schema.tensors))
        return self.frame(vector_to_bytes(self.vector()), schema=bytes.fromhex(other.digest))

    def huge_header(self) -> bytes:
        """A header that claims 1e11 floats over a small body, signed."""
        honest = self.honest()
        header = Header.unpack(honest[10 : 10 + len(self._packed(honest))], "attack")
        packed = replace(header, parameters=10**11, length=4 * 10**11).pack()
        return self.signed(honest[:10] + packed + honest[10 + len(packed) :])

    @staticmethod
    def _packed(frame: bytes) -> bytes:
        return frame[10 : 10 + int.from_bytes(frame[8:10], "big")]


class Boom:
    """What a pickle would call."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.putenv, ("CLOISTER_OWNED",)


MALFORMED: dict[str, Callable[[Forge], bytes]] = {
    "NaN": lambda forge: forge.poked(float("nan")),
    "Inf": lambda forge: forge.poked(float("inf")),
    "out of a plan's reach": lambda forge: forge.poked(0.5),
    "wrong shape": lambda forge: forge.frame(vector_to_bytes(forge.vector()[:-4]), parameters=forge.schema.size - 4),
    "too few numbers": lambda forge: forge.frame(vector_to_bytes(forge.vector()[:-4])),
    "wrong names": Forge.renamed,
    "header of 1e11 floats": Forge.huge_header,
    "pickle": lambda forge: pickle.dumps(Boom()),
    "pickle under seal": lambda forge: forge.frame(pickle.dumps(Boom())),
    "zip bomb": lambda forge: forge.frame(gzip.compress(bytes(_BOMB))),
    "replay of the last round": lambda forge: forge.frame(vector_to_bytes(forge.vector()), round=1),
    "another client's envelope": lambda forge: forge.frame(vector_to_bytes(forge.vector()), by=forge.neighbour),
    "another client's envelope, re-signed": lambda forge: forge.signed(
        forge.frame(vector_to_bytes(forge.vector()), by=forge.neighbour)
    ),
    "cross-run": lambda forge: forge.frame(vector_to_bytes(forge.vector()), run=os.urandom(16)),
    "sealed to another key": lambda forge: forge.frame(vector_to_bytes(forge.vector()), key=OpeningKey.generate()),
    "truncated": lambda forge: forge.honest()[:-1000],
    "truncated, re-signed": lambda forge: forge.signed(forge.honest()[:-1000]),
    "reordered chunks": Forge.reordered,
    "one bit": lambda forge: (frame := forge.honest())[:5000] + bytes([frame[5000] ^ 1]) + frame[5001:],
    "empty": lambda forge: b"",
}


def read(forge: Forge, frame: bytes) -> Reply:
    """Reads a frame as the coordinator does."""
    at = Checkpoint("cloister/federation/attacked", 0, EMPTY)
    return read_reply(frame, forge.card, forge.core, 1, forge.key, forge.schema, forge.server.verify_key.id, at, "")


def try_all() -> dict[str, Reply]:
    """What every malformed frame came to, and ``honest``."""
    forge = Forge.make()
    made = {"honest": Forge.honest, **MALFORMED}
    return {name: read(forge, make(forge)) for name, make in made.items()}
