//! The job's control socket, inside the supervisor.

use std::io;
use std::path::Path;
use std::sync::Arc;

use flynn_api::client::attach::{read_frame, write_frame};
use flynn_api::host::{ExecRequest, TtySize, attach};
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use super::exec::Session;
use super::input::Window;
use super::inside::Inside;
use super::output::{Output, Subscription, TOO_SLOW};
use crate::container::Place;
use crate::control::{Reply, Request, read_line, write_line};
use crate::status::Status;

/// Connections at once. Each is of root on this host or comes through the daemon.
const CONNECTIONS: usize = 64;

/// How many of them may be clients with a stream: who has a word for the job always gets in.
const CLIENTS: usize = 48;

/// What the server asks of the supervisor's loop.
#[derive(Debug)]
pub(super) enum Command {
    Go(Place),
    Stop,
    Signal(i32, oneshot::Sender<Option<String>>),
    Deregister(oneshot::Sender<Option<String>>),
    Pause(bool, oneshot::Sender<Option<String>>),
}

/// What a connection needs.
#[derive(Clone, Debug)]
pub(super) struct Server {
    pub(super) job_dir: Arc<Path>,
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) status: watch::Receiver<Status>,
    pub(super) output: Arc<Output>,
    pub(super) inside: watch::Receiver<Option<Inside>>,
    pub(super) place: watch::Receiver<Place>,
    pub(super) clients: Arc<Semaphore>,
}

impl Server {
    /// Room for clients.
    pub(super) fn clients() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(CLIENTS))
    }

    /// Accepts until the listener fails. `open` is held by each connection, so that the supervisor can wait for them.
    pub(super) async fn run(self, listener: UnixListener, open: mpsc::Sender<()>) {
        let slots = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
                return;
            };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "accept");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (server, open) = (self.clone(), open.clone());
            tokio::spawn(async move {
                if let Err(error) = server.serve(stream).await {
                    tracing::debug!(%error, "control connection");
                }
                drop((slot, open));
            });
        }
    }

    async fn serve(mut self, stream: UnixStream) -> io::Result<()> {
        let mut stream = BufReader::with_capacity(4096, stream);
        let clients = Arc::clone(&self.clients);
        loop {
            let request = match read_line::<Request>(&mut stream).await {
                Ok(Some(request)) => request,
                Ok(None) => return Ok(()),
                // A daemon that is newer would not ask.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    let error = Some(format!("it does not know what is asked ({error})"));
                    return write_line(stream.get_mut(), &Reply { error }).await;
                }
                Err(error) => return Err(error),
            };
            let is_client = matches!(request, Request::Attach { .. } | Request::Exec(_));
            let client = if is_client {
                clients.try_acquire().ok()
            } else {
                None
            };
            let error = match request {
                _ if is_client && client.is_none() => {
                    Some(format!("{CLIENTS} clients are at the job: end one first"))
                }
                Request::Watch => return self.watch(stream).await,
                Request::Attach {
                    stdin,
                    stdout,
                    stderr,
                    tty_size,
                    lines,
                } => {
                    if let Some(size) = tty_size {
                        self.output.resize(size);
                    }
                    let subscription = self.output.subscribe(stdout, stderr, &self.job_dir, lines);
                    write_line(stream.get_mut(), &Reply::default()).await?;
                    return self.attached(stream, subscription, stdin).await;
                }
                Request::Exec(wish) => {
                    let (session, error) = match self.exec(wish) {
                        Ok(session) => (Some(session), None),
                        Err(error) => (None, Some(error)),
                    };
                    write_line(stream.get_mut(), &Reply { error }).await?;
                    match session {
                        Some(session) => return session.carry(stream).await,
                        None => continue,
                    }
                }
                Request::Go(place) => self.send(Command::Go(place)).await,
                Request::Stop => self.send(Command::Stop).await,
                Request::Signal { signal } => self.ask(|reply| Command::Signal(signal, reply)).await,
                Request::Deregister => self.ask(Command::Deregister).await,
                Request::Pause { paused } => self.ask(|reply| Command::Pause(paused, reply)).await,
            };
            write_line(stream.get_mut(), &Reply { error }).await?;
        }
    }

    fn exec(&self, wish: ExecRequest) -> Result<Session, String> {
        let inside = self.inside.borrow().clone();
        let inside = inside.ok_or("the job's program is not running")?;
        if self.status.borrow().paused {
            return Err("the job is paused".into());
        }
        let place = self.place.borrow().clone();
        Session::begin(&inside, &place, wish).map_err(|error| error.to_string())
    }

    async fn send(&self, command: Command) -> Option<String> {
        self.commands
            .send(command)
            .await
            .err()
            .map(|_| "the job is over".to_owned())
    }

    async fn ask(&self, command: impl FnOnce(oneshot::Sender<Option<String>>) -> Command) -> Option<String> {
        let (reply, answer) = oneshot::channel();
        match self.send(command(reply)).await {
            None => answer
                .await
                .unwrap_or_else(|_| Some("the job is over".to_owned())),
            error => error,
        }
    }

    /// Says the status, and each that follows, to who says nothing more.
    async fn watch(&mut self, stream: BufReader<UnixStream>) -> io::Result<()> {
        let (mut read, mut write) = tokio::io::split(stream);
        loop {
            let status = self.status.borrow_and_update().clone();
            write_line(&mut write, &status).await?;
            if status.state.is_terminal() {
                return Ok(());
            }
            tokio::select! {
                changed = self.status.changed() => if changed.is_err() {
                    return Ok(());
                },
                // The end, or who knows what.
                _ = read.read_u8() => return Ok(()),
            }
        }
    }

    /// Carries what the job says to a client, and what that says to the job, until the client closes its side: the end of the
    /// job's input is a frame.
    async fn attached(
        self,
        stream: BufReader<UnixStream>,
        subscription: Subscription,
        stdin: bool,
    ) -> io::Result<()> {
        let (mut read, write) = tokio::io::split(stream);
        let Self { commands, output, .. } = self;
        let told = Arc::clone(&output);
        let window = Window::new();
        let sent = Arc::clone(&window);
        let listen = async move {
            while let Ok(Some(frame)) = read_frame(&mut read).await {
                match frame.kind {
                    // The receiver lives as long as the supervisor.
                    attach::STDIN if stdin => drop(output.stdin.send(sent.piece(frame.payload).await)),
                    attach::RESIZE => {
                        if let Ok(size) = serde_json::from_slice::<TtySize>(&frame.payload) {
                            output.resize(size);
                        }
                    }
                    attach::SIGNAL => {
                        if let Ok(number) = <[u8; 4]>::try_from(frame.payload) {
                            let (reply, _) = oneshot::channel();
                            let _ = commands
                                .send(Command::Signal(i32::from_be_bytes(number), reply))
                                .await;
                        }
                    }
                    _ => {}
                }
            }
        };
        tokio::select! {
            () = listen => Ok(()),
            said = tell(write, subscription, &told, &window) => said,
        }
    }
}

/// Gives a client its share of the output, to the last frame.
async fn tell(
    mut write: impl AsyncWrite + Unpin,
    subscription: Subscription,
    output: &Output,
    window: &Window,
) -> io::Result<()> {
    let Subscription { past, mut queue } = subscription;
    let mut past = past.into_iter();
    loop {
        let next = if let Some(frame) = past.next() {
            Some(frame)
        } else {
            tokio::select! {
                frame = queue.recv() => frame,
                taken = window.taken() => {
                    write_frame(&mut write, taken.kind, &taken.payload).await?;
                    continue;
                }
            }
        };
        let Some(frame) = next else {
            return write_frame(&mut write, attach::ERROR, TOO_SLOW.as_bytes()).await;
        };
        write_frame(&mut write, frame.kind, &frame.payload).await?;
        output.note_written();
        if matches!(frame.kind, attach::EXIT | attach::ERROR) {
            return write.shutdown().await;
        }
    }
}
