"""Strategies that do what a test tells them; named as a user would name his own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from pydantic import Field

from engine.market.model import Bar
from engine.orders.model import Fill, Side
from engine.strategies.base import Context, Intent, Intents, Parameters, PlaceOrder, Strategy
from engine.strategies.sip import Sip

Hooks = dict[str, Callable[..., Intents]]

# What Scripted's hooks call, by their names; it is emptied after every test that uses ``hooks``.
HOOKS: Hooks = {}

# The lock that stops a Blocking strategy, for whoever holds it.
LOCK = 20010507


@pytest.fixture
def hooks() -> Iterator[Hooks]:
    """What Scripted does, to be filled by the test."""
    HOOKS.clear()
    yield HOOKS
    HOOKS.clear()


class ScriptedParameters(Parameters):
    """``units`` is any number above zero; ``note`` any text."""

    units: int = Field(default=1, gt=0)
    note: str = ""


class Scripted(Strategy):
    """Asks HOOKS for what it wants."""

    Parameters = ScriptedParameters
    parameters: ScriptedParameters

    def on_start(self, context: Context) -> Intents:
        return _call("on_start", context)

    def on_tick(self, context: Context) -> Intents:
        return _call("on_tick", context)

    def on_bar(self, context: Context, bar: Bar) -> Intents:
        return _call("on_bar", context, bar)

    def on_fill(self, context: Context, fill: Fill) -> Intents:
        return _call("on_fill", context, fill)

    def on_stop(self, context: Context) -> None:
        _call("on_stop", context)


def _call(hook: str, *arguments: Any) -> Intents:
    return HOOKS[hook](*arguments) if hook in HOOKS else None


SCRIPTED = f"{__name__}:{Scripted.__name__}"


class Watching(Sip):
    """Plans that are shown to a hook and left alone."""

    def on_tick(self, context: Context) -> Iterator[Intent]:
        yield from _call("on_tick", context) or ()


WATCHING = f"{__name__}:{Watching.__name__}"


class Blocking(Strategy):
    """Buys one unit of everything; its fills wait for LOCK in the database of OMS_TEST_LOCK_DSN."""

    def on_tick(self, context: Context) -> Intents:
        return [PlaceOrder(symbol, Side.BUY, Decimal(1)) for symbol in sorted(context.prices)]

    def on_fill(self, context: Context, fill: Fill) -> Intents:
        with psycopg.connect(os.environ["OMS_TEST_LOCK_DSN"], autocommit=True) as conn:
            conn.execute("SELECT pg_advisory_lock(%s)", [LOCK])
        return None


BLOCKING = f"{__name__}:{Blocking.__name__}"


class ForgetfulParameters(Parameters):
    """``seen`` is a list that a strategy can change in place."""

    seen: list[str] = Field(default_factory=list)


class Forgetful(Strategy):
    """Counts ticks in itself and in its parameters, which it shouldn't, and buys as many units."""

    Parameters = ForgetfulParameters
    parameters: ForgetfulParameters

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.ticks = 0

    def on_tick(self, context: Context) -> Intents:
        self.ticks += 1
        self.parameters.seen.append("a tick")
        units = max(self.ticks, len(self.parameters.seen))
        return [PlaceOrder(symbol, Side.BUY, Decimal(units)) for symbol in context.prices]


FORGETFUL = f"{__name__}:{Forgetful.__name__}"


class Unmakeable(Strategy):
    """Can't be made."""

    def __init__(self, parameters: Any) -> None:
        raise RuntimeError("no luck today")
