//! Limits that change while a job runs.

use std::sync::{Arc, PoisonError};

use flynn_api::resources::Resources;
use flynn_api::{Error, Result};
use tokio::task::spawn_blocking;

use super::{Daemon, disk_error, store};
use crate::cgroup::Group;
use crate::prepare;

impl Daemon {
    /// Changes the limits that are named, of a job that runs: its cgroups first, then its record, by which it is started
    /// again after a boot.
    pub(super) async fn update_limits(self: &Arc<Self>, id: String, changes: Resources) -> Result<()> {
        let fixed = |name: &&String| !Resources::LIVE.contains(&name.as_str());
        if let Some(name) = changes.0.keys().find(fixed) {
            let live = Resources::LIVE.join(", ");
            return Err(Error::invalid_field(
                &format!("resources.{name}"),
                format!("of a running job, {live} can be changed; what else there is takes a new job"),
            ));
        }
        let daemon = Arc::clone(self);
        // A task of its own: both are changed, or neither, whether the caller waits or not.
        let pass = self.gate.beside(&format!("the limits of job {id}"));
        let changed = spawn_blocking(move || {
            let _pass = pass;
            daemon.change_limits(&id, changes)
        })
        .await;
        changed.map_err(|error| Error::internal(format!("the change was cut off: {error}")))?
    }

    fn change_limits(&self, id: &str, changes: Resources) -> Result<()> {
        // Of two at once the second begins with what the first has made.
        let _changing = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = self.table.get(id).ok_or_else(|| Error::not_found("job", id))?;
        if entry.status.state.is_terminal() {
            return Err(Error::conflict(format!("job {id} is over")));
        }
        let mut job = (*entry.job).clone();
        job.resources.0.extend(changes.0);
        prepare::check(&job, &self.host_id)?;
        let group = Group::of(&self.hierarchies, job.partition, id);
        let disk = self.paths.job(id);
        let before = prepare::limits(&entry.job);
        let set = group.limit(&prepare::limits(&job), &disk);
        if let Err(error) = set {
            let _ = group.limit(&before, &disk);
            return Err(Error::conflict(format!(
                "job {id} keeps the limits that it had: {error}"
            )));
        }
        if let Err(error) = store::update(&self.paths, &job) {
            let _ = group.limit(&before, &disk);
            return Err(disk_error("keep the job's limits", &error));
        }
        self.table.replace(id, Arc::new(job));
        Ok(())
    }
}
