"""What a coordinator hides of honest sites: charges, logs that are left out, exports of before; and what it costs to look at much."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from cloister_shared.audit import accountant, budget, published, spends
from cloister_shared.audit.bundle import Bundle
from cloister_shared.audit.command import audit
from cloister_shared.audit.stated import MOST_LOW
from cloister_shared.encoding import canonical
from cloister_shared.merkle import leaf_hash
from cloister_shared.plan import VOID_PURPOSE
from cloister_shared.privacy import epsilon
from cloister_shared.receipts import NOT_ASKED, Receipt, no_work

from support.forged import (
    DELTA,
    RUN,
    TERMS,
    Forged,
    ForgedSite,
    again,
    began,
    by_key,
    card_of,
    check,
    found,
    lines,
    named,
)

# What no coordinator wants to publish.
LOUD = (0.6, 0.2, 100)


def broken_off(made: Forged, rows: list[dict[str, Any]], number: int = 2) -> None:
    """A round that came to nothing, told as the product tells it."""
    kept = [{n: v for n, v in row.items() if n not in ("head", "weight") and (n != "update" or v)} for row in rows]
    made.leaf("incident", what="too few", run=RUN, round=number, attempt=1, clients=kept)


@pytest.mark.parametrize("later", ["", "another work", "left out"])
@pytest.mark.parametrize(
    "first", [{"verdict": "missing"}, {"verdict": "accepted"}, {"verdict": "accepted", "update": ""}]
)
def test_an_update_that_is_named_or_entered_was_charged(first: dict[str, str], later: str) -> None:
    """By a leaf of a broken-off round that says otherwise, and by every leaf after it."""
    made = began(1, sites=4)
    *others, victim = made.sites
    before = epsilon(made.spent[victim.name], DELTA)
    rows = []
    for site in made.sites:
        terms = LOUD if site is victim else TERMS
        made.train(site, RUN, 2, terms)
        rows.append(made.row(site, RUN, 2, terms, verdict="missing"))
    rows[-1] |= {"charged": 0, "epsilon": before} | first
    broken_off(made, rows)
    assert ("violation", "uncharged") in check(made)
    without = replace(made.bundle, sites={i: log for i, log in made.bundle.sites.items() if i != victim.id})
    for bundle in (made.bundle, without):
        assert ("violation", "published") in found(audit(bundle, made.trust()))
    if not later:
        return
    entered = [row | {"verdict": "accepted", "head": site.note} for site, row in zip(others, rows, strict=False)]
    bogus = rows[-1] | {"verdict": "missing", "update": "", "plan": named("bogus"), "head": ""}
    made.commit(RUN, 2, entered if later == "left out" else [*entered, bogus], attempt=2)
    assert ("violation", "charged") in check(made)


def test_a_lifetime_beside_nothing_charged_is_held_too() -> None:
    made = began(2)
    rows = [made.row(site, RUN, 3, verdict="missing", update="", charged=0) for site in made.sites]
    broken_off(made, rows, 3)
    assert check(made) == set()
    broken_off(made, [row | {"epsilon": 0.0} for row in rows], 3)
    assert check(made) == set()
    broken_off(made, [row | {"epsilon": row["epsilon"] / 2} for row in rows], 3)
    assert check(made) == {("violation", "published")}


@pytest.mark.parametrize("told", ["missing", "not at all"])
def test_a_site_that_took_no_part_by_the_coordinators_word_is_missed(told: str) -> None:
    made = Forged(tuple(ForgedSite(f"site-{i}") for i in range(1, 5)))
    made.begin()
    *others, victim = made.sites
    rows = []
    for site in others:
        made.train(site, RUN, 1)
        rows.append(made.row(site, RUN, 1))
    made.train(victim, RUN, 1, LOUD)
    if told == "missing":
        rows.append(made.row(victim, RUN, 1, LOUD, verdict="missing", update="", head="", charged=0, epsilon=0.0))
    made.commit(RUN, 1, rows)
    made.close()
    whole = made.bundle
    assert found(audit(whole, made.trust())) & {("violation", "uncharged"), ("violation", "untold")}
    without = replace(whole, sites={i: log for i, log in whole.sites.items() if i != victim.id})
    got = audit(without, made.trust())
    assert found(got) == {("incomplete", "no-site-log")}
    assert "Of site-4 this cannot be said" in lines(without, made.trust(), "overrun")
    made.trusted.pop(victim.id)
    assert found(audit(without, made.trust())) == {("incomplete", "stranger")}


def test_who_came_after_the_last_round_is_not_missed() -> None:
    made = began(2)
    made.close()
    made.enrol(ForgedSite("site-9"))
    assert found(audit(made.bundle, made.trust())) == set()


@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("end", ["lose", "void"])
def test_an_export_between_two_attempts_says_nothing_of_the_second(end: str, leaf: bool) -> None:
    made = began(1)
    first, victim, third = made.sites
    plan = named(RUN, 2, victim.id)
    made.show(victim)
    entry = victim.reserve(plan, RUN, 2)
    if end == "lose":
        victim.add("lose", entry=entry)
    else:
        said = {"event": "void", "entry": entry, "plan": plan, "left": "nothing", "at": victim.at}
        victim.events.append(canonical(said | {"signature": victim.key.sign(VOID_PURPOSE, canonical(said)).hex()}))
    for site in (first, third):
        made.train(site, RUN, 2)
    rows = [made.row(site, RUN, 2, verdict="missing", update="", head="") for site in made.sites]
    if leaf:
        broken_off(made, rows)
    made.show(victim)
    early = victim.log
    made.show(victim)
    victim.spend(victim.reserve(plan, RUN, 2, noised=[["loss", 0.05]]), named("update", plan))
    entered = {"verdict": "accepted"}
    after = [
        row | (entered | {"update": named("update", row["plan"]), "head": site.note} if site is not victim else {})
        for site, row in zip(made.sites, rows, strict=True)
    ]
    made.commit(RUN, 2, after, attempt=2)
    made.show(first)
    made.show(third)
    old = replace(made.bundle, sites={**made.bundle.sites, victim.id: early})
    assert ("incomplete", "stale") in found(audit(old, made.trust()))
    made.show(victim)
    assert ("violation", "published") in found(audit(made.bundle, made.trust()))


def test_a_site_that_was_put_out_before_its_round_was_told_may_have_worked_on_it() -> None:
    made = began(1, sites=4)
    victim, *others = made.sites
    made.show(victim)
    early = victim.log
    for site in made.sites:
        made.train(site, RUN, 2, LOUD if site is victim else TERMS)
    made.leaf("revoke", site=victim.name)
    made.cosigned.pop(victim.id)
    rows = [made.row(site, RUN, 2) for site in others]
    gone = made.row(victim, RUN, 2, LOUD, verdict="revoked", update="", head="", charged=0)
    made.commit(RUN, 2, [*rows, gone])
    for site in others:
        made.show(site)
    assert ("violation", "uncharged") in found(audit(made.bundle, made.trust()))
    old = replace(made.bundle, sites={**made.bundle.sites, victim.id: early})
    assert found(audit(old, made.trust())) == {("incomplete", "stale")}


def test_a_site_that_was_put_out_after_its_last_update_needs_no_newer_export() -> None:
    made = began(1, sites=4)
    victim, *others = made.sites
    for site in made.sites:
        made.train(site, RUN, 2)
    made.leaf("revoke", site=victim.name)
    made.cosigned.pop(victim.id)
    rows = [made.row(site, RUN, 2) for site in others]
    made.commit(RUN, 2, [*rows, made.row(victim, RUN, 2, verdict="revoked", update="", head="")])
    for site in others:
        made.show(site)
    assert found(audit(made.bundle, made.trust())) == set()


def test_a_cap_that_is_passed_is_told_some_times_and_not_worked_out_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    made = began(1)
    site = made.sites[0]
    for number in range(200):
        site.reserve(named("p", number), RUN, 1, (20.0, 0.01, 1000 + number), cap=1e-6, admitted=[0.0])
    made.close()
    asked = list[object]()
    monkeypatch.setattr(accountant, "_distribution", _counted(accountant._distribution, asked))
    accountant.forget()
    got = audit(made.bundle, made.trust())
    above = [f for f in got.findings.found if f.code == "cap"]
    assert [f.kind for f in above] == ["violation"] * MOST_LOW + ["incomplete"]
    assert len(asked) < 120


def _counted(work: Any, asked: list[object]) -> Any:
    def counted(*what: Any) -> Any:
        asked.append(what)
        return work(*what)

    return counted


@pytest.mark.parametrize("enough", [False, True])
def test_what_is_stated_of_whole_clients_is_looked_at_in_good_time(
    monkeypatch: pytest.MonkeyPatch, enough: bool
) -> None:
    made = began(1)
    for number in range(60):
        sigma = 5 + number / 1000
        made.leaf(
            "spend", run=RUN, number=9, attempt=1, noise_multiplier=sigma, clipping_norm=1.0, noise_std=sigma,
            delta=DELTA, epsilon=900.0 if enough else 0.1, clients="[]",
        )  # fmt: skip
    made.close()
    monkeypatch.setattr(published, "MOST_KINDS", 40)
    asked = list[object]()
    monkeypatch.setattr(accountant, "_distribution", _counted(accountant._distribution, asked))
    accountant.forget()
    got = audit(made.bundle, made.trust())
    mine = [f for f in got.findings.found if f.what.startswith("client level")]
    assert [f.kind for f in mine] == (
        ["incomplete"] if enough else ["incomplete"] + ["violation"] * MOST_LOW + ["incomplete"]
    )
    assert len(asked) < (20 if enough else 60)


def test_who_is_told_of_no_more_is_told_once() -> None:
    made = began(1)
    rows = [made.row(site, RUN, 2, verdict="missing", update="") for site in made.sites]
    broken_off(made, rows)
    for _ in range(10):
        broken_off(made, [])
    got = audit(made.bundle, made.trust())
    gone = [f for f in got.findings.found if (f.kind, f.code) == ("violation", "charged")]
    assert [f.where for f in gone] == ["site site-1, site-2, site-3, round 2 of run aaaaaaaa"]


def test_months_of_too_many_kinds_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made = began(1)
    site = made.sites[0]
    for number in range(6):
        site.at += 2.7e6
        site.reserve(named("p", number), RUN, 1, (20.0, 0.01, 100 + number))
        site.at -= 60
    made.close()
    monkeypatch.setattr(budget, "MOST_KINDS", 4)
    (block,) = [b for b in audit(made.bundle, made.trust()).blocks if b.site == site.name]
    assert len(block.periods) == 7
    assert {p.alone_sure for p in block.periods} == {False}


def test_a_disputed_entry_excuses_no_cap_that_is_passed_without_it() -> None:
    """Given back under an earlier key, of which the log alone says whose it is."""
    made = began(1)
    first = made.sites[0]
    plan = named(RUN, 2, first.id)
    said = {"event": "void", "entry": first.reserve(plan, RUN, 2), "plan": plan, "left": "nothing", "at": first.at}
    first.events.append(canonical(said | {"signature": first.key.sign(VOID_PURPOSE, canonical(said)).hex()}))
    made.rejoin(first)
    first.spend(first.reserve(named("loud"), RUN, 3, LOUD, cap=2.0), named("u"))
    made.close()
    assert ("violation", "cap") in found(audit(made.bundle, by_key(made)))


def hidden(made: Forged, number: int, victim: ForgedSite, told: bool) -> None:
    """A round in which a site works, and of which the coordinator says that it took no part, or nothing."""
    rows = []
    for site in made.sites:
        made.train(site, RUN, number, LOUD if site is victim else TERMS)
        rows += [made.row(site, RUN, number)] if site is not victim else []
    missing = {"verdict": "missing", "update": "", "head": "", "charged": 0, "epsilon": 0.0}
    made.commit(RUN, number, [*rows, *([made.row(victim, RUN, number, LOUD, **missing)] if told else [])])


def left_out(made: Forged, *keys: str) -> Bundle:
    """Everything without the logs of some keys."""
    return replace(made.bundle, sites={i: log for i, log in made.bundle.sites.items() if i not in keys})


def four() -> Forged:
    """Four sites and a run."""
    made = Forged(tuple(ForgedSite(f"site-{i}") for i in range(1, 5)))
    made.begin()
    return made


@pytest.mark.parametrize("told", [False, True])
def test_another_log_of_a_name_is_not_the_one_that_is_left_out(told: bool) -> None:
    made = four()
    victim = made.sites[0]
    hidden(made, 1, victim, told)
    again(made)
    made.round(2)
    made.close()
    for trust in (made.trust(), by_key(made)):
        assert ("incomplete", "no-site-log") in found(audit(made.bundle, trust))
    whole = replace(made.bundle, sites={**made.bundle.sites, victim.id: victim.log})
    assert any(kind == "violation" for kind, _ in found(audit(whole, made.trust())))


@pytest.mark.parametrize("told", [False, True])
def test_what_another_key_adds_to_a_log_says_nothing_of_the_one_before_it(told: bool) -> None:
    """A site takes the name of one that was put out, and brings its old log with events of its own."""
    made = began(1, sites=4)
    victim, *others = made.sites
    made.show(victim)
    early = list(victim.events)
    hidden(made, 2, victim, told)
    made.leaf("revoke", site=victim.name)
    made.cosigned.pop(victim.id)
    other = ForgedSite(victim.name, origin=victim.origin, events=early, at=victim.at)
    made.enrol(other)
    made.sites = (other, *others)
    made.close()
    assert ("incomplete", "stale") in found(audit(made.bundle, by_key(made)))


@pytest.mark.parametrize("export", [False, True])
def test_a_site_that_the_log_never_took_in_is_missed(export: bool) -> None:
    made = Forged()
    victim = ForgedSite("site-9")
    made.trusted[victim.id] = (victim.name, victim.key.verify_key)
    made.begin()
    made.show(victim)
    made.round(1)
    made.close()
    sites = {**made.bundle.sites, **({victim.id: victim.log} if export else {})}
    code = "stale" if export else "no-site-log"
    assert found(audit(replace(made.bundle, sites=sites), made.trust())) == {("incomplete", code)}
    # Another key of that name, which was put out before anything began, is not its own.
    other = ForgedSite(victim.name)
    made = Forged()
    made.trusted[victim.id] = (victim.name, victim.key.verify_key)
    made.leaf("enrol", site=other.name, card=card_of(other.name, other.key))
    made.leaf("revoke", site=other.name)
    made.begin()
    made.show(victim)
    made.round(1)
    made.close()
    sites = {**made.bundle.sites, **({victim.id: victim.log} if export else {})}
    for also in (False, True):
        made.trusted |= {other.id: (other.id[:16], other.key.verify_key)} if also else {}
        assert ("incomplete", code) in found(audit(replace(made.bundle, sites=sites), made.trust()))
    # Of a federation that has told no round nobody was asked.
    fresh = Forged()
    fresh.trusted[victim.id] = (victim.name, victim.key.verify_key)
    assert found(audit(fresh.bundle, fresh.trust())) & {("incomplete", "no-site-log")} == set()


@pytest.mark.parametrize("export", [False, True])
def test_who_is_put_out_for_a_moment_was_there_all_the_time(export: bool) -> None:
    made = four()
    *others, victim = made.sites
    made.show(victim)
    early = victim.log
    for site in made.sites:
        made.train(site, RUN, 1, LOUD if site is victim else TERMS)
    rows = [made.row(site, RUN, 1) for site in others]
    made.leaf("revoke", site=victim.name)
    made.commit(RUN, 1, rows)
    made.enrol(victim)
    for site in others:
        made.show(site)
    bundle = left_out(made, victim.id)
    bundle = replace(bundle, sites={**bundle.sites, **({victim.id: early} if export else {})})
    bundle = replace(bundle, cosignatures={i: one for i, one in bundle.cosignatures.items() if i != victim.id})
    assert found(audit(bundle, made.trust())) == {("incomplete", "stale" if export else "no-site-log")}


@pytest.mark.parametrize("between", [False, True])
def test_who_was_there_while_a_round_ran_alone_is_missed(between: bool) -> None:
    """Also where the coordinator tells of something else of that round meanwhile."""
    made = four()
    victim = made.sites[3]
    for site in made.sites:
        made.train(site, RUN, 1, LOUD if site is victim else TERMS)
    made.leaf("revoke", site=victim.name)
    made.cosigned.pop(victim.id)
    if between:
        made.leaf("incident", what="a site's own log went back", run=RUN, round=1, client=made.sites[0].id, reason="x")
    made.commit(RUN, 1, [made.row(site, RUN, 1) for site in made.sites[:3]])
    made.close()
    made.cosigned.pop(victim.id)
    assert found(audit(left_out(made, victim.id), made.trust())) == {("incomplete", "no-site-log")}


def test_whom_a_row_names_is_missed_though_it_was_put_out() -> None:
    made = Forged(tuple(ForgedSite(f"site-{i}") for i in range(1, 5)))
    victim = made.sites[3]
    made.leaf("revoke", site=victim.name)
    made.begin()
    hidden(made, 1, victim, told=True)
    made.close()
    made.cosigned.pop(victim.id)
    assert found(audit(left_out(made, victim.id), made.trust())) == {("incomplete", "no-site-log")}


def test_a_head_with_the_commit_in_it_is_as_good_as_a_receipt_for_the_last_round() -> None:
    made = began(3, sites=4)
    *others, away = made.sites
    for site in others:
        made.show(site)
    assert found(audit(made.bundle, made.trust())) == {("incomplete", "no-receipt")}
    at = made.head
    away.add("fetched", note=at.signed(made.key), log=at.origin, size=at.size, root=at.root.hex())
    assert found(audit(made.bundle, made.trust())) == set()


def test_a_receipt_of_another_site_accuses_nobody_for_sure() -> None:
    """Which of them had no part in a round a receipt does not say: one site may have it of another."""
    made = began(2)
    site = made.sites[0]
    leaf = next(i for i, one in enumerate(made.leaves) if json.loads(one.record)["kind"] == "round_commit")
    hashed = leaf_hash(made.leaves[leaf].record).hex()
    commit = json.loads(made.leaves[leaf].record)
    told = Receipt(RUN, 1, no_work(RUN, 1), "", NOT_ASKED, commit["adapter"], leaf, hashed).by(made.key)
    site.add("receipt", **asdict(told))
    made.close()
    assert check(made) == {("incomplete", "receipt")}


def test_a_work_has_one_set_of_terms_and_one_end() -> None:
    made = began(1)
    site = made.sites[0]
    for terms in (TERMS, LOUD):
        site.reserve(named("work"), RUN, 2, terms)
    made.close()
    assert ("violation", "terms") in check(made)
    made = began(1)
    site = made.sites[0]
    for _ in range(2):
        site.spend(site.reserve(named("work"), RUN, 2), named("update"))
    made.close()
    assert ("violation", "order") in check(made)


def test_many_rows_and_entries_of_one_work_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = began(1)
    site = made.sites[0]
    plan = named(RUN, 2, site.id)
    for _ in range(300):
        site.add("lose", entry=site.reserve(plan, RUN, 2))
    for _ in range(300):
        broken_off(made, [made.row(site, RUN, 2, verdict="missing", update="", epsilon=900.0)])
    made.close()
    looked = list[object]()
    monkeypatch.setattr(spends, "_whose", _counted(spends._whose, looked))
    got = audit(made.bundle, made.trust())
    assert {(f.kind, f.code) for f in got.findings.found} == {("incomplete", "charged")}
    assert len(looked) < 1000


@pytest.mark.parametrize(("module", "limit"), [(published, "_MOST_TOLD"), (budget, "MOST_ON_THE_WAY")])
def test_what_is_too_much_in_all_is_not_worked_out(monkeypatch: pytest.MonkeyPatch, module: Any, limit: str) -> None:
    made = began(4)
    made.close()
    assert check(made) == set()
    monkeypatch.setattr(module, limit, 10)
    assert check(made) == {("incomplete", "published" if module is published else "cap")}
