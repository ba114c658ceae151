//! Routes as people ask for them.

use flynn_api::route::{Route, RouteKind, system_port};
use flynn_api::{Error, ErrorCode, Result};
use uuid::Uuid;

use super::name;
use crate::data::routes::OnDomain;

/// Ports that a TCP route gets when it asks for none.
pub(crate) const PORTS: std::ops::RangeInclusive<u16> = 3000..=3500;
/// Labels after a wildcard at most.
const MAX_WILDCARD_LABELS: usize = 5;

/// A new route with its defaults filled in, whose fields hold by themselves.
pub(crate) fn prepare(mut route: Route) -> Result<Route> {
    name::service("service", &route.service)?;
    if !route.id.is_empty() {
        return Err(Error::invalid_field(
            "id",
            "is given by the controller: leave it out",
        ));
    }
    match route.kind {
        RouteKind::Http => {
            route.domain = domain(&route.domain)?;
            if route.path.is_empty() {
                route.path = "/".into();
            }
            path(&route.path)?;
            if !matches!(route.port, 0 | 80 | 443) {
                let rule = "HTTP routes are served on the default ports: leave it out, or make a tcp route";
                return Err(Error::invalid_field("port", rule));
            }
            route.port = 0;
            if route.path != "/" && route.certificate.is_some() {
                let rule = "belongs to the route of path / on this domain, which serves it for all paths";
                return Err(Error::invalid_field("certificate", rule));
            }
        }
        RouteKind::Tcp | RouteKind::Udp => {
            let rule = "is for http routes alone";
            let http_only = [
                ("domain", !route.domain.is_empty()),
                ("path", !route.path.is_empty()),
                ("certificate", route.certificate.is_some()),
                ("disable_keep_alives", route.disable_keep_alives),
            ];
            if let Some((field, _)) = http_only.iter().find(|(_, used)| *used) {
                return Err(Error::invalid_field(field, rule));
            }
            port(route.port)?;
        }
    }
    Ok(route)
}

/// Refuses changes of what a route is found by. Empty fields of `wanted` stand for what is there.
pub(crate) fn change(there: &Route, wanted: Route) -> Result<Route> {
    let differs = |field: &str, differs: bool| {
        let rule = "cannot be changed: make another route, then delete this one";
        if differs {
            Err(Error::invalid_field(field, rule))
        } else {
            Ok(())
        }
    };
    differs("type", wanted.kind != there.kind)?;
    differs(
        "domain",
        !wanted.domain.is_empty() && domain(&wanted.domain)? != there.domain,
    )?;
    differs("path", !wanted.path.is_empty() && wanted.path != there.path)?;
    differs(
        "port",
        wanted.port != 0 && wanted.port != there.port && there.kind != RouteKind::Http,
    )?;
    let merged = Route {
        id: String::new(),
        domain: there.domain.clone(),
        path: there.path.clone(),
        port: there.port,
        ..wanted
    };
    prepare(merged)
}

/// A domain in its one spelling.
pub(crate) fn domain(domain: &str) -> Result<String> {
    let refuse = |rule: &str| Err(Error::invalid_field("domain", format!("{domain:?} {rule}")));
    let spelled = domain.strip_suffix('.').unwrap_or(domain).to_ascii_lowercase();
    if spelled == "*" {
        return Ok(spelled);
    }
    let host = spelled.strip_prefix("*.").unwrap_or(&spelled);
    let fits = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if host.is_empty() || spelled.len() > 253 || !host.split('.').all(fits) {
        return refuse("is not a host name, *.host.name or *");
    }
    if host.len() != spelled.len() && host.split('.').count() > MAX_WILDCARD_LABELS {
        return refuse("is a wildcard below more than 5 labels");
    }
    Ok(spelled)
}

fn path(path: &str) -> Result<()> {
    let rule = "must begin and end with /, and hold only characters of a URL's path";
    let fits = |byte: u8| byte.is_ascii_graphic() && !b"?#\\\"<>^`{|}".contains(&byte);
    let whole = path.starts_with('/') && path.ends_with('/') && path.len() <= 1024;
    let segments = path.trim_matches('/').split('/');
    let clean = path == "/"
        || segments
            .clone()
            .all(|part| !part.is_empty() && part != "." && part != "..");
    if whole && clean && path.bytes().all(fits) {
        return Ok(());
    }
    Err(Error::invalid_field("path", format!("{path:?} {rule}")))
}

/// Refuses ports of the system.
fn port(port: u16) -> Result<()> {
    if let Some(owner) = system_port(port) {
        let rule = "which would be cut off: choose another, or leave it out to get a free one";
        return Err(Error::invalid_field(
            "port",
            format!("{port} belongs to {owner}, {rule}"),
        ));
    }
    Ok(())
}

/// Checks a new HTTP route against those of its domain.
pub(crate) fn fits_domain(route: &Route, app_name: &str, others: &[OnDomain]) -> Result<()> {
    let domain = &route.domain;
    if let Some(other) = others.iter().find(|other| other.path == route.path) {
        let mut message = format!(
            "domain: {domain}{} is taken by the app {}",
            route.path, other.app_name
        );
        message.push_str(": choose another domain or path, or delete that route");
        return Err(Error::new(ErrorCode::ObjectExists, message));
    }
    if route.path == "/" {
        return Ok(());
    }
    match others.iter().find(|other| other.path == "/") {
        None => {
            let rule = format!("a route for / on {domain} has to be there first: make it, then this one");
            Err(Error::invalid_field("path", rule))
        }
        Some(root) if root.app_name != app_name => {
            let message = format!(
                "domain: {domain} belongs to the app {}: add the path there",
                root.app_name
            );
            Err(Error::new(ErrorCode::ObjectExists, message))
        }
        Some(_) => Ok(()),
    }
}

/// Refuses to delete the route of `/` while others of its domain depend on it.
pub(crate) fn deletable(route: &Route, others: &[OnDomain]) -> Result<()> {
    let dependents: Vec<_> = others
        .iter()
        .map(|o| o.path.as_str())
        .filter(|path| *path != "/")
        .collect();
    if route.kind == RouteKind::Http && route.path == "/" && !dependents.is_empty() {
        let (domain, paths) = (&route.domain, dependents.join(", "));
        let message = format!("the routes for {paths} on {domain} depend on this one: delete them first");
        return Err(Error::conflict(message));
    }
    Ok(())
}

/// The port of a new TCP or UDP route, among those of its kind: the one it asks for, or the first that is free.
pub(crate) fn choose_port(wanted: u16, taken: &[(u16, String, Uuid)]) -> Result<u16> {
    let user = |port: u16| {
        taken
            .iter()
            .find(|(other, _, _)| *other == port)
            .map(|(_, app, _)| app)
    };
    if wanted != 0 {
        return match user(wanted) {
            None => Ok(wanted),
            Some(app) => {
                let message = format!(
                    "port: {wanted} is in use by a route of the app {app}: leave it out to get a free one"
                );
                Err(Error::new(ErrorCode::ObjectExists, message))
            }
        };
    }
    PORTS.clone().find(|port| user(*port).is_none()).ok_or_else(|| {
        let message = format!(
            "port: all of {} to {} are in use: name a port outside of them, or delete a tcp route",
            PORTS.start(),
            PORTS.end()
        );
        Error::new(ErrorCode::Conflict, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn http(domain: &str, path: &str) -> Route {
        Route {
            service: "a-web".into(),
            domain: domain.into(),
            path: path.into(),
            ..Route::default()
        }
    }

    #[test]
    fn domains_and_paths() {
        let route = prepare(http("Example.COM.", "")).unwrap();
        assert_eq!((route.domain.as_str(), route.path.as_str()), ("example.com", "/"));
        for good in ["*", "*.example.com", "localhost", "a.flynn.localhost", "x-1.y"] {
            assert!(domain(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "a..b",
            "*..",
            "a.*.b",
            "-a.b",
            "exa mple",
            "a:80",
            "http://a",
            "*.a.b.c.d.e.f",
        ] {
            assert!(domain(bad).unwrap_err().message.starts_with("domain: "), "{bad}");
        }
        for bad in ["a/", "/a", "//", "/a//b/", "/../", "/a?b/", "/ /"] {
            assert!(
                prepare(http("a.b", bad))
                    .unwrap_err()
                    .message
                    .starts_with("path: "),
                "{bad}"
            );
        }
        assert!(prepare(http("a.b", "/api/v1/")).is_ok());
    }

    #[test]
    fn one_owner_per_domain_and_path() {
        let on = |app: &str, path: &str| OnDomain {
            id: Uuid::nil(),
            app_name: app.into(),
            path: path.into(),
        };
        let there = [on("one", "/"), on("one", "/api/")];
        let error = fits_domain(&http("a.b", "/"), "two", &there).unwrap_err();
        assert_eq!(error.code, ErrorCode::ObjectExists);
        assert!(error.message.contains("a.b/ is taken by the app one"), "{error}");
        assert!(
            fits_domain(&http("a.b", "/x/"), "two", &there).is_err(),
            "another app's domain"
        );
        assert!(fits_domain(&http("a.b", "/x/"), "one", &there).is_ok());
        assert!(
            fits_domain(&http("a.b", "/x/"), "one", &[])
                .unwrap_err()
                .message
                .starts_with("path: ")
        );
        assert!(
            deletable(&http("a.b", "/"), &there)
                .unwrap_err()
                .message
                .contains("/api/")
        );
        assert!(deletable(&http("a.b", "/api/"), &there).is_ok());
    }

    #[test]
    fn ports_are_chosen_and_guarded() {
        let tcp = |port| Route {
            kind: RouteKind::Tcp,
            service: "a".into(),
            port,
            ..Route::default()
        };
        for bad in [22, 53, 80, 443, 1111, 1113, 5000, 5432, 8472] {
            assert!(
                prepare(tcp(bad)).unwrap_err().message.starts_with("port: "),
                "{bad}"
            );
        }
        assert!(
            prepare(Route {
                domain: "a".into(),
                ..tcp(0)
            })
            .is_err()
        );
        assert!(prepare(tcp(6379)).is_ok());
        let taken = [
            (3000, "one".to_owned(), Uuid::nil()),
            (3001, "two".to_owned(), Uuid::nil()),
        ];
        assert_eq!(choose_port(0, &taken).unwrap(), 3002);
        assert!(
            choose_port(3001, &taken)
                .unwrap_err()
                .message
                .contains("the app two")
        );
        let all: Vec<_> = PORTS.map(|port| (port, "x".to_owned(), Uuid::nil())).collect();
        assert!(
            choose_port(0, &all)
                .unwrap_err()
                .message
                .contains("delete a tcp route")
        );
        assert_eq!(choose_port(4000, &all).unwrap(), 4000);
    }

    #[test]
    fn a_change_keeps_what_a_route_is_found_by() {
        let there = Route {
            id: "http/x".into(),
            ..prepare(http("a.b", "/")).unwrap()
        };
        let changed = change(
            &there,
            Route {
                sticky: true,
                ..http("", "")
            },
        )
        .unwrap();
        assert!(changed.sticky && changed.domain == "a.b" && changed.path == "/");
        assert!(
            change(&there, http("c.d", ""))
                .unwrap_err()
                .message
                .starts_with("domain: ")
        );
    }

    proptest! {
        #[test]
        fn a_domain_has_one_spelling(text in "\\PC{0,40}") {
            if let Ok(once) = domain(&text) {
                prop_assert_eq!(domain(&once).unwrap(), once);
            }
        }
    }
}
