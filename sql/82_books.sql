-- The books follow the ledger: cash and positions take up the EXECUTION and SPLIT_APPLIED events
-- after strategy_run.books_seq, and nothing else ever changes them. Their tables' triggers prove it
-- with the functions below, whoever writes; who leaves a number NULL gets the proven one.

CREATE FUNCTION event_cash_flow(event_type text, payload jsonb) RETURNS numeric
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN event_type = 'EXECUTION'
            THEN execution_cash_flow(payload ->> 'side', (payload ->> 'quantity')::numeric,
                                     (payload ->> 'price')::numeric,
                                     (payload ->> 'commission')::numeric)
            WHEN event_type = 'COMMISSION' THEN -(payload ->> 'cost')::numeric
            ELSE 0 END;

COMMENT ON FUNCTION event_cash_flow IS 'What a ledger event does to cash, in currency.';

CREATE FUNCTION strategy_run_follow_ledger(of_user uuid, of_run uuid) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE strategy_run SET cash = NULL WHERE user_id = of_user AND run_id = of_run;
END $$;

COMMENT ON FUNCTION strategy_run_follow_ledger IS
    'Brings a run''s cash up to the last event of its ledger.';

-- One step of the fold that makes a position of a run's events, here and in the audit. A split
-- keeps the cost and states the mark in the new unit. A mark from before a trade is older news
-- than the trade's own price.
CREATE FUNCTION position_after_event(p public.position, event event_ledger)
RETURNS public.position
LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
DECLARE
    units numeric := (event.payload ->> 'quantity')::numeric;
    price numeric := (event.payload ->> 'price')::numeric;
    a     record;
BEGIN
    IF p.symbol IS NULL THEN
        p.user_id := event.user_id;
        p.run_id := event.run_id;
        p.symbol := event.payload ->> 'symbol';
        p.quantity := 0;
        p.cost_basis := 0;
        p.realized_pnl := 0;
    END IF;
    IF event.event_type = 'SPLIT_APPLIED' THEN
        p.quantity := (event.payload ->> 'quantity_after')::numeric;
        p.mark_price := round(p.mark_price * (event.payload ->> 'denominator')::numeric
                              / (event.payload ->> 'numerator')::numeric, 8);
        RETURN p;
    END IF;
    a := position_after(p.quantity, p.cost_basis,
                        CASE WHEN event.payload ->> 'side' = 'BUY' THEN units ELSE -units END,
                        price);
    p.quantity := a.quantity_after;
    p.cost_basis := a.cost_after;
    p.realized_pnl := p.realized_pnl + a.realized;
    IF p.marked_at IS NULL OR p.marked_at < event.logical_time THEN
        p.mark_price := price;
        p.marked_at := event.logical_time;
    END IF;
    RETURN p;
END $$;

COMMENT ON FUNCTION position_after_event IS
    'A position after an EXECUTION or SPLIT_APPLIED event of its symbol.';

-- What a position must be: what it is, or nothing, and what the events after the run's books_seq
-- make of it.
CREATE FUNCTION position_after_events(p public.position, of_user uuid, of_run uuid, of_symbol text,
                                      books_seq bigint, account_type text)
RETURNS public.position
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    was   numeric;
    event event_ledger;
BEGIN
    FOR event IN SELECT * FROM event_ledger l
                 WHERE l.user_id = of_user AND l.run_id = of_run
                   AND l.seq > position_after_events.books_seq
                   AND l.event_type IN ('EXECUTION', 'SPLIT_APPLIED')
                   AND l.payload ->> 'symbol' = of_symbol
                 ORDER BY l.seq
    LOOP
        was := coalesce(p.quantity, 0);
        p := position_after_event(p, event);
        IF p.quantity < 0 AND p.quantity < was AND account_type = 'CASH' THEN
            RAISE EXCEPTION 'selling % % leaves a short position of % in a cash account',
                was - p.quantity, of_symbol, p.quantity
                USING ERRCODE = '23T04', CONSTRAINT = 'position_not_short_in_cash_account',
                      TABLE = 'position', COLUMN = 'quantity',
                      HINT = 'Sell at most what is held, or use a MARGIN account.';
        END IF;
    END LOOP;
    RETURN p;
END $$;

COMMENT ON FUNCTION position_after_events IS 'What the ledger makes of a position.';

CREATE FUNCTION position_follow_ledger(of_user uuid, of_run uuid, of_symbol text) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    -- A split of what was never held finds nothing to write.
    UPDATE position SET quantity = NULL
    WHERE user_id = of_user AND run_id = of_run AND symbol = of_symbol;
END $$;

COMMENT ON FUNCTION position_follow_ledger IS
    'Brings a position up to the last event of its run''s ledger.';

CREATE FUNCTION event_refuse(event record, fault text) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF fault = 'SEQ' THEN
        RAISE EXCEPTION 'event % of run % does not come next', event.seq, event.run_id
            USING ERRCODE = '23T06', CONSTRAINT = 'event_ledger_seq_without_gap',
                  TABLE = 'event_ledger', COLUMN = 'seq',
                  HINT = 'Leave seq out; the database numbers events.';
    ELSIF fault = 'HASH' THEN
        RAISE EXCEPTION 'event % of run % does not follow from the one before it', event.seq,
            event.run_id
            USING ERRCODE = '23T06', CONSTRAINT = 'event_ledger_hash_chain',
                  TABLE = 'event_ledger', COLUMN = 'hash',
                  HINT = 'Leave hash out; the database chains events.';
    ELSIF fault = 'TIME' THEN
        RAISE EXCEPTION 'run % already stands after %', event.run_id, event.logical_time
            USING ERRCODE = '23T07', CONSTRAINT = 'event_ledger_time_moves_forward',
                  TABLE = 'event_ledger', COLUMN = 'logical_time',
                  HINT = 'A run only moves forward; use a later logical_time.';
    ELSIF fault = 'CASH' THEN
        RAISE EXCEPTION 'run % has not the cash for the execution %', event.run_id, event.subject
            USING ERRCODE = 'check_violation', TABLE = 'strategy_run', COLUMN = 'cash',
                  CONSTRAINT = 'strategy_run_cash_not_negative_in_cash_account',
                  HINT = 'Spend at most the cash, or use a MARGIN account.';
    ELSIF fault IS NOT NULL THEN
        RAISE EXCEPTION 'the gate refuses order %, which was not filled: %', event.subject, fault
            USING ERRCODE = '23T08', CONSTRAINT = 'orders_gate_decides',
                  TABLE = 'orders', COLUMN = 'status',
                  HINT = 'Insert it NEW; the database decides, executions do the rest.';
    END IF;
    RAISE EXCEPTION 'no row of run % bears out the event % of %', event.run_id, event.event_type,
        event.subject
        USING ERRCODE = '23T08', CONSTRAINT = 'event_ledger_tells_what_happened',
              TABLE = 'event_ledger', COLUMN = 'event_type',
              HINT = 'Write the row itself; the database tells the ledger.';
END $$;

COMMENT ON FUNCTION event_refuse IS
    'Raises what is wrong with an event: SEQ, HASH, TIME, CASH, words of the gate, or no row '
    'behind it.';

-- A planner that has never seen these tables takes any index of a run for as good as another, and
-- reads the whole run where one row was asked for. Autovacuum looks once a minute at most; a replay
-- or a broker has written hundreds of thousands of rows by then. So a run that grows long before
-- anybody has looked has them looked at, once.
CREATE FUNCTION ledger_analyze() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF (SELECT reltuples FROM pg_class WHERE oid = 'event_ledger'::regclass) < 500 THEN
        ANALYZE event_ledger, orders, execution, mtm_ledger, position, strategy_run,
            broker_command, broker_event;
    END IF;
END $$;

COMMENT ON FUNCTION ledger_analyze IS
    'Gives the planner its first statistics of the tables that grow with every tick or fill.';

-- Events are not taken on anybody's word: each must follow from the one before it, and what it
-- tells must be so, row by row. Positions and cash follow these events, so forging one would forge
-- money. The loop reads every row once and knows cash and holdings as they were at each event.
CREATE FUNCTION books_follow(of_user uuid, of_run uuid, first_seq bigint) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET enable_seqscan = off AS $$
DECLARE
    run       record;
    cash      numeric;
    limited   boolean;             -- has limits
    waiting   boolean;             -- has open orders
    reserved  numeric;             -- by them; NULL: not asked for yet
    symbols   text[];              -- the holdings: parallel arrays; the first so many are rows
    known     integer;
    held      numeric[];
    marks     numeric[];
    marked    timestamptz[];
    traded    boolean[];
    remarked  boolean[];
    value     numeric;
    previous  bytea;
    newest    timestamptz;
    last_mark timestamptz;         -- in mtm_ledger, and that of the last tick told now
    ticked    timestamptz;
    next_seq  bigint := first_seq;
    e         record;
    i         integer;
    price     numeric;
    refusal   record;
    moved     boolean;
BEGIN
    SELECT r.status, r.account_type, r.broker, r.currency, r.cash INTO run FROM strategy_run r
    WHERE r.user_id = of_user AND r.run_id = of_run FOR NO KEY UPDATE;
    IF run.status IS NULL OR run.status NOT IN ('RUNNING', 'STOPPING') THEN
        PERFORM run_lock(of_user, of_run, 'event_ledger', 'RUNNING', 'STOPPING');
    END IF;
    -- Where the books stand before the first event, in one query.
    SELECT run.cash, l.hash, l.logical_time, p.symbols, p.held, p.marks, p.marked,
           -- ORDER BY leaves a planner without statistics one index to choose.
           (SELECT true FROM orders o
            WHERE o.user_id = of_user AND o.run_id = of_run
              AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
            ORDER BY o.symbol LIMIT 1),
           -- What user_is_limited says, in line.
           coalesce((SELECT true FROM risk_limit k WHERE k.user_id = of_user LIMIT 1),
                    (SELECT true FROM trading_halt h
                     WHERE h.user_id = of_user AND h.lifted_at IS NULL LIMIT 1),
                    (SELECT true FROM system_halt s WHERE s.lifted_at IS NULL LIMIT 1)),
           (SELECT m.logical_time FROM mtm_ledger m
            WHERE m.user_id = of_user AND m.run_id = of_run ORDER BY m.logical_time DESC LIMIT 1)
    INTO cash, previous, newest, symbols, held, marks, marked, waiting, limited, last_mark
    FROM (SELECT coalesce(array_agg(h.symbol), '{}') AS symbols, array_agg(h.quantity) AS held,
                 array_agg(h.mark_price) AS marks, array_agg(h.marked_at) AS marked
          FROM position h WHERE h.user_id = of_user AND h.run_id = of_run) p
    LEFT JOIN event_ledger l ON l.user_id = of_user AND l.run_id = of_run AND l.seq = first_seq - 1;
    known := cardinality(symbols);

    -- Beside the event the row that it tells of: there is none unless the row is as the event says.
    FOR e IN
        SELECT l.*,
               CASE WHEN l.event_type = 'EXECUTION'
                    THEN (SELECT t FROM execution t
                          JOIN orders o ON o.user_id = t.user_id AND o.run_id = t.run_id
                                       AND o.order_id = t.order_id
                          WHERE t.user_id = of_user AND t.run_id = of_run
                            -- Both: before its first ANALYZE either index may be chosen.
                            AND t.order_id = event_order_id(l.subject)
                            AND t.execution_id = substr(l.subject, 38) COLLATE "default"
                            AND l.subject = t.order_id || '/' || t.execution_id
                            AND t.logical_time = l.logical_time
                            AND l.payload = execution_event_payload(t)
                            AND o.symbol = t.symbol AND o.side = t.side) END AS x,
               CASE WHEN l.event_type = 'ORDER_PLACED'
                    THEN (SELECT o FROM orders o
                          WHERE o.user_id = of_user AND o.run_id = of_run
                            AND o.order_id = event_order_id(l.subject)
                            AND o.order_id::text = l.subject
                            AND o.logical_time = l.logical_time
                            AND l.payload = orders_event_payload(o)
                            AND (o.status IN ('NEW', 'PENDING')
                                 -- Nothing has looked up a price for the gate.
                                 OR o.status = 'FILLED' AND o.status_at = o.logical_time
                                    AND coalesce(o.limit_price, o.stop_price, o.reference_price)
                                        IS NOT NULL)) END AS o,
               CASE WHEN l.event_type = 'TICK'
                    THEN (SELECT m FROM mtm_ledger m
                          WHERE m.user_id = of_user AND m.run_id = of_run
                            AND m.logical_time = l.logical_time
                            AND l.payload @> jsonb_build_object(
                                'cash', m.cash, 'market_value', m.market_value,
                                'equity', m.equity)) END AS m
        FROM event_ledger l
        WHERE l.user_id = of_user AND l.run_id = of_run AND l.seq >= first_seq
        ORDER BY l.seq
    LOOP
        IF e.seq <> next_seq OR (previous IS NULL) <> (e.seq = 1) THEN
            PERFORM event_refuse(e, 'SEQ');
        ELSIF e.hash <> event_hash(coalesce(previous, ''), of_user, of_run, e.seq, e.logical_time,
                                   e.event_type, e.subject, e.payload, e.recorded_at) THEN
            PERFORM event_refuse(e, 'HASH');
        ELSIF e.logical_time < newest THEN
            PERFORM event_refuse(e, 'TIME');
        ELSIF run.status = 'STOPPING'
              AND (run.broker = 'paper' AND e.event_type NOT IN ('RUN_STOPPED', 'RUN_ERROR')
                   OR e.event_type IN ('TICK', 'SIP_EXECUTED', 'REBALANCED')) THEN
            PERFORM run_lock(of_user, of_run, 'event_ledger', 'RUNNING');
        END IF;
        next_seq := next_seq + 1;
        previous := e.hash;
        newest := e.logical_time;

        IF e.event_type = 'TICK' THEN
            CONTINUE WHEN NOT e.payload ?| '{cash,market_value,equity}';
            value := 0;
            FOR i IN 1 .. cardinality(symbols) LOOP
                CONTINUE WHEN held[i] = 0;
                price := e.payload #>> ARRAY['prices', symbols[i]];
                IF price IS NOT NULL THEN
                    marks[i] := price;
                    marked[i] := coalesce(
                        (e.payload #>> ARRAY['priced_at', symbols[i]])::timestamptz,
                        e.logical_time);
                    remarked[i] := true;
                END IF;
                value := value + held[i] * marks[i];
            END LOOP;
            IF (e.m).cash = cash AND (e.m).market_value = value THEN
                ticked := e.logical_time;
            ELSE
                PERFORM event_refuse(e, NULL);
            END IF;

        ELSIF e.event_type = 'EXECUTION' THEN
            IF (e.x).price IS NULL THEN
                PERFORM event_refuse(e, NULL);
            ELSIF run.broker <> 'paper' THEN
                PERFORM execution_check_broker(e.x);
            END IF;
            IF (e.x).price <= 0 OR (e.x).commission <> 0 THEN
                PERFORM execution_check_money(e.x, run.currency);
            END IF;
            i := coalesce(array_position(symbols, (e.x).symbol), cardinality(symbols) + 1);
            symbols[i] := (e.x).symbol;
            held[i] := coalesce(held[i], 0)
                     + CASE WHEN (e.x).side = 'BUY' THEN (e.x).quantity ELSE -(e.x).quantity END;
            IF marked[i] IS NULL OR marked[i] < e.logical_time THEN
                marks[i] := (e.x).price;
                marked[i] := e.logical_time;
            END IF;
            cash := cash + execution_cash_flow((e.x).side, (e.x).quantity, (e.x).price,
                                               (e.x).commission);
            -- Not in between either: a sale that comes later in the statement pays for nothing.
            IF cash < 0 AND run.account_type = 'CASH' AND run.broker = 'paper'
               AND (e.x).side = 'BUY' THEN
                PERFORM event_refuse(e, 'CASH');
            END IF;
            traded[i] := true;
            moved := true;

        ELSIF e.event_type = 'ORDER_PLACED' THEN
            IF (e.o).status = 'FILLED' THEN
                IF waiting AND reserved IS NULL THEN
                    reserved := run_reserved_cash(of_user, of_run);
                END IF;
                refusal := orders_gate(
                    e.o, run.account_type, limited, cash - coalesce(reserved, 0),
                    coalesce(held[array_position(symbols, (e.o).symbol)], 0)
                    -- A purchase of cash alone asks for no holding.
                    + CASE WHEN waiting AND (limited OR (e.o).side = 'SELL'
                                             OR (e.o).purpose IS NOT NULL)
                           THEN orders_open_quantity(e.o) ELSE 0 END,
                    cash, symbols, held, marks);
                IF refusal.code IS NOT NULL OR (e.o).broker <> run.broker
                   -- A broker fills what was sent to it; nothing is born filled there.
                   OR run.broker <> 'paper' THEN
                    PERFORM event_refuse(e, coalesce(refusal.code, 'BROKER'));
                END IF;
            ELSIF (e.o).status IS NULL THEN
                PERFORM event_refuse(e, NULL);
            END IF;

        ELSIF e.event_type = 'COMMISSION' THEN
            IF NOT EXISTS (SELECT FROM execution_commission c
                           WHERE c.user_id = of_user AND c.run_id = of_run
                             AND c.execution_id = e.subject COLLATE "default"
                             AND c.logical_time = e.logical_time
                             AND execution_commission_payload(c) = e.payload) THEN
                PERFORM event_refuse(e, NULL);
            END IF;
            cash := cash + event_cash_flow(e.event_type, e.payload);
            moved := true;

        ELSIF e.event_type = 'SPLIT_APPLIED' THEN
            IF NOT EXISTS (SELECT FROM split_applied s
                           WHERE s.user_id = of_user AND s.run_id = of_run
                             AND split_event_subject(s) = e.subject
                             AND s.logical_time = e.logical_time
                             AND split_event_payload(s) = e.payload) THEN
                PERFORM event_refuse(e, NULL);
            END IF;

        ELSIF starts_with(e.event_type, 'ORDER_')
              -- Findings about ids: no moves.
              AND e.event_type <> ALL ('{ORDER_ID_REUSE,ORDER_ID_WRAP}')
              AND NOT order_event_is_true(ROW (of_user, of_run, e.seq, e.logical_time,
                                               e.event_type, e.subject, e.payload, e.recorded_at,
                                               e.hash)::event_ledger) THEN
            PERFORM event_refuse(e, NULL);
        END IF;
    END LOOP;

    IF last_mark > ticked THEN
        PERFORM mtm_ledger_refuse_time(of_run, last_mark, ticked);
    END IF;
    FOR i IN 1 .. cardinality(symbols) LOOP
        IF i > known THEN
            INSERT INTO position (user_id, run_id, symbol, quantity, mark_price, marked_at)
            VALUES (of_user, of_run, symbols[i], NULL, marks[i], marked[i]);
        ELSIF traded[i] THEN
            UPDATE position SET quantity = NULL, mark_price = marks[i], marked_at = marked[i]
            WHERE user_id = of_user AND run_id = of_run AND symbol = symbols[i];
        ELSIF remarked[i] THEN
            UPDATE position SET mark_price = marks[i], marked_at = marked[i]
            WHERE user_id = of_user AND run_id = of_run AND symbol = symbols[i];
        END IF;
    END LOOP;
    IF moved THEN
        UPDATE strategy_run SET cash = NULL WHERE user_id = of_user AND run_id = of_run;
    END IF;
    IF first_seq <= 1000 AND next_seq > 1000 THEN
        PERFORM ledger_analyze();
    END IF;
    RETURN next_seq - first_seq;
END $$;

COMMENT ON FUNCTION books_follow IS
    'Proves a run''s events from first_seq on and brings its books up to them.';

CREATE FUNCTION event_ledger_prove() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    part   record;
    proven bigint;
BEGIN
    FOR part IN SELECT user_id, run_id, min(seq) AS first_seq FROM new_rows
                GROUP BY user_id, run_id
    LOOP
        proven := books_follow(part.user_id, part.run_id, part.first_seq);
    END LOOP;
    RETURN NULL;
END $$;

COMMENT ON FUNCTION event_ledger_prove IS 'Trigger: proves what was told, and the books follow it.';

CREATE TRIGGER event_ledger_m_prove AFTER INSERT ON event_ledger
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT WHEN (current_user <> 'oms_keeper')
    EXECUTE FUNCTION event_ledger_prove();
