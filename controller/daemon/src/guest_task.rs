//! The task of one guest: it owns everything that exists of the guest, tells the engine what
//! happens to it, and carries out what the engine answers.
//!
//! A rogue frame goes from the ring buffer to the engine and its answer to QEMU without leaving
//! this task, so no guest waits for another.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use omerta_api::{ApiError, ErrorKind};
use omerta_engine::{
    Action, AgentReport, Cause, GuestEvent, GuestId, Monotonic, Record, RogueFrame,
};
use omerta_vm_launcher::{
    AgentFinding, ExitStatus, Guarded, GuestEvent as LauncherEvent, LaunchError, Paused, Prepared,
    Running, Spec, Traces,
};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until, timeout};

use crate::clock;
use crate::failure::{failed, report};
use crate::fleet::Fleet;
use crate::order::kind_of;
use crate::pool::Slot;
use crate::store::{Change, Grant, Stands, Step, StoreError};
use crate::watch::{Watch, WatchError};

/// How long QEMU may take to confirm that the guest stands still.
const PAUSE_DEADLINE: Duration = Duration::from_secs(1);
/// How long each step of a start may take. The launcher's own deadlines within are shorter.
const STEP_DEADLINE: Duration = Duration::from_secs(60);
/// A moment that does not come.
const NEVER: Duration = Duration::from_secs(86_400 * 365);

/// What people want of a guest.
#[derive(Debug)]
pub(crate) enum Command {
    /// That it powers down, and is killed if it has not done so in this many seconds.
    Stop { deadline_seconds: u32 },
    /// That it ends at once.
    End(Cause),
    /// That it stands still. Answered once it does, or cannot.
    Hold(oneshot::Sender<()>),
    /// That it runs on. Answered once it does, or cannot.
    Release(oneshot::Sender<()>),
    /// That it starts again.
    Reset(oneshot::Sender<Result<(), String>>),
}

/// What exists of the guest.
#[derive(Debug)]
enum Stage {
    Absent,
    Paused(Paused),
    Guarded(Guarded),
    Running(Box<Running>, Watch),
}

/// Owner of one guest.
#[derive(Debug)]
pub(crate) struct GuestTask {
    id: GuestId,
    spec: Arc<Spec>,
    fleet: Arc<Fleet>,
    commands: mpsc::UnboundedReceiver<Command>,
    stage: Stage,
    stop_deadline: Option<Instant>,
    /// How long the guest may run, and until when.
    timeout: Option<Duration>,
    time_is_over: Option<Instant>,
    /// Who waits for what was asked to be carried out.
    asked: Vec<oneshot::Sender<()>>,
    /// The guest has turned its power off; its process is about to end.
    powered_down: bool,
    /// What is written before anything is made for it.
    grant: Option<Grant>,
    /// What is to be done first of all with a guest that was taken over.
    first_event: Option<GuestEvent>,
}

/// A guest that was taken over, and what was known of it.
#[derive(Debug)]
pub(crate) struct Adopted {
    pub(crate) running: Running,
    pub(crate) watch: Watch,
    pub(crate) slot: Slot,
    /// How long it may run yet.
    pub(crate) left: Option<Duration>,
    /// What befell it while no omertad was there.
    pub(crate) event: Option<GuestEvent>,
}

impl GuestTask {
    pub(crate) fn new(
        id: GuestId,
        spec: Arc<Spec>,
        fleet: Arc<Fleet>,
        commands: mpsc::UnboundedReceiver<Command>,
    ) -> Self {
        Self {
            id,
            spec,
            fleet,
            commands,
            stage: Stage::Absent,
            stop_deadline: None,
            timeout: None,
            time_is_over: None,
            asked: Vec::new(),
            powered_down: false,
            grant: None,
            first_event: None,
        }
    }

    /// The same, for a guest of which nothing is kept yet.
    pub(crate) fn granted(mut self, grant: Grant) -> Self {
        self.grant = Some(grant);
        self
    }

    /// The same, for a guest that was taken over.
    pub(crate) fn adopted(mut self, adopted: Adopted) -> Self {
        self.stage = Stage::Running(Box::new(adopted.running), adopted.watch);
        self.time_is_over = adopted.left.map(|left| Instant::now() + left);
        self.first_event = adopted.event;
        self
    }

    /// The same, for a guest that may run only so long.
    pub(crate) fn ending_after(mut self, timeout: Option<Duration>) -> Self {
        self.timeout = timeout;
        self
    }

    /// Carries out the first actions and whatever follows, until nothing of the guest is left.
    pub(crate) async fn run(mut self, first: Vec<Action>) {
        let mut queue = VecDeque::from(first);
        loop {
            while let Some(action) = queue.pop_front() {
                let is_step = matches!(
                    action,
                    Action::Launch(_) | Action::Guard(_) | Action::Resume(_)
                );
                let events = self.execute(action).await;
                // A guest that someone wants to end takes no further step towards running.
                while let Some(command) = is_step.then(|| self.commands.try_recv().ok()).flatten() {
                    if let Some(event) = self.take_up(command).await {
                        queue.extend(self.fleet.tell(self.id, event));
                    }
                }
                for event in events {
                    queue.extend(self.fleet.tell(self.id, event));
                }
            }
            for asked in self.asked.drain(..) {
                // Whoever asked may have gone.
                let _ = asked.send(());
            }
            if matches!(self.stage, Stage::Absent) {
                return;
            }
            let event = match self.first_event.take() {
                Some(event) => event,
                None => self.next_event().await,
            };
            queue.extend(self.fleet.tell(self.id, event));
        }
    }

    async fn execute(&mut self, action: Action) -> Vec<GuestEvent> {
        match action {
            Action::Launch(_) => self.launch().await,
            Action::Guard(_) => self.guard().await,
            Action::Resume(_) => self.resume().await,
            Action::Pause(_) => vec![self.pause().await],
            Action::Hold(_) => vec![self.hold().await],
            Action::Release(_) => vec![self.release().await],
            Action::PowerDown {
                deadline_seconds, ..
            } => {
                self.power_down(deadline_seconds).await;
                Vec::new()
            }
            Action::Kill(_) => self.kill().await,
            Action::Publish { guest, at, record } => {
                self.fleet.publish(guest, at, record);
                Vec::new()
            }
            // The fleet carries these out itself.
            Action::Forget(_) | Action::Refuse { .. } => Vec::new(),
        }
    }

    async fn launch(&mut self) -> Vec<GuestEvent> {
        let Some(grant) = self.grant.take() else {
            return self.not_kept(&StoreError::NoRow, Vec::new()).await;
        };
        // Before anything is made; nothing may be left of whom there is no row.
        if let Err(error) = self
            .fleet
            .store()
            .change(Change::Admit(Box::new(grant)))
            .await
        {
            return self.did_not_launch(failed(&error), Vec::new());
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
    async fn forget_if_gone(&self, leftovers: &[String]) {
        if leftovers.is_empty()
            && let Err(error) = self.fleet.store().change(Change::Remove(self.id)).await
        {
            tracing::error!(guest = %self.spec.name, error = report(&error), "a guest that is gone cannot be removed from the store");
        }
    }

    async fn guard(&mut self) -> Vec<GuestEvent> {
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

    async fn resume(&mut self) -> Vec<GuestEvent> {
        match std::mem::replace(&mut self.stage, Stage::Absent) {
            Stage::Guarded(guarded) => {
                // A guest whose guard cannot be watched does not run.
                let watch = match Watch::open(self.spec.name.as_str(), guarded.guard()) {
                    Ok(watch) => watch,
                    Err(error) => {
                        let ended = guarded.end().await;
                        self.forget_if_gone(&ended.leftovers).await;
                        return self.did_not_launch(failed(&error), ended.leftovers);
                    }
                };
                let resumed_at = clock::now().0;
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
                        vec![GuestEvent::Resumed]
                    }
                    Err(error) => self.launch_failed(error).await,
                }
            }
            other => self.keep(other),
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

    async fn pause(&self) -> GuestEvent {
        let Stage::Running(running, _) = &self.stage else {
            return GuestEvent::PauseFailed {
                message: "the guest does not run".to_owned(),
            };
        };
        match timeout(PAUSE_DEADLINE, running.control().pause()).await {
            Ok(Ok(at_ns)) => GuestEvent::Paused {
                at: Monotonic(at_ns),
            },
            Ok(Err(error)) => GuestEvent::PauseFailed {
                message: report(&error),
            },
            Err(_) => GuestEvent::PauseFailed {
                message: format!("QEMU did not confirm within {} s", PAUSE_DEADLINE.as_secs()),
            },
        }
    }

    /// What is to be held is kept first: whoever finds it half-way holds it.
    async fn hold(&self) -> GuestEvent {
        let stand = |stands| Change::Stand(self.id, stands, None);
        if let Err(error) = self.fleet.store().change(stand(Stands::Held)).await {
            tracing::warn!(guest = %self.spec.name, error = report(&error), "that it is held is not kept");
        }
        let paused = self.pause().await;
        if matches!(paused, GuestEvent::PauseFailed { .. }) {
            drop(self.fleet.store().begin(stand(Stands::Running)));
        }
        paused
    }

    async fn release(&self) -> GuestEvent {
        let Stage::Running(running, _) = &self.stage else {
            return GuestEvent::ReleaseFailed {
                message: "the guest does not exist any more".to_owned(),
            };
        };
        match running.control().resume().await {
            Ok(()) => GuestEvent::Released,
            Err(error) => GuestEvent::ReleaseFailed {
                message: report(&error),
            },
        }
    }

    /// What the engine should know of a command. A reset is no affair of the engine's until QEMU
    /// tells of it.
    async fn take_up(&mut self, command: Command) -> Option<GuestEvent> {
        match command {
            Command::Stop { deadline_seconds } => {
                Some(GuestEvent::StopRequested { deadline_seconds })
            }
            Command::End(cause) => Some(GuestEvent::EndRequested(cause)),
            Command::Hold(done) => {
                self.asked.push(done);
                Some(GuestEvent::HoldRequested)
            }
            Command::Release(done) => {
                self.asked.push(done);
                Some(GuestEvent::ReleaseRequested)
            }
            Command::Reset(done) => {
                let reset = match &self.stage {
                    Stage::Running(running, _) => running
                        .control()
                        .reset()
                        .await
                        .map_err(|error| report(&error)),
                    _ => Err("it does not run".to_owned()),
                };
                let _ = done.send(reset);
                None
            }
        }
    }

    async fn power_down(&mut self, deadline_seconds: u32) {
        self.stop_deadline =
            Some(Instant::now() + Duration::from_secs(u64::from(deadline_seconds)));
        let stop_by = clock::now().0 + u64::from(deadline_seconds) * Monotonic::SECOND;
        let change = Change::Stand(self.id, Stands::Stopping, Some(stop_by));
        if let Err(error) = self.fleet.store().change(change).await {
            tracing::warn!(guest = %self.spec.name, error = report(&error), "that it is to stop is not kept");
        }
        if let Stage::Running(running, _) = &self.stage
            && let Err(error) = running.control().powerdown().await
        {
            // The deadline ends it.
            tracing::warn!(guest = %self.spec.name, error = report(&error), "cannot power down");
        }
    }

    async fn kill(&mut self) -> Vec<GuestEvent> {
        // Its end does not wait for the disk: what is killed is found dead, and removed all the same.
        drop(self.fleet.store().begin(Change::End(self.id)));
        let ended = match std::mem::replace(&mut self.stage, Stage::Absent) {
            Stage::Running(running, _watch) => running.kill().await,
            Stage::Paused(paused) => paused.end().await,
            Stage::Guarded(guarded) => guarded.end().await,
            // The engine ends what exists; what does not is undone already.
            Stage::Absent => {
                self.forget_if_gone(&[]).await;
                return vec![GuestEvent::Undone {
                    tap_removed_at: None,
                    leftovers: Vec::new(),
                }];
            }
        };
        self.forget_if_gone(&ended.leftovers).await;
        let reaped = ended
            .ended_at_ns
            .map(|at| GuestEvent::Reaped { at: Monotonic(at) });
        let undone = GuestEvent::Undone {
            tap_removed_at: ended.tap_removed_at_ns.map(Monotonic),
            leftovers: ended.leftovers,
        };
        if let Some(scrubbed) = ended.scrubbed {
            let bytes = scrubbed.bytes;
            let record = Record::Scrubbed { bytes };
            self.fleet.publish(self.id, clock::now(), record);
        }
        self.fleet
            .note_remains(self.id, ended.counters, ended.console);
        reaped.into_iter().chain([undone]).collect()
    }

    /// The next thing that the engine should know. Only a stage that exists has one.
    async fn next_event(&mut self) -> GuestEvent {
        loop {
            let never = || Instant::now() + NEVER;
            let deadline = self.stop_deadline.unwrap_or_else(never);
            let time_is_over = self.time_is_over.unwrap_or_else(never);
            let Stage::Running(running, watch) = &mut self.stage else {
                // Between steps of a launch there is nothing to wait for but people.
                let Some(command) = self.commands.recv().await else {
                    return GuestEvent::EndRequested(Cause::Shutdown);
                };
                match self.take_up(command).await {
                    Some(event) => return event,
                    None => continue,
                }
            };
            let command = tokio::select! {
                frame = watch.next() => match frame {
                    Ok(frame) => return GuestEvent::RogueFrameSeen(rogue(&frame)),
                    Err(error) => return lost(&error),
                },
                event = running.next_event() => {
                    self.powered_down |= event == LauncherEvent::Shutdown;
                    if let LauncherEvent::AgentArrived { key, .. } = &event {
                        // The next omertad asks the same agent.
                        drop(self.fleet.store().begin(Change::Agent(self.id, *key.bytes())));
                    }
                    match translate(event, self.powered_down) {
                        Some(event) => return event,
                        None => continue,
                    }
                }
                Some(command) = self.commands.recv() => command,
                () = sleep_until(deadline) => {
                    self.stop_deadline = None;
                    return GuestEvent::StopDeadlinePassed;
                }
                () = sleep_until(time_is_over) => {
                    self.time_is_over = None;
                    return GuestEvent::EndRequested(Cause::Timeout);
                }
            };
            if let Some(event) = self.take_up(command).await {
                return event;
            }
        }
    }
}

fn rogue(frame: &omerta_dataplane::FrameEvent) -> RogueFrame {
    RogueFrame {
        at: Monotonic(frame.at_ns),
        direction: frame.direction,
        reason: frame.reason,
        length: frame.length,
        description: frame.describe(),
    }
}

fn lost(error: &WatchError) -> GuestEvent {
    GuestEvent::GuardLost {
        message: report(error),
    }
}

/// What to say of a process that ended, where the guest's own power button was not the cause.
fn unless_powered_down(status: Option<ExitStatus>, powered_down: bool) -> Option<String> {
    match status {
        Some(ExitStatus::Code(0)) if powered_down => None,
        Some(status) => Some(format!(
            "QEMU ended ({status}) and the guest had not powered down: see `dmesg`"
        )),
        None => Some("QEMU ended, and how cannot be found out: see omertad's log".to_owned()),
    }
}

fn translate(event: LauncherEvent, powered_down: bool) -> Option<GuestEvent> {
    match event {
        LauncherEvent::PublicKeyReported(key) => {
            Some(GuestEvent::PublicKeyReported(key.to_string()))
        }
        LauncherEvent::HandshakeReported => Some(GuestEvent::HandshakeSeen),
        LauncherEvent::Reset => Some(GuestEvent::Reset),
        LauncherEvent::Panicked => Some(GuestEvent::Panicked),
        LauncherEvent::GuardLost { why } => Some(GuestEvent::GuardLost { message: why }),
        // What never goes on is as good as ended, and is ended.
        LauncherEvent::Broken { why } => Some(GuestEvent::Exited { message: Some(why) }),
        LauncherEvent::Exited { status } => Some(GuestEvent::Exited {
            message: unless_powered_down(status, powered_down),
        }),
        // The exit follows; pauses and resumptions are this task's own doing.
        LauncherEvent::AgentArrived { program, .. } => {
            let program = program.iter().map(|byte| format!("{byte:02x}")).collect();
            Some(GuestEvent::AgentReported(AgentReport::Arrived { program }))
        }
        LauncherEvent::AgentFound(finding) => agent_report(finding).map(GuestEvent::AgentReported),
        LauncherEvent::Shutdown | LauncherEvent::Paused | LauncherEvent::Resumed => None,
    }
}

/// `None` for its arrival, which comes with more.
fn agent_report(finding: AgentFinding) -> Option<AgentReport> {
    Some(match finding {
        AgentFinding::Arrived { .. } => return None,
        AgentFinding::Sound => AgentReport::Sound,
        AgentFinding::Changed(changes) => AgentReport::Changed {
            what: changes.names().collect::<Vec<_>>().join(", "),
        },
        AgentFinding::Missed => AgentReport::Missed,
        AgentFinding::Forged => AgentReport::Forged,
        AgentFinding::Replaced => AgentReport::Replaced,
        AgentFinding::Garbled => AgentReport::Garbled,
    })
}
