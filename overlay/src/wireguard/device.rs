//! The kernel's WireGuard device, spoken to by generic netlink. Messages carry the private key: they are logged nowhere,
//! which is why no library's connection is in between.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Mutex, PoisonError},
};

use flynn_dataplane::ENCRYPTED_DEVICE;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_generic::{
    GenlMessage,
    ctrl::{GenlCtrl, GenlCtrlCmd, nlas::GenlCtrlAttrs},
};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use netlink_sys::{Socket, protocols::NETLINK_GENERIC};

use super::{
    Key, PrivateKey,
    plan::{Changes, Present},
};

/// Seconds between calls of a peer that has not answered yet. (It is the first of them that matters: it begins the
/// handshake, which the kernel then tries every five seconds.)
const CALL: u16 = 25;

/// Peers in one message: 64 KiB is what one attribute can have.
const AT_ONCE: usize = 256;

/// The device, which is there.
pub(crate) struct Device {
    /// One question at a time: answers do not say whose they are.
    socket: Mutex<Socket>,
    family: u16,
}

impl Device {
    /// A hand on WireGuard, whether there is the device or not. An error where the kernel does not have it.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        let question = GenlCtrl {
            cmd: GenlCtrlCmd::GetFamily,
            nlas: vec![GenlCtrlAttrs::FamilyName("wireguard".into())],
        };
        let message = GenlMessage::from_payload(question);
        let answers = ask(&socket, message, NLM_F_ACK)?;
        let family = answers.into_iter().flat_map(|answer| answer.payload.nlas);
        let family = family.into_iter().find_map(|attribute| match attribute {
            GenlCtrlAttrs::FamilyId(id) => Some(id),
            _ => None,
        });
        let family = family.ok_or(io::ErrorKind::NotFound)?;
        Ok(Self {
            socket: Mutex::new(socket),
            family,
        })
    }

    /// Gives the device its key and its port. Nothing changes where it has them.
    pub(crate) fn configure(&self, key: &PrivateKey, port: u16) -> io::Result<()> {
        self.set(vec![
            WireguardAttribute::PrivateKey(key.0),
            WireguardAttribute::ListenPort(port),
        ])
    }

    /// The key by which others know the device, and the peers that it has.
    pub(crate) fn state(&self) -> io::Result<(Key, Vec<Present>)> {
        let attributes = vec![WireguardAttribute::IfName(ENCRYPTED_DEVICE.into())];
        let answers = self.ask(WireguardCmd::GetDevice, attributes, NLM_F_DUMP)?;
        let mut own = None;
        // What there is to say about a peer may fill several messages.
        let mut peers: BTreeMap<Key, (Vec<Ipv4Addr>, Present)> = BTreeMap::new();
        for attribute in answers.into_iter().flat_map(|answer| answer.payload.attributes) {
            match attribute {
                WireguardAttribute::PublicKey(key) => own = Some(Key(key)),
                WireguardAttribute::Peers(said) => said.iter().for_each(|peer| read(peer, &mut peers)),
                _ => {}
            }
        }
        let own = own.ok_or_else(|| io::Error::other("the device has no key"))?;
        let peers = peers.into_values().map(|(addresses, peer)| Present {
            address: <[Ipv4Addr; 1]>::try_from(addresses).ok().map(|[address]| address),
            ..peer
        });
        Ok((own, peers.collect()))
    }

    /// Changes the device's peers.
    pub(crate) fn change(&self, changes: &Changes) -> io::Result<()> {
        let removed = changes.removed.iter().map(|key| {
            vec![
                WireguardPeerAttribute::PublicKey(key.0),
                WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe),
            ]
        });
        let added = changes.added.iter().map(|(address, peer)| {
            vec![
                WireguardPeerAttribute::PublicKey(peer.key.0),
                WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps),
                WireguardPeerAttribute::Endpoint(SocketAddr::new((*address).into(), peer.port)),
                WireguardPeerAttribute::PersistentKeepalive(CALL),
                WireguardPeerAttribute::AllowedIps(vec![WireguardAllowedIp(vec![
                    WireguardAllowedIpAttr::Family(WireguardAddressFamily::Ipv4),
                    WireguardAllowedIpAttr::IpAddr((*address).into()),
                    WireguardAllowedIpAttr::Cidr(32),
                ])]),
            ]
        });
        let answered = changes.answered.iter().map(|key| {
            vec![
                WireguardPeerAttribute::PublicKey(key.0),
                WireguardPeerAttribute::Flags(WireguardPeerFlags::UpdateOnly),
                WireguardPeerAttribute::PersistentKeepalive(0),
            ]
        });
        // Removed first: no two peers can have one address.
        let all: Vec<_> = removed.chain(added).chain(answered).map(WireguardPeer).collect();
        for some in all.chunks(AT_ONCE) {
            self.set(vec![WireguardAttribute::Peers(some.to_vec())])?;
        }
        Ok(())
    }

    fn set(&self, mut attributes: Vec<WireguardAttribute>) -> io::Result<()> {
        attributes.insert(0, WireguardAttribute::IfName(ENCRYPTED_DEVICE.into()));
        self.ask(WireguardCmd::SetDevice, attributes, NLM_F_ACK).map(drop)
    }

    fn ask(
        &self,
        cmd: WireguardCmd,
        attributes: Vec<WireguardAttribute>,
        flags: u16,
    ) -> io::Result<Vec<GenlMessage<WireguardMessage>>> {
        let mut message = GenlMessage::from_payload(WireguardMessage { cmd, attributes });
        message.set_resolved_family_id(self.family);
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        ask(&socket, message, flags)
    }
}

fn read(said: &WireguardPeer, peers: &mut BTreeMap<Key, (Vec<Ipv4Addr>, Present)>) {
    let key = said.0.iter().find_map(|attribute| match attribute {
        WireguardPeerAttribute::PublicKey(key) => Some(Key(*key)),
        _ => None,
    });
    let Some(key) = key else { return };
    let (addresses, peer) = peers.entry(key).or_insert_with(|| {
        let peer = Present {
            key,
            address: None,
            handshake: false,
            called: false,
        };
        (Vec::new(), peer)
    });
    for attribute in &said.0 {
        match attribute {
            WireguardPeerAttribute::LastHandshake(at) => {
                peer.handshake |= (at.seconds, at.nano_seconds) != (0, 0);
            }
            WireguardPeerAttribute::PersistentKeepalive(seconds) => peer.called |= *seconds != 0,
            WireguardPeerAttribute::AllowedIps(allowed) => {
                let address = allowed.iter().flat_map(|allowed| &allowed.0);
                addresses.extend(address.filter_map(|attribute| match attribute {
                    WireguardAllowedIpAttr::IpAddr(IpAddr::V4(address)) => Some(*address),
                    _ => None,
                }));
            }
            _ => {}
        }
    }
}

/// Sends the kernel a message and gathers its answers. It answers at once.
fn ask<M>(socket: &Socket, message: M, flags: u16) -> io::Result<Vec<M>>
where
    M: NetlinkSerializable + NetlinkDeserializable + std::fmt::Debug,
{
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let mut buffer = vec![0; message.buffer_len()];
    message.serialize(&mut buffer);
    socket.send(&buffer, 0)?;
    let mut answers = Vec::new();
    loop {
        let (received, _) = socket.recv_from_full()?;
        let mut rest = received.as_slice();
        while !rest.is_empty() {
            let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
            let answer = NetlinkMessage::<M>::deserialize(rest).map_err(invalid)?;
            let length = usize::try_from(answer.header.length).unwrap_or(usize::MAX);
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            match answer.payload {
                NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                // An acknowledgement is an error without a number.
                NetlinkPayload::Error(error) => {
                    return error.code.map_or(Ok(answers), |_| Err(error.to_io()));
                }
                NetlinkPayload::Done(_) => return Ok(answers),
                _ => {}
            }
        }
    }
}
