//! The way to omertad: HTTP/1.1 with JSON bodies over a unix socket.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use omerta_api::{ApiError, ErrorKind};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::exit::Exit;

/// How long omertad may take to answer a request. Starting and stopping guests takes seconds; the
/// longest stop deadline is ten minutes.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(630);

/// The longest line that is taken from a stream, in bytes.
const MAX_LINE: usize = 1 << 20;

/// Speaks to the omertad behind one socket. Each request has a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the omertad at `socket`; nothing is connected yet.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Reads what is at `path`.
    ///
    /// # Errors
    /// Where omertad cannot be reached, refuses, or answers something else than a `T`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let body = self
            .in_time(self.body(Method::GET, path, Bytes::new()))
            .await?;
        self.decode(&body)
    }

    /// Posts `body` to `path`.
    ///
    /// # Errors
    /// Where omertad cannot be reached, refuses, or answers something else than a `T`.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|source| ClientError::Encode { source })?;
        let body = self
            .in_time(self.body(Method::POST, path, body.into()))
            .await?;
        self.decode(&body)
    }

    /// Puts `body` to `path`.
    ///
    /// # Errors
    /// Where omertad cannot be reached, refuses, or answers something else than a `T`.
    pub async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|source| ClientError::Encode { source })?;
        let body = self
            .in_time(self.body(Method::PUT, path, body.into()))
            .await?;
        self.decode(&body)
    }

    /// Reads the bytes at `path`.
    ///
    /// # Errors
    /// Where omertad cannot be reached or refuses.
    pub async fn bytes(&self, path: &str) -> Result<Bytes, ClientError> {
        self.in_time(self.body(Method::GET, path, Bytes::new()))
            .await
    }

    /// Opens the stream of lines at `path`.
    ///
    /// # Errors
    /// Where omertad cannot be reached or refuses.
    pub async fn lines(&self, path: &str) -> Result<Lines, ClientError> {
        let response = self
            .in_time(self.request(Method::GET, path, Bytes::new()))
            .await?;
        Ok(Lines {
            socket: self.socket.clone(),
            body: response.into_body(),
            buffer: Vec::new(),
            ended: false,
        })
    }

    async fn body(&self, method: Method, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
        let response = self.request(method, path, body).await?;
        let collected = response.into_body().collect().await;
        Ok(collected.map_err(|source| self.broken(source))?.to_bytes())
    }

    /// Sends a request and takes the answer's head; what is no success becomes an error.
    async fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::connecting(&self.socket, source))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|source| self.broken(source))?;
        // The connection's own error is the request's error too, and told there.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "omertad")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|source| ClientError::Request { source })?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|source| self.broken(source))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status().as_u16();
        let body = response.into_body().collect().await;
        let body = body.map_err(|source| self.broken(source))?.to_bytes();
        Err(match serde_json::from_slice::<ApiError>(&body) {
            Ok(error) => ClientError::Answer(error),
            Err(_) => ClientError::Status {
                socket: self.socket.clone(),
                status,
            },
        })
    }

    fn decode<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(body).map_err(|source| ClientError::Decode {
            socket: self.socket.clone(),
            source,
        })
    }

    async fn in_time<T>(
        &self,
        answer: impl Future<Output = Result<T, ClientError>>,
    ) -> Result<T, ClientError> {
        match tokio::time::timeout(ANSWER_TIMEOUT, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(ClientError::Silent(self.socket.clone())),
        }
    }

    fn broken(&self, source: hyper::Error) -> ClientError {
        ClientError::Broken {
            socket: self.socket.clone(),
            source,
        }
    }
}

/// A stream of lines.
#[derive(Debug)]
pub struct Lines {
    socket: PathBuf,
    body: Incoming,
    buffer: Vec<u8>,
    ended: bool,
}

impl Lines {
    /// The next line, without its end; `None` after the last.
    ///
    /// # Errors
    /// Where the connection breaks, or a line has no end.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, ClientError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|&byte| byte == b'\n') {
                let rest = self.buffer.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                line.pop();
                return Ok(Some(line));
            }
            if self.ended {
                return Ok(None);
            }
            match self.body.frame().await {
                None => {
                    self.ended = true;
                    if !self.buffer.is_empty() {
                        return Ok(Some(std::mem::take(&mut self.buffer)));
                    }
                }
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                    if self.buffer.len() > MAX_LINE && !self.buffer.contains(&b'\n') {
                        return Err(ClientError::EndlessLine(self.socket.clone()));
                    }
                }
                Some(Err(source)) => {
                    return Err(ClientError::Broken {
                        socket: self.socket.clone(),
                        source,
                    });
                }
            }
        }
    }
}

/// Why omertad did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nothing listens at the socket.
    #[error("omertad is not running: nothing listens at {path}; start it with `sudo omertad --socket {path}`, or name another socket with --socket", path = .0.display())]
    NotRunning(PathBuf),
    /// The socket is not ours to use.
    #[error("no permission to use omertad's socket {}: run this with sudo", .0.display())]
    Forbidden(PathBuf),
    /// The socket cannot be connected to.
    #[error("cannot connect to omertad at {}", socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to omertad at {} broke; see whether it still runs", socket.display())]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// What broke.
        #[source]
        source: hyper::Error,
    },
    /// No answer came.
    #[error("omertad at {} does not answer: see its log, or restart it", .0.display())]
    Silent(PathBuf),
    /// The request cannot be put into words.
    #[error("cannot encode the request")]
    Encode {
        /// What cannot be encoded.
        #[source]
        source: serde_json::Error,
    },
    /// The request is no HTTP request.
    #[error("cannot make the request")]
    Request {
        /// What is wrong with it.
        #[source]
        source: hyper::http::Error,
    },
    /// omertad refused, and says why.
    #[error("{0}")]
    Answer(ApiError),
    /// An answer without an explanation.
    #[error("omertad at {} answers HTTP status {status} without a reason: is it omertad that listens there, and of this version?", socket.display())]
    Status {
        /// The socket.
        socket: PathBuf,
        /// The HTTP status.
        status: u16,
    },
    /// An answer that cannot be read.
    #[error("omerta and the omertad at {} seem to be of different versions: its answer cannot be read", socket.display())]
    Decode {
        /// The socket.
        socket: PathBuf,
        /// What cannot be decoded.
        #[source]
        source: serde_json::Error,
    },
    /// A stream that is not made of lines.
    #[error("omertad at {} sent a line without end: is it omertad that listens there?", .0.display())]
    EndlessLine(PathBuf),
}

impl ClientError {
    fn connecting(socket: &Path, source: io::Error) -> Self {
        let socket = socket.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Self::NotRunning(socket),
            io::ErrorKind::PermissionDenied => Self::Forbidden(socket),
            _ => Self::Connect { socket, source },
        }
    }

    /// How the process ends after this.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Answer(error) => match error.error {
                ErrorKind::NotFound => Exit::NotFound,
                ErrorKind::Usage => Exit::Usage,
                ErrorKind::Refused => Exit::Refused,
                ErrorKind::Failed => Exit::Failed,
            },
            _ => Exit::Failed,
        }
    }
}
