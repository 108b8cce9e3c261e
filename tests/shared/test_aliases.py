"""Moves of aliases: the newest one is found, and no way of leaving out, changing or adding one passes where a key guards it."""

from __future__ import annotations

from typing import Any

import pytest
from cloister_shared.aliases import ALIAS_PURPOSE, alias_move, newest_move
from cloister_shared.errors import VerificationError
from cloister_shared.signing import SigningKey
from hypothesis import given
from hypothesis import strategies as st

KEYS = [SigningKey.generate() for _ in range(3)]
guards = st.lists(st.sampled_from([None, 0, 1]), min_size=1, max_size=6)


def public(which: int | None) -> str:
    return "" if which is None else KEYS[which].verify_key.raw.hex()


def chain(after: list[int | None], alias: str = "production") -> list[dict[str, Any]]:
    """Moves of an alias, each with who guards it from then on."""
    made, now = list[dict[str, Any]](), None
    for version, then in enumerate(after, 1):
        body = {"log": "x", "kind": "alias_set", "alias": alias, "run": "ab" * 16, "round": version,
                "adapter": f"{version:064x}", "version": version, "rollback": False, "guard": public(then)}  # fmt: skip
        by = now if now is not None else then
        body["operator"] = "" if by is None else KEYS[by].sign(ALIAS_PURPOSE, alias_move(body)).hex()
        made.append(body)
        now = then
    return made


@given(guards, guards)
def test_the_newest_move_is_found_among_others(after: list[int | None], other: list[int | None]) -> None:
    records = [{"kind": "enrol"}, *chain(other, "staging"), *chain(after), {}]
    found = newest_move(records, "production", "log")
    assert found is not None
    assert (found.version, found.number, found.guard) == (len(after), len(after), public(after[-1]))
    assert newest_move(records, "nothing", "log") is None


@given(guards, st.data())
def test_a_move_that_is_left_out_or_stands_elsewhere_is_seen(after: list[int | None], data: st.DataObject) -> None:
    records = chain([*after, None])
    at = data.draw(st.integers(0, len(after) - 1))
    with pytest.raises(VerificationError, match="follows move"):
        newest_move(records[:at] + records[at + 1 :], "production", "log")
    with pytest.raises(VerificationError, match="follows move"):
        newest_move([*records[:at], records[at + 1], records[at], *records[at + 2 :]], "production", "log")


@given(guards, st.data())
def test_nobody_but_the_operator_moves_a_guarded_alias(after: list[int | None], data: st.DataObject) -> None:
    records = chain([*after, 0, 0])
    changes = [
        ("round", 99),
        ("adapter", "00" * 32),
        ("run", "cd" * 16),
        ("guard", ""),
        ("guard", public(2)),
        ("rollback", True),
        ("log", "y"),
        ("operator", ""),
        ("operator", "zz"),
    ]
    name, value = data.draw(st.sampled_from(changes))
    with pytest.raises(VerificationError, match="signature of the operator"):
        newest_move([*records[:-1], records[-1] | {name: value}], "production", "log")
    forged = records[-1] | {"operator": KEYS[2].sign(ALIAS_PURPOSE, alias_move(records[-1])).hex()}
    with pytest.raises(VerificationError, match="signature of the operator"):
        newest_move([*records[:-1], forged], "production", "log")
    # A guard that somebody else names for an alias that nobody guards shows that its key is there.
    first = chain([None, 1])
    with pytest.raises(VerificationError, match="signature of the operator"):
        newest_move([first[0], first[1] | {"guard": public(2)}], "production", "log")


@pytest.mark.parametrize("change", [{"version": "1"}, {"round": None}, {"guard": "zz"}, {"run": "AB" * 16}])
def test_a_malformed_move_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(VerificationError, match="malformed"):
        newest_move([chain([None])[0] | change], "production", "log")
