//! What people ask of a guest that lives on: that it stands still, runs on, or starts again.

use omerta_api::{ApiError, ErrorKind, Guest};
use omerta_engine::{GuestId, GuestState};
use tokio::sync::oneshot;

use crate::failure::refused;
use crate::fleet::Fleet;
use crate::guest_task::Command;
use crate::roster::unknown;

impl Fleet {
    /// Pauses a running guest; returns once it stands still.
    pub(crate) async fn hold(&self, name: &str) -> Result<Guest, ApiError> {
        use GuestState::{Held, Running};
        let (id, done) = self.ask(name, "pause", &[Running, Held], Command::Hold)?;
        // An error means that the task has ended, which the state then tells.
        let _ = done.await;
        self.require(id, name, "paused", Held)
    }

    /// Lets a guest that was paused by request run on; returns once it does.
    pub(crate) async fn release(&self, name: &str) -> Result<Guest, ApiError> {
        use GuestState::{Held, Running};
        let (id, done) = self.ask(name, "resume", &[Held, Running], Command::Release)?;
        let _ = done.await;
        self.require(id, name, "resumed", Running)
    }

    /// Resets a running guest, as its reset button would; returns once its processors start anew.
    pub(crate) async fn reset(&self, name: &str) -> Result<Guest, ApiError> {
        let (id, done) = self.ask(name, "reset", &[GuestState::Running], Command::Reset)?;
        match done.await {
            Ok(Ok(())) => self.view(id, name),
            Ok(Err(message)) => Err(ApiError {
                error: ErrorKind::Failed,
                message: format!("guest `{name}` could not be reset: {message}"),
            }),
            Err(_) => self.require(id, name, "reset", GuestState::Running),
        }
    }

    /// Hands a wish to the guest's task, if the guest is in one of `states`.
    pub(crate) fn ask<T>(
        &self,
        name: &str,
        verb: &str,
        states: &[GuestState],
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<(GuestId, oneshot::Receiver<T>), ApiError> {
        let roster = self.lock();
        let guest = roster.engine.find(name).ok_or_else(|| unknown(name))?;
        let facts = roster.facts.get(&guest.id()).ok_or_else(|| unknown(name))?;
        if !states.contains(&guest.state()) {
            return Err(refused(format!(
                "cannot {verb} guest `{name}`: {}",
                standing(guest.state())
            )));
        }
        let (done, answer) = oneshot::channel();
        // A task that no longer listens is ending its guest; the answer is then an error.
        let _ = facts.commands.send(command(done));
        Ok((guest.id(), answer))
    }

    fn require(
        &self,
        id: GuestId,
        name: &str,
        done: &str,
        state: GuestState,
    ) -> Result<Guest, ApiError> {
        let guest = self.view(id, name)?;
        if guest.state == state {
            return Ok(guest);
        }
        Err(ApiError {
            error: ErrorKind::Failed,
            message: format!(
                "guest `{name}` was not {done}, it is {}: see `omerta events --guest {name}`",
                guest.state
            ),
        })
    }
}

/// Where a guest stands, for someone who wanted something else of it.
fn standing(state: GuestState) -> String {
    match state {
        GuestState::Suspended | GuestState::Condemned => format!(
            "it is {state} for rogue traffic or its own panic and does not run again: end it with `omerta vm kill`"
        ),
        GuestState::Held => "it is held: resume it first".to_owned(),
        state => format!("it is {state}, not running"),
    }
}
