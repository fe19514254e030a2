"""A disposable Postgres for every test run: the wheel's own, or any other by option.

Each worker starts one server (fsync off: killing it loses nothing, only the machine could) and
pytest-postgresql keeps a template database on it. A test takes what it needs:

* ``conn``: the owner's connection in a transaction that is rolled back; fast, the default.
* ``dsn``: a database of its own, cloned from the template, for commits and several connections.
* ``engine_conn``: an autocommit connection to ``dsn`` as the engine's role.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from psycopg import sql
from psycopg.rows import tuple_row
from pytest_postgresql import factories

import engine.journal
import engine.tick
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.db.embedded import Server, reachable_programs
from engine.db.install import OWNER_ROLE, load_schema

Lend = Callable[[str], AbstractContextManager[Connection]]

_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "60",
    # A clone is written to the log whole; a gigabyte of it would be kept.
    "max_wal_size": "128MB",
    "shared_buffers": "32MB",
    # What plpgsql would let pass in silence fails a test.
    "plpgsql.extra_errors": "all",
    # A time zone far from UTC, so that a slip shows.
    "timezone": "America/New_York",
}
_server = pytest.StashKey[tuple[Server, Path, Path]]()
# A file system in memory, used if it has so much room.
_MEMORY = Path("/dev/shm")
_ROOM_BYTES = 4 * 2**30
# For pytest-postgresql, which knows nothing of our options.
_PROVEN = "OMS_TESTS_PROVEN"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--server",
        default="18",
        help="which Postgres to test on: 18 or 16 (the wheel's), or a folder of programs",
    )
    parser.addoption(
        "--proven",
        action="store_true",
        help="leave ticks_write to the owner, so that triggers prove again what it writes",
    )


# How long an example takes, or to think of one, says how busy the machine is, and nothing more; and
# what an example does to a database the test itself rolls back.
settings.register_profile(
    "oms",
    settings.default,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("oms")


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: while scenarios wait for processes, others work."""
    return 1 + (os.cpu_count() or 1)


def pytest_configure(config: pytest.Config) -> None:
    """Start the worker's server and tell pytest-postgresql where it is."""
    # Who only hands out tests to workers needs none.
    hands_out = getattr(config.option, "dist", "no") != "no"
    if config.option.collectonly or config.option.help or hands_out:
        return
    base = _folder()
    # Programs that tests start log there, not in the user's own folder.
    os.environ["OMS_LOG"] = str(base / "log")
    wanted = str(config.option.server)
    data = _folder(_memory())
    folder = (data / "server").resolve()
    programs = (
        reachable_programs(base / "programs", int(wanted)) if wanted.isdigit() else Path(wanted)
    )
    server = Server(folder, bin_dir=programs, settings=_SETTINGS)
    server.start()
    config.stash[_server] = (server, base, data)
    with psycopg.connect(server.dsn()) as admin:
        admin.execute(f"CREATE ROLE {OWNER_ROLE} LOGIN CREATEROLE")
        host, port = admin.info.host, admin.info.port
    os.environ[_PROVEN] = "yes" if config.option.proven else ""
    config.option.postgresql_host = host
    config.option.postgresql_port = port
    config.option.postgresql_user = "postgres"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what asks for the server: nothing else can differ from one server to another."""
    for item in items:
        if {"server", "postgresql"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("database")


def pytest_unconfigure(config: pytest.Config) -> None:
    if _server in config.stash:
        server, *folders = config.stash[_server]
        server.stop("immediate")
        for folder in folders:
            shutil.rmtree(folder)


def _folder(inside: Path | None = None) -> Path:
    """A new folder that the account which runs Postgres can reach."""
    folder = Path(tempfile.mkdtemp(prefix="oms-tests-", dir=inside))
    folder.chmod(0o755)
    return folder


def _memory() -> Path | None:
    """Where a database is cloned in a third of the time; programs may not be run from there."""
    if not os.access(_MEMORY, os.W_OK) or shutil.disk_usage(_MEMORY).free < _ROOM_BYTES:
        return None
    return _MEMORY


def _install(*, host: str, port: int, user: str, dbname: str, **_: object) -> None:
    """Load ``sql/`` into the template as the owner, who is no superuser."""
    admin_dsn = psycopg.conninfo.make_conninfo(host=host, port=port, user=user, dbname=dbname)
    with psycopg.connect(admin_dsn) as admin:
        admin.execute(f"GRANT CREATE ON SCHEMA public TO {OWNER_ROLE} WITH GRANT OPTION".encode())
    with open_connection(psycopg.conninfo.make_conninfo(admin_dsn, user=OWNER_ROLE)) as owner:
        load_schema(owner)
    if os.environ[_PROVEN]:
        with psycopg.connect(admin_dsn) as admin:
            admin.execute(f"ALTER FUNCTION ticks_write OWNER TO {OWNER_ROLE}".encode())


postgresql_noproc = factories.postgresql_noproc(load=[_install])
postgresql = factories.postgresql("postgresql_noproc")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Server:
    """The server of this worker."""
    return request.config.stash[_server][0]


@pytest.fixture
def dsn(postgresql: psycopg.Connection) -> str:
    """The owner's DSN of a database that belongs to this test alone."""
    return psycopg.conninfo.make_conninfo(postgresql.info.dsn, user=OWNER_ROLE)


@pytest.fixture
def owner_conn(dsn: str) -> Iterator[Connection]:
    """An autocommit connection to ``dsn`` as the owner of the tables."""
    with open_connection(dsn) as conn:
        yield conn


@pytest.fixture
def engine_conn(dsn: str) -> Iterator[Connection]:
    """An autocommit connection to ``dsn`` as the engine's role."""
    with open_connection(dsn, role=ENGINE_ROLE) as conn:
        yield conn


@pytest.fixture(scope="session")
def shared_dsn(server: Server, postgresql_noproc: object) -> str:
    """The owner's DSN of the database in which tests roll back."""
    template = f"{postgresql_noproc.template_dbname}"  # type: ignore[attr-defined]
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(
            sql.SQL("CREATE DATABASE shared TEMPLATE {}").format(sql.Identifier(template))
        )
    return psycopg.conninfo.make_conninfo(server.dsn("shared"), user=OWNER_ROLE)


@pytest.fixture(scope="session")
def lend() -> Iterator[Lend]:
    """Lend the owner's connection to a database, in a transaction that is rolled back.

    One connection serves every test of a worker, as one serves a program all day: a new one reads
    the catalog and every function anew, which took longer than most tests.
    """
    kept: dict[str, Connection] = {}

    @contextmanager
    def lent(dsn: str) -> Iterator[Connection]:
        if dsn not in kept or kept[dsn].closed:
            kept[dsn] = open_connection(dsn)
        owner = kept[dsn]
        try:
            with owner.transaction(force_rollback=True):
                yield owner
        finally:
            # What the engine remembers of a connection is of books that never were.
            engine.tick._kept.pop(owner, None)
            engine.journal._has_prepared.discard(owner)
            owner.row_factory = tuple_row
            if not owner.closed:
                owner.execute("DEALLOCATE ALL")

    yield lent
    for owner in kept.values():
        owner.close()


@pytest.fixture
def conn(shared_dsn: str, lend: Lend) -> Iterator[Connection]:
    """The owner's connection, in a transaction that is rolled back after the test."""
    with lend(shared_dsn) as owner:
        yield owner
