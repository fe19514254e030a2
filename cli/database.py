"""Which database a command talks to, and as whom.

A command acts with the least rights that serve: reading as the auditor, trading as the engine,
deleting and migrating as the owner.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

from cli.output import note

if TYPE_CHECKING:
    from engine.db.connect import Connection

__all__ = [
    "EMBEDDED_DATABASE",
    "acting",
    "embedded_dsn",
    "is_embedded",
    "owner_dsn",
    "owning",
    "reading",
]

EMBEDDED_DATABASE = "oms"
_READER_ROLE = "oms_auditor"


def owner_dsn(dsn: str | None) -> str:
    """The DSN to use: the given one, else the configured one, else the embedded server's.

    The embedded server is started, and its database migrated, if need be. ``""`` means that
    libpq's own variables say it all.
    """
    from engine import config

    chosen = dsn or config.configured_dsn()
    return embedded_dsn() if chosen is None else chosen


def embedded_dsn() -> str:
    """The embedded server's DSN, whatever is configured; it is started if need be."""
    from engine import config
    from engine.db import install

    if not config.home().exists():
        note(f"Setting up a Postgres of our own in {config.home()}; this happens once.")
    return install.embedded_dsn()


def is_embedded(dsn: str | None) -> bool:
    """Whether nobody has named a database, so that the embedded one is meant."""
    from engine import config

    return not dsn and config.configured_dsn() is None


def reading(dsn: str | None) -> AbstractContextManager[Connection]:
    """A connection that can read and nothing else."""
    return _connected(dsn, _READER_ROLE)


def acting(dsn: str | None) -> AbstractContextManager[Connection]:
    """A connection as the engine's role."""
    from engine.db.connect import ENGINE_ROLE

    return _connected(dsn, ENGINE_ROLE)


def owning(dsn: str | None) -> AbstractContextManager[Connection]:
    """A connection as whoever the DSN says, who should be the owner of the tables."""
    return _connected(dsn, None)


@contextmanager
def _connected(dsn: str | None, role: str | None) -> Iterator[Connection]:
    from engine.db.connect import open_connection
    from engine.db.install import require_schema

    with open_connection(owner_dsn(dsn), role=role) as conn:
        # A database that somebody named is theirs: it is checked, never migrated in silence.
        require_schema(conn)
        yield conn
