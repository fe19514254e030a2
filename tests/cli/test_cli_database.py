"""`oms db`: the embedded server from the first command to the last, and psql."""

from __future__ import annotations

import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from cli_cases import Result, bought, here, oms, process
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from engine.audit import SEED_QUERIES
from engine.db.connect import open_connection
from engine.db.embedded import Server
from engine.db.install import OWNER_ROLE, head

# A path below /tmp must be open to the user who runs the server, when root does not.
OPEN_TO_ALL = 0o755


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A home of our own, so that nobody's real server is touched."""
    base = Path(tempfile.mkdtemp(prefix="oms-cli-"))
    base.chmod(OPEN_TO_ALL)
    yield base / "home"
    process("db", "stop", env={"OMS_HOME": str(base / "home")})
    shutil.rmtree(base)


def test_the_embedded_server_from_the_first_command_to_the_last(home: Path) -> None:
    def run(*arguments: str) -> Result:
        return process(*arguments, env={"OMS_HOME": str(home)})

    before = run("db", "status", "--json")
    assert before.json == {"kind": "embedded", "running": False, "folder": str(home)}
    assert "isn't running" in run("db", "status").out
    assert run("db", "stop").out == "It wasn't running.\n"
    assert not home.exists(), "looking starts nothing"

    # Any command starts it, and makes the schema.
    assert run("user", "add", "alice").code == 0
    status = run("db", "status", "--json").json
    assert (status["running"], status["migration"]) == (True, head())
    assert (status["database"], status["user"]) == ("oms", OWNER_ROLE)
    assert status["folder"].startswith(str(home))
    assert "up to date" in run("db", "start").out
    assert run("db", "start", "--json").json["pid"] == status["pid"]

    url = run("db", "url").out.strip()
    assert url.startswith(f"postgresql://{OWNER_ROLE}@/oms?host=")
    assert run("db", "url", "--json").json == {"url": url}
    with open_connection(url) as conn:
        assert conn.execute("SELECT name FROM app_user").fetchall() == [("alice",)]
    socket = Path(str(conninfo_to_dict(url)["host"]))
    assert stat.S_IMODE(socket.stat().st_mode) & 0o077 == 0

    migrated = run("db", "migrate", "--json").json
    assert migrated == {"before": head(), "after": head(), "to_be_run_by_administrator": []}
    assert "already" in run("db", "migrate").out
    asked = run("db", "psql", "-XAtc", "SELECT current_user, count(*) FROM app_user")
    assert (asked.out, asked.err) == (f"{OWNER_ROLE}|1\n", "")

    assert run("db", "stop", "--json").json == {"running": False, "was_running": True}
    assert run("db", "status", "--json").json["running"] is False
    assert run("user", "list", "--json").json["users"][0]["name"] == "alice"
    assert run("db", "stop").out == "The embedded Postgres is stopped.\n"


def test_the_test_plans_three_queries_run_unchanged_in_psql(dsn: str) -> None:
    bought(dsn)
    commands = [word for query in SEED_QUERIES.values() for word in ("-c", query)]

    asked = process("db", "psql", "-XAt", *commands, env={"DB_DSN": dsn})

    assert (asked.code, asked.out, asked.err) == (0, "0\n", "")


def test_psql_gets_what_is_typed_and_its_exit_code_is_ours(dsn: str) -> None:
    wrong = process(
        "db", "psql", "--dsn", dsn, "-X", "-v", "ON_ERROR_STOP=1", "-c", "nonsense", env={}
    )

    assert wrong.code == 1
    assert "syntax error" in wrong.err


def test_without_any_psql_it_is_said(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.db.embedded.programs", lambda: Path("/no/such/folder"))
    monkeypatch.setenv("PATH", "/no/such/folder")

    refused = here("db", "psql", "--dsn", dsn)

    assert refused.code == 2
    assert "there is no psql" in refused.sentence


def test_the_status_of_a_named_database(dsn: str) -> None:
    bare = here("db", "status", "--dsn", dsn)
    status = oms(dsn, "db", "status", "--json").json

    assert "none, this program needs" in bare.out
    assert (status["kind"], status["running"]) == ("configured", True)
    assert (status["migration"], status["newest_migration"]) == (head(), head())
    assert here("db", "status", "--dsn", "postgresql://x@127.0.0.1:1/x").code == 2


def test_the_url_of_a_named_database_is_itself(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = here("db", "url", "--dsn", "postgresql://a:b@c/d").out
    words = here("db", "url", "--dsn", "host=/x/y user='a b' dbname=d").out
    monkeypatch.delenv("DB_DSN", raising=False)
    monkeypatch.setenv("PGHOST", "somewhere")
    by_variables = here("db", "url").out

    assert url == "postgresql://a:b@c/d\n"
    assert words == "postgresql://a%20b@/d?host=%2Fx%2Fy\n"
    assert by_variables == "postgresql:\n"


def test_a_database_of_ones_own_is_migrated_when_told_to(server: Server) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE own OWNER {OWNER_ROLE}".encode())
    own = make_conninfo(server.dsn("own"), user=OWNER_ROLE)
    env = {"DB_DSN": own}
    try:
        refused = process("run", "list", env=env)
        migrated = process("db", "migrate", env=env)
        listed = process("run", "list", "--json", env=env)
    finally:
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute("DROP DATABASE own WITH (FORCE)")

    assert refused.code == 2
    assert "oms db migrate" in refused.sentence
    assert migrated.out == f"The database is at migration {head()}; it was at none.\n"
    assert listed.json == {"runs": []}
