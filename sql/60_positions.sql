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
    CONSTRAINT position_symbol_format
        CHECK (symbol ~ '^[A-Z0-9][A-Z0-9._=^/ -]*$' AND length(symbol) <= 32),
    CONSTRAINT position_quantity_in_range
        CHECK (decimal_in_range(quantity, 1e18, 8)),
    CONSTRAINT position_mark_price_in_range CHECK (amount_in_range(mark_price)),
    CONSTRAINT position_mark_has_time CHECK ((mark_price IS NULL) = (marked_at IS NULL)),
    CONSTRAINT position_marked_at_in_range CHECK (time_in_range(marked_at)),
    CONSTRAINT position_holding_has_mark CHECK (quantity = 0 OR mark_price IS NOT NULL)
) WITH (fillfactor = 50);

COMMENT ON TABLE position IS 'Holdings by run and symbol, at average cost.';
COMMENT ON COLUMN position.quantity IS 'Units held, negative when short; computed by the database.';
COMMENT ON COLUMN position.cost_basis IS
    'Cost of what is held, without commission, in currency; negative when short.';
COMMENT ON COLUMN position.realized_pnl IS
    'Profit of what was closed, before commission, in currency.';
COMMENT ON COLUMN position.mark_price IS 'Last price that the run saw, per unit.';
COMMENT ON COLUMN position.marked_at IS 'Logical time of the mark.';

-- Average cost: adding to a position adds its cost, closing takes the closed share of the cost
-- away and realises the difference; a trade through zero closes first and opens with the rest.
-- A share of the cost may have no end: it is cut to 12 decimals, and a full close takes all.
CREATE FUNCTION position_after(quantity numeric, cost_basis numeric, delta numeric, price numeric,
                               OUT quantity_after numeric, OUT cost_after numeric,
                               OUT realized numeric)
LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
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

CREATE FUNCTION position_refuse_mark(symbol text, stands timestamptz, mark timestamptz)
RETURNS void LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'the mark of % is from %, not from an earlier %', symbol, stands, mark
        USING ERRCODE = '23T07', CONSTRAINT = 'position_mark_moves_forward',
              TABLE = 'position', COLUMN = 'marked_at', HINT = 'Mark with a newer price.';
END $$;

COMMENT ON FUNCTION position_refuse_mark IS 'Raises that a mark is older than another.';

CREATE FUNCTION position_check_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run record;
    due public.position;
BEGIN
    -- What a real broker did is so, even if a cash account is short by it.
    SELECT r.status, CASE WHEN r.broker = 'paper' THEN r.account_type ELSE 'MARGIN' END
               AS account_type, r.books_seq, r.broker
    INTO run FROM strategy_run r
    WHERE r.user_id = NEW.user_id AND r.run_id = NEW.run_id FOR NO KEY UPDATE;
    IF run.status IS DISTINCT FROM 'RUNNING' THEN
        PERFORM run_lock(NEW.user_id, NEW.run_id, 'position', 'RUNNING',
                         CASE WHEN run.broker <> 'paper' THEN 'STOPPING' ELSE 'RUNNING' END);
    END IF;
    IF TG_OP = 'UPDATE' THEN
        IF NEW.user_id <> OLD.user_id OR NEW.run_id <> OLD.run_id THEN
            PERFORM row_check_keeps_run(OLD.user_id, OLD.run_id, NEW.user_id, NEW.run_id,
                                        'position');
        ELSIF NEW.marked_at < OLD.marked_at
              OR NEW.marked_at IS NULL AND OLD.marked_at IS NOT NULL THEN
            PERFORM position_refuse_mark(NEW.symbol, OLD.marked_at, NEW.marked_at);
        ELSIF (NEW.symbol, NEW.quantity, NEW.cost_basis, NEW.realized_pnl)
              IS NOT DISTINCT FROM (OLD.symbol, OLD.quantity, OLD.cost_basis, OLD.realized_pnl) THEN
            RETURN NEW;
        END IF;
        due := OLD;
    ELSE
        SELECT * INTO due FROM position p
        WHERE p.user_id = NEW.user_id AND p.run_id = NEW.run_id AND p.symbol = NEW.symbol;
    END IF;
    IF run.broker = 'paper' THEN
        due := position_after_events(due, NEW.user_id, NEW.run_id, NEW.symbol, run.books_seq,
                                     run.account_type);
    ELSE
        due := position_after_news(due, NEW.user_id, NEW.run_id, NEW.symbol, run.books_seq);
    END IF;
    IF NEW.quantity IS NULL THEN
        NEW.quantity := coalesce(due.quantity, 0);
        NEW.cost_basis := coalesce(due.cost_basis, 0);
        NEW.realized_pnl := coalesce(due.realized_pnl, 0);
        -- A split restates the mark too, which nobody else gives then.
        IF NEW.marked_at IS NULL OR NEW.mark_price IS NOT DISTINCT FROM OLD.mark_price THEN
            NEW.mark_price := due.mark_price;
            NEW.marked_at := due.marked_at;
        END IF;
    END IF;
    IF (NEW.quantity, NEW.cost_basis, NEW.realized_pnl)
       IS DISTINCT FROM
       (coalesce(due.quantity, 0), coalesce(due.cost_basis, 0), coalesce(due.realized_pnl, 0))
       OR TG_OP = 'UPDATE' AND NEW.symbol <> OLD.symbol THEN
        RAISE EXCEPTION 'the position in % follows from its executions: %, not %', NEW.symbol,
            coalesce(due.quantity, 0), NEW.quantity
            USING ERRCODE = '23T04', CONSTRAINT = 'position_from_executions', TABLE = 'position',
                  COLUMN = 'quantity', HINT = 'Insert executions; the database computes positions.';
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION position_check_write IS
    'Trigger: quantity, cost and profit are what the ledger makes them; a mark is no older.';

CREATE TRIGGER position_a_check_write BEFORE INSERT OR UPDATE ON position
    FOR EACH ROW WHEN (current_user <> 'oms_keeper') EXECUTE FUNCTION position_check_write();
CREATE TRIGGER position_z_refuse_delete BEFORE DELETE ON position
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('position', 'kept');
CREATE TRIGGER position_z_refuse_truncate BEFORE TRUNCATE ON position
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('position', 'kept');

CREATE VIEW paper_position AS
    SELECT user_id, run_id, symbol, quantity, avg_cost, cost_basis, realized_pnl, mark_price,
           marked_at, market_value
    FROM position p
    WHERE EXISTS (SELECT FROM strategy_run r
                  WHERE r.user_id = p.user_id AND r.run_id = p.run_id AND r.broker = 'paper')
    WITH CHECK OPTION;

COMMENT ON VIEW paper_position IS 'The positions of paper runs.';
