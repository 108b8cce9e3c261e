"""What a small bundle could make an audit take, in time or memory; and caps of sites with several logs, receipts of several runs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from cloister_shared.audit import accountant, published, several
from cloister_shared.audit.command import audit
from cloister_shared.audit.tables import enrolled_table
from cloister_shared.draw import Transcript
from cloister_shared.privacy import DpSgd, epsilon
from cloister_shared.signing import SigningKey

from support.forged import RUN, TERMS, Forged, again, began, card_of, check, found, named

OTHER = "cd" * 16
QUIET, LOUD = (1.0, 0.1, 50), (1.0, 0.1, 150)


@pytest.mark.parametrize("kinds", [1, 60])
def test_losses_too_many_to_be_laid_out_are_bounded_at_once(monkeypatch: pytest.MonkeyPatch, kinds: int) -> None:
    """Little noise on tiny rates has losses far apart; many quiet releases beside them ask for a fine grid."""
    sigma = 0.5 if kinds == 1 else 1.0
    steps = (*(((sigma + n / 1000, 1e-7), 3) for n in range(kinds)), ((101.28, 0.00555), 200_000))
    accountant.forget()
    with monkeypatch.context() as without:
        without.setattr(accountant, "one_release", lambda *_: pytest.fail("laid out"))
        assert accountant.beyond(steps, 1e-3)
        assert accountant.by_both(steps, 1e-3) == (accountant.by_rdp(steps, 1e-3),) * 2


@pytest.mark.parametrize("step", [(0.5, 1e-4), (0.3, 1 - 1e-12), (1.1, 0.01), (20.0, 1.0), (0.75, 0.1)])
def test_how_far_apart_losses_are_is_known_before_they_are_laid_out(step: tuple[float, float]) -> None:
    wide = accountant.width(((step, 100),), 1e-5)
    laid = len(accountant.one_release(step, wide)._pmf_remove.to_dense_pmf()._probs)
    assert 0.9 * laid <= accountant._losses(step) / wide <= 1.2 * laid + 50


def test_figures_at_deltas_by_turns_are_two_series(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each grows by itself; what is too low in either is found, and a new delta each time is too much."""

    def at(deltas: list[float], low: int = -1) -> Forged:
        made = began(0)
        for number, delta in enumerate(deltas, 1):
            rows = []
            for site in made.sites:
                made.train(site, RUN, number, delta=delta)
                row = made.row(site, RUN, number, delta=delta)
                row["epsilon"] = epsilon([DpSgd(*TERMS[:2], TERMS[2] * number)], delta) * (0.9 if number == low else 1)
                rows.append(row)
            made.commit(RUN, number, rows)
        return made

    monkeypatch.setattr(published, "_MOST_LAID", 15)
    turns = [1e-5, 1e-6] * 3
    assert check(at(turns)) == set()
    for low in (1, 2, 5, 6):
        assert check(at(turns, low)) == {("violation", "published")}
    assert check(at([10**-n for n in (4, 5, 6, 7, 8, 9)])) == {("incomplete", "published")}


def test_a_draw_that_many_runs_name_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = began(0, sites=3)
    keys = [site.key for site in made.sites]
    name, members = made.drawn(keys)
    for number in range(5):
        run = named("run", number)[:32]
        made.begin(run)
        made.commit(run, 1, [made.row(site, run, 1, verdict="late", charged=0) for site in made.sites], [members], name)
    read, real = list[str](), Transcript.from_dict

    def reading(value: dict[str, Any]) -> Transcript:
        read.append("x")
        return real(value)

    monkeypatch.setattr(Transcript, "from_dict", reading)
    assert ("violation", "draw") in check(made)
    assert read == ["x"]


def test_a_long_name_is_none_and_is_not_told_at_every_round() -> None:
    made = began(1)
    name = "a" * 99_000
    made.leaf("enrol", site=name, card=card_of(name, SigningKey.generate()))
    for number in (2, 3):
        made.round(number)
    made.close()
    got = audit(made.bundle, made.trust())
    assert ("violation", "leaf") in found(got)
    assert max(len(cell) for row in enrolled_table(got.history).rows for cell in row) < 200


def test_blocks_that_were_always_together_are_walked_as_one() -> None:
    made = Forged()
    made.begin()
    site = made.sites[0]
    for number, blocks in ((1, [1, 2, 3]), (2, [1, 2, 3, 4]), (3, [4])):
        rows = []
        for one in made.sites:
            told: dict[str, Any] = {"blocks": blocks, "admitted": [0.5] * len(blocks)} if one is site else {}
            made.train(one, RUN, number, **told)
            rows.append(made.row(one, RUN, number))
        made.commit(RUN, number, rows)
    made.close()
    got = audit(made.bundle, made.trust())
    assert found(got) == set()
    ledger = got.ledgers[site.id]
    walk = published._Walk(ledger, {RUN}, {})
    for number in (1, 2, 3):
        walk.up_to(named(RUN, number, site.id), -1)
    assert sorted(steps.total() for steps in walk.all.values()) == [40, 40]


@pytest.mark.parametrize(
    ("caps", "over"), [((10.0, 6.0, 50.0), True), ((10.0, 10.0, 50.0), False), ((10.0, 50.0, 6.0), True)]
)
def test_each_cap_of_a_site_with_two_logs_is_held_against_both(caps: tuple[float, ...], over: bool) -> None:
    """By the clock of the site, which is its own to mind: a later, larger cap hides no lower one."""
    made = Forged()
    made.begin()
    loud = ((1.0, 0.1, 100), (1.0, 0.1, 60), (30.0, 0.05, 1))

    def a_round(run: str, number: int, place: int) -> None:
        rows = []
        for site in made.sites:
            terms = loud[place] if site.name == "site-1" else TERMS
            made.train(site, run, number, terms, **({"cap": caps[place]} if site.name == "site-1" else {}))
            rows.append(made.row(site, run, number, terms))
        made.commit(run, number, rows)

    a_round(RUN, 1, 0)
    made.close()
    old, new = again(made)
    new.at = old.at
    made.begin(OTHER)
    a_round(OTHER, 1, 1)
    a_round(OTHER, 2, 2)
    made.close()
    bundle = replace(made.bundle, sites={**made.bundle.sites, old.id: old.log})
    got = audit(bundle, made.trust())
    assert (("incomplete", "cap") in found(got)) is over
    assert not [f for f in got.findings.found if f.code != "cap"]


@pytest.mark.parametrize("limit", ["MOST_KINDS", "MOST_ON_THE_WAY"])
def test_too_many_kinds_in_several_logs_are_not_worked_out_together(
    monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    made = began(1)
    made.close()
    old, new = again(made)
    new.at = old.at
    made.begin(OTHER)
    made.round(1, OTHER, (3.0, 0.05, 10))
    made.close()
    bundle = replace(made.bundle, sites={**made.bundle.sites, old.id: old.log})
    assert found(audit(bundle, made.trust())) == set()
    monkeypatch.setattr(several, limit, 1)
    got = audit(bundle, made.trust())
    assert any("not worked out together" in f.what for f in got.findings.found)


@pytest.mark.parametrize("last", [None, 1, 2])
def test_the_block_of_each_log_that_cost_most_by_then_counts(last: int | None) -> None:
    """A block that costs more later, under a larger cap, does not hide that another one was above its own."""
    made = Forged()
    made.begin()

    def a_round(run: str, number: int, terms: tuple[float, float, int], block: int, cap: float) -> None:
        rows = []
        for site in made.sites:
            first = site.name == "site-1"
            mine = terms if first else TERMS
            told: dict[str, Any] = {"cap": cap, "blocks": [block], "admitted": [0.5]} if first else {}
            made.train(site, run, number, mine, **told)
            rows.append(made.row(site, run, number, mine))
        made.commit(run, number, rows)

    a_round(RUN, 1, QUIET, 2, 6.0)
    made.close()
    old, new = again(made)
    new.at = old.at
    made.begin(OTHER)
    a_round(OTHER, 1, QUIET, 1, 6.0)
    if last is not None:
        a_round(OTHER, 2, LOUD, last, 50.0)
    made.close()
    got = audit(replace(made.bundle, sites={**made.bundle.sites, old.id: old.log}), made.trust())
    assert found(got) == {("incomplete", "cap")}
    assert "was 7.0467 of a cap of 6" in got.findings.found[0].what


def test_a_site_that_missed_the_end_of_a_run_and_is_in_another_needs_no_receipt_of_it() -> None:
    made = began(2)
    away = made.sites[2]
    for site in made.sites[:2]:
        made.show(site)
    made.owed.pop(away.id)
    made.begin(OTHER)
    for number in (1, 2):
        made.round(number, OTHER)
    assert check(made) == set()
    # In the middle of a run it does: what its next plan brought is here.
    made = began(2)
    made.train(away := made.sites[0], RUN, 3)
    away.events = [e for e in away.events if json.loads(e).get("event") != "receipt" or json.loads(e)["round"] != 1]
    made.close()
    assert ("incomplete", "no-receipt") in found(audit(made.bundle, made.trust()))
