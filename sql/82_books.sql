-- The books follow the ledger: cash and positions take up the EXECUTION and SPLIT_APPLIED events
-- after strategy_run.books_seq, and nothing else ever changes them. Their tables' triggers prove it
-- with the functions below, whoever writes.

CREATE FUNCTION event_cash_flow(event_type text, payload jsonb) RETURNS numeric
LANGUAGE sql IMMUTABLE
RETURN CASE WHEN event_type = 'EXECUTION'
            THEN execution_cash_flow(payload ->> 'side', (payload ->> 'quantity')::numeric,
                                     (payload ->> 'price')::numeric,
                                     (payload ->> 'commission')::numeric)
            ELSE 0 END;

COMMENT ON FUNCTION event_cash_flow IS 'What a ledger event does to cash, in currency.';

-- What a run's cash and books_seq must be: what they are, and what the events after books_seq add.
CREATE FUNCTION strategy_run_books_due(run strategy_run, OUT cash numeric, OUT books_seq bigint)
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    SELECT run.cash + coalesce(sum(event_cash_flow(l.event_type, l.payload)), 0),
           coalesce(max(l.seq), run.books_seq)
    INTO cash, books_seq
    FROM event_ledger l
    WHERE l.user_id = run.user_id AND l.run_id = run.run_id AND l.seq > run.books_seq
      AND l.event_type IN ('EXECUTION', 'SPLIT_APPLIED');
END $$;

COMMENT ON FUNCTION strategy_run_books_due IS
    'What the ledger makes of a run''s cash and books_seq.';

CREATE FUNCTION strategy_run_follow_ledger(of_user uuid, of_run uuid) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    UPDATE strategy_run r
    SET (cash, books_seq) = (SELECT d.cash, d.books_seq FROM strategy_run_books_due(r) d)
    WHERE r.user_id = of_user AND r.run_id = of_run;
END $$;

COMMENT ON FUNCTION strategy_run_follow_ledger IS
    'Brings a run''s cash up to the last event of its ledger.';

-- One step of the fold that makes a position of a run's events, here and in the audit. A split
-- keeps the cost and states the mark in the new unit. A mark from before a trade is older news
-- than the trade's own price.
CREATE FUNCTION position_after_event(p public.position, event event_ledger)
RETURNS public.position
LANGUAGE plpgsql IMMUTABLE SET search_path = public, pg_temp AS $$
DECLARE
    units numeric := (event.payload ->> 'quantity')::numeric;
    price numeric := (event.payload ->> 'price')::numeric;
    a     record;
BEGIN
    p.user_id := event.user_id;
    p.run_id := event.run_id;
    p.symbol := event.payload ->> 'symbol';
    p.quantity := coalesce(p.quantity, 0);
    p.cost_basis := coalesce(p.cost_basis, 0);
    p.realized_pnl := coalesce(p.realized_pnl, 0);
    IF event.event_type = 'SPLIT_APPLIED' THEN
        p.quantity := (event.payload ->> 'quantity_after')::numeric;
        p.mark_price := round(p.mark_price * (event.payload ->> 'denominator')::numeric
                              / (event.payload ->> 'numerator')::numeric, 8);
        RETURN p;
    END IF;
    a := position_after(p.quantity, p.cost_basis,
                        CASE WHEN event.payload ->> 'side' = 'BUY' THEN units ELSE -units END,
                        price);
    p.quantity := a.quantity_after;
    p.cost_basis := a.cost_after;
    p.realized_pnl := p.realized_pnl + a.realized;
    IF p.marked_at IS NULL OR p.marked_at < event.logical_time THEN
        p.mark_price := price;
        p.marked_at := event.logical_time;
    END IF;
    RETURN p;
END $$;

COMMENT ON FUNCTION position_after_event IS
    'A position after an EXECUTION or SPLIT_APPLIED event of its symbol.';

-- What a position must be: what it is, and what the events after the run's books_seq make of it.
CREATE FUNCTION position_due(of_user uuid, of_run uuid, of_symbol text)
RETURNS public.position
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
DECLARE
    run   strategy_run;
    p     public.position;
    was   numeric;
    event event_ledger;
BEGIN
    SELECT * INTO run FROM strategy_run WHERE user_id = of_user AND run_id = of_run;
    SELECT * INTO p FROM position
    WHERE user_id = of_user AND run_id = of_run AND symbol = of_symbol;
    FOR event IN SELECT * FROM event_ledger
                 WHERE user_id = of_user AND run_id = of_run AND seq > run.books_seq
                   AND event_type IN ('EXECUTION', 'SPLIT_APPLIED')
                   AND payload ->> 'symbol' = of_symbol
                 ORDER BY seq
    LOOP
        was := coalesce(p.quantity, 0);
        p := position_after_event(p, event);
        IF p.quantity < 0 AND p.quantity < was AND run.account_type = 'CASH' THEN
            RAISE EXCEPTION 'selling % % leaves a short position of % in a cash account',
                was - p.quantity, of_symbol, p.quantity
                USING ERRCODE = '23T04', CONSTRAINT = 'position_not_short_in_cash_account',
                      TABLE = 'position', COLUMN = 'quantity',
                      HINT = 'Sell at most what is held, or use a MARGIN account.';
        END IF;
    END LOOP;
    RETURN p;
END $$;

COMMENT ON FUNCTION position_due IS 'What the ledger makes of a position.';

CREATE FUNCTION position_follow_ledger(of_user uuid, of_run uuid, of_symbol text) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    due public.position := position_due(of_user, of_run, of_symbol);
BEGIN
    UPDATE position
    SET quantity = due.quantity, cost_basis = due.cost_basis, realized_pnl = due.realized_pnl,
        mark_price = due.mark_price, marked_at = due.marked_at
    WHERE user_id = of_user AND run_id = of_run AND symbol = of_symbol;
    -- A split of what was never held leaves nothing to write.
    IF NOT FOUND AND due.marked_at IS NOT NULL THEN
        INSERT INTO position (user_id, run_id, symbol, quantity, cost_basis, realized_pnl,
                              mark_price, marked_at)
        VALUES (of_user, of_run, of_symbol, due.quantity, due.cost_basis, due.realized_pnl,
                due.mark_price, due.marked_at);
    END IF;
END $$;

COMMENT ON FUNCTION position_follow_ledger IS
    'Brings a position up to the last event of its run''s ledger.';
