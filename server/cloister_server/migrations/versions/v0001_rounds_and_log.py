"""Rounds, aliases and the log, as registries had them before there were migrations (2026-11-22)."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "0001", None, None, None

_TYPES = {"t": sa.String, "i": sa.Integer, "n": sa.BigInteger, "f": sa.Float, "b": sa.Boolean, "x": sa.LargeBinary}
# By table: the primary key's columns, then all columns as name:type, with a question mark where null is allowed.
_TABLES = {
    "run": (
        "id",
        "id:t federation:t created:f rounds:i base:t task:t rule:t tensors:t config:t code:t flower_run:t? finished:f?",
    ),
    "round": (
        "run number",
        "run:t number:i state:t attempt:i parent:t? adapter:t? residual:f? opened:f committed:f? seconds:f judging_seconds:f"
        " sent_bytes:n received_bytes:n leaf:i?",
    ),
    "round_client": (
        "run number client",
        "run:t number:i client:t name:t plan:t core:t verdict:t reason:t weight:f update:t noise_multiplier:f sample_rate:f"
        " steps:i epsilon:f delta:f charged:i sent_bytes:n received_bytes:n report:t",
    ),
    "metric": ("run number name", "run:t number:i name:t value:f"),
    "noised_sum": (
        "run number attempt",
        "run:t number:i attempt:i charged:f noise_multiplier:f clipping_norm:f noise_std:f planned:i participants:i clients:t"
        " delta:f epsilon:f",
    ),
    "evidence": (
        "run number client test",
        "run:t number:i client:t test:t code:t observed:f threshold:f median:f mad:f",
    ),
    "draw": ("run", "run:t transcript:t"),
    "opening": ("run number group", "run:t number:i group:t clients:t mean:t"),
    "summed": ("run number group", "run:t number:i group:t members:i clients:t"),
    "judgement": ("run number", "run:t number:i rule:t attackers:i judged:i entered:i held:t shares:t"),
    "site_head": ("run number client", "run:t number:i client:t note:t"),
    "alias": ("name", "name:t run:t number:i adapter:t version:i"),
    "alias_event": ("name version", "name:t version:i run:t number:i adapter:t rollback:b why:t at:f leaf:i"),
    "fence": ("id", "id:i number:i"),
    "log_leaf": ("index", "index:i kind:t record:x key:t signature:t"),
    "witnessed": ("client", "client:t size:i root:t line:t head_size:i head:t"),
}
_OF_NO_RUN = ("run", "alias_event", "fence", "log_leaf", "witnessed")
TABLES = frozenset(_TABLES)


def upgrade() -> None:
    """Makes the tables."""
    for table, (keys, columns) in _TABLES.items():
        parts: list[sa.schema.SchemaItem] = []
        for column in columns.split():
            name, kind = column.split(":")
            parts.append(sa.Column(name, _TYPES[kind[0]](), nullable=kind.endswith("?")))
        parts.append(sa.PrimaryKeyConstraint(*keys.split()))
        if table not in _OF_NO_RUN:
            parts.append(sa.ForeignKeyConstraint(["run"], ["run.id"]))
        op.create_table(table, *parts)
