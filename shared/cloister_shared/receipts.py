"""What the coordinator tells a client of its updates: receipts, with each plan and at the end of a run."""

from __future__ import annotations

import struct
from dataclasses import asdict, dataclass, replace
from typing import Any

from cloister_shared.encoding import canonical, digest, parse_record
from cloister_shared.errors import VerificationError
from cloister_shared.plan_fields import are_notes, must, must_be_hex, must_be_integer
from cloister_shared.sealing import SealingKey
from cloister_shared.signing import SIGNATURE_BYTES, SigningKey, VerifyKey
from cloister_shared.witness import View

CLOSING_PURPOSE, RECEIPT_PURPOSE = "closing", "receipt"
# The verdict of a receipt for who had no part in a round, by its commit.
NOT_ASKED = "not-asked"
# The rule by which a site refuses to go on without a receipt.
LACKS_RECEIPT = "witness.receipt"


def no_work(run: str, number: int) -> str:
    """What stands for a plan's digest in the receipt of who had no part in a round: one for each round."""
    return digest(canonical({"run": run, "round": number, "verdict": NOT_ASKED}))


@dataclass(frozen=True)
class Receipt:
    """What became of a client's update, told with the next plan and signed by itself: the client keeps it in its own log.

    Attributes:
        run: 16-byte run id, hex.
        round: Number of the committed round.
        plan: Digest of the core that the update answered; ``no_work`` for who had no part in the round.
        update: SHA-256 of the update's bytes that were accepted, or empty where none was.
        verdict: ``accepted`` or the admission code.
        adapter: SHA-256 of the committed adapter.
        index: Where the round's commit is in the coordinator's log.
        leaf: The hash of that leaf (RFC 6962), hex.
        signature: The coordinator's, over all of it, hex.
    """

    run: str
    round: int
    plan: str
    update: str
    verdict: str
    adapter: str
    index: int
    leaf: str
    signature: str = ""

    @property
    def _signed(self) -> bytes:
        return canonical({name: value for name, value in asdict(self).items() if name != "signature"})

    def by(self, key: SigningKey) -> Receipt:
        """Signed by the coordinator."""
        return replace(self, signature=key.sign(RECEIPT_PURPOSE, self._signed).hex())

    def check(self, key: VerifyKey, where: str) -> None:
        """Checks the signature.

        Raises:
            VerificationError: It does not hold.
        """
        key.verify(RECEIPT_PURPOSE, self._signed, bytes.fromhex(self.signature), where)

    @classmethod
    def from_dict(cls, value: Any) -> Receipt:
        """Reads the JSON form.

        Raises:
            VerificationError: It is malformed.
        """
        try:
            receipt = cls(**value)
        except TypeError as error:
            raise VerificationError("receipt is malformed", got=str(error)[:200]) from error
        must_be_hex(receipt.run, 16, "receipt.run")
        must_be_integer(receipt.round, 1, 1_000_000, "receipt.round")
        for digest_hex in (receipt.plan, receipt.update, receipt.adapter):
            if digest_hex != "":
                must_be_hex(digest_hex, 32, "receipt digest")
        must_be_integer(receipt.index, 0, 1 << 62, "receipt.index")
        must_be_hex(receipt.leaf, 32, "receipt.leaf")
        must_be_hex(receipt.signature, SIGNATURE_BYTES, "receipt.signature")
        must(
            isinstance(receipt.verdict, str) and 0 < len(receipt.verdict) <= 100,
            "receipt has no verdict",
            receipt.verdict,
        )
        return receipt


@dataclass(frozen=True)
class Closing:
    """What a client is told after a run's last round.

    Attributes:
        run: The run's id, hex.
        reply_to: The key that its answer is sealed to.
        receipts: Of rounds that it took part in.
        view: The coordinator's log.
        own_heads: The newest heads of the client's own logs that it signed, one for each key.
    """

    run: str
    reply_to: SealingKey
    receipts: tuple[Receipt, ...]
    view: View
    own_heads: tuple[str, ...] = ()

    def to_bytes(self, by: SigningKey) -> bytes:
        """The signed plaintext."""
        record = canonical(
            {
                "run": self.run,
                "reply_to": self.reply_to.raw.hex(),
                "receipts": [asdict(receipt) for receipt in self.receipts],
                "view": self.view.as_dict(),
                "own_heads": list(self.own_heads),
            }
        )
        return struct.pack(">I", len(record)) + record + by.sign(CLOSING_PURPOSE, record)

    @classmethod
    def from_bytes(cls, data: bytes, by: VerifyKey, where: str) -> Closing:
        """Checks and reads it.

        Raises:
            VerificationError: The signature or the form does not hold.
        """
        if len(data) < 4 + SIGNATURE_BYTES:
            raise VerificationError("closing message is cut short", where=where)
        (size,) = struct.unpack(">I", data[:4])
        record_bytes, signature = data[4 : 4 + size], data[4 + size :]
        by.verify(CLOSING_PURPOSE, record_bytes, signature, where)
        try:
            record = parse_record(record_bytes, where)
            receipts = tuple(Receipt.from_dict(r) for r in record["receipts"])
            key, view = SealingKey.from_hex(record["reply_to"], where), View.from_dict(record["view"], where)
            if not are_notes(record["own_heads"]):
                raise TypeError("own_heads")
            return cls(str(record["run"]), key, receipts, view, tuple(record["own_heads"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise VerificationError("closing message is malformed", where=where, got=str(error)) from error
