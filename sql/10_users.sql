-- Who trades: people and services. Everything that belongs to somebody carries user_id first in
-- its keys, which isolates users and lets the schema be sharded by user_id.

-- What CHECKs ask, here and in other files, is short in the catalog: every statement that writes a
-- row reads the CHECKs of its table anew. A rule of some length is therefore a function in plpgsql,
-- which is read once a session; NULL asks nothing, as in any CHECK, and STRICT does not even call
-- it. And a pattern leaves lengths to length(): {0,31} has the matcher count, which costs more than
-- all the rest.

-- Infinity and years that no program's calendar has would stop whoever reads the row next.
CREATE FUNCTION time_in_range(moment timestamptz) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE STRICT SET search_path = public, pg_temp AS $$
BEGIN
    RETURN moment BETWEEN '0001-01-02 00:00Z' AND '9999-12-30 00:00Z';
END $$;

COMMENT ON FUNCTION time_in_range IS 'Whether a time is of the years 1 to 9999.';

-- NaN and infinity are above every limit, and what has no end has too many decimals.
CREATE FUNCTION decimal_in_range(number numeric, below numeric, decimals integer) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE STRICT SET search_path = public, pg_temp AS $$
BEGIN
    RETURN abs(number) < below AND min_scale(number) <= decimals;
END $$;

COMMENT ON FUNCTION decimal_in_range IS
    'Whether a number is nearer to zero than a limit and has no more than so many decimals.';

CREATE FUNCTION amount_in_range(amount numeric) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE STRICT SET search_path = public, pg_temp AS $$
BEGIN
    RETURN abs(amount) < 1e15 AND min_scale(amount) <= 8;
END $$;

COMMENT ON FUNCTION amount_in_range IS
    'Whether a quantity or price is below 10^15 and has 8 decimals at most.';

-- As jsonb writes a time, whatever the session's time zone.
CREATE FUNCTION event_moment(moment timestamptz) RETURNS text
LANGUAGE sql STABLE
RETURN (to_json(moment AT TIME ZONE 'UTC') #>> '{}') || '+00:00';

COMMENT ON FUNCTION event_moment IS 'A time as the ledger''s payloads state it: ISO 8601, in UTC.';

CREATE TABLE app_user (
    user_id    uuid        NOT NULL DEFAULT gen_random_uuid(),
    name       text,
    kind       text        NOT NULL DEFAULT 'PERSON',
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT app_user_pkey PRIMARY KEY (user_id),
    CONSTRAINT app_user_kind_known CHECK (kind IN ('PERSON', 'SERVICE')),
    CONSTRAINT app_user_name_printable CHECK (name ~ '^[[:graph:]]([[:print:]]{0,98}[[:graph:]])?$')
);

COMMENT ON TABLE app_user IS 'People and services that own runs.';
COMMENT ON COLUMN app_user.name IS
    'What commands call the user. The oms command derives user_id from it, so a name is one user.';
