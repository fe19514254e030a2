"""A worker whose connection breaks, or whose server hangs or is held up, goes on by itself."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from broker_cases import Wire, a_broker_run, an_account
from waits import SECONDS_MAX, wait_until

from engine import worker
from engine.db.connect import Connection, open_connection
from engine.errors import DatabaseUnavailable, Retryable, translated
from engine.worker import serve, work_through


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


def test_a_worker_whose_server_hangs_goes_on_with_another_connection(
    dsn: str,
    owner_conn: Connection,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server process lives and says nothing: no keepalive notices that."""
    monkeypatch.setattr(worker, "ANSWER_SECONDS_MAX", 2.0)
    wire = Wire(owner_conn, a_broker_run(owner_conn))
    others = [owner_conn.info.backend_pid]
    with psycopg.connect(dsn, autocommit=True, user="postgres") as admin:
        with caplog.at_level("INFO", "oms"), a_worker(dsn) as ended:
            idle: list[tuple[int]] = []

            def is_idle() -> bool:
                idle[:] = admin.execute(_WAITS, [others]).fetchall()
                return bool(idle or ended)

            wait_until(is_idle, "an idle worker")
            ((pid,),) = idle
            os.kill(pid, signal.SIGSTOP)
            try:
                number = wire.say("NOTICE", code="HELLO", message="is anybody there")
                wait_until(lambda: wire.finding(number)[0] or ended, "the word to be taken in")
            finally:
                os.kill(pid, signal.SIGCONT)
            assert ended == []
        assert "WORKER_WAITS" in caplog.messages


def test_a_connection_waits_for_an_answer_for_so_long_and_no_longer(dsn: str) -> None:
    with open_connection(dsn, answer_seconds=0.5) as conn:
        with pytest.raises(Retryable, match="statement timeout"), translated():
            conn.execute("SELECT pg_sleep(60)")
        assert conn.execute("SELECT 1").fetchone() == (1,), "the server ended it in time"
        conn.execute("SET statement_timeout = 0")
        gone = pytest.raises(DatabaseUnavailable, match="the server has not answered")
        with gone, translated(), conn.transaction():
            conn.execute("SELECT pg_sleep(60)")
        assert conn.closed
    with open_connection(dsn) as patient:
        assert patient.execute("SHOW statement_timeout").fetchone() == ("0",)


def test_words_that_others_hold_up_raise_a_person_and_hold_up_no_other_account(
    dsn: str, owner_conn: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    wire = Wire(owner_conn, a_broker_run(owner_conn))
    order_id = wire.working()
    an_account(owner_conn, wire.run.user_id, "DU2")
    free = Wire(owner_conn, wire.run, "DU2")
    fill = wire.fill(order_id, "10", "100", "E1")
    notice = free.say("NOTICE", code="HELLO", message="is anybody there")
    with open_connection(dsn) as holder, open_connection(dsn) as conn:
        conn.execute("SET lock_timeout = '50ms'")
        with holder.transaction(), caplog.at_level("INFO", "oms"):
            holder.execute("SELECT FROM strategy_run FOR UPDATE")
            for _ in range(2):
                taken = work_through(conn)
                assert taken.stuck == {(wire.run.user_id, "DU1")}
            assert wire.finding(fill) == (None, None)
            assert free.finding(notice)[0] == "NEW"
            assert caplog.messages.count("INBOX_STUCK") == 2
            assert wire.alerts() == ["INBOX_STUCK"], "once until somebody has looked"
            assert work_through(conn, resting=taken.stuck).stuck == set()
        assert work_through(conn).words == 1
    assert wire.order(order_id)["status"] == "FILLED"


def test_a_batch_is_tried_as_often_as_is_said(
    owner_conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire(owner_conn, a_broker_run(owner_conn))
    wire.say("NOTICE", code="HELLO", message="is anybody there")
    tried: list[str] = []

    def in_the_way(*_: object, **__: object) -> None:
        tried.append("once more")
        raise Retryable("deadlock detected")

    monkeypatch.setattr(worker, "apply_batch", in_the_way)
    work_through(owner_conn)
    assert len(tried) == worker.ATTEMPTS_MAX


def test_a_worker_that_is_told_to_end_takes_in_what_is_there_for_so_long_and_no_longer(
    dsn: str, owner_conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = Wire(owner_conn, a_broker_run(owner_conn))
    stopped = threading.Event()
    stopped.set()
    first = wire.say("NOTICE", code="HELLO", message="is anybody there")
    serve(dsn, stopped)
    assert wire.finding(first)[0] is None, "it was never there"

    def look(*_: object) -> None:
        number[:] = [wire.say("NOTICE", code="HELLO", message="at the last moment")]
        stopped.set()

    for seconds, finding in ((0.0, None), (10.0, "NEW")):
        monkeypatch.setattr(worker, "LAST_SECONDS_MAX", seconds)
        number: list[int] = []
        stopped.clear()
        serve(dsn, stopped, watches=(look,))
        assert wire.finding(number[0])[0] == finding
