-- Limits that are held against the books alone no longer make ticks_write write order by order, and a
-- refusal by the gate ends it before its tick instead of undoing all of it.
-- squawk-ignore-file ban-drop-function, adding-not-nullable-field, prefer-robust-stmts

SET LOCAL lock_timeout = '30s';
SET LOCAL statement_timeout = '1h';

ALTER TABLE limit_kind ADD COLUMN looks_back boolean;

UPDATE limit_kind SET looks_back = kind IN (
    'DUPLICATE_INTENT', 'ORDER_RATE_MAX', 'PRICE_COLLAR', 'DAILY_LOSS_MAX', 'DRAWDOWN_MAX');

ALTER TABLE limit_kind ALTER COLUMN looks_back SET NOT NULL;

COMMENT ON COLUMN limit_kind.looks_back IS
    'Whether it is held against what the run''s last orders and marks have written.';

-- It is the keeper's, or its owner's still, who has been told what an administrator must run.
SELECT set_config('oms.was_handed_over', (p.proowner = to_regrole('oms_keeper'))::text, true)
FROM pg_proc p WHERE p.oid = 'ticks_write'::regproc;

-- Who owns the schema may take it away in both cases.
DROP FUNCTION ticks_write;

CREATE FUNCTION ticks_write(
    of_user uuid, of_run uuid, after_seq bigint, new_state jsonb,
    told_time timestamptz[], told_type text[], told_subject text[], told_payload jsonb[],
    trade_order uuid[], trade_symbol text[], trade_side text[],
    trade_quantity numeric[], trade_type text[], trade_in_force text[], trade_limit numeric[],
    trade_expire timestamptz[], trade_reference numeric[], trade_client text[],
    trade_price numeric[], trade_commission numeric[], trade_event_at timestamptz[],
    tick_cash numeric[], tick_value numeric[],
    heartbeat timestamptz, lag numeric)
RETURNS integer LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
-- Arrays of every length would be planned anew each time, which costs more than it ever saves.
SET plan_cache_mode = force_generic_plan
-- A plan that was made while a table was empty reads all of it for as long as it is kept.
SET enable_seqscan = off AS $$
<<tick>>
DECLARE
    run      record;
    limited  boolean;              -- has limits
    looking  boolean := false;     -- one of them at what the run has just written
    waiting  boolean;              -- has open orders
    cash     numeric;
    reserved numeric;              -- by open orders; NULL: not asked for yet
    symbols  text[];               -- the holdings: parallel arrays; the first so many are rows
    known    integer;
    held     numeric[];
    costs    numeric[];
    profits  numeric[];
    marks    numeric[];
    marked   timestamptz[];
    changed  boolean[];
    value    numeric;
    price    numeric;
    at       timestamptz;
    previous bytea;
    newest   timestamptz;
    latest   timestamptz;          -- mark in mtm_ledger
    ticked   timestamptz;
    seq      bigint;
    moved_at bigint;               -- seq of the last EXECUTION
    placed   orders[] := '{}';
    filled   execution[] := '{}';
    marking  mtm_ledger[] := '{}';
    told     event_ledger[] := '{}';
    o        orders;
    x        execution;
    e        event_ledger;
    after    record;
    refusal  record;
    n        integer := 0;         -- events, trades and ticks so far
    t        integer := 0;
    m        integer := 0;
    i        integer;
    whole    integer := 0;         -- so many events are of the ticks before the one under way
    there    integer := 0;         -- events that are in the table
BEGIN
    SELECT r.status, r.broker, r.currency, r.account_type, r.cash INTO run FROM strategy_run r
    WHERE r.user_id = of_user AND r.run_id = of_run FOR NO KEY UPDATE;
    IF run.status IS DISTINCT FROM 'RUNNING' THEN
        PERFORM run_lock(of_user, of_run, 'event_ledger', 'RUNNING');
    END IF;
    -- Where the books stand, in one query.
    SELECT run.cash, coalesce(l.seq, 0), coalesce(l.hash, ''), l.logical_time, p.symbols,
           cardinality(p.symbols), p.held, p.costs, p.profits, p.marks, p.marked,
           -- ORDER BY leaves a planner without statistics one index to choose.
           (SELECT true FROM orders w
            WHERE w.user_id = of_user AND w.run_id = of_run
              AND w.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
            ORDER BY w.symbol LIMIT 1),
           -- What user_is_limited says, in line.
           coalesce((SELECT true FROM risk_limit k WHERE k.user_id = of_user LIMIT 1),
                    (SELECT true FROM trading_halt h
                     WHERE h.user_id = of_user AND h.lifted_at IS NULL LIMIT 1),
                    (SELECT true FROM system_halt s WHERE s.lifted_at IS NULL LIMIT 1), false),
           (SELECT k.logical_time FROM mtm_ledger k
            WHERE k.user_id = of_user AND k.run_id = of_run ORDER BY k.logical_time DESC LIMIT 1)
    INTO cash, seq, previous, newest, symbols, known, held, costs, profits, marks, marked,
         waiting, limited, latest
    FROM (SELECT coalesce(array_agg(h.symbol), '{}') AS symbols, array_agg(h.quantity) AS held,
                 array_agg(h.cost_basis) AS costs, array_agg(h.realized_pnl) AS profits,
                 array_agg(h.mark_price) AS marks, array_agg(h.marked_at) AS marked
          FROM position h WHERE h.user_id = of_user AND h.run_id = of_run) p
    LEFT JOIN LATERAL (SELECT w.seq, w.hash, w.logical_time FROM event_ledger w
                       WHERE w.user_id = of_user AND w.run_id = of_run
                       ORDER BY w.seq DESC LIMIT 1) l ON true;
    IF seq <> after_seq THEN
        PERFORM ticks_refuse(of_run);
    END IF;
    IF limited THEN
        looking := EXISTS (SELECT FROM risk_limit k JOIN limit_kind d ON d.kind = k.kind
                           WHERE k.user_id = of_user AND d.looks_back);
    END IF;

    <<writing>>
    WHILE n < cardinality(told_type) LOOP
        LOOP
            n := n + 1;
            seq := seq + 1;
            e := ROW(of_user, of_run, seq, told_time[n], told_type[n], told_subject[n],
                     told_payload[n], now(), NULL)::event_ledger;
            IF e.logical_time < newest THEN
                PERFORM event_refuse(e, 'TIME');
            END IF;
            newest := e.logical_time;

            IF e.event_type = 'TICK' THEN
                m := m + 1;
                value := 0;
                FOR i IN 1 .. cardinality(symbols) LOOP
                    CONTINUE WHEN held[i] = 0;
                    price := e.payload #>> ARRAY['prices', symbols[i]];
                    IF price IS NOT NULL THEN
                        at := coalesce((e.payload #>> ARRAY['priced_at', symbols[i]])::timestamptz,
                                       e.logical_time);
                        IF at < marked[i] THEN
                            PERFORM position_refuse_mark(symbols[i], marked[i], at);
                        END IF;
                        marks[i] := price;
                        marked[i] := at;
                        changed[i] := true;
                    END IF;
                    value := value + held[i] * marks[i];
                END LOOP;
                IF (tick_cash[m], tick_value[m]) IS DISTINCT FROM (cash, value) THEN
                    PERFORM event_refuse(e, NULL);
                ELSIF latest > e.logical_time THEN
                    PERFORM mtm_ledger_refuse_time(of_run, latest, e.logical_time);
                END IF;
                ticked := e.logical_time;
                e.subject := '';
                e.payload := e.payload || jsonb_build_object(
                    'cash', cash, 'market_value', value, 'equity', cash + value);
                marking[cardinality(marking) + 1] := ROW(
                    of_user, of_run, e.logical_time, cash, value, NULL, now())::mtm_ledger;
                whole := n;

            ELSIF e.event_type = 'ORDER_PLACED' THEN
                t := t + 1;
                o := ROW(of_user, of_run, trade_order[t], trade_client[t], run.broker,
                         trade_symbol[t], trade_side[t], trade_quantity[t], trade_type[t],
                         trade_in_force[t], trade_limit[t], NULL, NULL, NULL, trade_expire[t],
                         NULL, trade_reference[t], 'FILLED', e.logical_time, NULL, NULL, NULL,
                         trade_quantity[t], trade_quantity[t] * trade_price[t], e.logical_time,
                         now(), NULL, 1, NULL, false, false, NULL, NULL, NULL, NULL)::orders;
                IF waiting AND reserved IS NULL THEN
                    reserved := run_reserved_cash(of_user, of_run);
                END IF;
                i := array_position(symbols, o.symbol);
                refusal := orders_gate(
                    o, run.account_type, limited, cash - coalesce(reserved, 0),
                    coalesce(held[i], 0)
                    -- A purchase of cash alone asks for no holding.
                    + CASE WHEN waiting AND (limited OR o.side = 'SELL')
                           THEN orders_open_quantity(o) ELSE 0 END,
                    cash, symbols, held, marks);
                -- A broker fills what was sent to it; nothing is born filled there.
                IF run.broker <> 'paper' THEN
                    PERFORM event_refuse(e, 'BROKER');
                ELSIF refusal.code IS NOT NULL THEN
                    IF there > 0 AND (there > whole OR new_state IS NOT NULL) THEN
                        -- Half a tick, or ticks without their state: all of it is taken back.
                        PERFORM event_refuse(e, refusal.code);
                    ELSIF there > 0 THEN
                        n := whole;
                        EXIT writing;
                    ELSIF whole = 0 OR new_state IS NOT NULL THEN
                        RETURN 0;
                    END IF;
                    RETURN ticks_write(
                        of_user, of_run, after_seq, NULL, told_time[:whole],
                        told_type[:whole], told_subject[:whole], told_payload[:whole],
                        trade_order, trade_symbol, trade_side, trade_quantity, trade_type,
                        trade_in_force, trade_limit, trade_expire, trade_reference,
                        trade_client, trade_price, trade_commission, trade_event_at,
                        tick_cash, tick_value, heartbeat, lag);
                ELSIF coalesce(o.limit_price, o.reference_price) IS NULL
                      OR told_type[n + 1] IS DISTINCT FROM 'EXECUTION' THEN
                    PERFORM event_refuse(e, NULL);
                END IF;
                e.subject := o.order_id;
                e.payload := orders_event_payload(o);
                placed[cardinality(placed) + 1] := o;

            ELSIF e.event_type = 'EXECUTION' THEN
                IF told_type[n - 1] IS DISTINCT FROM 'ORDER_PLACED'
                   OR e.logical_time <> o.logical_time THEN
                    PERFORM event_refuse(e, NULL);
                END IF;
                x := ROW(of_user, of_run, o.order_id || '-1', o.order_id, o.symbol, o.side,
                         o.quantity, trade_price[t], trade_commission[t], run.currency,
                         e.logical_time, trade_event_at[t], now(), NULL)::execution;
                IF x.price <= 0 OR x.commission <> 0 THEN
                    PERFORM execution_check_money(x, run.currency);
                END IF;
                IF i IS NULL THEN
                    i := cardinality(symbols) + 1;
                    symbols[i] := x.symbol;
                END IF;
                after := position_after(
                    coalesce(held[i], 0), coalesce(costs[i], 0),
                    CASE WHEN x.side = 'BUY' THEN x.quantity ELSE -x.quantity END, x.price);
                held[i] := after.quantity_after;
                costs[i] := after.cost_after;
                profits[i] := coalesce(profits[i], 0) + after.realized;
                IF marked[i] IS NULL OR marked[i] < e.logical_time THEN
                    marks[i] := x.price;
                    marked[i] := e.logical_time;
                END IF;
                changed[i] := true;
                cash := cash + execution_cash_flow(x.side, x.quantity, x.price, x.commission);
                -- Not in between either: a sale that comes later pays for nothing.
                IF cash < 0 AND run.account_type = 'CASH' AND x.side = 'BUY' THEN
                    PERFORM event_refuse(e, 'CASH');
                END IF;
                moved_at := seq;
                e.subject := x.order_id || '/' || x.execution_id;
                e.payload := execution_event_payload(x);
                filled[cardinality(filled) + 1] := x;

            ELSIF e.event_type = 'SIP_EXECUTED'
                  AND NOT EXISTS (SELECT FROM sip_plan p
                                  WHERE p.user_id = of_user AND p.run_id = of_run
                                    AND p.plan = split_part(e.subject, '@', 1)
                                    AND p.status = 'ACTIVE') THEN
                PERFORM ticks_refuse(of_run);

            ELSIF starts_with(e.event_type, 'ORDER_')
                  OR e.event_type IN ('COMMISSION', 'SPLIT_APPLIED') THEN
                PERFORM event_refuse(e, NULL);  -- told by the rows that it is about
            END IF;

            previous := event_hash(previous, of_user, of_run, seq, e.logical_time, e.event_type,
                                   e.subject, e.payload, e.recorded_at);
            e.hash := previous;
            told[cardinality(told) + 1] := e;
            -- What is looked back at has to be in the tables: all that comes before an order.
            EXIT WHEN n = cardinality(told_type)
                   OR looking AND told_type[n + 1] = 'ORDER_PLACED';
        END LOOP;

        -- Assigned, since PERFORM would plan a query.
        there := there + ticks_append(placed, filled, marking, told);
        placed := '{}';
        filled := '{}';
        marking := '{}';
        told := '{}';

        FOR i IN 1 .. cardinality(symbols) LOOP
            IF i > known THEN
                INSERT INTO position (user_id, run_id, symbol, quantity, cost_basis, realized_pnl,
                                      mark_price, marked_at)
                VALUES (of_user, of_run, symbols[i], held[i], costs[i], profits[i], marks[i],
                        marked[i])
                ON CONFLICT ON CONSTRAINT position_pkey DO NOTHING;  -- where it was proven
            ELSIF changed[i] THEN
                UPDATE position
                SET quantity = held[i], cost_basis = costs[i], realized_pnl = profits[i],
                    mark_price = marks[i], marked_at = marked[i]
                WHERE user_id = of_user AND run_id = of_run AND symbol = symbols[i];
            END IF;
        END LOOP;
        known := cardinality(symbols);
        changed := '{}';
        IF moved_at IS NOT NULL THEN
            UPDATE strategy_run r SET cash = tick.cash, books_seq = moved_at
            WHERE r.user_id = of_user AND r.run_id = of_run;
            moved_at := NULL;
        END IF;
    END LOOP;

    ticked := engine_keep(of_user, of_run, ticked, new_state, heartbeat, lag);
    IF after_seq < 1000 AND seq >= 1000 THEN
        PERFORM ledger_analyze();
    END IF;
    RETURN n;
END $$;

COMMENT ON FUNCTION ticks_write IS
    'Writes what ticks told, and what follows from it: trades, events, marks, books, state; '
    'returns how many events it has written.';

REVOKE EXECUTE ON FUNCTION ticks_write FROM PUBLIC;

DO $$
DECLARE
    missing text;
BEGIN
    FOR missing IN SELECT g FROM grant_roles() g
                   WHERE current_setting('oms.was_handed_over') = 'true' LOOP
        RAISE WARNING 'an administrator must run: %', missing
            USING HINT = 'Then `oms db migrate`, or SELECT grant_roles() as the owner.';
    END LOOP;
END $$;
