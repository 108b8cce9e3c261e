"""``cloister attack``: its attacks are what their papers say, malformed frames are refused, and the defence does what it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from cloister import malformed
from cloister.arena import GROUPED, Arena, Setting
from cloister.attacks import ATTACKS, Seen
from cloister.malformed import MALFORMED, Forge
from cloister.synthetic import make_silo
from cloister_model.text import Record
from hypothesis import given
from hypothesis import strategies as st

from support.server_calm import calm


def seen(m: int, f: int, d: int, seed: int) -> Seen:
    """Random updates around a common direction."""
    rng = np.random.default_rng(seed)
    way = rng.standard_normal(d)
    honest = (way + rng.standard_normal((m, d))).astype(np.float32)
    return Seen(honest, (way + rng.standard_normal((f, d))).astype(np.float32), np.random.default_rng(seed))


@given(st.sampled_from(sorted(ATTACKS)), st.integers(3, 12), st.integers(1, 4), st.integers(1, 40), st.integers(0, 999))
@calm(200)
def test_every_attack_gives_finite_rows(name: str, m: int, f: int, d: int, seed: int) -> None:
    given_ = seen(m, f, d, seed)
    rows = ATTACKS[name].make(given_)
    assert rows.shape == (f, d)
    assert rows.dtype == np.dtype("float32")
    assert np.isfinite(rows).all()


def test_attacks_are_what_their_papers_say() -> None:
    crowd = seen(16, 4, 200, 1)
    mean, std = crowd.honest.mean(0, dtype=np.float64), crowd.honest.astype(np.float64).std(0)
    # Baruch et al. 2019, algorithm 3: n = 20, m = 4: s = 7 supporters of 16, so Phi(z) = 9 / 16.
    assert np.allclose(ATTACKS["ALIE"].make(crowd)[0], mean - 0.1573 * std, atol=1e-4)
    # Xie et al. 2020: the mean of all points against the honest one.
    for name in ("IPM", "scaling"):
        every = np.concatenate([crowd.honest, ATTACKS[name].make(crowd)]).mean(0)
        assert float(every @ mean) < 0
    # Shejwalkar and Houmansadr 2021, equation 8: as far as it goes, and no farther.
    apart = max(float(np.linalg.norm(a - b)) for a in crowd.honest for b in crowd.honest)
    far = max(float(np.linalg.norm(ATTACKS["min-max"].make(crowd)[0] - b)) for b in crowd.honest)
    assert far == pytest.approx(apart, rel=1e-4)
    for name in ("noise-padded IPM", "free rider", "label flip", "backdoor", "Sybil copies"):
        norms = np.linalg.norm(ATTACKS[name].make(crowd), axis=1)
        assert np.allclose(norms, crowd.usual, rtol=1e-4), name
    assert len({row.tobytes() for row in ATTACKS["Sybil copies"].make(crowd)}) == 1
    assert len({row.tobytes() for row in ATTACKS["noise-padded IPM"].make(crowd)}) == 4


@pytest.fixture(scope="module")
def forge() -> Forge:
    """One hostile client."""
    return Forge.make()


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_frame_is_refused_and_takes_no_memory(forge: Forge, name: str) -> None:
    frame = MALFORMED[name](forge)
    tracemalloc.start()
    try:
        reply = malformed.read(forge, frame)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reply.verdict in ("unreadable", "not-finite", "out-of-bounds")
    assert reply.reason
    assert peak < 12 * 4 * forge.schema.size
    assert "CLOISTER_OWNED" not in os.environ


def test_the_honest_frame_is_accepted(forge: Forge) -> None:
    reply = malformed.read(forge, forge.honest())
    assert (reply.verdict, reply.reason) == ("accepted", "")
    assert reply.update is not None
    assert np.array_equal(reply.update, forge.vector())


def test_the_pipeline_keeps_what_a_mean_loses() -> None:
    """A small world of the command's own: scaled updates ruin a mean, and do not enter the pipeline."""
    rows = [Record(r["text"], r["label"]) for silo in range(8) for r in make_silo(silo, 90, 7)]
    arena = Arena(rows, Setting(8, 2, 0.8, None, 1, 2, 24, 7))
    clean = arena.run("none", "mean")
    ruined, kept = arena.run("scaling", "mean"), arena.run("scaling", "pipeline")
    assert ruined.accuracy < clean.accuracy - 0.2
    assert kept.accuracy > ruined.accuracy + 0.2
    assert ruined.weight == pytest.approx(0.25)
    assert kept.weight == 0.0
    grouped = arena.run("none", GROUPED)
    assert grouped.accuracy > ruined.accuracy + 0.2
    assert grouped.weight is None


def test_the_command_says_what_it_did() -> None:
    given_ = ["--json", "attack", "--sites", "5", "--attackers", "1", "--alpha", "5", "--rounds", "1", "--steps", "1"]
    given_ += ["--only", "sign flip", "--rules", "median", "--batch", "8"]
    done = subprocess.run([sys.executable, "-m", "cloister.cli", *given_], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["malformed"] for line in lines if "malformed" in line} == {"honest", *MALFORMED}
    assert [line for line in lines if "malformed_accepted" in line] == [{"malformed_accepted": []}]
    (cell,) = [line for line in lines if "rule" in line]
    assert (cell["attack"], cell["rule"], cell["sites"]) == ("sign flip", "median", 5)
    wrong = subprocess.run(
        [sys.executable, "-m", "cloister.cli", "attack", "--rules", "mode"], capture_output=True, text=True, timeout=300
    )
    assert (wrong.returncode, "no such name" in wrong.stderr) == (2, True)
