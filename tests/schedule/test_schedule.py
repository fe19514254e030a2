"""The schedule: what is due, once each, whoever is killed; calendars, daylight saving, policies."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import psycopg
import pytest

from cli.main import main
from engine import resources
from engine.db.connect import Connection
from engine.ids import user_id_of
from engine.market.calendar import sessions
from engine.market.imports import read_bars
from engine.market.model import Bar
from engine.market.store import import_bars
from engine.runs import Terms, add_user, create_run, start_run
from engine.schedule import CATCH_UP_TICKS_MAX, Round, Share, drive, due
from engine.sips import Plan, add_plan, pause_plan, resume_plan

WAIT_SECONDS_MAX = 60


@pytest.fixture(scope="module")
def demo_bars() -> list[Bar]:
    return read_bars(resources.data_dir() / "demo_prices.csv.gz", calendar="XNYS")


def _started(
    owner: Connection, since: datetime, *, calendar: str = "XNYS", user: str = "ann"
) -> tuple[UUID, UUID]:
    """A RUNNING SIP run that looks as if it had been made at ``since``."""
    user_id = add_user(owner, user)
    run = create_run(
        owner, user_id, Terms(initial_cash=Decimal(1_000_000), calendar=calendar, name=user)
    )
    owner.execute("UPDATE strategy_run SET created_at = %s WHERE run_id = %s", [since, run.run_id])
    start_run(owner, user_id, run.run_id)
    return user_id, run.run_id


def _plan(owner: Connection, key: tuple[UUID, UUID], first: str, policy: str = "RUN_EACH") -> None:
    start_on = date.fromisoformat(first)
    plan = Plan("AAPL", "AAPL", Decimal(500), 5, start_on, missed_policy=policy)
    add_plan(owner, *key, plan)


def _at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def _events(conn: Connection, kind: str) -> list[tuple[str, datetime]]:
    return conn.execute(
        "SELECT subject, logical_time FROM event_ledger WHERE event_type = %s ORDER BY seq", [kind]
    ).fetchall()


def test_due_are_the_sessions_since_the_last_tick(conn: Connection) -> None:
    _started(conn, _at("2001-09-07T12:00"))
    planned = [d.planned_at for d in due(conn, _at("2001-09-18T12:00"))]
    # The exchange was closed from September 11 to 14.
    assert planned == [_at("2001-09-07T20:00"), _at("2001-09-10T20:00"), _at("2001-09-17T20:00")]


def test_due_follows_daylight_saving_time(conn: Connection) -> None:
    _started(conn, _at("2013-03-07T23:00"))
    planned = [d.planned_at for d in due(conn, _at("2013-03-12T23:00"))]
    assert planned == [_at("2013-03-08T21:00"), _at("2013-03-11T20:00"), _at("2013-03-12T20:00")]


def test_due_at_the_open_for_a_run_that_wants_it(conn: Connection) -> None:
    _started(conn, _at("2013-03-07T23:00"))
    conn.execute("UPDATE strategy_run SET tick_at = 'OPEN'")
    assert [d.planned_at for d in due(conn, _at("2013-03-08T23:00"))] == [_at("2013-03-08T14:30")]


def test_due_follows_the_calendar_of_each_run(conn: Connection) -> None:
    _started(conn, _at("2013-03-07T23:00"), calendar="XNSE")
    assert [d.planned_at for d in due(conn, _at("2013-03-08T23:00"))] == [_at("2013-03-08T10:00")]


def test_due_is_bounded(conn: Connection) -> None:
    _started(conn, _at("2001-01-01T00:00"))
    assert len(due(conn, _at("2013-03-01T23:00"))) == CATCH_UP_TICKS_MAX
    assert len(due(conn, _at("2013-03-01T23:00"), per_run_max=3)) == 3


def test_nothing_is_due_of_a_run_that_is_not_running(conn: Connection) -> None:
    _started(conn, _at("2013-02-01T00:00"))
    conn.execute("UPDATE strategy_run SET status = 'STOPPED'")
    assert due(conn, _at("2013-03-01T23:00")) == []


def test_a_round_ticks_what_is_due_and_the_next_finds_it_done(
    conn: Connection, demo_bars: list[Bar]
) -> None:
    import_bars(conn, demo_bars)
    key = _started(conn, _at("2013-02-01T23:00"))
    _plan(conn, key, "2013-02-01")
    now = _at("2013-02-08T21:30")
    assert drive(conn, lambda: now).ticks == 5
    assert _events(conn, "SIP_EXECUTED") == [("AAPL@2013-02", _at("2013-02-05T21:00"))]
    assert drive(conn, lambda: now) == Round()


def test_a_holiday_on_the_day_moves_it_to_the_next_session(
    conn: Connection, demo_bars: list[Bar]
) -> None:
    import_bars(conn, demo_bars)
    key = _started(conn, _at("2012-09-01T00:00"))
    add_plan(conn, *key, Plan("labor", "AAPL", Decimal(500), 3, date(2012, 9, 1)))
    drive(conn, lambda: _at("2012-09-05T21:00"))
    assert _events(conn, "SIP_EXECUTED") == [("labor@2012-09", _at("2012-09-04T20:00"))]


@pytest.mark.parametrize(
    ("policy", "executed", "skipped"),
    [
        ("RUN_EACH", ["2012-10", "2012-11", "2012-12", "2013-01"], []),
        ("RUN_ONCE", ["2013-01"], ["2012-10", "2012-11", "2012-12"]),
        ("SKIP", [], ["2012-10", "2012-11", "2012-12", "2013-01"]),
    ],
)
def test_what_was_missed_follows_the_policy_of_the_plan(
    conn: Connection,
    demo_bars: list[Bar],
    policy: str,
    executed: list[str],
    skipped: list[str],
) -> None:
    import_bars(conn, demo_bars)
    key = _started(conn, _at("2012-09-10T00:00"))
    _plan(conn, key, "2012-09-10", policy)
    drive(conn, lambda: _at("2013-01-31T22:00"))
    assert [s for s, _ in _events(conn, "SIP_EXECUTED")] == [f"AAPL@{m}" for m in executed]
    assert [s for s, _ in _events(conn, "SIP_SKIPPED")] == [f"AAPL@{m}" for m in skipped]


@pytest.mark.parametrize("policy", ["RUN_EACH", "RUN_ONCE", "SKIP"])
def test_what_is_on_time_is_executed_under_every_policy(
    conn: Connection, demo_bars: list[Bar], policy: str
) -> None:
    import_bars(conn, demo_bars)
    key = _started(conn, _at("2013-02-04T23:00"))
    _plan(conn, key, "2013-02-01", policy)
    drive(conn, lambda: _at("2013-02-06T09:00"))
    assert [s for s, _ in _events(conn, "SIP_EXECUTED")] == ["AAPL@2013-02"]


def test_a_pause_leaves_no_debt(conn: Connection, demo_bars: list[Bar]) -> None:
    import_bars(conn, demo_bars)
    key = _started(conn, _at("2012-11-15T00:00"))
    _plan(conn, key, "2012-11-15")
    pause_plan(conn, *key, "AAPL")
    drive(conn, lambda: _at("2013-01-15T22:00"))
    assert _events(conn, "SIP_EXECUTED") == []
    resume_plan(conn, *key, "AAPL", date(2013, 1, 16))
    drive(conn, lambda: _at("2013-02-15T22:00"))
    assert [s for s, _ in _events(conn, "SIP_EXECUTED")] == ["AAPL@2013-02"]


def test_a_tick_waits_for_prices_and_says_so(conn: Connection) -> None:
    key = _started(conn, _at("2013-02-04T23:00"))
    _plan(conn, key, "2013-02-01")
    done = drive(conn, lambda: _at("2013-02-05T22:00"))
    assert done.ticks == 0
    assert "waits for the prices of AAPL" in done.stuck[key[1]]
    row = conn.execute("SELECT last_error FROM engine_status").fetchone()
    assert row == (done.stuck[key[1]],)


def test_a_tick_waits_no_longer_than_a_day(conn: Connection) -> None:
    _plan(conn, _started(conn, _at("2013-02-04T23:00")), "2013-02-01")
    assert drive(conn, lambda: _at("2013-02-06T21:30")).ticks == 1
    assert _events(conn, "SIP_EXECUTED") == []


def test_one_stuck_run_holds_up_no_other(conn: Connection, demo_bars: list[Bar]) -> None:
    import_bars(conn, demo_bars)
    stuck = _started(conn, _at("2013-02-04T23:00"), user="stuck")
    conn.execute(
        "UPDATE strategy_run SET strategy = 'no.such:Strategy' WHERE run_id = %s", [stuck[1]]
    )
    fine = _started(conn, _at("2013-02-04T23:00"), user="fine")
    _plan(conn, fine, "2013-02-01")
    done = drive(conn, lambda: _at("2013-02-06T22:00"))
    assert list(done.stuck) == [stuck[1]]
    assert done.ticks == 2


def _sessions_of(first: str, last: str) -> list[datetime]:
    found = sessions("XNYS", date.fromisoformat(first), date.fromisoformat(last))
    return [session.close_at for session in found]


@pytest.fixture
def scheduler_processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait(WAIT_SECONDS_MAX)


def _scheduler(dsn: str, now: datetime) -> subprocess.Popen[bytes]:
    program = (
        "from datetime import datetime; from engine.schedule import serve; "
        f"now = datetime.fromisoformat({now.isoformat()!r}); "
        f"serve({dsn!r}, every_seconds=1, clock=lambda: now)"
    )
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", program])


def _await_ticks(conn: Connection, wanted: int) -> None:
    """Wait for committed ticks, not for time."""
    began = datetime.now(UTC)
    while datetime.now(UTC) - began < timedelta(seconds=WAIT_SECONDS_MAX):
        row = conn.execute("SELECT count(*) FROM event_ledger WHERE event_type = 'TICK'").fetchone()
        if row is not None and row[0] >= wanted:
            return
        conn.execute("SELECT pg_sleep(0.01)")
    raise AssertionError(f"no {wanted} ticks within {WAIT_SECONDS_MAX} s")


@pytest.mark.slow
def test_two_schedulers_killed_and_a_third_tick_every_planned_time_once(
    dsn: str,
    owner_conn: Connection,
    demo_bars: list[Bar],
    scheduler_processes: list[subprocess.Popen[bytes]],
) -> None:
    import_bars(owner_conn, demo_bars)
    _plan(owner_conn, _started(owner_conn, _at("2011-12-31T00:00")), "2012-01-01")
    planned = _sessions_of("2012-01-01", "2013-02-28")
    now = planned[-1] + timedelta(hours=1)
    scheduler_processes += [_scheduler(dsn, now), _scheduler(dsn, now)]
    for process, ticks in zip(list(scheduler_processes), (40, 90), strict=True):
        _await_ticks(owner_conn, ticks)
        process.kill()
        process.wait(WAIT_SECONDS_MAX)
    scheduler_processes.append(_scheduler(dsn, now))
    _await_ticks(owner_conn, len(planned))
    assert [at for _, at in _events(owner_conn, "TICK")] == planned
    assert len(_events(owner_conn, "SIP_EXECUTED")) == 14
    assert owner_conn.execute("SELECT count(*) FROM mtm_ledger").fetchone() == (len(planned),)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_schedule_cleanly(
    dsn: str,
    owner_conn: Connection,
    scheduler_processes: list[subprocess.Popen[bytes]],
    number: signal.Signals,
) -> None:
    _started(owner_conn, _at("2013-02-27T00:00"))
    process = _scheduler(dsn, _at("2013-02-27T22:00"))
    scheduler_processes.append(process)
    _await_ticks(owner_conn, 1)
    process.send_signal(number)
    assert process.wait(WAIT_SECONDS_MAX) == 0


def test_two_rounds_at_once_share_the_work(
    dsn: str, owner_conn: Connection, demo_bars: list[Bar]
) -> None:
    import_bars(owner_conn, demo_bars)
    _plan(owner_conn, _started(owner_conn, _at("2012-11-30T23:00")), "2012-12-01")
    now = _at("2013-01-02T22:00")
    rounds: list[Round] = []

    def work() -> None:
        with psycopg.connect(dsn, autocommit=True) as conn:
            rounds.append(drive(conn, lambda: now))

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(WAIT_SECONDS_MAX)
    planned = _sessions_of("2012-12-01", "2013-01-02")
    assert sum(done.ticks for done in rounds) == len(planned)
    assert [at for _, at in _events(owner_conn, "TICK")] == planned


def test_the_schedule_outlives_a_database_that_is_away(dsn: str) -> None:
    """A round that fails is tried again; here the database is never there, and it ends at once."""
    serving = subprocess.Popen(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "from cli.output import log_to_stderr; log_to_stderr();"
            "from engine.schedule import serve; serve('host=/nowhere', every_seconds=1)",
        ],
        stderr=subprocess.PIPE,
    )
    assert serving.stderr is not None
    for _ in range(2):
        assert b"SCHEDULE_WAITS" in serving.stderr.readline()
    serving.send_signal(signal.SIGTERM)
    _, rest = serving.communicate(timeout=WAIT_SECONDS_MAX)
    assert b"Traceback" not in rest
    assert serving.returncode == 0


# Shares of the work

SHARES = (Share(1, 2), Share(2, 2))


@pytest.fixture
def shared(owner_conn: Connection, demo_bars: list[Bar]) -> dict[UUID, Share]:
    """Runs of either share, due at the five sessions up to SHARED_NOW, by whose share they are."""
    import_bars(owner_conn, demo_bars)
    runs: dict[UUID, Share] = {}
    for number in range(6):
        key = _started(owner_conn, _at("2013-02-01T23:00"), user=f"user {number}")
        _plan(owner_conn, key, "2013-02-01")
        (runs[key[1]],) = (share for share in SHARES if share.takes(key[0]))
    assert set(runs.values()) == set(SHARES)
    return runs


SHARED_NOW = _at("2013-02-08T21:30")
SHARED_SESSIONS = 5


def _assert_all_ticked_once(conn: Connection, shared: dict[UUID, Share]) -> None:
    planned = _sessions_of("2013-02-04", "2013-02-08")
    assert len(planned) == SHARED_SESSIONS
    told = conn.execute(
        """SELECT run_id, array_agg(logical_time ORDER BY seq) FROM event_ledger
           WHERE event_type = 'TICK' GROUP BY run_id"""
    ).fetchall()
    assert dict(told) == dict.fromkeys(shared, planned)
    assert len(_events(conn, "SIP_EXECUTED")) == len(shared)


def _ticked_in_turn(conn: Connection) -> list[UUID]:
    rows = conn.execute(
        "SELECT run_id FROM event_ledger WHERE event_type = 'TICK' ORDER BY recorded_at"
    ).fetchall()
    return [run_id for (run_id,) in rows]


@pytest.mark.parametrize("share", SHARES)
def test_a_share_alone_ticks_its_own_first_and_then_everything(
    owner_conn: Connection, shared: dict[UUID, Share], share: Share
) -> None:
    done = drive(owner_conn, lambda: SHARED_NOW, share)
    assert done == Round(ticks=len(shared) * SHARED_SESSIONS)
    _assert_all_ticked_once(owner_conn, shared)
    own = [shared[run_id] == share for run_id in _ticked_in_turn(owner_conn)]
    assert own == sorted(own, reverse=True)


def test_shares_one_after_the_other_tick_everything_once(
    owner_conn: Connection, shared: dict[UUID, Share]
) -> None:
    rounds = [drive(owner_conn, lambda: SHARED_NOW, share) for share in SHARES]
    assert rounds == [Round(ticks=len(shared) * SHARED_SESSIONS), Round()]
    _assert_all_ticked_once(owner_conn, shared)


def test_shares_at_once_tick_everything_once(
    dsn: str, owner_conn: Connection, shared: dict[UUID, Share]
) -> None:
    rounds: list[Round] = []
    ready = threading.Barrier(len(SHARES))

    def work(share: Share) -> None:
        with psycopg.connect(dsn, autocommit=True) as conn:
            ready.wait(WAIT_SECONDS_MAX)
            rounds.append(drive(conn, lambda: SHARED_NOW, share))

    workers = [threading.Thread(target=work, args=[share]) for share in SHARES]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(WAIT_SECONDS_MAX)
    assert len(rounds) == len(SHARES)
    assert [done.stuck for done in rounds] == [{}, {}]
    assert sum(done.ticks for done in rounds) == len(shared) * SHARED_SESSIONS
    _assert_all_ticked_once(owner_conn, shared)


def test_a_share_goes_past_a_run_of_its_own_that_is_stuck(
    owner_conn: Connection, shared: dict[UUID, Share]
) -> None:
    stuck = next(run_id for run_id, share in shared.items() if share == SHARES[0])
    owner_conn.execute(
        "UPDATE strategy_run SET strategy = 'no.such:Strategy' WHERE run_id = %s", [stuck]
    )
    done = drive(owner_conn, lambda: SHARED_NOW, SHARES[0])
    assert list(done.stuck) == [stuck]
    assert done.ticks == (len(shared) - 1) * SHARED_SESSIONS


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_every_user_is_of_one_share(of: int) -> None:
    shares = [Share(part, of) for part in range(1, of + 1)]
    for number in range(50):
        user_id = user_id_of(f"user {number}")
        assert sum(share.takes(user_id) for share in shares) == 1


@pytest.mark.parametrize(
    "given",
    ["0/2", "3/2", "1/0", "1", "1/", "/2", "a/b", "-1/2", "1/2/3", "1.5/2", "1/1001", "", "٣/"],
)
def test_a_share_that_is_none_is_refused_in_one_sentence(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schedule", "--once", f"--share={given}", "--dsn", "host=/nowhere"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("Error: ")
    assert said.err.count("\n") == 1
    assert "write for instance 1/2" in said.err
