"""Market data in the database: history grows and is never edited."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg.rows import dict_row

from engine.errors import BadInput
from engine.market.imports import read_bars, read_splits
from engine.market.model import Bar, Split
from engine.market.store import (
    Imported,
    SymbolData,
    add_instrument,
    bars_at,
    bars_between,
    import_bars,
    import_splits,
    list_data,
    negative_symbols,
)
from engine.resources import data_dir

Conn = psycopg.Connection[Any]
T0 = datetime(2024, 1, 2, 21, tzinfo=UTC)


def at(day: int) -> datetime:
    return T0 + timedelta(days=day)


def bar(symbol: str, day: int, close: str = "10", volume: str | None = "5") -> Bar:
    price = Decimal(close)
    return Bar(
        symbol=symbol,
        start=at(day) - timedelta(hours=6),
        end=at(day),
        open=price,
        high=price + 1,
        low=price - 1,
        close=price,
        volume=None if volume is None else Decimal(volume),
    )


def stored(conn: Conn, symbol: str) -> list[Bar]:
    rows = conn.execute(
        "SELECT symbol, bar_start, bar_end, open, high, low, close, volume FROM price_bar"
        " WHERE symbol = %s ORDER BY bar_end",
        (symbol,),
    )
    return [Bar(*row) for row in rows]


def data_of(conn: Conn, symbol: str) -> SymbolData | None:
    return next((row for row in list_data(conn) if row.symbol == symbol), None)


# Instruments


def test_an_instrument_is_added_once(conn: Conn) -> None:
    assert add_instrument(conn, " zzz ", "Zzz plc", "gbp")
    assert not add_instrument(conn, "ZZZ", "Zzz plc", "GBP")
    assert data_of(conn, "ZZZ") == SymbolData("ZZZ", "Zzz plc", "GBP", 0, None, None, 0)


@pytest.mark.parametrize(
    ("currency", "decimals", "negative", "message"),
    [
        ("EUR", 6, False, "ZZZ is known already with currency USD, not EUR; it can't be changed."),
        ("USD", 2, False, "ZZZ is known already with quantity_decimals 6, not 2; it can't be"),
        (
            "EUR",
            6,
            True,
            "currency USD, not EUR and negative_price_allowed False, not True; it can't be",
        ),
    ],
)
def test_an_instrument_is_not_changed(
    conn: Conn, currency: str, decimals: int, negative: bool, message: str
) -> None:
    add_instrument(conn, "ZZZ", "Zzz plc")
    with pytest.raises(BadInput) as refused:
        add_instrument(
            conn,
            "ZZZ",
            currency=currency,
            quantity_decimals=decimals,
            negative_price_allowed=negative,
        )
    assert message in str(refused.value)
    assert data_of(conn, "ZZZ") == SymbolData("ZZZ", "Zzz plc", "USD", 0, None, None, 0)


@pytest.mark.parametrize("currency", ["", "US", "USDT", "U$D", "ÄÖÜ", "123"])
def test_a_currency_has_three_letters(conn: Conn, currency: str) -> None:
    with pytest.raises(BadInput, match="isn't a currency; use its three letters"):
        add_instrument(conn, "ZZZ", currency=currency)
    assert data_of(conn, "ZZZ") is None


def test_a_symbol_that_cannot_be_one_is_refused(conn: Conn) -> None:
    with pytest.raises(BadInput, match="isn't a symbol"):
        add_instrument(conn, "Z;Z")


def test_symbols_that_allow_negative_prices_are_known(conn: Conn) -> None:
    assert "ZZZ" not in negative_symbols(conn)
    add_instrument(conn, "ZZZ", negative_price_allowed=True)
    assert "ZZZ" in negative_symbols(conn)
    assert "AAPL" not in negative_symbols(conn)


# Importing bars


def test_bars_are_stored_as_they_are_and_symbols_with_them(conn: Conn) -> None:
    bars = [bar("ZZA", 0, "10.12345678"), bar("ZZB", 0, volume=None), bar("ZZA", 1, "999999999")]
    assert import_bars(conn, iter(bars), names={"ZZA": "Zz A"}, currency="EUR") == Imported(3, 3, 2)
    assert stored(conn, "ZZA") == [bars[0], bars[2]]
    assert stored(conn, "ZZB") == [bars[1]]
    assert data_of(conn, "ZZA") == SymbolData("ZZA", "Zz A", "EUR", 2, at(0), at(1), 0)
    assert data_of(conn, "ZZB") == SymbolData("ZZB", None, "EUR", 1, at(0), at(0), 0)


def test_the_same_bars_again_add_nothing(conn: Conn) -> None:
    bars = [bar("ZZA", 0), bar("ZZA", 1, volume=None)]
    import_bars(conn, bars)
    again = [bar("ZZA", 0, "10.00"), bar("ZZA", 1, volume=None), bar("ZZA", 2)]
    assert import_bars(conn, again) == Imported(3, 1, 0)
    assert import_bars(conn, again) == Imported(3, 0, 0)
    assert len(stored(conn, "ZZA")) == 3


def test_nothing_is_a_fine_import(conn: Conn) -> None:
    assert import_bars(conn, []) == Imported(0, 0, 0)
    assert import_splits(conn, []) == Imported(0, 0, 0)


def test_a_known_symbol_keeps_its_name_and_currency(conn: Conn) -> None:
    add_instrument(conn, "ZZA", "First", "GBP")
    import_bars(conn, [bar("ZZA", 0)], names={"ZZA": "Second"}, currency="USD")
    assert data_of(conn, "ZZA") == SymbolData("ZZA", "First", "GBP", 1, at(0), at(0), 0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            bar("ZZA", 1, "10.5"),
            "(open 10 to 10.5, high 11 to 11.5, low 9 to 9.5, close 10 to 10.5)",
        ),
        (bar("ZZA", 1, volume="6"), "(volume 5 to 6)"),
        (bar("ZZA", 1, volume=None), "(volume 5 to unknown)"),
    ],
)
def test_other_figures_for_a_stored_bar_are_refused(conn: Conn, other: Bar, message: str) -> None:
    bars = [bar("ZZA", 0), bar("ZZA", 1)]
    import_bars(conn, bars)
    with pytest.raises(BadInput) as refused:
        import_bars(conn, [bar("ZZA", 2), other, bar("ZZNEW", 0)])
    assert str(refused.value) == (
        "The bar of ZZA at 2024-01-03T21:00:00+00:00 is stored already and can't be changed "
        f"{message}; nothing was imported."
    )
    assert stored(conn, "ZZA") == bars
    assert data_of(conn, "ZZNEW") is None
    # The connection is as usable as before, for another import too.
    assert import_bars(conn, [bar("ZZA", 2)]) == Imported(1, 1, 0)


def test_two_prices_for_one_bar_in_one_import_are_refused(conn: Conn) -> None:
    with pytest.raises(BadInput, match="is stored already and can't be changed"):
        import_bars(conn, [bar("ZZA", 0), bar("ZZA", 0, "10.5")])
    assert data_of(conn, "ZZA") is None
    assert import_bars(conn, [bar("ZZA", 0), bar("ZZA", 0)]) == Imported(2, 1, 1)


def test_another_beginning_of_a_stored_bar_is_no_other_figure(conn: Conn) -> None:
    import_bars(conn, [bar("ZZA", 0)])
    same = bar("ZZA", 0)
    later = Bar("ZZA", same.end, same.end, same.open, same.high, same.low, same.close, same.volume)
    assert import_bars(conn, [later]) == Imported(1, 0, 0)
    assert stored(conn, "ZZA") == [same]


@pytest.mark.parametrize("low", ["0", "-1"])
def test_prices_below_zero_need_an_instrument_that_allows_them(conn: Conn, low: str) -> None:
    bad = Bar.of_price("ZZA", Decimal(low), at(0))
    with pytest.raises(BadInput) as refused:
        import_bars(conn, [bad])
    assert str(refused.value) == (
        f"The low {low} of ZZA at 2024-01-02T21:00:00+00:00 must be above zero; "
        "nothing was imported."
    )
    assert data_of(conn, "ZZA") is None
    add_instrument(conn, "ZZA", negative_price_allowed=True)
    assert import_bars(conn, [bad]) == Imported(1, 1, 0)


@pytest.mark.parametrize("price", ["NaN", "Infinity", "1e15"])
def test_the_database_refuses_what_no_reader_would_pass(conn: Conn, price: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation), conn.transaction():
        import_bars(conn, [Bar.of_price("ZZA", Decimal(price), at(0))])
    assert data_of(conn, "ZZA") is None


def test_a_naive_bar_is_refused(conn: Conn) -> None:
    naive = at(0).replace(tzinfo=None)
    with pytest.raises(BadInput, match="The time 2024-01-02T21:00:00 has no timezone; give it one"):
        import_bars(conn, [bar("ZZA", 1), Bar.of_price("ZZA", Decimal(1), naive)])
    assert data_of(conn, "ZZA") is None


def test_a_reader_that_fails_halfway_leaves_nothing(conn: Conn) -> None:
    def bars() -> Iterator[Bar]:
        yield bar("ZZA", 0)
        raise BadInput("The rest is broken.")

    with pytest.raises(BadInput, match="The rest is broken"):
        import_bars(conn, bars())
    assert data_of(conn, "ZZA") is None
    assert import_bars(conn, [bar("ZZA", 0)]) == Imported(1, 1, 1)


def test_the_demo_imports_whole_and_once(conn: Conn) -> None:
    bars = read_bars(data_dir() / "demo_prices.csv.gz", calendar="XNYS")
    splits = read_splits(data_dir() / "demo_splits.csv", calendar="XNYS")
    assert (import_bars(conn, bars).added, import_splits(conn, splits).added) == (9810, 3)
    assert (import_bars(conn, bars).added, import_splits(conn, splits).added) == (0, 0)
    first = datetime(2000, 3, 1, 21, tzinfo=UTC)
    last = datetime(2013, 3, 1, 21, tzinfo=UTC)
    listed = {row.symbol: (row.bars, row.first, row.last, row.splits) for row in list_data(conn)}
    assert listed["AAPL"] == (3270, first, last, 2)
    assert listed["IBM"] == (3270, first, last, 0)
    assert listed["MSFT"] == (3270, first, last, 1)
    walked = list(bars_between(conn, ["MSFT", "AAPL", "IBM"], first - timedelta(days=1), last))
    assert len(walked) == 3270
    assert [b for _, group in walked for b in group] == sorted(
        bars, key=lambda b: (b.end, b.symbol)
    )


# Importing splits

SPLIT = Split("ZZA", date(2024, 1, 3), Decimal(2), Decimal(1))


def test_splits_are_stored_once_with_their_symbols(conn: Conn) -> None:
    other = Split("ZZB", date(2024, 1, 3), Decimal(1), Decimal(10))
    assert import_splits(conn, [SPLIT, other]) == Imported(2, 2, 2)
    assert import_splits(conn, [SPLIT]) == Imported(1, 0, 0)
    assert import_splits(conn, [Split("ZZA", SPLIT.ex_date, Decimal(4), Decimal(2))]).added == 0
    assert conn.execute(
        "SELECT * FROM corporate_action WHERE symbol LIKE 'ZZ_' ORDER BY symbol"
    ).fetchall() == [
        ("ZZA", date(2024, 1, 3), "SPLIT", 2, 1),
        ("ZZB", date(2024, 1, 3), "SPLIT", 1, 10),
    ]


def test_another_ratio_for_a_stored_split_is_refused(conn: Conn) -> None:
    import_splits(conn, [SPLIT])
    with pytest.raises(BadInput) as refused:
        import_splits(
            conn,
            [
                Split("ZZNEW", date(2024, 1, 3), Decimal(2), Decimal(1)),
                Split("ZZA", SPLIT.ex_date, Decimal(3), Decimal(2)),
            ],
        )
    assert str(refused.value) == (
        "The split of ZZA on 2024-01-03 is stored as 2 for 1 and can't become 3 for 2; "
        "nothing was imported."
    )
    assert data_of(conn, "ZZNEW") is None


# Reading


@pytest.fixture
def market(conn: Conn) -> Conn:
    """ZZA on days 0 to 9, ZZB on every third of them, ZZC on day 4 only."""
    import_bars(
        conn,
        [bar("ZZA", day, str(100 + day)) for day in range(10)]
        + [bar("ZZB", day, str(200 + day)) for day in range(0, 10, 3)]
        + [bar("ZZC", 4, "304")],
    )
    return conn


def walk(conn: Conn, symbols: list[str], after: int, upto: int, page: int) -> list[str]:
    return [
        f"{(end - T0).days}{''.join(b.symbol[-1] for b in group)}"
        for end, group in bars_between(conn, symbols, at(after), at(upto), page_rows=page)
    ]


@pytest.mark.parametrize("page", [1, 2, 3, 4, 5, 7, 14, 15, 16, 5000])
def test_bars_come_in_order_of_time_whatever_the_page(market: Conn, page: int) -> None:
    symbols = ["ZZC", "ZZA", "ZZB", "ZZA", "UNKNOWN"]
    assert walk(market, symbols, -1, 9, page) == (
        ["0AB", "1A", "2A", "3AB", "4AC", "5A", "6AB", "7A", "8A", "9AB"]
    )
    assert walk(market, ["ZZB"], -1, 9, page) == ["0B", "3B", "6B", "9B"]


@pytest.mark.parametrize("page", [1, 5000])
def test_the_range_excludes_its_beginning_and_includes_its_end(market: Conn, page: int) -> None:
    assert walk(market, ["ZZA"], 3, 6, page) == ["4A", "5A", "6A"]
    assert walk(market, ["ZZA"], 3, 3, page) == []
    assert walk(market, ["ZZA"], 6, 3, page) == []
    assert walk(market, [], -1, 9, page) == []
    assert walk(market, ["UNKNOWN"], -1, 9, page) == []


def test_a_walk_goes_on_over_commits_and_other_row_factories(market: Conn) -> None:
    market.row_factory = dict_row
    seen = []
    for end, group in bars_between(market, ["ZZA"], at(-1), at(9), page_rows=2):
        with market.transaction():
            seen.append((end, group[0].close))
        assert bars_at(market, ["ZZA"], end)["ZZA"] == group[0]
    assert seen == [(at(day), Decimal(100 + day)) for day in range(10)]
    assert data_of(market, "ZZC") is not None


@settings(max_examples=25)
@given(
    days=st.dictionaries(
        st.sampled_from(["ZZA", "ZZB", "ZZC", "ZZD"]), st.sets(st.integers(0, 12), min_size=1)
    ),
    after=st.integers(-1, 12),
    upto=st.integers(0, 13),
    page=st.integers(1, 20),
)
def test_pages_hold_what_one_query_would(
    conn: Conn, days: dict[str, set[int]], after: int, upto: int, page: int
) -> None:
    bars = [bar(symbol, day) for symbol in days for day in days[symbol]]
    expected = sorted(
        (b for b in bars if at(after) < b.end <= at(upto)), key=lambda b: (b.end, b.symbol)
    )
    with conn.transaction(force_rollback=True):
        import_bars(conn, bars)
        groups = list(bars_between(conn, days, at(after), at(upto), page_rows=page))
    assert [b for _, group in groups for b in group] == expected
    assert [end for end, _ in groups] == sorted({b.end for b in expected})


def test_the_latest_bars_are_those_that_have_ended(market: Conn) -> None:
    def found(moment: datetime) -> dict[str, int]:
        return {
            symbol: (latest.end - T0).days
            for symbol, latest in bars_at(
                market, ["ZZC", "ZZB", "ZZA", "ZZA", "NO"], moment
            ).items()
        }

    second = timedelta(seconds=1)
    assert found(at(0) - second) == {}
    assert found(at(0)) == {"ZZA": 0, "ZZB": 0}
    assert found(at(4) - second) == {"ZZA": 3, "ZZB": 3}
    assert found(at(4)) == {"ZZA": 4, "ZZB": 3, "ZZC": 4}
    assert found(at(400)) == {"ZZA": 9, "ZZB": 9, "ZZC": 4}
    assert bars_at(market, [], at(0)) == {}
    assert bars_at(market, ["ZZC"], at(9)) == {"ZZC": bar("ZZC", 4, "304")}


def test_times_come_back_in_utc_whatever_the_session_has(market: Conn) -> None:
    market.execute("SET LOCAL timezone = 'Asia/Kolkata'")
    (latest,) = bars_at(market, ["ZZC"], at(4)).values()
    assert (latest.start.tzinfo, latest.end.tzinfo) == (UTC, UTC)
    listed = data_of(market, "ZZC")
    assert listed is not None
    assert listed.first is not None
    assert listed.first.tzinfo is UTC
    # And a time in another zone is the same moment.
    kolkata = at(4).astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert bars_at(market, ["ZZC"], kolkata) == {"ZZC": latest}


def test_naive_times_are_refused(conn: Conn) -> None:
    naive = at(0).replace(tzinfo=None)
    with pytest.raises(BadInput, match="has no timezone"):
        bars_at(conn, ["ZZA"], naive)
    for after, upto in ((naive, at(1)), (at(0), naive)):
        with pytest.raises(BadInput, match="has no timezone"):
            list(bars_between(conn, ["ZZA"], after, upto))
