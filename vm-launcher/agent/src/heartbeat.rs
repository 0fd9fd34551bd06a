//! The host's side: asks the agent in turn and judges what comes back. No I/O and no clock: times are
//! given, as a [`Duration`] since whenever, of a clock that never goes back.

use std::net::SocketAddrV4;
use std::time::Duration;

use crate::message::{Answer, Challenge, Changes, Hello, Key, Message, Messages};

/// When the host asks, and what it tells the agent to do by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// From the guest's start until its agent must have said its first word.
    pub arrival: Duration,
    /// From one challenge to the next.
    pub interval: Duration,
    /// From a challenge to its answer.
    pub deadline: Duration,
    /// For how many seconds the agent may hear nothing before it powers the guest off; 0 is for ever.
    pub silence_seconds: u32,
    /// Whether a change powers the guest off.
    pub enforce: bool,
}

/// What the host is to do, or has learnt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Write these bytes to the port.
    Send(Vec<u8>),
    /// Something is known that was not before.
    Found(Finding),
}

/// What the host has learnt of the agent. All but the first two are reasons to end the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// It has come, with a program of this SHA-256.
    Arrived {
        /// By its own word.
        program: [u8; 32],
    },
    /// It answers, and all is as it was sealed. Told when it did not before.
    Sound,
    /// It says that something has changed.
    Changed(Changes),
    /// It did not come or did not answer in time.
    Missed,
    /// An answer that proves nothing: by another key, to another challenge, or to one that is answered.
    Forged,
    /// A second one came in the same boot.
    Replaced,
    /// Bytes on the port that are no message of its protocol.
    Garbled,
}

/// The agent of one guest, from the guest's start.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    timing: Timing,
    messages: Messages,
    skipped: u64,
    state: State,
    standing_since: Option<Duration>,
    told: Told,
    /// Where the guest's consumer is, where it has moved since the guest's launch.
    consumer: Option<SocketAddrV4>,
}

#[derive(Clone, Debug)]
enum State {
    /// Its first word must come by then; `None` where that has been missed and told.
    Awaited { by: Option<Duration> },
    /// It has come.
    Known {
        key: Key,
        asked: Option<Asked>,
        /// The last one that was not answered in time.
        expired: Option<Challenge>,
        next: Duration,
        sequence: u64,
    },
}

#[derive(Clone, Copy, Debug)]
struct Asked {
    challenge: Challenge,
    by: Duration,
}

/// What has been told since the last challenge or, of how it stands, at all: a flood tells nothing new.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    forged: bool,
    replaced: bool,
    garbled: bool,
    stands: Option<Finding>,
}

impl Heartbeat {
    /// Of a guest that begins to run at `now`.
    pub fn new(timing: Timing, now: Duration) -> Self {
        Self {
            timing,
            messages: Messages::default(),
            skipped: 0,
            state: State::Awaited {
                by: Some(now + timing.arrival),
            },
            standing_since: None,
            told: Told::default(),
            consumer: None,
        }
    }

    /// Of a guest that ran before this process did: its agent's key, and the last challenge's number.
    pub fn known(timing: Timing, key: Key, sequence: u64, now: Duration) -> Self {
        Self {
            state: State::Known {
                key,
                asked: None,
                expired: None,
                next: now,
                sequence,
            },
            ..Self::new(timing, now)
        }
    }

    /// The agent's key, once it has come.
    pub const fn key(&self) -> Option<&Key> {
        match &self.state {
            State::Awaited { .. } => None,
            State::Known { key, .. } => Some(key),
        }
    }

    /// When [`Heartbeat::pass`] has something to do next.
    pub fn next(&self) -> Option<Duration> {
        if self.standing_since.is_some() {
            return None;
        }
        match &self.state {
            State::Awaited { by } => *by,
            // The next challenge waits until this one is answered or missed.
            State::Known {
                asked: Some(asked), ..
            } => Some(asked.by),
            State::Known { next, .. } => Some(*next),
        }
    }

    /// The guest has been reset: its agent will come anew.
    pub fn guest_was_reset(&mut self, now: Duration) {
        *self = Self {
            consumer: self.consumer,
            ..Self::new(self.timing, now)
        };
    }

    /// The guest's consumer has moved: from the next challenge on, which is due at once, the agent is told where it is.
    pub fn consumer_moved(&mut self, consumer: SocketAddrV4, now: Duration) {
        self.consumer = Some(consumer);
        if let State::Known { next, .. } = &mut self.state {
            *next = now.min(*next);
        }
    }

    /// The guest stands still, and nothing is expected of it.
    pub fn stand_still(&mut self, now: Duration) {
        self.standing_since.get_or_insert(now);
    }

    /// The guest runs again: what was due is due that much later.
    pub fn go_on(&mut self, now: Duration) {
        let Some(since) = self.standing_since.take() else {
            return;
        };
        let stood = now.saturating_sub(since);
        match &mut self.state {
            State::Awaited { by } => {
                if let Some(by) = by {
                    *by += stood;
                }
            }
            State::Known { asked, next, .. } => {
                *next += stood;
                if let Some(asked) = asked {
                    asked.by += stood;
                }
            }
        }
    }

    /// Time has passed: `nonce` is for the next challenge, and never given again.
    pub fn pass(&mut self, now: Duration, nonce: [u8; 32]) -> Vec<Output> {
        let mut outputs = Vec::new();
        if self.standing_since.is_some() {
            return outputs;
        }
        let timing = self.timing;
        match &mut self.state {
            State::Awaited { by } => {
                if by.is_some_and(|by| by <= now) {
                    *by = None;
                    self.stands(Finding::Missed, &mut outputs);
                }
            }
            State::Known {
                asked,
                expired,
                next,
                sequence,
                ..
            } => {
                let missed = asked.is_some_and(|asked| asked.by <= now);
                if missed {
                    *expired = asked.take().map(|asked| asked.challenge);
                }
                // One at a time: an answer is to the last one.
                if *next <= now && asked.is_none() {
                    *sequence += 1;
                    let challenge = Challenge {
                        sequence: *sequence,
                        nonce,
                        silence_seconds: timing.silence_seconds,
                        enforce: timing.enforce,
                        consumer: self.consumer,
                    };
                    *asked = Some(Asked {
                        challenge,
                        by: now + timing.deadline,
                    });
                    *next = now + timing.interval;
                    self.told = Told {
                        stands: self.told.stands,
                        replaced: self.told.replaced,
                        ..Told::default()
                    };
                    outputs.push(Output::Send(Message::Challenge(challenge).encode()));
                }
                if missed {
                    self.stands(Finding::Missed, &mut outputs);
                }
            }
        }
        outputs
    }

    /// What came out of the port at `now`.
    pub fn receive(&mut self, now: Duration, bytes: &[u8]) -> Vec<Output> {
        let mut outputs = Vec::new();
        let mut messages = std::mem::take(&mut self.messages);
        messages.receive(bytes, |message| self.hear(now, message, &mut outputs));
        if messages.skipped() > self.skipped {
            self.skipped = messages.skipped();
            once(&mut self.told.garbled, Finding::Garbled, &mut outputs);
        }
        self.messages = messages;
        outputs
    }

    fn hear(&mut self, now: Duration, message: Message, outputs: &mut Vec<Output>) {
        match message {
            Message::Hello(hello) => self.hear_hello(now, hello, outputs),
            Message::Answer(answer) => self.hear_answer(now, &answer, outputs),
            // The host's own words.
            Message::Challenge(_) => once(&mut self.told.forged, Finding::Forged, outputs),
        }
    }

    fn hear_hello(&mut self, now: Duration, hello: Hello, outputs: &mut Vec<Output>) {
        match &self.state {
            State::Awaited { .. } => {
                self.state = State::Known {
                    key: hello.key,
                    asked: None,
                    expired: None,
                    next: now,
                    sequence: 0,
                };
                self.told.stands = None;
                outputs.push(Output::Found(Finding::Arrived {
                    program: hello.program,
                }));
            }
            State::Known { .. } => once(&mut self.told.replaced, Finding::Replaced, outputs),
        }
    }

    fn hear_answer(&mut self, now: Duration, answer: &Answer, outputs: &mut Vec<Output>) {
        let State::Known {
            key,
            asked,
            expired,
            ..
        } = &mut self.state
        else {
            return once(&mut self.told.forged, Finding::Forged, outputs);
        };
        match asked {
            Some(due) if due.by > now && answer.proves(&due.challenge, key) => {
                *asked = None;
                let found = if answer.changes.is_none() {
                    Finding::Sound
                } else {
                    Finding::Changed(answer.changes)
                };
                self.stands(found, outputs);
            }
            // Late, which is told as missed when the time has come.
            Some(due) if answer.proves(&due.challenge, key) => {}
            _ if expired.is_some_and(|challenge| answer.proves(&challenge, key)) => {
                *expired = None;
            }
            _ => once(&mut self.told.forged, Finding::Forged, outputs),
        }
    }

    fn stands(&mut self, found: Finding, outputs: &mut Vec<Output>) {
        if self.told.stands != Some(found) {
            self.told.stands = Some(found);
            outputs.push(Output::Found(found));
        }
    }
}

fn once(told: &mut bool, found: Finding, outputs: &mut Vec<Output>) {
    if !*told {
        *told = true;
        outputs.push(Output::Found(found));
    }
}

#[cfg(test)]
mod tests;
