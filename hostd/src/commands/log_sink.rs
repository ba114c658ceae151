//! `flynn-host log-sink`: where this host's jobs' logs are sent.

use std::path::PathBuf;

use anyhow::Context as _;
use flynn_api::client::host::HostClient;
use flynn_api::sink::{LogAggregatorConfig, Sink, SinkKind, SinkStatus, SyslogConfig, SyslogFormat};

use super::network::amount;
use super::show::table;
use super::{print_json, reach};

/// `flynn-host log-sink`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// What to do
    #[command(subcommand)]
    command: Command,
    /// As JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// List sinks, and how they do
    List,
    /// Send logs to a sink: what is on this host's disk, and what comes
    Add(Add),
    /// Send logs to a sink no more
    Remove {
        /// Its id
        id: String,
    },
}

#[derive(clap::Args, Debug)]
struct Add {
    /// Its name on this host; one that is there already is changed, and goes on from where it was
    id: String,
    /// syslog://HOST:PORT, syslog+tls://HOST:PORT, logaggregator://HOST:PORT, or logaggregator:SERVICE for whoever leads
    /// a service in discoverd
    target: String,
    /// What stands in front of each line: text, {{.ID}} for the job's id, {{index .Metadata "NAME"}} for a label
    #[arg(long, default_value = "")]
    prefix: String,
    /// Name apps by their ids
    #[arg(long)]
    use_ids: bool,
    /// Take whatever certificate the server shows
    #[arg(long)]
    insecure: bool,
    /// A file with the certificates that the server's is to be signed by, in place of the system's
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Leave out the structured data, by which lines that come twice are known
    #[arg(long)]
    no_structured_data: bool,
    /// End each message with a newline, in place of saying its length before it
    #[arg(long)]
    newline: bool,
}

/// Does it.
pub(super) async fn run(host: &HostClient, args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::List => {
            let sinks = reach(host.sinks().await)?;
            if args.json {
                print_json(&sinks)?;
            } else {
                println!("{}", list(&sinks));
            }
        }
        Command::Add(add) => {
            let sink = reach(host.put_sink(&add.sink()?).await)?;
            if args.json {
                print_json(&sink)?;
            } else {
                println!(
                    "logs are sent to {}; `flynn-host log-sink list` shows whether they arrive",
                    sink.id
                );
            }
        }
        Command::Remove { id } => {
            reach(host.remove_sink(&id).await)?;
            if args.json {
                print_json(&serde_json::json!({ "id": id }))?;
            }
        }
    }
    Ok(())
}

impl Add {
    fn sink(self) -> anyhow::Result<Sink> {
        let (kind, config) = if let Some(place) = self.target.strip_prefix("logaggregator:") {
            let mut config = LogAggregatorConfig::default();
            match place.strip_prefix("//") {
                Some(addr) => addr.trim_end_matches('/').clone_into(&mut config.addr),
                None => place.clone_into(&mut config.service),
            }
            (SinkKind::Logaggregator, serde_json::to_value(config)?)
        } else {
            let read = |path: &PathBuf| {
                std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
            };
            let config = SyslogConfig {
                url: self.target,
                prefix: self.prefix,
                use_ids: self.use_ids,
                insecure: self.insecure,
                structured_data: !self.no_structured_data,
                format: if self.newline {
                    SyslogFormat::Newline
                } else {
                    SyslogFormat::Rfc6587
                },
                ca: self.ca.as_ref().map(read).transpose()?,
            };
            (SinkKind::Syslog, serde_json::to_value(config)?)
        };
        Ok(Sink {
            id: self.id,
            kind,
            config,
            host_managed: true,
        })
    }
}

fn list(sinks: &[SinkStatus]) -> String {
    let mut table = table(&["ID", "WHERE", "STATE", "SENT", "WAITING", "DROPPED LINES"]);
    for status in sinks {
        let config = &status.sink.config;
        let field = |name: &str| config[name].as_str().filter(|value| !value.is_empty());
        let place = match (field("url"), field("addr"), field("service")) {
            (Some(url), _, _) => url.to_owned(),
            (_, Some(addr), _) => format!("logaggregator://{addr}"),
            (_, _, service) => format!("logaggregator:{}", service.unwrap_or_default()),
        };
        let state = match &status.error {
            _ if status.connected => "connected".to_owned(),
            Some(why) => format!("not connected: {why}"),
            None => "connecting".to_owned(),
        };
        table.add_row([
            status.sink.id.clone(),
            place,
            state,
            amount(status.bytes),
            amount(status.waiting_bytes),
            status.dropped_lines.to_string(),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        add: Add,
    }

    fn sink(args: &[&str]) -> Sink {
        let args = ["add", "one"].iter().chain(args);
        Cli::parse_from(args).add.sink().unwrap()
    }

    #[test]
    fn targets_name_kinds() {
        let syslog = sink(&["syslog://logs:5514", "--use-ids", "--newline"]);
        assert_eq!((syslog.kind, syslog.host_managed), (SinkKind::Syslog, true));
        let config: SyslogConfig = serde_json::from_value(syslog.config).unwrap();
        assert!(config.use_ids && config.structured_data && config.format == SyslogFormat::Newline);
        assert_eq!(
            sink(&["logaggregator:logs"]).config,
            serde_json::json!({"service": "logs"})
        );
        assert_eq!(
            sink(&["logaggregator://h:514/"]).config,
            serde_json::json!({"addr": "h:514"})
        );
    }
}
