"""What hostile clients send: updates made of what honest ones sent, as pure functions over ``(n, d)`` arrays.

The attackers here collude, see every honest update of the round before they answer, and answer as the field's papers say; that is more
than a client behind a seal can see. Those that need other text instead of other arithmetic (label flip, backdoor) are trained by
``arena``. Frames that are no update at all are ``malformed``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
from cloister_shared.vectors import F32

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """What colluding clients know.

    Attributes:
        honest: ``(m, d) float32``: the others' updates.
        own: ``(f, d) float32``: what the attackers' own training gave: honest, or on poisoned text where the attack asks for it.
        rng: Of the attack; seeded.
    """

    honest: F32
    own: F32
    rng: np.random.Generator

    @property
    def usual(self) -> float:
        """The honest updates' median norm."""
        return float(np.median([np.linalg.norm(row) for row in self.honest]))


def _all(row: F64, seen: Seen) -> F32:
    return np.repeat(row.astype(np.float32)[None], len(seen.own), axis=0)


def _as_usual(rows: F64, usual: float) -> F32:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows * (usual / np.maximum(norms, 1e-30)), dtype=np.float32)


def sign_flip(seen: Seen) -> F32:
    """Each attacker's own update, turned round."""
    return -seen.own


def scaling(seen: Seen) -> F32:
    """Turned round and made so long that a mean follows it (Bagdasaryan et al. 2020, section 3.2, n / f)."""
    count = len(seen.honest) + len(seen.own)
    return np.asarray(-seen.own * (2 * count / len(seen.own)), dtype=np.float32)


def gaussian(seen: Seen) -> F32:
    """Noise ten times as long as an honest update."""
    return _as_usual(seen.rng.standard_normal(seen.own.shape), 10 * seen.usual)


def alie(seen: Seen) -> F32:
    """A little is enough (Baruch et al. 2019, algorithm 3): as many deviations off the mean as the crowd hides."""
    m, f = len(seen.honest), len(seen.own)
    n = m + f
    quantile = (n - f - (n // 2 + 1 - f)) / (n - f)
    z = NormalDist().inv_cdf(min(max(quantile, 0.5), 0.999))
    wide = seen.honest.astype(np.float64)
    return _all(wide.mean(0) - z * wide.std(0), seen)


def ipm(seen: Seen) -> F32:
    """Inner-product manipulation (Xie et al. 2020, section 4): minus the mean, so long that the whole mean turns round."""
    share = 1.1 * len(seen.honest) / len(seen.own)
    return _all(-share * seen.honest.mean(0, dtype=np.float64), seen)


def noise_padded_ipm(seen: Seen) -> F32:
    """Inner-product manipulation under noise of each attacker's own, as long as an honest update: under DP nobody's norm tells."""
    mean = seen.honest.mean(0, dtype=np.float64)
    usual, size = seen.usual, float(np.linalg.norm(mean))
    noise = seen.rng.standard_normal(seen.own.shape)
    if mean.size > 1:  # across the mean, so that the lengths add up
        noise -= np.outer(noise @ mean / max(size**2, 1e-30), mean)
    noise *= np.sqrt(max(0.0, usual**2 - size**2)) / np.maximum(np.linalg.norm(noise, axis=1, keepdims=True), 1e-30)
    return np.asarray(noise - mean, dtype=np.float32)


def min_max(seen: Seen) -> F32:
    """As far against the spread as any two honest ones are apart (Shejwalkar and Houmansadr 2021, equation 8, inverse deviations)."""
    wide = seen.honest.astype(np.float64)
    mean, way = wide.mean(0), -wide.std(0)
    squares = (wide**2).sum(1)
    apart = squares[:, None] + squares[None] - 2 * wide @ wide.T
    most = float(apart.max())
    # |mean + g way - row|^2 for all rows is a quadratic in g: the largest g that keeps each below ``most``.
    off = mean - wide
    a, b, c = float(way @ way), off @ way, (off**2).sum(1) - most
    far = float(((-b + np.sqrt(np.maximum(b**2 - a * c, 0.0))) / max(a, 1e-30)).min())
    return _all(mean + max(far, 0.0) * way, seen)


def free_rider(seen: Seen) -> F32:
    """Noise as long as an update, for no work."""
    return _as_usual(seen.rng.standard_normal(seen.own.shape), seen.usual)


def poisoned(seen: Seen) -> F32:
    """Trained on other text, without noise, and as long as the honest ones are."""
    return _as_usual(seen.own.astype(np.float64), seen.usual)


def copies(seen: Seen) -> F32:
    """One poisoned update under as many keys as there are: copies lie close together, as a majority would."""
    return _as_usual(np.repeat(seen.own[:1].astype(np.float64), len(seen.own), axis=0), seen.usual)


@dataclass(frozen=True)
class Attack:
    """An attack.

    Attributes:
        make: Seen to ``(f, d) float32``.
        text: What the attackers train on: ``own``, ``flipped`` labels, or with a ``trigger``.
    """

    make: Callable[[Seen], F32]
    text: str = "own"


ATTACKS = {
    "none": Attack(lambda seen: seen.own),
    "sign flip": Attack(sign_flip),
    "scaling": Attack(scaling),
    "Gaussian": Attack(gaussian),
    "ALIE": Attack(alie),
    "IPM": Attack(ipm),
    "min-max": Attack(min_max),
    "noise-padded IPM": Attack(noise_padded_ipm),
    "label flip": Attack(poisoned, "flipped"),
    "backdoor": Attack(poisoned, "trigger"),
    "free rider": Attack(free_rider),
    "Sybil copies": Attack(copies, "flipped"),
}
