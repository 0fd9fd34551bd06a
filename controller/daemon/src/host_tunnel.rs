//! A guest whose tunnel omertad keeps: its thread, the tunnel's start, and where its consumer is.
//!
//! Such a guest has a thread of its own, which begins where the uplink is. With the tunnel it goes into the guest's
//! namespace and never leaves it, so that everything which is made for the guest from then on, tap and guard, is made there.
//! The tunnel, its key and its namespace end with omertad, and so does the guest.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use omerta_api::{ApiError, ErrorKind};
use omerta_engine::{Action, GuestEvent, Monotonic, TunnelReport, Witness};
use omerta_tunnel::{
    AllowedIp, Handshakes, HostTunnel, HostTunnelError, Namespace, Peer, PeerStatus, Plan,
    PublicKey,
};
use omerta_vm_launcher::Spec;
use tokio::sync::oneshot;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, sleep, timeout};

use crate::clock;
use crate::failure::report;
use crate::guest_task::GuestTask;
use crate::pool::Slot;

/// How long a consumer may take to shake hands before its guest begins, where `answer_seconds` does not say.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often a handshake is looked for meanwhile.
const GLANCE: Duration = Duration::from_millis(250);
/// WireGuard tries again after five seconds. The consumer learns the key only now, and should not have to wait for that: in the
/// first half-minute a peer that is set anew tries at once.
const EAGER: Duration = Duration::from_secs(30);
const AGAIN: Duration = Duration::from_secs(1);
/// How often is looked where the consumer is, and what the device says else.
const LOOK: Duration = Duration::from_secs(2);
/// The users of drivers in userspace: those after what guests' QEMUs run as by default.
pub(crate) const FIRST_USER: u32 = 1_900_065_536;
const USERS: u32 = 65_536;
pub(crate) const LAST_USER: u32 = FIRST_USER + USERS - 1;

/// One guest's tunnel, for its task and for whoever tells of it.
#[derive(Clone, Debug)]
pub(crate) struct Tunnel {
    tunnel: Arc<Mutex<HostTunnel>>,
    pub(crate) public_key: PublicKey,
}

impl Tunnel {
    /// Begins a tunnel, and puts this thread into its namespace. See [`HostTunnel::begin`].
    pub(crate) fn begin(spec: &Spec, slot: Slot) -> Result<Self, HostTunnelError> {
        // Its thread is to stay outside.
        omerta_vm_launcher::begin_to_spawn();
        let tunnel = HostTunnel::begin(Plan {
            interface: format!("omw{}", slot.0),
            peer: Peer {
                public_key: spec.consumer.public_key,
                preshared_key: spec.preshared_key.clone(),
                endpoint: Some(spec.consumer.endpoint.into()),
                allowed_ips: [AllowedIp::host(spec.tunnel.peer.into())].into(),
                // It keeps the consumer's side of a path with address translation open, too.
                keepalive: Some(spec.keepalive),
            },
            peer_address: spec.tunnel.peer,
            directory: directory_of(&spec.run_dir),
            user: FIRST_USER + slot.0 % USERS,
        })?;
        tracing::info!(guest = %spec.name, back_end = tunnel.back_end(), "its tunnel is kept here");
        Ok(Self {
            public_key: tunnel.public_key(),
            tunnel: Arc::new(Mutex::new(tunnel)),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HostTunnel> {
        self.tunnel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the device says of the consumer; nothing where it does not answer.
    pub(crate) fn consumer(&self) -> Option<PeerStatus> {
        let status = self.lock().consumer();
        status
            .inspect_err(|error| tracing::warn!(error = report(error), "a tunnel does not answer"))
            .ok()
    }

    /// Waits until the consumer has shaken hands. Safe to cancel.
    async fn handshake(&self) {
        let begun = Instant::now();
        let mut tried = begun;
        while self
            .consumer()
            .is_none_or(|consumer| consumer.last_handshake.is_none())
        {
            if begun.elapsed() < EAGER && tried.elapsed() > AGAIN {
                tried = Instant::now();
                if let Err(error) = self.lock().try_anew() {
                    tracing::warn!(error = report(&error), "a tunnel does not try again");
                }
            }
            sleep(GLANCE).await;
        }
    }
}

/// Where a driver in userspace has its socket: beside the guest's run directory, by no name that a guest can have.
pub(crate) fn directory_of(run_dir: &Path) -> PathBuf {
    run_dir.with_extension("tunnel")
}

/// Watches what a device says of its consumer.
#[derive(Debug)]
pub(crate) struct Roamer {
    tunnel: Tunnel,
    handshakes: Handshakes,
    ticks: Interval,
}

impl Roamer {
    pub(crate) fn of(tunnel: Tunnel) -> Self {
        let mut ticks = interval_at(Instant::now() + LOOK, LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            tunnel,
            handshakes: Handshakes::new(),
            ticks,
        }
    }
}

/// What the device says of the consumer, again and again; never, where the tunnel is the guest's. Safe to cancel.
pub(crate) async fn next_report(roamer: &mut Option<Roamer>) -> TunnelReport {
    let Some(Roamer {
        tunnel,
        handshakes,
        ticks,
    }) = roamer
    else {
        return std::future::pending().await;
    };
    loop {
        ticks.tick().await;
        if let Some(consumer) = tunnel.consumer() {
            let now = Duration::from_nanos(clock::now().0);
            let handshake = handshakes.look(now, SystemTime::now(), consumer.last_handshake);
            return report_of(&consumer, handshake);
        }
    }
}

fn report_of(consumer: &PeerStatus, handshake: Option<Duration>) -> TunnelReport {
    let monotonic = |at: Duration| Monotonic(u64::try_from(at.as_nanos()).unwrap_or(u64::MAX));
    TunnelReport {
        witness: Witness::Host,
        handshake: handshake.map(monotonic),
        endpoint: consumer.peer.endpoint,
        keepalive: consumer.peer.keepalive,
        sent_bytes: consumer.sent_bytes,
        received_bytes: consumer.received_bytes,
    }
}

/// Runs a guest's task on a thread of its own; what is returned ends with it.
pub(crate) fn run(
    task: GuestTask,
    first: Vec<Action>,
) -> std::io::Result<impl Future<Output = ()> + Send> {
    let (ended, end) = oneshot::channel::<()>();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let live = move || {
        runtime.block_on(task.run(first));
        // A step that hangs is given up here too.
        runtime.shutdown_background();
        drop(ended);
    };
    std::thread::Builder::new()
        .name("host-tunnel".to_owned())
        .spawn(live)?;
    Ok(async move {
        // Dropped at its end, however that comes about.
        let _ = end.await;
    })
}

impl GuestTask {
    /// Begins the guest's tunnel, where it is omertad's to keep.
    pub(crate) fn begin_tunnel(&mut self, slot: Slot) -> Result<(), ApiError> {
        if self.spec.reach.is_empty() {
            return Ok(());
        }
        let begun = Tunnel::begin(&self.spec, slot).map_err(|error| ApiError {
            error: ErrorKind::Failed,
            message: report(&error),
        })?;
        let namespace = Namespace::of_this_thread().map_err(|error| ApiError {
            error: ErrorKind::Failed,
            message: format!("cannot open the namespace of the tunnel: {error}"),
        })?;
        let key = begun.public_key.to_string();
        self.fleet.note_tunnel(self.id, key, Arc::new(namespace));
        self.host_tunnel = Some(begun);
        Ok(())
    }

    /// Waits until the consumer has shaken hands with a tunnel that omertad keeps. What comes instead is told: what someone
    /// wants of the guest, or why it does not begin.
    pub(crate) async fn await_handshake(&mut self) -> Result<(), Result<GuestEvent, ApiError>> {
        let Some(tunnel) = self.host_tunnel.clone() else {
            return Ok(());
        };
        let silence = self.fleet.settings().tunnel.silence;
        let patience = silence.first.unwrap_or(PATIENCE);
        let end = Instant::now() + patience;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let command = tokio::select! {
                shaken = timeout(left, tunnel.handshake()) => return match shaken {
                    Ok(()) => Ok(()),
                    Err(_) => Err(Err(ApiError {
                        error: ErrorKind::Refused,
                        message: format!(
                            "its consumer has not shaken hands with the tunnel of key {} within {} s, so it did not begin: \
                             see `omerta vm show` for the key meanwhile, and whether the consumer is reachable",
                            tunnel.public_key,
                            patience.as_secs()
                        ),
                    })),
                },
                command = self.next_command() => command,
            };
            if let Some(event) = command {
                return Err(Ok(event));
            }
        }
    }

    /// What is known of a tunnel that omertad keeps, once its guest runs.
    pub(crate) fn tunnel_events(&self) -> impl Iterator<Item = GuestEvent> + use<> {
        let key = self.host_tunnel.as_ref().map(|tunnel| tunnel.public_key);
        key.into_iter().flat_map(|key| {
            [
                GuestEvent::PublicKeyReported(key.to_string()),
                GuestEvent::HandshakeSeen,
            ]
        })
    }
}
