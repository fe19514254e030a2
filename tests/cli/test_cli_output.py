"""How values, tables and documents look, on a terminal and in a pipe."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from cli import output
from cli.output import Column

D = Decimal
IDS = (UUID("11111111-1111-4111-8111-111111111111"), UUID("11111111-1111-4222-8111-111111111111"))
COLUMNS = (
    Column("ID", "id"),
    Column("NAME", "name"),
    Column("AMOUNT", "amount", output.money, right=True),
    Column("NOTE", lambda row: "a note", spare=1),
    Column("MORE", lambda row: "x" * 20, spare=2),
)
ROWS = [
    SimpleNamespace(id=id_, name=name, amount=D(amount))
    for id_, name, amount in zip(IDS, ("RUNNING", None), ("1234.567", "-3"), strict=True)
]


@pytest.mark.parametrize(
    ("value", "plain", "money", "price", "number"),
    [
        ("1234.5600", "1234.56", "1,234.56", "1,234.56", "1,234.56"),
        ("250000", "250000", "250,000.00", "250,000.00", "250,000"),
        ("1E+3", "1000", "1,000.00", "1,000.00", "1,000"),
        ("0.00", "0", "0.00", "0.00", "0"),
        ("-0", "0", "0.00", "0.00", "0"),
        ("-0.004", "-0.004", "0.00", "-0.004", "-0.004"),
        ("-0.5", "-0.5", "-0.50", "-0.50", "-0.5"),
        ("-1234.5", "-1234.5", "-1,234.50", "-1,234.50", "-1,234.5"),
        ("25.9392494092", "25.9392494092", "25.94", "25.9392", "25.9392494092"),
        ("123456789012345678901234567890.12345678", "123456789012345678901234567890.12345678",
         "123,456,789,012,345,678,901,234,567,890.12",
         "123,456,789,012,345,678,901,234,567,890.1235",
         "123,456,789,012,345,678,901,234,567,890.12345678"),
    ],
)  # fmt: skip
def test_numbers(value: str, plain: str, money: str, price: str, number: str) -> None:
    given = D(value)

    assert output.plain(given) == plain
    assert output.money(given) == money
    assert output.price(given) == price
    assert output.number(given) == number


def test_what_is_not_there_is_a_dash() -> None:
    forms: list[Any] = [output.money, output.price, output.number, output.moment, output.day]

    assert [form(None) for form in forms] == ["–"] * 5


def test_moments_are_told_in_utc() -> None:
    india = timezone(timedelta(hours=5, minutes=30))

    assert output.moment(datetime(2024, 1, 31, 21, 30, tzinfo=india)) == "2024-01-31 16:00"
    assert output.moment(datetime(2024, 1, 31, 21, 0, 5, tzinfo=UTC)) == "2024-01-31 21:00:05"
    assert output.utc(datetime(2024, 1, 31, 21, tzinfo=UTC)) == "2024-01-31 21:00 UTC"
    assert output.utc(None) is None
    assert output.day(date(2024, 1, 31)) == "2024-01-31"


def test_things_are_counted() -> None:
    assert output.count(1, "tick") == "1 tick"
    assert output.count(3270, "tick") == "3,270 ticks"
    assert output.count(2, "entry", "entries") == "2 entries"


def test_json_has_decimals_as_strings_and_moments_in_utc(
    capsys: pytest.CaptureFixture[str],
) -> None:
    india = timezone(timedelta(hours=5, minutes=30))
    output.print_json(
        {
            "cash": D("10.50"),
            "at": datetime(2024, 1, 31, 21, 30, tzinfo=india),
            "on": date(2024, 1, 31),
            "id": IDS[0],
            "path": Path("/a/b"),
            "columns": (1, None, True, "é"),
            "column": Column("T", "of"),
        }
    )
    printed = capsys.readouterr().out

    assert "é" in printed
    found = json.loads(printed)
    assert found.pop("column")["title"] == "T"
    assert found == {
        "cash": "10.5",
        "at": "2024-01-31T16:00:00Z",
        "on": "2024-01-31",
        "id": str(IDS[0]),
        "path": "/a/b",
        "columns": [1, None, True, "é"],
    }


def test_a_table_in_a_pipe_is_whole_and_plain(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(COLUMNS, ROWS, empty="nothing")

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "\x1b" not in "".join(lines)
    assert [line.split()[0] for line in lines] == ["ID", *map(str, IDS)]
    assert lines[1].split()[1:3] == ["RUNNING", "1,234.57"]
    assert lines[2].split()[1:3] == ["–", "-3.00"]
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(
    ("width", "id_", "titles"),
    [
        (120, str(IDS[0]), ["ID", "NAME", "AMOUNT", "NOTE", "MORE"]),
        (76, "11111111-1111-41", ["ID", "NAME", "AMOUNT", "NOTE", "MORE"]),
        (50, "11111111-1111-41", ["ID", "NAME", "AMOUNT", "NOTE"]),
        (36, "11111111-1111-41", ["ID", "NAME", "AMOUNT"]),
        (10, "11111111-1111-41", ["ID", "NAME", "AMOUNT"]),
    ],
)
def test_a_narrow_terminal_gets_what_fits(
    width: int,
    id_: str,
    titles: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(output, "is_terminal", lambda stream=None: True)
    monkeypatch.setattr(output, "_terminal_width", lambda: width)

    output.print_table(COLUMNS, ROWS, empty="nothing")

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == titles
    assert lines[1].split()[0].startswith(id_[:15])
    assert len(lines[1].split()[0]) == (36 if width == 120 else 16)
    assert len(lines) == 3


def test_a_column_that_wraps_is_broken_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = (Column("A", "name"), Column("WORDS", lambda row: "word " * 20, wraps=True))
    output.print_table(columns, ROWS, empty="")
    assert len(capsys.readouterr().out.splitlines()) == 3

    monkeypatch.setattr(output, "is_terminal", lambda stream=None: True)
    monkeypatch.setattr(output, "_terminal_width", lambda: 60)
    output.print_table(columns, ROWS, empty="")

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3
    assert all(len(line) <= 60 for line in lines)


def test_an_empty_table_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(COLUMNS, [], empty="Nothing yet; do this.")

    assert capsys.readouterr().out == "Nothing yet; do this.\n"


def test_facts_leave_out_what_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_facts({"Run": "1", "Last error": None, "Status": "RUNNING"})

    assert capsys.readouterr().out == "Run     1\nStatus  RUNNING\n"


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert not output.uses_colour()

    monkeypatch.setattr(output, "is_terminal", lambda stream=None: True)
    assert output.uses_colour()

    monkeypatch.setenv("NO_COLOR", "1")
    assert not output.uses_colour()


def test_facts_and_titles_have_style_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(output, "is_terminal", lambda stream=None: True)

    output.print_facts({"Status": "RUNNING"})
    output.say("Next", style="bold")
    output.note("beside the point")
    output.print_error("wrong.")

    printed = capsys.readouterr()
    assert "RUNNING" in printed.out
    assert "Next" in printed.out
    assert printed.err == "beside the point\n\x1b[1;31mError:\x1b[0m wrong.\n"


def test_bars_are_drawn_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with output.progress() as move:
        move("quiet", 1, 2)
    assert capsys.readouterr().err == ""

    monkeypatch.setattr(output, "is_terminal", lambda stream=None: True)
    with output.progress() as move:
        move("first", 1, 2)
        move("first", 2, 2)
    printed = capsys.readouterr()
    assert "2/2 ticks" in printed.err
    assert printed.out == ""
