//! A gate before the database, through which no connection can listen for events while it is shut.

use std::path::{Path, PathBuf};

use flynn_controller::Options;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_postgres::config::Host;

/// PostgreSQL's name for its socket.
const SOCKET: &str = ".s.PGSQL.5432";

/// The gate. It goes with its value.
pub(crate) struct Gate {
    open: watch::Sender<bool>,
    held: watch::Receiver<usize>,
    dir: tempfile::TempDir,
}

impl Gate {
    /// A shut gate on the way of a controller with these options.
    pub(crate) fn before(options: &mut Options) -> Self {
        let Some(Host::Unix(server)) = options.database.get_hosts().first() else {
            panic!("the tests' PostgreSQL listens on a Unix socket");
        };
        let server = server.join(SOCKET);
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join(SOCKET)).unwrap();
        let (open, opened) = watch::channel(false);
        let (hold, held) = watch::channel(0);
        tokio::spawn(keep(listener, server, Way { opened, hold }));
        options.database = to(dir.path(), &options.database);
        Self { open, held, dir }
    }

    /// Lets those that listen pass.
    pub(crate) fn open(&self) {
        self.open.send_replace(true);
    }

    /// Breaks the connections that listen.
    pub(crate) fn shut(&self) {
        self.open.send_replace(false);
    }

    /// Waits until someone is held who would listen.
    pub(crate) async fn holds(&mut self) {
        let held = self.held.wait_for(|held| *held > 0);
        super::soon("someone would listen for events", held)
            .await
            .unwrap();
        assert!(self.dir.path().exists(), "the gate stands");
    }
}

/// The same database, by a socket in this directory.
fn to(dir: &Path, database: &tokio_postgres::Config) -> tokio_postgres::Config {
    let mut config = tokio_postgres::Config::new();
    config
        .host_path(dir)
        .user(database.get_user().unwrap())
        .dbname(database.get_dbname().unwrap());
    config
}

#[derive(Clone)]
struct Way {
    opened: watch::Receiver<bool>,
    hold: watch::Sender<usize>,
}

async fn keep(listener: UnixListener, server: PathBuf, way: Way) {
    while let Ok((client, _)) = listener.accept().await {
        let Ok(server) = UnixStream::connect(&server).await else {
            continue;
        };
        let way = way.clone();
        tokio::spawn(async move {
            let (mut answers, requests) = server.into_split();
            let (from, mut to) = client.into_split();
            // Where one direction ends, the connection does.
            tokio::select! {
                () = forward(from, requests, way) => {}
                _ = tokio::io::copy(&mut answers, &mut to) => {}
            }
        });
    }
}

/// Passes on what the client says. Whoever listens is held until the gate opens, and ends when it shuts.
async fn forward(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut way: Way) {
    let mut buffer = vec![0; 16 << 10];
    let mut listens = false;
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read.unwrap_or(0),
            _ = way.opened.wait_for(|open| !open), if listens => 0,
        };
        let said = &buffer[..read];
        if said.windows(6).any(|word| word == b"LISTEN") {
            listens = true;
            way.hold.send_modify(|held| *held += 1);
            let opened = way.opened.wait_for(|open| *open).await.is_ok();
            way.hold.send_modify(|held| *held -= 1);
            if !opened {
                return;
            }
        }
        if said.is_empty() || to.write_all(said).await.is_err() {
            return;
        }
    }
}
