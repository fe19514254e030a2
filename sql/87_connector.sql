-- What a connector may do: hold its account, take commands, say what became of them. It has these
-- functions, which have the owner's rights, and INSERT on the inbox; no right to any order.

-- What is no new order is looked for by itself, so that ten thousand waiting orders don't hide it.
CREATE INDEX broker_command_waiting_other_idx ON broker_command (user_id, account, priority)
    WHERE done_at IS NULL AND kind <> 'SUBMIT';

-- --- The lease ------------------------------------------------------------------------------

CREATE FUNCTION lease_refuse(of_user uuid, of_account text) RETURNS void
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
DECLARE
    lease broker_lease;
BEGIN
    SELECT * INTO lease FROM broker_lease WHERE user_id = of_user AND account = of_account;
    RAISE EXCEPTION 'account % is not held by this connector: %', of_account,
        CASE WHEN lease.account IS NULL THEN 'nobody has taken it'
             WHEN lease.expires_at <= clock_timestamp()
             THEN format('the lease of %s ended at %s', lease.holder_name, lease.expires_at)
             ELSE format('%s holds it until %s', lease.holder_name, lease.expires_at) END
        USING ERRCODE = '23T21', CONSTRAINT = 'broker_lease_is_held', TABLE = 'broker_lease',
              HINT = 'Stop this connector; start it again when the account is free.';
END $$;

COMMENT ON FUNCTION lease_refuse IS 'Refuses what only the holder of an account''s lease may do.';

-- One statement: of two that come at once, the second waits for the first and then sees its row.
CREATE FUNCTION lease_take(of_user uuid, of_account text, by_holder uuid, by_name text,
                           seconds integer)
RETURNS timestamptz LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    lease broker_lease;
    until timestamptz;
BEGIN
    INSERT INTO broker_lease AS l (user_id, account, holder, holder_name, taken_at, expires_at)
    VALUES (of_user, of_account, by_holder, by_name, clock_timestamp(),
            clock_timestamp() + make_interval(secs => seconds))
    ON CONFLICT (user_id, account) DO UPDATE
        SET holder = by_holder, holder_name = by_name, taken_at = clock_timestamp(),
            expires_at = clock_timestamp() + make_interval(secs => seconds), connected = false
        WHERE l.holder = by_holder OR l.expires_at <= clock_timestamp()
    RETURNING l.expires_at INTO until;
    IF until IS NULL THEN
        SELECT * INTO lease FROM broker_lease WHERE user_id = of_user AND account = of_account;
        RAISE EXCEPTION 'account % is held by % until %', of_account, lease.holder_name,
            lease.expires_at
            USING ERRCODE = '23T20', CONSTRAINT = 'broker_lease_one_holder', TABLE = 'broker_lease',
                  HINT = 'One connector an account: stop that one, or wait until its lease ends.';
    END IF;
    -- Questions that another one took with it get no answer; what it took of orders, a snapshot
    -- will tell.
    UPDATE broker_command SET done_at = clock_timestamp(), outcome = 'UNKNOWN'
    WHERE user_id = of_user AND account = of_account AND done_at IS NULL
      AND kind <> 'SUBMIT' AND kind NOT IN ('MODIFY', 'CANCEL') AND claimed_by <> by_holder;
    RETURN until;
END $$;

COMMENT ON FUNCTION lease_take IS
    'Takes an account for a connector, if nobody holds it or his lease has ended; returns until '
    'when.';

-- Also after its end, for as long as nobody else has taken it: its row is what excludes others.
CREATE FUNCTION lease_renew(of_user uuid, of_account text, by_holder uuid, seconds integer,
                            is_connected boolean, heard_at timestamptz, skew interval)
RETURNS timestamptz LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    until timestamptz;
BEGIN
    UPDATE broker_lease
    SET expires_at = clock_timestamp() + make_interval(secs => seconds), connected = is_connected,
        -- A connector's clock that is ahead would hide the silence that follows.
        last_heard_at = greatest(last_heard_at, CASE WHEN heard_at > clock_timestamp()
                                                     THEN clock_timestamp() ELSE heard_at END),
        clock_skew = coalesce(skew, clock_skew)
    WHERE user_id = of_user AND account = of_account AND holder = by_holder
    RETURNING expires_at INTO until;
    IF until IS NULL THEN
        PERFORM lease_refuse(of_user, of_account);
    END IF;
    RETURN until;
END $$;

COMMENT ON FUNCTION lease_renew IS
    'Holds an account for longer and tells how the connection is; refuses whom it was taken from.';

-- The row stays, so that people see when the broker was last heard.
CREATE FUNCTION lease_release(of_user uuid, of_account text, by_holder uuid) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    UPDATE broker_lease SET expires_at = clock_timestamp(), connected = false
    WHERE user_id = of_user AND account = of_account AND holder = by_holder
$$;

COMMENT ON FUNCTION lease_release IS 'Ends a connector''s lease, so that another can follow.';

-- --- Commands -------------------------------------------------------------------------------

-- Whether a command's turn has come. An order's commands go one after the other; behind one that
-- may or may not have arrived nothing goes but a cancel, since a broker might take the change of
-- an order that it doesn't know for a new one.
CREATE FUNCTION command_is_due(c broker_command) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = public, pg_temp AS $$
BEGIN
    RETURN c.done_at IS NULL AND c.claimed_by IS NULL
       AND (c.not_before IS NULL OR c.not_before <= clock_timestamp())
       AND NOT EXISTS (
           SELECT FROM broker_command e
           WHERE e.user_id = c.user_id AND e.run_id = c.run_id AND e.order_id = c.order_id
             AND e.order_version < c.order_version
             AND (e.done_at IS NULL OR e.outcome = 'UNKNOWN' AND c.kind <> 'CANCEL'));
END $$;

COMMENT ON FUNCTION command_is_due IS 'Whether a command may be claimed now.';

CREATE FUNCTION commands_claim(of_user uuid, of_account text, by_holder uuid, at_most integer,
                               orders_at_most integer)
RETURNS SETOF broker_command
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    -- Whoever wants to take the lease waits for us.
    PERFORM FROM broker_lease
    WHERE user_id = of_user AND account = of_account AND holder = by_holder
      AND expires_at > clock_timestamp()
    FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        PERFORM lease_refuse(of_user, of_account);
    END IF;
    RETURN QUERY
    WITH new_orders AS (
        SELECT c.command_id, c.priority, c.kind, c.created_at FROM broker_command c
        WHERE c.user_id = of_user AND c.account = of_account AND c.kind = 'SUBMIT'
          AND c.done_at IS NULL AND c.claimed_by IS NULL AND command_is_due(c)
        ORDER BY c.priority, c.created_at
        LIMIT least(at_most, orders_at_most) FOR UPDATE SKIP LOCKED
    ), others AS (
        SELECT c.command_id, c.priority, c.kind, c.created_at FROM broker_command c
        WHERE c.user_id = of_user AND c.account = of_account AND c.kind <> 'SUBMIT'
          AND c.done_at IS NULL AND c.claimed_by IS NULL AND command_is_due(c)
        ORDER BY c.priority, c.kind <> 'CANCEL', c.created_at
        LIMIT at_most FOR UPDATE SKIP LOCKED
    ), chosen AS (
        SELECT a.command_id FROM (TABLE new_orders UNION ALL TABLE others) a
        ORDER BY a.priority, a.kind <> 'CANCEL', a.created_at, a.command_id
        LIMIT at_most
    ), claimed AS (
        UPDATE broker_command b SET claimed_by = by_holder, claimed_at = clock_timestamp()
        FROM chosen
        WHERE b.user_id = of_user AND b.account = of_account AND b.command_id = chosen.command_id
        RETURNING b.*
    )
    SELECT c.* FROM claimed c
    ORDER BY c.priority, c.kind <> 'CANCEL', c.created_at, c.command_id;
END $$;

COMMENT ON FUNCTION commands_claim IS
    'Gives the holder of an account its next commands: by priority, cancels first, then by age; '
    'each once; at most so many, and so many new orders among them.';

-- After a restore from a backup: what the backup still holds for unsent may have been sent since.
-- Taken by nobody who lives, it is not sent, and the next snapshot says whether it has arrived.
CREATE FUNCTION commands_doubt(of_user uuid, of_account text) RETURNS bigint
LANGUAGE sql SET search_path = public, pg_temp AS $$
    WITH doubted AS (
        UPDATE broker_command
        SET claimed_by = gen_random_uuid(), claimed_at = clock_timestamp()
        WHERE user_id = of_user AND account = of_account AND claimed_by IS NULL
          AND done_at IS NULL AND kind IN ('SUBMIT', 'MODIFY', 'CANCEL')
        RETURNING command_id
    )
    SELECT count(*) FROM doubted
$$;

COMMENT ON FUNCTION commands_doubt IS
    'Holds back whatever an account''s outbox has not sent, until a snapshot tells whether it has '
    'arrived; for a database that was restored. Returns how many commands that are.';

-- What waits though its turn has come: the throttle's queue.
CREATE FUNCTION commands_throttled(of_user uuid, of_account text, at_most integer)
RETURNS TABLE (command_id uuid, kind text, order_id uuid, place bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
    SELECT q.command_id, q.kind, q.order_id, q.place
    FROM (SELECT c.command_id, c.kind, c.order_id,
                 row_number() OVER (ORDER BY c.priority, c.kind <> 'CANCEL', c.created_at,
                                             c.command_id) - 1 AS place
          FROM broker_command c
          WHERE c.user_id = of_user AND c.account = of_account AND c.done_at IS NULL
            AND c.claimed_by IS NULL AND command_is_due(c)) q
    WHERE q.order_id IS NOT NULL
      AND NOT EXISTS (
          SELECT FROM broker_event e
          WHERE e.user_id = of_user AND e.account = of_account AND e.kind = 'THROTTLED'
            AND e.order_ref = q.order_id::text
            AND e.payload ->> 'command_id' = q.command_id::text)
    ORDER BY q.place LIMIT at_most
$$;

COMMENT ON FUNCTION commands_throttled IS
    'Commands about orders that wait for the throttle and have no THROTTLED event yet, each with '
    'its place in the queue, from 0.';

-- It needs no lease: what was sent was sent, whoever holds the account now. A repeat, after a
-- commit of which nobody heard, changes nothing.
CREATE FUNCTION commands_done(of_user uuid, of_account text, by_holder uuid, commands uuid[],
                              sent timestamptz[], outcomes text[])
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE
    strange uuid;
BEGIN
    SELECT d.command_id INTO strange FROM unnest(commands) AS d (command_id)
    LEFT JOIN broker_command c
        ON c.user_id = of_user AND c.account = of_account AND c.command_id = d.command_id
    WHERE c.claimed_by IS DISTINCT FROM by_holder LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'command % was not claimed by this connector', strange
            USING ERRCODE = '23T21', CONSTRAINT = 'broker_command_done_by_claimer',
                  TABLE = 'broker_command', COLUMN = 'claimed_by',
                  HINT = 'Who claims a command says what became of it.';
    END IF;
    UPDATE broker_command c
    SET sent_at = d.sent_at, done_at = clock_timestamp(), outcome = d.outcome
    FROM unnest(commands, sent, outcomes) AS d (command_id, sent_at, outcome)
    WHERE c.user_id = of_user AND c.account = of_account AND c.command_id = d.command_id
      AND c.done_at IS NULL;
END $$;

COMMENT ON FUNCTION commands_done IS
    'Says of claimed commands when they were sent, if they were, and what became of them.';

CREATE FUNCTION connector_alert(of_user uuid, of_account text, of_code text, of_message text)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = public, pg_temp AS $$
    INSERT INTO alert (user_id, code, subject, account, message)
    VALUES (of_user, of_code, of_account, of_account, of_message)
    ON CONFLICT (user_id, code, subject) WHERE acknowledged_at IS NULL DO NOTHING
$$;

COMMENT ON FUNCTION connector_alert IS 'Raises an alert about an account, unless it is open yet.';

-- --- Neither outbox nor inbox is edited -----------------------------------------------------

CREATE FUNCTION broker_command_check_update() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF (NEW.user_id, NEW.account, NEW.command_id, NEW.priority, NEW.kind, NEW.run_id,
        NEW.order_id, NEW.order_version, NEW.not_before, NEW.created_at)
       IS DISTINCT FROM
       (OLD.user_id, OLD.account, OLD.command_id, OLD.priority, OLD.kind, OLD.run_id,
        OLD.order_id, OLD.order_version, OLD.not_before, OLD.created_at)
       -- An order that waits may be given new terms; what a connector has seen is fixed.
       OR NEW.payload <> OLD.payload
          AND (OLD.claimed_by IS NOT NULL OR NEW.claimed_by IS NOT NULL
               OR OLD.done_at IS NOT NULL OR NEW.done_at IS NOT NULL) THEN
        RAISE EXCEPTION 'command % stays as it was written', OLD.command_id
            USING ERRCODE = '23T09', CONSTRAINT = 'broker_command_terms_fixed',
                  TABLE = 'broker_command', HINT = 'Withdraw it, and write another one.';
    END IF;
    IF OLD.claimed_by IS NOT NULL
       AND (NEW.claimed_by, NEW.claimed_at) IS DISTINCT FROM (OLD.claimed_by, OLD.claimed_at)
       OR OLD.sent_at IS NOT NULL AND NEW.sent_at IS DISTINCT FROM OLD.sent_at
       OR OLD.done_at IS NOT NULL AND NEW.done_at IS DISTINCT FROM OLD.done_at
       -- Of what was sent, or perhaps sent, the broker says whether it arrived.
       OR OLD.outcome IS NOT NULL AND NEW.outcome IS DISTINCT FROM OLD.outcome
          AND NOT (OLD.outcome IN ('SENT', 'UNKNOWN')
                   AND coalesce(NEW.outcome, '') IN ('ARRIVED', 'NEVER_ARRIVED')) THEN
        RAISE EXCEPTION 'what became of command % is said once', OLD.command_id
            USING ERRCODE = '23T09', CONSTRAINT = 'broker_command_said_once',
                  TABLE = 'broker_command', COLUMN = 'outcome',
                  HINT = 'Only SENT and UNKNOWN turn into ARRIVED or NEVER_ARRIVED.';
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION broker_command_check_update IS
    'Trigger: a command stays as it is, but for the payload of one that nobody has taken; claim, '
    'sending and outcome are written once.';

CREATE FUNCTION broker_event_check_update() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF (NEW.user_id, NEW.account, NEW.number, NEW.holder, NEW.kind, NEW.priority, NEW.order_ref,
        NEW.broker_order_id, NEW.perm_id, NEW.execution_id, NEW.payload, NEW.event_at,
        NEW.received_at)
       IS DISTINCT FROM
       (OLD.user_id, OLD.account, OLD.number, OLD.holder, OLD.kind, OLD.priority, OLD.order_ref,
        OLD.broker_order_id, OLD.perm_id, OLD.execution_id, OLD.payload, OLD.event_at,
        OLD.received_at) THEN
        RAISE EXCEPTION 'what the broker said (% of account %) stays as it was said', OLD.number,
            OLD.account
            USING ERRCODE = '23T09', CONSTRAINT = 'broker_event_append_only',
                  TABLE = 'broker_event', HINT = 'History is only added to.';
    END IF;
    IF (NEW.applied_at, NEW.finding, NEW.code, NEW.note)
       IS DISTINCT FROM (OLD.applied_at, OLD.finding, OLD.code, OLD.note)
       -- HELD waits for a person, who then decides.
       AND (NEW.applied_at IS NULL
            OR OLD.applied_at IS NOT NULL AND OLD.finding IS DISTINCT FROM 'HELD') THEN
        RAISE EXCEPTION 'event % of account % is applied once', OLD.number, OLD.account
            USING ERRCODE = '23T09', CONSTRAINT = 'broker_event_applied_once',
                  TABLE = 'broker_event', COLUMN = 'applied_at',
                  HINT = 'What was found is said once, with applied_at; only HELD may change.';
    END IF;
    RETURN NEW;
END $$;

COMMENT ON FUNCTION broker_event_check_update IS
    'Trigger: an event stays as it is; what it turned out to be is written once.';

-- Rows of an account go with it; those that an order's run owns also with that. A cascade comes
-- when the row that it follows is gone already.
CREATE FUNCTION boundary_refuse_delete() RETURNS trigger
LANGUAGE plpgsql SET search_path = public, pg_temp AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        IF NOT EXISTS (SELECT FROM broker_account
                       WHERE user_id = OLD.user_id AND account = OLD.account)
           OR to_jsonb(OLD) ->> 'run_id' IS NOT NULL
              AND NOT EXISTS (SELECT FROM orders
                              WHERE user_id = OLD.user_id
                                AND run_id = (to_jsonb(OLD) ->> 'run_id')::uuid
                                AND order_id = (to_jsonb(OLD) ->> 'order_id')::uuid) THEN
            RETURN OLD;
        END IF;
    END IF;
    RAISE EXCEPTION '% of % is not possible: it is history', TG_OP, TG_ARGV[0]
        USING ERRCODE = '23T09', CONSTRAINT = TG_ARGV[0] || '_kept', TABLE = TG_ARGV[0],
              HINT = 'History is only added to; it goes with its account.';
END $$;

COMMENT ON FUNCTION boundary_refuse_delete IS
    'Trigger: what was said to a broker and by it goes only with its account or its run. '
    'Argument: the logical table name.';

CREATE TRIGGER broker_command_a_check_update BEFORE UPDATE ON broker_command
    FOR EACH ROW EXECUTE FUNCTION broker_command_check_update();
CREATE TRIGGER broker_command_z_refuse_delete BEFORE DELETE ON broker_command
    FOR EACH ROW EXECUTE FUNCTION boundary_refuse_delete('broker_command');
CREATE TRIGGER broker_command_z_refuse_truncate BEFORE TRUNCATE ON broker_command
    FOR EACH STATEMENT EXECUTE FUNCTION boundary_refuse_delete('broker_command');
CREATE TRIGGER broker_event_a_check_update BEFORE UPDATE ON broker_event
    FOR EACH ROW EXECUTE FUNCTION broker_event_check_update();
CREATE TRIGGER broker_event_z_refuse_delete BEFORE DELETE ON broker_event
    FOR EACH ROW EXECUTE FUNCTION boundary_refuse_delete('broker_event');
CREATE TRIGGER broker_event_z_refuse_truncate BEFORE TRUNCATE ON broker_event
    FOR EACH STATEMENT EXECUTE FUNCTION boundary_refuse_delete('broker_event');
