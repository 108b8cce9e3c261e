"""The signed statement of a round: what it is, what it was made of and what it cost, with the proof that a federation's log has it.

    {"format": "cloister-round/1", "statement": {...}, "key": hex, "signature": hex,
     "leaf": {"record": text, "signature": hex, "index": n}, "path": [hex, ...], "head": signed note}

It travels with an export as ``statement.json`` and names each file beside it by digest. Whoever has the federation's key from elsewhere
can check all of it with no server; the key that stands in it is never believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloister_shared.cards import check_name
from cloister_shared.encoding import canonical, parse_record
from cloister_shared.errors import VerificationError
from cloister_shared.merkle import check_inclusion, leaf_hash
from cloister_shared.notes import read_checkpoint
from cloister_shared.privacy import ACCOUNTANT, NEIGHBOURS
from cloister_shared.signing import SigningKey, VerifyKey
from cloister_shared.witness import LEAF_PURPOSE, log_of_federation

FORMAT, PURPOSE = "cloister-round/1", "round-statement"
FILE = "statement.json"
_FIELDS = {"format", "statement", "key", "signature", "leaf", "path", "head"}
# What the leaf says of each client too, and must say alike.
_COSTS = ("name", "verdict", "plan", "delta", "noise_multiplier", "sample_rate", "steps")
_TEXT, _NUMBER, _NONE = (str,), (int, float), (type(None),)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("federation", "log", "run", "adapter", "base", "rule", "task", "tensors", "config"), _TEXT),
    **dict.fromkeys(
        ("settings", "code", "lock", "run_task", "run_tensors", "accountant", "neighbours", "vector"), _TEXT
    ),
    **dict.fromkeys(("leaf", "round"), (int,)),
    **dict.fromkeys(("tokenizer", "parent", "frozen_a"), (*_TEXT, *_NONE)),
    **dict.fromkeys(("residual", "committed"), (*_NUMBER, *_NONE)),
    **dict.fromkeys(("imported", "frozen", "client_level"), (dict, *_NONE)),
    **dict.fromkeys(("metrics", "files"), (dict,)),
    "fan_in_fan_out": (bool,),
    "privacy": (list,),
}
# What a leaf says of its round, whether that is a commit or, for round 0, the run's beginning.
_ALIKE = ("federation", "run", "adapter", "base", "tokenizer", "rule", "task", "tensors", "config", "code", "imported")


@dataclass(frozen=True)
class Proof:
    """That a log has a leaf.

    Attributes:
        record: The leaf's signed bytes.
        signature: Its keeper's signature, hex.
        index: Its place.
        path: Inclusion proof, 32 bytes each (RFC 6962 section 2.1.1).
        head: The signed note of the head that it is for.
    """

    record: bytes
    signature: str
    index: int
    path: Sequence[bytes]
    head: str


def make_statement(statement: Mapping[str, Any], proof: Proof, by: SigningKey) -> bytes:
    """Signs a statement and puts its proof beside it; returns the file's bytes.

    Args:
        statement: What is stated, JSON types only.
        proof: That the log has the round.
        by: The coordinator's key.
    """
    return canonical(
        {
            "format": FORMAT,
            "statement": dict(statement),
            "key": by.verify_key.raw.hex(),
            "signature": by.sign(PURPOSE, canonical(dict(statement))).hex(),
            "leaf": {"record": proof.record.decode(), "signature": proof.signature, "index": proof.index},
            "path": [part.hex() for part in proof.path],
            "head": proof.head,
        }
    )


def check_statement(data: bytes, key: VerifyKey, where: str) -> dict[str, Any]:
    """Reads a statement after every signature and proof of it was checked.

    Args:
        data: The file's bytes.
        key: The federation's key, from elsewhere.
        where: For errors.

    Returns:
        What is stated.

    Raises:
        VerificationError: It is malformed, another key's, or something does not hold.
    """
    record = parse_record(data, where)
    try:
        if set(record) != _FIELDS or record["format"] != FORMAT:
            raise VerificationError("not a statement of a round", where=where, expected=FORMAT)
        stated, leaf = record["statement"], record["leaf"]
        text, index = str(leaf["record"]).encode(), leaf["index"]
        path = [bytes.fromhex(part) for part in record["path"]]
        signatures = bytes.fromhex(record["signature"]), bytes.fromhex(leaf["signature"])
        if not isinstance(stated, dict) or type(index) is not int:
            raise TypeError("a field of another type")
    except (KeyError, TypeError, ValueError) as error:
        raise VerificationError("not a statement of a round", where=where, got=str(error)[:120]) from error
    if record["key"] != key.raw.hex():
        theirs = VerifyKey.from_hex(str(record["key"]), f"{where} key")
        raise VerificationError(
            "another federation's statement",
            where=where,
            expected=f"key {key.id.hex()}",
            got=f"key {theirs.id.hex()}",
            mend="ask that federation for its key, over a channel that you trust",
        )
    key.verify(PURPOSE, canonical(stated), signatures[0], where)
    key.verify(LEAF_PURPOSE, text, signatures[1], f"{where} leaf")
    head = read_checkpoint(str(record["head"]), key, log_of_federation(key), f"{where} head").checkpoint
    check_inclusion(leaf_hash(text), index, head.size, path, head.root, where)
    said = parse_record(text, f"{where} leaf")
    kind = "round_commit" if stated.get("round") else "policy"
    if (said.get("kind"), said.get("round", 0), said.get("index")) != (kind, stated.get("round"), index):
        raise VerificationError("the leaf is not of this round", where=where, expected=kind, got=str(said.get("kind")))
    _said_alike(stated, said, index, key, where)
    return stated


def _said_alike(stated: dict[str, Any], leaf: dict[str, Any], index: int, key: VerifyKey, where: str) -> None:
    """What a round was made with and what it cost must be what its leaf says."""
    if missing := sorted(set(_TYPES) ^ set(stated)):
        raise VerificationError("a statement has other fields", where=where, got=", ".join(missing)[:200])
    if odd := [name for name, kinds in _TYPES.items() if not isinstance(stated[name], kinds)]:
        raise VerificationError("a statement has fields of another type", where=where, got=", ".join(odd)[:200])
    check_name(stated["federation"], f"{where} federation")
    again = {"log": log_of_federation(key), "leaf": index} | {name: leaf.get(name) for name in _ALIKE}
    again |= {name: leaf.get(name, "") for name in ("settings", "lock")}
    again |= {"accountant": ACCOUNTANT, "neighbours": NEIGHBOURS}
    again |= {"committed": leaf.get("at"), "parent": leaf.get("parent"), "residual": leaf.get("residual")}
    if leaf.get("kind") == "round_commit":
        again["metrics"] = leaf.get("metrics")
    else:
        again |= {"metrics": {}, "privacy": []}
    if odd := [name for name, value in again.items() if stated[name] != value]:
        raise VerificationError("the leaf says something else than the statement", where=where, got=", ".join(odd))
    try:
        told = {c["key"]: c for c in stated["privacy"]}
        if len(told) != len(stated["privacy"]):
            raise VerificationError("a statement has a site twice", where=where)
        for one in leaf.get("clients", []):
            cost = told[one["client"]]
            pairs = [(cost[name], one[name]) for name in _COSTS] + [(cost["lifetime"], one["epsilon"])]
            # What it cost of the run, and of which unit: in the leaf since there is a leaf's row of it.
            known = next((p for p in leaf.get("privacy", []) if p["client"] == one["client"]), None)
            if known is not None:
                pairs += [(cost["epsilon"], known["epsilon"]), (cost["unit"], known["unit"])]
            if any(a != b for a, b in pairs) or cost["round"] != stated["round"]:
                raise VerificationError("the leaf says something else of what it cost", where=where, got=one["name"])
        for cost in told.values():
            if any(type(cost[n]) not in (int, float) for n in ("epsilon", "lifetime", "delta")):
                raise TypeError("a cost that is no number")
            if not isinstance(cost["unit"], str):
                raise TypeError("a unit that is no text")
            asked = {one["client"] for one in leaf.get("clients", [])}
            if cost["key"] not in asked and cost["round"] >= stated["round"]:
                raise VerificationError("a statement has a site that its leaf has not", where=where)
        if not all(
            0 <= c["epsilon"] <= c["lifetime"] + 0.02 and 1 <= c["round"] <= stated["round"] for c in told.values()
        ):
            raise VerificationError("a statement's costs do not hold together", where=where)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise VerificationError("a statement's costs are malformed", where=where, got=str(error)[:80]) from error
