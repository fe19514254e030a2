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
    CONSTRAINT broker_command_withdrawn_unclaimed
        CHECK (outcome IS DISTINCT FROM 'WITHDRAWN' OR claimed_by IS NULL),
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
