//! What every call has to withstand: no key, a wrong key, broken JSON, unknown fields, paths that are not there.

use flynn_api::client::controller::EventFilter;
use flynn_api::client::{Http, full};
use flynn_api::controller::JobState;
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::common::controller::{Running, job, start};
use crate::common::trial;

/// Every call that needs a key. `{…}` stand for what [`Places`] has made.
const CALLS: [(&str, &str); 46] = [
    ("GET", "/apps"),
    ("POST", "/apps"),
    ("GET", "/apps/{app}"),
    ("POST", "/apps/{app}"),
    ("DELETE", "/apps/{app}"),
    ("POST", "/apps/{app}/meta"),
    ("GET", "/apps/{app}/release"),
    ("PUT", "/apps/{app}/release"),
    ("GET", "/apps/{app}/releases"),
    ("DELETE", "/apps/{app}/releases/{id}"),
    ("GET", "/releases"),
    ("POST", "/releases"),
    ("GET", "/releases/{id}"),
    ("GET", "/artifacts"),
    ("POST", "/artifacts"),
    ("GET", "/artifacts/{id}"),
    ("GET", "/formations"),
    ("GET", "/apps/{app}/formations"),
    ("GET", "/apps/{app}/formations/{release}"),
    ("PUT", "/apps/{app}/formations/{release}"),
    ("DELETE", "/apps/{app}/formations/{release}"),
    ("PUT", "/apps/{app}/scale/{release}"),
    ("GET", "/active-jobs"),
    ("GET", "/apps/{app}/jobs"),
    ("POST", "/apps/{app}/jobs"),
    ("GET", "/apps/{app}/jobs/{id}"),
    ("PUT", "/apps/{app}/jobs/{id}"),
    ("DELETE", "/apps/{app}/jobs/{id}"),
    ("POST", "/apps/{app}/jobs/{id}/exec"),
    ("POST", "/apps/{app}/jobs/{id}/forward"),
    ("POST", "/apps/{app}/deploy"),
    ("GET", "/apps/{app}/deployments"),
    ("GET", "/deployments/{id}"),
    ("GET", "/routes"),
    ("GET", "/apps/{app}/routes"),
    ("POST", "/apps/{app}/routes"),
    ("GET", "/apps/{app}/routes/{type}/{id}"),
    ("PUT", "/apps/{app}/routes/{type}/{id}"),
    ("DELETE", "/apps/{app}/routes/{type}/{id}"),
    ("GET", "/events"),
    ("GET", "/events/{id}"),
    ("GET", "/apps/{app}/log"),
    // Paths and methods that are not there tell a stranger nothing either.
    ("GET", "/nothing"),
    ("PATCH", "/apps"),
    ("DELETE", "/events"),
    ("GET", "/apps/{app}/deploy"),
];

/// Calls that need no key.
const OPEN: [&str; 3] = ["/.well-known/status", "/ping", "/ca-cert"];

pub(crate) fn trials() -> Vec<libtest_mimic::Trial> {
    vec![
        trial("no_call_without_a_key", keys),
        trial("the_walk_knows_every_path", complete),
        trial("broken_and_unknown_input_is_named_and_changes_nothing", input),
        trial("anyone_may_ask_whether_it_is_there", open),
    ]
}

/// Fills a path with objects that are there.
async fn filled(running: &Running) -> impl Fn(&str, &str) -> String + use<> {
    let (app, release, _) = running.running_app("shop", 1).await;
    let job = job(&app, &release, "web", JobState::Up);
    running.client.put_job(&job).await.unwrap();
    let route = running.client.routes("shop").await.unwrap().remove(0);
    move |path: &str, of: &str| {
        let id = match of {
            _ if path.contains("/jobs/") => job.id.clone(),
            _ if path.contains("/routes/") => route.id.rsplit('/').next().unwrap().to_owned(),
            _ if path.contains("/releases/") => release.id.clone(),
            _ if path.contains("/events/") => "1".to_owned(),
            _ => Uuid::nil().to_string(),
        };
        path.replace("{app}", "shop")
            .replace("{release}", &release.id)
            .replace("{type}", "http")
            .replace("{id}", &id)
    }
}

async fn call(http: &Http, method: &str, path: &str, body: &str) -> (StatusCode, Value) {
    let request = Request::builder()
        .method(Method::from_bytes(method.as_bytes()).unwrap())
        .uri(path)
        .header("content-type", "application/json")
        .body(full(body.to_owned()))
        .unwrap();
    let response = http.send_raw(request).await.unwrap();
    let status = response.status();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}

async fn keys() {
    let running = start().await;
    let path = filled(&running).await;
    let base = format!("http://{}", running.addr);
    let bare = Http::new(&base).unwrap();
    for http in [&bare, &bare.clone().password("wrong"), &bare.clone().password("")] {
        for (method, template) in CALLS {
            let (status, body) = call(http, method, &path(template, ""), "{}").await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{method} {template}");
            assert_eq!(body["code"], "unauthorized", "{method} {template}");
        }
    }
    for key in ["old-key", "test-key"] {
        let (status, _) = call(&bare.clone().password(key), "GET", "/apps", "").await;
        assert_eq!(status, StatusCode::OK, "both keys of a rotation let in");
    }
    assert_eq!(
        running.client.apps().await.unwrap().len(),
        1,
        "nothing was changed"
    );
    running.stop().await;
}

/// Reads the router's own source, so that a path that is added is also walked.
async fn complete() {
    let source = include_str!("../../src/http/mod.rs");
    let pieces: Vec<_> = source.split('"').collect();
    let mut walked = 0;
    for pair in pieces
        .windows(2)
        .filter(|pair| pair[0].starts_with('/') && !pair[0].contains('\n'))
    {
        let (path, handlers) = (pair[0], pair[1]);
        for method in ["get", "post", "put", "delete", "patch"] {
            if handlers.contains(&format!("{method}(")) {
                let method = method.to_uppercase();
                let known = CALLS.contains(&(method.as_str(), path)) || OPEN.contains(&path);
                assert!(known, "{method} {path} is in no list of this test");
                walked += 1;
            }
        }
    }
    assert_eq!(walked, 42 + OPEN.len(), "the source is no longer read as it was");
}

async fn input() {
    let running = start().await;
    let path = filled(&running).await;
    let before = running
        .client
        .events(&EventFilter::default())
        .await
        .unwrap()
        .len();
    for (method, template) in CALLS
        .into_iter()
        .filter(|(method, _)| matches!(*method, "POST" | "PUT"))
    {
        let path = path(template, "");
        let (status, body) = call(running.http(), method, &path, "{\"name\":").await;
        assert_eq!(
            (status, &body["code"]),
            (StatusCode::BAD_REQUEST, &json!("validation")),
            "{method} {template}: {body}"
        );
        if template.ends_with("/jobs/{id}") {
            // Reports come from a component, which may be newer than this one.
            continue;
        }
        let mut with_unknown = json!({ "no_such_field": 1 });
        if template.contains("/release") || template.contains("/deploy") {
            with_unknown["id"] = json!(Uuid::nil().to_string());
        }
        if template.ends_with("/forward") {
            with_unknown["port"] = json!(80);
        }
        if template.contains("/routes") {
            with_unknown["service"] = json!("shop-web");
        }
        let (status, body) = call(running.http(), method, &path, &with_unknown.to_string()).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{method} {template}: {body}");
        assert!(
            body["message"].as_str().unwrap().contains("no_such_field"),
            "{method} {template}: {body}"
        );
    }
    for (path, status) in [
        ("/nothing", StatusCode::NOT_FOUND),
        ("/apps/nobody", StatusCode::NOT_FOUND),
        ("/releases/x", StatusCode::NOT_FOUND),
        ("/events/x", StatusCode::NOT_FOUND),
        ("/events?count=x", StatusCode::BAD_REQUEST),
        ("/events?object_types=wishes", StatusCode::BAD_REQUEST),
        ("/formations", StatusCode::BAD_REQUEST),
        ("/apps/shop/routes/udp/x", StatusCode::NOT_FOUND),
        ("/apps/shop/jobs/x", StatusCode::NOT_FOUND),
    ] {
        let (found, body) = call(running.http(), "GET", path, "").await;
        assert_eq!(found, status, "{path}: {body}");
        assert!(
            body["message"].is_string() && body["code"].is_string(),
            "{path}: {body}"
        );
    }
    let (status, _) = call(running.http(), "PATCH", "/apps", "{}").await;
    assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED);
    let nul = json!({ "name": "a", "meta": { "k": "a\0b" } }).to_string();
    assert_eq!(
        call(running.http(), "POST", "/apps", &nul).await.0,
        StatusCode::BAD_REQUEST
    );
    assert_eq!(
        running
            .client
            .events(&EventFilter::default())
            .await
            .unwrap()
            .len(),
        before,
        "nothing was changed"
    );
    running.stop().await;
}

async fn open() {
    let running = start().await;
    let bare = Http::new(&format!("http://{}", running.addr)).unwrap();
    let (status, body) = call(&bare, "GET", "/.well-known/status", "").await;
    assert_eq!(
        (status, &body["data"]["status"]),
        (StatusCode::OK, &json!("healthy"))
    );
    assert_eq!(call(&bare, "GET", "/ping", "").await.0, StatusCode::OK);
    let (status, body) = call(&bare, "GET", "/ca-cert", "").await;
    assert_eq!(
        (status, &body["code"]),
        (StatusCode::NOT_FOUND, &json!("not_found")),
        "there is none here"
    );
    running.stop().await;
}
