"""Registered text: whatever its owner does to the files, a unit keeps its block and its spend, and only registered units are trained on."""

from __future__ import annotations

import csv
import json
import sqlite3
import time
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cloister_client import data_commands
from cloister_client.budget import Ledger
from cloister_client.data import Added, add, load, open_ledger, remove
from cloister_client.round import Desk, execute
from cloister_client.site import Site
from cloister_client.standing import Limits
from cloister_client.units import normalised, select, tag
from cloister_model.text import Record, Source
from cloister_shared import console
from cloister_shared.encoding import digest, write_durably
from cloister_shared.errors import InputError, RefusedError, StateError
from cloister_shared.privacy import epsilon
from cloister_shared.sealing import Codec
from cloister_shared.signing import read_secret
from hypothesis import given, settings
from hypothesis import strategies as st

from support.client_ledgers import DELTA, core
from support.client_world import (
    BERT_TASK,
    LABELS,
    World,
    ask,
    make_records,
    make_site,
    make_world,
    open_answer,
    open_desk,
    spec,
    write_records,
)

RECORDS = make_records(12)
UPDATE = "ab" * 32


@pytest.fixture(scope="module")
def world(tiny_bert: Path) -> World:
    """A coordinator of a classifier."""
    return make_world(tiny_bert, BERT_TASK)


@pytest.fixture
def site(world: World, tmp_path: Path) -> Site:
    """A site with a dozen records, and one round spent on them."""
    made = make_site(world, tmp_path / "site", write_records(tmp_path / "data.jsonl", RECORDS))
    with closing(open_ledger(made)) as ledger:
        ledger.spend(ledger.reserve(core(1, steps=2), 1000).entry, UPDATE)
    return made


def _add(site: Site, name: str, records: Iterable[Record], unit: str = "") -> Added:
    path = site.home.parent / name
    rows = ({"text": r.text, "label": r.label} | ({unit: r.unit} if unit else {}) for r in records)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["label", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return add(site, Source(path, "text", "label", unit))


def _same(text: str) -> str:
    return f"  {text.upper()}\t\n"


def _relabelled(records: Sequence[Record]) -> list[Record]:
    return [replace(r, label=LABELS[(LABELS.index(r.label) + 1) % 3]) for r in records]


CHANGES: dict[str, list[Record]] = {
    "renamed.jsonl": list(RECORDS),
    "reordered.jsonl": list(RECORDS[::-1]),
    "other.csv": list(RECORDS),
    "twice.jsonl": [*RECORDS, *RECORDS],
    "fewer.jsonl": list(RECORDS[3:5]),
    "case.jsonl": [replace(r, text=r.text.upper()) for r in RECORDS],
    "space.jsonl": [replace(r, text="\u00a0" + r.text.replace(" ", " \t ") + "\u2003") for r in RECORDS],
    "wide.jsonl": [
        replace(r, text="".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in r.text)) for r in RECORDS
    ],
    "invisible.jsonl": [replace(r, text="\ufeff" + r.text.replace("a", "a\u200b\u00ad")) for r in RECORDS],
    "relabelled.jsonl": _relabelled(RECORDS),
}


@pytest.mark.parametrize("name", CHANGES)
def test_known_units_keep_their_block_and_their_spend(site: Site, name: str) -> None:
    before = open_ledger(site).standings()
    added = _add(site, name, CHANGES[name])
    assert (added.new, added.block, added.units) == (0, "block-2", len({normalised(r.text) for r in CHANGES[name]}))
    after = open_ledger(site)
    kept, empty = after.standings()
    assert (kept,) == before
    assert (empty.units, empty.steps) == (0, 0)
    assert before[0].epsilon == epsilon([core(1, steps=2).training.event], 1e-5)
    units = load(site, after)
    assert len(units.units) == len(RECORDS)
    assert set(units.blocks) == {1}
    assert units.unregistered == 0


def test_a_text_in_another_unicode_form_is_the_same(site: Site) -> None:
    composed = [Record(f"café naïve Ångström № {n}", "billing") for n in range(3)]
    assert _add(site, "composed.jsonl", composed).new == 3
    for form in ("NFD", "NFKD", "NFKC"):
        changed = [replace(r, text=unicodedata.normalize(form, r.text)) for r in composed]
        assert _add(site, f"{form}.jsonl", changed).new == 0


def test_new_rows_make_a_new_block_with_a_history_of_its_own(site: Site) -> None:
    fresh = make_records(20, seed=9)
    grown = _add(site, "data.jsonl", [*fresh, *RECORDS])
    assert (grown.new, grown.block) == (len({normalised(r.text) for r in fresh}), "block-2")
    ledger = open_ledger(site)
    old, new = ledger.standings()
    assert (old.units, old.steps, new.units, new.steps, new.epsilon) == (12, 2, grown.new, 0, 0.0)
    ledger.spend(ledger.reserve(core(2, steps=3), 1000).entry, UPDATE)
    old, new = ledger.standings()
    assert (old.steps, new.steps) == (5, 3)
    units = load(site, ledger)
    assert sorted(units.blocks) == [1] * 12 + [2] * grown.new
    assert {normalised(r.text) for r in units.within([2])[0]} == {normalised(r.text) for r in fresh}


def test_a_block_whose_budget_is_used_up_is_left_out_and_a_new_one_goes_on(world: World, tmp_path: Path) -> None:
    event = spec().event
    cap = (epsilon([event] * 2, 1e-5) + epsilon([event] * 3, 1e-5)) / 2
    records = make_records(12, seed=3)
    site = make_site(world, tmp_path / "site", write_records(tmp_path / "a.jsonl", records[:6]), epsilon_cap=cap)
    signing, desk = _desk(world, site, epsilon_cap=cap)
    for number in (1, 2):
        assert _codec(world, desk, world.core(signing, round=number)) == Codec.UPDATE_F32
    assert _codec(world, desk, world.core(signing, round=3)) == Codec.REFUSAL
    desk.ledger.close()
    _add(site, "b.jsonl", records)
    signing, desk = _desk(world, site, epsilon_cap=cap)
    seen = _watch(desk)
    assert _codec(world, desk, world.core(signing, round=4, rounds=4)) == Codec.UPDATE_F32
    assert [s.steps for s in desk.ledger.standings()] == [4, 2]
    assert seen == [(2,)]


def _desk(world: World, site: Site, **policy: Any) -> tuple[bytes, Desk]:
    desk = open_desk(world, site, (), **policy)
    desk.units = load(site, desk.ledger)
    return desk.signing.verify_key.id, desk


def _watch(desk: Desk) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = []
    real = desk.text

    def text(task: Any, blocks: tuple[int, ...]) -> Any:
        seen.append(blocks)
        return real(task, blocks)

    desk.text = text  # type: ignore[method-assign]
    return seen


def _codec(world: World, desk: Desk, plan: Any) -> Codec:
    asked = ask(world, desk.signing.verify_key.id, desk.opening, plan)
    return open_answer(world, asked, execute(desk, asked.envelope), desk.signing)[0].codec


def test_what_is_not_registered_is_never_in_what_the_trainer_sees(world: World, site: Site) -> None:
    data = open_ledger(site).sources()[0].path
    strangers = [Record(f"stranger {n} ünregistered", "billing") for n in range(5)]
    write_records(data, [*strangers[:2], *RECORDS, *strangers[2:]])
    _, desk = _desk(world, site)
    assert desk.units.unregistered == 5
    with_all = desk.text(world.task, (1,))
    assert len(with_all.ids) == len(RECORDS)
    write_records(data, RECORDS)
    _, alone = _desk(world, site)
    assert alone.text(world.task, (1,)) == with_all
    assert alone.text(world.task, ()).ids == ()


def test_the_trainer_sees_the_blocks_that_were_paid_for_alone(world: World, site: Site) -> None:
    fresh = make_records(5, seed=77)
    _add(site, "more.jsonl", fresh)
    _, desk = _desk(world, site)
    first, second, both = (desk.text(world.task, blocks) for blocks in ((1,), (2,), (1, 2)))
    assert len(first.ids) == 12
    assert sorted(first.ids + second.ids) == sorted(both.ids)
    assert all(sum(len(unit) for unit in data.units) == len(data.ids) for data in (first, second, both))


PATIENTS = [Record(f"{name} said {n}", LABELS[n % 3], unit=name) for n in range(4) for name in ("Mär Kim", "p2", "p3")]


@pytest.fixture
def clinic(world: World, tmp_path: Path) -> Site:
    """A site whose unit is a patient."""
    folder = tmp_path / "clinic"
    folder.mkdir()
    made = make_site(world, folder / "site", write_records(folder / "none.jsonl", RECORDS))
    made.counter.unlink()
    for part in made.agent_home.glob("ledger.db*"):
        part.unlink()
    assert _add(made, "patients.jsonl", PATIENTS, "patient").new == 3
    return made


def test_all_records_of_a_patient_are_one_unit_however_the_name_is_written(clinic: Site) -> None:
    again = [replace(r, unit=_same(unicodedata.normalize("NFD", r.unit)), text=f"{r.text} later") for r in PATIENTS]
    added = _add(clinic, "later.jsonl", again, "patient")
    assert (added.records, added.units, added.new) == (12, 3, 0)
    units = load(clinic, open_ledger(clinic))
    assert sorted(map(len, units.units)) == [8, 8, 8]
    assert units.blocks == (1, 1, 1)
    for unit in units.units:
        assert len({normalised(units.records[i].unit) for i in unit}) == 1
    one, two = units.within([1]), units.within([2])
    assert len(one[0]) == 24
    assert two == ((), ())


@pytest.mark.parametrize(("unit", "rest"), [("", "record"), ("person", "person")])
def test_another_kind_of_unit_is_refused(clinic: Site, unit: str, rest: str) -> None:
    before = open_ledger(clinic)
    with pytest.raises(InputError, match="privacy unit is fixed") as refused:
        _add(clinic, "patients.jsonl", PATIENTS, unit)
    assert rest in refused.value.got
    assert "patient" in refused.value.expected
    assert open_ledger(clinic).units() == before.units()


def test_forgetting_the_files_does_not_change_the_unit_and_frees_nothing(clinic: Site) -> None:
    ledger = open_ledger(clinic)
    ledger.spend(ledger.reserve(core(1), 1000).entry, UPDATE)
    before = ledger.standings()
    path = ledger.sources()[0].path
    assert ledger.forget(path)
    assert not ledger.forget(path)
    assert ledger.sources() == ()
    assert ledger.unit_field() == "patient"
    with pytest.raises(InputError, match="privacy unit is fixed"):
        _add(clinic, "again.jsonl", PATIENTS)
    assert _add(clinic, "again.jsonl", PATIENTS, "patient").new == 0
    kept, empty = open_ledger(clinic).standings()
    assert (kept,) == before
    assert empty.units == 0


def test_a_file_that_was_renamed_is_registered_anew_and_the_old_name_removed(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = open_ledger(site)
    old = ledger.sources()[0].path
    new = old.rename(old.with_name("renamed.jsonl"))
    with pytest.raises(InputError, match="cannot read the file") as gone:
        load(site, ledger)
    assert f"data remove --site site-1 {old}" in gone.value.mend
    assert add(site, Source(new, "text", "label")).new == 0
    (site.home.parent / "sites").mkdir()
    (site.home.parent / "sites" / "site-1").symlink_to(site.home)
    monkeypatch.setattr(console, "OUTPUT", console.Output())
    data_commands.data_remove(old, home=site.home.parent)
    assert "each keeps its spend" in capsys.readouterr().out
    assert [s.path for s in ledger.sources()] == [new]
    assert len(load(site, ledger).units) == 12
    with pytest.raises(InputError, match="not registered"):
        remove(site, old)


def test_records_are_refused_by_a_site_of_records_with_a_unit(site: Site) -> None:
    with pytest.raises(InputError, match="privacy unit is fixed"):
        _add(site, "patients.jsonl", PATIENTS, "patient")


def test_the_keys_of_two_sites_make_other_tags_of_the_same_text(world: World, site: Site, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    other = make_site(world, tmp_path / "b" / "site", write_records(tmp_path / "b" / "data.jsonl", RECORDS))
    mine, theirs = open_ledger(site).units(), open_ledger(other).units()
    assert len(mine) == len(theirs) == 12
    assert not set(mine) & set(theirs)


def test_neither_ledger_nor_counter_holds_any_text_or_names(clinic: Site, site: Site) -> None:
    for here, records in ((site, RECORDS), (clinic, PATIENTS)):
        with closing(open_ledger(here)) as ledger:
            found = b"".join(p.read_bytes() for p in (*here.agent_home.glob("ledger.db*"), here.counter))
            assert len(ledger.units()) >= 3
        found += b"".join(p.read_bytes() for p in here.agent_home.glob("ledger.db*"))
        assert str(open_ledger(here).sources()[0].path).encode() in found, "the search should find what is there"
        plain = _keyless(records)
        for needle in {form for r in records for t in (r.text, r.unit) if t for form in (t, normalised(t))}:
            assert needle.encode() not in found
        for hashed in plain:
            assert hashed not in found


def _keyless(records: Iterable[Record]) -> set[bytes]:
    return {tag(b"", r) for r in records} | {tag(bytes(32), r) for r in records}


def test_a_field_and_a_text_of_the_same_letters_are_not_one_unit() -> None:
    assert tag(b"k", Record("same", "")) != tag(b"k", Record("other", "", unit="same"))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30))
def test_normalising_twice_changes_nothing_and_case_and_space_never_matter(text: str) -> None:
    once = normalised(text)
    assert normalised(once) == once
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert normalised(unicodedata.normalize(form, text)) == once
    assert normalised(f"\n {text}\u3000") == once
    assert normalised(text.casefold()) == once
    assert normalised("\u200b".join(text)) == once


def test_copies_are_trained_on_once_and_counted(site: Site) -> None:
    key = read_secret(site.agent_home / "unit.key", 32)
    known = open_ledger(site).units()
    found = select(key, [*RECORDS, *_relabelled(RECORDS), Record("a stranger", "billing")], known)
    assert (found.records, found.copies, found.unregistered) == (RECORDS, 12, 1)


def test_a_name_for_a_block_is_taken_once_and_the_next_is_found(site: Site) -> None:
    ledger = open_ledger(site)
    source = Source(Path("/x.jsonl"), "text", "label")
    assert ledger.register(source, [b"\1" * 32], "block-3") == ("block-3", 1)
    assert ledger.register(source, [b"\2" * 32]) == ("block-4", 1)
    with pytest.raises(InputError, match="block of this name"):
        ledger.register(source, [b"\3" * 32], "block-3")
    assert len(ledger.standings()) == 3


def test_two_blocks_and_a_period_hold_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counter").mkdir()
    two, three = (epsilon([core(1, steps=n).training.event], DELTA) for n in (2, 3))
    ledger = Ledger(tmp_path / "l.db", tmp_path / "counter" / "l", Limits(9.0, DELTA, 7, (two + three) / 2))
    source = Source(Path("/x.jsonl"), "text", "")
    ledger.register(source, [b"\1" * 32])
    ledger.reserve(core(1, steps=2), 1000)
    ledger.register(source, [b"\2" * 32])
    made = ledger.reserve(core(2), 1000)
    assert (made.blocks, made.left_out) == ((2,), (1,))
    with pytest.raises(RefusedError, match="any 7 days") as refused:
        ledger.reserve(core(3, steps=3), 1000)
    assert refused.value.rule == "budget.epsilon_cap"
    later = time.time() + 7.01 * 86_400
    monkeypatch.setattr("cloister_client.budget.time.time", lambda: later)
    assert ledger.reserve(core(3, steps=2), 1000).blocks == (1, 2)
    lifetime = [s.steps for s in ledger.standings()]
    assert lifetime == [4, 3]
    assert [s.period_epsilon for s in ledger.standings()] == [two, two]


def test_where_the_accountants_disagree_nothing_is_read_nothing_leaves_and_nothing_is_charged(
    world: World, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    signing, desk = _desk(world, site)
    seen, before = _watch(desk), desk.ledger.standing()
    asked = ask(world, signing, desk.opening, world.core(signing, round=3))

    def disagree(*_: object) -> float:
        raise StateError("the accountants disagree, so that neither is believed", got="PRV 0.1")

    with monkeypatch.context() as patched:
        patched.setattr("cloister_client.budget.epsilon", disagree)
        header, plain = open_answer(world, asked, execute(desk, asked.envelope), desk.signing)
    told = json.loads(plain)
    assert header.codec == Codec.REFUSAL
    assert told["rule"] == "budget.accountants"
    assert seen == []
    assert list(desk.kept.iterdir()) == []
    assert desk.ledger.standing() == before
    with closing(sqlite3.connect(desk.ledger.path)) as db:
        state, record = db.execute("SELECT state, record FROM entry ORDER BY id DESC LIMIT 1").fetchone()
        last = json.loads(db.execute("SELECT record FROM event ORDER BY seq DESC LIMIT 1").fetchone()[0])
    assert state == "void"
    assert record == asked.core.to_bytes()
    assert last["event"] == "void"
    asked = ask(world, signing, desk.opening, asked.core, attempt=2)
    assert open_answer(world, asked, execute(desk, asked.envelope), desk.signing)[0].codec == Codec.UPDATE_F32


def test_where_admission_itself_finds_them_to_disagree_nothing_is_even_reserved(
    world: World, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    signing, desk = _desk(world, site)
    seen, before = _watch(desk), desk.ledger.standing()
    asked = ask(world, signing, desk.opening, world.core(signing, round=3))

    def disagree(*_: object) -> float:
        raise StateError("the accountants disagree, so that neither is believed", got="PRV 0.1")

    with monkeypatch.context() as patched:
        patched.setattr("cloister_client.budget.admit", disagree)
        header, plain = open_answer(world, asked, execute(desk, asked.envelope), desk.signing)
    assert header.codec == Codec.REFUSAL
    assert json.loads(plain)["rule"] == "budget.accountants"
    assert seen == []
    assert desk.ledger.standing() == before


def test_a_process_that_dies_after_it_kept_the_update_spends_it_at_the_next_start(site: Site) -> None:
    ledger = open_ledger(site)
    kept = site.agent_home / "kept"
    plans = [core(n) for n in (2, 3)]
    for plan in plans:
        ledger.reserve(plan, 1000)
    write_durably(kept / f"{plans[0].digest}.f32", b"made")
    (kept / ".half.tmp").write_bytes(b"ma")
    assert ledger.close_open(kept) == 1
    assert ledger.spent_on(plans[0].digest) is not None
    assert ledger.spent_on(plans[1].digest) is None
    assert [p.name for p in kept.iterdir()] == [f"{plans[0].digest}.f32"]
    assert digest(b"made") == ledger.spent_on(plans[0].digest)
