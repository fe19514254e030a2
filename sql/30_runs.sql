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
    created_at   timestamptz NOT NULL DEFAULT now(),
    stopped_at   timestamptz,
    CONSTRAINT strategy_run_pkey PRIMARY KEY (user_id, run_id),
    CONSTRAINT strategy_run_belongs_to_user
        FOREIGN KEY (user_id) REFERENCES app_user (user_id) ON DELETE CASCADE,
    CONSTRAINT strategy_run_status_known FOREIGN KEY (status) REFERENCES run_status (status),
    CONSTRAINT strategy_run_account_type_known CHECK (account_type IN ('CASH', 'MARGIN')),
    CONSTRAINT strategy_run_tick_at_known CHECK (tick_at IN ('OPEN', 'CLOSE')),
    CONSTRAINT strategy_run_currency_format CHECK (currency ~ '^[A-Z]{3}$'),
    CONSTRAINT strategy_run_parameters_is_object CHECK (jsonb_typeof(parameters) = 'object'),
    CONSTRAINT strategy_run_paper_is_object CHECK (jsonb_typeof(paper) = 'object'),
    CONSTRAINT strategy_run_initial_cash_in_range
        CHECK (initial_cash >= 0 AND initial_cash < 1e18 AND min_scale(initial_cash) <= 8),
    CONSTRAINT strategy_run_cash_in_range
        CHECK (abs(cash) < 1e20 AND min_scale(cash) <= 16),
    CONSTRAINT strategy_run_cash_not_negative_in_cash_account
        CHECK (cash >= 0 OR account_type <> 'CASH'),
    CONSTRAINT strategy_run_stopped_at_iff_over
        CHECK ((stopped_at IS NOT NULL) = (status IN ('STOPPED', 'ERROR')))
) WITH (fillfactor = 50);  -- cash changes in place with every trade: leave room for HOT updates

-- This prevents two strategies from trading one user's money at the same time.
CREATE UNIQUE INDEX strategy_run_one_running_per_user
    ON strategy_run (user_id) WHERE status = 'RUNNING';

COMMENT ON TABLE strategy_run IS 'A run of a strategy; at most one RUNNING per user.';
COMMENT ON COLUMN strategy_run.strategy IS 'A shipped strategy''s name, or package.module:Class.';
COMMENT ON COLUMN strategy_run.parameters IS 'The strategy''s parameters, validated when the run is made.';
COMMENT ON COLUMN strategy_run.paper IS 'The paper broker''s settings: slippage, commission, volume share, seed.';
COMMENT ON COLUMN strategy_run.account_type IS 'CASH: no debt and no short position. MARGIN: both.';
COMMENT ON COLUMN strategy_run.calendar IS 'The exchange calendar (a code of exchange_calendars) that the run follows.';
COMMENT ON COLUMN strategy_run.tick_at IS 'Which moment of a session the schedule ticks at.';
COMMENT ON COLUMN strategy_run.cash IS
    'Initial cash and what the executions did to it; computed by the database, in currency.';

CREATE FUNCTION strategy_run_prepare_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF NEW.cash IS DISTINCT FROM NEW.initial_cash AND NEW.cash IS NOT NULL THEN
        RAISE EXCEPTION 'a new run''s cash is its initial_cash (%), not %', NEW.initial_cash, NEW.cash
            USING ERRCODE = '23T04', CONSTRAINT = 'strategy_run_cash_from_executions',
                  TABLE = 'strategy_run', COLUMN = 'cash',
                  HINT = 'Leave cash out; give initial_cash.';
    END IF;
    NEW.cash := NEW.initial_cash;
    IF NEW.status IN ('STOPPED', 'ERROR') THEN
        NEW.stopped_at := coalesce(NEW.stopped_at, now());
    END IF;
    PERFORM strategy_run_refuse_second_running(NEW.user_id, NEW.run_id, NEW.status);
    RETURN NEW;
END $$;

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

CREATE FUNCTION strategy_run_check_update() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF (NEW.user_id, NEW.run_id, NEW.initial_cash, NEW.broker, NEW.account_type, NEW.currency,
        NEW.calendar)
       IS DISTINCT FROM
       (OLD.user_id, OLD.run_id, OLD.initial_cash, OLD.broker, OLD.account_type, OLD.currency,
        OLD.calendar) THEN
        RAISE EXCEPTION 'run % keeps its identity, initial cash, broker, account type, currency and calendar',
            OLD.run_id
            USING ERRCODE = '23T09', CONSTRAINT = 'strategy_run_terms_fixed',
                  TABLE = 'strategy_run', HINT = 'Make a new run instead.';
    END IF;
    IF OLD.stopped_at IS NOT NULL AND NEW.status = OLD.status THEN
        RAISE EXCEPTION 'run % is %, so it can not be changed', OLD.run_id, OLD.status
            USING ERRCODE = '23T03', CONSTRAINT = 'strategy_run_run_is_running',
                  TABLE = 'strategy_run',
                  HINT = 'An ended run is never written again; make a new run.';
    END IF;
    -- Depth 1 is a statement that somebody sent; what the executions' own trigger sends is deeper.
    IF NEW.cash IS DISTINCT FROM OLD.cash AND pg_trigger_depth() = 1 THEN
        RAISE EXCEPTION 'the cash of run % follows from its executions', OLD.run_id
            USING ERRCODE = '23T04', CONSTRAINT = 'strategy_run_cash_from_executions',
                  TABLE = 'strategy_run', COLUMN = 'cash',
                  HINT = 'Insert executions; the database computes cash.';
    END IF;
    RETURN NEW;
END $$;

-- A run that ends takes its pending orders with it, whoever ends it: the orders are cancelled and
-- the events written while the run still counts as RUNNING, in the same statement.
CREATE FUNCTION strategy_run_check_move() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    last_time timestamptz;
BEGIN
    IF NOT EXISTS (SELECT FROM run_transition
                   WHERE from_status = OLD.status AND to_status = NEW.status) THEN
        RAISE EXCEPTION 'run % cannot go from % to %', OLD.run_id, OLD.status, NEW.status
            USING ERRCODE = '23T02', CONSTRAINT = 'strategy_run_status_transition',
                  TABLE = 'strategy_run', COLUMN = 'status',
                  HINT = 'run_transition lists the allowed moves; an ended run stays ended, make a new one.';
    END IF;
    PERFORM strategy_run_refuse_second_running(NEW.user_id, NEW.run_id, NEW.status);
    IF NEW.status IN ('STOPPED', 'ERROR') THEN
        NEW.stopped_at := now();
        IF OLD.status = 'RUNNING' THEN
            SELECT coalesce(max(logical_time), now()) INTO last_time FROM event_ledger
            WHERE user_id = OLD.user_id AND run_id = OLD.run_id;
            UPDATE orders SET status = 'CANCELED', status_at = greatest(last_time, status_at),
                              status_reason = 'RUN_' || NEW.status
            WHERE user_id = OLD.user_id AND run_id = OLD.run_id
              AND status IN ('NEW', 'PENDING', 'PARTIALLY_FILLED') AND broker = 'paper';
            SELECT coalesce(max(logical_time), now()) INTO last_time FROM event_ledger
            WHERE user_id = OLD.user_id AND run_id = OLD.run_id;
            INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, payload)
            VALUES (OLD.user_id, OLD.run_id, last_time, 'RUN_' || NEW.status,
                    jsonb_build_object('cash', OLD.cash));
        END IF;
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER strategy_run_a_prepare_insert BEFORE INSERT ON strategy_run
    FOR EACH ROW EXECUTE FUNCTION strategy_run_prepare_insert();
CREATE TRIGGER strategy_run_a_check_update BEFORE UPDATE ON strategy_run
    FOR EACH ROW EXECUTE FUNCTION strategy_run_check_update();
CREATE TRIGGER strategy_run_b_check_move BEFORE UPDATE ON strategy_run
    FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status)
    EXECUTE FUNCTION strategy_run_check_move();

-- The one gate of every write into a run: lock its row, so that a concurrent stop waits for us or
-- is seen by us, and refuse unless it is RUNNING. The lock order is run, then orders by id, then
-- ledger. A run that does not exist is the foreign key's business; saying so here adds the hint.
CREATE FUNCTION run_lock_running(of_user uuid, of_run uuid, for_table text)
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
    ELSIF run.status <> 'RUNNING' THEN
        RAISE EXCEPTION 'run % is %, so % can not be written', of_run, run.status, for_table
            USING ERRCODE = '23T03', CONSTRAINT = for_table || '_run_is_running', TABLE = for_table,
                  HINT = CASE WHEN run.status = 'CREATED' THEN 'Start the run first.'
                              ELSE 'An ended run is never written again; make a new run.' END;
    END IF;
    RETURN run;
END $$;

COMMENT ON FUNCTION run_lock_running IS
    'Locks a run''s row and returns it; refuses unless the run exists and is RUNNING.';

CREATE FUNCTION run_guard_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        PERFORM run_lock_running(OLD.user_id, OLD.run_id, TG_ARGV[0]);
        RETURN OLD;
    END IF;
    PERFORM run_lock_running(NEW.user_id, NEW.run_id, TG_ARGV[0]);
    RETURN NEW;
END $$;

COMMENT ON FUNCTION run_guard_write IS
    'Trigger: no write into a run that is not RUNNING. Argument: the logical table name.';

-- History is added to, never edited. A cascade from the run's own deletion comes from a foreign
-- key's trigger and is therefore deeper than depth 0.
CREATE FUNCTION history_refuse_change() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    RAISE EXCEPTION '% of % is not possible: it is history', TG_OP, TG_ARGV[0]
        USING ERRCODE = '23T09', CONSTRAINT = TG_ARGV[0] || '_append_only', TABLE = TG_ARGV[0],
              HINT = 'History is only added to. Correct it by a new row, or delete the whole run.';
END $$;

COMMENT ON FUNCTION history_refuse_change IS
    'Trigger: append-only. Argument: the logical table name.';

CREATE TRIGGER strategy_run_z_refuse_truncate BEFORE TRUNCATE ON strategy_run
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('strategy_run');

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

CREATE FUNCTION engine_state_check_time() RETURNS trigger
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
    RETURN NEW;
END $$;

CREATE TRIGGER engine_state_a_guard_write BEFORE INSERT OR UPDATE ON engine_state
    FOR EACH ROW EXECUTE FUNCTION run_guard_write('engine_state');
CREATE TRIGGER engine_state_a_guard_delete BEFORE DELETE ON engine_state
    FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION run_guard_write('engine_state');
CREATE TRIGGER engine_state_b_check_time BEFORE INSERT OR UPDATE ON engine_state
    FOR EACH ROW WHEN (NEW.last_logical_time IS NOT NULL)
    EXECUTE FUNCTION engine_state_check_time();

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
    CONSTRAINT engine_status_error_has_time CHECK ((last_error IS NULL) = (error_at IS NULL))
) WITH (fillfactor = 50);

COMMENT ON TABLE engine_status IS 'How a run is doing; one row a run.';
COMMENT ON COLUMN engine_status.lag_seconds IS 'Wall clock less logical time at the last live tick.';

CREATE TRIGGER engine_status_a_guard_write BEFORE INSERT OR UPDATE ON engine_status
    FOR EACH ROW EXECUTE FUNCTION run_guard_write('engine_status');
CREATE TRIGGER engine_status_a_guard_delete BEFORE DELETE ON engine_status
    FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION run_guard_write('engine_status');
