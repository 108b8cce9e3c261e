"""LoRA's A where it is not trained (FFA-LoRA, Sun et al., ICLR 2024): public numbers that anybody can recompute.

Such an A is neither sent nor stored with a round; sites, coordinator and export derive the same one from what a plan names:

    stream = SHAKE-256(canonical JSON of ["cloister-frozen-a/1", base digest, tensor name, [rank, inputs]])
    u      = little-endian uint32 of the stream, one an element, row by row
    A      = float32(((2 * (u >> 8) + 1) / 2**24 - 1) / sqrt(inputs))            computed in float64, rounded once

which is uniform in ``(-1/sqrt(inputs), 1/sqrt(inputs))``, as PEFT's own start of A (``kaiming_uniform_`` with ``a = sqrt(5)``).
Every step is exact or correctly rounded, so that it is the same bits on every machine. No secret and no seed goes in: A is data of
nobody, and two federations on one base share it.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import VerificationError
from cloister_shared.vectors import F32, Schema, vector_to_bytes

FORMAT = "cloister-frozen-a/1"


def frozen_a(base: str, name: str, shape: tuple[int, ...]) -> F32:
    """One frozen A.

    Args:
        base: Digest of the base model, hex.
        name: The tensor's name as PEFT writes it, ``….lora_A.weight``.
        shape: ``(rank, inputs)``.

    Returns:
        ``shape``, float32.

    Raises:
        VerificationError: The shape is not two positive numbers.
    """
    if len(shape) != 2 or min(shape) < 1:
        raise VerificationError("a frozen A has another shape", where=name, expected="(rank, inputs)", got=str(shape))
    count = math.prod(shape)
    stream = hashlib.shake_256(canonical([FORMAT, base, name, list(shape)])).digest(4 * count)
    words = np.frombuffer(stream, dtype="<u4") >> np.uint32(8)
    unit = (2.0 * words.astype(np.float64) + 1.0) * 2.0**-24 - 1.0
    return (unit / math.sqrt(shape[1])).astype(np.float32).reshape(shape)


def frozen_tensors(base: str, schema: Schema) -> dict[str, F32]:
    """All frozen A of a model, by name; ``schema`` names them and their shapes."""
    return {name: frozen_a(base, name, shape) for name, shape in schema.tensors}


def frozen_digest(base: str, schema: Schema) -> str:
    """SHA-256 of all of them as one vector, hex: what a run registers, so that a later export proves it has the same."""
    return digest(vector_to_bytes(schema.join(frozen_tensors(base, schema))))
