//! Builds the eBPF programs and puts the objects where `src/object.rs` embeds them from.
//!
//! They are built for a target without a prebuilt standard library, so the compiler's sources are needed. Rustup's
//! nightly has them as a component; so may the system's own compiler, which then takes the nightly flags because
//! `RUSTC_BOOTSTRAP` says so.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const TARGET: &str = "bpfel-unknown-none";
/// What makes packets for benchmarks, beside those.
const BENCH: &str = "bench";
/// The objects, one for each part of the data plane.
const OBJECTS: [&str; 4] = ["lb", "overlay", "service", "steer"];

const RECIPES: &str =
    "The eBPF programs need a Rust compiler with its sources, and bpf-linker. Either of these does:

  with rustup:
    rustup toolchain install nightly --component rust-src
    cargo install bpf-linker

  with a distribution's own compiler, 1.85 or newer (on Debian: rustc-web and rust-web-src, llvm-22-dev):
    apt-get install rustc-web cargo-web rust-web-src llvm-22-dev libpolly-22-dev libzstd-dev libxml2-dev
    LLVM_PREFIX=/usr/lib/llvm-22 PATH=/usr/lib/llvm-22/bin:$PATH RUSTFLAGS=\"-L /usr/lib/llvm-22/lib\" \\
      cargo install bpf-linker --no-default-features --features llvm-22

`cargo xtask setup` does what fits this machine. A bpf-linker elsewhere can be named in FLYNN_BPF_LINKER.";

fn main() {
    if let Err(message) = build() {
        eprintln!("{message}\n\n{RECIPES}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let manifest_dir = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").ok_or("no CARGO_MANIFEST_DIR")?);
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").ok_or("no OUT_DIR")?);
    let ebpf = manifest_dir.join("../ebpf");
    for input in [
        "abi/Cargo.toml",
        "abi/src",
        "programs/Cargo.toml",
        "programs/Cargo.lock",
        "programs/build.rs",
        "programs/src",
    ] {
        println!("cargo::rerun-if-changed={}", ebpf.join(input).display());
    }
    println!("cargo::rerun-if-env-changed=FLYNN_BPF_LINKER");

    let linker = linker()?;
    let toolchains: Vec<Toolchain> = [nightly(), system()].into_iter().flatten().collect();
    if toolchains.is_empty() {
        return Err(
            "No Rust compiler with its sources was found: neither rustup's nightly nor /usr/bin/rustc."
                .into(),
        );
    }
    let target_dir = out_dir.join("ebpf");
    let mut failures = Vec::new();
    for toolchain in toolchains {
        match toolchain.build(&ebpf.join("programs"), &target_dir, &linker) {
            Ok(built) => {
                OBJECTS
                    .into_iter()
                    .chain([BENCH])
                    .try_for_each(|name| put(&built.join(name), &out_dir.join(name)))?;
                return list(&out_dir);
            }
            Err(failure) => failures.push(failure),
        }
    }
    Err(failures.join("\n\n"))
}

fn put(object: &Path, to: &Path) -> Result<(), String> {
    match fs::copy(object, to) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!(
            "copying {} to {}: {error}",
            object.display(),
            to.display()
        )),
    }
}

/// Writes down which objects there are, for whoever wants all of them.
fn list(out_dir: &Path) -> Result<(), String> {
    let entries = OBJECTS.map(|name| {
        format!("(\"{name}\", aya::include_bytes_aligned!(concat!(env!(\"OUT_DIR\"), \"/{name}\")))")
    });
    fs::write(out_dir.join("objects.rs"), format!("&[{}]", entries.join(",")))
        .map_err(|error| format!("writing the list of objects: {error}"))
}

/// A compiler with the sources of its standard library, and the cargo to drive it.
struct Toolchain {
    name: &'static str,
    cargo: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
}

fn nightly() -> Option<Toolchain> {
    const RUN: [&str; 3] = ["rustup", "run", "nightly"];
    let mut rustc = clean(Command::new(RUN[0]));
    let output = rustc
        .args(&RUN[1..])
        .args(["rustc", "--print", "sysroot"])
        .output()
        .ok()?;
    has_sources(&sysroot(&output)?).then(|| Toolchain {
        name: "rustup's nightly",
        cargo: RUN.into_iter().chain(["cargo"]).map(OsString::from).collect(),
        environment: Vec::new(),
    })
}

fn system() -> Option<Toolchain> {
    const RUSTC: &str = "/usr/bin/rustc";
    let output = clean(Command::new(RUSTC))
        .args(["--print", "sysroot"])
        .output()
        .ok()?;
    has_sources(&sysroot(&output)?).then(|| Toolchain {
        name: RUSTC,
        cargo: vec![env::var_os("CARGO").unwrap_or_else(|| "cargo".into())],
        environment: vec![("RUSTC", RUSTC.into()), ("RUSTC_BOOTSTRAP", "1".into())],
    })
}

fn sysroot(output: &std::process::Output) -> Option<PathBuf> {
    let path = str::from_utf8(&output.stdout).ok()?.trim();
    (output.status.success() && !path.is_empty()).then(|| PathBuf::from(path))
}

fn has_sources(sysroot: &Path) -> bool {
    sysroot
        .join("lib/rustlib/src/rust/library/core/src/lib.rs")
        .is_file()
}

impl Toolchain {
    /// The directory with the objects.
    fn build(&self, programs: &Path, target_dir: &Path, linker: &Path) -> Result<PathBuf, String> {
        let mut command = clean(Command::new(&self.cargo[0]));
        command
            .args(&self.cargo[1..])
            .current_dir(programs)
            .args([
                "build",
                "--locked",
                "--release",
                "-Zbuild-std=core",
                "--target",
                TARGET,
                "--target-dir",
            ])
            .arg(target_dir)
            .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        let output = command
            .output()
            .map_err(|error| format!("With {}: {error}", self.name))?;
        if output.status.success() {
            return Ok(target_dir.join(TARGET).join("release"));
        }
        Err(format!(
            "With {}, the programs do not build:\n{}",
            self.name,
            String::from_utf8_lossy(&output.stderr)
        ))
    }
}

/// Takes from a command what the outer cargo meant for its own builds: flags, wrappers, target directories and paths
/// of libraries. What says how to reach registries stays.
fn clean(mut command: Command) -> Command {
    const KEPT: [&str; 5] = [
        "CARGO_HOME",
        "CARGO_HTTP_",
        "CARGO_NET_",
        "CARGO_REGISTR",
        "CARGO_SOURCE_",
    ];
    for (name, _) in env::vars_os() {
        let Some(name) = name.to_str() else { continue };
        let builds = ["CARGO", "RUST", "CLIPPY", "DEP_"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        let kept = name == "RUSTUP_HOME" || KEPT.iter().any(|prefix| name.starts_with(prefix));
        if builds && !kept {
            command.env_remove(name);
        }
    }
    for name in [
        "LD_LIBRARY_PATH",
        "MAKEFLAGS",
        "MFLAGS",
        "TARGET",
        "HOST",
        "PROFILE",
        "OPT_LEVEL",
        "DEBUG",
    ] {
        command.env_remove(name);
    }
    command
}

fn linker() -> Result<PathBuf, String> {
    if let Some(named) = env::var_os("FLYNN_BPF_LINKER") {
        let named = PathBuf::from(named);
        return if named.is_file() {
            Ok(named)
        } else {
            Err(format!(
                "FLYNN_BPF_LINKER names {}, which is no file.",
                named.display()
            ))
        };
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
    env::split_paths(&path)
        .chain(home.map(|home| home.join("bin")))
        .map(|directory| directory.join("bpf-linker"))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| "bpf-linker was found neither in PATH nor in cargo's bin directory.".into())
}
