"""Who guards an alias: signs each move of it, with a key at hand or on a machine of their own.

    rounds promote ALIAS ROUND --ask MOVE     what is to be signed, canonical JSON; nothing moves
    coordinator operator-sign MOVE --key KEY --out SIGNATURE      anywhere; shows what it signs
    rounds promote ALIAS ROUND --signature SIGNATURE              the same move, if the alias stands where it stood

A signature is of one move of one alias in one federation's log: it moves nothing else, and nothing twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister_shared.aliases import ALIAS_PURPOSE, Move, alias_move
from cloister_shared.audit.reading import MALFORMED
from cloister_shared.encoding import parse_record, write_durably
from cloister_shared.errors import InputError, RefusedError, VerificationError
from cloister_shared.signing import SigningKey, VerifyKey

_SIGNATURE = re.compile(r"[0-9a-f]{128}\n?")
_MEND = "--key OPERATOR.key; or --ask MOVE, and --signature with what its operator made of it"


@dataclass(frozen=True)
class Operator:
    """Somebody who signs moves.

    Attributes:
        sign: The signature of a move's bytes.
        whose: By what, for messages.
    """

    sign: Callable[[bytes], bytes]
    whose: str


def with_key(key: SigningKey) -> Operator:
    """One whose key is at hand."""
    return Operator(lambda move: key.sign(ALIAS_PURPOSE, move), f"key {key.verify_key.id.hex()}")


def with_signature(path: Path) -> Operator:
    """One who signed elsewhere.

    Raises:
        InputError: The file is no signature.
    """
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        raise InputError(
            "no signature here", where=str(path), got=getattr(error, "strerror", "") or "not text"
        ) from error
    if not _SIGNATURE.fullmatch(text):
        raise InputError("no signature here", where=str(path), expected="128 hex digits, from operator-sign")
    return Operator(lambda _: bytes.fromhex(text), f"the signature in {path}")


def signed(operator: Operator | None, guard: str, move: bytes, alias: str) -> str:
    """The signature of a move, hex, checked against whoever guards the alias.

    Raises:
        RefusedError: Nobody signed it, or somebody else, or another move.
    """
    key = VerifyKey.from_hex(guard, f"alias {alias}")
    expected = f"key {key.id.hex()}"
    if operator is None:
        what = "this alias moves only with its operator's key"
        raise RefusedError("registry.guarded", what, where=alias, expected=expected, got="none", mend=_MEND)
    signature = operator.sign(move)
    try:
        key.verify(ALIAS_PURPOSE, move, signature, alias)
    except VerificationError as error:
        what = "this alias moves only with its operator's key, signing this very move"
        got = operator.whose
        raise RefusedError("registry.guarded", what, where=alias, expected=expected, got=got, mend=_MEND) from error
    return signature.hex()


def whose_move(record: dict[str, Any], key: SigningKey) -> str:
    """A word for whoever signs with a key that will not guard the alias: right only where it is handed on or taken off."""
    own = key.verify_key
    if record["guard"] == own.raw.hex():
        return ""
    return f"  this is key {own.id.hex()}: it must be the one that guards {record['alias']} until now, or the move is refused"


def sign_file(move: Path, key: SigningKey, out: Path) -> dict[str, Any]:
    """Signs a move that somebody asked for, and writes the signature; returns what was signed.

    Raises:
        InputError: The file is no move.
    """
    try:
        data = move.read_bytes()
        record = parse_record(data, str(move))
        Move.read(record)
        if alias_move(record) != data:
            raise VerificationError("another spelling of a move, or more than one", where=str(move))
    except (OSError, VerificationError, *MALFORMED) as error:
        raise InputError(
            "not a move of an alias", where=str(move), got=str(error)[:200], mend="rounds … --ask MOVE"
        ) from error
    write_durably(out, (key.sign(ALIAS_PURPOSE, data).hex() + "\n").encode(), mode=0o644)
    return record
