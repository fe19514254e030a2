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
    CONSTRAINT event_ledger_event_type_format CHECK (event_type ~ '^[A-Z][A-Z0-9_]{0,62}$'),
    CONSTRAINT event_ledger_payload_is_object CHECK (jsonb_typeof(payload) = 'object'),
    CONSTRAINT event_ledger_hash_is_sha256 CHECK (length(hash) = 32)
);

-- What a plan or a period may do once, at whatever logical time: this prevents a second purchase
-- of one SIP occurrence and a second rebalance of one period.
CREATE UNIQUE INDEX event_ledger_occasion_once ON event_ledger (user_id, run_id, subject)
    WHERE event_type IN ('SIP_EXECUTED', 'SIP_REJECTED', 'SIP_SKIPPED', 'REBALANCED');

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
RETURNS bytea LANGUAGE sql IMMUTABLE AS $$
    SELECT sha256(previous || convert_to(jsonb_build_array(
        of_user, of_run, seq, extract(epoch FROM logical_time), event_type, subject, payload,
        extract(epoch FROM recorded_at))::text, 'UTF8'))
$$;

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
    PERFORM run_lock_running(NEW.user_id, NEW.run_id, 'event_ledger');
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

CREATE TRIGGER event_ledger_a_append BEFORE INSERT ON event_ledger
    FOR EACH ROW EXECUTE FUNCTION event_ledger_append();
CREATE TRIGGER event_ledger_z_refuse_change BEFORE UPDATE OR DELETE ON event_ledger
    FOR EACH ROW WHEN (pg_trigger_depth() = 0)
    EXECUTE FUNCTION history_refuse_change('event_ledger');
CREATE TRIGGER event_ledger_z_refuse_truncate BEFORE TRUNCATE ON event_ledger
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('event_ledger');

-- What an order's events carry: all that was asked for, no surrogate ids.
CREATE FUNCTION orders_event_payload(o orders) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT jsonb_strip_nulls(jsonb_build_object(
        'symbol', o.symbol, 'side', o.side, 'quantity', o.quantity, 'order_type', o.order_type,
        'time_in_force', o.time_in_force, 'limit_price', o.limit_price,
        'stop_price', o.stop_price, 'trail_amount', o.trail_amount,
        'trail_percent', o.trail_percent, 'expire_at', o.expire_at,
        'reference_price', o.reference_price, 'client_order_id', o.client_order_id,
        'reject_source', o.reject_source, 'reject_code', o.reject_code,
        'status_reason', o.status_reason))
$$;

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
    WHERE n.status <> o.status AND n.status NOT IN ('FILLED', 'PARTIALLY_FILLED')
    ORDER BY n.order_id;
    RETURN NULL;
END $$;

CREATE TRIGGER orders_m_record_insert AFTER INSERT ON orders
    REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION orders_record_insert();
CREATE TRIGGER orders_m_record_move AFTER UPDATE ON orders
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION orders_record_move();
