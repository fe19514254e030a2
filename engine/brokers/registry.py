"""Which adapter speaks to which kind of broker. Imported when asked for: some are slow to load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.brokers.protocol import Broker
from engine.errors import BadInput

__all__ = ["ADAPTERS", "adapter"]

Factory = Callable[[Mapping[str, Any]], Broker]


def _dummy(settings: Mapping[str, Any]) -> Broker:
    from engine.brokers.dummy.adapter import DummyBroker

    if "port" not in settings:
        raise BadInput("the account's settings name no port of the dummy broker")
    return DummyBroker(
        int(settings["port"]),
        host=str(settings.get("host", "127.0.0.1")),
        client_id=int(settings.get("client_id", 0)),
        account=settings["account"],
    )


# By the account's broker word: what makes an adapter of the account's settings and name.
ADAPTERS: dict[str, Factory] = {"dummy": _dummy}


def adapter(broker: str, settings: Mapping[str, Any]) -> Broker:
    """The adapter of a kind of broker; raises BadInput for one that there is none of."""
    if broker not in ADAPTERS:
        known = ", ".join(sorted(ADAPTERS))
        raise BadInput(f"there is no adapter for the broker {broker!r}; there are: {known}")
    return ADAPTERS[broker](settings)
