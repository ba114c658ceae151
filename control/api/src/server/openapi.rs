//! Routes that describe themselves: a router, and the OpenAPI document of the same calls.
//!
//! What a call takes and answers with is read off the types in its handler's signature, and a handler whose types do not
//! describe themselves is no [`Call`]: the document cannot say anything but what is served.

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::handler::Handler;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, get, on};
use http::HeaderMap;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Events, Json, OrEvents, Query, StrictJson};
use crate::{Error, Result};

/// Where the document is.
pub const PATH: &str = "/openapi.json";

/// The calls of an API.
pub struct Calls<S> {
    router: Router<S>,
    paths: Value,
    schemas: SchemaGenerator,
}

/// Adds calls to [`Calls`], line by line: `get "/jobs/{id}" => job: "What it does";`. The handler's name is the call's.
#[macro_export]
macro_rules! calls {
    ($calls:expr; $($method:ident $path:expr => $handler:ident: $summary:literal;)*) => {
        $calls$(.$method($path, stringify!($handler), $summary, $handler))*
    };
}

macro_rules! methods {
    ($($method:ident $filter:ident)*) => {$(
        #[doc = concat!("Adds a call by ", stringify!($filter), ": its path, its name and what it does.")]
        #[must_use]
        pub fn $method<T: 'static>(
            mut self,
            path: &str,
            name: &str,
            summary: &str,
            handler: impl Call<T, S>,
        ) -> Self {
            self.describe(stringify!($method), path, name, summary, |call| describe(&handler, call));
            self.router = self.router.route(path, on(MethodFilter::$filter, handler));
            self
        }
    )*};
}

impl<S: Clone + Send + Sync + 'static> Calls<S> {
    methods! { get GET put PUT post POST delete DELETE }

    fn describe(
        &mut self,
        method: &str,
        path: &str,
        name: &str,
        summary: &str,
        types: impl FnOnce(&mut Operation<'_>),
    ) {
        let mut call = Operation {
            entry: json!({
                "operationId": name,
                "summary": summary,
                "parameters": [],
                "responses": { "default": { "$ref": "#/components/responses/Error" } },
            }),
            schemas: &mut self.schemas,
        };
        let names = path.split('{').filter_map(|part| Some(part.split_once('}')?.0));
        for name in names {
            call.parameter("path", name, true, json!({ "type": "string" }));
        }
        types(&mut call);
        self.paths[path][method] = call.entry;
    }

    /// All routes, and the document of them, which `GET /openapi.json` answers with. `document` is what it says beside
    /// the calls: `info` and the like.
    pub fn finish(mut self, mut document: Value) -> (Router<S>, Value) {
        self.describe(
            "get",
            PATH,
            "openapi",
            "This document",
            Json::<Map<String, Value>>::describe,
        );
        let error = self.schemas.subschema_for::<Error>();
        document["openapi"] = "3.1.0".into();
        document["paths"] = self.paths;
        document["components"]["responses"]["Error"] = json!({
            "description": "It failed, for this reason. The code goes with the status, and programs decide by it.",
            "content": { "application/json": { "schema": error } },
        });
        document["components"]["schemas"] = self.schemas.take_definitions(true).into();
        let answer = Json(document.clone());
        let router = self.router.route(PATH, get(async move || answer));
        (router, document)
    }
}

impl<S: Clone + Send + Sync + 'static> Default for Calls<S> {
    fn default() -> Self {
        let settings = SchemaSettings::draft2020_12().with(|settings| {
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
        });
        let settings = settings.with_transform(RecursiveTransform(|schema: &mut Schema| {
            if let Some(Value::String(text)) = schema.get_mut("description") {
                *text = without_links(text);
            }
        }));
        Self {
            router: Router::new(),
            paths: json!({}),
            schemas: settings.into_generator(),
        }
    }
}

/// Links of Rust's documentation lead nowhere here: what they show stays.
fn without_links(text: &str) -> String {
    let mut parts = text.split("[`");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (shown, rest) = part.split_once("`]").unwrap_or((part, ""));
        let target = rest.strip_prefix('(').and_then(|rest| rest.split_once(')'));
        plain += &format!("`{shown}`{}", target.map_or(rest, |(_, rest)| rest));
    }
    plain
}

/// A call's entry in the document.
pub struct Operation<'a> {
    entry: Value,
    schemas: &'a mut SchemaGenerator,
}

impl Operation<'_> {
    /// The content that a type has as JSON.
    pub fn json<T: JsonSchema>(&mut self) -> Value {
        json!({ "schema": self.schemas.subschema_for::<T>() })
    }

    /// It takes a parameter: in the `path`, the `query` or a `header`.
    pub fn parameter(&mut self, place: &str, name: &str, required: bool, mut schema: Value) {
        let mut parameter = json!({ "in": place, "name": name, "required": required });
        if let Some(description) = schema
            .as_object_mut()
            .and_then(|schema| schema.remove("description"))
        {
            parameter["description"] = description;
        }
        parameter["schema"] = schema;
        if let Some(parameters) = self.entry["parameters"].as_array_mut() {
            parameters.push(parameter);
        }
    }

    /// It takes a body of this media type.
    pub fn body(&mut self, media_type: &str, content: Value) {
        self.entry["requestBody"]["required"] = true.into();
        self.entry["requestBody"]["content"][media_type] = content;
    }

    /// It answers so.
    pub fn answer(&mut self, status: &str, description: &str) {
        self.entry["responses"][status]["description"] = description.into();
    }

    /// It answers with a body of this media type, or with one of those of several.
    pub fn content(&mut self, media_type: &str, content: Value) {
        self.answer("200", "OK");
        self.entry["responses"]["200"]["content"][media_type] = content;
    }
}

/// What a handler takes.
pub trait Input {
    /// Adds it to the call's entry. What is no part of the wire adds nothing.
    fn describe(_: &mut Operation<'_>) {}
}

/// What a handler answers with.
pub trait Output {
    /// Adds it to the call's entry.
    fn describe(call: &mut Operation<'_>);
}

/// A handler whose types describe themselves.
pub trait Call<T, S>: Handler<T, S> {
    /// Adds what it takes and answers with to the call's entry.
    fn describe(call: &mut Operation<'_>);
}

fn describe<T, S, C: Call<T, S>>(_: &C, call: &mut Operation<'_>) {
    C::describe(call);
}

macro_rules! handlers {
    ($($argument:ident)*) => {
        impl<H, M, S, F, $($argument),*> Call<(M, $($argument,)*), S> for H
        where
            H: Handler<(M, $($argument,)*), S> + FnOnce($($argument),*) -> F,
            F: Future,
            F::Output: Output,
            $($argument: Input,)*
        {
            fn describe(call: &mut Operation<'_>) {
                $($argument::describe(call);)*
                F::Output::describe(call);
            }
        }
    };
}

handlers!(A);
handlers!(A B);
handlers!(A B C);
handlers!(A B C D);

impl<S> Input for State<S> {}

impl Input for HeaderMap {}

/// Each part of a path between braces is a parameter.
impl<T> Input for Path<T> {}

impl<T: JsonSchema> Input for Query<T> {
    fn describe(call: &mut Operation<'_>) {
        let schema = T::json_schema(call.schemas);
        let is_required = |name: &String| {
            let required = schema.get("required").and_then(Value::as_array);
            required.is_some_and(|required| required.contains(&json!(name)))
        };
        let properties = schema.get("properties").and_then(Value::as_object);
        for (name, property) in properties.into_iter().flatten() {
            let mut property = property.clone();
            // What is absent from a query is not null there.
            if let Some([kind, ..]) = property["type"].as_array().map(Vec::as_slice) {
                property["type"] = kind.clone();
            }
            call.parameter("query", name, is_required(name), property);
        }
    }
}

impl<T: JsonSchema> Input for StrictJson<T> {
    fn describe(call: &mut Operation<'_>) {
        let content = call.json::<T>();
        call.body("application/json", content);
    }
}

impl Input for Body {
    fn describe(call: &mut Operation<'_>) {
        call.body("application/octet-stream", json!({}));
    }
}

impl<T: Output> Output for Result<T> {
    fn describe(call: &mut Operation<'_>) {
        T::describe(call);
    }
}

impl<T: JsonSchema> Output for Json<T> {
    fn describe(call: &mut Operation<'_>) {
        let content = call.json::<T>();
        call.content("application/json", content);
    }
}

impl<T: JsonSchema> Output for Events<T> {
    fn describe(call: &mut Operation<'_>) {
        let content = call.json::<T>();
        call.content("text/event-stream", content);
        call.answer(
            "200",
            "OK. The schema of Server-Sent Events is that of each one's data",
        );
    }
}

impl<T: Output, E: JsonSchema> Output for OrEvents<T, E> {
    fn describe(call: &mut Operation<'_>) {
        T::describe(call);
        Events::<E>::describe(call);
    }
}

/// It is done, and there is nothing to tell: `{}`.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct Done {}

/// Figures in Prometheus' text format.
#[derive(Clone, Debug)]
pub struct Metrics(pub String);

impl IntoResponse for Metrics {
    fn into_response(self) -> Response {
        let headers = [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
        (headers, self.0).into_response()
    }
}

impl Output for Metrics {
    fn describe(call: &mut Operation<'_>) {
        let content = call.json::<String>();
        call.content("text/plain", content);
    }
}

/// Bytes, and how many they are where that is known.
#[derive(Debug)]
pub struct Octets {
    /// How many.
    pub length: Option<u64>,
    /// They themselves.
    pub body: Body,
}

impl IntoResponse for Octets {
    fn into_response(self) -> Response {
        let mut response = ([(CONTENT_TYPE, "application/octet-stream")], self.body).into_response();
        if let Some(length) = self.length {
            response.headers_mut().insert(CONTENT_LENGTH, length.into());
        }
        response
    }
}

impl Output for Octets {
    fn describe(call: &mut Operation<'_>) {
        call.content("application/octet-stream", json!({}));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize, JsonSchema)]
    #[expect(dead_code, reason = "it is only described")]
    struct Wish {
        /// How many.
        count: u32,
        after: Option<String>,
    }

    async fn change(
        _: Path<(String, String)>,
        _: Query<Wish>,
        _: StrictJson<crate::volume::Gc>,
    ) -> Result<Json<Done>> {
        Ok(Json(Done {}))
    }

    #[test]
    fn a_call_says_what_its_handler_takes_and_answers_with() {
        let calls = calls! { Calls::<()>::default();
            put "/apps/{app}/jobs/{job}" => change: "Changes it";
        };
        let (_, document) = calls.finish(json!({}));
        let reference = |name: &str| json!({ "schema": { "$ref": format!("#/components/schemas/{name}") } });
        let call = &document["paths"]["/apps/{app}/jobs/{job}"]["put"];
        assert_eq!([&call["operationId"], &call["summary"]], ["change", "Changes it"]);
        let parameters = json!([
            { "in": "path", "name": "app", "required": true, "schema": { "type": "string" } },
            { "in": "path", "name": "job", "required": true, "schema": { "type": "string" } },
            { "in": "query", "name": "after", "required": false, "schema": { "type": "string" } },
            {
                "in": "query", "name": "count", "required": true, "description": "How many.",
                "schema": { "type": "integer", "format": "uint32", "minimum": 0 },
            },
        ]);
        assert_eq!(call["parameters"], parameters);
        assert_eq!(
            call["requestBody"]["content"]["application/json"],
            reference("Gc")
        );
        assert_eq!(
            call["responses"]["200"]["content"]["application/json"],
            reference("Done")
        );
        assert_eq!(
            document["components"]["responses"]["Error"]["content"]["application/json"],
            reference("Error")
        );
        assert!(document["paths"][PATH]["get"].is_object());
    }

    #[test]
    fn links_show_what_they_showed() {
        assert_eq!(
            without_links("At least [`MIN`](crate::volume::MIN) (see [`Gc`]), [not] `more`."),
            "At least `MIN` (see `Gc`), [not] `more`."
        );
    }
}
