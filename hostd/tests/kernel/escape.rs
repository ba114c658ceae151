//! Ways out of a job that go through the daemon and its supervisors. Those through the container's own walls are tried
//! by the escape suite.

use flynn_api::client::attach::read_frame;
use flynn_api::host::{ExecRequest, JobState, attach};
use flynn_api::image::{Artifact, Entrypoint, ImageManifest};
use rustix::fs::{StatVfsMountFlags, statvfs};

use crate::host::Host;

/// Between fork and exec a process in the container has our file as its program, and so has one whose script names
/// `/proc/self/exe` as its interpreter: as root it could write to the file if it were not read-only for it.
pub(crate) async fn our_program_is_read_only_for_containers() {
    let host = Host::boot().await;
    let job = host.job("sleep 100");
    let running = host.run(&job).await;
    let flags = |pid: &str| statvfs(format!("/proc/{pid}/exe")).unwrap().f_flag;
    assert!(
        !flags("self").contains(StatVfsMountFlags::RDONLY),
        "all is read-only here"
    );
    let supervisor = running.supervisor_pid.unwrap().to_string();
    assert!(flags(&supervisor).contains(StatVfsMountFlags::RDONLY));
}

/// Whoever makes an image is not who may grant something.
pub(crate) async fn images_grant_no_capabilities() {
    let host = Host::boot().await;
    let asking = |capability: &str| {
        let entrypoint = Entrypoint {
            capabilities: vec![capability.into()],
            ..Entrypoint::default()
        };
        let mut job = host.job("grep CapEff /proc/self/status");
        job.artifacts = vec![Artifact::image(
            ImageManifest::new(entrypoint, vec![host.layer.clone()]),
            "",
            None,
        )];
        job
    };
    let job = asking("CAP_SYS_ADMIN");
    let error = host.api.add_job(&job).await.unwrap_err();
    assert!(error.message.contains("CAP_SYS_ADMIN"), "{error}");
    assert_eq!(host.end(&job.id).await.status, JobState::Failed);
    // What every container has may be asked for, and the platform's images may ask for more.
    let (ended, _) = host.finish(&asking("CAP_KILL")).await;
    assert_eq!(ended.status, JobState::Done, "{ended:?}");
    let mut job = asking("CAP_SYS_ADMIN");
    job.metadata
        .insert(flynn_api::host::label::SYSTEM_APP.into(), "true".into());
    let (ended, _) = host.finish(&job).await;
    assert_eq!(ended.status, JobState::Done, "{ended:?}");
}

/// Whoever starts a program beside a job's opens nothing for it that the job could not.
pub(crate) async fn a_job_s_null_device_is_not_trusted() {
    let host = Host::boot().await;
    for (place, why) in [
        ("ln -s /proc/kallsyms /dev/null", "open /dev/null"),
        ("mkfifo -m 666 /dev/null", "not what it should be"),
        ("echo > /dev/null", "not what it should be"),
    ] {
        let mut job = host.job(&format!("rm /dev/null; {place}; echo placed; sleep 1000"));
        job.config.host_user_namespace = true;
        host.run(&job).await;
        host.says(&job.id, "placed").await;
        let exec = ExecRequest {
            args: ["readlink", "/proc/self/fd/0"].map(str::to_owned).into(),
            ..ExecRequest::default()
        };
        let mut stream = host.api.exec(&job.id, &exec).await.unwrap();
        let answer = read_frame(&mut stream).await.unwrap().unwrap();
        let said = String::from_utf8_lossy(&answer.payload);
        assert!(
            answer.kind == attach::ERROR && said.contains(why),
            "{place}: {said}"
        );
        host.api.stop_job(&job.id).await.unwrap();
    }
}

/// As deep as no stack and no descriptor table is.
pub(crate) async fn deep_directories_are_removed() {
    let host = Host::boot().await;
    let (job, lines) = host
        .script(
            "d=d; for i in 1 2 3 4 5 6 7 8 9 10; do d=$d/$d; done; cd /tmp; \
             for i in 1 2 3 4 5 6; do mkdir -p $d && cd -P $d 2>/dev/null; done; \
             mkdir last && echo made",
        )
        .await;
    assert_eq!(lines.last().map(String::as_str), Some("made"), "{lines:?}");
    let upper = host.state.join("jobs").join(&job.job.id).join("upper");
    let gone = host
        .until(async || crate::host::is_gone(&upper).then_some(()))
        .await;
    assert!(gone.is_some(), "it is left\n{}", host.log());
    assert!(host.api.status().await.is_ok(), "the daemon is gone");
}
