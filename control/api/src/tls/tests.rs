use super::*;
use std::os::unix::fs::PermissionsExt as _;

#[test]
fn identities_are_named_and_kept() {
    install_provider();
    let ca = Ca::create("flynn cluster").unwrap();
    let host = PeerIdentity::Host("h1".into());
    let identity = ca
        .issue(&host, &["192.0.2.1".into(), "h1.discoverd".into()])
        .unwrap();
    assert_eq!(identity.name(), Some(host));
    let dir = tempfile::tempdir().unwrap();
    identity.save(dir.path()).unwrap();
    identity.save(dir.path()).unwrap();
    assert_eq!(Identity::load(dir.path()).unwrap(), identity);
    let mode = std::fs::metadata(dir.path().join("key.pem"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    identity.server_config(ClientAuth::Required).unwrap();
    identity.client_config().unwrap();
}

#[test]
fn an_identity_is_due_after_a_month_and_keeps_its_key() {
    let ca = Ca::create("flynn cluster").unwrap();
    let host = PeerIdentity::Host("h1".into());
    let old = ca.issue(&host, &[]).unwrap();
    let now = jiff::Timestamp::now();
    let in_days = |days: i64| now + jiff::SignedDuration::from_hours(24 * days);
    assert!(!old.is_due(now) && !old.is_due(in_days(RENEW_AFTER_DAYS - 2)));
    assert!(old.is_due(in_days(RENEW_AFTER_DAYS + 1)));
    let request = KeyRequest::of(&old.key_pem).unwrap();
    let renewed = Identity {
        cert_pem: ca.sign(&request.csr_pem, &host, &[]).unwrap(),
        ..old.clone()
    };
    assert_ne!(renewed.cert_pem, old.cert_pem);
    renewed.client_config().unwrap();
    assert!(
        Identity {
            cert_pem: "cut off".into(),
            ..old
        }
        .is_due(now)
    );
}

#[test]
fn a_signed_request_takes_the_key_but_not_the_wishes() {
    let ca = Ca::create("flynn cluster").unwrap();
    let ca = Ca::from_pem(ca.cert_pem(), ca.key_pem()).unwrap();
    let request = KeyRequest::generate().unwrap();
    let job = PeerIdentity::Job("controller".into());
    let cert_pem = ca.sign(&request.csr_pem, &job, &[]).unwrap();
    let identity = Identity {
        ca_pem: ca.cert_pem().into(),
        cert_pem,
        key_pem: request.key_pem,
    };
    assert_eq!(identity.name(), Some(job));
    identity.client_config().unwrap();
}

/// Whether one who shows `client` and one who shows `server` take each other.
fn shake_hands(client: &Identity, server: &Identity) -> bool {
    let server = server.server_config(ClientAuth::Required).unwrap();
    handshake_of(client.client_config().unwrap(), server)
}

/// As many roots one after the other as are kept, the first as an earlier release made them.
#[test]
fn who_knows_an_old_root_alone_knows_its_successors_by_the_links() {
    install_provider();
    let key = KeyPair::generate().unwrap();
    let mut params = root("flynn cluster", 10);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let first = Ca {
        cert_pem: params.self_signed(&key).unwrap().pem(),
        key_pem: key.serialize_pem(),
    };
    let host = PeerIdentity::Host("h1".into());
    let names = ["host.discoverd".to_owned()];
    let old = first.issue(&host, &names).unwrap();
    assert!(shake_hands(&old, &old));

    let (mut signer, mut links) = (first, String::new());
    for _ in 0..4 {
        let (next, link) = signer.successor().unwrap();
        let both = format!("{}{}", next.cert_pem(), signer.cert_pem());
        // Both are trusted, the old one signs still.
        let mut before = signer.issue(&host, &names).unwrap();
        before.ca_pem.clone_from(&both);
        before.cert_pem += &links;
        links += &link;
        let mut after = next.issue(&host, &names).unwrap();
        after.cert_pem += &links;
        let mut knows_both = after.clone();
        knows_both.ca_pem = both;
        for (one, other) in [
            (&before, &knows_both),
            (&knows_both, &before),
            (&knows_both, &after),
        ] {
            assert!(shake_hands(one, other));
        }
        // Who was away all the time knows a server, and is known by those who still trust what it has.
        let latecomer = after.clone();
        assert!(
            !shake_hands(&old, &latecomer),
            "its own certificate is of no use any more"
        );
        let asks = old.late_client_config().unwrap();
        let server = latecomer.server_config(ClientAuth::Optional).unwrap();
        let verified = handshake_of(asks, server);
        assert!(verified, "the way back");
        assert_eq!(after.held().unwrap().holds, [next.fingerprint().unwrap()].into());
        signer = next;
    }
    // Without the links it knows nobody.
    let alone = signer.issue(&host, &names).unwrap();
    let server = alone.server_config(ClientAuth::Optional).unwrap();
    assert!(!handshake_of(old.late_client_config().unwrap(), server));
}

fn handshake_of(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> bool {
    let name = ServerName::try_from("host.discoverd").unwrap();
    let mut client = rustls::ClientConnection::new(client, name).unwrap();
    let mut server = rustls::ServerConnection::new(server).unwrap();
    for _ in 0..10 {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut bytes = bytes.as_slice();
        while !bytes.is_empty() {
            server.read_tls(&mut bytes).unwrap();
            if server.process_new_packets().is_err() {
                return false;
            }
        }
        let mut bytes = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        let mut bytes = bytes.as_slice();
        while !bytes.is_empty() {
            client.read_tls(&mut bytes).unwrap();
            if client.process_new_packets().is_err() {
                return false;
            }
        }
    }
    !client.is_handshaking() && !server.is_handshaking()
}

#[test]
fn a_certificate_that_has_run_out_proves_whose_it_was_by_its_key() {
    install_provider();
    let (ca, other) = (Ca::create("cluster").unwrap(), Ca::create("cluster").unwrap());
    let host = PeerIdentity::Host("h1".into());
    let long_ago = jiff::Timestamp::now() - jiff::SignedDuration::from_hours(24 * 200);
    let names = ["192.0.2.1", "2001:db8::1", "h1.test"].map(str::to_owned);
    let old = ca.issue_for(&host, &names, long_ago, IDENTITY_DAYS).unwrap();
    let ended = old.certificate().unwrap().not_after;
    let known = Late {
        identity: host,
        ended,
        addresses: names[..2]
            .iter()
            .map(|address| address.parse().unwrap())
            .collect(),
    };
    assert!(ended < jiff::Timestamp::now());
    let request = KeyRequest::of(&old.key_pem).unwrap().csr_pem;
    let by = |trusted: &str| late(&old.cert_pem, &request, trusted);
    assert_eq!(by(ca.cert_pem()).unwrap(), known);
    let both = format!("{}{}", other.cert_pem(), ca.cert_pem());
    assert_eq!(by(&both).unwrap(), known);
    assert!(by(other.cert_pem()).is_err());
    // Who has the certificate, which is no secret, but not its key.
    let thief = KeyRequest::generate().unwrap().csr_pem;
    let error = late(&old.cert_pem, &thief, ca.cert_pem()).unwrap_err();
    assert!(error.to_string().contains("another key"), "{error}");
    for nonsense in ["", "x", ca.cert_pem()] {
        assert!(late(nonsense, &request, ca.cert_pem()).is_err());
        assert!(late(&old.cert_pem, nonsense, ca.cert_pem()).is_err());
    }
}

#[test]
fn roots_are_read_one_by_one() {
    let ca = Ca::create("flynn cluster").unwrap();
    let (next, _) = ca.successor().unwrap();
    let text = format!("{}{}", ca.cert_pem(), next.cert_pem());
    let read = roots(&text).unwrap();
    assert_eq!(
        read.iter().map(|root| root.cert.as_str()).collect::<String>(),
        text
    );
    assert_eq!(read[1].fingerprint, next.fingerprint().unwrap());
    assert!(roots("").unwrap().is_empty());
    let cut = &text[..text.len() / 3];
    assert!(roots(cut).unwrap().is_empty());
}

#[test]
fn an_identity_in_use_follows_its_files() {
    install_provider();
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::create("flynn cluster").unwrap();
    let host = PeerIdentity::Host("h1".into());
    let issue = || ca.issue(&host, &[]).unwrap();
    issue().save(dir.path()).unwrap();
    let live = Live::open(dir.path(), ClientAuth::Required).unwrap();
    let first = live.current();
    assert!(!live.look().unwrap());
    issue().save(dir.path()).unwrap();
    assert!(live.look().unwrap() && !live.look().unwrap());
    assert!(first.identity != live.current().identity && !Arc::ptr_eq(&first.server, &live.current().server));
    // What cannot be used does not take the place of what can.
    let second = live.current();
    std::fs::write(dir.path().join("cert.pem"), "cut off").unwrap();
    assert!(live.look().is_err() && live.look().is_err());
    assert!(Arc::ptr_eq(&second, &live.current()));
    issue().save(dir.path()).unwrap();
    assert!(live.look().unwrap());
}

#[test]
fn strange_names_are_nobody() {
    for name in ["", "host:", "root", "admin:x", "host"] {
        assert_eq!(PeerIdentity::parse(name), None, "{name}");
    }
}
