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
use tokio::sync::watch;

use crate::connections::{self, Door};
use crate::failure::report;
use crate::fleet::Fleet;
use crate::metrics::Scraper;

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

/// How many may scrape at once: whoever can reach the port must not be able to take the descriptors
/// that guests need.
pub(crate) const CONNECTIONS: usize = 32;

/// Answers scrapes until `stopped`.
pub(crate) async fn serve(
    listener: TcpListener,
    fleet: Arc<Fleet>,
    stopped: watch::Receiver<bool>,
) {
    let router = Router::new()
        .route("/metrics", get(answer))
        .with_state(Arc::new(Scraper::of(fleet)));
    let door = Door::new(CONNECTIONS, 0);
    connections::serve(listener, router, move |_| Arc::clone(&door), stopped).await;
}

async fn answer(State(scraper): State<Arc<Scraper>>) -> Response {
    let scraped = Arc::clone(&scraper);
    // One at a time: whoever can reach the port must not be able to keep every thread busy.
    let look = scraper
        .fleet()
        .lookups()
        .look("metrics", move || scraped.scrape());
    match look.await {
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
