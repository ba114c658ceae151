//! The git repository around us: its remotes say which app a command is about.

use std::process::{Command, Stdio};

use crate::config::{Cluster, Config};

/// The remote that `create` makes.
pub(crate) const REMOTE: &str = "flynn";

/// An app as a remote names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Remote {
    pub(crate) name: String,
    pub(crate) cluster: String,
    pub(crate) app: String,
}

/// Remotes of the repository around us that lead to a cluster; none without git or a repository.
pub(crate) fn remotes(config: &Config) -> Vec<Remote> {
    let output = Command::new("git")
        .args(["remote", "-v"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    output.map_or_else(
        |_| Vec::new(),
        |output| parse(&String::from_utf8_lossy(&output.stdout), &config.clusters),
    )
}

fn parse(listing: &str, clusters: &[Cluster]) -> Vec<Remote> {
    let mut remotes: Vec<Remote> = Vec::new();
    for line in listing.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(url)) = (words.next(), words.next()) else {
            continue;
        };
        let found = clusters
            .iter()
            .filter(|cluster| !cluster.git_url.is_empty())
            .find_map(|cluster| {
                let app = url
                    .strip_prefix(cluster.git_url.trim_end_matches('/'))?
                    .strip_prefix('/')?;
                let app = app.strip_suffix(".git").unwrap_or(app);
                (!app.is_empty()).then(|| Remote {
                    name: name.into(),
                    cluster: cluster.name.clone(),
                    app: app.into(),
                })
            });
        if let Some(remote) = found.filter(|remote| !remotes.contains(remote)) {
            remotes.push(remote);
        }
    }
    remotes
}

/// Whether there is a repository around us.
pub(crate) fn in_repository() -> bool {
    run(&["rev-parse", "--git-dir"])
}

/// Whether the repository has a remote of this name.
pub(crate) fn has_remote(name: &str) -> bool {
    run(&["remote", "get-url", "--", name])
}

/// Points a remote to an app; false when git refuses.
pub(crate) fn set_remote(name: &str, cluster: &Cluster, app: &str) -> bool {
    let url = format!("{}/{app}.git", cluster.git_url.trim_end_matches('/'));
    if has_remote(name) {
        run(&["remote", "set-url", "--", name, &url])
    } else {
        run(&["remote", "add", "--", name, &url])
    }
}

/// Removes a remote; false when git refuses.
pub(crate) fn remove_remote(name: &str) -> bool {
    run(&["remote", "remove", "--", name])
}

fn run(arguments: &[&str]) -> bool {
    Command::new("git")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remotes_of_clusters_are_found() {
        let clusters = [
            Cluster::at("a", "a.com", "k", ""),
            Cluster::at("b", "b.com:8443", "k", ""),
        ];
        let listing = "flynn\thttps://git.a.com/web.git (fetch)\nflynn\thttps://git.a.com/web.git (push)\n\
                       origin\tgit@example.com:x/y.git (fetch)\nstaging\thttps://git.b.com:8443/web-2.git (fetch)\n\
                       odd\thttps://git.a.com.evil/web.git (fetch)\nempty\thttps://git.a.com/ (fetch)\nbroken\n";
        let found = parse(listing, &clusters);
        let remote = |name: &str, cluster: &str, app: &str| Remote {
            name: name.into(),
            cluster: cluster.into(),
            app: app.into(),
        };
        assert_eq!(
            found,
            [remote("flynn", "a", "web"), remote("staging", "b", "web-2")]
        );
    }
}
