//! A server of files on loopback that does what servers do at their worst.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// What it does to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Closes the connection after so many bytes.
    Cut(usize),
    /// Says nothing more after so many bytes.
    Stall(usize),
    /// Does not stop sending.
    Endless,
    /// Sends all of it, whatever was asked for.
    NoRanges,
    /// Answers with this status.
    Status(u16),
}

#[derive(Default)]
struct State {
    dir: PathBuf,
    faults: Vec<(String, Fault, u32)>,
    requests: Vec<(String, u64)>,
}

/// The server; it ends with this.
pub(crate) struct Server {
    pub(crate) url: String,
    state: Arc<Mutex<State>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// Serves the files below `dir`.
    pub(crate) async fn start(dir: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State {
            dir: dir.to_owned(),
            ..State::default()
        }));
        let served = Arc::clone(&state);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(Arc::clone(&served), stream));
            }
        });
        Self { url, state, task }
    }

    /// Serves other files from now on.
    pub(crate) fn serve(&self, dir: &Path) {
        dir.clone_into(&mut self.state.lock().unwrap().dir);
    }

    /// Does this to so many requests for what has `path` in its path.
    pub(crate) fn fault(&self, path: &str, fault: Fault, times: u32) {
        let mut state = self.state.lock().unwrap();
        state.faults.retain(|(other, ..)| other != path);
        state.faults.push((path.into(), fault, times));
    }

    /// What was asked for, and from which byte on.
    pub(crate) fn requests(&self) -> Vec<(String, u64)> {
        self.state.lock().unwrap().requests.clone()
    }
}

async fn serve(state: Arc<Mutex<State>>, mut stream: TcpStream) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let path = head.split(' ').nth(1).unwrap().trim_start_matches('/').to_owned();
    let header = |line: &str| {
        let line = line.to_ascii_lowercase();
        line.strip_prefix("range: bytes=")?
            .trim_end_matches('-')
            .parse()
            .ok()
    };
    let from: u64 = head.lines().find_map(header).unwrap_or(0);
    let (fault, file) = {
        let mut state = state.lock().unwrap();
        state.requests.push((path.clone(), from));
        let file = fs::read(state.dir.join(&path)).ok();
        let fault = state
            .faults
            .iter_mut()
            .find(|(name, _, times)| *times > 0 && path.contains(name.as_str()));
        let fault = fault.map_or(Fault::None, |(_, fault, times)| {
            *times -= 1;
            *fault
        });
        (fault, file)
    };
    // Who hangs up has had enough.
    let _ = answer(&mut stream, fault, file, from).await;
}

async fn answer(
    stream: &mut TcpStream,
    fault: Fault,
    file: Option<Vec<u8>>,
    from: u64,
) -> std::io::Result<()> {
    let Some(file) = file.filter(|_| !matches!(fault, Fault::Status(_))) else {
        let status = if let Fault::Status(status) = fault {
            status
        } else {
            404
        };
        let head = format!("HTTP/1.1 {status} No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        return stream.write_all(head.as_bytes()).await;
    };
    if fault == Fault::Endless {
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
            .await?;
        loop {
            stream.write_all(&[b'{'; 4096]).await?;
        }
    }
    let from = if fault == Fault::NoRanges {
        0
    } else {
        usize::try_from(from).unwrap()
    };
    let Some(rest) = file.get(from..) else {
        let head = "HTTP/1.1 416 No\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        return stream.write_all(head.as_bytes()).await;
    };
    let status = match from {
        0 => "200 OK".to_owned(),
        _ => format!(
            "206 Part\r\ncontent-range: bytes {from}-{}/{}",
            file.len() - 1,
            file.len()
        ),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        rest.len()
    );
    stream.write_all(head.as_bytes()).await?;
    let sent = match fault {
        Fault::Cut(bytes) | Fault::Stall(bytes) => &rest[..bytes.min(rest.len())],
        _ => rest,
    };
    stream.write_all(sent).await?;
    if let Fault::Stall(_) = fault {
        // Until the other side hangs up.
        while stream.read(&mut [0]).await? > 0 {}
    }
    stream.shutdown().await
}
