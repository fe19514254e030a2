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
