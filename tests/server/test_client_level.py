"""Client-level noise at the aggregator: sensitivity, the noise that really goes in, dropouts, and a charge that always comes first."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cloister_server.accounting import charge, client_level_line, client_level_statement, foresee
from cloister_server.aggregation import clipped_sum, noised_mean
from cloister_server.export import export_round
from cloister_server.federation import ClientLevel, read_federation
from cloister_server.progress import event_line
from cloister_server.round_commands import round_rows
from cloister_server.rounds import one_round, run_rounds
from cloister_server.run import find_unfinished
from cloister_server.store import Store
from cloister_server.tables import NoisedSum, Round
from cloister_shared.errors import InputError, RefusedError, StateError, VerificationError
from cloister_shared.plan import PlanCore
from cloister_shared.privacy import DpSgd, epsilon
from cloister_shared.signing import SigningKey
from cloister_shared.vectors import F32, clipped, from_safetensors, vector_from_bytes
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from support.registry import a_model, blob_path
from support.server_calm import calm
from support.server_world import Loopback, World, make_world, write_federation

NOISE, CLIP = 2.0, 0.02
SETTINGS = {
    "delta": f"delta = 1e-5\n[privacy.client_level]\nnoise_multiplier = {NOISE}\nclipping_norm = {CLIP}\nepsilon_cap = 50",
}


def cost(sums: int, noise: float = NOISE) -> float:
    """What so many sums cost, by the accountant and by nothing of ours."""
    return epsilon([DpSgd(noise, 1.0, sums)], 1e-5)


# The array functions

HUGE = float(np.float32(1e30))
NUMBERS = st.floats(-HUGE, HUGE, width=32)
ROWS = st.integers(0, 5).flatmap(lambda n: hnp.arrays(np.float32, (n, 4), elements=NUMBERS))


@given(ROWS, st.floats(1e-3, 1e3), st.integers(0, 4))
@calm(200)
def test_one_client_moves_the_sum_by_the_clip_at_most(rows: F32, bound: float, which: int) -> None:
    """Add/remove: with and without any one row, whatever the others are, and however large it is."""
    total = clipped_sum(rows, bound)
    assert total.dtype == np.float64
    if len(rows):
        without = clipped_sum(np.delete(rows, which % len(rows), axis=0), bound)
        assert np.linalg.norm(total - without) <= bound * (1 + 1e-9)


@given(ROWS, st.floats(1e-3, 1e3))
@calm()
def test_the_clipped_sum_equals_the_oracle(rows: F32, bound: float) -> None:
    wanted = np.zeros(4)
    for row in rows.astype(np.float64):
        norm = math.sqrt(math.fsum(float(x) ** 2 for x in row))
        wanted += row * min(1.0, bound / norm) if norm else row
    np.testing.assert_allclose(clipped_sum(rows, bound), wanted, rtol=1e-9, atol=1e-9 * bound)


@given(hnp.arrays(np.float32, 6, elements=NUMBERS), st.floats(1e-3, 1e3))
@calm()
def test_a_clip_keeps_the_direction_and_what_is_short(vector: F32, bound: float) -> None:
    got = clipped(vector, bound)
    assert got.dtype == np.float32
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if norm <= bound:
        assert np.array_equal(got, vector)
    else:
        assert float(np.linalg.norm(got.astype(np.float64))) <= bound * (1 + 1e-6)
        np.testing.assert_allclose(got, vector * (bound / norm), rtol=1e-5, atol=1e-6 * bound)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_passes_no_clip(bad: float) -> None:
    rows = np.zeros((2, 3), dtype=np.float32)
    rows[1, 1] = bad
    with pytest.raises(VerificationError, match="finite"):
        clipped_sum(rows, 1.0)


def test_more_updates_than_were_planned_are_refused() -> None:
    with pytest.raises(VerificationError, match="cohort"):
        noised_mean(np.zeros((3, 2), dtype=np.float32), 1.0, 1.0, 2)


@pytest.mark.parametrize("participants", [0, 1, 7, 10])
def test_the_noise_belongs_to_the_sum_and_no_dropout_thins_it(participants: int) -> None:
    """Whoever stays away: the noise on the released mean is noise_multiplier * clip / planned, on every element."""
    size, planned, noise_multiplier, bound = 200_000, 10, 1.7, 0.5
    rows = np.zeros((participants, size), dtype=np.float32)
    rows[:, 0] = 3.0
    got = noised_mean(rows, bound, noise_multiplier, planned)
    assert got[0] == pytest.approx(participants * bound / planned, abs=6 * noise_multiplier * bound / planned)
    rest, std = got[1:], noise_multiplier * bound / planned
    assert abs(rest.mean()) < 5 * std / math.sqrt(size)
    assert abs(rest.std() / std - 1) < 5 / math.sqrt(2 * size)
    for part in np.array_split(rest, 20):
        assert abs(part.std() / std - 1) < 5.5 / math.sqrt(2 * len(part))


def test_two_noised_means_of_one_sum_share_no_noise() -> None:
    rows = np.zeros((2, 100_000), dtype=np.float32)
    one, two = (noised_mean(rows, 1.0, 1.0, 2) for _ in range(2))
    assert abs(np.corrcoef(one, two)[0, 1]) < 5 / math.sqrt(100_000)


# Settings


def test_settings_are_read(tmp_path: Path) -> None:
    federation = read_federation(write_federation(tmp_path / "F.toml", tmp_path, **SETTINGS))
    assert federation.client_level == ClientLevel(NOISE, CLIP, 1e-5, 50)
    assert read_federation(write_federation(tmp_path / "G.toml", tmp_path)).client_level is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"[aggregation]": '[aggregation]\nrule = "exact"'}, "sensitivity"),
        ({"delta": SETTINGS["delta"].replace("noise_multiplier = 2.0", "noise_multiplier = 0")}, "noise_multiplier"),
        ({"delta": SETTINGS["delta"].replace("noise_multiplier = 2.0\n", "")}, "noise_multiplier"),
        ({"delta": SETTINGS["delta"].replace("0.02", "nan")}, "clipping_norm"),
        ({"delta": SETTINGS["delta"].replace("0.02", "0")}, "clipping_norm"),
        ({"delta": SETTINGS["delta"].replace("epsilon_cap = 50", "")}, "epsilon_cap"),
        ({"delta": SETTINGS["delta"].replace("50", "inf")}, "epsilon_cap"),
        ({"delta": SETTINGS["delta"] + "\nclip = 1"}, "clip"),
        ({"delta": SETTINGS["delta"] + "\ndelta = 1.0"}, "delta"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, changes: dict[str, str], word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        read_federation(write_federation(tmp_path / "F.toml", tmp_path, **(SETTINGS | changes)))
    assert "client_level" in caught.value.where


@pytest.mark.parametrize("other", [None, ClientLevel(1.0, CLIP, 1e-5, 50), ClientLevel(NOISE, 1.0, 1e-5, 50)])
def test_a_run_is_not_resumed_with_other_noise(noised: World, other: ClientLevel | None) -> None:
    federation = noised.coordinator.federation
    raised = replace(federation, client_level=ClientLevel(NOISE, CLIP, 1e-5, 90))
    assert find_unfinished(noised.store, noised.schema.digest, raised, noised.run.base).id == noised.run.id
    with pytest.raises(InputError, match="client-level noise"):
        find_unfinished(noised.store, noised.schema.digest, replace(federation, client_level=other), noised.run.base)


# Rounds


@pytest.fixture
def noised(tmp_path: Path, tiny_bert: Path) -> Iterator[World]:
    """Three sites, three rounds, noise at the aggregator."""
    made = make_world(tmp_path, tiny_bert, settings=SETTINGS)
    yield made
    made.store.close()


def adapter(world: World, number: int) -> F32:
    """A registered round's vector."""
    row = next(r for r in world.store.rounds(world.run.id) if r.number == number)
    return from_safetensors(world.store.adapter(row.adapter or ""), world.schema, "test")


def sent(world: World) -> F32:
    """What the sites sent last, ``(n, d)``."""
    kept = [p for _, desk in sorted(world.desks.items()) for p in desk.kept.glob("*.f32")]
    return np.stack([vector_from_bytes(p.read_bytes(), world.schema, "kept") for p in kept])


class Spy:
    """A judge that remembers what it was shown, and what was charged by then."""

    def __init__(self, store: Store, *, dies: bool = False) -> None:
        self.store, self.dies = store, dies
        self.seen: list[tuple[F32, int]] = []

    def judge(self, vector: F32) -> tuple[dict[str, float], float]:
        """Looks."""
        self.seen.append((vector, len(self.store.noised_sums())))
        if self.dies:
            raise KilledError
        return {}, 0.0


class KilledError(Exception):
    """The coordinator's death."""


def silent(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
    """Says nothing."""


@pytest.mark.parametrize("away", [(), (300,)])
def test_the_committed_adapter_carries_the_stated_noise(noised: World, away: tuple[int, ...]) -> None:
    """On the real thing: adapter minus (parent plus clipped sum over planned) is the noise, and its size does not depend on who came."""
    spy = Spy(noised.store)
    noised.link.behaviours = dict.fromkeys(away, silent)
    one_round(replace(noised.context(), judge=spy), noised.link, 1)
    rows = sent(noised)
    assert len(rows) == 3 - len(away)
    # The site clips to the same bound, so that a coordinator that forgot would still have it.
    assert np.linalg.norm(rows.astype(np.float64), axis=1).max() <= CLIP * (1 + 1e-6)
    drawn = (adapter(noised, 1).astype(np.float64) - adapter(noised, 0)) * 3 - clipped_sum(rows, CLIP)
    std, size = NOISE * CLIP, len(drawn)
    assert abs(drawn.std() / std - 1) < 5 / math.sqrt(2 * size)
    for name, part in noised.schema.split(drawn.astype(np.float32)).items():
        if part.size >= 32:
            assert abs(part.std() / std - 1) < 5 / math.sqrt(2 * part.size), name
    # Judged once, after the charge, and only what was noised.
    ((shown, charged),) = spy.seen
    assert np.array_equal(shown, adapter(noised, 1))
    assert charged == 1
    (row,) = noised.store.noised_sums()
    assert (row.run, row.number, row.attempt) == (noised.run.id, 1, 1)
    assert (row.planned, row.participants) == (3, 3 - len(away))
    assert json.loads(row.clients) == sorted(m.id for m in noised.members if m.node not in away)
    assert row.noise_std == std
    assert row.epsilon == cost(1)


def test_plans_weigh_all_the_same_and_tell_the_bound(noised: World) -> None:
    heavy = replace(noised.members[0], card=replace(noised.members[0].card, records=1000))
    one_round(noised.context(members=(heavy, *noised.members[1:])), noised.link, 1)
    cores = [PlanCore.from_dict(json.loads(c.core)) for c in noised.store.clients(noised.run.id, 1)]
    assert {(c.weight, c.update_norm, c.rule) for c in cores} == {(1.0, CLIP, "average")}


def test_rounds_compose_over_rounds_and_runs_of_the_federation(noised: World) -> None:
    run_rounds(noised.context(), noised.link)
    assert [s.epsilon for s in noised.store.noised_sums()] == [cost(1), cost(2), cost(3)]
    again = noised.run.model_dump() | {"id": "ee" * 16}
    noised.store.start_run(type(noised.run)(**again), b"x", a_model())
    level = noised.coordinator.federation.client_level
    assert level is not None
    assert foresee(noised.store, level, 2) == (cost(3), cost(5))
    row = Round(run="ee" * 16, number=1, opened=1.0)
    assert charge(noised.store, level, row, 3, ["a"]).epsilon == cost(4)
    said = client_level_statement(noised.store)
    assert said is not None
    assert (said["epsilon"], said["sums"], said["uncovered"]) == (cost(4), 4, 0)


def test_the_charge_is_durable_before_the_noise_is_drawn(noised: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(count: int, std: float) -> Any:
        assert Store(noised.coordinator.home).noised_sums()[0].epsilon == cost(1)
        raise KilledError

    monkeypatch.setattr("cloister_server.aggregation.noise", SimpleNamespace(gaussian=dying))
    blobs = sorted(blob_path(noised.store, "00" * 32).parent.parent.rglob("*"))
    with pytest.raises(KilledError):
        one_round(noised.context(), noised.link, 1)
    assert sorted(blob_path(noised.store, "00" * 32).parent.parent.rglob("*")) == blobs
    assert len(noised.store.noised_sums()) == 1


def test_a_round_lost_after_its_noise_is_charged_again_for_another_sum(noised: World) -> None:
    """Two noisy sums of the same updates are two releases; the sites, whose bytes are the same, are charged once."""
    spy = Spy(noised.store, dies=True)
    with pytest.raises(KilledError):
        one_round(replace(noised.context(), judge=spy), noised.link, 1)
    first = sent(noised)
    one_round(noised.context(), noised.link, 1)
    assert np.array_equal(sent(noised), first)
    assert [noised.charged(n) for n in noised.desks] == [1, 1, 1]
    assert not np.array_equal(spy.seen[0][0], adapter(noised, 1))
    assert [(s.number, s.attempt, s.epsilon) for s in noised.store.noised_sums()] == [(1, 1, cost(1)), (1, 2, cost(2))]
    said = client_level_statement(noised.store)
    assert said is not None
    assert said["epsilon"] == cost(2)


def test_a_round_without_enough_clients_draws_and_charges_nothing(noised: World) -> None:
    noised.link.behaviours = {200: silent, 300: silent}
    with pytest.raises(RefusedError):
        one_round(noised.context(), noised.link, 1)
    assert noised.store.noised_sums() == []
    assert client_level_statement(noised.store) is None


def test_an_attempt_never_draws_twice(noised: World) -> None:
    level = noised.coordinator.federation.client_level
    assert level is not None
    row = Round(run=noised.run.id, number=1, attempt=1, opened=1.0)
    charge(noised.store, level, row, 3, ["a"])
    with pytest.raises(StateError, match="drawn for this attempt before"):
        charge(noised.store, level, row, 3, ["a"])
    assert len(noised.store.noised_sums()) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE noised_sum SET noise_multiplier = 99",
        "DELETE FROM noised_sum",
        "INSERT OR REPLACE INTO noised_sum SELECT run, number, attempt, 0, 99, 0, 0, 0, 0, '', 0.1, 0 FROM noised_sum",
    ],
)
def test_a_charge_stays(noised: World, statement: str) -> None:
    import sqlite3

    level = noised.coordinator.federation.client_level
    assert level is not None
    charge(noised.store, level, Round(run=noised.run.id, number=1, attempt=1, opened=1.0), 3, ["a"])
    with sqlite3.connect(noised.store.home / "registry.db") as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute(statement)
    connection.close()
    assert noised.store.noised_sums()[0].noise_multiplier == NOISE


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.floats(0.5, 8))
@calm(25)
def test_the_cap_holds_and_the_ledger_is_the_accountants(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[int], cap: float
) -> None:
    """Any sequence of rounds and attempts: what is charged is the accountant's, never above the cap, and refused only where it would be."""
    home = tmp_path_factory.mktemp("r")
    SigningKey.generate().save(home / "sign.key")
    store = Store(home)
    store.start_run(_run(), b"x", a_model())
    level, done = ClientLevel(NOISE, CLIP, 1e-5, cap), 0
    for number, attempts in enumerate(wanted, 1):
        for attempt in range(1, attempts + 1):
            row = Round(run="ab" * 16, number=number, attempt=attempt, opened=1.0)
            if cost(done + 1) <= cap:
                assert charge(store, level, row, 2, ["a"]).epsilon == cost(done + 1)
                done += 1
            else:
                with pytest.raises(RefusedError, match="client-level budget"):
                    charge(store, level, row, 2, ["a"])
    assert len(store.noised_sums()) == done
    store.close()


def _run() -> Any:
    from cloister_server.tables import Run

    texts = dict.fromkeys(("federation", "base", "task", "rule", "tensors", "config", "code"), "{}")
    return Run.model_validate(texts | {"id": "ab" * 16, "created": 1.0, "rounds": 9})


def test_a_round_past_the_cap_is_refused_before_a_site_spends_on_it(noised: World) -> None:
    context = noised.context()
    level = ClientLevel(NOISE, CLIP, 1e-5, (cost(1) + cost(2)) / 2)
    context = replace(context, federation=replace(context.federation, client_level=level))
    one_round(context, noised.link, 1)
    with pytest.raises(RefusedError) as caught:
        one_round(context, noised.link, 2)
    assert caught.value.rule == "federation.epsilon_cap"
    assert list(noised.link.sent) == ["1.1"]
    assert [noised.charged(n) for n in noised.desks] == [1, 1, 1]
    with pytest.raises(RefusedError, match="3 more rounds"):
        foresee(noised.store, level, 3)


def test_two_coordinators_do_not_both_take_the_last_of_the_budget(tmp_path: Path) -> None:
    SigningKey.generate().save(tmp_path / "sign.key")
    store = Store(tmp_path)
    store.start_run(_run(), b"x", a_model())

    def slowly(sums: list[NoisedSum]) -> float:
        """The accountant on a busy machine: whoever reads before another has written would see the same budget."""
        time.sleep(0.05)
        if len(sums) > 3:
            raise RefusedError("federation.epsilon_cap", "too much")
        return cost(len(sums))

    def one(number: int) -> bool:
        row = NoisedSum(
            run="ab" * 16,
            number=number,
            attempt=1,
            charged=time.time(),
            noise_multiplier=NOISE,
            clipping_norm=CLIP,
            noise_std=NOISE * CLIP,
            planned=2,
            participants=1,
            clients="[]",
            delta=1e-5,
        )
        try:
            Store(tmp_path).charge_noised_sum(row, slowly)
        except RefusedError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(one, range(1, 17))) == 3
    assert sorted(s.epsilon for s in store.noised_sums()) == [cost(1), cost(2), cost(3)]
    store.close()


# What is told


def test_the_commands_show_both_statements(noised: World) -> None:
    one_round(noised.context(), noised.link, 1)
    home = ["--home", str(noised.coordinator.home.parent), "rounds"]

    def said(*arguments: str) -> str:
        command = [sys.executable, "-m", "cloister.cli", *home, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    statement = client_level_statement(noised.store)
    assert statement is not None
    for arguments in (("list",), ("show", "1")):
        lines = said(*arguments)
        assert client_level_line(statement) in lines
        assert "record level: the table's epsilons" in lines
    assert "attempt 1, 3 of 3 clients in the sum, noise 0.04 on it" in lines.replace("\n", " ")
    record = json.loads(said("list", "--json"))
    assert record["client_level"] == statement
    assert record["rounds"][1]["client_level"][0]["noise_std"] == NOISE * CLIP
    assert json.loads(said("show", "1", "--json"))["client_level_statement"] == statement


def test_the_two_statements_are_told_apart(noised: World, tmp_path: Path) -> None:
    noised.link.behaviours = {300: silent}
    one_round(noised.context(), noised.link, 1)
    (_, event) = next(e for e in noised.events if e[0] == "committed")
    line = event_line("committed", {"rounds": 3} | event) or ""
    assert "client level: attempt 1, 2 of 3 clients in the sum, noise 0.04 on it" in line
    row = round_rows(noised.store, noised.run.id)[1]
    assert row["client_level"][0]["participants"] == 2
    # Record-level epsilon is the sites' alone.
    assert row["epsilon"]["site-1"] == noised.desks[100].ledger.standing().epsilon != cost(1)
    said = client_level_statement(noised.store)
    assert said is not None
    told = client_level_line(said)
    for word in ("add/remove one client", f"epsilon {cost(1):.3f}", "delta 1e-05", "not the coordinator"):
        assert word in told
    folder = export_round(noised.store, noised.run, 1, tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert told in card
    assert "Record-level differential privacy" in card
    assert json.loads((folder / "cloister.json").read_text())["client_level"] == said


def test_rounds_without_noise_are_named_as_not_covered(noised: World) -> None:
    one_round(noised.context(), noised.link, 1)
    bare = noised.context()
    one_round(replace(bare, federation=replace(bare.federation, client_level=None)), noised.link, 2)
    said = client_level_statement(noised.store)
    assert said is not None
    assert said["uncovered"] == 1
    assert "1 committed rounds had no such noise" in client_level_line(said)


def test_nothing_un_noised_is_told(noised: World) -> None:
    """The un-noised sum, its norm and the updates are in no event, score or blob."""
    one_round(noised.context(), noised.link, 1)
    rows = sent(noised)
    bare = (adapter(noised, 0) + clipped_sum(rows, CLIP) / 3).astype(np.float32).tobytes()[:64]
    for path in noised.coordinator.home.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert bare not in data
            assert not any(row.tobytes()[:64] in data for row in rows)
    allowed = {
        "client_level",
        "accepted",
        "adapter",
        "cohort",
        "defence",
        "groups",
        "stages_seconds",
        "held",
        "judging_seconds",
        "metrics",
        "number",
        "refused",
        "residual",
        "rounds",
        "rule",
        "seconds",
    }
    told = next(e for k, e in noised.events if k == "committed")
    assert set(told) == allowed
    assert (told["defence"], told["held"], told["refused"]) == ("mean", "", {})
