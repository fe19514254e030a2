-- Ticks are written in one statement, which the triggers prove as a whole; CHECKs are cheaper to
-- start. Guards are replaced in one transaction by others that refuse the same, so that nothing
-- gets past them meanwhile.
-- squawk-ignore-file ban-drop-constraint, ban-drop-function, ban-drop-default, constraint-missing-not-valid

SET LOCAL lock_timeout = '30s';
SET LOCAL statement_timeout = '1h';

DROP TRIGGER engine_state_a_guard_write ON engine_state;

DROP TRIGGER engine_state_b_check_write ON engine_state;

DROP TRIGGER orders_a_prepare_insert ON orders;

DROP TRIGGER execution_a_prepare_insert ON execution;

DROP TRIGGER mtm_ledger_a_prepare_insert ON mtm_ledger;

DROP TRIGGER event_ledger_a_append ON event_ledger;

DROP TRIGGER event_ledger_b_check_fact ON event_ledger;

DROP TRIGGER event_ledger_m_check_end ON event_ledger;

DROP TRIGGER orders_b_pass_gate ON orders;

DROP FUNCTION execution_check_money;

-- Who trades: people and services. Everything that belongs to somebody carries user_id first in
-- its keys, which isolates users and lets the schema be sharded by user_id.

-- What CHECKs ask, here and in other files, is short in the catalog: every statement that writes a
-- row reads the CHECKs of its table anew. A rule of some length is therefore a function in plpgsql,
-- which is read once a session; NULL asks nothing, as in any CHECK. And a pattern leaves lengths to
-- length(): {0,31} has the matcher count, which costs more than all the rest.

-- Infinity and years that no program's calendar has would stop whoever reads the row next.
CREATE OR REPLACE FUNCTION time_in_range(moment timestamptz) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN moment BETWEEN '0001-01-02 00:00Z' AND '9999-12-30 00:00Z';
END $$;

-- NaN and infinity are above every limit, and what has no end has too many decimals.
CREATE OR REPLACE FUNCTION decimal_in_range(number numeric, below numeric, decimals integer) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN abs(number) < below AND min_scale(number) <= decimals;
END $$;

CREATE OR REPLACE FUNCTION amount_in_range(amount numeric) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN abs(amount) < 1e15 AND min_scale(amount) <= 8;
END $$;

-- As jsonb writes a time, whatever the session's time zone.
CREATE OR REPLACE FUNCTION event_moment(moment timestamptz) RETURNS text
LANGUAGE sql STABLE
RETURN (to_json(moment AT TIME ZONE 'UTC') #>> '{}') || '+00:00';

CREATE OR REPLACE FUNCTION strategy_run_words_are_short(name text, strategy text, calendar text)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN length(coalesce(name, '')) <= 100 AND length(strategy) <= 200
           AND length(calendar) <= 32;
END $$;

-- Cash is not guarded by who writes it but proven, whoever does: it may change only by what the
-- EXECUTION events say that it does not yet have (50_executions.sql).
CREATE OR REPLACE FUNCTION strategy_run_check_update() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    due record;
BEGIN
    IF (NEW.user_id, NEW.run_id, NEW.initial_cash, NEW.broker, NEW.account_type, NEW.currency,
        NEW.calendar, NEW.strategy, NEW.parameters, NEW.paper, NEW.created_at)
       IS DISTINCT FROM
       (OLD.user_id, OLD.run_id, OLD.initial_cash, OLD.broker, OLD.account_type, OLD.currency,
        OLD.calendar, OLD.strategy, OLD.parameters, OLD.paper, OLD.created_at) THEN
        PERFORM strategy_run_check_terms(OLD, NEW);
    END IF;
    NEW.stopped_at := OLD.stopped_at;
    IF (NEW.cash, NEW.books_seq) IS DISTINCT FROM (OLD.cash, OLD.books_seq) THEN
        -- What they are, and what the events after books_seq add.
        SELECT OLD.cash + coalesce(sum(event_cash_flow(l.event_type, l.payload)), 0) AS cash,
               coalesce(max(l.seq), OLD.books_seq) AS books_seq
        INTO due FROM event_ledger l
        WHERE l.user_id = OLD.user_id AND l.run_id = OLD.run_id AND l.seq > OLD.books_seq
          AND l.event_type IN ('EXECUTION', 'SPLIT_APPLIED');
        IF NEW.cash IS NULL THEN
            NEW.cash := due.cash;
            NEW.books_seq := due.books_seq;
        ELSIF NEW.cash <> due.cash OR NEW.books_seq IS DISTINCT FROM due.books_seq THEN
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
    PERFORM FROM strategy_run
    WHERE user_id = NEW.user_id AND run_id = NEW.run_id AND status = 'RUNNING' FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM run_lock(NEW.user_id, NEW.run_id, 'engine_state', 'RUNNING');
    END IF;
    IF TG_OP = 'UPDATE' AND (NEW.user_id <> OLD.user_id OR NEW.run_id <> OLD.run_id) THEN
        PERFORM row_check_keeps_run(OLD.user_id, OLD.run_id, NEW.user_id, NEW.run_id,
                                    'engine_state');
    ELSIF NEW.last_logical_time IS DISTINCT FROM
       (SELECT logical_time FROM event_ledger
        WHERE user_id = NEW.user_id AND run_id = NEW.run_id AND event_type = 'TICK'
        ORDER BY logical_time DESC LIMIT 1) THEN
        RAISE EXCEPTION 'the last tick of run % is not at %', NEW.run_id, NEW.last_logical_time
            USING ERRCODE = '23T04', CONSTRAINT = 'engine_state_time_is_last_tick',
                  TABLE = 'engine_state', COLUMN = 'last_logical_time',
                  HINT = 'Write the TICK event first; last_logical_time is the newest one''s.';
    END IF;
    NEW.recorded_at := now();
    RETURN NEW;
END $$;

CREATE OR REPLACE FUNCTION orders_prices_are_in_range(limit_price numeric, stop_price numeric,
                                           reference_price numeric)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN coalesce(abs(limit_price) < 1e15 AND min_scale(limit_price) <= 8, true)
       AND coalesce(abs(stop_price) < 1e15 AND min_scale(stop_price) <= 8, true)
       AND coalesce(abs(reference_price) < 1e15 AND min_scale(reference_price) <= 8, true);
END $$;

CREATE OR REPLACE FUNCTION orders_trail_is_positive(amount numeric, percent numeric) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN coalesce(amount, 1) > 0 AND coalesce(percent, 1) > 0 AND coalesce(percent, 1) < 100;
END $$;

CREATE OR REPLACE FUNCTION orders_status_agrees(status text, quantity numeric, filled_quantity numeric)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN CASE WHEN status = 'FILLED' THEN filled_quantity >= quantity
                WHEN status = 'PARTIALLY_FILLED'
                THEN filled_quantity > 0 AND filled_quantity < quantity
                WHEN status IN ('NEW', 'PENDING', 'PENDING_SUBMIT', 'ROUTED', 'REJECTED')
                THEN filled_quantity = 0
                ELSE filled_quantity < quantity END;
END $$;

CREATE OR REPLACE FUNCTION orders_rejection_agrees(status text, reject_source text, reject_code text)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN CASE WHEN status = 'REJECTED'
                THEN reject_code IS NOT NULL
                     AND reject_source IN ('VALIDATION', 'RISK', 'COMPLIANCE', 'BROKER')
                ELSE reject_code IS NULL AND reject_source IS NULL END;
END $$;

CREATE OR REPLACE FUNCTION orders_times_are_in_range(logical_time timestamptz, status_at timestamptz,
                                          expire_at timestamptz, triggered_at timestamptz)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN least(logical_time, status_at, expire_at, triggered_at) >= '0001-01-02 00:00Z'
       AND greatest(logical_time, status_at, expire_at, triggered_at) <= '9999-12-30 00:00Z';
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
    PERFORM execution_check_money(NEW, run.currency);
    RETURN NEW;
END $$;

CREATE OR REPLACE FUNCTION execution_check_money(e execution, currency text) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF e.price <= 0 AND NOT EXISTS (SELECT FROM instrument
                                    WHERE symbol = e.symbol AND negative_price_allowed) THEN
        RAISE EXCEPTION 'a price of % is not possible for %', e.price, e.symbol
            USING ERRCODE = 'check_violation', CONSTRAINT = 'execution_price_positive',
                  TABLE = 'execution', COLUMN = 'price',
                  HINT = 'Only an instrument with negative_price_allowed trades at or below zero.';
    ELSIF e.commission <> 0 AND e.commission_currency <> currency THEN
        RAISE EXCEPTION 'a commission in % can not be paid from cash in %', e.commission_currency,
            currency
            USING ERRCODE = 'check_violation', CONSTRAINT = 'execution_commission_in_run_currency',
                  TABLE = 'execution', COLUMN = 'commission_currency',
                  HINT = 'Convert the commission into the run''s currency.';
    END IF;
END $$;

-- What was not yet told to the ledger is told: cash and positions follow the events (82_books.sql).
-- Orders follow their executions. It has the owner's rights, so that nobody else needs a right to
-- write what follows from executions.
CREATE OR REPLACE FUNCTION execution_apply() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    untold   boolean;
    unfilled boolean;
BEGIN
    -- A scalar subquery is looked up row by row; EXISTS might be hashed, over the whole ledger.
    SELECT bool_or((SELECT true FROM event_ledger l
                    WHERE l.user_id = n.user_id AND l.run_id = n.run_id
                      AND l.logical_time = n.logical_time AND l.event_type = 'EXECUTION'
                      AND l.subject = n.order_id || '/' || n.execution_id) IS NULL),
           bool_or((SELECT (o.filled_quantity, o.filled_notional)
                           = (SELECT sum(e.quantity), sum(e.quantity * e.price) FROM execution e
                              WHERE e.user_id = n.user_id AND e.run_id = n.run_id
                                AND e.order_id = n.order_id)
                    FROM orders o
                    WHERE o.user_id = n.user_id AND o.run_id = n.run_id
                      AND o.order_id = n.order_id) IS NOT TRUE)
    INTO untold, unfilled FROM new_rows n;
    -- A statement that writes nothing would cost as much as one that does.
    IF untold THEN
        INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
        SELECT e.user_id, e.run_id, e.logical_time, 'EXECUTION',
               e.order_id || '/' || e.execution_id, execution_event_payload(e)
        FROM new_rows e
        WHERE (SELECT true FROM event_ledger l
               WHERE l.user_id = e.user_id AND l.run_id = e.run_id
                 AND l.logical_time = e.logical_time AND l.event_type = 'EXECUTION'
                 AND l.subject = e.order_id || '/' || e.execution_id) IS NULL;
    END IF;
    IF unfilled THEN
        UPDATE orders o
        SET filled_quantity = f.quantity, filled_notional = f.notional,
            status = CASE WHEN f.quantity >= o.quantity THEN 'FILLED'
                          WHEN o.status IN ('PENDING_CANCEL', 'PENDING_MODIFY') THEN o.status
                          ELSE 'PARTIALLY_FILLED' END
        FROM (SELECT DISTINCT user_id, run_id, order_id FROM new_rows) n
        CROSS JOIN LATERAL (SELECT sum(e.quantity) AS quantity,
                                   sum(e.quantity * e.price) AS notional
                            FROM execution e
                            WHERE e.user_id = n.user_id AND e.run_id = n.run_id
                              AND e.order_id = n.order_id) f
        WHERE o.user_id = n.user_id AND o.run_id = n.run_id AND o.order_id = n.order_id
          AND (o.filled_quantity, o.filled_notional) IS DISTINCT FROM (f.quantity, f.notional);
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION execution_event_payload(e execution) RETURNS jsonb
LANGUAGE sql STABLE
RETURN jsonb_build_object('symbol', e.symbol, 'side', e.side, 'quantity', e.quantity,
                          'price', e.price, 'commission', e.commission,
                          'commission_currency', e.commission_currency,
                          'event_at', event_moment(e.event_at));

CREATE OR REPLACE FUNCTION position_check_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run record;
    due public.position;
BEGIN
    SELECT r.status, r.account_type, r.books_seq INTO run FROM strategy_run r
    WHERE r.user_id = NEW.user_id AND r.run_id = NEW.run_id FOR NO KEY UPDATE;
    IF run.status IS DISTINCT FROM 'RUNNING' THEN
        PERFORM run_lock(NEW.user_id, NEW.run_id, 'position', 'RUNNING');
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
    due := position_after_events(due, NEW.user_id, NEW.run_id, NEW.symbol, run.books_seq,
                                 run.account_type);
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
    SELECT greatest((SELECT logical_time FROM mtm_ledger
                     WHERE user_id = NEW.user_id AND run_id = NEW.run_id
                     ORDER BY logical_time DESC LIMIT 1),
                    (SELECT logical_time FROM event_ledger
                     WHERE user_id = NEW.user_id AND run_id = NEW.run_id
                     ORDER BY seq DESC LIMIT 1)) INTO newest;
    IF NEW.logical_time < newest THEN
        PERFORM mtm_ledger_refuse_time(NEW.run_id, newest, NEW.logical_time);
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

CREATE OR REPLACE FUNCTION mtm_ledger_check_books(m mtm_ledger) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF m.cash <> (SELECT r.cash FROM strategy_run r
                  WHERE r.user_id = m.user_id AND r.run_id = m.run_id)
       OR m.market_value <> (SELECT coalesce(sum(p.market_value), 0) FROM position p
                             WHERE p.user_id = m.user_id AND p.run_id = m.run_id)
       OR m.logical_time < (SELECT l.logical_time FROM event_ledger l
                            WHERE l.user_id = m.user_id AND l.run_id = m.run_id
                            ORDER BY l.seq DESC LIMIT 1) THEN
        RAISE EXCEPTION 'the books of run % do not say cash % and market value % at %',
            m.run_id, m.cash, m.market_value, m.logical_time
            USING ERRCODE = '23T08', CONSTRAINT = 'mtm_ledger_equals_books',
                  TABLE = 'mtm_ledger', COLUMN = 'market_value',
                  HINT = 'Leave cash and market_value out; the database fills them in.';
    END IF;
END $$;

CREATE OR REPLACE FUNCTION mtm_ledger_refuse_time(of_run uuid, stands timestamptz, mark timestamptz)
RETURNS void LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'run % already stands at %, after %', of_run, stands, mark
        USING ERRCODE = '23T07', CONSTRAINT = 'mtm_ledger_time_moves_forward',
              TABLE = 'mtm_ledger', COLUMN = 'logical_time',
              HINT = 'A run only moves forward; mark it at a later logical_time.';
END $$;

-- A mark with the time of its transaction claims to be complete and to belong to a tick: then it is
-- proven, and that none is newer, with the tick's event (books_follow). If there is no such event,
-- it has to be what the books say now.
CREATE OR REPLACE FUNCTION mtm_ledger_prove() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    outside_ticks boolean;
    part          record;
    newest        timestamptz;
BEGIN
    SELECT bool_or((SELECT l.payload ? 'equity' FROM event_ledger l
                    WHERE l.user_id = n.user_id AND l.run_id = n.run_id
                      AND l.logical_time = n.logical_time AND l.event_type = 'TICK'
                      AND l.subject = '') IS NOT TRUE)
    INTO outside_ticks FROM new_rows n;
    IF outside_ticks THEN
        FOR part IN SELECT user_id, run_id, max(logical_time) AS logical_time
                    FROM new_rows GROUP BY user_id, run_id
        LOOP
            PERFORM run_lock(part.user_id, part.run_id, 'mtm_ledger', 'RUNNING');
            SELECT logical_time INTO newest FROM mtm_ledger
            WHERE user_id = part.user_id AND run_id = part.run_id
            ORDER BY logical_time DESC LIMIT 1;
            IF newest > part.logical_time THEN
                PERFORM mtm_ledger_refuse_time(part.run_id, newest, part.logical_time);
            END IF;
            PERFORM mtm_ledger_check_books(n) FROM new_rows n
            WHERE n.user_id = part.user_id AND n.run_id = part.run_id
              AND (SELECT l.payload ? 'equity' FROM event_ledger l
                   WHERE l.user_id = part.user_id AND l.run_id = part.run_id
                     AND l.logical_time = n.logical_time AND l.event_type = 'TICK'
                     AND l.subject = '') IS NOT TRUE;
        END LOOP;
    END IF;
    RETURN NULL;
END $$;

-- Times as seconds since 1970 and everything else as canonical jsonb, so that neither a session's
-- time zone nor a separator inside a text can make two different rows hash alike. The array is put
-- together as text, just as jsonb would print it, which costs half.
CREATE OR REPLACE FUNCTION event_hash(previous bytea, of_user uuid, of_run uuid, seq bigint,
                           logical_time timestamptz, event_type text, subject text,
                           payload jsonb, recorded_at timestamptz)
RETURNS bytea LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN sha256(previous || convert_to(
        format('["%s", "%s", %s, %s, %s, %s, %s, %s]', of_user, of_run, seq,
               extract(epoch FROM logical_time), to_json(event_type), to_json(subject), payload,
               extract(epoch FROM recorded_at)), 'UTF8'));
END $$;

-- The chain as an aggregate, so that many events are chained in one statement.
CREATE OR REPLACE FUNCTION event_chain_next(chain bytea, head bytea, of_user uuid, of_run uuid, seq bigint,
                                 logical_time timestamptz, event_type text, subject text,
                                 payload jsonb, recorded_at timestamptz)
RETURNS bytea LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN event_hash(coalesce(chain, head), of_user, of_run, seq, logical_time, event_type,
                      subject, payload, recorded_at);
END $$;

CREATE AGGREGATE event_chain(head bytea, of_user uuid, of_run uuid, seq bigint,
                             logical_time timestamptz, event_type text, subject text,
                             payload jsonb, recorded_at timestamptz) (
    SFUNC = event_chain_next, STYPE = bytea);

-- What an order's events carry: all that was asked for, no surrogate ids.
CREATE OR REPLACE FUNCTION orders_event_payload(o orders) RETURNS jsonb
LANGUAGE sql STABLE
RETURN jsonb_strip_nulls(jsonb_build_object(
    'symbol', o.symbol, 'side', o.side, 'quantity', o.quantity, 'order_type', o.order_type,
    'time_in_force', o.time_in_force, 'limit_price', o.limit_price,
    'stop_price', o.stop_price, 'trail_amount', o.trail_amount,
    'trail_percent', o.trail_percent, 'expire_at', event_moment(o.expire_at),
    'reference_price', o.reference_price, 'client_order_id', o.client_order_id,
    'reject_source', o.reject_source, 'reject_code', o.reject_code,
    'status_reason', o.status_reason));

-- The subject of an order's event is its id, of an execution's the order's id and its own.
CREATE OR REPLACE FUNCTION event_order_id(subject text) RETURNS uuid
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN left(subject, 36) LIKE '________-____-____-____-____________'
             AND left(subject, 36) ~ '^[0-9a-f]+-[0-9a-f]+-[0-9a-f]+-[0-9a-f]+-[0-9a-f]+$'
             AND substr(subject, 37, 1) = ANY ('{"",/,@}')
            THEN left(subject, 36)::uuid END;

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
    -- Told once, since its key is the order and the time that the order has.
    RETURN event.subject = o.order_id::text
       AND CASE WHEN event.event_type = 'ORDER_PLACED' THEN o.logical_time = event.logical_time
                ELSE 'ORDER_' || o.status = event.event_type
                     AND o.status_at = event.logical_time END;
END $$;

-- An order born FILLED has been told by who inserted it, with its execution; what was not told is
-- told here, and met by the gate on its way into the ledger.
CREATE OR REPLACE FUNCTION orders_record_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    unfilled boolean;
    untold   boolean;
BEGIN
    -- A scalar subquery is looked up row by row; EXISTS might be hashed, over the whole ledger.
    SELECT bool_or(n.status = 'FILLED'
                   -- Whether they add up is asked where they are inserted (execution_apply).
                   AND (SELECT true FROM execution e
                        WHERE e.user_id = n.user_id AND e.run_id = n.run_id
                          AND e.order_id = n.order_id LIMIT 1) IS NULL),
           bool_or(n.status <> 'FILLED'
                   OR (SELECT true FROM event_ledger l
                       WHERE l.user_id = n.user_id AND l.run_id = n.run_id
                         AND l.logical_time = n.logical_time AND l.event_type = 'ORDER_PLACED'
                         AND l.subject = n.order_id::text) IS NULL)
    INTO unfilled, untold FROM new_rows n;
    IF unfilled THEN
        RAISE EXCEPTION 'an order''s filled quantity follows from its executions'
            USING ERRCODE = '23T04', CONSTRAINT = 'orders_filled_from_executions',
                  TABLE = 'orders', COLUMN = 'filled_quantity',
                  HINT = 'Insert executions; the database sums them.';
    END IF;
    -- A statement that writes nothing would cost as much as one that does.
    IF untold THEN
        INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
        SELECT o.user_id, o.run_id, o.logical_time,
               CASE WHEN o.status = 'REJECTED' THEN 'ORDER_REJECTED' ELSE 'ORDER_PLACED' END,
               o.order_id, orders_event_payload(o)
        FROM new_rows o
        WHERE o.status <> 'FILLED'
           OR (SELECT true FROM event_ledger l
               WHERE l.user_id = o.user_id AND l.run_id = o.run_id
                 AND l.logical_time = o.logical_time AND l.event_type = 'ORDER_PLACED'
                 AND l.subject = o.order_id::text) IS NULL;
    END IF;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION strategy_run_follow_ledger(of_user uuid, of_run uuid) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE strategy_run SET cash = NULL WHERE user_id = of_user AND run_id = of_run;
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
    IF p.symbol IS NULL THEN
        p.user_id := event.user_id;
        p.run_id := event.run_id;
        p.symbol := event.payload ->> 'symbol';
        p.quantity := 0;
        p.cost_basis := 0;
        p.realized_pnl := 0;
    END IF;
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

-- What a position must be: what it is, or nothing, and what the events after the run's books_seq
-- make of it.
CREATE OR REPLACE FUNCTION position_after_events(p public.position, of_user uuid, of_run uuid, of_symbol text,
                                      books_seq bigint, account_type text)
RETURNS public.position
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    was   numeric;
    event event_ledger;
BEGIN
    FOR event IN SELECT * FROM event_ledger l
                 WHERE l.user_id = of_user AND l.run_id = of_run
                   AND l.seq > position_after_events.books_seq
                   AND l.event_type IN ('EXECUTION', 'SPLIT_APPLIED')
                   AND l.payload ->> 'symbol' = of_symbol
                 ORDER BY l.seq
    LOOP
        was := coalesce(p.quantity, 0);
        p := position_after_event(p, event);
        IF p.quantity < 0 AND p.quantity < was AND account_type = 'CASH' THEN
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
BEGIN
    -- A split of what was never held finds nothing to write.
    UPDATE position SET quantity = NULL
    WHERE user_id = of_user AND run_id = of_run AND symbol = of_symbol;
END $$;

CREATE OR REPLACE FUNCTION event_refuse(event record, fault text) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF fault = 'SEQ' THEN
        RAISE EXCEPTION 'event % of run % does not come next', event.seq, event.run_id
            USING ERRCODE = '23T06', CONSTRAINT = 'event_ledger_seq_without_gap',
                  TABLE = 'event_ledger', COLUMN = 'seq',
                  HINT = 'Leave seq out; the database numbers events.';
    ELSIF fault = 'HASH' THEN
        RAISE EXCEPTION 'event % of run % does not follow from the one before it', event.seq,
            event.run_id
            USING ERRCODE = '23T06', CONSTRAINT = 'event_ledger_hash_chain',
                  TABLE = 'event_ledger', COLUMN = 'hash',
                  HINT = 'Leave hash out; the database chains events.';
    ELSIF fault = 'TIME' THEN
        RAISE EXCEPTION 'run % already stands after %', event.run_id, event.logical_time
            USING ERRCODE = '23T07', CONSTRAINT = 'event_ledger_time_moves_forward',
                  TABLE = 'event_ledger', COLUMN = 'logical_time',
                  HINT = 'A run only moves forward; use a later logical_time.';
    ELSIF fault IS NOT NULL THEN
        RAISE EXCEPTION 'the gate refuses order %, which was not filled: %', event.subject, fault
            USING ERRCODE = '23T08', CONSTRAINT = 'orders_gate_decides',
                  TABLE = 'orders', COLUMN = 'status',
                  HINT = 'Insert it NEW; the database decides, executions do the rest.';
    END IF;
    RAISE EXCEPTION 'no row of run % bears out the event % of %', event.run_id, event.event_type,
        event.subject
        USING ERRCODE = '23T08', CONSTRAINT = 'event_ledger_tells_what_happened',
              TABLE = 'event_ledger', COLUMN = 'event_type',
              HINT = 'Write the row itself; the database tells the ledger.';
END $$;

-- Events are not taken on anybody's word: each must follow from the one before it, and what it
-- tells must be so, row by row. Positions and cash follow these events, so forging one would forge
-- money. The loop reads every row once and knows cash and holdings as they were at each event.
CREATE OR REPLACE FUNCTION books_follow(of_user uuid, of_run uuid, first_seq bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET enable_seqscan = off AS $$
DECLARE
    run       record;
    cash      numeric;
    limited   boolean;             -- has limits
    waiting   boolean;             -- has open orders
    reserved  numeric := 0;
    symbols   text[];              -- the holdings: parallel arrays
    held      numeric[];
    marks     numeric[];
    marked    timestamptz[];
    traded    boolean[];
    remarked  boolean[];
    value     numeric;
    previous  bytea;
    newest    timestamptz;
    last_mark timestamptz;         -- in mtm_ledger, and that of the last tick told now
    ticked    timestamptz;
    next_seq  bigint := first_seq;
    e         record;
    i         integer;
    price     numeric;
    refusal   record;
    moved     boolean;
BEGIN
    SELECT r.status, r.account_type, r.broker, r.currency, r.cash INTO run FROM strategy_run r
    WHERE r.user_id = of_user AND r.run_id = of_run FOR NO KEY UPDATE;
    IF run.status IS NULL OR run.status NOT IN ('RUNNING', 'STOPPING') THEN
        PERFORM run_lock(of_user, of_run, 'event_ledger', 'RUNNING', 'STOPPING');
    END IF;
    -- Where the books stand before the first event, in one query.
    SELECT run.cash, l.hash, l.logical_time, p.symbols, p.held, p.marks, p.marked,
           -- ORDER BY leaves a planner without statistics one index to choose.
           (SELECT true FROM orders o
            WHERE o.user_id = of_user AND o.run_id = of_run
              AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
            ORDER BY o.symbol LIMIT 1),
           (SELECT true FROM risk_limit k WHERE k.user_id = of_user LIMIT 1),
           (SELECT m.logical_time FROM mtm_ledger m
            WHERE m.user_id = of_user AND m.run_id = of_run ORDER BY m.logical_time DESC LIMIT 1)
    INTO cash, previous, newest, symbols, held, marks, marked, waiting, limited, last_mark
    FROM (SELECT coalesce(array_agg(h.symbol), '{}') AS symbols, array_agg(h.quantity) AS held,
                 array_agg(h.mark_price) AS marks, array_agg(h.marked_at) AS marked
          FROM position h WHERE h.user_id = of_user AND h.run_id = of_run) p
    LEFT JOIN event_ledger l ON l.user_id = of_user AND l.run_id = of_run AND l.seq = first_seq - 1;
    IF waiting THEN
        reserved := run_reserved_cash(of_user, of_run);
    END IF;

    -- Beside the event the row that it tells of: there is none unless the row is as the event says.
    FOR e IN
        SELECT l.*,
               CASE WHEN l.event_type = 'EXECUTION'
                    THEN (SELECT t FROM execution t
                          JOIN orders o ON o.user_id = t.user_id AND o.run_id = t.run_id
                                       AND o.order_id = t.order_id
                          WHERE t.user_id = of_user AND t.run_id = of_run
                            -- Both: before its first ANALYZE either index may be chosen.
                            AND t.order_id = event_order_id(l.subject)
                            AND t.execution_id = substr(l.subject, 38) COLLATE "default"
                            AND l.subject = t.order_id || '/' || t.execution_id
                            AND t.logical_time = l.logical_time
                            AND l.payload = execution_event_payload(t)
                            AND o.symbol = t.symbol AND o.side = t.side) END AS x,
               CASE WHEN l.event_type = 'ORDER_PLACED'
                    THEN (SELECT o FROM orders o
                          WHERE o.user_id = of_user AND o.run_id = of_run
                            AND o.order_id = event_order_id(l.subject)
                            AND o.order_id::text = l.subject
                            AND o.logical_time = l.logical_time
                            AND l.payload = orders_event_payload(o)
                            AND (o.status IN ('NEW', 'PENDING')
                                 -- Nothing has looked up a price for the gate.
                                 OR o.status = 'FILLED' AND o.status_at = o.logical_time
                                    AND coalesce(o.limit_price, o.stop_price, o.reference_price)
                                        IS NOT NULL)) END AS o,
               CASE WHEN l.event_type = 'TICK'
                    THEN (SELECT m FROM mtm_ledger m
                          WHERE m.user_id = of_user AND m.run_id = of_run
                            AND m.logical_time = l.logical_time
                            AND l.payload @> jsonb_build_object(
                                'cash', m.cash, 'market_value', m.market_value,
                                'equity', m.equity)) END AS m
        FROM event_ledger l
        WHERE l.user_id = of_user AND l.run_id = of_run AND l.seq >= first_seq
        ORDER BY l.seq
    LOOP
        IF e.seq <> next_seq OR (previous IS NULL) <> (e.seq = 1) THEN
            PERFORM event_refuse(e, 'SEQ');
        ELSIF e.hash <> event_hash(coalesce(previous, ''), of_user, of_run, e.seq, e.logical_time,
                                   e.event_type, e.subject, e.payload, e.recorded_at) THEN
            PERFORM event_refuse(e, 'HASH');
        ELSIF e.logical_time < newest THEN
            PERFORM event_refuse(e, 'TIME');
        ELSIF run.status = 'STOPPING' AND e.event_type NOT IN ('RUN_STOPPED', 'RUN_ERROR') THEN
            PERFORM run_lock(of_user, of_run, 'event_ledger', 'RUNNING');
        END IF;
        next_seq := next_seq + 1;
        previous := e.hash;
        newest := e.logical_time;

        IF e.event_type = 'TICK' THEN
            CONTINUE WHEN NOT e.payload ?| '{cash,market_value,equity}';
            value := 0;
            FOR i IN 1 .. cardinality(symbols) LOOP
                CONTINUE WHEN held[i] = 0;
                price := e.payload #>> ARRAY['prices', symbols[i]];
                IF price IS NOT NULL THEN
                    marks[i] := price;
                    marked[i] := coalesce(
                        (e.payload #>> ARRAY['priced_at', symbols[i]])::timestamptz,
                        e.logical_time);
                    remarked[i] := true;
                END IF;
                value := value + held[i] * marks[i];
            END LOOP;
            IF (e.m).cash = cash AND (e.m).market_value = value THEN
                ticked := e.logical_time;
            ELSE
                PERFORM event_refuse(e, NULL);
            END IF;

        ELSIF e.event_type = 'EXECUTION' THEN
            IF (e.x).price IS NULL THEN
                PERFORM event_refuse(e, NULL);
            ELSIF (e.x).price <= 0 OR (e.x).commission <> 0 THEN
                PERFORM execution_check_money(e.x, run.currency);
            END IF;
            i := coalesce(array_position(symbols, (e.x).symbol), cardinality(symbols) + 1);
            symbols[i] := (e.x).symbol;
            held[i] := coalesce(held[i], 0)
                     + CASE WHEN (e.x).side = 'BUY' THEN (e.x).quantity ELSE -(e.x).quantity END;
            IF marked[i] IS NULL OR marked[i] < e.logical_time THEN
                marks[i] := (e.x).price;
                marked[i] := e.logical_time;
            END IF;
            cash := cash + execution_cash_flow((e.x).side, (e.x).quantity, (e.x).price,
                                               (e.x).commission);
            traded[i] := true;
            moved := true;

        ELSIF e.event_type = 'ORDER_PLACED' THEN
            IF (e.o).status = 'FILLED' THEN
                refusal := orders_gate(
                    e.o, run.account_type, limited, cash - reserved,
                    coalesce(held[array_position(symbols, (e.o).symbol)], 0)
                    + CASE WHEN waiting THEN orders_open_quantity(e.o) ELSE 0 END);
                IF refusal.code IS NOT NULL OR (e.o).broker <> run.broker THEN
                    PERFORM event_refuse(e, coalesce(refusal.code, 'BROKER'));
                END IF;
            ELSIF (e.o).status IS NULL THEN
                PERFORM event_refuse(e, NULL);
            END IF;

        ELSIF e.event_type = 'SPLIT_APPLIED' THEN
            IF NOT EXISTS (SELECT FROM split_applied s
                           WHERE s.user_id = of_user AND s.run_id = of_run
                             AND split_event_subject(s) = e.subject
                             AND s.logical_time = e.logical_time
                             AND split_event_payload(s) = e.payload) THEN
                PERFORM event_refuse(e, NULL);
            END IF;

        ELSIF starts_with(e.event_type, 'ORDER_')
              AND NOT order_event_is_true(ROW (of_user, of_run, e.seq, e.logical_time,
                                               e.event_type, e.subject, e.payload, e.recorded_at,
                                               e.hash)::event_ledger) THEN
            PERFORM event_refuse(e, NULL);
        END IF;
    END LOOP;

    IF last_mark > ticked THEN
        PERFORM mtm_ledger_refuse_time(of_run, last_mark, ticked);
    END IF;
    FOR i IN 1 .. cardinality(symbols) LOOP
        IF traded[i] THEN
            UPDATE position SET quantity = NULL, mark_price = marks[i], marked_at = marked[i]
            WHERE user_id = of_user AND run_id = of_run AND symbol = symbols[i];
            IF NOT FOUND THEN
                INSERT INTO position (user_id, run_id, symbol, quantity, mark_price, marked_at)
                VALUES (of_user, of_run, symbols[i], NULL, marks[i], marked[i]);
            END IF;
        ELSIF remarked[i] THEN
            UPDATE position SET mark_price = marks[i], marked_at = marked[i]
            WHERE user_id = of_user AND run_id = of_run AND symbol = symbols[i];
        END IF;
    END LOOP;
    IF moved THEN
        UPDATE strategy_run SET cash = NULL WHERE user_id = of_user AND run_id = of_run;
    END IF;
    RETURN next_seq - first_seq;
END $$;

CREATE OR REPLACE FUNCTION event_ledger_prove() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    part   record;
    proven bigint;
BEGIN
    FOR part IN SELECT user_id, run_id, min(seq) AS first_seq FROM new_rows
                GROUP BY user_id, run_id
    LOOP
        proven := books_follow(part.user_id, part.run_id, part.first_seq);
    END LOOP;
    RETURN NULL;
END $$;

-- What is due of a run's active plans up to and including a session: every month after the newest
-- occasion in the ledger whose planned session has come. Bounded by the caller's LIMIT.
CREATE OR REPLACE FUNCTION sip_due(of_user uuid, of_run uuid, upto_session date)
RETURNS TABLE (plan text, symbol text, amount numeric, missed_policy text, occasion text,
               planned_on date, next_open_at timestamptz,
               session_date date, open_at timestamptz, close_at timestamptz)
-- PL/pgSQL, which keeps the plan: planning costs ten times as much as asking.
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
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
    ORDER BY d.planned_on, p.plan;
END $$;

-- What open orders of an order's side would add to its run's holding.
CREATE OR REPLACE FUNCTION orders_open_quantity(o orders) RETURNS numeric
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN coalesce((SELECT sum(w.quantity - w.filled_quantity) FROM orders w
                     WHERE w.user_id = o.user_id AND w.run_id = o.run_id AND w.symbol = o.symbol
                       AND w.side = o.side
                       AND w.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')), 0)
           * CASE WHEN o.side = 'BUY' THEN 1 ELSE -1 END;
END $$;

-- The cash that open buy orders of a run hold back.
CREATE OR REPLACE FUNCTION run_reserved_cash(of_user uuid, of_run uuid) RETURNS numeric
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN coalesce((SELECT sum(reserved_cash) FROM orders
                     WHERE user_id = of_user AND run_id = of_run
                       AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')), 0);
END $$;

-- The gate: why an order may not be taken, given the cash and the holding that it meets.
CREATE OR REPLACE FUNCTION orders_gate(o orders, account_type text, limited boolean, free_cash numeric,
                            exposure numeric, OUT source text, OUT code text, OUT reason text)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    price  numeric := coalesce(o.limit_price, o.stop_price, o.reference_price);
    broken record;
BEGIN
    code := orders_validation_code(o);
    IF code IS NULL AND least(o.limit_price, o.stop_price, o.reference_price) <= 0 THEN
        code := orders_price_code(o);
    END IF;
    IF code IS NOT NULL THEN
        source := 'VALIDATION';
        RETURN;
    END IF;
    IF limited THEN
        SELECT * INTO broken FROM orders_broken_limit(o, price, exposure);
        IF FOUND THEN
            code := broken.code;
            reason := coalesce('limit ' || trim_scale(broken.limit_value) || ', would be '
                               || coalesce(trim_scale(broken.value)::text, 'unknown'), o.symbol);
        END IF;
    END IF;
    IF code IS NOT NULL OR account_type <> 'CASH' THEN
        NULL;
    ELSIF o.side = 'SELL' AND o.quantity > exposure THEN
        code := 'INSUFFICIENT_POSITION';
        reason := format('holds %s, would sell %s', trim_scale(exposure), trim_scale(o.quantity));
    ELSIF o.side = 'BUY' AND o.quantity * price > free_cash THEN
        code := 'INSUFFICIENT_CASH';
        reason := format('has %s, needs %s', trim_scale(free_cash),
                         trim_scale(o.quantity * price));
    END IF;
    IF code IS NOT NULL THEN
        source := 'RISK';
        reason := code || ': ' || reason;
    END IF;
END $$;

CREATE OR REPLACE FUNCTION orders_pass_gate() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run     record;
    held    numeric;
    refusal record;
BEGIN
    SELECT r.cash, r.account_type INTO run FROM strategy_run r
    WHERE r.user_id = NEW.user_id AND r.run_id = NEW.run_id;
    IF NEW.reference_price IS NULL AND orders_validation_code(NEW) IS NULL
       AND orders_price_code(NEW) IS NULL THEN
        NEW.reference_price := orders_known_price(NEW);
    END IF;
    SELECT p.quantity INTO held FROM position p
    WHERE p.user_id = NEW.user_id AND p.run_id = NEW.run_id AND p.symbol = NEW.symbol;
    refusal := orders_gate(NEW, run.account_type,
                           EXISTS (SELECT FROM risk_limit l WHERE l.user_id = NEW.user_id),
                           run.cash - run_reserved_cash(NEW.user_id, NEW.run_id),
                           coalesce(held, 0) + orders_open_quantity(NEW));
    IF refusal.code IS NOT NULL THEN
        NEW.status := 'REJECTED';
        NEW.reject_source := refusal.source;
        NEW.reject_code := refusal.code;
        NEW.status_reason := coalesce(refusal.reason, NEW.status_reason);
    END IF;
    RETURN NEW;
END $$;

-- Ticks as the engine writes them: everything that one tick or many told, in one statement, which
-- the triggers of the tables then prove as a whole. Nothing here is taken on the engine's word.

-- A planner that has never seen these tables takes any index of a run for as good as another, and
-- reads the whole run where one row was asked for. Autovacuum looks once a minute at most; a replay
-- has written hundreds of thousands of rows by then. So a run that grows long before anybody has
-- looked has them looked at, once.
CREATE OR REPLACE FUNCTION ledger_analyze() RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF (SELECT reltuples FROM pg_class WHERE oid = 'event_ledger'::regclass) < 500 THEN
        ANALYZE event_ledger, orders, execution, mtm_ledger, position, strategy_run;
    END IF;
END $$;

CREATE OR REPLACE FUNCTION plans_are_active(of_user uuid, of_run uuid, event_types text[],
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

-- What is told are the events, in order. Trades are orders that their tick filled whole, with one
-- execution; the events tell of each that it was placed and that it was executed. after_seq is the
-- number of the last event that the writer knows; if there is a newer one, or a plan was changed,
-- the writer has decided on what is no longer so. heartbeat is the wall clock of a live tick, lag
-- how many seconds its logical time is behind. new_state is NULL where it stays what it is.
CREATE OR REPLACE FUNCTION ticks_write(
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

    IF after_seq < 1000 AND after_seq + cardinality(told_type) >= 1000 THEN
        PERFORM ledger_analyze();
    END IF;
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

-- The rights of each role: all that it needs and no more. The engine inserts what happens and
-- moves what moves; it has no right to a number that follows from something else. Those are
-- written by ticks_write and, behind the tables' triggers, by execution_apply, books_follow and
-- split_applied_apply, which have the owner's rights.
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
        ('oms_engine', 'EXECUTE ON FUNCTION ticks_write'),
        ('oms_connector', 'USAGE ON SCHEMA public'),
        ('oms_connector', 'SELECT ON instrument, calendar_session'),
        ('oms_auditor', 'USAGE ON SCHEMA public')
$$;

ALTER TABLE instrument
    DROP CONSTRAINT instrument_symbol_format,
    ADD CONSTRAINT instrument_symbol_format
        CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]*$' AND length(symbol) <= 32);

ALTER TABLE strategy_run
    DROP CONSTRAINT strategy_run_account_type_known,
    ADD CONSTRAINT strategy_run_account_type_known CHECK (account_type = ANY ('{CASH,MARGIN}')),
    DROP CONSTRAINT strategy_run_tick_at_known,
    ADD CONSTRAINT strategy_run_tick_at_known CHECK (tick_at = ANY ('{OPEN,CLOSE}')),
    DROP CONSTRAINT strategy_run_words_short,
    ADD CONSTRAINT strategy_run_words_short
        CHECK (strategy_run_words_are_short(name, strategy, calendar)),
    DROP CONSTRAINT strategy_run_initial_cash_in_range,
    ADD CONSTRAINT strategy_run_initial_cash_in_range
        CHECK (initial_cash >= 0 AND decimal_in_range(initial_cash, 1e18, 8)),
    DROP CONSTRAINT strategy_run_cash_in_range,
    ADD CONSTRAINT strategy_run_cash_in_range
        CHECK (decimal_in_range(cash, 1e20, 16)),
    DROP CONSTRAINT strategy_run_stopped_at_iff_over,
    ADD CONSTRAINT strategy_run_stopped_at_iff_over
        CHECK ((stopped_at IS NOT NULL) = (status = ANY ('{STOPPED,ERROR}')));

ALTER TABLE orders
    DROP CONSTRAINT orders_symbol_format,
    ADD CONSTRAINT orders_symbol_format
        CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]*$' AND length(symbol) <= 32),
    DROP CONSTRAINT orders_side_known,
    ADD CONSTRAINT orders_side_known CHECK (side = ANY ('{BUY,SELL}')),
    DROP CONSTRAINT orders_order_type_known,
    ADD CONSTRAINT orders_order_type_known
        CHECK (order_type = ANY ('{MARKET,LIMIT,STOP,STOP_LIMIT,TRAIL}')),
    DROP CONSTRAINT orders_time_in_force_known,
    ADD CONSTRAINT orders_time_in_force_known
        CHECK (time_in_force = ANY ('{DAY,GTC,IOC,FOK,GTD,OPG,CLS}')),
    DROP CONSTRAINT orders_quantity_in_range,
    ADD CONSTRAINT orders_quantity_in_range CHECK (amount_in_range(quantity)),
    DROP CONSTRAINT orders_prices_in_range,
    ADD CONSTRAINT orders_prices_in_range
        CHECK (orders_prices_are_in_range(limit_price, stop_price, reference_price)),
    DROP CONSTRAINT orders_trail_in_range,
    ADD CONSTRAINT orders_trail_in_range
        CHECK (amount_in_range(trail_amount) AND amount_in_range(trail_percent)),
    DROP CONSTRAINT orders_trail_positive_unless_rejected,
    ADD CONSTRAINT orders_trail_positive_unless_rejected
        CHECK (orders_trail_is_positive(trail_amount, trail_percent) OR status = 'REJECTED'),
    DROP CONSTRAINT orders_status_agrees_with_fills,
    ADD CONSTRAINT orders_status_agrees_with_fills
        CHECK (orders_status_agrees(status, quantity, filled_quantity)),
    DROP CONSTRAINT orders_reject_has_source_and_code,
    ADD CONSTRAINT orders_reject_has_source_and_code
        CHECK (orders_rejection_agrees(status, reject_source, reject_code)),
    DROP CONSTRAINT orders_times_in_range,
    ADD CONSTRAINT orders_times_in_range
        CHECK (orders_times_are_in_range(logical_time, status_at, expire_at, triggered_at)),
    ALTER COLUMN recorded_at DROP DEFAULT;

ALTER TABLE execution
    DROP CONSTRAINT execution_execution_id_format,
    ADD CONSTRAINT execution_execution_id_format
        CHECK (execution_id ~ '^[[:graph:]]([[:print:]]*[[:graph:]])?$'
               AND length(execution_id) <= 128),
    DROP CONSTRAINT execution_quantity_positive,
    ADD CONSTRAINT execution_quantity_positive
        CHECK (quantity > 0 AND amount_in_range(quantity)),
    DROP CONSTRAINT execution_price_in_range,
    ADD CONSTRAINT execution_price_in_range CHECK (amount_in_range(price)),
    DROP CONSTRAINT execution_commission_in_range,
    ADD CONSTRAINT execution_commission_in_range
        CHECK (decimal_in_range(commission, 1e15, 16)),
    ALTER COLUMN recorded_at DROP DEFAULT;

ALTER TABLE position
    DROP CONSTRAINT position_symbol_format,
    ADD CONSTRAINT position_symbol_format
        CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]*$' AND length(symbol) <= 32),
    DROP CONSTRAINT position_quantity_in_range,
    ADD CONSTRAINT position_quantity_in_range
        CHECK (decimal_in_range(quantity, 1e18, 8)),
    DROP CONSTRAINT position_mark_price_in_range,
    ADD CONSTRAINT position_mark_price_in_range CHECK (amount_in_range(mark_price));

ALTER TABLE mtm_ledger
    ALTER COLUMN recorded_at DROP DEFAULT;

ALTER TABLE event_ledger
    DROP CONSTRAINT event_ledger_event_type_format,
    ADD CONSTRAINT event_ledger_event_type_format
        CHECK (event_type ~ '^[A-Z][A-Z0-9_]*$' AND length(event_type) <= 63),
    ALTER COLUMN recorded_at DROP DEFAULT;

ALTER TABLE risk_limit
    DROP CONSTRAINT risk_limit_symbol_format,
    ADD CONSTRAINT risk_limit_symbol_format
        CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]*$' AND length(symbol) <= 32);

CREATE TRIGGER engine_state_a_check_write BEFORE INSERT OR UPDATE ON engine_state
    FOR EACH ROW EXECUTE FUNCTION engine_state_check_write();

-- An order born FILLED at the time of its transaction claims to be complete: its statement proves
-- it with all others (orders_record_insert, books_follow) instead of one by one.
CREATE TRIGGER orders_a_prepare_insert BEFORE INSERT ON orders
    FOR EACH ROW WHEN (NEW.status <> 'FILLED' OR NEW.recorded_at IS DISTINCT FROM now())
    EXECUTE FUNCTION orders_prepare_insert();

-- A row with the time of its transaction claims to be complete: it is proven with its event.
CREATE TRIGGER execution_a_prepare_insert BEFORE INSERT ON execution
    FOR EACH ROW WHEN (NEW.recorded_at IS DISTINCT FROM now())
    EXECUTE FUNCTION execution_prepare_insert();

CREATE TRIGGER mtm_ledger_a_prepare_insert BEFORE INSERT ON mtm_ledger
    FOR EACH ROW WHEN (NEW.recorded_at IS DISTINCT FROM now())
    EXECUTE FUNCTION mtm_ledger_prepare_insert();

CREATE TRIGGER mtm_ledger_m_prove AFTER INSERT ON mtm_ledger
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION mtm_ledger_prove();

-- An event with the time of its transaction claims to be complete: numbered and chained. Every
-- event is proven with its statement (books_follow in 82_books.sql), however it came.
CREATE TRIGGER event_ledger_a_append BEFORE INSERT ON event_ledger
    FOR EACH ROW WHEN (NEW.recorded_at IS DISTINCT FROM now())
    EXECUTE FUNCTION event_ledger_append();

CREATE CONSTRAINT TRIGGER event_ledger_m_check_end AFTER INSERT ON event_ledger
    DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.event_type = ANY ('{RUN_STOPPING,RUN_STOPPED,RUN_ERROR}'))
    EXECUTE FUNCTION event_ledger_check_end();

CREATE TRIGGER event_ledger_m_prove AFTER INSERT ON event_ledger
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION event_ledger_prove();

CREATE TRIGGER orders_b_pass_gate BEFORE INSERT ON orders
    FOR EACH ROW WHEN (NEW.status <> ALL ('{REJECTED,FILLED}'))
    EXECUTE FUNCTION orders_pass_gate();

DROP FUNCTION orders_exposure;

DROP FUNCTION position_due;

DROP FUNCTION strategy_run_books_due;

DROP FUNCTION event_ledger_check_fact;

COMMENT ON FUNCTION decimal_in_range IS
    'Whether a number is nearer to zero than a limit and has no more than so many decimals.';

COMMENT ON FUNCTION amount_in_range IS
    'Whether a quantity or price is below 10^15 and has 8 decimals at most.';

COMMENT ON FUNCTION event_moment IS 'A time as the ledger''s payloads state it: ISO 8601, in UTC.';

COMMENT ON FUNCTION strategy_run_words_are_short IS 'Whether a run''s words fit on a line.';

COMMENT ON FUNCTION engine_state_check_write IS
    'Trigger: no write unless the run is RUNNING; last_logical_time is the newest TICK event''s.';

COMMENT ON FUNCTION orders_prices_are_in_range IS
    'Whether the prices that an order has are below 10^15 and have 8 decimals at most.';

COMMENT ON FUNCTION orders_trail_is_positive IS
    'Whether a trailing stop''s distance is one: above zero, and below 100 percent.';

COMMENT ON FUNCTION orders_status_agrees IS 'Whether an order has filled as its status says.';

COMMENT ON FUNCTION orders_rejection_agrees IS
    'Whether an order says who rejected it and why, if it was, and nothing of it, if it was not.';

COMMENT ON FUNCTION orders_times_are_in_range IS
    'Whether the times that an order has are of the years 1 to 9999.';

COMMENT ON FUNCTION execution_check_money IS
    'Refuses a price that can not be, and a commission in another currency than the run''s.';

COMMENT ON FUNCTION execution_apply IS
    'Trigger: executions are told to the ledger and move their orders.';

COMMENT ON FUNCTION mtm_ledger_check_books IS
    'Refuses a mark that is not what the books say, or older than the newest event.';

COMMENT ON FUNCTION mtm_ledger_refuse_time IS 'Raises that a mark is older than another.';

COMMENT ON FUNCTION mtm_ledger_prove IS
    'Trigger: marks are those of the books, or belong to a tick that is proven to be.';

COMMENT ON FUNCTION event_chain_next IS 'One step of event_chain.';

COMMENT ON AGGREGATE event_chain(bytea, uuid, uuid, bigint, timestamptz, text, text, jsonb,
                                 timestamptz) IS
    'The hash of the last of some consecutive events; head is the hash of the one before them.';

COMMENT ON FUNCTION position_after_events IS 'What the ledger makes of a position.';

COMMENT ON FUNCTION event_refuse IS
    'Raises what is wrong with an event: SEQ, HASH, TIME, words of the gate, or no row behind it.';

COMMENT ON FUNCTION books_follow IS
    'Proves a run''s events from first_seq on and brings its books up to them.';

COMMENT ON FUNCTION event_ledger_prove IS 'Trigger: proves what was told, and the books follow it.';

COMMENT ON FUNCTION orders_open_quantity IS
    'Units that open orders of an order''s symbol and side would add; negative for sells.';

COMMENT ON FUNCTION orders_gate IS
    'Why an order is refused, or NULLs: limited is whether its user has limits, free_cash what '
    'open orders leave, exposure the holding and open orders of its side.';

COMMENT ON FUNCTION ledger_analyze IS
    'Gives the planner its first statistics of the tables that grow with every tick.';

COMMENT ON FUNCTION plans_are_active IS
    'Whether the plans that events say were carried out are active.';

COMMENT ON FUNCTION ticks_write IS
    'Writes what ticks told: trades, events, marks and the engine''s state, in one statement.';

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

REVOKE EXECUTE ON FUNCTION grant_roles, ticks_write, books_follow, ledger_analyze FROM PUBLIC;

DO $$
BEGIN
    PERFORM grant_roles();
END $$;
