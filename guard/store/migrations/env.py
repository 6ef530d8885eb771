"""What alembic runs: the migrations, in the connection and the transaction that `Store` has opened."""

from alembic import context

from guard.store.tables import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=True,
)
context.run_migrations()
