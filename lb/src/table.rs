//! Which route a request takes. Pure.
//!
//! The host decides first: exact, then the wildcard that names most of it, then `*`. Among the routes of that host
//! the longest path wins, segment by segment. A host that matches exactly keeps its requests: when none of its paths
//! fits, the wildcards are not asked.

use std::collections::HashMap;

/// Routes by host and path, each with what it leads to.
#[derive(Clone, Debug)]
pub struct Table<T> {
    /// By host name, `*.example.com` or `*`; the longest path first.
    hosts: HashMap<Box<str>, Vec<(Box<str>, T)>>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            hosts: HashMap::new(),
        }
    }
}

/// A host as it is compared: in lower case, without port and without the root's dot.
pub fn normalize_host(host: &str) -> String {
    let name = match host.strip_prefix('[') {
        // An IPv6 address: the port is behind the bracket.
        Some(rest) => rest.split_once(']').map_or(rest, |(address, _)| address),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// A path prefix without the slash at its end; the root is empty.
fn normalize_path(path: &str) -> &str {
    path.trim_end_matches('/')
}

/// Whether `path` is `prefix` or lies below it.
fn below(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The names that a host is looked up by, best first: itself, its wildcards, `*`.
pub fn candidates(host: &str) -> impl Iterator<Item = String> + '_ {
    let wildcards = host
        .match_indices('.')
        .map(move |(dot, _)| format!("*{}", &host[dot..]));
    std::iter::once(host.to_owned())
        .chain(wildcards)
        .chain(std::iter::once("*".to_owned()))
}

impl<T> Table<T> {
    /// A table of (domain, path, what it leads to). Of two that are the same in domain and path, the first counts.
    pub fn new<'a>(routes: impl IntoIterator<Item = (&'a str, &'a str, T)>) -> Self {
        let mut hosts: HashMap<Box<str>, Vec<(Box<str>, T)>> = HashMap::new();
        for (domain, path, target) in routes {
            let paths = hosts.entry(normalize_host(domain).into()).or_default();
            let path = normalize_path(path);
            if paths.iter().all(|(other, _)| **other != *path) {
                paths.push((path.into(), target));
            }
        }
        for paths in hosts.values_mut() {
            paths.sort_by_key(|(path, _)| std::cmp::Reverse(path.len()));
        }
        Self { hosts }
    }

    /// Where a request for this host and path goes. `host` may carry a port and capitals.
    pub fn find(&self, host: &str, path: &str) -> Option<&T> {
        let host = normalize_host(host);
        let paths = candidates(&host).find_map(|name| self.hosts.get(name.as_str()))?;
        paths
            .iter()
            .find(|(prefix, _)| below(path, prefix))
            .map(|(_, target)| target)
    }

    /// How many hosts it knows.
    pub fn len(&self) -> usize {
        self.hosts.len()
    }

    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.hosts.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn find<'a>(routes: &[(&'a str, &'a str)], host: &str, path: &str) -> Option<&'a str> {
        let table = Table::new(routes.iter().map(|(domain, path)| (*domain, *path, *path)));
        table.find(host, path).copied()
    }

    #[test]
    fn hosts_from_exact_to_any() {
        let table = Table::new([
            ("a.example.com", "/", 1),
            ("*.example.com", "/", 2),
            ("*.b.example.com", "/", 3),
            ("*", "/", 4),
        ]);
        let find = |host: &str| table.find(host, "/x").copied().unwrap();
        assert_eq!(find("A.Example.COM:8080"), 1);
        assert_eq!(find("a.example.com."), 1);
        assert_eq!(
            (
                find("c.example.com"),
                find("c.b.example.com"),
                find("d.c.b.example.com")
            ),
            (2, 3, 3)
        );
        assert_eq!(
            (find("example.com"), find("[::1]:80")),
            (4, 4),
            "a wildcard does not match its parent"
        );
    }

    #[test]
    fn paths_by_segment() {
        let routes = [("h", "/"), ("h", "/a/"), ("h", "/a/b/")];
        assert_eq!(find(&routes, "h", "/a/b/c"), Some("/a/b/"));
        assert_eq!(find(&routes, "h", "/a/bc"), Some("/a/"));
        assert_eq!(find(&routes, "h", "/ab"), Some("/"));
        assert_eq!(find(&routes, "h", "/a"), Some("/a/"));
        assert_eq!(find(&[("h", "/a/")], "h", "/"), None);
    }

    fn naive(routes: &[(String, String)], host: &str, path: &str) -> Option<usize> {
        let fits = |domain: &str| {
            domain == host
                || domain == "*"
                || domain
                    .strip_prefix('*')
                    .is_some_and(|end| host.ends_with(end) && host.len() > end.len())
        };
        // Longer domains are more specific; the one that is equal is exact.
        let best = routes
            .iter()
            .map(|(domain, _)| domain)
            .filter(|domain| fits(domain))
            .max_by_key(|domain| (*domain == host, domain.len()))?;
        let segments = |path: &str| {
            path.split('/')
                .filter(|part| !part.is_empty())
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let wanted = segments(path);
        routes
            .iter()
            .enumerate()
            .filter(|(_, (domain, _))| domain == best)
            .filter(|(_, (_, prefix))| wanted.starts_with(&segments(prefix)))
            .max_by_key(|(index, (_, prefix))| (segments(prefix).len(), std::cmp::Reverse(*index)))
            .map(|(index, _)| index)
    }

    proptest! {
        #[test]
        fn as_the_naive_model_says(
            routes in proptest::collection::vec(
                ("(\\*\\.)?([ab]\\.){0,2}c|\\*", "/(([ab]{1,2})/){0,3}"), 0..12),
            host in "([ab]\\.){0,3}c", path in "(/[ab]{1,2}){0,4}/?",
        ) {
            let path = if path.is_empty() { "/".to_owned() } else { path };
            let table = Table::new(routes.iter().enumerate().map(|(n, (domain, path))| (domain.as_str(), path.as_str(), n)));
            prop_assert_eq!(table.find(&host, &path).copied(), naive(&routes, &host, &path));
        }

        #[test]
        fn no_host_is_too_odd(host in ".*", path in ".*") {
            let _ = Table::new([("*", "/", ()), (host.as_str(), path.as_str(), ())]).find(&host, &path);
        }
    }
}
