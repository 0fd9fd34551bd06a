//! Connections: how many there may be, and how long each may take to ask and to take its answer.
//!
//! Each serves one request. A connection that has not finished asking is the first to go where
//! there are too many, so that whoever holds many and asks nothing keeps nobody out.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use axum::serve::Listener;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use omerta_api::{ApiError, ErrorKind};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::failure::{Failure, refused, usage};

/// How long a request may take to arrive, head and body.
const ASKING_DEADLINE: Duration = Duration::from_secs(10);
/// How long an answer may take to be taken, once it is there.
const ANSWER_DEADLINE: Duration = Duration::from_secs(60);
/// How long whoever is turned away has to be told.
const REFUSAL_DEADLINE: Duration = Duration::from_millis(100);
/// The largest request body, in bytes.
const MAX_BODY_BYTES: usize = 16 << 10;
/// The largest request head, in bytes.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// Put into an answer's extensions by a handler whose answer goes on for as long as it is read: it
/// may take as long as its reader wants, and such answers are bounded in number instead.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Streaming;

/// The bounds of one kind of client.
#[derive(Debug)]
pub(crate) struct Door {
    capacity: usize,
    streams: Arc<Semaphore>,
    inside: Mutex<Inside>,
    left: Notify,
}

#[derive(Debug, Default)]
struct Inside {
    count: usize,
    next: u64,
    /// Those that have not finished asking, oldest first.
    asking: BTreeMap<u64, Arc<Notify>>,
}

impl Door {
    /// A door for so many connections, so many of which may be streams.
    pub(crate) fn new(capacity: usize, streams: usize) -> Arc<Self> {
        Arc::new(Self {
            capacity,
            streams: Arc::new(Semaphore::new(streams)),
            inside: Mutex::default(),
            left: Notify::new(),
        })
    }

    /// A place inside, in exchange for the oldest connection that still asks where there is none
    /// left. `None` where all have asked and wait for their answers.
    async fn enter(self: &Arc<Self>) -> Option<Place> {
        loop {
            {
                let mut inside = self.lock();
                if inside.count < self.capacity {
                    inside.count += 1;
                    inside.next += 1;
                    let number = inside.next;
                    let sent_away = Arc::new(Notify::new());
                    inside.asking.insert(number, Arc::clone(&sent_away));
                    return Some(Place {
                        door: Arc::clone(self),
                        number,
                        sent_away,
                    });
                }
                let (_, oldest) = inside.asking.pop_first()?;
                oldest.notify_one();
            }
            self.left.notified().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection's place, given back when dropped.
#[derive(Debug)]
struct Place {
    door: Arc<Door>,
    number: u64,
    sent_away: Arc<Notify>,
}

impl Place {
    /// The request is there: from now on the connection is not sent away for another's sake.
    fn has_asked(&self) {
        self.door.lock().asking.remove(&self.number);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inside = self.door.lock();
        inside.asking.remove(&self.number);
        inside.count -= 1;
        drop(inside);
        self.door.left.notify_one();
    }
}

/// How far a connection is.
#[derive(Debug)]
enum Stage {
    Asking,
    /// The request is being carried out, which may take as long as it takes.
    Waiting,
    Answered,
    Streamed(#[expect(dead_code, reason = "counted while held")] OwnedSemaphorePermit),
}

/// Serves connections, each by the door that `door` gives for it, until `stopped`, and then until
/// those that were asking something have been answered.
pub(crate) async fn serve<L: Listener>(
    mut listener: L,
    router: Router,
    door: impl Fn(&L::Io) -> Arc<Door>,
    mut stopped: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            (io, _) = listener.accept() => io,
            Some(_) = connections.join_next() => continue,
            _ = stopped.wait_for(|stopped| *stopped) => break,
        };
        match door(&accepted).enter().await {
            Some(place) => {
                let connection = one(accepted, router.clone(), place, stopped.clone());
                connections.spawn(connection);
            }
            None => turn_away(accepted).await,
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Serves one connection.
async fn one<I>(io: I, router: Router, place: Place, mut stopped: watch::Receiver<bool>)
where
    I: tokio::io::AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let place = Arc::new(place);
    let (stage, mut changes) = watch::channel(Stage::Asking);
    let service = service_fn({
        let place = Arc::clone(&place);
        let stage = Arc::new(stage);
        move |request| {
            answer(
                request,
                router.clone(),
                Arc::clone(&place),
                Arc::clone(&stage),
            )
        }
    });
    let connection = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(io), service);
    let mut connection = std::pin::pin!(connection);
    let never = || Instant::now() + Duration::from_secs(86_400 * 365);
    let mut deadline = Instant::now() + ASKING_DEADLINE;
    let mut asking = true;
    loop {
        tokio::select! {
            // A connection that breaks has nobody to be told.
            _ = &mut connection => return,
            Ok(()) = changes.changed() => {
                let stage = changes.borrow_and_update();
                asking = matches!(*stage, Stage::Asking);
                deadline = match *stage {
                    Stage::Answered => Instant::now() + ANSWER_DEADLINE,
                    _ => never(),
                };
            }
            () = sleep_until(deadline) => return,
            () = place.sent_away.notified(), if asking => return,
            _ = stopped.wait_for(|stopped| *stopped), if asking => return,
        }
    }
}

/// Takes in the whole request, has it answered, and notes how far the connection is.
async fn answer(
    request: hyper::Request<Incoming>,
    router: Router,
    place: Arc<Place>,
    stage: Arc<watch::Sender<Stage>>,
) -> Result<Response, Infallible> {
    let (head, body) = request.into_parts();
    let body = Limited::new(body, MAX_BODY_BYTES).collect().await;
    place.has_asked();
    stage.send_replace(Stage::Waiting);
    let answer = match body {
        Ok(body) => {
            let request = Request::from_parts(head, Body::from(body.to_bytes()));
            let Ok(answer) = TowerToHyperService::new(router).call(request).await;
            answer
        }
        Err(error) if error.is::<http_body_util::LengthLimitError>() => Failure(usage(format!(
            "request body: larger than {MAX_BODY_BYTES} bytes"
        )))
        .into_response(),
        Err(error) => Failure(usage(format!("request body: {error}"))).into_response(),
    };
    if answer.extensions().get::<Streaming>().is_none() {
        stage.send_replace(Stage::Answered);
        return Ok(answer);
    }
    Ok(match Arc::clone(&place.door.streams).try_acquire_owned() {
        Ok(permit) => {
            stage.send_replace(Stage::Streamed(permit));
            answer
        }
        Err(_) => {
            stage.send_replace(Stage::Answered);
            Failure(refused(
                "as many event streams are open as may be: close one first".to_owned(),
            ))
            .into_response()
        }
    })
}

/// Tells whoever finds no place so, if that can be done at once.
async fn turn_away(mut io: impl AsyncWrite + Unpin) {
    let error = ApiError {
        error: ErrorKind::Refused,
        message: "as many requests wait for their answers as may: wait for one to end".to_owned(),
    };
    let body = serde_json::to_string(&error).unwrap_or_default();
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    let told = async {
        io.write_all(answer.as_bytes()).await?;
        io.shutdown().await
    };
    let _ = timeout(REFUSAL_DEADLINE, told).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn oldest_that_still_asks_makes_room_and_those_who_wait_for_an_answer_do_not() {
        let door = Door::new(2, 0);
        let first = door.enter().await.unwrap();
        let second = door.enter().await.unwrap();
        first.has_asked();
        let sent_away = Arc::clone(&second.sent_away);
        let leave = async {
            sent_away.notified().await;
            drop(second);
        };
        let (third, ()) = tokio::join!(door.enter(), leave);
        let third = third.unwrap();
        third.has_asked();
        assert!(door.enter().await.is_none(), "both wait for their answers");
        drop(first);
        assert!(door.enter().await.is_some());
        drop(third);
        assert_eq!(door.lock().count, 0);
        assert!(door.lock().asking.is_empty());
    }
}
