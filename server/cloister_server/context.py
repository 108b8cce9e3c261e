"""What a run has and who is in it: records that the coordinator's parts share. No rules here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from cloister_shared.cards import SiteCard
from cloister_shared.draw import Transcript
from cloister_shared.signing import SigningKey
from cloister_shared.specs import TaskSpec, TrainingSpec
from cloister_shared.vectors import Schema

from cloister_server.federation import Federation
from cloister_server.judge import Judge
from cloister_server.store import Store
from cloister_server.tables import Run

Tell = Callable[..., None]


class Exchange(Protocol):
    """The way to the clients and back: ``cloister_flower.grid.Link``, or an in-process one in tests."""

    def exchange(
        self,
        frames: dict[int, bytes],
        group: str,
        seconds: float,
        enough: Callable[[dict[int, Any]], bool],
        tick: Callable[[], None] = ...,
    ) -> Iterator[tuple[int, Any]]:
        """Sends frames by node id and yields replies as they come."""


@dataclass(frozen=True)
class Member:
    """A site in this run.

    Attributes:
        card: Its card.
        node: Its Flower node id.
        training: How it trains, calibrated for its declared size.
    """

    card: SiteCard
    node: int
    training: TrainingSpec

    @property
    def id(self) -> str:
        """Key id, hex."""
        return self.card.verify_key.id.hex()


@dataclass(frozen=True)
class Context:
    """What a run has.

    Attributes:
        federation: Its settings.
        signing: The coordinator's key.
        store: The registry.
        run: The run's row.
        task: What is learnt, with the run's centre.
        schema: The adapter's schema.
        members: The sites, by name.
        judge: Who scores candidates.
        tell: Called with events for the operator.
        draw: The groups under secure aggregation; None without.
        cards: Of every admitted site, online or not.
    """

    federation: Federation
    signing: SigningKey
    store: Store
    run: Run
    task: TaskSpec
    schema: Schema
    members: tuple[Member, ...]
    judge: Judge
    tell: Tell
    draw: Transcript | None = None
    cards: tuple[SiteCard, ...] = ()
