"""The tampering matrix: every way to change history, against each thing that an auditor may hold, with the detection that is expected."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloister_server.rounds import run_rounds
from cloister_shared.audit.accountant import by_pld
from cloister_shared.audit.alike import merged
from cloister_shared.audit.bundle import Bundle, SignedLeaf, SiteLog, read_bundle, write_bundle
from cloister_shared.audit.command import Audit, audit, verify
from cloister_shared.audit.federation import Aborted, Asked, History, RoundCommit
from cloister_shared.audit.findings import Findings
from cloister_shared.audit.page import as_csv, as_html
from cloister_shared.audit.published import check_published
from cloister_shared.audit.report import answers, as_record
from cloister_shared.audit.trust import Trust, read_trust, trust_of, write_trust
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import InputError
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import Checkpoint
from cloister_shared.privacy import DpSgd, epsilon
from cloister_shared.receipts import Receipt
from cloister_shared.signing import SigningKey

from support.server_world import World, make_world


@dataclass
class Case:
    """A federation's run, and what an auditor may hold of it."""

    world: World
    bundle: Bundle
    trust: Trust
    log: SigningKey
    sites: dict[str, SigningKey]
    early: Checkpoint


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Case:
    """Three rounds of three sites."""
    world = make_world(tmp_path_factory.mktemp("world"), tiny_bert, sites=3, rounds=3)
    world.store.log_members(world.coordinator.sites)
    context = world.context()
    early = world.store.checkpoint()
    run_rounds(context, world.link)
    at = world.store.checkpoint()
    leaves = tuple(SignedLeaf(one.record, one.key, one.signature) for one in world.store.leaves())
    cosignatures = {i: (row.size, row.root, row.line) for i, row in world.store.witnessed().items()}
    sites, keys = dict[str, SiteLog](), dict[str, SigningKey]()
    names = {m.id: m.card.name for m in world.members}
    for node, desk in world.desks.items():
        records = desk.ledger.records()
        events = tuple(records)
        keys[world.id_of(node)] = desk.signing
        sites[world.id_of(node)] = SiteLog(events, desk.ledger.head(desk.witness.name).signed(desk.signing))
    signing = world.coordinator.signing
    trusted = {i: (names[i], key.verify_key) for i, key in keys.items()}
    trust = trust_of("fed", signing.verify_key, trusted, [early])
    note = world.store.signed_checkpoint(at)
    return Case(world, Bundle(1.0, leaves, note, cosignatures, sites), trust, signing, keys, early)


def found(got: Audit, kind: str = "") -> set[str]:
    return {f.code for f in got.findings.found if not kind or f.kind == kind}


def test_an_honest_bundle_passes(case: Case, tmp_path: Path) -> None:
    got = audit(case.bundle, case.trust)
    assert not got.findings.found
    assert got.findings.exit_code == 0
    # There and back through a file, twice the same bytes.
    write_bundle(tmp_path / "a", case.bundle)
    write_bundle(tmp_path / "b", case.bundle)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_bundle(tmp_path / "a") == case.bundle
    write_trust(tmp_path / "t", case.trust)
    assert read_trust(tmp_path / "t") == case.trust
    # The independent figure is that of the product's own accountant, to both's numerical error.
    for block in got.blocks:
        history = [DpSgd(20.0, 0.5, 6)]
        assert block.epsilon == pytest.approx(epsilon(history, 1e-5), abs=0.02)
        assert block.rdp >= block.epsilon - 1e-3


Change = Callable[[Case], Bundle]


def leaf_at(case: Case, kind: str, nth: int = 0) -> int:
    return [i for i, one in enumerate(case.bundle.leaves) if json.loads(one.record)["kind"] == kind][nth]


def rewritten(case: Case, records: list[dict[str, Any]]) -> Bundle:
    """The whole log made again from ``records`` with the log's own key, with a head to match."""
    made = []
    for index, record in enumerate(records):
        data = canonical(record | {"index": index})
        made.append(SignedLeaf(data, case.log.verify_key.id.hex(), case.log.sign("log-leaf", data).hex()))
    tree = Tree(leaf_hash(one.record) for one in made)
    note = Checkpoint(case.world.store.origin, len(made), tree.root()).signed(case.log)
    return replace(case.bundle, leaves=tuple(made), note=note)


def records_of(case: Case) -> list[dict[str, Any]]:
    return [json.loads(one.record) for one in case.bundle.leaves]


def edited(case: Case) -> list[dict[str, Any]]:
    records = records_of(case)
    records[leaf_at(case, "round_commit")]["metrics"] = {"accuracy": 0.99}
    return records


def swapped(leaves: tuple[SignedLeaf, ...]) -> tuple[SignedLeaf, ...]:
    return (*leaves[:-2], leaves[-1], leaves[-2])


BY_HAND: dict[str, Change] = {
    "edit": lambda c: replace(
        c.bundle,
        leaves=tuple(
            replace(one, record=one.record.replace(b'"round":1', b'"round":9'))
            if i == leaf_at(c, "round_commit")
            else one
            for i, one in enumerate(c.bundle.leaves)
        ),
    ),
    "delete": lambda c: replace(c.bundle, leaves=c.bundle.leaves[:-2] + c.bundle.leaves[-1:]),
    "reorder": lambda c: replace(c.bundle, leaves=swapped(c.bundle.leaves)),
    "insert": lambda c: replace(c.bundle, leaves=(*c.bundle.leaves, c.bundle.leaves[-1])),
    "missing leaf": lambda c: replace(c.bundle, leaves=c.bundle.leaves[:-1]),
}
WITH_THE_KEY: dict[str, Change] = {
    "edit": lambda c: rewritten(c, edited(c)),
    "delete": lambda c: rewritten(c, records_of(c)[:-2] + records_of(c)[-1:]),
    "reorder": lambda c: rewritten(c, [*records_of(c)[:-2], records_of(c)[-1], records_of(c)[-2]]),
    "insert": lambda c: rewritten(c, [*records_of(c)[:3], {**records_of(c)[3]}, *records_of(c)[3:]]),
    "older backup": lambda c: rewritten(c, records_of(c)[:-1]),
}


@pytest.mark.parametrize("change", BY_HAND)
def test_chain_and_signature_see_what_was_changed_without_the_key(case: Case, change: str) -> None:
    """Nobody remembers, nobody witnessed, no site's log is there: the signed head and the leaves' signatures alone."""
    bare = replace(BY_HAND[change](case), cosignatures={}, sites={})
    got = audit(bare, replace(case.trust, remembered={}))
    assert got.findings.exit_code in (1, 3)
    assert found(got) & {"head", "leaf-signature", "leaf-order", "rounds"}


def late(case: Case) -> Checkpoint:
    """The head that somebody saw last."""
    tree = Tree(leaf_hash(one.record) for one in case.bundle.leaves)
    return Checkpoint(case.world.store.origin, len(tree), tree.root())


@pytest.mark.parametrize("change", WITH_THE_KEY)
def test_a_rewrite_with_the_logs_own_key_is_seen_by_whoever_remembers(case: Case, change: str) -> None:
    bare = replace(WITH_THE_KEY[change](case), cosignatures={}, sites={})
    remembering = replace(case.trust, remembered={case.world.store.origin: late(case)})
    got = audit(bare, remembering)
    assert got.findings.exit_code == 3
    assert "remembered" in found(got, "fork")


@pytest.mark.parametrize("change", WITH_THE_KEY)
def test_a_rewrite_is_seen_by_witnesses_alone(case: Case, change: str) -> None:
    """After a witness saw the head: of all of it, since sites cosign once more at a run's end."""
    assert {size for size, _, _ in case.bundle.cosignatures.values()} == {len(case.bundle.leaves)}
    bare = replace(WITH_THE_KEY[change](case), sites={})
    got = audit(bare, replace(case.trust, remembered={}))
    assert got.findings.exit_code == 3
    assert "witness" in found(got, "fork")


@pytest.mark.parametrize("change", WITH_THE_KEY)
def test_a_rewrite_is_seen_by_receipts_and_by_what_sites_saw(case: Case, change: str) -> None:
    got = audit(replace(WITH_THE_KEY[change](case), cosignatures={}), replace(case.trust, remembered={}))
    assert got.findings.exit_code == 3
    assert found(got, "fork") & {"receipt", "witnessed"}


def test_a_rewrite_before_anybody_saw_anything_is_not_seen(case: Case) -> None:
    """With nobody's memory, no witness and no site's log, whoever has the key writes what it likes: said, not hidden."""
    bare = replace(WITH_THE_KEY["edit"](case), cosignatures={}, sites={})
    got = audit(bare, replace(case.trust, remembered={}))
    assert got.findings.exit_code == 2
    assert {"nothing-remembered", "no-witness", "no-site-log"} <= found(got, "incomplete")


def site_of(case: Case) -> str:
    return min(case.bundle.sites)


def with_events(case: Case, events: tuple[bytes, ...]) -> Bundle:
    """A site's log made again by the site itself, with a head to match."""
    client = site_of(case)
    tree = Tree(leaf_hash(e) for e in events)
    origin = case.bundle.sites[client].note.split("\n", 1)[0]
    note = Checkpoint(origin, len(events), tree.root()).signed(case.sites[client])
    return replace(case.bundle, sites={**case.bundle.sites, client: SiteLog(events, note)})


def without(case: Case, kind: str, nth: int) -> tuple[bytes, ...]:
    events = case.bundle.sites[site_of(case)].events
    places = [i for i, e in enumerate(events) if json.loads(e)["event"] == kind]
    return events[: places[nth]] + events[places[nth] + 1 :]


@pytest.mark.parametrize(
    ("kind", "nth"), [("reserve", 0), ("reserve", -1), ("spend", 0), ("spend", -1), ("receipt", 0), ("witness", 1)]
)
def test_a_site_that_takes_something_out_of_its_own_log_is_seen_by_the_federations(
    case: Case, kind: str, nth: int
) -> None:
    got = audit(with_events(case, without(case, kind, nth)), case.trust)
    assert got.findings.exit_code == 3
    assert "anchored-head" in found(got, "fork")
    if kind in ("reserve", "spend"):
        assert found(got, "violation") & {"unspent", "counter", "order"}


def test_a_site_that_understates_what_it_did_is_seen(case: Case) -> None:
    events = case.bundle.sites[site_of(case)].events
    places = [i for i, e in enumerate(events) if json.loads(e)["event"] == "reserve"]
    quiet = canonical(json.loads(events[places[1]]) | {"noise_multiplier": 40.0})
    got = audit(with_events(case, (*events[: places[1]], quiet, *events[places[1] + 1 :])), case.trust)
    assert {"terms", "anchored-head"} <= found(got)
    above = canonical(json.loads(events[places[1]]) | {"cap": 0.001})
    got = audit(with_events(case, (*events[: places[1]], above, *events[places[1] + 1 :])), case.trust)
    assert "cap" in found(got, "violation")


def test_a_forged_receipt_and_a_void_without_the_sites_word_are_seen(case: Case) -> None:
    events = case.bundle.sites[site_of(case)].events
    place = next(i for i, e in enumerate(events) if json.loads(e)["event"] == "receipt")
    forged = canonical(json.loads(events[place]) | {"adapter": "00" * 32})
    got = audit(with_events(case, (*events[:place], forged, *events[place + 1 :])), case.trust)
    assert "receipt" in found(got, "violation")
    reserve = next(json.loads(e) for e in events if json.loads(e)["event"] == "reserve")
    again = reserve | {"entry": 4, "plan": "ab" * 32}
    void = {"event": "void", "entry": 4, "plan": "ab" * 32, "left": "nothing", "at": 1.0, "signature": "00" * 64}
    got = audit(with_events(case, (*events, canonical(again), canonical(void))), case.trust)
    assert "void" in found(got, "violation")
    statement = {k: v for k, v in void.items() if k != "signature"}
    void["signature"] = case.sites[site_of(case)].sign("nothing-left", canonical(statement)).hex()
    assert audit(with_events(case, (*events, canonical(again), canonical(void))), case.trust).findings.exit_code == 0


def test_another_sites_update_in_a_commit_and_a_stranger_are_seen(case: Case) -> None:
    records = records_of(case)
    commit = records[leaf_at(case, "round_commit", 1)]
    commit["clients"][0]["update"] = "ab" * 32
    commit["clients"][1]["plan"] = "cd" * 32
    got = audit(replace(rewritten(case, records), cosignatures={}), replace(case.trust, remembered={}))
    assert {"update", "unspent"} <= found(got, "violation")
    stranger = records_of(case)
    stranger[leaf_at(case, "enrol")]["card"]["key"] = SigningKey.generate().verify_key.raw.hex()
    got = audit(rewritten(case, stranger), replace(case.trust, remembered={}))
    assert "not-enrolled" in found(got, "violation")


def test_less_epsilon_than_was_spent_is_seen(case: Case) -> None:
    records = records_of(case)
    for client in records[leaf_at(case, "round_commit", 2)]["clients"]:
        client["epsilon"] = 0.01
    got = audit(rewritten(case, records), replace(case.trust, remembered={}))
    assert "published" in found(got, "violation")


def test_a_swapped_adapter_is_seen(case: Case) -> None:
    name = records_of(case)[-1]["adapter"]
    data = case.world.store.adapter(name)
    assert audit(replace(case.bundle, adapters={name: data}), case.trust).findings.exit_code == 0
    for adapters in ({name: data[:-1] + b"\0"}, {digest(b"x"): b"x"}):
        assert "adapter" in found(audit(replace(case.bundle, adapters=adapters), case.trust), "violation")


def test_somebody_elses_key_passes_nothing(case: Case) -> None:
    other = replace(case.trust, federation=SigningKey.generate().verify_key, remembered={})
    assert audit(case.bundle, other).findings.exit_code in (1, 3)
    nobody = replace(case.trust, sites={}, names={}, remembered={})
    got = audit(case.bundle, nobody)
    assert got.findings.exit_code == 2
    assert "unknown-site" in found(got)


def test_only_a_sites_own_log_is_incomplete(case: Case) -> None:
    client = site_of(case)
    alone = Bundle(1.0, sites={client: case.bundle.sites[client]})
    got = audit(alone, case.trust)
    assert (got.findings.exit_code, found(got)) == (2, {"no-federation-log"})
    assert len(got.blocks) == 1


@pytest.mark.parametrize("suffix", [".html", ".json", ".csv"])
def test_the_command_reports_and_needs_nothing_but_the_shared_package(case: Case, tmp_path: Path, suffix: str) -> None:
    write_bundle(tmp_path / "b.zip", case.bundle)
    write_trust(tmp_path / "trust.json", case.trust)
    program = (
        "import sys, importlib.abc\n"
        "class No(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'flwr', 'sqlmodel', 'sqlalchemy', 'cloister_client', 'cloister_server'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, No())\n"
        "import socket\n"
        "def no(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = no\n"
        "from cloister_shared.audit.command import main\n"
        "main()\n"
    )
    out = tmp_path / f"report{suffix}"
    arguments = [str(tmp_path / "b.zip"), "--trust", str(tmp_path / "trust.json"), "--report", str(out)]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS" in done.stdout
    text = out.read_text()
    if suffix == ".html":
        assert "16. What does this not prove?" in text
        assert "<script" not in text
    elif suffix == ".csv":
        assert len(text.splitlines()) == 1 + 9
    else:
        assert json.loads(text)["exit_code"] == 0
    untrusted = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "b.zip")], capture_output=True, text=True, timeout=120
    )
    assert untrusted.returncode == 2
    assert "INCOMPLETE" in untrusted.stdout
    as_json = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "b.zip"), "--json"], capture_output=True, text=True, timeout=120
    )
    said = json.loads(as_json.stdout)
    assert (as_json.returncode, said["exit_code"], said["findings"][0]["code"]) == (2, 2, "no-trust")


def test_what_a_bundle_says_cannot_write_into_the_page(case: Case) -> None:
    records = records_of(case)
    records[leaf_at(case, "round_commit")]["clients"][0]["name"] = "<script>alert(1)</script>"
    bundle = rewritten(case, records)
    done = audit(bundle, case.trust)
    said = answers(bundle, case.trust, done.history, done.ledgers, done.blocks, done.findings)
    page = as_html(said, done.findings, done.blocks, done.history, "x", {"about": "<script>"})
    assert "<script" not in page
    assert as_record(said, done.findings, done.blocks)["exit_code"] == 3
    assert as_csv(done.findings, done.blocks, "f").startswith("verdict,federation,violations")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda parts: parts | {"../evil": b"x"},
        lambda parts: parts | {"bundle.json": b"{}"},
        lambda parts: parts | {"federation/leaves.jsonl": b"nonsense\n"},
        lambda parts: {k: v for k, v in parts.items() if not k.endswith("head.note")},
        lambda parts: (
            parts | {f"sites/{'a' * 32}/events.jsonl": b'{"hash":"zz"}\n', f"sites/{'a' * 32}/head.note": b""}
        ),
    ],
)
def test_what_is_no_bundle_is_told(
    case: Case, tmp_path: Path, spoil: Callable[[dict[str, bytes]], dict[str, bytes]]
) -> None:
    import zipfile

    write_bundle(tmp_path / "good", case.bundle)
    with zipfile.ZipFile(tmp_path / "good") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "bad", "w") as archive:
        for name, data in spoil(parts).items():
            archive.writestr(name, data)
    with pytest.raises(InputError):
        read_bundle(tmp_path / "bad")
    (tmp_path / "text").write_text("no zip")
    for path in (tmp_path / "text", tmp_path / "missing"):
        with pytest.raises(InputError):
            read_bundle(path)


def changed_reserve(case: Case, changes: dict[str, Any], nth: int = 1) -> Bundle:
    events = case.bundle.sites[site_of(case)].events
    places = [i for i, e in enumerate(events) if json.loads(e)["event"] == "reserve"]
    other = canonical(json.loads(events[places[nth]]) | changes)
    return with_events(case, (*events[: places[nth]], other, *events[places[nth] + 1 :]))


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": -6}, {"steps": 0.9}, {"steps": True}, {"delta": 0.999999}, {"sample_rate": 0}, {"sample_rate": 2.0},
        {"blocks": []}, {"blocks": [True]}, {"blocks": [1, 1]}, {"blocks": ["1"]}, {"blocks": [[1]]}, {"cap": 1e300},
        {"noise_multiplier": -1.0}, {"noise_multiplier": 0.001}, {"noised": [1]}, {"noised": [["loss", -1.0]]}, {"at": None},
        {"entry": 7}, {"plan": "zz"}, {"secure": "ab" * 32}, {"cap": 10**400}, {"admitted": []},
    ],
)  # fmt: skip
def test_a_reservation_that_says_odd_things_never_passes(case: Case, changes: dict[str, Any]) -> None:
    """Appended as one more, so that no commit speaks of it: its own form is all there is to go by."""
    events = case.bundle.sites[site_of(case)].events
    reserve = next(json.loads(e) for e in events if json.loads(e)["event"] == "reserve")
    odd = canonical(reserve | {"entry": 4, "plan": "ab" * 32} | changes)
    got = audit(with_events(case, (*events, odd)), case.trust)
    if changes == {"secure": "ab" * 32}:
        # Well formed, and yet the commit of that round does not say that this was asked.
        assert (got.findings.exit_code, found(got, "violation")) == (1, {"untold"})
        assert max(b.steps for b in got.blocks) == 8
    else:
        assert got.findings.exit_code == 1
    told = audit(changed_reserve(case, changes), case.trust)
    assert told.findings.exit_code == 3


def test_more_work_than_any_commit_knows_of_is_counted(case: Case) -> None:
    events = case.bundle.sites[site_of(case)].events
    reserve = next(json.loads(e) for e in events if json.loads(e)["event"] == "reserve")
    more = canonical(reserve | {"entry": 4, "plan": "ab" * 32, "noise_multiplier": 0.3})
    plain = max(b.epsilon for b in audit(case.bundle, case.trust).blocks)
    assert max(b.epsilon for b in audit(with_events(case, (*events, more)), case.trust).blocks) > 10 * plain


def commits_changed(case: Case, change: Callable[[dict[str, Any]], None], *, whole: bool = True) -> Audit:
    """The log made again by its keeper from the first day on, so that heads and memories agree; sites' logs as they are, or gone."""
    records = records_of(case)
    for record in records:
        if record["kind"] == "round_commit":
            change(record)
    bundle = rewritten(case, records)
    tree = Tree(leaf_hash(one.record) for one in bundle.leaves)
    head = Checkpoint(case.world.store.origin, len(tree), tree.root())
    lines = {i: (head.size, head.root.hex(), head.cosigned(i, key, 1)) for i, key in case.sites.items()}
    bundle = replace(bundle, cosignatures=lines, sites=bundle.sites if whole else {})
    return audit(bundle, replace(case.trust, remembered={head.origin: head}))


def _all(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        for client in record["clients"]:
            client[name] = value

    return change


@pytest.mark.parametrize("verdict", ["refused-by-peers", "accepted ", "held"])
def test_who_was_charged_must_show_its_log(case: Case, verdict: str) -> None:
    def change(record: dict[str, Any]) -> None:
        record["clients"][0]["verdict"] = verdict

    got = commits_changed(case, change, whole=False)
    assert (got.findings.exit_code, "no-site-log" in found(got)) == (2, True)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_all("update", ""), "update"),
        (_all("update", "ff" * 32), "update"),
        (_all("noise_multiplier", 1000.0), "terms"),
        (_all("delta", 0.49), "terms"),
        (_all("epsilon", 0.0), "published"),
        (_all("epsilon", -1.0), "leaf"),
        (_all("head", ""), "anchored-head"),
        (lambda r: r.update(sums=[{"clients": json.dumps([c["client"] for c in r["clients"]])}]), "sums"),
        (lambda r: r.update(start="ab" * 32), "parent"),
        (lambda r: r.update(base="ab" * 32), "base"),
        (lambda r: r.update(round=float(r["round"])), "leaf"),
        (lambda r: r.update(kind="gossip"), "leaf"),
        (lambda r: r.update(clients="nobody"), "leaf"),
        (lambda r: r["clients"].append(r["clients"][0]), "leaf"),
        (lambda r: r["clients"][0].update(name="site-9"), "name"),
        (lambda r: [c.update(plan="ab" * 32) for c in r["clients"]], "plan-twice"),
    ],
)
def test_a_keeper_that_writes_what_it_likes_from_the_first_day_is_seen_by_sites_logs(
    case: Case, change: Callable[[dict[str, Any]], None], code: str
) -> None:
    assert code in found(commits_changed(case, change), "violation")


def test_a_stranger_that_took_part_is_told(case: Case) -> None:
    def change(record: dict[str, Any]) -> None:
        record["clients"][0] |= {"client": "ab" * 16, "name": "sybil", "plan": "cd" * 32}

    got = commits_changed(case, change)
    assert "stranger" in found(got)
    assert "not-enrolled" in found(got, "violation")


def test_a_round_that_nobody_else_saw_is_incomplete(case: Case) -> None:
    got = audit(replace(case.bundle, sites={}, cosignatures={}), case.trust)
    assert "unwitnessed" in found(got, "incomplete")
    assert "unwitnessed" not in found(audit(case.bundle, case.trust))


def test_a_line_that_anybody_can_write_accuses_nobody(case: Case) -> None:
    first = site_of(case)
    size, root, line = case.bundle.cosignatures[first]
    for bad in ((size, root, "nonsense"), (size, "00" * 32, line), (-1, root, line), (1 << 70, root, line)):
        got = audit(replace(case.bundle, cosignatures={**case.bundle.cosignatures, first: bad}), case.trust)
        assert (got.findings.exit_code, found(got)) == (2, {"witness-line"})
    other = Checkpoint(case.world.store.origin, size, bytes(32))
    lie = (size, other.root.hex(), other.cosigned(first, case.sites[first], 1))
    got = audit(replace(case.bundle, cosignatures={first: lie}), case.trust)
    assert "witness" in found(got, "fork")


def test_a_heads_two_histories_are_proven_by_the_keepers_own_signature(case: Case) -> None:
    events = case.bundle.sites[site_of(case)].events
    other = Checkpoint(case.world.store.origin, 5, bytes(32))
    signed = canonical(
        {"event": "incident", "at": 1.0, "what": "x", "log": other.origin, "seen": "", "shown": other.signed(case.log)}
    )
    assert "witnessed" in found(audit(with_events(case, (*events, signed)), case.trust), "fork")
    # A bare word is a dispute, and no proof.
    bare = canonical(
        {"event": "witness", "at": 1.0, "note": "", "log": other.origin, "size": 5, "root": other.root.hex()}
    )
    got = audit(with_events(case, (*events, bare)), case.trust)
    assert (got.findings.exit_code, found(got)) == (1, {"dispute"})


def test_a_receipt_says_what_its_commit_says(case: Case) -> None:
    events = case.bundle.sites[site_of(case)].events
    place = next(i for i, e in enumerate(events) if json.loads(e)["event"] == "receipt")
    named = {k: v for k, v in json.loads(events[place]).items() if k not in ("event", "at")}
    lie = Receipt.from_dict(named | {"verdict": "refused-by-peers", "update": ""}).by(case.log)
    event = canonical({"event": "receipt", "at": 1.0} | vars(lie))
    got = audit(with_events(case, (*events[:place], event, *events[place + 1 :])), case.trust)
    assert "receipt" in found(got, "violation")


ODD: tuple[Any, ...] = (None, True, -1, 0, 1e308, 10**400, "", "x" * 50, [], [[1]], {}, {"a": None}, "\x1b[2J", "é\n")


def test_no_record_whatever_it_says_ends_an_audit(case: Case) -> None:
    rng, client = np.random.default_rng(0), site_of(case)
    for _ in range(150):
        records = records_of(case)
        record = records[int(rng.integers(len(records)))]
        at = record
        while True:
            name = str(rng.choice(sorted(at)))
            if isinstance(at[name], dict) and at[name] and rng.random() < 0.7:
                at = at[name]
            elif isinstance(at[name], list) and at[name] and isinstance(at[name][0], dict) and rng.random() < 0.7:
                at = at[name][int(rng.integers(len(at[name])))]
            else:
                break
        at[name] = ODD[int(rng.integers(len(ODD)))]
        events = list(case.bundle.sites[client].events)
        place = int(rng.integers(len(events)))
        event = json.loads(events[place])
        event[str(rng.choice(sorted(event)))] = ODD[int(rng.integers(len(ODD)))]
        events[place] = canonical(event)
        bundle = replace(with_events(case, tuple(events)), leaves=rewritten(case, records).leaves)
        done = audit(bundle, case.trust)
        said = answers(bundle, case.trust, done.history, done.ledgers, done.blocks, done.findings)
        page = as_html(said, done.findings, done.blocks, done.history, "x", {})
        assert "\x1b" not in page
        assert all("\x1b" not in f.what + f.where for f in done.findings.found)
        # What a site says in the last events of its own log, after every head that others hold, is its own word.
        same = [record | {"index": i} for i, record in enumerate(records)] == records_of(case)
        assert same or done.findings.exit_code in (1, 3)


def test_a_damaged_file_is_told_as_such(case: Case, tmp_path: Path) -> None:
    write_bundle(tmp_path / "good", case.bundle)
    data, rng = (tmp_path / "good").read_bytes(), np.random.default_rng(1)
    for _ in range(200):
        bad = bytearray(data)
        for _ in range(3):
            bad[int(rng.integers(len(bad)))] ^= int(rng.integers(1, 256))
        (tmp_path / "bad").write_bytes(bytes(bad))
        try:
            got = read_bundle(tmp_path / "bad")
        except InputError:
            continue
        assert got == case.bundle or audit(got, case.trust).findings.exit_code != 0


def test_bundles_of_several_make_one(case: Case, tmp_path: Path) -> None:
    """The coordinator has the log, each site its own: together they pass, each alone is incomplete."""
    parts = [replace(case.bundle, sites={}), *(Bundle(1.0, sites={i: log}) for i, log in case.bundle.sites.items())]
    assert [audit(part, case.trust).findings.exit_code for part in parts] == [2, 2, 2, 2]
    assert audit(merged(parts, case.trust), case.trust).findings.exit_code == 0
    assert replace(merged([*parts[::-1], case.bundle], case.trust), others=()) == case.bundle
    short = case.bundle.sites[site_of(case)]
    older = replace(parts[1], sites={site_of(case): SiteLog(short.events[:2], short.note)})
    assert replace(merged([older, *parts], case.trust), others=()) == case.bundle
    assert found(audit(merged([older, *parts], case.trust), case.trust)) == {"other-bundle"}


def test_an_edited_file_accuses_nobody_of_a_fork(case: Case) -> None:
    for change in BY_HAND.values():
        got = audit(change(case), case.trust)
        assert (got.findings.exit_code, "head" in found(got, "violation")) == (1, True)
        assert not found(got, "fork")


def test_what_an_aborted_round_charged_is_in_what_is_published_later() -> None:
    """Two attempts of a round that came to nothing, then a round that publishes what it cost by itself."""

    def published(aborted: Aborted, charged: int, steps: int) -> list[str]:
        epsilon = by_pld((((1.0, 0.1), steps),), 1e-5)
        one = Asked("aa" * 16, "a", "11" * 32, "accepted", "22" * 32, 1.0, 0.1, 6, 1e-5, epsilon, charged, "")
        commit = RoundCommit(5, "cd" * 16, 1, "33" * 32, "44" * 32, (one,), (), "", {})
        findings = Findings()
        check_published(History(commits=[commit], aborted=[aborted]), findings, {})
        return [f.code for f in findings.found]

    def lost(run: str, charged: int) -> Aborted:
        stated = by_pld((((1.0, 0.1), 6 * charged),), 1e-5)
        one = Asked("aa" * 16, "a", "11" * 32, "missing", "", 1.0, 0.1, 6, 1e-5, stated, charged, "")
        return Aborted(3, run, 1, (one,))

    other = lost("ef" * 16, 2)
    assert published(other, 1, 18) == []
    assert published(other, 1, 12) == ["published"]
    # The same round's attempts are counted once, by its commit.
    same = lost("cd" * 16, 1)
    assert published(same, 2, 12) == []
    assert published(same, 2, 6) == ["published"]
    # What was charged once is not taken back: by a later leaf of the same round, whatever it says.
    assert published(lost("cd" * 16, 3), 1, 18) == ["charged"]
    assert published(lost("cd" * 16, 3), 1, 6) == ["charged", "published"]


def hostile(case: Case, changes: dict[str, Any], *, only: str = "") -> Bundle:
    """A coordinator that wrote every commit so from the first day, and told its sites and witnesses the same."""
    records = records_of(case)
    for record in records:
        for one in record["clients"] if record["kind"] == "round_commit" else ():
            if one["client"] == (only or site_of(case)):
                one.update(changes)
    return rewritten(case, records)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"verdict": "late", "update": "", "charged": 0, "epsilon": 0.0}, "uncharged"),
        ({"verdict": "outlier", "update": "ab" * 32}, "update"),
        ({"plan": "ab" * 32, "verdict": "missing", "update": ""}, "untold"),
    ],
)
def test_what_a_site_spent_for_is_told_as_charged(case: Case, changes: dict[str, Any], code: str) -> None:
    assert code in found(audit(hostile(case, changes), case.trust), "violation")


def test_a_site_whose_update_is_said_not_to_have_entered_is_named(case: Case) -> None:
    bundle = hostile(case, {"verdict": "late", "update": ""})
    done = audit(bundle, case.trust)
    said = answers(bundle, case.trust, done.history, done.ledgers, done.blocks, done.findings)
    holds = next(a.lines for a in said if "holds which" in a.question)
    assert all("by the coordinator's word not in it: site-" in line for line in holds if not line.startswith("round 0"))


def more_entries(case: Case, **changes: Any) -> Bundle:
    """A site's log with one more entry, spent."""
    events = case.bundle.sites[site_of(case)].events
    first = next(json.loads(e) for e in events if json.loads(e)["event"] == "reserve")
    spent = {"event": "spend", "at": first["at"], "entry": 4, "update": "ab" * 32, "vector": "ab" * 32}
    more = (canonical(first | {"entry": 4, "plan": "ab" * 32} | changes), canonical(spent))
    return with_events(case, (*events, *more))


def test_work_that_no_leaf_tells_of_is_seen(case: Case) -> None:
    for changes, kind, code in (
        ({}, "violation", "untold"),
        ({"round": 4}, "incomplete", "untold"),
        ({"run": "ee" * 16}, "incomplete", "elsewhere"),
    ):
        got = audit(more_entries(case, **changes), case.trust)
        assert code in found(got, kind), changes


def test_what_is_published_is_held_against_the_sites_own_ledgers(case: Case) -> None:
    """Numbers with noise of their own stand in the ledger, and not in the commit's terms."""
    bundle = changed_reserve(case, {"noised": [["loss", 1.0]], "admitted": [10.0]}, nth=2)
    # A rewritten ledger is not the one that commits hold heads of: that is seen too.
    assert {"published"} <= found(audit(bundle, case.trust), "violation")


def test_a_report_is_not_written_over_another(case: Case, tmp_path: Path) -> None:
    write_bundle(tmp_path / "b.zip", case.bundle)
    write_trust(tmp_path / "trust.json", case.trust)
    (tmp_path / "report.html").write_text("an older one")
    with pytest.raises(InputError, match="already"):
        verify([tmp_path / "b.zip"], [tmp_path / "trust.json"], tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "an older one"
    with pytest.raises(InputError, match="one trust file"):
        verify([tmp_path / "b.zip"], [tmp_path / "trust.json"] * 2)


def test_what_no_sites_log_tells_is_not_said_to_be_well(case: Case) -> None:
    bundle = replace(case.bundle, sites={})
    done = audit(bundle, case.trust)
    said = {a.question: " ".join(a.lines) for a in answers(bundle, case.trust, done.history, {}, [], done.findings)}
    for question in (
        "Any overrun or reset?",
        "Did the sampling match the accountant?",
        "Realised participants and noise?",
    ):
        assert "cannot be said: their own logs are not here" in said[question]
        assert "none found" not in said[question]
        assert "Poisson" not in said[question]


def said_of(bundle: Bundle, case: Case) -> dict[str, str]:
    """The report's answers, by question."""
    got = audit(bundle, case.trust)
    told = answers(bundle, case.trust, got.history, got.ledgers, got.blocks, got.findings)
    return {a.question: "; ".join(a.lines) for a in told}


def test_who_cosigned_how_much_is_told_apart_from_who_saw_it(case: Case) -> None:
    said = said_of(case.bundle, case)["Is the log whole, append-only, seen by others?"]
    size = len(case.bundle.leaves)
    assert f"{size} leaves; the first {size} seen by sites, as their cosignatures or their own ledgers say" in said
    for far in {at for at, _, line in case.bundle.cosignatures.values() if line}:
        assert f"the first {far} cosigned by " in said


def test_of_a_log_that_is_not_what_was_signed_nothing_is_said_to_be_well(case: Case) -> None:
    first, *rest = case.bundle.leaves
    spoiled = replace(first, record=first.record.replace(b'"at":', b'"at":1', 1))
    bundle = replace(case.bundle, leaves=(spoiled, *rest), adapters={digest(b"x"): b"x"})
    said = said_of(bundle, case)
    assert "none found in the sites' own logs that are here" in said["Any overrun or reset?"]
    assert "cannot be said from these bundles" in said["Is the log whole, append-only, seen by others?"]
    # What it comes from is the finding, not that no round made the adapters.
    assert "adapter" not in found(audit(bundle, case.trust))


def test_two_histories_that_one_key_signed_are_a_fork_in_whatever_bundle(case: Case) -> None:
    records = records_of(case)
    records[-1]["metrics"] = {"accuracy": 1.0}
    other = replace(rewritten(case, records), sites={}, cosignatures={})
    assert audit(other, replace(case.trust, remembered={})).findings.exit_code != 0
    for order in ([case.bundle, other], [other, case.bundle]):
        assert "two-histories" in found(audit(merged(order, case.trust), case.trust), "fork")
    # A shorter one that the longer begins with is none; nor does a bundle accuse whose own head does not hold.
    store, size = case.world.store, len(case.bundle.leaves) - 1
    short = Checkpoint(store.origin, size, store.tree().root(size)).signed(case.log)
    earlier = Bundle(1.0, case.bundle.leaves[:-1], short)
    assert found(audit(merged([case.bundle, earlier], case.trust), case.trust)) == set()
    broken = replace(other, note=short)
    assert found(audit(merged([case.bundle, broken], case.trust), case.trust)) == {"other-bundle"}


def test_a_site_with_two_histories_is_a_fork_and_an_older_export_is_told(case: Case) -> None:
    site = site_of(case)
    events = changed_reserve(case, {"noise_multiplier": 30.0}).sites[site].events
    doctored = with_events(case, (*events, case.bundle.sites[site].events[-1]))
    only = Bundle(1.0, sites={site: doctored.sites[site]})
    for order in ([case.bundle, only], [only, case.bundle]):
        assert "two-histories" in found(audit(merged(order, case.trust), case.trust), "fork")
    # Its end cut off: the coordinator's newest head of it says so.
    heads = {site: case.bundle.sites[site].note}
    cut = replace(with_events(case, case.bundle.sites[site].events[:-1]), heads=heads)
    assert "newest-head" in found(audit(cut, case.trust), "incomplete")
    assert found(audit(replace(case.bundle, heads=heads), case.trust)) == set()


def test_a_coordinators_own_memory_is_nobody_elses(case: Case) -> None:
    """Its trust file remembers all of its log, and shows nothing by that."""
    bare, at = replace(case.bundle, cosignatures={}, sites={}), late(case)
    by_site = replace(case.trust, remembered={at.origin: at}, written_at="site site-1")
    by_itself = replace(by_site, written_at="coordinator")
    assert "unwitnessed" not in found(audit(bare, by_site))
    done = audit(bare, by_itself)
    assert "unwitnessed" in found(done, "incomplete")
    said = answers(bare, by_itself, done.history, done.ledgers, done.blocks, done.findings)
    assert any("the party that is audited" in line for a in said for line in a.lines)
