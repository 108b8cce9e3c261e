"""What the head sees: hashed words against a count by hand, one length for all, no record touched by its company."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from cloister_model.base import find_base
from cloister_model.build import build
from cloister_model.features import LENGTH, hashed_words, join, mean, weights
from cloister_model.scores import centre_of
from cloister_model.tokens import Encoded
from cloister_shared.errors import InputError
from cloister_shared.plan import TaskSpec
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
    return out


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


def test_every_block_has_one_length_and_small_ones_are_not_stretched() -> None:
    rng = torch.Generator().manual_seed(0)
    words, embedded, last = (torch.randn(5, n, generator=rng) * 10 for n in (16, 4, 4))
    words[3] = 0
    last[4] = torch.tensor([1.0, 2.0, 3.0, 4.0]) + 1e-3
    centre = torch.cat([torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, 4.0])])
    got = join(words, embedded, last, centre)
    assert got.shape == (5, 24)
    block = LENGTH / math.sqrt(3)
    lengths = torch.stack([part.norm(dim=1) for part in torch.split(got, [16, 4, 4], dim=1)])
    assert torch.allclose(lengths[:, :3], torch.full((3, 3), block))
    assert lengths[0, 3] == 0
    assert lengths[2, 4] == pytest.approx(block * 2e-3 / 0.1, rel=1e-3)
    assert join(None, embedded, last, centre).norm(dim=1)[0] == pytest.approx(LENGTH)


def test_a_mean_counts_pieces_by_their_weight() -> None:
    ids, mask = padded([[101, 2000, 5000], [2000]])
    share = weights(ids, mask)
    assert share[0].tolist() == pytest.approx([math.log(2), math.log(1010), math.log(4010)])
    assert share[1, 1:].tolist() == [0, 0]
    states = torch.tensor([[[1.0], [2.0], [4.0]], [[7.0], [9.0], [9.0]]], dtype=torch.float64)
    expected = sum(w * v for w, v in zip(share[0].tolist(), (1, 2, 4), strict=True)) / float(share[0].sum())
    assert mean(states, share).flatten().tolist() == pytest.approx([expected, 7.0])


def test_the_centre_is_the_mean_of_own_records_and_fits_its_base(tiny_bert: Path) -> None:
    base = find_base(str(tiny_bert), "test")
    model, data = build(base, TASK, "test"), Encoded(((2, 40, 50), (2, 60), (2, 70, 80, 90, 100)), (0, 0, 0), 0)
    with torch.no_grad():
        each = [torch.cat(model.means(*data.batch([row])[:2]), 1)[0] for row in range(3)]
    got = np.frombuffer(bytes.fromhex(centre_of(model, data)), dtype="<f4")
    np.testing.assert_allclose(got, torch.stack(each).mean(0).numpy(), atol=1e-6)
    centred = TaskSpec(**(vars(TASK) | {"centre": centre_of(model, data)}))
    assert np.array_equal(build(base, centred, "test").centre.numpy(), got)
    with pytest.raises(InputError, match="another base"):
        build(base, TaskSpec(**(vars(TASK) | {"centre": "00" * 8})), "test")
