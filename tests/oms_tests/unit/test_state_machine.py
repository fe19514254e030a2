"""What an order may become, and who may make it so."""

from __future__ import annotations

import psycopg
import pytest
from connector_cases import Desk

from engine.db.connect import CONNECTOR_ROLE, Connection


@pytest.mark.scenario("BOUNDARY-01")
@pytest.mark.parametrize(
    "attack",
    [
        "SELECT status FROM orders WHERE user_id = %(user)s",
        "SELECT FROM orders WHERE user_id = %(user)s FOR UPDATE",
        "UPDATE orders SET status = 'FILLED' WHERE user_id = %(user)s",
        "UPDATE paper_order SET status = 'CANCELED' WHERE user_id = %(user)s",
        "INSERT INTO orders (user_id, run_id, symbol, side, quantity) "
        "VALUES (%(user)s, %(run)s, 'AAPL', 'BUY', 1)",
        "DELETE FROM orders WHERE user_id = %(user)s",
        "INSERT INTO execution (user_id, run_id, order_id, quantity, price) "
        "VALUES (%(user)s, %(run)s, %(order)s, 1, 1)",
        "INSERT INTO broker_command (user_id, account, kind) VALUES (%(user)s, 'DU1', 'SNAPSHOT')",
        "UPDATE broker_command SET outcome = 'SENT' WHERE user_id = %(user)s",
        "UPDATE broker_event SET finding = 'NEW' WHERE user_id = %(user)s",
        "INSERT INTO broker_event (user_id, account, number, holder, kind, event_at, finding) "
        "VALUES (%(user)s, 'DU1', 1, %(user)s, 'NOTICE', now(), 'NEW')",
        "UPDATE broker_lease SET expires_at = 'infinity' WHERE user_id = %(user)s",
        "UPDATE broker_account SET orders_per_second = 9 WHERE user_id = %(user)s",
    ],
)
def test_connector_cannot_mutate_orderstate_directly(conn: Connection, attack: str) -> None:
    desk = Desk(conn)
    (order,) = desk.orders(1)
    conn.execute(f"SET LOCAL ROLE {CONNECTOR_ROLE}".encode())
    with pytest.raises(psycopg.errors.InsufficientPrivilege), conn.transaction():
        conn.execute(attack.encode(), {"user": desk.user_id, "run": desk.run_id, "order": order})
    conn.execute("RESET ROLE")
    assert desk.rows("SELECT status FROM orders WHERE user_id = %s") == [("NEW",)]
