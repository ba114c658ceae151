//! Jobs: their ids, and one-off jobs as people ask for them.

use flynn_api::controller::{App, Job, NewJob, Release};
use flynn_api::host::{self, ContainerConfig, Partition, label};
use flynn_api::image::Artifact;
use flynn_api::{Env, Error, Meta, Result};
use uuid::Uuid;

use super::{name, process};

/// Splits `<host id>-<uuid>`, or a UUID alone.
pub(crate) fn split_id(id: &str) -> Result<(&str, Uuid)> {
    let refuse = || {
        Error::not_found(
            "job",
            format!("{id:?}: an id is <host>-<uuid>, as `flynn ps` shows it"),
        )
    };
    let at = id
        .len()
        .checked_sub(36)
        .filter(|at| id.is_char_boundary(*at))
        .ok_or_else(refuse)?;
    let (host, uuid) = id.split_at(at);
    let uuid = Uuid::try_parse(uuid).map_err(|_| refuse())?;
    if host.is_empty() {
        return Ok((host, uuid));
    }
    let host = host
        .strip_suffix('-')
        .filter(|host| !host.is_empty() && !host.contains('-'));
    Ok((host.ok_or_else(refuse)?, uuid))
}

/// A report with the ids of its path filled in.
pub(crate) fn prepare(mut job: Job, path: &str) -> Result<Job> {
    let (host, uuid) = split_id(path)?;
    let differs = |field: &str| {
        Err(Error::invalid_field(
            field,
            "is not that of the path: leave it out",
        ))
    };
    let uuid = uuid.to_string();
    if !job.uuid.is_empty() && !job.uuid.eq_ignore_ascii_case(&uuid) {
        return differs("uuid");
    }
    if !host.is_empty() && !job.host_id.is_empty() && job.host_id != host {
        return differs("host_id");
    }
    if !job.id.is_empty() && split_id(&job.id)?.1.to_string() != uuid {
        return differs("id");
    }
    if job.host_id.is_empty() {
        job.host_id = if host.is_empty() {
            split_id(&job.id).map_or("", |(host, _)| host)
        } else {
            host
        }
        .to_owned();
    }
    job.uuid = uuid;
    if !job.process_type.is_empty() {
        name::process_type("type", &job.process_type)?;
    }
    name::meta("meta", &job.meta)?;
    name::args("args", &job.args)?;
    if let Some(error) = &mut job.host_error {
        let end = (0..=error.len().min(4096))
            .rev()
            .find(|at| error.is_char_boundary(*at))
            .unwrap_or(0);
        error.truncate(end);
    }
    Ok(job)
}

/// Checks a one-off job.
pub(crate) fn check_new(job: &NewJob, system: bool) -> Result<()> {
    name::args("args", &job.args)?;
    name::env("env", &job.env)?;
    name::meta("meta", &job.meta)?;
    process::resources("resources", &job.resources)?;
    if job.partition == Partition::System && !system {
        return Err(Error::invalid_field(
            "partition",
            "`system` is only for apps of the platform",
        ));
    }
    if job.tty_size.is_some() && !job.tty {
        return Err(Error::invalid_field("tty_size", "goes with `tty`"));
    }
    Ok(())
}

/// A one-off job for a host. `attached`: a client will hold its streams, and its output waits for that client.
pub(crate) fn one_off(
    app: &App,
    release: &Release,
    artifacts: Vec<Artifact>,
    new: &NewJob,
    id: &str,
    attached: bool,
) -> host::Job {
    let mut env = if new.release_env {
        release.env.clone()
    } else {
        Env::new()
    };
    env.extend(new.env.clone());
    env.extend([
        ("FLYNN_APP_ID".into(), app.id.clone()),
        ("FLYNN_APP_NAME".into(), app.name.clone()),
        ("FLYNN_RELEASE_ID".into(), release.id.clone()),
        ("FLYNN_PROCESS_TYPE".into(), String::new()),
        ("FLYNN_JOB_ID".into(), id.to_owned()),
    ]);
    let mut metadata: Meta = new.meta.clone();
    metadata.extend([
        (label::APP_ID.into(), app.id.clone()),
        (label::APP_NAME.into(), app.name.clone()),
        (label::RELEASE_ID.into(), release.id.clone()),
        (label::PROCESS_TYPE.into(), String::new()),
    ]);
    // What gives a job a certificate comes from the app alone.
    metadata.remove(label::SYSTEM_APP);
    if app.is_system() {
        metadata.insert(label::SYSTEM_APP.into(), "true".into());
    }
    host::Job {
        id: id.to_owned(),
        metadata,
        artifacts,
        config: ContainerConfig {
            args: new.args.clone(),
            env,
            tty: new.tty,
            tty_size: new.tty_size,
            stdin: attached,
            disable_log: new.disable_log,
            ..ContainerConfig::default()
        },
        resources: new.resources.clone(),
        partition: new.partition,
        ..host::Job::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UUID: &str = "0b7a1c5e-1111-4222-8333-444455556666";

    #[test]
    fn ids_are_split_at_the_uuid() {
        assert_eq!(split_id(&format!("host1-{UUID}")).unwrap().0, "host1");
        assert_eq!(split_id(UUID).unwrap().0, "");
        for bad in [
            "",
            "x",
            "-",
            &format!("-{UUID}"),
            &format!("host{UUID}"),
            &format!("a-b-{UUID}"),
        ] {
            assert!(split_id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_report_agrees_with_its_path() {
        let path = format!("h-{UUID}");
        let job = prepare(Job::default(), &path).unwrap();
        assert_eq!((job.uuid.as_str(), job.host_id.as_str()), (UUID, "h"));
        assert!(
            prepare(
                Job {
                    host_id: "other".into(),
                    ..Job::default()
                },
                &path
            )
            .is_err()
        );
        assert!(
            prepare(
                Job {
                    uuid: Uuid::nil().to_string(),
                    ..Job::default()
                },
                &path
            )
            .is_err()
        );
    }

    #[test]
    fn who_a_job_is_cannot_be_forged() {
        let app = App {
            id: "a".into(),
            name: "shop".into(),
            ..App::default()
        };
        let meta = Meta::from([
            (label::SYSTEM_APP.into(), "true".into()),
            (label::APP_ID.into(), "x".into()),
        ]);
        let env = Env::from([("FLYNN_APP_ID".into(), "x".into()), ("A".into(), "new".into())]);
        let new = NewJob {
            meta,
            env,
            release_env: true,
            ..NewJob::default()
        };
        let release = Release {
            env: Env::from([("A".into(), "old".into())]),
            ..Release::default()
        };
        let job = one_off(&app, &release, Vec::new(), &new, "h-1", true);
        assert_eq!(job.metadata[label::APP_ID], "a");
        assert!(!job.metadata.contains_key(label::SYSTEM_APP));
        assert_eq!(
            (
                job.config.env["FLYNN_APP_ID"].as_str(),
                job.config.env["A"].as_str()
            ),
            ("a", "new")
        );
        assert!(job.config.stdin);
    }

    proptest! {
        #[test]
        fn any_text_is_an_id_or_an_error(text in "\\PC{0,60}") {
            if let Ok((host, uuid)) = split_id(&text) {
                prop_assert!(text.starts_with(host) && text.len() >= 36 && !uuid.to_string().is_empty());
            }
        }
    }
}
