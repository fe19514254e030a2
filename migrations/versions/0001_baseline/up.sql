-- Who trades: people and services. Everything that belongs to somebody carries user_id first in
-- its keys, which isolates users and lets the schema be sharded by user_id.

-- Infinity and years that no program's calendar has would stop whoever reads the row next.
CREATE FUNCTION time_in_range(moment timestamptz) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN moment BETWEEN '0001-01-02 00:00Z' AND '9999-12-30 00:00Z';

COMMENT ON FUNCTION time_in_range IS 'Whether a time is of the years 1 to 9999.';

CREATE TABLE app_user (
    user_id    uuid        NOT NULL DEFAULT gen_random_uuid(),
    name       text,
    kind       text        NOT NULL DEFAULT 'PERSON',
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT app_user_pkey PRIMARY KEY (user_id),
    CONSTRAINT app_user_kind_known CHECK (kind IN ('PERSON', 'SERVICE')),
    CONSTRAINT app_user_name_printable CHECK (name ~ '^[[:graph:]]([[:print:]]{0,98}[[:graph:]])?$')
);

COMMENT ON TABLE app_user IS 'People and services that own runs.';
COMMENT ON COLUMN app_user.name IS
    'What commands call the user. The oms command derives user_id from it, so a name is one user.';

-- What is traded, when its exchange is open, what it cost and how it was split. Lookup tables:
-- small or append-mostly, without triggers, pointing at no user's table.

CREATE TABLE instrument (
    symbol                 text    NOT NULL,
    name                   text,
    currency               text    NOT NULL DEFAULT 'USD',
    quantity_decimals      integer NOT NULL DEFAULT 6,
    negative_price_allowed boolean NOT NULL DEFAULT false,
    CONSTRAINT instrument_pkey PRIMARY KEY (symbol),
    CONSTRAINT instrument_symbol_format CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]{0,31}$'),
    CONSTRAINT instrument_currency_format CHECK (currency ~ '^[A-Z]{3}$'),
    CONSTRAINT instrument_quantity_decimals_in_range CHECK (quantity_decimals BETWEEN 0 AND 8)
);

COMMENT ON TABLE instrument IS 'What can be traded; a symbol that is not here is unknown.';
COMMENT ON COLUMN instrument.quantity_decimals IS 'Decimals to which an ordered quantity is cut.';
COMMENT ON COLUMN instrument.negative_price_allowed IS
    'True for instruments whose price may fall below zero (spreads, some futures).';

INSERT INTO instrument (symbol, name) VALUES
    ('AAPL', 'Apple Inc.'),
    ('IBM', 'International Business Machines Corporation'),
    ('MSFT', 'Microsoft Corporation');

CREATE TABLE calendar_session (
    calendar     text        NOT NULL,
    session_date date        NOT NULL,
    open_at      timestamptz NOT NULL,
    close_at     timestamptz NOT NULL,
    CONSTRAINT calendar_session_pkey PRIMARY KEY (calendar, session_date),
    CONSTRAINT calendar_session_times_in_range
        CHECK (time_in_range(open_at) AND time_in_range(close_at)),
    CONSTRAINT calendar_session_open_before_close CHECK (open_at < close_at)
);

COMMENT ON TABLE calendar_session IS
    'Trading sessions of exchanges, by the codes of exchange_calendars (XNYS, XNSE, ...).';
COMMENT ON COLUMN calendar_session.session_date IS 'The day in the exchange''s own time zone.';

CREATE TABLE price_bar (
    symbol    text        NOT NULL,
    bar_end   timestamptz NOT NULL,
    bar_start timestamptz NOT NULL,
    open      numeric     NOT NULL,
    high      numeric     NOT NULL,
    low       numeric     NOT NULL,
    close     numeric     NOT NULL,
    volume    numeric,
    CONSTRAINT price_bar_pkey PRIMARY KEY (symbol, bar_end),
    CONSTRAINT price_bar_symbol_known FOREIGN KEY (symbol) REFERENCES instrument (symbol),
    CONSTRAINT price_bar_starts_before_it_ends CHECK (bar_start <= bar_end),
    CONSTRAINT price_bar_times_in_range
        CHECK (time_in_range(bar_start) AND time_in_range(bar_end)),
    CONSTRAINT price_bar_high_is_highest CHECK (high >= greatest(open, low, close)),
    CONSTRAINT price_bar_low_is_lowest CHECK (low <= least(open, high, close)),
    CONSTRAINT price_bar_prices_finite CHECK (high < 1e15 AND low > -1e15),
    CONSTRAINT price_bar_prices_of_8_decimals CHECK (
        greatest(min_scale(open), min_scale(high), min_scale(low), min_scale(close)) <= 8),
    CONSTRAINT price_bar_volume_not_negative CHECK (volume >= 0 AND volume < 1e18)
);

CREATE INDEX price_bar_bar_end_idx ON price_bar (bar_end, symbol);

COMMENT ON TABLE price_bar IS 'Imported prices, unadjusted: what was really paid at the time.';
COMMENT ON COLUMN price_bar.volume IS 'Units traded; NULL when it is not known.';

CREATE TABLE corporate_action (
    symbol      text    NOT NULL,
    ex_date     date    NOT NULL,
    kind        text    NOT NULL DEFAULT 'SPLIT',
    numerator   numeric NOT NULL,
    denominator numeric NOT NULL,
    CONSTRAINT corporate_action_pkey PRIMARY KEY (symbol, ex_date, kind),
    CONSTRAINT corporate_action_symbol_known FOREIGN KEY (symbol) REFERENCES instrument (symbol),
    CONSTRAINT corporate_action_kind_known CHECK (kind = 'SPLIT'),
    CONSTRAINT corporate_action_ex_date_in_range
        CHECK (ex_date BETWEEN '0001-01-02' AND '9999-12-30'),
    CONSTRAINT corporate_action_ratio_positive
        CHECK (numerator > 0 AND numerator < 1e6 AND min_scale(numerator) <= 8
               AND denominator > 0 AND denominator < 1e6 AND min_scale(denominator) <= 8)
);

COMMENT ON TABLE corporate_action IS
    'Announced splits: numerator new units for denominator old ones from the open of ex_date on.';

-- The session that was open at a moment, or the last one that had opened before it. Twenty days
-- back hold every closure that an exchange has come back from in recent decades (golden weeks).
CREATE FUNCTION calendar_session_at(at_calendar text, moment timestamptz)
RETURNS calendar_session LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT s
    FROM calendar_session s
    WHERE s.calendar = at_calendar
      AND s.session_date BETWEEN (moment AT TIME ZONE 'UTC')::date - 20
                             AND (moment AT TIME ZONE 'UTC')::date + 1
      AND s.open_at <= moment
    ORDER BY s.session_date DESC
    LIMIT 1
$$;

COMMENT ON FUNCTION calendar_session_at IS
    'The session of a calendar that was open at a moment, or the last one before it.';

-- A run: one strategy with its own money and its own books. Everything else of a run hangs on its
-- row: it is the lock that serialises its writers, and nothing is written unless it is RUNNING.

CREATE TABLE run_status (
    status  text    NOT NULL,
    is_over boolean NOT NULL,
    why     text    NOT NULL,
    CONSTRAINT run_status_pkey PRIMARY KEY (status)
);

COMMENT ON TABLE run_status IS 'The states of a run.';

INSERT INTO run_status (status, is_over, why) VALUES
    ('CREATED', false, 'Made, not started: takes plans and limits, no orders.'),
    ('RUNNING', false, 'Ticks.'),
    ('STOPPING', false, 'Asked to stop; its orders at a broker are being cancelled.'),
    ('STOPPED', true, 'Ended on purpose. Never written again.'),
    ('ERROR', true, 'Ended by a fault. Never written again.');

CREATE TABLE run_transition (
    from_status text NOT NULL,
    to_status   text NOT NULL,
    why         text NOT NULL,
    CONSTRAINT run_transition_pkey PRIMARY KEY (from_status, to_status),
    CONSTRAINT run_transition_from_known FOREIGN KEY (from_status) REFERENCES run_status (status),
    CONSTRAINT run_transition_to_known FOREIGN KEY (to_status) REFERENCES run_status (status)
);

COMMENT ON TABLE run_transition IS 'The moves that a run''s status may make; no other is possible.';

INSERT INTO run_transition (from_status, to_status, why) VALUES
    ('CREATED', 'RUNNING', 'Started.'),
    ('CREATED', 'STOPPED', 'Given up before it started.'),
    ('RUNNING', 'STOPPING', 'Asked to stop while orders are at a broker.'),
    ('RUNNING', 'STOPPED', 'Stopped; what was pending in our own book is cancelled.'),
    ('RUNNING', 'ERROR', 'The strategy or the engine failed.'),
    ('STOPPING', 'STOPPED', 'The last order at the broker is settled.'),
    ('STOPPING', 'ERROR', 'Failed while stopping.');

CREATE TABLE strategy_run (
    user_id      uuid        NOT NULL,
    run_id       uuid        NOT NULL DEFAULT gen_random_uuid(),
    name         text,
    status       text        NOT NULL DEFAULT 'CREATED',
    strategy     text        NOT NULL DEFAULT 'sip',
    parameters   jsonb       NOT NULL DEFAULT '{}',
    broker       text        NOT NULL DEFAULT 'paper',
    paper        jsonb       NOT NULL DEFAULT '{}',
    account_type text        NOT NULL DEFAULT 'CASH',
    calendar     text        NOT NULL DEFAULT 'XNYS',
    currency     text        NOT NULL DEFAULT 'USD',
    tick_at      text        NOT NULL DEFAULT 'CLOSE',
    initial_cash numeric     NOT NULL DEFAULT 0,
    cash         numeric     NOT NULL,
    books_seq    bigint      NOT NULL DEFAULT 0,
    created_at   timestamptz NOT NULL DEFAULT now(),
    stopped_at   timestamptz,
    CONSTRAINT strategy_run_pkey PRIMARY KEY (user_id, run_id),
    CONSTRAINT strategy_run_belongs_to_user
        FOREIGN KEY (user_id) REFERENCES app_user (user_id) ON DELETE CASCADE,
    CONSTRAINT strategy_run_status_known FOREIGN KEY (status) REFERENCES run_status (status),
    CONSTRAINT strategy_run_account_type_known CHECK (account_type IN ('CASH', 'MARGIN')),
    CONSTRAINT strategy_run_tick_at_known CHECK (tick_at IN ('OPEN', 'CLOSE')),
    CONSTRAINT strategy_run_currency_format CHECK (currency ~ '^[A-Z]{3}$'),
    CONSTRAINT strategy_run_broker_format CHECK (broker ~ '^[a-z][a-z0-9_]{0,31}$'),
    CONSTRAINT strategy_run_words_short CHECK (
        length(coalesce(name, '')) <= 100 AND length(strategy) <= 200 AND length(calendar) <= 32),
    CONSTRAINT strategy_run_parameters_is_object CHECK (jsonb_typeof(parameters) = 'object'),
    CONSTRAINT strategy_run_paper_is_object CHECK (jsonb_typeof(paper) = 'object'),
    CONSTRAINT strategy_run_initial_cash_in_range
        CHECK (initial_cash >= 0 AND initial_cash < 1e18 AND min_scale(initial_cash) <= 8),
    CONSTRAINT strategy_run_cash_in_range
        CHECK (abs(cash) < 1e20 AND min_scale(cash) <= 16),
    CONSTRAINT strategy_run_cash_not_negative_in_cash_account
        CHECK (cash >= 0 OR account_type <> 'CASH' OR initial_cash < 0),  -- refused above
    CONSTRAINT strategy_run_stopped_at_iff_over
        CHECK ((stopped_at IS NOT NULL) = (status IN ('STOPPED', 'ERROR')))
) WITH (fillfactor = 50);  -- cash changes in place with every trade: leave room for HOT updates

-- This prevents two strategies from trading one user's money at the same time.
CREATE UNIQUE INDEX strategy_run_one_running_per_user
    ON strategy_run (user_id) WHERE status = 'RUNNING';

COMMENT ON TABLE strategy_run IS 'A run of a strategy; at most one RUNNING per user.';
COMMENT ON COLUMN strategy_run.strategy IS 'A shipped strategy''s name, or package.module:Class.';
COMMENT ON COLUMN strategy_run.parameters IS
    'The strategy''s parameters, validated when the run is made.';
COMMENT ON COLUMN strategy_run.paper IS
    'The paper broker''s settings: slippage, commission, volume share, seed.';
COMMENT ON COLUMN strategy_run.account_type IS
    'CASH: no debt and no short position. MARGIN: both.';
COMMENT ON COLUMN strategy_run.calendar IS
    'The exchange calendar (a code of exchange_calendars) that the run follows.';
COMMENT ON COLUMN strategy_run.tick_at IS 'Which moment of a session the schedule ticks at.';
COMMENT ON COLUMN strategy_run.cash IS
    'Initial cash and what the executions did to it; computed by the database, in currency.';
COMMENT ON COLUMN strategy_run.books_seq IS
    'Number of the last EXECUTION or SPLIT_APPLIED event that cash and positions follow.';

-- The one gate of every write into a run: lock its row, so that a concurrent stop waits for us or
-- is seen by us, and refuse unless its status is one of those allowed. The lock order is run, then
-- orders by id, then ledger. A run that does not exist is the foreign key's business; saying so
-- here adds the hint.
CREATE FUNCTION run_lock(of_user uuid, of_run uuid, for_table text, VARIADIC allowed text[])
RETURNS strategy_run LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run strategy_run;
BEGIN
    SELECT * INTO run FROM strategy_run
    WHERE user_id = of_user AND run_id = of_run FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'user % has no run %', of_user, of_run
            USING ERRCODE = 'foreign_key_violation', CONSTRAINT = for_table || '_belongs_to_run',
                  TABLE = for_table, COLUMN = 'run_id',
                  HINT = 'Give a run together with the user who owns it.';
    ELSIF run.status <> ALL (allowed) THEN
        RAISE EXCEPTION 'run % is %, so % can not be written', of_run, run.status, for_table
            USING ERRCODE = '23T03', CONSTRAINT = for_table || '_run_is_running', TABLE = for_table,
                  HINT = CASE WHEN run.status = 'CREATED' THEN 'Start the run first.'
                              ELSE 'An ended run is never written again; make a new run.' END;
    END IF;
    RETURN run;
END $$;

COMMENT ON FUNCTION run_lock IS
    'Locks a run''s row and returns it; refuses unless its status is one of those allowed.';

CREATE FUNCTION strategy_run_prepare_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF NEW.cash <> NEW.initial_cash OR NEW.books_seq <> 0 THEN
        RAISE EXCEPTION 'a new run''s cash is its initial_cash (%), not %',
            NEW.initial_cash, NEW.cash
            USING ERRCODE = '23T04', CONSTRAINT = 'strategy_run_cash_from_executions',
                  TABLE = 'strategy_run', COLUMN = 'cash',
                  HINT = 'Leave cash and books_seq out; give initial_cash.';
    END IF;
    NEW.cash := NEW.initial_cash;
    NEW.created_at := now();
    NEW.stopped_at := CASE WHEN NEW.status IN ('STOPPED', 'ERROR') THEN now() END;
    PERFORM strategy_run_refuse_second_running(NEW.user_id, NEW.run_id, NEW.status);
    RETURN NEW;
END $$;

COMMENT ON FUNCTION strategy_run_prepare_insert IS 'Trigger: a run begins with its initial cash.';

-- The unique index is what holds, also in a race; this says the same earlier and with a hint.
CREATE FUNCTION strategy_run_refuse_second_running(of_user uuid, not_run uuid, new_status text)
RETURNS void LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    other uuid;
BEGIN
    IF new_status <> 'RUNNING' THEN
        RETURN;
    END IF;
    SELECT run_id INTO other FROM strategy_run
    WHERE user_id = of_user AND status = 'RUNNING' AND run_id <> not_run;
    IF FOUND THEN
        RAISE EXCEPTION 'user % already has the RUNNING run %', of_user, other
            USING ERRCODE = 'unique_violation', CONSTRAINT = 'strategy_run_one_running_per_user',
                  TABLE = 'strategy_run', COLUMN = 'status',
                  HINT = format('Stop run %s first, or start this one for another user.', other);
    END IF;
END $$;

COMMENT ON FUNCTION strategy_run_refuse_second_running IS
    'Refuses a second RUNNING run of a user, with a hint that names the first.';

-- Cash is not guarded by who writes it but proven, whoever does: it may change only by what the
-- EXECUTION events say that it does not yet have (50_executions.sql).
CREATE FUNCTION strategy_run_check_update() RETURNS trigger
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

COMMENT ON FUNCTION strategy_run_check_update IS
    'Trigger: an ended run stays as it is, terms are kept, cash is proven.';

-- What a run was made of is fixed; what its strategy works with is so from the first event on,
-- which tells it.
CREATE FUNCTION strategy_run_check_terms(was strategy_run, now_is strategy_run) RETURNS void
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

COMMENT ON FUNCTION strategy_run_check_terms IS 'Refuses a change of what a run was made of.';

-- A run that leaves RUNNING takes its open paper orders with it, whoever ends it: the orders are
-- cancelled and the events written while the run still counts as RUNNING, in the same statement.
CREATE FUNCTION strategy_run_check_move() RETURNS trigger
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

COMMENT ON FUNCTION strategy_run_check_move IS
    'Trigger: only moves of run_transition; the end cancels what is open and is told.';

CREATE TRIGGER strategy_run_a_prepare_insert BEFORE INSERT ON strategy_run
    FOR EACH ROW EXECUTE FUNCTION strategy_run_prepare_insert();
CREATE TRIGGER strategy_run_a_check_update BEFORE UPDATE ON strategy_run
    FOR EACH ROW EXECUTE FUNCTION strategy_run_check_update();
CREATE TRIGGER strategy_run_b_check_move BEFORE UPDATE ON strategy_run
    FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status)
    EXECUTE FUNCTION strategy_run_check_move();

-- For tables whose rows are one per run and change: no write unless the run is RUNNING, and no
-- row wanders to another run, which would take it out of one that has ended.
CREATE FUNCTION run_guard_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM run_lock(NEW.user_id, NEW.run_id, TG_ARGV[0], 'RUNNING');
    IF TG_OP = 'UPDATE' THEN
        PERFORM row_check_keeps_run(OLD.user_id, OLD.run_id, NEW.user_id, NEW.run_id, TG_ARGV[0]);
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION run_guard_write IS
    'Trigger: no write into a run that is not RUNNING. Argument: the logical table name.';

CREATE FUNCTION row_check_keeps_run(old_user uuid, old_run uuid, new_user uuid, new_run uuid,
                                    for_table text)
RETURNS void LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF (old_user, old_run) IS DISTINCT FROM (new_user, new_run) THEN
        RAISE EXCEPTION 'a row of % stays with run %', for_table, old_run
            USING ERRCODE = '23T09', CONSTRAINT = for_table || '_keeps_its_run', TABLE = for_table,
                  COLUMN = 'run_id', HINT = 'Write a row of its own for the other run.';
    END IF;
END $$;

COMMENT ON FUNCTION row_check_keeps_run IS 'Refuses to move a row to another user or run.';

-- History is added to, never edited, and goes only with its run. A cascade comes when the run's
-- row is gone already; that the row is gone is the proof, not how deep in triggers we are, since
-- anybody's trigger on a table of their own is as deep.
CREATE FUNCTION history_refuse_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        IF NOT EXISTS (SELECT FROM strategy_run
                       WHERE user_id = OLD.user_id AND run_id = OLD.run_id) THEN
            RETURN OLD;
        END IF;
    END IF;
    RAISE EXCEPTION '% of % is not possible: it is history', TG_OP, TG_ARGV[0]
        USING ERRCODE = '23T09', CONSTRAINT = TG_ARGV[0] || '_' || TG_ARGV[1], TABLE = TG_ARGV[0],
              HINT = 'History is only added to. Correct it by a new row, or delete the whole run.';
END $$;

COMMENT ON FUNCTION history_refuse_change IS
    'Trigger: rows go only with their run. Arguments: the logical table name, and append_only '
    'where rows never change or kept where they do.';

CREATE TRIGGER strategy_run_z_refuse_truncate BEFORE TRUNCATE ON strategy_run
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('strategy_run', 'kept');

CREATE TABLE engine_state (
    user_id           uuid        NOT NULL,
    run_id            uuid        NOT NULL,
    last_logical_time timestamptz,
    state             jsonb       NOT NULL DEFAULT '{}',
    recorded_at       timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT engine_state_pkey PRIMARY KEY (user_id, run_id),
    CONSTRAINT engine_state_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT engine_state_state_is_object CHECK (jsonb_typeof(state) = 'object')
) WITH (fillfactor = 50);

COMMENT ON TABLE engine_state IS 'Where a run stands after its last tick; one row a run.';
COMMENT ON COLUMN engine_state.state IS 'What the strategy asked to be remembered.';
COMMENT ON COLUMN engine_state.last_logical_time IS
    'Logical time of the last tick; proven against the TICK event in event_ledger.';

-- An engine_state that forgot the last tick would have the run begin anew.
CREATE FUNCTION engine_state_check_write() RETURNS trigger
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

COMMENT ON FUNCTION engine_state_check_write IS
    'Trigger: last_logical_time is that of the newest TICK event.';

CREATE TRIGGER engine_state_a_guard_write BEFORE INSERT OR UPDATE ON engine_state
    FOR EACH ROW EXECUTE FUNCTION run_guard_write('engine_state');
CREATE TRIGGER engine_state_b_check_write BEFORE INSERT OR UPDATE ON engine_state
    FOR EACH ROW EXECUTE FUNCTION engine_state_check_write();
CREATE TRIGGER engine_state_z_refuse_delete BEFORE DELETE ON engine_state
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('engine_state', 'kept');
CREATE TRIGGER engine_state_z_refuse_truncate BEFORE TRUNCATE ON engine_state
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('engine_state', 'kept');

CREATE TABLE engine_status (
    user_id      uuid        NOT NULL,
    run_id       uuid        NOT NULL,
    heartbeat_at timestamptz NOT NULL DEFAULT now(),
    lag_seconds  numeric,
    last_error   text,
    error_at     timestamptz,
    CONSTRAINT engine_status_pkey PRIMARY KEY (user_id, run_id),
    CONSTRAINT engine_status_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT engine_status_error_has_time CHECK ((last_error IS NULL) = (error_at IS NULL)),
    CONSTRAINT engine_status_lag_in_range CHECK (abs(lag_seconds) < 1e12),
    CONSTRAINT engine_status_times_in_range
        CHECK (time_in_range(heartbeat_at) AND time_in_range(coalesce(error_at, heartbeat_at)))
) WITH (fillfactor = 50);

COMMENT ON TABLE engine_status IS 'How a run is doing; one row a run.';
COMMENT ON COLUMN engine_status.lag_seconds IS
    'Wall clock less logical time at the last live tick.';

CREATE TRIGGER engine_status_a_guard_write BEFORE INSERT OR UPDATE ON engine_status
    FOR EACH ROW EXECUTE FUNCTION run_guard_write('engine_status');
CREATE TRIGGER engine_status_z_refuse_delete BEFORE DELETE ON engine_status
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('engine_status', 'kept');
CREATE TRIGGER engine_status_z_refuse_truncate BEFORE TRUNCATE ON engine_status
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('engine_status', 'kept');

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
    ('PENDING_SUBMIT', true, 'Sent, outcome unknown.'),
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
    ('PENDING', 'PENDING_SUBMIT', 'Released and sent.'),
    ('PENDING', 'ROUTED', 'Released, and the broker took it at once.'),
    ('PENDING', 'PARTIALLY_FILLED', 'First fill of a resting order.'),
    ('PENDING', 'FILLED', 'A resting order was filled in whole.'),
    ('PENDING', 'CANCELED', 'Cancelled while it rested.'),
    ('PENDING', 'REJECTED', 'The cash or a limit no longer allows it when it would fill.'),
    ('PENDING', 'EXPIRED', 'Its time in force ended.'),
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
    ('CANCELED', 'FILLED', 'The broker had filled it before the cancel reached it.'),
    ('CANCELED', 'PARTIALLY_FILLED', 'A fill from before the cancel arrived late.'),
    ('EXPIRED', 'FILLED', 'The broker had filled it before it expired.'),
    ('EXPIRED', 'PARTIALLY_FILLED', 'A fill from before the expiry arrived late.'),
    ('REJECTED', 'FILLED', 'The rejection was a guess, the fill is a fact.'),
    ('REJECTED', 'PARTIALLY_FILLED', 'The rejection was a guess, the fill is a fact.'),
    ('REJECTED', 'ROUTED', 'The rejection was a guess; the broker works it.');

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
    recorded_at      timestamptz NOT NULL DEFAULT now(),
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
    CONSTRAINT orders_symbol_format CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]{0,31}$'),
    CONSTRAINT orders_client_order_id_short CHECK (length(client_order_id) <= 128),
    CONSTRAINT orders_side_known CHECK (side IN ('BUY', 'SELL')),
    CONSTRAINT orders_order_type_known
        CHECK (order_type IN ('MARKET', 'LIMIT', 'STOP', 'STOP_LIMIT', 'TRAIL')),
    CONSTRAINT orders_time_in_force_known
        CHECK (time_in_force IN ('DAY', 'GTC', 'IOC', 'FOK', 'GTD', 'OPG', 'CLS')),
    CONSTRAINT orders_quantity_positive_unless_rejected
        CHECK (quantity > 0 OR status = 'REJECTED'),
    CONSTRAINT orders_quantity_in_range
        CHECK (abs(quantity) < 1e15 AND min_scale(quantity) <= 8),
    CONSTRAINT orders_prices_in_range CHECK (
        abs(coalesce(limit_price, 0)) < 1e15 AND min_scale(coalesce(limit_price, 0)) <= 8
        AND abs(coalesce(stop_price, 0)) < 1e15 AND min_scale(coalesce(stop_price, 0)) <= 8
        AND abs(coalesce(reference_price, 0)) < 1e15
        AND min_scale(coalesce(reference_price, 0)) <= 8),
    CONSTRAINT orders_trail_in_range CHECK (
        abs(coalesce(trail_amount, 0)) < 1e15 AND min_scale(coalesce(trail_amount, 0)) <= 8
        AND abs(coalesce(trail_percent, 0)) < 1e15 AND min_scale(coalesce(trail_percent, 0)) <= 8),
    CONSTRAINT orders_trail_positive_unless_rejected CHECK (
        coalesce(trail_amount, 1) > 0 AND coalesce(trail_percent, 1) > 0
        AND coalesce(trail_percent, 1) < 100 OR status = 'REJECTED'),
    CONSTRAINT orders_filled_quantity_not_negative CHECK (filled_quantity >= 0),
    CONSTRAINT orders_not_overfilled_on_paper
        CHECK (filled_quantity <= quantity OR broker <> 'paper' OR status = 'REJECTED'),
    CONSTRAINT orders_status_agrees_with_fills CHECK (
        CASE WHEN status = 'FILLED' THEN filled_quantity >= quantity
             WHEN status = 'PARTIALLY_FILLED'
             THEN filled_quantity > 0 AND filled_quantity < quantity
             WHEN status IN ('NEW', 'PENDING', 'PENDING_SUBMIT', 'ROUTED', 'REJECTED')
             THEN filled_quantity = 0
             ELSE filled_quantity < quantity END),
    CONSTRAINT orders_reject_has_source_and_code CHECK (
        CASE WHEN status = 'REJECTED'
             THEN reject_code IS NOT NULL
                  AND reject_source IN ('VALIDATION', 'RISK', 'COMPLIANCE', 'BROKER')
             ELSE reject_code IS NULL AND reject_source IS NULL END),
    CONSTRAINT orders_status_after_birth CHECK (status_at >= logical_time),
    CONSTRAINT orders_times_in_range CHECK (
        time_in_range(coalesce(expire_at, logical_time))
        AND time_in_range(coalesce(triggered_at, logical_time)) AND time_in_range(status_at))
) WITH (fillfactor = 70);

-- This prevents the same client order from being taken twice.
CREATE UNIQUE INDEX orders_client_order_id_once
    ON orders (user_id, run_id, client_order_id) WHERE client_order_id IS NOT NULL;

-- The book of open orders: matched at every tick, summed by the risk gate.
CREATE INDEX orders_open_idx ON orders (user_id, run_id, symbol)
    WHERE status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED');

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
COMMENT ON COLUMN orders.logical_time IS 'Logical time of the tick that placed it.';

-- Words as people type them become the stored words; 90_risk.sql decides afterwards.
CREATE FUNCTION orders_prepare_insert() RETURNS trigger
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

COMMENT ON FUNCTION orders_prepare_insert IS
    'Trigger: the stored words, the run''s broker; born NEW, PENDING or REJECTED, nothing filled.';

-- What was asked for is fixed, what was filled is proven by the executions, whoever writes it.
-- A day's end and a trigger are noted once, a trailing stop only tightens, a reason belongs to
-- its move.
CREATE FUNCTION orders_check_update() RETURNS trigger
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

COMMENT ON FUNCTION orders_check_update IS
    'Trigger: an order keeps its terms, a closed one everything; what is filled is proven.';

CREATE FUNCTION orders_keeps_terms(was orders, now_is orders) RETURNS boolean
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

COMMENT ON FUNCTION orders_keeps_terms IS
    'Whether an update leaves alone what was asked for, or restates it for a split.';

CREATE FUNCTION orders_stop_tightens(was orders, stop_price numeric) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN was.order_type = 'TRAIL' AND stop_price IS NOT NULL
       AND (was.stop_price IS NULL
            OR CASE WHEN was.side = 'BUY' THEN stop_price < was.stop_price
                    ELSE stop_price > was.stop_price END);

COMMENT ON FUNCTION orders_stop_tightens IS
    'Whether a new stop of a trailing order is nearer to the market than its old one.';

-- What a paper order may not do although the table of moves, which is for every broker, allows it:
-- come back from its end. Our own book has no late messages.
CREATE FUNCTION orders_check_move() RETURNS trigger
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

COMMENT ON FUNCTION orders_check_move IS 'Trigger: only moves of order_transition.';

CREATE TRIGGER orders_a_prepare_insert BEFORE INSERT ON orders
    FOR EACH ROW EXECUTE FUNCTION orders_prepare_insert();
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
    recorded_at         timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT execution_pkey PRIMARY KEY (user_id, run_id, execution_id),
    CONSTRAINT execution_belongs_to_order FOREIGN KEY (user_id, run_id, order_id)
        REFERENCES orders (user_id, run_id, order_id) ON DELETE CASCADE,
    CONSTRAINT execution_execution_id_format
        CHECK (execution_id ~ '^[[:graph:]]([[:print:]]{0,126}[[:graph:]])?$'),
    CONSTRAINT execution_quantity_positive
        CHECK (quantity > 0 AND quantity < 1e15 AND min_scale(quantity) <= 8),
    CONSTRAINT execution_price_in_range CHECK (abs(price) < 1e15 AND min_scale(price) <= 8),
    CONSTRAINT execution_commission_in_range
        CHECK (abs(commission) < 1e15 AND min_scale(commission) <= 16),
    CONSTRAINT execution_commission_currency_format CHECK (commission_currency ~ '^[A-Z]{3}$'),
    CONSTRAINT execution_event_at_in_range CHECK (time_in_range(event_at))
);

-- The executions of an order: its history, its cascade, its audit.
CREATE INDEX execution_order_idx ON execution (user_id, run_id, order_id);

COMMENT ON TABLE execution IS 'Executions (fills) of every run and broker; append-only.';
COMMENT ON COLUMN execution.execution_id IS
    'The broker''s id; at the paper broker order id and number.';
COMMENT ON COLUMN execution.symbol IS 'Taken from the order.';
COMMENT ON COLUMN execution.side IS 'Taken from the order.';
COMMENT ON COLUMN execution.price IS 'In currency per unit.';
COMMENT ON COLUMN execution.commission IS 'Positive costs money; negative is a rebate.';
COMMENT ON COLUMN execution.commission_currency IS 'The run''s, unless it is given.';
COMMENT ON COLUMN execution.event_at IS 'When the broker says that it happened.';

CREATE FUNCTION execution_prepare_insert() RETURNS trigger
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

COMMENT ON FUNCTION execution_prepare_insert IS
    'Trigger: only an open order trades; symbol and side are the order''s.';

CREATE FUNCTION execution_check_money(e execution, run strategy_run) RETURNS void
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

COMMENT ON FUNCTION execution_check_money IS
    'Refuses a price that can not be, and a commission in another currency than the run''s.';

-- The event first: it is what position and cash follow, and their own triggers prove that they do,
-- so that writing past this function falsifies nothing. It has the owner's rights, so that nobody
-- else needs a right to write what follows from executions.
CREATE FUNCTION execution_apply() RETURNS trigger
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

COMMENT ON FUNCTION execution_apply IS
    'Trigger: executions are told to the ledger and move orders, positions and cash.';

-- UTC, so that no session's time zone decides what the ledger says.
CREATE FUNCTION execution_event_payload(e execution) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = public, pg_temp SET timezone = 'UTC' AS $$
    SELECT jsonb_build_object('symbol', e.symbol, 'side', e.side, 'quantity', e.quantity,
                              'price', e.price, 'commission', e.commission,
                              'commission_currency', e.commission_currency,
                              'event_at', e.event_at)
$$;

COMMENT ON FUNCTION execution_event_payload IS 'What the event of an execution says.';

-- What an execution does to cash, in the run's currency: a buy pays, a sale receives, both pay
-- commission.
CREATE FUNCTION execution_cash_flow(side text, quantity numeric, price numeric, commission numeric)
RETURNS numeric LANGUAGE sql IMMUTABLE
RETURN CASE WHEN side = 'BUY' THEN -quantity * price ELSE quantity * price END - commission;

COMMENT ON FUNCTION execution_cash_flow IS 'What one execution does to cash, in currency.';

CREATE TRIGGER execution_a_prepare_insert BEFORE INSERT ON execution
    FOR EACH ROW EXECUTE FUNCTION execution_prepare_insert();
CREATE TRIGGER execution_m_apply AFTER INSERT ON execution
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION execution_apply();
CREATE TRIGGER execution_z_refuse_change BEFORE UPDATE OR DELETE ON execution
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('execution', 'append_only');
CREATE TRIGGER execution_z_refuse_truncate BEFORE TRUNCATE ON execution
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('execution', 'append_only');

CREATE VIEW paper_trade AS
    SELECT user_id, run_id, execution_id, order_id, symbol, side, quantity, price, commission,
           commission_currency, logical_time, event_at, recorded_at
    FROM execution e
    WHERE EXISTS (SELECT FROM strategy_run r
                  WHERE r.user_id = e.user_id AND r.run_id = e.run_id AND r.broker = 'paper')
    WITH CHECK OPTION;

COMMENT ON VIEW paper_trade IS 'The executions of paper runs.';

-- Positions: what a run holds. Quantity, cost and realised profit follow from the executions and
-- splits; only the mark, an observed price, is written from outside.

CREATE TABLE position (
    user_id      uuid    NOT NULL,
    run_id       uuid    NOT NULL,
    symbol       text    NOT NULL,
    quantity     numeric NOT NULL DEFAULT 0,
    cost_basis   numeric NOT NULL DEFAULT 0,
    realized_pnl numeric NOT NULL DEFAULT 0,
    mark_price   numeric,
    marked_at    timestamptz,
    avg_cost     numeric GENERATED ALWAYS AS (
        CASE WHEN quantity <> 0 THEN round(cost_basis / quantity, 10) END) STORED,
    market_value numeric GENERATED ALWAYS AS (
        CASE WHEN quantity = 0 THEN 0 ELSE quantity * mark_price END) STORED,
    CONSTRAINT position_pkey PRIMARY KEY (user_id, run_id, symbol),
    CONSTRAINT position_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT position_symbol_format CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]{0,31}$'),
    CONSTRAINT position_quantity_in_range
        CHECK (abs(quantity) < 1e18 AND min_scale(quantity) <= 8),
    CONSTRAINT position_mark_price_in_range
        CHECK (abs(mark_price) < 1e15 AND min_scale(mark_price) <= 8),
    CONSTRAINT position_mark_has_time CHECK ((mark_price IS NULL) = (marked_at IS NULL)),
    CONSTRAINT position_marked_at_in_range CHECK (time_in_range(marked_at)),
    CONSTRAINT position_holding_has_mark CHECK (quantity = 0 OR mark_price IS NOT NULL)
) WITH (fillfactor = 50);

COMMENT ON TABLE position IS 'Holdings by run and symbol, at average cost.';
COMMENT ON COLUMN position.quantity IS 'Units held, negative when short; computed by the database.';
COMMENT ON COLUMN position.cost_basis IS
    'Cost of what is held, without commission, in currency; negative when short.';
COMMENT ON COLUMN position.realized_pnl IS
    'Profit of what was closed, before commission, in currency.';
COMMENT ON COLUMN position.mark_price IS 'Last price that the run saw, per unit.';
COMMENT ON COLUMN position.marked_at IS 'Logical time of the mark.';

-- Average cost: adding to a position adds its cost, closing takes the closed share of the cost
-- away and realises the difference; a trade through zero closes first and opens with the rest.
-- A share of the cost may have no end: it is cut to 12 decimals, and a full close takes all.
CREATE FUNCTION position_after(quantity numeric, cost_basis numeric, delta numeric, price numeric,
                               OUT quantity_after numeric, OUT cost_after numeric,
                               OUT realized numeric)
LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
DECLARE
    closed numeric;
    removed numeric;
BEGIN
    quantity_after := quantity + delta;
    IF quantity * delta >= 0 THEN
        cost_after := cost_basis + delta * price;
        realized := 0;
        RETURN;
    END IF;
    closed := sign(delta) * least(abs(delta), abs(quantity));
    removed := CASE WHEN closed = -quantity THEN cost_basis
                    ELSE round(cost_basis * -closed / quantity, 12) END;
    realized := -closed * price - removed;
    cost_after := cost_basis - removed + (delta - closed) * price;
END $$;

COMMENT ON FUNCTION position_after IS 'A position after a trade of delta units, by average cost.';

CREATE FUNCTION position_check_write() RETURNS trigger
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

COMMENT ON FUNCTION position_check_write IS
    'Trigger: quantity, cost and profit are what the ledger makes them; a mark is no older.';

CREATE TRIGGER position_a_check_write BEFORE INSERT OR UPDATE ON position
    FOR EACH ROW EXECUTE FUNCTION position_check_write();
CREATE TRIGGER position_z_refuse_delete BEFORE DELETE ON position
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('position', 'kept');
CREATE TRIGGER position_z_refuse_truncate BEFORE TRUNCATE ON position
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('position', 'kept');

CREATE VIEW paper_position AS
    SELECT user_id, run_id, symbol, quantity, avg_cost, cost_basis, realized_pnl, mark_price,
           marked_at, market_value
    FROM position p
    WHERE EXISTS (SELECT FROM strategy_run r
                  WHERE r.user_id = p.user_id AND r.run_id = p.run_id AND r.broker = 'paper')
    WITH CHECK OPTION;

COMMENT ON VIEW paper_position IS 'The positions of paper runs.';

-- Splits as a run lived through them. A row applies an announced split to the run's position and
-- resting orders, once; nothing but an announced one can be applied.

CREATE TABLE split_applied (
    user_id         uuid        NOT NULL,
    run_id          uuid        NOT NULL,
    symbol          text        NOT NULL,
    ex_date         date        NOT NULL,
    kind            text        NOT NULL DEFAULT 'SPLIT',
    logical_time    timestamptz NOT NULL,
    quantity_before numeric     NOT NULL,
    quantity_after  numeric     NOT NULL,
    recorded_at     timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT split_applied_pkey PRIMARY KEY (user_id, run_id, symbol, ex_date),
    CONSTRAINT split_applied_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT split_applied_is_announced FOREIGN KEY (symbol, ex_date, kind)
        REFERENCES corporate_action (symbol, ex_date, kind)
);

COMMENT ON TABLE split_applied IS
    'Splits that a run''s position and orders went through; append-only.';
COMMENT ON COLUMN split_applied.quantity_before IS 'Position before it; computed by the database.';
COMMENT ON COLUMN split_applied.quantity_after IS
    'Position after it, cut to 8 decimals; computed by the database.';

CREATE FUNCTION split_applied_prepare_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run    strategy_run;
    action corporate_action;
BEGIN
    run := run_lock(NEW.user_id, NEW.run_id, 'split_applied', 'RUNNING');
    SELECT * INTO action FROM corporate_action
    WHERE symbol = NEW.symbol AND ex_date = NEW.ex_date AND kind = NEW.kind;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no split of % on % was announced', NEW.symbol, NEW.ex_date
            USING ERRCODE = 'foreign_key_violation', CONSTRAINT = 'split_applied_is_announced',
                  TABLE = 'split_applied', COLUMN = 'ex_date',
                  HINT = 'Announce it in corporate_action (oms data import --splits) first.';
    END IF;
    NEW.logical_time := coalesce(NEW.logical_time, run_last_time(NEW.user_id, NEW.run_id));
    IF NOT split_is_due(run, NEW.ex_date, NEW.logical_time) THEN
        RAISE EXCEPTION 'the split of % on % is not due at %', NEW.symbol, NEW.ex_date,
            NEW.logical_time
            USING ERRCODE = '23T07', CONSTRAINT = 'split_applied_when_due',
                  TABLE = 'split_applied', COLUMN = 'ex_date',
                  HINT = 'A split is applied between the last tick before its day and the next.';
    END IF;
    SELECT coalesce(sum(quantity), 0) INTO NEW.quantity_before FROM position
    WHERE user_id = NEW.user_id AND run_id = NEW.run_id AND symbol = NEW.symbol;
    NEW.quantity_after :=
        trunc(NEW.quantity_before * action.numerator / action.denominator, 8);
    NEW.recorded_at := now();
    RETURN NEW;
END $$;

COMMENT ON FUNCTION split_applied_prepare_insert IS
    'Trigger: only an announced split, when it is due; the quantities are the position''s.';

-- A position that was opened in new units must not be split again: the ex-date is after the session
-- of the last tick (of the first event, before any tick) and has come. Where the calendar says
-- nothing, days in UTC decide, which are at most one off.
CREATE FUNCTION split_is_due(run strategy_run, ex_date date, at timestamptz) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    since timestamptz;
BEGIN
    SELECT max(logical_time) INTO since FROM event_ledger
    WHERE user_id = run.user_id AND run_id = run.run_id AND event_type = 'TICK';
    IF since IS NULL THEN
        SELECT min(logical_time) INTO since FROM event_ledger
        WHERE user_id = run.user_id AND run_id = run.run_id;
    END IF;
    RETURN (since IS NULL
            OR ex_date > coalesce((calendar_session_at(run.calendar, since)).session_date,
                                  (since AT TIME ZONE 'UTC')::date - 2))
       AND ex_date <= greatest((calendar_session_at(run.calendar, at)).session_date,
                               (at AT TIME ZONE 'UTC')::date);
END $$;

COMMENT ON FUNCTION split_is_due IS
    'Whether a split''s ex-date lies between a run''s last tick and a moment.';

-- The event first: position and orders follow it. Resting orders ask the same money for the new
-- unit. A partly filled order can't be restated without falsifying its executions, so its rest is
-- cancelled and placed again.
CREATE FUNCTION split_applied_apply() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    o orders;
BEGIN
    -- Two splits in one statement, or a trade beside the split, would both start from one position.
    IF NEW.quantity_before <> coalesce((SELECT quantity FROM position
                                        WHERE user_id = NEW.user_id AND run_id = NEW.run_id
                                          AND symbol = NEW.symbol), 0) THEN
        RAISE EXCEPTION 'the position in % has changed since this split began', NEW.symbol
            USING ERRCODE = '23T08', CONSTRAINT = 'split_applied_starts_from_position',
                  TABLE = 'split_applied', COLUMN = 'quantity_before',
                  HINT = 'Apply one split of a symbol a statement, and nothing beside it.';
    END IF;
    INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
    VALUES (NEW.user_id, NEW.run_id, NEW.logical_time, 'SPLIT_APPLIED',
            split_event_subject(NEW), split_event_payload(NEW));
    PERFORM position_follow_ledger(NEW.user_id, NEW.run_id, NEW.symbol);
    FOR o IN SELECT * FROM orders
             WHERE user_id = NEW.user_id AND run_id = NEW.run_id AND symbol = NEW.symbol
               AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
               AND broker = 'paper'
             ORDER BY order_id
    LOOP
        PERFORM split_restate_order(o, NEW);
    END LOOP;
    PERFORM strategy_run_follow_ledger(NEW.user_id, NEW.run_id);
    RETURN NULL;
END $$;

COMMENT ON FUNCTION split_applied_apply IS
    'Trigger: a split is told to the ledger and restates resting orders and the position.';

CREATE FUNCTION split_event_subject(split split_applied) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN split.symbol || '@' || to_char(split.ex_date::timestamp, 'YYYY-MM-DD');

COMMENT ON FUNCTION split_event_subject IS 'What the event of a split is about: symbol and day.';

CREATE FUNCTION split_event_payload(split split_applied) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = public, pg_temp SET timezone = 'UTC' AS $$
    SELECT jsonb_build_object('symbol', split.symbol, 'ex_date', split.ex_date,
                              'numerator', c.numerator, 'denominator', c.denominator,
                              'quantity_before', split.quantity_before,
                              'quantity_after', split.quantity_after)
    FROM corporate_action c
    WHERE c.symbol = split.symbol AND c.ex_date = split.ex_date AND c.kind = split.kind
$$;

COMMENT ON FUNCTION split_event_payload IS 'What the event of a split says.';

-- An order as a split states it: more units at the same money.
CREATE FUNCTION orders_after_split(o orders, numerator numeric, denominator numeric) RETURNS orders
LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    o.quantity := trunc((o.quantity - o.filled_quantity) * numerator / denominator, 8);
    o.limit_price := round(o.limit_price * denominator / numerator, 8);
    o.stop_price := round(o.stop_price * denominator / numerator, 8);
    o.trail_amount := round(o.trail_amount * denominator / numerator, 8);
    o.reference_price := round(o.reference_price * denominator / numerator, 8);
    RETURN o;
END $$;

COMMENT ON FUNCTION orders_after_split IS 'The rest of an order in a split''s new units.';

-- The proof of a restated order: its run is just going through a split of the symbol, told to the
-- ledger and not yet taken up by the books, and the order is what that split makes of it.
CREATE FUNCTION orders_follows_split(was orders, now_is orders) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    split jsonb;
    due   orders;
BEGIN
    SELECT l.payload INTO split
    FROM strategy_run r
    JOIN event_ledger l ON l.user_id = r.user_id AND l.run_id = r.run_id AND l.seq > r.books_seq
    WHERE r.user_id = was.user_id AND r.run_id = was.run_id AND l.event_type = 'SPLIT_APPLIED'
      AND l.payload ->> 'symbol' = was.symbol
    ORDER BY l.seq DESC LIMIT 1;
    IF NOT FOUND OR was.filled_quantity <> 0 THEN
        RETURN false;
    END IF;
    due := orders_after_split(was, (split ->> 'numerator')::numeric,
                              (split ->> 'denominator')::numeric);
    RETURN (now_is.quantity, now_is.limit_price, now_is.stop_price, now_is.trail_amount,
            now_is.reference_price)
           IS NOT DISTINCT FROM
           (due.quantity, due.limit_price, due.stop_price, due.trail_amount, due.reference_price);
END $$;

COMMENT ON FUNCTION orders_follows_split IS 'Whether an order is restated by the split under way.';

CREATE FUNCTION split_restate_order(o orders, split split_applied) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    ratio corporate_action;
    rest  orders;
BEGIN
    SELECT * INTO ratio FROM corporate_action
    WHERE symbol = split.symbol AND ex_date = split.ex_date AND kind = split.kind;
    rest := orders_after_split(o, ratio.numerator, ratio.denominator);
    IF o.filled_quantity = 0 AND rest.quantity > 0 THEN
        UPDATE orders
        SET quantity = rest.quantity, limit_price = rest.limit_price,
            stop_price = rest.stop_price, trail_amount = rest.trail_amount,
            reference_price = rest.reference_price
        WHERE user_id = o.user_id AND run_id = o.run_id AND order_id = o.order_id;
        INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
        VALUES (o.user_id, o.run_id, split.logical_time, 'ORDER_RESTATED',
                o.order_id || '@' || to_char(split.ex_date::timestamp, 'YYYY-MM-DD'),
                orders_event_payload(rest));
        RETURN;
    END IF;
    UPDATE orders SET status = 'CANCELED', status_reason = 'SPLIT'
    WHERE user_id = o.user_id AND run_id = o.run_id AND order_id = o.order_id;
    IF rest.quantity > 0 THEN
        INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity, order_type,
                            time_in_force, limit_price, stop_price, trail_amount, trail_percent,
                            expire_at, triggered_at, reference_price, status_reason, logical_time)
        VALUES (o.user_id, o.run_id,
                md5(o.order_id || to_char(split.ex_date::timestamp, 'YYYY-MM-DD'))::uuid, o.symbol,
                o.side, rest.quantity, o.order_type, o.time_in_force, rest.limit_price,
                rest.stop_price, rest.trail_amount, o.trail_percent, o.expire_at, o.triggered_at,
                rest.reference_price, 'REST_AFTER_SPLIT', split.logical_time);
    END IF;
END $$;

COMMENT ON FUNCTION split_restate_order IS
    'Restates a resting order, or replaces a partly filled one.';

CREATE TRIGGER split_applied_a_prepare_insert BEFORE INSERT ON split_applied
    FOR EACH ROW EXECUTE FUNCTION split_applied_prepare_insert();
CREATE TRIGGER split_applied_m_apply AFTER INSERT ON split_applied
    FOR EACH ROW EXECUTE FUNCTION split_applied_apply();
CREATE TRIGGER split_applied_z_refuse_change BEFORE UPDATE OR DELETE ON split_applied
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('split_applied', 'append_only');
CREATE TRIGGER split_applied_z_refuse_truncate BEFORE TRUNCATE ON split_applied
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('split_applied', 'append_only');

-- The mark: what a run was worth at a logical time. Cash and market value are the books', whoever
-- writes the row; equity is their sum by definition.

CREATE TABLE mtm_ledger (
    user_id      uuid        NOT NULL,
    run_id       uuid        NOT NULL,
    logical_time timestamptz NOT NULL,
    cash         numeric     NOT NULL,
    market_value numeric     NOT NULL,
    equity       numeric     GENERATED ALWAYS AS (cash + market_value) STORED,
    recorded_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT mtm_ledger_one_per_logical_time PRIMARY KEY (user_id, run_id, logical_time),
    CONSTRAINT mtm_ledger_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT mtm_ledger_logical_time_in_range CHECK (time_in_range(logical_time))
);

COMMENT ON TABLE mtm_ledger IS 'Mark-to-market by run and logical time; append-only.';
COMMENT ON COLUMN mtm_ledger.cash IS 'The run''s cash, in its currency; proven against the run.';
COMMENT ON COLUMN mtm_ledger.market_value IS
    'Sum of quantity x mark of its positions; proven against them.';
COMMENT ON COLUMN mtm_ledger.equity IS 'cash + market_value.';

CREATE FUNCTION mtm_ledger_prepare_insert() RETURNS trigger
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

COMMENT ON FUNCTION mtm_ledger_prepare_insert IS
    'Trigger: cash and market value are the books'', at a time that is not past.';

CREATE TRIGGER mtm_ledger_a_prepare_insert BEFORE INSERT ON mtm_ledger
    FOR EACH ROW EXECUTE FUNCTION mtm_ledger_prepare_insert();
CREATE TRIGGER mtm_ledger_z_refuse_change BEFORE UPDATE OR DELETE ON mtm_ledger
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('mtm_ledger', 'append_only');
CREATE TRIGGER mtm_ledger_z_refuse_truncate BEFORE TRUNCATE ON mtm_ledger
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('mtm_ledger', 'append_only');

CREATE VIEW paper_equity_curve AS
    SELECT user_id, run_id, logical_time, cash, market_value, equity, recorded_at
    FROM mtm_ledger m
    WHERE EXISTS (SELECT FROM strategy_run r
                  WHERE r.user_id = m.user_id AND r.run_id = m.run_id AND r.broker = 'paper')
    WITH CHECK OPTION;

COMMENT ON VIEW paper_equity_curve IS 'The marks of paper runs.';

-- The ledger: everything that happened to a run, in order, append-only, each row chained to the
-- one before it by a hash. Orders, executions and splits write their own events, whoever inserts
-- them; a tick closes with one TICK event, whose key is what makes it happen once.

CREATE TABLE event_ledger (
    user_id      uuid        NOT NULL,
    run_id       uuid        NOT NULL,
    seq          bigint      NOT NULL,
    logical_time timestamptz NOT NULL,
    event_type   text        NOT NULL,
    subject      text        NOT NULL DEFAULT '' COLLATE "C",
    payload      jsonb       NOT NULL DEFAULT '{}',
    recorded_at  timestamptz NOT NULL DEFAULT now(),
    hash         bytea       NOT NULL,
    CONSTRAINT event_ledger_pkey PRIMARY KEY (user_id, run_id, seq),
    CONSTRAINT event_ledger_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT event_ledger_once_per_logical_time
        UNIQUE (user_id, run_id, logical_time, event_type, subject),
    CONSTRAINT event_ledger_seq_positive CHECK (seq > 0),
    CONSTRAINT event_ledger_logical_time_in_range CHECK (time_in_range(logical_time)),
    CONSTRAINT event_ledger_subject_short CHECK (length(subject) <= 200),
    CONSTRAINT event_ledger_tick_has_no_subject CHECK (event_type <> 'TICK' OR subject = ''),
    CONSTRAINT event_ledger_event_type_format CHECK (event_type ~ '^[A-Z][A-Z0-9_]{0,62}$'),
    CONSTRAINT event_ledger_payload_is_object CHECK (jsonb_typeof(payload) = 'object'),
    CONSTRAINT event_ledger_hash_is_sha256 CHECK (length(hash) = 32)
);

-- What a plan or a period may do once, at whatever logical time: this prevents a second purchase
-- of one SIP occurrence and a second rebalance of one period.
CREATE UNIQUE INDEX event_ledger_occasion_once ON event_ledger (user_id, run_id, subject)
    WHERE event_type IN ('SIP_EXECUTED', 'SIP_REJECTED', 'SIP_SKIPPED', 'REBALANCED');

-- This prevents a run from ending twice.
CREATE UNIQUE INDEX event_ledger_run_ends_once ON event_ledger (user_id, run_id)
    WHERE event_type IN ('RUN_STOPPED', 'RUN_ERROR');

-- What positions and cash follow: the few events after books_seq, or all of a run in an audit.
CREATE INDEX event_ledger_books_idx ON event_ledger (user_id, run_id, seq)
    WHERE event_type IN ('EXECUTION', 'SPLIT_APPLIED');

COMMENT ON TABLE event_ledger IS 'Everything that happened to a run; append-only, hash-chained.';
COMMENT ON COLUMN event_ledger.seq IS 'Position in the run''s chain: 1, 2, 3, ... without a gap.';
COMMENT ON COLUMN event_ledger.subject IS
    'What it is about: an order, an execution, a plan''s occasion; empty for the run itself.';
COMMENT ON COLUMN event_ledger.hash IS
    'sha256 of the previous row''s hash and this row (event_hash); the chain begins empty.';

-- Times as seconds since 1970 and everything else as canonical jsonb, so that neither a session's
-- time zone nor a separator inside a text can make two different rows hash alike.
CREATE FUNCTION event_hash(previous bytea, of_user uuid, of_run uuid, seq bigint,
                           logical_time timestamptz, event_type text, subject text,
                           payload jsonb, recorded_at timestamptz)
RETURNS bytea LANGUAGE sql IMMUTABLE
RETURN sha256(previous || convert_to(jsonb_build_array(
    of_user, of_run, seq, extract(epoch FROM logical_time), event_type, subject, payload,
    extract(epoch FROM recorded_at))::text, 'UTF8'));

COMMENT ON FUNCTION event_hash IS 'The hash of a ledger row, given the one before it.';

-- The logical time at which a run stands: that of its newest event, or now for a run without any.
CREATE FUNCTION run_last_time(of_user uuid, of_run uuid) RETURNS timestamptz
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    newest timestamptz;
BEGIN
    SELECT logical_time INTO newest FROM event_ledger
    WHERE user_id = of_user AND run_id = of_run ORDER BY seq DESC LIMIT 1;
    RETURN coalesce(newest, now());
END $$;

COMMENT ON FUNCTION run_last_time IS 'Logical time of a run''s newest event, else now.';

CREATE FUNCTION event_ledger_append() RETURNS trigger
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

COMMENT ON FUNCTION event_ledger_append IS
    'Trigger: numbers and chains an event, which may not be earlier than the one before it.';

-- What an order's events carry: all that was asked for, no surrogate ids. UTC, so that no
-- session's time zone decides what the ledger says.
CREATE FUNCTION orders_event_payload(o orders) RETURNS jsonb
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

COMMENT ON FUNCTION orders_event_payload IS 'What the event of an order''s placing says.';

-- The subject of an order's event is its id, of an execution's the order's id and its own.
CREATE FUNCTION event_order_id(subject text) RETURNS uuid
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN subject ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}([/@]|$)'
            THEN left(subject, 36)::uuid END;

COMMENT ON FUNCTION event_order_id IS 'The order that an event''s subject names, or NULL.';

-- Events that tell of rows are not taken on anybody's word: the row must be there and say the
-- same. Positions and cash follow these events, so forging one would forge money.
CREATE FUNCTION event_ledger_check_fact() RETURNS trigger
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

COMMENT ON FUNCTION event_ledger_check_fact IS
    'Trigger: an event that tells of a row says what the row says.';

-- An order's event is written with the move that it tells, so that it is never told again. A
-- restatement is true while its split is told to the ledger and not yet taken up by the books.
CREATE FUNCTION order_event_is_true(event event_ledger) RETURNS boolean
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

COMMENT ON FUNCTION order_event_is_true IS 'Whether an order is as its event says.';

-- How a run ended is told just before it ends; at the end of the transaction it must be true.
CREATE FUNCTION event_ledger_check_end() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF EXISTS (SELECT FROM strategy_run
               WHERE user_id = NEW.user_id AND run_id = NEW.run_id
                 AND 'RUN_' || status <> NEW.event_type
                 AND NOT (NEW.event_type = 'RUN_STOPPING' AND status IN ('STOPPED', 'ERROR'))) THEN
        RAISE EXCEPTION 'run % has not moved as its event % says', NEW.run_id, NEW.event_type
            USING ERRCODE = '23T08', CONSTRAINT = 'event_ledger_tells_what_happened',
                  TABLE = 'event_ledger', COLUMN = 'event_type',
                  HINT = 'Move the run itself; the database tells the ledger.';
    END IF;
    RETURN NULL;
END $$;

COMMENT ON FUNCTION event_ledger_check_end IS
    'Trigger, at commit: a run whose event says that it ended has ended so.';

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
CREATE TRIGGER event_ledger_z_refuse_change BEFORE UPDATE OR DELETE ON event_ledger
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('event_ledger', 'append_only');
CREATE TRIGGER event_ledger_z_refuse_truncate BEFORE TRUNCATE ON event_ledger
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('event_ledger', 'append_only');

CREATE FUNCTION orders_record_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
    SELECT o.user_id, o.run_id, o.logical_time,
           CASE WHEN o.status = 'REJECTED' THEN 'ORDER_REJECTED' ELSE 'ORDER_PLACED' END,
           o.order_id, orders_event_payload(o)
    FROM new_rows o;
    RETURN NULL;
END $$;

COMMENT ON FUNCTION orders_record_insert IS 'Trigger: tells the ledger of orders placed.';

-- Moves by a fill are told by the execution's own event.
CREATE FUNCTION orders_record_move() RETURNS trigger
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

COMMENT ON FUNCTION orders_record_move IS 'Trigger: tells the ledger of moves that no fill made.';

CREATE TRIGGER orders_m_record_insert AFTER INSERT ON orders
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION orders_record_insert();
CREATE TRIGGER orders_m_record_move AFTER UPDATE ON orders
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION orders_record_move();

-- The books follow the ledger: cash and positions take up the EXECUTION and SPLIT_APPLIED events
-- after strategy_run.books_seq, and nothing else ever changes them. Their tables' triggers prove it
-- with the functions below, whoever writes.

CREATE FUNCTION event_cash_flow(event_type text, payload jsonb) RETURNS numeric
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN event_type = 'EXECUTION'
            THEN execution_cash_flow(payload ->> 'side', (payload ->> 'quantity')::numeric,
                                     (payload ->> 'price')::numeric,
                                     (payload ->> 'commission')::numeric)
            ELSE 0 END;

COMMENT ON FUNCTION event_cash_flow IS 'What a ledger event does to cash, in currency.';

-- What a run's cash and books_seq must be: what they are, and what the events after books_seq add.
CREATE FUNCTION strategy_run_books_due(run strategy_run, OUT cash numeric, OUT books_seq bigint)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    SELECT run.cash + coalesce(sum(event_cash_flow(l.event_type, l.payload)), 0),
           coalesce(max(l.seq), run.books_seq)
    INTO cash, books_seq
    FROM event_ledger l
    WHERE l.user_id = run.user_id AND l.run_id = run.run_id AND l.seq > run.books_seq
      AND l.event_type IN ('EXECUTION', 'SPLIT_APPLIED');
END $$;

COMMENT ON FUNCTION strategy_run_books_due IS
    'What the ledger makes of a run''s cash and books_seq.';

CREATE FUNCTION strategy_run_follow_ledger(of_user uuid, of_run uuid) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE strategy_run r
    SET (cash, books_seq) = (SELECT d.cash, d.books_seq FROM strategy_run_books_due(r) d)
    WHERE r.user_id = of_user AND r.run_id = of_run;
END $$;

COMMENT ON FUNCTION strategy_run_follow_ledger IS
    'Brings a run''s cash up to the last event of its ledger.';

-- One step of the fold that makes a position of a run's events, here and in the audit. A split
-- keeps the cost and states the mark in the new unit. A mark from before a trade is older news
-- than the trade's own price.
CREATE FUNCTION position_after_event(p public.position, event event_ledger)
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

COMMENT ON FUNCTION position_after_event IS
    'A position after an EXECUTION or SPLIT_APPLIED event of its symbol.';

-- What a position must be: what it is, and what the events after the run's books_seq make of it.
CREATE FUNCTION position_due(of_user uuid, of_run uuid, of_symbol text)
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

COMMENT ON FUNCTION position_due IS 'What the ledger makes of a position.';

CREATE FUNCTION position_follow_ledger(of_user uuid, of_run uuid, of_symbol text) RETURNS void
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

COMMENT ON FUNCTION position_follow_ledger IS
    'Brings a position up to the last event of its run''s ledger.';

-- Systematic investment plans: so much money into a symbol on a day of every month, or on the
-- next session of the run's calendar if that day is none.

CREATE TABLE sip_plan (
    user_id       uuid        NOT NULL,
    run_id        uuid        NOT NULL,
    plan          text        NOT NULL COLLATE "C",
    symbol        text        NOT NULL,
    amount        numeric     NOT NULL,
    day_of_month  integer     NOT NULL DEFAULT 1,
    start_on      date        NOT NULL DEFAULT current_date,
    end_on        date,
    status        text        NOT NULL DEFAULT 'ACTIVE',
    missed_policy text        NOT NULL DEFAULT 'RUN_EACH',
    created_at    timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT sip_plan_pkey PRIMARY KEY (user_id, run_id, plan),
    CONSTRAINT sip_plan_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT sip_plan_symbol_known FOREIGN KEY (symbol) REFERENCES instrument (symbol),
    CONSTRAINT sip_plan_plan_format CHECK (plan ~ '^[A-Za-z0-9][A-Za-z0-9 ._-]{0,62}$'),
    CONSTRAINT sip_plan_amount_positive
        CHECK (amount > 0 AND amount < 1e15 AND min_scale(amount) <= 8),
    CONSTRAINT sip_plan_day_of_month_in_range CHECK (day_of_month BETWEEN 1 AND 31),
    CONSTRAINT sip_plan_ends_after_it_starts CHECK (end_on >= start_on),
    CONSTRAINT sip_plan_days_in_range CHECK (
        start_on BETWEEN '0001-01-02' AND '9999-12-30'
        AND coalesce(end_on, start_on) <= '9999-12-30'),
    CONSTRAINT sip_plan_status_known CHECK (status IN ('ACTIVE', 'PAUSED')),
    CONSTRAINT sip_plan_missed_policy_known
        CHECK (missed_policy IN ('RUN_EACH', 'RUN_ONCE', 'SKIP'))
);

COMMENT ON TABLE sip_plan IS 'Systematic investment plans of a run.';
COMMENT ON COLUMN sip_plan.plan IS 'Its name, unique in its run.';
COMMENT ON COLUMN sip_plan.amount IS 'Money per execution, in the run''s currency.';
COMMENT ON COLUMN sip_plan.day_of_month IS
    'Planned day; the last day of a shorter month, the next session if it is none.';
COMMENT ON COLUMN sip_plan.missed_policy IS
    'What becomes of missed occasions: RUN_EACH, RUN_ONCE (the newest), SKIP; a skip is recorded.';

CREATE FUNCTION sip_plan_guard_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM run_lock(NEW.user_id, NEW.run_id, 'sip_plan', 'CREATED', 'RUNNING');
    IF TG_OP = 'INSERT' THEN
        NEW.created_at := now();
        RETURN NEW;
    END IF;
    PERFORM row_check_keeps_run(OLD.user_id, OLD.run_id, NEW.user_id, NEW.run_id, 'sip_plan');
    -- The ledger knows a plan's occasions by its name: a second plan of that name would not buy.
    IF (NEW.plan, NEW.created_at) IS DISTINCT FROM (OLD.plan, OLD.created_at) THEN
        RAISE EXCEPTION 'plan % keeps its name', OLD.plan
            USING ERRCODE = '23T09', CONSTRAINT = 'sip_plan_name_fixed', TABLE = 'sip_plan',
                  COLUMN = 'plan', HINT = 'Pause it and add another plan.';
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION sip_plan_guard_write IS
    'Trigger: plans of a run that has not ended, each with the name that it was made with.';

CREATE TRIGGER sip_plan_a_guard_write BEFORE INSERT OR UPDATE ON sip_plan
    FOR EACH ROW EXECUTE FUNCTION sip_plan_guard_write();
CREATE TRIGGER sip_plan_z_refuse_delete BEFORE DELETE ON sip_plan
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('sip_plan', 'kept');
CREATE TRIGGER sip_plan_z_refuse_truncate BEFORE TRUNCATE ON sip_plan
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('sip_plan', 'kept');

-- The occasion a plan has in a month: its key in the ledger, and the planned day.
CREATE FUNCTION sip_planned_day(month date, day_of_month integer) RETURNS date
LANGUAGE sql IMMUTABLE
RETURN least(date_trunc('month', month::timestamp)::date + day_of_month - 1,
             (date_trunc('month', month::timestamp) + interval '1 month - 1 day')::date);

COMMENT ON FUNCTION sip_planned_day IS 'The planned day of a plan in a month.';

-- What is due of a run's active plans up to and including a session: every month after the newest
-- occasion in the ledger whose planned session has come. Bounded by the caller's LIMIT.
CREATE FUNCTION sip_due(of_user uuid, of_run uuid, upto_session date)
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

COMMENT ON FUNCTION sip_due IS
    'Occasions of a run''s active plans that are due at a session and not yet in the ledger, with '
    'the open of the session of the plan''s next one.';

-- Risk: limits are rows, per user or per run, and decided here when an order arrives, so that an
-- order from psql meets them too. A refusal is stored on the order: source, code, limit and value.

CREATE TABLE risk_limit (
    user_id     uuid        NOT NULL,
    limit_id    uuid        NOT NULL DEFAULT gen_random_uuid(),
    run_id      uuid,
    kind        text        NOT NULL,
    symbol      text,
    limit_value numeric,
    created_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT risk_limit_pkey PRIMARY KEY (user_id, limit_id),
    CONSTRAINT risk_limit_belongs_to_user
        FOREIGN KEY (user_id) REFERENCES app_user (user_id) ON DELETE CASCADE,
    CONSTRAINT risk_limit_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT risk_limit_kind_known CHECK (kind IN (
        'MAX_POSITION', 'MAX_ORDER_QUANTITY', 'MAX_ORDER_NOTIONAL',
        'FORBIDDEN_SYMBOL', 'ALLOWED_SYMBOL')),
    CONSTRAINT risk_limit_has_what_its_kind_needs CHECK (
        CASE WHEN kind IN ('FORBIDDEN_SYMBOL', 'ALLOWED_SYMBOL')
             THEN symbol IS NOT NULL AND limit_value IS NULL
             ELSE limit_value >= 0 AND limit_value < 1e20 AND limit_value IS NOT NULL END),
    CONSTRAINT risk_limit_symbol_format CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]{0,31}$')
);

COMMENT ON TABLE risk_limit IS 'Limits that every order of a user, or of one run, must meet.';
COMMENT ON COLUMN risk_limit.run_id IS 'The run that it holds for; NULL: all runs of the user.';
COMMENT ON COLUMN risk_limit.symbol IS 'The symbol that it holds for; NULL: every symbol.';
COMMENT ON COLUMN risk_limit.limit_value IS
    'Units (MAX_POSITION, MAX_ORDER_QUANTITY) or currency (MAX_ORDER_NOTIONAL).';

-- The limits that hold for a run are looked up by its user.
CREATE INDEX risk_limit_run_idx ON risk_limit (user_id, run_id, kind);

-- A limit is removed and made again, not moved to somebody else; an ended run takes no more.
CREATE FUNCTION risk_limit_guard_write() RETURNS trigger
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

COMMENT ON FUNCTION risk_limit_guard_write IS
    'Trigger: limits of runs that have not ended, each with the user and run it was made for.';

CREATE TRIGGER risk_limit_a_guard_write BEFORE INSERT OR UPDATE ON risk_limit
    FOR EACH ROW EXECUTE FUNCTION risk_limit_guard_write();

-- What makes an order nonsense in itself.
CREATE FUNCTION orders_validation_code(o orders) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN
    CASE
        WHEN o.quantity <= 0 THEN 'QUANTITY_NOT_POSITIVE'
        WHEN o.order_type IN ('LIMIT', 'STOP_LIMIT') AND o.limit_price IS NULL
            THEN 'LIMIT_PRICE_MISSING'
        WHEN o.order_type NOT IN ('LIMIT', 'STOP_LIMIT') AND o.limit_price IS NOT NULL
            THEN 'LIMIT_PRICE_NOT_ALLOWED'
        WHEN o.order_type IN ('STOP', 'STOP_LIMIT') AND o.stop_price IS NULL
            THEN 'STOP_PRICE_MISSING'
        WHEN o.order_type IN ('MARKET', 'LIMIT') AND o.stop_price IS NOT NULL
            THEN 'STOP_PRICE_NOT_ALLOWED'
        WHEN o.order_type = 'TRAIL'
             AND (o.trail_amount IS NULL) = (o.trail_percent IS NULL)
            THEN 'TRAIL_NEEDS_AMOUNT_OR_PERCENT'
        WHEN o.order_type <> 'TRAIL' AND num_nonnulls(o.trail_amount, o.trail_percent) > 0
            THEN 'TRAIL_NOT_ALLOWED'
        WHEN o.trail_amount <= 0 OR o.trail_percent <= 0 OR o.trail_percent >= 100
            THEN 'TRAIL_OUT_OF_RANGE'
        WHEN o.time_in_force = 'GTD' AND o.expire_at IS NULL THEN 'EXPIRE_AT_MISSING'
        WHEN o.time_in_force IN ('OPG', 'CLS') AND o.order_type NOT IN ('MARKET', 'LIMIT')
            THEN 'ORDER_TYPE_NOT_ALLOWED_IN_AUCTION'
    END;

COMMENT ON FUNCTION orders_validation_code IS 'Why an order is nonsense in itself, or NULL.';

CREATE FUNCTION orders_price_code(o orders) RETURNS text
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT 'PRICE_NOT_POSITIVE'
    WHERE least(o.limit_price, o.stop_price, o.reference_price) <= 0
      AND NOT EXISTS (SELECT FROM instrument i
                      WHERE i.symbol = o.symbol AND i.negative_price_allowed)
$$;

COMMENT ON FUNCTION orders_price_code IS 'Why an order''s prices can not be, or NULL.';

-- Holdings with what open orders of the same side would add to them.
CREATE FUNCTION orders_exposure(o orders) RETURNS numeric
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

COMMENT ON FUNCTION orders_exposure IS 'Position plus open orders of an order''s side and symbol.';

-- The cash that open buy orders of a run hold back.
CREATE FUNCTION run_reserved_cash(of_user uuid, of_run uuid) RETURNS numeric
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT coalesce(sum(reserved_cash), 0) FROM orders
    WHERE user_id = of_user AND run_id = of_run
      AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
$$;

COMMENT ON FUNCTION run_reserved_cash IS 'Cash held back by a run''s open buy orders.';

-- What a symbol costs as far as a run can know: its own mark, else the last imported close.
CREATE FUNCTION orders_known_price(o orders) RETURNS numeric
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT coalesce(
        (SELECT p.mark_price FROM position p
         WHERE p.user_id = o.user_id AND p.run_id = o.run_id AND p.symbol = o.symbol),
        (SELECT b.close FROM price_bar b
         WHERE b.symbol = o.symbol AND b.bar_end <= o.logical_time
         ORDER BY b.bar_end DESC LIMIT 1))
$$;

COMMENT ON FUNCTION orders_known_price IS
    'The last price of an order''s symbol that its run knows.';

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

CREATE FUNCTION orders_pass_gate() RETURNS trigger
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

COMMENT ON FUNCTION orders_pass_gate IS
    'Trigger: decides when an order arrives; a refusal is stored as REJECTED.';

CREATE TRIGGER orders_b_pass_gate BEFORE INSERT ON orders
    FOR EACH ROW WHEN (NEW.status <> 'REJECTED') EXECUTE FUNCTION orders_pass_gate();

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

CREATE VIEW audit_running AS
    SELECT user_id, NULL::uuid AS run_id, 'strategy_run' AS subject,
           format('%s runs are RUNNING', count(*)) AS finding
    FROM strategy_run WHERE status = 'RUNNING' GROUP BY user_id HAVING count(*) > 1;

COMMENT ON VIEW audit_running IS 'Users with more than one RUNNING run.';

CREATE VIEW audit_duplicate AS
    SELECT user_id, run_id, 'mtm_ledger ' || logical_time AS subject,
           format('marked %s times', count(*)) AS finding
    FROM mtm_ledger GROUP BY user_id, run_id, logical_time HAVING count(*) > 1
    UNION ALL
    SELECT user_id, run_id, 'event_ledger TICK ' || logical_time,
           format('ticked %s times', count(*))
    FROM event_ledger WHERE event_type = 'TICK'
    GROUP BY user_id, run_id, logical_time HAVING count(*) > 1
    UNION ALL
    SELECT user_id, run_id, 'event_ledger ' || subject, format('happened %s times', count(*))
    FROM event_ledger
    WHERE event_type IN ('SIP_EXECUTED', 'SIP_REJECTED', 'SIP_SKIPPED', 'REBALANCED')
    GROUP BY user_id, run_id, subject HAVING count(*) > 1;

COMMENT ON VIEW audit_duplicate IS 'Ticks, marks and occasions that happened more than once.';

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

-- Positions as the ledger alone tells them, symbol by symbol, event by event.
CREATE FUNCTION position_from_ledger(of_user uuid, of_run uuid)
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

COMMENT ON FUNCTION position_from_ledger IS 'A run''s positions, rebuilt from its ledger alone.';

CREATE VIEW audit_position AS
    SELECT r.user_id, r.run_id, 'position ' || d.symbol AS subject,
           format('is %s at cost %s with %s realised, the ledger makes it %s at %s with %s',
                  d.quantity, d.cost_basis, d.realized_pnl, d.ledger_quantity,
                  d.ledger_cost_basis, d.ledger_realized_pnl) AS finding
    FROM strategy_run r
    CROSS JOIN LATERAL (
        SELECT symbol, coalesce(p.quantity, 0) AS quantity, coalesce(p.cost_basis, 0) AS cost_basis,
               coalesce(p.realized_pnl, 0) AS realized_pnl,
               coalesce(l.quantity, 0) AS ledger_quantity,
               coalesce(l.cost_basis, 0) AS ledger_cost_basis,
               coalesce(l.realized_pnl, 0) AS ledger_realized_pnl
        FROM (SELECT * FROM position WHERE user_id = r.user_id AND run_id = r.run_id) p
        FULL JOIN position_from_ledger(r.user_id, r.run_id) l USING (symbol)) d
    WHERE (d.quantity, d.cost_basis, d.realized_pnl)
          <> (d.ledger_quantity, d.ledger_cost_basis, d.ledger_realized_pnl);

COMMENT ON VIEW audit_position IS 'Positions that are not what the ledger makes them.';

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

CREATE VIEW audit_chain AS
    SELECT c.user_id, c.run_id, 'event_ledger ' || c.seq AS subject,
           CASE WHEN c.seq <> c.place THEN format('is number %s in the chain', c.place)
                WHEN c.logical_time < c.time_before THEN 'is earlier than the event before it'
                ELSE 'does not follow from the event before it: its hash is wrong' END AS finding
    FROM (
        SELECT l.*, row_number() OVER w AS place, lag(l.logical_time) OVER w AS time_before,
               coalesce(lag(l.hash) OVER w, '') AS hash_before
        FROM event_ledger l
        WINDOW w AS (PARTITION BY l.user_id, l.run_id ORDER BY l.seq)) c
    WHERE c.seq <> c.place OR c.logical_time < c.time_before
       OR c.hash <> event_hash(c.hash_before, c.user_id, c.run_id, c.seq, c.logical_time,
                               c.event_type, c.subject, c.payload, c.recorded_at);

COMMENT ON VIEW audit_chain IS 'Events that break their run''s chain.';

-- Named one by one, since other people's tables may be in the schema too.
CREATE FUNCTION our_relations() RETURNS text[]
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

COMMENT ON FUNCTION our_relations IS 'Our tables and views.';

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
    FROM pg_inherits i JOIN ours o ON o.oid = i.inhparent;

COMMENT ON VIEW audit_guard IS 'Triggers and constraints that the owner has switched off.';

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

-- Who may do what. Roles belong to the server, not to the database: they are made where the
-- migrating user may make them; where not, a warning says what an administrator must run.

DO $$
DECLARE
    wanted text;
BEGIN
    FOREACH wanted IN ARRAY ARRAY['oms_engine', 'oms_connector', 'oms_auditor'] LOOP
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
-- written by execution_apply and split_applied_apply, which have the owner's rights.
CREATE FUNCTION role_rights() RETURNS TABLE (role text, rights text)
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

COMMENT ON FUNCTION role_rights IS 'The rights of each role, besides reading.';

-- Gives each of the roles that exist exactly its rights; it may be called again at any time. The
-- caller becomes a member of them, so that it can act as the engine and the auditor.
CREATE FUNCTION grant_roles() RETURNS SETOF text
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    item record;
    ours text := array_to_string(our_relations(), ', ');
BEGIN
    FOR item IN SELECT rolname FROM pg_roles
                WHERE rolname IN ('oms_engine', 'oms_connector', 'oms_auditor') LOOP
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
                WHERE rolname IN ('oms_engine', 'oms_connector', 'oms_auditor')
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
                 FROM unnest(ARRAY['oms_engine', 'oms_connector', 'oms_auditor']) w
                 WHERE w NOT IN (SELECT rolname FROM pg_roles);
END $$;

COMMENT ON FUNCTION grant_roles IS
    'Gives the roles their rights; returns what an administrator must still run.';

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
DECLARE
    missing text;
BEGIN
    EXECUTE format('REVOKE ALL ON %s FROM PUBLIC', array_to_string(our_relations(), ', '));
    FOR missing IN SELECT grant_roles() LOOP
        RAISE WARNING 'an administrator must run: %', missing
            USING HINT = 'Then `oms db migrate`, or SELECT grant_roles() as the owner.';
    END LOOP;
    IF EXISTS (SELECT FROM pg_namespace n, aclexplode(n.nspacl) a
               WHERE n.nspname = 'public' AND a.grantee = 0 AND a.privilege_type = 'CREATE') THEN
        RAISE WARNING 'anybody may create functions in schema public and so change what ours call'
            USING HINT = 'An administrator must run: REVOKE CREATE ON SCHEMA public FROM PUBLIC;';
    END IF;
END $$;

