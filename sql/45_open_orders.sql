-- What open orders hold back: the cash of buys, the units of either side. The gate asks for it at
-- every new order, and must not read ten thousand open orders for an answer. So open orders are
-- dealt into buckets by their ids, and what a bucket comes to is kept, until one of its orders
-- changes. A bucket without a row is read from the orders themselves: a row that is not there is
-- never wrong, one that is there was proven, whoever wrote it.

-- Ids are made in more ways than one, and those of a run are much alike: only a hash deals evenly.
CREATE FUNCTION order_bucket(order_id uuid) RETURNS integer
LANGUAGE sql IMMUTABLE
RETURN get_byte(sha256(uuid_send(order_id)), 0) / 2;

COMMENT ON FUNCTION order_bucket IS 'The bucket, 0 to 127, in which an open order is summed.';

CREATE INDEX orders_open_bucket_idx ON orders (user_id, run_id, order_bucket(order_id))
    WHERE status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED');

CREATE TABLE open_order_sum (
    user_id uuid    NOT NULL,
    run_id  uuid    NOT NULL,
    kind    text    NOT NULL,
    symbol  text    NOT NULL DEFAULT '',
    bucket  integer NOT NULL,
    amount  numeric NOT NULL,
    CONSTRAINT open_order_sum_pkey PRIMARY KEY (user_id, run_id, kind, symbol, bucket),
    CONSTRAINT open_order_sum_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT open_order_sum_kind_known CHECK (kind = ANY ('{CASH,BUY,SELL}')),
    CONSTRAINT open_order_sum_symbol_unless_cash CHECK ((kind = 'CASH') = (symbol = '')),
    CONSTRAINT open_order_sum_bucket_in_range CHECK (bucket BETWEEN 0 AND 127),
    CONSTRAINT open_order_sum_amount_in_range CHECK (abs(amount) < 1e40)
);

COMMENT ON TABLE open_order_sum IS
    'What the open orders of a bucket come to; a row goes when one of them changes, and comes back '
    'when many must be read without it.';
COMMENT ON COLUMN open_order_sum.kind IS
    'CASH: what buys reserve, in currency. BUY, SELL: units of a symbol not yet filled.';
COMMENT ON COLUMN open_order_sum.symbol IS 'The symbol of units; empty for cash.';
COMMENT ON COLUMN open_order_sum.amount IS 'Computed by the database; NULL asks for it.';

CREATE FUNCTION open_orders_read(of_user uuid, of_run uuid, of_kind text, of_symbol text,
                                 of_buckets integer[], OUT amount numeric, OUT orders bigint)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    IF of_buckets IS NOT NULL THEN
        SELECT coalesce(sum(CASE WHEN of_kind = 'CASH' THEN o.reserved_cash
                                 WHEN o.symbol = of_symbol AND o.side = of_kind
                                 THEN o.quantity - o.filled_quantity END), 0), count(*)
        INTO amount, orders FROM orders o
        WHERE o.user_id = of_user AND o.run_id = of_run
          AND order_bucket(o.order_id) = ANY (of_buckets)
          AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED');
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
    'Trigger: a sum is what the open orders of its bucket come to.';

CREATE TRIGGER open_order_sum_a_check_write BEFORE INSERT OR UPDATE ON open_order_sum
    FOR EACH ROW EXECUTE FUNCTION open_order_sum_check_write();

-- Before the order is there, so that the gate sees what came before it in the same statement.
-- Deleted, not updated: there is nothing to prove of a sum that is not there.
CREATE FUNCTION orders_forget_sums() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET enable_seqscan = off AS $$
BEGIN
    DELETE FROM open_order_sum
    WHERE user_id = NEW.user_id AND run_id = NEW.run_id
      AND kind = ANY (ARRAY[NEW.side, CASE WHEN NEW.side = 'BUY' THEN 'CASH' END])
      AND symbol = ANY (ARRAY[NEW.symbol, '']) AND bucket = order_bucket(NEW.order_id);
    RETURN NEW;
END $$;

COMMENT ON FUNCTION orders_forget_sums IS
    'Trigger: the sums of an order''s bucket go when what it holds back changes.';

-- After every other trigger that may change the row. Acknowledgements change nothing here.
CREATE TRIGGER orders_y_forget_sums_insert BEFORE INSERT ON orders
    FOR EACH ROW WHEN (NEW.status <> ALL ('{REJECTED,FILLED}'))
    EXECUTE FUNCTION orders_forget_sums();
CREATE TRIGGER orders_y_forget_sums_update BEFORE UPDATE ON orders
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
    many    CONSTANT integer := 256;  -- orders
    known   record;
    buckets integer[];                -- that are not known; NULL: none is
    rest    record;
BEGIN
    SELECT sum(s.amount) AS amount, array_agg(s.bucket) AS buckets INTO known
    FROM open_order_sum s
    WHERE s.user_id = of_user AND s.run_id = of_run AND s.kind = of_kind AND s.symbol = of_symbol;
    IF known.buckets IS NOT NULL THEN
        buckets := ARRAY(SELECT generate_series(0, 127) EXCEPT SELECT unnest(known.buckets));
    END IF;
    rest := open_orders_read(of_user, of_run, of_kind, of_symbol, buckets);
    IF rest.orders > many AND current_setting('transaction_isolation') = 'read committed' THEN
        INSERT INTO open_order_sum (user_id, run_id, kind, symbol, bucket, amount)
        SELECT of_user, of_run, of_kind, of_symbol, b, NULL
        FROM unnest(coalesce(buckets, ARRAY(SELECT generate_series(0, 127)))) b;
    END IF;
    RETURN coalesce(known.amount, 0) + rest.amount;
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
