//! `flynn env`.

use std::io::{IsTerminal as _, Read as _};

use clap::{Args, Subcommand};
use flynn_api::Env as Variables;
use flynn_api::controller::Release;

use super::{pair, release::deploy};
use crate::context::Context;
use crate::failure::{Failure, Result, local, usage};
use crate::output::{self, note};

/// The longest value.
const MAX_VALUE: u64 = 1 << 20;

#[derive(Args)]
pub(super) struct Env {
    /// Of this process type alone
    #[arg(short = 't', long, global = true)]
    process_type: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Set variables. A value of the form @FILE is read from a file, @- from standard input; @@ begins one with an @
    Set {
        #[arg(required = true, value_name = "NAME=VALUE")]
        variables: Vec<String>,
    },
    /// Remove variables
    Unset {
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Print a variable's value
    Get { name: String },
}

impl Env {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let target = context.target().await?;
        let current = target.release().await?;
        let kind = self.process_type.as_deref();
        let Some(command) = self.command else {
            let release = current.unwrap_or_default();
            let variables = of(&release, kind)?;
            if context.globals.json {
                return output::json(&variables);
            }
            return variables
                .iter()
                .try_for_each(|(name, value)| output::line(format!("{name}={value}")));
        };
        if let Command::Get { name } = &command {
            let release = current.unwrap_or_default();
            let value = of(&release, kind)?.get(name).cloned();
            let unknown = || Failure::from(flynn_api::Error::not_found("variable", name));
            return output::line(value.ok_or_else(unknown)?);
        }
        let mut release = current.unwrap_or_default();
        let variables = of_mut(&mut release, kind)?;
        let before = variables.clone();
        match command {
            Command::Set { variables: given } => {
                for text in &given {
                    let (name, value) = pair(text)?;
                    variables.insert(name.to_owned(), read(name, value)?);
                }
            }
            Command::Unset { names } => {
                for name in names.iter().filter(|name| variables.remove(*name).is_none()) {
                    note(format!("{name} was not set."));
                }
            }
            Command::Get { .. } => {}
        }
        if *variables == before {
            note("Nothing changes; no release was made.");
            return Ok(());
        }
        let release = deploy(&target, release).await?;
        if context.globals.json {
            return output::json(&release);
        }
        output::line(format!("Created release {}.", release.id))
    }
}

/// The environment of all, or of one process type.
fn of<'a>(release: &'a Release, kind: Option<&str>) -> Result<&'a Variables> {
    match kind {
        None => Ok(&release.env),
        Some(kind) => release
            .processes
            .get(kind)
            .map(|process| &process.env)
            .ok_or_else(|| unknown(kind)),
    }
}

fn of_mut<'a>(release: &'a mut Release, kind: Option<&str>) -> Result<&'a mut Variables> {
    match kind {
        None => Ok(&mut release.env),
        Some(kind) => release
            .processes
            .get_mut(kind)
            .map(|process| &mut process.env)
            .ok_or_else(|| unknown(kind)),
    }
}

fn unknown(kind: &str) -> Failure {
    flynn_api::Error::not_found(
        "process type",
        format!("{kind} in the current release; see flynn scale"),
    )
    .into()
}

/// A value as it is given: itself, a file's content, or what comes on standard input.
fn read(name: &str, value: &str) -> Result<String> {
    let Some(source) = value.strip_prefix('@') else {
        return Ok(value.to_owned());
    };
    if source.starts_with('@') {
        return Ok(source.to_owned());
    }
    let mut text = String::new();
    let read = if source == "-" {
        if std::io::stdin().is_terminal() {
            note(format!(
                "Enter the value of {name}, and Ctrl-D on a line of its own to end it."
            ));
        }
        std::io::stdin()
            .lock()
            .take(MAX_VALUE + 1)
            .read_to_string(&mut text)
    } else {
        std::fs::File::open(source).and_then(|file| file.take(MAX_VALUE + 1).read_to_string(&mut text))
    };
    read.map_err(|why| local(format!("the value of {name} cannot be read from {source}"), &why))?;
    if text.len() as u64 > MAX_VALUE {
        return Err(usage(format!(
            "the value of {name} is longer than {} MiB",
            MAX_VALUE >> 20
        )));
    }
    // Editors and `echo` end a text with a line end that nobody means.
    Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_from_where_they_are() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "line\nline\n").unwrap();
        let from_file = format!("@{}", file.path().display());
        assert_eq!(read("A", &from_file).unwrap(), "line\nline");
        assert_eq!(read("A", "plain@x").unwrap(), "plain@x");
        assert_eq!(read("A", "@@home").unwrap(), "@home");
        assert!(read("A", "@/nonexistent/file").is_err());
    }
}
