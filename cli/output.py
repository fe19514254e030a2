"""What commands print: tables and sentences for people, one JSON document for programs.

On a terminal there are colours (NO_COLOR is respected), and a table that is too wide gives up what
it can do without: ids become their first digits, then the least needed columns go. Into a pipe or
a file everything is written in full, one row a line, without a trace of escape codes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from typing import TYPE_CHECKING, Any, Literal, TextIO
from uuid import UUID

import typer

from cli.errors import BROKEN_PIPE

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = [
    "Column",
    "as_json",
    "count",
    "day",
    "is_terminal",
    "lines",
    "log_to_stderr",
    "moment",
    "money",
    "note",
    "number",
    "price",
    "print_error",
    "print_error_json",
    "print_facts",
    "print_json",
    "print_table",
    "progress",
    "say",
    "short",
    "uses_colour",
    "utc",
]

# As wide as no table is: what isn't read on a terminal isn't cut to one.
PIPE_WIDTH_CHARS = 10_000
SHORT_ID_CHARS = 8
MONEY_DECIMALS = 2
PRICE_DECIMALS_MAX = 4
GAP_CHARS = 2
WRAPPED_CHARS_MIN = 30
NOTHING = "–"
_DIGITS_MAX = 60

_STATUS_STYLES: Mapping[str, str] = {
    "RUNNING": "green",
    "CREATED": "cyan",
    "STOPPING": "yellow",
    "STOPPED": "dim",
    "ERROR": "bold red",
    "FILLED": "green",
    "PARTIALLY_FILLED": "yellow",
    "NEW": "cyan",
    "PENDING": "cyan",
    "REJECTED": "red",
    "CANCELED": "dim",
    "EXPIRED": "dim",
    "ACTIVE": "green",
    "PAUSED": "yellow",
    "BUY": "green",
    "SELL": "magenta",
    "ok": "green",
    "WRONG": "bold red",
}

# --- Values as text -------------------------------------------------------------------------


def plain(value: Decimal) -> str:
    """A number in full and without trailing zeros: ``250000``, ``0.1``."""
    text = f"{value:f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def money(value: Decimal | None) -> str:
    """An amount to the cent: ``1,234.50``."""
    return NOTHING if value is None else f"{_rounded(value, MONEY_DECIMALS):,f}"


def price(value: Decimal | None) -> str:
    """A price a unit, two to four decimals: ``187.50``, ``0.1234``."""
    if value is None:
        return NOTHING
    whole, _, decimals = plain(_rounded(value, PRICE_DECIMALS_MAX)).partition(".")
    return f"{int(whole):,}.{decimals:0<2}" if whole != "-0" else f"-0.{decimals:0<2}"


def number(value: Decimal | None) -> str:
    """A quantity with all of its decimals: ``1,234.567``."""
    if value is None:
        return NOTHING
    sign = "-" if value < 0 else ""
    whole, point, decimals = plain(value.copy_abs()).partition(".")
    return f"{sign}{int(whole):,}{point}{decimals}"


def moment(value: datetime | None) -> str:
    """A moment in UTC, to the minute or to the second that it has: ``2024-01-31 21:00``."""
    if value is None:
        return NOTHING
    at = value.astimezone(UTC)
    return f"{at:%Y-%m-%d %H:%M:%S}" if at.second or at.microsecond else f"{at:%Y-%m-%d %H:%M}"


def utc(value: datetime | None) -> str | None:
    """A moment with its zone, for a sentence; none where there is none."""
    return None if value is None else f"{moment(value)} UTC"


def day(value: date | None) -> str:
    """A day: ``2024-01-31``."""
    return NOTHING if value is None else value.isoformat()


def count(many: int, one: str, several: str | None = None) -> str:
    """A number of things in words: ``1 order``, ``3,270 ticks``."""
    return f"{many:,} {one if many == 1 else several or one + 's'}"


def short(wanted: UUID) -> str:
    """The first digits of an id, as people type it."""
    return str(wanted)[:SHORT_ID_CHARS]


def _rounded(value: Decimal, decimals: int) -> Decimal:
    with localcontext(prec=_DIGITS_MAX):
        rounded = value.quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_EVEN)
        return rounded if rounded else rounded.copy_abs()


# --- JSON -----------------------------------------------------------------------------------


def as_json(value: Any) -> Any:
    """``value`` as JSON knows it: decimals as strings, moments in UTC, dataclasses as objects."""
    match value:
        case Decimal():
            return plain(value)
        case datetime():
            return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
        case date() | time() | UUID() | os.PathLike():
            return str(value)
        case Mapping():
            return {str(key): as_json(item) for key, item in value.items()}
        case list() | tuple():
            return [as_json(item) for item in value]
        case _ if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            return {name: as_json(getattr(value, name)) for name in names}
    return value


def print_json(document: Any, *, line: bool = False) -> None:
    """Print one document; ``line``: on one line, for a stream of them."""
    indent = None if line else 2
    _write(json.dumps(as_json(document), indent=indent, ensure_ascii=False) + "\n")


def print_error_json(document: Any) -> None:
    sys.stderr.write(json.dumps(as_json(document), ensure_ascii=False) + "\n")


# --- The terminal ---------------------------------------------------------------------------


def is_terminal(stream: TextIO | None = None) -> bool:
    """Whether a person is looking, at stdout unless told otherwise."""
    return (stream or sys.stdout).isatty()


def uses_colour() -> bool:
    """Whether stdout takes colours and nobody has asked for none."""
    return is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def say(text: str = "", *, style: str | None = None) -> None:
    """Print lines for people, as they are: long ones aren't broken by us."""
    if style is None or not uses_colour():
        _write(text + "\n")
        return
    from rich.text import Text

    _render(Text(text, style=style))


def note(text: str) -> None:
    """Say something beside the point, on stderr, if a person is looking."""
    if is_terminal(sys.stderr):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def log_to_stderr() -> None:
    """Write what is told from here on to stderr, one JSON object a line."""
    import logging

    from engine.log import LOGGER, JsonLines

    log = logging.StreamHandler(sys.stderr)
    log.setFormatter(JsonLines())
    logging.getLogger(LOGGER).addHandler(log)


def print_error(message: str) -> None:
    """Print an error on stderr as one line."""
    if is_terminal(sys.stderr) and not os.environ.get("NO_COLOR"):
        sys.stderr.write(f"\x1b[1;31mError:\x1b[0m {message}\n")
    else:
        sys.stderr.write(f"Error: {message}\n")


def _console(stream: TextIO, width: int | None = None) -> Console:
    from rich.console import Console

    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def _terminal_width() -> int:
    return shutil.get_terminal_size().columns if is_terminal() else PIPE_WIDTH_CHARS


def _render(what: RenderableType, width: int = PIPE_WIDTH_CHARS) -> None:
    # Drawn wider than any screen, nothing is cut: to break a long row is the terminal's business.
    console = _console(sys.stdout, width)
    with console.capture() as captured:
        console.print(what)
    text = captured.get()
    if not is_terminal():
        text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    _write(text)


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, and would complain of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None


# --- Tables ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its title, and the text of a row's cell.

    ``of`` is the row's attribute or a function of the row. Where the terminal is too narrow, the
    columns with the highest ``spare`` go first; those with 0 stay. A column that ``wraps`` may be
    broken into several lines.
    """

    title: str
    of: str | Callable[[Any], Any]
    form: Callable[[Any], str] | None = None
    right: bool = False
    spare: int = 0
    wraps: bool = False

    def value(self, row: Any) -> Any:
        return self.of(row) if callable(self.of) else getattr(row, self.of)

    def text(self, row: Any) -> str:
        value = self.value(row)
        if self.form is not None:
            return self.form(value)
        return NOTHING if value is None else str(value)


def print_table(columns: Sequence[Column], rows: Sequence[Any], *, empty: str) -> None:
    """Print rows as a table, as wide as there is room for; ``empty`` where there are none."""
    if not rows:
        say(empty)
        return
    room = _terminal_width()
    wrapping = is_terminal() and any(column.wraps for column in columns)
    for chosen, short_ids in _choices(columns):
        cells = _cells(chosen, rows, short_ids=short_ids)
        if _width(chosen, cells) <= room:
            break
    _render(_table(chosen, cells), room if wrapping else PIPE_WIDTH_CHARS)


def _choices(columns: Sequence[Column]) -> Iterator[tuple[Sequence[Column], bool]]:
    """What a table may look like, from the fullest to the narrowest."""
    yield columns, False
    yield columns, True
    for rank in sorted({column.spare for column in columns} - {0}, reverse=True):
        columns = [column for column in columns if column.spare != rank]
        yield columns, True


def _cells(columns: Sequence[Column], rows: Sequence[Any], *, short_ids: bool) -> list[list[str]]:
    ids = _id_texts(columns, rows, short_ids=short_ids)
    return [
        [ids.get((place, number)) or column.text(row) for number, column in enumerate(columns)]
        for place, row in enumerate(rows)
    ]


def _width(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> int:
    """How wide the table is; of a column that wraps, only its title counts."""
    widths = [
        max(
            len(column.title),
            *(len(row[number]) for row in cells if not column.wraps),
            WRAPPED_CHARS_MIN if column.wraps else 0,
        )
        for number, column in enumerate(columns)
    ]
    return sum(widths) + GAP_CHARS * (len(widths) - 1)


def _table(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, GAP_CHARS, 0, 0), header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.right else "left"
        table.add_column(column.title, justify=justify, no_wrap=not column.wraps)
    for row in cells:
        table.add_row(*(Text(cell, style=_STATUS_STYLES.get(cell, "")) for cell in row))
    return table


def _id_texts(
    columns: Sequence[Column], rows: Sequence[Any], *, short_ids: bool
) -> dict[tuple[int, int], str]:
    """The ids of a table by place, cut where wanted to what tells those of a column apart."""
    texts: dict[tuple[int, int], str] = {}
    for number, column in enumerate(columns):
        ids = {place: column.value(row) for place, row in enumerate(rows)}
        ids = {place: str(value) for place, value in ids.items() if isinstance(value, UUID)}
        chars = _telling_chars(set(ids.values())) if short_ids else None
        texts.update({(place, number): text[:chars] for place, text in ids.items()})
    return texts


def _telling_chars(ids: set[str]) -> int:
    chars = SHORT_ID_CHARS
    while len({text[:chars] for text in ids}) < len(ids):
        chars += 1
    return chars


def print_facts(facts: Mapping[str, str | None], *, indent: str = "") -> None:
    """Print names and values below each other; those without a value are left out."""
    shown = {name: value for name, value in facts.items() if value is not None}
    widest = max(map(len, shown), default=0)
    for name, value in shown.items():
        if uses_colour():
            style = _STATUS_STYLES.get(value)
            from rich.text import Text

            _render(Text.assemble((f"{indent}{name:<{widest}}", "dim"), "  ", (value, style or "")))
        else:
            _write(f"{indent}{name:<{widest}}  {value}\n")


def lines(text: str) -> None:
    """Print a text of several lines as it is."""
    _write(text.rstrip("\n") + "\n")


# --- Progress -------------------------------------------------------------------------------


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on stderr that a function moves: name, done, total. Nothing where nobody looks."""
    if not is_terminal(sys.stderr):
        yield lambda name, done, total: None
        return
    from rich import progress as bars

    tasks: dict[str, bars.TaskID] = {}
    with bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("ticks"),
        bars.TimeElapsedColumn(),
        console=_console(sys.stderr),
    ) as shown:

        def move(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = shown.add_task(name, total=total)
            shown.update(tasks[name], completed=done, total=total)

        yield move
