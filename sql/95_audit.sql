-- The audit: views that must return no rows. Each finding names the user, the run, what it is
-- about and what is wrong. They read history only, take no locks and change nothing.

CREATE VIEW audit_orphan AS
    SELECT c.user_id, c.run_id, c.subject, 'belongs to no run' AS finding
    FROM (
        SELECT user_id, run_id, 'engine_state' AS subject FROM engine_state
        UNION ALL SELECT user_id, run_id, 'engine_status' FROM engine_status
        UNION ALL SELECT user_id, run_id, 'orders ' || order_id FROM orders
        UNION ALL SELECT user_id, run_id, 'open_order_sum ' || bucket FROM open_order_sum
        UNION ALL SELECT user_id, run_id, 'execution ' || execution_id FROM execution
        UNION ALL SELECT user_id, run_id, 'position ' || symbol FROM position
        UNION ALL SELECT user_id, run_id, 'mtm_ledger ' || logical_time FROM mtm_ledger
        UNION ALL SELECT user_id, run_id, 'event_ledger ' || seq FROM event_ledger
        UNION ALL SELECT user_id, run_id, 'sip_plan ' || plan FROM sip_plan
        UNION ALL SELECT user_id, run_id, 'split_applied ' || symbol FROM split_applied
        UNION ALL SELECT user_id, run_id, 'risk_limit ' || limit_id FROM risk_limit
                  WHERE run_id IS NOT NULL
        UNION ALL SELECT user_id, run_id, 'run_route ' || account FROM run_route
        UNION ALL SELECT user_id, run_id, 'commission of ' || execution_id
                  FROM execution_commission
        UNION ALL SELECT user_id, run_id, 'order_broker_id ' || order_id FROM order_broker_id
        UNION ALL SELECT user_id, run_id, 'broker_command ' || command_id FROM broker_command
                  WHERE run_id IS NOT NULL) c
    LEFT JOIN strategy_run r ON r.user_id = c.user_id AND r.run_id = c.run_id
    WHERE r.run_id IS NULL;

COMMENT ON VIEW audit_orphan IS 'Rows that belong to no run.';

CREATE VIEW audit_running AS
    SELECT user_id, NULL::uuid AS run_id, 'strategy_run' AS subject,
           format('%s runs are RUNNING', count(*)) AS finding
    FROM strategy_run WHERE status = 'RUNNING' GROUP BY user_id HAVING count(*) > 1;

COMMENT ON VIEW audit_running IS 'Users with more than one RUNNING run.';

CREATE VIEW audit_duplicate AS
    SELECT user_id, run_id, 'mtm_ledger ' || logical_time AS subject,
           format('marked %s times', count(*)) AS finding
    FROM mtm_ledger GROUP BY user_id, run_id, logical_time HAVING count(*) > 1
    UNION ALL
    SELECT user_id, run_id, 'event_ledger TICK ' || logical_time,
           format('ticked %s times', count(*))
    FROM event_ledger WHERE event_type = 'TICK'
    GROUP BY user_id, run_id, logical_time HAVING count(*) > 1
    UNION ALL
    SELECT user_id, run_id, 'event_ledger ' || subject, format('happened %s times', count(*))
    FROM event_ledger
    WHERE event_type IN ('SIP_EXECUTED', 'SIP_REJECTED', 'SIP_SKIPPED', 'REBALANCED')
    GROUP BY user_id, run_id, subject HAVING count(*) > 1;

COMMENT ON VIEW audit_duplicate IS 'Ticks, marks and occasions that happened more than once.';

CREATE VIEW audit_order AS
    SELECT o.user_id, o.run_id, 'order ' || o.order_id AS subject,
           format('says %s filled for %s, its executions say %s for %s', o.filled_quantity,
                  o.filled_notional, coalesce(e.quantity, 0), coalesce(e.notional, 0)) AS finding
    FROM orders o
    LEFT JOIN (SELECT user_id, run_id, order_id, sum(quantity) AS quantity,
                      sum(quantity * price) AS notional
               FROM execution GROUP BY user_id, run_id, order_id) e
        ON e.user_id = o.user_id AND e.run_id = o.run_id AND e.order_id = o.order_id
    WHERE (o.filled_quantity, o.filled_notional)
          <> (coalesce(e.quantity, 0), coalesce(e.notional, 0))
    UNION ALL
    SELECT user_id, run_id, 'order ' || order_id,
           format('is %s with %s of %s filled', status, filled_quantity, quantity)
    FROM orders
    WHERE CASE WHEN status = 'FILLED' THEN filled_quantity < quantity
               WHEN status = 'PARTIALLY_FILLED'
               THEN filled_quantity <= 0 OR filled_quantity >= quantity
               WHEN status IN ('NEW', 'PENDING', 'PENDING_SUBMIT', 'ROUTED', 'REJECTED')
               THEN filled_quantity <> 0
               ELSE filled_quantity >= quantity END
    UNION ALL
    SELECT e.user_id, e.run_id, 'execution ' || e.execution_id,
           format('is %s %s, its order %s %s', e.side, e.symbol, o.side, o.symbol)
    FROM execution e
    JOIN orders o ON o.user_id = e.user_id AND o.run_id = e.run_id AND o.order_id = e.order_id
    WHERE (e.side, e.symbol) <> (o.side, o.symbol)
    UNION ALL
    SELECT o.user_id, o.run_id, 'order ' || o.order_id,
           format('is %s in a run that is %s', o.status, r.status)
    FROM orders o
    JOIN strategy_run r ON r.user_id = o.user_id AND r.run_id = o.run_id
    WHERE r.status IN ('STOPPED', 'ERROR') AND o.broker = 'paper'
      AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
    UNION ALL
    SELECT s.user_id, s.run_id, concat_ws(' ', 'open_order_sum', s.kind, s.symbol, s.bucket),
           format('is %s, the open orders make it %s', s.amount, coalesce(o.amount, 0))
    FROM open_order_sum s
    LEFT JOIN (SELECT n.user_id, n.run_id, h.kind, h.symbol, order_bucket(n.order_id) AS bucket,
                      sum(h.amount) AS amount
               FROM orders n
               CROSS JOIN LATERAL (VALUES ('CASH', '', n.reserved_cash),
                                          (n.side, n.symbol, n.quantity - n.filled_quantity))
                    h (kind, symbol, amount)
               WHERE n.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
               GROUP BY n.user_id, n.run_id, h.kind, h.symbol, order_bucket(n.order_id)) o
        ON o.user_id = s.user_id AND o.run_id = s.run_id AND o.kind = s.kind
       AND o.symbol = s.symbol AND o.bucket = s.bucket
    WHERE s.amount <> coalesce(o.amount, 0);

COMMENT ON VIEW audit_order IS
    'Orders that contradict their executions, their run or what they are summed to.';

CREATE VIEW audit_cash AS
    SELECT r.user_id, r.run_id, 'cash' AS subject,
           format('is %s, the executions make it %s', r.cash,
                  r.initial_cash + coalesce(e.flow, 0) - coalesce(c.cost, 0)) AS finding
    FROM strategy_run r
    LEFT JOIN (SELECT user_id, run_id,
                      sum(execution_cash_flow(side, quantity, price, commission)) AS flow
               FROM execution GROUP BY user_id, run_id) e
        ON e.user_id = r.user_id AND e.run_id = r.run_id
    LEFT JOIN (SELECT user_id, run_id, sum(cost) AS cost FROM execution_commission
               GROUP BY user_id, run_id) c
        ON c.user_id = r.user_id AND c.run_id = r.run_id
    WHERE r.cash <> r.initial_cash + coalesce(e.flow, 0) - coalesce(c.cost, 0)
    UNION ALL
    SELECT user_id, run_id, 'cash', format('is %s in a cash account', cash)
    FROM strategy_run WHERE account_type = 'CASH' AND broker = 'paper' AND cash < 0
    UNION ALL
    SELECT r.user_id, r.run_id, 'books_seq',
           format('is %s, the last event that the books follow is %s', r.books_seq,
                  coalesce(l.seq, 0))
    FROM strategy_run r
    LEFT JOIN (SELECT user_id, run_id, max(seq) AS seq FROM event_ledger
               WHERE event_type IN ('EXECUTION', 'COMMISSION', 'SPLIT_APPLIED')
               GROUP BY user_id, run_id) l
        ON l.user_id = r.user_id AND l.run_id = r.run_id
    WHERE r.books_seq <> coalesce(l.seq, 0);

COMMENT ON VIEW audit_cash IS 'Runs whose cash is not their initial cash and their executions.';

-- Positions as the ledger alone tells them, symbol by symbol, event by event.
CREATE FUNCTION position_from_ledger(of_user uuid, of_run uuid)
RETURNS TABLE (symbol text, quantity numeric, cost_basis numeric, realized_pnl numeric)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    event event_ledger;
    p     public.position;
BEGIN
    FOR event IN SELECT (s.event).* FROM ledger_standing(of_user, of_run) s LOOP
        IF p.symbol <> event.payload ->> 'symbol' THEN
            RETURN QUERY SELECT p.symbol, p.quantity, p.cost_basis, p.realized_pnl;
            p := NULL;
        END IF;
        p := position_after_event(p, event);
    END LOOP;
    -- A split of what was never held makes no position.
    RETURN QUERY SELECT p.symbol, p.quantity, p.cost_basis, p.realized_pnl
                 WHERE p.symbol IS NOT NULL;
END $$;

COMMENT ON FUNCTION position_from_ledger IS 'A run''s positions, rebuilt from its ledger alone.';

CREATE VIEW audit_position AS
    SELECT r.user_id, r.run_id, 'position ' || d.symbol AS subject,
           format('is %s at cost %s with %s realised, the ledger makes it %s at %s with %s',
                  d.quantity, d.cost_basis, d.realized_pnl, d.ledger_quantity,
                  d.ledger_cost_basis, d.ledger_realized_pnl) AS finding
    FROM strategy_run r
    CROSS JOIN LATERAL (
        SELECT symbol, coalesce(p.quantity, 0) AS quantity, coalesce(p.cost_basis, 0) AS cost_basis,
               coalesce(p.realized_pnl, 0) AS realized_pnl,
               coalesce(l.quantity, 0) AS ledger_quantity,
               coalesce(l.cost_basis, 0) AS ledger_cost_basis,
               coalesce(l.realized_pnl, 0) AS ledger_realized_pnl
        FROM (SELECT * FROM position WHERE user_id = r.user_id AND run_id = r.run_id) p
        FULL JOIN position_from_ledger(r.user_id, r.run_id) l USING (symbol)) d
    WHERE (d.quantity, d.cost_basis, d.realized_pnl)
          <> (d.ledger_quantity, d.ledger_cost_basis, d.ledger_realized_pnl);

COMMENT ON VIEW audit_position IS 'Positions that are not what the ledger makes them.';

CREATE VIEW audit_mark AS
    SELECT user_id, run_id, 'mtm_ledger ' || logical_time AS subject,
           format('equity %s is not cash %s + market value %s', equity, cash, market_value)
               AS finding
    FROM mtm_ledger WHERE equity <> cash + market_value
    UNION ALL
    SELECT t.user_id, t.run_id, 'event_ledger TICK ' || t.logical_time,
           format('says equity %s, the mark says %s', t.payload ->> 'equity', m.equity)
    FROM event_ledger t
    LEFT JOIN mtm_ledger m ON m.user_id = t.user_id AND m.run_id = t.run_id
                          AND m.logical_time = t.logical_time
    WHERE t.event_type = 'TICK' AND t.payload ?| ARRAY['cash', 'market_value', 'equity']
      AND (m.cash, m.market_value, m.equity) IS DISTINCT FROM
          ((t.payload ->> 'cash')::numeric, (t.payload ->> 'market_value')::numeric,
           (t.payload ->> 'equity')::numeric)
    UNION ALL
    SELECT c.user_id, c.run_id, 'event_ledger TICK ' || c.logical_time,
           format('says cash %s, the executions before it make it %s', c.payload ->> 'cash', c.cash)
    FROM (
        SELECT l.user_id, l.run_id, l.logical_time, l.event_type, l.payload,
               r.initial_cash + sum(event_cash_flow(l.event_type, l.payload))
                   OVER (PARTITION BY l.user_id, l.run_id ORDER BY l.seq) AS cash
        FROM event_ledger l
        JOIN strategy_run r ON r.user_id = l.user_id AND r.run_id = l.run_id
        WHERE l.event_type IN ('EXECUTION', 'COMMISSION', 'TICK')) c
    WHERE c.event_type = 'TICK' AND (c.payload ->> 'cash')::numeric <> c.cash;

COMMENT ON VIEW audit_mark IS 'Marks and ticks that are not what the books make them.';

CREATE VIEW audit_chain AS
    SELECT c.user_id, c.run_id, 'event_ledger ' || c.seq AS subject,
           CASE WHEN c.seq <> c.place THEN format('is number %s in the chain', c.place)
                WHEN c.logical_time < c.time_before THEN 'is earlier than the event before it'
                ELSE 'does not follow from the event before it: its hash is wrong' END AS finding
    FROM (
        SELECT l.*, row_number() OVER w AS place, lag(l.logical_time) OVER w AS time_before,
               coalesce(lag(l.hash) OVER w, '') AS hash_before
        FROM event_ledger l
        WINDOW w AS (PARTITION BY l.user_id, l.run_id ORDER BY l.seq)) c
    WHERE c.seq <> c.place OR c.logical_time < c.time_before
       OR c.hash <> event_hash(c.hash_before, c.user_id, c.run_id, c.seq, c.logical_time,
                               c.event_type, c.subject, c.payload, c.recorded_at);

COMMENT ON VIEW audit_chain IS 'Events that break their run''s chain.';

-- Named one by one, since other people's tables may be in the schema too.
CREATE FUNCTION our_relations() RETURNS text[]
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT ARRAY[
        'alert', 'app_user', 'broker_account', 'broker_command', 'broker_event', 'broker_lease',
        'calendar_session', 'command_kind', 'corporate_action', 'engine_state', 'engine_status',
        'event_ledger', 'execution', 'execution_commission', 'execution_cost', 'fx_rate',
        'instrument', 'latency_summary', 'mtm_ledger', 'order_broker_id', 'order_latency',
        'order_response', 'order_status', 'order_transition', 'orders',
        'pnl_daily', 'position', 'position_pnl', 'price_bar', 'reconciliation',
        'reconciliation_difference', 'risk_limit', 'run_route',
        'run_status', 'run_transition', 'sip_plan', 'split_applied', 'strategy_run',
        'breaker_kind', 'circuit_breaker', 'equity_peak', 'flatten_request', 'limit_kind',
        'open_order_sum', 'order_refusal', 'system_halt', 'trading_halt',
        'paper_order', 'paper_trade', 'paper_position', 'paper_equity_curve',
        'audit_broker', 'audit_cash', 'audit_chain', 'audit_duplicate', 'audit_event',
        'audit_guard', 'audit_mark', 'audit_order', 'audit_orphan', 'audit_position',
        'audit_running']
        -- Not there in a database that was built from sql/.
        || CASE WHEN to_regclass('public.alembic_version') IS NULL THEN '{}'
                ELSE '{alembic_version}'::text[] END
$$;

COMMENT ON FUNCTION our_relations IS 'Our tables and views.';

CREATE VIEW audit_guard AS
    WITH ours AS (
        SELECT oid, relname FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relname = ANY (our_relations())
    )
    SELECT NULL::uuid AS user_id, NULL::uuid AS run_id,
           format('trigger %s of %s', t.tgname, o.relname) AS subject,
           'is switched off' AS finding
    FROM pg_trigger t JOIN ours o ON o.oid = t.tgrelid
    WHERE t.tgenabled NOT IN ('O', 'A')
    UNION ALL
    SELECT NULL, NULL, format('constraint %s of %s', c.conname, o.relname),
           'was not checked against the rows that were there before it'
    FROM pg_constraint c JOIN ours o ON o.oid = c.conrelid
    WHERE NOT c.convalidated
    UNION ALL
    SELECT NULL, NULL, format('table %s', i.inhrelid::regclass),
           format('puts rows into %s past its triggers', o.relname)
    FROM pg_inherits i JOIN ours o ON o.oid = i.inhparent
    UNION ALL
    SELECT NULL, NULL, format('role %s', r.rolname), 'may write what nobody proves'
    FROM pg_roles r
    WHERE NOT r.rolsuper AND r.rolname <> 'oms_keeper'
      AND pg_has_role(r.oid, to_regrole('oms_keeper'), CASE
          WHEN current_setting('server_version_num')::integer >= 160000 THEN 'SET'
          ELSE 'MEMBER' END)
    UNION ALL
    SELECT NULL, NULL, format('function %s', p.oid::regprocedure), 'writes what nobody proves'
    FROM pg_proc p
    WHERE p.proowner = to_regrole('oms_keeper')
      AND (p.proname <> 'ticks_write' OR p.pronamespace <> 'public'::regnamespace);

COMMENT ON VIEW audit_guard IS
    'Triggers and constraints that are switched off, and who else writes what nobody proves.';

-- What the ledger tells of each order, from its placing or its last restatement.
CREATE VIEW audit_event AS
    SELECT o.user_id, o.run_id, 'order ' || o.order_id AS subject,
           CASE WHEN t.payload IS NULL THEN 'has no event of its placing'
                ELSE format('is not what its event tells: %s', t.payload) END AS finding
    FROM orders o
    LEFT JOIN (SELECT DISTINCT ON (user_id, run_id, event_order_id(subject))
                      user_id, run_id, event_order_id(subject) AS order_id, payload
               FROM event_ledger
               WHERE event_type IN ('ORDER_PLACED', 'ORDER_REJECTED', 'ORDER_RESTATED',
                                    'ORDER_MODIFIED')
                 AND payload ? 'symbol'
               ORDER BY user_id, run_id, event_order_id(subject), seq DESC) t
        ON t.user_id = o.user_id AND t.run_id = o.run_id AND t.order_id = o.order_id
    WHERE (o.symbol, o.side, o.order_type, o.time_in_force, o.quantity, o.limit_price,
           o.trail_amount, o.trail_percent, o.client_order_id,
           CASE WHEN o.order_type <> 'TRAIL' THEN o.stop_price END)
          IS DISTINCT FROM
          (t.payload ->> 'symbol', t.payload ->> 'side', t.payload ->> 'order_type',
           t.payload ->> 'time_in_force', (t.payload ->> 'quantity')::numeric,
           (t.payload ->> 'limit_price')::numeric, (t.payload ->> 'trail_amount')::numeric,
           (t.payload ->> 'trail_percent')::numeric, t.payload ->> 'client_order_id',
           CASE WHEN o.order_type <> 'TRAIL' THEN (t.payload ->> 'stop_price')::numeric END)
    UNION ALL
    SELECT o.user_id, o.run_id, 'order ' || o.order_id,
           format('is %s since %s, which no event tells', o.status, o.status_at)
    FROM orders o
    WHERE o.status NOT IN ('NEW', 'PENDING', 'PARTIALLY_FILLED', 'FILLED')
      AND NOT EXISTS (SELECT FROM event_ledger l
                      WHERE l.user_id = o.user_id AND l.run_id = o.run_id
                        AND l.logical_time = o.status_at
                        AND l.event_type = 'ORDER_' || o.status
                        -- An equation first: orders of one moment are not compared each with each.
                        AND event_order_id(l.subject) = o.order_id
                        AND (o.broker <> 'paper' OR l.subject = o.order_id::text))
      -- Back at work, its only fills taken back: the reversal's own event tells that.
      AND NOT (o.status = 'ROUTED'
               AND EXISTS (SELECT FROM execution e
                           WHERE e.user_id = o.user_id AND e.run_id = o.run_id
                             AND e.order_id = o.order_id AND e.reverses IS NOT NULL
                             AND e.logical_time = o.status_at))
    UNION ALL
    SELECT l.user_id, l.run_id, 'event_ledger ' || l.seq,
           format('tells of an order that is %s', coalesce(o.status, 'not there'))
    FROM event_ledger l
    LEFT JOIN orders o ON o.user_id = l.user_id AND o.run_id = l.run_id
                      AND o.order_id = event_order_id(l.subject)
    WHERE l.event_type IN ('ORDER_PLACED', 'ORDER_REJECTED', 'ORDER_CANCELED', 'ORDER_EXPIRED')
      AND (o.order_id IS NULL
           OR o.broker = 'paper' AND l.event_type NOT IN ('ORDER_PLACED', 'ORDER_' || o.status))
    UNION ALL
    SELECT e.user_id, e.run_id, 'execution ' || e.execution_id,
           'has no event, or one that says otherwise'
    FROM execution e
    WHERE NOT EXISTS (SELECT FROM event_ledger l
                      WHERE l.user_id = e.user_id AND l.run_id = e.run_id
                        AND l.logical_time = e.logical_time AND l.event_type = 'EXECUTION'
                        AND l.subject = e.order_id || '/' || e.execution_id
                        AND l.payload ->> 'symbol' = e.symbol AND l.payload ->> 'side' = e.side
                        AND (l.payload ->> 'quantity')::numeric = e.quantity
                        AND (l.payload ->> 'price')::numeric = e.price
                        AND (l.payload ->> 'commission')::numeric = e.commission
                        AND l.payload ->> 'commission_currency' = e.commission_currency
                        AND (l.payload ->> 'event_at')::timestamptz = e.event_at)
    UNION ALL
    SELECT coalesce(c.user_id, l.user_id), coalesce(c.run_id, l.run_id),
           coalesce('commission of ' || c.execution_id, 'event_ledger ' || l.seq),
           CASE WHEN l.seq IS NULL THEN 'has no event, or one that says otherwise'
                ELSE 'tells of a commission that is not there' END
    FROM execution_commission c
    FULL JOIN (SELECT * FROM event_ledger WHERE event_type = 'COMMISSION') l
        ON l.user_id = c.user_id AND l.run_id = c.run_id AND l.subject = c.execution_id
       AND l.logical_time = c.logical_time AND l.payload = execution_commission_payload(c)
    WHERE c.run_id IS NULL OR l.run_id IS NULL
    UNION ALL
    SELECT l.user_id, l.run_id, 'event_ledger ' || l.seq, 'tells of an execution that is not there'
    FROM event_ledger l
    WHERE l.event_type = 'EXECUTION'
      AND NOT EXISTS (SELECT FROM execution e
                      WHERE e.user_id = l.user_id AND e.run_id = l.run_id
                        AND e.execution_id = substr(l.subject, 38))
    UNION ALL
    SELECT coalesce(s.user_id, l.user_id), coalesce(s.run_id, l.run_id),
           coalesce('split_applied ' || split_event_subject(s), 'event_ledger ' || l.seq),
           CASE WHEN l.seq IS NULL THEN 'has no event, or one that says otherwise'
                ELSE 'tells of a split that is not there' END
    FROM split_applied s
    FULL JOIN (SELECT * FROM event_ledger WHERE event_type = 'SPLIT_APPLIED') l
        ON l.user_id = s.user_id AND l.run_id = s.run_id AND l.logical_time = s.logical_time
       AND l.payload ->> 'symbol' = s.symbol AND (l.payload ->> 'ex_date')::date = s.ex_date
       AND (l.payload ->> 'quantity_before')::numeric = s.quantity_before
       AND (l.payload ->> 'quantity_after')::numeric = s.quantity_after
    WHERE s.run_id IS NULL OR l.run_id IS NULL
    UNION ALL
    SELECT s.user_id, s.run_id, 'engine_state',
           format('stands at %s, the last TICK is at %s', s.last_logical_time, t.logical_time)
    FROM engine_state s
    CROSS JOIN LATERAL (SELECT max(l.logical_time) AS logical_time FROM event_ledger l
                        WHERE l.user_id = s.user_id AND l.run_id = s.run_id
                          AND l.event_type = 'TICK') t
    WHERE s.last_logical_time IS DISTINCT FROM t.logical_time
    UNION ALL
    SELECT l.user_id, l.run_id, 'event_ledger ' || l.seq,
           format('tells of an end, the run is %s and its last event is %s', r.status, h.seq)
    FROM event_ledger l
    JOIN strategy_run r ON r.user_id = l.user_id AND r.run_id = l.run_id
    CROSS JOIN LATERAL (SELECT max(n.seq) AS seq FROM event_ledger n
                        WHERE n.user_id = l.user_id AND n.run_id = l.run_id) h
    WHERE l.event_type IN ('RUN_STOPPED', 'RUN_ERROR')
      AND (l.event_type <> 'RUN_' || r.status OR l.seq <> h.seq)
    UNION ALL
    SELECT r.user_id, r.run_id, 'strategy_run',
           format('is %s, its last event is %s', r.status, h.event_type)
    FROM strategy_run r
    CROSS JOIN LATERAL (SELECT n.event_type FROM event_ledger n
                        WHERE n.user_id = r.user_id AND n.run_id = r.run_id
                        ORDER BY n.seq DESC LIMIT 1) h
    WHERE r.status IN ('STOPPED', 'ERROR') AND h.event_type <> 'RUN_' || r.status;

COMMENT ON VIEW audit_event IS 'Rows without their event and events without their row.';

-- Run by run, which the keys of the books begin with.
CREATE FUNCTION broker_event_is_booked(b broker_event) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    IF b.kind = 'COMMISSION' THEN
        RETURN EXISTS (SELECT FROM execution_commission c
                       JOIN strategy_run r ON r.user_id = c.user_id AND r.run_id = c.run_id
                       WHERE r.user_id = b.user_id AND c.execution_id = b.execution_id);
    END IF;
    RETURN EXISTS (
        SELECT FROM strategy_run r
        JOIN execution e ON e.user_id = r.user_id AND e.run_id = r.run_id
                        AND e.execution_id = b.execution_id
        WHERE r.user_id = b.user_id
          AND (b.kind = 'EXECUTION' OR EXISTS (
              SELECT FROM execution t
              WHERE t.user_id = e.user_id AND t.run_id = e.run_id
                AND t.reverses = e.execution_id)));
END $$;

COMMENT ON FUNCTION broker_event_is_booked IS
    'Whether an execution, bust or commission that a broker told is in a run''s books.';

-- Inbox and outbox are kept, so that they still bear out what is in the books. A run that was made
-- anew from an export has neither: they are its account's. Written for a planner without statistics
-- (docs/decisions/0014): whatever it joins in which order, each row is proven once, since that is
-- done in what it must materialize, and each other row is found by its key.
CREATE VIEW audit_broker AS
    WITH named AS MATERIALIZED (
        SELECT DISTINCT b.user_id, b.account, b.order_ref FROM broker_event b
        WHERE b.order_ref IS NOT NULL
    ), traded AS MATERIALIZED (
        SELECT c.user_id, c.run_id FROM broker_command c WHERE c.run_id IS NOT NULL
        UNION
        SELECT o.user_id, o.run_id FROM orders o
        JOIN named n ON n.user_id = o.user_id AND n.account = o.account
                    AND n.order_ref = o.order_id::text
        WHERE o.recovered
    ), executed AS MATERIALIZED (
        SELECT e, execution_said_by_broker(e) AS is_said
        FROM traded t
        JOIN strategy_run r ON r.user_id = t.user_id AND r.run_id = t.run_id
        JOIN execution e ON e.user_id = t.user_id AND e.run_id = t.run_id
        WHERE r.broker <> 'paper'
    ), charged AS MATERIALIZED (
        SELECT c, execution_commission_is_said(c) AS is_said
        FROM traded t
        JOIN execution_commission c ON c.user_id = t.user_id AND c.run_id = t.run_id
    )
    SELECT (x.e).user_id, (x.e).run_id, 'execution ' || (x.e).execution_id AS subject,
           CASE WHEN (x.e).reverses IS NULL
                THEN format('no broker said %s of %s at %s', (x.e).side, (x.e).quantity,
                            (x.e).price)
                ELSE format('no broker took back %s', (x.e).reverses) END AS finding
    FROM executed x
    WHERE x.is_said IS NOT TRUE
    UNION ALL
    SELECT (x.c).user_id, (x.c).run_id, 'commission of ' || (x.c).execution_id,
           format('no broker said %s %s', (x.c).amount, (x.c).currency)
    FROM charged x
    WHERE x.is_said IS NOT TRUE
    UNION ALL
    SELECT c.user_id, c.run_id, 'broker_command ' || c.command_id,
           format('is a %s that its order, %s at %s, does not bear out', c.kind, (x.o).status,
                  (x.o).account)
    FROM broker_command c
    CROSS JOIN LATERAL (SELECT o FROM orders o
                        WHERE o.user_id = c.user_id AND o.run_id = c.run_id
                          AND o.order_id = c.order_id ORDER BY o.order_id LIMIT 1) x
    WHERE c.kind IN ('SUBMIT', 'MODIFY', 'CANCEL')
      AND (c.payload ->> 'order_ref', c.payload ->> 'symbol', c.payload ->> 'side',
           c.payload ->> 'order_type', c.payload ->> 'time_in_force')
          IS DISTINCT FROM
          ((x.o).order_id::text, (x.o).symbol, (x.o).side, (x.o).order_type,
           (x.o).time_in_force)
       OR c.kind = 'SUBMIT' AND c.claimed_by IS NULL AND c.done_at IS NULL
          AND ((x.o).status IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
               OR c.account <> (x.o).account
               OR c.payload <> orders_command_payload(x.o))
    UNION ALL
    SELECT o.user_id, o.run_id, 'order ' || o.order_id,
           format('is %s at %s and no command sent it there', o.status, o.account)
    FROM orders o
    JOIN traded t ON t.user_id = o.user_id AND t.run_id = o.run_id
    WHERE o.broker <> 'paper' AND NOT o.recovered
      AND (o.status <> 'REJECTED' OR o.reject_source = 'BROKER')
      AND (SELECT true FROM broker_command c
           WHERE c.user_id = o.user_id AND c.account = o.account AND c.order_id = o.order_id
             AND c.kind = 'SUBMIT' ORDER BY c.order_id LIMIT 1) IS NULL
    UNION ALL
    SELECT o.user_id, o.run_id, 'order ' || o.order_id,
           format('is %s and no command asks for it', o.status)
    FROM orders o
    JOIN traded t ON t.user_id = o.user_id AND t.run_id = o.run_id
    WHERE o.broker <> 'paper' AND o.status IN ('PENDING_CANCEL', 'PENDING_MODIFY')
      AND (SELECT true FROM broker_command c
           WHERE c.user_id = o.user_id AND c.run_id = o.run_id AND c.order_id = o.order_id
             AND 'PENDING_' || c.kind = o.status ORDER BY c.order_id LIMIT 1) IS NULL
    UNION ALL
    SELECT o.user_id, o.run_id, 'order ' || o.order_id,
           format('of a run at %s is at %s, which is at %s', o.broker, a.account, a.broker)
    FROM orders o
    JOIN broker_account a ON a.user_id = o.user_id AND a.account = o.account
    WHERE a.broker <> o.broker
    UNION ALL
    SELECT o.user_id, o.run_id, 'order ' || o.order_id,
           format('has the ids %s and %s, under which no broker knows it', o.broker_order_id,
                  o.perm_id)
    FROM orders o
    WHERE (o.broker_order_id IS NOT NULL AND (
               SELECT true FROM order_broker_id m
               WHERE m.user_id = o.user_id AND m.run_id = o.run_id AND m.order_id = o.order_id
                 AND m.broker_order_id = o.broker_order_id ORDER BY m.order_id LIMIT 1) IS NULL)
       OR (o.perm_id IS NOT NULL AND (
               SELECT true FROM order_broker_id m
               WHERE m.user_id = o.user_id AND m.run_id = o.run_id AND m.order_id = o.order_id
                 AND m.perm_id = o.perm_id ORDER BY m.order_id LIMIT 1) IS NULL)
    UNION ALL
    SELECT b.user_id, NULL, format('broker_event %s of %s', b.number, b.account),
           format('is a %s that was found %s, and no book has it', b.kind, b.finding)
    FROM broker_event b
    WHERE b.finding IN ('NEW', 'CORRECTION', 'ORPHAN')
      AND b.kind IN ('EXECUTION', 'BUST', 'COMMISSION') AND NOT broker_event_is_booked(b);

COMMENT ON VIEW audit_broker IS
    'Books of orders at brokers that their brokers'' words, or our own, do not bear out.';
