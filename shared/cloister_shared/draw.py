"""Drawing the groups of a run by commit and reveal, so that nobody chooses whom a site is summed with.

    every site: H(nonce), size, signed -> all commitments shown to all -> every site: nonce, signed over all of them -> groups

A commitment states the site's declared number of units as well: members see from it that nobody among them was asked for nothing.
The seed is a hash of all nonces; sites in the order of H(seed, id) are cut into groups of the size that all signed: one draw has one
partition. A coordinator that colludes with a site learns the groups before that site reveals, and can break the draw off: a site reveals
for one list of commitments per run, and takes part in so many draws a day (``cloister_client.sums``). Everything is checked from
signatures by whoever has the transcript.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import VerificationError
from cloister_shared.signing import SigningKey, VerifyKey

_COMMIT, _REVEAL = "draw-commitment", "draw-nonce"
NONCE_BYTES = 32
LEAST_GROUP, MOST_GROUP = 3, 100
_HEX = re.compile("[0-9a-f]{64}")
_SIGNATURE = re.compile("[0-9a-f]{128}")


def threshold_of(members: int) -> int:
    """Shares that give a secret back: above 2/3 of the group, so that no two sets of honest answers meet it for both secrets of one."""
    return 2 * members // 3 + 1


@dataclass(frozen=True)
class Commitment:
    """A site's commitment.

    Attributes:
        key: Its Ed25519 key, hex.
        commitment: SHA-256 over run, key and nonce, hex.
        records: Its declared number of privacy units, 1 to 1e9.
        signature: Its signature over all of it, hex.
    """

    key: str
    commitment: str
    records: int
    signature: str

    @property
    def id(self) -> str:
        """The site's key id, hex."""
        return VerifyKey.from_hex(self.key, "draw").id.hex()


@dataclass(frozen=True)
class Reveal:
    """A site's nonce.

    Attributes:
        nonce: 32 bytes, hex.
        signature: Over run, nonce and all commitments, hex.
    """

    nonce: str
    signature: str


def _commitment_of(run: str, key: str, nonce: bytes) -> str:
    return sha256(b"cloister draw\0" + bytes.fromhex(run) + bytes.fromhex(key) + nonce).hexdigest()


def _committed(run: str, commitment: str, records: int) -> bytes:
    return canonical({"run": run, "commitment": commitment, "records": records})


def commit(run: str, nonce: bytes, records: int, by: SigningKey) -> Commitment:
    """A site's commitment to its nonce in a run, and its declared number of units."""
    key = by.verify_key.raw.hex()
    made = _commitment_of(run, key, nonce)
    return Commitment(key, made, records, by.sign(_COMMIT, _committed(run, made, records)).hex())


def list_digest(run: str, size: int, commitments: Mapping[str, Commitment]) -> str:
    """The name of a list of commitments and of the size that groups will have, hex."""
    return digest(canonical({"run": run, "size": size, "commitments": {i: asdict(c) for i, c in commitments.items()}}))


def reveal(run: str, size: int, nonce: bytes, commitments: Mapping[str, Commitment], by: SigningKey) -> Reveal:
    """A site's nonce, for one list of commitments and one size of groups."""
    named = canonical({"run": run, "nonce": nonce.hex(), "commitments": list_digest(run, size, commitments)})
    return Reveal(nonce.hex(), by.sign(_REVEAL, named).hex())


def check_reveal(run: str, named: str, commitment: Commitment, shown: Reveal) -> None:
    """Sees that a nonce is what its site committed to, and signed for the list ``named``.

    Raises:
        VerificationError: It is not.
    """
    where = f"nonce of {commitment.id[:16]}"
    if _commitment_of(run, commitment.key, _bytes(shown.nonce)) != commitment.commitment:
        raise VerificationError("a nonce is not what was committed to", where=where)
    signed = canonical({"run": run, "nonce": shown.nonce, "commitments": named})
    VerifyKey.from_hex(commitment.key, where).verify(_REVEAL, signed, _bytes(shown.signature), where)


def check_commitments(run: str, commitments: Mapping[str, Commitment]) -> None:
    """Sees that each is signed by the key that it stands under.

    Raises:
        VerificationError: One is not.
    """
    for name, one in commitments.items():
        if one.id != name:
            raise VerificationError("a commitment stands under another key", where="draw", expected=name, got=one.id)
        signed = _committed(run, one.commitment, one.records)
        VerifyKey.from_hex(one.key, "draw").verify(_COMMIT, signed, _bytes(one.signature), f"commitment of {name[:16]}")


@dataclass(frozen=True)
class Transcript:
    """A whole draw.

    Attributes:
        run: The run.
        size: Least members of a group, 3 to 100.
        commitments: By site's id.
        reveals: By site's id; the same sites.
    """

    run: str
    size: int
    commitments: Mapping[str, Commitment]
    reveals: Mapping[str, Reveal]

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "run": self.run,
            "size": self.size,
            "commitments": {i: asdict(c) for i, c in self.commitments.items()},
            "reveals": {i: asdict(r) for i, r in self.reveals.items()},
        }

    @classmethod
    def from_dict(cls, value: Any) -> Transcript:
        """Reads the JSON form.

        Raises:
            VerificationError: Malformed.
        """
        try:
            run, size = value["run"], value["size"]
            if (
                set(value) != {"run", "size", "commitments", "reveals"}
                or not isinstance(run, str)
                or type(size) is not int
            ):
                raise VerificationError("a draw has other fields", where="draw", got=str(sorted(value))[:200])
            reveals = {str(name): read_reveal(one) for name, one in value["reveals"].items()}
            return cls(run, size, read_commitments(value["commitments"]), reveals)
        except (TypeError, KeyError, AttributeError) as error:
            raise VerificationError("a draw is malformed", where="draw", got=str(error)[:200]) from error

    @property
    def digest(self) -> str:
        """Its name, hex."""
        return digest(canonical(self.as_dict()))

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The groups, each sorted, after everything is checked.

        Raises:
            VerificationError: A signature or a nonce does not hold, somebody is missing, or there are too few for one group.
        """
        if not (LEAST_GROUP <= self.size <= MOST_GROUP and len(self.commitments) >= LEAST_GROUP):
            raise VerificationError(
                "too few sites for a group",
                where="draw",
                expected=f">= {LEAST_GROUP} sites, groups of {LEAST_GROUP} to {MOST_GROUP}",
                got=f"{len(self.commitments)} sites, groups of {self.size}",
            )
        check_commitments(self.run, self.commitments)
        if set(self.reveals) != set(self.commitments):
            raise VerificationError("not all who committed revealed", where="draw")
        named = list_digest(self.run, self.size, self.commitments)
        for name, one in self.reveals.items():
            check_reveal(self.run, named, self.commitments[name], one)
        return cut(
            [self.reveals[name].nonce for name in sorted(self.reveals)], self.run, tuple(self.reveals), self.size
        )

    def group_of(self, site: str) -> tuple[str, ...]:
        """A site's group.

        Raises:
            VerificationError: As ``groups``, or the site is not in the draw.
        """
        for group in self.groups():
            if site in group:
                return group
        raise VerificationError("this site is not in the draw", where="draw", got=site[:16])


def cut(nonces: list[str], run: str, sites: tuple[str, ...], size: int) -> tuple[tuple[str, ...], ...]:
    """Groups of ``size`` sites or a few more, by the hash of seed and id."""
    seed = sha256(b"cloister groups\0" + bytes.fromhex(run) + b"".join(map(bytes.fromhex, nonces))).digest()
    order = sorted(sites, key=lambda site: sha256(seed + bytes.fromhex(site)).digest())
    count = max(1, len(order) // size)
    return tuple(tuple(sorted(order[place::count])) for place in range(count))


def read_commitments(value: Any) -> dict[str, Commitment]:
    """Reads commitments by id.

    Raises:
        VerificationError: Malformed.
    """
    try:
        out = {str(name): Commitment(**fields) for name, fields in value.items()}
    except (TypeError, AttributeError) as error:
        raise VerificationError("commitments are malformed", where="draw", got=str(error)[:200]) from error
    for one in out.values():
        # One spelling alone, of one length: they are compared as they are written, and shown to all.
        if not (_is(_HEX, one.key) and _is(_HEX, one.commitment) and _is(_SIGNATURE, one.signature)) or not (
            type(one.records) is int and 1 <= one.records <= 10**9
        ):
            raise VerificationError(
                "commitments are malformed", where="draw", expected="hex digits and a number of units"
            )
    return out


def _is(form: re.Pattern[str], text: object) -> bool:
    return isinstance(text, str) and form.fullmatch(text) is not None


def read_reveal(value: Any) -> Reveal:
    """Reads one nonce.

    Raises:
        VerificationError: Malformed.
    """
    try:
        made = Reveal(**value)
    except TypeError as error:
        raise VerificationError("a nonce is malformed", where="draw", got=str(error)[:200]) from error
    if not (_is(_HEX, made.nonce) and _is(_SIGNATURE, made.signature)):
        raise VerificationError("a nonce is malformed", where="draw", expected="hex digits")
    return made


def _bytes(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise VerificationError("not hex digits", where="draw") from error
