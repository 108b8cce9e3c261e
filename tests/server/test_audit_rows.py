"""What rows say against what is beside them: sums, who was enrolled, heads of keys that the log alone names, broken-off rounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from cloister_shared.audit import budget, published
from cloister_shared.audit.accountant import Step, allowed, by_both, by_rdp, epsilon_of
from cloister_shared.audit.alike import merged
from cloister_shared.audit.bundle import SiteLog
from cloister_shared.audit.command import audit
from cloister_shared.audit.tables import rounds_table
from cloister_shared.encoding import canonical
from cloister_shared.plan import VOID_PURPOSE
from cloister_shared.privacy import DpSgd, epsilon
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from support.forged import DELTA, RUN, RUN2, TERMS, Forged, ForgedSite, again, began, by_key, check, found, lines, named


def under_masks(made: Forged, run: str, number: int, **changed: dict[str, Any]) -> None:
    """A round of all sites in one sum; changes are of rows, by the site's name."""
    draw, group = made.drawn([site.key for site in made.sites], run)
    rows = []
    for site in made.sites:
        made.train(site, run, number, secure=made.masks)
        rows.append(made.row(site, run, number, update="", **changed.get(site.name.replace("-", "_"), {})))
    made.commit(run, number, rows, [group], draw)


@pytest.mark.parametrize("late", [("site_4",), ("site_2", "site_3", "site_4")])
def test_a_sum_enters_whole(late: tuple[str, ...]) -> None:
    made = Forged(tuple(ForgedSite(f"site-{i}") for i in range(1, 5)))
    made.begin()
    under_masks(made, RUN, 1, **{name: {"verdict": "late"} for name in late})
    assert check(made) == {("violation", "sums")}


@pytest.mark.parametrize("verdict", ["accepted", "refused-by-peers"])
def test_a_sum_enters_or_is_left_out(verdict: str) -> None:
    made = Forged(tuple(ForgedSite(f"site-{i}") for i in range(1, 5)))
    made.begin()
    under_masks(made, RUN, 1, **{f"site_{i}": {"verdict": verdict} for i in range(1, 5)})
    # Where nothing entered the adapter stays, which is another test's.
    assert check(made) - {("violation", "parent")} == set()


@pytest.mark.parametrize("verdict", ["late", "accepted", "missing"])
@pytest.mark.parametrize("kind", ["row", "sum", "broken off"])
def test_whose_text_is_used_was_enrolled(kind: str, verdict: str) -> None:
    made = began(2, sites=4)
    gone = made.sites[3]
    made.leaf("revoke", site=gone.name)
    made.cosigned.pop(gone.id)
    others, made.sites = made.sites, made.sites[:3]
    made.round(3)
    made.sites = others
    if kind == "sum":
        under_masks(made, RUN, 4, site_4={"verdict": verdict})
    else:
        rows = []
        for site in others:
            made.train(site, RUN, 4)
            rows.append(made.row(site, RUN, 4) | ({"verdict": verdict} if site is gone else {}))
        if kind == "row":
            made.commit(RUN, 4, rows)
        else:
            made.leaf("incident", what="too few", run=RUN, round=4, clients=rows)
    assert ("violation", "not-enrolled") in check(made)


def test_who_left_while_a_round_was_tried_was_enrolled() -> None:
    made = began(1, sites=4)
    gone = made.sites[3]
    rows = [made.row(site, RUN, 2, verdict="missing", update="") for site in made.sites]
    for site in made.sites:
        made.train(site, RUN, 2)
    made.leaf("incident", what="too few", run=RUN, round=2, clients=rows)
    made.leaf("revoke", site=gone.name)
    # Its charge stands in every later attempt's rows.
    for _ in range(2):
        made.leaf("incident", what="too few", run=RUN, round=2, clients=rows)
    rows = [made.row(gone, RUN, 2, verdict="revoked", update="", epsilon=rows[3]["epsilon"])]
    for site in made.sites[:3]:
        rows.append(made.row(site, RUN, 2))
    made.commit(RUN, 2, rows)
    assert not any(kind == "violation" for kind, _ in check(made))


def test_a_key_that_the_log_calls_a_sites_cannot_cut_its_log_short() -> None:
    """A coordinator and a second site: the first is put out, the second comes as it, with a shorter log of the same name."""
    made = began(2, sites=4)
    made.close()
    real, others, early = made.sites[0], made.sites[1:], list(made.sites[0].events)
    for number in range(20):
        real.add("data", facts=named(number))
    made.show(real)
    real.add("nonprivate_release", numbers=["loss"], round=3, run=RUN, to="coordinator")
    plan = named(RUN, 3, real.id)
    real.spend(real.reserve(plan, RUN, 3, noised=[["loss", 0.5]] * 20), named("update", plan))
    rows = [made.row(real, RUN, 3, verdict="late", update="")]
    for site in others:
        made.train(site, RUN, 3)
        rows.append(made.row(site, RUN, 3))
    made.commit(RUN, 3, rows)
    false = ForgedSite("site-1", origin=real.origin, events=early, entries=2, at=real.at)
    made.leaf("revoke", site="site-1")
    made.cosigned.pop(real.id)
    made.enrol(false)
    false.spend(false.reserve(plan, RUN, 3), named("update", plan))
    made.sites = (false, *others)
    made.begin(RUN2)
    made.round(1, RUN2)
    made.close()
    for trust in (by_key(made), made.trust()):
        assert ("incomplete", "newest-head") in found(audit(made.bundle, trust))


def test_an_export_of_before_a_site_joined_again_accuses_nobody() -> None:
    made = began(2)
    made.close()
    early = made.bundle
    made.rejoin(made.sites[0])
    made.begin(RUN2)
    made.round(1, RUN2)
    made.close()
    late = replace(made.bundle, sites={i: log for i, log in made.bundle.sites.items() if i != made.sites[0].id})
    for trust in (made.trust(), by_key(made)):
        got = audit(merged([late, early], trust), trust)
        assert {kind for kind, _ in found(got)} == {"incomplete"}


def test_what_the_coordinator_saw_of_rounds_that_were_broken_off() -> None:
    made = began(1, sites=4)
    for answered in (True, False):
        number, rows = 2, []
        for site in made.sites:
            if answered:
                made.train(site, RUN, number)
            rows.append(made.row(site, RUN, number, verdict="missing", update="", charged=int(answered)))
        if answered:
            made.leaf("incident", what="too few", run=RUN, round=number, clients=rows)
    made.begin(RUN2)
    made.leaf("incident", what="too few", run=RUN2, round=1, clients=[])
    made.close()
    said = lines(made.bundle, made.trust(), "trusted with what")
    assert "saw single noised updates in 2 rounds" in said
    assert "saw of 1 round that came to nothing" in said


def test_a_site_of_which_only_broken_off_rounds_had_text_is_named() -> None:
    made = began(1, sites=4)
    last, made.sites = made.sites[3], made.sites[:3]
    fresh = ForgedSite("site-5")
    made.enrol(fresh)
    made.sites = (*made.sites, last, fresh)
    rows = []
    for site in made.sites:
        made.train(site, RUN, 2)
        rows.append(made.row(site, RUN, 2))
    made.leaf("incident", what="too few", run=RUN, round=2, clients=rows)
    made.close()
    assert "site-5" in lines(made.bundle, made.trust(), "Whose text").splitlines()[0]
    got = audit(made.bundle, made.trust())
    table = rounds_table(got.history, got.ledgers)
    assert [row[0].split(",")[1:] for row in table.rows] == [[], [" broken off"]]
    assert table.rows[1][2] == "nobody"
    assert "site-5" in table.rows[1][3]


def test_a_clock_that_goes_back_lowers_no_months_lifetime() -> None:
    made = began(1)
    month = 32 * 86_400.0
    for number, at in ((2, made.sites[0].at + month), (3, made.sites[0].at)):
        for site in made.sites:
            site.at = at
        made.round(number)
    made.close()
    block = audit(made.bundle, made.trust()).blocks[0]
    assert [p.rounds for p in block.periods] == [2, 1]
    assert [p.lifetime for p in block.periods] == [block.points[-1].pld] * 2
    assert block.periods[1].epsilon < block.periods[0].epsilon


def test_several_logs_of_a_site_are_told() -> None:
    made = began(1)
    old, _ = again(made)
    made.begin(RUN2)
    made.round(1, RUN2)
    made.close()
    both = replace(made.bundle, sites={**made.bundle.sites, old.id: old.log})
    assert not any(kind == "violation" for kind, _ in found(audit(both, made.trust())))
    two = by_both((((2.0, 0.05), 40),), DELTA)[0]
    assert f"site-1 has charges in 2 logs, of one text or of several: together they come to epsilon {two:.4f}" in lines(
        both, made.trust(), "overrun"
    )
    assert "logs" not in lines(began(1).bundle, made.trust(), "overrun")
    # One that nothing was charged to yet says nothing together.
    fresh = began(1)
    old, _ = again(fresh)
    fresh.close()
    both = replace(fresh.bundle, sites={**fresh.bundle.sites, old.id: old.log})
    assert "logs, of one" not in lines(both, fresh.trust(), "overrun")


def test_histories_beyond_what_is_worked_out_are_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Forged()
    made.begin()
    for number in range(1, 5):
        rows = []
        for site in made.sites:
            blocks = [b for b in range(1, 6) if (b + number) % 3]
            terms = (2.0 + number / 10, 0.05, 20)
            made.train(site, RUN, number, terms, blocks=blocks, admitted=[0.5] * len(blocks))
            rows.append(made.row(site, RUN, number, terms))
        made.commit(RUN, number, rows)
    made.close()
    assert found(audit(made.bundle, made.trust())) == set()
    whole = audit(made.bundle, made.trust()).blocks
    monkeypatch.setattr(budget, "MOST_IN_ALL", 4)
    got = audit(made.bundle, made.trust())
    assert found(got) == {("incomplete", "cap")}
    assert len(got.findings.found) == 3
    assert [b.sure for b in got.blocks if b.site == "site-1"] == [True, False, False, True, False]
    assert all(b.epsilon >= w.epsilon for b, w in zip(got.blocks, whole, strict=True))


def test_figures_at_ever_other_deltas_are_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Forged((ForgedSite("site-1"),))
    made.begin()
    (site,) = made.sites
    steps = Counter[Step]()
    for number in range(1, 8):
        terms, delta = (1.5 + number / 100, 0.02, 5), 1e-5 * (1 + number / 1000)
        steps[terms[:2]] += terms[2]
        row = made.row(site, RUN, number, terms, verdict="refused", update="", delta=delta)
        row["epsilon"] = by_rdp(tuple(sorted(steps.items())), delta) - 0.03
        start = made.adapters[RUN]
        facts = {"start": start, "adapter": start, "base": named("base"), "clients": [row], "sums": [], "metrics": {}}
        made.leaf("round_commit", run=RUN, round=number, attempt=1, **facts)
    made.close()
    assert ("incomplete", "published") not in found(audit(made.bundle, made.trust()))
    monkeypatch.setattr(published, "MOST_IN_ALL", 10)
    got = audit(made.bundle, made.trust())
    assert [f.where for f in got.findings.found if f.code == "published"] == ["site site-1, round 3 of run aaaaaaaa"]


def test_attempts_that_take_the_place_of_others_are_laid_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Forged((ForgedSite("site-1"),))
    made.begin()
    (site,) = made.sites
    for number in range(1, 6):
        kinds = [(1.5 + number / 100 + attempt / 1000, 0.02, 5) for attempt in range(2)]
        rows = [made.row(site, RUN, number, terms, verdict="missing", update="", head="") for terms in kinds]
        made.leaf("incident", what="too few", run=RUN, round=number, clients=rows[:1])
        start = made.adapters[RUN]
        facts = {
            "start": start,
            "adapter": start,
            "base": named("base"),
            "clients": rows[1:],
            "sums": [],
            "metrics": {},
        }
        made.leaf("round_commit", run=RUN, round=number, attempt=1, **facts)
    made.close()
    monkeypatch.setattr(published, "MOST_IN_ALL", 8)
    assert any(
        "were not worked out" in f.what or "was not worked out" in f.what
        for f in audit(made.bundle, made.trust()).findings.found
    )


@pytest.mark.parametrize("between", [0, 1, 3])
@pytest.mark.parametrize("how", ["died", "away", "gave back"])
@pytest.mark.parametrize("named_too", [True, False])
def test_an_attempt_that_came_to_nothing_was_told_before_what_came_after_it(
    between: int, how: str, named_too: bool
) -> None:
    """A site's agent dies in a round that is broken off, or hears nothing of it; another run goes on, and the first is resumed."""
    made = Forged()
    made.begin()
    first, *others = made.sites
    plan = named(RUN, 1, first.id)
    made.show(first)
    if how == "died":
        first.add("lose", entry=first.reserve(plan, RUN, 1))
    elif how == "gave back":
        said = {"event": "void", "entry": first.reserve(plan, RUN, 1), "plan": plan, "left": "nothing", "at": first.at}
        first.events.append(canonical(said | {"signature": first.key.sign(VOID_PURPOSE, canonical(said)).hex()}))
    for site in others:
        made.train(site, RUN, 1)
    rows = [made.row(site, RUN, 1) for site in made.sites]
    rows[0] |= {"verdict": "missing", "update": ""}
    made.leaf("incident", what="too few", run=RUN, round=1, clients=rows)
    made.begin(RUN2)
    for number in range(1, between + 1):
        made.round(number, RUN2)
    made.show(first)
    first.spend(first.reserve(plan, RUN, 1), named("update", plan))
    made.spent[first.name].append(DpSgd(*TERMS))
    again = [made.row(site, RUN, 1, charged=0) | {"charged": 2 if site is first else 1} for site in made.sites]
    made.commit(RUN, 1, again, attempt=2)
    made.close()
    assert found(audit(made.bundle, made.trust() if named_too else by_key(made))) == set()
    # What the last leaf of a round says is of all its charges.
    low = [row | ({"epsilon": rows[0]["epsilon"]} if row["name"] == first.name else {}) for row in again]
    made.leaves.pop()
    made.commit(RUN, 1, low, attempt=2)
    made.close()
    if how == "died":
        assert ("violation", "published") in found(audit(made.bundle, made.trust()))


HOT = [["loss", 0.3]]


def broken_off(made: Forged) -> list[dict[str, Any]]:
    """Rows of a round that was broken off, stated without the first site's noised number, which its own ledger has."""
    for site in made.sites:
        made.train(site, RUN, 2, noised=HOT if site is made.sites[0] else [])
    rows = [made.row(site, RUN, 2, verdict="missing") for site in made.sites]
    told = [{name: value for name, value in row.items() if name not in ("update", "head", "weight")} for row in rows]
    made.leaf("incident", what="too few", run=RUN, round=2, clients=told)
    return rows


def accepted(made: Forged, rows: list[dict[str, Any]], **first: Any) -> list[dict[str, Any]]:
    """The same rows in a commit; changes are of the first."""
    out = [
        row | {"verdict": "accepted", "head": site.note, "update": named("update", row["plan"])}
        for site, row in zip(made.sites, rows, strict=True)
    ]
    return [out[0] | first, *out[1:]]


@pytest.mark.parametrize("later", ["none", "of nobody", "without it", "another work", "right"])
def test_no_later_leaf_hides_that_an_earlier_one_says_too_little(later: str) -> None:
    made = began(1)
    rows, right = broken_off(made), [*([DpSgd(*TERMS)] * 2), DpSgd(0.3, 1.0, 1)]
    if later == "of nobody":
        made.leaf("incident", what="too few", run=RUN, round=2, clients=[])
    elif later == "without it":
        made.commit(RUN, 2, accepted(made, rows)[1:], attempt=2)
    elif later == "another work":
        other = {"verdict": "missing", "update": "", "head": "", "plan": named("other")}
        made.commit(RUN, 2, accepted(made, rows, **other), attempt=2)
    elif later == "right":
        made.commit(RUN, 2, accepted(made, rows, epsilon=epsilon(right, DELTA)), attempt=2)
    codes = check(made)
    assert ("violation", "published") in codes
    # What is charged stays told in every later leaf of its round, and stays the same work.
    assert (("violation", "charged") in codes) == (later in ("of nobody", "without it", "another work"))


def test_a_row_of_a_key_that_never_was_enrolled_is_nobodys() -> None:
    made = began(1)
    stranger = ForgedSite("site-1")
    rows = [made.row(stranger, RUN, 2, verdict="missing", charged=0, update="", head="", epsilon=0.1)]
    for site in made.sites[1:]:
        made.train(site, RUN, 2)
        rows.append(made.row(site, RUN, 2))
    made.commit(RUN, 2, rows)
    assert ("violation", "not-enrolled") in check(made)


@pytest.mark.parametrize("verdict", ["late", "accepted"])
@pytest.mark.parametrize("given_back", [True, False])
def test_an_update_that_a_broken_off_round_names_is_the_sites(verdict: str, given_back: bool) -> None:
    made = began(1)
    first, *others = made.sites
    if given_back:
        made.show(first)
        plan = named(RUN, 2, first.id)
        said = {"event": "void", "entry": first.reserve(plan, RUN, 2), "plan": plan, "left": "nothing", "at": first.at}
        first.events.append(canonical(said | {"signature": first.key.sign(VOID_PURPOSE, canonical(said)).hex()}))
    else:
        made.train(first, RUN, 2)
    for site in others:
        made.train(site, RUN, 2)
    swapped = {} if given_back else {"update": named("another")}
    rows = [made.row(first, RUN, 2, verdict=verdict) | swapped]
    rows += [made.row(site, RUN, 2, verdict="missing", update="") for site in others]
    made.leaf("incident", what="too few", run=RUN, round=2, clients=rows)
    assert ("violation", "unspent" if given_back else "update") in check(made)


def lost(**changed: Any) -> tuple[Forged, dict[str, SiteLog]]:
    """Returns a federation in which a site's answer is lost before it joins again twice, and the logs: of each key its own."""
    made = Forged()
    made.begin()
    first, *others = made.sites
    for site in made.sites:
        made.train(site, RUN, 1)
    gone = made.row(first, RUN, 1) | {"verdict": "missing", "update": "", "head": ""} | changed
    made.commit(RUN, 1, [gone, *(made.row(site, RUN, 1) for site in others)])
    made.rejoin(first)
    old, _ = again(made)
    made.begin(RUN2)
    made.round(1, RUN2)
    made.close()
    # Whichever of the two comes first, as by their keys in a file.
    return made, dict(sorted({**made.bundle.sites, old.id: old.log}.items()))


def test_a_key_that_never_signed_a_head_may_have_had_either_log() -> None:
    """A site's answer is lost; it joins again with its log under a second key, and with another log under a third."""
    codes = set[tuple[str, str]]()
    for _ in range(6):
        made, both = lost()
        for trust in (made.trust(), by_key(made)):
            codes |= found(audit(replace(made.bundle, sites=both), trust))
    assert codes == {("incomplete", "no-site-log")}


def test_terms_of_a_key_without_a_head_are_held_against_the_log_that_knows_the_work() -> None:
    for _ in range(6):
        made, both = lost(noise_multiplier=3.0)
        assert ("violation", "terms") in found(audit(replace(made.bundle, sites=both), made.trust()))


def test_the_last_leaf_of_a_round_is_held_against_all_that_was_spent_for_it() -> None:
    made = Forged()
    made.begin()
    first, *others = made.sites
    plan = named(RUN, 1, first.id)
    made.show(first)
    first.add("lose", entry=first.reserve(plan, RUN, 1))
    first.spend(first.reserve(plan, RUN, 1), named("update", plan))
    for site in others:
        made.train(site, RUN, 1)
    made.commit(RUN, 1, [made.row(site, RUN, 1) for site in made.sites], attempt=2)
    assert check(made) == {("incomplete", "charged"), ("incomplete", "published")}


def test_sums_of_more_than_were_asked_are_malformed() -> None:
    made = Forged(tuple(ForgedSite(f"site-{i}") for i in range(1, 5)))
    made.begin()
    draw, group = made.drawn([site.key for site in made.sites])
    rows = []
    for site in made.sites:
        made.train(site, RUN, 1, secure=made.masks)
        rows.append(made.row(site, RUN, 1, update=""))
    made.commit(RUN, 1, rows, [group, [named(n)[:32] for n in range(1000)]], draw)
    got = audit(made.bundle, made.trust())
    assert ("violation", "leaf") in found(got)
    assert len(got.findings.found) < 20


def test_a_site_that_only_refused_had_no_text_used() -> None:
    made = began(1, sites=4)
    last, made.sites = made.sites[3], made.sites[:3]
    fresh = ForgedSite("site-5")
    made.enrol(fresh)
    rows = [made.row(fresh, RUN, 2, charged=0, verdict="refused-by-site", update="", epsilon=0.0)]
    for site in made.sites:
        made.train(site, RUN, 2)
        rows.append(made.row(site, RUN, 2))
    made.commit(RUN, 2, rows)
    made.sites = (*made.sites, last, fresh)
    made.close()
    assert lines(made.bundle, made.trust(), "Whose text").splitlines()[0] == "site-1, site-2, site-3, site-4"


def test_what_is_allowed_is_both_accountants_error() -> None:
    """A figure that a finer grid gives is right: the error of this one grows with epsilon."""
    assert [allowed(e, 0.02) - e for e in (0.0, 10.0, 300.0)] == pytest.approx([0.02, 0.02, 0.6])
    for steps in (5000, 20_000):
        kind = (1.0, 0.1)
        here = epsilon_of(Counter({kind: steps}), 1e-5)
        fine = PLDAccountant(value_discretization_interval=2e-4)
        fine.compose(SelfComposedDpEvent(PoissonSampledDpEvent(kind[1], GaussianDpEvent(kind[0])), steps))
        assert here <= allowed(fine.get_epsilon(1e-5), 0.02)
