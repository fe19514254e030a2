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
