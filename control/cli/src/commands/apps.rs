//! `flynn create`, `apps`, `info`, `delete`.

use clap::Args;
use flynn_api::controller::App;
use flynn_api::route::{Route, RouteKind};
use serde_json::json;

use super::names;
use crate::context::Context;
use crate::failure::Result;
use crate::git;
use crate::output::{self, ago, note};
use crate::prompt::confirm;
use crate::wait::short;

#[derive(Args)]
pub(super) struct Create {
    /// The git remote to make, in a git repository; "" for none
    #[arg(short, long, default_value = git::REMOTE)]
    remote: String,
    /// Overwrite a git remote of that name without a question
    #[arg(short, long)]
    yes: bool,
    /// At most 100 lower-case letters, digits and dashes; made up when it is not given
    name: Option<String>,
}

#[derive(Args)]
pub(super) struct Delete {
    /// Ask nothing
    #[arg(short, long)]
    yes: bool,
    /// The git remote to remove with it; "" for none
    #[arg(short, long, default_value = git::REMOTE)]
    remote: String,
}

impl Create {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let cluster = context.cluster()?;
        let remote = Some(self.remote.as_str())
            .filter(|name| !name.is_empty() && !cluster.git_url.is_empty() && git::in_repository());
        if let Some(remote) = remote.filter(|remote| git::has_remote(remote)) {
            confirm(
                &format!("The git remote {remote} is there already. Point it to the new app?"),
                self.yes,
            )?;
        }
        let app = App {
            name: self.name.unwrap_or_else(names::random),
            ..App::default()
        };
        let app = context.controller()?.create_app(&app).await?;
        if let Some(remote) = remote.filter(|remote| !git::set_remote(remote, cluster, &app.name)) {
            note(format!(
                "The git remote {remote} could not be made; name the app with -a {}",
                app.name
            ));
        }
        if context.globals.json {
            return output::json(&app);
        }
        output::line(format!("Created {}", app.name))
    }
}

/// `flynn apps`.
pub(super) async fn list(context: &Context) -> Result<()> {
    let mut apps = context.controller()?.apps().await?;
    apps.sort_by(|a, b| a.name.cmp(&b.name));
    if context.globals.json {
        return output::json(&apps);
    }
    output::table(["ID", "NAME"], apps.into_iter().map(|app| [app.id, app.name]))
}

/// `flynn info`.
pub(super) async fn info(context: &Context) -> Result<()> {
    let target = context.target().await?;
    let (app, controller) = (&target.app, &target.controller);
    let (routes, formations) = (
        controller.routes(&app.id).await?,
        controller.formations(&app.id).await?,
    );
    let processes = formations
        .into_iter()
        .find(|formation| Some(&formation.release_id) == app.release_id.as_ref())
        .map(|formation| formation.processes)
        .unwrap_or_default();
    if context.globals.json {
        return output::json(&json!({"app": app, "processes": processes, "routes": routes}));
    }
    output::line(format!("=== {}", app.name))?;
    for route in &routes {
        output::line(url(route))?;
    }
    let scale: Vec<_> = processes
        .iter()
        .map(|(kind, count)| format!("{kind}={count}"))
        .collect();
    output::line(format!(
        "Scale:    {}",
        if scale.is_empty() {
            "nothing runs".into()
        } else {
            scale.join(" ")
        }
    ))?;
    output::line(format!(
        "Release:  {}",
        app.release_id
            .as_deref()
            .unwrap_or("none yet: flynn docker push <image>")
    ))?;
    output::line(format!(
        "Strategy: {}, {} s for each step",
        app.strategy, app.deploy_timeout
    ))?;
    output::line(format!("Created:  {}", ago(app.created_at)))
}

/// Where a route is reached.
pub(super) fn url(route: &Route) -> String {
    match route.kind {
        RouteKind::Tcp | RouteKind::Udp => format!("{}://:{}", route.kind.name(), route.port),
        RouteKind::Http => {
            let scheme = if route.certificate.is_some() {
                "https"
            } else {
                "http"
            };
            let path = if route.path == "/" { "" } else { &route.path };
            let port = if route.port == 0 {
                String::new()
            } else {
                format!(":{}", route.port)
            };
            format!("{scheme}://{}{port}{path}", route.domain)
        }
    }
}

impl Delete {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let target = context.target().await?;
        let name = &target.app.name;
        confirm(
            &format!("Delete the app {name}, its releases, routes and data?"),
            self.yes,
        )?;
        target.controller.delete_app(&target.app.id).await?;
        let leads_here = git::remotes(&context.config)
            .into_iter()
            .any(|remote| remote.name == self.remote && remote.app == *name);
        if leads_here && !git::remove_remote(&self.remote) {
            note(format!("The git remote {} could not be removed.", self.remote));
        }
        note(format!("Deleted {name} ({}).", short(&target.app.id)));
        Ok(())
    }
}
