-- What the controller keeps. Rows that history points to are deleted softly (deleted_at).

CREATE TABLE apps (
    id uuid PRIMARY KEY,
    name text NOT NULL,
    meta jsonb NOT NULL,
    strategy text NOT NULL,
    deploy_timeout integer NOT NULL CHECK (deploy_timeout > 0),
    release_id uuid,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz
);
CREATE UNIQUE INDEX apps_name ON apps (name) WHERE deleted_at IS NULL;

-- Immutable. The same thing registered twice is one artifact.
CREATE TABLE artifacts (
    id uuid PRIMARY KEY,
    kind text NOT NULL,
    uri text NOT NULL,
    digest text NOT NULL,
    layer_url_template text,
    meta jsonb NOT NULL,
    manifest jsonb,
    size bigint,
    created_at timestamptz NOT NULL DEFAULT now()
);
-- A URI may be longer than an index entry: its hash stands for it.
CREATE UNIQUE INDEX artifacts_identity
    ON artifacts (kind, md5(uri), digest, md5(coalesce(layer_url_template, '')));

-- Immutable, configuration included.
CREATE TABLE releases (
    id uuid PRIMARY KEY,
    app_id uuid REFERENCES apps (id),
    env jsonb NOT NULL,
    meta jsonb NOT NULL,
    processes jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz
);
CREATE INDEX releases_app ON releases (app_id, created_at);
ALTER TABLE apps ADD CONSTRAINT apps_release FOREIGN KEY (release_id) REFERENCES releases (id);

CREATE TABLE release_artifacts (
    release_id uuid NOT NULL REFERENCES releases (id),
    position integer NOT NULL,
    artifact_id uuid NOT NULL REFERENCES artifacts (id),
    PRIMARY KEY (release_id, position)
);

-- A deleted formation keeps its row, so that its generation goes on growing when it is made again.
CREATE TABLE formations (
    app_id uuid NOT NULL REFERENCES apps (id),
    release_id uuid NOT NULL REFERENCES releases (id),
    processes jsonb NOT NULL,
    tags jsonb NOT NULL,
    generation bigint NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz,
    PRIMARY KEY (app_id, release_id)
);

CREATE TABLE scale_requests (
    id uuid PRIMARY KEY,
    app_id uuid NOT NULL REFERENCES apps (id),
    release_id uuid NOT NULL REFERENCES releases (id),
    state text NOT NULL CHECK (state IN ('pending', 'cancelled', 'complete')),
    old_processes jsonb NOT NULL,
    new_processes jsonb NOT NULL,
    old_tags jsonb NOT NULL,
    new_tags jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX scale_requests_pending ON scale_requests (app_id, release_id) WHERE state = 'pending';

-- The order of the values is the order of a job's life.
CREATE TYPE job_state AS ENUM ('pending', 'blocked', 'starting', 'up', 'stopping', 'down');

CREATE TABLE jobs (
    uuid uuid PRIMARY KEY,
    host_id text NOT NULL,
    app_id uuid NOT NULL REFERENCES apps (id),
    release_id uuid NOT NULL REFERENCES releases (id),
    process_type text NOT NULL,
    state job_state NOT NULL,
    args jsonb NOT NULL,
    meta jsonb NOT NULL,
    exit_status integer,
    host_error text,
    run_at timestamptz,
    restarts integer,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX jobs_app ON jobs (app_id, created_at);
CREATE INDEX jobs_active ON jobs (app_id, release_id) WHERE state <> 'down';
CREATE INDEX jobs_release ON jobs (release_id, created_at);

CREATE FUNCTION refuse_backward_job_state() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.state < OLD.state THEN
        RAISE EXCEPTION 'a job that is % cannot become %', OLD.state, NEW.state USING ERRCODE = 'FL001';
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER jobs_go_forward BEFORE UPDATE ON jobs
    FOR EACH ROW EXECUTE FUNCTION refuse_backward_job_state();

CREATE TABLE certificates (
    id uuid PRIMARY KEY,
    digest text NOT NULL UNIQUE,
    cert text NOT NULL,
    key text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE routes (
    id uuid PRIMARY KEY,
    app_id uuid NOT NULL REFERENCES apps (id),
    kind text NOT NULL CHECK (kind IN ('http', 'tcp')),
    service text NOT NULL,
    port integer NOT NULL,
    leader boolean NOT NULL,
    domain text NOT NULL,
    path text NOT NULL,
    certificate_id uuid REFERENCES certificates (id),
    sticky boolean NOT NULL,
    drain_backends boolean NOT NULL,
    disable_keep_alives boolean NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    deleted_at timestamptz
);
CREATE UNIQUE INDEX routes_http ON routes (domain, path) WHERE kind = 'http' AND deleted_at IS NULL;
CREATE UNIQUE INDEX routes_tcp ON routes (port) WHERE kind = 'tcp' AND deleted_at IS NULL;
CREATE INDEX routes_app ON routes (app_id) WHERE deleted_at IS NULL;

CREATE TABLE deployments (
    id uuid PRIMARY KEY,
    app_id uuid NOT NULL REFERENCES apps (id),
    old_release_id uuid REFERENCES releases (id),
    new_release_id uuid NOT NULL REFERENCES releases (id),
    strategy text NOT NULL,
    status text NOT NULL CHECK (status IN ('pending', 'running', 'complete', 'failed')),
    -- Where an unfinished deployment stands; a step that takes longer than deploy_timeout fails it.
    step text NOT NULL,
    step_started_at timestamptz NOT NULL DEFAULT now(),
    processes jsonb NOT NULL,
    tags jsonb NOT NULL,
    deploy_timeout integer NOT NULL,
    error text,
    created_at timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz
);
CREATE UNIQUE INDEX deployments_unfinished ON deployments (app_id) WHERE finished_at IS NULL;
CREATE INDEX deployments_app ON deployments (app_id, created_at);

CREATE TABLE events (
    id bigserial PRIMARY KEY,
    app_id uuid,
    object_type text NOT NULL,
    object_id text NOT NULL,
    data jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX events_app ON events (app_id, id);
CREATE INDEX events_object ON events (object_id, id);

-- Events up to this id may be gone.
CREATE TABLE event_horizon (pruned_to bigint NOT NULL);
INSERT INTO event_horizon VALUES (0);
