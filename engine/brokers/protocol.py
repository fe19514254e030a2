"""What a connector and a broker say to each other, in our words, whatever the broker.

An adapter (one per kind of broker) turns these into the broker's own wire and back. It keeps no
order state: what it hears it passes on, in the order in which it heard it. All calls are
coroutines, so that a slow broker blocks nobody.

``order_ref`` is our order's uuid as text; it travels in the broker's order reference and is the
only key that we rely on. ``broker_order_id`` may restart, ``perm_id`` may be 0 at first and
change: both are hints that are passed on. Quantities are in units, prices in the instrument's
currency per unit, both Decimals; moments are aware datetimes in UTC.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Protocol

from engine.errors import EngineError

# The kinds of brokers that there are adapters for; ``engine.brokers.registry`` has them.
KINDS = frozenset({"dummy"})


class MessageKind(StrEnum):
    """What a broker may say; the payload's keys stand beside each."""

    ORDER_STATUS = "ORDER_STATUS"  # status, filled, remaining, [reason]
    MODIFIED = "MODIFIED"  # quantity, limit_price, stop_price: the terms as the broker has them now
    EXECUTION = "EXECUTION"  # execution_id, symbol, side, quantity, price
    BUST = "BUST"  # execution_id of what is taken back
    COMMISSION = "COMMISSION"  # execution_id, amount, currency
    REJECTED = "REJECTED"  # code, message
    CANCEL_REJECTED = "CANCEL_REJECTED"  # code, message
    MODIFY_REJECTED = "MODIFY_REJECTED"  # code, message
    WHAT_IF = "WHAT_IF"  # command_id, initial_margin, excess, accepted, message
    SNAPSHOT = "SNAPSHOT"  # a Snapshot, in parts: payloads.snapshot_parts
    CONTRACT_CHANGED = "CONTRACT_CHANGED"  # symbol, new_symbol
    CONNECTED = "CONNECTED"  # account, broker_time
    DISCONNECTED = "DISCONNECTED"  # reason
    STOLEN = "STOLEN"  # by: who took the session
    NOTICE = "NOTICE"  # code, message: what concerns no order


# What ORDER_STATUS may say. INACTIVE: the broker holds it no more and doesn't say why.
BROKER_STATUSES = frozenset(
    {"PENDING_SUBMIT", "ROUTED", "FILLED", "CANCELED", "EXPIRED", "INACTIVE"}
)


@dataclass(frozen=True, slots=True)
class Message:
    """One thing that a broker said. ``event_at`` is the broker's time for it."""

    kind: MessageKind
    event_at: datetime
    payload: Mapping[str, Any] = field(default_factory=dict)
    order_ref: str | None = None
    broker_order_id: int | None = None
    perm_id: int | None = None


@dataclass(frozen=True, slots=True)
class BrokerOrder:
    """An order as it is sent. Words are those that the database stores."""

    order_ref: str
    symbol: str
    side: str
    quantity: Decimal
    order_type: str
    time_in_force: str
    limit_price: Decimal | None = None
    stop_price: Decimal | None = None
    trail_amount: Decimal | None = None
    trail_percent: Decimal | None = None
    expire_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class OpenOrder:
    """An order that the broker works, as a snapshot tells it. ``filled`` is of ``quantity``."""

    order: BrokerOrder
    status: str
    filled: Decimal
    broker_order_id: int | None
    perm_id: int | None
    ours: bool  # False: placed by hand or by another client of the account


@dataclass(frozen=True, slots=True)
class Position:
    symbol: str
    quantity: Decimal
    avg_cost: Decimal | None = None


# How many rows one SNAPSHOT message holds at most; more come in further parts.
SNAPSHOT_ROWS_MAX = 5_000


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the broker knows of an account at one moment."""

    taken_at: datetime
    open_orders: Sequence[OpenOrder]
    executions: Sequence[Message]  # kinds EXECUTION, BUST and COMMISSION, oldest first
    positions: Sequence[Position]
    cash: Mapping[str, Decimal]  # by currency
    # Orders that ended since: an order that is here did arrive, whatever became of it.
    closed_orders: Sequence[OpenOrder] = ()


class Broker(Protocol):
    """An adapter. Every call raises BrokerUnavailable when the connection is not there.

    ``submit``, ``modify`` and ``cancel`` return when the request is written to the wire; what
    the broker makes of it comes as messages. If one raises BrokerUnavailable after it began to
    write, whether the broker got it is unknown.
    """

    async def connect(self) -> str:
        """Connect and log on; returns the account that the broker says this is."""

    def messages(self) -> AsyncIterator[Message]:
        """What the broker says, until DISCONNECTED or STOLEN, which is the last."""

    async def submit(self, order: BrokerOrder) -> None: ...

    async def modify(self, order: BrokerOrder, broker_order_id: int | None) -> None: ...

    async def cancel(self, order_ref: str, broker_order_id: int | None) -> None: ...

    async def snapshot(self, since: datetime | None) -> Snapshot:
        """Open orders, executions since, positions and cash."""

    async def what_if(self, order: BrokerOrder) -> Mapping[str, Any]:
        """What the order would do to the margin; nothing is placed."""

    async def ping(self) -> datetime:
        """The broker's time."""

    async def close(self) -> None:
        """Log off and disconnect; a second call does nothing."""


class BrokerUnavailable(EngineError):
    """The broker can't be reached, or the connection to it broke."""
