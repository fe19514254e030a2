"""Every code that is raised or told has its section in the runbook, and every section a code."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from engine.db.connect import Connection

HERE = Path(__file__).parent
ENGINE = HERE.parent / "engine"
RUNBOOK = HERE.parent / "docs" / "runbook.md"
CODE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|CONNECTED|DISCONNECTED|LOGON|LOGOUT|THROTTLED")
# What raises an alert or tells the log; a code is one of the first arguments.
TELLERS = {
    "tell", "_tell", "Tell", "alert", "_alert", "raise_alert", "_report", "_alarm", "ended",
    "Verdict", "TakenOver", "_not_booked", "_contradiction",
}  # fmt: skip
# Tables of codes by what a broker said, and of breakers.
TABLES = {"_CODES", "_ALARMS"}


def codes_in(source: str) -> Iterator[str]:
    """The codes that a module raises or tells by name."""
    constants: dict[str, str] = {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                constants[name] = text
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name in TELLERS:
                yield from _codes_of(node.args, constants)
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Dict(values=values))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.Dict(values=values))
            ) if name in TABLES:
                yield from _codes_of(values, constants)


def _codes_of(given: list[ast.expr], constants: dict[str, str]) -> Iterator[str]:
    for argument in given:
        match argument:
            case ast.Constant(value=str(text)):
                pass
            case ast.Name(id=name) if name in constants:
                text = constants[name]
            case ast.IfExp(body=body, orelse=other):
                yield from _codes_of([body, other], constants)
                continue
            case _:
                continue
        if CODE.fullmatch(text):
            yield text


def raised() -> set[str]:
    """All codes of the engine."""
    return {
        code
        for path in ENGINE.rglob("*.py")
        if "dummy" not in path.parts
        for code in codes_in(path.read_text(encoding="utf-8"))
    }


def expected() -> set[str]:
    """All codes of the scenario list."""
    index = tomllib.loads((HERE / "scenarios.toml").read_text(encoding="utf-8"))["scenario"]
    return {code for row in index for code in row.get("events", ())}


def sections() -> list[str]:
    return re.findall(r"^### (.+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE)


def test_every_code_has_its_section() -> None:
    assert sorted((raised() | expected()) - set(sections())) == []


def test_no_section_is_there_twice_or_out_of_order() -> None:
    assert sections() == sorted(set(sections()))


def test_every_section_says_what_it_means_and_what_to_do() -> None:
    text = RUNBOOK.read_text(encoding="utf-8")
    for part in text.split("\n### ")[1:]:
        code, _, body = part.partition("\n")
        body = body.partition("\n## ")[0]
        assert "**Means**" in body, code
        assert "**Do**" in body, code


def test_codes_are_found_wherever_they_stand() -> None:
    source = """
NAMED = "NAMED_CODE"
_ALARMS = {"X": "FROM_TABLE"}
tell("TOLD_CODE", x="NOT_THIS")
self.writer.alert("ALERT_CODE", subject, words)
raise_alert(conn, user_id, NAMED, "words")
Tell("A_B" if x else "C_D")
other("NO_TELLER")
"""
    assert set(codes_in(source)) == {
        "NAMED_CODE", "FROM_TABLE", "TOLD_CODE", "ALERT_CODE", "A_B", "C_D",
    }  # fmt: skip


def test_limits_and_breakers_have_their_sections(conn: Connection) -> None:
    """Their codes are rows, told by whatever meets them."""
    rows = conn.execute(
        "SELECT log_code FROM limit_kind UNION SELECT log_code FROM breaker_kind"
    ).fetchall()
    assert sorted({code for (code,) in rows} - set(sections())) == []
