//! The one error body of every API: `{"code","message","retry","detail"}`.

use std::fmt;

use http::StatusCode;
use serde::{Deserialize, Serialize};

/// What an API call comes to.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The kind of failure, stable across releases: programs decide by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The input is malformed or breaks a rule. Trying again will not help.
    Validation,
    /// There is no such object, or the caller may not know of it.
    NotFound,
    /// The object is there already.
    ObjectExists,
    /// The object has changed since the caller read it, or another operation holds it.
    Conflict,
    /// The caller's precondition (generation, index) does not hold.
    PreconditionFailed,
    /// It was there and is no more: what follows from it must be begun anew.
    Gone,
    /// The caller is not known.
    Unauthorized,
    /// The caller is known but may not do this.
    Forbidden,
    /// A limit is reached: size, count, rate or disk.
    LimitExceeded,
    /// A component that this call needs is not there now. Trying again may help.
    Unavailable,
    /// It took too long. Whether it happened is unknown.
    Timeout,
    /// A fault of the platform.
    #[serde(other)]
    Internal,
}

impl ErrorCode {
    /// The HTTP status that goes with the code.
    pub fn status(self) -> StatusCode {
        match self {
            Self::Validation => StatusCode::BAD_REQUEST,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::ObjectExists | Self::Conflict => StatusCode::CONFLICT,
            Self::PreconditionFailed => StatusCode::PRECONDITION_FAILED,
            Self::Gone => StatusCode::GONE,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::LimitExceeded => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Timeout => StatusCode::GATEWAY_TIMEOUT,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The best guess for an answer that carries no error body.
    pub fn of_status(status: StatusCode) -> Self {
        match status.as_u16() {
            401 => Self::Unauthorized,
            403 => Self::Forbidden,
            404 => Self::NotFound,
            408 | 504 => Self::Timeout,
            409 => Self::Conflict,
            410 => Self::Gone,
            412 => Self::PreconditionFailed,
            413 | 429 | 507 => Self::LimitExceeded,
            502 | 503 => Self::Unavailable,
            // Redirections are not followed: asking again brings the same.
            300..=499 => Self::Validation,
            _ => Self::Internal,
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A failure, as people and programs see it.
///
/// `message` says what failed, why, and what to do next; it never carries a secret.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[error("{message}")]
pub struct Error {
    /// The kind of failure.
    pub code: ErrorCode,
    /// What failed, why, and what to do next.
    pub message: String,
    /// Whether the same call may succeed later.
    #[serde(default)]
    pub retry: bool,
    /// More for programs: the field at fault, the current generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<serde_json::Value>,
}

impl Error {
    /// A failure of this kind; `retry` is set for those kinds that may pass.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let retry = matches!(code, ErrorCode::Unavailable | ErrorCode::Timeout);
        Self {
            code,
            message: message.into(),
            retry,
            detail: None,
        }
    }

    /// The input breaks a rule.
    pub fn validation(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Validation, message)
    }

    /// The input breaks a rule at `field`.
    pub fn invalid_field(field: &str, message: impl fmt::Display) -> Self {
        let mut error = Self::validation(format!("{field}: {message}"));
        error.detail = Some(serde_json::json!({ "field": field }));
        error
    }

    /// There is no `what` of that name.
    pub fn not_found(what: &str, name: impl fmt::Display) -> Self {
        Self::new(ErrorCode::NotFound, format!("there is no {what} {name}"))
    }

    /// The object has changed, or is busy.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Conflict, message)
    }

    /// Something that is needed is not there now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Unavailable, message)
    }

    /// The same, but the call may have been done although it failed.
    #[must_use]
    pub fn or_done(mut self) -> Self {
        self.detail = Some(serde_json::json!({ "outcome": "unknown" }));
        self
    }

    /// Whether the call may have been done although it failed.
    pub fn may_be_done(&self) -> bool {
        let unknown = |detail: &serde_json::Value| detail["outcome"] == "unknown";
        self.code == ErrorCode::Timeout || self.detail.as_ref().is_some_and(unknown)
    }

    /// The same, and what stands in the way is not that it was done earlier.
    #[must_use]
    pub fn and_undone(mut self) -> Self {
        let detail = self.detail.get_or_insert_with(|| serde_json::json!({}));
        detail["outcome"] = "refused".into();
        self
    }

    /// Whether it is known that the call was not done, now or earlier.
    pub fn surely_undone(&self) -> bool {
        self.detail
            .as_ref()
            .is_some_and(|detail| detail["outcome"] == "refused")
    }

    /// A fault of the platform. The caller logs the cause; the message stays general.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, message)
    }

    /// The error of an answer: its body when it is one of ours, otherwise its status and the start of its text.
    pub fn from_response(status: StatusCode, body: &[u8]) -> Self {
        serde_json::from_slice(body).unwrap_or_else(|_| {
            let text = String::from_utf8_lossy(&body[..body.len().min(500)]);
            let text = text.trim();
            let message = if text.is_empty() {
                status.to_string()
            } else {
                format!("{status}: {text}")
            };
            Self::new(ErrorCode::of_status(status), message)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_survive_the_wire() {
        let error = Error::invalid_field("processes.web.ports", "0 is not a port");
        let body = serde_json::to_vec(&error).unwrap();
        assert_eq!(Error::from_response(error.code.status(), &body), error);
        assert_eq!(error.code.to_string(), "validation");
    }

    #[test]
    fn foreign_bodies_become_errors_too() {
        let error = Error::from_response(StatusCode::BAD_GATEWAY, b"<html>bad gateway</html>");
        assert_eq!(error.code, ErrorCode::Unavailable);
        assert!(error.retry && error.message.contains("bad gateway"));
        let newer = br#"{"code":"from_the_future","message":"m"}"#;
        assert_eq!(
            Error::from_response(StatusCode::CONFLICT, newer).code,
            ErrorCode::Internal
        );
    }
}
