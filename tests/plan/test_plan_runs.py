"""RL: the life of a run, and that nothing is written into one that doesn't run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from market_days import (
    FRI,
    MON,
    THU,
    TUE,
    WED,
    a_plan,
    a_run,
    assert_sound,
    at_price,
    audited,
    buy,
    close_on,
    counts,
    events,
    fresh,
    one,
    order_ids,
    rows,
    run_tables,
    snapshot,
    statuses,
)
from waits import wait_until_blocked

from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.errors import IllegalRunMove, RunAlreadyRunning, RunNotRunning
from engine.runs import Run, Terms, add_user, create_run, delete_run, fail_run, start_run
from engine.stop import stop_run
from engine.tick import log_mtm, place_orders, run_tick, try_execute_sip

__all__ = ["audited"]

CHILDREN = (
    "engine_state",
    "engine_status",
    "paper_order",
    "paper_trade",
    "mtm_ledger",
    "event_ledger",
    "paper_equity_curve",
)


def insert(conn: Connection, table: str, user_id: UUID, run_id: UUID, order_id: UUID) -> None:
    """Insert as the test plan does: what identifies the row and what business needs."""
    of_table: dict[str, dict[str, Any]] = {
        "engine_state": {},
        "engine_status": {},
        "paper_order": {"symbol": "AAPL", "side": "BUY", "quantity": 1},
        "paper_trade": {"order_id": order_id, "quantity": 1, "price": 50},
        "mtm_ledger": {"logical_time": close_on(FRI)},
        "event_ledger": {"logical_time": close_on(FRI), "event_type": "NOTE"},
        "paper_equity_curve": {"logical_time": close_on(FRI)},
        "position": {"symbol": "AAPL"},
        "sip_plan": {"plan": "apples", "symbol": "AAPL", "amount": 1},
        "split_applied": {"symbol": "AAPL", "ex_date": "2000-06-21"},
    }
    given = {"user_id": user_id, "run_id": run_id} | of_table[table]
    columns, places = ", ".join(given), ", ".join(["%s"] * len(given))
    conn.execute(f"INSERT INTO {table} ({columns}) VALUES ({places})", [*given.values()])


def a_resting_order(conn: Connection, run: Run, day: str = MON) -> UUID:
    """An order that the run's paper book holds, so that a trade on it is possible."""
    order = buy("1", order_type="LIMIT", time_in_force="GTC", limit_price="50")
    place_orders(conn, run.user_id, run.run_id, close_on(day), at_price("100"), [order])
    order_id: UUID = order_ids(conn, run)[-1]
    return order_id


def act_as_engine(conn: Connection) -> None:
    conn.execute(f"SET ROLE {ENGINE_ROLE}")


def act_as_owner(conn: Connection) -> None:
    """The connection's own role."""


ROLES = pytest.mark.parametrize("act", [act_as_owner, act_as_engine])


@pytest.mark.scenario("RL-01")
def test_a_running_run_takes_its_engine_state(conn: Connection) -> None:
    run = a_run(conn)
    conn.execute(
        "INSERT INTO engine_state (user_id, run_id) VALUES (%s, %s)", [run.user_id, run.run_id]
    )
    assert one(conn, "SELECT state FROM engine_state WHERE :run", run) == {}


def end_by_stop(conn: Connection, run: Run) -> None:
    stop_run(conn, run.user_id, run.run_id)


def end_by_error(conn: Connection, run: Run) -> None:
    fail_run(conn, run.user_id, run.run_id, "a fault", close_on(MON))


def end_by_sql(status: str) -> Callable[[Connection, Run], None]:
    def end(conn: Connection, run: Run) -> None:
        conn.execute("UPDATE strategy_run SET status = %s WHERE run_id = %s", [status, run.run_id])

    return end


def refuses_all_writes(
    conn: Connection, end: Callable[[Connection, Run], None], status: str, table: str
) -> None:
    """What a RUNNING run takes, the same run refuses once it has ended."""
    run = a_run(conn, start=False)
    # Started by hand: start_run would have made the engine_status row already.
    conn.execute("UPDATE strategy_run SET status = 'RUNNING' WHERE run_id = %s", [run.run_id])
    order_id = a_resting_order(conn, run)
    # The same insert into the same run, while it still runs: it is its end that refuses it.
    with conn.transaction(force_rollback=True):
        insert(conn, table, run.user_id, run.run_id, order_id)
        assert one(conn, f"SELECT count(*) FROM {table} WHERE :run", run) > 0
    end(conn, run)
    assert fresh(conn, run).status == status
    before = snapshot(conn)
    with pytest.raises(psycopg.IntegrityError) as caught, conn.transaction():
        insert(conn, table, run.user_id, run.run_id, order_id)
    assert caught.value.sqlstate == "23T03"
    assert str(caught.value.diag.constraint_name).endswith("_run_is_running")
    assert caught.value.diag.message_hint
    assert snapshot(conn) == before


@pytest.mark.scenario("RL-02")
@ROLES
@pytest.mark.parametrize("end", [end_by_stop, end_by_sql("STOPPED")], ids=["stop_run", "sql"])
@pytest.mark.parametrize("table", CHILDREN)
def test_a_stopped_run_refuses_every_insert(
    conn: Connection,
    table: str,
    end: Callable[[Connection, Run], None],
    act: Callable[[Connection], None],
) -> None:
    act(conn)
    refuses_all_writes(conn, end, "STOPPED", table)


@pytest.mark.scenario("RL-03")
@ROLES
@pytest.mark.parametrize("end", [end_by_error, end_by_sql("ERROR")], ids=["fail_run", "sql"])
@pytest.mark.parametrize("table", CHILDREN)
def test_a_run_in_error_refuses_every_insert(
    conn: Connection,
    table: str,
    end: Callable[[Connection, Run], None],
    act: Callable[[Connection], None],
) -> None:
    act(conn)
    refuses_all_writes(conn, end, "ERROR", table)


@pytest.mark.scenario("RL-02")
@pytest.mark.scenario("RL-03")
@pytest.mark.parametrize("status", ["STOPPED", "ERROR", "STOPPING", "CREATED"])
@pytest.mark.parametrize("table", CHILDREN)
def test_a_run_that_was_born_without_running_refuses_every_insert(
    conn: Connection, table: str, status: str
) -> None:
    user_id, run_id = add_user(conn, "ann"), uuid4()
    conn.execute(
        "INSERT INTO strategy_run (user_id, run_id, status, initial_cash) VALUES (%s, %s, %s, 1)",
        [user_id, run_id, status],
    )
    with pytest.raises(psycopg.IntegrityError) as caught, conn.transaction():
        insert(conn, table, user_id, run_id, uuid4())
    assert caught.value.sqlstate == "23T03"
    assert rows(conn, f"SELECT 1 FROM {table}") == []


@pytest.mark.scenario("RL-02")
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE engine_state SET state = '{\"a\": 1}'",
        "UPDATE engine_status SET heartbeat_at = now()",
        "UPDATE paper_order SET limit_price = 1",
        "UPDATE paper_position SET mark_price = 1, marked_at = now()",
        "UPDATE strategy_run SET name = 'again'",
        "DELETE FROM engine_state",
        "DELETE FROM engine_status",
    ],
)
def test_a_stopped_run_refuses_every_change(conn: Connection, change: str) -> None:
    run = a_run(conn)
    run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("100"), intents=[buy("1")])
    a_resting_order(conn, run)
    stop_run(conn, run.user_id, run.run_id)
    before = snapshot(conn)
    with pytest.raises(psycopg.IntegrityError), conn.transaction():
        conn.execute(change)
    assert snapshot(conn) == before


@pytest.mark.scenario("RL-04")
@pytest.mark.parametrize("status", ["STOPPED", "ERROR"])
@pytest.mark.parametrize("to", ["RUNNING", "CREATED", "STOPPING"])
def test_an_ended_run_never_runs_again(conn: Connection, status: str, to: str) -> None:
    run = a_run(conn)
    conn.execute("UPDATE strategy_run SET status = %s", [status])
    with pytest.raises(psycopg.IntegrityError) as caught, conn.transaction():
        conn.execute("UPDATE strategy_run SET status = %s", [to])
    assert caught.value.sqlstate == "23T02"
    assert caught.value.diag.constraint_name == "strategy_run_status_transition"
    with pytest.raises(IllegalRunMove):
        start_run(conn, run.user_id, run.run_id)
    assert fresh(conn, run).status == status


@pytest.mark.scenario("RL-05")
def test_a_second_running_run_of_a_user_is_a_unique_violation(conn: Connection) -> None:
    first = a_run(conn)
    other = a_run(conn, user="ben")  # somebody else's run is no obstacle
    with pytest.raises(psycopg.errors.UniqueViolation) as caught, conn.transaction():
        conn.execute(
            "INSERT INTO strategy_run (user_id, status, initial_cash) VALUES (%s, 'RUNNING', 1)",
            [first.user_id],
        )
    assert caught.value.diag.constraint_name == "strategy_run_one_running_per_user"
    second = create_run(conn, first.user_id, Terms())
    with pytest.raises(RunAlreadyRunning, match="Stop"):
        start_run(conn, second.user_id, second.run_id)
    running = rows(conn, "SELECT run_id FROM strategy_run WHERE status = 'RUNNING'")
    assert sorted(running) == sorted([first.run_id, other.run_id])
    assert fresh(conn, second).status == "CREATED"


@pytest.mark.scenario("RL-05")
def test_of_two_starts_at_once_one_wins(dsn: str) -> None:
    with open_connection(dsn) as one_, open_connection(dsn) as two, open_connection(dsn) as watch:
        runs = [create_run(one_, add_user(one_, "ann"), Terms()) for _ in range(2)]
        refused: list[Exception] = []

        def start_the_second() -> None:
            try:
                start_run(two, runs[1].user_id, runs[1].run_id)
            except RunAlreadyRunning as error:
                refused.append(error)

        second = threading.Thread(target=start_the_second)
        with one_.transaction():
            start_run(one_, runs[0].user_id, runs[0].run_id)
            second.start()
            wait_until_blocked(watch, two, by=one_)
        second.join()
        assert len(refused) == 1
        assert [fresh(watch, run).status for run in runs] == ["RUNNING", "CREATED"]


@pytest.mark.scenario("RL-06")
@pytest.mark.parametrize("table", [*CHILDREN, "position", "sip_plan", "split_applied"])
def test_a_row_of_one_user_in_the_run_of_another_violates_a_foreign_key(
    conn: Connection, table: str
) -> None:
    mine, theirs = a_run(conn), a_run(conn, user="ben")
    order_id = a_resting_order(conn, theirs)
    before = snapshot(conn)
    with pytest.raises(psycopg.errors.ForeignKeyViolation) as caught, conn.transaction():
        insert(conn, table, mine.user_id, theirs.run_id, order_id)
    assert caught.value.diag.constraint_name
    assert snapshot(conn) == before


@pytest.mark.scenario("RL-06")
def test_a_trade_of_one_run_on_the_order_of_another_violates_a_foreign_key(
    conn: Connection,
) -> None:
    mine, theirs = a_run(conn), a_run(conn, user="ben")
    order_id = a_resting_order(conn, theirs)
    with pytest.raises(psycopg.errors.ForeignKeyViolation), conn.transaction():
        insert(conn, "paper_trade", mine.user_id, mine.run_id, order_id)
    insert(conn, "paper_trade", theirs.user_id, theirs.run_id, order_id)
    assert rows(conn, "SELECT run_id FROM execution") == [theirs.run_id]


# Only runs that trade at a broker, were stopped for safety or have many open orders are in these.
AT_BROKERS = {
    "broker_command",
    "equity_peak",
    "execution_commission",
    "flatten_request",
    "open_order_sum",
    "order_broker_id",
    "run_route",
    "trading_halt",
}


@pytest.mark.scenario("RL-07")
def test_a_deleted_run_takes_everything_of_it_along_and_nothing_else(conn: Connection) -> None:
    conn.execute(
        "INSERT INTO corporate_action (symbol, ex_date, numerator, denominator)"
        " VALUES ('AAPL', %s, 2, 1)",
        [TUE],
    )
    run, other = a_run(conn), a_run(conn, user="ben")
    for each in (run, other):
        a_plan(conn, each)
        conn.execute(
            "INSERT INTO risk_limit (user_id, run_id, kind, limit_value)"
            " VALUES (%s, %s, 'MAX_POSITION', 100)",
            [each.user_id, each.run_id],
        )
        for day in (MON, TUE):
            run_tick(conn, each.user_id, each.run_id, close_on(day), at_price("50"))
    stop_run(conn, run.user_id, run.run_id)
    children = run_tables(conn)
    assert {"engine_state", "orders", "execution", "position", "mtm_ledger"} <= set(children)
    on_paper = {table: n for table, n in counts(conn, run).items() if table not in AT_BROKERS}
    assert all(on_paper.values()), on_paper
    kept = counts(conn, other)
    delete_run(conn, run.user_id, run.run_id)
    assert counts(conn, run) == dict.fromkeys(children, 0)
    assert rows(conn, "SELECT 1 FROM strategy_run WHERE :run", run) == []
    assert counts(conn, other) == kept


@pytest.mark.scenario("RL-07")
def test_deleting_by_plain_sql_cascades_too(conn: Connection) -> None:
    run = a_run(conn)
    run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("50"), intents=[buy("1")])
    stop_run(conn, run.user_id, run.run_id)
    conn.execute("DELETE FROM strategy_run WHERE run_id = %s", [run.run_id])
    assert not any(counts(conn, run).values())


@pytest.mark.scenario("RL-08")
def test_a_started_run_is_running_and_has_its_engine_status(conn: Connection) -> None:
    run = create_run(conn, add_user(conn, "ann"), Terms())
    assert rows(conn, "SELECT 1 FROM engine_status WHERE :run", run) == []
    started = start_run(conn, run.user_id, run.run_id)
    assert started.status == fresh(conn, run).status == "RUNNING"
    assert one(conn, "SELECT last_error FROM engine_status WHERE :run", run) is None


@pytest.mark.scenario("RL-09")
@pytest.mark.parametrize(
    "write",
    [
        lambda c, u, r: run_tick(c, u, r, close_on(WED), at_price("100")),
        lambda c, u, r: try_execute_sip(c, u, r, close_on(WED), at_price("100")),
        lambda c, u, r: place_orders(c, u, r, close_on(WED), at_price("100"), [buy("1")]),
        lambda c, u, r: log_mtm(c, u, r, close_on(WED), at_price("100")),
    ],
    ids=["run_tick", "try_execute_sip", "place_orders", "log_mtm"],
)
def test_a_stopped_run_refuses_later_writes(
    conn: Connection, write: Callable[[Connection, UUID, UUID], object]
) -> None:
    run = a_run(conn)
    run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("100"), intents=[buy("1")])
    with conn.transaction(force_rollback=True):
        write(conn, run.user_id, run.run_id)
    stopped = stop_run(conn, run.user_id, run.run_id)
    assert stopped.status == fresh(conn, run).status == "STOPPED"
    before = snapshot(conn)
    with pytest.raises(RunNotRunning) as caught:
        write(conn, run.user_id, run.run_id)
    assert "STOPPED" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(conn) == before


@pytest.mark.scenario("RL-09")
def test_a_tick_that_was_committed_before_the_stop_is_still_told(conn: Connection) -> None:
    run = a_run(conn)
    first = run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("100"))
    stop_run(conn, run.user_id, run.run_id)
    again = run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("100"))
    assert (again.repeated, again.equity) == (True, first.equity)


@pytest.mark.scenario("OR-06")
@pytest.mark.parametrize("end", [end_by_stop, end_by_sql("STOPPED")], ids=["stop_run", "sql"])
def test_a_stop_cancels_what_is_pending_and_says_so(
    conn: Connection, end: Callable[[Connection, Run], None]
) -> None:
    run = a_run(conn)
    resting = buy("1", order_type="LIMIT", time_in_force="GTC", limit_price="50")
    run_tick(
        conn,
        run.user_id,
        run.run_id,
        close_on(MON),
        at_price("100"),
        intents=[buy("1"), resting, resting, buy("-1")],
    )
    assert statuses(conn, run) == ["FILLED", "PENDING", "PENDING", "REJECTED"]
    end(conn, run)
    assert statuses(conn, run) == ["FILLED", "CANCELED", "CANCELED", "REJECTED"]
    assert events(conn, run)[-3:] == ["ORDER_CANCELED", "ORDER_CANCELED", "RUN_STOPPED"]
    reasons = rows(conn, "SELECT status_reason FROM orders WHERE status = 'CANCELED'")
    assert reasons == ["RUN_STOPPED"] * 2
    assert len(rows(conn, "SELECT 1 FROM execution")) == 1
    told = rows(
        conn,
        "SELECT subject::uuid FROM event_ledger WHERE event_type = 'ORDER_CANCELED' ORDER BY seq",
    )
    assert told == order_ids(conn, run)[1:3]


@pytest.mark.scenario("OR-06")
def test_a_stop_cancels_the_rest_of_a_partly_filled_order(conn: Connection) -> None:
    run = a_run(conn)
    order_id = a_resting_order(conn, run)
    conn.execute(
        "INSERT INTO paper_trade (user_id, run_id, order_id, quantity, price)"
        " VALUES (%s, %s, %s, 0.25, 50)",
        [run.user_id, run.run_id, order_id],
    )
    stop_run(conn, run.user_id, run.run_id)
    assert rows(conn, "SELECT status, filled_quantity FROM orders")[0][0] == "CANCELED"
    assert one(conn, "SELECT quantity FROM position WHERE :run", run) == one(
        conn, "SELECT filled_quantity FROM orders WHERE :run", run
    )


BREAKAGES = {
    "audit_cash": (
        "ALTER TABLE strategy_run DISABLE TRIGGER USER",
        "UPDATE strategy_run SET cash = cash + 1",
    ),
    "audit_position": (
        "ALTER TABLE position DISABLE TRIGGER USER",
        "UPDATE position SET quantity = quantity + 1",
    ),
    "audit_chain": (
        "ALTER TABLE event_ledger DISABLE TRIGGER USER",
        "UPDATE event_ledger SET payload = payload || '{\"a\": 1}' WHERE seq = 1",
    ),
    "mtm_ledger GROUP BY": (
        "ALTER TABLE mtm_ledger DISABLE TRIGGER USER",
        "ALTER TABLE mtm_ledger DROP CONSTRAINT mtm_ledger_one_per_logical_time",
        "INSERT INTO mtm_ledger (user_id, run_id, logical_time, cash, market_value, recorded_at)"
        " SELECT user_id, run_id, logical_time, cash, market_value, now() FROM mtm_ledger",
    ),
    "status='RUNNING' GROUP BY": (
        "ALTER TABLE strategy_run DISABLE TRIGGER USER",
        "DROP INDEX strategy_run_one_running_per_user",
        "INSERT INTO strategy_run (user_id, status, initial_cash, cash)"
        " SELECT user_id, status, 0, 0 FROM strategy_run",
    ),
    "WHERE sr.run_id IS NULL": (
        "ALTER TABLE engine_state DROP CONSTRAINT engine_state_belongs_to_run",
        "ALTER TABLE engine_state DISABLE TRIGGER USER",
        "INSERT INTO engine_state (user_id, run_id) VALUES (gen_random_uuid(), gen_random_uuid())",
    ),
}


@pytest.mark.parametrize("found", BREAKAGES)
def test_the_audit_that_follows_each_test_can_fail(owner_conn: Connection, found: str) -> None:
    """Take a rule away, break the books, and see it found; the rollback mends it all."""
    run = a_run(owner_conn)
    run_tick(owner_conn, run.user_id, run.run_id, close_on(THU), at_price("50"), intents=[buy("1")])
    assert_sound(owner_conn)
    with owner_conn.transaction(force_rollback=True):
        for statement in BREAKAGES[found]:
            owner_conn.execute(statement)
        with pytest.raises(AssertionError, match=found):
            assert_sound(owner_conn)
