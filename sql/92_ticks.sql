-- Ticks as the engine writes them: everything that one tick or many told, in one statement, which
-- the triggers of the tables then prove as a whole. Nothing here is taken on the engine's word.

-- A planner that has never seen these tables takes any index of a run for as good as another, and
-- reads the whole run where one row was asked for. Autovacuum looks once a minute at most; a replay
-- has written hundreds of thousands of rows by then. So a run that grows long before anybody has
-- looked has them looked at, once.
CREATE FUNCTION ledger_analyze() RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF (SELECT reltuples FROM pg_class WHERE oid = 'event_ledger'::regclass) < 500 THEN
        ANALYZE event_ledger, orders, execution, mtm_ledger, position, strategy_run;
    END IF;
END $$;

COMMENT ON FUNCTION ledger_analyze IS
    'Gives the planner its first statistics of the tables that grow with every tick.';

-- Trades are orders that their tick filled whole: each is placed at its place in the story and
-- executed at the next one. Places count from 1 without a gap. after_seq is the number of the last
-- event that the writer knows; if there is a newer one, or a plan was changed, the writer has
-- decided on what is no longer so.
CREATE FUNCTION ticks_write(
    of_user uuid, of_run uuid, after_seq bigint, new_state jsonb,
    trade_place integer[], trade_time timestamptz[], trade_order uuid[], trade_symbol text[],
    trade_side text[], trade_quantity numeric[], trade_type text[], trade_in_force text[],
    trade_limit numeric[], trade_expire timestamptz[], trade_reference numeric[],
    trade_client text[], trade_price numeric[], trade_commission numeric[],
    trade_event_at timestamptz[],
    event_place integer[], event_time timestamptz[], event_types text[], event_subject text[],
    event_payload jsonb[],
    tick_place integer[], tick_time timestamptz[], tick_facts jsonb[], tick_cash numeric[],
    tick_value numeric[])
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
-- Arrays of every length would be planned anew each time, which costs more than it ever saves.
SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    run  strategy_run := run_lock(of_user, of_run, 'event_ledger', 'RUNNING');
    head record;
BEGIN
    SELECT l.seq, l.hash INTO head FROM event_ledger l
    WHERE l.user_id = of_user AND l.run_id = of_run ORDER BY l.seq DESC LIMIT 1;
    IF coalesce(head.seq, 0) <> after_seq
       OR 'SIP_EXECUTED' = ANY (event_types) AND EXISTS (
           SELECT FROM unnest(event_types, event_subject) AS t (event_type, subject)
           WHERE t.event_type = 'SIP_EXECUTED'
             AND NOT EXISTS (SELECT FROM sip_plan p
                             WHERE p.user_id = of_user AND p.run_id = of_run
                               AND p.plan = split_part(t.subject, '@', 1)
                               AND p.status = 'ACTIVE')) THEN
        RAISE EXCEPTION 'run % has moved since it was read', of_run
            USING ERRCODE = 'serialization_failure';
    END IF;
    WITH trade AS MATERIALIZED (
        SELECT * FROM unnest(
            trade_place, trade_time, trade_order, trade_symbol, trade_side, trade_quantity,
            trade_type, trade_in_force, trade_limit, trade_expire, trade_reference, trade_client,
            trade_price, trade_commission, trade_event_at)
            AS t (place, at, order_id, symbol, side, quantity, order_type, time_in_force,
                  limit_price, expire_at, reference_price, client_order_id, price, commission,
                  event_at)
    ), tick AS MATERIALIZED (
        SELECT * FROM unnest(tick_place, tick_time, tick_facts, tick_cash, tick_value)
            AS t (place, at, facts, cash, market_value)
    ), told AS (
        SELECT place, at, 'ORDER_PLACED' AS event_type, order_id::text AS subject,
               jsonb_strip_nulls(jsonb_build_object(
                   'symbol', symbol, 'side', side, 'quantity', quantity, 'order_type', order_type,
                   'time_in_force', time_in_force, 'limit_price', limit_price,
                   'expire_at', event_moment(expire_at), 'reference_price', reference_price,
                   'client_order_id', client_order_id)) AS payload
        FROM trade
        UNION ALL
        SELECT place + 1, at, 'EXECUTION', order_id || '/' || order_id || '-1',
               jsonb_build_object('symbol', symbol, 'side', side, 'quantity', quantity,
                                  'price', price, 'commission', commission,
                                  'commission_currency', run.currency,
                                  'event_at', event_moment(event_at))
        FROM trade
        UNION ALL
        SELECT * FROM unnest(event_place, event_time, event_types, event_subject, event_payload)
        UNION ALL
        SELECT place, at, 'TICK', '',
               facts || jsonb_build_object('cash', cash, 'market_value', market_value,
                                           'equity', cash + market_value)
        FROM tick
    ), placed AS (
        INSERT INTO orders (user_id, run_id, order_id, client_order_id, broker, symbol, side,
                            quantity, order_type, time_in_force, limit_price, expire_at,
                            reference_price, status, status_at, filled_quantity, filled_notional,
                            logical_time, recorded_at)
        SELECT of_user, of_run, order_id, client_order_id, run.broker, symbol, side, quantity,
               order_type, time_in_force, limit_price, expire_at, reference_price, 'FILLED', at,
               quantity, quantity * price, at, now()
        FROM trade
    ), filled AS (
        INSERT INTO execution (user_id, run_id, execution_id, order_id, symbol, side, quantity,
                               price, commission, commission_currency, logical_time, event_at,
                               recorded_at)
        SELECT of_user, of_run, order_id || '-1', order_id, symbol, side, quantity, price,
               commission, run.currency, at, event_at, now()
        FROM trade
    ), marked AS (
        INSERT INTO mtm_ledger (user_id, run_id, logical_time, cash, market_value, recorded_at)
        SELECT of_user, of_run, at, cash, market_value, now() FROM tick
    )
    INSERT INTO event_ledger (user_id, run_id, seq, logical_time, event_type, subject, payload,
                              recorded_at, hash)
    SELECT of_user, of_run, after_seq + place, at, event_type, subject, payload, now(),
           event_chain(coalesce(head.hash, ''), of_user, of_run, after_seq + place, at, event_type,
                       subject, payload, now())
               OVER (ORDER BY place ROWS UNBOUNDED PRECEDING)
    FROM told;

    IF after_seq < 1000 AND after_seq + cardinality(tick_time) + 2 * cardinality(trade_time) >= 1000
    THEN
        PERFORM ledger_analyze();
    END IF;
    IF cardinality(tick_time) > 0 THEN
        INSERT INTO engine_state (user_id, run_id, last_logical_time, state)
        VALUES (of_user, of_run, tick_time[cardinality(tick_time)], new_state)
        ON CONFLICT (user_id, run_id) DO UPDATE
        SET last_logical_time = excluded.last_logical_time, state = excluded.state;
    END IF;
END $$;

COMMENT ON FUNCTION ticks_write IS
    'Writes what ticks told: trades, events, marks and the engine''s state, in one statement.';
