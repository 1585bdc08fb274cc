"""Runs the migrations on the ledger whose URL `errata.server.ledger.migrate` hands over, in one transaction.

Looks only at tables whose names begin with `errata_`: the ledger may share a database, with MLflow for instance.
"""

from alembic import context
from sqlalchemy import URL, Engine

from errata.server.ledger.database import open_engine, writing
from errata.server.ledger.tables import PREFIX, VERSION_TABLE, Base


def _ours(name: str | None, kind: str, _parents: object) -> bool:
    return kind != "table" or (name or "").startswith(PREFIX)


def _print(url: URL) -> None:
    """The SQL instead of a connection: `--sql`."""
    context.configure(
        url=url, target_metadata=Base.metadata, version_table=VERSION_TABLE, literal_binds=True, transactional_ddl=True
    )
    with context.begin_transaction():
        context.run_migrations()


def _run(engine: Engine) -> None:
    with writing(engine).connect() as connection:
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            version_table=VERSION_TABLE,
            include_name=_ours,
            render_as_batch=True,
            # SQLite can, now that its transactions begin where we say: a migration is whole or not at all.
            transactional_ddl=True,
        )
        with context.begin_transaction():
            context.run_migrations()


def _connect(url: URL) -> None:
    # Rebuilding an SQLite table drops it for a moment, which foreign keys would forbid.
    engine = open_engine(url, foreign_keys=False)
    try:
        _run(engine)
    finally:
        engine.dispose()


(_print if context.is_offline_mode() else _connect)(context.config.attributes["url"])
