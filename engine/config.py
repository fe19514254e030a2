"""Where this installation keeps its things and which database it talks to.

The environment is read at each call, never at import, so that a test or a caller can change it.
"""

from __future__ import annotations

import getpass
import os
from pathlib import Path

import platformdirs

__all__ = ["configured_dsn", "home", "log_folder", "operator"]

_ROOT_HOME = Path("/var/lib/oms")

# The libpq variables that say WHERE a database is. PGUSER, PGSSLMODE and the like are left out:
# people set them for good and mean no particular server by it.
_PLACE_VARIABLES = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGSERVICE", "PGDATABASE")


def home() -> Path:
    """Return the folder for the embedded server and its programs; it need not exist yet.

    Root gets a folder outside its own home, because Postgres runs as an unprivileged user who
    must be able to reach it.
    """
    chosen = os.environ.get("OMS_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if os.geteuid() == 0:
        return _ROOT_HOME
    return Path(platformdirs.user_data_dir("oms"))


def log_folder() -> Path:
    """The folder for log files: OMS_LOG, else ``log`` in ``home()``; it may not exist yet."""
    chosen = os.environ.get("OMS_LOG")
    return Path(chosen).expanduser().absolute() if chosen else home() / "log"


def configured_dsn() -> str | None:
    """Return the user's own connection string, or ``None`` for the embedded server.

    ``""`` means that libpq's ``PG*`` variables say it all; so compare with ``None``. An empty
    variable counts as unset.
    """
    dsn = os.environ.get("DB_DSN")
    if dsn:
        return dsn
    if any(os.environ.get(name) for name in _PLACE_VARIABLES):
        return ""
    return None


def operator() -> str:
    """Who works with this installation: the login's name, or its number where it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.geteuid())
