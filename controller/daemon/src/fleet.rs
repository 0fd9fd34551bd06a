//! Every guest of this omertad: the engine's state and the facts beside it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use omerta_api::{ApiError, Ended, ErrorKind, Event, Guest, RunRequest};
use omerta_dataplane::Counters;
use omerta_engine::{
    Action, Cause, Event as EngineEvent, GuestEvent, GuestId, GuestState, Monotonic, Record,
};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::acceleration::{Acceleration, Platform};
use crate::clock;
use crate::config::Settings;
use crate::failure::{not_found, refused};
use crate::guest_task::{Command, GuestTask};
use crate::journal::{Journal, Reader};
use crate::lookups::{self, Lookups};
use crate::order::Order;
use crate::record::occurrence;
use crate::room::Room;
use crate::roster::{Roster, unknown};

/// How long all guests together may take to end when omertad does.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(8);

/// The guests, and what answers questions about them. One lock, held for microseconds: whoever
/// holds it does no I/O.
#[derive(Debug)]
pub(crate) struct Fleet {
    settings: Arc<Settings>,
    journal: Arc<Journal>,
    lookups: Lookups,
    room: Room,
    roster: Mutex<Roster>,
    tasks: Mutex<JoinSet<()>>,
    acceleration: Acceleration,
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
            roster: Mutex::new(Roster::new(&settings)),
            room: Room::of_process(&settings),
            acceleration: Acceleration::new(settings.accel, settings.machine, &settings.state_dir),
            settings: Arc::new(settings),
            journal,
            lookups: Lookups::new(lookups::DEADLINE),
            tasks: Mutex::new(JoinSet::new()),
        }
    }

    /// The history of events.
    pub(crate) const fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    /// Where files are looked at for people's requests.
    pub(crate) const fn lookups(&self) -> &Lookups {
        &self.lookups
    }

    /// Warns where there is room for fewer guests than are configured.
    pub(crate) fn warn_if_short(&self) {
        self.room.warn_if_short(&self.settings);
    }

    /// A reader of the history, of one guest's events or all.
    pub(crate) fn events(&self, guest: Option<String>, follow: bool) -> Result<Reader, ApiError> {
        if let Some(name) = &guest
            && self.lock().engine.find(name).is_none()
            && !self.journal.knows(name)
        {
            return Err(unknown(name));
        }
        Ok(self.journal.reader(guest, follow))
    }

    /// How guests execute.
    pub(crate) const fn acceleration(&self) -> &Acceleration {
        &self.acceleration
    }

    /// Runs a guest; returns once it runs, or once nothing of it is left.
    pub(crate) async fn run(self: &Arc<Self>, request: RunRequest) -> Result<Guest, ApiError> {
        let image = request.image.chars().take(64);
        let image = format!(
            "image `{}`",
            image.flat_map(char::escape_default).collect::<String>()
        );
        let settings = Arc::clone(&self.settings);
        let check = move || Order::check(request, &settings);
        let order = self.lookups.look(&image, check).await??;
        let platform = self.acceleration.of(order.image()).await;
        let (id, mut state) = self.admit(&order, platform)?;
        let settled = |state: &GuestState| {
            use GuestState::{Ended, Held, Running, Stopping, Suspended};
            matches!(state, Running | Held | Suspended | Stopping | Ended)
        };
        // An error means that the record is gone, which `view` then tells.
        let _ = state.wait_for(settled).await;
        let roster = self.lock();
        let name = order.name.as_str();
        let guest = roster.view(id).ok_or_else(|| unknown(name))?;
        let launch_error = roster
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
        let roster = self.lock();
        let id = roster.engine.find(name).map(omerta_engine::Guest::id);
        id.and_then(|id| roster.view(id))
            .ok_or_else(|| unknown(name))
    }

    /// Every guest, by name; the ended ones only if asked for.
    pub(crate) fn list(&self, with_ended: bool) -> Vec<Guest> {
        let roster = self.lock();
        let mut guests: Vec<Guest> = roster
            .engine
            .guests()
            .filter(|guest| with_ended || !guest.is_ended())
            .filter_map(|guest| roster.view(guest.id()))
            .collect();
        guests.sort_by(|a, b| a.name.cmp(&b.name));
        guests
    }

    /// Tells a guest's task what someone wants, and waits until nothing of the guest is left but
    /// what its ending lists.
    pub(crate) async fn end(&self, name: &str, command: Command) -> Result<Guest, ApiError> {
        let (id, mut state) = {
            let roster = self.lock();
            let guest = roster.engine.find(name).ok_or_else(|| unknown(name))?;
            if guest.is_ended() {
                let cause = guest
                    .ending()
                    .map_or("unknown", |ending| ending.cause.word());
                let at = clock::rfc3339(guest.since());
                return Err(not_found(format!(
                    "guest `{name}` ended at {at} ({cause}): see `omerta vm show {name}`"
                )));
            }
            let facts = roster.facts.get(&guest.id()).ok_or_else(|| unknown(name))?;
            // A task that no longer listens is ending its guest already.
            let _ = facts.commands.send(command);
            (guest.id(), facts.state.subscribe())
        };
        let _ = state.wait_for(|state| *state == GuestState::Ended).await;
        self.lock().view(id).ok_or_else(|| unknown(name))
    }

    /// Ends every guest and admits none from here on. Tells of how many something is left.
    pub(crate) async fn shut_down(&self) -> usize {
        {
            let mut roster = self.lock();
            roster
                .engine
                .handle(clock::now(), EngineEvent::ShutdownBegan);
            for facts in roster.facts.values() {
                let _ = facts.commands.send(Command::End(Cause::Shutdown));
            }
        }
        let mut tasks =
            std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let all = async { while tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(SHUTDOWN_DEADLINE, all).await;
        let is_left = |guest: &Guest| match &guest.ended {
            Some(ended) => !ended.leftovers.is_empty(),
            None => true,
        };
        let left = self
            .list(true)
            .iter()
            .filter(|guest| is_left(guest))
            .count();
        self.journal.close();
        left
    }

    /// Takes in what happened to a guest and tells what to do about it.
    pub(crate) fn tell(&self, id: GuestId, event: GuestEvent) -> Vec<Action> {
        let mut roster = self.lock();
        let actions = roster
            .engine
            .handle(clock::now(), EngineEvent::Guest(id, event));
        roster.settle(id);
        roster.carry_out_own(actions)
    }

    /// Adds a record to the history.
    pub(crate) fn publish(&self, id: GuestId, at: Monotonic, record: Record) {
        let event = {
            let roster = self.lock();
            let (Some(facts), Some(guest)) = (roster.facts.get(&id), roster.engine.guest(id))
            else {
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

    /// Notes what is kept of a guest whose process is gone: its guard's last counters and the end
    /// of its console log.
    pub(crate) fn note_remains(&self, id: GuestId, counters: Option<Counters>, console: Vec<u8>) {
        if let Some(facts) = self.lock().facts.get_mut(&id) {
            facts.counters = counters.or_else(|| facts.counters.take());
            facts.console = Some(console);
        }
    }

    /// The end of an ended guest's console log, and `None` of one that still has its log.
    pub(crate) fn kept_console(&self, name: &str) -> Option<Vec<u8>> {
        let roster = self.lock();
        let id = roster.engine.find(name)?.id();
        roster.facts.get(&id)?.console.clone()
    }

    /// What is known of every guest without asking the kernel.
    pub(crate) fn measures(&self) -> Vec<Measure> {
        let roster = self.lock();
        roster
            .engine
            .guests()
            .filter_map(|guest| {
                let facts = roster.facts.get(&guest.id())?;
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
        platform: Platform,
    ) -> Result<(GuestId, watch::Receiver<GuestState>), ApiError> {
        let (task, actions, id, state) = {
            let mut roster = self.lock();
            let (id, actions, commands, state) =
                roster.admit(order, platform, &self.settings, &self.room)?;
            let actions = roster.carry_out_own(actions);
            let facts = roster
                .facts
                .get(&id)
                .ok_or_else(|| unknown(order.name.as_str()))?;
            let spec = Arc::clone(&facts.spec);
            (
                GuestTask::new(id, spec, Arc::clone(self), commands).ending_after(order.timeout()),
                actions,
                id,
                state,
            )
        };
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task.run(actions));
        Ok((id, state))
    }

    /// A guest as it is now, known by its id.
    pub(crate) fn view(&self, id: GuestId, name: &str) -> Result<Guest, ApiError> {
        self.lock().view(id).ok_or_else(|| unknown(name))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Roster> {
        self.roster.lock().unwrap_or_else(PoisonError::into_inner)
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
