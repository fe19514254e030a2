-- Everything from the ledger: what a run's events make of its orders, executions and books. Who has
-- lost the rest of the database, or doubts it, has these; oms audit rebuild loads a run with them.

-- One step of the fold that makes an order of its events; a NULL order becomes the one placed.
CREATE FUNCTION order_after_event(o orders, event event_ledger) RETURNS orders
LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
DECLARE
    says  jsonb := event.payload;
    terms boolean := says ? 'order_type';
    next  text;
BEGIN
    IF o.order_id IS NULL THEN
        o.user_id := event.user_id;
        o.run_id := event.run_id;
        o.order_id := event_order_id(event.subject);
        o.client_order_id := says ->> 'client_order_id';
        o.symbol := says ->> 'symbol';
        o.side := says ->> 'side';
        o.order_type := says ->> 'order_type';
        o.time_in_force := says ->> 'time_in_force';
        o.trail_percent := (says ->> 'trail_percent')::numeric;
        o.purpose := says ->> 'purpose';
        o.recovered := coalesce((says ->> 'recovered')::boolean, false);
        o.status := CASE WHEN event.event_type = 'ORDER_REJECTED' THEN 'REJECTED'
                         ELSE coalesce(says ->> 'status', 'NEW') END;
        o.status_at := event.logical_time;
        o.logical_time := event.logical_time;
        o.recorded_at := event.recorded_at;
        o.filled_quantity := 0;
        o.filled_notional := 0;
        o.version := 1;
        o.pending_reconcile := false;
    END IF;
    IF terms THEN
        o.quantity := (says ->> 'quantity')::numeric;
        o.limit_price := (says ->> 'limit_price')::numeric;
        o.stop_price := (says ->> 'stop_price')::numeric;
        o.trail_amount := (says ->> 'trail_amount')::numeric;
        o.expire_at := (says ->> 'expire_at')::timestamptz;
        o.reference_price := (says ->> 'reference_price')::numeric;
        o.account := says ->> 'account';
    END IF;
    IF event.event_type = 'EXECUTION' THEN
        o.filled_quantity := o.filled_quantity + (says ->> 'quantity')::numeric;
        o.filled_notional := o.filled_notional
            + (says ->> 'quantity')::numeric * (says ->> 'price')::numeric;
        -- As execution_apply moves it.
        next := CASE WHEN o.filled_quantity >= o.quantity THEN 'FILLED'
                     WHEN o.status IN ('PENDING_CANCEL', 'PENDING_MODIFY') THEN o.status
                     WHEN o.filled_quantity > 0 THEN 'PARTIALLY_FILLED'
                     ELSE 'ROUTED' END;
        IF o.status = 'REJECTED' THEN
            o.reject_source := NULL;
            o.reject_code := NULL;
        END IF;
        IF next <> o.status THEN
            o.status := next;
            o.status_at := greatest(o.status_at, event.logical_time);
        END IF;
        RETURN o;
    END IF;
    o.status_reason := says ->> 'status_reason';
    o.reject_source := says ->> 'reject_source';
    o.reject_code := says ->> 'reject_code';
    IF NOT terms THEN
        o.status := substr(event.event_type, 7);
        o.status_at := event.logical_time;
    END IF;
    RETURN o;
END $$;

COMMENT ON FUNCTION order_after_event IS
    'An order after an event that tells of it; what nobody tells (its ids at a broker, its '
    'version, where a stop was drawn to) is as at its placing.';

-- From nothing, or from orders as they were after an event, to the last one or an earlier one.
CREATE FUNCTION orders_from_ledger(of_user uuid, of_run uuid, known orders[] DEFAULT '{}',
                                   after_seq bigint DEFAULT 0,
                                   upto_seq bigint DEFAULT 9223372036854775807)
RETURNS SETOF orders LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    part  record;
    event event_ledger;
    o     orders;
BEGIN
    FOR part IN
        SELECT coalesce(k.order_id, t.order_id) AS order_id, k AS was
        FROM unnest(known) k
        FULL JOIN (SELECT DISTINCT event_order_id(l.subject) AS order_id FROM event_ledger l
                   WHERE l.user_id = of_user AND l.run_id = of_run
                     AND l.seq > after_seq AND l.seq <= upto_seq
                     AND l.event_type IN ('ORDER_PLACED', 'ORDER_REJECTED')
                     AND l.payload ? 'order_type') t
            ON t.order_id = k.order_id
        ORDER BY 1
    LOOP
        o := part.was;
        FOR event IN
            SELECT * FROM event_ledger l
            WHERE l.user_id = of_user AND l.run_id = of_run
              AND l.seq > after_seq AND l.seq <= upto_seq
              AND event_order_id(l.subject) = part.order_id
              AND (l.event_type IN ('EXECUTION', 'ORDER_PLACED', 'ORDER_RESTATED',
                                    'ORDER_MODIFIED')
                   OR EXISTS (SELECT FROM order_status s
                              WHERE l.event_type = 'ORDER_' || s.status))
            ORDER BY l.seq
        LOOP
            o := order_after_event(o, event);
        END LOOP;
        RETURN NEXT o;
    END LOOP;
END $$;

COMMENT ON FUNCTION orders_from_ledger IS
    'A run''s orders as its ledger tells them, from known ones and the events after them.';

-- Positions with their marks. A tick tells the prices that it marked holdings with.
CREATE FUNCTION positions_from_ledger(of_user uuid, of_run uuid, known public.position[]
                                          DEFAULT '{}',
                                      after_seq bigint DEFAULT 0,
                                      upto_seq bigint DEFAULT 9223372036854775807)
RETURNS SETOF public.position LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    part   record;
    event  event_ledger;
    p      public.position;
    marked timestamptz;
BEGIN
    FOR part IN
        SELECT coalesce(k.symbol, t.symbol) AS symbol, k AS was
        FROM unnest(known) k
        FULL JOIN (SELECT DISTINCT l.payload ->> 'symbol' AS symbol FROM event_ledger l
                   WHERE l.user_id = of_user AND l.run_id = of_run
                     AND l.seq > after_seq AND l.seq <= upto_seq
                     AND l.event_type = 'EXECUTION') t
            ON t.symbol = k.symbol
        ORDER BY 1
    LOOP
        p := part.was;
        FOR event IN
            SELECT * FROM event_ledger l
            WHERE l.user_id = of_user AND l.run_id = of_run
              AND l.seq > after_seq AND l.seq <= upto_seq
              AND (l.event_type IN ('EXECUTION', 'SPLIT_APPLIED')
                   AND l.payload ->> 'symbol' = part.symbol
                   OR l.event_type = 'TICK' AND l.payload -> 'prices' ? part.symbol)
            ORDER BY l.seq
        LOOP
            IF event.event_type <> 'TICK' THEN
                p := position_after_told(p, event);
            ELSIF p.quantity <> 0 THEN
                p.mark_price := (event.payload #>> ARRAY['prices', part.symbol])::numeric;
                p.marked_at := coalesce(
                    (event.payload #>> ARRAY['priced_at', part.symbol])::timestamptz,
                    event.logical_time);
            END IF;
        END LOOP;
        RETURN NEXT p;
    END LOOP;
END $$;

COMMENT ON FUNCTION positions_from_ledger IS
    'A run''s positions as its ledger tells them, from known ones and the events after them.';

-- Fills a run's tables from its ledger, which has been loaded by the owner with the triggers of
-- these tables switched off (engine/rebuild.py, which proves the result by the audit).
CREATE FUNCTION run_rebuild(of_user uuid, of_run uuid) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO orders (user_id, run_id, order_id, client_order_id, broker, symbol, side, quantity,
                        order_type, time_in_force, limit_price, stop_price, trail_amount,
                        trail_percent, expire_at, triggered_at, reference_price, status, status_at,
                        status_reason, reject_source, reject_code, filled_quantity,
                        filled_notional, logical_time, recorded_at, account, version, purpose,
                        recovered, pending_reconcile)
    SELECT o.user_id, o.run_id, o.order_id, o.client_order_id, r.broker, o.symbol, o.side,
           o.quantity, o.order_type, o.time_in_force, o.limit_price, o.stop_price, o.trail_amount,
           o.trail_percent, o.expire_at, o.triggered_at, o.reference_price, o.status, o.status_at,
           o.status_reason, o.reject_source, o.reject_code, o.filled_quantity, o.filled_notional,
           o.logical_time, o.recorded_at, o.account, o.version, o.purpose, o.recovered,
           o.pending_reconcile
    FROM orders_from_ledger(of_user, of_run) o
    JOIN strategy_run r ON r.user_id = o.user_id AND r.run_id = o.run_id;

    INSERT INTO execution (user_id, run_id, execution_id, order_id, symbol, side, quantity, price,
                           commission, commission_currency, logical_time, event_at, recorded_at,
                           reverses)
    SELECT l.user_id, l.run_id, substr(l.subject, 38), event_order_id(l.subject),
           l.payload ->> 'symbol', l.payload ->> 'side', (l.payload ->> 'quantity')::numeric,
           (l.payload ->> 'price')::numeric, (l.payload ->> 'commission')::numeric,
           l.payload ->> 'commission_currency', l.logical_time,
           (l.payload ->> 'event_at')::timestamptz, l.recorded_at, l.payload ->> 'reverses'
    FROM event_ledger l
    WHERE l.user_id = of_user AND l.run_id = of_run AND l.event_type = 'EXECUTION';

    INSERT INTO execution_commission (user_id, run_id, execution_id, amount, currency, rate, cost,
                                      logical_time, event_at, recorded_at)
    SELECT l.user_id, l.run_id, l.subject, (l.payload ->> 'amount')::numeric,
           l.payload ->> 'currency', (l.payload ->> 'rate')::numeric,
           (l.payload ->> 'cost')::numeric, l.logical_time,
           (l.payload ->> 'event_at')::timestamptz, l.recorded_at
    FROM event_ledger l
    WHERE l.user_id = of_user AND l.run_id = of_run AND l.event_type = 'COMMISSION';
    PERFORM run_rebuild_books(of_user, of_run);
END $$;

COMMENT ON FUNCTION run_rebuild IS
    'Fills the tables of a run whose ledger alone is there, with their triggers switched off.';

CREATE FUNCTION run_rebuild_books(of_user uuid, of_run uuid) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO instrument (symbol)
    SELECT DISTINCT l.payload ->> 'symbol' FROM event_ledger l
    WHERE l.user_id = of_user AND l.run_id = of_run AND l.event_type = 'SPLIT_APPLIED'
    ON CONFLICT (symbol) DO NOTHING;
    INSERT INTO corporate_action (symbol, ex_date, numerator, denominator)
    SELECT l.payload ->> 'symbol', (l.payload ->> 'ex_date')::date,
           (l.payload ->> 'numerator')::numeric, (l.payload ->> 'denominator')::numeric
    FROM event_ledger l
    WHERE l.user_id = of_user AND l.run_id = of_run AND l.event_type = 'SPLIT_APPLIED'
    ON CONFLICT (symbol, ex_date, kind) DO NOTHING;
    INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time, quantity_before,
                               quantity_after, recorded_at)
    SELECT l.user_id, l.run_id, l.payload ->> 'symbol', (l.payload ->> 'ex_date')::date,
           l.logical_time, (l.payload ->> 'quantity_before')::numeric,
           (l.payload ->> 'quantity_after')::numeric, l.recorded_at
    FROM event_ledger l
    WHERE l.user_id = of_user AND l.run_id = of_run AND l.event_type = 'SPLIT_APPLIED';

    INSERT INTO mtm_ledger (user_id, run_id, logical_time, cash, market_value, recorded_at)
    SELECT l.user_id, l.run_id, l.logical_time, (l.payload ->> 'cash')::numeric,
           (l.payload ->> 'market_value')::numeric, l.recorded_at
    FROM event_ledger l
    WHERE l.user_id = of_user AND l.run_id = of_run AND l.event_type = 'TICK'
      AND l.payload ?& '{cash,market_value}';

    INSERT INTO position (user_id, run_id, symbol, quantity, cost_basis, realized_pnl, mark_price,
                          marked_at)
    SELECT p.user_id, p.run_id, p.symbol, p.quantity, p.cost_basis, p.realized_pnl, p.mark_price,
           p.marked_at
    FROM positions_from_ledger(of_user, of_run) p;

    INSERT INTO engine_state (user_id, run_id, last_logical_time, recorded_at)
    SELECT l.user_id, l.run_id, l.logical_time, l.recorded_at FROM event_ledger l
    WHERE l.user_id = of_user AND l.run_id = of_run AND l.event_type = 'TICK'
    ORDER BY l.seq DESC LIMIT 1;

    UPDATE strategy_run r
    SET cash = r.initial_cash + b.flow, books_seq = b.seq
    FROM (SELECT coalesce(sum(event_cash_flow(l.event_type, l.payload)), 0) AS flow,
                 coalesce(max(l.seq) FILTER (
                     WHERE l.event_type IN ('EXECUTION', 'COMMISSION', 'SPLIT_APPLIED')), 0) AS seq
          FROM event_ledger l WHERE l.user_id = of_user AND l.run_id = of_run) b
    WHERE r.user_id = of_user AND r.run_id = of_run;
    UPDATE strategy_run r
    SET status = substr(l.event_type, 5),
        stopped_at = CASE WHEN l.event_type <> 'RUN_STOPPING' THEN l.recorded_at END
    FROM (SELECT k.event_type, k.recorded_at FROM event_ledger k
          WHERE k.user_id = of_user AND k.run_id = of_run
            AND k.event_type IN ('RUN_STOPPING', 'RUN_STOPPED', 'RUN_ERROR')
          ORDER BY k.seq DESC LIMIT 1) l
    WHERE r.user_id = of_user AND r.run_id = of_run;
END $$;

COMMENT ON FUNCTION run_rebuild_books IS
    'Splits, marks, positions, cash and status of a run, from its ledger alone.';
