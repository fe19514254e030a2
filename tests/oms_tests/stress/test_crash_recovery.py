"""What is left after a crash: snapshots and the events after them."""

from __future__ import annotations

import os
import sys
import threading

import psycopg
import pytest
from broker_cases import ACCOUNT, Wire, a_broker_run
from chaos import Session, Stand, a_loop, a_stand
from siege import a_server, a_siege, copy_of, install, open_folder
from snapshot_cases import Books
from traded_books import Book, a_life
from waits import wait_until, wait_until_blocked

from engine.brokers.dummy.random_plans import random_plan
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.db.embedded import Server
from engine.db.install import OWNER_ROLE
from engine.errors import DatabaseUnavailable
from engine.inbox import apply_batch
from engine.orders import broker_write
from engine.rebuild import fold
from engine.reconcile import reconcile
from engine.runs import Run, find_run


def the_books(conn: Connection, run: Run) -> tuple[object, ...]:
    """The same as the tables have them, without what the ledger doesn't tell."""
    return (
        find_run(conn, run.run_id).cash,
        conn.execute(
            """SELECT order_id, status, status_at, status_reason, reject_code, quantity,
                      filled_quantity, filled_notional, limit_price, reference_price
               FROM orders WHERE user_id = %s AND run_id = %s ORDER BY order_id""",
            [run.user_id, run.run_id],
        ).fetchall(),
        conn.execute(
            """SELECT symbol, quantity, cost_basis, realized_pnl FROM position
               WHERE user_id = %s AND run_id = %s ORDER BY symbol""",
            [run.user_id, run.run_id],
        ).fetchall(),
    )


def told(conn: Connection, run: Run, seq: int) -> tuple[object, ...]:
    """What a fold says of the same, in the tables' types."""
    books = fold(conn, run, seq)
    return (
        books.cash,
        conn.execute(
            """SELECT (o).order_id, (o).status, (o).status_at, (o).status_reason, (o).reject_code,
                      (o).quantity, (o).filled_quantity, (o).filled_notional, (o).limit_price,
                      (o).reference_price
               FROM unnest(%s::text[]::orders[]) o ORDER BY 1""",
            [list(books.orders)],
        ).fetchall(),
        conn.execute(
            """SELECT (p).symbol, (p).quantity, (p).cost_basis, (p).realized_pnl
               FROM unnest(%s::text[]::public.position[]) p ORDER BY 1""",
            [list(books.positions)],
        ).fetchall(),
    )


def newest(conn: Connection, run: Run) -> int:
    row = conn.execute(
        "SELECT max(seq) FROM event_ledger WHERE user_id = %s AND run_id = %s",
        [run.user_id, run.run_id],
    ).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.scenario("SNAPSHOT-DIVERGENCE")
def test_snapshot_plus_tail_events_equals_full_replay(owner_conn: Connection) -> None:
    """From every event on: the books there, and the events after it, come to the same end."""
    run = a_life(owner_conn)
    last = newest(owner_conn, run)
    whole = fold(owner_conn, run, last)
    assert last > 20
    for seq in range(last + 1):
        snapshot = fold(owner_conn, run, seq)
        assert fold(owner_conn, run, last, snapshot) == whole, f"after event {seq}"
    assert told(owner_conn, run, last) == the_books(owner_conn, run)


def test_a_snapshot_of_a_run_at_a_broker_holds_too(conn: Connection) -> None:
    book = Book(conn, broker="dummy")
    book.trade("10", "100.50")
    book.bust(book.trade("5", "200"), "5", "200")
    book.trade("-14", "101")
    book.fill(book.order("10", "AAPL"), "4", "99")
    left = book.order("3", "AAPL")
    conn.execute("SELECT order_cancel(%s, %s, %s)", [*book.key, left])
    run = find_run(conn, book.run_id)
    last = newest(conn, run)
    whole = fold(conn, run, last)
    for seq in range(last + 1):
        assert fold(conn, run, last, fold(conn, run, seq)) == whole
    assert told(conn, run, last) == the_books(conn, run)


def _race(
    wire: Wire, dsn: str, *, reconcile_first: bool, snapshot_first: bool
) -> tuple[object, ...]:
    """A snapshot that lacks an order, and its fill of the same moment: what they come to.

    Both have arrived; one transaction takes in the one while the other, which must wait for it,
    takes in the other.
    """
    order_id = wire.working()
    books = Books(wire)
    books.positions = {"AAPL": str(wire.position() + 10)}
    books.cash = {"USD": str(wire.cash() - 1000)}
    snapshot_id, moment = books.ask(), wire.now
    if snapshot_first:
        books.answer(snapshot_id, at=moment)
    wire.fill(order_id, "10", "100", f"E-{order_id}", at=moment)
    if not snapshot_first:
        books.answer(snapshot_id, at=moment)
    user_id = wire.run.user_id

    def compare(conn: Connection) -> None:
        reconcile(conn, user_id, ACCOUNT, moment)

    def take_in(conn: Connection) -> None:
        apply_batch(conn, user_id, ACCOUNT)

    first, second = (compare, take_in) if reconcile_first else (take_in, compare)
    with open_connection(dsn) as early, open_connection(dsn) as late:
        waiting = threading.Thread(target=second, args=[late])
        with early.transaction():
            early.execute("SELECT FROM strategy_run FOR NO KEY UPDATE")
            first(early)
            waiting.start()
            wait_until_blocked(wire.conn, late, by=early)
        waiting.join()
    wire.apply()
    books.compare()
    assert books.reconcile().differences == []
    assert wire.alerts() == []
    order = wire.order(order_id)
    return order["status"], order["filled_quantity"], wire.position(), wire.cash()


@pytest.mark.scenario("RECONCILE-RACE")
def test_reconcile_vs_fill_race_resolves_consistently(dsn: str, owner_conn: Connection) -> None:
    wire = Wire(owner_conn, a_broker_run(owner_conn))
    for number, (reconcile_first, snapshot_first) in enumerate(
        [(True, True), (True, False), (False, True), (False, False)], start=1
    ):
        came_to = _race(wire, dsn, reconcile_first=reconcile_first, snapshot_first=snapshot_first)
        assert came_to == ("FILLED", 10, 10 * number, 100_000 - 1000 * number)


# How often everything is killed once, in random order; the nightly job sets more.
ROUNDS = int(os.environ.get("OMS_CRASH_ROUNDS", "1"))
FIRST = int(os.environ.get("OMS_CRASH_SEED", "1"))
STEPS_A_ROUND = 40


@pytest.mark.slow
@pytest.mark.scenario("PERSIST-01")
@pytest.mark.parametrize("seed", range(FIRST, FIRST + ROUNDS))
def test_crash_and_restore_has_no_phantom_positions(server: Server, seed: int) -> None:
    """Worker, connector, exchange and Postgres, each killed at a random point of a busy session."""
    with (
        open_folder() as folder,
        a_server(folder, server.bin_dir) as own,
        a_siege(install(own), folder, seed) as siege,
    ):

        def kill_postgres() -> None:
            own.kill()
            own.start()

        try:
            siege.busy(
                STEPS_A_ROUND,
                lambda: siege.kill_program("work"),
                lambda: siege.kill_program("connect"),
                siege.kill_exchange,
                kill_postgres,
            )
            siege.wait_until_up()
            siege.settle()
            siege.must_agree()
        except BaseException:
            sys.stderr.write(f"{siege.story()}\nto repeat it: OMS_CRASH_SEED={seed}\n")
            raise


def a_torn_batch(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's backend dies when all is written and nothing is committed."""
    whole = broker_write.Writer.write_out
    torn: list[int] = []

    def tear(writer: broker_write.Writer) -> None:
        whole(writer)
        torn.append(writer._conn.info.backend_pid)
        stand.owner.execute("SELECT pg_terminate_backend(%s)", [torn[-1]])
        writer._conn.execute("SELECT 1")

    before = books_of(stand)
    with monkeypatch.context() as patch:
        patch.setattr(broker_write.Writer, "write_out", tear)
        with pytest.raises(DatabaseUnavailable):
            stand.work()
    assert len(torn) == 1
    stand.use(open_connection(stand.dsn, role=ENGINE_ROLE))
    assert books_of(stand) == before


def books_of(stand: Stand) -> tuple[object, ...]:
    """What a batch of the inbox changes."""
    user = [stand.user_id]
    return (
        the_books(stand.owner, stand.wire.run),
        stand.owner.execute(
            """SELECT number, finding FROM broker_event
               WHERE user_id = %s AND applied_at IS NOT NULL ORDER BY number""",
            user,
        ).fetchall(),
        stand.owner.execute(
            "SELECT seq, hash FROM event_ledger WHERE user_id = %s ORDER BY seq", user
        ).fetchall(),
    )


def rows_waiting(stand: Stand) -> int:
    """How many words of the exchange wait to be applied."""
    row = stand.owner.execute(
        """SELECT count(*) FROM broker_event
           WHERE user_id = %s AND applied_at IS NULL AND kind = 'ORDER_STATUS'""",
        [stand.user_id],
    ).fetchone()
    assert row is not None
    return int(row[0])


def restore(stand: Stand, backup: Server) -> None:
    """Go on with a database that is older than what was done, as the runbook says."""
    backup.start()
    stand.dsn = psycopg.conninfo.make_conninfo(backup.dsn(), user=OWNER_ROLE)
    stand.owner.close()
    stand.owner = open_connection(stand.dsn)
    stand.use(open_connection(stand.dsn, role=ENGINE_ROLE))
    stand.owner.execute("SELECT commands_doubt(user_id, account) FROM broker_account")
    stand.owner.execute("UPDATE broker_lease SET expires_at = now(), connected = false")


@pytest.mark.slow
@pytest.mark.scenario("PERSIST-02")
@pytest.mark.parametrize("seed", range(FIRST, FIRST + ROUNDS))
def test_partial_write_detected_and_recovered_from_backup_or_reconcile(
    server: Server, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Half-written words leave nothing; and from an older backup the broker's truth comes back."""
    with (
        open_folder() as folder,
        a_server(folder, server.bin_dir) as own,
        open_connection(install(own)) as owner,
        a_loop() as loop,
    ):
        dsn = owner.info.dsn
        exchange = folder / "exchange"
        engine = open_connection(dsn, role=ENGINE_ROLE)
        with a_stand(dsn, owner, engine, loop, exchange, random_plan(seed), "ann") as stand:
            with stand.connected():
                Session(stand, seed).run()
                stand.place_one()
                wait_until(lambda: rows_waiting(stand), "words of the exchange")
                a_torn_batch(stand, monkeypatch)
                stand.settle()
            stand.must_agree()

            # Orders that wait when the backup is made, and are sent since.
            waiting = [stand.place_one() for _ in range(3)]
            backup = copy_of(own, folder / "backup")
            stand.control.freeze(False)
            with stand.connected():
                Session(stand, seed + 1).run()
                stand.settle()
            stand.must_agree()
            own.kill()
            try:
                restore(stand, backup)
                with stand.connected():
                    stand.settle()
                assert {str(order_id) for order_id in waiting} <= set(stand.sent)
                stand.must_agree(was_restored=True)
            finally:
                backup.stop("immediate")
                stand.conn.close()
                stand.owner.close()
