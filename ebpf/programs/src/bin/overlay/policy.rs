//! Who may send to whom.
//!
//! Connections are judged by their first packet, TCP's SYN: what follows has no effect without it. Datagrams have no
//! such mark and pass both ways wherever one way is allowed.

use aya_ebpf::programs::TcContext;
use flynn_abi::{
    Config, DropReason, Endpoint, OpenPort, Pair,
    policy::{HOST, Identity, UNKNOWN, identity},
};

use crate::{
    maps,
    packet::{self, Header, Transport, tcp},
};

/// From here on up, ports are those that answers go to.
const FIRST_EPHEMERAL_PORT: u16 = 32768;

/// Who sends.
#[derive(Clone, Copy)]
pub(crate) struct Sender {
    pub(crate) identity: Identity,
    /// It is seen here that it is part of the platform; others may still be.
    pub(crate) is_system: bool,
}

impl Sender {
    #[inline(always)]
    pub(crate) fn local(endpoint: &Endpoint) -> Self {
        Self {
            identity: endpoint.identity,
            is_system: endpoint.flags & Endpoint::SYSTEM != 0,
        }
    }

    #[inline(always)]
    pub(crate) fn remote(identity: Identity) -> Self {
        Self {
            identity,
            is_system: false,
        }
    }

    #[inline(always)]
    fn is_system(self) -> bool {
        self.is_system || maps::identity(self.identity) & identity::SYSTEM != 0
    }
}

/// A packet whose IP header is at an offset.
pub(crate) struct Packet<'p, H> {
    pub(crate) ctx: &'p TcContext,
    pub(crate) ip: &'p H,
    pub(crate) at: usize,
}

impl<H: Header> Packet<'_, H> {
    /// Whether it may go to a container, of which this host may know no more than whose it is.
    #[inline(always)]
    pub(crate) fn to_container(
        &self,
        sender: Sender,
        receiver: &Endpoint,
        config: &Config,
    ) -> Result<(), DropReason> {
        if sender.identity == HOST || sender.identity == receiver.identity && sender.identity != UNKNOWN {
            return Ok(());
        }
        if config.flags & Config::ISOLATION != 0 {
            self.in_spite_of_isolation(sender.identity, receiver.identity)?;
        }
        if receiver.flags & Endpoint::SYSTEM != 0 && !sender.is_system() {
            self.to_open_port(receiver.slot, DropReason::PortClosed)?;
        }
        Ok(())
    }

    /// Whether it may go to a host.
    #[inline(always)]
    pub(crate) fn to_host(&self, sender: Sender, config: &Config) -> Result<(), DropReason> {
        if config.flags & Config::HOST_PORTS == 0 || sender.identity == HOST || sender.is_system() {
            return Ok(());
        }
        self.to_open_port(OpenPort::HOSTS, DropReason::HostPortClosed)
    }

    #[inline(always)]
    fn in_spite_of_isolation(&self, from: Identity, to: Identity) -> Result<(), DropReason> {
        // Each look costs: the second only where the first does not tell.
        let is_isolated = |whose| maps::identity(whose) & identity::ISOLATED != 0;
        if !is_isolated(to) && !is_isolated(from) {
            return Ok(());
        }
        match maps::pair(Pair { from, to }) {
            None => Err(DropReason::Isolated),
            Some(flags) if flags & Pair::INITIATE != 0 => Ok(()),
            Some(_) => match self.ip.transport(self.ctx, self.at) {
                Transport::Tcp { at } if self.opens_connection(at)? => Err(DropReason::MayOnlyAnswer),
                Transport::Other => Err(DropReason::UnknownTransport),
                _ => Ok(()),
            },
        }
    }

    #[inline(always)]
    fn to_open_port(&self, slot: u32, closed: DropReason) -> Result<(), DropReason> {
        let (protocol, at) = match self.ip.transport(self.ctx, self.at) {
            Transport::Tcp { at } if self.opens_connection(at)? => (packet::TCP, at),
            Transport::Tcp { .. } | Transport::Icmp { .. } | Transport::LaterFragment => return Ok(()),
            Transport::Udp { at } => (packet::UDP, at),
            Transport::Other => return Err(DropReason::UnknownTransport),
        };
        let port: [u8; 2] = self.ctx.load(at + 2).map_err(|_| DropReason::Truncated)?;
        if protocol == packet::UDP && u16::from_be_bytes(port) >= FIRST_EPHEMERAL_PORT {
            return Ok(());
        }
        let key = OpenPort {
            slot,
            port,
            protocol,
            reserved: 0,
        };
        if maps::is_open(key) { Ok(()) } else { Err(closed) }
    }

    #[inline(always)]
    fn opens_connection(&self, at: usize) -> Result<bool, DropReason> {
        let flags: u8 = self
            .ctx
            .load(at + tcp::FLAGS)
            .map_err(|_| DropReason::Truncated)?;
        Ok(flags & (tcp::SYN | tcp::ACK) == tcp::SYN)
    }
}
