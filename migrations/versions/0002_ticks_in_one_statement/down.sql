-- Back to ticks that are written and proven row by row.

DROP TRIGGER engine_state_a_check_write ON engine_state;

DROP TRIGGER orders_a_prepare_insert ON orders;

DROP TRIGGER execution_a_prepare_insert ON execution;

DROP TRIGGER mtm_ledger_a_prepare_insert ON mtm_ledger;

DROP TRIGGER mtm_ledger_m_prove ON mtm_ledger;

DROP TRIGGER event_ledger_a_append ON event_ledger;

DROP TRIGGER event_ledger_m_check_end ON event_ledger;

DROP TRIGGER event_ledger_m_prove ON event_ledger;

DROP TRIGGER orders_b_pass_gate ON orders;

DROP AGGREGATE event_chain (head bytea, of_user uuid, of_run uuid, seq bigint, logical_time timestamptz, event_type text, subject text, payload jsonb, recorded_at timestamptz);

DROP FUNCTION execution_check_money;

-- Who trades: people and services. Everything that belongs to somebody carries user_id first in
-- its keys, which isolates users and lets the schema be sharded by user_id.

-- Infinity and years that no program's calendar has would stop whoever reads the row next.
CREATE OR REPLACE FUNCTION time_in_range(moment timestamptz) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN moment BETWEEN '0001-01-02 00:00Z' AND '9999-12-30 00:00Z';

-- Cash is not guarded by who writes it but proven, whoever does: it may change only by what the
-- EXECUTION events say that it does not yet have (50_executions.sql).
CREATE OR REPLACE FUNCTION strategy_run_check_update() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    due record;
BEGIN
    PERFORM strategy_run_check_terms(OLD, NEW);
    NEW.stopped_at := OLD.stopped_at;
    IF (NEW.cash, NEW.books_seq) IS DISTINCT FROM (OLD.cash, OLD.books_seq) THEN
        due := strategy_run_books_due(OLD);
        IF (NEW.cash, NEW.books_seq) IS DISTINCT FROM (due.cash, due.books_seq) THEN
            RAISE EXCEPTION 'the cash of run % follows from its executions: %, not %', OLD.run_id,
                due.cash, NEW.cash
                USING ERRCODE = '23T04', CONSTRAINT = 'strategy_run_cash_from_executions',
                      TABLE = 'strategy_run', COLUMN = 'cash',
                      HINT = 'Insert executions; the database computes cash.';
        END IF;
    END IF;
    IF OLD.stopped_at IS NOT NULL AND NEW.status = OLD.status THEN
        RAISE EXCEPTION 'run % is %, so it can not be changed', OLD.run_id, OLD.status
            USING ERRCODE = '23T03', CONSTRAINT = 'strategy_run_run_is_running',
                  TABLE = 'strategy_run',
                  HINT = 'An ended run is never written again; make a new run.';
    END IF;
    RETURN NEW;
END $$;

-- An engine_state that forgot the last tick would have the run begin anew.
CREATE OR REPLACE FUNCTION engine_state_check_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF NEW.last_logical_time IS DISTINCT FROM
       (SELECT max(logical_time) FROM event_ledger
        WHERE user_id = NEW.user_id AND run_id = NEW.run_id AND event_type = 'TICK') THEN
        RAISE EXCEPTION 'the last tick of run % is not at %', NEW.run_id, NEW.last_logical_time
            USING ERRCODE = '23T04', CONSTRAINT = 'engine_state_time_is_last_tick',
                  TABLE = 'engine_state', COLUMN = 'last_logical_time',
                  HINT = 'Write the TICK event first; last_logical_time is the newest one''s.';
    END IF;
    NEW.recorded_at := now();
    RETURN NEW;
END $$;

CREATE OR REPLACE FUNCTION execution_prepare_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run strategy_run;
    o   orders;
BEGIN
    run := run_lock(NEW.user_id, NEW.run_id, 'execution', 'RUNNING');
    SELECT * INTO o FROM orders
    WHERE user_id = NEW.user_id AND run_id = NEW.run_id AND order_id = NEW.order_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'run % has no order %', NEW.run_id, NEW.order_id
            USING ERRCODE = 'foreign_key_violation', CONSTRAINT = 'execution_belongs_to_order',
                  TABLE = 'execution', COLUMN = 'order_id',
                  HINT = 'An execution belongs to an order of the same run.';
    ELSIF o.broker = 'paper' AND o.status IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED') THEN
        RAISE EXCEPTION 'paper order % is %, so it can not trade', o.order_id, o.status
            USING ERRCODE = '23T05', CONSTRAINT = 'execution_order_is_open', TABLE = 'execution',
                  HINT = 'Only an open order trades; place another.';
    END IF;
    NEW.symbol := o.symbol;
    NEW.side := o.side;
    NEW.logical_time := coalesce(NEW.logical_time, run_last_time(NEW.user_id, NEW.run_id));
    NEW.event_at := coalesce(NEW.event_at, NEW.logical_time);
    NEW.commission_currency := coalesce(NEW.commission_currency, run.currency);
    NEW.recorded_at := now();
    PERFORM execution_check_money(NEW, run);
    RETURN NEW;
END $$;

CREATE OR REPLACE FUNCTION execution_check_money(e execution, run strategy_run) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF e.price <= 0 AND NOT EXISTS (SELECT FROM instrument
                                    WHERE symbol = e.symbol AND negative_price_allowed) THEN
        RAISE EXCEPTION 'a price of % is not possible for %', e.price, e.symbol
            USING ERRCODE = 'check_violation', CONSTRAINT = 'execution_price_positive',
                  TABLE = 'execution', COLUMN = 'price',
                  HINT = 'Only an instrument with negative_price_allowed trades at or below zero.';
    ELSIF e.commission <> 0 AND e.commission_currency <> run.currency THEN
        RAISE EXCEPTION 'a commission in % can not be paid from cash in %', e.commission_currency,
            run.currency
            USING ERRCODE = 'check_violation', CONSTRAINT = 'execution_commission_in_run_currency',
                  TABLE = 'execution', COLUMN = 'commission_currency',
                  HINT = 'Convert the commission into the run''s currency.';
    END IF;
END $$;

-- The event first: it is what position and cash follow, and their own triggers prove that they do,
-- so that writing past this function falsifies nothing. It has the owner's rights, so that nobody
-- else needs a right to write what follows from executions.
CREATE OR REPLACE FUNCTION execution_apply() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    it record;
BEGIN
    INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
    SELECT e.user_id, e.run_id, e.logical_time, 'EXECUTION', e.order_id || '/' || e.execution_id,
           execution_event_payload(e)
    FROM new_rows e;

    UPDATE orders o
    SET filled_quantity = o.filled_quantity + f.quantity,
        filled_notional = o.filled_notional + f.notional,
        status = CASE WHEN o.filled_quantity + f.quantity >= o.quantity THEN 'FILLED'
                      WHEN o.status IN ('PENDING_CANCEL', 'PENDING_MODIFY') THEN o.status
                      ELSE 'PARTIALLY_FILLED' END
    FROM (SELECT user_id, run_id, order_id, sum(quantity) AS quantity,
                 sum(quantity * price) AS notional
          FROM new_rows GROUP BY user_id, run_id, order_id) f
    WHERE o.user_id = f.user_id AND o.run_id = f.run_id AND o.order_id = f.order_id;

    FOR it IN SELECT DISTINCT user_id, run_id, symbol FROM new_rows LOOP
        PERFORM position_follow_ledger(it.user_id, it.run_id, it.symbol);
    END LOOP;
    FOR it IN SELECT DISTINCT user_id, run_id FROM new_rows LOOP
        PERFORM strategy_run_follow_ledger(it.user_id, it.run_id);
    END LOOP;
    RETURN NULL;
END $$;

-- UTC, so that no session's time zone decides what the ledger says.
CREATE OR REPLACE FUNCTION execution_event_payload(e execution) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = public, pg_temp SET timezone = 'UTC' AS $$
    SELECT jsonb_build_object('symbol', e.symbol, 'side', e.side, 'quantity', e.quantity,
                              'price', e.price, 'commission', e.commission,
                              'commission_currency', e.commission_currency,
                              'event_at', e.event_at)
$$;

CREATE OR REPLACE FUNCTION position_check_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    due public.position;
BEGIN
    PERFORM run_lock(NEW.user_id, NEW.run_id, 'position', 'RUNNING');
    IF TG_OP = 'UPDATE' THEN
        PERFORM row_check_keeps_run(OLD.user_id, OLD.run_id, NEW.user_id, NEW.run_id, 'position');
        IF NEW.marked_at < OLD.marked_at OR NEW.marked_at IS NULL AND OLD.marked_at IS NOT NULL THEN
            RAISE EXCEPTION 'the mark of % is from %, not from an earlier %', NEW.symbol,
                OLD.marked_at, NEW.marked_at
                USING ERRCODE = '23T07', CONSTRAINT = 'position_mark_moves_forward',
                      TABLE = 'position', COLUMN = 'marked_at', HINT = 'Mark with a newer price.';
        ELSIF (NEW.symbol, NEW.quantity, NEW.cost_basis, NEW.realized_pnl)
              IS NOT DISTINCT FROM (OLD.symbol, OLD.quantity, OLD.cost_basis, OLD.realized_pnl) THEN
            RETURN NEW;
        END IF;
    END IF;
    due := position_due(NEW.user_id, NEW.run_id, NEW.symbol);
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

CREATE OR REPLACE FUNCTION mtm_ledger_prepare_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run    strategy_run;
    held   numeric;
    newest timestamptz;
BEGIN
    run := run_lock(NEW.user_id, NEW.run_id, 'mtm_ledger', 'RUNNING');
    NEW.logical_time := coalesce(NEW.logical_time, run_last_time(NEW.user_id, NEW.run_id));
    NEW.recorded_at := now();
    -- The books are those of the newest event: an earlier time had others.
    SELECT greatest((SELECT max(logical_time) FROM mtm_ledger
                     WHERE user_id = NEW.user_id AND run_id = NEW.run_id),
                    (SELECT max(logical_time) FROM event_ledger
                     WHERE user_id = NEW.user_id AND run_id = NEW.run_id)) INTO newest;
    IF NEW.logical_time < newest THEN
        RAISE EXCEPTION 'run % already stands at %, after %', NEW.run_id, newest, NEW.logical_time
            USING ERRCODE = '23T07', CONSTRAINT = 'mtm_ledger_time_moves_forward',
                  TABLE = 'mtm_ledger', COLUMN = 'logical_time',
                  HINT = 'A run only moves forward; mark it at a later logical_time.';
    END IF;
    SELECT coalesce(sum(market_value), 0) INTO held FROM position
    WHERE user_id = NEW.user_id AND run_id = NEW.run_id;
    NEW.cash := coalesce(NEW.cash, run.cash);
    NEW.market_value := coalesce(NEW.market_value, held);
    IF NEW.cash <> run.cash OR NEW.market_value <> held THEN
        RAISE EXCEPTION 'the books of run % say cash % and market value %, not % and %',
            NEW.run_id, run.cash, held, NEW.cash, NEW.market_value
            USING ERRCODE = '23T08', CONSTRAINT = 'mtm_ledger_equals_books',
                  TABLE = 'mtm_ledger', COLUMN = 'market_value',
                  HINT = 'Leave cash and market_value out; the database fills them in.';
    END IF;
    RETURN NEW;
END $$;

-- Times as seconds since 1970 and everything else as canonical jsonb, so that neither a session's
-- time zone nor a separator inside a text can make two different rows hash alike.
CREATE OR REPLACE FUNCTION event_hash(previous bytea, of_user uuid, of_run uuid, seq bigint,
                           logical_time timestamptz, event_type text, subject text,
                           payload jsonb, recorded_at timestamptz)
RETURNS bytea LANGUAGE sql IMMUTABLE
RETURN sha256(previous || convert_to(jsonb_build_array(
    of_user, of_run, seq, extract(epoch FROM logical_time), event_type, subject, payload,
    extract(epoch FROM recorded_at))::text, 'UTF8'));

-- What an order's events carry: all that was asked for, no surrogate ids. UTC, so that no
-- session's time zone decides what the ledger says.
CREATE OR REPLACE FUNCTION orders_event_payload(o orders) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = public, pg_temp SET timezone = 'UTC' AS $$
    SELECT jsonb_strip_nulls(jsonb_build_object(
        'symbol', o.symbol, 'side', o.side, 'quantity', o.quantity, 'order_type', o.order_type,
        'time_in_force', o.time_in_force, 'limit_price', o.limit_price,
        'stop_price', o.stop_price, 'trail_amount', o.trail_amount,
        'trail_percent', o.trail_percent, 'expire_at', o.expire_at,
        'reference_price', o.reference_price, 'client_order_id', o.client_order_id,
        'reject_source', o.reject_source, 'reject_code', o.reject_code,
        'status_reason', o.status_reason))
$$;

-- The subject of an order's event is its id, of an execution's the order's id and its own.
CREATE OR REPLACE FUNCTION event_order_id(subject text) RETURNS uuid
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN subject ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}([/@]|$)'
            THEN left(subject, 36)::uuid END;

-- Events that tell of rows are not taken on anybody's word: the row must be there and say the
-- same. Positions and cash follow these events, so forging one would forge money.
CREATE OR REPLACE FUNCTION event_ledger_check_fact() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF NEW.event_type = 'TICK' THEN
        PERFORM FROM mtm_ledger m
        WHERE m.user_id = NEW.user_id AND m.run_id = NEW.run_id
          AND m.logical_time = NEW.logical_time
          AND NEW.payload @> jsonb_build_object('cash', m.cash, 'market_value', m.market_value,
                                                'equity', m.equity);
        -- A tick that names no figures contradicts none.
        IF FOUND OR NOT NEW.payload ?| ARRAY['cash', 'market_value', 'equity'] THEN
            RETURN NEW;
        END IF;
    ELSIF NEW.event_type = 'EXECUTION' THEN
        PERFORM FROM execution e
        WHERE e.user_id = NEW.user_id AND e.run_id = NEW.run_id
          -- Both, each in its index's collation: before its first ANALYZE either may be chosen.
          AND e.order_id = event_order_id(NEW.subject)
          AND e.execution_id = substr(NEW.subject, 38) COLLATE "default"
          AND e.order_id || '/' || e.execution_id = NEW.subject
          AND e.logical_time = NEW.logical_time AND execution_event_payload(e) = NEW.payload;
    ELSIF NEW.event_type = 'SPLIT_APPLIED' THEN
        PERFORM FROM split_applied s
        WHERE s.user_id = NEW.user_id AND s.run_id = NEW.run_id
          AND split_event_subject(s) = NEW.subject
          AND s.logical_time = NEW.logical_time AND split_event_payload(s) = NEW.payload;
    ELSE
        PERFORM WHERE order_event_is_true(NEW);
    END IF;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no row of run % bears out the event % of %', NEW.run_id, NEW.event_type,
            NEW.subject
            USING ERRCODE = '23T08', CONSTRAINT = 'event_ledger_tells_what_happened',
                  TABLE = 'event_ledger', COLUMN = 'event_type',
                  HINT = 'Write the row itself; the database tells the ledger.';
    END IF;
    RETURN NEW;
END $$;

-- An order's event is written with the move that it tells, so that it is never told again. A
-- restatement is true while its split is told to the ledger and not yet taken up by the books.
CREATE OR REPLACE FUNCTION order_event_is_true(event event_ledger) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    o orders;
BEGIN
    SELECT * INTO o FROM orders
    WHERE user_id = event.user_id AND run_id = event.run_id
      AND order_id = event_order_id(event.subject);
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    IF event.event_type = 'ORDER_RESTATED' THEN
        RETURN orders_event_payload(o) = event.payload AND EXISTS (
            SELECT FROM strategy_run r
            JOIN event_ledger l ON l.user_id = r.user_id AND l.run_id = r.run_id
                               AND l.seq > r.books_seq
            WHERE r.user_id = event.user_id AND r.run_id = event.run_id
              AND l.event_type = 'SPLIT_APPLIED' AND l.payload ->> 'symbol' = o.symbol);
    END IF;
    RETURN event.subject = o.order_id::text
       AND CASE WHEN event.event_type = 'ORDER_PLACED'
                THEN o.status IN ('NEW', 'PENDING') AND o.logical_time = event.logical_time
                ELSE 'ORDER_' || o.status = event.event_type
                     AND o.status_at = event.logical_time END;
END $$;

CREATE OR REPLACE FUNCTION orders_record_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
    SELECT o.user_id, o.run_id, o.logical_time,
           CASE WHEN o.status = 'REJECTED' THEN 'ORDER_REJECTED' ELSE 'ORDER_PLACED' END,
           o.order_id, orders_event_payload(o)
    FROM new_rows o;
    RETURN NULL;
END $$;

-- What a run's cash and books_seq must be: what they are, and what the events after books_seq add.
CREATE OR REPLACE FUNCTION strategy_run_books_due(run strategy_run, OUT cash numeric, OUT books_seq bigint)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    SELECT run.cash + coalesce(sum(event_cash_flow(l.event_type, l.payload)), 0),
           coalesce(max(l.seq), run.books_seq)
    INTO cash, books_seq
    FROM event_ledger l
    WHERE l.user_id = run.user_id AND l.run_id = run.run_id AND l.seq > run.books_seq
      AND l.event_type IN ('EXECUTION', 'SPLIT_APPLIED');
END $$;

CREATE OR REPLACE FUNCTION strategy_run_follow_ledger(of_user uuid, of_run uuid) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE strategy_run r
    SET (cash, books_seq) = (SELECT d.cash, d.books_seq FROM strategy_run_books_due(r) d)
    WHERE r.user_id = of_user AND r.run_id = of_run;
END $$;

-- One step of the fold that makes a position of a run's events, here and in the audit. A split
-- keeps the cost and states the mark in the new unit. A mark from before a trade is older news
-- than the trade's own price.
CREATE OR REPLACE FUNCTION position_after_event(p public.position, event event_ledger)
RETURNS public.position
LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
DECLARE
    units numeric := (event.payload ->> 'quantity')::numeric;
    price numeric := (event.payload ->> 'price')::numeric;
    a     record;
BEGIN
    p.user_id := event.user_id;
    p.run_id := event.run_id;
    p.symbol := event.payload ->> 'symbol';
    p.quantity := coalesce(p.quantity, 0);
    p.cost_basis := coalesce(p.cost_basis, 0);
    p.realized_pnl := coalesce(p.realized_pnl, 0);
    IF event.event_type = 'SPLIT_APPLIED' THEN
        p.quantity := (event.payload ->> 'quantity_after')::numeric;
        p.mark_price := round(p.mark_price * (event.payload ->> 'denominator')::numeric
                              / (event.payload ->> 'numerator')::numeric, 8);
        RETURN p;
    END IF;
    a := position_after(p.quantity, p.cost_basis,
                        CASE WHEN event.payload ->> 'side' = 'BUY' THEN units ELSE -units END,
                        price);
    p.quantity := a.quantity_after;
    p.cost_basis := a.cost_after;
    p.realized_pnl := p.realized_pnl + a.realized;
    IF p.marked_at IS NULL OR p.marked_at < event.logical_time THEN
        p.mark_price := price;
        p.marked_at := event.logical_time;
    END IF;
    RETURN p;
END $$;

-- What a position must be: what it is, and what the events after the run's books_seq make of it.
CREATE OR REPLACE FUNCTION position_due(of_user uuid, of_run uuid, of_symbol text)
RETURNS public.position
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    run   strategy_run;
    p     public.position;
    was   numeric;
    event event_ledger;
BEGIN
    SELECT * INTO run FROM strategy_run WHERE user_id = of_user AND run_id = of_run;
    SELECT * INTO p FROM position
    WHERE user_id = of_user AND run_id = of_run AND symbol = of_symbol;
    FOR event IN SELECT * FROM event_ledger
                 WHERE user_id = of_user AND run_id = of_run AND seq > run.books_seq
                   AND event_type IN ('EXECUTION', 'SPLIT_APPLIED')
                   AND payload ->> 'symbol' = of_symbol
                 ORDER BY seq
    LOOP
        was := coalesce(p.quantity, 0);
        p := position_after_event(p, event);
        IF p.quantity < 0 AND p.quantity < was AND run.account_type = 'CASH' THEN
            RAISE EXCEPTION 'selling % % leaves a short position of % in a cash account',
                was - p.quantity, of_symbol, p.quantity
                USING ERRCODE = '23T04', CONSTRAINT = 'position_not_short_in_cash_account',
                      TABLE = 'position', COLUMN = 'quantity',
                      HINT = 'Sell at most what is held, or use a MARGIN account.';
        END IF;
    END LOOP;
    RETURN p;
END $$;

CREATE OR REPLACE FUNCTION position_follow_ledger(of_user uuid, of_run uuid, of_symbol text) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    due public.position := position_due(of_user, of_run, of_symbol);
BEGIN
    UPDATE position
    SET quantity = due.quantity, cost_basis = due.cost_basis, realized_pnl = due.realized_pnl,
        mark_price = due.mark_price, marked_at = due.marked_at
    WHERE user_id = of_user AND run_id = of_run AND symbol = of_symbol;
    -- A split of what was never held leaves nothing to write.
    IF NOT FOUND AND due.marked_at IS NOT NULL THEN
        INSERT INTO position (user_id, run_id, symbol, quantity, cost_basis, realized_pnl,
                              mark_price, marked_at)
        VALUES (of_user, of_run, of_symbol, due.quantity, due.cost_basis, due.realized_pnl,
                due.mark_price, due.marked_at);
    END IF;
END $$;

-- What is due of a run's active plans up to and including a session: every month after the newest
-- occasion in the ledger whose planned session has come. Bounded by the caller's LIMIT.
CREATE OR REPLACE FUNCTION sip_due(of_user uuid, of_run uuid, upto_session date)
RETURNS TABLE (plan text, symbol text, amount numeric, missed_policy text, occasion text,
               planned_on date, next_open_at timestamptz,
               session_date date, open_at timestamptz, close_at timestamptz)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT p.plan, p.symbol, p.amount, p.missed_policy,
           p.plan || '@' || to_char(m.month, 'YYYY-MM'), d.planned_on,
           (SELECT c.open_at FROM calendar_session c
            WHERE c.calendar = r.calendar AND c.session_date >= n.planned_on
              AND (p.end_on IS NULL OR n.planned_on <= p.end_on)
            ORDER BY c.session_date LIMIT 1),
           s.session_date, s.open_at, s.close_at
    FROM sip_plan p
    JOIN strategy_run r ON r.user_id = p.user_id AND r.run_id = p.run_id
    LEFT JOIN LATERAL (
        SELECT to_date(right(e.subject, 7), 'YYYY-MM') AS month
        FROM event_ledger e
        WHERE e.user_id = of_user AND e.run_id = of_run
          AND e.event_type IN ('SIP_EXECUTED', 'SIP_REJECTED', 'SIP_SKIPPED', 'REBALANCED')
          AND e.subject >= p.plan || '@' AND e.subject < p.plan || 'A'
        ORDER BY e.subject DESC LIMIT 1) last_done ON true
    CROSS JOIN LATERAL generate_series(
        greatest(date_trunc('month', p.start_on::timestamp),
                 last_done.month::timestamp + interval '1 month'),
        least(upto_session, p.end_on)::timestamp, interval '1 month') AS m (month)
    CROSS JOIN LATERAL (SELECT sip_planned_day(m.month::date, p.day_of_month) AS planned_on) d
    CROSS JOIN LATERAL (SELECT sip_planned_day((m.month + interval '1 month')::date,
                                               p.day_of_month) AS planned_on) n
    CROSS JOIN LATERAL (
        SELECT c.session_date, c.open_at, c.close_at FROM calendar_session c
        WHERE c.calendar = r.calendar AND c.session_date >= d.planned_on
        ORDER BY c.session_date LIMIT 1) s
    WHERE p.user_id = of_user AND p.run_id = of_run AND r.user_id = of_user
      AND p.status = 'ACTIVE' AND d.planned_on >= p.start_on
      AND (p.end_on IS NULL OR d.planned_on <= p.end_on) AND s.session_date <= upto_session
    ORDER BY d.planned_on, p.plan
$$;

-- Holdings with what open orders of the same side would add to them.
CREATE OR REPLACE FUNCTION orders_exposure(o orders) RETURNS numeric
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT coalesce((SELECT p.quantity FROM position p
                     WHERE p.user_id = o.user_id AND p.run_id = o.run_id
                       AND p.symbol = o.symbol), 0)
         + coalesce((SELECT sum(w.quantity - w.filled_quantity) FROM orders w
                     WHERE w.user_id = o.user_id AND w.run_id = o.run_id AND w.symbol = o.symbol
                       AND w.side = o.side
                       AND w.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')), 0)
           * CASE WHEN o.side = 'BUY' THEN 1 ELSE -1 END
$$;

-- The cash that open buy orders of a run hold back.
CREATE OR REPLACE FUNCTION run_reserved_cash(of_user uuid, of_run uuid) RETURNS numeric
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT coalesce(sum(reserved_cash), 0) FROM orders
    WHERE user_id = of_user AND run_id = of_run
      AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
$$;

CREATE OR REPLACE FUNCTION orders_pass_gate() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run       strategy_run;
    price     numeric;
    exposure  numeric;
    available numeric;
    broken    record;
    code      text := coalesce(orders_validation_code(NEW), orders_price_code(NEW));
    reason    text;
BEGIN
    IF code IS NOT NULL THEN
        NEW.status := 'REJECTED';
        NEW.reject_source := 'VALIDATION';
        NEW.reject_code := code;
        RETURN NEW;
    END IF;
    SELECT * INTO run FROM strategy_run WHERE user_id = NEW.user_id AND run_id = NEW.run_id;
    IF NEW.reference_price IS NULL THEN
        NEW.reference_price := orders_known_price(NEW);
    END IF;
    price := coalesce(NEW.limit_price, NEW.stop_price, NEW.reference_price);
    exposure := orders_exposure(NEW);
    SELECT * INTO broken FROM orders_broken_limit(NEW, price, exposure);
    IF FOUND THEN
        code := broken.code;
        reason := coalesce('limit ' || trim_scale(broken.limit_value) || ', would be '
                           || coalesce(trim_scale(broken.value)::text, 'unknown'), NEW.symbol);
    ELSIF run.account_type = 'CASH' AND NEW.side = 'SELL' AND NEW.quantity > exposure THEN
        code := 'INSUFFICIENT_POSITION';
        reason := format('holds %s, would sell %s', trim_scale(exposure), trim_scale(NEW.quantity));
    ELSIF run.account_type = 'CASH' AND NEW.side = 'BUY' THEN
        available := run.cash - run_reserved_cash(NEW.user_id, NEW.run_id);
        IF NEW.quantity * price > available THEN
            code := 'INSUFFICIENT_CASH';
            reason := format('has %s, needs %s',
                             trim_scale(available), trim_scale(NEW.quantity * price));
        END IF;
    END IF;
    IF code IS NOT NULL THEN
        NEW.status := 'REJECTED';
        NEW.reject_source := 'RISK';
        NEW.reject_code := code;
        NEW.status_reason := code || ': ' || reason;
    END IF;
    RETURN NEW;
END $$;

-- The rights of each role: all that it needs and no more. The engine inserts what happens and
-- moves what moves; it has no right to a number that follows from something else. Those are
-- written by execution_apply and split_applied_apply, which have the owner's rights.
CREATE OR REPLACE FUNCTION role_rights() RETURNS TABLE (role text, rights text)
LANGUAGE sql IMMUTABLE SET search_path = public, pg_temp AS $$
    VALUES
        ('oms_engine', 'USAGE ON SCHEMA public'),
        ('oms_engine', 'INSERT ON app_user, instrument, calendar_session, price_bar,
            corporate_action, engine_state, engine_status, sip_plan'),
        ('oms_engine', 'INSERT (user_id, run_id, name, status, strategy, parameters, broker, paper,
            account_type, calendar, currency, tick_at, initial_cash),
            UPDATE (status) ON strategy_run'),
        ('oms_engine', 'UPDATE (last_logical_time, state, recorded_at) ON engine_state'),
        ('oms_engine', 'UPDATE (heartbeat_at, lag_seconds, last_error, error_at)
            ON engine_status'),
        ('oms_engine', 'INSERT (user_id, run_id, order_id, client_order_id, symbol, side, quantity,
            order_type, time_in_force, limit_price, stop_price, trail_amount, trail_percent,
            expire_at, reference_price, logical_time), UPDATE (status, status_at, status_reason,
            reject_source, reject_code, stop_price, triggered_at, expire_at)
            ON orders, paper_order'),
        ('oms_engine', 'INSERT (user_id, run_id, execution_id, order_id, symbol, side, quantity,
            price, commission, commission_currency, logical_time, event_at)
            ON execution, paper_trade'),
        ('oms_engine', 'UPDATE (mark_price, marked_at) ON position, paper_position'),
        ('oms_engine', 'INSERT (user_id, run_id, symbol, ex_date, kind, logical_time)
            ON split_applied'),
        ('oms_engine', 'INSERT (user_id, run_id, logical_time) ON mtm_ledger, paper_equity_curve'),
        ('oms_engine', 'INSERT (user_id, run_id, logical_time, event_type, subject, payload)
            ON event_ledger'),
        ('oms_engine', 'UPDATE (status, start_on) ON sip_plan'),
        ('oms_connector', 'USAGE ON SCHEMA public'),
        ('oms_connector', 'SELECT ON instrument, calendar_session'),
        ('oms_auditor', 'USAGE ON SCHEMA public')
$$;

ALTER TABLE instrument
    DROP CONSTRAINT instrument_symbol_format,
    ADD CONSTRAINT instrument_symbol_format CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]{0,31}$');

ALTER TABLE strategy_run
    DROP CONSTRAINT strategy_run_account_type_known,
    ADD CONSTRAINT strategy_run_account_type_known CHECK (account_type IN ('CASH', 'MARGIN')),
    DROP CONSTRAINT strategy_run_tick_at_known,
    ADD CONSTRAINT strategy_run_tick_at_known CHECK (tick_at IN ('OPEN', 'CLOSE')),
    DROP CONSTRAINT strategy_run_words_short,
    ADD CONSTRAINT strategy_run_words_short CHECK (
        length(coalesce(name, '')) <= 100 AND length(strategy) <= 200 AND length(calendar) <= 32),
    DROP CONSTRAINT strategy_run_initial_cash_in_range,
    ADD CONSTRAINT strategy_run_initial_cash_in_range
        CHECK (initial_cash >= 0 AND initial_cash < 1e18 AND min_scale(initial_cash) <= 8),
    DROP CONSTRAINT strategy_run_cash_in_range,
    ADD CONSTRAINT strategy_run_cash_in_range
        CHECK (abs(cash) < 1e20 AND min_scale(cash) <= 16),
    DROP CONSTRAINT strategy_run_stopped_at_iff_over,
    ADD CONSTRAINT strategy_run_stopped_at_iff_over
        CHECK ((stopped_at IS NOT NULL) = (status IN ('STOPPED', 'ERROR')));

ALTER TABLE orders
    DROP CONSTRAINT orders_symbol_format,
    ADD CONSTRAINT orders_symbol_format CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]{0,31}$'),
    DROP CONSTRAINT orders_side_known,
    ADD CONSTRAINT orders_side_known CHECK (side IN ('BUY', 'SELL')),
    DROP CONSTRAINT orders_order_type_known,
    ADD CONSTRAINT orders_order_type_known
        CHECK (order_type IN ('MARKET', 'LIMIT', 'STOP', 'STOP_LIMIT', 'TRAIL')),
    DROP CONSTRAINT orders_time_in_force_known,
    ADD CONSTRAINT orders_time_in_force_known
        CHECK (time_in_force IN ('DAY', 'GTC', 'IOC', 'FOK', 'GTD', 'OPG', 'CLS')),
    DROP CONSTRAINT orders_quantity_in_range,
    ADD CONSTRAINT orders_quantity_in_range
        CHECK (abs(quantity) < 1e15 AND min_scale(quantity) <= 8),
    DROP CONSTRAINT orders_prices_in_range,
    ADD CONSTRAINT orders_prices_in_range CHECK (
        abs(coalesce(limit_price, 0)) < 1e15 AND min_scale(coalesce(limit_price, 0)) <= 8
        AND abs(coalesce(stop_price, 0)) < 1e15 AND min_scale(coalesce(stop_price, 0)) <= 8
        AND abs(coalesce(reference_price, 0)) < 1e15
        AND min_scale(coalesce(reference_price, 0)) <= 8),
    DROP CONSTRAINT orders_trail_in_range,
    ADD CONSTRAINT orders_trail_in_range CHECK (
        abs(coalesce(trail_amount, 0)) < 1e15 AND min_scale(coalesce(trail_amount, 0)) <= 8
        AND abs(coalesce(trail_percent, 0)) < 1e15 AND min_scale(coalesce(trail_percent, 0)) <= 8),
    DROP CONSTRAINT orders_trail_positive_unless_rejected,
    ADD CONSTRAINT orders_trail_positive_unless_rejected CHECK (
        coalesce(trail_amount, 1) > 0 AND coalesce(trail_percent, 1) > 0
        AND coalesce(trail_percent, 1) < 100 OR status = 'REJECTED'),
    DROP CONSTRAINT orders_status_agrees_with_fills,
    ADD CONSTRAINT orders_status_agrees_with_fills CHECK (
        CASE WHEN status = 'FILLED' THEN filled_quantity >= quantity
             WHEN status = 'PARTIALLY_FILLED'
             THEN filled_quantity > 0 AND filled_quantity < quantity
             WHEN status IN ('NEW', 'PENDING', 'PENDING_SUBMIT', 'ROUTED', 'REJECTED')
             THEN filled_quantity = 0
             ELSE filled_quantity < quantity END),
    DROP CONSTRAINT orders_reject_has_source_and_code,
    ADD CONSTRAINT orders_reject_has_source_and_code CHECK (
        CASE WHEN status = 'REJECTED'
             THEN reject_code IS NOT NULL
                  AND reject_source IN ('VALIDATION', 'RISK', 'COMPLIANCE', 'BROKER')
             ELSE reject_code IS NULL AND reject_source IS NULL END),
    DROP CONSTRAINT orders_times_in_range,
    ADD CONSTRAINT orders_times_in_range CHECK (
        time_in_range(coalesce(expire_at, logical_time))
        AND time_in_range(coalesce(triggered_at, logical_time)) AND time_in_range(status_at)),
    ALTER COLUMN recorded_at SET DEFAULT now();

ALTER TABLE execution
    DROP CONSTRAINT execution_execution_id_format,
    ADD CONSTRAINT execution_execution_id_format
        CHECK (execution_id ~ '^[[:graph:]]([[:print:]]{0,126}[[:graph:]])?$'),
    DROP CONSTRAINT execution_quantity_positive,
    ADD CONSTRAINT execution_quantity_positive
        CHECK (quantity > 0 AND quantity < 1e15 AND min_scale(quantity) <= 8),
    DROP CONSTRAINT execution_price_in_range,
    ADD CONSTRAINT execution_price_in_range CHECK (abs(price) < 1e15 AND min_scale(price) <= 8),
    DROP CONSTRAINT execution_commission_in_range,
    ADD CONSTRAINT execution_commission_in_range
        CHECK (abs(commission) < 1e15 AND min_scale(commission) <= 16),
    ALTER COLUMN recorded_at SET DEFAULT now();

ALTER TABLE position
    DROP CONSTRAINT position_symbol_format,
    ADD CONSTRAINT position_symbol_format CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]{0,31}$'),
    DROP CONSTRAINT position_quantity_in_range,
    ADD CONSTRAINT position_quantity_in_range
        CHECK (abs(quantity) < 1e18 AND min_scale(quantity) <= 8),
    DROP CONSTRAINT position_mark_price_in_range,
    ADD CONSTRAINT position_mark_price_in_range
        CHECK (abs(mark_price) < 1e15 AND min_scale(mark_price) <= 8);

ALTER TABLE mtm_ledger
    ALTER COLUMN recorded_at SET DEFAULT now();

ALTER TABLE event_ledger
    DROP CONSTRAINT event_ledger_event_type_format,
    ADD CONSTRAINT event_ledger_event_type_format CHECK (event_type ~ '^[A-Z][A-Z0-9_]{0,62}$'),
    ALTER COLUMN recorded_at SET DEFAULT now();

ALTER TABLE risk_limit
    DROP CONSTRAINT risk_limit_symbol_format,
    ADD CONSTRAINT risk_limit_symbol_format CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]{0,31}$');

CREATE TRIGGER engine_state_a_guard_write BEFORE INSERT OR UPDATE ON engine_state
    FOR EACH ROW EXECUTE FUNCTION run_guard_write('engine_state');

CREATE TRIGGER engine_state_b_check_write BEFORE INSERT OR UPDATE ON engine_state
    FOR EACH ROW EXECUTE FUNCTION engine_state_check_write();

CREATE TRIGGER orders_a_prepare_insert BEFORE INSERT ON orders
    FOR EACH ROW EXECUTE FUNCTION orders_prepare_insert();

CREATE TRIGGER execution_a_prepare_insert BEFORE INSERT ON execution
    FOR EACH ROW EXECUTE FUNCTION execution_prepare_insert();

CREATE TRIGGER mtm_ledger_a_prepare_insert BEFORE INSERT ON mtm_ledger
    FOR EACH ROW EXECUTE FUNCTION mtm_ledger_prepare_insert();

CREATE TRIGGER event_ledger_a_append BEFORE INSERT ON event_ledger
    FOR EACH ROW EXECUTE FUNCTION event_ledger_append();

CREATE TRIGGER event_ledger_b_check_fact BEFORE INSERT ON event_ledger
    FOR EACH ROW WHEN (NEW.event_type IN ('EXECUTION', 'SPLIT_APPLIED', 'TICK')
                       OR starts_with(NEW.event_type, 'ORDER_'))
    EXECUTE FUNCTION event_ledger_check_fact();

CREATE CONSTRAINT TRIGGER event_ledger_m_check_end AFTER INSERT ON event_ledger
    DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.event_type IN ('RUN_STOPPING', 'RUN_STOPPED', 'RUN_ERROR'))
    EXECUTE FUNCTION event_ledger_check_end();

CREATE TRIGGER orders_b_pass_gate BEFORE INSERT ON orders
    FOR EACH ROW WHEN (NEW.status <> 'REJECTED') EXECUTE FUNCTION orders_pass_gate();

DROP FUNCTION ticks_write;

DROP FUNCTION plans_are_active;

DROP FUNCTION ledger_analyze;

DROP FUNCTION orders_gate;

DROP FUNCTION orders_open_quantity;

DROP FUNCTION event_ledger_prove;

DROP FUNCTION books_follow;

DROP FUNCTION event_refuse;

DROP FUNCTION position_after_events;

DROP FUNCTION event_chain_next;

DROP FUNCTION mtm_ledger_prove;

DROP FUNCTION mtm_ledger_refuse_time;

DROP FUNCTION mtm_ledger_check_books;

DROP FUNCTION orders_times_are_in_range;

DROP FUNCTION orders_rejection_agrees;

DROP FUNCTION orders_status_agrees;

DROP FUNCTION orders_trail_is_positive;

DROP FUNCTION orders_prices_are_in_range;

DROP FUNCTION strategy_run_words_are_short;

DROP FUNCTION event_moment;

DROP FUNCTION amount_in_range;

DROP FUNCTION decimal_in_range;

COMMENT ON FUNCTION engine_state_check_write IS
    'Trigger: last_logical_time is that of the newest TICK event.';

COMMENT ON FUNCTION execution_check_money IS
    'Refuses a price that can not be, and a commission in another currency than the run''s.';

COMMENT ON FUNCTION execution_apply IS
    'Trigger: executions are told to the ledger and move orders, positions and cash.';

COMMENT ON FUNCTION event_ledger_check_fact IS
    'Trigger: an event that tells of a row says what the row says.';

COMMENT ON FUNCTION strategy_run_books_due IS
    'What the ledger makes of a run''s cash and books_seq.';

COMMENT ON FUNCTION position_due IS 'What the ledger makes of a position.';

COMMENT ON FUNCTION orders_exposure IS 'Position plus open orders of an order''s side and symbol.';

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

REVOKE EXECUTE ON FUNCTION grant_roles FROM PUBLIC;

DO $$
BEGIN
    PERFORM grant_roles();
END $$;
