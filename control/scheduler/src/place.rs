//! Which host a job goes to.

use std::collections::BTreeMap;

use flynn_api::Meta;
use flynn_api::resources::Resources;

use crate::view::{Facts, Host, Key};

/// How good a host is for a job; the least is the best, the order of the fields is their priority.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Score {
    /// Jobs of the same app, release and type.
    alike: u32,
    /// How full memory and cores would be, in thousandths, by what jobs ask for; the fuller of both.
    load: u64,
    /// Jobs altogether.
    jobs: u32,
}

/// What a host has to do, with what has just been planned for it.
#[derive(Debug, Default)]
pub struct Load {
    facts: Facts,
    alike: BTreeMap<Key, u32>,
    memory: u64,
    cpu: u64,
    jobs: u32,
}

fn wanted(resources: &Resources, name: &str) -> u64 {
    let request = resources.0.get(name).and_then(|resource| resource.request);
    request.unwrap_or_else(|| resources.limit(name))
}

impl Load {
    /// What a host has to do now.
    pub fn of(host: &Host) -> Self {
        let mut load = Self {
            facts: host.facts.clone(),
            ..Self::default()
        };
        for (_, job) in host.live_jobs() {
            load.add(&job.key, &job.resources);
        }
        load
    }

    /// One job more.
    pub fn add(&mut self, key: &Key, resources: &Resources) {
        *self.alike.entry(key.clone()).or_default() += 1;
        self.memory = self.memory.saturating_add(wanted(resources, "memory"));
        self.cpu = self.cpu.saturating_add(wanted(resources, "cpu"));
        self.jobs += 1;
    }

    fn score(&self, key: &Key, resources: &Resources) -> Score {
        let full = |used: u64, wanted: u64, whole: u64| {
            let thousandths = u128::from(used.saturating_add(wanted)) * 1000 / u128::from(whole.max(1));
            u64::try_from(thousandths).unwrap_or(u64::MAX)
        };
        let memory = full(self.memory, wanted(resources, "memory"), self.facts.memory);
        let cpu = full(self.cpu, wanted(resources, "cpu"), self.facts.cpu);
        Score {
            alike: self.alike.get(key).copied().unwrap_or(0),
            load: memory.max(cpu),
            jobs: self.jobs,
        }
    }
}

/// Whether a host with these tags may take a job that wants those.
pub fn tags_match(has: &Meta, wants: Option<&Meta>) -> bool {
    wants.is_none_or(|wants| wants.iter().all(|(name, value)| has.get(name) == Some(value)))
}

/// The best of the hosts for a job; the first by id among equals.
pub fn best<'a>(
    loads: impl Iterator<Item = (&'a String, &'a Load)>,
    key: &Key,
    resources: &Resources,
) -> Option<&'a String> {
    loads
        .min_by_key(|(id, load)| (load.score(key, resources), *id))
        .map(|(id, _)| id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flynn_api::resources::Resource;

    fn key(release: &str) -> Key {
        Key {
            app: "a".into(),
            release: release.into(),
            process_type: "web".into(),
        }
    }

    fn memory(bytes: u64) -> Resources {
        Resources(
            [(
                "memory".to_owned(),
                Resource {
                    request: Some(bytes),
                    limit: None,
                },
            )]
            .into(),
        )
    }

    #[test]
    fn spread_comes_before_load_and_load_before_names() {
        let facts = Facts {
            tags: Meta::new(),
            draining: false,
            cpu: 100_000,
            memory: 1 << 40,
        };
        let mut loads: BTreeMap<String, Load> = ["h1", "h2", "h3"]
            .map(|id| {
                (
                    id.to_owned(),
                    Load {
                        facts: facts.clone(),
                        ..Load::default()
                    },
                )
            })
            .into();
        let pick =
            |loads: &BTreeMap<String, Load>| best(loads.iter(), &key("r"), &memory(1)).unwrap().clone();
        assert_eq!(pick(&loads), "h1");
        loads.get_mut("h1").unwrap().add(&key("other"), &memory(1 << 39));
        assert_eq!(pick(&loads), "h2", "h1 is half full");
        for id in ["h2", "h3"] {
            loads.get_mut(id).unwrap().add(&key("r"), &memory(1));
        }
        assert_eq!(pick(&loads), "h1", "the only one without its like");
        assert!(best(std::iter::empty(), &key("r"), &memory(1)).is_none());
    }

    #[test]
    fn tags_must_all_be_there() {
        let has = Meta::from([("disk".into(), "ssd".into()), ("zone".into(), "a".into())]);
        let wants = |value: &str| Meta::from([("disk".into(), value.into())]);
        assert!(tags_match(&has, None) && tags_match(&has, Some(&wants("ssd"))));
        assert!(!tags_match(&has, Some(&wants("hdd"))));
    }
}
