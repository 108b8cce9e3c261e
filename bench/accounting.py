"""The accountants' speed: a plan for 50 sites over 100 rounds, one site's forecast, and mixed histories beside Opacus' PRV."""

from __future__ import annotations

import random
import statistics
import time
import warnings
from typing import Any

import numpy as np
from cloister_shared import accountants, privacy
from cloister_shared.privacy import DpSgd, calibrate, coarse_rate, epsilon

DELTA = 1e-5


def _forget() -> None:
    for cached in (privacy._prv, privacy._charge, accountants._spectrum, accountants._pld_of, accountants._rdp_of):
        cached.cache_clear()


def plan(sites: int = 50, rounds: int = 100, steps: int = 10) -> dict[str, float]:
    """Seconds of calibrating and charging a run for sites of 500 to 20,000 records, batch 256, target epsilon 8, nothing cached."""
    rng = random.Random(1)
    rates = [coarse_rate(min(1.0, 256 / rng.randint(500, 20_000))) for _ in range(sites)]
    _forget()
    started = time.perf_counter()
    for rate in rates:
        sigma = _sigma(rate, steps * rounds)
        epsilon([DpSgd(sigma, rate, steps * rounds)], DELTA)
    return {"seconds": time.perf_counter() - started, "rates": float(len(set(rates)))}


def _sigma(rate: float, steps: int) -> float:
    return calibrate(rate, steps, 8.0, DELTA)


def mixed(kinds: int) -> dict[str, float]:
    """Seconds for a history of so many distinct kinds: ours charged (PRV and PLD), ours with one round more, and Opacus' PRV alone."""
    from opacus.accountants import PRVAccountant

    history = [DpSgd(round(0.8 + 0.02 * i, 2), coarse_rate(0.02 + 0.001 * i), 20) for i in range(kinds)]
    _forget()
    started = time.perf_counter()
    ours = epsilon(history, DELTA)
    first = time.perf_counter() - started
    again = []
    for more in range(1, 4):
        started = time.perf_counter()
        epsilon([*history, DpSgd(0.8, coarse_rate(0.02), 20 * more)], DELTA)
        again.append(time.perf_counter() - started)
    theirs = PRVAccountant()
    theirs.history = [(e.noise_multiplier, e.sample_rate, e.steps) for e in history]
    started = time.perf_counter()
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = float(theirs.get_epsilon(DELTA))
    return {
        "kinds": float(kinds),
        "ours": first,
        "one_round_more": statistics.median(again),
        "opacus_prv": time.perf_counter() - started,
        "epsilon": ours,
        "opacus_epsilon": other,
    }


def measure() -> dict[str, Any]:
    """All figures."""
    calibrate(0.3, 10, 8.0, DELTA)  # imports
    return {"plan": plan(), "mixed": [mixed(kinds) for kinds in (5, 20)]}


def figures(costs: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value and target of each figure."""
    out = [
        (
            f"privacy plan, 50 sites ({costs['plan']['rates']:.0f} rates), 100 rounds",
            f"{costs['plan']['seconds']:.2f} s",
            "< 2 s",
        )
    ]
    for one in costs["mixed"]:
        out.append((f"history of {one['kinds']:.0f} kinds: charged (PRV and PLD)", f"{one['ours']:.2f} s", ""))
        out.append(("  Opacus' PRV alone / ours", f"{one['opacus_prv'] / one['ours']:.2f}", ""))
        out.append(("  one round more", f"{one['one_round_more']:.2f} s", ""))
    return out
