"""Masks that cancel in a sum, and the fixed point that they are added in (Bonawitz et al. 2017, section 4).

Vectors become integers modulo 2^32: n clients' numbers are at most ``2^32 - 1`` together, so that a sum never wraps
(``Fixed``). Two clients agree on a mask by X25519 and HKDF-SHA256; one adds it, the other takes it away. Each adds one more of
its own, so that a client that was given up for dead and answers late is still covered. Masks are AES-256-CTR streams under keys that
are used once. Masks of two that were asked for different work do not cancel: the work's name is in them. Nothing here knows who is
alive; the client (``cloister_client.sums``) and the coordinator (``cloister_server.secure``) do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister_shared.encoding import canonical
from cloister_shared.errors import VerificationError
from cloister_shared.signing import SigningKey, VerifyKey
from cloister_shared.vectors import F32, Schema

U32 = npt.NDArray[np.uint32]
_NONCE = 12
_PURPOSE, AGREED = "secure-keys", "secure-agreed"
_HEX = re.compile("[0-9a-f]{64}(?:[0-9a-f]{64})?")


@dataclass(frozen=True)
class Fixed:
    """Fixed point for sums of at most ``members`` vectors.

    A number x of range R becomes ``round((x + R) / 2R * levels)``, in 0 to ``levels = floor((2^32 - 1) / members)``; so any sum of
    ``members`` of them is below 2^32. One step is ``2R / levels``, and a mean is off by at most half of one.

    Attributes:
        schema: Names and shapes.
        members: Most vectors in a sum, >= 1.
        adapter_range: Largest LoRA number kept, > 0; larger ones are cut.
        head_range: The head's.
    """

    schema: Schema
    members: int
    adapter_range: float
    head_range: float

    @property
    def levels(self) -> int:
        """The largest integer of one vector."""
        return (2**32 - 1) // self.members

    def ranges(self) -> npt.NDArray[np.float64]:
        """R of every number, ``(d,)``."""
        return np.concatenate(
            [
                np.full(int(np.prod(shape)), self.head_range if name.startswith("head.") else self.adapter_range)
                for name, shape in self.schema.tensors
            ]
        )

    def encode(self, vector: F32) -> U32:
        """``(d,) uint32`` of ``(d,) float32``.

        Raises:
            VerificationError: A number is not finite.
        """
        if not np.isfinite(vector).all():
            raise VerificationError("a vector that is to be summed is not finite")
        reach = self.ranges()
        wide = np.clip(vector.astype(np.float64), -reach, reach)
        return np.rint((wide + reach) / (2 * reach) * self.levels).astype(np.uint32)

    def mean(self, total: U32, count: int) -> F32:
        """The mean of ``count`` vectors out of their sum; cut to the range, which a sum of honest ones never leaves."""
        reach = self.ranges()
        wide = total.astype(np.float64) / count / self.levels * (2 * reach) - reach
        return np.clip(wide, -reach, reach).astype(np.float32)


def attempt_name(run: str, groups: str, number: int, attempt: int) -> bytes:
    """One attempt's name, which every key of it is derived with; ``groups`` is the digest of the draw."""
    return canonical({"run": run, "groups": groups, "round": number, "attempt": attempt})


def work_name(common: str, sharers: Mapping[str, str]) -> bytes:
    """The name of what a group was asked for in an attempt: what all were asked alike, and each one's work by its id."""
    return canonical({"common": common, "works": dict(sharers)})


@dataclass(frozen=True)
class PeerKeys:
    """A site's public keys of one attempt.

    Attributes:
        cipher: X25519, for shares, hex.
        mask: X25519, for masks, hex.
        signature: By the site's signing key, hex.
    """

    cipher: str
    mask: str
    signature: str

    @classmethod
    def made(cls, name: bytes, cipher: bytes, mask: bytes, by: SigningKey) -> PeerKeys:
        """The public halves of two private keys, signed for the attempt that ``attempt_name`` names."""
        public = {"cipher": public_of(cipher).hex(), "mask": public_of(mask).hex()}
        return cls(**public, signature=by.sign(_PURPOSE, name + canonical(public)).hex())

    @classmethod
    def from_dict(cls, value: Any) -> PeerKeys:
        """Reads the JSON form.

        Raises:
            VerificationError: Malformed.
        """
        keys: PeerKeys | None = None
        with suppress(TypeError):
            keys = cls(**value)
        # One spelling alone: keys are compared as they are written.
        if keys is not None and all(isinstance(text, str) and _HEX.fullmatch(text) for text in vars(keys).values()):
            return keys
        raise VerificationError(
            "a site's keys of an attempt are malformed", expected="cipher, mask and signature in hex"
        )

    def checked(self, name: bytes, signer: VerifyKey) -> PeerKeys:
        """These keys, after their signature was.

        Raises:
            VerificationError: It does not hold for this attempt, or a key cannot be used.
        """
        signed = name + canonical({"cipher": self.cipher, "mask": self.mask})
        where = f"keys of {signer.id.hex()[:16]}"
        signer.verify(_PURPOSE, signed, bytes.fromhex(self.signature), where)
        for key in (self.cipher, self.mask):
            agreed(bytes(32), bytes.fromhex(key), b"", where)
        return self


def _derived(secret: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, None, b"cloister secure sum\0" + info).derive(secret)


def agreed(mine: bytes, theirs: bytes, info: bytes, where: str) -> bytes:
    """A 32-byte key that two agree on (RFC 7748, RFC 5869).

    Args:
        mine: Our private key, 32 bytes.
        theirs: Their public key, 32 bytes.
        info: What the key is for, the same on both sides.
        where: Whose key, for messages.

    Raises:
        VerificationError: Theirs is no usable key.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(mine).exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError as error:
        raise VerificationError("a peer's key cannot be used", where=where, got=str(error)) from error
    return _derived(shared, info)


def public_of(private: bytes) -> bytes:
    """The public half of an X25519 private key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def stream(key: bytes, count: int) -> U32:
    """``(count,) uint32`` of AES-256-CTR under a key that is used for nothing else."""
    made = Cipher(AES256(key), CTR(bytes(16))).encryptor().update(bytes(4 * count))
    return np.frombuffer(made, dtype="<u4").astype(np.uint32, copy=False)


def self_mask(seed: bytes, info: bytes, count: int) -> U32:
    """A client's own mask out of its 32-byte seed."""
    return stream(_derived(seed, b"self\0" + info), count)


def pair_masks(mine: bytes, own: str, others: Mapping[str, bytes], info: bytes, count: int) -> U32:
    """The sum of a client's masks with others: plus with those after it, minus with those before, so that pairs cancel.

    Args:
        mine: The client's private mask key.
        own: Its id.
        others: Public mask keys by id.
        info: The round's name.
        count: d.
    """
    total = np.zeros(count, dtype=np.uint32)
    for other, key in others.items():
        low, high = sorted((own, other))
        made = stream(agreed(mine, key, b"pair\0" + info + f"\0{low}\0{high}".encode(), other), count)
        total = total + made if own < other else total - made
    return total


def hide(mine: bytes, theirs: bytes, info: bytes, secret: bytes) -> bytes:
    """Encrypts a share to one peer (AES-256-GCM under an agreed key)."""
    nonce = os.urandom(_NONCE)
    return nonce + AESGCM(agreed(mine, theirs, b"share\0" + info, "share")).encrypt(nonce, secret, info)


def reveal(mine: bytes, theirs: bytes, info: bytes, data: bytes, where: str) -> bytes:
    """Opens what ``hide`` made.

    Raises:
        VerificationError: It was not made so.
    """
    try:
        key = agreed(mine, theirs, b"share\0" + info, where)
        return AESGCM(key).decrypt(data[:_NONCE], data[_NONCE:], info)
    except (InvalidTag, ValueError) as error:
        raise VerificationError("a share does not open", where=where) from error


def agreement(info: bytes, work: bytes, alive: Iterable[str], dead: Iterable[str]) -> bytes:
    """What members sign before they open: the attempt, what all were asked and in what work each shared, who lives and who died.

    Args:
        info: The attempt's name.
        work: From ``work_name``.
        alive: Whose updates came.
        dead: Who shared and sent none.
    """
    return info + work + canonical({"alive": sorted(alive), "dead": sorted(dead)})


def share_digest(info: bytes, giver: str, holder: str, kind: str, share: bytes) -> str:
    """What a giver says of a share before anybody gives it back, hex: who gives back another is known by it.

    A share is uniform in 2^256 numbers, so that its hash says nothing of it that could be found out.

    Args:
        info: The attempt's name.
        giver: Whose secret it is of.
        holder: Who holds it.
        kind: ``mask`` or ``seed``.
        share: 33 bytes.
    """
    return sha256(b"cloister share\0" + canonical([info.decode(), giver, holder, kind]) + share).hexdigest()


def added(vectors: Sequence[U32]) -> U32:
    """The sum modulo 2^32."""
    total = np.zeros_like(vectors[0])
    for vector in vectors:
        total += vector
    return total
