//! Who runs the server: it refuses to run as root.

use std::fs;
use std::path::Path;

use tokio::process::Command;

use crate::Error;

/// The user of the server's processes.
#[derive(Clone, Debug)]
pub(crate) struct User {
    /// Set when it is another than ours.
    other: Option<(u32, u32)>,
    /// The name of our own user, which the server shall take for its administrator.
    pub(crate) own_name: String,
}

impl User {
    /// `postgres` when we are root, otherwise ourselves.
    pub(crate) fn find() -> Result<Self, Error> {
        let path = Path::new("/etc/passwd");
        let accounts = fs::read_to_string(path).map_err(Error::file("cannot read", path))?;
        let own = rustix::process::geteuid().as_raw();
        let own_name = named(&accounts, |account| account.uid == own)
            .ok_or(Error::NoUser)?
            .name
            .to_owned();
        if own != 0 {
            return Ok(Self {
                other: None,
                own_name,
            });
        }
        let postgres = named(&accounts, |account| account.name == "postgres").ok_or(Error::NoUser)?;
        Ok(Self {
            other: Some((postgres.uid, postgres.gid)),
            own_name,
        })
    }

    /// Gives a file or directory to the user.
    pub(crate) fn own(&self, path: &Path) -> Result<(), Error> {
        let Some((uid, gid)) = self.other else {
            return Ok(());
        };
        std::os::unix::fs::chown(path, Some(uid), Some(gid)).map_err(Error::file("cannot give away", path))
    }

    /// A program that runs as the user, with nothing of our environment, in a process group of its own.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("LC_ALL", "C.UTF-8")
            .env("TZ", "UTC")
            .process_group(0);
        if let Some((uid, gid)) = self.other {
            command.uid(uid).gid(gid);
        }
        command
    }
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

/// The first account for which `wanted` holds, of a file like `/etc/passwd`.
fn named(accounts: &str, wanted: impl Fn(&Account<'_>) -> bool) -> Option<Account<'_>> {
    accounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let (name, _) = (fields.next()?, fields.next()?);
            Some(Account {
                name,
                uid: fields.next()?.parse().ok()?,
                gid: fields.next()?.parse().ok()?,
            })
        })
        .find(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_found_among_odd_lines() {
        let accounts = "root:x:0:0:root:/root:/bin/sh\n# odd\n+::::::\npostgres:x:101:104::/:/bin/sh\n";
        let account = named(accounts, |account| account.name == "postgres").unwrap();
        assert_eq!((account.uid, account.gid), (101, 104));
        assert!(named(accounts, |account| account.uid == 7).is_none());
    }
}
