"""Health and status: up is not well, and one command shows how it stands."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from uuid import UUID, uuid4

import pytest
from broker_cases import ACCOUNT, NOW, Wire
from snapshot_cases import Books

from cli.main import main
from engine.db.connect import Connection
from engine.health import Check, Health, health, status
from engine.log import LOGGER

D = Decimal
SECOND = timedelta(seconds=1)


def wrong(found: Health) -> list[Check]:
    assert found.healthy == all(check.healthy for check in found.checks)
    return [check for check in found.checks if not check.healthy]


def connected(wire: Wire, heard: timedelta = timedelta(0)) -> None:
    """A connector holds the account, and has heard its broker."""
    wire.conn.execute(
        """INSERT INTO broker_lease (user_id, account, holder, holder_name, taken_at, expires_at,
                                     connected, last_heard_at, clock_skew)
           VALUES (%s, %s, %s, 'here', %s, %s, true, %s, '0.25 s')
           ON CONFLICT (user_id, account) DO UPDATE SET last_heard_at = excluded.last_heard_at""",
        [
            wire.run.user_id,
            ACCOUNT,
            wire.holder,
            NOW,
            wire.now + timedelta(hours=1),
            wire.now - heard,
        ],
    )


def bought(wire: Wire, quantity: str = "10") -> UUID:
    order_id = wire.working(quantity=quantity)
    wire.fill(order_id, quantity, "100", f"E{order_id}")
    wire.apply()
    return order_id


@pytest.fixture
def books(wire: Wire) -> Books:
    """Ten AAPL that both sides know of."""
    bought(wire)
    known = Books(wire, positions={"AAPL": "10"}, cash={"USD": "99000"})
    known.reconcile()
    connected(wire)
    return known


@pytest.fixture
def told() -> Iterator[list[logging.LogRecord]]:
    """What is logged meanwhile."""
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    keep = Keep()
    logging.getLogger(LOGGER).addHandler(keep)
    yield records
    logging.getLogger(LOGGER).removeHandler(keep)


@pytest.mark.scenario("OPS-02")
def test_health_endpoint_includes_position_sanity_check(
    wire: Wire, books: Books, told: list[logging.LogRecord]
) -> None:
    """All processes are up and heard; what is wrong is what we hold."""
    user_id = wire.run.user_id
    assert wrong(health(wire.conn, user_id, wire.now)) == []
    assert told == []
    books.positions["AAPL"] = "7"
    books.reconcile()
    connected(wire)
    (found,) = wrong(health(wire.conn, user_id, wire.now))
    assert (found.check, found.code) == ("positions", "HEALTH_POSITIONS")
    assert found.subject == f"{ACCOUNT}/AAPL"
    assert found.detail == "AAPL: ours 10, the broker's 7, the ledger's 10"
    (record,) = [record for record in told if record.getMessage() == "HEALTH_POSITIONS"]
    assert record.levelno == logging.ERROR
    # An alert, and one until somebody has looked.
    health(wire.conn, user_id, wire.now)
    assert wire.alerts().count("HEALTH_POSITIONS") == 1
    # It is well again when they agree again.
    books.positions["AAPL"] = "10"
    books.reconcile()
    connected(wire)
    assert wrong(health(wire.conn, user_id, wire.now)) == []


def test_a_position_that_the_ledger_does_not_tell_is_found(wire: Wire, books: Books) -> None:
    conn, key = wire.conn, [wire.run.user_id, wire.run.run_id]
    conn.execute("ALTER TABLE position DISABLE TRIGGER USER")
    conn.execute("UPDATE position SET quantity = 11 WHERE user_id = %s AND run_id = %s", key)
    conn.execute("ALTER TABLE position ENABLE TRIGGER USER")
    (found,) = wrong(health(conn, wire.run.user_id, wire.now))
    assert found.subject == f"{wire.run.run_id}/AAPL"
    assert found.detail == "AAPL: ours 11, the broker's not known, the ledger's 10"
    assert books.positions == {"AAPL": "10"}


def test_what_no_broker_has_confirmed_is_not_well(wire: Wire) -> None:
    connected(wire)
    assert wrong(health(wire.conn, wire.run.user_id, wire.now)) == []
    bought(wire)
    connected(wire)
    (found,) = wrong(health(wire.conn, wire.run.user_id, wire.now))
    assert found.code == "HEALTH_POSITIONS"
    assert found.detail == "AAPL: ours 10, the broker's not known, the ledger's not known"


def test_a_snapshot_from_before_a_fill_is_no_contradiction(wire: Wire, books: Books) -> None:
    bought(wire, "5")
    connected(wire)
    assert wrong(health(wire.conn, wire.run.user_id, wire.now)) == []
    assert books.positions == {"AAPL": "10"}


def test_silence_and_a_backlog_are_not_well(wire: Wire, books: Books) -> None:
    user_id = wire.run.user_id
    connected(wire, heard=60 * SECOND)
    assert wrong(health(wire.conn, user_id, wire.now)) == []
    connected(wire, heard=60 * SECOND + timedelta(microseconds=1))
    (found,) = wrong(health(wire.conn, user_id, wire.now))
    assert (found.check, found.code, found.subject) == ("heartbeat", "HEARTBEAT_LOST", ACCOUNT)
    connected(wire)
    wire.say("HEARTBEAT", lag=timedelta(0))
    wire.now += 60 * SECOND
    connected(wire)
    assert wrong(health(wire.conn, user_id, wire.now)) == []
    (found,) = wrong(health(wire.conn, user_id, wire.now + timedelta(microseconds=1)))
    assert (found.check, found.code, found.subject) == ("inbox", "INBOX_BACKLOG", ACCOUNT)
    assert books.positions == {"AAPL": "10"}


@pytest.mark.scenario("OMS-LATENCY")
def test_every_response_is_timed_and_summarised(wire: Wire) -> None:
    """A hundred orders whose answers take 10, 20, ... ms; fills take as long again."""
    conn, user_id = wire.conn, wire.run.user_id
    start = wire.now
    # What was written of a command stays as it is: only its owner can set back its clock.
    conn.execute("ALTER TABLE broker_command DISABLE TRIGGER broker_command_a_check_update")
    for number in range(1, 101):
        order_id = wire.place(quantity="1")
        wire.sent(order_id)
        took = timedelta(milliseconds=10 * number)
        conn.execute(
            """UPDATE broker_command SET created_at = %(at)s, claimed_at = %(at)s + interval '1 s',
                      sent_at = %(at)s + interval '1.5 s'
               WHERE user_id = %(user)s AND order_id = %(order)s""",
            {"at": start, "user": user_id, "order": order_id},
        )
        sent = start + timedelta(seconds=1.5)
        wire.status(order_id, "ROUTED", at=sent, lag=took)
        wire.fill(order_id, "1", "100", f"E{number}", at=sent, lag=2 * took)
    found = status(conn, user_id, start).latencies
    assert [(row.account, row.step, row.orders, row.p50, row.p95, row.p99) for row in found] == [
        (ACCOUNT, "CLAIM", 100, 1, 1, 1),
        (ACCOUNT, "SEND", 100, D("0.5"), D("0.5"), D("0.5")),
        (ACCOUNT, "RESPONSE", 100, D("0.505"), D("0.9505"), D("0.9901")),
        (ACCOUNT, "FILL", 100, D("1.01"), D("1.901"), D("1.9802")),
    ]
    # Each response by itself is kept.
    rows = conn.execute(
        """SELECT kind, count(*), min(seconds), max(seconds) FROM order_response
           WHERE user_id = %s GROUP BY kind ORDER BY kind""",
        [user_id],
    ).fetchall()
    assert rows == [
        ("EXECUTION", 100, D("0.02"), D("2")),
        ("ORDER_STATUS", 100, D("0.01"), D("1")),
    ]
    # Of the last day only; the view is of all time.
    assert status(conn, user_id, start + timedelta(days=1, microseconds=1)).latencies == []
    summary = conn.execute("SELECT step, p99 FROM latency_summary WHERE user_id = %s", [user_id])
    assert ("FILL", D("1.9802")) in summary.fetchall()


def test_an_order_without_an_answer_has_no_latency_yet(wire: Wire) -> None:
    wire.sent(wire.place())
    wire.place()
    rows = wire.conn.execute(
        """SELECT sent_at IS NULL, response_seconds, fill_seconds FROM order_latency
           WHERE user_id = %s ORDER BY 1""",
        [wire.run.user_id],
    ).fetchall()
    assert rows == [(False, None, None), (True, None, None)]


@pytest.mark.scenario("OMS-STATUS")
def test_one_command_shows_how_it_stands(
    dsn: str, owner_conn: Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    from broker_cases import a_broker_run

    from engine.clock import utc_now
    from engine.db.install import head

    owner_conn.execute("CREATE TABLE alembic_version (version_num text)")
    owner_conn.execute("INSERT INTO alembic_version VALUES (%s)", [head()])
    owner_conn.execute("GRANT SELECT ON alembic_version TO oms_auditor")
    wire = Wire(owner_conn, a_broker_run(owner_conn), now=utc_now())
    owner_conn.execute(
        "UPDATE broker_account SET orders_per_second = 2 WHERE user_id = %s", [wire.run.user_id]
    )
    connected(wire)
    orders = [wire.place(quantity="1") for _ in range(5)]
    wire.sent(orders[0])
    owner_conn.execute(
        """INSERT INTO trading_halt (user_id, name, scope, account, reason, placed_by, cancels)
           VALUES (%s, 'lunch', 'ACCOUNT', %s, 'a test', 'me', false)""",
        [wire.run.user_id, ACCOUNT],
    )
    assert main(["status", "--dsn", dsn, "--json"]) == 0
    (user,) = json.loads(capsys.readouterr().out)["users"]
    (account,) = user["status"]["accounts"]
    assert account["account"] == ACCOUNT
    assert account["is_open"] is True
    assert account["connected"] is True
    assert account["heartbeat_is_late"] is False
    assert account["clock_skew_seconds"] == "0.25"
    assert (account["queued"], account["in_flight"], account["open_orders"]) == (4, 0, 5)
    # Of four that could go two may, or one where the first went less than a second ago.
    assert account["throttled"] == 4 - (2 - account["sent_last_second"])
    assert [row["step"] for row in user["status"]["latencies"]] == ["CLAIM", "SEND"]
    assert [halt["name"] for halt in user["status"]["halts"]] == ["lunch"]
    assert main(["status", "--dsn", dsn]) == 0
    shown = capsys.readouterr().out
    for word in ("DU1", "open", "QUEUED", "THROTTLED", "P99 S", "CLAIM", "lunch"):
        assert word in shown


def test_health_is_an_exit_code(
    dsn: str, owner_conn: Connection, capsys: pytest.CaptureFixture[str]
) -> None:
    from broker_cases import a_broker_run

    from engine.db.install import head

    owner_conn.execute("CREATE TABLE alembic_version (version_num text)")
    owner_conn.execute("INSERT INTO alembic_version VALUES (%s)", [head()])
    owner_conn.execute("GRANT SELECT ON alembic_version TO oms_engine")
    assert main(["health", "--dsn", dsn]) == 0
    capsys.readouterr()
    wire = Wire(owner_conn, a_broker_run(owner_conn), holder=uuid4())
    assert main(["health", "--dsn", dsn, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["healthy"] is False
    codes = {check["check"]: check["code"] for check in document["checks"]}
    assert codes == {"positions": None, "heartbeat": "HEARTBEAT_LOST", "inbox": None}
    assert main(["health", "--dsn", dsn]) == 1
    assert "never heard" in capsys.readouterr().out
    assert wire.alerts() == []
