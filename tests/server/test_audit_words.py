"""A second look: keys that only the log's word gives to a site, older exports, ledgers that say more, spoilt bundles, adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cloister_shared.audit import accountant, command
from cloister_shared.audit.alike import merged
from cloister_shared.audit.bundle import Bundle, SiteLog, read_bundle, write_bundle
from cloister_shared.audit.command import audit
from cloister_shared.encoding import canonical
from cloister_shared.errors import InputError
from cloister_shared.notes import Checkpoint
from cloister_shared.plan import VOID_PURPOSE
from cloister_shared.privacy import DpSgd, epsilon

from support.forged import (
    HUGE,
    RUN,
    RUN2,
    Forged,
    ForgedSite,
    again,
    began,
    by_key,
    check,
    found,
    head_of,
    lines,
    named,
)


def put_under(made: Forged, name: str) -> ForgedSite:
    """A peer's key that the coordinator enrolled under a site's name, with a card that the peer signed."""
    peer = ForgedSite(name, origin=next(site.origin for site in made.sites if site.name == name))
    made.leaf("revoke", site=name)
    made.enrol(peer)
    return peer


def test_a_key_that_the_log_alone_calls_a_sites_gives_nothing_of_it_back() -> None:
    made = began(2)
    first, *others = made.sites
    for site in made.sites:
        made.show(site)
    plan = named(RUN, 3, first.id)
    entry = first.reserve(plan, RUN, 3, HUGE)
    rows = [made.row(first, RUN, 3, HUGE, verdict="missing", update="")]
    for site in others:
        made.train(site, RUN, 3)
        rows.append(made.row(site, RUN, 3))
    made.commit(RUN, 3, rows)
    made.close()
    whole = audit(made.bundle, by_key(made))
    assert found(whole) == set()
    made.cosigned.pop(first.id)
    peer = put_under(made, "site-1")
    peer.events = list(first.events)
    said = {"event": "void", "entry": entry, "plan": plan, "left": "nothing", "at": first.at}
    peer.events.append(canonical(said | {"signature": peer.key.sign(VOID_PURPOSE, canonical(said)).hex()}))
    both = replace(made.bundle, sites={**made.bundle.sites, peer.id: peer.log})
    got = audit(both, by_key(made))
    assert ("incomplete", "void") in found(got)
    assert max(b.epsilon for b in got.blocks) == max(b.epsilon for b in whole.blocks) > 20
    # Whoever wrote the file may say that both keys are one site's.
    assert ("incomplete", "void") not in found(audit(both, made.trust()))


def test_a_key_that_the_log_alone_calls_a_sites_makes_no_fork_of_it() -> None:
    made = Forged(sites=())
    peer = ForgedSite("site-1")
    made.enrol(peer)
    made.leaf("revoke", site="site-1")
    made.sites = tuple(ForgedSite(f"site-{i}") for i in (1, 2, 3))
    for site in made.sites:
        made.enrol(site)
    made.begin()
    made.round(1)
    made.close()
    first = made.sites[0]
    made.heads[peer.id] = Checkpoint(first.origin, 2, b"\7" * 32).signed(peer.key)
    assert found(audit(made.bundle, by_key(made))) == {("incomplete", "newest-head")}
    other = ForgedSite("site-1", peer.key, first.origin)
    other.events = [*first.events[:2], b"{}"]
    beside = merged([made.bundle, Bundle(1.0, sites={peer.id: other.log})], by_key(made))
    assert {kind for kind, _ in found(audit(beside, by_key(made)))} == {"incomplete"}
    made.heads = {first.id: Checkpoint(first.origin, 2, b"\7" * 32).signed(first.key)}
    assert ("fork", "newest-head") in found(audit(made.bundle, by_key(made)))


@pytest.mark.parametrize("hidden", ["no row", "missing", "broken off"])
def test_an_older_export_of_a_site_says_nothing_of_later_rounds(hidden: str) -> None:
    made = began(2, sites=4)
    made.close()
    first, early = made.sites[0], made.sites[0].log
    seen = made.cosigned[first.id]
    made.train(first, RUN, 3, HUGE)
    rows = []
    for site in made.sites[1:]:
        made.train(site, RUN, 3)
        rows.append(made.row(site, RUN, 3))
    told = [made.row(first, RUN, 3, HUGE, verdict="missing", update="", charged=0, head="")]
    if hidden == "broken off":
        made.leaf("incident", run=RUN, round=3, what="too few", clients=told)
    else:
        made.commit(RUN, 3, [*(told if hidden == "missing" else []), *rows])
    for site in made.sites[1:]:
        made.show(site)
    older = replace(made.bundle, sites={**made.bundle.sites, first.id: early})
    older = replace(older, cosignatures={**made.cosigned, first.id: seen})
    assert ("incomplete", "stale") in found(audit(older, made.trust()))


def test_a_site_that_was_away_says_what_it_knows_by_fetching_the_log() -> None:
    made = began(2, sites=4)
    made.close()
    away = made.sites[0]
    rows = [made.row(away, RUN, 3, verdict="missing", update="", charged=0, head="")]
    for site in made.sites[1:]:
        made.train(site, RUN, 3)
        rows.append(made.row(site, RUN, 3))
    made.commit(RUN, 3, rows)
    for site in made.sites[1:]:
        made.show(site)
    assert found(audit(made.bundle, made.trust())) == {("incomplete", "stale")}
    at = made.head
    away.add("fetched", note=at.signed(made.key), log=at.origin, size=at.size, root=at.root.hex())
    assert found(audit(made.bundle, made.trust())) == set()
    # Another history that the coordinator signed is its fork, seen in a round or beside it.
    other = head_of(made.origin, [leaf.record for leaf in made.leaves[::-1]])
    away.add("fetched", note=other.signed(made.key), log=other.origin, size=other.size, root=other.root.hex())
    assert ("fork", "witnessed") in found(audit(made.bundle, made.trust()))


def test_a_last_round_that_a_site_has_no_receipt_of_is_no_later_one() -> None:
    made = began(2)
    assert {code for _, code in found(audit(made.bundle, made.trust()))} == {"no-receipt", "unwitnessed"}


def test_a_site_is_not_asked_about_rounds_that_it_was_not_enrolled_for() -> None:
    made = began(2, sites=4)
    made.close()
    last = made.sites[3]
    made.leaf("revoke", site=last.name)
    made.sites = made.sites[:3]
    made.round(3)
    made.close()
    gone = replace(made.bundle, sites={**made.bundle.sites, last.id: last.log})
    assert found(audit(gone, made.trust())) == set()


def noised_rounds(made: Forged, numbers: tuple[int, ...], run_too: bool) -> None:
    for number in numbers:
        rows, history = [], [DpSgd(2.0, 0.05, 20 * number), DpSgd(0.5, 1.0, number)]
        for site in made.sites:
            made.train(site, RUN, number, noised=[["loss", 0.5]])
            rows.append(made.row(site, RUN, number, epsilon=epsilon(history, 1e-5)))
        of_run = epsilon(history if run_too else history[:1], 1e-5)
        each = [{"client": r["client"], "unit": "record", "delta": 1e-5, "lifetime": r["epsilon"]} for r in rows]
        made.commit(RUN, number, rows, privacy=[one | {"epsilon": of_run} for one in each])


@pytest.mark.parametrize("run_too", [True, False])
def test_what_is_stated_of_a_run_is_held_against_the_sites_ledgers(run_too: bool) -> None:
    made = Forged()
    made.begin()
    noised_rounds(made, (1, 2), run_too)
    made.close()
    got = audit(made.bundle, made.trust())
    assert (("violation", "published") in found(got)) != run_too
    assert any("own ledgers" in line for line in got.findings.held) == run_too


def test_what_an_earlier_log_alone_knows_counts_in_what_is_published_later() -> None:
    made = Forged()
    made.begin()
    noised_rounds(made, (1, 2), run_too=True)
    made.close()
    old, _ = again(made)
    made.round(3)
    made.close()
    both = replace(made.bundle, sites={**made.bundle.sites, old.id: old.log})
    # Of sites 2 and 3 the one log that they have says it: too low. Of site 1 nobody can say that both logs are of one text.
    kinds = {f.where.split(",")[0]: f.kind for f in audit(both, made.trust()).findings.found if f.code == "published"}
    assert kinds == {"site site-1": "incomplete", "site site-2": "violation", "site site-3": "violation"}


def test_what_pld_cannot_work_out_is_called_wrong_by_nobody() -> None:
    made = Forged()
    made.begin()
    many = (0.06, 1.0, 20)
    for number in (1, 2, 3):
        rows = []
        for site in made.sites:
            made.train(site, RUN, number, many, cap=900.0)
            rows.append(made.row(site, RUN, number, many, epsilon=5.0))
        made.commit(RUN, number, rows)
    assert {kind for kind, code in check(made) if code in ("published", "cap")} == {"incomplete"}
    points = [point for block in audit(made.bundle, made.trust()).blocks for point in block.points]
    assert {point.pld is None for point in points if point.rdp >= 1000} == {True}
    said = lines(made.bundle, made.trust(), "Epsilon and delta")
    assert "by RDP, from above: too much for PLD" in said
    assert "by PLD" not in said
    assert "(RDP) for the rounds of that month" in said


def test_more_kinds_of_release_than_can_be_worked_out_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister_shared.audit.published.MOST_KINDS", 2)
    monkeypatch.setattr("cloister_shared.audit.budget.MOST_KINDS", 2)
    for rates in ((0.05, 0.06), (0.05, 0.06, 0.07)):
        made = Forged()
        made.begin()
        for number, rate in enumerate(rates, 1):
            made.round(number, terms=(2.0, rate, 20))
        assert check(made) == (set() if len(rates) == 2 else {("incomplete", "published"), ("incomplete", "cap")})


def test_signatures_that_one_bundle_has_spoilt_are_taken_from_another() -> None:
    made = began(2)
    made.close()
    good = made.bundle
    for leaves in (
        (replace(good.leaves[0], signature="00" * 64), *good.leaves[1:]),
        tuple(replace(leaf, signature="zz") for leaf in good.leaves),
    ):
        for order in ([good, replace(good, leaves=leaves)], [replace(good, leaves=leaves), good]):
            assert found(audit(merged(order, made.trust()), made.trust())) == set()


def test_a_signed_head_is_proof_without_its_leaves() -> None:
    made = began(2)
    made.close()
    other = Checkpoint(made.origin, 5, b"\7" * 32).signed(made.key)
    for leaves in ((), made.leaves[:2]):
        beside = merged([made.bundle, Bundle(1.0, tuple(leaves), other)], made.trust())
        assert ("fork", "two-histories") in found(audit(beside, made.trust()))


def test_something_else_under_an_earlier_key_is_left_out() -> None:
    made = began(2)
    made.close()
    first = made.sites[0]
    old = first.id
    made.rejoin(first)
    made.begin(RUN2)
    made.round(1, RUN2)
    made.close()
    junk = SiteLog((b"{}",), "x\n1\nAAAA\n\n")
    both = merged([made.bundle, Bundle(1.0, sites={old: junk})], made.trust())
    assert found(audit(both, made.trust())) == {("incomplete", "other-bundle")}
    assert ("violation", "head-signature") in found(
        audit(replace(made.bundle, sites={old: junk, made.sites[1].id: made.sites[1].log}), made.trust())
    )


def test_values_are_bounded_over_the_whole_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = began(1)
    made.close()
    write_bundle(tmp_path / "b.zip", made.bundle)
    read_bundle(tmp_path / "b.zip")
    monkeypatch.setattr("cloister_shared.audit.bundle.MAX_ALL_VALUES", 100)
    with pytest.raises(InputError, match="too many values"):
        read_bundle(tmp_path / "b.zip")


def test_too_little_memory_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def none(_: Path) -> Any:
        raise MemoryError

    monkeypatch.setattr(command, "read_bundle", none)
    monkeypatch.setattr("sys.argv", ["cloister-verify", str(tmp_path / "x.zip")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert "not enough memory" in capsys.readouterr().err


def test_an_adapter_that_was_there_before_was_not_made_of_updates() -> None:
    for accepted in (True, False):
        made = Forged()
        made.begin()
        made.begin(RUN2)
        rows, start = [], named("start", RUN)
        for site in made.sites:
            made.train(site, RUN, 1)
            rows.append(made.row(site, RUN, 1, verdict="accepted" if accepted else "held"))
        made.commit(RUN, 1, rows, adapter=start)
        assert (("violation", "parent") in check(made)) == accepted
        if not accepted:
            said = lines(made.bundle, made.trust(), "holds which text")
            assert "again: nobody's update of this round entered" in said
            assert "trained on" not in said


def test_a_round_that_nothing_entered_makes_no_other_adapter() -> None:
    made = began(1)
    rows = []
    for site in made.sites:
        made.train(site, RUN, 2)
        rows.append(made.row(site, RUN, 2, verdict="held"))
    made.commit(RUN, 2, rows)
    assert ("violation", "parent") in check(made)


def test_a_run_that_begins_with_what_was_given_up_is_a_violation() -> None:
    made = began(2)
    adapter = named("made", RUN, 1)
    made.leaf("tombstone", run=RUN, round=1, adapter=adapter, why="asked")
    made.leaf("policy", run=RUN2, adapter=adapter, base=named("base"), config=named("c"), code="x")
    assert ("violation", "release") in check(made)


def test_members_that_nobody_saw_come_and_go_are_told_so() -> None:
    made = began(1)
    made.close()
    made.leaf("revoke", site="site-3")
    assert "revoke site-3" in lines(made.bundle, made.trust(), "Who was enrolled")
    assert "; nobody else saw this leaf yet" in lines(made.bundle, made.trust(), "Who was enrolled")


def test_points_on_a_blocks_way_are_bounded_by_rdp_but_for_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    made, composed = began(60), list[object]()
    made.close()
    accountant.forget()
    real = accountant._distribution

    def counted(*of: Any) -> Any:
        composed.append(of)
        return real(*of)

    monkeypatch.setattr(accountant, "_distribution", counted)
    blocks = audit(made.bundle, made.trust()).blocks
    known = [point.pld for point in blocks[0].points if point.pld is not None]
    assert len(blocks[0].points) == 60
    assert 2 <= len(known) < 30
    assert len(set(composed)) < 60


def test_a_round_that_was_charged_again_costs_all_of_its_charges() -> None:
    made, terms = Forged(), (1.0, 0.2, 30)
    made.begin()
    draw, group = made.drawn([site.key for site in made.sites])
    for site in made.sites:
        made.show(site)
        plan = named(RUN, 1, site.id)
        for _ in range(2):
            site.add("lose", entry=site.reserve(plan, RUN, 1, terms, secure=made.masks))
        site.spend(site.reserve(plan, RUN, 1, terms, secure=made.masks), named("update", plan))
    made.commit(
        RUN, 1, [made.row(site, RUN, 1, terms, charged=3, update="") for site in made.sites], [group], draw, attempt=3
    )
    made.round(2, RUN, terms)
    made.close()
    got = audit(made.bundle, made.trust())
    block = got.blocks[0]
    assert got.findings.exit_code == 0
    assert (block.rounds, block.charges, block.steps, block.periods[0].rounds) == (2, 4, 120, 2)
    once, thrice = (epsilon([DpSgd(*terms[:2], terms[2] * n)], 1e-5) for n in (1, 3))
    assert sorted(count for _, count in block.alone) == [1, 1]
    assert sorted(e for e, _ in block.alone) == pytest.approx([once, thrice], abs=0.03)
    said = lines(made.bundle, made.trust(), "Epsilon and delta")
    assert "2 rounds, charged 4 times, 120 Gaussian steps" in said


def test_rounds_of_more_kinds_than_are_worked_out_are_bounded_by_rdp(monkeypatch: pytest.MonkeyPatch) -> None:
    made = began(1)
    for number, steps in ((2, 10), (3, 15)):
        made.round(number, RUN, (2.0, 0.05, steps))
    made.close()
    exact = dict.fromkeys(audit(made.bundle, made.trust()).blocks[0].alone)
    monkeypatch.setattr("cloister_shared.audit.budget.MOST_KINDS", 2)
    bounds = dict.fromkeys(audit(made.bundle, made.trust()).blocks[0].alone)
    assert len(exact) == len(bounds) == 3
    assert all(bound > known for (bound, _), (known, _) in zip(sorted(bounds), sorted(exact), strict=True))


def test_blocks_of_the_same_rounds_are_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Forged()
    made.begin()
    for number in (1, 2):
        rows = []
        for site in made.sites:
            made.train(site, RUN, number, blocks=[1, 2, 3] if number == 1 else [1, 2], admitted=[0.5] * (4 - number))
            rows.append(made.row(site, RUN, number))
        made.commit(RUN, number, rows)
    made.close()
    got = audit(made.bundle, made.trust())
    assert found(got) == set()
    mine = [b for b in got.blocks if b.site == "site-1"]
    assert [(b.block, b.rounds) for b in mine] == [(1, 2), (2, 2), (3, 1)]
    assert mine[0].points is mine[1].points
