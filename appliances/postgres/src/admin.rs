//! The administrator's connection, over the Unix socket.

use std::path::PathBuf;
use std::time::Duration;

use flynn_api::sirenia::DatabaseStatus;
use postgres_protocol::password;
use tokio::time::timeout;
use tokio_postgres::{Client, NoTls};

use crate::Error;
use crate::config::ADMIN;

/// How long a question may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where the server is reached.
#[derive(Clone, Debug)]
pub(crate) struct Admin {
    pub(crate) sockets: PathBuf,
    pub(crate) port: u16,
}

impl Admin {
    /// Connects to a database.
    pub(crate) async fn connect(&self, database: &str) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::Config::new()
            .host_path(&self.sockets)
            .port(self.port)
            .user(ADMIN)
            .dbname(database)
            .application_name("flynn-postgres")
            .connect_timeout(PATIENCE)
            .connect(NoTls)
            .await?;
        // It ends with the client; what it has to say the client's calls say as well.
        tokio::spawn(connection);
        Ok(client)
    }

    /// Sees that the administrator has this password and a database.
    pub(crate) async fn set_up(&self, password: &str) -> Result<(), Error> {
        let client = self.connect("postgres").await?;
        // The server quotes the verifier, and keeps a statement that fails out of its log.
        client
            .batch_execute("SET log_min_error_statement = panic")
            .await?;
        let verifier = password::scram_sha_256(password.as_bytes());
        let statement = "SELECT format('ALTER ROLE %I PASSWORD %L', $1::text, $2::text)";
        let row = client.query_one(statement, &[&ADMIN, &verifier]).await?;
        client.batch_execute(row.get(0)).await?;
        let there = "SELECT 1 FROM pg_database WHERE datname = $1";
        if client.query_opt(there, &[&ADMIN]).await?.is_none() {
            let row = client
                .query_one("SELECT format('CREATE DATABASE %I', $1::text)", &[&ADMIN])
                .await?;
            client.batch_execute(row.get(0)).await?;
        }
        Ok(())
    }

    /// What the server says of itself.
    pub(crate) async fn status(&self) -> Result<DatabaseStatus, String> {
        let ask = async {
            let client = self.connect(ADMIN).await?;
            let statement = "SELECT pg_is_in_recovery(), current_setting('default_transaction_read_only') = 'on', \
                             CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() \
                                  ELSE pg_current_wal_lsn() END::text";
            let row = client.query_one(statement, &[]).await?;
            let (recovering, read_only): (bool, bool) = (row.try_get(0)?, row.try_get(1)?);
            Ok(DatabaseStatus {
                running: true,
                user_exists: true,
                read_write: !recovering && !read_only,
                xlog: row.try_get::<_, Option<String>>(2)?.unwrap_or_default(),
                error: None,
            })
        };
        let answer: Result<_, tokio_postgres::Error> = timeout(PATIENCE, ask)
            .await
            .map_err(|_| format!("the database has not answered within {} s", PATIENCE.as_secs()))?;
        answer.map_err(|error| {
            error
                .as_db_error()
                .map_or_else(|| error.to_string(), ToString::to_string)
        })
    }
}
