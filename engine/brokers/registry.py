"""Which adapter speaks to which kind of broker. Imported when asked for: some are slow to load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from engine.brokers.protocol import Broker
from engine.errors import BadInput

Factory = Callable[[Mapping[str, Any]], Broker]

# The account's broker word -> module and function that makes its adapter of account settings.
ADAPTERS: dict[str, str] = {"dummy": "engine.brokers.dummy.adapter:connect_to"}


def adapter(broker: str, settings: Mapping[str, Any]) -> Broker:
    """The adapter of a kind of broker; raises BadInput for one that there is none of."""
    if broker not in ADAPTERS:
        known = ", ".join(sorted(ADAPTERS))
        raise BadInput(f"there is no adapter for the broker {broker!r}; there are: {known}")
    module, _, name = ADAPTERS[broker].partition(":")
    factory: Factory = getattr(import_module(module), name)
    return factory(settings)
