//! The steps of a guest's start. Each is kept before the next is begun, and each that fails leaves nothing.

use std::future::Future;
use std::time::Duration;

use omerta_api::{ApiError, ErrorKind};
use omerta_engine::{GuestEvent, Monotonic};
use omerta_vm_launcher::{LaunchError, Prepared, Spec, Traces};
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout};

use crate::clock;
use crate::failure::{failed, refused, report};
use crate::guest_task::{GuestTask, Stage};
use crate::order::kind_of;
use crate::pool::Slot;
use crate::store::{Change, Step, StoreError};
use crate::watch::Watch;

/// How long each step of a start may take. The launcher's own deadlines within are shorter.
const STEP_DEADLINE: Duration = Duration::from_secs(60);

impl GuestTask {
    pub(crate) async fn launch(&mut self) -> Vec<GuestEvent> {
        let Some(grant) = self.grant.take() else {
            return self.not_kept(&StoreError::NoRow, Vec::new()).await;
        };
        let slot = Slot(grant.slot);
        // Before anything is made; nothing may be left of whom there is no row.
        if let Err(error) = self
            .fleet
            .store()
            .change(Change::Admit(Box::new(grant)))
            .await
        {
            return self.did_not_launch(failed(&error), Vec::new());
        }
        if let Err(error) = self.begin_tunnel(slot) {
            self.forget_if_gone(&[]).await;
            return self.did_not_launch(error, Vec::new());
        }
        let prepared = match self.step(Prepared::new(Spec::clone(&self.spec))).await {
            Ok(Ok(prepared)) => prepared,
            Ok(Err(error)) => return self.launch_failed(error).await,
            Err(events) => return events,
        };
        if let Err(error) = self.reach(Step::Launching, prepared.traces()).await {
            drop(prepared);
            return self.not_kept(&error, Vec::new()).await;
        }
        let paused = match self.step(prepared.launch()).await {
            Ok(Ok(paused)) => paused,
            Ok(Err(error)) => return self.launch_failed(error).await,
            Err(events) => return events,
        };
        if let Err(error) = self.reach(Step::Launched, paused.traces()).await {
            let ended = paused.end().await;
            return self.not_kept(&error, ended.leftovers).await;
        }
        self.stage = Stage::Paused(paused);
        vec![GuestEvent::Launched]
    }

    /// Keeps how far the guest has come, before it goes further.
    async fn reach(&self, step: Step, traces: Traces) -> Result<(), StoreError> {
        let change = Change::Reach(self.id, step, traces);
        self.fleet.store().change(change).await
    }

    /// A guest of which is not kept what the next omertad needs does not run.
    async fn not_kept(&self, error: &StoreError, leftovers: Vec<String>) -> Vec<GuestEvent> {
        self.forget_if_gone(&leftovers).await;
        self.did_not_launch(failed(error), leftovers)
    }

    /// Removes the row of a guest of which nothing is left: with it all is free again that it held. One
    /// that cannot be removed is removed by the next omertad.
    pub(crate) async fn forget_if_gone(&self, leftovers: &[String]) {
        if leftovers.is_empty()
            && let Err(error) = self.fleet.store().change(Change::Remove(self.id)).await
        {
            tracing::error!(guest = %self.spec.name, error = report(&error), "a guest that is gone cannot be removed from the store");
        }
    }

    pub(crate) async fn guard(&mut self) -> Vec<GuestEvent> {
        match std::mem::replace(&mut self.stage, Stage::Absent) {
            Stage::Paused(paused) => match self.step(paused.guard()).await {
                Ok(Ok(guarded)) => {
                    if let Err(error) = self.reach(Step::Guarded, guarded.traces()).await {
                        let ended = guarded.end().await;
                        return self.not_kept(&error, ended.leftovers).await;
                    }
                    self.stage = Stage::Guarded(guarded);
                    vec![GuestEvent::Guarded]
                }
                Ok(Err(error)) => self.launch_failed(error).await,
                Err(events) => events,
            },
            other => self.keep(other),
        }
    }

    /// Carries out a step of the start on a thread that may be kept waiting, by a file system or
    /// by another's lock. One that takes too long is given up: what it makes in the end, of which
    /// nothing runs, undoes itself.
    async fn step<T: Send + 'static>(
        &self,
        step: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, Vec<GuestEvent>> {
        let handle = Handle::current();
        let step = spawn_blocking(move || handle.block_on(step));
        let (problem, left) = match timeout(STEP_DEADLINE, step).await {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(error)) => (format!("its start broke off: {error}"), None),
            Err(_) => (
                format!(
                    "its start has come no further for {} s: see whether the file systems of its image and of the run directory answer, and whether another program holds the lock of the guards",
                    STEP_DEADLINE.as_secs()
                ),
                Some("its start: still waits, and undoes itself when it can".to_owned()),
            ),
        };
        let error = ApiError {
            error: ErrorKind::Failed,
            message: problem,
        };
        Err(self.did_not_launch(error, left.into_iter().collect()))
    }

    pub(crate) async fn resume(&mut self) -> Vec<GuestEvent> {
        if let Err(instead) = self.await_handshake().await {
            return self.did_not_shake_hands(instead).await;
        }
        match std::mem::replace(&mut self.stage, Stage::Absent) {
            Stage::Guarded(guarded) => {
                // A guest whose guard cannot be watched does not run.
                let watch = match Watch::open(
                    self.spec.name.as_str(),
                    guarded.guard(),
                    // What is for its address there is for no tap that is there.
                    self.fleet.uplink().filter(|_| self.host_tunnel.is_none()),
                ) {
                    Ok(watch) => watch,
                    Err(error) => {
                        let ended = guarded.end().await;
                        self.forget_if_gone(&ended.leftovers).await;
                        return self.did_not_launch(failed(&error), ended.leftovers);
                    }
                };
                let resumed_at = clock::now().0;
                self.evidence.runs_since(Monotonic(resumed_at));
                match guarded.resume().await {
                    Ok(running) => {
                        self.time_is_over = self.timeout.map(|timeout| Instant::now() + timeout);
                        let nanoseconds = |timeout: Duration| {
                            u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX / 4)
                        };
                        let change = Change::Run {
                            id: self.id,
                            resumed_at,
                            ends_at: self.timeout.map(|t| clock::now().0 + nanoseconds(t)),
                        };
                        if let Err(error) = self.fleet.store().change(change).await {
                            let ended = running.kill().await;
                            return self.not_kept(&error, ended.leftovers).await;
                        }
                        self.fleet.note_pid(self.id, running.pid());
                        self.stage = Stage::Running(Box::new(running), watch);
                        self.begin_health(false);
                        let mut events = vec![GuestEvent::Resumed];
                        events.extend(self.tunnel_events());
                        events
                    }
                    Err(error) => self.launch_failed(error).await,
                }
            }
            other => self.keep(other),
        }
    }

    /// Ends a guest whose consumer has not come, or that someone wants to end meanwhile: it has run nothing.
    async fn did_not_shake_hands(
        &mut self,
        instead: Result<GuestEvent, ApiError>,
    ) -> Vec<GuestEvent> {
        let leftovers = match std::mem::replace(&mut self.stage, Stage::Absent) {
            Stage::Guarded(guarded) => guarded.end().await.leftovers,
            other => return self.keep(other),
        };
        self.host_tunnel = None;
        self.forget_if_gone(&leftovers).await;
        match instead {
            Err(error) => self.did_not_launch(error, leftovers),
            Ok(event) => {
                let error = refused("it was to end before its consumer had shaken hands".into());
                // Why comes first: it ends for that.
                let mut events = vec![event];
                events.extend(self.did_not_launch(error, leftovers));
                events
            }
        }
    }

    /// An action that does not fit the stage changes nothing.
    fn keep(&mut self, stage: Stage) -> Vec<GuestEvent> {
        tracing::error!(guest = %self.spec.name, "an action did not fit the guest's stage");
        self.stage = stage;
        Vec::new()
    }

    async fn launch_failed(&self, error: LaunchError) -> Vec<GuestEvent> {
        let kind = kind_of(&error);
        let (cause, leftovers) = error.split();
        self.forget_if_gone(&leftovers).await;
        let error = ApiError {
            error: kind,
            message: report(&cause),
        };
        self.did_not_launch(error, leftovers)
    }

    /// Notes what whoever asked for the guest is told, and tells the engine.
    fn did_not_launch(&self, error: ApiError, leftovers: Vec<String>) -> Vec<GuestEvent> {
        let ApiError { error, message } = error;
        let mut told = format!("guest `{}`: {message}", self.spec.name);
        if !leftovers.is_empty() {
            told.push_str(&format!("; left behind: {}", leftovers.join("; ")));
        }
        let error = ApiError {
            error,
            message: told,
        };
        self.fleet.note_launch_error(self.id, error);
        vec![GuestEvent::LaunchFailed { message, leftovers }]
    }
}
