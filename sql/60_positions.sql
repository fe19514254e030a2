-- Positions: what a run holds. Quantity, cost and realised profit follow from the executions and
-- splits; only the mark, an observed price, is written from outside.

CREATE TABLE position (
    user_id      uuid    NOT NULL,
    run_id       uuid    NOT NULL,
    symbol       text    NOT NULL,
    quantity     numeric NOT NULL DEFAULT 0,
    cost_basis   numeric NOT NULL DEFAULT 0,
    realized_pnl numeric NOT NULL DEFAULT 0,
    mark_price   numeric,
    marked_at    timestamptz,
    avg_cost     numeric GENERATED ALWAYS AS (
        CASE WHEN quantity <> 0 THEN round(cost_basis / quantity, 10) END) STORED,
    market_value numeric GENERATED ALWAYS AS (
        CASE WHEN quantity = 0 THEN 0 ELSE quantity * mark_price END) STORED,
    CONSTRAINT position_pkey PRIMARY KEY (user_id, run_id, symbol),
    CONSTRAINT position_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT position_symbol_format CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]{0,31}$'),
    CONSTRAINT position_quantity_in_range
        CHECK (abs(quantity) < 1e18 AND min_scale(quantity) <= 8),
    CONSTRAINT position_mark_price_in_range
        CHECK (abs(mark_price) < 1e15 AND min_scale(mark_price) <= 8),
    CONSTRAINT position_mark_has_time CHECK ((mark_price IS NULL) = (marked_at IS NULL)),
    CONSTRAINT position_holding_has_mark CHECK (quantity = 0 OR mark_price IS NOT NULL)
) WITH (fillfactor = 50);

COMMENT ON TABLE position IS 'Holdings by run and symbol, at average cost.';
COMMENT ON COLUMN position.quantity IS 'Units held, negative when short; computed by the database.';
COMMENT ON COLUMN position.cost_basis IS
    'Cost of what is held, without commission, in currency; negative when short.';
COMMENT ON COLUMN position.realized_pnl IS 'Profit of what was closed, before commission, in currency.';
COMMENT ON COLUMN position.mark_price IS 'Last price that the run saw, per unit.';
COMMENT ON COLUMN position.marked_at IS 'Logical time of the mark.';

-- Average cost: adding to a position adds its cost, closing takes the closed share of the cost
-- away and realises the difference; a trade through zero closes first and opens with the rest.
-- A share of the cost may have no end: it is cut to 12 decimals, and a full close takes all.
CREATE FUNCTION position_after(quantity numeric, cost_basis numeric, delta numeric, price numeric,
                               OUT quantity_after numeric, OUT cost_after numeric,
                               OUT realized numeric)
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    closed numeric;
    removed numeric;
BEGIN
    quantity_after := quantity + delta;
    IF quantity * delta >= 0 THEN
        cost_after := cost_basis + delta * price;
        realized := 0;
        RETURN;
    END IF;
    closed := sign(delta) * least(abs(delta), abs(quantity));
    removed := CASE WHEN closed = -quantity THEN cost_basis
                    ELSE round(cost_basis * -closed / quantity, 12) END;
    realized := -closed * price - removed;
    cost_after := cost_basis - removed + (delta - closed) * price;
END $$;

COMMENT ON FUNCTION position_after IS 'A position after a trade of delta units, by average cost.';

CREATE FUNCTION position_apply(e execution) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    p     position%ROWTYPE;
    a     record;
    delta numeric := CASE WHEN e.side = 'BUY' THEN e.quantity ELSE -e.quantity END;
BEGIN
    SELECT * INTO p FROM position
    WHERE user_id = e.user_id AND run_id = e.run_id AND symbol = e.symbol;
    a := position_after(coalesce(p.quantity, 0), coalesce(p.cost_basis, 0), delta, e.price);
    IF a.quantity_after < 0 AND delta < 0
       AND (SELECT account_type FROM strategy_run
            WHERE user_id = e.user_id AND run_id = e.run_id) = 'CASH' THEN
        RAISE EXCEPTION 'selling % % leaves a short position of % in a cash account',
            e.quantity, e.symbol, a.quantity_after
            USING ERRCODE = '23T04', CONSTRAINT = 'position_not_short_in_cash_account',
                  TABLE = 'position', COLUMN = 'quantity',
                  HINT = 'Sell at most what is held, or use a MARGIN account.';
    END IF;
    IF p.symbol IS NULL THEN
        INSERT INTO position (user_id, run_id, symbol, quantity, cost_basis, realized_pnl,
                              mark_price, marked_at)
        VALUES (e.user_id, e.run_id, e.symbol, a.quantity_after, a.cost_after, a.realized,
                e.price, e.logical_time);
    ELSE
        -- A mark from before the trade is older news than the trade's own price.
        UPDATE position
        SET quantity = a.quantity_after, cost_basis = a.cost_after,
            realized_pnl = p.realized_pnl + a.realized,
            mark_price = CASE WHEN p.marked_at >= e.logical_time THEN p.mark_price ELSE e.price END,
            marked_at = CASE WHEN p.marked_at >= e.logical_time THEN p.marked_at
                             ELSE e.logical_time END
        WHERE user_id = e.user_id AND run_id = e.run_id AND symbol = e.symbol;
    END IF;
END $$;

CREATE FUNCTION position_check_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM run_lock_running(NEW.user_id, NEW.run_id, 'position');
    IF TG_OP = 'INSERT' AND (NEW.quantity, NEW.cost_basis, NEW.realized_pnl) <> (0, 0, 0)
       OR TG_OP = 'UPDATE' AND (NEW.user_id, NEW.run_id, NEW.symbol, NEW.quantity, NEW.cost_basis,
                                NEW.realized_pnl)
                               IS DISTINCT FROM
                               (OLD.user_id, OLD.run_id, OLD.symbol, OLD.quantity, OLD.cost_basis,
                                OLD.realized_pnl) THEN
        RAISE EXCEPTION 'the position in % follows from its executions', NEW.symbol
            USING ERRCODE = '23T04', CONSTRAINT = 'position_from_executions', TABLE = 'position',
                  COLUMN = 'quantity', HINT = 'Insert executions; the database computes positions.';
    ELSIF TG_OP = 'UPDATE' AND NEW.marked_at < OLD.marked_at THEN
        RAISE EXCEPTION 'the mark of % is from %, not from an earlier %', NEW.symbol,
            OLD.marked_at, NEW.marked_at
            USING ERRCODE = '23T07', CONSTRAINT = 'position_mark_moves_forward',
                  TABLE = 'position', COLUMN = 'marked_at', HINT = 'Mark with a newer price.';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER position_a_check_write BEFORE INSERT OR UPDATE ON position
    FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION position_check_write();
CREATE TRIGGER position_z_refuse_delete BEFORE DELETE ON position
    FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION history_refuse_change('position');
CREATE TRIGGER position_z_refuse_truncate BEFORE TRUNCATE ON position
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('position');

CREATE VIEW paper_position AS
    SELECT user_id, run_id, symbol, quantity, avg_cost, cost_basis, realized_pnl, mark_price,
           marked_at, market_value
    FROM position p
    WHERE EXISTS (SELECT FROM strategy_run r
                  WHERE r.user_id = p.user_id AND r.run_id = p.run_id AND r.broker = 'paper')
    WITH CHECK OPTION;

COMMENT ON VIEW paper_position IS 'The positions of paper runs.';
