//! The lab, tried with plain commands as load.

use anyhow::{Context, Result, bail, ensure};
use flynn_lab::{Bind, Forward, Lab, LabConfig, Service, until};
use libtest_mimic::{Arguments, Failed, Trial};
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

type Test = fn() -> Result<()>;

const SOON: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    flynn_lab::reexec();
    let arguments = Arguments::from_args();
    let reason = flynn_lab::obstacle();
    if let Some(reason) = reason {
        eprintln!("the lab's tests are skipped: {reason}");
    }
    let tests: [(&str, Test); 7] = [
        (
            "hosts_reach_each_other_until_they_are_cut",
            hosts_reach_each_other_until_they_are_cut,
        ),
        (
            "a_host_has_everything_of_its_own",
            a_host_has_everything_of_its_own,
        ),
        (
            "services_are_started_killed_and_paused",
            services_are_started_killed_and_paused,
        ),
        (
            "a_power_cut_loses_what_was_not_synced",
            a_power_cut_loses_what_was_not_synced,
        ),
        ("a_forward_leads_inside", a_forward_leads_inside),
        ("a_killed_lab_takes_all_with_it", a_killed_lab_takes_all_with_it),
        (
            "a_lab_that_cannot_start_leaves_nothing",
            a_lab_that_cannot_start_leaves_nothing,
        ),
    ];
    let trials = tests
        .into_iter()
        .map(|(name, test)| {
            let run = move || test().map_err(|error| Failed::from(format!("{error:#}")));
            Trial::test(name, run).with_ignored_flag(reason.is_some())
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A lab in a directory of its own, and what the machine had before it.
struct Bed {
    config: LabConfig,
    before: Machine,
    _tmp: tempfile::TempDir,
}

impl Bed {
    fn new(name: &str, hosts: u8) -> Result<Self> {
        let tmp = tempfile::tempdir()?;
        let name = format!("{name}-{}", std::process::id());
        let mut config = LabConfig::new(name, tmp.path().join("lab"), hosts);
        config.disk = 1 << 30;
        Ok(Self {
            before: Machine::now(&config.name)?,
            config,
            _tmp: tmp,
        })
    }

    /// The machine is as it was.
    fn left_nothing(&self) -> Result<()> {
        let now = Machine::now(&self.config.name)?;
        ensure!(
            now == self.before,
            "something is left: {now:?}, where there was {:?}",
            self.before
        );
        ensure!(!self.config.dir.exists(), "the state directory is left");
        Ok(())
    }
}

/// What a lab could leave behind on the machine. Tests run side by side, so only what bears the lab's name counts,
/// but for mounts and interfaces, of which no lab may ever make any.
#[derive(Debug, PartialEq)]
struct Machine {
    mounts: String,
    interfaces: BTreeSet<PathBuf>,
    cgroups: Vec<PathBuf>,
    loops: Vec<String>,
    processes: Vec<String>,
}

impl Machine {
    fn now(lab: &str) -> Result<Self> {
        let paths = |dir: &str| -> Result<Vec<PathBuf>> {
            Ok(fs::read_dir(dir)?
                .filter_map(|entry| Some(entry.ok()?.path()))
                .collect())
        };
        let mut cgroups = Vec::new();
        for hierarchy in paths("/sys/fs/cgroup")? {
            cgroups.push(hierarchy.join(format!("flynn-lab-{lab}")));
        }
        cgroups.push(format!("/sys/fs/cgroup/flynn-lab-{lab}").into());
        cgroups.retain(|path| path.exists());
        let loops = paths("/sys/block")?
            .into_iter()
            .filter_map(|path| fs::read_to_string(path.join("loop/backing_file")).ok())
            .filter(|file| file.contains(lab))
            .collect();
        let processes = paths("/proc")?
            .into_iter()
            .filter_map(|path| fs::read_to_string(path.join("cmdline")).ok())
            .filter(|line| line.starts_with("flynn-lab:") && line.contains(lab))
            .collect();
        Ok(Self {
            mounts: fs::read_to_string("/proc/self/mounts")?,
            interfaces: paths("/sys/class/net")?.into_iter().collect(),
            cgroups,
            loops,
            processes,
        })
    }
}

fn hosts_reach_each_other_until_they_are_cut() -> Result<()> {
    let mut bed = Bed::new("cut", 2)?;
    bed.config.services.push(echo("{address}:7000"));
    let lab = Lab::start(&bed.config)?;
    let (one, two) = (lab.host(1), lab.host(2));
    let reach = |from: u8, to: u8| knock(&lab, from, &format!("{}:7000", lab.host(to).address()));
    until(SOON, "the hosts to reach each other", || {
        Ok(reach(1, 2)? && reach(2, 1)?)
    })?;

    lab.cut(1, 2)?;
    ensure!(
        !reach(1, 2)? && !reach(2, 1)?,
        "they reach each other over a cut link"
    );
    ensure!(reach(1, 1)?, "a cut link cuts a host from itself");
    lab.mend(1, 2)?;
    until(SOON, "the mended link to work", || {
        Ok(reach(1, 2)? && reach(2, 1)?)
    })?;

    // One way: what the second host says does not get out, what it hears does get in.
    let heard = || -> Result<u64> {
        Ok(two
            .run("cat", ["/sys/class/net/eth0/statistics/rx_packets"])?
            .trim()
            .parse()?)
    };
    lab.cut_one_way(2, 1)?;
    let before = heard()?;
    ensure!(!reach(1, 2)?, "an answer came over a link that is cut one way");
    ensure!(heard()? > before, "nothing came over the way that is not cut");
    lab.mend(1, 2)?;
    until(SOON, "the mended link to work", || reach(1, 2))?;

    let before = lab.lost()?;
    lab.lose(&[(1, 2, 50), (2, 1, 100)])?;
    ensure!(lab.status()?.cuts == [(2, 1)]);
    ensure!(!reach(1, 2)?, "an answer came over a link that loses all");
    ensure!(lab.lost()? > before, "nothing was counted");
    ensure!(lab.lose(&[(1, 2, 101)]).is_err(), "a link loses more than all");
    lab.lose(&[])?;
    until(SOON, "the good links to work", || reach(1, 2))?;

    ensure!(
        !one.exec("bash", ["-c", "exec 3<>/dev/tcp/198.51.100.1/80"])?
            .status
            .success(),
        "there is a way out"
    );
    ensure!(lab.cut(1, 3).is_err(), "a link to no host can be cut");
    lab.down()?;
    bed.left_nothing()
}

fn a_host_has_everything_of_its_own() -> Result<()> {
    let mut bed = Bed::new("own", 1)?;
    let tree = tempfile::tempdir()?;
    fs::write(tree.path().join("file"), "shown\n")?;
    bed.config.binds.push(Bind {
        from: tree.path().into(),
        to: "/opt/shown".into(),
    });
    let lab = Lab::start(&bed.config)?;
    let host = lab.host(1);
    ensure!(host.run("hostname", [""; 0])? == "host1\n");
    ensure!(host.run("cat", ["/opt/shown/file"])? == "shown\n");
    ensure!(
        !host.exec("touch", ["/opt/shown/new"])?.status.success(),
        "what is shown can be written"
    );
    ensure!(
        host.run("cat", ["/proc/1/comm"])?.trim() == "program",
        "process 1 is not the lab's"
    );
    ensure!(
        host.run("ls", ["/sys/class/net"])?
            .split_whitespace()
            .collect::<BTreeSet<_>>()
            == ["eth0", "lo"].into()
    );
    let bpf = host.run("stat", ["--file-system", "--format=%T", "/sys/fs/bpf"])?;
    ensure!(bpf.trim() == "bpf_fs", "/sys/fs/bpf is {bpf}");
    let disk = host.run("stat", ["--file-system", "--format=%T", "/var/lib/flynn"])?;
    ensure!(disk.trim() == "ext2/ext3", "/var/lib/flynn is {disk}");

    // Its cgroups look like a machine's, can be made and used, and do not show those of others.
    let groups = host.run("cat", ["/proc/1/cgroup"])?;
    ensure!(
        groups
            .lines()
            .all(|line| line.ends_with(":/") || line.ends_with(":/init.scope")),
        "{groups}"
    );
    let script = "set -e; for dir in $(awk '$3 ~ /^cgroup/ { print $2 }' /proc/mounts); do \
                  mkdir $dir/mine; ls -d $dir/flynn-lab-* 2>/dev/null && exit 1; \
                  sh -c 'echo $$ >'$dir/mine/cgroup.procs; rmdir $dir/mine; done";
    host.run("sh", ["-c", script])?;

    // What it writes elsewhere is its own.
    host.run(
        "sh",
        [
            "-c",
            "echo mine >/etc/flynn-lab-test && echo mine >/root/flynn-lab-test",
        ],
    )?;
    ensure!(!Path::new("/etc/flynn-lab-test").exists() && !Path::new("/root/flynn-lab-test").exists());

    // Exit codes, environment and the streams are those of the command.
    let output = host
        .command("sh")?
        .args(["-c", "cat; echo $WORD >&2; exit 7"])
        .env("WORD", "said")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .and_then(|mut child| {
            child
                .stdin
                .take()
                .map(|mut stdin| stdin.write_all(b"heard"))
                .transpose()?;
            child.wait_with_output()
        })?;
    ensure!(
        (output.status.code(), &*output.stdout, &*output.stderr) == (Some(7), b"heard", b"said\n"),
        "{output:?}"
    );
    ensure!(host.exec("sh", ["-c", "kill -9 $$"])?.status.code() == Some(137));
    // Orphans find their parent in process 1, and are reaped.
    let pid = host.run("sh", ["-c", "sleep 0.05 >/dev/null 2>&1 & echo $!"])?;
    until(SOON, "an orphan to be reaped", || {
        Ok(!host
            .exec("test", ["-e", &format!("/proc/{}", pid.trim())])?
            .status
            .success())
    })?;
    lab.down()?;
    bed.left_nothing()
}

fn services_are_started_killed_and_paused() -> Result<()> {
    let mut bed = Bed::new("services", 1)?;
    bed.config.services.push(Service {
        name: "ticker".into(),
        command: [
            "sh",
            "-c",
            "echo $NAME begins at {address}; sleep 1000 & while sleep 0.01; do echo tick; done",
        ]
        .map(str::to_owned)
        .into(),
        env: [("NAME".to_owned(), "{host}".to_owned())].into(),
    });
    let lab = Lab::start(&bed.config)?;
    let host = lab.host(1);
    let log = || Ok::<_, anyhow::Error>(fs::read_to_string(host.log("ticker"))?);
    until(SOON, "the service to tick", || Ok(log()?.contains("tick")))?;
    ensure!(log()?.starts_with("host1 begins at 192.0.2.11\n"), "{}", log()?);
    ensure!(
        host.start("ticker").is_err(),
        "a service that runs can be started"
    );

    host.pause("ticker")?;
    let state = || -> Result<String> {
        let pid = host.status()?.services["ticker"].context("the service is gone")?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Ok(stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.split(' ').next())
            .unwrap_or_default()
            .to_owned())
    };
    until(SOON, "the service to stand", || Ok(state()? == "T"))?;
    let stood = log()?.len();
    host.resume("ticker")?;
    until(SOON, "the service to go on", || Ok(log()?.len() > stood))?;

    host.kill("ticker")?;
    ensure!(!host.runs("ticker")?, "it was killed and runs");
    let sleeper = host.run("pgrep", ["-f", "sleep 1000"])?;
    ensure!(host.kill("ticker").is_err(), "what does not run can be killed");
    host.start("ticker")?;
    until(SOON, "the service to be back", || {
        Ok(log()?.matches("begins").count() == 2)
    })?;
    ensure!(
        host.run("pgrep", ["-f", "sleep 1000"])?.contains(sleeper.trim()),
        "a child died with its parent"
    );
    host.signal_process(sleeper.trim().parse()?, 9)?;
    ensure!(host.start("nothing").is_err());
    drop(lab);
    bed.left_nothing()
}

fn a_power_cut_loses_what_was_not_synced() -> Result<()> {
    let mut bed = Bed::new("power", 2)?;
    bed.config.services.push(echo("{address}:7000"));
    let lab = Lab::start(&bed.config)?;
    let host = lab.host(1);
    let boot = host.run("cat", ["/proc/sys/kernel/random/boot_id"])?;
    for round in 1..=3 {
        let script = format!(
            "cd /var/lib/flynn; echo {round} >kept.{round}; sync -d kept.{round}; sync -f .; echo {round} >lost.{round}; \
             echo gone >/run/gone; sleep 1000 &"
        );
        host.run("sh", ["-c", &format!("({script}) >/dev/null 2>&1")])?;
        host.power_cut()?;
        ensure!(host.status()?.init.is_none(), "it is still on");
        ensure!(
            host.exec("true", [""; 0]).is_err(),
            "a host that is off runs commands"
        );
        ensure!(host.power_cut().is_err(), "a host that is off can be cut off");
        host.boot()?;
        for past in 1..=round {
            let kept = host.run("cat", [format!("/var/lib/flynn/kept.{past}")])?;
            ensure!(
                kept.trim() == past.to_string(),
                "what was synced is {kept:?} after {round} cuts"
            );
            let lost = host.exec("cat", [format!("/var/lib/flynn/lost.{past}")])?;
            ensure!(
                lost.stdout.is_empty(),
                "what was not synced was not lost in cut {round}"
            );
        }
        ensure!(
            !host.exec("test", ["-e", "/run/gone"])?.status.success(),
            "/run outlived the cut"
        );
        ensure!(
            !host.exec("pgrep", ["-f", "sleep 1000"])?.status.success(),
            "a process outlived the cut"
        );
    }
    ensure!(host.status()?.power_cuts == 3);
    ensure!(
        host.run("cat", ["/proc/sys/kernel/random/boot_id"])? != boot,
        "the boot's id is the same"
    );
    ensure!(host.boot().is_err(), "a host that is on can be put on");
    until(SOON, "the host to be on the network again", || {
        knock(&lab, 2, "192.0.2.11:7000")
    })?;
    lab.down()?;
    bed.left_nothing()
}

fn a_forward_leads_inside() -> Result<()> {
    let mut bed = Bed::new("forward", 2)?;
    bed.config.services.push(echo("{address}:7000"));
    bed.config.forwards.push(Forward {
        listen: ([127, 0, 0, 1], 0).into(),
        port: 7000,
    });
    let lab = Lab::start(&bed.config)?;
    let [address] = lab.forwards()?[..] else {
        bail!("no forward")
    };
    let answer = || -> Result<String> {
        let mut text = String::new();
        // Nobody may listen yet, and then the connection just ends.
        let _ = TcpStream::connect(address)?.read_to_string(&mut text);
        Ok(text)
    };
    until(SOON, "an answer from inside", || {
        Ok(answer()? == "192.0.2.11:7000\n")
    })?;
    lab.host(1).power_cut()?;
    until(SOON, "an answer from the other host", || {
        Ok(answer()? == "192.0.2.12:7000\n")
    })?;
    lab.down()?;
    ensure!(TcpStream::connect(address).is_err(), "the forward is still there");
    bed.left_nothing()
}

fn a_killed_lab_takes_all_with_it() -> Result<()> {
    let mut bed = Bed::new("crash", 2)?;
    bed.config.services.push(echo("{address}:7000"));
    let lab = Lab::start_detached(&bed.config)?;
    let inits: Vec<i32> = lab.status()?.hosts.iter().filter_map(|host| host.init).collect();
    ensure!(inits.len() == 2);
    let procs = fs::read_to_string(keeper_group(&bed.config.name)?)?;
    for pid in procs.lines() {
        let pid = rustix::process::Pid::from_raw(pid.parse()?).context("no process")?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    }
    until(SOON, "the hosts to be gone", || {
        Ok(inits
            .iter()
            .all(|pid| !Path::new(&format!("/proc/{pid}")).exists()))
    })?;
    ensure!(lab.status().is_err(), "a dead lab answers");
    flynn_lab::clean(&bed.config.name, &bed.config.dir)?;
    bed.left_nothing()
}

fn a_lab_that_cannot_start_leaves_nothing() -> Result<()> {
    let mut bed = Bed::new("never", 2)?;
    bed.config.services.push(Service {
        name: "nothing".into(),
        command: vec!["/no/such/program".into()],
        env: [].into(),
    });
    let Err(error) = Lab::start(&bed.config) else {
        bail!("it started")
    };
    ensure!(format!("{error:#}").contains("/no/such/program"), "{error:#}");
    bed.left_nothing()?;

    bed.config.services.clear();
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    bed.config.forwards.push(Forward {
        listen: taken.local_addr()?,
        port: 80,
    });
    let Err(error) = Lab::start(&bed.config) else {
        bail!("it started")
    };
    ensure!(format!("{error:#}").contains("cannot listen"), "{error:#}");
    bed.left_nothing()
}

/// The processes of the keeper and what it has beside hosts.
fn keeper_group(lab: &str) -> Result<PathBuf> {
    ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
        .iter()
        .map(|root| PathBuf::from(format!("{root}/flynn-lab-{lab}/init.scope/cgroup.procs")))
        .find(|path| path.exists())
        .context("the lab has no cgroup")
}

/// A service that says its address to whoever connects, in Perl, which every Debian has.
fn echo(address: &str) -> Service {
    let script = "use IO::Socket::INET; \
        $s = IO::Socket::INET->new(LocalAddr => $ARGV[0], Listen => 9, ReuseAddr => 1) or die; \
        while ($c = $s->accept) { print $c \"$ARGV[0]\\n\"; close $c }";
    Service {
        name: "echo".into(),
        command: ["perl", "-e", script, address].map(str::to_owned).into(),
        env: [].into(),
    }
}

/// Whether a host gets an answer from an address within a second.
fn knock(lab: &Lab, from: u8, address: &str) -> Result<bool> {
    let script = "use IO::Socket::INET; \
        $s = IO::Socket::INET->new(PeerAddr => $ARGV[0], Timeout => 1) or exit 1; \
        exit(<$s> eq \"$ARGV[0]\\n\" ? 0 : 1)";
    Ok(lab
        .host(from)
        .exec("perl", ["-e", script, address])?
        .status
        .success())
}
