//! The lab's part of every cgroup hierarchy.
//!
//! A lab is `flynn-lab-<name>` at the root of each hierarchy that the machine has (v1, v2 or both), each host a
//! child of it. In v2 the lab's own processes and each host's first ones are in leaves (`init.scope`), since
//! only groups without processes may hand controllers on.

use crate::wait::until;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

const ROOT: &str = "/sys/fs/cgroup";
const PREFIX: &str = "flynn-lab-";
/// The controllers that hosts use; no others are touched.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];
/// The leaf of a v2 group that its first processes are in.
const LEAF: &str = "init.scope";

/// A mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hierarchy {
    /// Where it is mounted.
    pub(crate) mount: PathBuf,
    /// The controllers or the name of a v1 hierarchy, as mount options; none for v2.
    pub(crate) v1: Option<String>,
}

/// All hierarchies of this machine.
pub(crate) fn hierarchies() -> Result<Vec<Hierarchy>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mounts")?;
    let found = parse(&text);
    if !found.iter().any(|hierarchy| hierarchy.v1.is_none()) {
        bail!("no cgroup v2 is mounted below {ROOT}; the lab needs it for killing and freezing hosts");
    }
    Ok(found)
}

fn parse(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = mountinfo.lines().filter_map(parse_line).collect();
    found.sort_by(|one, other| one.mount.cmp(&other.mount));
    found.dedup_by(|one, other| one.mount == other.mount);
    found
}

fn parse_line(line: &str) -> Option<Hierarchy> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mount = PathBuf::from(mount.split(' ').nth(4)?);
    let mut fields = file_system.split(' ');
    let kind = fields.next()?;
    let options = fields.nth(1)?;
    if !mount.starts_with(ROOT) {
        return None;
    }
    match kind {
        "cgroup2" => Some(Hierarchy { mount, v1: None }),
        "cgroup" => {
            let kept: Vec<&str> = options
                .split(',')
                .filter(|option| !matches!(*option, "rw" | "ro"))
                .collect();
            Some(Hierarchy {
                mount,
                v1: Some(kept.join(",")),
            })
        }
        _ => None,
    }
}

/// A group of the lab, or the lab itself, in all hierarchies.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Group {
    hierarchies: Vec<Hierarchy>,
    path: PathBuf,
}

impl Group {
    /// The lab of this name. Makes nothing.
    pub(crate) fn lab(name: &str) -> Result<Self> {
        Ok(Self {
            hierarchies: hierarchies()?,
            path: PathBuf::from(format!("{PREFIX}{name}")),
        })
    }

    /// A child of this group. Makes nothing.
    pub(crate) fn child(&self, name: &str) -> Self {
        Self {
            hierarchies: self.hierarchies.clone(),
            path: self.path.join(name),
        }
    }

    /// The hierarchies that the group is in.
    pub(crate) fn hierarchies(&self) -> &[Hierarchy] {
        &self.hierarchies
    }

    /// Makes it in every hierarchy, ready to hold processes and groups.
    pub(crate) fn make(&self) -> Result<()> {
        for hierarchy in &self.hierarchies {
            let dir = hierarchy.mount.join(&self.path);
            make_dir(&dir)?;
            match &hierarchy.v1 {
                None => {
                    make_dir(&dir.join(LEAF))?;
                    hand_on_controllers(&hierarchy.mount, &self.path)?;
                }
                Some(options) if options.split(',').any(|option| option == "cpuset") => inherit_cpuset(&dir)?,
                Some(_) => {}
            }
        }
        Ok(())
    }

    /// Whether it is there in any hierarchy.
    pub(crate) fn exists(&self) -> bool {
        self.hierarchies
            .iter()
            .any(|hierarchy| hierarchy.mount.join(&self.path).exists())
    }

    /// Moves the calling process into it, in v2 into the group itself: whoever makes a cgroup namespace does so from
    /// there, and then goes on to the leaf with [`Group::enter_leaf`].
    pub(crate) fn enter(&self) -> Result<()> {
        for hierarchy in &self.hierarchies {
            join(&hierarchy.mount.join(&self.path))?;
        }
        Ok(())
    }

    /// Moves the calling process into the leaf.
    pub(crate) fn enter_leaf(&self) -> Result<()> {
        for hierarchy in &self.hierarchies {
            let dir = hierarchy.mount.join(&self.path);
            join(&if hierarchy.v1.is_none() {
                dir.join(LEAF)
            } else {
                dir
            })?;
        }
        Ok(())
    }

    /// Moves the calling process to the v2 leaf only.
    pub(crate) fn enter_v2_leaf(&self) -> Result<()> {
        join(&self.v2()?.join(LEAF))
    }

    /// Its directory in v2.
    pub(crate) fn v2(&self) -> Result<PathBuf> {
        let v2 = self
            .hierarchies
            .iter()
            .find(|hierarchy| hierarchy.v1.is_none())
            .context("no cgroup v2")?;
        Ok(v2.mount.join(&self.path))
    }

    /// Whether a process is in it or below it.
    pub(crate) fn holds(&self, pid: i32) -> bool {
        let prefix = format!("0::/{}", self.path.display());
        fs::read_to_string(format!("/proc/{pid}/cgroup")).is_ok_and(|text| {
            text.lines().any(|line| {
                line.strip_prefix(&prefix)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            })
        })
    }

    /// Stops all processes in it where they are, and waits until they stand.
    pub(crate) fn freeze(&self) -> Result<()> {
        let dir = self.v2()?;
        write(&dir.join("cgroup.freeze"), "1")?;
        until(
            Duration::from_secs(10),
            "the host's processes to stand still",
            || Ok(event(&dir, "frozen")? == Some(true)),
        )
    }

    /// Kills all processes in it at once, and waits until they are gone.
    pub(crate) fn kill(&self) -> Result<()> {
        let dir = self.v2()?;
        if !dir.exists() {
            return Ok(());
        }
        write(&dir.join("cgroup.kill"), "1")?;
        until(Duration::from_secs(20), "killed processes to be gone", || {
            Ok(event(&dir, "populated")? != Some(true))
        })
    }

    /// Removes it and what is below it from every hierarchy, once no process is in it.
    pub(crate) fn remove(&self) -> Result<()> {
        for hierarchy in &self.hierarchies {
            let dir = hierarchy.mount.join(&self.path);
            // Processes that died a moment ago may still count.
            until(
                Duration::from_secs(10),
                &format!("{} to be removable", dir.display()),
                || match remove_tree(&dir) {
                    Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(false),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
                    outcome => outcome
                        .map(|()| true)
                        .with_context(|| format!("cannot remove {}", dir.display())),
                },
            )?;
        }
        Ok(())
    }
}

/// The names of all labs that have a group anywhere.
pub(crate) fn labs() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for hierarchy in hierarchies()? {
        for entry in fs::read_dir(&hierarchy.mount)? {
            if let Some(name) = entry?
                .file_name()
                .to_str()
                .and_then(|name| name.strip_prefix(PREFIX))
            {
                names.push(name.to_owned());
            }
        }
    }
    names.sort();
    names.dedup();
    Ok(names)
}

fn make_dir(dir: &Path) -> Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("cannot make the cgroup {}; is this root?", dir.display()))
        }
        _ => Ok(()),
    }
}

fn join(dir: &Path) -> Result<()> {
    write(&dir.join("cgroup.procs"), "0")
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// Enables the controllers that hosts use for the children of the root and of each group above `path`. What `path` hands on
/// is the business of who lives in it.
fn hand_on_controllers(mount: &Path, path: &Path) -> Result<()> {
    let mut dir = mount.to_owned();
    let mut dirs = Vec::new();
    for part in path {
        dirs.push(dir.clone());
        dir.push(part);
    }
    for dir in dirs {
        let controllers =
            fs::read_to_string(dir.join("cgroup.controllers")).context("cannot read the controllers")?;
        for controller in controllers
            .split_whitespace()
            .filter(|controller| CONTROLLERS.contains(controller))
        {
            // One that cannot be had is one that hosts do not see; `flynn-host` says what it lacks.
            let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
    Ok(())
}

/// A new v1 cpuset is empty and takes no process; it gets what its parent has.
fn inherit_cpuset(dir: &Path) -> Result<()> {
    let Some(parent) = dir.parent() else { return Ok(()) };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let value = fs::read_to_string(parent.join(file)).context("cannot read the parent's cpuset")?;
        write(&dir.join(file), value.trim())?;
    }
    // And so shall the groups that the host makes.
    write(&dir.join("cgroup.clone_children"), "1")
}

/// A flag of `cgroup.events`; none when the group is gone.
fn event(dir: &Path, flag: &str) -> Result<Option<bool>> {
    let text = match fs::read_to_string(dir.join("cgroup.events")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.context("cannot read cgroup.events")?,
    };
    Ok(text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(name, _)| *name == flag)
        .map(|(_, value)| value == "1"))
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hybrid_and_pure_machines_are_understood() {
        let hybrid = "\
30 24 0:26 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
34 24 0:30 / /mnt/elsewhere rw - cgroup2 cgroup2 rw
";
        let expected = [
            ("/sys/fs/cgroup/cpu,cpuacct", Some("cpu,cpuacct")),
            ("/sys/fs/cgroup/systemd", Some("xattr,name=systemd")),
            ("/sys/fs/cgroup/unified", None),
        ]
        .map(|(mount, v1)| Hierarchy {
            mount: mount.into(),
            v1: v1.map(str::to_owned),
        });
        assert_eq!(parse(hybrid), expected);
        let pure = "35 24 0:31 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(
            parse(pure),
            [Hierarchy {
                mount: ROOT.into(),
                v1: None
            }]
        );
    }
}
