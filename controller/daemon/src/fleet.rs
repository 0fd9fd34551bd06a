//! Every guest of this omertad: the engine's state and the facts beside it.

use std::collections::BTreeSet;
use std::net::SocketAddrV4;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use omerta_api::{ApiError, Ended, ErrorKind, Event, Guest, RunRequest};
use omerta_dataplane::{Counters, Uplink};
use omerta_engine::{
    Action, Cause, Event as EngineEvent, Found, GuestEvent, GuestId, GuestState, Monotonic,
    OnViolation, Record, Tunnel,
};
use omerta_tunnel::{Namespace, Roaming};
use omerta_vm_launcher::{Scrubbed, Spec};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::acceleration::{Acceleration, Platform};
use crate::clock;
use crate::config::Settings;
use crate::failure::{not_found, refused, usage};
use crate::guest_task::{Adopted, Command, GuestTask};
use crate::host_tunnel;
use crate::incidents::Incidents;
use crate::journal::{Journal, Reader};
use crate::lookups::{self, Lookups};
use crate::names::{Follower, Naming, PeerName};
use crate::order::Order;
use crate::pool::Slot;
use crate::quiet::{Quiet, QuietFor};
use crate::record::occurrence;
use crate::room::{Room, Share};
use crate::roster::{Roster, unknown};
use crate::store::{Change, Stands, Store};

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
    store: Store,
    uplink: Option<Arc<Uplink>>,
    incidents: Incidents,
}

/// What metrics tell of one guest.
#[derive(Clone, Debug)]
pub(crate) struct Measure {
    pub(crate) id: GuestId,
    pub(crate) name: String,
    pub(crate) interface: String,
    /// Where that is, if not where omertad is.
    pub(crate) namespace: Option<Arc<Namespace>>,
    pub(crate) state: GuestState,
    pub(crate) rogue_frames: Vec<(omerta_verdict::Reason, u64)>,
    pub(crate) counters: Option<Counters>,
    /// Whether it has told of a handshake: its own word.
    pub(crate) handshake: bool,
    /// Where its consumer is.
    pub(crate) endpoint: SocketAddrV4,
    /// What was said last of its tunnel.
    pub(crate) tunnel: Option<Tunnel>,
    /// For how long at least nothing has passed its guard.
    pub(crate) quiet: Option<QuietFor>,
}

impl Fleet {
    /// A fleet without guests.
    pub(crate) fn new(
        settings: Settings,
        journal: Arc<Journal>,
        store: Store,
        incidents: Incidents,
        first: GuestId,
    ) -> Self {
        Self {
            store,
            incidents,
            roster: Mutex::new(Roster::new(&settings, first)),
            room: Room::of_process(&settings),
            acceleration: Acceleration::new(settings.accel, settings.machine, &settings.state_dir),
            settings: Arc::new(settings),
            journal,
            lookups: Lookups::new(lookups::DEADLINE),
            tasks: Mutex::new(JoinSet::new()),
            uplink: None,
        }
    }

    /// The same, of guests for whom is dropped early.
    pub(crate) fn dropping_at(mut self, uplink: Option<Arc<Uplink>>) -> Self {
        self.uplink = uplink;
        self
    }

    /// Where is dropped early what is for none of guests' endpoints.
    pub(crate) const fn uplink(&self) -> Option<&Arc<Uplink>> {
        self.uplink.as_ref()
    }

    /// The history of events.
    pub(crate) const fn journal(&self) -> &Arc<Journal> {
        &self.journal
    }

    /// What is kept of guests.
    pub(crate) const fn store(&self) -> &Store {
        &self.store
    }

    /// The record of incidents.
    pub(crate) const fn incidents(&self) -> &Incidents {
        &self.incidents
    }

    /// What is configured.
    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
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
        let (request, naming) = self.with_address(request).await?;
        let (name, ttl) = match naming {
            Naming::Name(name, ttl) => (Some(name), ttl),
            Naming::Address | Naming::AsBefore => (None, Duration::ZERO),
        };
        let image = request.image.chars().take(64);
        let image = format!(
            "image `{}`",
            image.flat_map(char::escape_default).collect::<String>()
        );
        let settings = Arc::clone(&self.settings);
        let check = move || Order::check(request, &settings);
        let order = self.lookups.look(&image, check).await??.of_consumer(name);
        if order.has_host_tunnel() && order.consumer_name.is_some() {
            return Err(usage(
                "a host's tunnel follows its consumer by the consumer's key: give the consumer's address, and no name".into(),
            ));
        }
        let platform = self.acceleration.of(order.image()).await;
        let (id, mut state) = self.admit(&order, platform, ttl)?;
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

    /// The request, with an address for its consumer where that is known by name.
    async fn with_address(&self, request: RunRequest) -> Result<(RunRequest, Naming), ApiError> {
        // What is wrong with it is told by whoever checks it.
        let Some((key, endpoint)) = request.consumer.split_once('@') else {
            return Ok((request, Naming::Address));
        };
        let (at, naming) = self.resolved(endpoint).await?;
        let consumer = match at {
            Some(at) => format!("{key}@{at}"),
            None => request.consumer,
        };
        let request = RunRequest {
            consumer,
            ..request
        };
        Ok((request, naming))
    }

    /// Has a guest follow its consumer's name, which holds for so long yet, or none.
    pub(crate) fn follow(
        self: &Arc<Self>,
        roster: &mut Roster,
        id: GuestId,
        name: Option<PeerName>,
        holds: Duration,
    ) {
        if let Some(facts) = roster.facts.get_mut(&id) {
            facts.follower = name.map(|name| Follower::begin(self, id, name, holds));
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
        let before = seen(&roster, id);
        let actions = roster
            .engine
            .handle(clock::now(), EngineEvent::Guest(id, event));
        roster.settle(id);
        let after = seen(&roster, id);
        let actions = roster.carry_out_own(actions);
        // In the order of the events, since under the lock.
        if let (Some(before), Some(after)) = (before, after) {
            self.keep(id, &before, after);
        }
        actions
    }

    /// Keeps what has come to be known. What cannot be kept is known for as long as this omertad lives.
    fn keep(&self, id: GuestId, before: &Seen, after: Seen) {
        if let Some(stands) = after.stands
            && before.stands != after.stands
        {
            drop(self.store.begin(Change::Stand(id, stands, None)));
        }
        if before.public_key != after.public_key {
            drop(self.store.begin(Change::Key(id, after.public_key)));
        }
        if after.handshake && !before.handshake {
            drop(self.store.begin(Change::Handshake(id)));
        }
    }

    /// Runs a task for a guest.
    fn spawn(&self, task: GuestTask, actions: Vec<Action>) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        if task.spec.reach.is_empty() {
            tasks.spawn(task.run(actions));
            return;
        }
        let (id, name) = (task.id, task.spec.name.clone());
        match host_tunnel::run(task, actions) {
            Ok(end) => drop(tasks.spawn(end)),
            Err(error) => {
                tracing::error!(guest = %name, %error, "no thread for a guest");
                let message = format!("guest `{name}`: no thread for it: {error}");
                self.note_launch_error(
                    id,
                    ApiError {
                        error: ErrorKind::Failed,
                        message: message.clone(),
                    },
                );
                // Nothing has been made.
                let leftovers = Vec::new();
                self.tell(id, GuestEvent::LaunchFailed { message, leftovers });
            }
        }
    }

    /// Takes in a guest of an omertad before this one, which lives on.
    pub(crate) fn adopt(self: &Arc<Self>, found: Found, order: &Order, adopted: Adopted) {
        let id = found.id;
        let spec = Arc::new(adopted.running.spec().clone());
        let (actions, commands) = {
            let mut roster = self.lock();
            let slot = Some(adopted.slot);
            let taken = roster.take_in(found, order, Arc::clone(&spec), slot);
            if let Some(facts) = roster.facts.get_mut(&id) {
                facts.pid = Some(adopted.running.pid());
                let at = spec.consumer.endpoint.into();
                facts.roaming = Roaming::at(at).after(adopted.endpoints.iter().copied());
                if !facts.roaming.former().is_empty() {
                    adopted.running.control().tell(&spec.consumer);
                }
            }
            taken
        };
        // When it was asked for last is not known.
        self.follow(
            &mut self.lock(),
            id,
            order.consumer_name.clone(),
            Duration::ZERO,
        );
        let task = GuestTask::new(id, spec, Arc::clone(self), commands).adopted(adopted);
        self.spawn(task, actions);
    }

    /// Takes in what became of a guest of an omertad before this one, which has ended.
    pub(crate) fn bury(&self, found: Found, order: &Order, spec: Spec, scrubbed: Option<Scrubbed>) {
        let id = found.id;
        let (actions, _) = self.lock().take_in(found, order, Arc::new(spec), None);
        if let Some(Scrubbed { bytes }) = scrubbed {
            self.publish(id, clock::now(), Record::Scrubbed { bytes });
        }
        for action in actions {
            if let Action::Publish { at, record, .. } = action {
                self.publish(id, at, record);
            }
        }
    }

    /// Gives to nobody what a guest holds that is not known otherwise: its place, and what its request says.
    pub(crate) fn withhold(&self, name: &str, slot: Option<Slot>, request: Option<&str>) {
        let share = request.and_then(Share::of_request);
        self.lock().withhold(name, slot, share);
    }

    /// The taps of guests that live.
    pub(crate) fn taps(&self) -> BTreeSet<String> {
        let roster = self.lock();
        let living = roster.engine.guests().filter(|guest| !guest.is_ended());
        living
            .filter_map(|guest| Some(roster.facts.get(&guest.id())?.spec.tap.clone()))
            .collect()
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
                    at,
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

    /// What rogue traffic does to a guest; the hardest where it is not known any more.
    pub(crate) fn on_violation(&self, id: GuestId) -> OnViolation {
        let roster = self.lock();
        let guest = roster.engine.guest(id);
        guest.map_or(OnViolation::Terminate, omerta_engine::Guest::on_violation)
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

    /// Notes a tunnel that is kept for it, and where.
    pub(crate) fn note_tunnel(&self, id: GuestId, key: String, namespace: Arc<Namespace>) {
        if let Some(facts) = self.lock().facts.get_mut(&id) {
            facts.tunnel_key = Some(key);
            facts.namespace = Some(namespace);
        }
    }

    /// Notes its guard's counters.
    pub(crate) fn note_counters(&self, id: GuestId, counters: Counters) {
        if let Some(facts) = self.lock().facts.get_mut(&id) {
            facts.counters = Some(counters);
        }
    }

    /// Notes when something was found to have passed a guest's guard, and tells for how long nothing has.
    pub(crate) fn note_quiet(&self, id: GuestId, counters: &Counters) -> Option<QuietFor> {
        let now = Duration::from_nanos(clock::now().0);
        let mut roster = self.lock();
        let facts = roster.facts.get_mut(&id)?;
        let quiet = Quiet::look(facts.quiet, now, counters);
        facts.quiet = Some(quiet);
        Some(quiet.at(now))
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
                    namespace: facts.namespace.clone(),
                    state: guest.state(),
                    rogue_frames: guest.rogue_frames().collect(),
                    counters: facts.counters.clone(),
                    handshake: guest.handshake(),
                    endpoint: facts.spec.consumer.endpoint,
                    tunnel: guest.tunnel().cloned(),
                    quiet: None,
                })
            })
            .collect()
    }

    /// The guests whose guards judge what they send.
    pub(crate) fn judged(&self) -> Vec<(GuestId, Arc<Spec>)> {
        use GuestState::{Condemned, Held, Running, Stopping, Suspended};
        let roster = self.lock();
        let is_judged = |state| matches!(state, Running | Held | Suspended | Stopping | Condemned);
        roster
            .engine
            .guests()
            .filter(|guest| is_judged(guest.state()))
            .filter_map(|guest| {
                let facts = roster.facts.get(&guest.id())?;
                Some((guest.id(), Arc::clone(&facts.spec)))
            })
            .collect()
    }

    /// Hands to a guest's task what was found of the guest outside of it.
    pub(crate) fn found(&self, id: GuestId, event: GuestEvent) {
        if let Some(facts) = self.lock().facts.get(&id) {
            // A task that no longer listens is ending its guest.
            let _ = facts.commands.send(Command::Found(event));
        }
    }

    fn admit(
        self: &Arc<Self>,
        order: &Order,
        platform: Platform,
        name_holds: Duration,
    ) -> Result<(GuestId, watch::Receiver<GuestState>), ApiError> {
        let (admitted, actions) = {
            let mut roster = self.lock();
            let boot = self.store.boot();
            let mut admitted = roster.admit(order, platform, &self.settings, &self.room, boot)?;
            let actions = std::mem::take(&mut admitted.actions);
            self.follow(
                &mut roster,
                admitted.id,
                order.consumer_name.clone(),
                name_holds,
            );
            (admitted, roster.carry_out_own(actions))
        };
        let task = GuestTask::new(
            admitted.id,
            admitted.spec,
            Arc::clone(self),
            admitted.commands,
        );
        let task = task.granted(admitted.grant).ending_after(order.timeout());
        self.spawn(task, actions);
        Ok((admitted.id, admitted.state))
    }

    /// A guest as it is now, known by its id.
    pub(crate) fn view(&self, id: GuestId, name: &str) -> Result<Guest, ApiError> {
        self.lock().view(id).ok_or_else(|| unknown(name))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Roster> {
        self.roster.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is kept of what is known of a guest.
struct Seen {
    stands: Option<Stands>,
    public_key: Option<String>,
    handshake: bool,
}

fn seen(roster: &Roster, id: GuestId) -> Option<Seen> {
    let guest = roster.engine.guest(id)?;
    let stands = match guest.state() {
        GuestState::Running => Some(Stands::Running),
        GuestState::Held => Some(Stands::Held),
        GuestState::Suspended => Some(Stands::Suspended),
        // Told by who carries it out, before it is; or no longer of interest.
        _ => None,
    };
    Some(Seen {
        stands,
        public_key: guest.public_key().map(str::to_owned),
        handshake: guest.handshake(),
    })
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
