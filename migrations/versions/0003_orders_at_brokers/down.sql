-- Back to paper runs alone; what was traded at brokers must have been deleted before.

DROP VIEW latency_summary;

DROP VIEW order_latency;

DROP VIEW order_response;

DROP VIEW audit_broker;

DROP VIEW audit_event;

DROP VIEW audit_mark;

DROP VIEW audit_cash;

DROP VIEW audit_order;

DROP VIEW audit_orphan;

DROP VIEW order_refusal;

DROP VIEW pnl_daily;

DROP VIEW position_pnl;

DROP VIEW execution_cost;

DROP TRIGGER run_route_a_check_write ON run_route;

DROP TRIGGER open_order_sum_a_check_write ON open_order_sum;

DROP TRIGGER orders_c_forget_insert ON orders;

DROP TRIGGER orders_c_forget_update ON orders;

DROP TRIGGER execution_commission_a_prepare_insert ON execution_commission;

DROP TRIGGER execution_commission_m_apply ON execution_commission;

DROP TRIGGER execution_commission_z_refuse_change ON execution_commission;

DROP TRIGGER execution_commission_z_refuse_truncate ON execution_commission;

DROP TRIGGER orders_c_meet_hours ON orders;

DROP TRIGGER orders_m_send ON orders;

DROP TRIGGER orders_m_send_move ON orders;

DROP TRIGGER orders_m_send_terms ON orders;

DROP TRIGGER broker_command_b_prove ON broker_command;

DROP TRIGGER broker_command_b_prove_change ON broker_command;

DROP TRIGGER broker_command_m_move_order ON broker_command;

DROP TRIGGER orders_m_record_terms ON orders;

DROP TRIGGER broker_command_a_check_update ON broker_command;

DROP TRIGGER broker_command_z_refuse_delete ON broker_command;

DROP TRIGGER broker_command_z_refuse_truncate ON broker_command;

DROP TRIGGER broker_event_a_check_update ON broker_event;

DROP TRIGGER broker_event_z_refuse_delete ON broker_event;

DROP TRIGGER broker_event_z_refuse_truncate ON broker_event;

DROP TRIGGER trading_halt_a_guard_write ON trading_halt;

DROP TRIGGER trading_halt_z_refuse_truncate ON trading_halt;

DROP TRIGGER orders_b_pass_gate ON orders;

DROP TRIGGER reconciliation_z_refuse_change ON reconciliation;

DROP TRIGGER reconciliation_z_refuse_truncate ON reconciliation;

DROP TRIGGER reconciliation_difference_z_refuse_change ON reconciliation_difference;

DROP TRIGGER reconciliation_difference_z_refuse_truncate ON reconciliation_difference;

DROP TRIGGER orders_m_send_rerouted ON orders;

DROP TRIGGER orders_m_prove_end ON orders;

DROP TRIGGER order_broker_id_m_prove ON order_broker_id;

DROP TRIGGER orders_m_check_ids ON orders;

ALTER TABLE strategy_run
    DROP CONSTRAINT strategy_run_pnl_method_known,
    DROP CONSTRAINT strategy_run_cash_not_negative_in_cash_account;

ALTER TABLE orders
    DROP CONSTRAINT orders_to_account,
    DROP CONSTRAINT orders_account_unless_paper,
    DROP CONSTRAINT orders_purpose_known;

ALTER TABLE execution
    DROP CONSTRAINT execution_quantity_positive;

ALTER TABLE event_ledger
    DROP CONSTRAINT event_ledger_logical_time_in_range;

ALTER TABLE risk_limit
    DROP CONSTRAINT risk_limit_of_account,
    DROP CONSTRAINT risk_limit_kind_known,
    DROP CONSTRAINT risk_limit_has_what_its_kind_needs,
    DROP CONSTRAINT risk_limit_window_in_range,
    DROP CONSTRAINT risk_limit_days_in_range;

DROP INDEX orders_id_once_at_brokers;

DROP INDEX orders_open_bucket_idx;

DROP INDEX execution_reversed_once;

DROP INDEX event_ledger_books_idx;

DROP INDEX orders_recent_idx;

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

-- What a run was made of is fixed; what its strategy works with is so from the first event on,
-- which tells it.
CREATE OR REPLACE FUNCTION strategy_run_check_terms(was strategy_run, now_is strategy_run) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF (now_is.user_id, now_is.run_id, now_is.initial_cash, now_is.broker, now_is.account_type,
        now_is.currency, now_is.calendar)
       IS DISTINCT FROM
       (was.user_id, was.run_id, was.initial_cash, was.broker, was.account_type,
        was.currency, was.calendar)
       OR (now_is.strategy, now_is.parameters, now_is.paper, now_is.created_at)
          IS DISTINCT FROM (was.strategy, was.parameters, was.paper, was.created_at)
          AND EXISTS (SELECT FROM event_ledger
                      WHERE user_id = was.user_id AND run_id = was.run_id) THEN
        RAISE EXCEPTION 'run % keeps what it was made of: its identity, cash, broker, account, '
            'currency, calendar, strategy and settings', was.run_id
            USING ERRCODE = '23T09', CONSTRAINT = 'strategy_run_terms_fixed',
                  TABLE = 'strategy_run', HINT = 'Make a new run instead.';
    END IF;
END $$;

-- A run that leaves RUNNING takes its open paper orders with it, whoever ends it: the orders are
-- cancelled and the events written while the run still counts as RUNNING, in the same statement.
CREATE OR REPLACE FUNCTION strategy_run_check_move() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM run_transition
                   WHERE from_status = OLD.status AND to_status = NEW.status) THEN
        RAISE EXCEPTION 'run % cannot go from % to %', OLD.run_id, OLD.status, NEW.status
            USING ERRCODE = '23T02', CONSTRAINT = 'strategy_run_status_transition',
                  TABLE = 'strategy_run', COLUMN = 'status',
                  HINT = 'run_transition lists the allowed moves; an ended run stays ended.';
    END IF;
    PERFORM strategy_run_refuse_second_running(NEW.user_id, NEW.run_id, NEW.status);
    IF OLD.status = 'RUNNING' THEN
        UPDATE orders SET status = 'CANCELED', status_reason = 'RUN_' || NEW.status
        WHERE user_id = OLD.user_id AND run_id = OLD.run_id AND broker = 'paper'
          AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED');
    END IF;
    IF OLD.status IN ('RUNNING', 'STOPPING') THEN
        INSERT INTO event_ledger (user_id, run_id, event_type, payload)
        VALUES (OLD.user_id, OLD.run_id, 'RUN_' || NEW.status,
                jsonb_build_object('cash', OLD.cash));
    END IF;
    IF NEW.status IN ('STOPPED', 'ERROR') THEN
        NEW.stopped_at := now();
    END IF;
    RETURN NEW;
END $$;

-- Words as people type them become the stored words; 90_risk.sql decides afterwards.
CREATE OR REPLACE FUNCTION orders_prepare_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run strategy_run;
BEGIN
    run := run_lock(NEW.user_id, NEW.run_id, 'orders', 'RUNNING');
    NEW.broker := run.broker;
    NEW.symbol := upper(btrim(NEW.symbol));
    NEW.side := upper(btrim(NEW.side));
    NEW.order_type := upper(btrim(NEW.order_type));
    NEW.time_in_force := upper(btrim(NEW.time_in_force));
    IF NEW.order_type IN ('MOC', 'LOC') THEN
        NEW.time_in_force := 'CLS';
    END IF;
    NEW.order_type := CASE WHEN NEW.order_type IN ('MKT', 'MOC') THEN 'MARKET'
                           WHEN NEW.order_type IN ('LMT', 'LOC') THEN 'LIMIT'
                           WHEN NEW.order_type = 'STP' THEN 'STOP'
                           WHEN NEW.order_type = 'STP_LMT' THEN 'STOP_LIMIT'
                           ELSE NEW.order_type END;
    IF NEW.logical_time IS NULL THEN
        NEW.logical_time := run_last_time(NEW.user_id, NEW.run_id);
    END IF;
    NEW.status_at := NEW.logical_time;
    NEW.recorded_at := now();
    IF NEW.status NOT IN ('NEW', 'PENDING', 'REJECTED') THEN
        RAISE EXCEPTION 'an order can not be born %', NEW.status
            USING ERRCODE = '23T01', CONSTRAINT = 'orders_status_transition', TABLE = 'orders',
                  COLUMN = 'status', HINT = 'Insert it NEW; executions and moves do the rest.';
    ELSIF NEW.filled_quantity <> 0 OR NEW.filled_notional <> 0 THEN
        RAISE EXCEPTION 'an order''s filled quantity follows from its executions'
            USING ERRCODE = '23T04', CONSTRAINT = 'orders_filled_from_executions',
                  TABLE = 'orders', COLUMN = 'filled_quantity',
                  HINT = 'Insert executions; the database sums them.';
    END IF;
    RETURN NEW;
END $$;

-- What was asked for is fixed, what was filled is proven by the executions, whoever writes it.
-- A day's end and a trigger are noted once, a trailing stop only tightens, a reason belongs to
-- its move.
CREATE OR REPLACE FUNCTION orders_check_update() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    filled record;
BEGIN
    PERFORM run_lock(OLD.user_id, OLD.run_id, 'orders', 'RUNNING');
    -- At a real broker even a filled order may trade on: an overfill is real exposure.
    IF OLD.status IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED') AND NEW.status = OLD.status
       AND (OLD.broker = 'paper' OR NEW.filled_quantity = OLD.filled_quantity) THEN
        RAISE EXCEPTION 'order % is %, so it can not be changed', OLD.order_id, OLD.status
            USING ERRCODE = '23T09', CONSTRAINT = 'orders_closed_fixed', TABLE = 'orders',
                  HINT = 'A closed order is history; place another.';
    ELSIF NOT orders_keeps_terms(OLD, NEW) THEN
        RAISE EXCEPTION 'order % keeps what was asked for, and its reasons', OLD.order_id
            USING ERRCODE = '23T09', CONSTRAINT = 'orders_terms_fixed', TABLE = 'orders',
                  HINT = 'Cancel it and place another.';
    ELSIF (NEW.filled_quantity, NEW.filled_notional)
          IS DISTINCT FROM (OLD.filled_quantity, OLD.filled_notional) THEN
        SELECT coalesce(sum(quantity), 0) AS quantity,
               coalesce(sum(quantity * price), 0) AS notional
        INTO filled FROM execution
        WHERE user_id = OLD.user_id AND run_id = OLD.run_id AND order_id = OLD.order_id;
        IF (NEW.filled_quantity, NEW.filled_notional) <> (filled.quantity, filled.notional) THEN
            RAISE EXCEPTION 'the executions of order % fill %, not %', OLD.order_id,
                filled.quantity, NEW.filled_quantity
                USING ERRCODE = '23T04', CONSTRAINT = 'orders_filled_from_executions',
                      TABLE = 'orders', COLUMN = 'filled_quantity',
                      HINT = 'Insert executions; the database sums them.';
        END IF;
    END IF;
    RETURN NEW;
END $$;

CREATE OR REPLACE FUNCTION orders_keeps_terms(was orders, now_is orders) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    IF (now_is.user_id, now_is.run_id, now_is.order_id, now_is.client_order_id, now_is.broker,
        now_is.symbol, now_is.side, now_is.order_type, now_is.time_in_force, now_is.trail_percent,
        now_is.logical_time, now_is.recorded_at)
       IS DISTINCT FROM
       (was.user_id, was.run_id, was.order_id, was.client_order_id, was.broker,
        was.symbol, was.side, was.order_type, was.time_in_force, was.trail_percent,
        was.logical_time, was.recorded_at)
       OR now_is.expire_at IS DISTINCT FROM was.expire_at AND was.expire_at IS NOT NULL
       OR now_is.triggered_at IS DISTINCT FROM was.triggered_at AND was.triggered_at IS NOT NULL
       OR now_is.status = was.status
          AND (now_is.status_at, now_is.status_reason, now_is.reject_source, now_is.reject_code)
              IS DISTINCT FROM
              (was.status_at, was.status_reason, was.reject_source, was.reject_code) THEN
        RETURN false;
    END IF;
    RETURN (now_is.quantity, now_is.limit_price, now_is.trail_amount, now_is.reference_price)
           IS NOT DISTINCT FROM
           (was.quantity, was.limit_price, was.trail_amount, was.reference_price)
           AND (now_is.stop_price IS NOT DISTINCT FROM was.stop_price
                OR orders_stop_tightens(was, now_is.stop_price))
        OR orders_follows_split(was, now_is);
END $$;

-- What a paper order may not do although the table of moves, which is for every broker, allows it:
-- come back from its end. Our own book has no late messages.
CREATE OR REPLACE FUNCTION orders_check_move() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM order_transition
                   WHERE from_status = OLD.status AND to_status = NEW.status)
       OR (NEW.broker = 'paper' AND OLD.status IN ('CANCELED', 'EXPIRED', 'REJECTED')) THEN
        RAISE EXCEPTION 'order % cannot go from % to %', OLD.order_id, OLD.status, NEW.status
            USING ERRCODE = '23T01', CONSTRAINT = 'orders_status_transition', TABLE = 'orders',
                  COLUMN = 'status', HINT = 'order_transition lists the allowed moves.';
    END IF;
    -- A rejection that a fill has disproved is in the ledger, no longer on the order.
    IF OLD.status = 'REJECTED' THEN
        NEW.reject_source := NULL;
        NEW.reject_code := NULL;
    END IF;
    -- A fill moves an order at the time of its event, anything else at the time that it says.
    IF NEW.status_at = OLD.status_at OR NEW.filled_quantity <> OLD.filled_quantity THEN
        NEW.status_at := greatest(OLD.status_at, run_last_time(NEW.user_id, NEW.run_id));
    END IF;
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
    PERFORM execution_check_money(NEW, run.currency);
    RETURN NEW;
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

CREATE OR REPLACE FUNCTION event_ledger_append() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    head     record;
    next_seq bigint;
    expected bytea;
BEGIN
    PERFORM run_lock(NEW.user_id, NEW.run_id, 'event_ledger', 'RUNNING',
                     -- How a run that was asked to stop ended is all that it still tells.
                     CASE WHEN NEW.event_type IN ('RUN_STOPPED', 'RUN_ERROR') THEN 'STOPPING'
                          ELSE 'RUNNING' END);
    SELECT seq, logical_time, hash INTO head FROM event_ledger
    WHERE user_id = NEW.user_id AND run_id = NEW.run_id ORDER BY seq DESC LIMIT 1;
    next_seq := coalesce(head.seq, 0) + 1;
    NEW.logical_time := coalesce(NEW.logical_time, head.logical_time, now());
    NEW.recorded_at := now();
    IF NEW.logical_time < head.logical_time THEN
        RAISE EXCEPTION 'run % already stands at %, after %', NEW.run_id, head.logical_time,
            NEW.logical_time
            USING ERRCODE = '23T07', CONSTRAINT = 'event_ledger_time_moves_forward',
                  TABLE = 'event_ledger', COLUMN = 'logical_time',
                  HINT = 'A run only moves forward; use a later logical_time.';
    ELSIF coalesce(NEW.seq, next_seq) <> next_seq THEN
        RAISE EXCEPTION 'the next event of run % is number %, not %', NEW.run_id, next_seq, NEW.seq
            USING ERRCODE = '23T06', CONSTRAINT = 'event_ledger_seq_without_gap',
                  TABLE = 'event_ledger', COLUMN = 'seq',
                  HINT = 'Leave seq out; the database numbers events.';
    END IF;
    NEW.seq := next_seq;
    expected := event_hash(coalesce(head.hash, ''), NEW.user_id, NEW.run_id, NEW.seq,
                           NEW.logical_time, NEW.event_type, NEW.subject, NEW.payload,
                           NEW.recorded_at);
    IF coalesce(NEW.hash, expected) <> expected THEN
        RAISE EXCEPTION 'event % of run % does not follow from the one before it', NEW.seq,
            NEW.run_id
            USING ERRCODE = '23T06', CONSTRAINT = 'event_ledger_hash_chain',
                  TABLE = 'event_ledger', COLUMN = 'hash',
                  HINT = 'Leave hash out; the database chains events.';
    END IF;
    NEW.hash := expected;
    IF NEW.logical_time = head.logical_time AND EXISTS (
        SELECT FROM event_ledger
        WHERE user_id = NEW.user_id AND run_id = NEW.run_id AND logical_time = NEW.logical_time
          AND event_type = NEW.event_type AND subject = NEW.subject) THEN
        RAISE EXCEPTION 'run % already has a % at % %', NEW.run_id, NEW.event_type,
            NEW.logical_time, NEW.subject
            USING ERRCODE = 'unique_violation',
                  CONSTRAINT = 'event_ledger_once_per_logical_time', TABLE = 'event_ledger',
                  HINT = 'It has happened already; nothing needs to be written.';
    END IF;
    RETURN NEW;
END $$;

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

-- Moves by a fill are told by the execution's own event.
CREATE OR REPLACE FUNCTION orders_record_move() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
    SELECT n.user_id, n.run_id, n.status_at, 'ORDER_' || n.status, n.order_id,
           jsonb_strip_nulls(jsonb_build_object(
               'from', o.status, 'reject_source', n.reject_source, 'reject_code', n.reject_code,
               'status_reason', n.status_reason))
    FROM new_rows n
    JOIN old_rows o ON o.user_id = n.user_id AND o.run_id = n.run_id AND o.order_id = n.order_id
    WHERE n.status <> o.status AND n.filled_quantity = o.filled_quantity
    ORDER BY n.order_id;
    RETURN NULL;
END $$;

-- The books follow the ledger: cash and positions take up the EXECUTION and SPLIT_APPLIED events
-- after strategy_run.books_seq, and nothing else ever changes them. Their tables' triggers prove it
-- with the functions below, whoever writes; who leaves a number NULL gets the proven one.

CREATE OR REPLACE FUNCTION event_cash_flow(event_type text, payload jsonb) RETURNS numeric
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN event_type = 'EXECUTION'
            THEN execution_cash_flow(payload ->> 'side', (payload ->> 'quantity')::numeric,
                                     (payload ->> 'price')::numeric,
                                     (payload ->> 'commission')::numeric)
            ELSE 0 END;

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

-- A limit is removed and made again, not moved to somebody else; an ended run takes no more.
CREATE OR REPLACE FUNCTION risk_limit_guard_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF NEW.run_id IS NOT NULL THEN
        PERFORM run_lock(NEW.user_id, NEW.run_id, 'risk_limit', 'CREATED', 'RUNNING', 'STOPPING');
    END IF;
    IF TG_OP = 'INSERT' THEN
        NEW.created_at := now();
        NEW.symbol := upper(btrim(NEW.symbol));
    ELSE
        PERFORM row_check_keeps_run(OLD.user_id, OLD.run_id, NEW.user_id, NEW.run_id, 'risk_limit');
    END IF;
    RETURN NEW;
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

-- Positions as the ledger alone tells them, symbol by symbol, event by event.
CREATE OR REPLACE FUNCTION position_from_ledger(of_user uuid, of_run uuid)
RETURNS TABLE (symbol text, quantity numeric, cost_basis numeric, realized_pnl numeric)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    event event_ledger;
    p     public.position;
BEGIN
    FOR event IN SELECT * FROM event_ledger l
                 WHERE l.user_id = of_user AND l.run_id = of_run
                   AND l.event_type IN ('EXECUTION', 'SPLIT_APPLIED')
                 ORDER BY l.payload ->> 'symbol', l.seq
    LOOP
        IF p.symbol <> event.payload ->> 'symbol' THEN
            RETURN QUERY SELECT p.symbol, p.quantity, p.cost_basis, p.realized_pnl;
            p := NULL;
        END IF;
        p := position_after_event(p, event);
    END LOOP;
    -- A split of what was never held makes no position.
    RETURN QUERY SELECT p.symbol, p.quantity, p.cost_basis, p.realized_pnl
                 WHERE p.symbol IS NOT NULL;
END $$;

-- Named one by one, since other people's tables may be in the schema too.
CREATE OR REPLACE FUNCTION our_relations() RETURNS text[]
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT ARRAY[
        'app_user', 'calendar_session', 'corporate_action', 'engine_state', 'engine_status',
        'event_ledger', 'execution', 'instrument', 'mtm_ledger', 'order_status',
        'order_transition', 'orders', 'position', 'price_bar', 'risk_limit', 'run_status',
        'run_transition', 'sip_plan', 'split_applied', 'strategy_run',
        'paper_order', 'paper_trade', 'paper_position', 'paper_equity_curve',
        'audit_cash', 'audit_chain', 'audit_duplicate', 'audit_event', 'audit_guard',
        'audit_mark', 'audit_order', 'audit_orphan', 'audit_position', 'audit_running']
        -- Not there in a database that was built from sql/.
        || CASE WHEN to_regclass('public.alembic_version') IS NULL THEN '{}'
                ELSE '{alembic_version}'::text[] END
$$;

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

DROP AGGREGATE numeric_product(factor numeric);

DROP FUNCTION run_rebuild_books;

DROP FUNCTION run_rebuild;

DROP FUNCTION positions_from_ledger;

DROP FUNCTION orders_from_ledger;

DROP FUNCTION order_after_event;

DROP FUNCTION health_positions;

DROP FUNCTION account_status;

DROP FUNCTION latency_since;

DROP FUNCTION broker_event_is_booked;

DROP FUNCTION reconcile_analyze;

DROP FUNCTION orders_check_ids;

DROP FUNCTION order_id_is_said;

DROP FUNCTION order_broker_id_prove;

DROP FUNCTION order_broker_id_is_said;

DROP FUNCTION orders_prove_end;

DROP FUNCTION order_at_broker_since;

DROP FUNCTION order_end_is_said;

DROP FUNCTION broker_event_ends_order;

DROP FUNCTION snapshots_whole;

DROP FUNCTION orders_send_rerouted;

DROP FUNCTION orders_send_refused;

DROP FUNCTION orders_to_reroute;

DROP FUNCTION account_is_up;

DROP FUNCTION orders_stale;

DROP FUNCTION reconcile_cash;

DROP FUNCTION reconcile_positions;

DROP FUNCTION account_told;

DROP FUNCTION account_executions;

DROP FUNCTION reconcile_executions;

DROP FUNCTION reconcile_contracts;

DROP FUNCTION orders_derived;

DROP FUNCTION reconcile_strangers;

DROP FUNCTION account_run;

DROP FUNCTION reconcile_commands;

DROP FUNCTION reconcile_working;

DROP FUNCTION order_compare;

DROP FUNCTION order_asked_for;

DROP FUNCTION order_compare_status;

DROP FUNCTION order_is_alike;

DROP FUNCTION order_has_terms;

DROP FUNCTION order_status_at_broker;

DROP FUNCTION reconcile_missing;

DROP FUNCTION order_difference_ours;

DROP FUNCTION command_is_settled;

DROP FUNCTION snapshot_overtaken;

DROP FUNCTION executions_unheard;

DROP FUNCTION snapshot_terms;

DROP FUNCTION snapshot_closed;

DROP FUNCTION snapshot_orders;

DROP FUNCTION snapshot_facts;

DROP FUNCTION snapshot_newest;

DROP FUNCTION inflight_breaches;

DROP FUNCTION orders_gate;

DROP FUNCTION orders_refusal;

DROP FUNCTION user_is_limited;

DROP FUNCTION orders_broken_limit;

DROP FUNCTION orders_only_shrinks;

DROP FUNCTION orders_breaks_rule;

DROP FUNCTION orders_measure_order;

DROP FUNCTION orders_measure_books;

DROP FUNCTION run_exposure;

DROP FUNCTION orders_hours_code;

DROP FUNCTION orders_would_wash;

DROP FUNCTION orders_measure_flow;

DROP FUNCTION orders_in_scope;

DROP FUNCTION orders_recent;

DROP FUNCTION orders_market_price;

DROP FUNCTION orders_moment;

DROP FUNCTION flatten_positions;

DROP FUNCTION breakers_tripped;

DROP FUNCTION account_latency;

DROP FUNCTION breaker_setting;

DROP FUNCTION run_equity_peak;

DROP FUNCTION run_equity_before;

DROP FUNCTION system_halt_lift;

DROP FUNCTION system_halt_place;

DROP FUNCTION halt_lift;

DROP FUNCTION halt_enforce;

DROP FUNCTION halt_place;

DROP FUNCTION halt_cancel_orders;

DROP FUNCTION halt_lock_runs;

DROP FUNCTION orders_halted;

DROP FUNCTION trading_halt_guard_write;

DROP FUNCTION boundary_refuse_delete;

DROP FUNCTION broker_event_check_update;

DROP FUNCTION broker_command_check_update;

DROP FUNCTION connector_alert;

DROP FUNCTION commands_done;

DROP FUNCTION commands_throttled;

DROP FUNCTION commands_doubt;

DROP FUNCTION commands_claim;

DROP FUNCTION command_is_due;

DROP FUNCTION lease_release;

DROP FUNCTION lease_renew;

DROP FUNCTION lease_take;

DROP FUNCTION lease_refuse;

DROP FUNCTION orders_ask_back;

DROP FUNCTION orders_record_terms;

DROP FUNCTION order_modify_refusal;

DROP FUNCTION order_modify;

DROP FUNCTION order_cancel;

DROP FUNCTION broker_command_move_order;

DROP FUNCTION broker_command_never_arrived;

DROP FUNCTION broker_event_shows_order;

DROP FUNCTION broker_command_prove;

DROP FUNCTION broker_command_is_true;

DROP FUNCTION orders_may_reroute;

DROP FUNCTION orders_may_change_unsent;

DROP FUNCTION orders_follows_command;

DROP FUNCTION orders_send_terms;

DROP FUNCTION orders_send_move;

DROP FUNCTION orders_send;

DROP FUNCTION orders_not_before;

DROP FUNCTION orders_meet_hours;

DROP FUNCTION account_hours;

DROP FUNCTION broker_event_is_of_order;

DROP FUNCTION order_of_broker;

DROP FUNCTION orders_command_payload;

DROP FUNCTION run_session_date;

DROP FUNCTION position_lots;

DROP FUNCTION pnl_matches;

DROP FUNCTION pnl_steps;

DROP FUNCTION position_after_news;

DROP FUNCTION position_after_told;

DROP FUNCTION ledger_standing;

DROP FUNCTION orders_event_subject;

DROP FUNCTION execution_commission_apply;

DROP FUNCTION execution_commission_payload;

DROP FUNCTION execution_commission_prepare_insert;

DROP FUNCTION execution_commission_is_said;

DROP FUNCTION execution_is_newer;

DROP FUNCTION execution_check_broker;

DROP FUNCTION execution_said_by_broker;

DROP FUNCTION open_orders_sum;

DROP FUNCTION orders_forget_sums;

DROP FUNCTION open_order_sum_check_write;

DROP FUNCTION open_orders_read;

DROP FUNCTION order_bucket;

DROP FUNCTION orders_account;

DROP FUNCTION run_route_check_write;

DROP FUNCTION fx_rate_at;

DROP TABLE reconciliation_difference;

DROP TABLE reconciliation;

DROP TABLE limit_kind;

DROP TABLE flatten_request;

DROP TABLE circuit_breaker;

DROP TABLE breaker_kind;

DROP TABLE equity_peak;

DROP TABLE trading_halt;

DROP TABLE system_halt;

DROP TABLE alert;

DROP TABLE order_broker_id;

DROP TABLE broker_event;

DROP TABLE broker_command;

DROP TABLE command_kind;

DROP TABLE broker_lease;

DROP TABLE execution_commission;

DROP TABLE open_order_sum;

DROP TABLE run_route;

DROP TABLE fx_rate;

DROP TABLE broker_account;

DROP TYPE snapshot_order;

DROP TYPE order_difference;

ALTER TABLE strategy_run
    DROP COLUMN pnl_method;

ALTER TABLE orders
    DROP COLUMN account,
    DROP COLUMN version,
    DROP COLUMN purpose,
    DROP COLUMN recovered,
    DROP COLUMN pending_reconcile,
    DROP COLUMN broker_order_id,
    DROP COLUMN perm_id;

ALTER TABLE execution
    DROP COLUMN reverses;

ALTER TABLE risk_limit
    DROP COLUMN account,
    DROP COLUMN seconds,
    DROP COLUMN valid_from,
    DROP COLUMN valid_to;

ALTER TABLE strategy_run
    ADD CONSTRAINT strategy_run_cash_not_negative_in_cash_account
        CHECK (cash >= 0 OR account_type <> 'CASH' OR initial_cash < 0);

COMMENT ON COLUMN strategy_run.books_seq IS
    'Number of the last EXECUTION or SPLIT_APPLIED event that cash and positions follow.';

COMMENT ON FUNCTION orders_keeps_terms IS
    'Whether an update leaves alone what was asked for, or restates it for a split.';

ALTER TABLE execution
    ADD CONSTRAINT execution_quantity_positive
        CHECK (quantity > 0 AND amount_in_range(quantity));

ALTER TABLE event_ledger
    ADD CONSTRAINT event_ledger_logical_time_in_range CHECK (time_in_range(logical_time));

-- What positions and cash follow: the few events after books_seq, or all of a run in an audit.
CREATE INDEX event_ledger_books_idx ON event_ledger (user_id, run_id, seq)
    WHERE event_type IN ('EXECUTION', 'SPLIT_APPLIED');

COMMENT ON FUNCTION event_refuse IS
    'Raises what is wrong with an event: SEQ, HASH, TIME, words of the gate, or no row behind it.';

ALTER TABLE risk_limit
    ADD CONSTRAINT risk_limit_kind_known CHECK (kind IN (
        'MAX_POSITION', 'MAX_ORDER_QUANTITY', 'MAX_ORDER_NOTIONAL',
        'FORBIDDEN_SYMBOL', 'ALLOWED_SYMBOL')),
    ADD CONSTRAINT risk_limit_has_what_its_kind_needs CHECK (
        CASE WHEN kind IN ('FORBIDDEN_SYMBOL', 'ALLOWED_SYMBOL')
        THEN symbol IS NOT NULL AND limit_value IS NULL
        ELSE limit_value >= 0 AND limit_value < 1e20 AND limit_value IS NOT NULL END);

COMMENT ON TABLE risk_limit IS 'Limits that every order of a user, or of one run, must meet.';

COMMENT ON COLUMN risk_limit.limit_value IS
    'Units (MAX_POSITION, MAX_ORDER_QUANTITY) or currency (MAX_ORDER_NOTIONAL).';

-- The first limit that an order breaks, with the limit and the value, or no row.
CREATE FUNCTION orders_broken_limit(o orders, price numeric, exposure numeric)
RETURNS TABLE (code text, limit_value numeric, value numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    WITH here AS (
        SELECT l.kind, l.symbol, l.limit_value FROM risk_limit l
        WHERE l.user_id = o.user_id AND (l.run_id IS NULL OR l.run_id = o.run_id)
    ), broken AS (
        SELECT 'FORBIDDEN_SYMBOL' AS code, NULL::numeric AS limit_value, NULL::numeric AS value
        FROM here h WHERE h.kind = 'FORBIDDEN_SYMBOL' AND h.symbol = o.symbol
        UNION ALL
        SELECT 'SYMBOL_NOT_ALLOWED', NULL, NULL
        FROM here h WHERE h.kind = 'ALLOWED_SYMBOL'
        HAVING count(*) > 0 AND NOT bool_or(h.symbol = o.symbol)
        UNION ALL
        SELECT h.kind, h.limit_value, v.value
        FROM here h
        CROSS JOIN (SELECT exposure + CASE WHEN o.side = 'BUY' THEN o.quantity
                                           ELSE -o.quantity END AS position) a
        CROSS JOIN LATERAL (SELECT CASE
            WHEN h.kind = 'MAX_ORDER_QUANTITY' THEN o.quantity
            WHEN h.kind = 'MAX_ORDER_NOTIONAL' THEN o.quantity * abs(price)
            WHEN h.kind = 'MAX_POSITION' THEN abs(a.position) END AS value) v
        WHERE h.kind IN ('MAX_ORDER_QUANTITY', 'MAX_ORDER_NOTIONAL', 'MAX_POSITION')
          AND (h.symbol IS NULL OR h.symbol = o.symbol)
          -- What can't be valued can't be shown to be within a limit.
          AND (v.value > h.limit_value OR v.value IS NULL)
          -- Out of a position that is too large one may always get, but not out at the other side.
          AND (h.kind <> 'MAX_POSITION' OR v.value > abs(exposure) OR a.position * exposure < 0)
    )
    SELECT b.code, b.limit_value, b.value FROM broken b ORDER BY b.code, b.limit_value LIMIT 1
$$;

COMMENT ON FUNCTION orders_broken_limit IS 'The first risk_limit that an order breaks, or no row.';

-- The gate: why an order may not be taken, given the cash and the holding that it meets.
CREATE FUNCTION orders_gate(o orders, account_type text, limited boolean, free_cash numeric,
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

COMMENT ON FUNCTION orders_gate IS
    'Why an order is refused, or NULLs: limited is whether its user has limits, free_cash what '
    'open orders leave, exposure the holding and open orders of its side.';

CREATE TRIGGER orders_b_pass_gate BEFORE INSERT ON orders
    FOR EACH ROW WHEN (NEW.status <> ALL ('{REJECTED,FILLED}'))
    EXECUTE FUNCTION orders_pass_gate();

COMMENT ON FUNCTION ledger_analyze IS
    'Gives the planner its first statistics of the tables that grow with every tick.';

-- The audit: views that must return no rows. Each finding names the user, the run, what it is
-- about and what is wrong. They read history only, take no locks and change nothing.

CREATE VIEW audit_orphan AS
    SELECT c.user_id, c.run_id, c.subject, 'belongs to no run' AS finding
    FROM (
        SELECT user_id, run_id, 'engine_state' AS subject FROM engine_state
        UNION ALL SELECT user_id, run_id, 'engine_status' FROM engine_status
        UNION ALL SELECT user_id, run_id, 'orders ' || order_id FROM orders
        UNION ALL SELECT user_id, run_id, 'execution ' || execution_id FROM execution
        UNION ALL SELECT user_id, run_id, 'position ' || symbol FROM position
        UNION ALL SELECT user_id, run_id, 'mtm_ledger ' || logical_time FROM mtm_ledger
        UNION ALL SELECT user_id, run_id, 'event_ledger ' || seq FROM event_ledger
        UNION ALL SELECT user_id, run_id, 'sip_plan ' || plan FROM sip_plan
        UNION ALL SELECT user_id, run_id, 'split_applied ' || symbol FROM split_applied
        UNION ALL SELECT user_id, run_id, 'risk_limit ' || limit_id FROM risk_limit
                  WHERE run_id IS NOT NULL) c
    LEFT JOIN strategy_run r ON r.user_id = c.user_id AND r.run_id = c.run_id
    WHERE r.run_id IS NULL;

COMMENT ON VIEW audit_orphan IS 'Rows that belong to no run.';

CREATE VIEW audit_order AS
    SELECT o.user_id, o.run_id, 'order ' || o.order_id AS subject,
           format('says %s filled for %s, its executions say %s for %s', o.filled_quantity,
                  o.filled_notional, coalesce(e.quantity, 0), coalesce(e.notional, 0)) AS finding
    FROM orders o
    LEFT JOIN (SELECT user_id, run_id, order_id, sum(quantity) AS quantity,
                      sum(quantity * price) AS notional
               FROM execution GROUP BY user_id, run_id, order_id) e
        ON e.user_id = o.user_id AND e.run_id = o.run_id AND e.order_id = o.order_id
    WHERE (o.filled_quantity, o.filled_notional)
          <> (coalesce(e.quantity, 0), coalesce(e.notional, 0))
    UNION ALL
    SELECT user_id, run_id, 'order ' || order_id,
           format('is %s with %s of %s filled', status, filled_quantity, quantity)
    FROM orders
    WHERE CASE WHEN status = 'FILLED' THEN filled_quantity < quantity
               WHEN status = 'PARTIALLY_FILLED'
               THEN filled_quantity <= 0 OR filled_quantity >= quantity
               WHEN status IN ('NEW', 'PENDING', 'PENDING_SUBMIT', 'ROUTED', 'REJECTED')
               THEN filled_quantity <> 0
               ELSE filled_quantity >= quantity END
    UNION ALL
    SELECT e.user_id, e.run_id, 'execution ' || e.execution_id,
           format('is %s %s, its order %s %s', e.side, e.symbol, o.side, o.symbol)
    FROM execution e
    JOIN orders o ON o.user_id = e.user_id AND o.run_id = e.run_id AND o.order_id = e.order_id
    WHERE (e.side, e.symbol) <> (o.side, o.symbol)
    UNION ALL
    SELECT o.user_id, o.run_id, 'order ' || o.order_id,
           format('is %s in a run that is %s', o.status, r.status)
    FROM orders o
    JOIN strategy_run r ON r.user_id = o.user_id AND r.run_id = o.run_id
    WHERE r.status IN ('STOPPED', 'ERROR') AND o.broker = 'paper'
      AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED');

COMMENT ON VIEW audit_order IS 'Orders that contradict their executions or their run.';

CREATE VIEW audit_cash AS
    SELECT r.user_id, r.run_id, 'cash' AS subject,
           format('is %s, the executions make it %s', r.cash,
                  r.initial_cash + coalesce(e.flow, 0)) AS finding
    FROM strategy_run r
    LEFT JOIN (SELECT user_id, run_id,
                      sum(execution_cash_flow(side, quantity, price, commission)) AS flow
               FROM execution GROUP BY user_id, run_id) e
        ON e.user_id = r.user_id AND e.run_id = r.run_id
    WHERE r.cash <> r.initial_cash + coalesce(e.flow, 0)
    UNION ALL
    SELECT user_id, run_id, 'cash', format('is %s in a cash account', cash)
    FROM strategy_run WHERE account_type = 'CASH' AND cash < 0
    UNION ALL
    SELECT r.user_id, r.run_id, 'books_seq',
           format('is %s, the last event that the books follow is %s', r.books_seq,
                  coalesce(l.seq, 0))
    FROM strategy_run r
    LEFT JOIN (SELECT user_id, run_id, max(seq) AS seq FROM event_ledger
               WHERE event_type IN ('EXECUTION', 'SPLIT_APPLIED') GROUP BY user_id, run_id) l
        ON l.user_id = r.user_id AND l.run_id = r.run_id
    WHERE r.books_seq <> coalesce(l.seq, 0);

COMMENT ON VIEW audit_cash IS 'Runs whose cash is not their initial cash and their executions.';

CREATE VIEW audit_mark AS
    SELECT user_id, run_id, 'mtm_ledger ' || logical_time AS subject,
           format('equity %s is not cash %s + market value %s', equity, cash, market_value)
               AS finding
    FROM mtm_ledger WHERE equity <> cash + market_value
    UNION ALL
    SELECT t.user_id, t.run_id, 'event_ledger TICK ' || t.logical_time,
           format('says equity %s, the mark says %s', t.payload ->> 'equity', m.equity)
    FROM event_ledger t
    LEFT JOIN mtm_ledger m ON m.user_id = t.user_id AND m.run_id = t.run_id
                          AND m.logical_time = t.logical_time
    WHERE t.event_type = 'TICK' AND t.payload ?| ARRAY['cash', 'market_value', 'equity']
      AND (m.cash, m.market_value, m.equity) IS DISTINCT FROM
          ((t.payload ->> 'cash')::numeric, (t.payload ->> 'market_value')::numeric,
           (t.payload ->> 'equity')::numeric)
    UNION ALL
    SELECT c.user_id, c.run_id, 'event_ledger TICK ' || c.logical_time,
           format('says cash %s, the executions before it make it %s', c.payload ->> 'cash', c.cash)
    FROM (
        SELECT l.user_id, l.run_id, l.logical_time, l.event_type, l.payload,
               r.initial_cash + sum(event_cash_flow(l.event_type, l.payload))
                   OVER (PARTITION BY l.user_id, l.run_id ORDER BY l.seq) AS cash
        FROM event_ledger l
        JOIN strategy_run r ON r.user_id = l.user_id AND r.run_id = l.run_id
        WHERE l.event_type IN ('EXECUTION', 'TICK')) c
    WHERE c.event_type = 'TICK' AND (c.payload ->> 'cash')::numeric <> c.cash;

COMMENT ON VIEW audit_mark IS 'Marks and ticks that are not what the books make them.';

-- What the ledger tells of each order, from its placing or its last restatement.
CREATE VIEW audit_event AS
    SELECT o.user_id, o.run_id, 'order ' || o.order_id AS subject,
           CASE WHEN t.payload IS NULL THEN 'has no event of its placing'
                ELSE format('is not what its event tells: %s', t.payload) END AS finding
    FROM orders o
    LEFT JOIN (SELECT DISTINCT ON (user_id, run_id, event_order_id(subject))
                      user_id, run_id, event_order_id(subject) AS order_id, payload
               FROM event_ledger
               WHERE event_type IN ('ORDER_PLACED', 'ORDER_REJECTED', 'ORDER_RESTATED')
                 AND payload ? 'symbol'
               ORDER BY user_id, run_id, event_order_id(subject), seq DESC) t
        ON t.user_id = o.user_id AND t.run_id = o.run_id AND t.order_id = o.order_id
    WHERE (o.symbol, o.side, o.order_type, o.time_in_force, o.quantity, o.limit_price,
           o.trail_amount, o.trail_percent, o.client_order_id,
           CASE WHEN o.order_type <> 'TRAIL' THEN o.stop_price END)
          IS DISTINCT FROM
          (t.payload ->> 'symbol', t.payload ->> 'side', t.payload ->> 'order_type',
           t.payload ->> 'time_in_force', (t.payload ->> 'quantity')::numeric,
           (t.payload ->> 'limit_price')::numeric, (t.payload ->> 'trail_amount')::numeric,
           (t.payload ->> 'trail_percent')::numeric, t.payload ->> 'client_order_id',
           CASE WHEN o.order_type <> 'TRAIL' THEN (t.payload ->> 'stop_price')::numeric END)
    UNION ALL
    SELECT o.user_id, o.run_id, 'order ' || o.order_id,
           format('is %s since %s, which no event tells', o.status, o.status_at)
    FROM orders o
    WHERE o.status NOT IN ('NEW', 'PENDING', 'PARTIALLY_FILLED', 'FILLED')
      AND NOT EXISTS (SELECT FROM event_ledger l
                      WHERE l.user_id = o.user_id AND l.run_id = o.run_id
                        AND l.logical_time = o.status_at
                        AND l.event_type = 'ORDER_' || o.status
                        AND l.subject = o.order_id::text)
    UNION ALL
    SELECT l.user_id, l.run_id, 'event_ledger ' || l.seq,
           format('tells of an order that is %s', coalesce(o.status, 'not there'))
    FROM event_ledger l
    LEFT JOIN orders o ON o.user_id = l.user_id AND o.run_id = l.run_id
                      AND o.order_id = event_order_id(l.subject)
    WHERE l.event_type IN ('ORDER_PLACED', 'ORDER_REJECTED', 'ORDER_CANCELED', 'ORDER_EXPIRED')
      AND (o.order_id IS NULL
           OR o.broker = 'paper' AND l.event_type NOT IN ('ORDER_PLACED', 'ORDER_' || o.status))
    UNION ALL
    SELECT e.user_id, e.run_id, 'execution ' || e.execution_id,
           'has no event, or one that says otherwise'
    FROM execution e
    WHERE NOT EXISTS (SELECT FROM event_ledger l
                      WHERE l.user_id = e.user_id AND l.run_id = e.run_id
                        AND l.logical_time = e.logical_time AND l.event_type = 'EXECUTION'
                        AND l.subject = e.order_id || '/' || e.execution_id
                        AND l.payload ->> 'symbol' = e.symbol AND l.payload ->> 'side' = e.side
                        AND (l.payload ->> 'quantity')::numeric = e.quantity
                        AND (l.payload ->> 'price')::numeric = e.price
                        AND (l.payload ->> 'commission')::numeric = e.commission
                        AND l.payload ->> 'commission_currency' = e.commission_currency
                        AND (l.payload ->> 'event_at')::timestamptz = e.event_at)
    UNION ALL
    SELECT l.user_id, l.run_id, 'event_ledger ' || l.seq, 'tells of an execution that is not there'
    FROM event_ledger l
    WHERE l.event_type = 'EXECUTION'
      AND NOT EXISTS (SELECT FROM execution e
                      WHERE e.user_id = l.user_id AND e.run_id = l.run_id
                        AND e.execution_id = substr(l.subject, 38))
    UNION ALL
    SELECT coalesce(s.user_id, l.user_id), coalesce(s.run_id, l.run_id),
           coalesce('split_applied ' || split_event_subject(s), 'event_ledger ' || l.seq),
           CASE WHEN l.seq IS NULL THEN 'has no event, or one that says otherwise'
                ELSE 'tells of a split that is not there' END
    FROM split_applied s
    FULL JOIN (SELECT * FROM event_ledger WHERE event_type = 'SPLIT_APPLIED') l
        ON l.user_id = s.user_id AND l.run_id = s.run_id AND l.logical_time = s.logical_time
       AND l.payload ->> 'symbol' = s.symbol AND (l.payload ->> 'ex_date')::date = s.ex_date
       AND (l.payload ->> 'quantity_before')::numeric = s.quantity_before
       AND (l.payload ->> 'quantity_after')::numeric = s.quantity_after
    WHERE s.run_id IS NULL OR l.run_id IS NULL
    UNION ALL
    SELECT s.user_id, s.run_id, 'engine_state',
           format('stands at %s, the last TICK is at %s', s.last_logical_time, t.logical_time)
    FROM engine_state s
    CROSS JOIN LATERAL (SELECT max(l.logical_time) AS logical_time FROM event_ledger l
                        WHERE l.user_id = s.user_id AND l.run_id = s.run_id
                          AND l.event_type = 'TICK') t
    WHERE s.last_logical_time IS DISTINCT FROM t.logical_time
    UNION ALL
    SELECT l.user_id, l.run_id, 'event_ledger ' || l.seq,
           format('tells of an end, the run is %s and its last event is %s', r.status, h.seq)
    FROM event_ledger l
    JOIN strategy_run r ON r.user_id = l.user_id AND r.run_id = l.run_id
    CROSS JOIN LATERAL (SELECT max(n.seq) AS seq FROM event_ledger n
                        WHERE n.user_id = l.user_id AND n.run_id = l.run_id) h
    WHERE l.event_type IN ('RUN_STOPPED', 'RUN_ERROR')
      AND (l.event_type <> 'RUN_' || r.status OR l.seq <> h.seq)
    UNION ALL
    SELECT r.user_id, r.run_id, 'strategy_run',
           format('is %s, its last event is %s', r.status, h.event_type)
    FROM strategy_run r
    CROSS JOIN LATERAL (SELECT n.event_type FROM event_ledger n
                        WHERE n.user_id = r.user_id AND n.run_id = r.run_id
                        ORDER BY n.seq DESC LIMIT 1) h
    WHERE r.status IN ('STOPPED', 'ERROR') AND h.event_type <> 'RUN_' || r.status;

COMMENT ON VIEW audit_event IS 'Rows without their event and events without their row.';

UPDATE order_status SET why = 'Sent, outcome unknown.'
WHERE status = 'PENDING_SUBMIT';

DELETE FROM order_transition WHERE from_status = 'NEW' AND to_status = 'PENDING_CANCEL';

DELETE FROM order_transition WHERE from_status = 'PENDING' AND to_status = 'PENDING_CANCEL';

DELETE FROM order_transition WHERE from_status = 'PENDING' AND to_status = 'NEW';

DELETE FROM order_transition WHERE from_status = 'PARTIALLY_FILLED' AND to_status = 'ROUTED';

DELETE FROM order_transition WHERE from_status = 'FILLED' AND to_status = 'PARTIALLY_FILLED';

DELETE FROM order_transition WHERE from_status = 'FILLED' AND to_status = 'ROUTED';

DELETE FROM order_transition WHERE from_status = 'CANCELED' AND to_status = 'ROUTED';

DELETE FROM order_transition WHERE from_status = 'EXPIRED' AND to_status = 'ROUTED';

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
