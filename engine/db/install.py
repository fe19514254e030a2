"""The schema in a database: how far its migrations are, and bringing them up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from engine import resources
from engine.db.connect import Connection, open_connection
from engine.errors import ConfigurationError

if TYPE_CHECKING:
    from alembic.config import Config

SERVER_VERSION_MIN = 150_000
OWNER_ROLE = "oms_owner"


def load_schema(conn: Connection) -> None:
    """Run ``sql/`` in its order: the schema as it stands. For tests; users migrate."""
    folder = resources.sql_dir()
    with conn.transaction():
        for name in (folder / "order.txt").read_text().split():
            conn.execute((folder / name).read_bytes())


def revision(conn: Connection) -> str | None:
    """The migration that a database is at; ``None`` for one without the schema."""
    found = conn.execute("SELECT to_regclass('public.alembic_version') IS NOT NULL").fetchone()
    if found != (True,):
        return None
    row = conn.execute("SELECT version_num FROM public.alembic_version").fetchone()
    return row[0] if row else None


def head() -> str:
    """The newest migration that this installation knows."""
    # The file names say it; importing Alembic for it would cost every command a third of a second.
    return max(path.stem for path in (resources.migrations_dir() / "versions").glob("*.py"))[:4]


def require_schema(conn: Connection) -> None:
    """Raise ConfigurationError, saying what to do, unless the database is at ``head()``."""
    at, wanted = revision(conn), head()
    if at == wanted:
        return
    if at is not None and at > wanted:
        raise ConfigurationError(
            f"the database is at migration {at}, newer than this program's {wanted}; upgrade oms"
        )
    state = "has no schema" if at is None else f"is at migration {at}, this program needs {wanted}"
    raise ConfigurationError(f"the database {state}; run `oms db migrate` as its owner")


def migrate(dsn: str, to: str = "head") -> None:
    """Bring a database up to a migration, as its owner; two at once take turns.

    Raises ConfigurationError for a server older than Postgres 15, and where the login may not or
    something is in the way; nothing is changed then.
    """
    from alembic import command

    with open_connection(dsn) as conn:
        if conn.info.server_version < SERVER_VERSION_MIN:
            major = conn.info.server_version // 10_000
            raise ConfigurationError(f"this is Postgres {major}; oms needs 15 or newer")
    with _refusals_told(), _config(dsn) as config:
        command.upgrade(config, to)


def downgrade(dsn: str, to: str) -> None:
    """Take a database back to a migration; ``base`` takes the schema and all its rows away.

    Raises ConfigurationError where the database refuses it.
    """
    from alembic import command

    with _refusals_told(), _config(dsn) as config:
        command.downgrade(config, to)


@contextmanager
def _refusals_told() -> Iterator[None]:
    """What the database answered in one sentence, without the whole migration that it answered."""
    import sqlalchemy.exc

    try:
        yield
    except sqlalchemy.exc.DBAPIError as error:
        if not isinstance(error.orig, psycopg.Error):
            raise
        said = error.orig.diag.message_primary or str(error.orig)
        if isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
            raise ConfigurationError(
                f"the login may not migrate: {said}; migrate as the database's owner"
            ) from error
        raise ConfigurationError(
            f"the database refused the migration and nothing was changed: {said}; "
            f"{error.orig.diag.message_hint or 'put that right and migrate again'}"
        ) from error


@contextmanager
def _config(dsn: str) -> Iterator[Config]:
    """Alembic's configuration, with a connection in one transaction under one lock."""
    import sqlalchemy
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(resources.migrations_dir()).replace("%", "%%"))

    def connect() -> Connection:
        conn = open_connection(dsn)
        conn.autocommit = False  # SQLAlchemy begins and commits by itself
        return conn

    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://", creator=connect, poolclass=sqlalchemy.pool.NullPool
    )
    with engine.begin() as connection:
        # Two programs that start at once must not both create the schema. This lock orders
        # migrations only; nothing that a user's rows depend on rests on it.
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7265)")
        config.attributes["connection"] = connection
        yield config


def embedded_dsn() -> str:
    """Start the user's own embedded server if need be, and return its database's DSN, migrated.

    The login is ``oms_owner``, which owns the database and is no superuser. Raises
    ConfigurationError where the server can't be started.
    """
    from engine.db.embedded import default_server

    server = default_server()
    server.start()
    dsn = own_database(server.dsn(), "oms")
    with open_connection(dsn) as conn:
        at = revision(conn)
    if at is None or at < head():
        migrate(dsn)
    return dsn


def own_database(superuser_dsn: str, name: str) -> str:
    """Make ``oms_owner`` and a database of its own, unless they exist; returns the owner's DSN."""
    with open_connection(superuser_dsn) as conn:
        for statement, present in (
            (
                sql.SQL("CREATE ROLE {} LOGIN CREATEROLE").format(sql.Identifier(OWNER_ROLE)),
                ("SELECT FROM pg_roles WHERE rolname = %s", OWNER_ROLE),
            ),
            (
                sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE template0").format(
                    sql.Identifier(name), sql.Identifier(OWNER_ROLE)
                ),
                ("SELECT FROM pg_database WHERE datname = %s", name),
            ),
        ):
            if conn.execute(present[0].encode(), [present[1]]).rowcount:
                continue
            try:
                conn.execute(statement)
            except (
                psycopg.errors.DuplicateObject,
                psycopg.errors.DuplicateDatabase,
                psycopg.errors.UniqueViolation,
            ):
                continue  # another process has just made it
    return psycopg.conninfo.make_conninfo(superuser_dsn, user=OWNER_ROLE, dbname=name)


def grant_roles(conn: Connection) -> list[str]:
    """Grant the roles their rights, as the owner; returns what an administrator must still run."""
    return [statement for (statement,) in conn.execute("SELECT grant_roles()").fetchall()]
