//! The switch: a network namespace with a bridge, one port per host, and the frames that are lost between them.

use crate::config::{SWITCH_ADDRESS, host_address, host_address6};
use crate::netns::{inside, ip, nft, nft_rules};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

/// The switch of a lab. It is gone when dropped, for nothing but this holds its namespace.
pub(crate) struct Switch {
    namespace: File,
    /// Of a hundred frames that come in at the first port and are to go out at the second, how many are lost.
    losses: BTreeMap<(u8, u8), u8>,
    /// Frames that were lost by rules which are gone.
    lost_before: u64,
    /// Frames that were lost at all, when they were counted last.
    lost: u64,
}

/// All of them.
const CUT: u8 = 100;

impl Switch {
    /// Makes one. The caller has a single thread, which comes back to its own namespace.
    pub(crate) fn new() -> Result<Self> {
        let own = open_own()?;
        crate::unshare(rustix::thread::UnshareFlags::NEWNET).context("cannot make a network namespace")?;
        let namespace = open_own()?;
        rustix::thread::move_into_link_name_space(own.as_fd(), None).context("cannot leave the switch")?;
        let switch = Self {
            namespace,
            losses: BTreeMap::new(),
            lost_before: 0,
            lost: 0,
        };
        inside(switch.namespace.as_fd(), || {
            // Packets to nowhere are answered, so that nobody waits for them.
            ip(&format!(
                "link set lo up\nlink add br0 type bridge\naddr add {SWITCH_ADDRESS}/24 dev br0\nlink set br0 up\n\
                 route add unreachable default\n"
            ))?;
            for (file, value) in [("ip_forward", "1"), ("icmp_ratelimit", "0")] {
                std::fs::write(format!("/proc/sys/net/ipv4/{file}"), value)
                    .with_context(|| format!("cannot set {file}"))?;
            }
            Ok(())
        })?;
        Ok(switch)
    }

    /// The switch's network namespace.
    pub(crate) fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// Connects a host whose network namespace is that of the process `pid`. It has the card that it had: others remember it
    /// for a minute.
    pub(crate) fn plug(&self, host: u8, pid: u32) -> Result<()> {
        let theirs = File::open(format!("/proc/{pid}/ns/net")).context("cannot open the host's network")?;
        inside(self.namespace.as_fd(), || {
            ip(&format!(
                "link add p{host} type veth peer name eth0 address 02:00:00:00:00:{host:02x} netns {pid}\n\
                 link set p{host} master br0\nlink set p{host} up\n"
            ))
        })?;
        let (address, address6) = (host_address(host), host_address6(host));
        inside(theirs.as_fd(), || {
            ip(&format!(
                "link set lo up\naddr add {address}/24 dev eth0\naddr add {address6}/64 dev eth0 nodad\n\
                 link set eth0 up\nroute add default via {SWITCH_ADDRESS}\n"
            ))
        })
    }

    /// Pulls a host's cable out. What is plugged is gone with it.
    pub(crate) fn unplug(&self, host: u8) -> Result<()> {
        inside(self.namespace.as_fd(), || ip(&format!("link del p{host}\n")))
    }

    /// Lets no frame pass from one host to another, in this direction.
    pub(crate) fn cut(&mut self, from: u8, to: u8) -> Result<()> {
        self.losses.insert((from, to), CUT);
        self.apply()
    }

    /// Undoes [`Switch::cut`].
    pub(crate) fn mend(&mut self, from: u8, to: u8) -> Result<()> {
        self.losses.remove(&(from, to));
        self.apply()
    }

    /// Has these links lose frames, and no others.
    pub(crate) fn lose(&mut self, losses: BTreeMap<(u8, u8), u8>) -> Result<()> {
        self.losses = losses;
        self.apply()
    }

    /// The cuts there are.
    pub(crate) fn cuts(&self) -> Vec<(u8, u8)> {
        let cuts = self.losses.iter().filter(|(_, percent)| **percent == CUT);
        cuts.map(|(link, _)| *link).collect()
    }

    /// Counts the frames that were lost.
    pub(crate) fn count(&mut self) -> Result<()> {
        let rules = inside(self.namespace.as_fd(), nft_rules)?;
        self.lost = self.lost_before + counted(&rules);
        Ok(())
    }

    /// What was counted last.
    pub(crate) fn lost(&self) -> u64 {
        self.lost
    }

    fn apply(&mut self) -> Result<()> {
        self.count()?;
        self.lost_before = self.lost;
        let script = script(&self.losses)?;
        inside(self.namespace.as_fd(), || nft(&script))
    }
}

/// The whole rule set, replaced at once.
fn script(losses: &BTreeMap<(u8, u8), u8>) -> Result<String> {
    let mut script = String::from("table bridge lab\ndelete table bridge lab\ntable bridge lab {\n");
    script.push_str("chain forward { type filter hook forward priority 0; policy accept;\n");
    for ((from, to), percent) in losses {
        let some = if *percent == CUT {
            String::new()
        } else {
            format!("numgen random mod 100 < {percent} ")
        };
        writeln!(script, "iifname p{from} oifname p{to} {some}counter drop")?;
    }
    script.push_str("}\n}\n");
    Ok(script)
}

/// What the counters of these rules add up to, in packets.
fn counted(rules: &str) -> u64 {
    let words: Vec<&str> = rules.split_whitespace().collect();
    let counts = words.windows(3).filter_map(|words| match words {
        ["counter", "packets", count] => count.parse::<u64>().ok(),
        _ => None,
    });
    counts.sum()
}

fn open_own() -> Result<File> {
    File::open("/proc/thread-self/ns/net").context("cannot open the network namespace")
}
