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
