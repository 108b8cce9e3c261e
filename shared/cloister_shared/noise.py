"""Randomness that protects somebody: Gaussian noise and Poisson samples from the operating system's generator.

Noise is Box-Muller in float64 on 53-bit uniforms from ``os.urandom``; four draws are summed and halved, the defence of
Holohan and Braghin 2021 (arXiv 2107.10138, section 5.1, n = 2) against attacks on the floating-point lattice
(Mironov 2012). No seed exists: nobody, a test included, can make two rounds share noise or samples.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

GENERATOR = "os.urandom, Box-Muller float64, sum of 4 draws / 2"
F64 = npt.NDArray[np.float64]


def uniforms(count: int) -> F64:
    """``(count,) float64`` uniform in (0, 1], 53 bits each."""
    words = np.frombuffer(os.urandom(8 * count), dtype="<u8")
    return ((words >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53


def _normals(count: int) -> F64:
    half = (count + 1) // 2
    radius = np.sqrt(-2.0 * np.log(uniforms(half)))
    angle = 2.0 * np.pi * uniforms(half)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def gaussian(count: int, std: float) -> F64:
    """``(count,) float64`` of N(0, std^2); every element is the half sum of four independent draws, each of another pair."""
    most = max(count, 2)
    drawn = _normals(4 * most).reshape(4, most)
    # The last two are the sines of the first two's pairs: moved on by one, so that no element has both of a pair.
    total = drawn[:2].sum(0) + np.roll(drawn[2:], 1, axis=1).sum(0)
    return np.asarray(total[:count] * (std / 2.0), dtype=np.float64)


def poisson_sample(units: int, sample_rate: float) -> npt.NDArray[np.int64]:
    """Indices of the units that are in a batch, each independently with probability ``sample_rate``."""
    return np.flatnonzero(uniforms(units) <= sample_rate).astype(np.int64)
