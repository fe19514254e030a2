"""Everything as people run it: an exchange, a connector and a worker, each a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from broker_cases import ACCOUNT, Wire, a_broker_run
from exchange import ExchangeProcess
from waits import wait_until

from engine.db.connect import Connection
from engine.db.install import head

ROOT = Path(__file__).resolve().parents[2]
PLANS = ROOT / "plans"
END_SECONDS_MAX = 30
USER = "ann"
_PROGRAM = "import sys; from cli.main import main; sys.exit(main(sys.argv[1:]))"


@dataclass
class Office:
    """A run of ``ann`` whose account is at an exchange; ``conn`` is the owner's connection."""

    dsn: str
    wire: Wire
    exchanges: dict[str, ExchangeProcess]
    _processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    @property
    def conn(self) -> Connection:
        return self.wire.conn

    @property
    def exchange(self) -> ExchangeProcess:
        return self.exchanges[ACCOUNT]

    def connect(self, account: str = ACCOUNT) -> None:
        """Start the account's connector."""
        self._start(account, "connect", "--account", account, "--user", USER)

    def work(self) -> None:
        """Start the worker."""
        self._start("work", "work")

    def _start(self, name: str, *words: str) -> None:
        self._processes[name] = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *words],
            env=os.environ | {"PYTHONPATH": str(ROOT), "DB_DSN": self.dsn},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def end(self, name: str, signum: signal.Signals = signal.SIGTERM) -> None:
        """End a process: ``work``, or an account's connector."""
        process = self._processes.pop(name)
        process.send_signal(signum)
        process.wait(END_SECONDS_MAX)

    def close(self) -> None:
        for name in list(self._processes):
            self.end(name, signal.SIGKILL)
        for exchange in self.exchanges.values():
            exchange.stop()

    def reconcile(self, *words: str, account: str = ACCOUNT) -> dict[str, Any]:
        """What ``oms reconcile`` says."""
        named = ("reconcile", "--account", account, "--user", USER)
        told = subprocess.run(
            [sys.executable, "-c", _PROGRAM, *named, *words, "--json"],
            env=os.environ | {"PYTHONPATH": str(ROOT), "DB_DSN": self.dsn},
            capture_output=True,
            text=True,
            check=False,
        )
        assert told.stdout, told.stderr
        document: dict[str, Any] = json.loads(told.stdout)
        return document

    def is_up(self, account: str = ACCOUNT) -> None:
        """Wait until the account's connector is connected."""
        wait_until(
            lambda: (
                self.conn.execute(
                    "SELECT connected FROM broker_lease WHERE account = %s", [account]
                ).fetchone()
                == (True,)
            ),
            f"{account} to be connected",
        )

    def becomes(self, order_id: UUID, *statuses: str) -> dict[str, Any]:
        """Wait until the order has one of these statuses."""
        wait_until(
            lambda: self.wire.order(order_id, must=False).get("status") in statuses,
            f"order {order_id} to be {' or '.join(statuses)}",
        )
        return self.wire.order(order_id)

    def agrees(self, account: str = ACCOUNT) -> None:
        """After the dust has settled nothing differs from the exchange's books."""
        done = self.reconcile(account=account)
        assert (done["differences"], done["undecided"]) == ([], 0)


@contextmanager
def an_office(
    owner: Connection, dsn: str, folder: Path, plans: Mapping[str, str | Path | None]
) -> Iterator[Office]:
    """An office with one exchange for each account, each with its fault plan."""
    exchanges = {
        account: ExchangeProcess(folder / account, plan) for account, plan in plans.items()
    }
    # What the commands ask for; the tables are there, from sql/ itself.
    owner.execute("CREATE TABLE alembic_version (version_num text PRIMARY KEY)")
    owner.execute("INSERT INTO alembic_version VALUES (%s)", [head()])
    owner.execute("SELECT grant_roles()")
    run = a_broker_run(owner, user=USER, accounts=tuple(plans))
    office = Office(dsn, Wire(owner, run), exchanges)
    try:
        for account, exchange in exchanges.items():
            exchange.start()
            owner.execute(
                "UPDATE broker_account SET settings = %s, opening_cash = 1000000 "
                "WHERE account = %s",
                [json.dumps({"port": exchange.port, "account": ACCOUNT}), account],
            )
        yield office
    finally:
        office.close()
