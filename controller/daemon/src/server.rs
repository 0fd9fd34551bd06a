//! The API: HTTP on the unix socket.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Extension, Json, Router};
use futures_util::stream;
use omerta_api::{
    EventsQuery, Guest, GuestList, GuestsQuery, PeerList, PeerRequest, RunRequest, StopRequest,
    Version, route,
};
use omerta_engine::Cause;
use omerta_vm_launcher::ConsoleLog;
use serde::de::DeserializeOwned;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

use crate::connections::{self, Door, Streaming};
use crate::failure::{Failure, not_found, usage};
use crate::fleet::Fleet;
use crate::guest_task::Command;

/// How many connections root may have at once: enough to ask for as many guests as there may be.
const ROOT: usize = 288;
/// How many those may have whom root lets open the socket, whoever they are: none of root's.
const OTHERS: usize = 64;
/// How many of them may be streams of events.
const STREAMS: usize = 32;
/// All of them.
pub(crate) const CONNECTIONS: usize = ROOT + OTHERS;
/// The most of a console log that is answered, in bytes: its end.
const MAX_LOG_BYTES: u64 = 1 << 20;
/// Seconds that a guest has for powering down when nothing is said.
const DEFAULT_STOP_SECONDS: u32 = 10;
const MAX_STOP_SECONDS: u32 = 600;

type Answer<T> = Result<T, Failure>;

/// Answers on the socket until `stopped`.
pub(crate) async fn serve(
    listener: UnixListener,
    fleet: Arc<Fleet>,
    stopped: watch::Receiver<bool>,
) {
    let (root, others) = (Door::new(ROOT, STREAMS), Door::new(OTHERS, STREAMS));
    let door = move |stream: &UnixStream| {
        let is_root = stream.peer_cred().is_ok_and(|peer| peer.uid() == 0);
        Arc::clone(if is_root { &root } else { &others })
    };
    connections::serve(listener, router(fleet), door, stopped).await;
}

/// The API's routes.
fn router(fleet: Arc<Fleet>) -> Router {
    Router::new()
        .route(route::GUESTS, get(list).post(run))
        .route(route::GUEST, get(show))
        .route(route::GUEST_STOP, post(stop))
        .route(route::GUEST_KILL, post(kill))
        .route(route::GUEST_PAUSE, post(pause))
        .route(route::GUEST_RESUME, post(resume))
        .route(route::GUEST_RESET, post(reset))
        .route(route::GUEST_LOG, get(log))
        .route(route::GUEST_PEER, put(set_peer))
        .route(route::PEERS, get(peers))
        .route(route::EVENTS, get(events))
        .route(route::VERSION, get(version))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .with_state(fleet)
}

async fn run(State(fleet): State<Arc<Fleet>>, body: Bytes) -> Answer<(StatusCode, Json<Guest>)> {
    let request: RunRequest = parse_body(&body)?;
    Ok((StatusCode::CREATED, Json(fleet.run(request).await?)))
}

async fn list(
    State(fleet): State<Arc<Fleet>>,
    query: Result<Query<GuestsQuery>, QueryRejection>,
) -> Answer<Json<GuestList>> {
    let query = parse_query(query)?;
    Ok(Json(GuestList {
        guests: fleet.list(query.ended),
    }))
}

async fn show(
    State(fleet): State<Arc<Fleet>>,
    name: Result<Path<String>, PathRejection>,
) -> Answer<Json<Guest>> {
    Ok(Json(fleet.show(&parse_name(name)?)?))
}

async fn stop(
    State(fleet): State<Arc<Fleet>>,
    name: Result<Path<String>, PathRejection>,
    body: Bytes,
) -> Answer<Json<Guest>> {
    let name = parse_name(name)?;
    let request: StopRequest = match body.is_empty() {
        true => StopRequest::default(),
        false => parse_body(&body)?,
    };
    let deadline_seconds = request.deadline_seconds.unwrap_or(DEFAULT_STOP_SECONDS);
    if !(1..=MAX_STOP_SECONDS).contains(&deadline_seconds) {
        return Err(usage(format!(
            "deadline_seconds is {deadline_seconds}: give 1 to {MAX_STOP_SECONDS}"
        ))
        .into());
    }
    Ok(Json(
        fleet.end(&name, Command::Stop { deadline_seconds }).await?,
    ))
}

async fn kill(
    State(fleet): State<Arc<Fleet>>,
    name: Result<Path<String>, PathRejection>,
) -> Answer<Json<Guest>> {
    Ok(Json(
        fleet
            .end(&parse_name(name)?, Command::End(Cause::Killed))
            .await?,
    ))
}

async fn pause(
    State(fleet): State<Arc<Fleet>>,
    name: Result<Path<String>, PathRejection>,
) -> Answer<Json<Guest>> {
    Ok(Json(fleet.hold(&parse_name(name)?).await?))
}

async fn resume(
    State(fleet): State<Arc<Fleet>>,
    name: Result<Path<String>, PathRejection>,
) -> Answer<Json<Guest>> {
    Ok(Json(fleet.release(&parse_name(name)?).await?))
}

async fn reset(
    State(fleet): State<Arc<Fleet>>,
    name: Result<Path<String>, PathRejection>,
) -> Answer<Json<Guest>> {
    Ok(Json(fleet.reset(&parse_name(name)?).await?))
}

async fn log(
    State(fleet): State<Arc<Fleet>>,
    name: Result<Path<String>, PathRejection>,
) -> Answer<Response> {
    let name = parse_name(name)?;
    let guest = fleet.show(&name)?;
    let kind = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    if let Some(end) = fleet.kept_console(&name) {
        return Ok((kind, String::from_utf8_lossy(&end).into_owned()).into_response());
    }
    let Some(path) = guest.log else {
        let state = guest.state;
        return Err(not_found(format!(
            "guest `{name}` is {state} and has no log: there is one only of a guest that has run"
        ))
        .into());
    };
    let log = format!("the log of guest `{name}`");
    let text = fleet
        .lookups()
        .look(&log, move || read_end(path.as_ref()))
        .await?
        .map_err(|error| {
            not_found(format!(
                "the log of guest `{name}` is gone or cannot be read ({error}), its run directory was removed or changed by another program: end it with `omerta vm kill {name}`, and read its console by `omerta vm console {name}`"
            ))
        })?;
    Ok((kind, text).into_response())
}

fn read_end(path: &std::path::Path) -> std::io::Result<String> {
    let end = ConsoleLog::at(path).end(MAX_LOG_BYTES)?;
    Ok(String::from_utf8_lossy(&end).into_owned())
}

async fn set_peer(
    State(fleet): State<Arc<Fleet>>,
    name: Result<Path<String>, PathRejection>,
    body: Bytes,
) -> Answer<Json<Guest>> {
    let request: PeerRequest = parse_body(&body)?;
    Ok(Json(fleet.move_consumer(parse_name(name)?, request).await?))
}

async fn peers(State(fleet): State<Arc<Fleet>>) -> Answer<Json<PeerList>> {
    Ok(Json(fleet.peers().await?))
}

async fn events(
    State(fleet): State<Arc<Fleet>>,
    query: Result<Query<EventsQuery>, QueryRejection>,
) -> Answer<Response> {
    let query = parse_query(query)?;
    let reader = fleet.events(query.guest, query.follow)?;
    let lines = stream::unfold(reader, |mut reader| async {
        let text = reader.next().await?;
        Some((Ok::<_, Infallible>(text), reader))
    });
    let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((Extension(Streaming), kind, Body::from_stream(lines)).into_response())
}

async fn version(State(fleet): State<Arc<Fleet>>) -> Json<Version> {
    let known = fleet.acceleration().known();
    let (accel, accel_why) = match known.accel {
        Some(report) => (report.accel.to_string(), report.why),
        None => (
            "probing".to_owned(),
            "whether KVM works here is being found out".to_owned(),
        ),
    };
    Json(Version {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        accel,
        accel_why,
        machine_why: known.machine,
    })
}

async fn no_route(uri: axum::http::Uri) -> Failure {
    let path: String = uri.path().chars().take(128).collect();
    not_found(format!("no route {path}: see openapi.yaml")).into()
}

async fn no_method(method: axum::http::Method, uri: axum::http::Uri) -> Failure {
    let path: String = uri.path().chars().take(128).collect();
    usage(format!("{path} does not answer {method}: see openapi.yaml")).into()
}

fn parse_body<T: DeserializeOwned>(body: &Bytes) -> Answer<T> {
    serde_json::from_slice(body)
        .map_err(|error| usage(format!("request body: {}", one_line(&error.to_string()))).into())
}

fn parse_query<T>(query: Result<Query<T>, QueryRejection>) -> Answer<T> {
    match query {
        Ok(Query(query)) => Ok(query),
        Err(rejection) => Err(usage(format!("query: {}", one_line(&rejection.body_text()))).into()),
    }
}

fn parse_name(name: Result<Path<String>, PathRejection>) -> Answer<String> {
    match name {
        Ok(Path(name)) => Ok(name),
        Err(rejection) => Err(usage(format!("path: {}", one_line(&rejection.body_text()))).into()),
    }
}

/// Text that quotes a request may hold anything.
fn one_line(text: &str) -> String {
    text.chars()
        .take(512)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect()
}
