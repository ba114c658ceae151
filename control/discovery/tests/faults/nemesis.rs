//! Makes faults happen, sees that they have, and mends them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use flynn_api::discovery::{PORT, Peer, Voting};
use flynn_lab::host_name;
use flynn_lab::netns;
use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rustix::fs::{FallocateFlags, fallocate};

use crate::bed::{Bed, HOSTS, hosts};
use crate::plan::{Fault, Round};
use crate::world::World;

/// How long a fault may take until it shows.
const PATIENCE: Duration = Duration::from_secs(20);
/// Of a hundred frames, how many a bad link loses.
const LOSS: u8 = 33;
const CUT: u8 = 100;
/// What makes a host slow: its heartbeats get through, most of the time.
const SLOW: [&str; 6] = ["rate", "150kbit", "burst", "1600", "latency", "400ms"];
/// What fills a disk.
const FILLER: &str = "filler";

pub(crate) struct Nemesis<'a> {
    bed: &'a Bed,
    world: &'a World,
    random: StdRng,
    happened: BTreeMap<Fault, usize>,
}

/// What is to be done about a fault.
enum Mend {
    Start(Vec<u8>),
    Resume(Vec<u8>),
    Boot(Vec<u8>),
    Empty(u8),
    Links,
    Quicken(u8),
    Vote(u8),
}

impl<'a> Nemesis<'a> {
    pub(crate) fn new(bed: &'a Bed, world: &'a World, random: StdRng) -> Self {
        Self {
            bed,
            world,
            random,
            happened: BTreeMap::new(),
        }
    }

    /// How often each kind has happened.
    pub(crate) fn happened(&self) -> &BTreeMap<Fault, usize> {
        &self.happened
    }

    pub(crate) fn carry_out(&mut self, round: &Round) -> Result<()> {
        let mut faults = round.faults.clone();
        // Those of links first: while all hosts are there, it shows that something is lost.
        faults.sort_by_key(|fault| !fault.of_links());
        let mut mends = Vec::new();
        for fault in faults {
            let mend = self.begin(fault).with_context(|| format!("{fault:?}"))?;
            *self.happened.entry(fault).or_default() += 1;
            mends.push((fault, mend));
        }
        std::thread::sleep(round.hold);
        mends.shuffle(&mut self.random);
        for (fault, mend) in mends {
            self.mend(mend).with_context(|| format!("mending {fault:?}"))?;
            self.world.note(&format!("{fault:?} is mended"));
        }
        std::thread::sleep(round.rest);
        self.bed.all_run_that_should()
    }

    fn begin(&mut self, fault: Fault) -> Result<Mend> {
        use Fault as F;
        let count = match fault {
            F::KillThree | F::PauseThree | F::PowerCutThree => 3,
            F::KillAll | F::PowerCutAll => usize::from(HOSTS),
            _ => 1,
        };
        let mut all: Vec<u8> = hosts().collect();
        all.shuffle(&mut self.random);
        if matches!(fault, F::KillTheLeader | F::PauseTheLeader | F::CutOffTheLeader)
            && let Some(leader) = self.leader()
        {
            all.sort_by_key(|host| *host != leader);
        }
        let chosen = all[..count].to_vec();
        self.world.note(&format!("{fault:?}: {all:?}, the first {count}"));
        match fault {
            F::Kill | F::KillTheLeader | F::KillThree | F::KillAll => {
                chosen.iter().try_for_each(|host| self.bed.kill(*host))?;
                Ok(Mend::Start(chosen))
            }
            F::Stop => {
                self.bed.stop(chosen[0])?;
                Ok(Mend::Start(chosen))
            }
            F::Pause | F::PauseTheLeader | F::PauseThree => {
                chosen.iter().try_for_each(|host| self.bed.pause(*host))?;
                Ok(Mend::Resume(chosen))
            }
            F::PowerCut | F::PowerCutThree | F::PowerCutAll => {
                self.bed.power_cut(&chosen)?;
                Ok(Mend::Boot(chosen))
            }
            F::DiskFull => {
                self.fill(chosen[0])?;
                Ok(Mend::Empty(chosen[0]))
            }
            F::Demote => {
                self.vote(chosen[0], Voting::Demoted)?;
                Ok(Mend::Vote(chosen[0]))
            }
            F::Slow => {
                self.slow(chosen[0])?;
                Ok(Mend::Quicken(chosen[0]))
            }
            _ => {
                self.lose(&links(fault, &all))?;
                Ok(Mend::Links)
            }
        }
    }

    fn mend(&mut self, mend: Mend) -> Result<()> {
        let bed = self.bed;
        match mend {
            Mend::Start(hosts) => self.one_by_one(hosts, |host| bed.start_again(host)),
            Mend::Resume(hosts) => self.one_by_one(hosts, |host| bed.resume(host)),
            Mend::Boot(hosts) => self.one_by_one(hosts, |host| bed.boot(host)),
            Mend::Empty(host) => Ok(std::fs::remove_file(bed.on_disk(host, FILLER)?)?),
            Mend::Links => bed.lab.lose(&[]),
            Mend::Vote(host) => self.vote(host, Voting::Auto),
            Mend::Quicken(host) => bed.at(host, || tc(&["del", "dev", "eth0", "root"]).map(drop)),
        }
    }

    /// In any order, with pauses.
    fn one_by_one(&mut self, mut hosts: Vec<u8>, mend: impl Fn(u8) -> Result<()>) -> Result<()> {
        hosts.shuffle(&mut self.random);
        for host in hosts {
            mend(host)?;
            std::thread::sleep(Duration::from_millis(self.random.random_range(0..150)));
        }
        Ok(())
    }

    /// Who leads, by what anybody says.
    fn leader(&mut self) -> Option<u8> {
        let mut all: Vec<u8> = hosts().collect();
        all.shuffle(&mut self.random);
        all.into_iter().find_map(|host| {
            let peers = self.bed.call(host, async |client| client.peers().await).ok()?;
            let leader = peers.into_iter().find(|peer| peer.leader)?;
            hosts().find(|host| leader.addr == listener(*host))
        })
    }

    /// Says whether a host's member is to vote, until it is so.
    fn vote(&self, host: u8, vote: Voting) -> Result<()> {
        let member = listener(host);
        flynn_lab::until(PATIENCE, "a vote to be changed", || {
            // Not by the one that it is about: any can be asked.
            let asked = host % HOSTS + 1;
            let changed = self
                .bed
                .call(asked, async |client| client.set_vote(&member, vote).await);
            let peers = changed.and_then(|()| self.bed.call(asked, async |client| client.peers().await));
            // Whoever is asked hears of it a little later.
            let votes = |peer: &Peer| peer.addr == member && peer.voter;
            Ok(peers.is_ok_and(|peers| vote == Voting::Auto || !peers.iter().any(votes)))
        })
    }

    /// Has links lose frames, and waits until some are lost.
    fn lose(&self, links: &[(u8, u8, u8)]) -> Result<()> {
        let before = self.bed.lab.lost()?;
        self.bed.lab.lose(links)?;
        flynn_lab::until(
            PATIENCE,
            "frames to be lost",
            || Ok(self.bed.lab.lost()? > before),
        )
    }

    /// Fills a host's disk to the last byte.
    fn fill(&self, host: u8) -> Result<()> {
        let mut file = std::fs::File::create(self.bed.on_disk(host, FILLER)?)?;
        let mut length = 0;
        let mut piece = 64_u64 << 20;
        while piece >= 4 << 10 {
            match fallocate(&file, FallocateFlags::empty(), length, piece) {
                Ok(()) => length += piece,
                Err(_) => piece /= 2,
            }
        }
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(length))?;
        let refused = (0..1_000).find_map(|_| file.write_all(&[1; 4 << 10]).err());
        let refused = refused.with_context(|| format!("the disk of {} takes ever more", host_name(host)))?;
        ensure!(refused.kind() == std::io::ErrorKind::StorageFull, "{refused}");
        Ok(())
    }

    /// Has what a host sends come late, and waits until some does.
    fn slow(&self, host: u8) -> Result<()> {
        self.bed.at(host, || {
            tc(&[&["add", "dev", "eth0", "root", "tbf"], &SLOW[..]].concat())?;
            flynn_lab::until(PATIENCE, "something to come late", || {
                let said = tc(&["show", "dev", "eth0"])?;
                Ok(said.contains("overlimits") && !said.contains("overlimits 0"))
            })
        })
    }
}

/// What is lost, if the hosts are `all` in this order.
fn links(fault: Fault, all: &[u8]) -> Vec<(u8, u8, u8)> {
    let at = |host: u8| all.iter().position(|other| *other == host).unwrap_or_default();
    let lost = |from: u8, to: u8| {
        let (from, to) = (at(from), at(to));
        match fault {
            Fault::CutOffTheLeader => from == 0 || to == 0,
            Fault::CutOffOneWay => from == 0,
            Fault::Deafen => to == 0,
            Fault::Split => (from < 2) != (to < 2),
            // The last one sees all.
            Fault::Bridge => from != 4 && to != 4 && (from < 2) != (to < 2),
            Fault::Ring => (from + 1) % 5 != to && (to + 1) % 5 != from,
            _ => true,
        }
    };
    let percent = if fault == Fault::Lossy { LOSS } else { CUT };
    let pairs: BTreeSet<(u8, u8)> = all
        .iter()
        .flat_map(|from| all.iter().map(|to| (*from, *to)))
        .filter(|(from, to)| from != to && lost(*from, *to))
        .collect();
    pairs.into_iter().map(|(from, to)| (from, to, percent)).collect()
}

/// The address that a host's member is known by.
fn listener(host: u8) -> String {
    format!("{}:{PORT}", flynn_lab::host_address(host))
}

/// Runs `tc -statistics qdisc …`.
pub(crate) fn tc(arguments: &[&str]) -> Result<String> {
    let output = std::process::Command::new("tc")
        .args(["-statistics", "qdisc"])
        .args(arguments)
        .output()
        .context("cannot start tc")?;
    ensure!(
        output.status.success(),
        "tc {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8(output.stdout)?)
}

/// Whether the kernel can make a link slow: tried in a namespace of its own.
pub(crate) fn can_be_slow() -> Result<()> {
    use std::os::fd::AsFd as _;
    let namespace = netns::make()?;
    netns::inside(namespace.as_fd(), || {
        tc(&[&["add", "dev", "lo", "root", "tbf"], &SLOW[..]].concat()).map(drop)
    })
}
