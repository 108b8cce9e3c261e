"""The doctor: what is well is said to be, and each thing that was broken on purpose is named with its mend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cloister.doctor import NOTE, WRONG, Look, looks
from cloister_flower.bundle import build_bundle
from cloister_model.base import find_base
from cloister_server.coordinator import init
from cloister_server.federation import read_federation
from cloister_server.store import Store

from support.registry import a_model, planned
from support.server_world import write_federation

RUN = "ab" * 16


@pytest.fixture
def home(tmp_path: Path, tiny_bert: Path) -> Path:
    """A coordinator with a registered run and a site, as on a demonstration machine."""
    from cloister_server.tables import Run

    path = write_federation(tmp_path / "FEDERATION.toml", tiny_bert)
    folder = tmp_path / "coordinator"
    init(folder, read_federation(path), find_base(str(tiny_bert), "test").digest, build_bundle()[1])
    store = Store(folder)
    texts = dict.fromkeys(("federation", "base", "task", "rule", "tensors", "config", "code"), "{}")
    store.start_run(Run.model_validate(texts | {"id": RUN, "created": 1.0, "rounds": 3}), b"zero", a_model())
    planned(store, RUN, 1, upto="open")
    store.close()
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "my card was charged twice", "label": "billing"}\n' * 40)
    site = tmp_path / "sites" / "site-1"
    enrolled(tmp_path, site, text, tiny_bert)
    return tmp_path


def enrolled(home: Path, site: Path, text: Path, base: Path) -> None:
    command = [sys.executable, "-m", "cloister.cli", "--home", str(home), "site", "enrol", "site-1", "--coordinator",
               str(home / "coordinator" / "card.json"), "--data", str(text), "--base", str(base)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr


def found(home: Path) -> list[Look]:
    return list(looks(home, home / "coordinator", [home / "sites" / "site-1"]))


def wrong(home: Path) -> dict[str, str]:
    return {one.what: one.found for one in found(home) if one.state == WRONG}


def test_what_is_well_is_said_to_be(home: Path) -> None:
    assert wrong(home) == {}
    said = {one.what: one.found for one in found(home)}
    assert "whole" in said["registry"]
    assert "holds together" in said["site site-1"]


def blob(home: Path) -> None:
    path = next((home / "coordinator" / "blobs").glob("??/*"))
    path.write_bytes(b"x")


def older(home: Path) -> None:
    import sqlite3

    with sqlite3.connect(home / "coordinator" / "registry.db") as db:
        db.execute("UPDATE alembic_version SET version_num = '0001'")


def repoint(home: Path) -> None:
    path = home / "sites" / "site-1" / "site.toml"
    lines = ["base = '/nowhere'" if line.startswith("base") else line for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))


def another_key(home: Path) -> None:
    tls = home / "coordinator" / "tls"
    (tls / "tls.key").write_bytes((tls / "site-ca.key").read_bytes())


def driver(home: Path) -> None:
    with (home / "FEDERATION.toml").open("a") as file:
        file.write('\n[storage]\nblobs = "s3://bucket/place"\n')
    (home / "coordinator" / "storage.json").write_text('{"blobs": "s3://bucket/place", "database": ""}')


def leaf(home: Path) -> None:
    import sqlite3

    with sqlite3.connect(home / "coordinator" / "registry.db") as db:
        db.execute("DROP TRIGGER kept_log_leaf_update")
        db.execute("UPDATE log_leaf SET record = x'7b7d'")


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "key": (lambda home: (home / "coordinator" / "sign.key").chmod(0o644), "others may read"),
    "blob": (blob, "blob"),
    "version": (older, "older version"),
    "settings": (lambda home: (home / "FEDERATION.toml").write_text("name = 1"), "FEDERATION.toml"),
    "ledger": (lambda home: next((home / "sites").rglob("ledger.json")).unlink(), "ledger"),
    "policy": (lambda home: (home / "sites" / "site-1" / "policy.toml").unlink(), "policy.toml"),
    "base": (repoint, "base model"),
    "token": (lambda home: (home / "coordinator" / "control.token").unlink(), "control.token is missing"),
    "card": (lambda home: (home / "coordinator" / "card.json").unlink(), "card.json"),
    "certificate": (lambda home: (home / "coordinator" / "tls" / "tls.crt").write_text("x"), "is no certificate"),
    "ca": (lambda home: (home / "coordinator" / "tls" / "ca.crt").unlink(), "ca.crt is missing"),
    "tls key": (lambda home: (home / "coordinator" / "tls" / "tls.key").write_text("x"), "cannot be read"),
    "another key": (another_key, "of another key"),
    "path": (lambda home: (home / "coordinator" / "federation.path").write_bytes(b"\xff\xfe"), "cannot be read"),
    "driver": (driver, "driver"),
    "leaf": (leaf, "leaf"),
    "no ledger": (lambda home: next((home / "sites").rglob("ledger.db")).unlink(), "its ledger is missing"),
    "no tables": (lambda home: (home / "coordinator" / "registry.db").write_bytes(b""), "no tables"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_named_with_its_mend(home: Path, name: str) -> None:
    deed, word = BREAKS[name]
    deed(home)
    bad = [one for one in found(home) if one.state == WRONG]
    assert {one.what for one in bad} in ({"coordinator"}, {"registry"}, {"site site-1"})
    assert any(word in one.found for one in bad), bad
    assert all(one.mend for one in bad)


def test_a_package_of_another_version_a_clock_and_a_full_disk_are_named(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version
    monkeypatch.setattr("cloister.doctor.metadata.version", lambda name: "0.1" if name == "numpy" else real(name))
    monkeypatch.setattr("cloister.doctor.time", SimpleNamespace(time=lambda: 1.0))
    monkeypatch.setattr("cloister.doctor.LEAST_BYTES", 1 << 60)
    said = wrong(home)
    assert set(said) == {"packages", "clock", "disk"}
    assert "numpy 0.1 instead of" in said["packages"]


def test_the_command_exits_with_one_where_something_is_wrong(home: Path) -> None:
    def run() -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "cloister.cli", "doctor", "--json", "--home", str(home)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=home)
        assert done.stderr == ""
        return done.returncode, json.loads(done.stdout)

    code, record = run()
    assert (code, record["wrong"]) == (0, 0), record
    os.chmod(home / "coordinator" / "sign.key", 0o644)
    code, record = run()
    assert (code, record["wrong"] >= 1) == (1, True)


def test_an_empty_place_is_told_as_such(tmp_path: Path) -> None:
    said = {one.what: one for one in looks(tmp_path, tmp_path / "coordinator", [])}
    assert (said["state"].state, str(tmp_path) in said["state"].found) == (NOTE, True)
    assert not [one for one in said.values() if one.state == WRONG]


def test_a_place_that_is_none_and_a_site_without_settings_are_wrong(home: Path) -> None:
    file = home / "FEDERATION.toml"
    assert [one.what for one in looks(file, file / "coordinator", []) if one.state == WRONG] == ["state"]
    (home / "sites" / "site-1" / "site.toml").unlink()
    bad = [one for one in looks(home, home / "coordinator", []) if one.state == WRONG]
    assert [(one.what, "site.toml is missing" in one.found) for one in bad] == [("site site-1", True)]


def test_a_site_whose_agent_is_nobody_elses_user_is_noted(home: Path) -> None:
    assert [one.state for one in found(home) if "NOT ISOLATED" in one.found] == [NOTE]
