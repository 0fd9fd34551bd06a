//! omertad in a namespace of its own, with guests that say little.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use omerta_dataplane::Guard;
use omerta_test_support::{Namespace, Orphans, Process};

use crate::machine::beside;

const KEY: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";
/// How long omertad may take to end its guests and itself.
const ENDING: Duration = Duration::from_secs(60);

pub struct Provider {
    namespace: Namespace,
    /// Until it is ended.
    omertad: Option<Process>,
    /// After the process: what it had no time to end.
    _orphans: Orphans,
    pid: u32,
    directory: PathBuf,
    images: PathBuf,
    omerta: PathBuf,
    guests: Cell<u32>,
}

impl Provider {
    /// Starts omertad from beside this program.
    pub fn start(directory: &Path, images: &Path) -> Result<Self> {
        let namespace = Namespace::new("launch")?;
        namespace.enable_forwarding()?;
        let log = fs::File::create(directory.join("omertad.log")).context("cannot write a log")?;
        // More guests than processors like these should have; they do nothing.
        let config = directory.join("omertad.toml");
        fs::write(&config, "max_vcpus = 256\n").context("cannot write a configuration")?;
        let mut command = namespace.command(&beside("omertad")?.to_string_lossy());
        command
            .arg("--config")
            .arg(config)
            .arg("--socket")
            .arg(directory.join("omertad.sock"))
            .arg("--run-dir")
            .arg(directory.join("run"))
            .arg("--state-dir")
            .arg(directory.join("state"))
            .arg("--image-dir")
            .arg(images)
            .args(["--metrics", "off"])
            .stdin(Stdio::null())
            .stderr(log);
        let omertad = Process::spawn(command)?;
        let provider = Self {
            pid: omertad.pid(),
            omertad: Some(omertad),
            _orphans: Orphans::below(directory),
            omerta: beside("omerta")?,
            namespace,
            directory: directory.to_owned(),
            images: images.to_owned(),
            guests: Cell::new(0),
        };
        let started = Instant::now();
        while !provider
            .ask(&["version", "-o", "json"])?
            .contains("\"pid\"")
        {
            if started.elapsed() > Duration::from_secs(60) {
                bail!("omertad does not answer");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(provider)
    }

    pub fn images(&self) -> &Path {
        &self.images
    }

    pub fn command(&self, program: &str) -> Command {
        self.namespace.command(program)
    }

    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        Ok(self.namespace.enter(work)?)
    }

    fn omerta(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.omerta);
        command
            .arg("--socket")
            .arg(self.directory.join("omertad.sock"))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    fn ask(&self, arguments: &[&str]) -> Result<String> {
        let output = self
            .omerta(arguments)
            .output()
            .context("cannot run omerta")?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn run_command(&self, name: &str, image: &str, memory_mib: u32) -> Command {
        let consumer = format!("{KEY}@192.0.2.10:51820");
        let memory = memory_mib.to_string();
        let mut command = self.omerta(&["vm", "run", "--name", name, "--image", image]);
        command
            .args(["--memory", &memory, "--consumer", &consumer])
            .stdout(Stdio::null());
        command
    }

    fn next_name(&self) -> String {
        self.guests.set(self.guests.get() + 1);
        format!("g{}", self.guests.get())
    }

    /// Runs a guest; returns when `omerta vm run` does.
    pub fn run(&self, image: &str, memory_mib: u32) -> Result<Guest<'_>> {
        self.run_with(image, memory_mib, &[])
    }

    /// The same, with more arguments.
    pub fn run_with(&self, image: &str, memory_mib: u32, more: &[&str]) -> Result<Guest<'_>> {
        let name = self.next_name();
        let status = self
            .run_command(&name, image, memory_mib)
            .args(more)
            .status();
        let guest = Guest {
            log: self.directory.join("run").join(&name).join("console.log"),
            provider: self,
            name,
        };
        if !status.context("cannot run omerta")?.success() {
            bail!("guest {} was not run", guest.name);
        }
        Ok(guest)
    }

    /// Runs `count` guests at once, which then live on. Gives the seconds until all run, and how many
    /// taps were looked at meanwhile and found up; one that is up without its guard fails.
    pub fn many_at_once(&self, count: usize, image: &str) -> Result<(f64, usize)> {
        let names: Vec<String> = (0..count).map(|_| self.next_name()).collect();
        let started = Instant::now();
        let mut starting: Vec<Child> = Vec::with_capacity(count);
        for name in &names {
            let child = self.run_command(name, image, 64).spawn();
            starting.push(child.context("cannot run omerta")?);
        }
        let mut looks = 0;
        while !starting.is_empty() {
            looks += self.enter(guarded_taps)??;
            let mut waiting = Vec::with_capacity(starting.len());
            for mut child in starting {
                match child.try_wait().context("cannot wait for omerta")? {
                    None => waiting.push(child),
                    Some(status) if status.success() => {}
                    Some(status) => bail!("a guest of {count} was not run: {status}"),
                }
            }
            starting = waiting;
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok((started.elapsed().as_secs_f64(), looks))
    }

    /// What omertad holds of memory.
    pub fn resident_mib(&self) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.split_whitespace().next())
            .context("no VmRSS")?;
        Ok(kib.parse::<f64>()? / 1024.0)
    }

    /// The share of a core that omertad takes while nothing is asked of it, in percent.
    pub fn processor_share(&self, span: Duration) -> Result<f64> {
        let pid = Pid::from_raw(i32::try_from(self.pid)?);
        // To the nanosecond, and of threads that have ended too; `stat` counts hundredths of a second.
        let clock = clock_getcpuclockid(pid).context("no clock of omertad's")?;
        let before = Duration::from(clock.now()?);
        std::thread::sleep(span);
        let spent = Duration::from(clock.now()?) - before;
        Ok(spent.as_secs_f64() / span.as_secs_f64() * 100.0)
    }

    /// What a QEMU holds beside its guest's memory: the mean over all, each page shared among those
    /// who share it (PSS), in MiB.
    pub fn qemu_beside_guest_mib(&self, memory_mib: u64) -> Result<f64> {
        let mut held = Vec::new();
        for name in (1..=self.guests.get()).map(|n| format!("g{n}")) {
            if let Ok(pid) = self.qemu_of(&name) {
                held.push(beside_guest_mib(pid, memory_mib)?);
            }
        }
        if held.is_empty() {
            bail!("no QEMU is there");
        }
        Ok(held.iter().sum::<f64>() / held.len() as f64)
    }

    fn qemu_of(&self, name: &str) -> Result<u32> {
        let wanted = format!("guest={name},process=omerta:{name}");
        for entry in fs::read_dir("/proc")?.flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
                continue;
            };
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let is_child = fs::read_to_string(entry.path().join("stat"))
                .is_ok_and(|stat| parent_of(&stat) == Some(self.pid));
            if is_child
                && command
                    .split(|b| *b == 0)
                    .any(|word| word == wanted.as_bytes())
            {
                return Ok(pid);
            }
        }
        bail!("no QEMU of guest {name}")
    }

    /// Ends omertad and all its guests.
    pub fn end(mut self) -> Result<()> {
        let omertad = self.omertad.take().context("omertad has ended")?;
        let status = omertad.stop(ENDING)?;
        if !status.success() {
            bail!("omertad ended with {status}");
        }
        Ok(())
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        // Killed, it would leave its guests' guards behind.
        if let Some(omertad) = self.omertad.take()
            && let Err(error) = omertad.stop(ENDING)
        {
            eprintln!("bench: {error}");
        }
    }
}

fn parent_of(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

fn beside_guest_mib(pid: u32, memory_mib: u64) -> Result<f64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut total, mut guest_kib, mut is_guest) = (0.0, 0.0, false);
    let kib = |line: &str| {
        line.split_whitespace()
            .nth(1)
            .and_then(|n| n.parse::<f64>().ok())
    };
    for line in maps.lines() {
        if line.starts_with("Size:") {
            is_guest = kib(line) == Some((memory_mib << 10) as f64);
        } else if line.starts_with("Pss:") {
            let pss = kib(line).context("no figure in smaps")?;
            total += pss;
            if is_guest {
                guest_kib += pss;
            }
        }
    }
    Ok((total - guest_kib) / 1024.0)
}

/// How many guests' taps are up, each of which has its guard.
fn guarded_taps() -> Result<usize> {
    let mut up = 0;
    // Each is told once for each of its addresses.
    let taps: BTreeSet<String> = nix::ifaddrs::getifaddrs()?
        .filter(|entry| entry.flags.contains(nix::net::if_::InterfaceFlags::IFF_UP))
        .map(|entry| entry.interface_name)
        .filter(|name| name.starts_with("om"))
        .collect();
    for name in taps {
        match Guard::open(&name).and_then(|guard| guard.verify()) {
            Ok(()) => up += 1,
            // A guest that has ended has no tap.
            Err(_) if nix::net::if_::if_nametoindex(name.as_str()).is_err() => {}
            Err(error) => bail!("{name} is up without its guard: {error}"),
        }
    }
    Ok(up)
}

/// A guest that runs; killed on drop.
pub struct Guest<'a> {
    provider: &'a Provider,
    name: String,
    log: PathBuf,
}

impl Guest<'_> {
    /// What `omerta vm show` tells of it.
    pub fn show(&self) -> Result<serde_json::Value> {
        let text = self
            .provider
            .ask(&["vm", "show", &self.name, "-o", "json"])?;
        serde_json::from_str(&text).context("omerta vm show")
    }

    /// Where its console is written.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The process id of its QEMU.
    pub fn qemu(&self) -> Result<u32> {
        self.provider.qemu_of(&self.name)
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.provider.ask(&["vm", "kill", &self.name]);
    }
}
