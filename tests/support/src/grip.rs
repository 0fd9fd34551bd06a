//! Keeping a process from ending.

use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::libc;

use crate::StageError;

/// Keeps a process from ending, SIGKILL or not, as a stuck kernel would: it is traced, and stops on
/// its way out until it is let go, which dropping this does.
#[derive(Debug)]
pub struct Grip {
    release: Option<mpsc::Sender<()>>,
    tracer: Option<JoinHandle<()>>,
}

impl Grip {
    /// Takes hold of the process.
    ///
    /// # Errors
    /// Where it does not exist, or may not be traced.
    pub fn on(pid: u32) -> Result<Self, StageError> {
        let (release, released) = mpsc::channel::<()>();
        let (seized, is_seized) = mpsc::channel();
        // A tracee belongs to the thread that seized it, and is let go when that thread ends.
        let tracer = thread::spawn(move || {
            // SAFETY: PTRACE_SEIZE takes a pid, nothing, and the options as a number.
            let result = unsafe {
                libc::ptrace(
                    libc::PTRACE_SEIZE,
                    pid as libc::pid_t,
                    0usize,
                    libc::PTRACE_O_TRACEEXIT as usize,
                )
            };
            let _ = seized.send(Errno::result(result).map(drop));
            let _ = released.recv();
        });
        let seized = is_seized.recv().unwrap_or(Err(Errno::ESRCH));
        seized.map_err(|errno| StageError::Process {
            action: "trace",
            program: format!("process {pid}"),
            source: errno.into(),
        })?;
        Ok(Self {
            release: Some(release),
            tracer: Some(tracer),
        })
    }
}

impl Drop for Grip {
    fn drop(&mut self) {
        drop(self.release.take());
        if let Some(tracer) = self.tracer.take() {
            let _ = tracer.join();
        }
    }
}
