"""A worker whose connection breaks goes on by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from broker_cases import Wire, a_broker_run
from waits import SECONDS_MAX, wait_until

from engine.db.connect import Connection
from engine.worker import serve


@contextmanager
def a_worker(dsn: str) -> Iterator[list[BaseException]]:
    """A worker in a thread for the length of a block; yields what it ended by."""
    stopped = threading.Event()
    ended_by: list[BaseException] = []

    def work() -> None:
        try:
            serve(dsn, stopped)
        except BaseException as error:
            ended_by.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield ended_by
    finally:
        stopped.set()
        thread.join(SECONDS_MAX)


_WAITS = """SELECT pid FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'oms' AND state = 'idle'
      AND wait_event = 'ClientRead' AND query NOT LIKE 'SET ROLE %%'
      AND NOT pid = ANY (%s)"""


def test_a_worker_that_waits_for_news_outlives_its_connection(
    dsn: str, owner_conn: Connection
) -> None:
    wire = Wire(owner_conn, a_broker_run(owner_conn))
    others = [owner_conn.info.backend_pid]
    with psycopg.connect(dsn, autocommit=True, user="postgres") as admin, a_worker(dsn) as ended:
        for _ in range(2):
            wait_until(
                lambda: admin.execute(_WAITS, [others]).fetchone() or ended, "an idle worker"
            )
            assert ended == []
            for (pid,) in admin.execute(_WAITS, [others]).fetchall():
                admin.execute("SELECT pg_terminate_backend(%s)", [pid])
                others.append(pid)
        number = wire.say("NOTICE", code="HELLO", message="is anybody there")
        wait_until(lambda: wire.finding(number)[0] or ended, "the word to be taken in")
        assert ended == []


def test_a_worker_that_has_come_upon_a_standby_looks_again(
    dsn: str, owner_conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    wire = Wire(owner_conn, a_broker_run(owner_conn))
    name = owner_conn.info.dbname
    with psycopg.connect(dsn, autocommit=True, user="postgres") as admin:
        admin.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'.encode())
        with caplog.at_level("INFO", "oms"), a_worker(dsn) as ended:
            number = wire.say("NOTICE", code="HELLO", message="is anybody there")
            wait_until(
                lambda: "WORKER_WAITS" in caplog.messages or ended, "the worker to have tried"
            )
            admin.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only'.encode())
            wait_until(lambda: wire.finding(number)[0] or ended, "the word to be taken in")
            assert ended == []
