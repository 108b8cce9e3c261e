"""Short ways with a registry that tests need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloister_server.store import Store
from cloister_server.tables import AGGREGATING, OPEN, Model, Privacy, Round, RoundClient
from cloister_shared.encoding import digest


def a_model(digest: str = "00" * 32) -> Model:
    """A base model's row."""
    return Model(digest=digest, source="minilm", tokenizer="77" * 32, kind="text-classification")


def planned(
    store: Store, run: str, number: int, clients: Sequence[RoundClient] = (), *, opened: float = 1.0, upto: str = ""
) -> Round:
    """Plans a round and brings it as far as its commit, or ``upto`` a state before."""
    row, _ = store.plan_round(Round(run=run, number=number, opened=opened), clients)
    for state in (OPEN, AGGREGATING) if not upto else (upto,):
        store.advance(run, number, state)
    return row


def blob_path(store: Store, name: str | None) -> Path:
    """Where a blob lies in the folder."""
    return Path(store.blobs.address(name or ""))


def a_cost(number: int, client: str, run: str = "ab" * 16) -> Privacy:
    """What a round of ``a_row`` costs one client."""
    said: dict[str, Any] = {"unit": "record", "epsilon": 0.0, "delta": 1e-5, "lifetime": 0.0}
    return Privacy(run=run, number=number, client=client, scope="record", **said)


def a_row(number: int, client: str, run: str = "ab" * 16) -> RoundClient:
    """What one client is asked: so much noise that it costs next to nothing, as ``a_cost`` states."""
    return RoundClient(
        run=run,
        number=number,
        client=client,
        name=client,
        plan=digest(b"{}"),
        core="{}",
        weight=1.0,
        noise_multiplier=1e4,
        sample_rate=0.1,
        steps=1,
        delta=1e-5,
    )
