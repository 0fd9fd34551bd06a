//! The body of every answer that is not a success.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of failure, and so which exit code of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// No such guest, image or route. HTTP 404, exit code 3.
    NotFound,
    /// The request is malformed or a value is out of range. HTTP 400, exit code 2.
    Usage,
    /// The request is well formed and policy or state forbids it. HTTP 409, exit code 4.
    Refused,
    /// It was tried and failed. HTTP 500, exit code 1.
    Failed,
}

impl ErrorKind {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::NotFound, Self::Usage, Self::Refused, Self::Failed];

    /// The HTTP status that carries this kind.
    pub const fn http_status(self) -> u16 {
        match self {
            Self::NotFound => 404,
            Self::Usage => 400,
            Self::Refused => 409,
            Self::Failed => 500,
        }
    }

    /// The exit code of a command that ends in this kind.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::NotFound => 3,
            Self::Usage => 2,
            Self::Refused => 4,
            Self::Failed => 1,
        }
    }
}

/// A failure: its kind, and one line that names the thing and the remedy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiError {
    /// The kind.
    pub error: ErrorKind,
    /// One line that names the thing and the remedy.
    pub message: String,
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}
