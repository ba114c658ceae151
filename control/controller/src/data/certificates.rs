//! Certificates of routes. The key is stored, and leaves only towards the router.

use deadpool_postgres::GenericClient;
use flynn_api::route::Certificate;
use flynn_api::{Digest, Result};
use uuid::Uuid;

use super::{get, only, run};

/// Stores a certificate, or finds the same one.
pub(crate) async fn add(c: &impl GenericClient, certificate: &Certificate) -> Result<Uuid> {
    let digest = Digest::of(format!("{}\n{}", certificate.cert.trim(), certificate.key.trim()).as_bytes());
    let sql = "INSERT INTO certificates AS c (id, digest, cert, key) VALUES ($1, $2, $3, $4)
               ON CONFLICT (digest) DO UPDATE SET digest = c.digest RETURNING id";
    let params: super::Params<'_> = &[
        &Uuid::new_v4(),
        &digest.to_string(),
        &certificate.cert,
        &certificate.key,
    ];
    get(&only(c, sql, params).await?, "id")
}

/// Forgets certificates that no route has.
pub(crate) async fn prune(c: &impl GenericClient) -> Result<u64> {
    let sql = "DELETE FROM certificates WHERE NOT EXISTS
               (SELECT 1 FROM routes WHERE certificate_id = certificates.id)";
    run(c, sql, &[]).await
}
