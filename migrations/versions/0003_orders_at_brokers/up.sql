-- Orders live at brokers: accounts, outbox and inbox, moves that a broker causes, commissions,
-- halts, limits, reconciliation. Guards are replaced in one transaction, so that nothing gets past
-- them meanwhile.
-- squawk-ignore-file ban-drop-constraint, ban-drop-function, ban-drop-default, constraint-missing-not-valid, adding-foreign-key-constraint, require-concurrent-index-creation, require-concurrent-index-deletion, prefer-bigint-over-int, prefer-bigint-over-smallint, adding-required-field, prefer-robust-stmts, ban-drop-column, ban-drop-table, disallowed-unique-constraint

SET LOCAL lock_timeout = '30s';
SET LOCAL statement_timeout = '1h';

DROP VIEW audit_event;

DROP VIEW audit_mark;

DROP VIEW audit_cash;

DROP TRIGGER orders_b_pass_gate ON orders;

ALTER TABLE strategy_run
    DROP CONSTRAINT strategy_run_cash_not_negative_in_cash_account;

ALTER TABLE execution
    DROP CONSTRAINT execution_quantity_positive;

DROP INDEX event_ledger_books_idx;

-- Accounts at brokers: who trades where, how fast, in which hours. The paper book needs none.

CREATE TABLE broker_account (
    user_id             uuid        NOT NULL,
    account             text        NOT NULL,
    broker              text        NOT NULL,
    currency            text        NOT NULL DEFAULT 'USD',
    opening_cash        numeric     NOT NULL DEFAULT 0,
    calendar            text        NOT NULL DEFAULT 'XNYS',
    time_zone           text        NOT NULL DEFAULT 'UTC',
    opens_at            time,
    closes_at           time,
    out_of_session      text        NOT NULL DEFAULT 'QUEUE',
    orders_per_second   integer     NOT NULL DEFAULT 10,
    messages_per_second integer     NOT NULL DEFAULT 45,
    heartbeat_seconds   integer     NOT NULL DEFAULT 60,
    stale_seconds       integer     NOT NULL DEFAULT 300,
    settings            jsonb       NOT NULL DEFAULT '{}',
    created_at          timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT broker_account_pkey PRIMARY KEY (user_id, account),
    CONSTRAINT broker_account_belongs_to_user
        FOREIGN KEY (user_id) REFERENCES app_user (user_id) ON DELETE CASCADE,
    CONSTRAINT broker_account_account_format
        CHECK (account ~ '^[A-Za-z0-9][A-Za-z0-9._-]*$' AND length(account) <= 64),
    CONSTRAINT broker_account_broker_format
        CHECK (broker ~ '^[a-z][a-z0-9_]{0,31}$' AND broker <> 'paper'),
    CONSTRAINT broker_account_currency_format CHECK (currency ~ '^[A-Z]{3}$'),
    CONSTRAINT broker_account_opening_cash_in_range CHECK (decimal_in_range(opening_cash, 1e18, 8)),
    CONSTRAINT broker_account_hours_whole
        CHECK ((opens_at IS NULL) = (closes_at IS NULL) AND opens_at <> closes_at),
    CONSTRAINT broker_account_out_of_session_known CHECK (out_of_session IN ('QUEUE', 'REFUSE')),
    CONSTRAINT broker_account_rates_positive
        CHECK (orders_per_second BETWEEN 1 AND 10000 AND messages_per_second BETWEEN 1 AND 10000),
    CONSTRAINT broker_account_seconds_positive
        CHECK (heartbeat_seconds BETWEEN 1 AND 86400 AND stale_seconds BETWEEN 1 AND 864000),
    CONSTRAINT broker_account_settings_is_object CHECK (jsonb_typeof(settings) = 'object')
);

COMMENT ON TABLE broker_account IS 'An account at a broker, and how it may be traded.';

COMMENT ON COLUMN broker_account.account IS 'The account''s name at the broker.';

COMMENT ON COLUMN broker_account.broker IS 'The kind of broker: dummy, ibkr, ...';

COMMENT ON COLUMN broker_account.opening_cash IS
    'Cash at the broker before the first order of ours, in currency.';

COMMENT ON COLUMN broker_account.calendar IS
    'The exchange calendar whose sessions it trades in, unless hours are given.';

COMMENT ON COLUMN broker_account.opens_at IS
    'Begin of the hours in time_zone; NULL: the calendar''s sessions.';

COMMENT ON COLUMN broker_account.closes_at IS 'End of the hours; before opens_at: the next day.';

COMMENT ON COLUMN broker_account.out_of_session IS
    'What becomes of orders outside the hours: QUEUE until they open, or REFUSE.';

COMMENT ON COLUMN broker_account.orders_per_second IS 'New orders sent in any one second, at most.';

COMMENT ON COLUMN broker_account.messages_per_second IS
    'Messages of any kind sent in any one second, at most.';

COMMENT ON COLUMN broker_account.heartbeat_seconds IS
    'Silence of the broker after which nothing new is submitted.';

COMMENT ON COLUMN broker_account.stale_seconds IS
    'Silence about a working order after which the broker is asked.';

COMMENT ON COLUMN broker_account.settings IS 'What its adapter needs: host, port, client id.';

-- What currencies cost in each other, by time: commissions are reported in any of them. A lookup
-- table like the prices: imported, append-only by right, pointing at no user's table.

CREATE TABLE fx_rate (
    currency       text        NOT NULL,
    quote_currency text        NOT NULL,
    at             timestamptz NOT NULL,
    rate           numeric     NOT NULL,
    CONSTRAINT fx_rate_pkey PRIMARY KEY (currency, quote_currency, at),
    CONSTRAINT fx_rate_currencies_format
        CHECK (currency ~ '^[A-Z]{3}$' AND quote_currency ~ '^[A-Z]{3}$'),
    CONSTRAINT fx_rate_of_two_currencies CHECK (currency <> quote_currency),
    CONSTRAINT fx_rate_at_in_range CHECK (time_in_range(at)),
    CONSTRAINT fx_rate_rate_positive CHECK (rate > 0 AND rate < 1e9 AND min_scale(rate) <= 10)
);

COMMENT ON TABLE fx_rate IS 'Exchange rates: one unit of currency costs rate of quote_currency.';

COMMENT ON COLUMN fx_rate.at IS 'Since when it holds, until the next one of the pair.';

-- The rate of a moment is the newest one that was known then, of the pair or of the pair turned
-- round. One that is older than a week is no rate of that moment: better none than a wrong one.
CREATE FUNCTION fx_rate_at(of_currency text, in_currency text, moment timestamptz)
RETURNS numeric LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT CASE WHEN of_currency = in_currency THEN 1 ELSE (
        SELECT k.rate
        FROM ((SELECT f.at, f.rate, 1 AS choice FROM fx_rate f
               WHERE f.currency = of_currency AND f.quote_currency = in_currency
                 AND f.at <= moment AND f.at > moment - interval '7 days'
               ORDER BY f.at DESC LIMIT 1)
              UNION ALL
              (SELECT f.at, round(1 / f.rate, 10), 2 FROM fx_rate f
               WHERE f.currency = in_currency AND f.quote_currency = of_currency
                 AND f.at <= moment AND f.at > moment - interval '7 days'
               ORDER BY f.at DESC LIMIT 1)) k
        WHERE k.rate > 0
        ORDER BY k.at DESC, k.choice LIMIT 1) END
$$;

COMMENT ON FUNCTION fx_rate_at IS
    'What one unit of a currency cost in another at a moment; NULL where no rate of the week '
    'before it is known.';

ALTER TABLE strategy_run
    ADD COLUMN pnl_method text NOT NULL DEFAULT 'AVERAGE';

ALTER TABLE strategy_run
    ADD CONSTRAINT strategy_run_pnl_method_known CHECK (pnl_method = ANY ('{AVERAGE,FIFO}')),
    ADD CONSTRAINT strategy_run_cash_not_negative_in_cash_account
        
        
        CHECK (cash >= 0 OR account_type <> 'CASH' OR broker <> 'paper' OR initial_cash < 0);

COMMENT ON COLUMN strategy_run.pnl_method IS
    'How profits are told: at AVERAGE cost, or first in first out (FIFO).';

COMMENT ON COLUMN strategy_run.books_seq IS
    'Number of the last EXECUTION, COMMISSION or SPLIT_APPLIED event that the books follow.';

-- Cash is not guarded by who writes it but proven, whoever does: it may change only by what the
-- EXECUTION events say that it does not yet have (50_executions.sql).
CREATE OR REPLACE FUNCTION strategy_run_check_update() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    due record;
BEGIN
    IF (NEW.user_id, NEW.run_id, NEW.initial_cash, NEW.broker, NEW.account_type, NEW.currency,
        NEW.calendar, NEW.pnl_method, NEW.strategy, NEW.parameters, NEW.paper, NEW.created_at)
       IS DISTINCT FROM
       (OLD.user_id, OLD.run_id, OLD.initial_cash, OLD.broker, OLD.account_type, OLD.currency,
        OLD.calendar, OLD.pnl_method, OLD.strategy, OLD.parameters, OLD.paper, OLD.created_at)
    THEN
        PERFORM strategy_run_check_terms(OLD, NEW);
    END IF;
    NEW.stopped_at := OLD.stopped_at;
    IF (NEW.cash, NEW.books_seq) IS DISTINCT FROM (OLD.cash, OLD.books_seq) THEN
        -- What they are, and what the events after books_seq add.
        SELECT OLD.cash + coalesce(sum(event_cash_flow(l.event_type, l.payload)), 0) AS cash,
               coalesce(max(l.seq), OLD.books_seq) AS books_seq
        INTO due FROM event_ledger l
        WHERE l.user_id = OLD.user_id AND l.run_id = OLD.run_id AND l.seq > OLD.books_seq
          AND l.event_type IN ('EXECUTION', 'COMMISSION', 'SPLIT_APPLIED');
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
        now_is.currency, now_is.calendar, now_is.pnl_method)
       IS DISTINCT FROM
       (was.user_id, was.run_id, was.initial_cash, was.broker, was.account_type,
        was.currency, was.calendar, was.pnl_method)
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

-- A run that leaves RUNNING takes its open orders with it, whoever ends it: those in our own book
-- are cancelled, those at a broker are asked back, and the events written while the run still
-- counts as RUNNING, in the same statement. A run ends well only when its broker is done with it.
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
    IF OLD.broker <> 'paper' THEN
        PERFORM orders_ask_back(OLD.user_id, OLD.run_id, NEW.status);
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

-- Where a run's orders go: accounts in order of preference. Not needed on paper.
CREATE TABLE run_route (
    user_id    uuid     NOT NULL,
    run_id     uuid     NOT NULL,
    preference smallint NOT NULL DEFAULT 1,
    account    text     NOT NULL,
    CONSTRAINT run_route_pkey PRIMARY KEY (user_id, run_id, preference),
    CONSTRAINT run_route_account_once UNIQUE (user_id, run_id, account),
    CONSTRAINT run_route_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT run_route_to_account FOREIGN KEY (user_id, account)
        REFERENCES broker_account (user_id, account),
    CONSTRAINT run_route_preference_positive CHECK (preference BETWEEN 1 AND 100)
);

COMMENT ON TABLE run_route IS 'The accounts that a run''s orders go to, in order of preference.';

COMMENT ON COLUMN run_route.preference IS
    '1 is asked first; the next one takes over what certainly never reached it.';

ALTER TABLE orders
    ADD COLUMN account text,
    ADD COLUMN version integer NOT NULL DEFAULT 1,
    ADD COLUMN purpose text,
    ADD COLUMN recovered boolean NOT NULL DEFAULT false,
    ADD COLUMN pending_reconcile boolean NOT NULL DEFAULT false,
    ADD COLUMN broker_order_id bigint,
    ADD COLUMN perm_id bigint;

ALTER TABLE orders
    ADD CONSTRAINT orders_to_account FOREIGN KEY (user_id, account)
        REFERENCES broker_account (user_id, account),
    ADD CONSTRAINT orders_account_unless_paper CHECK ((account IS NULL) = (broker = 'paper')),
    ADD CONSTRAINT orders_purpose_known CHECK (purpose = 'FLATTEN');

-- What a broker returns is our order's id alone: the inbox looks up whose it is.
CREATE INDEX orders_at_broker_idx ON orders (user_id, order_id) WHERE broker <> 'paper';

COMMENT ON COLUMN orders.account IS 'Where it goes; NULL on paper.';

COMMENT ON COLUMN orders.version IS 'Counts the changes of an order at a broker; who changes it names the one he saw.';

COMMENT ON COLUMN orders.purpose IS
    'FLATTEN: it closes a position for safety''s sake and never leads to another.';

COMMENT ON COLUMN orders.recovered IS 'Made up from what a broker said of an order unknown to us.';

COMMENT ON COLUMN orders.pending_reconcile IS
    'The broker is being asked what became of it; no news is trusted less.';

COMMENT ON COLUMN orders.broker_order_id IS 'The broker''s newest id of it; may restart.';

COMMENT ON COLUMN orders.perm_id IS 'The broker''s lasting id of it; may come late and change.';

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
CREATE OR REPLACE FUNCTION orders_prepare_insert() RETURNS trigger
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

-- What was asked for is fixed, what was filled is proven by the executions, whoever writes it.
-- A day's end and a trigger are noted once, a trailing stop only tightens, a reason belongs to
-- its move. What a broker works gets other terms by a command alone (86_broker.sql).
CREATE OR REPLACE FUNCTION orders_check_update() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    filled record;
BEGIN
    PERFORM run_lock(OLD.user_id, OLD.run_id, 'orders', 'RUNNING',
                     CASE WHEN OLD.broker = 'paper' THEN 'RUNNING' ELSE 'STOPPING' END);
    NEW.version := OLD.version + CASE WHEN OLD.broker = 'paper' THEN 0 ELSE 1 END;
    -- At a real broker even a filled order may trade on: an overfill is real exposure.
    IF OLD.status IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED') AND NEW.status = OLD.status
       AND (OLD.broker = 'paper'
            OR (NEW.filled_quantity, NEW.filled_notional, NEW.broker_order_id, NEW.perm_id,
                NEW.pending_reconcile)
               IS NOT DISTINCT FROM
               (OLD.filled_quantity, OLD.filled_notional, OLD.broker_order_id, OLD.perm_id,
                OLD.pending_reconcile)) THEN
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
        now_is.logical_time, now_is.recorded_at, now_is.purpose, now_is.recovered)
       IS DISTINCT FROM
       (was.user_id, was.run_id, was.order_id, was.client_order_id, was.broker,
        was.symbol, was.side, was.order_type, was.time_in_force, was.trail_percent,
        was.logical_time, was.recorded_at, was.purpose, was.recovered)
       OR now_is.account IS DISTINCT FROM was.account AND NOT orders_may_reroute(was)
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
        OR was.broker <> 'paper' AND orders_follows_command(was, now_is);
END $$;

COMMENT ON FUNCTION orders_keeps_terms IS
    'Whether an update leaves alone what was asked for, or restates it for a split or a command.';

-- What a paper order may not do although the table of moves, which is for every broker, allows it:
-- come back from its end. Our own book has no late messages.
CREATE OR REPLACE FUNCTION orders_check_move() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM order_transition
                   WHERE from_status = OLD.status AND to_status = NEW.status)
       OR (NEW.broker = 'paper' AND OLD.status IN ('FILLED', 'CANCELED', 'EXPIRED', 'REJECTED')) THEN
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

ALTER TABLE execution
    ADD COLUMN reverses text;

ALTER TABLE execution
    ADD CONSTRAINT execution_quantity_positive
        
        CHECK ((quantity > 0 OR reverses IS NOT NULL AND quantity < 0)
        AND amount_in_range(abs(quantity)));

-- This prevents an execution from being taken back twice.
CREATE UNIQUE INDEX execution_reversed_once ON execution (user_id, run_id, reverses)
    WHERE reverses IS NOT NULL;

COMMENT ON COLUMN execution.reverses IS
    'The execution that this one takes back, with its negative quantity at its price.';

CREATE OR REPLACE FUNCTION execution_prepare_insert() RETURNS trigger
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
    END IF;
    IF o.broker <> 'paper' THEN
        PERFORM execution_check_broker(NEW, o);
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

-- The proof of an execution at a broker: the broker said so, in the inbox, where only connectors
-- write. What it takes back it must have said too, by a bust or by a newer revision of the same id.
CREATE FUNCTION execution_check_broker(e execution, o orders) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    IF e.reverses IS NULL THEN
        IF EXISTS (SELECT FROM broker_event b
                   WHERE b.user_id = o.user_id AND b.account = o.account
                     AND b.execution_id = e.execution_id AND b.kind = 'EXECUTION'
                     AND (b.payload ->> 'quantity')::numeric = e.quantity
                     AND (b.payload ->> 'price')::numeric = e.price) THEN
            RETURN;
        END IF;
    ELSIF EXISTS (SELECT FROM execution t
                  WHERE t.user_id = e.user_id AND t.run_id = e.run_id
                    AND t.execution_id = e.reverses AND t.order_id = e.order_id
                    AND t.quantity = -e.quantity AND t.price = e.price AND t.reverses IS NULL)
          AND EXISTS (SELECT FROM broker_event b
                      WHERE b.user_id = o.user_id AND b.account = o.account
                        AND (b.kind = 'BUST' AND b.execution_id = e.reverses
                             OR b.kind = 'EXECUTION' AND b.execution_id <> e.reverses
                                AND b.order_ref = o.order_id::text
                                AND execution_family(b.execution_id)
                                    = execution_family(e.reverses))) THEN
        RETURN;
    END IF;
    RAISE EXCEPTION 'no broker has said that execution % of order % happened', e.execution_id,
        e.order_id
        USING ERRCODE = '23T08', CONSTRAINT = 'execution_said_by_broker', TABLE = 'execution',
              HINT = 'Executions at a broker come from its connector''s broker_event rows.';
END $$;

COMMENT ON FUNCTION execution_check_broker IS
    'Refuses an execution, or a reversal, that the order''s broker has not reported.';

-- Source: IB's execution ids; those that differ only after the last dot are revisions of one.
CREATE FUNCTION execution_family(execution_id text) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN regexp_replace(execution_id, '\.[^.]*$', '');

COMMENT ON FUNCTION execution_family IS 'What the revisions of one execution id have in common.';

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

CREATE OR REPLACE FUNCTION execution_event_payload(e execution) RETURNS jsonb
LANGUAGE sql STABLE
RETURN jsonb_build_object('symbol', e.symbol, 'side', e.side, 'quantity', e.quantity,
                          'price', e.price, 'commission', e.commission,
                          'commission_currency', e.commission_currency,
                          'event_at', event_moment(e.event_at))
       || CASE WHEN e.reverses IS NULL THEN '{}'
               ELSE jsonb_build_object('reverses', e.reverses) END;

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
    CONSTRAINT execution_commission_event_at_in_range_too CHECK (time_in_range(event_at))
);

COMMENT ON TABLE execution_commission IS 'Commissions that brokers reported; append-only.';

COMMENT ON COLUMN execution_commission.amount IS
    'In currency; positive costs money, negative is a rebate.';

COMMENT ON COLUMN execution_commission.rate IS
    'What one unit of currency cost in the run''s at event_at; 1 if it is the run''s.';

COMMENT ON COLUMN execution_commission.cost IS 'In the run''s currency: amount x rate, 10 decimals.';

COMMENT ON COLUMN execution_commission.event_at IS 'When the broker says that it happened.';

CREATE FUNCTION execution_commission_prepare_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run strategy_run;
BEGIN
    run := run_lock(NEW.user_id, NEW.run_id, 'execution_commission', 'RUNNING', 'STOPPING');
    IF NOT EXISTS (
        SELECT FROM execution e
        JOIN orders o ON o.user_id = e.user_id AND o.run_id = e.run_id AND o.order_id = e.order_id
        JOIN broker_event b ON b.user_id = o.user_id AND b.account = o.account
                           AND b.execution_id = e.execution_id AND b.kind = 'COMMISSION'
        WHERE e.user_id = NEW.user_id AND e.run_id = NEW.run_id
          AND e.execution_id = NEW.execution_id
          AND (b.payload ->> 'amount')::numeric = NEW.amount
          AND b.payload ->> 'currency' = NEW.currency AND b.event_at = NEW.event_at) THEN
        RAISE EXCEPTION 'no broker has reported a commission of % % on execution %', NEW.amount,
            NEW.currency, NEW.execution_id
            USING ERRCODE = '23T08', CONSTRAINT = 'execution_commission_said_by_broker',
                  TABLE = 'execution_commission',
                  HINT = 'Commissions come from the connector''s broker_event rows.';
    END IF;
    NEW.rate := CASE WHEN NEW.currency = run.currency THEN 1
                     ELSE fx_rate_at(NEW.currency, run.currency, NEW.event_at) END;
    IF NEW.rate IS NULL THEN
        RAISE EXCEPTION 'there is no rate from % to % at %', NEW.currency, run.currency, NEW.event_at
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

-- What positions and cash follow: the few events after books_seq, or all of a run in an audit.
CREATE INDEX event_ledger_books_idx ON event_ledger (user_id, run_id, seq)
    WHERE event_type IN ('EXECUTION', 'COMMISSION', 'SPLIT_APPLIED');

CREATE OR REPLACE FUNCTION event_ledger_append() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    head     record;
    next_seq bigint;
    expected bytea;
BEGIN
    -- A run that was asked to stop still tells what its brokers say, and how it ended.
    PERFORM run_lock(NEW.user_id, NEW.run_id, 'event_ledger', 'RUNNING', 'STOPPING');
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
    'stop_price', o.stop_price, 'account', o.account, 'purpose', o.purpose,
    'recovered', nullif(o.recovered, false), 'trail_amount', o.trail_amount,
    'trail_percent', o.trail_percent, 'expire_at', event_moment(o.expire_at),
    'reference_price', o.reference_price, 'client_order_id', o.client_order_id,
    'reject_source', o.reject_source, 'reject_code', o.reject_code,
    'status_reason', o.status_reason));

-- A broker may move an order more than once at one logical time: its version tells the moves apart.
CREATE FUNCTION orders_event_subject(o orders) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN o.broker = 'paper' THEN o.order_id::text
            ELSE o.order_id || '@' || o.version END;

COMMENT ON FUNCTION orders_event_subject IS 'What the event of an order''s move is about.';

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
    IF event.event_type = 'ORDER_MODIFIED' THEN
        RETURN event.subject = orders_event_subject(o)
           AND orders_event_payload(o) = event.payload;
    END IF;
    -- Told once, since its key is the order and the time, or the version, that the order has.
    RETURN event.subject = CASE WHEN event.event_type IN ('ORDER_PLACED', 'ORDER_REJECTED')
                                     AND o.version = 1 THEN o.order_id::text
                                ELSE orders_event_subject(o) END
       AND CASE WHEN event.event_type = 'ORDER_PLACED' THEN o.logical_time = event.logical_time
                ELSE 'ORDER_' || o.status = event.event_type
                     AND o.status_at = event.logical_time END;
END $$;

-- Moves by a fill are told by the execution's own event.
CREATE OR REPLACE FUNCTION orders_record_move() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
    SELECT n.user_id, n.run_id, n.status_at, 'ORDER_' || n.status, orders_event_subject(n),
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
            WHEN event_type = 'COMMISSION' THEN -(payload ->> 'cost')::numeric
            ELSE 0 END;

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
        ELSIF run.status = 'STOPPING'
              AND (run.broker = 'paper' AND e.event_type NOT IN ('RUN_STOPPED', 'RUN_ERROR')
                   OR e.event_type IN ('TICK', 'SIP_EXECUTED', 'REBALANCED')) THEN
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

        ELSIF e.event_type = 'COMMISSION' THEN
            IF NOT EXISTS (SELECT FROM execution_commission c
                           WHERE c.user_id = of_user AND c.run_id = of_run
                             AND c.execution_id = e.subject COLLATE "default"
                             AND c.logical_time = e.logical_time
                             AND execution_commission_payload(c) = e.payload) THEN
                PERFORM event_refuse(e, NULL);
            END IF;
            cash := cash + event_cash_flow(e.event_type, e.payload);
            moved := true;

        ELSIF e.event_type = 'SPLIT_APPLIED' THEN
            IF NOT EXISTS (SELECT FROM split_applied s
                           WHERE s.user_id = of_user AND s.run_id = of_run
                             AND split_event_subject(s) = e.subject
                             AND s.logical_time = e.logical_time
                             AND split_event_payload(s) = e.payload) THEN
                PERFORM event_refuse(e, NULL);
            END IF;

        ELSIF starts_with(e.event_type, 'ORDER_')
              -- Findings about ids: no moves.
              AND e.event_type <> ALL ('{ORDER_ID_REUSE,ORDER_ID_WRAP}')
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

-- Profit and loss: what executions opened, matched with what closed it. Two methods: first in,
-- first out, where each execution opens a lot of its own; and average cost, where one lot takes up
-- all. Both give the same sum of realised and unrealised. An execution that was taken back and the
-- one that takes it back are as if they had never been.

-- The executions that stand, in the order in which profits are reckoned: by the broker's time,
-- whatever our clock said and whenever the news came. A split is where units change, so what the
-- ledger tells before it stays before it.
CREATE FUNCTION pnl_steps(of_user uuid, of_run uuid, of_symbol text)
RETURNS TABLE (execution_id text, event_at timestamptz, delta numeric, price numeric,
               numerator numeric, denominator numeric, quantity_after numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT s.execution_id, s.event_at, s.delta, s.price, s.numerator, s.denominator,
           s.quantity_after
    FROM (
        SELECT substr(l.subject, 38) AS execution_id,
               (l.payload ->> 'event_at')::timestamptz AS event_at,
               (l.payload ->> 'quantity')::numeric
               * CASE WHEN l.payload ->> 'side' = 'BUY' THEN 1 ELSE -1 END AS delta,
               (l.payload ->> 'price')::numeric AS price,
               (l.payload ->> 'numerator')::numeric AS numerator,
               (l.payload ->> 'denominator')::numeric AS denominator,
               (l.payload ->> 'quantity_after')::numeric AS quantity_after,
               l.seq, l.event_type = 'SPLIT_APPLIED' AS is_split,
               count(*) FILTER (WHERE l.event_type = 'SPLIT_APPLIED') OVER (ORDER BY l.seq)
                   AS splits_so_far
        FROM event_ledger l
        WHERE l.user_id = of_user AND l.run_id = of_run
          AND l.event_type IN ('EXECUTION', 'SPLIT_APPLIED')
          AND l.payload ->> 'symbol' = of_symbol
          AND l.payload ->> 'reverses' IS NULL
          AND NOT EXISTS (SELECT FROM execution r
                          WHERE r.user_id = of_user AND r.run_id = of_run
                            AND r.reverses = substr(l.subject, 38) COLLATE "default"
                            AND l.event_type = 'EXECUTION')) s
    ORDER BY s.splits_so_far, s.is_split DESC, s.event_at, s.seq
$$;

COMMENT ON FUNCTION pnl_steps IS
    'A run''s executions of a symbol that stand, and its splits, by the broker''s time.';

-- One row a match of an opening with a closing, and one for each lot that is still open, whose
-- closing is NULL. Quantities are signed: negative where a short position was held. A cost is cut
-- to 12 decimals where a share of it has no end, and what closes a lot takes all that is left.
CREATE FUNCTION pnl_matches(of_user uuid, of_run uuid, of_symbol text, method text)
RETURNS TABLE (opened_by text, opened_at timestamptz, closed_by text, closed_at timestamptz,
               quantity numeric, cost numeric, proceeds numeric)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    lot_by    text[] := '{}';        -- the lots: parallel arrays, those before first are closed
    lot_at    timestamptz[] := '{}';
    lot_units numeric[] := '{}';
    lot_cost  numeric[] := '{}';
    first     integer := 1;
    last      integer := 0;
    step      record;
    remaining numeric;
    a         record;
    closing   numeric;
BEGIN
    FOR step IN SELECT * FROM pnl_steps(of_user, of_run, of_symbol) LOOP
        IF step.numerator IS NOT NULL THEN
            -- Each lot in new units; what is cut from the position is cut from the last one.
            remaining := step.quantity_after;
            FOR i IN first .. last LOOP
                lot_units[i] := CASE WHEN i = last THEN remaining
                                     ELSE trunc(lot_units[i] * step.numerator / step.denominator, 8)
                                END;
                remaining := remaining - lot_units[i];
            END LOOP;
            CONTINUE;
        END IF;
        remaining := step.delta;
        WHILE remaining <> 0 AND first <= last AND lot_units[first] * remaining < 0 LOOP
            closing := sign(remaining) * least(abs(remaining), abs(lot_units[first]));
            a := position_after(lot_units[first], lot_cost[first], closing, step.price);
            opened_by := lot_by[first];
            opened_at := lot_at[first];
            closed_by := step.execution_id;
            closed_at := step.event_at;
            quantity := -closing;
            cost := lot_cost[first] - a.cost_after;
            proceeds := quantity * step.price;
            RETURN NEXT;
            lot_units[first] := a.quantity_after;
            lot_cost[first] := a.cost_after;
            IF a.quantity_after = 0 THEN
                first := first + 1;
            END IF;
            remaining := remaining - closing;
        END LOOP;
        IF remaining <> 0 AND method = 'AVERAGE' AND first <= last THEN
            lot_units[first] := lot_units[first] + remaining;
            lot_cost[first] := lot_cost[first] + remaining * step.price;
        ELSIF remaining <> 0 THEN
            last := last + 1;
            lot_by[last] := step.execution_id;
            lot_at[last] := step.event_at;
            lot_units[last] := remaining;
            lot_cost[last] := remaining * step.price;
        END IF;
    END LOOP;
    closed_by := NULL;
    closed_at := NULL;
    proceeds := NULL;
    FOR i IN first .. last LOOP
        opened_by := lot_by[i];
        opened_at := lot_at[i];
        quantity := lot_units[i];
        cost := lot_cost[i];
        RETURN NEXT;
    END LOOP;
END $$;

COMMENT ON FUNCTION pnl_matches IS
    'What closed which opening of a symbol, by FIFO or AVERAGE; profit is proceeds - cost.';

CREATE FUNCTION position_lots(of_user uuid, of_run uuid, of_symbol text)
RETURNS TABLE (opened_by text, opened_at timestamptz, quantity numeric, cost numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT m.opened_by, m.opened_at, m.quantity, m.cost
    FROM pnl_matches(of_user, of_run, of_symbol, 'FIFO') m
    WHERE m.closed_by IS NULL
    ORDER BY m.opened_at, m.opened_by
$$;

COMMENT ON FUNCTION position_lots IS
    'The open lots of a symbol, first in first out; negative quantities are short.';

-- What brokers took for a run's executions of a symbol, in the run's currency, by their time.
CREATE VIEW execution_cost AS
    SELECT e.user_id, e.run_id, e.symbol, e.execution_id, e.event_at, e.commission AS cost
    FROM execution e WHERE e.commission <> 0
    UNION ALL
    SELECT c.user_id, c.run_id, e.symbol, c.execution_id, c.event_at, c.cost
    FROM execution_commission c
    JOIN execution e ON e.user_id = c.user_id AND e.run_id = c.run_id
                    AND e.execution_id = c.execution_id;

COMMENT ON VIEW execution_cost IS
    'Commissions in the run''s currency, each at the rate of its own time.';

CREATE VIEW position_pnl AS
    SELECT p.user_id, p.run_id, p.symbol, r.pnl_method, r.currency, p.quantity,
           m.cost AS cost_basis,
           CASE WHEN p.quantity <> 0 THEN round(m.cost / p.quantity, 10) END AS avg_cost,
           p.mark_price, p.marked_at, m.realized AS realized_pnl,
           CASE WHEN p.quantity = 0 THEN 0 ELSE p.quantity * p.mark_price - m.cost END
               AS unrealized_pnl,
           c.cost AS commission,
           m.realized + CASE WHEN p.quantity = 0 THEN 0
                             ELSE p.quantity * p.mark_price - m.cost END - c.cost AS total_pnl
    FROM position p
    JOIN strategy_run r ON r.user_id = p.user_id AND r.run_id = p.run_id
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(m.cost) FILTER (WHERE m.closed_by IS NULL), 0) AS cost,
               coalesce(sum(m.proceeds - m.cost), 0) AS realized
        FROM pnl_matches(p.user_id, p.run_id, p.symbol, r.pnl_method) m) m
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(c.cost), 0) AS cost FROM execution_cost c
        WHERE c.user_id = p.user_id AND c.run_id = p.run_id AND c.symbol = p.symbol) c;

COMMENT ON VIEW position_pnl IS
    'Profit of each position by its run''s method, in its run''s currency; commission apart, and '
    'taken from total_pnl.';

-- The day of a moment is its session's in the run's calendar: what fills after the close is still
-- that day's. Where the calendar says nothing it is the day in UTC.
CREATE FUNCTION run_session_date(of_calendar text, moment timestamptz) RETURNS date
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT coalesce((calendar_session_at(of_calendar, moment)).session_date,
                    (moment AT TIME ZONE 'UTC')::date)
$$;

COMMENT ON FUNCTION run_session_date IS 'The session to which a moment belongs.';

CREATE VIEW pnl_daily AS
    WITH told AS (
        SELECT r.user_id, r.run_id, run_session_date(r.calendar, m.closed_at) AS session_date,
               m.proceeds - m.cost AS realized, 0 AS commission
        FROM strategy_run r
        JOIN position p ON p.user_id = r.user_id AND p.run_id = r.run_id
        CROSS JOIN LATERAL pnl_matches(r.user_id, r.run_id, p.symbol, r.pnl_method) m
        WHERE m.closed_by IS NOT NULL
        UNION ALL
        SELECT r.user_id, r.run_id, run_session_date(r.calendar, c.event_at), 0, c.cost
        FROM strategy_run r
        JOIN execution_cost c ON c.user_id = r.user_id AND c.run_id = r.run_id
    ), marked AS (
        SELECT DISTINCT ON (r.user_id, r.run_id, run_session_date(r.calendar, m.logical_time))
               r.user_id, r.run_id, run_session_date(r.calendar, m.logical_time) AS session_date,
               m.equity
        FROM strategy_run r
        JOIN mtm_ledger m ON m.user_id = r.user_id AND m.run_id = r.run_id
        ORDER BY r.user_id, r.run_id, run_session_date(r.calendar, m.logical_time),
                 m.logical_time DESC
    )
    SELECT r.user_id, r.run_id, d.session_date, r.currency, coalesce(t.realized, 0) AS realized_pnl,
           coalesce(t.commission, 0) AS commission, d.equity,
           d.equity - coalesce(d.equity_before, r.initial_cash) AS total_pnl
    FROM (SELECT user_id, run_id, session_date, k.equity,
                 lag(k.equity) OVER (PARTITION BY user_id, run_id, k.equity IS NULL
                                     ORDER BY session_date) AS equity_before
          FROM (SELECT user_id, run_id, session_date FROM told
                UNION SELECT user_id, run_id, session_date FROM marked) days
          LEFT JOIN marked k USING (user_id, run_id, session_date)) d
    JOIN strategy_run r ON r.user_id = d.user_id AND r.run_id = d.run_id
    LEFT JOIN (SELECT user_id, run_id, session_date, sum(realized) AS realized,
                      sum(commission) AS commission
               FROM told GROUP BY user_id, run_id, session_date) t
        ON t.user_id = d.user_id AND t.run_id = d.run_id AND t.session_date = d.session_date;

COMMENT ON VIEW pnl_daily IS
    'What each session realised and cost by the broker''s time, and what the run was worth at its '
    'last mark: total_pnl is the change of equity since the session marked before.';

-- The boundary to brokers. The engine never calls a broker and a connector never touches an order:
-- what is to be sent stands in broker_command (the outbox), what the broker said in broker_event
-- (the inbox). A connector has rights to nothing but these and the lease of its account.

-- Who is connected: one connector an account, for as long as it renews.
CREATE TABLE broker_lease (
    user_id       uuid        NOT NULL,
    account       text        NOT NULL,
    holder        uuid        NOT NULL,
    holder_name   text        NOT NULL,
    taken_at      timestamptz NOT NULL,
    expires_at    timestamptz NOT NULL,
    connected     boolean     NOT NULL DEFAULT false,
    last_heard_at timestamptz,
    clock_skew    interval,
    CONSTRAINT broker_lease_pkey PRIMARY KEY (user_id, account),
    CONSTRAINT broker_lease_of_account FOREIGN KEY (user_id, account)
        REFERENCES broker_account (user_id, account) ON DELETE CASCADE,
    CONSTRAINT broker_lease_holder_name_short CHECK (length(holder_name) <= 200)
) WITH (fillfactor = 50);

COMMENT ON TABLE broker_lease IS 'The connector that holds an account; one row an account.';

COMMENT ON COLUMN broker_lease.holder IS 'The connector process''s own id.';

COMMENT ON COLUMN broker_lease.holder_name IS 'Host and process, for people.';

COMMENT ON COLUMN broker_lease.expires_at IS 'When another connector may take it, unless renewed.';

COMMENT ON COLUMN broker_lease.last_heard_at IS 'When the broker was last heard, on our clock.';

COMMENT ON COLUMN broker_lease.clock_skew IS 'Our clock less the broker''s.';

CREATE TABLE command_kind (
    kind text NOT NULL,
    why  text NOT NULL,
    CONSTRAINT command_kind_pkey PRIMARY KEY (kind)
);

COMMENT ON TABLE command_kind IS 'What a broker may be asked.';

INSERT INTO command_kind (kind, why) VALUES
    ('SUBMIT', 'Place an order.'),
    ('MODIFY', 'Change the quantity or prices of an order.'),
    ('CANCEL', 'Cancel an order.'),
    ('WHAT_IF', 'Say what an order would do to the margin.'),
    ('SNAPSHOT', 'Tell all open orders, executions, positions and cash.');

CREATE TABLE broker_command (
    user_id       uuid        NOT NULL,
    account       text        NOT NULL,
    command_id    uuid        NOT NULL DEFAULT gen_random_uuid(),
    priority      smallint    NOT NULL DEFAULT 2,
    kind          text        NOT NULL,
    run_id        uuid,
    order_id      uuid,
    order_version integer,
    payload       jsonb       NOT NULL DEFAULT '{}',
    not_before    timestamptz,
    created_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    claimed_by    uuid,
    claimed_at    timestamptz,
    sent_at       timestamptz,
    done_at       timestamptz,
    outcome       text,
    CONSTRAINT broker_command_pkey PRIMARY KEY (user_id, account, command_id),
    CONSTRAINT broker_command_of_account FOREIGN KEY (user_id, account)
        REFERENCES broker_account (user_id, account) ON DELETE CASCADE,
    CONSTRAINT broker_command_of_order FOREIGN KEY (user_id, run_id, order_id)
        REFERENCES orders (user_id, run_id, order_id) ON DELETE CASCADE,
    CONSTRAINT broker_command_kind_known FOREIGN KEY (kind) REFERENCES command_kind (kind),
    CONSTRAINT broker_command_priority_known CHECK (priority BETWEEN 0 AND 2),
    CONSTRAINT broker_command_names_its_order CHECK (
        CASE WHEN kind IN ('SUBMIT', 'MODIFY', 'CANCEL')
             THEN num_nonnulls(run_id, order_id, order_version) = 3 ELSE true END),
    CONSTRAINT broker_command_claimed_before_sent
        CHECK (sent_at IS NULL OR claimed_by IS NOT NULL),
    CONSTRAINT broker_command_done_has_outcome CHECK ((done_at IS NULL) = (outcome IS NULL)),
    CONSTRAINT broker_command_outcome_known
        CHECK (outcome IN ('SENT', 'WITHDRAWN', 'UNKNOWN', 'NEVER_ARRIVED', 'ARRIVED', 'REFUSED')),
    CONSTRAINT broker_command_payload_is_object CHECK (jsonb_typeof(payload) = 'object')
) WITH (fillfactor = 70);

-- This prevents an order from being submitted twice at one account, whatever goes wrong.
CREATE UNIQUE INDEX broker_command_submit_once
    ON broker_command (user_id, account, order_id) WHERE kind = 'SUBMIT';

-- What a connector has yet to do, in its order.
CREATE INDEX broker_command_waiting_idx
    ON broker_command (user_id, account, priority, created_at) WHERE done_at IS NULL;

-- The commands of an order: its history, and the foreign key's cascade.
CREATE INDEX broker_command_order_idx ON broker_command (user_id, run_id, order_id)
    WHERE order_id IS NOT NULL;

-- What was sent last: a throttle that starts anew looks here.
CREATE INDEX broker_command_sent_idx ON broker_command (user_id, account, sent_at)
    WHERE sent_at IS NOT NULL;

COMMENT ON TABLE broker_command IS 'The outbox: what brokers are to be asked.';

COMMENT ON COLUMN broker_command.priority IS '0: risk and safety. 1: connection. 2: the rest.';

COMMENT ON COLUMN broker_command.order_version IS
    'The version of the order that it is about; an order''s commands go in this order.';

COMMENT ON COLUMN broker_command.not_before IS 'When its session opens; NULL: at once.';

COMMENT ON COLUMN broker_command.claimed_by IS 'The connector that took it, before it sends.';

COMMENT ON COLUMN broker_command.sent_at IS 'When it was written to the wire.';

COMMENT ON COLUMN broker_command.done_at IS 'When nothing more will be done about it.';

COMMENT ON COLUMN broker_command.outcome IS
    'SENT; WITHDRAWN unsent; UNKNOWN whether it arrived; NEVER_ARRIVED or ARRIVED, as the broker '
    'then said; REFUSED by the adapter.';

CREATE TABLE broker_event (
    user_id         uuid        NOT NULL,
    account         text        NOT NULL,
    number          bigint      NOT NULL,
    holder          uuid        NOT NULL,
    kind            text        NOT NULL,
    priority        smallint    NOT NULL DEFAULT 2,
    order_ref       text,
    broker_order_id bigint,
    perm_id         bigint,
    execution_id    text,
    payload         jsonb       NOT NULL DEFAULT '{}',
    event_at        timestamptz NOT NULL,
    received_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    applied_at      timestamptz,
    finding         text,
    code            text,
    note            text,
    CONSTRAINT broker_event_pkey PRIMARY KEY (user_id, account, number),
    CONSTRAINT broker_event_of_account FOREIGN KEY (user_id, account)
        REFERENCES broker_account (user_id, account) ON DELETE CASCADE,
    CONSTRAINT broker_event_number_positive CHECK (number > 0),
    CONSTRAINT broker_event_kind_format
        CHECK (kind ~ '^[A-Z][A-Z0-9_]*$' AND length(kind) <= 63),
    CONSTRAINT broker_event_priority_known CHECK (priority BETWEEN 0 AND 2),
    CONSTRAINT broker_event_payload_is_object CHECK (jsonb_typeof(payload) = 'object'),
    CONSTRAINT broker_event_event_at_in_range CHECK (time_in_range(event_at)),
    CONSTRAINT broker_event_finding_known CHECK (finding IN (
        'NEW', 'REPEAT', 'STALE', 'CORRECTION', 'CONTRADICTION', 'ORPHAN', 'FOREIGN', 'HELD',
        'IGNORED', 'REFUSED')),
    CONSTRAINT broker_event_applied_has_finding
        CHECK ((applied_at IS NULL) = (finding IS NULL))
) WITH (fillfactor = 70);

-- What the engine has yet to apply, in its order.
CREATE INDEX broker_event_waiting_idx ON broker_event (user_id, account, priority, number)
    WHERE applied_at IS NULL;

-- What a broker said of one execution: the proof of ours, and a commission's or bust's other half.
CREATE INDEX broker_event_execution_idx ON broker_event (user_id, account, execution_id)
    WHERE execution_id IS NOT NULL;

-- What a broker said of one order, for people, latencies and orphans.
CREATE INDEX broker_event_order_idx ON broker_event (user_id, account, order_ref)
    WHERE order_ref IS NOT NULL;

COMMENT ON TABLE broker_event IS 'The inbox: what brokers said, as they said it; kept for good.';

COMMENT ON COLUMN broker_event.number IS 'Order of arrival at this account: 1, 2, 3, ...';

COMMENT ON COLUMN broker_event.holder IS 'The connector that heard it.';

COMMENT ON COLUMN broker_event.priority IS '0: risk and safety. 1: connection. 2: the rest.';

COMMENT ON COLUMN broker_event.order_ref IS 'Our order''s id as the broker returned it.';

COMMENT ON COLUMN broker_event.event_at IS 'The broker''s time; it wins over every clock of ours.';

COMMENT ON COLUMN broker_event.finding IS
    'What it turned out to be: NEW; a REPEAT; STALE, of a state long left; a CORRECTION; a '
    'CONTRADICTION; an ORPHAN, of an order that we did not know; FOREIGN, not ours; HELD for a '
    'person, its run having ended; IGNORED; REFUSED.';

COMMENT ON COLUMN broker_event.code IS 'The stable code of what was made of it: LIFE-05 and so on.';

-- Under what ids brokers know our orders. They restart, change and are shared: mappings, not keys.
CREATE TABLE order_broker_id (
    user_id         uuid        NOT NULL,
    run_id          uuid        NOT NULL,
    order_id        uuid        NOT NULL,
    account         text        NOT NULL,
    broker_order_id bigint      NOT NULL DEFAULT 0,
    perm_id         bigint      NOT NULL DEFAULT 0,
    since           timestamptz NOT NULL,
    CONSTRAINT order_broker_id_pkey
        PRIMARY KEY (user_id, run_id, order_id, account, broker_order_id, perm_id),
    CONSTRAINT order_broker_id_of_order FOREIGN KEY (user_id, run_id, order_id)
        REFERENCES orders (user_id, run_id, order_id) ON DELETE CASCADE,
    CONSTRAINT order_broker_id_of_account FOREIGN KEY (user_id, account)
        REFERENCES broker_account (user_id, account),
    CONSTRAINT order_broker_id_names_something CHECK (broker_order_id <> 0 OR perm_id <> 0)
);

-- Whose order a broker's id means.
CREATE INDEX order_broker_id_perm_idx ON order_broker_id (user_id, account, perm_id)
    WHERE perm_id <> 0;

CREATE INDEX order_broker_id_broker_order_idx
    ON order_broker_id (user_id, account, broker_order_id, since) WHERE broker_order_id <> 0;

COMMENT ON TABLE order_broker_id IS 'The ids that brokers gave our orders, each from a time on.';

COMMENT ON COLUMN order_broker_id.perm_id IS 'The broker''s lasting id; 0: none yet.';

COMMENT ON COLUMN order_broker_id.since IS 'The broker''s time at which it was first said.';

-- What a person must know of, until somebody says that he does.
CREATE TABLE alert (
    user_id         uuid        NOT NULL,
    alert_id        uuid        NOT NULL DEFAULT gen_random_uuid(),
    code            text        NOT NULL,
    subject         text        NOT NULL DEFAULT '',
    account         text,
    run_id          uuid,
    message         text        NOT NULL,
    payload         jsonb       NOT NULL DEFAULT '{}',
    raised_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    acknowledged_at timestamptz,
    acknowledged_by text,
    CONSTRAINT alert_pkey PRIMARY KEY (user_id, alert_id),
    CONSTRAINT alert_belongs_to_user
        FOREIGN KEY (user_id) REFERENCES app_user (user_id) ON DELETE CASCADE,
    CONSTRAINT alert_code_format CHECK (code ~ '^[A-Z][A-Z0-9_]*$' AND length(code) <= 63),
    CONSTRAINT alert_words_short CHECK (length(subject) <= 200 AND length(message) <= 2000),
    CONSTRAINT alert_acknowledged_by_somebody
        CHECK ((acknowledged_at IS NULL) = (acknowledged_by IS NULL))
);

-- This prevents the same finding from being raised again before anybody has looked.
CREATE UNIQUE INDEX alert_once_until_acknowledged ON alert (user_id, code, subject)
    WHERE acknowledged_at IS NULL;

COMMENT ON TABLE alert IS 'What a person must know of; open until acknowledged.';

COMMENT ON COLUMN alert.code IS 'The stable code, which the runbook explains.';

-- What a connector needs to place an order, in the broker's neutral words.
CREATE FUNCTION orders_command_payload(o orders) RETURNS jsonb
LANGUAGE sql STABLE
RETURN jsonb_strip_nulls(jsonb_build_object(
    'order_ref', o.order_id, 'symbol', o.symbol, 'side', o.side,
    'quantity', trim_scale(o.quantity)::text, 'order_type', o.order_type,
    'time_in_force', o.time_in_force, 'limit_price', trim_scale(o.limit_price)::text,
    'stop_price', trim_scale(o.stop_price)::text, 'trail_amount', trim_scale(o.trail_amount)::text,
    'trail_percent', trim_scale(o.trail_percent)::text, 'expire_at', event_moment(o.expire_at),
    'broker_order_id', o.broker_order_id, 'perm_id', o.perm_id));

COMMENT ON FUNCTION orders_command_payload IS 'What a command says of its order.';

-- Whose order a broker's words mean: our own reference first; then the lasting id; an id that may
-- restart counts for its trading day only. reused: that id has meant another order before.
CREATE FUNCTION order_of_broker(of_user uuid, of_account text, ref text, of_perm bigint,
                                of_number bigint, at timestamptz,
                                OUT run_id uuid, OUT order_id uuid, OUT reused boolean)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    IF ref ~ '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$' THEN
        SELECT o.run_id, o.order_id INTO run_id, order_id FROM orders o
        WHERE o.user_id = of_user AND o.order_id = ref::uuid AND o.broker <> 'paper';
    END IF;
    IF order_id IS NULL AND of_perm <> 0 THEN
        SELECT m.run_id, m.order_id INTO run_id, order_id FROM order_broker_id m
        WHERE m.user_id = of_user AND m.account = of_account AND m.perm_id = of_perm
        ORDER BY m.since DESC, m.order_id LIMIT 1;
    END IF;
    IF order_id IS NULL AND of_number <> 0 THEN
        SELECT m.run_id, m.order_id INTO run_id, order_id
        FROM order_broker_id m
        JOIN broker_account a ON a.user_id = m.user_id AND a.account = m.account
        WHERE m.user_id = of_user AND m.account = of_account AND m.broker_order_id = of_number
          AND (m.since AT TIME ZONE a.time_zone)::date = (at AT TIME ZONE a.time_zone)::date
          AND coalesce(m.perm_id = of_perm OR m.perm_id = 0, true)
        ORDER BY m.since DESC, m.order_id LIMIT 1;
    END IF;
    reused := of_number <> 0 AND EXISTS (
        SELECT FROM order_broker_id m
        WHERE m.user_id = of_user AND m.account = of_account AND m.broker_order_id = of_number
          AND m.order_id <> order_of_broker.order_id)
        AND NOT EXISTS (
        SELECT FROM order_broker_id m
        WHERE m.user_id = of_user AND m.account = of_account AND m.broker_order_id = of_number
          AND m.order_id = order_of_broker.order_id);
END $$;

COMMENT ON FUNCTION order_of_broker IS
    'The order that a broker''s reference and ids mean, and whether its id has been reused.';

-- Whether an account trades now, and when next. Hours of its own win over its calendar; a calendar
-- of which no sessions are known closes nothing.
CREATE FUNCTION account_hours(of_user uuid, of_account text, at timestamptz,
                              OUT is_open boolean, OUT opens_at timestamptz)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    a     broker_account;
    today date;
BEGIN
    SELECT * INTO a FROM broker_account WHERE user_id = of_user AND account = of_account;
    IF a.opens_at IS NOT NULL THEN
        today := (at AT TIME ZONE a.time_zone)::date;
        SELECT bool_or(at >= h.from_at AND at < h.until_at),
               min(h.from_at) FILTER (WHERE h.from_at > at)
        INTO is_open, opens_at
        FROM generate_series(-1, 1) d
        CROSS JOIN LATERAL (SELECT
            (today + d + a.opens_at) AT TIME ZONE a.time_zone AS from_at,
            (today + d + CASE WHEN a.closes_at < a.opens_at THEN 1 ELSE 0 END + a.closes_at)
                AT TIME ZONE a.time_zone AS until_at) h;
        RETURN;
    END IF;
    SELECT bool_or(at >= s.open_at AND at < s.close_at),
           min(s.open_at) FILTER (WHERE s.open_at > at)
    INTO is_open, opens_at FROM calendar_session s
    WHERE s.calendar = a.calendar
      AND s.session_date BETWEEN (at AT TIME ZONE 'UTC')::date - 10
                             AND (at AT TIME ZONE 'UTC')::date + 10;
    is_open := coalesce(is_open, true);
END $$;

COMMENT ON FUNCTION account_hours IS
    'Whether an account''s hours or calendar are open at a moment, and when they open next.';

-- Outside the hours an order waits in our own book, or is refused, as the account says. The gate
-- comes first: what it refuses needs no hours.
CREATE FUNCTION orders_meet_hours() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    hours  record;
    policy text;
BEGIN
    hours := account_hours(NEW.user_id, NEW.account, clock_timestamp());
    IF hours.is_open THEN
        RETURN NEW;
    END IF;
    SELECT out_of_session INTO policy FROM broker_account
    WHERE user_id = NEW.user_id AND account = NEW.account;
    IF policy = 'QUEUE' THEN
        NEW.status := 'PENDING';
        NEW.status_reason := 'OUT_OF_SESSION';
    ELSE
        NEW.status := 'REJECTED';
        NEW.reject_source := 'COMPLIANCE';
        NEW.reject_code := 'MARKET_CLOSED';
        NEW.status_reason := format('MARKET_CLOSED: %s opens at %s', NEW.account,
                                    coalesce(event_moment(hours.opens_at)::text, 'no known time'));
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION orders_meet_hours IS
    'Trigger: what comes outside its account''s hours waits or is refused.';

CREATE TRIGGER orders_c_meet_hours BEFORE INSERT ON orders
    FOR EACH ROW WHEN (NEW.status = 'NEW' AND NEW.broker <> 'paper' AND NOT NEW.recovered)
    EXECUTE FUNCTION orders_meet_hours();

-- An order that lives at a broker is on its way with the row itself: whoever inserts it has sent it.
CREATE FUNCTION orders_send() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO broker_command (user_id, account, priority, kind, run_id, order_id, order_version,
                                payload, not_before)
    VALUES (NEW.user_id, NEW.account, CASE WHEN NEW.purpose = 'FLATTEN' THEN 0 ELSE 2 END,
            'SUBMIT', NEW.run_id, NEW.order_id, NEW.version, orders_command_payload(NEW),
            CASE WHEN NEW.status_reason = 'OUT_OF_SESSION'
                 THEN (account_hours(NEW.user_id, NEW.account, clock_timestamp())).opens_at END);
    RETURN NULL;
END $$;

COMMENT ON FUNCTION orders_send IS 'Trigger: an order for a broker goes into the outbox.';

CREATE TRIGGER orders_m_send AFTER INSERT ON orders
    FOR EACH ROW WHEN (NEW.broker <> 'paper' AND NOT NEW.recovered
                       AND NEW.status = ANY ('{NEW,PENDING}'))
    EXECUTE FUNCTION orders_send();

-- A cancel goes with the move that announces it. What was not yet taken by a connector never goes.
CREATE FUNCTION orders_send_move() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF NEW.status = 'PENDING_CANCEL' THEN
        INSERT INTO broker_command (user_id, account, priority, kind, run_id, order_id,
                                    order_version, payload)
        VALUES (NEW.user_id, NEW.account,
                CASE WHEN NEW.status_reason ~ '^(HALT|KILL_SWITCH|FLATTEN|RUN_)' THEN 0 ELSE 2 END,
                'CANCEL', NEW.run_id, NEW.order_id, NEW.version, orders_command_payload(NEW));
    ELSIF NEW.status IN ('CANCELED', 'EXPIRED', 'REJECTED') THEN
        UPDATE broker_command SET done_at = clock_timestamp(), outcome = 'WITHDRAWN'
        WHERE user_id = NEW.user_id AND run_id = NEW.run_id AND order_id = NEW.order_id
          AND claimed_by IS NULL AND done_at IS NULL;
    ELSIF NEW.status = 'PENDING_MODIFY' AND NOT EXISTS (
        SELECT FROM broker_command c
        WHERE c.user_id = NEW.user_id AND c.run_id = NEW.run_id AND c.order_id = NEW.order_id
          AND c.kind = 'MODIFY' AND c.order_version = NEW.version) THEN
        RAISE EXCEPTION 'order % is modified by nothing', NEW.order_id
            USING ERRCODE = '23T08', CONSTRAINT = 'orders_modified_by_command', TABLE = 'orders',
                  COLUMN = 'status', HINT = 'Call order_modify(); it sends what to modify.';
    END IF;
    RETURN NULL;
END $$;

COMMENT ON FUNCTION orders_send_move IS
    'Trigger: a cancel goes into the outbox; what is over there is withdrawn, if it has not gone.';

CREATE TRIGGER orders_m_send_move AFTER UPDATE ON orders
    FOR EACH ROW WHEN (NEW.broker <> 'paper' AND NEW.status IS DISTINCT FROM OLD.status
        AND NEW.status = ANY ('{PENDING_CANCEL,PENDING_MODIFY,CANCELED,EXPIRED,REJECTED}'))
    EXECUTE FUNCTION orders_send_move();

-- The proof of new terms: a command that was given in due form asks for just these.
CREATE FUNCTION orders_follows_command(was orders, now_is orders) RETURNS boolean
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT now_is.reference_price IS NOT DISTINCT FROM was.reference_price AND EXISTS (
        SELECT FROM broker_command c
        WHERE c.user_id = was.user_id AND c.run_id = was.run_id AND c.order_id = was.order_id
          AND (c.kind = 'MODIFY' AND c.sent_at IS NOT NULL
               OR c.kind = 'SUBMIT' AND c.claimed_by IS NULL)
          AND (c.payload ->> 'quantity')::numeric = now_is.quantity
          AND (c.payload ->> 'limit_price')::numeric IS NOT DISTINCT FROM now_is.limit_price
          AND (c.payload ->> 'stop_price')::numeric IS NOT DISTINCT FROM now_is.stop_price
          AND (c.payload ->> 'trail_amount')::numeric IS NOT DISTINCT FROM now_is.trail_amount)
$$;

COMMENT ON FUNCTION orders_follows_command IS
    'Whether an order''s new terms are those of a command, sent to modify it or not yet gone.';

-- Another account takes over only what certainly never reached the first.
CREATE FUNCTION orders_may_reroute(was orders) RETURNS boolean
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT was.status IN ('NEW', 'PENDING') AND was.filled_quantity = 0 AND EXISTS (
        SELECT FROM broker_command c
        WHERE c.user_id = was.user_id AND c.account = was.account AND c.order_id = was.order_id
          AND c.kind = 'SUBMIT' AND c.outcome IN ('WITHDRAWN', 'NEVER_ARRIVED'))
$$;

COMMENT ON FUNCTION orders_may_reroute IS
    'Whether an order certainly never reached the account that it was for.';

-- Cancels an order of any broker. Returns what it came to: CANCELED at once, PENDING_CANCEL where
-- the broker has it, CANCEL_IGNORED where there is nothing left to cancel.
CREATE FUNCTION order_cancel(of_user uuid, of_run uuid, of_order uuid, why text DEFAULT 'USER',
                             at timestamptz DEFAULT NULL)
RETURNS text LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    o     orders;
    later text := 'CANCELED';
BEGIN
    PERFORM run_lock(of_user, of_run, 'orders', 'RUNNING', 'STOPPING');
    SELECT * INTO o FROM orders
    WHERE user_id = of_user AND run_id = of_run AND order_id = of_order FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'run % has no order %', of_run, of_order
            USING ERRCODE = 'foreign_key_violation', CONSTRAINT = 'order_is_of_run',
                  TABLE = 'orders', COLUMN = 'order_id', HINT = 'oms order list shows the orders.';
    ELSIF o.status IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED', 'PENDING_CANCEL') THEN
        -- The second of two cancels, or one that a fill has overtaken: a fact, no fault.
        INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
        VALUES (of_user, of_run, coalesce(at, run_last_time(of_user, of_run)), 'CANCEL_IGNORED',
                of_order || '@' || o.version, jsonb_build_object('status', o.status, 'why', why))
        ON CONFLICT DO NOTHING;
        RETURN 'CANCEL_IGNORED';
    END IF;
    IF o.broker <> 'paper' THEN
        -- A connector that is just taking it is waited for.
        PERFORM FROM broker_command
        WHERE user_id = of_user AND run_id = of_run AND order_id = of_order AND kind = 'SUBMIT'
          AND account = o.account FOR UPDATE;
        IF EXISTS (SELECT FROM broker_command
                   WHERE user_id = of_user AND run_id = of_run AND order_id = of_order
                     AND kind = 'SUBMIT' AND account = o.account AND claimed_by IS NOT NULL
                     AND outcome IS DISTINCT FROM 'NEVER_ARRIVED') OR o.recovered THEN
            later := 'PENDING_CANCEL';
        END IF;
    END IF;
    UPDATE orders SET status = later, status_reason = why, status_at = coalesce(at, status_at)
    WHERE user_id = of_user AND run_id = of_run AND order_id = of_order;
    RETURN later;
END $$;

COMMENT ON FUNCTION order_cancel IS
    'Cancels an order: CANCELED, PENDING_CANCEL at its broker, or CANCEL_IGNORED if it is over.';

-- Changes an order's quantity or prices; a NULL leaves what it is. What has not gone yet is changed
-- at once, what a broker works when the broker says so. The gate is asked as for a new order.
CREATE FUNCTION order_modify(of_user uuid, of_run uuid, of_order uuid, at_version integer,
                             new_quantity numeric DEFAULT NULL, new_limit numeric DEFAULT NULL,
                             new_stop numeric DEFAULT NULL)
RETURNS text LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    was     orders;
    wanted  orders;
    refusal text;
BEGIN
    PERFORM run_lock(of_user, of_run, 'orders', 'RUNNING');
    SELECT * INTO was FROM orders
    WHERE user_id = of_user AND run_id = of_run AND order_id = of_order FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'run % has no order %', of_run, of_order
            USING ERRCODE = 'foreign_key_violation', CONSTRAINT = 'order_is_of_run',
                  TABLE = 'orders', COLUMN = 'order_id', HINT = 'oms order list shows the orders.';
    ELSIF at_version <> was.version THEN
        RAISE EXCEPTION 'order % is at version %, not %', of_order, was.version, at_version
            USING ERRCODE = '23T09', CONSTRAINT = 'orders_version_seen', TABLE = 'orders',
                  COLUMN = 'version', HINT = 'Look at it again, then decide again.';
    ELSIF was.broker = 'paper' OR was.status NOT IN ('NEW', 'PENDING', 'PENDING_SUBMIT', 'ROUTED',
                                                    'PARTIALLY_FILLED') THEN
        RAISE EXCEPTION 'order % is % at %, so it can not be modified', of_order, was.status,
            was.broker
            USING ERRCODE = '23T09', CONSTRAINT = 'orders_terms_fixed', TABLE = 'orders',
                  HINT = 'Cancel it and place another.';
    END IF;
    wanted := was;
    wanted.quantity := coalesce(new_quantity, was.quantity);
    wanted.limit_price := coalesce(new_limit, was.limit_price);
    wanted.stop_price := coalesce(new_stop, was.stop_price);
    refusal := order_modify_refusal(was, wanted);
    IF refusal IS NOT NULL THEN
        INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
        VALUES (of_user, of_run, run_last_time(of_user, of_run), 'MODIFY_REFUSED',
                of_order || '@' || was.version, jsonb_build_object('reason', refusal))
        ON CONFLICT DO NOTHING;
        RETURN refusal;
    END IF;
    RETURN order_modify_send(was, wanted);
END $$;

COMMENT ON FUNCTION order_modify IS
    'Modifies an order: MODIFIED if it had not gone, PENDING_MODIFY at its broker, or the reason '
    'of a refusal. Raises unless at_version is the order''s.';

CREATE FUNCTION order_modify_refusal(was orders, wanted orders) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    run     record;
    held    numeric;
    refusal record;
BEGIN
    IF wanted.quantity <= was.filled_quantity THEN
        RETURN format('QUANTITY_BELOW_FILLED: %s are filled', trim_scale(was.filled_quantity));
    END IF;
    SELECT r.cash, r.account_type INTO run FROM strategy_run r
    WHERE r.user_id = was.user_id AND r.run_id = was.run_id;
    SELECT p.quantity INTO held FROM position p
    WHERE p.user_id = was.user_id AND p.run_id = was.run_id AND p.symbol = was.symbol;
    -- What is left of it would be ordered anew; what it holds back today does not count.
    wanted.quantity := wanted.quantity - was.filled_quantity;
    refusal := orders_gate(
        wanted, run.account_type, EXISTS (SELECT FROM risk_limit l WHERE l.user_id = was.user_id),
        run.cash - run_reserved_cash(was.user_id, was.run_id) + was.reserved_cash,
        coalesce(held, 0) + orders_open_quantity(was)
        - (was.quantity - was.filled_quantity)
          * CASE WHEN was.side = 'BUY' THEN 1 ELSE -1 END);
    RETURN coalesce(refusal.reason, refusal.code);
END $$;

COMMENT ON FUNCTION order_modify_refusal IS 'Why an order may not have new terms, or NULL.';

CREATE FUNCTION order_modify_send(was orders, wanted orders) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE broker_command SET payload = orders_command_payload(wanted)
    WHERE user_id = was.user_id AND account = was.account AND order_id = was.order_id
      AND kind = 'SUBMIT' AND claimed_by IS NULL AND done_at IS NULL;
    IF FOUND THEN
        UPDATE orders SET quantity = wanted.quantity, limit_price = wanted.limit_price,
                          stop_price = wanted.stop_price
        WHERE user_id = was.user_id AND run_id = was.run_id AND order_id = was.order_id;
        RETURN 'MODIFIED';
    END IF;
    INSERT INTO broker_command (user_id, account, kind, run_id, order_id, order_version, payload)
    VALUES (was.user_id, was.account, 'MODIFY', was.run_id, was.order_id, was.version + 1,
            orders_command_payload(wanted));
    UPDATE orders SET status = 'PENDING_MODIFY'
    WHERE user_id = was.user_id AND run_id = was.run_id AND order_id = was.order_id;
    RETURN 'PENDING_MODIFY';
END $$;

COMMENT ON FUNCTION order_modify_send IS
    'Changes what has not gone yet, or sends the change of what has.';

-- New terms are told, so that the ledger always knows what is worked.
CREATE FUNCTION orders_record_terms() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
    VALUES (NEW.user_id, NEW.run_id, run_last_time(NEW.user_id, NEW.run_id), 'ORDER_MODIFIED',
            orders_event_subject(NEW), orders_event_payload(NEW));
    RETURN NULL;
END $$;

COMMENT ON FUNCTION orders_record_terms IS 'Trigger: tells the ledger of an order''s new terms.';

CREATE TRIGGER orders_m_record_terms AFTER UPDATE ON orders
    FOR EACH ROW WHEN (NEW.broker <> 'paper'
        AND (NEW.quantity, NEW.limit_price, NEW.stop_price, NEW.trail_amount, NEW.account)
            IS DISTINCT FROM
            (OLD.quantity, OLD.limit_price, OLD.stop_price, OLD.trail_amount, OLD.account))
    EXECUTE FUNCTION orders_record_terms();

-- A run that ends asks its orders back. It may call itself STOPPED only when they are over.
CREATE FUNCTION orders_ask_back(of_user uuid, of_run uuid, run_becomes text) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    o orders;
BEGIN
    FOR o IN SELECT * FROM orders
             WHERE user_id = of_user AND run_id = of_run
               AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED', 'PENDING_CANCEL')
             ORDER BY order_id
    LOOP
        PERFORM order_cancel(of_user, of_run, o.order_id, 'RUN_' || run_becomes);
    END LOOP;
    IF run_becomes = 'STOPPED' AND EXISTS (
        SELECT FROM orders
        WHERE user_id = of_user AND run_id = of_run
          AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')) THEN
        RAISE EXCEPTION 'run % has orders at its broker', of_run
            USING ERRCODE = '23T02', CONSTRAINT = 'strategy_run_orders_settled',
                  TABLE = 'strategy_run', COLUMN = 'status',
                  HINT = 'Move it to STOPPING; it is STOPPED when the last order is settled.';
    END IF;
END $$;

COMMENT ON FUNCTION orders_ask_back IS
    'Cancels a run''s orders at its brokers; refuses STOPPED while one is not settled.';

CREATE TRIGGER orders_b_pass_gate BEFORE INSERT ON orders
    FOR EACH ROW WHEN (NEW.status <> ALL ('{REJECTED,FILLED}') AND NOT NEW.recovered)
    EXECUTE FUNCTION orders_pass_gate();

CREATE VIEW audit_cash AS
    SELECT r.user_id, r.run_id, 'cash' AS subject,
           format('is %s, the executions make it %s', r.cash,
                  r.initial_cash + coalesce(e.flow, 0) - coalesce(c.cost, 0)) AS finding
    FROM strategy_run r
    LEFT JOIN (SELECT user_id, run_id,
                      sum(execution_cash_flow(side, quantity, price, commission)) AS flow
               FROM execution GROUP BY user_id, run_id) e
        ON e.user_id = r.user_id AND e.run_id = r.run_id
    LEFT JOIN (SELECT user_id, run_id, sum(cost) AS cost FROM execution_commission
               GROUP BY user_id, run_id) c
        ON c.user_id = r.user_id AND c.run_id = r.run_id
    WHERE r.cash <> r.initial_cash + coalesce(e.flow, 0) - coalesce(c.cost, 0)
    UNION ALL
    SELECT user_id, run_id, 'cash', format('is %s in a cash account', cash)
    FROM strategy_run WHERE account_type = 'CASH' AND broker = 'paper' AND cash < 0
    UNION ALL
    SELECT r.user_id, r.run_id, 'books_seq',
           format('is %s, the last event that the books follow is %s', r.books_seq,
                  coalesce(l.seq, 0))
    FROM strategy_run r
    LEFT JOIN (SELECT user_id, run_id, max(seq) AS seq FROM event_ledger
               WHERE event_type IN ('EXECUTION', 'COMMISSION', 'SPLIT_APPLIED') GROUP BY user_id, run_id) l
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
        WHERE l.event_type IN ('EXECUTION', 'COMMISSION', 'TICK')) c
    WHERE c.event_type = 'TICK' AND (c.payload ->> 'cash')::numeric <> c.cash;

COMMENT ON VIEW audit_mark IS 'Marks and ticks that are not what the books make them.';

-- Named one by one, since other people's tables may be in the schema too.
CREATE OR REPLACE FUNCTION our_relations() RETURNS text[]
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT ARRAY[
        'alert', 'app_user', 'broker_account', 'broker_command', 'broker_event', 'broker_lease',
        'calendar_session', 'command_kind', 'corporate_action', 'engine_state', 'engine_status',
        'event_ledger', 'execution', 'execution_commission', 'execution_cost', 'fx_rate', 'instrument', 'mtm_ledger',
        'order_broker_id', 'order_status',
        'order_transition', 'orders', 'pnl_daily', 'position', 'position_pnl', 'price_bar', 'risk_limit',
        'run_route', 'run_status',
        'run_transition', 'sip_plan', 'split_applied', 'strategy_run',
        'paper_order', 'paper_trade', 'paper_position', 'paper_equity_curve',
        'audit_cash', 'audit_chain', 'audit_duplicate', 'audit_event', 'audit_guard',
        'audit_mark', 'audit_order', 'audit_orphan', 'audit_position', 'audit_running']
        -- Not there in a database that was built from sql/.
        || CASE WHEN to_regclass('public.alembic_version') IS NULL THEN '{}'
                ELSE '{alembic_version}'::text[] END
$$;

-- What the ledger tells of each order, from its placing or its last restatement.
CREATE VIEW audit_event AS
    SELECT o.user_id, o.run_id, 'order ' || o.order_id AS subject,
           CASE WHEN t.payload IS NULL THEN 'has no event of its placing'
                ELSE format('is not what its event tells: %s', t.payload) END AS finding
    FROM orders o
    LEFT JOIN (SELECT DISTINCT ON (user_id, run_id, event_order_id(subject))
                      user_id, run_id, event_order_id(subject) AS order_id, payload
               FROM event_ledger
               WHERE event_type IN ('ORDER_PLACED', 'ORDER_REJECTED', 'ORDER_RESTATED',
                                    'ORDER_MODIFIED')
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
                        AND (l.subject = o.order_id::text
                             OR o.broker <> 'paper' AND event_order_id(l.subject) = o.order_id))
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
    SELECT coalesce(c.user_id, l.user_id), coalesce(c.run_id, l.run_id),
           coalesce('commission of ' || c.execution_id, 'event_ledger ' || l.seq),
           CASE WHEN l.seq IS NULL THEN 'has no event, or one that says otherwise'
                ELSE 'tells of a commission that is not there' END
    FROM execution_commission c
    FULL JOIN (SELECT * FROM event_ledger WHERE event_type = 'COMMISSION') l
        ON l.user_id = c.user_id AND l.run_id = c.run_id AND l.subject = c.execution_id
       AND l.logical_time = c.logical_time AND l.payload = execution_commission_payload(c)
    WHERE c.run_id IS NULL OR l.run_id IS NULL
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
        ('oms_engine', 'EXECUTE ON FUNCTION ticks_write'),
        ('oms_engine', 'INSERT, UPDATE (currency, opening_cash, calendar, time_zone, opens_at,
            closes_at, out_of_session, orders_per_second, messages_per_second, heartbeat_seconds,
            stale_seconds, settings) ON broker_account'),
        ('oms_engine', 'INSERT ON run_route'),
        ('oms_engine', 'INSERT (user_id, account, command_id, priority, kind, payload),
            UPDATE (done_at, outcome) ON broker_command'),
        ('oms_engine', 'UPDATE (applied_at, finding, code, note) ON broker_event'),
        ('oms_engine', 'INSERT ON order_broker_id'),
        ('oms_engine', 'INSERT (user_id, run_id, execution_id, amount, currency, event_at)
            ON execution_commission'),
        ('oms_engine', 'INSERT, UPDATE (acknowledged_at, acknowledged_by) ON alert'),
        ('oms_connector', 'USAGE ON SCHEMA public'),
        ('oms_connector', 'SELECT ON instrument, calendar_session'),
        ('oms_auditor', 'USAGE ON SCHEMA public')
$$;

UPDATE order_status SET why = 'The broker has it and has not confirmed it.'
WHERE status = 'PENDING_SUBMIT';

INSERT INTO order_transition (from_status, to_status, why) VALUES
    ('NEW', 'PENDING_CANCEL', 'A cancel follows a submit that has no answer yet.'),
    ('PENDING', 'PENDING_CANCEL', 'A cancel follows a submit that has no answer yet.'),
    ('PENDING', 'NEW', 'Released to be sent.'),
    ('PARTIALLY_FILLED', 'ROUTED', 'A bust took all fills back.'),
    ('FILLED', 'PARTIALLY_FILLED', 'A bust took a fill back.'),
    ('FILLED', 'ROUTED', 'A bust took all fills back.'),
    ('CANCELED', 'ROUTED', 'The cancel was a guess; the broker works it.');

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
