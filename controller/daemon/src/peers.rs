//! Guests' consumers: where each one is, and what follows when it moves.
//!
//! A move is kept first, then committed to the guard, in one commit, then told: to the roster, in an event, to the guest.
//! Killed anywhere between, the next omertad finds by the guard where the consumer is.

use std::net::{SocketAddr, SocketAddrV4};
use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use omerta_api::{ApiError, Guest, Peer, PeerList, PeerRequest, PeerTunnel};
use omerta_dataplane::Guard;
use omerta_engine::{GuestId, GuestState, Record, Tunnel};
use omerta_tunnel::Roaming;
use omerta_vm_launcher::{Consumer, Control, Spec};
use tokio::task::spawn_blocking;

use crate::clock;
use crate::config::Settings;
use crate::failure::{failed, refused, report, usage};
use crate::fleet::Fleet;
use crate::guest_task::Command;
use crate::metrics::read_guard;
use crate::names::{Naming, PeerName};
use crate::order::{kind_of, refuse_forbidden};
use crate::quiet::QuietFor;
use crate::roster::unknown;
use crate::store::Change;

/// One move at a time of one guest's consumer, for as long as this is held.
struct Turn {
    fleet: Arc<Fleet>,
    id: GuestId,
    from: Consumer,
    /// Where it is and was, latest first.
    known: Vec<SocketAddr>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(facts) = self.fleet.lock().facts.get_mut(&self.id) {
            facts.consumer_moves = false;
        }
    }
}

impl Fleet {
    /// Has a guest's allowlist follow its consumer to another endpoint; returns once it has.
    pub(crate) async fn move_consumer(
        self: &Arc<Self>,
        name: String,
        request: PeerRequest,
    ) -> Result<Guest, ApiError> {
        // Whoever is not there is no reason to ask for a name.
        self.show(&name)?;
        let (resolved, naming) = self.resolved(&request.endpoint).await?;
        let to = match resolved {
            Some(resolved) => resolved,
            None => checked(&request.endpoint, self.settings())?,
        };
        let fleet = Arc::clone(self);
        // It goes on where whoever asked for it goes away.
        let moving = tokio::spawn(async move { fleet.carry_over(&name, None, to, naming).await });
        moving.await.map_err(|error| failed(&error))?
    }

    /// The same, where its consumer's name has led elsewhere, for the guest of this id alone.
    pub(crate) async fn follow_consumer(
        self: &Arc<Self>,
        name: &str,
        id: GuestId,
        to: SocketAddrV4,
    ) -> Result<(), ApiError> {
        let (fleet, name) = (Arc::clone(self), name.to_owned());
        // A move is made whole, also where another name is followed meanwhile.
        let moving = async move {
            let moved = fleet.carry_over(&name, Some(id), to, Naming::AsBefore);
            moved.await.map(drop)
        };
        tokio::spawn(moving).await.map_err(|error| failed(&error))?
    }

    async fn carry_over(
        self: &Arc<Self>,
        name: &str,
        expected: Option<GuestId>,
        to: SocketAddrV4,
        naming: Naming,
    ) -> Result<Guest, ApiError> {
        use GuestState::{Held, Running};
        let moving = "move the consumer of";
        let (id, control) = self.ask(name, moving, &[Running, Held], Command::Control)?;
        if expected.is_some_and(|expected| expected != id) {
            return Err(unknown(name));
        }
        let control = control.await.map_err(|_| {
            refused(format!(
                "guest `{name}` is ending: see `omerta vm show {name}`"
            ))
        })?;
        let turn = self.begin_move(id, name, to)?;
        self.name_consumer(id, naming).await?;
        let Some(turn) = turn else {
            return self.view(id, name);
        };
        let endpoints = [SocketAddr::V4(to)]
            .into_iter()
            .chain(turn.known.iter().copied());
        let kept = Change::Endpoints(id, endpoints.take(Roaming::KEPT).collect());
        self.store()
            .change(kept)
            .await
            .map_err(|error| failed(&error))?;
        let consumer = Consumer {
            endpoint: to,
            ..turn.from
        };
        commit(control.clone(), consumer, name).await?;
        self.note_move(id, consumer);
        let record = Record::ConsumerMoved {
            from: turn.from.endpoint.into(),
            to: to.into(),
        };
        self.publish(id, clock::now(), record);
        control.tell(&consumer);
        drop(turn);
        self.view(id, name)
    }

    /// Has a consumer known by another name, or none, from now on.
    async fn name_consumer(self: &Arc<Self>, id: GuestId, naming: Naming) -> Result<(), ApiError> {
        let (name, holds) = match naming {
            Naming::AsBefore => return Ok(()),
            Naming::Address => (None, Duration::ZERO),
            Naming::Name(name, holds) => (Some(name), holds),
        };
        let kept = Change::ConsumerName(id, name.as_ref().map(PeerName::to_string));
        let kept = self.store().change(kept).await;
        kept.map_err(|error| failed(&error))?;
        self.follow(&mut self.lock(), id, name, holds);
        Ok(())
    }

    /// Takes the turn of a move, if the consumer is not there already.
    fn begin_move(
        self: &Arc<Self>,
        id: GuestId,
        name: &str,
        to: SocketAddrV4,
    ) -> Result<Option<Turn>, ApiError> {
        let mut roster = self.lock();
        let facts = roster.facts.get_mut(&id).ok_or_else(|| unknown(name))?;
        if !facts.spec.reach.is_empty() {
            return Err(refused(format!(
                "the tunnel of guest `{name}` is the host's, and follows the consumer that has its key: let the consumer send from where it is"
            )));
        }
        let from = facts.spec.consumer;
        if facts.consumer_moves {
            return Err(refused(format!(
                "the consumer of guest `{name}` is being moved: try again when that is done"
            )));
        }
        if from.endpoint == to {
            return Ok(None);
        }
        let spec = Spec {
            consumer: Consumer {
                endpoint: to,
                ..from
            },
            ..(*facts.spec).clone()
        };
        spec.validate().map_err(|error| usage(error.to_string()))?;
        facts
            .roaming
            .may_move(now())
            .map_err(|error| refused(format!("the consumer of guest `{name}`: {error}")))?;
        let former = facts.roaming.former().iter().copied();
        let known = [SocketAddr::V4(from.endpoint)]
            .into_iter()
            .chain(former)
            .collect();
        facts.consumer_moves = true;
        Ok(Some(Turn {
            fleet: Arc::clone(self),
            id,
            from,
            known,
        }))
    }

    /// Takes in where the consumer of a tunnel that omertad keeps is, by the device's word: whoever is there has its key. The
    /// device has followed already; what is told and kept is no more often than moves by other means may be.
    pub(crate) fn consumer_is_at(&self, id: GuestId, place: SocketAddr) {
        let SocketAddr::V4(endpoint) = place else {
            return;
        };
        let (from, known) = {
            let roster = self.lock();
            let Some(facts) = roster.facts.get(&id) else {
                return;
            };
            let from = facts.spec.consumer;
            if from.endpoint == endpoint || facts.roaming.may_move(now()).is_err() {
                return;
            }
            let former = facts.roaming.former().iter().copied();
            let known: Vec<_> = [place, from.endpoint.into()]
                .into_iter()
                .chain(former)
                .collect();
            (from, known)
        };
        let kept = known.into_iter().take(Roaming::KEPT).collect();
        drop(self.store().begin(Change::Endpoints(id, kept)));
        self.note_move(id, Consumer { endpoint, ..from });
        let record = Record::ConsumerMoved {
            from: from.endpoint.into(),
            to: place,
        };
        self.publish(id, clock::now(), record);
    }

    fn note_move(&self, id: GuestId, consumer: Consumer) {
        if let Some(facts) = self.lock().facts.get_mut(&id) {
            facts.roaming.moved(now(), consumer.endpoint.into());
            facts.spec = Arc::new(Spec {
                consumer,
                ..(*facts.spec).clone()
            });
        }
    }

    /// Whether a guest's consumer was there, and is not any more.
    pub(crate) fn consumer_was_at(&self, id: GuestId, endpoint: SocketAddr) -> bool {
        let roster = self.lock();
        let facts = roster.facts.get(&id);
        facts.is_some_and(|facts| facts.roaming.was_at(endpoint))
    }

    /// The consumer of a guest, if it is elsewhere than the guest was told at its start.
    pub(crate) fn moved_consumer(&self, id: GuestId) -> Option<Consumer> {
        let roster = self.lock();
        let facts = roster.facts.get(&id)?;
        (!facts.roaming.former().is_empty()).then_some(facts.spec.consumer)
    }

    /// The consumers of the guests that live.
    pub(crate) async fn peers(self: &Arc<Self>) -> Result<PeerList, ApiError> {
        let fleet = Arc::clone(self);
        let look = move || {
            let measures = fleet.measures().into_iter();
            let mut peers: Vec<Peer> = measures
                .filter(|measure| measure.state != GuestState::Ended)
                .filter_map(|measure| {
                    let counters = read_guard(&measure);
                    let quiet = counters
                        .as_ref()
                        .and_then(|counters| fleet.note_quiet(measure.id, counters));
                    let bytes = counters.map(|c| (c.egress.allowed.bytes, c.ingress.allowed.bytes));
                    fleet.peer(measure.id, bytes, quiet)
                })
                .collect();
            peers.sort_by(|a, b| a.guest.cmp(&b.guest));
            peers
        };
        let peers = self.lookups().look("the guards' counters", look).await?;
        Ok(PeerList { peers })
    }

    fn peer(
        &self,
        id: GuestId,
        bytes: Option<(u64, u64)>,
        quiet: Option<QuietFor>,
    ) -> Option<Peer> {
        let roster = self.lock();
        let guest = roster.engine.guest(id)?;
        let facts = roster.facts.get(&id)?;
        let Consumer {
            public_key,
            endpoint,
        } = facts.spec.consumer;
        Some(Peer {
            guest: guest.name().to_owned(),
            state: guest.state(),
            public_key: public_key.to_string(),
            endpoint: endpoint.to_string(),
            name: facts
                .follower
                .as_ref()
                .map(|follower| follower.name.to_string()),
            former_endpoints: facts
                .roaming
                .former()
                .iter()
                .map(SocketAddr::to_string)
                .collect(),
            guest_public_key: guest
                .public_key()
                .map(str::to_owned)
                .or_else(|| facts.tunnel_key.clone()),
            handshake: guest.handshake(),
            tunnel: guest.tunnel().map(tunnel),
            sent_bytes: bytes.map(|(sent, _)| sent),
            received_bytes: bytes.map(|(_, received)| received),
            sent_quiet_seconds: quiet.map(|quiet| quiet.sent.as_secs()),
            received_quiet_seconds: quiet.map(|quiet| quiet.received.as_secs()),
        })
    }
}

fn tunnel(known: &Tunnel) -> PeerTunnel {
    let now = clock::now();
    let report = &known.report;
    PeerTunnel {
        witness: report.witness,
        seen_seconds: clock::seconds_between(known.at, now),
        handshake_seconds: report
            .handshake
            .map(|handshake| clock::seconds_between(handshake, now)),
        endpoint: report.endpoint.map(|endpoint| endpoint.to_string()),
        keepalive_seconds: report.keepalive.map(NonZero::get),
        sent_bytes: report.sent_bytes,
        received_bytes: report.received_bytes,
    }
}

/// On a thread that another's lock may keep waiting.
async fn commit(control: Control, consumer: Consumer, name: &str) -> Result<(), ApiError> {
    let committed = spawn_blocking(move || control.allow(&consumer)).await;
    match committed.map_err(|error| failed(&error))? {
        Ok(_) => Ok(()),
        Err(error) => Err(ApiError {
            error: kind_of(&error),
            message: format!(
                "the consumer of guest `{name}` stays where it is: {}",
                report(&error)
            ),
        }),
    }
}

fn checked(endpoint: &str, settings: &Settings) -> Result<SocketAddrV4, ApiError> {
    let parsed: SocketAddrV4 = endpoint.parse().map_err(|_| {
        let shown: String = endpoint
            .chars()
            .take(64)
            .flat_map(char::escape_default)
            .collect();
        usage(format!(
            "endpoint `{shown}` is not one: write NAME:PORT or an IPv4 ADDRESS:PORT"
        ))
    })?;
    refuse_forbidden(*parsed.ip(), settings)?;
    Ok(parsed)
}

/// Of the endpoints that a guest's consumer may be at, the one that its guard allows.
pub(crate) fn endpoint_in_force(spec: &Spec, known: &[SocketAddr]) -> Option<SocketAddrV4> {
    let status = Guard::inspect(&spec.tap).ok()?.status;
    known.iter().find_map(|endpoint| {
        let SocketAddr::V4(endpoint) = *endpoint else {
            return None;
        };
        let consumer = Consumer {
            endpoint,
            ..spec.consumer
        };
        (status.allow == [consumer.allowed_endpoint().to_string()]).then_some(endpoint)
    })
}

fn now() -> Duration {
    Duration::from_nanos(clock::now().0)
}
