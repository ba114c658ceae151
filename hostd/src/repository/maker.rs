//! Makes repositories and changes them: what their keeper does, on a machine that need not be a host.
//!
//! Files come first, then the metadata that names them, and `timestamp.json` last, whole: whoever reads meanwhile, or
//! after the maker was killed, finds the state before or the one after. Only where keys are rotated there is a moment
//! in which what is signed by the old ones is refused; `refresh` ends it where the maker was killed there.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use aws_lc_rs::rand::SystemRandom;
use flynn_api::digest::Digester;
use flynn_api::image::ImageManifest;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::Digest as _;
use tough::TargetName;
use tough::editor::signed::SignedRole;
use tough::key_source::KeySource;
use tough::schema::{
    DelegatedRole, DelegatedTargets, Delegations, Hashes, KeyHolder, Metafile, PathPattern, PathSet, Role,
    RoleKeys, RoleType, Root, Signed, Snapshot, Target, Targets, Timestamp as TimestampRole,
};

use super::signer::KeyFile;
use super::{RELEASE_V1, Release, check_name, layer_target, release_target, target_file};
use crate::files;

const SPEC: &str = "1.0.0";

/// How long what is signed holds, in days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Days {
    pub(super) root: i64,
    pub(super) targets: i64,
    pub(super) channel: i64,
    pub(super) snapshot: i64,
    pub(super) timestamp: i64,
}

impl Default for Days {
    fn default() -> Self {
        Self {
            root: 730,
            targets: 365,
            channel: 365,
            snapshot: 30,
            timestamp: 7,
        }
    }
}

/// A repository's directory, and keys.
pub(super) struct Maker {
    dir: PathBuf,
    keys: Vec<KeyFile>,
    pub(super) days: Days,
}

/// The newest metadata.
struct State {
    root: Signed<Root>,
    targets: Signed<Targets>,
    channels: BTreeMap<String, Signed<Targets>>,
    snapshot: Signed<Snapshot>,
    timestamp: Signed<TimestampRole>,
}

/// How a repository begins.
#[derive(Clone, Debug)]
pub(super) struct Beginning {
    pub(super) channels: Vec<String>,
    /// How many keys sign the root, and how many of them must.
    pub(super) root_keys: u64,
    pub(super) threshold: u64,
}

/// What is put into a channel.
pub(super) struct Publication<'a> {
    pub(super) channel: &'a str,
    pub(super) version: &'a str,
    /// Where `<name>.json` and `layers/<id>.squashfs` are.
    pub(super) images: &'a Path,
    pub(super) programs: &'a [PathBuf],
}

impl Maker {
    /// A maker of the repository in `dir` with the keys in these directories.
    pub(super) fn open(dir: &Path, keys: &[PathBuf]) -> anyhow::Result<Self> {
        Ok(Self {
            dir: std::path::absolute(dir)?,
            keys: KeyFile::read_all(keys)?,
            days: Days::default(),
        })
    }

    /// Has the repository to itself for as long as this is held: two at once would take back what the other one signed.
    fn lock(&self) -> anyhow::Result<File> {
        let path = self.dir.join(".lock");
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        file.lock()?;
        Ok(file)
    }

    fn metadata(&self) -> PathBuf {
        self.dir.join("metadata")
    }

    /// Makes a repository without releases, and its keys in `keys`. Gives the path of its root of trust.
    pub(super) async fn init(
        dir: &Path,
        keys: &Path,
        beginning: &Beginning,
        days: Days,
    ) -> anyhow::Result<PathBuf> {
        let metadata = dir.join("metadata");
        anyhow::ensure!(
            !metadata.join("timestamp.json").exists(),
            "there is a repository in {}: choose another directory",
            dir.display()
        );
        anyhow::ensure!(
            (1..=beginning.root_keys).contains(&beginning.threshold) && beginning.root_keys <= 16,
            "of 1 to 16 keys for the root, at least one and not more than there are must sign"
        );
        for sub in [metadata, dir.join("targets")] {
            fs::create_dir_all(&sub).with_context(|| sub.display().to_string())?;
        }
        let mut maker = Self {
            dir: std::path::absolute(dir)?,
            keys: Vec::new(),
            days,
        };
        let mut root = Root {
            spec_version: SPEC.into(),
            consistent_snapshot: true,
            version: NonZeroU64::MIN,
            expires: until(days.root),
            keys: HashMap::new(),
            roles: HashMap::new(),
            _extra: HashMap::new(),
        };
        let threshold = NonZeroU64::new(beginning.threshold).context("at least one key must sign")?;
        for (role, keys_of_it, threshold) in [
            (RoleType::Root, beginning.root_keys, threshold),
            (RoleType::Targets, 1, NonZeroU64::MIN),
            (RoleType::Snapshot, 1, NonZeroU64::MIN),
            (RoleType::Timestamp, 1, NonZeroU64::MIN),
        ] {
            maker.renew_keys(&mut root, role, keys, keys_of_it, threshold)?;
        }
        let mut delegations = Delegations::default();
        let mut channels = BTreeMap::new();
        for name in &beginning.channels {
            let key = maker.renew_channel_key(&mut delegations, name, keys)?;
            delegations.keys.insert(key.id.clone(), key.key);
            channels.insert(
                name.clone(),
                Targets::new(SPEC.into(), NonZeroU64::MIN, until(days.channel)),
            );
        }
        let mut targets = Targets::new(SPEC.into(), NonZeroU64::MIN, until(days.targets));
        targets.delegations = Some(delegations.clone());
        let holder = KeyHolder::Root(root.clone());
        let root = maker.sign_root(root, None).await?;
        let targets = maker.sign(targets, &holder).await?;
        let mut state = State {
            root,
            targets,
            channels: BTreeMap::new(),
            snapshot: unsigned(Snapshot::new(SPEC.into(), NonZeroU64::MIN, until(0))),
            timestamp: unsigned(TimestampRole::new(SPEC.into(), NonZeroU64::MIN, until(0))),
        };
        let holder = KeyHolder::Delegations(delegations);
        for (name, targets) in channels {
            let signed = maker
                .sign(
                    DelegatedTargets {
                        name: name.clone(),
                        targets,
                    },
                    &holder,
                )
                .await?;
            state.channels.insert(name, signed.targets().1);
        }
        maker.sign_online(&mut state, true).await?;
        Ok(maker.metadata().join("1.root.json"))
    }

    /// Adds a release to a channel, and makes it the channel's. Gives it.
    pub(super) async fn publish(&self, publication: &Publication<'_>) -> anyhow::Result<Release> {
        let Publication {
            channel,
            version,
            images,
            programs,
        } = *publication;
        check_name(version)?;
        let _lock = self.lock()?;
        let mut state = self.load()?;
        let targets = state.channels.get_mut(channel);
        let targets = targets.with_context(|| format!("the repository has no channel {channel}"))?;
        let own = release_target(channel, Some(version));
        anyhow::ensure!(
            !targets
                .signed
                .targets
                .contains_key(&TargetName::new(own.as_str())?),
            "the channel {channel} has a release {version}: releases never change, choose another version"
        );
        let mut release = Release {
            kind: RELEASE_V1.into(),
            version: version.to_owned(),
            images: read_images(images)?,
            programs: Vec::new(),
        };
        let mut added = Vec::new();
        for layer in release.images.values().flat_map(ImageManifest::layers) {
            let file = images.join("layers").join(format!("{}.squashfs", layer.id));
            let (found, target) = hash(&file)?;
            anyhow::ensure!(
                found == layer.id && target.length == layer.length,
                "{} is damaged: make the images anew",
                file.display()
            );
            added.push((layer_target(channel, layer.id), target, file));
        }
        for program in programs {
            let name = program.file_name().and_then(|name| name.to_str());
            let name = name.with_context(|| format!("{} has no name", program.display()))?;
            release.programs.push(name.to_owned());
            added.push((
                format!("{channel}/{version}/{name}"),
                hash(program)?.1,
                program.clone(),
            ));
        }
        let description = self.dir.join(".release.json");
        fs::write(&description, serde_json::to_vec(&release)?)?;
        Release::read(&fs::read(&description)?)?;
        let target = hash(&description)?.1;
        added.push((own, target.clone(), description.clone()));
        added.push((release_target(channel, None), target, description.clone()));
        for (name, target, file) in added {
            self.place(&name, &target, &file)?;
            targets.signed.targets.insert(TargetName::new(name)?, target);
        }
        fs::remove_file(&description)?;
        self.sign_channel(&mut state, channel).await?;
        self.sign_online(&mut state, true).await?;
        Ok(release)
    }

    /// Signs the timestamp anew, and the snapshot where half of its time is over. Gives when the first of them ends.
    pub(super) async fn refresh(&self) -> anyhow::Result<Timestamp> {
        let _lock = self.lock()?;
        let mut state = self.load()?;
        anyhow::ensure!(
            state.root.signed.verify_role(&state.targets).is_ok(),
            "a change of the key for targets was cut off, and no host takes what is here: rotate the role targets again"
        );
        let half = SignedDuration::from_hours(self.days.snapshot * 12);
        let root = &state.root.signed;
        let snapshot = state.snapshot.signed.expires < Timestamp::now() + half
            || root.verify_role(&state.snapshot).is_err();
        self.sign_online(&mut state, snapshot).await?;
        let ends = [
            state.root.signed.expires,
            state.targets.signed.expires,
            state.snapshot.signed.expires,
            state.timestamp.signed.expires,
        ];
        let channels = state.channels.values().map(|channel| channel.signed.expires);
        Ok(ends.into_iter().chain(channels).min().unwrap_or_default())
    }

    /// Replaces keys: `root`, `targets`, `snapshot`, `timestamp` or a channel's. New ones are made in `keys`, and
    /// what the old ones signed is signed anew; so is the root, for another two years.
    pub(super) async fn rotate(&mut self, roles: &[String], keys: &Path) -> anyhow::Result<()> {
        let _lock = self.lock()?;
        let mut state = self.load()?;
        let mut root = state.root.signed.clone();
        let mut delegations = state.targets.signed.delegations.clone().unwrap_or_default();
        let mut changed = Vec::new();
        for role in roles {
            let kind = match role.as_str() {
                "root" => RoleType::Root,
                "targets" => RoleType::Targets,
                "snapshot" => RoleType::Snapshot,
                "timestamp" => RoleType::Timestamp,
                channel if state.channels.contains_key(channel) => {
                    let key = self.renew_channel_key(&mut delegations, channel, keys)?;
                    delegations.keys.insert(key.id.clone(), key.key);
                    changed.push(channel.to_owned());
                    continue;
                }
                other => bail!("{other:?} is neither root, targets, snapshot or timestamp nor a channel"),
            };
            let before = root
                .roles
                .get(&kind)
                .context("the root does not know all roles")?;
            let (count, threshold) = (before.keyids.len() as u64, before.threshold);
            self.renew_keys(&mut root, kind, keys, count, threshold)?;
        }
        forget_unused_keys(&mut root, &mut delegations);
        let in_targets = !changed.is_empty() || roles.iter().any(|role| role == "targets");
        if changed.len() < roles.len() {
            root.version = next(root.version)?;
            root.expires = until(self.days.root);
            state.root = self.sign_root(root, Some(state.root.signed)).await?;
        }
        if in_targets {
            let mut targets = state.targets.signed;
            targets.version = next(targets.version)?;
            targets.expires = until(self.days.targets);
            targets.delegations = Some(delegations);
            let holder = KeyHolder::Root(state.root.signed.clone());
            state.targets = self.sign(targets, &holder).await?;
        }
        for channel in changed {
            self.sign_channel(&mut state, &channel).await?;
        }
        let snapshot = in_targets || roles.iter().any(|role| role == "snapshot");
        self.sign_online(&mut state, snapshot).await
    }

    /// Makes new keys for a role.
    fn renew_keys(
        &mut self,
        root: &mut Root,
        role: RoleType,
        dir: &Path,
        count: u64,
        threshold: NonZeroU64,
    ) -> anyhow::Result<()> {
        let mut keyids = Vec::new();
        for _ in 0..count {
            let key = KeyFile::generate(dir, &role.to_string())?;
            keyids.push(key.id.clone());
            root.keys.insert(key.id.clone(), key.key.clone());
            self.keys.push(key);
        }
        let keys = RoleKeys {
            keyids,
            threshold,
            _extra: HashMap::new(),
        };
        root.roles.insert(role, keys);
        Ok(())
    }

    /// Makes a new key for a channel, whose files are below the channel's name and nowhere else.
    fn renew_channel_key(
        &mut self,
        delegations: &mut Delegations,
        name: &str,
        dir: &Path,
    ) -> anyhow::Result<KeyFile> {
        check_name(name)?;
        let top = ["root", "targets", "snapshot", "timestamp"];
        anyhow::ensure!(!top.contains(&name), "{name} cannot be a channel's name");
        let key = KeyFile::generate(dir, name)?;
        let paths = [format!("{name}/*"), format!("{name}/*/*")];
        let paths = paths
            .into_iter()
            .map(PathPattern::new)
            .collect::<Result<_, _>>()?;
        delegations.roles.retain(|role| role.name != name);
        delegations.roles.push(DelegatedRole {
            name: name.to_owned(),
            keyids: vec![key.id.clone()],
            threshold: NonZeroU64::MIN,
            paths: PathSet::Paths(paths),
            terminating: true,
            targets: None,
        });
        self.keys.push(key.clone());
        Ok(key)
    }

    async fn sign_channel(&self, state: &mut State, channel: &str) -> anyhow::Result<()> {
        let targets = state.channels.get(channel).context("there is no such channel")?;
        let mut targets = targets.signed.clone();
        targets.version = next(targets.version)?;
        targets.expires = until(self.days.channel);
        let name = channel.to_owned();
        let holder = state.targets.signed.delegations.clone().unwrap_or_default();
        let holder = KeyHolder::Delegations(holder);
        let signed = self.sign(DelegatedTargets { name, targets }, &holder).await?;
        state.channels.insert(channel.to_owned(), signed.targets().1);
        Ok(())
    }

    /// Signs the timestamp, and the snapshot where that is to change.
    async fn sign_online(&self, state: &mut State, snapshot: bool) -> anyhow::Result<()> {
        let holder = KeyHolder::Root(state.root.signed.clone());
        if snapshot {
            let new = &mut state.snapshot.signed;
            let first = new.meta.is_empty();
            if !first {
                new.version = next(new.version)?;
            }
            new.expires = until(self.days.snapshot);
            let channels = state
                .channels
                .iter()
                .map(|(name, channel)| (name.as_str(), channel.signed.version));
            for (name, version) in channels.chain([("targets", state.targets.signed.version)]) {
                new.meta.insert(format!("{name}.json"), metafile(version));
            }
            let signed = self.sign(new.clone(), &holder).await?;
            state.snapshot = signed;
        }
        let new = &mut state.timestamp.signed;
        if !new.meta.is_empty() {
            new.version = next(new.version)?;
        }
        new.expires = until(self.days.timestamp);
        new.meta
            .insert("snapshot.json".into(), metafile(state.snapshot.signed.version));
        state.timestamp = self.sign(new.clone(), &holder).await?;
        Ok(())
    }

    /// Signs a root by its own keys and by those of the one before.
    async fn sign_root(&self, root: Root, before: Option<Root>) -> anyhow::Result<Signed<Root>> {
        let keys = self.sources();
        let rng = SystemRandom::new();
        let mut signed = SignedRole::new(root.clone(), &KeyHolder::Root(root.clone()), &keys, &rng).await?;
        if let Some(before) = before {
            let by_old = SignedRole::new(root.clone(), &KeyHolder::Root(before.clone()), &keys, &rng).await?;
            signed = signed.add_old_signatures(by_old.signed().signatures.clone())?;
            before
                .verify_role(signed.signed())
                .context("not enough of the keys of the root before are here")?;
        }
        root.verify_role(signed.signed())
            .context("not enough of the root's keys are here")?;
        self.write(&signed)?;
        Ok(signed.signed().clone())
    }

    /// Signs a role and writes it.
    async fn sign<T: Role + Serialize + Clone>(
        &self,
        role: T,
        holder: &KeyHolder,
    ) -> anyhow::Result<Signed<T>> {
        let signed = SignedRole::new(role, holder, &self.sources(), &SystemRandom::new()).await;
        let signed = signed.map_err(|error| {
            anyhow::anyhow!("{error}: is the key of that role in the directories given with --keys?")
        })?;
        self.write(&signed)?;
        Ok(signed.signed().clone())
    }

    fn write<T: Role + Serialize>(&self, signed: &SignedRole<T>) -> anyhow::Result<()> {
        let path = self.metadata().join(signed.signed().signed.filename(true));
        write_shared(&path, signed.buffer())
    }

    fn sources(&self) -> Vec<Box<dyn KeySource>> {
        let source = |key: &KeyFile| Box::new(key.clone()) as Box<dyn KeySource>;
        self.keys.iter().map(source).collect()
    }

    /// The newest metadata. It is the keeper's own, and yet what is signed upon it must be what was signed.
    fn load(&self) -> anyhow::Result<State> {
        let metadata = self.metadata();
        let read = |name: String| metadata.join(name);
        let timestamp: Signed<TimestampRole> = parse(&read("timestamp.json".into()))?;
        let snapshot = timestamp
            .signed
            .meta
            .get("snapshot.json")
            .context("the timestamp names no snapshot")?;
        let snapshot: Signed<Snapshot> = parse(&read(format!("{}.snapshot.json", snapshot.version)))?;
        let mut version = NonZeroU64::MIN;
        while read(format!("{}.root.json", next(version)?)).exists() {
            version = next(version)?;
        }
        let root: Signed<Root> = parse(&read(format!("{version}.root.json")))?;
        let of = |name: &str| -> anyhow::Result<Signed<Targets>> {
            let meta = snapshot.signed.meta.get(&format!("{name}.json"));
            let version = meta
                .with_context(|| format!("the snapshot names no {name}"))?
                .version;
            parse(&read(format!("{version}.{name}.json")))
        };
        let targets = of("targets")?;
        let delegations = targets.signed.delegations.clone().unwrap_or_default();
        let mut channels = BTreeMap::new();
        for role in &delegations.roles {
            let channel = of(&role.name)?;
            delegations
                .verify_role(&channel, &role.name)
                .context("a channel's metadata was changed")?;
            channels.insert(role.name.clone(), channel);
        }
        root.signed.verify_role(&root).context("the root was changed")?;
        Ok(State {
            root,
            targets,
            channels,
            snapshot,
            timestamp,
        })
    }

    /// Puts a file where its target is looked for.
    fn place(&self, name: &str, target: &Target, file: &Path) -> anyhow::Result<()> {
        let path = self
            .dir
            .join("targets")
            .join(target_file(name, &target.hashes.sha256));
        if fs::metadata(&path).is_ok_and(|there| there.len() == target.length) {
            return Ok(());
        }
        let dir = path.parent().context("a target is in a directory")?;
        fs::create_dir_all(dir)?;
        let beside = path.with_added_extension("new");
        fs::copy(file, &beside).with_context(|| format!("cannot copy {}", file.display()))?;
        File::open(&beside)?.sync_all()?;
        publish_file(&beside, &path)
    }
}

/// Takes keys out that no role has any more.
fn forget_unused_keys(root: &mut Root, delegations: &mut Delegations) {
    let roles = &root.roles;
    root.keys
        .retain(|id, _| roles.values().any(|role| role.keyids.contains(id)));
    let roles = &delegations.roles;
    delegations
        .keys
        .retain(|id, _| roles.iter().any(|role| role.keyids.contains(id)));
}

fn next(version: NonZeroU64) -> anyhow::Result<NonZeroU64> {
    version.checked_add(1).context("there are no more versions")
}

/// In so many days, by whole seconds.
fn until(days: i64) -> Timestamp {
    let at = Timestamp::now() + SignedDuration::from_hours(days * 24);
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

fn unsigned<T>(signed: T) -> Signed<T> {
    Signed {
        signed,
        signatures: Vec::new(),
    }
}

/// Versions alone: what has a version never changes, and is signed itself.
fn metafile(version: NonZeroU64) -> Metafile {
    Metafile {
        length: None,
        hashes: None,
        version,
        _extra: HashMap::new(),
    }
}

fn parse<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let bytes = fs::read(path).with_context(|| format!("{} (is there a repository?)", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| path.display().to_string())
}

/// The images in a directory that `cargo xtask image` has made.
fn read_images(dir: &Path) -> anyhow::Result<BTreeMap<String, ImageManifest>> {
    let mut images = BTreeMap::new();
    for entry in fs::read_dir(dir).with_context(|| format!("no images in {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let name = path
                .file_stem()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            images.insert(name.to_owned(), parse(&path)?);
        }
    }
    anyhow::ensure!(!images.is_empty(), "no images in {}", dir.display());
    Ok(images)
}

/// A file's digest, and what its target says.
fn hash(path: &Path) -> anyhow::Result<(flynn_api::Digest, Target)> {
    use std::io::Read as _;
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    let (mut digester, mut sha256) = (Digester::default(), sha2::Sha256::default());
    let mut piece = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut piece)?;
        if read == 0 {
            break;
        }
        digester.update(&piece[..read]);
        sha256.update(&piece[..read]);
    }
    let target = Target {
        length: digester.length(),
        hashes: Hashes {
            sha256: sha256.finalize().to_vec().into(),
            _extra: HashMap::new(),
        },
        custom: HashMap::new(),
        _extra: HashMap::new(),
    };
    Ok((digester.finish(), target))
}

/// Writes a file, whole, that everybody may read.
fn write_shared(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let beside = path.with_added_extension("new");
    files::write_atomic(&beside, bytes).with_context(|| path.display().to_string())?;
    publish_file(&beside, path)
}

/// Gives a file that is on the disk its name, for everybody to read.
fn publish_file(beside: &Path, path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(beside, fs::Permissions::from_mode(0o644))?;
    fs::rename(beside, path)?;
    path.parent()
        .map_or(Ok(()), files::sync_dir)
        .with_context(|| path.display().to_string())
}
