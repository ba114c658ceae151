//! What can go wrong, and what to do about it.

use std::{error::Error as StdError, io, path::PathBuf};

use thiserror::Error;

/// Why the data plane did not do something.
#[derive(Debug, Error)]
pub enum Error {
    /// The directory for pins is in no BPF file system.
    #[error("{} is not in a BPF file system, where programs and maps outlive this process. Mount one: mount -t bpf bpf /sys/fs/bpf", .0.display())]
    NotBpffs(PathBuf),
    /// Something about the directory for pins.
    #[error("{what} {}: {source}", path.display())]
    Pins {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// This process may not use eBPF.
    #[error("{what} needs root, or CAP_BPF and CAP_NET_ADMIN")]
    Forbidden {
        /// What was tried.
        what: String,
    },
    /// The kernel, or the library in front of it, refused.
    #[error("{what}: {}", chain(source.as_ref()))]
    Kernel {
        /// What was tried.
        what: String,
        /// Why not.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// A cgroup cannot be used.
    #[error("cannot use the cgroup {}: {source}", path.display())]
    Cgroup {
        /// Its directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A service's number is out of range.
    #[error("there is no service of the number {0}: numbers go from 1 to {max}", max = flynn_abi::MAX_SERVICES - 1)]
    NoSuchService(u32),
    /// More of something than the maps have room for.
    #[error("there are more than {most} {what}, which is as many as there can be")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there can be.
        most: u32,
    },
    /// As many containers as the maps have room for.
    #[error("this host has {0} containers, which is as many as it can have")]
    Full(u32),
}

/// Shorthand.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn kernel(what: impl Into<String>) -> impl FnOnce(Refusal) -> Self {
        let what = what.into();
        move |Refusal(source)| {
            // The other one of this kind, EACCES, is the verifier's word.
            let forbidden = Some(rustix::io::Errno::PERM.raw_os_error());
            if errno(source.as_ref()).and_then(io::Error::raw_os_error) == forbidden {
                Self::Forbidden { what }
            } else {
                Self::Kernel { what, source }
            }
        }
    }
}

/// Any of the library's errors.
pub(crate) struct Refusal(Box<dyn StdError + Send + Sync>);

impl<E: StdError + Send + Sync + 'static> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self(Box::new(error))
    }
}

impl Refusal {
    /// The kernel's own word, where there is one.
    pub(crate) fn errno(&self) -> Option<i32> {
        errno(self.0.as_ref()).and_then(io::Error::raw_os_error)
    }
}

fn errno<'e>(error: &'e (dyn StdError + 'static)) -> Option<&'e io::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io);
        }
        cause = error.source();
    }
    None
}

/// The error with its causes, each once: some of them repeat theirs.
fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}
