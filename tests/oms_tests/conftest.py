"""A run at the dummy broker for every test that wants one."""

from __future__ import annotations

import pytest
from broker_cases import Wire, a_broker_run

from engine.db.connect import Connection


@pytest.fixture
def wire(conn: Connection) -> Wire:
    """A RUNNING run with an account, in a transaction that is rolled back."""
    return Wire(conn, a_broker_run(conn))
