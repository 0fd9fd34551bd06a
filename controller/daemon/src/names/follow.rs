//! A guest whose consumer is known by name follows it.

use std::net::{SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use omerta_api::ApiError;
use omerta_engine::{GuestId, GuestState, Record};
use omerta_tunnel::PeerEndpoint;
use tokio::task::AbortHandle;
use tokio::time::sleep;

use super::PeerName;
use crate::clock;
use crate::failure::{report, usage};
use crate::fleet::Fleet;

/// What a consumer is known by from a move on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Naming {
    /// What it was known by before.
    AsBefore,
    /// Its address.
    Address,
    /// A name that was just answered, and for how long that holds.
    Name(PeerName, Duration),
}

/// The task that asks for one guest's consumer's name again and again. Dropped, it ends.
#[derive(Debug)]
pub(crate) struct Follower {
    pub(crate) name: PeerName,
    task: AbortHandle,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Follower {
    /// Follows a name that was answered just now; at once, where that is not known.
    pub(crate) fn begin(fleet: &Arc<Fleet>, id: GuestId, name: PeerName, ttl: Duration) -> Self {
        let fleet = Arc::clone(fleet);
        let host = name.clone();
        let task = tokio::spawn(async move { follow(&fleet, id, &host, ttl).await });
        Self {
            name,
            task: task.abort_handle(),
        }
    }
}

async fn follow(fleet: &Arc<Fleet>, id: GuestId, name: &PeerName, ttl: Duration) {
    let settings = &fleet.settings().names;
    let mut wait = ttl;
    // Why it is not followed, as told last: the same is told once.
    let mut told: Option<String> = None;
    loop {
        sleep(wait).await;
        let Some((guest, state, at)) = fleet.consumer_of(id) else {
            return;
        };
        wait = settings.least;
        if !matches!(state, GuestState::Running | GuestState::Held) {
            continue;
        }
        let answer = settings.resolve(&name.host, fleet.settings().guest_pool);
        let moved = match answer.await {
            Err(error) => Err(report(&error)),
            Ok(answer) => {
                wait = settings.until(answer.ttl);
                match answer.addresses.first() {
                    // Of several it stays with the one that it is at.
                    Some(first)
                        if !(answer.addresses.contains(at.ip()) && at.port() == name.port) =>
                    {
                        let to = SocketAddrV4::new(*first, name.port);
                        let moving = fleet.follow_consumer(&guest, id, to).await;
                        moving.map_err(|error| error.message)
                    }
                    _ => Ok(()),
                }
            }
        };
        match moved {
            Ok(()) => told = None,
            Err(message) if told.as_ref() != Some(&message) => {
                wait = settings.least;
                let record = Record::ConsumerStays {
                    name: name.to_string(),
                    at: SocketAddr::V4(at),
                    message: message.clone(),
                };
                fleet.publish(id, clock::now(), record);
                told = Some(message);
            }
            Err(_) => wait = settings.least,
        }
    }
}

impl Fleet {
    /// Puts an address in place of a name in what a consumer is asked for by, and gives the name.
    pub(crate) async fn resolved(
        &self,
        endpoint: &str,
    ) -> Result<(Option<SocketAddrV4>, Naming), ApiError> {
        let Ok(PeerEndpoint::Name { host, port }) = endpoint.parse() else {
            return Ok((None, Naming::Address));
        };
        let settings = &self.settings().names;
        let answer = settings.resolve(&host, self.settings().guest_pool).await;
        let answer =
            answer.map_err(|error| usage(format!("consumer `{host}`: {}", report(&error))))?;
        let first = answer.addresses.first();
        let at = first.map(|first| SocketAddrV4::new(*first, port));
        let ttl = settings.until(answer.ttl);
        Ok((at, Naming::Name(PeerName { host, port }, ttl)))
    }

    /// A guest by its id that has not ended: its name, its state and where its consumer is.
    fn consumer_of(&self, id: GuestId) -> Option<(String, GuestState, SocketAddrV4)> {
        let roster = self.lock();
        let guest = roster.engine.guest(id).filter(|guest| !guest.is_ended())?;
        let at = roster.facts.get(&id)?.spec.consumer.endpoint;
        Some((guest.name().to_owned(), guest.state(), at))
    }
}
