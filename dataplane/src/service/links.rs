//! Which cgroup the programs are attached to.

use std::{fs, fs::File, os::fd::AsFd, os::unix::fs::MetadataExt, path::Path};

use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSockAddr, links::FdLink},
};
use rustix::io::Errno;

use crate::{
    error::{Error, Refusal, Result},
    pins::Pins,
    sys,
};

const PROGRAMS: [&str; 8] = [
    "connect4",
    "connect6",
    "getpeername4",
    "getpeername6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
];

pub(super) struct Links {
    object: Ebpf,
    pins: Pins,
}

impl Links {
    /// Loads the programs and puts them in the place of those that are pinned.
    pub(super) fn take(object: Ebpf, pins: Pins) -> Result<Self> {
        let mut links = Self { object, pins };
        for name in PROGRAMS {
            links
                .program(name)
                .and_then(|program| Ok(program.load()?))
                .map_err(Error::kernel(format!("loading the eBPF program {name}")))?;
        }
        for (name, cgroup) in links.pins.cgroup_links(&PROGRAMS)? {
            if !links.replace(name, cgroup)? {
                Pins::remove(&links.pins.cgroup_link(name, cgroup))?;
            }
        }
        Ok(links)
    }

    pub(super) fn pins(&self) -> &Pins {
        &self.pins
    }

    pub(super) fn attach(&mut self, cgroup: &Path) -> Result<()> {
        let failed = |source| Error::Cgroup {
            path: cgroup.into(),
            source,
        };
        let directory = File::open(cgroup).map_err(failed)?;
        // A cgroup is known by its inode, which no later one of the same path has.
        let id = fs::metadata(cgroup).map_err(failed)?.ino();
        for name in PROGRAMS {
            if self.pins.cgroup_link(name, id).exists() {
                if self.replace(name, id)? {
                    continue;
                }
                Pins::remove(&self.pins.cgroup_link(name, id))?;
            }
            self.create(name, &directory, id).map_err(Error::kernel(format!(
                "attaching the eBPF program {name} to the cgroup {}",
                cgroup.display()
            )))?;
        }
        for (name, other) in self.pins.cgroup_links(&PROGRAMS)? {
            if other != id {
                Pins::remove(&self.pins.cgroup_link(name, other))?;
            }
        }
        Ok(())
    }

    fn create(&mut self, name: &str, directory: &File, id: u64) -> Result<(), Refusal> {
        let pin = self.pins.cgroup_link(name, id);
        let program = self.program(name)?;
        let link = program.attach(directory, CgroupAttachMode::Single)?;
        FdLink::try_from(program.take_link(link)?)?.pin(&pin)?;
        Ok(())
    }

    /// Puts the program into a pinned link: whether its cgroup is still there.
    fn replace(&mut self, name: &str, id: u64) -> Result<bool> {
        let pin = self.pins.cgroup_link(name, id);
        let mut replace = || -> Result<(), Refusal> {
            let link = sys::object_get(&pin)?;
            let program = self.program(name)?;
            Ok(sys::link_update(link.as_fd(), program.fd()?.as_fd())?)
        };
        match replace() {
            Ok(()) => Ok(true),
            Err(refusal) if refusal.errno() == Some(Errno::NOLINK.raw_os_error()) => Ok(false),
            Err(refusal) => Err(Error::kernel(format!("replacing the eBPF program {name}"))(
                refusal,
            )),
        }
    }

    fn program(&mut self, name: &str) -> Result<&mut CgroupSockAddr, Refusal> {
        Ok(self
            .object
            .program_mut(name)
            .ok_or_else(|| std::io::Error::other(format!("the object has no program {name}")))?
            .try_into()?)
    }
}
