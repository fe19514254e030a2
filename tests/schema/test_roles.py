"""Who may do what: every right of every role, and what happens where roles can't be made."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql
from schema_cases import DENIED, NAMES, RUN_TABLES, assert_refused, contents, rows, said

from engine.db import install
from engine.db.connect import Connection, open_connection
from engine.db.embedded import Server
from engine.errors import ConfigurationError

ROLES = ("oms_engine", "oms_connector", "oms_auditor", "oms_keeper")
# Views that put rows together, so that nobody can write into them.
COMPUTED = (
    "execution_cost",
    "latency_summary",
    "order_latency",
    "order_refusal",
    "order_response",
    "pnl_daily",
    "position_pnl",
)
READ_ONLY = (
    *COMPUTED,
    "audit_broker",
    "audit_cash",
    "audit_chain",
    "audit_duplicate",
    "audit_event",
    "audit_guard",
    "audit_mark",
    "audit_order",
    "audit_orphan",
    "audit_position",
    "audit_running",
    "breaker_kind",
    "broker_lease",
    "circuit_breaker",
    "command_kind",
    "equity_peak",
    "limit_kind",
    "open_order_sum",
    "order_status",
    "order_transition",
    "risk_limit",
    "run_status",
    "run_transition",
    "system_halt",
    "trading_halt",
)

# What the engine's role may do besides reading: of columns where not of all of them.
ENGINE: dict[str, dict[str, str]] = {
    "app_user": {"INSERT": "*"},
    "instrument": {"INSERT": "*"},
    "calendar_session": {"INSERT": "*"},
    "price_bar": {"INSERT": "*"},
    "corporate_action": {"INSERT": "*"},
    "fx_rate": {"INSERT": "*"},
    "strategy_run": {
        "INSERT": "account_type broker calendar currency initial_cash name paper parameters "
        "pnl_method run_id status strategy tick_at user_id",
        "UPDATE": "status",
    },
    "engine_state": {"INSERT": "*", "UPDATE": "last_logical_time recorded_at state"},
    "engine_status": {"INSERT": "*", "UPDATE": "error_at heartbeat_at lag_seconds last_error"},
    "orders": {
        "INSERT": "account client_order_id expire_at limit_price logical_time order_id order_type "
        "purpose quantity recovered reference_price run_id side stop_price symbol time_in_force "
        "trail_amount trail_percent user_id",
        "UPDATE": "account broker_order_id expire_at limit_price pending_reconcile perm_id "
        "quantity reject_code reject_source status status_at status_reason stop_price "
        "trail_amount triggered_at",
    },
    "execution": {
        "INSERT": "commission commission_currency event_at execution_id logical_time order_id "
        "price quantity reverses run_id side symbol user_id",
    },
    "execution_commission": {"INSERT": "amount currency event_at execution_id run_id user_id"},
    "run_route": {"INSERT": "*"},
    "flatten_request": {
        "INSERT": "account asked_at asked_by flatten_id reason run_id scope user_id",
        "UPDATE": "checked_at finished_at status summary",
    },
    "order_broker_id": {"INSERT": "*"},
    "broker_account": {
        "INSERT": "*",
        "UPDATE": "calendar closes_at currency heartbeat_seconds messages_per_second opening_cash "
        "opens_at orders_per_second out_of_session settings stale_seconds time_zone",
    },
    "broker_command": {
        "INSERT": "account command_id kind order_id order_version payload priority run_id user_id",
        "UPDATE": "done_at outcome",
    },
    "broker_event": {"UPDATE": "applied_at code finding note"},
    "alert": {"INSERT": "*", "UPDATE": "acknowledged_at acknowledged_by"},
    "reconciliation": {"INSERT": "*"},
    "reconciliation_difference": {"INSERT": "*"},
    "position": {"UPDATE": "mark_price marked_at"},
    "split_applied": {"INSERT": "ex_date kind logical_time run_id symbol user_id"},
    "mtm_ledger": {"INSERT": "logical_time run_id user_id"},
    "event_ledger": {"INSERT": "event_type logical_time payload run_id subject user_id"},
    "sip_plan": {"INSERT": "*", "UPDATE": "start_on status"},
    **{table: {} for table in READ_ONLY},
}
# The names of people's SQL have the rights of the tables that they show.
ENGINE |= {
    "paper_order": {
        "INSERT": "client_order_id expire_at limit_price logical_time order_id order_type quantity "
        "reference_price run_id side stop_price symbol time_in_force trail_amount trail_percent "
        "user_id",
        "UPDATE": "expire_at reject_code reject_source status status_at status_reason stop_price "
        "triggered_at",
    },
    "paper_trade": {
        "INSERT": "commission commission_currency event_at execution_id logical_time order_id "
        "price quantity run_id side symbol user_id",
    },
    "paper_position": ENGINE["position"],
    "paper_equity_curve": ENGINE["mtm_ledger"],
}
# What the connector's role may read, and of the inbox write; the rest is behind its functions.
CONNECTOR: dict[str, dict[str, str]] = {
    "instrument": {"SELECT": "*"},
    "calendar_session": {"SELECT": "*"},
    "broker_account": {"SELECT": "*"},
    "broker_lease": {"SELECT": "*"},
    "broker_command": {"SELECT": "*"},
    "broker_event": {
        "SELECT": "account holder number user_id",
        "INSERT": "account broker_order_id event_at execution_id holder kind number order_ref "
        "payload perm_id priority received_at user_id",
    },
}
CONNECTOR_FUNCTIONS = [
    "commands_claim",
    "commands_done",
    "commands_throttled",
    "connector_alert",
    "executions_unheard",
    "lease_release",
    "lease_renew",
    "lease_take",
]
# What ticks_write writes, whose role nobody else can act as.
KEEPER: dict[str, dict[str, str]] = {
    "orders": {"INSERT": "*"},
    "execution": {"INSERT": "*"},
    "mtm_ledger": {"INSERT": "*"},
    "event_ledger": {"INSERT": "*"},
    "position": {
        "INSERT": "*",
        "UPDATE": "cost_basis mark_price marked_at quantity realized_pnl",
    },
    "engine_state": {"INSERT": "*", "UPDATE": "last_logical_time recorded_at state"},
    "engine_status": {"INSERT": "*", "UPDATE": "heartbeat_at lag_seconds"},
    "strategy_run": {"UPDATE": "books_seq cash"},
}
KEEPER_FUNCTIONS = ["ledger_analyze", "open_orders_sum", "run_equity_peak"]
ENGINE_FUNCTIONS = [
    "halt_enforce",
    "halt_lift",
    "halt_place",
    "open_orders_sum",
    "reconcile_analyze",
    "run_equity_peak",
    "system_halt_lift",
    "system_halt_place",
    "ticks_write",
]

_TABLE_RIGHTS = """
    SELECT c.relname, x.privilege_type, '*'
    FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) x
    WHERE c.relnamespace = 'public'::regnamespace AND x.grantee = {}
    UNION ALL
    SELECT c.relname, x.privilege_type, string_agg(a.attname, ' ' ORDER BY a.attname)
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
    CROSS JOIN LATERAL aclexplode(a.attacl) x
    WHERE c.relnamespace = 'public'::regnamespace AND x.grantee = {}
    GROUP BY c.relname, x.privilege_type"""


def _rights(conn: Connection, role: str) -> dict[str, dict[str, str]]:
    """A role's own rights, by relation and kind: columns, or * for all of them."""
    grantee = "0" if role == "PUBLIC" else f"'{role}'::regrole"
    found: dict[str, dict[str, str]] = {}
    for table, right, columns in conn.execute(_TABLE_RIGHTS.format(grantee, grantee).encode()):
        found.setdefault(table, {})[right] = columns
    return found


# --- The rights themselves --------------------------------------------------------------------


def test_the_engine_has_these_rights_and_no_other(conn: Connection) -> None:
    assert _rights(conn, "oms_engine") == {
        table: {"SELECT": "*"} | rights for table, rights in ENGINE.items()
    }


def test_the_auditor_reads_everything_and_writes_nothing(conn: Connection) -> None:
    assert _rights(conn, "oms_auditor") == {table: {"SELECT": "*"} for table in ENGINE}


def test_the_connector_has_these_rights_and_no_other(conn: Connection) -> None:
    assert _rights(conn, "oms_connector") == CONNECTOR


def test_the_keeper_has_these_rights_and_no_other(conn: Connection) -> None:
    assert _rights(conn, "oms_keeper") == {
        table: {"SELECT": "*"} | KEEPER.get(table, {}) for table in ENGINE
    }


def test_the_keeper_owns_the_function_that_writes_ticks_and_nothing_else(
    conn: Connection, request: pytest.FixtureRequest
) -> None:
    owned = conn.execute(
        """SELECT p.proname FROM pg_proc p WHERE p.proowner = 'oms_keeper'::regrole
           UNION ALL
           SELECT c.relname FROM pg_class c WHERE c.relowner = 'oms_keeper'::regrole"""
    ).fetchall()
    assert owned == ([] if request.config.option.proven else [("ticks_write",)])
    assert conn.execute(
        "SELECT has_schema_privilege('oms_keeper', 'public', 'CREATE')"
    ).fetchone() == (False,)


@pytest.mark.parametrize("role", ["oms_owner", "oms_engine", "oms_connector", "oms_auditor"])
def test_nobody_can_act_as_the_keeper(world: Connection, role: str) -> None:
    assert_refused(world, "SET LOCAL ROLE oms_keeper", role, DENIED)


def test_nobody_else_has_any_right(conn: Connection) -> None:
    assert _rights(conn, "PUBLIC") == {}


def test_every_relation_is_in_the_list_of_ours(conn: Connection) -> None:
    relations = conn.execute(
        """SELECT array_agg(relname::text) FROM pg_class
           WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')"""
    ).fetchone()
    listed = conn.execute("SELECT our_relations()").fetchone()
    assert relations is not None
    assert listed is not None
    assert sorted(listed[0]) == sorted(relations[0]) == sorted(ENGINE)


def test_trigger_functions_are_for_their_triggers_alone(conn: Connection) -> None:
    """Who may execute one may put it on a table of their own and feed it with rows."""
    open_to_all = conn.execute(
        """SELECT p.proname FROM pg_proc p
           WHERE p.pronamespace = 'public'::regnamespace
             AND (p.prorettype = 'trigger'::regtype OR p.prosecdef OR p.proname = 'grant_roles')
             AND EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) x
                         WHERE x.grantee <> p.proowner)
           ORDER BY p.proname"""
    ).fetchall()
    given = {*CONNECTOR_FUNCTIONS, *ENGINE_FUNCTIONS, *KEEPER_FUNCTIONS}
    assert open_to_all == [(name,) for name in sorted(given)]


def test_each_function_with_anothers_rights_is_for_who_needs_it(conn: Connection) -> None:
    callers = conn.execute(
        """SELECT p.proname, x.grantee::regrole::text FROM pg_proc p
           CROSS JOIN LATERAL aclexplode(p.proacl) x
           WHERE p.pronamespace = 'public'::regnamespace AND p.prosecdef
             AND x.grantee <> p.proowner ORDER BY 1, 2"""
    ).fetchall()
    assert callers == sorted(
        [(name, "oms_connector") for name in CONNECTOR_FUNCTIONS]
        + [(name, "oms_engine") for name in ENGINE_FUNCTIONS]
        + [(name, "oms_keeper") for name in KEEPER_FUNCTIONS]
    )


@pytest.mark.parametrize("role", ["oms_auditor", "oms_connector"])
def test_ticks_are_the_engines_to_write(world: Connection, role: str) -> None:
    nothing = ", ".join(["'{}'"] * 19)
    call = f"SELECT ticks_write(:'ann', :'live', 0, '{{}}', {nothing}, NULL, NULL)"
    assert_refused(world, call, role, DENIED)


def test_the_roles_are_nobodys_login_and_have_no_powers(conn: Connection) -> None:
    powers = conn.execute(
        """SELECT rolname, rolsuper OR rolinherit AND false OR rolcreaterole OR rolcreatedb
                  OR rolcanlogin OR rolreplication OR rolbypassrls
           FROM pg_roles WHERE rolname = ANY (our_roles()) ORDER BY rolname"""
    ).fetchall()
    assert powers == [(role, False) for role in sorted(ROLES)]


def test_the_owner_is_no_superuser_and_can_act_as_the_roles(world: Connection) -> None:
    assert rows(
        world,
        "SELECT rolsuper, rolbypassrls, rolreplication FROM pg_roles WHERE rolname = current_user",
    ) == [(False, False, False)]
    for role in ("oms_engine", "oms_connector", "oms_auditor"):
        with world.transaction(force_rollback=True):
            world.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))


# --- What they come to ------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["oms_auditor", "oms_connector"])
@pytest.mark.parametrize("table", sorted(ENGINE))
def test_auditor_and_connector_can_write_nowhere(world: Connection, role: str, table: str) -> None:
    column = world.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum = 1", [table]
    ).fetchone()
    assert column is not None
    for statement in (
        f"INSERT INTO public.{table} DEFAULT VALUES",
        f"UPDATE public.{table} SET {column[0]} = {column[0]}",
        f"DELETE FROM public.{table}",
        f"TRUNCATE public.{table}",
    ):
        if (
            table.startswith("audit_")
            or table in COMPUTED
            or (table.startswith("paper_") and "TRUNC" in statement)
        ):
            continue  # no view of that kind can be written by anybody
        if (role, table) == ("oms_connector", "broker_event") and "INSERT" in statement:
            continue  # the inbox is its to write
        assert_refused(world, statement, role, DENIED)


@pytest.mark.parametrize("table", [*RUN_TABLES, "app_user", "paper_order", "audit_cash"])
def test_the_connector_can_not_even_read_what_is_a_users(world: Connection, table: str) -> None:
    assert_refused(world, f"SELECT FROM {table}", "oms_connector", DENIED)
    assert_refused(world, f"SELECT FROM {table} FOR UPDATE", "oms_connector", DENIED)


def test_the_auditor_can_ask_every_question(world: Connection) -> None:
    world.execute("SET LOCAL ROLE oms_auditor")
    for table in ENGINE:
        world.execute(sql.SQL("SELECT * FROM public.{}").format(sql.Identifier(table)))
    world.execute("SELECT position_from_ledger(%s, %s)", [NAMES["ann"], NAMES["live"]])


@pytest.mark.parametrize("role", ["oms_engine", "oms_auditor", "oms_connector"])
@pytest.mark.parametrize(
    "call",
    [
        "position_follow_ledger(:'ann', :'live', 'AAPL')",
        "strategy_run_follow_ledger(:'ann', :'live')",
        "books_follow(:'ann', :'live', 1)",
        "ledger_analyze()",
    ],
)
def test_what_the_owner_writes_by_rights_nobody_writes_by_calling(
    world: Connection, role: str, call: str
) -> None:
    assert_refused(world, f"SELECT {call}", role, DENIED)


def test_calling_what_the_triggers_call_changes_nothing(world: Connection) -> None:
    """Also for the owner: there is nothing that the books do not have yet."""
    before = contents(world)
    world.execute(said("SELECT position_follow_ledger(:'ann', :'live', 'AAPL')"))
    world.execute(said("SELECT strategy_run_follow_ledger(:'ann', :'live')"))
    assert contents(world) == before


def test_the_engine_does_all_of_its_work_with_its_rights(world: Connection) -> None:
    """From a new user to a stopped run, in plain SQL."""
    world.execute("SET LOCAL ROLE oms_engine")
    world.execute(
        said("""
        INSERT INTO app_user (user_id) VALUES (:'nobody');
        INSERT INTO strategy_run (user_id, run_id, initial_cash) VALUES
            (:'nobody', :'new_order', 1000);
        UPDATE strategy_run SET status = 'RUNNING' WHERE user_id = :'nobody';
        INSERT INTO engine_status (user_id, run_id) VALUES (:'nobody', :'new_order');
        INSERT INTO paper_order (user_id, run_id, order_id, symbol, side, quantity, logical_time)
        VALUES (:'nobody', :'new_order', :'new_order', 'AAPL', 'BUY', 2, :'t1');
        INSERT INTO paper_trade (user_id, run_id, order_id, quantity, price)
        VALUES (:'nobody', :'new_order', :'new_order', 1, 100);
        UPDATE position SET mark_price = 101, marked_at = :'t2' WHERE user_id = :'nobody';
        INSERT INTO paper_equity_curve (user_id, run_id, logical_time)
        VALUES (:'nobody', :'new_order', :'t2');
        INSERT INTO event_ledger (user_id, run_id, logical_time, event_type)
        VALUES (:'nobody', :'new_order', :'t2', 'TICK');
        INSERT INTO engine_state (user_id, run_id, last_logical_time)
        VALUES (:'nobody', :'new_order', :'t2');
        INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time)
        VALUES (:'nobody', :'new_order', 'AAPL', '2024-01-05', :'t3');
        UPDATE strategy_run SET status = 'STOPPED' WHERE user_id = :'nobody'""")
    )
    assert rows(
        world,
        "SELECT cash, quantity, status FROM strategy_run JOIN position USING (user_id, run_id) "
        "WHERE user_id = :'nobody'",
    ) == [(900, 2, "STOPPED")]


# --- Where roles can't be made ----------------------------------------------------------------


@pytest.fixture(scope="module")
def other_server(server: Server) -> Iterator[Server]:
    """A server whose roles are not ours: they belong to a server, not to a database."""
    folder = server.folder.parent / "roles-server"
    other = Server(folder, bin_dir=server.bin_dir, settings={"fsync": "off"})
    other.start()
    yield other
    other.stop("immediate")


@pytest.fixture
def humble(other_server: Server) -> Iterator[str]:
    """The DSN of a database whose owner may not make roles; none of ours are there."""
    with psycopg.connect(other_server.dsn(), autocommit=True) as admin:
        admin.execute("CREATE ROLE humble LOGIN")
        admin.execute("CREATE DATABASE humble OWNER humble")
        yield psycopg.conninfo.make_conninfo(other_server.dsn("humble"), user="humble")
        admin.execute("DROP DATABASE humble WITH (FORCE)")
        for role in ("humble", *ROLES):
            admin.execute(f"DROP ROLE IF EXISTS {role}".encode())


Notices = list[tuple[str, str | None]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Notices:
    """What the server says to those who connect: message and hint."""
    heard: Notices = []

    def listening(dsn: str, *, role: str | None = None) -> Connection:
        conn = open_connection(dsn, role=role)
        conn.add_notice_handler(
            lambda notice: heard.append((notice.message_primary or "", notice.message_hint))
        )
        return conn

    monkeypatch.setattr(install, "open_connection", listening)
    return heard


def test_a_migration_without_the_right_to_make_roles_says_what_is_left_to_do(
    humble: str, told: Notices
) -> None:
    install.migrate(humble)
    asked = [message for message, _ in told if message.startswith("an administrator must run")]
    assert asked == [
        f"an administrator must run: CREATE ROLE {role} NOLOGIN; GRANT {role} TO humble;"
        for role in ROLES
    ]
    assert all(hint and "grant_roles()" in hint for message, hint in told if message in asked)
    with open_connection(humble) as conn:
        install.require_schema(conn)
        # The schema is whole; its owner does everything until the roles are there.
        conn.execute(
            "WITH u AS (INSERT INTO app_user DEFAULT VALUES RETURNING user_id) "
            "INSERT INTO strategy_run (user_id, status) SELECT user_id, 'RUNNING' FROM u"
        )


def test_after_the_administrator_came_the_rights_are_given(
    humble: str, other_server: Server, told: Notices
) -> None:
    install.migrate(humble)
    with open_connection(humble) as conn:
        todo = install.grant_roles(conn)
        assert len(todo) == len(ROLES)
        _administer(other_server, todo)
        # As the keeper the owner has acted once, and is not to do so again.
        last = install.grant_roles(conn)
        assert last == ["REVOKE oms_keeper FROM humble;"]
        assert _guard(conn) == [("role humble", "may write what nobody proves")]
        _administer(other_server, last)
        assert install.grant_roles(conn) == []
        assert _guard(conn) == []
        assert _rights(conn, "oms_auditor").keys() == {*ENGINE, "alembic_version"}
    with open_connection(humble, role="oms_engine") as conn:
        install.require_schema(conn)
        assert conn.execute("SELECT current_user").fetchone() == ("oms_engine",)
        conn.execute("INSERT INTO app_user DEFAULT VALUES")


def _administer(server: Server, statements: list[str]) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        for statement in statements:
            admin.execute(statement.encode())


def _guard(conn: Connection) -> list[tuple[str, str]]:
    return conn.execute("SELECT subject, finding FROM audit_guard").fetchall()


def test_who_may_not_pass_on_the_schema_keeps_the_function_and_is_told(
    humble: str, other_server: Server, told: Notices
) -> None:
    """Until then the function is the owner's, and what it writes is proven."""
    _administer(other_server, ["ALTER ROLE humble CREATEROLE"])
    with psycopg.connect(other_server.dsn("humble"), autocommit=True) as admin:
        admin.execute("ALTER SCHEMA public OWNER TO postgres")
        admin.execute("GRANT CREATE ON SCHEMA public TO humble")
    install.migrate(humble)
    wanted = "GRANT CREATE ON SCHEMA public TO humble WITH GRANT OPTION;"
    with open_connection(humble) as conn:
        assert install.grant_roles(conn) == [wanted]
        with psycopg.connect(other_server.dsn("humble"), autocommit=True) as admin:
            admin.execute(wanted.encode())
        assert install.grant_roles(conn) == []
        assert _guard(conn) == []


def test_a_new_function_is_handed_over_again_or_asked_for(
    humble: str, other_server: Server, told: Notices
) -> None:
    """Who may no longer act as the keeper makes the next ticks_write, but can't give it away."""
    install.migrate(humble, "0004")
    with open_connection(humble) as conn:
        _administer(other_server, install.grant_roles(conn))
        _administer(other_server, install.grant_roles(conn))
        assert _guard(conn) == []
    told.clear()
    install.migrate(humble)
    asked = [message for message, _ in told if "administrator" in message]
    assert asked == ["an administrator must run: GRANT oms_keeper TO humble;"]
    with open_connection(humble) as conn:
        _administer(other_server, [asked[0].partition(": ")[2]])
        _administer(other_server, install.grant_roles(conn))
        assert install.grant_roles(conn) == []
        assert _guard(conn) == []
        owner = "SELECT proowner::regrole::text FROM pg_proc WHERE proname = 'ticks_write'"
        assert conn.execute(owner).fetchone() == ("oms_keeper",)


def test_roles_that_are_there_but_not_ours_to_act_as_are_asked_for(
    humble: str, other_server: Server, told: Notices
) -> None:
    with psycopg.connect(other_server.dsn(), autocommit=True) as admin:
        for role in ROLES:
            admin.execute(f"CREATE ROLE {role} NOLOGIN".encode())
    install.migrate(humble)
    assert [message for message, _ in told if "administrator" in message] == [
        f"an administrator must run: GRANT {role} TO humble;" for role in ROLES
    ]
    with open_connection(humble) as conn:
        assert _rights(conn, "oms_engine")["orders"].keys() == {"SELECT", "INSERT", "UPDATE"}


def test_granting_again_takes_back_what_was_given_besides(conn: Connection) -> None:
    before = {role: _rights(conn, role) for role in ("oms_engine", "oms_auditor")}
    conn.execute("GRANT UPDATE (cash), DELETE ON strategy_run TO oms_engine")
    conn.execute("GRANT ALL ON event_ledger TO oms_auditor")
    install.grant_roles(conn)
    assert {role: _rights(conn, role) for role in before} == before


def test_a_schema_that_anybody_may_write_into_is_warned_of(
    humble: str, other_server: Server, told: Notices
) -> None:
    with psycopg.connect(other_server.dsn("humble"), autocommit=True) as admin:
        admin.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
    install.migrate(humble)
    assert (
        "anybody may create functions in schema public and so change what ours call",
        "An administrator must run: REVOKE CREATE ON SCHEMA public FROM PUBLIC;",
    ) in told


def test_a_login_that_may_not_create_tables_is_told_so(humble: str, other_server: Server) -> None:
    with psycopg.connect(other_server.dsn(), autocommit=True) as admin:
        admin.execute("DROP ROLE IF EXISTS stranger")
        admin.execute("CREATE ROLE stranger LOGIN")
        stranger = psycopg.conninfo.make_conninfo(humble, user="stranger")
        with pytest.raises(ConfigurationError, match="migrate as the database's owner"):
            install.migrate(stranger)
        admin.execute("DROP ROLE stranger")
