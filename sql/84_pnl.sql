-- Profit and loss: what executions opened, matched with what closed it. Two methods: first in,
-- first out, where each execution opens a lot of its own; and average cost, where one lot takes up
-- all. Both give the same sum of realised and unrealised.

-- What a broker took back never was: the pair is left out, as long as both sides of it count in
-- the same units. Behind a split that came in between, the taking back is a trade like any other.
CREATE FUNCTION ledger_standing(of_user uuid, of_run uuid, of_symbol text DEFAULT NULL,
                                upto_seq bigint DEFAULT 9223372036854775807)
RETURNS TABLE (event event_ledger, splits_so_far bigint)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT s.event, s.splits_so_far
    FROM (SELECT t.event, t.symbol, t.splits_so_far,
                 count(*) OVER (PARTITION BY t.symbol, t.splits_so_far, (t.event).event_type,
                     coalesce((t.event).payload ->> 'reverses', substr((t.event).subject, 38))) = 1
                     AS stands
          FROM (SELECT l AS event, l.payload ->> 'symbol' AS symbol,
                       count(*) FILTER (WHERE l.event_type = 'SPLIT_APPLIED')
                           OVER (PARTITION BY l.payload ->> 'symbol' ORDER BY l.seq)
                           AS splits_so_far
                FROM event_ledger l
                WHERE l.user_id = of_user AND l.run_id = of_run AND l.seq <= upto_seq
                  AND l.event_type IN ('EXECUTION', 'SPLIT_APPLIED')
                  AND (l.payload ->> 'symbol' = of_symbol OR of_symbol IS NULL)) t) s
    WHERE s.stands
    ORDER BY s.symbol, (s.event).seq
$$;

COMMENT ON FUNCTION ledger_standing IS
    'The events that make a run''s positions, of one symbol or all, without what was taken back.';

-- One step of the fold of 82_books.sql for runs at brokers, where executions are taken back: what
-- such a one had done to cost and profit is undone, its price is no news of the market.
CREATE FUNCTION position_after_told(p public.position, event event_ledger) RETURNS public.position
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    told     public.position := position_after_event(p, event);
    standing public.position;
    e        event_ledger;
BEGIN
    IF event.payload ->> 'reverses' IS NULL THEN
        RETURN told;
    END IF;
    FOR e IN SELECT (s.event).* FROM ledger_standing(event.user_id, event.run_id, p.symbol,
                                                     event.seq) s
    LOOP
        standing := position_after_event(standing, e);
    END LOOP;
    told.cost_basis := coalesce(standing.cost_basis, 0);
    told.realized_pnl := coalesce(standing.realized_pnl, 0);
    told.mark_price := p.mark_price;
    told.marked_at := p.marked_at;
    RETURN told;
END $$;

COMMENT ON FUNCTION position_after_told IS
    'A position after an event of its symbol; an execution that is taken back never was.';

-- Of several that are taken back at once the last one tells of all.
CREATE FUNCTION position_after_news(p public.position, of_user uuid, of_run uuid, of_symbol text,
                                    books_seq bigint)
RETURNS public.position
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    news record;
    next public.position;
BEGIN
    FOR news IN SELECT l AS event, l.payload ->> 'reverses' IS NOT NULL AS reverses,
                       max(l.seq) FILTER (WHERE l.payload ->> 'reverses' IS NOT NULL) OVER ()
                           AS last_reversal
                FROM event_ledger l
                WHERE l.user_id = of_user AND l.run_id = of_run
                  AND l.seq > position_after_news.books_seq
                  AND l.event_type IN ('EXECUTION', 'SPLIT_APPLIED')
                  AND l.payload ->> 'symbol' = of_symbol
                ORDER BY l.seq
    LOOP
        IF news.reverses AND (news.event).seq < news.last_reversal THEN
            next := position_after_event(p, news.event);
            next.mark_price := p.mark_price;
            next.marked_at := p.marked_at;
            p := next;
        ELSE
            p := position_after_told(p, news.event);
        END IF;
    END LOOP;
    RETURN p;
END $$;

COMMENT ON FUNCTION position_after_news IS
    'What the ledger makes of a position of a run at a broker: what was taken back never was.';

-- The executions that stand, in the order in which profits are reckoned: by the broker's time,
-- whatever our clock said and whenever the news came. A split is where units change, so what the
-- ledger tells before it stays before it.
CREATE FUNCTION pnl_steps(of_user uuid, of_run uuid, of_symbol text)
RETURNS TABLE (execution_id text, event_at timestamptz, delta numeric, price numeric,
               numerator numeric, denominator numeric, quantity_after numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT s.execution_id, s.event_at, s.delta, s.price, s.numerator, s.denominator,
           s.quantity_after
    FROM (
        SELECT substr((l.event).subject, 38) AS execution_id,
               ((l.event).payload ->> 'event_at')::timestamptz AS event_at,
               ((l.event).payload ->> 'quantity')::numeric
               * CASE WHEN (l.event).payload ->> 'side' = 'BUY' THEN 1 ELSE -1 END AS delta,
               ((l.event).payload ->> 'price')::numeric AS price,
               ((l.event).payload ->> 'numerator')::numeric AS numerator,
               ((l.event).payload ->> 'denominator')::numeric AS denominator,
               ((l.event).payload ->> 'quantity_after')::numeric AS quantity_after,
               (l.event).seq, (l.event).event_type = 'SPLIT_APPLIED' AS is_split, l.splits_so_far
        FROM ledger_standing(of_user, of_run, of_symbol) l) s
    ORDER BY s.splits_so_far, s.is_split DESC, s.event_at, s.seq
$$;

COMMENT ON FUNCTION pnl_steps IS
    'A run''s executions of a symbol that stand, and its splits, by the broker''s time.';

-- One row a match of an opening with a closing, and one for each lot that is still open, whose
-- closing is NULL. Quantities are signed: negative where a short position was held. A cost is cut
-- to 12 decimals where a share of it has no end, and what closes a lot takes all that is left.
CREATE FUNCTION pnl_matches(of_user uuid, of_run uuid, of_symbol text, method text)
RETURNS TABLE (opened_by text, opened_at timestamptz, closed_by text, closed_at timestamptz,
               quantity numeric, cost numeric, proceeds numeric)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    lot_by    text[] := '{}';        -- the lots: parallel arrays, those before first are closed
    lot_at    timestamptz[] := '{}';
    lot_units numeric[] := '{}';
    lot_cost  numeric[] := '{}';
    first     integer := 1;
    last      integer := 0;
    step      record;
    remaining numeric;
    a         record;
    closing   numeric;
BEGIN
    FOR step IN SELECT * FROM pnl_steps(of_user, of_run, of_symbol) LOOP
        IF step.numerator IS NOT NULL THEN
            -- Each lot in new units; what is cut from the position is cut from the last one.
            remaining := step.quantity_after;
            FOR i IN first .. last LOOP
                lot_units[i] := CASE WHEN i = last THEN remaining
                                     ELSE trunc(lot_units[i] * step.numerator / step.denominator, 8)
                                END;
                remaining := remaining - lot_units[i];
            END LOOP;
            CONTINUE;
        END IF;
        remaining := step.delta;
        WHILE remaining <> 0 AND first <= last AND lot_units[first] * remaining < 0 LOOP
            closing := sign(remaining) * least(abs(remaining), abs(lot_units[first]));
            a := position_after(lot_units[first], lot_cost[first], closing, step.price);
            opened_by := lot_by[first];
            opened_at := lot_at[first];
            closed_by := step.execution_id;
            closed_at := step.event_at;
            quantity := -closing;
            cost := lot_cost[first] - a.cost_after;
            proceeds := quantity * step.price;
            RETURN NEXT;
            lot_units[first] := a.quantity_after;
            lot_cost[first] := a.cost_after;
            IF a.quantity_after = 0 THEN
                first := first + 1;
            END IF;
            remaining := remaining - closing;
        END LOOP;
        IF remaining <> 0 AND method = 'AVERAGE' AND first <= last THEN
            lot_units[first] := lot_units[first] + remaining;
            lot_cost[first] := lot_cost[first] + remaining * step.price;
        ELSIF remaining <> 0 THEN
            last := last + 1;
            lot_by[last] := step.execution_id;
            lot_at[last] := step.event_at;
            lot_units[last] := remaining;
            lot_cost[last] := remaining * step.price;
        END IF;
    END LOOP;
    closed_by := NULL;
    closed_at := NULL;
    proceeds := NULL;
    FOR i IN first .. last LOOP
        opened_by := lot_by[i];
        opened_at := lot_at[i];
        quantity := lot_units[i];
        cost := lot_cost[i];
        RETURN NEXT;
    END LOOP;
END $$;

COMMENT ON FUNCTION pnl_matches IS
    'What closed which opening of a symbol, by FIFO or AVERAGE; profit is proceeds - cost.';

CREATE FUNCTION position_lots(of_user uuid, of_run uuid, of_symbol text)
RETURNS TABLE (opened_by text, opened_at timestamptz, quantity numeric, cost numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT m.opened_by, m.opened_at, m.quantity, m.cost
    FROM pnl_matches(of_user, of_run, of_symbol, 'FIFO') m
    WHERE m.closed_by IS NULL
    ORDER BY m.opened_at, m.opened_by
$$;

COMMENT ON FUNCTION position_lots IS
    'The open lots of a symbol, first in first out; negative quantities are short.';

-- What brokers took for a run's executions of a symbol, in the run's currency, by their time.
CREATE VIEW execution_cost AS
    SELECT e.user_id, e.run_id, e.symbol, e.execution_id, e.event_at, e.commission AS cost
    FROM execution e WHERE e.commission <> 0
    UNION ALL
    SELECT c.user_id, c.run_id, e.symbol, c.execution_id, c.event_at, c.cost
    FROM execution_commission c
    JOIN execution e ON e.user_id = c.user_id AND e.run_id = c.run_id
                    AND e.execution_id = c.execution_id;

COMMENT ON VIEW execution_cost IS
    'Commissions in the run''s currency, each at the rate of its own time.';

CREATE VIEW position_pnl AS
    SELECT p.user_id, p.run_id, p.symbol, r.pnl_method, r.currency, p.quantity,
           m.cost AS cost_basis,
           CASE WHEN p.quantity <> 0 THEN round(m.cost / p.quantity, 10) END AS avg_cost,
           p.mark_price, p.marked_at, m.realized AS realized_pnl,
           CASE WHEN p.quantity = 0 THEN 0 ELSE p.quantity * p.mark_price - m.cost END
               AS unrealized_pnl,
           c.cost AS commission,
           m.realized + CASE WHEN p.quantity = 0 THEN 0
                             ELSE p.quantity * p.mark_price - m.cost END - c.cost AS total_pnl
    FROM position p
    JOIN strategy_run r ON r.user_id = p.user_id AND r.run_id = p.run_id
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(m.cost) FILTER (WHERE m.closed_by IS NULL), 0) AS cost,
               coalesce(sum(m.proceeds - m.cost), 0) AS realized
        FROM pnl_matches(p.user_id, p.run_id, p.symbol, r.pnl_method) m) m
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(c.cost), 0) AS cost FROM execution_cost c
        WHERE c.user_id = p.user_id AND c.run_id = p.run_id AND c.symbol = p.symbol) c;

COMMENT ON VIEW position_pnl IS
    'Profit of each position by its run''s method, in its run''s currency; commission apart, and '
    'taken from total_pnl.';

-- The day of a moment is its session's in the run's calendar: what fills after the close is still
-- that day's. Where the calendar says nothing it is the day in UTC.
CREATE FUNCTION run_session_date(of_calendar text, moment timestamptz) RETURNS date
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT coalesce((calendar_session_at(of_calendar, moment)).session_date,
                    (moment AT TIME ZONE 'UTC')::date)
$$;

COMMENT ON FUNCTION run_session_date IS 'The session to which a moment belongs.';

CREATE VIEW pnl_daily AS
    WITH told AS (
        SELECT r.user_id, r.run_id, run_session_date(r.calendar, m.closed_at) AS session_date,
               m.proceeds - m.cost AS realized, 0 AS commission
        FROM strategy_run r
        JOIN position p ON p.user_id = r.user_id AND p.run_id = r.run_id
        CROSS JOIN LATERAL pnl_matches(r.user_id, r.run_id, p.symbol, r.pnl_method) m
        WHERE m.closed_by IS NOT NULL
        UNION ALL
        SELECT r.user_id, r.run_id, run_session_date(r.calendar, c.event_at), 0, c.cost
        FROM strategy_run r
        JOIN execution_cost c ON c.user_id = r.user_id AND c.run_id = r.run_id
    ), marked AS (
        SELECT DISTINCT ON (r.user_id, r.run_id, run_session_date(r.calendar, m.logical_time))
               r.user_id, r.run_id, run_session_date(r.calendar, m.logical_time) AS session_date,
               m.equity
        FROM strategy_run r
        JOIN mtm_ledger m ON m.user_id = r.user_id AND m.run_id = r.run_id
        ORDER BY r.user_id, r.run_id, run_session_date(r.calendar, m.logical_time),
                 m.logical_time DESC
    )
    SELECT r.user_id, r.run_id, d.session_date, r.currency, coalesce(t.realized, 0) AS realized_pnl,
           coalesce(t.commission, 0) AS commission, d.equity,
           d.equity - coalesce(d.equity_before, r.initial_cash) AS total_pnl
    FROM (SELECT user_id, run_id, session_date, k.equity,
                 lag(k.equity) OVER (PARTITION BY user_id, run_id, k.equity IS NULL
                                     ORDER BY session_date) AS equity_before
          FROM (SELECT user_id, run_id, session_date FROM told
                UNION SELECT user_id, run_id, session_date FROM marked) days
          LEFT JOIN marked k USING (user_id, run_id, session_date)) d
    JOIN strategy_run r ON r.user_id = d.user_id AND r.run_id = d.run_id
    LEFT JOIN (SELECT user_id, run_id, session_date, sum(realized) AS realized,
                      sum(commission) AS commission
               FROM told GROUP BY user_id, run_id, session_date) t
        ON t.user_id = d.user_id AND t.run_id = d.run_id AND t.session_date = d.session_date;

COMMENT ON VIEW pnl_daily IS
    'What each session realised and cost by the broker''s time, and what the run was worth at its '
    'last mark: total_pnl is the change of equity since the session marked before.';
