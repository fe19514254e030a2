"""Ids that are functions of what they name, so that a repeated tick makes the same ones."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from functools import lru_cache
from uuid import UUID, uuid5

ORDERS_PER_TICK_MAX = 1 << 16
SALT_BITS = 46

_USERS = UUID("6f0c9e1e-5d0b-5b63-8f0e-0f2f6e0d4a10")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def user_id_of(name: str) -> UUID:
    """The id of the user called ``name``: one name is one user, on every database."""
    return uuid5(_USERS, name)


@lru_cache(maxsize=1024)
def run_salt(user_id: UUID, run_id: UUID) -> int:
    """46 bits that set the order ids of one run apart from every other run's."""
    digest = hashlib.sha256(user_id.bytes + run_id.bytes).digest()
    return int.from_bytes(digest[:6], "big") >> 2


def order_id_of(salt: int, logical_time: datetime, number: int) -> UUID:
    """The id of a run's ``number``-th order at ``logical_time``.

    A version 8 UUID (RFC 9562): 60 bits of microseconds since 1970, then the number, then the
    run's salt. Ids of one run therefore sort by time and number, which keeps their index dense.
    """
    since = logical_time - _EPOCH
    micros = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
    high = (micros >> 12) << 16 | 0x8000 | (micros & 0xFFF)
    low = 0b10 << 62 | number << 46 | salt
    return UUID(int=(high & ((1 << 64) - 1)) << 64 | low)
