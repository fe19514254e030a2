"""`oms db`: the embedded server from the first command to the last, and psql."""

from __future__ import annotations

import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
from cli_cases import Result, bought, here, oms, process
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cli.completion import complete_run
from engine.audit import SEED_QUERIES
from engine.db.connect import open_connection
from engine.db.embedded import Server
from engine.db.install import OWNER_ROLE, head
from engine.errors import ConfigurationError

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

    assert run("db", "stop").out == "It wasn't running.\n"
    assert not home.exists(), "looking starts nothing"

    # Any command starts it, and makes the schema.
    assert run("user", "add", "alice").code == 0
    url = run("db", "url").out.strip()
    assert url.startswith(f"postgresql://{OWNER_ROLE}@/oms?host=")
    with open_connection(url) as conn:
        assert conn.execute("SELECT name FROM app_user").fetchall() == [("alice",)]
    socket = Path(str(conninfo_to_dict(url)["host"]))
    assert stat.S_IMODE(socket.stat().st_mode) & 0o077 == 0
    asked = run("db", "psql", "-XAtc", "SELECT current_user, count(*) FROM app_user")
    assert (asked.out, asked.err) == (f"{OWNER_ROLE}|1\n", "")

    assert run("db", "stop", "--json").json == {"running": False, "was_running": True}
    assert run("user", "list", "--json").json["users"][0]["name"] == "alice"
    assert run("db", "stop").out == "The embedded Postgres is stopped.\n"


def test_the_embedded_server_says_how_it_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DB_DSN", "PGHOST", "PGHOSTADDR", "PGPORT", "PGSERVICE", "PGDATABASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMS_HOME", str(home.parent / "nowhere"))
    nowhere = here("db", "status", "--json").json
    assert nowhere == {"kind": "embedded", "running": False, "folder": f"{home.parent}/nowhere"}
    assert here("db", "stop").out == "It wasn't running.\n"

    monkeypatch.setenv("OMS_HOME", str(home))
    assert "up to date" in here("db", "start").out
    status = here("db", "status", "--json").json
    assert (status["running"], status["migration"]) == (True, head())
    assert (status["database"], status["user"]) == ("oms", OWNER_ROLE)
    assert status["folder"].startswith(str(home))
    assert here("db", "start", "--json").json["pid"] == status["pid"]
    assert complete_run(SimpleNamespace(params={}), "") == []  # type: ignore[arg-type]

    migrated = here("db", "migrate", "--json").json
    assert migrated == {"before": head(), "after": head(), "to_be_run_by_administrator": []}
    assert "already" in here("db", "migrate").out

    monkeypatch.setenv("DB_DSN", "postgresql://x@127.0.0.1:1/x")
    assert here("db", "start").code == 0, "the embedded one, whatever other commands use"
    monkeypatch.delenv("DB_DSN")

    assert here("db", "stop", "--json").json == {"running": False, "was_running": True}
    assert here("db", "status", "--json").json["running"] is False
    assert "isn't running" in here("db", "status").out
    assert complete_run(SimpleNamespace(params={}), "") == []  # type: ignore[arg-type]


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


def test_psql_is_our_own_or_the_one_on_path(
    dsn: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[tuple[Path, list[str]]] = []
    monkeypatch.setattr("os.execv", lambda program, words: started.append((program, words)))
    assert here("db", "psql", "--dsn", dsn, "-c", "SELECT 1").code == 0

    (tmp_path / "psql").write_text("")
    (tmp_path / "psql").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("engine.db.embedded.programs", _no_wheel)
    assert here("db", "psql", "--dsn", dsn).code == 0

    (own, words), (on_path, _) = started
    assert (own.name, words[1:]) == ("psql", ["--dbname", dsn, "-c", "SELECT 1"])
    assert on_path == tmp_path / "psql"


def _no_wheel() -> Path:
    raise ConfigurationError("the wheel is not installed")


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


@contextmanager
def _database(server: Server, owner: str) -> Iterator[str]:
    """An empty database of that owner; its DSN."""
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE own OWNER {owner}".encode())
        try:
            yield make_conninfo(server.dsn("own"), user=owner)
        finally:
            admin.execute("DROP DATABASE own WITH (FORCE)")


def test_a_database_of_ones_own_is_migrated_when_told_to(server: Server) -> None:
    with _database(server, OWNER_ROLE) as own:
        refused = process("run", "list", env={"DB_DSN": own})
        migrated = process("db", "migrate", env={"DB_DSN": own})
        listed = process("run", "list", "--json", env={"DB_DSN": own})

    assert refused.code == 2
    assert "oms db migrate" in refused.sentence
    assert migrated.out == f"The database is at migration {head()}; it was at none.\n"
    assert listed.json == {"runs": []}


def test_what_only_an_administrator_may_do_is_said(server: Server) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute("CREATE ROLE plain_owner LOGIN")
    try:
        with _database(server, "plain_owner") as own:
            told = here("db", "migrate", "--dsn", own)
            document = here("db", "migrate", "--dsn", own, "--json").json
    finally:
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute("DROP ROLE plain_owner")

    missing = document["to_be_run_by_administrator"]
    assert told.code == 0
    assert "GRANT oms_engine TO plain_owner;" in missing
    assert f"An administrator must run: {missing[0]}" in told.out
