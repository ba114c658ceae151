//! Routes and certificates.

use flynn_api::ErrorCode;
use flynn_api::client::controller::EventFilter;
use flynn_api::route::{Certificate, Route, RouteKind};

use crate::common::controller::start;
use crate::common::trial;

pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
    vec![
        trial("a_domain_has_one_owner", domains),
        trial("paths_hang_on_the_root", paths),
        trial("tcp_ports_are_given_and_guarded", ports),
        trial("keys_of_certificates_reach_the_router_alone", certificates),
    ]
}

fn http(domain: &str, path: &str) -> Route {
    Route {
        service: "shop-web".into(),
        domain: domain.into(),
        path: path.into(),
        ..Route::default()
    }
}

async fn domains() {
    let running = start().await;
    let client = &running.client;
    running.app("shop").await;
    running.app("other").await;
    let taken = client
        .create_route("other", &http("SHOP.flynn.localhost", ""))
        .await
        .unwrap_err();
    assert_eq!(taken.code, ErrorCode::ObjectExists);
    assert!(taken.message.contains("taken by the app shop"), "{taken}");
    let attempts = (0..8).map(|at| {
        let app = if at % 2 == 0 { "shop" } else { "other" };
        async move { client.create_route(app, &http("example.com", "")).await }
    });
    let results = futures::future::join_all(attempts).await;
    assert_eq!(
        results.iter().filter(|result| result.is_ok()).count(),
        1,
        "{results:?}"
    );
    let refused = results.into_iter().find_map(Result::err).unwrap();
    assert_eq!(refused.code, ErrorCode::ObjectExists, "{refused}");
    client
        .create_route("shop", &http("moved.flynn.localhost", ""))
        .await
        .unwrap();
    let clash = flynn_api::controller::App {
        name: "moved".into(),
        ..Default::default()
    };
    assert_eq!(
        client.create_app(&clash).await.unwrap_err().code,
        ErrorCode::ObjectExists
    );
    assert_eq!(
        client.app("moved").await.unwrap_err().code,
        ErrorCode::NotFound,
        "not half made either"
    );
    running.stop().await;
}

async fn paths() {
    let running = start().await;
    let client = &running.client;
    running.app("shop").await;
    let early = client
        .create_route("shop", &http("example.com", "/api/"))
        .await
        .unwrap_err();
    assert!(
        early.message.starts_with("path: a route for / on example.com"),
        "{early}"
    );
    let root = client
        .create_route("shop", &http("example.com", "/"))
        .await
        .unwrap();
    let api = client
        .create_route("shop", &http("example.com", "/api/"))
        .await
        .unwrap();
    let refused = client.delete_route("shop", &root.id).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::Conflict);
    assert!(refused.message.contains("/api/ on example.com"), "{refused}");
    client.delete_route("shop", &api.id).await.unwrap();
    client.delete_route("shop", &root.id).await.unwrap();
    assert_eq!(
        client.delete_route("shop", &root.id).await.unwrap_err().code,
        ErrorCode::NotFound
    );
    client
        .create_route("shop", &http("example.com", "/"))
        .await
        .expect("the domain is free again");
    running.stop().await;
}

async fn ports() {
    let running = start().await;
    let client = &running.client;
    running.app("shop").await;
    let tcp = |port| Route {
        kind: RouteKind::Tcp,
        service: "shop-db".into(),
        port,
        ..Route::default()
    };
    let first = client.create_route("shop", &tcp(0)).await.unwrap();
    assert!(first.id.starts_with("tcp/"));
    assert_eq!(
        (
            first.port,
            client.create_route("shop", &tcp(0)).await.unwrap().port
        ),
        (3000, 3001)
    );
    let used = client.create_route("shop", &tcp(3001)).await.unwrap_err();
    assert_eq!(used.code, ErrorCode::ObjectExists);
    assert!(
        used.message.contains("in use by a route of the app shop"),
        "{used}"
    );
    assert_eq!(
        client.create_route("shop", &tcp(22)).await.unwrap_err().code,
        ErrorCode::Validation
    );
    // Datagrams have ports of their own.
    let udp = Route {
        kind: RouteKind::Udp,
        sticky: true,
        ..tcp(3001)
    };
    let datagrams = client.create_route("shop", &udp).await.unwrap();
    assert!(datagrams.id.starts_with("udp/") && datagrams.sticky && datagrams.port == 3001);
    let used = client.create_route("shop", &udp).await.unwrap_err();
    assert_eq!(used.code, ErrorCode::ObjectExists);
    client.delete_route("shop", &datagrams.id).await.unwrap();
    client.delete_route("shop", &first.id).await.unwrap();
    assert_eq!(
        client.create_route("shop", &tcp(0)).await.unwrap().port,
        3000,
        "a freed port is given again"
    );
    running.stop().await;
}

async fn certificates() {
    let running = start().await;
    let client = &running.client;
    let app = running.app("shop").await;
    let pair = || {
        let made = rcgen::generate_simple_self_signed(vec!["example.com".into()]).unwrap();
        Certificate {
            id: String::new(),
            cert: made.cert.pem(),
            key: made.signing_key.serialize_pem(),
        }
    };
    let (one, two) = (pair(), pair());
    let with = |certificate: &Certificate| Route {
        certificate: Some(certificate.clone()),
        ..http("example.com", "")
    };
    let mixed = Certificate {
        key: two.key.clone(),
        ..one.clone()
    };
    let refused = client.create_route("shop", &with(&mixed)).await.unwrap_err();
    assert_eq!(refused.detail.unwrap()["field"], "certificate.key");
    let route = client.create_route("shop", &with(&one)).await.unwrap();
    assert_eq!(route.certificate.as_ref().unwrap().key, "", "not in the answer");

    let seen = client.routes("shop").await.unwrap();
    let mut seen = seen.into_iter().find(|found| found.id == route.id).unwrap();
    assert_eq!(
        (
            seen.certificate.as_ref().unwrap().cert.as_str(),
            seen.certificate.as_ref().unwrap().key.as_str()
        ),
        (one.cert.as_str(), "")
    );
    let served = |key: String| async move {
        let all = client.all_routes().await.unwrap();
        assert!(
            all.iter()
                .any(|route| route.certificate.as_ref().is_some_and(|c| c.key == key))
        );
    };
    served(one.key.clone()).await;

    // What was read, put back with one thing changed: the certificate stays.
    seen.sticky = true;
    let mut seen = client.update_route("shop", &seen).await.unwrap();
    assert!(seen.sticky);
    served(one.key.clone()).await;
    seen.certificate = Some(two.clone());
    let mut seen = client.update_route("shop", &seen).await.unwrap();
    served(two.key.clone()).await;
    seen.certificate = None;
    assert!(
        client
            .update_route("shop", &seen)
            .await
            .unwrap()
            .certificate
            .is_none()
    );

    let filter = EventFilter {
        app_id: Some(app.id),
        ..EventFilter::default()
    };
    let events = serde_json::to_string(&client.events(&filter).await.unwrap()).unwrap();
    assert!(
        events.contains("BEGIN CERTIFICATE") && !events.contains("PRIVATE KEY"),
        "no key in events"
    );
    running.stop().await;
}
