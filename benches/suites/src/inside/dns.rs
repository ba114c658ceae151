//! discoverd's name server alone.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;

use flynn_api::discovery::{Instance, LeaderType};
use flynn_discovery::command::Command;
use flynn_discovery::dns::{Server, Upstreams};
use flynn_discovery::view::View;

use crate::dns::{NAMES, address, service};

/// Where to serve.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[arg(long)]
    port: u16,
}

/// Serves until killed.
pub(crate) fn serve(args: &Args) -> anyhow::Result<()> {
    let view = Arc::new(View::default());
    for number in 0..NAMES {
        let service = service(number);
        let create = Command::CreateService {
            service: service.clone(),
            leader_type: LeaderType::Oldest,
        };
        let put = Command::PutInstance {
            service,
            instance: Instance::new("tcp", format!("{}:80", address(number)), flynn_api::Meta::new()).into(),
            member: 1,
        };
        let index = u64::from(number) * 2 + 1;
        view.apply(index, &create);
        view.apply(index + 1, &put);
    }
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, args.port))?;
    // The load comes from one address.
    let server = Server::new(view, Upstreams::default()).client_rate(u64::from(u32::MAX));
    super::runtime()?.block_on(server.serve_udp(socket));
    Ok(())
}
