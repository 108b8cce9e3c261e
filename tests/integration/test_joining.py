"""Joining by token and leaving by revocation, by the commands a person types, over real processes."""

from __future__ import annotations

from pathlib import Path

from support.federation import bring_up, make_federation, wait_for


def test_sites_join_by_token_and_one_is_put_out_while_a_run_goes_on(tiny_bert: Path) -> None:
    with make_federation(tiny_bert, sites=3, rounds=5, steps=4, least=2, tokens=True) as lab:
        bring_up(lab)
        run = lab.start("run", "run", str(lab.settings))
        wait_for("a round", lambda: lab.events("run", "committed"))
        assert lab.done("site", "registered", "--site", "site-3")["rounds"][0]["verdict"] == "accepted"
        revoked = lab.done("coordinator", "revoke", "site-3")
        assert "no more" in revoked["superlink"]
        after = len(lab.events("run", "committed"))
        refused = lab.command("site", "registered", "--site", "site-3")
        assert (refused.returncode, "no longer" in refused.stderr) == (1, True)
        wait_for("the run to end", lambda: run.poll() is not None)
        assert run.returncode == 0, lab.text("run")
        assert [e["site"] for e in lab.events("run", "revoked")][:1] == ["site-3"]
        # The round that ran when it was revoked may have had it; the next one has not.
        for number in range(after + 2, 6):
            names = [c["name"] for c in lab.done("rounds", "show", str(number))["clients"]]
            assert names == ["site-1", "site-2"]
        # A token is good once, and the name is free again.
        token = str(lab.done("coordinator", "invite", "site-3")["token"])
        text = ("--data", str(lab.settings.parent / "site-3.jsonl"))
        again = lab.command("--json", "--home", str(lab.home / "new"), "site", "enrol", token, *text)
        assert again.returncode == 0, again.stderr + again.stdout
        spent = lab.command("--home", str(lab.home / "other"), "site", "enrol", token, *text)
        assert (spent.returncode, "not good" in spent.stderr) == (1, True)
        assert not (lab.home / "other").exists() or not list((lab.home / "other").rglob("*.key"))
        # 72 seconds of life: two thirds of it are over by now or soon, and sites renew by themselves.
        wait_for("a renewal", lambda: lab.events("site-1", "certificate"))
        assert "renewed" in lab.events("site-1", "certificate")[0]["what"]
        assert token not in "".join(lab.text(name) for name in lab.processes)
