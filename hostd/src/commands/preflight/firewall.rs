//! Whether a packet filter of the machine's own keeps out what has to come in.

use std::process::Command;

use serde_json::Value;

use super::Check;
use super::ports::{From, PORTS};

pub(super) fn check() -> Check {
    const NAME: &str = "firewall";
    let listed = Command::new("nft").args(["--json", "list", "ruleset"]).output();
    let listed = match listed {
        Ok(listed) if listed.status.success() => listed.stdout,
        Ok(listed) => {
            let why = String::from_utf8_lossy(&listed.stderr).trim().to_owned();
            return Check::fail(NAME, format!("nft does not work here: {why}"), INSTALL);
        }
        Err(error) => return Check::fail(NAME, format!("nft cannot be started: {error}"), INSTALL),
    };
    let rules: Value = serde_json::from_slice(&listed).unwrap_or_default();
    let closed = closed(&rules);
    if closed.is_empty() {
        return Check::ok(NAME, "no chain drops by itself what comes in");
    }
    let of = |who: From| {
        let ports = PORTS.iter().filter(|port| port.from == who);
        let ports: Vec<String> = ports
            .map(|port| format!("{}/{}", port.number, port.protocol))
            .collect();
        ports.join(", ")
    };
    Check::warn(
        NAME,
        format!("what no rule accepts is dropped by {}", closed.join(" and by ")),
        format!(
            "see that its rules accept {} from the cluster's hosts, {} from clients, and what is forwarded from and to \
             flynn0",
            of(From::Hosts),
            of(From::Clients)
        ),
    )
}

const INSTALL: &str =
    "install nftables (apt-get install nftables), which hides containers behind the host's address";

/// Chains other than ours that drop what no rule of theirs accepts, of what comes in or is passed on.
fn closed(rules: &Value) -> Vec<String> {
    let all = rules["nftables"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let chains = all.iter().filter_map(|entry| entry.get("chain"));
    let is_closed = |chain: &&Value| {
        let is = |field: &str, wanted: &str| chain[field] == wanted;
        (is("hook", "input") || is("hook", "forward")) && is("policy", "drop") && !is("table", "flynn")
    };
    let name = |chain: &Value| {
        let text = |field: &str| chain[field].as_str().unwrap_or("?").to_owned();
        format!("{} {} {}", text("family"), text("table"), text("name"))
    };
    chains.filter(is_closed).map(name).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn chains_that_drop_are_named() {
        let chain = |table: &str, hook: &str, policy: &str| json!({"chain": {"family": "inet", "table": table, "name": hook, "hook": hook, "policy": policy}});
        let rules = json!({"nftables": [
            {"metainfo": {}},
            chain("filter", "input", "drop"),
            chain("filter", "output", "drop"),
            chain("filter", "forward", "accept"),
            chain("flynn", "forward", "drop"),
        ]});
        assert_eq!(closed(&rules), ["inet filter input"]);
        assert!(closed(&Value::Null).is_empty());
    }
}
