"""Reviews: what people said about steps and traces."""

import sqlalchemy as sa
from alembic import op

from guard.store.tables import AnyText

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Makes the table of reviews."""
    op.create_table(
        "reviews",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("guard_id", AnyText, sa.ForeignKey("traces.guard_id", ondelete="CASCADE"), nullable=False),
        sa.Column("step", sa.Integer),
        sa.Column("label", AnyText, nullable=False),
        sa.Column("reviewer", AnyText, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("note", AnyText, nullable=False),
    )
    op.create_index("ix_reviews_guard_id", "reviews", ["guard_id", "step", "created"])
    op.create_index("ix_reviews_created", "reviews", ["created"])
