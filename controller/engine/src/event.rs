//! What the engine is told, in the past tense.

use crate::{
    AgentReport, Cause, ConsoleReport, Ending, GuestState, Monotonic, OnSilence, OnViolation,
    RogueFrame, TunnelReport,
};

/// One guest in one life. A name that is used again gets a new id, so that what is late about the
/// old guest never touches the new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestId(pub u64);

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Someone asked for a guest.
    GuestRequested {
        /// Its name, already validated.
        name: String,
        /// What rogue traffic does to it.
        on_violation: OnViolation,
    },
    /// A guest of a daemon that died was found.
    GuestFound(Found),
    /// The daemon began to shut down: no guest is admitted from here on.
    ShutdownBegan,
    /// Something happened to a guest.
    Guest(GuestId, GuestEvent),
}

/// A guest of a daemon that died.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its id, which no other guest has had.
    pub id: GuestId,
    /// Its name.
    pub name: String,
    /// What rogue traffic does to it.
    pub on_violation: OnViolation,
    /// What became of it.
    pub fate: Fate,
}

/// What became of a guest whose daemon died.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It was taken over, its guard proven.
    Adopted {
        /// How it stands: running, held or suspended.
        state: GuestState,
        /// When it was ordered to run.
        resume_ordered_at: Monotonic,
        /// The WireGuard public key that it reported last.
        public_key: Option<String>,
        /// Whether it reported a handshake with that key.
        handshake: bool,
    },
    /// Nothing is left of it but what its ending lists.
    Ended(Ending),
}

/// Something that happened to one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// Its process exists, paused, on its tap.
    Launched,
    /// Its guard is attached, verified and proven.
    Guarded,
    /// Its first instruction may have run.
    Resumed,
    /// It could not be launched, guarded or resumed, and what was made of it is undone.
    LaunchFailed {
        /// What went wrong.
        message: String,
        /// What could not be undone and why, one line each.
        leftovers: Vec<String>,
    },
    /// It reported its WireGuard public key.
    PublicKeyReported(String),
    /// It reported a handshake with its consumer.
    HandshakeSeen,
    /// This is known of its tunnel. Told again and again.
    TunnelSeen(TunnelReport),
    /// Something new is known of the agent in it.
    AgentReported(AgentReport),
    /// Its own firewall says on its console that it has blocked something, or its console is flooded.
    ConsoleHeard(ConsoleReport),
    /// Its guard drops what it sends, and its own firewall, which its image says is heard on its console, says nothing.
    ConsoleSilent,
    /// The host has something towards it that is not its own: a route, a neighbour entry or a socket.
    FoundOutside(String),
    /// Nothing has come from its consumer for so long.
    TunnelSilent {
        /// How long.
        seconds: u64,
        /// Whether nothing has come since the guest runs.
        never: bool,
        /// What is to happen to it.
        action: OnSilence,
    },
    /// Something comes from its consumer again, and goes on coming.
    TunnelBack,
    /// Its guard dropped a frame.
    RogueFrameSeen(RogueFrame),
    /// It stands still.
    Paused {
        /// Since when.
        at: Monotonic,
    },
    /// It could not be paused.
    PauseFailed {
        /// What went wrong.
        message: String,
    },
    /// Someone asked for it to stand still.
    HoldRequested,
    /// Someone asked for it to run on.
    ReleaseRequested,
    /// It runs on.
    Released,
    /// It could not be made to run on.
    ReleaseFailed {
        /// What went wrong.
        message: String,
    },
    /// It was reset, by itself or by request.
    Reset,
    /// Its kernel panicked and it stands still.
    Panicked,
    /// Its guard can no longer be watched, or is no longer what was attached.
    GuardLost {
        /// What is wrong.
        message: String,
    },
    /// Someone asked it to power down.
    StopRequested {
        /// Seconds it has.
        deadline_seconds: u32,
    },
    /// The time it had for powering down is over.
    StopDeadlinePassed,
    /// Someone asked for its end: [`Cause::Killed`] or [`Cause::Shutdown`].
    EndRequested(Cause),
    /// Its process exited by itself, or can never run on.
    Exited {
        /// How, where the guest did not power itself down.
        message: Option<String>,
    },
    /// Its process is reaped.
    Reaped {
        /// Since when.
        at: Monotonic,
    },
    /// Its process, its guard and its tap are removed, as far as they could be.
    Undone {
        /// When the tap was gone, if it is.
        tap_removed_at: Option<Monotonic>,
        /// What could not be removed and why, one line each.
        leftovers: Vec<String>,
    },
}
