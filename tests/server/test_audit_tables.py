"""The report's tables and its charts, over histories made by hand."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from typing import Any

import pytest
from cloister_shared.audit.budget import Block, Point
from cloister_shared.audit.charts import accuracies, budgets
from cloister_shared.audit.federation import Asked, History, RoundCommit
from cloister_shared.audit.findings import Findings
from cloister_shared.audit.page import as_csv, as_html
from cloister_shared.audit.report import Answer
from cloister_shared.audit.sites import Ledger
from cloister_shared.audit.tables import Table, caps_table, code_table, enrolled_table, rounds_table, spans
from hypothesis import given
from hypothesis import strategies as st

RUN = "ab" * 16


def asked(name: str, **changes: Any) -> Asked:
    terms: dict[str, Any] = {
        "client": name * 4, "name": name, "plan": "00", "verdict": "accepted", "update": "11", "noise_multiplier": 1.0,
        "sample_rate": 0.1, "steps": 3, "delta": 1e-5, "epsilon": 1.0, "charged": 1, "head": "",
    }  # fmt: skip
    return Asked(**terms | changes)


def commit(index: int, number: int, *clients: Asked, accuracy: float | None = None) -> RoundCommit:
    metrics = {} if accuracy is None else {"accuracy": accuracy}
    return RoundCommit(index, RUN, number, f"a{number}", f"a{number - 1}", clients, (), "", metrics)


def history() -> History:
    leaf: dict[str, Any] = {"run": RUN, "code": "1.0", "lock": "c" * 64, "base": "d" * 64, "settings": "e" * 64}
    records: list[dict[str, Any]] = [
        {"kind": "enrol", "site": "one"},
        {"kind": "enrol", "site": "two"},
        {"kind": "policy", **leaf},
        {"kind": "round_commit", **leaf},
        {"kind": "round_commit", **leaf},
        {"kind": "revoke", "site": "two"},
        {"kind": "round_commit", **leaf | {"code": "2.0"}},
    ]
    commits = [
        commit(3, 1, asked("one"), asked("two", noise_multiplier=2.0, epsilon=3.0), accuracy=0.5),
        commit(4, 2, asked("one"), asked("two", verdict="late", update="")),
        commit(6, 3, asked("one"), asked("two", verdict="absent", charged=0, update="")),
    ]
    return History(records=records, commits=commits)


def test_rounds_tell_who_is_in_them_who_was_charged_besides_and_their_noise() -> None:
    table = rounds_table(history(), {})
    assert [row[1:5] for row in table.rows] == [
        ("3", "one, two", "", "1 to 2"),
        ("4", "one", "two", "1"),
        ("6", "one", "", "1"),
    ]
    assert [row[-2:] for row in table.rows] == [("3.0000", "0.500"), ("1.0000", ""), ("1.0000", "")]


def test_code_tells_which_rounds_were_made_with_it() -> None:
    assert [(row[0], row[2]) for row in code_table(history()).rows] == [("0 to 2", "1.0"), ("3", "2.0")]


def test_enrolment_is_as_it_was_at_each_round() -> None:
    assert [(row[0], row[2]) for row in enrolled_table(history()).rows] == [("1 to 2", "one, two"), ("3", "one")]


def test_every_cap_that_a_site_set_is_a_row() -> None:
    ledger = Ledger("i" * 32, "one", "log", (), 2)
    ledger.caps += [(0.0, 3.0, 1e-5), (86400.0, 8.0, 1e-5)]
    assert [(row[0], row[1], row[3][:10]) for row in caps_table([ledger]).rows] == [
        ("one", "3", "1970-01-01"),
        ("one", "8", "1970-01-02"),
    ]


@given(st.lists(st.integers(0, 40)))
def test_spans_tell_each_number_once(numbers: list[int]) -> None:
    told = set[int]()
    for part in filter(None, spans(numbers).split(", ")):
        low, _, high = part.partition(" to ")
        mine = set(range(int(low), int(high or low) + 1))
        assert not told & mine
        told |= mine
    assert told == set(numbers)


def test_a_long_table_is_cut_on_the_page_and_says_so() -> None:
    table = Table(("n",), tuple((f"row-{n}",) for n in range(600)))
    page = as_html([Answer("q", (), table)], Findings(), [], History(), "x", {})
    assert "row-499<" in page
    assert "row-500<" not in page
    assert "100 rows more" in page


def test_the_same_of_many_places_is_one_row() -> None:
    findings = Findings()
    for n in range(30):
        findings.violation("leaf-signature", f"leaf {n}", "not signed")
    page = as_html([], findings, [], History(), "x", {})
    assert page.count("not signed") == 1
    assert "leaf 11 and 18 more" in page


def block(name: str, *spent: float, every: float = 0.0, begun: float = 0.0) -> Block:
    points = tuple(Point(begun + n * every, n, e, e) for n, e in enumerate(spent))
    last = spent[-1] if spent else 0.0
    return Block("i", name, 1, last, last, 1e-5, 8.0, len(spent), len(spent), 3, points, (), (), True)


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
@pytest.mark.parametrize("every", [0.0, 0.01, 1.0, 61.0, 5e4, 4e6, 1e14])
def test_charts_stay_within_their_frames(count: int, every: float) -> None:
    page = budgets([block("one", *(0.01 * n for n in range(1, count + 1)), every=every)])
    assert ">0</text>" in page
    assert ">UTC, by the sites' clocks, from 1970-01-01 00:00<" in page
    [line] = re.findall(r'<polyline points="([^"]*)"', page)
    places = [tuple(map(float, place.split(","))) for place in line.split()]
    assert all(50 <= x <= 690 and 30 <= y <= 250 for x, y in places)
    assert places == sorted(places, key=lambda place: place[0])
    marks = [float(x) for x in re.findall(r'<text x="([0-9.]+)" y="267', page)]
    assert 1 <= len(marks) <= 6
    assert all(50 <= x <= 690 for x in marks)
    scored = accuracies(
        History(commits=[commit(n, n, asked("one", epsilon=n / 7), accuracy=2.0) for n in range(1, count + 1)])
    )
    assert scored.count("<circle") == count
    assert 'cy="30.0"' in scored


def test_budgets_are_drawn_over_time_in_steps() -> None:
    """Two charges, a day and then nine days after the first: the line stands between them, and each mark is a date."""
    day, begun = 86400.0, 1_767_225_600.0  # 2026-01-01
    one = block("one", 1.0, 2.0, begun=begun)
    one = replace(
        one, points=(one.points[0], replace(one.points[1], at=begun + day), Point(begun + 10 * day, 2, 4.0, 4.0))
    )
    page = budgets([one])
    assert re.findall(r">(2026-[^<]*)<", page) == [f"2026-01-{n:02}" for n in (1, 3, 5, 7, 9, 11)]
    at = {0.0: 50.0, 1.0: 114.0, 10.0: 690.0}
    up = {spent: round(250 - spent / 8 * 220, 1) for spent in (0.0, 1.0, 2.0, 4.0)}
    steps = [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 2.0), (10.0, 2.0), (10.0, 4.0), (10.0, 4.0)]
    assert f'points="{" ".join(f"{at[x]:.1f},{up[y]:.1f}" for x, y in steps)}"' in page


def test_sites_that_were_charged_together_are_one_line_and_others_are_not() -> None:
    charged = [1.0, 2.0, 3.0]
    page = budgets(
        [
            block("one", *charged, every=1000.0),
            block("two", *charged, every=1000.0, begun=5.0),
            block("late", *charged, every=1000.0, begun=500.0),
        ]
    )
    assert page.count("<polyline") == 2
    assert ">one block 1, two block 1<" in page
    assert ">late block 1<" in page


def test_a_chart_of_many_histories_draws_those_that_spent_most_and_says_how_many_more_there_are() -> None:
    page = budgets([block(f"s{n}", 0.1 * n) for n in range(1, 41)])
    assert page.count("<polyline") == 30
    assert "and 10 histories that spent no more" in page
    assert ">s40 block 1<" in page
    assert ">s1 block 1<" not in page


def test_rows_for_spreadsheets_tell_verdict_federation_and_how_much_was_found() -> None:
    findings = Findings()
    findings.violation("cap", "site one", "above")
    findings.incomplete("head", "site two", "missing")
    rows = list(csv.DictReader(io.StringIO(as_csv(findings, [block("=one", 1.0, 2.0)], "f 00"))))
    assert [(r["verdict"], r["federation"], r["violations"], r["forks"], r["incomplete"]) for r in rows] == [
        ("VIOLATION", "f 00", "1", "0", "1")
    ] * 2
    # A name is no formula.
    assert {r["site"] for r in rows} == {"'=one"}
