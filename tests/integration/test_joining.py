"""Joining by token and leaving by revocation, by the commands a person types, over real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.federation import bring_up, make_federation, wait_for


def test_sites_join_by_token_and_one_is_put_out_while_a_run_goes_on(tiny_bert: Path) -> None:
    with make_federation(tiny_bert, sites=3, rounds=40, steps=4, least=2, tokens=True) as lab:
        bring_up(lab)
        run = lab.start("run", "run", str(lab.settings))
        wait_for("a round", lambda: lab.events("run", "committed"))
        assert lab.done("site", "registered", "--site", "site-3")["rounds"][0]["verdict"] == "accepted"
        revoked = lab.done("coordinator", "revoke", "site-3")
        assert "no more" in revoked["superlink"]
        refused = lab.command("site", "registered", "--site", "site-3")
        assert (refused.returncode, "no longer" in refused.stderr) == (1, True)
        wait_for("a round without it", lambda: lab.events("run", "revoked"))
        assert [e["site"] for e in lab.events("run", "revoked")] == ["site-3"]
        # The round that ran when it was revoked may have had it; the next one has not.
        after = len(lab.events("run", "committed")) + 1
        wait_for("that round's end", lambda: len(lab.events("run", "committed")) >= after)
        assert [c["name"] for c in lab.done("rounds", "show", str(after))["clients"]] == ["site-1", "site-2"]
        run.terminate()
        wait_for("the run to end", lambda: run.poll() is not None)
        # A site fetches what was promoted, proven, and whoever is enrolled can have the whole log audited; not who was put out.
        lab.done("rounds", "promote", "production", "1")
        pulled = lab.done("site", "pull", "production", "--site", "site-1")
        assert sorted(p.name for p in Path(pulled["path"]).iterdir()) == ["adapter.safetensors", "release.json"]
        # Refused, or no connection where its certificate is over by now.
        assert lab.command("site", "pull", "production", "--site", "site-3").returncode in (1, 2)
        assert lab.command("site", "pull", "nothing", "--site", "site-1").returncode == 1
        alone = lab.home / "alone"
        (alone / "sites").mkdir(parents=True)
        (alone / "sites" / "site-1").symlink_to(lab.home / "sites" / "site-1")
        exported = lab.done("--home", str(alone), "audit", "export", "--out", str(lab.home / "bundle.zip"))
        assert (exported["sites"], exported["leaves"] >= 5, exported["left_out"]) == (1, True, [])
        lab.done("--home", str(alone), "audit", "trust", "--out", str(lab.home / "trust.json"))
        verify = [sys.executable, "-m", "cloister_shared.audit.command", str(lab.home / "bundle.zip"), "--json"]
        audited = subprocess.run(
            [*verify, "--trust", str(lab.home / "trust.json")], capture_output=True, text=True, timeout=60
        )
        found = json.loads(audited.stdout.splitlines()[-1])
        # One site trusts no other's key and has no other's log; the run was broken off before its last receipt: incomplete, no more.
        assert (audited.returncode, {f["kind"] for f in found["findings"]}) == (2, {"incomplete"}), audited.stdout
        assert {f["code"] for f in found["findings"]} <= {"stranger", "no-receipt", "unwitnessed", "untold"}, (
            audited.stdout
        )
        # It joins again under fresh keys and with its old ledger, once it is down; a token is good once.
        token = str(lab.done("coordinator", "invite", "site-3")["token"])
        own = lab.home / "sites" / "site-3"
        before, tables = (own / "card.json").read_bytes(), lab.done("privacy", "status", "site-3")
        early = lab.command("site", "rejoin", token)
        assert (early.returncode, "up already" in early.stderr) == (2, True)
        lab.processes["site-3"].terminate()
        wait_for("site-3 to end", lambda: lab.processes["site-3"].poll() is not None)
        assert "not running" in lab.command("site", "status", "site-3").stdout
        lab.done("site", "rejoin", token)
        assert (own / "card.json").read_bytes() != before
        assert not (own / "again").exists()
        assert lab.done("privacy", "status", "site-3") == tables
        assert lab.done("site", "registered", "--site", "site-3")["rounds"] == []
        text = ("--data", str(lab.settings.parent / "site-3.jsonl"))
        spent = lab.command("--home", str(lab.home / "other"), "site", "enrol", token, *text)
        assert (spent.returncode, "not good" in spent.stderr) == (1, True)
        assert lab.command("site", "rejoin", token).returncode == 1
        assert not (lab.home / "other").exists() or not list((lab.home / "other").rglob("*.key"))
        # 72 seconds of life: two thirds of it are over by now or soon, and sites renew by themselves.
        wait_for("a renewal", lambda: lab.events("site-1", "certificate"))
        assert "renewed" in lab.events("site-1", "certificate")[0]["what"]
        assert token not in "".join(lab.text(name) for name in lab.processes)
