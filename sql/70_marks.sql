-- The mark: what a run was worth at a logical time. Cash and market value are the books', whoever
-- writes the row; equity is their sum by definition.

CREATE TABLE mtm_ledger (
    user_id      uuid        NOT NULL,
    run_id       uuid        NOT NULL,
    logical_time timestamptz NOT NULL,
    cash         numeric     NOT NULL,
    market_value numeric     NOT NULL,
    equity       numeric     GENERATED ALWAYS AS (cash + market_value) STORED,
    recorded_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT mtm_ledger_one_per_logical_time PRIMARY KEY (user_id, run_id, logical_time),
    CONSTRAINT mtm_ledger_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT mtm_ledger_logical_time_in_range CHECK (time_in_range(logical_time))
);

COMMENT ON TABLE mtm_ledger IS 'Mark-to-market by run and logical time; append-only.';
COMMENT ON COLUMN mtm_ledger.cash IS 'The run''s cash, in its currency; proven against the run.';
COMMENT ON COLUMN mtm_ledger.market_value IS
    'Sum of quantity x mark of its positions; proven against them.';
COMMENT ON COLUMN mtm_ledger.equity IS 'cash + market_value.';

CREATE FUNCTION mtm_ledger_prepare_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    run    strategy_run;
    held   numeric;
    newest timestamptz;
BEGIN
    run := run_lock(NEW.user_id, NEW.run_id, 'mtm_ledger', 'RUNNING');
    NEW.logical_time := coalesce(NEW.logical_time, run_last_time(NEW.user_id, NEW.run_id));
    NEW.recorded_at := now();
    -- The books are those of the newest event: an earlier time had others.
    SELECT greatest((SELECT max(logical_time) FROM mtm_ledger
                     WHERE user_id = NEW.user_id AND run_id = NEW.run_id),
                    (SELECT max(logical_time) FROM event_ledger
                     WHERE user_id = NEW.user_id AND run_id = NEW.run_id)) INTO newest;
    IF NEW.logical_time < newest THEN
        RAISE EXCEPTION 'run % already stands at %, after %', NEW.run_id, newest, NEW.logical_time
            USING ERRCODE = '23T07', CONSTRAINT = 'mtm_ledger_time_moves_forward',
                  TABLE = 'mtm_ledger', COLUMN = 'logical_time',
                  HINT = 'A run only moves forward; mark it at a later logical_time.';
    END IF;
    SELECT coalesce(sum(market_value), 0) INTO held FROM position
    WHERE user_id = NEW.user_id AND run_id = NEW.run_id;
    NEW.cash := coalesce(NEW.cash, run.cash);
    NEW.market_value := coalesce(NEW.market_value, held);
    IF NEW.cash <> run.cash OR NEW.market_value <> held THEN
        RAISE EXCEPTION 'the books of run % say cash % and market value %, not % and %',
            NEW.run_id, run.cash, held, NEW.cash, NEW.market_value
            USING ERRCODE = '23T08', CONSTRAINT = 'mtm_ledger_equals_books',
                  TABLE = 'mtm_ledger', COLUMN = 'market_value',
                  HINT = 'Leave cash and market_value out; the database fills them in.';
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION mtm_ledger_prepare_insert IS
    'Trigger: cash and market value are the books'', at a time that is not past.';

CREATE TRIGGER mtm_ledger_a_prepare_insert BEFORE INSERT ON mtm_ledger
    FOR EACH ROW EXECUTE FUNCTION mtm_ledger_prepare_insert();
CREATE TRIGGER mtm_ledger_z_refuse_change BEFORE UPDATE OR DELETE ON mtm_ledger
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('mtm_ledger', 'append_only');
CREATE TRIGGER mtm_ledger_z_refuse_truncate BEFORE TRUNCATE ON mtm_ledger
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('mtm_ledger', 'append_only');

CREATE VIEW paper_equity_curve AS
    SELECT user_id, run_id, logical_time, cash, market_value, equity, recorded_at
    FROM mtm_ledger m
    WHERE EXISTS (SELECT FROM strategy_run r
                  WHERE r.user_id = m.user_id AND r.run_id = m.run_id AND r.broker = 'paper')
    WITH CHECK OPTION;

COMMENT ON VIEW paper_equity_curve IS 'The marks of paper runs.';
