//! Which programs run at which interfaces.

use std::{mem::ManuallyDrop, path::Path};

use aya::{
    Ebpf, TestRun, TestRunOptions,
    programs::{
        LinkOrder, SchedClassifier,
        links::{FdLink, PinnedLink},
        tc::{self, NlOptions, SchedClassifierLink, SchedClassifierLinkId, TcAttachOptions, TcHandle},
    },
};
use rustix::io::Errno;
use tracing::{debug, info};

use crate::{
    Hook, Outcome, Program,
    error::{Error, Refusal, Result},
    pins::Pins,
    program::Place,
};

/// Our filter among those of a `clsact`: with a place of its own it is found again and replaced there.
const fn clsact_priority(program: Program) -> u16 {
    match program.place() {
        Place::First => 0xf0,
        Place::Middle => 0xf1,
        Place::Last => 0xf2,
    }
}
const CLSACT_HANDLE: TcHandle = TcHandle::new(0, 1);

/// Room for what a program adds to a frame.
const HEADROOM: usize = 256;

pub(crate) struct Links {
    object: Ebpf,
    pins: Pins,
    hook: Hook,
    programs: &'static [Program],
}

impl Links {
    /// Loads the programs and puts them in the place of those that are pinned.
    pub(crate) fn take(object: Ebpf, pins: Pins, hook: Hook, programs: &'static [Program]) -> Result<Self> {
        let mut links = Self {
            object,
            pins,
            hook,
            programs,
        };
        for &program in programs {
            links
                .program_mut(program)
                .and_then(|loaded| Ok(loaded.load()?))
                .map_err(Error::kernel(format!(
                    "loading the eBPF program {}",
                    program.name()
                )))?;
        }
        for (program, interface) in links.list()? {
            if !links.replace(program, &interface)? {
                debug!(
                    program = program.name(),
                    interface, "the interface is gone, and so is its pin"
                );
                Pins::remove(&links.pins.link(program, &interface))?;
            }
        }
        info!(hook = ?hook, "eBPF programs loaded");
        Ok(links)
    }

    pub(crate) fn attach(&mut self, program: Program, interface: &str) -> Result<()> {
        if self.pins.link(program, interface).exists() {
            if self.replace(program, interface)? {
                return Ok(());
            }
            Pins::remove(&self.pins.link(program, interface))?;
        }
        self.create(program, interface).map_err(Error::kernel(format!(
            "attaching the eBPF program {} to {interface}",
            program.name()
        )))
    }

    pub(crate) fn detach(&mut self, program: Program, interface: &str) -> Result<()> {
        if self.hook == Hook::Clsact {
            // Detached where the link is dropped; a filter that is gone with its interface is no concern.
            drop(filter(program, interface));
        }
        Pins::remove(&self.pins.link(program, interface)).map(drop)
    }

    pub(crate) fn unpin(mut self) -> Result<()> {
        for (program, interface) in self.list()? {
            self.detach(program, &interface)?;
        }
        self.pins.remove_all()
    }

    pub(crate) fn list(&self) -> Result<Vec<(Program, String)>> {
        let mut links = self.pins.links()?;
        links.retain(|(program, _)| self.programs.contains(program));
        Ok(links)
    }

    pub(crate) fn pins(&self) -> &Pins {
        &self.pins
    }

    pub(crate) fn object_mut(&mut self) -> &mut Ebpf {
        &mut self.object
    }

    pub(crate) fn hook(&self) -> Hook {
        self.hook
    }

    pub(crate) fn dry_run(&self, program: Program, ifindex: u32, frame: &[u8]) -> Result<Outcome> {
        // The context's layout is the kernel's `struct __sk_buff`; of it only the interface is given.
        const IFINDEX: std::ops::Range<usize> = 40..44;
        let mut context = [0; 192];
        context[IFINDEX].copy_from_slice(&ifindex.to_ne_bytes());
        let mut out = vec![0; frame.len() + HEADROOM];
        let mut run = || -> Result<_, Refusal> {
            let loaded: &SchedClassifier = self
                .object
                .program(program.name())
                .ok_or(MissingProgram(program))?
                .try_into()?;
            Ok(loaded.test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut out),
                ctx_in: Some(&context),
                ..TestRunOptions::default()
            })?)
        };
        let result = run().map_err(Error::kernel(format!(
            "running the eBPF program {}",
            program.name()
        )))?;
        out.truncate(usize::try_from(result.data_size_out).unwrap_or(usize::MAX));
        Ok(Outcome {
            action: result.return_value,
            frame: out,
        })
    }

    /// Puts the program into a link or filter that is pinned: whether that is still at an interface.
    fn replace(&mut self, program: Program, interface: &str) -> Result<bool> {
        let gone = [
            Errno::NOLINK,
            Errno::NODEV,
            Errno::NOENT,
            Errno::NXIO,
            Errno::INVAL,
        ]
        .map(Errno::raw_os_error);
        match self.try_replace(program, interface) {
            Ok(()) => Ok(true),
            Err(refusal) if refusal.errno().is_some_and(|errno| gone.contains(&errno)) => Ok(false),
            Err(refusal) => {
                let what = format!("replacing the eBPF program {} at {interface}", program.name());
                Err(Error::kernel(what)(refusal))
            }
        }
    }

    fn try_replace(&mut self, program: Program, interface: &str) -> Result<(), Refusal> {
        let pin = self.pins.link(program, interface);
        let hook = self.hook;
        let loaded = self.program_mut(program)?;
        match hook {
            Hook::Tcx => {
                let link = FdLink::from(PinnedLink::from_pin(&pin)?);
                let id = loaded.attach_to_link(link.try_into()?)?;
                // Dropping it closes our hand on it; the pin holds it.
                drop(FdLink::try_from(loaded.take_link(id)?)?);
            }
            Hook::Clsact => {
                let id = loaded.attach_to_link(filter(program, interface)?)?;
                keep(loaded, id)?;
                mark(loaded, &pin)?;
            }
        }
        Ok(())
    }

    fn create(&mut self, program: Program, interface: &str) -> Result<(), Refusal> {
        let pin = self.pins.link(program, interface);
        let hook = self.hook;
        let loaded = self.program_mut(program)?;
        match hook {
            Hook::Tcx => {
                let order = TcAttachOptions::TcxOrder(match program.place() {
                    Place::First => LinkOrder::first(),
                    Place::Middle => LinkOrder::default(),
                    Place::Last => LinkOrder::last(),
                });
                let id = loaded.attach_with_options(interface, program.side(), order)?;
                FdLink::try_from(loaded.take_link(id)?)?.pin(&pin)?;
            }
            Hook::Clsact => {
                add_clsact(interface)?;
                let place = NlOptions {
                    priority: clsact_priority(program),
                    handle: CLSACT_HANDLE,
                    ..NlOptions::default()
                };
                let place = TcAttachOptions::Netlink(place);
                let attached = loaded.attach_with_options(interface, program.side(), place);
                let id = match attached.map_err(Refusal::from) {
                    // Left by a process that died before it could pin anything.
                    Err(refusal) if refusal.errno() == Some(Errno::EXIST.raw_os_error()) => {
                        loaded.attach_to_link(filter(program, interface)?)?
                    }
                    attached => attached?,
                };
                keep(loaded, id)?;
                mark(loaded, &pin)?;
            }
        }
        Ok(())
    }

    fn program_mut(&mut self, program: Program) -> Result<&mut SchedClassifier, Refusal> {
        Ok(self
            .object
            .program_mut(program.name())
            .ok_or(MissingProgram(program))?
            .try_into()?)
    }
}

/// Our filter at an interface, for replacing or removing it.
fn filter(program: Program, interface: &str) -> std::io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(
        interface,
        program.side(),
        clsact_priority(program),
        CLSACT_HANDLE,
        None,
    )
}

/// Leaves a filter in place when this process lets go of it.
fn keep(loaded: &mut SchedClassifier, id: SchedClassifierLinkId) -> Result<(), Refusal> {
    let _kept = ManuallyDrop::new(loaded.take_link(id)?);
    Ok(())
}

/// Pins a program to say that there is a filter with it, in place of what the pin says so far. The filter holds the
/// program by itself.
fn mark(loaded: &mut SchedClassifier, pin: &Path) -> Result<(), Refusal> {
    let mut aside = pin.as_os_str().to_owned();
    aside.push("~");
    let aside = Path::new(&aside);
    Pins::remove(aside)?;
    loaded.pin(aside)?;
    Ok(std::fs::rename(aside, pin)?)
}

fn add_clsact(interface: &str) -> Result<(), Refusal> {
    let there = Errno::EXIST.raw_os_error();
    match tc::qdisc_add_clsact(interface).map_err(Refusal::from) {
        Err(refusal) if refusal.errno() != Some(there) => Err(refusal),
        _ => Ok(()),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the object has no program {}", .0.name())]
struct MissingProgram(Program);
