"""Hypothesis' settings for a loaded machine: no deadline for an example, no complaint about slow generation."""

from __future__ import annotations

from hypothesis import HealthCheck, settings


def calm(examples: int = 100) -> settings:
    """Settings with this many examples."""
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
