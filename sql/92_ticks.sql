-- Ticks as the engine writes them: everything that one tick or many told, in one statement, which
-- the triggers of the tables then prove as a whole. Nothing here is taken on the engine's word.

CREATE FUNCTION plans_are_active(of_user uuid, of_run uuid, event_types text[],
                                 event_subject text[]) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN NOT EXISTS (
        SELECT FROM unnest(event_types, event_subject) AS t (event_type, subject)
        WHERE t.event_type = 'SIP_EXECUTED'
          AND NOT EXISTS (SELECT FROM sip_plan p
                          WHERE p.user_id = of_user AND p.run_id = of_run
                            AND p.plan = split_part(t.subject, '@', 1)
                            AND p.status = 'ACTIVE'));
END $$;

COMMENT ON FUNCTION plans_are_active IS
    'Whether the plans that events say were carried out are active.';

-- What is told are the events, in order. Trades are orders that their tick filled whole, with one
-- execution; the events tell of each that it was placed and that it was executed. after_seq is the
-- number of the last event that the writer knows; if there is a newer one, or a plan was changed,
-- the writer has decided on what is no longer so. heartbeat is the wall clock of a live tick, lag
-- how many seconds its logical time is behind. new_state is NULL where it stays what it is.
CREATE FUNCTION ticks_write(
    of_user uuid, of_run uuid, after_seq bigint, new_state jsonb,
    told_time timestamptz[], told_type text[], told_subject text[], told_payload jsonb[],
    trade_time timestamptz[], trade_order uuid[], trade_symbol text[], trade_side text[],
    trade_quantity numeric[], trade_type text[], trade_in_force text[], trade_limit numeric[],
    trade_expire timestamptz[], trade_reference numeric[], trade_client text[],
    trade_price numeric[], trade_commission numeric[], trade_event_at timestamptz[],
    tick_time timestamptz[], tick_cash numeric[], tick_value numeric[],
    heartbeat timestamptz, lag numeric)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
-- Arrays of every length would be planned anew each time, which costs more than it ever saves.
SET plan_cache_mode = force_generic_plan
-- A plan that was made while a table was empty reads all of it for as long as it is kept.
SET enable_seqscan = off AS $$
DECLARE
    run  record;
    head record;
BEGIN
    SELECT r.status, r.broker, r.currency INTO run FROM strategy_run r
    WHERE r.user_id = of_user AND r.run_id = of_run FOR NO KEY UPDATE;
    IF run.status IS DISTINCT FROM 'RUNNING' THEN
        PERFORM run_lock(of_user, of_run, 'event_ledger', 'RUNNING');
    END IF;
    SELECT l.seq, l.hash INTO head FROM event_ledger l
    WHERE l.user_id = of_user AND l.run_id = of_run ORDER BY l.seq DESC LIMIT 1;
    IF coalesce(head.seq, 0) <> after_seq
       OR 'SIP_EXECUTED' = ANY (told_type)
          AND NOT plans_are_active(of_user, of_run, told_type, told_subject) THEN
        RAISE EXCEPTION 'run % has moved since it was read', of_run
            USING ERRCODE = 'serialization_failure', CONSTRAINT = 'ticks_follow_last_event',
                  TABLE = 'event_ledger', COLUMN = 'seq', HINT = 'Read it and decide again.';
    END IF;
    WITH placed AS (
        INSERT INTO orders (user_id, run_id, order_id, client_order_id, broker, symbol, side,
                            quantity, order_type, time_in_force, limit_price, expire_at,
                            reference_price, status, status_at, filled_quantity, filled_notional,
                            logical_time, recorded_at)
        SELECT of_user, of_run, trade_order[i], trade_client[i], run.broker, trade_symbol[i],
               trade_side[i], trade_quantity[i], trade_type[i], trade_in_force[i], trade_limit[i],
               trade_expire[i], trade_reference[i], 'FILLED', trade_time[i], trade_quantity[i],
               trade_quantity[i] * trade_price[i], trade_time[i], now()
        FROM generate_series(1, cardinality(trade_order)) i
    ), filled AS (
        INSERT INTO execution (user_id, run_id, execution_id, order_id, symbol, side, quantity,
                               price, commission, commission_currency, logical_time, event_at,
                               recorded_at)
        SELECT of_user, of_run, trade_order[i] || '-1', trade_order[i], trade_symbol[i],
               trade_side[i], trade_quantity[i], trade_price[i], trade_commission[i],
               run.currency, trade_time[i], trade_event_at[i], now()
        FROM generate_series(1, cardinality(trade_order)) i
    ), marked AS (
        INSERT INTO mtm_ledger (user_id, run_id, logical_time, cash, market_value, recorded_at)
        SELECT of_user, of_run, tick_time[i], tick_cash[i], tick_value[i], now()
        FROM generate_series(1, cardinality(tick_time)) i
    )
    INSERT INTO event_ledger (user_id, run_id, seq, logical_time, event_type, subject, payload,
                              recorded_at, hash)
    SELECT of_user, of_run, after_seq + i, told_time[i], told_type[i], told_subject[i],
           told_payload[i], now(),
           event_chain(coalesce(head.hash, ''), of_user, of_run, after_seq + i, told_time[i],
                       told_type[i], told_subject[i], told_payload[i], now())
               OVER (ROWS UNBOUNDED PRECEDING)
    FROM generate_series(1, cardinality(told_type)) i;

    IF cardinality(tick_time) > 0 THEN
        UPDATE engine_state
        SET last_logical_time = tick_time[cardinality(tick_time)],
            state = coalesce(new_state, state)
        WHERE user_id = of_user AND run_id = of_run;
        IF NOT FOUND THEN
            INSERT INTO engine_state (user_id, run_id, last_logical_time, state)
            VALUES (of_user, of_run, tick_time[cardinality(tick_time)],
                    coalesce(new_state, '{}'));
        END IF;
    END IF;
    IF heartbeat IS NOT NULL THEN
        UPDATE engine_status SET heartbeat_at = heartbeat, lag_seconds = lag
        WHERE user_id = of_user AND run_id = of_run;
        IF NOT FOUND THEN
            INSERT INTO engine_status (user_id, run_id, heartbeat_at, lag_seconds)
            VALUES (of_user, of_run, heartbeat, lag);
        END IF;
    END IF;
END $$;

COMMENT ON FUNCTION ticks_write IS
    'Writes what ticks told: trades, events, marks and the engine''s state, in one statement.';
