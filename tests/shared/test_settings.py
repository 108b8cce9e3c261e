"""TOML settings: every mistake is told with file, key, expected and got."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cloister_shared.errors import InputError
from cloister_shared.settings import Table, quote, read_toml
from hypothesis import given, settings
from hypothesis import strategies as st

Getter = Callable[[Table], Any]
GETTERS: dict[str, tuple[Getter, Any, tuple[Any, ...]]] = {
    "text": (lambda t: t.text("k"), "x", ("", 1, True, ["x"], 1.5)),
    "choice": (lambda t: t.text("k", choices=("a", "b")), "b", ("c", "", 1, ["a"])),
    "pattern": (lambda t: t.text("k", pattern=str.isdigit), "12", ("1x", "", 12)),
    "number": (lambda t: t.number("k", 0, 2), 1.5, (-0.1, 2.1, math.nan, math.inf, -math.inf, True, "1", [1])),
    "integer": (lambda t: t.integer("k", 0, 2), 1, (-1, 3, 1.0, True, "1", [1], 10**400)),
    "flag": (lambda t: t.flag("k"), True, (1, 0, "true", [True])),
    "texts": (lambda t: t.texts("k"), ("a", "b"), ("a", ["a", "a"], ["a", ""], ["a", 1], [["a"]], 1)),
    "integers": (lambda t: t.integers("k", 0, 9), (1, 2), (1, "1", [1, 1], [10], [-1], [True], [1.0], ["1"])),
    "table": (lambda t: t.table("k").text("v"), "w", (1, "x", ["x"], [{"v": "w"}])),
    "tables": (lambda t: [i.text("v") for i in t.tables("k")], ["w"], (1, "x", ["x"], {"v": "w"}, [{"v": "w"}, 1])),
}
GOOD_TOML = {"table": {"v": "w"}, "tables": [{"v": "w"}], "texts": ["a", "b"], "integers": [1, 2]}


@pytest.mark.parametrize("name", GETTERS)
def test_getter(name: str) -> None:
    get, good, bad = GETTERS[name]
    assert get(Table({"k": GOOD_TOML.get(name, good)}, "site.toml")) == good
    for value in bad:
        with pytest.raises(InputError) as caught:
            get(Table({"k": value}, "site.toml"))
        error = caught.value
        assert error.where == "site.toml"
        assert "'k'" in error.what
        assert error.expected
        assert error.got == repr(value)[:80]
        assert error.exit_code == 2


@pytest.mark.parametrize("name", [n for n in GETTERS if n not in ("table", "tables")])
def test_missing_key(name: str) -> None:
    with pytest.raises(InputError, match=r"site\.toml: key 'k' is missing"):
        GETTERS[name][0](Table({}, "site.toml"))


def test_number_beyond_the_floats_is_refused() -> None:
    with pytest.raises(InputError):
        Table({"k": 10**400}, "f").number("k", 0, 1)


def test_defaults_stand_in_for_missing_keys_only() -> None:
    table = Table({"k": 5}, "f")
    assert table.integer("x", 0, 9, 3) == 3
    assert table.text("t", "d") == "d"
    assert table.number("n", 0, 1, 0.5) == 0.5
    assert table.flag("f", False) is False
    assert table.texts("l", ()) == ()
    assert table.integers("i", 0, 1, ()) == ()
    assert table.tables("ts") == []
    with pytest.raises(InputError):
        table.integer("k", 0, 4, 3)


def test_unknown_key_is_refused_and_known_ones_are_named() -> None:
    table = Table({"epsilon_cap": 1, "epsilon_cpa": 2}, "policy.toml")
    table.number("epsilon_cap", 0, 10)
    with pytest.raises(InputError, match=r"policy\.toml: key 'epsilon_cpa' is not known here") as caught:
        table.finish()
    assert caught.value.expected == "epsilon_cap"
    assert table.written == {"epsilon_cap", "epsilon_cpa"}
    table.number("epsilon_cpa", 0, 10)
    table.finish()


def test_nested_tables_say_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text("[data]\npath = 3\n[[source]]\nx = 1\n[[source]]\ny = 1\n")
    table = read_toml(path, "site settings")
    with pytest.raises(InputError) as caught:
        table.table("data").text("path")
    assert caught.value.where == f"{path} [data]"
    first, second = table.tables("source")
    assert first.integer("x", 0, 1) == 1
    with pytest.raises(InputError) as caught:
        second.finish()
    assert caught.value.where == f"{path} [[source]] #2"
    with pytest.raises(InputError) as caught:
        table.table("none").integer("n", 0, 1)
    assert caught.value.where == f"{path} [none]"


@pytest.mark.parametrize("data", [b"a = ", b"a = 1\na = 2", b"a = \xff", b"[a\n", b"\xef\xbb\xbfa = 1", b"a = nope"])
def test_file_that_is_not_toml(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "site.toml"
    path.write_bytes(data)
    with pytest.raises(InputError, match="site settings is not") as caught:
        read_toml(path, "site settings")
    assert caught.value.where == str(path)
    assert caught.value.got


@pytest.mark.parametrize("data", [b"a = " + b"9" * 5000, b"a = " + b"[" * 50_000])
def test_file_that_is_too_much_for_the_reader(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "site.toml"
    path.write_bytes(data)
    with pytest.raises(InputError):
        read_toml(path, "site settings")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(InputError, match="cannot read policy") as caught:
            read_toml(path, "policy")
        assert caught.value.where == str(path)


@settings(deadline=None, max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_quote_is_read_back(text: str) -> None:
    quoted = quote(text)
    assert "\n" not in quoted
    assert tomllib.loads(f"k = {quoted}") == {"k": text}
