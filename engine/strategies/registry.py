"""Finds a strategy by name and checks its parameters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from decimal import Decimal
from enum import Enum
from types import NoneType
from typing import Any
from uuid import UUID

from pydantic import ValidationError

from engine.errors import BadInput
from engine.strategies.base import Strategy
from engine.strategies.rebalance import Rebalance
from engine.strategies.sip import Sip

# What can't be changed in place, and needs no copy.
_FIXED = (str, int, float, Decimal, date, timedelta, Enum, UUID, NoneType)

SHIPPED: Mapping[str, type[Strategy]] = {"sip": Sip, "rebalance": Rebalance}


def find(name: str) -> type[Strategy]:
    """The strategy called ``name``: a shipped one, or ``package.module:Class``.

    Raises BadInput where there is none.
    """
    if name in SHIPPED:
        return SHIPPED[name]
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise BadInput(
            f"unknown strategy {name!r}; choose {' or '.join(sorted(SHIPPED))}, "
            "or name your own as package.module:Class"
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except Exception as error:  # whatever a user's module raises on import is the user's to read
        raise BadInput(f"strategy {name!r} can't be imported: {error!r}") from error
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise BadInput(f"{name!r} is no subclass of engine.strategies.base.Strategy")
    return found


def make(name: str, parameters: Mapping[str, Any]) -> Strategy:
    """A strategy with its parameters checked. Raises BadInput, naming the parameter."""
    return maker(name, parameters)()


def maker(name: str, parameters: Mapping[str, Any]) -> Callable[[], Strategy]:
    """Makes the strategy anew at each call; its parameters are checked once, and none is made yet.

    Each has parameters of its own: what one does to a list in them is nothing to the next.
    Raises BadInput, naming the parameter; so does each call, for a constructor that fails.
    """
    kind = find(name)
    try:
        checked = kind.Parameters.model_validate(dict(parameters))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'parameters'}: {e['msg']}" for e in error.errors()
        )
        raise BadInput(f"the parameters of strategy {name!r} don't fit: {problems}") from error
    is_fixed = all(isinstance(value, _FIXED) for _, value in checked)

    def made() -> Strategy:
        try:
            return kind(checked if is_fixed else checked.model_copy(deep=True))
        except Exception as error:  # a user's constructor may raise anything
            raise BadInput(f"strategy {name!r} can't be made: {error!r}") from error

    return made
