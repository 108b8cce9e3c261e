"""The release gate: what leaves has a type, a charge or a permission, and nothing else is on the agent's wire."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import replace
from pathlib import Path

import cloister_client
import pytest
from cloister_client import release as gate
from cloister_client.budget import Ledger
from cloister_client.release import CODECS, CODES, WIRE, NoisedUpdate, NonPrivateRelease, protocol, refusal, release
from cloister_shared.cards import CoordinatorCard
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import RefusedError, StateError, VerificationError
from cloister_shared.sealing import Codec
from cloister_shared.signing import SigningKey
from cloister_shared.specs import SecureSum
from cloister_shared.v1 import agent_pb2

from support.client_ledgers import core, open_ledger
from support.client_world import (
    Bare,
    policy_for,
)

UPDATE = b"\x00\x00\x80?" * 3
CARD = CoordinatorCard(
    "testing", "127.0.0.1:9", "pem", SigningKey.generate().verify_key.raw.hex(), "cd" * 32, "00" * 32, "minilm",
    "causal-lm", (), ("c_attn",), 2,
)  # fmt: skip
POLICY = policy_for(CARD)
OPEN = replace(POLICY, nonprivate_releases=("loss",))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A fresh ledger."""
    return open_ledger(tmp_path, 50.0)


def events(ledger: Ledger) -> list[dict[str, object]]:
    with ledger._chain.transaction() as (db, _):
        return [json.loads(data) for (data,) in db.execute("SELECT record FROM event ORDER BY seq")]


def test_the_agents_whole_wire_surface_is_declared() -> None:
    """Every field of every reply of every method of every service in agent.proto."""
    found = {
        f"{method.output_type.name}.{field.name}"
        for service in agent_pb2.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        for field in method.output_type.fields
    }
    assert found == set(WIRE)
    for field in found:
        message, name = field.split(".")
        kind = agent_pb2.DESCRIPTOR.message_types_by_name[message].fields_by_name[name]
        assert kind.message_type is None, f"{field} holds messages that nobody declared"


def test_only_declared_codecs_are_sealed_and_only_behind_the_gate() -> None:
    """``seal`` is called in one place, with what ``release`` and ``refusal`` return; codes are the declared words."""
    folder = Path(cloister_client.__path__[0])
    sealers, codes = [], set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                if name == "seal":
                    sealers.append(path.name)
                if name == "_seal":
                    starred = [a.value for a in node.args if isinstance(a, ast.Starred)]
                    assert [s.func.id for s in starred if isinstance(s, ast.Call) and isinstance(s.func, ast.Name)] in (
                        ["release"],
                        ["refusal"],
                        ["protocol"],
                        ["acknowledgement"],
                    )
                if name == "ExecuteReply":
                    codes |= {
                        k.value.value for k in node.keywords if k.arg == "code" and isinstance(k.value, ast.Constant)
                    }
    assert sealers == ["round.py"]
    assert codes == set(CODES)
    assert set(CODECS) == {Codec.UPDATE_F32, Codec.REFUSAL, Codec.MASKED_U32, Codec.SECURE, Codec.ACK}


def test_a_secure_sums_update_never_leaves_bare_and_its_protocol_says_hex_alone(ledger: Ledger) -> None:
    held = ledger.reserve(core(1), 1000)
    ledger.spend(held.entry, digest(UPDATE))
    asked = core(1)
    with pytest.raises(RefusedError, match="under masks"):
        release(ledger, POLICY, asked, NoisedUpdate(UPDATE), Bare, (), bytes.swapcase)
    members = tuple(sorted([asked.client, "aa" * 16, "bb" * 16]))
    summed = replace(
        core(2),
        cohort=members,
        weight=1.0,
        secure=SecureSum(
            members, 1e-3, 1.0, (asked.training.sample_rate,) * len(members), (("record", 1),) * len(members)
        ),
    )
    held = ledger.reserve(summed, 1000)
    ledger.spend(held.entry, digest(UPDATE))
    with pytest.raises(RefusedError, match="under masks"):
        release(ledger, POLICY, summed, NoisedUpdate(UPDATE), Bare)
    assert release(ledger, POLICY, summed, NoisedUpdate(UPDATE), Bare, (), lambda data: data[::-1]) == (
        Codec.MASKED_U32,
        UPDATE[::-1],
    )
    assert protocol({"shares": {"aa": "00ff"}, "seed": "11"})[0] == Codec.SECURE
    for bad in ({"text": "00"}, {"seed": "my text"}, {"shares": {"aa": "text"}}, {"seed": 1.5}):
        with pytest.raises(RefusedError, match="no such thing"):
            protocol(bad)


def test_an_update_without_a_charge_stays(ledger: Ledger) -> None:
    with pytest.raises(RefusedError) as caught:
        release(ledger, POLICY, core(1), NoisedUpdate(UPDATE), Bare)
    assert caught.value.rule == "release.unaccounted"
    held = ledger.reserve(core(1), 1000)
    with pytest.raises(RefusedError, match="no charge"):
        release(ledger, POLICY, core(1), NoisedUpdate(UPDATE), Bare)
    ledger.spend(held.entry, digest(UPDATE))
    assert release(ledger, POLICY, core(1), NoisedUpdate(UPDATE), Bare) == (Codec.UPDATE_F32, UPDATE)
    with pytest.raises(RefusedError, match="no charge"):
        release(ledger, POLICY, core(1), NoisedUpdate(UPDATE[:-4] + b"\0\0\0\0"), Bare)
    with pytest.raises(RefusedError, match="no charge"):
        release(ledger, POLICY, core(2), NoisedUpdate(UPDATE), Bare)


def test_neither_a_void_nor_a_lost_reservation_lets_anything_out(ledger: Ledger) -> None:
    ledger.void(ledger.reserve(core(1), 1000).entry, SigningKey.generate())
    with pytest.raises(RefusedError, match="no charge"):
        release(ledger, POLICY, core(1), NoisedUpdate(UPDATE), Bare)
    ledger.lose(ledger.reserve(core(2), 1000).entry)
    with pytest.raises(RefusedError, match="no charge"):
        release(ledger, POLICY, core(2), NoisedUpdate(UPDATE), Bare)


@pytest.mark.parametrize(
    ("permitted", "asked", "name"), [(False, True, "loss"), (True, False, "loss"), (True, True, "records")]
)
def test_an_un_noised_number_needs_the_policy_and_the_plan(
    ledger: Ledger, permitted: bool, asked: bool, name: str
) -> None:
    work = replace(core(1), reports=("loss",) if asked else ())
    ledger.spend(ledger.reserve(work, 1000).entry, digest(UPDATE))
    before = events(ledger)
    with pytest.raises(RefusedError) as caught:
        release(
            ledger, OPEN if permitted else POLICY, work, NoisedUpdate(UPDATE), Bare, (NonPrivateRelease(name, 1.0),)
        )
    assert caught.value.rule == "policy.nonprivate_releases"
    assert events(ledger) == before


def test_a_permitted_number_is_chained_before_it_leaves(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    work = replace(core(1), reports=("loss",))
    ledger.spend(ledger.reserve(work, 1000).entry, digest(UPDATE))
    codec, data = release(ledger, OPEN, work, NoisedUpdate(UPDATE), Bare, (NonPrivateRelease("loss", 0.5),))
    assert (codec, data) == (Codec.UPDATE_F32, UPDATE + b'{"nonprivate":{"loss":0.5}}')
    last = events(ledger)[-1]
    # Its name is in the event; its value beside it, so that the event can be shown to an auditor.
    assert (last["event"], last["plan"], last["numbers"]) == ("nonprivate_release", work.digest, ["loss"])
    assert b"0.5" not in canonical(last)
    assert release(ledger, OPEN, work, NoisedUpdate(UPDATE), Bare, (NonPrivateRelease("loss", math.nan),))[1] == UPDATE

    def full(*_: object) -> None:
        raise StateError("no space")

    monkeypatch.setattr(Ledger, "note", full)
    with pytest.raises(StateError, match="no space"):
        release(ledger, OPEN, work, NoisedUpdate(UPDATE), Bare, (NonPrivateRelease("loss", 0.5),))


def test_a_refusal_tells_public_limits_alone() -> None:
    public = refusal(RefusedError("policy.max_rank", "too large", expected="<= 8", got="16", where="x", mend="y"), None)
    assert public == (Codec.REFUSAL, b'{"expected":"<= 8","got":"16","rule":"policy.max_rank","what":"too large"}')
    private = refusal(RefusedError("train.failed", "secret words", expected="secret", got="secret"), None)
    assert private == (Codec.REFUSAL, b'{"rule":"train.failed","what":"refused"}')
    assert b"secret" not in refusal(VerificationError("secret", got="secret"), None)[1]
    assert refusal(StateError("disk is full"), None)[1] == b'{"rule":"agent.failed","what":"refused"}'
    assert gate.refusal(VerificationError("x"), None)[1] == b'{"rule":"plan.invalid","what":"refused"}'
