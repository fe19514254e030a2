-- Reconciliation: what we hold against what the broker and the ledger say, and what was done. A
-- snapshot arrives in the inbox like everything else; what is numbered before it was heard before.
-- Whatever is compared is compared in one statement, for ten orders or a hundred thousand.

CREATE TABLE reconciliation (
    user_id      uuid        NOT NULL,
    account      text        NOT NULL,
    snapshot_id  uuid        NOT NULL,
    why          text        NOT NULL,
    taken_at     timestamptz NOT NULL,
    up_to_number bigint      NOT NULL,
    open_orders  integer     NOT NULL,
    undecided    integer     NOT NULL,
    began_at     timestamptz NOT NULL,
    finished_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT reconciliation_pkey PRIMARY KEY (user_id, account, snapshot_id),
    CONSTRAINT reconciliation_of_account FOREIGN KEY (user_id, account)
        REFERENCES broker_account (user_id, account) ON DELETE CASCADE,
    CONSTRAINT reconciliation_why_format CHECK (why ~ '^[A-Z][A-Z0-9_]*$' AND length(why) <= 63),
    CONSTRAINT reconciliation_counts_not_negative CHECK (open_orders >= 0 AND undecided >= 0)
);

-- When an account was compared last.
CREATE INDEX reconciliation_latest_idx ON reconciliation (user_id, account, up_to_number);

COMMENT ON TABLE reconciliation IS 'Snapshots that our books were compared with; append-only.';
COMMENT ON COLUMN reconciliation.snapshot_id IS 'The SNAPSHOT command that it answers.';
COMMENT ON COLUMN reconciliation.why IS 'START, CONNECTED, TIMER, STALE, DEMAND, ...';
COMMENT ON COLUMN reconciliation.taken_at IS 'The broker''s time of the snapshot.';
COMMENT ON COLUMN reconciliation.up_to_number IS 'The snapshot''s last row in the inbox.';
COMMENT ON COLUMN reconciliation.open_orders IS 'How many orders the broker works.';
COMMENT ON COLUMN reconciliation.undecided IS
    'How many orders it could not judge: what was asked for them may still be on its way.';

CREATE TABLE reconciliation_difference (
    user_id     uuid    NOT NULL,
    account     text    NOT NULL,
    snapshot_id uuid    NOT NULL,
    number      integer NOT NULL,
    class       text    NOT NULL,
    subject     text    NOT NULL,
    ours        jsonb,
    brokers     jsonb,
    derived     jsonb,
    action      text    NOT NULL,
    reason      text    NOT NULL,
    CONSTRAINT reconciliation_difference_pkey
        PRIMARY KEY (user_id, account, snapshot_id, number),
    CONSTRAINT reconciliation_difference_of_reconciliation
        FOREIGN KEY (user_id, account, snapshot_id)
        REFERENCES reconciliation (user_id, account, snapshot_id) ON DELETE CASCADE,
    CONSTRAINT reconciliation_difference_class_known CHECK (class = ANY ('{MISSING_AT_BROKER,
        NEVER_ARRIVED,FOUND,TERMS_DIFFER,STATUS_DIFFERS,FILLED_DIFFERS,IDS_DIFFER,ACCOUNT_DIFFERS,
        CONTRACT_CHANGED,ORPHAN,FOREIGN,EXECUTION_DIFFERS,POSITION_DIFFERS,CASH_DIFFERS}')),
    CONSTRAINT reconciliation_difference_action_known CHECK (action = ANY ('{CANCELED,MOVED,KEPT,
        RECORDED,TERMS_TAKEN,CANCEL_SENT,ADOPTED,ALERTED,HELD}')),
    CONSTRAINT reconciliation_difference_words_short
        CHECK (length(subject) <= 200 AND length(reason) <= 2000)
);

COMMENT ON TABLE reconciliation_difference IS
    'What a reconciliation found, three ways, and what was done about it; append-only.';
COMMENT ON COLUMN reconciliation_difference.subject IS 'An order''s id, a symbol or a currency.';
COMMENT ON COLUMN reconciliation_difference.derived IS 'What the ledger says.';
COMMENT ON COLUMN reconciliation_difference.action IS
    'What was done: the order CANCELED, MOVED or KEPT as it is, ids RECORDED, TERMS_TAKEN, a '
    'CANCEL_SENT, an orphan ADOPTED; ALERTED where a person must decide, HELD where the run ended.';

CREATE TRIGGER reconciliation_z_refuse_change BEFORE UPDATE OR DELETE ON reconciliation
    FOR EACH ROW EXECUTE FUNCTION boundary_refuse_delete('reconciliation');
CREATE TRIGGER reconciliation_z_refuse_truncate BEFORE TRUNCATE ON reconciliation
    FOR EACH STATEMENT EXECUTE FUNCTION boundary_refuse_delete('reconciliation');
CREATE TRIGGER reconciliation_difference_z_refuse_change
    BEFORE UPDATE OR DELETE ON reconciliation_difference
    FOR EACH ROW EXECUTE FUNCTION boundary_refuse_delete('reconciliation_difference');
CREATE TRIGGER reconciliation_difference_z_refuse_truncate
    BEFORE TRUNCATE ON reconciliation_difference
    FOR EACH STATEMENT EXECUTE FUNCTION boundary_refuse_delete('reconciliation_difference');

-- Snapshots and sessions among all that an account heard.
CREATE INDEX broker_event_snapshot_idx ON broker_event (user_id, account, kind, number)
    WHERE kind IN ('SNAPSHOT', 'CONNECTED', 'CONTRACT_CHANGED');

-- When a broker was asked last.
CREATE INDEX broker_command_snapshot_idx ON broker_command (user_id, account, created_at)
    WHERE kind = 'SNAPSHOT';

-- --- What the broker says -------------------------------------------------------------------

-- The newest whole snapshot that was not compared yet. One that was asked for a dry run is not
-- compared by anybody but who asked.
CREATE FUNCTION snapshot_newest(of_user uuid, of_account text) RETURNS uuid
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT (e.payload ->> 'snapshot_id')::uuid FROM broker_event e
    WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
      AND e.number > coalesce((SELECT max(r.up_to_number) FROM reconciliation r
                               WHERE r.user_id = of_user AND r.account = of_account), 0)
      AND NOT EXISTS (SELECT FROM broker_command c
                      WHERE c.user_id = of_user AND c.account = of_account
                        AND c.command_id = (e.payload ->> 'snapshot_id')::uuid
                        AND c.payload ? 'dry_run')
    GROUP BY e.payload ->> 'snapshot_id'
    HAVING count(DISTINCT e.payload ->> 'part') = max((e.payload ->> 'parts')::integer)
    ORDER BY max(e.number) DESC LIMIT 1
$$;

COMMENT ON FUNCTION snapshot_newest IS
    'The newest whole snapshot of an account that is still to be compared, or NULL.';

CREATE FUNCTION snapshot_facts(of_user uuid, of_account text, of_snapshot uuid,
    OUT is_whole boolean, OUT is_waiting boolean, OUT why text, OUT taken_at timestamptz,
    OUT asked_at timestamptz, OUT after_number bigint, OUT first_number bigint,
    OUT last_number bigint, OUT holder uuid)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    SELECT count(DISTINCT e.payload ->> 'part') = max((e.payload ->> 'parts')::integer),
           max((e.payload ->> 'taken_at')::timestamptz), min(e.number), max(e.number),
           (array_agg(e.holder ORDER BY e.number))[1]
    INTO is_whole, taken_at, first_number, last_number, holder FROM broker_event e
    WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
      AND e.payload ->> 'snapshot_id' = of_snapshot::text
      -- The rows of one snapshot come after the command that asked for it.
      AND e.number > coalesce((SELECT (c.payload ->> 'after_number')::bigint FROM broker_command c
                               WHERE c.user_id = of_user AND c.account = of_account
                                 AND c.command_id = of_snapshot), 0);
    SELECT coalesce(c.payload ->> 'why', 'UNASKED'), c.claimed_at,
           (c.payload ->> 'after_number')::bigint
    INTO why, asked_at, after_number FROM broker_command c
    WHERE c.user_id = of_user AND c.account = of_account AND c.command_id = of_snapshot;
    is_whole := coalesce(is_whole, false);
    why := coalesce(why, 'UNASKED');
    after_number := coalesce(after_number, 0);
    -- Nobody asked: nothing certainly went before it.
    asked_at := coalesce(asked_at, '-infinity');
    is_waiting := EXISTS (
        SELECT FROM broker_event w
        WHERE w.user_id = of_user AND w.account = of_account AND w.applied_at IS NULL
          AND w.number < first_number AND w.kind <> 'SNAPSHOT');
END $$;

COMMENT ON FUNCTION snapshot_facts IS
    'A snapshot: whether it is whole, whether earlier news still waits to be applied, when it was '
    'taken and asked for, its place in the inbox, and the connector that brought it.';

CREATE TYPE snapshot_order AS (
    order_ref       text,
    ours            boolean,
    status          text,
    filled          numeric,
    broker_order_id bigint,
    perm_id         bigint,
    symbol          text,
    side            text,
    quantity        numeric,
    order_type      text,
    time_in_force   text,
    limit_price     numeric,
    stop_price      numeric,
    trail_amount    numeric,
    trail_percent   numeric,
    expire_at       timestamptz
);

COMMENT ON TYPE snapshot_order IS 'An order that a broker works, as its snapshot says it.';

CREATE FUNCTION snapshot_orders(of_user uuid, of_account text, of_snapshot uuid)
RETURNS SETOF snapshot_order
LANGUAGE sql STABLE ROWS 10000 SET search_path = public, pg_temp AS $$
    SELECT o.* FROM broker_event e
    CROSS JOIN LATERAL jsonb_populate_recordset(NULL::snapshot_order,
                                                e.payload -> 'open_orders') AS o
    WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
      AND e.payload ->> 'snapshot_id' = of_snapshot::text
$$;

COMMENT ON FUNCTION snapshot_orders IS 'The orders that a broker works, as a snapshot says.';

-- Of orders that ended lately, how: what is here did arrive.
CREATE FUNCTION snapshot_closed(of_user uuid, of_account text, of_snapshot uuid)
RETURNS SETOF snapshot_order
LANGUAGE sql STABLE ROWS 1000 SET search_path = public, pg_temp AS $$
    SELECT o.* FROM broker_event e
    CROSS JOIN LATERAL jsonb_populate_recordset(NULL::snapshot_order,
                                                e.payload -> 'closed_orders') AS o
    WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
      AND e.payload ->> 'snapshot_id' = of_snapshot::text
$$;

COMMENT ON FUNCTION snapshot_closed IS
    'The orders that have ended lately, as a snapshot says, if its broker tells them.';

-- A fill of an order that we don't know arrives with the snapshot that tells its terms.
CREATE FUNCTION snapshot_terms(of_user uuid, of_account text, of_ref text)
RETURNS SETOF snapshot_order
LANGUAGE sql STABLE ROWS 1 SET search_path = public, pg_temp AS $$
    SELECT o.* FROM broker_event e
    CROSS JOIN LATERAL jsonb_populate_recordset(
        NULL::snapshot_order, coalesce(e.payload -> 'open_orders', '[]')
                              || coalesce(e.payload -> 'closed_orders', '[]')) AS o
    WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
      AND e.applied_at IS NULL AND o.order_ref = of_ref
    ORDER BY e.number DESC LIMIT 1
$$;

COMMENT ON FUNCTION snapshot_terms IS
    'An order as the newest snapshot says it that waits to be compared; no row where none does.';

-- A connector asks what it must still put into the inbox, which it may not read.
CREATE FUNCTION executions_unheard(of_user uuid, of_account text, kinds text[], executions text[])
RETURNS SETOF bigint
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
    SELECT x.place FROM unnest(kinds, executions) WITH ORDINALITY AS x (kind, execution_id, place)
    WHERE NOT EXISTS (SELECT FROM broker_event e
                      WHERE e.user_id = of_user AND e.account = of_account
                        AND e.execution_id = x.execution_id AND e.kind = x.kind)
    ORDER BY x.place
$$;

COMMENT ON FUNCTION executions_unheard IS
    'The places of executions, busts and commissions that an account''s inbox does not have.';

-- Orders of which the broker has spoken after it took the snapshot: newer news wins.
CREATE FUNCTION snapshot_overtaken(of_user uuid, of_account text, of_snapshot uuid)
RETURNS TABLE (order_ref text)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT DISTINCT e.order_ref
    FROM snapshot_facts(of_user, of_account, of_snapshot) s
    JOIN broker_event e ON e.user_id = of_user AND e.account = of_account
                       AND e.number > s.after_number
    WHERE e.order_ref IS NOT NULL
      AND e.kind IN ('ORDER_STATUS', 'MODIFIED', 'EXECUTION', 'BUST', 'REJECTED',
                     'CANCEL_REJECTED', 'MODIFY_REJECTED')
      AND (e.number > s.first_number OR e.event_at > s.taken_at)
$$;

COMMENT ON FUNCTION snapshot_overtaken IS 'Orders of which there is newer news than a snapshot.';

-- Whether a snapshot can tell what became of a command: nothing of it can be on its way any more.
-- A connection that broke, or whose connector is gone, carries nothing; on one that stands, an
-- answer that has not come for half a minute will not come.
CREATE FUNCTION command_is_settled(c broker_command, asked_at timestamptz, by_holder uuid,
                                   first_number bigint)
RETURNS boolean LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN CASE
        WHEN c.claimed_by IS NULL THEN false
        WHEN c.outcome IS NULL THEN c.claimed_by <> by_holder AND c.claimed_at < asked_at
        WHEN c.outcome <> 'SENT' THEN c.done_at < asked_at
        ELSE c.done_at < asked_at - interval '30 seconds'
             OR c.done_at < asked_at AND EXISTS (
                 SELECT FROM broker_event e
                 WHERE e.user_id = c.user_id AND e.account = c.account AND e.kind = 'CONNECTED'
                   AND e.number < first_number AND e.received_at > c.done_at) END;
END $$;

COMMENT ON FUNCTION command_is_settled IS
    'Whether nothing of a command can still be on its way to the broker that took a snapshot.';

-- --- Orders ---------------------------------------------------------------------------------

CREATE TYPE order_difference AS (
    class           text,
    run_id          uuid,
    order_id        uuid,
    subject         text,
    becomes         text,
    action          text,
    reason          text,
    ours            jsonb,
    brokers         jsonb,
    command_id      uuid,
    outcome         text,
    broker_order_id bigint,
    perm_id         bigint
);

COMMENT ON TYPE order_difference IS
    'An order that we and a broker see differently. becomes: its status then; outcome: that of '
    'the command which asked for it.';

CREATE FUNCTION order_difference_ours(o orders) RETURNS jsonb
LANGUAGE sql STABLE
RETURN jsonb_strip_nulls(jsonb_build_object(
    'status', o.status, 'status_reason', o.status_reason, 'symbol', o.symbol, 'side', o.side,
    'quantity', trim_scale(o.quantity)::text, 'filled', trim_scale(o.filled_quantity)::text,
    'limit_price', trim_scale(o.limit_price)::text, 'stop_price', trim_scale(o.stop_price)::text,
    'account', o.account, 'broker_order_id', o.broker_order_id, 'perm_id', o.perm_id));

COMMENT ON FUNCTION order_difference_ours IS 'An order as we see it, for a difference.';

-- A trailing stop moves at the broker: its price is no term.
CREATE FUNCTION order_has_terms(order_type text, quantity numeric, limit_price numeric,
                                stop_price numeric, t snapshot_order) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN quantity = t.quantity AND limit_price IS NOT DISTINCT FROM t.limit_price
       AND (order_type = 'TRAIL' OR stop_price IS NOT DISTINCT FROM t.stop_price);

COMMENT ON FUNCTION order_has_terms IS 'Whether these are the terms on which a broker works it.';

CREATE FUNCTION order_asked_for(asked broker_command, t snapshot_order) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN asked.kind = 'MODIFY' AND order_has_terms(
    asked.payload ->> 'order_type', (asked.payload ->> 'quantity')::numeric,
    (asked.payload ->> 'limit_price')::numeric, (asked.payload ->> 'stop_price')::numeric, t);

COMMENT ON FUNCTION order_asked_for IS 'Whether a broker works an order as a command asks.';

-- Orders of ours that should be at the broker and that it does not work. Executions that explain it
-- were applied before. Where the broker says how an order ended, so it did; of what it never said a
-- word, the submit never arrived.
CREATE FUNCTION reconcile_missing(of_user uuid, of_account text, of_snapshot uuid)
RETURNS SETOF order_difference
LANGUAGE sql STABLE ROWS 100 SET search_path = public, pg_temp AS $$
    SELECT d.class, o.run_id, o.order_id, o.order_id::text, b.becomes,
           CASE WHEN k.taken THEN 'TERMS_TAKEN'
                WHEN b.becomes IS NOT NULL THEN 'CANCELED'
                WHEN d.class = 'NEVER_ARRIVED' THEN 'KEPT'
                ELSE 'ALERTED' END,
           CASE WHEN z.status IS NOT NULL THEN 'the broker says ' || z.status
                WHEN d.class = 'MISSING_AT_BROKER'
                THEN 'the broker does not work it, and no execution explains that'
                WHEN d.class = 'NEVER_ARRIVED' THEN 'its submit never reached the broker'
                ELSE 'what was asked may still be on its way' END,
           order_difference_ours(o),
           CASE WHEN z.status IS NOT NULL THEN jsonb_strip_nulls(to_jsonb(z)) END,
           CASE WHEN k.taken THEN (l.a).command_id ELSE c.command_id END,
           CASE WHEN d.class = 'NEVER_ARRIVED' THEN d.class WHEN z.status IS NOT NULL THEN 'ARRIVED'
                END, z.broker_order_id, z.perm_id
    FROM snapshot_facts(of_user, of_account, of_snapshot) s
    JOIN orders o ON o.user_id = of_user AND o.account = of_account
                 AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
    LEFT JOIN broker_command c ON c.user_id = of_user AND c.account = of_account
                              AND c.order_id = o.order_id AND c.kind = 'SUBMIT'
    LEFT JOIN snapshot_orders(of_user, of_account, of_snapshot) t
           ON t.order_ref = o.order_id::text
    LEFT JOIN snapshot_closed(of_user, of_account, of_snapshot) z
           ON z.order_ref = o.order_id::text
    LEFT JOIN snapshot_overtaken(of_user, of_account, of_snapshot) n
           ON n.order_ref = o.order_id::text
    -- A modification whose answer was lost: it ended on the terms that were asked for.
    LEFT JOIN LATERAL (
        SELECT a FROM broker_command a
        WHERE z.status IS NOT NULL AND a.user_id = of_user AND a.run_id = o.run_id
          AND a.order_id = o.order_id AND a.account = of_account AND a.kind = 'MODIFY'
          AND a.claimed_by IS NOT NULL
        ORDER BY a.order_version DESC LIMIT 1) l (a) ON true
    CROSS JOIN LATERAL (SELECT coalesce(
        order_asked_for(l.a, z)
        AND NOT order_has_terms(o.order_type, o.quantity, o.limit_price, o.stop_price, z)
        AND (z.filled = o.filled_quantity OR z.filled < o.filled_quantity
             AND z.status <> 'FILLED'), false) AS taken) k
    CROSS JOIN LATERAL (SELECT CASE
        WHEN k.taken THEN 'TERMS_DIFFER'
        WHEN o.status NOT IN ('NEW', 'PENDING', 'PENDING_CANCEL') OR o.filled_quantity > 0
             OR num_nonnulls(o.broker_order_id, o.perm_id) > 0 OR z.status IS NOT NULL
             OR EXISTS (SELECT FROM broker_event e
                        WHERE e.user_id = of_user AND e.account = of_account
                          AND e.order_ref = o.order_id::text
                          AND broker_event_shows_order(e)) THEN 'MISSING_AT_BROKER'
        WHEN command_is_settled(c, s.asked_at, s.holder, s.first_number) THEN 'NEVER_ARRIVED'
        ELSE 'UNDECIDED' END AS class) d
    CROSS JOIN LATERAL (SELECT CASE
        WHEN k.taken AND z.status = 'FILLED' THEN z.status
        WHEN d.class = 'UNDECIDED' OR z.status = 'FILLED' OR z.filled > o.filled_quantity THEN NULL
        WHEN d.class = 'NEVER_ARRIVED' AND o.status <> 'PENDING_CANCEL' THEN NULL
        WHEN z.status = 'EXPIRED' OR z.status = 'REJECTED' AND o.filled_quantity = 0 THEN z.status
        ELSE 'CANCELED' END AS becomes) b
    WHERE t.order_ref IS NULL AND n.order_ref IS NULL
      -- Of what never arrived nothing is missing, but a cancel that came too late may wait for it.
      AND (o.recovered OR z.status IS NOT NULL OR c.claimed_by IS NOT NULL
           AND (o.status = 'PENDING_CANCEL' AND c.outcome = 'NEVER_ARRIVED'
                OR coalesce(c.outcome, 'UNKNOWN') NOT IN ('NEVER_ARRIVED', 'REFUSED')))
$$;

COMMENT ON FUNCTION reconcile_missing IS
    'Orders that we hold for working and a broker does not work; UNDECIDED among them.';

-- What an order of ours that the broker works is, in our words.
CREATE FUNCTION order_status_at_broker(o orders, brokers_status text) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN o.filled_quantity >= o.quantity THEN NULL
            WHEN o.filled_quantity > 0 THEN 'PARTIALLY_FILLED'
            WHEN brokers_status = 'PENDING_SUBMIT'
                 AND o.status IN ('NEW', 'PENDING', brokers_status)
            THEN brokers_status
            ELSE 'ROUTED' END;

COMMENT ON FUNCTION order_status_at_broker IS
    'The status of an order that a broker works, or NULL where its fills say that it is over.';

CREATE FUNCTION order_is_alike(o orders, t snapshot_order, of_account text) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN o.account = of_account AND o.symbol = t.symbol AND o.side = t.side
       AND o.status IN ('PENDING_SUBMIT', 'ROUTED', 'PARTIALLY_FILLED')
       AND o.status = order_status_at_broker(o, t.status)
       AND order_has_terms(o.order_type, o.quantity, o.limit_price, o.stop_price, t)
       AND o.filled_quantity = t.filled
       AND (o.broker_order_id, o.perm_id) IS NOT DISTINCT FROM
           (coalesce(t.broker_order_id, o.broker_order_id), coalesce(t.perm_id, o.perm_id));

COMMENT ON FUNCTION order_is_alike IS 'Whether we and the broker see an order alike.';

-- In what an order differs: its status first, which says what was lost on the way; then the rest.
CREATE FUNCTION order_compare_status(o orders, t snapshot_order, asked broker_command,
                                     is_settled boolean,
                                     OUT class text, OUT becomes text, OUT action text,
                                     OUT reason text)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    becomes := order_status_at_broker(o, t.status);
    class := 'STATUS_DIFFERS';
    action := 'MOVED';
    IF o.status IN ('NEW', 'PENDING') THEN
        class := 'FOUND';
        reason := 'its submit reached the broker, which works it';
    ELSIF o.status IN ('PENDING_CANCEL', 'PENDING_MODIFY') AND NOT is_settled
          AND NOT coalesce(order_asked_for(asked, t), false) THEN
        class := 'UNDECIDED';
        becomes := NULL;
        reason := 'what was asked may still be on its way';
    ELSIF o.status = 'PENDING_CANCEL' THEN
        action := 'CANCEL_SENT';
        reason := 'the cancel never reached the broker, which works it';
    ELSIF o.status = 'PENDING_MODIFY' THEN
        IF order_asked_for(asked, t) THEN
            class := 'TERMS_DIFFER';
            action := 'TERMS_TAKEN';
            reason := 'the modification reached the broker';
        ELSIF order_has_terms(o.order_type, o.quantity, o.limit_price, o.stop_price, t) THEN
            reason := 'the modification never reached the broker';
        ELSE
            class := 'TERMS_DIFFER';
            action := 'ALERTED';
            reason := 'the broker works it on terms that nobody asked for';
        END IF;
    ELSIF o.status = 'FILLED' AND o.filled_quantity < t.quantity AND order_asked_for(asked, t) THEN
        -- Filled by its old terms, since the answer that gave it the new ones was lost.
        class := 'TERMS_DIFFER';
        becomes := 'PARTIALLY_FILLED';
        action := 'TERMS_TAKEN';
        reason := 'the modification reached the broker';
    ELSIF o.status <> coalesce(becomes, '') THEN
        reason := format('we say %s, the broker works it', o.status);
    ELSE
        class := NULL;
    END IF;
    IF class <> 'UNDECIDED' AND NOT EXISTS (SELECT FROM order_transition x
                                            WHERE x.from_status = o.status
                                              AND x.to_status = becomes) THEN
        becomes := NULL;
        action := 'ALERTED';
    END IF;
END $$;

COMMENT ON FUNCTION order_compare_status IS
    'How the status of an order that a broker works differs from ours, what it becomes, and why.';

CREATE FUNCTION order_compare(o orders, t snapshot_order, of_account text, asked broker_command,
                              is_settled boolean)
RETURNS TABLE (class text, becomes text, action text, reason text)
LANGUAGE plpgsql STABLE ROWS 2 SET search_path = public, pg_temp AS $$
DECLARE
    by_status record;
BEGIN
    IF o.account <> of_account THEN
        RETURN QUERY SELECT 'ACCOUNT_DIFFERS', NULL, 'ALERTED',
                            format('it was sent to %s, and %s works it', o.account, of_account);
        RETURN;
    ELSIF o.symbol <> t.symbol THEN
        RETURN QUERY SELECT 'CONTRACT_CHANGED', NULL,
                            CASE WHEN o.status = ANY ('{PENDING_CANCEL,FILLED,CANCELED,REJECTED,'
                                                      'EXPIRED}') THEN 'ALERTED'
                                 ELSE 'CANCEL_SENT' END,
                            format('%s is %s at the broker', o.symbol, t.symbol);
        RETURN;
    END IF;
    by_status := order_compare_status(o, t, asked, is_settled);
    IF by_status.class IS NOT NULL THEN
        RETURN QUERY SELECT by_status.class, by_status.becomes, by_status.action, by_status.reason;
    END IF;
    IF o.status <> 'PENDING_MODIFY' AND by_status.action IS DISTINCT FROM 'TERMS_TAKEN'
       AND (o.side <> t.side OR NOT order_has_terms(
           o.order_type, o.quantity, o.limit_price, o.stop_price, t)) THEN
        RETURN QUERY SELECT 'TERMS_DIFFER', NULL,
            CASE WHEN o.side = t.side AND order_asked_for(asked, t)
                      AND o.status IN ('ROUTED', 'PARTIALLY_FILLED') THEN 'TERMS_TAKEN'
                 ELSE 'ALERTED' END,
            CASE WHEN order_asked_for(asked, t) THEN 'the modification reached the broker'
                 ELSE 'the broker works it on terms that nobody asked for' END;
    END IF;
    IF o.filled_quantity <> t.filled THEN
        RETURN QUERY SELECT 'FILLED_DIFFERS', NULL, 'ALERTED',
                            'its executions do not add up to what the broker says is filled';
    END IF;
    IF o.status NOT IN ('NEW', 'PENDING')
       AND (o.broker_order_id, o.perm_id) IS DISTINCT FROM
           (coalesce(t.broker_order_id, o.broker_order_id), coalesce(t.perm_id, o.perm_id)) THEN
        RETURN QUERY SELECT 'IDS_DIFFER', NULL, 'RECORDED', 'the broker has other ids for it now';
    END IF;
END $$;

COMMENT ON FUNCTION order_compare IS
    'In what an order of ours and the broker''s differ; one row for each thing.';

-- An order may also differ in several ways at once. The run's lock order keeps moves of one order
-- apart; here nothing is locked.
CREATE FUNCTION reconcile_working(of_user uuid, of_account text, of_snapshot uuid)
RETURNS SETOF order_difference
LANGUAGE sql STABLE ROWS 100 SET search_path = public, pg_temp AS $$
    SELECT d.class, o.run_id, o.order_id, o.order_id::text, d.becomes, d.action, d.reason,
           order_difference_ours(o), jsonb_strip_nulls(to_jsonb(t)), asked.command_id,
           CASE WHEN d.action = 'TERMS_TAKEN' THEN 'ARRIVED'
                WHEN d.class = 'STATUS_DIFFERS' AND o.status IN ('PENDING_CANCEL', 'PENDING_MODIFY')
                THEN 'NEVER_ARRIVED' END,
           t.broker_order_id, t.perm_id
    FROM snapshot_facts(of_user, of_account, of_snapshot) s
    CROSS JOIN snapshot_orders(of_user, of_account, of_snapshot) t
    JOIN orders o ON o.user_id = of_user AND o.order_id::text = t.order_ref AND o.broker <> 'paper'
    LEFT JOIN snapshot_overtaken(of_user, of_account, of_snapshot) n ON n.order_ref = t.order_ref
    -- What was asked of it last.
    LEFT JOIN LATERAL (
        SELECT a FROM broker_command a
        WHERE a.user_id = of_user AND a.run_id = o.run_id AND a.order_id = o.order_id
          AND a.account = of_account
          AND a.kind = CASE WHEN o.status = 'PENDING_CANCEL' THEN 'CANCEL' ELSE 'MODIFY' END
        ORDER BY a.order_version DESC LIMIT 1) l (a) ON true
    CROSS JOIN LATERAL (SELECT (l.a).*) asked
    CROSS JOIN LATERAL order_compare(
        o, t, of_account, l.a, asked.command_id IS NULL
        OR command_is_settled(l.a, s.asked_at, s.holder, s.first_number)) d
    WHERE n.order_ref IS NULL AND NOT order_is_alike(o, t, of_account)
$$;

COMMENT ON FUNCTION reconcile_working IS
    'Orders that a broker works and that we see differently; UNDECIDED among them.';

-- Commands in doubt of orders that we and the broker see alike, so that nothing else tells what
-- became of them: whatever is asked of those orders next waits for it.
CREATE FUNCTION reconcile_commands(of_user uuid, of_account text, of_snapshot uuid)
RETURNS TABLE (command_id uuid, outcome text)
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    SELECT c.command_id,
           CASE WHEN c.kind = 'SUBMIT' OR order_asked_for(c, t) THEN 'ARRIVED'
                WHEN t.order_ref IS NOT NULL THEN 'NEVER_ARRIVED'
                -- It is over, and nobody will know.
                ELSE 'UNKNOWN' END
    FROM snapshot_facts(of_user, of_account, of_snapshot) s
    JOIN broker_command c ON c.user_id = of_user AND c.account = of_account
                         AND c.claimed_by IS NOT NULL
                         AND coalesce(c.outcome, 'UNKNOWN') = 'UNKNOWN'
    JOIN orders o ON o.user_id = of_user AND o.run_id = c.run_id AND o.order_id = c.order_id
    LEFT JOIN snapshot_orders(of_user, of_account, of_snapshot) t
           ON t.order_ref = o.order_id::text
    LEFT JOIN snapshot_overtaken(of_user, of_account, of_snapshot) n
           ON n.order_ref = o.order_id::text
    WHERE command_is_settled(c, s.asked_at, s.holder, s.first_number)
      AND CASE
          WHEN c.kind = 'SUBMIT' THEN t.order_ref IS NOT NULL OR EXISTS (
              SELECT FROM broker_event e
              WHERE e.user_id = of_user AND e.account = of_account
                AND e.order_ref = o.order_id::text AND broker_event_shows_order(e))
          -- What is still asked for is judged with the order itself.
          ELSE o.status <> 'PENDING_' || c.kind AND n.order_ref IS NULL
               AND (t.order_ref IS NOT NULL
                    OR o.status IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')) END
$$;

COMMENT ON FUNCTION reconcile_commands IS
    'What became of commands in doubt of orders that do not differ, as a snapshot shows.';

-- The run that takes up what turns out to be at an account, as with fills (engine/inbox.py).
CREATE FUNCTION account_run(of_user uuid, of_account text) RETURNS uuid
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT r.run_id FROM strategy_run r
    JOIN run_route t ON t.user_id = of_user AND t.run_id = r.run_id AND t.account = of_account
    WHERE r.user_id = of_user AND r.status IN ('RUNNING', 'STOPPING')
    ORDER BY r.status, r.run_id LIMIT 1
$$;

COMMENT ON FUNCTION account_run IS
    'The run with a route to an account that takes up orders found there, or NULL.';

-- Orders at the broker that none of our runs has.
CREATE FUNCTION reconcile_strangers(of_user uuid, of_account text, of_snapshot uuid)
RETURNS SETOF order_difference
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    SELECT CASE WHEN k.is_orphan THEN 'ORPHAN' ELSE 'FOREIGN' END, r.run_id,
           CASE WHEN k.is_orphan THEN t.order_ref::uuid END,
           left(coalesce(nullif(t.order_ref, ''), 'perm ' || nullif(t.perm_id, 0),
                         'order ' || t.broker_order_id, 'unnamed'), 200),
           CASE WHEN k.is_orphan AND r.run_id IS NOT NULL THEN CASE
               WHEN t.status = 'PENDING_SUBMIT' THEN t.status ELSE 'ROUTED' END END,
           CASE WHEN NOT k.is_orphan THEN 'ALERTED' WHEN r.run_id IS NULL THEN 'HELD'
                ELSE 'ADOPTED' END,
           CASE WHEN NOT k.is_orphan THEN 'it is not ours'
                WHEN r.run_id IS NULL THEN 'it is ours, and no run takes it up'
                ELSE 'it is ours, and we did not know it' END,
           NULL::jsonb, jsonb_strip_nulls(to_jsonb(t)), NULL::uuid, NULL::text, t.broker_order_id,
           t.perm_id
    FROM snapshot_orders(of_user, of_account, of_snapshot) t
    LEFT JOIN snapshot_overtaken(of_user, of_account, of_snapshot) n ON n.order_ref = t.order_ref
    LEFT JOIN orders o ON o.user_id = of_user AND o.order_id::text = t.order_ref
                      AND o.broker <> 'paper'
    CROSS JOIN (SELECT account_run(of_user, of_account)) r (run_id)
    CROSS JOIN LATERAL (SELECT coalesce(
        t.ours AND event_order_id(t.order_ref) IS NOT NULL AND length(t.order_ref) = 36
        AND t.quantity > 0 AND t.side IN ('BUY', 'SELL')
        AND t.order_type IN ('MARKET', 'LIMIT', 'STOP', 'STOP_LIMIT', 'TRAIL'), false)
    ) k (is_orphan)
    WHERE o.order_id IS NULL AND n.order_ref IS NULL
$$;

COMMENT ON FUNCTION reconcile_strangers IS
    'Orders that a broker works and no run of ours has: ORPHAN where they are ours, else FOREIGN.';

-- What the ledger makes of orders: one pass, for as many as differ.
CREATE FUNCTION orders_derived(of_user uuid, of_orders uuid[])
RETURNS TABLE (order_id uuid, derived jsonb)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    WITH told AS (
        SELECT o.order_id, l.seq, l.event_type, l.payload,
               l.event_type NOT IN ('EXECUTION', 'ORDER_MODIFIED', 'ORDER_RESTATED',
                                    'ORDER_ID_REUSE', 'ORDER_ID_WRAP') AS is_move
        FROM orders o
        JOIN event_ledger l ON l.user_id = of_user AND l.run_id = o.run_id
                           AND left(l.subject, 36) = o.order_id::text COLLATE "C"
        WHERE o.user_id = of_user AND o.order_id = ANY (of_orders)
          AND (l.event_type = 'EXECUTION' OR starts_with(l.event_type, 'ORDER_'))
    ), summed AS (
        SELECT t.order_id,
               coalesce(sum((t.payload ->> 'quantity')::numeric)
                        FILTER (WHERE t.event_type = 'EXECUTION'), 0) AS filled,
               max(t.seq) FILTER (WHERE t.event_type = 'EXECUTION') AS filled_seq,
               (array_agg(t.payload ->> 'quantity' ORDER BY t.seq DESC)
                FILTER (WHERE t.event_type <> 'EXECUTION' AND t.payload ? 'quantity'))[1]::numeric
                   AS quantity,
               max(t.seq) FILTER (WHERE t.is_move) AS moved_seq,
               (array_agg(substr(t.event_type, 7) ORDER BY t.seq DESC)
                FILTER (WHERE t.is_move))[1] AS status
        FROM told t GROUP BY t.order_id
    )
    SELECT s.order_id, jsonb_build_object(
        'filled', trim_scale(s.filled)::text, 'quantity', trim_scale(s.quantity)::text,
        'status', CASE
            WHEN s.filled_seq > s.moved_seq AND s.filled >= s.quantity THEN 'FILLED'
            WHEN s.filled_seq > s.moved_seq AND s.status NOT IN ('PENDING_CANCEL', 'PENDING_MODIFY')
            THEN CASE WHEN s.filled > 0 THEN 'PARTIALLY_FILLED' ELSE 'ROUTED' END
            WHEN s.status = 'PLACED' THEN 'NEW' ELSE s.status END)
    FROM summed s
$$;

COMMENT ON FUNCTION orders_derived IS 'Status and fills of orders as the ledger tells them.';

-- Contracts that are no longer what they were, and orders in them of which nothing else says that
-- they are over.
CREATE FUNCTION reconcile_contracts(of_user uuid, of_account text, of_snapshot uuid)
RETURNS SETOF order_difference
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    WITH changed AS (
        SELECT e.number, e.received_at, e.payload
        FROM snapshot_facts(of_user, of_account, of_snapshot) s
        JOIN broker_event e ON e.user_id = of_user AND e.account = of_account
                           AND e.kind = 'CONTRACT_CHANGED' AND e.number < s.first_number
        WHERE e.number > coalesce((SELECT max(r.up_to_number) FROM reconciliation r
                                   WHERE r.user_id = of_user AND r.account = of_account), 0)
    )
    SELECT 'CONTRACT_CHANGED', account_run(of_user, of_account), NULL::uuid,
           c.payload ->> 'symbol', NULL, 'ALERTED', 'it is ' || (c.payload ->> 'new_symbol')
           || ' from now on', NULL::jsonb, c.payload, NULL::uuid, NULL, NULL::bigint, NULL::bigint
    FROM changed c
    UNION ALL
    SELECT DISTINCT 'CONTRACT_CHANGED', o.run_id, o.order_id, o.order_id::text, NULL, 'CANCEL_SENT',
           'its symbol is another from now on', order_difference_ours(o), NULL::jsonb, NULL::uuid,
           NULL, NULL::bigint, NULL::bigint
    FROM changed c
    JOIN orders o ON o.user_id = of_user AND o.account = of_account
                 AND o.symbol = c.payload ->> 'symbol' AND o.recorded_at < c.received_at
                 AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED', 'PENDING_CANCEL')
$$;

COMMENT ON FUNCTION reconcile_contracts IS
    'Symbols that have changed since the last reconciliation, and the open orders in them.';

-- --- Executions, positions, cash ------------------------------------------------------------

-- What the broker executed and our books lack, of what came since the last reconciliation.
CREATE FUNCTION reconcile_executions(of_user uuid, of_account text, of_snapshot uuid)
RETURNS TABLE (subject text, ours jsonb, brokers jsonb, derived jsonb)
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    SELECT left(e.execution_id, 200), NULL::jsonb,
           jsonb_build_object('order_ref', e.order_ref, 'event_at', event_moment(e.event_at))
           || e.payload, NULL::jsonb
    FROM snapshot_facts(of_user, of_account, of_snapshot) s
    JOIN broker_event e ON e.user_id = of_user AND e.account = of_account
                       AND e.number < s.first_number
    LEFT JOIN execution x ON x.user_id = of_user AND x.execution_id = e.execution_id
                         AND x.order_id::text = e.order_ref
    WHERE e.kind = 'EXECUTION' AND e.finding IN ('NEW', 'CORRECTION', 'ORPHAN', 'HELD')
      AND x.execution_id IS NULL
      AND e.number > coalesce((SELECT max(r.up_to_number) FROM reconciliation r
                               WHERE r.user_id = of_user AND r.account = of_account), 0)
$$;

COMMENT ON FUNCTION reconcile_executions IS
    'Executions that a broker told and that are in no run''s books.';

CREATE AGGREGATE numeric_product(factor numeric) (
    SFUNC = numeric_mul, STYPE = numeric, INITCOND = '1');

COMMENT ON AGGREGATE numeric_product(numeric) IS 'The product of numbers; 1 of none.';

-- Executions of an account in today's units: those from before a split count as many more.
CREATE FUNCTION account_executions(of_user uuid, of_account text)
RETURNS TABLE (run_id uuid, execution_id text, symbol text, units numeric, flow numeric,
               currency text, event_at timestamptz)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT e.run_id, e.execution_id, e.symbol,
           CASE WHEN e.side = 'BUY' THEN e.quantity ELSE -e.quantity END * coalesce(
               (SELECT numeric_product(a.numerator) / numeric_product(a.denominator)
                FROM split_applied p
                JOIN corporate_action a ON a.symbol = p.symbol AND a.ex_date = p.ex_date
                                       AND a.kind = p.kind
                WHERE p.user_id = of_user AND p.run_id = e.run_id AND p.symbol = e.symbol
                  AND p.logical_time > e.logical_time HAVING count(*) > 0), 1),
           execution_cash_flow(e.side, e.quantity, e.price, e.commission), r.currency, e.event_at
    FROM orders o
    JOIN execution e ON e.user_id = of_user AND e.run_id = o.run_id AND e.order_id = o.order_id
    JOIN strategy_run r ON r.user_id = of_user AND r.run_id = o.run_id
    WHERE o.user_id = of_user AND o.account = of_account
$$;

COMMENT ON FUNCTION account_executions IS
    'The executions of all orders that went to an account, as units held and money.';

-- What the ledgers of its runs tell of an account: units by symbol, money by currency. A ledger
-- knows no split of an execution; where one was applied, the runs' positions were proven with it.
CREATE FUNCTION account_told(of_user uuid, of_account text)
RETURNS TABLE (symbol text, units numeric, currency text, flow numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT l.payload ->> 'symbol',
           CASE WHEN l.payload ->> 'side' = 'BUY' THEN 1 ELSE -1 END
           * (l.payload ->> 'quantity')::numeric,
           CASE WHEN l.event_type = 'COMMISSION' THEN l.payload ->> 'currency' ELSE r.currency END,
           CASE WHEN l.event_type = 'COMMISSION' THEN -(l.payload ->> 'amount')::numeric
                ELSE event_cash_flow(l.event_type, l.payload) END
    FROM run_route t
    JOIN strategy_run r ON r.user_id = of_user AND r.run_id = t.run_id
    JOIN event_ledger l ON l.user_id = of_user AND l.run_id = t.run_id
                       AND l.event_type IN ('EXECUTION', 'COMMISSION')
    LEFT JOIN execution e ON l.event_type = 'COMMISSION' AND e.user_id = of_user
                         AND e.run_id = t.run_id AND e.execution_id = l.subject COLLATE "default"
    JOIN orders o ON o.user_id = of_user AND o.run_id = t.run_id AND o.account = of_account
                 AND o.order_id = coalesce(e.order_id, event_order_id(l.subject))
    WHERE t.user_id = of_user AND t.account = of_account
$$;

COMMENT ON FUNCTION account_told IS 'What the ledger tells of an account''s executions.';

-- A snapshot stands between fills: it agrees with our books as of its own time, or as of its place
-- among what was heard.
CREATE FUNCTION reconcile_positions(of_user uuid, of_account text, of_snapshot uuid)
RETURNS TABLE (subject text, ours jsonb, brokers jsonb, derived jsonb)
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    WITH ours AS (
        SELECT x.symbol, trunc(sum(x.units), 8) AS quantity,
               trunc(coalesce(sum(x.units) FILTER (WHERE x.event_at <= s.taken_at), 0), 8)
                   AS earlier
        FROM snapshot_facts(of_user, of_account, of_snapshot) s
        CROSS JOIN account_executions(of_user, of_account) x
        GROUP BY x.symbol
    ), theirs AS (
        SELECT p.symbol, sum(p.quantity) AS quantity
        FROM broker_event e
        CROSS JOIN LATERAL jsonb_to_recordset(e.payload -> 'positions')
            AS p (symbol text, quantity numeric)
        WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
          AND e.payload ->> 'snapshot_id' = of_snapshot::text
        GROUP BY p.symbol
    ), told AS (
        SELECT t.symbol, sum(t.units) AS quantity FROM account_told(of_user, of_account) t
        WHERE t.symbol IS NOT NULL GROUP BY t.symbol
    )
    SELECT symbol, to_jsonb(trim_scale(coalesce(o.quantity, 0))::text),
           to_jsonb(trim_scale(coalesce(t.quantity, 0))::text),
           to_jsonb(trim_scale(coalesce(d.quantity, 0))::text)
    FROM ours o FULL JOIN theirs t USING (symbol) LEFT JOIN told d USING (symbol)
    WHERE coalesce(t.quantity, 0) NOT IN (coalesce(o.quantity, 0), coalesce(o.earlier, 0))
    ORDER BY symbol
$$;

COMMENT ON FUNCTION reconcile_positions IS
    'Symbols of which an account holds something else than our executions add up to.';

CREATE FUNCTION reconcile_cash(of_user uuid, of_account text, of_snapshot uuid)
RETURNS TABLE (subject text, ours jsonb, brokers jsonb, derived jsonb)
LANGUAGE sql STABLE ROWS 2 SET search_path = public, pg_temp AS $$
    WITH flows AS (
        SELECT x.currency, x.flow, x.event_at FROM account_executions(of_user, of_account) x
        UNION ALL
        SELECT c.currency, -c.amount, c.event_at
        FROM account_executions(of_user, of_account) x
        JOIN execution_commission c ON c.user_id = of_user AND c.run_id = x.run_id
                                   AND c.execution_id = x.execution_id
        UNION ALL
        SELECT a.currency, a.opening_cash, '-infinity' FROM broker_account a
        WHERE a.user_id = of_user AND a.account = of_account
    ), ours AS (
        SELECT f.currency, sum(f.flow) AS cash,
               coalesce(sum(f.flow) FILTER (WHERE f.event_at <= s.taken_at), 0) AS earlier
        FROM snapshot_facts(of_user, of_account, of_snapshot) s CROSS JOIN flows f
        GROUP BY f.currency
    ), theirs AS (
        SELECT c.currency, max(c.amount::numeric) AS cash
        FROM broker_event e
        CROSS JOIN LATERAL jsonb_each_text(e.payload -> 'cash') AS c (currency, amount)
        WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
          AND e.payload ->> 'snapshot_id' = of_snapshot::text
        GROUP BY c.currency
    ), told AS (
        SELECT f.currency, sum(f.flow) AS cash
        FROM (SELECT t.currency, t.flow FROM account_told(of_user, of_account) t
              UNION ALL
              SELECT a.currency, a.opening_cash FROM broker_account a
              WHERE a.user_id = of_user AND a.account = of_account) f
        GROUP BY f.currency
    )
    SELECT currency, to_jsonb(trim_scale(coalesce(o.cash, 0))::text),
           to_jsonb(trim_scale(coalesce(t.cash, 0))::text),
           to_jsonb(trim_scale(coalesce(d.cash, 0))::text)
    FROM ours o FULL JOIN theirs t USING (currency) LEFT JOIN told d USING (currency)
    WHERE coalesce(t.cash, 0) NOT IN (coalesce(o.cash, 0), coalesce(o.earlier, 0))
    ORDER BY currency
$$;

COMMENT ON FUNCTION reconcile_cash IS
    'Currencies of which an account holds something else than its flows add up to.';

-- --- Silence, and other routes --------------------------------------------------------------

-- Orders that the broker works, by what we know, and of which nothing was heard for too long:
-- neither a word of their own nor a comparison with all that it works.
CREATE FUNCTION orders_stale(of_user uuid, of_account text, at timestamptz)
RETURNS TABLE (run_id uuid, order_id uuid, heard_at timestamptz)
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    SELECT o.run_id, o.order_id, h.heard_at
    FROM broker_account a
    JOIN orders o ON o.user_id = of_user AND o.account = of_account
    LEFT JOIN broker_command c ON c.user_id = of_user AND c.account = of_account
                              AND c.order_id = o.order_id AND c.kind = 'SUBMIT'
    CROSS JOIN (SELECT max(r.finished_at) FROM reconciliation r
                WHERE r.user_id = of_user AND r.account = of_account) k (compared_at)
    CROSS JOIN LATERAL (
        SELECT greatest(k.compared_at, c.claimed_at,
                        CASE WHEN o.recovered THEN o.recorded_at END,
                        (SELECT max(e.received_at) FROM broker_event e
                         WHERE e.user_id = of_user AND e.account = of_account
                           AND e.order_ref = o.order_id::text)) AS heard_at) h
    WHERE a.user_id = of_user AND a.account = of_account
      AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
      AND NOT o.pending_reconcile AND (o.recovered OR c.claimed_by IS NOT NULL
          AND coalesce(c.outcome, '') NOT IN ('NEVER_ARRIVED', 'REFUSED'))
      AND h.heard_at < at - make_interval(secs => a.stale_seconds)
$$;

COMMENT ON FUNCTION orders_stale IS
    'Working orders of an account of which nothing was heard for its stale_seconds.';

-- Whether an account can be sent to. What has no connector, or one that has lost its broker, and
-- has been so for too long, is down.
CREATE FUNCTION account_is_up(of_user uuid, of_account text, at timestamptz) RETURNS boolean
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT EXISTS (SELECT FROM broker_lease l
                   WHERE l.user_id = of_user AND l.account = of_account
                     AND l.connected AND l.expires_at > at)
$$;

COMMENT ON FUNCTION account_is_up IS 'Whether an account''s connector is there and connected.';

-- Orders that certainly never reached their account, each with the first account of its run, after
-- that one, that is up and has not had it.
CREATE FUNCTION orders_to_reroute(of_user uuid, at timestamptz, down_seconds integer)
RETURNS TABLE (run_id uuid, order_id uuid, account text, next_account text, why text)
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    SELECT o.run_id, o.order_id, o.account, n.account,
           CASE WHEN c.outcome IS NULL THEN 'ACCOUNT_DOWN' ELSE c.outcome END
    FROM strategy_run r
    JOIN orders o ON o.user_id = of_user AND o.run_id = r.run_id
    JOIN broker_command c ON c.user_id = of_user AND c.account = o.account
                         AND c.order_id = o.order_id AND c.kind = 'SUBMIT'
    JOIN run_route h ON h.user_id = of_user AND h.run_id = o.run_id AND h.account = o.account
    CROSS JOIN LATERAL (
        SELECT t.account FROM run_route t
        WHERE t.user_id = of_user AND t.run_id = o.run_id AND t.preference > h.preference
          AND account_is_up(of_user, t.account, at)
          AND NOT EXISTS (SELECT FROM broker_command s
                          WHERE s.user_id = of_user AND s.account = t.account
                            AND s.order_id = o.order_id AND s.kind = 'SUBMIT')
        ORDER BY t.preference LIMIT 1) n
    WHERE r.user_id = of_user AND r.status = 'RUNNING' AND r.broker <> 'paper'
      AND o.status IN ('NEW', 'PENDING') AND o.filled_quantity = 0
      AND (c.outcome = 'NEVER_ARRIVED'
           OR c.outcome IS NULL AND c.claimed_by IS NULL
              AND coalesce(c.not_before, c.created_at)
                  <= at - make_interval(secs => down_seconds)
              AND NOT account_is_up(of_user, o.account, at)
              AND NOT EXISTS (SELECT FROM broker_lease l
                              WHERE l.user_id = of_user AND l.account = o.account
                                AND greatest(l.last_heard_at, l.taken_at)
                                    > at - make_interval(secs => down_seconds)))
    ORDER BY o.order_id
$$;

COMMENT ON FUNCTION orders_to_reroute IS
    'Orders that never reached their account, and the account that takes them over.';

-- Orders that their broker's adapter refused to send, and why, as their connector says.
CREATE FUNCTION orders_send_refused(of_user uuid)
RETURNS TABLE (run_id uuid, order_id uuid, account text, error text)
LANGUAGE sql STABLE ROWS 10 SET search_path = public, pg_temp AS $$
    SELECT o.run_id, o.order_id, o.account,
           (SELECT e.payload ->> 'error' FROM broker_event e
            WHERE e.user_id = of_user AND e.account = o.account
              AND e.order_ref = o.order_id::text AND e.kind = 'SEND_FAILED'
              AND e.payload ->> 'command_id' = c.command_id::text
            ORDER BY e.number DESC LIMIT 1)
    FROM strategy_run r
    JOIN orders o ON o.user_id = of_user AND o.run_id = r.run_id
    JOIN broker_command c ON c.user_id = of_user AND c.account = o.account
                         AND c.order_id = o.order_id AND c.kind = 'SUBMIT'
    WHERE r.user_id = of_user AND r.status IN ('RUNNING', 'STOPPING') AND r.broker <> 'paper'
      AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED') AND o.filled_quantity = 0
      AND c.outcome = 'REFUSED'
      -- Whatever a connector says: what the broker speaks of, it has.
      AND NOT EXISTS (SELECT FROM broker_event e
                      WHERE e.user_id = of_user AND e.account = o.account
                        AND e.order_ref = o.order_id::text AND broker_event_shows_order(e))
    ORDER BY o.order_id
$$;

COMMENT ON FUNCTION orders_send_refused IS
    'Open orders that certainly never went out: their broker''s adapter refused to send them.';

-- The next account is sent what the first never had.
CREATE FUNCTION orders_send_rerouted() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO broker_command (user_id, account, priority, kind, run_id, order_id, order_version,
                                payload, not_before)
    VALUES (NEW.user_id, NEW.account, CASE WHEN NEW.purpose = 'FLATTEN' THEN 0 ELSE 2 END,
            'SUBMIT', NEW.run_id, NEW.order_id, NEW.version, orders_command_payload(NEW),
            orders_not_before(NEW));
    RETURN NULL;
END $$;

COMMENT ON FUNCTION orders_send_rerouted IS
    'Trigger: an order that another account takes over goes into that one''s outbox.';

CREATE TRIGGER orders_m_send_rerouted AFTER UPDATE ON orders
    FOR EACH ROW WHEN (NEW.broker <> 'paper' AND NEW.account IS DISTINCT FROM OLD.account)
    EXECUTE FUNCTION orders_send_rerouted();

-- --- What the inbox bears out ---------------------------------------------------------------

-- What a broker has is over when the broker says so, whoever writes it: by a word about the order,
-- or by a snapshot that does not tell of it. Statements are proven as a whole, for ten orders or
-- ten thousand.

-- The last one that was compared, and any since.
CREATE FUNCTION snapshots_whole(of_user uuid, of_account text)
RETURNS TABLE (snapshot_id uuid, received_at timestamptz, asked_at timestamptz)
LANGUAGE sql STABLE ROWS 2 SET search_path = public, pg_temp AS $$
    SELECT s.snapshot_id, s.received_at, c.claimed_at
    FROM (SELECT (e.payload ->> 'snapshot_id')::uuid AS snapshot_id,
                 min(e.received_at) AS received_at
          FROM broker_event e
          WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'SNAPSHOT'
            AND e.number > coalesce((SELECT r.up_to_number FROM reconciliation r
                                     WHERE r.user_id = of_user AND r.account = of_account
                                     ORDER BY r.up_to_number DESC OFFSET 1 LIMIT 1), 0)
          GROUP BY 1
          HAVING count(DISTINCT e.payload ->> 'part') = max((e.payload ->> 'parts')::integer)) s
    LEFT JOIN broker_command c ON c.user_id = of_user AND c.account = of_account
                              AND c.command_id = s.snapshot_id
$$;

COMMENT ON FUNCTION snapshots_whole IS
    'The newest whole snapshots of an account, and when they were asked for and received.';

CREATE FUNCTION broker_event_ends_order(kind text, payload jsonb) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN kind = 'ORDER_STATUS'
            THEN payload ->> 'status' IN ('CANCELED', 'EXPIRED', 'INACTIVE', 'REJECTED')
            WHEN kind = 'CANCEL_REJECTED'
            THEN payload ->> 'code' IN ('ALREADY_CANCELED', 'INACTIVE')
            ELSE kind = 'REJECTED' END;

COMMENT ON FUNCTION broker_event_ends_order IS
    'Whether a broker''s word says that an order is over.';

-- What was filled in whole and is taken back is not worked again: the reversal itself is proven.
CREATE FUNCTION order_end_is_said(o orders) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN EXISTS (SELECT FROM broker_event b
                   WHERE b.user_id = o.user_id AND b.account = o.account
                     AND b.order_ref = o.order_id::text
                     AND broker_event_ends_order(b.kind, b.payload))
        OR o.reject_code = 'SEND_REFUSED' AND EXISTS (
                   SELECT FROM broker_command c
                   WHERE c.user_id = o.user_id AND c.account = o.account
                     AND c.order_id = o.order_id AND c.kind = 'SUBMIT' AND c.outcome = 'REFUSED')
        OR EXISTS (SELECT FROM execution e
                   WHERE e.user_id = o.user_id AND e.run_id = o.run_id
                     AND e.order_id = o.order_id AND e.reverses IS NOT NULL);
END $$;

COMMENT ON FUNCTION order_end_is_said IS
    'Whether an order''s broker has said, by our own reference, that it is over, or its adapter '
    'that it can not be sent.';

-- Since when a broker may have an order; NULL where it certainly has not.
CREATE FUNCTION order_at_broker_since(o orders, OUT since timestamptz, OUT is_heard boolean)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    SELECT c.claimed_at INTO since FROM broker_command c
    WHERE c.user_id = o.user_id AND c.account = o.account AND c.order_id = o.order_id
      AND c.kind = 'SUBMIT' AND c.claimed_by IS NOT NULL
      AND coalesce(c.outcome NOT IN ('NEVER_ARRIVED', 'REFUSED'), true);
    is_heard := o.recovered OR EXISTS (
        SELECT FROM broker_event b
        WHERE b.user_id = o.user_id AND b.account = o.account
          AND b.order_ref = o.order_id::text AND b.kind NOT IN ('THROTTLED', 'SEND_FAILED'));
    IF o.recovered THEN
        since := coalesce((SELECT min(b.received_at) FROM broker_event b
                           WHERE b.user_id = o.user_id AND b.account = o.account
                             AND b.order_ref = o.order_id::text), '-infinity');
    END IF;
END $$;

COMMENT ON FUNCTION order_at_broker_since IS
    'Since when a broker may have an order, or NULL, and whether it has spoken of it.';

-- What the broker never spoke of may be on its way while a snapshot is taken: it must have been
-- asked afterwards. What never went out is over when we say so, but not in the broker's name.
CREATE FUNCTION orders_prove_end() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    unsaid uuid;
BEGIN
    IF NOT EXISTS (SELECT FROM new_rows n
                   WHERE n.user_id IS NOT NULL AND n.broker <> 'paper'
                     AND n.status IN ('CANCELED', 'EXPIRED', 'REJECTED')) THEN
        RETURN NULL;
    END IF;
    WITH ended AS MATERIALIZED (
        SELECT n.user_id, n.run_id, n.order_id, n.account, h.since, h.is_heard
        FROM new_rows n
        JOIN old_rows w ON w.user_id = n.user_id AND w.run_id = n.run_id
                       AND w.order_id = n.order_id AND w.status <> n.status
        CROSS JOIN LATERAL order_at_broker_since(n) h
        WHERE n.broker <> 'paper' AND n.status IN ('CANCELED', 'EXPIRED', 'REJECTED')
          AND (h.since IS NOT NULL OR n.reject_source = 'BROKER') AND NOT order_end_is_said(n)
    ), shown AS MATERIALIZED (
        SELECT a.user_id, a.account, s.snapshot_id, s.received_at, s.asked_at
        FROM (SELECT DISTINCT user_id, account FROM ended) a
        CROSS JOIN LATERAL snapshots_whole(a.user_id, a.account) s
    ), working AS MATERIALIZED (
        SELECT s.user_id, s.account, s.snapshot_id, t.order_ref
        FROM shown s
        CROSS JOIN LATERAL snapshot_orders(s.user_id, s.account, s.snapshot_id) t
    )
    SELECT e.order_id INTO unsaid
    FROM ended e
    JOIN orders o ON o.user_id = e.user_id AND o.run_id = e.run_id AND o.order_id = e.order_id
    WHERE NOT EXISTS (
            SELECT FROM shown s
            WHERE s.user_id = e.user_id AND s.account = e.account AND s.received_at >= e.since
              AND (e.is_heard OR s.asked_at > e.since)
              AND NOT EXISTS (SELECT FROM working t
                              WHERE t.user_id = e.user_id AND t.account = e.account
                                AND t.snapshot_id = s.snapshot_id
                                AND t.order_ref = e.order_id::text))
      -- A word without our reference, which is just being applied.
      AND NOT EXISTS (SELECT FROM broker_event b
                      WHERE b.user_id = e.user_id AND b.account = e.account
                        AND b.applied_at IS NULL AND broker_event_ends_order(b.kind, b.payload)
                        AND broker_event_is_of_order(b, o))
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'no broker has said that order % is over', unsaid
            USING ERRCODE = '23T08', CONSTRAINT = 'orders_end_said_by_broker', TABLE = 'orders',
                  COLUMN = 'status',
                  HINT = 'Call order_cancel(); what a broker may have is over when it says so.';
    END IF;
    RETURN NULL;
END $$;

COMMENT ON FUNCTION orders_prove_end IS
    'Trigger: an order that a broker may have is over when the broker''s words show it, and one is '
    'rejected by a broker only if it, or its adapter, has said so.';

CREATE TRIGGER orders_m_prove_end AFTER UPDATE ON orders
    REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION orders_prove_end();

-- Whose order a word without our reference means, its ids say: who could forge one of them could
-- have a stranger's fills booked. A word is of its order by our reference, by an execution that is
-- booked, or by the other of its ids, which is proven.
CREATE FUNCTION order_broker_id_is_said(m order_broker_id) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN EXISTS (
            SELECT FROM broker_event b
            WHERE b.user_id = m.user_id AND b.account = m.account
              AND b.order_ref = m.order_id::text
              AND (coalesce(b.broker_order_id, 0), coalesce(b.perm_id, 0))
                  = (m.broker_order_id, m.perm_id))
        OR EXISTS (
            SELECT FROM execution e
            JOIN broker_event b ON b.user_id = m.user_id AND b.account = m.account
                               AND b.execution_id = e.execution_id
            WHERE e.user_id = m.user_id AND e.run_id = m.run_id AND e.order_id = m.order_id
              AND (coalesce(b.broker_order_id, 0), coalesce(b.perm_id, 0))
                  = (m.broker_order_id, m.perm_id));
END $$;

COMMENT ON FUNCTION order_broker_id_is_said IS
    'Whether a broker''s word about an order, or about an execution of it, gives it these ids.';

CREATE FUNCTION order_broker_id_prove() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    unsaid uuid;
BEGIN
    WITH named AS MATERIALIZED (
        SELECT n.* FROM new_rows n WHERE NOT order_broker_id_is_said(n)
    ), told AS MATERIALIZED (
        SELECT a.user_id, a.account, t.order_ref, coalesce(t.broker_order_id, 0) AS broker_order_id,
               coalesce(t.perm_id, 0) AS perm_id
        FROM (SELECT DISTINCT user_id, account FROM named) a
        CROSS JOIN LATERAL snapshots_whole(a.user_id, a.account) s
        CROSS JOIN LATERAL (
            SELECT * FROM snapshot_orders(a.user_id, a.account, s.snapshot_id)
            UNION ALL
            SELECT * FROM snapshot_closed(a.user_id, a.account, s.snapshot_id)) t
    )
    SELECT n.order_id INTO unsaid
    FROM named n
    WHERE NOT EXISTS (SELECT FROM told t
                      WHERE t.user_id = n.user_id AND t.account = n.account
                        AND t.order_ref = n.order_id::text
                        AND (t.broker_order_id, t.perm_id) = (n.broker_order_id, n.perm_id))
      -- A word without our reference, which is just being applied.
      AND NOT EXISTS (
          SELECT FROM broker_event b
          JOIN order_broker_id m ON m.user_id = n.user_id AND m.run_id = n.run_id
                                AND m.order_id = n.order_id AND m.account = n.account
                                AND (m.perm_id = n.perm_id AND n.perm_id <> 0
                                     OR m.broker_order_id = n.broker_order_id
                                        AND n.broker_order_id <> 0)
          WHERE b.user_id = n.user_id AND b.account = n.account AND b.applied_at IS NULL
            AND (coalesce(b.broker_order_id, 0), coalesce(b.perm_id, 0))
                = (n.broker_order_id, n.perm_id)
            AND NOT EXISTS (SELECT FROM new_rows x
                            WHERE x.user_id = m.user_id AND x.run_id = m.run_id
                              AND x.order_id = m.order_id AND x.account = m.account
                              AND (x.broker_order_id, x.perm_id)
                                  = (m.broker_order_id, m.perm_id)))
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'no broker has given order % these ids', unsaid
            USING ERRCODE = '23T08', CONSTRAINT = 'order_broker_id_said_by_broker',
                  TABLE = 'order_broker_id',
                  HINT = 'Ids come from the connector''s broker_event rows.';
    END IF;
    RETURN NULL;
END $$;

COMMENT ON FUNCTION order_broker_id_prove IS
    'Trigger: an order''s ids at a broker are those that the broker said.';

CREATE TRIGGER order_broker_id_m_prove AFTER INSERT ON order_broker_id
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION order_broker_id_prove();

-- The row may be written before the ids are in order_broker_id, in one transaction.
CREATE FUNCTION order_id_is_said(o orders, of_number bigint, of_perm bigint) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN EXISTS (SELECT FROM order_broker_id m
                   WHERE m.user_id = o.user_id AND m.run_id = o.run_id
                     AND m.order_id = o.order_id
                     AND (m.broker_order_id = of_number OR m.perm_id = of_perm))
        OR EXISTS (SELECT FROM broker_event b
                   WHERE b.user_id = o.user_id AND b.order_ref = o.order_id::text
                     AND b.account IN (SELECT a.account FROM broker_account a
                                       WHERE a.user_id = o.user_id)
                     AND (b.broker_order_id = of_number OR b.perm_id = of_perm))
        OR EXISTS (SELECT FROM execution e
                   JOIN broker_event b ON b.user_id = o.user_id AND b.account = o.account
                                      AND b.execution_id = e.execution_id
                   WHERE e.user_id = o.user_id AND e.run_id = o.run_id
                     AND e.order_id = o.order_id
                     AND (b.broker_order_id = of_number OR b.perm_id = of_perm))
        OR EXISTS (SELECT FROM broker_event b
                   WHERE b.user_id = o.user_id AND b.account = o.account
                     AND b.applied_at IS NULL
                     AND (b.broker_order_id = of_number OR b.perm_id = of_perm)
                     AND broker_event_is_of_order(b, o));
END $$;

COMMENT ON FUNCTION order_id_is_said IS
    'Whether a broker knows an order by one of these ids, the other being NULL.';

CREATE FUNCTION orders_check_ids() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF NEW.broker_order_id IS DISTINCT FROM OLD.broker_order_id
       AND NOT order_id_is_said(NEW, NEW.broker_order_id, NULL)
       OR NEW.perm_id IS DISTINCT FROM OLD.perm_id
          AND NOT order_id_is_said(NEW, NULL, NEW.perm_id) THEN
        RAISE EXCEPTION 'no broker knows order % by these ids', NEW.order_id
            USING ERRCODE = '23T08', CONSTRAINT = 'orders_ids_said_by_broker', TABLE = 'orders',
                  COLUMN = 'perm_id',
                  HINT = 'Ids come from the connector''s broker_event rows.';
    END IF;
    RETURN NULL;
END $$;

COMMENT ON FUNCTION orders_check_ids IS
    'Trigger: an order''s ids at its broker are those that the broker said.';

CREATE TRIGGER orders_m_check_ids AFTER UPDATE ON orders
    FOR EACH ROW WHEN ((NEW.broker_order_id, NEW.perm_id)
                       IS DISTINCT FROM (OLD.broker_order_id, OLD.perm_id))
    EXECUTE FUNCTION orders_check_ids();

-- As ledger_analyze does for ticks: who compares thousands of orders before autovacuum has looked
-- at them once would compare each with each. It has the owner's rights, who alone may look.
CREATE FUNCTION reconcile_analyze() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF (SELECT reltuples FROM pg_class WHERE oid = 'broker_event'::regclass) < 500 THEN
        ANALYZE orders, execution, event_ledger, broker_command, broker_event, order_broker_id;
    END IF;
END $$;

COMMENT ON FUNCTION reconcile_analyze IS
    'Gives the planner its first statistics of the tables that reconciliation compares.';
