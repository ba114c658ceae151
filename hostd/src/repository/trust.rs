//! What this host trusts of a repository, and has seen of it: `repository/` in its state directory.
//!
//! `settings.json` says where the repository is. `metadata/` has the newest root, timestamp, snapshot and targets that
//! were found good: nothing older is taken any more. tough checks against a copy of it, and only what passes all
//! checks is put back, each file whole, so that a host that is cut off here forgets nothing.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use flynn_api::{Digest, Error};
use serde::{Deserialize, Serialize};
use tough::schema::{Root, Signed, Target};
use tough::{Limits, RepositoryLoader, TargetName};

use super::source::Metadata;
use super::{MAX_RELEASE, Release, Source, explain, release_target, target_file};
use crate::download::{self, Expected, Hash, Part, Patience};
use crate::files;

/// The directory's name in the state directory.
const DIR: &str = "repository";

/// The root that is trusted, among the metadata.
const ROOT: &str = "root.json";

/// Bounds for what is not signed yet.
const LIMITS: Limits = Limits {
    max_root_size: 256 << 10,
    max_targets_size: 4 << 20,
    max_timestamp_size: 64 << 10,
    max_snapshot_size: 1 << 20,
    max_root_updates: 256,
};

/// Where a host's releases come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Settings {
    /// The form of this file.
    version: u32,
    /// A URL or a directory.
    repository: String,
    channel: String,
    /// The digest of the root file that the operator gave.
    root: Digest,
}

/// What a command line says about the repository; the rest is as it was.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Wanted {
    /// The repository that releases come from: a URL or a directory; the one of the last time unless given
    #[arg(long, value_name = "URL|DIR")]
    pub repository: Option<String>,
    /// The root of trust, for the first time: the root.json that the repository's keeper gave you
    #[arg(long, value_name = "FILE")]
    pub root: Option<PathBuf>,
    /// Trust the root of --root from now on, and forget the one before
    #[arg(long, requires = "root")]
    pub replace_root: bool,
    /// The channel; the one of the last time unless given, or stable
    #[arg(long)]
    pub channel: Option<String>,
}

/// A repository whose metadata is verified, as far as one channel goes.
pub struct Repository {
    source: Source,
    channel: String,
    inner: tough::Repository,
    dir: PathBuf,
    patience: Patience,
    // Held as long as its metadata is in use.
    _lock: File,
}

impl Repository {
    /// Fetches the newest metadata and verifies it, by what this host trusts and has seen.
    pub async fn open(state: &Path, wanted: &Wanted) -> anyhow::Result<Self> {
        Self::open_with(state, wanted, Patience::default()).await
    }

    pub(super) async fn open_with(state: &Path, wanted: &Wanted, patience: Patience) -> anyhow::Result<Self> {
        let dir = state.join(DIR);
        files::private_dir(&dir)?;
        let lock = File::create(dir.join("lock"))?;
        if lock.try_lock().is_err() {
            bail!("another flynn-host is at work with the repository: wait for it, then try again");
        }
        let Settled { settings, root, anew } = settle(&dir, wanted)?;
        let source = Source::parse(&settings.repository)?;
        let inner = load(&dir, &source, &root, anew, patience)
            .await
            .with_context(|| {
                format!("the repository {source} is not used; what this host has stays as it was")
            })?;
        let repository = Self {
            source,
            channel: settings.channel.clone(),
            inner,
            dir,
            patience,
            _lock: lock,
        };
        repository.check_channel()?;
        files::write_json(&repository.dir.join("settings.json"), &settings)?;
        Ok(repository)
    }

    fn check_channel(&self) -> anyhow::Result<()> {
        let (source, channel) = (&self.source, &self.channel);
        let role = self.inner.delegated_role(channel);
        role.with_context(|| format!("the repository {source} has no channel {channel}"))?;
        Ok(())
    }

    /// The channel.
    pub fn channel(&self) -> &str {
        &self.channel
    }

    /// What a file must be, by the channel's metadata.
    fn target(&self, name: &str) -> anyhow::Result<&Target> {
        let role = self.inner.delegated_role(&self.channel);
        let targets = role.and_then(|role| role.targets.as_ref());
        let found = targets.and_then(|targets| targets.signed.targets.get(&TargetName::new(name).ok()?));
        found.with_context(|| {
            format!(
                "the channel {} of {} has no {name}: is the release complete, and its version right?",
                self.channel, self.source
            )
        })
    }

    /// Opens a file of the channel, of which a byte more or less is not noticed here.
    pub(super) async fn open_target(&self, name: &str, from: u64) -> flynn_api::Result<download::Opened> {
        let target = self.target(name);
        let target = target.map_err(|error| Error::validation(error.to_string()))?;
        let file = target_file(name, &target.hashes.sha256);
        self.source.open(&format!("targets/{file}"), from).await
    }

    /// Whether the channel has a file of this name and length.
    pub(super) fn check_target(&self, name: &str, length: u64) -> anyhow::Result<()> {
        let target = self.target(name)?;
        anyhow::ensure!(
            target.length == length,
            "{name} has {} bytes by the channel's metadata, and {length} by the image that names it",
            target.length
        );
        Ok(())
    }

    /// Fetches a file of the channel into `file`, which is there, whole and verified, or as it was. What came before a
    /// cut is kept beside the repository's metadata, and gone on with.
    pub async fn fetch(&self, name: &str, file: &Path, progress: impl Fn(u64)) -> anyhow::Result<()> {
        let target = self.target(name)?;
        let sha256 = <[u8; 32]>::try_from(&*target.hashes.sha256);
        let expected = Expected {
            what: name.to_owned(),
            length: target.length,
            hash: Hash::Sha256(sha256.context("a SHA-256 has 32 bytes")?),
        };
        // Parts of other files of this name, begun earlier, are not gone on with any more.
        let own = format!(
            "part-{}",
            target_file(name, &target.hashes.sha256).replace('/', "-")
        );
        let same_name = format!(".{}", name.rsplit('/').next().unwrap_or(name));
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let other = entry.file_name().to_string_lossy().into_owned();
            if other.starts_with("part-") && other.ends_with(&same_name) && other != own {
                fs::remove_file(entry.path())?;
            }
        }
        let path = self.dir.join(own);
        let part = Part::lock(&path).await?;
        let mut part = part.with_context(|| format!("{} is gone", path.display()))?;
        let open = download::opener(|from, _| self.open_target(name, from));
        download::fill(&mut part, &expected, self.patience, open, progress).await?;
        // The part may be on another disk.
        if fs::rename(&path, file).is_err() {
            let beside = file.with_added_extension("new");
            fs::copy(&path, &beside)?;
            File::open(&beside)?.sync_all()?;
            fs::rename(&beside, file)?;
            fs::remove_file(&path)?;
        }
        file.parent()
            .map_or(Ok(()), files::sync_dir)
            .with_context(|| file.display().to_string())
    }

    /// The release of this version; the channel's unless given.
    pub async fn release(&self, version: Option<&str>) -> anyhow::Result<Release> {
        version.map_or(Ok(()), super::check_name)?;
        let name = release_target(&self.channel, version);
        anyhow::ensure!(
            self.target(&name)?.length <= MAX_RELEASE,
            "{name} is longer than the {MAX_RELEASE} bytes that a release's description may have"
        );
        let file = self.dir.join("release.json");
        self.fetch(&name, &file, |_| ()).await?;
        let release = Release::read(&fs::read(&file)?).with_context(|| format!("{name} cannot be used"))?;
        anyhow::ensure!(
            version.is_none_or(|version| version == release.version),
            "{name} describes the release {}",
            release.version
        );
        Ok(release)
    }

    /// Fetches a program of a release into `file`: verified and whole, or as it was. It is private and cannot be executed
    /// yet.
    pub async fn fetch_program(
        &self,
        release: &Release,
        program: &str,
        file: &Path,
        progress: impl Fn(u64),
    ) -> anyhow::Result<()> {
        anyhow::ensure!(
            release.programs.iter().any(|known| known == program),
            "the release {} has no program {program}",
            release.version
        );
        let name = format!("{}/{}/{program}", self.channel, release.version);
        self.fetch(&name, file, progress).await
    }

    pub(super) fn patience(&self) -> Patience {
        self.patience
    }
}

/// Where the repository is, and the root that is trusted.
struct Settled {
    settings: Settings,
    root: Vec<u8>,
    /// What was signed by others before says nothing of this one.
    anew: bool,
}

fn settle(dir: &Path, wanted: &Wanted) -> anyhow::Result<Settled> {
    let stored: Option<Settings> = files::read_json(&dir.join("settings.json"))?;
    let given = wanted
        .root
        .as_ref()
        .map(|path| fs::read(path).with_context(|| path.display().to_string()));
    let given = given.transpose()?;
    let repository = wanted
        .repository
        .clone()
        .or(stored.as_ref().map(|stored| stored.repository.clone()));
    let repository = repository.context(
        "this host does not know yet where releases come from: name the repository with --repository URL|DIR, and its \
         root of trust with --root FILE (or bring images in from a directory with --from DIR)",
    )?;
    // A directory is the same wherever this is run next.
    let repository = if repository.contains("://") {
        repository
    } else {
        std::path::absolute(&repository)?.to_string_lossy().into_owned()
    };
    let channel = wanted
        .channel
        .clone()
        .or(stored.as_ref().map(|stored| stored.channel.clone()));
    let channel = channel.unwrap_or_else(|| super::DEFAULT_CHANNEL.into());
    super::check_name(&channel)?;
    let newest = dir.join("metadata/root.json");
    let (pinned, root, anew) = match (stored, given) {
        (None, None) => bail!(
            "this host trusts no repository yet: give --root FILE, the root.json that the keeper of {repository} gave you \
             by a way that you trust"
        ),
        (Some(stored), None) => {
            let root = fs::read(&newest);
            let root = root.context("the root of trust is gone: give it with --root FILE --replace-root")?;
            (stored.root, root, false)
        }
        (Some(stored), Some(given)) if stored.root == Digest::of(&given) && newest.exists() => {
            (stored.root, fs::read(&newest)?, false)
        }
        (Some(_), Some(_)) if !wanted.replace_root => bail!(
            "this host trusts another root than the one in {}: leave --root out, or say --replace-root if you know why \
             it is another",
            wanted.root.clone().unwrap_or_default().display()
        ),
        (_, Some(given)) => (Digest::of(&given), given, true),
    };
    let settings = Settings {
        version: 1,
        repository,
        channel,
        root: pinned,
    };
    Ok(Settled { settings, root, anew })
}

async fn load(
    dir: &Path,
    source: &Source,
    root: &[u8],
    anew: bool,
    patience: Patience,
) -> anyhow::Result<tough::Repository> {
    let (trusted, checked) = (dir.join("metadata"), dir.join("checking"));
    files::private_dir(&trusted)?;
    files::remove_all(&checked)?;
    files::private_dir(&checked)?;
    if !anew {
        copy_kept(&trusted, &checked)?;
    }
    let base = source.url()?;
    let transport = Metadata {
        source: source.clone(),
        base: base.clone(),
        idle: patience.idle,
    };
    let loader = RepositoryLoader::new(&root, base.join("metadata/")?, base.join("targets/")?)
        .transport(transport)
        .limits(LIMITS)
        .datastore(checked.clone());
    let loaded = loader.load().await.map_err(|error| explain::explain(&error));
    if loaded.is_err() && !anew {
        keep_root(&trusted, &checked)?;
    }
    let repository = loaded?;
    if anew {
        files::remove_all(&trusted)?;
        files::private_dir(&trusted)?;
    }
    // The root first: what was signed by keys that it does not know any more is not looked at again.
    files::write_json(&trusted.join(ROOT), repository.root())?;
    copy_kept(&checked, &trusted)?;
    files::remove_all(&checked)?;
    Ok(repository)
}

/// What was signed last, without which older things would be taken for new. The rest is named by these, and can be large.
const KEPT: [&str; 4] = [
    "timestamp.json",
    "snapshot.json",
    "targets.json",
    "latest_known_time.json",
];

/// Copies what is kept; what is not is removed there.
fn copy_kept(from: &Path, to: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(to)? {
        let entry = entry?;
        if entry.file_name() != ROOT && !KEPT.iter().any(|kept| entry.file_name() == *kept) {
            files::remove_all(&entry.path())?;
        }
    }
    for name in KEPT {
        match fs::read(from.join(name)) {
            Ok(bytes) => files::write_atomic(&to.join(name), &bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Keeps a newer root that was verified, though what should follow was not: keys that it does not know any more are never
/// believed again, and what they signed last counts for nothing (TUF 5.3.8, 5.3.11).
fn keep_root(trusted: &Path, checked: &Path) -> anyhow::Result<()> {
    let read = |dir: &Path| files::read_json::<Signed<Root>>(&dir.join(ROOT));
    let (Some(newer), Some(there)) = (read(checked)?, read(trusted)?) else {
        return Ok(());
    };
    if newer.signed.version <= there.signed.version {
        return Ok(());
    }
    files::write_json(&trusted.join(ROOT), &newer)?;
    for name in ["timestamp.json", "snapshot.json"] {
        if !checked.join(name).exists() {
            files::remove_all(&trusted.join(name))?;
        }
    }
    Ok(())
}
