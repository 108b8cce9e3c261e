"""What two registered rounds differ in: configuration, participants, weights, scores, epsilon, and the adapters, module by module.

For each module that carries LoRA: the Frobenius norm of its product ``B A`` in both rounds, of what lies between them, and their cosine;
for the head the same of its tensors. Products are compared through small Gram matrices and never made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from cloister_shared.vectors import F32, Schema


@dataclass(frozen=True)
class Moved:
    """One module in two rounds.

    Attributes:
        module: Its name.
        before: Norm in the first.
        after: Norm in the second.
        between: Norm of the difference.
        cosine: Of the two; NaN where one is zero.
    """

    module: str
    before: float
    after: float
    between: float
    cosine: float


def _inner(a: tuple[F32, F32], b: tuple[F32, F32]) -> float:
    """Inner product of two products B A: ``trace((Ba' Bb)(Ab Aa'))``."""
    (a1, b1), (a2, b2) = ((x.astype(np.float64), y.astype(np.float64)) for x, y in (a, b))
    return float(np.sum((b1.T @ b2) * (a1 @ a2.T)))


def _moved(module: str, first: float, second: float, both: float) -> Moved:
    between = max(0.0, first + second - 2 * both) ** 0.5
    scale = (first * second) ** 0.5
    return Moved(module, first**0.5, second**0.5, between, both / scale if scale else float("nan"))


def modules(first: F32, second: F32, schema: Schema) -> Iterator[Moved]:
    """Every module of two adapters ``(d,) float32``.

    Raises:
        VerificationError: A vector has another length than the schema.
    """
    one, two = schema.split(first), schema.split(second)
    for name in one:
        if ".lora_A." in name and name.replace(".lora_A.", ".lora_B.") in one:
            other = name.replace(".lora_A.", ".lora_B.")
            a, b = (one[name], one[other]), (two[name], two[other])
            yield _moved(name.replace(".lora_A.weight", " B A"), _inner(a, a), _inner(b, b), _inner(a, b))
        elif ".lora_B." not in name or name.replace(".lora_B.", ".lora_A.") not in one:
            x, y = (v[name].astype(np.float64).reshape(-1) for v in (one, two))
            yield _moved(name, float(x @ x), float(y @ y), float(x @ y))


def fields(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What two flat records say differently: name, first, second."""
    return [
        (name, first.get(name), second.get(name))
        for name in sorted(first | second)
        if first.get(name) != second.get(name)
    ]
