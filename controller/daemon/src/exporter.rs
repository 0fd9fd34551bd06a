//! The HTTP server of the metrics.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::Mutex;

use crate::failure::report;
use crate::fleet::Fleet;
use crate::metrics;

/// Why metrics cannot be served.
#[derive(Debug, Error)]
#[error(
    "cannot serve metrics on {address}: stop what listens there, or give another --metrics ADDR:PORT, or --metrics off"
)]
pub(crate) struct ExporterError {
    address: SocketAddr,
    #[source]
    source: std::io::Error,
}

/// Listens for scrapes.
pub(crate) async fn listen(address: SocketAddr) -> Result<TcpListener, ExporterError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| ExporterError { address, source })
}

#[derive(Clone)]
struct Exporter {
    fleet: Arc<Fleet>,
    /// One scrape at a time: whoever can reach the port must not be able to keep every thread
    /// busy.
    turn: Arc<Mutex<()>>,
}

/// The exporter's only route.
pub(crate) fn router(fleet: Arc<Fleet>) -> Router {
    let exporter = Exporter {
        fleet,
        turn: Arc::default(),
    };
    Router::new()
        .route("/metrics", get(answer))
        .with_state(exporter)
}

async fn answer(State(exporter): State<Exporter>) -> Response {
    let _turn = exporter.turn.lock().await;
    let fleet = Arc::clone(&exporter.fleet);
    let scraped = tokio::task::spawn_blocking(move || metrics::scrape(&fleet)).await;
    match scraped {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Ok(Err(error)) => unavailable(&error),
        Err(error) => unavailable(&error),
    }
}

fn unavailable(error: &dyn std::error::Error) -> Response {
    (
        StatusCode::INTERNAL_SERVER_ERROR,
        format!("{}\n", report(error)),
    )
        .into_response()
}
