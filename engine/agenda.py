"""The occasions of a run's investment plans that are due, as the database says."""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Sequence
from datetime import date

from engine.db.connect import Connection
from engine.market.model import Session
from engine.runs import Run
from engine.strategies.base import SipDue

# How many occasions of plans one tick takes up; the rest is still due at the next one.
SIPS_DUE_MAX = 1_000


class Agenda:
    """Occasions by session; those that this agenda was told of are done, written or not yet.

    ``ahead`` reads a month at a time, for a replay; a live tick reads what is due at its session,
    if that wasn't ``read`` with its books.
    """

    def __init__(
        self,
        conn: Connection,
        run: Run,
        *,
        ahead: bool = False,
        read: tuple[date, Sequence[SipDue]] | None = None,
    ) -> None:
        self._conn = conn
        self._run = run
        self._ahead = ahead
        self._upto: date | None = None
        self._known: Sequence[SipDue] = ()
        if read is not None:
            self._upto, self._known = read
        self._done: dict[str, str] = {}

    def due(self, session: Session) -> tuple[SipDue, ...]:
        """What is due at a session and wasn't told, oldest first."""
        if self._upto is None or session.day > self._upto:
            self._read(session.day)
        waiting = [
            due
            for due in self._known
            if due.session.day <= session.day and due.occasion > self._done.get(due.plan, "")
        ]
        return tuple(waiting[:SIPS_DUE_MAX])

    def told(self, subject: str) -> None:
        """An occasion was executed, refused or let go: it and the plan's earlier ones are done."""
        plan = subject.partition("@")[0]
        self._done[plan] = max(subject, self._done.get(plan, ""))

    def _read(self, day: date) -> None:
        upto = day.replace(day=monthrange(day.year, day.month)[1]) if self._ahead else day
        rows = self._conn.execute(
            "SELECT * FROM sip_due(%s, %s, %s)", [self._run.user_id, self._run.run_id, upto]
        ).fetchall()
        self._known = [
            SipDue(*row[:7], Session(self._run.calendar, *row[7:]))  # type: ignore[call-arg]
            for row in rows
        ]
        self._upto = upto
