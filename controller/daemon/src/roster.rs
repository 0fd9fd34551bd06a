//! What is known of every guest, behind the fleet's lock.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use omerta_api::{ApiError, Guest};
use omerta_dataplane::Counters;
use omerta_engine::{
    Action, AgentReport, Engine, Event as EngineEvent, Found, GuestId, GuestState,
};
use omerta_tunnel::{Namespace, Roaming};
use omerta_vm_launcher::Spec;
use tokio::sync::{mpsc, watch};

use crate::acceleration::Platform;
use crate::clock;
use crate::config::Settings;
use crate::failure::{failed, not_found, refused};
use crate::guest_task::Command;
use crate::names::{Follower, PeerName};
use crate::order::Order;
use crate::order_words::{consumer_text, guest_limits, tunnel_word};
use crate::pool::{Addresses, Slot, Slots};
use crate::quiet::Quiet;
use crate::record::ended;
use crate::room::{Room, Share};
use crate::store::Grant;
use crate::tap_name::tap_name;

/// The engine and the facts that it has no use for.
#[derive(Debug)]
pub(crate) struct Roster {
    pub(crate) engine: Engine,
    pub(crate) slots: Slots,
    pub(crate) facts: HashMap<GuestId, Facts>,
    /// What is held by what is left of guests that have ended, and by those that nobody looks after.
    withheld: Share,
    /// One of whom is not known what it holds.
    unknown: Option<String>,
}

/// What is known of a guest beside its state.
#[derive(Debug)]
pub(crate) struct Facts {
    pub(crate) spec: Arc<Spec>,
    /// Where its consumer is and was.
    pub(crate) roaming: Roaming,
    /// Its consumer's name, and who follows it, where it is known by one.
    pub(crate) follower: Option<Follower>,
    /// The key of a tunnel that omertad keeps for it, and the namespace that it lives in.
    pub(crate) tunnel_key: Option<String>,
    pub(crate) namespace: Option<Arc<Namespace>>,
    /// Its consumer is being moved.
    pub(crate) consumer_moves: bool,
    pub(crate) image_name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) timeout_seconds: Option<u32>,
    /// Held until the guest has ended.
    pub(crate) slot: Option<Slot>,
    pub(crate) pid: Option<u32>,
    pub(crate) commands: mpsc::UnboundedSender<Command>,
    pub(crate) state: watch::Sender<GuestState>,
    pub(crate) launch_error: Option<ApiError>,
    /// Its guard's counters as last read: what remains of them once the guard is gone.
    pub(crate) counters: Option<Counters>,
    /// When those that count what passes were found to have risen.
    pub(crate) quiet: Option<Quiet>,
    /// The end of its console log, once the log is gone with the guest.
    pub(crate) console: Option<Vec<u8>>,
}

/// A guest that was admitted: what its task needs, and where its state can be watched.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) id: GuestId,
    pub(crate) grant: Grant,
    pub(crate) spec: Arc<Spec>,
    pub(crate) actions: Vec<Action>,
    pub(crate) commands: mpsc::UnboundedReceiver<Command>,
    pub(crate) state: watch::Receiver<GuestState>,
}

impl Roster {
    /// A roster without guests.
    pub(crate) fn new(settings: &Settings, first: GuestId) -> Self {
        Self {
            engine: Engine::new(settings.max_guests)
                .with_ids_from(first)
                .judging_by(settings.thresholds.clone(), settings.guest_pool.network()),
            slots: Slots::new(settings.guest_pool),
            facts: HashMap::new(),
            withheld: Share::default(),
            unknown: None,
        }
    }

    /// Admits a guest, or changes nothing.
    pub(crate) fn admit(
        &mut self,
        order: &Order,
        platform: Platform,
        settings: &Settings,
        room: &Room,
        boot: &str,
    ) -> Result<Admitted, ApiError> {
        let name = order.name.as_str();
        // A name that is taken is refused for that, by the engine.
        if self.is_free(name)
            && let Some(unknown) = &self.unknown
        {
            return Err(refused(format!(
                "no room for guest `{name}`: what guest `{unknown}` holds, which an omertad before had left, cannot be read, and nothing is given out twice: the log says how to free it"
            )));
        }
        if self.is_free(name)
            && let Some(short) = room.short_for(order.share(), self.held(), order.memory())
        {
            return Err(refused(format!("no room for guest `{name}`: {short}")));
        }
        let (slot, addresses) = self.slots.take().ok_or_else(|| {
            let name = &order.name;
            refused(format!(
                "no address is left for `{name}`: end a guest, or widen --guest-pool"
            ))
        })?;
        self.admit_to(slot, addresses, order, platform, settings, boot)
            .inspect_err(|_| self.slots.give_back(slot))
    }

    /// What living guests take, and what is withheld. What is left of others has a slot still.
    fn held(&self) -> Share {
        let mut held = Share {
            guests: self.slots.held(),
            ..self.withheld
        };
        for facts in self.facts.values().filter(|facts| facts.slot.is_some()) {
            held.vcpus += u64::from(facts.spec.cpus);
            held.memory_mib += u64::from(facts.spec.memory_mib);
        }
        held
    }

    /// Whether no living guest has the name.
    fn is_free(&self, name: &str) -> bool {
        let guest = self.engine.find(name);
        guest.is_none_or(omerta_engine::Guest::is_ended)
    }

    fn admit_to(
        &mut self,
        slot: Slot,
        addresses: Addresses,
        order: &Order,
        platform: Platform,
        settings: &Settings,
        boot: &str,
    ) -> Result<Admitted, ApiError> {
        let name = order.name.as_str();
        let tap = tap_name(name);
        let request = EngineEvent::GuestRequested {
            name: name.to_owned(),
            on_violation: order.on_violation,
        };
        let spec = order.spec(addresses, tap.clone(), platform, &settings.run_dir)?;
        if self.is_free(name) && order.tap_exists {
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
        let request = serde_json::to_string(&order.request()).map_err(|error| failed(&error))?;
        let grant = Grant {
            id,
            name: name.to_owned(),
            request,
            slot: slot.0,
            accel: spec.accel.word().to_owned(),
            machine: spec.machine.word().to_owned(),
            run_dir: spec.run_dir.to_string_lossy().into_owned(),
            boot: boot.to_owned(),
            consumer_name: order.consumer_name.as_ref().map(PeerName::to_string),
        };
        let spec = Arc::new(spec);
        let (commands, state) = self.know(id, order, Arc::clone(&spec), Some(slot));
        Ok(Admitted {
            id,
            grant,
            spec,
            actions,
            commands,
            state,
        })
    }

    /// Gives to nobody, from now on, what a guest holds that is not among the facts. Where that is not known,
    /// nothing is given out at all.
    pub(crate) fn withhold(&mut self, name: &str, slot: Option<Slot>, share: Option<Share>) {
        if let Some(slot) = slot {
            self.slots.hold(slot);
        }
        match share {
            Some(share) if slot.is_some() => {
                self.withheld.vcpus += share.vcpus;
                self.withheld.memory_mib += share.memory_mib;
            }
            _ => self.unknown = Some(name.escape_default().take(64).collect()),
        }
    }

    /// Takes in a guest that was there before this omertad.
    pub(crate) fn take_in(
        &mut self,
        found: Found,
        order: &Order,
        spec: Arc<Spec>,
        slot: Option<Slot>,
    ) -> (Vec<Action>, mpsc::UnboundedReceiver<Command>) {
        let id = found.id;
        let slot = slot.filter(|slot| self.slots.hold(*slot));
        let actions = self
            .engine
            .handle(clock::now(), EngineEvent::GuestFound(found));
        let (commands, _) = self.know(id, order, spec, slot);
        if let (Some(guest), Some(facts)) = (self.engine.guest(id), self.facts.get_mut(&id)) {
            facts.state.send_replace(guest.state());
        }
        (self.carry_out_own(actions), commands)
    }

    fn know(
        &mut self,
        id: GuestId,
        order: &Order,
        spec: Arc<Spec>,
        slot: Option<Slot>,
    ) -> (
        mpsc::UnboundedReceiver<Command>,
        watch::Receiver<GuestState>,
    ) {
        let (commands, receiver) = mpsc::unbounded_channel();
        let (state, watcher) = watch::channel(GuestState::Launching);
        let facts = Facts {
            roaming: Roaming::at(spec.consumer.endpoint.into()),
            follower: None,
            tunnel_key: None,
            namespace: None,
            consumer_moves: false,
            spec,
            image_name: order.image_name.clone(),
            labels: order.labels().clone(),
            timeout_seconds: order.timeout_seconds(),
            slot,
            pid: None,
            commands,
            state,
            launch_error: None,
            counters: None,
            quiet: None,
            console: None,
        };
        self.facts.insert(id, facts);
        (receiver, watcher)
    }

    /// Brings the facts up to the engine's state.
    pub(crate) fn settle(&mut self, id: GuestId) {
        let (Some(guest), Some(facts)) = (self.engine.guest(id), self.facts.get_mut(&id)) else {
            return;
        };
        let state = guest.state();
        if let Some(ending) = guest.ending()
            && let Some(slot) = facts.slot.take()
        {
            facts.pid = None;
            facts.follower = None;
            facts.namespace = None;
            // What could not be removed may still have the address, and a process that does not die its memory.
            if ending.leftovers.is_empty() {
                self.slots.give_back(slot);
            } else {
                self.withheld.vcpus += u64::from(facts.spec.cpus);
                self.withheld.memory_mib += u64::from(facts.spec.memory_mib);
            }
        }
        facts
            .state
            .send_if_modified(|known| std::mem::replace(known, state) != state);
    }

    /// Carries out the actions that concern the fleet itself and returns the others.
    pub(crate) fn carry_out_own(&mut self, actions: Vec<Action>) -> Vec<Action> {
        let mut others = Vec::with_capacity(actions.len());
        for action in actions {
            match action {
                Action::Forget(id) => drop(self.facts.remove(&id)),
                other => others.push(other),
            }
        }
        others
    }

    /// The guest as it is told on the wire.
    pub(crate) fn view(&self, id: GuestId) -> Option<Guest> {
        let guest = self.engine.guest(id)?;
        let facts = self.facts.get(&id)?;
        let spec = &facts.spec;
        let file = |name: &str| {
            facts
                .pid
                .map(|_| spec.run_dir.join(name).to_string_lossy().into_owned())
        };
        Some(Guest {
            id: id.0,
            name: guest.name().to_owned(),
            state: guest.state(),
            interface: spec.tap.clone(),
            address: spec.address,
            gateway: spec.gateway,
            mac: spec.mac.to_string(),
            public_key: guest
                .public_key()
                .map(str::to_owned)
                .or_else(|| facts.tunnel_key.clone()),
            handshake: guest.handshake(),
            agent: spec.agent.map(|_| {
                let report = guest.agent().map_or("awaited", AgentReport::word);
                report.to_owned()
            }),
            consumer: consumer_text(&spec.consumer),
            tunnel: tunnel_word(spec).to_owned(),
            reach: spec.reach.iter().map(ToString::to_string).collect(),
            consumer_name: facts
                .follower
                .as_ref()
                .map(|follower| follower.name.to_string()),
            on_violation: guest.on_violation(),
            mode: spec.mode.to_string(),
            limits: guest_limits(spec.limits),
            image: facts.image_name.clone(),
            cpus: spec.cpus,
            memory_mib: spec.memory_mib,
            timeout_seconds: facts.timeout_seconds,
            labels: facts.labels.clone(),
            pid: facts.pid,
            console: file("console.sock"),
            log: file("console.log"),
            rogue_frames: guest.rogue_frames().map(|(_, count)| count).sum(),
            since: clock::rfc3339(guest.since()),
            ended: guest.ending().map(ended),
        })
    }
}

/// No guest has the name.
pub(crate) fn unknown(name: &str) -> ApiError {
    let name: String = name
        .chars()
        .take(64)
        .flat_map(char::escape_default)
        .collect();
    not_found(format!("no guest `{name}`: see `omerta vm list`"))
}
