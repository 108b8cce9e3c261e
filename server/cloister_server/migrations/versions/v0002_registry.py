"""Blobs, models, privacy, signatures, holds, tombstones; what a round was made with; guarded aliases."""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "0002", "0001", None, None

_ADDED = {
    "run": ("tokenizer",),
    "round": ("config", "code", "lock"),
    "alias": ("guard",),
    "alias_event": ("guard",),
}


def _text(name: str, *, key: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(), primary_key=key, nullable=False)


def _run(*, key: bool = False) -> sa.Column[str]:
    return sa.Column("run", sa.String(), sa.ForeignKey("run.id"), primary_key=key, nullable=False)


def _whole(name: str, *, key: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), primary_key=key, nullable=False)


def _number(name: str, *, null: bool = False) -> sa.Column[float]:
    return sa.Column(name, sa.Float(), nullable=null)


def upgrade() -> None:
    """Makes the tables; what committed rounds name is written down as blobs, of a size that nobody measured yet."""
    for table, columns in _ADDED.items():
        for column in columns:
            op.add_column(table, sa.Column(column, sa.String(), nullable=False, server_default=""))
    op.add_column("round", sa.Column("fence", sa.Integer(), nullable=False, server_default="0"))
    op.create_table(
        "blob",
        _text("digest", key=True),
        _text("kind"),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        _number("created"),
    )
    op.create_table("model", _text("digest", key=True), _text("source"), _text("tokenizer"), _text("kind"))
    op.create_table(
        "privacy",
        _run(key=True),
        _whole("number", key=True),
        _text("client", key=True),
        _text("scope", key=True),
        _text("unit"),
        _number("epsilon"),
        _number("delta"),
        _number("lifetime"),
    )
    op.create_table(
        "signature",
        _text("statement", key=True),
        _text("key", key=True),
        _run(),
        _whole("number"),
        _text("signature"),
        _number("at"),
    )
    op.create_table(
        "hold",
        sa.Column("id", sa.Integer(), primary_key=True),
        _run(),
        _whole("number"),
        _text("adapter"),
        _text("why"),
        _number("at"),
        _whole("leaf"),
        _number("released", null=True),
    )
    op.create_table(
        "tombstone",
        _text("adapter", key=True),
        _text("run"),
        _whole("number"),
        _text("why"),
        _number("at"),
        _whole("leaf"),
    )
    op.drop_table("site_head")
    named = "SELECT DISTINCT adapter, 'adapter' AS kind FROM round WHERE adapter IS NOT NULL"
    means = "SELECT DISTINCT mean, 'mean' AS kind FROM opening WHERE mean <> ''"
    seen = sa.text(
        "INSERT INTO blob (digest, kind, bytes, created)"
        f" SELECT f.adapter, MIN(f.kind), 0, :now FROM ({named} UNION {means}) AS f GROUP BY f.adapter"
    )
    op.get_bind().execute(seen, {"now": time.time()})
    # An unfinished round is planned anew by whoever resumes its run.
    op.execute("UPDATE round SET state = 'planned' WHERE state = 'open'")
