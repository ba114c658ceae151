//! What the host's own packet filter does for containers: packets that leave the cluster get the host's address, and
//! nobody outside starts a conversation with a container.
//!
//! One table of our own, replaced whole and in one step. Connections that are translated already go on through it: the
//! kernel remembers them apart from the rules.

use std::path::PathBuf;
use std::process::Stdio;

use ipnet::IpNet;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, process::Command};

use crate::{
    address,
    config::NetworkConfig,
    error::{Error, Result},
    network::DEVICE,
};

const FAMILY: &str = "inet";
const TABLE: &str = "flynn";

/// Puts the rules in place.
pub(crate) async fn install(config: &NetworkConfig) -> Result<()> {
    nft(&rules(config)).await
}

/// Removes them.
pub(crate) async fn remove() -> Result<()> {
    nft(&[
        add_table(),
        json!({"delete": {"table": {"family": FAMILY, "name": TABLE}}}),
    ])
    .await
}

fn rules(config: &NetworkConfig) -> Vec<Value> {
    let mut commands = vec![
        // Deleting needs a table to be there.
        add_table(),
        json!({"delete": {"table": {"family": FAMILY, "name": TABLE}}}),
        add_table(),
        chain("postrouting", "nat", 100),
        chain("forward", "filter", 0),
    ];
    let networks = [Some(IpNet::V4(config.cluster)), config.cluster6.map(IpNet::V6)];
    for network in networks.into_iter().flatten() {
        commands.push(rule(
            "postrouting",
            &json!([
                matching("==", &field(network, "saddr"), &prefix(network)),
                matching("!=", &field(network, "daddr"), &prefix(network)),
                {"masquerade": null},
            ]),
        ));
    }
    let to_containers = matching("==", &json!({"meta": {"key": "oifname"}}), &json!(DEVICE));
    let answer = matching(
        "in",
        &json!({"ct": {"key": "state"}}),
        &json!(["established", "related"]),
    );
    commands.push(rule("forward", &json!([to_containers, answer, {"accept": null}])));
    // What was too big for the tunnel, and that the programs have let pass.
    let from_containers = matching(
        "==",
        &json!({"meta": {"key": "iifname"}}),
        &json!(format!("{}*", address::PREFIX)),
    );
    commands.push(rule(
        "forward",
        &json!([to_containers, from_containers, {"accept": null}]),
    ));
    commands.push(rule(
        "forward",
        &json!([to_containers, {"counter": null}, {"drop": null}]),
    ));
    commands
}

fn add_table() -> Value {
    json!({"add": {"table": {"family": FAMILY, "name": TABLE}}})
}

fn chain(hook: &str, kind: &str, priority: i32) -> Value {
    json!({"add": {"chain": {
        "family": FAMILY, "table": TABLE, "name": hook, "type": kind, "hook": hook, "prio": priority, "policy": "accept",
    }}})
}

fn rule(chain: &str, expression: &Value) -> Value {
    json!({"add": {"rule": {"family": FAMILY, "table": TABLE, "chain": chain, "expr": expression}}})
}

fn matching(operator: &str, left: &Value, right: &Value) -> Value {
    json!({"match": {"op": operator, "left": left, "right": right}})
}

fn field(network: IpNet, name: &str) -> Value {
    let protocol = if network.addr().is_ipv4() { "ip" } else { "ip6" };
    json!({"payload": {"protocol": protocol, "field": name}})
}

fn prefix(network: IpNet) -> Value {
    json!({"prefix": {"addr": network.network(), "len": network.prefix_len()}})
}

/// Where nft is: on `PATH`, or where Debian has it, which is not on every `PATH`.
fn program() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join("nft"))
        .find(|program| program.is_file())
        .ok_or_else(|| Error::Tool {
            what: "address translation needs nft".into(),
            why: "it is not installed. Install it: apt-get install nftables".into(),
        })
}

/// Sees that the tool is there, before anything is begun that would need it.
pub fn check_tool() -> Result<()> {
    program().map(drop)
}

/// Has nft do the commands, all or none.
async fn nft(commands: &[Value]) -> Result<()> {
    let what = || "setting up address translation with nft".to_owned();
    let failed = |error: std::io::Error| Error::Tool {
        what: what(),
        why: error.to_string(),
    };
    let mut child = Command::new(program()?)
        // By this name, and not as "-", it needs no /dev.
        .args(["--json", "--file", "/proc/self/fd/0"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A child that died before it read all says why on its way out.
        let _ = stdin
            .write_all(json!({"nftables": commands}).to_string().as_bytes())
            .await;
    }
    let output = child.wait_with_output().await.map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::Tool {
        what: what(),
        why: format!("{}: {}", output.status, said.trim()),
    })
}
