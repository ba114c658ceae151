//! The parts that run on a host of the lab or in a namespace, each saying what it measured as JSON on standard output.

pub(crate) mod containers;
pub(crate) mod discoverd;
pub(crate) mod dns;
pub(crate) mod memory;
pub(crate) mod router;
pub(crate) mod traffic;

/// What to measure.
#[derive(clap::Subcommand)]
pub(crate) enum Inside {
    /// The memory of each process
    Memory,
    /// Containers from start to exit
    Containers {
        #[arg(long)]
        rounds: u32,
    },
    /// A member of a discovery cluster
    Discoverd(discoverd::Args),
    /// The name server
    Dns(dns::Args),
    /// The router and its peers
    Router(router::Args),
    /// The one end of a TCP load: answers
    Answer(traffic::Answer),
    /// The other end: asks
    Ask(traffic::Ask),
    /// Another program in the same conditions
    Settled(traffic::Settled),
}

/// Measures.
pub(crate) fn run(inside: &Inside) -> anyhow::Result<()> {
    let json = match inside {
        Inside::Memory => serde_json::to_string(&memory::measure()?)?,
        Inside::Containers { rounds } => serde_json::to_string(&containers::measure(*rounds)?)?,
        Inside::Router(args) => serde_json::to_string(&router::measure(args)?)?,
        Inside::Answer(args) => serde_json::to_string(&traffic::answer(args)?)?,
        Inside::Ask(args) => serde_json::to_string(&traffic::ask(args)?)?,
        Inside::Settled(args) => return traffic::settled(args),
        Inside::Discoverd(args) => return discoverd::serve(args),
        Inside::Dns(args) => return dns::serve(args),
    };
    println!("{json}");
    Ok(())
}

/// The host's daemon.
fn daemon() -> anyhow::Result<flynn_api::client::host::HostClient> {
    let http = flynn_api::client::Http::new(&format!("unix:{}", flynn_api::host::SOCKET))?;
    Ok(flynn_api::client::host::HostClient::new(http))
}

pub(crate) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}
