-- What open orders hold back: the cash of buys, the units of either side. The gate asks for it at
-- every new order, and must not read ten thousand open orders for an answer. So open orders are
-- dealt into buckets by their ids, and what a bucket comes to is kept until one of its orders
-- changes. What is not known is read from the orders themselves, so that it is never wrong; what is
-- known was proven, whoever wrote it.

-- Ids are made in more ways than one, and those of a run are much alike: only a hash deals evenly.
-- The cost has a planner without statistics take the index of buckets, not any index of the run.
CREATE FUNCTION order_bucket(order_id uuid) RETURNS integer
LANGUAGE plpgsql IMMUTABLE COST 1000 SET search_path = public, pg_temp AS $$
BEGIN
    RETURN get_byte(sha256(uuid_send(order_id)), 0) / 2;
END $$;

COMMENT ON FUNCTION order_bucket IS 'The bucket, 0 to 127, in which an open order is summed.';

-- The last condition is always true. Who does not say it, as those who only ask for open orders do
-- not, is never given this index for another.
CREATE INDEX orders_open_bucket_idx ON orders (user_id, run_id, order_bucket(order_id))
    WHERE status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
      AND order_bucket(order_id) >= 0;

CREATE TABLE open_order_sum (
    user_id  uuid    NOT NULL,
    run_id   uuid    NOT NULL,
    kind     text    NOT NULL,
    symbol   text    NOT NULL DEFAULT '',
    bucket   integer NOT NULL,
    is_known boolean NOT NULL DEFAULT true,
    amount   numeric,
    CONSTRAINT open_order_sum_pkey PRIMARY KEY (user_id, run_id, kind, symbol, bucket),
    CONSTRAINT open_order_sum_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT open_order_sum_kind_known CHECK (kind = ANY ('{CASH,BUY,SELL}')),
    CONSTRAINT open_order_sum_symbol_unless_cash CHECK ((kind = 'CASH') = (symbol = '')),
    CONSTRAINT open_order_sum_bucket_in_range CHECK (bucket BETWEEN 0 AND 127),
    CONSTRAINT open_order_sum_amount_if_known CHECK ((amount IS NOT NULL) = is_known),
    CONSTRAINT open_order_sum_amount_in_range CHECK (abs(amount) < 1e40)
) WITH (fillfactor = 50);

COMMENT ON TABLE open_order_sum IS
    'What the open orders of each bucket come to, where they are so many that it is worth knowing.';
COMMENT ON COLUMN open_order_sum.kind IS
    'CASH: what buys reserve, in currency. BUY, SELL: units of a symbol not yet filled.';
COMMENT ON COLUMN open_order_sum.symbol IS 'The symbol of units; empty for cash.';
COMMENT ON COLUMN open_order_sum.bucket IS 'That of its orders'' ids (order_bucket).';
COMMENT ON COLUMN open_order_sum.is_known IS
    'Until an order of the bucket changes, which is to be read from then on.';
COMMENT ON COLUMN open_order_sum.amount IS
    'Computed by the database, if it is known; NULL asks for it.';

CREATE FUNCTION open_orders_read(of_user uuid, of_run uuid, of_kind text, of_symbol text,
                                 of_buckets integer[], OUT amount numeric, OUT orders bigint)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp
SET plan_cache_mode = force_generic_plan AS $$
BEGIN
    IF of_buckets IS NOT NULL THEN
        SELECT coalesce(sum(s.amount), 0), coalesce(sum(s.orders), 0) INTO amount, orders
        FROM unnest(of_buckets) b
        CROSS JOIN LATERAL (
            SELECT sum(CASE WHEN of_kind = 'CASH' THEN o.reserved_cash
                            WHEN o.symbol = of_symbol AND o.side = of_kind
                            THEN o.quantity - o.filled_quantity END) AS amount,
                   count(*) AS orders
            FROM orders o
            WHERE o.user_id = of_user AND o.run_id = of_run AND order_bucket(o.order_id) = b
              AND order_bucket(o.order_id) >= 0
              AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')) s;
    ELSIF of_kind = 'CASH' THEN
        SELECT coalesce(sum(o.reserved_cash), 0), count(*) INTO amount, orders FROM orders o
        WHERE o.user_id = of_user AND o.run_id = of_run
          AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED');
    ELSE
        SELECT coalesce(sum(o.quantity - o.filled_quantity) FILTER (WHERE o.side = of_kind), 0),
               count(*)
        INTO amount, orders FROM orders o
        WHERE o.user_id = of_user AND o.run_id = of_run AND o.symbol = of_symbol
          AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED');
    END IF;
END $$;

COMMENT ON FUNCTION open_orders_read IS
    'What open orders hold back of a kind, and how many were read for it: those of some buckets, '
    'or all (NULL).';

-- The proof is read after the run is locked, so that every order of it is there to be seen; a
-- transaction that sees an older state for as long as it lasts can prove nothing.
CREATE FUNCTION open_order_sum_check_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    due record;
BEGIN
    PERFORM run_lock(NEW.user_id, NEW.run_id, 'open_order_sum', 'RUNNING', 'STOPPING');
    IF TG_OP = 'UPDATE' THEN
        PERFORM row_check_keeps_run(OLD.user_id, OLD.run_id, NEW.user_id, NEW.run_id,
                                    'open_order_sum');
    END IF;
    due := open_orders_read(NEW.user_id, NEW.run_id, NEW.kind, NEW.symbol, ARRAY[NEW.bucket]);
    IF NEW.amount IS NULL THEN
        NEW.amount := due.amount;
    END IF;
    IF NEW.amount <> due.amount
       OR current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'what open orders hold back follows from them: %, not %', due.amount,
            NEW.amount
            USING ERRCODE = '23T04', CONSTRAINT = 'open_order_sum_from_orders',
                  TABLE = 'open_order_sum', COLUMN = 'amount',
                  HINT = 'Leave amount NULL, in READ COMMITTED; the database computes it.';
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION open_order_sum_check_write IS
    'Trigger: a sum that is known is what the open orders of its bucket come to.';

-- That something is not known needs no proof.
CREATE TRIGGER open_order_sum_a_check_write BEFORE INSERT OR UPDATE ON open_order_sum
    FOR EACH ROW WHEN (NEW.is_known) EXECUTE FUNCTION open_order_sum_check_write();

-- Before the order is there, so that the gate sees what came before it in the same statement.
CREATE FUNCTION orders_forget_sums() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET enable_seqscan = off AS $$
BEGIN
    UPDATE open_order_sum SET is_known = false, amount = NULL
    WHERE user_id = NEW.user_id AND run_id = NEW.run_id
      AND kind = ANY (ARRAY[NEW.side, CASE WHEN NEW.side = 'BUY' THEN 'CASH' END])
      AND symbol = ANY (ARRAY[NEW.symbol, '']) AND bucket = order_bucket(NEW.order_id)
      AND is_known;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION orders_forget_sums IS
    'Trigger: what an order''s bucket comes to is not known when what it holds back changes.';

-- After the gate and whatever else changes what is asked for. Acknowledgements change nothing here.
CREATE TRIGGER orders_c_forget_insert BEFORE INSERT ON orders
    FOR EACH ROW WHEN (NEW.status <> ALL ('{REJECTED,FILLED}'))
    EXECUTE FUNCTION orders_forget_sums();
CREATE TRIGGER orders_c_forget_update BEFORE UPDATE ON orders
    FOR EACH ROW WHEN (
        (NEW.status = ANY ('{FILLED,CANCELED,REJECTED,EXPIRED}'))
            <> (OLD.status = ANY ('{FILLED,CANCELED,REJECTED,EXPIRED}'))
        OR (NEW.quantity, NEW.filled_quantity, NEW.limit_price, NEW.stop_price, NEW.reference_price)
           IS DISTINCT FROM
           (OLD.quantity, OLD.filled_quantity, OLD.limit_price, OLD.stop_price,
            OLD.reference_price))
    EXECUTE FUNCTION orders_forget_sums();

-- What is known is added up, the rest is read; if that were many orders, they are known from now
-- on. So few open orders are never summed, and many changes between two questions cost one proof.
CREATE FUNCTION open_orders_sum(of_user uuid, of_run uuid, of_kind text, of_symbol text)
RETURNS numeric LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp
SET enable_seqscan = off AS $$
DECLARE
    buckets CONSTANT integer := 128;
    many    CONSTANT integer := 512;  -- orders
    sums    record;
    rest    record;
BEGIN
    SELECT sum(s.amount) AS known, count(*) AS buckets,
           coalesce(array_agg(s.bucket) FILTER (WHERE NOT s.is_known), '{}') AS unknown
    INTO sums FROM open_order_sum s
    WHERE s.user_id = of_user AND s.run_id = of_run AND s.kind = of_kind AND s.symbol = of_symbol;
    rest := open_orders_read(of_user, of_run, of_kind, of_symbol,
                             CASE WHEN sums.buckets = buckets THEN sums.unknown END);
    IF rest.orders <= many OR current_setting('transaction_isolation') <> 'read committed' THEN
        NULL;
    ELSIF sums.buckets = buckets THEN
        UPDATE open_order_sum SET is_known = true
        WHERE user_id = of_user AND run_id = of_run AND kind = of_kind AND symbol = of_symbol
          AND bucket = ANY (sums.unknown);
    ELSE
        INSERT INTO open_order_sum (user_id, run_id, kind, symbol, bucket)
        SELECT of_user, of_run, of_kind, of_symbol, b FROM generate_series(0, buckets - 1) b
        ON CONFLICT DO NOTHING;
    END IF;
    RETURN CASE WHEN sums.buckets = buckets THEN coalesce(sums.known, 0) ELSE 0 END + rest.amount;
END $$;

COMMENT ON FUNCTION open_orders_sum IS
    'What a run''s open orders hold back: CASH, or units to BUY or SELL of a symbol.';

-- The cash that open buy orders of a run hold back.
CREATE FUNCTION run_reserved_cash(of_user uuid, of_run uuid) RETURNS numeric
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    RETURN open_orders_sum(of_user, of_run, 'CASH', '');
END $$;

COMMENT ON FUNCTION run_reserved_cash IS 'Cash held back by a run''s open buy orders.';

-- What open orders of an order's side would add to its run's holding.
CREATE FUNCTION orders_open_quantity(o orders) RETURNS numeric
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    RETURN open_orders_sum(o.user_id, o.run_id, o.side, o.symbol)
           * CASE WHEN o.side = 'BUY' THEN 1 ELSE -1 END;
END $$;

COMMENT ON FUNCTION orders_open_quantity IS
    'Units that open orders of an order''s symbol and side would add; negative for sells.';
