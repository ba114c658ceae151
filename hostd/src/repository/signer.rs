//! The keys of a repository: Ed25519, in files that only their owner can read.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use async_trait::async_trait;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::Ed25519KeyPair;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tough::key_source::KeySource;
use tough::schema::decoded::{Decoded, Hex};
use tough::schema::key::Key;
use tough::sign::{Sign, parse_keypair};

use crate::files;

const BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
const END: &str = "-----END PRIVATE KEY-----";

/// A key in a file. Its secret is in memory only while something is signed.
#[derive(Clone)]
pub(super) struct KeyFile {
    path: PathBuf,
    pub(super) key: Key,
    pub(super) id: Decoded<Hex>,
}

impl std::fmt::Debug for KeyFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyFile")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl KeyFile {
    /// Makes a key, in a file of this role's name and the key's id.
    pub(super) fn generate(dir: &Path, role: &str) -> anyhow::Result<Self> {
        files::private_dir(dir)?;
        let made = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new());
        let made = made.ok().context("this machine gives no random numbers")?;
        let key = parse(made.as_ref())?.tuf_key();
        let id = key.key_id()?;
        let short = super::hex(&id[..4]);
        let path = dir.join(format!("{role}-{short}.key"));
        let text = format!("{BEGIN}\n{}\n{END}\n", STANDARD.encode(made.as_ref()));
        files::write_atomic(&path, text.as_bytes()).with_context(|| path.display().to_string())?;
        Ok(Self { path, key, id })
    }

    fn read(path: &Path) -> anyhow::Result<Self> {
        let key = secret(path)?.tuf_key();
        let id = key.key_id()?;
        Ok(Self {
            path: path.to_owned(),
            key,
            id,
        })
    }

    /// All `*.key` in these directories.
    pub(super) fn read_all(dirs: &[PathBuf]) -> anyhow::Result<Vec<Self>> {
        let mut keys = Vec::new();
        for dir in dirs {
            let entries = fs::read_dir(dir).with_context(|| format!("no keys in {}", dir.display()))?;
            for entry in entries {
                let path = entry?.path();
                if path.extension().is_some_and(|extension| extension == "key") {
                    keys.push(Self::read(&path)?);
                }
            }
        }
        Ok(keys)
    }
}

/// The secret in a file that nobody else can read.
fn secret(path: &Path) -> anyhow::Result<Box<dyn Sign>> {
    let shown = path.display();
    let mode = fs::metadata(path)
        .with_context(|| shown.to_string())?
        .permissions()
        .mode();
    if mode & 0o077 != 0 {
        bail!(
            "others can read the key {shown}: whoever did may sign in your name. chmod 600 it, or better rotate it"
        );
    }
    // The text stays out of all messages.
    let text = fs::read_to_string(path).with_context(|| shown.to_string())?;
    let body = text
        .trim()
        .strip_prefix(BEGIN)
        .and_then(|rest| rest.strip_suffix(END));
    let lines: Option<String> = body.map(|body| body.split_whitespace().collect());
    let bytes = lines.and_then(|lines| STANDARD.decode(lines).ok());
    parse(&bytes.with_context(|| format!("{shown} is no private key in PEM"))?).with_context(|| {
        format!("{shown} is no key of a kind that can be used here: Ed25519 in PKCS #8 is wanted")
    })
}

fn parse(der: &[u8]) -> anyhow::Result<Box<dyn Sign>> {
    Ok(Box::new(parse_keypair(der)?))
}

#[async_trait]
impl KeySource for KeyFile {
    async fn as_sign(&self) -> Result<Box<dyn Sign>, Box<dyn std::error::Error + Send + Sync + 'static>> {
        Ok(secret(&self.path)?)
    }

    async fn write(
        &self,
        _: &str,
        _: &str,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        Err("keys are written when they are made".into())
    }
}
