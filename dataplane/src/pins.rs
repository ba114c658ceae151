//! The directory in which everything is pinned.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use crate::{
    Program,
    error::{Error, Refusal, Result},
};

/// What `statfs` calls a BPF file system.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Names below the directory for pins. (A dot is no letter in a BPF file system.)
#[derive(Debug)]
pub(crate) struct Pins {
    directory: PathBuf,
    maps: PathBuf,
    links: PathBuf,
}

impl Pins {
    pub(crate) fn open(directory: &Path) -> Result<Self> {
        let pins = Self {
            directory: directory.into(),
            maps: directory.join(format!("v{}", flynn_abi::LAYOUT)),
            links: directory.join("links"),
        };
        create(directory)?;
        let stat = rustix::fs::statfs(directory).map_err(|errno| Error::Pins {
            what: "looking at",
            path: directory.into(),
            source: errno.into(),
        })?;
        if stat.f_type != BPF_FS_MAGIC {
            return Err(Error::NotBpffs(directory.into()));
        }
        create(&pins.maps)?;
        create(&pins.links)?;
        Ok(pins)
    }

    /// Where maps are pinned by name.
    pub(crate) fn maps(&self) -> &Path {
        &self.maps
    }

    /// Where the link between a program and an interface is pinned.
    pub(crate) fn link(&self, program: Program, interface: &str) -> PathBuf {
        self.links.join(format!("{}@{interface}", program.name()))
    }

    /// Where the link between the load balancer's XDP program and an interface is pinned.
    pub(crate) fn xdp(&self, interface: &str) -> PathBuf {
        self.links.join(format!("lb_xdp@{interface}"))
    }

    /// Where the link between the program of the router's ports and the network namespace is pinned.
    pub(crate) fn steer(&self) -> PathBuf {
        self.links.join("steer")
    }

    /// All links that are pinned.
    pub(crate) fn links(&self) -> Result<Vec<(Program, String)>> {
        let failed = |source| Error::Pins {
            what: "listing",
            path: self.links.clone(),
            source,
        };
        let mut links = Vec::new();
        for entry in fs::read_dir(&self.links).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let parts = name.to_str().and_then(|name| name.split_once('@'));
            if let Some((program, interface)) = parts
                && let Some(program) = Program::by_name(program)
            {
                links.push((program, interface.to_owned()));
            }
        }
        links.sort();
        Ok(links)
    }

    /// Where the link between a program and a cgroup of this id is pinned.
    pub(crate) fn cgroup_link(&self, program: &str, cgroup: u64) -> PathBuf {
        self.links.join(format!("{program}@cgroup{cgroup}"))
    }

    /// All links of these programs to cgroups that are pinned.
    pub(crate) fn cgroup_links(&self, programs: &[&'static str]) -> Result<Vec<(&'static str, u64)>> {
        let failed = |source| Error::Pins {
            what: "listing",
            path: self.links.clone(),
            source,
        };
        let mut links = Vec::new();
        for entry in fs::read_dir(&self.links).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let parts = name.to_str().and_then(|name| name.split_once("@cgroup"));
            if let Some((program, id)) = parts
                && let Some(program) = programs.iter().find(|known| **known == program)
                && let Ok(id) = id.parse()
            {
                links.push((*program, id));
            }
        }
        Ok(links)
    }

    /// How many bytes of the kernel's memory a pinned map takes.
    pub(crate) fn map_memory(&self, name: &str) -> Result<u64> {
        let read = || -> Result<u64, Refusal> {
            let map = aya::maps::MapInfo::from_pin(self.maps.join(name))?.fd()?;
            let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", map.as_fd().as_raw_fd()))?;
            let line = info.lines().find_map(|line| line.strip_prefix("memlock:"));
            Ok(line
                .ok_or_else(|| io::Error::other("the kernel does not say"))?
                .trim()
                .parse()?)
        };
        read().map_err(Error::kernel(format!("looking at the eBPF map {name}")))
    }

    /// Where maps of other layouts are pinned, with their versions.
    pub(crate) fn other_layouts(&self) -> Result<Vec<(u32, PathBuf)>> {
        let failed = |source| Error::Pins {
            what: "listing",
            path: self.directory.clone(),
            source,
        };
        let mut layouts = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let version = entry.file_name();
            let version = version
                .to_str()
                .and_then(|name| name.strip_prefix('v')?.parse().ok());
            if let Some(version) = version.filter(|version| *version != flynn_abi::LAYOUT) {
                layouts.push((version, entry.path()));
            }
        }
        layouts.sort();
        Ok(layouts)
    }

    /// Removes these maps of another layout, and its directory unless others are in it.
    pub(crate) fn remove_layout(path: &Path, maps: &[PathBuf]) -> Result<()> {
        for map in maps {
            Self::remove(map)?;
        }
        match fs::remove_dir(path) {
            Ok(()) => Ok(()),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(Error::Pins {
                what: "removing",
                path: path.into(),
                source: error,
            }),
        }
    }

    /// Removes every pin.
    pub(crate) fn remove_all(&self) -> Result<()> {
        fs::remove_dir_all(&self.directory).map_err(|source| Error::Pins {
            what: "removing",
            path: self.directory.clone(),
            source,
        })
    }

    /// Removes a pin; whether there was one.
    pub(crate) fn remove(path: &Path) -> Result<bool> {
        match fs::remove_file(path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(Error::Pins {
                what: "removing",
                path: path.into(),
                source,
            }),
        }
    }
}

fn create(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).map_err(|source| Error::Pins {
        what: "making the directory",
        path: directory.into(),
        source,
    })
}
