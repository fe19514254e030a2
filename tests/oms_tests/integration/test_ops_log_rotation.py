"""The log: it rotates, and whatever happens to its file neither crashes nor holds up who tells."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import resource
import subprocess
import sys
import threading
from collections import Counter
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from waits import wait_until

from engine import config, log
from engine.log import JsonLines, LogFile, open_log, tell

CHILD = Path(__file__).with_name("log_child.py")
ROOT = Path(__file__).parents[3]
# Far more than a tell takes on the busiest machine, far less than a wait for a lock or a disk.
NOT_BLOCKED_SECONDS = 2.0
TODAY, TOMORROW = date(2026, 3, 2), date(2026, 3, 3)


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(CHILD), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **options,
    )


def finish(child: subprocess.Popen[str]) -> str:
    """Wait until it ends, well and without having been held up; what it wrote to stderr."""
    slowest, complaints = child.communicate(timeout=60)
    assert child.returncode == 0, complaints
    assert float(slowest) < NOT_BLOCKED_SECONDS
    return complaints


def files_of(path: Path) -> list[Path]:
    return [file for file in path.parent.glob(f"{path.name}*") if file.suffix != ".lock"]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for file in files_of(path)
        for line in file.read_text(encoding="utf-8").splitlines()
    ]


def line(number: int = 0) -> str:
    return json.dumps({"ts": "2026-03-02T00:00:00+00:00", "number": number})


def numbers(path: Path) -> list[int]:
    return [json.loads(text).get("number") for text in path.read_text().splitlines()]


@pytest.mark.scenario("OPS-01")
def test_log_rotation_does_not_crash_or_block_engine(tmp_path: Path) -> None:
    """Three processes fill one file that rotates; another held its lock while a fourth wrote."""
    path = tmp_path / "log" / "work.log"
    path.parent.mkdir()
    lock = path.with_name("work.log.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        blocked = start(path, "blocked", 200, 2_000)
        assert finish(blocked) == ""
        # Nobody could rotate, so nobody did; nothing is lost.
        assert files_of(path) == [path]
        assert path.stat().st_size > 2_000
    children = [start(path, name, 500, 2_000) for name in ("a", "b", "c")]
    assert [finish(child) for child in children] == ["", "", ""]
    told = Counter((row["name"], row["number"]) for row in lines_of(path))
    expected = [("blocked", n) for n in range(200)]
    expected += [(name, n) for name in ("a", "b", "c") for n in range(500)]
    assert told == Counter(expected)
    # While one of them rotates, the others write on, so that files may be larger than they should.
    assert len(files_of(path)) > 10


def test_a_full_disk_sends_lines_to_stderr_and_is_tried_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "work.log"
    child = start(path, "full", 40, 1_000_000, 1_000)
    assert child.stdin is not None
    assert child.stderr is not None
    # The file is as full as it may be, to the byte: a line was cut off.
    first = child.stderr.readline()
    assert "can not be written" in first
    assert path.stat().st_size == 1_000
    child.stdin.write("\n")
    child.stdin.flush()
    assert '"number": 39' in finish(child)
    # Once there is room, lines are whole again; what was lost is said.
    file = LogFile(path, retry_seconds=0)
    file.missing = 3
    file.write(line(99), TODAY)
    file.close()
    *_, cut, gap, last = path.read_text().splitlines()
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut)
    assert json.loads(gap)["event"] == "LOG_LINES_MISSING"
    assert json.loads(gap)["lines"] == 3
    assert json.loads(last)["number"] == 99
    assert capfd.readouterr().err == ""


def test_what_is_cut_off_in_one_process_is_ended_before_the_next_line(tmp_path: Path) -> None:
    path = tmp_path / "work.log"
    file = LogFile(path, retry_seconds=0)
    file.write(line(1), TODAY)
    whole = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 5, limits[1]))
    try:
        file.write(line(2), TODAY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == whole + 5
    assert file.missing == 1
    file.write(line(3), TODAY)
    file.close()
    texts = path.read_text().splitlines()
    assert texts[0] == line(1)
    assert texts[1] == line(2)[:5]
    assert json.loads(texts[2])["lines"] == 1
    assert texts[3] == line(3)


def test_a_full_device_is_complained_of_once_until_it_is_tried_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "work.log"
    path.symlink_to("/dev/full")
    now = [0.0]
    file = LogFile(path, retry_seconds=5, monotonic=lambda: now[0])
    for number in range(3):
        file.write(line(number), TODAY)
    errors = capfd.readouterr().err.splitlines()
    assert errors == [
        f"the log {path} can not be written: No space left on device",
        *(line(number) for number in range(3)),
    ]
    path.unlink()
    file.write(line(3), TODAY)
    assert not path.exists()
    now[0] = 5.0
    file.write(line(4), TODAY)
    file.close()
    gap, last = map(json.loads, path.read_text().splitlines())
    assert (gap["lines"], last["number"]) == (4, 4)


@pytest.mark.parametrize("obstacle", ["folder is a file", "file is a folder", "unread pipe"])
def test_a_file_that_can_not_be_opened_is_no_error(tmp_path: Path, obstacle: str) -> None:
    path = tmp_path / "log" / "work.log"
    if obstacle == "folder is a file":
        path.parent.write_text("")
    elif obstacle == "file is a folder":
        path.mkdir(parents=True)
    else:
        path.parent.mkdir()
        os.mkfifo(path)
    complaints = finish(start(path, "lost", 20, 2_000)).splitlines()
    assert "can not be written" in complaints[0]
    assert [json.loads(text)["number"] for text in complaints[1:]] == list(range(20))


def test_a_folder_that_can_not_be_changed_stops_rotation_only(tmp_path: Path) -> None:
    path = tmp_path / "work.log"
    # Root may write where nobody may; but nobody can put a file in a folder's place.
    backup = tmp_path / "work.log.1"
    backup.mkdir()
    (backup / "something").write_text("")
    file = LogFile(path, max_bytes=100, backups=1)
    for number in range(10):
        file.write(line(number), TODAY)
    file.close()
    assert numbers(path) == list(range(10))


def test_the_first_line_of_a_day_begins_a_file(tmp_path: Path) -> None:
    path = tmp_path / "work.log"
    file = LogFile(path)
    file.write(line(1), TODAY)
    os.utime(path, (0, datetime(2026, 3, 2, 23, 59, tzinfo=UTC).timestamp()))
    file.close()
    file.write(line(2), TODAY)
    file.write(line(3), TOMORROW)
    file.close()
    # A file from before the start is yesterday's too.
    os.utime(path, (0, datetime(2026, 3, 3, 23, 59, tzinfo=UTC).timestamp()))
    other = LogFile(path)
    other.write(line(4), date(2026, 3, 4))
    other.close()
    assert numbers(tmp_path / "work.log.2") == [1, 2]
    assert numbers(tmp_path / "work.log.1") == [3]
    assert numbers(path) == [4]


def test_without_days_only_the_size_counts_and_old_files_go(tmp_path: Path) -> None:
    path = tmp_path / "work.log"
    file = LogFile(path, max_bytes=2 * len(line()) + 2, backups=2, daily=False)
    for number in range(9):
        file.write(line(number), TODAY if number < 5 else TOMORROW)
    file.close()
    assert [numbers(file) for file in sorted(files_of(path))] == [[8], [6, 7], [4, 5]]


def test_no_backups_means_that_the_file_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "work.log"
    file = LogFile(path, max_bytes=10, backups=0)
    file.write(line(1), TODAY)
    file.write(line(2), TODAY)
    file.close()
    assert files_of(path) == [path]
    assert numbers(path) == [2]


def test_a_full_queue_loses_lines_and_says_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "QUEUE_LINES_MAX", 5)
    path = tmp_path / "work.log"
    writing, go_on = threading.Event(), threading.Event()
    write = LogFile.write

    def slow(self: LogFile, text: str, day: date) -> None:
        writing.set()
        assert go_on.wait(30)
        write(self, text, day)

    monkeypatch.setattr(LogFile, "write", slow)
    with open_log(path):
        tell("FILL_RATE", number=0)
        assert writing.wait(30)
        for number in range(1, 10):  # five find a place, four do not
            tell("FILL_RATE", number=number)
        go_on.set()
        wait_until(
            lambda: path.exists() and len(path.read_text().splitlines()) == 7,
            "all lines",
        )
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    assert [row.get("number", row["event"]) for row in rows] == [
        0, "LOG_LINES_MISSING", 1, 2, 3, 4, 5,
    ]  # fmt: skip
    assert rows[1]["lines"] == 4


def test_a_writer_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "CLOSE_SECONDS", 0.1)
    go_on = threading.Event()
    monkeypatch.setattr(LogFile, "write", lambda self, text, day: go_on.wait(30))
    with open_log(tmp_path / "work.log"):
        tell("FILL_RATE")
    go_on.set()


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_a_line_says_everything_as_text(tmp_path: Path) -> None:
    path = tmp_path / "work.log"
    run_id = UUID(int=1)
    with open_log(path):
        tell(
            "THROTTLED",
            level=logging.WARNING,
            account="DU1",
            run_id=run_id,
            code="a field of that name",
            amount=Decimal("1E+3"),
            at=datetime(2026, 3, 2, 12, tzinfo=UTC),
            tags=[Decimal("0.10")],
        )
        tell("BAD", what=Unspeakable())
        tell("ODD", what={(1, 2): 3})
        tell("LAST %s", percent="%d")
    throttled, bad, odd, last = map(json.loads, path.read_text().splitlines())
    at = throttled.pop("ts")
    assert datetime.fromisoformat(at).utcoffset() == UTC.utcoffset(None)
    assert throttled == {
        "level": "WARNING",
        "event": "THROTTLED",
        "account": "DU1",
        "run_id": str(run_id),
        "code": "a field of that name",
        "amount": "1000",
        "at": "2026-03-02T12:00:00+00:00",
        "tags": ["0.10"],
    }
    assert "Unspeakable object" in bad["what"]
    assert (odd["event"], last["event"]) == ("ODD", "LAST %s")


def test_errors_are_told_with_their_trace() -> None:
    try:
        raise ValueError("wrong")
    except ValueError:
        record = logging.LogRecord("oms", logging.ERROR, "", 0, "X", None, sys.exc_info())
    assert "ValueError: wrong" in json.loads(JsonLines().format(record))["error"]


def test_without_a_file_telling_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    tell("NOBODY_LISTENS", level=logging.ERROR)
    assert capfd.readouterr() == ("", "")


def test_where_log_files_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OMS_HOME", str(tmp_path))
    monkeypatch.delenv("OMS_LOG", raising=False)
    assert config.log_folder() == tmp_path / "log"
    monkeypatch.setenv("OMS_LOG", str(tmp_path / "elsewhere"))
    assert config.log_folder() == tmp_path / "elsewhere"
