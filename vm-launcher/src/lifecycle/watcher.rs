//! The task that listens to QEMU and to the guest, from resume to the end.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use omerta_agent::heartbeat::Finding;
use omerta_agent::message::Key;
use omerta_dataplane::GuardError;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::error::report;
use crate::guard_alarm::GuardAlarm;
use crate::lifecycle::Control;
use crate::lifecycle::agent_watch::AgentWatch;
use crate::lifecycle::logs::Logs;
use crate::lifecycle::rounds::Post;
use crate::link_watch::LinkWatch;
use crate::process::QemuProcess;
use crate::qmp::MachineEvent;
use crate::{ConsoleReport, Consumer, ControlPort, ExitStatus, GuestTunnel, Report, WgPublicKey};

/// What happens to a running guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// The guest says that this is its WireGuard public key. At most once per key, and bounded
    /// per boot.
    PublicKeyReported(WgPublicKey),
    /// The guest says that it has seen a handshake with its consumer.
    HandshakeReported,
    /// The guest says this of its tunnel. At most once a second, and the latest.
    TunnelReported(GuestTunnel),
    /// Its agent has come. Once a boot.
    AgentArrived {
        /// What it proves its answers with.
        key: Key,
        /// SHA-256 of its program, by its own word.
        program: [u8; 32],
    },
    /// Something else is known of its agent.
    AgentFound(Finding),
    /// Its own firewall says on the console that it has blocked something, or the console is flooded.
    ConsoleHeard(ConsoleReport),
    /// The guest has turned its power off, as QEMU tells it; QEMU is about to end.
    Shutdown,
    /// The guest was reset, and its guard has been verified since.
    Reset,
    /// The guest's kernel has panicked; the guest is paused.
    Panicked,
    /// The guest was stopped.
    Paused,
    /// The guest stands still and can never go on: the accelerator or a device gave up on it.
    Broken {
        /// What QEMU says of it, and what to do.
        why: String,
    },
    /// The guest runs again.
    Resumed,
    /// The guard is no longer what was proven before the guest ran, or cannot be looked at. The
    /// guest is paused, or gone if it could not be.
    GuardLost {
        /// What was wrong.
        why: String,
    },
    /// QEMU has ended. Nothing follows; [`Running::kill`](crate::Running::kill) tidies up.
    Exited {
        /// How it ended; `None` if it could not be found out.
        status: Option<ExitStatus>,
    },
}

pub(super) struct Watcher {
    pub(super) process: Arc<QemuProcess>,
    pub(super) control: Control,
    pub(super) machine_events: mpsc::Receiver<MachineEvent>,
    pub(super) control_port: UnixStream,
    pub(super) agent: Option<AgentWatch>,
    /// Where its consumer is, for the guest to be told.
    pub(super) to_guest: mpsc::Receiver<Consumer>,
    pub(super) events: mpsc::Sender<GuestEvent>,
    pub(super) links: LinkWatch,
    pub(super) alarm: GuardAlarm,
    /// Of the guard, to be renewed.
    pub(super) lease: Option<Duration>,
    /// To be held to their length.
    pub(super) logs: Logs,
}

/// How long QEMU may take to confirm that the guest stands still, before it is killed.
const PAUSE_DEADLINE: Duration = Duration::from_secs(1);
/// How long a QEMU that does not answer any more may take to be seen to have ended.
const DYING: Duration = Duration::from_millis(500);
/// How long after QEMU's end its last messages may take to be read.
const LAST_WORDS_DEADLINE: Duration = Duration::from_secs(1);

impl Watcher {
    /// Listens until QEMU has ended.
    pub(super) async fn run(mut self) {
        let mut parser = ControlPort::new();
        let mut buffer = [0u8; 1024];
        let mut port_open = true;
        let mut qmp_open = true;
        let mut counted = 0;
        let mut guarded = true;
        let events = self.events.clone();
        let mut post = Some(Post::join(
            self.control.guard_watch(),
            self.lease,
            &self.logs,
        ));
        let process = Arc::clone(&self.process);
        // One and the same all the time: each that begins asks the kernel.
        let mut ended = pin!(process.wait());
        let renewed = self.look().and_then(|()| self.renew_lease());
        guarded &= self.stands_or_stops(renewed).await;
        loop {
            if !guarded {
                // Nobody renews the lease of a guard that was lost.
                post = None;
            }
            tokio::select! {
                biased;
                ended = &mut ended => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "cannot watch QEMU");
                    }
                    self.hear_last_words().await;
                    return;
                }
                changed = self.links.changed(), if guarded => {
                    let looked = match changed {
                        Ok(()) => self.look(),
                        Err(error) => Err(format!("its tap cannot be watched: {error}")),
                    };
                    guarded = self.stands_or_stops(looked).await;
                }
                rung = self.alarm.rung(), if guarded => {
                    let looked = match rung {
                        Ok(()) => self.look(),
                        Err(error) => Err(format!("its guard cannot be watched: {error}")),
                    };
                    guarded = self.stands_or_stops(looked).await;
                }
                () = due(post.as_deref()) => {
                    self.logs.hold(&self.events);
                    if let Some(tunnel) = parser.take_tunnel() {
                        tell(&self.events, GuestEvent::TunnelReported(tunnel));
                    }
                    let looked = self.glance().and_then(|()| self.renew_lease());
                    guarded = self.stands_or_stops(looked).await;
                }
                event = self.machine_events.recv(), if qmp_open => match event {
                    Some(MachineEvent::Reset) => {
                        parser.guest_was_reset();
                        self.agent.iter_mut().for_each(AgentWatch::guest_was_reset);
                        let looked = self.look();
                        guarded = self.stands_or_stops(looked).await;
                        if guarded {
                            tell(&self.events, GuestEvent::Reset);
                        }
                    }
                    Some(MachineEvent::Stopped) => {
                        self.agent.iter_mut().for_each(AgentWatch::stand_still);
                        self.stopped().await;
                    }
                    Some(MachineEvent::Resumed) => {
                        self.agent.iter_mut().for_each(AgentWatch::go_on);
                        tell(&self.events, GuestEvent::Resumed);
                    }
                    Some(MachineEvent::Shutdown) => tell(&self.events, GuestEvent::Shutdown),
                    Some(MachineEvent::Panicked) => tell(&self.events, GuestEvent::Panicked),
                    None => qmp_open = false,
                },
                () = turn(&mut self.agent) => {}
                // What is found waits for a reader who is slow.
                Ok(permit) = events.reserve(), if has_found(self.agent.as_ref()) => {
                    if let Some(event) = self.agent.as_mut().and_then(AgentWatch::take) {
                        permit.send(event);
                    }
                }
                Some(consumer) = self.to_guest.recv() => self.tell_guest(&consumer),
                read = self.control_port.read(&mut buffer), if port_open => match read {
                    Ok(0) | Err(_) => port_open = false,
                    Ok(length) => {
                        let events = &self.events;
                        parser.receive(buffer.get(..length).unwrap_or_default(), |report| {
                            tell(events, match report {
                                Report::PublicKey(key) => GuestEvent::PublicKeyReported(key),
                                Report::Handshake => GuestEvent::HandshakeReported,
                            });
                        });
                        // A guest that floods its port must not flood the log: one line per
                        // doubling.
                        let ignored = parser.ignored_lines();
                        if ignored > counted * 2 {
                            counted = ignored;
                            tracing::warn!(ignored, "malformed lines on the guest's control port");
                        }
                    }
                },
            }
        }
    }

    /// An agent would take it for tampering if another had the guest follow, so it does so itself.
    fn tell_guest(&mut self, consumer: &Consumer) {
        let endpoint = consumer.endpoint;
        if let Some(agent) = &mut self.agent {
            return agent.consumer_moved(endpoint);
        }
        let word = format!("consumer {} {}\n", endpoint.ip(), endpoint.port());
        // A guest that does not read must keep nothing waiting. QEMU takes a few lines at any time.
        match self.control_port.try_write(word.as_bytes()) {
            Ok(length) if length == word.len() => {}
            _ => tracing::warn!(
                "the guest does not read its control port: it is not told of its consumer's move"
            ),
        }
    }

    /// Tells a guest that was stopped from one that QEMU gave up on.
    async fn stopped(&self) {
        let fault = timeout(PAUSE_DEADLINE, self.control.fault()).await;
        let Ok(Ok(Some(fault))) = fault else {
            return tell(&self.events, GuestEvent::Paused);
        };
        let why = format!(
            "QEMU gave up on the guest (`{fault}`): see `dmesg`, and if that is KVM's doing, set `accel = \"tcg\"`"
        );
        // The guest stands still: this may wait for a slow reader, and must not be lost.
        let _ = self.events.send(GuestEvent::Broken { why }).await;
    }

    /// Tells whether the guest has turned its power off, which QEMU says just before it ends.
    async fn hear_last_words(&mut self) {
        let last = async {
            while let Some(event) = self.machine_events.recv().await {
                if event == MachineEvent::Shutdown {
                    tell(&self.events, GuestEvent::Shutdown);
                }
            }
        };
        // The connection closed when QEMU ended; only its reader is still to get to that.
        let _ = timeout(LAST_WORDS_DEADLINE, last).await;
    }

    /// Whether the guard is still what was proven; if not, what has become of it.
    fn look(&self) -> Result<(), String> {
        self.control.verify_guard().map_err(|error| loss(&error))
    }

    /// The same, as far as nothing tells of it.
    fn glance(&self) -> Result<(), String> {
        let looked = self.control.glance_at_guard();
        looked.map_err(|error| loss(&error))
    }

    /// Begins the lease of a guard anew that was looked at.
    fn renew_lease(&self) -> Result<(), String> {
        let renewed = self.control.renew_lease(self.lease);
        renewed.map_err(|error| report(&error))
    }

    /// Stops a guest that has lost its guard, and tells whether it has not.
    async fn stands_or_stops(&self, looked: Result<(), String>) -> bool {
        let Err(why) = looked else {
            return true;
        };
        let paused = timeout(PAUSE_DEADLINE, self.control.pause()).await;
        // A tap that QEMU alone has open goes a moment before QEMU is seen to have ended.
        if !matches!(paused, Ok(Ok(_)))
            && !self.process.is_child()
            && timeout(DYING, self.process.wait()).await.is_ok()
        {
            return true;
        }
        tracing::error!(why, "the guard is lost; stopping the guest");
        if !matches!(paused, Ok(Ok(_)))
            && let Err(error) = self.process.kill()
        {
            tracing::error!(%error, "cannot stop a guest without a guard");
        }
        // The guest stands still: this may wait for a slow reader, and must not be lost.
        let _ = self.events.send(GuestEvent::GuardLost { why }).await;
        false
    }
}

/// Until it is time for a look; never, where nobody goes round.
async fn due(post: Option<&Post>) {
    match post {
        Some(post) => post.due().await,
        None => std::future::pending().await,
    }
}

fn has_found(agent: Option<&AgentWatch>) -> bool {
    agent.is_some_and(AgentWatch::has_found)
}

/// One turn of the agent that there is; where there is none, or what it found is still to be told, it does not end.
async fn turn(agent: &mut Option<AgentWatch>) {
    match agent {
        Some(agent) if !agent.has_found() => agent.turn().await,
        _ => std::future::pending().await,
    }
}

/// What has become of a guard, for someone whose guest is ended for it: what the error advises for
/// an interface that stays does not help.
fn loss(error: &GuardError) -> String {
    match error {
        GuardError::NoInterface { interface } => {
            format!("its tap {interface} was removed, renamed or moved by another program")
        }
        GuardError::NotInForce { interface, why } => {
            format!("the guard of its tap {interface} was tampered with: {why}")
        }
        GuardError::Replaced { interface } | GuardError::NotGuarded { interface } => {
            format!("the guard of its tap {interface} was removed or replaced by another program")
        }
        error => report(error),
    }
}

/// Hands an event over without waiting: whoever is slow to read must not keep a reset from being
/// looked into.
fn tell(events: &mpsc::Sender<GuestEvent>, event: GuestEvent) {
    if let Err(error) = events.try_send(event) {
        tracing::warn!(%error, "guest event dropped");
    }
}
