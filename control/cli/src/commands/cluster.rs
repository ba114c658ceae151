//! `flynn cluster`.

use std::io::Read as _;

use clap::{Args, Subcommand};
use serde_json::json;

use crate::config::Cluster as Known;
use crate::context::Context;
use crate::failure::{Result, local, usage};
use crate::output::{self, note};
use crate::pin;

#[derive(Args)]
pub(super) struct Cluster {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// List the clusters
    List,
    /// Add a cluster
    Add(Add),
    /// Remove a cluster from this machine; the cluster itself goes on
    Remove {
        /// Its name here
        name: String,
    },
    /// Show or choose the cluster that is meant when none is named
    Default {
        /// Its name here
        name: Option<String>,
    },
}

#[derive(Args)]
struct Add {
    /// Replace one of the same name or domain
    #[arg(short, long)]
    force: bool,
    /// Make it the default
    #[arg(short, long)]
    default: bool,
    /// Its certificate's pin: base64 of the SHA-256 digest. Without it, the system's roots are trusted
    #[arg(short = 'p', long)]
    tls_pin: Option<String>,
    /// Where code is pushed to, when not https://git.<domain>
    #[arg(long)]
    git_url: Option<String>,
    /// Where images are pushed to, when not https://images.<domain>
    #[arg(long)]
    image_url: Option<String>,
    /// What to call it here
    name: String,
    /// Its domain; a port may follow: example.com:8443
    domain: String,
    /// Its key, or - to read it from standard input
    key: String,
}

impl Cluster {
    pub(super) fn run(self, context: &mut Context) -> Result<()> {
        match self.command.unwrap_or(Command::List) {
            Command::List => list(context),
            Command::Add(add) => add.run(context),
            Command::Remove { name } => {
                context.config.remove(&name)?;
                context.config.save(&context.config_path)?;
                note(format!("Cluster {name} is removed."));
                Ok(())
            }
            Command::Default { name: None } => output::line(&context.config.find(None)?.name),
            Command::Default { name: Some(name) } => {
                context.config.find(Some(&name))?;
                context.config.default.clone_from(&name);
                context.config.save(&context.config_path)?;
                note(format!("{name} is now the default cluster."));
                Ok(())
            }
        }
    }
}

fn list(context: &Context) -> Result<()> {
    let config = &context.config;
    if context.globals.json {
        let clusters: Vec<_> = config
            .clusters
            .iter()
            .map(|cluster| {
                json!({"name": cluster.name, "controller_url": cluster.controller_url, "git_url": cluster.git_url,
                    "image_url": cluster.image_url, "default": cluster.name == config.default})
            })
            .collect();
        return output::json(&clusters);
    }
    let rows = config.clusters.iter().map(|cluster| {
        let default = if cluster.name == config.default {
            "(default)"
        } else {
            ""
        };
        [
            cluster.name.clone(),
            cluster.controller_url.clone(),
            cluster.git_url.clone(),
            default.into(),
        ]
    });
    output::table(["NAME", "CONTROLLER URL", "GIT URL", ""], rows)
}

impl Add {
    fn run(self, context: &mut Context) -> Result<()> {
        let domain = self.domain.trim_start_matches("https://").trim_end_matches('/');
        if !is_domain(domain) {
            return Err(usage(format!(
                "{:?} is not a domain, like example.com or example.com:8443",
                self.domain
            )));
        }
        let key = if self.key == "-" { read_key()? } else { self.key };
        if key.is_empty() {
            return Err(usage("the key is empty; `flynn-host bootstrap` has printed it"));
        }
        let tls_pin = self.tls_pin.unwrap_or_default();
        if !tls_pin.is_empty() {
            pin::parse(&tls_pin)?;
        }
        let mut cluster = Known::at(&self.name, domain, &key, &tls_pin);
        if let Some(url) = self.git_url {
            cluster.git_url = url;
        }
        if let Some(url) = self.image_url {
            cluster.image_url = url;
        }
        context.config.add(cluster, self.force, self.default)?;
        context.config.save(&context.config_path)?;
        let default = if context.config.default == self.name {
            " and is the default"
        } else {
            ""
        };
        note(format!("Cluster {} is added{default}.", self.name));
        Ok(())
    }
}

/// Whether `text` is a host name, perhaps with a port.
fn is_domain(text: &str) -> bool {
    let (name, port) = text
        .split_once(':')
        .map_or((text, None), |(name, port)| (name, Some(port)));
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    name.split('.').all(label) && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}

fn read_key() -> Result<String> {
    let mut key = String::new();
    let read = std::io::stdin().lock().take(4096).read_to_string(&mut key);
    read.map_err(|why| local("the key cannot be read from standard input", &why))?;
    Ok(key.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::is_domain;

    #[test]
    fn domains_may_carry_a_port() {
        for good in ["example.com", "flynn.localhost:8443", "localhost", "10.0.0.1:1"] {
            assert!(is_domain(good), "{good}");
        }
        for bad in [
            "", "a..b", "a b", "http://a", "a/b", "a:", "a:0", "a:x", "a:70000", "a@b",
        ] {
            assert!(!is_domain(bad), "{bad}");
        }
    }
}
