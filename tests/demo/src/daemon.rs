//! omertad on the stage.

use std::fs::{self, File};
use std::net::SocketAddrV4;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use omerta_test_support::{Namespace, Orphans, Process};

use crate::bounded;
use crate::interrupt;
use crate::omerta::Omerta;
use crate::report::Report;
use crate::requirements::Requirements;

/// Where omertad serves its metrics, inside the provider's namespace.
pub const METRICS: SocketAddrV4 = SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, 9469);

/// How long omertad may take to end its guests and itself.
const ENDING: Duration = Duration::from_secs(10);

/// How long omertad may take to answer after another that died.
const READY: Duration = Duration::from_secs(60);

/// omertad and its command line. Ended, with all its guests, on drop.
pub struct Daemon<'a> {
    pub omerta: Omerta<'a>,
    process: Option<Process>,
    /// After the process: what it had no time to end.
    _orphans: Orphans,
    log: PathBuf,
    omertad: PathBuf,
    directory: PathBuf,
    image_dir: PathBuf,
}

impl<'a> Daemon<'a> {
    /// Starts omertad in the provider's namespace. It probes the host before it answers.
    pub fn start(
        requirements: &Requirements,
        provider: &'a Namespace,
        directory: &Path,
    ) -> Result<Self> {
        let omerta = Omerta {
            namespace: provider,
            binary: requirements.omerta.clone(),
            socket: directory.join("omertad.sock"),
        };
        let mut daemon = Self {
            omerta,
            process: None,
            _orphans: Orphans::below(directory),
            log: directory.join("omertad.log"),
            omertad: requirements.omertad.clone(),
            directory: directory.to_owned(),
            image_dir: requirements.image_dir.clone(),
        };
        daemon.process = Some(daemon.spawn()?);
        Ok(daemon)
    }

    fn spawn(&self) -> Result<Process> {
        let log = &self.log;
        let output = File::options().create(true).append(true).open(log);
        let output = output.with_context(|| format!("cannot open {}", log.display()))?;
        let errors = output
            .try_clone()
            .context("cannot share the log of omertad")?;
        let provider = self.omerta.namespace;
        let mut command = provider.command(&self.omertad.to_string_lossy());
        command
            .arg("--socket")
            .arg(&self.omerta.socket)
            .arg("--state-dir")
            .arg(self.directory.join("state"))
            .arg("--run-dir")
            .arg(self.directory.join("run"))
            .arg("--image-dir")
            .arg(&self.image_dir)
            .args(["--metrics", &METRICS.to_string()])
            .args(["--guest-pool", "10.77.0.0/16"])
            .args(["--on-violation", "alert"])
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors);
        Ok(Process::spawn(command)?)
    }

    /// Kills omertad, as a crash would, and starts the next, which is ready when this returns. Its guests live on. Tells how
    /// long it took from the one's end to the other's first answer.
    pub fn kill_and_restart(&mut self) -> Result<Duration> {
        if let Some(process) = &mut self.process {
            process.signal(Signal::SIGKILL)?;
            process.wait(ENDING)?;
        }
        let killed = Instant::now();
        self.process = Some(self.spawn()?);
        // It listens before it has taken over its guests, and answers after.
        while self.omerta.run(&["vm", "list"]).is_err() {
            if let Some(status) = self
                .process
                .as_mut()
                .map(Process::ended)
                .transpose()?
                .flatten()
            {
                bail!(
                    "the next omertad ended at once ({status}): {}",
                    last_words(&self.log)
                );
            }
            if killed.elapsed() > READY {
                bail!(
                    "the next omertad does not answer: {}",
                    last_words(&self.log)
                );
            }
            interrupt::sleep(Duration::from_millis(20))?;
        }
        Ok(killed.elapsed())
    }

    /// Waits until omertad answers.
    pub fn ready(&mut self, report: &Report) -> Result<()> {
        report.wait("omertad probes the host", Duration::from_secs(60), || {
            if UnixStream::connect(&self.omerta.socket).is_ok() {
                return Ok(Some(()));
            }
            match self
                .process
                .as_mut()
                .map(Process::ended)
                .transpose()?
                .flatten()
            {
                Some(status) => bail!(
                    "omertad ended at once ({status}): {}",
                    last_words(&self.log)
                ),
                None => Ok(None),
            }
        })
    }

    fn end(&mut self) {
        // A drop cannot report; what is left is found by the last check.
        if let Some(process) = &mut self.process {
            let _ = process.signal(Signal::SIGTERM);
            let _ = process.wait(ENDING);
        }
        self.process = None;
        for interface in self.unbounded_guarded() {
            let _ = self
                .omerta
                .namespace
                .ip(&format!("link delete {interface}"));
        }
    }

    /// The guarded interfaces, also after an interrupt, where no bounded command runs any more.
    fn unbounded_guarded(&self) -> Vec<String> {
        let run = |arguments: &[&str]| {
            let mut command = self
                .omerta
                .namespace
                .command(&self.omerta.binary.to_string_lossy());
            command.args(arguments).stdin(Stdio::null()).output()
        };
        let Ok(listed) = run(&["guard", "list"]) else {
            return Vec::new();
        };
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let interfaces: Vec<_> = listed
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .map(str::to_owned)
            .collect();
        for interface in &interfaces {
            let _ = run(&["guard", "detach", interface]);
        }
        interfaces
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

/// The end of a log, in one line.
fn last_words(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let last = text
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("it said nothing");
    bounded::one_line(last, 300)
}
