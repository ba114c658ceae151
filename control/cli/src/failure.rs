//! Why a command did not do what it was asked for.

use std::fmt;
use std::io;
use std::process::ExitCode;

use flynn_api::{Error, ErrorCode};

/// What a command comes to.
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

/// Why a command ends early.
#[derive(Debug)]
pub(crate) enum Failure {
    /// With an error for the user.
    Error(Error),
    /// Standard output was closed.
    Pipe,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// The input is wrong: a failure with this message.
pub(crate) fn usage(message: impl Into<String>) -> Failure {
    Error::validation(message).into()
}

/// Something on this machine failed.
pub(crate) fn local(what: impl fmt::Display, why: &io::Error) -> Failure {
    if why.kind() == io::ErrorKind::NotFound {
        return Error::new(ErrorCode::NotFound, format!("{what}: there is no such file")).into();
    }
    Error::internal(format!("{what}: {why}")).into()
}

/// The exit status that goes with a code.
pub(crate) fn exit_code(code: ErrorCode) -> ExitCode {
    ExitCode::from(match code {
        ErrorCode::Validation | ErrorCode::LimitExceeded => 2,
        ErrorCode::NotFound | ErrorCode::Gone => 3,
        ErrorCode::Unauthorized | ErrorCode::Forbidden => 4,
        ErrorCode::ObjectExists | ErrorCode::Conflict | ErrorCode::PreconditionFailed => 5,
        // EX_TEMPFAIL of sysexits.h.
        ErrorCode::Unavailable | ErrorCode::Timeout => 75,
        ErrorCode::Internal => 1,
    })
}

/// Adds what to do next to an error of one kind.
pub(crate) fn advise(code: ErrorCode, advice: &'static str) -> impl Fn(Error) -> Error {
    move |mut error| {
        if error.code == code {
            error.message = format!("{}. {advice}", error.message.trim_end_matches('.'));
        }
        error
    }
}
