"""Every rule through real rounds: what is trained, sent, aggregated, registered, resumed and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloister_model.build import frozen_schema
from cloister_server.aggregation import aggregate
from cloister_server.federation import read_federation
from cloister_server.intake import read_report
from cloister_server.planning import forecast, training_for
from cloister_server.rounds import run_rounds
from cloister_server.run import find_unfinished
from cloister_shared.errors import InputError, RefusedError, VerificationError
from cloister_shared.frozen_a import frozen_tensors
from cloister_shared.plan import PlanCore
from cloister_shared.privacy import DpSgd, epsilon
from cloister_shared.specs import RULES
from cloister_shared.vectors import F32, from_safetensors, vector_from_bytes

from support.server_world import Loopback, World, make_world, write_federation


def ruled(rule: str) -> dict[str, str]:
    """The setting."""
    return {"[aggregation]": f'[aggregation]\nrule = "{rule}"'}


def adapter(world: World, number: int) -> F32:
    """A registered round's vector."""
    row = next(r for r in world.store.rounds(world.run.id) if r.number == number)
    return from_safetensors(world.store.adapter(row.adapter or ""), world.schema, "test")


class Keeping(Loopback):
    """Copies what sites keep while they keep it."""

    def exchange(self, *args: Any, **kwargs: Any) -> Any:
        """Yields as the loopback does."""
        yield from super().exchange(*args, **kwargs)
        self.seen = {
            node: [vector_from_bytes(p.read_bytes(), self.schema, "kept") for p in sorted(desk.kept.glob("*.f32"))]
            for node, desk in self.desks.items()
            if args[1] != "closing"
        } or self.seen

    schema: Any = None
    seen: dict[int, list[F32]] = {}  # noqa: RUF012


@pytest.mark.parametrize("rule", RULES)
def test_two_rounds_and_a_resumed_one(tmp_path: Path, tiny_bert: Path, rule: str) -> None:
    world = make_world(tmp_path, tiny_bert, rounds=2, settings=ruled(rule))
    link = Keeping(world.desks)
    link.schema = world.schema
    silent = dict.fromkeys((200, 300), lambda *_: None)
    link.behaviours = silent
    with pytest.raises(RefusedError):
        run_rounds(world.context(), link)
    link.behaviours = {}
    run_rounds(world.context(), link)
    rows = world.store.rounds(world.run.id)
    assert [(r.number, r.state, r.attempt) for r in rows] == [
        (0, "committed", 1),
        (1, "committed", 2),
        (2, "committed", 1),
    ]
    cores = [PlanCore.from_dict(json.loads(c.core)) for c in world.store.clients(world.run.id, 2)]
    assert {(c.rule, c.task.freeze_a, c.update_norm) for c in cores} == {(rule, rule == "freeze-a", None)}
    # The committed adapter is the rule's of what the sites sent.
    sent = np.stack([v[0] for _, v in sorted(link.seen.items())])
    wanted = aggregate(cores[0].rule, adapter(world, 1), sent, np.ones(3), world.schema)
    np.testing.assert_allclose(adapter(world, 2), wanted.vector, atol=1e-5)
    events = [e for kind, e in world.events if kind == "committed"]
    if rule == "exact":
        assert rows[2].residual == pytest.approx(wanted.residual, abs=1e-6)
        assert 0 < wanted.residual < 1
        assert [e["residual"] for e in events] == [r.residual for r in rows[1:]]
    else:
        assert [r.residual for r in rows] == [None] * 3
    assert world.run.rule == rule == events[0]["rule"]
    world.store.close()


def test_a_frozen_a_stays_and_does_not_travel(tmp_path: Path, tiny_bert: Path) -> None:
    whole = make_world(tmp_path / "whole", tiny_bert, rounds=1)
    world = make_world(tmp_path / "frozen", tiny_bert, rounds=1, settings=ruled("freeze-a"))
    run_rounds(world.context(), world.link)
    assert not [n for n, _ in world.schema.tensors if "lora_A" in n]
    lora = sum(int(np.prod(s)) for n, s in whole.schema.tensors if "lora" in n)
    assert whole.schema.size - world.schema.size == lora // 2
    for desk in world.desks.values():
        model = desk.trainer(world.coordinator.federation.task).model
        frozen = frozen_schema(model)
        assert frozen is not None
        wanted = frozen_tensors(desk.base.digest, frozen)
        held = {n.replace(".default.", "."): p for n, p in model.encoder.named_parameters() if "lora_A" in n}
        assert {n: p.detach().numpy().tobytes() for n, p in held.items()} == {n: a.tobytes() for n, a in wanted.items()}
    assert np.abs(adapter(world, 1)).max() > 0
    for made in (whole, world):
        made.store.close()


def test_a_run_is_not_resumed_under_another_rule(tmp_path: Path, tiny_bert: Path) -> None:
    world = make_world(tmp_path, tiny_bert, rounds=1, settings=ruled("exact"))
    federation = world.coordinator.federation
    assert find_unfinished(world.store, world.schema.digest, federation, world.run.base).id == world.run.id
    with pytest.raises(InputError, match="another aggregation rule") as caught:
        find_unfinished(world.store, world.schema.digest, replace(federation, rule="average"), world.run.base)
    assert (caught.value.expected, caught.value.got) == ("exact", "average")
    world.store.close()


def test_noised_numbers_come_charged_and_the_same_on_a_retry(tmp_path: Path, tiny_bert: Path) -> None:
    numbers = {"[aggregation]": "[noised]\nloss = 5.0\nunits = 3.0"}
    world = make_world(tmp_path, tiny_bert, rounds=1, settings=numbers)
    link = Loopback(world.desks)
    link.behaviours = dict.fromkeys((200, 300), lambda *_: None)
    with pytest.raises(RefusedError):
        run_rounds(world.context(), link)
    (kept,) = world.desks[100].kept.glob("*.f32")
    first = kept.read_bytes()
    link.behaviours = {}
    run_rounds(world.context(), link)
    told = {c.name: json.loads(c.report) for c in world.store.clients(world.run.id, 1)}
    assert {frozenset(t) for t in told.values()} == {frozenset({"noised_loss", "noised_units"})}
    # The first site was asked twice, and sent what it had kept: other noise on the same numbers would be another release.
    size = 4 * world.schema.size
    mine = next(c for c in world.store.clients(world.run.id, 1) if c.client == world.id_of(100))
    assert json.loads(first[size:])["noised"] == {
        n.removeprefix("noised_"): v for n, v in json.loads(mine.report).items()
    }
    # Both ledgers agree on what it cost: the site's and the coordinator's.
    core = PlanCore.from_dict(json.loads(mine.core))
    assert len(core.events) == 3
    assert world.desks[100].ledger.standing().epsilon == epsilon(core.events, 1e-5)
    assert mine.epsilon >= epsilon(core.events, 1e-5)


@pytest.mark.parametrize(
    "data",
    [b"", b'{"noised":{"loss":1.5}}', b'{"noised":{"loss":1.5,"units":2.0,"more":1.0}}', b'{"noised":{"loss":"a","units":2.0}}',
     b'{"nonprivate":{"loss":1.5,"units":2.0}}'],
)  # fmt: skip
def test_numbers_other_than_those_asked_for_are_unreadable(tmp_path: Path, tiny_bert: Path, data: bytes) -> None:
    world = make_world(tmp_path, tiny_bert, rounds=1, settings={"[aggregation]": "[noised]\nloss = 5.0\nunits = 3.0"})
    run_rounds(world.context(), Loopback(world.desks))
    core = PlanCore.from_dict(json.loads(world.store.clients(world.run.id, 1)[0].core))
    good = b'{"noised":{"loss":1.5,"units":2.0}}'
    assert read_report(good, core, "test") == {"noised_loss": 1.5, "noised_units": 2.0}
    with pytest.raises(VerificationError):
        read_report(data, core, "test")


def test_the_noise_of_a_run_with_a_target_leaves_room_for_its_numbers(tmp_path: Path, tiny_bert: Path) -> None:
    target = {"noise_multiplier": "", "epsilon": "epsilon = 4.0"}
    card = make_world(tmp_path, tiny_bert, rounds=1).members[0].card
    plain = read_federation(write_federation(tmp_path / "a.toml", tiny_bert, **target))
    asked = read_federation(
        write_federation(tmp_path / "b.toml", tiny_bert, **target, **{"[aggregation]": "[noised]\nloss = 5.0"})
    )
    without, with_it = (training_for(f, card).noise_multiplier for f in (plain, asked))
    assert with_it > without
    spec = training_for(asked, card)
    whole = [DpSgd(spec.noise_multiplier, spec.sample_rate, 3 * spec.steps), DpSgd(5.0, 1.0, 3)]
    assert 3.8 < epsilon(whole, 1e-5) <= 4.0
    assert forecast(asked, card, []).epsilon == epsilon(whole, 1e-5)
    loud = write_federation(tmp_path / "c.toml", tiny_bert, **target, **{"[aggregation]": "[noised]\nloss = 0.3"})
    with pytest.raises(InputError, match="alone pass the target"):
        training_for(read_federation(loud), card)


@pytest.mark.parametrize(
    "beside", ["[privacy.client_level]\nnoise_multiplier = 1.0\nclipping_norm = 0.5\nepsilon_cap = 20"]
)
def test_noised_numbers_do_not_stand_beside_client_level_noise(tmp_path: Path, tiny_bert: Path, beside: str) -> None:
    path = write_federation(tmp_path / "d.toml", tiny_bert, **{"[aggregation]": f"{beside}\n[noised]\nunits = 3.0"})
    with pytest.raises(InputError, match="noised numbers"):
        read_federation(path)


def test_rates_fall_and_lora_rests_as_the_settings_say(tmp_path: Path, tiny_bert: Path) -> None:
    rates = {
        "rounds": 'rounds = 4\nschedule = "linear"\nhead_rounds = 1',
        "[aggregation]": '[aggregation]\nrule = "exact"',
    }
    world = make_world(tmp_path, tiny_bert, rounds=4, settings=rates)
    run_rounds(world.context(), Loopback(world.desks))
    cores = [PlanCore.from_dict(json.loads(world.store.clients(world.run.id, n)[0].core)) for n in (1, 2, 3, 4)]
    assert [c.training.head_only for c in cores] == [True, False, False, False]
    assert [c.training.head_rate for c in cores] == pytest.approx([3e-2 * s for s in (1, 0.75, 0.5, 0.25)])
    assert [c.training.adapter_rate for c in cores] == pytest.approx([1e-3 * s for s in (1, 0.75, 0.5, 0.25)])
    # LoRA as it was, to the bit, though the rule re-factors products; then it moves.
    heads = sum(int(np.prod(shape)) for name, shape in world.schema.tensors if name.startswith("head."))
    first, one, two = (adapter(world, n)[:-heads] for n in (0, 1, 2))
    assert np.array_equal(first, one)
    assert not np.array_equal(one, two)
    # What it cost does not depend on either.
    assert {c.training.event for c in cores} == {cores[0].training.event}
