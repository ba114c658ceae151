//! The thread that brings the maps to what is known, and ends connections that lead nowhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use flynn_api::discovery::{EventKind, VirtualNetworks};
use flynn_api::host::{ServiceInstance, ServiceStatus};
use flynn_dataplane::Prefix;
use flynn_dataplane::service::{Flows, Instance, Services};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::model::Model;
use super::{News, RETRY};
use crate::daemon::Daemon;

/// After a change, connections are looked through at once and once more: one may have been about to be made.
const SECOND_LOOK: Duration = Duration::from_secs(1);

/// The keeper of this host's virtual addresses.
pub(super) struct Keeper {
    daemon: Arc<Daemon>,
    services: Services,
    model: Model,
    /// What a stream that has begun tells of, until it has told everything.
    coming: Option<Model>,
    networks: Option<VirtualNetworks>,
    /// Services whose entries are not right.
    unwritten: BTreeSet<u32>,
    /// When connections are to be looked through next.
    look: Option<Instant>,
    /// Whether that is the second look after a change.
    second_look: bool,
    /// Addresses where nobody is any more, for the next two looks.
    dead: BTreeMap<SocketAddr, u8>,
    said: bool,
}

impl Keeper {
    pub(super) fn new(daemon: Arc<Daemon>, services: Services) -> Self {
        Self {
            daemon,
            services,
            model: Model::default(),
            coming: None,
            networks: None,
            unwritten: BTreeSet::new(),
            look: None,
            second_look: false,
            dead: BTreeMap::new(),
            said: false,
        }
    }

    /// Until the senders of news are gone.
    pub(super) fn run(mut self, runtime: &Handle, mut news: mpsc::Receiver<News>) {
        loop {
            let now = Instant::now();
            let farewell = self.model.next_farewell(now);
            let retry = (!self.unwritten.is_empty()).then(|| now + RETRY);
            let wake = [self.look, farewell, retry].into_iter().flatten().min();
            let received = runtime.block_on(async {
                match wake {
                    Some(wake) => tokio::time::timeout_at(wake.into(), news.recv()).await.ok(),
                    None => Some(news.recv().await),
                }
            });
            match received {
                Some(Some(first)) => {
                    self.take(first);
                    // All that is there already is one change.
                    while let Ok(more) = news.try_recv() {
                        self.take(more);
                    }
                }
                Some(None) => return,
                None if farewell == wake => self.look_now(now),
                None => {}
            }
            self.write();
            if self.look.is_some_and(|look| look <= Instant::now()) {
                self.sever();
            }
        }
    }

    fn take(&mut self, news: News) {
        let now = Instant::now();
        match news {
            News::Begin(networks) => {
                self.coming = Some(Model::default());
                self.networks = Some(networks);
            }
            News::Event(event) if event.kind == EventKind::Current => {
                if let Some(mut coming) = self.coming.take() {
                    let known = self.services.numbers().into_iter().flat_map(|number| {
                        let (instances, _) = self.services.service(number);
                        instances.iter().map(move |instance| (number, instance.id))
                    });
                    coming.inherit(&self.model, known, now);
                    self.model = coming;
                    self.unwritten = self.model.numbers().chain(self.services.numbers()).collect();
                    self.look_now(now);
                    self.configure();
                }
            }
            // Nobody waits any more if the caller has gone.
            News::Show(answer) => drop(answer.send(self.show())),
            News::Event(event) => {
                if let Some(coming) = &mut self.coming {
                    coming.take(&event, now);
                    return;
                }
                let change = self.model.take(&event, now);
                self.unwritten.extend(change.numbers);
                if let (EventKind::Up, Some(up)) = (event.kind, &event.instance) {
                    self.dead.retain(|addr, _| addr.to_string() != up.addr);
                }
                self.dead.extend(change.dead.map(|addr| (addr, 2)));
                if change.severs {
                    self.look_now(now);
                }
            }
        }
    }

    /// What the maps say, with the names that discoverd has for it; nothing before that has told of its networks.
    fn show(&self) -> Option<Vec<ServiceStatus>> {
        let networks = self.networks?;
        let of = |number| {
            let (instances, leader) = self.services.service(number);
            let instance = |instance: &Instance| ServiceInstance {
                index: instance.id,
                address: instance.address,
                address6: instance.address6,
                leader: leader.is_some_and(|leader| leader.id == instance.id),
            };
            let mut instances: Vec<_> = instances.iter().map(instance).collect();
            instances.sort_by_key(|instance| instance.index);
            ServiceStatus {
                service: self.model.name(number).unwrap_or_default().to_owned(),
                addresses: networks.addresses(number),
                instances,
            }
        };
        let numbers: BTreeSet<u32> = self.model.numbers().chain(self.services.numbers()).collect();
        let mut services: Vec<_> = numbers.into_iter().map(of).collect();
        services.sort_by(|a, b| a.service.cmp(&b.service));
        Some(services)
    }

    fn configure(&mut self) {
        let Some(networks) = self.networks else { return };
        let network4 = Prefix {
            address: networks.ipv4.network(),
            length: networks.ipv4.prefix_len(),
        };
        let configured = self.services.configure(network4, networks.ipv6.network());
        self.say(configured);
    }

    /// Brings to the maps what they do not have. What cannot be written is tried again.
    fn write(&mut self) {
        let up = self.daemon.network.peek();
        let ipv6 = |address: Ipv4Addr| -> Option<Ipv6Addr> { up.as_ref()?.ipv6_of(address) };
        let mut failed = BTreeSet::new();
        for number in std::mem::take(&mut self.unwritten) {
            let (instances, leader) = self.model.entries(number, ipv6);
            let written = self.services.set(number, &instances, leader);
            if !self.say(written) {
                failed.insert(number);
            }
        }
        self.unwritten = failed;
    }

    /// Whether it has worked; the first of failures in a row is logged.
    fn say(&mut self, done: flynn_dataplane::Result<()>) -> bool {
        match done {
            Ok(()) => {
                self.said = false;
                true
            }
            Err(error) => {
                if !self.said {
                    tracing::error!(%error, "virtual addresses are not up to date; trying on");
                }
                self.said = true;
                false
            }
        }
    }

    /// Looks through the connections of all jobs, and of the host.
    fn sever(&mut self) {
        let dead: Vec<SocketAddr> = self.dead.keys().copied().collect();
        let sockets = self.services.flows().map(|flows| {
            let namespaces = self.namespaces();
            namespaces
                .iter()
                .map(|namespace| self.sever_in(namespace, &flows, &dead))
                .sum::<usize>()
        });
        let (model, now) = (&self.model, Instant::now());
        let packets = self
            .services
            .sever_packets(|flow| model.is_gone(flow, now), &dead);
        for severed in [sockets, packets] {
            match severed {
                Ok(0) => {}
                Ok(severed) => tracing::info!(severed, "connections to instances that are gone are ended"),
                Err(error) => tracing::error!(%error, "connections cannot be looked through"),
            }
        }
        self.dead.retain(|_, looks| {
            *looks -= 1;
            *looks > 0
        });
        self.second_look = !self.second_look;
        self.look = self.second_look.then(|| Instant::now() + SECOND_LOOK);
    }

    fn look_now(&mut self, now: Instant) {
        self.look = Some(now);
        self.second_look = false;
    }

    fn sever_in(&self, namespace: &File, flows: &Flows, dead: &[SocketAddr]) -> usize {
        let now = Instant::now();
        let enter = |to: &File| move_into_link_name_space(to.as_fd(), Some(LinkNameSpaceType::Network));
        let severed = enter(namespace)
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(flows.sever(|flow| self.model.is_gone(flow, now), dead)?));
        severed.unwrap_or_else(|error| {
            tracing::warn!(%error, "connections of a job cannot be looked through");
            0
        })
    }

    /// The network namespaces of the host and of all jobs that run, each once; this thread's, the host's, last.
    fn namespaces(&self) -> Vec<File> {
        let supervisors = self
            .daemon
            .table
            .all()
            .into_iter()
            .filter_map(|entry| entry.status.supervisor);
        let paths = supervisors.map(|supervisor| format!("/proc/{}/ns/net", supervisor.pid));
        let mut by_inode = BTreeMap::new();
        let host = File::open("/proc/self/ns/net").ok();
        let host_inode = host.as_ref().and_then(|host| Some(host.metadata().ok()?.ino()));
        for path in paths {
            // A job may have ended since.
            let Ok(namespace) = File::open(path) else { continue };
            if let Ok(metadata) = namespace.metadata() {
                by_inode.insert(metadata.ino(), namespace);
            }
        }
        by_inode.retain(|inode, _| Some(*inode) != host_inode);
        by_inode.into_values().chain(host).collect()
    }
}
