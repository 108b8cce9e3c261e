"""What a leaf says of a run and of a commit, beside the round's clients: digests of how it was made, scores, the groups' sums."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import StateError, VerificationError
from cloister_shared.vectors import Schema

from cloister_server.log import DAMAGED, items
from cloister_server.tables import (
    Judgement,
    Privacy,
    Round,
    Run,
    Summed,
)


def tensors_of(run: Run) -> Schema:
    """The tensors of a run's adapters.

    Raises:
        StateError: Its row was changed by hand, and names none.
    """
    where = f"run {run.id[:8]} tensors"
    try:
        return Schema.from_list(items(run.tensors, where), where)
    except VerificationError as error:
        raise StateError(error.what, where=where, got=error.got, mend=DAMAGED) from error


def commit_facts(
    run: Run,
    row: Round,
    transcript: str | None,
    metrics: Mapping[str, float],
    judgement: Judgement | None,
    summed: Sequence[Summed],
    privacy: Sequence[Privacy],
) -> dict[str, Any]:
    """What a commit's leaf says beside the round's clients: of the run, how it was made, scores, the defence and the groups' sums.

    Args:
        run: The run.
        row: The round.
        transcript: The run's draw, JSON; None without secure aggregation.
        metrics: Scores by name.
        judgement: What the defence did; None where there is none.
        summed: The groups' sums.
        privacy: What it cost of each client's records.
    """
    without = {"run", "number"}
    return run_facts(run) | {
        "settings": row.config,
        "code": row.code or run.code,
        "lock": row.lock,
        "fence": row.fence,
        "draw": "" if transcript is None else digest(canonical(json.loads(transcript))),
        "metrics": dict(metrics),
        "defence": None if judgement is None else judgement.model_dump(exclude=without),
        "sums": [one.model_dump(exclude=without) for one in sorted(summed, key=lambda one: one.group)],
        "privacy": [one.model_dump(exclude=without | {"scope"}) for one in sorted(privacy, key=lambda one: one.client)],
    }


def run_facts(run: Run) -> dict[str, Any]:
    """What a leaf says of a run: what it trained, with which settings and which code, by digests."""
    return {
        "run": run.id,
        "federation": run.federation,
        "base": run.base,
        "rule": run.rule,
        "task": digest(run.task.encode()),
        "tensors": digest(run.tensors.encode()),
        "config": digest(run.config.encode()),
        "code": run.code,
        "tokenizer": run.tokenizer,
    }
