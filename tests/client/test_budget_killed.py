"""SIGKILL at any instant of reserve, train, keep, spend and release: nothing is free, and the ledger opens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import client_kill_worker


def _kill(folder: Path, kills: int, seed: int, *fault: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, client_kill_worker.__file__, str(folder), str(kills), str(seed), *fault]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590, check=False)


def _survives(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    done = _kill(folder, kills, seed)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    assert sum(told["left"].values()) == kills
    assert told["released"] >= client_kill_worker.ROUNDS
    assert told["charged"] >= told["cost"] > 0
    return told


def test_forty_kills_leave_nothing_free(tmp_path: Path) -> None:
    told = _survives(tmp_path, 40, 1)
    assert set(told["left"]) & {"reserved", "reserved, kept", "spent, kept"}, "some should die in the middle"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_a_thousand_kills_leave_nothing_free(tmp_path: Path, seed: int) -> None:
    told = _survives(tmp_path, 500, seed)
    places = {"reserved", "reserved, kept", "spent, kept", "spent, kept, released", "spent, released"}
    assert set(told["left"]) >= places, told["left"]


@pytest.mark.parametrize("fault", ["early", "forgetful"])
def test_the_kills_find_a_release_that_was_free(tmp_path: Path, fault: str) -> None:
    done = _kill(tmp_path, 40, 4, fault)
    assert done.returncode == 1
    assert "free: " in done.stderr
