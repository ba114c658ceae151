//! Whether the kernel takes the programs at all.

use std::path::Path;

use aya::{Ebpf, EbpfLoader, programs};

use crate::{
    error::{Error, Refusal, Result},
    pins::Pins,
};

/// All objects by name: `build.rs` has written the list.
static OBJECTS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/objects.rs"));

/// Has the kernel's verifier look at every program of every object, over maps that are pinned below `pins` (and stay).
/// Nothing is attached. Returns the objects with their programs, or what the verifier says against the first that it
/// refuses.
pub fn verify(pins: &Path) -> Result<Vec<(&'static str, Vec<String>)>> {
    let pins = Pins::open(pins)?;
    let mut verified = Vec::new();
    for (name, bytes) in OBJECTS {
        let mut object = EbpfLoader::new()
            .default_map_pin_directory(pins.maps())
            .load(bytes)
            .map_err(|error| Error::kernel(format!("loading the eBPF maps of {name}"))(error.into()))?;
        verified.push((*name, load_all(name, &mut object)?));
    }
    Ok(verified)
}

fn load_all(object_name: &str, object: &mut Ebpf) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for (name, program) in object.programs_mut() {
        load(program).map_err(Error::kernel(format!(
            "loading the eBPF program {name} of {object_name}"
        )))?;
        names.push(name.to_owned());
    }
    names.sort();
    Ok(names)
}

fn load(program: &mut programs::Program) -> Result<(), Refusal> {
    use programs::Program;
    match program {
        Program::SchedClassifier(program) => program.load()?,
        Program::Xdp(program) => program.load()?,
        Program::SkLookup(program) => program.load()?,
        Program::CgroupSockAddr(program) => program.load()?,
        Program::CgroupSkb(program) => program.load()?,
        Program::CgroupSock(program) => program.load()?,
        Program::SockOps(program) => program.load()?,
        _ => return Err(UnknownKind.into()),
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
#[error("this kind of program is not known here: add it to verify.rs")]
struct UnknownKind;
