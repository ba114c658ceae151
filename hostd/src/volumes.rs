//! Volumes: plain directories of this host that outlive jobs.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use flynn_api::host::Volume;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::files;
use crate::paths::Paths;
use crate::prepare::is_volume_id;

const FILE: &str = "volume.json";

#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    created_at: Timestamp,
}

/// Makes a volume unless it is there; a new one belongs to this user. Gives the directory of its data.
pub fn ensure(paths: &Paths, id: &str, uid: u32, gid: u32) -> io::Result<PathBuf> {
    let dir = paths.volumes().join(id);
    let data = dir.join("data");
    if !dir.join(FILE).exists() {
        files::private_dir(&data)?;
        fs::set_permissions(&data, fs::Permissions::from_mode(0o755))?;
        chown(&data, Some(uid), Some(gid))?;
        // Last: a volume without it is made again.
        files::write_json(
            &dir.join(FILE),
            &Record {
                version: 1,
                created_at: Timestamp::now(),
            },
        )?;
        files::sync_dir(&paths.volumes())?;
    }
    Ok(data)
}

/// All volumes; `users` gives the jobs that have one mounted.
pub fn list(paths: &Paths, users: impl Fn(&str) -> Vec<String>) -> io::Result<Vec<Volume>> {
    let mut volumes = Vec::new();
    for entry in fs::read_dir(paths.volumes())? {
        let entry = entry?;
        let Ok(id) = entry.file_name().into_string() else {
            continue;
        };
        if let Some(record) = read(&entry.path()) {
            volumes.push(Volume {
                jobs: users(&id),
                id,
                created_at: record.created_at,
            });
        }
    }
    volumes.sort_by(|one, other| one.id.cmp(&other.id));
    Ok(volumes)
}

fn read(dir: &Path) -> Option<Record> {
    files::read_json(&dir.join(FILE)).ok().flatten()
}

/// Removes a volume and its data; whether there was one.
pub fn remove(paths: &Paths, id: &str) -> io::Result<bool> {
    let dir = paths.volumes().join(id);
    if !is_volume_id(id) || !dir.exists() {
        return Ok(false);
    }
    // First out of the way, so that a removal that is cut short is no volume any more.
    let trash = paths.volumes().join(format!(".removed-{id}"));
    files::remove_all(&trash)?;
    fs::rename(&dir, &trash)?;
    files::sync_dir(&paths.volumes())?;
    files::remove_all(&trash)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_made_once_and_goes_with_its_data() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::at(dir.path());
        fs::create_dir(paths.volumes()).unwrap();
        let own = (
            rustix::process::getuid().as_raw(),
            rustix::process::getgid().as_raw(),
        );
        let data = ensure(&paths, "one", own.0, own.1).unwrap();
        fs::write(data.join("file"), "kept").unwrap();
        assert_eq!(ensure(&paths, "one", own.0, own.1).unwrap(), data);
        assert!(data.join("file").exists());
        let listed = list(&paths, |id| vec![format!("{id}-user")]).unwrap();
        assert_eq!(
            (listed.len(), listed[0].jobs.as_slice()),
            (1, &["one-user".to_owned()][..])
        );
        assert!(remove(&paths, "one").unwrap() && !remove(&paths, "one").unwrap());
        assert!(!remove(&paths, "../layers").unwrap());
        assert!(list(&paths, |_| Vec::new()).unwrap().is_empty());
    }
}
