"""Faults of the mechanism that the attack claims to find, each in an optimiser of its own; the product has no switch for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cloister_client.clipping import SecureDPOptimizer


@contextmanager
def _scaled(optimiser: Any, setting: str, factor: float) -> Iterator[None]:
    kept = getattr(optimiser, setting)
    setattr(optimiser, setting, factor * kept)
    yield
    setattr(optimiser, setting, kept)


class NoNoise(SecureDPOptimizer):
    """Adds no noise."""

    def add_noise(self) -> None:
        with _scaled(self, "noise_multiplier", 0.0):
            super().add_noise()


class EighthOfNoise(SecureDPOptimizer):
    """Adds an eighth of the noise."""

    def add_noise(self) -> None:
        with _scaled(self, "noise_multiplier", 1 / 8):
            super().add_noise()


class LooseClip(SecureDPOptimizer):
    """Clips to three times the norm that the noise is made for."""

    def clip_and_accumulate(self) -> None:
        with _scaled(self, "max_grad_norm", 3.0):
            super().clip_and_accumulate()


FAULTS = (NoNoise, EighthOfNoise, LooseClip)
