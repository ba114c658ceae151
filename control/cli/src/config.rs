//! `~/.flynnrc`: the clusters that this user knows. TOML, with a key for each cluster, so only its owner may read it.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use flynn_api::Error;
use serde::{Deserialize, Serialize};

use crate::failure::{Result, local, usage};

/// What the file holds. Keys that are not known here are kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Config {
    /// The cluster that is meant when none is named.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) default: String,
    /// All clusters.
    #[serde(rename = "cluster", default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) clusters: Vec<Cluster>,
    #[serde(flatten)]
    rest: toml::Table,
}

/// A cluster.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Cluster {
    /// What it is called here.
    pub(crate) name: String,
    /// Its key. Secret.
    pub(crate) key: String,
    /// Base64 of the SHA-256 digest of its certificate.
    #[serde(rename = "TLSPin", default, skip_serializing_if = "String::is_empty")]
    pub(crate) tls_pin: String,
    /// Its controller.
    #[serde(rename = "ControllerURL")]
    pub(crate) controller_url: String,
    /// Where code is pushed to.
    #[serde(rename = "GitURL", default, skip_serializing_if = "String::is_empty")]
    pub(crate) git_url: String,
    /// Where images are pushed to.
    #[serde(rename = "ImageURL", default, skip_serializing_if = "String::is_empty")]
    pub(crate) image_url: String,
    #[serde(flatten)]
    rest: toml::Table,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Cluster {
    /// The cluster at a domain, which may carry a port.
    pub(crate) fn at(name: &str, domain: &str, key: &str, tls_pin: &str) -> Self {
        let at = |service: &str| format!("https://{service}.{domain}");
        Self {
            name: name.into(),
            key: key.into(),
            tls_pin: tls_pin.into(),
            controller_url: at("controller"),
            git_url: at("git"),
            image_url: at("images"),
            rest: toml::Table::new(),
        }
    }

    /// The URL of image receiving: as configured, else beside the controller.
    pub(crate) fn images(&self) -> String {
        if self.image_url.is_empty() {
            self.controller_url.replacen("//controller.", "//images.", 1)
        } else {
            self.image_url.clone()
        }
    }
}

/// Where the file is: `$FLYNNRC`, else `~/.flynnrc`.
pub(crate) fn path() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("FLYNNRC").filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    match std::env::var_os("HOME").filter(|home| !home.is_empty()) {
        Some(home) => Ok(PathBuf::from(home).join(".flynnrc")),
        None => Err(usage(
            "there is no home directory to read .flynnrc from; set HOME or FLYNNRC",
        )),
    }
}

impl Config {
    /// Reads the file; nothing when it is not there.
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let shown = path.display();
        match fs::read_to_string(path) {
            Ok(text) => Self::parse(&text).map_err(|why| {
                usage(format!(
                    "{shown} cannot be read: {why}. Mend it, or set FLYNNRC to another file"
                ))
            }),
            Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(why) => Err(local(format!("{shown} cannot be read"), &why)),
        }
    }

    /// Reads its content. The message of an error carries no line of the file: a line may hold a key.
    fn parse(text: &str) -> std::result::Result<Self, String> {
        toml::from_str(text).map_err(|why: toml::de::Error| {
            let line = why.span().map_or(0, |span| {
                text[..span.start.min(text.len())].matches('\n').count() + 1
            });
            format!("line {line}: {}", why.message())
        })
    }

    /// Writes the file in one step, readable by its owner alone.
    pub(crate) fn save(&self, path: &Path) -> Result<()> {
        let text = toml::to_string(self)
            .map_err(|why| Error::internal(format!("the clusters cannot be written: {why}")))?;
        let write = || {
            // A link is written through, so that it stays one.
            let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
            let directory = path
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty())
                .unwrap_or(Path::new("."));
            let mut file = tempfile::NamedTempFile::new_in(directory)?;
            file.as_file()
                .set_permissions(fs::Permissions::from_mode(0o600))?;
            file.write_all(text.as_bytes())?;
            file.as_file().sync_all()?;
            file.persist(&path).map_err(|why| why.error)?;
            io::Result::Ok(())
        };
        write().map_err(|why| local(format!("{} cannot be written", path.display()), &why))
    }

    /// The cluster of this name, or the default one.
    pub(crate) fn find(&self, name: Option<&str>) -> Result<&Cluster> {
        if self.clusters.is_empty() {
            return Err(usage(
                "no cluster is known yet; add one: flynn cluster add <name> <domain> <key>",
            ));
        }
        let name = match name {
            Some(name) => name,
            None if !self.default.is_empty() => &self.default,
            None => match self.clusters.as_slice() {
                [only] => return Ok(only),
                _ => {
                    return Err(usage(
                        "there are several clusters and no default; name one with -c, or choose one: flynn cluster default <name>",
                    ));
                }
            },
        };
        self.clusters
            .iter()
            .find(|cluster| cluster.name == name)
            .ok_or_else(|| {
                let known: Vec<_> = self
                    .clusters
                    .iter()
                    .map(|cluster| cluster.name.as_str())
                    .collect();
                let mut error = Error::not_found("cluster", name);
                error.message = format!("{}; known are: {}", error.message, known.join(", "));
                error.into()
            })
    }

    /// Adds a cluster; one of the same name or the same controller must be forced out of the way.
    pub(crate) fn add(&mut self, cluster: Cluster, force: bool, default: bool) -> Result<()> {
        let same =
            |other: &Cluster| other.name == cluster.name || other.controller_url == cluster.controller_url;
        if let Some(other) = self.clusters.iter().find(|other| same(other)).filter(|_| !force) {
            let message = format!(
                "the cluster {} is there already; add -f to replace it",
                other.name
            );
            return Err(Error::new(flynn_api::ErrorCode::ObjectExists, message).into());
        }
        self.clusters.retain(|other| !same(other));
        let dangling = !self.clusters.iter().any(|other| other.name == self.default);
        if default || dangling {
            self.default.clone_from(&cluster.name);
        }
        self.clusters.push(cluster);
        Ok(())
    }

    /// Removes a cluster; another becomes the default if it was that.
    pub(crate) fn remove(&mut self, name: &str) -> Result<()> {
        self.find(Some(name))?;
        self.clusters.retain(|cluster| cluster.name != name);
        if self.default == name {
            self.default = self
                .clusters
                .first()
                .map(|cluster| cluster.name.clone())
                .unwrap_or_default();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OLD: &str = r#"
default = "prod"

[[cluster]]
  Name = "prod"
  Key = "secret"
  OAuthURL = ""
  TLSPin = "pin="
  ControllerURL = "https://controller.example.com"
  GitURL = "https://git.example.com"
  ImageURL = "https://images.example.com"
  DockerPushURL = "https://docker.example.com"
"#;

    #[test]
    fn flynns_own_files_are_read_and_nothing_of_them_is_lost() {
        let config = Config::parse(OLD).unwrap();
        let cluster = config.find(None).unwrap();
        assert_eq!(
            (cluster.key.as_str(), cluster.tls_pin.as_str()),
            ("secret", "pin=")
        );
        let written = toml::to_string(&config).unwrap();
        assert!(
            written.contains("DockerPushURL") && written.contains("OAuthURL"),
            "{written}"
        );
        assert_eq!(Config::parse(&written).unwrap(), config);
        assert!(!format!("{config:?}").contains("secret"));
    }

    #[test]
    fn files_are_private_and_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rc");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let mut config = Config::default();
        config
            .add(Cluster::at("a", "flynn.localhost:8443", "k", ""), false, false)
            .unwrap();
        config.save(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Config::load(&path).unwrap(), config);
        assert_eq!(
            config.clusters[0].controller_url,
            "https://controller.flynn.localhost:8443"
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn names_are_not_taken_twice() {
        let mut config = Config::default();
        let at = |name: &str, domain: &str| Cluster::at(name, domain, "k", "");
        config.add(at("a", "a.com"), false, false).unwrap();
        config.add(at("b", "b.com"), false, false).unwrap();
        assert_eq!(config.default, "a");
        assert!(config.add(at("a", "c.com"), false, false).is_err());
        assert!(config.add(at("c", "a.com"), false, false).is_err());
        config.add(at("c", "a.com"), true, false).unwrap();
        assert_eq!(config.default, "c", "the default does not point to nothing");
        config.remove("c").unwrap();
        assert_eq!(config.find(None).unwrap().name, "b");
        assert!(config.remove("c").is_err());
    }

    #[test]
    fn errors_show_no_key() {
        let why = Config::parse("[[cluster]]\nName = 'a'\nKey = 'topsecret' x\n").unwrap_err();
        assert!(why.contains("line 3") && !why.contains("topsecret"), "{why}");
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(default|\\[\\[cluster\\]\\]|Name|=|\"|'|\n| |\\PC){0,30}") {
            let _ = Config::parse(&text);
        }
    }
}
