//! Who may know whom: the floors of the house (docs/architecture.md), kept by reading cargo's own account of the
//! crates.

use crate::exec;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::collections::BTreeMap;

/// The floor of each crate; a crate may depend on those of lower floors only. Two crates of one floor stand beside
/// each other and do not know each other.
const FLOORS: &[(u8, &[&str])] = &[
    // `base2histogram` stands in for a crate of the registry (root manifest, `[patch.crates-io]`).
    (0, &["flynn-abi", "base2histogram"]),
    (1, &["flynn-dataplane", "flynn-api"]),
    (2, &["flynn-overlay", "flynn-lb"]),
    (
        3,
        &[
            "flynn-discovery",
            "flynn-controller",
            "flynn-scheduler",
            "flynn-builds",
            "flynn-logs",
            "flynn-blobs",
            "flynn-dashboard",
            "flynn-sirenia",
            "flynn-postgres",
            "flynn-mariadb",
            "flynn-mongodb",
            "flynn-redis",
            "flynn-hostd",
        ],
    ),
    (4, &["flynn-cli", "flynn-system"]),
];

/// Crates that are tools around the house and on no floor: they may know any crate and each other, and no crate of
/// the house knows them.
const TOOLS: &[&str] = &[
    "xtask",
    "flynn-lab",
    "flynn-linearizability",
    "flynn-discovery-simulation",
    "flynn-cluster-tests",
    "flynn-bench",
];

/// What the floors forbid and the design allows by name.
const ALLOWED: &[(&str, &str)] = &[
    ("flynn-postgres", "flynn-sirenia"),
    ("flynn-mariadb", "flynn-sirenia"),
    ("flynn-mongodb", "flynn-sirenia"),
    ("flynn-redis", "flynn-sirenia"),
];

/// Wire types are one room: the data plane does not speak JSON.
const FORBIDDEN: &[(&str, &str)] = &[("flynn-dataplane", "flynn-api"), ("flynn-api", "flynn-abi")];

/// What `cargo metadata` says, as far as it is wanted here.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
    path: Option<String>,
}

/// Fails with every breach of the floors.
pub(crate) fn check() -> Result<()> {
    let json = exec::quiet(exec::cargo().args(["metadata", "--no-deps", "--format-version=1", "--locked"]))?;
    let metadata: Metadata = serde_json::from_slice(&json).context("cargo metadata cannot be read")?;
    let breaches = breaches(&metadata);
    if !breaches.is_empty() {
        bail!(
            "the floors are not kept (docs/architecture.md, The rooms):\n  {}",
            breaches.join("\n  ")
        );
    }
    Ok(())
}

fn breaches(metadata: &Metadata) -> Vec<String> {
    let floors: BTreeMap<&str, u8> = FLOORS
        .iter()
        .flat_map(|(floor, names)| names.iter().map(|name| (*name, *floor)))
        .collect();
    let mut breaches = Vec::new();
    for package in &metadata.packages {
        let name = package.name.as_str();
        let floor = floors.get(name).copied();
        if floor.is_none() && !TOOLS.contains(&name) {
            breaches.push(format!("{name} has no floor; give it one in xtask/src/floors.rs"));
        }
        for dependency in package
            .dependencies
            .iter()
            .filter(|dependency| dependency.path.is_some())
        {
            let other = dependency.name.as_str();
            // Tests may stand beside whatever they test with.
            if dependency.kind.as_deref() == Some("dev") || ALLOWED.contains(&(name, other)) {
                continue;
            }
            let below = match (floor, floors.get(other)) {
                (Some(floor), Some(other)) => *other < floor,
                (None, other) => other.is_some() || TOOLS.contains(&dependency.name.as_str()),
                (Some(_), None) => false,
            };
            if !below || FORBIDDEN.contains(&(name, other)) {
                breaches.push(format!("{name} depends on {other}, which is not below it"));
            }
        }
    }
    breaches
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A workspace of these dependencies.
    fn workspace(dependencies: &[(&str, &[&str])]) -> Metadata {
        let packages = dependencies.iter().map(|(name, others)| Package {
            name: (*name).to_owned(),
            dependencies: others
                .iter()
                .map(|other| Dependency {
                    name: (*other).to_owned(),
                    kind: None,
                    path: Some("/there".to_owned()),
                })
                .collect(),
        });
        Metadata {
            packages: packages.collect(),
        }
    }

    #[test]
    fn this_workspace_keeps_its_floors() {
        check().unwrap();
    }

    #[test]
    fn arrows_point_down() {
        let good = workspace(&[
            (
                "flynn-hostd",
                &["flynn-overlay", "flynn-dataplane", "flynn-api", "flynn-abi"],
            ),
            ("flynn-postgres", &["flynn-sirenia", "flynn-api"]),
            ("flynn-system", &["flynn-controller", "flynn-lb"]),
            ("flynn-bench", &["flynn-lab", "flynn-cluster-tests", "flynn-api"]),
        ]);
        assert_eq!(breaches(&good), Vec::<String>::new());
        for (name, other) in [
            ("flynn-controller", "flynn-scheduler"),
            ("flynn-overlay", "flynn-lb"),
            ("flynn-dataplane", "flynn-api"),
            ("flynn-api", "flynn-abi"),
            ("flynn-api", "flynn-discovery"),
            ("flynn-hostd", "flynn-lab"),
            ("flynn-unheard-of", "flynn-api"),
        ] {
            assert_eq!(
                breaches(&workspace(&[(name, &[other])])).len(),
                1,
                "{name} on {other}"
            );
        }
    }
}
