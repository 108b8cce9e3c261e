"""``cloister audit attack`` as a person and a program use it: report, JSON, exit codes, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cloister.cli import main
from cloister_client import audit_command, canaries, train
from cloister_model.base import find_base
from cloister_shared.privacy import DpSgd, epsilon
from cloister_shared.specs import TaskSpec

from support.planted_faults import NoNoise

QUICK = ("audit", "attack", "--steps", "20", "--canaries", "400")
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command in this process, on a tiny base model: code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(audit_command, "find_base", lambda *_: find_base(str(tiny_bert), "test"))
    small = TaskSpec("text-classification", ("a", "b"), 16, ("query", "value"), (), 8, 16.0)
    monkeypatch.setattr(canaries, "TASK", small)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, said.out, said.err

    return run


def test_json_tells_claim_bound_and_the_run_and_stderr_is_quiet(call: Call, tmp_path: Path) -> None:
    code, out, err = call(*QUICK, "--json")
    assert (code, err) == (0, "")
    (line,) = out.splitlines()
    told: dict[str, Any] = json.loads(line)
    run = DpSgd(told["noise_multiplier"], told["sample_rate"], told["steps"])
    assert told["claimed_epsilon"] == epsilon([run], told["delta"])
    assert told["lower_bound"] <= told["claimed_epsilon"] <= 2.0
    assert told["holds"] is True
    assert told["p_value_of_claim"] > 0.05
    assert (told["delta"], told["confidence"], told["canaries"], told["guesses"]) == (1e-5, 0.95, 400, 64)
    assert told["right"] <= told["guesses"]
    assert "half" in told["cannot_see"]
    assert list(tmp_path.iterdir()) == []


def test_a_build_without_noise_is_violated_and_exits_1(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SecureDPOptimizer", NoNoise)
    code, out, err = call(*QUICK)
    assert code == 1
    assert "VIOLATED" in out
    assert "Traceback" not in err
    code, out, _ = call(*QUICK, "--json")
    told = json.loads(out)
    assert (code, told["holds"]) == (1, False)
    assert told["lower_bound"] > told["claimed_epsilon"]
    assert told["p_value_of_claim"] < 0.05


def test_a_person_reads_bound_beside_claim_and_what_it_cannot_see(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_command, "_EVERY", 0.0)
    code, out, err = call(*QUICK, "--epsilon", "8")
    assert code == 0
    claim, bound = out.splitlines()[:2]
    assert claim.startswith("claimed epsilon  7.9")
    assert bound.startswith("lower bound")
    assert "0.95 confidence" in bound
    assert audit_command.CANNOT_SEE in out
    assert "this claim could not fail" in out
    assert "step 20/20" in err


def test_help_says_what_it_cannot_see(call: Call) -> None:
    code, out, _ = call("audit", "attack", "--help")
    assert code == 0
    assert "cannot see" in out
    assert "not Poisson" in " ".join(out.split())


@pytest.mark.parametrize(
    "wrong",
    [
        ("--epsilon", "0"),
        ("--epsilon", "nan"),
        ("--delta", "0"),
        ("--delta", "1"),
        ("--sample-rate", "0"),
        ("--sample-rate", "1.1"),
        ("--confidence", "1"),
        ("--confidence", "nan"),
        ("--steps", "0"),
        ("--canaries", "1"),
    ],
)
def test_usage_errors_exit_2(call: Call, wrong: tuple[str, str]) -> None:
    code, out, err = call("audit", "attack", "--steps", "2", *wrong)
    assert code == 2
    assert "Traceback" not in out + err
    assert wrong[0] in err or wrong[0].strip("-") in err
