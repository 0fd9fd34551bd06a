//! Whether every thread of a process that was sent SIGSTOP stands still.
//!
//! The kernel tells a parent alone, and QEMU may be another's child. So its threads are looked at: one that is stopped makes no
//! other, and what was made before it stopped is in the next list. Two lists in a row that are the same, of threads that had all
//! stopped when the first was made, are all there are.

use std::io;

/// The threads of a process, where all of them have stopped.
pub(crate) fn stopped_threads(pid: u32) -> io::Result<Option<Vec<u32>>> {
    let mut threads = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        let Some(thread) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        match std::fs::read_to_string(entry.path().join("stat")) {
            Ok(stat) if stands_still(&stat) => threads.push(thread),
            Ok(_) => return Ok(None),
            // It has ended since it was listed.
            Err(_) => {}
        }
    }
    threads.sort_unstable();
    Ok(Some(threads))
}

/// Whether a thread runs nothing, by its proc_pid_stat(5): stopped by a signal, or dead. What a debugger holds may be let go.
fn stands_still(stat: &str) -> bool {
    // The name before it, in parentheses, may hold anything.
    let state = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().next());
    matches!(state, Some("T" | "Z" | "X"))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};
    use std::time::{Duration, Instant};

    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    use super::*;

    struct Busy(Child);

    impl Drop for Busy {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_process_has_stopped_when_it_was_told_to_and_not_before() {
        let mut command = Command::new("sh");
        let busy = Busy(command.args(["-c", "while :; do :; done"]).spawn().unwrap());
        let pid = busy.0.id();
        assert_eq!(stopped_threads(pid).unwrap(), None);
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGSTOP).unwrap();
        let until = Instant::now() + Duration::from_secs(10);
        while stopped_threads(pid).unwrap() != Some(vec![pid]) {
            assert!(Instant::now() < until, "it does not stop");
        }
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGCONT).unwrap();
        while stopped_threads(pid).unwrap().is_some() {
            assert!(Instant::now() < until, "it does not run on");
        }
    }

    #[test]
    fn the_name_of_a_thread_is_not_taken_for_its_state() {
        assert!(stands_still("7 (a) R) T 1 7"));
        assert!(!stands_still("7 (a) T) R 1 7"));
        for other in ["", "7", "7 (a)", "7 (a) t 1", "7 (a) D 1", "7 (a) S 1"] {
            assert!(!stands_still(other), "{other}");
        }
    }
}
