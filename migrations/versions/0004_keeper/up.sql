-- The keeper: ticks_write works out itself what follows from a tick, and is a role's of its own, whose
-- rows the triggers do not prove again. Guards are replaced in one transaction, so that nothing
-- gets past them meanwhile.
-- squawk-ignore-file ban-drop-constraint, ban-drop-function, ban-drop-view, ban-drop-default, constraint-missing-not-valid, adding-foreign-key-constraint, require-concurrent-index-creation, require-concurrent-index-deletion, prefer-bigint-over-int, prefer-bigint-over-smallint, adding-required-field, prefer-robust-stmts, ban-drop-column, ban-drop-table, disallowed-unique-constraint

SET LOCAL lock_timeout = '30s';
SET LOCAL statement_timeout = '1h';

DROP VIEW audit_guard;

DROP TRIGGER strategy_run_a_check_update ON strategy_run;

DROP TRIGGER engine_state_a_check_write ON engine_state;

DROP TRIGGER engine_status_a_guard_write ON engine_status;

DROP TRIGGER execution_m_apply ON execution;

DROP TRIGGER position_a_check_write ON position;

DROP TRIGGER mtm_ledger_m_prove ON mtm_ledger;

DROP TRIGGER orders_m_record_insert ON orders;

DROP TRIGGER event_ledger_m_prove ON event_ledger;

DROP AGGREGATE event_chain(head bytea, of_user uuid, of_run uuid, seq bigint, logical_time timestamptz, event_type text, subject text, payload jsonb, recorded_at timestamptz);

DROP FUNCTION ticks_write;

DROP FUNCTION plans_are_active;

DROP FUNCTION event_chain_next;

CREATE TRIGGER strategy_run_a_check_update BEFORE UPDATE ON strategy_run
    FOR EACH ROW WHEN (current_user <> 'oms_keeper') EXECUTE FUNCTION strategy_run_check_update();

CREATE TRIGGER engine_state_a_check_write BEFORE INSERT OR UPDATE ON engine_state
    FOR EACH ROW WHEN (current_user <> 'oms_keeper') EXECUTE FUNCTION engine_state_check_write();

CREATE TRIGGER engine_status_a_guard_write BEFORE INSERT OR UPDATE ON engine_status
    FOR EACH ROW WHEN (current_user <> 'oms_keeper')
    EXECUTE FUNCTION run_guard_write('engine_status');

CREATE TRIGGER execution_m_apply AFTER INSERT ON execution
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT WHEN (current_user <> 'oms_keeper')
    EXECUTE FUNCTION execution_apply();

CREATE FUNCTION position_refuse_mark(symbol text, stands timestamptz, mark timestamptz)
RETURNS void LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'the mark of % is from %, not from an earlier %', symbol, stands, mark
        USING ERRCODE = '23T07', CONSTRAINT = 'position_mark_moves_forward',
              TABLE = 'position', COLUMN = 'marked_at', HINT = 'Mark with a newer price.';
END $$;

COMMENT ON FUNCTION position_refuse_mark IS 'Raises that a mark is older than another.';

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
            PERFORM position_refuse_mark(NEW.symbol, OLD.marked_at, NEW.marked_at);
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

CREATE TRIGGER position_a_check_write BEFORE INSERT OR UPDATE ON position
    FOR EACH ROW WHEN (current_user <> 'oms_keeper') EXECUTE FUNCTION position_check_write();

CREATE TRIGGER mtm_ledger_m_prove AFTER INSERT ON mtm_ledger
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT WHEN (current_user <> 'oms_keeper')
    EXECUTE FUNCTION mtm_ledger_prove();

CREATE TRIGGER orders_m_record_insert AFTER INSERT ON orders
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT WHEN (current_user <> 'oms_keeper')
    EXECUTE FUNCTION orders_record_insert();

-- A planner that has never seen these tables takes any index of a run for as good as another, and
-- reads the whole run where one row was asked for. Autovacuum looks once a minute at most; a replay
-- or a broker has written hundreds of thousands of rows by then. So a run that grows long before
-- anybody has looked has them looked at, once.
CREATE OR REPLACE FUNCTION ledger_analyze() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF (SELECT reltuples FROM pg_class WHERE oid = 'event_ledger'::regclass) < 500 THEN
        ANALYZE event_ledger, orders, execution, mtm_ledger, position, strategy_run,
            broker_command, broker_event;
    END IF;
END $$;

CREATE TRIGGER event_ledger_m_prove AFTER INSERT ON event_ledger
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT WHEN (current_user <> 'oms_keeper')
    EXECUTE FUNCTION event_ledger_prove();

-- Ticks as the engine writes them: everything that one tick or many told, in one call. The engine
-- says what was decided; what follows from it (cash, holdings, marks, equity, what the events say,
-- their chain) is worked out here, by the rules by which books_follow (82_books.sql) proves what
-- anybody else writes. The function is the keeper's (99_roles.sql), a role that nobody can take
-- on: rows that the keeper writes are not proven again by the triggers.

CREATE FUNCTION ticks_refuse(of_run uuid) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'run % has moved since it was read', of_run
        USING ERRCODE = 'serialization_failure', CONSTRAINT = 'ticks_follow_last_event',
              TABLE = 'event_ledger', COLUMN = 'seq', HINT = 'Read it and decide again.';
END $$;

COMMENT ON FUNCTION ticks_refuse IS 'Raises that a tick was decided on what is no longer so.';

CREATE FUNCTION ticks_append(placed orders[], filled execution[], marking mtm_ledger[],
                             told event_ledger[])
RETURNS integer LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    WITH new_orders AS (
        INSERT INTO orders (user_id, run_id, order_id, client_order_id, broker, symbol, side,
                            quantity, order_type, time_in_force, limit_price, expire_at,
                            reference_price, status, status_at, filled_quantity,
                            filled_notional, logical_time, recorded_at)
        SELECT p.user_id, p.run_id, p.order_id, p.client_order_id, p.broker, p.symbol, p.side,
               p.quantity, p.order_type, p.time_in_force, p.limit_price, p.expire_at,
               p.reference_price, p.status, p.status_at, p.filled_quantity,
               p.filled_notional, p.logical_time, p.recorded_at
        FROM unnest(placed) p
    ), new_executions AS (
        INSERT INTO execution SELECT * FROM unnest(filled)
    ), new_marks AS (
        INSERT INTO mtm_ledger (user_id, run_id, logical_time, cash, market_value, recorded_at)
        SELECT k.user_id, k.run_id, k.logical_time, k.cash, k.market_value, k.recorded_at
        FROM unnest(marking) k
    )
    INSERT INTO event_ledger SELECT * FROM unnest(told);
    RETURN cardinality(told);
END $$;

COMMENT ON FUNCTION ticks_append IS
    'Inserts orders with their executions, marks and events; returns how many events.';

CREATE FUNCTION engine_keep(of_user uuid, of_run uuid, ticked timestamptz, new_state jsonb,
                            heartbeat timestamptz, lag numeric)
RETURNS timestamptz LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF ticked IS NOT NULL THEN
        UPDATE engine_state s
        SET last_logical_time = ticked, state = coalesce(new_state, s.state), recorded_at = now()
        WHERE s.user_id = of_user AND s.run_id = of_run;
        IF NOT FOUND THEN
            INSERT INTO engine_state (user_id, run_id, last_logical_time, state)
            VALUES (of_user, of_run, ticked, coalesce(new_state, '{}'));
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
    RETURN ticked;
END $$;

COMMENT ON FUNCTION engine_keep IS
    'Keeps where a run stands after a tick, and how it is doing; NULL: nothing new.';

-- What is told are the events, in order. Trades are orders that their tick filled whole, with one
-- execution: an ORDER_PLACED and the EXECUTION after it, whose subjects and payloads follow from
-- the trade. To a TICK the books are added: tick_cash and tick_value are what the engine takes them
-- for. after_seq is the number of the last event that it knows; if there is a newer one, or the
-- books say something else, it has decided on what is no longer so. heartbeat is the wall clock of
-- a live tick, lag how many seconds its logical time is behind. new_state is NULL where it stays
-- what it is.
CREATE FUNCTION ticks_write(
    of_user uuid, of_run uuid, after_seq bigint, new_state jsonb,
    told_time timestamptz[], told_type text[], told_subject text[], told_payload jsonb[],
    trade_order uuid[], trade_symbol text[], trade_side text[],
    trade_quantity numeric[], trade_type text[], trade_in_force text[], trade_limit numeric[],
    trade_expire timestamptz[], trade_reference numeric[], trade_client text[],
    trade_price numeric[], trade_commission numeric[], trade_event_at timestamptz[],
    tick_cash numeric[], tick_value numeric[],
    heartbeat timestamptz, lag numeric)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
-- Arrays of every length would be planned anew each time, which costs more than it ever saves.
SET plan_cache_mode = force_generic_plan
-- A plan that was made while a table was empty reads all of it for as long as it is kept.
SET enable_seqscan = off AS $$
<<tick>>
DECLARE
    run      record;
    limited  boolean;              -- has limits
    waiting  boolean;              -- has open orders
    cash     numeric;
    reserved numeric;              -- by open orders; NULL: not asked for yet
    symbols  text[];               -- the holdings: parallel arrays; the first so many are rows
    known    integer;
    held     numeric[];
    costs    numeric[];
    profits  numeric[];
    marks    numeric[];
    marked   timestamptz[];
    changed  boolean[];
    value    numeric;
    price    numeric;
    at       timestamptz;
    previous bytea;
    newest   timestamptz;
    latest   timestamptz;          -- mark in mtm_ledger
    ticked   timestamptz;
    seq      bigint;
    written  integer;
    moved_at bigint;               -- seq of the last EXECUTION
    placed   orders[] := '{}';
    filled   execution[] := '{}';
    marking  mtm_ledger[] := '{}';
    told     event_ledger[] := '{}';
    o        orders;
    x        execution;
    e        event_ledger;
    after    record;
    refusal  record;
    n        integer := 0;         -- events, trades and ticks so far
    t        integer := 0;
    m        integer := 0;
    i        integer;
BEGIN
    SELECT r.status, r.broker, r.currency, r.account_type, r.cash INTO run FROM strategy_run r
    WHERE r.user_id = of_user AND r.run_id = of_run FOR NO KEY UPDATE;
    IF run.status IS DISTINCT FROM 'RUNNING' THEN
        PERFORM run_lock(of_user, of_run, 'event_ledger', 'RUNNING');
    END IF;
    -- Where the books stand, in one query.
    SELECT run.cash, coalesce(l.seq, 0), coalesce(l.hash, ''), l.logical_time, p.symbols,
           cardinality(p.symbols), p.held, p.costs, p.profits, p.marks, p.marked,
           -- ORDER BY leaves a planner without statistics one index to choose.
           (SELECT true FROM orders w
            WHERE w.user_id = of_user AND w.run_id = of_run
              AND w.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
            ORDER BY w.symbol LIMIT 1),
           -- What user_is_limited says, in line.
           coalesce((SELECT true FROM risk_limit k WHERE k.user_id = of_user LIMIT 1),
                    (SELECT true FROM trading_halt h
                     WHERE h.user_id = of_user AND h.lifted_at IS NULL LIMIT 1),
                    (SELECT true FROM system_halt s WHERE s.lifted_at IS NULL LIMIT 1), false),
           (SELECT k.logical_time FROM mtm_ledger k
            WHERE k.user_id = of_user AND k.run_id = of_run ORDER BY k.logical_time DESC LIMIT 1)
    INTO cash, seq, previous, newest, symbols, known, held, costs, profits, marks, marked,
         waiting, limited, latest
    FROM (SELECT coalesce(array_agg(h.symbol), '{}') AS symbols, array_agg(h.quantity) AS held,
                 array_agg(h.cost_basis) AS costs, array_agg(h.realized_pnl) AS profits,
                 array_agg(h.mark_price) AS marks, array_agg(h.marked_at) AS marked
          FROM position h WHERE h.user_id = of_user AND h.run_id = of_run) p
    LEFT JOIN LATERAL (SELECT w.seq, w.hash, w.logical_time FROM event_ledger w
                       WHERE w.user_id = of_user AND w.run_id = of_run
                       ORDER BY w.seq DESC LIMIT 1) l ON true;
    IF seq <> after_seq THEN
        PERFORM ticks_refuse(of_run);
    END IF;

    WHILE n < cardinality(told_type) LOOP
        LOOP
            n := n + 1;
            seq := seq + 1;
            e := ROW(of_user, of_run, seq, told_time[n], told_type[n], told_subject[n],
                     told_payload[n], now(), NULL)::event_ledger;
            IF e.logical_time < newest THEN
                PERFORM event_refuse(e, 'TIME');
            END IF;
            newest := e.logical_time;

            IF e.event_type = 'TICK' THEN
                m := m + 1;
                value := 0;
                FOR i IN 1 .. cardinality(symbols) LOOP
                    CONTINUE WHEN held[i] = 0;
                    price := e.payload #>> ARRAY['prices', symbols[i]];
                    IF price IS NOT NULL THEN
                        at := coalesce((e.payload #>> ARRAY['priced_at', symbols[i]])::timestamptz,
                                       e.logical_time);
                        IF at < marked[i] THEN
                            PERFORM position_refuse_mark(symbols[i], marked[i], at);
                        END IF;
                        marks[i] := price;
                        marked[i] := at;
                        changed[i] := true;
                    END IF;
                    value := value + held[i] * marks[i];
                END LOOP;
                IF (tick_cash[m], tick_value[m]) IS DISTINCT FROM (cash, value) THEN
                    PERFORM event_refuse(e, NULL);
                ELSIF latest > e.logical_time THEN
                    PERFORM mtm_ledger_refuse_time(of_run, latest, e.logical_time);
                END IF;
                ticked := e.logical_time;
                e.subject := '';
                e.payload := e.payload || jsonb_build_object(
                    'cash', cash, 'market_value', value, 'equity', cash + value);
                marking[cardinality(marking) + 1] := ROW(
                    of_user, of_run, e.logical_time, cash, value, NULL, now())::mtm_ledger;

            ELSIF e.event_type = 'ORDER_PLACED' THEN
                t := t + 1;
                o := ROW(of_user, of_run, trade_order[t], trade_client[t], run.broker,
                         trade_symbol[t], trade_side[t], trade_quantity[t], trade_type[t],
                         trade_in_force[t], trade_limit[t], NULL, NULL, NULL, trade_expire[t],
                         NULL, trade_reference[t], 'FILLED', e.logical_time, NULL, NULL, NULL,
                         trade_quantity[t], trade_quantity[t] * trade_price[t], e.logical_time,
                         now(), NULL, 1, NULL, false, false, NULL, NULL, NULL, NULL)::orders;
                IF waiting AND reserved IS NULL THEN
                    reserved := run_reserved_cash(of_user, of_run);
                END IF;
                i := array_position(symbols, o.symbol);
                refusal := orders_gate(
                    o, run.account_type, limited, cash - coalesce(reserved, 0),
                    coalesce(held[i], 0)
                    -- A purchase of cash alone asks for no holding.
                    + CASE WHEN waiting AND (limited OR o.side = 'SELL')
                           THEN orders_open_quantity(o) ELSE 0 END,
                    cash, symbols, held, marks);
                -- A broker fills what was sent to it; nothing is born filled there.
                IF refusal.code IS NOT NULL OR run.broker <> 'paper' THEN
                    PERFORM event_refuse(e, coalesce(refusal.code, 'BROKER'));
                ELSIF coalesce(o.limit_price, o.reference_price) IS NULL
                      OR told_type[n + 1] IS DISTINCT FROM 'EXECUTION' THEN
                    PERFORM event_refuse(e, NULL);
                END IF;
                e.subject := o.order_id;
                e.payload := orders_event_payload(o);
                placed[cardinality(placed) + 1] := o;

            ELSIF e.event_type = 'EXECUTION' THEN
                IF told_type[n - 1] IS DISTINCT FROM 'ORDER_PLACED'
                   OR e.logical_time <> o.logical_time THEN
                    PERFORM event_refuse(e, NULL);
                END IF;
                x := ROW(of_user, of_run, o.order_id || '-1', o.order_id, o.symbol, o.side,
                         o.quantity, trade_price[t], trade_commission[t], run.currency,
                         e.logical_time, trade_event_at[t], now(), NULL)::execution;
                IF x.price <= 0 OR x.commission <> 0 THEN
                    PERFORM execution_check_money(x, run.currency);
                END IF;
                IF i IS NULL THEN
                    i := cardinality(symbols) + 1;
                    symbols[i] := x.symbol;
                END IF;
                after := position_after(
                    coalesce(held[i], 0), coalesce(costs[i], 0),
                    CASE WHEN x.side = 'BUY' THEN x.quantity ELSE -x.quantity END, x.price);
                held[i] := after.quantity_after;
                costs[i] := after.cost_after;
                profits[i] := coalesce(profits[i], 0) + after.realized;
                IF marked[i] IS NULL OR marked[i] < e.logical_time THEN
                    marks[i] := x.price;
                    marked[i] := e.logical_time;
                END IF;
                changed[i] := true;
                cash := cash + execution_cash_flow(x.side, x.quantity, x.price, x.commission);
                -- Not in between either: a sale that comes later pays for nothing.
                IF cash < 0 AND run.account_type = 'CASH' AND x.side = 'BUY' THEN
                    PERFORM event_refuse(e, 'CASH');
                END IF;
                moved_at := seq;
                e.subject := x.order_id || '/' || x.execution_id;
                e.payload := execution_event_payload(x);
                filled[cardinality(filled) + 1] := x;

            ELSIF e.event_type = 'SIP_EXECUTED'
                  AND NOT EXISTS (SELECT FROM sip_plan p
                                  WHERE p.user_id = of_user AND p.run_id = of_run
                                    AND p.plan = split_part(e.subject, '@', 1)
                                    AND p.status = 'ACTIVE') THEN
                PERFORM ticks_refuse(of_run);

            ELSIF starts_with(e.event_type, 'ORDER_')
                  OR e.event_type IN ('COMMISSION', 'SPLIT_APPLIED') THEN
                PERFORM event_refuse(e, NULL);  -- told by the rows that it is about
            END IF;

            previous := event_hash(previous, of_user, of_run, seq, e.logical_time, e.event_type,
                                   e.subject, e.payload, e.recorded_at);
            e.hash := previous;
            told[cardinality(told) + 1] := e;
            -- Limits count what is in the tables: all that comes before an order has to be there.
            EXIT WHEN n = cardinality(told_type)
                   OR limited AND told_type[n + 1] = 'ORDER_PLACED';
        END LOOP;

        -- Assigned, since PERFORM would plan a query.
        written := ticks_append(placed, filled, marking, told);
        placed := '{}';
        filled := '{}';
        marking := '{}';
        told := '{}';

        FOR i IN 1 .. cardinality(symbols) LOOP
            IF i > known THEN
                INSERT INTO position (user_id, run_id, symbol, quantity, cost_basis, realized_pnl,
                                      mark_price, marked_at)
                VALUES (of_user, of_run, symbols[i], held[i], costs[i], profits[i], marks[i],
                        marked[i])
                ON CONFLICT ON CONSTRAINT position_pkey DO NOTHING;  -- where it was proven
            ELSIF changed[i] THEN
                UPDATE position
                SET quantity = held[i], cost_basis = costs[i], realized_pnl = profits[i],
                    mark_price = marks[i], marked_at = marked[i]
                WHERE user_id = of_user AND run_id = of_run AND symbol = symbols[i];
            END IF;
        END LOOP;
        known := cardinality(symbols);
        changed := '{}';
        IF moved_at IS NOT NULL THEN
            UPDATE strategy_run r SET cash = tick.cash, books_seq = moved_at
            WHERE r.user_id = of_user AND r.run_id = of_run;
            moved_at := NULL;
        END IF;
    END LOOP;

    ticked := engine_keep(of_user, of_run, ticked, new_state, heartbeat, lag);
    IF after_seq < 1000 AND seq >= 1000 THEN
        PERFORM ledger_analyze();
    END IF;
END $$;

COMMENT ON FUNCTION ticks_write IS
    'Writes what ticks told, and what follows from it: trades, events, marks, books, state.';

-- Orders of ours that should be at the broker and that it does not work. Executions that explain it
-- were applied before. Where the broker says how an order ended, so it did; of what it never said a
-- word, the submit never arrived.
CREATE OR REPLACE FUNCTION reconcile_missing(of_user uuid, of_account text, of_snapshot uuid)
RETURNS SETOF order_difference
LANGUAGE sql STABLE ROWS 100 SET search_path = public, pg_temp AS $$
    SELECT d.class, o.run_id, o.order_id, o.order_id::text, b.becomes,
           CASE WHEN k.taken THEN 'TERMS_TAKEN'
                WHEN b.becomes IS NOT NULL THEN 'CANCELED'
                WHEN d.class = 'NEVER_ARRIVED' THEN 'KEPT'
                ELSE 'ALERTED' END,
           CASE WHEN z.status IS NOT NULL THEN 'the broker says ' || z.status
                WHEN d.class = 'MISSING_AT_BROKER'
                THEN 'the broker does not work it, and no execution explains that'
                WHEN d.class = 'NEVER_ARRIVED' THEN 'its submit never reached the broker'
                ELSE 'what was asked may still be on its way' END,
           order_difference_ours(o),
           CASE WHEN z.status IS NOT NULL THEN jsonb_strip_nulls(to_jsonb(z)) END,
           CASE WHEN k.taken THEN (l.a).command_id ELSE c.command_id END,
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
    -- A modification whose answer was lost: it ended on the terms that were asked for.
    LEFT JOIN LATERAL (
        SELECT a FROM broker_command a
        WHERE z.status IS NOT NULL AND a.user_id = of_user AND a.run_id = o.run_id
          AND a.order_id = o.order_id AND a.account = of_account AND a.kind = 'MODIFY'
          AND a.claimed_by IS NOT NULL
        ORDER BY a.order_version DESC LIMIT 1) l (a) ON true
    CROSS JOIN LATERAL (SELECT coalesce(
        order_asked_for(l.a, z)
        AND NOT order_has_terms(o.order_type, o.quantity, o.limit_price, o.stop_price, z)
        AND (z.filled = o.filled_quantity OR z.filled < o.filled_quantity
             AND z.status <> 'FILLED'), false) AS taken) k
    CROSS JOIN LATERAL (SELECT CASE
        WHEN k.taken THEN 'TERMS_DIFFER'
        WHEN o.status NOT IN ('NEW', 'PENDING', 'PENDING_CANCEL') OR o.filled_quantity > 0
             OR num_nonnulls(o.broker_order_id, o.perm_id) > 0 OR z.status IS NOT NULL
             OR EXISTS (SELECT FROM broker_event e
                        WHERE e.user_id = of_user AND e.account = of_account
                          AND e.order_ref = o.order_id::text
                          AND broker_event_shows_order(e)) THEN 'MISSING_AT_BROKER'
        WHEN command_is_settled(c, s.asked_at, s.holder, s.first_number) THEN 'NEVER_ARRIVED'
        ELSE 'UNDECIDED' END AS class) d
    CROSS JOIN LATERAL (SELECT CASE
        WHEN k.taken AND z.status = 'FILLED' THEN z.status
        WHEN d.class = 'UNDECIDED' OR z.status = 'FILLED' OR z.filled > o.filled_quantity THEN NULL
        WHEN d.class = 'NEVER_ARRIVED' AND o.status <> 'PENDING_CANCEL' THEN NULL
        WHEN z.status = 'EXPIRED' OR z.status = 'REJECTED' AND o.filled_quantity = 0 THEN z.status
        ELSE 'CANCELED' END AS becomes) b
    WHERE t.order_ref IS NULL AND n.order_ref IS NULL
      -- Of what never arrived nothing is missing, but a cancel that came too late may wait for it.
      AND (o.recovered OR z.status IS NOT NULL OR c.claimed_by IS NOT NULL
           AND (o.status = 'PENDING_CANCEL' AND c.outcome = 'NEVER_ARRIVED'
                OR coalesce(c.outcome, 'UNKNOWN') NOT IN ('NEVER_ARRIVED', 'REFUSED')))
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
    ELSIF o.status = 'FILLED' AND o.filled_quantity < t.quantity AND order_asked_for(asked, t) THEN
        -- Filled by its old terms, since the answer that gave it the new ones was lost.
        class := 'TERMS_DIFFER';
        becomes := 'PARTIALLY_FILLED';
        action := 'TERMS_TAKEN';
        reason := 'the modification reached the broker';
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
DECLARE
    by_status record;
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
    by_status := order_compare_status(o, t, asked, is_settled);
    IF by_status.class IS NOT NULL THEN
        RETURN QUERY SELECT by_status.class, by_status.becomes, by_status.action, by_status.reason;
    END IF;
    IF o.status <> 'PENDING_MODIFY' AND by_status.action IS DISTINCT FROM 'TERMS_TAKEN'
       AND (o.side <> t.side OR NOT order_has_terms(
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
    FROM pg_inherits i JOIN ours o ON o.oid = i.inhparent
    UNION ALL
    SELECT NULL, NULL, format('role %s', r.rolname), 'may write what nobody proves'
    FROM pg_roles r
    WHERE NOT r.rolsuper AND r.rolname <> 'oms_keeper'
      AND pg_has_role(r.oid, to_regrole('oms_keeper'), CASE
          WHEN current_setting('server_version_num')::integer >= 160000 THEN 'SET'
          ELSE 'MEMBER' END)
    UNION ALL
    SELECT NULL, NULL, format('function %s', p.oid::regprocedure), 'writes what nobody proves'
    FROM pg_proc p
    WHERE p.proowner = to_regrole('oms_keeper')
      AND (p.proname <> 'ticks_write' OR p.pronamespace <> 'public'::regnamespace);

COMMENT ON VIEW audit_guard IS
    'Triggers and constraints that are switched off, and who else writes what nobody proves.';

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
CREATE OR REPLACE FUNCTION grant_roles() RETURNS SETOF text
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

-- The other roles were asked for when they were new.
DO $$
DECLARE
    missing text;
BEGIN
    FOR missing IN SELECT g FROM grant_roles() g
                   WHERE g LIKE '%oms_keeper%' OR g LIKE '%ON SCHEMA%' LOOP
        RAISE WARNING 'an administrator must run: %', missing
            USING HINT = 'Then `oms db migrate`, or SELECT grant_roles() as the owner.';
    END LOOP;
END $$;
