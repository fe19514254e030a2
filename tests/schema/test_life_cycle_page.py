"""docs/order-life-cycle.md draws the table of moves, and draws it as it is."""

from __future__ import annotations

import re
from pathlib import Path

from engine.db.connect import Connection

PAGE = Path(__file__).resolve().parents[2] / "docs" / "order-life-cycle.md"
_ARROW = re.compile(r"^ {4}(\w+) --> (\w+)$", re.MULTILINE)
_ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \| (.*) \|$", re.MULTILINE)
_STATUS = re.compile(r"^\| `(\w+)` \| (yes|no) \| (.*) \|$", re.MULTILINE)


def test_the_diagram_has_the_moves_of_the_table(conn: Connection) -> None:
    moves = conn.execute("SELECT from_status, to_status FROM order_transition").fetchall()
    drawn = _ARROW.findall(PAGE.read_text(encoding="utf-8"))
    assert len(drawn) == len(set(drawn)), "an arrow is drawn twice"
    assert set(drawn) == set(moves)


def test_the_page_says_why_as_the_table_does(conn: Connection) -> None:
    moves = conn.execute("SELECT from_status, to_status, why FROM order_transition").fetchall()
    assert set(_ROW.findall(PAGE.read_text(encoding="utf-8"))) == set(moves)


def test_the_page_lists_the_statuses(conn: Connection) -> None:
    statuses = conn.execute(
        "SELECT status, CASE WHEN is_open THEN 'yes' ELSE 'no' END, why FROM order_status"
    ).fetchall()
    assert set(_STATUS.findall(PAGE.read_text(encoding="utf-8"))) == set(statuses)
