//! The suite `l4`: what balancing TCP and UDP in the kernel costs.
//!
//! - [`program`]: the program itself, over frames that a program makes and counts, beside a program that does nothing
//! - [`forward`]: new TCP connections to containers, beside HAProxy and the kernel's own address translation
//! - [`ring`]: Maglev's rings

mod forward;
mod load;
mod program;
mod ring;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use flynn_dataplane::{Dataplane, Host, Network, Prefix, Way, lb::Uplink};
use flynn_lab::netns;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{CpuSet, UnshareFlags, sched_setaffinity};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use crate::row::Row;
use crate::suites::Thoroughness;

const SUITE: &str = "l4";

/// The CPU that everything runs on.
const CPU: usize = 1;

/// Takes all rows.
pub(crate) fn run(thoroughness: Thoroughness) -> Result<Vec<Row>> {
    flynn_lab::unshare(UnshareFlags::NEWNS).context("cannot make a mount namespace; this needs root")?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let pins = tempfile::tempdir()?;
    mount("bpf", pins.path(), "bpf", MountFlags::empty(), None).context("mounting a BPF file system")?;
    let mut rows = ring::rows();
    rows.extend(program::rows(pins.path(), thoroughness));
    rows.extend(forward::rows(pins.path(), thoroughness));
    Ok(rows)
}

/// Keeps the calling thread, and what it starts, on the one CPU, and before whatever else runs there.
fn stay() -> Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(CPU);
    sched_setaffinity(None, &cpus).context("cannot stay on a CPU")?;
    rustix::process::setpriority_process(None, -20)?;
    // Where the kernel groups processes by session, priorities only hold within one; elsewhere there is no such file.
    let _ = std::fs::write("/proc/self/autogroup", "-20");
    Ok(())
}

/// A host of the cluster in the namespace of the calling thread: its data plane, and its uplink.
struct Node {
    pins: PathBuf,
    dataplane: Dataplane,
    uplink: Uplink,
}

/// The subnet of the host with this number.
fn container(host: u8, last: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 100, host, last)
}

fn address(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 0, 2, host)
}

impl Node {
    /// The host of this number, with another beside it.
    fn up(pins: &Path, number: u8, other: u8, interface: &str, direct: bool) -> Result<Self> {
        let pins = pins.join(format!("{interface}{number}"));
        let read = |what: &str| -> Result<String> {
            let text = netns::output(&["-o", "link", "show", "dev", interface])?;
            let mut words = text.split_whitespace().skip_while(|word| *word != what);
            Ok(words
                .nth(1)
                .with_context(|| format!("{interface} has no {what}"))?
                .to_owned())
        };
        let index = netns::output(&["-o", "link", "show", "dev", interface])?;
        let index: u32 = index.split(':').next().unwrap_or_default().trim().parse()?;
        let mut mac = [0; 6];
        for (byte, text) in mac.iter_mut().zip(read("link/ether")?.split(':')) {
            *byte = u8::from_str_radix(text, 16)?;
        }
        let uplink = Uplink {
            name: interface.to_owned(),
            index,
            mtu: read("mtu")?.parse()?,
            mac,
            is_device: false,
        };
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        let mut dataplane = Dataplane::open(&pins)?;
        dataplane.configure(&Network {
            cluster4: Prefix {
                address: container(0, 0),
                length: 16,
            },
            cluster6: None,
            gateway4: container(number, 1),
            gateway6: None,
            subnet_length: 24,
            address: Some(address(number)),
            tunnel_mtu: 1450,
            device: None,
            gateway_mac: GATEWAY,
        })?;
        dataplane.set_hosts(&[Host {
            subnet: container(other, 0),
            address: address(other),
            direct,
            encrypted: false,
            only_encrypted: false,
            way: Some(Way {
                ifindex: index,
                next_hop: address(other),
                source: address(number),
            }),
        }])?;
        Ok(Self {
            pins,
            dataplane,
            uplink,
        })
    }
}

const GATEWAY: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Where other processes find a namespace that we hold.
fn path(namespace: &OwnedFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd())
}

fn ip(namespace: &OwnedFd, lines: &str) -> Result<()> {
    netns::inside(namespace.as_fd(), || netns::ip(lines))
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn number(count: u64) -> f64 {
    count as f64
}

/// Tells of samples and their spread.
fn tell(name: &str, samples: &[f64], unit: &str) {
    let (least, most) = samples
        .iter()
        .fold((f64::MAX, f64::MIN), |(least, most), sample| {
            (least.min(*sample), most.max(*sample))
        });
    let median = crate::row::median(samples).unwrap_or(f64::NAN);
    eprintln!("  {name}: {median:.1} {unit} ({least:.1} to {most:.1})");
}
