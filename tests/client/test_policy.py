"""Each rule of the policy refuses under its own name, and the file says exactly what it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cloister_client.policy import Policy, add_peer, check, note_peers, read_policy, within
from cloister_shared.errors import InputError, RefusedError
from cloister_shared.plan import PlanCore
from cloister_shared.signing import SigningKey

from support.client_ledgers import core

PLAN = core(3)
POLICY = Policy(
    base_models=(PLAN.base,),
    tasks=("causal-lm",),
    target_modules=("c_attn", "c_proj"),
    max_rank=2,
    epsilon_cap=4.5,
    delta=1e-5,
    least_noise=4.0,
    least_cohort=1,
    rounds_per_day=7,
    sandbox="required",
)


def _task(**changes: Any) -> PlanCore:
    return replace(PLAN, task=replace(PLAN.task, **changes))


def _training(**changes: Any) -> PlanCore:
    return replace(PLAN, training=replace(PLAN.training, **changes))


def test_a_plan_at_every_limit_passes() -> None:
    check(POLICY, PLAN, 12)
    check(replace(POLICY, base_models=("ff" * 32, PLAN.base), tasks=("text-classification", "causal-lm")), PLAN, 12)


@pytest.mark.parametrize(
    ("rule", "policy", "plan", "allowed", "asked"),
    [
        ("base_models", POLICY, replace(PLAN, base="ee" * 32), PLAN.base[:16], "ee" * 8),
        ("base_models", replace(POLICY, base_models=()), PLAN, "", PLAN.base[:16]),
        ("tasks", replace(POLICY, tasks=("text-classification",)), PLAN, "text-classification", "causal-lm"),
        ("target_modules", POLICY, _task(target_modules=("c_attn", "wte")), "c_attn, c_proj", "wte"),
        ("max_rank", POLICY, _task(rank=3), "<= 2", "3"),
        ("least_noise", POLICY, _training(noise_multiplier=3.999), ">= 4.0", "3.999"),
        ("delta", POLICY, _training(delta=1e-6), "1e-05", "1e-06"),
        ("delta", POLICY, _training(delta=1e-4), "1e-05", "0.0001"),
        ("least_cohort", replace(POLICY, least_cohort=2), PLAN, ">= 2", "1"),
        ("layers", replace(POLICY, layers=(1, 2)), _task(layers=(0, 1)), "1, 2", "0"),
        ("layers", replace(POLICY, layers=(0,)), _task(layers=()), "0", "all"),
        ("from_hour", replace(POLICY, from_hour=13), PLAN, "13:00 to 24:00 UTC", "12 h UTC"),
        ("from_hour", replace(POLICY, from_hour=20, until_hour=12), PLAN, "20:00 to 12:00 UTC", "12 h UTC"),
        ("secure_aggregation", replace(POLICY, secure_aggregation="required"), PLAN, "secure aggregation", "none"),
    ],
)
def test_each_rule_refuses_with_its_name_what_was_asked_and_what_is_allowed(
    rule: str, policy: Policy, plan: PlanCore, allowed: str, asked: str
) -> None:
    with pytest.raises(RefusedError) as refused:
        check(policy, plan, 12)
    error = refused.value
    assert (error.rule, error.expected, error.got) == (f"policy.{rule}", allowed, asked)
    assert error.where == "plan of round 3"
    assert rule in error.mend


@pytest.mark.parametrize(
    "policy",
    [
        POLICY,
        replace(POLICY, epsilon_cap=0.1 + 0.2, delta=1e-10, least_noise=1 / 3, sandbox="preferred"),
        replace(POLICY, target_modules=('odd "name"\\', "tab\there", "ünï", "new\nline"), base_models=(), tasks=()),
    ],
)
def test_the_file_gives_back_the_policy(tmp_path: Path, policy: Policy) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(policy.to_toml(), encoding="utf-8")
    assert read_policy(path) == policy


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("rounds_per_day", "rounds_per_dya", "rounds_per_day"),
        ("sandbox =", "extra = 1\nsandbox =", "extra"),
        ("max_rank = 2", 'max_rank = "2"', "max_rank"),
        ("max_rank = 2", "max_rank = 2.0", "max_rank"),
        ("max_rank = 2", "max_rank = true", "max_rank"),
        ("epsilon_cap = 4.5", "epsilon_cap = inf", "epsilon_cap"),
        ("epsilon_cap = 4.5", "epsilon_cap = nan", "epsilon_cap"),
        ("epsilon_cap = 4.5", "epsilon_cap = -1", "epsilon_cap"),
        ("delta = 1e-05", "delta = 0", "delta"),
        ("delta = 1e-05", "delta = 0.6", "delta"),
        ("least_noise = 4.0", "least_noise = 0.0", "least_noise"),
        ("least_cohort = 1", "least_cohort = 0", "least_cohort"),
        ('sandbox = "required"', 'sandbox = "no"', "sandbox"),
    ],
)
def test_a_wrong_missing_or_unknown_key_is_refused_by_name(tmp_path: Path, old: str, new: str, key: str) -> None:
    path = tmp_path / "policy.toml"
    text = POLICY.to_toml()
    assert old in text
    at = text.rindex("\n" + old) if f"\n{old}" in text else text.index(old)
    path.write_text(text[:at] + text[at:].replace(old, new, 1))
    with pytest.raises(InputError) as told:
        read_policy(path)
    assert repr(key) in str(told.value)
    assert str(path) in str(told.value)


def test_a_misspelt_task_is_told(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY.to_toml().replace('"causal-lm"', '"casual-lm"'))
    with pytest.raises(InputError):
        read_policy(path)


@pytest.mark.parametrize("content", [None, b"max_rank = = 2", b"max_rank = 2\xff"])
def test_a_file_that_is_none_is_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "policy.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="policy"):
        read_policy(path)


def test_peers_are_added_by_line_and_changes_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("# mine\n" + POLICY.to_toml() + "# the end\n")
    keys = [SigningKey.generate().verify_key for _ in range(2)]
    first, second = (key.raw.hex() for key in keys)
    assert add_peer(path, first) == (first,)
    assert add_peer(path, first) == (first,)
    assert add_peer(path, second) == read_policy(path).peers == (first, second)
    assert path.read_text().startswith("# mine\n")
    assert path.read_text().endswith("# the end\n")
    assert replace(read_policy(path), peers=()) == POLICY
    policy = read_policy(path)
    changed = note_peers(tmp_path, policy, 5.0)
    assert all(f"+{key.id.hex()}" in changed for key in keys)
    assert note_peers(tmp_path, policy, 6.0) == ""
    assert note_peers(tmp_path, replace(policy, peers=(second,)), 7.0) == f"accepted peers changed: -{keys[0].id.hex()}"
    assert [line.split()[0] for line in (tmp_path / "peers.log").read_text().splitlines()] == ["5", "7"]
    path.write_text(path.read_text().replace("peers = [", "peers = [\n"))
    with pytest.raises(InputError, match="line of its own"):
        add_peer(path, "ab" * 32)
    path.write_text(POLICY.to_toml().replace("peers = []", 'peers = ["zz"]'))
    with pytest.raises(InputError, match=r"policy\.toml peers"):
        read_policy(path)


@pytest.mark.parametrize(
    ("first", "last", "inside"),
    [
        (0, 24, set(range(24))),
        (8, 18, set(range(8, 18))),
        (20, 6, {20, 21, 22, 23, 0, 1, 2, 3, 4, 5}),
        (5, 5, set(range(24))),
    ],
)
def test_hours(first: int, last: int, inside: set[int]) -> None:
    policy = replace(POLICY, from_hour=first, until_hour=last)
    assert {hour for hour in range(24) if within(policy, hour)} == inside
