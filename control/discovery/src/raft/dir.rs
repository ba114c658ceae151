//! The directory of a member's store: who may use it, and the id that goes with it.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;

use super::journal::sync_directory;

/// Makes the directory if need be, and sees to it that it stays.
pub fn make(dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir)
        .and_then(|()| sync_directory(dir))
        .with_context(|| format!("cannot make the data directory {}", dir.display()))
}

/// Keeps other processes away until the file is dropped.
pub fn lock(dir: &Path) -> anyhow::Result<File> {
    let path = dir.join("lock");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)?;
    file.try_lock().with_context(|| {
        format!(
            "{} is in use: another discoverd runs on this data directory",
            path.display()
        )
    })?;
    Ok(file)
}

/// An id that no member has had.
pub fn new_id() -> u64 {
    // 48 bits: exact in every JSON reader.
    rand::random_range(1..1_u64 << 48)
}

/// The id of the member whose store `dir` is.
pub fn stored_id(dir: &Path) -> anyhow::Result<Option<u64>> {
    let path = dir.join("id");
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let id = parse(&bytes).with_context(|| {
        format!(
            "{} is damaged: it does not hold a member's id. Take this member out of the cluster, move its data \
             directory away and let it join anew; a sole member needs a backup",
            path.display()
        )
    });
    id.map(Some)
}

/// Refuses a store without its journal: a member that forgot its vote, and what it has acknowledged, could split the cluster.
pub fn check_whole(dir: &Path) -> anyhow::Result<()> {
    anyhow::ensure!(
        !dir.join("snapshot").exists() || dir.join("journal").exists(),
        "{} is missing, but the snapshot is there: put it back, or move the whole directory away and join anew",
        dir.join("journal").display()
    );
    Ok(())
}

/// The member's id: drawn when the store is made, and kept in it, so that a store that was lost never comes back under
/// the same id (a member that forgot its vote could split the cluster).
pub fn member_id(dir: &Path) -> anyhow::Result<u64> {
    if let Some(id) = stored_id(dir)? {
        return Ok(id);
    }
    let path = dir.join("id");
    anyhow::ensure!(
        !dir.join("journal").exists(),
        "{} is missing, but the journal is there: put it back, or move the whole directory away and join anew",
        path.display()
    );
    let id = new_id();
    let temporary = dir.join("id.new");
    let mut file = File::create(&temporary)?;
    file.write_all(encode_id(id).as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&temporary, &path)?;
    sync_directory(&path)?;
    Ok(id)
}

/// What the id's file holds: `id crc32\n`, for a member under another's id could split the cluster as well. Earlier
/// releases wrote `id\n`.
pub fn encode_id(id: u64) -> String {
    let id = id.to_string();
    format!("{id} {:08x}\n", crc32fast::hash(id.as_bytes()))
}

fn parse(bytes: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(bytes).ok()?;
    let id: u64 = text.strip_suffix('\n')?.split(' ').next()?.parse().ok()?;
    (text == encode_id(id) || text == format!("{id}\n")).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_whole_or_new() {
        let dir = tempfile::tempdir().unwrap();
        check_whole(dir.path()).unwrap();
        std::fs::write(dir.path().join("snapshot"), "").unwrap();
        let why = check_whole(dir.path()).unwrap_err().to_string();
        assert!(why.contains("journal is missing"), "{why}");
        std::fs::write(dir.path().join("journal"), "").unwrap();
        check_whole(dir.path()).unwrap();
    }
}
