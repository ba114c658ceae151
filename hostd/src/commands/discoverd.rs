//! `flynn-host discoverd`: looks after this host's discoverd, up to the last resorts.
//!
//! Whatever takes something away says first what it takes, and asks.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::discovery::{Consistency, OwnStatus, PORT, RecoveryPlan, RejoinRequest, RestorePlan};
use tokio::time::Instant;

use super::members::Shown;
use super::show::table;
use crate::{files, identities};

/// How long a call may take: whether a majority is there is found out within, and a snapshot goes over.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long discoverd may take to start anew.
const RESTART: Duration = Duration::from_mins(1);
/// Names of services that are told.
const TOLD: usize = 10;

/// What can be asked of one discoverd.
#[derive(clap::Subcommand, Debug)]
pub enum Discoverd {
    /// Show how this host's discoverd does
    Status(Shown),
    /// Copy all that discoverd knows, the cluster's keys included, to a file that only root can read
    Snapshot {
        /// The file
        file: PathBuf,
        /// As this host knows it, which may be old: where no majority is left
        #[arg(long)]
        local: bool,
        /// The state directory
        #[arg(long, default_value = "/var/lib/flynn")]
        state: PathBuf,
    },
    /// Put a snapshot in place of all that discoverd knows; the other hosts follow this one
    Restore {
        /// What `flynn-host discoverd snapshot` wrote
        file: PathBuf,
        /// How it is done
        #[command(flatten)]
        resort: Resort,
    },
    /// The majority is lost for good: have this host's discoverd go on alone with what it has. Hosts that are left follow
    /// it, and so do lost ones that come back
    Recover(Resort),
    /// Have this host's discoverd leave its cluster and join another, such as one that was recovered without it
    Rejoin {
        /// The address of a host of that cluster
        address: String,
        /// How it is done
        #[command(flatten)]
        resort: Resort,
    },
}

/// How a last resort is used.
#[derive(clap::Args, Debug)]
pub struct Resort {
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// In spite of what speaks against it
    #[arg(long)]
    force: bool,
    /// How it is shown
    #[command(flatten)]
    shown: Shown,
}

/// Does it.
pub(super) async fn run(command: &Discoverd) -> anyhow::Result<()> {
    match command {
        Discoverd::Status(shown) => {
            let status = identities::discoverd(shown.state())?.own_status().await?;
            shown.say(&status, || own(&status))
        }
        Discoverd::Snapshot { file, local, state } => snapshot(file, *local, state).await,
        Discoverd::Restore { file, resort } => restore(file, resort).await,
        Discoverd::Recover(resort) => recover(resort).await,
        Discoverd::Rejoin { address, resort } => rejoin(address, resort).await,
    }
}

async fn snapshot(file: &Path, local: bool, state: &Path) -> anyhow::Result<()> {
    // The directory of a bare name is known, too.
    let file = std::path::absolute(file)?;
    let mut discoverd = patient(state)?;
    if local {
        discoverd = discoverd.consistency(Consistency::Local);
    }
    let snapshot = discoverd.snapshot().await?;
    // What was sent is what it was made of: its checksum is looked at.
    discoverd.check_restore(snapshot.clone()).await?;
    files::write_atomic(&file, &snapshot).with_context(|| format!("cannot write {}", file.display()))?;
    eprintln!(
        "{} holds all that discoverd knows ({} bytes), the cluster's keys included: keep it secret",
        file.display(),
        snapshot.len()
    );
    Ok(())
}

async fn restore(file: &Path, resort: &Resort) -> anyhow::Result<()> {
    let snapshot = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    let snapshot = bytes::Bytes::from(snapshot);
    let discoverd = patient(resort.shown.state())?;
    let before = discoverd.own_status().await?;
    let plan = discoverd.check_restore(snapshot.clone()).await?;
    eprintln!("{}", restore_told(&plan));
    resort.agreed(
        &plan.objections,
        "Shall it be put in place of what discoverd knows?",
    )?;
    let plan = discoverd.restore(snapshot, resort.force).await?;
    let after = settled(&discoverd, &before, |status| status.state == "leader").await?;
    resort.shown.say(&plan, || {
        format!(
            "discoverd goes on with the snapshot, from index {} on",
            after.applied
        )
    })
}

async fn recover(resort: &Resort) -> anyhow::Result<()> {
    let discoverd = patient(resort.shown.state())?;
    let before = discoverd.own_status().await?;
    let plan = discoverd.recovery().await?;
    if plan.majority {
        bail!(
            "a majority of discoverd's voters is there: nothing is to be recovered. `flynn-host list` shows them; a host \
             that is lost is taken out by `flynn-host remove`"
        );
    }
    eprintln!("{}", recovery_told(&plan));
    resort.agreed(
        &plan.objections,
        "Are the others lost for good, and shall this one go on alone?",
    )?;
    let plan = discoverd.recover(resort.force).await?;
    let after = settled(&discoverd, &before, |status| status.state == "leader").await?;
    resort.shown.say(&plan, || {
        format!(
            "this host's discoverd leads, from index {} on; hosts that come back follow it, and take a vote when they have \
             its log (`flynn-host list`)",
            after.applied
        )
    })
}

async fn rejoin(address: &str, resort: &Resort) -> anyhow::Result<()> {
    let member = if address.parse::<std::net::SocketAddr>().is_ok() {
        address.to_owned()
    } else {
        format!("{address}:{PORT}")
    };
    let discoverd = patient(resort.shown.state())?;
    let before = discoverd.own_status().await?;
    resort.agreed(
        &[],
        &format!(
            "This host's discoverd forgets all that it knows, and joins the cluster of {member}. Shall it?"
        ),
    )?;
    let request = RejoinRequest {
        members: vec![member],
        force: resort.force,
    };
    discoverd.rejoin(&request).await?;
    let after = settled(&discoverd, &before, |status| status.leader.is_some()).await?;
    resort.shown.say(&after, || {
        format!(
            "this host's discoverd has joined; {} leads",
            after.leader.as_deref().unwrap_or("nobody")
        )
    })
}

/// This host's discoverd, which may take its time.
fn patient(state: &Path) -> anyhow::Result<DiscoveryClient> {
    identities::discoverd_within(state, PATIENCE)
}

/// Waits until discoverd has started anew and is as it should be.
async fn settled(
    discoverd: &DiscoveryClient,
    before: &OwnStatus,
    well: impl Fn(&OwnStatus) -> bool,
) -> anyhow::Result<OwnStatus> {
    let deadline = Instant::now() + RESTART;
    loop {
        if let Ok(status) = discoverd.own_status().await {
            if status.id != before.id && well(&status) {
                return Ok(status);
            }
            if let Some(why) = status.refused_order
                && status.id == before.id
                && before.refused_order.as_ref() != Some(&why)
            {
                bail!("discoverd could not do it, and goes on as it was: {why}");
            }
        }
        if Instant::now() > deadline {
            bail!(
                "discoverd was told, but is not as it should be after {} s: see `flynn-host discoverd status`, and \
                 `flynn-host ps` and `flynn-host log` for its job",
                RESTART.as_secs()
            );
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

impl Resort {
    /// Asks, unless that was said beforehand.
    fn agreed(&self, objections: &[String], question: &str) -> anyhow::Result<()> {
        if !objections.is_empty() && !self.force {
            bail!(
                "{}. Nothing was changed; --force overrules that",
                objections.join("; ")
            );
        }
        if self.yes {
            return Ok(());
        }
        if !io::stdin().is_terminal() {
            bail!("nobody can be asked here, and nothing was changed: say --yes if that is what you want");
        }
        eprint!("{question} (yes/no): ");
        io::stderr().flush()?;
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer)?;
        if !["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()) {
            bail!("not confirmed; nothing was changed");
        }
        Ok(())
    }
}

fn recovery_told(plan: &RecoveryPlan) -> String {
    let mut lines = vec![
        format!(
            "This host's discoverd has all entries up to {}; it knows",
            plan.last_log
        ),
        format!("of those up to {} that a majority had them.", plan.committed),
        "Lost is what the others acknowledged and this one never got.".to_owned(),
        "Join tokens become void.".to_owned(),
    ];
    for other in &plan.others {
        let says = match other.last {
            Some((term, index)) => format!("answers, and has entries up to {index} (term {term})"),
            None => "does not answer".to_owned(),
        };
        let role = if other.peer.voter { "voter" } else { "learner" };
        lines.push(format!("  {} {} ({role}): {says}", other.host, other.peer.addr));
    }
    lines.extend(against(&plan.objections));
    lines.join("\n")
}

fn restore_told(plan: &RestorePlan) -> String {
    let mut lines = vec![format!(
        "The snapshot holds {} services as they were at index {}.",
        plan.services, plan.index
    )];
    for (what, names) in [
        ("Not in it, and lost", &plan.lost),
        ("Otherwise in it, and lost as they are now", &plan.changed),
    ] {
        if !names.is_empty() {
            let more = names.len().saturating_sub(TOLD);
            let told = names[..names.len() - more].join(", ");
            let more = if more > 0 {
                format!(" and {more} more")
            } else {
                String::new()
            };
            lines.push(format!("{what}: {told}{more}."));
        }
    }
    lines.push("Instances register again by themselves, or are gone. Join tokens become void.".to_owned());
    lines.extend(against(&plan.objections));
    lines.join("\n")
}

fn against(objections: &[String]) -> impl Iterator<Item = String> + '_ {
    objections
        .iter()
        .map(|objection| format!("Against it: {objection}."))
}

fn own(status: &OwnStatus) -> String {
    let mut table = table(&["WHAT", "IS"]);
    let nobody = || "nobody that is known".to_owned();
    for (what, is) in [
        ("id", status.id.to_string()),
        ("state", status.state.clone()),
        ("term", status.term.to_string()),
        ("leader", status.leader.clone().unwrap_or_else(nobody)),
        ("last entry", status.last_log.to_string()),
        ("committed", status.committed.to_string()),
        ("applied", status.applied.to_string()),
        ("snapshot", status.snapshot.to_string()),
        ("journal", format!("{} bytes", status.journal_bytes)),
        (
            "disk",
            if status.disk_full {
                "full: writes wait"
            } else {
                "has room"
            }
            .to_owned(),
        ),
    ] {
        table.add_row([what, &is]);
    }
    if let Some(why) = &status.refused_order {
        table.add_row(["refused", why]);
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use flynn_api::discovery::{OtherMember, Peer};

    use super::*;

    #[test]
    fn what_is_lost_is_told_before() {
        let plan = RecoveryPlan {
            id: 1,
            majority: false,
            last_log: 120,
            last_term: 4,
            committed: 118,
            others: vec![OtherMember {
                peer: Peer {
                    id: 2,
                    addr: "192.0.2.12:1111".into(),
                    voter: true,
                    leader: false,
                },
                host: "host2".into(),
                answers: false,
                last: None,
            }],
            objections: vec!["it is Sunday".into()],
        };
        let told = recovery_told(&plan);
        for part in [
            "up to 120",
            "up to 118",
            "host2 192.0.2.12:1111 (voter): does not answer",
            "Against it: it is Sunday.",
        ] {
            assert!(told.contains(part), "{told}");
        }
        let mut plan = RestorePlan {
            id: 1,
            index: 77,
            services: 3,
            lost: (0..12).map(|n| format!("s{n}")).collect(),
            changed: Vec::new(),
            objections: Vec::new(),
        };
        let told = restore_told(&plan);
        assert!(
            told.contains("index 77") && told.contains("s9 and 2 more.") && !told.contains("Otherwise"),
            "{told}"
        );
        plan.lost.truncate(1);
        assert!(restore_told(&plan).contains("lost: s0."));
    }

    #[test]
    fn what_speaks_against_it_is_overruled_by_force_alone() {
        let resort = |force| Resort {
            yes: true,
            force,
            shown: Shown::of("/nowhere"),
        };
        let against = ["others are there".to_owned()];
        let error = resort(false).agreed(&against, "?").unwrap_err().to_string();
        assert!(
            error.contains("others are there") && error.contains("--force"),
            "{error}"
        );
        resort(true).agreed(&against, "?").unwrap();
        resort(false).agreed(&[], "?").unwrap();
    }
}
