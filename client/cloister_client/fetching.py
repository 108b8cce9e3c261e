"""What a site or an auditor fetches from a coordinator's registry, and the proofs that are checked before anything of it is kept.

Whoever fetches believes the coordinator's pinned key and heads of its log that were seen before, and nothing else: a log that shrank or
forked is an error with exit code 3. Nothing here writes a file but the newest head that a pull saw, which is kept as soon as it is
checked: whatever becomes of the pull, nothing older is the newest any more.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cloister_shared.aliases import Move, newest_move
from cloister_shared.cards import CoordinatorCard
from cloister_shared.encoding import digest, parse_record, write_durably
from cloister_shared.errors import RefusedError, RollbackError, StateError, VerificationError
from cloister_shared.invitation import Invitation
from cloister_shared.merkle import Tree, check_consistency, check_inclusion, leaf_hash
from cloister_shared.notes import Checkpoint, claimed, own_note, read_checkpoint
from cloister_shared.v1 import registry_pb2
from cloister_shared.vectors import Schema, check_bounded, from_safetensors, most_bytes
from cloister_shared.witness import LEAF_PURPOSE, log_of_federation

from cloister_client.budget import Ledger
from cloister_client.registry import CALL_SECONDS, LONG_SECONDS, certified, registry_as, registry_of
from cloister_client.site import PULLED, Site, pulled_note

PULLED_LOCK = "pulled.lock"
_LOG_BYTES = 1 << 30
# What a leaf takes beside its bytes: one without any costs whoever holds it something too.
_LEAF_BYTES = 250
# Whoever gives leaves in drops keeps whoever fetches for ever: a page that does not end the log has as many, and all of it is here in time.
_LEAST_PAGE, _LOG_SECONDS = 100, 3600.0
SignedRecord = tuple[bytes, str, str]
# Leaves, signed head, cosignatures and heads of sites' own logs by client.
FetchedLog = tuple[list[SignedRecord], str, dict[str, tuple[int, str, str]], dict[str, str]]


def fetch_log(site: Site) -> FetchedLog:
    """The federation's whole log as the coordinator has it: leaves (record, key, signature), signed head, cosignatures.

    Nothing of it is believed here: whoever reads it checks it against keys of its own (``cloister_shared.audit``).

    Raises:
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    with registry_of(site) as stub:
        return _told(stub)


def _told(stub: Any) -> FetchedLog:
    leaves, head = _whole_log(stub)
    try:
        said = parse_record(head.cosignatures, "cosignatures")
        lines = {str(i): (int(a), str(b), str(c)) for i, (a, b, c) in said.items()}
        return leaves, head.note, lines, {str(i): str(note) for i, note in parse_record(head.heads, "heads").items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise VerificationError("cosignatures are malformed", where="head of the log", got=str(error)[:100]) from error


def fetch_as_auditor(invitation: Invitation, card: CoordinatorCard, seen: Sequence[Checkpoint]) -> FetchedLog:
    """The federation's log, for an auditor with a token, which is spent; the key and its certificate are forgotten afterwards.

    Args:
        invitation: The token.
        card: From ``look``.
        seen: Heads of the log that the auditor remembers.

    Raises:
        VerificationError: The head is not signed by the coordinator that the token names, or of other leaves.
        RollbackError: The log shrank or forked.
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    with registry_as(card, certified(invitation, card)) as stub:
        leaves, note, lines, heads = _told(stub)
    head = read_checkpoint(note, card.verify_key, log_of_federation(card.verify_key), "the federation's log").checkpoint
    _check_whole([record for record, _, _ in leaves], head, seen, "the federation's log")
    return leaves, note, lines, heads


def _whole_log(stub: Any) -> tuple[list[SignedRecord], Any]:
    """The leaves that a head is said to be of, and that head; nothing of it is checked.

    Raises:
        VerificationError: It is more than whoever fetches holds or waits for, or less than its head says.
    """
    leaves, held, end = list[SignedRecord](), 0, time.monotonic() + _LOG_SECONDS
    head = stub.Head(registry_pb2.HeadRequest(), timeout=CALL_SECONDS)
    size = claimed(head.note, "head of the log").size
    if size * _LEAF_BYTES > _LOG_BYTES:
        raise _too_large(f"a head of {size} leaves")
    while len(leaves) < size:
        before, left = len(leaves), end - time.monotonic()
        if left <= 0:
            raise VerificationError(
                "the log comes too slowly", where="the coordinator's", expected=f"{size} leaves in {_LOG_SECONDS:g} s",
                got=f"{before} leaves", mend="try again; or ask its operator",
            )  # fmt: skip
        page = stub.Log(registry_pb2.LogRequest(start=before), timeout=min(LONG_SECONDS, left))
        for one in page:
            leaves.append((one.record, one.key, one.signature))
            held += _LEAF_BYTES + len(one.record) + len(one.key) + len(one.signature)
            if len(leaves) == size or held > _LOG_BYTES:
                page.cancel()
                break
        if held > _LOG_BYTES:
            raise _too_large("more")
        if len(leaves) == before:
            raise VerificationError("the log is shorter than its head says", expected=str(size), got=str(before))
        if len(leaves) < min(size, before + _LEAST_PAGE):
            raise VerificationError(
                "the log comes in drops", where="the coordinator's", expected=f">= {_LEAST_PAGE} leaves a call",
                got=str(len(leaves) - before), mend="ask its operator",
            )  # fmt: skip
    return leaves, head


def _too_large(got: str) -> VerificationError:
    return VerificationError(
        "the log is too large", where="the coordinator's", expected=f"<= {_LOG_BYTES} bytes", got=got
    )


def fetch_rounds(site: Site, run: str = "") -> list[dict[str, Any]]:
    """The federation's rounds as its coordinator lists them: its word alone, ``fetch_round`` proves one.

    Raises:
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    names = ("run", "number", "state", "attempt", "adapter", "base", "rule", "committed")
    with registry_of(site) as stub:
        answer = stub.List(registry_pb2.ListRequest(run=run), timeout=CALL_SECONDS)
    return [{name: getattr(one, name) for name in names} for one in answer.rounds]


def fetch_round(site: Site, run: str, number: int, seen: Sequence[Checkpoint]) -> dict[str, Any]:
    """What the log says of a committed round, after its proof was checked, and that the log only grew since this site saw it.

    Args:
        site: The site.
        run: The run's id.
        number: The round.
        seen: Heads of the log that this site saw.

    Raises:
        VerificationError: A proof does not hold, or it proves something else.
        RollbackError: The log shrank or forked.
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    card, where = site.coordinator(), f"round {number} of run {run[:8]}"
    origin = log_of_federation(card.verify_key)
    with registry_of(site) as stub:
        got = stub.Get(registry_pb2.GetRequest(run=run, number=number), timeout=CALL_SECONDS)
        head = read_checkpoint(got.note, card.verify_key, origin, where).checkpoint
        for one in seen:
            _grown(stub, one, head, card, where)
    said = _proven(got.commit, head, card, where)
    wanted = (run, number, "round_commit" if number else "policy")
    if (said.get("run"), said.get("round", 0), said.get("kind")) != wanted:
        raise VerificationError("the proof is of something else", where=where, got=str(said.get("kind")))
    return said


def _grown(stub: Any, seen: Checkpoint, head: Checkpoint, card: CoordinatorCard, where: str) -> None:
    old, new = sorted((seen, head), key=lambda one: one.size)
    asked = registry_pb2.ConsistencyRequest(old=old.size, size=new.size)
    got = stub.Consistency(asked, timeout=CALL_SECONDS)
    note = read_checkpoint(got.note, card.verify_key, log_of_federation(card.verify_key), where).checkpoint
    if note != new:
        raise RollbackError("the log's head is another one than this site saw", where=where, got=f"{note.size} leaves")
    check_consistency(old.size, old.root, new.size, new.root, list(got.path), where)


@dataclass(frozen=True)
class Release:
    """What an alias points at, proven.

    Attributes:
        run: The run.
        number: The round.
        adapter: The adapter's safetensors file, digest checked.
        guard: The operator's public key that guards the alias, hex; empty where nobody's does.
        record: What was proven, for a file beside it.
    """

    run: str
    number: int
    adapter: bytes
    guard: str
    record: dict[str, Any]


def pulled_head(site: Site) -> Checkpoint | None:
    """The newest head of the federation's log that a pull saw; None before the first.

    Raises:
        VerificationError: The file is not what a pull wrote.
    """
    key, note = site.coordinator().verify_key, pulled_note(site)
    if note is None:
        return None
    return read_checkpoint(note, key, log_of_federation(key), str(site.home / PULLED)).checkpoint


def heads_known(site: Site, ledger: Ledger) -> list[Checkpoint]:
    """The newest heads of the federation's log that a site knows: of its rounds and exports, and of its pulls.

    Raises:
        VerificationError: As ``pulled_head``.
    """
    found = [ledger.known_head(log_of_federation(site.coordinator().verify_key)), pulled_head(site)]
    return [head for head in found if head is not None]


def _keep_pulled(
    site: Site, note: str, tree: Tree, before: Checkpoint | None, seen: Callable[[], Sequence[Checkpoint]], where: str
) -> None:
    """Keeps a checked head as the newest that a pull saw: forward alone, and one at a time, so that the slower of two takes none back.

    Plans go on meanwhile, and each side looks after it wrote (``witness``): whichever is second sees the other's head.

    Args:
        site: The site.
        note: The head, signed.
        tree: The leaves that it is of.
        before: What was kept when the pull began.
        seen: Heads of the log that this site saw by now.
        where: For errors.

    Raises:
        RollbackError: Another pull, or a plan, showed other leaves meanwhile.
        StateError: Another pull, or a plan, showed more meanwhile, or it cannot be written.
    """
    key = site.coordinator().verify_key
    try:
        lock = os.open(site.home / PULLED_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            now = pulled_head(site)
            if now is not None and now != before:
                _meanwhile(tree, [now], "another pull", where)
            _begins_with(tree, [] if now is None else [now], where)
            _meanwhile(tree, seen(), "a plan", where)
            if now is None or now.size < len(tree):
                # Beside the ledger, which is the agent's: that holds its plans against this file too (``witness``).
                write_durably(site.home / PULLED, own_note(note, key, log_of_federation(key)).encode(), mode=0o644)
            # Whatever the umask: an agent of another user that cannot read it refuses every plan.
            (site.home / PULLED).chmod(0o644)
        finally:
            os.close(lock)
        _meanwhile(tree, seen(), "a plan", where)
    except OSError as error:
        raise StateError(
            "the newest head cannot be kept", where=str(site.home / PULLED), got=error.strerror or "",
            mend="see to the folder's owner and mode",
        ) from error  # fmt: skip


def _meanwhile(tree: Tree, heads: Sequence[Checkpoint], by: str, where: str) -> None:
    """Sees that what was shown while a log was fetched goes no further than it, and is its beginning."""
    newest = max((head.size for head in heads), default=0)
    if newest > len(tree):
        raise StateError(
            f"{by} saw a newer log meanwhile", where=where, expected=f"{newest} leaves", got=str(len(tree)),
            mend="the same command again",
        )  # fmt: skip
    _begins_with(tree, heads, where)


def fetch_release(site: Site, alias: str, seen: Callable[[], Sequence[Checkpoint]]) -> Release:
    """Fetches what an alias points at, after all of it was checked and before anything of it is loaded.

    Head signed by the pinned key -> the whole log is what it signs, and begins with what this site saw -> that head is kept -> the
    alias's moves, each in its order and a guarded one by its operator -> its newest one and the commit that it names say one adapter ->
    the adapter's bytes have that digest, and its tensors are those that the commit's run has. What was promoted after the newest head
    that this site ever saw can be kept from it; nothing older can be shown to it as the newest.

    Args:
        site: The site.
        alias: The alias.
        seen: Heads of the log that this site saw, beside that of its newest pull; asked again before and after this one's is kept.

    Raises:
        VerificationError: A proof does not hold, or a move of a guarded alias is not its operator's.
        RollbackError: The log shrank or forked.
        StateError: Another pull or a plan saw a newer log meanwhile, or the head cannot be kept.
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    card, where, before = site.coordinator(), f"alias {alias}", pulled_head(site)
    known = [*seen(), before] if before is not None else seen()
    with registry_of(site) as stub:
        leaves, answer = _whole_log(stub)
        head = read_checkpoint(answer.note, card.verify_key, log_of_federation(card.verify_key), where).checkpoint
        tree = _check_whole([record for record, _, _ in leaves], head, known, where)
        _keep_pulled(site, answer.note, tree, before, seen, where)
        records = [_own(record, index, head.origin, where) for index, (record, _, _) in enumerate(leaves)]
        move = newest_move(records, alias, where)
        if move is None:
            raise RefusedError("registry", "no such alias", where="the federation's log", got=alias)
        commit = _committed(records, move, where)
        of = stub.Run(registry_pb2.RunRequest(run=move.run), timeout=CALL_SECONDS)
        parts = {
            name: _part(getattr(of, name), commit.get(name), f"{where}: {name}")
            for name in ("task", "tensors", "config")
        }
        asked = registry_pb2.AdapterRequest(digest=move.adapter)
        schema = Schema.from_list(parts["tensors"], where)
        data = _adapter(stub.Adapter(asked, timeout=LONG_SECONDS), most_bytes(schema), where)
    if (got := digest(data)) != move.adapter:
        raise VerificationError("the adapter has another digest", where=where, expected=move.adapter[:16], got=got[:16])
    check_bounded(from_safetensors(data, schema, where), schema, where)
    record = {"alias": move.record, "commit": commit, "head": answer.note} | parts
    return Release(move.run, move.number, data, move.guard, record)


def _adapter(pieces: Any, most: int, where: str) -> bytes:
    """The pieces as one, no more of them than an adapter of the run's tensors can have."""
    found = bytearray()
    for one in pieces:
        found += one.data
        if len(found) > most:
            pieces.cancel()
            raise VerificationError(
                "the adapter is larger than its tensors", where=where, expected=f"<= {most} bytes", got="more"
            )
    return bytes(found)


def _own(data: bytes, index: int, origin: str, where: str) -> dict[str, Any]:
    """A leaf that says of itself that it stands there."""
    record = parse_record(data, f"{where}, leaf {index}")
    if (record.get("index"), record.get("log")) != (index, origin):
        raise VerificationError("a leaf says that it is another", where=f"{where}, leaf {index}")
    return record


def _part(data: bytes, named: object, where: str) -> Any:
    """What a run's adapters are made for, as its commit digests it; JSON and nothing odder."""
    if digest(data) != named:
        raise VerificationError("this is not what the round's commit says", where=where)
    record = parse_record(b'{"part":' + data + b"}", where)
    if set(record) != {"part"}:
        raise VerificationError("this is more than one part", where=where)
    return record["part"]


def _check_whole(records: Sequence[bytes], head: Checkpoint, seen: Sequence[Checkpoint], where: str) -> Tree:
    """Sees that leaves are what a head is of, and begin with what was seen; returns their tree."""
    tree = Tree(map(leaf_hash, records))
    if tree.root() != head.root:
        raise VerificationError("the log's leaves are other ones than its signed head is of", where=where)
    _begins_with(tree, seen, where)
    return tree


def _begins_with(tree: Tree, seen: Sequence[Checkpoint], where: str) -> None:
    for one in seen:
        if one.size > len(tree):
            raise RollbackError(
                "the log shrank", where=where, expected=f">= {one.size} leaves, as was seen", got=str(len(tree))
            )
        if tree.root(one.size) != one.root:
            raise RollbackError("the log's history was changed", where=where, expected=f"the {one.size} leaves seen")


def _committed(records: Sequence[dict[str, Any]], move: Move, where: str) -> dict[str, Any]:
    """The one leaf, before the move, that made the round that it names."""
    kind = "round_commit" if move.number else "policy"
    wanted = (kind, move.run, move.number)
    found = [r for r in records if (r.get("kind"), r.get("run"), r.get("round", 0)) == wanted]
    if len(found) != 1 or found[0]["index"] >= move.record["index"]:
        what = (
            "what the alias points at is no commit of that round"
            if not found
            else "its round has several commits, or a later one"
        )
        raise VerificationError(what, where=where)
    if found[0].get("adapter") != move.adapter:
        raise VerificationError("the alias points at another adapter than its round made", where=where)
    if any(r.get("kind") == "tombstone" and r.get("adapter") == move.adapter for r in records):
        raise VerificationError(
            "the alias points at an adapter that was given up", where=where, got=f"adapter {move.adapter[:16]}",
            mend="ask whoever released it",
        )  # fmt: skip
    return found[0]


def _proven(one: Any, head: Checkpoint, card: CoordinatorCard, where: str) -> dict[str, Any]:
    """A leaf that is in the log at this head and signed by its keeper, read."""
    leaf = one.leaf
    check_inclusion(leaf_hash(leaf.record), one.index, head.size, list(one.path), head.root, where)
    try:
        signature = bytes.fromhex(leaf.signature)
    except ValueError as error:
        raise VerificationError("a leaf's signature is no hex", where=where) from error
    card.verify_key.verify(LEAF_PURPOSE, leaf.record, signature, where)
    return parse_record(leaf.record, where)
