//! Looks at files and guards for people's requests, off the threads that guests' pauses need.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use omerta_api::{ApiError, ErrorKind};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// How long one may take, waiting for its turn included.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);
/// How many take place at once. One whose file system does not answer keeps its thread.
pub(crate) const AT_ONCE: usize = 16;

/// What bounds them: so many threads in all, and one for each thing that is looked at, so that
/// asking again for what hangs hangs no second thread.
#[derive(Debug)]
pub(crate) struct Lookups {
    threads: Arc<Semaphore>,
    things: Mutex<HashMap<String, Weak<Semaphore>>>,
    deadline: Duration,
}

impl Lookups {
    /// Lookups that may take `deadline` each.
    pub(crate) fn new(deadline: Duration) -> Self {
        Self {
            deadline,
            threads: Arc::new(Semaphore::new(AT_ONCE)),
            things: Mutex::default(),
        }
    }

    /// Does `work`, which looks at `thing`, on a thread that may be kept waiting. Fails where that
    /// takes too long; the work then goes on, and what it gives is dropped.
    pub(crate) async fn look<T: Send + 'static>(
        &self,
        thing: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        let only = self.turn_of(thing);
        let threads = Arc::clone(&self.threads);
        let looked = timeout(self.deadline, async move {
            let turn = only.acquire_owned().await.ok()?;
            let thread = threads.acquire_owned().await.ok()?;
            let work = move || {
                let done = work();
                drop((turn, thread));
                done
            };
            spawn_blocking(work).await.ok()
        })
        .await;
        let problem = match looked {
            Ok(Some(done)) => return Ok(done),
            Ok(None) => "the look at it broke off: see omertad's log".to_owned(),
            Err(_) => format!(
                "no answer within {} s: see whether the file system that has it still answers",
                self.deadline.as_secs()
            ),
        };
        Err(ApiError {
            error: ErrorKind::Failed,
            message: format!("{thing}: {problem}"),
        })
    }

    fn turn_of(&self, thing: &str) -> Arc<Semaphore> {
        let mut things = self.things.lock().unwrap_or_else(PoisonError::into_inner);
        things.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = things.get(thing).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::new(Semaphore::new(1));
        things.insert(thing.to_owned(), Arc::downgrade(&turn));
        turn
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn what_hangs_holds_one_thread_however_often_it_is_asked_for() {
        let lookups = Lookups::new(Duration::from_millis(50));
        let (release, held) = mpsc::channel::<()>();
        let hang = lookups.look("image `stuck`", move || held.recv()).await;
        let error = hang.unwrap_err().message;
        assert!(
            error.contains("image `stuck`") && error.contains("file system"),
            "{error}"
        );
        for _ in 0..3 {
            let again = lookups.look("image `stuck`", || ()).await;
            assert!(again.is_err(), "its turn has not come");
        }
        assert_eq!(lookups.threads.available_permits(), AT_ONCE - 1);
        drop(release);
        while lookups.threads.available_permits() < AT_ONCE {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(lookups.look("image `stuck`", || 7).await.unwrap(), 7);
    }
}
