"""`oms connect` as a process, with the dummy broker as another one."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from connector_cases import Desk
from exchange import ExchangeProcess, running_exchange
from programs import as_migrated, environment, oms_process
from psycopg.types.json import Jsonb
from waits import SECONDS_MAX, wait_until

from engine.db.connect import Connection

pytestmark = pytest.mark.slow


@pytest.fixture
def exchange(tmp_path: Path) -> Iterator[ExchangeProcess]:
    with running_exchange(tmp_path / "exchange") as running:
        yield running


@pytest.fixture
def desk(owner_conn: Connection, exchange: ExchangeProcess) -> Desk:
    """An account at the dummy broker, in a database that the commands take for migrated."""
    as_migrated(owner_conn)
    desk = Desk(owner_conn, broker="dummy", settings=Jsonb({"port": exchange.port, "client_id": 7}))
    owner_conn.execute("UPDATE app_user SET name = 'ann' WHERE user_id = %s", [desk.user_id])
    return desk


def _arguments(dsn: str, account: str) -> list[str]:
    return oms_process("connect", "--account", account, "--user", "ann", "--dsn", dsn, "--json")


@contextmanager
def connecting(dsn: str, desk: Desk) -> Iterator[subprocess.Popen[str]]:
    """The command, connected; killed at the end if it still runs."""
    child = subprocess.Popen(
        _arguments(dsn, desk.account),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        desk.wait_for("CONNECTED")
        yield child
    finally:
        child.kill()
        child.communicate()


def _ended(child: subprocess.Popen[str]) -> tuple[int, Any, list[dict[str, Any]]]:
    """Its exit code, the document that it printed, and its log."""
    out, err = child.communicate(timeout=SECONDS_MAX)
    return child.returncode, json.loads(out), [json.loads(line) for line in err.splitlines()]


def _order(price: str) -> dict[str, str]:
    return {
        "symbol": "AAPL",
        "side": "BUY",
        "quantity": "3",
        "order_type": "LIMIT",
        "time_in_force": "DAY",
        "limit_price": price,
    }


def test_what_is_committed_reaches_the_broker_and_what_it_says_comes_back(
    dsn: str, desk: Desk, exchange: ExchangeProcess
) -> None:
    fills, rests = desk.orders(2)
    with connecting(dsn, desk) as child:
        desk.command("SUBMIT", fills, payload=_order("150"))
        desk.command("SUBMIT", rests, payload=_order("50"))
        desk.wake()
        (execution,) = desk.wait_for("EXECUTION")
        desk.command("CANCEL", rests, 2)
        desk.wake()
        wait_until(
            lambda: "CANCELED" in {each["status"] for each in desk.events("ORDER_STATUS")},
            "the cancel",
        )
        desk.command("SNAPSHOT", priority=1)
        desk.wake()
        (snapshot,) = desk.wait_for("SNAPSHOT")
        child.send_signal(signal.SIGTERM)
        code, document, log = _ended(child)
    assert (execution["symbol"], execution["quantity"]) == ("AAPL", "3")
    assert snapshot["open_orders"] == []
    assert [(each["symbol"], each["quantity"]) for each in snapshot["positions"]] == [("AAPL", "3")]
    assert (code, document) == (0, {"account": "DU1", "ended": "STOPPED"})
    assert [each["event"] for each in log if each["event"] != "SUBMIT_PENDING"] == [
        "LEASE_TAKEN", "CONNECTED", "LOGON", "DISCONNECTED", "LOGOUT", "CONNECTOR_ENDED",
    ]  # fmt: skip
    assert desk.undone() == 0


def test_a_second_one_is_told_who_holds_the_account(dsn: str, desk: Desk) -> None:
    with connecting(dsn, desk) as first:
        second = subprocess.run(
            _arguments(dsn, desk.account),
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS_MAX,
        )
        assert second.returncode == 1
        error = json.loads(second.stderr)["error"]
        assert error["type"] == "LeaseHeld"
        assert f"process {first.pid}" in error["message"]
        assert first.poll() is None


def test_who_has_the_session_taken_away_ends_with_a_code_of_its_own(
    dsn: str, desk: Desk, exchange: ExchangeProcess
) -> None:
    async def steal() -> None:
        thief = exchange.adapter(client_id=7, account=desk.account)
        await thief.connect()
        await thief.close()

    with connecting(dsn, desk) as child:
        asyncio.run(steal())
        code, document, _ = _ended(child)
    assert (code, document["ended"]) == (3, "CONNECTION_STOLEN")
    assert desk.rows("SELECT code FROM alert WHERE user_id = %s") == [("CONNECTION_STOLEN",)]


def test_it_goes_on_when_the_broker_was_killed_and_came_back(
    dsn: str, desk: Desk, exchange: ExchangeProcess
) -> None:
    before, after = desk.orders(2)
    with connecting(dsn, desk):
        desk.command("SUBMIT", before, payload=_order("50"))
        desk.wake()
        desk.wait_for("ORDER_STATUS")
        exchange.kill()
        desk.wait_for("DISCONNECTED")
        exchange.start()
        desk.wait_for("CONNECTED", 2)
        desk.command("SUBMIT", after, payload=_order("50"))
        desk.wake()
        desk.wait_until_done()
        desk.command("SNAPSHOT", priority=1)
        desk.wake()
        (snapshot,) = desk.wait_for("SNAPSHOT")
    refs = [each["order_ref"] for each in snapshot["open_orders"]]
    assert sorted(refs) == sorted(map(str, (before, after)))


@pytest.mark.parametrize(
    ("user", "account", "message"),
    [("ann", "DU9", "no account 'DU9'"), ("bob", "DU1", "bob")],
)
def test_what_is_not_there_is_said_at_once(
    dsn: str, desk: Desk, user: str, account: str, message: str
) -> None:
    words = _arguments(dsn, account)
    words[words.index("ann")] = user
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 1
    assert message in json.loads(done.stderr)["error"]["message"]
