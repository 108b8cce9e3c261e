"""A federation whose registry lies elsewhere: rows in a real PostgreSQL, blobs in a place of their own; over real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.federation import bring_up, make_federation, wait_for
from support.postgres import Server


def test_a_federation_runs_on_postgresql_goes_on_after_a_kill_and_is_audited(
    tiny_bert: Path, postgres: Server, tmp_path: Path
) -> None:
    places = {"database": postgres.database(), "blobs": f"file://{tmp_path / 'blobs'}"}
    storage = "[storage]\n" + "".join(f"{name} = {json.dumps(url)}\n" for name, url in places.items())
    with make_federation(tiny_bert, sites=2, rounds=4, tokens=True, storage=storage) as lab:
        bring_up(lab)
        run = lab.start("run", "run", str(lab.settings))
        wait_for("a round", lambda: lab.events("run", "committed"))
        run.kill()
        run.wait()
        lab.done("run", str(lab.settings), "--resume")
        assert [r["state"] for r in lab.done("rounds", "list")["rounds"]] == ["committed"] * 5
        assert not (lab.home / "coordinator" / "registry.db").exists()
        lab.done("coordinator", "operator-key", "--out", str(tmp_path / "operator.key"))
        lab.done("rounds", "promote", "production", "3")
        lab.done("rounds", "protect", "production", "--key", str(tmp_path / "operator.key"))
        lab.done("rounds", "promote", "production", "4", "--key", str(tmp_path / "operator.key"))
        assert lab.done("site", "pull", "production", "--site", "site-1")["round"] == 4
        lab.done("rounds", "export", "4", "--out", str(tmp_path / "exported"))
        assert lab.done("registry", "fsck") == {"wrong": []}
        assert lab.done("registry", "gc", "--dry-run")["blobs"] == []
        lab.done("audit", "export", "--adapters", "--out", str(tmp_path / "bundle.zip"))
        lab.done("audit", "trust", "--out", str(tmp_path / "trust.json"))
        verify = [sys.executable, "-m", "cloister_shared.audit.command", str(tmp_path / "bundle.zip"), "--json"]
        done = subprocess.run(
            [*verify, "--trust", str(tmp_path / "trust.json")], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout
