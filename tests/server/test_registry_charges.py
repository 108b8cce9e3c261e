"""What was charged stays told, whoever changes rows or delivers a plan again: by leaves, by what is signed, by the sites' own words."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cloister_client import round as round_at_client
from cloister_client.round import Desk, execute
from cloister_flower.frames import reply
from cloister_server.accounting import REFUSED, close_abandoned
from cloister_server.export import export_round
from cloister_server.fsck import check
from cloister_server.intake import FAILED
from cloister_server.rounds import one_round
from cloister_server.tables import RoundClient, Run
from cloister_shared.errors import RefusedError, VerificationError
from cloister_shared.statement import FILE
from server.test_secure_rounds import context_of, secure_world, stage_of

from support.registry import a_model
from support.server_world import Loopback, World, make_world
from support.tampering import edit


@pytest.fixture
def world(tmp_path: Path, tiny_bert: Path) -> Iterator[World]:
    """A committed round of three sites and one that came to nothing, which they were all charged for."""
    made = make_world(tmp_path, tiny_bert, sites=3, rounds=4)
    made.store.log_members(made.coordinator.sites)
    one_round(made.context(), made.link, 1)
    made.link.behaviours = dict.fromkeys(made.desks, unheard)
    with pytest.raises(RefusedError, match="too few"):
        one_round(made.context(), made.link, 2)
    made.link.behaviours = {}
    yield made
    made.store.close()


def unheard(link: Loopback, node: int, frame: bytes, _: Any) -> None:
    """The site works and is charged, and its answer is lost."""
    link.honest(node, frame)


def another_run(world: World) -> World:
    """A run after that one, which stays unfinished."""
    run = Run(**(world.run.model_dump() | {"id": "9" * 32, "created": time.time()}))
    first = world.store.adapter(world.store.rounds(world.run.id)[0].adapter or "")
    world.store.start_run(run, first, a_model(run.base))
    close_abandoned(world.store, run.id)
    return replace(world, run=run)


def signed(folder: Path) -> dict[str, float]:
    """Lifetimes by name, as a statement has them."""
    stated = json.loads((folder / FILE).read_text())["statement"]["privacy"]
    return {one["name"]: one["lifetime"] for one in stated}


def spent(world: World) -> dict[str, float]:
    """Lifetimes by name, as the sites' own ledgers have them."""
    return {desk.name: desk.ledger.standing().epsilon for desk in world.desks.values()}


def test_what_came_to_nothing_is_in_the_next_runs_figures(world: World, tmp_path: Path) -> None:
    assert check(world.store) == []
    later = another_run(world)
    one_round(later.context(), later.link, 1)
    assert check(world.store) == []
    export_round(world.store, later.run, 1, tmp_path / "x")
    assert signed(tmp_path / "x") == pytest.approx(spent(world))


def test_a_round_that_is_tried_again_is_nothing_wrong(world: World, tmp_path: Path) -> None:
    one_round(world.context(members=world.members[:2]), world.link, 2)
    assert check(world.store) == []
    export_round(world.store, world.run, 2, tmp_path / "x")


def over_by_now(desk: Desk) -> Desk:
    """A site whose hours are over."""
    hour = (time.gmtime().tm_hour + 2) % 24
    return replace(desk, policy=replace(desk.policy, from_hour=hour, until_hour=hour + 1))


def delivered_again(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
    """Whoever carries messages keeps the answer to a plan back and delivers the plan again when the site's hours are over."""
    if stage_of(link) != "plan":
        return reply(link.honest(node, frame), message)
    link.honest(node, frame)
    return reply(execute(over_by_now(link.desks[node]), frame), message)


def refused_in(world: World, number: int) -> RoundClient:
    """The row of the first site."""
    return next(c for c in world.store.clients(world.run.id, number) if c.client == world.id_of(100))


def test_a_plan_that_is_delivered_again_stays_charged(world: World, tmp_path: Path) -> None:
    one_round(world.context(), world.link, 2)
    world.link.behaviours = {100: delivered_again}
    one_round(world.context(), world.link, 3)
    row = refused_in(world, 3)
    assert (row.verdict, row.charged) == (FAILED, 1)
    assert row.reason.startswith("spent.policy.from_hour; no round may begin at this hour; expected")
    # What was never charged for costs nothing as before.
    world.link.behaviours = {
        100: lambda link, node, frame, message: reply(execute(over_by_now(link.desks[node]), frame), message)
    }
    one_round(world.context(), world.link, 4)
    row = refused_in(world, 4)
    assert (row.verdict, row.charged, row.reason.split(";")[0]) == (REFUSED, 0, "policy.from_hour")
    export_round(world.store, world.run, 4, tmp_path / "x")
    assert all(signed(tmp_path / "x")[name] >= epsilon - 0.01 for name, epsilon in spent(world).items())


def test_a_plan_that_was_refused_is_not_done_when_it_comes_again(world: World, tmp_path: Path) -> None:
    """Whoever carries messages delivers a plan while the site's hours are over, and the very same again, soon or when all is over."""
    frames = list[bytes]()

    def refused_first(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        frames.append(frame)
        refusal = reply(execute(over_by_now(link.desks[node]), frame), message)
        execute(link.desks[node], frame)
        return refusal

    one_round(world.context(), world.link, 2)
    charged = world.charged(100)
    world.link.behaviours = {100: refused_first}
    one_round(world.context(), world.link, 3)
    row = refused_in(world, 3)
    assert (row.verdict, row.charged, world.charged(100)) == (REFUSED, 0, charged)
    world.link.behaviours = {}
    one_round(world.context(), world.link, 4)
    before = spent(world)
    execute(world.desks[100], frames[0])
    assert spent(world) == before
    export_round(world.store, world.run, 4, tmp_path / "x")
    assert all(signed(tmp_path / "x")[name] >= epsilon for name, epsilon in before.items())


@pytest.mark.parametrize("last", [False, True], ids=["first answer", "last answer"])
def test_an_attempt_is_charged_once_however_often_it_comes(
    world: World, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    """Training fails at a site, and the plan comes again and again."""
    one_round(world.context(), world.link, 2)
    before = world.charged(100)

    def failing(desk: Desk, *_: object) -> Any:
        raise RuntimeError("out of memory")

    def again_and_again(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        with monkeypatch.context() as broken:
            broken.setattr(round_at_client, "_train", failing)
            answers = [execute(link.desks[node], frame)]
        answers += [execute(link.desks[node], frame) for _ in range(3)]
        return reply(answers[-1 if last else 0], message)

    world.link.behaviours = {100: again_and_again}
    one_round(world.context(), world.link, 3)
    row = refused_in(world, 3)
    assert (row.verdict, row.charged) == (FAILED, 1)
    assert row.reason.startswith("spent.budget.attempt_again" if last else "spent.train.failed")
    assert world.charged(100) == before + 1


def test_a_plan_of_a_sum_that_is_delivered_again_stays_charged(tmp_path: Path, tiny_bert: Path) -> None:
    world = secure_world(tmp_path, tiny_bert)
    world.link.behaviours = {100: delivered_again}
    one_round(context_of(world), world.link, 1)
    row = refused_in(world, 1)
    assert (row.verdict, row.charged) == (FAILED, 1)
    assert row.epsilon == pytest.approx(spent(world)["site-1"])


CHANGES = {
    "gone": [f"DELETE FROM {table} WHERE number = 2" for table in ("round_client", "privacy", "round")],
    "one gone": ["DELETE FROM round_client WHERE number = 2 AND name = 'site-3'"],
    "planned": ["UPDATE round_client SET charged = 0 WHERE number = 2", "UPDATE round SET state = 'planned' WHERE number = 2"],
    "no state": ["UPDATE round SET state = 'other' WHERE number = 2"],
    "less noise": ["UPDATE round_client SET steps = 1 WHERE number = 2", "UPDATE round SET state = 'open' WHERE number = 2"],
    "attempt": ["UPDATE round SET attempt = 0, state = 'planned' WHERE number = 2"],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_round_that_was_broken_off_costs_what_its_leaf_says(world: World, tmp_path: Path, change: str) -> None:
    edit(world.store, *CHANGES[change])
    found = check(world.store)
    assert {one.where for one in found} == {f"run {world.run.id[:8]} round 2"}
    if change != "no state":
        with pytest.raises(VerificationError, match="not as its log says"):
            export_round(world.store, world.run, 1, tmp_path / "x")


def test_a_figure_that_was_made_of_changed_rows_is_told_and_not_signed(world: World, tmp_path: Path) -> None:
    """Rows are as their leaves say again by the time that anybody looks."""
    edit(world.store, "UPDATE round_client SET charged = 0, verdict = 'missing'")
    later = another_run(world)
    one_round(later.context(), later.link, 1)
    edit(
        world.store,
        f"UPDATE round_client SET charged = 1 WHERE run = '{world.run.id}'",
        f"UPDATE round_client SET verdict = 'accepted' WHERE run = '{world.run.id}' AND number = 1",
    )
    found = check(world.store)
    assert {one.where for one in found} == {f"run 99999999 round 1, site-{n}" for n in (1, 2, 3)}
    assert all("less than what leaves say" in one.what for one in found)
    with pytest.raises(VerificationError, match="less than what leaves say"):
        export_round(world.store, later.run, 1, tmp_path / "x")
    export_round(world.store, world.run, 1, tmp_path / "y")
