"""Databases made, migrated and refused: engine/db/install.py on real servers."""

from __future__ import annotations

import subprocess
import sys
import threading

import psycopg
import pytest

from engine.db import install
from engine.db.connect import open_connection
from engine.db.embedded import Server
from engine.errors import ConfigurationError

WAIT_SECONDS_MAX = 90


def test_a_database_is_made_once_however_many_ask(server: Server) -> None:
    told: list[str] = []
    barrier = threading.Barrier(4)

    def ask() -> None:
        barrier.wait(WAIT_SECONDS_MAX)
        told.append(install.own_database(server.dsn(), "wanted"))

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(WAIT_SECONDS_MAX)
    assert len(set(told)) == 1
    with open_connection(told[0]) as conn:
        assert conn.execute("SELECT current_user, current_database()").fetchone() == (
            "oms_owner",
            "wanted",
        )


def test_the_owner_is_no_superuser(server: Server) -> None:
    install.own_database(server.dsn(), "wanted")
    with psycopg.connect(server.dsn()) as admin:
        row = admin.execute(
            "SELECT rolsuper, rolbypassrls FROM pg_roles WHERE rolname = 'oms_owner'"
        ).fetchone()
    assert row == (False, False)


def test_migrate_up_down_and_up_again(server: Server) -> None:
    dsn = install.own_database(server.dsn(), "stairs")
    for _ in range(2):
        install.migrate(dsn)
        with open_connection(dsn) as conn:
            install.require_schema(conn)
        install.downgrade(dsn, "base")
        with open_connection(dsn) as conn:
            left = conn.execute(
                """SELECT relname FROM pg_class
                   WHERE relnamespace = 'public'::regnamespace AND relname !~ '^alembic'
                   UNION ALL SELECT proname FROM pg_proc
                   WHERE pronamespace = 'public'::regnamespace"""
            ).fetchall()
            assert left == []
            assert install.revision(conn) is None


def test_two_programs_migrate_one_database(server: Server) -> None:
    dsn = install.own_database(server.dsn(), "race")
    program = f"from engine.db.install import migrate; migrate({dsn!r})"
    racers = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [racer.wait(WAIT_SECONDS_MAX) for racer in racers] == [0, 0]
    with open_connection(dsn) as conn:
        install.require_schema(conn)


def test_a_database_without_the_schema_is_refused_with_what_to_do(server: Server) -> None:
    dsn = install.own_database(server.dsn(), "bare")
    with (
        open_connection(dsn) as conn,
        pytest.raises(ConfigurationError, match="has no schema; run `oms db migrate`"),
    ):
        install.require_schema(conn)


def test_a_newer_schema_is_refused(server: Server) -> None:
    dsn = install.own_database(server.dsn(), "newer")
    install.migrate(dsn)
    with open_connection(dsn) as conn:
        conn.execute("UPDATE alembic_version SET version_num = '9999'")
        with pytest.raises(ConfigurationError, match="upgrade oms"):
            install.require_schema(conn)


def test_what_is_in_a_migrations_way_is_told_in_one_sentence(server: Server) -> None:
    dsn = install.own_database(server.dsn(), "blocked")
    with open_connection(dsn) as conn:
        conn.execute("CREATE TABLE app_user ()")
        with pytest.raises(ConfigurationError) as caught:
            install.migrate(dsn)
        assert str(caught.value) == (
            "the database refused the migration and nothing was changed: "
            'relation "app_user" already exists; put that right and migrate again'
        )
        assert install.revision(conn) is None
        conn.execute("DROP TABLE app_user")
    install.migrate(dsn)


def test_a_server_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(ConfigurationError, match="can't connect to Postgres") as caught:
        open_connection("host=/nowhere dbname=oms")
    assert "\n" not in str(caught.value)
