"""Shamir's secret sharing (1979) of 32-byte secrets over the least prime above 2^256.

A share is the value of a random polynomial of degree ``threshold - 1`` at the holder's place, 1 to ``holders``; its value at 0 is the
secret. Any ``threshold`` shares give it back, fewer say nothing of it. A wrong share gives a wrong secret: whoever joins shares compares
what comes out with something public. Coefficients are from the operating system's generator. Python's integers do not take constant
time: shares are made and joined by their owner alone.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from cloister_shared.errors import VerificationError

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, holders: int, threshold: int) -> list[bytes]:
    """Shares of ``secret``.

    Args:
        secret: 32 bytes.
        holders: How many shares, 1 to 1000.
        threshold: How many give it back, 1 to ``holders``.

    Returns:
        33 bytes each, for places 1, 2, … ``holders``.

    Raises:
        ValueError: Sizes do not fit.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= holders <= 1000:
        raise ValueError(f"{len(secret)} bytes for {holders} holders, {threshold} of them enough")
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value(coefficients, place).to_bytes(SHARE_BYTES) for place in range(1, holders + 1)]


def _value(coefficients: list[int], at: int) -> int:
    total = 0
    for coefficient in reversed(coefficients):
        total = (total * at + coefficient) % PRIME
    return total


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret out of as many shares as its threshold, by place (Lagrange's interpolation at 0).

    Raises:
        VerificationError: A share is malformed, or they belong to no 32-byte secret.
    """
    points = {place: int.from_bytes(share) for place, share in shares.items()}
    if not points or any(place < 1 for place in points) or any(len(s) != SHARE_BYTES for s in shares.values()):
        raise VerificationError("shares are malformed", expected=f"{SHARE_BYTES} bytes each, at places from 1")
    if any(value >= PRIME for value in points.values()):
        raise VerificationError("a share is out of the field")
    total = 0
    for place, value in points.items():
        over = under = 1
        for other in points:
            if other != place:
                over, under = over * other % PRIME, under * (other - place) % PRIME
        total += value * over * pow(under, -1, PRIME)
    total %= PRIME
    if total >= 1 << 256:
        raise VerificationError("these shares are of no secret")
    return total.to_bytes(SECRET_BYTES)
