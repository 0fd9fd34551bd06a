//! The agent: seals what there is when it starts, goes to the background, and from then on answers its host.
//! Where something has changed, or the host has long said nothing, it powers the guest off.

mod follow;
mod guest;
mod port;

use std::error::Error;
use std::fs;
use std::io::Write;
use std::net::SocketAddrV4;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::reboot::{RebootMode, reboot};
use nix::unistd::{ForkResult, fork, setsid};
use omerta_agent::message::{Answer, Challenge, Changes, Hello, Key, Message, Messages};

use guest::{Seal, SealError};
use port::{Port, PortError};

/// How often is looked, also where the kernel tells of no change.
const LOOK_MS: u16 = 3000;
/// How long a host that asks nothing may go without hearing of a change, before the guest goes off.
const TELL: Duration = Duration::from_secs(10);
/// Until the host has said how long it may say nothing.
const SILENCE: Duration = Duration::from_secs(600);

#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error("takes no arguments")]
    Arguments,
    #[error("cannot talk to the host")]
    Port(#[from] PortError),
    #[error("cannot seal what there is")]
    Seal(#[from] SealError),
    #[error("the kernel gives no random numbers")]
    Random(#[source] getrandom::Error),
    #[error("cannot go to the background")]
    Background(#[source] Errno),
}

fn main() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&error);
            ExitCode::FAILURE
        }
    }
}

/// Returns in the foreground, once all is sealed.
fn start() -> Result<(), AgentError> {
    if std::env::args_os().len() > 1 {
        return Err(AgentError::Arguments);
    }
    let port = Port::open()?;
    let seal = Seal::new()?;
    let mut key = [0; 32];
    getrandom::fill(&mut key).map_err(AgentError::Random)?;
    // SAFETY: this process has one thread, so the child may do whatever this one could.
    match unsafe { fork() }.map_err(AgentError::Background)? {
        ForkResult::Parent { .. } => Ok(()),
        ForkResult::Child => {
            make_hard_to_starve();
            Agent::new(port, seal, Key::new(key)).run()
        }
    }
}

/// What of this fails leaves an agent that is easier to starve, which its host notices as well.
fn make_hard_to_starve() {
    let _ = setsid();
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let _ = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE);
    let _ = nix::sys::prctl::set_dumpable(false);
}

struct Agent {
    port: Port,
    seal: Seal,
    key: Key,
    messages: Messages,
    heard: Instant,
    /// How long the host may say nothing; `None` is for ever.
    silence: Option<Duration>,
    enforce: bool,
    /// Since when something has changed.
    changed: Option<Instant>,
    /// Where the host has said last that the consumer is, and the guest has followed it.
    consumer: Option<SocketAddrV4>,
}

impl Agent {
    fn new(mut port: Port, seal: Seal, key: Key) -> Self {
        port.say(&Message::Hello(Hello {
            key: key.clone(),
            program: seal.program(),
        }));
        Self {
            port,
            seal,
            key,
            messages: Messages::default(),
            heard: Instant::now(),
            silence: Some(SILENCE),
            enforce: true,
            changed: None,
            consumer: None,
        }
    }

    fn run(mut self) -> ! {
        loop {
            self.wait();
            let mut asked = None;
            let heard = self.port.hear();
            self.messages.receive(&heard, |message| {
                if let Message::Challenge(challenge) = message {
                    asked = Some(challenge);
                }
            });
            if let Some(consumer) = asked.and_then(|challenge: Challenge| challenge.consumer) {
                self.follow(consumer);
            }
            let (changes, error) = self.seal.changes();
            if let Some(error) = error {
                say(&error);
            }
            if let Some(challenge) = asked {
                self.answer(&challenge, changes);
            }
            self.act(changes, asked.is_some());
        }
    }

    /// Until the host asks, something changes, or it is time to look.
    fn wait(&mut self) {
        let [firewall, routes] = self.seal.told_by();
        let mut ready = vec![
            PollFd::new(firewall, PollFlags::POLLIN),
            PollFd::new(routes, PollFlags::POLLIN),
        ];
        // One that nobody holds at the other end is always ready.
        if self.port.is_connected() {
            let events = if self.port.has_more_to_say() {
                PollFlags::POLLIN | PollFlags::POLLOUT
            } else {
                PollFlags::POLLIN
            };
            ready.push(PollFd::new(self.port.as_fd(), events));
        }
        // Interrupted or refused: looking once more does no harm.
        if poll(&mut ready, PollTimeout::from(LOOK_MS)).is_err() {
            std::thread::sleep(Duration::from_millis(100));
        }
        let gone = ready
            .get(2)
            .and_then(PollFd::revents)
            .is_some_and(|events| events.contains(PollFlags::POLLHUP));
        self.port.is_gone(gone);
    }

    /// Once for each place. What fails is tried again with the next challenge, unless it has changed something, which is told.
    fn follow(&mut self, consumer: SocketAddrV4) {
        if self.consumer == Some(consumer) {
            return;
        }
        match self.seal.follow(consumer, || follow::to(consumer)) {
            Ok(()) => self.consumer = Some(consumer),
            Err(error) => say(&error),
        }
    }

    fn answer(&mut self, challenge: &Challenge, changes: Changes) {
        self.heard = Instant::now();
        self.silence = (challenge.silence_seconds != 0)
            .then(|| Duration::from_secs(challenge.silence_seconds.into()));
        self.enforce = challenge.enforce;
        self.port
            .say(&Message::Answer(Answer::to(challenge, changes, &self.key)));
    }

    fn act(&mut self, changes: Changes, told: bool) {
        let silent = self.heard.elapsed();
        if self.silence.is_some_and(|most| silent > most) {
            power_off(&format!(
                "the host has said nothing for {} s",
                silent.as_secs()
            ));
        }
        if changes.is_none() {
            self.changed = None;
            return;
        }
        let since = *self.changed.get_or_insert_with(Instant::now);
        if self.enforce && (told || since.elapsed() > TELL) {
            let names: Vec<_> = changes.names().collect();
            power_off(&format!("changed since the start: {}", names.join(", ")));
        }
    }
}

fn power_off(why: &str) -> ! {
    if let Ok(mut console) = fs::OpenOptions::new().write(true).open("/dev/console") {
        let _ = writeln!(console, "omerta-agent: {why}; powering off");
    }
    // Lets the host read the answer, and the console drain.
    std::thread::sleep(Duration::from_secs(1));
    loop {
        let Err(error) = reboot(RebootMode::RB_POWER_OFF);
        say(&error);
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn say(error: &dyn Error) {
    let mut line = format!("omerta-agent: {error}");
    let mut source = error.source();
    while let Some(error) = source {
        line += &format!(": {error}");
        source = error.source();
    }
    eprintln!("{line}");
}
