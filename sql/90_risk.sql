-- Risk: limits are rows, per user or per run, and decided here when an order arrives, so that an
-- order from psql meets them too. A refusal is stored on the order: source, code, limit and value.

CREATE TABLE risk_limit (
    user_id     uuid        NOT NULL,
    limit_id    uuid        NOT NULL DEFAULT gen_random_uuid(),
    run_id      uuid,
    kind        text        NOT NULL,
    symbol      text,
    limit_value numeric,
    created_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT risk_limit_pkey PRIMARY KEY (user_id, limit_id),
    CONSTRAINT risk_limit_belongs_to_user
        FOREIGN KEY (user_id) REFERENCES app_user (user_id) ON DELETE CASCADE,
    CONSTRAINT risk_limit_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT risk_limit_kind_known CHECK (kind IN (
        'MAX_POSITION', 'MAX_ORDER_QUANTITY', 'MAX_ORDER_NOTIONAL',
        'FORBIDDEN_SYMBOL', 'ALLOWED_SYMBOL')),
    CONSTRAINT risk_limit_has_what_its_kind_needs CHECK (
        CASE WHEN kind IN ('FORBIDDEN_SYMBOL', 'ALLOWED_SYMBOL')
             THEN symbol IS NOT NULL AND limit_value IS NULL
             ELSE limit_value >= 0 AND limit_value < 1e20 AND limit_value IS NOT NULL END),
    CONSTRAINT risk_limit_symbol_format
        CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]*$' AND length(symbol) <= 32)
);

COMMENT ON TABLE risk_limit IS 'Limits that every order of a user, or of one run, must meet.';
COMMENT ON COLUMN risk_limit.run_id IS 'The run that it holds for; NULL: all runs of the user.';
COMMENT ON COLUMN risk_limit.symbol IS 'The symbol that it holds for; NULL: every symbol.';
COMMENT ON COLUMN risk_limit.limit_value IS
    'Units (MAX_POSITION, MAX_ORDER_QUANTITY) or currency (MAX_ORDER_NOTIONAL).';

-- The limits that hold for a run are looked up by its user.
CREATE INDEX risk_limit_run_idx ON risk_limit (user_id, run_id, kind);

-- A limit is removed and made again, not moved to somebody else; an ended run takes no more.
CREATE FUNCTION risk_limit_guard_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF NEW.run_id IS NOT NULL THEN
        PERFORM run_lock(NEW.user_id, NEW.run_id, 'risk_limit', 'CREATED', 'RUNNING', 'STOPPING');
    END IF;
    IF TG_OP = 'INSERT' THEN
        NEW.created_at := now();
        NEW.symbol := upper(btrim(NEW.symbol));
    ELSE
        PERFORM row_check_keeps_run(OLD.user_id, OLD.run_id, NEW.user_id, NEW.run_id, 'risk_limit');
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION risk_limit_guard_write IS
    'Trigger: limits of runs that have not ended, each with the user and run it was made for.';

CREATE TRIGGER risk_limit_a_guard_write BEFORE INSERT OR UPDATE ON risk_limit
    FOR EACH ROW EXECUTE FUNCTION risk_limit_guard_write();

-- What makes an order nonsense in itself.
CREATE FUNCTION orders_validation_code(o orders) RETURNS text
LANGUAGE sql IMMUTABLE
RETURN
    CASE
        WHEN o.quantity <= 0 THEN 'QUANTITY_NOT_POSITIVE'
        WHEN o.order_type IN ('LIMIT', 'STOP_LIMIT') AND o.limit_price IS NULL
            THEN 'LIMIT_PRICE_MISSING'
        WHEN o.order_type NOT IN ('LIMIT', 'STOP_LIMIT') AND o.limit_price IS NOT NULL
            THEN 'LIMIT_PRICE_NOT_ALLOWED'
        WHEN o.order_type IN ('STOP', 'STOP_LIMIT') AND o.stop_price IS NULL
            THEN 'STOP_PRICE_MISSING'
        WHEN o.order_type IN ('MARKET', 'LIMIT') AND o.stop_price IS NOT NULL
            THEN 'STOP_PRICE_NOT_ALLOWED'
        WHEN o.order_type = 'TRAIL'
             AND (o.trail_amount IS NULL) = (o.trail_percent IS NULL)
            THEN 'TRAIL_NEEDS_AMOUNT_OR_PERCENT'
        WHEN o.order_type <> 'TRAIL' AND num_nonnulls(o.trail_amount, o.trail_percent) > 0
            THEN 'TRAIL_NOT_ALLOWED'
        WHEN o.trail_amount <= 0 OR o.trail_percent <= 0 OR o.trail_percent >= 100
            THEN 'TRAIL_OUT_OF_RANGE'
        WHEN o.time_in_force = 'GTD' AND o.expire_at IS NULL THEN 'EXPIRE_AT_MISSING'
        WHEN o.time_in_force IN ('OPG', 'CLS') AND o.order_type NOT IN ('MARKET', 'LIMIT')
            THEN 'ORDER_TYPE_NOT_ALLOWED_IN_AUCTION'
    END;

COMMENT ON FUNCTION orders_validation_code IS 'Why an order is nonsense in itself, or NULL.';

CREATE FUNCTION orders_price_code(o orders) RETURNS text
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT 'PRICE_NOT_POSITIVE'
    WHERE least(o.limit_price, o.stop_price, o.reference_price) <= 0
      AND NOT EXISTS (SELECT FROM instrument i
                      WHERE i.symbol = o.symbol AND i.negative_price_allowed)
$$;

COMMENT ON FUNCTION orders_price_code IS 'Why an order''s prices can not be, or NULL.';

-- What open orders of an order's side would add to its run's holding.
CREATE FUNCTION orders_open_quantity(o orders) RETURNS numeric
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN coalesce((SELECT sum(w.quantity - w.filled_quantity) FROM orders w
                     WHERE w.user_id = o.user_id AND w.run_id = o.run_id AND w.symbol = o.symbol
                       AND w.side = o.side
                       AND w.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')), 0)
           * CASE WHEN o.side = 'BUY' THEN 1 ELSE -1 END;
END $$;

COMMENT ON FUNCTION orders_open_quantity IS
    'Units that open orders of an order''s symbol and side would add; negative for sells.';

-- The cash that open buy orders of a run hold back.
CREATE FUNCTION run_reserved_cash(of_user uuid, of_run uuid) RETURNS numeric
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN coalesce((SELECT sum(reserved_cash) FROM orders
                     WHERE user_id = of_user AND run_id = of_run
                       AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')), 0);
END $$;

COMMENT ON FUNCTION run_reserved_cash IS 'Cash held back by a run''s open buy orders.';

-- What a symbol costs as far as a run can know: its own mark, else the last imported close.
CREATE FUNCTION orders_known_price(o orders) RETURNS numeric
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT coalesce(
        (SELECT p.mark_price FROM position p
         WHERE p.user_id = o.user_id AND p.run_id = o.run_id AND p.symbol = o.symbol),
        (SELECT b.close FROM price_bar b
         WHERE b.symbol = o.symbol AND b.bar_end <= o.logical_time
         ORDER BY b.bar_end DESC LIMIT 1))
$$;

COMMENT ON FUNCTION orders_known_price IS
    'The last price of an order''s symbol that its run knows.';

-- The first limit that an order breaks, with the limit and the value, or no row.
CREATE FUNCTION orders_broken_limit(o orders, price numeric, exposure numeric)
RETURNS TABLE (code text, limit_value numeric, value numeric)
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    WITH here AS (
        SELECT l.kind, l.symbol, l.limit_value FROM risk_limit l
        WHERE l.user_id = o.user_id AND (l.run_id IS NULL OR l.run_id = o.run_id)
    ), broken AS (
        SELECT 'FORBIDDEN_SYMBOL' AS code, NULL::numeric AS limit_value, NULL::numeric AS value
        FROM here h WHERE h.kind = 'FORBIDDEN_SYMBOL' AND h.symbol = o.symbol
        UNION ALL
        SELECT 'SYMBOL_NOT_ALLOWED', NULL, NULL
        FROM here h WHERE h.kind = 'ALLOWED_SYMBOL'
        HAVING count(*) > 0 AND NOT bool_or(h.symbol = o.symbol)
        UNION ALL
        SELECT h.kind, h.limit_value, v.value
        FROM here h
        CROSS JOIN (SELECT exposure + CASE WHEN o.side = 'BUY' THEN o.quantity
                                           ELSE -o.quantity END AS position) a
        CROSS JOIN LATERAL (SELECT CASE
            WHEN h.kind = 'MAX_ORDER_QUANTITY' THEN o.quantity
            WHEN h.kind = 'MAX_ORDER_NOTIONAL' THEN o.quantity * abs(price)
            WHEN h.kind = 'MAX_POSITION' THEN abs(a.position) END AS value) v
        WHERE h.kind IN ('MAX_ORDER_QUANTITY', 'MAX_ORDER_NOTIONAL', 'MAX_POSITION')
          AND (h.symbol IS NULL OR h.symbol = o.symbol)
          -- What can't be valued can't be shown to be within a limit.
          AND (v.value > h.limit_value OR v.value IS NULL)
          -- Out of a position that is too large one may always get, but not out at the other side.
          AND (h.kind <> 'MAX_POSITION' OR v.value > abs(exposure) OR a.position * exposure < 0)
    )
    SELECT b.code, b.limit_value, b.value FROM broken b ORDER BY b.code, b.limit_value LIMIT 1
$$;

COMMENT ON FUNCTION orders_broken_limit IS 'The first risk_limit that an order breaks, or no row.';

-- The gate: why an order may not be taken, given the cash and the holding that it meets.
CREATE FUNCTION orders_gate(o orders, account_type text, limited boolean, free_cash numeric,
                            exposure numeric, OUT source text, OUT code text, OUT reason text)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    price  numeric := coalesce(o.limit_price, o.stop_price, o.reference_price);
    broken record;
BEGIN
    code := orders_validation_code(o);
    IF code IS NULL AND least(o.limit_price, o.stop_price, o.reference_price) <= 0 THEN
        code := orders_price_code(o);
    END IF;
    IF code IS NOT NULL THEN
        source := 'VALIDATION';
        RETURN;
    END IF;
    IF limited THEN
        SELECT * INTO broken FROM orders_broken_limit(o, price, exposure);
        IF FOUND THEN
            code := broken.code;
            reason := coalesce('limit ' || trim_scale(broken.limit_value) || ', would be '
                               || coalesce(trim_scale(broken.value)::text, 'unknown'), o.symbol);
        END IF;
    END IF;
    IF code IS NOT NULL OR account_type <> 'CASH' THEN
        NULL;
    ELSIF o.side = 'SELL' AND o.quantity > exposure THEN
        code := 'INSUFFICIENT_POSITION';
        reason := format('holds %s, would sell %s', trim_scale(exposure), trim_scale(o.quantity));
    ELSIF o.side = 'BUY' AND o.quantity * price > free_cash THEN
        code := 'INSUFFICIENT_CASH';
        reason := format('has %s, needs %s', trim_scale(free_cash),
                         trim_scale(o.quantity * price));
    END IF;
    IF code IS NOT NULL THEN
        source := 'RISK';
        reason := code || ': ' || reason;
    END IF;
END $$;

COMMENT ON FUNCTION orders_gate IS
    'Why an order is refused, or NULLs: limited is whether its user has limits, free_cash what '
    'open orders leave, exposure the holding and open orders of its side.';

CREATE FUNCTION orders_pass_gate() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run     record;
    held    numeric;
    limited boolean;
    refusal record;
BEGIN
    SELECT r.cash, r.account_type INTO run FROM strategy_run r
    WHERE r.user_id = NEW.user_id AND r.run_id = NEW.run_id;
    IF NEW.reference_price IS NULL AND orders_validation_code(NEW) IS NULL
       AND orders_price_code(NEW) IS NULL THEN
        NEW.reference_price := orders_known_price(NEW);
    END IF;
    SELECT p.quantity INTO held FROM position p
    WHERE p.user_id = NEW.user_id AND p.run_id = NEW.run_id AND p.symbol = NEW.symbol;
    limited := EXISTS (SELECT FROM risk_limit l WHERE l.user_id = NEW.user_id);
    -- Each of the sums reads all open orders: only what the gate will ask for.
    refusal := orders_gate(
        NEW, run.account_type, limited,
        CASE WHEN run.account_type = 'CASH' AND NEW.side = 'BUY'
             THEN run.cash - run_reserved_cash(NEW.user_id, NEW.run_id) END,
        CASE WHEN limited OR run.account_type = 'CASH' AND NEW.side = 'SELL'
             THEN coalesce(held, 0) + orders_open_quantity(NEW) END);
    IF refusal.code IS NOT NULL THEN
        NEW.status := 'REJECTED';
        NEW.reject_source := refusal.source;
        NEW.reject_code := refusal.code;
        NEW.status_reason := coalesce(refusal.reason, NEW.status_reason);
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION orders_pass_gate IS
    'Trigger: decides when an order arrives; a refusal is stored as REJECTED.';

CREATE TRIGGER orders_b_pass_gate BEFORE INSERT ON orders
    FOR EACH ROW WHEN (NEW.status <> ALL ('{REJECTED,FILLED}') AND NOT NEW.recovered)
    EXECUTE FUNCTION orders_pass_gate();
