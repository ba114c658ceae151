//! What the network allows a job.

use std::num::NonZeroU64;

use flynn_api::Result;
use flynn_api::host::{Job, label};
use flynn_api::network::OPERATOR;
use flynn_overlay::{Attachment, Identity, Limits, Port, Protocol};

use super::Attached;
use crate::daemon::Daemon;
use crate::prepare;

fn attached(job: &Job, identity: Identity) -> Attached {
    let label = |name| job.metadata.get(name).cloned().unwrap_or_default();
    Attached {
        attachment: attachment(job, identity),
        owner: (label(label::APP_NAME), label(label::PROCESS_TYPE)),
    }
}

/// For a job with this identity. Of its ports those are open to every job which have a service.
fn attachment(job: &Job, identity: Identity) -> Attachment {
    let given = prepare::ports(&job.config, || Ok(0)).unwrap_or_default();
    let ports = job.config.ports.iter().zip(given);
    let open = ports
        .filter(|(port, _)| port.service.is_some())
        .map(|(port, number)| Port {
            protocol: match port.proto.as_str() {
                "udp" => Protocol::Udp,
                _ => Protocol::Tcp,
            },
            number,
        });
    Attachment {
        identity,
        system: prepare::is_system(job),
        open_ports: open.collect(),
        limits: Limits {
            sent: NonZeroU64::new(job.resources.limit("network_out")),
            received: NonZeroU64::new(job.resources.limit("network_in")),
        },
    }
}

impl Daemon {
    /// What the network allows a job that is started.
    pub(crate) async fn attached(&self, job: &Job) -> Result<Attached> {
        let identity = match job.metadata.get(label::APP_ID) {
            Some(app) => self.app_identity(app, prepare::is_system(job)).await?,
            None => OPERATOR,
        };
        Ok(attached(job, identity))
    }

    /// What it allows a job that an earlier daemon attached: by what that knew.
    pub(crate) fn known_attached(&self, job: &Job) -> Attached {
        let app = job.metadata.get(label::APP_ID);
        let identity = app.and_then(|app| self.known_identity(app));
        attached(job, identity.unwrap_or(OPERATOR))
    }
}

#[cfg(test)]
mod tests {
    use flynn_api::host::{Port as JobPort, Service};
    use flynn_api::resources::Resource;

    use super::*;

    #[test]
    fn ports_with_a_service_are_open() {
        let mut job = Job::default();
        let port = |number, proto: &str, service| JobPort {
            port: number,
            proto: proto.into(),
            service,
        };
        let service = || Some(Service::default());
        job.config.ports = vec![
            port(80, "tcp", service()),
            port(81, "tcp", None),
            port(0, "udp", service()),
        ];
        let limit = Resource {
            limit: Some(1 << 20),
            ..Resource::default()
        };
        job.resources.0.insert("network_out".into(), limit);
        let attachment = attachment(&job, 20);
        let open: Vec<_> = attachment
            .open_ports
            .iter()
            .map(|port| (port.protocol, port.number))
            .collect();
        assert_eq!(open, [(Protocol::Tcp, 80), (Protocol::Udp, 5002)]);
        assert_eq!((attachment.identity, attachment.system), (20, false));
        assert_eq!(attachment.limits.sent, NonZeroU64::new(1 << 20));
        assert_eq!(attachment.limits.received, None);
    }
}
