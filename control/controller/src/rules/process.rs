//! Process types of a release.

use std::collections::BTreeSet;

use flynn_api::controller::ProcessType;
use flynn_api::host::{HealthCheck, Port};
use flynn_api::resources::Resources;
use flynn_api::volume::MIN_LIMIT;
use flynn_api::{Error, Result};

use super::name;

/// The most that a volume can be limited to: what is meant for more is a mistake.
const MAX_LIMIT: u64 = 1 << 50;

/// Checks one process type. `system` says whether its app belongs to the platform.
pub(crate) fn check(kind: &str, process: &ProcessType, system: bool) -> Result<()> {
    let field = format!("processes.{kind}");
    name::process_type("processes", kind)?;
    name::args(&format!("{field}.args"), &process.args)?;
    name::env(&format!("{field}.env"), &process.env)?;
    if !process.service.is_empty() {
        name::service(&format!("{field}.service"), &process.service)?;
    }
    ports(&format!("{field}.ports"), &process.ports)?;
    resources(&format!("{field}.resources"), &process.resources)?;
    let mut paths = BTreeSet::new();
    for (at, volume) in process.volumes.iter().enumerate() {
        let field = format!("{field}.volumes[{at}]");
        let of_path = format!("{field}.path");
        path(&of_path, &volume.path)?;
        if !paths.insert(&volume.path) {
            return Err(Error::invalid_field(
                &of_path,
                "is used by another volume of this process type",
            ));
        }
        if volume
            .limit
            .is_some_and(|limit| !(MIN_LIMIT..=MAX_LIMIT).contains(&limit))
        {
            let rule = "is in bytes, from 16 MiB to 1 PiB";
            return Err(Error::invalid_field(&format!("{field}.limit"), rule));
        }
    }
    for (at, mount) in process.mounts.iter().enumerate() {
        path(&format!("{field}.mounts[{at}].location"), &mount.location)?;
        path(&format!("{field}.mounts[{at}].target"), &mount.target)?;
    }
    for (at, capability) in process.linux_capabilities.iter().flatten().enumerate() {
        let fits = capability.starts_with("CAP_")
            && capability
                .bytes()
                .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_');
        if !fits {
            let field = format!("{field}.linux_capabilities[{at}]");
            return Err(Error::invalid_field(
                &field,
                "must be a name such as CAP_NET_ADMIN",
            ));
        }
    }
    if system {
        Ok(())
    } else {
        unprivileged(&field, process)
    }
}

/// Refuses what would let an app reach into its host.
fn unprivileged(field: &str, process: &ProcessType) -> Result<()> {
    let privileges = [
        ("host_network", process.host_network),
        ("host_pid_namespace", process.host_pid_namespace),
        ("host_user_namespace", process.host_user_namespace),
        ("mounts", !process.mounts.is_empty()),
        ("linux_capabilities", process.linux_capabilities.is_some()),
    ];
    match privileges.iter().find(|(_, used)| *used) {
        None => Ok(()),
        Some((privilege, _)) => {
            let rule = "is only for apps of the platform (meta flynn-system-app=true): leave it out";
            Err(Error::invalid_field(&format!("{field}.{privilege}"), rule))
        }
    }
}

fn ports(field: &str, ports: &[Port]) -> Result<()> {
    let mut taken = BTreeSet::new();
    for (at, port) in ports.iter().enumerate() {
        let field = format!("{field}[{at}]");
        if port.proto != "tcp" && port.proto != "udp" {
            return Err(Error::invalid_field(
                &format!("{field}.proto"),
                "must be tcp or udp",
            ));
        }
        if port.port != 0 && !taken.insert((&port.proto, port.port)) {
            return Err(Error::invalid_field(&format!("{field}.port"), "is used twice"));
        }
        if let Some(service) = &port.service {
            name::service(&format!("{field}.service.name"), &service.name)?;
            if let Some(check) = &service.check {
                health_check(&format!("{field}.service.check"), check)?;
            }
        }
    }
    Ok(())
}

fn health_check(field: &str, check: &HealthCheck) -> Result<()> {
    let refuse = |name: &str, rule: &str| Err(Error::invalid_field(&format!("{field}.{name}"), rule));
    if !matches!(check.kind.as_str(), "tcp" | "http" | "https" | "command") {
        return refuse("type", "must be tcp, http, https or command");
    }
    if (check.kind == "command") == check.command.is_empty() {
        return refuse(
            "command",
            "a check of the type command names a program and its arguments, and no other does",
        );
    }
    let of_http =
        check.path.is_some() || check.host.is_some() || check.contains.is_some() || check.status.is_some();
    if matches!(check.kind.as_str(), "tcp" | "command") && of_http {
        return refuse("type", "path, host, match and status are for http and https");
    }
    if check.path.as_ref().is_some_and(|path| !path.starts_with('/')) {
        return refuse("path", "must begin with /");
    }
    if check.status.is_some_and(|status| !(100..=599).contains(&status)) {
        return refuse("status", "must be an HTTP status, 100 to 599");
    }
    if [check.interval, check.start_timeout, check.timeout].contains(&Some(0)) {
        return refuse("interval", "times are in nanoseconds and must not be 0");
    }
    if check.threshold == Some(0) {
        return refuse("threshold", "must not be 0");
    }
    Ok(())
}

/// Limits of a process type or a one-off job.
pub(crate) fn resources(field: &str, resources: &Resources) -> Result<()> {
    for (name, resource) in &resources.0 {
        let field = format!("{field}.{name}");
        if !Resources::NAMES.contains(&name.as_str()) {
            let known = Resources::NAMES.join(", ");
            return Err(Error::invalid_field(
                &field,
                format!("is not a resource; there are {known}"),
            ));
        }
        if resource.limit == Some(0) && !Resources::OR_ZERO.contains(&name.as_str()) {
            return Err(Error::invalid_field(&field, "a limit of 0 lets nothing run"));
        }
        let too_small = |limit: &u64| (1..Resources::MIN_TEMP_DISK).contains(limit);
        if name == "temp_disk" && resource.limit.as_ref().is_some_and(too_small) {
            let least = Resources::MIN_TEMP_DISK >> 20;
            return Err(Error::invalid_field(
                &field,
                format!("at least {least} MB, or 0 for no limit"),
            ));
        }
        if let (Some(request), Some(limit)) = (resource.request, resource.limit)
            && request > limit
        {
            return Err(Error::invalid_field(&field, "requests more than its limit"));
        }
        if resource
            .request
            .max(resource.limit)
            .is_some_and(|value| value > i64::MAX.unsigned_abs())
        {
            return Err(Error::invalid_field(&field, "is too large"));
        }
    }
    Ok(())
}

fn path(field: &str, path: &str) -> Result<()> {
    let segments_fit = path
        .split('/')
        .skip(1)
        .all(|part| !part.is_empty() && part != "." && part != "..");
    if path.starts_with('/') && path.len() <= 4096 && !path.contains('\0') && segments_fit {
        return Ok(());
    }
    Err(Error::invalid_field(
        field,
        "must be an absolute path other than /, without . and ..",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flynn_api::controller::VolumeReq;
    use flynn_api::host::{Mount, Service};
    use flynn_api::resources::Resource;

    fn refused(process: &ProcessType, system: bool) -> String {
        check("web", process, system).unwrap_err().detail.unwrap()["field"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    #[test]
    fn privileges_are_for_the_platform() {
        let all = [
            (
                "host_network",
                ProcessType {
                    host_network: true,
                    ..ProcessType::default()
                },
            ),
            (
                "host_pid_namespace",
                ProcessType {
                    host_pid_namespace: true,
                    ..ProcessType::default()
                },
            ),
            (
                "host_user_namespace",
                ProcessType {
                    host_user_namespace: true,
                    ..ProcessType::default()
                },
            ),
            (
                "mounts",
                ProcessType {
                    mounts: vec![Mount {
                        location: "/a".into(),
                        target: "/b".into(),
                        writeable: false,
                    }],
                    ..ProcessType::default()
                },
            ),
            (
                "linux_capabilities",
                ProcessType {
                    linux_capabilities: Some(vec!["CAP_SYS_ADMIN".into()]),
                    ..ProcessType::default()
                },
            ),
        ];
        for (field, process) in all {
            assert_eq!(refused(&process, false), format!("processes.web.{field}"));
            assert!(check("web", &process, true).is_ok());
        }
    }

    #[test]
    fn ports_services_and_checks() {
        let port = |port: u16, name: &str| Port {
            port,
            proto: "tcp".into(),
            service: Some(Service {
                name: name.into(),
                ..Service::default()
            }),
        };
        let with = |ports: Vec<Port>| ProcessType {
            ports,
            ..ProcessType::default()
        };
        assert!(
            check(
                "web",
                &with(vec![port(80, "a-web"), port(0, "b"), port(0, "c")]),
                false
            )
            .is_ok()
        );
        assert_eq!(
            refused(&with(vec![port(80, "a"), port(80, "b")]), false),
            "processes.web.ports[1].port"
        );
        assert_eq!(
            refused(&with(vec![port(80, "A_b")]), false),
            "processes.web.ports[0].service.name"
        );
        let mut checked = port(80, "a");
        let check = HealthCheck {
            kind: "ping".into(),
            ..HealthCheck::default()
        };
        checked.service.as_mut().unwrap().check = Some(check);
        assert_eq!(
            refused(&with(vec![checked]), false),
            "processes.web.ports[0].service.check.type"
        );
    }

    #[test]
    fn volumes_and_resources() {
        for bad in ["data", "/", "/a/../b", "//a", "/a/", ""] {
            let volumes = vec![VolumeReq {
                path: bad.into(),
                delete_on_stop: false,
                limit: None,
            }];
            let process = ProcessType {
                volumes,
                ..ProcessType::default()
            };
            assert_eq!(refused(&process, false), "processes.web.volumes[0].path", "{bad}");
        }
        let of_size = |limit| ProcessType {
            volumes: vec![VolumeReq {
                path: "/data".into(),
                delete_on_stop: false,
                limit,
            }],
            ..ProcessType::default()
        };
        for bad in [0, 500, MIN_LIMIT - 1, MAX_LIMIT + 1] {
            assert_eq!(
                refused(&of_size(Some(bad)), false),
                "processes.web.volumes[0].limit"
            );
        }
        for good in [None, Some(MIN_LIMIT), Some(MAX_LIMIT)] {
            assert!(check("web", &of_size(good), false).is_ok());
        }
        let limited = |name: &str, limit| {
            let resource = Resource {
                request: Some(2),
                limit: Some(limit),
            };
            ProcessType {
                resources: Resources([(name.to_owned(), resource)].into()),
                ..ProcessType::default()
            }
        };
        assert!(check("web", &limited("memory", 2), false).is_ok());
        assert_eq!(
            refused(&limited("memory", 1), false),
            "processes.web.resources.memory"
        );
        assert_eq!(refused(&limited("gpu", 2), false), "processes.web.resources.gpu");
        let zero = |name: &str| {
            let mut process = limited(name, 0);
            process
                .resources
                .0
                .values_mut()
                .for_each(|resource| resource.request = None);
            process
        };
        assert_eq!(refused(&zero("cpu"), false), "processes.web.resources.cpu");
        for unlimited in ["network_out", "temp_disk"] {
            assert!(check("web", &zero(unlimited), false).is_ok(), "no limit");
        }
        let least = Resources::MIN_TEMP_DISK;
        assert!(check("web", &limited("temp_disk", least), false).is_ok());
        assert_eq!(
            refused(&limited("temp_disk", least - 1), false),
            "processes.web.resources.temp_disk"
        );
    }
}
