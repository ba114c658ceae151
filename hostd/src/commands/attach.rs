//! A job at this process's terminal.

use std::process::ExitCode;

use anyhow::{Context as _, anyhow, bail};
use flynn_api::client::Upgraded;
use flynn_api::client::terminal::{self, End};

/// Carries this process's standard streams and signals until the job is over; ends as that did.
pub(super) async fn attach(stream: Upgraded, tty: bool) -> anyhow::Result<ExitCode> {
    match terminal::run(stream, tty).await? {
        End::Exited(status) => Ok(ExitCode::from(u8::try_from(status).unwrap_or(255))),
        End::Failed(why) => bail!(why),
        End::Lost(why) => {
            let cut = "the connection to the job was cut; it may run on: see flynn-host ps";
            match why {
                Some(why) => Err(why).context(cut),
                None => Err(anyhow!(cut)),
            }
        }
    }
}
