-- Back to ticks that are proven by the triggers alone.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'oms_keeper') THEN
        EXECUTE format('REVOKE ALL ON %s FROM oms_keeper', array_to_string(our_relations(), ', '));
        REVOKE ALL ON SCHEMA public FROM oms_keeper;
        REVOKE ALL ON FUNCTION open_orders_sum, run_equity_peak, ledger_analyze FROM oms_keeper;
    END IF;
END $$;

DROP VIEW audit_guard;

DROP TRIGGER strategy_run_a_check_update ON strategy_run;

DROP TRIGGER engine_state_a_check_write ON engine_state;

DROP TRIGGER engine_status_a_guard_write ON engine_status;

DROP TRIGGER execution_m_apply ON execution;

DROP TRIGGER position_a_check_write ON position;

DROP TRIGGER mtm_ledger_m_prove ON mtm_ledger;

DROP TRIGGER orders_m_record_insert ON orders;

DROP TRIGGER event_ledger_m_prove ON event_ledger;

CREATE OR REPLACE FUNCTION position_check_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run record;
    due public.position;
BEGIN
    -- What a real broker did is so, even if a cash account is short by it.
    SELECT r.status, CASE WHEN r.broker = 'paper' THEN r.account_type ELSE 'MARGIN' END
               AS account_type, r.books_seq, r.broker
    INTO run FROM strategy_run r
    WHERE r.user_id = NEW.user_id AND r.run_id = NEW.run_id FOR NO KEY UPDATE;
    IF run.status IS DISTINCT FROM 'RUNNING' THEN
        PERFORM run_lock(NEW.user_id, NEW.run_id, 'position', 'RUNNING',
                         CASE WHEN run.broker <> 'paper' THEN 'STOPPING' ELSE 'RUNNING' END);
    END IF;
    IF TG_OP = 'UPDATE' THEN
        IF NEW.user_id <> OLD.user_id OR NEW.run_id <> OLD.run_id THEN
            PERFORM row_check_keeps_run(OLD.user_id, OLD.run_id, NEW.user_id, NEW.run_id,
                                        'position');
        ELSIF NEW.marked_at < OLD.marked_at
              OR NEW.marked_at IS NULL AND OLD.marked_at IS NOT NULL THEN
            RAISE EXCEPTION 'the mark of % is from %, not from an earlier %', NEW.symbol,
                OLD.marked_at, NEW.marked_at
                USING ERRCODE = '23T07', CONSTRAINT = 'position_mark_moves_forward',
                      TABLE = 'position', COLUMN = 'marked_at', HINT = 'Mark with a newer price.';
        ELSIF (NEW.symbol, NEW.quantity, NEW.cost_basis, NEW.realized_pnl)
              IS NOT DISTINCT FROM (OLD.symbol, OLD.quantity, OLD.cost_basis, OLD.realized_pnl) THEN
            RETURN NEW;
        END IF;
        due := OLD;
    ELSE
        SELECT * INTO due FROM position p
        WHERE p.user_id = NEW.user_id AND p.run_id = NEW.run_id AND p.symbol = NEW.symbol;
    END IF;
    IF run.broker = 'paper' THEN
        due := position_after_events(due, NEW.user_id, NEW.run_id, NEW.symbol, run.books_seq,
                                     run.account_type);
    ELSE
        due := position_after_news(due, NEW.user_id, NEW.run_id, NEW.symbol, run.books_seq);
    END IF;
    IF NEW.quantity IS NULL THEN
        NEW.quantity := coalesce(due.quantity, 0);
        NEW.cost_basis := coalesce(due.cost_basis, 0);
        NEW.realized_pnl := coalesce(due.realized_pnl, 0);
        -- A split restates the mark too, which nobody else gives then.
        IF NEW.marked_at IS NULL OR NEW.mark_price IS NOT DISTINCT FROM OLD.mark_price THEN
            NEW.mark_price := due.mark_price;
            NEW.marked_at := due.marked_at;
        END IF;
    END IF;
    IF (NEW.quantity, NEW.cost_basis, NEW.realized_pnl)
       IS DISTINCT FROM
       (coalesce(due.quantity, 0), coalesce(due.cost_basis, 0), coalesce(due.realized_pnl, 0))
       OR TG_OP = 'UPDATE' AND NEW.symbol <> OLD.symbol THEN
        RAISE EXCEPTION 'the position in % follows from its executions: %, not %', NEW.symbol,
            coalesce(due.quantity, 0), NEW.quantity
            USING ERRCODE = '23T04', CONSTRAINT = 'position_from_executions', TABLE = 'position',
                  COLUMN = 'quantity', HINT = 'Insert executions; the database computes positions.';
    END IF;
    RETURN NEW;
END $$;

-- A planner that has never seen these tables takes any index of a run for as good as another, and
-- reads the whole run where one row was asked for. Autovacuum looks once a minute at most; a replay
-- or a broker has written hundreds of thousands of rows by then. So a run that grows long before
-- anybody has looked has them looked at, once.
CREATE OR REPLACE FUNCTION ledger_analyze() RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF (SELECT reltuples FROM pg_class WHERE oid = 'event_ledger'::regclass) < 500 THEN
        ANALYZE event_ledger, orders, execution, mtm_ledger, position, strategy_run,
            broker_command, broker_event;
    END IF;
END $$;

-- Orders of ours that should be at the broker and that it does not work. Executions that explain it
-- were applied before. Where the broker says how an order ended, so it did; of what it never said a
-- word, the submit never arrived.
CREATE OR REPLACE FUNCTION reconcile_missing(of_user uuid, of_account text, of_snapshot uuid)
RETURNS SETOF order_difference
LANGUAGE sql STABLE ROWS 100 SET search_path = public, pg_temp AS $$
    SELECT d.class, o.run_id, o.order_id, o.order_id::text, b.becomes,
           CASE WHEN b.becomes IS NOT NULL THEN 'CANCELED'
                WHEN d.class = 'NEVER_ARRIVED' THEN 'KEPT'
                ELSE 'ALERTED' END,
           CASE WHEN z.status IS NOT NULL THEN 'the broker says ' || z.status
                WHEN d.class = 'MISSING_AT_BROKER'
                THEN 'the broker does not work it, and no execution explains that'
                WHEN d.class = 'NEVER_ARRIVED' THEN 'its submit never reached the broker'
                ELSE 'what was asked may still be on its way' END,
           order_difference_ours(o),
           CASE WHEN z.status IS NOT NULL THEN jsonb_strip_nulls(to_jsonb(z)) END, c.command_id,
           CASE WHEN d.class = 'NEVER_ARRIVED' THEN d.class WHEN z.status IS NOT NULL THEN 'ARRIVED'
                END, z.broker_order_id, z.perm_id
    FROM snapshot_facts(of_user, of_account, of_snapshot) s
    JOIN orders o ON o.user_id = of_user AND o.account = of_account
                 AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
    LEFT JOIN broker_command c ON c.user_id = of_user AND c.account = of_account
                              AND c.order_id = o.order_id AND c.kind = 'SUBMIT'
    LEFT JOIN snapshot_orders(of_user, of_account, of_snapshot) t
           ON t.order_ref = o.order_id::text
    LEFT JOIN snapshot_closed(of_user, of_account, of_snapshot) z
           ON z.order_ref = o.order_id::text
    LEFT JOIN snapshot_overtaken(of_user, of_account, of_snapshot) n
           ON n.order_ref = o.order_id::text
    CROSS JOIN LATERAL (SELECT CASE
        WHEN o.status NOT IN ('NEW', 'PENDING', 'PENDING_CANCEL') OR o.filled_quantity > 0
             OR num_nonnulls(o.broker_order_id, o.perm_id) > 0 OR z.status IS NOT NULL
             OR EXISTS (SELECT FROM broker_event e
                        WHERE e.user_id = of_user AND e.account = of_account
                          AND e.order_ref = o.order_id::text
                          AND broker_event_shows_order(e)) THEN 'MISSING_AT_BROKER'
        WHEN command_is_settled(c, s.asked_at, s.holder, s.first_number) THEN 'NEVER_ARRIVED'
        ELSE 'UNDECIDED' END AS class) d
    CROSS JOIN LATERAL (SELECT CASE
        WHEN d.class = 'UNDECIDED' OR z.status = 'FILLED' OR z.filled > o.filled_quantity THEN NULL
        WHEN d.class = 'NEVER_ARRIVED' AND o.status <> 'PENDING_CANCEL' THEN NULL
        WHEN z.status = 'EXPIRED' OR z.status = 'REJECTED' AND o.filled_quantity = 0 THEN z.status
        ELSE 'CANCELED' END AS becomes) b
    WHERE t.order_ref IS NULL AND n.order_ref IS NULL
      AND (o.recovered OR z.status IS NOT NULL OR c.claimed_by IS NOT NULL
           AND coalesce(c.outcome, 'UNKNOWN') NOT IN ('NEVER_ARRIVED', 'REFUSED'))
$$;

-- In what an order differs: its status first, which says what was lost on the way; then the rest.
CREATE OR REPLACE FUNCTION order_compare_status(o orders, t snapshot_order, asked broker_command,
                                     is_settled boolean,
                                     OUT class text, OUT becomes text, OUT action text,
                                     OUT reason text)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    becomes := order_status_at_broker(o, t.status);
    class := 'STATUS_DIFFERS';
    action := 'MOVED';
    IF o.status IN ('NEW', 'PENDING') THEN
        class := 'FOUND';
        reason := 'its submit reached the broker, which works it';
    ELSIF o.status IN ('PENDING_CANCEL', 'PENDING_MODIFY') AND NOT is_settled
          AND NOT coalesce(order_asked_for(asked, t), false) THEN
        class := 'UNDECIDED';
        becomes := NULL;
        reason := 'what was asked may still be on its way';
    ELSIF o.status = 'PENDING_CANCEL' THEN
        action := 'CANCEL_SENT';
        reason := 'the cancel never reached the broker, which works it';
    ELSIF o.status = 'PENDING_MODIFY' THEN
        IF order_asked_for(asked, t) THEN
            class := 'TERMS_DIFFER';
            action := 'TERMS_TAKEN';
            reason := 'the modification reached the broker';
        ELSIF order_has_terms(o.order_type, o.quantity, o.limit_price, o.stop_price, t) THEN
            reason := 'the modification never reached the broker';
        ELSE
            class := 'TERMS_DIFFER';
            action := 'ALERTED';
            reason := 'the broker works it on terms that nobody asked for';
        END IF;
    ELSIF o.status <> coalesce(becomes, '') THEN
        reason := format('we say %s, the broker works it', o.status);
    ELSE
        class := NULL;
    END IF;
    IF class <> 'UNDECIDED' AND NOT EXISTS (SELECT FROM order_transition x
                                            WHERE x.from_status = o.status
                                              AND x.to_status = becomes) THEN
        becomes := NULL;
        action := 'ALERTED';
    END IF;
END $$;

CREATE OR REPLACE FUNCTION order_compare(o orders, t snapshot_order, of_account text, asked broker_command,
                              is_settled boolean)
RETURNS TABLE (class text, becomes text, action text, reason text)
LANGUAGE plpgsql STABLE ROWS 2 SET search_path = public, pg_temp AS $$
BEGIN
    IF o.account <> of_account THEN
        RETURN QUERY SELECT 'ACCOUNT_DIFFERS', NULL, 'ALERTED',
                            format('it was sent to %s, and %s works it', o.account, of_account);
        RETURN;
    ELSIF o.symbol <> t.symbol THEN
        RETURN QUERY SELECT 'CONTRACT_CHANGED', NULL,
                            CASE WHEN o.status = ANY ('{PENDING_CANCEL,FILLED,CANCELED,REJECTED,'
                                                      'EXPIRED}') THEN 'ALERTED'
                                 ELSE 'CANCEL_SENT' END,
                            format('%s is %s at the broker', o.symbol, t.symbol);
        RETURN;
    END IF;
    RETURN QUERY SELECT s.* FROM order_compare_status(o, t, asked, is_settled) s
                 WHERE s.class IS NOT NULL;
    IF o.status <> 'PENDING_MODIFY' AND (o.side <> t.side OR NOT order_has_terms(
        o.order_type, o.quantity, o.limit_price, o.stop_price, t)) THEN
        RETURN QUERY SELECT 'TERMS_DIFFER', NULL,
            CASE WHEN o.side = t.side AND order_asked_for(asked, t)
                      AND o.status IN ('ROUTED', 'PARTIALLY_FILLED') THEN 'TERMS_TAKEN'
                 ELSE 'ALERTED' END,
            CASE WHEN order_asked_for(asked, t) THEN 'the modification reached the broker'
                 ELSE 'the broker works it on terms that nobody asked for' END;
    END IF;
    IF o.filled_quantity <> t.filled THEN
        RETURN QUERY SELECT 'FILLED_DIFFERS', NULL, 'ALERTED',
                            'its executions do not add up to what the broker says is filled';
    END IF;
    IF o.status NOT IN ('NEW', 'PENDING')
       AND (o.broker_order_id, o.perm_id) IS DISTINCT FROM
           (coalesce(t.broker_order_id, o.broker_order_id), coalesce(t.perm_id, o.perm_id)) THEN
        RETURN QUERY SELECT 'IDS_DIFFER', NULL, 'RECORDED', 'the broker has other ids for it now';
    END IF;
END $$;

-- The rights of each role: all that it needs and no more. The engine inserts what happens and
-- moves what moves; it has no right to a number that follows from something else. Those are
-- written by ticks_write and, behind the tables' triggers, by execution_apply, books_follow and
-- split_applied_apply, which have the owner's rights.
CREATE OR REPLACE FUNCTION role_rights() RETURNS TABLE (role text, rights text)
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
        ('oms_engine', 'EXECUTE ON FUNCTION ticks_write, reconcile_analyze'),
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
        ('oms_auditor', 'USAGE ON SCHEMA public')
$$;

-- Gives each of the roles that exist exactly its rights; it may be called again at any time. The
-- caller becomes a member of them, so that it can act as the engine and the auditor.
CREATE OR REPLACE FUNCTION grant_roles() RETURNS SETOF text
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    item record;
    ours text := array_to_string(our_relations(), ', ');
BEGIN
    FOR item IN SELECT rolname FROM pg_roles
                WHERE rolname IN ('oms_engine', 'oms_connector', 'oms_auditor') LOOP
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
                WHERE rolname IN ('oms_engine', 'oms_connector', 'oms_auditor')
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
                 FROM unnest(ARRAY['oms_engine', 'oms_connector', 'oms_auditor']) w
                 WHERE w NOT IN (SELECT rolname FROM pg_roles);
END $$;

DROP FUNCTION ticks_write_hand_over;

DROP FUNCTION our_roles;

DROP FUNCTION ticks_write;

DROP FUNCTION engine_keep;

DROP FUNCTION ticks_append;

DROP FUNCTION ticks_refuse;

DROP FUNCTION position_refuse_mark;

CREATE TRIGGER strategy_run_a_check_update BEFORE UPDATE ON strategy_run
    FOR EACH ROW EXECUTE FUNCTION strategy_run_check_update();

CREATE TRIGGER engine_state_a_check_write BEFORE INSERT OR UPDATE ON engine_state
    FOR EACH ROW EXECUTE FUNCTION engine_state_check_write();

CREATE TRIGGER engine_status_a_guard_write BEFORE INSERT OR UPDATE ON engine_status
    FOR EACH ROW EXECUTE FUNCTION run_guard_write('engine_status');

CREATE TRIGGER execution_m_apply AFTER INSERT ON execution
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION execution_apply();

CREATE TRIGGER position_a_check_write BEFORE INSERT OR UPDATE ON position
    FOR EACH ROW EXECUTE FUNCTION position_check_write();

CREATE TRIGGER mtm_ledger_m_prove AFTER INSERT ON mtm_ledger
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION mtm_ledger_prove();

-- The chain as an aggregate, so that many events are chained in one statement.
CREATE FUNCTION event_chain_next(chain bytea, head bytea, of_user uuid, of_run uuid, seq bigint,
                                 logical_time timestamptz, event_type text, subject text,
                                 payload jsonb, recorded_at timestamptz)
RETURNS bytea LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN event_hash(coalesce(chain, head), of_user, of_run, seq, logical_time, event_type,
                      subject, payload, recorded_at);
END $$;

COMMENT ON FUNCTION event_chain_next IS 'One step of event_chain.';

CREATE AGGREGATE event_chain(head bytea, of_user uuid, of_run uuid, seq bigint,
                             logical_time timestamptz, event_type text, subject text,
                             payload jsonb, recorded_at timestamptz) (
    SFUNC = event_chain_next, STYPE = bytea);

COMMENT ON AGGREGATE event_chain(bytea, uuid, uuid, bigint, timestamptz, text, text, jsonb,
                                 timestamptz) IS
    'The hash of the last of some consecutive events; head is the hash of the one before them.';

CREATE TRIGGER orders_m_record_insert AFTER INSERT ON orders
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION orders_record_insert();

CREATE TRIGGER event_ledger_m_prove AFTER INSERT ON event_ledger
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION event_ledger_prove();

-- Ticks as the engine writes them: everything that one tick or many told, in one statement, which
-- the triggers of the tables then prove as a whole. Nothing here is taken on the engine's word.

CREATE FUNCTION plans_are_active(of_user uuid, of_run uuid, event_types text[],
                                 event_subject text[]) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN NOT EXISTS (
        SELECT FROM unnest(event_types, event_subject) AS t (event_type, subject)
        WHERE t.event_type = 'SIP_EXECUTED'
          AND NOT EXISTS (SELECT FROM sip_plan p
                          WHERE p.user_id = of_user AND p.run_id = of_run
                            AND p.plan = split_part(t.subject, '@', 1)
                            AND p.status = 'ACTIVE'));
END $$;

COMMENT ON FUNCTION plans_are_active IS
    'Whether the plans that events say were carried out are active.';

-- What is told are the events, in order. Trades are orders that their tick filled whole, with one
-- execution; the events tell of each that it was placed and that it was executed. after_seq is the
-- number of the last event that the writer knows; if there is a newer one, or a plan was changed,
-- the writer has decided on what is no longer so. heartbeat is the wall clock of a live tick, lag
-- how many seconds its logical time is behind. new_state is NULL where it stays what it is.
CREATE FUNCTION ticks_write(
    of_user uuid, of_run uuid, after_seq bigint, new_state jsonb,
    told_time timestamptz[], told_type text[], told_subject text[], told_payload jsonb[],
    trade_time timestamptz[], trade_order uuid[], trade_symbol text[], trade_side text[],
    trade_quantity numeric[], trade_type text[], trade_in_force text[], trade_limit numeric[],
    trade_expire timestamptz[], trade_reference numeric[], trade_client text[],
    trade_price numeric[], trade_commission numeric[], trade_event_at timestamptz[],
    tick_time timestamptz[], tick_cash numeric[], tick_value numeric[],
    heartbeat timestamptz, lag numeric)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
-- Arrays of every length would be planned anew each time, which costs more than it ever saves.
SET plan_cache_mode = force_generic_plan
-- A plan that was made while a table was empty reads all of it for as long as it is kept.
SET enable_seqscan = off AS $$
DECLARE
    run  record;
    head record;
BEGIN
    SELECT r.status, r.broker, r.currency INTO run FROM strategy_run r
    WHERE r.user_id = of_user AND r.run_id = of_run FOR NO KEY UPDATE;
    IF run.status IS DISTINCT FROM 'RUNNING' THEN
        PERFORM run_lock(of_user, of_run, 'event_ledger', 'RUNNING');
    END IF;
    SELECT l.seq, l.hash INTO head FROM event_ledger l
    WHERE l.user_id = of_user AND l.run_id = of_run ORDER BY l.seq DESC LIMIT 1;
    IF coalesce(head.seq, 0) <> after_seq
       OR 'SIP_EXECUTED' = ANY (told_type)
          AND NOT plans_are_active(of_user, of_run, told_type, told_subject) THEN
        RAISE EXCEPTION 'run % has moved since it was read', of_run
            USING ERRCODE = 'serialization_failure', CONSTRAINT = 'ticks_follow_last_event',
                  TABLE = 'event_ledger', COLUMN = 'seq', HINT = 'Read it and decide again.';
    END IF;
    WITH placed AS (
        INSERT INTO orders (user_id, run_id, order_id, client_order_id, broker, symbol, side,
                            quantity, order_type, time_in_force, limit_price, expire_at,
                            reference_price, status, status_at, filled_quantity, filled_notional,
                            logical_time, recorded_at)
        SELECT of_user, of_run, trade_order[i], trade_client[i], run.broker, trade_symbol[i],
               trade_side[i], trade_quantity[i], trade_type[i], trade_in_force[i], trade_limit[i],
               trade_expire[i], trade_reference[i], 'FILLED', trade_time[i], trade_quantity[i],
               trade_quantity[i] * trade_price[i], trade_time[i], now()
        FROM generate_series(1, cardinality(trade_order)) i
    ), filled AS (
        INSERT INTO execution (user_id, run_id, execution_id, order_id, symbol, side, quantity,
                               price, commission, commission_currency, logical_time, event_at,
                               recorded_at)
        SELECT of_user, of_run, trade_order[i] || '-1', trade_order[i], trade_symbol[i],
               trade_side[i], trade_quantity[i], trade_price[i], trade_commission[i],
               run.currency, trade_time[i], trade_event_at[i], now()
        FROM generate_series(1, cardinality(trade_order)) i
    ), marked AS (
        INSERT INTO mtm_ledger (user_id, run_id, logical_time, cash, market_value, recorded_at)
        SELECT of_user, of_run, tick_time[i], tick_cash[i], tick_value[i], now()
        FROM generate_series(1, cardinality(tick_time)) i
    )
    INSERT INTO event_ledger (user_id, run_id, seq, logical_time, event_type, subject, payload,
                              recorded_at, hash)
    SELECT of_user, of_run, after_seq + i, told_time[i], told_type[i], told_subject[i],
           told_payload[i], now(),
           event_chain(coalesce(head.hash, ''), of_user, of_run, after_seq + i, told_time[i],
                       told_type[i], told_subject[i], told_payload[i], now())
               OVER (ROWS UNBOUNDED PRECEDING)
    FROM generate_series(1, cardinality(told_type)) i;

    IF cardinality(tick_time) > 0 THEN
        UPDATE engine_state
        SET last_logical_time = tick_time[cardinality(tick_time)],
            state = coalesce(new_state, state)
        WHERE user_id = of_user AND run_id = of_run;
        IF NOT FOUND THEN
            INSERT INTO engine_state (user_id, run_id, last_logical_time, state)
            VALUES (of_user, of_run, tick_time[cardinality(tick_time)],
                    coalesce(new_state, '{}'));
        END IF;
    END IF;
    IF heartbeat IS NOT NULL THEN
        UPDATE engine_status SET heartbeat_at = heartbeat, lag_seconds = lag
        WHERE user_id = of_user AND run_id = of_run;
        IF NOT FOUND THEN
            INSERT INTO engine_status (user_id, run_id, heartbeat_at, lag_seconds)
            VALUES (of_user, of_run, heartbeat, lag);
        END IF;
    END IF;
END $$;

COMMENT ON FUNCTION ticks_write IS
    'Writes what ticks told: trades, events, marks and the engine''s state, in one statement.';

CREATE VIEW audit_guard AS
    WITH ours AS (
        SELECT oid, relname FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relname = ANY (our_relations())
    )
    SELECT NULL::uuid AS user_id, NULL::uuid AS run_id,
           format('trigger %s of %s', t.tgname, o.relname) AS subject,
           'is switched off' AS finding
    FROM pg_trigger t JOIN ours o ON o.oid = t.tgrelid
    WHERE t.tgenabled NOT IN ('O', 'A')
    UNION ALL
    SELECT NULL, NULL, format('constraint %s of %s', c.conname, o.relname),
           'was not checked against the rows that were there before it'
    FROM pg_constraint c JOIN ours o ON o.oid = c.conrelid
    WHERE NOT c.convalidated
    UNION ALL
    SELECT NULL, NULL, format('table %s', i.inhrelid::regclass),
           format('puts rows into %s past its triggers', o.relname)
    FROM pg_inherits i JOIN ours o ON o.oid = i.inhparent;

COMMENT ON VIEW audit_guard IS 'Triggers and constraints that the owner has switched off.';

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

REVOKE EXECUTE ON FUNCTION grant_roles, ticks_write, books_follow, ledger_analyze, run_rebuild,
    run_rebuild_books FROM PUBLIC;

REVOKE EXECUTE ON FUNCTION lease_take, lease_renew, lease_release, commands_claim,
    commands_throttled, commands_done, connector_alert, executions_unheard FROM PUBLIC;

REVOKE EXECUTE ON FUNCTION halt_place, halt_lift, halt_enforce, system_halt_place,
    system_halt_lift, run_equity_peak, open_orders_sum, reconcile_analyze FROM PUBLIC;

DO $$
BEGIN
    PERFORM grant_roles();
END $$;
