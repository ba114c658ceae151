//! `flynn log`.

use std::io::{self, Write as _};
use std::time::Duration;

use clap::Args;
use flynn_api::ErrorCode;
use flynn_api::client::controller::LogOptions;
use flynn_api::host::{LogLine, LogStream};
use futures::StreamExt as _;
use jiff::Timestamp;

use crate::context::Context;
use crate::failure::Result;
use crate::output::{self, note};

/// How long a broken stream rests before it is opened again.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Args)]
pub(super) struct Log {
    /// Go on with new lines
    #[arg(short, long)]
    follow: bool,
    /// How many lines of the past; all that are kept when it is not given
    #[arg(short = 'n', long)]
    lines: Option<u32>,
    /// Of this job alone
    #[arg(short, long)]
    job: Option<String>,
    /// Of this process type alone
    #[arg(short = 't', long = "process-type")]
    process_type: Option<String>,
    /// The lines alone, without times and jobs
    #[arg(short, long)]
    raw_output: bool,
    /// Lines from standard error go to standard error
    #[arg(short, long)]
    split_stderr: bool,
    /// What the host says about the jobs as well
    #[arg(short, long)]
    init: bool,
}

impl Log {
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let target = context.target().await?;
        let mut options = LogOptions {
            follow: self.follow,
            lines: self.lines,
            job_id: self.job.clone(),
            process_type: self.process_type.clone(),
        };
        // The latest line that was shown, and what it was when the stream broke: those up to it come again.
        let (mut last, mut shown): (Option<Timestamp>, Option<Timestamp>) = (None, None);
        loop {
            let broken = match target.controller.log(&target.app.id, &options).await {
                Ok(mut lines) => loop {
                    match lines.next().await {
                        Some(Ok((_, line))) => {
                            if shown.is_none_or(|shown| line.timestamp > shown) {
                                self.show(&line, context.globals.json)?;
                                last = last.max(Some(line.timestamp));
                            }
                        }
                        Some(Err(why)) => break Some(why),
                        None => break None,
                    }
                },
                Err(why) if last.is_some() && why.code == ErrorCode::Unavailable => Some(why),
                Err(why) => return Err(why.into()),
            };
            match broken {
                Some(why) if !self.follow => return Err(why.into()),
                Some(why) => note(format!("The log broke off ({why}); going on.")),
                None if !self.follow => return Ok(()),
                None => note("The log ended; going on."),
            }
            // What came meanwhile is asked for again.
            options.lines = last.map_or(self.lines, |_| None);
            shown = last;
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn show(&self, line: &LogLine, json: bool) -> Result<()> {
        if line.stream == LogStream::Init && !self.init {
            return Ok(());
        }
        if json {
            let text = serde_json::to_string(line).unwrap_or_default();
            return output::line(text);
        }
        let text = if self.raw_output {
            line.msg.clone()
        } else {
            prefixed(line)
        };
        if self.split_stderr && line.stream == LogStream::Stderr {
            // Nobody listens there any more: nothing is lost that anybody wanted.
            let _ = writeln!(io::stderr(), "{text}");
            return Ok(());
        }
        output::line(text)
    }
}

fn prefixed(line: &LogLine) -> String {
    let source = if line.stream == LogStream::Init {
        "flynn"
    } else {
        "app"
    };
    let kind = if line.process_type.is_empty() {
        "run"
    } else {
        &line.process_type
    };
    format!(
        "{:.3} {source}[{kind}.{}]: {}",
        line.timestamp, line.job_id, line.msg
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_name_their_job() {
        let line = LogLine {
            timestamp: "2026-01-02T03:04:05.678901Z".parse().unwrap(),
            stream: LogStream::Stdout,
            msg: "hello".into(),
            job_id: "h-1".into(),
            process_type: "web".into(),
        };
        assert_eq!(prefixed(&line), "2026-01-02T03:04:05.678Z app[web.h-1]: hello");
    }
}
