"""What comes in from outside: taken exactly as it is, or refused in one sentence."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, localcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import BadInput
from engine.market import imports
from engine.market.calendar import sessions
from engine.market.imports import (
    LINE_BYTES_MAX,
    parse_decimal,
    parse_price,
    parse_prices,
    parse_symbol,
    parse_time,
    read_bars,
    read_splits,
)
from engine.market.model import Bar, Split

HEADER = "symbol,date,open,high,low,close,volume"
ROW = "AAPL,2000-03-01,118.56,132.06,118.5,130.31,9616100"
NEXT = "AAPL,2000-03-02,127.0,127.94,120.69,122.0,2779100"
STAMPED = "symbol,timestamp,open,high,low,close,volume"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_lines(*lines: str, name: str = "file.csv") -> Path:
        path = tmp_path / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write_lines


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def read(path: Path, negative: tuple[str, ...] = ()) -> list[Bar]:
    return read_bars(path, calendar="XNYS", negative_symbols=negative)


def refusal(path: Path) -> str:
    with pytest.raises(BadInput) as refused:
        read(path)
    return str(refused.value)


# Numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("187.5", "187.5"),
        ("187.50", "187.50"),
        ("+3", "3"),
        ("-3.25", "-3.25"),
        ("0", "0"),
        ("-0.0", "0.0"),
        (".5", "0.5"),
        ("5.", "5"),
        ("0.00000001", "0.00000001"),
        ("0.0000000100", "0.00000001"),
        ("1.2e3", "1200"),
        ("1.25e+1", "12.5"),
        ("1e-8", "0.00000001"),
        ("999999999999999.99999999", "999999999999999.99999999"),
        ("0" * 50 + "7", "7"),
    ],
)
def test_a_number_is_taken_exactly(text: str, value: str) -> None:
    assert f"{parse_decimal(text):f}" == value


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "abc", "NaN", "nan", "sNaN", "inf", "-Infinity", "1,5", "1_000", "0x1f", "1 2"),
        *("１２", "$5", "--5", "5-", "e5", "1e", ".", "1e9999999999", " 5", "5\n", "٣"),
    ],
)
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"isn't a number; write it as 187\.5\."):
        parse_decimal(text)


@pytest.mark.parametrize("text", ["1e15", "-1e15", "1000000000000000", "1e999999999", "9" * 5000])
def test_a_huge_number_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is too large; it must be below 1e15") as refused:
        parse_decimal(text)
    assert len(str(refused.value)) < 120


@pytest.mark.parametrize("text", ["0.000000001", "1.123456789", "1e-9", "1e-999999999"])
def test_too_many_decimals_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="has more than 8 decimals; round it first"):
        parse_decimal(text)


def test_a_number_does_not_depend_on_the_decimal_context() -> None:
    with localcontext() as context:
        context.prec = 3
        assert str(parse_decimal("123456.789")) == "123456.789"


@given(st.decimals(-(10**15) + 1, 10**15 - 1, allow_nan=False, places=8))
def test_any_number_with_eight_decimals_comes_through(value: Decimal) -> None:
    assert parse_decimal(f"{value:f}") == value


# Symbols and prices of the command line


@pytest.mark.parametrize(
    ("text", "symbol"), [("aapl", "AAPL"), (" BRK.B ", "BRK.B"), ("eurusd=x", "EURUSD=X")]
)
def test_a_symbol_is_in_upper_case(text: str, symbol: str) -> None:
    assert parse_symbol(text) == symbol


@pytest.mark.parametrize(
    "text", ["", " ", ".A", "A\tB", "A;B", "É", "A" * 33, "A" * 10_000, "A\nB"]
)
def test_what_is_no_symbol_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="isn't a symbol; use up to 32") as refused:
        parse_symbol(text)
    assert len(str(refused.value)) < 200


def test_the_longest_symbol_is_taken() -> None:
    assert parse_symbol("A" * 32) == "A" * 32


@pytest.mark.parametrize(
    ("text", "symbol", "price"),
    [
        ("AAPL=187.5", "AAPL", "187.5"),
        ("aapl = 187.50", "AAPL", "187.50"),
        ("EURUSD=X=1.08", "EURUSD=X", "1.08"),
    ],
)
def test_a_price_is_a_symbol_and_a_number(text: str, symbol: str, price: str) -> None:
    parsed = parse_price(text)
    assert (parsed[0], str(parsed[1])) == (symbol, price)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("AAPL", "'AAPL' isn't a price; write it as AAPL=187.5."),
        ("", "'' isn't a price; write it as AAPL=187.5."),
        ("AAPL=", "The price of AAPL '' isn't a number; write it as 187.5."),
        ("AAPL=NaN", "The price of AAPL 'NaN' isn't a number; write it as 187.5."),
        ("AAPL=0", "The price of AAPL '0' must be above zero."),
        ("AAPL=-1", "The price of AAPL '-1' must be above zero."),
        ("AAPL=1e15", "The price of AAPL '1e15' is too large; it must be below 1e15."),
    ],
)
def test_what_is_no_price_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput) as refused:
        parse_price(text)
    assert str(refused.value) == message


def test_a_price_without_a_symbol_is_refused() -> None:
    with pytest.raises(BadInput, match="'' isn't a symbol"):
        parse_price("=5")


@pytest.mark.parametrize("text", ["cl=-37.63", "CL=0"])
def test_a_negative_price_is_for_the_symbols_that_allow_it(text: str) -> None:
    assert parse_price(text, {"CL"})[0] == "CL"
    with pytest.raises(BadInput, match="must be above zero"):
        parse_price(text, {"SPREAD"})


def test_prices_are_by_symbol() -> None:
    prices = parse_prices(["aapl=1", "MSFT=2"])
    assert prices == {"AAPL": Decimal(1), "MSFT": Decimal(2)}
    assert parse_prices([]) == {}
    assert parse_prices(["CL=-1"], {"CL"}) == {"CL": Decimal(-1)}


@pytest.mark.parametrize("second", ["aapl=187.5", "AAPL=188"])
def test_a_symbol_has_one_price(second: str) -> None:
    with pytest.raises(BadInput, match=r"^AAPL has two prices, 187.5 and .*; give one\.$"):
        parse_prices(["AAPL=187.5", second])


# Times


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2024-01-31T16:00:00Z", "2024-01-31T16:00:00"),
        ("2024-01-31T16:00:00+00:00", "2024-01-31T16:00:00"),
        (" 2024-01-31 16:00:00+05:30 ", "2024-01-31T10:30:00"),
        ("2024-01-31T16:00-05:00", "2024-01-31T21:00:00"),
        ("2024-01-31T16:00:00.123456Z", "2024-01-31T16:00:00.123456"),
        ("2024-12-31T23:00-05:00", "2025-01-01T04:00:00"),
    ],
)
def test_a_time_becomes_utc(text: str, moment: str) -> None:
    parsed = parse_time(text)
    assert parsed == utc(moment)
    assert parsed.tzinfo is UTC


def test_a_naive_time_is_refused_with_the_way_to_write_it() -> None:
    with pytest.raises(BadInput) as refused:
        parse_time("2024-01-31 16:00")
    assert str(refused.value) == (
        "The time '2024-01-31 16:00' has no timezone; write 2024-01-31T16:00:00Z for UTC, or end "
        "it with its offset, as in 2024-01-31T16:00:00+05:30."
    )
    parse_time("2024-01-31T16:00:00Z")
    parse_time("2024-01-31T16:00:00+05:30")


@pytest.mark.parametrize(
    "text",
    [
        *("", "now", "yesterday", "2024-02-30T10:00:00Z", "2024-01-31T25:00:00Z", "1706716800"),
        *("31/01/2024 10:00", "2024-01-31T16:00:00 Europe/Berlin", "0001-01-01T00:00:00+05:00"),
        *("9999-12-31T23:00:00-05:00", "x" * 5000),
    ],
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="isn't a date and time; write it as") as refused:
        parse_time(text)
    assert len(str(refused.value)) < 200


def test_a_day_is_no_time() -> None:
    with pytest.raises(BadInput, match="has no timezone; write 2024-01-31T00:00:00Z"):
        parse_time("2024-01-31")


# Bars


def test_a_row_with_a_date_is_its_session(write: Write) -> None:
    assert read(write(HEADER, ROW, NEXT)) == [
        Bar(
            "AAPL",
            utc("2000-03-01T14:30"),
            utc("2000-03-01T21:00"),
            Decimal("118.56"),
            Decimal("132.06"),
            Decimal("118.5"),
            Decimal("130.31"),
            Decimal("9616100"),
        ),
        Bar(
            "AAPL",
            utc("2000-03-02T14:30"),
            utc("2000-03-02T21:00"),
            Decimal("127.0"),
            Decimal("127.94"),
            Decimal("120.69"),
            Decimal("122.0"),
            Decimal("2779100"),
        ),
    ]


def test_a_session_is_that_of_the_calendar(write: Write) -> None:
    path = write(HEADER, "INFY,2024-01-29,1,2,1,2,5", "INFY,2024-01-30,1,2,1,2,5")
    for code in ("XNSE", "nse"):
        bars = read_bars(path, calendar=code)
        assert bars[0].start == utc("2024-01-29T03:45")
        assert bars[1].end == utc("2024-01-30T10:00")
    with pytest.raises(BadInput, match="There is no exchange calendar 'XX'"):
        read_bars(path, calendar="XX")


def test_header_names_are_taken_in_any_case_and_order(write: Write) -> None:
    path = write(
        " Volume ,Close,LOW,High,Open,Adj Close,Date,Ticker",
        "",
        "9616100,130.31,118.5,132.06,118.56,4.18,2000-03-01, aapl ",
        "",
    )
    assert read(path) == read(write(HEADER, ROW, name="same.csv"))


def test_a_volume_may_be_unknown(write: Write) -> None:
    without = write("symbol,date,open,high,low,close", "AAPL,2000-03-01,1,2,1,2", name="a.csv")
    empty = write(HEADER, "AAPL,2000-03-01,1,2,1,2,", name="b.csv")
    zero = write(HEADER, "AAPL,2000-03-01,1,2,1,2,0", name="c.csv")
    assert [bar.volume for bar in read(without) + read(empty) + read(zero)] == [None, None, 0]


def test_prices_may_be_equal_or_at_the_edges(write: Write) -> None:
    bars = read(
        write(HEADER, "A,2000-03-01,1,1,1,1,5", "A,2000-03-02,1,2,1,2,5", "A,2000-03-03,2,2,1,1,5")
    )
    assert [bar.open for bar in bars] == [1, 1, 2]
    assert [bar.close for bar in bars] == [1, 2, 1]


def test_zero_and_negative_prices_are_for_the_symbols_that_allow_them(write: Write) -> None:
    path = write(HEADER, "CL,2020-04-20,17.73,17.85,-40.32,-37.63,5", "CL,2020-04-21,0,1,0,1,5")
    assert [bar.low for bar in read(path, ("CL",))] == [Decimal("-40.32"), 0]
    assert refusal(path) == (
        "file.csv, line 2: the low '-40.32' must be above zero; nothing was imported."
    )


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [True, False])
def test_line_ends_and_a_byte_order_mark_do_not_matter(
    tmp_path: Path, newline: str, mark: bytes, end: bool
) -> None:
    path = tmp_path / "file.csv"
    path.write_bytes(mark + (newline.join([HEADER, ROW]) + newline * end).encode())
    assert [bar.symbol for bar in read(path)] == ["AAPL"]


def test_a_packed_file_is_read_as_well(tmp_path: Path, write: Write) -> None:
    path = tmp_path / "file.csv.GZ"
    path.write_bytes(gzip.compress(f"{HEADER}\n{ROW}\n".encode()))
    assert read(path) == read(write(HEADER, ROW))
    assert read_bars(str(path), calendar="XNYS") == read(path)


def test_rows_of_symbols_may_be_mixed(write: Write) -> None:
    other = ROW.replace("AAPL", "IBM")
    bars = read(write(HEADER, ROW, other, NEXT))
    assert [bar.symbol for bar in bars] == ["AAPL", "IBM", "AAPL"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("AAPL,2000-03-02,1,2,1,2", "the header has 7 columns and this line 6"),
        ("AAPL,2000-03-02,1,2,1,2,5,6", "the header has 7 columns and this line 8"),
        (",2000-03-02,1,2,1,2,5", "the field symbol is empty"),
        ("AAPL,,1,2,1,2,5", "the field date is empty"),
        ("AAPL,2000-03-02, ,2,1,2,5", "the field open is empty"),
        ("AAPL,2000-03-02,1,2,1,,5", "the field close is empty"),
        (
            "A;B,2000-03-02,1,2,1,2,5",
            "'A;B' isn't a symbol; use up to 32 letters, digits or any of",
        ),
        ("AAPL,2000-03-02,1,2,1,abc,5", "the close 'abc' isn't a number; write it as 187.5"),
        ("AAPL,2000-03-02,NaN,2,1,2,5", "the open 'NaN' isn't a number; write it as 187.5"),
        ("AAPL,2000-03-02,1,inf,1,2,5", "the high 'inf' isn't a number; write it as 187.5"),
        ("AAPL,2000-03-02,1,2,-1,2,5", "the low '-1' must be above zero"),
        ("AAPL,2000-03-02,0,2,0,2,5", "the open '0' must be above zero"),
        ("AAPL,2000-03-02,1,1e15,1,2,5", "the high '1e15' is too large; it must be below 1e15"),
        (
            "AAPL,2000-03-02,1,2,1,1.123456789,5",
            "the close '1.123456789' has more than 8 decimals; round it first",
        ),
        ("AAPL,2000-03-02,1,1,2,1,5", "the high 1 is below the low 2"),
        ("AAPL,2000-03-02,0.99,2,1,2,5", "the open 0.99 isn't between the low 1 and the high 2"),
        ("AAPL,2000-03-02,1,2,1,2.01,5", "the close 2.01 isn't between the low 1 and the high 2"),
        ("AAPL,2000-03-02,1,2,1,2,-5", "the volume '-5' must not be below zero"),
        ("AAPL,2000-03-02,1,2,1,2,many", "the volume 'many' isn't a number; write it as 187.5"),
        (ROW, "AAPL at 2000-03-01 21:00:00+00:00 was on line 2 already; keep one of them"),
        (
            "AAPL,2000-02-29,1,2,1,2,5",
            "AAPL at 2000-02-29 21:00:00+00:00 comes after 2000-03-01 21:00:00+00:00 on line 2; "
            "sort each symbol's rows by time",
        ),
        (
            "AAPL,2000-03-04,1,2,1,2,5",
            "2000-03-04 isn't a session of XNYS; the exchange was closed",
        ),
        (
            "AAPL,2001-09-12,1,2,1,2,5",
            "2001-09-12 isn't a session of XNYS; the exchange was closed",
        ),
        (
            "AAPL,1950-03-02,1,2,1,2,5",
            "the calendar XNYS is known from 1970-01-01 to",
        ),
        (
            "AAPL,2000-02-30,1,2,1,2,5",
            "the date '2000-02-30' isn't a day such as 2024-01-31; a moment goes into a column "
            "timestamp",
        ),
        ("AAPL,20000302,1,2,1,2,5", "the date '20000302' isn't a day such as"),
        ("AAPL,03/02/2000,1,2,1,2,5", "the date '03/02/2000' isn't a day such as"),
        # As some exports write a day: taken for a moment it would be hours before the open.
        ("AAPL,2000-03-02 00:00:00-05:00,1,2,1,2,5", "a moment goes into a column timestamp"),
        ('AAPL,"2000-03-02,1,2,1,2,5', "its quotes or line ends are broken (unexpected end"),
        ('"AAPL"x,2000-03-02,1,2,1,2,5', "its quotes or line ends are broken ("),
        ("AAPL,2000-03-02,1,2,1,2\r,5", "its quotes or line ends are broken ("),
        ("AAPL,2000-03-02,1,2,1,2,5" + " " * LINE_BYTES_MAX, "the line is longer than 10000 bytes"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_imported(write: Write, row: str, message: str) -> None:
    said = refusal(write(HEADER, ROW, row, NEXT))
    assert said.startswith("file.csv, line 3: ")
    assert message in said
    assert said.endswith("; nothing was imported.")
    assert said.count(".csv") == 1
    assert "\n" not in said


def test_the_line_is_the_one_that_an_editor_shows(write: Write) -> None:
    assert refusal(write(HEADER, "", ROW, "", "", ROW)).startswith("file.csv, line 6: AAPL at")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "symbol,date,open,high,low,close,price",
            "the column 'price' is unknown; a header is symbol,",
        ),
        ("symbol;date;open", "the column 'symbol;date;open' is unknown"),
        (ROW, "the column 'aapl' is unknown"),
        ("symbol,,date", "the column '' is unknown"),
        ("symbol,ticker,date,open,high,low,close", "the column symbol is there twice"),
        ("symbol,date,open,high,low,volume", "there is no column close; a header is"),
        ("date,open,high,low,close,volume", "there is no column symbol; a header is"),
        ("symbol,open,high,low,close", "it needs one of date and timestamp; a header is"),
        ("symbol,date,timestamp,open,high,low,close", "it needs one of date and timestamp"),
    ],
)
def test_a_header_that_is_not_understood_is_refused(
    write: Write, header: str, message: str
) -> None:
    said = refusal(write(header, ROW))
    assert said.startswith(f"file.csv, line 1: {message}")
    assert said.endswith(
        "a header is symbol,date or timestamp,open,high,low,close and may have volume; "
        "nothing was imported."
    )


def test_an_empty_file_is_refused(write: Write) -> None:
    wanted = "the file is empty; it needs a header and at least one row; nothing was imported."
    assert refusal(write(name="empty.csv")) == f"empty.csv: {wanted}"
    assert refusal(write("", "", name="blank.csv")) == f"blank.csv, line 2: {wanted}"
    assert refusal(write(HEADER)) == (
        "file.csv, line 1: the file has a header and no rows; add at least one; "
        "nothing was imported."
    )


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    path.write_bytes(f"{HEADER}\n{ROW}\n".encode() + b"SOCI\xc9T\xc9,2000-03-02,1,2,1,2,5\n")
    assert refusal(path) == (
        "file.csv, line 3: the text isn't UTF-8; save the file as UTF-8; nothing was imported."
    )


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.csv") == (
        "no.csv: it can't be read (No such file or directory); nothing was imported."
    )
    assert refusal(tmp_path / "no.csv.gz").startswith("no.csv.gz: it can't be read (No such file")
    assert "can't be read (Is a directory)" in refusal(tmp_path)


def test_an_error_without_words_of_its_own_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, mode: str) -> None:
        raise OSError("the disk went away")

    monkeypatch.setattr(Path, "open", fail)
    assert "it can't be read (the disk went away)" in refusal(tmp_path / "file.csv")


def test_a_broken_packed_file_is_refused(tmp_path: Path, write: Write) -> None:
    plain = write(HEADER, ROW, name="plain.csv.gz")
    assert refusal(plain) == "plain.csv.gz: it isn't a gzip file; nothing was imported."
    rows = "".join(
        f"S{number},2000-03-01,1,2,1,2,{zlib.crc32(bytes([number % 256]))}\n"
        for number in range(9000)
    )
    packed = gzip.compress(f"{HEADER}\n{rows}".encode())
    short = tmp_path / "short.csv.gz"
    short.write_bytes(packed[: len(packed) // 2])
    said = refusal(short)
    assert said.startswith("short.csv.gz, line ")
    assert "the gzip data breaks off after this line; fetch the file again" in said
    spoilt = tmp_path / "spoilt.csv.gz"
    half = len(packed) // 2
    spoilt.write_bytes(packed[:half] + b"\xff" * 40 + packed[half + 40 :])
    # What the spoilt part unpacks to may fail as text before the checksum does.
    assert refusal(spoilt).startswith("spoilt.csv.gz, line ")


def test_a_file_has_a_limit_of_rows(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(HEADER, ROW, NEXT)
    monkeypatch.setattr(imports, "IMPORT_ROWS_MAX", 2)
    assert len(read(path)) == 2
    monkeypatch.setattr(imports, "IMPORT_ROWS_MAX", 1)
    assert refusal(path).startswith(
        "file.csv, line 3: the file has more than 1 rows; cut it into several; nothing"
    )


# Bars with a timestamp


def stamped(write: Write, *rows: str) -> list[tuple[datetime, datetime]]:
    return [(bar.start, bar.end) for bar in read(write(STAMPED, *rows))]


def test_a_timestamp_ends_a_bar_that_began_at_the_open_or_the_bar_before(write: Write) -> None:
    # Minutes around two opens, in New York's winter and summer time.
    assert stamped(
        write,
        "A,2024-03-08T15:59:00-05:00,1,2,1,2,5",
        "A,2024-03-08T16:00:00-05:00,1,2,1,2,5",
        "A,2024-03-11T09:31:00-04:00,1,2,1,2,5",
        "A,2024-03-11T13:32:00Z,1,2,1,2,5",
    ) == [
        (utc("2024-03-08T14:30"), utc("2024-03-08T20:59")),
        (utc("2024-03-08T20:59"), utc("2024-03-08T21:00")),
        (utc("2024-03-11T13:30"), utc("2024-03-11T13:31")),
        (utc("2024-03-11T13:31"), utc("2024-03-11T13:32")),
    ]


def test_a_bar_outside_of_sessions_began_with_the_bar_before(write: Write) -> None:
    assert stamped(
        write,
        "A,2024-03-08T22:00:00Z,1,2,1,2,5",
        "B,2024-03-08T22:30:00Z,1,2,1,2,5",
        "A,2024-03-08T23:00:00Z,1,2,1,2,5",
    ) == [
        (utc("2024-03-08T22:00"), utc("2024-03-08T22:00")),
        (utc("2024-03-08T22:30"), utc("2024-03-08T22:30")),
        (utc("2024-03-08T22:00"), utc("2024-03-08T23:00")),
    ]


def test_four_equal_prices_are_one_price_at_one_moment(write: Write) -> None:
    path = write(STAMPED, "A,2024-03-08T15:59:00-05:00,1.0,1,1.00,1,5")
    (bar,) = read(path)
    assert bar == Bar.of_price("A", Decimal(1), utc("2024-03-08T20:59"), Decimal(5))


def test_a_day_in_the_column_timestamp_is_its_session(write: Write) -> None:
    assert stamped(write, "A,2024-03-08,1,1,1,1,5") == [
        (utc("2024-03-08T14:30"), utc("2024-03-08T21:00"))
    ]


@pytest.mark.parametrize(
    ("stamp", "message"),
    [
        ("2024-03-08T15:00:00", "the timestamp '2024-03-08T15:00:00' has no timezone; write"),
        ("2024-03-08T25:00:00Z", "the timestamp '2024-03-08T25:00:00Z' isn't a date and time"),
        ("1709908200", "the timestamp '1709908200' isn't a date and time"),
        ("", "the field timestamp is empty"),
        # The same moment as line 2, and one before it, in other timezones.
        ("2024-03-08T20:30:00+05:30", "A at 2024-03-08 15:00:00+00:00 was on line 2 already"),
        ("2024-03-08T15:30:00+05:30", "A at 2024-03-08 10:00:00+00:00 comes after"),
    ],
)
def test_a_bad_timestamp_is_refused(write: Write, stamp: str, message: str) -> None:
    said = refusal(write(STAMPED, "A,2024-03-08T15:00:00Z,1,2,1,2,5", f"A,{stamp},1,2,1,2,5"))
    assert said.startswith(f"file.csv, line 3: {message}")
    assert said.endswith("; nothing was imported.")


# Splits

SPLITS = "symbol,ex_date,numerator,denominator"


def test_splits_are_read(write: Write) -> None:
    path = write("Ticker,Ex_Date,Numerator,Denominator", "aapl,2000-06-21,2,1", "C,2011-05-09,1,10")
    assert read_splits(path, calendar="nyse") == [
        Split("AAPL", date(2000, 6, 21), Decimal(2), Decimal(1)),
        Split("C", date(2011, 5, 9), Decimal(1), Decimal(10)),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("A,2000-06-22,2", "the header has 4 columns and this line 3"),
        ("A,2000-06-22,,1", "the field numerator is empty"),
        ("A,2000-06-22,x,1", "the numerator 'x' isn't a number"),
        ("A,2000-06-22,0,1", "the numerator 0 must be above zero and below 1000000"),
        ("A,2000-06-22,2,-1", "the denominator -1 must be above zero and below 1000000"),
        ("A,2000-06-22,1000000,1", "the numerator 1000000 must be above zero and below 1000000"),
        ("A,2000-06-22,2,2.0", "the split of 2 for 2.0 changes nothing; leave it out"),
        ("A,2000-06-21,3,1", "A at 2000-06-21 was on line 2 already; keep one of them"),
        ("A,2000-06-20,2,1", "A at 2000-06-20 comes after 2000-06-21 on line 2; sort"),
        ("A,2000-06-24,2,1", "2000-06-24 isn't a session of XNYS; the exchange was closed"),
        ("A,yesterday,2,1", "the ex_date 'yesterday' isn't a day such as 2024-01-31; nothing"),
    ],
)
def test_a_bad_split_is_named_and_nothing_is_imported(write: Write, row: str, message: str) -> None:
    path = write(SPLITS, "A,2000-06-21,2,1", row)
    with pytest.raises(BadInput) as refused:
        read_splits(path, calendar="XNYS")
    assert str(refused.value).startswith(f"file.csv, line 3: {message}")
    assert str(refused.value).endswith("; nothing was imported.")


def test_a_header_of_bars_is_none_of_splits(write: Write) -> None:
    with pytest.raises(
        BadInput, match="'date' is unknown; a header is symbol,ex_date,numerator,den"
    ):
        read_splits(write(HEADER, ROW), calendar="XNYS")


# Properties


def figures() -> st.SearchStrategy[Decimal]:
    return st.decimals("0.00000001", "99999999999999", allow_nan=False, places=8)


@st.composite
def bars_of_sessions(draw: st.DrawFn) -> list[Bar]:
    book = sessions("XNYS", date(2001, 8, 1), date(2001, 12, 31))
    bars = []
    for symbol in draw(
        st.lists(
            st.from_regex(r"[A-Z0-9][A-Z0-9._=^/-]{0,8}", fullmatch=True), unique=True, max_size=3
        )
    ):
        for session in draw(st.lists(st.sampled_from(book), unique=True, min_size=1, max_size=5)):
            low, first, second, high = sorted(draw(st.tuples(*[figures()] * 4)))
            prices = (
                (first, high, low, second) if draw(st.booleans()) else (second, high, low, first)
            )
            volume = draw(st.none() | st.integers(0, 10**14).map(Decimal))
            bars.append(Bar(symbol, session.open_at, session.close_at, *prices, volume))
    return sorted(bars, key=lambda bar: bar.end)


def as_csv(bars: list[Bar]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(HEADER.split(","))
    for bar in bars:
        prices = [f"{price:f}" for price in (bar.open, bar.high, bar.low, bar.close)]
        volume = "" if bar.volume is None else f"{bar.volume:f}"
        writer.writerow([bar.symbol, bar.start.date(), *prices, volume])
    return out.getvalue().encode()


@settings(max_examples=40)
@given(bars_of_sessions().filter(bool), st.booleans())
def test_what_is_written_is_read_back(tmp_path: Path, bars: list[Bar], packed: bool) -> None:
    path = tmp_path / ("file.csv.gz" if packed else "file.csv")
    content = as_csv(bars)
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read(path) == bars


@settings(max_examples=150)
@given(st.binary(max_size=200), st.booleans())
def test_whatever_a_file_holds_the_answer_is_bars_or_one_sentence(
    tmp_path: Path, content: bytes, with_header: bool
) -> None:
    path = tmp_path / "file.csv"
    path.write_bytes(HEADER.encode() * with_header + b"\n" + content)
    try:
        bars = read(path)
    except BadInput as refused:
        said = str(refused)
    else:
        assert bars
        return
    assert said.startswith("file.csv")
    assert said.endswith("; nothing was imported.")


@given(st.integers(0, 10**9), st.integers(-14 * 60, 14 * 60))
def test_a_time_means_the_same_moment_in_every_timezone(seconds: int, offset: int) -> None:
    moment = datetime(2000, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    sign, minutes = "-" if offset < 0 else "+", abs(offset)
    local = (moment + timedelta(minutes=offset)).strftime("%Y-%m-%dT%H:%M:%S")
    assert parse_time(f"{local}{sign}{minutes // 60:02}:{minutes % 60:02}") == moment
