//! Which devices the processes of a cgroup may use.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use crate::{
    error::{Error, Refusal, Result},
    sys::{self, Instruction},
};

/// A character device, or all those of a major number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its major number.
    pub major: u32,
    /// Its minor number.
    pub minor: Option<u32>,
}

/// From now on, the processes of this cgroup and of those below it use no devices but these, also those that have been
/// made already and will be. It holds as long as the cgroup is there, and takes the place of an earlier list.
pub fn allow_devices(cgroup: &Path, devices: &[Device]) -> Result<()> {
    let directory = File::open(cgroup).map_err(|source| Error::Cgroup {
        path: cgroup.to_owned(),
        source,
    })?;
    attach(&directory, devices)
        .map_err(|error| Error::kernel("limiting a cgroup's devices")(Refusal::from(error)))
}

fn attach(cgroup: &File, devices: &[Device]) -> io::Result<()> {
    let program: OwnedFd = sys::load_device_program(&program(devices))?;
    sys::attach_device_program(cgroup.as_fd(), program.as_fd())
}

/// The program: built rather than compiled, so that the list is at one place.
fn program(devices: &[Device]) -> Vec<Instruction> {
    // Of the kernel's `struct bpf_cgroup_dev_ctx`: the access and, in its lower half, the kind; the numbers.
    let mut program = vec![
        Instruction::load(KIND, 0),
        Instruction::load(MAJOR, 4),
        Instruction::load(MINOR, 8),
        Instruction::and(KIND, 0xffff),
        Instruction::set(RESULT, 1),
    ];
    for device in devices {
        let mut wanted = vec![(KIND, CHARACTER), (MAJOR, device.major)];
        wanted.extend(device.minor.map(|minor| (MINOR, minor)));
        // Past the rest of the comparisons, and past the end that follows them.
        for (left, (register, value)) in (1..=wanted.len()).rev().zip(&wanted) {
            program.push(Instruction::skip_unless_equal(*register, *value, left));
        }
        program.push(Instruction::END);
    }
    program.extend([Instruction::set(RESULT, 0), Instruction::END]);
    program
}

const RESULT: u8 = 0;
const KIND: u8 = 2;
const MAJOR: u8 = 3;
const MINOR: u8 = 4;

/// The kernel's number of that kind.
const CHARACTER: u32 = 2;
