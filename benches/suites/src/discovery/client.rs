//! A client of either: writes and reads one register, one call at a time.

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use hyper::Method;
use serde::Deserialize;

use super::wire::{self, Grpc, Http1};

/// Bytes of a value.
pub(crate) const VALUE: usize = 256;

/// A client with a register of its own.
pub(crate) enum Client {
    /// The metadata of a service, by compare-and-swap from the index that the last write had.
    Ours {
        connection: Http1,
        service: String,
        index: u64,
    },
    /// A key.
    Etcd { connection: Grpc, key: String },
}

#[derive(Deserialize)]
struct Meta {
    data: String,
    index: u64,
}

/// What is written the `n`th time.
pub(crate) fn value(n: u64) -> String {
    format!("{n:0VALUE$}")
}

impl Client {
    /// The register must be there before it is written to.
    pub(crate) async fn make(&mut self) -> Result<()> {
        if let Self::Ours {
            connection, service, ..
        } = self
        {
            let body = Bytes::from_static(br#"{"leader_type":"oldest"}"#);
            connection
                .call(Method::PUT, &format!("/services/{service}"), body)
                .await?;
        }
        Ok(())
    }

    /// Writes the value of the `n`th time.
    pub(crate) async fn write(&mut self, n: u64) -> Result<()> {
        match self {
            Self::Ours {
                connection,
                service,
                index,
            } => {
                let path = format!("/services/{service}/meta");
                let body = format!(r#"{{"data":"{}","index":{index}}}"#, value(n));
                let answer = connection.call(Method::PUT, &path, body.into()).await?;
                let meta: Meta = serde_json::from_slice(&answer)?;
                ensure!(meta.index > *index, "a write without an index of its own");
                *index = meta.index;
            }
            Self::Etcd { connection, key } => {
                let mut message = Vec::with_capacity(VALUE + 32);
                wire::put(&mut message, 1, key.as_bytes());
                wire::put(&mut message, 2, value(n).as_bytes());
                let answer = connection.call("KV/Put", &message).await?;
                ensure!(
                    wire::number(wire::bytes(&answer, 1)?, 3)? > 0,
                    "a write without a revision"
                );
            }
        }
        Ok(())
    }

    /// Reads it, linearizably.
    pub(crate) async fn read(&mut self) -> Result<String> {
        match self {
            Self::Ours {
                connection, service, ..
            } => {
                let path = format!("/services/{service}/meta");
                let answer = connection.call(Method::GET, &path, Bytes::new()).await?;
                Ok(serde_json::from_slice::<Meta>(&answer)?.data)
            }
            Self::Etcd { connection, key } => {
                let mut message = Vec::new();
                wire::put(&mut message, 1, key.as_bytes());
                let answer = connection.call("KV/Range", &message).await?;
                let value = wire::bytes(wire::bytes(&answer, 2)?, 5)?;
                String::from_utf8(value.to_vec()).context("not what was written")
            }
        }
    }
}
