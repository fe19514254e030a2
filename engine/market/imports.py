"""Prices and splits from outside, checked before anything is written.

Two doors: CSV files (``read_bars``, ``read_splits``), taken whole or not at all, and arguments of
the command line (``parse_price``, ``parse_time`` and so on). What comes in is refused with one
sentence, never repaired: a repaired price is a wrong price that nobody sees.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar, cast

from engine.errors import BadInput
from engine.market.calendar import require_calendar, session_at, session_on
from engine.market.model import Bar, FxRate, Session, Split
from engine.quantities import EXACT

__all__ = [
    "DECIMALS_MAX",
    "IMPORT_ROWS_MAX",
    "LINE_BYTES_MAX",
    "NUMBER_BELOW",
    "RATIO_BELOW",
    "parse_decimal",
    "parse_price",
    "parse_prices",
    "parse_symbol",
    "parse_time",
    "read_bars",
    "read_rates",
    "read_splits",
]

DECIMALS_MAX = 8
NUMBER_BELOW = Decimal(10) ** 15  # in any unit: a price, a volume
RATIO_BELOW = Decimal(10) ** 6  # new units for an old one, either side of a split
FX_RATE_BELOW = Decimal(10) ** 9
IMPORT_ROWS_MAX = 2_000_000  # rows in one file: about 1.5 GB of memory
LINE_BYTES_MAX = 10_000

_PRICES = ("open", "high", "low", "close")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,9})?", re.ASCII)
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
# The same rule as the database's instrument_symbol_format.
_SYMBOL = re.compile(r"[A-Z0-9][A-Z0-9._=^/ -]{0,31}")
_CURRENCY = re.compile(r"[A-Z]{3}")
_STEP = Decimal(1).scaleb(-DECIMALS_MAX)

Order = TypeVar("Order", date, datetime)


def parse_decimal(text: str, what: str = "number") -> Decimal:
    """Return the exact number that ``text`` writes in plain digits.

    Raises BadInput when it is no finite number, has more than DECIMALS_MAX decimals, or is
    NUMBER_BELOW or more from zero. ``what`` is the number's name in that sentence.
    """
    if not _NUMBER.fullmatch(text):
        raise BadInput(f"The {what} {_shown(text)} isn't a number; write it as 187.5.")
    value = Decimal(text)
    # copy_abs, because abs would round, and overflow on 1e999999999.
    if value.copy_abs() >= NUMBER_BELOW:
        raise BadInput(f"The {what} {_shown(text)} is too large; it must be below 1e15.")
    rounded = value.quantize(_STEP, context=EXACT)
    if rounded != value:
        raise BadInput(
            f"The {what} {_shown(text)} has more than {DECIMALS_MAX} decimals; round it first."
        )
    # As many decimals as were written: 187.50 stays 187.50, and 1e3 becomes 1000.
    exponent = min(0, max(-DECIMALS_MAX, int(value.as_tuple().exponent)))
    # Adding zero takes the sign from -0, which has no meaning for a price.
    return EXACT.add(rounded.quantize(Decimal(1).scaleb(exponent), context=EXACT), 0)


def parse_symbol(text: str) -> str:
    """Return the symbol in upper case. Raises BadInput when it can't be one."""
    symbol = text.strip().upper()
    if not _SYMBOL.fullmatch(symbol):
        raise BadInput(
            f"{_shown(text)} isn't a symbol; use up to 32 letters, digits or any of ._=^/- "
            "and begin with a letter or digit."
        )
    return symbol


def parse_price(text: str, negative_symbols: Collection[str] = ()) -> tuple[str, Decimal]:
    """Return the symbol and the price of an argument such as ``AAPL=187.5``.

    Raises BadInput when it isn't one; a price of zero or below is for ``negative_symbols`` only.
    """
    # From the right, because a symbol may hold an equals sign and a price can't.
    name, equals, price = text.rpartition("=")
    if not equals:
        raise BadInput(f"{_shown(text)} isn't a price; write it as AAPL=187.5.")
    symbol = parse_symbol(name)
    return symbol, _price(price.strip(), f"price of {symbol}", symbol in negative_symbols)


def parse_prices(
    texts: Iterable[str], negative_symbols: Collection[str] = ()
) -> dict[str, Decimal]:
    """Return the prices of arguments such as ``AAPL=187.5``, by symbol.

    Raises BadInput as ``parse_price`` does, and for a symbol that is given twice.
    """
    prices: dict[str, Decimal] = {}
    for text in texts:
        symbol, price = parse_price(text, negative_symbols)
        if symbol in prices:
            raise BadInput(f"{symbol} has two prices, {prices[symbol]:f} and {price:f}; give one.")
        prices[symbol] = price
    return prices


def parse_time(text: str, what: str = "time") -> datetime:
    """Return the moment, in UTC, that ``text`` writes in ISO 8601 with its timezone.

    Raises BadInput when it isn't one or has no timezone: guessing one would shift it by hours.
    """
    try:
        moment = datetime.fromisoformat(text.strip())
        if moment.tzinfo is None:
            example = moment.isoformat()
            raise BadInput(
                f"The {what} {_shown(text)} has no timezone; write {example}Z for UTC, or end it "
                f"with its offset, as in {example}+05:30."
            )
        return moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise BadInput(
            f"The {what} {_shown(text)} isn't a date and time; write it as 2024-01-31T16:00:00Z."
        ) from error


def read_bars(
    path: Path | str, *, calendar: str, negative_symbols: Collection[str] = ()
) -> list[Bar]:
    """Return the bars of a CSV file, which may be compressed (``.gz``), in the file's order.

    Its columns are symbol (or ticker), date or timestamp, open, high, low, close and, where it is
    known, volume; ``Adj Close`` is ignored. A date means that session of ``calendar``, from open
    to close. A timestamp is the END of its bar and has a timezone; the bar is taken to begin where
    the symbol's bar before it ended, or at the session's open if that is later, so that no order
    is filled on a price from before it. A timestamp with four equal prices is one price, at that
    moment.

    Zero and negative prices are for ``negative_symbols`` only. Raises BadInput, with the line, for
    the first thing that is wrong.
    """
    calendar = require_calendar(calendar)
    source = _Source(path)
    latest = _Latest[datetime](source)
    bars: list[Bar] = []
    with source.blame():
        for cells in source.rows(_BAR_COLUMNS):
            symbol = parse_symbol(cells["symbol"])
            prices = _prices(cells, symbol in negative_symbols)
            flat = len(set(prices)) == 1
            start, end = _span(cells, calendar, latest.of(symbol), flat=flat)
            latest.advance(symbol, end)
            bars.append(Bar(symbol, start, end, *prices, _volume(cells.get("volume", ""))))
    return bars


def read_splits(path: Path | str, *, calendar: str) -> list[Split]:
    """Return the splits of a CSV file: symbol, ex_date, numerator, denominator.

    Each ex_date must be a session of ``calendar``, because a split takes effect at its open.
    Raises BadInput, with the line, for the first thing that is wrong.
    """
    calendar = require_calendar(calendar)
    source = _Source(path)
    latest = _Latest[date](source)
    splits: list[Split] = []
    with source.blame():
        for cells in source.rows(_SPLIT_COLUMNS):
            symbol = parse_symbol(cells["symbol"])
            ex_date = _day(cells["ex_date"], "ex_date")
            _session(calendar, ex_date)
            latest.advance(symbol, ex_date)
            splits.append(Split(symbol, ex_date, *_ratio(cells)))
    return splits


def read_rates(path: Path | str) -> list[FxRate]:
    """Return the exchange rates of a CSV file: currency, quote_currency, at, rate.

    ``at`` has a timezone. Raises BadInput, with the line, for the first thing that is wrong.
    """
    source = _Source(path)
    latest = _Latest[datetime](source)
    rates: list[FxRate] = []
    with source.blame():
        for cells in source.rows(_RATE_COLUMNS):
            currency, quote = _currency(cells["currency"]), _currency(cells["quote_currency"])
            if currency == quote:
                raise BadInput(f"The rate of {currency} in itself is always 1; leave it out.")
            at = parse_time(cells["at"], "at")
            rate = parse_decimal(cells["rate"], "rate")
            if not 0 < rate < FX_RATE_BELOW:
                raise BadInput(f"The rate {rate:f} must be above zero and below {FX_RATE_BELOW:f}.")
            latest.advance(f"{currency}/{quote}", at)
            rates.append(FxRate(currency, quote, at, rate))
    return rates


def _currency(text: str) -> str:
    if not _CURRENCY.fullmatch(text.upper()):
        raise BadInput(f"{_shown(text)} isn't a currency; use its three letters, such as USD.")
    return text.upper()


@dataclass(frozen=True, slots=True)
class _Columns:
    """What a header may hold: the names that must be there, and those that may."""

    required: tuple[str, ...]
    one_of: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def check(self, names: list[str]) -> None:
        known = {*self.required, *self.one_of, *self.optional, *_IGNORED}
        for name in names:
            if name not in known:
                raise BadInput(f"The column {_shown(name)} is unknown; {self._needed()}.")
            if names.count(name) > 1:
                raise BadInput(f"The column {name} is there twice; {self._needed()}.")
        lacking = [name for name in self.required if name not in names]
        if lacking:
            raise BadInput(f"There is no column {lacking[0]}; {self._needed()}.")
        if self.one_of and sum(name in names for name in self.one_of) != 1:
            raise BadInput(f"It needs one of {' and '.join(self.one_of)}; {self._needed()}.")

    def _needed(self) -> str:
        either = [" or ".join(self.one_of)] if self.one_of else []
        return f"a header is {','.join([*self.required[:1], *either, *self.required[1:]])}" + (
            f" and may have {','.join(self.optional)}" if self.optional else ""
        )


_BAR_COLUMNS = _Columns(("symbol", *_PRICES), ("date", "timestamp"), ("volume",))
_SPLIT_COLUMNS = _Columns(("symbol", "ex_date", "numerator", "denominator"))
_RATE_COLUMNS = _Columns(("currency", "quote_currency", "at", "rate"))
_ALIASES = {"ticker": "symbol"}
_IGNORED = ("adj close", "adj_close")


class _Source:
    """A CSV file that is being read, and the line it is at, for messages."""

    def __init__(self, path: Path | str) -> None:
        self._path = Path(path)
        self.line = 0

    @contextmanager
    def blame(self) -> Iterator[None]:
        """Turn whatever is wrong inside into one sentence that names the file and the line."""
        try:
            yield
        except BadInput as error:
            raise self._refusal(str(error)) from error
        except csv.Error as error:
            raise self._refusal(f"its quotes or line ends are broken ({error})") from error
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            broken = "the gzip data breaks off after this line; fetch the file again"
            raise self._refusal(broken if self.line else "it isn't a gzip file") from error
        except OSError as error:
            raise self._refusal(f"it can't be read ({error.strerror or error})") from error

    def rows(self, columns: _Columns) -> Iterator[Mapping[str, str]]:
        """Yield the cells of each row by column name, after checking header and shape."""
        # One reader a line, so that a quote left open is an error of its own line and not of the
        # file's last one. A row can't span lines then, which no row of figures needs to.
        parsed = (next(csv.reader([line], strict=True), []) for line in self._lines())
        rows = (row for row in parsed if row)
        names = [_name(cell) for cell in next(rows, [])]
        if not names:
            raise BadInput("The file is empty; it needs a header and at least one row.")
        columns.check(names)
        count = 0
        for count, row in enumerate(rows, 1):
            if count > IMPORT_ROWS_MAX:
                raise BadInput(
                    f"The file has more than {IMPORT_ROWS_MAX} rows; cut it into several."
                )
            yield _cells(names, row, columns)
        if not count:
            raise BadInput("The file has a header and no rows; add at least one.")

    def _lines(self) -> Iterator[str]:
        # Line by line from bytes: a decoder over the whole file couldn't say where it failed.
        with self._open() as file:
            while raw := file.readline(LINE_BYTES_MAX + 1):
                self.line += 1
                if len(raw) > LINE_BYTES_MAX:
                    raise BadInput(f"The line is longer than {LINE_BYTES_MAX} bytes.")
                try:
                    # Spreadsheets put a byte order mark first, which utf-8-sig takes away.
                    yield raw.decode("utf-8-sig" if self.line == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise BadInput("The text isn't UTF-8; save the file as UTF-8.") from error

    def _open(self) -> BinaryIO:
        if self._path.suffix.lower() == ".gz":
            return cast(BinaryIO, gzip.open(self._path, "rb"))
        return self._path.open("rb")

    def _refusal(self, what: str) -> BadInput:
        where = f"{self._path.name}, line {self.line}" if self.line else self._path.name
        # It goes into the middle of a sentence; a symbol that it begins with stays as it is.
        what = what if what[:2].isupper() else what[:1].lower() + what[1:]
        return BadInput(f"{where}: {what.removesuffix('.')}; nothing was imported.")


class _Latest(Generic[Order]):
    """The latest time of each symbol so far, which every next row must be after."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._seen: dict[str, tuple[Order, int]] = {}

    def of(self, symbol: str) -> Order | None:
        seen = self._seen.get(symbol)
        return seen[0] if seen else None

    def advance(self, symbol: str, time: Order) -> None:
        seen = self._seen.get(symbol)
        if seen and time == seen[0]:
            raise BadInput(f"{symbol} at {time} was on line {seen[1]} already; keep one of them.")
        if seen and time < seen[0]:
            raise BadInput(
                f"{symbol} at {time} comes after {seen[0]} on line {seen[1]}; sort each symbol's "
                "rows by time."
            )
        self._seen[symbol] = (time, self._source.line)


def _name(cell: str) -> str:
    name = cell.strip().lower()
    return _ALIASES.get(name, name)


def _cells(names: list[str], row: list[str], columns: _Columns) -> dict[str, str]:
    if len(row) != len(names):
        raise BadInput(f"The header has {len(names)} columns and this line {len(row)}.")
    cells = {name: cell.strip() for name, cell in zip(names, row, strict=True)}
    for name in (*columns.required, *columns.one_of):
        if cells.get(name) == "":
            raise BadInput(f"The field {name} is empty.")
    return cells


def _span(
    cells: Mapping[str, str], calendar: str, previous_end: datetime | None, *, flat: bool
) -> tuple[datetime, datetime]:
    """When a row's bar begins and ends; see ``read_bars``."""
    text = cells.get("timestamp", "")
    if not text or _DAY.fullmatch(text):
        session = _session(calendar, _day(text or cells["date"], "date"))
        return session.open_at, session.close_at
    end = parse_time(text, "timestamp")
    if flat:
        return end, end
    session_of_end = session_at(calendar, end)
    bounds = [session_of_end.open_at] if session_of_end else []
    # A bar that runs backwards is for _Latest to refuse: it knows the line of the one before.
    bounds += [previous_end] if previous_end and previous_end < end else []
    return max(bounds, default=end), end


def _session(calendar: str, day: date) -> Session:
    session = session_on(calendar, day)
    if session is None:
        raise BadInput(f"{day} isn't a session of {calendar}; the exchange was closed.")
    return session


def _day(text: str, what: str) -> date:
    # fromisoformat alone would take 20240131 and 2024-W05-3 as well.
    if _DAY.fullmatch(text):
        try:
            return date.fromisoformat(text)
        except ValueError:
            pass
    hint = "; a moment goes into a column timestamp" if what == "date" else ""
    raise BadInput(f"The {what} {_shown(text)} isn't a day such as 2024-01-31{hint}.")


def _prices(
    cells: Mapping[str, str], negative_allowed: bool
) -> tuple[Decimal, Decimal, Decimal, Decimal]:
    opened, high, low, close = (_price(cells[name], name, negative_allowed) for name in _PRICES)
    if high < low:
        raise BadInput(f"The high {high:f} is below the low {low:f}.")
    for name, price in (("open", opened), ("close", close)):
        if not low <= price <= high:
            raise BadInput(
                f"The {name} {price:f} isn't between the low {low:f} and the high {high:f}."
            )
    return opened, high, low, close


def _price(text: str, what: str, negative_allowed: bool) -> Decimal:
    price = parse_decimal(text, what)
    if price <= 0 and not negative_allowed:
        raise BadInput(f"The {what} {_shown(text)} must be above zero.")
    return price


def _volume(text: str) -> Decimal | None:
    if not text:
        return None
    volume = parse_decimal(text, "volume")
    if volume < 0:
        raise BadInput(f"The volume {_shown(text)} must not be below zero.")
    return volume


def _ratio(cells: Mapping[str, str]) -> tuple[Decimal, Decimal]:
    sides = [parse_decimal(cells[name], name) for name in ("numerator", "denominator")]
    for name, side in zip(("numerator", "denominator"), sides, strict=True):
        if not 0 < side < RATIO_BELOW:
            raise BadInput(f"The {name} {side:f} must be above zero and below {RATIO_BELOW:f}.")
    if sides[0] == sides[1]:
        raise BadInput(f"The split of {sides[0]:f} for {sides[1]:f} changes nothing; leave it out.")
    return sides[0], sides[1]


def _shown(text: str) -> str:
    """A value of the user's for a message: quoted, and short even if the value isn't."""
    return repr(text if len(text) <= 40 else text[:40] + "…")
