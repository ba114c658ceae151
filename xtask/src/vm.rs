//! `cargo xtask vm`: the kernel tests under older kernels.
//!
//! Debian's cloud kernels are booted by qemu, which emulates the processor: that works wherever there is no KVM, and
//! inside virtual machines. The machine is an initramfs that holds the tests of the data plane, of the overlay and of
//! containers as they are built for this machine, and what they call (`ip`, `nft`). It writes what they say to its
//! second serial port, where nothing of the kernel's own comes between. The host's daemon is driven there, too, on cgroups
//! of version 2 alone, as users' hosts have them: through the life of a container and all that has to do with cgroups,
//! and with `--program flynn-hostd_kernel` through all of its tests. [`plan`] says what runs where.
//!
//! A machine that does not report, stops in the middle or leaves a test program out has failed.

mod initramfs;
mod kernel;
mod plan;
mod report;

use crate::setup::{self, Need};
use crate::tail::Tail;
use crate::tally::Tally;
use crate::{exec, ui, workspace};
use anyhow::{Context, Result, bail};
use kernel::Kernel;
use plan::Run;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What a machine has, and what qemu may take of this one.
const MEMORY_MIB: u32 = 2048;
const CPUS: u32 = 2;

/// What to boot.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Boot this series of kernels only (6.1, 6.12); may be given several times
    #[arg(long = "kernel", value_parser = kernel::SERIES.map(|series| series.name))]
    kernels: Vec<String>,
    /// Run all tests under each kernel; else those of what a kernel does in its own way
    #[arg(long)]
    long: bool,
    /// Run only the test programs whose names contain this, wherever they usually run: flynn-hostd_kernel
    #[arg(long)]
    program: Option<String>,
    /// Run only tests whose names contain this, wherever they usually run
    #[arg(long)]
    filter: Option<String>,
    /// Install what is missing without asking (also with CI=true in the environment)
    #[arg(long)]
    yes: bool,
}

/// Boots what was asked for and prints the counts.
pub(crate) fn run(args: &Args) -> Result<()> {
    setup::provide(&[Need::Build, Need::Vm], args.yes)?;
    let (tally, _) = test(&Selection {
        kernels: &args.kernels,
        long: args.long,
        program: args.program.as_deref(),
        filter: args.filter.as_deref(),
    })?;
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed, tally.failed, tally.skipped
    );
    if tally.failed > 0 {
        bail!("tests failed under another kernel; what failed is said above");
    }
    Ok(())
}

/// Which tests run where.
#[derive(Default)]
pub(crate) struct Selection<'s> {
    /// Series of kernels; none are all.
    pub(crate) kernels: &'s [String],
    /// Also what takes long.
    pub(crate) long: bool,
    /// Only test programs whose names contain this, all of them.
    pub(crate) program: Option<&'s str>,
    /// Only tests whose names contain this.
    pub(crate) filter: Option<&'s str>,
}

/// Runs the tests in one machine after another. A kernel that cannot be had counts as one skipped test. With the counts
/// comes the end of what the last machine with a failed test has said.
pub(crate) fn test(selection: &Selection<'_>) -> Result<(Tally, Tail)> {
    let built = build()?;
    let mut tally = Tally::default();
    let mut tail = Tail::default();
    for (index, series) in kernel::SERIES.into_iter().enumerate() {
        if !selection.kernels.is_empty() && !selection.kernels.iter().any(|name| name == series.name) {
            continue;
        }
        match kernel::get(series) {
            Ok(kernel) => {
                let (counts, said) =
                    ui::timed(&format!("Kernel tests under Linux {}", kernel.release), || {
                        let runs = plan::runs(&built.tests, selection, index, kernel::SERIES.len());
                        boot(&kernel, &runs, &built.programs, selection)
                    })?;
                tally += counts;
                if counts.failed > 0 {
                    tail = said;
                }
            }
            Err(error) => {
                ui::note(&format!("Linux {} is skipped: {error:#}", series.name));
                tally.skipped += 1;
            }
        }
    }
    Ok((tally, tail))
}

/// A test program.
struct Test {
    name: String,
    package: String,
    path: PathBuf,
}

/// What cargo has built.
#[derive(Default)]
struct Built {
    tests: Vec<Test>,
    /// The programs that tests start: they look for them where cargo has put them.
    programs: Vec<PathBuf>,
}

/// Builds the test programs: all of the workspace at once, as they were built for this machine, so that nothing is built
/// a second time.
fn build() -> Result<Built> {
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
        target: Target,
        profile: Profile,
        package_id: String,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
        kind: Vec<String>,
    }
    #[derive(Deserialize)]
    struct Profile {
        test: bool,
    }

    let mut cargo = exec::cargo();
    cargo.args([
        "test",
        "--locked",
        "--no-run",
        "--message-format=json-render-diagnostics",
    ]);
    cargo.args(["--workspace", "--tests"]);
    let output = cargo
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("the kernel tests do not build");
    }
    let (mut built, mut programs) = (Built::default(), Vec::new());
    let said = String::from_utf8_lossy(&output.stdout);
    // Others of cargo's messages have not these fields.
    let messages = said
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok());
    for message in messages {
        let Some(path) = message.executable else { continue };
        let (package, target) = (name_of(&message.package_id).to_owned(), message.target);
        let is = |kind: &str| target.kind.iter().any(|of| of == kind);
        // Two crates may have tests of one name.
        let name = format!("{package}_{}", target.name);
        if is("bin") && !message.profile.test {
            programs.push((package, path));
        } else if is("test") && plan::knows(&package, &name) {
            built.tests.push(Test { name, package, path });
        }
    }
    if built.tests.is_empty() {
        bail!("cargo has built no kernel tests; has the format of its messages changed?");
    }
    programs.retain(|(package, _)| built.tests.iter().any(|test| test.package == *package));
    built.programs = programs.into_iter().map(|(_, path)| path).collect();
    Ok(built)
}

/// The name in cargo's id of a package: `path+file:///dir/dataplane#flynn-dataplane@0.1.0`.
fn name_of(package_id: &str) -> &str {
    let (_, name) = package_id.rsplit_once('#').unwrap_or_default();
    name.split('@').next().unwrap_or_default()
}

/// Boots one kernel, waits for its report and counts. With the counts comes the report's end.
fn boot(
    kernel: &Kernel,
    runs: &[Run<'_>],
    programs: &[PathBuf],
    selection: &Selection<'_>,
) -> Result<(Tally, Tail)> {
    let directory = workspace::target().join("vm").join(&kernel.release);
    let initramfs = initramfs::make(&directory, kernel, runs, programs, selection)?;
    let report = directory.join("report");
    let console = directory.join("console");
    for path in [&report, &console] {
        std::fs::write(path, []).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let limit = Duration::from_mins(if selection.long { 60 } else { 30 });
    let machine = Machine::start(kernel, &initramfs, &console, &report)?;
    let ended = machine.wait(limit)?;
    let text = std::fs::read(&report).with_context(|| format!("cannot read {}", report.display()))?;
    let text = String::from_utf8_lossy(&text).replace('\r', "");
    let names: Vec<String> = runs.iter().map(Run::to_string).collect();
    match report::read(&text, &kernel.release, &names) {
        Ok(tally) if ended => {
            if tally.failed > 0 {
                eprint!("{text}");
            }
            ui::note(&format!(
                "{} passed, {} failed, {} skipped",
                tally.passed, tally.failed, tally.skipped
            ));
            Ok((tally, Tail::of(&text)))
        }
        outcome => {
            eprint!("{text}");
            let why = outcome.err().unwrap_or("it did not end after its report");
            bail!(
                "the machine with Linux {} has failed: {why}{}; its console is in {}",
                kernel.release,
                if ended {
                    ""
                } else {
                    " (it was stopped after its time)"
                },
                console.display()
            );
        }
    }
}

/// A qemu that does not outlive us.
struct Machine(Child);

impl Machine {
    fn start(kernel: &Kernel, initramfs: &Path, console: &Path, report: &Path) -> Result<Self> {
        let file = |path: &Path| format!("file:{}", path.display());
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-nodefaults",
            "-no-user-config",
        ])
        .args(["-display", "none", "-no-reboot"])
        .args(["-m", &format!("{MEMORY_MIB}M"), "-smp", &CPUS.to_string()])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        .args([
            "-append",
            "console=ttyS0 panic=-1 oops=panic loglevel=4 mitigations=off nokaslr",
        ])
        .args(["-serial", &file(console), "-serial", &file(report)])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit());
        let child = exec::tied(&mut qemu)
            .spawn()
            .context("cannot start qemu-system-x86_64; `cargo xtask setup` installs it")?;
        Ok(Self(child))
    }

    /// Waits until it has ended by itself: whether it has.
    fn wait(mut self, limit: Duration) -> Result<bool> {
        let begun = Instant::now();
        while begun.elapsed() < limit {
            if self.0.try_wait()?.is_some() {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(false)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // One that has ended already is none to end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
