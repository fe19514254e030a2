-- How it is going: what is connected, what waits, how long brokers take to answer, and whether
-- what we hold is what they hold. Questions to rows that are there anyway.

-- Every word of a broker about an order that we sent, and how long after the sending we heard it.
CREATE VIEW order_response AS
    SELECT c.user_id, c.account, c.run_id, c.order_id, e.number, e.kind,
           e.payload ->> 'status' AS status, c.sent_at, e.received_at,
           round(extract(epoch FROM e.received_at - c.sent_at), 6) AS seconds
    FROM broker_command c
    JOIN broker_event e ON e.user_id = c.user_id AND e.account = c.account
                       AND e.order_ref = c.order_id::text AND e.received_at >= c.sent_at
    WHERE c.kind = 'SUBMIT' AND c.sent_at IS NOT NULL AND e.kind <> 'THROTTLED';

COMMENT ON VIEW order_response IS
    'The round trip of each order to each response of its broker, in seconds on our clock.';

-- The way of an order, step by step; NULL where it has not come so far.
CREATE VIEW order_latency AS
    SELECT c.user_id, c.account, c.run_id, c.order_id, c.created_at, c.claimed_at, c.sent_at,
           w.first_word_at, w.first_fill_at,
           round(extract(epoch FROM c.claimed_at - c.created_at), 6) AS claim_seconds,
           round(extract(epoch FROM c.sent_at - c.claimed_at), 6) AS send_seconds,
           round(extract(epoch FROM w.first_word_at - c.sent_at), 6) AS response_seconds,
           round(extract(epoch FROM w.first_fill_at - c.sent_at), 6) AS fill_seconds
    FROM broker_command c
    LEFT JOIN LATERAL (
        SELECT min(e.received_at) AS first_word_at,
               min(e.received_at) FILTER (WHERE e.kind = 'EXECUTION') AS first_fill_at
        FROM broker_event e
        WHERE e.user_id = c.user_id AND e.account = c.account AND e.order_ref = c.order_id::text
          AND e.received_at >= c.sent_at AND e.kind <> 'THROTTLED') w ON true
    WHERE c.kind = 'SUBMIT';

COMMENT ON VIEW order_latency IS
    'How long each order waited to be claimed and sent, for the first word and the first fill.';
COMMENT ON COLUMN order_latency.claim_seconds IS
    'From the order''s row to the connector''s claim: the queue, the throttle, closed hours.';

CREATE FUNCTION latency_since(of_user uuid, since timestamptz)
RETURNS TABLE (account text, step text, orders bigint, p50 numeric, p95 numeric, p99 numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT s.account, s.step, count(*),
           round(extract(epoch FROM percentile_cont(0.50) WITHIN GROUP (ORDER BY s.took)), 6),
           round(extract(epoch FROM percentile_cont(0.95) WITHIN GROUP (ORDER BY s.took)), 6),
           round(extract(epoch FROM percentile_cont(0.99) WITHIN GROUP (ORDER BY s.took)), 6)
    FROM (SELECT l.account, t.step, t.took, t.place
          FROM order_latency l
          CROSS JOIN LATERAL (VALUES
              ('CLAIM', 1, l.claimed_at - l.created_at),
              ('SEND', 2, l.sent_at - l.claimed_at),
              ('RESPONSE', 3, l.first_word_at - l.sent_at),
              ('FILL', 4, l.first_fill_at - l.sent_at)) AS t (step, place, took)
          WHERE l.user_id = of_user AND l.created_at >= since AND t.took IS NOT NULL) s
    GROUP BY s.account, s.step, s.place
    ORDER BY s.account, s.place
$$;

COMMENT ON FUNCTION latency_since IS
    'Percentiles of the steps of a user''s orders since a moment, in seconds, by account.';

CREATE VIEW latency_summary AS
    SELECT u.user_id, l.account, l.step, l.orders, l.p50, l.p95, l.p99
    FROM app_user u CROSS JOIN LATERAL latency_since(u.user_id, '-infinity') l;

COMMENT ON VIEW latency_summary IS
    'Percentiles of the steps of all orders that ever went to an account, in seconds.';

-- One account at a moment of our clock.
CREATE FUNCTION account_status(of_user uuid, at timestamptz)
RETURNS TABLE (account text, broker text, is_open boolean, opens_at timestamptz,
               connected boolean, holder_name text, last_heard_at timestamptz,
               heartbeat_is_late boolean, clock_skew_seconds numeric, queued bigint,
               queued_for_session bigint, in_flight bigint, oldest_queued_at timestamptz,
               orders_per_second integer, sent_last_second bigint, throttled bigint,
               inbox_waiting bigint, open_orders bigint)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT a.account, a.broker, h.is_open, h.opens_at,
           coalesce(l.connected AND l.expires_at > at, false), l.holder_name, l.last_heard_at,
           coalesce(l.last_heard_at < at - a.heartbeat_seconds * interval '1 second', true),
           round(extract(epoch FROM l.clock_skew), 3), c.queued, c.for_session, c.in_flight,
           c.oldest, a.orders_per_second, c.just_sent,
           -- What could go now and is more than may.
           greatest(c.ready - (a.orders_per_second - least(c.just_sent, a.orders_per_second)), 0),
           (SELECT count(*) FROM broker_event e
            WHERE e.user_id = of_user AND e.account = a.account AND e.applied_at IS NULL),
           (SELECT count(*) FROM orders o
            WHERE o.user_id = of_user AND o.account = a.account
              AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED'))
    FROM broker_account a
    CROSS JOIN LATERAL account_hours(of_user, a.account, at) h
    LEFT JOIN broker_lease l ON l.user_id = of_user AND l.account = a.account
    CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE k.done_at IS NULL AND k.claimed_by IS NULL) AS queued,
               count(*) FILTER (WHERE k.done_at IS NULL AND k.claimed_by IS NULL
                                AND k.not_before > at) AS for_session,
               count(*) FILTER (WHERE k.done_at IS NULL AND k.claimed_by IS NULL
                                AND k.kind = 'SUBMIT'
                                AND coalesce(k.not_before, at) <= at) AS ready,
               count(*) FILTER (WHERE k.done_at IS NULL AND k.claimed_by IS NOT NULL) AS in_flight,
               min(k.created_at) FILTER (WHERE k.done_at IS NULL AND k.claimed_by IS NULL)
                   AS oldest,
               count(*) FILTER (WHERE k.kind = 'SUBMIT' AND k.sent_at > at - interval '1 second')
                   AS just_sent
        FROM broker_command k
        WHERE k.user_id = of_user AND k.account = a.account
          AND (k.done_at IS NULL OR k.sent_at > at - interval '1 second')) c
    WHERE a.user_id = of_user
    ORDER BY a.account
$$;

COMMENT ON FUNCTION account_status IS
    'The accounts of a user at a moment: session, connection, queue, throttle, inbox.';

-- Whether what we hold is so, three ways: our positions against the ledger that they follow from,
-- and against what brokers said last. A broker that never said is no proof either.
CREATE FUNCTION health_positions(of_user uuid)
RETURNS TABLE (run_id uuid, account text, symbol text, ours numeric, brokers numeric,
               ledger numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT r.run_id, NULL::text, d.symbol, d.ours, NULL::numeric, d.told
    FROM strategy_run r
    CROSS JOIN LATERAL (
        SELECT symbol, coalesce(p.quantity, 0) AS ours, coalesce(l.quantity, 0) AS told
        FROM (SELECT * FROM position k WHERE k.user_id = of_user AND k.run_id = r.run_id) p
        FULL JOIN position_from_ledger(of_user, r.run_id) l USING (symbol)) d
    WHERE r.user_id = of_user AND r.status IN ('RUNNING', 'STOPPING') AND d.ours <> d.told
    UNION ALL
    SELECT NULL, a.account, d.subject, (d.ours #>> '{}')::numeric, (d.brokers #>> '{}')::numeric,
           (d.derived #>> '{}')::numeric
    FROM broker_account a
    CROSS JOIN LATERAL (SELECT coalesce(
        snapshot_newest(of_user, a.account),
        (SELECT k.snapshot_id FROM reconciliation k
         WHERE k.user_id = of_user AND k.account = a.account
         ORDER BY k.up_to_number DESC LIMIT 1)) AS snapshot_id) s
    CROSS JOIN LATERAL reconcile_positions(of_user, a.account, s.snapshot_id) d
    WHERE a.user_id = of_user AND s.snapshot_id IS NOT NULL
    UNION ALL
    SELECT NULL, a.account, x.symbol, x.units, NULL, NULL
    FROM broker_account a
    CROSS JOIN LATERAL (SELECT e.symbol, sum(e.units) AS units
                        FROM account_executions(of_user, a.account) e GROUP BY e.symbol) x
    WHERE a.user_id = of_user AND x.units <> 0
      AND NOT EXISTS (SELECT FROM reconciliation k
                      WHERE k.user_id = of_user AND k.account = a.account)
      AND snapshot_newest(of_user, a.account) IS NULL
$$;

COMMENT ON FUNCTION health_positions IS
    'Positions that are not what the ledger makes them, or not what the account''s broker last '
    'said, or of which no broker has said anything; NULL where somebody was not asked.';
