"""What a tick looks up and no run changes: instruments, splits and sessions, read once and kept.

A ``Reference`` lives as long as its caller wants to trust it: a replay, or the live ticks of one
connection, which forget between them what may have been imported. It is filled from the lookup
tables as it is asked.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta

from engine.db.connect import Connection
from engine.errors import BadInput
from engine.market.calendar import ensure_sessions
from engine.market.model import Session, Split

_EDGE = timedelta(days=20)


class Reference:
    """Lookups of one calendar, cached."""

    def __init__(self, conn: Connection, calendar: str) -> None:
        self._conn = conn
        self._calendar = calendar
        self._decimals: dict[str, int] = {}
        self._negative: set[str] = set()
        self._splits: dict[str, list[Split]] = {}
        self._opens: list[datetime] = []
        self._sessions: list[Session] = []
        self._loaded: tuple[datetime, datetime] | None = None
        self._asked_on: date | None = None

    def ask_anew(self, at: datetime) -> None:
        """Forget splits, which may have been announced, and instruments once a day.

        ``at`` is the logical time from which on things are asked. Sessions never change.
        """
        day = at.astimezone(UTC).date()
        if day != self._asked_on:
            self._decimals.clear()
            self._negative.clear()
        self._asked_on = day
        self._splits.clear()

    def quantity_decimals(self, symbols: Iterable[str]) -> dict[str, int]:
        """Decimals of ordered quantities by symbol. Raises BadInput for an unknown symbol."""
        wanted = set(symbols)
        missing = wanted - self._decimals.keys()
        if missing:
            for symbol, decimals, negative in self._conn.execute(
                """SELECT symbol, quantity_decimals, negative_price_allowed FROM instrument
                   WHERE symbol = ANY(%s)""",
                [list(missing)],
            ):
                self._decimals[symbol] = decimals
                if negative:
                    self._negative.add(symbol)
            unknown = sorted(missing - self._decimals.keys())
            if unknown:
                raise BadInput(
                    f"unknown symbol {', '.join(unknown)}; import its prices with "
                    "`oms data import`, or register it with `oms data add`"
                )
        return {symbol: self._decimals[symbol] for symbol in wanted}

    def may_be_negative(self, symbol: str) -> bool:
        """Whether a known symbol's price may be zero or less."""
        self.quantity_decimals([symbol])
        return symbol in self._negative

    def splits(self, symbols: Iterable[str], after: date, upto: date) -> list[Split]:
        """Splits of these symbols with ``after < ex_date <= upto``, oldest first."""
        wanted = set(symbols)
        missing = wanted - self._splits.keys()
        if missing:
            self._splits.update((symbol, []) for symbol in missing)
            for row in self._conn.execute(
                """SELECT symbol, ex_date, numerator, denominator FROM corporate_action
                   WHERE symbol = ANY(%s) AND kind = 'SPLIT'""",
                [list(missing)],
            ):
                self._splits[row[0]].append(Split(*row))
        found = [s for symbol in wanted for s in self._splits[symbol] if after < s.ex_date <= upto]
        return sorted(found, key=lambda split: (split.ex_date, split.symbol))

    def session_at(self, moment: datetime) -> Session | None:
        """The session that was open at ``moment``, or the last one that had opened before it."""
        self._load(moment)
        place = bisect_right(self._opens, moment)
        return self._sessions[place - 1] if place else None

    def session_after(self, moment: datetime) -> Session | None:
        """The first session that opens after ``moment``."""
        self._load(moment)
        place = bisect_right(self._opens, moment)
        return self._sessions[place] if place < len(self._sessions) else None

    def _load(self, moment: datetime) -> None:
        if self._loaded and self._loaded[0] <= moment <= self._loaded[1]:
            return
        day = moment.astimezone(UTC).date()
        ensure_sessions(self._conn, self._calendar, day - _EDGE, day)
        with suppress(BadInput):  # an exchange may not have published its next year yet
            ensure_sessions(self._conn, self._calendar, day, day + _EDGE)
        # Not beyond the years made sure of: after them some may be stored and others missing.
        upto = date((day + _EDGE).year, 12, 31)
        rows = self._conn.execute(
            """SELECT calendar, session_date, open_at, close_at FROM calendar_session
               WHERE calendar = %s AND session_date BETWEEN %s AND %s ORDER BY session_date""",
            [self._calendar, day - _EDGE, upto],
        ).fetchall()
        self._sessions = [Session(*row) for row in rows]
        self._opens = [session.open_at for session in self._sessions]
        last = self._opens[-1] if self._opens else moment
        self._loaded = (moment, max(moment, last - _EDGE))
