"""The demo's partitions: every record at exactly one site, repeatable; and what the demo may remove."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from cloister.demo import MARK, Ask, clean, federation_toml
from cloister.demo_text import own_shares, split, synthetic_shares
from cloister_model.text import Record, Source
from cloister_server.federation import read_federation
from cloister_shared.errors import InputError
from hypothesis import given
from hypothesis import strategies as st

from support.server_calm import calm

LABELS = ("a", "b", "c")
ASK = Ask(None, None, "text", "label", 2, 3, "iid", 8.0, 6, 128, 7, "cpu", False)


def records(count: int, shops: int = 7) -> list[Record]:
    """Distinct records with a label and a field ``shop``."""
    return [Record(f"text {i}", LABELS[i % 3], (("shop", f"s{i * i % shops}"),)) for i in range(count)]


@given(
    st.integers(1, 60),
    st.integers(1, 6),
    st.sampled_from(["iid", "dirichlet:0.1", "dirichlet:1", "dirichlet:100", "field:shop"]),
    st.integers(0, 2**32),
)
@calm(120)
def test_every_record_is_at_exactly_one_site(count: int, sites: int, partition: str, seed: int) -> None:
    made = records(count)
    shops = len({dict(r.extra)["shop"] for r in made})
    if partition == "field:shop" and shops < sites:
        with pytest.raises(InputError, match="too few values"):
            split(made, sites, partition, seed, "here")
        return
    parts = split(made, sites, partition, seed, "here")
    assert len(parts) == sites
    assert Counter(r.text for part in parts for r in part) == Counter(r.text for r in made)
    assert parts == split(made, sites, partition, seed, "here")


def test_iid_deals_evenly() -> None:
    assert [len(p) for p in split(records(10), 3, "iid", 0, "here")] == [4, 3, 3]


def test_dirichlet_follows_its_seed_and_skews_labels() -> None:
    made = records(600)
    assert split(made, 4, "dirichlet:0.1", 1, "x") != split(made, 4, "dirichlet:0.1", 2, "x")

    def skew(alpha: str) -> float:
        parts = [p for p in split(made, 4, f"dirichlet:{alpha}", 3, "x") if p]
        return sum(max(Counter(r.label for r in p).values()) / len(p) for p in parts) / len(parts)

    assert skew("0.05") > skew("1000") + 0.2


def test_a_field_keeps_its_values_together_and_balances() -> None:
    parts = split(records(300), 3, "field:shop", 0, "x")
    homes = [{dict(r.extra)["shop"] for r in part} for part in parts]
    assert sum(map(len, homes)) == len(set().union(*homes))
    assert max(map(len, parts)) < 200


def test_a_field_that_a_record_lacks_is_named() -> None:
    with pytest.raises(InputError, match="'shop' is missing") as caught:
        split([*records(5), Record("x", "a")], 2, "field:shop", 0, "file.jsonl")
    assert caught.value.where == "file.jsonl"


BAD = "|x|iid:3|dirichlet|dirichlet:|dirichlet:0|dirichlet:-1|dirichlet:nan|dirichlet:inf|dirichlet:x|dirichlet:1e7"


@pytest.mark.parametrize("partition", [*BAD.split("|"), "field", "field:", "IID", "iid "])
def test_bad_partitions_are_refused(partition: str) -> None:
    with pytest.raises(InputError) as caught:
        split(records(9), 2, partition, 0, "x")
    assert caught.value.exit_code == 2
    assert "iid, dirichlet:ALPHA or field:NAME" in str(caught.value)


def test_a_tiny_alpha_still_keeps_every_record() -> None:
    parts = split(records(60), 4, "dirichlet:1e-9", 0, "x")
    assert sum(map(len, parts)) == 60


def write(path: Path, made: list[Record]) -> Source:
    """Records as JSONL."""
    path.write_text("".join(json.dumps({"text": r.text, "label": r.label} | dict(r.extra)) + "\n" for r in made))
    return Source(path, "text", "label")


def test_own_text_is_held_out_and_split(tmp_path: Path) -> None:
    source = write(tmp_path / "own.jsonl", records(200))
    shares = own_shares(source, 4, "iid", 5)
    assert shares == own_shares(source, 4, "iid", 5)
    assert shares != own_shares(source, 4, "iid", 6)
    assert (len(shares.held_out), shares.labels, shares.synthetic) == (20, LABELS, False)
    everything = [r.text for r in (*shares.held_out, *(r for s in shares.sites for r in s))]
    assert sorted(everything) == sorted(r.text for r in records(200))


def test_too_few_records_are_refused_with_the_site(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too few records") as caught:
        own_shares(write(tmp_path / "own.jsonl", records(30)), 5, "iid", 0)
    assert "site-" in caught.value.got
    assert caught.value.exit_code == 2


def test_one_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too few labels"):
        own_shares(write(tmp_path / "own.jsonl", [Record(f"t{i}", "a") for i in range(50)]), 2, "iid", 0)


def test_a_negative_seed_is_an_input_error_or_works(tmp_path: Path) -> None:
    with contextlib.suppress(InputError):
        own_shares(write(tmp_path / "own.jsonl", records(100)), 2, "iid", -1)


def test_synthetic_shares_are_repeatable() -> None:
    shares = synthetic_shares(2, 7)
    assert shares == synthetic_shares(2, 7)
    assert [len(s) for s in shares.sites] == [1500, 1500]
    assert (len(shares.held_out), len(shares.labels), shares.synthetic) == (400, 10, True)


def test_the_demos_settings_are_good(tmp_path: Path) -> None:
    shares = synthetic_shares(2, 7)
    (tmp_path / "f.toml").write_text(federation_toml(shares, ASK, 9000))
    federation = read_federation(tmp_path / "f.toml")
    assert (federation.task.labels, federation.epsilon, federation.rounds) == (shares.labels, 8.0, 3)
    assert federation.secure_group is None
    (tmp_path / "f.toml").write_text(federation_toml(shares, replace(ASK, secure=True), 9000))
    with pytest.raises(InputError, match="group"):
        read_federation(tmp_path / "f.toml")  # two sites make no group
    four = synthetic_shares(4, 7)
    (tmp_path / "f.toml").write_text(federation_toml(four, replace(ASK, secure=True), 9000))
    assert read_federation(tmp_path / "f.toml").secure_group == 4


def test_labels_with_quotes_survive_the_demos_settings(tmp_path: Path) -> None:
    odd = ('say "hi"', "back\\slash", "tab\there", "ünï", "new\nline")
    made = [Record(f"t{i}", odd[i % 5]) for i in range(200)]
    shares = own_shares(write(tmp_path / "own.jsonl", made), 2, "iid", 0)
    (tmp_path / "f.toml").write_text(federation_toml(shares, ASK, 9000))
    assert read_federation(tmp_path / "f.toml").task.labels == tuple(sorted(odd))


def test_a_folder_that_no_demo_made_is_kept(tmp_path: Path) -> None:
    (tmp_path / "coordinator").mkdir()
    (tmp_path / "coordinator" / "sign.key").write_bytes(b"secret")
    with pytest.raises(InputError, match="no demo made"):
        clean(tmp_path)
    assert (tmp_path / "coordinator" / "sign.key").read_bytes() == b"secret"


def test_an_earlier_demo_is_removed_and_said_so(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert clean(home) is None
    home.mkdir()
    assert clean(home) is None
    (home / MARK).write_text("made by cloister demo")
    (home / "sites").mkdir()
    note = clean(home)
    assert note is not None
    assert str(home) in note
    assert not home.exists()


def test_a_folder_named_like_the_mark_is_no_mark(tmp_path: Path) -> None:
    (tmp_path / MARK).mkdir()
    with pytest.raises(InputError):
        clean(tmp_path)
    assert (tmp_path / MARK).is_dir()
