"""Shamir, masks, fixed point and the draw, each against something independent of them."""

from __future__ import annotations

import itertools
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
from cloister_shared import draw, masks, shamir
from cloister_shared.draw import Transcript, threshold_of
from cloister_shared.errors import VerificationError
from cloister_shared.masks import Fixed, PeerKeys, attempt_name
from cloister_shared.signing import SigningKey
from cloister_shared.vectors import Schema
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

SCHEMA = Schema((("x.lora_A.weight", (4, 5)), ("head.weight", (3, 7))))
RUN = "ab" * 16


def is_prime(number: int) -> bool:
    """Miller and Rabin, forty bases."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        x = pow(base, odd, number)
        if x in (1, number - 1):
            continue
        if all((x := x * x % number) != number - 1 for _ in range(twos - 1)):
            return False
    return True


def test_the_field_is_the_least_prime_above_2_to_the_256() -> None:
    assert is_prime(shamir.PRIME)
    assert not any(is_prime(number) for number in range(2**256, shamir.PRIME))


@given(st.binary(min_size=32, max_size=32), st.integers(1, 12), st.data())
def test_any_threshold_of_shares_gives_the_secret_back(secret: bytes, holders: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, holders))
    shares = dict(enumerate(shamir.split(secret, holders, threshold), 1))
    chosen = data.draw(st.permutations(sorted(shares)))[:threshold]
    assert shamir.join({place: shares[place] for place in chosen}) == secret
    assert shamir.join(shares) == secret


def test_fewer_shares_fit_every_secret() -> None:
    """With one share less there is, for any secret, a polynomial through it and the others: they say nothing."""
    shares = dict(enumerate(shamir.split(bytes(32), 5, 3), 1))
    for wanted in (0, 1, 2**256 - 1):
        # A third point chosen so that the parabola through it and the two known ones is ``wanted`` at 0.
        known = {1: int.from_bytes(shares[1]), 2: int.from_bytes(shares[2])}
        y3 = wanted - 3 * known[1] + 3 * known[2]
        made = {**{p: shares[p] for p in (1, 2)}, 3: (y3 % shamir.PRIME).to_bytes(33)}
        assert shamir.join(made) == wanted.to_bytes(32)


def test_malformed_shares_are_refused() -> None:
    good = shamir.split(os.urandom(32), 3, 2)
    for bad in ({}, {0: good[0], 1: good[1]}, {1: good[0][1:], 2: good[1]}, {1: b"\xff" * 33, 2: good[1]}):
        with pytest.raises(VerificationError):
            shamir.join(bad)
    with pytest.raises(ValueError, match="holders"):
        shamir.split(bytes(31), 3, 2)
    with pytest.raises(ValueError, match="holders"):
        shamir.split(bytes(32), 3, 4)


@given(st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_a_sum_never_wraps_and_a_mean_is_off_by_half_a_step(members: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    fixed = Fixed(SCHEMA, members, 0.01, 30.0)
    assert members * fixed.levels <= 2**32 - 1
    rows = (rng.uniform(-1, 1, (members, SCHEMA.size)) * fixed.ranges()).astype(np.float32)
    rows[0] = fixed.ranges() * rng.choice([-1, 1], SCHEMA.size)
    coded = [fixed.encode(row) for row in rows]
    exact = np.sum([c.astype(object) for c in coded], axis=0)
    assert max(exact) <= 2**32 - 1
    assert (masks.added(coded).astype(object) == exact).all()
    step = 2 * fixed.ranges() / fixed.levels
    plain = rows.astype(np.float64).mean(0)
    # Half a step, and float32's own rounding of the result.
    assert (np.abs(fixed.mean(masks.added(coded), members) - plain) <= step / 2 + np.abs(plain) * 2**-23 + 1e-12).all()


def test_what_is_out_of_range_is_cut_and_what_is_no_number_refused() -> None:
    fixed = Fixed(SCHEMA, 4, 0.01, 30.0)
    big = np.full(SCHEMA.size, 1e9, dtype=np.float32)
    assert (fixed.encode(big) == fixed.levels).all()
    assert (fixed.encode(-big) == 0).all()
    assert np.allclose(fixed.mean(fixed.encode(big), 1), fixed.ranges())
    # A hostile number wraps a sum: what comes out is cut to what a plan allows.
    assert (
        np.abs(fixed.mean(np.full(SCHEMA.size, 2**32 - 1, dtype=np.uint32), 1)) <= fixed.ranges().astype(np.float32)
    ).all()
    with pytest.raises(VerificationError, match="not finite"):
        fixed.encode(np.full(SCHEMA.size, np.nan, dtype=np.float32))


def test_pair_masks_cancel_in_the_whole_groups_sum_alone() -> None:
    names = ["aa", "bb", "cc", "dd"]
    private = {name: os.urandom(32) for name in names}
    public = {name: masks.public_of(key) for name, key in private.items()}
    each = [masks.pair_masks(private[n], n, {m: public[m] for m in names if m != n}, b"round", 1000) for n in names]
    assert not masks.added(each).any()
    for some in itertools.combinations(each, 3):
        assert len(set(masks.added(list(some)).tolist())) > 990
    other = masks.pair_masks(private["aa"], "aa", {m: public[m] for m in names[1:]}, b"another round", 1000)
    assert (other != each[0]).mean() > 0.99


def test_a_mask_is_uniform_and_as_aes_says() -> None:
    made = masks.stream(bytes(range(32)), 1 << 16)
    assert abs(float(made.mean()) / 2**31 - 1) < 0.02
    # Another implementation of the same cipher: GCM's first blocks are CTR from 2 at nonce 0.
    sealed = AESGCM(bytes(range(32))).encrypt(bytes(12), bytes(64), None)[:64]
    assert masks.stream(bytes(range(32)), 24)[8:24].astype("<u4").tobytes() == sealed


def test_a_share_opens_for_its_peer_its_attempt_and_its_way_alone() -> None:
    a, b, c = (os.urandom(32) for _ in range(3))
    sealed = masks.hide(a, masks.public_of(b), b"a to b", b"secret")
    assert masks.reveal(b, masks.public_of(a), b"a to b", sealed, "test") == b"secret"
    for key, info, data in (
        (c, b"a to b", sealed),
        (b, b"b to a", sealed),
        (b, b"a to b", sealed[:-1]),
        (b, b"a to b", b""),
    ):
        with pytest.raises(VerificationError, match="does not open"):
            masks.reveal(key, masks.public_of(a), info, data, "test")
    with pytest.raises(VerificationError, match="cannot be used"):
        masks.agreed(a, bytes(32), b"", "a low-order key")


def test_keys_are_of_one_attempt_and_one_signer() -> None:
    site, other = SigningKey.generate(), SigningKey.generate()
    name = attempt_name(RUN, "aa" * 32, 3, 1)
    keys = PeerKeys.made(name, os.urandom(32), os.urandom(32), site)
    assert PeerKeys.from_dict(asdict(keys)).checked(name, site.verify_key) == keys
    others = ((RUN, "aa" * 32, 3, 2), (RUN, "aa" * 32, 4, 1), ("cd" * 16, "aa" * 32, 3, 1), (RUN, "bb" * 32, 3, 1))
    for another in others:
        with pytest.raises(VerificationError, match="signature"):
            keys.checked(attempt_name(*another), site.verify_key)
    with pytest.raises(VerificationError, match="signature"):
        keys.checked(name, other.verify_key)
    with pytest.raises(VerificationError):
        replace(keys, mask="00" * 32).checked(name, site.verify_key)
    good = asdict(keys)
    for bad in (
        None,
        {},
        good | {"more": "00"},
        *(good | {"mask": v} for v in ("zz", 5, good["mask"].upper(), " " + good["mask"])),
    ):
        with pytest.raises(VerificationError, match="malformed"):
            PeerKeys.from_dict(bad)


def drawn(count: int, size: int = 4) -> tuple[Transcript, list[SigningKey]]:
    """A whole draw."""
    sites = [SigningKey.generate() for _ in range(count)]
    nonces = {site.verify_key.id.hex(): os.urandom(32) for site in sites}
    commitments = {s.verify_key.id.hex(): draw.commit(RUN, nonces[s.verify_key.id.hex()], 100, s) for s in sites}
    reveals = {
        s.verify_key.id.hex(): draw.reveal(RUN, size, nonces[s.verify_key.id.hex()], commitments, s) for s in sites
    }
    return Transcript(RUN, size, commitments, reveals), sites


@pytest.mark.parametrize(("count", "sizes"), [(3, [3]), (4, [4]), (7, [7]), (8, [4, 4]), (11, [5, 6]), (20, [4] * 5)])
def test_groups_have_everybody_once(count: int, sizes: list[int]) -> None:
    transcript, sites = drawn(count, min(4, count))
    groups = transcript.groups()
    assert sorted(map(len, groups)) == sizes
    assert sorted(i for g in groups for i in g) == sorted(s.verify_key.id.hex() for s in sites)
    assert Transcript.from_dict(transcript.as_dict()) == transcript
    assert transcript.group_of(groups[0][0]) == groups[0]


def test_who_is_with_whom_is_even() -> None:
    """Every pair shares a group as often as chance says."""
    together = 0
    ids = tuple(f"{i:032x}" for i in range(8))
    for trial in range(2000):
        groups = draw.cut([f"{trial:064x}"], RUN, ids, 4)
        together += any({ids[0], ids[1]} <= set(g) for g in groups)
    assert abs(together / 2000 - 3 / 7) < 0.04


def test_a_draw_that_was_tampered_with_is_refused() -> None:
    transcript, _ = drawn(5)
    first, second = sorted(transcript.commitments)[:2]
    stranger, _ = drawn(5)
    other = dict(transcript.reveals)
    other[first], other[second] = other[second], other[first]
    less = {i: c for i, c in transcript.commitments.items() if i != first}
    tampered = {
        "nonces changed places": replace(transcript, reveals=other),
        "a site left out after it revealed": replace(
            transcript, commitments=less, reveals={i: transcript.reveals[i] for i in less}
        ),
        "a nonce is missing": replace(transcript, reveals={i: transcript.reveals[i] for i in less}),
        "another run": replace(transcript, run="cd" * 16),
        "a stranger's reveals": replace(transcript, reveals=stranger.reveals),
        "under another key": replace(
            transcript, commitments={**transcript.commitments, first: transcript.commitments[second]}
        ),
        "no hex": replace(
            transcript, reveals={**transcript.reveals, first: replace(transcript.reveals[first], nonce="zz")}
        ),
        "another size of a site": replace(
            transcript, commitments={**transcript.commitments, first: replace(transcript.commitments[first], records=5)}
        ),
        "groups of two": replace(transcript, size=2),
        "another size than was signed": replace(transcript, size=3),
    }
    for name, bad in tampered.items():
        with pytest.raises(VerificationError) as refused:
            bad.groups()
        assert refused.value.what, name
    with pytest.raises(VerificationError, match="not in the draw"):
        transcript.group_of("00" * 16)
    for value in (
        None,
        {},
        transcript.as_dict() | {"more": 1},
        transcript.as_dict() | {"reveals": {"a": {"nonce": 1}}},
        *(
            transcript.as_dict() | {"commitments": {first: asdict(transcript.commitments[first]) | {field: value}}}
            for field, value in (
                ("signature", transcript.commitments[first].signature + " "),
                ("key", transcript.commitments[first].key.upper()),
                ("commitment", ""),
                ("records", 0),
                ("records", True),
                ("records", 5.0),
            )
        ),
        transcript.as_dict() | {"reveals": {first: asdict(transcript.reveals[first]) | {"nonce": " " * 64}}},
    ):
        with pytest.raises(VerificationError):
            Transcript.from_dict(value)


@pytest.mark.parametrize("members", range(3, 101))
def test_no_two_honest_sets_of_answers_meet_the_threshold(members: int) -> None:
    """Each honest member answers once: for both secrets of a site more than a third must answer twice."""
    least = threshold_of(members)
    assert 3 * least > 2 * members
    assert least <= members
    twice = 2 * least - members
    assert 3 * twice > members
