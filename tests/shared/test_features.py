"""What the head sees: hashed words against a count by hand, one length for all, no record touched by its company."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cloister_model.base import find_base
from cloister_model.build import build
from cloister_model.features import BLOCK_WEIGHTS, LENGTH, SHORTEST, hashed_words, mean, raw, scaled, weights
from cloister_model.scores import with_centre
from cloister_model.tokens import Encoded
from cloister_shared.errors import InputError
from cloister_shared.specs import TaskSpec, centre_and_spread
from hypothesis import given
from hypothesis import strategies as st

TASK = TaskSpec("text-classification", ("a", "b"), 32, ("query",), (), 2, 4.0, words=8)
IDS = st.lists(st.integers(0, 250_000), min_size=1, max_size=40)


def by_hand(ids: list[int], width: int) -> np.ndarray:
    """Counts, weights and hashes, written down again."""
    out = np.zeros(width)
    for piece, count in Counter(ids).items():
        code = (piece * 2654435761 + 97) % 4294967291
        sign = -1 if (code // 128) % 2 else 1
        out[code % width] += sign * (1 + math.log(count)) * math.log(max(piece - 990, 2))
    length = float(np.sqrt((out**2).sum()))
    return out / max(length, 1e-12)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask, _ = Encoded(tuple(map(tuple, rows)), (0,) * len(rows), 3).batch(range(len(rows)))
    return ids, mask


@given(st.lists(IDS, min_size=1, max_size=4), st.integers(1, 300))
def test_hashed_words_are_the_count_by_hand(rows: list[list[int]], width: int) -> None:
    got = hashed_words(*padded(rows), width).numpy()
    np.testing.assert_allclose(got, np.stack([by_hand(row, width) for row in rows]), atol=1e-9)


@given(IDS, IDS)
def test_no_record_is_touched_by_its_company(one: list[int], other: list[int]) -> None:
    alone, beside = hashed_words(*padded([one]), 64)[0], hashed_words(*padded([one, other]), 64)[0]
    assert torch.equal(alone, beside)


def test_every_record_has_one_length_and_one_at_the_centre_is_not_stretched() -> None:
    rng = torch.Generator().manual_seed(0)
    blocks = raw(*(torch.randn(5, n, generator=rng) * 10 for n in (16, 4, 4)))
    assert raw(None, blocks[:, 16:20], blocks[:, 20:]).shape == (5, 8)
    centre, spread = torch.arange(24.0), torch.tensor([2.0] * 16 + [3.0] * 4 + [5.0] * 4)
    blocks[3] = centre
    blocks[4] = centre
    blocks[4, 20] += 0.05 * SHORTEST * 5
    got = scaled(blocks, centre, spread)
    assert got.norm(dim=1)[:3].tolist() == pytest.approx([LENGTH] * 3)
    assert got.norm(dim=1)[3:].tolist() == pytest.approx([0, 0.05 * LENGTH], rel=1e-4)
    by_hand = (blocks[0] - centre) / spread
    assert torch.allclose(got[0], LENGTH * by_hand / by_hand.norm(), atol=1e-5)


def test_a_mean_counts_pieces_by_their_weight() -> None:
    ids, mask = padded([[101, 2000, 5000], [2000]])
    share = weights(ids, mask)
    assert share[0, :3].tolist() == pytest.approx([math.log(2), math.log(1010), math.log(4010)])
    assert not share[0, 3:].any()
    assert not share[1, 1:].any()
    states = torch.full((2, ids.shape[1], 1), 9.0, dtype=torch.float64)
    states[0, :3, 0] = torch.tensor([1.0, 2.0, 4.0])
    states[1, 0, 0] = 7.0
    expected = sum(w * v for w, v in zip(share[0, :3].tolist(), (1, 2, 4), strict=True)) / float(share[0].sum())
    assert mean(states, share).flatten().tolist() == pytest.approx([expected, 7.0])


def test_the_centre_is_the_mean_of_own_records_and_fits_its_base(tiny_bert: Path) -> None:
    base = find_base(str(tiny_bert), "test")
    model, data = build(base, TASK, "test"), Encoded(((2, 40, 50), (2, 60), (2, 70, 80, 90, 100)), (0, 0, 0), 0)
    with torch.no_grad():
        each = torch.stack([model.features(*data.batch([row])[:2])[0] for row in range(3)]).double()
    made = with_centre(model, TASK, data)
    centre, spread = centre_and_spread(made, 8 + 64, "test")
    np.testing.assert_allclose(centre, each.mean(0).numpy(), atol=1e-3)  # float16 in the plan
    off = each - torch.from_numpy(centre)
    for block, weight, size in zip(torch.split(off, [8, 32, 32], dim=1), BLOCK_WEIGHTS, (0, 8, 40), strict=True):
        assert spread[size] == pytest.approx(float((block**2).sum(1).mean().sqrt()) / weight, rel=1e-5)
    built = build(base, made, "test")
    assert np.array_equal(built.centre.numpy(), centre)
    assert np.array_equal(built.spread.numpy(), spread)
    with pytest.raises(InputError, match="another base"):
        build(base, replace(made, centre="0000" * 5), "test")
    with pytest.raises(InputError, match="another base"):
        build(base, replace(made, spread=(1.0,)), "test")
    assert [v.tolist() for v in centre_and_spread(TASK, 3, "test")] == [[0, 0, 0], [1, 1, 1]]
