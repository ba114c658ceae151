//! A job at this process's terminal.

use std::io;
use std::process::ExitCode;

use flynn_api::client::Upgraded;
use flynn_api::client::terminal::{self, End};
use flynn_api::{Error, ErrorCode};

use crate::failure::{Failure, Result, local};

/// Connects this process's streams to a job's until it ends, and ends as it did.
pub(crate) async fn run(connection: Upgraded, tty: bool) -> Result<ExitCode> {
    let end = terminal::run(connection, tty)
        .await
        .map_err(|why| match why.kind() {
            io::ErrorKind::BrokenPipe => Failure::Pipe,
            _ => local("the terminal cannot be used", &why),
        })?;
    match end {
        End::Exited(status) => Ok(ExitCode::from(u8::try_from(status).unwrap_or(255))),
        End::Failed(why) => Err(Error::internal(format!("the job could not be run: {why}")).into()),
        End::Lost(why) => {
            let why = why.map_or(String::new(), |why| format!(": {why}"));
            let message = format!(
                "the connection to the job was lost{why}. It may still run: flynn ps; stop it with flynn kill"
            );
            Err(Error::new(ErrorCode::Unavailable, message).into())
        }
    }
}
