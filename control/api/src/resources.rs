//! What jobs ask for and may have at most.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Limits by name: `memory` (bytes), `swap` (bytes beside it), `cpu` (thousandths of a core), `cpu_weight` (1 to 10,000; 100 is
/// usual), `max_pids`, `max_fd`, `temp_disk` (bytes that the container may write beside its volumes;
/// 0 for no limit), `network_out` and `network_in` (bytes a second that the container may
/// send and receive; 0 for no limit), `io_weight` (1 to 1,000; 100 is usual), `io_read` and `io_write` (bytes a second
/// from and to the host's disk; 0 for no limit).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(transparent)]
pub struct Resources(pub BTreeMap<String, Resource>);

/// What a job asks for and may at most have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Resource {
    /// Reserved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<u64>,
    /// At most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
}

impl Resources {
    /// Names that mean something.
    pub const NAMES: [&'static str; 12] = [
        "memory",
        "cpu",
        "max_pids",
        "max_fd",
        "temp_disk",
        "network_out",
        "network_in",
        "swap",
        "cpu_weight",
        "io_weight",
        "io_read",
        "io_write",
    ];

    /// Names of which 0 is a limit, or means that there is none.
    pub const OR_ZERO: [&'static str; 6] = [
        "swap",
        "temp_disk",
        "network_out",
        "network_in",
        "io_read",
        "io_write",
    ];

    /// The smallest `temp_disk`, in bytes: below that a filesystem's own tables take most of it.
    pub const MIN_TEMP_DISK: u64 = 16 << 20;

    /// Names of what can be changed while a job runs.
    pub const LIVE: [&'static str; 8] = [
        "memory",
        "swap",
        "cpu",
        "cpu_weight",
        "max_pids",
        "io_weight",
        "io_read",
        "io_write",
    ];

    /// Whether nothing is set.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The limit of this name, or Flynn's default for it.
    pub fn limit(&self, name: &str) -> u64 {
        self.0
            .get(name)
            .and_then(|resource| resource.limit)
            .unwrap_or(match name {
                "memory" => 1 << 30,
                "cpu" => 1000,
                "max_pids" => 4096,
                "max_fd" => 10_000,
                "cpu_weight" | "io_weight" => 100,
                _ => 0,
            })
    }

    /// Reads limits as people write them: `memory=512MB`, `cpu=500`. What is wrong is said in words.
    pub fn parse<'a>(limits: impl IntoIterator<Item = &'a str>) -> Result<Self, String> {
        let limit = |text: &'a str| {
            let (name, value) = text
                .split_once('=')
                .ok_or_else(|| format!("{text:?}: NAME=VALUE is wanted, like memory=512MB"))?;
            if !Self::NAMES.contains(&name) {
                let known = Self::NAMES.join(", ");
                return Err(format!("there is no limit {name}; there are: {known}"));
            }
            let limit = match value {
                "unlimited" if name != "swap" && Self::OR_ZERO.contains(&name) => Some(0),
                value => amount(value),
            };
            let limit = limit
                .ok_or_else(|| format!("{value:?} is not an amount, like 512MB or 1000, in {text:?}"))?;
            let resource = Resource {
                request: None,
                limit: Some(limit),
            };
            Ok((name.to_owned(), resource))
        };
        limits.into_iter().map(limit).collect::<Result<_, _>>().map(Self)
    }

    /// The limit of this name, or its default, as people read it.
    pub fn show(&self, name: &str) -> String {
        let bytes = !["cpu", "cpu_weight", "io_weight", "max_pids", "max_fd"].contains(&name);
        match self.limit(name) {
            0 if name != "swap" && Self::OR_ZERO.contains(&name) => "unlimited".into(),
            value if bytes && value > 0 && value % (1 << 30) == 0 => format!("{}GB", value >> 30),
            value if bytes && value > 0 && value % (1 << 20) == 0 => format!("{}MB", value >> 20),
            value => value.to_string(),
        }
    }
}

/// A number with an optional unit: `500MB`, `2GiB`, `1073741824`. Units are binary with or without the `i`, as Flynn has
/// them.
pub fn amount(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" | "B" => 0,
        "K" | "KB" | "KIB" => 10,
        "M" | "MB" | "MIB" => 20,
        "G" | "GB" | "GIB" => 30,
        "T" | "TB" | "TIB" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_units() {
        for (text, bytes) in [
            ("512MB", 512 << 20),
            ("2GiB", 2 << 30),
            ("1g", 1 << 30),
            ("1000", 1000),
            ("3KiB", 3072),
            ("3t", 3 << 40),
            ("0", 0),
        ] {
            assert_eq!(amount(text), Some(bytes), "{text}");
        }
        for text in [
            "",
            "MB",
            "1X",
            "1XB",
            "-1",
            "+1",
            "1.5GB",
            "1I",
            "5 MB",
            "99999999999T",
        ] {
            assert_eq!(amount(text), None, "{text}");
        }
    }

    #[test]
    fn limits_are_read_and_shown() {
        let limits =
            Resources::parse(["memory=1GB", "cpu=1048576", "io_read=unlimited", "swap=64MB"]).unwrap();
        let shown =
            ["memory", "cpu", "io_read", "swap", "network_in", "max_pids"].map(|name| limits.show(name));
        assert_eq!(
            shown,
            ["1GB", "1048576", "unlimited", "64MB", "unlimited", "4096"]
        );
        assert_eq!(Resources::default().show("swap"), "0");
        for wrong in [
            "memory",
            "disk=1",
            "memory=lots",
            "swap=unlimited",
            "memory=unlimited",
        ] {
            assert!(Resources::parse([wrong]).is_err(), "{wrong}");
        }
    }
}
