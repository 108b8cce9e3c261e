"""The client's side of a sum that nobody can open: its keys, shares and masks, and what it refuses.

    run:      commit -> reveal                                     (``cloister_shared.draw``: groups that nobody chose)
    attempt:  keys -> shares -> masked update -> agree: one signature on who lives, who died and what all were asked
              -> open: for the living a share of their own mask's seed, for the dead of their mask key

It opens only what more than two thirds of its group signed alike (Bonawitz et al. 2017, section 4, the consistency check): no two openers
are told of other dead, other sharers or other work, and two unlike sums of one work would need honest members that sign twice. It signs
once an attempt; and for a work, for good, with the same living only: two sums that differ by one client would be that client's update. So
it never gives both secrets of one site, unless the coordinator has more than a third of the group on its side. Masks cancel only among
members that were asked for the same work (``PlanCore.common``) in the same groups: the same noise over the same batch, and each member
sees that every other's sample rate fills it, by the size that the other signed in the draw. Shares are opened before anything is trained:
who gave worthless ones is named while it costs nothing. An attempt's secrets are in memory alone and gone after it; the run's nonce and
what was agreed to are on disk. Peers that the policy does not name count for nothing. Draws are few a day, and each is in ``draws.log``:
whoever may draw at will draws until a site sits among its own. No text is read here; what is masked passed ``release``.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from cloister_shared import draw, masks, shamir
from cloister_shared.draw import Transcript, read_commitments, threshold_of
from cloister_shared.encoding import canonical, digest, write_durably
from cloister_shared.errors import RefusedError, VerificationError
from cloister_shared.masks import U32, PeerKeys, attempt_name, work_name
from cloister_shared.plan import PlanCore
from cloister_shared.signing import SigningKey, VerifyKey
from cloister_shared.specs import LEAST_SHARE, MOST_SHARE, SecureSum
from cloister_shared.vectors import F32, Schema

_DAY = 86_400.0
_ROUNDING = 1e-9


@dataclass
class _Attempt:
    """One attempt's secrets; never written, never shown."""

    run: str
    number: int
    attempt: int
    transcript: Transcript
    members: tuple[str, ...]
    cipher: bytes = field(default_factory=lambda: os.urandom(32), repr=False)
    mask: bytes = field(default_factory=lambda: os.urandom(32), repr=False)
    seed: bytes = field(default_factory=lambda: os.urandom(32), repr=False)
    keys: dict[str, PeerKeys] = field(default_factory=dict)
    own_share: bytes = field(default=b"", repr=False)
    held: dict[str, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)
    sharers: Mapping[str, str] = field(default_factory=dict)
    work: str = ""
    common: str = ""
    agreed: tuple[tuple[str, ...], tuple[str, ...]] | None = None

    @cached_property
    def info(self) -> bytes:
        """The attempt's name, in every derived key."""
        return attempt_name(self.run, self.transcript.digest, self.number, self.attempt)

    def statement(self, alive: tuple[str, ...], dead: tuple[str, ...]) -> bytes:
        """What members sign before they open."""
        return masks.agreement(self.info, work_name(self.common, self.sharers), alive, dead)


class Sums:
    """A site's part in its sums.

    Args:
        folder: Where the run's nonces and what was opened are kept; made where missing.
        signing: The site's key.
        peers: Keys of other sites that the data owner accepts, hex.
        least: Least accepted peers among those that a sum is of, itself not counted.
        draws: Most draws in any 24 hours.
        units: What the site declared as the number of its privacy units.
    """

    def __init__(
        self, folder: Path, signing: SigningKey, peers: Collection[str], least: int, draws: int, units: int
    ) -> None:
        self._folder, self._signing, self._least = folder, signing, least
        self._draws, self._units = draws, units
        self._peers = {VerifyKey(bytes.fromhex(key)).id.hex() for key in peers}
        self._now: _Attempt | None = None
        folder.mkdir(mode=0o700, exist_ok=True)

    @property
    def _own(self) -> str:
        return self._signing.verify_key.id.hex()

    def answer(self, run: str, number: int, attempt: int, record: dict[str, Any]) -> dict[str, Any]:
        """Answers one message of the protocol.

        Args:
            run: The run, hex.
            number: The round; 0 in the draw.
            attempt: The attempt.
            record: The message.

        Raises:
            RefusedError: It asks for what this site does not give; ``rule`` begins with ``secure.``.
            VerificationError: It is malformed, or a signature or nonce in it does not hold.
        """
        stage = record.get("stage")
        try:
            if stage == "commit":
                return asdict(self.commit(run))
            if stage == "reveal":
                return asdict(self.reveal(run, record["size"], record["commitments"]))
            if stage == "keys":
                return asdict(self.keys(run, number, attempt, record["transcript"]))
            if stage == "shares":
                return self.shares(run, number, attempt, record["keys"])
            if stage == "agree":
                return self.agree(run, number, attempt, tuple(record["alive"]), tuple(record["dead"]))
            if stage == "open":
                return self.open(run, number, attempt, record["agreed"])
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise VerificationError("a message of a secure sum is malformed", where=str(stage)[:20]) from error
        raise VerificationError("a message of a secure sum has no known stage", got=repr(stage)[:40])

    def commit(self, run: str) -> draw.Commitment:
        """A commitment to this site's nonce in ``run``; the same one each time."""
        kept = self._read(run)
        if not kept:
            self._count_draw(run, time.time())
            kept = {"nonce": secrets.token_hex(draw.NONCE_BYTES), "list": "", "transcript": "", "last": [0, 0]}
            self._write(run, kept)
        return draw.commit(run, bytes.fromhex(kept["nonce"]), self._units, self._signing)

    def _count_draw(self, run: str, now: float) -> None:
        path = self._folder / "draws.log"
        lines = path.read_text().splitlines() if path.is_file() else []
        newest = [line for line in lines if float(line.split()[0]) > now - _DAY]
        if len(newest) >= self._draws:
            what = "groups are drawn too often: every run draws once"
            raise _refused("policy.draws_per_day", what, f"<= {self._draws} a day", str(len(newest) + 1))
        with path.open("a") as log:
            log.write(f"{now:.0f} {digest(run.encode())}\n")
            log.flush()
            os.fsync(log.fileno())

    def reveal(self, run: str, size: int, shown: Any) -> draw.Reveal:
        """The nonce, for the first list of commitments that has this site's own in it, and for one size of groups."""
        if type(size) is not int or not draw.LEAST_GROUP <= size <= draw.MOST_GROUP:
            raise _refused("secure.draw", "groups of an odd size", f"{draw.LEAST_GROUP} to {draw.MOST_GROUP}")
        kept, commitments = self._read(run), read_commitments(shown)
        own = draw.commit(run, bytes.fromhex(kept["nonce"]), self._units, self._signing) if kept else None
        if own is None or commitments.get(self._own) != own:
            raise _refused("secure.draw", "this site's commitment is not in the list")
        draw.check_commitments(run, commitments)
        name = draw.list_digest(run, size, commitments)
        if kept["list"] not in ("", name):
            raise _refused("secure.draw", "another list of commitments was revealed for in this run")
        self._enough(commitments, "committed")
        if not kept["list"]:
            self._write(run, kept | {"list": name})
        return draw.reveal(run, size, bytes.fromhex(kept["nonce"]), commitments, self._signing)

    def keys(self, run: str, number: int, attempt: int, shown: Any) -> PeerKeys:
        """Fresh keys for an attempt, in the group that the draw gives."""
        kept, transcript = self._read(run), Transcript.from_dict(shown)
        if (
            transcript.run != run
            or not kept
            or kept["list"] != draw.list_digest(run, transcript.size, transcript.commitments)
        ):
            raise _refused("secure.draw", "the groups are not drawn from the commitments that this site revealed for")
        group = transcript.group_of(self._own)
        if kept["transcript"] not in ("", transcript.digest):
            raise _refused("secure.draw", "this run has other groups")
        if [number, attempt] <= kept["last"]:
            last = f"round {kept['last'][0]}, attempt {kept['last'][1]}"
            raise _refused(
                "secure.stale", "this attempt is not newer than the last one", f"after {last}", f"{number}, {attempt}"
            )
        self._enough(group, "in the group")
        self._write(run, kept | {"transcript": transcript.digest, "last": [number, attempt]})
        now = self._now = _Attempt(run, number, attempt, transcript, group)
        now.keys[self._own] = PeerKeys.made(now.info, now.cipher, now.mask, self._signing)
        return now.keys[self._own]

    def shares(self, run: str, number: int, attempt: int, shown: Mapping[str, Any]) -> dict[str, Any]:
        """A sealed share of this attempt's secrets for each peer whose keys came, and digests of the seed and of each share."""
        now = self._at(run, number, attempt)
        if len(now.keys) != 1:
            raise _refused("secure.again", "shares of this attempt were made before")
        found = {name: PeerKeys.from_dict(value) for name, value in shown.items()}
        if found.get(self._own) != now.keys[self._own] or not set(found) <= set(now.members):
            raise _refused("secure.group", "the keys are not those of this site's group")
        for name, keys in found.items():
            signer = VerifyKey.from_hex(now.transcript.commitments[name].key, "secure sum")
            keys.checked(now.info, signer)
        self._among(now, found, "gave keys")
        holders, least = len(now.members), threshold_of(len(now.members))
        of_mask, of_seed = shamir.split(now.mask, holders, least), shamir.split(now.seed, holders, least)
        sealed, of_masks, of_seeds = dict[str, str](), dict[str, str](), dict[str, str]()
        for place, name in enumerate(now.members):
            if name not in found:
                continue
            of_seeds[name] = masks.share_digest(now.info, self._own, name, "seed", of_seed[place])
            if name == self._own:
                now.own_share = of_seed[place]
                continue
            of_masks[name] = masks.share_digest(now.info, self._own, name, "mask", of_mask[place])
            theirs, info = bytes.fromhex(found[name].cipher), _between(now, self._own, name)
            sealed[name] = masks.hide(now.cipher, theirs, info, of_mask[place] + of_seed[place]).hex()
        now.keys = found
        return {"shares": sealed, "of_masks": of_masks, "of_seeds": of_seeds, "seed": sha256(now.seed).hexdigest()}

    def expect(
        self, core: PlanCore, attempt: int, sharers: Mapping[str, str], shares: Mapping[str, tuple[str, str, str]]
    ) -> None:
        """Sees, before anything is trained or charged, that a plan's update may be masked in this attempt, and opens its shares.

        Raises:
            RefusedError: It may not.
        """
        if core.secure is None:
            return
        now = self._at(core.run, core.round, attempt)
        if core.secure.members != now.members:
            raise _refused("secure.group", "the plan names another group than was drawn")
        self._all_filled(now, core.secure, core.training.expected_batch)
        if sharers.get(self._own) != core.digest or not set(sharers) <= set(now.keys) or not now.own_share:
            raise _refused("secure.group", "the plan's sharers are not those whose keys came")
        # Two works of one member that differ in anything would bring one update of the others into two unlike sums.
        if odd := [name for name, work in sharers.items() if core.of_member(name).digest != work]:
            raise _refused("secure.group", "a member's work is not what follows from this site's", got=odd[0][:16])
        if now.sharers:
            raise _refused("secure.again", "this attempt's update was masked before")
        self._among(now, sharers, "share")
        held = {name: self._opened(now, name, *parts) for name, parts in shares.items()}
        worthless = sorted(name for name, share in held.items() if share is None)
        if worthless or set(held) != set(sharers) - {self._own}:
            raise _refused("secure.shares", "shares do not open", "one of each sharer", ", ".join(worthless) or "fewer")
        now.held = {name: share for name, share in held.items() if share is not None}

    @staticmethod
    def _all_filled(now: _Attempt, secure: SecureSum, batch: float) -> None:
        # All divide by one batch and add one noise; whose rate does not fill that batch would be noise alone, and the rest the sum.
        for name, rate in zip(secure.members, secure.rates, strict=True):
            share = rate * now.transcript.commitments[name].records / batch
            if not LEAST_SHARE * (1 - _ROUNDING) <= share <= MOST_SHARE * (1 + _ROUNDING):
                limits = f"{LEAST_SHARE:g} to {MOST_SHARE:.3g} of the batch that all divide by"
                raise _refused("secure.batch", f"member {name[:16]} would bring another batch", limits, f"{share:.3g}")

    def _opened(self, now: _Attempt, giver: str, sealed: str, of_mask: str, of_seed: str) -> tuple[bytes, bytes] | None:
        """The two shares that one gave, or None where they are worthless."""
        try:
            theirs, data = bytes.fromhex(now.keys[giver].cipher), bytes.fromhex(sealed)
            both = masks.reveal(now.cipher, theirs, _between(now, giver, self._own), data, f"share of {giver[:16]}")
        except (VerificationError, ValueError, KeyError):
            return None
        mask, seed = both[: shamir.SHARE_BYTES], both[shamir.SHARE_BYTES :]
        good = (
            len(seed) == shamir.SHARE_BYTES
            and masks.share_digest(now.info, giver, self._own, "mask", mask) == of_mask
            and masks.share_digest(now.info, giver, self._own, "seed", seed) == of_seed
        )
        return (mask, seed) if good else None

    def mask(self, core: PlanCore, attempt: int, sharers: Mapping[str, str], vector: F32, schema: Schema) -> U32:
        """The update under masks, ``(d,) uint32``; once an attempt, after ``expect``.

        Raises:
            RefusedError: It was masked before, or something else was expected.
        """
        now = self._at(core.run, core.round, attempt)
        if core.secure is None:
            raise VerificationError("a plan without a secure sum has nothing to mask", where="secure sum")
        if now.sharers or set(now.held) != set(sharers) - {self._own} or sharers.get(self._own) != core.digest:
            raise _refused("secure.again", "this attempt's update was masked before, or never expected")
        whole = core.secure.fixed(schema).encode(vector)
        now.sharers, now.work, now.common = dict(sharers), core.digest, core.common
        whole += masks.self_mask(now.seed, now.info, len(whole))
        others = {name: bytes.fromhex(now.keys[name].mask) for name in sharers if name != self._own}
        whole += masks.pair_masks(now.mask, self._own, others, now.info + work_name(core.common, sharers), len(whole))
        return whole

    def agree(
        self, run: str, number: int, attempt: int, alive: tuple[str, ...], dead: tuple[str, ...]
    ) -> dict[str, Any]:
        """A signature on who lives and who died, once an attempt; for a work the living are the same for good."""
        now = self._at(run, number, attempt)
        if not now.work:
            raise _refused("secure.again", "nothing of this site is in that sum")
        if set(alive) & set(dead) or len(set(alive)) + len(set(dead)) != len(alive) + len(dead):
            raise _refused("secure.overlap", "a site is listed as alive and dead")
        if {*alive, *dead} != set(now.sharers) or self._own not in alive:
            raise _refused("secure.overlap", "the living and the dead are not those who shared")
        self._among(now, alive, "alive")
        if now.agreed not in (None, (alive, dead)):
            raise _refused("secure.second_opening", "this attempt's living and dead were agreed on already")
        self._same_as_before(now, alive)
        now.agreed = (alive, dead)
        return {"signature": self._signing.sign(masks.AGREED, now.statement(alive, dead)).hex()}

    def open(self, run: str, number: int, attempt: int, agreed: Mapping[str, str]) -> dict[str, Any]:
        """Shares for taking the masks off a sum: of the living's seeds, of the dead's mask keys; the attempt ends with it.

        Args:
            run: The run.
            number: The round.
            attempt: The attempt.
            agreed: Signatures of the living on what this site signed, hex, by id.
        """
        now = self._at(run, number, attempt)
        if now.agreed is None:
            raise _refused("secure.agreed", "this site did not agree on who lives and who died")
        alive, dead = now.agreed
        statement, least, good = now.statement(alive, dead), threshold_of(len(now.members)), 0
        for name in alive:
            if name in agreed:
                signer = VerifyKey.from_hex(now.transcript.commitments[name].key, "secure sum")
                signer.verify(masks.AGREED, statement, bytes.fromhex(agreed[name]), f"agreement of {name[:16]}")
                good += 1
        if good < least:
            raise _refused("secure.agreed", "too few members agreed", f">= {least} of {len(now.members)}", str(good))
        out: dict[str, dict[str, str]] = {"alive": {self._own: now.own_share.hex()}, "dead": {}}
        for name in sorted({*alive, *dead} - {self._own}):
            mask, seed = now.held[name]
            if name in alive:
                out["alive"][name] = seed.hex()
            else:
                out["dead"][name] = mask.hex()
        self._now = None
        return out

    def _same_as_before(self, now: _Attempt, alive: Collection[str]) -> None:
        """One set of the living for a work, for good: the difference of two sums would be one client's update."""
        path = self._folder / f"{now.work}.opened"
        wanted = canonical({"alive": {name: now.sharers[name] for name in alive}})
        if path.is_file() and path.read_bytes() != wanted:
            raise _refused(
                "secure.second_opening", "this round's sum was agreed on before, of other sites or other work"
            )
        write_durably(path, wanted)

    def _at(self, run: str, number: int, attempt: int) -> _Attempt:
        now = self._now
        if now is None or (now.run, now.number, now.attempt) != (run, number, attempt):
            raise _refused(
                "secure.stale", "this site has no part in that attempt", "its keys first", f"{number}, {attempt}"
            )
        return now

    def _among(self, now: _Attempt, sites: Collection[str], what: str) -> None:
        least = threshold_of(len(now.members))
        if len(sites) < least:
            raise _refused(
                "secure.threshold", f"too few sites {what}", f">= {least} of {len(now.members)}", str(len(sites))
            )
        self._enough(sites, what)

    def _enough(self, sites: Collection[str], what: str) -> None:
        count = len((set(sites) & self._peers) - {self._own})
        if count < self._least:
            raise _refused(
                "policy.peers",
                f"too few sites that the policy names are {what}",
                f">= {self._least} beside this one",
                str(count),
            )

    def _read(self, run: str) -> dict[str, Any]:
        path = self._path(run)
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def _write(self, run: str, kept: dict[str, Any]) -> None:
        write_durably(self._path(run), canonical(kept))

    def _path(self, run: str) -> Path:
        # The run's id comes from a peer: a digest of it names the file.
        return self._folder / f"{digest(run.encode())}.draw"


def _between(now: _Attempt, giver: str, holder: str) -> bytes:
    return now.info + f"\0{giver}\0{holder}".encode()


def _refused(rule: str, what: str, expected: str = "", got: str = "") -> RefusedError:
    return RefusedError(rule, what, where="secure sum", expected=expected, got=got)
