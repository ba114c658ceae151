//! What flows are outside, by what they are at their container: kept for answers, which have to be given back the VIP's
//! address.
//!
//! At the container, a client's port is one flow, whichever VIP it came by. Where another flow has it already, because the
//! client uses the port for two VIPs, a flow has another port there, the same one as long as it lives: the first of a few
//! that nobody has, or whose flow is over.

use flynn_abi::{
    DropReason,
    lb::{Config, Event, Port, Translation, TranslationKey},
};

use crate::{
    headers::{Tcp, UDP},
    maps,
};

/// How many ports are tried.
pub(crate) const TRIES: u16 = 4;

/// Notes what the flow of a packet of the client's is outside, and puts the client's port into the key as the container
/// has it. `flags` are TCP's, or 0.
#[inline(always)]
pub(crate) fn record(
    key: &mut TranslationKey,
    wanted: &mut Translation,
    flags: u8,
    config: &Config,
) -> Result<(), DropReason> {
    let opens = flags & (Tcp::SYN | Tcp::ACK) == Tcp::SYN;
    let now = if key.protocol == UDP { maps::now() } else { 0 };
    wanted.flags |= now << Translation::SEEN;
    wanted.flags |= ended(flags, Translation::CLIENT_ENDED);
    for attempt in 0..TRIES {
        key.client_port = nth_port(wanted.client_port, attempt);
        let (found, established) = match maps::established(key) {
            Some(found) => (Some(found), true),
            None => (maps::open(key), false),
        };
        if let Some(found) = found {
            // SAFETY: should the entry be given to another flow while it is looked at, it does not look the same, or is
            // the same.
            let found = unsafe { &mut *found };
            if is_same(found, wanted) {
                if established || opens {
                    update(found, wanted, opens);
                    return Ok(());
                }
                return noted(maps::established_insert(key, wanted));
            }
            if found.is_over(key.protocol, now) && (opens || key.protocol == UDP) {
                maps::established_remove(key);
                return insert(key, wanted, opens, config);
            }
        } else {
            return insert(key, wanted, opens, config);
        }
        if attempt == 0 {
            maps::count(Event::PortTranslated);
        }
    }
    Err(DropReason::PortsTaken)
}

/// What the flow of a packet of the container's is outside. `flags` are TCP's, or 0.
#[inline(always)]
pub(crate) fn answered(key: &TranslationKey, flags: u8) -> Option<Translation> {
    let found = maps::established(key).or_else(|| maps::open(key))?;
    // SAFETY: should the entry be given to another flow while it is read, this packet gets that flow's address, and
    // nobody takes it.
    let found = unsafe { &mut *found };
    let mut seen = *found;
    seen.flags |= ended(flags, Translation::BACKEND_ENDED);
    if key.protocol == UDP {
        seen.flags = seen.flags << 24 >> 24 | maps::now() << Translation::SEEN;
    }
    // Only what has changed is written: other CPUs have the entry in their caches.
    if seen.flags != found.flags {
        found.flags = seen.flags;
    }
    Some(seen)
}

#[inline(always)]
fn insert(
    key: &TranslationKey,
    wanted: &Translation,
    opens: bool,
    config: &Config,
) -> Result<(), DropReason> {
    noted(if opens {
        maps::open_insert(key, wanted)
    } else {
        // Nobody has seen it begin. A flood of such must not push out those who were.
        maps::admits(config) && maps::established_insert(key, wanted)
    })
}

#[inline(always)]
fn noted(noted: bool) -> Result<(), DropReason> {
    if noted {
        Ok(())
    } else {
        Err(DropReason::TooManyFlows)
    }
}

/// An entry of the flow's own: who has begun anew has not ended.
#[inline(always)]
fn update(found: &mut Translation, wanted: &Translation, opens: bool) {
    if found.via != wanted.via {
        found.via = wanted.via;
    }
    const ENDED: u32 = Translation::CLIENT_ENDED | Translation::BACKEND_ENDED;
    let kept = if opens { 0 } else { found.flags & ENDED };
    let flags = wanted.flags | kept;
    if found.flags != flags {
        found.flags = flags;
    }
}

/// What a packet with these flags of TCP says about the end of its flow: nothing, its sender's end, or everybody's.
#[inline(always)]
fn ended(flags: u8, sender: u32) -> u32 {
    if flags & Tcp::RST != 0 {
        Translation::CLIENT_ENDED | Translation::BACKEND_ENDED
    } else if flags & Tcp::FIN != 0 {
        sender
    } else {
        0
    }
}

#[inline(always)]
fn is_same(found: &Translation, wanted: &Translation) -> bool {
    found.vip == wanted.vip && found.port == wanted.port && found.client_port == wanted.client_port
}

/// The first is the port itself.
#[inline(always)]
pub(crate) fn nth_port(port: Port, attempt: u16) -> Port {
    let port = u16::from_be_bytes(port);
    match attempt {
        0 => port,
        _ => 0x8000 | port.wrapping_add(attempt * 9973),
    }
    .to_be_bytes()
}
