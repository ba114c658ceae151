//! The operator's commands that speak to discoverd: who its members are, who of them votes, and what it knows.

use std::path::{Path, PathBuf};
use std::time::Duration;

use flynn_api::ErrorCode;
use flynn_api::discovery::{Instance, MemberStatus, Voting};

use super::discoverd::{self, Discoverd};
use super::show::{table, within};
use crate::identities;

/// What can be asked of discoverd.
#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// List the members of the cluster's consensus: role, index, lag, zone
    List(Shown),
    /// List the instances of a service
    Discover {
        /// The service's name
        service: String,
        /// How it is shown
        #[command(flatten)]
        shown: Shown,
    },
    /// Have a member vote rather than others
    Promote(Choice),
    /// Have a member not vote
    Demote(Choice),
    /// Look after this host's discoverd
    #[command(subcommand)]
    Discoverd(Discoverd),
}

/// How an answer is shown, and by which host's identity it is asked for.
#[derive(clap::Args, Debug)]
pub struct Shown {
    /// As JSON
    #[arg(long)]
    json: bool,
    /// The state directory
    #[arg(long, default_value = "/var/lib/flynn")]
    state: PathBuf,
}

/// Who is to vote.
#[derive(clap::Args, Debug)]
pub struct Choice {
    /// The member's host, its address (192.0.2.11:1111) or its number, as `flynn-host list` shows them
    member: String,
    /// Leave it to the cluster again
    #[arg(long)]
    undo: bool,
    /// The state directory
    #[arg(long, default_value = "/var/lib/flynn")]
    state: PathBuf,
}

/// Does it.
///
/// # Errors
/// This host is in no cluster, discoverd cannot be reached, or refuses.
pub async fn run(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::List(shown) => {
            let members = identities::discoverd(&shown.state)?.members().await?;
            shown.say(&members, || list(&members))
        }
        Command::Discover { service, shown } => {
            let discoverd = identities::discoverd(&shown.state)?;
            let instances = discoverd.instances(service).await?;
            let leader = match discoverd.leader(service).await {
                Ok(leader) => Some(leader.id),
                Err(error) if error.code == ErrorCode::NotFound => None,
                Err(error) => return Err(error.into()),
            };
            if instances.is_empty() && !shown.json {
                eprintln!("{service} has no instances");
            }
            shown.say(&instances, || discovered(&instances, leader.as_deref()))
        }
        Command::Promote(choice) => choose(choice, Voting::Promoted).await,
        Command::Demote(choice) => choose(choice, Voting::Demoted).await,
        Command::Discoverd(command) => discoverd::run(command).await,
    }
}

async fn choose(choice: &Choice, wanted: Voting) -> anyhow::Result<()> {
    let vote = if choice.undo { Voting::Auto } else { wanted };
    identities::discoverd(&choice.state)?
        .set_vote(&choice.member, vote)
        .await?;
    let member = &choice.member;
    match vote {
        Voting::Auto => println!("the cluster decides again whether {member} votes"),
        Voting::Promoted => {
            println!("{member} votes; `flynn-host promote --undo {member}` leaves it to the cluster");
        }
        Voting::Demoted => {
            println!("{member} does not vote; `flynn-host demote --undo {member}` leaves it to the cluster");
        }
    }
    Ok(())
}

impl Shown {
    /// The state directory.
    pub(super) fn state(&self) -> &Path {
        &self.state
    }

    /// Of a host with this state directory, as text.
    #[cfg(test)]
    pub(super) fn of(state: &str) -> Self {
        Self {
            json: false,
            state: state.into(),
        }
    }

    pub(super) fn say(
        &self,
        answer: &impl serde::Serialize,
        text: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        if self.json {
            println!("{}", serde_json::to_string_pretty(answer)?);
        } else {
            println!("{}", text());
        }
        Ok(())
    }
}

fn list(members: &[MemberStatus]) -> String {
    let mut table = table(&[
        "HOST", "ADDRESS", "ROLE", "CHOSEN", "INDEX", "LAG", "HEARD", "ZONE",
    ]);
    for member in members {
        let role = match (member.peer.leader, member.peer.voter) {
            (true, _) => "leader",
            (false, true) => "voter",
            (false, false) => "learner",
        };
        let chosen = match member.vote {
            Voting::Auto => "-",
            Voting::Promoted => "promoted",
            Voting::Demoted => "demoted",
        };
        let number = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
        let heard = member.silent_ms.map_or_else(
            || "-".to_owned(),
            |silent| format!("{} ago", within(Duration::from_millis(silent))),
        );
        table.add_row([
            member.host.as_str(),
            &member.peer.addr,
            role,
            chosen,
            &number(member.index),
            &number(member.lag),
            &heard,
            if member.zone.is_empty() { "-" } else { &member.zone },
        ]);
    }
    table.trim_fmt()
}

fn discovered(instances: &[Instance], leader: Option<&str>) -> String {
    let mut table = table(&["ADDRESS", "PROTOCOL", "LEADER", "ID"]);
    for instance in instances {
        let leads = if leader == Some(&instance.id) { "yes" } else { "" };
        table.add_row([instance.addr.as_str(), &instance.proto, leads, &instance.id]);
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use flynn_api::discovery::Peer;

    #[test]
    fn members_are_listed_with_what_is_known_of_them() {
        let member = |leader, voter, silent_ms: Option<u64>| MemberStatus {
            peer: Peer {
                id: 7,
                addr: "192.0.2.11:1111".into(),
                voter,
                leader,
            },
            host: "host1".into(),
            zone: String::new(),
            vote: Voting::Auto,
            index: silent_ms.map(|_| 12),
            lag: silent_ms.map(|_| 0),
            silent_ms,
        };
        let text = list(&[member(true, true, Some(300)), member(false, false, None)]);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(
            lines[1],
            [
                "host1",
                "192.0.2.11:1111",
                "leader",
                "-",
                "12",
                "0",
                "0s",
                "ago",
                "-"
            ]
        );
        assert_eq!(
            lines[2],
            ["host1", "192.0.2.11:1111", "learner", "-", "-", "-", "-", "-"]
        );
    }

    #[test]
    fn the_leading_instance_is_marked() {
        let instances =
            ["10.0.0.1:80", "10.0.0.2:80"].map(|addr| Instance::new("http", addr, flynn_api::Meta::new()));
        let text = discovered(&instances, Some(&instances[1].id));
        let marked: Vec<&str> = text.lines().filter(|line| line.contains("yes")).collect();
        assert!(
            matches!(marked[..], [line] if line.contains("10.0.0.2:80")),
            "{text}"
        );
    }
}
