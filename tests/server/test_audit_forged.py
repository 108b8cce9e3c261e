"""Coordinators and sites that sign what is not so, and honest histories that look odd: what an audit says of each."""

from __future__ import annotations

import base64
import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cloister_shared.audit.alike import merged
from cloister_shared.audit.bundle import Bundle, read_bundle, write_bundle
from cloister_shared.audit.command import audit
from cloister_shared.audit.page import as_html
from cloister_shared.audit.trust import write_trust
from cloister_shared.errors import InputError
from cloister_shared.notes import ED25519, key_hash
from cloister_shared.privacy import DpSgd, epsilon
from cloister_shared.signing import SigningKey

from support.forged import HUGE, RUN, RUN2, TERMS, Forged, ForgedSite, again, began, check, found, head_of, lines, named


def test_an_honest_history_passes() -> None:
    assert check(began(3)) == set()


def test_a_work_that_stands_in_another_sites_row_is_untold() -> None:
    made = began(2, sites=4)
    first, *others, fourth = made.sites
    plan = made.train(first, RUN, 3, HUGE)
    rows = []
    for site in others:
        made.train(site, RUN, 3)
        rows.append(made.row(site, RUN, 3))
    rows.append(made.row(fourth, RUN, 3, plan=plan, verdict="missing", update=""))
    made.commit(RUN, 3, rows)
    assert ("violation", "untold") in check(made)


def test_a_work_under_two_clients_is_seen_without_their_ledgers() -> None:
    made = began(1)
    first, other = made.sites[:2]
    rows = [made.row(first, RUN, 2), made.row(other, RUN, 2, plan=named(RUN, 2, first.id), verdict="late", update="")]
    made.commit(RUN, 2, rows)
    made.close()
    got = audit(replace(made.bundle, sites={}), made.trust())
    assert ("violation", "plan-twice") in found(got)


def test_other_terms_than_were_reserved_are_seen_whatever_the_verdict() -> None:
    for verdict, update in (("late", ""), ("outlier", None)):
        made = began(2)
        rows = []
        for site in made.sites:
            plan = made.train(site, RUN, 3, HUGE if site is made.sites[0] else TERMS)
            more: dict[str, Any] = {"verdict": verdict, "update": named("update", plan) if update is None else ""}
            rows.append(made.row(site, RUN, 3, **(more if site is made.sites[0] else {})))
        made.commit(RUN, 3, rows)
        assert {("violation", "terms"), ("violation", "published")} <= check(made)


def lost_often(made: Forged, terms: Any = TERMS) -> str:
    """A site that was charged seven times for one work."""
    site = made.sites[0]
    made.show(site)
    plan = named(RUN, 3, site.id)
    for _ in range(7):
        site.add("lose", entry=site.reserve(plan, RUN, 3, terms))
    return plan


def test_charges_that_the_log_counts_once_are_told() -> None:
    """In a commit where the site's answer came late, and in a round that was broken off."""
    late = began(2)
    lost_often(late)
    rows = [late.row(late.sites[0], RUN, 3, verdict="late", update="")]
    for site in late.sites[1:]:
        late.train(site, RUN, 3)
        rows.append(late.row(site, RUN, 3))
    late.commit(RUN, 3, rows)
    assert {("incomplete", "charged"), ("incomplete", "published")} <= check(late)
    broken = began(2)
    lost_often(broken)
    row = broken.row(broken.sites[0], RUN, 3, verdict="missing", update="")
    broken.leaf("incident", run=RUN, round=3, what="too few", clients=[row])
    assert {("incomplete", "charged"), ("incomplete", "published")} <= check(broken)


def test_a_leaf_of_a_broken_round_says_what_was_charged() -> None:
    made = began(2, sites=4)
    last = made.sites[3]
    made.train(last, RUN, 3)
    row = made.row(last, RUN, 3, verdict="missing", update="")
    bare = {name: row[name] for name in ("client", "name", "plan", "verdict")}
    made.leaf("incident", run=RUN, round=3, what="broken off", clients=[bare])
    assert ("violation", "leaf") in check(made)


def test_what_a_site_spent_under_an_earlier_key_counts() -> None:
    made = Forged()
    made.begin()
    first = made.sites[0]
    for number in (1, 2):
        rows = []
        for site in made.sites:
            made.train(site, RUN, number, noised=[["loss", 0.2]] if site is first else [])
            rows.append(made.row(site, RUN, number))
        made.commit(RUN, number, rows)
    made.rejoin(first)
    assert ("violation", "published") in check(made)


def sums(member: Callable[[Forged, ForgedSite], dict[str, Any]], keys: int = 3) -> Forged:
    """A sum of three of which the first site alone trained; what the commit says of the others is ``member``'s."""
    made = Forged()
    made.begin()
    first, *others = made.sites
    own = [site.key for site in others] if keys == 3 else [SigningKey.generate(), SigningKey.generate()]
    draw, group = made.drawn([first.key, *own])
    made.train(first, RUN, 1, secure=made.masks)
    rows = [made.row(first, RUN, 1, update="")]
    for site in others:
        made.show(site)
        rows.append(member(made, site))
    made.commit(RUN, 1, rows, [group], draw)
    return made


def test_a_sum_is_of_sites_that_took_part_under_masks() -> None:
    away: dict[str, Any] = {"verdict": "missing", "update": "", "charged": 0}
    for keys in (3, 2):
        got = check(sums(lambda made, site: made.row(site, RUN, 1, **away), keys))
        assert ("violation", "sums") in got
        assert (("incomplete", "stranger") in got) == (keys == 2)
    # By the commit alone, too; and where it names the update of one of them.
    for more in (away, {}):
        made = sums(lambda made, site, more=more: made.row(site, RUN, 1, **more))  # type: ignore[misc]
        made.close()
        assert ("violation", "sums") in found(audit(replace(made.bundle, sites={}), made.trust()))

    def bare(made: Forged, site: ForgedSite) -> dict[str, Any]:
        made.train(site, RUN, 1)
        return made.row(site, RUN, 1, verdict="outlier", update="")

    assert ("violation", "sums") in check(sums(bare))

    def masked(made: Forged, site: ForgedSite) -> dict[str, Any]:
        made.train(site, RUN, 1, secure=made.masks)
        return made.row(site, RUN, 1, update="")

    assert check(sums(masked)) == set()
    good = sums(masked)
    good.close()
    assert "in 0 rounds" in lines(good.bundle, good.trust(), "trusted")


def test_a_single_update_beside_a_sum_was_seen() -> None:
    made = Forged(tuple(ForgedSite(f"site-{i}") for i in range(1, 5)))
    made.begin()
    draw, group = made.drawn([site.key for site in made.sites[:3]])
    rows = []
    for site in made.sites:
        masked = site is not made.sites[3]
        plan = made.train(site, RUN, 1, secure=made.masks if masked else "")
        rows.append(made.row(site, RUN, 1, update="" if masked else named("update", plan)))
    made.commit(RUN, 1, rows, [group], draw)
    assert check(made) == set()
    assert "saw single noised updates in 1 round." in lines(made.bundle, made.trust(), "trusted")


def test_a_second_log_of_a_site_is_not_looked_past() -> None:
    made = began(2)
    made.close()
    first = made.sites[0]
    hidden = ForgedSite("hidden", first.key)
    hidden.spend(hidden.reserve(named("h"), RUN2, 1, HUGE), named("u"))
    head = head_of(hidden.origin, hidden.events)
    whole = made.bundle
    assert found(audit(whole, made.trust(head))) == {("incomplete", "remembered-log")}
    assert found(audit(replace(whole, heads={first.id: hidden.note}), made.trust())) == {("fork", "two-logs")}
    two = merged([whole, Bundle(1.0, sites={first.id: hidden.log})], made.trust())
    assert ("fork", "two-logs") in found(audit(two, made.trust()))
    row = made.row(first, RUN, 3, head=hidden.note, charged=0, verdict="missing", update="")
    made.commit(RUN, 3, [row])
    assert ("fork", "two-logs") in check(made)


def test_a_site_that_joins_again_is_one_site() -> None:
    """With its old log under a fresh key; an auditor's bundle of before beside the new one changes nothing."""
    made = began(2)
    made.close()
    early = made.bundle
    made.rejoin(made.sites[0])
    made.begin(RUN2)
    made.round(1, RUN2)
    made.close()
    assert found(audit(made.bundle, made.trust())) == set()
    for several in ([made.bundle, early], [early, made.bundle]):
        assert found(audit(merged(several, made.trust()), made.trust())) == set()
    # What it was told to have spent before counts for what is published later.
    made.spent["site-1"].clear()
    made.round(2, RUN2)
    assert ("violation", "published") in check(made)


def test_a_site_that_begins_another_log_under_another_key_is_asked_for_both() -> None:
    made = began(2)
    made.close()
    old = made.sites[0]
    made.leaf("revoke", site=old.name)
    made.cosigned.pop(old.id)
    new = ForgedSite(old.name, origin="cloister/site/" + "ab" * 16)
    made.sites = (new, *made.sites[1:])
    made.enrol(new)
    made.begin(RUN2)
    made.round(1, RUN2)
    assert check(made) == {("incomplete", "no-site-log")}
    both = replace(made.bundle, sites={**made.bundle.sites, old.id: old.log})
    assert found(audit(both, made.trust())) == set()


def test_a_site_revoked_while_its_round_was_under_way_may_be_in_it_and_in_no_later_one() -> None:
    made = began(1)
    rows = []
    for site in made.sites:
        made.train(site, RUN, 2)
        rows.append(made.row(site, RUN, 2))
    made.leaf("revoke", site="site-1")
    made.commit(RUN, 2, rows)
    # Nobody tells it any more what became of its update.
    made.owed.pop(made.sites[0].id)
    assert check(made) == set()
    made.round(3)
    assert ("violation", "not-enrolled") in check(made)


def test_an_entry_is_held_against_the_delta_that_its_owner_stated_then() -> None:
    made = Forged()
    made.begin()
    cap_then = epsilon([DpSgd(1.0, 0.1, 20)], 1e-3) + 0.05
    assert epsilon([DpSgd(1.0, 0.1, 20)], 1e-6) > cap_then + 0.5
    for number, (delta, cap) in enumerate(((1e-3, cap_then), (1e-6, 40.0), (1e-6, cap_then)), 1):
        rows = []
        for site in made.sites:
            made.train(site, RUN, number, (1.0, 0.1, 20), delta=delta, cap=cap)
            rows.append(made.row(site, RUN, number, (1.0, 0.1, 20), delta=delta, epsilon=50.0))
        made.commit(RUN, number, rows)
        # At 1e-6 the first entry alone is above its cap; it was reserved at 1e-3.
        assert (("violation", "cap") in check(made)) == (number == 3)


def test_bundles_of_different_days_say_so() -> None:
    made = began(3)
    made.close()
    monday = made.bundle
    made.begin(RUN2)
    made.round(1, RUN2)
    made.close()
    newer = audit(replace(monday, sites=made.bundle.sites), made.trust())
    assert {f.kind for f in newer.findings.found if f.code == "witnessed"} == {"fork"}
    assert not any("another history" in f.what for f in newer.findings.found)
    assert "violation" not in {f.kind for f in newer.findings.found}
    older = audit(replace(made.bundle, sites=monday.sites), made.trust())
    assert older.findings.exit_code == 2
    assert ("incomplete", "newest-head") in found(older)


def test_a_card_that_its_site_did_not_sign_is_no_declaration() -> None:
    made = began(1)
    other = ForgedSite("site-9")
    made.trusted[other.id] = (other.name, other.key.verify_key)
    card = json.loads(made.leaves[0].record)["card"] | {"name": "site-9", "key": other.key.verify_key.raw.hex()}
    made.leaf("enrol", site="site-9", card=card | {"unit": "person, as this audit has checked", "records": 10**12})
    assert ("violation", "card") in check(made)
    assert "checked" not in lines(made.bundle, made.trust(), "Whose text")


def test_an_update_that_is_named_was_made_of_somebodys_text() -> None:
    """Whatever the commit says became of it, and that nothing was charged: its site's log is needed."""
    made = began(1, sites=4)
    rows = [made.row(site, RUN, 2) for site in made.sites[:3]]
    for site in made.sites[:3]:
        made.train(site, RUN, 2)
    fourth = made.sites[3]
    rows.append(made.row(fourth, RUN, 2, verdict="outlier", charged=0, epsilon=0.0))
    made.commit(RUN, 2, [row | {"head": site.note} for row, site in zip(rows, made.sites, strict=True)])
    made.close()
    without = replace(made.bundle, sites={i: log for i, log in made.bundle.sites.items() if i != fourth.id})
    assert {("violation", "uncharged"), ("incomplete", "no-site-log")} <= found(audit(without, made.trust()))
    assert {("violation", "uncharged"), ("violation", "unspent")} <= check(made)


def test_a_key_whose_log_nobody_knows_is_not_taken_for_another_log_of_its_name() -> None:
    made = began(2)
    made.close()
    old, new = again(made)
    rows = []
    for site in made.sites[1:]:
        made.train(site, RUN, 3)
        rows.append(made.row(site, RUN, 3))
    made.train(new, RUN, 3, HUGE)
    rows.append(made.row(new, RUN, 3, verdict="late", update="", head=""))
    made.commit(RUN, 3, rows)
    made.close()
    sites = {**made.bundle.sites, old.id: old.log}
    only_old = replace(made.bundle, sites={i: log for i, log in sites.items() if i != new.id})
    assert ("incomplete", "no-site-log") in found(audit(only_old, made.trust()))
    assert ("violation", "terms") in found(audit(replace(made.bundle, sites=sites), made.trust()))


def test_what_is_published_of_a_name_goes_on_where_it_comes_with_another_log() -> None:
    for forgets in (False, True):
        made = began(2)
        made.close()
        old, _ = again(made)
        if forgets:
            made.spent["site-1"].clear()
        made.round(3)
        made.close()
        both = replace(made.bundle, sites={**made.bundle.sites, old.id: old.log})
        assert (("violation", "published") in found(audit(both, made.trust()))) == forgets


def test_a_site_is_not_two_by_two_keys() -> None:
    made = Forged()
    made.begin()
    second = ForgedSite("site-2", origin=made.sites[1].origin)
    made.enrol(second)
    three = [made.sites[0], made.sites[1], second]
    draw, group = made.drawn([site.key for site in three])
    rows = []
    for site in three:
        made.train(site, RUN, 1, secure=made.masks)
        rows.append(made.row(site, RUN, 1, update=""))
    made.commit(RUN, 1, rows, [group], draw)
    made.close()
    got = audit(replace(made.bundle, sites={}), made.trust())
    assert {("violation", "enrolled-twice"), ("violation", "sums")} <= found(got)


def test_a_broken_round_has_its_place() -> None:
    made = began(1)
    made.leaf("revoke", site="site-1")
    made.leaf("incident", run=RUN, round=2, what="too few", clients=[])
    rows = []
    for site in made.sites:
        made.train(site, RUN, 2)
        rows.append(made.row(site, RUN, 2))
    made.commit(RUN, 2, rows)
    assert ("violation", "not-enrolled") in check(made)
    for number in (1, 3):
        made = began(1)
        made.leaf("incident", run=RUN, round=number, what="too few", clients=[])
        assert ("violation", "rounds") in check(made)
    made = began(1)
    made.leaf("incident", run=RUN, round=2, what="too few", clients=[])
    made.round(2)
    assert check(made) == set()


def test_a_log_that_is_cut_is_still_held_by_the_heads_within_it() -> None:
    made = began(1)
    rows = []
    for site in made.sites:
        if site is made.sites[0]:
            made.show(site)
        else:
            made.train(site, RUN, 2)
        rows.append(made.row(site, RUN, 2))
    made.commit(RUN, 2, rows)
    made.close()
    first = made.sites[0]
    events = list(first.events)
    first.add("incident", what="more")
    made.heads[first.id] = first.note
    first.events = events
    assert {("violation", "unspent"), ("incomplete", "newest-head")} <= found(audit(made.bundle, made.trust()))


def test_who_answered_bare_in_a_round_of_sums_was_seen() -> None:
    """By the site's own ledger, though the commit has no row of it."""
    made = Forged(tuple(ForgedSite(f"site-{i}") for i in range(1, 5)))
    made.begin()
    draw, group = made.drawn([site.key for site in made.sites[:3]])
    rows = []
    for site in made.sites[:3]:
        made.train(site, RUN, 1, secure=made.masks)
        rows.append(made.row(site, RUN, 1, update=""))
    made.train(made.sites[3], RUN, 1)
    made.commit(RUN, 1, rows, [group], draw)
    made.close()
    assert "saw single noised updates in 1 round." in lines(made.bundle, made.trust(), "trusted")


def test_odd_figures_and_names_end_no_report() -> None:
    made = began(1)
    made.commit(RUN, 2, [made.row(made.sites[0], RUN, 2, epsilon=5e-324, charged=0, verdict="missing", update="")])
    made.close()
    got = audit(made.bundle, made.trust())
    assert "<svg" in as_html([], got.findings, got.blocks, got.history, "x", {})
    made.commit(RUN, 3, [made.row(made.sites[0], RUN, 3, name="n" * 100_000)])
    assert ("violation", "leaf") in check(made)


def test_what_a_commit_states_beside_its_rows_is_held_too() -> None:
    for run, life, delta, seen in (
        (1.0, 0.0, 0.0, False),
        (0.01, 0.0, 0.0, True),
        (1.0, -0.1, 0.0, True),
        (1.0, 0.0, 1e-6, True),
    ):
        made = began(1)
        rows = []
        for site in made.sites:
            made.train(site, RUN, 2)
            rows.append(made.row(site, RUN, 2))
        stated = [
            {
                "client": r["client"],
                "unit": "record",
                "epsilon": run,
                "lifetime": r["epsilon"] + life,
                "delta": r["delta"] + delta,
            }
            for r in rows
        ]
        made.commit(RUN, 2, rows, privacy=stated)
        assert (("violation", "published") in check(made)) == seen
    made = began(1)
    made.commit(RUN, 2, [made.row(made.sites[0], RUN, 2, charged=0, verdict="missing", update="", epsilon=0.01)])
    assert ("violation", "published") in check(made)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda rows: rows, False),
        (lambda rows: [dict(rows[0], epsilon=0.0, lifetime=0.0), *rows], True),
        (lambda rows: [*rows, dict(rows[0], client="ff" * 16)], True),
        (lambda rows: [dict(row, unit="person") for row in rows], True),
        (lambda rows: rows[1:], True),
    ],
)
def test_each_client_that_was_asked_has_its_cost_stated_once_in_its_own_unit(
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], seen: bool
) -> None:
    made = began(1)
    rows = []
    for site in made.sites:
        made.train(site, RUN, 2)
        rows.append(made.row(site, RUN, 2))
    each = [{"client": r["client"], "unit": "record", "delta": r["delta"]} for r in rows]
    stated = [one | {"epsilon": 1.0, "lifetime": r["epsilon"]} for one, r in zip(each, rows, strict=True)]
    made.commit(RUN, 2, rows, privacy=change(stated))
    assert bool(check(made)) == seen


@pytest.mark.parametrize(
    ("change", "attempt", "seen"),
    [
        ({}, 1, set()),
        ({"noise_std": 0.0}, 1, {("violation", "published")}),
        ({"clients": "[]"}, 1, {("violation", "published")}),
        ({"clients": '["x"]'}, 1, {("violation", "published")}),
        ({"clients": "5"}, 1, {("violation", "leaf")}),
        ({"epsilon": 0.01}, 1, {("violation", "published")}),
        ({}, 2, set()),
    ],
)
def test_noise_of_whole_clients_is_of_the_sum_that_was_committed(
    change: dict[str, Any], attempt: int, seen: set[tuple[str, str]]
) -> None:
    made = Forged()
    made.begin()
    rows = []
    for site in made.sites:
        made.train(site, RUN, 1)
        rows.append(made.row(site, RUN, 1))
    facts: dict[str, Any] = {
        "scope": "client", "run": RUN, "number": 1, "attempt": 1, "noise_multiplier": 10.0, "clipping_norm": 0.5,
        "noise_std": 5.0, "planned": 3, "participants": 3, "clients": json.dumps([site.id for site in made.sites]),
        "delta": 1e-5, "epsilon": epsilon([DpSgd(10.0, 1.0, 1)], 1e-5),
    }  # fmt: skip
    made.leaf("spend", **facts | change)
    made.commit(RUN, 1, rows, attempt=attempt)
    assert check(made) == seen
    if not change:
        said = lines(made.bundle, made.trust(), "Epsilon and delta")
        assert "with the noise of attempt 1 at round 1 of run aaaaaaaa" in said
        assert ("no such noise in rounds 1 of run aaaaaaaa" in said) == (attempt == 2)


def test_an_entry_has_no_more_blocks_than_can_be_looked_at() -> None:
    made = began(1)
    first = made.sites[0]
    first.reserve(named("p"), RUN, 2, blocks=list(range(1, 20_001)), admitted=[0.5] * 20_000)
    assert ("violation", "event") in check(made)


def test_sums_have_no_difference_that_is_one_sites_update() -> None:
    made = Forged(tuple(ForgedSite(f"site-{i}") for i in range(1, 5)))
    made.begin()
    draw, group = made.drawn([site.key for site in made.sites])
    rows = []
    for site in made.sites:
        made.train(site, RUN, 1, secure=made.masks)
        rows.append(made.row(site, RUN, 1, update=""))
    made.commit(RUN, 1, rows, [group, group[:3]], draw)
    made.close()
    assert ("violation", "sums") in found(audit(replace(made.bundle, sites={}), made.trust()))


def test_a_site_answered_under_the_masks_of_its_drawn_group() -> None:
    def masked(made: Forged, site: ForgedSite) -> dict[str, Any]:
        made.train(site, RUN, 1, secure=named("another group"))
        return made.row(site, RUN, 1, update="")

    assert ("violation", "sums") in check(sums(masked))


def test_a_cap_is_held_against_all_logs_of_a_site() -> None:
    for cap, seen in ((0.9, True), (5.0, False)):
        made = Forged()
        made.begin()
        old = made.sites[0]
        for number in (1, 2, 3, 4):
            if number == 3:
                made.close()
                again(made)
            rows = []
            for site in made.sites:
                made.train(site, RUN, number, cap=cap if site.name == "site-1" else 100.0)
                rows.append(made.row(site, RUN, number))
            made.commit(RUN, number, rows)
        made.close()
        both = replace(made.bundle, sites={**made.bundle.sites, old.id: old.log})
        assert found(audit(both, made.trust())) == ({("incomplete", "cap")} if seen else set())


def test_a_sum_that_an_earlier_attempt_opened_stays_though_somebody_left() -> None:
    made = Forged()
    made.begin()
    draw, group = made.drawn([site.key for site in made.sites])
    rows = []
    for site in made.sites:
        made.train(site, RUN, 1, secure=made.masks)
        rows.append(made.row(site, RUN, 1, update=""))
    made.leaf("revoke", site="site-1")
    made.leaf("incident", run=RUN, round=1, what="too few", clients=[])
    made.commit(RUN, 1, rows, [group], draw)
    made.owed.pop(made.sites[0].id)
    assert check(made) == set()


def test_a_root_in_capitals_is_the_same_root() -> None:
    made = began(1)
    made.close()
    lines_of = {i: (size, root.upper(), line) for i, (size, root, line) in made.bundle.cosignatures.items()}
    assert found(audit(replace(made.bundle, cosignatures=lines_of), made.trust())) == set()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    made = began(1)
    made.close()
    made.heads = {site.id: site.note for site in made.sites}
    write_bundle(folder / "b.zip", made.bundle)
    write_trust(folder / "t.json", made.trust())
    first = made.sites[0]
    hint = base64.b64encode(key_hash(first.origin, first.key.verify_key, ED25519) + bytes(64)).decode()
    note = f"{first.origin}\n1\n{base64.b64encode(bytes(32)).decode()}\n\ud800\n\n\N{EM DASH} {first.origin} {hint}\n"
    (folder / "odd.json").write_text(json.dumps({first.id: note}))
    return folder


def verified(bundle: Path, trust: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cloister_shared.audit.command", str(bundle), "--trust", str(trust)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def packed(
    written: Path, out: Path, spoil: Callable[[dict[str, bytes]], None], how: int = zipfile.ZIP_DEFLATED
) -> Path:
    with zipfile.ZipFile(written / "b.zip") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    spoil(parts)
    with zipfile.ZipFile(out, "w", how) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return out


def test_what_anybody_can_write_is_refused_in_words(written: Path, tmp_path: Path) -> None:
    odd = (written / "odd.json").read_bytes()
    half = packed(written, tmp_path / "half", lambda parts: parts.update({"federation/heads.json": odd}))
    lzma = packed(written, tmp_path / "lzma", lambda parts: None, zipfile.ZIP_LZMA)
    name = "\x1b[2J\x1b[Hheld\r\nPASS\x1b[8m"
    escapes = packed(written, tmp_path / "escapes", lambda parts: parts.update({name: b""}))
    many = b'{"record":""}\n' * 1_000_001
    leaves = "federation/leaves.jsonl"
    lots = packed(written, tmp_path / "lots", lambda parts: parts.update({leaves: many}), zipfile.ZIP_STORED)
    blown = packed(written, tmp_path / "blown", lambda parts: parts.update({leaves: many[: 5 << 20]}))
    data = bytearray((written / "b.zip").read_bytes())
    at = data.rfind(b"PK\x01\x02")
    struct.pack_into("<H", data, at + 8, struct.unpack_from("<H", data, at + 8)[0] | 0x800)
    data[at + 46] = 0xFF
    (tmp_path / "name").write_bytes(data)
    words = (
        "another form",
        "packed otherwise",
        "other files",
        "too many records",
        "far too much",
        "cannot read",
        "another form",
    )
    nested = b'{"x":[' + b"[]," * 3_000_000 + b"[]]}"
    draws = packed(
        written, tmp_path / "draws", lambda parts: parts.update({"federation/draws.json": nested}), zipfile.ZIP_STORED
    )
    for path, word in zip((half, lzma, escapes, lots, blown, tmp_path / "name", draws), words, strict=True):
        with pytest.raises(InputError, match=word) as refused:
            read_bundle(path)
        assert str(refused.value).isprintable()
        done = verified(path, written / "t.json")
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "\x1b" not in done.stderr + done.stdout
        assert "PASS\n" not in done.stdout
    assert verified(written / "b.zip", written / "t.json").returncode == 0
