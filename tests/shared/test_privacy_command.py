"""``cloister privacy``: the commands' own output, against the functions that they stand on."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from cloister.privacy_plot import bars, svg
from cloister_client.budget import Ledger
from cloister_client.data import open_ledger
from cloister_client.site import Site
from cloister_server.planning import forecast, knobs, training_for
from cloister_shared.privacy import DpSgd, epsilon

from support.client_ledgers import core
from support.client_world import make_records, make_site, make_world, write_records
from support.federation import Federation, make_federation


def run(*arguments: str, code: int = 0) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "cloister.cli", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if "--json" in arguments else done.stdout + done.stderr


def test_plan_of_some_steps() -> None:
    numbers = ("--sample-rate", "0.01", "--steps", "1000", "--delta", "1e-5", "--json")
    said = run("privacy", "plan", "--sigma", "1.1", *numbers)
    assert said["epsilon"] == epsilon([DpSgd(1.1, 0.01, 1000)], 1e-5)
    said = run("privacy", "plan", "--epsilon", "2", *numbers)
    assert epsilon([DpSgd(said["sigma"], 0.01, 1000)], 1e-5) == said["epsilon"] <= 2


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--sigma", "1"],
        ["--sigma", "1", "--epsilon", "2", "--sample-rate", "0.1", "--steps", "1"],
        ["x.toml", "--sigma", "1"],
        ["--sigma", "-1", "--sample-rate", "0.1", "--steps", "1"],
        ["--sigma", "1", "--sample-rate", "1.5", "--steps", "1"],
        ["--sigma", "1", "--sample-rate", "0.1", "--steps", "1", "--delta", "0"],
        ["--epsilon", "-2", "--sample-rate", "0.1", "--steps", "1"],
        ["--sigma", "1", "--sample-rate", "0.1", "--steps", "1", "--accountant", "gdp"],
    ],
)
def test_plan_refuses_what_it_cannot_plan(options: list[str]) -> None:
    said = run("privacy", "plan", *options, code=2)
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def federation(tiny_bert: Path) -> Any:
    """A federation of two sites that nobody started."""
    with make_federation(tiny_bert, sites=2, rounds=4, steps=2) as made:
        yield made


def test_plan_of_a_federation(federation: Federation) -> None:
    said = run("--home", str(federation.home), "privacy", "plan", str(federation.settings), "--json")
    assert [s["site"] for s in said["sites"]] == ["site-1", "site-2"]
    one = said["sites"][0]
    assert one["epsilon"] == epsilon([DpSgd(one["noise_multiplier"], one["sample_rate"], 8)], 1e-5) == one["after"]
    assert (one["before"], one["rounds"], said["cannot_finish"]) == (0.0, 4, [])
    changes = {k["change"]: k["epsilon"] for k in said["knobs"]["changes"]}
    assert changes["as planned"] == one["epsilon"]
    assert changes["half the rounds"] < changes["as planned"] < changes["twice the rounds"]
    assert changes["a quarter more noise"] < changes["as planned"] < changes["twice the batch"]
    text = run("--home", str(federation.home), "privacy", "plan", str(federation.settings))
    assert "every site can finish" in text
    assert "twice the rounds" in text


def test_a_site_that_cannot_finish_is_named_with_its_rounds(federation: Federation) -> None:
    from dataclasses import replace

    from cloister_server.coordinator import open_coordinator

    coordinator = open_coordinator(federation.home / "coordinator")
    card, settings = coordinator.sites()[0], coordinator.federation
    spec = training_for(settings, card)
    two = epsilon([DpSgd(spec.noise_multiplier, spec.sample_rate, 4)], settings.delta)
    found = forecast(settings, replace(card, epsilon_cap=two), [])
    assert (found.rounds, found.cap) == (2, two)
    assert forecast(settings, replace(card, epsilon_cap=two), [spec.event]).rounds == 1
    assert forecast(settings, replace(card, epsilon_cap=two), [spec.event, spec.event]).rounds == 0
    target = replace(settings, epsilon=2.0, noise_multiplier=None)
    for knob in knobs(target, card):
        assert (knob.noise_multiplier is None) == ("noise" in knob.change)


@pytest.fixture
def site(tmp_path: Path, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site with text and a ledger."""
    monkeypatch.setenv("CLOISTER_RUNTIME", str(tmp_path))
    from support.client_world import GPT2_TASK

    world = make_world(tiny_gpt2, GPT2_TASK)
    data = write_records(tmp_path / "own.jsonl", make_records(12))
    return make_site(world, tmp_path / "home" / "sites" / "north", data)


def test_status_says_what_each_block_spent_by_run_and_model(site: Site, tmp_path: Path) -> None:
    ledger: Ledger = open_ledger(site)
    ledger.spend(ledger.reserve(core(1, steps=2), 1000).entry, "ab" * 32)
    ledger.reserve(core(1, steps=1, run="cd"), 1000)
    home = ["--home", str(tmp_path / "home")]
    said = run(*home, "privacy", "status", "--plot", str(tmp_path / "plot.svg"), "--json")
    (block,) = said["sites"][0]["blocks"]
    standing = ledger.standing()
    assert (block["epsilon"], block["spent"]) == (standing.epsilon, standing.spent)
    assert 0 < block["spent"] < block["epsilon"] == block["spent"] + block["reserved"]
    assert block["left"] == block["cap"] - block["epsilon"]
    assert [(s["run"][:2], s["rounds"], s["steps"]) for s in block["shares"]] == [("ab", 1, 2), ("cd", 1, 1)]
    assert ET.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")
    text = run(*home, "privacy", "status", "north")
    for word in ("block-1", "record", "by run and model", "abababab", "cdcdcdcd", "[#", "+"):
        assert word in text


def test_status_without_a_site_says_so(tmp_path: Path) -> None:
    assert "no site here" in run("--home", str(tmp_path), "privacy", "status", code=2)


def test_an_older_ledger_is_refused_with_three(site: Site, tmp_path: Path) -> None:
    old = {path.name: path.read_bytes() for path in site.agent_home.glob("ledger.db*")}
    ledger = open_ledger(site)
    ledger.spend(ledger.reserve(core(1), 1000).entry, "ab" * 32)
    del ledger
    for path in site.agent_home.glob("ledger.db*"):
        path.unlink()
    for name, data in old.items():
        (site.agent_home / name).write_bytes(data)
    assert "went back in time" in run("--home", str(tmp_path / "home"), "privacy", "status", code=3)


def test_data_added_again_keeps_its_spend_and_new_rows_are_a_new_block(site: Site, tmp_path: Path) -> None:
    ledger = open_ledger(site)
    ledger.spend(ledger.reserve(core(1), 1000).entry, "ab" * 32)
    home, more = ["--home", str(tmp_path / "home")], make_records(12) + make_records(3, seed=9)
    renamed = write_records(tmp_path / "renamed.jsonl", tuple(reversed(more)))
    added = run(*home, "site", "data", "add", str(renamed), "--block", "june", "--json")
    assert (added["records"], added["units"], added["new"], added["block"]) == (15, 15, 3, "june")
    blocks = run(*home, "privacy", "status", "--json")["sites"][0]["blocks"]
    assert [(b["name"], b["units"], b["rounds"]) for b in blocks] == [("block-1", 12, 1), ("june", 3, 0)]
    assert blocks[1]["epsilon"] == 0.0
    listed = run(*home, "site", "data", "list", "--json")
    assert [Path(s["file"]).name for s in listed["sources"]] == ["own.jsonl", "renamed.jsonl"]
    assert "privacy unit is fixed" in run(*home, "site", "data", "add", str(renamed), "--unit-field", "label", code=2)


def test_bars_and_svg_escape_and_stay_in_their_frame() -> None:
    lines = bars([("a", 2.0, 1.0, 4.0), ("longer", 9.0, 0.0, 4.0), ("none", 0.0, 0.0, 4.0)])
    assert [line.count("#") for line in lines] == [20, 40, 0]
    assert [line.count("+") for line in lines] == [10, 0, 0]
    assert len({line.index("[") for line in lines}) == 1
    text = svg("<title>", [("<b>&", 1.0, 0.5, 2.0)])
    assert "<b>" not in text
    ET.fromstring(text)
