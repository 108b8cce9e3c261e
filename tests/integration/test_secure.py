"""Secure aggregation over the real deployment engine: real processes, and a site that is killed at each stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from support.federation import Federation, bring_up, make_federation, superlink_bytes, wait_for


@pytest.fixture
def lab(tiny_bert: Path) -> Iterator[Federation]:
    """Four sites, up, that accept each other as peers."""
    with make_federation(tiny_bert, sites=4, rounds=2, deadline=20, least=3, secure=True) as federation:
        bring_up(federation)
        yield federation


def _killed(federation: Federation, site: str) -> None:
    process = psutil.Process(federation.processes[site].pid)
    for child in (*process.children(recursive=True), process):
        child.kill()


@pytest.mark.parametrize(
    "stage",
    ["plan", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("keys", "shares", "agree", "open"))],
)
def test_a_site_that_is_killed_costs_itself(lab: Federation, stage: str) -> None:
    run = lab.start("run", "run", str(lab.settings))
    kept: set[bytes] = set()
    seen: list[bytes] = []

    def asked() -> bool:
        return any(e["stage"] == stage and e["number"] == 1 for e in lab.events("run", "stage"))

    wait_for(f"stage {stage}", asked)
    _killed(lab, "site-4")

    def over() -> bool:
        seen.append(superlink_bytes(lab))
        for path in (lab.home / "sites").glob("*/agent/kept/*.f32"):
            # Gone once its receipt has come.
            with suppress(FileNotFoundError):
                kept.add(path.read_bytes())
        return run.poll() is not None

    wait_for("the run to end", over)
    assert run.returncode == 0, lab.text("run")
    for number in (1, 2):
        shown = lab.done("rounds", "show", str(number))
        verdicts = {c["name"]: c["verdict"] for c in shown["clients"]}
        assert [verdicts[f"site-{i}"] for i in (1, 2, 3)] == ["accepted"] * 3
        assert {c["update"] for c in shown["clients"]} == {""}
        (one,) = shown["secure_sums"]
        assert set(one["sites"]) >= {"site-1", "site-2", "site-3"}
        assert one["members"] == 4
    assert lab.events("run", "groups")[0]["sizes"] == [4]
    assert all(e["stages_seconds"] > 0 for e in lab.events("run", "committed"))
    assert kept, "no kept update was seen"
    for data in seen:
        assert not any(update[:64] in data for update in kept)
