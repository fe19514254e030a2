"""A filled database, one a worker; each test's writes are rolled back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import psycopg
import pytest
from market_cases import build_broker_world
from psycopg import sql
from schema_cases import build_world

from engine.db.connect import Connection, open_connection
from engine.db.embedded import Server
from engine.db.install import OWNER_ROLE

Lend = Callable[[str], AbstractContextManager[Connection]]


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
def filled(server: Server, postgresql_noproc: object) -> str:
    """The name of a filled database to copy; nobody is connected to it."""
    name = "filled"
    empty = f"{postgresql_noproc.template_dbname}"  # type: ignore[attr-defined]
    with open_connection(copy_database(server, empty, name)) as conn:
        build_world(conn)
    return name


@pytest.fixture(scope="session")
def world_dsn(server: Server, filled: str) -> str:
    """The owner's DSN of the filled database; nobody commits to it."""
    return copy_database(server, filled, "world")


@pytest.fixture
def world(world_dsn: str, lend: Lend) -> Iterator[Connection]:
    """The owner's connection to the filled database, in a transaction that is rolled back."""
    with lend(world_dsn) as conn:
        yield conn


@pytest.fixture(scope="session")
def market_dsn(server: Server, filled: str) -> str:
    """The owner's DSN of the filled database with orders at brokers; nobody commits to it."""
    dsn = copy_database(server, filled, "market")
    with open_connection(dsn) as conn:
        build_broker_world(conn)
    return dsn


@pytest.fixture
def market(market_dsn: str, lend: Lend) -> Iterator[Connection]:
    """The owner's connection to orders at brokers, in a transaction that is rolled back."""
    with lend(market_dsn) as conn:
        yield conn


@pytest.fixture
def scratch(server: Server, filled: str) -> Iterator[Connection]:
    """The owner's connection to a filled database of its own, in autocommit."""
    name = "scratch"
    with open_connection(copy_database(server, filled, name)) as conn:
        yield conn
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
