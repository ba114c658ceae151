//! Records as a sink wants them: with names in place of ids, a prefix, another framing.

use flynn_api::host::{Job, label};
use flynn_api::sink::{SyslogConfig, SyslogFormat};
use flynn_api::{Error, Result};

use crate::logs::record::{Record, name};

/// How a sink wants records.
#[derive(Clone, Debug, Default)]
pub(super) struct Form {
    names: bool,
    prefix: Vec<Part>,
    without_data: bool,
    newline: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Id,
    Label(String),
}

/// What a job's records get.
#[derive(Debug, Default)]
pub(super) struct Dress {
    app: Option<String>,
    prefix: String,
}

impl Form {
    /// Of a syslog server.
    pub(super) fn of(config: &SyslogConfig) -> Result<Self> {
        Ok(Self {
            names: !config.use_ids,
            prefix: parse(&config.prefix)?,
            without_data: !config.structured_data,
            newline: config.format == SyslogFormat::Newline,
        })
    }

    /// Whether records are sent as they are on the disk.
    pub(super) fn is_plain(&self) -> bool {
        !self.names && self.prefix.is_empty() && !self.without_data && !self.newline
    }

    /// What this job's records get.
    pub(super) fn dress(&self, job: &Job) -> Dress {
        let has = |label: &str| job.metadata.get(label).map_or("", String::as_str);
        let app = Some(has(label::APP_NAME)).filter(|app| self.names && !app.is_empty());
        let prefix = self.prefix.iter().map(|part| match part {
            Part::Text(text) => text,
            Part::Id => job.id.as_str(),
            Part::Label(label) => has(label),
        });
        Dress {
            app: app.map(|app| name(app, 48)),
            prefix: prefix.collect(),
        }
    }

    /// Appends one record.
    pub(super) fn write(&self, dress: &Dress, record: &Record<'_>, to: &mut Vec<u8>) {
        let app = dress.app.as_ref().map_or(record.app, |app| app.as_bytes());
        let data = if self.without_data { b"-" } else { record.data };
        let prefix = dress.prefix.as_bytes();
        let blank: &[u8] = if prefix.is_empty() { b"" } else { b" " };
        let fields = [
            record.priority,
            record.time,
            record.host,
            app,
            record.process,
            record.kind,
            data,
        ];
        let length = fields.iter().map(|field| field.len() + 1).sum::<usize>()
            + prefix.len()
            + blank.len()
            + record.text.len();
        if !self.newline {
            to.extend_from_slice(format!("{length} ").as_bytes());
        }
        for field in fields {
            to.extend_from_slice(field);
            to.push(b' ');
        }
        for part in [prefix, blank, record.text] {
            to.extend_from_slice(part);
        }
        if self.newline {
            to.push(b'\n');
        }
    }
}

/// Reads a template of the two forms that there are.
fn parse(template: &str) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    let mut rest = template;
    while let Some((text, after)) = rest.split_once("{{") {
        let (action, after) = after.split_once("}}").ok_or_else(|| unknown(after))?;
        if !text.is_empty() {
            parts.push(Part::Text(text.to_owned()));
        }
        let label = |action: &str| {
            let quoted = action
                .strip_prefix("index")?
                .trim_start()
                .strip_prefix(".Metadata")?;
            let label = quoted.trim().strip_prefix('"')?.strip_suffix('"')?;
            Some(label.to_owned())
        };
        let action = action.trim();
        parts.push(if action == ".ID" {
            Part::Id
        } else {
            Part::Label(label(action).ok_or_else(|| unknown(action))?)
        });
        rest = after;
    }
    if !rest.is_empty() {
        parts.push(Part::Text(rest.to_owned()));
    }
    if template.len() > 256 || template.contains(|c: char| c.is_control()) {
        return Err(Error::invalid_field(
            "config.prefix",
            "at most 256 bytes of text without control characters are wanted",
        ));
    }
    Ok(parts)
}

fn unknown(action: &str) -> Error {
    let known = r#"{{.ID}} (the job's id) and {{index .Metadata "name"}} (a label) can be filled in"#;
    Error::invalid_field("config.prefix", format!("{{{{{action}}}}}: only {known}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(prefix: &str) -> SyslogConfig {
        serde_json::from_value(serde_json::json!({"url": "syslog://one", "prefix": prefix})).unwrap()
    }

    fn job() -> Job {
        let mut job = Job {
            id: "host1-9c".into(),
            ..Job::default()
        };
        job.metadata.insert(label::APP_NAME.into(), "shop".into());
        job
    }

    const MESSAGE: &str =
        r#"<14>1 2026-01-02T03:04:05.678901Z host1 2f1f web.host1-9c ID1 [flynn run="7" seq="17"] hello"#;

    fn written(config: &SyslogConfig) -> String {
        let form = Form::of(config).unwrap();
        let mut bytes = Vec::new();
        form.write(
            &form.dress(&job()),
            &Record::parse(MESSAGE.as_bytes()).unwrap(),
            &mut bytes,
        );
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn names_stand_in_for_ids() {
        assert_eq!(
            written(&config("")),
            format!("{} {}", MESSAGE.len(), MESSAGE).replace("2f1f", "shop")
        );
        let ids = SyslogConfig {
            use_ids: true,
            ..config("")
        };
        assert!(Form::of(&ids).unwrap().is_plain());
        assert_eq!(written(&ids), format!("{} {}", MESSAGE.len(), MESSAGE));
    }

    #[test]
    fn prefixes_are_filled_in() {
        let config = SyslogConfig {
            structured_data: false,
            format: SyslogFormat::Newline,
            ..config(
                r#"[{{.ID}}] {{ index .Metadata "flynn-controller.app_name" }}:{{index .Metadata "none"}}"#,
            )
        };
        let wanted =
            "<14>1 2026-01-02T03:04:05.678901Z host1 shop web.host1-9c ID1 - [host1-9c] shop: hello\n";
        assert_eq!(written(&config), wanted);
    }

    #[test]
    fn what_cannot_be_filled_in_is_refused() {
        for prefix in ["{{.Env}}", "{{.ID", "{{index .Metadata name}}", "a\nb"] {
            let error = Form::of(&config(prefix)).unwrap_err();
            assert!(error.to_string().contains("prefix"), "{error}");
        }
    }
}
