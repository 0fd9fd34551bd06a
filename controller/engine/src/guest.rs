//! One guest: what the engine knows of it.

use std::sync::Arc;

use omerta_verdict::Reason;

use crate::attempt::Attempts;
use crate::tally::{Limiter, Tally};
use crate::threshold::Windows;
use crate::{
    Action, AgentReport, Cause, Ending, Fate, Found, GuestId, GuestNetwork, GuestState, Incident,
    Monotonic, OnViolation, Record, Thresholds, Tunnel,
};

/// What rogue frames are judged by, for all guests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct JudgedBy {
    pub(crate) thresholds: Thresholds,
    pub(crate) network: Option<GuestNetwork>,
}

/// What the engine knows of one guest.
#[derive(Debug)]
pub struct Guest {
    pub(crate) id: GuestId,
    pub(crate) name: String,
    pub(crate) on_violation: OnViolation,
    pub(crate) state: GuestState,
    pub(crate) since: Monotonic,
    /// Frames older than this were not sent by the guest: it had not run yet. The canary that
    /// proves the guard is one of them.
    pub(crate) resume_ordered_at: Option<Monotonic>,
    pub(crate) public_key: Option<String>,
    pub(crate) handshake: bool,
    /// What was said last of its tunnel.
    pub(crate) tunnel: Option<Tunnel>,
    /// What was told last of the agent in it.
    pub(crate) agent: Option<AgentReport>,
    /// That nothing comes from its consumer is told, and not yet that something does again.
    pub(crate) silent: bool,
    /// That its console says nothing where it should is told.
    pub(crate) console_silent: bool,
    pub(crate) key_limiter: Limiter,
    pub(crate) reset_limiter: Limiter,
    pub(crate) tally: Tally,
    pub(crate) windows: Windows,
    pub(crate) attempts: Attempts,
    pub(crate) judged_by: Arc<JudgedBy>,
    pub(crate) incident: Option<Incident>,
    /// It is being paused by request.
    pub(crate) hold_wanted: bool,
    /// Why it has to end as soon as the step under way is over.
    pub(crate) end_wanted: Option<Cause>,
    pub(crate) ending: Option<Ending>,
}

impl Guest {
    pub(crate) fn request(
        id: GuestId,
        name: String,
        on_violation: OnViolation,
        judged_by: &Arc<JudgedBy>,
        now: Monotonic,
        actions: &mut Vec<Action>,
    ) -> Self {
        actions.push(Action::Publish {
            guest: id,
            at: now,
            record: Record::Requested,
        });
        actions.push(Action::Launch(id));
        Self::new(id, name, on_violation, judged_by, now)
    }

    /// A guest of a daemon that died.
    pub(crate) fn found(
        found: Found,
        judged_by: &Arc<JudgedBy>,
        now: Monotonic,
        actions: &mut Vec<Action>,
    ) -> Self {
        let mut guest = Self::new(found.id, found.name, found.on_violation, judged_by, now);
        let record = match found.fate {
            Fate::Adopted {
                state,
                resume_ordered_at,
                public_key,
                handshake,
            } => {
                guest.state = state;
                guest.resume_ordered_at = Some(resume_ordered_at);
                guest.public_key = public_key;
                guest.handshake = handshake;
                Record::Adopted
            }
            Fate::Ended(ending) => {
                guest.state = GuestState::Ended;
                guest.ending = Some(ending.clone());
                Record::Ended(ending)
            }
        };
        actions.push(Action::Publish {
            guest: guest.id,
            at: now,
            record,
        });
        guest
    }

    fn new(
        id: GuestId,
        name: String,
        on_violation: OnViolation,
        judged_by: &Arc<JudgedBy>,
        now: Monotonic,
    ) -> Self {
        Self {
            id,
            name,
            on_violation,
            state: GuestState::Launching,
            since: now,
            resume_ordered_at: None,
            public_key: None,
            handshake: false,
            tunnel: None,
            agent: None,
            silent: false,
            console_silent: false,
            key_limiter: Limiter::default(),
            reset_limiter: Limiter::default(),
            tally: Tally::default(),
            windows: Windows::default(),
            attempts: Attempts::default(),
            judged_by: Arc::clone(judged_by),
            incident: None,
            hold_wanted: false,
            end_wanted: None,
            ending: None,
        }
    }

    /// Its id.
    pub const fn id(&self) -> GuestId {
        self.id
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What rogue traffic does to it.
    pub const fn on_violation(&self) -> OnViolation {
        self.on_violation
    }

    /// Its state.
    pub const fn state(&self) -> GuestState {
        self.state
    }

    /// Since when it is in its state.
    pub const fn since(&self) -> Monotonic {
        self.since
    }

    /// Whether nothing but this record is left of it, and what its ending lists.
    pub const fn is_ended(&self) -> bool {
        matches!(self.state, GuestState::Ended)
    }

    /// The WireGuard public key that it reported last.
    pub fn public_key(&self) -> Option<&str> {
        self.public_key.as_deref()
    }

    /// Whether it reported a handshake with that key.
    pub const fn handshake(&self) -> bool {
        self.handshake
    }

    /// What was said last of its tunnel.
    pub const fn tunnel(&self) -> Option<&Tunnel> {
        self.tunnel.as_ref()
    }

    /// What was told last of the agent in it.
    pub const fn agent(&self) -> Option<&AgentReport> {
        self.agent.as_ref()
    }

    /// Its rogue frames that the engine was told of, by reason.
    pub fn rogue_frames(&self) -> impl Iterator<Item = (Reason, u64)> + '_ {
        self.tally.counts()
    }

    /// How it ended, once it did.
    pub fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref().filter(|_| self.is_ended())
    }
}
