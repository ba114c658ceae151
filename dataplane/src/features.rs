//! What the kernel has of what the packet path makes use of.
//!
//! Each answer is had by trying, in a network namespace that is gone afterwards, not by the kernel's version: what is
//! configured away, or is a module that nobody has installed, is not there.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    thread,
};

use aya::{programs::ProgramType, sys::is_program_supported};
use rustix::{
    net::{
        AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send,
        socket_with,
    },
    thread::{UnshareFlags, unshare_unsafe},
};

use crate::Hook;

/// Something that not every kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Feature {
    /// Links between classifiers and devices.
    Tcx,
    /// Programs in front of the network stack.
    Xdp,
    /// Programs that choose the socket of a new connection.
    SkLookup,
    /// Programs that see the addresses which processes connect and send to.
    CgroupSockAddr,
    /// Ending other processes' connections.
    SockDestroy,
    /// The queueing discipline that sends each packet at its time.
    Fq,
    /// Encryption between hosts.
    WireGuard,
}

impl Feature {
    /// All there are.
    pub const ALL: [Self; 7] = [
        Self::Tcx,
        Self::Xdp,
        Self::SkLookup,
        Self::CgroupSockAddr,
        Self::SockDestroy,
        Self::Fq,
        Self::WireGuard,
    ];

    /// Its name in the kernel's own words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Xdp => "xdp",
            Self::SkLookup => "sk_lookup",
            Self::CgroupSockAddr => "cgroup_sock_addr",
            Self::SockDestroy => "sock_destroy",
            Self::Fq => "fq",
            Self::WireGuard => "wireguard",
        }
    }

    /// What it is good for here.
    pub const fn purpose(self) -> &'static str {
        match self {
            Self::Tcx => "programs at devices beside those of others, replaced in one step",
            Self::Xdp => "balancing before the network stack",
            Self::SkLookup => "routes on any port without a listener for each",
            Self::CgroupSockAddr => "service addresses without proxies",
            Self::SockDestroy => "ending connections to instances that were deposed",
            Self::Fq => "bandwidth limits that delay instead of dropping",
            Self::WireGuard => "encryption between hosts",
        }
    }

    /// What is done, or not done, where it is missing.
    pub const fn otherwise(self) -> &'static str {
        match self {
            Self::Tcx => "filters of clsact are used instead",
            Self::Xdp => "balancing takes place in tc",
            Self::SkLookup => "the router listens on each routed port",
            Self::CgroupSockAddr => "service addresses are not translated; DNS names work",
            Self::SockDestroy => "connections to deposed instances end when those close them",
            Self::Fq => "bandwidth limits drop what is too much",
            Self::WireGuard => "traffic between hosts is not encrypted",
        }
    }

    /// Whether its absence takes something from the operator, rather than choosing another way to the same end.
    pub const fn is_missed(self) -> bool {
        matches!(self, Self::CgroupSockAddr | Self::SockDestroy | Self::WireGuard)
    }
}

/// Tries each of [`Feature::ALL`]; some tens of milliseconds, more where modules are loaded for it.
pub fn probe() -> Vec<(Feature, bool)> {
    let elsewhere = || {
        // SAFETY: takes nothing from this thread that others count on it to share: no files, no memory.
        let own = unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.is_ok();
        Feature::ALL
            .into_iter()
            .map(|feature| (feature, own && is_there(feature)))
            .collect()
    };
    let nothing = |_| Feature::ALL.map(|feature| (feature, false)).to_vec();
    thread::spawn(elsewhere).join().unwrap_or_else(nothing)
}

fn is_there(feature: Feature) -> bool {
    let runs = |kind| is_program_supported(kind).unwrap_or(false);
    match feature {
        Feature::Tcx => Hook::detect() == Hook::Tcx,
        Feature::Xdp => runs(ProgramType::Xdp),
        Feature::SkLookup => runs(ProgramType::SkLookup),
        Feature::CgroupSockAddr => runs(ProgramType::CgroupSockAddr),
        Feature::SockDestroy => destroys_sockets().unwrap_or(false),
        Feature::Fq => has_fq().unwrap_or(false),
        Feature::WireGuard => has_wireguard().unwrap_or(false),
    }
}

/// Ends a listener of our own the way others' connections are ended.
fn destroys_sockets() -> io::Result<bool> {
    const SOCK_DESTROY: u16 = 21;
    const TCP: u8 = 6;
    const ANY_COOKIE: [u8; 8] = [0xff; 8];
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let SocketAddr::V4(address) = listener.local_addr()? else {
        return Ok(false);
    };
    let listening: u32 = 1 << 10;
    let mut request = vec![u8::try_from(AddressFamily::INET.as_raw()).unwrap_or(2), TCP, 0, 0];
    request.extend(listening.to_ne_bytes());
    request.extend(address.port().to_be_bytes());
    // No port at the other end, any address at either, any interface.
    request.extend([0; 2 + 16 + 16 + 4]);
    request.extend(ANY_COOKIE);
    ask(Some(netlink::SOCK_DIAG), SOCK_DESTROY, 0, &request)
}

/// Makes the namespace's loopback device send by it.
fn has_fq() -> io::Result<bool> {
    // The protocol with the number zero.
    const ROUTE: Option<Protocol> = None;
    const RTM_NEWQDISC: u16 = 36;
    const CREATE: u16 = 0x400;
    const LOOPBACK: i32 = 1;
    const ROOT: u32 = u32::MAX;
    const KIND: u16 = 1;
    let mut request = vec![0; 4];
    request.extend(LOOPBACK.to_ne_bytes());
    request.extend(0_u32.to_ne_bytes());
    request.extend(ROOT.to_ne_bytes());
    request.extend([0; 4]);
    attribute(&mut request, KIND, b"fq\0");
    ask(ROUTE, RTM_NEWQDISC, CREATE, &request)
}

/// Asks for the number of its family of messages, which loads the module.
fn has_wireguard() -> io::Result<bool> {
    const CONTROLLER: u16 = 0x10;
    const GET_FAMILY: u8 = 3;
    const VERSION: u8 = 1;
    const FAMILY_NAME: u16 = 2;
    let mut request = vec![GET_FAMILY, VERSION, 0, 0];
    attribute(&mut request, FAMILY_NAME, b"wireguard\0");
    ask(Some(netlink::GENERIC), CONTROLLER, 0, &request)
}

fn attribute(request: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    request.extend(length.to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend(value);
    request.resize(request.len().next_multiple_of(4), 0);
}

/// Sends a request to the kernel: whether it did as asked.
fn ask(protocol: Option<Protocol>, kind: u16, flags: u16, request: &[u8]) -> io::Result<bool> {
    const HEADER: usize = 16;
    const REQUEST_AND_ACKNOWLEDGE: u16 = 1 | 4;
    const ERROR: u16 = 2;
    let length = u32::try_from(HEADER + request.len()).unwrap_or(u32::MAX);
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((REQUEST_AND_ACKNOWLEDGE | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(request);
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        protocol,
    )?;
    send(&socket, &message, SendFlags::empty())?;
    let mut answer = [0; 8192];
    let (length, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
    let answer = &answer[..length.min(8192)];
    let Some((kind, code)) = answer.get(4..6).zip(answer.get(HEADER..HEADER + 4)) else {
        return Ok(false);
    };
    // An acknowledgement is an error with the number zero; anything else is what was asked for.
    Ok(kind != ERROR.to_ne_bytes() || code == [0; 4])
}
