//! `flynn-lab`: labs from the command line. `cargo xtask up` uses it; so can you.

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use flynn_lab::{Lab, LabConfig};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// Hosts on one machine, with faults.
#[derive(Parser)]
#[command(name = "flynn-lab", version)]
struct Cli {
    /// Where labs have their state: a directory each, by name
    #[arg(long, env = "FLYNN_LABS", default_value = "target/lab", global = true)]
    labs: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

/// What to do.
#[derive(Subcommand)]
enum Verb {
    /// Boot a lab and leave it running
    Up {
        /// A JSON file that says what it consists of: `name`, `hosts`, `services`, `binds`, `forwards`, `disk`
        config: PathBuf,
    },
    /// Say how a lab is, as JSON
    Status {
        /// The lab
        lab: String,
    },
    /// Run a command in a host
    Exec {
        /// The lab
        lab: String,
        /// The host's number
        host: u8,
        /// Program and arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<OsString>,
    },
    /// Start a service of a host
    Start {
        /// The lab
        lab: String,
        /// The host's number
        host: u8,
        /// The service
        service: String,
    },
    /// Kill a service of a host
    Kill {
        /// The lab
        lab: String,
        /// The host's number
        host: u8,
        /// The service
        service: String,
    },
    /// Take a host's power away, and with it what was not synced
    PowerCut {
        /// The lab
        lab: String,
        /// The host's number
        host: u8,
    },
    /// Put a host on
    Boot {
        /// The lab
        lab: String,
        /// The host's number
        host: u8,
    },
    /// Let nothing pass between two hosts
    Cut {
        /// The lab
        lab: String,
        /// One host's number
        one: u8,
        /// The other's
        other: u8,
        /// Only from one to the other
        #[arg(long)]
        one_way: bool,
    },
    /// Undo all cuts between two hosts
    Mend {
        /// The lab
        lab: String,
        /// One host's number
        one: u8,
        /// The other's
        other: u8,
    },
    /// End a lab, or what a crashed one left
    Down {
        /// The lab
        #[arg(required_unless_present = "all")]
        lab: Option<String>,
        /// All labs of this machine
        #[arg(long, conflicts_with = "lab")]
        all: bool,
    },
}

fn main() -> ExitCode {
    flynn_lab::reexec();
    match run(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let labs = std::path::absolute(&cli.labs).context("where is the labs' directory?")?;
    let connect = |name: &str| Lab::connect(labs.join(name)).with_context(|| format!("no lab {name}"));
    match cli.verb {
        Verb::Up { config } => {
            let text = std::fs::read_to_string(&config)
                .with_context(|| format!("cannot read {}", config.display()))?;
            let mut config: serde_json::Value =
                serde_json::from_str(&text).context("the configuration is no JSON")?;
            let name = config["name"]
                .as_str()
                .context("the configuration has no name")?
                .to_owned();
            config["dir"] = labs.join(&name).to_string_lossy().into();
            let config: LabConfig =
                serde_json::from_value(config).context("the configuration cannot be read")?;
            Lab::start_detached(&config)?;
        }
        Verb::Status { lab } => println!("{}", serde_json::to_string_pretty(&connect(&lab)?.status()?)?),
        Verb::Exec { lab, host, command } => {
            let lab = connect(&lab)?;
            let (program, args) = command.split_first().context("no command")?;
            let status = lab.host(host).command(program)?.args(args).status()?;
            return Ok(ExitCode::from(
                status
                    .code()
                    .and_then(|code| u8::try_from(code).ok())
                    .unwrap_or(137),
            ));
        }
        Verb::Start { lab, host, service } => connect(&lab)?.host(host).start(&service)?,
        Verb::Kill { lab, host, service } => connect(&lab)?.host(host).kill(&service)?,
        Verb::PowerCut { lab, host } => connect(&lab)?.host(host).power_cut()?,
        Verb::Boot { lab, host } => connect(&lab)?.host(host).boot()?,
        Verb::Cut {
            lab,
            one,
            other,
            one_way: true,
        } => connect(&lab)?.cut_one_way(one, other)?,
        Verb::Cut {
            lab,
            one,
            other,
            one_way: false,
        } => connect(&lab)?.cut(one, other)?,
        Verb::Mend { lab, one, other } => connect(&lab)?.mend(one, other)?,
        Verb::Down { lab, .. } => {
            let names = lab.map_or_else(flynn_lab::labs, |name| Ok(vec![name]))?;
            for name in names {
                let dir = labs.join(&name);
                match Lab::connect(&dir) {
                    Ok(lab) => lab.down()?,
                    // It crashed, or never was.
                    Err(_) => flynn_lab::clean(&name, &dir)?,
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
