//! Which cgroup hierarchies there are, and where in each the daemon may make its groups.

use std::io;
use std::path::{Path, PathBuf};

/// The leaf to which the daemon moves where v2 wants groups with children to have no processes of their own.
pub(super) const DAEMON_LEAF: &str = "flynn-host";

/// One mounted hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// v1's controllers; none for v2.
    pub controllers: Vec<String>,
    /// The directory below which groups are made.
    pub base: PathBuf,
    /// Where it is mounted, and what of it.
    mount: (PathBuf, PathBuf),
    v2: bool,
}

impl Hierarchy {
    /// The group in it that this process is in now.
    pub(super) fn own(&self) -> Option<PathBuf> {
        let own = std::fs::read_to_string("/proc/self/cgroup").ok()?;
        let options: Vec<&str> = self.controllers.iter().map(String::as_str).collect();
        let (_, place) = own_place(&own, self.v2, &options)?;
        let (mount, root) = &self.mount;
        Some(mount.join(below(Path::new(place), root)?))
    }

    /// Whether this is the v2 hierarchy.
    pub fn is_v2(&self) -> bool {
        self.v2
    }

    /// Whether this is a v1 hierarchy with that controller.
    pub fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|name| name == controller)
    }
}

impl<'a> IntoIterator for &'a Hierarchies {
    type Item = &'a Hierarchy;
    type IntoIter = std::slice::Iter<'a, Hierarchy>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// All hierarchies that are mounted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hierarchies(Vec<Hierarchy>);

impl Hierarchies {
    /// Finds those of this process.
    pub fn find() -> io::Result<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        let own = std::fs::read_to_string("/proc/self/cgroup")?;
        Ok(parse(&mounts, &own))
    }

    /// One after the other.
    pub fn iter(&self) -> std::slice::Iter<'_, Hierarchy> {
        self.0.iter()
    }

    /// What limits cannot be set here, and why.
    pub fn notices(&self) -> Vec<String> {
        let v2_controllers = self
            .iter()
            .find(|hierarchy| hierarchy.v2)
            .and_then(|hierarchy| std::fs::read_to_string(hierarchy.base.join("cgroup.controllers")).ok())
            .unwrap_or_default();
        let missing = |name: &&&str| {
            !self.iter().any(|hierarchy| hierarchy.has(name))
                && !v2_controllers
                    .split_whitespace()
                    .any(|controller| controller == **name)
        };
        let mut notices: Vec<String> = ["memory", "cpu", "pids"]
            .iter()
            .filter(missing)
            .map(|name| {
                format!("no {name} limits: no cgroup hierarchy with the {name} controller is mounted")
            })
            .collect();
        if !self.iter().any(|hierarchy| hierarchy.v2) {
            notices.push("no cgroup v2 hierarchy is mounted: service addresses cannot be translated".into());
        }
        notices
    }
}

/// The pure part of [`Hierarchies::find`]: from `/proc/self/mountinfo` and `/proc/self/cgroup`.
fn parse(mountinfo: &str, own: &str) -> Hierarchies {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let left: Vec<&str> = left.split(' ').collect();
        let right: Vec<&str> = right.split(' ').collect();
        let (Some(root), Some(mount), Some(kind)) = (left.get(3), left.get(4), right.first()) else {
            continue;
        };
        let v2 = *kind == "cgroup2";
        if !v2 && *kind != "cgroup" {
            continue;
        }
        let options: Vec<&str> = right
            .get(2)
            .map(|options| options.split(',').collect())
            .unwrap_or_default();
        let Some((controllers, place)) = own_place(own, v2, &options) else {
            continue;
        };
        // A named hierarchy is the init system's own: it limits nothing.
        if controllers.iter().any(|name| name.starts_with("name=")) {
            continue;
        }
        let Some(relative) = below(Path::new(place), Path::new(&unescape(root))) else {
            continue;
        };
        let mount = (PathBuf::from(unescape(mount)), PathBuf::from(unescape(root)));
        let base = mount.0.join(strip_unit(relative));
        let hierarchy = Hierarchy {
            controllers,
            base,
            mount,
            v2,
        };
        // The same hierarchy mounted twice is one.
        if !found
            .iter()
            .any(|other| other.v2 == v2 && other.controllers == hierarchy.controllers)
        {
            found.push(hierarchy);
        }
    }
    Hierarchies(found)
}

/// The line of `/proc/self/cgroup` for the hierarchy mounted with these options: its controllers and our path.
fn own_place<'a>(own: &'a str, v2: bool, options: &[&str]) -> Option<(Vec<String>, &'a str)> {
    own.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        if v2 {
            return controllers.is_empty().then(|| (Vec::new(), path));
        }
        let controllers: Vec<String> = controllers.split(',').map(str::to_owned).collect();
        let fits = |name: &String| !name.is_empty() && options.contains(&name.as_str());
        controllers.iter().all(fits).then_some((controllers, path))
    })
}

/// `place` as seen from a mount whose root is `root`; none when it lies outside.
fn below<'a>(place: &'a Path, root: &Path) -> Option<&'a Path> {
    place.strip_prefix(root).ok()
}

/// Leaves out what belongs to the init system (units, and slices around them) and the daemon's own leaf.
fn strip_unit(place: &Path) -> &Path {
    let mut place = place;
    while let Some(name) = place.file_name().and_then(|name| name.to_str()) {
        let unit = [".service", ".scope", ".slice"]
            .iter()
            .any(|suffix| name.ends_with(suffix));
        if !unit && name != DAEMON_LEAF {
            break;
        }
        place = place.parent().unwrap_or(Path::new(""));
    }
    place
}

/// Undoes mountinfo's octal escapes of blanks and backslashes.
fn unescape(text: &str) -> String {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail
            .get(..3)
            .filter(|digits| digits.iter().all(|digit| (b'0'..=b'7').contains(digit)));
        match octal {
            Some(digits) if byte == b'\\' => {
                let value = digits
                    .iter()
                    .fold(0_u32, |value, digit| value * 8 + u32::from(digit - b'0'));
                plain.push(u8::try_from(value).unwrap_or(b'?'));
                rest = &tail[3..];
            }
            _ => {
                plain.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bases(hierarchies: &Hierarchies) -> Vec<&str> {
        hierarchies
            .iter()
            .filter_map(|hierarchy| hierarchy.base.to_str())
            .collect()
    }

    #[test]
    fn pure_v2_under_systemd_uses_the_root_and_not_the_unit() {
        let mounts = "25 30 0:23 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = parse(mounts, "0::/system.slice/flynn-host.service\n");
        assert_eq!(bases(&found), ["/sys/fs/cgroup/"]);
        assert!(found.iter().all(Hierarchy::is_v2));
    }

    #[test]
    fn hybrid_finds_the_place_in_each_and_skips_named_ones() {
        let mounts = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                      36 31 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      42 31 0:38 / /mnt/again rw - cgroup2 cgroup2 rw\n";
        let own = "4:memory:/lab/h1\n9:name=systemd:/\n1:cpu,cpuacct:/\n0::/lab/h1/flynn-host\n";
        let found = parse(mounts, own);
        assert_eq!(
            bases(&found),
            [
                "/sys/fs/cgroup/cpu/",
                "/sys/fs/cgroup/memory/lab/h1",
                "/sys/fs/cgroup/unified/lab/h1"
            ]
        );
        assert!(found.iter().any(|hierarchy| hierarchy.has("cpuacct")));
    }

    #[test]
    fn a_mounted_subtree_is_seen_from_its_own_root() {
        let mounts = "36 31 0:33 /lab /sys/fs/cgroup/a\\040b rw - cgroup cgroup rw,memory\n";
        assert_eq!(
            bases(&parse(mounts, "4:memory:/lab/h1\n")),
            ["/sys/fs/cgroup/a b/h1"]
        );
        assert_eq!(bases(&parse(mounts, "4:memory:/elsewhere\n")), [""; 0]);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(mounts in "[ -~\\n]{0,300}", own in "[ -~\\n]{0,100}") {
            parse(&mounts, &own);
        }
    }
}
