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

CREATE FUNCTION strategy_run_words_are_short(name text, strategy text, calendar text)
RETURNS boolean LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN length(coalesce(name, '')) <= 100 AND length(strategy) <= 200
           AND length(calendar) <= 32;
END $$;

COMMENT ON FUNCTION strategy_run_words_are_short IS 'Whether a run''s words fit on a line.';

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
    pnl_method   text        NOT NULL DEFAULT 'AVERAGE',
    initial_cash numeric     NOT NULL DEFAULT 0,
    cash         numeric     NOT NULL,
    books_seq    bigint      NOT NULL DEFAULT 0,
    created_at   timestamptz NOT NULL DEFAULT now(),
    stopped_at   timestamptz,
    CONSTRAINT strategy_run_pkey PRIMARY KEY (user_id, run_id),
    CONSTRAINT strategy_run_belongs_to_user
        FOREIGN KEY (user_id) REFERENCES app_user (user_id) ON DELETE CASCADE,
    CONSTRAINT strategy_run_status_known FOREIGN KEY (status) REFERENCES run_status (status),
    CONSTRAINT strategy_run_account_type_known CHECK (account_type = ANY ('{CASH,MARGIN}')),
    CONSTRAINT strategy_run_tick_at_known CHECK (tick_at = ANY ('{OPEN,CLOSE}')),
    CONSTRAINT strategy_run_pnl_method_known CHECK (pnl_method = ANY ('{AVERAGE,FIFO}')),
    CONSTRAINT strategy_run_currency_format CHECK (currency ~ '^[A-Z]{3}$'),
    CONSTRAINT strategy_run_broker_format CHECK (broker ~ '^[a-z][a-z0-9_]{0,31}$'),
    CONSTRAINT strategy_run_words_short
        CHECK (strategy_run_words_are_short(name, strategy, calendar)),
    CONSTRAINT strategy_run_parameters_is_object CHECK (jsonb_typeof(parameters) = 'object'),
    CONSTRAINT strategy_run_paper_is_object CHECK (jsonb_typeof(paper) = 'object'),
    CONSTRAINT strategy_run_initial_cash_in_range
        CHECK (initial_cash >= 0 AND decimal_in_range(initial_cash, 1e18, 8)),
    CONSTRAINT strategy_run_cash_in_range
        CHECK (decimal_in_range(cash, 1e20, 16)),
    CONSTRAINT strategy_run_cash_not_negative_in_cash_account
        -- What a real broker did is so, whatever the account was; negative initial cash is refused
        -- above.
        CHECK (cash >= 0 OR account_type <> 'CASH' OR broker <> 'paper' OR initial_cash < 0),
    CONSTRAINT strategy_run_stopped_at_iff_over
        CHECK ((stopped_at IS NOT NULL) = (status = ANY ('{STOPPED,ERROR}')))
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
COMMENT ON COLUMN strategy_run.pnl_method IS
    'How profits are told: at AVERAGE cost, or first in first out (FIFO).';
COMMENT ON COLUMN strategy_run.cash IS
    'Initial cash and what the executions did to it; computed by the database, in currency.';
COMMENT ON COLUMN strategy_run.books_seq IS
    'Number of the last EXECUTION, COMMISSION or SPLIT_APPLIED event that the books follow.';

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

-- Where one write follows another all the time, a look at the row goes before: run_lock is then
-- called to say what is wrong.
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

COMMENT ON FUNCTION strategy_run_check_update IS
    'Trigger: an ended run stays as it is, terms are kept, cash is proven.';

-- What a run was made of is fixed; what its strategy works with is so from the first event on,
-- which tells it.
CREATE FUNCTION strategy_run_check_terms(was strategy_run, now_is strategy_run) RETURNS void
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

COMMENT ON FUNCTION strategy_run_check_terms IS 'Refuses a change of what a run was made of.';

-- A run that leaves RUNNING takes its open orders with it, whoever ends it: those in our own book
-- are cancelled, those at a broker are asked back, and the events written while the run still
-- counts as RUNNING, in the same statement. A run ends well only when its broker is done with it.
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

COMMENT ON FUNCTION strategy_run_check_move IS
    'Trigger: only moves of run_transition; the end cancels what is open and is told.';

CREATE TRIGGER strategy_run_a_prepare_insert BEFORE INSERT ON strategy_run
    FOR EACH ROW EXECUTE FUNCTION strategy_run_prepare_insert();
CREATE TRIGGER strategy_run_a_check_update BEFORE UPDATE ON strategy_run
    FOR EACH ROW WHEN (current_user <> 'oms_keeper') EXECUTE FUNCTION strategy_run_check_update();
CREATE TRIGGER strategy_run_b_check_move BEFORE UPDATE ON strategy_run
    FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status)
    EXECUTE FUNCTION strategy_run_check_move();

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

COMMENT ON FUNCTION engine_state_check_write IS
    'Trigger: no write unless the run is RUNNING; last_logical_time is the newest TICK event''s.';

CREATE TRIGGER engine_state_a_check_write BEFORE INSERT OR UPDATE ON engine_state
    FOR EACH ROW WHEN (current_user <> 'oms_keeper') EXECUTE FUNCTION engine_state_check_write();
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
    FOR EACH ROW WHEN (current_user <> 'oms_keeper')
    EXECUTE FUNCTION run_guard_write('engine_status');
CREATE TRIGGER engine_status_z_refuse_delete BEFORE DELETE ON engine_status
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('engine_status', 'kept');
CREATE TRIGGER engine_status_z_refuse_truncate BEFORE TRUNCATE ON engine_status
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('engine_status', 'kept');
