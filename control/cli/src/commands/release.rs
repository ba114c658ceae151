//! `flynn release`, and how a changed release becomes the current one.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use flynn_api::controller::{Deployment, Release as Known};
use flynn_api::redact;
use serde_json::Value;

use crate::context::{Context, Target};
use crate::failure::{Result, local, usage};
use crate::output::{self, ago, note};
use crate::prompt::confirm;
use crate::wait::{self, short};

#[derive(Args)]
pub(super) struct Release {
    /// Ids alone
    #[arg(short, long)]
    quiet: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// List the releases, the newest first
    List,
    /// Show a release, the current one when none is named. Secrets are shown with --json alone
    Show { id: Option<String> },
    /// Make a release of a JSON file and deploy it
    Add {
        /// The file
        file: PathBuf,
    },
    /// Change a release by a JSON file, and deploy the result
    Update {
        /// Replace what the file names, instead of merging it in
        #[arg(long)]
        clean: bool,
        /// The file
        file: PathBuf,
        /// The release to change; the current one when none is named
        id: Option<String>,
    },
    /// Delete a release that is not in use
    Delete {
        /// Ask nothing
        #[arg(short, long)]
        yes: bool,
        /// Which
        id: String,
    },
    /// Go back to a release; the one before the current one when none is named
    Rollback {
        /// Ask nothing
        #[arg(short, long)]
        yes: bool,
        /// Which
        id: Option<String>,
    },
}

/// Makes a release of a changed one and deploys it. Where no release is current yet, it becomes that.
pub(super) async fn deploy(target: &Target, release: Known) -> Result<Known> {
    let release = create(target, release).await?;
    wait::deploy(&target.controller, &target.app, &release).await?;
    Ok(release)
}

/// Makes a release of a changed one.
pub(super) async fn create(target: &Target, mut release: Known) -> Result<Known> {
    release.id = String::new();
    release.created_at = None;
    release.app_id = Some(target.app.id.clone());
    Ok(target.controller.create_release(&release).await?)
}

impl Release {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let target = context.target().await?;
        match self.command.unwrap_or(Command::List) {
            Command::List => list(context, &target, self.quiet).await,
            Command::Show { id } => show(context, &target.release_or_current(id.as_deref()).await?),
            Command::Add { file } => {
                let release = serde_json::from_value(read(&file)?)
                    .map_err(|why| usage(format!("{} is no release: {why}", file.display())))?;
                made(context, &deploy(&target, release).await?)
            }
            Command::Update { clean, file, id } => {
                let release = target.release_or_current(id.as_deref()).await?;
                let release = update(&release, read(&file)?, clean)?;
                made(context, &deploy(&target, release).await?)
            }
            Command::Delete { yes, id } => {
                confirm(&format!("Delete the release {id}?"), yes)?;
                target.controller.delete_release(&target.app.id, &id).await?;
                note(format!("Deleted release {id}."));
                Ok(())
            }
            Command::Rollback { yes, id } => rollback(&target, id, yes).await,
        }
    }
}

async fn list(context: &Context, target: &Target, quiet: bool) -> Result<()> {
    let releases = target.controller.releases(&target.app.id).await?;
    if quiet {
        return releases.iter().try_for_each(|release| output::line(&release.id));
    }
    if context.globals.json {
        return output::json(&releases);
    }
    let rows = releases.into_iter().map(|release| {
        let current = if target.app.release_id.as_ref() == Some(&release.id) {
            "current"
        } else {
            ""
        };
        let types: Vec<_> = release.processes.keys().map(String::as_str).collect();
        let types = types.join(",");
        [release.id, ago(release.created_at), types, current.into()]
    });
    output::table(["ID", "CREATED", "TYPES", ""], rows)
}

fn show(context: &Context, release: &Known) -> Result<()> {
    if context.globals.json {
        return output::json(release);
    }
    output::line(format!("ID:             {}", release.id))?;
    for artifact in &release.artifact_ids {
        output::line(format!("Artifact:       {artifact}"))?;
    }
    for kind in release.processes.keys() {
        output::line(format!("Process type:   {kind}"))?;
    }
    let created = release
        .created_at
        .map_or_else(|| "-".to_owned(), |time| time.to_string());
    output::line(format!("Created:        {created}"))?;
    for (name, value) in redact::env(&release.env) {
        output::line(format!("ENV[{name}]: {value}"))?;
    }
    for (name, value) in &release.meta {
        output::line(format!("META[{name}]: {value}"))?;
    }
    Ok(())
}

fn made(context: &Context, release: &Known) -> Result<()> {
    if context.globals.json {
        output::json(release)
    } else {
        output::line(format!("Created release {}.", release.id))
    }
}

fn read(file: &std::path::Path) -> Result<Value> {
    let text =
        std::fs::read(file).map_err(|why| local(format!("{} cannot be read", file.display()), &why))?;
    serde_json::from_slice(&text).map_err(|why| usage(format!("{} is not JSON: {why}", file.display())))
}

/// A release with what a file says: merged in, or (`clean`) each field that it names replaced.
fn update(release: &Known, change: Value, clean: bool) -> Result<Known> {
    let Value::Object(change) = change else {
        return Err(usage("a release is a JSON object"));
    };
    let mut merged = serde_json::to_value(release).map_err(|why| usage(why.to_string()))?;
    for (name, value) in change {
        if clean {
            merged[name.as_str()] = value;
        } else {
            merge(&mut merged[name.as_str()], value);
        }
    }
    serde_json::from_value(merged).map_err(|why| usage(format!("the result is no release: {why}")))
}

/// Merges as RFC 7396 has it: objects field by field, `null` removes.
fn merge(into: &mut Value, change: Value) {
    let Value::Object(change) = change else {
        *into = change;
        return;
    };
    if !into.is_object() {
        *into = Value::Object(serde_json::Map::new());
    }
    for (name, value) in change {
        if value.is_null() {
            if let Some(fields) = into.as_object_mut() {
                fields.remove(&name);
            }
        } else {
            merge(&mut into[name.as_str()], value);
        }
    }
}

async fn rollback(target: &Target, id: Option<String>, yes: bool) -> Result<()> {
    let current = target.app.release_id.clone().ok_or_else(|| target.no_release())?;
    let releases = target.controller.releases(&target.app.id).await?;
    let release = if let Some(id) = id {
        target.release_or_current(Some(&id)).await?
    } else {
        let deployments = target.controller.deployments(&target.app.id).await?;
        before(&current, releases, &deployments).ok_or_else(|| {
            usage("there is no release before the current one; name one: flynn release rollback <id>")
        })?
    };
    if release.id == current {
        return Err(usage(format!("{} is the current release already", release.id)));
    }
    confirm(
        &format!(
            "Roll {} back from release {} to {}?",
            target.app.name,
            short(&current),
            short(&release.id)
        ),
        yes,
    )?;
    wait::deploy(&target.controller, &target.app, &release).await?;
    note(format!("Rolled back to release {}.", release.id));
    Ok(())
}

/// The release that the current one came after: what ran when it was first deployed, or else the next older one. So
/// one rollback after the other goes further back, and what was rolled back from is not returned to.
fn before(current: &str, mut releases: Vec<Known>, deployments: &[Deployment]) -> Option<Known> {
    let first = deployments
        .iter()
        .rev()
        .find(|deployment| deployment.new_release_id == current && deployment.status == "complete");
    let ran = first.and_then(|first| first.old_release_id.as_deref());
    let at = ran
        .filter(|ran| *ran != current)
        .and_then(|ran| releases.iter().position(|release| release.id == ran))
        .or_else(|| {
            releases
                .iter()
                .position(|release| release.id == current)
                .map(|at| at + 1)
        })?;
    (at < releases.len()).then(|| releases.swap_remove(at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flynn_api::controller::ProcessType;
    use serde_json::json;

    #[test]
    fn files_are_merged_or_replace() {
        let mut release = Known {
            id: "r".into(),
            ..Known::default()
        };
        release.env.insert("A".into(), "1".into());
        release.env.insert("B".into(), "2".into());
        release.processes.insert(
            "web".into(),
            ProcessType {
                args: vec!["/web".into()],
                ..ProcessType::default()
            },
        );
        let change = json!({"env": {"A": null, "C": "3"}, "processes": {"web": {"omni": true}}});
        let merged = update(&release, change.clone(), false).unwrap();
        assert_eq!(
            merged.env,
            flynn_api::Env::from([("B".into(), "2".into()), ("C".into(), "3".into())])
        );
        assert!(merged.processes["web"].omni && merged.processes["web"].args == ["/web"]);
        let clean = update(&release, json!({"env": {"C": "3"}}), true).unwrap();
        assert_eq!(clean.env, flynn_api::Env::from([("C".into(), "3".into())]));
        assert!(
            update(&release, json!([]), false).is_err()
                && update(&release, json!({"env": 1}), false).is_err()
        );
    }

    #[test]
    fn rollbacks_go_further_back_and_never_to_what_was_left() {
        let releases = || {
            let release = |id: &str| Known {
                id: id.into(),
                ..Known::default()
            };
            ["4", "3", "2", "1"].map(release).to_vec()
        };
        let deployed = |(old, new): &(&str, &str)| Deployment {
            old_release_id: Some((*old).into()),
            new_release_id: (*new).into(),
            status: "complete".into(),
            ..Deployment::default()
        };
        // The newest first: 3 was no good, and 4 was made of 2.
        let deployments: Vec<_> = [("2", "4"), ("3", "2"), ("2", "3"), ("1", "2")]
            .iter()
            .map(deployed)
            .collect();
        let goes_to = |current: &str| {
            before(current, releases(), &deployments).map_or(String::new(), |release| release.id)
        };
        assert_eq!(
            ["4", "3", "2", "1"].map(goes_to),
            ["2", "2", "1", ""].map(String::from)
        );
        assert_eq!(
            before("3", releases(), &[]).unwrap().id,
            "2",
            "the next older one"
        );
    }
}
