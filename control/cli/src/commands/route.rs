//! `flynn route`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use flynn_api::ErrorCode;
use flynn_api::route::{Certificate, Route as Known, RouteKind};

use super::apps::url;
use crate::context::{Context, Target};
use crate::failure::{Result, advise, local, usage};
use crate::output::{self, note};

#[derive(Args)]
pub(super) struct Route {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// List the routes
    List,
    /// Add a route
    Add {
        #[command(subcommand)]
        kind: Add,
    },
    /// Change a route
    Update(Update),
    /// Remove a route
    Remove {
        /// Its id
        id: String,
    },
}

#[derive(Subcommand)]
enum Add {
    /// By host name and path
    Http(Http),
    /// By port
    Tcp(Port),
    /// By port, for datagrams
    Udp(Port),
}

#[derive(Args)]
struct Common {
    /// The service; <app>-web when not given
    #[arg(short, long)]
    service: Option<String>,
    /// The port; chosen for TCP and UDP, the default one for HTTP when not given
    #[arg(short, long)]
    port: Option<u16>,
    /// Only to the service's leader
    #[arg(long)]
    leader: bool,
    /// Break requests off when a backend goes
    #[arg(long)]
    no_drain_backends: bool,
}

#[derive(Args)]
struct Http {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    tls: Tls,
    /// Keep a client on its backend by a cookie
    #[arg(long)]
    sticky: bool,
    /// Close each client connection after its request
    #[arg(long)]
    disable_keep_alives: bool,
    /// example.com, *.example.com, or example.com/path/
    domain: String,
}

#[derive(Args)]
struct Port {
    #[command(flatten)]
    common: Common,
    /// Keep a client on its backend by its address
    #[arg(long)]
    sticky: bool,
}

#[derive(Args)]
struct Tls {
    /// File with the certificate chain, PEM, leaf first
    #[arg(short = 'c', long, requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// File with its key, PEM
    #[arg(short = 'k', long, requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

#[derive(Args)]
struct Update {
    /// Its id
    id: String,
    /// Another service
    #[arg(short, long)]
    service: Option<String>,
    #[command(flatten)]
    tls: Tls,
    /// Keep a client on its backend: by a cookie, or by its address for TCP and UDP
    #[arg(long, conflicts_with = "no_sticky")]
    sticky: bool,
    /// Balance each request
    #[arg(long)]
    no_sticky: bool,
    /// Only to the service's leader
    #[arg(long, conflicts_with = "no_leader")]
    leader: bool,
    /// To all instances
    #[arg(long)]
    no_leader: bool,
    /// Close each client connection after its request
    #[arg(long, conflicts_with = "enable_keep_alives")]
    disable_keep_alives: bool,
    /// Keep client connections open
    #[arg(long)]
    enable_keep_alives: bool,
}

impl Route {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let target = context.target().await?;
        match self.command.unwrap_or(Command::List) {
            Command::List => list(context, &target).await,
            Command::Add { kind } => {
                let route = match kind {
                    Add::Http(http) => http.route(&target.app.name)?,
                    Add::Tcp(port) => port.route(RouteKind::Tcp, &target.app.name),
                    Add::Udp(port) => port.route(RouteKind::Udp, &target.app.name),
                };
                let route = target.controller.create_route(&target.app.id, &route).await?;
                if context.globals.json {
                    return output::json(&route);
                }
                if route.kind != RouteKind::Http {
                    note(format!("It listens on port {}.", route.port));
                }
                output::line(&route.id)
            }
            Command::Update(update) => update.run(&target).await,
            Command::Remove { id } => {
                let unknown = advise(ErrorCode::NotFound, "See them all: flynn route");
                target
                    .controller
                    .delete_route(&target.app.id, &id)
                    .await
                    .map_err(unknown)?;
                note(format!("Route {id} is removed."));
                Ok(())
            }
        }
    }
}

async fn list(context: &Context, target: &Target) -> Result<()> {
    let mut routes = target.controller.routes(&target.app.id).await?;
    for certificate in routes.iter_mut().filter_map(|route| route.certificate.as_mut()) {
        // Nobody needs a key from here.
        certificate.key.clear();
    }
    if context.globals.json {
        return output::json(&routes);
    }
    let yes = |value: bool| if value { "true" } else { "false" }.to_owned();
    let rows = routes.iter().map(|route| {
        [
            url(route),
            route.service.clone(),
            route.id.clone(),
            yes(route.sticky),
            yes(route.leader),
            yes(route.certificate.is_some()),
        ]
    });
    output::table(["ROUTE", "SERVICE", "ID", "STICKY", "LEADER", "TLS"], rows)
}

impl Common {
    fn route(self, app: &str) -> Known {
        Known {
            service: self.service.unwrap_or_else(|| format!("{app}-web")),
            port: self.port.unwrap_or(0),
            leader: self.leader,
            drain_backends: !self.no_drain_backends,
            ..Known::default()
        }
    }
}

impl Port {
    fn route(self, kind: RouteKind, app: &str) -> Known {
        Known {
            kind,
            sticky: self.sticky,
            ..self.common.route(app)
        }
    }
}

impl Http {
    fn route(self, app: &str) -> Result<Known> {
        let (domain, path) = self
            .domain
            .split_once('/')
            .map_or((self.domain.as_str(), ""), |(domain, path)| (domain, path));
        let mut path = format!("/{path}");
        if !path.ends_with('/') {
            path.push('/');
        }
        Ok(Known {
            domain: domain.to_owned(),
            path,
            certificate: self.tls.certificate()?,
            sticky: self.sticky,
            disable_keep_alives: self.disable_keep_alives,
            ..self.common.route(app)
        })
    }
}

impl Tls {
    fn certificate(&self) -> Result<Option<Certificate>> {
        let (Some(cert), Some(key)) = (&self.tls_cert, &self.tls_key) else {
            return Ok(None);
        };
        let read = |path: &PathBuf| {
            std::fs::read_to_string(path)
                .map_err(|why| local(format!("{} cannot be read", path.display()), &why))
        };
        let (cert_text, key_text) = (read(cert)?, read(key)?);
        for (path, text, word) in [(cert, &cert_text, "CERTIFICATE"), (key, &key_text, "PRIVATE KEY")] {
            if !text.contains("-----BEGIN ") || !text.contains(word) {
                return Err(usage(format!(
                    "{} holds no {word} in PEM form (-----BEGIN …); did you swap the files?",
                    path.display()
                )));
            }
        }
        Ok(Some(Certificate {
            cert: cert_text,
            key: key_text,
            ..Certificate::default()
        }))
    }
}

impl Update {
    async fn run(self, target: &Target) -> Result<()> {
        let routes = target.controller.routes(&target.app.id).await?;
        let same = |route: &&Known| route.id == self.id || route.id.rsplit('/').next() == Some(&self.id);
        let mut route = routes.iter().find(same).cloned().ok_or_else(|| {
            advise(ErrorCode::NotFound, "See them all: flynn route")(flynn_api::Error::not_found(
                "route", &self.id,
            ))
        })?;
        let before = route.clone();
        let set = |field: &mut bool, on: bool, off: bool| *field = on || (*field && !off);
        set(&mut route.sticky, self.sticky, self.no_sticky);
        set(&mut route.leader, self.leader, self.no_leader);
        set(
            &mut route.disable_keep_alives,
            self.disable_keep_alives,
            self.enable_keep_alives,
        );
        if let Some(service) = self.service {
            route.service = service;
        }
        if let Some(certificate) = self.tls.certificate()? {
            route.certificate = Some(certificate);
        }
        if route == before {
            return Err(usage("nothing to change is given; see flynn route update --help"));
        }
        target.controller.update_route(&target.app.id, &route).await?;
        note(format!("Route {} is changed.", route.id));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        http: Http,
    }

    #[test]
    fn domains_carry_paths() {
        let route = |domain: &str| Line::parse_from(["x", domain]).http.route("app").unwrap();
        for (given, domain, path) in [
            ("a.com", "a.com", "/"),
            ("a.com/", "a.com", "/"),
            ("a.com/b/c", "a.com", "/b/c/"),
        ] {
            let route = route(given);
            assert_eq!((route.domain.as_str(), route.path.as_str()), (domain, path));
            assert!(route.drain_backends && route.service == "app-web");
        }
    }
}
