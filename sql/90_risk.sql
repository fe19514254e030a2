-- Risk: limits are rows, per user, run, account or symbol, and decided here when an order arrives,
-- so that an order from psql meets them too. A refusal is stored on the order: source, code, limit
-- and value. What only shrinks a position always passes those limits that exist to keep positions
-- and losses small.

CREATE TABLE limit_kind (
    kind        text     NOT NULL,
    place       integer NOT NULL,
    code        text     NOT NULL,
    source      text     NOT NULL,
    log_code    text     NOT NULL,
    unit        text     NOT NULL,
    lets_shrink boolean  NOT NULL,
    why         text     NOT NULL,
    looks_back  boolean  NOT NULL,
    CONSTRAINT limit_kind_pkey PRIMARY KEY (kind),
    CONSTRAINT limit_kind_place_once UNIQUE (place)
);

COMMENT ON TABLE limit_kind IS 'The kinds of limits, and what an order is told that breaks one.';
COMMENT ON COLUMN limit_kind.place IS 'Of several broken limits the first in this order is told.';
COMMENT ON COLUMN limit_kind.code IS 'The reject_code of an order that breaks it.';
COMMENT ON COLUMN limit_kind.log_code IS 'The event of the log line and of alerts.';
COMMENT ON COLUMN limit_kind.unit IS 'What limit_value counts; empty where there is none.';
COMMENT ON COLUMN limit_kind.lets_shrink IS
    'Whether what only shrinks a position passes although the limit is broken.';
COMMENT ON COLUMN limit_kind.looks_back IS
    'Whether it is held against what the run''s last orders and marks have written.';

INSERT INTO limit_kind
    (kind, place, code, source, log_code, unit, lets_shrink, why, looks_back) VALUES
    ('RESTRICTED_SYMBOL', 1, 'RESTRICTED_SYMBOL', 'COMPLIANCE', 'RESTRICTED_SYMBOL', '', false,
     'Nothing of the symbol is traded from valid_from to valid_to.', false),
    ('TRADING_HOURS', 2, 'MARKET_CLOSED', 'COMPLIANCE', 'MARKET_CLOSED', '', false,
     'Orders only while the exchange, or the account, is open; MARKET_HOLIDAY on a day without.',
     false),
    ('WASH_TRADE', 3, 'WASH_TRADE', 'COMPLIANCE', 'WASH_TRADE', '', false,
     'No order that would trade with an open one of the same user.', false),
    ('FORBIDDEN_SYMBOL', 4, 'FORBIDDEN_SYMBOL', 'RISK', 'FORBIDDEN_SYMBOL', '', false,
     'Nothing of the symbol is traded.', false),
    ('ALLOWED_SYMBOL', 5, 'SYMBOL_NOT_ALLOWED', 'RISK', 'SYMBOL_NOT_ALLOWED', '', false,
     'Only symbols with such a row are traded.', false),
    ('DUPLICATE_INTENT', 6, 'DUPLICATE_INTENT', 'RISK', 'DUPLICATE_INTENT', 'seconds', false,
     'Not the same order twice within so many seconds.', true),
    ('ORDER_RATE_MAX', 7, 'ORDER_RATE_MAX', 'RISK', 'ORDER_RATE_MAX', 'orders', false,
     'So many orders in any window of the given seconds.', true),
    ('OPEN_ORDERS_MAX', 8, 'OPEN_ORDERS_MAX', 'RISK', 'OPEN_ORDERS_MAX', 'orders', false,
     'So many orders open at a time.', false),
    ('MAX_ORDER_NOTIONAL', 9, 'MAX_ORDER_NOTIONAL', 'RISK', 'MAX_ORDER_NOTIONAL', 'currency',
     false, 'So much money in one order.', false),
    ('MAX_ORDER_QUANTITY', 10, 'MAX_ORDER_QUANTITY', 'RISK', 'MAX_ORDER_QUANTITY', 'units', false,
     'So many units in one order.', false),
    ('MAX_POSITION', 11, 'MAX_POSITION', 'RISK', 'POSITION_LIMIT', 'units', true,
     'So many units held, long or short, if all open orders of the side fill.', false),
    ('PRICE_COLLAR', 12, 'PRICE_COLLAR', 'RISK', 'PRICE_COLLAR', 'percent', false,
     'A limit or stop price at most so far from the last known price.', true),
    ('GROSS_EXPOSURE_MAX', 13, 'GROSS_EXPOSURE_MAX', 'RISK', 'GROSS_EXPOSURE_MAX', 'currency',
     true, 'So much money in positions, long and short added, if open orders fill.', false),
    ('NET_EXPOSURE_MAX', 14, 'NET_EXPOSURE_MAX', 'RISK', 'NET_EXPOSURE_MAX', 'currency', true,
     'So much money in positions, long less short, if open orders of a side fill.', false),
    ('CONCENTRATION_MAX', 15, 'CONCENTRATION_MAX', 'RISK', 'CONCENTRATION_MAX', 'percent', true,
     'So much of the equity in one symbol.', false),
    ('LEVERAGE_MAX', 16, 'LEVERAGE_MAX', 'RISK', 'LEVERAGE_MAX', 'times equity', true,
     'Gross exposure at most so many times the equity.', false),
    ('DAILY_LOSS_MAX', 17, 'DAILY_LOSS_MAX', 'RISK', 'DAILY_LOSS_MAX', 'currency', true,
     'Nothing new once so much is lost since the last mark of the previous session.', true),
    ('DRAWDOWN_MAX', 18, 'DRAWDOWN_MAX', 'RISK', 'DRAWDOWN_MAX', 'percent', true,
     'Nothing new once equity is so far below its highest mark.', true);

CREATE TABLE risk_limit (
    user_id     uuid        NOT NULL,
    limit_id    uuid        NOT NULL DEFAULT gen_random_uuid(),
    run_id      uuid,
    account     text,
    kind        text        NOT NULL,
    symbol      text,
    limit_value numeric,
    seconds     numeric,
    valid_from  date,
    valid_to    date,
    created_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT risk_limit_pkey PRIMARY KEY (user_id, limit_id),
    CONSTRAINT risk_limit_belongs_to_user
        FOREIGN KEY (user_id) REFERENCES app_user (user_id) ON DELETE CASCADE,
    CONSTRAINT risk_limit_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT risk_limit_of_account FOREIGN KEY (user_id, account)
        REFERENCES broker_account (user_id, account) ON DELETE CASCADE,
    CONSTRAINT risk_limit_kind_known FOREIGN KEY (kind) REFERENCES limit_kind (kind),
    CONSTRAINT risk_limit_has_what_its_kind_needs CHECK (
        CASE WHEN kind IN ('FORBIDDEN_SYMBOL', 'ALLOWED_SYMBOL', 'RESTRICTED_SYMBOL')
             THEN symbol IS NOT NULL AND limit_value IS NULL
             WHEN kind IN ('WASH_TRADE', 'TRADING_HOURS') THEN limit_value IS NULL
             ELSE limit_value >= 0 AND limit_value < 1e20 AND limit_value IS NOT NULL END),
    CONSTRAINT risk_limit_window_in_range CHECK (
        CASE WHEN kind = 'ORDER_RATE_MAX'
             THEN seconds > 0 AND seconds <= 86400 AND seconds IS NOT NULL
             WHEN kind = 'DUPLICATE_INTENT' THEN seconds IS NULL AND limit_value <= 86400
             ELSE seconds IS NULL END),
    CONSTRAINT risk_limit_days_in_range CHECK (
        CASE WHEN kind = 'RESTRICTED_SYMBOL' THEN coalesce(valid_from <= valid_to, true)
             ELSE num_nonnulls(valid_from, valid_to) = 0 END),
    CONSTRAINT risk_limit_symbol_format
        CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]*$' AND length(symbol) <= 32)
);

COMMENT ON TABLE risk_limit IS
    'Limits that every order of a user, of one run, or for one account, must meet.';
COMMENT ON COLUMN risk_limit.run_id IS 'The run that it holds for; NULL: all runs of the user.';
COMMENT ON COLUMN risk_limit.account IS
    'The account whose orders it holds for; NULL: orders for any account, and on paper.';
COMMENT ON COLUMN risk_limit.symbol IS 'The symbol that it holds for; NULL: every symbol.';
COMMENT ON COLUMN risk_limit.limit_value IS 'In the unit that limit_kind names.';
COMMENT ON COLUMN risk_limit.seconds IS 'ORDER_RATE_MAX: the window in which orders are counted.';
COMMENT ON COLUMN risk_limit.valid_from IS
    'RESTRICTED_SYMBOL: first day (UTC) on which it holds; NULL: always did.';
COMMENT ON COLUMN risk_limit.valid_to IS
    'RESTRICTED_SYMBOL: last day (UTC) on which it holds; NULL: no end.';

-- The limits that hold for a run are looked up by its user.
CREATE INDEX risk_limit_run_idx ON risk_limit (user_id, run_id, kind);

-- What a user has sent to brokers of late. Paper orders cost it nothing: they are found by the
-- ledger's own key.
CREATE INDEX orders_recent_idx ON orders (user_id, recorded_at) WHERE broker <> 'paper';

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
        IF NEW.kind = 'ORDER_RATE_MAX' THEN
            NEW.seconds := coalesce(NEW.seconds, 1);
        END IF;
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

-- On which clock an order's windows, days and hours are counted: a replay's is the run's own, so
-- that the same feed gives the same rows; at a broker it is the wall's.
CREATE FUNCTION orders_moment(o orders) RETURNS timestamptz
LANGUAGE sql STABLE
RETURN CASE WHEN o.broker = 'paper' THEN o.logical_time ELSE now() END;

COMMENT ON FUNCTION orders_moment IS 'The moment at which limits look at an order.';

-- What a symbol costs as far as anybody here knows, whatever the order itself says of it.
CREATE FUNCTION orders_market_price(o orders) RETURNS numeric
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT coalesce(
        (SELECT k.price
         FROM ((SELECT p.mark_price AS price, p.marked_at AS at FROM position p
                WHERE p.user_id = o.user_id AND p.run_id = o.run_id AND p.symbol = o.symbol
                  AND p.mark_price IS NOT NULL)
               UNION ALL
               (SELECT b.close, b.bar_end FROM price_bar b
                WHERE b.symbol = o.symbol AND b.bar_end <= orders_moment(o)
                ORDER BY b.bar_end DESC LIMIT 1)) k
         ORDER BY k.at DESC LIMIT 1),
        o.reference_price)
$$;

COMMENT ON FUNCTION orders_market_price IS
    'The newest of a run''s mark and the last imported close; else the order''s reference price.';

-- The user's orders of the last seconds that were not refused, without the order itself. Orders
-- for brokers have an index of their own; those of a paper run are found in its ledger, or, where
-- their statement has not told them yet, among the open ones.
CREATE FUNCTION orders_recent(o orders, seconds numeric) RETURNS SETOF orders
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    after timestamptz := orders_moment(o) - seconds * interval '1 second';
BEGIN
    IF o.broker <> 'paper' THEN
        RETURN QUERY SELECT * FROM orders w
            WHERE w.user_id = o.user_id AND w.broker <> 'paper' AND w.recorded_at > after
              AND w.reject_source IS DISTINCT FROM 'VALIDATION'
              AND w.reject_source IS DISTINCT FROM 'RISK'
              AND w.reject_source IS DISTINCT FROM 'COMPLIANCE'
              AND w.order_id <> o.order_id;
        RETURN;
    END IF;
    RETURN QUERY SELECT * FROM orders w
        WHERE w.user_id = o.user_id AND w.run_id = o.run_id AND w.order_id <> o.order_id
          AND w.order_id IN (
              SELECT event_order_id(l.subject) FROM event_ledger l
              WHERE l.user_id = o.user_id AND l.run_id = o.run_id
                AND l.event_type = 'ORDER_PLACED'
                AND l.logical_time > after AND l.logical_time <= o.logical_time
              UNION
              SELECT n.order_id FROM orders n
              WHERE n.user_id = o.user_id AND n.run_id = o.run_id
                AND n.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
                AND n.logical_time > after AND n.logical_time <= o.logical_time);
END $$;

COMMENT ON FUNCTION orders_recent IS
    'Orders that a user, or on paper the run, placed in the last seconds before an order.';

CREATE FUNCTION orders_in_scope(w orders, l risk_limit) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN (l.run_id IS NULL OR l.run_id = w.run_id)
   AND (l.account IS NULL OR l.account = w.account)
   AND (l.symbol IS NULL OR l.symbol = w.symbol);

COMMENT ON FUNCTION orders_in_scope IS
    'Whether a limit''s run, account and symbol are an order''s.';

-- What counts orders: how many there are with this one, or how long ago the same was asked for.
CREATE FUNCTION orders_measure_flow(o orders, l risk_limit) RETURNS numeric
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    IF l.kind = 'ORDER_RATE_MAX' THEN
        RETURN 1 + (SELECT count(*) FROM orders_recent(o, l.seconds) w WHERE orders_in_scope(w, l));
    ELSIF l.kind = 'OPEN_ORDERS_MAX' THEN
        RETURN 1 + (SELECT count(*) FROM orders w
                    WHERE w.user_id = o.user_id AND orders_in_scope(w, l)
                      AND w.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
                      AND w.order_id <> o.order_id);
    END IF;
    RETURN (SELECT min(CASE WHEN o.broker = 'paper'
                            THEN extract(epoch FROM o.logical_time - w.logical_time)
                            ELSE extract(epoch FROM now() - w.recorded_at) END)
            FROM orders_recent(o, l.limit_value) w
            WHERE orders_in_scope(w, l)
              AND (w.symbol, w.side, w.quantity, w.order_type) =
                  (o.symbol, o.side, o.quantity, o.order_type)
              AND (w.limit_price, w.stop_price, w.trail_amount, w.trail_percent)
                  IS NOT DISTINCT FROM
                  (o.limit_price, o.stop_price, o.trail_amount, o.trail_percent));
END $$;

COMMENT ON FUNCTION orders_measure_flow IS
    'Orders in a limit''s window or open, with this one; or seconds since the same order.';

-- Whether an order would trade with an open one of the same user. A stop that was not reached yet
-- is in nobody's way.
CREATE FUNCTION orders_would_wash(o orders) RETURNS boolean
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT o.order_type IN ('MARKET', 'LIMIT') AND EXISTS (
        SELECT FROM strategy_run r
        JOIN orders w ON w.user_id = r.user_id AND w.run_id = r.run_id AND w.symbol = o.symbol
        WHERE r.user_id = o.user_id AND (r.broker = 'paper') = (o.broker = 'paper')
          AND w.side <> o.side AND w.order_id <> o.order_id
          AND w.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
          AND (w.order_type IN ('MARKET', 'LIMIT') OR w.triggered_at IS NOT NULL)
          AND coalesce(CASE WHEN o.side = 'BUY' THEN w.limit_price <= o.limit_price
                            ELSE w.limit_price >= o.limit_price END, true))
$$;

COMMENT ON FUNCTION orders_would_wash IS
    'Whether an order crosses an open one of the same user, in any run or account.';

-- MARKET_HOLIDAY on a day without a session, MARKET_CLOSED outside of one, NULL inside. A moment
-- at which no session is known is closed: hours that can't be shown to be kept are not.
CREATE FUNCTION orders_hours_code(o orders) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    at    timestamptz := orders_moment(o);
    place text;
    day   record;
BEGIN
    SELECT coalesce((SELECT CASE WHEN a.opens_at IS NULL THEN a.calendar ELSE '' END
                     FROM broker_account a
                     WHERE a.user_id = o.user_id AND a.account = o.account), r.calendar)
    INTO place FROM strategy_run r WHERE r.user_id = o.user_id AND r.run_id = o.run_id;
    IF place = '' THEN
        RETURN CASE WHEN NOT (account_hours(o.user_id, o.account, at)).is_open
                    THEN 'MARKET_CLOSED' END;
    END IF;
    SELECT bool_or(at BETWEEN s.open_at AND s.close_at) AS is_open,
           bool_or((s.open_at AT TIME ZONE 'UTC')::date = (at AT TIME ZONE 'UTC')::date
                   OR (s.close_at AT TIME ZONE 'UTC')::date = (at AT TIME ZONE 'UTC')::date)
               AS has_session
    INTO day FROM calendar_session s
    WHERE s.calendar = place
      AND s.session_date BETWEEN (at AT TIME ZONE 'UTC')::date - 1
                             AND (at AT TIME ZONE 'UTC')::date + 1;
    RETURN CASE WHEN day.is_open THEN NULL
                WHEN day.has_session THEN 'MARKET_CLOSED'
                ELSE 'MARKET_HOLIDAY' END;
END $$;

COMMENT ON FUNCTION orders_hours_code IS
    'MARKET_CLOSED or MARKET_HOLIDAY where an order comes outside of trading hours, or NULL.';

-- What a run would have in the market if its open orders, and one more, all filled: of each symbol
-- the worse of both sides. A symbol that nothing values makes all of it unknown (NULL).
CREATE FUNCTION run_exposure(o orders, order_price numeric, symbols text[], held numeric[],
                             marks numeric[],
                             OUT gross numeric, OUT net numeric, OUT own numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    WITH open AS (
        SELECT w.symbol, w.side, (w.quantity - w.filled_quantity)
               * abs(coalesce(w.limit_price, w.stop_price, w.reference_price)) AS value
        FROM orders w
        WHERE w.user_id = o.user_id AND w.run_id = o.run_id AND w.order_id <> o.order_id
          AND w.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
        UNION ALL
        SELECT o.symbol, o.side, o.quantity * abs(order_price)
    ), each AS (
        SELECT v.symbol, sum(v.held + v.buys) AS bought, sum(v.held - v.sells) AS sold,
               bool_and(v.held + v.buys + v.sells IS NOT NULL) AS known
        FROM (SELECT h.symbol, CASE WHEN h.units = 0 THEN 0 ELSE h.units * h.mark END AS held,
                     0 AS buys, 0 AS sells
              FROM unnest(symbols, held, marks) h (symbol, units, mark)
              UNION ALL
              SELECT w.symbol, 0, CASE WHEN w.side = 'BUY' THEN w.value ELSE 0 END,
                     CASE WHEN w.side = 'SELL' THEN w.value ELSE 0 END
              FROM open w) v
        GROUP BY v.symbol
    )
    SELECT CASE WHEN bool_and(e.known) THEN sum(greatest(abs(e.bought), abs(e.sold))) END,
           CASE WHEN bool_and(e.known)
                THEN greatest(abs(sum(e.bought)), abs(sum(e.sold))) END,
           sum(greatest(abs(e.bought), abs(e.sold)))
               FILTER (WHERE e.symbol = o.symbol AND e.known)
    FROM each e
$$;

COMMENT ON FUNCTION run_exposure IS
    'Gross and net exposure of a run, and that in an order''s symbol, in currency, at worst.';

-- What a limit of exposure or loss is held against.
CREATE FUNCTION orders_measure_books(o orders, l risk_limit, price numeric, cash numeric,
                                     symbols text[], held numeric[], marks numeric[])
RETURNS numeric LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    equity  numeric;
    highest numeric;
    worst   record;
BEGIN
    SELECT orders_measure_books.cash
           + coalesce(sum(CASE WHEN h.units = 0 THEN 0 ELSE h.units * h.mark END), 0)
    INTO equity FROM unnest(symbols, held, marks) h (symbol, units, mark);
    IF l.kind = 'DAILY_LOSS_MAX' THEN
        RETURN run_equity_before(o.user_id, o.run_id, orders_moment(o)) - equity;
    ELSIF l.kind = 'DRAWDOWN_MAX' THEN
        highest := run_equity_peak(o.user_id, o.run_id, orders_moment(o));
        RETURN CASE WHEN highest > 0 THEN round((highest - equity) / highest * 100, 8) ELSE 0 END;
    END IF;
    worst := run_exposure(o, price, symbols, held, marks);
    RETURN CASE WHEN l.kind = 'GROSS_EXPOSURE_MAX' THEN worst.gross
                WHEN l.kind = 'NET_EXPOSURE_MAX' THEN worst.net
                WHEN equity <= 0 THEN NULL
                WHEN l.kind = 'CONCENTRATION_MAX' THEN round(worst.own / equity * 100, 8)
                WHEN l.kind = 'LEVERAGE_MAX' THEN round(worst.gross / equity, 8) END;
END $$;

COMMENT ON FUNCTION orders_measure_books IS
    'Exposure, concentration, leverage, loss or drawdown of a run with an order; NULL: unknown.';

-- What an order, its price and its position are held against.
CREATE FUNCTION orders_measure_order(o orders, l risk_limit, price numeric, exposure numeric)
RETURNS numeric LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    market numeric;
BEGIN
    IF l.kind = 'MAX_ORDER_QUANTITY' THEN
        RETURN o.quantity;
    ELSIF l.kind = 'MAX_ORDER_NOTIONAL' THEN
        RETURN o.quantity * abs(price);
    ELSIF l.kind = 'MAX_POSITION' THEN
        RETURN abs(exposure + CASE WHEN o.side = 'BUY' THEN o.quantity ELSE -o.quantity END);
    ELSIF coalesce(o.limit_price, o.stop_price) IS NULL THEN
        RETURN 0;  -- no price that could be wrong
    END IF;
    market := orders_market_price(o);
    RETURN (SELECT max(round(abs(asked - market) / nullif(abs(market), 0) * 100, 8))
            FROM unnest(ARRAY[o.limit_price, o.stop_price]) asked);
END $$;

COMMENT ON FUNCTION orders_measure_order IS
    'What a limit of an order''s size, position or price looks at; NULL: unknown.';

-- Whether a limit without a number is broken.
CREATE FUNCTION orders_breaks_rule(o orders, l risk_limit) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    today date := (orders_moment(o) AT TIME ZONE 'UTC')::date;
BEGIN
    RETURN CASE
        WHEN l.kind = 'RESTRICTED_SYMBOL'
        THEN l.symbol = o.symbol AND today >= coalesce(l.valid_from, '-infinity')
             AND today <= coalesce(l.valid_to, 'infinity')
        WHEN l.kind = 'FORBIDDEN_SYMBOL' THEN l.symbol = o.symbol
        WHEN l.kind = 'ALLOWED_SYMBOL'
        THEN l.symbol <> o.symbol AND NOT EXISTS (
            SELECT FROM risk_limit a
            WHERE a.user_id = o.user_id AND a.kind = 'ALLOWED_SYMBOL' AND a.symbol = o.symbol
              AND (a.run_id IS NULL OR a.run_id = o.run_id)
              AND (a.account IS NULL OR a.account = o.account))
        WHEN l.kind = 'WASH_TRADE'
        THEN coalesce(l.symbol = o.symbol, true) AND orders_would_wash(o)
        ELSE coalesce(l.symbol = o.symbol, true) AND orders_hours_code(o) IS NOT NULL END;
END $$;

COMMENT ON FUNCTION orders_breaks_rule IS
    'Whether an order breaks a limit of symbols, hours or wash trades.';

-- Whether an order does nothing but make a position smaller, whatever else of its side fills.
CREATE FUNCTION orders_only_shrinks(o orders, exposure numeric) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN o.side = 'SELL' THEN o.quantity <= exposure ELSE o.quantity <= -exposure END;

COMMENT ON FUNCTION orders_only_shrinks IS
    'Whether an order only makes a position smaller; exposure as orders_gate has it.';

-- The first limit that an order breaks, with the limit and the value, or no row. in_flight: of the
-- limits that fills can break, only.
CREATE FUNCTION orders_broken_limit(o orders, price numeric, exposure numeric, cash numeric,
                                    symbols text[], held numeric[], marks numeric[],
                                    in_flight boolean DEFAULT false)
RETURNS TABLE (code text, source text, limit_value numeric, value numeric)
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    shrinks boolean := orders_only_shrinks(o, exposure);
    it      record;
    rule    limit_kind;
    l       risk_limit;
BEGIN
    FOR it IN
        SELECT r AS lim, k AS rule FROM risk_limit r JOIN limit_kind k ON k.kind = r.kind
        WHERE r.user_id = o.user_id AND (r.run_id IS NULL OR r.run_id = o.run_id)
          AND (r.account IS NULL OR r.account = o.account)
          AND (r.symbol IS NULL OR r.symbol = o.symbol OR r.kind = 'ALLOWED_SYMBOL')
          AND (NOT in_flight OR k.lets_shrink)
        ORDER BY k.place, r.limit_value, r.limit_id
    LOOP
        l := it.lim;
        rule := it.rule;
        -- A safety order that only closes is not hindered by what is there to keep risk small.
        CONTINUE WHEN shrinks AND (rule.lets_shrink AND l.kind <> 'MAX_POSITION'
                                   OR o.purpose = 'FLATTEN' AND rule.source <> 'COMPLIANCE');
        code := rule.code;
        source := rule.source;
        limit_value := l.limit_value;
        value := NULL;
        IF l.limit_value IS NULL THEN
            CONTINUE WHEN NOT orders_breaks_rule(o, l);
            code := CASE WHEN l.kind = 'TRADING_HOURS' THEN orders_hours_code(o) ELSE code END;
        ELSIF l.kind = 'DUPLICATE_INTENT' THEN
            value := orders_measure_flow(o, l);
            CONTINUE WHEN value IS NULL OR value >= l.limit_value;
        ELSE
            value := CASE
                WHEN l.kind IN ('ORDER_RATE_MAX', 'OPEN_ORDERS_MAX') THEN orders_measure_flow(o, l)
                WHEN rule.lets_shrink AND l.kind <> 'MAX_POSITION'
                THEN orders_measure_books(o, l, price, cash, symbols, held, marks)
                ELSE orders_measure_order(o, l, price, exposure) END;
            -- What can't be valued can't be shown to be within a limit. Out of a position that is
            -- too large one may always get, but not out at the other side.
            CONTINUE WHEN value <= l.limit_value
                       OR l.kind = 'MAX_POSITION' AND value <= abs(exposure)
                          AND (exposure + CASE WHEN o.side = 'BUY' THEN o.quantity
                                               ELSE -o.quantity END) * exposure >= 0;
        END IF;
        RETURN NEXT;
        RETURN;
    END LOOP;
END $$;

COMMENT ON FUNCTION orders_broken_limit IS 'The first risk_limit that an order breaks, or no row.';

-- Whether the gate has to look further than at the order itself: few users have limits, and
-- nobody else pays for them.
CREATE FUNCTION user_is_limited(of_user uuid) RETURNS boolean
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT coalesce((SELECT true FROM risk_limit l WHERE l.user_id = of_user LIMIT 1),
                    (SELECT true FROM trading_halt h
                     WHERE h.user_id = of_user AND h.lifted_at IS NULL LIMIT 1),
                    (SELECT true FROM system_halt s WHERE s.lifted_at IS NULL LIMIT 1), false)
$$;

COMMENT ON FUNCTION user_is_limited IS 'Whether a user has limits or is under a halt.';

-- What halts and limits say. The books are given where they are not those of the tables yet.
CREATE FUNCTION orders_refusal(o orders, price numeric, exposure numeric, cash numeric,
                               symbols text[], held numeric[], marks numeric[],
                               OUT source text, OUT code text, OUT reason text)
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    broken record;
BEGIN
    SELECT h.code, h.reason INTO code, reason FROM orders_halted(o, exposure) h;
    IF code IS NOT NULL THEN
        source := 'RISK';
        RETURN;
    END IF;
    IF symbols IS NULL THEN
        SELECT r.cash, p.symbols, p.held, p.marks
        INTO orders_refusal.cash, orders_refusal.symbols, orders_refusal.held, orders_refusal.marks
        FROM strategy_run r
        CROSS JOIN LATERAL (
            SELECT array_agg(h.symbol) AS symbols, array_agg(h.quantity) AS held,
                   array_agg(h.mark_price) AS marks
            FROM position h WHERE h.user_id = r.user_id AND h.run_id = r.run_id) p
        WHERE r.user_id = o.user_id AND r.run_id = o.run_id;
    END IF;
    SELECT * INTO broken
    FROM orders_broken_limit(o, price, exposure, cash, symbols, held, marks);
    IF FOUND THEN
        source := broken.source;
        code := broken.code;
        reason := coalesce('limit ' || trim_scale(broken.limit_value) || ', would be '
                           || coalesce(trim_scale(broken.value)::text, 'unknown'), o.symbol);
    END IF;
END $$;

COMMENT ON FUNCTION orders_refusal IS 'Why a halt or a limit refuses an order, or NULLs.';

-- The gate: why an order may not be taken, given the cash and the holding that it meets.
CREATE FUNCTION orders_gate(o orders, account_type text, limited boolean, free_cash numeric,
                            exposure numeric, cash numeric DEFAULT NULL,
                            symbols text[] DEFAULT NULL, held numeric[] DEFAULT NULL,
                            marks numeric[] DEFAULT NULL,
                            OUT source text, OUT code text, OUT reason text)
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    price   numeric := coalesce(o.limit_price, o.stop_price, o.reference_price);
    refusal record;
BEGIN
    code := orders_validation_code(o);
    IF code IS NULL AND least(o.limit_price, o.stop_price, o.reference_price) <= 0 THEN
        code := orders_price_code(o);
    END IF;
    IF code IS NOT NULL THEN
        source := 'VALIDATION';
        RETURN;
    END IF;
    IF limited THEN
        refusal := orders_refusal(o, price, exposure, cash, symbols, held, marks);
        source := refusal.source;
        code := refusal.code;
        reason := refusal.reason;
    END IF;
    -- Nothing else opens the way that a safety order has past halts and limits.
    IF code IS NULL AND o.purpose = 'FLATTEN' AND orders_only_shrinks(o, exposure) IS NOT TRUE THEN
        code := 'FLATTEN_MUST_SHRINK';
        reason := format('holds %s, would %s %s', trim_scale(exposure), lower(o.side),
                         trim_scale(o.quantity));
    END IF;
    IF code IS NOT NULL OR account_type <> 'CASH' THEN
        NULL;
    ELSIF o.side = 'SELL' AND o.quantity > exposure THEN
        code := 'INSUFFICIENT_POSITION';
        reason := format('holds %s, would sell %s', trim_scale(exposure), trim_scale(o.quantity));
    ELSIF o.side = 'BUY' AND o.quantity * price > free_cash THEN
        code := 'INSUFFICIENT_CASH';
        reason := format('has %s, needs %s', trim_scale(free_cash),
                         trim_scale(o.quantity * price));
    END IF;
    IF code IS NOT NULL THEN
        source := coalesce(source, 'RISK');
        reason := code || ': ' || reason;
    END IF;
END $$;

COMMENT ON FUNCTION orders_gate IS
    'Why an order is refused, or NULLs: limited is whether its user has limits or is halted, '
    'free_cash what open orders leave, exposure the holding and open orders of its side; cash, '
    'symbols, held and marks are the books, NULL for those of the tables.';

CREATE FUNCTION orders_pass_gate() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run     record;
    held    numeric;
    limited boolean;
    refusal record;
BEGIN
    SELECT r.cash, r.account_type INTO run FROM strategy_run r
    WHERE r.user_id = NEW.user_id AND r.run_id = NEW.run_id;
    IF NEW.reference_price IS NULL AND orders_validation_code(NEW) IS NULL
       AND orders_price_code(NEW) IS NULL THEN
        NEW.reference_price := orders_known_price(NEW);
    END IF;
    SELECT p.quantity INTO held FROM position p
    WHERE p.user_id = NEW.user_id AND p.run_id = NEW.run_id AND p.symbol = NEW.symbol;
    limited := user_is_limited(NEW.user_id);
    -- Only the sums that the gate will ask for.
    refusal := orders_gate(
        NEW, run.account_type, limited,
        CASE WHEN run.account_type = 'CASH' AND NEW.side = 'BUY'
             THEN run.cash - run_reserved_cash(NEW.user_id, NEW.run_id) END,
        CASE WHEN limited OR NEW.purpose IS NOT NULL
                  OR run.account_type = 'CASH' AND NEW.side = 'SELL'
             THEN coalesce(held, 0) + orders_open_quantity(NEW) END);
    IF refusal.code IS NOT NULL THEN
        NEW.status := 'REJECTED';
        NEW.reject_source := refusal.source;
        NEW.reject_code := refusal.code;
        NEW.status_reason := coalesce(refusal.reason, NEW.status_reason);
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION orders_pass_gate IS
    'Trigger: decides when an order arrives; a refusal is stored as REJECTED.';

CREATE TRIGGER orders_b_pass_gate BEFORE INSERT ON orders
    FOR EACH ROW WHEN (NEW.status <> ALL ('{REJECTED,FILLED}') AND NOT NEW.recovered)
    EXECUTE FUNCTION orders_pass_gate();

-- What was refused, taken apart: the text on the order is the gate's own.
CREATE VIEW order_refusal AS
    SELECT o.user_id, o.run_id, o.order_id, o.logical_time, o.symbol, o.account, o.reject_source,
           o.reject_code,
           coalesce((SELECT k.log_code FROM limit_kind k WHERE k.code = o.reject_code),
                    o.reject_code) AS log_code,
           substring(o.status_reason FROM ': limit (\S+), would be')::numeric AS limit_value,
           substring(o.status_reason FROM ', would be (-?[0-9.]+)$')::numeric AS value
    FROM orders o
    WHERE o.status = 'REJECTED';

COMMENT ON VIEW order_refusal IS 'Orders that were refused: the code, the limit and the value.';

-- What fills have made of limits: the rest of an order that began to fill is cancelled where what
-- is held and still open breaks one.
CREATE FUNCTION inflight_breaches(of_user uuid, of_run uuid)
RETURNS TABLE (order_id uuid, code text, limit_value numeric, value numeric)
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    o     orders;
    books record;
    units numeric;
BEGIN
    IF NOT user_is_limited(of_user) THEN
        RETURN;
    END IF;
    SELECT r.cash, array_agg(h.symbol) AS symbols, array_agg(h.quantity) AS held,
           array_agg(h.mark_price) AS marks
    INTO books FROM strategy_run r
    LEFT JOIN position h ON h.user_id = r.user_id AND h.run_id = r.run_id
    WHERE r.user_id = of_user AND r.run_id = of_run GROUP BY r.cash;
    FOR o IN SELECT * FROM orders w
             WHERE w.user_id = of_user AND w.run_id = of_run
               AND w.status IN ('PARTIALLY_FILLED', 'PENDING_MODIFY') AND w.filled_quantity > 0
             ORDER BY w.order_id
    LOOP
        o.quantity := o.quantity - o.filled_quantity;
        o.filled_quantity := 0;
        units := coalesce(books.held[array_position(books.symbols, o.symbol)], 0)
               + orders_open_quantity(o)
               - CASE WHEN o.side = 'BUY' THEN o.quantity ELSE -o.quantity END;
        RETURN QUERY SELECT o.order_id, b.code, b.limit_value, b.value
            FROM orders_broken_limit(o, coalesce(o.limit_price, o.stop_price, o.reference_price),
                                     units, books.cash, books.symbols, books.held, books.marks,
                                     true) b;
    END LOOP;
END $$;

COMMENT ON FUNCTION inflight_breaches IS
    'Orders that began to fill and whose rest breaks a limit, with the limit and the value.';
