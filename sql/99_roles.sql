-- Who may do what. Roles belong to the server, not to the database: they are made where the
-- migrating user may make them; where not, a warning says what an administrator must run.

DO $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['oms_engine', 'oms_connector', 'oms_auditor'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = wanted) THEN
            BEGIN
                EXECUTE format('CREATE ROLE %I NOLOGIN', wanted);
            EXCEPTION
                WHEN insufficient_privilege THEN
                    RAISE WARNING 'role % can not be created by %', wanted, current_user
                        USING HINT = format('An administrator must run: CREATE ROLE %I NOLOGIN; then SELECT grant_roles() as the owner.', wanted);
                WHEN duplicate_object OR unique_violation THEN
                    NULL;  -- another database of this server has just made it
            END;
        END IF;
    END LOOP;
END $$;

-- Grants everything to whichever of the roles exist; it may be called again at any time. The
-- caller becomes a member of the engine's and the auditor's role, so that it can act as them.
CREATE FUNCTION grant_roles() RETURNS SETOF text
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    item record;
BEGIN
    FOR item IN SELECT r.rolname, g.needs FROM (VALUES
        ('oms_engine', 'USAGE ON SCHEMA public'),
        ('oms_engine', 'SELECT ON ALL TABLES IN SCHEMA public'),
        ('oms_engine', 'INSERT ON app_user, instrument, calendar_session, price_bar, corporate_action, strategy_run, engine_state, engine_status, orders, execution, position, split_applied, mtm_ledger, event_ledger, sip_plan, risk_limit'),
        ('oms_engine', 'UPDATE ON strategy_run, engine_state, engine_status, orders, position, sip_plan, risk_limit, instrument'),
        ('oms_engine', 'INSERT, UPDATE ON paper_order, paper_position'),
        ('oms_engine', 'INSERT ON paper_trade, paper_equity_curve'),
        ('oms_engine', 'DELETE ON risk_limit'),
        ('oms_connector', 'USAGE ON SCHEMA public'),
        ('oms_connector', 'SELECT ON instrument, calendar_session'),
        ('oms_auditor', 'USAGE ON SCHEMA public'),
        ('oms_auditor', 'SELECT ON ALL TABLES IN SCHEMA public')) AS g (role, needs)
        LEFT JOIN pg_roles r ON r.rolname = g.role
    LOOP
        IF item.rolname IS NOT NULL THEN
            EXECUTE format('GRANT %s TO %I', item.needs, item.rolname);
        END IF;
    END LOOP;
    FOR item IN SELECT rolname FROM pg_roles
                WHERE rolname IN ('oms_engine', 'oms_auditor', 'oms_connector')
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
    RETURN QUERY SELECT format('CREATE ROLE %I NOLOGIN;', w)
                 FROM unnest(ARRAY['oms_engine', 'oms_connector', 'oms_auditor']) w
                 WHERE w NOT IN (SELECT rolname FROM pg_roles);
END $$;

COMMENT ON FUNCTION grant_roles IS
    'Grants the roles their rights; returns what an administrator must still run.';

REVOKE ALL ON ALL TABLES IN SCHEMA public FROM PUBLIC;

DO $$
DECLARE
    missing text;
BEGIN
    FOR missing IN SELECT grant_roles() LOOP
        RAISE WARNING 'the migration may not run: %', missing
            USING HINT = 'An administrator must run it; then SELECT grant_roles().';
    END LOOP;
END $$;
