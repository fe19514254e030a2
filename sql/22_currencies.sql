-- What currencies cost in each other, by time: commissions are reported in any of them. A lookup
-- table like the prices: imported, append-only by right, pointing at no user's table.

CREATE TABLE fx_rate (
    currency       text        NOT NULL,
    quote_currency text        NOT NULL,
    at             timestamptz NOT NULL,
    rate           numeric     NOT NULL,
    CONSTRAINT fx_rate_pkey PRIMARY KEY (currency, quote_currency, at),
    CONSTRAINT fx_rate_currencies_format
        CHECK (currency ~ '^[A-Z]{3}$' AND quote_currency ~ '^[A-Z]{3}$'),
    CONSTRAINT fx_rate_of_two_currencies CHECK (currency <> quote_currency),
    CONSTRAINT fx_rate_at_in_range CHECK (time_in_range(at)),
    CONSTRAINT fx_rate_rate_positive CHECK (rate > 0 AND rate < 1e9 AND min_scale(rate) <= 10)
);

COMMENT ON TABLE fx_rate IS 'Exchange rates: one unit of currency costs rate of quote_currency.';
COMMENT ON COLUMN fx_rate.at IS 'Since when it holds, until the next one of the pair.';

-- The rate of a moment is the newest one that was known then, of the pair or of the pair turned
-- round. One that is older than a week is no rate of that moment: better none than a wrong one.
CREATE FUNCTION fx_rate_at(of_currency text, in_currency text, moment timestamptz)
RETURNS numeric LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT CASE WHEN of_currency = in_currency THEN 1 ELSE (
        SELECT k.rate
        FROM ((SELECT f.at, f.rate, 1 AS choice FROM fx_rate f
               WHERE f.currency = of_currency AND f.quote_currency = in_currency
                 AND f.at <= moment AND f.at > moment - interval '7 days'
               ORDER BY f.at DESC LIMIT 1)
              UNION ALL
              (SELECT f.at, round(1 / f.rate, 10), 2 FROM fx_rate f
               WHERE f.currency = in_currency AND f.quote_currency = of_currency
                 AND f.at <= moment AND f.at > moment - interval '7 days'
               ORDER BY f.at DESC LIMIT 1)) k
        WHERE k.rate > 0
        ORDER BY k.at DESC, k.choice LIMIT 1) END
$$;

COMMENT ON FUNCTION fx_rate_at IS
    'What one unit of a currency cost in another at a moment; NULL where no rate of the week '
    'before it is known.';
