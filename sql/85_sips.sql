-- Systematic investment plans: so much money into a symbol on a day of every month, or on the
-- next session of the run's calendar if that day is none.

CREATE TABLE sip_plan (
    user_id       uuid        NOT NULL,
    run_id        uuid        NOT NULL,
    plan          text        NOT NULL COLLATE "C",
    symbol        text        NOT NULL,
    amount        numeric     NOT NULL,
    day_of_month  integer     NOT NULL DEFAULT 1,
    start_on      date        NOT NULL DEFAULT current_date,
    end_on        date,
    status        text        NOT NULL DEFAULT 'ACTIVE',
    missed_policy text        NOT NULL DEFAULT 'RUN_EACH',
    created_at    timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT sip_plan_pkey PRIMARY KEY (user_id, run_id, plan),
    CONSTRAINT sip_plan_belongs_to_run FOREIGN KEY (user_id, run_id)
        REFERENCES strategy_run (user_id, run_id) ON DELETE CASCADE,
    CONSTRAINT sip_plan_symbol_known FOREIGN KEY (symbol) REFERENCES instrument (symbol),
    CONSTRAINT sip_plan_plan_format CHECK (plan ~ '^[A-Za-z0-9][A-Za-z0-9 ._-]{0,62}$'),
    CONSTRAINT sip_plan_amount_positive
        CHECK (amount > 0 AND amount < 1e15 AND min_scale(amount) <= 8),
    CONSTRAINT sip_plan_day_of_month_in_range CHECK (day_of_month BETWEEN 1 AND 31),
    CONSTRAINT sip_plan_ends_after_it_starts CHECK (end_on >= start_on),
    CONSTRAINT sip_plan_days_in_range CHECK (
        start_on BETWEEN '0001-01-02' AND '9999-12-30'
        AND coalesce(end_on, start_on) <= '9999-12-30'),
    CONSTRAINT sip_plan_status_known CHECK (status IN ('ACTIVE', 'PAUSED')),
    CONSTRAINT sip_plan_missed_policy_known
        CHECK (missed_policy IN ('RUN_EACH', 'RUN_ONCE', 'SKIP'))
);

COMMENT ON TABLE sip_plan IS 'Systematic investment plans of a run.';
COMMENT ON COLUMN sip_plan.plan IS 'Its name, unique in its run.';
COMMENT ON COLUMN sip_plan.amount IS 'Money per execution, in the run''s currency.';
COMMENT ON COLUMN sip_plan.day_of_month IS
    'Planned day; the last day of a shorter month, the next session if it is none.';
COMMENT ON COLUMN sip_plan.missed_policy IS
    'What becomes of missed occasions: RUN_EACH, RUN_ONCE (the newest), SKIP; a skip is recorded.';

CREATE FUNCTION sip_plan_guard_write() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    PERFORM run_lock(NEW.user_id, NEW.run_id, 'sip_plan', 'CREATED', 'RUNNING');
    IF TG_OP = 'INSERT' THEN
        NEW.created_at := now();
        RETURN NEW;
    END IF;
    PERFORM row_check_keeps_run(OLD.user_id, OLD.run_id, NEW.user_id, NEW.run_id, 'sip_plan');
    -- The ledger knows a plan's occasions by its name: a second plan of that name would not buy.
    IF (NEW.plan, NEW.created_at) IS DISTINCT FROM (OLD.plan, OLD.created_at) THEN
        RAISE EXCEPTION 'plan % keeps its name', OLD.plan
            USING ERRCODE = '23T09', CONSTRAINT = 'sip_plan_name_fixed', TABLE = 'sip_plan',
                  COLUMN = 'plan', HINT = 'Pause it and add another plan.';
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION sip_plan_guard_write IS
    'Trigger: plans of a run that has not ended, each with the name that it was made with.';

CREATE TRIGGER sip_plan_a_guard_write BEFORE INSERT OR UPDATE ON sip_plan
    FOR EACH ROW EXECUTE FUNCTION sip_plan_guard_write();
CREATE TRIGGER sip_plan_z_refuse_delete BEFORE DELETE ON sip_plan
    FOR EACH ROW EXECUTE FUNCTION history_refuse_change('sip_plan', 'kept');
CREATE TRIGGER sip_plan_z_refuse_truncate BEFORE TRUNCATE ON sip_plan
    FOR EACH STATEMENT EXECUTE FUNCTION history_refuse_change('sip_plan', 'kept');

-- The occasion a plan has in a month: its key in the ledger, and the planned day.
CREATE FUNCTION sip_planned_day(month date, day_of_month integer) RETURNS date
LANGUAGE sql IMMUTABLE
RETURN least(date_trunc('month', month::timestamp)::date + day_of_month - 1,
             (date_trunc('month', month::timestamp) + interval '1 month - 1 day')::date);

COMMENT ON FUNCTION sip_planned_day IS 'The planned day of a plan in a month.';

-- What is due of a run's active plans up to and including a session: every month after the newest
-- occasion in the ledger whose planned session has come. Bounded by the caller's LIMIT.
CREATE FUNCTION sip_due(of_user uuid, of_run uuid, upto_session date)
RETURNS TABLE (plan text, symbol text, amount numeric, missed_policy text, occasion text,
               planned_on date, next_open_at timestamptz,
               session_date date, open_at timestamptz, close_at timestamptz)
-- PL/pgSQL, which keeps the plan: planning costs ten times as much as asking.
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT p.plan, p.symbol, p.amount, p.missed_policy,
           p.plan || '@' || to_char(m.month, 'YYYY-MM'), d.planned_on,
           (SELECT c.open_at FROM calendar_session c
            WHERE c.calendar = r.calendar AND c.session_date >= n.planned_on
              AND (p.end_on IS NULL OR n.planned_on <= p.end_on)
            ORDER BY c.session_date LIMIT 1),
           s.session_date, s.open_at, s.close_at
    FROM sip_plan p
    JOIN strategy_run r ON r.user_id = p.user_id AND r.run_id = p.run_id
    LEFT JOIN LATERAL (
        SELECT to_date(right(e.subject, 7), 'YYYY-MM') AS month
        FROM event_ledger e
        WHERE e.user_id = of_user AND e.run_id = of_run
          AND e.event_type IN ('SIP_EXECUTED', 'SIP_REJECTED', 'SIP_SKIPPED', 'REBALANCED')
          AND e.subject >= p.plan || '@' AND e.subject < p.plan || 'A'
        ORDER BY e.subject DESC LIMIT 1) last_done ON true
    CROSS JOIN LATERAL generate_series(
        greatest(date_trunc('month', p.start_on::timestamp),
                 last_done.month::timestamp + interval '1 month'),
        least(upto_session, p.end_on)::timestamp, interval '1 month') AS m (month)
    CROSS JOIN LATERAL (SELECT sip_planned_day(m.month::date, p.day_of_month) AS planned_on) d
    CROSS JOIN LATERAL (SELECT sip_planned_day((m.month + interval '1 month')::date,
                                               p.day_of_month) AS planned_on) n
    CROSS JOIN LATERAL (
        SELECT c.session_date, c.open_at, c.close_at FROM calendar_session c
        WHERE c.calendar = r.calendar AND c.session_date >= d.planned_on
        ORDER BY c.session_date LIMIT 1) s
    WHERE p.user_id = of_user AND p.run_id = of_run AND r.user_id = of_user
      AND p.status = 'ACTIVE' AND d.planned_on >= p.start_on
      AND (p.end_on IS NULL OR d.planned_on <= p.end_on) AND s.session_date <= upto_session
    ORDER BY d.planned_on, p.plan;
END $$;

COMMENT ON FUNCTION sip_due IS
    'Occasions of a run''s active plans that are due at a session and not yet in the ledger, with '
    'the open of the session of the plan''s next one.';
