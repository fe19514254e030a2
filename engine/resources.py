"""Find the files that travel with the code: schema, migrations, the demo's data, fault plans.

A wheel holds them in ``engine/_resources``; in a checkout, and so in an editable install, they
are at the root of the repository.
"""

from __future__ import annotations

from pathlib import Path

from engine.errors import ConfigurationError

__all__ = ["data_dir", "migrations_dir", "plans_dir", "sql_dir"]

_PACKAGE = Path(__file__).resolve().parent


def sql_dir() -> Path:
    """Return the folder of the schema; raises ConfigurationError if it was not installed."""
    return _folder("sql")


def migrations_dir() -> Path:
    """Return the folder of Alembic's steps; raises ConfigurationError if it was not installed."""
    return _folder("migrations")


def data_dir() -> Path:
    """Return the folder of the demo's data; raises ConfigurationError if it was not installed."""
    return _folder("data")


def plans_dir() -> Path:
    """Return the folder of fault plans; raises ConfigurationError if it was not installed."""
    return _folder("plans")


def _folder(name: str) -> Path:
    installed = _PACKAGE / "_resources" / name
    if installed.is_dir():
        return installed
    root = _PACKAGE.parent
    # Next to an installed engine lies everybody else's package; only a checkout's root has the
    # project file, so that a stranger's `data` is never taken for ours.
    if (root / "pyproject.toml").is_file() and (root / name).is_dir():
        return root / name
    raise ConfigurationError(
        f"This installation lacks its {name!r} folder (looked in {installed} and {root / name}); "
        "install the package again."
    )
