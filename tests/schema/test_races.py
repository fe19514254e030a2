"""Attacks that need two connections: the other one's commit comes in between.

Nobody sleeps: a write that must wait is waited for by asking Postgres who blocks whom.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import psycopg
import pytest
from schema_cases import RUN_TABLES, findings, rows, said, smallest_inserts
from waits import SECONDS_MAX, wait_until_blocked

from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.errors import EngineError, Retryable, RuleViolation, typed

Dsn = str

_ORDER = "INSERT INTO orders (user_id, run_id, symbol, side, quantity, order_type, limit_price)"


@pytest.fixture
def dsn(scratch: Connection) -> Dsn:
    """The owner's DSN of a filled database of the test's own."""
    return scratch.info.dsn


class Outcome:
    """What became of a statement that ran in a thread."""

    error: EngineError | None = None
    rows: list[tuple[object, ...]]

    def __init__(self) -> None:
        self.rows = []

    @property
    def rule(self) -> str | None:
        """The rule by which it was refused."""
        if self.error is None:
            return None
        assert isinstance(self.error, RuleViolation), self.error
        assert self.error.hint
        return self.error.constraint


def _run(conn: Connection, sql: str, outcome: Outcome) -> None:
    try:
        done = conn.execute(said(sql))
        outcome.rows = done.fetchall() if done.description else []
    except psycopg.Error as error:
        outcome.error = typed(error) or EngineError(str(error))


@contextmanager
def _meanwhile(
    watch: Connection, first: Connection, second: Connection, sql: str
) -> Iterator[Outcome]:
    """Run ``sql`` on ``second``, which waits for ``first``; end the wait inside the block."""
    outcome = Outcome()
    thread = threading.Thread(target=_run, args=(second, sql, outcome))
    thread.start()
    try:
        wait_until_blocked(watch, second, by=first)
        yield outcome
    finally:
        if first.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
            first.execute("ROLLBACK")
        thread.join(SECONDS_MAX)
        assert not thread.is_alive()


Race = Callable[[str, str], Outcome]


@pytest.fixture(params=[None, ENGINE_ROLE], ids=["owner", "engine"])
def second(dsn: Dsn, request: pytest.FixtureRequest) -> Iterator[Connection]:
    """The connection that comes second, as the owner and as the engine's role."""
    with open_connection(dsn, role=request.param) as conn:
        yield conn


@pytest.fixture
def race(dsn: Dsn, scratch: Connection, second: Connection) -> Iterator[Race]:
    """Run the first SQL in an open transaction, the second beside it, then commit the first."""
    with ExitStack() as stack:
        first = stack.enter_context(open_connection(dsn))

        def run(first_sql: str, second_sql: str) -> Outcome:
            first.execute("BEGIN")
            first.execute(said(first_sql))
            with _meanwhile(scratch, first, second, second_sql) as outcome:
                first.execute("COMMIT")
            return outcome

        yield run
    assert findings(scratch) == []


STOP = "UPDATE strategy_run SET status = 'STOPPED' WHERE user_id = :'ann' AND run_id = :'live'"


# The engine's role may not insert positions and limits at all.
@pytest.mark.parametrize(
    "table", [t for t in RUN_TABLES if t not in ("strategy_run", "position", "risk_limit")]
)
def test_a_write_that_waited_for_a_stop_sees_it(
    race: Race, scratch: Connection, table: str
) -> None:
    assert race(STOP, smallest_inserts("live")[table]).rule == f"{table}_run_is_running"
    assert rows(scratch, "SELECT status FROM strategy_run WHERE run_id = :'live'") == [("STOPPED",)]


def test_an_update_that_waited_for_a_stop_sees_it(race: Race) -> None:
    cancel = "UPDATE orders SET status = 'CANCELED' WHERE order_id = :'stop' AND run_id = :'live'"
    # The stop has cancelled the order itself, so that the update meets a run that has ended.
    assert race(STOP, cancel).rule == "orders_run_is_running"


def test_a_stop_that_waited_for_an_order_cancels_it(race: Race, scratch: Connection) -> None:
    order = f"{_ORDER} VALUES (:'ann', :'live', 'MSFT', 'BUY', 1, 'LIMIT', 1)"
    assert race(order, STOP).error is None
    assert rows(
        scratch,
        "SELECT DISTINCT status, status_reason FROM orders "
        "WHERE run_id = :'live' AND symbol = 'MSFT'",
    ) == [("CANCELED", "RUN_STOPPED")]


def test_a_runs_first_order_that_waited_for_another_comes_after_it(
    dsn: Dsn, scratch: Connection, second: Connection
) -> None:
    new_run = "'00000000-0000-0000-0000-0000000000e1', '00000000-0000-0000-0000-0000000000e2'"
    scratch.execute("INSERT INTO app_user VALUES ('00000000-0000-0000-0000-0000000000e1')")
    scratch.execute(
        f"""INSERT INTO strategy_run (user_id, run_id, status, initial_cash)
            VALUES ({new_run}, 'RUNNING', 1000)""".encode()
    )
    order = f"{_ORDER} VALUES ({new_run}, 'MSFT', 'BUY', 1, 'LIMIT', 1)"
    second.execute("BEGIN")  # its now() is before that of the first
    with open_connection(dsn) as first:
        first.execute("BEGIN")
        first.execute(order.encode())
        with _meanwhile(scratch, first, second, order) as outcome:
            first.execute("COMMIT")
    second.execute("COMMIT")
    assert outcome.error is None
    assert rows(
        scratch,
        "SELECT count(*), count(DISTINCT logical_time) FROM orders "
        "WHERE run_id = '00000000-0000-0000-0000-0000000000e2'",
    ) == [(2, 1)]


def test_a_snapshot_from_before_the_stop_is_no_way_around_it(
    dsn: Dsn, scratch: Connection, second: Connection
) -> None:
    second.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    second.execute("SELECT count(*) FROM strategy_run")
    scratch.execute(said(STOP))
    with pytest.raises(psycopg.Error) as caught:
        second.execute(said(smallest_inserts("live")["event_ledger"]))
    assert isinstance(typed(caught.value), Retryable)
    second.execute("ROLLBACK")


def test_a_second_running_run_in_a_race_meets_the_index(race: Race) -> None:
    run = "INSERT INTO strategy_run (user_id, status) VALUES (:'eve', 'RUNNING')"
    assert race(run, run).rule == "strategy_run_one_running_per_user"


def test_a_run_may_start_when_the_other_start_was_given_up(
    dsn: Dsn, scratch: Connection, second: Connection
) -> None:
    run = "INSERT INTO strategy_run (user_id, status) VALUES (:'eve', 'RUNNING')"
    with open_connection(dsn) as first:
        first.execute("BEGIN")
        first.execute(said(run))
        with _meanwhile(scratch, first, second, run) as outcome:
            first.execute("ROLLBACK")
    assert outcome.error is None


def test_two_ticks_at_one_logical_time_in_a_race(race: Race) -> None:
    tick = (
        "INSERT INTO event_ledger (user_id, run_id, logical_time, event_type) "
        "VALUES (:'ann', :'live', :'t3', 'TICK')"
    )
    state = (
        "; UPDATE engine_state SET last_logical_time = :'t3' "
        "WHERE user_id = :'ann' AND run_id = :'live'"
    )
    assert race(tick + state, tick).rule == "event_ledger_once_per_logical_time"


def test_two_marks_at_one_logical_time_in_a_race(race: Race) -> None:
    mark = "INSERT INTO mtm_ledger (user_id, run_id, logical_time) VALUES (:'ann', :'live', :'t3')"
    assert race(mark, mark).rule == "mtm_ledger_one_per_logical_time"


def test_two_events_in_a_race_are_numbered_and_chained(race: Race, scratch: Connection) -> None:
    note = (
        "INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject) "
        "VALUES (:'ann', :'live', :'t3', 'NOTE', '{}')"
    )
    assert race(note.format("first"), note.format("second")).error is None
    assert rows(
        scratch,
        "SELECT subject FROM event_ledger WHERE run_id = :'live' AND event_type = 'NOTE' "
        "ORDER BY seq",
    ) == [("first",), ("second",)]


def test_two_orders_in_a_race_share_the_cash(race: Race) -> None:
    order = (
        f"{_ORDER} VALUES (:'ann', :'live', 'MSFT', 'BUY', 1, 'LIMIT', 5000) RETURNING reject_code"
    )
    assert race(order, order).rows == [("INSUFFICIENT_CASH",)]


def test_two_sales_in_a_race_share_the_position(race: Race) -> None:
    order = (
        f"{_ORDER} VALUES (:'ann', :'live', 'AAPL', 'SELL', 15, 'LIMIT', 50) RETURNING reject_code"
    )
    assert race(order, order).rows == [("INSUFFICIENT_POSITION",)]


def test_two_trades_in_a_race_share_the_cash(race: Race) -> None:
    trade = (
        "INSERT INTO execution (user_id, run_id, order_id, quantity, price) "
        "VALUES (:'ann', :'live', :'resting', 1, 5000)"
    )
    assert race(trade, trade).rule == "strategy_run_cash_not_negative_in_cash_account"


def test_two_trades_in_a_race_share_the_order(race: Race) -> None:
    trade = (
        "INSERT INTO execution (user_id, run_id, order_id, quantity, price) "
        "VALUES (:'ann', :'live', :'partly', 2, 20)"
    )
    assert race(trade, trade).rule == "orders_not_overfilled_on_paper"


def test_a_split_in_a_race_is_applied_once(race: Race, scratch: Connection) -> None:
    split = (
        "INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time) "
        "VALUES (:'ann', :'live', 'AAPL', '2024-01-05', :'t3')"
    )
    assert race(split, split).rule == "split_applied_pkey"
    assert rows(
        scratch, "SELECT quantity FROM position WHERE run_id = :'live' AND symbol = 'AAPL'"
    ) == [(60,)]


def test_the_same_client_order_in_a_race_is_taken_once(race: Race) -> None:
    order = (
        "INSERT INTO orders (user_id, run_id, symbol, side, quantity, client_order_id) "
        "VALUES (:'ann', :'live', 'AAPL', 'SELL', 1, 'again')"
    )
    assert race(order, order).rule == "orders_client_order_id_once"


def test_a_lower_limit_is_met_by_the_order_that_waited_for_it(
    race: Race, scratch: Connection
) -> None:
    lower = (
        "SELECT FROM strategy_run WHERE user_id = :'ann' AND run_id = :'live' FOR UPDATE; "
        "UPDATE risk_limit SET limit_value = 1 WHERE user_id = :'ann' AND run_id = :'live'"
    )
    order = f"{_ORDER} VALUES (:'ann', :'live', 'MSFT', 'BUY', 2, 'LIMIT', 1) RETURNING reject_code"
    assert race(lower, order).rows == [("MAX_POSITION",)]
