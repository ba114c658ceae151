//! `flynn-host ca`: the cluster's certificate authority, and the certificates of this host.

use std::path::{Path, PathBuf};
use std::time::Duration;

use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{CaStatus, RotationStatus, Stage};
use flynn_api::{Digest, ErrorCode};
use jiff::Timestamp;
use serde::Serialize;

use super::members::Shown;
use super::show::table;
use crate::identities;

/// What can be asked of the certificate authority.
#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// Show the roots, a change of them that is under way, and this host's certificates
    Status(Shown),
    /// Have the cluster's CA take another root: the old one stays trusted until nobody holds a certificate of it
    Rotate(Rotate),
}

/// `flynn-host ca rotate`
#[derive(clap::Args, Debug)]
pub struct Rotate {
    /// Return at once; `flynn-host ca status` shows how far it is
    #[arg(long)]
    detach: bool,
    /// The state directory
    #[arg(long, default_value = "/var/lib/flynn")]
    state: PathBuf,
}

/// All there is to show.
#[derive(Serialize)]
struct Status {
    /// The cluster's, as this host's discoverd knows it; `null` when that cannot be asked.
    cluster: Option<CaStatus>,
    /// This host's.
    certificates: Vec<Own>,
}

/// A certificate on this host.
#[derive(Serialize)]
struct Own {
    name: String,
    fingerprint: Digest,
    /// The root that signed it, where it is one that is trusted.
    root: Option<Digest>,
    not_before: Timestamp,
    not_after: Timestamp,
    days_left: i64,
}

/// Does it.
///
/// # Errors
/// This host is in no cluster, or discoverd cannot be asked.
pub async fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Status(shown) => {
            let certificates = own(shown.state(), Timestamp::now());
            let asked = async { anyhow::Ok(identities::discoverd(shown.state())?.ca().await?) };
            let (cluster, trouble) = match asked.await {
                Ok(cluster) => (Some(cluster), None),
                Err(error) => (None, Some(error)),
            };
            let status = Status {
                cluster,
                certificates,
            };
            shown.say(&status, || text(&status, Timestamp::now()))?;
            // What is known here is shown all the same: it may be what is wrong.
            trouble.map_or(Ok(()), |error| {
                Err(error.context("this host's discoverd cannot be asked about the cluster's CA"))
            })
        }
        Command::Rotate(args) => rotate(args).await,
    }
}

fn own(state: &Path, now: Timestamp) -> Vec<Own> {
    let one = |kept: identities::Kept| {
        let certificate = kept.identity.certificate().ok()?;
        Some(Own {
            name: kept.name().to_owned(),
            fingerprint: certificate.fingerprint,
            root: kept.identity.held().and_then(|held| held.holds.first().copied()),
            not_before: certificate.not_before,
            not_after: certificate.not_after,
            days_left: days(now, certificate.not_after),
        })
    };
    identities::kept(state).into_iter().filter_map(one).collect()
}

fn days(now: Timestamp, then: Timestamp) -> i64 {
    then.duration_since(now).as_hours().div_euclid(24)
}

fn short(fingerprint: &Digest) -> String {
    format!("{:.16}", fingerprint.to_string())
}

fn text(status: &Status, now: Timestamp) -> String {
    let date = |time: Timestamp| time.strftime("%Y-%m-%d").to_string();
    let mut roots = table(&["ROOT", "FROM", "UNTIL", "DAYS LEFT", "IS"]);
    for root in status.cluster.iter().flat_map(|ca| &ca.roots) {
        roots.add_row([
            short(&root.fingerprint),
            date(root.not_before),
            date(root.not_after),
            days(now, root.not_after).to_string(),
            match (root.signs, root.trusted) {
                (true, _) => "trusted, signs",
                (false, true) => "trusted",
                (false, false) => "kept for hosts that were away",
            }
            .to_owned(),
        ]);
    }
    let mut certificates = table(&["CERTIFICATE", "FROM", "UNTIL", "DAYS LEFT", "ROOT"]);
    for own in &status.certificates {
        certificates.add_row([
            own.name.clone(),
            date(own.not_before),
            date(own.not_after),
            own.days_left.to_string(),
            own.root.as_ref().map_or_else(|| "unknown".to_owned(), short),
        ]);
    }
    let mut parts = Vec::new();
    if let Some(ca) = &status.cluster {
        parts.push(roots.trim_fmt());
        parts.push(match &ca.rotation {
            Some(rotation) => progress(rotation).join("\n"),
            None if ca.requested => "another root was asked for, and is about to be made".to_owned(),
            None => "no change of roots is under way".to_owned(),
        });
    }
    parts.push(certificates.trim_fmt());
    parts.join("\n\n")
}

/// How far a change is, and what it waits for.
fn progress(rotation: &RotationStatus) -> Vec<String> {
    let mut lines = vec![match rotation.stage {
        Stage::Spread => {
            "a new root is beside the old one, which signs until all hosts trust the new one".to_owned()
        }
        Stage::Renew => {
            "the new root signs; the old one is trusted until nobody holds a certificate of it".to_owned()
        }
    }];
    lines.extend(
        rotation
            .waits
            .iter()
            .map(|wait| format!("  {}: {}", wait.host, wait.why)),
    );
    if rotation.waits.iter().any(|wait| wait.away)
        && let Some(until) = rotation.until
    {
        lines.push(format!(
            "  who is away is waited for until {until} at most, or until `flynn-host remove`"
        ));
    }
    lines
}

async fn rotate(args: &Rotate) -> anyhow::Result<()> {
    let before = identities::discoverd(&args.state)?.rotate_ca().await?;
    let old = before.signer().map(|root| root.fingerprint);
    if args.detach {
        println!("the CA takes another root; `flynn-host ca status` shows how far it is");
        return Ok(());
    }
    let (mut began, mut said) = (before.rotation.is_some(), Vec::new());
    loop {
        if let Some(ca) = ask(&identities::discoverd(&args.state)?).await? {
            began |= ca.rotation.is_some() || ca.signer().map(|root| root.fingerprint) != old;
            match &ca.rotation {
                Some(rotation) => {
                    let lines = progress(rotation);
                    if lines != said {
                        println!("{}", lines.join("\n"));
                        said = lines;
                    }
                    let away = !rotation.waits.is_empty() && rotation.waits.iter().all(|wait| wait.away);
                    if rotation.stage == Stage::Renew && away {
                        println!("the rest happens by itself; `flynn-host ca status` shows it");
                        return Ok(());
                    }
                }
                None if began && !ca.requested => {
                    let signer = ca.signer().map(|root| short(&root.fingerprint));
                    println!("done: {} signs, and is the only root", signer.unwrap_or_default());
                    return Ok(());
                }
                None => {}
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// `None` when discoverd cannot answer just now.
async fn ask(discoverd: &DiscoveryClient) -> anyhow::Result<Option<CaStatus>> {
    match discoverd.ca().await {
        Err(error) if matches!(error.code, ErrorCode::Unavailable | ErrorCode::Timeout) => Ok(None),
        result => Ok(Some(result?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flynn_api::discovery::{RootStatus, Wait};

    #[test]
    fn a_change_of_roots_is_told_with_what_it_waits_for() {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        let root = |name: &str, signs, trusted| RootStatus {
            fingerprint: Digest::of(name.as_bytes()),
            not_before: now,
            not_after: now + jiff::SignedDuration::from_hours(24 * 10),
            signs,
            trusted,
        };
        let wait = |host: &str, away| Wait {
            host: host.into(),
            away,
            why: "it holds certificates of the old root".into(),
        };
        let status = Status {
            cluster: Some(CaStatus {
                trusted: String::new(),
                roots: vec![
                    root("b", true, true),
                    root("a", false, true),
                    root("z", false, false),
                ],
                requested: false,
                rotation: Some(RotationStatus {
                    stage: Stage::Renew,
                    since: now,
                    waits: vec![wait("h2", true)],
                    until: Some(now),
                }),
                loaded: None,
            }),
            certificates: Vec::new(),
        };
        let text = text(&status, now);
        for part in [
            "trusted, signs",
            "h2: it holds",
            "remove",
            "kept for hosts",
            "  10  ",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
