"""What becomes of admitted updates: who is left out, when a round is held, what the gate does, and what the registry then says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloister_flower.frames import reply
from cloister_server.admission import reaches
from cloister_server.aggregation import weighted_mean
from cloister_server.defence import Cohort, Entered, enter, explained, lost, lost_at_sites, reputation
from cloister_server.federation import Defence, read_federation
from cloister_server.peers import FEWEST, predicted_norm
from cloister_server.round_commands import round_rows
from cloister_server.rounds import one_round, run_rounds
from cloister_shared.encoding import canonical
from cloister_shared.errors import InputError, RefusedError
from cloister_shared.specs import Rule
from cloister_shared.vectors import F32, Schema, from_safetensors, vector_to_bytes

from support.client_world import spec
from support.server_world import Loopback, World, forged, forged_vector, make_world, write_federation

SCHEMA = Schema(
    (("x.lora_A.weight", (2, 6)), ("x.lora_B.weight", (5, 2)), ("head.weight", (3, 20)), ("head.bias", (3,)))
)
GOAL = np.random.default_rng(7).normal(0, 0.03, SCHEMA.size).astype(np.float32)
ORIGIN = np.zeros(SCHEMA.size, dtype=np.float32)
PIPELINE = Defence("pipeline", 2, None)


@dataclass
class Distance:
    """A judge for whom ``GOAL`` is best; counts what it is asked."""

    asked: list[F32] = field(default_factory=list)

    def judge(self, vector: F32) -> tuple[dict[str, float], float]:
        """Loss is the distance, accuracy falls with it."""
        self.asked.append(vector)
        far = float(np.linalg.norm(vector - GOAL) / np.linalg.norm(GOAL))
        return {"loss": far, "accuracy": max(0.0, 1 - far)}, 0.5


def cohort(count: int = 12, hostile: dict[int, F32] | None = None, seed: int = 0, noise: float = 0.006) -> Cohort:
    """Updates that go a part of the way to ``GOAL``, each its own way; ``hostile`` replaces rows."""
    rng = np.random.default_rng(seed)
    rows = (0.4 * GOAL + rng.normal(0, noise, (count, SCHEMA.size))).astype(np.float32)
    for row, update in (hostile or {}).items():
        rows[row] = update
    return Cohort(rows, np.ones(count), np.full(count, predicted_norm(spec(), SCHEMA)), np.zeros(count, dtype=bool))


def entered(defence: Defence, own: Cohort, judge: Any = None, rule: Rule = "average") -> Entered:
    judge = judge or Distance()
    return enter(defence, rule, ORIGIN, own, SCHEMA, judge, judge.judge(ORIGIN)[0])


def test_the_pipeline_leaves_out_what_is_odd_and_says_why() -> None:
    got = entered(PIPELINE, cohort(hostile={3: 5 * GOAL, 8: -0.4 * GOAL}))
    assert list(np.flatnonzero(~got.entered)) == [3, 8]
    assert [f.code for f in got.findings[3]] == ["norm-high", "norm-high", "harm"]
    assert [f.code for f in got.findings[8]] == ["ok", "ok", "harm"]
    assert not got.held
    assert got.rule == "nnm+geometric-median"
    assert got.shares is not None
    assert got.shares[[3, 8]].sum() == 0
    assert got.shares.sum() == pytest.approx(1)
    clean = entered(PIPELINE, cohort())
    assert np.linalg.norm(got.made.vector - clean.made.vector) < 0.1 * np.linalg.norm(clean.made.vector)
    said = explained(got.findings[3], (0.36, False), "")
    assert said.startswith("norm 11 times the peers' median, limit 1.")
    assert "unusual data or an attack; reputation 0.36, least 0.5" in said
    assert "loss on held-out text moved by" in explained(got.findings[8], (1.0, False), "")
    assert explained(got.findings[0], (1.0, False), "too odd") == "round held: too odd"
    assert explained(got.findings[0], (0.3, True), "") == "left out for now; reputation 0.30, least 0.5"


def test_few_of_honest_cohorts_are_left_out() -> None:
    wrong = [float((~entered(PIPELINE, cohort(seed=seed)).entered).mean()) for seed in range(40)]
    assert float(np.mean(wrong)) < 0.02


def test_more_than_half_odd_is_held_and_nothing_is_averaged() -> None:
    # Four overshoot by as much as honest ones fall short, so that lengths alone tell them apart; one goes the other way.
    rows: dict[int, F32] = {row: (1.6 * GOAL).astype(np.float32) for row in range(4)}
    rows[8] = (-0.4 * GOAL).astype(np.float32)
    got = entered(PIPELINE, cohort(9, rows, noise=0.001))
    assert [[f.code for f in tests if f.flagged] for tests in got.findings] == [["norm-high"] * 2] * 4 + [[]] * 4 + [
        ["harm"]
    ]
    assert got.held == "5 of 9 updates are odd: more than half"
    assert got.made.vector is ORIGIN
    assert not got.entered.any()


def test_a_held_round_keeps_its_parent() -> None:
    class Worse(Distance):
        def judge(self, vector: F32) -> tuple[dict[str, float], float]:
            return ({"loss": 9.0, "accuracy": 0.1} if vector.any() else {"loss": 1.0, "accuracy": 0.5}), 0.0

    judge = Worse()
    got = entered(replace(PIPELINE, margin=0.1), cohort(), judge)
    assert got.made.vector is ORIGIN
    assert "accuracy would go from 0.5000 to 0.1000: limit 0.1" in got.held
    assert not got.entered.any()
    assert got.metrics == {"loss": 1.0, "accuracy": 0.5}


def test_the_gate_tries_again_with_the_strongest_rule() -> None:
    hostile: dict[int, F32] = {row: (-6 * GOAL).astype(np.float32) for row in range(4)}
    half, judge, own = (0.5 * GOAL).astype(np.float32), Distance(), cohort(hostile=hostile)
    before = judge.judge(half)[0]
    gated, plain = (
        enter(Defence("mean", 0, margin), "average", half, own, SCHEMA, judge, before) for margin in (0.05, None)
    )
    assert (gated.rule, gated.held) == ("nnm+geometric-median", "")
    assert gated.metrics["accuracy"] > before["accuracy"]
    assert plain.rule == "mean"
    assert plain.metrics["accuracy"] == 0.0


def test_too_few_left_for_the_rule_is_held() -> None:
    own = cohort()
    got = entered(Defence("krum", 4, None), replace(own, quarantined=np.arange(12) < 4))
    assert got.held == "8 updates are left: krum wants 11 at 4 attackers"


def test_the_mean_is_weighted_and_other_rules_count_heads() -> None:
    own = replace(cohort(), weights=np.arange(1.0, 13.0))
    got = entered(Defence("mean", 0, None), own)
    np.testing.assert_allclose(got.made.vector, weighted_mean(own.updates, own.weights), atol=1e-6)
    assert got.shares is not None
    np.testing.assert_allclose(got.shares, own.weights / own.weights.sum())
    for rule in ("median", "krum", "nnm+trimmed-mean", "centred-clipping"):
        heavy, light = (entered(Defence(rule, 2, None), o).made.vector for o in (own, cohort()))
        np.testing.assert_array_equal(heavy, light)


@pytest.mark.parametrize("rule", ["mean", "krum", "geometric-median", "pipeline"])
def test_exact_products_of_what_a_rule_chose(rule: str) -> None:
    got = entered(Defence(rule, 2, None), cohort(), rule="exact")
    assert got.made.residual > 0 or rule == "krum"
    assert np.isfinite(got.made.vector).all()


def test_reputation_falls_with_flags_and_one_reason_is_not_enough() -> None:
    assert reputation([]) == (1.0, False)
    assert reputation([["norm-high"]] * 9)[0] < 0.1
    assert not reputation([["norm-high"]] * 9)[1]
    assert reputation([["norm-high"], ["harm"]])[0] == pytest.approx(0.49)
    assert reputation([["norm-high"], ["harm"]])[1]
    assert not reputation([["norm-high"], ["harm"], [], []])[1]  # it comes back by itself


def test_what_a_margin_is_of() -> None:
    assert not lost({"accuracy": 0.6}, {"accuracy": 0.55}, 0.1)
    assert lost({"accuracy": 0.6}, {"accuracy": 0.45}, 0.1)
    assert lost({"loss": 1.0}, {"loss": 1.2}, 0.1)
    assert lost({"loss": 1.0}, {}, 0.1)  # not finite: the judge leaves it out
    assert lost({"accuracy": 0.6, "loss": 1.0}, {}, 0.1)
    assert not lost({"loss": 1.0}, {"loss": 9.0}, None)
    halves = {"accuracy": 0.6, "recall:a": 0.9, "recall:b": 0.3}
    assert not lost(halves, {"accuracy": 0.6, "recall:a": 0.8, "recall:b": 0.4}, 0.1, 0.2)
    assert "recall:a" in lost(halves, {"accuracy": 0.6, "recall:a": 0.6, "recall:b": 0.6}, 0.1, 0.2)
    assert "recall:a" in lost(halves, {"accuracy": 0.6, "recall:b": 0.6}, None, 0.2)
    assert not lost(halves, {"accuracy": 0.6, "recall:a": 0.1}, 0.1)


def shifted(factor: float) -> Any:
    """A site that does its work and then sends ``factor`` times a direction of its own."""

    def behave(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        link.honest(node, frame)
        drawn = np.random.default_rng(node).choice([-1.0, 1.0], SIZE[0]) * factor
        return reply(forged_vector(link.desks[node], frame, drawn.astype(np.float32)), message)

    return behave


SIZE = [0]


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> World:
    world = make_world(
        tmp_path_factory.mktemp("nine"),
        tiny_bert,
        sites=FEWEST + 1,
        rounds=6,
        judge=None,
        settings={
            "[aggregation]": '[defence]\nrule = "pipeline"\nattackers = 2',
            "min_clients": "min_clients = 5",
        },
    )
    SIZE[0] = world.schema.size
    return world


def test_a_round_refuses_an_odd_update_and_the_registry_says_why(nine: World) -> None:
    evil = 300
    nine.link.behaviours = {evil: shifted(1e-5)}
    context = replace(nine.context(), run=nine.run)
    assert one_round(context, nine.link, 1) == ""
    assert {name for name, verdict in nine.verdicts(1).items() if verdict != "accepted"} == {"site-3"}
    row = next(c for c in nine.store.clients(nine.run.id, 1) if c.name == "site-3")
    assert row.verdict == "refused-by-peers"
    assert "times the peers' median" in row.reason
    assert "reputation 0.70" in row.reason
    (judgement,) = nine.store.judgements(nine.run.id)
    assert (judgement.judged, judgement.entered, judgement.held) == (9, 8, "")
    shares = json.loads(judgement.shares)
    assert shares[nine.id_of(evil)] == 0
    assert sum(shares.values()) == pytest.approx(1)
    tests = nine.store.evidence(nine.run.id)
    assert {t.client for t in tests if t.code != "ok"} == {nine.id_of(evil)}
    assert len(tests) == 18


def test_three_held_rounds_pause_the_run(nine: World) -> None:
    class Failing:
        def judge(self, vector: F32) -> tuple[dict[str, float], float]:
            """Whatever comes is worse."""
            self.worse = getattr(self, "worse", 1.0) + 1.0
            return {"loss": self.worse}, 0.0

    nine.link.behaviours = {}
    context = nine.context()
    context = replace(
        context,
        judge=Failing(),
        federation=replace(context.federation, defence=Defence("median", 2, 0.1)),
    )
    start = nine.store.last_committed(nine.run.id)
    with pytest.raises(RefusedError, match="kept their parent") as caught:
        run_rounds(context, nine.link)
    assert caught.value.rule == "defence.paused"
    rows = nine.store.rounds(nine.run.id)
    assert [r.number for r in rows][-1] == start.number + 3
    assert {r.adapter for r in rows[-3:]} == {start.adapter}
    assert set(nine.verdicts(start.number + 1).values()) == {"held"}
    assert [r["state"] for r in round_rows(nine.store, nine.run.id)][-3:] == ["held"] * 3
    assert "loss would go" in nine.store.judgements(nine.run.id)[-1].held
    # And goes on where somebody says so, from the same parent.
    run_rounds(replace(nine.context(), judge=Failing()), nine.link)
    last = nine.store.last_committed(nine.run.id)
    assert last.adapter != start.adapter
    assert np.isfinite(from_safetensors(nine.store.adapter(last.adapter or ""), nine.schema, "test")).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ('[defence]\nrule = "bulyan"', "rule"),
        ("[defence]\nmargin = 0.1", "held-out"),
        ('[aggregation]\nrule = "exact"\n[defence]\nrule = "nnm+median"', "by coordinate"),
        ("[defence]\nattackers = -1", "attackers"),
        ('[defence]\nrule = "pipeline"\nattackers = 2', "fewer updates than this defence"),
        ("[defence]\nother = 1", "other"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, tiny_bert: Path, settings: str, words: str) -> None:
    path = write_federation(tmp_path / "F.toml", tiny_bert, **{"[aggregation]": settings})
    with pytest.raises(InputError, match=words):
        read_federation(path)


def test_no_defence_beside_client_level_noise(tmp_path: Path, tiny_bert: Path) -> None:
    level = "[privacy.client_level]\nnoise_multiplier = 1.0\nclipping_norm = 0.5\nepsilon_cap = 20"
    level = f'delta = 1e-5\n{level}\n[defence]\nrule = "median"'
    path = write_federation(tmp_path / "F.toml", tiny_bert, delta=level)
    with pytest.raises(InputError, match="client-level noise"):
        read_federation(path)


def test_a_round_that_the_sites_own_text_speaks_against_is_taken_back(tmp_path: Path, tiny_bert: Path) -> None:
    settings = {
        "[noised]": "[noised]\nparent_loss = 0.1\nloss_bound = 2",
        "[defence]": '[defence]\nrule = "mean"\nsites_margin = 0.02',
    }
    world = make_world(tmp_path, tiny_bert, sites=3, rounds=5, settings=settings)
    quiet = tuple(replace(m, training=replace(m.training, noise_multiplier=0.1)) for m in world.members)
    context = world.context(members=quiet)
    one_round(context, world.link, 1)
    assert all("noised_parent_loss" in c.report for c in world.store.clients(world.run.id, 1))
    kept = adapter_of(world, 1)
    # Round 2 is poisoned: two sites answer with as large a move of the head as their plans allow.
    reach = 0.75 * reaches(quiet[0].training)[1]

    def poison(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        parts = {name: np.zeros(shape, dtype=np.float32) for name, shape in world.schema.tensors}
        parts["head.bias"][:] = [reach, -reach]
        desk = link.desks[node]
        said = canonical({"noised": {"parent_loss": 10.0}})
        plaintext = vector_to_bytes(world.schema.join(parts)) + said
        return reply(forged(desk, frame, plaintext, parameters=world.schema.size), message)

    world.link.behaviours = {200: poison, 300: poison}
    assert one_round(context, world.link, 2) == ""
    world.link.behaviours = {}
    why = one_round(context, world.link, 3)
    assert "taken back" in why
    assert {c.verdict for c in world.store.clients(world.run.id, 3)} == {"held"}
    assert np.array_equal(adapter_of(world, 3), kept)
    assert not np.array_equal(adapter_of(world, 2), kept)
    assert world.store.judgements(world.run.id)[-1].held == why
    assert one_round(context, world.link, 4) == ""
    assert one_round(context, world.link, 5) == ""


def test_noise_alone_takes_nothing_back() -> None:
    std, units = dict.fromkeys("abc", 10.0), dict.fromkeys("abc", 100.0)
    before = {"a": 90.0, "b": 110.0, "c": 95.0}
    # Three standard deviations of the difference of two sums over three sites: 3 sqrt(6) 10 / 300 nats a unit, and the margin.
    limit = 3 * 6**0.5 * 10 / 300 + 0.1
    just = {k: v + (limit - 1e-6) * 100 for k, v in before.items()}
    over = {k: v + (limit + 1e-6) * 100 for k, v in before.items()}
    assert lost_at_sites(before, just, std, units, 0.1) == ""
    assert "taken back" in lost_at_sites(before, over, std, units, 0.1)
    assert lost_at_sites(before, {}, std, units, 0.1) == ""
    assert lost_at_sites({}, over, std, units, 0.1) == ""


def test_the_sites_gate_needs_their_word(tmp_path: Path, tiny_bert: Path) -> None:
    settings = write_federation(tmp_path / "f.toml", tiny_bert, **{"[defence]": "[defence]\nsites_margin = 0.1"})
    with pytest.raises(InputError, match="parent_loss"):
        read_federation(settings)


def adapter_of(world: World, number: int) -> F32:
    """A round's adapter."""
    row = world.store.rounds(world.run.id)[number]
    return from_safetensors(world.store.adapter(row.adapter or ""), world.schema, "test")
