"""The dummy broker for tests: the real process, started here and ended by its own pid."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import uuid4

from programs import END_SECONDS_MAX, environment, oms_process

from engine.brokers.dummy.adapter import DummyBroker
from engine.brokers.dummy.control import Control
from engine.brokers.protocol import BrokerOrder


@dataclass
class ExchangeProcess:
    """An exchange that can be started, killed and started again on the same books and port."""

    folder: Path
    faults: str | Path | None = None
    seed: int | None = None
    prices: dict[str, str] = field(default_factory=lambda: {"AAPL": "100", "MSFT": "400"})
    session: str | None = None
    port: int = 0
    _process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process and wait until it listens; the port stays the same from then on."""
        process = subprocess.Popen(
            oms_process("broker", "dummy", *self._words(), "--json"),
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        self._process = process
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said, f"the exchange did not start: exit code {process.wait(END_SECONDS_MAX)}"
        self.port = int(json.loads(said)["port"])

    def _words(self) -> Sequence[str]:
        words = ["--port", str(self.port), "--state", str(self.folder)]
        if self.faults is not None:
            words += ["--faults", str(self.faults)]
        if self.seed is not None:
            words += ["--seed", str(self.seed)]
        if self.session is not None:
            words += ["--session", self.session]
        for symbol, price in self.prices.items():
            words += ["--price", f"{symbol}={price}"]
        return words

    @property
    def pid(self) -> int:
        assert self._process is not None, "the exchange isn't running"
        return self._process.pid

    def kill(self) -> None:
        """End it as a power cut would: SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """End it as a person would; its exit code."""
        return self._end(signal.SIGTERM)

    def _end(self, signum: signal.Signals) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(signum)
        code = process.wait(END_SECONDS_MAX)
        if process.stdout is not None:
            process.stdout.close()
        return code

    @contextmanager
    def paused(self) -> Iterator[None]:
        """It hears and says nothing for the length of a with statement; connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def control(self) -> Control:
        """The operator's connection; close it, or use it in a with statement."""
        return Control(self.port)

    def books(self, account: str = "DU1") -> dict[str, Any]:
        """The exchange's own truth about an account."""
        with self.control() as control:
            return control.books(account)

    def adapter(self, *, client_id: int = 0, account: str | None = None) -> DummyBroker:
        """A connector's adapter to it, not connected yet."""
        return DummyBroker(self.port, client_id=client_id, account=account)


@contextmanager
def running_exchange(folder: Path, **how: Any) -> Iterator[ExchangeProcess]:
    """An exchange for the length of a with statement; ``how`` as in ExchangeProcess."""
    exchange = ExchangeProcess(folder, **how)
    try:
        exchange.start()
        yield exchange
    finally:
        exchange.stop()


def order(
    side: str = "BUY", quantity: str = "10", symbol: str = "AAPL", **terms: Any
) -> BrokerOrder:
    """An order with a reference of its own: at the market, or with a limit if one is given."""
    terms = {name: value for name, value in terms.items() if value is not None}
    kind = "LIMIT" if "limit_price" in terms else "MARKET"
    prices = {
        name: Decimal(value)
        for name, value in terms.items()
        if name.endswith(("_price", "_amount", "_percent"))
    }
    words = {name: value for name, value in terms.items() if name not in prices}
    wanted: dict[str, Any] = {
        "order_ref": str(uuid4()),
        "symbol": symbol,
        "side": side,
        "quantity": Decimal(quantity),
        "order_type": kind,
        "time_in_force": "DAY",
    }
    return BrokerOrder(**(wanted | words | prices))
