"""`oms` commands as processes of their own, and the database that they ask for."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from engine.db.connect import Connection
from engine.db.install import grant_roles, head, revision

ROOT = Path(__file__).resolve().parents[1]
END_SECONDS_MAX = 60
_PROGRAM = "import sys; from cli.main import main; sys.exit(main(sys.argv[1:]))"


def oms_process(*words: str) -> list[str]:
    """What starts an `oms` command as a process, from these sources."""
    return [sys.executable, "-c", _PROGRAM, *words]


def environment(**more: str) -> dict[str, str]:
    """What such a process is to find around it."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def as_migrated(owner: Connection) -> None:
    """Have commands take a database, made from ``sql/`` itself, for one that migrations made."""
    if revision(owner) is None:
        owner.execute("CREATE TABLE alembic_version (version_num text PRIMARY KEY)")
        owner.execute("INSERT INTO alembic_version VALUES (%s)", [head()])
        grant_roles(owner)
