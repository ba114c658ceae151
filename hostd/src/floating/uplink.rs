//! The interface that floating addresses are put on: the one with the host's own address.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use futures::TryStreamExt as _;
use rtnetlink::Handle;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, CacheInfo};
use rtnetlink::packet_route::link::{LinkAttribute, State};

use super::{Address, frame};
use crate::sys;

/// For so long, in seconds, the kernel keeps an address that nobody renews: a daemon that is gone, or does not run,
/// holds nothing for long.
const LIFETIME: u32 = 3;

/// It, as found by the host's address.
pub(super) struct Uplink {
    handle: Handle,
    index: u32,
    mac: [u8; 6],
}

impl Uplink {
    /// The interface that has this address, in the network namespace that `handle` was made in.
    pub(super) async fn find(handle: Handle, own: Ipv4Addr) -> io::Result<Self> {
        let none = |what: &str| io::Error::other(format!("{what} {own}"));
        let mut addresses = handle.address().get().execute();
        let index = loop {
            let Some(message) = addresses.try_next().await.map_err(io::Error::other)? else {
                return Err(none("no interface has the host's address"));
            };
            let wanted = AddressAttribute::Local(own.into());
            if message.attributes.contains(&wanted) {
                break message.header.index;
            }
        };
        let mut uplink = Self {
            handle,
            index,
            mac: [0; 6],
        };
        let (mac, _) = uplink.look().await?;
        uplink.mac = mac.ok_or_else(|| none("no Ethernet is behind the host's address"))?;
        Ok(uplink)
    }

    /// Whether what it is connected to is up.
    pub(super) async fn is_up(&self) -> bool {
        self.look().await.is_ok_and(|(_, up)| up)
    }

    async fn look(&self) -> io::Result<(Option<[u8; 6]>, bool)> {
        let mut links = self.handle.link().get().match_index(self.index).execute();
        let link = links.try_next().await.map_err(io::Error::other)?;
        let attributes = link.map(|link| link.attributes).unwrap_or_default();
        let (mut mac, mut up) = (None, false);
        for attribute in attributes {
            match attribute {
                LinkAttribute::Address(address) => mac = address.try_into().ok(),
                LinkAttribute::OperState(state) => up = matches!(state, State::Up | State::Unknown),
                _ => {}
            }
        }
        Ok((mac, up))
    }

    /// Puts an address on it, or renews it there, and tells the neighbours.
    pub(super) async fn hold(&self, address: Address) -> io::Result<()> {
        let mut request = self
            .handle
            .address()
            .add(self.index, address.ip, address.length)
            .replace();
        let mut lifetime = CacheInfo::default();
        lifetime.ifa_preferred = LIFETIME;
        lifetime.ifa_valid = LIFETIME;
        let message = request.message_mut();
        message.attributes.push(AddressAttribute::CacheInfo(lifetime));
        if address.ip.is_ipv6() {
            // It has just been somebody else's, whom no detection of duplicates must find.
            message.header.flags |= AddressHeaderFlags::Nodad;
        }
        request.execute().await.map_err(io::Error::other)?;
        sys::send_frame(self.index, &frame::announcement(address.ip, self.mac))
    }

    /// Takes an address from it; one that is not there is none to take.
    pub(super) async fn release(&self, ip: IpAddr) -> io::Result<()> {
        let found = self
            .handle
            .address()
            .get()
            .set_link_index_filter(self.index)
            .execute()
            .try_filter(|message| {
                let has = message.attributes.iter().any(|attribute| {
                    matches!(attribute, AddressAttribute::Local(local) | AddressAttribute::Address(local) if *local == ip)
                });
                futures::future::ready(has)
            })
            .try_collect::<Vec<_>>()
            .await
            .map_err(io::Error::other)?;
        for message in found {
            self.handle
                .address()
                .del(message)
                .execute()
                .await
                .map_err(io::Error::other)?;
        }
        Ok(())
    }
}
