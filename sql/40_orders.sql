-- Orders: what was asked for, and what became of it. One model for every broker; paper is a broker.
-- What an honest program may get wrong (a quantity, the cash, a limit) is stored as REJECTED with
-- its reason; what no honest program would send raises.

CREATE TABLE order_status (
    status  text    NOT NULL,
    is_open boolean NOT NULL,
    why     text    NOT NULL,
    CONSTRAINT order_status_pkey PRIMARY KEY (status)
);

COMMENT ON TABLE order_status IS 'The states of an order.';

INSERT INTO order_status (status, is_open, why) VALUES
    ('NEW', true, 'Committed, nothing sent.'),
    ('PENDING', true,
     'Held in our own book: resting at the paper broker, throttled, or out of session.'),
    ('PENDING_SUBMIT', true, 'The broker has it and has not confirmed it.'),
    ('ROUTED', true, 'The broker works it.'),
    ('PARTIALLY_FILLED', true, 'Something is filled, something still works.'),
    ('PENDING_CANCEL', true, 'A cancel is on its way.'),
    ('PENDING_MODIFY', true, 'A modification is on its way.'),
    ('FILLED', false, 'Filled in whole.'),
    ('CANCELED', false, 'Ended by a cancel.'),
    ('REJECTED', false, 'Refused: by validation, risk, compliance or the broker.'),
    ('EXPIRED', false, 'Ended by its time in force.');

CREATE TABLE order_transition (
    from_status text NOT NULL,
    to_status   text NOT NULL,
    why         text NOT NULL,
    CONSTRAINT order_transition_pkey PRIMARY KEY (from_status, to_status),
    CONSTRAINT order_transition_from_known
        FOREIGN KEY (from_status) REFERENCES order_status (status),
    CONSTRAINT order_transition_to_known FOREIGN KEY (to_status) REFERENCES order_status (status)
);

COMMENT ON TABLE order_transition IS
    'The moves that an order''s status may make; no other is possible.';

INSERT INTO order_transition (from_status, to_status, why) VALUES
    ('NEW', 'PENDING', 'It rests in our own book, or waits for the session or the throttle.'),
    ('NEW', 'PENDING_SUBMIT', 'It was sent.'),
    ('NEW', 'ROUTED', 'The broker took it at once.'),
    ('NEW', 'PARTIALLY_FILLED', 'First fill.'),
    ('NEW', 'FILLED', 'Filled at once.'),
    ('NEW', 'CANCELED', 'Cancelled before it was sent, or IOC and FOK that found no fill.'),
    ('NEW', 'REJECTED', 'Refused after it was stored.'),
    ('NEW', 'EXPIRED', 'Its time ran out before it was sent.'),
    ('NEW', 'PENDING_CANCEL', 'A cancel follows a submit that has no answer yet.'),
    ('PENDING', 'PENDING_SUBMIT', 'Released and sent.'),
    ('PENDING', 'ROUTED', 'Released, and the broker took it at once.'),
    ('PENDING', 'PARTIALLY_FILLED', 'First fill of a resting order.'),
    ('PENDING', 'FILLED', 'A resting order was filled in whole.'),
    ('PENDING', 'CANCELED', 'Cancelled while it rested.'),
    ('PENDING', 'REJECTED', 'The cash or a limit no longer allows it when it would fill.'),
    ('PENDING', 'EXPIRED', 'Its time in force ended.'),
    ('PENDING', 'PENDING_CANCEL', 'A cancel follows a submit that has no answer yet.'),
    ('PENDING', 'NEW', 'Released to be sent.'),
    ('PENDING_SUBMIT', 'ROUTED', 'The broker acknowledged it.'),
    ('PENDING_SUBMIT', 'PARTIALLY_FILLED', 'A fill came before the acknowledgement.'),
    ('PENDING_SUBMIT', 'FILLED', 'The fill came before the acknowledgement.'),
    ('PENDING_SUBMIT', 'CANCELED', 'The broker ended it.'),
    ('PENDING_SUBMIT', 'REJECTED', 'The broker refused it.'),
    ('PENDING_SUBMIT', 'EXPIRED', 'It expired at the broker.'),
    ('PENDING_SUBMIT', 'PENDING_CANCEL', 'A cancel follows the submit.'),
    ('PENDING_SUBMIT', 'NEW', 'It certainly never reached the broker.'),
    ('ROUTED', 'PARTIALLY_FILLED', 'First fill.'),
    ('ROUTED', 'FILLED', 'Filled in whole.'),
    ('ROUTED', 'CANCELED', 'Cancelled at the broker.'),
    ('ROUTED', 'REJECTED', 'The broker took it back.'),
    ('ROUTED', 'EXPIRED', 'It expired at the broker.'),
    ('ROUTED', 'PENDING_CANCEL', 'A cancel was sent.'),
    ('ROUTED', 'PENDING_MODIFY', 'A modification was sent.'),
    ('PARTIALLY_FILLED', 'FILLED', 'The last fill.'),
    ('PARTIALLY_FILLED', 'ROUTED', 'A bust took all fills back.'),
    ('PARTIALLY_FILLED', 'CANCELED', 'The rest was cancelled, or the cash no longer allows it.'),
    ('PARTIALLY_FILLED', 'EXPIRED', 'The rest expired.'),
    ('PARTIALLY_FILLED', 'PENDING_CANCEL', 'A cancel of the rest was sent.'),
    ('PARTIALLY_FILLED', 'PENDING_MODIFY', 'A modification of the rest was sent.'),
    ('PENDING_CANCEL', 'CANCELED', 'The cancel was confirmed.'),
    ('PENDING_CANCEL', 'PARTIALLY_FILLED',
     'A fill overtook the cancel, or the cancel was refused.'),
    ('PENDING_CANCEL', 'FILLED', 'The last fill overtook the cancel.'),
    ('PENDING_CANCEL', 'ROUTED', 'The cancel was refused.'),
    ('PENDING_CANCEL', 'REJECTED', 'The broker refused the order itself.'),
    ('PENDING_CANCEL', 'EXPIRED', 'It expired before the cancel.'),
    ('PENDING_MODIFY', 'ROUTED', 'The modification was confirmed or refused.'),
    ('PENDING_MODIFY', 'PARTIALLY_FILLED', 'A fill came meanwhile.'),
    ('PENDING_MODIFY', 'FILLED', 'The last fill came meanwhile.'),
    ('PENDING_MODIFY', 'CANCELED', 'The broker ended it meanwhile.'),
    ('PENDING_MODIFY', 'REJECTED', 'The broker refused the order itself.'),
    ('PENDING_MODIFY', 'EXPIRED', 'It expired meanwhile.'),
    ('PENDING_MODIFY', 'PENDING_CANCEL', 'A cancel follows the modification.'),
    ('FILLED', 'PARTIALLY_FILLED', 'A bust took a fill back.'),
    ('FILLED', 'ROUTED', 'A bust took all fills back.'),
    ('CANCELED', 'ROUTED', 'The cancel was a guess; the broker works it.'),
    ('CANCELED', 'FILLED', 'The broker had filled it before the cancel reached it.'),
    ('CANCELED', 'PARTIALLY_FILLED', 'A fill from before the cancel arrived late.'),
    ('EXPIRED', 'ROUTED', 'A bust took all fills back; it is over at once again.'),
    ('EXPIRED', 'FILLED', 'The broker had filled it before it expired.'),
    ('EXPIRED', 'PARTIALLY_FILLED', 'A fill from before the expiry arrived late.'),
    ('REJECTED', 'FILLED', 'The rejection was a guess, the fill is a fact.'),
    ('REJECTED', 'PARTIALLY_FILLED', 'The rejection was a guess, the fill is a fact.'),
    ('REJECTED', 'ROUTED', 'The rejection was a guess; the broker works it.');

CREATE FUNCTION orders_prices_are_in_range(limit_price numeric, stop_price numeric,
                                           reference_price numeric)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN coalesce(abs(limit_price) < 1e15 AND min_scale(limit_price) <= 8, true)
       AND coalesce(abs(stop_price) < 1e15 AND min_scale(stop_price) <= 8, true)
       AND coalesce(abs(reference_price) < 1e15 AND min_scale(reference_price) <= 8, true);
END $$;

COMMENT ON FUNCTION orders_prices_are_in_range IS
    'Whether the prices that an order has are below 10^15 and have 8 decimals at most.';

CREATE FUNCTION orders_trail_is_positive(amount numeric, percent numeric) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN coalesce(amount, 1) > 0 AND coalesce(percent, 1) > 0 AND coalesce(percent, 1) < 100;
END $$;

COMMENT ON FUNCTION orders_trail_is_positive IS
    'Whether a trailing stop''s distance is one: above zero, and below 100 percent.';

CREATE FUNCTION orders_status_agrees(status text, quantity numeric, filled_quantity numeric)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN CASE WHEN status = 'FILLED' THEN filled_quantity >= quantity
                WHEN status = 'PARTIALLY_FILLED'
                THEN filled_quantity > 0 AND filled_quantity < quantity
                WHEN status IN ('NEW', 'PENDING', 'PENDING_SUBMIT', 'ROUTED', 'REJECTED')
                THEN filled_quantity = 0
                ELSE filled_quantity < quantity END;
END $$;

COMMENT ON FUNCTION orders_status_agrees IS 'Whether an order has filled as its status says.';

CREATE FUNCTION orders_rejection_agrees(status text, reject_source text, reject_code text)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN CASE WHEN status = 'REJECTED'
                THEN reject_code IS NOT NULL
                     AND reject_source IN ('VALIDATION', 'RISK', 'COMPLIANCE', 'BROKER')
                ELSE reject_code IS NULL AND reject_source IS NULL END;
END $$;

COMMENT ON FUNCTION orders_rejection_agrees IS
    'Whether an order says who rejected it and why, if it was, and nothing of it, if it was not.';

CREATE FUNCTION orders_times_are_in_range(logical_time timestamptz, status_at timestamptz,
                                          expire_at timestamptz, triggered_at timestamptz)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN least(logical_time, status_at, expire_at, triggered_at) >= '0001-01-02 00:00Z'
       AND greatest(logical_time, status_at, expire_at, triggered_at) <= '9999-12-30 00:00Z';
END $$;

COMMENT ON FUNCTION orders_times_are_in_range IS
    'Whether the times that an order has are of the years 1 to 9999.';

CREATE TABLE orders (
    user_id          uuid        NOT NULL,
    run_id           uuid        NOT NULL,
    order_id         uuid        NOT NULL DEFAULT gen_random_uuid(),
    client_order_id  text,
    broker           text        NOT NULL DEFAULT 'paper',
    symbol           text        NOT NULL,
    side             text        NOT NULL,
    quantity         numeric     NOT NULL,
    order_type       text        NOT NULL DEFAULT 'MARKET',
    time_in_force    text        NOT NULL DEFAULT 'DAY',
    limit_price      numeric,
    stop_price       numeric,
    trail_amount     numeric,
    trail_percent    numeric,
    expire_at        timestamptz,
    triggered_at     timestamptz,
    reference_price  numeric,
    status           text        NOT NULL DEFAULT 'NEW',
    status_at        timestamptz NOT NULL,
    status_reason    text,
    reject_source    text,
    reject_code      text,
    filled_quantity  numeric     NOT NULL DEFAULT 0,
    filled_notional  numeric     NOT NULL DEFAULT 0,
    logical_time     timestamptz NOT NULL,
    recorded_at      timestamptz NOT NULL,
    account          text,
    version          integer     NOT NULL DEFAULT 1,
    purpose          text,
    recovered        boolean     NOT NULL DEFAULT false,
    pending_reconcile boolean    NOT NULL DEFAULT false,
    broker_order_id  bigint,
    perm_id          bigint,
    avg_fill_price   numeric     GENERATED ALWAYS AS (
        CASE WHEN filled_quantity > 0 THEN round(filled_notional / filled_quantity, 10) END) STORED,
    reserved_cash    numeric     GENERATED ALWAYS AS (
        CASE WHEN side = 'BUY'
              AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
             THEN (quantity - filled_quantity)
                  * greatest(coalesce(limit_price, stop_price, reference_price, 0), 0)
             ELSE 0 END) STORED,
    CONSTRAINT orders_pkey PRIMARY KEY (user_id, run_id, order_id),
    CONSTRAINT orders_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT orders_to_account FOREIGN KEY (user_id, account)
        REFERENCES broker_account (user_id, account),
    CONSTRAINT orders_account_unless_paper CHECK (
        CASE WHEN broker <> 'paper' THEN account IS NOT NULL
             ELSE num_nonnulls(account, broker_order_id, perm_id) = 0
                  AND NOT recovered AND NOT pending_reconcile END),
    CONSTRAINT orders_purpose_known CHECK (purpose = 'FLATTEN'),
    CONSTRAINT orders_symbol_format
        CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]*$' AND length(symbol) <= 32),
    CONSTRAINT orders_client_order_id_short CHECK (length(client_order_id) <= 128),
    CONSTRAINT orders_side_known CHECK (side = ANY ('{BUY,SELL}')),
    CONSTRAINT orders_order_type_known
        CHECK (order_type = ANY ('{MARKET,LIMIT,STOP,STOP_LIMIT,TRAIL}')),
    CONSTRAINT orders_time_in_force_known
        CHECK (time_in_force = ANY ('{DAY,GTC,IOC,FOK,GTD,OPG,CLS}')),
    CONSTRAINT orders_quantity_positive_unless_rejected
        CHECK (quantity > 0 OR status = 'REJECTED'),
    CONSTRAINT orders_quantity_in_range CHECK (amount_in_range(quantity)),
    CONSTRAINT orders_prices_in_range
        CHECK (orders_prices_are_in_range(limit_price, stop_price, reference_price)),
    CONSTRAINT orders_trail_in_range
        CHECK (amount_in_range(trail_amount) AND amount_in_range(trail_percent)),
    CONSTRAINT orders_trail_positive_unless_rejected
        CHECK (orders_trail_is_positive(trail_amount, trail_percent) OR status = 'REJECTED'),
    CONSTRAINT orders_filled_quantity_not_negative CHECK (filled_quantity >= 0),
    CONSTRAINT orders_not_overfilled_on_paper
        CHECK (filled_quantity <= quantity OR broker <> 'paper' OR status = 'REJECTED'),
    CONSTRAINT orders_status_agrees_with_fills
        CHECK (orders_status_agrees(status, quantity, filled_quantity)),
    CONSTRAINT orders_reject_has_source_and_code
        CHECK (orders_rejection_agrees(status, reject_source, reject_code)),
    CONSTRAINT orders_status_after_birth CHECK (status_at >= logical_time),
    CONSTRAINT orders_times_in_range
        CHECK (orders_times_are_in_range(logical_time, status_at, expire_at, triggered_at))
) WITH (fillfactor = 70);

-- This prevents the same client order from being taken twice.
CREATE UNIQUE INDEX orders_client_order_id_once
    ON orders (user_id, run_id, client_order_id) WHERE client_order_id IS NOT NULL;

-- The book of open orders: matched at every tick, summed by the risk gate.
CREATE INDEX orders_open_idx ON orders (user_id, run_id, symbol)
    WHERE status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED');

-- What a broker returns is our order's id alone: the inbox looks up whose it is, so this prevents
-- two runs from having the same order at a broker.
CREATE UNIQUE INDEX orders_id_once_at_brokers ON orders (user_id, order_id) WHERE broker <> 'paper';

COMMENT ON TABLE orders IS 'Orders of every run and broker.';
COMMENT ON COLUMN orders.quantity IS
    'Units ordered; positive unless the order was rejected for it.';
COMMENT ON COLUMN orders.trail_amount IS
    'TRAIL: distance of the stop from the best price, in currency.';
COMMENT ON COLUMN orders.trail_percent IS
    'TRAIL: distance of the stop from the best price, in percent.';
COMMENT ON COLUMN orders.expire_at IS 'Last moment at which it may fill; NULL: no end.';
COMMENT ON COLUMN orders.triggered_at IS 'Logical time at which its stop was reached.';
COMMENT ON COLUMN orders.reference_price IS
    'Price on which it was decided; values a MARKET order for the risk gate.';
COMMENT ON COLUMN orders.status_at IS 'Logical time at which it came into its status.';
COMMENT ON COLUMN orders.status_reason IS 'Why it is in its status, in words or a code.';
COMMENT ON COLUMN orders.reject_code IS 'Stable code of a rejection, e.g. INSUFFICIENT_CASH.';
COMMENT ON COLUMN orders.filled_quantity IS 'Sum of its executions; computed by the database.';
COMMENT ON COLUMN orders.filled_notional IS 'Sum of quantity x price of its executions, exact.';
COMMENT ON COLUMN orders.avg_fill_price IS 'Volume-weighted average price, 10 decimals.';
COMMENT ON COLUMN orders.reserved_cash IS 'Cash that an open buy order holds back.';
COMMENT ON COLUMN orders.account IS 'Where it goes; NULL on paper.';
COMMENT ON COLUMN orders.version IS
    'Counts the changes of an order at a broker; who changes it names the one he saw.';
COMMENT ON COLUMN orders.purpose IS
    'FLATTEN: it closes a position for safety''s sake and never leads to another.';
COMMENT ON COLUMN orders.recovered IS 'Made up from what a broker said of an order unknown to us.';
COMMENT ON COLUMN orders.pending_reconcile IS
    'The broker is being asked what became of it; no news is trusted less.';
COMMENT ON COLUMN orders.broker_order_id IS 'The broker''s newest id of it; may restart.';
COMMENT ON COLUMN orders.perm_id IS 'The broker''s lasting id of it; may come late and change.';
COMMENT ON COLUMN orders.logical_time IS 'Logical time of the tick that placed it.';

-- Whoever places an order may choose among its run's accounts; the first is the preferred one.
CREATE FUNCTION orders_account(o orders) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    route text;
BEGIN
    SELECT r.account INTO route FROM run_route r
    WHERE r.user_id = o.user_id AND r.run_id = o.run_id AND coalesce(r.account = o.account, true)
    ORDER BY r.preference LIMIT 1;
    IF route IS NULL THEN
        RAISE EXCEPTION 'run % has no route to account %', o.run_id, coalesce(o.account, 'at all')
            USING ERRCODE = 'foreign_key_violation', CONSTRAINT = 'orders_account_is_routed',
                  TABLE = 'orders', COLUMN = 'account',
                  HINT = 'Give the run an account: insert into run_route.';
    ELSIF o.recovered AND NOT EXISTS (
        SELECT FROM broker_event e
        WHERE e.user_id = o.user_id AND e.account = route AND e.order_ref = o.order_id::text
           OR e.user_id = o.user_id AND e.account = route AND e.kind = 'SNAPSHOT'
              AND e.payload @> jsonb_build_object('open_orders', jsonb_build_array(
                  jsonb_build_object('order_ref', o.order_id)))) THEN
        RAISE EXCEPTION 'no broker has said anything of order %', o.order_id
            USING ERRCODE = '23T08', CONSTRAINT = 'orders_recovered_from_broker',
                  TABLE = 'orders', COLUMN = 'recovered',
                  HINT = 'Only what a broker reports is recovered; place an order of your own.';
    END IF;
    RETURN route;
END $$;

COMMENT ON FUNCTION orders_account IS
    'The account that a new order goes to; refuses one that its run has no route to.';

-- Words as people type them become the stored words; 90_risk.sql decides afterwards.
CREATE FUNCTION orders_prepare_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run strategy_run;
BEGIN
    -- What a broker turns out to work is taken up while its run is still ending, too.
    run := run_lock(NEW.user_id, NEW.run_id, 'orders', 'RUNNING',
                    CASE WHEN NEW.recovered THEN 'STOPPING' ELSE 'RUNNING' END);
    NEW.broker := run.broker;
    NEW.version := 1;
    IF run.broker <> 'paper' THEN
        NEW.account := orders_account(NEW);
    END IF;
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

COMMENT ON FUNCTION orders_prepare_insert IS
    'Trigger: the stored words, the run''s broker; born NEW, PENDING or REJECTED, nothing filled.';

-- What was asked for is fixed, what was filled is proven by the executions, whoever writes it.
-- A day's end and a trigger are noted once, a trailing stop only tightens, a reason belongs to
-- its move. What a broker works gets other terms by a command alone (86_broker.sql).
CREATE FUNCTION orders_check_update() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    filled record;
BEGIN
    PERFORM run_lock(OLD.user_id, OLD.run_id, 'orders', 'RUNNING',
                     CASE WHEN OLD.broker = 'paper' THEN 'RUNNING' ELSE 'STOPPING' END);
    NEW.version := OLD.version + CASE WHEN OLD.broker = 'paper' THEN 0 ELSE 1 END;
    -- At a real broker even a filled order may trade on: an overfill is real exposure. Terms that
    -- a command asked for may be confirmed after the end that came later (86_broker.sql).
    IF OLD.status IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED') AND NEW.status = OLD.status
       AND (OLD.broker = 'paper'
            OR (NEW.filled_quantity, NEW.filled_notional, NEW.broker_order_id, NEW.perm_id,
                NEW.pending_reconcile, NEW.quantity, NEW.limit_price, NEW.stop_price)
               IS NOT DISTINCT FROM
               (OLD.filled_quantity, OLD.filled_notional, OLD.broker_order_id, OLD.perm_id,
                OLD.pending_reconcile, OLD.quantity, OLD.limit_price, OLD.stop_price)) THEN
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

COMMENT ON FUNCTION orders_check_update IS
    'Trigger: an order keeps its terms, a closed one everything; what is filled is proven.';

CREATE FUNCTION orders_keeps_terms(was orders, now_is orders) RETURNS boolean
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF (now_is.user_id, now_is.run_id, now_is.order_id, now_is.client_order_id, now_is.broker,
        now_is.symbol, now_is.side, now_is.order_type, now_is.time_in_force, now_is.trail_percent,
        now_is.logical_time, now_is.recorded_at, now_is.purpose, now_is.recovered)
       IS DISTINCT FROM
       (was.user_id, was.run_id, was.order_id, was.client_order_id, was.broker,
        was.symbol, was.side, was.order_type, was.time_in_force, was.trail_percent,
        was.logical_time, was.recorded_at, was.purpose, was.recovered)
       OR now_is.account IS DISTINCT FROM was.account AND NOT orders_may_reroute(was, now_is)
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
        OR orders_follows_split(was, now_is)
        OR was.broker <> 'paper' AND (orders_follows_command(was, now_is)
                                      OR orders_may_change_unsent(was, now_is));
END $$;

COMMENT ON FUNCTION orders_keeps_terms IS
    'Whether an update leaves alone what was asked for, or restates it for a split or a command.';

CREATE FUNCTION orders_stop_tightens(was orders, stop_price numeric) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN was.order_type = 'TRAIL' AND stop_price IS NOT NULL
       AND (was.stop_price IS NULL
            OR CASE WHEN was.side = 'BUY' THEN stop_price < was.stop_price
                    ELSE stop_price > was.stop_price END);

COMMENT ON FUNCTION orders_stop_tightens IS
    'Whether a new stop of a trailing order is nearer to the market than its old one.';

-- What a paper order may not do although the table of moves, which is for every broker, allows it:
-- come back from its end. Our own book has no late messages. Nor does an order come back that we
-- refused ourselves: no broker has ever heard of it.
CREATE FUNCTION orders_check_move() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM order_transition
                   WHERE from_status = OLD.status AND to_status = NEW.status)
       OR NEW.broker = 'paper' AND OLD.status IN ('FILLED', 'CANCELED', 'EXPIRED', 'REJECTED')
       OR OLD.status = 'REJECTED' AND OLD.reject_source <> 'BROKER' THEN
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

COMMENT ON FUNCTION orders_check_move IS 'Trigger: only moves of order_transition.';

-- An order born FILLED at the time of its transaction claims to be complete: its statement proves
-- it with all others (orders_record_insert, books_follow) instead of one by one.
CREATE TRIGGER orders_a_prepare_insert BEFORE INSERT ON orders
    FOR EACH ROW WHEN (NEW.status <> 'FILLED' OR NEW.recorded_at IS DISTINCT FROM now())
    EXECUTE FUNCTION orders_prepare_insert();
CREATE TRIGGER orders_a_check_update BEFORE UPDATE ON orders
    FOR EACH ROW EXECUTE FUNCTION orders_check_update();
CREATE TRIGGER orders_b_check_move BEFORE UPDATE ON orders
    FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status)
    EXECUTE FUNCTION orders_check_move();
CREATE TRIGGER orders_z_refuse_delete BEFORE DELETE ON orders
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('orders', 'kept');
CREATE TRIGGER orders_z_refuse_truncate BEFORE TRUNCATE ON orders
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('orders', 'kept');

-- The names that people's SQL uses for paper runs.
CREATE VIEW paper_order AS
    SELECT user_id, run_id, order_id, client_order_id, broker, symbol, side, quantity, order_type,
           time_in_force, limit_price, stop_price, trail_amount, trail_percent, expire_at,
           triggered_at, reference_price, status, status_at, status_reason, reject_source,
           reject_code, filled_quantity, avg_fill_price, reserved_cash, logical_time, recorded_at
    FROM orders
    WHERE broker = 'paper'
    WITH CHECK OPTION;

COMMENT ON VIEW paper_order IS 'The orders of paper runs.';
