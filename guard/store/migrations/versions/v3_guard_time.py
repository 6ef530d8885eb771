"""How long each request waited for the guard; what was stored before has none."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds the column."""
    op.add_column("traces", sa.Column("guard_us", sa.BigInteger))
