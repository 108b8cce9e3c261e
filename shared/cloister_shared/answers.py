"""What a client's answer to a plan begins with: the head of its own log, and its cosignature of the coordinator's.

The answer's plaintext is a 4-byte length, canonical JSON ``{"head": note, "cosignature": line}``, and the answer itself (an update, a
masked one, or a refusal). Both are over hashes of logs and say nothing of any text. Nothing here checks a signature: who reads it knows
the keys.
"""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass

from cloister_shared.encoding import canonical, parse_record
from cloister_shared.errors import VerificationError

MAX_BYTES = 4096
# What the rule of a refusal begins with where the site was charged for this very plan before.
SPENT = "spent."


@dataclass(frozen=True)
class Preface:
    """What a client says of logs beside its answer.

    Attributes:
        head: Its own log's head as a signed note (``notes``), or empty.
        cosignature: Its line for the coordinator's newest head, or empty.
    """

    head: str = ""
    cosignature: str = ""

    def before(self, answer: bytes) -> bytes:
        """The plaintext: this, then the answer."""
        said = canonical(asdict(self))
        return struct.pack(">I", len(said)) + said + answer


def read_answer(plaintext: bytes, where: str) -> tuple[Preface, bytes]:
    """Takes a plaintext apart.

    Raises:
        VerificationError: It is malformed.
    """
    if len(plaintext) < 4 or not (size := struct.unpack(">I", plaintext[:4])[0]) <= min(MAX_BYTES, len(plaintext) - 4):
        raise VerificationError("an answer without a head", where=where, got=f"{len(plaintext)} bytes")
    record = parse_record(plaintext[4 : 4 + size], where)
    if set(record) != {"head", "cosignature"} or not all(isinstance(text, str) for text in record.values()):
        raise VerificationError("an answer's head is malformed", where=where, got=", ".join(sorted(record))[:100])
    return Preface(**record), plaintext[4 + size :]
