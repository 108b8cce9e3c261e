"""Adapters as vectors and as safetensors files, checked against the safetensors library."""

from __future__ import annotations

import json
import math
import pickle
import struct
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from cloister_shared.errors import VerificationError
from cloister_shared.vectors import (
    F32,
    MAX_HEADER_BYTES,
    MAX_PARAMETERS,
    MAX_TENSORS,
    Schema,
    from_safetensors,
    to_safetensors,
    vector_from_bytes,
    vector_to_bytes,
)
from hypothesis import given, settings
from hypothesis import strategies as st

_SHAPES = st.lists(st.integers(1, 4), max_size=3).map(tuple)
_NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda n: n != "__metadata__"
)
SCHEMAS = st.dictionaries(_NAMES, _SHAPES, min_size=1, max_size=5).map(lambda d: Schema(tuple(d.items())))
TWO = Schema((("a", (2,)), ("b", (1, 2))))
FOUR: F32 = np.arange(4, dtype=np.float32)


@st.composite
def _vectors(draw: st.DrawFn) -> tuple[Schema, F32]:
    schema = draw(SCHEMAS)
    data = draw(st.binary(min_size=4 * schema.size, max_size=4 * schema.size))
    return schema, np.frombuffer(data, dtype="<f4").astype(np.float32)


@settings(deadline=None, max_examples=50)
@given(_vectors())
def test_every_form_is_read_back_bit_for_bit(case: tuple[Schema, F32]) -> None:
    schema, vector = case
    parts = schema.split(vector)
    assert [(n, p.shape) for n, p in parts.items()] == list(schema.tensors)
    for back in (
        schema.join(parts),
        schema.join(dict(reversed(parts.items()))),
        vector_from_bytes(vector_to_bytes(vector), schema, "w"),
        from_safetensors(to_safetensors(vector, schema, {}), schema, "w"),
    ):
        assert back.dtype == np.float32
        assert back.tobytes() == vector.tobytes()
    again = Schema.from_list(json.loads(json.dumps(schema.as_list())), "w")
    assert again == schema
    assert again.digest == schema.digest


@settings(deadline=None, max_examples=50)
@given(_vectors(), st.dictionaries(_NAMES, _NAMES, max_size=3))
def test_library_reads_ours_and_we_read_the_library(case: tuple[Schema, F32], metadata: dict[str, str]) -> None:
    schema, vector = case
    ours = to_safetensors(vector, schema, metadata)
    assert ours == to_safetensors(vector.copy(), schema, dict(reversed(metadata.items())))
    loaded = safetensors.numpy.load(ours)
    assert {n: a.tobytes() for n, a in loaded.items()} == {n: a.tobytes() for n, a in schema.split(vector).items()}
    assert {n: a.shape for n, a in loaded.items()} == dict(schema.tensors)
    theirs = safetensors.numpy.save({n: a.copy() for n, a in schema.split(vector).items()}, metadata or None)
    assert from_safetensors(theirs, schema, "w").tobytes() == vector.tobytes()


def test_split_gives_views_and_read_gives_a_copy_that_can_be_written() -> None:
    vector = FOUR.copy()
    TWO.split(vector)["b"][0, 1] = 9
    assert vector[3] == 9
    read = vector_from_bytes(vector_to_bytes(vector), TWO, "w")
    read[0] = 5
    assert read[0] == 5


def test_digest_names_order_names_and_shapes() -> None:
    others = [
        (("b", (1, 2)), ("a", (2,))),
        (("a", (2,)), ("c", (1, 2))),
        (("a", (2,)), ("b", (2, 1))),
        (("a", (2,)), ("b", (2,))),
        (("a", (2,)),),
    ]
    assert len({Schema(t).digest for t in others} | {TWO.digest}) == 6


@pytest.mark.parametrize(
    "tensors",
    [
        (),
        (("a", (1,)), ("a", (2,))),
        (("a", (0,)),),
        (("a", (2, -1)),),
        (("a", (-1, -1)),),
        (("a", (MAX_PARAMETERS + 1,)),),
        (("a", (1 << 40, 1 << 40)),),
        tuple((str(i), (1,)) for i in range(MAX_TENSORS + 1)),
    ],
)
def test_schema_refuses(tensors: tuple[tuple[str, tuple[int, ...]], ...]) -> None:
    with pytest.raises(VerificationError):
        Schema(tensors)


@pytest.mark.parametrize(
    "value", [None, 5, "ab", [1], [["a"]], [["a", 3]], [["a", ["x"]]], [["a", [1], 2]], [["a", [math.nan]]]]
)
def test_schema_list_refuses(value: Any) -> None:
    with pytest.raises(VerificationError):
        Schema.from_list(value, "w")


@pytest.mark.parametrize("value", [[["a", [math.inf]]], [["a", [2.7]]], [["a", "23"]], [[3, [2]]], [["a", [True]]]])
def test_schema_list_refuses_other_types(value: Any) -> None:
    with pytest.raises(VerificationError):
        Schema.from_list(value, "w")


@pytest.mark.parametrize("vector", [FOUR[:3], FOUR.reshape(2, 2), FOUR.astype(np.float64), FOUR.astype(np.int32)])
def test_split_refuses(vector: Any) -> None:
    with pytest.raises(VerificationError):
        TWO.split(vector)


@pytest.mark.parametrize(
    "change",
    [
        {"a": np.zeros(3, np.float32)},
        {"a": np.zeros((2, 1), np.float32)},
        {"a": np.zeros(2, np.float64)},
        {"c": np.zeros(2, np.float32)},
        {"b": None},
    ],
)
def test_join_refuses(change: dict[str, Any]) -> None:
    tensors = {n: a for n, a in (TWO.split(FOUR) | change).items() if a is not None}
    with pytest.raises(VerificationError):
        TWO.join(tensors)


@pytest.mark.parametrize("size", [0, 15, 17, 32])
def test_vector_bytes_of_another_length(size: int) -> None:
    with pytest.raises(VerificationError):
        vector_from_bytes(bytes(size), TWO, "w")


def _file(entries: Any, body: bytes = bytes(range(16)), claim: int | None = None) -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(header) if claim is None else claim) + header + body


def _entry(start: Any, end: Any, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD: dict[str, Any] = {"a": _entry(0, 8, [2]), "b": _entry(8, 16, [1, 2])}


def test_safetensors_baseline_is_accepted() -> None:
    vector = from_safetensors(_file(GOOD), TWO, "w")
    assert vector.tobytes() == bytes(range(16))
    moved = {"b": _entry(0, 8, [1, 2]), "a": _entry(8, 16, [2]), "__metadata__": {"x": "y"}}
    assert from_safetensors(_file(moved), TWO, "w").tobytes() == bytes(range(8, 16)) + bytes(range(8))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(7),
        bytes(8),
        _file(GOOD)[:-1],
        _file(GOOD) + b"\x00",
        _file(GOOD)[:20],
        _file(GOOD, claim=1 << 63),
        _file(GOOD, claim=(1 << 64) - 1),
        _file(GOOD, claim=MAX_HEADER_BYTES + 1),
        _file(json.dumps(GOOD).encode() + b" " * MAX_HEADER_BYTES),
        _file({"a": _entry(0, 400_000_000_000, [100_000_000_000]), "b": GOOD["b"]}),
        _file({str(i): _entry(0, 0, [0]) for i in range(10_000)}),
        _file({"a": GOOD["a"]}),
        _file(GOOD | {"c": _entry(16, 16, [0])}),
        _file({"a": GOOD["a"], "B": GOOD["b"]}),
        _file(GOOD | {"a": _entry(0, 8, [2], "F16")}),
        _file(GOOD | {"a": _entry(0, 8, [2], "I32")}),
        _file(GOOD | {"a": _entry(0, 8, [2, 1])}),
        _file(GOOD | {"a": _entry(0, 8, [])}),
        _file(GOOD | {"a": _entry(0, 4, [2])}),
        _file(GOOD | {"a": _entry(8, 0, [2])}),
        _file(GOOD | {"a": _entry(-8, 0, [2])}),
        _file(GOOD | {"b": _entry(9, 17, [1, 2])}),
        _file(GOOD | {"b": _entry(1 << 62, (1 << 62) + 8, [1, 2])}),
        _file(GOOD | {"b": {"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 16, 16]}}),
        _file(GOOD | {"b": {"dtype": "F32", "shape": [1, 2]}}),
        _file(GOOD | {"b": {"dtype": "F32", "shape": 2, "data_offsets": [8, 16]}}),
        _file(GOOD | {"b": "F32"}),
        _file(GOOD | {"b": None}),
        _file([GOOD]),
        _file(7),
        _file(b"{"),
        _file(b"\xff" * 10),
        _file(b"[" * 100_000),
        pickle.dumps({"a": np.zeros(2, np.float32), "b": np.zeros((1, 2), np.float32)}),
        b"\x80\x04." + bytes(100),
        b"PK\x03\x04" + bytes(100),
    ],
    ids=lambda data: f"{len(data)}-bytes",
)
def test_safetensors_refuses(data: bytes) -> None:
    with pytest.raises(VerificationError) as caught:
        from_safetensors(data, TWO, "adapter x")
    assert caught.value.where == "adapter x"


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=80))
def test_safetensors_never_fails_otherwise(body: bytes) -> None:
    for data in (body, _file(body, b"")):
        with pytest.raises(VerificationError):
            from_safetensors(data, TWO, "w")


def test_safetensors_refuses_overlap() -> None:
    data = _file(GOOD | {"b": _entry(0, 8, [1, 2])})
    with pytest.raises(VerificationError):
        from_safetensors(data, TWO, "w")


@pytest.mark.parametrize(("start", "end"), [("0", "8"), (0.0, 8.0), (None, 8), ([0], 8)])
def test_safetensors_refuses_offsets_that_are_not_integers(start: Any, end: Any) -> None:
    with pytest.raises(VerificationError):
        from_safetensors(_file(GOOD | {"a": _entry(start, end, [2])}), TWO, "w")


@pytest.mark.parametrize("shape", [[1.0, 2], [True, 2]])
def test_safetensors_refuses_shapes_that_are_not_integers(shape: Any) -> None:
    with pytest.raises(VerificationError):
        from_safetensors(_file(GOOD | {"b": _entry(8, 16, shape)}), TWO, "w")


def test_safetensors_refuses_a_name_that_appears_twice() -> None:
    header = json.dumps(GOOD)[:-1] + ', "a": ' + json.dumps(GOOD["a"]) + "}"
    with pytest.raises(VerificationError):
        from_safetensors(_file(header.encode()), TWO, "w")
