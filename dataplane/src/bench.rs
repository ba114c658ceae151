//! Packets for benchmarks: made by a program that the kernel runs over live frames, bounced by a program under test, and
//! counted when they come back.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use aya::{
    Ebpf, EbpfLoader, TestRun, TestRunAttrs, TestRunOptions, include_bytes_aligned,
    maps::{Array, PerCpuArray, PerCpuValues},
    programs::{Xdp, XdpMode, xdp::XdpLinkId},
};
use flynn_abi::bench::FRAME;
pub use flynn_abi::{
    Mac,
    bench::{Plan, Seen},
};

use crate::error::{Error, Refusal, Result};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench"));

/// Frames that are under way at a time.
const BATCH: u32 = 64;

/// Sends packets out of one end of a veth pair and counts those which come back to it.
pub struct Generator {
    object: Ebpf,
    ifindex: u32,
}

/// What a run came to.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// How long it took.
    pub took: Duration,
    /// Packets that were made, and those which came back.
    pub seen: Seen,
}

impl Generator {
    /// Takes the interface with this name and index. What the object has of the data plane's maps is pinned in a
    /// directory that is there, out of everybody's way.
    pub fn open(pins: &Path, interface: &str, ifindex: u32) -> Result<Self> {
        let open = || -> Result<Self, Refusal> {
            let mut object = EbpfLoader::new().default_map_pin_directory(pins).load(OBJECT)?;
            for name in ["generate", "bounce", "sink"] {
                program(&mut object, name)?.load()?;
            }
            program(&mut object, "sink")?.attach(interface, XdpMode::Driver)?;
            Ok(Self { object, ifindex })
        };
        open().map_err(Error::kernel("loading the benchmark's programs"))
    }

    /// Has an interface send everything back, until [`Generator::unbounce`].
    pub fn bounce(&mut self, interface: &str) -> Result<XdpLinkId> {
        let mut attach = || -> Result<_, Refusal> {
            Ok(program(&mut self.object, "bounce")?.attach(interface, XdpMode::Driver)?)
        };
        attach().map_err(Error::kernel("attaching the program that bounces"))
    }

    /// Ends that.
    pub fn unbounce(&mut self, link: XdpLinkId) -> Result<()> {
        let detach = || -> Result<_, Refusal> { Ok(program(&mut self.object, "bounce")?.detach(link)?) };
        detach().map_err(Error::kernel("detaching the program that bounces"))
    }

    /// Sends so many packets as fast as the calling thread's CPU can, and waits until none comes back any more.
    pub fn run(&mut self, plan: Plan, packets: u32) -> Result<Run> {
        let mut run = || -> Result<Run, Refusal> {
            let mut plans: Array<_, Plan> =
                Array::try_from(self.object.map_mut("bench_plan").ok_or(Missing)?)?;
            plans.set(0, plan, 0)?;
            let before = self.seen()?;
            let mut context = [0; 24];
            context[4..8].copy_from_slice(&u32::try_from(FRAME).unwrap_or(0).to_ne_bytes());
            context[12..16].copy_from_slice(&self.ifindex.to_ne_bytes());
            let began = Instant::now();
            let generate: &Xdp = self.object.program("generate").ok_or(Missing)?.try_into()?;
            generate.test_run(TestRunOptions {
                data_in: Some(&[0; FRAME]),
                ctx_in: Some(&context),
                repeat: packets,
                attrs: TestRunAttrs::new().xdp_live_frames(BATCH),
                ..TestRunOptions::default()
            })?;
            let took = began.elapsed();
            std::thread::sleep(Duration::from_millis(20));
            let after = self.seen()?;
            let seen = Seen {
                made: after.made - before.made,
                right: after.right - before.right,
                wrong: after.wrong - before.wrong,
            };
            Ok(Run { took, seen })
        };
        run().map_err(Error::kernel("running the benchmark's packets"))
    }

    fn seen(&self) -> Result<Seen, Refusal> {
        let counts: PerCpuArray<_, Seen> =
            PerCpuArray::try_from(self.object.map("bench_seen").ok_or(Missing)?)?;
        let cpus: PerCpuValues<Seen> = counts.get(&0, 0)?;
        Ok(cpus.iter().fold(Seen::default(), |all, cpu| Seen {
            made: all.made + cpu.made,
            right: all.right + cpu.right,
            wrong: all.wrong + cpu.wrong,
        }))
    }
}

fn program<'o>(object: &'o mut Ebpf, name: &str) -> Result<&'o mut Xdp, Refusal> {
    Ok(object.program_mut(name).ok_or(Missing)?.try_into()?)
}

#[derive(Debug, thiserror::Error)]
#[error("the benchmark's object is not whole")]
struct Missing;
