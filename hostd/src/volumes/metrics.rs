//! What monitoring sees of volumes: how full each is, and the disks that they are on.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use flynn_api::host::label;
use flynn_api::volume::{Provider, ProviderKind, Volume};

use super::found::all;
use super::record::Form;
use super::{DATA, Volumes, btrfs};

/// One of a volume's figures.
type Value = fn(&Volume) -> Option<u64>;

/// One of a provider's.
type Figure = fn(&Provider) -> Option<u64>;

impl Volumes {
    /// The volumes' part of `GET /metrics`, in Prometheus' text format.
    pub fn metrics(&self) -> String {
        let pools = self.pools();
        // Of a btrfs all is asked for at once.
        let btrfs: BTreeMap<PathBuf, BTreeMap<u64, u64>> = pools
            .iter()
            .filter(|pool| pool.kind == ProviderKind::Btrfs && pool.check().is_ok())
            .map(|pool| (pool.path.clone(), btrfs::all_used(&pool.path)))
            .collect();
        let volumes = all(&pools).flatten().map(|found| {
            let used = match found.record.form {
                Form::Subvolume => {
                    let id = btrfs::id(&found.dir.join(DATA)).ok();
                    let all = btrfs.get(&found.pool.path);
                    id.and_then(|id| all?.get(&id).copied())
                }
                _ => found.used(),
            };
            Volume {
                used,
                ..found.show(&|_| Vec::new())
            }
        });
        text(&volumes.collect::<Vec<_>>(), &pools.show())
    }
}

fn text(volumes: &[Volume], providers: &[Provider]) -> String {
    let mut text = String::new();
    let families: [(&str, &str, Value); 2] = [
        (
            "used_bytes",
            "What a volume holds, where that is known",
            |volume| volume.used,
        ),
        ("limit_bytes", "What a volume may hold", |volume| volume.limit),
    ];
    for (name, help, value) in families {
        header(&mut text, &format!("volume_{name}"), help);
        for volume in volumes {
            let Some(value) = value(volume) else { continue };
            let meta = |name: &str| escaped(volume.meta.get(name).map_or("", String::as_str));
            let _ = writeln!(
                text,
                "flynn_host_volume_{name}{{volume=\"{}\",provider=\"{}\",type=\"{}\",app=\"{}\",process_type=\"{}\"}} {value}",
                volume.id,
                volume.provider,
                volume.kind.name(),
                meta(label::APP_NAME),
                meta(label::PROCESS_TYPE),
            );
        }
    }
    let families: [(&str, &str, Figure); 2] = [
        ("free_bytes", "What a provider's disk has left", |provider| {
            provider.free
        }),
        ("up", "Whether a provider's volumes can be had", |provider| {
            Some(u64::from(provider.error.is_none()))
        }),
    ];
    for (name, help, value) in families {
        header(&mut text, &format!("volume_provider_{name}"), help);
        for provider in providers {
            let Some(value) = value(provider) else { continue };
            let (id, kind) = (&provider.id, provider.kind.name());
            let _ = writeln!(
                text,
                "flynn_host_volume_provider_{name}{{provider=\"{id}\",kind=\"{kind}\"}} {value}"
            );
        }
    }
    text
}

fn header(text: &mut String, name: &str, help: &str) {
    let _ = writeln!(
        text,
        "# HELP flynn_host_{name} {help}.\n# TYPE flynn_host_{name} gauge"
    );
}

fn escaped(value: &str) -> String {
    let value = value.replace('\\', "\\\\").replace('"', "\\\"");
    value.replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use flynn_api::volume::VolumeType;
    use jiff::Timestamp;

    use super::*;

    #[test]
    fn what_is_known_is_said() {
        let volume = |id: &str, used, limit| Volume {
            id: id.into(),
            kind: VolumeType::Data,
            meta: [(label::APP_NAME.to_owned(), "a\"b".to_owned())].into(),
            provider: "fast".into(),
            limit,
            used,
            source: None,
            created_at: Timestamp::UNIX_EPOCH,
            decommissioned_at: None,
            jobs: Vec::new(),
        };
        let provider = Provider {
            id: "fast".into(),
            kind: ProviderKind::Btrfs,
            path: "/pool".into(),
            dataset: None,
            default: false,
            free: None,
            error: Some("gone".into()),
        };
        let text = text(
            &[volume("one", Some(3), Some(7)), volume("two", None, None)],
            &[provider],
        );
        let labels = r#"{volume="one",provider="fast",type="data",app="a\"b",process_type=""}"#;
        assert!(
            text.contains(&format!("flynn_host_volume_used_bytes{labels} 3\n")),
            "{text}"
        );
        assert!(
            text.contains(&format!("flynn_host_volume_limit_bytes{labels} 7\n")),
            "{text}"
        );
        assert!(!text.contains("two"), "{text}");
        let labels = r#"{provider="fast",kind="btrfs"}"#;
        assert!(
            text.contains(&format!("flynn_host_volume_provider_up{labels} 0\n")),
            "{text}"
        );
        assert!(!text.contains(&format!("free_bytes{labels}")), "{text}");
    }
}
