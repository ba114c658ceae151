//! Brings files in from outside: piece by piece, going on where an earlier run was cut off, and known to be the right
//! ones before anybody gets to see them.
//!
//! In: where bytes come from, and what they must be. Out: a file on the disk, whole and checked.
//! - What has come stays in the part, whoever is killed: the next download goes on behind it.
//! - A part is not believed: all of it is hashed, and thrown away once where the whole is not what it must be.
//! - No more is taken than the file has. A server that says nothing for a while is left, one that is merely slow is not.

mod part;

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use flynn_api::digest::Digester;
use flynn_api::{Digest, Error, ErrorCode, Result};
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use http::StatusCode;
use http::header::CONTENT_RANGE;
use http_body::Body as _;
use sha2::Digest as _;
use tokio::time::{sleep, timeout};

pub(crate) use part::Part;

/// Attempts that bring nothing, one after the other.
const FRUITLESS: u32 = 5;

/// Attempts in all.
const ATTEMPTS: u32 = 50;

/// The longest pause between two of them.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// What a file must be.
#[derive(Clone, Debug)]
pub struct Expected {
    /// What it is called in messages: `layer 53048e…`.
    pub what: String,
    /// Bytes.
    pub length: u64,
    /// The hash of all of them.
    pub hash: Hash,
}

/// A file's hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    /// As everything immutable here is named.
    Sha512_256(Digest),
    /// As TUF has it.
    Sha256([u8; 32]),
}

/// Bytes from a source.
pub struct Opened {
    /// Where in the file they begin: where it was asked for, or 0 at a server that cannot begin elsewhere.
    pub start: u64,
    /// How long the whole file is, where the source says so.
    pub length: Option<u64>,
    /// The bytes.
    pub body: BoxStream<'static, Result<Bytes>>,
}

/// Opens a source, from a byte on; it is told as well how often it was asked before.
pub trait Open<'a>: Fn(u64, u32) -> BoxFuture<'a, Result<Opened>> {}

impl<'a, F: Fn(u64, u32) -> BoxFuture<'a, Result<Opened>>> Open<'a> for F {}

/// What opens a source by a function. (The future of an async closure is not known to be `Send`.)
pub fn opener<'a, F: Future<Output = Result<Opened>> + Send + 'a>(
    open: impl Fn(u64, u32) -> F,
) -> impl Open<'a> {
    move |from, attempt| open(from, attempt).boxed()
}

/// How long a server may say nothing, and how long the first pause between attempts is.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Without a byte.
    pub idle: Duration,
    /// After the first failure; twice as long after each further one.
    pub pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(30),
            pause: Duration::from_millis(200),
        }
    }
}

/// The hash of bytes that come in pieces.
enum Hasher {
    Sha512_256(Digester),
    Sha256(sha2::Sha256),
}

impl Hasher {
    fn new(hash: Hash) -> Self {
        match hash {
            Hash::Sha512_256(_) => Self::Sha512_256(Digester::default()),
            Hash::Sha256(_) => Self::Sha256(sha2::Sha256::default()),
        }
    }

    fn update(&mut self, piece: &[u8]) {
        match self {
            Self::Sha512_256(digester) => digester.update(piece),
            Self::Sha256(state) => sha2::Digest::update(state, piece),
        }
    }

    fn finish(self) -> Hash {
        match self {
            Self::Sha512_256(digester) => Hash::Sha512_256(digester.finish()),
            Self::Sha256(state) => Hash::Sha256(state.finalize().into()),
        }
    }
}

/// Why an attempt failed.
enum Failure {
    /// Another may do better.
    Passing(Error),
    /// None will.
    Final(Error),
}

/// Fills a part with what `open` gives, from the byte on that it is asked for, until it is what it must be.
/// `progress` hears how many bytes are there.
pub(crate) async fn fill(
    part: &mut Part,
    expected: &Expected,
    patience: Patience,
    open: impl Open<'_>,
    progress: impl Fn(u64),
) -> Result<()> {
    let filled = attempts(part, expected, patience, open, progress).await;
    if filled.is_err() {
        part.remove_empty();
    }
    filled
}

async fn attempts(
    part: &mut Part,
    expected: &Expected,
    patience: Patience,
    open: impl Open<'_>,
    progress: impl Fn(u64),
) -> Result<()> {
    part.read(expected).await?;
    // Of several pieces of different files the whole is none: then it is fetched once more, in one piece.
    let mut pieces = u32::from(part.length() > 0);
    let (mut attempts, mut fruitless) = (0, 0);
    loop {
        let before = part.length();
        progress(before);
        let attempt = async {
            if part.length() == expected.length {
                return Ok(());
            }
            pieces += 1;
            once(part, expected, patience.idle, attempts, &open, &progress).await
        };
        match attempt.await {
            Ok(()) => match part.check(expected).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    part.empty(expected).await?;
                    if pieces <= 1 {
                        return Err(error);
                    }
                    tracing::warn!(%error, "fetching it once more, from the beginning");
                    pieces = 0;
                }
            },
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Passing(error)) => {
                attempts += 1;
                fruitless = if part.length() > before { 0 } else { fruitless + 1 };
                if fruitless >= FRUITLESS || attempts >= ATTEMPTS {
                    return Err(error);
                }
                tracing::debug!(%error, length = part.length(), "going on after a pause");
                sleep((patience.pause * 2_u32.pow(fruitless)).min(LONGEST_PAUSE)).await;
            }
        }
    }
}

async fn once(
    part: &mut Part,
    expected: &Expected,
    idle: Duration,
    attempts: u32,
    open: &impl Open<'_>,
    progress: &impl Fn(u64),
) -> Result<(), Failure> {
    let what = &expected.what;
    let silent = |length: u64| {
        Failure::Passing(Error::new(
            ErrorCode::Timeout,
            format!(
                "{what}: the server has said nothing for {} s ({length} of {} bytes came); what came is kept: try again later",
                idle.as_secs_f32(),
                expected.length
            ),
        ))
    };
    let opened = match timeout(idle, open(part.length(), attempts)).await {
        Err(_) => return Err(silent(part.length())),
        Ok(Err(error)) => return Err(judge(error)),
        Ok(Ok(opened)) => opened,
    };
    if let Some(length) = opened.length.filter(|length| *length != expected.length) {
        part.empty(expected).await.map_err(Failure::Final)?;
        return Err(Failure::Final(Error::validation(format!(
            "{what} has {length} bytes where it comes from, and must have {}: it is another file",
            expected.length
        ))));
    }
    if opened.start != part.length() {
        if opened.start != 0 {
            return Err(Failure::Final(Error::validation(format!(
                "{what}: the server sends from byte {} on where {} was asked for",
                opened.start,
                part.length()
            ))));
        }
        part.empty(expected).await.map_err(Failure::Final)?;
    }
    let mut body = opened.body;
    while part.length() < expected.length {
        let piece = match timeout(idle, body.next()).await {
            Err(_) => return Err(silent(part.length())),
            Ok(None) => break,
            Ok(Some(piece)) => piece.map_err(|error| Failure::Passing(cut_short(part, expected, &error)))?,
        };
        if part.length() + piece.len() as u64 > expected.length {
            part.empty(expected).await.map_err(Failure::Final)?;
            return Err(Failure::Final(Error::new(
                ErrorCode::LimitExceeded,
                format!(
                    "{what} is longer than the {} bytes that it must have: it is another file",
                    expected.length
                ),
            )));
        }
        part.write(&piece, expected).await.map_err(Failure::Final)?;
        progress(part.length());
    }
    if part.length() < expected.length {
        return Err(Failure::Passing(cut_short(part, expected, &"the server ended")));
    }
    Ok(())
}

/// Whether it is worth asking again.
fn judge(error: Error) -> Failure {
    match error.code {
        ErrorCode::Unavailable | ErrorCode::Timeout | ErrorCode::Internal => Failure::Passing(error),
        _ => Failure::Final(error),
    }
}

fn cut_short(part: &Part, expected: &Expected, why: &dyn std::fmt::Display) -> Error {
    Error::unavailable(format!(
        "{} was cut short after {} of {} bytes ({why}); what came is kept: try again",
        expected.what,
        part.length(),
        expected.length
    ))
}

/// What an answer to a request for a file, or for a part of it, brings.
pub fn opened(response: http::Response<hyper::body::Incoming>) -> Result<Opened> {
    let (start, length) = match response.status() {
        StatusCode::OK => (0, response.body().size_hint().exact()),
        StatusCode::PARTIAL_CONTENT => {
            let range = response.headers().get(CONTENT_RANGE);
            let range = range.and_then(|range| content_range(range.to_str().ok()?));
            range.ok_or_else(|| {
                Error::internal("the server sends a part of the file and does not say which")
            })?
        }
        other => {
            return Err(Error::validation(format!(
                "the server answers {other} where a file was asked for"
            )));
        }
    };
    let body = http_body_util::BodyDataStream::new(response.into_body());
    let body = body.map(|piece| piece.map_err(|error| Error::unavailable(error.to_string())));
    Ok(Opened {
        start,
        length,
        body: body.boxed(),
    })
}

/// The first byte of a `Content-Range`, and the length of the whole where that is known: `bytes 5-9/10`.
fn content_range(header: &str) -> Option<(u64, Option<u64>)> {
    let (first, rest) = header.trim().strip_prefix("bytes ")?.trim().split_once('-')?;
    let (last, length) = rest.split_once('/')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let length: Option<u64> = match length {
        "*" => None,
        length => Some(length.parse().ok()?),
    };
    (first <= last && length.is_none_or(|length| last < length)).then_some((first, length))
}

/// A file of this machine, from a byte on.
pub async fn open_file(path: &Path, from: u64) -> Result<Opened> {
    use tokio::io::AsyncSeekExt as _;
    let failed = |error: std::io::Error| {
        let message = format!("cannot read {}: {error}", path.display());
        match error.kind() {
            std::io::ErrorKind::NotFound => Error::new(ErrorCode::NotFound, message),
            _ => Error::validation(message),
        }
    };
    let mut file = tokio::fs::File::open(path).await.map_err(failed)?;
    let length = file.metadata().await.map_err(failed)?.len();
    file.seek(std::io::SeekFrom::Start(from)).await.map_err(failed)?;
    let body = tokio_util::io::ReaderStream::with_capacity(file, 256 << 10);
    let body = body.map(|piece| piece.map_err(|error| Error::unavailable(error.to_string())));
    Ok(Opened {
        start: from,
        length: Some(length),
        body: body.boxed(),
    })
}

#[cfg(test)]
mod tests;
