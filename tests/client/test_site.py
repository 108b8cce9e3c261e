"""A site's folder is made once, its names and paths are checked, and its socket's folder is its own."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from cloister_client.site import MAX_SOCKET_PATH, Site, enrol, make_runtime, read_site
from cloister_shared.cards import CoordinatorCard, read_site_card
from cloister_shared.errors import InputError, StateError
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
