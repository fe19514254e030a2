"""Market data in the database: what was imported, and the bars that a run walks through.

History isn't edited. Importing the same rows again adds nothing; a different price for a bar that
is there is refused, because runs have traded on it. Every function works inside the transaction
that the caller has open on ``conn``, or in one of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from itertools import groupby
from typing import Any

from psycopg import Connection
from psycopg.rows import dict_row, tuple_row

from engine.errors import BadInput
from engine.market.imports import parse_symbol
from engine.market.model import Bar, FxRate, Split

__all__ = [
    "PAGE_ROWS",
    "Imported",
    "SymbolData",
    "add_instrument",
    "bars_at",
    "bars_between",
    "import_bars",
    "import_rates",
    "import_splits",
    "list_data",
    "negative_symbols",
]

PAGE_ROWS = 5_000  # bars held in memory at once while a run walks through them

_GIVEN_SPLITS = """
    unnest(%(symbols)s::text[], %(days)s::date[], %(new)s::numeric[], %(old)s::numeric[])
        AS s (symbol, ex_date, numerator, denominator)
"""
_COLUMNS = "symbol, bar_start, bar_end, open, high, low, close, volume"


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did: rows read, rows that were new, and symbols that were new."""

    read: int
    added: int
    symbols_added: int


@dataclass(frozen=True, slots=True)
class SymbolData:
    """What is stored of one symbol; ``first`` and ``last`` are bar ends, None without bars."""

    symbol: str
    name: str | None
    currency: str
    bars: int
    first: datetime | None
    last: datetime | None
    splits: int


def add_instrument(
    conn: Connection[Any],
    symbol: str,
    name: str | None = None,
    currency: str = "USD",
    *,
    quantity_decimals: int = 6,
    negative_price_allowed: bool = False,
) -> bool:
    """Make ``symbol`` known, with prices in ``currency``, and return whether it is new.

    Raises BadInput for something that can't be a symbol or a currency, and when the symbol is known
    with other properties: amounts already booked are in its currency and decimals.
    """
    symbol, currency = parse_symbol(symbol), currency.strip().upper()
    if not (len(currency) == 3 and currency.isascii() and currency.isalpha()):
        raise BadInput(f"{currency[:40]!r} isn't a currency; use its three letters, such as USD.")
    wanted = {
        "currency": currency,
        "quantity_decimals": quantity_decimals,
        "negative_price_allowed": negative_price_allowed,
    }
    with conn.cursor(row_factory=dict_row) as cursor:
        cursor.execute(
            """
            INSERT INTO instrument
                (symbol, name, currency, quantity_decimals, negative_price_allowed)
            VALUES (%s, %s, %s, %s, %s)
            ON CONFLICT (symbol) DO NOTHING
            """,
            (symbol, name, *wanted.values()),
        )
        if cursor.rowcount:
            return True
        cursor.execute(
            """
            SELECT currency, quantity_decimals, negative_price_allowed
            FROM instrument WHERE symbol = %s
            """,
            (symbol,),
        )
        known = cursor.fetchone() or {}
    other = [
        f"{key} {known.get(key)}, not {wanted[key]}"
        for key in wanted
        if known.get(key) != wanted[key]
    ]
    if other:
        raise BadInput(
            f"{symbol} is known already with {' and '.join(other)}; it can't be changed."
        )
    return False


def negative_symbols(conn: Connection[Any]) -> frozenset[str]:
    """Return the symbols whose price may be zero or below, for ``read_bars``."""
    with conn.cursor(row_factory=tuple_row) as cursor:
        cursor.execute("SELECT symbol FROM instrument WHERE negative_price_allowed")
        return frozenset(symbol for (symbol,) in cursor)


def import_bars(
    conn: Connection[Any],
    bars: Iterable[Bar],
    *,
    names: Mapping[str, str] | None = None,
    currency: str = "USD",
) -> Imported:
    """Store bars, and the symbols that are unknown, with ``names`` for them; all or nothing.

    Raises BadInput when a stored bar has other figures, or a price isn't above zero for a symbol
    that doesn't allow that. When a bar began isn't compared: it is derived, and only from what its
    file holds.
    """
    with conn.transaction(), conn.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(
            """
            CREATE TEMPORARY TABLE bar_import (
                symbol text, bar_start timestamptz, bar_end timestamptz,
                open numeric, high numeric, low numeric, close numeric, volume numeric
            )
            """
        )
        with cursor.copy(f"COPY pg_temp.bar_import ({_COLUMNS}) FROM STDIN") as copy:
            for bar in bars:
                copy.write_row(_cells(bar))
        read = cursor.rowcount
        symbols_added = _add_symbols(cursor, names or {}, currency)
        _refuse_bad_prices(cursor)
        # Sorted, so that two imports at once meet the rows in one order and can't deadlock.
        cursor.execute(
            f"""
            INSERT INTO price_bar ({_COLUMNS})
            SELECT {_COLUMNS} FROM pg_temp.bar_import ORDER BY symbol, bar_end
            ON CONFLICT (symbol, bar_end) DO NOTHING
            """
        )
        added = cursor.rowcount
        # After the insert, so that it also sees what another import has just committed.
        if added < read:
            _refuse_other_figures(cursor)
        cursor.execute("DROP TABLE pg_temp.bar_import")
    return Imported(read, added, symbols_added)


def import_splits(conn: Connection[Any], splits: Sequence[Split]) -> Imported:
    """Store splits and the symbols that are unknown; all or nothing.

    Raises BadInput when a stored split of that symbol and day has another ratio.
    """
    columns = {
        "symbols": [split.symbol for split in splits],
        "days": [split.ex_date for split in splits],
        "new": [split.numerator for split in splits],
        "old": [split.denominator for split in splits],
    }
    with conn.transaction(), conn.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(
            """
            INSERT INTO instrument (symbol)
            SELECT DISTINCT unnest(%(symbols)s::text[]) AS symbol ORDER BY symbol
            ON CONFLICT (symbol) DO NOTHING
            """,
            columns,
        )
        symbols_added = cursor.rowcount
        cursor.execute(
            f"""
            INSERT INTO corporate_action (symbol, ex_date, kind, numerator, denominator)
            SELECT s.symbol, s.ex_date, 'SPLIT', s.numerator, s.denominator
            FROM {_GIVEN_SPLITS} ORDER BY s.symbol, s.ex_date
            ON CONFLICT (symbol, ex_date, kind) DO NOTHING
            """,
            columns,
        )
        added = cursor.rowcount
        _refuse_other_ratios(cursor, columns)
    return Imported(len(splits), added, symbols_added)


def import_rates(conn: Connection[Any], rates: Sequence[FxRate]) -> Imported:
    """Store exchange rates; all or nothing.

    Raises BadInput when a stored rate of that pair and moment is another: commissions were
    converted at it.
    """
    columns = {
        "currencies": [rate.currency for rate in rates],
        "quotes": [rate.quote_currency for rate in rates],
        "times": [rate.at for rate in rates],
        "rates": [rate.rate for rate in rates],
    }
    given = """unnest(%(currencies)s::text[], %(quotes)s::text[], %(times)s::timestamptz[],
                      %(rates)s::numeric[]) AS g (currency, quote_currency, at, rate)"""
    with conn.transaction(), conn.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(
            f"""
            INSERT INTO fx_rate (currency, quote_currency, at, rate)
            SELECT g.currency, g.quote_currency, g.at, g.rate FROM {given}
            ORDER BY g.currency, g.quote_currency, g.at
            ON CONFLICT (currency, quote_currency, at) DO NOTHING
            """,
            columns,
        )
        added = cursor.rowcount
        cursor.execute(
            f"""
            SELECT g.currency, g.quote_currency, g.at, f.rate, g.rate FROM {given}
            JOIN fx_rate f USING (currency, quote_currency, at)
            WHERE f.rate <> g.rate ORDER BY 1, 2, 3 LIMIT 1
            """,
            columns,
        )
        other = cursor.fetchone()
        if other is not None:
            currency, quote, at, stored, new = other
            raise BadInput(
                f"{currency}/{quote} at {at.astimezone(UTC).isoformat()} is stored as {stored:f}, "
                f"not {new:f}; a rate that was converted at can't be changed."
            )
    return Imported(len(rates), added, 0)


def list_data(conn: Connection[Any]) -> list[SymbolData]:
    """Return what is stored of every known symbol, by symbol."""
    with conn.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(
            """
            SELECT i.symbol, i.name, i.currency, coalesce(b.bars, 0), b.first, b.last,
                (SELECT count(*) FROM corporate_action a WHERE a.symbol = i.symbol)
            FROM instrument i
            LEFT JOIN (
                SELECT symbol, count(*) AS bars, min(bar_end) AS first, max(bar_end) AS last
                FROM price_bar GROUP BY symbol
            ) b ON b.symbol = i.symbol
            ORDER BY i.symbol COLLATE "C"
            """
        )
        return [
            SymbolData(symbol, name, currency, bars, _utc(first), _utc(last), splits)
            for symbol, name, currency, bars, first, last, splits in cursor
        ]


def bars_between(
    conn: Connection[Any],
    symbols: Iterable[str],
    after: datetime,
    upto: datetime,
    *,
    page_rows: int = PAGE_ROWS,
) -> Iterator[tuple[datetime, list[Bar]]]:
    """Yield the bars that end after ``after`` and up to ``upto``, those of one moment together.

    In order of time, then symbol. It reads pages of about ``page_rows`` bars, each with a query of
    its own, so that memory stays flat and the caller may commit in between.
    Raises BadInput for a naive time.
    """
    _require_aware(after, upto)
    wanted = sorted(set(symbols))
    per_symbol = max(1, page_rows // max(1, len(wanted)))
    while wanted:
        page = _page(conn, wanted, after, upto, per_symbol)
        # A symbol with a full page may go on right after its last bar, so that nothing later than
        # the earliest such bar is complete yet.
        horizon = _horizon(page, per_symbol)
        complete = page if horizon is None else [bar for bar in page if bar.end <= horizon]
        for end, group in groupby(complete, key=lambda bar: bar.end):
            yield end, list(group)
        if horizon is None:
            return
        after = horizon


def bars_at(conn: Connection[Any], symbols: Iterable[str], at: datetime) -> dict[str, Bar]:
    """Return each symbol's latest bar that ended at ``at`` or before; a symbol may have none.

    Raises BadInput for a naive time.
    """
    _require_aware(at)
    with conn.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(
            f"""
            SELECT b.* FROM (SELECT DISTINCT unnest(%s::text[]) AS symbol) AS s
            CROSS JOIN LATERAL (
                SELECT {_COLUMNS} FROM price_bar
                WHERE symbol = s.symbol AND bar_end <= %s
                ORDER BY bar_end DESC LIMIT 1
            ) AS b
            ORDER BY b.symbol COLLATE "C"
            """,
            (list(symbols), at),
        )
        return {bar.symbol: bar for bar in map(_bar, cursor)}


def _page(
    conn: Connection[Any], symbols: list[str], after: datetime, upto: datetime, per_symbol: int
) -> list[Bar]:
    with conn.cursor(row_factory=tuple_row) as cursor:
        # One walk of the primary key a symbol, whatever the number of other symbols stored.
        cursor.execute(
            f"""
            SELECT b.* FROM unnest(%s::text[]) AS s (symbol)
            CROSS JOIN LATERAL (
                SELECT {_COLUMNS} FROM price_bar
                WHERE symbol = s.symbol AND bar_end > %s AND bar_end <= %s
                ORDER BY bar_end LIMIT %s
            ) AS b
            ORDER BY b.bar_end, b.symbol COLLATE "C"
            """,
            (symbols, after, upto, per_symbol),
        )
        return [_bar(row) for row in cursor]


def _horizon(page: list[Bar], per_symbol: int) -> datetime | None:
    """Return the time up to which a page is complete, or None when it is to its end."""
    counts = Counter(bar.symbol for bar in page)
    last = {bar.symbol: bar.end for bar in page}
    return min((last[symbol] for symbol in counts if counts[symbol] == per_symbol), default=None)


def _add_symbols(cursor: Any, names: Mapping[str, str], currency: str) -> int:
    cursor.execute(
        """
        INSERT INTO instrument (symbol, name, currency)
        SELECT DISTINCT b.symbol, n.name, %s::text
        FROM pg_temp.bar_import b
        LEFT JOIN unnest(%s::text[], %s::text[]) AS n (symbol, name) USING (symbol)
        ORDER BY b.symbol
        ON CONFLICT (symbol) DO NOTHING
        """,
        (currency, list(names.keys()), list(names.values())),
    )
    added: int = cursor.rowcount
    return added


def _refuse_bad_prices(cursor: Any) -> None:
    """The one rule about bars that a CHECK can't hold, as it depends on the instrument."""
    cursor.execute(
        """
        SELECT b.symbol, b.bar_end, b.low FROM pg_temp.bar_import b
        JOIN instrument i USING (symbol)
        WHERE b.low <= 0 AND NOT i.negative_price_allowed
        ORDER BY b.symbol, b.bar_end LIMIT 1
        """
    )
    if bad := cursor.fetchone():
        raise BadInput(
            f"The low {bad[2]:f} of {bad[0]} at {_iso(bad[1])} must be above zero; "
            "nothing was imported."
        )


def _refuse_other_figures(cursor: Any) -> None:
    cursor.execute(
        """
        SELECT b.symbol, b.bar_end,
            p.open, p.high, p.low, p.close, p.volume, b.open, b.high, b.low, b.close, b.volume
        FROM pg_temp.bar_import b
        JOIN price_bar p USING (symbol, bar_end)
        WHERE (p.open, p.high, p.low, p.close, p.volume)
            IS DISTINCT FROM (b.open, b.high, b.low, b.close, b.volume)
        ORDER BY b.symbol, b.bar_end LIMIT 1
        """
    )
    if other := cursor.fetchone():
        symbol, end, *figures = other
        names = ("open", "high", "low", "close", "volume")
        changes = [
            f"{name} {_known(stored)} to {_known(given)}"
            for name, stored, given in zip(names, figures[:5], figures[5:], strict=True)
            if stored != given
        ]
        raise BadInput(
            f"The bar of {symbol} at {_iso(end)} is stored already and can't be changed "
            f"({', '.join(changes)}); nothing was imported."
        )


def _refuse_other_ratios(cursor: Any, columns: Mapping[str, object]) -> None:
    # Multiplied out, because 2 for 1 and 4 for 2 are one split.
    cursor.execute(
        f"""
        SELECT s.symbol, s.ex_date, a.numerator, a.denominator, s.numerator, s.denominator
        FROM {_GIVEN_SPLITS}
        JOIN corporate_action a USING (symbol, ex_date)
        WHERE a.kind = 'SPLIT' AND a.numerator * s.denominator <> s.numerator * a.denominator
        ORDER BY s.symbol, s.ex_date LIMIT 1
        """,
        columns,
    )
    if other := cursor.fetchone():
        symbol, day, *ratios = other
        raise BadInput(
            "The split of {} on {} is stored as {:f} for {:f} and can't become {:f} for {:f}; "
            "nothing was imported.".format(symbol, day, *ratios)
        )


def _cells(bar: Bar) -> tuple[object, ...]:
    _require_aware(bar.start, bar.end)
    prices = (bar.open, bar.high, bar.low, bar.close, bar.volume)
    return (bar.symbol, bar.start, bar.end, *prices)


def _bar(row: tuple[Any, ...]) -> Bar:
    symbol, start, end, *figures = row
    return Bar(symbol, start.astimezone(UTC), end.astimezone(UTC), *figures)


def _utc(moment: datetime | None) -> datetime | None:
    return moment and moment.astimezone(UTC)


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat()


def _known(figure: Decimal | None) -> str:
    return "unknown" if figure is None else f"{figure:f}"


def _require_aware(*moments: datetime) -> None:
    """A naive time would be read in whatever timezone the session of the database has."""
    for moment in moments:
        if moment.tzinfo is None:
            raise BadInput(f"The time {moment.isoformat()} has no timezone; give it one.")
