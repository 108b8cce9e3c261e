"""The tree of errors, and how commands tell them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cloister_shared import console
from cloister_shared.console import Output
from cloister_shared.errors import (
    CloisterError,
    InputError,
    RefusedError,
    RollbackError,
    StateError,
    VerificationError,
)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "OUTPUT", Output())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CloisterError("x"), 1),
        (InputError("x"), 2),
        (StateError("x"), 2),
        (RefusedError("r", "x"), 1),
        (VerificationError("x"), 1),
        (RollbackError("x"), 3),
    ],
)
def test_exit_codes(error: CloisterError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(error, CloisterError)
    assert console.fail(error) == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: x\n")


def test_error_in_one_line_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    error = RefusedError("policy.max_rank", "rank too high", where="a.toml", expected="8", got="9", mend="ask")
    assert str(error) == "a.toml: rank too high; expected 8; got 9; mend: ask"
    assert error.rule == "policy.max_rank"
    console.choose(True, None)
    assert console.fail(error) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out) == {
        "error": "RefusedError",
        "exit_code": 1,
        "what": "rank too high",
        "where": "a.toml",
        "expected": "8",
        "got": "9",
        "mend": "ask",
    }


def test_parts_that_are_not_known_are_left_out() -> None:
    assert str(InputError("bad", got="1")) == "bad; got 1"
    assert InputError("bad").as_dict() == {"error": "InputError", "exit_code": 2, "what": "bad"}


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CLOISTER_HOME", raising=False)
    assert console.default_home() == Path(".cloister")
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path))
    assert console.default_home() == tmp_path
    console.choose(False, tmp_path / "h")
    console.choose(True, None)
    assert Output(True, tmp_path / "h") == console.OUTPUT
    assert console.coordinator_home() == tmp_path / "h" / "coordinator"
    monkeypatch.setenv("HOME", str(tmp_path))
    console.choose(False, Path("~/x"))
    assert Output(True, tmp_path / "x") == console.OUTPUT


def test_site_home(tmp_path: Path) -> None:
    console.choose(False, tmp_path)
    with pytest.raises(InputError, match="which site") as caught:
        console.site_home(None)
    assert caught.value.got == "none"
    assert console.site_home("b") == tmp_path / "sites" / "b"
    for name in ("b", "a"):
        (tmp_path / "sites" / name).mkdir(parents=True)
        (tmp_path / "sites" / name / "site.toml").touch()
        if name == "b":
            assert console.site_home(None) == tmp_path / "sites" / "b"
    (tmp_path / "sites" / "half").mkdir()
    with pytest.raises(InputError) as caught:
        console.site_home(None)
    assert caught.value.got == "a, b"


def test_emit_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit({"b": 1, "a": 2}, "one line")
    console.emit({}, ["x", "y"])
    assert capsys.readouterr().out == "one line\nx\ny\n"
    console.table({"a": 1}, "Rounds", ["round", "verdict"], [[1, "accepted"], [2, "late"]])
    out = capsys.readouterr().out
    assert "Rounds" in out
    assert out.index("accepted") < out.index("late")
    console.choose(True, None)
    console.emit({"b": 1, "a": 2}, "one line")
    console.table({"a": 1}, "Rounds", ["round"], [[1]])
    assert capsys.readouterr().out == '{"a": 2, "b": 1}\n{"a": 1}\n'


def test_a_title_has_lines_of_its_own_and_none_of_somebody_elses(capsys: pytest.CaptureFixture[str]) -> None:
    console.table({}, ["first", "", "second\nthird"], ["a"], [["1"]])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == ["first", "", "second?third", "a", "1"]
