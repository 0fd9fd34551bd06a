//! What omertad keeps of memory that it does not use any more.
//!
//! glibc keeps what was given back, for each thread's arena apart, and a guest's start takes a thousand times what a
//! guest that runs does: its guard's programs are read, relocated and loaded.

use std::time::Duration;

use nix::libc::{M_ARENA_MAX, M_TRIM_THRESHOLD, c_int, mallopt};
use tokio::sync::watch::Receiver;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// Arenas for all threads: those that start guests wait for the kernel most of their time, not for each other.
const ARENAS: c_int = 2;
/// How many free bytes at the end of the heap are kept.
const KEPT: c_int = 128 << 10;
/// How long nothing may be told of any guest before what they have left is given back.
const QUIET: Duration = Duration::from_secs(3);

/// Bounds what is kept, and tells whether it is. To be called before there are threads, whose arenas it is about.
#[allow(unsafe_code)]
pub(crate) fn bound() -> bool {
    [(M_ARENA_MAX, ARENAS), (M_TRIM_THRESHOLD, KEPT)]
        .into_iter()
        // SAFETY: mallopt(3) takes two numbers, and no other thread is there to allocate meanwhile.
        .all(|(what, value)| unsafe { mallopt(what, value) } == 1)
}

/// Gives back what is free, each time that guests have stopped to come and go. `events` changes with each of theirs.
pub(crate) async fn give_back(mut events: Receiver<u64>) {
    while events.changed().await.is_ok() {
        while let Ok(more) = timeout(QUIET, events.changed()).await {
            if more.is_err() {
                return;
            }
        }
        // It holds each arena's lock for some milliseconds; threads that run guests' tasks allocate little.
        let _ = spawn_blocking(trim).await;
    }
}

#[allow(unsafe_code)]
fn trim() {
    // SAFETY: malloc_trim(3) takes a number, and may be called by any thread at any time.
    unsafe { nix::libc::malloc_trim(0) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    const BLOCKS: usize = 100_000;
    /// A good part of what the blocks take: other tests allocate meanwhile.
    const MUCH: u64 = 60 << 20;

    fn resident() -> u64 {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
        pages * 4096
    }

    #[tokio::test]
    async fn what_is_free_is_given_back_when_guests_have_stopped_to_come_and_go() {
        let (events, receiver) = tokio::sync::watch::channel(0);
        tokio::spawn(give_back(receiver));
        let mut blocks: Vec<_> = (0..BLOCKS).map(|_| Box::new([1_u8; 1000])).collect();
        let full = resident();
        // The end of the heap is in use: nothing shrinks by itself.
        let last = blocks.pop();
        drop(blocks);
        let began = Instant::now();
        while began.elapsed() < QUIET + Duration::from_secs(1) {
            events.send_modify(|number| *number += 1);
            assert!(
                resident() > full - MUCH,
                "glibc keeps it, and guests come and go"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        while resident() > full - MUCH {
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "nothing is given back"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        drop(last);
    }
}
