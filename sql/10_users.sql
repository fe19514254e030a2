-- Who trades: people and services. Everything that belongs to somebody carries user_id first in
-- its keys, which isolates users and lets the schema be sharded by user_id.

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
