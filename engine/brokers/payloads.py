"""Between the rows of outbox and inbox and the values that adapters take and give."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any
from uuid import UUID

from engine.brokers.protocol import SNAPSHOT_ROWS_MAX, BrokerOrder, Snapshot
from engine.errors import BadInput

_LISTS = ("open_orders", "closed_orders", "positions")


def as_payload(value: Any) -> Any:
    """``value`` as an inbox row holds it: numbers and moments as text, dataclasses as objects."""
    match value:
        case Decimal():
            return f"{value:f}"
        case datetime():
            return value.astimezone(UTC).isoformat()
        case UUID():
            return str(value)
        case Mapping():
            return {str(key): as_payload(item) for key, item in value.items()}
        case list() | tuple():
            return [as_payload(item) for item in value]
        case _ if dataclasses.is_dataclass(value):
            names = [each.name for each in dataclasses.fields(value)]
            return {name: as_payload(getattr(value, name)) for name in names}
    return value


def order_of(payload: Mapping[str, Any], order_ref: str) -> BrokerOrder:
    """The order that a SUBMIT, MODIFY or WHAT_IF is about.

    Raises BadInput where the payload lacks something or holds no number.
    """
    try:
        return BrokerOrder(
            order_ref=order_ref,
            symbol=payload["symbol"],
            side=payload["side"],
            quantity=Decimal(payload["quantity"]),
            order_type=payload["order_type"],
            time_in_force=payload["time_in_force"],
            limit_price=_number(payload, "limit_price"),
            stop_price=_number(payload, "stop_price"),
            trail_amount=_number(payload, "trail_amount"),
            trail_percent=_number(payload, "trail_percent"),
            expire_at=moment_of(payload, "expire_at"),
        )
    except KeyError as error:
        raise BadInput(f"the command's payload lacks {error}") from error
    except (InvalidOperation, TypeError, ValueError) as error:
        raise BadInput(f"the command's payload holds what is no order: {error}") from error


def moment_of(payload: Mapping[str, Any], name: str) -> datetime | None:
    """A moment of a payload; text without a zone is UTC's."""
    text = payload.get(name)
    if text is None:
        return None
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _number(payload: Mapping[str, Any], name: str) -> Decimal | None:
    value = payload.get(name)
    return None if value is None else Decimal(value)


def snapshot_parts(snapshot: Snapshot, snapshot_id: str) -> list[dict[str, Any]]:
    """A snapshot as payloads of at most SNAPSHOT_ROWS_MAX rows; cash is in every part.

    Its executions are rows of the inbox like any others, before these.
    """
    chunks = list(_chunks({name: getattr(snapshot, name) for name in _LISTS})) or [{}]
    return [
        as_payload(
            {
                "snapshot_id": snapshot_id,
                "part": part,
                "parts": len(chunks),
                "taken_at": snapshot.taken_at,
                **{name: [_flat(row) for row in chunk.get(name, [])] for name in _LISTS},
                "cash": snapshot.cash,
            }
        )
        for part, chunk in enumerate(chunks, start=1)
    ]


def _flat(row: Any) -> dict[str, Any]:
    """A row of a snapshot; an order's terms stand beside what became of it."""
    fields: dict[str, Any] = as_payload(row)
    return {**fields.pop("order", {}), **fields}


def _chunks(lists: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, list[Any]]]:
    chunk: dict[str, list[Any]] = {}
    room = SNAPSHOT_ROWS_MAX
    for name, rows in lists.items():
        for row in rows:
            if not room:
                yield chunk
                chunk, room = {}, SNAPSHOT_ROWS_MAX
            chunk.setdefault(name, []).append(row)
            room -= 1
    if chunk:
        yield chunk
