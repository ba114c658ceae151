//! `flynn-host port-forward`.

use std::net::IpAddr;

use anyhow::Context as _;
use flynn_api::client::forward::{self, Ports};
use flynn_api::client::host::HostClient;
use flynn_api::host::ForwardRequest;
use futures::future::try_join_all;
use tokio::net::TcpListener;

/// Which ports.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1")]
    address: IpAddr,
    /// The job's id, or the start of it
    pub(super) job: String,
    /// PORT, or LOCAL:REMOTE; LOCAL 0 is any that is free
    #[arg(required = true)]
    ports: Vec<Ports>,
}

/// Forwards until it is interrupted.
pub(super) async fn run(host: &HostClient, job: String, args: &Args) -> anyhow::Result<()> {
    let mut serving = Vec::new();
    for ports in &args.ports {
        let listener = TcpListener::bind((args.address, ports.local))
            .await
            .with_context(|| format!("cannot listen on {}:{}", args.address, ports.local))?;
        println!(
            "{} leads to port {} of {job}",
            listener.local_addr()?,
            ports.remote
        );
        let (host, job) = (host.clone(), job.clone());
        let request = ForwardRequest {
            port: ports.remote.get(),
        };
        let connect = move || {
            let (host, job) = (host.clone(), job.clone());
            async move { host.forward(&job, &request).await }
        };
        serving.push(forward::serve(listener, connect, |error| eprintln!("{error}")));
    }
    tokio::select! {
        served = try_join_all(serving) => drop(served?),
        interrupted = tokio::signal::ctrl_c() => interrupted?,
    }
    Ok(())
}
