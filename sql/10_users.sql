-- Who trades: people and services. Everything that belongs to somebody carries user_id first in
-- its keys, which isolates users and lets the schema be sharded by user_id.

-- Infinity and years that no program's calendar has would stop whoever reads the row next.
CREATE FUNCTION time_in_range(moment timestamptz) RETURNS boolean
LANGUAGE sql IMMUTABLE
RETURN moment BETWEEN '0001-01-02 00:00Z' AND '9999-12-30 00:00Z';

COMMENT ON FUNCTION time_in_range IS 'Whether a time is of the years 1 to 9999.';

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
