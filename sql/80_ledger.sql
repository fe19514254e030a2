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
    recorded_at  timestamptz NOT NULL,
    hash         bytea       NOT NULL,
    CONSTRAINT event_ledger_pkey PRIMARY KEY (user_id, run_id, seq),
    CONSTRAINT event_ledger_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT event_ledger_once_per_logical_time
        UNIQUE (user_id, run_id, logical_time, event_type, subject),
    CONSTRAINT event_ledger_seq_positive CHECK (seq > 0),
    -- What time_in_range says, without the call: a tick has three of these rows.
    CONSTRAINT event_ledger_logical_time_in_range
        CHECK (logical_time BETWEEN '0001-01-02 00:00Z' AND '9999-12-30 00:00Z'),
    CONSTRAINT event_ledger_subject_short CHECK (length(subject) <= 200),
    CONSTRAINT event_ledger_tick_has_no_subject CHECK (event_type <> 'TICK' OR subject = ''),
    CONSTRAINT event_ledger_event_type_format
        CHECK (event_type ~ '^[A-Z][A-Z0-9_]*$' AND length(event_type) <= 63),
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
    WHERE event_type IN ('EXECUTION', 'COMMISSION', 'SPLIT_APPLIED');

COMMENT ON TABLE event_ledger IS 'Everything that happened to a run; append-only, hash-chained.';
COMMENT ON COLUMN event_ledger.seq IS 'Position in the run''s chain: 1, 2, 3, ... without a gap.';
COMMENT ON COLUMN event_ledger.subject IS
    'What it is about: an order, an execution, a plan''s occasion; empty for the run itself.';
COMMENT ON COLUMN event_ledger.hash IS
    'sha256 of the previous row''s hash and this row (event_hash); the chain begins empty.';

-- Times as seconds since 1970 and everything else as canonical jsonb, so that neither a session's
-- time zone nor a separator inside a text can make two different rows hash alike. The array is put
-- together as text, just as jsonb would print it, which costs half.
CREATE FUNCTION event_hash(previous bytea, of_user uuid, of_run uuid, seq bigint,
                           logical_time timestamptz, event_type text, subject text,
                           payload jsonb, recorded_at timestamptz)
RETURNS bytea LANGUAGE sql STABLE
RETURN sha256(previous || convert_to(
    format('["%s", "%s", %s, %s, %s, %s, %s, %s]', of_user, of_run, seq,
           extract(epoch FROM logical_time), to_json(event_type), to_json(subject), payload,
           extract(epoch FROM recorded_at)), 'UTF8'));

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

COMMENT ON FUNCTION event_ledger_append IS
    'Trigger: numbers and chains an event, which may not be earlier than the one before it.';

-- What an order's events carry: all that was asked for, no surrogate ids.
CREATE FUNCTION orders_event_payload(o orders) RETURNS jsonb
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

COMMENT ON FUNCTION orders_event_payload IS 'What the event of an order''s placing says.';

-- The subject of an order's event is its id, of an execution's the order's id and its own.
CREATE FUNCTION event_order_id(subject text) RETURNS uuid
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN left(subject, 36) LIKE '________-____-____-____-____________'
             AND left(subject, 36) ~ '^[0-9a-f]+-[0-9a-f]+-[0-9a-f]+-[0-9a-f]+-[0-9a-f]+$'
             AND substr(subject, 37, 1) = ANY ('{"",/,@}')
            THEN left(subject, 36)::uuid END;

COMMENT ON FUNCTION event_order_id IS 'The order that an event''s subject names, or NULL.';

-- A broker may move an order more than once at one logical time: its version tells the moves apart.
CREATE FUNCTION orders_event_subject(o orders) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN o.broker = 'paper' THEN o.order_id::text
            ELSE o.order_id || '@' || o.version END;

COMMENT ON FUNCTION orders_event_subject IS 'What the event of an order''s move is about.';

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

-- An event with the time of its transaction claims to be complete: numbered and chained. Every
-- event is proven with its statement (books_follow in 82_books.sql), however it came.
CREATE TRIGGER event_ledger_a_append BEFORE INSERT ON event_ledger
    FOR EACH ROW WHEN (NEW.recorded_at IS DISTINCT FROM now())
    EXECUTE FUNCTION event_ledger_append();
CREATE CONSTRAINT TRIGGER event_ledger_m_check_end AFTER INSERT ON event_ledger
    DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.event_type = ANY ('{RUN_STOPPING,RUN_STOPPED,RUN_ERROR}'))
    EXECUTE FUNCTION event_ledger_check_end();
CREATE TRIGGER event_ledger_z_refuse_change BEFORE UPDATE OR DELETE ON event_ledger
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('event_ledger', 'append_only');
CREATE TRIGGER event_ledger_z_refuse_truncate BEFORE TRUNCATE ON event_ledger
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('event_ledger', 'append_only');

-- An order born FILLED has been told by who inserted it, with its execution; what was not told is
-- told here, and met by the gate on its way into the ledger.
CREATE FUNCTION orders_record_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    unfilled boolean;
    untold   boolean;
BEGIN
    -- A scalar subquery is looked up row by row; EXISTS might be hashed, over the whole ledger.
    SELECT bool_or(n.status = 'FILLED'
                   -- Whether they add up is asked where they are inserted (execution_apply).
                   AND (SELECT true FROM execution e
                        WHERE e.user_id = n.user_id AND e.run_id = n.run_id
                          AND e.order_id = n.order_id LIMIT 1) IS NULL),
           bool_or(n.status <> 'FILLED'
                   OR (SELECT true FROM event_ledger l
                       WHERE l.user_id = n.user_id AND l.run_id = n.run_id
                         AND l.logical_time = n.logical_time AND l.event_type = 'ORDER_PLACED'
                         AND l.subject = n.order_id::text) IS NULL)
    INTO unfilled, untold FROM new_rows n;
    IF unfilled THEN
        RAISE EXCEPTION 'an order''s filled quantity follows from its executions'
            USING ERRCODE = '23T04', CONSTRAINT = 'orders_filled_from_executions',
                  TABLE = 'orders', COLUMN = 'filled_quantity',
                  HINT = 'Insert executions; the database sums them.';
    END IF;
    -- A statement that writes nothing would cost as much as one that does.
    IF untold THEN
        INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
        SELECT o.user_id, o.run_id, o.logical_time,
               CASE WHEN o.status = 'REJECTED' THEN 'ORDER_REJECTED' ELSE 'ORDER_PLACED' END,
               o.order_id, orders_event_payload(o)
        FROM new_rows o
        WHERE o.status <> 'FILLED'
           OR (SELECT true FROM event_ledger l
               WHERE l.user_id = o.user_id AND l.run_id = o.run_id
                 AND l.logical_time = o.logical_time AND l.event_type = 'ORDER_PLACED'
                 AND l.subject = o.order_id::text) IS NULL;
    END IF;
    RETURN NULL;
END $$;

COMMENT ON FUNCTION orders_record_insert IS 'Trigger: tells the ledger of orders placed.';

-- Moves by a fill are told by the execution's own event, but not that all of them were taken back.
CREATE FUNCTION orders_record_move() RETURNS trigger
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

COMMENT ON FUNCTION orders_record_move IS 'Trigger: tells the ledger of moves that no fill made.';

CREATE TRIGGER orders_m_record_insert AFTER INSERT ON orders
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT WHEN (current_user <> 'oms_keeper')
    EXECUTE FUNCTION orders_record_insert();
CREATE TRIGGER orders_m_record_move AFTER UPDATE ON orders
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION orders_record_move();
