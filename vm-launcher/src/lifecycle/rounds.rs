//! One look a second at all guests' guards and logs. A guest's own task is woken only where there is something for it to do:
//! a hundred tasks that each wake to find nothing cost several times what the looking does.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};
use std::time::Duration;

use omerta_dataplane::GuardWatch;
use tokio::runtime::{Handle, Id};
use tokio::sync::Notify;
use tokio::time::{MissedTickBehavior, interval};

use crate::console_log::ConsoleLog;
use crate::lifecycle::logs::Logs;

/// How often a guard is looked at when nothing gives cause to.
const INTERVAL: Duration = Duration::from_secs(1);
/// How many looks there are to one for which every guest's task is woken: what is looked at seldom is its affair.
const SELDOM: u32 = 64;

/// Who goes round, one in each runtime: a guest with a network namespace of its own has a runtime in it, and a guard is seen
/// from there alone.
static ROUNDS: LazyLock<Mutex<HashMap<Id, Vec<Weak<Post>>>>> = LazyLock::new(Mutex::default);

/// One guest, as far as it is looked at.
#[derive(Debug)]
pub(super) struct Post {
    guard: Arc<GuardWatch>,
    /// Of the guard, to be renewed.
    lease: Option<Duration>,
    console: ConsoleLog,
    /// How much was in its log when it was read.
    seen: Arc<AtomicU64>,
    due: Notify,
}

impl Post {
    /// Has it looked at once a second, by this runtime, until it is dropped.
    pub(super) fn join(guard: Arc<GuardWatch>, lease: Option<Duration>, logs: &Logs) -> Arc<Self> {
        let (console, seen) = logs.console();
        let post = Arc::new(Self {
            guard,
            lease,
            console,
            seen,
            due: Notify::new(),
        });
        let runtime = Handle::current().id();
        let is_first = {
            let mut rounds = ROUNDS.lock().unwrap_or_else(PoisonError::into_inner);
            let is_first = !rounds.contains_key(&runtime);
            rounds
                .entry(runtime)
                .or_default()
                .push(Arc::downgrade(&post));
            is_first
        };
        if is_first {
            tokio::spawn(go_round(Leaving(runtime)));
        }
        post
    }

    /// Until its guest's task is to look for itself.
    pub(super) async fn due(&self) {
        self.due.notified().await;
    }

    fn look(&self) {
        // What is not as it was is looked at by the guest's own task, which may take its time.
        let is_well = self.guard.is_untouched() && self.guard.renew(self.lease).is_ok();
        if !is_well || self.console.length() != self.seen.load(Ordering::Relaxed) {
            self.due.notify_one();
        }
    }
}

/// Takes a runtime's round out of the list when it ends, which may be with the runtime.
struct Leaving(Id);

impl Drop for Leaving {
    fn drop(&mut self) {
        let mut rounds = ROUNDS.lock().unwrap_or_else(PoisonError::into_inner);
        rounds.remove(&self.0);
    }
}

async fn go_round(runtime: Leaving) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut looks: u32 = 0;
    loop {
        ticks.tick().await;
        looks = looks.wrapping_add(1);
        let Some(posts) = living(runtime.0) else {
            // The next one begins another, and may have.
            std::mem::forget(runtime);
            return;
        };
        for post in posts.iter().filter_map(Weak::upgrade) {
            post.look();
            if looks.is_multiple_of(SELDOM) {
                post.due.notify_one();
            }
        }
    }
}

/// Those that are to be looked at; `None`, and the round is over, where there are none. Nothing is locked while they are, and
/// nothing of a guest held but while it is its turn.
fn living(runtime: Id) -> Option<Vec<Weak<Post>>> {
    let mut rounds = ROUNDS.lock().unwrap_or_else(PoisonError::into_inner);
    let posts = rounds.get_mut(&runtime)?;
    posts.retain(|post| post.strong_count() > 0);
    if posts.is_empty() {
        rounds.remove(&runtime);
        return None;
    }
    Some(posts.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    use omerta_dataplane::{Guard, GuardConfig, Limits};
    use omerta_test_support::{Namespace, Tap};
    use omerta_verdict::{Mac, Mode};
    use tokio::time::timeout;

    use crate::run_dir::RunFiles;

    /// More than two rounds, on a loaded machine.
    const LONG: Duration = Duration::from_millis(2500);

    fn config() -> GuardConfig {
        GuardConfig {
            mac: Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]),
            addresses: vec!["10.77.0.2".parse().unwrap()],
            gateways: vec!["10.77.0.1".parse().unwrap()],
            gateway_mac: None,
            mode: Mode::Filtered,
            allow: vec!["udp:192.0.2.10:51820".parse().unwrap()],
            egress: Limits::default(),
            ingress: Limits::default(),
            lease: None,
            owner: None,
        }
    }

    async fn is_woken(post: &Post) -> bool {
        timeout(LONG, post.due()).await.is_ok()
    }

    /// A guest's task, its guard and its log, in a runtime of their own.
    async fn is_woken_for_cause_alone() {
        let tap = Tap::create("omround").unwrap();
        let guard = Guard::attach(tap.name(), &config()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let files = RunFiles::within(directory.path());
        let mut log = std::fs::File::create(&files.console_log).unwrap();
        let logs = Logs::of(&files);
        let watch = Arc::new(GuardWatch::begin(&guard).unwrap());
        let lease = Some(Duration::from_secs(3600));
        let post = Post::join(Arc::clone(&watch), lease, &logs);

        assert!(!is_woken(&post).await, "nothing has happened");
        assert!(guard.status().unwrap().lease.is_some(), "it is renewed");
        log.write_all(b"a word").unwrap();
        assert!(is_woken(&post).await, "it has printed");
        assert!(is_woken(&post).await, "nobody has read that");
        let (_, seen) = logs.console();
        seen.store(6, Ordering::Relaxed);
        // One may be left of the round before.
        is_woken(&post).await;
        assert!(!is_woken(&post).await, "it is read");
        let other = Guard::open(tap.name()).unwrap();
        other.allow(&["udp:192.0.2.11:1".parse().unwrap()]).unwrap();
        assert!(is_woken(&post).await, "its policy is another");

        // The last one takes the round with it, and the next begins one anew.
        drop(post);
        let runtime = Handle::current().id();
        let is_over = || !ROUNDS.lock().unwrap().contains_key(&runtime);
        while !is_over() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let post = Post::join(watch, lease, &logs);
        assert!(is_woken(&post).await, "it is looked at again");
        guard.detach().unwrap();
    }

    #[test]
    fn a_guests_task_is_woken_where_its_guard_or_its_log_is_not_as_it_was_and_else_not() {
        let namespace = Namespace::new("round").expect("a namespace takes root");
        let test = || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(is_woken_for_cause_alone());
            drop(runtime);
        };
        namespace.enter(test).unwrap();
    }
}
