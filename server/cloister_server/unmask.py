"""Taking the masks off a group's sum: pure functions over what its members gave.

A wrong share is known by the digest that its giver stated before: it is left out, and who gave it named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from cloister_shared import masks, shamir
from cloister_shared.draw import threshold_of
from cloister_shared.errors import VerificationError
from cloister_shared.masks import U32, PeerKeys


@dataclass(frozen=True)
class Given:
    """What a site gave before its update, for taking masks off.

    Attributes:
        seed: SHA-256 of its seed, hex.
        of_masks: What it said of each holder's share of its mask key (``masks.share_digest``), hex, by holder.
        of_seeds: The same of its seed.
    """

    seed: str
    of_masks: Mapping[str, str]
    of_seeds: Mapping[str, str]


def unmasked(
    info: bytes,
    work: bytes,
    group: Sequence[str],
    alive: Sequence[str],
    dead: Sequence[str],
    keys: Mapping[str, PeerKeys],
    before: Mapping[str, Given],
    masked: Mapping[str, tuple[U32, int]],
    given: Mapping[str, Any],
) -> tuple[U32, set[str]]:
    """The sum of the living's vectors modulo 2^32, and who gave wrong shares.

    Args:
        info: The attempt's name.
        work: What the group was asked for, from ``work_name``.
        group: The group's members, as in the plan.
        alive: Whose updates came.
        dead: Who shared and sent none.
        keys: Every sharer's public keys of the attempt.
        before: What every sharer said with its shares.
        masked: The living's masked vectors.
        given: What the living gave at the opening.

    Raises:
        VerificationError: Too few good shares.
    """
    total, lied = masks.added([masked[i][0] for i in alive]), set[str]()
    for i in alive:
        good = _digests_to(before[i].seed)
        seed = _recovered(info, group, given, "alive", i, before[i].of_seeds, good, lied)
        total -= masks.self_mask(seed, info, len(total))
    for i in dead:
        own = _recovered(info, group, given, "dead", i, before[i].of_masks, _opens(keys[i].mask), lied)
        others = {j: bytes.fromhex(keys[j].mask) for j in alive}
        total += masks.pair_masks(own, i, others, info + work, len(total))
    return total, lied


def _digests_to(wanted: str) -> Callable[[bytes], bool]:
    return lambda secret: sha256(secret).hexdigest() == wanted


def _opens(public: str) -> Callable[[bytes], bool]:
    return lambda secret: masks.public_of(secret).hex() == public


def _recovered(
    info: bytes,
    group: Sequence[str],
    given: Mapping[str, Any],
    kind: str,
    site: str,
    said: Mapping[str, str],
    good: Callable[[bytes], bool],
    lied: set[str],
) -> bytes:
    """A secret out of the shares that are what its giver said they are; whoever gave another is put into ``lied``."""
    found, of = dict[int, bytes](), "seed" if kind == "alive" else "mask"
    for holder, answer in given.items():
        try:
            share = bytes.fromhex(answer[kind][site])
        except (KeyError, TypeError, ValueError):
            share = b""
        if masks.share_digest(info, site, holder, of, share) == said.get(holder):
            found[group.index(holder) + 1] = share
        else:
            lied.add(holder)
    least, where = threshold_of(len(group)), f"site {site[:16]}, {kind}"
    if len(found) < least:
        expected, got = f"{least} good shares of {len(group)}", f"{len(found)} of {len(given)} that were given"
        raise VerificationError("a mask cannot be taken off", where=where, expected=expected, got=got)
    secret = shamir.join(dict(sorted(found.items())[:least]))
    if not good(secret):
        raise VerificationError("the site's shares are of no secret of its own", where=where)
    return secret
