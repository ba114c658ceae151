//! Snapshots over the host API: out as a stream, in from one.

use std::io;
use std::pin::pin;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Path, State};
use bytes::{Bytes, BytesMut};
use flynn_api::server::openapi::Octets;
use flynn_api::server::{Json, Query};
use flynn_api::volume::Volume;
use flynn_api::{Error, Result};
use futures::{Stream, StreamExt as _};
use schemars::JsonSchema;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::task::{JoinHandle, block_in_place};
use tokio::time::timeout;

use super::Daemon;
use super::api::Shared;
use super::images::pieces;
use crate::files::disk_error;
use crate::volumes::{Decoder, Encoder, MAX_PIECE, Mover, Part, Receiving};

/// How much of what a program complains of is kept.
const COMPLAINT: u64 = 16 << 10;

/// How long the rest of a snapshot is read that is refused.
const HEAR_OUT: Duration = Duration::from_secs(10);

/// How long nothing may come from a sender, or be taken by the program that receives.
const STALL: Duration = Duration::from_mins(2);

/// How long a program may take to die.
const KILL: Duration = Duration::from_secs(5);

/// After so many bytes the disk is looked at again.
const LOOK: u64 = 16 << 20;

/// A program and what it complains of.
struct Program {
    mover: Mover,
    child: Child,
    complaint: JoinHandle<Vec<u8>>,
}

impl Program {
    fn start(mut mover: Mover, stdin: Stdio, stdout: Stdio) -> Result<Self> {
        let command = std::mem::replace(&mut mover.command, Command::new(""));
        let mut command = tokio::process::Command::from(command);
        let spawned = command
            .env("LC_ALL", "C")
            .stdin(stdin)
            .stdout(stdout)
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn();
        let mut child = spawned.map_err(|error| disk_error("move the snapshot", &mover.missing(&error)))?;
        let stderr = child.stderr.take();
        let complaint = tokio::spawn(async move {
            match stderr {
                Some(stderr) => read_some(stderr).await,
                None => Vec::new(),
            }
        });
        Ok(Self {
            mover,
            child,
            complaint,
        })
    }

    async fn end(&mut self) -> io::Result<()> {
        let status = self.child.wait().await?;
        if status.success() {
            return Ok(());
        }
        let complaint = (&mut self.complaint).await.unwrap_or_default();
        Err(self.mover.failed(&complaint))
    }

    /// Ends it, unless the disk keeps it from that.
    fn kill(&mut self) {
        let _ = self.child.start_kill();
        let begun = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && begun.elapsed() < KILL {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The start of what comes; the rest is read and forgotten, so that its writer is never held up.
async fn read_some(mut from: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut text = Vec::new();
    let _ = (&mut from).take(COMPLAINT).read_to_end(&mut text).await;
    let _ = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
    text
}

#[derive(Deserialize, JsonSchema)]
pub(super) struct SendQuery {
    /// An earlier snapshot that the receiver has: only what differs from it is sent.
    from: Option<String>,
}

struct Sending {
    program: Program,
    stdout: ChildStdout,
    encoder: Encoder,
}

impl Sending {
    async fn next(mut self) -> io::Result<Option<(Bytes, Option<Self>)>> {
        let mut piece = BytesMut::with_capacity(MAX_PIECE);
        while piece.len() < MAX_PIECE {
            let room = (MAX_PIECE - piece.len()) as u64;
            if (&mut self.stdout).take(room).read_buf(&mut piece).await? == 0 {
                break;
            }
        }
        if !piece.is_empty() {
            return Ok(Some((self.encoder.piece(&piece), Some(self))));
        }
        // Without its end the receiver does not take it.
        self.program.end().await?;
        Ok(Some((self.encoder.end(), None)))
    }
}

/// `GET /storage/volumes/{id}/send`
pub(super) async fn send_volume(
    State(daemon): Shared,
    Path(id): Path<String>,
    Query(query): Query<SendQuery>,
) -> Result<Octets> {
    let (header, mover) = block_in_place(|| daemon.volumes.send(&id, query.from.as_deref()))?;
    let mut encoder = Encoder::default();
    let begin = encoder
        .begin(&header)
        .map_err(|error| Error::internal(error.to_string()))?;
    let mut program = Program::start(mover, Stdio::null(), Stdio::piped())?;
    let stdout = program.child.stdout.take();
    let stdout = stdout.ok_or_else(|| Error::internal("the program that sends has no output"))?;
    let sending = Sending {
        program,
        stdout,
        encoder,
    };
    let first = futures::stream::iter([Ok(begin)]);
    let rest = futures::stream::try_unfold(Some(sending), |sending| async move {
        match sending {
            Some(sending) => sending.next().await,
            None => Ok(None),
        }
    });
    let said = rest.inspect(move |piece| {
        if let Err(error) = piece {
            tracing::warn!(volume = id, %error, "a snapshot could not be sent");
        }
    });
    Ok(Octets {
        length: None,
        body: Body::from_stream(first.chain(said)),
    })
}

/// What takes a snapshot in, once its header has come. Nothing is left of it unless it comes to its end.
struct Taking<'a> {
    receiving: Option<Receiving<'a>>,
    program: Program,
    stdin: Option<ChildStdin>,
}

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        if let Some(receiving) = self.receiving.take() {
            // The program first, for it would go on; and what it has written can be much.
            block_in_place(|| {
                self.program.kill();
                drop(receiving);
            });
        }
    }
}

impl<'a> Taking<'a> {
    fn start(receiving: Receiving<'a>) -> Result<Self> {
        let mut program = Program::start(receiving.mover()?, Stdio::piped(), Stdio::null())?;
        let stdin = program.child.stdin.take();
        Ok(Self {
            receiving: Some(receiving),
            program,
            stdin,
        })
    }

    /// Its program has all; what it complains of is why it did not take something.
    async fn end(mut self) -> Result<Receiving<'a>> {
        drop(self.stdin.take());
        let ended = timeout(STALL, self.program.end()).await.map_err(|_| stuck())?;
        ended.map_err(|error| disk_error("receive the snapshot", &error))?;
        self.receiving.take().ok_or_else(gone)
    }

    /// What takes it in.
    fn receiving(&self) -> Result<&Receiving<'a>> {
        self.receiving.as_ref().ok_or_else(gone)
    }

    /// Hands a piece to the program; false when that takes no more.
    async fn write(&mut self, piece: &[u8]) -> Result<bool> {
        let stdin = self.stdin.as_mut().ok_or_else(gone)?;
        let written = timeout(STALL, stdin.write_all(piece)).await;
        Ok(written.map_err(|_| stuck())?.is_ok())
    }
}

fn gone() -> Error {
    Error::internal("the snapshot is not received any more")
}

fn stuck() -> Error {
    let why = format!(
        "the disk has taken nothing for {} s, and the snapshot is not received: see how it does (dmesg), then send \
         again",
        STALL.as_secs()
    );
    Error::unavailable(why)
}

/// `POST /storage/providers/{id}/receive`
pub(super) async fn receive_volume(
    State(daemon): Shared,
    Path(provider): Path<String>,
    body: Body,
) -> Result<Json<Volume>> {
    let mut body = pin!(pieces(body));
    let volume = take(&daemon, &provider, &mut body).await;
    if volume.is_err() {
        // Whoever still writes would not read why it was refused.
        let rest = async { while let Some(Ok(_)) = body.next().await {} };
        let _ = timeout(HEAR_OUT, rest).await;
    }
    volume.map(Json)
}

async fn take<E: std::fmt::Display>(
    daemon: &Daemon,
    provider: &str,
    mut body: impl Stream<Item = std::result::Result<Bytes, E>> + Unpin,
) -> Result<Volume> {
    let mut decoder = Decoder::default();
    let mut taking: Option<Taking<'_>> = None;
    let (mut is_start, mut unseen) = (true, 0);
    loop {
        let stalled = |_| {
            Error::unavailable(format!(
                "the sender has sent nothing for {} s: send the snapshot again",
                STALL.as_secs()
            ))
        };
        let Some(bytes) = timeout(STALL, body.next()).await.map_err(stalled)? else {
            break;
        };
        let bytes =
            bytes.map_err(|error| Error::validation(format!("the snapshot was cut short: {error}")))?;
        decoder.push(&bytes);
        while let Some(part) = decoder.part()? {
            match (part, &mut taking) {
                (Part::Header(header), _) => {
                    let receiving = block_in_place(|| {
                        let receiving = daemon.volumes.receive(provider, &header)?;
                        receiving.check_room()?;
                        Ok::<_, Error>(receiving)
                    })?;
                    taking = Some(Taking::start(receiving)?);
                }
                (Part::Piece(piece), Some(there)) => {
                    if std::mem::take(&mut is_start) {
                        there.receiving()?.check_start(&piece)?;
                    }
                    unseen += piece.len() as u64;
                    if unseen >= LOOK {
                        unseen = 0;
                        block_in_place(|| there.receiving()?.check_room())?;
                    }
                    if !there.write(&piece).await?
                        && let Some(taking) = taking.take()
                    {
                        let receiving = taking.end().await?;
                        block_in_place(|| drop(receiving));
                        return Err(Error::validation(
                            "what was sent goes on after the snapshot's end",
                        ));
                    }
                }
                (Part::Piece(_) | Part::End, _) => {}
            }
        }
    }
    decoder.finish()?;
    let taking = taking.ok_or_else(|| Error::validation("nothing was sent"))?;
    let receiving = taking.end().await?;
    block_in_place(|| receiving.finish())
}
