//! Every guest of this omertad: the engine's state and the facts beside it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use omerta_api::{ApiError, Ended, ErrorKind, Event, Guest, RunRequest};
use omerta_dataplane::Counters;
use omerta_engine::{
    Action, Cause, Engine, Event as EngineEvent, GuestEvent, GuestId, GuestState, Monotonic, Record,
};
use omerta_vm_launcher::{AccelReport, Spec, probe_accel};
use tokio::sync::{OnceCell, mpsc, watch};
use tokio::task::JoinSet;

use crate::clock;
use crate::config::Settings;
use crate::failure::{not_found, refused};
use crate::guest_task::{Command, GuestTask};
use crate::journal::Journal;
use crate::order::{Order, consumer_text};
use crate::pool::{Slot, Slots};
use crate::record::{ended, occurrence};
use crate::tap_name::tap_name;

/// How long all guests together may take to end when omertad does.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(8);

/// The guests, and what answers questions about them. One lock, held for microseconds: whoever
/// holds it does no I/O.
#[derive(Debug)]
pub(crate) struct Fleet {
    settings: Settings,
    journal: Arc<Journal>,
    inner: Mutex<Inner>,
    tasks: Mutex<JoinSet<()>>,
    accel: OnceCell<AccelReport>,
}

#[derive(Debug)]
struct Inner {
    engine: Engine,
    slots: Slots,
    facts: HashMap<GuestId, Facts>,
}

/// What is known of a guest beside its state.
#[derive(Debug)]
struct Facts {
    spec: Arc<Spec>,
    image_name: String,
    /// Held until the guest has ended.
    slot: Option<Slot>,
    pid: Option<u32>,
    commands: mpsc::UnboundedSender<Command>,
    state: watch::Sender<GuestState>,
    launch_error: Option<ApiError>,
    /// Its guard's counters as last read: what remains of them once the guard is gone.
    counters: Option<Counters>,
}

/// What metrics tell of one guest.
#[derive(Clone, Debug)]
pub(crate) struct Measure {
    pub(crate) id: GuestId,
    pub(crate) name: String,
    pub(crate) interface: String,
    pub(crate) state: GuestState,
    pub(crate) rogue_frames: Vec<(omerta_verdict::Reason, u64)>,
    pub(crate) counters: Option<Counters>,
}

impl Fleet {
    /// A fleet without guests.
    pub(crate) fn new(settings: Settings, journal: Arc<Journal>) -> Self {
        Self {
            inner: Mutex::new(Inner {
                engine: Engine::new(settings.max_guests),
                slots: Slots::new(settings.guest_pool),
                facts: HashMap::new(),
            }),
            settings,
            journal,
            tasks: Mutex::new(JoinSet::new()),
            accel: OnceCell::new(),
        }
    }

    /// The history of events.
    pub(crate) const fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    /// How guests execute; the first call may take seconds to find out.
    pub(crate) async fn accel(&self) -> &AccelReport {
        self.accel
            .get_or_init(|| async {
                let report = match self.settings.accel {
                    Some(accel) => AccelReport {
                        accel,
                        why: "configured".to_owned(),
                    },
                    None => probe_accel().await,
                };
                tracing::info!(accel = %report.accel, why = report.why, "acceleration chosen");
                report
            })
            .await
    }

    /// How guests execute, if that is known yet.
    pub(crate) fn known_accel(&self) -> Option<&AccelReport> {
        self.accel.get()
    }

    /// Runs a guest; returns once it runs, or once nothing of it is left.
    pub(crate) async fn run(self: &Arc<Self>, request: RunRequest) -> Result<Guest, ApiError> {
        let order = Order::check(request, &self.settings)?;
        let report = self.accel().await;
        let (id, mut state) = self.admit(&order, report)?;
        let settled = |state: &GuestState| {
            use GuestState::{Ended, Running, Stopping, Suspended};
            matches!(state, Running | Suspended | Stopping | Ended)
        };
        // An error means that the record is gone, which `view` then tells.
        let _ = state.wait_for(settled).await;
        let inner = self.lock();
        let name = order.name.as_str();
        let guest = inner.view(id).ok_or_else(|| unknown(name))?;
        let launch_error = inner
            .facts
            .get(&id)
            .and_then(|facts| facts.launch_error.clone());
        match (launch_error, guest.ended.as_ref()) {
            (Some(error), _) => Err(error),
            (None, Some(ended)) => Err(ended_at_once(name, ended)),
            (None, None) => Ok(guest),
        }
    }

    /// A guest as it is now.
    pub(crate) fn show(&self, name: &str) -> Result<Guest, ApiError> {
        let inner = self.lock();
        let id = inner.engine.find(name).map(omerta_engine::Guest::id);
        id.and_then(|id| inner.view(id))
            .ok_or_else(|| unknown(name))
    }

    /// Every guest, by name; the ended ones only if asked for.
    pub(crate) fn list(&self, with_ended: bool) -> Vec<Guest> {
        let inner = self.lock();
        let mut guests: Vec<Guest> = inner
            .engine
            .guests()
            .filter(|guest| with_ended || !guest.is_ended())
            .filter_map(|guest| inner.view(guest.id()))
            .collect();
        guests.sort_by(|a, b| a.name.cmp(&b.name));
        guests
    }

    /// Tells a guest's task what someone wants, and waits until nothing of the guest is left.
    pub(crate) async fn end(&self, name: &str, command: Command) -> Result<Guest, ApiError> {
        let (id, mut state) = {
            let inner = self.lock();
            let guest = inner.engine.find(name).ok_or_else(|| unknown(name))?;
            if guest.is_ended() {
                let cause = guest
                    .ending()
                    .map_or("unknown", |ending| ending.cause.word());
                let at = clock::rfc3339(guest.since());
                return Err(not_found(format!(
                    "guest `{name}` ended at {at} ({cause}): see `omerta vm show {name}`"
                )));
            }
            let facts = inner.facts.get(&guest.id()).ok_or_else(|| unknown(name))?;
            // A task that no longer listens is ending its guest already.
            let _ = facts.commands.send(command);
            (guest.id(), facts.state.subscribe())
        };
        let _ = state.wait_for(|state| *state == GuestState::Ended).await;
        self.lock().view(id).ok_or_else(|| unknown(name))
    }

    /// Ends every guest and admits none from here on. Tells how many could not be ended in time.
    pub(crate) async fn shut_down(&self) -> usize {
        {
            let mut inner = self.lock();
            inner
                .engine
                .handle(clock::now(), EngineEvent::ShutdownBegan);
            for facts in inner.facts.values() {
                let _ = facts.commands.send(Command::End(Cause::Shutdown));
            }
        }
        let mut tasks =
            std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let all = async { while tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(SHUTDOWN_DEADLINE, all).await;
        let left = self.list(false).len();
        self.journal.close();
        left
    }

    /// Takes in what happened to a guest and tells what to do about it.
    pub(crate) fn tell(&self, id: GuestId, event: GuestEvent) -> Vec<Action> {
        let mut inner = self.lock();
        let actions = inner
            .engine
            .handle(clock::now(), EngineEvent::Guest(id, event));
        inner.settle(id);
        inner.carry_out_own(actions)
    }

    /// Adds a record to the history.
    pub(crate) fn publish(&self, id: GuestId, at: Monotonic, record: Record) {
        let event = {
            let inner = self.lock();
            let (Some(facts), Some(guest)) = (inner.facts.get(&id), inner.engine.guest(id)) else {
                return;
            };
            Event {
                at: clock::rfc3339(at),
                guest: Some(guest.name().to_owned()),
                what: occurrence(
                    record,
                    &facts.spec,
                    &facts.image_name,
                    facts.pid.unwrap_or_default(),
                ),
            }
        };
        tracing::info!(
            guest = event.guest.as_deref(),
            event = serde_json::to_string(&event.what).unwrap_or_default(),
        );
        self.journal.append(&event);
    }

    /// Notes the hypervisor's process id.
    pub(crate) fn note_pid(&self, id: GuestId, pid: u32) {
        if let Some(facts) = self.lock().facts.get_mut(&id) {
            facts.pid = Some(pid);
        }
    }

    /// Notes why a guest did not come up.
    pub(crate) fn note_launch_error(&self, id: GuestId, error: ApiError) {
        if let Some(facts) = self.lock().facts.get_mut(&id) {
            facts.launch_error = Some(error);
        }
    }

    /// Notes its guard's counters.
    pub(crate) fn note_counters(&self, id: GuestId, counters: Counters) {
        if let Some(facts) = self.lock().facts.get_mut(&id) {
            facts.counters = Some(counters);
        }
    }

    /// What is known of every guest without asking the kernel.
    pub(crate) fn measures(&self) -> Vec<Measure> {
        let inner = self.lock();
        inner
            .engine
            .guests()
            .filter_map(|guest| {
                let facts = inner.facts.get(&guest.id())?;
                Some(Measure {
                    id: guest.id(),
                    name: guest.name().to_owned(),
                    interface: facts.spec.tap.clone(),
                    state: guest.state(),
                    rogue_frames: guest.rogue_frames().collect(),
                    counters: facts.counters.clone(),
                })
            })
            .collect()
    }

    fn admit(
        self: &Arc<Self>,
        order: &Order,
        report: &AccelReport,
    ) -> Result<(GuestId, watch::Receiver<GuestState>), ApiError> {
        let name = order.name.as_str();
        let mut inner = self.lock();
        let (slot, addresses) = inner.slots.take().ok_or_else(|| {
            refused(format!(
                "no address is left for `{name}`: end a guest, or widen --guest-pool"
            ))
        })?;
        let admitted = inner.admit(order, report, slot, addresses, &self.settings);
        let (id, actions, receiver, state) = match admitted {
            Ok(admitted) => admitted,
            Err(error) => {
                inner.slots.give_back(slot);
                return Err(error);
            }
        };
        let actions = inner.carry_out_own(actions);
        let Some(spec) = inner.facts.get(&id).map(|facts| Arc::clone(&facts.spec)) else {
            return Err(unknown(name));
        };
        drop(inner);
        let task = GuestTask::new(id, spec, Arc::clone(self), receiver);
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task.run(actions));
        Ok((id, state))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Admitted = (
    GuestId,
    Vec<Action>,
    mpsc::UnboundedReceiver<Command>,
    watch::Receiver<GuestState>,
);

impl Inner {
    fn admit(
        &mut self,
        order: &Order,
        report: &AccelReport,
        slot: Slot,
        addresses: crate::pool::Addresses,
        settings: &Settings,
    ) -> Result<Admitted, ApiError> {
        let name = order.name.as_str();
        let tap = tap_name(name);
        let request = EngineEvent::GuestRequested {
            name: name.to_owned(),
            on_violation: order.on_violation,
        };
        let spec = order.spec(addresses, tap.clone(), report.accel, &settings.run_dir)?;
        let name_is_free = self
            .engine
            .find(name)
            .is_none_or(omerta_engine::Guest::is_ended);
        if name_is_free && nix::net::if_::if_nametoindex(tap.as_str()).is_ok() {
            return Err(refused(format!(
                "interface {tap}, which guest `{name}` would get, exists already: choose another name, or remove it with `ip link delete {tap}`"
            )));
        }
        let actions = self.engine.handle(clock::now(), request);
        if let Some(Action::Refuse { refusal, .. }) = actions.first() {
            return Err(refused(format!("guest `{name}`: {refusal}")));
        }
        let Some(id) = self.engine.find(name).map(omerta_engine::Guest::id) else {
            return Err(unknown(name));
        };
        let (commands, receiver) = mpsc::unbounded_channel();
        let (state, watcher) = watch::channel(GuestState::Launching);
        self.facts.insert(
            id,
            Facts {
                spec: Arc::new(spec),
                image_name: order.image_name.clone(),
                slot: Some(slot),
                pid: None,
                commands,
                state,
                launch_error: None,
                counters: None,
            },
        );
        Ok((id, actions, receiver, watcher))
    }

    /// Brings the facts up to the engine's state.
    fn settle(&mut self, id: GuestId) {
        let (Some(guest), Some(facts)) = (self.engine.guest(id), self.facts.get_mut(&id)) else {
            return;
        };
        let state = guest.state();
        if guest.is_ended()
            && let Some(slot) = facts.slot.take()
        {
            facts.pid = None;
            self.slots.give_back(slot);
        }
        facts
            .state
            .send_if_modified(|known| std::mem::replace(known, state) != state);
    }

    /// Carries out the actions that concern the fleet itself and returns the others.
    fn carry_out_own(&mut self, actions: Vec<Action>) -> Vec<Action> {
        let mut others = Vec::with_capacity(actions.len());
        for action in actions {
            match action {
                Action::Forget(id) => drop(self.facts.remove(&id)),
                other => others.push(other),
            }
        }
        others
    }

    fn view(&self, id: GuestId) -> Option<Guest> {
        let guest = self.engine.guest(id)?;
        let facts = self.facts.get(&id)?;
        let spec = &facts.spec;
        let file = |name: &str| {
            facts
                .pid
                .map(|_| spec.run_dir.join(name).to_string_lossy().into_owned())
        };
        Some(Guest {
            name: guest.name().to_owned(),
            state: guest.state(),
            interface: spec.tap.clone(),
            address: spec.address,
            gateway: spec.gateway,
            mac: spec.mac.to_string(),
            public_key: guest.public_key().map(str::to_owned),
            handshake: guest.handshake(),
            consumer: consumer_text(&spec.consumer),
            on_violation: guest.on_violation(),
            mode: spec.mode.to_string(),
            image: facts.image_name.clone(),
            cpus: spec.cpus,
            memory_mib: spec.memory_mib,
            pid: facts.pid,
            console: file("console.sock"),
            log: file("console.log"),
            rogue_frames: guest.rogue_frames().map(|(_, count)| count).sum(),
            since: clock::rfc3339(guest.since()),
            ended: guest.ending().map(ended),
        })
    }
}

/// What whoever asked for a guest is told if it has ended before they could be told that it runs.
fn ended_at_once(name: &str, ended: &Ended) -> ApiError {
    let frame = ended.frame.as_deref().unwrap_or("no frame");
    match ended.cause {
        Cause::Rogue => refused(format!(
            "guest `{name}` was ended for rogue traffic as soon as it ran ({frame}): see `omerta events --guest {name}`"
        )),
        cause => ApiError {
            error: ErrorKind::Failed,
            message: format!(
                "guest `{name}` was ended before it ran ({cause}): see `omerta events --guest {name}`"
            ),
        },
    }
}

fn unknown(name: &str) -> ApiError {
    let name: String = name
        .chars()
        .take(64)
        .flat_map(char::escape_default)
        .collect();
    not_found(format!("no guest `{name}`: see `omerta vm list`"))
}
