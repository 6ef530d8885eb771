"""Traces, their steps and interventions, and how far each spool file was read."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from guard.store.tables import AnyText

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Makes the first tables."""
    op.create_table(
        "traces",
        sa.Column("guard_id", AnyText, primary_key=True),
        sa.Column("file", AnyText, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        *(sa.Column(name, AnyText, nullable=False) for name in ("model", "weights", "tenant", "tokenizer_hash")),
        sa.Column("log_content", sa.String(4), nullable=False),
        *(sa.Column(name, sa.Integer, nullable=False) for name in ("prompt_tokens", "output_tokens")),
        *(sa.Column(name, AnyText, nullable=False) for name in ("policy", "policy_hash", "detector", "engine")),
        *(sa.Column(name, sa.Boolean, nullable=False) for name in ("shadow", "probe", "clean")),
        *(sa.Column(name, sa.Integer, nullable=False) for name in ("seen", "scored", "unscored", "unreadable")),
        *(sa.Column(name, sa.Integer, nullable=False) for name in ("cues", "interventions", "injected_tokens")),
        sa.Column("replaced_tokens", sa.Integer, nullable=False),
        sa.Column("enforcement_failed", sa.Integer, nullable=False),
        sa.Column("document", sa.Text, nullable=False),
    )
    op.create_index("ix_traces_created", "traces", ["created"])
    for name in ("policy_hash", "weights", "tenant"):
        op.create_index(f"ix_traces_{name}", "traces", [name, "created"])
    op.create_table(
        "steps",
        *_part_of_trace(),
        sa.Column("start", sa.Integer, nullable=False),
        sa.Column("end", sa.Integer, nullable=False),
        sa.Column("zone", AnyText, nullable=False),
        sa.Column("score", sa.Double),
        *(sa.Column(name, sa.Boolean, nullable=False) for name in ("cue", "injected", "unreadable")),
    )
    op.create_table(
        "interventions",
        *_part_of_trace(),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("at", sa.Integer, nullable=False),
        *(sa.Column(name, AnyText, nullable=False) for name in ("trigger_id", "rung", "mode")),
        sa.Column("score", sa.Double),
        sa.Column("forced", sa.Integer, nullable=False),
        sa.Column("completed", sa.Boolean, nullable=False),
    )
    op.create_table(
        "spool_files",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("name", AnyText, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
        sa.Column("last_at", sa.BigInteger, nullable=False),
        sa.Column("last_hash", sa.String(64), nullable=False),
        sa.Column("malformed", sa.Integer, nullable=False),
    )


def _part_of_trace() -> list[sa.Column[Any]]:
    trace = sa.ForeignKey("traces.guard_id", ondelete="CASCADE")
    return [
        sa.Column("guard_id", AnyText, trace, primary_key=True),
        sa.Column("index", sa.Integer, primary_key=True, autoincrement=False),
    ]
