-- Jobs with `resurrect` keep their id when their host brings them back, after a power cut say. By then they may have
-- been given up: with one restart more than before, a job begins its life anew.
CREATE OR REPLACE FUNCTION refuse_backward_job_state() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.state < OLD.state AND coalesce(NEW.restarts, 0) <= coalesce(OLD.restarts, 0) THEN
        RAISE EXCEPTION 'a job that is % cannot become %', OLD.state, NEW.state USING ERRCODE = 'FL001';
    END IF;
    RETURN NEW;
END
$$;
