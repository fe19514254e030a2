"""What the tests of the command share: running it, here or as a process, and runs to look at."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import typer.main
from programs import as_migrated
from psycopg import sql

from cli.main import app, main
from engine.db.connect import ENGINE_ROLE, open_connection
from engine.market.store import add_instrument
from engine.runs import add_user

SCRIPT = Path(sysconfig.get_path("scripts"), "oms")
PROCESS_SECONDS_MAX = 120

# What says which database is meant. The tests name theirs, whatever the user's shell says.
_PLACES = ("DB_DSN", "PGHOST", "PGHOSTADDR", "PGPORT", "PGSERVICE", "PGDATABASE", "PGUSER")

_stamped: set[tuple[str, str]] = set()


@dataclass(frozen=True, slots=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, str]:
        """The error that a command with --json left on stderr."""
        assert self.out == ""
        found: dict[str, str] = json.loads(self.err)["error"]
        return found

    @property
    def sentence(self) -> str:
        """The error that a command left: one line, and nothing on stdout."""
        assert self.out == ""
        assert self.err.startswith("Error: ")
        assert self.err.count("\n") == 1
        assert "Traceback" not in self.err
        return self.err.removeprefix("Error: ").rstrip("\n")


def oms(dsn: str, *arguments: str) -> Result:
    """Run a command in this process, on that database, as if its output were a pipe."""
    stamp(dsn)
    return here(*arguments, "--dsn", dsn)


def here(*arguments: str) -> Result:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return Result(code, out.getvalue(), err.getvalue())


def process(*arguments: str, env: Mapping[str, str], cwd: Path | None = None) -> Result:
    """Run the installed command, in an environment that names no database but what ``env`` says."""
    done = subprocess.run(
        [SCRIPT, *arguments],
        env=environment(env),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=PROCESS_SECONDS_MAX,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, with ``env`` alone saying where the database is."""
    kept = {name: value for name, value in os.environ.items() if name not in _PLACES}
    return kept | dict(env)


def stamp(dsn: str) -> None:
    """Note the migration that the tests' database, made from ``sql/``, stands for."""
    # Every test's database has the same name.
    key = (dsn, os.environ["PYTEST_CURRENT_TEST"])
    if key in _stamped:
        return
    _stamped.add(key)
    with open_connection(dsn) as owner:
        as_migrated(owner)


def started(dsn: str, user: str = "alice", *options: str) -> str:
    """A user, known symbols and a RUNNING run; its id."""
    with open_connection(dsn, role=ENGINE_ROLE) as conn:
        for symbol in ("AAPL", "IBM", "MSFT"):
            add_instrument(conn, symbol)
        add_user(conn, user)
    made = oms(dsn, "run", "start", "--user", user, "--cash", "10000", *options, "--json")
    assert made.err == ""
    run_id: str = made.json["run_id"]
    return run_id


def bought(dsn: str) -> str:
    """A run that has bought 2 AAPL at 250 by its plan; its id."""
    run_id = started(dsn, "alice", "--name", "first")
    plan = ("--symbol", "AAPL", "--amount", "500", "--day", "5", "--from", "2024-01-01")
    assert oms(dsn, "sip", "add", "--run-id", run_id, *plan).code == 0
    assert tick(dsn, run_id, "2024-01-05T21:00:00Z", "AAPL=250").code == 0
    return run_id


def tick(dsn: str, run_id: str, at: str, *prices: str) -> Result:
    """Tick a run once, with --json."""
    given = [word for price in prices for word in ("--price", price)]
    return oms(dsn, "tick", "--run-id", run_id, "--at", at, *given, "--json")


@lru_cache(maxsize=1)
def commands() -> dict[str, Any]:
    """Every command that does something, by what is typed for it."""
    found: dict[str, Any] = {}

    def walk(command: Any, words: str) -> None:
        if not hasattr(command, "commands"):
            found[words.strip()] = command
            return
        for name, child in command.commands.items():
            walk(child, f"{words} {name}")

    walk(typer.main.get_command(app), "")
    return found


def counts(dsn: str) -> dict[str, int]:
    """How many rows each table has."""
    with open_connection(dsn) as conn:
        tables = conn.execute(
            """SELECT relname FROM pg_class
               WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' ORDER BY relname"""
        ).fetchall()
        found = {}
        for (table,) in tables:
            row = conn.execute(
                sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(table))
            ).fetchone()
            assert row is not None
            found[table] = row[0]
        return found
