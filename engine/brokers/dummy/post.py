"""Sessions, and what is said to them: in order, unless a fault on messages decides otherwise."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from heapq import heappop, heappush
from typing import Any

from engine.brokers.dummy.faults import Delay, Fault, Faults, Reorder, Repeat, Swallow
from engine.brokers.dummy.wire import encode
from engine.clock import Clock

__all__ = ["Post", "Session"]

# A message that waits to be overtaken waits no longer than this.
HELD_SECONDS_MAX = timedelta(seconds=0.5)
_FOR_GOOD = timedelta(days=36_500)
_ONE_SECOND = timedelta(seconds=1)
# The client that hears of every order of its account, those placed by hand included.
SEES_ALL = 0


@dataclass(slots=True)
class _Held:
    left: int
    line: bytes
    until: datetime


@dataclass(slots=True)
class Session:
    """A client that is logged on."""

    number: int
    account: str
    client_id: int
    silent_until: datetime | None = None
    held: list[_Held] = field(default_factory=list)
    heard_at: deque[datetime] = field(default_factory=deque)

    def hears(self, account: str, client_id: int | None) -> bool:
        """Whether a message about a client's order is for it; client 0 hears of all."""
        return self.account == account and (
            client_id is None or self.client_id in (client_id, SEES_ALL)
        )


class Post:
    """Collects lines by session; the server sends them once the books are written."""

    def __init__(self, faults: Faults, clock: Clock) -> None:
        self._faults = faults
        self._clock = clock
        self.sessions: dict[int, Session] = {}
        self._out: list[tuple[int, bytes | None]] = []
        self._late: list[tuple[datetime, int, int, bytes]] = []
        self._next = 1

    def open(self, number: int, account: str, client_id: int) -> Session | None:
        """Log a client on; returns the session that had its id until now."""
        before = next(
            (
                session
                for session in self.sessions.values()
                if (session.account, session.client_id) == (account, client_id)
            ),
            None,
        )
        self.sessions[number] = Session(number, account, client_id)
        return before

    def drop(self, number: int) -> None:
        """End a connection; nothing more is said on it."""
        self.sessions.pop(number, None)
        self._out.append((number, None))

    def silence(self, session: Session, seconds: float | None) -> None:
        """Say nothing on a connection that stays open."""
        span = _FOR_GOOD if seconds is None else timedelta(seconds=seconds)
        session.silent_until = self._clock() + span

    def allows(self, session: Session, per_second_max: int) -> bool:
        """Count a request; whether the client has kept to the limit in the last second."""
        now = self._clock()
        heard = session.heard_at
        while heard and now - heard[0] >= _ONE_SECOND:
            heard.popleft()
        heard.append(now)
        return len(heard) <= per_second_max

    def tell(
        self,
        line: Mapping[str, Any],
        sessions: list[Session],
        *,
        symbol: str = "",
        side: str = "",
    ) -> None:
        """Say something to sessions, as the faults let it."""
        if not sessions:
            return
        kind = line.get("kind") or line["answers"]
        payload = line.get("payload") or {}
        struck = self._faults.at_message(kind, symbol, side, str(payload.get("status", "")))
        if any(isinstance(fault, Swallow) for fault in struck):
            return
        data = encode(line)
        copies = 1 + sum(fault.copies for fault in struck if isinstance(fault, Repeat))
        for session in sessions:
            for _ in range(copies):
                self._send(session, data, struck)

    def say_as_it_is(self, number: int, line: Mapping[str, Any]) -> None:
        """Say something that no fault strikes at: to who is not, or no more, logged on."""
        self._out.append((number, encode(line)))

    def advance(self) -> None:
        """Send what is late and has come due."""
        now = self._clock()
        while self._late and self._late[0][0] <= now:
            _, _, number, data = heappop(self._late)
            session = self.sessions.get(number)
            if session is not None:
                self._put(session, data)
        for session in self.sessions.values():
            for held in [held for held in session.held if held.until <= now]:
                session.held.remove(held)
                self._put(session, held.line)

    def next_at(self) -> datetime | None:
        """When there will be something to send."""
        moments = [self._late[0][0]] if self._late else []
        moments += [held.until for session in self.sessions.values() for held in session.held]
        return min(moments, default=None)

    def take(self) -> list[tuple[int, bytes | None]]:
        """What is to be sent now, by connection; ``None`` ends it."""
        out, self._out = self._out, []
        return out

    def _send(self, session: Session, data: bytes, struck: list[Fault]) -> None:
        now = self._clock()
        for fault in struck:
            if isinstance(fault, Delay):
                at = now + timedelta(seconds=float(fault.seconds))
                heappush(self._late, (at, self._next, session.number, data))
                self._next += 1
                return
            if isinstance(fault, Reorder):
                session.held.append(_Held(fault.by, data, now + HELD_SECONDS_MAX))
                return
        self._put(session, data)
        if session.held:
            self._overtake(session)

    def _overtake(self, session: Session) -> None:
        for held in session.held:
            held.left -= 1
        for held in [held for held in session.held if held.left <= 0]:
            session.held.remove(held)
            self._put(session, held.line)

    def _put(self, session: Session, data: bytes) -> None:
        until = session.silent_until
        if until is None or until <= self._clock():
            self._out.append((session.number, data))
