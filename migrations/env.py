"""Alembic's entry: the connection comes from engine.db.install, in a transaction already."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"], target_metadata=None)
context.run_migrations()
