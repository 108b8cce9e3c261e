"""Keys that an auditor trusts by themselves or not at all, and bundles of several parties of whom one is damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cloister_shared.audit.alike import merged
from cloister_shared.audit.bundle import Bundle, SignedLeaf, SiteLog, read_bundle, write_bundle
from cloister_shared.audit.command import audit
from cloister_shared.audit.trust import Trust
from cloister_shared.encoding import canonical
from cloister_shared.errors import InputError
from cloister_shared.plan import VOID_PURPOSE

from support.forged import HUGE, RUN, RUN2, Forged, ForgedSite, again, began, by_key, check, found, lines, named


def without(made: Forged, client: str) -> Trust:
    """With names, and without one key."""
    known = made.trust()
    sites = {i: key for i, key in known.sites.items() if i != client}
    return replace(known, sites=sites, names={i: n for i, n in known.names.items() if i != client})


@pytest.mark.parametrize("named_too", [True, False])
def test_a_site_with_two_logs_is_one_whether_its_keys_have_names_or_not(named_too: bool) -> None:
    for forgets in (False, True):
        made = began(2)
        made.close()
        old, _ = again(made)
        if forgets:
            made.spent["site-1"].clear()
        made.round(3)
        made.close()
        both = replace(made.bundle, sites={**made.bundle.sites, old.id: old.log})
        got = found(audit(both, made.trust() if named_too else by_key(made)))
        assert (("violation", "published") in got) == forgets
        assert forgets or not got


def test_a_cap_over_two_logs_is_held_where_keys_have_no_names() -> None:
    made = Forged()
    made.begin()
    old = made.sites[0]
    for number in (1, 2, 3, 4):
        if number == 3:
            made.close()
            again(made)
        rows = []
        for site in made.sites:
            made.train(site, RUN, number, cap=0.9 if site.name == "site-1" else 100.0)
            rows.append(made.row(site, RUN, number))
        made.commit(RUN, number, rows)
    made.close()
    both = replace(made.bundle, sites={**made.bundle.sites, old.id: old.log})
    assert found(audit(both, by_key(made))) == {("incomplete", "cap")}


def test_a_site_that_joined_again_is_not_accused_where_its_earlier_key_is_not_known() -> None:
    made = began(2)
    made.close()
    old = made.sites[0].id
    made.rejoin(made.sites[0])
    made.begin(RUN2)
    made.round(1, RUN2)
    made.close()
    assert found(audit(made.bundle, made.trust())) == set()
    assert found(audit(made.bundle, by_key(made))) == set()
    for trust in (without(made, old), by_key(made, old)):
        assert found(audit(made.bundle, trust)) == {("incomplete", "untold"), ("incomplete", "stranger")}


def test_a_work_under_an_unknown_key_of_another_name_is_untold() -> None:
    made = began(1)
    stranger = ForgedSite("site-9")
    made.enrol(stranger)
    first = made.sites[0]
    plan = made.train(first, RUN, 2)
    rows = [made.row(stranger, RUN, 2, plan=plan, verdict="missing", update="", charged=0)]
    for site in made.sites[1:]:
        made.train(site, RUN, 2)
        rows.append(made.row(site, RUN, 2))
    made.commit(RUN, 2, rows)
    made.close()
    assert ("violation", "untold") in found(audit(made.bundle, without(made, stranger.id)))


def test_what_was_given_back_under_an_earlier_key_counts_where_that_is_not_known() -> None:
    for forged in (False, True):
        made = began(1)
        first = made.sites[0]
        plan, signing = named(RUN, 2, first.id), made.sites[1].key if forged else first.key
        said = {"event": "void", "entry": first.reserve(plan, RUN, 2), "plan": plan, "left": "nothing", "at": first.at}
        first.events.append(canonical(said | {"signature": signing.sign(VOID_PURPOSE, canonical(said)).hex()}))
        rows = [made.row(first, RUN, 2, charged=0, verdict="missing", update="")]
        for site in made.sites[1:]:
            made.train(site, RUN, 2)
            rows.append(made.row(site, RUN, 2))
        made.commit(RUN, 2, rows)
        made.close()
        old = first.id
        made.rejoin(first)
        made.close()
        for trust in (made.trust(), by_key(made)):
            assert (("violation", "void") in found(audit(made.bundle, trust))) == forged
            # Whether it counts nobody can say: so it accuses neither the coordinator nor the site.
            assert forged or not any(kind == "violation" for kind, _ in found(audit(made.bundle, trust)))
        assert ("incomplete", "void") in found(audit(made.bundle, without(made, old)))
        assert ("violation", "void") not in found(audit(made.bundle, without(made, old)))


def test_no_cap_is_broken_by_what_may_have_been_given_back() -> None:
    made = began(1)
    first = made.sites[0]
    plan = named(RUN, 2, first.id)
    said = {
        "event": "void",
        "entry": first.reserve(plan, RUN, 2, HUGE),
        "plan": plan,
        "left": "nothing",
        "at": first.at,
    }
    first.events.append(canonical(said | {"signature": first.key.sign(VOID_PURPOSE, canonical(said)).hex()}))
    made.train(first, RUN, 3, cap=2.0)
    made.rejoin(first)
    made.close()
    assert ("incomplete", "cap") in found(audit(made.bundle, by_key(made)))
    for trust in (made.trust(), by_key(made)):
        assert ("violation", "cap") not in found(audit(made.bundle, trust))
    first.reserve(named(RUN, 4, first.id), RUN, 4, HUGE, cap=2.0)
    made.close()
    assert ("violation", "cap") in found(audit(made.bundle, made.trust()))


@pytest.mark.parametrize("verdict", ["outlier", "accepted", "missing"])
def test_a_row_has_the_name_that_its_key_enrolled_with(verdict: str) -> None:
    made = began(2, sites=4)
    for site in made.sites:
        made.train(site, RUN, 3)
    rows = [made.row(made.sites[0], RUN, 3, name="site-4", verdict=verdict)]
    made.commit(RUN, 3, [*rows, *(made.row(site, RUN, 3) for site in made.sites[1:])])
    made.close()
    for trust in (made.trust(), by_key(made), without(made, made.sites[0].id)):
        assert ("violation", "name") in found(audit(made.bundle, trust))


def test_keys_without_names_have_those_that_their_sites_signed() -> None:
    made = began(1)
    made.close()
    assert "site-1 block 1, site-2 block 1, site-3 block 1: " in lines(made.bundle, by_key(made), "Epsilon and delta")
    assert "cosigned by site-1, site-2, site-3" in lines(made.bundle, by_key(made), "Is the log whole")


def test_a_federation_without_a_leaf_is_not_accused() -> None:
    made = Forged(sites=())
    got = audit(made.bundle, replace(made.trust(), remembered={}))
    assert {kind for kind, _ in found(got)} == {"incomplete"}


def test_what_one_bundle_has_damaged_is_taken_from_another() -> None:
    made = began(2)
    made.close()
    good, first = made.bundle, made.sites[0]
    junk = SignedLeaf(b"{}", "00", "00")
    log = SiteLog((*first.events, b"{}"), first.note)
    beside = (
        replace(good, leaves=(*good.leaves, junk), sites={}),
        Bundle(1.0, (junk,) * 50, "x"),
        Bundle(1.0, sites={first.id: log}),
    )
    for other in beside:
        for order in ([good, other], [other, good]):
            got = audit(merged(order, made.trust()), made.trust())
            assert found(got) == {("incomplete", "other-bundle")}
            assert len(got.history.commits) == 2
    # Where nobody has it whole, it is said of what is there.
    assert ("violation", "head") in found(audit(beside[0], made.trust()))
    assert ("violation", "head") in found(audit(merged([beside[0], beside[2]], made.trust()), made.trust()))


def test_a_log_that_is_here_under_two_keys_is_the_one_whose_head_holds() -> None:
    made = began(2)
    made.close()
    first = made.sites[0]
    old = first.id
    made.rejoin(first)
    made.begin(RUN2)
    made.round(1, RUN2)
    made.close()
    log = SiteLog((*first.events, b"{}"), first.note)
    got = audit(replace(made.bundle, sites={**made.bundle.sites, old: log}), made.trust())
    assert found(got) == {("incomplete", "other-bundle")}


def masked() -> tuple[Forged, str]:
    made = Forged()
    made.begin()
    draw, group = made.drawn([site.key for site in made.sites])
    rows = []
    for site in made.sites:
        made.train(site, RUN, 1, secure=made.masks)
        rows.append(made.row(site, RUN, 1, update=""))
    made.commit(RUN, 1, rows, [group], draw)
    made.close()
    return made, draw


def test_anybody_can_put_something_under_a_draws_name() -> None:
    made, draw = masked()
    assert found(audit(made.bundle, made.trust())) == set()
    for other in ({"run": "x"}, [float("1e3")], None):
        spoilt = Bundle(1.0, draws={draw: other})
        for order in ([made.bundle, spoilt], [spoilt, made.bundle]):
            assert found(audit(merged(order, made.trust()), made.trust())) == set()
        assert found(audit(replace(made.bundle, draws={draw: other}), made.trust())) == {("incomplete", "no-draw")}


def test_adapters_that_are_not_what_they_are_called_give_way(tmp_path: Path) -> None:
    made = began(1)
    made.close()
    name = made.adapters[RUN]
    for data in ({name: b"x"}, {}):
        both = merged([made.bundle, Bundle(1.0, adapters=data)], made.trust())
        assert (("violation", "adapter") in found(audit(both, made.trust()))) == bool(data)


def test_records_are_parted_as_they_are_counted(tmp_path: Path) -> None:
    """A carriage return parts no records: a million is a million."""
    made = began(1)
    made.close()
    odd = replace(made.bundle, leaves=(replace(made.bundle.leaves[0], key="a"), *made.bundle.leaves[1:]))
    write_bundle(tmp_path / "b.zip", odd)
    assert read_bundle(tmp_path / "b.zip") == odd
    import zipfile

    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        parts = {one: archive.read(one) for one in archive.namelist()}
    leaves = "federation/leaves.jsonl"
    parts[leaves] = parts[leaves].replace(b"\n", b"\r")
    with zipfile.ZipFile(tmp_path / "cr.zip", "w") as archive:
        for one, data in parts.items():
            archive.writestr(one, data)
    with pytest.raises(InputError, match="another form"):
        read_bundle(tmp_path / "cr.zip")


def test_whose_text_an_adapter_holds_is_told_before_it_is_used() -> None:
    for late in (False, True):
        made = Forged()
        made.begin()
        made.round(1)
        if not late:
            made.round(2)
        made.adapters[RUN2] = named("made", RUN, 2)
        made.leaf("policy", run=RUN2, adapter=made.adapters[RUN2], base=named("base"), config=named("c"), code="x")
        made.round(1, RUN2)
        if late:
            made.round(2)
        assert (("violation", "parent") in check(made)) == late


def test_a_round_that_is_taken_back_makes_an_adapter_again() -> None:
    made = began(1)
    rows = []
    for site in made.sites:
        made.train(site, RUN, 2)
        rows.append(made.row(site, RUN, 2, verdict="held"))
    start = named("start", RUN)
    # Another run that began with the same.
    made.leaf("policy", run=RUN2, adapter=start, base=named("base"), config=named("c"), code="x")
    made.commit(RUN, 2, rows, adapter=start)
    made.adapters[RUN] = start
    assert ("violation", "parent") not in check(made)
