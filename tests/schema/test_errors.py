"""Every refusal of the database is a type of engine.errors, by a name that is in one table."""

from __future__ import annotations

import re
from collections.abc import Iterator

import psycopg
import pytest
from schema_cases import said

from engine import errors, resources
from engine.db.connect import Connection, open_connection
from engine.errors import (
    GENERATED,
    PAPER_VIEWS,
    RULES,
    SQLSTATES,
    AlreadyHappened,
    BadInput,
    BooksDisagree,
    ChainBroken,
    ConfigurationError,
    DatabaseUnavailable,
    EngineError,
    HistoryIsFixed,
    IllegalOrderMove,
    IllegalRunMove,
    InvalidValue,
    LeaseHeld,
    LeaseLost,
    NotOurNumber,
    OrderNotOpen,
    Retryable,
    RuleViolation,
    RunAlreadyRunning,
    RunNotRunning,
    StrategyFailed,
    TimeMovesForward,
    UnknownReference,
    translated,
    typed,
)

SQL = "\n".join(path.read_text(encoding="utf-8") for path in resources.sql_dir().glob("*.sql"))
RAISED = [
    re.sub(r"\s+", " ", statement)
    for statement in re.findall(r"RAISE EXCEPTION.*?;\n", SQL, flags=re.DOTALL)
]


def _enforced(conn: Connection) -> set[str]:
    """Constraints and unique indexes; not NOT NULL, which has no name before Postgres 18."""
    return {
        name
        for (name,) in conn.execute(
            """SELECT conname FROM pg_constraint
               WHERE connamespace = 'public'::regnamespace AND contype IN ('c', 'f', 'p', 'u', 'x')
               UNION
               SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
               WHERE c.relnamespace = 'public'::regnamespace AND i.indisunique"""
        )
    }


def _tables_given(conn: Connection, function: str) -> set[str]:
    """The logical table names with which a function is called, as text or by a trigger."""
    called = set(re.findall(rf"{function}\([^;']*'(\w+)'", SQL))
    by_trigger = conn.execute(
        """SELECT split_part(convert_from(tgargs, 'UTF8'), '\\000', 1)
           FROM (SELECT regexp_replace(encode(tgargs, 'escape'), '\\\\000.*', '')::bytea AS tgargs
                 FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
                 WHERE p.proname = %s AND NOT tgisinternal) x""",
        [function],
    )
    return {name for name in called | {name for (name,) in by_trigger} if name.islower()}


def _raised(conn: Connection) -> dict[str, str]:
    """Constraint names that functions raise, with the SQLSTATE's name or code."""
    found: dict[str, str] = {}
    for statement in RAISED:
        code = re.search(r"ERRCODE = '(\w+)'", statement)
        name = re.search(r"CONSTRAINT = ('\w+'|for_table \|\| '\w+'|TG_ARGV\[0\].*?,)", statement)
        assert code, statement
        assert name, statement
        if name[1].startswith("'"):
            found[name[1].strip("'")] = code[1]
        elif name[1].startswith("for_table"):
            suffix = name[1].split("'")[1]
            function = "row_check_keeps_run" if "keeps" in suffix else "run_lock"
            tables = _tables_given(conn, function)
            if function == "run_lock":
                tables |= _tables_given(conn, "run_guard_write")
            found |= {f"{table}{suffix}": code[1] for table in tables}
    return found


# What isn't a violation: the run has moved since it was read, so it is read again.
RETRY = "serialization_failure"


def test_every_name_that_a_refusal_can_have_is_known(conn: Connection) -> None:
    raised = _raised(conn)
    ours = {name for name, code in raised.items() if code in (*SQLSTATES, RETRY)}
    known = RULES.keys() | {name for name in _enforced(conn) if name.endswith("_pkey")}
    missing = (_enforced(conn) | raised.keys()) - ours - known
    assert missing == set()
    # Else the reading of the SQL above would have found nothing.
    assert {"execution_order_is_open", "orders_keeps_its_run", "sip_plan_keeps_its_run"} & ours
    assert {"risk_limit_belongs_to_run", "execution_belongs_to_run"} <= raised.keys()


def test_no_rule_is_kept_for_a_name_that_is_gone(conn: Connection) -> None:
    assert RULES.keys() - _enforced(conn) - _raised(conn).keys() == set()


def test_every_sqlstate_of_ours_has_a_type_and_every_type_a_use() -> None:
    assert set(re.findall(r"'(23T\d\d)'", SQL)) == SQLSTATES.keys()
    for statement in RAISED:
        assert re.search(
            rf"ERRCODE = '(23T\d\d|(unique|foreign_key|check)_violation|{RETRY})'",
            statement,
        ), statement


def test_every_type_of_violation_can_be_reached() -> None:
    reached = {*SQLSTATES.values(), *(rule.kind for rule in RULES.values())}
    assert reached == set(RuleViolation.__subclasses__())


def test_every_rule_has_a_hint_here_or_there(conn: Connection) -> None:
    with_hint = _raised(conn).keys()
    assert {name for name, rule in RULES.items() if not rule.hint} <= with_hint


def test_what_people_set_up_has_hints_of_its_own() -> None:
    """A hint that fits everything helps nobody with an account, a limit or a breaker."""
    general = {errors._TEXT, errors._SHORT, errors._RANGE, errors._WORD, errors._ROW}
    general.add("The row's values don't fit together.")
    typed_in = re.compile("^(broker_account|run_route|risk_limit|circuit_breaker)_")
    assert [
        name for name, rule in RULES.items() if typed_in.match(name) and rule.hint in general
    ] == []


def test_the_tree_is_drawn_as_it_is() -> None:
    def below(kind: type[BaseException]) -> Iterator[str]:
        for child in kind.__subclasses__():
            if child.__module__ == errors.__name__:  # not what a room keeps to itself
                yield child.__name__
            yield from below(child)

    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert drawn == list(dict.fromkeys(below(EngineError)))


def test_what_postgres_computes_is_known(conn: Connection) -> None:
    rows = conn.execute(
        """SELECT a.attname, c.relname FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
           WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r'
             AND a.attgenerated <> ''"""
    ).fetchall()
    assert dict(rows) == GENERATED
    assert len(rows) == len(GENERATED)


def test_the_views_that_check_what_goes_in_are_known(conn: Connection) -> None:
    rows = conn.execute(
        """SELECT table_name FROM information_schema.views
           WHERE table_schema = 'public' AND check_option <> 'NONE'"""
    ).fetchall()
    assert {name for (name,) in rows} == set(PAPER_VIEWS)


@pytest.mark.parametrize(
    ("kind", "sql"),
    [
        (
            RunNotRunning,
            "INSERT INTO engine_state (user_id, run_id) VALUES (:'ann', :'stopped')",
        ),
        (
            RunAlreadyRunning,
            "INSERT INTO strategy_run (user_id, status) VALUES (:'ann', 'RUNNING')",
        ),
        (
            IllegalRunMove,
            "UPDATE strategy_run SET status = 'RUNNING' WHERE run_id = :'stopped'",
        ),
        (
            IllegalOrderMove,
            "UPDATE orders SET status = 'NEW' WHERE order_id = :'partly' AND run_id = :'live'",
        ),
        (
            OrderNotOpen,
            "INSERT INTO execution (user_id, run_id, order_id, quantity, price) "
            "VALUES (:'ann', :'live', :'canceled', 1, 1)",
        ),
        (NotOurNumber, "UPDATE strategy_run SET cash = 0 WHERE run_id = :'live'"),
        (
            BooksDisagree,
            "INSERT INTO mtm_ledger (user_id, run_id, cash) VALUES (:'ben', :'bens', 0)",
        ),
        (
            ChainBroken,
            "INSERT INTO event_ledger (user_id, run_id, event_type, seq) "
            "VALUES (:'ann', :'live', 'NOTE', 1)",
        ),
        (
            TimeMovesForward,
            "INSERT INTO event_ledger (user_id, run_id, event_type, logical_time) "
            "VALUES (:'ann', :'live', 'NOTE', :'t0')",
        ),
        (HistoryIsFixed, "DELETE FROM event_ledger"),
        (
            LeaseHeld,
            "INSERT INTO broker_account (user_id, account, broker) VALUES (:'ann', 'A', 'dummy'); "
            "SELECT lease_take(:'ann', 'A', :'ann', 'first', 60); "
            "SELECT lease_take(:'ann', 'A', :'ben', 'second', 60)",
        ),
        (LeaseLost, "SELECT commands_claim(:'ann', 'A', :'ann', 1, 1)"),
        (AlreadyHappened, "INSERT INTO app_user (user_id) VALUES (:'ann')"),
        (
            UnknownReference,
            "INSERT INTO engine_state (user_id, run_id) VALUES (:'ann', :'nobody')",
        ),
        (InvalidValue, "INSERT INTO app_user (kind) VALUES ('ROBOT')"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_each_violation_for_real(world: Connection, kind: type[RuleViolation], sql: str) -> None:
    with pytest.raises(kind) as caught, translated(), world.transaction():
        world.execute(said(sql))
    assert type(caught.value) is kind
    assert caught.value.constraint
    assert caught.value.hint
    assert str(caught.value).endswith(caught.value.hint)
    assert isinstance(caught.value.__cause__, psycopg.IntegrityError)


def test_all_violations_are_tried_for_real() -> None:
    marks = test_each_violation_for_real.pytestmark  # type: ignore[attr-defined]
    tried = {kind for mark in marks for kind, _ in mark.args[1]}
    assert tried == set(RuleViolation.__subclasses__())


def test_a_constraint_by_itself_gets_its_hint_here(conn: Connection) -> None:
    with pytest.raises(InvalidValue, match="Use one of the words") as caught, translated():
        conn.execute("INSERT INTO app_user (kind) VALUES ('ROBOT')")
    cause = caught.value.__cause__
    assert isinstance(cause, psycopg.Error)
    assert cause.diag.message_hint is None


def test_a_lock_that_does_not_come_is_worth_another_try(scratch: Connection) -> None:
    scratch.execute("BEGIN")
    scratch.execute("SELECT FROM strategy_run FOR UPDATE")
    with open_connection(scratch.info.dsn) as other:
        other.execute("SET lock_timeout = '1ms'")
        with pytest.raises(Retryable, match="run it again"), translated():
            other.execute(said("UPDATE engine_state SET state = '{}' WHERE run_id = :'live'"))
    scratch.execute("ROLLBACK")


@pytest.mark.parametrize(
    "error", [psycopg.errors.DeadlockDetected(), psycopg.errors.SerializationFailure()]
)
def test_a_conflict_of_transactions_is_worth_another_try(error: psycopg.Error) -> None:
    assert isinstance(typed(error), Retryable)


def test_a_connection_that_is_cut_leaves_the_outcome_unknown(scratch: Connection) -> None:
    with open_connection(scratch.info.dsn) as other:
        scratch.execute("SELECT pg_terminate_backend(%s)", [other.info.backend_pid])
        with pytest.raises(DatabaseUnavailable, match="went away"), translated():
            other.execute("SELECT 1")


def test_a_missing_right_is_a_matter_of_configuration(world: Connection) -> None:
    world.execute("SET LOCAL ROLE oms_auditor")
    with pytest.raises(ConfigurationError, match="permission denied"), translated():
        world.execute("DELETE FROM orders")


def test_a_value_that_is_none_is_bad_input(world: Connection) -> None:
    with pytest.raises(BadInput, match="can't take a value"), translated():
        world.execute("SELECT 'x'::numeric")


def test_a_mistake_of_ours_passes_unchanged(world: Connection) -> None:
    with pytest.raises(psycopg.errors.UndefinedTable), translated():
        world.execute("SELECT FROM nonsense")


def test_what_is_no_error_of_the_database_passes_unchanged() -> None:
    with pytest.raises(StrategyFailed), translated():
        raise StrategyFailed("no")


@pytest.mark.parametrize(
    ("sql", "constraint"),
    [
        ("INSERT INTO mtm_ledger (equity) VALUES (1)", "mtm_ledger_equity_generated"),
        ("UPDATE orders SET avg_fill_price = 1", "orders_avg_fill_price_generated"),
        ("UPDATE orders SET reserved_cash = 1", "orders_reserved_cash_generated"),
        ("UPDATE position SET avg_cost = 1", "position_avg_cost_generated"),
        ("UPDATE paper_position SET market_value = 1", "position_market_value_generated"),
        ("INSERT INTO sip_plan (user_id) VALUES (NULL)", "sip_plan_user_id_given"),
        ("INSERT INTO instrument (symbol) VALUES (NULL)", "instrument_symbol_given"),
    ],
)
def test_rules_without_a_name_in_postgres_get_one(
    world: Connection, sql: str, constraint: str
) -> None:
    world.execute("ALTER TABLE sip_plan DISABLE TRIGGER sip_plan_a_guard_write")
    with pytest.raises(RuleViolation) as caught, translated():
        world.execute(sql.encode())
    assert (caught.value.constraint, bool(caught.value.hint)) == (constraint, True)
