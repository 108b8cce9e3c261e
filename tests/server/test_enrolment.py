"""Joining and leaving: tokens that are good once, certificates that are asked about at every call, and a service that keeps its bounds."""

from __future__ import annotations

import asyncio
import datetime
import io
import json
import os
import secrets
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from cloister.bundle_command import fetch
from cloister_client import fetching, registry_commands
from cloister_client import registry as client
from cloister_client.fetching import Release
from cloister_client.policy import Policy
from cloister_client.site import PULLED, Site, enrol, pulled_note, read_site
from cloister_flower.frames import reply
from cloister_server import enrolment
from cloister_server.coordinator import Coordinator, admit_site, init, is_admitted, open_coordinator
from cloister_server.enrolment import caller, invite, invited, redeem, renew, revoke
from cloister_server.federation import read_federation
from cloister_server.operators import with_key
from cloister_server.rounds import run_rounds
from cloister_server.store import Commit, Store
from cloister_server.tables import RoundClient, Run
from cloister_shared import console
from cloister_shared.audit.bundle import read_bundle
from cloister_shared.audit.trust import read_trust, write_trust
from cloister_shared.cards import CoordinatorCard, SiteCard, read_site_card
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import CloisterError, InputError, RefusedError, RollbackError, StateError, VerificationError
from cloister_shared.invitation import PREFIX, Invitation
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import Checkpoint, claimed
from cloister_shared.privacy import DpSgd, epsilon
from cloister_shared.processes import free_port
from cloister_shared.signing import SigningKey
from cloister_shared.tls import certify, make_request, make_site_ca, make_tls
from cloister_shared.v1 import registry_pb2, registry_pb2_grpc
from cloister_shared.vectors import Schema, to_safetensors
from cloister_shared.witness import log_of_federation
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from support.registry import a_model, planned
from support.server_calm import calm
from support.server_world import Loopback, make_world, write_federation


def coordinator_at(home: Path, base: Path, hours: float = 24.0) -> Coordinator:
    """A coordinator with a service on free ports."""
    table = f'[registry]\naddress = "127.0.0.1:{free_port()}"\nenrolment = "127.0.0.1:{free_port()}"\ncertificate_hours = {hours}'
    settings = write_federation(home / "FEDERATION.toml", base, **{"[registry]": table})
    init(home / "coordinator", read_federation(settings), "ab" * 32, "cd" * 32)
    return open_coordinator(home / "coordinator")


def make_site(home: Path, name: str, card: CoordinatorCard) -> Site:
    """A site's folder with keys, pinned to ``card``."""
    policy = Policy((card.base,), (card.task,), card.target_modules, 8, 8.0, 1e-5, 0.3, 1, 1000, "preferred")
    enrol(home, name, card, policy, base="minilm", records=100, runtime_port=free_port())
    return read_site(home)


def joined(coordinator: Coordinator, home: Path, name: str) -> Site:
    """A site that joined by token."""
    made = invite(coordinator, name)
    card = client.look(made)
    site = make_site(home, name, card)
    client.enrol(made, card, home, name)
    return site


@given(
    st.from_regex(r"[a-z0-9][a-z0-9-]{0,39}", fullmatch=True), st.binary(min_size=32, max_size=32), st.integers(0, 200)
)
@calm(100)
def test_a_token_is_read_as_it_was_made_and_no_other_way(site: str, key: bytes, at: int) -> None:
    made = Invitation.make(site, "127.0.0.1:18002", b"ca", key)
    token = made.to_token()
    assert Invitation.from_token(f" {token}\n") == made
    assert len(made.secret) * 8 >= 128
    assert made.secret.hex() not in repr(made)
    place = len(PREFIX) + at % (len(token) - len(PREFIX))
    other = "A" if token[place] != "A" else "B"
    for bad in (token[:place] + other + token[place + 1 :], token[:place], token[len(PREFIX) :], "", "site-1"):
        with pytest.raises(InputError, match="not a token"):
            Invitation.from_token(bad)


def test_an_invitation_is_stored_hashed_bound_and_short(tmp_path: Path, tiny_bert: Path) -> None:
    coordinator = coordinator_at(tmp_path, tiny_bert)
    made = invite(coordinator, "site-1")
    stored = b"".join(p.read_bytes() + p.name.encode() for p in (coordinator.home / "invitations").iterdir())
    assert made.secret not in stored
    assert made.secret.hex().encode() not in stored
    assert made.name.encode() in stored
    assert invited(coordinator.home, made.name, time.time()) == "site-1"
    for name, now in ((made.name, time.time() + 3601), ("00" * 32, time.time()), ("../sites/x", time.time())):
        with pytest.raises(RefusedError, match="not good"):
            invited(coordinator.home, name, now)
    with pytest.raises(InputError):
        invite(coordinator, "../x")


def test_a_token_is_spent_once_and_for_its_name_alone(tmp_path: Path, tiny_bert: Path) -> None:
    coordinator = coordinator_at(tmp_path, tiny_bert)
    made = invite(coordinator, "site-1")
    other = make_site(tmp_path / "b", "site-2", coordinator.card)
    _, request = make_request("site-1")
    with pytest.raises(RefusedError, match="another site"):
        redeem(coordinator, made.name, (other.home / "card.json").read_bytes(), request, time.time())
    own = make_site(tmp_path / "a", "site-1", coordinator.card)
    card = (own.home / "card.json").read_bytes()
    for bad in (b"", b"no request", request.replace(b"M", b"N", 3)):
        with pytest.raises(VerificationError):
            redeem(coordinator, made.name, card, bad, time.time())
    with pytest.raises(CloisterError):
        redeem(coordinator, made.name, card.replace(b"site-1", b"site-3"), request, time.time())
    assert not coordinator.sites()
    # Four at once with one token, each for a key of its own: one wins.
    outcomes, requests = list[Any](), [request, *(make_request("site-1")[1] for _ in range(3))]

    def race(csr: bytes) -> None:
        try:
            redeem(coordinator, made.name, card, csr, time.time())
            outcomes.append(csr)
        except RefusedError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=race, args=(csr,)) for csr in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (won,) = [o for o in outcomes if not isinstance(o, RefusedError)]
    assert [c.name for c in coordinator.sites()] == ["site-1"]
    # The answer may be lost: the very same card and request get theirs again, and nothing else does, nor too late.
    again = redeem(coordinator, made.name, card, won, time.time())
    assert again.public_key() == x509.load_pem_x509_csr(won).public_key()
    for csr, own_card, later in (
        (make_request("site-1")[1], card, 0.0),
        (won, card + b" ", 0.0),
        (won, card, 4000.0),
    ):
        with pytest.raises(RefusedError, match="not good"):
            redeem(coordinator, made.name, own_card, csr, time.time() + later)
    with pytest.raises(InputError, match="taken"):
        invite(coordinator, "site-1")
    assert not list((coordinator.home / "invitations").glob("*.card"))


def test_a_certificate_is_asked_about_at_every_call(tmp_path: Path, tiny_bert: Path) -> None:
    coordinator = coordinator_at(tmp_path, tiny_bert, hours=2.0)
    own = make_site(tmp_path / "a", "site-1", coordinator.card)
    made = invite(coordinator, "site-1")
    _, request = make_request("anything")
    first = redeem(coordinator, made.name, (own.home / "card.json").read_bytes(), request, time.time())
    pem, home = first.public_bytes(Encoding.PEM), coordinator.home
    assert first.subject.rfc4514_string() == "CN=site-1"
    assert caller(home, pem, time.time()).card.name == "site-1"
    second = renew(coordinator, caller(home, pem, time.time()), make_request("x")[1], time.time())
    assert second.serial_number != first.serial_number
    assert caller(home, pem, time.time()).card == caller(home, second.public_bytes(Encoding.PEM), time.time()).card
    for now in (time.time() - 3600, time.time() + 2 * 3600 + 60):
        with pytest.raises(RefusedError, match="clocks"):
            caller(home, pem, now)
    # Of our own CA and name, and never given by us.
    stray = certify(home / "tls", request, "site-1", datetime.timedelta(hours=1)).public_bytes(Encoding.PEM)
    with pytest.raises(RefusedError, match="not one of the site's"):
        caller(home, stray, time.time())
    stranger = certify(home / "tls", request, "site-9", datetime.timedelta(hours=1)).public_bytes(Encoding.PEM)
    with pytest.raises(RefusedError, match="not enrolled"):
        caller(home, stranger, time.time())
    open_token = invite(coordinator, "site-2")
    revoke(home, "site-1")
    with pytest.raises(RefusedError, match="no longer"):
        caller(home, pem, time.time())
    with pytest.raises(InputError, match="no such site"):
        revoke(home, "site-1")
    # The key never comes back, not by hand and not by token; another token's site may.
    with pytest.raises(InputError, match="revoked"):
        admit_site(home, own.home / "card.json")
    again = invite(coordinator, "site-1")
    with pytest.raises(InputError, match="revoked"):
        redeem(coordinator, again.name, (own.home / "card.json").read_bytes(), request, time.time())
    assert invited(home, open_token.name, time.time()) == "site-2"
    fresh = make_site(tmp_path / "c", "site-1", coordinator.card)
    newest = invite(coordinator, "site-1")
    redeem(coordinator, newest.name, (fresh.home / "card.json").read_bytes(), request, time.time())
    assert is_admitted(home, coordinator.sites()[0])
    revoke(home, "site-1")
    assert not [p for p in (home / "invitations").glob("*.json") if json.loads(p.read_text())["site"] == "site-1"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Iterator[Coordinator]:
    """A coordinator whose services run as processes of their own."""
    home = tmp_path_factory.mktemp("service")
    coordinator = coordinator_at(home, tiny_bert)
    started = [start_service(coordinator, which) for which in ("enrolment", "registry")]
    yield coordinator
    for process in started:
        process.terminate()
        assert process.wait(timeout=20) == 0
        assert process.stdout is not None
        process.stdout.close()


def start_service(coordinator: Coordinator, which: str) -> subprocess.Popen[bytes]:
    """One of the services as a process, listening."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cloister_server.service", "--home", str(coordinator.home), "--serve", which],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"GRPC_VERBOSITY": "NONE"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == b"listening\n", line + process.stdout.read()
    return process


def registry_address(coordinator: Coordinator) -> str:
    """Where enrolled sites ask."""
    assert coordinator.federation.service is not None
    return coordinator.federation.service.address


def test_a_site_joins_renews_and_asks(served: Coordinator, tmp_path: Path) -> None:
    site = joined(served, tmp_path / "s", "alpha")
    assert (site.home / client.IDENTITY).stat().st_mode & 0o777 == 0o600
    before = client.read_identity(site.home)
    assert b"PRIVATE" not in repr(before).encode()
    assert client.rounds(site) == []
    until = client.renew(site)
    after = client.read_identity(site.home)
    assert after.key != before.key
    assert until == pytest.approx(time.time() + 24 * 3600, abs=120)
    assert client.rounds(site) == []
    assert "alpha" in [card.name for card in served.sites()]
    with pytest.raises(RefusedError, match="no such run"):
        client.rounds(site, "ab" * 16)


def test_a_renewer_renews_at_two_thirds_and_not_before(
    served: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, said = joined(served, tmp_path / "s", "kappa"), list[str]()
    renewer = client.Renewer(site, said.append)
    renewer.check()
    assert renewer._thread is None
    begins, ends = client.read_identity(site.home).span
    serial = client.read_identity(site.home).certificate
    monkeypatch.setattr(client, "RENEW_AT", (time.time() - begins) / (ends - begins) / 2)
    renewer._next = 0.0
    renewer.check()
    assert renewer._thread is not None
    renewer._thread.join(20)
    assert client.read_identity(site.home).certificate != serial
    assert "renewed" in said[0]
    # One that cannot reach the coordinator says so, and tries again later.
    lonely = replace(site.coordinator(), registry=f"127.0.0.1:{free_port()}")
    lonely.save(site.home / "coordinator.json")
    renewer._next = 0.0
    renewer.check()
    renewer._thread.join(40)
    assert "not renewed" in said[-1]


def test_a_live_channel_dies_with_its_site(served: Coordinator, tmp_path: Path) -> None:
    site = joined(served, tmp_path / "s", "beta")
    with client.registry_of(site) as stub:
        stub.Rounds(registry_pb2.RoundsRequest(), timeout=10)
        revoke(served.home, "beta")
        with pytest.raises(grpc.RpcError) as refused:
            stub.Rounds(registry_pb2.RoundsRequest(), timeout=10)
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert "no longer" in str(refused.value.details())
    with pytest.raises(RefusedError, match="no longer"):
        client.renew(site)


def test_nobody_sees_anybody_elses_rounds(served: Coordinator, tmp_path: Path) -> None:
    one, two = (joined(served, tmp_path / name, name) for name in ("gamma", "delta"))
    cards = {card.name: card for card in served.sites()}
    store = Store(served.home)
    for number, name in enumerate(("gamma", "delta"), 1):
        run = f"{number:032x}"
        store.start_run(Run(id=run, federation="fed", created=1.0, rounds=1, base="", task="{}", rule="average",
                            tensors="[]", config="{}", code=""), b"adapter", a_model())  # fmt: skip
        row = RoundClient(run=run, number=1, client=cards[name].verify_key.id.hex(), name=name, plan="p", core="{}",
                          weight=1.0, noise_multiplier=1.0, sample_rate=0.1, steps=1, delta=1e-5, epsilon=number)  # fmt: skip
        planned(store, run, 1, [row], upto="open")
    store.close()
    (own,) = client.rounds(one)
    # As if it were charged: nobody knows.
    assert (own["run"], own["epsilon"], own["state"]) == (f"{1:032x}", epsilon([DpSgd(1.0, 0.1, 1)], 1e-5), "open")
    assert [r["run"] for r in client.rounds(two)] == [f"{2:032x}"]
    for site, foreign in ((one, f"{2:032x}"), (two, f"{1:032x}")):
        with pytest.raises(RefusedError, match="no such run"):
            client.rounds(site, foreign)


def test_rounds_are_listed_and_one_is_proven(served: Coordinator, tmp_path: Path) -> None:
    site = joined(served, tmp_path / "s", "tau")
    store, run = Store(served.home), "cd" * 16
    store.start_run(Run(id=run, federation="fed", created=9e9, rounds=1, base="11" * 32, task="{}", rule="average",
                        tensors="[]", config="{}", code=""), b"adapter", a_model())  # fmt: skip
    early = store.checkpoint()
    planned(store, run, 1)
    store.commit_round(run, 1, Commit(store.blobs.put(b"made"), 1.0, 0.0, {}, {"accuracy": 0.5}))
    planned(store, run, 2, upto="open")
    listed = [(r["number"], r["state"]) for r in fetching.fetch_rounds(site, run)]
    assert listed == [(0, "committed"), (1, "committed"), (2, "open")]
    assert fetching.fetch_rounds(site)[-1]["run"] == run
    for seen in ([], [early], [early, store.checkpoint()]):
        said = fetching.fetch_round(site, run, 1, seen)
        assert (said["kind"], said["round"], said["metrics"]) == ("round_commit", 1, {"accuracy": 0.5})
    assert fetching.fetch_round(site, run, 0, [early])["kind"] == "policy"
    for other, number in ((run, 2), (run, 9), ("ee" * 16, 0)):
        with pytest.raises(RefusedError, match="no such committed round"):
            fetching.fetch_round(site, other, number, [])
    with pytest.raises(RefusedError, match="no such run"):
        fetching.fetch_rounds(site, "ee" * 16)
    for odd in (replace(early, root=bytes(32)), replace(early, size=early.size + 1)):
        with pytest.raises(RollbackError):
            fetching.fetch_round(site, run, 1, [odd])
    with pytest.raises(RefusedError, match="no such sizes"):
        fetching.fetch_round(site, run, 1, [replace(early, size=10_000)])
    # Another adapter in a leaf that is not the newest, by whoever has the database: the head was signed over the other.
    store.log("incident", {"what": "a test"})
    fetching.fetch_round(site, run, 1, [early])
    with sqlite3.connect(served.home / "registry.db") as db:
        db.execute("DROP TRIGGER kept_log_leaf_update")
        leaf = store.commit_leaf(run, 1)
        assert leaf is not None
        row = leaf.record.replace(b"0.5", b"0.9"), leaf.index
        db.execute('UPDATE log_leaf SET record = ? WHERE "index" = ?', row)
    with pytest.raises(VerificationError):
        fetching.fetch_round(site, run, 1, [early])
    with sqlite3.connect(served.home / "registry.db") as db:
        db.execute('UPDATE log_leaf SET record = ? WHERE "index" = ?', (leaf.record, leaf.index))
    store.close()


def release_of(site: Site, alias: str, *seen: Checkpoint) -> Release:
    return fetching.fetch_release(site, alias, lambda: seen)


def test_what_is_released_is_fetched_and_nothing_else_can_be_shown(served: Coordinator, tmp_path: Path) -> None:
    """A coordinator with its own key that shows an older move, another adapter, or a move that the operator did not sign."""
    site, operator = joined(served, tmp_path / "s", "phi"), SigningKey.generate()
    store, run = Store(served.home), "df" * 16
    schema = Schema((("x.lora_A.weight", (2, 3)),))
    adapters = [to_safetensors(np.full(6, n / 20, np.float32), schema, {}) for n in range(4)]
    told: dict[str, Any] = {"task": '{"labels": []}', "tensors": json.dumps(schema.as_list()), "config": '{"r": 2}'}
    store.start_run(Run(id=run, federation="fed", created=9e9, rounds=3, base="11" * 32, rule="average", code="", **told),
                    adapters[0], a_model())  # fmt: skip
    for number in (1, 2, 3):
        planned(store, run, number)
        store.commit_round(run, number, Commit(store.blobs.put(adapters[number]), 1.0, 0.0, {}, {}))
    guard, names, by = operator.verify_key.raw.hex(), [digest(one) for one in adapters], with_key(operator)
    store.set_alias("best", run, 0, names[0], 0, "first")
    got = release_of(site, "best")
    assert (got.number, got.adapter, got.guard) == (0, adapters[0], "")
    early = store.checkpoint()
    store.set_alias("best", run, 1, names[1], 1, "guarded", operator=by, guard=guard)
    store.set_alias("best", run, 3, names[3], 2, "newer", operator=by)
    now = store.checkpoint()
    for seen in ([], [early], [now], [early, now]):
        got = release_of(site, "best", *seen)
        assert (got.run, got.number, got.adapter, got.guard) == (run, 3, adapters[3], guard)
        assert got.record["alias"]["why"] == "newer"
    for odd in (replace(early, root=bytes(32)), replace(now, root=bytes(32)), replace(now, size=now.size + 1)):
        with pytest.raises(RollbackError):
            release_of(site, "best", early, odd)
    with pytest.raises(RefusedError, match="no such alias"):
        release_of(site, "worst")
    # Its own leaves, with the key that every leaf is signed with: not at a round that made this adapter, nor at none.
    unlike = (("odd", 1, names[2], "another adapter"), ("odder", 9, names[1], "no commit"))
    for alias, number, adapter, words in unlike:
        body = {"alias": alias, "run": run, "round": number, "adapter": adapter, "version": 1}
        store.log("alias_set", body | {"rollback": False, "guard": ""})
        with pytest.raises(VerificationError, match=words):
            release_of(site, alias)
    gone = {"run": run, "round": 1, "adapter": names[1]}
    store.log("tombstone", gone)
    store.log("alias_set", gone | {"alias": "back", "version": 1, "rollback": False, "guard": ""})
    with pytest.raises(VerificationError, match="given up"):
        release_of(site, "back")
    # Another task than the commit was of, and another adapter under its digest's name.
    with sqlite3.connect(served.home / "registry.db") as db:
        db.execute("DROP TRIGGER kept_run_update")
        db.execute("UPDATE run SET task = '{}' WHERE id = ?", (run,))
    with pytest.raises(VerificationError, match="task"):
        release_of(site, "best")
    with sqlite3.connect(served.home / "registry.db") as db:
        db.execute("UPDATE run SET task = ? WHERE id = ?", (told["task"], run))
    assert release_of(site, "best", now).number == 3
    # A move that the coordinator alone wrote: this alias gives nothing any more.
    body = {"log": store.origin, "alias": "best", "run": run, "round": 2, "adapter": names[2], "version": 4}
    store.log("alias_set", body | {"rollback": True, "guard": "", "operator": "", "why": ""})
    with pytest.raises(VerificationError, match="signature of the operator"):
        release_of(site, "best", now)
    store.close()


class Feigned:
    """A coordinator's registry that says whatever is put into it, with its log's own key."""

    def __init__(self, signing: SigningKey, records: list[dict[str, Any]], **parts: bytes) -> None:
        self.origin, tree = log_of_federation(signing.verify_key), Tree()
        named = [{"log": self.origin, "index": i, "at": 1.0} | record for i, record in enumerate(records)]
        self.leaves = [canonical(record) for record in named]
        for leaf in self.leaves:
            tree.append(leaf_hash(leaf))
        self.note, self.parts = Checkpoint(self.origin, len(self.leaves), tree.root()).signed(signing), parts

    def Head(self, *_: Any, **__: Any) -> Any:  # noqa: N802
        return registry_pb2.HeadReply(note=self.note, cosignatures=b"{}", heads=b"{}")

    def Log(self, asked: Any, **_: Any) -> Any:  # noqa: N802
        return Page(registry_pb2.LogLeaf(record=one) for one in self.leaves[asked.start :])

    def Run(self, *_: Any, **__: Any) -> Any:  # noqa: N802
        return registry_pb2.RunReply(**{n: self.parts[n] for n in ("task", "tensors", "config")})

    def Adapter(self, *_: Any, **__: Any) -> Any:  # noqa: N802
        return [registry_pb2.AdapterPiece(data=self.parts["adapter"])]


class Page(list[Any]):
    """A stream of leaves."""

    def cancel(self) -> None:
        """Nothing more is wanted."""


SCHEMA = Schema((("x.lora_A.weight", (2, 3)),))


@pytest.mark.parametrize(
    "name",
    [
        "good",
        "two commits",
        "later commit",
        "another log",
        "no number",
        "config",
        "not JSON",
        "deep",
        "more",
        "long",
        "index",
    ],
)
def test_whatever_a_registry_feigns_is_a_plain_refusal(
    served: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    site, run = joined(served, tmp_path / "s", f"site-{name.replace(' ', '-').lower()}"), "ab" * 16
    values = np.full(6, np.nan if name == "no number" else 0.2, np.float32)
    parts = {"task": b'{"labels":[]}', "tensors": json.dumps(SCHEMA.as_list()).encode(), "config": b"{}"}
    parts |= {"adapter": to_safetensors(values, SCHEMA, {})}
    odd = {
        "config": b'{"x": NaN}',
        "not JSON": b"x",
        "deep": b"[" * 100_000,
        "more": b'1,"other":2',
        "long": b"1" * 5000,
    }
    parts["config"] = odd.get(name, parts["config"])
    told: dict[str, Any] = {n: digest(parts[n]) for n in ("task", "tensors", "config", "adapter")}
    commit = {"kind": "round_commit", "run": run, "round": 1} | told
    move: dict[str, Any] = {"kind": "alias_set", "alias": "best", "run": run, "round": 1, "adapter": told["adapter"]}
    move |= {"version": 1, "guard": "", "rollback": False}
    records = {
        "two commits": [commit, commit | {"config": "00" * 32}, move],
        "later commit": [move, commit],
        "another log": [commit, move | {"log": "cloister/federation/other"}],
        "index": [commit, move | {"index": "x"}],
    }.get(name, [commit, move])
    feigned = Feigned(served.signing, records, **parts)

    @contextmanager
    def registry(_: Site) -> Iterator[Any]:
        yield feigned

    monkeypatch.setattr(fetching, "registry_of", registry)
    if name == "good":
        assert release_of(site, "best").number == 1
        return
    with pytest.raises(VerificationError):
        release_of(site, "best")


@pytest.fixture
def pulling(
    served: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> tuple[Site, list[Feigned], Callable[..., None]]:
    """A site, logs of 2, 3 and 4 leaves that begin with each other, and a pull from one of them."""
    name = f"puller-{len(request.node.name)}-{secrets.token_hex(2)}"
    site, run = joined(served, tmp_path / "state" / "sites" / name, name), "ab" * 16
    parts = {"task": b'{"labels":[]}', "tensors": json.dumps(SCHEMA.as_list()).encode(), "config": b"{}"}
    parts |= {"adapter": to_safetensors(np.full(6, 0.2, np.float32), SCHEMA, {})}
    told: dict[str, Any] = {n: digest(parts[n]) for n in ("task", "tensors", "config", "adapter")}
    move = {"kind": "alias_set", "alias": "best", "run": run, "round": 1, "adapter": told["adapter"], "guard": ""}
    records = [{"kind": "round_commit", "run": run, "round": 1} | told]
    records += [move | {"version": n, "rollback": n > 1} for n in (1, 2, 3)]
    shown = [Feigned(served.signing, records[:size], **parts) for size in (2, 3, 4)]

    @contextmanager
    def registry(_: Site) -> Iterator[Any]:
        yield shown[0]

    def pull(out: str, *, of: int = 0, guard: str = "") -> None:
        shown[0] = logs[of]
        given: dict[str, Any] = {"guard": guard, "out": tmp_path / out, "site": name, "home": tmp_path / "state"}
        registry_commands.pull("best", **given)

    logs = list(shown)
    monkeypatch.setattr(console.OUTPUT, "home", tmp_path / "state")
    monkeypatch.setattr(fetching, "registry_of", registry)
    return site, logs, pull


def kept(site: Site) -> int:
    """Leaves of the head that is kept."""
    head = fetching.pulled_head(site)
    return 0 if head is None else head.size


def test_a_head_that_a_pull_kept_is_read_by_the_agent_or_told_to_be_unreadable(
    pulling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, _, pull = pulling
    before = os.umask(0o077)
    try:
        pull("a")
    finally:
        os.umask(before)
    path = site.home / PULLED
    assert path.stat().st_mode & 0o777 == 0o644
    own = pulled_note(site)
    assert own is not None
    # Of the coordinator that the site had before: nothing of this one's log.
    path.write_text(own.replace(own.partition("\n")[0], log_of_federation(SigningKey.generate().verify_key)))
    assert pulled_note(site) is None
    path.write_text(own[:40])
    assert pulled_note(site) == own[:40]
    path.chmod(0o600)
    path.write_text(own)
    pull("b")
    assert path.stat().st_mode & 0o777 == 0o644
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(StateError, match="cannot be read") as refused:
        pulled_note(site)
    # Told to the coordinator, where a plan is refused for it.
    assert (refused.value.got, refused.value.where) == ("no text", str(path))
    closed = PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(Path, "read_text", lambda _: (_ for _ in ()).throw(closed))
    with pytest.raises(StateError) as refused:
        pulled_note(site)
    assert refused.value.got == "Permission denied"


def test_a_head_that_a_pull_saw_is_kept_whatever_becomes_of_the_pull(pulling: Any) -> None:
    site, _, pull = pulling
    pull("a")
    assert kept(site) == 2
    with pytest.raises(RefusedError, match="does not guard"):
        pull("b", of=1, guard=SigningKey.generate().verify_key.raw.hex())
    assert kept(site) == 3
    with pytest.raises(InputError, match="a folder already"):
        pull("a", of=2)
    assert kept(site) == 4
    for of in (0, 1):
        with pytest.raises(RollbackError, match="shrank"):
            pull("b", of=of)
    for out in ("b", "c"):
        pull(out, of=2)
    assert kept(site) == 4


@pytest.mark.parametrize("seen", ["before it kept its own", "after"])
def test_the_slower_of_two_pulls_takes_no_head_back(pulling: Any, tmp_path: Path, seen: str) -> None:
    site, logs, pull = pulling
    pull("a")
    slower, name = logs[1], "Log" if seen.startswith("before") else "Run"
    real = getattr(slower, name)

    def beside(*given: Any, **named: Any) -> Any:
        setattr(slower, name, real)
        pull("fast", of=2)
        return real(*given, **named)

    setattr(slower, name, beside)
    if name == "Log":
        with pytest.raises(StateError, match=r"saw a newer log meanwhile.*again"):
            pull("slow", of=1)
    else:
        pull("slow", of=1)
    assert kept(site) == 4
    pull("again", of=2)


@pytest.mark.parametrize(
    ("shown", "looks", "kept_then"), [("more", 2, 2), ("more", 3, 3), ("fork", 2, 2), ("fork", 3, 3)]
)
def test_what_a_plan_showed_while_a_log_was_pulled_binds_the_pull(
    pulling: Any, monkeypatch: pytest.MonkeyPatch, shown: str, looks: int, kept_then: int
) -> None:
    """A coordinator that ends a pull with a fork of what it shows the agent meanwhile: before the pull's head is kept, or just after."""
    site, logs, pull = pulling
    pull("a")
    more = claimed(logs[2].note, "test")
    calls, head = list[int](), more if shown == "more" else replace(more, size=3)

    def seen(*_: Any) -> list[Checkpoint]:
        calls.append(1)
        return [] if len(calls) < looks else [head]

    monkeypatch.setattr(fetching, "heads_known", seen)
    wanted: Any = (StateError, "a plan saw a newer log") if shown == "more" else (RollbackError, "changed")
    with pytest.raises(wanted[0], match=wanted[1]):
        pull("b", of=1)
    assert kept(site) == kept_then


@pytest.mark.parametrize("out", ["file/x", "/proc/none/x", "n" * 300])
def test_a_pull_says_where_no_folder_can_be_made(pulling: Any, tmp_path: Path, out: str) -> None:
    site, _, pull = pulling
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"no folder can be made there.*choose another --out"):
        pull(out)
    assert kept(site) == 2


def test_a_log_in_drops_is_not_waited_for(served: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that claims more than anybody holds, pages of a leaf each, and pages that each come late."""
    few = Feigned(served.signing, [{"kind": "x"}] * 300)
    calls = list[int]()

    def stub(note: str, most: int) -> Any:
        def log(asked: Any, **_: Any) -> Any:
            calls.append(asked.start)
            return Page(few.Log(asked)[:most])

        head = registry_pb2.HeadReply(note=note, cosignatures=b"{}", heads=b"{}")
        return SimpleNamespace(Head=lambda *_, **__: head, Log=log)

    with pytest.raises(VerificationError, match="too large"):
        fetching._whole_log(stub(Checkpoint(few.origin, 10**12, bytes(32)).signed(served.signing), 1))
    assert calls == []
    with pytest.raises(VerificationError, match="drops"):
        fetching._whole_log(stub(few.note, 99))
    assert calls == [0]
    assert len(fetching._whole_log(stub(few.note, 100))[0]) == 300
    monkeypatch.setattr(fetching, "_LOG_SECONDS", 0.0)
    with pytest.raises(VerificationError, match="too slowly"):
        fetching._whole_log(stub(few.note, 100))


def test_no_more_of_a_log_is_taken_than_its_head_says(served: Coordinator) -> None:
    """A page that never ends is left after the last leaf that there may be."""
    feigned, taken = Feigned(served.signing, [{"kind": "x"}] * 3), list[int]()

    class Endless(Page):
        def __iter__(self) -> Iterator[Any]:
            while True:
                taken.append(1)
                yield registry_pb2.LogLeaf(record=b"{}")

    monkeyed = type("Monkeyed", (), {"Head": feigned.Head, "Log": lambda *_, **__: Endless()})
    leaves, _ = fetching._whole_log(monkeyed())
    assert (len(leaves), len(taken)) == (3, 3)


def test_an_auditor_reads_the_log_and_nothing_else(served: Coordinator) -> None:
    made = invite(served, "audit-1", auditor=True)
    card = client.look(made)
    leaves, note, _, heads = fetching.fetch_as_auditor(made, card, [])
    store = Store(served.home)
    store.log("incident", {"what": "x"})
    at = store.checkpoint()
    assert (len(leaves), note.split("\n")[0]) == (at.size - 1, store.origin)
    assert heads == store.site_heads()
    with pytest.raises(RefusedError, match="not good"):
        fetching.fetch_as_auditor(made, card, [])
    # A history that shrank or forked since the auditor saw it.
    for odd in (replace(at, root=bytes(32)), replace(at, size=at.size + 1)):
        with pytest.raises(RollbackError):
            fetching.fetch_as_auditor(invite(served, "audit-2", auditor=True), card, [odd])
    key, request = make_request("whatever")
    again = invite(served, "audit-3", auditor=True)
    certificate = enrolment.certify_auditor(served, again.name, request, time.time()).public_bytes(Encoding.PEM)
    with client.registry_as(card, client.Identity(key, certificate)) as stub:
        stub.Head(registry_pb2.HeadRequest(), timeout=10)
        stub.List(registry_pb2.ListRequest(), timeout=10)
        refused: list[Callable[[], Any]] = [
            lambda: stub.Renew(registry_pb2.RenewRequest(csr=request), timeout=10),
            lambda: stub.Rounds(registry_pb2.RoundsRequest(), timeout=10),
            lambda: stub.Run(registry_pb2.RunRequest(run="ab" * 16), timeout=10),
            lambda: list(stub.Adapter(registry_pb2.AdapterRequest(digest="00" * 32), timeout=10)),
        ]
        for deed in refused:
            with pytest.raises(grpc.RpcError) as caught:
                deed()
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
            assert "for sites alone" in str(caught.value.details())
        # Revoked: from the next call on, over the same connection.
        enrolment.revoke_auditor(served.home, "audit-3")
        with pytest.raises(grpc.RpcError) as caught:
            stub.Head(registry_pb2.HeadRequest(), timeout=10)
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(InputError, match="no such auditor"):
        enrolment.revoke_auditor(served.home, "audit-3")
    store.close()


def test_tokens_of_auditors_and_of_sites_are_not_each_others(served: Coordinator, tmp_path: Path) -> None:
    for_site, for_auditor = invite(served, "chi"), invite(served, "chi", auditor=True)
    card = client.look(for_site)
    with pytest.raises(RefusedError, match="not good"):
        fetching.fetch_as_auditor(for_site, card, [])
    make_site(tmp_path / "chi", "chi", card)
    with pytest.raises(RefusedError, match="not good"):
        client.enrol(for_auditor, card, tmp_path / "chi", "chi")
    client.enrol(for_site, card, tmp_path / "chi", "chi")
    fetching.fetch_as_auditor(for_auditor, card, [])
    # Of one name, and apart: to revoke the one leaves the other.
    revoke(served.home, "chi")
    enrolment.revoke_auditor(served.home, "chi")


def test_an_auditor_fetches_and_remembers(served: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time trust is made from the token alone; later the log must begin with what was seen."""
    trust, number = tmp_path / "trust.json", iter(range(9))

    def fetched(into: Path = trust) -> int:
        token = invite(served, "audit-9", auditor=True).to_token()
        monkeypatch.setattr("sys.stdin", io.StringIO(token + "\n"))
        fetch(tmp_path / f"{next(number)}.zip", into)
        return read_trust(into).remembered[log_of_federation(served.signing.verify_key)].size

    first, store = fetched(), Store(served.home)
    store.log("incident", {"what": "x"})
    assert fetched() == first + 1
    assert (read_trust(trust).federation, read_trust(trust).sites) == (served.signing.verify_key, {})
    bundle = read_bundle(tmp_path / "1.zip")
    assert [leaf.record for leaf in bundle.leaves] == [leaf.record for leaf in store.leaves()]
    assert bundle.note == store.signed_checkpoint(store.checkpoint())
    known = read_trust(trust)
    forked = replace(known, remembered={store.origin: replace(store.checkpoint(), root=bytes(32))})
    write_trust(tmp_path / "forked.json", forked)
    write_trust(tmp_path / "other.json", replace(known, federation=SigningKey.generate().verify_key))
    for name, error in (("forked", RollbackError), ("other", VerificationError)):
        before = (tmp_path / f"{name}.json").read_bytes()
        with pytest.raises(error):
            fetched(tmp_path / f"{name}.json")
        assert (tmp_path / f"{name}.json").read_bytes() == before
    assert not (tmp_path / "2.zip").exists()
    store.close()


def test_leaves_that_the_head_is_not_of_are_seen(tmp_path: Path) -> None:
    records = [bytes([n]) for n in range(5)]
    tree = Tree()
    for record in records:
        tree.append(leaf_hash(record))
    head = Checkpoint("x", 5, tree.root())
    fetching._check_whole(records, head, [Checkpoint("x", 3, tree.root(3))], "log")
    for other in (records[:4], [*records[:4], b"x"], records[::-1]):
        with pytest.raises(VerificationError):
            fetching._check_whole(other, head, [], "log")


def test_a_token_works_once_over_the_wire(served: Coordinator, tmp_path: Path) -> None:
    made = invite(served, "epsilon")
    card = client.look(made)
    make_site(tmp_path / "a", "epsilon", card)
    make_site(tmp_path / "b", "zeta", card)
    with pytest.raises(RefusedError, match="another site"):
        client.enrol(made, card, tmp_path / "b", "zeta")
    client.enrol(made, card, tmp_path / "a", "epsilon")
    for deed in (lambda: client.look(made), lambda: client.enrol(made, card, tmp_path / "a", "epsilon")):
        with pytest.raises(RefusedError, match="not good"):
            deed()
    old = invite(served, "eta", seconds=-1)
    with pytest.raises(RefusedError, match="not good"):
        client.look(old)
    guessed = replace(made, secret=os.urandom(32))
    with pytest.raises(RefusedError, match="not good"):
        client.look(guessed)


def test_a_coordinator_that_is_another_is_not_spoken_to(served: Coordinator, tmp_path: Path) -> None:
    made = invite(served, "theta")
    with pytest.raises(VerificationError, match="another CA"):
        client.look(replace(made, ca="00" * 32))
    with pytest.raises(VerificationError, match="not the one that the token names"):
        client.look(replace(made, key="00" * 32))
    with pytest.raises(StateError, match="does not answer"):
        client.look(replace(made, address=f"127.0.0.1:{free_port()}"))
    # Somebody in between with a CA of their own shows a chain that the token does not name.
    make_tls(tmp_path, "evil", ("127.0.0.1",))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def meet() -> None:
            raw, _ = listening.accept()
            with context.wrap_socket(raw, server_side=True) as wrapped:
                assert wrapped.recv(10) == b""

        thread = threading.Thread(target=meet)
        thread.start()
        with pytest.raises(VerificationError, match="in between"):
            client.look(replace(made, address=f"127.0.0.1:{listening.getsockname()[1]}"))
        thread.join(20)


def test_only_tls_1_3_and_only_our_sites_certificates(served: Coordinator, tmp_path: Path) -> None:
    service = served.federation.service
    assert service is not None
    for address in (service.address, service.enrolment):
        host, port = address.rsplit(":", 1)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection((host, int(port))) as raw, pytest.raises((ssl.SSLError, OSError)):
            context.wrap_socket(raw)
        context.maximum_version = context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(["h2"])
        with socket.create_connection((host, int(port))) as raw, context.wrap_socket(raw) as wrapped:
            assert wrapped.version() == "TLSv1.3"
    site = joined(served, tmp_path / "s", "iota")
    make_site_ca(tmp_path, "another")
    key, request = make_request("iota")
    foreign = certify(tmp_path, request, "iota", datetime.timedelta(hours=1)).public_bytes(Encoding.PEM)
    ca = served.ca
    for credentials in (grpc.ssl_channel_credentials(ca), grpc.ssl_channel_credentials(ca, key, foreign)):
        with grpc.secure_channel(service.address, credentials) as channel:
            with pytest.raises(grpc.RpcError) as refused:
                registry_pb2_grpc.RegistryStub(channel).Rounds(registry_pb2.RoundsRequest(), timeout=5)
            assert refused.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert client.rounds(site) == []


def test_the_services_bounds(served: Coordinator, tmp_path: Path) -> None:
    site = joined(served, tmp_path / "s", "lambda")
    with client.registry_of(site) as stub:
        for timeout in (None, 3600):
            with pytest.raises(grpc.RpcError) as refused:
                stub.Rounds(registry_pb2.RoundsRequest(), timeout=timeout)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as refused:
            stub.Renew(registry_pb2.RenewRequest(csr=b"x" * (1 << 19)), timeout=10)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        # A storm from one caller leaves others served.
        other = joined(served, tmp_path / "t", "mu")
        with ThreadPoolExecutor(40) as pool, ExitStack() as stack:
            stubs = [stack.enter_context(client.registry_of(site)) for _ in range(10)]
            futures = [pool.submit(_coded, stubs[i % 10]) for i in range(200)]
            assert client.rounds(other) == []
            codes = {future.result() for future in futures}
    # Over the quota, or, over the connection's own bound on streams, refused before it is read (RST_STREAM 7).
    assert codes <= {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
    assert "OK" in codes


def _coded(stub: Any) -> str:
    try:
        stub.Rounds(registry_pb2.RoundsRequest(), timeout=30)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def test_idle_connections_and_halves_of_handshakes_keep_nobody_waiting(served: Coordinator, tmp_path: Path) -> None:
    site = joined(served, tmp_path / "s", "nu")
    host, port = registry_address(served).rsplit(":", 1)
    with ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(socket.create_connection((host, int(port))))
        assert client.rounds(site) == []


def test_a_quota_counts_by_caller_and_in_all() -> None:
    from cloister_server.service import Quota

    class Aborted(Exception):  # noqa: N818
        pass

    class Context:
        async def abort(self, code: Any, words: str) -> None:
            raise Aborted(words)

    async def story() -> None:
        quota, context = Quota(2, 3), Context()
        async with AsyncExitStack() as stack:
            for who in ("a", "a", "b"):
                await stack.enter_async_context(quota.held(who, context))
            for who in ("a", "b", "c"):
                with pytest.raises(Aborted, match="more than 2"):
                    await stack.enter_async_context(quota.held(who, context))
        assert not +quota._running
        async with quota.held("a", context), quota.held("a", context), quota.held("c", context):
            pass

    asyncio.run(story())


def test_streams_that_say_nothing_keep_nobody_waiting(served: Coordinator, tmp_path: Path) -> None:
    """Twenty streams with headers and no message, at either port; at the registry's from a site that is revoked."""
    site, made = joined(served, tmp_path / "s", "xi"), invite(served, "omicron")
    evil = joined(served, tmp_path / "m", "mallory")
    own = client.read_identity(evil.home)
    revoke(served.home, "mallory")
    assert served.federation.service is not None
    doors = (
        (served.federation.service.enrolment, grpc.ssl_channel_credentials(served.ca), "/cloister.v1.Enrolment/Look"),
        (
            served.federation.service.address,
            grpc.ssl_channel_credentials(served.ca, own.key, own.certificate),
            "/cloister.v1.Registry/Rounds",
        ),
    )
    hold = threading.Event()

    def silent() -> Iterator[bytes]:
        hold.wait()
        yield b""

    with ExitStack() as stack:
        stack.callback(hold.set)
        for address, credentials, path in doors:
            for _ in range(5):
                options = [("grpc.use_local_subchannel_pool", 1)]
                channel = stack.enter_context(grpc.secure_channel(address, credentials, options))
                grpc.channel_ready_future(channel).result(20)
                for _ in range(4):
                    channel.stream_unary(path, bytes, bytes).future(silent())
        assert client.rounds(site) == []
        assert client.look(made).federation == "fed"


def test_a_revoked_site_keeps_nothing_under_a_name_that_is_given_again(served: Coordinator, tmp_path: Path) -> None:
    """It renews as fast as it can while it is revoked, and its name is invited again."""
    for trial in range(3):
        old = joined(served, tmp_path / f"old{trial}", "hospital")
        got, end = list[bytes](), threading.Event()

        def hammer(old: Site = old, got: list[bytes] = got, end: threading.Event = end) -> None:
            with client.registry_of(old) as stub:
                while not end.is_set():
                    try:
                        asked = registry_pb2.RenewRequest(csr=make_request("x")[1])
                        got.append(stub.Renew(asked, timeout=20).certificate)
                    except grpc.RpcError:
                        return

        threads = [threading.Thread(target=hammer) for _ in range(2)]
        for thread in threads:
            thread.start()
        while len(got) < 6:
            time.sleep(0.01)
        revoke(served.home, "hospital")
        new = joined(served, tmp_path / f"new{trial}", "hospital")
        end.set()
        for thread in threads:
            thread.join(30)
        for certificate in got:
            with pytest.raises(RefusedError):
                caller(served.home, certificate, time.time())
        assert client.rounds(new) == []
        revoke(served.home, "hospital")


def test_renewals_at_once_are_all_remembered(served: Coordinator, tmp_path: Path) -> None:
    site = joined(served, tmp_path / "s", "pi")
    with ThreadPoolExecutor(3) as pool:
        certificates = list(pool.map(lambda _: _renewed(site), range(6)))
    for certificate in certificates:
        assert caller(served.home, certificate, time.time()).card.name == "pi"
    assert client.rounds(site) == []


def _renewed(site: Site) -> bytes:
    with client.registry_of(site) as stub:
        return bytes(stub.Renew(registry_pb2.RenewRequest(csr=make_request("x")[1]), timeout=20).certificate)


def test_anothers_node_or_sealing_key_is_not_taken_twice(tmp_path: Path, tiny_bert: Path) -> None:
    coordinator = coordinator_at(tmp_path, tiny_bert)
    good = make_site(tmp_path / "a", "site-1", coordinator.card)
    admit_site(coordinator.home, good.home / "card.json")
    victim, own = read_site_card(good.home / "card.json"), make_site(tmp_path / "b", "site-2", coordinator.card)
    mine, key = read_site_card(own.home / "card.json"), SigningKey.load(own.agent_home / "sign.key")
    for stolen in ({"node": "\n" + victim.node}, {"node": victim.node}, {"sealing": victim.sealing}):
        SiteCard(**(asdict(mine) | stolen)).save(tmp_path / "bad.json", key)
        with pytest.raises(InputError, match="another name"):
            admit_site(coordinator.home, tmp_path / "bad.json")
    admit_site(coordinator.home, own.home / "card.json")


def test_a_certificate_for_another_key_is_not_kept(tmp_path: Path) -> None:
    make_site_ca(tmp_path, "x")
    key, _ = make_request("x")
    other = certify(tmp_path, make_request("x")[1], "x", datetime.timedelta(hours=1)).public_bytes(Encoding.PEM)
    for bad in (other, b"", b"no certificate"):
        with pytest.raises(VerificationError, match="certificate"):
            client._keep(tmp_path, key, bad)
    assert not (tmp_path / client.IDENTITY).exists()


def test_a_site_that_is_revoked_while_a_round_runs_is_left_out_of_it_and_of_the_next(
    tmp_path: Path, tiny_bert: Path
) -> None:
    world = make_world(tmp_path, tiny_bert, sites=3)

    def put_out(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        answer = link.honest(node, frame)
        revoke(world.coordinator.home, "site-3")
        return reply(answer, message)

    world.link.behaviours = {300: put_out}
    run_rounds(world.context(), world.link)
    assert world.verdicts(1) == {"site-1": "accepted", "site-2": "accepted", "site-3": "revoked"}
    assert world.verdicts(2) == world.verdicts(3) == {"site-1": "accepted", "site-2": "accepted"}
    assert [f["site"] for kind, f in world.events if kind == "revoked"] == ["site-3"]
    sent = [world.link.sent[group] for group in ("1.1", "2.1", "3.1")]
    assert [sorted(frames) for frames in sent] == [[100, 200, 300], [100, 200], [100, 200]]


def test_without_a_service_nobody_is_invited(tmp_path: Path, tiny_bert: Path) -> None:
    settings = write_federation(tmp_path / "FEDERATION.toml", tiny_bert)
    init(tmp_path / "coordinator", read_federation(settings), "ab" * 32, "cd" * 32)
    coordinator = open_coordinator(tmp_path / "coordinator")
    with pytest.raises(InputError, match="no service to enrol at"):
        invite(coordinator, "site-1")
    # Put into the settings later it is not in the card, which everybody gets.
    settings.write_text(settings.read_text() + '\n[registry]\naddress = "127.0.0.1:1"\nenrolment = "127.0.0.1:2"\n')
    with pytest.raises(InputError, match="another address of the registry"):
        invite(open_coordinator(tmp_path / "coordinator"), "auditor", auditor=True)
    assert enrolment.TOKEN_SECONDS == 3600


@pytest.mark.parametrize("dies", ["_remember", "rename"])
def test_a_service_that_dies_while_it_spends_a_token_costs_nobody_its_keys(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    coordinator = coordinator_at(tmp_path, tiny_bert)
    made = invite(coordinator, "site-1")
    own, (_, request) = make_site(tmp_path / "a", "site-1", coordinator.card), make_request("site-1")
    card = (own.home / "card.json").read_bytes()

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(*((enrolment, "_remember") if dies == "_remember" else (os, "rename")), die)
        redeem(coordinator, made.name, card, request, time.time())
    certificate = redeem(coordinator, made.name, card, request, time.time())
    assert caller(coordinator.home, certificate.public_bytes(Encoding.PEM), time.time()).card.name == "site-1"
    # Revoked, it is admitted by that token no more.
    revoke(coordinator.home, "site-1")
    with pytest.raises(CloisterError):
        redeem(coordinator, made.name, card, request, time.time())


def test_a_key_has_one_spelling(tmp_path: Path, tiny_bert: Path) -> None:
    """A revoked key in capitals was admitted again, and one key under two names stopped every round."""
    coordinator = coordinator_at(tmp_path, tiny_bert)
    own = make_site(tmp_path / "a", "site-1", coordinator.card)
    signing = SigningKey.load(own.agent_home / "sign.key")
    card = read_site_card(own.home / "card.json")
    for field in ("key", "sealing"):
        for text in (getattr(card, field).upper(), getattr(card, field) + " ", " " + getattr(card, field)):
            replace(card, **{field: text}).save(tmp_path / "card.json", signing)
            with pytest.raises(CloisterError):
                admit_site(coordinator.home, tmp_path / "card.json")
