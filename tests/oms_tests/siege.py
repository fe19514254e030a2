"""The whole house as processes, besieged: any of them may be killed at any time.

Whoever runs the house starts again what has ended, as a service manager does. A person places
orders through it all, as a client that asks again until it gets an answer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import TypeVar
from uuid import UUID

import psycopg
from broker_cases import Wire
from house import House, open_house
from programs import as_migrated
from settling import Settling
from waits import SECONDS_MAX, wait_until

from engine.brokers.dummy.control import Control
from engine.brokers.protocol import BrokerUnavailable
from engine.clock import utc_now
from engine.db.connect import open_connection
from engine.db.embedded import Server
from engine.db.install import OWNER_ROLE, load_schema
from engine.errors import (
    AlreadyHappened,
    BadInput,
    ConfigurationError,
    DatabaseUnavailable,
    Retryable,
    RuleViolation,
)
from engine.orders.by_hand import cancel_order, modify_order, place_order
from engine.orders.model import OrderType, Side
from engine.strategies.base import PlaceOrder
from engine.tick import run_tick

# What a server forgets when it is killed it has not acknowledged; only the machine could fail.
DURABLE = {"fsync": "off", "synchronous_commit": "on", "shared_buffers": "16MB"}
OPENING_CASH = Decimal(1_000_000)
AWAY = (DatabaseUnavailable, ConfigurationError, Retryable, psycopg.OperationalError)

Got = TypeVar("Got")


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that the account which runs Postgres can reach; removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="oms-siege-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def a_server(folder: Path, bin_dir: Path, **settings: str) -> Iterator[Server]:
    """A server of its own that may be killed; it is ended with the block."""
    server = Server(folder / "primary", bin_dir=bin_dir, settings=DURABLE | settings)
    server.start()
    try:
        yield server
    finally:
        server.stop("immediate")


def copy_of(server: Server, folder: Path, *, follows: bool = False) -> Server:
    """A base backup of a running server, with its settings, as a server that isn't started yet.

    One that ``follows`` is a standby, called by its folder's name.
    """
    folder.mkdir(mode=0o755)
    copy = Server(folder, bin_dir=server.bin_dir, settings=server.settings)
    where = psycopg.conninfo.make_conninfo(server.dsn(), application_name=folder.name)
    subprocess.run(
        [
            *(str(server.bin_dir / "pg_basebackup"), f"--dbname={where}", f"--pgdata={copy.data}"),
            *("--checkpoint=fast", "--wal-method=stream", "--no-sync"),
            *(["--write-recovery-conf"] if follows else []),
        ],
        check=True,
        capture_output=True,
    )
    # The copy is run by whom the server is run by.
    owner = server.data.stat()
    for path in (copy.data, *copy.data.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
    return copy


def make_synchronous(primary: Server) -> None:
    """Have every commit wait for the standby from now on."""
    with psycopg.connect(primary.dsn(), autocommit=True) as admin:
        admin.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        admin.execute("SELECT pg_reload_conf()")
        wait_until(
            lambda: admin.execute(
                "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
            ).fetchone(),
            "synchronous standby",
        )


def promote(standby: Server) -> None:
    """Make a standby the primary."""
    owner = standby.data.stat()
    subprocess.run(
        [str(standby.bin_dir / "pg_ctl"), "promote", "-D", str(standby.data), "--wait"],
        check=True,
        capture_output=True,
        user=owner.st_uid,
        group=owner.st_gid,
        cwd="/",
    )


def dsn_of_both(dsn: str, first: Server, second: Server) -> str:
    """The DSN of whichever of two servers takes writes."""
    hosts = [psycopg.conninfo.conninfo_to_dict(each.dsn()) for each in (first, second)]
    return psycopg.conninfo.make_conninfo(
        dsn,
        host=",".join(str(each["host"]) for each in hosts),
        port=",".join(str(each["port"]) for each in hosts),
        target_session_attrs="read-write",
    )


def install(server: Server) -> str:
    """Put the schema into a new server; returns the owner's DSN."""
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {OWNER_ROLE} LOGIN CREATEROLE".encode())
        admin.execute(f"GRANT CREATE ON SCHEMA public TO {OWNER_ROLE} WITH GRANT OPTION".encode())
    dsn = psycopg.conninfo.make_conninfo(server.dsn(), user=OWNER_ROLE)
    with open_connection(dsn) as owner:
        load_schema(owner)
        as_migrated(owner)
    return dsn


@dataclass
class Siege(Settling):
    """A house whose processes somebody kills and somebody starts again, and its client."""

    wire: Wire
    house: House
    lot: Random
    control: Control
    # Whether somebody starts again what has ended.
    has_manager: bool = True
    ticks: list[datetime] = field(default_factory=list)
    # What a client was told was placed, and what it may have placed.
    acknowledged: dict[str, UUID] = field(default_factory=dict)
    asked: int = 0
    prices: dict[str, Decimal] = field(
        default_factory=lambda: {"AAPL": Decimal(100), "MSFT": Decimal(400)}
    )

    # --- Processes --------------------------------------------------------------------------

    def keep_up(self) -> None:
        """Start what has ended, as a service manager does."""
        for name, start in (("work", self.house.work), ("connect", self.house.start_connector)):
            program = self.house.programs.get(name)
            if program is None or (self.has_manager and program.has_ended):
                start()

    def kill_program(self, name: str) -> None:
        self.house.programs[name].kill()
        if name == "connect":
            # What the seconds do that its lease still runs.
            self.insist(self.house.end_lease)
        self.keep_up()

    def kill_exchange(self) -> None:
        self.house.exchange.kill()
        self.house.exchange.start()
        self.control.close()
        self.control = self.house.exchange.control()

    def wait_until_up(self) -> None:
        """Wait until connector and worker are at work, started again where that is needed."""

        def look() -> bool:
            self.keep_up()
            return self.insist(self.house.is_connected)

        wait_until(look, "connection")

    def end(self) -> None:
        self.house.end()
        self.control.close()
        self.conn.close()

    def story(self) -> str:
        return f"{self.house.story()}\n{super().story()}"

    # --- A client that doesn't give up ------------------------------------------------------

    def insist(self, act: Callable[[], Got]) -> Got:
        """Do it until it is done, on a new connection where the old one broke."""
        ends_at = time.monotonic() + SECONDS_MAX
        while True:
            try:
                if self.conn.closed:
                    self.wire.conn = open_connection(self.house.dsn)
                return act()
            except AWAY:
                assert time.monotonic() < ends_at, "the database does not come back"
                with suppress(psycopg.Error):
                    self.conn.execute("SELECT 1")
                time.sleep(0.05)

    def place(self) -> None:
        """Place an order, once: its own name tells whether it was placed before we were told."""
        self.asked += 1
        name = f"order-{self.asked}"
        symbol = self.lot.choice(list(self.prices))
        limit = self.lot.choice([None, self._near(symbol), self._near(symbol)])
        wanted = PlaceOrder(
            symbol,
            self.lot.choice([Side.BUY, Side.BUY, Side.SELL]),
            Decimal(self.lot.randint(1, 20)),
            OrderType.MARKET if limit is None else OrderType.LIMIT,
            limit_price=limit,
            client_order_id=name,
        )

        def once() -> UUID:
            try:
                return place_order(self.conn, *self._key, wanted)
            except AlreadyHappened:
                return self._named(name)

        self.acknowledged[name] = self.insist(once)

    def tick(self) -> None:
        """A tick, at a time that is the same however often it takes to be told of it."""
        at = utc_now()
        self.insist(lambda: run_tick(self.conn, *self._key, at, {}))
        self.ticks.append(at)

    def _named(self, name: str) -> UUID:
        row = self.conn.execute(
            "SELECT order_id FROM orders WHERE user_id = %s AND client_order_id = %s",
            [self.user_id, name],
        ).fetchone()
        assert row is not None
        order_id: UUID = row[0]
        return order_id

    @property
    def _key(self) -> tuple[UUID, UUID]:
        return self.wire.run.user_id, self.wire.run.run_id

    def _near(self, symbol: str) -> Decimal:
        moved = self.prices[symbol] * Decimal(self.lot.randint(970, 1030)) / 1000
        return moved.quantize(Decimal("0.01"))

    def cancel(self) -> None:
        if self.acknowledged:
            order_id = self.lot.choice(list(self.acknowledged.values()))
            self.insist(lambda: cancel_order(self.conn, *self._key, order_id))

    def modify(self) -> None:
        if self.acknowledged:
            order_id = self.lot.choice(list(self.acknowledged.values()))
            quantity = Decimal(self.lot.randint(1, 25))
            with suppress(RuleViolation, BadInput):
                self.insist(
                    lambda: modify_order(self.conn, *self._key, order_id, quantity=quantity)
                )

    def move_price(self) -> None:
        symbol = self.lot.choice(list(self.prices))
        self.prices[symbol] = self._near(symbol)
        with suppress(BrokerUnavailable):
            self.control.set_price(symbol, self.prices[symbol])

    def busy(self, steps: int, *also: Callable[[], object]) -> None:
        """A busy stretch, with each of ``also`` at a random point of it."""
        acts: list[Callable[[], object]] = self.lot.choices(
            [self.place, self.cancel, self.modify, self.move_price, self.tick],
            [5, 1, 1, 2, 1],
            k=steps,
        )
        for act in also:
            acts.insert(self.lot.randint(0, len(acts)), act)
        for act in acts:
            act()
            self.keep_up()

    # --- What must hold ---------------------------------------------------------------------

    def must_agree(self, *, was_restored: bool = False) -> None:
        """As for everybody; and whatever was acknowledged is there, once."""
        super().must_agree(was_restored=was_restored)
        rows = self.conn.execute(
            "SELECT client_order_id, order_id FROM orders WHERE user_id = %s", [self.user_id]
        ).fetchall()
        assert dict(rows) == self.acknowledged
        assert len(rows) == self.asked
        told = self.conn.execute(
            """SELECT logical_time FROM event_ledger WHERE user_id = %s AND event_type = 'TICK'
               ORDER BY seq""",
            [self.user_id],
        ).fetchall()
        assert [at for (at,) in told] == self.ticks

    def executions(self) -> set[str]:
        """The executions that anybody may have seen."""
        rows = self.insist(
            lambda: self.conn.execute(
                "SELECT execution_id FROM execution WHERE user_id = %s", [self.user_id]
            ).fetchall()
        )
        return {name for (name,) in rows}


@contextmanager
def a_siege(dsn: str, folder: Path, seed: int) -> Iterator[Siege]:
    """A house that is up, with an exchange that doesn't err; the kills are the test's."""
    house = open_house(dsn, open_connection(dsn), folder, initial_cash=OPENING_CASH)
    siege = Siege(house.wire, house, Random(f"siege/{seed}"), house.exchange.control())
    try:
        siege.wait_until_up()
        yield siege
    finally:
        siege.end()
