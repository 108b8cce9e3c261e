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
from cloister_server.rounds import run_rounds
from cloister_server.run import find_unfinished
from cloister_shared.errors import InputError, RefusedError
from cloister_shared.frozen_a import frozen_tensors
from cloister_shared.plan import RULES, PlanCore
from cloister_shared.vectors import F32, from_safetensors, vector_from_bytes

from support.server_world import Loopback, World, make_world


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
