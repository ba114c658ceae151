//! The server's configuration files, written anew before each start.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use crate::Error;
use crate::user::User;

/// The name of the administrator's role and database.
pub(crate) const ADMIN: &str = "flynn";

/// Sized for small hosts. Everything else is PostgreSQL's default.
const SETTINGS: &str = "\
# Written before each start. ALTER SYSTEM overrides it.
unix_socket_permissions = 0700
max_connections = 100
superuser_reserved_connections = 5
password_encryption = scram-sha-256
shared_buffers = 32MB
work_mem = 4MB
maintenance_work_mem = 32MB
effective_cache_size = 128MB
huge_pages = off
jit = off
max_worker_processes = 4
max_parallel_workers = 2
autovacuum_max_workers = 2
wal_level = replica
max_wal_size = 256MB
min_wal_size = 80MB
fsync = on
synchronous_commit = on
full_page_writes = on
wal_log_hints = on
timezone = 'UTC'
log_timezone = 'UTC'
log_destination = 'stderr'
logging_collector = off
log_line_prefix = '[%p] %q%u@%d '
log_checkpoints = off
log_statement = 'none'
";

/// Who may log in, and how: our own user as the administrator over the Unix socket, everybody else by password.
const ACCESS: &str = "\
local all flynn peer map=keeper
local all all scram-sha-256
host all all all scram-sha-256
";

/// Writes the files into the database directory.
pub(crate) fn write(database: &Path, sockets: &Path, address: SocketAddr, user: &User) -> Result<(), Error> {
    let settings = format!(
        "{SETTINGS}listen_addresses = '{}'\nport = {}\nunix_socket_directories = {}\n",
        address.ip(),
        address.port(),
        quote(sockets)
    );
    let users = format!("keeper \"{}\" {ADMIN}\n", user.own_name);
    let files = [
        ("postgresql.conf", settings.as_str()),
        ("pg_hba.conf", ACCESS),
        ("pg_ident.conf", users.as_str()),
    ];
    for (name, text) in files {
        let path = database.join(name);
        let new = database.join(format!("{name}.new"));
        fs::write(&new, text).map_err(Error::file("cannot write", &new))?;
        user.own(&new)?;
        fs::rename(&new, &path).map_err(Error::file("cannot replace", &path))?;
    }
    Ok(())
}

/// A path as a value of `postgresql.conf`.
fn quote(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_quoted() {
        assert_eq!(quote(Path::new("/it's/run")), "'/it''s/run'");
    }
}
