//! From a planned start to the job that is put to a host.

use flynn_api::controller::ExpandedFormation;
use flynn_api::host::Job;

use crate::plan::Start;
use crate::view::{REPLACES, RESTARTS};

/// The job `id` of a planned start; `None` when the release has no such process type.
pub fn spec_of(formation: &ExpandedFormation, start: &Start, id: &str) -> Option<Job> {
    let mut job = formation.job(&start.key.process_type, id, start.volume_index)?;
    // On the job itself, so that the next leader goes on counting.
    if start.restarts > 0 {
        job.metadata
            .insert(RESTARTS.to_owned(), start.restarts.to_string());
    }
    if let Some(replaced) = &start.replaces {
        job.metadata.insert(REPLACES.to_owned(), replaced.clone());
    }
    Some(job)
}
