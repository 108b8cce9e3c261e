"""A client's round over blocks and field-level units: what is charged, and what training sees."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cloister_client.data import add, load, open_ledger
from cloister_client.policy import read_policy
from cloister_client.round import Desk, execute
from cloister_client.site import Site, read_site
from cloister_client.site import enrol as make_site
from cloister_client.train import Trainer
from cloister_model.text import Source
from cloister_model.tokens import Encoded
from cloister_shared.cards import read_site_card
from cloister_shared.errors import InputError, RollbackError
from cloister_shared.privacy import epsilon
from cloister_shared.processes import free_port
from cloister_shared.sealing import Codec, Header

from support.client_world import BERT_TASK, LABELS, World, ask, make_world, open_answer, open_desk, policy_for, spec

ROUND = {"steps": 1, "sample_rate": 0.5, "expected_batch": 3.0, "noise_multiplier": 2.0}


@pytest.fixture(scope="module")
def world(tiny_bert: Path) -> World:
    """A coordinator of a classifier."""
    return make_world(tiny_bert, BERT_TASK)


def rows(folder: Path, name: str, patients: range, each: int) -> Path:
    path = folder / name
    lines = [
        {
            "text": f"visit {i} of patient {p}: the {'card' if p % 2 else 'parcel'} again",
            "label": LABELS[i % 3],
            "patient": f"P{p}",
        }
        for p in patients
        for i in range(each)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def enrolled(world: World, folder: Path, unit: str, cap: float = 8.0) -> Site:
    make_site(
        folder / "site", "site-1", world.card, policy_for(world.card, epsilon_cap=cap, least_cohort=1),
        base=str(world.base.path), records=6, runtime_port=free_port(), unit="field" if unit else "record", device="cpu", threads=1,
    )  # fmt: skip
    return read_site(folder / "site")


def desk_of(world: World, site: Site) -> Desk:
    policy = read_policy(site.home / "policy.toml")
    desk = open_desk(world, site, ())
    desk.policy, desk.ledger = policy, open_ledger(site, policy)
    desk.units = load(site, desk.ledger)
    return desk


def answer(world: World, desk: Desk, number: int, attempt: int = 1, **training: Any) -> tuple[Header, bytes]:
    core = world.core(desk.signing.verify_key.id, round=number, training=spec(**(ROUND | training)))
    asked = ask(world, desk.signing.verify_key.id, desk.opening, core, attempt=attempt)
    return open_answer(world, asked, execute(desk, asked.envelope), desk.signing)


def refused(found: tuple[Header, bytes]) -> str:
    assert found[0].codec == Codec.REFUSAL
    return str(json.loads(found[1])["rule"])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Encoded]:
    """What every round's trainer was given."""
    given: list[Encoded] = []
    run = Trainer.run

    def watch(self: Trainer, plan: Any, parent: Any, data: Encoded, progress: Any) -> Any:
        given.append(data)
        return run(self, plan, parent, data, progress)

    monkeypatch.setattr(Trainer, "run", watch)
    return given


def test_all_records_of_a_patient_are_one_unit(world: World, tmp_path: Path, seen: list[Encoded]) -> None:
    site = enrolled(world, tmp_path, "patient")
    assert read_site_card(site.home / "card.json").unit == "field"
    added = add(site, Source(rows(tmp_path, "a.jsonl", range(6), 4), "text", "label", "patient"))
    assert (added.records, added.units, added.new) == (24, 6, 6)
    desk = desk_of(world, site)
    assert answer(world, desk, 1, unit="field", unit_records=3)[0].codec == Codec.UPDATE_F32
    assert sorted(len(unit) for unit in seen[0].units) == [4] * 6
    assert desk.ledger.standing().epsilon == epsilon([spec(**ROUND).event], 1e-5)


def test_the_same_rows_under_new_ids_are_refused_until_the_owner_says_whose_they_are(
    world: World, tmp_path: Path, seen: list[Encoded]
) -> None:
    """A re-pseudonymised export: other ids, the same visits."""
    site = enrolled(world, tmp_path, "patient")
    path = rows(tmp_path, "a.jsonl", range(6), 4)
    source = Source(path, "text", "label", "patient")
    add(site, source)
    other = tmp_path / "again.jsonl"
    renamed = path.read_text().replace('"patient": "P', '"patient": "X')
    visit = {"text": "a visit that is new", "label": LABELS[0], "patient": "XX0"}
    other.write_text(renamed + json.dumps(visit) + "\n")
    before = open_ledger(site).units(), open_ledger(site).sources()
    with pytest.raises(InputError, match="known under other names") as refusal:
        add(site, replace(source, path=other))
    assert refusal.value.got == "6 of 7 new units"
    assert (open_ledger(site).units(), open_ledger(site).sources()) == before
    other.write_text(json.dumps(visit) + "\n" + json.dumps(visit | {"patient": "P0", "text": "one more of P0"}) + "\n")
    assert add(site, replace(source, path=other)).new == 1
    desk = desk_of(world, site)
    assert answer(world, desk, 1, unit="field", unit_records=9, sample_rate=1.0)[0].codec == Codec.UPDATE_F32
    assert sorted(len(unit) for unit in seen[0].units) == [1, 4, 4, 4, 4, 4, 5]
    other.write_text(renamed)
    assert add(site, replace(source, path=other), as_new=True).new == 6


def test_one_units_text_decides_nothing_about_the_others(world: World, tmp_path: Path) -> None:
    """Neighbours: with or without one patient, who said what many others say. All of the others are trained on either way."""
    common = "No complaints."
    found = []
    for with_one in (False, True):
        folder = tmp_path / str(with_one)
        folder.mkdir()
        site = enrolled(world, folder, "patient")
        source = Source(rows(folder, "a.jsonl", range(6), 4), "text", "label", "patient")
        if with_one:
            with source.path.open("a") as handle:
                handle.write(json.dumps({"text": common, "label": LABELS[0], "patient": "alice"}) + "\n")
        add(site, source)
        later = folder / "b.jsonl"
        lines = [
            {"text": text, "label": LABELS[0], "patient": f"Q{n}"}
            for n in range(5)
            for text in (common, f"visit of Q{n}", f"call of Q{n}")
        ]
        later.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert add(site, replace(source, path=later)).new == 5
        units = load(site, open_ledger(site))
        found.append(
            [
                units.records[i].text
                for unit, block in zip(units.units, units.blocks, strict=True)
                if block == 2
                for i in unit
            ]
        )
    assert found[0] == found[1]
    assert found[0].count(common) == 5


def test_texts_moved_by_hand_are_seen(world: World, tmp_path: Path) -> None:
    site = enrolled(world, tmp_path, "patient")
    add(site, Source(rows(tmp_path, "a.jsonl", range(6), 4), "text", "label", "patient"))
    with closing(sqlite3.connect(site.agent_home / "ledger.db")) as db:
        trigger = db.execute("SELECT sql FROM sqlite_master WHERE name = 'text_stays'").fetchone()[0]
        db.execute("DROP TRIGGER text_stays")
        db.execute("DELETE FROM text WHERE tag = (SELECT MIN(tag) FROM text)")
        db.execute(trigger)
        db.commit()
    with pytest.raises(RollbackError, match="changed by hand"):
        open_ledger(site)


def test_another_text_field_of_a_known_file_is_refused(world: World, tmp_path: Path) -> None:
    site = enrolled(world, tmp_path, "")
    path = rows(tmp_path, "a.jsonl", range(6), 1)
    add(site, Source(path, "text", "label"))
    with pytest.raises(InputError, match="another text field"):
        add(site, Source(path, "patient", "label"))
    assert [s.units for s in open_ledger(site).standings()] == [6]


def test_a_plan_for_another_unit_is_refused_before_anything_is_reserved(world: World, tmp_path: Path) -> None:
    site = enrolled(world, tmp_path, "patient")
    add(site, Source(rows(tmp_path, "a.jsonl", range(6), 4), "text", "label", "patient"))
    desk = desk_of(world, site)
    assert refused(answer(world, desk, 1)) == "policy.unit"
    other = enrolled(world, tmp_path / "other", "")
    add(other, Source(rows(tmp_path, "b.jsonl", range(6), 1), "text", "label"))
    records = desk_of(world, other)
    assert refused(answer(world, records, 1, unit="field", unit_records=2)) == "policy.unit"
    assert desk.ledger.standing().rounds == records.ledger.standing().rounds == 0


def test_a_block_that_is_spent_is_left_out_and_a_fresh_one_trains_on(
    world: World, tmp_path: Path, seen: list[Encoded]
) -> None:
    two = epsilon([replace(spec(**ROUND).event, steps=2)], 1e-5)
    site = enrolled(world, tmp_path, "", cap=two)
    add(site, Source(rows(tmp_path, "a.jsonl", range(6), 1), "text", "label"))
    desk = desk_of(world, site)
    assert [answer(world, desk, n)[0].codec for n in (1, 2)] == [Codec.UPDATE_F32] * 2
    assert refused(answer(world, desk, 3)) == "budget.epsilon_cap"
    add(site, Source(rows(tmp_path, "more.jsonl", range(10), 1), "text", "label"))
    desk = desk_of(world, site)
    assert answer(world, desk, 3, 2)[0].codec == Codec.UPDATE_F32
    assert [len(data.units) for data in seen] == [6, 6, 4]
    old, new = desk.ledger.standings()
    assert (old.rounds, old.epsilon, new.rounds) == (2, two, 1)
    assert new.epsilon == epsilon([spec(**ROUND).event], 1e-5)


@pytest.mark.parametrize("more", [0, 1])
def test_one_new_unit_does_not_decide_whether_there_is_an_answer(world: World, tmp_path: Path, more: int) -> None:
    """A reviewer's: with it a fresh block answered, without it a refusal did."""
    site = enrolled(world, tmp_path, "", cap=epsilon([spec(**ROUND).event], 1e-5))
    add(site, Source(rows(tmp_path, "a.jsonl", range(6), 1), "text", "label"))
    desk = desk_of(world, site)
    assert answer(world, desk, 1)[0].codec == Codec.UPDATE_F32
    assert refused(answer(world, desk, 2)) == "budget.epsilon_cap"
    assert add(site, Source(rows(tmp_path, "more.jsonl", range(6 + more), 1), "text", "label")).new == more
    assert answer(world, desk_of(world, site), 2, 2)[0].codec == Codec.UPDATE_F32


@pytest.mark.parametrize(
    "content",
    [
        "",
        json.dumps({"text": "others' words", "label": LABELS[0]}),
        json.dumps({"text": "others' words", "label": "weather"}),
        json.dumps({"text": " ", "label": LABELS[0]}),
        json.dumps({"body": "others' words", "label": LABELS[0]}),
    ],
    ids=["empty", "unregistered", "unknown label", "no text", "no field"],
)
def test_a_site_without_a_registered_record_answers_too(world: World, tmp_path: Path, content: str) -> None:
    """Reviewers': an agent that did not start told what one row was."""
    site = enrolled(world, tmp_path, "")
    path = rows(tmp_path, "a.jsonl", range(1), 1)
    add(site, Source(path, "text", "label"))
    path.write_text(content)
    desk = desk_of(world, site)
    assert (desk.units.records, desk.units.unregistered) == ((), int(bool(content)))
    assert answer(world, desk, 1)[0].codec == Codec.UPDATE_F32


def test_rows_that_were_not_registered_are_never_seen(world: World, tmp_path: Path, seen: list[Encoded]) -> None:
    site = enrolled(world, tmp_path, "")
    path = rows(tmp_path, "a.jsonl", range(6), 1)
    add(site, Source(path, "text", "label"))
    with path.open("a") as handle:
        handle.write(json.dumps({"text": "a stranger's words", "label": LABELS[0], "patient": "P9"}) + "\n")
        handle.write(
            json.dumps({"text": "VISIT 0 of  patient 1: the card again", "label": LABELS[1], "patient": "P9"}) + "\n"
        )
    desk = desk_of(world, site)
    assert (desk.units.unregistered, desk.units.copies) == (1, 1)
    assert answer(world, desk, 1, sample_rate=1.0)[0].codec == Codec.UPDATE_F32
    assert len(seen[0]) == len(seen[0].units) == 6
