//! Failures as the API tells them.

use std::error::Error;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use omerta_api::{ApiError, ErrorKind};

/// The request cannot be right.
pub(crate) fn usage(message: String) -> ApiError {
    ApiError {
        error: ErrorKind::Usage,
        message,
    }
}

/// What the request names does not exist.
pub(crate) fn not_found(message: String) -> ApiError {
    ApiError {
        error: ErrorKind::NotFound,
        message,
    }
}

/// State or policy forbids what is asked.
pub(crate) fn refused(message: String) -> ApiError {
    ApiError {
        error: ErrorKind::Refused,
        message,
    }
}

/// It was tried and failed.
pub(crate) fn failed(error: &dyn Error) -> ApiError {
    ApiError {
        error: ErrorKind::Failed,
        message: report(error),
    }
}

/// An error and its causes in one line.
pub(crate) fn report(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line.replace('\n', " ")
}

/// An [`ApiError`] as an HTTP answer.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) ApiError);

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.error.http_status())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}
