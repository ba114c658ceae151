//! `flynn limit`.

use clap::{Args, Subcommand};
use flynn_api::host::{Resource, Resources};

use super::{pair, release::deploy};
use crate::context::Context;
use crate::failure::{Result, usage};
use crate::output;

#[derive(Args)]
pub(super) struct Limit {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// List the limits of all process types
    List,
    /// Set limits of a process type: memory=512MB cpu=1000 temp_disk=1GB max_fd=10000 max_pids=4096, and in bytes a
    /// second network_out=10MB network_in=10MB (0 for no limit)
    Set {
        /// The process type
        process_type: String,
        #[arg(required = true, value_name = "NAME=VALUE")]
        limits: Vec<String>,
    },
}

impl Limit {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let target = context.target().await?;
        let mut release = target.release_or_current(None).await?;
        match self.command.unwrap_or(Command::List) {
            Command::List => {
                if context.globals.json {
                    let all: std::collections::BTreeMap<_, _> = release
                        .processes
                        .iter()
                        .map(|(kind, process)| (kind, &process.resources))
                        .collect();
                    return output::json(&all);
                }
                for (kind, process) in &release.processes {
                    let limits: Vec<_> = Resources::NAMES
                        .iter()
                        .map(|name| format!("{name}={}", show(name, process.resources.limit(name))))
                        .collect();
                    output::line(format!("{kind}: {}", limits.join(" ")))?;
                }
                Ok(())
            }
            Command::Set { process_type, limits } => {
                let new = parse(limits.iter().map(String::as_str))?;
                let process = release.processes.get_mut(&process_type).ok_or_else(|| {
                    usage(format!(
                        "the release has no process type {process_type}; see flynn scale"
                    ))
                })?;
                process.resources.0.extend(new.0);
                let release = deploy(&target, release).await?;
                output::line(format!("Created release {}.", release.id))
            }
        }
    }
}

/// Reads limits: `memory=512MB`.
pub(super) fn parse<'a>(limits: impl Iterator<Item = &'a str>) -> Result<Resources> {
    let mut resources = Resources::default();
    for text in limits {
        let (name, value) = pair(text)?;
        if !Resources::NAMES.contains(&name) {
            return Err(usage(format!(
                "there is no limit {name}; there are: {}",
                Resources::NAMES.join(", ")
            )));
        }
        let limit = amount(value).ok_or_else(|| {
            usage(format!(
                "{value:?} is not an amount, like 512MB or 1000, in {text:?}"
            ))
        })?;
        resources.0.insert(
            name.to_owned(),
            Resource {
                limit: Some(limit),
                ..Resource::default()
            },
        );
    }
    Ok(resources)
}

/// A number with an optional unit; units are binary, as Flynn has them.
fn amount(text: &str) -> Option<u64> {
    if text == "unlimited" {
        return Some(0);
    }
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn show(name: &str, value: u64) -> String {
    match value {
        0 if name.starts_with("network_") => "unlimited".into(),
        _ if ["cpu", "max_pids", "max_fd"].contains(&name) => value.to_string(),
        value if value > 0 && value % (1 << 30) == 0 => format!("{}GB", value >> 30),
        value if value > 0 && value % (1 << 20) == 0 => format!("{}MB", value >> 20),
        value => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_units() {
        for (text, bytes) in [
            ("512MB", 512 << 20),
            ("1g", 1 << 30),
            ("1000", 1000),
            ("3KiB", 3072),
            ("0", 0),
        ] {
            assert_eq!(amount(text), Some(bytes), "{text}");
        }
        for text in ["", "MB", "1.5GB", "-1", "1XB", "99999999999999999TB"] {
            assert_eq!(amount(text), None, "{text}");
        }
        assert_eq!(
            (show("memory", 1 << 30), show("cpu", 1 << 30)),
            ("1GB".into(), "1073741824".into())
        );
        assert!(parse(["disk=1"].into_iter()).is_err());
    }
}
