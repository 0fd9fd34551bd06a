//! Many taps of one host, guarded, open or judged by one program for all, all routed to one uplink that swallows everything.

use std::io::Write;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::time::{ClockId, clock_gettime};
use omerta_dataplane::{Guard, Programs};
use omerta_kernel_tests::{GATEWAY_MAC, config};
use omerta_test_support::{Namespace, Tap, index_of};
use omerta_verdict::{Direction, Mode};
use std::os::fd::OwnedFd;

use crate::kernel::{self, Hook, Kind};
use crate::network::PLAIN;
use crate::verdict::loaded;

/// Guarded taps of a [`Host`], and as many of each other kind.
pub const GUARDS: usize = 1_000;

/// The host's namespace and its taps.
pub struct Host {
    namespace: Namespace,
    guarded: Vec<Tap>,
    open: Vec<Tap>,
    shared: Vec<Tap>,
    attached: Attached,
    _one_for_all: (Programs, Vec<OwnedFd>),
    _swallow: OwnedFd,
}

/// What attaching the guards took.
#[derive(Default)]
pub struct Attached {
    /// Milliseconds of each.
    pub milliseconds: Vec<f64>,
    /// Bytes of the kernel's memory that all of them took.
    pub bytes: f64,
}

impl Host {
    /// A host all of whose guests have the same addresses: nothing is sent to them.
    pub fn new() -> Result<Self> {
        let namespace = Namespace::new("omerta-bench")?;
        namespace.disable_ipv6()?;
        namespace.enable_forwarding()?;
        let taps = |prefix: &str| -> Result<Vec<Tap>> {
            (0..GUARDS)
                .map(|index| {
                    let tap = Tap::create_with_offload_header(&format!("{prefix}{index}"))?;
                    // As in `network`: frames go the way of a descriptor that blocks.
                    fcntl(&tap, FcntlArg::F_SETFL(OFlag::O_RDWR))?;
                    Ok(tap)
                })
                .collect()
        };
        let (guarded, open, shared) = namespace
            .enter(|| -> Result<_> { Ok((taps("guard")?, taps("open")?, taps("shared")?)) })??;
        let mut commands = String::from(
            "link add uplink type veth peer name sink\n\
             link set sink up\n\
             link set uplink up\n\
             addr add 203.0.113.1/24 dev uplink\n\
             route add default via 203.0.113.9\n\
             neigh replace 203.0.113.9 lladdr 52:54:00:00:00:cc dev uplink nud permanent\n",
        );
        for tap in guarded.iter().chain(&open).chain(&shared) {
            commands += &format!("link set {} address {GATEWAY_MAC} up\n", tap.name());
        }
        run_batch(&namespace, &commands)?;
        let swallow = namespace.enter(|| -> Result<_> {
            /// `TC_ACT_SHOT`.
            const SHOT: i32 = 2;
            let swallow = kernel::constant(Kind::Classifier, SHOT)?;
            kernel::attach(&swallow, index_of("sink")?, Hook::TcxIngress)
        })??;
        let one_for_all = namespace.enter(|| one_for_all(&shared))??;
        let mut host = Self {
            namespace,
            guarded,
            open,
            shared,
            attached: Attached::default(),
            _one_for_all: one_for_all,
            _swallow: swallow,
        };
        host.attached = host.attach()?;
        Ok(host)
    }

    fn attach(&self) -> Result<Attached> {
        let count = self.guarded.len();
        println!("bench: attaching {count} guards");
        let before = kernel_memory()?;
        let milliseconds = self.namespace.enter(|| -> Result<_> {
            let mut milliseconds = Vec::with_capacity(count);
            for tap in &self.guarded {
                let began = Instant::now();
                Guard::attach(tap.name(), &config(Mode::Filtered))?;
                milliseconds.push(began.elapsed().as_secs_f64() * 1e3);
                if milliseconds.len().is_multiple_of(100) {
                    println!("bench: {} of {count} attached", milliseconds.len());
                }
            }
            Ok(milliseconds)
        })??;
        Ok(Attached {
            milliseconds,
            bytes: kernel_memory()? - before,
        })
    }

    /// Runs `work` where the taps are.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        Ok(self.namespace.enter(work)?)
    }

    /// What attaching the guards took.
    pub fn attached(&self) -> &Attached {
        &self.attached
    }

    /// The guarded taps.
    pub fn guarded(&self) -> &[Tap] {
        &self.guarded
    }

    /// The taps that are not.
    pub fn open(&self) -> &[Tap] {
        &self.open
    }

    /// The taps that one program judges by one policy, as no guard does: its code and its state are in the
    /// processor's caches whichever tap sends.
    pub fn shared(&self) -> &[Tap] {
        &self.shared
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        println!("bench: removing {} guards", self.guarded.len());
        // Pins outlive the namespace; a drop cannot report.
        let _ = self.namespace.enter(|| {
            for tap in &self.guarded {
                let _ = Guard::open(tap.name()).and_then(Guard::detach);
            }
        });
    }
}

/// A guard's program for what guests send, loaded once and attached to all of `taps`.
fn one_for_all(taps: &[Tap]) -> Result<(Programs, Vec<OwnedFd>)> {
    let mut programs = loaded(Mode::Filtered)?;
    let program = programs.program(Direction::Egress)?;
    let attach = |tap: &Tap| kernel::attach(program.fd()?, index_of(tap.name())?, Hook::TcxIngress);
    let links = taps.iter().map(attach).collect::<Result<_>>()?;
    Ok((programs, links))
}

/// Nanoseconds of this thread for one frame, over `count` frames that go to `taps` in turn.
pub fn send_in_turn(taps: &[Tap], frame: &[u8], count: u32) -> Result<f64> {
    let buffer = [&PLAIN[..], frame].concat();
    let before = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    for tap in taps.iter().cycle().take(count as usize) {
        tap.send(&buffer)?;
    }
    let spent = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)? - before;
    Ok(std::time::Duration::from(spent).as_nanos() as f64 / f64::from(count))
}

/// Several commands of ip(8), one a line, by one process.
pub fn run_batch(namespace: &Namespace, commands: &str) -> Result<()> {
    let mut child = namespace
        .command("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run ip")?;
    child
        .stdin
        .take()
        .context("ip's standard input")?
        .write_all(commands.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!(
            "ip refused: {}",
            complaint.lines().next().unwrap_or("no message")
        );
    }
    Ok(())
}

/// Bytes of kernel memory that maps and programs are made of: slabs that cannot be reclaimed,
/// vmalloc, per-CPU chunks (proc_meminfo(5)). What processes do does not show there, but for their
/// kernel stacks.
fn kernel_memory() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let kibibytes: f64 = ["SUnreclaim:", "VmallocUsed:", "Percpu:"]
        .into_iter()
        .map(|name| {
            text.lines()
                .find_map(|line| line.strip_prefix(name))
                .and_then(|rest| rest.split_whitespace().next())
                .and_then(|number| number.parse::<f64>().ok())
                .with_context(|| format!("{name} in /proc/meminfo"))
        })
        .sum::<Result<f64>>()?;
    Ok(kibibytes * 1024.0)
}
