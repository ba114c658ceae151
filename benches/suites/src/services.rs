//! The suite `services`: what a service's virtual address costs over an instance's own, and what ten thousand services
//! with a hundred thousand instances cost.
//!
//! Everything is on the loopback device of a namespace made here, in a cgroup made here.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use flynn_dataplane::Prefix;
use flynn_dataplane::service::{Instance, Services};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;

use crate::row::{Goal, Row, Subject, median};
use crate::samples::in_turns;
use crate::suites::Thoroughness;

const NETWORK4: Prefix<Ipv4Addr> = Prefix {
    address: Ipv4Addr::new(100, 101, 0, 0),
    length: 16,
};
const NETWORK6: Ipv6Addr = Ipv6Addr::new(0xfd66, 0x6c79, 0x6e73, 0, 0, 0, 0, 0);
const INSTANCE: Ipv4Addr = Ipv4Addr::LOCALHOST;
const STRAIGHT: &str = "straight to the instance";

/// How much there is in the large.
const SERVICES: u32 = 10_000;
const INSTANCES_EACH: u32 = 10;

const fn subject(name: &'static str, unit: &'static str, peer: Option<&'static str>, goal: Goal) -> Subject {
    Subject {
        suite: "services",
        name,
        unit,
        peer,
        goal,
    }
}

const REQUEST: Subject = subject(
    "a request over a connection to a service address",
    "µs",
    Some(STRAIGHT),
    Goal::RatioAtMost(1.03),
);
const CONNECT: Subject = subject(
    "connecting to a service address, dearer than to its instance by",
    "µs",
    None,
    Goal::AtMost(2.0),
);
const BYSTANDER: Subject = subject(
    "connecting to no service at all, dearer than without the programs by",
    "µs",
    None,
    Goal::AtMost(0.5),
);
const MEMORY: Subject = subject(
    "10,000 services with 100,000 instances: memory of the maps",
    "MB",
    None,
    Goal::AtMost(64.0),
);
const REBUILD: Subject = subject(
    "10,000 services with 100,000 instances: written from nothing in",
    "ms",
    None,
    Goal::AtMost(1000.0),
);
const REOPEN: Subject = subject(
    "10,000 services with 100,000 instances: taken over by a new process in",
    "ms",
    None,
    Goal::AtMost(1000.0),
);
const CHANGE: Subject = subject(
    "one change of a service, of 10,000",
    "µs",
    Some("of 10"),
    Goal::RatioAtMost(1.25),
);

/// Takes all rows.
pub(crate) fn run(thoroughness: Thoroughness) -> Result<Vec<Row>> {
    // In a thread, for it goes into namespaces and a cgroup that the rest of the process has no part in.
    thread::spawn(move || measured(thoroughness))
        .join()
        .map_err(|_| anyhow::anyhow!("the benchmark's thread has panicked"))?
}

fn measured(thoroughness: Thoroughness) -> Result<Vec<Row>> {
    flynn_lab::unshare(UnshareFlags::NEWNET | UnshareFlags::NEWNS)
        .context("cannot make namespaces; this needs root")?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let bpffs = tempfile::tempdir()?;
    mount("bpf", bpffs.path(), "bpf", MountFlags::empty(), None).context("cannot mount a BPF file system")?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
    ensure!(up.success(), "cannot bring the loopback device up");
    let cgroup = Cgroup::create()?;
    let mut services = open(bpffs.path(), &cgroup)?;
    let mut rows = cost(&mut services, &cgroup, thoroughness)?;
    rows.extend(large(services, bpffs.path(), &cgroup, thoroughness)?);
    Ok(rows)
}

fn open(bpffs: &Path, cgroup: &Cgroup) -> Result<Services> {
    let mut services = Services::open(&bpffs.join("flynn"))?;
    services.attach(&cgroup.path)?;
    services.configure(NETWORK4, NETWORK6)?;
    Ok(services)
}

fn virtual_of(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(NETWORK4.address.to_bits() + 2 * number)
}

/// The most connections that may wait for being accepted: as many as the kernel allows by itself.
const WAITING: i32 = 4096;

/// What jobs pay.
fn cost(services: &mut Services, cgroup: &Cgroup, thoroughness: Thoroughness) -> Result<Vec<Row>> {
    let instance = Instance {
        id: 1,
        address: INSTANCE.into(),
        address6: None,
    };
    services.set(1, &[instance], None)?;
    let listener = TcpListener::bind((INSTANCE, 0))?;
    // All connections of one round may wait: one that is turned away comes back after a second.
    rustix::net::listen(&listener, WAITING)?;
    let port = listener.local_addr()?.port();
    // Answers one connection after the other; it ends with the process.
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let _ = stream.set_nodelay(true);
            let mut byte = [0; 1];
            while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
        }
    });
    let by_service = SocketAddr::from((virtual_of(1), port));
    let straight = SocketAddr::from((INSTANCE, port));
    let rounds = thoroughness.pick(7, 25);

    cgroup.enter()?;
    let count = thoroughness.pick(5_000, 20_000);
    let requests = in_turns(&mut [by_service, straight], rounds, |to| request_cost(*to, count))?;

    let count = thoroughness.pick(2_000, 4_000);
    let mut places = [Some(by_service), Some(straight), None];
    let connects = in_turns(&mut places, rounds, |place| {
        match place {
            Some(_) => cgroup.enter()?,
            None => cgroup.leave()?,
        }
        connect_cost(place.unwrap_or(straight), count)
    })?;
    cgroup.leave()?;
    let dearer = |ours: &[f64], theirs: &[f64]| -> Vec<f64> {
        ours.iter()
            .zip(theirs)
            .map(|(ours, theirs)| ours - theirs)
            .collect()
    };
    Ok(vec![
        REQUEST.row(&requests[0], &requests[1]),
        CONNECT.row(&dearer(&connects[0], &connects[1]), &[]),
        BYSTANDER.row(&dearer(&connects[1], &connects[2]), &[]),
    ])
}

/// The median time of a request and its answer, in µs.
fn request_cost(to: SocketAddr, count: usize) -> Result<f64> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    let mut byte = [7; 1];
    timed(count, || {
        stream.write_all(&byte)?;
        Ok(stream.read_exact(&mut byte)?)
    })
}

/// The median time of `connect`, in µs.
fn connect_cost(to: SocketAddr, count: usize) -> Result<f64> {
    let mut samples = Vec::with_capacity(count);
    for _ in 0..count {
        let begun = Instant::now();
        let stream = TcpStream::connect(to)?;
        samples.push(micros(begun.elapsed()));
        // Reset, so that ports do not run out.
        rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
    }
    median(&samples).context("nothing was measured")
}

fn timed(count: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut samples = Vec::with_capacity(count);
    for _ in 0..count {
        let begun = Instant::now();
        work()?;
        samples.push(micros(begun.elapsed()));
    }
    median(&samples).context("nothing was measured")
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// The instances of one of many services.
fn instances(number: u32) -> Vec<Instance> {
    let first = number * INSTANCES_EACH;
    (first..first + INSTANCES_EACH)
        .map(|id| Instance {
            id: id.into(),
            address: Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 0).to_bits() + id).into(),
            address6: None,
        })
        .collect()
}

/// What a large cluster costs each of its hosts.
fn large(
    mut services: Services,
    bpffs: &Path,
    cgroup: &Cgroup,
    thoroughness: Thoroughness,
) -> Result<Vec<Row>> {
    let rounds = thoroughness.pick(3, 7);
    let (mut rebuilds, mut reopens, mut at_many, mut at_few) = (vec![], vec![], vec![], vec![]);
    let mut memory = 0;
    for _ in 0..rounds {
        for number in services.numbers() {
            services.remove(number)?;
        }
        for number in 1..=10 {
            services.set(number, &instances(number), instances(number).first().copied())?;
        }
        at_few.push(change_cost(&mut services, thoroughness)?);
        let begun = Instant::now();
        for number in 1..=SERVICES {
            let instances = instances(number);
            services.set(number, &instances, instances.first().copied())?;
        }
        rebuilds.push(millis(begun.elapsed()));
        at_many.push(change_cost(&mut services, thoroughness)?);
        memory = services
            .memory()?
            .into_iter()
            .map(|(_, bytes)| bytes)
            .sum::<u64>();
        drop(services);
        let begun = Instant::now();
        services = open(bpffs, cgroup)?;
        reopens.push(millis(begun.elapsed()));
        ensure!(services.numbers().len() == SERVICES as usize, "services got lost");
    }
    #[expect(clippy::cast_precision_loss, reason = "a size in megabytes")]
    let memory = memory as f64 / 1e6;
    Ok(vec![
        MEMORY.row(&[memory], &[]),
        REBUILD.row(&rebuilds, &[]),
        REOPEN.row(&reopens, &[]),
        CHANGE.row(&at_many, &at_few),
    ])
}

/// The median time until an instance less or more, and another leader, are in the maps, in µs.
fn change_cost(services: &mut Services, thoroughness: Thoroughness) -> Result<f64> {
    let all = instances(5);
    let mut more = false;
    timed(thoroughness.pick(500, 2_000), || {
        more = !more;
        let wanted = &all[usize::from(!more)..];
        Ok(services.set(5, wanted, wanted.first().copied())?)
    })
}

/// A cgroup that this thread alone can be in.
struct Cgroup {
    parent: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    fn create() -> Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "));
        let mount = mount
            .and_then(|line| line.split(' ').nth(4))
            .context("no cgroup v2 is mounted")?;
        let own = fs::read_to_string("/proc/thread-self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
        let parent = Path::new(mount).join(own.context("this process is in no cgroup v2")?);
        let path = parent.join(format!("flynn-bench-{}", std::process::id()));
        fs::create_dir(&path)?;
        let cgroup = Self { parent, path };
        fs::write(cgroup.path.join("cgroup.type"), "threaded").context("the cgroup takes no threads")?;
        Ok(cgroup)
    }

    fn enter(&self) -> Result<()> {
        move_to(&self.path)
    }

    fn leave(&self) -> Result<()> {
        move_to(&self.parent)
    }
}

fn move_to(cgroup: &Path) -> Result<()> {
    let thread = rustix::thread::gettid().as_raw_nonzero();
    Ok(fs::write(cgroup.join("cgroup.threads"), thread.to_string())?)
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = self.leave().and_then(|()| Ok(fs::remove_dir(&self.path)?)) {
            eprintln!("the cgroup {} is left: {error}", self.path.display());
        }
    }
}
