"""nautilus_trader's backtest of the alternating strategy: ``BARS.csv EVERY`` -> {"seconds": ...}.

Its defaults, with logging off: a simulated venue, an equity, one-minute bars from outside. Runs in
the peers' environment, so it imports nothing of ours.
"""

from __future__ import annotations

import csv
import json
import sys
import time

from nautilus_trader.backtest.engine import BacktestEngine, BacktestEngineConfig
from nautilus_trader.config import LoggingConfig
from nautilus_trader.model.currencies import USD
from nautilus_trader.model.data import Bar, BarType
from nautilus_trader.model.enums import AccountType, OmsType, OrderSide, OrderStatus
from nautilus_trader.model.identifiers import InstrumentId, Symbol, Venue
from nautilus_trader.model.instruments import Equity
from nautilus_trader.model.objects import Money, Price, Quantity
from nautilus_trader.trading.strategy import Strategy

CASH_USD = 1_000_000
DECIMALS = 2
SECOND_NS = 1_000_000_000
MINUTE_NS = 60 * SECOND_NS


class Alternating(Strategy):  # type: ignore[misc]
    """Buys one unit, then sells it, at each bar of its minutes."""

    def __init__(self, instrument: Equity, bar_type: BarType, every: int) -> None:
        super().__init__()
        self._instrument = instrument
        self._bar_type = bar_type
        self._every = every
        self._side = OrderSide.BUY

    def on_start(self) -> None:
        self.subscribe_bars(self._bar_type)

    def on_bar(self, bar: Bar) -> None:
        if bar.ts_event // MINUTE_NS % self._every:
            return
        quantity = self._instrument.make_qty(1)
        self.submit_order(self.order_factory.market(self._instrument.id, self._side, quantity))
        self._side = OrderSide.SELL if self._side == OrderSide.BUY else OrderSide.BUY


def bars_of(path: str, bar_type: BarType) -> list[Bar]:
    """The bars of a file."""
    bars = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            prices = [Price.from_str(row[name]) for name in ("open", "high", "low", "close")]
            end_ns = int(row["end"]) * SECOND_NS
            bars.append(Bar(bar_type, *prices, Quantity.from_str(row["volume"]), end_ns, end_ns))
    return bars


def main(path: str, every: int) -> None:
    venue = Venue("XNYS")
    symbol = Symbol("SPY")
    instrument = Equity(
        InstrumentId(symbol, venue),
        symbol,
        USD,
        DECIMALS,
        price_increment=Price(0.01, DECIMALS),
        lot_size=Quantity(1, 0),
        ts_event=0,
        ts_init=0,
    )
    bar_type = BarType.from_str("SPY.XNYS-1-MINUTE-LAST-EXTERNAL")
    bars = bars_of(path, bar_type)
    engine = BacktestEngine(BacktestEngineConfig(logging=LoggingConfig(bypass_logging=True)))
    engine.add_venue(
        venue, OmsType.NETTING, AccountType.CASH, [Money(CASH_USD, USD)], base_currency=USD
    )
    engine.add_instrument(instrument)
    engine.add_data(bars)
    engine.add_strategy(Alternating(instrument, bar_type, every))
    began = time.perf_counter()
    engine.run()
    seconds = time.perf_counter() - began
    expected = sum(bar.ts_event // MINUTE_NS % every == 0 for bar in bars)
    filled = sum(order.status == OrderStatus.FILLED for order in engine.cache.orders())
    if filled != expected:
        sys.exit(f"nautilus_trader filled {filled} orders, not {expected}")
    print(json.dumps({"seconds": seconds, "fills": filled}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
