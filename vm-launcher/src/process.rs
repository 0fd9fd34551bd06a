//! QEMU's process: started so that it outlives the launcher only where it is to, held by its pidfd so
//! that a recycled pid is never signalled, and reaped exactly once.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

use crate::command::QEMU;
use crate::jail::{Entry, MAX_DESCRIPTORS, Step, confine};
use crate::standstill::stopped_threads;

/// How often it is looked at in a row whether QEMU has stopped, and how long apart from then on.
const STOP_LOOKS: u32 = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(1);

/// How QEMU ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// It exited by itself, with this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
    /// It ended, and only who has reaped it knows how: it was started by a launcher that is dead.
    Unknown,
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::Unknown => f.write_str("how, is not known"),
        }
    }
}

/// Why QEMU's process could not be started or watched.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// QEMU is not installed.
    #[error("{QEMU} is not installed; run `make setup` or `apt-get install qemu-system-x86`")]
    QemuMissing,
    /// QEMU could not be started.
    #[error(
        "cannot start {QEMU} in its jail; where its libraries lie elsewhere than a distribution has them, name them by `paths` in [jail]"
    )]
    Spawn(#[source] io::Error),
    /// The process that was to be QEMU could not get into its jail.
    #[error("cannot jail {QEMU}: it cannot {step}")]
    Jail {
        /// What failed.
        step: Step,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// QEMU ended before it was told to.
    #[error("{QEMU} ended at once ({status}): {said}; {}", remedy(*status))]
    EndedEarly {
        /// How it ended.
        status: ExitStatus,
        /// The last line it printed, or what to look at.
        said: String,
    },
    /// The system would not let us watch or signal the process.
    #[error("cannot {action} {QEMU}")]
    Watch {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The process of that pid is not the one that was meant, or there is none.
    #[error("{QEMU} (pid {pid}) is gone")]
    Gone {
        /// Its pid.
        pid: u32,
    },
    /// QEMU was killed and yet is still there.
    #[error("{QEMU} (pid {pid}) did not die of SIGKILL; the kernel may be stuck: see `dmesg`")]
    Unkillable {
        /// Its pid.
        pid: u32,
    },
}

/// What to do about a QEMU that ended at once.
fn remedy(status: ExitStatus) -> &'static str {
    match status {
        ExitStatus::Code(_) => {
            "give it what it lacks: free memory, a sound image (`make image`), an accelerator that works (`omerta doctor`)"
        }
        ExitStatus::Signal(_) | ExitStatus::Unknown => {
            "see `dmesg` for who killed it; where memory ran out, free some or give the guest less"
        }
    }
}

impl ProcessError {
    fn watch(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Watch { action, source }
    }
}

/// A running QEMU. Dropping it kills and reaps it.
#[derive(Debug)]
pub(crate) struct QemuProcess {
    pid: u32,
    start: u64,
    pidfd: AsyncFd<Pidfd>,
    /// Whether it is ours to reap.
    is_child: bool,
    ended: Mutex<Option<ExitStatus>>,
    /// It did not die of SIGKILL in time, so that waiting again would change nothing; or it is to live on.
    given_up: AtomicBool,
}

impl QemuProcess {
    /// Starts `program` with `arguments` in the jail of `entry`, what it prints going to `output`. Its
    /// environment names the run directory, for whoever looks for the guest of a process.
    pub(crate) fn spawn(
        program: &Path,
        arguments: &[OsString],
        entry: Entry,
        output: OwnedFd,
        run_dir: &Path,
    ) -> Result<Self, ProcessError> {
        let mut command = command(program.as_ref(), arguments, output)?;
        command.env("OMERTA_RUN_DIR", run_dir);
        let parent = std::process::id();
        let (told, tell) = std::io::pipe().map_err(ProcessError::Spawn)?;
        // SAFETY: `enter` only makes system calls, and allocates nothing.
        unsafe { command.pre_exec(move || entry.enter(parent, tell.as_fd())) };
        Self::begin(command).map_err(|error| match (error, step_told(told)) {
            (ProcessError::Spawn(source), Some(step)) => ProcessError::Jail { step, source },
            (error, _) => error,
        })
    }

    /// Starts QEMU for a probe, which runs nothing of a consumer's: as root, with no network and
    /// nothing of ours.
    pub(crate) fn spawn_probe(
        arguments: &[OsString],
        output: OwnedFd,
    ) -> Result<Self, ProcessError> {
        let mut command = command(QEMU.as_ref(), arguments, output)?;
        command.envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        let parent = std::process::id();
        // SAFETY: `confine` only makes system calls, and allocates nothing.
        unsafe { command.pre_exec(move || confine(parent)) };
        Self::begin(command).map_err(|error| match error {
            ProcessError::Spawn(source) if source.kind() == io::ErrorKind::NotFound => {
                ProcessError::QemuMissing
            }
            error => error,
        })
    }

    fn begin(command: Command) -> Result<Self, ProcessError> {
        let mut child = spawn_from_lasting_thread(command).map_err(ProcessError::Spawn)?;
        match watch(child.id()) {
            Ok((pidfd, start)) => Ok(Self {
                pid: child.id(),
                start,
                pidfd,
                is_child: true,
                ended: Mutex::new(None),
                given_up: AtomicBool::new(false),
            }),
            Err(source) => {
                // Without a pidfd the child handle still names exactly this process.
                let _ = child.kill();
                let _ = child.wait();
                Err(ProcessError::Watch {
                    action: "watch",
                    source,
                })
            }
        }
    }

    /// The QEMU that a dead launcher left, if it is that one still: the kernel gives its pid to others.
    pub(crate) fn adopt(pid: u32, start: u64) -> Result<Self, ProcessError> {
        match watch(pid) {
            Ok((pidfd, started)) if started == start => Ok(Self {
                pid,
                start,
                pidfd,
                is_child: false,
                ended: Mutex::new(None),
                given_up: AtomicBool::new(false),
            }),
            Ok(_) => Err(ProcessError::Gone { pid }),
            Err(error) if is_no_process(&error) => Err(ProcessError::Gone { pid }),
            Err(source) => Err(ProcessError::Watch {
                action: "watch",
                source,
            }),
        }
    }

    /// Lets it live on.
    pub(crate) fn let_go(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// QEMU's pid.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Copies of all that it has open. By its pidfd, which takes CAP_SYS_PTRACE: `/proc/PID/fd` is its user's,
    /// and would take a capability to get around every file's mode.
    pub(crate) fn descriptors(&self) -> io::Result<Vec<OwnedFd>> {
        let mut all = Vec::new();
        for number in 0..MAX_DESCRIPTORS as RawFd {
            match self.pidfd.get_ref().descriptor(number) {
                Ok(descriptor) => all.push(descriptor),
                Err(error) if error.raw_os_error() == Some(Errno::EBADF as i32) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// Whether this process started it.
    pub(crate) fn is_child(&self) -> bool {
        self.is_child
    }

    /// When it started, as `/proc/PID/stat` tells: with the pid, it is no other process's.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Waits until QEMU has ended, and reaps it. Safe to cancel; any number may wait.
    pub(crate) async fn wait(&self) -> Result<ExitStatus, ProcessError> {
        loop {
            if let Some(status) = self.try_reap()? {
                return Ok(status);
            }
            let mut ready = self
                .pidfd
                .readable()
                .await
                .map_err(ProcessError::watch("wait for"))?;
            if let Some(status) = self.try_reap()? {
                return Ok(status);
            }
            ready.clear_ready();
        }
    }

    /// Sends SIGKILL. Not an error if QEMU has already ended.
    pub(crate) fn kill(&self) -> Result<(), ProcessError> {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if ended.is_some() {
            return Ok(());
        }
        let killed = self.pidfd.get_ref().signal(libc::SIGKILL);
        killed.map_err(ProcessError::watch("kill"))
    }

    /// Stops all of QEMU's threads by SIGSTOP, whatever QEMU or its guest is at, and returns when each stands still. It runs on
    /// by SIGCONT alone, which nobody sends. Safe to cancel.
    pub(crate) async fn halt(&self) -> Result<(), ProcessError> {
        let gone = || ProcessError::Gone { pid: self.pid };
        if self.try_reap()?.is_some() {
            return Err(gone());
        }
        let pidfd = self.pidfd.get_ref();
        pidfd
            .signal(libc::SIGSTOP)
            .map_err(ProcessError::watch("stop"))?;
        let mut looks = 0;
        let mut before = None;
        loop {
            let threads = stopped_threads(self.pid).map_err(ProcessError::watch("look at"))?;
            if threads.is_some() && threads == before {
                break;
            }
            looks += 1;
            // The kernel takes microseconds, but for a thread that waits for a disk.
            if threads.is_none() && looks > STOP_LOOKS {
                sleep(BETWEEN_LOOKS).await;
            }
            before = threads;
        }
        // The number was its own until now, so its threads were.
        let ended = pidfd.has_ended(PollTimeout::ZERO);
        match ended.map_err(ProcessError::watch("watch"))? {
            true => Err(gone()),
            false => Ok(()),
        }
    }

    /// Kills QEMU and waits, blocking the thread, until it is reaped or `deadline` has passed.
    pub(crate) fn kill_and_reap(&self, deadline: Duration) -> Result<ExitStatus, ProcessError> {
        self.kill()?;
        if let Some(status) = self.try_reap()? {
            return Ok(status);
        }
        let timeout = PollTimeout::try_from(deadline).unwrap_or(PollTimeout::MAX);
        let waited = self.pidfd.get_ref().has_ended(timeout);
        waited.map_err(ProcessError::watch("wait for"))?;
        self.try_reap()?.ok_or_else(|| {
            self.given_up.store(true, Ordering::Relaxed);
            ProcessError::Unkillable { pid: self.pid }
        })
    }

    fn try_reap(&self) -> Result<Option<ExitStatus>, ProcessError> {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if ended.is_none() && !self.is_child {
            let gone = self.pidfd.get_ref().has_ended(PollTimeout::ZERO);
            let gone = gone.map_err(ProcessError::watch("watch"))?;
            *ended = gone.then_some(ExitStatus::Unknown);
        }
        if ended.is_none() && self.is_child {
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
            *ended = match waitid(Id::PIDFd(self.pidfd.get_ref().0.as_fd()), flags) {
                Ok(WaitStatus::Exited(_, code)) => Some(ExitStatus::Code(code)),
                Ok(WaitStatus::Signaled(_, signal, _)) => Some(ExitStatus::Signal(signal as i32)),
                Ok(_) | Err(Errno::EINTR) => None,
                Err(errno) => {
                    return Err(ProcessError::Watch {
                        action: "reap",
                        source: errno.into(),
                    });
                }
            };
        }
        Ok(*ended)
    }
}

impl Drop for QemuProcess {
    fn drop(&mut self) {
        if self.given_up.load(Ordering::Relaxed) {
            return; // whoever gave up has said so, or leaves it to others
        }
        if let Err(error) = self.kill_and_reap(Duration::from_secs(5)) {
            tracing::error!(pid = self.pid, %error, "QEMU is left behind");
        }
    }
}

fn command(
    program: &OsStr,
    arguments: &[OsString],
    output: OwnedFd,
) -> Result<Command, ProcessError> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(output.try_clone().map_err(ProcessError::Spawn)?)
        .stderr(output)
        // A terminal's Ctrl-C is for the controller, which ends its guests in order.
        .process_group(0);
    Ok(command)
}

/// Where on its way into the jail a child failed, if it did. All who may tell are gone.
fn step_told(mut told: PipeReader) -> Option<Step> {
    let mut byte = [0];
    told.read_exact(&mut byte).ok()?;
    Step::told(byte[0])
}

/// A process, and no other that may get its number later.
#[derive(Debug)]
pub(crate) struct Pidfd(OwnedFd);

impl Pidfd {
    pub(crate) fn open(pid: Pid) -> io::Result<Self> {
        // SAFETY: no pointer is passed; pidfd_open sets close-on-exec.
        let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
        let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sends a signal. Not an error if it has ended.
    pub(crate) fn signal(&self, signal: libc::c_int) -> io::Result<()> {
        // SAFETY: the pidfd is open as long as `self` lives; a null pointer is allowed.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
        match Errno::result(result) {
            Ok(_) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// A copy of one of its descriptors.
    fn descriptor(&self, number: RawFd) -> io::Result<OwnedFd> {
        // SAFETY: no pointer is passed; pidfd_getfd sets close-on-exec.
        let fd = Errno::result(unsafe {
            libc::syscall(libc::SYS_pidfd_getfd, self.0.as_raw_fd(), number, 0)
        })?;
        let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the kernel has just given us this descriptor; nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Whether it has ended, after `patience` at most.
    fn has_ended(&self, patience: PollTimeout) -> io::Result<bool> {
        let mut watched = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut watched, patience) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsRawFd for Pidfd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Opens a pidfd, and tells when its process started.
fn watch(pid: u32) -> io::Result<(AsyncFd<Pidfd>, u64)> {
    let pidfd = Pidfd::open(Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?))?;
    // Read after: it is this process's, or this process has ended, which its pidfd tells.
    let start = start_of(pid)?;
    // SAFETY: a Pidfd keeps one descriptor open until it is dropped, which here is with the
    // AsyncFd, and always gives the same number.
    let registered =
        unsafe { AsyncFd::register_with_interest(pidfd, tokio::io::Interest::READABLE) };
    Ok((registered.map_err(io::Error::from)?, start))
}

/// When a process started, in clock ticks since the host booted: field 22 of proc_pid_stat(5).
fn start_of(pid: u32) -> io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field, the program's name in parentheses, may hold anything.
    let after_name = stat.rsplit_once(')').map(|(_, rest)| rest);
    after_name
        .and_then(|rest| rest.split_whitespace().nth(19)?.parse().ok())
        .ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat tells no start")))
}

fn is_no_process(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ESRCH as i32)
}

struct Job {
    command: Command,
    reply: mpsc::Sender<io::Result<Child>>,
}

/// PR_SET_PDEATHSIG fires when the *thread* that forked ends. Worker threads come and go, so all
/// children are forked from one thread that lasts as long as the process.
///
/// This blocks for the milliseconds of a fork; being synchronous, it cannot be cancelled between
/// the fork and our knowing the child.
fn spawn_from_lasting_thread(command: Command) -> io::Result<Child> {
    let gone = || io::Error::other("the thread that starts QEMU has gone");
    let (reply, child) = mpsc::channel();
    let spawner = spawner().ok_or_else(gone)?;
    spawner.send(Job { command, reply }).map_err(|_| gone())?;
    child.recv().map_err(|_| gone())?
}

/// Begins the thread that all QEMUs are children of, where it has not begun. It is for ever in the namespaces of the thread that
/// first calls this, or starts a guest.
pub fn begin_to_spawn() {
    // Where it cannot be had, the first guest tells.
    let _ = spawner();
}

fn spawner() -> Option<&'static mpsc::Sender<Job>> {
    static SPAWNER: OnceLock<Option<mpsc::Sender<Job>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, received) = mpsc::channel::<Job>();
        let run = move || {
            for Job { mut command, reply } in received {
                let spawned = command.spawn();
                // What QEMU was handed is its alone from here on.
                drop(command);
                let _ = reply.send(spawned);
            }
        };
        std::thread::Builder::new()
            .name("qemu-spawner".into())
            .spawn(run)
            .ok()
            .map(|_| jobs)
    });
    spawner.as_ref()
}

/// The last thing QEMU printed, bounded and printable, or where to look.
pub(crate) fn last_words(log: &Path) -> String {
    let said = std::fs::read(log).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    match said.lines().rev().find(|line| !line.trim().is_empty()) {
        Some(line) => line.chars().filter(|c| !c.is_control()).take(300).collect(),
        None => "it printed nothing".to_owned(),
    }
}
