//! Connections as lean as they go, so that the load leaves the CPU to those under it: HTTP/1.1 as discoverd's clients
//! speak it, and gRPC over HTTP/2 as etcd's do; both over mutual TLS.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::{Bytes, BytesMut};
use flynn_api::tls::Identity;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::{Method, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use memchr::memmem;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;

type Body = Full<Bytes>;

async fn tls(identity: &Identity, addr: SocketAddr, protocol: Option<&str>) -> Result<TlsStream<TcpStream>> {
    let mut config = (*identity.client_config()?).clone();
    config.alpn_protocols = protocol
        .map(|protocol| protocol.as_bytes().to_vec())
        .into_iter()
        .collect();
    let stream = TcpStream::connect(addr).await?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from(addr.ip().to_string())?;
    Ok(TlsConnector::from(Arc::new(config)).connect(name, stream).await?)
}

/// A connection to discoverd.
pub(crate) struct Http1 {
    sender: http1::SendRequest<Body>,
    host: String,
}

impl Http1 {
    pub(crate) async fn open(identity: &Identity, addr: SocketAddr) -> Result<Self> {
        let io = TokioIo::new(tls(identity, addr, Some("http/1.1")).await?);
        let (sender, connection) = http1::handshake(io).await?;
        tokio::spawn(connection);
        Ok(Self {
            sender,
            host: addr.to_string(),
        })
    }

    /// The answer's body; the error is what the other side said ([`flynn_api::Error`]).
    pub(crate) async fn call(&mut self, method: Method, path: &str, body: Bytes) -> Result<Bytes> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.host)
            .header("content-type", "application/json")
            .header("accept", "application/json")
            .body(Full::new(body))?;
        self.sender.ready().await?;
        read(path, self.sender.send_request(request).await?).await
    }
}

/// An event stream of discoverd's. Who reads a thousand of them has no time for HTTP: the events are taken out of the bytes
/// as they are, and the sizes of chunks stand between them.
pub(crate) struct Events {
    stream: TlsStream<TcpStream>,
    read: BytesMut,
}

impl Events {
    pub(crate) async fn open(identity: &Identity, addr: SocketAddr, path: &str) -> Result<Self> {
        let mut stream = tls(identity, addr, Some("http/1.1")).await?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: {addr}\r\naccept: text/event-stream\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        stream.flush().await?;
        let mut events = Self {
            stream,
            read: BytesMut::new(),
        };
        let head = events.up_to(b"\r\n\r\n").await?;
        ensure!(
            head.starts_with(b"HTTP/1.1 200 "),
            "{path}: {}",
            String::from_utf8_lossy(&head)
        );
        Ok(events)
    }

    /// The next event. What is before its first line is none of it.
    pub(crate) async fn next(&mut self) -> Result<BytesMut> {
        self.up_to(b"\n\n").await
    }

    async fn up_to(&mut self, end: &[u8]) -> Result<BytesMut> {
        loop {
            if let Some(at) = memmem::find(&self.read, end) {
                return Ok(self.read.split_to(at + end.len()));
            }
            ensure!(
                self.stream.read_buf(&mut self.read).await? > 0,
                "the stream is over"
            );
        }
    }
}

/// A connection to discoverd over which many call at once: HTTP/2, which it takes without being asked before.
#[derive(Clone)]
pub(crate) struct Http2 {
    sender: http2::SendRequest<Body>,
    base: String,
}

impl Http2 {
    pub(crate) async fn open(identity: &Identity, addr: SocketAddr) -> Result<Self> {
        let io = TokioIo::new(tls(identity, addr, None).await?);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
        tokio::spawn(connection);
        Ok(Self {
            sender,
            base: format!("https://{addr}"),
        })
    }

    /// The answer's body; the error is what the other side said ([`flynn_api::Error`]).
    pub(crate) async fn call(&mut self, method: Method, path: &str, body: Bytes) -> Result<Bytes> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("content-type", "application/json")
            .body(Full::new(body))?;
        self.sender.ready().await?;
        read(path, self.sender.send_request(request).await?).await
    }
}

/// The body of an answer of success.
async fn read(path: &str, response: Response<Incoming>) -> Result<Bytes> {
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    if status.is_success() {
        return Ok(body);
    }
    match serde_json::from_slice::<flynn_api::Error>(&body) {
        Ok(said) => Err(anyhow::Error::new(said).context(format!("{path}: {status}"))),
        Err(_) => bail!("{path}: {status}: {}", String::from_utf8_lossy(&body)),
    }
}

/// A connection to etcd, which clients share.
#[derive(Clone)]
pub(crate) struct Grpc {
    sender: http2::SendRequest<Body>,
    base: String,
}

impl Grpc {
    pub(crate) async fn open(identity: &Identity, addr: SocketAddr) -> Result<Self> {
        let io = TokioIo::new(tls(identity, addr, Some("h2")).await?);
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
        tokio::spawn(connection);
        Ok(Self {
            sender,
            base: format!("https://{addr}"),
        })
    }

    /// Calls a method with one message for one message.
    pub(crate) async fn call(&mut self, method: &str, message: &[u8]) -> Result<Bytes> {
        let mut body = Vec::with_capacity(message.len() + 5);
        body.push(0);
        body.extend_from_slice(&u32::try_from(message.len())?.to_be_bytes());
        body.extend_from_slice(message);
        let request = Request::post(format!("{}/etcdserverpb.{method}", self.base))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Full::new(body.into()))?;
        self.sender.ready().await?;
        let answer = self.sender.send_request(request).await?;
        let head = answer.headers().get("grpc-status").cloned();
        let answer = answer.into_body().collect().await?;
        let status = answer
            .trailers()
            .and_then(|trailers| trailers.get("grpc-status"))
            .or(head.as_ref());
        ensure!(
            status.is_some_and(|status| status == "0"),
            "{method}: {:?}",
            answer.trailers()
        );
        let mut bytes = answer.to_bytes();
        ensure!(bytes.len() >= 5, "{method} answered nothing");
        Ok(bytes.split_off(5))
    }
}

/// Adds a field of bytes to a protobuf message.
pub(crate) fn put(message: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    message.push(field << 3 | 2);
    let mut length = bytes.len();
    while length >= 0x80 {
        message.push(length.to_le_bytes()[0] | 0x80);
        length >>= 7;
    }
    message.push(length.to_le_bytes()[0]);
    message.extend_from_slice(bytes);
}

/// A field of a protobuf message.
#[derive(Debug, PartialEq)]
pub(crate) enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The first field of that number.
pub(crate) fn field(mut message: &[u8], wanted: u64) -> Result<Option<Field<'_>>> {
    while !message.is_empty() {
        let key = varint(&mut message)?;
        let value = match key & 7 {
            0 => Field::Number(varint(&mut message)?),
            2 => {
                let length = usize::try_from(varint(&mut message)?)?;
                let (bytes, rest) = message.split_at_checked(length).context("cut short")?;
                message = rest;
                Field::Bytes(bytes)
            }
            other => bail!("wire type {other} is not expected"),
        };
        if key >> 3 == wanted {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// The bytes in a field; none where there is no such field.
pub(crate) fn bytes(message: &[u8], wanted: u64) -> Result<&[u8]> {
    match field(message, wanted)? {
        Some(Field::Bytes(bytes)) => Ok(bytes),
        Some(Field::Number(_)) => bail!("field {wanted} is a number"),
        None => Ok(&[]),
    }
}

/// The number in a field; 0 where there is no such field.
pub(crate) fn number(message: &[u8], wanted: u64) -> Result<u64> {
    match field(message, wanted)? {
        Some(Field::Number(number)) => Ok(number),
        Some(Field::Bytes(_)) => bail!("field {wanted} is no number"),
        None => Ok(0),
    }
}

fn varint(message: &mut &[u8]) -> Result<u64> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first().context("cut short")?;
        *message = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    bail!("a number is too long")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found() {
        let mut inner = Vec::new();
        put(&mut inner, 5, &[7; 300]);
        let mut message = vec![3 << 3, 0xac, 0x02];
        put(&mut message, 2, &inner);
        assert_eq!(number(&message, 3).unwrap(), 300);
        assert_eq!(bytes(bytes(&message, 2).unwrap(), 5).unwrap(), [7; 300]);
        assert_eq!(field(&message, 9).unwrap(), None);
        assert!(bytes(&message[..9], 2).is_err());
    }
}
