//! What the host API's document says beside what the daemon does.

use flynn_api::ErrorCode;
use flynn_api::client::full;
use flynn_api::server::openapi;
use futures::StreamExt as _;
use http::header::CONTENT_TYPE;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};

use crate::host::Host;

struct Documented {
    host: Host,
    document: Value,
}

impl Documented {
    /// What of a value breaks a schema of the document.
    fn faults(&self, schema: &Value, value: &Value) -> Vec<String> {
        assert!(schema.is_object(), "{schema} is no schema");
        let schema = json!({ "allOf": [schema], "components": self.document["components"] });
        let validator = jsonschema::validator_for(&schema).unwrap();
        let faults = validator.iter_errors(value);
        faults.map(|fault| fault.to_string()).collect()
    }

    fn fits(&self, schema: &Value, value: &Value) {
        let faults = self.faults(schema, value);
        assert!(faults.is_empty(), "{faults:?}\nin {value:#}");
    }

    /// Makes a call, and looks whether its answer is one that the document knows. Gives the answer's status.
    async fn call(&self, method: &str, path: &str, of: &str, body: String) -> u16 {
        let call = &self.document["paths"][path][method];
        let uri: Vec<_> = path
            .split('/')
            .map(|part| if part.starts_with('{') { of } else { part })
            .collect();
        let uri = uri.join("/");
        let request = http::Request::builder().method(&*method.to_uppercase()).uri(&uri);
        let answer = self.host.api.http().send_raw(request.body(full(body)).unwrap());
        let (answer, body) = answer.await.unwrap().into_parts();
        let kind = answer
            .headers
            .get(CONTENT_TYPE)
            .map(|kind| kind.to_str().unwrap());
        let kind = kind.unwrap_or_default().split(';').next().unwrap();
        let status = answer.status.as_u16();
        let known = match &call["responses"][status.to_string()] {
            Value::Null => &self.document["components"]["responses"]["Error"],
            known => known,
        };
        let content = &known["content"][kind];
        assert!(content.is_object(), "{method} {uri}: {status} {kind:?}: {call:#}");
        let body = body.collect().await.unwrap().to_bytes();
        let values: Vec<Value> = match kind {
            "application/json" => vec![serde_json::from_slice(&body).unwrap()],
            "text/event-stream" => {
                let lines = body.split(|byte| *byte == b'\n');
                let data = lines.filter_map(|line| line.strip_prefix(b"data:"));
                data.map(|data| serde_json::from_slice(data).unwrap()).collect()
            }
            _ => Vec::new(),
        };
        for value in values {
            self.fits(&content["schema"], &value);
            let message = value["message"].as_str().unwrap_or_default();
            assert!(!message.contains("no such call"), "{method} {uri}: {message}");
        }
        status
    }

    /// The same with a body that is what the document wants, which is done.
    async fn send(&self, method: &str, path: &str, of: &str, body: &Value) {
        let wanted = &self.document["paths"][path][method]["requestBody"]["content"];
        self.fits(&wanted["application/json"]["schema"], body);
        let status = self.call(method, path, of, body.to_string()).await;
        assert_eq!(status, 200, "{method} {path}");
    }
}

pub(crate) async fn calls_are_as_the_document_says() {
    let host = Host::boot().await;
    let document: Value = host.api.http().get(openapi::PATH).await.unwrap();
    let api = Documented { host, document };
    let schema = |name: &str| json!({ "$ref": format!("#/components/schemas/{name}") });
    assert!(!api.faults(&schema("Job"), &json!({ "id": 1 })).is_empty());

    let job = api.host.job("echo hello; sleep 1000");
    api.send("put", "/host/jobs/{id}", &job.id, &json!(job)).await;
    api.host.says(&job.id, "hello").await;
    let limits = json!({ "memory": { "limit": 256 << 20 } });
    api.send("put", "/host/jobs/{id}/limits", &job.id, &limits).await;
    let volume = json!({ "id": "data", "meta": { "of": "mine" } });
    api.send("post", "/storage/providers/{id}/volumes", "default", &volume)
        .await;
    let sink = json!({ "kind": "syslog", "config": { "url": "syslog://192.0.2.9:514" } });
    api.send("put", "/sinks/{id}", "far", &sink).await;
    api.send("put", "/host/tags", "", &json!({ "disk": "ssd" })).await;
    api.send("post", "/host/layers/gc", "", &json!({ "dry_run": true }))
        .await;
    let mut events = api.host.api.http().events::<Value>("/host/jobs").await.unwrap();
    let (_, event) = events.next().await.unwrap().unwrap();
    api.fits(&schema("JobEvent"), &event);

    let wrong = format!("/host/jobs/{}/log?lines=many", job.id);
    let refused = api.host.api.http().get::<Value>(&wrong).await.unwrap_err();
    assert!(
        refused.code == ErrorCode::Validation && refused.message.contains("lines"),
        "{refused}"
    );

    let mut done = Vec::new();
    for (path, calls) in api.document["paths"].as_object().unwrap() {
        let of = match path {
            path if path.starts_with("/host/jobs/") => job.id.clone(),
            path if path.starts_with("/host/layers/") => api.host.layer.id.to_string(),
            _ => "data".into(),
        };
        if calls.get("get").is_some() && api.call("get", path, &of, String::new()).await == 200 {
            done.push(path.as_str());
        }
    }
    // A host without a cluster has no network, and a directory cannot be sent.
    for path in [
        "/host/jobs",
        "/host/jobs/{id}",
        "/host/jobs/{id}/log",
        "/host/layers",
        "/host/layers/{digest}",
        "/host/status",
        "/metrics",
        "/sinks",
        "/storage/providers",
        "/storage/volumes",
        "/storage/volumes/{id}",
    ] {
        assert!(done.contains(&path), "{path} is not answered: {done:?}");
    }
    for (path, calls) in api.document["paths"].as_object().unwrap() {
        for method in calls
            .as_object()
            .unwrap()
            .keys()
            .filter(|method| *method != "get")
        {
            // A body that is no JSON: what takes one refuses it.
            let status = api.call(method, path, "none", "-".into()).await;
            let takes = &calls[method]["requestBody"];
            assert!(takes.is_null() || status >= 400, "{method} {path}: {status}");
        }
    }
}
