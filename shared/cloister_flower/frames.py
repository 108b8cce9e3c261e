"""Opaque bytes in Flower messages.

A frame travels as one uint8 ``Array`` whose data are the bytes themselves, so that Flower chunks and stores it and nothing
on the way parses it as an array. Reading takes the bytes and trusts none of the declared fields.
"""

from __future__ import annotations

from typing import Any

from cloister_shared.errors import VerificationError
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict

MESSAGE_TYPE = "train"
_RECORD, _KEY, _STYPE = "cloister", "frame", "cloister.frame"
REFUSED = 4001


def _content(frame: bytes) -> RecordDict:
    return RecordDict({_RECORD: ArrayRecord({_KEY: Array("uint8", (len(frame),), _STYPE, frame)})})


def outgoing(frame: bytes, node: int, group: str, ttl: float) -> Message:
    """A message to ``node`` with ``frame``; ``ttl`` in seconds."""
    return Message(_content(frame), dst_node_id=node, message_type=MESSAGE_TYPE, group_id=group, ttl=ttl)


def reply(frame: bytes, to: Message) -> Message:
    """A reply with ``frame``."""
    return Message(_content(frame), reply_to=to)


def refusal(reason: str, to: Message) -> Message:
    """A reply without content: ``reason`` is a fixed word, never text from the agent."""
    return Message(Error(code=REFUSED, reason=reason), reply_to=to)


def frame_of(message: Any, where: str) -> bytes:
    """The bytes of a message.

    Raises:
        VerificationError: It is an error, or does not hold exactly one frame.
    """
    if message.has_error():
        raise VerificationError(
            "the client answered with an error",
            where=where,
            got=f"code {message.error.code}: {str(message.error.reason)[:120]}",
        )
    records = dict(message.content)
    record = records.get(_RECORD)
    if (
        set(records) != {_RECORD}
        or not isinstance(record, ArrayRecord)
        or list(record) != [_KEY]
        or record[_KEY].stype != _STYPE
    ):
        raise VerificationError("message is not one frame", where=where, got=", ".join(sorted(records))[:120])
    return bytes(record[_KEY].data)
