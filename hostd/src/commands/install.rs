//! `flynn-host install`: the daemon as a service of systemd.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::files;

/// `flynn-host install`
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The state directory
    #[arg(long, default_value = "/var/lib/flynn")]
    state: PathBuf,
    /// Where the unit is put
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/systemd/system/flynn-host.service"
    )]
    unit: PathBuf,
    /// Show the unit and put it nowhere
    #[arg(long)]
    print: bool,
}

/// Writes the unit.
///
/// # Errors
/// A path cannot be in a unit, or the file cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let unit = unit(&program, &std::path::absolute(&args.state)?)?;
    if args.print {
        print!("{unit}");
        return Ok(());
    }
    let write = || -> std::io::Result<()> {
        std::fs::write(&args.unit, unit.as_bytes())?;
        args.unit.parent().map_or(Ok(()), files::sync_dir)
    };
    write().with_context(|| format!("cannot write {}", args.unit.display()))?;
    println!("{} is there. Next:", args.unit.display());
    println!("  systemctl daemon-reload && systemctl enable --now flynn-host");
    Ok(())
}

/// The unit. `KillMode=process`: supervisors and their jobs go on when the daemon is stopped or started anew.
/// `NotifyAccess=all`: a daemon that takes over says itself that it is the main process by now.
fn unit(program: &Path, state: &Path) -> anyhow::Result<String> {
    let (program, state) = (plain(program)?, plain(state)?);
    Ok(format!(
        "[Unit]
Description=Flynn host: runs the jobs of this host
After=network-online.target local-fs.target time-sync.target
Wants=network-online.target
RequiresMountsFor={state}
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=all
ExecStart={program} daemon --state {state}
ExecReload={program} update --installed
Restart=always
RestartSec=1
KillMode=process
Delegate=yes
TasksMax=infinity
LimitNOFILE=1048576

[Install]
WantedBy=multi-user.target
"
    ))
}

/// A path that means the same in a unit as elsewhere.
fn plain(path: &Path) -> anyhow::Result<&str> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    let text = path
        .to_str()
        .filter(|text| text.starts_with('/') && text.chars().all(fits));
    text.with_context(|| {
        format!(
            "{} cannot be in a unit of systemd's: choose a path of letters, digits and / . _ - +",
            path.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_leaves_jobs_alone_and_names_its_paths() {
        let text = unit(
            Path::new("/usr/local/bin/flynn-host"),
            Path::new("/var/lib/flynn"),
        )
        .unwrap();
        for line in [
            "Type=notify",
            "KillMode=process",
            "Delegate=yes",
            "ExecStart=/usr/local/bin/flynn-host daemon --state /var/lib/flynn",
            "ExecReload=/usr/local/bin/flynn-host update --installed",
        ] {
            assert!(text.lines().any(|there| there == line), "{line}");
        }
        for bad in ["/a b", "/a%h", "relative", "/a\nb", "/a$b"] {
            assert!(unit(Path::new("/flynn-host"), Path::new(bad)).is_err(), "{bad:?}");
        }
    }
}
