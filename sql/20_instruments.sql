-- What is traded, when its exchange is open, what it cost and how it was split. Lookup tables:
-- small or append-mostly, without triggers, pointing at no user's table.

CREATE TABLE instrument (
    symbol                 text    NOT NULL,
    name                   text,
    currency               text    NOT NULL DEFAULT 'USD',
    quantity_decimals      integer NOT NULL DEFAULT 6,
    negative_price_allowed boolean NOT NULL DEFAULT false,
    CONSTRAINT instrument_pkey PRIMARY KEY (symbol),
    CONSTRAINT instrument_symbol_format
        CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]*$' AND length(symbol) <= 32),
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
