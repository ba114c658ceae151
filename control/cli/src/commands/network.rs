//! `flynn network`: whom an app's jobs may speak to.

use std::collections::{BTreeMap, BTreeSet};

use clap::{Args, Subcommand};
use flynn_api::ErrorCode;
use flynn_api::controller::App;
use flynn_api::network::AppPolicy;
use serde::Serialize;

use crate::context::{Context, Target};
use crate::failure::{Result, advise, usage};
use crate::output::{self, note};

#[derive(Args)]
pub(super) struct Network {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Show whom the app's jobs speak to
    Show,
    /// Cut the app off from all others but the router and the apps that are named
    Isolate {
        /// An app that it goes on to speak to, both ways; may be given again
        #[arg(long, value_name = "APP")]
        allow: Vec<String>,
    },
    /// Let all apps speak to the app again
    Open,
    /// Put an app on the isolated app's list; both may then open connections to each other
    Allow {
        /// Its name or id
        #[arg(value_name = "APP")]
        other: String,
    },
    /// Take an app off the isolated app's list
    Deny {
        /// Its name or id
        #[arg(value_name = "APP")]
        other: String,
    },
}

/// `show --json`.
#[derive(Serialize)]
struct Shown {
    app: String,
    isolated: bool,
    /// By name, or by id where the app is gone.
    allow: BTreeSet<String>,
}

impl Network {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let target = context.target().await?;
        let mut policy = AppPolicy::of(&target.app.meta);
        match self.command.unwrap_or(Command::Show) {
            Command::Show => return show(context, &target, &policy).await,
            Command::Isolate { allow } => {
                policy.isolated = true;
                for other in allow {
                    policy.allow.insert(find(&target, &other).await?.id);
                }
            }
            Command::Open => policy = AppPolicy::default(),
            Command::Allow { other } => {
                if !policy.isolated {
                    return Err(usage(format!(
                        "{} is open to all apps, so there is nobody to allow; cut it off first: flynn -a {0} network \
                         isolate --allow {other}",
                        target.app.name
                    )));
                }
                policy.allow.insert(find(&target, &other).await?.id);
            }
            Command::Deny { other } => {
                // Its app may be gone: then the list knows it by id.
                let id = match find(&target, &other).await {
                    Ok(app) => app.id,
                    Err(_) if policy.allow.contains(&other) => other.clone(),
                    Err(error) => return Err(error),
                };
                if !policy.allow.remove(&id) {
                    note(format!("{other} was not on the list."));
                }
            }
        }
        let mut labels = target.app.meta.clone();
        policy.write(&mut labels);
        if labels != target.app.meta {
            let changed = App {
                meta: labels,
                ..App::default()
            };
            target.controller.relabel_app(&target.app.id, &changed).await?;
        }
        show(context, &target, &policy).await
    }
}

async fn find(target: &Target, app: &str) -> Result<App> {
    Ok(target
        .controller
        .app(app)
        .await
        .map_err(advise(ErrorCode::NotFound, "See them all: flynn apps"))?)
}

async fn show(context: &Context, target: &Target, policy: &AppPolicy) -> Result<()> {
    let names: BTreeMap<String, String> = if policy.allow.is_empty() {
        BTreeMap::new()
    } else {
        let apps = target.controller.apps().await?;
        apps.into_iter().map(|app| (app.id, app.name)).collect()
    };
    let shown = Shown {
        app: target.app.name.clone(),
        isolated: policy.isolated,
        allow: policy
            .allow
            .iter()
            .map(|id| names.get(id).unwrap_or(id).clone())
            .collect(),
    };
    if context.globals.json {
        return output::json(&shown);
    }
    let allow: Vec<&str> = shown.allow.iter().map(String::as_str).collect();
    output::line(match (shown.isolated, allow.is_empty()) {
        (false, _) => format!(
            "{} is open: every app's jobs reach it, and it reaches theirs.",
            shown.app
        ),
        (true, true) => format!("{} is isolated: only the router reaches it.", shown.app),
        (true, false) => format!(
            "{} is isolated: only the router and {} reach it, and it reaches them.",
            shown.app,
            allow.join(", ")
        ),
    })
}
