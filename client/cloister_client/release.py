"""The one gate that everything leaving the agent passes, with a type for each kind of release.

- ``NoisedUpdate``: differentially private; passes where the ledger holds its charge, and the digest that was spent for.
- ``NoisedMetric`` and ``AccountedCount``: sums with Gaussian noise of their own, reserved with the round and kept with its update, whose
  digest covers them.
- ``NonPrivateRelease``: an un-noised number about the text; passes where the plan asked for it by name and the policy permits the
  name, and is chained in the ledger before it leaves. No budget covers it.
- Under secure aggregation a ``NoisedUpdate`` passes here first and is masked then (``sums``); the protocol's keys, shares and nonces are
  random numbers that no text was read for.
- ``Refusal``: a rule's name and its public limits; of a rule that is not the policy's, the budget's, a secure sum's or a witness's,
  the name alone. It begins with ``spent.`` where this very plan was charged here.
- To a run's end, an acknowledgement: nothing of its own.
- Before each of them stands ``answers.Preface``: the signed head of this site's own log, a hash over hashes of random tags, and its
  cosignature of the coordinator's (``witness``). How many events the ledger has is seen from it.

``WIRE`` declares every field that the agent's service answers with. It seals nothing and opens no socket.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cloister_shared.answers import SPENT, Preface
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import CloisterError, InputError, RefusedError, VerificationError
from cloister_shared.plan import PlanCore
from cloister_shared.sealing import Codec

from cloister_client.budget import Ledger
from cloister_client.policy import Policy

CODES = ("unreadable", "busy", "failed")
# Every field of every message that the agent's service sends, and what may be in it.
WIRE = {
    "ExecuteReply.envelope": "the head of this site's log and a cosignature, sealed with: a NoisedUpdate, with NoisedMetrics and a count"
    " or NonPrivateReleases, or masked; a Refusal; alone: what a secure sum's protocol asks for; nothing",
    "ExecuteReply.code": f"nothing, or one of {', '.join(CODES)}",
    "ReadyReply.version": "the package's version",
}
# What the sealed plaintexts are made of; no other codec travels to the coordinator.
CODECS = {
    Codec.UPDATE_F32: "NoisedUpdate, NoisedMetric, AccountedCount, NonPrivateRelease",
    Codec.MASKED_U32: "NoisedUpdate, under masks",
    Codec.SECURE: "a commitment, a nonce, public keys, sealed shares, or shares: random numbers, made without the text",
    Codec.REFUSAL: "Refusal",
    Codec.ACK: "nothing beside what is said of logs",
}


# What a site says in a secure sum's protocol, by name (``sums``).
PROTOCOL = {
    "key",
    "commitment",
    "signature",
    "nonce",
    "cipher",
    "mask",
    "shares",
    "of_masks",
    "of_seeds",
    "seed",
    "alive",
    "dead",
}
# The one number in it: what the site declared to everybody.
DECLARED = "records"


@dataclass(frozen=True)
class NoisedUpdate:
    """An update made by DP-SGD.

    Attributes:
        data: ``(d,) float32`` bytes; then, where the plan asked for noised numbers, canonical JSON of them.
    """

    data: bytes


@dataclass(frozen=True)
class NoisedMetric:
    """A sum of bounded scores over the units, with noise.

    Attributes:
        name: Its name.
        value: The noised sum.
    """

    name: str
    value: float


@dataclass(frozen=True)
class AccountedCount:
    """How many units there are, with noise.

    Attributes:
        value: The noised count; any real number.
        name: ``units``.
    """

    value: float
    name: str = "units"


@dataclass(frozen=True)
class NonPrivateRelease:
    """An un-noised number about the text.

    Attributes:
        name: Its name.
        value: The number.
    """

    name: str
    value: float


@dataclass(frozen=True)
class Refusal:
    """Why nothing was done.

    Attributes:
        rule: The rule's dotted name.
        what: One line.
        expected: The public limit; empty where there is none.
        got: What was asked; empty where that may say something about the text.
    """

    rule: str
    what: str
    expected: str = ""
    got: str = ""


def with_numbers(update: bytes, numbers: tuple[NoisedMetric | AccountedCount, ...]) -> bytes:
    """An update's bytes and the noised numbers made with it: what is kept, spent for, and sent, together."""
    return update + (canonical({"noised": {n.name: n.value for n in numbers}}) if numbers else b"")


def refusal(
    error: CloisterError, preface: Callable[[], Preface] | None, *, charged: bool = False
) -> tuple[Codec, bytes]:
    """The refusal that an error becomes: only limits of the policy, the budget, a secure sum and a witness are public.

    Args:
        error: What was wrong.
        preface: Makes what is said of logs before an answer to a plan; None in a secure sum's protocol.
        charged: Whether this very plan was charged here; its rule then begins with ``spent.``.
    """
    # What is neither a refusal nor a plan that does not hold went wrong here, maybe after the charge.
    other = "plan.invalid" if isinstance(error, VerificationError | InputError) else "agent.failed"
    rule = error.rule if isinstance(error, RefusedError) else other
    public = rule.startswith(("policy.", "budget.", "secure.", "witness."))
    rule = SPENT + rule if charged else rule
    said = Refusal(rule, error.what, error.expected, error.got) if public else Refusal(rule, "refused")
    plaintext = canonical({name: value for name, value in asdict(said).items() if public or value})
    return Codec.REFUSAL, plaintext if preface is None else preface().before(plaintext)


def acknowledgement(preface: Preface) -> tuple[Codec, bytes]:
    """The answer to a run's end: what is said of logs, and nothing else."""
    return Codec.ACK, preface.before(b"")


def protocol(said: Mapping[str, Any]) -> tuple[Codec, bytes]:
    """Lets out what a secure sum's protocol asks for: hex digits by declared names, and nothing else.

    Raises:
        RefusedError: There is something else in it.
    """
    parts = [value if isinstance(value, dict) else {"": value} for name, value in said.items() if name != DECLARED]
    hexes = all(isinstance(v, str) and set(v) <= set("0123456789abcdef") for part in parts for v in part.values())
    if not (set(said) - {DECLARED} <= PROTOCOL and hexes and type(said.get(DECLARED, 0)) is int):
        raise RefusedError(
            "release.undeclared", "a secure sum asks for no such thing", got=", ".join(sorted(said))[:200]
        )
    return Codec.SECURE, canonical(dict(said))


def release(
    ledger: Ledger,
    policy: Policy,
    core: PlanCore,
    update: NoisedUpdate,
    preface: Callable[[], Preface],
    others: tuple[NonPrivateRelease, ...] = (),
    mask: Callable[[bytes], bytes] | None = None,
) -> tuple[Codec, bytes]:
    """Lets an update out, and the un-noised numbers that the policy permits beside it; under masks where the plan is for a secure sum.

    Returns:
        The codec and the plaintext: what is said of logs, the update's bytes, then, where there is something, canonical JSON of numbers
        by name.

    Raises:
        RefusedError: The update is not accounted for, a number is not permitted, or masks are missing.
    """
    spent = digest(update.data)
    if ledger.spent_on(core.digest) != spent:
        raise RefusedError(
            "release.unaccounted",
            "the ledger holds no charge for this update",
            where=f"plan {core.digest[:16]}",
            expected="a charge with this update's digest",
            got=spent[:16],
            mend="it stays here; ask for the round again",
        )
    for one in others:
        if one.name not in policy.nonprivate_releases or one.name not in core.reports:
            raise RefusedError(
                "policy.nonprivate_releases",
                "this number may not leave",
                expected=", ".join(policy.nonprivate_releases) or "none",
                got=one.name,
            )
    if (core.secure is None) != (mask is None):
        raise RefusedError("release.unmasked", "an update of a secure sum leaves under masks, and no other does")
    if mask is not None:
        return Codec.MASKED_U32, preface().before(mask(update.data))
    told = {one.name: one.value for one in others if math.isfinite(one.value)}
    if not told:
        return Codec.UPDATE_F32, preface().before(update.data)
    ledger.note({"plan": core.digest, "run": core.run, "round": core.round, "to": "coordinator"}, told)
    return Codec.UPDATE_F32, preface().before(update.data + canonical({"nonprivate": told}))
