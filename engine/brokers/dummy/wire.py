"""The dummy's wire: one JSON object a line, numbers as strings, moments in ISO 8601 with a zone.

A client begins with ``{"op": "LOGON", "client_id": 0, "account": null}`` and then asks::

    {"op": "SUBMIT", "order": {...}}        {"op": "MODIFY", "order": {...}}
    {"op": "CANCEL", "order_ref": "..."}    {"op": "LOGOFF"}
    {"op": "SNAPSHOT", "request": 1, "since": null}
    {"op": "WHAT_IF", "request": 2, "order": {...}}
    {"op": "PING", "request": 3}

The exchange says messages, ``{"kind": ..., "event_at": ..., "payload": {...}, "order_ref": ...,
"broker_order_id": ..., "perm_id": ...}``, and answers to requests, which have ``reply`` instead of
``kind``. A snapshot comes in parts: ``part`` of ``parts``, each with some of its rows.

A connection that begins with ``{"op": "CONTROL"}`` is the operator's: see ``desk``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from engine.brokers.protocol import BrokerOrder, Message, MessageKind
from engine.errors import BadInput

__all__ = ["LINE_BYTES_MAX", "decode", "encode", "message_of", "order_of", "order_on_wire"]

LINE_BYTES_MAX = 4 * 1024 * 1024

_DECIMALS = ("quantity", "limit_price", "stop_price", "trail_amount", "trail_percent")
_WORDS = ("symbol", "side", "order_type", "time_in_force")
_NAMES = tuple(field.name for field in fields(BrokerOrder))

_encoder = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)


def encode(line: Mapping[str, Any]) -> bytes:
    """One line."""
    return _encoder.encode(line).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The object on a line. Raises BadInput."""
    try:
        said = json.loads(line)
    except ValueError as error:
        raise BadInput(f"A line is no JSON: {error}.") from error
    if not isinstance(said, dict):
        raise BadInput("A line is no JSON object.")
    return said


def order_on_wire(order: BrokerOrder) -> dict[str, Any]:
    """An order as JSON; what it doesn't have is left out."""
    said: dict[str, Any] = {}
    for name in _NAMES:
        value = getattr(order, name)
        if isinstance(value, Decimal):
            said[name] = f"{value:f}"
        elif isinstance(value, datetime):
            said[name] = value.isoformat()
        elif value is not None:
            said[name] = value
    return said


def order_of(said: Any) -> BrokerOrder:
    """The order in a line. Raises BadInput."""
    if not isinstance(said, dict) or said.keys() - set(_NAMES):
        raise BadInput("An order must be an object with an order's names.")
    values = dict(said)
    values.setdefault("order_ref", "")
    try:
        for name in _DECIMALS:
            if values.get(name) is not None:
                values[name] = _decimal(values[name], name)
        if values.get("expire_at") is not None:
            values["expire_at"] = datetime.fromisoformat(values["expire_at"])
        missing = [name for name in (*_WORDS, "quantity") if values.get(name) is None]
    except (TypeError, ValueError) as error:
        raise BadInput(f"An order's value can't be read: {error}.") from error
    if missing:
        raise BadInput(f"An order lacks its {missing[0]}.")
    return BrokerOrder(**values)


def message_of(said: Mapping[str, Any]) -> Message:
    """The message on a line."""
    return Message(
        MessageKind(said["kind"]),
        datetime.fromisoformat(said["event_at"]),
        said["payload"],
        said.get("order_ref"),
        said.get("broker_order_id"),
        said.get("perm_id"),
    )


def _decimal(text: Any, name: str) -> Decimal:
    try:
        value = Decimal(text if isinstance(text, int) else str(text))
    except InvalidOperation as error:
        raise BadInput(f"The {name} {text!r} is no number.") from error
    if not value.is_finite():
        raise BadInput(f"The {name} {text!r} is no number.")
    return value
