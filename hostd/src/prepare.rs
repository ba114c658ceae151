//! From a job as its maker describes it to what its supervisor is told. Pure.

use std::net::Ipv4Addr;
use std::path::{Component, Path, PathBuf};

use flynn_api::host::{ContainerConfig, HealthCheck, Job, UserNamespace, label};
use flynn_api::image::{Entrypoint, ImageManifest};
use flynn_api::resources::Resources;
use flynn_api::{Digest, Env, Error, Meta, Result};

use crate::caps;
use crate::cgroup::{Limits, is_cpuset};
use crate::launch::{Bind, Launch, Service};
use crate::paths::Paths;
use crate::volumes::is_volume_id;

/// The longest job id: it must fit, with its directory, into a Unix socket's address.
const MAX_ID: usize = 80;

/// The most layers a root file system can have.
const MAX_LAYERS: usize = 200;

/// The least memory that a container can start with.
const MIN_MEMORY: u64 = 4 << 20;

/// The longest wait between SIGTERM and SIGKILL, in seconds.
const MAX_STOP_TIMEOUT: u32 = 3600;

/// What a job does not say about the host that it runs on.
#[derive(Clone, Debug)]
pub struct Host<'a> {
    /// Its id.
    pub id: &'a str,
    /// Where it is reached.
    pub address: Ipv4Addr,
}

/// Refuses a job that breaks a rule, before anything is done for it.
pub fn check(job: &Job, host_id: &str) -> Result<()> {
    let config = &job.config;
    check_id(&job.id, host_id)?;
    if job.artifacts.is_empty() {
        return Err(Error::invalid_field(
            "artifacts",
            "a job needs at least one image",
        ));
    }
    if let Some(name) = job
        .resources
        .0
        .keys()
        .find(|name| !Resources::NAMES.contains(&name.as_str()))
    {
        let known = Resources::NAMES.join(", ");
        return Err(Error::invalid_field(
            "resources",
            format!("{name} is no resource; there are {known}"),
        ));
    }
    for (name, most) in [("cpu_weight", 10_000), ("io_weight", 1000)] {
        if !(1..=most).contains(&job.resources.limit(name)) {
            return Err(Error::invalid_field(
                &format!("resources.{name}"),
                format!("a weight from 1 to {most} is wanted"),
            ));
        }
    }
    if temp_disk(job).is_some_and(|size| size < Resources::MIN_TEMP_DISK) {
        return Err(Error::invalid_field(
            "resources.temp_disk",
            format!(
                "at least {} MB, or 0 for no limit",
                Resources::MIN_TEMP_DISK >> 20
            ),
        ));
    }
    if config.cpuset.as_ref().is_some_and(|cores| !is_cpuset(cores)) {
        return Err(Error::invalid_field(
            "config.cpuset",
            "numbers and ranges of cores are wanted: 0-3,6",
        ));
    }
    if job.resources.limit("memory") < MIN_MEMORY {
        return Err(Error::invalid_field(
            "resources.memory",
            "a container needs at least 4 MiB",
        ));
    }
    if job.stop_timeout.is_some_and(|seconds| seconds > MAX_STOP_TIMEOUT) {
        return Err(Error::invalid_field(
            "stop_timeout",
            format!("at most {MAX_STOP_TIMEOUT} s"),
        ));
    }
    for (name, value) in &config.env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            let what = "names are not empty and have no =, and nothing has a zero byte";
            return Err(Error::invalid_field("config.env", format!("{name:?}: {what}")));
        }
    }
    if config.args.iter().any(|arg| arg.contains('\0')) {
        return Err(Error::invalid_field(
            "config.args",
            "a zero byte cannot be passed to a program",
        ));
    }
    if config
        .working_dir
        .as_ref()
        .is_some_and(|dir| !dir.starts_with('/') || dir.contains('\0'))
    {
        return Err(Error::invalid_field(
            "config.working_dir",
            "an absolute path is wanted",
        ));
    }
    check_mounts(job)?;
    check_ports(config)?;
    capabilities(config, &Entrypoint::default()).map(drop)
}

fn check_id(id: &str, host_id: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let own = id.strip_prefix(host_id).and_then(|rest| rest.strip_prefix('-'));
    if own.is_some_and(|rest| !rest.is_empty()) && id.len() <= MAX_ID && id.chars().all(fits) {
        return Ok(());
    }
    let shown: String = id.chars().take(MAX_ID).collect();
    Err(Error::invalid_field(
        "id",
        format!("{shown:?} is no job id of this host: {host_id}-<uuid> is wanted"),
    ))
}

fn check_mounts(job: &Job) -> Result<()> {
    for volume in &job.config.volumes {
        if !is_volume_id(&volume.volume_id) {
            return Err(Error::invalid_field(
                "config.volumes.volume",
                "letters, digits, dashes, underscores and dots",
            ));
        }
        check_target("config.volumes.target", &volume.path)?;
    }
    if !job.config.mounts.is_empty() && !is_system(job) {
        return Err(Error::invalid_field(
            "config.mounts",
            "only jobs of the platform may mount paths of the host",
        ));
    }
    for mount in &job.config.mounts {
        check_target("config.mounts.location", &mount.location)?;
        if !mount.target.starts_with('/') || mount.target.contains('\0') {
            return Err(Error::invalid_field(
                "config.mounts.target",
                "an absolute path of the host is wanted",
            ));
        }
    }
    Ok(())
}

/// Whether something can be mounted there: not over the root, and not over what the kernel shows.
fn check_target(field: &str, target: &str) -> Result<()> {
    let path = Path::new(target);
    let plain = path.is_absolute()
        && path
            .components()
            .all(|part| !matches!(part, Component::ParentDir));
    let kernel = ["/proc", "/dev"].iter().any(|dir| path.starts_with(dir));
    if plain && !kernel && path.parent().is_some() && !target.contains('\0') {
        return Ok(());
    }
    Err(Error::invalid_field(
        field,
        format!("{target:?}: an absolute path outside /proc and /dev is wanted"),
    ))
}

fn check_ports(config: &ContainerConfig) -> Result<()> {
    for (index, port) in config.ports.iter().enumerate() {
        if !matches!(port.proto.as_str(), "tcp" | "udp") {
            return Err(Error::invalid_field(
                "config.ports.proto",
                format!("{:?} is neither tcp nor udp", port.proto),
            ));
        }
        let same = |other: &flynn_api::host::Port| other.port == port.port && other.proto == port.proto;
        if port.port != 0 && config.ports[..index].iter().any(same) {
            return Err(Error::invalid_field(
                "config.ports",
                format!("port {} is there twice", port.port),
            ));
        }
        let Some(service) = &port.service else { continue };
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if service.name.is_empty() || service.name.len() > 63 || !service.name.chars().all(fits) {
            let what = "up to 63 lower-case letters, digits and dashes are wanted";
            return Err(Error::invalid_field(
                "config.ports.service.name",
                format!("{:?}: {what}", service.name),
            ));
        }
        check_health(service.check.as_ref())?;
    }
    Ok(())
}

fn check_health(check: Option<&HealthCheck>) -> Result<()> {
    let Some(check) = check else { return Ok(()) };
    if !matches!(check.kind.as_str(), "tcp" | "http" | "https" | "command") {
        let what = "this host checks tcp, http, https and command";
        return Err(Error::invalid_field(
            "config.ports.service.check.type",
            format!("{:?}: {what}", check.kind),
        ));
    }
    if (check.kind == "command") == check.command.is_empty() {
        return Err(Error::invalid_field(
            "config.ports.service.check.command",
            "a check of the type command names a program, and no other does",
        ));
    }
    let path = check.path.as_deref().unwrap_or("/");
    if !path.starts_with('/') || path.contains(|c: char| c.is_ascii_control() || c == ' ') {
        return Err(Error::invalid_field(
            "config.ports.service.check.path",
            "a URL's path is wanted",
        ));
    }
    Ok(())
}

/// Whether the job is one of the platform's own.
pub fn is_system(job: &Job) -> bool {
    job.metadata
        .get(label::SYSTEM_APP)
        .is_some_and(|value| value == "true")
}

/// The layers of all images, lowest first; one that is there twice counts once, at its lowest place.
pub fn layers(manifests: &[ImageManifest]) -> Result<Vec<Digest>> {
    let mut layers = Vec::new();
    for layer in manifests.iter().flat_map(ImageManifest::layers) {
        if !layers.contains(&layer.id) {
            layers.push(layer.id);
        }
    }
    match layers.len() {
        0 => Err(Error::invalid_field(
            "artifacts",
            "the images have no layers for linux on amd64",
        )),
        1..=MAX_LAYERS => Ok(layers),
        many => Err(Error::invalid_field(
            "artifacts",
            format!("{many} layers; a host can stack {MAX_LAYERS}"),
        )),
    }
}

fn capabilities(config: &ContainerConfig, entrypoint: &Entrypoint) -> Result<(caps::Set, caps::Set)> {
    let set = |names: &[String]| {
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        caps::Set::of_names(&names)
            .map_err(|name| Error::invalid_field("linux_capabilities", format!("{name:?} is no capability")))
    };
    match &config.linux_capabilities {
        Some(names) => set(names).map(|asked| (asked, asked)),
        None => {
            set(&entrypoint.capabilities).map(|asked| (caps::Set::default_container().union(asked), asked))
        }
    }
}

/// Why a job is in the host's user namespace, whatever the host can do. None for one that is to have its own.
fn host_users(job: &Job, capabilities: caps::Set) -> Option<String> {
    let config = &job.config;
    let why = if config.host_user_namespace {
        "it asks for the host's"
    } else if is_system(job) {
        "it is one of the platform's own"
    } else if config.host_network {
        "it is in the host's network"
    } else if config.host_pid_namespace {
        "it is in the host's pid namespace"
    } else if !config.mounts.is_empty() {
        "it has paths of the host"
    } else {
        let name = capabilities.beyond(caps::Set::default_container())?;
        return Some(format!(
            "it has CAP_{name}, which is of no use in another one than the host's"
        ));
    };
    Some(why.into())
}

/// Gives each port a number: what was asked for, or 5000 and its index, or on the host what `free_port` says.
pub fn ports(config: &ContainerConfig, mut free_port: impl FnMut() -> Result<u16>) -> Result<Vec<u16>> {
    let number = |(index, port): (usize, &flynn_api::host::Port)| match port.port {
        0 if config.host_network => free_port(),
        0 => u16::try_from(5000 + index).map_err(|_| Error::invalid_field("config.ports", "too many ports")),
        given => Ok(given),
    };
    config.ports.iter().enumerate().map(number).collect()
}

/// Whether a job has nothing that only the platform's own have: it can do with what AppArmor leaves it.
pub fn is_ordinary(job: &Job, launch: &Launch) -> bool {
    !is_system(job)
        && launch
            .capabilities
            .beyond(caps::Set::default_container())
            .is_none()
}

/// What the supervisor is told. `binds` are volumes and certificates, in front of the job's own mounts. Which user
/// namespace a job has of its own is left open, and whether it is confined by AppArmor.
pub fn launch(
    job: &Job,
    host: &Host<'_>,
    manifests: &[ImageManifest],
    ports: &[u16],
    binds: Vec<Bind>,
) -> Result<Launch> {
    let config = &job.config;
    let default = Entrypoint::default();
    let entrypoint = manifests
        .last()
        .and_then(ImageManifest::default_entrypoint)
        .unwrap_or(&default);
    let (capabilities, ambient) = capabilities(config, entrypoint)?;
    // Whoever makes an image decides what runs in a container, not what a container may do to its host.
    let beyond = capabilities.beyond(caps::Set::default_container());
    if config.linux_capabilities.is_none()
        && !is_system(job)
        && let Some(name) = beyond
    {
        return Err(Error::invalid_field(
            "artifacts",
            format!(
                "the image asks for CAP_{name}, which only jobs of the platform may have: build it without"
            ),
        ));
    }
    let args = if config.args.is_empty() {
        &entrypoint.args
    } else {
        &config.args
    };
    if args.is_empty() {
        return Err(Error::invalid_field(
            "config.args",
            "neither the job nor its image says which program to start",
        ));
    }
    let label = |name| job.metadata.get(name).cloned().unwrap_or_default();
    let hostname: String = job.id.chars().take(63).collect();
    let mounts = config.mounts.iter().map(|mount| Bind {
        source: PathBuf::from(&mount.target),
        target: PathBuf::from(&mount.location),
        writable: mount.writeable,
        ids_of_container: false,
    });
    let working_dir = config
        .working_dir
        .clone()
        .or_else(|| entrypoint.working_dir.clone());
    let uid = config.uid.or(entrypoint.uid).unwrap_or(0);
    Ok(Launch {
        version: 1,
        job_id: job.id.clone(),
        process_type: label(label::PROCESS_TYPE),
        app_id: label(label::APP_ID),
        socket: Paths::socket(&job.id),
        host_ip: host.address,
        args: args.clone(),
        env: environment(job, host, entrypoint, ports, &hostname),
        working_dir: working_dir
            .filter(|dir| dir.starts_with('/'))
            .unwrap_or_else(|| "/".into()),
        uid,
        gid: config.gid.or(entrypoint.gid).unwrap_or(uid),
        capabilities,
        ambient,
        tty: config.tty,
        tty_size: config.tty_size,
        stdin: config.stdin,
        disable_log: config.disable_log,
        layers: layers(manifests)?.into_iter().map(Paths::layer_mount).collect(),
        binds: binds.into_iter().chain(mounts).collect(),
        hostname,
        host_network: config.host_network,
        host_pid_namespace: config.host_pid_namespace,
        user_namespace: host_users(job, capabilities).map(UserNamespace::Without),
        apparmor: false,
        partition: job.partition,
        limits: limits(job),
        // One of an earlier version was not refused for being too small.
        temp_disk: temp_disk(job).map(|size| size.max(Resources::MIN_TEMP_DISK)),
        max_files: job.resources.limit("max_fd"),
        ports: ports.to_vec(),
        services: services(config, ports),
        instance_meta: instance_meta(job, host),
        stop_timeout: job.stop_timeout.unwrap_or(30),
        resurrect: job.resurrect,
    })
}

/// How much the job's container may write, if there is a limit.
fn temp_disk(job: &Job) -> Option<u64> {
    Some(job.resources.limit("temp_disk")).filter(|size| *size > 0)
}

/// What the job's cgroups are told.
pub fn limits(job: &Job) -> Limits {
    let limit = |name| job.resources.limit(name);
    Limits {
        memory: limit("memory"),
        swap: limit("swap"),
        cpu: limit("cpu"),
        cpu_weight: limit("cpu_weight"),
        cpuset: job.config.cpuset.clone().unwrap_or_default(),
        pids: limit("max_pids"),
        io_weight: limit("io_weight"),
        io_read: limit("io_read"),
        io_write: limit("io_write"),
    }
}

fn environment(job: &Job, host: &Host<'_>, entrypoint: &Entrypoint, ports: &[u16], hostname: &str) -> Env {
    let mut env = entrypoint.env.clone();
    env.extend(job.config.env.clone());
    let mut set = |name: &str, value: String| env.insert(name.to_owned(), value);
    set("HOSTNAME", hostname.to_owned());
    set("HOST_ID", host.id.to_owned());
    set("FLYNN_HOST_ID", host.id.to_owned());
    set("HOST_IP", host.address.to_string());
    if let Some(port) = ports.first() {
        set("PORT", port.to_string());
    }
    for (index, port) in ports.iter().enumerate() {
        set(&format!("PORT_{index}"), port.to_string());
    }
    if job.config.tty {
        env.entry("TERM".into()).or_insert_with(|| "xterm".into());
    }
    env
}

fn services(config: &ContainerConfig, ports: &[u16]) -> Vec<Service> {
    let own = config.ports.iter().zip(ports).filter_map(|(port, number)| {
        let service = port.service.as_ref().filter(|service| !service.self_registered)?;
        Some(Service {
            name: service.name.clone(),
            create: service.create,
            port: *number,
            proto: port.proto.clone(),
            check: service.check.clone(),
        })
    });
    own.collect()
}

/// The labels of the job's instances in discoverd.
fn instance_meta(job: &Job, host: &Host<'_>) -> Meta {
    let labels = [
        ("FLYNN_APP_ID", label::APP_ID),
        ("FLYNN_APP_NAME", label::APP_NAME),
        ("FLYNN_RELEASE_ID", label::RELEASE_ID),
        ("FLYNN_PROCESS_TYPE", label::PROCESS_TYPE),
    ];
    let mut meta: Meta = labels
        .into_iter()
        .filter_map(|(name, label)| Some((name.to_owned(), job.metadata.get(label)?.clone())))
        .collect();
    meta.insert("FLYNN_JOB_ID".into(), job.id.clone());
    meta.insert("FLYNN_HOST_ID".into(), host.id.to_owned());
    meta
}

#[cfg(test)]
mod tests {
    use flynn_api::host::{Mount, Port, Service as PortService, VolumeBinding};
    use flynn_api::image::{Artifact, Layer};
    use flynn_api::resources::Resource;

    use super::*;

    const HOST: Host<'_> = Host {
        id: "one",
        address: Ipv4Addr::new(192, 0, 2, 1),
    };

    fn manifest(args: &[&str]) -> ImageManifest {
        let entrypoint = Entrypoint {
            args: args.iter().map(ToString::to_string).collect(),
            env: Env::from([("A".into(), "image".into()), ("B".into(), "image".into())]),
            uid: Some(7),
            ..Entrypoint::default()
        };
        ImageManifest::new(entrypoint, vec![Layer::squashfs(Digest::of(b"layer"), 5)])
    }

    fn job() -> Job {
        Job {
            id: "one-1".into(),
            artifacts: vec![Artifact::image(manifest(&["/app"]), "", None)],
            ..Job::default()
        }
    }

    #[test]
    fn apps_have_users_of_their_own() {
        type Change = fn(&mut Job);
        let cases: [(Option<&str>, Change); 7] = [
            (None, |_| {}),
            (None, |job| {
                job.config.linux_capabilities = Some(vec!["CAP_CHOWN".into()]);
            }),
            (Some("asks for"), |job| job.config.host_user_namespace = true),
            (Some("network"), |job| job.config.host_network = true),
            (Some("pid namespace"), |job| {
                job.config.host_pid_namespace = true;
            }),
            (Some("CAP_NET_ADMIN"), |job| {
                job.config.linux_capabilities = Some(vec!["CAP_CHOWN".into(), "CAP_NET_ADMIN".into()]);
            }),
            (Some("platform"), |job| {
                job.metadata.insert(label::SYSTEM_APP.into(), "true".into());
            }),
        ];
        for (wanted, change) in cases {
            let mut job = job();
            change(&mut job);
            let launch = launch(&job, &HOST, &[manifest(&["/app"])], &[], Vec::new()).unwrap();
            match (wanted, &launch.user_namespace) {
                (None, None) => {}
                (Some(wanted), Some(UserNamespace::Without(why))) if why.contains(wanted) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn what_an_earlier_version_wrote_is_of_the_hosts_users() {
        let mut launch = launch(&job(), &HOST, &[manifest(&["/app"])], &[], Vec::new()).unwrap();
        launch.user_namespace = Some(UserNamespace::FirstId(1 << 20));
        let mut written = serde_json::to_value(&launch).unwrap();
        assert_eq!(
            serde_json::from_value::<Launch>(written.clone())
                .unwrap()
                .first_id(),
            Some(1 << 20)
        );
        written.as_object_mut().unwrap().remove("user_namespace");
        let read: Launch = serde_json::from_value(written).unwrap();
        assert_eq!((read.user_namespace, read.version), (None, 1));
        // Users that the container has not are users of the host's.
        launch.gid = 65_536;
        let error = launch.check_ids().unwrap_err();
        assert!(error.message.starts_with("config.gid: 65536"), "{error}");
        launch.user_namespace = None;
        assert!(launch.check_ids().is_ok());
    }

    #[test]
    fn the_image_is_under_the_job_and_the_host_over_both() {
        let mut job = job();
        job.config.env = Env::from([("B".into(), "job".into()), ("HOST_ID".into(), "liar".into())]);
        job.config.ports = vec![
            Port {
                port: 0,
                proto: "tcp".into(),
                ..Port::default()
            },
            Port {
                port: 80,
                proto: "tcp".into(),
                service: Some(PortService {
                    name: "web".into(),
                    create: true,
                    ..PortService::default()
                }),
            },
        ];
        let numbers = ports(&job.config, || unreachable!()).unwrap();
        let launch = launch(&job, &HOST, &[manifest(&["/app"])], &numbers, Vec::new()).unwrap();
        let shown = |name: &str| launch.env.get(name).map(String::as_str);
        assert_eq!(
            (shown("A"), shown("B"), shown("HOST_ID")),
            (Some("image"), Some("job"), Some("one"))
        );
        assert_eq!(
            (shown("PORT"), shown("PORT_1"), shown("TERM")),
            (Some("5000"), Some("80"), None)
        );
        assert_eq!(
            (launch.args.as_slice(), launch.uid, launch.gid),
            (&["/app".to_owned()][..], 7, 7)
        );
        assert_eq!(launch.services.len(), 1);
        assert_eq!(launch.instance_meta["FLYNN_JOB_ID"], "one-1");
    }

    #[test]
    fn images_grant_no_capabilities() {
        let mut image = manifest(&["/app"]);
        let launched = |job: &Job, image: &ImageManifest| {
            launch(job, &HOST, std::slice::from_ref(image), &[], Vec::new()).map(|launch| launch.capabilities)
        };
        let default = caps::Set::default_container();
        for (asked, refused) in [
            ("CAP_KILL", false),
            ("CAP_NET_RAW", true),
            ("CAP_SYS_ADMIN", true),
        ] {
            let mut entrypoint = image.default_entrypoint().unwrap().clone();
            entrypoint.capabilities = vec![asked.into()];
            image = ImageManifest::new(entrypoint, vec![Layer::squashfs(Digest::of(b"layer"), 5)]);
            let granted = launched(&job(), &image);
            assert_eq!(granted.is_err(), refused, "{granted:?}");
            let mut system = job();
            system.metadata.insert(label::SYSTEM_APP.into(), "true".into());
            let granted = launched(&system, &image).unwrap();
            assert_eq!(granted, default.union(caps::Set::of_names(&[asked]).unwrap()));
        }
    }

    #[test]
    fn jobs_that_break_a_rule_are_refused_with_the_field() {
        type Change = fn(&mut Job);
        let cases: [(&str, Change); 14] = [
            ("id", |job| job.id = "two-1".into()),
            ("id", |job| job.id = "one-../x".into()),
            ("artifacts", |job| job.artifacts.clear()),
            ("resources", |job| {
                {
                    job.resources.0.insert("memroy".into(), Resource::default());
                };
            }),
            ("resources.memory", |job| {
                job.resources.0.insert(
                    "memory".into(),
                    Resource {
                        request: None,
                        limit: Some(1),
                    },
                );
            }),
            ("config.env", |job| {
                drop(job.config.env.insert("A=B".into(), String::new()));
            }),
            ("config.args", |job| job.config.args = vec!["a\0".into()]),
            ("config.working_dir", |job| {
                job.config.working_dir = Some("x".into());
            }),
            ("config.volumes.volume", |job| {
                job.config.volumes = vec![VolumeBinding {
                    path: "/data".into(),
                    volume_id: "../x".into(),
                    ..VolumeBinding::default()
                }];
            }),
            ("config.volumes.target", |job| {
                job.config.volumes = vec![VolumeBinding {
                    path: "/data/../proc".into(),
                    volume_id: "v".into(),
                    ..VolumeBinding::default()
                }];
            }),
            ("config.mounts", |job| job.config.mounts = vec![Mount::default()]),
            ("config.ports.proto", |job| {
                job.config.ports = vec![Port::default()];
            }),
            ("config.ports.service.check.type", |job| {
                let check = HealthCheck {
                    kind: "ping".into(),
                    ..HealthCheck::default()
                };
                let service = PortService {
                    name: "a".into(),
                    check: Some(check),
                    ..PortService::default()
                };
                job.config.ports = vec![Port {
                    port: 1,
                    proto: "tcp".into(),
                    service: Some(service),
                }];
            }),
            ("linux_capabilities", |job| {
                job.config.linux_capabilities = Some(vec!["CAP_FLY".into()]);
            }),
        ];
        assert!(check(&job(), "one").is_ok());
        for (field, change) in cases {
            let mut job = job();
            change(&mut job);
            let error = check(&job, "one").expect_err(field);
            assert!(
                error.message.starts_with(&format!("{field}: ")),
                "{field}: {error}"
            );
        }
    }
}
