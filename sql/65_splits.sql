-- Splits as a run lived through them. A row applies an announced split to the run's position and
-- resting orders, once; nothing but an announced one can be applied.

CREATE TABLE split_applied (
    user_id         uuid        NOT NULL,
    run_id          uuid        NOT NULL,
    symbol          text        NOT NULL,
    ex_date         date        NOT NULL,
    kind            text        NOT NULL DEFAULT 'SPLIT',
    logical_time    timestamptz NOT NULL,
    quantity_before numeric     NOT NULL,
    quantity_after  numeric     NOT NULL,
    recorded_at     timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT split_applied_pkey PRIMARY KEY (user_id, run_id, symbol, ex_date),
    CONSTRAINT split_applied_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT split_applied_is_announced FOREIGN KEY (symbol, ex_date, kind)
        REFERENCES corporate_action (symbol, ex_date, kind)
);

COMMENT ON TABLE split_applied IS 'Splits that a run''s position and orders went through; append-only.';
COMMENT ON COLUMN split_applied.quantity_before IS 'Position before it; computed by the database.';
COMMENT ON COLUMN split_applied.quantity_after IS
    'Position after it, cut to 8 decimals; computed by the database.';

CREATE FUNCTION split_applied_prepare_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run    strategy_run;
    action corporate_action;
BEGIN
    run := run_lock_running(NEW.user_id, NEW.run_id, 'split_applied');
    SELECT * INTO action FROM corporate_action
    WHERE symbol = NEW.symbol AND ex_date = NEW.ex_date AND kind = NEW.kind;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no split of % on % was announced', NEW.symbol, NEW.ex_date
            USING ERRCODE = 'foreign_key_violation', CONSTRAINT = 'split_applied_is_announced',
                  TABLE = 'split_applied', COLUMN = 'ex_date',
                  HINT = 'Announce it in corporate_action (oms data import --splits) first.';
    END IF;
    NEW.logical_time := coalesce(NEW.logical_time, run_last_time(NEW.user_id, NEW.run_id));
    SELECT coalesce(sum(quantity), 0) INTO NEW.quantity_before FROM position
    WHERE user_id = NEW.user_id AND run_id = NEW.run_id AND symbol = NEW.symbol;
    NEW.quantity_after :=
        trunc(NEW.quantity_before * action.numerator / action.denominator, 8);
    RETURN NEW;
END $$;

-- Position: more units at the same cost, and a mark in the new unit. Resting orders: the same
-- money for the new unit. A partly filled order can't be restated without falsifying its
-- executions, so its rest is cancelled and placed again.
CREATE FUNCTION split_applied_apply() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    ratio numeric;
    o     orders;
BEGIN
    SELECT numerator / denominator INTO ratio FROM corporate_action
    WHERE symbol = NEW.symbol AND ex_date = NEW.ex_date AND kind = NEW.kind;

    UPDATE position
    SET quantity = NEW.quantity_after, mark_price = round(mark_price / ratio, 8)
    WHERE user_id = NEW.user_id AND run_id = NEW.run_id AND symbol = NEW.symbol;

    FOR o IN SELECT * FROM orders
             WHERE user_id = NEW.user_id AND run_id = NEW.run_id AND symbol = NEW.symbol
               AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
               AND broker = 'paper'
             ORDER BY order_id
    LOOP
        PERFORM split_restate_order(o, NEW, ratio);
    END LOOP;

    INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
    VALUES (NEW.user_id, NEW.run_id, NEW.logical_time, 'SPLIT_APPLIED',
            NEW.symbol || '@' || NEW.ex_date,
            jsonb_build_object('symbol', NEW.symbol, 'ex_date', NEW.ex_date,
                               'quantity_before', NEW.quantity_before,
                               'quantity_after', NEW.quantity_after));
    RETURN NULL;
END $$;

CREATE FUNCTION split_restate_order(o orders, split split_applied, ratio numeric) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    rest numeric := trunc((o.quantity - o.filled_quantity) * ratio, 8);
BEGIN
    IF o.filled_quantity = 0 AND rest > 0 THEN
        UPDATE orders
        SET quantity = rest,
            limit_price = round(o.limit_price / ratio, 8),
            stop_price = round(o.stop_price / ratio, 8),
            trail_amount = round(o.trail_amount / ratio, 8),
            reference_price = round(o.reference_price / ratio, 8)
        WHERE user_id = o.user_id AND run_id = o.run_id AND order_id = o.order_id;
        INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
        SELECT user_id, run_id, split.logical_time, 'ORDER_RESTATED',
               order_id || '@' || split.ex_date, orders_event_payload(orders)
        FROM orders
        WHERE user_id = o.user_id AND run_id = o.run_id AND order_id = o.order_id;
        RETURN;
    END IF;
    UPDATE orders
    SET status = 'CANCELED', status_at = greatest(status_at, split.logical_time),
        status_reason = 'SPLIT'
    WHERE user_id = o.user_id AND run_id = o.run_id AND order_id = o.order_id;
    IF rest > 0 THEN
        INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity, order_type,
                            time_in_force, limit_price, stop_price, trail_amount, trail_percent,
                            expire_at, triggered_at, reference_price, status_reason, logical_time)
        VALUES (o.user_id, o.run_id, md5(o.order_id::text || split.ex_date)::uuid, o.symbol,
                o.side, rest, o.order_type, o.time_in_force, round(o.limit_price / ratio, 8),
                round(o.stop_price / ratio, 8), round(o.trail_amount / ratio, 8),
                o.trail_percent, o.expire_at, o.triggered_at,
                round(o.reference_price / ratio, 8), 'REST_AFTER_SPLIT', split.logical_time);
    END IF;
END $$;

CREATE TRIGGER split_applied_a_prepare_insert BEFORE INSERT ON split_applied
    FOR EACH ROW EXECUTE FUNCTION split_applied_prepare_insert();
CREATE TRIGGER split_applied_m_apply AFTER INSERT ON split_applied
    FOR EACH ROW EXECUTE FUNCTION split_applied_apply();
CREATE TRIGGER split_applied_z_refuse_change BEFORE UPDATE OR DELETE ON split_applied
    FOR EACH ROW WHEN (pg_trigger_depth() = 0)
    EXECUTE FUNCTION history_refuse_change('split_applied');
CREATE TRIGGER split_applied_z_refuse_truncate BEFORE TRUNCATE ON split_applied
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('split_applied');
