"""Imports that commit: two at once, and as the engine's role, which owns nothing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest

from engine.errors import BadInput
from engine.market.calendar import ensure_sessions, store_sessions
from engine.market.model import Bar, Split
from engine.market.store import (
    Imported,
    add_instrument,
    bars_at,
    bars_between,
    import_bars,
    import_splits,
    list_data,
)

Conn = psycopg.Connection[Any]
AT = datetime(2024, 1, 2, 21, tzinfo=UTC)


def price(symbol: str, value: int) -> Bar:
    return Bar.of_price(symbol, Decimal(value), AT)


def wait_until_blocked(watch: Conn, pid: int, work: Future[Any]) -> None:
    """Return when the backend ``pid`` waits for another's lock."""
    while not work.done():
        row = watch.execute("SELECT cardinality(pg_blocking_pids(%s)) > 0", (pid,)).fetchone()
        if row == (True,):
            return
    pytest.fail("the second one didn't wait for the first")


def race(dsn: str, first: Callable[[Conn], Any], second: Callable[[Conn], Any]) -> Any:
    """Run ``second`` until it waits for ``first``, commit that, and return what it came to."""
    with (
        psycopg.connect(dsn) as one,
        psycopg.connect(dsn, autocommit=True) as two,
        psycopg.connect(dsn, autocommit=True) as watch,
        ThreadPoolExecutor(1) as pool,
    ):
        with one.transaction():
            first(one)
            work = pool.submit(second, two)
            wait_until_blocked(watch, two.info.backend_pid, work)
        return work.result(timeout=90)


def test_of_two_imports_at_once_the_second_sees_the_prices_of_the_first(dsn: str) -> None:
    # In the opposite order, which would deadlock if the rows went in as they came.
    def second(conn: Conn) -> str:
        with pytest.raises(BadInput) as refused:
            import_bars(conn, [price("ZZB", 2), price("ZZA", 1), price("ZZC", 1)])
        return str(refused.value)

    said = race(dsn, lambda conn: import_bars(conn, [price("ZZA", 1), price("ZZB", 1)]), second)
    assert said.startswith("The bar of ZZB at 2024-01-02T21:00:00+00:00 is stored already")
    with psycopg.connect(dsn) as conn:
        assert sorted(bars_at(conn, ["ZZA", "ZZB", "ZZC"], AT)) == ["ZZA", "ZZB"]


def test_of_two_equal_imports_at_once_one_adds(dsn: str) -> None:
    bars = [price("ZZA", 1), price("ZZB", 1)]
    done = race(dsn, lambda conn: import_bars(conn, bars), lambda conn: import_bars(conn, bars))
    assert done == Imported(2, 0, 0)


def test_of_two_splits_at_once_the_second_sees_the_first(dsn: str) -> None:
    def split(numerator: int) -> list[Split]:
        return [Split("ZZA", date(2024, 1, 3), Decimal(numerator), Decimal(1))]

    def second(conn: Conn) -> str:
        with pytest.raises(BadInput) as refused:
            import_splits(conn, split(3))
        return str(refused.value)

    assert "stored as 2 for 1" in race(dsn, lambda conn: import_splits(conn, split(2)), second)


def test_of_two_that_store_sessions_at_once_one_adds(dsn: str) -> None:
    years = (date(2020, 1, 1), date(2021, 12, 31))
    assert (
        race(
            dsn,
            lambda conn: store_sessions(conn, "XLON", *years),
            lambda conn: ensure_sessions(conn, "XLON", *years),
        )
        == 0
    )
    with psycopg.connect(dsn) as conn:
        row = conn.execute("SELECT count(*) FROM calendar_session WHERE calendar = 'XLON'")
        assert row.fetchone() == (507,)


def test_the_engine_role_may_do_all_of_it(engine_conn: Conn) -> None:
    assert add_instrument(engine_conn, "ZZA", "Zz A")
    assert import_bars(engine_conn, [price("ZZA", 1), price("ZZB", 1)]) == Imported(2, 2, 1)
    split = Split("ZZA", date(2024, 1, 3), Decimal(2), Decimal(1))
    assert import_splits(engine_conn, [split]).added == 1
    assert ensure_sessions(engine_conn, "XLON", date(2024, 1, 1), date(2024, 1, 1)) > 200
    assert len(list(bars_between(engine_conn, ["ZZA"], AT - timedelta(days=1), AT))) == 1
    assert [row.bars for row in list_data(engine_conn) if row.symbol == "ZZA"] == [1]
