//! Finds a user and a group by name, as `/etc/passwd` and `/etc/group` of the image have them.

/// An image's accounts, as far as it has these files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Accounts {
    pub(crate) passwd: Option<String>,
    pub(crate) group: Option<String>,
}

impl Accounts {
    /// User and group id of `user`, `user:group`, with names or numbers; `None` for nobody in particular.
    pub(crate) fn resolve(&self, text: &str) -> Result<Option<(u32, u32)>, String> {
        if text.is_empty() {
            return Ok(None);
        }
        let (user, group) = text
            .split_once(':')
            .map_or((text, None), |(user, group)| (user, Some(group)));
        let known = self.user(user);
        let uid = match user.parse() {
            Ok(uid) => uid,
            Err(_) => known.map(|(uid, _)| uid).ok_or_else(|| {
                format!("the image has no user {user:?} in its /etc/passwd; build it with a user that is there, or with a number")
            })?,
        };
        let gid = match group.filter(|group| !group.is_empty()) {
            None => known.map_or(0, |(_, gid)| gid),
            Some(group) => match group.parse() {
                Ok(gid) => gid,
                Err(_) => self.group(group).ok_or_else(|| {
                    format!("the image has no group {group:?} in its /etc/group; build it with a group that is there, or with a number")
                })?,
            },
        };
        Ok(Some((uid, gid)))
    }

    /// Ids of the user with this name or number.
    fn user(&self, name: &str) -> Option<(u32, u32)> {
        self.passwd.as_deref()?.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (found, _, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            (found == name || uid == name).then_some((uid.parse().ok()?, gid.parse().ok()?))
        })
    }

    /// Id of the group with this name.
    fn group(&self, name: &str) -> Option<u32> {
        self.group.as_deref()?.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (found, _, gid) = (fields.next()?, fields.next()?, fields.next()?);
            (found == name).then(|| gid.parse().ok()).flatten()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_and_numbers_are_found() {
        let accounts = Accounts {
            passwd: Some("root:x:0:0::/:/bin/sh\nbroken\nweb:x:101:102::/:\n".into()),
            group: Some("root:x:0:\nstaff:x:50:web\n".into()),
        };
        let resolve = |text| accounts.resolve(text);
        assert_eq!(resolve(""), Ok(None));
        assert_eq!(resolve("web"), Ok(Some((101, 102))));
        assert_eq!(resolve("101"), Ok(Some((101, 102))));
        assert_eq!(resolve("7"), Ok(Some((7, 0))));
        assert_eq!(resolve("web:staff"), Ok(Some((101, 50))));
        assert_eq!(resolve("7:8"), Ok(Some((7, 8))));
        assert!(resolve("nobody").is_err_and(|why| why.contains("nobody")));
        assert!(resolve("web:nothing").is_err_and(|why| why.contains("nothing")));
        assert!(Accounts::default().resolve("web").is_err());
    }

    proptest! {
        #[test]
        fn odd_files_are_only_odd(passwd in "(web|:|x|0|\n|\\PC){0,40}", text in "\\PC{0,10}") {
            let accounts = Accounts { passwd: Some(passwd.clone()), group: Some(passwd) };
            let _ = accounts.resolve(&text);
        }
    }
}
