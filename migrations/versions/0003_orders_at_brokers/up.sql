-- Orders live at brokers: accounts, outbox and inbox, moves that a broker causes, commissions,
-- halts, limits, reconciliation. Guards are replaced in one transaction, so that nothing gets past
-- them meanwhile.
-- squawk-ignore-file ban-drop-constraint, ban-drop-function, ban-drop-view, ban-drop-default, constraint-missing-not-valid, adding-foreign-key-constraint, require-concurrent-index-creation, require-concurrent-index-deletion, prefer-bigint-over-int, prefer-bigint-over-smallint, adding-required-field, prefer-robust-stmts, ban-drop-column, ban-drop-table, disallowed-unique-constraint

SET LOCAL lock_timeout = '30s';
SET LOCAL statement_timeout = '1h';

DROP VIEW audit_event;

DROP VIEW audit_mark;

DROP VIEW audit_cash;

DROP VIEW audit_order;

DROP VIEW audit_orphan;

DROP TRIGGER orders_b_pass_gate ON orders;

ALTER TABLE strategy_run
    DROP CONSTRAINT strategy_run_cash_not_negative_in_cash_account;

ALTER TABLE execution
    DROP CONSTRAINT execution_quantity_positive;

ALTER TABLE event_ledger
    DROP CONSTRAINT event_ledger_logical_time_in_range;

ALTER TABLE risk_limit
    DROP CONSTRAINT risk_limit_kind_known,
    DROP CONSTRAINT risk_limit_has_what_its_kind_needs;

DROP INDEX event_ledger_books_idx;

DROP FUNCTION orders_gate;

DROP FUNCTION orders_broken_limit;

-- Who trades: people and services. Everything that belongs to somebody carries user_id first in
-- its keys, which isolates users and lets the schema be sharded by user_id.

-- What CHECKs ask, here and in other files, is short in the catalog: every statement that writes a
-- row reads the CHECKs of its table anew. A rule of some length is therefore a function in plpgsql,
-- which is read once a session; NULL asks nothing, as in any CHECK, and STRICT does not even call
-- it. And a pattern leaves lengths to length(): {0,31} has the matcher count, which costs more than
-- all the rest.

-- Infinity and years that no program's calendar has would stop whoever reads the row next.
CREATE OR REPLACE FUNCTION time_in_range(moment timestamptz) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE STRICT SET search_path = public, pg_temp AS $$
BEGIN
    RETURN moment BETWEEN '0001-01-02 00:00Z' AND '9999-12-30 00:00Z';
END $$;

-- NaN and infinity are above every limit, and what has no end has too many decimals.
CREATE OR REPLACE FUNCTION decimal_in_range(number numeric, below numeric, decimals integer) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE STRICT SET search_path = public, pg_temp AS $$
BEGIN
    RETURN abs(number) < below AND min_scale(number) <= decimals;
END $$;

CREATE OR REPLACE FUNCTION amount_in_range(amount numeric) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE STRICT SET search_path = public, pg_temp AS $$
BEGIN
    RETURN abs(amount) < 1e15 AND min_scale(amount) <= 8;
END $$;

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
    CONSTRAINT broker_account_time_zone_known
        CHECK (timezone(time_zone, timestamptz '2000-01-01 00:00Z') IS NOT NULL),
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
    'Begin of the hours in time_zone, on every day of the week; NULL: the calendar''s sessions.';

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
    user_id    uuid    NOT NULL,
    run_id     uuid    NOT NULL,
    preference integer NOT NULL DEFAULT 1,
    account    text    NOT NULL,
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

CREATE FUNCTION run_route_check_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM strategy_run r
               JOIN broker_account a ON a.user_id = r.user_id AND a.account = NEW.account
               WHERE r.user_id = NEW.user_id AND r.run_id = NEW.run_id
                 AND a.broker <> r.broker) THEN
        RAISE EXCEPTION 'account % is not at the broker of run %', NEW.account, NEW.run_id
            USING ERRCODE = '23T08', CONSTRAINT = 'run_route_at_runs_broker', TABLE = 'run_route',
                  COLUMN = 'account', HINT = 'Route a run to accounts at its own broker.';
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION run_route_check_write IS
    'Trigger: a run''s orders go to accounts at its own broker.';

CREATE TRIGGER run_route_a_check_write BEFORE INSERT OR UPDATE ON run_route
    FOR EACH ROW EXECUTE FUNCTION run_route_check_write();

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
    ADD CONSTRAINT orders_account_unless_paper CHECK (
        CASE WHEN broker <> 'paper' THEN account IS NOT NULL
        ELSE num_nonnulls(account, broker_order_id, perm_id) = 0
        AND NOT recovered AND NOT pending_reconcile END),
    ADD CONSTRAINT orders_purpose_known CHECK (purpose = 'FLATTEN');

-- What a broker returns is our order's id alone: the inbox looks up whose it is, so this prevents
-- two runs from having the same order at a broker.
CREATE UNIQUE INDEX orders_id_once_at_brokers ON orders (user_id, order_id) WHERE broker <> 'paper';

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

CREATE OR REPLACE FUNCTION orders_keeps_terms(was orders, now_is orders) RETURNS boolean
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

-- What a paper order may not do although the table of moves, which is for every broker, allows it:
-- come back from its end. Our own book has no late messages. Nor does an order come back that we
-- refused ourselves: no broker has ever heard of it.
CREATE OR REPLACE FUNCTION orders_check_move() RETURNS trigger
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

-- What open orders hold back: the cash of buys, the units of either side. The gate asks for it at
-- every new order, and must not read ten thousand open orders for an answer. So open orders are
-- dealt into buckets by their ids, and what a bucket comes to is kept until one of its orders
-- changes. What is not known is read from the orders themselves, so that it is never wrong; what is
-- known was proven, whoever wrote it.

-- Ids are made in more ways than one, and those of a run are much alike: only a hash deals evenly.
-- The cost has a planner without statistics take the index of buckets, not any index of the run.
CREATE FUNCTION order_bucket(order_id uuid) RETURNS integer
LANGUAGE plpgsql IMMUTABLE COST 1000 SET search_path = public, pg_temp AS $$
BEGIN
    RETURN get_byte(sha256(uuid_send(order_id)), 0) / 2;
END $$;

COMMENT ON FUNCTION order_bucket IS 'The bucket, 0 to 127, in which an open order is summed.';

-- The last condition is always true. Who does not say it, as those who only ask for open orders do
-- not, is never given this index for another.
CREATE INDEX orders_open_bucket_idx ON orders (user_id, run_id, order_bucket(order_id))
    WHERE status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
      AND order_bucket(order_id) >= 0;

CREATE TABLE open_order_sum (
    user_id  uuid    NOT NULL,
    run_id   uuid    NOT NULL,
    kind     text    NOT NULL,
    symbol   text    NOT NULL DEFAULT '',
    bucket   integer NOT NULL,
    is_known boolean NOT NULL DEFAULT true,
    amount   numeric,
    CONSTRAINT open_order_sum_pkey PRIMARY KEY (user_id, run_id, kind, symbol, bucket),
    CONSTRAINT open_order_sum_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT open_order_sum_kind_known CHECK (kind = ANY ('{CASH,BUY,SELL}')),
    CONSTRAINT open_order_sum_symbol_unless_cash CHECK ((kind = 'CASH') = (symbol = '')),
    CONSTRAINT open_order_sum_bucket_in_range CHECK (bucket BETWEEN 0 AND 127),
    CONSTRAINT open_order_sum_amount_if_known CHECK ((amount IS NOT NULL) = is_known),
    CONSTRAINT open_order_sum_amount_in_range CHECK (abs(amount) < 1e40)
) WITH (fillfactor = 50);

COMMENT ON TABLE open_order_sum IS
    'What the open orders of each bucket come to, where they are so many that it is worth knowing.';

COMMENT ON COLUMN open_order_sum.kind IS
    'CASH: what buys reserve, in currency. BUY, SELL: units of a symbol not yet filled.';

COMMENT ON COLUMN open_order_sum.symbol IS 'The symbol of units; empty for cash.';

COMMENT ON COLUMN open_order_sum.bucket IS 'That of its orders'' ids (order_bucket).';

COMMENT ON COLUMN open_order_sum.is_known IS
    'Until an order of the bucket changes, which is to be read from then on.';

COMMENT ON COLUMN open_order_sum.amount IS
    'Computed by the database, if it is known; NULL asks for it.';

CREATE FUNCTION open_orders_read(of_user uuid, of_run uuid, of_kind text, of_symbol text,
                                 of_buckets integer[], OUT amount numeric, OUT orders bigint)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp
SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    IF of_buckets IS NOT NULL THEN
        SELECT coalesce(sum(s.amount), 0), coalesce(sum(s.orders), 0) INTO amount, orders
        FROM unnest(of_buckets) b
        CROSS JOIN LATERAL (
            SELECT sum(CASE WHEN of_kind = 'CASH' THEN o.reserved_cash
                            WHEN o.symbol = of_symbol AND o.side = of_kind
                            THEN o.quantity - o.filled_quantity END) AS amount,
                   count(*) AS orders
            FROM orders o
            WHERE o.user_id = of_user AND o.run_id = of_run AND order_bucket(o.order_id) = b
              AND order_bucket(o.order_id) >= 0
              AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')) s;
    ELSIF of_kind = 'CASH' THEN
        SELECT coalesce(sum(o.reserved_cash), 0), count(*) INTO amount, orders FROM orders o
        WHERE o.user_id = of_user AND o.run_id = of_run
          AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED');
    ELSE
        SELECT coalesce(sum(o.quantity - o.filled_quantity) FILTER (WHERE o.side = of_kind), 0),
               count(*)
        INTO amount, orders FROM orders o
        WHERE o.user_id = of_user AND o.run_id = of_run AND o.symbol = of_symbol
          AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED');
    END IF;
END $$;

COMMENT ON FUNCTION open_orders_read IS
    'What open orders hold back of a kind, and how many were read for it: those of some buckets, '
    'or all (NULL).';

-- The proof is read after the run is locked, so that every order of it is there to be seen; a
-- transaction that sees an older state for as long as it lasts can prove nothing.
CREATE FUNCTION open_order_sum_check_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    due record;
BEGIN
    PERFORM run_lock(NEW.user_id, NEW.run_id, 'open_order_sum', 'RUNNING', 'STOPPING');
    IF TG_OP = 'UPDATE' THEN
        PERFORM row_check_keeps_run(OLD.user_id, OLD.run_id, NEW.user_id, NEW.run_id,
                                    'open_order_sum');
    END IF;
    due := open_orders_read(NEW.user_id, NEW.run_id, NEW.kind, NEW.symbol, ARRAY[NEW.bucket]);
    IF NEW.amount IS NULL THEN
        NEW.amount := due.amount;
    END IF;
    IF NEW.amount <> due.amount
       OR current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'what open orders hold back follows from them: %, not %', due.amount,
            NEW.amount
            USING ERRCODE = '23T04', CONSTRAINT = 'open_order_sum_from_orders',
                  TABLE = 'open_order_sum', COLUMN = 'amount',
                  HINT = 'Leave amount NULL, in READ COMMITTED; the database computes it.';
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION open_order_sum_check_write IS
    'Trigger: a sum that is known is what the open orders of its bucket come to.';

-- That something is not known needs no proof.
CREATE TRIGGER open_order_sum_a_check_write BEFORE INSERT OR UPDATE ON open_order_sum
    FOR EACH ROW WHEN (NEW.is_known) EXECUTE FUNCTION open_order_sum_check_write();

-- Before the order is there, so that the gate sees what came before it in the same statement.
CREATE FUNCTION orders_forget_sums() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET enable_seqscan = off AS $$
BEGIN
    UPDATE open_order_sum SET is_known = false, amount = NULL
    WHERE user_id = NEW.user_id AND run_id = NEW.run_id
      AND kind = ANY (ARRAY[NEW.side, CASE WHEN NEW.side = 'BUY' THEN 'CASH' END])
      AND symbol = ANY (ARRAY[NEW.symbol, '']) AND bucket = order_bucket(NEW.order_id)
      AND is_known;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION orders_forget_sums IS
    'Trigger: what an order''s bucket comes to is not known when what it holds back changes.';

-- After the gate and whatever else changes what is asked for. Acknowledgements change nothing here.
CREATE TRIGGER orders_c_forget_insert BEFORE INSERT ON orders
    FOR EACH ROW WHEN (NEW.status <> ALL ('{REJECTED,FILLED}'))
    EXECUTE FUNCTION orders_forget_sums();

CREATE TRIGGER orders_c_forget_update BEFORE UPDATE ON orders
    FOR EACH ROW WHEN (
        (NEW.status = ANY ('{FILLED,CANCELED,REJECTED,EXPIRED}'))
            <> (OLD.status = ANY ('{FILLED,CANCELED,REJECTED,EXPIRED}'))
        OR (NEW.quantity, NEW.filled_quantity, NEW.limit_price, NEW.stop_price, NEW.reference_price)
           IS DISTINCT FROM
           (OLD.quantity, OLD.filled_quantity, OLD.limit_price, OLD.stop_price,
            OLD.reference_price))
    EXECUTE FUNCTION orders_forget_sums();

-- What is known is added up, the rest is read; if that were many orders, they are known from now
-- on. So few open orders are never summed, and many changes between two questions cost one proof.
CREATE FUNCTION open_orders_sum(of_user uuid, of_run uuid, of_kind text, of_symbol text)
RETURNS numeric LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    buckets CONSTANT integer := 128;
    many    CONSTANT integer := 512;  -- orders
    sums    record;
    rest    record;
BEGIN
    SELECT sum(s.amount) AS known, count(*) AS buckets,
           coalesce(array_agg(s.bucket) FILTER (WHERE NOT s.is_known), '{}') AS unknown
    INTO sums FROM open_order_sum s
    WHERE s.user_id = of_user AND s.run_id = of_run AND s.kind = of_kind AND s.symbol = of_symbol;
    rest := open_orders_read(of_user, of_run, of_kind, of_symbol,
                             CASE WHEN sums.buckets = buckets THEN sums.unknown END);
    IF rest.orders <= many OR current_setting('transaction_isolation') <> 'read committed' THEN
        NULL;
    ELSIF sums.buckets = buckets THEN
        UPDATE open_order_sum SET is_known = true
        WHERE user_id = of_user AND run_id = of_run AND kind = of_kind AND symbol = of_symbol
          AND bucket = ANY (sums.unknown);
    ELSE
        INSERT INTO open_order_sum (user_id, run_id, kind, symbol, bucket)
        SELECT of_user, of_run, of_kind, of_symbol, b FROM generate_series(0, buckets - 1) b
        ON CONFLICT DO NOTHING;
    END IF;
    RETURN CASE WHEN sums.buckets = buckets THEN coalesce(sums.known, 0) ELSE 0 END + rest.amount;
END $$;

COMMENT ON FUNCTION open_orders_sum IS
    'What a run''s open orders hold back: CASH, or units to BUY or SELL of a symbol.';

-- The cash that open buy orders of a run hold back.
CREATE OR REPLACE FUNCTION run_reserved_cash(of_user uuid, of_run uuid) RETURNS numeric
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    RETURN open_orders_sum(of_user, of_run, 'CASH', '');
END $$;

-- What open orders of an order's side would add to its run's holding.
CREATE OR REPLACE FUNCTION orders_open_quantity(o orders) RETURNS numeric
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    RETURN open_orders_sum(o.user_id, o.run_id, o.side, o.symbol)
           * CASE WHEN o.side = 'BUY' THEN 1 ELSE -1 END;
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

-- What was not yet told to the ledger is told: cash and positions follow the events (82_books.sql).
-- Only the paper book tells of executions before they are there; of what a broker did nothing is
-- looked up, since a planner without statistics may read all executions of the run for each.
-- Orders follow their executions. It has the owner's rights, so that nobody else needs a right to
-- write what follows from executions.
CREATE OR REPLACE FUNCTION execution_apply() RETURNS trigger
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

ALTER TABLE event_ledger
    ADD CONSTRAINT event_ledger_logical_time_in_range
        CHECK (logical_time BETWEEN '0001-01-02 00:00Z' AND '9999-12-30 00:00Z');

-- What positions and cash follow: the few events after books_seq, or all of a run in an audit.
CREATE INDEX event_ledger_books_idx ON event_ledger (user_id, run_id, seq)
    WHERE event_type IN ('EXECUTION', 'COMMISSION', 'SPLIT_APPLIED');

-- Times as seconds since 1970 and everything else as canonical jsonb, so that neither a session's
-- time zone nor a separator inside a text can make two different rows hash alike. The array is put
-- together as text, just as jsonb would print it, which costs half.
CREATE OR REPLACE FUNCTION event_hash(previous bytea, of_user uuid, of_run uuid, seq bigint,
                           logical_time timestamptz, event_type text, subject text,
                           payload jsonb, recorded_at timestamptz)
RETURNS bytea LANGUAGE sql STABLE
RETURN sha256(previous || convert_to(
    format('["%s", "%s", %s, %s, %s, %s, %s, %s]', of_user, of_run, seq,
           extract(epoch FROM logical_time), to_json(event_type), to_json(subject), payload,
           extract(epoch FROM recorded_at)), 'UTF8'));

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
    'recovered', nullif(o.recovered, false),
    -- Of what was born NEW it goes without saying, and who is over tells it by an event.
    'status', CASE WHEN o.status = 'PENDING' THEN o.status END, 'trail_amount', o.trail_amount,
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

-- Moves by a fill are told by the execution's own event, but not that all of them were taken back.
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
    WHERE n.status <> o.status
      AND (n.filled_quantity = o.filled_quantity OR n.status = 'ROUTED')
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
    ELSIF fault = 'CASH' THEN
        RAISE EXCEPTION 'run % has not the cash for the execution %', event.run_id, event.subject
            USING ERRCODE = 'check_violation', TABLE = 'strategy_run', COLUMN = 'cash',
                  CONSTRAINT = 'strategy_run_cash_not_negative_in_cash_account',
                  HINT = 'Spend at most the cash, or use a MARGIN account.';
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

COMMENT ON FUNCTION event_refuse IS
    'Raises what is wrong with an event: SEQ, HASH, TIME, CASH, words of the gate, or no row '
    'behind it.';

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

COMMENT ON FUNCTION ledger_analyze IS
    'Gives the planner its first statistics of the tables that grow with every tick or fill.';

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
    reserved  numeric;             -- by them; NULL: not asked for yet
    symbols   text[];              -- the holdings: parallel arrays; the first so many are rows
    known     integer;
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
           -- What user_is_limited says, in line.
           coalesce((SELECT true FROM risk_limit k WHERE k.user_id = of_user LIMIT 1),
                    (SELECT true FROM trading_halt h
                     WHERE h.user_id = of_user AND h.lifted_at IS NULL LIMIT 1),
                    (SELECT true FROM system_halt s WHERE s.lifted_at IS NULL LIMIT 1)),
           (SELECT m.logical_time FROM mtm_ledger m
            WHERE m.user_id = of_user AND m.run_id = of_run ORDER BY m.logical_time DESC LIMIT 1)
    INTO cash, previous, newest, symbols, held, marks, marked, waiting, limited, last_mark
    FROM (SELECT coalesce(array_agg(h.symbol), '{}') AS symbols, array_agg(h.quantity) AS held,
                 array_agg(h.mark_price) AS marks, array_agg(h.marked_at) AS marked
          FROM position h WHERE h.user_id = of_user AND h.run_id = of_run) p
    LEFT JOIN event_ledger l ON l.user_id = of_user AND l.run_id = of_run AND l.seq = first_seq - 1;
    known := cardinality(symbols);

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
            ELSIF run.broker <> 'paper' THEN
                PERFORM execution_check_broker(e.x);
            END IF;
            IF (e.x).price <= 0 OR (e.x).commission <> 0 THEN
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
            -- Not in between either: a sale that comes later in the statement pays for nothing.
            IF cash < 0 AND run.account_type = 'CASH' AND run.broker = 'paper'
               AND (e.x).side = 'BUY' THEN
                PERFORM event_refuse(e, 'CASH');
            END IF;
            traded[i] := true;
            moved := true;

        ELSIF e.event_type = 'ORDER_PLACED' THEN
            IF (e.o).status = 'FILLED' THEN
                IF waiting AND reserved IS NULL THEN
                    reserved := run_reserved_cash(of_user, of_run);
                END IF;
                refusal := orders_gate(
                    e.o, run.account_type, limited, cash - coalesce(reserved, 0),
                    coalesce(held[array_position(symbols, (e.o).symbol)], 0)
                    -- A purchase of cash alone asks for no holding.
                    + CASE WHEN waiting AND (limited OR (e.o).side = 'SELL'
                                             OR (e.o).purpose IS NOT NULL)
                           THEN orders_open_quantity(e.o) ELSE 0 END,
                    cash, symbols, held, marks);
                IF refusal.code IS NOT NULL OR (e.o).broker <> run.broker
                   -- A broker fills what was sent to it; nothing is born filled there.
                   OR run.broker <> 'paper' THEN
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
        IF i > known THEN
            INSERT INTO position (user_id, run_id, symbol, quantity, mark_price, marked_at)
            VALUES (of_user, of_run, symbols[i], NULL, marks[i], marked[i]);
        ELSIF traded[i] THEN
            UPDATE position SET quantity = NULL, mark_price = marks[i], marked_at = marked[i]
            WHERE user_id = of_user AND run_id = of_run AND symbol = symbols[i];
        ELSIF remarked[i] THEN
            UPDATE position SET mark_price = marks[i], marked_at = marked[i]
            WHERE user_id = of_user AND run_id = of_run AND symbol = symbols[i];
        END IF;
    END LOOP;
    IF moved THEN
        UPDATE strategy_run SET cash = NULL WHERE user_id = of_user AND run_id = of_run;
    END IF;
    IF first_seq <= 1000 AND next_seq > 1000 THEN
        PERFORM ledger_analyze();
    END IF;
    RETURN next_seq - first_seq;
END $$;

-- Profit and loss: what executions opened, matched with what closed it. Two methods: first in,
-- first out, where each execution opens a lot of its own; and average cost, where one lot takes up
-- all. Both give the same sum of realised and unrealised.

-- What a broker took back never was: the pair is left out, as long as both sides of it count in
-- the same units. Behind a split that came in between, the taking back is a trade like any other.
CREATE FUNCTION ledger_standing(of_user uuid, of_run uuid, of_symbol text DEFAULT NULL,
                                upto_seq bigint DEFAULT 9223372036854775807)
RETURNS TABLE (event event_ledger, splits_so_far bigint)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT s.event, s.splits_so_far
    FROM (SELECT t.event, t.symbol, t.splits_so_far,
                 count(*) OVER (PARTITION BY t.symbol, t.splits_so_far, (t.event).event_type,
                     coalesce((t.event).payload ->> 'reverses', substr((t.event).subject, 38))) = 1
                     AS stands
          FROM (SELECT l AS event, l.payload ->> 'symbol' AS symbol,
                       count(*) FILTER (WHERE l.event_type = 'SPLIT_APPLIED')
                           OVER (PARTITION BY l.payload ->> 'symbol' ORDER BY l.seq)
                           AS splits_so_far
                FROM event_ledger l
                WHERE l.user_id = of_user AND l.run_id = of_run AND l.seq <= upto_seq
                  AND l.event_type IN ('EXECUTION', 'SPLIT_APPLIED')
                  AND (l.payload ->> 'symbol' = of_symbol OR of_symbol IS NULL)) t) s
    WHERE s.stands
    ORDER BY s.symbol, (s.event).seq
$$;

COMMENT ON FUNCTION ledger_standing IS
    'The events that make a run''s positions, of one symbol or all, without what was taken back.';

-- One step of the fold of 82_books.sql for runs at brokers, where executions are taken back: what
-- such a one had done to cost and profit is undone, its price is no news of the market.
CREATE FUNCTION position_after_told(p public.position, event event_ledger) RETURNS public.position
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    told     public.position := position_after_event(p, event);
    standing public.position;
    e        event_ledger;
BEGIN
    IF event.payload ->> 'reverses' IS NULL THEN
        RETURN told;
    END IF;
    FOR e IN SELECT (s.event).* FROM ledger_standing(event.user_id, event.run_id, p.symbol,
                                                     event.seq) s
    LOOP
        standing := position_after_event(standing, e);
    END LOOP;
    told.cost_basis := coalesce(standing.cost_basis, 0);
    told.realized_pnl := coalesce(standing.realized_pnl, 0);
    told.mark_price := p.mark_price;
    told.marked_at := p.marked_at;
    RETURN told;
END $$;

COMMENT ON FUNCTION position_after_told IS
    'A position after an event of its symbol; an execution that is taken back never was.';

-- Of several that are taken back at once the last one tells of all.
CREATE FUNCTION position_after_news(p public.position, of_user uuid, of_run uuid, of_symbol text,
                                    books_seq bigint)
RETURNS public.position
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    news record;
    next public.position;
BEGIN
    FOR news IN SELECT l AS event, l.payload ->> 'reverses' IS NOT NULL AS reverses,
                       max(l.seq) FILTER (WHERE l.payload ->> 'reverses' IS NOT NULL) OVER ()
                           AS last_reversal
                FROM event_ledger l
                WHERE l.user_id = of_user AND l.run_id = of_run
                  AND l.seq > position_after_news.books_seq
                  AND l.event_type IN ('EXECUTION', 'SPLIT_APPLIED')
                  AND l.payload ->> 'symbol' = of_symbol
                ORDER BY l.seq
    LOOP
        IF news.reverses AND (news.event).seq < news.last_reversal THEN
            next := position_after_event(p, news.event);
            next.mark_price := p.mark_price;
            next.marked_at := p.marked_at;
            p := next;
        ELSE
            p := position_after_told(p, news.event);
        END IF;
    END LOOP;
    RETURN p;
END $$;

COMMENT ON FUNCTION position_after_news IS
    'What the ledger makes of a position of a run at a broker: what was taken back never was.';

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
        SELECT substr((l.event).subject, 38) AS execution_id,
               ((l.event).payload ->> 'event_at')::timestamptz AS event_at,
               ((l.event).payload ->> 'quantity')::numeric
               * CASE WHEN (l.event).payload ->> 'side' = 'BUY' THEN 1 ELSE -1 END AS delta,
               ((l.event).payload ->> 'price')::numeric AS price,
               ((l.event).payload ->> 'numerator')::numeric AS numerator,
               ((l.event).payload ->> 'denominator')::numeric AS denominator,
               ((l.event).payload ->> 'quantity_after')::numeric AS quantity_after,
               (l.event).seq, (l.event).event_type = 'SPLIT_APPLIED' AS is_split, l.splits_so_far
        FROM ledger_standing(of_user, of_run, of_symbol) l) s
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
    priority      integer     NOT NULL DEFAULT 2,
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
    CONSTRAINT broker_command_withdrawn_unclaimed
        CHECK ((outcome = 'WITHDRAWN') = (claimed_by IS NULL)),
    CONSTRAINT broker_command_sent_has_time CHECK (outcome <> 'SENT' OR sent_at IS NOT NULL),
    CONSTRAINT broker_command_done_has_outcome CHECK ((done_at IS NULL) = (outcome IS NULL)),
    CONSTRAINT broker_command_outcome_known
        CHECK (outcome IN ('SENT', 'WITHDRAWN', 'UNKNOWN', 'NEVER_ARRIVED', 'ARRIVED', 'REFUSED')),
    CONSTRAINT broker_command_payload_is_object CHECK (jsonb_typeof(payload) = 'object')
) WITH (fillfactor = 70);

-- This prevents an order from being submitted twice at one account, whatever goes wrong.
CREATE UNIQUE INDEX broker_command_submit_once
    ON broker_command (user_id, account, order_id) WHERE kind = 'SUBMIT';

-- This prevents one move of an order from being sent twice.
CREATE UNIQUE INDEX broker_command_once_a_version
    ON broker_command (user_id, run_id, order_id, order_version)
    WHERE kind = ANY ('{MODIFY,CANCEL}');

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
    priority        integer     NOT NULL DEFAULT 2,
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
    -- The indexes are of ids that are there: a planner sees it in the query, not in the parameter.
    IF order_id IS NULL AND of_perm <> 0 THEN
        SELECT m.run_id, m.order_id INTO run_id, order_id FROM order_broker_id m
        WHERE m.user_id = of_user AND m.account = of_account AND m.perm_id = of_perm
          AND m.perm_id <> 0
        ORDER BY m.since DESC, m.order_id LIMIT 1;
    END IF;
    IF order_id IS NULL AND of_number <> 0 THEN
        SELECT m.run_id, m.order_id INTO run_id, order_id
        FROM order_broker_id m
        JOIN broker_account a ON a.user_id = m.user_id AND a.account = m.account
        WHERE m.user_id = of_user AND m.account = of_account AND m.broker_order_id = of_number
          AND m.broker_order_id <> 0
          AND (m.since AT TIME ZONE a.time_zone)::date = (at AT TIME ZONE a.time_zone)::date
          AND coalesce(m.perm_id = of_perm OR m.perm_id = 0, true)
        ORDER BY m.since DESC, m.order_id LIMIT 1;
    END IF;
    reused := of_number <> 0 AND EXISTS (
        SELECT FROM order_broker_id m
        WHERE m.user_id = of_user AND m.account = of_account AND m.broker_order_id = of_number
          AND m.broker_order_id <> 0 AND m.order_id <> order_of_broker.order_id)
        AND NOT EXISTS (
        SELECT FROM order_broker_id m
        WHERE m.user_id = of_user AND m.account = of_account AND m.broker_order_id = of_number
          AND m.broker_order_id <> 0 AND m.order_id = order_of_broker.order_id);
END $$;

COMMENT ON FUNCTION order_of_broker IS
    'The order that a broker''s reference and ids mean, and whether its id has been reused.';

CREATE FUNCTION broker_event_is_of_order(b broker_event, o orders) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN b.order_ref = o.order_id::text OR o.order_id = (
        order_of_broker(b.user_id, b.account, b.order_ref, b.perm_id, b.broker_order_id,
                        b.event_at)).order_id;
END $$;

COMMENT ON FUNCTION broker_event_is_of_order IS 'Whether a broker''s words are about an order.';

-- Whether an account trades now, and when next. Hours of its own win over its calendar, and are
-- those of every day, Saturdays and Sundays too: who closes on some days has a calendar. One of
-- which no sessions are known closes nothing.
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
    -- What could wait for ever is refused instead.
    IF policy = 'QUEUE' AND hours.opens_at IS NOT NULL THEN
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

CREATE FUNCTION orders_not_before(o orders) RETURNS timestamptz
LANGUAGE sql VOLATILE SET search_path = public, pg_temp AS $$
    SELECT CASE WHEN NOT h.is_open THEN h.opens_at END
    FROM account_hours(o.user_id, o.account, clock_timestamp()) h
    WHERE o.user_id IS NOT NULL
$$;

COMMENT ON FUNCTION orders_not_before IS
    'When an order''s account opens, or NULL while it is open.';

-- An order that lives at a broker is on its way with the row itself: to insert it is to send it. It
-- has the owner's rights, as its like below, so that the engine needs none to what is waiting.
CREATE FUNCTION orders_send() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO broker_command (user_id, account, priority, kind, run_id, order_id, order_version,
                                payload, not_before)
    VALUES (NEW.user_id, NEW.account, CASE WHEN NEW.purpose = 'FLATTEN' THEN 0 ELSE 2 END,
            'SUBMIT', NEW.run_id, NEW.order_id, NEW.version, orders_command_payload(NEW),
            CASE WHEN NEW.status_reason = 'OUT_OF_SESSION' THEN orders_not_before(NEW) END);
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

-- What has not gone goes with the new terms.
CREATE FUNCTION orders_send_terms() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE broker_command SET payload = orders_command_payload(NEW)
    WHERE user_id = NEW.user_id AND account = NEW.account AND order_id = NEW.order_id
      AND kind = 'SUBMIT' AND claimed_by IS NULL AND done_at IS NULL;
    RETURN NULL;
END $$;

COMMENT ON FUNCTION orders_send_terms IS
    'Trigger: what waits in the outbox follows its order.';

CREATE TRIGGER orders_m_send_terms AFTER UPDATE ON orders
    FOR EACH ROW WHEN (NEW.broker <> 'paper'
        AND (NEW.quantity, NEW.limit_price, NEW.stop_price, NEW.trail_amount)
            IS DISTINCT FROM
            (OLD.quantity, OLD.limit_price, OLD.stop_price, OLD.trail_amount))
    EXECUTE FUNCTION orders_send_terms();

-- The proof of new terms: the last command that a connector took to modify it asks for just these.
CREATE FUNCTION orders_follows_command(was orders, now_is orders) RETURNS boolean
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT now_is.reference_price IS NOT DISTINCT FROM was.reference_price AND coalesce((
        SELECT (c.payload ->> 'quantity')::numeric = now_is.quantity
               AND (c.payload ->> 'limit_price')::numeric IS NOT DISTINCT FROM now_is.limit_price
               AND (c.payload ->> 'stop_price')::numeric IS NOT DISTINCT FROM now_is.stop_price
               AND (c.payload ->> 'trail_amount')::numeric IS NOT DISTINCT FROM now_is.trail_amount
        FROM broker_command c
        WHERE c.user_id = was.user_id AND c.run_id = was.run_id AND c.order_id = was.order_id
          AND c.kind = 'MODIFY' AND c.claimed_by IS NOT NULL
        ORDER BY c.order_version DESC LIMIT 1), false)
$$;

COMMENT ON FUNCTION orders_follows_command IS
    'Whether an order''s new terms are those of the last command to modify it that went.';

-- What no connector has taken yet has its terms changed at once, if the gate lets it.
CREATE FUNCTION orders_may_change_unsent(was orders, now_is orders) RETURNS boolean
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF was.status NOT IN ('NEW', 'PENDING')
       OR (now_is.status, now_is.account, now_is.reference_price, now_is.trail_amount)
          IS DISTINCT FROM (was.status, was.account, was.reference_price, was.trail_amount) THEN
        RETURN false;
    END IF;
    -- A connector that wants to take it waits for us or is seen by us.
    PERFORM FROM broker_command
    WHERE user_id = was.user_id AND account = was.account AND order_id = was.order_id
      AND kind = 'SUBMIT' AND claimed_by IS NULL AND done_at IS NULL FOR NO KEY UPDATE;
    RETURN FOUND AND order_modify_refusal(was, now_is) IS NULL;
END $$;

COMMENT ON FUNCTION orders_may_change_unsent IS
    'Whether an order has not gone and the gate lets it have its new terms.';

-- Another of its run's accounts takes over only what certainly never reached the first.
CREATE FUNCTION orders_may_reroute(was orders, now_is orders) RETURNS boolean
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT was.status IN ('NEW', 'PENDING') AND was.filled_quantity = 0 AND EXISTS (
        SELECT FROM broker_command c
        WHERE c.user_id = was.user_id AND c.account = was.account AND c.order_id = was.order_id
          AND c.kind = 'SUBMIT' AND c.outcome IN ('WITHDRAWN', 'NEVER_ARRIVED')) AND EXISTS (
        SELECT FROM run_route r
        WHERE r.user_id = was.user_id AND r.run_id = was.run_id AND r.account = now_is.account)
$$;

COMMENT ON FUNCTION orders_may_reroute IS
    'Whether an order certainly never reached its account and its run has a route to the other.';

-- The outbox says what the orders say, whoever writes it: a SUBMIT is of an order that waits to be
-- sent, a CANCEL of one that has moved so, a MODIFY of one that the gate lets have its new terms.
CREATE FUNCTION broker_command_is_true(c broker_command) RETURNS boolean
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    o      orders;
    wanted orders;
BEGIN
    IF c.kind NOT IN ('SUBMIT', 'MODIFY', 'CANCEL') THEN
        RETURN true;
    END IF;
    SELECT * INTO o FROM orders
    WHERE user_id = c.user_id AND run_id = c.run_id AND order_id = c.order_id
      AND account = c.account;
    wanted := o;
    IF c.kind = 'MODIFY' THEN
        wanted.quantity := (c.payload ->> 'quantity')::numeric;
        wanted.limit_price := (c.payload ->> 'limit_price')::numeric;
        wanted.stop_price := (c.payload ->> 'stop_price')::numeric;
        wanted.version := o.version + 1;
        -- What waits is changed itself, and what was never sent has nothing to change.
        IF NOT o.recovered AND NOT EXISTS (
            SELECT FROM broker_command s
            WHERE s.user_id = c.user_id AND s.account = c.account AND s.order_id = c.order_id
              AND s.kind = 'SUBMIT' AND s.claimed_by IS NOT NULL
              AND coalesce(s.outcome NOT IN ('NEVER_ARRIVED', 'REFUSED'), true)) THEN
            RETURN false;
        END IF;
    END IF;
    RETURN o.order_id IS NOT NULL
       AND (c.order_version, c.payload) = (wanted.version, orders_command_payload(wanted))
       AND CASE WHEN c.kind = 'CANCEL' THEN o.status = 'PENDING_CANCEL'
                WHEN c.kind = 'SUBMIT' THEN o.status IN ('NEW', 'PENDING') AND NOT o.recovered
                ELSE o.status IN ('NEW', 'PENDING', 'PENDING_SUBMIT', 'ROUTED', 'PARTIALLY_FILLED')
                     AND order_modify_refusal(o, wanted) IS NULL END;
END $$;

COMMENT ON FUNCTION broker_command_is_true IS
    'Whether an order bears out a command about it; for a MODIFY the gate is asked.';

CREATE FUNCTION broker_command_prove() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF num_nonnulls(NEW.claimed_by, NEW.claimed_at, NEW.sent_at, NEW.done_at, NEW.outcome) > 0
        THEN
            RAISE EXCEPTION 'a new command waits: nobody can have taken or sent it'
                USING ERRCODE = '23T08', CONSTRAINT = 'broker_command_begins_waiting',
                      TABLE = 'broker_command', COLUMN = 'claimed_by',
                      HINT = 'Leave out what a connector will write.';
        ELSIF NEW.kind IN ('SUBMIT', 'MODIFY') THEN
            PERFORM run_lock(NEW.user_id, NEW.run_id, 'broker_command', 'RUNNING');
        END IF;
    ELSIF NEW.outcome IN ('NEVER_ARRIVED', 'REFUSED') AND NEW.kind = 'SUBMIT'
          AND OLD.outcome IS DISTINCT FROM NEW.outcome
          AND NOT broker_command_never_arrived(NEW) THEN
        RAISE EXCEPTION 'nothing that the broker said shows that % never arrived', NEW.command_id
            USING ERRCODE = '23T08', CONSTRAINT = 'broker_command_outcome_said_by_broker',
                  TABLE = 'broker_command', COLUMN = 'outcome',
                  HINT = 'Ask for a SNAPSHOT; what it does not tell of never arrived.';
    END IF;
    IF TG_OP = 'INSERT' AND NOT coalesce(broker_command_is_true(NEW), false)
       OR TG_OP = 'UPDATE' AND NEW.payload <> OLD.payload
          AND NOT (NEW.kind = 'SUBMIT' AND NEW.claimed_by IS NULL AND NEW.payload = (
              SELECT orders_command_payload(o) FROM orders o
              WHERE o.user_id = NEW.user_id AND o.run_id = NEW.run_id
                AND o.order_id = NEW.order_id)) THEN
        RAISE EXCEPTION 'no order bears out the % of order %', NEW.kind, NEW.order_id
            USING ERRCODE = '23T08', CONSTRAINT = 'broker_command_agrees_with_order',
                  TABLE = 'broker_command', COLUMN = 'payload',
                  HINT = 'Write the order, or call order_cancel() or order_modify().';
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION broker_command_prove IS
    'Trigger: a command is what its order says, and never arrived only if the broker shows it.';

-- A broker that refuses to cancel or modify what it doesn't find has not got it.
CREATE FUNCTION broker_event_shows_order(e broker_event) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN e.kind NOT IN ('THROTTLED', 'SEND_FAILED')
       AND NOT (e.kind IN ('CANCEL_REJECTED', 'MODIFY_REJECTED')
                AND coalesce(e.payload ->> 'code' IN ('NOT_FOUND', 'UNKNOWN_ORDER'), false));

COMMENT ON FUNCTION broker_event_shows_order IS
    'Whether a word about an order shows that the broker has, or had, the order.';

-- A submit that may have gone out is given up only if the connector that had taken it says that it
-- never wrote it, or if the broker, asked afterwards, tells nothing of its order
-- (94_reconcile.sql).
CREATE FUNCTION broker_command_never_arrived(c broker_command) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN EXISTS (SELECT FROM broker_event e
                   WHERE e.user_id = c.user_id AND e.account = c.account
                     AND e.order_ref = c.order_id::text AND e.kind = 'SEND_FAILED'
                     AND e.holder = c.claimed_by
                     AND e.payload ->> 'command_id' = c.command_id::text)
       OR EXISTS (SELECT FROM snapshots_whole(c.user_id, c.account) s
                  WHERE s.received_at >= c.claimed_at AND s.asked_at > c.claimed_at)
       AND NOT EXISTS (SELECT FROM broker_event e
                       WHERE e.user_id = c.user_id AND e.account = c.account
                         AND e.order_ref = c.order_id::text AND broker_event_shows_order(e))
       AND NOT EXISTS (SELECT FROM broker_event e
                       WHERE e.user_id = c.user_id AND e.account = c.account
                         AND e.kind = 'SNAPSHOT' AND e.received_at >= c.claimed_at
                         AND strpos(e.payload::text, c.order_id::text) > 0);
END $$;

COMMENT ON FUNCTION broker_command_never_arrived IS
    'Whether its connector says that it was not sent, or a SNAPSHOT since it was claimed shows '
    'that its order is not at the broker.';

CREATE TRIGGER broker_command_b_prove BEFORE INSERT ON broker_command
    FOR EACH ROW EXECUTE FUNCTION broker_command_prove();

CREATE TRIGGER broker_command_b_prove_change BEFORE UPDATE ON broker_command
    FOR EACH ROW WHEN ((NEW.payload, NEW.outcome) IS DISTINCT FROM (OLD.payload, OLD.outcome))
    EXECUTE FUNCTION broker_command_prove();

-- To ask a broker for new terms is to move the order.
CREATE FUNCTION broker_command_move_order() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE orders SET status = 'PENDING_MODIFY'
    WHERE user_id = NEW.user_id AND run_id = NEW.run_id AND order_id = NEW.order_id;
    RETURN NULL;
END $$;

COMMENT ON FUNCTION broker_command_move_order IS
    'Trigger: an order that is to be modified is PENDING_MODIFY.';

CREATE TRIGGER broker_command_m_move_order AFTER INSERT ON broker_command
    FOR EACH ROW WHEN (NEW.kind = 'MODIFY') EXECUTE FUNCTION broker_command_move_order();

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
        -- Told once: the ledger refuses to hear it again at the same logical time.
        INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
        SELECT of_user, of_run, t.at, 'CANCEL_IGNORED', t.subject,
               jsonb_build_object('status', o.status, 'why', why)
        FROM (SELECT coalesce(at, run_last_time(of_user, of_run)), of_order || '@' || o.version)
             AS t (at, subject)
        WHERE NOT EXISTS (SELECT FROM event_ledger l
                          WHERE l.user_id = of_user AND l.run_id = of_run
                            AND l.logical_time = t.at AND l.event_type = 'CANCEL_IGNORED'
                            AND l.subject = t.subject);
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
                     AND coalesce(outcome NOT IN ('NEVER_ARRIVED', 'REFUSED'), true))
           OR o.recovered THEN
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
    IF refusal IS NULL AND was.status IN ('NEW', 'PENDING', 'PENDING_SUBMIT') THEN
        IF orders_may_change_unsent(was, wanted) THEN
            UPDATE orders SET quantity = wanted.quantity, limit_price = wanted.limit_price,
                              stop_price = wanted.stop_price
            WHERE user_id = of_user AND run_id = of_run AND order_id = of_order;
            RETURN 'MODIFIED';
        END IF;
        refusal := 'SUBMIT_UNANSWERED: its broker has not confirmed it yet; ask again then';
    END IF;
    IF refusal IS NOT NULL THEN
        -- Told once, as a cancel of nothing is, however often it is asked for.
        INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
        SELECT of_user, of_run, t.at, 'MODIFY_REFUSED', t.subject,
               jsonb_build_object('reason', refusal)
        FROM (SELECT run_last_time(of_user, of_run), of_order || '@' || was.version)
             AS t (at, subject)
        WHERE NOT EXISTS (SELECT FROM event_ledger l
                          WHERE l.user_id = of_user AND l.run_id = of_run
                            AND l.logical_time = t.at AND l.event_type = 'MODIFY_REFUSED'
                            AND l.subject = t.subject);
        RETURN refusal;
    END IF;
    INSERT INTO broker_command (user_id, account, kind, run_id, order_id, order_version, payload)
    VALUES (of_user, was.account, 'MODIFY', of_run, of_order, was.version + 1,
            orders_command_payload(wanted));
    RETURN 'PENDING_MODIFY';
END $$;

COMMENT ON FUNCTION order_modify IS
    'Modifies an order: MODIFIED if it had not gone, PENDING_MODIFY at its broker, or the reason '
    'of a refusal. Raises unless at_version is the order''s.';

CREATE FUNCTION order_modify_refusal(was orders, wanted orders) RETURNS text
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
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
        wanted, run.account_type, user_is_limited(was.user_id),
        run.cash - run_reserved_cash(was.user_id, was.run_id) + was.reserved_cash,
        coalesce(held, 0) + orders_open_quantity(was)
        - (was.quantity - was.filled_quantity)
          * CASE WHEN was.side = 'BUY' THEN 1 ELSE -1 END);
    RETURN coalesce(refusal.reason, refusal.code);
END $$;

COMMENT ON FUNCTION order_modify_refusal IS 'Why an order may not have new terms, or NULL.';

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

-- What a connector may do: hold its account, take commands, say what became of them. It has these
-- functions, which have the owner's rights, and INSERT on the inbox; no right to any order.

-- What is no new order is looked for by itself, so that ten thousand waiting orders don't hide it.
CREATE INDEX broker_command_waiting_other_idx ON broker_command (user_id, account, priority)
    WHERE done_at IS NULL AND kind <> 'SUBMIT';

-- --- The lease ------------------------------------------------------------------------------

CREATE FUNCTION lease_refuse(of_user uuid, of_account text) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    lease broker_lease;
BEGIN
    SELECT * INTO lease FROM broker_lease WHERE user_id = of_user AND account = of_account;
    RAISE EXCEPTION 'account % is not held by this connector: %', of_account,
        CASE WHEN lease.account IS NULL THEN 'nobody has taken it'
             WHEN lease.expires_at <= clock_timestamp()
             THEN format('the lease of %s ended at %s', lease.holder_name, lease.expires_at)
             ELSE format('%s holds it until %s', lease.holder_name, lease.expires_at) END
        USING ERRCODE = '23T21', CONSTRAINT = 'broker_lease_is_held', TABLE = 'broker_lease',
              HINT = 'Stop this connector; start it again when the account is free.';
END $$;

COMMENT ON FUNCTION lease_refuse IS 'Refuses what only the holder of an account''s lease may do.';

-- One statement: of two that come at once, the second waits for the first and then sees its row.
CREATE FUNCTION lease_take(of_user uuid, of_account text, by_holder uuid, by_name text,
                           seconds integer)
RETURNS timestamptz LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    lease broker_lease;
    until timestamptz;
BEGIN
    INSERT INTO broker_lease AS l (user_id, account, holder, holder_name, taken_at, expires_at)
    VALUES (of_user, of_account, by_holder, by_name, clock_timestamp(),
            clock_timestamp() + make_interval(secs => seconds))
    ON CONFLICT (user_id, account) DO UPDATE
        SET holder = by_holder, holder_name = by_name, taken_at = clock_timestamp(),
            expires_at = clock_timestamp() + make_interval(secs => seconds), connected = false
        WHERE l.holder = by_holder OR l.expires_at <= clock_timestamp()
    RETURNING l.expires_at INTO until;
    IF until IS NULL THEN
        SELECT * INTO lease FROM broker_lease WHERE user_id = of_user AND account = of_account;
        RAISE EXCEPTION 'account % is held by % until %', of_account, lease.holder_name,
            lease.expires_at
            USING ERRCODE = '23T20', CONSTRAINT = 'broker_lease_one_holder', TABLE = 'broker_lease',
                  HINT = 'One connector an account: stop that one, or wait until its lease ends.';
    END IF;
    -- Questions that another one took with it get no answer; what it took of orders, a snapshot
    -- will tell.
    UPDATE broker_command SET done_at = clock_timestamp(), outcome = 'UNKNOWN'
    WHERE user_id = of_user AND account = of_account AND done_at IS NULL
      AND kind <> 'SUBMIT' AND kind NOT IN ('MODIFY', 'CANCEL') AND claimed_by <> by_holder;
    RETURN until;
END $$;

COMMENT ON FUNCTION lease_take IS
    'Takes an account for a connector, if nobody holds it or his lease has ended; returns until '
    'when.';

-- Also after its end, for as long as nobody else has taken it: its row is what excludes others.
CREATE FUNCTION lease_renew(of_user uuid, of_account text, by_holder uuid, seconds integer,
                            is_connected boolean, heard_at timestamptz, skew interval)
RETURNS timestamptz LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    until timestamptz;
BEGIN
    UPDATE broker_lease
    SET expires_at = clock_timestamp() + make_interval(secs => seconds), connected = is_connected,
        -- A connector's clock that is ahead would hide the silence that follows.
        last_heard_at = greatest(last_heard_at, CASE WHEN heard_at > clock_timestamp()
                                                     THEN clock_timestamp() ELSE heard_at END),
        clock_skew = coalesce(skew, clock_skew)
    WHERE user_id = of_user AND account = of_account AND holder = by_holder
    RETURNING expires_at INTO until;
    IF until IS NULL THEN
        PERFORM lease_refuse(of_user, of_account);
    END IF;
    RETURN until;
END $$;

COMMENT ON FUNCTION lease_renew IS
    'Holds an account for longer and tells how the connection is; refuses whom it was taken from.';

-- The row stays, so that people see when the broker was last heard.
CREATE FUNCTION lease_release(of_user uuid, of_account text, by_holder uuid) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    UPDATE broker_lease SET expires_at = clock_timestamp(), connected = false
    WHERE user_id = of_user AND account = of_account AND holder = by_holder
$$;

COMMENT ON FUNCTION lease_release IS 'Ends a connector''s lease, so that another can follow.';

-- --- Commands -------------------------------------------------------------------------------

-- Whether a command's turn has come. An order's commands go one after the other; behind one that
-- may or may not have arrived nothing goes but a cancel, since a broker might take the change of
-- an order that it doesn't know for a new one.
CREATE FUNCTION command_is_due(c broker_command) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN c.done_at IS NULL AND c.claimed_by IS NULL
       AND (c.not_before IS NULL OR c.not_before <= clock_timestamp())
       AND NOT EXISTS (
           SELECT FROM broker_command e
           WHERE e.user_id = c.user_id AND e.run_id = c.run_id AND e.order_id = c.order_id
             AND e.order_version < c.order_version
             AND (e.done_at IS NULL OR e.outcome = 'UNKNOWN' AND c.kind <> 'CANCEL'));
END $$;

COMMENT ON FUNCTION command_is_due IS 'Whether a command may be claimed now.';

CREATE FUNCTION commands_claim(of_user uuid, of_account text, by_holder uuid, at_most integer,
                               orders_at_most integer)
RETURNS SETOF broker_command
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    -- Whoever wants to take the lease waits for us.
    PERFORM FROM broker_lease
    WHERE user_id = of_user AND account = of_account AND holder = by_holder
      AND expires_at > clock_timestamp()
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM lease_refuse(of_user, of_account);
    END IF;
    RETURN QUERY
    WITH new_orders AS (
        SELECT c.command_id, c.priority, c.kind, c.created_at FROM broker_command c
        WHERE c.user_id = of_user AND c.account = of_account AND c.kind = 'SUBMIT'
          AND c.done_at IS NULL AND c.claimed_by IS NULL AND command_is_due(c)
        ORDER BY c.priority, c.created_at
        LIMIT least(at_most, orders_at_most) FOR UPDATE SKIP LOCKED
    ), others AS (
        SELECT c.command_id, c.priority, c.kind, c.created_at FROM broker_command c
        WHERE c.user_id = of_user AND c.account = of_account AND c.kind <> 'SUBMIT'
          AND c.done_at IS NULL AND c.claimed_by IS NULL AND command_is_due(c)
        ORDER BY c.priority, c.kind <> 'CANCEL', c.created_at
        LIMIT at_most FOR UPDATE SKIP LOCKED
    ), chosen AS (
        SELECT a.command_id FROM (TABLE new_orders UNION ALL TABLE others) a
        ORDER BY a.priority, a.kind <> 'CANCEL', a.created_at, a.command_id
        LIMIT at_most
    ), claimed AS (
        UPDATE broker_command b SET claimed_by = by_holder, claimed_at = clock_timestamp()
        FROM chosen
        WHERE b.user_id = of_user AND b.account = of_account AND b.command_id = chosen.command_id
        RETURNING b.*
    )
    SELECT c.* FROM claimed c
    ORDER BY c.priority, c.kind <> 'CANCEL', c.created_at, c.command_id;
END $$;

COMMENT ON FUNCTION commands_claim IS
    'Gives the holder of an account its next commands: by priority, cancels first, then by age; '
    'each once; at most so many, and so many new orders among them.';

-- After a restore from a backup: what the backup still holds for unsent may have been sent since.
-- Taken by nobody who lives, it is not sent, and the next snapshot says whether it has arrived.
CREATE FUNCTION commands_doubt(of_user uuid, of_account text) RETURNS bigint
LANGUAGE sql SET search_path = public, pg_temp AS $$
    WITH doubted AS (
        UPDATE broker_command
        SET claimed_by = gen_random_uuid(), claimed_at = clock_timestamp()
        WHERE user_id = of_user AND account = of_account AND claimed_by IS NULL
          AND done_at IS NULL AND kind IN ('SUBMIT', 'MODIFY', 'CANCEL')
        RETURNING command_id
    )
    SELECT count(*) FROM doubted
$$;

COMMENT ON FUNCTION commands_doubt IS
    'Holds back whatever an account''s outbox has not sent, until a snapshot tells whether it has '
    'arrived; for a database that was restored. Returns how many commands that are.';

-- What waits though its turn has come: the throttle's queue.
CREATE FUNCTION commands_throttled(of_user uuid, of_account text, at_most integer)
RETURNS TABLE (command_id uuid, kind text, order_id uuid, place bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
    SELECT q.command_id, q.kind, q.order_id, q.place
    FROM (SELECT c.command_id, c.kind, c.order_id,
                 row_number() OVER (ORDER BY c.priority, c.kind <> 'CANCEL', c.created_at,
                                             c.command_id) - 1 AS place
          FROM broker_command c
          WHERE c.user_id = of_user AND c.account = of_account AND c.done_at IS NULL
            AND c.claimed_by IS NULL AND command_is_due(c)) q
    WHERE q.order_id IS NOT NULL
      AND NOT EXISTS (
          SELECT FROM broker_event e
          WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'THROTTLED'
            AND e.order_ref = q.order_id::text
            AND e.payload ->> 'command_id' = q.command_id::text)
    ORDER BY q.place LIMIT at_most
$$;

COMMENT ON FUNCTION commands_throttled IS
    'Commands about orders that wait for the throttle and have no THROTTLED event yet, each with '
    'its place in the queue, from 0.';

-- It needs no lease: what was sent was sent, whoever holds the account now. A repeat, after a
-- commit of which nobody heard, changes nothing.
CREATE FUNCTION commands_done(of_user uuid, of_account text, by_holder uuid, commands uuid[],
                              sent timestamptz[], outcomes text[])
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    strange uuid;
BEGIN
    SELECT d.command_id INTO strange FROM unnest(commands) AS d (command_id)
    LEFT JOIN broker_command c
        ON c.user_id = of_user AND c.account = of_account AND c.command_id = d.command_id
    WHERE c.claimed_by IS DISTINCT FROM by_holder LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'command % was not claimed by this connector', strange
            USING ERRCODE = '23T21', CONSTRAINT = 'broker_command_done_by_claimer',
                  TABLE = 'broker_command', COLUMN = 'claimed_by',
                  HINT = 'Who claims a command says what became of it.';
    END IF;
    UPDATE broker_command c
    SET sent_at = d.sent_at, done_at = clock_timestamp(), outcome = d.outcome
    FROM unnest(commands, sent, outcomes) AS d (command_id, sent_at, outcome)
    WHERE c.user_id = of_user AND c.account = of_account AND c.command_id = d.command_id
      AND c.done_at IS NULL;
END $$;

COMMENT ON FUNCTION commands_done IS
    'Says of claimed commands when they were sent, if they were, and what became of them.';

CREATE FUNCTION connector_alert(of_user uuid, of_account text, of_code text, of_message text)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    INSERT INTO alert (user_id, code, subject, account, message)
    VALUES (of_user, of_code, of_account, of_account, of_message)
    ON CONFLICT (user_id, code, subject) WHERE acknowledged_at IS NULL DO NOTHING
$$;

COMMENT ON FUNCTION connector_alert IS 'Raises an alert about an account, unless it is open yet.';

-- --- Neither outbox nor inbox is edited -----------------------------------------------------

CREATE FUNCTION broker_command_check_update() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF (NEW.user_id, NEW.account, NEW.command_id, NEW.priority, NEW.kind, NEW.run_id,
        NEW.order_id, NEW.order_version, NEW.not_before, NEW.created_at)
       IS DISTINCT FROM
       (OLD.user_id, OLD.account, OLD.command_id, OLD.priority, OLD.kind, OLD.run_id,
        OLD.order_id, OLD.order_version, OLD.not_before, OLD.created_at)
       -- An order that waits may be given new terms; what a connector has seen is fixed.
       OR NEW.payload <> OLD.payload
          AND (OLD.claimed_by IS NOT NULL OR NEW.claimed_by IS NOT NULL
               OR OLD.done_at IS NOT NULL OR NEW.done_at IS NOT NULL) THEN
        RAISE EXCEPTION 'command % stays as it was written', OLD.command_id
            USING ERRCODE = '23T09', CONSTRAINT = 'broker_command_terms_fixed',
                  TABLE = 'broker_command', HINT = 'Withdraw it, and write another one.';
    END IF;
    IF OLD.claimed_by IS NOT NULL
       AND (NEW.claimed_by, NEW.claimed_at) IS DISTINCT FROM (OLD.claimed_by, OLD.claimed_at)
       OR OLD.sent_at IS NOT NULL AND NEW.sent_at IS DISTINCT FROM OLD.sent_at
       OR OLD.done_at IS NOT NULL AND NEW.done_at IS DISTINCT FROM OLD.done_at
       -- Of what was sent, or perhaps sent, the broker says whether it arrived.
       OR OLD.outcome IS NOT NULL AND NEW.outcome IS DISTINCT FROM OLD.outcome
          AND NOT (OLD.outcome IN ('SENT', 'UNKNOWN')
                   AND coalesce(NEW.outcome, '') IN ('ARRIVED', 'NEVER_ARRIVED')) THEN
        RAISE EXCEPTION 'what became of command % is said once', OLD.command_id
            USING ERRCODE = '23T09', CONSTRAINT = 'broker_command_said_once',
                  TABLE = 'broker_command', COLUMN = 'outcome',
                  HINT = 'Only SENT and UNKNOWN turn into ARRIVED or NEVER_ARRIVED.';
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION broker_command_check_update IS
    'Trigger: a command stays as it is, but for the payload of one that nobody has taken; claim, '
    'sending and outcome are written once.';

CREATE FUNCTION broker_event_check_update() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF (NEW.user_id, NEW.account, NEW.number, NEW.holder, NEW.kind, NEW.priority, NEW.order_ref,
        NEW.broker_order_id, NEW.perm_id, NEW.execution_id, NEW.payload, NEW.event_at,
        NEW.received_at)
       IS DISTINCT FROM
       (OLD.user_id, OLD.account, OLD.number, OLD.holder, OLD.kind, OLD.priority, OLD.order_ref,
        OLD.broker_order_id, OLD.perm_id, OLD.execution_id, OLD.payload, OLD.event_at,
        OLD.received_at) THEN
        RAISE EXCEPTION 'what the broker said (% of account %) stays as it was said', OLD.number,
            OLD.account
            USING ERRCODE = '23T09', CONSTRAINT = 'broker_event_append_only',
                  TABLE = 'broker_event', HINT = 'History is only added to.';
    END IF;
    IF (NEW.applied_at, NEW.finding, NEW.code, NEW.note)
       IS DISTINCT FROM (OLD.applied_at, OLD.finding, OLD.code, OLD.note)
       -- HELD waits for a person, who then decides.
       AND (NEW.applied_at IS NULL
            OR OLD.applied_at IS NOT NULL AND OLD.finding IS DISTINCT FROM 'HELD') THEN
        RAISE EXCEPTION 'event % of account % is applied once', OLD.number, OLD.account
            USING ERRCODE = '23T09', CONSTRAINT = 'broker_event_applied_once',
                  TABLE = 'broker_event', COLUMN = 'applied_at',
                  HINT = 'What was found is said once, with applied_at; only HELD may change.';
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION broker_event_check_update IS
    'Trigger: an event stays as it is; what it turned out to be is written once.';

-- Rows of an account go with it; those that an order's run owns also with that. A cascade comes
-- when the row that it follows is gone already.
CREATE FUNCTION boundary_refuse_delete() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        IF NOT EXISTS (SELECT FROM broker_account
                       WHERE user_id = OLD.user_id AND account = OLD.account)
           OR to_jsonb(OLD) ->> 'run_id' IS NOT NULL
              AND NOT EXISTS (SELECT FROM orders
                              WHERE user_id = OLD.user_id
                                AND run_id = (to_jsonb(OLD) ->> 'run_id')::uuid
                                AND order_id = (to_jsonb(OLD) ->> 'order_id')::uuid) THEN
            RETURN OLD;
        END IF;
    END IF;
    RAISE EXCEPTION '% of % is not possible: it is history', TG_OP, TG_ARGV[0]
        USING ERRCODE = '23T09', CONSTRAINT = TG_ARGV[0] || '_kept', TABLE = TG_ARGV[0],
              HINT = 'History is only added to; it goes with its account.';
END $$;

COMMENT ON FUNCTION boundary_refuse_delete IS
    'Trigger: what was said to a broker and by it goes only with its account or its run. '
    'Argument: the logical table name.';

CREATE TRIGGER broker_command_a_check_update BEFORE UPDATE ON broker_command
    FOR EACH ROW EXECUTE FUNCTION broker_command_check_update();

CREATE TRIGGER broker_command_z_refuse_delete BEFORE DELETE ON broker_command
    FOR EACH ROW EXECUTE FUNCTION boundary_refuse_delete('broker_command');

CREATE TRIGGER broker_command_z_refuse_truncate BEFORE TRUNCATE ON broker_command
    FOR EACH STATEMENT EXECUTE FUNCTION boundary_refuse_delete('broker_command');

CREATE TRIGGER broker_event_a_check_update BEFORE UPDATE ON broker_event
    FOR EACH ROW EXECUTE FUNCTION broker_event_check_update();

CREATE TRIGGER broker_event_z_refuse_delete BEFORE DELETE ON broker_event
    FOR EACH ROW EXECUTE FUNCTION boundary_refuse_delete('broker_event');

CREATE TRIGGER broker_event_z_refuse_truncate BEFORE TRUNCATE ON broker_event
    FOR EACH STATEMENT EXECUTE FUNCTION boundary_refuse_delete('broker_event');

-- Safety: what stops trading, and what is left when it has stopped. A halt is a row: the gate looks
-- at it before every order, so that it holds at once, in every process and after every restart.

-- Halts of everything: seen by the gate of every user. Their copies in trading_halt carry them out,
-- user by user.
CREATE TABLE system_halt (
    halt_id       uuid        NOT NULL DEFAULT gen_random_uuid(),
    name          text        NOT NULL,
    trading_state text        NOT NULL,
    reason        text        NOT NULL,
    placed_by     text        NOT NULL,
    placed_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    lifted_at     timestamptz,
    lifted_by     text,
    CONSTRAINT system_halt_pkey PRIMARY KEY (halt_id),
    CONSTRAINT system_halt_state_known CHECK (trading_state IN ('REDUCING', 'HALTED')),
    CONSTRAINT system_halt_name_format
        CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9._:-]*$' AND length(name) <= 100),
    CONSTRAINT system_halt_words_short
        CHECK (length(reason) <= 500 AND length(placed_by) <= 100 AND length(lifted_by) <= 100),
    CONSTRAINT system_halt_lifted_by_somebody CHECK ((lifted_at IS NULL) = (lifted_by IS NULL))
);

-- This prevents a second halt of a name, and is all that the gate reads.
CREATE UNIQUE INDEX system_halt_open_once ON system_halt (name) WHERE lifted_at IS NULL;

COMMENT ON TABLE system_halt IS 'Halts of everything, whoever it belongs to.';

COMMENT ON COLUMN system_halt.trading_state IS
    'HALTED: no new orders. REDUCING: only what makes a position smaller.';

CREATE TABLE trading_halt (
    user_id       uuid        NOT NULL,
    halt_id       uuid        NOT NULL DEFAULT gen_random_uuid(),
    name          text        NOT NULL,
    scope         text        NOT NULL,
    run_id        uuid,
    account       text,
    trading_state text        NOT NULL DEFAULT 'HALTED',
    cancels       boolean     NOT NULL DEFAULT true,
    reason        text        NOT NULL,
    placed_by     text        NOT NULL,
    placed_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    lifted_at     timestamptz,
    lifted_by     text,
    CONSTRAINT trading_halt_pkey PRIMARY KEY (user_id, halt_id),
    CONSTRAINT trading_halt_belongs_to_user
        FOREIGN KEY (user_id) REFERENCES app_user (user_id) ON DELETE CASCADE,
    CONSTRAINT trading_halt_of_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT trading_halt_of_account FOREIGN KEY (user_id, account)
        REFERENCES broker_account (user_id, account) ON DELETE CASCADE,
    CONSTRAINT trading_halt_scope_known CHECK (scope IN ('RUN', 'ACCOUNT', 'USER', 'EVERYTHING')),
    CONSTRAINT trading_halt_names_its_scope
        CHECK ((run_id IS NOT NULL) = (scope = 'RUN')
               AND (account IS NOT NULL) = (scope = 'ACCOUNT')),
    CONSTRAINT trading_halt_state_known CHECK (trading_state IN ('REDUCING', 'HALTED')),
    CONSTRAINT trading_halt_name_format
        CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9._:-]*$' AND length(name) <= 100),
    CONSTRAINT trading_halt_words_short
        CHECK (length(reason) <= 500 AND length(placed_by) <= 100 AND length(lifted_by) <= 100),
    CONSTRAINT trading_halt_lifted_by_somebody CHECK ((lifted_at IS NULL) = (lifted_by IS NULL))
);

-- This prevents a second halt of a name, and is all that the gate reads.
CREATE UNIQUE INDEX trading_halt_open_once ON trading_halt (user_id, name)
    WHERE lifted_at IS NULL;

COMMENT ON TABLE trading_halt IS 'What was halted, why, by whom, and when it was lifted.';

COMMENT ON COLUMN trading_halt.name IS 'By which it is lifted; one open halt a name.';

COMMENT ON COLUMN trading_halt.scope IS
    'RUN, ACCOUNT, USER, or EVERYTHING: the copy of a system_halt at this user.';

COMMENT ON COLUMN trading_halt.trading_state IS
    'HALTED: no new orders. REDUCING: only what makes a position smaller.';

COMMENT ON COLUMN trading_halt.cancels IS
    'Whether working orders were cancelled, too, or only new ones are refused.';

CREATE FUNCTION trading_halt_guard_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        NEW.placed_at := clock_timestamp();
        IF NEW.lifted_at IS NULL THEN
            RETURN NEW;
        END IF;
    ELSIF TG_OP = 'UPDATE' THEN
        IF OLD.lifted_at IS NULL
           AND (NEW.user_id, NEW.halt_id, NEW.name, NEW.scope, NEW.run_id, NEW.account,
                NEW.trading_state, NEW.cancels, NEW.reason, NEW.placed_by, NEW.placed_at)
               IS NOT DISTINCT FROM
               (OLD.user_id, OLD.halt_id, OLD.name, OLD.scope, OLD.run_id, OLD.account,
                OLD.trading_state, OLD.cancels, OLD.reason, OLD.placed_by, OLD.placed_at) THEN
            NEW.lifted_at := clock_timestamp();
            RETURN NEW;
        END IF;
    ELSIF NOT EXISTS (SELECT FROM app_user WHERE user_id = OLD.user_id)
          OR OLD.run_id IS NOT NULL AND NOT EXISTS (
              SELECT FROM strategy_run WHERE user_id = OLD.user_id AND run_id = OLD.run_id)
          OR OLD.account IS NOT NULL AND NOT EXISTS (
              SELECT FROM broker_account WHERE user_id = OLD.user_id AND account = OLD.account) THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION '% of a halt is not possible: it is history', TG_OP
        USING ERRCODE = '23T09', CONSTRAINT = 'trading_halt_lifted_once', TABLE = 'trading_halt',
              HINT = 'Place it with halt_place(), lift it by name with halt_lift().';
END $$;

COMMENT ON FUNCTION trading_halt_guard_write IS
    'Trigger: a halt stays as it was placed; it is lifted once, and goes with what it halted.';

CREATE TRIGGER trading_halt_a_guard_write BEFORE INSERT OR UPDATE OR DELETE ON trading_halt
    FOR EACH ROW EXECUTE FUNCTION trading_halt_guard_write();

CREATE TRIGGER trading_halt_z_refuse_truncate BEFORE TRUNCATE ON trading_halt
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('trading_halt', 'kept');

-- The strongest halt that an order is under, unless it is one that the halt lets pass: an order
-- that only shrinks a position passes REDUCING, a safety order that does so passes every halt.
CREATE FUNCTION orders_halted(o orders, exposure numeric, OUT code text, OUT reason text)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    halt record;
BEGIN
    SELECT h.name, h.trading_state, h.reason INTO halt
    FROM (SELECT t.name, t.trading_state, t.reason FROM trading_halt t
          WHERE t.user_id = o.user_id AND t.lifted_at IS NULL
            AND (t.run_id IS NULL OR t.run_id = o.run_id)
            AND (t.account IS NULL OR t.account = o.account)
          UNION ALL
          SELECT s.name, s.trading_state, s.reason FROM system_halt s WHERE s.lifted_at IS NULL) h
    ORDER BY h.trading_state, h.name LIMIT 1;
    IF FOUND AND NOT (orders_only_shrinks(o, exposure)
                      AND (halt.trading_state = 'REDUCING' OR o.purpose IS NOT NULL)) THEN
        code := CASE WHEN halt.trading_state = 'HALTED' THEN 'HALTED' ELSE 'REDUCE_ONLY' END;
        reason := halt.name || ': ' || halt.reason;
    END IF;
END $$;

COMMENT ON FUNCTION orders_halted IS 'HALTED or REDUCE_ONLY where a halt refuses an order.';

-- The runs that a halt is about, their rows locked, so that a tick under way is waited for and the
-- next one sees the halt.
CREATE FUNCTION halt_lock_runs(of_user uuid, of_run uuid, of_account text) RETURNS uuid[]
LANGUAGE sql SET search_path = public, pg_temp AS $$
    SELECT coalesce(array_agg(locked.run_id), '{}')
    FROM (SELECT r.run_id FROM strategy_run r
          WHERE r.user_id = of_user AND r.status IN ('RUNNING', 'STOPPING')
            AND (of_run IS NULL OR r.run_id = of_run)
            AND (of_account IS NULL OR EXISTS (
                SELECT FROM run_route t
                WHERE t.user_id = of_user AND t.run_id = r.run_id AND t.account = of_account))
          ORDER BY r.run_id FOR NO KEY UPDATE) locked
$$;

COMMENT ON FUNCTION halt_lock_runs IS 'Locks the live runs of a user, run or account.';

-- Cancels the working orders that a halt does not let be; safety orders are left to work. Under
-- REDUCING those stay which make a position smaller, as long as together they do.
CREATE FUNCTION halt_cancel_orders(of_user uuid, of_run uuid, of_account text, state text,
                                   why text)
RETURNS integer LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    doomed uuid;
    count  integer := 0;
BEGIN
    FOR doomed IN
        SELECT w.order_id
        FROM (SELECT o.order_id, o.side, o.status, o.purpose, coalesce(p.quantity, 0) AS held,
                     sum(o.quantity - o.filled_quantity)
                         OVER (PARTITION BY o.symbol, o.side
                               ORDER BY o.recorded_at, o.order_id) AS open
              FROM orders o
              LEFT JOIN position p ON p.user_id = o.user_id AND p.run_id = o.run_id
                                  AND p.symbol = o.symbol
              WHERE o.user_id = of_user AND o.run_id = of_run
                AND (of_account IS NULL OR o.account = of_account)
                AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')) w
        WHERE w.status <> 'PENDING_CANCEL' AND w.purpose IS NULL
          AND NOT (state = 'REDUCING'
                   AND w.open <= CASE WHEN w.side = 'SELL' THEN w.held ELSE -w.held END)
        ORDER BY w.order_id
    LOOP
        PERFORM order_cancel(of_user, of_run, doomed, why);
        count := count + 1;
    END LOOP;
    RETURN count;
END $$;

COMMENT ON FUNCTION halt_cancel_orders IS
    'Cancels what a halt of a run, or of an account, does not let work; returns how many.';

-- Places a halt, or returns the open one of that name: twice is once. The working orders are
-- cancelled and the runs told in the same transaction.
CREATE FUNCTION halt_place(of_user uuid, halt_name text, halt_scope text, of_run uuid,
                           of_account text, state text, why text, who text,
                           cancel_orders boolean DEFAULT true)
RETURNS trading_halt LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    runs uuid[] := halt_lock_runs(of_user, of_run, of_account);
    run  uuid;
    halt trading_halt;
BEGIN
    INSERT INTO trading_halt (user_id, name, scope, run_id, account, trading_state, cancels,
                              reason, placed_by)
    VALUES (of_user, halt_name, halt_scope, of_run, of_account, state, cancel_orders, why, who)
    ON CONFLICT DO NOTHING RETURNING * INTO halt;
    IF NOT FOUND THEN
        SELECT * INTO halt FROM trading_halt
        WHERE user_id = of_user AND name = halt_name AND lifted_at IS NULL;
        IF (halt.scope, halt.run_id, halt.account) IS DISTINCT FROM (halt_scope, of_run, of_account)
           OR halt.trading_state = 'REDUCING' AND state = 'HALTED' THEN
            RAISE EXCEPTION 'the open halt % is of other scope, or lets more pass', halt_name
                USING ERRCODE = 'unique_violation', CONSTRAINT = 'trading_halt_open_once',
                      TABLE = 'trading_halt', COLUMN = 'name',
                      HINT = 'Place this one under another name.';
        END IF;
        RETURN halt;
    END IF;
    FOREACH run IN ARRAY runs LOOP
        IF cancel_orders THEN
            PERFORM halt_cancel_orders(of_user, run, of_account, state, 'HALT ' || halt_name);
        END IF;
        INSERT INTO event_ledger (user_id, run_id, event_type, subject, payload)
        VALUES (of_user, run, 'KILL_SWITCH', halt.halt_id,
                jsonb_build_object('name', halt_name, 'scope', halt_scope, 'reason', why,
                                   'trading_state', state, 'by', who));
    END LOOP;
    RETURN halt;
END $$;

COMMENT ON FUNCTION halt_place IS
    'Halts a run, account or user and cancels what works; returns the open halt of the name.';

-- What works although it is halted: a run that started meanwhile, or a machine that died between.
CREATE FUNCTION halt_enforce(of_user uuid) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    halt  trading_halt;
    run   uuid;
    count integer := 0;
BEGIN
    FOR halt IN SELECT * FROM trading_halt
                WHERE user_id = of_user AND lifted_at IS NULL AND cancels ORDER BY name
    LOOP
        FOREACH run IN ARRAY halt_lock_runs(of_user, halt.run_id, halt.account) LOOP
            count := count + halt_cancel_orders(of_user, run, halt.account, halt.trading_state,
                                                'HALT ' || halt.name);
        END LOOP;
    END LOOP;
    RETURN count;
END $$;

COMMENT ON FUNCTION halt_enforce IS
    'Cancels again what works under a user''s open halts; returns how many orders.';

-- Lifts the open halt of a name, and no other way lifts one. Returns nothing where there is none.
CREATE FUNCTION halt_lift(of_user uuid, halt_name text, who text)
RETURNS SETOF trading_halt
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    halt trading_halt;
    run  uuid;
    runs uuid[];
BEGIN
    SELECT * INTO halt FROM trading_halt
    WHERE user_id = of_user AND name = halt_name AND lifted_at IS NULL;
    IF NOT FOUND THEN
        RETURN;
    ELSIF halt.scope = 'EVERYTHING' AND EXISTS (
        SELECT FROM system_halt WHERE name = halt_name AND lifted_at IS NULL) THEN
        RAISE EXCEPTION 'halt % is of everything', halt_name
            USING ERRCODE = '23T09', CONSTRAINT = 'trading_halt_of_everything',
                  TABLE = 'trading_halt', HINT = 'Lift it for everybody, with system_halt_lift().';
    END IF;
    runs := halt_lock_runs(of_user, halt.run_id, halt.account);
    UPDATE trading_halt SET lifted_at = clock_timestamp(), lifted_by = who
    WHERE user_id = of_user AND halt_id = halt.halt_id AND lifted_at IS NULL
    RETURNING * INTO halt;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    FOREACH run IN ARRAY runs LOOP
        INSERT INTO event_ledger (user_id, run_id, event_type, subject, payload)
        VALUES (of_user, run, 'HALT_LIFTED', halt.halt_id,
                jsonb_build_object('name', halt_name, 'by', who));
    END LOOP;
    RETURN NEXT halt;
END $$;

COMMENT ON FUNCTION halt_lift IS 'Lifts the open halt of a name; returns it, or no row.';

CREATE FUNCTION system_halt_place(halt_name text, state text, why text, who text)
RETURNS system_halt LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    halt system_halt;
BEGIN
    INSERT INTO system_halt (name, trading_state, reason, placed_by)
    VALUES (halt_name, state, why, who) ON CONFLICT DO NOTHING;
    SELECT * INTO halt FROM system_halt WHERE name = halt_name AND lifted_at IS NULL;
    IF halt.trading_state = 'REDUCING' AND state = 'HALTED' THEN
        RAISE EXCEPTION 'the open halt % lets more pass', halt_name
            USING ERRCODE = 'unique_violation', CONSTRAINT = 'system_halt_open_once',
                  TABLE = 'system_halt', COLUMN = 'name',
                  HINT = 'Place this one under another name.';
    END IF;
    RETURN halt;
END $$;

COMMENT ON FUNCTION system_halt_place IS
    'Halts everything: new orders at once; halt_place() then cancels what works, user by user.';

CREATE FUNCTION system_halt_lift(halt_name text, who text) RETURNS SETOF system_halt
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    UPDATE system_halt SET lifted_at = clock_timestamp(), lifted_by = who
    WHERE name = halt_name AND lifted_at IS NULL RETURNING *
$$;

COMMENT ON FUNCTION system_halt_lift IS
    'Lifts a halt of everything by its name; halt_lift() then tells the runs, user by user.';

-- What loss is measured from: the equity at the last mark before the session that a moment is in,
-- or that came before it; the initial cash for a run without such a mark.
CREATE FUNCTION run_equity_before(of_user uuid, of_run uuid, at timestamptz) RETURNS numeric
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    run  record;
    mark numeric;
BEGIN
    SELECT r.calendar, r.initial_cash INTO run FROM strategy_run r
    WHERE r.user_id = of_user AND r.run_id = of_run;
    SELECT m.equity INTO mark FROM mtm_ledger m
    WHERE m.user_id = of_user AND m.run_id = of_run
      AND m.logical_time < coalesce((calendar_session_at(run.calendar, at)).open_at,
                                    date_trunc('day', at, 'UTC'))
    ORDER BY m.logical_time DESC LIMIT 1;
    RETURN coalesce(mark, run.initial_cash);
END $$;

COMMENT ON FUNCTION run_equity_before IS
    'A run''s equity at the last mark before the session of a moment.';

-- The highest mark so far, so that nobody has to read all of them for every order.
CREATE TABLE equity_peak (
    user_id uuid        NOT NULL,
    run_id  uuid        NOT NULL,
    equity  numeric     NOT NULL,
    as_of   timestamptz NOT NULL,
    CONSTRAINT equity_peak_pkey PRIMARY KEY (user_id, run_id),
    CONSTRAINT equity_peak_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT equity_peak_equity_in_range CHECK (abs(equity) < 1e40),
    CONSTRAINT equity_peak_as_of_in_range CHECK (time_in_range(as_of))
) WITH (fillfactor = 50);

COMMENT ON TABLE equity_peak IS
    'The highest equity of a run''s marks up to a logical time; follows from mtm_ledger.';

COMMENT ON COLUMN equity_peak.as_of IS 'Logical time of the last mark that was looked at.';

CREATE FUNCTION run_equity_peak(of_user uuid, of_run uuid, before timestamptz) RETURNS numeric
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    known equity_peak;
    newer record;
    peak  numeric;
BEGIN
    SELECT * INTO known FROM equity_peak WHERE user_id = of_user AND run_id = of_run;
    SELECT max(m.equity) AS equity, max(m.logical_time) AS as_of, count(*) AS marks INTO newer
    FROM mtm_ledger m
    WHERE m.user_id = of_user AND m.run_id = of_run AND m.logical_time < before
      AND m.logical_time > coalesce(known.as_of, '-infinity');
    peak := greatest(known.equity, newer.equity,
                     (SELECT r.initial_cash FROM strategy_run r
                      WHERE r.user_id = of_user AND r.run_id = of_run));
    IF newer.marks >= 100 THEN
        INSERT INTO equity_peak AS p (user_id, run_id, equity, as_of)
        VALUES (of_user, of_run, peak, newer.as_of)
        ON CONFLICT (user_id, run_id) DO UPDATE
        SET equity = excluded.equity, as_of = excluded.as_of;
    END IF;
    RETURN peak;
END $$;

COMMENT ON FUNCTION run_equity_peak IS
    'The highest equity of a run''s marks before a moment, at least its initial cash.';

-- Circuit breakers: what stops trading by itself. A kind without a row has its default; a default
-- of NULL is off.
CREATE TABLE breaker_kind (
    kind      text    NOT NULL,
    threshold numeric,
    seconds   integer,
    unit      text    NOT NULL,
    log_code  text    NOT NULL,
    why       text    NOT NULL,
    CONSTRAINT breaker_kind_pkey PRIMARY KEY (kind),
    CONSTRAINT breaker_kind_threshold_in_range CHECK (threshold >= 0 AND threshold < 1e20)
);

COMMENT ON TABLE breaker_kind IS 'The circuit breakers, and at what they trip unless told.';

COMMENT ON COLUMN breaker_kind.seconds IS 'The window that they look at; NULL: none.';

INSERT INTO breaker_kind (kind, threshold, seconds, unit, log_code, why) VALUES
    ('DAILY_LOSS', NULL, NULL, 'currency', 'CIRCUIT_BREAKER',
     'A run has lost so much since the last mark of the previous session.'),
    ('REJECT_STORM', 20, 60, 'orders', 'REJECT_STORM', 'The broker refused so many orders.'),
    ('LATENCY', 5000, 300, 'milliseconds', 'LATENCY_HIGH',
     'One submit in twenty waits longer for its first answer.'),
    ('STALE_PRICE', NULL, NULL, 'seconds', 'STALE_PRICE',
     'What is held has had no new price for so long, while its exchange is open.'),
    ('HEARTBEAT', NULL, NULL, 'seconds', 'HEARTBEAT_LOST',
     'Nothing was heard of the broker for the account''s heartbeat_seconds.');

CREATE TABLE circuit_breaker (
    user_id    uuid        NOT NULL,
    breaker_id uuid        NOT NULL DEFAULT gen_random_uuid(),
    account    text,
    kind       text        NOT NULL,
    threshold  numeric,
    seconds    integer,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT circuit_breaker_pkey PRIMARY KEY (user_id, breaker_id),
    CONSTRAINT circuit_breaker_belongs_to_user
        FOREIGN KEY (user_id) REFERENCES app_user (user_id) ON DELETE CASCADE,
    CONSTRAINT circuit_breaker_of_account FOREIGN KEY (user_id, account)
        REFERENCES broker_account (user_id, account) ON DELETE CASCADE,
    CONSTRAINT circuit_breaker_kind_known FOREIGN KEY (kind) REFERENCES breaker_kind (kind),
    CONSTRAINT circuit_breaker_threshold_in_range CHECK (threshold >= 0 AND threshold < 1e20),
    CONSTRAINT circuit_breaker_seconds_in_range CHECK (seconds BETWEEN 1 AND 86400),
    CONSTRAINT circuit_breaker_heartbeat_of_account CHECK (kind <> 'HEARTBEAT'),
    CONSTRAINT circuit_breaker_kind_once
        UNIQUE NULLS NOT DISTINCT (user_id, kind, account)
);

COMMENT ON TABLE circuit_breaker IS 'At what a user''s, or an account''s, circuit breakers trip.';

COMMENT ON COLUMN circuit_breaker.account IS 'NULL: every account without a row of its own.';

COMMENT ON COLUMN circuit_breaker.threshold IS 'In the unit of breaker_kind; NULL: off.';

COMMENT ON COLUMN circuit_breaker.seconds IS 'The window; NULL: that of breaker_kind.';

CREATE FUNCTION breaker_setting(of_user uuid, of_account text, of_kind text,
                                OUT threshold numeric, OUT seconds integer)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT CASE WHEN b.breaker_id IS NULL THEN k.threshold ELSE b.threshold END,
           coalesce(b.seconds, k.seconds)
    FROM breaker_kind k
    LEFT JOIN circuit_breaker b ON b.user_id = of_user AND b.kind = k.kind
         AND (b.account IS NULL OR b.account = of_account)
    WHERE k.kind = of_kind
    ORDER BY b.account IS NULL LIMIT 1
$$;

COMMENT ON FUNCTION breaker_setting IS
    'At what a breaker trips: the account''s row, else the user''s, else the default.';

-- From the wire to the first answer, of the submits of a window; the slowest of twenty.
CREATE FUNCTION account_latency(of_user uuid, of_account text, after timestamptz,
                                until timestamptz, OUT orders bigint, OUT p95 numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT count(*), (array_agg(w.waited ORDER BY w.waited))[ceil(count(*) * 0.95)::integer]
    FROM (SELECT extract(epoch FROM coalesce(
                     (SELECT min(e.received_at) FROM broker_event e
                      WHERE e.user_id = of_user AND e.account = of_account
                        AND e.order_ref = c.order_id::text
                        AND e.received_at >= c.sent_at
                        AND e.kind IN ('ORDER_STATUS', 'EXECUTION', 'REJECTED')),
                     until) - c.sent_at) * 1000 AS waited
          FROM broker_command c
          WHERE c.user_id = of_user AND c.account = of_account AND c.kind = 'SUBMIT'
            AND c.sent_at > after AND c.sent_at <= until) w
$$;

COMMENT ON FUNCTION account_latency IS
    'Milliseconds from submit to first answer that 95 of 100 submits of a window stayed within; '
    'what has no answer yet has waited until now.';

-- What trips now, one row each: what it is about, and how far it is.
CREATE FUNCTION breakers_tripped(of_user uuid, at timestamptz)
RETURNS TABLE (kind text, run_id uuid, account text, threshold numeric, value numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT 'DAILY_LOSS', r.run_id, NULL, s.threshold, v.loss
    FROM strategy_run r
    CROSS JOIN LATERAL breaker_setting(
        of_user, (SELECT t.account FROM run_route t
                  WHERE t.user_id = of_user AND t.run_id = r.run_id
                  ORDER BY t.preference LIMIT 1), 'DAILY_LOSS') s
    CROSS JOIN LATERAL (SELECT run_equity_before(of_user, r.run_id, at) - r.cash
               - coalesce((SELECT sum(p.market_value) FROM position p
                           WHERE p.user_id = of_user AND p.run_id = r.run_id), 0) AS loss) v
    WHERE r.user_id = of_user AND r.status = 'RUNNING' AND v.loss >= s.threshold
    UNION ALL
    SELECT 'REJECT_STORM', NULL, a.account, s.threshold, v.rejects
    FROM broker_account a
    CROSS JOIN LATERAL breaker_setting(of_user, a.account, 'REJECT_STORM') s
    CROSS JOIN LATERAL (SELECT count(*) AS rejects FROM orders o
        WHERE o.user_id = of_user AND o.broker <> 'paper' AND o.account = a.account
          AND o.reject_source = 'BROKER'
          AND o.recorded_at > at - s.seconds * interval '1 second') v
    WHERE a.user_id = of_user AND v.rejects >= s.threshold
    UNION ALL
    SELECT 'LATENCY', NULL, a.account, s.threshold, round(v.p95, 3)
    FROM broker_account a
    CROSS JOIN LATERAL breaker_setting(of_user, a.account, 'LATENCY') s
    CROSS JOIN LATERAL account_latency(of_user, a.account,
                                       at - s.seconds * interval '1 second', at) v
    WHERE a.user_id = of_user AND v.orders >= 20 AND v.p95 > s.threshold
    UNION ALL
    SELECT 'STALE_PRICE', r.run_id, NULL, s.threshold, v.age
    FROM strategy_run r
    CROSS JOIN LATERAL breaker_setting(of_user, NULL, 'STALE_PRICE') s
    CROSS JOIN LATERAL (SELECT extract(epoch FROM at - min(p.marked_at)) AS age FROM position p
        WHERE p.user_id = of_user AND p.run_id = r.run_id AND p.quantity <> 0) v
    WHERE r.user_id = of_user AND r.status = 'RUNNING' AND v.age > s.threshold
      AND at < (calendar_session_at(r.calendar, at)).close_at
    UNION ALL
    SELECT 'HEARTBEAT', NULL, a.account, a.heartbeat_seconds, round(v.silence, 3)
    FROM broker_account a
    JOIN broker_lease e ON e.user_id = of_user AND e.account = a.account
    CROSS JOIN LATERAL (SELECT extract(epoch FROM at - e.last_heard_at) AS silence) v
    WHERE a.user_id = of_user AND v.silence > a.heartbeat_seconds
      AND (e.connected OR (account_hours(of_user, a.account, at)).is_open)
$$;

COMMENT ON FUNCTION breakers_tripped IS
    'The circuit breakers of a user that trip at a moment, with threshold and value.';

-- Flatten: a request to close every position of a scope. One at a time a user, so that none can
-- lead to another.
CREATE TABLE flatten_request (
    user_id     uuid        NOT NULL,
    flatten_id  uuid        NOT NULL DEFAULT gen_random_uuid(),
    scope       text        NOT NULL,
    run_id      uuid,
    account     text,
    reason      text        NOT NULL,
    asked_by    text        NOT NULL,
    asked_at    timestamptz NOT NULL,
    status      text        NOT NULL DEFAULT 'CANCELLING',
    checked_at  timestamptz,
    finished_at timestamptz,
    summary     jsonb,
    CONSTRAINT flatten_request_pkey PRIMARY KEY (user_id, flatten_id),
    CONSTRAINT flatten_request_belongs_to_user
        FOREIGN KEY (user_id) REFERENCES app_user (user_id) ON DELETE CASCADE,
    CONSTRAINT flatten_request_of_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT flatten_request_of_account FOREIGN KEY (user_id, account)
        REFERENCES broker_account (user_id, account) ON DELETE CASCADE,
    CONSTRAINT flatten_request_scope_known CHECK (scope IN ('RUN', 'ACCOUNT', 'USER')),
    CONSTRAINT flatten_request_names_its_scope
        CHECK ((run_id IS NOT NULL) = (scope = 'RUN')
               AND (account IS NOT NULL) = (scope = 'ACCOUNT')),
    CONSTRAINT flatten_request_status_known
        CHECK (status IN ('CANCELLING', 'CHECKING', 'CLOSING', 'DONE', 'PARTIAL', 'ABORTED')),
    CONSTRAINT flatten_request_finished_has_summary
        CHECK ((finished_at IS NOT NULL) = (status IN ('DONE', 'PARTIAL', 'ABORTED'))
               AND (finished_at IS NULL) = (summary IS NULL)),
    CONSTRAINT flatten_request_summary_is_object CHECK (jsonb_typeof(summary) = 'object'),
    CONSTRAINT flatten_request_words_short
        CHECK (length(reason) <= 500 AND length(asked_by) <= 100)
);

-- This prevents a flatten from being asked for while one runs.
CREATE UNIQUE INDEX flatten_request_one_at_a_time ON flatten_request (user_id)
    WHERE finished_at IS NULL;

COMMENT ON TABLE flatten_request IS 'Requests to close every position of a run, account or user.';

COMMENT ON COLUMN flatten_request.status IS
    'CANCELLING what works; CHECKING the margin; CLOSING; DONE; PARTIAL: something is still '
    'exposed; ABORTED: the broker says that closing would violate the margin.';

COMMENT ON COLUMN flatten_request.checked_at IS 'When the broker was asked what closing would do.';

COMMENT ON COLUMN flatten_request.summary IS 'What was closed, what was not, and why.';

-- What is open of a run, account by account: where a symbol was traded at one account only, what is
-- held (splits have changed it since); at several, what each of them filled. closing is what open
-- orders would close already.
CREATE FUNCTION flatten_positions(of_user uuid, of_run uuid, of_account text)
RETURNS TABLE (symbol text, account text, quantity numeric, closing numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    WITH filled AS (
        SELECT o.symbol, o.account,
               sum(CASE WHEN o.side = 'BUY' THEN o.filled_quantity
                        ELSE -o.filled_quantity END) AS quantity
        FROM orders o
        WHERE o.user_id = of_user AND o.run_id = of_run AND o.filled_quantity <> 0
        GROUP BY o.symbol, o.account
    ), held AS (
        SELECT p.symbol, f.account,
               CASE WHEN count(*) OVER (PARTITION BY p.symbol) = 1 THEN p.quantity
                    ELSE f.quantity END AS quantity
        FROM position p
        LEFT JOIN filled f ON f.symbol = p.symbol AND f.quantity <> 0
        WHERE p.user_id = of_user AND p.run_id = of_run AND p.quantity <> 0
    )
    SELECT h.symbol, h.account, h.quantity, coalesce((
        SELECT sum(o.quantity - o.filled_quantity) FROM orders o
        WHERE o.user_id = of_user AND o.run_id = of_run AND o.symbol = h.symbol
          AND o.account IS NOT DISTINCT FROM h.account
          AND o.side = CASE WHEN h.quantity > 0 THEN 'SELL' ELSE 'BUY' END
          AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')), 0)
    FROM held h
    WHERE of_account IS NULL OR h.account = of_account
    ORDER BY h.symbol, h.account
$$;

COMMENT ON FUNCTION flatten_positions IS
    'What a run holds, by symbol and account, and what its open orders would close of it.';

-- Risk: limits are rows, per user, run, account or symbol, and decided here when an order arrives,
-- so that an order from psql meets them too. A refusal is stored on the order: source, code, limit
-- and value. What only shrinks a position always passes those limits that exist to keep positions
-- and losses small.

CREATE TABLE limit_kind (
    kind        text     NOT NULL,
    place       integer NOT NULL,
    code        text     NOT NULL,
    source      text     NOT NULL,
    log_code    text     NOT NULL,
    unit        text     NOT NULL,
    lets_shrink boolean  NOT NULL,
    why         text     NOT NULL,
    CONSTRAINT limit_kind_pkey PRIMARY KEY (kind),
    CONSTRAINT limit_kind_place_once UNIQUE (place)
);

COMMENT ON TABLE limit_kind IS 'The kinds of limits, and what an order is told that breaks one.';

COMMENT ON COLUMN limit_kind.place IS 'Of several broken limits the first in this order is told.';

COMMENT ON COLUMN limit_kind.code IS 'The reject_code of an order that breaks it.';

COMMENT ON COLUMN limit_kind.log_code IS 'The event of the log line and of alerts.';

COMMENT ON COLUMN limit_kind.unit IS 'What limit_value counts; empty where there is none.';

COMMENT ON COLUMN limit_kind.lets_shrink IS
    'Whether what only shrinks a position passes although the limit is broken.';

INSERT INTO limit_kind (kind, place, code, source, log_code, unit, lets_shrink, why) VALUES
    ('RESTRICTED_SYMBOL', 1, 'RESTRICTED_SYMBOL', 'COMPLIANCE', 'RESTRICTED_SYMBOL', '', false,
     'Nothing of the symbol is traded from valid_from to valid_to.'),
    ('TRADING_HOURS', 2, 'MARKET_CLOSED', 'COMPLIANCE', 'MARKET_CLOSED', '', false,
     'Orders only while the exchange, or the account, is open; MARKET_HOLIDAY on a day without.'),
    ('WASH_TRADE', 3, 'WASH_TRADE', 'COMPLIANCE', 'WASH_TRADE', '', false,
     'No order that would trade with an open one of the same user.'),
    ('FORBIDDEN_SYMBOL', 4, 'FORBIDDEN_SYMBOL', 'RISK', 'FORBIDDEN_SYMBOL', '', false,
     'Nothing of the symbol is traded.'),
    ('ALLOWED_SYMBOL', 5, 'SYMBOL_NOT_ALLOWED', 'RISK', 'SYMBOL_NOT_ALLOWED', '', false,
     'Only symbols with such a row are traded.'),
    ('DUPLICATE_INTENT', 6, 'DUPLICATE_INTENT', 'RISK', 'DUPLICATE_INTENT', 'seconds', false,
     'Not the same order twice within so many seconds.'),
    ('ORDER_RATE_MAX', 7, 'ORDER_RATE_MAX', 'RISK', 'ORDER_RATE_MAX', 'orders', false,
     'So many orders in any window of the given seconds.'),
    ('OPEN_ORDERS_MAX', 8, 'OPEN_ORDERS_MAX', 'RISK', 'OPEN_ORDERS_MAX', 'orders', false,
     'So many orders open at a time.'),
    ('MAX_ORDER_NOTIONAL', 9, 'MAX_ORDER_NOTIONAL', 'RISK', 'MAX_ORDER_NOTIONAL', 'currency',
     false, 'So much money in one order.'),
    ('MAX_ORDER_QUANTITY', 10, 'MAX_ORDER_QUANTITY', 'RISK', 'MAX_ORDER_QUANTITY', 'units', false,
     'So many units in one order.'),
    ('MAX_POSITION', 11, 'MAX_POSITION', 'RISK', 'POSITION_LIMIT', 'units', true,
     'So many units held, long or short, if all open orders of the side fill.'),
    ('PRICE_COLLAR', 12, 'PRICE_COLLAR', 'RISK', 'PRICE_COLLAR', 'percent', false,
     'A limit or stop price at most so far from the last known price.'),
    ('GROSS_EXPOSURE_MAX', 13, 'GROSS_EXPOSURE_MAX', 'RISK', 'GROSS_EXPOSURE_MAX', 'currency',
     true, 'So much money in positions, long and short added, if open orders fill.'),
    ('NET_EXPOSURE_MAX', 14, 'NET_EXPOSURE_MAX', 'RISK', 'NET_EXPOSURE_MAX', 'currency', true,
     'So much money in positions, long less short, if open orders of a side fill.'),
    ('CONCENTRATION_MAX', 15, 'CONCENTRATION_MAX', 'RISK', 'CONCENTRATION_MAX', 'percent', true,
     'So much of the equity in one symbol.'),
    ('LEVERAGE_MAX', 16, 'LEVERAGE_MAX', 'RISK', 'LEVERAGE_MAX', 'times equity', true,
     'Gross exposure at most so many times the equity.'),
    ('DAILY_LOSS_MAX', 17, 'DAILY_LOSS_MAX', 'RISK', 'DAILY_LOSS_MAX', 'currency', true,
     'Nothing new once so much is lost since the last mark of the previous session.'),
    ('DRAWDOWN_MAX', 18, 'DRAWDOWN_MAX', 'RISK', 'DRAWDOWN_MAX', 'percent', true,
     'Nothing new once equity is so far below its highest mark.');

ALTER TABLE risk_limit
    ADD COLUMN account text,
    ADD COLUMN seconds numeric,
    ADD COLUMN valid_from date,
    ADD COLUMN valid_to date;

ALTER TABLE risk_limit
    ADD CONSTRAINT risk_limit_of_account FOREIGN KEY (user_id, account)
        REFERENCES broker_account (user_id, account) ON DELETE CASCADE,
    ADD CONSTRAINT risk_limit_kind_known FOREIGN KEY (kind) REFERENCES limit_kind (kind),
    ADD CONSTRAINT risk_limit_has_what_its_kind_needs CHECK (
        CASE WHEN kind IN ('FORBIDDEN_SYMBOL', 'ALLOWED_SYMBOL', 'RESTRICTED_SYMBOL')
        THEN symbol IS NOT NULL AND limit_value IS NULL
        WHEN kind IN ('WASH_TRADE', 'TRADING_HOURS') THEN limit_value IS NULL
        ELSE limit_value >= 0 AND limit_value < 1e20 AND limit_value IS NOT NULL END),
    ADD CONSTRAINT risk_limit_window_in_range CHECK (
        CASE WHEN kind = 'ORDER_RATE_MAX'
        THEN seconds > 0 AND seconds <= 86400 AND seconds IS NOT NULL
        WHEN kind = 'DUPLICATE_INTENT' THEN seconds IS NULL AND limit_value <= 86400
        ELSE seconds IS NULL END),
    ADD CONSTRAINT risk_limit_days_in_range CHECK (
        CASE WHEN kind = 'RESTRICTED_SYMBOL' THEN coalesce(valid_from <= valid_to, true)
        ELSE num_nonnulls(valid_from, valid_to) = 0 END);

COMMENT ON TABLE risk_limit IS
    'Limits that every order of a user, of one run, or for one account, must meet.';

COMMENT ON COLUMN risk_limit.account IS
    'The account whose orders it holds for; NULL: orders for any account, and on paper.';

COMMENT ON COLUMN risk_limit.limit_value IS 'In the unit that limit_kind names.';

COMMENT ON COLUMN risk_limit.seconds IS 'ORDER_RATE_MAX: the window in which orders are counted.';

COMMENT ON COLUMN risk_limit.valid_from IS
    'RESTRICTED_SYMBOL: first day (UTC) on which it holds; NULL: always did.';

COMMENT ON COLUMN risk_limit.valid_to IS
    'RESTRICTED_SYMBOL: last day (UTC) on which it holds; NULL: no end.';

-- What a user has sent to brokers of late. Paper orders cost it nothing: they are found by the
-- ledger's own key.
CREATE INDEX orders_recent_idx ON orders (user_id, recorded_at) WHERE broker <> 'paper';

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
        IF NEW.kind = 'ORDER_RATE_MAX' THEN
            NEW.seconds := coalesce(NEW.seconds, 1);
        END IF;
    ELSE
        PERFORM row_check_keeps_run(OLD.user_id, OLD.run_id, NEW.user_id, NEW.run_id, 'risk_limit');
    END IF;
    RETURN NEW;
END $$;

-- On which clock an order's windows, days and hours are counted: a replay's is the run's own, so
-- that the same feed gives the same rows; at a broker it is the wall's.
CREATE FUNCTION orders_moment(o orders) RETURNS timestamptz
LANGUAGE sql STABLE
RETURN CASE WHEN o.broker = 'paper' THEN o.logical_time ELSE now() END;

COMMENT ON FUNCTION orders_moment IS 'The moment at which limits look at an order.';

-- What a symbol costs as far as anybody here knows, whatever the order itself says of it.
CREATE FUNCTION orders_market_price(o orders) RETURNS numeric
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT coalesce(
        (SELECT k.price
         FROM ((SELECT p.mark_price AS price, p.marked_at AS at FROM position p
                WHERE p.user_id = o.user_id AND p.run_id = o.run_id AND p.symbol = o.symbol
                  AND p.mark_price IS NOT NULL)
               UNION ALL
               (SELECT b.close, b.bar_end FROM price_bar b
                WHERE b.symbol = o.symbol AND b.bar_end <= orders_moment(o)
                ORDER BY b.bar_end DESC LIMIT 1)) k
         ORDER BY k.at DESC LIMIT 1),
        o.reference_price)
$$;

COMMENT ON FUNCTION orders_market_price IS
    'The newest of a run''s mark and the last imported close; else the order''s reference price.';

-- The user's orders of the last seconds that were not refused, without the order itself. Orders
-- for brokers have an index of their own; those of a paper run are found in its ledger, or, where
-- their statement has not told them yet, among the open ones.
CREATE FUNCTION orders_recent(o orders, seconds numeric) RETURNS SETOF orders
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    after timestamptz := orders_moment(o) - seconds * interval '1 second';
BEGIN
    IF o.broker <> 'paper' THEN
        RETURN QUERY SELECT * FROM orders w
            WHERE w.user_id = o.user_id AND w.broker <> 'paper' AND w.recorded_at > after
              AND w.reject_source IS DISTINCT FROM 'VALIDATION'
              AND w.reject_source IS DISTINCT FROM 'RISK'
              AND w.reject_source IS DISTINCT FROM 'COMPLIANCE'
              AND w.order_id <> o.order_id;
        RETURN;
    END IF;
    RETURN QUERY SELECT * FROM orders w
        WHERE w.user_id = o.user_id AND w.run_id = o.run_id AND w.order_id <> o.order_id
          AND w.order_id IN (
              SELECT event_order_id(l.subject) FROM event_ledger l
              WHERE l.user_id = o.user_id AND l.run_id = o.run_id
                AND l.event_type = 'ORDER_PLACED'
                AND l.logical_time > after AND l.logical_time <= o.logical_time
              UNION
              SELECT n.order_id FROM orders n
              WHERE n.user_id = o.user_id AND n.run_id = o.run_id
                AND n.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
                AND n.logical_time > after AND n.logical_time <= o.logical_time);
END $$;

COMMENT ON FUNCTION orders_recent IS
    'Orders that a user, or on paper the run, placed in the last seconds before an order.';

CREATE FUNCTION orders_in_scope(w orders, l risk_limit) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN (l.run_id IS NULL OR l.run_id = w.run_id)
   AND (l.account IS NULL OR l.account = w.account)
   AND (l.symbol IS NULL OR l.symbol = w.symbol);

COMMENT ON FUNCTION orders_in_scope IS
    'Whether a limit''s run, account and symbol are an order''s.';

-- What counts orders: how many there are with this one, or how long ago the same was asked for.
CREATE FUNCTION orders_measure_flow(o orders, l risk_limit) RETURNS numeric
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    IF l.kind = 'ORDER_RATE_MAX' THEN
        RETURN 1 + (SELECT count(*) FROM orders_recent(o, l.seconds) w WHERE orders_in_scope(w, l));
    ELSIF l.kind = 'OPEN_ORDERS_MAX' THEN
        RETURN 1 + (SELECT count(*) FROM orders w
                    WHERE w.user_id = o.user_id AND orders_in_scope(w, l)
                      AND w.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
                      AND w.order_id <> o.order_id);
    END IF;
    RETURN (SELECT min(CASE WHEN o.broker = 'paper'
                            THEN extract(epoch FROM o.logical_time - w.logical_time)
                            ELSE extract(epoch FROM now() - w.recorded_at) END)
            FROM orders_recent(o, l.limit_value) w
            WHERE orders_in_scope(w, l)
              AND (w.symbol, w.side, w.quantity, w.order_type) =
                  (o.symbol, o.side, o.quantity, o.order_type)
              AND (w.limit_price, w.stop_price, w.trail_amount, w.trail_percent)
                  IS NOT DISTINCT FROM
                  (o.limit_price, o.stop_price, o.trail_amount, o.trail_percent));
END $$;

COMMENT ON FUNCTION orders_measure_flow IS
    'Orders in a limit''s window or open, with this one; or seconds since the same order.';

-- Whether an order would trade with an open one of the same user. A stop that was not reached yet
-- is in nobody's way.
CREATE FUNCTION orders_would_wash(o orders) RETURNS boolean
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT o.order_type IN ('MARKET', 'LIMIT') AND EXISTS (
        SELECT FROM strategy_run r
        JOIN orders w ON w.user_id = r.user_id AND w.run_id = r.run_id AND w.symbol = o.symbol
        WHERE r.user_id = o.user_id AND (r.broker = 'paper') = (o.broker = 'paper')
          AND w.side <> o.side AND w.order_id <> o.order_id
          AND w.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
          AND (w.order_type IN ('MARKET', 'LIMIT') OR w.triggered_at IS NOT NULL)
          AND coalesce(CASE WHEN o.side = 'BUY' THEN w.limit_price <= o.limit_price
                            ELSE w.limit_price >= o.limit_price END, true))
$$;

COMMENT ON FUNCTION orders_would_wash IS
    'Whether an order crosses an open one of the same user, in any run or account.';

-- MARKET_HOLIDAY on a day without a session, MARKET_CLOSED outside of one, NULL inside. A moment
-- at which no session is known is closed: hours that can't be shown to be kept are not.
CREATE FUNCTION orders_hours_code(o orders) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    at    timestamptz := orders_moment(o);
    place text;
    day   record;
BEGIN
    SELECT coalesce((SELECT CASE WHEN a.opens_at IS NULL THEN a.calendar ELSE '' END
                     FROM broker_account a
                     WHERE a.user_id = o.user_id AND a.account = o.account), r.calendar)
    INTO place FROM strategy_run r WHERE r.user_id = o.user_id AND r.run_id = o.run_id;
    IF place = '' THEN
        RETURN CASE WHEN NOT (account_hours(o.user_id, o.account, at)).is_open
                    THEN 'MARKET_CLOSED' END;
    END IF;
    SELECT bool_or(at BETWEEN s.open_at AND s.close_at) AS is_open,
           bool_or((s.open_at AT TIME ZONE 'UTC')::date = (at AT TIME ZONE 'UTC')::date
                   OR (s.close_at AT TIME ZONE 'UTC')::date = (at AT TIME ZONE 'UTC')::date)
               AS has_session
    INTO day FROM calendar_session s
    WHERE s.calendar = place
      AND s.session_date BETWEEN (at AT TIME ZONE 'UTC')::date - 1
                             AND (at AT TIME ZONE 'UTC')::date + 1;
    RETURN CASE WHEN day.is_open THEN NULL
                WHEN day.has_session THEN 'MARKET_CLOSED'
                ELSE 'MARKET_HOLIDAY' END;
END $$;

COMMENT ON FUNCTION orders_hours_code IS
    'MARKET_CLOSED or MARKET_HOLIDAY where an order comes outside of trading hours, or NULL.';

-- What a run would have in the market if its open orders, and one more, all filled: of each symbol
-- the worse of both sides. A symbol that nothing values makes all of it unknown (NULL).
CREATE FUNCTION run_exposure(o orders, order_price numeric, symbols text[], held numeric[],
                             marks numeric[],
                             OUT gross numeric, OUT net numeric, OUT own numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    WITH open AS (
        SELECT w.symbol, w.side, (w.quantity - w.filled_quantity)
               * abs(coalesce(w.limit_price, w.stop_price, w.reference_price)) AS value
        FROM orders w
        WHERE w.user_id = o.user_id AND w.run_id = o.run_id AND w.order_id <> o.order_id
          AND w.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
        UNION ALL
        SELECT o.symbol, o.side, o.quantity * abs(order_price)
    ), each AS (
        SELECT v.symbol, sum(v.held + v.buys) AS bought, sum(v.held - v.sells) AS sold,
               bool_and(v.held + v.buys + v.sells IS NOT NULL) AS known
        FROM (SELECT h.symbol, CASE WHEN h.units = 0 THEN 0 ELSE h.units * h.mark END AS held,
                     0 AS buys, 0 AS sells
              FROM unnest(symbols, held, marks) h (symbol, units, mark)
              UNION ALL
              SELECT w.symbol, 0, CASE WHEN w.side = 'BUY' THEN w.value ELSE 0 END,
                     CASE WHEN w.side = 'SELL' THEN w.value ELSE 0 END
              FROM open w) v
        GROUP BY v.symbol
    )
    SELECT CASE WHEN bool_and(e.known) THEN sum(greatest(abs(e.bought), abs(e.sold))) END,
           CASE WHEN bool_and(e.known)
                THEN greatest(abs(sum(e.bought)), abs(sum(e.sold))) END,
           sum(greatest(abs(e.bought), abs(e.sold)))
               FILTER (WHERE e.symbol = o.symbol AND e.known)
    FROM each e
$$;

COMMENT ON FUNCTION run_exposure IS
    'Gross and net exposure of a run, and that in an order''s symbol, in currency, at worst.';

-- What a limit of exposure or loss is held against.
CREATE FUNCTION orders_measure_books(o orders, l risk_limit, price numeric, cash numeric,
                                     symbols text[], held numeric[], marks numeric[])
RETURNS numeric LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    equity  numeric;
    highest numeric;
    worst   record;
BEGIN
    SELECT orders_measure_books.cash
           + coalesce(sum(CASE WHEN h.units = 0 THEN 0 ELSE h.units * h.mark END), 0)
    INTO equity FROM unnest(symbols, held, marks) h (symbol, units, mark);
    IF l.kind = 'DAILY_LOSS_MAX' THEN
        RETURN run_equity_before(o.user_id, o.run_id, orders_moment(o)) - equity;
    ELSIF l.kind = 'DRAWDOWN_MAX' THEN
        highest := run_equity_peak(o.user_id, o.run_id, orders_moment(o));
        RETURN CASE WHEN highest > 0 THEN round((highest - equity) / highest * 100, 8) ELSE 0 END;
    END IF;
    worst := run_exposure(o, price, symbols, held, marks);
    RETURN CASE WHEN l.kind = 'GROSS_EXPOSURE_MAX' THEN worst.gross
                WHEN l.kind = 'NET_EXPOSURE_MAX' THEN worst.net
                WHEN equity <= 0 THEN NULL
                WHEN l.kind = 'CONCENTRATION_MAX' THEN round(worst.own / equity * 100, 8)
                WHEN l.kind = 'LEVERAGE_MAX' THEN round(worst.gross / equity, 8) END;
END $$;

COMMENT ON FUNCTION orders_measure_books IS
    'Exposure, concentration, leverage, loss or drawdown of a run with an order; NULL: unknown.';

-- What an order, its price and its position are held against.
CREATE FUNCTION orders_measure_order(o orders, l risk_limit, price numeric, exposure numeric)
RETURNS numeric LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    market numeric;
BEGIN
    IF l.kind = 'MAX_ORDER_QUANTITY' THEN
        RETURN o.quantity;
    ELSIF l.kind = 'MAX_ORDER_NOTIONAL' THEN
        RETURN o.quantity * abs(price);
    ELSIF l.kind = 'MAX_POSITION' THEN
        RETURN abs(exposure + CASE WHEN o.side = 'BUY' THEN o.quantity ELSE -o.quantity END);
    ELSIF coalesce(o.limit_price, o.stop_price) IS NULL THEN
        RETURN 0;  -- no price that could be wrong
    END IF;
    market := orders_market_price(o);
    RETURN (SELECT max(round(abs(asked - market) / nullif(abs(market), 0) * 100, 8))
            FROM unnest(ARRAY[o.limit_price, o.stop_price]) asked);
END $$;

COMMENT ON FUNCTION orders_measure_order IS
    'What a limit of an order''s size, position or price looks at; NULL: unknown.';

-- Whether a limit without a number is broken.
CREATE FUNCTION orders_breaks_rule(o orders, l risk_limit) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    today date := (orders_moment(o) AT TIME ZONE 'UTC')::date;
BEGIN
    RETURN CASE
        WHEN l.kind = 'RESTRICTED_SYMBOL'
        THEN l.symbol = o.symbol AND today >= coalesce(l.valid_from, '-infinity')
             AND today <= coalesce(l.valid_to, 'infinity')
        WHEN l.kind = 'FORBIDDEN_SYMBOL' THEN l.symbol = o.symbol
        WHEN l.kind = 'ALLOWED_SYMBOL'
        THEN l.symbol <> o.symbol AND NOT EXISTS (
            SELECT FROM risk_limit a
            WHERE a.user_id = o.user_id AND a.kind = 'ALLOWED_SYMBOL' AND a.symbol = o.symbol
              AND (a.run_id IS NULL OR a.run_id = o.run_id)
              AND (a.account IS NULL OR a.account = o.account))
        WHEN l.kind = 'WASH_TRADE'
        THEN coalesce(l.symbol = o.symbol, true) AND orders_would_wash(o)
        ELSE coalesce(l.symbol = o.symbol, true) AND orders_hours_code(o) IS NOT NULL END;
END $$;

COMMENT ON FUNCTION orders_breaks_rule IS
    'Whether an order breaks a limit of symbols, hours or wash trades.';

-- Whether an order does nothing but make a position smaller, whatever else of its side fills.
CREATE FUNCTION orders_only_shrinks(o orders, exposure numeric) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN o.side = 'SELL' THEN o.quantity <= exposure ELSE o.quantity <= -exposure END;

COMMENT ON FUNCTION orders_only_shrinks IS
    'Whether an order only makes a position smaller; exposure as orders_gate has it.';

-- The first limit that an order breaks, with the limit and the value, or no row. in_flight: of the
-- limits that fills can break, only.
CREATE FUNCTION orders_broken_limit(o orders, price numeric, exposure numeric, cash numeric,
                                    symbols text[], held numeric[], marks numeric[],
                                    in_flight boolean DEFAULT false)
RETURNS TABLE (code text, source text, limit_value numeric, value numeric)
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    shrinks boolean := orders_only_shrinks(o, exposure);
    it      record;
    rule    limit_kind;
    l       risk_limit;
BEGIN
    FOR it IN
        SELECT r AS lim, k AS rule FROM risk_limit r JOIN limit_kind k ON k.kind = r.kind
        WHERE r.user_id = o.user_id AND (r.run_id IS NULL OR r.run_id = o.run_id)
          AND (r.account IS NULL OR r.account = o.account)
          AND (r.symbol IS NULL OR r.symbol = o.symbol OR r.kind = 'ALLOWED_SYMBOL')
          AND (NOT in_flight OR k.lets_shrink)
        ORDER BY k.place, r.limit_value, r.limit_id
    LOOP
        l := it.lim;
        rule := it.rule;
        -- A safety order that only closes is not hindered by what is there to keep risk small.
        CONTINUE WHEN shrinks AND (rule.lets_shrink AND l.kind <> 'MAX_POSITION'
                                   OR o.purpose = 'FLATTEN' AND rule.source <> 'COMPLIANCE');
        code := rule.code;
        source := rule.source;
        limit_value := l.limit_value;
        value := NULL;
        IF l.limit_value IS NULL THEN
            CONTINUE WHEN NOT orders_breaks_rule(o, l);
            code := CASE WHEN l.kind = 'TRADING_HOURS' THEN orders_hours_code(o) ELSE code END;
        ELSIF l.kind = 'DUPLICATE_INTENT' THEN
            value := orders_measure_flow(o, l);
            CONTINUE WHEN value IS NULL OR value >= l.limit_value;
        ELSE
            value := CASE
                WHEN l.kind IN ('ORDER_RATE_MAX', 'OPEN_ORDERS_MAX') THEN orders_measure_flow(o, l)
                WHEN rule.lets_shrink AND l.kind <> 'MAX_POSITION'
                THEN orders_measure_books(o, l, price, cash, symbols, held, marks)
                ELSE orders_measure_order(o, l, price, exposure) END;
            -- What can't be valued can't be shown to be within a limit. Out of a position that is
            -- too large one may always get, but not out at the other side.
            CONTINUE WHEN value <= l.limit_value
                       OR l.kind = 'MAX_POSITION' AND value <= abs(exposure)
                          AND (exposure + CASE WHEN o.side = 'BUY' THEN o.quantity
                                               ELSE -o.quantity END) * exposure >= 0;
        END IF;
        RETURN NEXT;
        RETURN;
    END LOOP;
END $$;

COMMENT ON FUNCTION orders_broken_limit IS 'The first risk_limit that an order breaks, or no row.';

-- Whether the gate has to look further than at the order itself: few users have limits, and
-- nobody else pays for them.
CREATE FUNCTION user_is_limited(of_user uuid) RETURNS boolean
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT coalesce((SELECT true FROM risk_limit l WHERE l.user_id = of_user LIMIT 1),
                    (SELECT true FROM trading_halt h
                     WHERE h.user_id = of_user AND h.lifted_at IS NULL LIMIT 1),
                    (SELECT true FROM system_halt s WHERE s.lifted_at IS NULL LIMIT 1), false)
$$;

COMMENT ON FUNCTION user_is_limited IS 'Whether a user has limits or is under a halt.';

-- What halts and limits say. The books are given where they are not those of the tables yet.
CREATE FUNCTION orders_refusal(o orders, price numeric, exposure numeric, cash numeric,
                               symbols text[], held numeric[], marks numeric[],
                               OUT source text, OUT code text, OUT reason text)
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    broken record;
BEGIN
    SELECT h.code, h.reason INTO code, reason FROM orders_halted(o, exposure) h;
    IF code IS NOT NULL THEN
        source := 'RISK';
        RETURN;
    END IF;
    IF symbols IS NULL THEN
        SELECT r.cash, p.symbols, p.held, p.marks
        INTO orders_refusal.cash, orders_refusal.symbols, orders_refusal.held, orders_refusal.marks
        FROM strategy_run r
        CROSS JOIN LATERAL (
            SELECT array_agg(h.symbol) AS symbols, array_agg(h.quantity) AS held,
                   array_agg(h.mark_price) AS marks
            FROM position h WHERE h.user_id = r.user_id AND h.run_id = r.run_id) p
        WHERE r.user_id = o.user_id AND r.run_id = o.run_id;
    END IF;
    SELECT * INTO broken
    FROM orders_broken_limit(o, price, exposure, cash, symbols, held, marks);
    IF FOUND THEN
        source := broken.source;
        code := broken.code;
        reason := coalesce('limit ' || trim_scale(broken.limit_value) || ', would be '
                           || coalesce(trim_scale(broken.value)::text, 'unknown'), o.symbol);
    END IF;
END $$;

COMMENT ON FUNCTION orders_refusal IS 'Why a halt or a limit refuses an order, or NULLs.';

-- The gate: why an order may not be taken, given the cash and the holding that it meets.
CREATE FUNCTION orders_gate(o orders, account_type text, limited boolean, free_cash numeric,
                            exposure numeric, cash numeric DEFAULT NULL,
                            symbols text[] DEFAULT NULL, held numeric[] DEFAULT NULL,
                            marks numeric[] DEFAULT NULL,
                            OUT source text, OUT code text, OUT reason text)
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    price   numeric := coalesce(o.limit_price, o.stop_price, o.reference_price);
    refusal record;
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
        refusal := orders_refusal(o, price, exposure, cash, symbols, held, marks);
        source := refusal.source;
        code := refusal.code;
        reason := refusal.reason;
    END IF;
    -- Nothing else opens the way that a safety order has past halts and limits.
    IF code IS NULL AND o.purpose = 'FLATTEN' AND orders_only_shrinks(o, exposure) IS NOT TRUE THEN
        code := 'FLATTEN_MUST_SHRINK';
        reason := format('holds %s, would %s %s', trim_scale(exposure), lower(o.side),
                         trim_scale(o.quantity));
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
        source := coalesce(source, 'RISK');
        reason := code || ': ' || reason;
    END IF;
END $$;

COMMENT ON FUNCTION orders_gate IS
    'Why an order is refused, or NULLs: limited is whether its user has limits or is halted, '
    'free_cash what open orders leave, exposure the holding and open orders of its side; cash, '
    'symbols, held and marks are the books, NULL for those of the tables.';

CREATE OR REPLACE FUNCTION orders_pass_gate() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run     record;
    held    numeric;
    limited boolean;
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
    limited := user_is_limited(NEW.user_id);
    -- Only the sums that the gate will ask for.
    refusal := orders_gate(
        NEW, run.account_type, limited,
        CASE WHEN run.account_type = 'CASH' AND NEW.side = 'BUY'
             THEN run.cash - run_reserved_cash(NEW.user_id, NEW.run_id) END,
        CASE WHEN limited OR NEW.purpose IS NOT NULL
                  OR run.account_type = 'CASH' AND NEW.side = 'SELL'
             THEN coalesce(held, 0) + orders_open_quantity(NEW) END);
    IF refusal.code IS NOT NULL THEN
        NEW.status := 'REJECTED';
        NEW.reject_source := refusal.source;
        NEW.reject_code := refusal.code;
        NEW.status_reason := coalesce(refusal.reason, NEW.status_reason);
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER orders_b_pass_gate BEFORE INSERT ON orders
    FOR EACH ROW WHEN (NEW.status <> ALL ('{REJECTED,FILLED}') AND NOT NEW.recovered)
    EXECUTE FUNCTION orders_pass_gate();

-- What was refused, taken apart: the text on the order is the gate's own.
CREATE VIEW order_refusal AS
    SELECT o.user_id, o.run_id, o.order_id, o.logical_time, o.symbol, o.account, o.reject_source,
           o.reject_code,
           coalesce((SELECT k.log_code FROM limit_kind k WHERE k.code = o.reject_code),
                    o.reject_code) AS log_code,
           substring(o.status_reason FROM ': limit (\S+), would be')::numeric AS limit_value,
           substring(o.status_reason FROM ', would be (-?[0-9.]+)$')::numeric AS value
    FROM orders o
    WHERE o.status = 'REJECTED';

COMMENT ON VIEW order_refusal IS 'Orders that were refused: the code, the limit and the value.';

-- What fills have made of limits: the rest of an order that began to fill is cancelled where what
-- is held and still open breaks one.
CREATE FUNCTION inflight_breaches(of_user uuid, of_run uuid)
RETURNS TABLE (order_id uuid, code text, limit_value numeric, value numeric)
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    o     orders;
    books record;
    units numeric;
BEGIN
    IF NOT user_is_limited(of_user) THEN
        RETURN;
    END IF;
    SELECT r.cash, array_agg(h.symbol) AS symbols, array_agg(h.quantity) AS held,
           array_agg(h.mark_price) AS marks
    INTO books FROM strategy_run r
    LEFT JOIN position h ON h.user_id = r.user_id AND h.run_id = r.run_id
    WHERE r.user_id = of_user AND r.run_id = of_run GROUP BY r.cash;
    FOR o IN SELECT * FROM orders w
             WHERE w.user_id = of_user AND w.run_id = of_run
               AND w.status IN ('PARTIALLY_FILLED', 'PENDING_MODIFY') AND w.filled_quantity > 0
             ORDER BY w.order_id
    LOOP
        o.quantity := o.quantity - o.filled_quantity;
        o.filled_quantity := 0;
        units := coalesce(books.held[array_position(books.symbols, o.symbol)], 0)
               + orders_open_quantity(o)
               - CASE WHEN o.side = 'BUY' THEN o.quantity ELSE -o.quantity END;
        RETURN QUERY SELECT o.order_id, b.code, b.limit_value, b.value
            FROM orders_broken_limit(o, coalesce(o.limit_price, o.stop_price, o.reference_price),
                                     units, books.cash, books.symbols, books.held, books.marks,
                                     true) b;
    END LOOP;
END $$;

COMMENT ON FUNCTION inflight_breaches IS
    'Orders that began to fill and whose rest breaks a limit, with the limit and the value.';

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

-- Reconciliation: what we hold against what the broker and the ledger say, and what was done. A
-- snapshot arrives in the inbox like everything else; what is numbered before it was heard before.
-- Whatever is compared is compared in one statement, for ten orders or a hundred thousand.

CREATE TABLE reconciliation (
    user_id      uuid        NOT NULL,
    account      text        NOT NULL,
    snapshot_id  uuid        NOT NULL,
    why          text        NOT NULL,
    taken_at     timestamptz NOT NULL,
    up_to_number bigint      NOT NULL,
    open_orders  integer     NOT NULL,
    undecided    integer     NOT NULL,
    began_at     timestamptz NOT NULL,
    finished_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT reconciliation_pkey PRIMARY KEY (user_id, account, snapshot_id),
    CONSTRAINT reconciliation_of_account FOREIGN KEY (user_id, account)
        REFERENCES broker_account (user_id, account) ON DELETE CASCADE,
    CONSTRAINT reconciliation_why_format CHECK (why ~ '^[A-Z][A-Z0-9_]*$' AND length(why) <= 63),
    CONSTRAINT reconciliation_counts_not_negative CHECK (open_orders >= 0 AND undecided >= 0)
);

-- When an account was compared last.
CREATE INDEX reconciliation_latest_idx ON reconciliation (user_id, account, up_to_number);

COMMENT ON TABLE reconciliation IS 'Snapshots that our books were compared with; append-only.';

COMMENT ON COLUMN reconciliation.snapshot_id IS 'The SNAPSHOT command that it answers.';

COMMENT ON COLUMN reconciliation.why IS 'START, CONNECTED, TIMER, STALE, DEMAND, ...';

COMMENT ON COLUMN reconciliation.taken_at IS 'The broker''s time of the snapshot.';

COMMENT ON COLUMN reconciliation.up_to_number IS 'The snapshot''s last row in the inbox.';

COMMENT ON COLUMN reconciliation.open_orders IS 'How many orders the broker works.';

COMMENT ON COLUMN reconciliation.undecided IS
    'How many orders it could not judge: what was asked for them may still be on its way.';

CREATE TABLE reconciliation_difference (
    user_id     uuid    NOT NULL,
    account     text    NOT NULL,
    snapshot_id uuid    NOT NULL,
    number      integer NOT NULL,
    class       text    NOT NULL,
    subject     text    NOT NULL,
    ours        jsonb,
    brokers     jsonb,
    derived     jsonb,
    action      text    NOT NULL,
    reason      text    NOT NULL,
    CONSTRAINT reconciliation_difference_pkey
        PRIMARY KEY (user_id, account, snapshot_id, number),
    CONSTRAINT reconciliation_difference_of_reconciliation
        FOREIGN KEY (user_id, account, snapshot_id)
        REFERENCES reconciliation (user_id, account, snapshot_id) ON DELETE CASCADE,
    CONSTRAINT reconciliation_difference_class_known CHECK (class = ANY ('{MISSING_AT_BROKER,
        NEVER_ARRIVED,FOUND,TERMS_DIFFER,STATUS_DIFFERS,FILLED_DIFFERS,IDS_DIFFER,ACCOUNT_DIFFERS,
        CONTRACT_CHANGED,ORPHAN,FOREIGN,EXECUTION_DIFFERS,POSITION_DIFFERS,CASH_DIFFERS}')),
    CONSTRAINT reconciliation_difference_action_known CHECK (action = ANY ('{CANCELED,MOVED,KEPT,
        RECORDED,TERMS_TAKEN,CANCEL_SENT,ADOPTED,ALERTED,HELD}')),
    CONSTRAINT reconciliation_difference_words_short
        CHECK (length(subject) <= 200 AND length(reason) <= 2000)
);

COMMENT ON TABLE reconciliation_difference IS
    'What a reconciliation found, three ways, and what was done about it; append-only.';

COMMENT ON COLUMN reconciliation_difference.subject IS 'An order''s id, a symbol or a currency.';

COMMENT ON COLUMN reconciliation_difference.derived IS 'What the ledger says.';

COMMENT ON COLUMN reconciliation_difference.action IS
    'What was done: the order CANCELED, MOVED or KEPT as it is, ids RECORDED, TERMS_TAKEN, a '
    'CANCEL_SENT, an orphan ADOPTED; ALERTED where a person must decide, HELD where the run ended.';

CREATE TRIGGER reconciliation_z_refuse_change BEFORE UPDATE OR DELETE ON reconciliation
    FOR EACH ROW EXECUTE FUNCTION boundary_refuse_delete('reconciliation');

CREATE TRIGGER reconciliation_z_refuse_truncate BEFORE TRUNCATE ON reconciliation
    FOR EACH STATEMENT EXECUTE FUNCTION boundary_refuse_delete('reconciliation');

CREATE TRIGGER reconciliation_difference_z_refuse_change
    BEFORE UPDATE OR DELETE ON reconciliation_difference
    FOR EACH ROW EXECUTE FUNCTION boundary_refuse_delete('reconciliation_difference');

CREATE TRIGGER reconciliation_difference_z_refuse_truncate
    BEFORE TRUNCATE ON reconciliation_difference
    FOR EACH STATEMENT EXECUTE FUNCTION boundary_refuse_delete('reconciliation_difference');

-- Snapshots and sessions among all that an account heard.
CREATE INDEX broker_event_snapshot_idx ON broker_event (user_id, account, kind, number)
    WHERE kind IN ('SNAPSHOT', 'CONNECTED', 'CONTRACT_CHANGED');

-- When a broker was asked last.
CREATE INDEX broker_command_snapshot_idx ON broker_command (user_id, account, created_at)
    WHERE kind = 'SNAPSHOT';

-- --- What the broker says -------------------------------------------------------------------

-- The newest whole snapshot that was not compared yet. One that was asked for a dry run is not
-- compared by anybody but who asked.
CREATE FUNCTION snapshot_newest(of_user uuid, of_account text) RETURNS uuid
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT (e.payload ->> 'snapshot_id')::uuid FROM broker_event e
    WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
      AND e.number > coalesce((SELECT max(r.up_to_number) FROM reconciliation r
                               WHERE r.user_id = of_user AND r.account = of_account), 0)
      AND NOT EXISTS (SELECT FROM broker_command c
                      WHERE c.user_id = of_user AND c.account = of_account
                        AND c.command_id = (e.payload ->> 'snapshot_id')::uuid
                        AND c.payload ? 'dry_run')
    GROUP BY e.payload ->> 'snapshot_id'
    HAVING count(DISTINCT e.payload ->> 'part') = max((e.payload ->> 'parts')::integer)
    ORDER BY max(e.number) DESC LIMIT 1
$$;

COMMENT ON FUNCTION snapshot_newest IS
    'The newest whole snapshot of an account that is still to be compared, or NULL.';

CREATE FUNCTION snapshot_facts(of_user uuid, of_account text, of_snapshot uuid,
    OUT is_whole boolean, OUT is_waiting boolean, OUT why text, OUT taken_at timestamptz,
    OUT asked_at timestamptz, OUT after_number bigint, OUT first_number bigint,
    OUT last_number bigint, OUT holder uuid)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    SELECT count(DISTINCT e.payload ->> 'part') = max((e.payload ->> 'parts')::integer),
           max((e.payload ->> 'taken_at')::timestamptz), min(e.number), max(e.number),
           (array_agg(e.holder ORDER BY e.number))[1]
    INTO is_whole, taken_at, first_number, last_number, holder FROM broker_event e
    WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
      AND e.payload ->> 'snapshot_id' = of_snapshot::text
      -- The rows of one snapshot come after the command that asked for it.
      AND e.number > coalesce((SELECT (c.payload ->> 'after_number')::bigint FROM broker_command c
                               WHERE c.user_id = of_user AND c.account = of_account
                                 AND c.command_id = of_snapshot), 0);
    SELECT coalesce(c.payload ->> 'why', 'UNASKED'), c.claimed_at,
           (c.payload ->> 'after_number')::bigint
    INTO why, asked_at, after_number FROM broker_command c
    WHERE c.user_id = of_user AND c.account = of_account AND c.command_id = of_snapshot;
    is_whole := coalesce(is_whole, false);
    why := coalesce(why, 'UNASKED');
    after_number := coalesce(after_number, 0);
    -- Nobody asked: nothing certainly went before it.
    asked_at := coalesce(asked_at, '-infinity');
    is_waiting := EXISTS (
        SELECT FROM broker_event w
        WHERE w.user_id = of_user AND w.account = of_account AND w.applied_at IS NULL
          AND w.number < first_number AND w.kind <> 'SNAPSHOT');
END $$;

COMMENT ON FUNCTION snapshot_facts IS
    'A snapshot: whether it is whole, whether earlier news still waits to be applied, when it was '
    'taken and asked for, its place in the inbox, and the connector that brought it.';

CREATE TYPE snapshot_order AS (
    order_ref       text,
    ours            boolean,
    status          text,
    filled          numeric,
    broker_order_id bigint,
    perm_id         bigint,
    symbol          text,
    side            text,
    quantity        numeric,
    order_type      text,
    time_in_force   text,
    limit_price     numeric,
    stop_price      numeric,
    trail_amount    numeric,
    trail_percent   numeric,
    expire_at       timestamptz
);

COMMENT ON TYPE snapshot_order IS 'An order that a broker works, as its snapshot says it.';

CREATE FUNCTION snapshot_orders(of_user uuid, of_account text, of_snapshot uuid)
RETURNS SETOF snapshot_order
LANGUAGE sql STABLE ROWS 10000 SET search_path = public, pg_temp AS $$
    SELECT o.* FROM broker_event e
    CROSS JOIN LATERAL jsonb_populate_recordset(NULL::snapshot_order,
                                                e.payload -> 'open_orders') AS o
    WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
      AND e.payload ->> 'snapshot_id' = of_snapshot::text
$$;

COMMENT ON FUNCTION snapshot_orders IS 'The orders that a broker works, as a snapshot says.';

-- Of orders that ended lately, how: what is here did arrive.
CREATE FUNCTION snapshot_closed(of_user uuid, of_account text, of_snapshot uuid)
RETURNS SETOF snapshot_order
LANGUAGE sql STABLE ROWS 1000 SET search_path = public, pg_temp AS $$
    SELECT o.* FROM broker_event e
    CROSS JOIN LATERAL jsonb_populate_recordset(NULL::snapshot_order,
                                                e.payload -> 'closed_orders') AS o
    WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
      AND e.payload ->> 'snapshot_id' = of_snapshot::text
$$;

COMMENT ON FUNCTION snapshot_closed IS
    'The orders that have ended lately, as a snapshot says, if its broker tells them.';

-- A fill of an order that we don't know arrives with the snapshot that tells its terms.
CREATE FUNCTION snapshot_terms(of_user uuid, of_account text, of_ref text)
RETURNS SETOF snapshot_order
LANGUAGE sql STABLE ROWS 1 SET search_path = public, pg_temp AS $$
    SELECT o.* FROM broker_event e
    CROSS JOIN LATERAL jsonb_populate_recordset(
        NULL::snapshot_order, coalesce(e.payload -> 'open_orders', '[]')
                              || coalesce(e.payload -> 'closed_orders', '[]')) AS o
    WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
      AND e.applied_at IS NULL AND o.order_ref = of_ref
    ORDER BY e.number DESC LIMIT 1
$$;

COMMENT ON FUNCTION snapshot_terms IS
    'An order as the newest snapshot says it that waits to be compared; no row where none does.';

-- A connector asks what it must still put into the inbox, which it may not read.
CREATE FUNCTION executions_unheard(of_user uuid, of_account text, kinds text[], executions text[])
RETURNS SETOF bigint
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
    SELECT x.place FROM unnest(kinds, executions) WITH ORDINALITY AS x (kind, execution_id, place)
    WHERE NOT EXISTS (SELECT FROM broker_event e
                      WHERE e.user_id = of_user AND e.account = of_account
                        AND e.execution_id = x.execution_id AND e.kind = x.kind)
    ORDER BY x.place
$$;

COMMENT ON FUNCTION executions_unheard IS
    'The places of executions, busts and commissions that an account''s inbox does not have.';

-- Orders of which the broker has spoken after it took the snapshot: newer news wins.
CREATE FUNCTION snapshot_overtaken(of_user uuid, of_account text, of_snapshot uuid)
RETURNS TABLE (order_ref text)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT DISTINCT e.order_ref
    FROM snapshot_facts(of_user, of_account, of_snapshot) s
    JOIN broker_event e ON e.user_id = of_user AND e.account = of_account
                       AND e.number > s.after_number
    WHERE e.order_ref IS NOT NULL
      AND e.kind IN ('ORDER_STATUS', 'MODIFIED', 'EXECUTION', 'BUST', 'REJECTED',
                     'CANCEL_REJECTED', 'MODIFY_REJECTED')
      AND (e.number > s.first_number OR e.event_at > s.taken_at)
$$;

COMMENT ON FUNCTION snapshot_overtaken IS 'Orders of which there is newer news than a snapshot.';

-- Whether a snapshot can tell what became of a command: nothing of it can be on its way any more.
-- A connection that broke, or whose connector is gone, carries nothing; on one that stands, an
-- answer that has not come for half a minute will not come.
CREATE FUNCTION command_is_settled(c broker_command, asked_at timestamptz, by_holder uuid,
                                   first_number bigint)
RETURNS boolean LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN CASE
        WHEN c.claimed_by IS NULL THEN false
        WHEN c.outcome IS NULL THEN c.claimed_by <> by_holder AND c.claimed_at < asked_at
        WHEN c.outcome <> 'SENT' THEN c.done_at < asked_at
        ELSE c.done_at < asked_at - interval '30 seconds'
             OR c.done_at < asked_at AND EXISTS (
                 SELECT FROM broker_event e
                 WHERE e.user_id = c.user_id AND e.account = c.account AND e.kind = 'CONNECTED'
                   AND e.number < first_number AND e.received_at > c.done_at) END;
END $$;

COMMENT ON FUNCTION command_is_settled IS
    'Whether nothing of a command can still be on its way to the broker that took a snapshot.';

-- --- Orders ---------------------------------------------------------------------------------

CREATE TYPE order_difference AS (
    class           text,
    run_id          uuid,
    order_id        uuid,
    subject         text,
    becomes         text,
    action          text,
    reason          text,
    ours            jsonb,
    brokers         jsonb,
    command_id      uuid,
    outcome         text,
    broker_order_id bigint,
    perm_id         bigint
);

COMMENT ON TYPE order_difference IS
    'An order that we and a broker see differently. becomes: its status then; outcome: that of '
    'the command which asked for it.';

CREATE FUNCTION order_difference_ours(o orders) RETURNS jsonb
LANGUAGE sql STABLE
RETURN jsonb_strip_nulls(jsonb_build_object(
    'status', o.status, 'status_reason', o.status_reason, 'symbol', o.symbol, 'side', o.side,
    'quantity', trim_scale(o.quantity)::text, 'filled', trim_scale(o.filled_quantity)::text,
    'limit_price', trim_scale(o.limit_price)::text, 'stop_price', trim_scale(o.stop_price)::text,
    'account', o.account, 'broker_order_id', o.broker_order_id, 'perm_id', o.perm_id));

COMMENT ON FUNCTION order_difference_ours IS 'An order as we see it, for a difference.';

-- Orders of ours that should be at the broker and that it does not work. Executions that explain it
-- were applied before. Where the broker says how an order ended, so it did; of what it never said a
-- word, the submit never arrived.
CREATE FUNCTION reconcile_missing(of_user uuid, of_account text, of_snapshot uuid)
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

COMMENT ON FUNCTION reconcile_missing IS
    'Orders that we hold for working and a broker does not work; UNDECIDED among them.';

-- What an order of ours that the broker works is, in our words.
CREATE FUNCTION order_status_at_broker(o orders, brokers_status text) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN o.filled_quantity >= o.quantity THEN NULL
            WHEN o.filled_quantity > 0 THEN 'PARTIALLY_FILLED'
            WHEN brokers_status = 'PENDING_SUBMIT'
                 AND o.status IN ('NEW', 'PENDING', brokers_status)
            THEN brokers_status
            ELSE 'ROUTED' END;

COMMENT ON FUNCTION order_status_at_broker IS
    'The status of an order that a broker works, or NULL where its fills say that it is over.';

-- A trailing stop moves at the broker: its price is no term.
CREATE FUNCTION order_has_terms(order_type text, quantity numeric, limit_price numeric,
                                stop_price numeric, t snapshot_order) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN quantity = t.quantity AND limit_price IS NOT DISTINCT FROM t.limit_price
       AND (order_type = 'TRAIL' OR stop_price IS NOT DISTINCT FROM t.stop_price);

COMMENT ON FUNCTION order_has_terms IS 'Whether these are the terms on which a broker works it.';

CREATE FUNCTION order_is_alike(o orders, t snapshot_order, of_account text) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN o.account = of_account AND o.symbol = t.symbol AND o.side = t.side
       AND o.status IN ('PENDING_SUBMIT', 'ROUTED', 'PARTIALLY_FILLED')
       AND o.status = order_status_at_broker(o, t.status)
       AND order_has_terms(o.order_type, o.quantity, o.limit_price, o.stop_price, t)
       AND o.filled_quantity = t.filled
       AND (o.broker_order_id, o.perm_id) IS NOT DISTINCT FROM
           (coalesce(t.broker_order_id, o.broker_order_id), coalesce(t.perm_id, o.perm_id));

COMMENT ON FUNCTION order_is_alike IS 'Whether we and the broker see an order alike.';

-- In what an order differs: its status first, which says what was lost on the way; then the rest.
CREATE FUNCTION order_compare_status(o orders, t snapshot_order, asked broker_command,
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

COMMENT ON FUNCTION order_compare_status IS
    'How the status of an order that a broker works differs from ours, what it becomes, and why.';

CREATE FUNCTION order_asked_for(asked broker_command, t snapshot_order) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN asked.kind = 'MODIFY' AND order_has_terms(
    asked.payload ->> 'order_type', (asked.payload ->> 'quantity')::numeric,
    (asked.payload ->> 'limit_price')::numeric, (asked.payload ->> 'stop_price')::numeric, t);

COMMENT ON FUNCTION order_asked_for IS 'Whether a broker works an order as a command asks.';

CREATE FUNCTION order_compare(o orders, t snapshot_order, of_account text, asked broker_command,
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

COMMENT ON FUNCTION order_compare IS
    'In what an order of ours and the broker''s differ; one row for each thing.';

-- An order may also differ in several ways at once. The run's lock order keeps moves of one order
-- apart; here nothing is locked.
CREATE FUNCTION reconcile_working(of_user uuid, of_account text, of_snapshot uuid)
RETURNS SETOF order_difference
LANGUAGE sql STABLE ROWS 100 SET search_path = public, pg_temp AS $$
    SELECT d.class, o.run_id, o.order_id, o.order_id::text, d.becomes, d.action, d.reason,
           order_difference_ours(o), jsonb_strip_nulls(to_jsonb(t)), asked.command_id,
           CASE WHEN d.action = 'TERMS_TAKEN' THEN 'ARRIVED'
                WHEN d.class = 'STATUS_DIFFERS' AND o.status IN ('PENDING_CANCEL', 'PENDING_MODIFY')
                THEN 'NEVER_ARRIVED' END,
           t.broker_order_id, t.perm_id
    FROM snapshot_facts(of_user, of_account, of_snapshot) s
    CROSS JOIN snapshot_orders(of_user, of_account, of_snapshot) t
    JOIN orders o ON o.user_id = of_user AND o.order_id::text = t.order_ref AND o.broker <> 'paper'
    LEFT JOIN snapshot_overtaken(of_user, of_account, of_snapshot) n ON n.order_ref = t.order_ref
    -- What was asked of it last.
    LEFT JOIN LATERAL (
        SELECT a FROM broker_command a
        WHERE a.user_id = of_user AND a.run_id = o.run_id AND a.order_id = o.order_id
          AND a.account = of_account
          AND a.kind = CASE WHEN o.status = 'PENDING_CANCEL' THEN 'CANCEL' ELSE 'MODIFY' END
        ORDER BY a.order_version DESC LIMIT 1) l (a) ON true
    CROSS JOIN LATERAL (SELECT (l.a).*) asked
    CROSS JOIN LATERAL order_compare(
        o, t, of_account, l.a, asked.command_id IS NULL
        OR command_is_settled(l.a, s.asked_at, s.holder, s.first_number)) d
    WHERE n.order_ref IS NULL AND NOT order_is_alike(o, t, of_account)
$$;

COMMENT ON FUNCTION reconcile_working IS
    'Orders that a broker works and that we see differently; UNDECIDED among them.';

-- Commands in doubt of orders that we and the broker see alike, so that nothing else tells what
-- became of them: whatever is asked of those orders next waits for it.
CREATE FUNCTION reconcile_commands(of_user uuid, of_account text, of_snapshot uuid)
RETURNS TABLE (command_id uuid, outcome text)
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    SELECT c.command_id,
           CASE WHEN c.kind = 'SUBMIT' OR order_asked_for(c, t) THEN 'ARRIVED'
                WHEN t.order_ref IS NOT NULL THEN 'NEVER_ARRIVED'
                -- It is over, and nobody will know.
                ELSE 'UNKNOWN' END
    FROM snapshot_facts(of_user, of_account, of_snapshot) s
    JOIN broker_command c ON c.user_id = of_user AND c.account = of_account
                         AND c.claimed_by IS NOT NULL
                         AND coalesce(c.outcome, 'UNKNOWN') = 'UNKNOWN'
    JOIN orders o ON o.user_id = of_user AND o.run_id = c.run_id AND o.order_id = c.order_id
    LEFT JOIN snapshot_orders(of_user, of_account, of_snapshot) t
           ON t.order_ref = o.order_id::text
    LEFT JOIN snapshot_overtaken(of_user, of_account, of_snapshot) n
           ON n.order_ref = o.order_id::text
    WHERE command_is_settled(c, s.asked_at, s.holder, s.first_number)
      AND CASE
          WHEN c.kind = 'SUBMIT' THEN t.order_ref IS NOT NULL OR EXISTS (
              SELECT FROM broker_event e
              WHERE e.user_id = of_user AND e.account = of_account
                AND e.order_ref = o.order_id::text AND broker_event_shows_order(e))
          -- What is still asked for is judged with the order itself.
          ELSE o.status <> 'PENDING_' || c.kind AND n.order_ref IS NULL
               AND (t.order_ref IS NOT NULL
                    OR o.status IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')) END
$$;

COMMENT ON FUNCTION reconcile_commands IS
    'What became of commands in doubt of orders that do not differ, as a snapshot shows.';

-- The run that takes up what turns out to be at an account, as with fills (engine/inbox.py).
CREATE FUNCTION account_run(of_user uuid, of_account text) RETURNS uuid
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT r.run_id FROM strategy_run r
    JOIN run_route t ON t.user_id = of_user AND t.run_id = r.run_id AND t.account = of_account
    WHERE r.user_id = of_user AND r.status IN ('RUNNING', 'STOPPING')
    ORDER BY r.status, r.run_id LIMIT 1
$$;

COMMENT ON FUNCTION account_run IS
    'The run with a route to an account that takes up orders found there, or NULL.';

-- Orders at the broker that none of our runs has.
CREATE FUNCTION reconcile_strangers(of_user uuid, of_account text, of_snapshot uuid)
RETURNS SETOF order_difference
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    SELECT CASE WHEN k.is_orphan THEN 'ORPHAN' ELSE 'FOREIGN' END, r.run_id,
           CASE WHEN k.is_orphan THEN t.order_ref::uuid END,
           left(coalesce(nullif(t.order_ref, ''), 'perm ' || nullif(t.perm_id, 0),
                         'order ' || t.broker_order_id, 'unnamed'), 200),
           CASE WHEN k.is_orphan AND r.run_id IS NOT NULL THEN CASE
               WHEN t.status = 'PENDING_SUBMIT' THEN t.status ELSE 'ROUTED' END END,
           CASE WHEN NOT k.is_orphan THEN 'ALERTED' WHEN r.run_id IS NULL THEN 'HELD'
                ELSE 'ADOPTED' END,
           CASE WHEN NOT k.is_orphan THEN 'it is not ours'
                WHEN r.run_id IS NULL THEN 'it is ours, and no run takes it up'
                ELSE 'it is ours, and we did not know it' END,
           NULL::jsonb, jsonb_strip_nulls(to_jsonb(t)), NULL::uuid, NULL::text, t.broker_order_id,
           t.perm_id
    FROM snapshot_orders(of_user, of_account, of_snapshot) t
    LEFT JOIN snapshot_overtaken(of_user, of_account, of_snapshot) n ON n.order_ref = t.order_ref
    LEFT JOIN orders o ON o.user_id = of_user AND o.order_id::text = t.order_ref
                      AND o.broker <> 'paper'
    CROSS JOIN (SELECT account_run(of_user, of_account)) r (run_id)
    CROSS JOIN LATERAL (SELECT coalesce(
        t.ours AND event_order_id(t.order_ref) IS NOT NULL AND length(t.order_ref) = 36
        AND t.quantity > 0 AND t.side IN ('BUY', 'SELL')
        AND t.order_type IN ('MARKET', 'LIMIT', 'STOP', 'STOP_LIMIT', 'TRAIL'), false)
    ) k (is_orphan)
    WHERE o.order_id IS NULL AND n.order_ref IS NULL
$$;

COMMENT ON FUNCTION reconcile_strangers IS
    'Orders that a broker works and no run of ours has: ORPHAN where they are ours, else FOREIGN.';

-- What the ledger makes of orders: one pass, for as many as differ.
CREATE FUNCTION orders_derived(of_user uuid, of_orders uuid[])
RETURNS TABLE (order_id uuid, derived jsonb)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    WITH told AS (
        SELECT o.order_id, l.seq, l.event_type, l.payload,
               l.event_type NOT IN ('EXECUTION', 'ORDER_MODIFIED', 'ORDER_RESTATED',
                                    'ORDER_ID_REUSE', 'ORDER_ID_WRAP') AS is_move
        FROM orders o
        JOIN event_ledger l ON l.user_id = of_user AND l.run_id = o.run_id
                           AND left(l.subject, 36) = o.order_id::text COLLATE "C"
        WHERE o.user_id = of_user AND o.order_id = ANY (of_orders)
          AND (l.event_type = 'EXECUTION' OR starts_with(l.event_type, 'ORDER_'))
    ), summed AS (
        SELECT t.order_id,
               coalesce(sum((t.payload ->> 'quantity')::numeric)
                        FILTER (WHERE t.event_type = 'EXECUTION'), 0) AS filled,
               max(t.seq) FILTER (WHERE t.event_type = 'EXECUTION') AS filled_seq,
               (array_agg(t.payload ->> 'quantity' ORDER BY t.seq DESC)
                FILTER (WHERE t.event_type <> 'EXECUTION' AND t.payload ? 'quantity'))[1]::numeric
                   AS quantity,
               max(t.seq) FILTER (WHERE t.is_move) AS moved_seq,
               (array_agg(substr(t.event_type, 7) ORDER BY t.seq DESC)
                FILTER (WHERE t.is_move))[1] AS status
        FROM told t GROUP BY t.order_id
    )
    SELECT s.order_id, jsonb_build_object(
        'filled', trim_scale(s.filled)::text, 'quantity', trim_scale(s.quantity)::text,
        'status', CASE
            WHEN s.filled_seq > s.moved_seq AND s.filled >= s.quantity THEN 'FILLED'
            WHEN s.filled_seq > s.moved_seq AND s.status NOT IN ('PENDING_CANCEL', 'PENDING_MODIFY')
            THEN CASE WHEN s.filled > 0 THEN 'PARTIALLY_FILLED' ELSE 'ROUTED' END
            WHEN s.status = 'PLACED' THEN 'NEW' ELSE s.status END)
    FROM summed s
$$;

COMMENT ON FUNCTION orders_derived IS 'Status and fills of orders as the ledger tells them.';

-- Contracts that are no longer what they were, and orders in them of which nothing else says that
-- they are over.
CREATE FUNCTION reconcile_contracts(of_user uuid, of_account text, of_snapshot uuid)
RETURNS SETOF order_difference
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    WITH changed AS (
        SELECT e.number, e.received_at, e.payload
        FROM snapshot_facts(of_user, of_account, of_snapshot) s
        JOIN broker_event e ON e.user_id = of_user AND e.account = of_account
                           AND e.kind = 'CONTRACT_CHANGED' AND e.number < s.first_number
        WHERE e.number > coalesce((SELECT max(r.up_to_number) FROM reconciliation r
                                   WHERE r.user_id = of_user AND r.account = of_account), 0)
    )
    SELECT 'CONTRACT_CHANGED', account_run(of_user, of_account), NULL::uuid,
           c.payload ->> 'symbol', NULL, 'ALERTED', 'it is ' || (c.payload ->> 'new_symbol')
           || ' from now on', NULL::jsonb, c.payload, NULL::uuid, NULL, NULL::bigint, NULL::bigint
    FROM changed c
    UNION ALL
    SELECT DISTINCT 'CONTRACT_CHANGED', o.run_id, o.order_id, o.order_id::text, NULL, 'CANCEL_SENT',
           'its symbol is another from now on', order_difference_ours(o), NULL::jsonb, NULL::uuid,
           NULL, NULL::bigint, NULL::bigint
    FROM changed c
    JOIN orders o ON o.user_id = of_user AND o.account = of_account
                 AND o.symbol = c.payload ->> 'symbol' AND o.recorded_at < c.received_at
                 AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED', 'PENDING_CANCEL')
$$;

COMMENT ON FUNCTION reconcile_contracts IS
    'Symbols that have changed since the last reconciliation, and the open orders in them.';

-- --- Executions, positions, cash ------------------------------------------------------------

-- What the broker executed and our books lack, of what came since the last reconciliation.
CREATE FUNCTION reconcile_executions(of_user uuid, of_account text, of_snapshot uuid)
RETURNS TABLE (subject text, ours jsonb, brokers jsonb, derived jsonb)
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    SELECT left(e.execution_id, 200), NULL::jsonb,
           jsonb_build_object('order_ref', e.order_ref, 'event_at', event_moment(e.event_at))
           || e.payload, NULL::jsonb
    FROM snapshot_facts(of_user, of_account, of_snapshot) s
    JOIN broker_event e ON e.user_id = of_user AND e.account = of_account
                       AND e.number < s.first_number
    LEFT JOIN execution x ON x.user_id = of_user AND x.execution_id = e.execution_id
                         AND x.order_id::text = e.order_ref
    WHERE e.kind = 'EXECUTION' AND e.finding IN ('NEW', 'CORRECTION', 'ORPHAN', 'HELD')
      AND x.execution_id IS NULL
      AND e.number > coalesce((SELECT max(r.up_to_number) FROM reconciliation r
                               WHERE r.user_id = of_user AND r.account = of_account), 0)
$$;

COMMENT ON FUNCTION reconcile_executions IS
    'Executions that a broker told and that are in no run''s books.';

CREATE AGGREGATE numeric_product(factor numeric) (
    SFUNC = numeric_mul, STYPE = numeric, INITCOND = '1');

COMMENT ON AGGREGATE numeric_product(numeric) IS 'The product of numbers; 1 of none.';

-- Executions of an account in today's units: those from before a split count as many more.
CREATE FUNCTION account_executions(of_user uuid, of_account text)
RETURNS TABLE (run_id uuid, execution_id text, symbol text, units numeric, flow numeric,
               currency text, event_at timestamptz)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT e.run_id, e.execution_id, e.symbol,
           CASE WHEN e.side = 'BUY' THEN e.quantity ELSE -e.quantity END * coalesce(
               (SELECT numeric_product(a.numerator) / numeric_product(a.denominator)
                FROM split_applied p
                JOIN corporate_action a ON a.symbol = p.symbol AND a.ex_date = p.ex_date
                                       AND a.kind = p.kind
                WHERE p.user_id = of_user AND p.run_id = e.run_id AND p.symbol = e.symbol
                  AND p.logical_time > e.logical_time HAVING count(*) > 0), 1),
           execution_cash_flow(e.side, e.quantity, e.price, e.commission), r.currency, e.event_at
    FROM orders o
    JOIN execution e ON e.user_id = of_user AND e.run_id = o.run_id AND e.order_id = o.order_id
    JOIN strategy_run r ON r.user_id = of_user AND r.run_id = o.run_id
    WHERE o.user_id = of_user AND o.account = of_account
$$;

COMMENT ON FUNCTION account_executions IS
    'The executions of all orders that went to an account, as units held and money.';

-- What the ledgers of its runs tell of an account: units by symbol, money by currency. A ledger
-- knows no split of an execution; where one was applied, the runs' positions were proven with it.
CREATE FUNCTION account_told(of_user uuid, of_account text)
RETURNS TABLE (symbol text, units numeric, currency text, flow numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT l.payload ->> 'symbol',
           CASE WHEN l.payload ->> 'side' = 'BUY' THEN 1 ELSE -1 END
           * (l.payload ->> 'quantity')::numeric,
           CASE WHEN l.event_type = 'COMMISSION' THEN l.payload ->> 'currency' ELSE r.currency END,
           CASE WHEN l.event_type = 'COMMISSION' THEN -(l.payload ->> 'amount')::numeric
                ELSE event_cash_flow(l.event_type, l.payload) END
    FROM run_route t
    JOIN strategy_run r ON r.user_id = of_user AND r.run_id = t.run_id
    JOIN event_ledger l ON l.user_id = of_user AND l.run_id = t.run_id
                       AND l.event_type IN ('EXECUTION', 'COMMISSION')
    LEFT JOIN execution e ON l.event_type = 'COMMISSION' AND e.user_id = of_user
                         AND e.run_id = t.run_id AND e.execution_id = l.subject COLLATE "default"
    JOIN orders o ON o.user_id = of_user AND o.run_id = t.run_id AND o.account = of_account
                 AND o.order_id = coalesce(e.order_id, event_order_id(l.subject))
    WHERE t.user_id = of_user AND t.account = of_account
$$;

COMMENT ON FUNCTION account_told IS 'What the ledger tells of an account''s executions.';

-- A snapshot stands between fills: it agrees with our books as of its own time, or as of its place
-- among what was heard.
CREATE FUNCTION reconcile_positions(of_user uuid, of_account text, of_snapshot uuid)
RETURNS TABLE (subject text, ours jsonb, brokers jsonb, derived jsonb)
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    WITH ours AS (
        SELECT x.symbol, trunc(sum(x.units), 8) AS quantity,
               trunc(coalesce(sum(x.units) FILTER (WHERE x.event_at <= s.taken_at), 0), 8)
                   AS earlier
        FROM snapshot_facts(of_user, of_account, of_snapshot) s
        CROSS JOIN account_executions(of_user, of_account) x
        GROUP BY x.symbol
    ), theirs AS (
        SELECT p.symbol, sum(p.quantity) AS quantity
        FROM broker_event e
        CROSS JOIN LATERAL jsonb_to_recordset(e.payload -> 'positions')
            AS p (symbol text, quantity numeric)
        WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
          AND e.payload ->> 'snapshot_id' = of_snapshot::text
        GROUP BY p.symbol
    ), told AS (
        SELECT t.symbol, sum(t.units) AS quantity FROM account_told(of_user, of_account) t
        WHERE t.symbol IS NOT NULL GROUP BY t.symbol
    )
    SELECT symbol, to_jsonb(trim_scale(coalesce(o.quantity, 0))::text),
           to_jsonb(trim_scale(coalesce(t.quantity, 0))::text),
           to_jsonb(trim_scale(coalesce(d.quantity, 0))::text)
    FROM ours o FULL JOIN theirs t USING (symbol) LEFT JOIN told d USING (symbol)
    WHERE coalesce(t.quantity, 0) NOT IN (coalesce(o.quantity, 0), coalesce(o.earlier, 0))
    ORDER BY symbol
$$;

COMMENT ON FUNCTION reconcile_positions IS
    'Symbols of which an account holds something else than our executions add up to.';

CREATE FUNCTION reconcile_cash(of_user uuid, of_account text, of_snapshot uuid)
RETURNS TABLE (subject text, ours jsonb, brokers jsonb, derived jsonb)
LANGUAGE sql STABLE ROWS 2 SET search_path = public, pg_temp AS $$
    WITH flows AS (
        SELECT x.currency, x.flow, x.event_at FROM account_executions(of_user, of_account) x
        UNION ALL
        SELECT c.currency, -c.amount, c.event_at
        FROM account_executions(of_user, of_account) x
        JOIN execution_commission c ON c.user_id = of_user AND c.run_id = x.run_id
                                   AND c.execution_id = x.execution_id
        UNION ALL
        SELECT a.currency, a.opening_cash, '-infinity' FROM broker_account a
        WHERE a.user_id = of_user AND a.account = of_account
    ), ours AS (
        SELECT f.currency, sum(f.flow) AS cash,
               coalesce(sum(f.flow) FILTER (WHERE f.event_at <= s.taken_at), 0) AS earlier
        FROM snapshot_facts(of_user, of_account, of_snapshot) s CROSS JOIN flows f
        GROUP BY f.currency
    ), theirs AS (
        SELECT c.currency, max(c.amount::numeric) AS cash
        FROM broker_event e
        CROSS JOIN LATERAL jsonb_each_text(e.payload -> 'cash') AS c (currency, amount)
        WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
          AND e.payload ->> 'snapshot_id' = of_snapshot::text
        GROUP BY c.currency
    ), told AS (
        SELECT f.currency, sum(f.flow) AS cash
        FROM (SELECT t.currency, t.flow FROM account_told(of_user, of_account) t
              UNION ALL
              SELECT a.currency, a.opening_cash FROM broker_account a
              WHERE a.user_id = of_user AND a.account = of_account) f
        GROUP BY f.currency
    )
    SELECT currency, to_jsonb(trim_scale(coalesce(o.cash, 0))::text),
           to_jsonb(trim_scale(coalesce(t.cash, 0))::text),
           to_jsonb(trim_scale(coalesce(d.cash, 0))::text)
    FROM ours o FULL JOIN theirs t USING (currency) LEFT JOIN told d USING (currency)
    WHERE coalesce(t.cash, 0) NOT IN (coalesce(o.cash, 0), coalesce(o.earlier, 0))
    ORDER BY currency
$$;

COMMENT ON FUNCTION reconcile_cash IS
    'Currencies of which an account holds something else than its flows add up to.';

-- --- Silence, and other routes --------------------------------------------------------------

-- Orders that the broker works, by what we know, and of which nothing was heard for too long:
-- neither a word of their own nor a comparison with all that it works.
CREATE FUNCTION orders_stale(of_user uuid, of_account text, at timestamptz)
RETURNS TABLE (run_id uuid, order_id uuid, heard_at timestamptz)
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    SELECT o.run_id, o.order_id, h.heard_at
    FROM broker_account a
    JOIN orders o ON o.user_id = of_user AND o.account = of_account
    LEFT JOIN broker_command c ON c.user_id = of_user AND c.account = of_account
                              AND c.order_id = o.order_id AND c.kind = 'SUBMIT'
    CROSS JOIN (SELECT max(r.finished_at) FROM reconciliation r
                WHERE r.user_id = of_user AND r.account = of_account) k (compared_at)
    CROSS JOIN LATERAL (
        SELECT greatest(k.compared_at, c.claimed_at,
                        CASE WHEN o.recovered THEN o.recorded_at END,
                        (SELECT max(e.received_at) FROM broker_event e
                         WHERE e.user_id = of_user AND e.account = of_account
                           AND e.order_ref = o.order_id::text)) AS heard_at) h
    WHERE a.user_id = of_user AND a.account = of_account
      AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
      AND NOT o.pending_reconcile AND (o.recovered OR c.claimed_by IS NOT NULL
          AND coalesce(c.outcome, '') NOT IN ('NEVER_ARRIVED', 'REFUSED'))
      AND h.heard_at < at - make_interval(secs => a.stale_seconds)
$$;

COMMENT ON FUNCTION orders_stale IS
    'Working orders of an account of which nothing was heard for its stale_seconds.';

-- Whether an account can be sent to. What has no connector, or one that has lost its broker, and
-- has been so for too long, is down.
CREATE FUNCTION account_is_up(of_user uuid, of_account text, at timestamptz) RETURNS boolean
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT EXISTS (SELECT FROM broker_lease l
                   WHERE l.user_id = of_user AND l.account = of_account
                     AND l.connected AND l.expires_at > at)
$$;

COMMENT ON FUNCTION account_is_up IS 'Whether an account''s connector is there and connected.';

-- Orders that certainly never reached their account, each with the first account of its run, after
-- that one, that is up and has not had it.
CREATE FUNCTION orders_to_reroute(of_user uuid, at timestamptz, down_seconds integer)
RETURNS TABLE (run_id uuid, order_id uuid, account text, next_account text, why text)
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    SELECT o.run_id, o.order_id, o.account, n.account,
           CASE WHEN c.outcome IS NULL THEN 'ACCOUNT_DOWN' ELSE c.outcome END
    FROM strategy_run r
    JOIN orders o ON o.user_id = of_user AND o.run_id = r.run_id
    JOIN broker_command c ON c.user_id = of_user AND c.account = o.account
                         AND c.order_id = o.order_id AND c.kind = 'SUBMIT'
    JOIN run_route h ON h.user_id = of_user AND h.run_id = o.run_id AND h.account = o.account
    CROSS JOIN LATERAL (
        SELECT t.account FROM run_route t
        WHERE t.user_id = of_user AND t.run_id = o.run_id AND t.preference > h.preference
          AND account_is_up(of_user, t.account, at)
          AND NOT EXISTS (SELECT FROM broker_command s
                          WHERE s.user_id = of_user AND s.account = t.account
                            AND s.order_id = o.order_id AND s.kind = 'SUBMIT')
        ORDER BY t.preference LIMIT 1) n
    WHERE r.user_id = of_user AND r.status = 'RUNNING' AND r.broker <> 'paper'
      AND o.status IN ('NEW', 'PENDING') AND o.filled_quantity = 0
      AND (c.outcome = 'NEVER_ARRIVED'
           OR c.outcome IS NULL AND c.claimed_by IS NULL
              AND coalesce(c.not_before, c.created_at)
                  <= at - make_interval(secs => down_seconds)
              AND NOT account_is_up(of_user, o.account, at)
              AND NOT EXISTS (SELECT FROM broker_lease l
                              WHERE l.user_id = of_user AND l.account = o.account
                                AND greatest(l.last_heard_at, l.taken_at)
                                    > at - make_interval(secs => down_seconds)))
    ORDER BY o.order_id
$$;

COMMENT ON FUNCTION orders_to_reroute IS
    'Orders that never reached their account, and the account that takes them over.';

-- Orders that their broker's adapter refused to send, and why, as their connector says.
CREATE FUNCTION orders_send_refused(of_user uuid)
RETURNS TABLE (run_id uuid, order_id uuid, account text, error text)
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    SELECT o.run_id, o.order_id, o.account,
           (SELECT e.payload ->> 'error' FROM broker_event e
            WHERE e.user_id = of_user AND e.account = o.account
              AND e.order_ref = o.order_id::text AND e.kind = 'SEND_FAILED'
              AND e.payload ->> 'command_id' = c.command_id::text
            ORDER BY e.number DESC LIMIT 1)
    FROM strategy_run r
    JOIN orders o ON o.user_id = of_user AND o.run_id = r.run_id
    JOIN broker_command c ON c.user_id = of_user AND c.account = o.account
                         AND c.order_id = o.order_id AND c.kind = 'SUBMIT'
    WHERE r.user_id = of_user AND r.status IN ('RUNNING', 'STOPPING') AND r.broker <> 'paper'
      AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED') AND o.filled_quantity = 0
      AND c.outcome = 'REFUSED'
      -- Whatever a connector says: what the broker speaks of, it has.
      AND NOT EXISTS (SELECT FROM broker_event e
                      WHERE e.user_id = of_user AND e.account = o.account
                        AND e.order_ref = o.order_id::text AND broker_event_shows_order(e))
    ORDER BY o.order_id
$$;

COMMENT ON FUNCTION orders_send_refused IS
    'Open orders that certainly never went out: their broker''s adapter refused to send them.';

-- The next account is sent what the first never had.
CREATE FUNCTION orders_send_rerouted() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO broker_command (user_id, account, priority, kind, run_id, order_id, order_version,
                                payload, not_before)
    VALUES (NEW.user_id, NEW.account, CASE WHEN NEW.purpose = 'FLATTEN' THEN 0 ELSE 2 END,
            'SUBMIT', NEW.run_id, NEW.order_id, NEW.version, orders_command_payload(NEW),
            orders_not_before(NEW));
    RETURN NULL;
END $$;

COMMENT ON FUNCTION orders_send_rerouted IS
    'Trigger: an order that another account takes over goes into that one''s outbox.';

CREATE TRIGGER orders_m_send_rerouted AFTER UPDATE ON orders
    FOR EACH ROW WHEN (NEW.broker <> 'paper' AND NEW.account IS DISTINCT FROM OLD.account)
    EXECUTE FUNCTION orders_send_rerouted();

-- --- What the inbox bears out ---------------------------------------------------------------

-- What a broker has is over when the broker says so, whoever writes it: by a word about the order,
-- or by a snapshot that does not tell of it. Statements are proven as a whole, for ten orders or
-- ten thousand.

-- The last one that was compared, and any since.
CREATE FUNCTION snapshots_whole(of_user uuid, of_account text)
RETURNS TABLE (snapshot_id uuid, received_at timestamptz, asked_at timestamptz)
LANGUAGE sql STABLE ROWS 2 SET search_path = public, pg_temp AS $$
    SELECT s.snapshot_id, s.received_at, c.claimed_at
    FROM (SELECT (e.payload ->> 'snapshot_id')::uuid AS snapshot_id,
                 min(e.received_at) AS received_at
          FROM broker_event e
          WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
            AND e.number > coalesce((SELECT r.up_to_number FROM reconciliation r
                                     WHERE r.user_id = of_user AND r.account = of_account
                                     ORDER BY r.up_to_number DESC OFFSET 1 LIMIT 1), 0)
          GROUP BY 1
          HAVING count(DISTINCT e.payload ->> 'part') = max((e.payload ->> 'parts')::integer)) s
    LEFT JOIN broker_command c ON c.user_id = of_user AND c.account = of_account
                              AND c.command_id = s.snapshot_id
$$;

COMMENT ON FUNCTION snapshots_whole IS
    'The newest whole snapshots of an account, and when they were asked for and received.';

CREATE FUNCTION broker_event_ends_order(kind text, payload jsonb) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN kind = 'ORDER_STATUS'
            THEN payload ->> 'status' IN ('CANCELED', 'EXPIRED', 'INACTIVE', 'REJECTED')
            WHEN kind = 'CANCEL_REJECTED'
            THEN payload ->> 'code' IN ('ALREADY_CANCELED', 'INACTIVE')
            ELSE kind = 'REJECTED' END;

COMMENT ON FUNCTION broker_event_ends_order IS
    'Whether a broker''s word says that an order is over.';

-- What was filled in whole and is taken back is not worked again: the reversal itself is proven.
CREATE FUNCTION order_end_is_said(o orders) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN EXISTS (SELECT FROM broker_event b
                   WHERE b.user_id = o.user_id AND b.account = o.account
                     AND b.order_ref = o.order_id::text
                     AND broker_event_ends_order(b.kind, b.payload))
        OR o.reject_code = 'SEND_REFUSED' AND EXISTS (
                   SELECT FROM broker_command c
                   WHERE c.user_id = o.user_id AND c.account = o.account
                     AND c.order_id = o.order_id AND c.kind = 'SUBMIT' AND c.outcome = 'REFUSED')
        OR EXISTS (SELECT FROM execution e
                   WHERE e.user_id = o.user_id AND e.run_id = o.run_id
                     AND e.order_id = o.order_id AND e.reverses IS NOT NULL);
END $$;

COMMENT ON FUNCTION order_end_is_said IS
    'Whether an order''s broker has said, by our own reference, that it is over, or its adapter '
    'that it can not be sent.';

-- Since when a broker may have an order; NULL where it certainly has not.
CREATE FUNCTION order_at_broker_since(o orders, OUT since timestamptz, OUT is_heard boolean)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    SELECT c.claimed_at INTO since FROM broker_command c
    WHERE c.user_id = o.user_id AND c.account = o.account AND c.order_id = o.order_id
      AND c.kind = 'SUBMIT' AND c.claimed_by IS NOT NULL
      AND coalesce(c.outcome NOT IN ('NEVER_ARRIVED', 'REFUSED'), true);
    is_heard := o.recovered OR EXISTS (
        SELECT FROM broker_event b
        WHERE b.user_id = o.user_id AND b.account = o.account
          AND b.order_ref = o.order_id::text AND b.kind NOT IN ('THROTTLED', 'SEND_FAILED'));
    IF o.recovered THEN
        since := coalesce((SELECT min(b.received_at) FROM broker_event b
                           WHERE b.user_id = o.user_id AND b.account = o.account
                             AND b.order_ref = o.order_id::text), '-infinity');
    END IF;
END $$;

COMMENT ON FUNCTION order_at_broker_since IS
    'Since when a broker may have an order, or NULL, and whether it has spoken of it.';

-- What the broker never spoke of may be on its way while a snapshot is taken: it must have been
-- asked afterwards. What never went out is over when we say so, but not in the broker's name.
CREATE FUNCTION orders_prove_end() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    unsaid uuid;
BEGIN
    IF NOT EXISTS (SELECT FROM new_rows n
                   WHERE n.user_id IS NOT NULL AND n.broker <> 'paper'
                     AND n.status IN ('CANCELED', 'EXPIRED', 'REJECTED')) THEN
        RETURN NULL;
    END IF;
    WITH ended AS MATERIALIZED (
        SELECT n.user_id, n.run_id, n.order_id, n.account, h.since, h.is_heard
        FROM new_rows n
        JOIN old_rows w ON w.user_id = n.user_id AND w.run_id = n.run_id
                       AND w.order_id = n.order_id AND w.status <> n.status
        CROSS JOIN LATERAL order_at_broker_since(n) h
        WHERE n.broker <> 'paper' AND n.status IN ('CANCELED', 'EXPIRED', 'REJECTED')
          AND (h.since IS NOT NULL OR n.reject_source = 'BROKER') AND NOT order_end_is_said(n)
    ), shown AS MATERIALIZED (
        SELECT a.user_id, a.account, s.snapshot_id, s.received_at, s.asked_at
        FROM (SELECT DISTINCT user_id, account FROM ended) a
        CROSS JOIN LATERAL snapshots_whole(a.user_id, a.account) s
    ), working AS MATERIALIZED (
        SELECT s.user_id, s.account, s.snapshot_id, t.order_ref
        FROM shown s
        CROSS JOIN LATERAL snapshot_orders(s.user_id, s.account, s.snapshot_id) t
    )
    SELECT e.order_id INTO unsaid
    FROM ended e
    JOIN orders o ON o.user_id = e.user_id AND o.run_id = e.run_id AND o.order_id = e.order_id
    WHERE NOT EXISTS (
            SELECT FROM shown s
            WHERE s.user_id = e.user_id AND s.account = e.account AND s.received_at >= e.since
              AND (e.is_heard OR s.asked_at > e.since)
              AND NOT EXISTS (SELECT FROM working t
                              WHERE t.user_id = e.user_id AND t.account = e.account
                                AND t.snapshot_id = s.snapshot_id
                                AND t.order_ref = e.order_id::text))
      -- A word without our reference, which is just being applied.
      AND NOT EXISTS (SELECT FROM broker_event b
                      WHERE b.user_id = e.user_id AND b.account = e.account
                        AND b.applied_at IS NULL AND broker_event_ends_order(b.kind, b.payload)
                        AND broker_event_is_of_order(b, o))
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'no broker has said that order % is over', unsaid
            USING ERRCODE = '23T08', CONSTRAINT = 'orders_end_said_by_broker', TABLE = 'orders',
                  COLUMN = 'status',
                  HINT = 'Call order_cancel(); what a broker may have is over when it says so.';
    END IF;
    RETURN NULL;
END $$;

COMMENT ON FUNCTION orders_prove_end IS
    'Trigger: an order that a broker may have is over when the broker''s words show it, and one is '
    'rejected by a broker only if it, or its adapter, has said so.';

CREATE TRIGGER orders_m_prove_end AFTER UPDATE ON orders
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION orders_prove_end();

-- Whose order a word without our reference means, its ids say: who could forge one of them could
-- have a stranger's fills booked. A word is of its order by our reference, by an execution that is
-- booked, or by the other of its ids, which is proven.
CREATE FUNCTION order_broker_id_is_said(m order_broker_id) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN EXISTS (
            SELECT FROM broker_event b
            WHERE b.user_id = m.user_id AND b.account = m.account
              AND b.order_ref = m.order_id::text
              AND (coalesce(b.broker_order_id, 0), coalesce(b.perm_id, 0))
                  = (m.broker_order_id, m.perm_id))
        OR EXISTS (
            SELECT FROM execution e
            JOIN broker_event b ON b.user_id = m.user_id AND b.account = m.account
                               AND b.execution_id = e.execution_id
            WHERE e.user_id = m.user_id AND e.run_id = m.run_id AND e.order_id = m.order_id
              AND (coalesce(b.broker_order_id, 0), coalesce(b.perm_id, 0))
                  = (m.broker_order_id, m.perm_id));
END $$;

COMMENT ON FUNCTION order_broker_id_is_said IS
    'Whether a broker''s word about an order, or about an execution of it, gives it these ids.';

CREATE FUNCTION order_broker_id_prove() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    unsaid uuid;
BEGIN
    WITH named AS MATERIALIZED (
        SELECT n.* FROM new_rows n WHERE NOT order_broker_id_is_said(n)
    ), told AS MATERIALIZED (
        SELECT a.user_id, a.account, t.order_ref, coalesce(t.broker_order_id, 0) AS broker_order_id,
               coalesce(t.perm_id, 0) AS perm_id
        FROM (SELECT DISTINCT user_id, account FROM named) a
        CROSS JOIN LATERAL snapshots_whole(a.user_id, a.account) s
        CROSS JOIN LATERAL (
            SELECT * FROM snapshot_orders(a.user_id, a.account, s.snapshot_id)
            UNION ALL
            SELECT * FROM snapshot_closed(a.user_id, a.account, s.snapshot_id)) t
    )
    SELECT n.order_id INTO unsaid
    FROM named n
    WHERE NOT EXISTS (SELECT FROM told t
                      WHERE t.user_id = n.user_id AND t.account = n.account
                        AND t.order_ref = n.order_id::text
                        AND (t.broker_order_id, t.perm_id) = (n.broker_order_id, n.perm_id))
      -- A word without our reference, which is just being applied.
      AND NOT EXISTS (
          SELECT FROM broker_event b
          JOIN order_broker_id m ON m.user_id = n.user_id AND m.run_id = n.run_id
                                AND m.order_id = n.order_id AND m.account = n.account
                                AND (m.perm_id = n.perm_id AND n.perm_id <> 0
                                     OR m.broker_order_id = n.broker_order_id
                                        AND n.broker_order_id <> 0)
          WHERE b.user_id = n.user_id AND b.account = n.account AND b.applied_at IS NULL
            AND (coalesce(b.broker_order_id, 0), coalesce(b.perm_id, 0))
                = (n.broker_order_id, n.perm_id)
            AND NOT EXISTS (SELECT FROM new_rows x
                            WHERE x.user_id = m.user_id AND x.run_id = m.run_id
                              AND x.order_id = m.order_id AND x.account = m.account
                              AND (x.broker_order_id, x.perm_id)
                                  = (m.broker_order_id, m.perm_id)))
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'no broker has given order % these ids', unsaid
            USING ERRCODE = '23T08', CONSTRAINT = 'order_broker_id_said_by_broker',
                  TABLE = 'order_broker_id',
                  HINT = 'Ids come from the connector''s broker_event rows.';
    END IF;
    RETURN NULL;
END $$;

COMMENT ON FUNCTION order_broker_id_prove IS
    'Trigger: an order''s ids at a broker are those that the broker said.';

CREATE TRIGGER order_broker_id_m_prove AFTER INSERT ON order_broker_id
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION order_broker_id_prove();

-- The row may be written before the ids are in order_broker_id, in one transaction.
CREATE FUNCTION order_id_is_said(o orders, of_number bigint, of_perm bigint) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN EXISTS (SELECT FROM order_broker_id m
                   WHERE m.user_id = o.user_id AND m.run_id = o.run_id
                     AND m.order_id = o.order_id
                     AND (m.broker_order_id = of_number OR m.perm_id = of_perm))
        OR EXISTS (SELECT FROM broker_event b
                   WHERE b.user_id = o.user_id AND b.order_ref = o.order_id::text
                     AND b.account IN (SELECT a.account FROM broker_account a
                                       WHERE a.user_id = o.user_id)
                     AND (b.broker_order_id = of_number OR b.perm_id = of_perm))
        OR EXISTS (SELECT FROM execution e
                   JOIN broker_event b ON b.user_id = o.user_id AND b.account = o.account
                                      AND b.execution_id = e.execution_id
                   WHERE e.user_id = o.user_id AND e.run_id = o.run_id
                     AND e.order_id = o.order_id
                     AND (b.broker_order_id = of_number OR b.perm_id = of_perm))
        OR EXISTS (SELECT FROM broker_event b
                   WHERE b.user_id = o.user_id AND b.account = o.account
                     AND b.applied_at IS NULL
                     AND (b.broker_order_id = of_number OR b.perm_id = of_perm)
                     AND broker_event_is_of_order(b, o));
END $$;

COMMENT ON FUNCTION order_id_is_said IS
    'Whether a broker knows an order by one of these ids, the other being NULL.';

CREATE FUNCTION orders_check_ids() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF NEW.broker_order_id IS DISTINCT FROM OLD.broker_order_id
       AND NOT order_id_is_said(NEW, NEW.broker_order_id, NULL)
       OR NEW.perm_id IS DISTINCT FROM OLD.perm_id
          AND NOT order_id_is_said(NEW, NULL, NEW.perm_id) THEN
        RAISE EXCEPTION 'no broker knows order % by these ids', NEW.order_id
            USING ERRCODE = '23T08', CONSTRAINT = 'orders_ids_said_by_broker', TABLE = 'orders',
                  COLUMN = 'perm_id',
                  HINT = 'Ids come from the connector''s broker_event rows.';
    END IF;
    RETURN NULL;
END $$;

COMMENT ON FUNCTION orders_check_ids IS
    'Trigger: an order''s ids at its broker are those that the broker said.';

CREATE TRIGGER orders_m_check_ids AFTER UPDATE ON orders
    FOR EACH ROW WHEN ((NEW.broker_order_id, NEW.perm_id)
                       IS DISTINCT FROM (OLD.broker_order_id, OLD.perm_id))
    EXECUTE FUNCTION orders_check_ids();

-- As ledger_analyze does for ticks: who compares thousands of orders before autovacuum has looked
-- at them once would compare each with each. It has the owner's rights, who alone may look.
CREATE FUNCTION reconcile_analyze() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF (SELECT reltuples FROM pg_class WHERE oid = 'broker_event'::regclass) < 500 THEN
        ANALYZE orders, execution, event_ledger, broker_command, broker_event, order_broker_id;
    END IF;
END $$;

COMMENT ON FUNCTION reconcile_analyze IS
    'Gives the planner its first statistics of the tables that reconciliation compares.';

-- The audit: views that must return no rows. Each finding names the user, the run, what it is
-- about and what is wrong. They read history only, take no locks and change nothing.

CREATE VIEW audit_orphan AS
    SELECT c.user_id, c.run_id, c.subject, 'belongs to no run' AS finding
    FROM (
        SELECT user_id, run_id, 'engine_state' AS subject FROM engine_state
        UNION ALL SELECT user_id, run_id, 'engine_status' FROM engine_status
        UNION ALL SELECT user_id, run_id, 'orders ' || order_id FROM orders
        UNION ALL SELECT user_id, run_id, 'open_order_sum ' || bucket FROM open_order_sum
        UNION ALL SELECT user_id, run_id, 'execution ' || execution_id FROM execution
        UNION ALL SELECT user_id, run_id, 'position ' || symbol FROM position
        UNION ALL SELECT user_id, run_id, 'mtm_ledger ' || logical_time FROM mtm_ledger
        UNION ALL SELECT user_id, run_id, 'event_ledger ' || seq FROM event_ledger
        UNION ALL SELECT user_id, run_id, 'sip_plan ' || plan FROM sip_plan
        UNION ALL SELECT user_id, run_id, 'split_applied ' || symbol FROM split_applied
        UNION ALL SELECT user_id, run_id, 'risk_limit ' || limit_id FROM risk_limit
                  WHERE run_id IS NOT NULL
        UNION ALL SELECT user_id, run_id, 'run_route ' || account FROM run_route
        UNION ALL SELECT user_id, run_id, 'commission of ' || execution_id
                  FROM execution_commission
        UNION ALL SELECT user_id, run_id, 'order_broker_id ' || order_id FROM order_broker_id
        UNION ALL SELECT user_id, run_id, 'broker_command ' || command_id FROM broker_command
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
      AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
    UNION ALL
    SELECT s.user_id, s.run_id, concat_ws(' ', 'open_order_sum', s.kind, s.symbol, s.bucket),
           format('is %s, the open orders make it %s', s.amount, coalesce(o.amount, 0))
    FROM open_order_sum s
    LEFT JOIN (SELECT n.user_id, n.run_id, h.kind, h.symbol, order_bucket(n.order_id) AS bucket,
                      sum(h.amount) AS amount
               FROM orders n
               CROSS JOIN LATERAL (VALUES ('CASH', '', n.reserved_cash),
                                          (n.side, n.symbol, n.quantity - n.filled_quantity))
                    h (kind, symbol, amount)
               WHERE n.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
               GROUP BY n.user_id, n.run_id, h.kind, h.symbol, order_bucket(n.order_id)) o
        ON o.user_id = s.user_id AND o.run_id = s.run_id AND o.kind = s.kind
       AND o.symbol = s.symbol AND o.bucket = s.bucket
    WHERE s.amount <> coalesce(o.amount, 0);

COMMENT ON VIEW audit_order IS
    'Orders that contradict their executions, their run or what they are summed to.';

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
               WHERE event_type IN ('EXECUTION', 'COMMISSION', 'SPLIT_APPLIED')
               GROUP BY user_id, run_id) l
        ON l.user_id = r.user_id AND l.run_id = r.run_id
    WHERE r.books_seq <> coalesce(l.seq, 0);

COMMENT ON VIEW audit_cash IS 'Runs whose cash is not their initial cash and their executions.';

-- Positions as the ledger alone tells them, symbol by symbol, event by event.
CREATE OR REPLACE FUNCTION position_from_ledger(of_user uuid, of_run uuid)
RETURNS TABLE (symbol text, quantity numeric, cost_basis numeric, realized_pnl numeric)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    event event_ledger;
    p     public.position;
BEGIN
    FOR event IN SELECT (s.event).* FROM ledger_standing(of_user, of_run) s LOOP
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
        'event_ledger', 'execution', 'execution_commission', 'execution_cost', 'fx_rate',
        'instrument', 'latency_summary', 'mtm_ledger', 'order_broker_id', 'order_latency',
        'order_response', 'order_status', 'order_transition', 'orders',
        'pnl_daily', 'position', 'position_pnl', 'price_bar', 'reconciliation',
        'reconciliation_difference', 'risk_limit', 'run_route',
        'run_status', 'run_transition', 'sip_plan', 'split_applied', 'strategy_run',
        'breaker_kind', 'circuit_breaker', 'equity_peak', 'flatten_request', 'limit_kind',
        'open_order_sum', 'order_refusal', 'system_halt', 'trading_halt',
        'paper_order', 'paper_trade', 'paper_position', 'paper_equity_curve',
        'audit_broker', 'audit_cash', 'audit_chain', 'audit_duplicate', 'audit_event',
        'audit_guard', 'audit_mark', 'audit_order', 'audit_orphan', 'audit_position',
        'audit_running']
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
                        -- An equation first: orders of one moment are not compared each with each.
                        AND event_order_id(l.subject) = o.order_id
                        AND (o.broker <> 'paper' OR l.subject = o.order_id::text))
      -- Back at work, its only fills taken back: the reversal's own event tells that.
      AND NOT (o.status = 'ROUTED'
               AND EXISTS (SELECT FROM execution e
                           WHERE e.user_id = o.user_id AND e.run_id = o.run_id
                             AND e.order_id = o.order_id AND e.reverses IS NOT NULL
                             AND e.logical_time = o.status_at))
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

-- Run by run, which the keys of the books begin with.
CREATE FUNCTION broker_event_is_booked(b broker_event) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    IF b.kind = 'COMMISSION' THEN
        RETURN EXISTS (SELECT FROM execution_commission c
                       JOIN strategy_run r ON r.user_id = c.user_id AND r.run_id = c.run_id
                       WHERE r.user_id = b.user_id AND c.execution_id = b.execution_id);
    END IF;
    RETURN EXISTS (
        SELECT FROM strategy_run r
        JOIN execution e ON e.user_id = r.user_id AND e.run_id = r.run_id
                        AND e.execution_id = b.execution_id
        WHERE r.user_id = b.user_id
          AND (b.kind = 'EXECUTION' OR EXISTS (
              SELECT FROM execution t
              WHERE t.user_id = e.user_id AND t.run_id = e.run_id
                AND t.reverses = e.execution_id)));
END $$;

COMMENT ON FUNCTION broker_event_is_booked IS
    'Whether an execution, bust or commission that a broker told is in a run''s books.';

-- Inbox and outbox are kept, so that they still bear out what is in the books. A run that was made
-- anew from an export has neither: they are its account's. Written for a planner without statistics
-- (docs/decisions/0014): whatever it joins in which order, each row is proven once, since that is
-- done in what it must materialize, and each other row is found by its key.
CREATE VIEW audit_broker AS
    WITH named AS MATERIALIZED (
        SELECT DISTINCT b.user_id, b.account, b.order_ref FROM broker_event b
        WHERE b.order_ref IS NOT NULL
    ), traded AS MATERIALIZED (
        SELECT c.user_id, c.run_id FROM broker_command c WHERE c.run_id IS NOT NULL
        UNION
        SELECT o.user_id, o.run_id FROM orders o
        JOIN named n ON n.user_id = o.user_id AND n.account = o.account
                    AND n.order_ref = o.order_id::text
        WHERE o.recovered
    ), executed AS MATERIALIZED (
        SELECT e, execution_said_by_broker(e) AS is_said
        FROM traded t
        JOIN strategy_run r ON r.user_id = t.user_id AND r.run_id = t.run_id
        JOIN execution e ON e.user_id = t.user_id AND e.run_id = t.run_id
        WHERE r.broker <> 'paper'
    ), charged AS MATERIALIZED (
        SELECT c, execution_commission_is_said(c) AS is_said
        FROM traded t
        JOIN execution_commission c ON c.user_id = t.user_id AND c.run_id = t.run_id
    )
    SELECT (x.e).user_id, (x.e).run_id, 'execution ' || (x.e).execution_id AS subject,
           CASE WHEN (x.e).reverses IS NULL
                THEN format('no broker said %s of %s at %s', (x.e).side, (x.e).quantity,
                            (x.e).price)
                ELSE format('no broker took back %s', (x.e).reverses) END AS finding
    FROM executed x
    WHERE x.is_said IS NOT TRUE
    UNION ALL
    SELECT (x.c).user_id, (x.c).run_id, 'commission of ' || (x.c).execution_id,
           format('no broker said %s %s', (x.c).amount, (x.c).currency)
    FROM charged x
    WHERE x.is_said IS NOT TRUE
    UNION ALL
    SELECT c.user_id, c.run_id, 'broker_command ' || c.command_id,
           format('is a %s that its order, %s at %s, does not bear out', c.kind, (x.o).status,
                  (x.o).account)
    FROM broker_command c
    CROSS JOIN LATERAL (SELECT o FROM orders o
                        WHERE o.user_id = c.user_id AND o.run_id = c.run_id
                          AND o.order_id = c.order_id ORDER BY o.order_id LIMIT 1) x
    WHERE c.kind IN ('SUBMIT', 'MODIFY', 'CANCEL')
      AND (c.payload ->> 'order_ref', c.payload ->> 'symbol', c.payload ->> 'side',
           c.payload ->> 'order_type', c.payload ->> 'time_in_force')
          IS DISTINCT FROM
          ((x.o).order_id::text, (x.o).symbol, (x.o).side, (x.o).order_type,
           (x.o).time_in_force)
       OR c.kind = 'SUBMIT' AND c.claimed_by IS NULL AND c.done_at IS NULL
          AND ((x.o).status IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
               OR c.account <> (x.o).account
               OR c.payload <> orders_command_payload(x.o))
    UNION ALL
    SELECT o.user_id, o.run_id, 'order ' || o.order_id,
           format('is %s at %s and no command sent it there', o.status, o.account)
    FROM orders o
    JOIN traded t ON t.user_id = o.user_id AND t.run_id = o.run_id
    WHERE o.broker <> 'paper' AND NOT o.recovered
      AND (o.status <> 'REJECTED' OR o.reject_source = 'BROKER')
      AND (SELECT true FROM broker_command c
           WHERE c.user_id = o.user_id AND c.account = o.account AND c.order_id = o.order_id
             AND c.kind = 'SUBMIT' ORDER BY c.order_id LIMIT 1) IS NULL
    UNION ALL
    SELECT o.user_id, o.run_id, 'order ' || o.order_id,
           format('is %s and no command asks for it', o.status)
    FROM orders o
    JOIN traded t ON t.user_id = o.user_id AND t.run_id = o.run_id
    WHERE o.broker <> 'paper' AND o.status IN ('PENDING_CANCEL', 'PENDING_MODIFY')
      AND (SELECT true FROM broker_command c
           WHERE c.user_id = o.user_id AND c.run_id = o.run_id AND c.order_id = o.order_id
             AND 'PENDING_' || c.kind = o.status ORDER BY c.order_id LIMIT 1) IS NULL
    UNION ALL
    SELECT o.user_id, o.run_id, 'order ' || o.order_id,
           format('of a run at %s is at %s, which is at %s', o.broker, a.account, a.broker)
    FROM orders o
    JOIN broker_account a ON a.user_id = o.user_id AND a.account = o.account
    WHERE a.broker <> o.broker
    UNION ALL
    SELECT o.user_id, o.run_id, 'order ' || o.order_id,
           format('has the ids %s and %s, under which no broker knows it', o.broker_order_id,
                  o.perm_id)
    FROM orders o
    WHERE (o.broker_order_id IS NOT NULL AND (
               SELECT true FROM order_broker_id m
               WHERE m.user_id = o.user_id AND m.run_id = o.run_id AND m.order_id = o.order_id
                 AND m.broker_order_id = o.broker_order_id ORDER BY m.order_id LIMIT 1) IS NULL)
       OR (o.perm_id IS NOT NULL AND (
               SELECT true FROM order_broker_id m
               WHERE m.user_id = o.user_id AND m.run_id = o.run_id AND m.order_id = o.order_id
                 AND m.perm_id = o.perm_id ORDER BY m.order_id LIMIT 1) IS NULL)
    UNION ALL
    SELECT b.user_id, NULL, format('broker_event %s of %s', b.number, b.account),
           format('is a %s that was found %s, and no book has it', b.kind, b.finding)
    FROM broker_event b
    WHERE b.finding IN ('NEW', 'CORRECTION', 'ORPHAN')
      AND b.kind IN ('EXECUTION', 'BUST', 'COMMISSION') AND NOT broker_event_is_booked(b);

COMMENT ON VIEW audit_broker IS
    'Books of orders at brokers that their brokers'' words, or our own, do not bear out.';

-- How it is going: what is connected, what waits, how long brokers take to answer, and whether
-- what we hold is what they hold. Questions to rows that are there anyway.

-- Every word of a broker about an order that we sent, and how long after the sending we heard it.
CREATE VIEW order_response AS
    SELECT c.user_id, c.account, c.run_id, c.order_id, e.number, e.kind,
           e.payload ->> 'status' AS status, c.sent_at, e.received_at,
           round(extract(epoch FROM e.received_at - c.sent_at), 6) AS seconds
    FROM broker_command c
    JOIN broker_event e ON e.user_id = c.user_id AND e.account = c.account
                       AND e.order_ref = c.order_id::text AND e.received_at >= c.sent_at
    WHERE c.kind = 'SUBMIT' AND c.sent_at IS NOT NULL AND e.kind <> 'THROTTLED';

COMMENT ON VIEW order_response IS
    'The round trip of each order to each response of its broker, in seconds on our clock.';

-- The way of an order, step by step; NULL where it has not come so far.
CREATE VIEW order_latency AS
    SELECT c.user_id, c.account, c.run_id, c.order_id, c.created_at, c.claimed_at, c.sent_at,
           w.first_word_at, w.first_fill_at,
           round(extract(epoch FROM c.claimed_at - c.created_at), 6) AS claim_seconds,
           round(extract(epoch FROM c.sent_at - c.claimed_at), 6) AS send_seconds,
           round(extract(epoch FROM w.first_word_at - c.sent_at), 6) AS response_seconds,
           round(extract(epoch FROM w.first_fill_at - c.sent_at), 6) AS fill_seconds
    FROM broker_command c
    LEFT JOIN LATERAL (
        SELECT min(e.received_at) AS first_word_at,
               min(e.received_at) FILTER (WHERE e.kind = 'EXECUTION') AS first_fill_at
        FROM broker_event e
        WHERE e.user_id = c.user_id AND e.account = c.account AND e.order_ref = c.order_id::text
          AND e.received_at >= c.sent_at AND e.kind <> 'THROTTLED') w ON true
    WHERE c.kind = 'SUBMIT';

COMMENT ON VIEW order_latency IS
    'How long each order waited to be claimed and sent, for the first word and the first fill.';

COMMENT ON COLUMN order_latency.claim_seconds IS
    'From the order''s row to the connector''s claim: the queue, the throttle, closed hours.';

CREATE FUNCTION latency_since(of_user uuid, since timestamptz)
RETURNS TABLE (account text, step text, orders bigint, p50 numeric, p95 numeric, p99 numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT s.account, s.step, count(*),
           round(extract(epoch FROM percentile_cont(0.50) WITHIN GROUP (ORDER BY s.took)), 6),
           round(extract(epoch FROM percentile_cont(0.95) WITHIN GROUP (ORDER BY s.took)), 6),
           round(extract(epoch FROM percentile_cont(0.99) WITHIN GROUP (ORDER BY s.took)), 6)
    FROM (SELECT l.account, t.step, t.took, t.place
          FROM order_latency l
          CROSS JOIN LATERAL (VALUES
              ('CLAIM', 1, l.claimed_at - l.created_at),
              ('SEND', 2, l.sent_at - l.claimed_at),
              ('RESPONSE', 3, l.first_word_at - l.sent_at),
              ('FILL', 4, l.first_fill_at - l.sent_at)) AS t (step, place, took)
          WHERE l.user_id = of_user AND l.created_at >= since AND t.took IS NOT NULL) s
    GROUP BY s.account, s.step, s.place
    ORDER BY s.account, s.place
$$;

COMMENT ON FUNCTION latency_since IS
    'Percentiles of the steps of a user''s orders since a moment, in seconds, by account.';

CREATE VIEW latency_summary AS
    SELECT u.user_id, l.account, l.step, l.orders, l.p50, l.p95, l.p99
    FROM app_user u CROSS JOIN LATERAL latency_since(u.user_id, '-infinity') l;

COMMENT ON VIEW latency_summary IS
    'Percentiles of the steps of all orders that ever went to an account, in seconds.';

-- One account at a moment of our clock.
CREATE FUNCTION account_status(of_user uuid, at timestamptz)
RETURNS TABLE (account text, broker text, is_open boolean, opens_at timestamptz,
               connected boolean, holder_name text, last_heard_at timestamptz,
               heartbeat_is_late boolean, clock_skew_seconds numeric, queued bigint,
               queued_for_session bigint, in_flight bigint, oldest_queued_at timestamptz,
               orders_per_second integer, sent_last_second bigint, throttled bigint,
               inbox_waiting bigint, open_orders bigint)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT a.account, a.broker, h.is_open, h.opens_at,
           coalesce(l.connected AND l.expires_at > at, false), l.holder_name, l.last_heard_at,
           coalesce(l.last_heard_at < at - a.heartbeat_seconds * interval '1 second', true),
           round(extract(epoch FROM l.clock_skew), 3), c.queued, c.for_session, c.in_flight,
           c.oldest, a.orders_per_second, c.just_sent,
           -- What could go now and is more than may.
           greatest(c.ready - (a.orders_per_second - least(c.just_sent, a.orders_per_second)), 0),
           (SELECT count(*) FROM broker_event e
            WHERE e.user_id = of_user AND e.account = a.account AND e.applied_at IS NULL),
           (SELECT count(*) FROM orders o
            WHERE o.user_id = of_user AND o.account = a.account
              AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED'))
    FROM broker_account a
    CROSS JOIN LATERAL account_hours(of_user, a.account, at) h
    LEFT JOIN broker_lease l ON l.user_id = of_user AND l.account = a.account
    CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE k.done_at IS NULL AND k.claimed_by IS NULL) AS queued,
               count(*) FILTER (WHERE k.done_at IS NULL AND k.claimed_by IS NULL
                                AND k.not_before > at) AS for_session,
               count(*) FILTER (WHERE k.done_at IS NULL AND k.claimed_by IS NULL
                                AND k.kind = 'SUBMIT'
                                AND coalesce(k.not_before, at) <= at) AS ready,
               count(*) FILTER (WHERE k.done_at IS NULL AND k.claimed_by IS NOT NULL) AS in_flight,
               min(k.created_at) FILTER (WHERE k.done_at IS NULL AND k.claimed_by IS NULL)
                   AS oldest,
               count(*) FILTER (WHERE k.kind = 'SUBMIT' AND k.sent_at > at - interval '1 second')
                   AS just_sent
        FROM broker_command k
        WHERE k.user_id = of_user AND k.account = a.account
          AND (k.done_at IS NULL OR k.sent_at > at - interval '1 second')) c
    WHERE a.user_id = of_user
    ORDER BY a.account
$$;

COMMENT ON FUNCTION account_status IS
    'The accounts of a user at a moment: session, connection, queue, throttle, inbox.';

-- Whether what we hold is so, three ways: our positions against the ledger that they follow from,
-- and against what brokers said last. A broker that never said is no proof either.
CREATE FUNCTION health_positions(of_user uuid)
RETURNS TABLE (run_id uuid, account text, symbol text, ours numeric, brokers numeric,
               ledger numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT r.run_id, NULL::text, d.symbol, d.ours, NULL::numeric, d.told
    FROM strategy_run r
    CROSS JOIN LATERAL (
        SELECT symbol, coalesce(p.quantity, 0) AS ours, coalesce(l.quantity, 0) AS told
        FROM (SELECT * FROM position k WHERE k.user_id = of_user AND k.run_id = r.run_id) p
        FULL JOIN position_from_ledger(of_user, r.run_id) l USING (symbol)) d
    WHERE r.user_id = of_user AND r.status IN ('RUNNING', 'STOPPING') AND d.ours <> d.told
    UNION ALL
    SELECT NULL, a.account, d.subject, (d.ours #>> '{}')::numeric, (d.brokers #>> '{}')::numeric,
           (d.derived #>> '{}')::numeric
    FROM broker_account a
    CROSS JOIN LATERAL (SELECT coalesce(
        snapshot_newest(of_user, a.account),
        (SELECT k.snapshot_id FROM reconciliation k
         WHERE k.user_id = of_user AND k.account = a.account
         ORDER BY k.up_to_number DESC LIMIT 1)) AS snapshot_id) s
    CROSS JOIN LATERAL reconcile_positions(of_user, a.account, s.snapshot_id) d
    WHERE a.user_id = of_user AND s.snapshot_id IS NOT NULL
    UNION ALL
    SELECT NULL, a.account, x.symbol, x.units, NULL, NULL
    FROM broker_account a
    CROSS JOIN LATERAL (SELECT e.symbol, sum(e.units) AS units
                        FROM account_executions(of_user, a.account) e GROUP BY e.symbol) x
    WHERE a.user_id = of_user AND x.units <> 0
      AND NOT EXISTS (SELECT FROM reconciliation k
                      WHERE k.user_id = of_user AND k.account = a.account)
      AND snapshot_newest(of_user, a.account) IS NULL
$$;

COMMENT ON FUNCTION health_positions IS
    'Positions that are not what the ledger makes them, or not what the account''s broker last '
    'said, or of which no broker has said anything; NULL where somebody was not asked.';

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

UPDATE order_status SET why = 'The broker has it and has not confirmed it.'
WHERE status = 'PENDING_SUBMIT';

INSERT INTO order_transition (from_status, to_status, why) VALUES
    ('NEW', 'PENDING_CANCEL', 'A cancel follows a submit that has no answer yet.'),
    ('PENDING', 'PENDING_CANCEL', 'A cancel follows a submit that has no answer yet.'),
    ('PENDING', 'NEW', 'Released to be sent.'),
    ('PARTIALLY_FILLED', 'ROUTED', 'A bust took all fills back.'),
    ('FILLED', 'PARTIALLY_FILLED', 'A bust took a fill back.'),
    ('FILLED', 'ROUTED', 'A bust took all fills back.'),
    ('CANCELED', 'ROUTED', 'The cancel was a guess; the broker works it.'),
    ('EXPIRED', 'ROUTED', 'A bust took all fills back; it is over at once again.');

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
