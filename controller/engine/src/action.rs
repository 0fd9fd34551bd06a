//! What the engine wants done, in the imperative.

use thiserror::Error;

use crate::{
    AgentReport, Cause, ConsoleReport, GuestId, GuestState, Incident, Inference, Monotonic,
    OnSilence, OnViolation, RogueFrame, TunnelReport,
};

/// Something to do, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make the guest's tap and process, paused. Answer with `Launched` or `LaunchFailed`.
    Launch(GuestId),
    /// Attach, verify and prove its guard. Answer with `Guarded` or `LaunchFailed`.
    Guard(GuestId),
    /// Let it run. Answer with `Resumed` or `LaunchFailed`.
    Resume(GuestId),
    /// Make it stand still, now, for rogue traffic. Answer with `Paused` or `PauseFailed`.
    Pause(GuestId),
    /// Make it stand still by request. Answer with `Paused` or `PauseFailed`.
    Hold(GuestId),
    /// Verify its guard and let it run on. Answer with `Released` or `ReleaseFailed`.
    Release(GuestId),
    /// Ask it to power down. Answer with `Exited` or, after that many seconds,
    /// `StopDeadlinePassed`.
    PowerDown {
        /// Which guest.
        guest: GuestId,
        /// Seconds it has.
        deadline_seconds: u32,
    },
    /// End its process, remove its guard, then its tap. Answer with `Reaped`, if it is, and `Undone`.
    Kill(GuestId),
    /// Publish a record of it.
    Publish {
        /// Which guest.
        guest: GuestId,
        /// When what is recorded happened.
        at: Monotonic,
        /// What happened.
        record: Record,
    },
    /// Forget what is kept of an ended guest.
    Forget(GuestId),
    /// Tell whoever asked for the guest that there will be none.
    Refuse {
        /// The name asked for.
        name: String,
        /// Why not.
        refusal: Refusal,
    },
}

/// Why a guest is not admitted.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Another guest of that name is alive.
    #[error("it exists and is {0}: choose another name, or end it with `omerta vm kill`")]
    NameTaken(GuestState),
    /// As many guests as may live at once do.
    #[error("{0} guests are alive and that is the limit: end one with `omerta vm kill`")]
    Full(usize),
    /// The daemon is going away.
    #[error("omertad is shutting down: start it again first")]
    ShuttingDown,
}

/// Something worth publishing about a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// It was asked for and admitted.
    Requested,
    /// Its process exists.
    Launched,
    /// Its guard is proven.
    Guarded,
    /// It runs.
    Started,
    /// Its daemon died, and this one has taken it over.
    Adopted,
    /// It reported its public key.
    PublicKey(String),
    /// It reported a handshake.
    Handshake,
    /// Its tunnel is not as it was told last: its handshake is, or is no longer, fresh, or it has another endpoint or keepalive.
    Tunnel(TunnelReport),
    /// Something new is known of the agent in it.
    Agent(AgentReport),
    /// Something was heard on its console. Nothing is done to it for that.
    Console(ConsoleReport),
    /// Nothing is heard on its console where its image says that something is. Nothing is done to it for that either.
    ConsoleSilent,
    /// The host has this towards it, which is not its own. It is not the guest's doing, and nothing is done to it.
    Outside(String),
    /// It sent a rogue frame.
    Rogue {
        /// The frame.
        frame: RogueFrame,
        /// What is done about it.
        action: OnViolation,
        /// What it seems to have tried.
        inference: Inference,
        /// Whether it is the first of its reason.
        first: bool,
        /// Frames of this reason that were counted and not published since the last that was.
        suppressed: u64,
    },
    /// It stands still after a rogue frame.
    Paused(Incident),
    /// It could not be paused.
    PauseFailed {
        /// What went wrong.
        message: String,
    },
    /// Its consumer has moved, and its guard with it.
    ConsumerMoved {
        /// Where it was.
        from: std::net::SocketAddr,
        /// Where it is.
        to: std::net::SocketAddr,
    },
    /// Its consumer's name is not followed.
    ConsumerStays {
        /// The name.
        name: String,
        /// Where its consumer is for the guest.
        at: std::net::SocketAddr,
        /// Why.
        message: String,
    },
    /// Nothing has come from its consumer for so long.
    TunnelSilent {
        /// How long.
        seconds: u64,
        /// Whether nothing has come since the guest runs.
        never: bool,
        /// What happens to it.
        action: OnSilence,
    },
    /// Something comes from its consumer again.
    TunnelBack,
    /// It stands still by request.
    Held,
    /// It runs on.
    Released,
    /// It could not be made to run on.
    ReleaseFailed {
        /// What went wrong.
        message: String,
    },
    /// It was reset, by itself or by request.
    Reset,
    /// Its kernel panicked.
    Panicked,
    /// It was asked to power down.
    Stopping {
        /// Seconds it has.
        deadline_seconds: u32,
    },
    /// What it had written to its disk is gone.
    Scrubbed {
        /// How much of the file system that had taken.
        bytes: u64,
    },
    /// Nothing of it is left but what its ending lists.
    Ended(Ending),
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Why.
    pub cause: Cause,
    /// The rogue frame and its times, where one condemned the guest.
    pub incident: Option<Incident>,
    /// What went wrong, where something did.
    pub message: Option<String>,
    /// What could not be removed and why, one line each.
    pub leftovers: Vec<String>,
}
