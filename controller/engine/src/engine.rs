//! All guests: who is admitted, who is remembered.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use crate::guest::JudgedBy;
use crate::{
    Action, Event, Found, Guest, GuestId, GuestNetwork, Monotonic, OnViolation, Refusal, Thresholds,
};

/// How many ended guests are remembered.
pub const ENDED_KEPT: usize = 64;

/// The one owner of the state of every guest.
#[derive(Debug)]
pub struct Engine {
    guests: BTreeMap<GuestId, Guest>,
    names: HashMap<String, GuestId>,
    ended: VecDeque<GuestId>,
    next_id: u64,
    limit: usize,
    shutting_down: bool,
    judged_by: Arc<JudgedBy>,
}

impl Engine {
    /// An engine without guests that lets `limit` of them live at once.
    pub fn new(limit: usize) -> Self {
        Self {
            guests: BTreeMap::new(),
            names: HashMap::new(),
            ended: VecDeque::new(),
            next_id: 0,
            limit,
            shutting_down: false,
            judged_by: Arc::default(),
        }
    }

    /// The same, whose guests' frames act by `thresholds`, and whose guests' addresses are of `network`.
    pub fn judging_by(mut self, thresholds: Thresholds, network: GuestNetwork) -> Self {
        self.judged_by = Arc::new(JudgedBy {
            thresholds,
            network: Some(network),
        });
        self
    }

    /// The same, whose guests' ids begin with this one: those before were others'.
    pub fn with_ids_from(mut self, first: GuestId) -> Self {
        self.next_id = first.0;
        self
    }

    /// Takes in what happened and tells what to do about it. An event of a guest that is not
    /// known changes nothing.
    pub fn handle(&mut self, now: Monotonic, event: Event) -> Vec<Action> {
        match event {
            Event::GuestRequested { name, on_violation } => self.admit(now, name, on_violation),
            Event::GuestFound(found) => self.take_in(now, found),
            Event::ShutdownBegan => {
                self.shutting_down = true;
                Vec::new()
            }
            Event::Guest(id, event) => {
                let Some(guest) = self.guests.get_mut(&id) else {
                    return Vec::new();
                };
                let was_ended = guest.is_ended();
                let mut actions = Vec::new();
                guest.handle(now, event, &mut actions);
                if guest.is_ended() && !was_ended {
                    self.remember(id, &mut actions);
                }
                actions
            }
        }
    }

    /// A guest by id.
    pub fn guest(&self, id: GuestId) -> Option<&Guest> {
        self.guests.get(&id)
    }

    /// The guest that has the name, or had it last.
    pub fn find(&self, name: &str) -> Option<&Guest> {
        self.names.get(name).and_then(|id| self.guests.get(id))
    }

    /// Every guest, the remembered ones too, oldest first.
    pub fn guests(&self) -> impl Iterator<Item = &Guest> {
        self.guests.values()
    }

    fn admit(&mut self, now: Monotonic, name: String, on_violation: OnViolation) -> Vec<Action> {
        let known = self
            .find(&name)
            .map(|guest| (guest.id(), guest.state(), guest.is_ended()));
        let refusal = match known {
            _ if self.shutting_down => Some(Refusal::ShuttingDown),
            Some((_, state, false)) => Some(Refusal::NameTaken(state)),
            _ if self.alive() >= self.limit => Some(Refusal::Full(self.limit)),
            _ => None,
        };
        if let Some(refusal) = refusal {
            return vec![Action::Refuse { name, refusal }];
        }
        let mut actions = Vec::new();
        if let Some((old, ..)) = known {
            self.forget(old, &mut actions);
        }
        let id = GuestId(self.next_id);
        self.next_id += 1;
        self.names.insert(name.clone(), id);
        self.guests.insert(
            id,
            Guest::request(id, name, on_violation, &self.judged_by, now, &mut actions),
        );
        actions
    }

    /// A guest of a name that is known already has gone before: nothing is lost of the later one.
    fn take_in(&mut self, now: Monotonic, found: Found) -> Vec<Action> {
        let mut actions = Vec::new();
        let id = found.id;
        if let Some(old) = self.find(&found.name).map(Guest::id) {
            self.forget(old, &mut actions);
        }
        self.next_id = self.next_id.max(id.0 + 1);
        self.names.insert(found.name.clone(), id);
        let guest = Guest::found(found, &self.judged_by, now, &mut actions);
        let is_ended = guest.is_ended();
        self.guests.insert(id, guest);
        if is_ended {
            self.remember(id, &mut actions);
        }
        actions
    }

    fn alive(&self) -> usize {
        self.guests.len() - self.ended.len()
    }

    fn remember(&mut self, id: GuestId, actions: &mut Vec<Action>) {
        self.ended.push_back(id);
        if self.ended.len() > ENDED_KEPT
            && let Some(&oldest) = self.ended.front()
        {
            self.forget(oldest, actions);
        }
    }

    fn forget(&mut self, id: GuestId, actions: &mut Vec<Action>) {
        if let Some(guest) = self.guests.remove(&id) {
            self.names.remove(guest.name());
        }
        self.ended.retain(|ended| *ended != id);
        actions.push(Action::Forget(id));
    }
}
