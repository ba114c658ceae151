//! `flynn-host destroy-volumes`.

use super::{flynn_host, job_with, new};
use crate::host::Host;

pub(crate) async fn all_volumes_are_destroyed_or_none() {
    let host = Host::boot().await;
    for id in ["one", "two", "old"] {
        host.api.create_volume("default", &new(id, None)).await.unwrap();
    }
    let old = host.api.decommission_volume("old").await.unwrap().id;
    let ids = async || -> Vec<String> {
        let volumes = host.api.volumes().await.unwrap();
        volumes.into_iter().map(|volume| volume.id).collect()
    };
    let (ok, text) = flynn_host(&["destroy-volumes", "--keep-system-images"]);
    assert!(!ok && text.contains("say --yes"), "{text}");
    let (ok, text) = flynn_host(&["destroy-volumes", "--yes"]);
    assert!(ok && text == format!("{old}\n"), "{text}");
    assert_eq!(ids().await, ["one", "two"]);
    let job = job_with(&host, "two", "sleep 1000");
    host.run(&job).await;
    let (ok, text) = flynn_host(&["destroy-volumes", "--include-data", "--yes"]);
    assert!(!ok && text.contains(&format!("two by {}", job.id)), "{text}");
    assert_eq!(ids().await, ["one", "two"]);
    host.api.stop_job(&job.id).await.unwrap();
    host.end(&job.id).await;
    let (ok, text) = flynn_host(&["destroy-volumes", "--include-data", "--yes", "--json"]);
    let said: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert!(
        ok && said["removed"] == serde_json::json!(["one", "two"]),
        "{text}"
    );
    assert!(ids().await.is_empty());
}
