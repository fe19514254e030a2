"""backtrader's backtest of the alternating strategy: ``BARS.csv EVERY`` -> {"seconds": ...}.

Its defaults: the default observers record cash and value at every bar, as our marks do. An order
fills at the next bar's open, so that the last bar's doesn't. Runs in the peers' environment, so it
imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
import time

import backtrader as bt
import pandas as pd

CASH_USD = 1_000_000
MINUTES_A_DAY = 1_440
# backtrader counts days from the year 1.
DAY_OF_1970 = 719_163


class Alternating(bt.Strategy):  # type: ignore[misc]
    """Buys one unit, then sells it, at each bar of its minutes."""

    params = (("every", 1),)

    def __init__(self) -> None:
        self.fills = 0
        self._buying = True

    def notify_order(self, order: bt.Order) -> None:
        if order.status == order.Completed:
            self.fills += 1

    def next(self) -> None:
        minute = round((self.data.datetime[0] - DAY_OF_1970) * MINUTES_A_DAY)
        if minute % self.p.every:
            return
        if self._buying:
            self.buy(size=1)
        else:
            self.sell(size=1)
        self._buying = not self._buying


def main(path: str, every: int) -> None:
    bars = pd.read_csv(path)
    minutes = bars["end"] // 60
    expected = int((minutes[:-1] % every == 0).sum())
    data = bars.drop(columns="end").set_index(pd.to_datetime(bars["end"], unit="s"))
    cerebro = bt.Cerebro()
    cerebro.broker.setcash(CASH_USD)
    cerebro.adddata(bt.feeds.PandasData(dataname=data))
    cerebro.addstrategy(Alternating, every=every)
    began = time.perf_counter()
    (strategy,) = cerebro.run()
    seconds = time.perf_counter() - began
    if strategy.fills != expected:
        sys.exit(f"backtrader filled {strategy.fills} orders, not {expected}")
    print(json.dumps({"seconds": seconds, "fills": strategy.fills}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
