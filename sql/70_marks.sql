-- The mark: what a run was worth at a logical time. Cash and market value are the books', whoever
-- writes the row; equity is their sum by definition.

CREATE TABLE mtm_ledger (
    user_id      uuid        NOT NULL,
    run_id       uuid        NOT NULL,
    logical_time timestamptz NOT NULL,
    cash         numeric     NOT NULL,
    market_value numeric     NOT NULL,
    equity       numeric     GENERATED ALWAYS AS (cash + market_value) STORED,
    recorded_at  timestamptz NOT NULL,
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
    SELECT greatest((SELECT logical_time FROM mtm_ledger
                     WHERE user_id = NEW.user_id AND run_id = NEW.run_id
                     ORDER BY logical_time DESC LIMIT 1),
                    (SELECT logical_time FROM event_ledger
                     WHERE user_id = NEW.user_id AND run_id = NEW.run_id
                     ORDER BY seq DESC LIMIT 1)) INTO newest;
    IF NEW.logical_time < newest THEN
        PERFORM mtm_ledger_refuse_time(NEW.run_id, newest, NEW.logical_time);
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

CREATE FUNCTION mtm_ledger_check_books(m mtm_ledger) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF m.cash <> (SELECT r.cash FROM strategy_run r
                  WHERE r.user_id = m.user_id AND r.run_id = m.run_id)
       OR m.market_value <> (SELECT coalesce(sum(p.market_value), 0) FROM position p
                             WHERE p.user_id = m.user_id AND p.run_id = m.run_id)
       OR m.logical_time < (SELECT l.logical_time FROM event_ledger l
                            WHERE l.user_id = m.user_id AND l.run_id = m.run_id
                            ORDER BY l.seq DESC LIMIT 1) THEN
        RAISE EXCEPTION 'the books of run % do not say cash % and market value % at %',
            m.run_id, m.cash, m.market_value, m.logical_time
            USING ERRCODE = '23T08', CONSTRAINT = 'mtm_ledger_equals_books',
                  TABLE = 'mtm_ledger', COLUMN = 'market_value',
                  HINT = 'Leave cash and market_value out; the database fills them in.';
    END IF;
END $$;

COMMENT ON FUNCTION mtm_ledger_check_books IS
    'Refuses a mark that is not what the books say, or older than the newest event.';

CREATE FUNCTION mtm_ledger_refuse_time(of_run uuid, stands timestamptz, mark timestamptz)
RETURNS void LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    RAISE EXCEPTION 'run % already stands at %, after %', of_run, stands, mark
        USING ERRCODE = '23T07', CONSTRAINT = 'mtm_ledger_time_moves_forward',
              TABLE = 'mtm_ledger', COLUMN = 'logical_time',
              HINT = 'A run only moves forward; mark it at a later logical_time.';
END $$;

COMMENT ON FUNCTION mtm_ledger_refuse_time IS 'Raises that a mark is older than another.';

-- A mark with the time of its transaction claims to be complete and to belong to a tick: then it is
-- proven, and that none is newer, with the tick's event (books_follow). If there is no such event,
-- it has to be what the books say now.
CREATE FUNCTION mtm_ledger_prove() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    outside_ticks boolean;
    part          record;
    newest        timestamptz;
BEGIN
    SELECT bool_or((SELECT l.payload ? 'equity' FROM event_ledger l
                    WHERE l.user_id = n.user_id AND l.run_id = n.run_id
                      AND l.logical_time = n.logical_time AND l.event_type = 'TICK'
                      AND l.subject = '') IS NOT TRUE)
    INTO outside_ticks FROM new_rows n;
    IF outside_ticks THEN
        FOR part IN SELECT user_id, run_id, max(logical_time) AS logical_time
                    FROM new_rows GROUP BY user_id, run_id
        LOOP
            PERFORM run_lock(part.user_id, part.run_id, 'mtm_ledger', 'RUNNING');
            SELECT logical_time INTO newest FROM mtm_ledger
            WHERE user_id = part.user_id AND run_id = part.run_id
            ORDER BY logical_time DESC LIMIT 1;
            IF newest > part.logical_time THEN
                PERFORM mtm_ledger_refuse_time(part.run_id, newest, part.logical_time);
            END IF;
            PERFORM mtm_ledger_check_books(n) FROM new_rows n
            WHERE n.user_id = part.user_id AND n.run_id = part.run_id
              AND (SELECT l.payload ? 'equity' FROM event_ledger l
                   WHERE l.user_id = part.user_id AND l.run_id = part.run_id
                     AND l.logical_time = n.logical_time AND l.event_type = 'TICK'
                     AND l.subject = '') IS NOT TRUE;
        END LOOP;
    END IF;
    RETURN NULL;
END $$;

COMMENT ON FUNCTION mtm_ledger_prove IS
    'Trigger: marks are those of the books, or belong to a tick that is proven to be.';

CREATE TRIGGER mtm_ledger_a_prepare_insert BEFORE INSERT ON mtm_ledger
    FOR EACH ROW WHEN (NEW.recorded_at IS DISTINCT FROM now())
    EXECUTE FUNCTION mtm_ledger_prepare_insert();
CREATE TRIGGER mtm_ledger_m_prove AFTER INSERT ON mtm_ledger
    REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT WHEN (current_user <> 'oms_keeper')
    EXECUTE FUNCTION mtm_ledger_prove();
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
