"""Limits in batches: what looks back at nothing is weighed at once, and a refusal undoes nothing.

Its SQL is frozen: a change of the schema is a new migration. It runs as a whole and without
parameters, since it holds %, colons and function bodies.
"""

from __future__ import annotations

from pathlib import Path

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    _run("up.sql")


def downgrade() -> None:
    _run("down.sql")


def _run(script: str) -> None:
    text = (Path(__file__).with_suffix("") / script).read_text(encoding="utf-8")
    op.get_bind().exec_driver_sql(text, execution_options={"no_parameters": True})
