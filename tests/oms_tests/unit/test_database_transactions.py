"""Half-written files: what is whole of them is read, and said to be all there is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from traded_books import a_life

from engine.db.connect import Connection
from engine.errors import BadInput
from engine.export import Export, read_export, write_export
from engine.rebuild import export_run, rebuild_run


def file_lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        yield from file


@pytest.fixture
def whole(owner_conn: Connection, tmp_path: Path) -> Path:
    """A run's export, whose run is gone from the database."""
    run = a_life(owner_conn)
    path = tmp_path / "run.jsonl"
    path.write_text(
        "".join(line + "\n" for line in write_export(export_run(owner_conn, run))),
        encoding="utf-8",
    )
    owner_conn.execute("DELETE FROM strategy_run")
    return path


@pytest.mark.scenario("PARTIAL-WRITE")
def test_partial_write_causes_replay_recovery_strategy_not_crash(
    owner_conn: Connection, whole: Path
) -> None:
    """A process died while it wrote: the last event is half there."""
    data = whole.read_bytes()
    ticks = [place for place in range(len(data)) if data.startswith(b'"TICK"', place)]
    # In the middle of the line that tells the last tick but one.
    whole.write_bytes(data[: ticks[-2] + 40])
    found = read_export(file_lines(whole))
    assert found.damage == f"line {len(found.events) + 2} breaks off"
    complete = read_export(data.decode().splitlines(keepends=True))
    assert found.events == complete.events[: len(found.events)]
    # What is whole is sound, and the run goes on from there.
    run = rebuild_run(owner_conn, found)
    row = owner_conn.execute(
        """SELECT (SELECT count(*) FROM event_ledger), (SELECT max(logical_time) FROM mtm_ledger),
                  (SELECT last_logical_time FROM engine_state)"""
    ).fetchone()
    assert row is not None
    assert row[0] == len(found.events)
    assert row[1] == row[2] < complete.events[-1].logical_time
    assert run.status == "RUNNING"


def test_wherever_a_file_breaks_off_it_is_read_that_far(whole: Path) -> None:
    data = whole.read_bytes()
    first, end = data.index(b"\n") + 1, len(data)
    events = len(read_export(data.decode().splitlines(keepends=True)).events)
    for cut in [*range(first, end, 97), end - 1]:
        whole.write_bytes(data[:cut])
        found = read_export(file_lines(whole))
        assert found.damage is not None
        assert len(found.events) == min(events, data[:cut].count(b"\n") - 1)
    for cut in (0, 1, first - 1):
        whole.write_bytes(data[:cut])
        with pytest.raises(BadInput, match="breaks off in its first line"):
            read_export(file_lines(whole))


def test_a_cut_inside_a_letter_is_a_cut_as_any_other(whole: Path) -> None:
    export = read_export(file_lines(whole))
    odd = Export(export.user_id, export.run_id, export.terms.replace("life", "lïfe"), [], [])
    lines = list(write_export(odd))
    data = (lines[0] + "\n").encode() + "ï".encode()[:1]
    whole.write_bytes(data)
    assert read_export(file_lines(whole)).damage == "line 2 breaks off"


def test_a_broken_line_in_the_middle_is_no_partial_write(whole: Path) -> None:
    lines = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[3] = lines[3][:20] + "\n"
    with pytest.raises(BadInput, match="line 4 isn't a line of an export"):
        read_export(lines)
    assert json.loads(lines[-1])["line"] == "end"
