"""What a sum that nobody can open costs: a client's own CPU in one group of twenty at a million numbers, and the coordinator's."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from cloister_client.sums import Sums
from cloister_server.unmask import Given, unmasked
from cloister_shared.draw import Commitment, Reveal, Transcript
from cloister_shared.masks import PeerKeys, attempt_name, work_name
from cloister_shared.plan import PlanCore
from cloister_shared.signing import SigningKey
from cloister_shared.specs import SecureSum, TaskSpec, TrainingSpec
from cloister_shared.vectors import Schema

CLIENTS, DEAD, NUMBERS = 20, 2, 1_000_000
SCHEMA = Schema((("x.lora_A.weight", (8, NUMBERS // 16)), ("x.lora_B.weight", (NUMBERS // 16, 8))))
TASK = TaskSpec("causal-lm", (), 64, ("x",), (0,), 8, 16.0)
TRAINING = TrainingSpec(2, 0.1, 10.0, 1.0, 1.0, 1e-3, 0.1, 1e-5)


class _Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.process_time() - self._started


def measure() -> dict[str, float]:
    """CPU seconds: ``client`` the median of all stages of one round, ``coordinator`` of taking the masks off with two dead."""
    run, rng = os.urandom(16).hex(), np.random.default_rng(0)
    signing = [SigningKey.generate() for _ in range(CLIENTS)]
    peers = [key.verify_key.raw.hex() for key in signing]
    clocks = [_Clock() for _ in range(CLIENTS)]
    with tempfile.TemporaryDirectory() as folder:
        sites = {
            key.verify_key.id.hex(): Sums(Path(folder) / str(i), key, peers, 2, 1, 100) for i, key in enumerate(signing)
        }
        clock = dict(zip(sites, clocks, strict=True))
        commitments: dict[str, Commitment] = {i: site.commit(run) for i, site in sites.items()}
        shown = {i: asdict(c) for i, c in commitments.items()}
        reveals: dict[str, Reveal] = {i: site.reveal(run, CLIENTS, shown) for i, site in sites.items()}
        drawn = Transcript(run, CLIENTS, commitments, reveals)
        transcript, groups = drawn.as_dict(), drawn.digest
        keys, shares, masked = dict[str, PeerKeys](), {}, {}
        for i, site in sites.items():
            with clock[i]:
                keys[i] = site.keys(run, 1, 1, transcript)
        told = {i: asdict(k) for i, k in keys.items()}
        for i, site in sites.items():
            with clock[i]:
                shares[i] = site.shares(run, 1, 1, told)
        members = tuple(sorted(sites))
        vector, seconds = rng.normal(0, 1e-4, NUMBERS).astype(np.float32), _Clock()
        alive, dead = members[DEAD:], members[:DEAD]
        cores = {}
        for i in members:
            cores[i] = PlanCore(
                "bench", run, 1, 1, i, members, 1.0, "average", "ab" * 32, SCHEMA.digest, "cd" * 32, TASK, TRAINING,
                secure=SecureSum(members, 0.01, 1.0, (0.1,) * CLIENTS, (("record", 1),) * CLIENTS),
            )  # fmt: skip
        works = {i: core.digest for i, core in cores.items()}
        for i in alive:
            told_it = {j: (s["shares"][i], s["of_masks"][i], s["of_seeds"][i]) for j, s in shares.items() if j != i}
            with clock[i]:
                sites[i].expect(cores[i], 1, works, told_it)
                masked[i] = sites[i].mask(cores[i], 1, works, vector, SCHEMA), 0
        given, agreed = {}, {}
        for i in alive:
            with clock[i]:
                agreed[i] = sites[i].agree(run, 1, 1, alive, dead)["signature"]
        for i in alive:
            with clock[i]:
                given[i] = sites[i].open(run, 1, 1, agreed)
        before = {i: Given(s["seed"], s["of_masks"], s["of_seeds"]) for i, s in shares.items()}
        with seconds:
            name, work = attempt_name(run, groups, 1, 1), work_name(cores[members[0]].common, works)
            total, _ = unmasked(name, work, members, alive, dead, keys, before, masked, given)
        mean = (
            SecureSum(members, 0.01, 1.0, (0.1,) * CLIENTS, (("record", 1),) * CLIENTS)
            .fixed(SCHEMA)
            .mean(total, len(alive))
        )
    if float(np.abs(mean - vector).max()) > 1e-8:
        raise SystemExit("the sum is not the sum")
    of_living = [clock[i].seconds for i in alive]
    return {"client": statistics.median(of_living), "coordinator": seconds.seconds}


def figures(found: dict[str, float]) -> list[tuple[str, str, str]]:
    """Lines for the table."""
    return [
        (
            f"secure sum, one client's CPU, {CLIENTS} clients in a group, 1M numbers",
            f"{found['client']:.3f} s",
            "< 1 s",
        ),
        (f"  the coordinator's, {DEAD} clients dead", f"{found['coordinator']:.3f} s", ""),
    ]


if __name__ == "__main__":
    for name, value, target in figures(measure()):
        print(f"{name:75} {value:>10}   {target}")
