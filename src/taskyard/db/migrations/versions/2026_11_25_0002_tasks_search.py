"""Task filters and search: the newest run's status on its task, exact counts, substring search.

All of it is kept by triggers, so that it is right whoever writes a task or a run.
"""

from alembic import op

revision = "0002"
down_revision = "0001"

COLUMNS = """
ALTER TABLE tasks
    ADD COLUMN archived boolean NOT NULL DEFAULT false,
    ADD COLUMN archived_at timestamptz,
    ADD COLUMN latest_run_id uuid,
    ADD COLUMN latest_run_at timestamptz,
    ADD COLUMN latest_status text;

UPDATE tasks t SET latest_run_id = r.id, latest_run_at = r.created_at, latest_status = r.status
FROM (SELECT DISTINCT ON (task_id) * FROM runs ORDER BY task_id, created_at DESC, id DESC) r
WHERE r.task_id = t.id;

-- The conditions on the task's row are looked at again when the row was changed meanwhile, so the newest
-- run wins whatever the order of commits.
CREATE FUNCTION note_latest_run() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        UPDATE tasks SET latest_run_id = NEW.id, latest_run_at = NEW.created_at, latest_status = NEW.status
        WHERE id = NEW.task_id
            AND (latest_run_at IS NULL OR (latest_run_at, latest_run_id) < (NEW.created_at, NEW.id));
    ELSE
        UPDATE tasks SET latest_status = NEW.status WHERE id = NEW.task_id AND latest_run_id = NEW.id;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER note_new_run AFTER INSERT ON runs FOR EACH ROW EXECUTE FUNCTION note_latest_run();
CREATE TRIGGER note_status AFTER UPDATE OF status ON runs FOR EACH ROW
    WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION note_latest_run();

CREATE FUNCTION refuse_deletion() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'rows of % are kept: set deleted_at', TG_TABLE_NAME;
END $$;
CREATE TRIGGER kept BEFORE DELETE ON tasks FOR EACH ROW EXECUTE FUNCTION refuse_deletion();
CREATE TRIGGER kept BEFORE DELETE ON runs FOR EACH ROW EXECUTE FUNCTION refuse_deletion();
"""

INDEXES = """
-- Lists are in the order of task_number, newest first: numbers are given under the project's lock, and
-- created_at is taken after it.
DROP INDEX tasks_list;
CREATE INDEX tasks_listed ON tasks (project_id, task_number)
    WHERE deleted_at IS NULL AND NOT internal AND NOT archived;
CREATE INDEX tasks_internal ON tasks (project_id, task_number) WHERE deleted_at IS NULL AND internal;
CREATE INDEX tasks_archived ON tasks (project_id, task_number) WHERE deleted_at IS NULL AND archived;
CREATE INDEX tasks_creator ON tasks (project_id, created_by_id, task_number) WHERE deleted_at IS NULL;
CREATE INDEX tasks_origin ON tasks (project_id, origin_product, task_number) WHERE deleted_at IS NULL;
CREATE INDEX tasks_status ON tasks (project_id, latest_status, task_number) WHERE deleted_at IS NULL;
CREATE INDEX tasks_repository ON tasks (project_id, repository, task_number) WHERE deleted_at IS NULL;
CREATE INDEX tasks_organization ON tasks (project_id, split_part(repository, '/', 1), task_number)
    WHERE deleted_at IS NULL;
CREATE INDEX tasks_repository_name ON tasks (project_id, split_part(repository, '/', 2), task_number)
    WHERE deleted_at IS NULL;
CREATE INDEX runs_stage ON runs (project_id, stage, task_id) WHERE stage IS NOT NULL;
"""

COUNTS = """
-- How many tasks have each combination of what lists filter by: once without the repository, which are few
-- rows, and once with it. Writers only append changes, so they never wait for each other; `fold_task_counts`
-- adds the changes up. Reading both in one statement is exact.
CREATE TABLE task_counts (
    project_id integer NOT NULL,
    internal boolean NOT NULL,
    archived boolean NOT NULL,
    created_by_id integer,
    origin_product text NOT NULL,
    latest_status text NOT NULL,
    n bigint NOT NULL
);
CREATE UNIQUE INDEX task_counts_cell ON task_counts
    (project_id, internal, archived, coalesce(created_by_id, 0), origin_product, latest_status);
CREATE TABLE repository_counts (LIKE task_counts, repository text NOT NULL);
CREATE UNIQUE INDEX repository_counts_cell ON repository_counts
    (project_id, repository, internal, archived, coalesce(created_by_id, 0), origin_product, latest_status);
CREATE INDEX repository_counts_organization ON repository_counts (project_id, split_part(repository, '/', 1));
CREATE INDEX repository_counts_name ON repository_counts (project_id, split_part(repository, '/', 2));
CREATE TABLE task_count_changes (LIKE repository_counts);

-- They have the columns that conditions on tasks use, so that one condition serves both.
CREATE VIEW task_tally AS
    SELECT *, NULL::timestamptz AS deleted_at FROM task_counts
    UNION ALL
    SELECT project_id, internal, archived, created_by_id, origin_product, latest_status, n, NULL
    FROM task_count_changes;
CREATE VIEW repository_tally AS
    SELECT *, NULL::timestamptz AS deleted_at FROM repository_counts
    UNION ALL SELECT *, NULL FROM task_count_changes;

CREATE FUNCTION fold_task_counts() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    -- One at a time: whoever comes second has nothing to do.
    IF NOT pg_try_advisory_xact_lock(7401824) THEN RETURN; END IF;
    WITH taken AS (
        DELETE FROM task_count_changes RETURNING *
    ), plain AS (
        INSERT INTO task_counts AS c
        SELECT project_id, internal, archived, created_by_id, origin_product, latest_status, sum(n)
        FROM taken GROUP BY 1, 2, 3, 4, 5, 6 HAVING sum(n) <> 0
        ON CONFLICT (project_id, internal, archived, coalesce(created_by_id, 0), origin_product, latest_status)
        DO UPDATE SET n = c.n + excluded.n
    )
    INSERT INTO repository_counts AS c
    SELECT project_id, internal, archived, created_by_id, origin_product, latest_status, sum(n), repository
    FROM taken GROUP BY 1, 2, 3, 4, 5, 6, 8 HAVING sum(n) <> 0
    ON CONFLICT (project_id, repository, internal, archived, coalesce(created_by_id, 0), origin_product,
        latest_status)
    DO UPDATE SET n = c.n + excluded.n;
END $$;
"""

SEARCH = """
-- What search looks through: title and description in lower case. chr(1) is the border between them and
-- chr(2) is used by `search_lexemes`, so neither may occur in the text.
CREATE TABLE task_search (
    project_id integer NOT NULL,
    task_number bigint NOT NULL,
    text text NOT NULL,
    PRIMARY KEY (project_id, task_number)
);

CREATE FUNCTION search_text(value text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN translate(lower(value), chr(1) || chr(2), '  ');

-- The groups of four neighbouring characters of a text, each behind the name of its block: 16,384 tasks of one
-- project. So the index is asked about the newest tasks first, and projects do not slow each other down.
-- Three characters are added at the end, so that each character begins a group: a term of less than four is
-- the prefix of one. A text that is too long for that has the one lexeme `-long-`, which is no group; it is
-- always looked through.
CREATE FUNCTION search_lexemes(project integer, number bigint, text text) RETURNS tsvector
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
DECLARE
    block text := project::text || '.' || (number >> 14)::text || '.';
    padded text := text || repeat(chr(1), 3);
    mark text := block || '\\1' || chr(2);
BEGIN
    IF length(text) > 32768 THEN RETURN array_to_tsvector(ARRAY[block || '-long-']); END IF;
    -- Groups from the first, second, third and fourth character on; what is left over is only padding.
    RETURN array_to_tsvector(string_to_array(rtrim(
        rtrim(regexp_replace(padded, '(....)', mark, 'g'), chr(1)) ||
        rtrim(regexp_replace(substr(padded, 2), '(....)', mark, 'g'), chr(1)) ||
        rtrim(regexp_replace(substr(padded, 3), '(....)', mark, 'g'), chr(1)) ||
        rtrim(regexp_replace(substr(padded, 4), '(....)', mark, 'g'), chr(1)),
        chr(2)), chr(2)));
END $$;

-- Pending entries are read by every search: a short list of them.
CREATE INDEX task_search_lexemes ON task_search USING gin (search_lexemes(project_id, task_number, text))
    WITH (fastupdate = on, gin_pending_list_limit = 256);

-- The tasks of the blocks `first` to `last` whose text is LIKE `pattern`. `grams` are parts of the term, of
-- four characters or one shorter one, that a matching text must have. The planner cannot know how few texts
-- have all parts, so it is told to use the index.
CREATE FUNCTION search_blocks(project integer, first bigint, last bigint, grams text[], pattern text)
RETURNS SETOF bigint LANGUAGE plpgsql STABLE ROWS 1000
SET enable_seqscan = off SET enable_indexscan = off SET max_parallel_workers_per_gather = 0 AS $$
DECLARE
    wanted tsquery;
BEGIN
    SELECT string_agg(format('(%s) | ''%s-long-''', q.all_of, block), ' | ')::tsquery INTO wanted
    FROM generate_series(first, last) b, LATERAL (SELECT project::text || '.' || b::text || '.') AS n (block),
        LATERAL (
            SELECT string_agg(
                '''' || block || replace(replace(g, '\\', '\\\\'), '''', '''''') || ''''
                || CASE WHEN length(g) < 4 THEN ':*' ELSE '' END, ' & ') AS all_of
            FROM unnest(grams) g
        ) q;
    RETURN QUERY SELECT s.task_number FROM task_search s
        WHERE search_lexemes(s.project_id, s.task_number, s.text) @@ wanted AND s.text LIKE pattern;
END $$;
"""

TRIGGERS = """
CREATE FUNCTION note_task() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND OLD.deleted_at IS NULL THEN
        INSERT INTO task_count_changes VALUES (OLD.project_id, OLD.internal, OLD.archived,
            OLD.created_by_id, OLD.origin_product, coalesce(OLD.latest_status, ''), -1,
            coalesce(OLD.repository, ''));
    END IF;
    IF NEW.deleted_at IS NULL THEN
        INSERT INTO task_count_changes VALUES (NEW.project_id, NEW.internal, NEW.archived,
            NEW.created_by_id, NEW.origin_product, coalesce(NEW.latest_status, ''), 1,
            coalesce(NEW.repository, ''));
    END IF;
    IF random() < 0.01 THEN PERFORM fold_task_counts(); END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER note_task AFTER INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION note_task();
CREATE TRIGGER note_task_change
    AFTER UPDATE OF internal, archived, created_by_id, origin_product, repository, latest_status, deleted_at
    ON tasks FOR EACH ROW
    WHEN ((OLD.internal, OLD.archived, OLD.created_by_id, OLD.origin_product, OLD.repository,
        OLD.latest_status, OLD.deleted_at) IS DISTINCT FROM (NEW.internal, NEW.archived, NEW.created_by_id,
        NEW.origin_product, NEW.repository, NEW.latest_status, NEW.deleted_at))
    EXECUTE FUNCTION note_task();

CREATE FUNCTION note_text() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.deleted_at IS NOT NULL THEN
        DELETE FROM task_search WHERE project_id = NEW.project_id AND task_number = NEW.task_number;
    ELSE
        INSERT INTO task_search VALUES (NEW.project_id, NEW.task_number,
            search_text(NEW.title) || chr(1) || search_text(NEW.description))
        ON CONFLICT (project_id, task_number) DO UPDATE SET text = excluded.text;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER note_text AFTER INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION note_text();
CREATE TRIGGER note_text_change AFTER UPDATE OF title, description, deleted_at ON tasks FOR EACH ROW
    WHEN ((OLD.title, OLD.description, OLD.deleted_at) IS DISTINCT FROM
        (NEW.title, NEW.description, NEW.deleted_at))
    EXECUTE FUNCTION note_text();

INSERT INTO task_count_changes
    SELECT project_id, internal, archived, created_by_id, origin_product, coalesce(latest_status, ''), count(*),
        coalesce(repository, '')
    FROM tasks WHERE deleted_at IS NULL GROUP BY 1, 2, 3, 4, 5, 6, 8;
SELECT fold_task_counts();
INSERT INTO task_search
    SELECT project_id, task_number, search_text(title) || chr(1) || search_text(description)
    FROM tasks WHERE deleted_at IS NULL;
"""


def upgrade() -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    for script in (COLUMNS, INDEXES, COUNTS, SEARCH, TRIGGERS):
        connection.execute(script)
