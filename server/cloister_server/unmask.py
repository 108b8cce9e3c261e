"""Taking the masks off a group's sum: pure functions over what its members gave.

A wrong share gives a wrong secret, which the seed's digest or the public key tells; other shares are tried then.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from cloister_shared import masks, shamir
from cloister_shared.draw import threshold_of
from cloister_shared.errors import VerificationError
from cloister_shared.masks import U32, PeerKeys

_TRIES = 2000


def unmasked(
    info: bytes,
    work: bytes,
    group: Sequence[str],
    alive: Sequence[str],
    dead: Sequence[str],
    keys: Mapping[str, PeerKeys],
    seeds: Mapping[str, str],
    masked: Mapping[str, tuple[U32, int]],
    given: Mapping[str, Any],
) -> U32:
    """The sum of the living's vectors modulo 2^32.

    Args:
        info: The attempt's name.
        work: What the group was asked for, from ``work_name``.
        group: The group's members, as in the plan.
        alive: Whose updates came.
        dead: Who shared and sent none.
        keys: Every sharer's public keys of the attempt.
        seeds: SHA-256 of the living's seeds, hex, as they said with their shares.
        masked: The living's masked vectors.
        given: What the living gave at the opening.

    Raises:
        VerificationError: Too few good shares.
    """
    total = masks.added([masked[i][0] for i in alive])
    for i in alive:
        seed = _recovered(group, given, "alive", i, _digests_to(seeds[i]))
        total -= masks.self_mask(seed, info, len(total))
    for i in dead:
        own = _recovered(group, given, "dead", i, _opens(keys[i].mask))
        others = {j: bytes.fromhex(keys[j].mask) for j in alive}
        total += masks.pair_masks(own, i, others, info + work, len(total))
    return total


def _subsets(places: list[int], least: int) -> Iterator[tuple[int, ...]]:
    """Subsets to try: all where they are few, else some at random, of which one in three has not a given place in it."""
    if math.comb(len(places), least) <= _TRIES:
        yield from itertools.combinations(places, least)
        return
    rng = random.Random(0)  # which shares are tried first protects nobody
    for _ in range(_TRIES):
        yield tuple(sorted(rng.sample(places, least)))


def _digests_to(wanted: str) -> Callable[[bytes], bool]:
    return lambda secret: sha256(secret).hexdigest() == wanted


def _opens(public: str) -> Callable[[bytes], bool]:
    return lambda secret: masks.public_of(secret).hex() == public


def _recovered(
    group: Sequence[str], given: Mapping[str, Any], kind: str, site: str, good: Callable[[bytes], bool]
) -> bytes:
    """A secret out of the shares that were given; where one is wrong, other shares are tried."""
    found = dict[int, bytes]()
    for holder, said in given.items():
        try:
            share = bytes.fromhex(said[kind][site])
        except (KeyError, TypeError, ValueError):
            continue
        if len(share) == shamir.SHARE_BYTES:
            found[group.index(holder) + 1] = share
    least = threshold_of(len(group))
    for places in _subsets(sorted(found), least):
        try:
            secret = shamir.join({place: found[place] for place in places})
        except VerificationError:
            continue
        if good(secret):
            return secret
    raise VerificationError(
        "a mask cannot be taken off",
        where=f"site {site[:16]}, {kind}",
        expected=f"{least} good shares of {len(group)}",
        got=f"{len(found)} shares",
    )
