"""Fault plans by lot, for tests: the same seed gives the same plan."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from engine.brokers.dummy.faults import ORDER_ID_MAX, Plan

__all__ = ["random_plan"]

FAULTS_MAX = 6
_PRICES: Mapping[str, str] = MappingProxyType({"AAPL": "100", "MSFT": "400"})
_OF_ORDERS = ("ORDER_STATUS", "EXECUTION", "COMMISSION", "REJECTED", "CANCEL_REJECTED", "BUST")

_Fault = dict[str, Any]


def random_plan(seed: int) -> Plan:
    """A plan whose damage one reconciliation can mend.

    Left out is what only a person can mend: other accounts, stolen sessions, orders by hand,
    renamed symbols, commissions without a rate, silence for good.
    """
    lot = random.Random(f"plan/{seed}")
    count = lot.randint(1, FAULTS_MAX)
    faults = [make(lot) for make in lot.choices(_MAKERS, k=count)]
    symbols = [
        {
            "name": name,
            "price": price,
            "liquidity": lot.choice([None, "3", "7", "40"]),
            "walk_bps": lot.choice(["0", "20", "100"]),
        }
        for name, price in _PRICES.items()
    ]
    exchange = {
        "latency_seconds": lot.choice(["0", "0", "0.005", "0.02"]),
        "step_seconds": "0.05",
        "first_order_id": lot.choice([1, 1, 1_000, ORDER_ID_MAX - 5]),
        "clock_skew_seconds": lot.choice(["0", "0", "-45", "45"]),
    }
    return Plan.model_validate(
        {
            "title": f"By lot, seed {seed}",
            "seed": seed,
            "exchange": exchange,
            "symbol": symbols,
            "fault": faults,
        }
    )


def _when(lot: random.Random) -> _Fault:
    if lot.random() < 0.5:
        return {"nth": lot.randint(1, 12)}
    return {"probability": round(lot.uniform(0.02, 0.3), 2), "times": lot.randint(1, 8)}


def _drop(lot: random.Random) -> _Fault:
    on = lot.choice(["SUBMIT", "SUBMIT", "MODIFY", "CANCEL", "SNAPSHOT", "FILL"])
    moment = lot.choice(["BEFORE", "AFTER"])
    # Each time would be for ever: whoever comes back is dropped again.
    return {"do": "DROP", "on": on, "moment": moment, "nth": lot.randint(1, 12)}


def _message(lot: random.Random) -> _Fault:
    fault: _Fault = {"do": lot.choice(["SWALLOW", "REPEAT", "REORDER", "DELAY"])}
    fault |= {"message": lot.choice(_OF_ORDERS)} | _when(lot)
    if fault["do"] == "REPEAT":
        fault["copies"] = lot.randint(1, 3)
    elif fault["do"] == "REORDER":
        fault["by"] = lot.randint(1, 5)
    elif fault["do"] == "DELAY":
        fault["seconds"] = f"{lot.uniform(0.01, 0.2):.3f}"
    return fault


def _reject(lot: random.Random) -> _Fault:
    on = lot.choice(["SUBMIT", "MODIFY", "CANCEL"])
    return {"do": "REJECT", "on": on, "code": "MARGIN"} | _when(lot)


def _fill(lot: random.Random) -> _Fault:
    fault: _Fault = {"do": "FILL", "on": lot.choice(["CANCELED", "CANCEL", "SNAPSHOT"])}
    fault["moment"] = lot.choice(["BEFORE", "AFTER"])
    if lot.random() < 0.5:
        fault["quantity"] = lot.randint(1, 5)
    return fault | _when(lot)


def _correct(lot: random.Random) -> _Fault:
    change = f"{lot.choice([-1, 1]) * lot.uniform(0.01, 2):.2f}"
    more = lot.choice([0, 0, 1])
    return {"do": "CORRECT", "price_change": change, "quantity_change": more} | _when(lot)


def _overfill(lot: random.Random) -> _Fault:
    return {"do": "OVERFILL", "quantity": lot.randint(1, 3), "nth": lot.randint(1, 12)}


def _false_fill(lot: random.Random) -> _Fault:
    return {"do": lot.choice(["ZERO_FILL", "NEGATIVE_FILL"])} | _when(lot)


def _order_ids(lot: random.Random) -> _Fault:
    if lot.random() < 0.5:
        return {"do": "WRAP_ORDER_IDS", "on": "SUBMIT", "nth": lot.randint(1, 5)}
    return {"do": "RESTART_ORDER_IDS", "nth": lot.randint(2, 12)}


def _plain(do: str) -> Callable[[random.Random], _Fault]:
    return lambda lot: {"do": do} | _when(lot)


_MAKERS: tuple[Callable[[random.Random], _Fault], ...] = (
    _drop,
    _drop,
    _message,
    _message,
    _message,
    _reject,
    _fill,
    _correct,
    _overfill,
    _false_fill,
    _order_ids,
    _plain("BUST"),
    _plain("FORGET"),
    _plain("INACTIVE"),
    _plain("CHANGE_PERM_ID"),
    _plain("COMMISSION_FIRST"),
)
