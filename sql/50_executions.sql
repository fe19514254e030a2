-- Executions: what was traded. The books follow from them: an order's filled quantity and average
-- price, the position and the cash are computed here, from the rows of one statement at a time.

CREATE TABLE execution (
    user_id             uuid        NOT NULL,
    run_id              uuid        NOT NULL,
    execution_id        text        NOT NULL DEFAULT gen_random_uuid()::text,
    order_id            uuid        NOT NULL,
    symbol              text        NOT NULL,
    side                text        NOT NULL,
    quantity            numeric     NOT NULL,
    price               numeric     NOT NULL,
    commission          numeric     NOT NULL DEFAULT 0,
    commission_currency text        NOT NULL DEFAULT 'USD',
    logical_time        timestamptz NOT NULL,
    event_at            timestamptz NOT NULL,
    recorded_at         timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT execution_pkey PRIMARY KEY (user_id, run_id, execution_id),
    CONSTRAINT execution_belongs_to_order FOREIGN KEY (user_id, run_id, order_id)
        REFERENCES orders (user_id, run_id, order_id) ON DELETE CASCADE,
    CONSTRAINT execution_quantity_positive
        CHECK (quantity > 0 AND quantity < 1e15 AND min_scale(quantity) <= 8),
    CONSTRAINT execution_price_in_range CHECK (abs(price) < 1e15 AND min_scale(price) <= 8),
    CONSTRAINT execution_commission_in_range
        CHECK (abs(commission) < 1e15 AND min_scale(commission) <= 16),
    CONSTRAINT execution_commission_currency_format CHECK (commission_currency ~ '^[A-Z]{3}$')
);

-- The executions of an order: its history, its cascade, its audit.
CREATE INDEX execution_order_idx ON execution (user_id, run_id, order_id);

COMMENT ON TABLE execution IS 'Executions (fills) of every run and broker; append-only.';
COMMENT ON COLUMN execution.execution_id IS 'The broker''s id; at the paper broker order id and number.';
COMMENT ON COLUMN execution.symbol IS 'Taken from the order.';
COMMENT ON COLUMN execution.side IS 'Taken from the order.';
COMMENT ON COLUMN execution.price IS 'In currency per unit.';
COMMENT ON COLUMN execution.commission IS 'Positive costs money; negative is a rebate.';
COMMENT ON COLUMN execution.event_at IS 'When the broker says that it happened.';

CREATE FUNCTION execution_prepare_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run strategy_run;
    o   orders;
BEGIN
    run := run_lock_running(NEW.user_id, NEW.run_id, 'execution');
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
    IF NEW.price <= 0 AND NOT EXISTS (SELECT FROM instrument
                                      WHERE symbol = NEW.symbol AND negative_price_allowed) THEN
        RAISE EXCEPTION 'a price of % is not possible for %', NEW.price, NEW.symbol
            USING ERRCODE = 'check_violation', CONSTRAINT = 'execution_price_positive',
                  TABLE = 'execution', COLUMN = 'price',
                  HINT = 'Only an instrument with negative_price_allowed trades at or below zero.';
    END IF;
    RETURN NEW;
END $$;

CREATE FUNCTION execution_apply() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    e execution;
BEGIN
    UPDATE orders o
    SET filled_quantity = o.filled_quantity + f.quantity,
        filled_notional = o.filled_notional + f.notional,
        status = CASE WHEN o.filled_quantity + f.quantity >= o.quantity THEN 'FILLED'
                      WHEN o.status IN ('PENDING_CANCEL', 'PENDING_MODIFY') THEN o.status
                      ELSE 'PARTIALLY_FILLED' END,
        status_at = greatest(o.status_at, f.logical_time)
    FROM (SELECT user_id, run_id, order_id, sum(quantity) AS quantity,
                 sum(quantity * price) AS notional, max(logical_time) AS logical_time
          FROM new_rows GROUP BY user_id, run_id, order_id) f
    WHERE o.user_id = f.user_id AND o.run_id = f.run_id AND o.order_id = f.order_id;

    FOR e IN SELECT * FROM new_rows LOOP
        PERFORM position_apply(e);
    END LOOP;

    UPDATE strategy_run r
    SET cash = r.cash + f.flow
    FROM (SELECT user_id, run_id, sum(execution_cash_flow(side, quantity, price, commission)) AS flow
          FROM new_rows GROUP BY user_id, run_id) f
    WHERE r.user_id = f.user_id AND r.run_id = f.run_id;

    INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
    SELECT user_id, run_id, logical_time, 'EXECUTION', order_id || '/' || execution_id,
           jsonb_build_object('symbol', symbol, 'side', side, 'quantity', quantity,
                              'price', price, 'commission', commission,
                              'commission_currency', commission_currency, 'event_at', event_at)
    FROM new_rows;
    RETURN NULL;
END $$;

-- What an execution does to cash, in the run's currency: a buy pays, a sale receives, both pay
-- commission.
CREATE FUNCTION execution_cash_flow(side text, quantity numeric, price numeric, commission numeric)
RETURNS numeric LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN side = 'BUY' THEN -quantity * price ELSE quantity * price END - commission
$$;

COMMENT ON FUNCTION execution_cash_flow IS 'What one execution does to cash, in currency.';

CREATE TRIGGER execution_a_prepare_insert BEFORE INSERT ON execution
    FOR EACH ROW EXECUTE FUNCTION execution_prepare_insert();
CREATE TRIGGER execution_m_apply AFTER INSERT ON execution
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION execution_apply();
CREATE TRIGGER execution_z_refuse_change BEFORE UPDATE OR DELETE ON execution
    FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION history_refuse_change('execution');
CREATE TRIGGER execution_z_refuse_truncate BEFORE TRUNCATE ON execution
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('execution');

CREATE VIEW paper_trade AS
    SELECT user_id, run_id, execution_id, order_id, symbol, side, quantity, price, commission,
           commission_currency, logical_time, event_at, recorded_at
    FROM execution e
    WHERE EXISTS (SELECT FROM strategy_run r
                  WHERE r.user_id = e.user_id AND r.run_id = e.run_id AND r.broker = 'paper')
    WITH CHECK OPTION;

COMMENT ON VIEW paper_trade IS 'The executions of paper runs.';
