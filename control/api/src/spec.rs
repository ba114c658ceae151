//! From a formation to the jobs of a host: what bootstrap and the scheduler put to `/host/jobs`, so that the one can
//! adopt what the other started.

use uuid::Uuid;

use crate::controller::{ExpandedFormation, ProcessType};
use crate::host::{ContainerConfig, Job, Partition, Port, Service, VolumeBinding, label};

/// The namespace of volume ids (RFC 9562, §5.5). It must never change: data would be lost from sight.
const VOLUMES: Uuid = Uuid::from_u128(0x1b4d_3f7e_6a51_4c0e_9f0c_2d6a_8e35_b7c9);

/// The process type that is routed to unless something else is said.
const WEB: &str = "web";

impl ExpandedFormation {
    /// The job `id` of a process type; `None` when the release has no such type.
    ///
    /// Environment: the release's, over it the process type's, over that who the job is (the image's lies beneath,
    /// `PORT` and the like above; both are the host's doing). `volume_index` tells apart the volumes of jobs of the
    /// same app and type.
    pub fn job(&self, process_type: &str, id: &str, volume_index: u32) -> Option<Job> {
        let process = self.release.processes.get(process_type)?;
        let system = self.app.is_system();
        let mut metadata = crate::Meta::from([
            (label::APP_ID.into(), self.app.id.clone()),
            (label::APP_NAME.into(), self.app.name.clone()),
            (label::RELEASE_ID.into(), self.release.id.clone()),
            (label::PROCESS_TYPE.into(), process_type.into()),
        ]);
        if system {
            metadata.insert(label::SYSTEM_APP.into(), "true".into());
        }
        if process.omni {
            metadata.insert(label::OMNI.into(), "true".into());
        }
        let mut env = self.release.env.clone();
        env.extend(process.env.clone());
        env.extend([
            ("FLYNN_APP_ID".into(), self.app.id.clone()),
            ("FLYNN_APP_NAME".into(), self.app.name.clone()),
            ("FLYNN_RELEASE_ID".into(), self.release.id.clone()),
            ("FLYNN_PROCESS_TYPE".into(), process_type.into()),
            ("FLYNN_JOB_ID".into(), id.into()),
        ]);
        let volumes = process.volumes.iter().map(|volume| VolumeBinding {
            path: volume.path.clone(),
            volume_id: volume_id(&self.app.id, process_type, &volume.path, volume_index),
            delete_on_stop: volume.delete_on_stop,
            limit: volume.limit,
        });
        Some(Job {
            id: id.into(),
            metadata,
            artifacts: self.artifacts.clone(),
            config: ContainerConfig {
                args: process.args.clone(),
                env,
                ports: self.ports(process_type, process),
                volumes: volumes.collect(),
                mounts: process.mounts.clone(),
                host_network: process.host_network,
                host_pid_namespace: process.host_pid_namespace,
                host_user_namespace: process.host_user_namespace,
                linux_capabilities: process.linux_capabilities.clone(),
                ..ContainerConfig::default()
            },
            resources: process.resources.clone(),
            partition: if system {
                Partition::System
            } else {
                Partition::User
            },
            resurrect: process.resurrect,
            stop_timeout: None,
            generation: Some(self.generation),
        })
    }

    /// The ports of a process type. One that names its service, and `web`, are found even when no port says how:
    /// their first port (made up when there is none) carries the service.
    fn ports(&self, process_type: &str, process: &ProcessType) -> Vec<Port> {
        let mut ports = process.ports.clone();
        let name = match process.service.as_str() {
            "" if process_type == WEB => format!("{}-{WEB}", self.app.name),
            "" => return ports,
            service => service.to_owned(),
        };
        if ports.iter().all(|port| port.service.is_none()) {
            if ports.is_empty() {
                ports.push(Port {
                    port: 0,
                    proto: "tcp".into(),
                    service: None,
                });
            }
            ports[0].service = Some(Service {
                name,
                create: true,
                ..Service::default()
            });
        }
        ports
    }
}

/// The volume of a job: by app, process type, path and index, so that the jobs of the next release find it again.
pub fn volume_id(app_id: &str, process_type: &str, path: &str, index: u32) -> String {
    // A NUL is in none of the parts.
    let name = format!("{app_id}\0{process_type}\0{path}\0{index}");
    Uuid::new_v5(&VOLUMES, name.as_bytes()).to_string()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::controller::{App, Release, VolumeReq};

    fn formation(process_type: &str, process: ProcessType) -> ExpandedFormation {
        ExpandedFormation {
            app: App {
                id: "a".into(),
                name: "shop".into(),
                ..App::default()
            },
            release: Release {
                id: "r".into(),
                env: [
                    ("LEVEL".into(), "release".into()),
                    ("FLYNN_APP_ID".into(), "forged".into()),
                ]
                .into(),
                processes: BTreeMap::from([(process_type.into(), process)]),
                ..Release::default()
            },
            generation: 7,
            ..ExpandedFormation::default()
        }
    }

    #[test]
    fn environment_is_merged_in_order() {
        let process = ProcessType {
            env: [("LEVEL".into(), "process".into())].into(),
            ..ProcessType::default()
        };
        let job = formation("worker", process).job("worker", "h-1", 0).unwrap();
        assert_eq!(job.config.env["LEVEL"], "process");
        assert_eq!(
            job.config.env["FLYNN_APP_ID"], "a",
            "who a job is cannot be forged"
        );
        assert_eq!(job.config.env["FLYNN_JOB_ID"], "h-1");
        assert_eq!((job.generation, job.config.ports.len()), (Some(7), 0));
        assert!(
            formation("worker", ProcessType::default())
                .job("web", "h-1", 0)
                .is_none()
        );
    }

    #[test]
    fn services_are_named_where_nothing_else_is_said() {
        let service = |formation: ExpandedFormation, kind: &str| {
            let job = formation.job(kind, "h-1", 0).unwrap();
            job.config.ports[0].service.clone().unwrap().name
        };
        assert_eq!(
            service(formation("web", ProcessType::default()), "web"),
            "shop-web"
        );
        let named = ProcessType {
            service: "git".into(),
            ..ProcessType::default()
        };
        assert_eq!(service(formation("app", named), "app"), "git");
        let port = Port {
            port: 8080,
            proto: "tcp".into(),
            service: Some(Service {
                name: "own".into(),
                ..Service::default()
            }),
        };
        let own = ProcessType {
            ports: vec![port],
            ..ProcessType::default()
        };
        assert_eq!(service(formation("web", own), "web"), "own");
    }

    #[test]
    fn volumes_outlive_releases() {
        let volume = VolumeReq {
            path: "/data".into(),
            delete_on_stop: false,
            limit: None,
        };
        let mut formation = formation(
            "db",
            ProcessType {
                volumes: vec![volume],
                ..ProcessType::default()
            },
        );
        let first = formation.job("db", "h-1", 0).unwrap();
        formation.release.id = "next".into();
        let second = formation.job("db", "h-2", 0).unwrap();
        assert_eq!(first.config.volumes, second.config.volumes);
        assert_ne!(
            first.config.volumes,
            formation.job("db", "h-3", 1).unwrap().config.volumes
        );
        assert_eq!(
            volume_id("a", "db", "/data", 0),
            "9efbffa9-9001-5dfe-8ef2-cb0a3191b0ac",
            "must never change"
        );
    }
}
