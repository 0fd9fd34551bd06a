//! The task that listens to QEMU and to the guest, from resume to the end.

use std::sync::Arc;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use crate::lifecycle::Control;
use crate::process::QemuProcess;
use crate::qmp::MachineEvent;
use crate::{ControlPort, ExitStatus, Report, WgPublicKey};

/// What happens to a running guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// The guest says that this is its WireGuard public key. At most once per key, and bounded
    /// per boot.
    PublicKeyReported(WgPublicKey),
    /// The guest says that it has seen a handshake with its consumer.
    HandshakeReported,
    /// The guest has shut itself down; QEMU is about to end.
    Shutdown,
    /// The guest was reset, and its guard has been verified since.
    Reset,
    /// The guest's kernel has panicked; the guest is paused.
    Panicked,
    /// The guest was stopped.
    Paused,
    /// The guest runs again.
    Resumed,
    /// After a reset the guard was not in place. The guest is paused, or gone if it could not be.
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
    pub(super) events: mpsc::Sender<GuestEvent>,
}

impl Watcher {
    /// Listens until QEMU has ended.
    pub(super) async fn run(mut self) {
        let mut parser = ControlPort::new();
        let mut buffer = [0u8; 1024];
        let mut port_open = true;
        let mut qmp_open = true;
        let mut counted = 0;
        loop {
            tokio::select! {
                biased;
                ended = self.process.wait() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "cannot watch QEMU");
                    }
                    return;
                }
                event = self.machine_events.recv(), if qmp_open => match event {
                    Some(event) => {
                        if event == MachineEvent::Reset {
                            parser.guest_was_reset();
                        }
                        self.machine_event(event).await;
                    }
                    None => qmp_open = false,
                },
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

    async fn machine_event(&self, event: MachineEvent) {
        match event {
            MachineEvent::Stopped => tell(&self.events, GuestEvent::Paused),
            MachineEvent::Resumed => tell(&self.events, GuestEvent::Resumed),
            MachineEvent::Shutdown => tell(&self.events, GuestEvent::Shutdown),
            MachineEvent::Panicked => tell(&self.events, GuestEvent::Panicked),
            MachineEvent::Reset => match self.control.verify_guard() {
                Ok(()) => tell(&self.events, GuestEvent::Reset),
                Err(error) => self.fail_closed(error.report()).await,
            },
        }
    }

    async fn fail_closed(&self, why: String) {
        tracing::error!(why, "the guard is lost; stopping the guest");
        if self.control.pause().await.is_err()
            && let Err(error) = self.process.kill()
        {
            tracing::error!(%error, "cannot stop a guest without a guard");
        }
        tell(&self.events, GuestEvent::GuardLost { why });
    }
}

/// Hands an event over without waiting: whoever is slow to read must not keep a reset from being
/// looked into.
fn tell(events: &mpsc::Sender<GuestEvent>, event: GuestEvent) {
    if let Err(error) = events.try_send(event) {
        tracing::warn!(%error, "guest event dropped");
    }
}
