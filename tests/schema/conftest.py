"""A filled database, one a worker; each test's writes are rolled back."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from market_cases import build_broker_world
from psycopg import sql
from schema_cases import build_world

from engine.db.connect import Connection, open_connection
from engine.db.embedded import Server
from engine.db.install import OWNER_ROLE


def copy_database(server: Server, template: str, name: str) -> str:
    """Make a database like another one; returns its owner's DSN."""
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
    return psycopg.conninfo.make_conninfo(server.dsn(name), user=OWNER_ROLE)


@pytest.fixture(scope="session")
def world_dsn(server: Server, postgresql_noproc: object) -> str:
    """The owner's DSN of the filled database; nobody commits to it."""
    dsn = copy_database(server, f"{postgresql_noproc.template_dbname}", "world")  # type: ignore[attr-defined]
    with open_connection(dsn) as conn:
        build_world(conn)
    return dsn


@pytest.fixture
def world(world_dsn: str) -> Iterator[Connection]:
    """The owner's connection to the filled database, in a transaction that is rolled back."""
    with open_connection(world_dsn) as conn, conn.transaction(force_rollback=True):
        yield conn


@pytest.fixture(scope="session")
def market_dsn(server: Server, world_dsn: str) -> str:
    """The owner's DSN of the filled database with orders at brokers; nobody commits to it."""
    dsn = copy_database(server, "world", "market")
    with open_connection(dsn) as conn:
        build_broker_world(conn)
    return dsn


@pytest.fixture
def market(market_dsn: str) -> Iterator[Connection]:
    """The owner's connection to orders at brokers, in a transaction that is rolled back."""
    with open_connection(market_dsn) as conn, conn.transaction(force_rollback=True):
        yield conn


@pytest.fixture
def scratch(server: Server, world_dsn: str) -> Iterator[Connection]:
    """The owner's connection to a filled database of its own, in autocommit."""
    name = "scratch"
    with open_connection(copy_database(server, "world", name)) as conn:
        yield conn
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
