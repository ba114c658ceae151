//! Jobs on the disk: one directory each, no database.

use std::fs;
use std::io;
use std::path::Path;

use flynn_api::host::Job;

use crate::container::OwnLayer;
use crate::files;
use crate::launch::{self, Launch};
use crate::paths::Paths;
use crate::status::Status;

const JOB: &str = "job.json";

/// What the names of directories begin with that are not jobs (yet, or any more).
const NEW: &str = ".new-";
const BROKEN: &str = ".broken-";

/// A job as it was found.
pub(super) struct Stored {
    pub(super) job: Job,
    pub(super) status: Status,
    /// None when the daemon died before it was worked out.
    pub(super) launch: Option<Launch>,
}

/// Makes a job's directory: it is there whole, or not at all, but for its status, which a power cut may empty.
pub(super) fn create(paths: &Paths, job: &Job, status: &Status) -> io::Result<()> {
    let new = paths.jobs().join(format!("{NEW}{}", job.id));
    files::remove_all(&new)?;
    files::private_dir(&new)?;
    // The record is synced with its directory, which has to name the status by then.
    let written = status
        .write(&new)
        .and_then(|()| files::write_json(&new.join(JOB), job))
        .and_then(|()| fs::rename(&new, paths.job(&job.id)))
        .and_then(|()| files::sync_dir(&paths.jobs()));
    if written.is_err() {
        let _ = files::remove_all(&new);
    }
    written
}

/// Writes a job's record anew.
pub(super) fn update(paths: &Paths, job: &Job) -> io::Result<()> {
    files::write_json(&paths.job(&job.id).join(JOB), job)
}

/// Reads all jobs. Those that cannot be read are set aside, each with a notice of what and why; one whose status alone
/// cannot be read is taken for what a power cut leaves.
pub(super) fn load(paths: &Paths) -> io::Result<(Vec<Stored>, Vec<String>)> {
    let (mut jobs, mut notices) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(paths.jobs())? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        if name.starts_with(NEW) {
            files::remove_all(&path)?;
        } else if name.starts_with(BROKEN) {
            notices.push(format!(
                "{} was set aside earlier: look at it, then remove it",
                path.display()
            ));
        } else {
            let stored = read(&path, name).or_else(|lost| {
                let stored = Stored {
                    job: read_job(&path, name)?,
                    status: Status::lost(&path),
                    launch: None,
                };
                notices.push(format!(
                    "the status of job {name} was lost ({lost}): it is taken for a job that ran before the host was \
                     started"
                ));
                Ok::<_, io::Error>(stored)
            });
            match stored {
                Ok(stored) => jobs.push(stored),
                Err(error) => {
                    let aside = paths.jobs().join(format!("{BROKEN}{name}"));
                    files::remove_all(&aside)?;
                    fs::rename(&path, &aside)?;
                    notices.push(format!(
                        "the record of job {name} cannot be read ({error}); it was set aside as {}",
                        aside.display()
                    ));
                }
            }
        }
    }
    Ok((jobs, notices))
}

/// Whether all jobs can be read. Nothing is changed, and jobs may come and go meanwhile.
pub(super) fn look(paths: &Paths) -> io::Result<()> {
    for entry in fs::read_dir(paths.jobs())? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or(NEW);
        if !name.starts_with('.')
            && let Err(error) = read(&path, name)
            && path.join(JOB).exists()
        {
            return Err(io::Error::new(error.kind(), format!("job {name}: {error}")));
        }
    }
    Ok(())
}

fn missing(file: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{file} is missing"))
}

fn read_job(dir: &Path, name: &str) -> io::Result<Job> {
    let job: Job = files::read_json(&dir.join(JOB))?.ok_or_else(|| missing(JOB))?;
    if job.id != name {
        return Err(io::Error::other(format!("it is the record of job {:?}", job.id)));
    }
    Ok(job)
}

fn read(dir: &Path, name: &str) -> io::Result<Stored> {
    let job = read_job(dir, name)?;
    let status = Status::read(dir)?.ok_or_else(|| missing(crate::status::FILE))?;
    // Not written to last longer than the boot, and each start works it out anew.
    let launch = files::read_json(&dir.join(launch::FILE)).unwrap_or_default();
    Ok(Stored { job, status, launch })
}

/// Removes what only a living container needs.
pub(super) fn tidy(paths: &Paths, id: &str) {
    for name in OwnLayer::NAMES.into_iter().chain(["root", launch::FILE]) {
        if let Err(error) = files::remove_all(&paths.job(id).join(name)) {
            tracing::warn!(job = id, name, %error, "cannot tidy up");
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    #[test]
    fn broken_records_are_set_aside_and_harm_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::at(dir.path());
        fs::create_dir(paths.jobs()).unwrap();
        let status = Status::new(Timestamp::UNIX_EPOCH, "boot".into());
        for id in ["one-1", "one-2", "one-3", "one-4"] {
            create(
                &paths,
                &Job {
                    id: id.into(),
                    ..Job::default()
                },
                &status,
            )
            .unwrap();
        }
        fs::write(paths.job("one-2").join(JOB), "{\"id\":").unwrap();
        fs::rename(paths.job("one-3"), paths.job("other")).unwrap();
        fs::create_dir(paths.jobs().join(".new-one-5")).unwrap();
        let (jobs, notices) = load(&paths).unwrap();
        let mut ids: Vec<_> = jobs.into_iter().map(|stored| stored.job.id).collect();
        ids.sort();
        assert_eq!(
            (ids, notices.len()),
            (vec!["one-1".to_owned(), "one-4".into()], 2)
        );
        assert!(!paths.jobs().join(".new-one-5").exists());
        let (jobs, notices) = load(&paths).unwrap();
        assert_eq!((jobs.len(), notices.len()), (2, 2));
        assert!(look(&paths).is_ok(), "what was set aside is nobody's business");
    }

    #[test]
    fn a_job_whose_status_alone_is_lost_is_of_an_earlier_boot() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::at(dir.path());
        fs::create_dir(paths.jobs()).unwrap();
        let status = Status::new(Timestamp::UNIX_EPOCH, "boot".into());
        for id in ["one-1", "one-2"] {
            let id = id.to_owned();
            let job = Job { id, ..Job::default() };
            create(&paths, &job, &status).unwrap();
        }
        fs::remove_file(paths.job("one-1").join(crate::status::FILE)).unwrap();
        fs::write(paths.job("one-2").join(crate::status::FILE), "\0\0\0").unwrap();
        assert!(
            look(&paths).is_err(),
            "a program that cannot read it does not take over"
        );
        let (jobs, notices) = load(&paths).unwrap();
        assert_eq!((jobs.len(), notices.len()), (2, 2));
        for stored in jobs {
            assert!(stored.status.boot_id.is_empty() && !stored.status.state.is_terminal());
        }
    }
}
