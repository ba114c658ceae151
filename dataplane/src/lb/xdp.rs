//! The program that runs before the network stack.

use aya::programs::{
    Xdp, XdpMode,
    links::{FdLink, PinnedLink},
};
use tracing::{info, warn};

use super::Mode;
use crate::{
    error::{Error, Refusal, Result},
    links::Links,
    pins::Pins,
};

pub(super) const PROGRAM: &str = "lb_xdp";

/// Loads it, and puts it in the place of one that is pinned.
pub(super) fn load(links: &mut Links) -> Result<()> {
    let mut load = || -> Result<(), Refusal> { Ok(program(links)?.load()?) };
    load().map_err(Error::kernel("loading the eBPF program lb_xdp"))
}

/// Attaches it where the mode says, if the interface lets it: how it is attached then.
pub(super) fn attach(links: &mut Links, interface: &str, is_device: bool, mode: Mode) -> Result<Mode> {
    let pin = links.pins().xdp(interface);
    let wanted = match mode {
        Mode::Tc => None,
        Mode::Native => Some(XdpMode::Driver),
        Mode::Generic => Some(XdpMode::Skb),
        // Behind virtual interfaces everything is slower with XDP, and checksums that are yet to be worked out would
        // leave as they are. Without a driver's help, tc is as good.
        Mode::Auto => is_device.then_some(XdpMode::Driver),
    };
    let Some(wanted) = wanted else {
        Pins::remove(&pin)?;
        return Ok(Mode::Tc);
    };
    let attached = if matches!(wanted, XdpMode::Skb) {
        Mode::Generic
    } else {
        Mode::Native
    };
    if pin.exists() {
        let mut replace = || -> Result<(), Refusal> {
            let link = FdLink::from(PinnedLink::from_pin(&pin)?);
            let program = program(links)?;
            let id = program.attach_to_link(link.try_into()?)?;
            drop(FdLink::try_from(program.take_link(id)?)?);
            Ok(())
        };
        match replace() {
            Ok(()) => return Ok(attached),
            // Of an interface that is gone, or of another mode.
            Err(_) => drop(Pins::remove(&pin)?),
        }
    }
    let mut create = || -> Result<(), Refusal> {
        let program = program(links)?;
        let id = program.attach(interface, wanted)?;
        FdLink::try_from(program.take_link(id)?)?.pin(&pin)?;
        Ok(())
    };
    match create() {
        Ok(()) => {
            info!(interface, mode = ?attached, "the load balancer runs in XDP");
            Ok(attached)
        }
        // The kernel never lets a link take the place of another's program.
        Err(refusal) => {
            let why = Error::kernel(format!("attaching lb_xdp to {interface}"))(refusal);
            warn!(interface, %why, "the load balancer runs in tc: the interface has another XDP program, or its driver has no XDP");
            Ok(Mode::Tc)
        }
    }
}

pub(super) fn detach(links: &Links, interface: &str) -> Result<()> {
    Pins::remove(&links.pins().xdp(interface)).map(drop)
}

pub(super) fn program(links: &mut Links) -> Result<&mut Xdp, Refusal> {
    #[derive(Debug, thiserror::Error)]
    #[error("the object has no program lb_xdp")]
    struct Missing;
    Ok(links
        .object_mut()
        .program_mut(PROGRAM)
        .ok_or(Missing)?
        .try_into()?)
}
