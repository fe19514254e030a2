-- Who may do what. Roles belong to the server, not to the database: they are made where the
-- migrating user may make them; where not, a warning says what an administrator must run.

CREATE FUNCTION our_roles() RETURNS text[]
LANGUAGE sql IMMUTABLE
RETURN ARRAY['oms_engine', 'oms_connector', 'oms_auditor', 'oms_keeper'];

COMMENT ON FUNCTION our_roles IS 'Our roles. Nobody acts as oms_keeper but ticks_write.';

DO $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY our_roles() LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
            EXCEPTION
                WHEN insufficient_privilege THEN
                    NULL;  -- grant_roles() says below what an administrator must run
                WHEN duplicate_object OR unique_violation THEN
                    NULL;  -- another database of this server has just made it
            END;
        END IF;
    END LOOP;
END $$;

-- The rights of each role: all that it needs and no more. The engine inserts what happens and
-- moves what moves; it has no right to a number that follows from something else. Those are
-- written, behind the tables' triggers, by execution_apply, books_follow and split_applied_apply,
-- which have the owner's rights, and by ticks_write, which has the keeper's.
CREATE FUNCTION role_rights() RETURNS TABLE (role text, rights text)
LANGUAGE sql IMMUTABLE SET search_path = public, pg_temp AS $$
    VALUES
        ('oms_engine', 'USAGE ON SCHEMA public'),
        ('oms_engine', 'INSERT ON app_user, instrument, fx_rate, calendar_session, price_bar,
            corporate_action, engine_state, engine_status, sip_plan'),
        ('oms_engine', 'INSERT (user_id, run_id, name, status, strategy, parameters, broker, paper,
            account_type, calendar, currency, tick_at, pnl_method, initial_cash),
            UPDATE (status) ON strategy_run'),
        ('oms_engine', 'UPDATE (last_logical_time, state, recorded_at) ON engine_state'),
        ('oms_engine', 'UPDATE (heartbeat_at, lag_seconds, last_error, error_at)
            ON engine_status'),
        ('oms_engine', 'INSERT (user_id, run_id, order_id, client_order_id, symbol, side, quantity,
            order_type, time_in_force, limit_price, stop_price, trail_amount, trail_percent,
            expire_at, reference_price, logical_time), UPDATE (status, status_at, status_reason,
            reject_source, reject_code, stop_price, triggered_at, expire_at)
            ON orders, paper_order'),
        ('oms_engine', 'INSERT (account, purpose, recovered), UPDATE (quantity, limit_price,
            trail_amount, account, pending_reconcile, broker_order_id, perm_id) ON orders'),
        ('oms_engine', 'INSERT (user_id, run_id, execution_id, order_id, symbol, side, quantity,
            price, commission, commission_currency, logical_time, event_at)
            ON execution, paper_trade'),
        ('oms_engine', 'INSERT (reverses) ON execution'),
        ('oms_engine', 'UPDATE (mark_price, marked_at) ON position, paper_position'),
        ('oms_engine', 'INSERT (user_id, run_id, symbol, ex_date, kind, logical_time)
            ON split_applied'),
        ('oms_engine', 'INSERT (user_id, run_id, logical_time) ON mtm_ledger, paper_equity_curve'),
        ('oms_engine', 'INSERT (user_id, run_id, logical_time, event_type, subject, payload)
            ON event_ledger'),
        ('oms_engine', 'UPDATE (status, start_on) ON sip_plan'),
        ('oms_engine', 'EXECUTE ON FUNCTION reconcile_analyze'),
        ('oms_engine', 'EXECUTE ON FUNCTION halt_place, halt_lift, halt_enforce, system_halt_place,
            system_halt_lift, run_equity_peak, open_orders_sum'),
        ('oms_engine', 'INSERT (user_id, flatten_id, scope, run_id, account, reason, asked_by,
            asked_at), UPDATE (status, checked_at, finished_at, summary) ON flatten_request'),
        ('oms_engine', 'INSERT, UPDATE (currency, opening_cash, calendar, time_zone, opens_at,
            closes_at, out_of_session, orders_per_second, messages_per_second, heartbeat_seconds,
            stale_seconds, settings) ON broker_account'),
        ('oms_engine', 'INSERT ON run_route'),
        ('oms_engine', 'INSERT (user_id, account, command_id, priority, kind, run_id, order_id,
            order_version, payload), UPDATE (done_at, outcome) ON broker_command'),
        ('oms_engine', 'UPDATE (applied_at, finding, code, note) ON broker_event'),
        ('oms_engine', 'INSERT ON order_broker_id'),
        ('oms_engine', 'INSERT (user_id, run_id, execution_id, amount, currency, event_at)
            ON execution_commission'),
        ('oms_engine', 'INSERT, UPDATE (acknowledged_at, acknowledged_by) ON alert'),
        ('oms_engine', 'INSERT ON reconciliation, reconciliation_difference'),
        ('oms_connector', 'USAGE ON SCHEMA public'),
        ('oms_connector', 'SELECT ON instrument, calendar_session, broker_account, broker_lease,
            broker_command'),
        ('oms_connector', 'SELECT (user_id, account, number, holder), INSERT (user_id, account,
            number, holder, kind, priority, order_ref, broker_order_id, perm_id, execution_id,
            payload, event_at, received_at) ON broker_event'),
        ('oms_connector', 'EXECUTE ON FUNCTION lease_take, lease_renew, lease_release,
            commands_claim, commands_throttled, commands_done, connector_alert,
            executions_unheard'),
        ('oms_auditor', 'USAGE ON SCHEMA public'),
        ('oms_keeper', 'USAGE ON SCHEMA public'),
        ('oms_keeper', 'INSERT ON orders, execution, mtm_ledger, event_ledger, position,
            engine_state, engine_status'),
        ('oms_keeper', 'UPDATE (cash, books_seq) ON strategy_run'),
        ('oms_keeper', 'UPDATE (quantity, cost_basis, realized_pnl, mark_price, marked_at)
            ON position'),
        ('oms_keeper', 'UPDATE (last_logical_time, state, recorded_at) ON engine_state'),
        ('oms_keeper', 'UPDATE (heartbeat_at, lag_seconds) ON engine_status'),
        ('oms_keeper', 'EXECUTE ON FUNCTION open_orders_sum, run_equity_peak, ledger_analyze')
$$;

COMMENT ON FUNCTION role_rights IS 'The rights of each role, besides reading.';

-- Makes ticks_write the keeper's. Who migrates acts as the keeper for that moment and no longer,
-- since what the keeper writes is proven by nobody else. Until then it is the owner's, and proven.
CREATE FUNCTION ticks_write_hand_over() RETURNS SETOF text
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    acts     text := CASE WHEN current_setting('server_version_num')::integer >= 160000
                          THEN 'SET' ELSE 'MEMBER' END;
    function oid := (SELECT p.oid FROM pg_proc p
                     WHERE p.pronamespace = 'public'::regnamespace AND p.proname = 'ticks_write');
BEGIN
    IF (SELECT proowner FROM pg_proc WHERE oid = function) <> 'oms_keeper'::regrole THEN
        GRANT EXECUTE ON FUNCTION ticks_write TO oms_engine;
        IF NOT has_schema_privilege('public', 'CREATE WITH GRANT OPTION') THEN
            RETURN NEXT format('GRANT CREATE ON SCHEMA public TO %I WITH GRANT OPTION;',
                               current_user);
            RETURN;
        END IF;
        BEGIN
            IF NOT pg_has_role('oms_keeper', acts) THEN
                EXECUTE format('GRANT oms_keeper TO %I', current_user);
            END IF;
        EXCEPTION WHEN insufficient_privilege THEN
            RETURN NEXT format('GRANT oms_keeper TO %I;', current_user);
            RETURN;
        END;
        GRANT CREATE ON SCHEMA public TO oms_keeper;
        EXECUTE format('ALTER FUNCTION %s OWNER TO oms_keeper', function::regprocedure);
        REVOKE CREATE ON SCHEMA public FROM oms_keeper;
    END IF;
    IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN
        RETURN;
    END IF;
    BEGIN
        EXECUTE format('REVOKE oms_keeper FROM %I', current_user);
    EXCEPTION WHEN insufficient_privilege THEN
        NULL;  -- told below
    END;
    IF pg_has_role('oms_keeper', acts) THEN
        RETURN NEXT format('REVOKE oms_keeper FROM %I;', current_user);
    END IF;
END $$;

COMMENT ON FUNCTION ticks_write_hand_over IS
    'Gives ticks_write to the keeper; returns what an administrator must still run.';

-- Gives each of the roles that exist exactly its rights; it may be called again at any time. The
-- caller becomes a member of them, so that it can act as the engine and the auditor, but not of the
-- keeper.
CREATE FUNCTION grant_roles() RETURNS SETOF text
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    item record;
    ours text := array_to_string(our_relations(), ', ');
BEGIN
    FOR item IN SELECT rolname FROM pg_roles WHERE rolname = ANY (our_roles()) LOOP
        EXECUTE format('REVOKE ALL ON %s FROM %I', ours, item.rolname);
        IF item.rolname <> 'oms_connector' THEN
            EXECUTE format('GRANT SELECT ON %s TO %I', ours, item.rolname);
        END IF;
    END LOOP;
    FOR item IN SELECT g.role, g.rights FROM role_rights() g
                JOIN pg_roles r ON r.rolname = g.role LOOP
        EXECUTE format('GRANT %s TO %I', item.rights, item.role);
    END LOOP;
    FOR item IN SELECT rolname FROM pg_roles
                WHERE rolname = ANY (our_roles()) AND rolname <> 'oms_keeper'
                  -- From 16 on, who made a role is its member without being able to act as it.
                  AND NOT pg_has_role(current_user, oid, CASE
                      WHEN current_setting('server_version_num')::integer >= 160000 THEN 'SET'
                      ELSE 'MEMBER' END) LOOP
        BEGIN
            EXECUTE format('GRANT %I TO %I', item.rolname, current_user);
        EXCEPTION WHEN insufficient_privilege THEN
            RETURN NEXT format('GRANT %I TO %I;', item.rolname, current_user);
        END;
    END LOOP;
    RETURN QUERY SELECT format('CREATE ROLE %I NOLOGIN; GRANT %I TO %I;', w, w, current_user)
                 FROM unnest(our_roles()) w WHERE w NOT IN (SELECT rolname FROM pg_roles);
    IF to_regrole('oms_engine') IS NOT NULL AND to_regrole('oms_keeper') IS NOT NULL THEN
        RETURN QUERY SELECT * FROM ticks_write_hand_over();
    END IF;
END $$;

COMMENT ON FUNCTION grant_roles IS
    'Gives the roles their rights; returns what an administrator must still run.';

-- A trigger function is called by its trigger, whoever writes; nobody else needs it, and nobody
-- shall put it on a table of their own and feed it with rows of their own.
DO $$
DECLARE
    hidden regprocedure;
BEGIN
    FOR hidden IN
        SELECT DISTINCT t.tgfoid
        FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
        WHERE NOT t.tgisinternal AND c.relnamespace = 'public'::regnamespace
          AND c.relname = ANY (our_relations())
    LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', hidden);
    END LOOP;
END $$;

REVOKE EXECUTE ON FUNCTION grant_roles, ticks_write, ticks_write_hand_over, books_follow,
    ledger_analyze, run_rebuild, run_rebuild_books FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION lease_take, lease_renew, lease_release, commands_claim,
    commands_throttled, commands_done, connector_alert, executions_unheard FROM PUBLIC;
REVOKE EXECUTE ON FUNCTION halt_place, halt_lift, halt_enforce, system_halt_place,
    system_halt_lift, run_equity_peak, open_orders_sum, reconcile_analyze FROM PUBLIC;

DO $$
DECLARE
    missing text;
BEGIN
    EXECUTE format('REVOKE ALL ON %s FROM PUBLIC', array_to_string(our_relations(), ', '));
    FOR missing IN SELECT grant_roles() LOOP
        RAISE WARNING 'an administrator must run: %', missing
            USING HINT = 'Then `oms db migrate`, or SELECT grant_roles() as the owner.';
    END LOOP;
    IF EXISTS (SELECT FROM pg_namespace n, aclexplode(n.nspacl) a
               WHERE n.nspname = 'public' AND a.grantee = 0 AND a.privilege_type = 'CREATE') THEN
        RAISE WARNING 'anybody may create functions in schema public and so change what ours call'
            USING HINT = 'An administrator must run: REVOKE CREATE ON SCHEMA public FROM PUBLIC;';
    END IF;
END $$;
