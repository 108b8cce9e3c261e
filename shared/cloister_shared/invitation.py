"""The one-time token that lets a site join: where to, whom to trust there, and a secret that is good once.

``cloister1.`` and base64url of canonical JSON with four bytes of its SHA-256 before it, so that a token that was cut or mistyped is told
apart from one that is refused. It carries fingerprints, no keys: what it names is fetched and held against them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from dataclasses import dataclass, field

from cloister_shared.cards import check_name, split_address
from cloister_shared.encoding import canonical, parse_record
from cloister_shared.errors import InputError, VerificationError

PREFIX = "cloister1."
SECRET_BYTES = 32


@dataclass(frozen=True)
class Invitation:
    """What a token says.

    Attributes:
        site: The name it is bound to.
        address: ``host:port`` of the enrolment service.
        ca: SHA-256 of the TLS CA's certificate, DER, hex.
        key: SHA-256 of the coordinator's signing key, hex.
        secret: 32 bytes.
    """

    site: str
    address: str
    ca: str
    key: str
    secret: bytes = field(repr=False)

    @classmethod
    def make(cls, site: str, address: str, ca: bytes, key: bytes) -> Invitation:
        """A new one, with a secret from the operating system's generator.

        Args:
            site: The site's name.
            address: ``host:port`` of the enrolment service.
            ca: The CA's certificate, DER.
            key: The coordinator's signing key, 32 bytes.
        """
        return cls(
            site, address, hashlib.sha256(ca).hexdigest(), hashlib.sha256(key).hexdigest(), os.urandom(SECRET_BYTES)
        )

    @property
    def name(self) -> str:
        """What the coordinator keeps of the secret: its SHA-256, hex."""
        return hashlib.sha256(self.secret).hexdigest()

    def to_token(self) -> str:
        """The token."""
        body = canonical(
            {"site": self.site, "address": self.address, "ca": self.ca, "key": self.key, "secret": self.secret.hex()}
        )
        return PREFIX + base64.urlsafe_b64encode(hashlib.sha256(body).digest()[:4] + body).decode().rstrip("=")

    @classmethod
    def from_token(cls, token: str) -> Invitation:
        """Reads a token.

        Raises:
            InputError: It is none, or not whole.
        """
        text = token.strip()
        try:
            data = base64.b64decode(
                text.removeprefix(PREFIX) + "=" * (-len(text.removeprefix(PREFIX)) % 4), b"-_", validate=True
            )
            body = data[4:]
            if not text.startswith(PREFIX) or hashlib.sha256(body).digest()[:4] != data[:4]:
                raise ValueError("checksum")
            record = parse_record(body, "token")
            made = cls(record["site"], record["address"], record["ca"], record["key"], bytes.fromhex(record["secret"]))
            check_name(made.site, "token")
            split_address(made.address, "token")
            if len(made.secret) != SECRET_BYTES or {len(made.ca), len(made.key)} != {64}:
                raise ValueError("sizes")
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            binascii.Error,
            InputError,
            VerificationError,
        ) as error:
            raise InputError(
                "not a token, or not the whole of it",
                where="token",
                expected=f"{PREFIX}… as `cloister coordinator invite` printed it",
                got=f"{len(text)} characters",
                mend="paste all of it; to join by the coordinator's card, give --coordinator CARD",
            ) from error
        return made
