"""Where it is measured: one embedded server of our own, durable, gone at the end.

Every measurement gets a database of its own, cloned from one that is migrated and knows the
market, so that none pays for another's rows.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
from psycopg import sql

from bench.market import open_market
from bench.strategies import NAME as ALTERNATING
from engine.audit import Finding, audit
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.db.embedded import Server, reachable_programs
from engine.db.install import OWNER_ROLE, migrate, own_database
from engine.errors import ConfigurationError
from engine.runs import Run, Terms, add_user, create_run, start_run

__all__ = ["DURABLE", "Ground", "ground", "new_run", "temporary_folder"]

AUDITOR_ROLE = "oms_auditor"
# What a figure without would be worth nothing.
DURABLE = ("fsync", "synchronous_commit", "full_page_writes")
INITIAL_CASH = Decimal(1_000_000)
_TEMPLATE = "market"


@dataclass(frozen=True, slots=True)
class Ground:
    """The server, and the databases of ours that measurements have written into."""

    server: Server
    databases: list[str] = field(default_factory=list)

    @property
    def programs(self) -> Path:
        """The folder of the server's programs; pgbench is one."""
        return self.server.bin_dir

    def database(self, name: str) -> str:
        """Make a database that knows the market; returns its owner's DSN."""
        self.copy(_TEMPLATE, name)
        self.databases.append(name)
        return self.owner_dsn(name)

    def copy(self, name: str, into: str) -> str:
        """Make a copy of a database that nobody is connected to; returns a superuser's DSN.

        It isn't audited: what becomes of it is the caller's business.
        """
        with open_connection(self.server.dsn()) as admin:
            admin.execute(
                sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE {}").format(
                    *map(sql.Identifier, (into, OWNER_ROLE, name))
                )
            )
        return self.server.dsn(into)

    def owner_dsn(self, name: str) -> str:
        """The DSN of the owner of a database of ours."""
        return psycopg.conninfo.make_conninfo(self.server.dsn(name), user=OWNER_ROLE)

    def settings(self) -> dict[str, str]:
        """What the server says of its durability, by setting."""
        with open_connection(self.server.dsn()) as admin:
            return {name: _show(admin, name) for name in DURABLE}

    def audited(self) -> dict[str, list[Finding]]:
        """What the audit finds in each database that was written into; right is nothing."""
        return {name: self._audit(name) for name in self.databases}

    def _audit(self, name: str) -> list[Finding]:
        with open_connection(self.owner_dsn(name), role=AUDITOR_ROLE) as conn:
            return audit(conn)


def _show(conn: Connection, name: str) -> str:
    row = conn.execute(sql.SQL("SHOW {}").format(sql.Identifier(name))).fetchone()
    assert row is not None
    return str(row[0])


@contextmanager
def ground() -> Iterator[Ground]:
    """A server with its settings as users have them, for the length of a block.

    It lies in the temporary folder, which TMPDIR names: on the disk that is to be measured.

    Raises ConfigurationError where it isn't durable.
    """
    with temporary_folder() as base:
        server = Server(base / "server", bin_dir=reachable_programs(base / "programs"))
        try:
            server.start()
            made = Ground(server)
            unsafe = [name for name, value in made.settings().items() if value != "on"]
            if unsafe:
                raise ConfigurationError(f"the benchmark's server has {', '.join(unsafe)} off")
            dsn = own_database(server.dsn(), _TEMPLATE)
            migrate(dsn)
            with open_connection(dsn, role=ENGINE_ROLE) as conn:
                open_market(conn)
            yield made
        finally:
            server.stop("immediate")


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that the server's user can reach, removed after the block."""
    base = Path(tempfile.mkdtemp(prefix="oms-bench-"))
    base.chmod(0o755)
    try:
        yield base
    finally:
        shutil.rmtree(base)


def new_run(conn: Connection, *, every: int | None = None) -> Run:
    """A RUNNING run of a user of its own.

    With ``every`` its strategy orders every so many minutes, without it never.
    """
    user_id: UUID = add_user(conn, f"bench-{uuid4()}")
    terms = (
        Terms("engine.strategies.base:Strategy", initial_cash=INITIAL_CASH)
        if every is None
        else Terms(ALTERNATING, {"every": every}, INITIAL_CASH)
    )
    run = create_run(conn, user_id, terms)
    return start_run(conn, user_id, run.run_id)
