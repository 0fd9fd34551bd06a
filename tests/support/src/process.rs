//! A process that does not outlive its owner.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::StageError;

/// A process in a process group of its own, so that the terminal's Ctrl-C reaches only the owner.
/// Its whole group is killed, and it is reaped, on drop.
#[derive(Debug)]
pub struct Process {
    program: String,
    child: Child,
}

impl Process {
    /// Starts `command`.
    ///
    /// # Errors
    /// Where the program is missing or cannot be run.
    pub fn spawn(mut command: Command) -> Result<Self, StageError> {
        let program = command.get_program().to_string_lossy().into_owned();
        match command.process_group(0).spawn() {
            Ok(child) => Ok(Self { program, child }),
            Err(source) => Err(StageError::Process {
                action: "start",
                program,
                source,
            }),
        }
    }

    /// The process id, which is also its group's.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Sends a signal to the whole group. A group that is gone is no error.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn signal(&self, signal: Signal) -> Result<(), StageError> {
        let group = Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(i32::MAX));
        match killpg(group, signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(self.failed("signal", errno.into())),
        }
    }

    /// How the process ended; `None` while it runs.
    ///
    /// # Errors
    /// Where the kernel does not answer.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>, StageError> {
        self.child.try_wait().map_err(|source| StageError::Process {
            action: "wait for",
            program: self.program.clone(),
            source,
        })
    }

    /// Waits for the process to end by itself; `None` if it still runs at the deadline.
    ///
    /// # Errors
    /// Where the kernel does not answer.
    pub fn wait(&mut self, timeout: Duration) -> Result<Option<ExitStatus>, StageError> {
        let deadline = Instant::now() + timeout;
        loop {
            let ended = self.ended()?;
            if ended.is_some() || Instant::now() >= deadline {
                return Ok(ended);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Asks the process to end with SIGTERM, and kills it at the deadline.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn stop(mut self, timeout: Duration) -> Result<ExitStatus, StageError> {
        self.signal(Signal::SIGTERM)?;
        if let Some(status) = self.wait(timeout)? {
            return Ok(status);
        }
        self.signal(Signal::SIGKILL)?;
        self.child
            .wait()
            .map_err(|source| self.failed("wait for", source))
    }

    fn failed(&self, action: &'static str, source: std::io::Error) -> StageError {
        StageError::Process {
            action,
            program: self.program.clone(),
            source,
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The group may live on after its leader, so it is killed in any case; a drop cannot report.
        let _ = self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }
}
