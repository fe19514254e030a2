"""What people type, as values. What can't be read is refused with one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import typer

__all__ = [
    "given_run",
    "parse_assignments",
    "parse_day",
    "parse_object",
    "parse_part",
    "parse_time_of_day",
    "parse_until",
]

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
# Workers or schedulers that may share one work.
PARTS_MAX = 1_000
_ONE_DAY = timedelta(days=1)
_INSTANT = timedelta(microseconds=1)


def given_run(argument: str | None, option: str | None, context: typer.Context) -> str:
    """The run that was named, bare or with ``--run-id``."""
    if argument is not None and option is not None and argument != option:
        raise typer.BadParameter("The run is named twice; name it once", ctx=context)
    named = argument or option
    if not named:
        raise typer.BadParameter(
            "Name the run: its id, the first digits of it, or its name", ctx=context
        )
    return named


def parse_day(text: str, what: str) -> date:
    """A day such as 2024-01-31. Raises BadInput."""
    from engine.errors import BadInput

    if _DAY.fullmatch(text):
        try:
            return date.fromisoformat(text)
        except ValueError:
            pass
    raise BadInput(f"The {what} {text!r} isn't a day; write it as 2024-01-31.")


def parse_until(text: str, what: str, *, end: bool) -> datetime:
    """A moment with its time zone, or a day (UTC): its first instant, or with ``end`` its last.

    Raises BadInput.
    """
    from engine.market.imports import parse_time

    if not _DAY.fullmatch(text):
        return parse_time(text, what)
    first = datetime.combine(parse_day(text, what), time(), UTC)
    return first + _ONE_DAY - _INSTANT if end else first


def parse_time_of_day(text: str) -> tuple[time, time]:
    """Hours such as 09:00-17:00. Raises BadInput."""
    from engine.errors import BadInput

    begin, dash, end = text.partition("-")
    try:
        if dash:
            opens, closes = time.fromisoformat(begin.strip()), time.fromisoformat(end.strip())
            # The zone has an option of its own.
            if opens != closes and opens.tzinfo is closes.tzinfo is None:
                return opens, closes
    except ValueError:
        pass
    raise BadInput(f"The hours {text!r} can't be read; write them as 09:00-17:00.")


def parse_part(given: str) -> tuple[int, int]:
    """A part of a whole such as 1/2, from 1 on. Raises typer's BadParameter."""
    part, slash, of = given.partition("/")
    if slash and part.isdecimal() and of.isdecimal() and 1 <= int(part) <= int(of) <= PARTS_MAX:
        return int(part), int(of)
    raise typer.BadParameter(f"{given!r} is no part of a whole; write for instance 1/2")


def parse_object(text: str | None, what: str) -> dict[str, Any]:
    """A JSON object; nothing is an empty one. Raises BadInput."""
    from engine.errors import BadInput

    if text is None:
        return {}
    value = _json(text, what)
    if not isinstance(value, dict):
        raise BadInput(f'{what} {text!r} is no JSON object; write it as \'{{"key": "value"}}\'.')
    return value


def parse_assignments(texts: Sequence[str], what: str) -> dict[str, Any]:
    """``key=value`` as an object, ``key.name=value`` as an object in it.

    A value is text, or JSON where it begins with ``{``, ``[`` or ``"``. Raises BadInput.
    """
    from engine.errors import BadInput

    found: dict[str, Any] = {}
    for text in texts:
        path, equals, raw = text.partition("=")
        key, dot, name = path.strip().partition(".")
        if not (equals and key and (name or not dot)):
            raise BadInput(f"The {what} {text!r} isn't an assignment; write it as key=value.")
        value = _json(raw, f"The {what} {key}") if raw[:1] in '{["' and raw else raw
        place = found.setdefault(key, {}) if dot else found
        if not isinstance(place, dict) or (name or key) in place:
            raise BadInput(f"The {what} {path.strip()} is given twice; give it once.")
        place[name or key] = value
    return found


def _json(text: str, what: str) -> Any:
    from engine.errors import BadInput

    def refuse(constant: str) -> Any:
        raise BadInput(f"{what} holds {constant}, which is no number.")

    try:
        return json.loads(text, parse_float=Decimal, parse_constant=refuse)
    except ValueError as error:
        raise BadInput(f"{what} {text!r} isn't JSON: {error}.") from error
