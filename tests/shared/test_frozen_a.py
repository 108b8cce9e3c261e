"""The frozen A is public and the same everywhere: recomputed here without our code, uniform, apart by name, shape and base."""

from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import pytest
from cloister_shared.errors import VerificationError
from cloister_shared.frozen_a import frozen_a, frozen_digest, frozen_tensors
from cloister_shared.vectors import Schema

BASE = "ab" * 32
NAME = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"


def test_is_what_its_description_says() -> None:
    """By hand, in plain Python: what anybody can do who has the base's digest."""
    text = f'["cloister-frozen-a/1","{BASE}","{NAME}",[3,32]]'
    stream = hashlib.shake_256(text.encode()).digest(4 * 96)
    wanted = []
    for (word,) in struct.iter_unpack("<I", stream):
        value = ((2 * (word >> 8) + 1) / 2**24 - 1) / math.sqrt(32)
        wanted.append(struct.unpack("<f", struct.pack("<f", value))[0])
    got = frozen_a(BASE, NAME, (3, 32))
    assert got.dtype == np.float32
    assert got.shape == (3, 32)
    assert got.reshape(-1).tolist() == wanted


def test_stays_the_same_for_ever() -> None:
    """A changed derivation would make every registered freeze-a round another model."""
    schema = Schema(((NAME, (8, 384)),))
    assert frozen_digest(BASE, schema) == "91ddba01cec7a73c295f4db5f56927dc2ba8cf7c94d0d266e24a5919bdcab98f"
    assert frozen_tensors(BASE, schema)[NAME].tobytes() == frozen_a(BASE, NAME, (8, 384)).tobytes()


def test_is_uniform_within_kaimings_bounds() -> None:
    drawn = frozen_a(BASE, NAME, (256, 1024)).astype(np.float64) * 32.0
    assert np.abs(drawn).max() < 1
    count = drawn.size
    assert abs(drawn.mean()) < 5 / math.sqrt(3 * count)
    assert abs(drawn.var() - 1 / 3) < 5 * math.sqrt(4 / 45 / count)
    counts, _ = np.histogram(drawn, bins=64, range=(-1, 1))
    assert np.abs(counts - count / 64).max() < 5 * math.sqrt(count / 64)
    rows = drawn @ drawn.T / 1024
    assert np.abs(rows - np.diag(np.diag(rows))).max() < 6 / 3 / math.sqrt(1024)


def test_depends_on_base_name_and_shape() -> None:
    one = frozen_a(BASE, NAME, (2, 8))
    for other in (frozen_a("cd" * 32, NAME, (2, 8)), frozen_a(BASE, NAME + "x", (2, 8)), frozen_a(BASE, NAME, (8, 2))):
        assert not np.isin(other, one).any()
    longer = frozen_a(BASE, NAME, (3, 8))
    assert not np.isin(longer, one).any()


@pytest.mark.parametrize("shape", [(), (4,), (0, 4), (4, 0), (2, 2, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(VerificationError, match="shape"):
        frozen_a(BASE, NAME, shape)
