//! `flynn scale`.

use clap::Args;
use flynn_api::controller::{Formation, Processes, ScaleRequest, Tags};
use flynn_api::{ErrorCode, Meta};

use super::pair;
use crate::context::{Context, Target};
use crate::failure::{Result, usage};
use crate::output::{self, note};
use crate::wait;

#[derive(Args)]
pub(super) struct Scale {
    /// Return at once
    #[arg(short, long)]
    no_wait: bool,
    /// Of this release, instead of the current one
    #[arg(short, long)]
    release: Option<String>,
    /// Process types with counts, and tags that hosts must have: web=3 worker=2,ssd=true
    #[arg(value_name = "TYPE=COUNT[,TAG=VALUE]")]
    types: Vec<String>,
}

impl Scale {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let target = context.target().await?;
        let release = target.release_or_current(self.release.as_deref()).await?;
        if self.types.is_empty() {
            let formation = formation(&target, &release.id).await?;
            if context.globals.json {
                return output::json(&formation);
            }
            let types = release.processes.keys().map(|kind| {
                let count = formation.processes.get(kind).copied().unwrap_or(0);
                let tags = formation.tags.get(kind).into_iter().flatten();
                tags.fold(format!("{kind}={count}"), |text, (tag, value)| {
                    text + "," + tag + "=" + value
                })
            });
            return output::line(types.collect::<Vec<_>>().join(" "));
        }
        let (processes, tags) = parse(&self.types)?;
        if let Some(unknown) = processes
            .keys()
            .find(|kind| !release.processes.contains_key(*kind))
        {
            let known: Vec<_> = release.processes.keys().map(String::as_str).collect();
            return Err(usage(format!(
                "the release has no process type {unknown}; it has: {}",
                known.join(", ")
            )));
        }
        let request = ScaleRequest {
            new_processes: Some(processes.clone()),
            new_tags: (!tags.is_empty()).then_some(tags),
            ..ScaleRequest::default()
        };
        let request = target
            .controller
            .scale(&target.app.id, &release.id, &request)
            .await?;
        for (kind, count) in &processes {
            note(format!(
                "scaling {kind}: {} => {count}",
                request.old_processes.get(kind).copied().unwrap_or(0)
            ));
        }
        if !self.no_wait {
            wait::jobs(&target.controller, &target.app, &release, &processes).await?;
            note("scaled");
        }
        if context.globals.json {
            return output::json(&request);
        }
        Ok(())
    }
}

/// A release's formation; none of anything when there is none.
async fn formation(target: &Target, release: &str) -> Result<Formation> {
    match target.controller.formation(&target.app.id, release).await {
        Ok(formation) => Ok(formation),
        Err(error) if error.code == ErrorCode::NotFound => Ok(Formation::default()),
        Err(error) => Err(error.into()),
    }
}

fn parse(types: &[String]) -> Result<(Processes, Tags)> {
    let (mut processes, mut tags) = (Processes::new(), Tags::new());
    for text in types {
        let mut parts = text.split(',');
        let (kind, count) = pair(parts.next().unwrap_or_default())?;
        let count = count
            .parse()
            .map_err(|_| usage(format!("{count:?} is not a count, in {text:?}")))?;
        let of_kind = parts
            .map(|tag| pair(tag).map(|(name, value)| (name.to_owned(), value.to_owned())))
            .collect::<Result<Meta>>()?;
        if processes.insert(kind.to_owned(), count).is_some() {
            return Err(usage(format!("{kind} is given twice")));
        }
        if !of_kind.is_empty() {
            tags.insert(kind.to_owned(), of_kind);
        }
    }
    Ok((processes, tags))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_tags_are_read() {
        let given = |texts: &[&str]| parse(&texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>());
        let (processes, tags) = given(&["web=3,ssd=true,zone=a", "worker=0"]).unwrap();
        assert_eq!(
            processes,
            Processes::from([("web".into(), 3), ("worker".into(), 0)])
        );
        assert_eq!(tags["web"]["zone"], "a");
        for bad in [
            &["web"][..],
            &["web=x"],
            &["web=-1"],
            &["=1"],
            &["web=1", "web=2"],
            &["web=1,ssd"],
        ] {
            assert!(given(bad).is_err(), "{bad:?}");
        }
    }
}
