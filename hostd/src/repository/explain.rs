//! What tough refuses, in words that say what to do.

use anyhow::anyhow;
use tough::TransportErrorKind;
use tough::error::Error;

/// What to do about metadata that has gone back.
const ROLLBACK: &str = "the server is behind, or somebody plays back an old state; take another mirror of the \
                                   repository, or ask its keeper";

/// The error as it is shown.
pub(super) fn explain(error: &Error) -> anyhow::Error {
    match error {
        Error::ExpiredMetadata { role, .. } => anyhow!(
            "its {role} metadata has expired: its keeper must sign it anew (flynn-host repository refresh); if that was \
             done, somebody shows this host an old state of it, or this host's clock is wrong (it says {})",
            jiff::Timestamp::now()
        ),
        Error::OlderMetadata {
            role,
            current_version,
            new_version,
            ..
        } => anyhow!(
            "its {role} metadata has gone back from version {current_version} to {new_version}: {ROLLBACK}"
        ),
        Error::SnapshotRoleRollback {
            role,
            old_role_version,
            new_role_version,
            ..
        } => {
            anyhow!("{role} has gone back from version {old_role_version} to {new_role_version}: {ROLLBACK}")
        }
        Error::SnapshotRoleMissing { role, .. } => anyhow!("{role} was there and is no more: {ROLLBACK}"),
        Error::VersionMismatch {
            role,
            fetched,
            expected,
            ..
        } => anyhow!(
            "its {role} metadata has version {fetched} where {expected} was announced: the server is in the middle of a \
             change, or lies; try again later"
        ),
        Error::SystemTimeSteppedBackward {
            sys_time,
            latest_known_time,
        } => anyhow!(
            "this host's clock was set back, from {latest_known_time} to {sys_time}, and dates cannot be trusted: set it \
             right, then try again"
        ),
        Error::VerifyMetadata { role, .. } => anyhow!(
            "its {role} metadata is not signed by keys that this host trusts ({}): it was changed on its way, or is \
             another repository's",
            chain(error)
        ),
        Error::VerifyTrustedMetadata { .. } | Error::ParseTrustedMetadata { .. } => anyhow!(
            "the file given with --root is no root of trust ({}): take the root.json that the repository's keeper gave you",
            chain(error)
        ),
        Error::ParseMetadata { role, .. } => anyhow!("its {role} metadata cannot be read: {}", chain(error)),
        Error::MaxSizeExceeded { .. } => anyhow!(
            "{}: it is larger than such a file may be, or has no end",
            chain(error)
        ),
        Error::Transport { url, source, .. } if source.kind() == TransportErrorKind::FileNotFound => {
            anyhow!("there is no {url}: is it a repository, and complete?")
        }
        Error::Transport { url, .. } => match inner(error) {
            Some(why) => anyhow!("{url}: {}", explain(why)),
            None => anyhow!("{}; nothing was changed: try again later", chain(error)),
        },
        error => anyhow!("{}", chain(error)),
    }
}

/// What tough has found while it read, which comes as an error of the reading.
fn inner(error: &Error) -> Option<&Error> {
    let mut cause = std::error::Error::source(error);
    while let Some(why) = cause {
        if let Some(why) = why.downcast_ref::<Error>() {
            return Some(why);
        }
        cause = why.source();
    }
    None
}

/// An error with its causes, each said once.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(why) = cause {
        let why_text = why.to_string();
        if !text.contains(&why_text) {
            text.push_str(": ");
            text.push_str(&why_text);
        }
        cause = why.source();
    }
    text
}
