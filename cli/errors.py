"""Errors as people and programs get them: one line on stderr, and an exit code.

======  ==================================================================================
code    meaning
======  ==================================================================================
0       done
1       a finding (of `oms audit`) or a refusal (bad input, a rule of the database, a failed
        strategy)
2       could not run: wrong usage, no database, a file that can't be written, a bug
3       `oms connect`: another process has taken the account over
4       `oms connect`: the broker speaks for another account
130     interrupted by Ctrl-C
141     whoever was reading our output has left
======  ==================================================================================

With ``--json`` the line is ``{"error": {"type": ..., "message": ...}}``, with ``constraint`` for a
rule of the database. Nothing is on stdout then.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import typer

__all__ = [
    "BROKEN_PIPE",
    "DONE",
    "FAILED",
    "INTERRUPTED",
    "INTERRUPTION",
    "REFUSED",
    "Failure",
    "explain",
    "tell",
]

DONE = 0
REFUSED = 1
FAILED = 2
INTERRUPTED = 130
BROKEN_PIPE = 141


class Failure(NamedTuple):
    """What went wrong: the error's type for programs, a sentence for people, an exit code."""

    type: str
    message: str
    code: int
    constraint: str | None = None


INTERRUPTION = Failure(
    "Interrupted",
    "Interrupted; what was committed stays, and the same command goes on from there.",
    INTERRUPTED,
)

TRACEBACK_VARIABLE = "OMS_TRACEBACK"

# Typer exports the leaf of its usage errors only; their common base is two steps up.
_UsageError: type[Exception] = typer.BadParameter.__mro__[2]


def explain(error: Exception) -> Failure:
    """What ``error`` means to whoever typed the command."""
    if isinstance(error, _UsageError):
        return _usage(error)
    if isinstance(error, typer.Abort):
        return Failure("Aborted", "Nothing was done.", REFUSED)
    return _of_engine(error) or _unexpected(error)


def tell(failure: Failure, *, as_json: bool) -> int:
    """Print a failure on stderr as one line and return its exit code."""
    from cli.output import print_error, print_error_json

    if not failure.message:  # the help, which answers a command without a verb, is printed already
        return failure.code
    if as_json:
        error = {"type": failure.type, "message": failure.message}
        if failure.constraint is not None:
            error["constraint"] = failure.constraint
        print_error_json({"error": error})
    else:
        print_error(failure.message)
    return failure.code


def wants_traceback() -> bool:
    """Whether whoever hunts a bug has asked for Python's own words."""
    return bool(os.environ.get(TRACEBACK_VARIABLE))


def _usage(error: Any) -> Failure:
    # Without a parameter that it is about, the message is ours and a sentence already.
    ours = isinstance(error, typer.BadParameter) and not (error.param or error.param_hint)
    message = _one_line(error.message if ours else error.format_message())
    context = getattr(error, "ctx", None)
    if message and context is not None:
        message = f"{message.rstrip('.')}; `{context.command_path} --help` shows how."
    return Failure("UsageError", message, FAILED)


def _of_engine(error: Exception) -> Failure | None:
    import psycopg

    from engine import errors

    meaning = errors.typed(error) if isinstance(error, psycopg.Error) else error
    if isinstance(meaning, errors.EngineError):
        cannot_run = (errors.ConfigurationError, errors.DatabaseUnavailable, errors.Retryable)
        return Failure(
            type(meaning).__name__,
            _sentence(str(meaning)),
            FAILED if isinstance(meaning, cannot_run) else REFUSED,
            meaning.constraint if isinstance(meaning, errors.RuleViolation) else None,
        )
    if isinstance(error, psycopg.Error):
        said = error.diag.message_primary or str(error)
        return _bug(error, f"the database answered: {said}")
    return None


def _unexpected(error: Exception) -> Failure:
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        message = f"{error.strerror}{where}; name a path that you may use"
        return Failure(type(error).__name__, _sentence(message), FAILED)
    return _bug(error, f"{type(error).__name__}: {error}")


def _bug(error: Exception, said: str) -> Failure:
    message = f"{said.rstrip('.')}; this is a bug, {TRACEBACK_VARIABLE}=1 shows where"
    return Failure(type(error).__name__, _sentence(message), FAILED)


def _sentence(text: str) -> str:
    line = _one_line(text)
    return line if line.endswith((".", "!", "?")) else f"{line}."


def _one_line(text: str) -> str:
    return " ".join(text.split())
