"""Every scenario that is delivered has its test, and every mark names a scenario."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HERE = Path(__file__).parent
INDEX: list[dict[str, Any]] = tomllib.loads((HERE / "scenarios.toml").read_text(encoding="utf-8"))[
    "scenario"
]
SECTION_SIZES = {"A": 36, "B": 53, "C": 7}
OF_EVERY_ROW = {"code", "section", "title", "issue", "delivered"}


class Mark(NamedTuple):
    """A test that carries a code."""

    code: str
    file: str
    test: str


def marks_in(source: str, file: str) -> Iterator[Mark]:
    """The scenario marks of a test file's functions and classes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            for code in filter(None, map(_code, node.decorator_list)):
                yield Mark(code, file, node.name)


def _code(decorator: ast.expr) -> str | None:
    """The code of ``@pytest.mark.scenario("CODE")``."""
    match decorator:
        case ast.Call(func=ast.Attribute(attr="scenario"), args=[ast.Constant(value=str(code))]):
            return code
        case _:
            return None


def marks() -> list[Mark]:
    return [
        mark
        for path in sorted(HERE.rglob("test_*.py"))
        for mark in marks_in(path.read_text(encoding="utf-8"), path.relative_to(HERE).as_posix())
    ]


def findings(index: list[dict[str, Any]], found: list[Mark]) -> list[str]:
    """What contradicts the index, one sentence each."""
    return [
        *_unknown(index, found),
        *(finding for row in index for finding in _of_row(row, found)),
    ]


def _unknown(index: list[dict[str, Any]], found: list[Mark]) -> Iterator[str]:
    codes = {row["code"] for row in index}
    for mark in found:
        if mark.code not in codes:
            yield f"{mark.file}::{mark.test} is marked {mark.code}, which the index doesn't have"


def _of_row(row: dict[str, Any], found: list[Mark]) -> Iterator[str]:
    code = row["code"]
    own = [mark for mark in found if mark.code == code]
    if row["delivered"] and not own:
        yield f"{code} is delivered but has no test"
    if not row["delivered"] and own:
        yield f"{code} has the test {own[0].test}; set delivered = true"
    if own and row["section"] == "A" and not any(mark.file.startswith("plan/") for mark in own):
        yield f"{code} must be proven under plan/"
    if own and "file" in row:
        wanted = Mark(code, f"oms_tests/{row['file']}", row["test"])
        if wanted not in own:
            yield f"{code} must be proven by {wanted.file}::{wanted.test}"


def test_the_index_holds() -> None:
    assert findings(INDEX, marks()) == []


def test_the_index_is_whole() -> None:
    assert Counter(row["section"] for row in INDEX) == SECTION_SIZES
    twice = [code for code, n in Counter(row["code"] for row in INDEX).items() if n > 1]
    assert twice == []
    for row in INDEX:
        of_section = {"file", "test"} if row["section"] == "B" else set()
        assert row.keys() - {"events"} == OF_EVERY_ROW | of_section, row["code"]
        assert isinstance(row["delivered"], bool)
        assert row["title"]


def test_no_two_scenarios_share_a_test_by_name() -> None:
    named = Counter((row["file"], row["test"]) for row in INDEX if "file" in row)
    assert [name for name, n in named.items() if n > 1] == []


A_ROW = {"code": "X-1", "section": "A", "title": "x", "issue": 1, "delivered": True}
B_ROW = A_ROW | {"code": "Y-1", "section": "B", "file": "unit/test_y.py", "test": "test_y"}


@pytest.mark.parametrize(
    ("row", "found", "finding"),
    [
        (A_ROW, [], "X-1 is delivered but has no test"),
        (A_ROW, [Mark("X-1", "cli/test_x.py", "t")], "X-1 must be proven under plan/"),
        (A_ROW | {"delivered": False}, [Mark("X-1", "plan/f", "t")], "X-1 has the test t;"),
        (A_ROW | {"delivered": False}, [Mark("Z-1", "f", "t")], "f::t is marked Z-1"),
        (B_ROW, [Mark("Y-1", "oms_tests/unit/test_y.py", "test_other")], "must be proven by"),
        (B_ROW, [Mark("Y-1", "unit/test_y.py", "test_y")], "must be proven by"),
    ],
)
def test_the_index_can_fail(row: dict[str, Any], found: list[Mark], finding: str) -> None:
    (sentence,) = findings([row], found)
    assert finding in sentence


def test_a_row_with_its_test_is_no_finding() -> None:
    found = [Mark("X-1", "plan/f", "t"), Mark("Y-1", "oms_tests/unit/test_y.py", "test_y")]
    assert findings([A_ROW, B_ROW], found) == []


def test_marks_are_found_wherever_they_stand() -> None:
    source = """
import pytest

@pytest.mark.slow
@pytest.mark.scenario("A-1")
@pytest.mark.scenario("A-2")
def test_a(): ...

class TestB:
    @pytest.mark.scenario("B-1")
    async def test_b(self): ...
"""
    assert set(marks_in(source, "f")) == {
        Mark("A-1", "f", "test_a"),
        Mark("A-2", "f", "test_a"),
        Mark("B-1", "f", "test_b"),
    }
