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

COMMENT ON TABLE split_applied IS
    'Splits that a run''s position and orders went through; append-only.';
COMMENT ON COLUMN split_applied.quantity_before IS 'Position before it; computed by the database.';
COMMENT ON COLUMN split_applied.quantity_after IS
    'Position after it, cut to 8 decimals; computed by the database.';

CREATE FUNCTION split_applied_prepare_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run    strategy_run;
    action corporate_action;
BEGIN
    run := run_lock(NEW.user_id, NEW.run_id, 'split_applied', 'RUNNING');
    SELECT * INTO action FROM corporate_action
    WHERE symbol = NEW.symbol AND ex_date = NEW.ex_date AND kind = NEW.kind;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'no split of % on % was announced', NEW.symbol, NEW.ex_date
            USING ERRCODE = 'foreign_key_violation', CONSTRAINT = 'split_applied_is_announced',
                  TABLE = 'split_applied', COLUMN = 'ex_date',
                  HINT = 'Announce it in corporate_action (oms data import --splits) first.';
    END IF;
    NEW.logical_time := coalesce(NEW.logical_time, run_last_time(NEW.user_id, NEW.run_id));
    IF NOT split_is_due(run, NEW.ex_date, NEW.logical_time) THEN
        RAISE EXCEPTION 'the split of % on % is not due at %', NEW.symbol, NEW.ex_date,
            NEW.logical_time
            USING ERRCODE = '23T07', CONSTRAINT = 'split_applied_when_due',
                  TABLE = 'split_applied', COLUMN = 'ex_date',
                  HINT = 'A split is applied between the last tick before its day and the next.';
    END IF;
    SELECT coalesce(sum(quantity), 0) INTO NEW.quantity_before FROM position
    WHERE user_id = NEW.user_id AND run_id = NEW.run_id AND symbol = NEW.symbol;
    NEW.quantity_after :=
        trunc(NEW.quantity_before * action.numerator / action.denominator, 8);
    NEW.recorded_at := now();
    RETURN NEW;
END $$;

COMMENT ON FUNCTION split_applied_prepare_insert IS
    'Trigger: only an announced split, when it is due; the quantities are the position''s.';

-- A position that was opened in new units must not be split again: the ex-date is after the session
-- of the last tick (of the first event, before any tick) and has come. Where the calendar says
-- nothing, days in UTC decide, which are at most one off.
CREATE FUNCTION split_is_due(run strategy_run, ex_date date, at timestamptz) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    since timestamptz;
BEGIN
    SELECT max(logical_time) INTO since FROM event_ledger
    WHERE user_id = run.user_id AND run_id = run.run_id AND event_type = 'TICK';
    IF since IS NULL THEN
        SELECT min(logical_time) INTO since FROM event_ledger
        WHERE user_id = run.user_id AND run_id = run.run_id;
    END IF;
    RETURN (since IS NULL
            OR ex_date > coalesce((calendar_session_at(run.calendar, since)).session_date,
                                  (since AT TIME ZONE 'UTC')::date - 2))
       AND ex_date <= greatest((calendar_session_at(run.calendar, at)).session_date,
                               (at AT TIME ZONE 'UTC')::date);
END $$;

COMMENT ON FUNCTION split_is_due IS
    'Whether a split''s ex-date lies between a run''s last tick and a moment.';

-- The event first: position and orders follow it. Resting orders ask the same money for the new
-- unit. A partly filled order can't be restated without falsifying its executions, so its rest is
-- cancelled and placed again.
CREATE FUNCTION split_applied_apply() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    o orders;
BEGIN
    -- Two splits in one statement, or a trade beside the split, would both start from one position.
    IF NEW.quantity_before <> coalesce((SELECT quantity FROM position
                                        WHERE user_id = NEW.user_id AND run_id = NEW.run_id
                                          AND symbol = NEW.symbol), 0) THEN
        RAISE EXCEPTION 'the position in % has changed since this split began', NEW.symbol
            USING ERRCODE = '23T08', CONSTRAINT = 'split_applied_starts_from_position',
                  TABLE = 'split_applied', COLUMN = 'quantity_before',
                  HINT = 'Apply one split of a symbol a statement, and nothing beside it.';
    END IF;
    INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
    VALUES (NEW.user_id, NEW.run_id, NEW.logical_time, 'SPLIT_APPLIED',
            split_event_subject(NEW), split_event_payload(NEW));
    PERFORM position_follow_ledger(NEW.user_id, NEW.run_id, NEW.symbol);
    FOR o IN SELECT * FROM orders
             WHERE user_id = NEW.user_id AND run_id = NEW.run_id AND symbol = NEW.symbol
               AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
               AND broker = 'paper'
             ORDER BY order_id
    LOOP
        PERFORM split_restate_order(o, NEW);
    END LOOP;
    PERFORM strategy_run_follow_ledger(NEW.user_id, NEW.run_id);
    RETURN NULL;
END $$;

COMMENT ON FUNCTION split_applied_apply IS
    'Trigger: a split is told to the ledger and restates resting orders and the position.';

CREATE FUNCTION split_event_subject(split split_applied) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN split.symbol || '@' || to_char(split.ex_date::timestamp, 'YYYY-MM-DD');

COMMENT ON FUNCTION split_event_subject IS 'What the event of a split is about: symbol and day.';

CREATE FUNCTION split_event_payload(split split_applied) RETURNS jsonb
LANGUAGE sql STABLE SET search_path = public, pg_temp SET timezone = 'UTC' AS $$
    SELECT jsonb_build_object('symbol', split.symbol, 'ex_date', split.ex_date,
                              'numerator', c.numerator, 'denominator', c.denominator,
                              'quantity_before', split.quantity_before,
                              'quantity_after', split.quantity_after)
    FROM corporate_action c
    WHERE c.symbol = split.symbol AND c.ex_date = split.ex_date AND c.kind = split.kind
$$;

COMMENT ON FUNCTION split_event_payload IS 'What the event of a split says.';

-- An order as a split states it: more units at the same money.
CREATE FUNCTION orders_after_split(o orders, numerator numeric, denominator numeric) RETURNS orders
LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
BEGIN
    o.quantity := trunc((o.quantity - o.filled_quantity) * numerator / denominator, 8);
    o.limit_price := round(o.limit_price * denominator / numerator, 8);
    o.stop_price := round(o.stop_price * denominator / numerator, 8);
    o.trail_amount := round(o.trail_amount * denominator / numerator, 8);
    o.reference_price := round(o.reference_price * denominator / numerator, 8);
    RETURN o;
END $$;

COMMENT ON FUNCTION orders_after_split IS 'The rest of an order in a split''s new units.';

-- The proof of a restated order: its run is just going through a split of the symbol, told to the
-- ledger and not yet taken up by the books, and the order is what that split makes of it.
CREATE FUNCTION orders_follows_split(was orders, now_is orders) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    split jsonb;
    due   orders;
BEGIN
    SELECT l.payload INTO split
    FROM strategy_run r
    JOIN event_ledger l ON l.user_id = r.user_id AND l.run_id = r.run_id AND l.seq > r.books_seq
    WHERE r.user_id = was.user_id AND r.run_id = was.run_id AND l.event_type = 'SPLIT_APPLIED'
      AND l.payload ->> 'symbol' = was.symbol
    ORDER BY l.seq DESC LIMIT 1;
    IF NOT FOUND OR was.filled_quantity <> 0 THEN
        RETURN false;
    END IF;
    due := orders_after_split(was, (split ->> 'numerator')::numeric,
                              (split ->> 'denominator')::numeric);
    RETURN (now_is.quantity, now_is.limit_price, now_is.stop_price, now_is.trail_amount,
            now_is.reference_price)
           IS NOT DISTINCT FROM
           (due.quantity, due.limit_price, due.stop_price, due.trail_amount, due.reference_price);
END $$;

COMMENT ON FUNCTION orders_follows_split IS 'Whether an order is restated by the split under way.';

CREATE FUNCTION split_restate_order(o orders, split split_applied) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    ratio corporate_action;
    rest  orders;
BEGIN
    SELECT * INTO ratio FROM corporate_action
    WHERE symbol = split.symbol AND ex_date = split.ex_date AND kind = split.kind;
    rest := orders_after_split(o, ratio.numerator, ratio.denominator);
    IF o.filled_quantity = 0 AND rest.quantity > 0 THEN
        UPDATE orders
        SET quantity = rest.quantity, limit_price = rest.limit_price,
            stop_price = rest.stop_price, trail_amount = rest.trail_amount,
            reference_price = rest.reference_price
        WHERE user_id = o.user_id AND run_id = o.run_id AND order_id = o.order_id;
        INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
        VALUES (o.user_id, o.run_id, split.logical_time, 'ORDER_RESTATED',
                o.order_id || '@' || to_char(split.ex_date::timestamp, 'YYYY-MM-DD'),
                orders_event_payload(rest));
        RETURN;
    END IF;
    UPDATE orders SET status = 'CANCELED', status_reason = 'SPLIT'
    WHERE user_id = o.user_id AND run_id = o.run_id AND order_id = o.order_id;
    IF rest.quantity > 0 THEN
        INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity, order_type,
                            time_in_force, limit_price, stop_price, trail_amount, trail_percent,
                            expire_at, triggered_at, reference_price, status_reason, logical_time)
        VALUES (o.user_id, o.run_id,
                md5(o.order_id || to_char(split.ex_date::timestamp, 'YYYY-MM-DD'))::uuid, o.symbol,
                o.side, rest.quantity, o.order_type, o.time_in_force, rest.limit_price,
                rest.stop_price, rest.trail_amount, o.trail_percent, o.expire_at, o.triggered_at,
                rest.reference_price, 'REST_AFTER_SPLIT', split.logical_time);
    END IF;
END $$;

COMMENT ON FUNCTION split_restate_order IS
    'Restates a resting order, or replaces a partly filled one.';

CREATE TRIGGER split_applied_a_prepare_insert BEFORE INSERT ON split_applied
    FOR EACH ROW EXECUTE FUNCTION split_applied_prepare_insert();
CREATE TRIGGER split_applied_m_apply AFTER INSERT ON split_applied
    FOR EACH ROW EXECUTE FUNCTION split_applied_apply();
CREATE TRIGGER split_applied_z_refuse_change BEFORE UPDATE OR DELETE ON split_applied
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('split_applied', 'append_only');
CREATE TRIGGER split_applied_z_refuse_truncate BEFORE TRUNCATE ON split_applied
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('split_applied', 'append_only');
