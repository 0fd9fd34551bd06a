//! The task of one guest: it owns everything that exists of the guest, tells the engine what
//! happens to it, and carries out what the engine answers.
//!
//! A rogue frame goes from the ring buffer to the engine and its answer to QEMU without leaving
//! this task, so no guest waits for another.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use omerta_engine::{
    Action, AgentReport, Cause, ConsoleReport, GuestEvent, GuestId, Monotonic, OnViolation, Record,
    RogueFrame, Target, TunnelReport, Witness,
};
use omerta_verdict::Reason;
use omerta_vm_launcher::{
    AgentFinding, Control, ExitStatus, Guarded, GuestEvent as LauncherEvent, GuestTunnel,
    LaunchError, Paused, Running, Spec,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};

use crate::cases::Past;
use crate::clock;
use crate::console_silence::ConsoleSilence;
use crate::evidence::{Evidence, Whose};
use crate::failure::report;
use crate::fleet::Fleet;
use crate::host_tunnel::{Roamer, Tunnel, next_report};
use crate::order_words::consumer_text;
use crate::pool::Slot;
use crate::store::{Change, Grant, Stands};
use crate::tunnel_health::{TunnelHealth, next_of};
use crate::watch::{Watch, WatchError};

/// How long QEMU may take to confirm that the guest stands still.
const PAUSE_DEADLINE: Duration = Duration::from_secs(1);
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
    /// A handle to command it with.
    Control(oneshot::Sender<Control>),
    /// That it starts again.
    Reset(oneshot::Sender<Result<(), String>>),
    /// Nothing: this was found by who looks after all guests.
    Found(GuestEvent),
}

/// What exists of the guest.
#[derive(Debug)]
pub(crate) enum Stage {
    Absent,
    Paused(Paused),
    Guarded(Guarded),
    Running(Box<Running>, Watch),
}

/// Owner of one guest.
#[derive(Debug)]
pub(crate) struct GuestTask {
    pub(crate) id: GuestId,
    pub(crate) spec: Arc<Spec>,
    pub(crate) fleet: Arc<Fleet>,
    commands: mpsc::UnboundedReceiver<Command>,
    pub(crate) stage: Stage,
    stop_deadline: Option<Instant>,
    /// How long the guest may run, and until when.
    pub(crate) timeout: Option<Duration>,
    pub(crate) time_is_over: Option<Instant>,
    /// Who waits for what was asked to be carried out.
    asked: Vec<oneshot::Sender<()>>,
    /// The guest has turned its power off; its process is about to end.
    powered_down: bool,
    /// What is written before anything is made for it.
    pub(crate) grant: Option<Grant>,
    /// Whether its consumer is still there, while it runs.
    pub(crate) tunnel_health: Option<TunnelHealth>,
    /// Whether its console keeps silent where it should not.
    console_silence: ConsoleSilence,
    /// What is to be done first of all with a guest that was taken over.
    first_event: Option<GuestEvent>,
    /// What it is caught with.
    pub(crate) evidence: Evidence,
    /// Its tunnel, where omertad keeps it.
    pub(crate) host_tunnel: Option<Tunnel>,
    roamer: Option<Roamer>,
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
    /// Where its consumer may have been.
    pub(crate) endpoints: Vec<SocketAddr>,
    /// Since when it runs.
    pub(crate) since: Monotonic,
    /// What it was caught at before.
    pub(crate) past: Past,
}

impl GuestTask {
    pub(crate) fn new(
        id: GuestId,
        spec: Arc<Spec>,
        fleet: Arc<Fleet>,
        commands: mpsc::UnboundedReceiver<Command>,
    ) -> Self {
        let console_silence = ConsoleSilence::new(spec.image.firewall_log);
        Self {
            id,
            spec,
            fleet,
            commands,
            console_silence,
            stage: Stage::Absent,
            stop_deadline: None,
            timeout: None,
            time_is_over: None,
            asked: Vec::new(),
            powered_down: false,
            grant: None,
            tunnel_health: None,
            first_event: None,
            evidence: Evidence::default(),
            host_tunnel: None,
            roamer: None,
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
        self.begin_health(true);
        self.time_is_over = adopted.left.map(|left| Instant::now() + left);
        self.first_event = adopted.event;
        self.evidence.goes_on(adopted.since, adopted.past);
        self
    }

    /// The same, for a guest that may run only so long.
    pub(crate) fn ending_after(mut self, timeout: Option<Duration>) -> Self {
        self.timeout = timeout;
        self
    }

    /// Begins to look whether the guest's consumer is there. What cannot be looked at is told, and the guest runs on: its
    /// guard is watched by other means.
    pub(crate) fn begin_health(&mut self, known: bool) {
        let Stage::Running(running, _) = &self.stage else {
            return;
        };
        let settings = self.fleet.settings().tunnel;
        self.roamer = self.host_tunnel.clone().map(Roamer::of);
        let tunnel = self.host_tunnel.clone();
        self.tunnel_health = TunnelHealth::begin(settings, running.guard(), tunnel, known).unwrap_or_else(|error| {
            tracing::error!(guest = %self.spec.name, error = report(&error), "whether its consumer is there cannot be seen");
            None
        });
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
            Action::Pause(_) => vec![self.condemn().await],
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
                self.note(at, &record);
                self.fleet.publish(guest, at, record);
                Vec::new()
            }
            // The fleet carries these out itself.
            Action::Forget(_) | Action::Refuse { .. } => Vec::new(),
        }
    }

    /// Has recorded what `record` says of an incident.
    fn note(&mut self, at: Monotonic, record: &Record) {
        let consumer = consumer_text(&self.spec.consumer);
        let whose = Whose {
            id: self.id,
            name: self.spec.name.as_str(),
            interface: &self.spec.tap,
            consumer: &consumer,
            on_violation: self.fleet.on_violation(self.id),
        };
        let stage = &self.stage;
        let epoch = || match stage {
            Stage::Running(running, _) => running.guard().epoch().ok(),
            _ => None,
        };
        if let Some(what) = self.evidence.of(record, whose, epoch) {
            self.fleet.incidents().record(at, what);
        }
    }

    /// Has it stand still for what it did. Who is to end anyway need not be asked, nor its QEMU.
    async fn condemn(&self) -> GuestEvent {
        match self.fleet.on_violation(self.id) {
            OnViolation::Terminate => {
                self.stand_still(|running| async move { running.halt().await })
                    .await
            }
            _ => self.pause().await,
        }
    }

    async fn pause(&self) -> GuestEvent {
        self.stand_still(|running| async move { running.control().pause().await })
            .await
    }

    async fn stand_still<'a, F>(&'a self, stop: impl FnOnce(&'a Running) -> F) -> GuestEvent
    where
        F: Future<Output = Result<u64, LaunchError>>,
    {
        let Stage::Running(running, _) = &self.stage else {
            return GuestEvent::PauseFailed {
                message: "the guest does not run".to_owned(),
            };
        };
        match timeout(PAUSE_DEADLINE, stop(running)).await {
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

    async fn release(&mut self) -> GuestEvent {
        if let Some(health) = &mut self.tunnel_health {
            health.begin_anew();
        }
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
            Command::Found(event) => Some(event),
            Command::Hold(done) => {
                self.asked.push(done);
                Some(GuestEvent::HoldRequested)
            }
            Command::Release(done) => {
                self.asked.push(done);
                Some(GuestEvent::ReleaseRequested)
            }
            Command::Control(done) => {
                if let Stage::Running(running, _) = &self.stage {
                    let _ = done.send(running.control());
                }
                None
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

    /// What the engine should know of the next command.
    pub(crate) async fn next_command(&mut self) -> Option<GuestEvent> {
        match self.commands.recv().await {
            Some(command) => self.take_up(command).await,
            None => Some(GuestEvent::EndRequested(Cause::Shutdown)),
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
        // After its guest: until then what it sends is judged, and goes nowhere else.
        self.roamer = None;
        self.tunnel_health = None;
        self.host_tunnel = None;
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
                    // Its guard has dropped it. The guest may not know yet that its consumer has moved.
                    Ok(frame) if frame.reason == Reason::Endpoint
                        && frame.udp_destination().is_some_and(|to| self.fleet.consumer_was_at(self.id, to)) => continue,
                    Ok(frame) => {
                        self.evidence.dropped(&frame);
                        let frame = rogue(&frame);
                        if frame.is_violation() && self.evidence.is_its_own(frame.at) {
                            self.console_silence.dropped();
                        }
                        return GuestEvent::RogueFrameSeen(frame);
                    }
                    Err(error) => return lost(&error),
                },
                event = running.next_event() => {
                    self.powered_down |= event == LauncherEvent::Shutdown;
                    if let LauncherEvent::ConsoleHeard(heard) = &event
                        && heard.attempts > 0
                    {
                        self.console_silence.heard();
                    }
                    // Its firewall blocks what its tunnel still sends where the consumer was, until it sends where the consumer is.
                    if let LauncherEvent::ConsoleHeard(heard) = &event
                        && heard.unread == 0
                        && blocked_udp(&heard.line).is_some_and(|to| self.fleet.consumer_was_at(self.id, to))
                    {
                        continue;
                    }
                    if let LauncherEvent::AgentArrived { key, .. } = &event {
                        // The next omertad asks the same agent.
                        drop(self.fleet.store().begin(Change::Agent(self.id, *key.bytes())));
                    }
                    // It has booted, and was told then where its consumer was when it was launched.
                    if matches!(event, LauncherEvent::PublicKeyReported(_))
                        && let Some(consumer) = self.fleet.moved_consumer(self.id)
                    {
                        running.control().tell(&consumer);
                    }
                    // It has no part in a tunnel that omertad keeps.
                    if self.host_tunnel.is_some()
                        && is_of_its_tunnel(&event)
                    {
                        continue;
                    }
                    match translate(event, self.powered_down) {
                        Some(event) => return event,
                        None => continue,
                    }
                }
                Some(command) = self.commands.recv() => command,
                event = next_of(&mut self.tunnel_health) => return event,
                event = self.console_silence.found() => return event,
                report = next_report(&mut self.roamer) => {
                    if let Some(endpoint) = report.endpoint {
                        self.fleet.consumer_is_at(self.id, endpoint);
                    }
                    return GuestEvent::TunnelSeen(report);
                }
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

/// Where the datagram was for of which a firewall's line tells, by the guest's word.
fn blocked_udp(line: &str) -> Option<SocketAddr> {
    let value = |key: &str| line.split(' ').find_map(|word| word.strip_prefix(key));
    let port = value("DPT=")?.parse().ok()?;
    let address = value("DST=")?.parse().ok()?;
    (value("PROTO=")? == "UDP").then(|| SocketAddr::new(address, port))
}

fn rogue(frame: &omerta_dataplane::FrameEvent) -> RogueFrame {
    RogueFrame {
        at: Monotonic(frame.at_ns),
        direction: frame.direction,
        reason: frame.reason,
        length: frame.length,
        description: frame.describe(),
        target: frame.target().map(|(protocol, address, port)| Target {
            protocol,
            address,
            port,
        }),
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

/// Whether it is of a tunnel that the guest keeps.
const fn is_of_its_tunnel(event: &LauncherEvent) -> bool {
    matches!(
        event,
        LauncherEvent::PublicKeyReported(_)
            | LauncherEvent::HandshakeReported
            | LauncherEvent::TunnelReported(_)
    )
}

fn by_its_own_word(tunnel: &GuestTunnel) -> TunnelReport {
    let now = clock::now().0;
    let ago = |seconds: u32| Monotonic(now.saturating_sub(u64::from(seconds) * Monotonic::SECOND));
    TunnelReport {
        witness: Witness::Guest,
        handshake: tunnel.handshake_age.map(ago),
        endpoint: tunnel.endpoint,
        keepalive: tunnel.keepalive,
        sent_bytes: tunnel.sent_bytes,
        received_bytes: tunnel.received_bytes,
    }
}

fn translate(event: LauncherEvent, powered_down: bool) -> Option<GuestEvent> {
    match event {
        LauncherEvent::PublicKeyReported(key) => {
            Some(GuestEvent::PublicKeyReported(key.to_string()))
        }
        LauncherEvent::HandshakeReported => Some(GuestEvent::HandshakeSeen),
        LauncherEvent::TunnelReported(tunnel) => {
            Some(GuestEvent::TunnelSeen(by_its_own_word(&tunnel)))
        }
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
        LauncherEvent::ConsoleHeard(heard) => Some(GuestEvent::ConsoleHeard(ConsoleReport {
            attempts: heard.attempts,
            unread: heard.unread,
            line: heard.line,
        })),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_firewalls_line_tells_where_a_datagram_was_for_and_another_line_nothing() {
        let line = "IN= OUT=eth0 SRC=10.77.0.2 DST=192.0.2.10 LEN=124 PROTO=UDP SPT=38608 DPT=51820 LEN=104 ";
        assert_eq!(blocked_udp(line), Some("192.0.2.10:51820".parse().unwrap()));
        for line in [
            "",
            "DST=192.0.2.10 DPT=51820",
            "DST=192.0.2.10 PROTO=TCP DPT=51820",
            "DST=192.0.2.10 PROTO=UDP DPT=518200",
            "DST=x PROTO=UDP DPT=1",
        ] {
            assert_eq!(blocked_udp(line), None, "{line}");
        }
    }
}
