"""A site's folder is made once, its names and paths are checked, and its socket's folder is its own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from cloister_client import supervise
from cloister_client.policy import read_policy
from cloister_client.site import (
    AGAIN,
    MAX_SOCKET_PATH,
    Site,
    begin_again,
    earlier_cards,
    enrol,
    held_up,
    is_up,
    make_runtime,
    read_site,
    take_over,
)
from cloister_shared.cards import CoordinatorCard, read_site_card
from cloister_shared.errors import InputError, StateError
from cloister_shared.processes import Group
from cloister_shared.sealing import OpeningKey
from cloister_shared.signing import SigningKey

from support.client_world import policy_for

CARD = CoordinatorCard(
    "testing", "127.0.0.1:9", "pem", SigningKey.generate().verify_key.raw.hex(), "cd" * 32, "00" * 32, "minilm",
    "causal-lm", (), ("c_attn",), 2,
)  # fmt: skip


def _enrol(home: Path, name: str = "site-1") -> Site:
    policy = policy_for(CARD)
    enrol(home, name, CARD, policy, base="minilm", records=7, runtime_port=9999)
    return read_site(home)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A fresh site."""
    (tmp_path / "r").mkdir()
    monkeypatch.setenv("CLOISTER_RUNTIME", str(tmp_path / "r"))
    return _enrol(tmp_path / "home")


def test_enrol_makes_private_folders_fresh_keys_and_a_signed_card(site: Site) -> None:
    for folder in (site.agent_home, site.agent_home / "kept", site.link_home, site.link_home / "tls"):
        assert folder.stat().st_mode & 0o777 == 0o700
    for secret in (site.agent_home / "sign.key", site.agent_home / "seal.key", site.link_home / "superexec.secret"):
        assert secret.stat().st_mode & 0o777 == 0o600
    card = read_site_card(site.home / "card.json")
    assert (card.name, card.records) == ("site-1", 7)
    assert card.verify_key == SigningKey.load(site.agent_home / "sign.key").verify_key
    assert card.sealing_key == OpeningKey.load(site.agent_home / "seal.key").sealing_key
    assert site.coordinator() == CARD
    assert (site.agent_user, site.link_user, site.group, site.isolated) == (-1, -1, -1, False)


def test_two_sites_share_no_key(site: Site, tmp_path: Path) -> None:
    other = _enrol(tmp_path / "other", "site-2")
    for part in ("agent/sign.key", "agent/seal.key", "agent/unit.key", "link/node.key", "link/superexec.secret"):
        assert (site.home / part).read_bytes() != (other.home / part).read_bytes()


def test_enrol_refuses_a_second_time_and_changes_nothing(site: Site) -> None:
    before = {p: p.read_bytes() for p in site.home.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="a site here already"):
        _enrol(site.home, "site-2")
    assert {p: p.read_bytes() for p in site.home.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["", "Site", "a b", "-a", "a/b", "..", "a" * 41, "ä", "a\n"])
def test_enrol_refuses_a_wrong_name_and_makes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="not a name"):
        _enrol(tmp_path / "home", name)
    assert not (tmp_path / "home").exists()


def test_text_without_a_label_and_odd_paths_are_read_back(tmp_path: Path) -> None:
    home = tmp_path / 'odd "ü\\ path'
    site = _enrol(home)
    assert site.counter == home / "counter" / "ledger.json"
    assert site.home == home


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("threads = 0", "threads = -1", "'threads'"),
        ("threads = 0", "treads = 0", "'treads'"),
        ('device = "auto"', 'device = "tpu"', "'device'"),
        ("agent_user = -1", "agent_user = -2", "'agent_user'"),
        ("agent_user = -1", "agent_usr = 3", "'agent_usr'"),
        ("runtime_port = 9999", "runtime_port = 70000", "'runtime_port'"),
        ('name = "site-1"', 'name = "../x"', "not a name"),
    ],
)
def test_wrong_settings_are_told(site: Site, old: str, new: str, told: str) -> None:
    path = site.home / "site.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError) as error:
        read_site(site.home)
    assert told in str(error.value)
    assert str(path) in str(error.value)


def test_a_folder_without_a_site_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no site here"):
        read_site(tmp_path)


def test_the_sockets_path_may_not_be_too_long(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = len(os.fsencode(site.socket)) - len(os.fsencode(tmp_path / "r"))
    fits = "/" + "x" * (MAX_SOCKET_PATH - 2 - rest)
    monkeypatch.setenv("CLOISTER_RUNTIME", fits)
    assert len(os.fsencode(site.socket)) == MAX_SOCKET_PATH - 1
    monkeypatch.setenv("CLOISTER_RUNTIME", fits + "x")
    with pytest.raises(StateError, match="too long") as error:
        _ = site.socket
    assert "CLOISTER_RUNTIME" in error.value.mend


def test_the_runtime_folder_is_the_sites_own_and_found_again(site: Site, tmp_path: Path) -> None:
    path = make_runtime(site)
    assert path == make_runtime(site) == site.runtime
    assert path.stat().st_mode & 0o777 == 0o750
    assert _enrol(tmp_path / "other").runtime != path


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o770, 0o752])
def test_a_runtime_folder_that_others_may_write_is_refused(site: Site, mode: int) -> None:
    site.runtime.mkdir()
    site.runtime.chmod(mode)
    with pytest.raises(StateError, match="not ours"):
        make_runtime(site)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to make another user's folder")
def test_a_runtime_folder_of_somebody_else_is_refused(site: Site) -> None:
    site.runtime.mkdir(mode=0o750)
    os.chown(site.runtime, 20077, 20077)
    with pytest.raises(StateError, match="not ours"):
        make_runtime(site)
    make_runtime(replace(site, agent_user=20077))


def test_a_link_or_a_file_is_no_runtime_folder(site: Site, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o750)
    site.runtime.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateError, match="not ours"):
        make_runtime(site)
    site.runtime.unlink()
    site.runtime.write_text("")
    with pytest.raises(StateError, match="not ours"):
        make_runtime(site)


def test_a_runtime_folder_that_cannot_be_made_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOISTER_RUNTIME", "/nowhere")
    with pytest.raises(StateError, match="cannot make the socket's folder"):
        make_runtime(site)


def test_one_holds_a_site_at_a_time(site: Site) -> None:
    assert not is_up(site.home)
    with held_up(site.home):
        assert is_up(site.home)
        with pytest.raises(StateError, match="up already"), held_up(site.home):
            pass
    assert not is_up(site.home)


def test_joining_again_changes_keys_and_cards_and_nothing_else(site: Site) -> None:
    before = {p.relative_to(site.home): p.read_bytes() for p in site.home.rglob("*") if p.is_file()}
    card = replace(CARD, ca="other pem", key=SigningKey.generate().verify_key.raw.hex())
    again = begin_again(site.home, card, read_policy(site.home / "policy.toml"))
    now = {p.relative_to(site.home): p.read_bytes() for p in site.home.rglob("*") if p.is_file()}
    assert {p: d for p, d in now.items() if AGAIN not in p.parts} == before
    (again / "identity.pem").write_bytes(b"pem")
    own = take_over(site.home)
    after = {p.relative_to(site.home): p.read_bytes() for p in site.home.rglob("*") if p.is_file()}
    changed = {str(p) for p in before if after[p] != before[p]}
    keys = {"agent/sign.key", "agent/seal.key", "link/node.key", "link/ca.crt", "coordinator.json", "card.json"}
    assert changed == keys
    (earlier,) = earlier_cards(site.home)
    kept = Path("earlier") / f"{earlier.verify_key.id.hex()}.json"
    assert set(after) - set(before) == {Path("identity.pem"), kept}
    assert after[kept] == before[Path("card.json")]
    assert own.verify_key == SigningKey.load(site.agent_home / "sign.key").verify_key
    assert (own.records, own.unit) == (7, "record")
    assert site.coordinator() == card


@pytest.mark.parametrize("moved", range(8))
def test_a_joining_again_that_broke_off_is_finished(site: Site, moved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    again = begin_again(site.home, CARD, read_policy(site.home / "policy.toml"))
    (again / "identity.pem").write_bytes(b"pem")
    card, real, calls = (again / "card.json").read_bytes(), os.replace, list[Path]()
    old = read_site_card(site.home / "card.json")

    def breaks(source: Path, target: Path) -> None:
        if len(calls) == moved:
            raise OSError("out of power")
        calls.append(source)
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", breaks)
        with pytest.raises((OSError, StateError), match="out of power"):
            take_over(site.home)
    assert (again / "identity.pem").exists()
    own = take_over(site.home)
    assert (site.home / "card.json").read_bytes() == card
    assert own.verify_key == SigningKey.load(site.agent_home / "sign.key").verify_key
    assert not again.exists()
    assert earlier_cards(site.home) == [old]


def test_what_ends_soon_is_started_later_each_time_and_the_owner_is_told(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "RESTART_SECONDS", 0.05)
    monkeypatch.setattr(supervise.Running, "_start", lambda running, name: _ends(running.group, name, site))
    told: list[str] = []
    with Group() as group:
        running = supervise.Running(site, group, told.append)
        _ends(group, "supernode", site)
        while len(told) < 4:
            running.check()
    waits = [running._ends["supernode"].count, len(told)]
    assert waits == [4, 4]
    assert "not the revoked again" in told[0]
    assert "(time 4)" in supervise.link_line(site.home)
    ends = supervise._Ends()
    assert [ends.next_wait() <= supervise.RESTART_SECONDS * 2**i for i in range(5)] == [True] * 5
    assert supervise.MOST_RESTART_SECONDS * 0.75 <= [ends.next_wait() for _ in range(30)][-1] <= 300
    ends.began -= supervise.SOUND_SECONDS + 1
    assert ends.next_wait() <= supervise.RESTART_SECONDS


def _ends(group: Group, name: str, site: Site) -> None:
    child = group.start(name, "this", [], site.home / "ended.log")
    child.process.wait()
    child.log.write_text("not the revoked again\n")
