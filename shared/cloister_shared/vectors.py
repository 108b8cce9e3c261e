"""An adapter as one flat vector, and as a safetensors file.

A ``Schema`` names the trained tensors in one fixed order; a vector is their concatenation, ``(d,) float32`` C-order.
Reading a file checks its size, its header and every name, dtype and shape against our own schema before any array is
made; a header cap of 1 MiB stands before parsing (300,000 empty tensors took 15.7 s in the library).
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cloister_shared.encoding import canonical, digest, no_duplicates
from cloister_shared.errors import VerificationError

F32 = npt.NDArray[np.float32]
MAX_TENSORS = 4096
MAX_HEADER_BYTES = 1 << 20
MAX_PARAMETERS = 1 << 30


# Largest absolute numbers of LoRA, of a head's weight and of its bias; see ``limits_of``.
ADAPTER_LIMIT, HEAD_LIMIT, BIAS_LIMIT = 0.25, 1.0, 10.0


@dataclass(frozen=True)
class Schema:
    """Names and shapes of the trained tensors, in vector order.

    Attributes:
        tensors: ``(name, shape)`` pairs; every tensor is float32.
    """

    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.tensors]
        if not names or len(set(names)) != len(names) or len(names) > MAX_TENSORS:
            raise VerificationError(
                "schema has no, repeated or too many tensors", expected=f"1 to {MAX_TENSORS} names", got=str(len(names))
            )
        if any(n <= 0 for _, shape in self.tensors for n in shape) or self.size > MAX_PARAMETERS:
            raise VerificationError(
                "schema has an empty or oversized tensor", expected=f"<= {MAX_PARAMETERS} parameters"
            )

    @property
    def size(self) -> int:
        """Length ``d`` of the vector."""
        return sum(math.prod(shape) for _, shape in self.tensors)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form, hex."""
        return digest(canonical(self.as_list()))

    def as_list(self) -> list[Any]:
        """JSON form."""
        return [[name, list(shape)] for name, shape in self.tensors]

    @classmethod
    def from_list(cls, value: Any, where: str) -> Schema:
        """Reads the JSON form.

        Raises:
            VerificationError: Not a schema.
        """
        try:
            pairs = tuple((name, tuple(shape)) for name, shape in value if isinstance(shape, list))
            if not isinstance(value, list) or len(pairs) != len(value):
                raise ValueError("not a list of names and shapes")
            if not all(isinstance(n, str) and all(type(i) is int for i in s) for n, s in pairs):
                raise ValueError("a name is not a text or a size is not an integer")
            return cls(pairs)
        except (TypeError, ValueError) as error:
            raise VerificationError("not a schema", where=where, got=str(error)) from error

    def split(self, vector: F32) -> dict[str, F32]:
        """Views of ``vector`` by name, shaped.

        Raises:
            VerificationError: Another dtype or length.
        """
        check_vector(vector, self, "vector")
        views, at = {}, 0
        for name, shape in self.tensors:
            count = math.prod(shape)
            views[name] = vector[at : at + count].reshape(shape)
            at += count
        return views

    def join(self, tensors: dict[str, F32]) -> F32:
        """Concatenates named tensors.

        Raises:
            VerificationError: Names, dtypes or shapes differ from the schema's.
        """
        if set(tensors) != {name for name, _ in self.tensors}:
            odd = sorted(set(tensors) ^ {name for name, _ in self.tensors})
            raise VerificationError("tensors have other names than the schema", got=", ".join(odd)[:200])
        for name, shape in self.tensors:
            if tensors[name].shape != shape or tensors[name].dtype != np.float32:
                raise VerificationError(
                    f"tensor {name} differs",
                    expected=f"float32 {shape}",
                    got=f"{tensors[name].dtype} {tensors[name].shape}",
                )
        return np.concatenate([np.ascontiguousarray(tensors[name]).reshape(-1) for name, _ in self.tensors])


def check_vector(vector: F32, schema: Schema, where: str) -> None:
    """Checks dtype and length.

    Raises:
        VerificationError: They differ from the schema's.
    """
    if vector.dtype != np.float32 or vector.shape != (schema.size,):
        raise VerificationError(
            "vector has another form",
            where=where,
            expected=f"float32 ({schema.size},)",
            got=f"{vector.dtype} {vector.shape}",
        )


def clipped(vector: npt.NDArray[Any], bound: float) -> npt.NDArray[Any]:
    """``vector`` scaled down to L2 norm ``bound`` where it is longer; norm and scaling in float64, the dtype stays.

    In float64 the result's norm is never above ``bound``; a float32 result is rounded, 1e-7 of it at most.
    """
    norm = float(np.sqrt(np.square(vector, dtype=np.float64).sum()))
    if norm <= bound:
        return vector
    # A hair less, so that rounding cannot leave it above.
    return np.asarray(vector.astype(np.float64) * (bound / norm * (1 - 1e-12)), dtype=vector.dtype)


def limit_of(name: str) -> float:
    """How large a number of the tensor ``name`` may be."""
    return {"head.weight": HEAD_LIMIT, "head.bias": BIAS_LIMIT}.get(name, ADAPTER_LIMIT)


def limits_of(schema: Schema) -> F32:
    """How large each number may be, ``(d,) float32``.

    Larger weights turn float32 rounding, which depends on the records that share a batch, into gradients: one record more would move
    the others' clipped gradients as well, and the sum by more than the clipping norm. Within these, ``plan.MAX_SCALE``, batches without
    a rest (``cloister_model.tokens``) and a loss without a jump (``build``) it moves nothing but itself on a CPU
    (tests/client/test_coupling.py).
    """
    each = [(limit_of(name), shape) for name, shape in schema.tensors]
    return np.concatenate([np.full(math.prod(shape), limit, dtype=np.float32) for limit, shape in each])


def bounded(vector: F32, schema: Schema) -> F32:
    """``(d,) float32`` with every number clamped to its limit; what is finite stays so."""
    limits = limits_of(schema)
    return np.asarray(np.clip(vector, -limits, limits), dtype=np.float32)


def check_bounded(vector: F32, schema: Schema, where: str) -> None:
    """Checks that every number is finite and within its limit.

    Raises:
        VerificationError: One is not.
    """
    over = ~(np.abs(vector) <= limits_of(schema))
    if over.any():
        raise VerificationError(
            "a parameter is larger than may be trained privately",
            where=where,
            expected=f"|LoRA| <= {ADAPTER_LIMIT:g}, |head.weight| <= {HEAD_LIMIT:g}, |head.bias| <= {BIAS_LIMIT:g}",
            got=f"{int(over.sum())} of {len(vector)} over",
        )


def vector_to_bytes(vector: F32) -> bytes:
    """Little-endian float32 bytes."""
    return vector.astype("<f4", copy=False).tobytes()


def vector_from_bytes(data: bytes, schema: Schema, where: str) -> F32:
    """Reads little-endian float32 bytes of exactly the schema's length; a copy that can be written.

    Raises:
        VerificationError: Another length.
    """
    if len(data) != 4 * schema.size:
        raise VerificationError(
            "vector has another length", where=where, expected=f"{4 * schema.size} bytes", got=f"{len(data)} bytes"
        )
    return np.frombuffer(data, dtype="<f4").astype(np.float32)


def to_safetensors(vector: F32, schema: Schema, metadata: dict[str, str]) -> bytes:
    """The vector as a safetensors file (deterministic: schema order, sorted metadata)."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name, shape in schema.tensors:
        size = 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + vector_to_bytes(vector)


def most_bytes(schema: Schema) -> int:
    """The most that a safetensors file of these tensors may have."""
    return 8 + MAX_HEADER_BYTES + 4 * schema.size


def from_safetensors(data: bytes, schema: Schema, where: str) -> F32:
    """Reads a safetensors file that must hold exactly the schema's tensors.

    Raises:
        VerificationError: Any difference, found before an array is made.
    """
    if len(data) < 8:
        raise VerificationError("not a safetensors file", where=where, got=f"{len(data)} bytes")
    (size,) = struct.unpack("<Q", data[:8])
    if size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise VerificationError(
            "safetensors header too large", where=where, expected=f"<= {MAX_HEADER_BYTES} bytes", got=str(size)
        )
    try:
        entries = json.loads(data[8 : 8 + size], object_pairs_hook=no_duplicates)
        entries.pop("__metadata__", None)
        found = {str(n): (str(e["dtype"]), tuple(e["shape"]), tuple(e["data_offsets"])) for n, e in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise VerificationError("safetensors header is malformed", where=where, got=str(error)[:120]) from error
    body, parts = memoryview(data)[8 + size :], {}
    if set(found) != {name for name, _ in schema.tensors} or len(body) != 4 * schema.size:
        raise VerificationError(
            "safetensors file holds other tensors",
            where=where,
            expected=f"{len(schema.tensors)} tensors, {4 * schema.size} bytes",
        )
    for name, shape in schema.tensors:
        dtype, got_shape, offsets = found[name]
        if not all(type(n) is int for n in (*got_shape, *offsets)):
            raise VerificationError(f"tensor {name} has a size that is not an integer", where=where)
        if dtype != "F32" or got_shape != shape or len(offsets) != 2 or offsets[1] - offsets[0] != 4 * math.prod(shape):
            raise VerificationError(
                f"tensor {name} differs", where=where, expected=f"F32 {shape}", got=f"{dtype} {got_shape}"
            )
        if not 0 <= offsets[0] <= offsets[1] <= len(body):
            raise VerificationError(f"tensor {name} lies outside the file", where=where, got=str(offsets))
        parts[name] = np.frombuffer(body[offsets[0] : offsets[1]], dtype="<f4").astype(np.float32).reshape(shape)
    spans = sorted(found[name][2] for name, _ in schema.tensors)
    if any(before[1] != after[0] for before, after in itertools.pairwise(spans)):
        raise VerificationError("tensors overlap or leave a gap", where=where, got=str(spans[:4]))
    return schema.join(parts)
