-- The tables of ours (tt/catalog/schema.py), as far as an update of a Volume touches them, and 10,000 Volumes.
CREATE TABLE volume (
    row integer PRIMARY KEY, name text NOT NULL UNIQUE, media integer NOT NULL, current text NOT NULL,
    target text NOT NULL, scanned text NOT NULL, flags text NOT NULL, move_date text NOT NULL, requested bigint NOT NULL,
    description text NOT NULL, last bigint NOT NULL
) WITH (fillfactor = 50); -- room for the next version of a row on its own page, as the manual advises (HOT)
CREATE TABLE history (
    sequence bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, time timestamptz NOT NULL, "user" text NOT NULL,
    interface text NOT NULL, source text NOT NULL, event text NOT NULL, kind text NOT NULL, name text NOT NULL,
    place text NOT NULL, changes text NOT NULL, previous bigint NOT NULL
);
INSERT INTO volume
    SELECT number, 'US01.LTO.A' || lpad(number::text, 5, '0'), 1, 'RACK', '', '', '', '', 0,
        'an incremental backup of last night, job ' || number, 0
    FROM generate_series(1, 10000) AS number;
VACUUM ANALYZE;
