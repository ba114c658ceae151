//! Answers as people read them.

use std::time::Duration;

use comfy_table::{Table, presets};
use flynn_api::host::{ActiveJob, HostStatus, label};
use jiff::Timestamp;

pub(super) fn table(head: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(head);
    // The first column begins where the line does.
    if let Some(first) = table.column_mut(0) {
        first.set_padding((0, 1));
    }
    table
}

/// `ps`.
pub(super) fn jobs<'a>(jobs: impl Iterator<Item = &'a ActiveJob>, now: Timestamp) -> String {
    let mut table = table(&["ID", "STATE", "SINCE", "APP", "TYPE", "ADDRESS", "RESTARTS"]);
    for job in jobs {
        let name = |name| job.job.metadata.get(name).map_or("", String::as_str);
        let since = job.ended_at.or(job.started_at).unwrap_or(job.created_at);
        let mut state = format!("{:?}", job.status).to_lowercase();
        if job.paused {
            state = "paused".into();
        }
        if let Some(status) = job.exit_status.filter(|status| *status != 0) {
            state.push_str(&format!(" ({status})"));
        }
        table.add_row([
            job.job.id.as_str(),
            &state,
            &age(since, now),
            name(label::APP_NAME),
            name(label::PROCESS_TYPE),
            &address(job),
            &job.restarts.to_string(),
        ]);
    }
    table.trim_fmt()
}

/// A job's own address, or in whose network it is.
fn address(job: &ActiveJob) -> String {
    match job.internal_ip {
        Some(address) => address.to_string(),
        None if job.job.config.host_network => "host".into(),
        None => "-".into(),
    }
}

/// How long ago, in the largest unit that fits.
pub(super) fn age(then: Timestamp, now: Timestamp) -> String {
    within(now.duration_since(then).try_into().unwrap_or_default())
}

/// How long, in the largest unit that fits.
pub(super) fn within(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// `inspect`: each value on a line of its own, by its path.
pub(super) fn everything(value: &impl serde::Serialize) -> serde_json::Result<String> {
    let mut lines = Vec::new();
    flatten("", &serde_json::to_value(value)?, &mut lines);
    let width = lines.iter().map(|(path, _)| path.len()).max().unwrap_or(0);
    let lines: Vec<String> = lines
        .into_iter()
        .map(|(path, value)| format!("{path:width$}  {value}"))
        .collect();
    Ok(lines.join("\n"))
}

fn flatten(path: &str, value: &serde_json::Value, lines: &mut Vec<(String, String)>) {
    use serde_json::Value;
    let below = |name: &str| {
        if path.is_empty() {
            name.to_owned()
        } else {
            format!("{path}.{name}")
        }
    };
    match value {
        Value::Object(fields) => fields
            .iter()
            .for_each(|(name, value)| flatten(&below(name), value, lines)),
        Value::Array(items) if items.iter().any(Value::is_object) => {
            items
                .iter()
                .enumerate()
                .for_each(|(index, item)| flatten(&below(&index.to_string()), item, lines));
        }
        Value::String(text) => lines.push((path.to_owned(), text.clone())),
        other => lines.push((path.to_owned(), other.to_string())),
    }
}

/// `status`.
pub(super) fn status(status: &HostStatus) -> String {
    let gib = |bytes: u64| format!("{}.{} GiB", bytes >> 30, (bytes >> 20) % 1024 * 10 / 1024);
    let mut lines = vec![
        format!("id        {}", status.id),
        format!("url       {}", status.url),
        format!("version   {}", status.version),
        format!("daemon    pid {}", status.pid),
        format!(
            "subnet    {}",
            status
                .subnet
                .as_deref()
                .unwrap_or("none yet: run flynn-host bootstrap or join")
        ),
    ];
    lines.extend(status.gateway.map(|gateway| format!("gateway   {gateway}")));
    lines.push(format!(
        "machine   {} cores, {} of memory, {} free on the state's disk",
        status.cpu / 1000,
        gib(status.memory),
        gib(status.disk_free)
    ));
    lines.extend(
        status
            .tags
            .iter()
            .map(|(name, value)| format!("tag       {name}={value}")),
    );
    lines.extend(status.features.iter().map(|feature| {
        let has = if feature.present { "has" } else { "has no" };
        format!("kernel    {has} {}: {}", feature.name, feature.detail)
    }));
    lines.extend(status.notices.iter().map(|notice| format!("notice    {notice}")));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_short() {
        let at = |seconds| Timestamp::from_second(seconds).unwrap();
        let ages: Vec<_> = [5, 130, 7300, 200_000]
            .map(|seconds| age(at(0), at(seconds)))
            .into();
        assert_eq!(ages, ["5s", "2m", "2h", "2d"]);
    }

    #[test]
    fn everything_inspected_has_a_path() {
        let mut lines = Vec::new();
        flatten(
            "",
            &serde_json::json!({"a": {"b": [{"c": 1}], "d": ["x", "y"]}, "e": "f"}),
            &mut lines,
        );
        let lines: Vec<_> = lines
            .iter()
            .map(|(path, value)| format!("{path}={value}"))
            .collect();
        assert_eq!(lines, ["a.b.0.c=1", "a.d=[\"x\",\"y\"]", "e=f"]);
    }
}
