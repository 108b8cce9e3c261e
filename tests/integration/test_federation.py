"""A whole federation as real processes: text in, rounds out, ciphertext between, and what survives kills."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import psutil
import pytest
from cloister_flower.bundle import build_bundle
from cloister_flower.control import Control
from cloister_flower.grid import Link
from cloister_server.coordinator import open_coordinator
from cloister_server.federation import read_federation
from safetensors.numpy import load_file

from support.federation import Federation, bring_up, make_federation, superlink_bytes, wait_for


@pytest.fixture(scope="module")
def lab(tiny_bert: Path) -> Iterator[Federation]:
    """Three sites, up."""
    with make_federation(tiny_bert, steps=4) as federation:
        bring_up(federation)
        yield federation


def _children(federation: Federation, site: str) -> dict[str, psutil.Process]:
    found = {}
    for child in psutil.Process(federation.processes[site].pid).children(recursive=True):
        line = child.cmdline()
        if "-m" in line:
            found[line[line.index("-m") + 1].rsplit(".", 1)[-1]] = child
    return found


def _step(federation: Federation, site: str, name: str, number: int) -> bool:
    """Whether ``site`` has made a step in round ``number`` of the run that process ``name`` started."""
    started, status = federation.events(name, "run"), federation.status(site)
    return (
        bool(started)
        and (status.get("run"), status.get("round")) == (started[0]["run"], number)
        and status["step"] >= 1
    )


def test_two_rounds_end_to_end(lab: Federation) -> None:
    run = lab.start("run", "run", str(lab.settings))
    seen: list[bytes] = []
    kept: set[bytes] = set()
    sockets: set[str] = set()
    relays = [_children(lab, site)["relay"] for site in lab.sites]
    agents = [_children(lab, site)["agent"] for site in lab.sites]
    training = 0

    def over() -> bool:
        nonlocal training
        seen.append(superlink_bytes(lab))
        for site, agent in zip(lab.sites, agents, strict=True):
            if lab.status(site).get("state") == "training":
                training += 1
                sockets.update(f"{c.family.name}:{c.type.name}" for c in agent.net_connections(kind="all"))
            for path in (lab.home / "sites" / site / "agent" / "kept").glob("*.f32"):
                kept.add(path.read_bytes())
        return run.poll() is not None

    wait_for("the run to end", over)
    assert run.returncode == 0, lab.text("run")
    assert training, "no round was seen under way"
    assert sockets == {"AF_UNIX:SOCK_STREAM"}
    everything = max(seen, key=len)
    assert any(b"CLSTENV1" in data for data in seen), "no envelope was seen in SuperLink"
    secrets = [b"cloister-plan", b"secretmarker", b"billing", b"noise_multiplier", *(k[:64] for k in kept if k)]
    for data in seen:
        for secret in secrets:
            assert secret not in data, f"{secret!r} lies open in SuperLink"
    assert len(everything) > 10_000
    assert kept, "no kept update was seen"
    for relay in relays:
        assert relay.memory_info().rss < 200e6
        assert "libtorch" not in Path(f"/proc/{relay.pid}/maps").read_text()
    rounds = lab.done("rounds", "list")["rounds"]
    assert [r["state"] for r in rounds] == ["committed"] * 3
    assert [r["participants"] for r in rounds] == [0, 3, 3]
    assert all(0 <= r["metrics"]["accuracy"] <= 1 for r in rounds[1:])
    # Epsilon is that of the whole history, as the sites' own ledgers have it.
    for site in lab.sites:
        assert rounds[2]["epsilon"][site] == pytest.approx(lab.status(site)["epsilon"], abs=1e-9)
        assert rounds[2]["epsilon"][site] > rounds[1]["epsilon"][site]
    # Receipts came: nothing is kept any more.
    wait_for("receipts", lambda: not list((lab.home / "sites").glob("*/agent/kept/*.f32")), 30)
    # Wire: the envelope adds at most a fixed 1.6 kB to the adapter.
    shown = lab.done("rounds", "show", "2")
    size = 4 * lab.events("run", "run")[0]["parameters"]
    assert all(c["received_bytes"] - size < 2400 for c in shown["clients"])


def test_killed_coordinator_resumes_without_charging_again(lab: Federation) -> None:
    before = {site: lab.status(site)["epsilon"] for site in lab.sites}
    run = lab.start("killed", "run", str(lab.settings))
    wait_for("its round 2", lambda: any(_step(lab, s, "killed", 2) for s in lab.sites))
    assert run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.wait()
    killed = lab.done("rounds", "list")
    assert [r["state"] for r in killed["rounds"]][:2] == ["committed", "committed"]
    assert not killed["finished"]
    resumed = lab.start("resumed", "run", str(lab.settings), "--resume")
    wait_for("the resumed run to end", lambda: resumed.poll() is not None)
    assert resumed.returncode == 0, lab.text("resumed")
    after = lab.done("rounds", "list")
    assert after["run"] == killed["run"]
    assert after["finished"]
    assert after["rounds"][1]["adapter"] == killed["rounds"][1]["adapter"]
    assert after["rounds"][2]["attempts"] == 2
    assert after["rounds"][2]["participants"] == 3
    for site in lab.sites:
        ledger = sqlite3.connect(lab.home / "sites" / site / "agent" / "ledger.db")
        rows = ledger.execute("SELECT round, state FROM entry WHERE run = ?", (after["run"],)).fetchall()
        ledger.close()
        assert sorted(rows) == [(1, "spent"), (2, "spent")], f"{site} trained or was charged twice: {rows}"
        assert lab.status(site)["epsilon"] > before[site]


def test_killed_agent_costs_one_client_and_the_relay_goes_on(lab: Federation) -> None:
    site = lab.sites[0]
    processes = _children(lab, site)
    run = lab.start("agentless", "run", str(lab.settings))
    wait_for("training", lambda: _step(lab, site, "agentless", 1))
    processes["agent"].send_signal(signal.SIGKILL)
    wait_for("the run to end", lambda: run.poll() is not None)
    assert run.returncode == 0, lab.text("agentless")
    found = lab.done("rounds", "list")
    rounds = found["rounds"]
    assert rounds[1]["participants"] in (2, 3)
    shown = {c["name"]: c for c in lab.done("rounds", "show", "1")["clients"]}
    if rounds[1]["participants"] == 2:
        assert shown[site]["verdict"] == "unreadable"
        assert "agent-broke-off" in shown[site]["reason"]
    assert rounds[2]["participants"] == 3, "the site did not come back"
    assert _children(lab, site)["relay"].pid == processes["relay"].pid
    assert _children(lab, site)["agent"].pid != processes["agent"].pid
    ledger = sqlite3.connect(lab.home / "sites" / site / "agent" / "ledger.db")
    states = dict(
        ledger.execute("SELECT state, COUNT(*) FROM entry WHERE run = ? GROUP BY state", (found["run"],)).fetchall()
    )
    ledger.close()
    assert states.get("reserved", 0) == 0
    assert states.get("lost", 0) + states["spent"] == 2


def test_foreign_bundle_is_refused_and_never_imported(lab: Federation, tmp_path: Path) -> None:
    coordinator = open_coordinator(lab.home / "coordinator", read_federation(lab.settings))
    content, _ = build_bundle()
    trap = tmp_path / "imported"
    made = BytesIO()
    with zipfile.ZipFile(BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        for name in ("cloister_client/__init__.py", "cloister_never_imported.py", "grpc.py"):
            new.writestr(name, f"open({str(trap)!r}, 'w').write('imported')\nraise SystemExit\n")
    import hashlib

    changed = made.getvalue()
    with Control(coordinator.card.address, coordinator.ca, coordinator.token) as control:
        nodes = [control.register(card.node.encode(), card.name) for card in coordinator.sites()]
        flower_run = control.start_run(changed, hashlib.sha256(changed).hexdigest())
    link = Link(coordinator.card.address, coordinator.ca, coordinator.secret, flower_run)
    replies = dict(link.exchange(dict.fromkeys(nodes, b"anything"), "trap", 60, lambda r: len(r) == len(nodes)))
    link.close(failed=False)
    assert len(replies) == len(nodes)
    assert all(m.has_error() and m.error.reason == "bundle-or-frame" for m in replies.values())
    assert not trap.exists()
    log = (lab.home / "sites" / lab.sites[0] / "link" / "relay.log").read_text()
    assert "the bundle is not allowed here" in log


def test_secrets_are_in_no_log_and_no_process_list(lab: Federation) -> None:
    home = lab.home
    secrets = [p.read_bytes() for p in (home / "coordinator").glob("*.secret")]
    secrets += [(home / "coordinator" / "control.token").read_bytes(), (home / "coordinator" / "sign.key").read_bytes()]
    for site in lab.sites:
        secrets += [p.read_bytes() for p in (home / "sites" / site / "agent").glob("*.key")]
        secrets += [(home / "sites" / site / "link" / "superexec.secret").read_bytes()]
    shapes = [s for secret in secrets for s in (secret, secret.hex().encode())]
    logs = [p.read_bytes() for p in home.rglob("*.log")]
    assert len(logs) >= 10
    lines = [
        " ".join(p.cmdline()).encode()
        for top in lab.processes.values()
        if top.poll() is None
        for p in psutil.Process(top.pid).children(True)
    ]
    for data in [*logs, *lines]:
        assert not any(shape in data for shape in shapes)
    for path in [p for p in home.rglob("*") if p.suffix in (".key", ".secret", ".token") or p.name == "ledger.db"]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_relay_log_and_wire_know_nothing_of_the_text(lab: Federation) -> None:
    for site in lab.sites:
        for log in (lab.home / "sites" / site / "link").glob("*.log"):
            assert b"secretmarker" not in log.read_bytes()


@pytest.mark.parametrize("what", ["token", "secret", "port"])
def test_wrong_token_secret_and_port_in_use_are_one_line(lab: Federation, what: str) -> None:
    if what == "port":
        result = lab.command("coordinator", "up")
        expected = "cannot listen for the SuperLink"
    else:
        path = lab.home / "coordinator" / ("control.token" if what == "token" else "superexec.secret")
        good = path.read_bytes()
        path.write_bytes(b"wrong-token-0123456789" if what == "token" else bytes(32))
        try:
            result = lab.command("run", str(lab.settings), "--wait", "20")
        finally:
            path.write_bytes(good)
        expected = "token is refused" if what == "token" else "SuperExec secret is refused"
    assert result.returncode == 2, result.stdout + result.stderr
    assert expected in result.stderr
    assert [line for line in result.stderr.splitlines() if line.strip()][-1].startswith("error: ")
    assert "Traceback" not in result.stderr + result.stdout


def test_sites_end_with_their_supervisor(lab: Federation) -> None:
    site = lab.sites[-1]
    processes = _children(lab, site)
    assert set(processes) == {"agent", "relay", "supernode"}
    lab.processes[site].send_signal(signal.SIGKILL)
    lab.processes[site].wait()
    _, alive = psutil.wait_procs(list(processes.values()), timeout=30)
    assert not alive


def test_missing_site_costs_one_client(lab: Federation) -> None:
    # Its supervisor was killed above: two of three are left, which is enough.
    run = lab.start("short", "run", str(lab.settings), "--wait", "1")
    wait_for("the run to end", lambda: run.poll() is not None)
    assert run.returncode == 0, lab.text("short")
    rounds = lab.done("rounds", "list")["rounds"]
    assert [r["participants"] for r in rounds] == [0, 2, 2]


def test_export_loads_in_a_process_without_cloister(lab: Federation, tiny_bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    lab.done("rounds", "export", "0", "--out", str(tmp_path / "first"))
    first = load_file(tmp_path / "first" / "head.safetensors")
    assert np.abs(first["weight"]).max() > 0, "the head did not start from the public text"
    lab.done("rounds", "export", "--out", str(out))
    card = (out / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('"BASE"', repr(str(tiny_bert)))
    guard = "import sys; sys.modules['cloister_shared'] = sys.modules['cloister_model'] = None\n"
    result = subprocess.run(
        [sys.executable, "-c", guard + code],
        cwd=out,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] in json.loads((out / "cloister.json").read_text())["labels"]
