//! `flynn port-forward`.

use std::net::IpAddr;

use clap::Args;
use flynn_api::client::forward::{self, Ports};
use flynn_api::host::ForwardRequest;
use futures::future::try_join_all;
use tokio::net::TcpListener;

use crate::context::Context;
use crate::failure::{Result, local};
use crate::output;

#[derive(Args)]
pub(super) struct PortForward {
    /// Where to listen
    #[arg(long, default_value = "127.0.0.1")]
    address: IpAddr,
    /// A job's id, as `flynn ps` lists it, or a process type: then it is one of its jobs
    job: String,
    /// PORT, or LOCAL:REMOTE; LOCAL 0 is any that is free
    #[arg(required = true)]
    ports: Vec<Ports>,
}

impl PortForward {
    /// Forwards until it is interrupted.
    pub(super) async fn run(self, context: &Context) -> Result<()> {
        let target = context.target().await?;
        let job = target.running_job(self.job).await?;
        let mut serving = Vec::new();
        for ports in self.ports {
            let failed = |why| local(format!("cannot listen on {}:{}", self.address, ports.local), &why);
            let listener = TcpListener::bind((self.address, ports.local))
                .await
                .map_err(failed)?;
            let address = listener.local_addr().map_err(failed)?;
            output::line(format!("{address} leads to port {} of {job}", ports.remote))?;
            let (controller, app, job) = (target.controller.clone(), target.app.id.clone(), job.clone());
            let request = ForwardRequest {
                port: ports.remote.get(),
            };
            let connect = move || {
                let (controller, app, job) = (controller.clone(), app.clone(), job.clone());
                async move { controller.forward(&app, &job, &request).await }
            };
            serving.push(forward::serve(listener, connect, |error| {
                output::note(error.to_string());
            }));
        }
        let failed = |why| local("no more connections can be taken", &why);
        tokio::select! {
            served = try_join_all(serving) => drop(served.map_err(failed)?),
            interrupted = tokio::signal::ctrl_c() => interrupted.map_err(failed)?,
        }
        Ok(())
    }
}
