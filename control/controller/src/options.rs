//! The configuration, from the environment alone.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context as _, bail};

/// Where system jobs find their certificate.
const TLS_DIR: &str = "/etc/flynn/tls";

/// How a controller runs.
#[derive(Clone)]
pub struct Options {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Keys that let a caller in.
    pub keys: Vec<String>,
    /// The database.
    pub database: tokio_postgres::Config,
    /// The domain below which new apps get their first route; none get one without it.
    pub default_route_domain: Option<String>,
    /// The URL of discoverd.
    pub discoverd: String,
    /// The directory of the certificate that is shown to hosts, and of the cluster CA.
    pub tls: PathBuf,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("listen", &self.listen)
            .finish_non_exhaustive()
    }
}

impl Options {
    /// From `PORT`, `AUTH_KEY`, `DATABASE_URL` or `PGHOST`…, `DEFAULT_ROUTE_DOMAIN` and `DISCOVERD`.
    pub fn from_env() -> anyhow::Result<Self> {
        Self::from_vars(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> anyhow::Result<Self> {
        let port = var("PORT").map_or(Ok(80), |port| port.parse());
        let port: u16 = port.context("PORT must be a port number")?;
        let keys: Vec<_> = var("AUTH_KEY")
            .unwrap_or_default()
            .split(',')
            .map(|key| key.trim().to_owned())
            .filter(|key| !key.is_empty())
            .collect();
        if keys.is_empty() {
            bail!(
                "AUTH_KEY is missing: set it to the cluster's key (several, comma-separated, while rotating)"
            );
        }
        let default_route_domain = match var("DEFAULT_ROUTE_DOMAIN") {
            None => None,
            Some(domain) => {
                let domain = crate::rules::route::domain(&domain).context("DEFAULT_ROUTE_DOMAIN")?;
                if domain.starts_with('*') {
                    bail!("DEFAULT_ROUTE_DOMAIN must be a domain, not a wildcard");
                }
                Some(domain)
            }
        };
        Ok(Self {
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
            keys,
            database: database(&var)?,
            default_route_domain,
            discoverd: var("DISCOVERD")
                .context("DISCOVERD is missing: the host sets it to discoverd's URL")?,
            tls: PathBuf::from(TLS_DIR),
        })
    }
}

fn database(var: &impl Fn(&str) -> Option<String>) -> anyhow::Result<tokio_postgres::Config> {
    if let Some(url) = var("DATABASE_URL") {
        // The parser's words may quote the URL, which holds the password.
        return url.parse().map_err(|_| {
            anyhow::anyhow!("DATABASE_URL cannot be read: postgres://user:password@host/database")
        });
    }
    let mut config = tokio_postgres::Config::new();
    config.host(var("PGHOST").context("DATABASE_URL or PGHOST is missing: set one to reach PostgreSQL")?);
    if let Some(port) = var("PGPORT") {
        config.port(port.parse().context("PGPORT must be a port number")?);
    }
    config.user(var("PGUSER").unwrap_or_else(|| "flynn".into()));
    config.dbname(var("PGDATABASE").unwrap_or_else(|| "controller".into()));
    if let Some(password) = var("PGPASSWORD") {
        config.password(password);
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> anyhow::Result<Options> {
        let find = |name: &str| {
            vars.iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        };
        Options::from_vars(find)
    }

    #[test]
    fn says_what_is_missing_and_hides_what_is_secret() {
        let all = [
            ("AUTH_KEY", "a, b"),
            ("PGHOST", "db"),
            ("DISCOVERD", "http://10.0.0.1:1111"),
        ];
        let options = read(&all).unwrap();
        assert_eq!((options.keys.len(), options.listen.port()), (2, 80));
        for at in 0..all.len() {
            let mut some = all.to_vec();
            let (name, _) = some.remove(at);
            assert!(read(&some).unwrap_err().to_string().contains(name));
        }
        let url = [all[0], all[2], ("DATABASE_URL", "postgres://u:s3cret@h:port/db")];
        assert!(!format!("{:#}", read(&url).unwrap_err()).contains("s3cret"));
    }
}
