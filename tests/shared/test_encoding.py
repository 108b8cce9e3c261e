"""Canonical records, strict reading, durable writes."""

from __future__ import annotations

import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from cloister_shared.encoding import MAX_RECORD_BYTES, canonical, digest, parse_record, read_json, write_durably
from cloister_shared.errors import InputError, StateError, VerificationError
from hypothesis import given, settings
from hypothesis import strategies as st

_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(_TEXT, _JSON, max_size=5))
def test_canonical_is_read_back_and_does_not_depend_on_order(record: dict[str, Any]) -> None:
    encoded = canonical(record)
    assert parse_record(encoded, "w") == record
    assert canonical(dict(reversed(record.items()))) == encoded
    assert canonical(json.loads(encoded)) == encoded


def test_canonical_is_sorted_compact_utf8() -> None:
    assert canonical({"b": [1, 2.5, None, True], "a": {"é": "\n", "d": 1e-9}}) == (
        '{"a":{"d":1e-09,"é":"\\n"},"b":[1,2.5,null,true]}'.encode()
    )
    assert digest(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_canonical_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical({"a": [value]})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"{} {}",
        b"[]",
        b"3",
        b'"a"',
        b"null",
        b'{"a":1,"a":1}',
        b'{"x":{"a":1,"b":2,"a":3}}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":"\xff"}',
        '{"a":1}'.encode("utf-16"),
        '\ufeff{"a":1}'.encode(),
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"[" * 100_000,
        b'{"a":' + b"9" * 10_000 + b"}",
    ],
)
def test_parse_record_refuses(data: bytes) -> None:
    with pytest.raises(VerificationError) as caught:
        parse_record(data, "from peer c")
    assert caught.value.where == "from peer c"
    assert len(str(caught.value)) < 400


def test_parse_record_refuses_a_number_too_large_for_a_float() -> None:
    with pytest.raises(VerificationError):
        parse_record(b'{"a":1e999}', "w")


def test_what_is_read_has_a_canonical_form() -> None:
    try:
        record = parse_record(b'{"a":"\\ud800"}', "w")
    except VerificationError:
        return
    canonical(record)


def test_record_size_limit_is_exact() -> None:
    fill = MAX_RECORD_BYTES - len(b'{"a":""}')
    assert parse_record(b'{"a":"' + b"x" * fill + b'"}', "w")["a"] == "x" * fill
    with pytest.raises(VerificationError, match="too large"):
        parse_record(b'{"a":"' + b"x" * (fill + 1) + b'"}', "w")


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_write_durably_replaces_and_sets_mode(tmp_path: Path, mode: int) -> None:
    path, before = tmp_path / "file", os.umask(0o022)
    try:
        write_durably(path, b"old", mode=0o600)
        write_durably(path, b"new" * 1000, mode=mode)
    finally:
        os.umask(before)
    assert path.read_bytes() == b"new" * 1000
    assert path.stat().st_mode & 0o777 == mode
    assert os.listdir(tmp_path) == ["file"]


def test_write_durably_replaces_a_link_and_not_its_target(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"kept")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_durably(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"kept"
    assert not (tmp_path / "link").is_symlink()


def test_write_durably_onto_a_folder_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with pytest.raises(StateError) as caught:
        write_durably(tmp_path / "target", b"x")
    assert caught.value.where == str(tmp_path / "target")
    assert os.listdir(tmp_path) == ["target"]


def test_write_durably_without_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "missing" / "x", tmp_path / "file" / "x"):
        with pytest.raises(StateError):
            write_durably(path, b"x")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_write_durably_into_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StateError):
        write_durably(tmp_path / "x", b"x")
    assert not os.listdir(tmp_path)


def test_disk_that_refuses_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StateError, match="cannot write"):
            write_durably(path, bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_read_json_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    for make in (lambda: None, lambda: path.write_bytes(b"[]"), lambda: path.write_bytes(b'{"a":1,"a":2}')):
        make()
        with pytest.raises(InputError, match="site card") as caught:
            read_json(path, "site card")
        assert caught.value.where == str(path)
        assert caught.value.exit_code == 2
    path.write_bytes(b'{"a":1}')
    assert read_json(path, "site card") == {"a": 1}
