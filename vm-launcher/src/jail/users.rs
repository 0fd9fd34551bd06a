//! The processes of a user that is one guest's alone.

use std::fmt;
use std::fs;
use std::io;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use crate::process::Pidfd;

const BETWEEN: Duration = Duration::from_millis(2);

/// Kills every process of a user's, and tells whether none is left after `patience` at most.
pub(super) fn kill_all(uid: u32, patience: Duration) -> bool {
    let end = Instant::now() + patience;
    loop {
        let Ok(pids) = processes_of(uid) else {
            return false;
        };
        if pids.is_empty() {
            return true;
        }
        for pid in pids {
            // Opened before it is looked at again: what is signalled is the user's, or dead.
            if let Ok(process) = Pidfd::open(pid)
                && is_of(pid, uid)
                && let Err(error) = process.signal(libc::SIGKILL)
            {
                tracing::warn!(%pid, %error, "cannot kill what a guest left running");
            }
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(BETWEEN);
    }
}

/// Whether any process is a user's.
pub(super) fn has_any(uid: u32) -> io::Result<bool> {
    processes_of(uid).map(|pids| !pids.is_empty())
}

fn processes_of(uid: u32) -> io::Result<Vec<Pid>> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        if let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok())
            && is_of(pid, uid)
        {
            pids.push(Pid::from_raw(pid));
        }
    }
    Ok(pids)
}

/// Whether a process lives and any of its user's numbers is `uid`.
pub(super) fn is_of(pid: impl fmt::Display, uid: u32) -> bool {
    let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else {
        return false;
    };
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
    let is_dead = field("State:").is_some_and(|state| {
        let state = state.trim_start();
        state.starts_with('Z') || state.starts_with('X')
    });
    let has = |ids: &str| ids.split_whitespace().any(|id| id.parse() == Ok(uid));
    !is_dead && field("Uid:").is_some_and(has)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    #[test]
    fn every_process_of_the_user_is_killed_and_no_other() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: to start a process of another user takes root");
            return;
        }
        let uid = 1_899_999_000 + std::process::id() % 997;
        let sleep = |uid| Command::new("sleep").arg("60").uid(uid).spawn().unwrap();
        let (mut ours, mut other) = (sleep(uid), sleep(uid + 1));
        assert!(kill_all(uid, Duration::from_secs(5)));
        assert_eq!(ours.wait().unwrap().code(), None, "killed");
        assert!(other.try_wait().unwrap().is_none(), "lives on");
        other.kill().unwrap();
        other.wait().unwrap();
    }
}
