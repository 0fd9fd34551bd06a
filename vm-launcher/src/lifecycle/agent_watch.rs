//! The host's end of the agent in a guest: asks by the heartbeat's clock, and keeps what is found until it
//! is told.

use std::collections::VecDeque;
use std::future::pending;
use std::io;
use std::net::SocketAddrV4;
use std::time::Duration;

use omerta_agent::heartbeat::{Finding, Heartbeat, Output, Timing};
use omerta_agent::message::Key;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep_until};

use crate::GuestEvent;

/// What is found and not told yet is bounded by the heartbeat, which tells a thing once; this is far more.
const MOST_WAITING: usize = 64;

/// Asks one guest's agent.
#[derive(Debug)]
pub(super) struct AgentWatch {
    /// `None` once QEMU has closed it.
    port: Option<UnixStream>,
    heartbeat: Heartbeat,
    begun: Instant,
    found: VecDeque<GuestEvent>,
}

impl AgentWatch {
    /// Of a guest that is about to run, or, where its agent's key is known, of one that has been running.
    pub(super) fn new(port: UnixStream, timing: Timing, key: Option<Key>) -> Self {
        let heartbeat = match key {
            Some(key) => Heartbeat::known(timing, key, 0, Duration::ZERO),
            None => Heartbeat::new(timing, Duration::ZERO),
        };
        Self {
            port: Some(port),
            heartbeat,
            begun: Instant::now(),
            found: VecDeque::new(),
        }
    }

    pub(super) fn guest_was_reset(&mut self) {
        self.heartbeat.guest_was_reset(self.begun.elapsed());
    }

    pub(super) fn consumer_moved(&mut self, consumer: SocketAddrV4) {
        self.heartbeat
            .consumer_moved(consumer, self.begun.elapsed());
    }

    pub(super) fn stand_still(&mut self) {
        self.heartbeat.stand_still(self.begun.elapsed());
    }

    pub(super) fn go_on(&mut self) {
        self.heartbeat.go_on(self.begun.elapsed());
    }

    /// Whether something has been found that is still to be told.
    pub(super) fn has_found(&self) -> bool {
        !self.found.is_empty()
    }

    /// What is to be told first.
    pub(super) fn take(&mut self) -> Option<GuestEvent> {
        self.found.pop_front()
    }

    /// Asks and listens for one turn. Nothing is lost where it is dropped meanwhile.
    pub(super) async fn turn(&mut self) {
        let mut buffer = [0; 1024];
        let due = match self.heartbeat.next() {
            Some(next) => self.begun + next,
            // A moment that does not come.
            None => Instant::now() + Duration::from_secs(86_400 * 365),
        };
        let read = async {
            match &mut self.port {
                Some(port) => port.read(&mut buffer).await,
                None => pending().await,
            }
        };
        let outputs = tokio::select! {
            biased;
            // What has come before its deadline counts as in time, also on a busy host.
            read = read => match read {
                Ok(length @ 1..) => {
                    let heard = buffer.get(..length).unwrap_or_default();
                    self.heartbeat.receive(self.begun.elapsed(), heard)
                }
                Ok(0) | Err(_) => {
                    self.port = None;
                    Vec::new()
                }
            },
            () = sleep_until(due) => match nonce() {
                Ok(nonce) => self.heartbeat.pass(self.begun.elapsed(), nonce),
                Err(error) => {
                    tracing::error!(%error, "the kernel gives no random numbers to ask an agent with");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    Vec::new()
                }
            },
        };
        for output in outputs {
            match output {
                Output::Send(bytes) => self.send(&bytes),
                Output::Found(finding) => self.find(finding),
            }
        }
    }

    /// Without waiting: what a guest does not take is not answered.
    fn send(&mut self, bytes: &[u8]) {
        if let Some(port) = &self.port
            && let Err(error) = port.try_write(bytes)
            && error.kind() != io::ErrorKind::WouldBlock
        {
            self.port = None;
        }
    }

    fn find(&mut self, finding: Finding) {
        let event = match (finding, self.heartbeat.key()) {
            (Finding::Arrived { program }, Some(key)) => GuestEvent::AgentArrived {
                key: key.clone(),
                program,
            },
            (finding, _) => GuestEvent::AgentFound(finding),
        };
        if self.found.len() < MOST_WAITING {
            self.found.push_back(event);
        }
    }
}

fn nonce() -> Result<[u8; 32], getrandom::Error> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce)?;
    Ok(nonce)
}
