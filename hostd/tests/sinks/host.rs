//! What a host has of jobs that log, without the host.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flynn_api::host::LogStream;
use flynn_api::sink::{Sink, SinkKind};
use flynn_hostd::logs::Writer;
use flynn_hostd::logs::record::Origin;
use flynn_hostd::logs::sink::Sinks;
use jiff::Timestamp;

/// What a host has of jobs that log.
pub(crate) struct Host {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) runtime: tokio::runtime::Runtime,
}

impl Host {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("jobs")).unwrap();
        Self {
            dir,
            runtime: tokio::runtime::Runtime::new().unwrap(),
        }
    }

    pub(crate) fn jobs(&self) -> PathBuf {
        self.dir.path().join("jobs")
    }

    /// Starts shipping.
    pub(crate) fn sinks(&self) -> Sinks {
        let _inside = self.runtime.enter();
        let nobody = Arc::new(|service| {
            Box::pin(async move { Err(io::Error::other(format!("nobody leads {service}"))) })
                as flynn_hostd::logs::sink::Leader
        });
        Sinks::open(self.dir.path(), &self.jobs(), nobody).unwrap()
    }

    pub(crate) fn put(&self, sinks: &Sinks, sink: Sink) {
        self.runtime.block_on(sinks.put(sink)).unwrap();
    }

    /// Stops shipping as a daemon does that is told to.
    pub(crate) fn stop(&self, sinks: &Sinks) {
        self.runtime.block_on(sinks.shut_down());
    }

    pub(crate) fn job(&self, id: &str) -> Writer {
        let dir = self.jobs().join(id);
        std::fs::create_dir_all(&dir).unwrap();
        writer(&dir, id)
    }
}

fn writer(dir: &Path, id: &str) -> Writer {
    let origin = Origin {
        job_id: id.into(),
        ..Origin::default()
    };
    let mut writer = Writer::new(&dir.join("log"), &origin);
    writer.at(Timestamp::now());
    writer
}

/// Logs a line.
pub(crate) fn say(writer: &mut Writer, text: &str) {
    writer.add(LogStream::Stdout, text.as_bytes(), false);
}

pub(crate) fn syslog(url: &str) -> Sink {
    Sink {
        id: "syslog".into(),
        kind: SinkKind::Syslog,
        config: serde_json::json!({"url": url, "use_ids": true}),
        host_managed: false,
    }
}
