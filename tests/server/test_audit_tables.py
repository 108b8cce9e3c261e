"""The report's tables and its charts, over histories made by hand."""

from __future__ import annotations

import csv
import io
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


def block(name: str, *spent: float) -> Block:
    points = tuple(Point(0.0, n, e, e) for n, e in enumerate(spent, 1))
    last = spent[-1] if spent else 0.0
    return Block("i", name, 1, last, last, 1e-5, 8.0, len(spent), len(spent), 3, points, (), (), True)


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_charts_stay_within_their_frames(count: int) -> None:
    page = budgets([block("one", *(0.01 * n for n in range(1, count + 1)))])
    assert ">0</text>" in page
    assert f">{count}</text>" in page or count in (7, 1000)
    assert ">charges<" in page
    scored = accuracies(
        History(commits=[commit(n, n, asked("one", epsilon=n / 7), accuracy=2.0) for n in range(1, count + 1)])
    )
    assert scored.count("<circle") == count
    assert 'cy="30.0"' in scored


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
