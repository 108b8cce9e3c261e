"""Messages of a secure sum's protocol to some members, sealed, and their answers, opened and checked to be of this attempt.

An answer that is no answer, or a refusal, costs its sender alone and is kept for the registry. What is said is judged by who asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cloister_flower.frames import frame_of
from cloister_shared.encoding import canonical, parse_record
from cloister_shared.errors import CloisterError, VerificationError
from cloister_shared.sealing import Codec, OpeningKey, open_envelope

from cloister_server.context import Context, Exchange, Member
from cloister_server.intake import BEFORE_SPENDING, Reply, answering, said_no
from cloister_server.sending import sealed

# A message of the protocol is answered at once: nothing is trained for it.
STAGE_SECONDS = 60.0
# Shares of a hundred members and what is said of them, with room.
_MOST_BYTES = 128 * 1024


class Talk:
    """Messages of the protocol to some members, and their answers.

    Args:
        context: The run.
        link: The way to the clients.
        key: What answers are sealed to.
        number: The round; 0 in the draw.
        attempt: The attempt.

    Attributes:
        attempt: The attempt.
        refused: What members said that refused, or sent what cannot be read.
    """

    def __init__(self, context: Context, link: Exchange, key: OpeningKey, number: int, attempt: int) -> None:
        self._context, self._link, self._key = context, link, key
        self._number, self.attempt = number, attempt
        self.refused = dict[str, Reply]()

    def ask(
        self, stage: str, records: Mapping[str, dict[str, Any]], members: Mapping[str, Member]
    ) -> Iterator[tuple[str, Any]]:
        """Sends each client its record and yields what each said, by id; who refuses or says nothing readable is in ``refused``."""
        to = {"stage": stage, "reply_to": self._key.sealing_key.raw.hex()}
        frames = {members[i].node: self._sealed(members[i], canonical(record | to)) for i, record in records.items()}
        by_node = {members[i].node: members[i] for i in records}
        seconds = min(STAGE_SECONDS, self._context.federation.deadline)
        self._context.tell("stage", number=self._number, stage=stage, sites=len(frames))
        group = f"{self._number}.{self.attempt}.{stage}"
        for node, message in self._link.exchange(frames, group, seconds, lambda replies: len(replies) == len(frames)):
            member = by_node[node]
            where = f"{stage} of {member.card.name}"
            try:
                codec, plaintext = self.opened(frame_of(message, where), member, Codec.SECURE, where)
                said = parse_record(plaintext, where)
            except CloisterError as error:
                self.refused[member.id] = Reply.unreadable(error)
                continue
            if codec == Codec.SECURE:
                yield member.id, said
            else:
                # Stages beside the plan's spend nothing.
                self.refused[member.id] = said_no(said, (*BEFORE_SPENDING, "secure."))

    def opened(
        self, frame: bytes, member: Member, codec: Codec, where: str, plan: str = "00" * 32
    ) -> tuple[Codec, bytes]:
        """Opens an answer of ``codec``, or a refusal.

        Raises:
            VerificationError: It is neither, or not of this attempt.
        """
        context = self._context
        header, plaintext = open_envelope(
            frame,
            by=member.card.verify_key,
            key=self._key,
            max_bytes=_MOST_BYTES + (4 * context.schema.size if codec == Codec.MASKED_U32 else 0),
            where=where,
            expect=answering(
                member.card,
                context.signing.verify_key.id,
                context.run.id,
                self._number,
                self.attempt,
                context.run.base,
                context.schema.digest,
                plan,
            ),
        )
        if header.codec not in (codec, Codec.REFUSAL):
            raise VerificationError(
                "an answer of another kind", where=where, expected=codec.name, got=header.codec.name
            )
        return header.codec, plaintext

    def _sealed(self, member: Member, plaintext: bytes) -> bytes:
        return sealed(self._context, member, Codec.SECURE, plaintext, self._number, self.attempt, "00" * 32)
