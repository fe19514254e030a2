"""A run whose orders live at a broker, with an order in every state and words still unheard."""

from __future__ import annotations

from schema_cases import findings, said

from engine.db.connect import Connection

# Ten units at 20 each; an order's state is made by the same steps that make it in life.
_ORDERS = (
    "o_waits", "o_sent", "o_routed", "o_partly", "o_filled", "o_busted", "o_corrected",
    "o_canceling", "o_modifying", "o_canceled", "o_lost",
)  # fmt: skip
_BOOKED = {"o_partly": ("P.01", 4), "o_filled": ("F.01", 10), "o_busted": ("B.01", 10),
           "o_corrected": ("C.01", 10)}  # fmt: skip

PLACE = (
    "INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity, order_type, "
    "limit_price, logical_time"
)
BOOK = "INSERT INTO execution (user_id, run_id, order_id, execution_id, quantity, price, event_at"
CHARGE = (
    "INSERT INTO execution_commission (user_id, run_id, execution_id, amount, currency, event_at"
)
COMMAND = (
    "INSERT INTO broker_command (user_id, account, kind, run_id, order_id, order_version, payload"
)


def heard(
    number: int,
    kind: str,
    order: str,
    execution: str = "",
    user: str = "dan",
    **payload: str,
) -> str:
    """A word of a broker, as a connector writes it."""
    words = ", ".join(f'"{key}": "{value}"' for key, value in payload.items())
    return (
        "INSERT INTO broker_event (user_id, account, number, holder, kind, order_ref, "
        f"execution_id, payload, event_at) VALUES (:'{user}', 'A1', {number}, :'connector', "
        f"'{kind}', {order}, nullif('{execution}', ''), '{{{words}}}', :'t1');"
    )


def filled(
    number: int, order: str, execution: str, quantity: int, price: int = 20, side: str = "BUY"
) -> str:
    """A fill, as a connector writes it."""
    return heard(
        number, "EXECUTION", f":'{order}'", execution,
        side=side, quantity=str(quantity), price=str(price), symbol="AAPL",
    )  # fmt: skip


def ended(number: int, order: str, status: str = "CANCELED") -> str:
    """The broker's word that an order is over, as a connector writes it."""
    return heard(number, "ORDER_STATUS", f":'{order}'", status=status)


def snapshot(number: int, *open_orders: str, user: str = "dan", parts: int = 1) -> str:
    """A snapshot that was asked for now, and its first part, as a connector writes it."""
    told = ", ".join(f"{{\"order_ref\": \"' || :'{order}' || '\"}}" for order in open_orders)
    return f"""
        WITH asked AS (
            INSERT INTO broker_command (user_id, account, kind)
            VALUES (:'{user}', 'A1', 'SNAPSHOT') RETURNING command_id
        )
        INSERT INTO broker_event (user_id, account, number, holder, kind, payload, event_at)
        SELECT :'{user}', 'A1', {number}, :'connector', 'SNAPSHOT', jsonb_build_object(
                   'snapshot_id', command_id, 'part', 1, 'parts', {parts},
                   'taken_at', :'t1', 'open_orders', ('[{told}]')::jsonb), :'t1'
        FROM asked;
        UPDATE broker_command
        SET claimed_by = :'connector', claimed_at = clock_timestamp(),
            sent_at = clock_timestamp(), done_at = clock_timestamp(), outcome = 'SENT'
        WHERE user_id = :'{user}' AND kind = 'SNAPSHOT' AND done_at IS NULL;"""


def book(
    order: str, execution: str, quantity: int, price: int = 20, run: str = ":'dan', :'deals'"
) -> str:
    """A fill, as the engine books it."""
    return f"{BOOK}) VALUES ({run}, :'{order}', '{execution}', {quantity}, {price}, :'t1');"


def take_back(order: str, execution: str, quantity: int, price: int = 20) -> str:
    """A fill taken back, as the engine books it."""
    return (
        f"{BOOK}, reverses) VALUES (:'dan', :'deals', :'{order}', '{execution}-R', -{quantity}, "
        f"{price}, :'t1', '{execution}');"
    )


def _claimed(orders: str, outcome: str = "SENT") -> str:
    return (
        "UPDATE broker_command SET claimed_by = :'connector', claimed_at = clock_timestamp(), "
        f"sent_at = clock_timestamp(), done_at = clock_timestamp(), outcome = '{outcome}' "
        f"WHERE user_id IN (:'dan', :'fay') AND order_id IN ({orders}) AND done_at IS NULL;"
    )


def _moved(order: str, *, to: str) -> str:
    return f"UPDATE orders SET status = '{to}' WHERE user_id = :'dan' AND order_id = :'{order}';"


def _world() -> str:
    parts = [
        """
        INSERT INTO app_user (user_id, name) VALUES (:'dan', 'dan'), (:'fay', 'fay');
        INSERT INTO broker_account (user_id, account, broker, calendar) VALUES
            (:'dan', 'A1', 'dummy', 'NONE'), (:'dan', 'A2', 'dummy', 'NONE'),
            (:'dan', 'A3', 'dummy', 'NONE'), (:'fay', 'A1', 'dummy', 'NONE');
        INSERT INTO strategy_run (user_id, run_id, status, broker, initial_cash) VALUES
            (:'dan', :'deals', 'RUNNING', 'dummy', 10000),
            (:'dan', :'idle', 'CREATED', 'dummy', 10000),
            (:'fay', :'fays', 'RUNNING', 'dummy', 10000);
        INSERT INTO run_route (user_id, run_id, preference, account) VALUES
            (:'dan', :'deals', 1, 'A1'), (:'dan', :'deals', 2, 'A2'), (:'dan', :'idle', 1, 'A1'),
            (:'fay', :'fays', 1, 'A1');""",
        *(
            f"{PLACE}) VALUES (:'dan', :'deals', :'{order}', 'AAPL', 'BUY', 10, 'LIMIT', 20, "
            ":'t0');"
            for order in _ORDERS
        ),
        f"{PLACE}) VALUES (:'dan', :'deals', :'o_rejected', 'AAPL', 'BUY', 0, 'LIMIT', 20, :'t0'),"
        " (:'fay', :'fays', :'o_fays', 'AAPL', 'BUY', 10, 'LIMIT', 20, :'t0');",
        _claimed(", ".join(f":'{order}'" for order in (*_ORDERS[1:], "o_fays"))),
    ]
    for number, (order, (execution, quantity)) in enumerate(_BOOKED.items(), 1):
        parts += [filled(number, order, execution, quantity), book(order, execution, quantity)]
    parts += [_moved(order, to="ROUTED") for order in ("o_routed", "o_canceling", "o_modifying")]
    parts += [
        _moved("o_canceling", to="PENDING_CANCEL"),
        ended(10, "o_canceled"),
        _moved("o_canceled", to="CANCELED"),
        "SELECT order_modify(:'dan', :'deals', :'o_modifying', 2, 12);",
        filled(11, "o_routed", "U.01", 3),
        heard(12, "COMMISSION", "NULL", "F.01", amount="1.5", currency="USD"),
        heard(13, "BUST", ":'o_busted'", "B.01"),
        filled(14, "o_corrected", "C.02", 10, 19),
        filled(15, "o_orphan", "O.01", 2),
        heard(16, "COMMISSION", "NULL", "P.01", amount="-0.25", currency="EUR"),
        filled(17, "o_routed", "S.01", 3, side="SELL"),
        snapshot(18, "o_routed", "o_partly", "o_canceling", "o_modifying"),
        "UPDATE broker_command SET outcome = 'NEVER_ARRIVED' "
        "WHERE user_id = :'dan' AND order_id = :'o_lost';",
    ]
    return "\n".join(parts)


def build_broker_world(conn: Connection) -> None:
    """Add to the filled database what lives at a broker."""
    with conn.transaction():
        conn.execute(said(_world()))
        conn.execute("SET CONSTRAINTS ALL IMMEDIATE")
    assert findings(conn) == []
