//! Releases as people ask for them.

use flynn_api::controller::Release;
use flynn_api::{Error, Result};
use uuid::Uuid;

use super::{name, process};

/// A new release with everything filled in. `system` says whether its app belongs to the platform.
pub(crate) fn prepare(mut release: Release, system: bool) -> Result<Release> {
    if release.id.is_empty() {
        release.id = Uuid::new_v4().to_string();
    }
    release.id = Uuid::try_parse(&release.id)
        .map_err(|_| Error::invalid_field("id", "must be a UUID"))?
        .to_string();
    if release.artifact_ids.len() > 64 {
        return Err(Error::invalid_field("artifacts", "names more than 64 artifacts"));
    }
    for (at, artifact) in release.artifact_ids.iter_mut().enumerate() {
        let refuse =
            |_| Error::invalid_field(&format!("artifacts[{at}]"), "must be an artifact's id (a UUID)");
        *artifact = Uuid::try_parse(artifact).map_err(refuse)?.to_string();
    }
    name::env("env", &release.env)?;
    name::meta("meta", &release.meta)?;
    for (kind, process) in &release.processes {
        process::check(kind, process, system)?;
        if release.artifact_ids.is_empty() {
            return Err(Error::invalid_field(
                "artifacts",
                "a release with processes needs an image to run",
            ));
        }
    }
    Ok(release)
}

/// A release as events show it: without secrets.
pub(crate) fn redacted(release: &Release) -> Release {
    let mut shown = release.clone();
    shown.env = flynn_api::redact::env(&release.env);
    for process in shown.processes.values_mut() {
        process.env = flynn_api::redact::env(&process.env);
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use flynn_api::Env;
    use flynn_api::controller::ProcessType;

    #[test]
    fn events_carry_no_secret() {
        let env = Env::from([
            ("API_TOKEN".into(), "t0p".into()),
            ("COLOUR".into(), "red".into()),
        ]);
        let process = ProcessType {
            env: env.clone(),
            ..ProcessType::default()
        };
        let release = Release {
            env,
            processes: [("web".into(), process)].into(),
            ..Release::default()
        };
        let shown = serde_json::to_string(&redacted(&release)).unwrap();
        assert!(!shown.contains("t0p") && shown.contains("red"), "{shown}");
    }

    #[test]
    fn processes_need_an_image() {
        let processes = [("web".into(), ProcessType::default())].into();
        let release = Release {
            processes,
            ..Release::default()
        };
        assert!(
            prepare(release.clone(), false)
                .unwrap_err()
                .message
                .starts_with("artifacts: ")
        );
        let release = Release {
            artifact_ids: vec!["x".into()],
            ..release
        };
        assert!(
            prepare(release, false)
                .unwrap_err()
                .message
                .starts_with("artifacts[0]: ")
        );
    }
}
