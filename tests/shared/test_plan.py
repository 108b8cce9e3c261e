"""Plans: the signature covers every field, and every field is checked for type and range."""

from __future__ import annotations

import copy
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import VerificationError
from cloister_shared.plan import Plan, PlanCore, read_parent
from cloister_shared.privacy import DpSgd
from cloister_shared.receipts import Closing, Receipt
from cloister_shared.sealing import OpeningKey
from cloister_shared.signing import SIGNATURE_BYTES, SigningKey
from cloister_shared.specs import NoisedNumber, SecureSum, TaskSpec, TrainingSpec
from cloister_shared.vectors import F32, Schema
from cloister_shared.witness import View

COORDINATOR = SigningKey.generate()
ROUND_KEY = OpeningKey.generate().sealing_key
SCHEMA = Schema((("a", (2,)), ("b", (1, 2))))
PARENT: F32 = np.array([0.1, -0.2, 0.05, 0.25], dtype=np.float32)
CENTRE = np.array([0.5, -1.25], dtype="<f2").tobytes().hex()
TASK = TaskSpec(
    "text-classification",
    ("good", "bad"),
    64,
    ("query", "value"),
    (0, 1),
    4,
    8.0,
    words=16,
    centre=CENTRE,
    spread=(0.5, 2.0, 1.0),
)
TRAINING = TrainingSpec(10, 0.05, 20.0, 1.1, 1.0, 1e-3, 1e-2, 1e-5)
CORE = PlanCore(
    federation="demo",
    run="0" * 31 + "1",
    round=2,
    rounds=5,
    client="a" * 32,
    cohort=("a" * 32, "b" * 32),
    weight=100.0,
    rule="average",
    base="1" * 64,
    schema=SCHEMA.digest,
    parent=digest(PARENT.astype("<f4").tobytes()),
    task=TASK,
    training=TRAINING,
    update_norm=2.5,
    noised=(NoisedNumber("loss", 8.0, 2.0), NoisedNumber("units", 6.0, 1.0)),
)
RECEIPT = Receipt("0" * 31 + "1", 1, "2" * 64, "3" * 64, "accepted", "4" * 64, 5, "6" * 64, "7" * 128)
PLAN = Plan(CORE, 1, ROUND_KEY, 1_700_000_000, View("note", 0, (), (), {}), (RECEIPT,))


def _framed(record: bytes, by: SigningKey = COORDINATOR, purpose: str = "plan") -> bytes:
    return struct.pack(">I", len(record)) + record + by.sign(purpose, record) + PARENT.tobytes()


def _record() -> dict[str, Any]:
    data = PLAN.to_bytes(PARENT, COORDINATOR)
    (size,) = struct.unpack(">I", data[:4])
    record: dict[str, Any] = json.loads(data[4 : 4 + size])
    return record


def _read(data: bytes) -> Plan:
    return Plan.from_bytes(data, COORDINATOR.verify_key, "coordinator")[0]


def _changed(path: str, value: Any) -> bytes:
    """The plan with one field set, signed by the coordinator all the same."""
    record = _record()
    *folders, last = path.split(".")
    at: Any = record
    for name in folders:
        at = at[int(name)] if isinstance(at, list) else at[name]
    at[int(last) if isinstance(at, list) else last] = value
    return _framed(json.dumps(record).encode())


def _leaves(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path


def test_round_trip() -> None:
    data = PLAN.to_bytes(PARENT, COORDINATOR)
    plan, rest = Plan.from_bytes(data, COORDINATOR.verify_key, "w")
    assert plan == PLAN
    assert plan.core.digest == CORE.digest == digest(CORE.to_bytes())
    assert rest == PARENT.tobytes()
    assert np.array_equal(read_parent(plan.core, rest, SCHEMA, "w"), PARENT)
    assert PlanCore.from_dict(json.loads(CORE.to_bytes())) == CORE
    assert CORE.training.event == DpSgd(1.1, 0.05, 10)


@pytest.mark.parametrize("rule", ["average", "exact", "freeze-a"])
def test_rules_round_trip(rule: Any) -> None:
    core = replace(CORE, rule=rule, task=replace(TASK, freeze_a=rule == "freeze-a"), update_norm=None)
    read = PlanCore.from_dict(json.loads(core.to_bytes()))
    assert read == core
    assert read.digest != CORE.digest


@pytest.mark.parametrize(("rule", "freeze_a"), [("average", True), ("exact", True), ("freeze-a", False)])
def test_rule_and_task_agree_on_the_frozen_a(rule: Any, freeze_a: bool) -> None:
    with pytest.raises(VerificationError, match="frozen"):
        replace(CORE, rule=rule, task=replace(TASK, freeze_a=freeze_a))


def test_causal_lm_round_trip() -> None:
    core = replace(CORE, task=replace(TASK, kind="causal-lm", labels=(), layers=(), words=0, centre="", spread=()))
    assert PlanCore.from_dict(json.loads(core.to_bytes())) == core


@pytest.mark.parametrize("named", [{"words": 16}, {"centre": CENTRE, "spread": (1.0, 1.0)}])
def test_a_task_without_a_head_has_no_features_for_one(named: dict[str, Any]) -> None:
    bare = replace(TASK, kind="causal-lm", labels=(), words=0, centre="", spread=())
    with pytest.raises(VerificationError, match=r"words|centre"):
        replace(bare, **named)
    with pytest.raises(VerificationError, match="only the head"):
        replace(CORE, task=bare, training=replace(TRAINING, head_only=True))


@pytest.mark.parametrize("path", sorted(_leaves(_record())))
def test_signature_covers_every_field(path: str) -> None:
    original = _record()
    value: Any = original
    for name in path.split("."):
        value = value[int(name)] if isinstance(value, list) else value[name]
    other = (
        value + 1 if isinstance(value, int | float) else ("b" if (value or "b")[0] != "b" else "c") + (value or "")[1:]
    )
    tampered = _changed(path, other)
    (size,) = struct.unpack(">I", tampered[:4])
    genuine = canonical(original)
    signature = COORDINATOR.sign("plan", genuine)
    Plan.from_bytes(struct.pack(">I", len(genuine)) + genuine + signature, COORDINATOR.verify_key, "w")
    with pytest.raises(VerificationError, match="signature"):
        _read(tampered[: 4 + size] + signature + PARENT.tobytes())


MEMBERS = ("a" * 32, "b" * 32, "c" * 32)
SUMMED = replace(
    CORE,
    cohort=MEMBERS,
    weight=1.0,
    noised=(),
    update_norm=None,
    secure=SecureSum(MEMBERS, 0.01, 2.5, (CORE.training.sample_rate,) * len(MEMBERS), (("record", 1),) * len(MEMBERS)),
)


def test_a_plan_of_a_secure_sum_round_trips() -> None:
    works = {"a" * 32: SUMMED.digest, "c" * 32: "d" * 64}
    plan = replace(
        PLAN, core=SUMMED, sharers=works, shares={i: ("ab", "cd", "ef") for i in works if i != SUMMED.client}
    )
    assert Plan.from_bytes(plan.to_bytes(PARENT, COORDINATOR), COORDINATOR.verify_key, "w")[0] == plan
    for bad in ({"d" * 32: "d" * 64}, {"a" * 32: "d" * 63}, {"a": "d" * 64}):
        data = replace(plan, sharers=bad).to_bytes(PARENT, COORDINATOR)
        with pytest.raises(VerificationError):
            Plan.from_bytes(data, COORDINATOR.verify_key, "w")
    for shares in (
        {},
        {"c" * 32: ("ab", "cd")},
        {"c" * 32: ("ab", "cd", 5)},
        {"b" * 32: ("a", "b", "c")},
    ):
        data = replace(plan, shares=shares).to_bytes(PARENT, COORDINATOR)  # type: ignore[arg-type]
        with pytest.raises(VerificationError):
            Plan.from_bytes(data, COORDINATOR.verify_key, "w")
    with pytest.raises(VerificationError, match="not of the group"):
        Plan.from_bytes(replace(PLAN, sharers=works).to_bytes(PARENT, COORDINATOR), COORDINATOR.verify_key, "w")


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": 2.0},
        {"update_norm": 0.5},
        {"reports": ("loss",)},
        {"noised": (NoisedNumber("units", 6.0, 1.0),)},
        {"rule": "exact"},
        {"cohort": MEMBERS[:2]},
        {"client": "d" * 32, "cohort": (*MEMBERS, "d" * 32)},
    ],
)
def test_what_a_secure_sum_cannot_be_asked_with_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(VerificationError, match=r"under masks|of the cohort"):
        replace(SUMMED, **changes)
    for members in (MEMBERS[:2], MEMBERS[::-1], ("a" * 32, *MEMBERS), tuple(f"{i:032x}" for i in range(101))):
        with pytest.raises(VerificationError, match="group"):
            SecureSum(members, 0.01, 2.5, (0.1,) * len(members), (("record", 1),) * len(members))


@pytest.mark.parametrize("path", sorted(_leaves(json.loads(SUMMED.to_bytes()))))
def test_all_but_what_a_site_is_must_be_asked_alike(path: str) -> None:
    """Masks of two whose plans differ in anything else do not cancel."""
    record = json.loads(SUMMED.to_bytes())
    *folders, last = path.split(".")
    at: Any = record
    for name in folders:
        at = at[int(name)] if isinstance(at, list) else at[name]
    value = at[int(last)] if isinstance(at, list) else at[last]
    spelled = "field" if last == "unit" else ("f" if str(value)[0] != "f" else "e") + str(value)[1:]
    other = (
        not value
        if isinstance(value, bool)
        else value / 2
        if isinstance(value, float)
        else value + 1
        if isinstance(value, int)
        else spelled
    )
    at[int(last) if isinstance(at, list) else last] = other
    try:
        changed = PlanCore.from_dict(record)
    except VerificationError:
        return
    own = {"client"}
    assert (changed.common == SUMMED.common) == (path in own)


def test_signature_of_another_key_or_purpose_is_refused() -> None:
    record = canonical(_record())
    assert _read(_framed(record)) == PLAN
    with pytest.raises(VerificationError, match="signature"):
        _read(_framed(record, by=SigningKey.generate()))
    with pytest.raises(VerificationError, match="signature"):
        _read(_framed(record, purpose="closing"))


def test_every_cut_and_length_is_refused() -> None:
    data = PLAN.to_bytes(PARENT, COORDINATOR)
    end = len(data) - PARENT.nbytes
    for at in [*range(0, end, 37), 3, 4, 67, 68, end - 1]:
        with pytest.raises(VerificationError):
            _read(data[:at])
    for size in (0, 1, end, (1 << 32) - 1):
        with pytest.raises(VerificationError):
            _read(struct.pack(">I", size) + data[4:])


NOT_NUMBERS: tuple[Any, ...] = (math.nan, math.inf, -1, True, None, "1", [], {})
NOT_INTEGERS: tuple[Any, ...] = (*NOT_NUMBERS, 1.5, 2.0, 1 << 70)
NOT_HEX: tuple[Any, ...] = (None, 5, "", "A" * 64, "g" * 64, "a" * 63, "a" * 66, " " + "a" * 63)
BAD: dict[str, tuple[Any, ...]] = {
    "attempt": (*NOT_INTEGERS, 0),
    "issued": NOT_INTEGERS,
    "round_key": (None, 5, "", "zz", "00" * 1215),
    "receipts": (None, 5, "a", [5], [None], [{}], {"a": 1}),
    "core": (None, 5, "a", [], {}),
    "core.format": (None, "cloister-plan/2", 1),
    "core.federation": (None, "", 5, "x" * 101, ["a"]),
    "core.run": (*NOT_HEX, "a" * 64),
    "core.round": (*NOT_INTEGERS, 0, 6),
    "core.rounds": (*NOT_INTEGERS, 1, 0, 1_000_001),
    "core.client": (*NOT_HEX, "c" * 32),
    "core.cohort": (None, 5, [], ["b" * 32, "a" * 32], ["a" * 32, "a" * 32], ["b" * 32], ["a" * 31], [5]),
    "core.weight": (*NOT_NUMBERS, 0, 1e10),
    "core.rule": (None, "median", 1, "mean", "freeze-a", ["average"]),
    "core.update_norm": (*(v for v in NOT_NUMBERS if v is not None), 0, 1e7),
    "core.base": NOT_HEX,
    "core.schema": NOT_HEX,
    "core.parent": NOT_HEX,
    "core.task": (None, 5, "a", [], {}),
    "core.task.kind": (None, "regression", "causal-lm", 1, []),
    "core.task.labels": (None, 5, [], ["one"], ["a", "a"], ["a", 1], ["a", ""], ["a", "x" * 201], [["a"], ["b"]]),
    "core.task.max_tokens": (*NOT_INTEGERS, 3, 4097),
    "core.task.target_modules": (None, 5, [], [""], [5], ["x" * 201]),
    "core.task.layers": (None, 5, [-1], [True], [1.0], ["0"], [1001]),
    "core.task.rank": (*NOT_INTEGERS, 0, 257),
    "core.task.freeze_a": (None, 0, 1, "", "true", [], True),
    "core.task.alpha": (*NOT_NUMBERS, 0, 1e5),
    "core.task.words": (*NOT_INTEGERS, -1, (1 << 16) + 1),
    "core.task.centre": (None, 5, "0", "00", "zzzz", "00C0", "007e", "007c", "e863", "", "0000" * 98305),
    "core.task.spread": (None, 5, [], [0.001] * 3, [1001.0], ["1"], [float("nan")], [1.0] * 4),
    "core.noised": (None, 5, "a", {}, [5], [{}], [{"name": "loss", "noise_multiplier": 8.0, "bound": 2.0}] * 2),
    "core.noised.0.name": (None, 5, "units", "accuracy"),
    "core.noised.0.noise_multiplier": (*NOT_NUMBERS, 0, 1e7),
    "core.noised.0.bound": (*NOT_NUMBERS, 0, 1e4),
    "core.noised.1.bound": (2, 0.5),
    "core.reports": (None, "loss", ["loss"], ["accuracy"]),
    "core.training": (None, 5, "a", [], {}),
    "core.training.head_only": (None, 0, 1, "", "true"),
    "core.training.steps": (*NOT_INTEGERS, 0, 100_001),
    "core.training.sample_rate": (*NOT_NUMBERS, 0, 1.01),
    "core.training.expected_batch": (*NOT_NUMBERS, 0, 1e10),
    "core.training.noise_multiplier": (*NOT_NUMBERS, 0, 1001),
    "core.training.clipping_norm": (*NOT_NUMBERS, 0, 1e7),
    "core.training.adapter_rate": (*NOT_NUMBERS, 11),
    "core.training.head_rate": (*NOT_NUMBERS, 11),
    "core.training.delta": (*NOT_NUMBERS, 0, 0.51),
    "core.training.unit": (None, "user", 1),
    "receipts.0.run": NOT_HEX,
    "receipts.0.round": (*NOT_INTEGERS, 0),
    "receipts.0.plan": (5, "A" * 64, "a" * 63, ["a"]),
    "receipts.0.update": (5, "A" * 64, "a" * 63, ["a"]),
    "receipts.0.adapter": (5, "A" * 64, "a" * 63, ["a"]),
    "receipts.0.verdict": (None, "", 5, "x" * 101),
}


@pytest.mark.parametrize("path", BAD)
def test_wrong_types_and_ranges_are_refused_though_signed(path: str) -> None:
    for value in BAD[path]:
        with pytest.raises(VerificationError):
            pytest.fail(f"{path}={value!r} was read as {_read(_changed(path, value))}")


@pytest.mark.parametrize("path", sorted({p for p in _leaves(_record()) if not p[-1].isdigit()} | {"core", "receipts"}))
def test_missing_fields_are_refused(path: str) -> None:
    record = _record()
    *folders, last = path.split(".")
    at: Any = record
    for name in folders:
        at = at[int(name)] if isinstance(at, list) else at[name]
    del at[last]
    with pytest.raises(VerificationError):
        _read(_framed(canonical(record)))


@pytest.mark.parametrize(
    "path", ["core.extra", "core.task.extra", "core.training.extra", "receipts.0.extra", "core.training.core"]
)
def test_unknown_fields_are_refused(path: str) -> None:
    with pytest.raises(VerificationError):
        _read(_changed(path, 1))


def test_unknown_field_of_the_plan_itself_is_refused() -> None:
    with pytest.raises(VerificationError):
        _read(_changed("extra", 1))


@pytest.mark.parametrize("path", ["core.task.labels", "core.task.target_modules"])
@pytest.mark.parametrize("value", ["ab", {"a": 1, "b": 2}])
def test_text_or_object_is_not_a_list(path: str, value: Any) -> None:
    with pytest.raises(VerificationError):
        _read(_changed(path, value))


@pytest.mark.parametrize("path", ["core.task.alpha", "core.weight", "core.training.delta"])
def test_integer_beyond_the_floats_is_refused(path: str) -> None:
    with pytest.raises(VerificationError):
        _read(_changed(path, 10**400))


@pytest.mark.parametrize(
    ("field", "value"),
    [("update", None), ("update", 0), ("update", []), ("plan", False), ("adapter", {})],
)
def test_receipt_digests_are_texts(field: str, value: Any) -> None:
    with pytest.raises(VerificationError):
        Receipt.from_dict(asdict(RECEIPT) | {field: value})


def test_what_is_read_has_a_digest() -> None:
    try:
        plan = _read(_changed("core.federation", "\ud800"))
    except VerificationError:
        return
    assert len(plan.core.digest) == 64


def test_receipt_of_a_round_that_came_to_nothing() -> None:
    empty = Receipt(RECEIPT.run, 1, "", "", "expired", "", 5, "6" * 64, "7" * 128)
    assert Receipt.from_dict(asdict(empty)) == empty


def test_digest_names_the_work_and_not_the_attempt() -> None:
    again = replace(PLAN, attempt=9, round_key=OpeningKey.generate().sealing_key, issued=1, receipts=())
    one, two = (_read(p.to_bytes(PARENT, COORDINATOR)) for p in (PLAN, again))
    assert one != two
    assert one.core.digest == two.core.digest


def test_digest_changes_with_every_field_of_the_core() -> None:
    others = [
        replace(CORE, federation="x"),
        replace(CORE, run="f" * 32),
        replace(CORE, round=1),
        replace(CORE, rounds=6),
        replace(CORE, client="b" * 32),
        replace(CORE, cohort=("a" * 32,)),
        replace(CORE, weight=1.0),
        replace(CORE, base="0" * 64),
        replace(CORE, schema="0" * 64),
        replace(CORE, parent="0" * 64),
        replace(CORE, task=replace(TASK, labels=("bad", "good"))),
        replace(CORE, task=replace(TASK, rank=5)),
        replace(CORE, training=replace(TRAINING, noise_multiplier=1.2)),
        replace(CORE, training=replace(TRAINING, delta=2e-5)),
    ]
    assert len({c.digest for c in (CORE, *others)}) == len(others) + 1


def test_parent_must_be_the_one_named_and_for_our_schema() -> None:
    data = PARENT.tobytes()
    other = Schema((("a", (4,)),))
    with pytest.raises(VerificationError, match="schema"):
        read_parent(CORE, data, other, "w")
    for wrong in (b"", data[:-1], data + b"\x00", bytes([data[0] ^ 1]) + data[1:]):
        with pytest.raises(VerificationError, match="digest"):
            read_parent(CORE, wrong, SCHEMA, "w")
    short = replace(CORE, parent=digest(data[:-4]))
    with pytest.raises(VerificationError, match="length"):
        read_parent(short, data[:-4], SCHEMA, "w")


def test_closing_message() -> None:
    refused = replace(RECEIPT, update="", verdict="stale")
    view = PLAN.view
    said = Closing(RECEIPT.run, PLAN.round_key, (RECEIPT, refused), view, ("a head",))
    data = said.to_bytes(COORDINATOR)
    assert Closing.from_bytes(data, COORDINATOR.verify_key, "w") == said
    nothing = replace(said, receipts=(), own_heads=())
    assert Closing.from_bytes(nothing.to_bytes(COORDINATOR), COORDINATOR.verify_key, "w") == nothing
    with pytest.raises(VerificationError, match="signature"):
        Closing.from_bytes(data, SigningKey.generate().verify_key, "w")
    for at in range(0, len(data), 11):
        changed = bytearray(data)
        changed[at] ^= 1
        with pytest.raises(VerificationError):
            Closing.from_bytes(bytes(changed), COORDINATOR.verify_key, "w")
        with pytest.raises(VerificationError):
            Closing.from_bytes(data[:at], COORDINATOR.verify_key, "w")
    with pytest.raises(VerificationError):
        Closing.from_bytes(data + b"\x00", COORDINATOR.verify_key, "w")


@pytest.mark.parametrize(
    "record",
    [{}, {"reply_to": "00"}, {"receipts": None}, {"receipts": [1]}, {"receipts": {"a": 1}}, {"receipts": [{}]}],
)
def test_malformed_closing_message_is_refused(record: dict[str, Any]) -> None:
    body = canonical({"run": RECEIPT.run} | record)
    with pytest.raises(VerificationError):
        Closing.from_bytes(
            struct.pack(">I", len(body)) + body + COORDINATOR.sign("closing", body), COORDINATOR.verify_key, "w"
        )


def test_plan_does_not_pass_as_closing_message() -> None:
    data = PLAN.to_bytes(PARENT, COORDINATOR)[: -PARENT.nbytes]
    assert len(data) > SIGNATURE_BYTES
    with pytest.raises(VerificationError, match="signature"):
        Closing.from_bytes(data, COORDINATOR.verify_key, "w")


def test_helpers_leave_the_record_alone() -> None:
    before = copy.deepcopy(_record())
    _changed("core.round", 3)
    assert _record() == before
