"""The whole house as real processes: exchanges, connectors and worker, around one database."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from broker_cases import ACCOUNT, Wire, a_broker_run
from exchange import ExchangeProcess
from programs import END_SECONDS_MAX, as_migrated, environment, oms_process
from psycopg.types.json import Jsonb
from waits import SECONDS_MAX, wait_until

from cli.main import main
from engine.db.connect import Connection
from engine.orders.by_hand import place_order
from engine.orders.model import OrderType, Side
from engine.strategies.base import PlaceOrder

# What the exchange opens an account with.
EXCHANGE_CASH = Decimal(1_000_000)


class Program:
    """An `oms` command as a process of its own, ended by its own pid."""

    def __init__(self, words: Sequence[str], dsn: str) -> None:
        self.words = list(words)
        # A file: a pipe that nobody reads would stop the process.
        with tempfile.NamedTemporaryFile("w", prefix="oms-", delete=False) as self._output:
            self._process = subprocess.Popen(
                oms_process(*self.words),
                env=environment(DB_DSN=dsn),
                stdout=self._output,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        """SIGKILL: as a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM: as a person would; its exit code."""
        return self._end(signal.SIGTERM)

    def interrupt(self) -> int:
        """SIGINT: as Ctrl-C does; its exit code."""
        return self._end(signal.SIGINT)

    def log(self) -> list[dict[str, Any]]:
        """The lines of its log."""
        lines = self.said().splitlines(keepends=True)
        whole = [line for line in lines if line.startswith("{") and line.endswith("}\n")]
        return [line for line in map(json.loads, whole) if "event" in line]

    def codes(self) -> list[str]:
        """The codes of its log, as told."""
        return [line["event"] for line in self.log()]

    def wait(self) -> int:
        """Wait until it ends by itself; its exit code."""
        return self._process.wait(SECONDS_MAX)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def _end(self, number: signal.Signals) -> int:
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self._process.wait(END_SECONDS_MAX)

    def forget(self) -> None:
        """Throw away what it has printed."""
        Path(self._output.name).unlink(missing_ok=True)

    def said(self) -> str:
        """What it has printed so far."""
        return Path(self._output.name).read_text(encoding="utf-8")


@dataclass
class House:
    """One user with one run and its accounts, each at an exchange; what is started ends with it."""

    dsn: str
    wire: Wire
    exchanges: dict[str, ExchangeProcess]
    programs: dict[str, Program] = field(default_factory=dict)

    @property
    def exchange(self) -> ExchangeProcess:
        """Where the run trades first."""
        return self.exchanges[self.wire.account]

    def connect(self, account: str = ACCOUNT) -> Program:
        """Start an account's connector and wait until it is logged on."""
        connector = self.start_connector(account)
        wait_until(lambda: self.is_connected(account), f"connection of {account}")
        return connector

    def start_connector(self, account: str = ACCOUNT) -> Program:
        """Start an account's connector; the first account's is called just that."""
        name = "connect" if account == self.wire.account else f"connect {account}"
        return self.start(name, "connect", "--user", "ann", "--account", account)

    def start(self, name: str, *words: str) -> Program:
        """Start an `oms` command."""
        if name in self.programs:
            self.programs[name].forget()
        self.programs[name] = Program(words, self.dsn)
        return self.programs[name]

    def staff(self) -> None:
        """Start worker and connector, and wait until all that the broker knows is compared."""
        before = self.reconciled()
        self.work()
        self.connect()
        wait_until(lambda: self.reconciled() > before, "first comparison")

    def set_account(self, **columns: Any) -> None:
        """Change how the account may be traded; its connector reads that when it starts."""
        changes = ", ".join(f"{name} = %s" for name in columns)
        self.wire.conn.execute(
            f"UPDATE broker_account SET {changes} WHERE user_id = %s AND account = %s",
            [*columns.values(), self.wire.run.user_id, self.wire.account],
        )

    def end_lease(self) -> None:
        """Let the lease of a killed connector be over, without waiting for it."""
        self.wire.conn.execute(
            "UPDATE broker_lease SET expires_at = clock_timestamp(), connected = false"
            " WHERE user_id = %s",
            [self.wire.run.user_id],
        )

    def oms(self, *words: str) -> tuple[int, str]:
        """Run an `oms` command to its end, in this process; its exit code and what it printed."""
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed):
            code = main([*words, "--dsn", self.dsn])
        return code, printed.getvalue()

    def sent_refs(self) -> list[str]:
        """The references of the orders that the exchange has, in the order of their arrival."""
        return [each["order_ref"] for each in self.exchange.books()["orders"]]

    def heard(self, kind: str) -> list[Any]:
        """What the broker said of this kind, in order."""
        found = self.rows(
            "SELECT kind, payload FROM broker_event WHERE user_id = %s ORDER BY number"
        )
        return [payload for each, payload in found if each == kind]

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """What a query finds; its one parameter is the user."""
        return self.wire.conn.execute(query.encode(), [self.wire.run.user_id]).fetchall()

    def work(self, name: str = "work") -> Program:
        """Start a worker."""
        return self.start(name, "work")

    def is_connected(self, account: str = ACCOUNT) -> bool:
        row = self.wire.conn.execute(
            """SELECT connected AND expires_at > now() FROM broker_lease
               WHERE user_id = %s AND account = %s""",
            [self.wire.run.user_id, account],
        ).fetchone()
        return bool(row and row[0])

    def place(self, side: str = "BUY", quantity: str = "10", **terms: Any) -> UUID:
        """Place an order as `oms order place` does."""
        limit = terms.pop("limit_price", None)
        wanted = PlaceOrder(
            terms.pop("symbol", "AAPL"),
            Side(side),
            Decimal(quantity),
            OrderType.MARKET if limit is None else OrderType.LIMIT,
            limit_price=None if limit is None else Decimal(limit),
            **terms,
        )
        return place_order(self.wire.conn, self.wire.run.user_id, self.wire.run.run_id, wanted)

    def status(self, order_id: UUID) -> str:
        return str(self.wire.order(order_id)["status"])

    def wait_status(self, order_id: UUID, *wanted: str) -> str:
        """Wait until an order is in one of these statuses."""
        wait_until(lambda: self.status(order_id) in wanted, f"{wanted} of {order_id}")
        return self.status(order_id)

    def wait_event(self, code: str) -> Any:
        """Wait for an event of the run; its payload."""
        return wait_until(lambda: self.wire.events(code), code)[-1][1]

    def wait_alert(self, code: str) -> None:
        wait_until(lambda: code in self.wire.alerts(), f"alert {code}")

    def settled(self) -> bool:
        """Whether nothing waits in outbox or inbox."""
        row = self.wire.conn.execute(
            """SELECT (SELECT count(*) FROM broker_command
                       WHERE user_id = %(user)s AND done_at IS NULL)
                    + (SELECT count(*) FROM broker_event
                       WHERE user_id = %(user)s AND applied_at IS NULL)""",
            {"user": self.wire.run.user_id},
        ).fetchone()
        return bool(row and row[0] == 0)

    def wait_settled(self) -> None:
        wait_until(self.settled, "quiet outbox and inbox")

    def reconciled(self) -> int:
        """How many reconciliations were stored."""
        row = self.wire.conn.execute(
            "SELECT count(*) FROM reconciliation WHERE user_id = %s", [self.wire.run.user_id]
        ).fetchone()
        return int(row[0]) if row else 0

    def reconcile(self, *words: str, account: str = ACCOUNT) -> Any:
        """What `oms reconcile` says."""
        _, printed = self.oms("reconcile", "--user", "ann", "--account", account, *words, "--json")
        return json.loads(printed)

    def agrees(self, account: str = ACCOUNT) -> None:
        """Once all is settled, `oms reconcile` finds nothing that differs."""
        done = self.reconcile(account=account)
        assert (done["differences"], done["undecided"]) == ([], 0)

    def story(self) -> str:
        """What its programs printed and what was asked, said and done, for who reads a failure."""
        parts = [f"--- {name}\n{each.said()[-4000:]}" for name, each in self.programs.items()]
        parts += [" ".join(map(str, row)) for query in _STORY for row in self.rows(query)]
        return "\n".join(parts)

    def end(self) -> None:
        for program in self.programs.values():
            program.kill()
            program.forget()
        for exchange in self.exchanges.values():
            exchange.stop()


# What a test that failed shows besides.
_STORY = (
    """SELECT kind, priority, claimed_at::time, done_at::time, outcome, payload FROM broker_command
       WHERE user_id = %s ORDER BY created_at""",
    """SELECT number, kind, received_at::time, applied_at::time, finding, code, payload
       FROM broker_event WHERE user_id = %s ORDER BY number""",
    "SELECT event_type, subject, payload FROM event_ledger WHERE user_id = %s ORDER BY seq",
    "SELECT code, message FROM alert WHERE user_id = %s ORDER BY raised_at",
)


def audit_findings(conn: Connection) -> list[tuple[Any, ...]]:
    """What the audit views find."""
    views = conn.execute(
        "SELECT viewname FROM pg_views WHERE viewname LIKE 'audit\\_%' ORDER BY viewname"
    ).fetchall()
    return [
        (view, *row)
        for (view,) in views
        for row in conn.execute(f"SELECT subject, finding FROM {view}").fetchall()
    ]


def open_house(
    dsn: str,
    conn: Connection,
    folder: Path,
    *,
    faults: str | None = None,
    accounts: tuple[str, ...] = (ACCOUNT,),
    **terms: Any,
) -> House:
    """A house whose exchanges run: one for each account, of which the first has the faults."""
    run = a_broker_run(conn, accounts=accounts, **terms)
    house = House(dsn, Wire(conn, run, accounts[0]), {})
    for account in accounts:
        exchange = ExchangeProcess(folder / account, faults if account == accounts[0] else None)
        house.exchanges[account] = exchange
        exchange.start()
        conn.execute(
            "UPDATE broker_account SET settings = %s, opening_cash = %s"
            " WHERE user_id = %s AND account = %s",
            [Jsonb({"port": exchange.port, "client_id": 7}), EXCHANGE_CASH, run.user_id, account],
        )
    return house


@contextmanager
def a_house(dsn: str, conn: Connection, folder: Path, **how: Any) -> Iterator[House]:
    """An open house; connectors and worker are started by the test. ``how`` as in open_house.

    ``conn`` is an autocommit connection of the owner. At the end the audit must find nothing.
    """
    as_migrated(conn)
    house = open_house(dsn, conn, folder, **how)
    try:
        yield house
    except BaseException:
        sys.stderr.write(house.story())
        raise
    finally:
        house.end()
    assert audit_findings(conn) == []
