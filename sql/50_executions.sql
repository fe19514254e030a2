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
    commission_currency text        NOT NULL,
    logical_time        timestamptz NOT NULL,
    event_at            timestamptz NOT NULL,
    recorded_at         timestamptz NOT NULL,
    reverses            text,
    CONSTRAINT execution_pkey PRIMARY KEY (user_id, run_id, execution_id),
    CONSTRAINT execution_belongs_to_order FOREIGN KEY (user_id, run_id, order_id)
        REFERENCES orders (user_id, run_id, order_id) ON DELETE CASCADE,
    CONSTRAINT execution_execution_id_format
        CHECK (execution_id ~ '^[[:graph:]]([[:print:]]*[[:graph:]])?$'
               AND length(execution_id) <= 128),
    CONSTRAINT execution_quantity_positive
        -- A reversal takes back what it names (a bust, or the wrong half of a correction).
        CHECK ((quantity > 0 OR reverses IS NOT NULL AND quantity < 0)
               AND amount_in_range(abs(quantity))),
    CONSTRAINT execution_price_in_range CHECK (amount_in_range(price)),
    CONSTRAINT execution_commission_in_range
        CHECK (decimal_in_range(commission, 1e15, 16)),
    CONSTRAINT execution_commission_currency_format CHECK (commission_currency ~ '^[A-Z]{3}$'),
    CONSTRAINT execution_event_at_in_range CHECK (time_in_range(event_at))
);

-- The executions of an order: its history, its cascade, its audit.
CREATE INDEX execution_order_idx ON execution (user_id, run_id, order_id);

-- This prevents an execution from being taken back twice.
CREATE UNIQUE INDEX execution_reversed_once ON execution (user_id, run_id, reverses)
    WHERE reverses IS NOT NULL;

COMMENT ON TABLE execution IS 'Executions (fills) of every run and broker; append-only.';
COMMENT ON COLUMN execution.execution_id IS
    'The broker''s id; at the paper broker order id and number.';
COMMENT ON COLUMN execution.symbol IS 'Taken from the order.';
COMMENT ON COLUMN execution.side IS 'Taken from the order.';
COMMENT ON COLUMN execution.price IS 'In currency per unit.';
COMMENT ON COLUMN execution.commission IS 'Positive costs money; negative is a rebate.';
COMMENT ON COLUMN execution.commission_currency IS 'The run''s, unless it is given.';
COMMENT ON COLUMN execution.reverses IS
    'The execution that this one takes back, with its negative quantity at its price.';
COMMENT ON COLUMN execution.event_at IS 'When the broker says that it happened.';

CREATE FUNCTION execution_prepare_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run strategy_run;
    o   orders;
BEGIN
    run := run_lock(NEW.user_id, NEW.run_id, 'execution', 'RUNNING', 'STOPPING');
    IF run.status <> 'RUNNING' AND run.broker = 'paper' THEN
        PERFORM run_lock(NEW.user_id, NEW.run_id, 'execution', 'RUNNING');
    END IF;
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
    ELSIF o.broker = 'paper' AND NEW.reverses IS NOT NULL THEN
        RAISE EXCEPTION 'execution % is on paper, where nothing is taken back', NEW.reverses
            USING ERRCODE = '23T08', CONSTRAINT = 'execution_said_by_broker', TABLE = 'execution',
                  COLUMN = 'reverses', HINT = 'Only a broker takes back what it said.';
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

COMMENT ON FUNCTION execution_prepare_insert IS
    'Trigger: only an open order trades; symbol and side are the order''s.';

-- The proof of an execution at a broker: the broker said so of this order, in the inbox, where only
-- connectors write. What it takes back it must have said too, by a bust or by a newer revision of
-- the same id. Commissions are told apart. It is asked with the execution's event (82_books.sql),
-- however row and event came.
CREATE FUNCTION execution_said_by_broker(e execution) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    o orders;
BEGIN
    SELECT * INTO o FROM orders
    WHERE user_id = e.user_id AND run_id = e.run_id AND order_id = e.order_id;
    IF e.commission <> 0 THEN
        RETURN false;
    ELSIF e.reverses IS NULL THEN
        RETURN EXISTS (
            SELECT FROM broker_event b
            WHERE b.user_id = o.user_id AND b.account = o.account
              AND b.execution_id = e.execution_id AND b.kind = 'EXECUTION'
              AND broker_event_is_of_order(b, o) AND b.payload ->> 'side' = o.side
              AND (b.payload ->> 'quantity')::numeric = e.quantity
              AND (b.payload ->> 'price')::numeric = e.price);
    END IF;
    RETURN EXISTS (
        SELECT FROM execution t
        WHERE t.user_id = e.user_id AND t.run_id = e.run_id AND t.execution_id = e.reverses
          AND t.order_id = e.order_id AND t.quantity = -e.quantity AND t.price = e.price
          AND t.reverses IS NULL)
       AND (EXISTS (SELECT FROM broker_event b
                    WHERE b.user_id = o.user_id AND b.account = o.account
                      AND b.execution_id = e.reverses AND b.kind = 'BUST')
            OR EXISTS (SELECT FROM broker_event b
                       WHERE b.user_id = o.user_id AND b.account = o.account
                         AND b.kind = 'EXECUTION' AND broker_event_is_of_order(b, o)
                         AND execution_is_newer(b.execution_id, e.reverses)));
END $$;

COMMENT ON FUNCTION execution_said_by_broker IS
    'Whether an order''s broker has reported an execution, or what a reversal takes back.';

CREATE FUNCTION execution_check_broker(e execution) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    IF NOT coalesce(execution_said_by_broker(e), false) THEN
        RAISE EXCEPTION 'no broker has said that execution % of order % happened', e.execution_id,
            e.order_id
            USING ERRCODE = '23T08', CONSTRAINT = 'execution_said_by_broker', TABLE = 'execution',
                  HINT = 'Executions at a broker come from its connector''s broker_event rows.';
    END IF;
END $$;

COMMENT ON FUNCTION execution_check_broker IS
    'Refuses an execution, or a reversal, that the order''s broker has not reported.';

-- Source: IB's execution ids; those that differ only after the last dot are revisions of one.
CREATE FUNCTION execution_is_newer(execution_id text, than text) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN regexp_replace(execution_id, '\.[^.]*$', '') = regexp_replace(than, '\.[^.]*$', '')
       AND (length(execution_id), execution_id COLLATE "C") > (length(than), than COLLATE "C");

COMMENT ON FUNCTION execution_is_newer IS
    'Whether an execution id is a later revision of the same execution as another.';

CREATE FUNCTION execution_check_money(e execution, currency text) RETURNS void
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

COMMENT ON FUNCTION execution_check_money IS
    'Refuses a price that can not be, and a commission in another currency than the run''s.';

-- What was not yet told to the ledger is told: cash and positions follow the events (82_books.sql).
-- Only the paper book tells of executions before they are there; of what a broker did nothing is
-- looked up, since a planner without statistics may read all executions of the run for each.
-- Orders follow their executions. It has the owner's rights, so that nobody else needs a right to
-- write what follows from executions.
CREATE FUNCTION execution_apply() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    untold   execution[];
    unfilled boolean;
BEGIN
    SELECT array_agg(n) FILTER (WHERE o.told IS NULL), bool_or(o.filled IS NOT TRUE)
    INTO untold, unfilled
    FROM new_rows n
    LEFT JOIN LATERAL (
        SELECT CASE WHEN o.broker = 'paper'
                    THEN (SELECT true FROM event_ledger l
                          WHERE l.user_id = n.user_id AND l.run_id = n.run_id
                            AND l.logical_time = n.logical_time AND l.event_type = 'EXECUTION'
                            AND l.subject = n.order_id || '/' || n.execution_id) END AS told,
               (o.filled_quantity, o.filled_notional)
               = (SELECT sum(e.quantity), sum(e.quantity * e.price) FROM execution e
                  WHERE e.user_id = n.user_id AND e.run_id = n.run_id
                    AND e.order_id = n.order_id) AS filled
        FROM orders o
        WHERE o.user_id = n.user_id AND o.run_id = n.run_id AND o.order_id = n.order_id
        OFFSET 0) o ON true;  -- OFFSET: each order by its key, whatever the planner knows
    -- A statement that writes nothing would cost as much as one that does.
    IF untold IS NOT NULL THEN
        INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
        SELECT e.user_id, e.run_id, e.logical_time, 'EXECUTION',
               e.order_id || '/' || e.execution_id, execution_event_payload(e)
        FROM unnest(untold) e;
    END IF;
    IF unfilled THEN
        UPDATE orders o
        SET filled_quantity = f.quantity, filled_notional = f.notional,
            status = CASE WHEN f.quantity >= o.quantity THEN 'FILLED'
                          WHEN o.status IN ('PENDING_CANCEL', 'PENDING_MODIFY') THEN o.status
                          WHEN f.quantity > 0 THEN 'PARTIALLY_FILLED'
                          -- Only a reversal gets here.
                          ELSE 'ROUTED' END
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

COMMENT ON FUNCTION execution_apply IS
    'Trigger: executions are told to the ledger and move their orders.';

CREATE FUNCTION execution_event_payload(e execution) RETURNS jsonb
LANGUAGE sql STABLE
RETURN jsonb_build_object('symbol', e.symbol, 'side', e.side, 'quantity', e.quantity,
                          'price', e.price, 'commission', e.commission,
                          'commission_currency', e.commission_currency,
                          'event_at', event_moment(e.event_at))
       || CASE WHEN e.reverses IS NULL THEN '{}'
               ELSE jsonb_build_object('reverses', e.reverses) END;

COMMENT ON FUNCTION execution_event_payload IS 'What the event of an execution says.';

-- What an execution does to cash, in the run's currency: a buy pays, a sale receives, both pay
-- commission.
CREATE FUNCTION execution_cash_flow(side text, quantity numeric, price numeric, commission numeric)
RETURNS numeric LANGUAGE sql IMMUTABLE
RETURN CASE WHEN side = 'BUY' THEN -quantity * price ELSE quantity * price END - commission;

COMMENT ON FUNCTION execution_cash_flow IS 'What one execution does to cash, in currency.';

-- A row with the time of its transaction claims to be complete: it is proven with its event.
CREATE TRIGGER execution_a_prepare_insert BEFORE INSERT ON execution
    FOR EACH ROW WHEN (NEW.recorded_at IS DISTINCT FROM now())
    EXECUTE FUNCTION execution_prepare_insert();
CREATE TRIGGER execution_m_apply AFTER INSERT ON execution
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT WHEN (current_user <> 'oms_keeper')
    EXECUTE FUNCTION execution_apply();
CREATE TRIGGER execution_z_refuse_change BEFORE UPDATE OR DELETE ON execution
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('execution', 'append_only');
CREATE TRIGGER execution_z_refuse_truncate BEFORE TRUNCATE ON execution
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('execution', 'append_only');

-- Brokers report commissions apart from executions, before or after them, in any currency.
CREATE TABLE execution_commission (
    user_id      uuid        NOT NULL,
    run_id       uuid        NOT NULL,
    execution_id text        NOT NULL,
    amount       numeric     NOT NULL,
    currency     text        NOT NULL,
    rate         numeric     NOT NULL,
    cost         numeric     NOT NULL,
    logical_time timestamptz NOT NULL,
    event_at     timestamptz NOT NULL,
    recorded_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT execution_commission_pkey PRIMARY KEY (user_id, run_id, execution_id),
    CONSTRAINT execution_commission_of_execution FOREIGN KEY (user_id, run_id, execution_id)
        REFERENCES execution (user_id, run_id, execution_id) ON DELETE CASCADE,
    CONSTRAINT execution_commission_amount_in_range CHECK (decimal_in_range(amount, 1e15, 10)),
    CONSTRAINT execution_commission_known_currency CHECK (currency ~ '^[A-Z]{3}$'),
    CONSTRAINT execution_commission_rate_positive
        CHECK (rate > 0 AND decimal_in_range(rate, 1e9, 10)),
    CONSTRAINT execution_commission_cost_follows CHECK (cost = round(amount * rate, 10)),
    CONSTRAINT execution_commission_event_at_in_range CHECK (time_in_range(event_at))
);

COMMENT ON TABLE execution_commission IS 'Commissions that brokers reported; append-only.';
COMMENT ON COLUMN execution_commission.amount IS
    'In currency; positive costs money, negative is a rebate.';
COMMENT ON COLUMN execution_commission.rate IS
    'What one unit of currency cost in the run''s at event_at; 1 if it is the run''s.';
COMMENT ON COLUMN execution_commission.cost IS
    'In the run''s currency: amount x rate, 10 decimals.';
COMMENT ON COLUMN execution_commission.event_at IS 'When the broker says that it happened.';

CREATE FUNCTION execution_commission_is_said(c execution_commission) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM execution e
        JOIN orders o ON o.user_id = e.user_id AND o.run_id = e.run_id AND o.order_id = e.order_id
        JOIN broker_event b ON b.user_id = o.user_id AND b.account = o.account
                           AND b.execution_id = e.execution_id AND b.kind = 'COMMISSION'
        WHERE e.user_id = c.user_id AND e.run_id = c.run_id AND e.execution_id = c.execution_id
          AND (b.payload ->> 'amount')::numeric = c.amount
          AND b.payload ->> 'currency' = c.currency AND b.event_at = c.event_at);
END $$;

COMMENT ON FUNCTION execution_commission_is_said IS
    'Whether an execution''s broker has reported a commission of it.';

CREATE FUNCTION execution_commission_prepare_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run strategy_run;
BEGIN
    run := run_lock(NEW.user_id, NEW.run_id, 'execution_commission', 'RUNNING', 'STOPPING');
    IF NOT coalesce(execution_commission_is_said(NEW), false) THEN
        RAISE EXCEPTION 'no broker has reported a commission of % % on execution %', NEW.amount,
            NEW.currency, NEW.execution_id
            USING ERRCODE = '23T08', CONSTRAINT = 'execution_commission_said_by_broker',
                  TABLE = 'execution_commission',
                  HINT = 'Commissions come from the connector''s broker_event rows.';
    END IF;
    NEW.rate := CASE WHEN NEW.currency = run.currency THEN 1
                     ELSE fx_rate_at(NEW.currency, run.currency, NEW.event_at) END;
    IF NEW.rate IS NULL THEN
        RAISE EXCEPTION 'there is no rate from % to % at %', NEW.currency, run.currency,
            NEW.event_at
            USING ERRCODE = 'foreign_key_violation', CONSTRAINT = 'execution_commission_has_rate',
                  TABLE = 'execution_commission', COLUMN = 'rate',
                  HINT = 'Import the rate: oms data fx FILE.';
    END IF;
    NEW.cost := round(NEW.amount * NEW.rate, 10);
    NEW.logical_time := run_last_time(NEW.user_id, NEW.run_id);
    NEW.recorded_at := now();
    RETURN NEW;
END $$;

COMMENT ON FUNCTION execution_commission_prepare_insert IS
    'Trigger: a commission is what the broker reported, at the rate of its time.';

CREATE FUNCTION execution_commission_payload(c execution_commission) RETURNS jsonb
LANGUAGE sql STABLE
RETURN jsonb_build_object('amount', c.amount, 'currency', c.currency, 'rate', c.rate,
                          'cost', c.cost, 'event_at', event_moment(c.event_at));

COMMENT ON FUNCTION execution_commission_payload IS 'What the event of a commission says.';

-- As with executions: told to the ledger, which cash follows.
CREATE FUNCTION execution_commission_apply() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
    SELECT c.user_id, c.run_id, c.logical_time, 'COMMISSION', c.execution_id,
           execution_commission_payload(c)
    FROM new_rows c;
    RETURN NULL;
END $$;

COMMENT ON FUNCTION execution_commission_apply IS 'Trigger: commissions are told to the ledger.';

CREATE TRIGGER execution_commission_a_prepare_insert BEFORE INSERT ON execution_commission
    FOR EACH ROW EXECUTE FUNCTION execution_commission_prepare_insert();
CREATE TRIGGER execution_commission_m_apply AFTER INSERT ON execution_commission
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT
    EXECUTE FUNCTION execution_commission_apply();
CREATE TRIGGER execution_commission_z_refuse_change BEFORE UPDATE OR DELETE ON execution_commission
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('execution_commission', 'append_only');
CREATE TRIGGER execution_commission_z_refuse_truncate BEFORE TRUNCATE ON execution_commission
    FOR EACH STATEMENT
    EXECUTE FUNCTION history_refuse_change('execution_commission', 'append_only');

CREATE VIEW paper_trade AS
    SELECT user_id, run_id, execution_id, order_id, symbol, side, quantity, price, commission,
           commission_currency, logical_time, event_at, recorded_at
    FROM execution e
    WHERE EXISTS (SELECT FROM strategy_run r
                  WHERE r.user_id = e.user_id AND r.run_id = e.run_id AND r.broker = 'paper')
    WITH CHECK OPTION;

COMMENT ON VIEW paper_trade IS 'The executions of paper runs.';
