//! What is done with the guests of an omertad that died: those that run are taken over, the rest undone.
//!
//! A row says how far its guest had come. Only one that ran, in this boot, may live on, and only where
//! everything that was proven before it ran is proven again. All else is removed by its traces; as long
//! as it is not proven gone its row stays, and with it what it holds. So does the row that cannot be read.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use omerta_engine::{
    Cause, Ending, Fate, Found as FoundGuest, GuestEvent, GuestId, GuestState, Monotonic,
    OnViolation,
};
use omerta_incidents::Deed;
use omerta_tunnel::PeerEndpoint;
use omerta_vm_launcher::{Accel, Found, Running, Spec, Traces, Unwound, unwind};
use tokio::task::{JoinSet, spawn_blocking};

use crate::acceleration::Platform;
use crate::cases::{Cases, Open, Past};
use crate::clock;
use crate::config::Settings;
use crate::failure::report;
use crate::fleet::Fleet;
use crate::guest_task::Adopted;
use crate::host_tunnel::directory_of;
use crate::names::PeerName;
use crate::order::Order;
use crate::peers::endpoint_in_force;
use crate::pool::Slot;
use crate::store::{Broken, Change, Grant, Kept, Remains, Stands, Step};
use crate::sweep::OWNER;
use crate::tap_name::tap_name;
use crate::watch::Watch;

/// A guest's row, understood.
#[derive(Debug)]
struct Known {
    kept: Kept,
    order: Order,
    spec: Spec,
}

/// Why a guest that ran does not live on.
#[derive(Debug)]
struct Lost {
    cause: Cause,
    message: String,
}

impl Lost {
    fn because(message: impl Into<String>) -> Self {
        Self {
            cause: Cause::Abandoned,
            message: message.into(),
        }
    }
}

/// Takes over or undoes every guest of the store. Those that live on come first: what is undone after
/// finds them in possession of what is theirs.
///
/// What the record has begun to tell of them, in `cases`, it tells to the end.
pub(crate) async fn recover(
    fleet: &Arc<Fleet>,
    guests: Vec<Kept>,
    broken: Vec<Broken>,
    mut cases: Cases,
) {
    let mut taking = JoinSet::new();
    for kept in guests {
        let fleet = Arc::clone(fleet);
        let past = cases.take(kept.grant.id);
        taking.spawn(async move { take_over_or_tell(&fleet, kept, past).await });
    }
    let open_of = |broken: &Broken, cases: &mut Cases| {
        let id = u64::try_from(broken.row).ok().map(GuestId);
        id.map_or_else(Vec::new, |id| cases.take(id).open)
    };
    let broken: Vec<_> = broken
        .into_iter()
        .map(|broken| {
            let open = open_of(&broken, &mut cases);
            (broken, open)
        })
        .collect();
    // Without a row nothing is left of them.
    let gone = "it is gone: an omertad before this one has ended it, or lost its row, and did not record when and how";
    close(fleet, cases.left(), gone);
    let mut lost = Vec::new();
    while let Some(taken) = taking.join_next().await {
        match taken {
            Ok(None) => {}
            Ok(Some(guest)) => lost.push(guest),
            Err(error) => tracing::error!(%error, "taking over a guest broke off: its row stays"),
        }
    }
    let mut undoing = JoinSet::new();
    for (kept, why, open) in lost {
        let fleet = Arc::clone(fleet);
        undoing.spawn(async move { undo(&fleet, kept, why, open).await });
    }
    for (broken, open) in broken {
        let fleet = Arc::clone(fleet);
        undoing.spawn(async move { clear(&fleet, broken, open).await });
    }
    while undoing.join_next().await.is_some() {}
}

/// Has recorded that the guests of these cases have ended.
fn close(fleet: &Fleet, open: impl IntoIterator<Item = Open>, message: &str) {
    for open in open {
        let ended = open.outcome(Deed::Ended, message);
        fleet.incidents().record(clock::now(), ended);
    }
}

/// Takes over a guest, or tells why it cannot be.
async fn take_over_or_tell(
    fleet: &Arc<Fleet>,
    kept: Kept,
    past: Past,
) -> Option<(Kept, Lost, Vec<Open>)> {
    let open = past.open.clone();
    match take_over(fleet, &kept, past).await {
        Ok(()) => None,
        Err(lost) => Some((kept, lost, open)),
    }
}

async fn take_over(fleet: &Arc<Fleet>, kept: &Kept, past: Past) -> Result<(), Lost> {
    if kept.grant.boot != fleet.store().boot() {
        return Err(Lost {
            cause: Cause::Rebooted,
            message: "the host has booted since".to_owned(),
        });
    }
    if kept.step != Step::Running {
        return Err(Lost::because(match kept.step {
            Step::Ending => "omertad died while it ended",
            _ => "omertad died before it ran",
        }));
    }
    if let Some(open) = past.open.iter().find(|open| open.ends) {
        let case = &open.case;
        return Err(Lost::because(format!(
            "omertad died before it had ended it for incident {case}"
        )));
    }
    let known = match understand(kept.clone(), fleet.settings()) {
        Ok(known) => known,
        Err(why) if kept.traces.may_live().await => {
            leave_alone(fleet, kept, &why);
            return Ok(());
        }
        Err(why) => return Err(Lost::because(why)),
    };
    let Known {
        kept,
        order,
        mut spec,
    } = known;
    if !spec.reach.is_empty() {
        return Err(Lost::because(
            "its tunnel was the omertad's that died, and ended with it",
        ));
    }
    if let Some(endpoint) = endpoint_in_force(&spec, &kept.seen.endpoints) {
        spec.consumer.endpoint = endpoint;
    }
    let name = spec.name.clone();
    let (running, found) = Running::adopt(spec, &kept.traces)
        .await
        .map_err(|error| Lost::because(error.report()))?;
    if order.has_disk() && !running.has_disk() {
        running.leave();
        return Err(Lost::because("its QEMU has its disk no more"));
    }
    let condemned = !past.open.is_empty();
    match settle(&running, found, &kept, &order, condemned).await {
        Ok((state, event)) => {
            let watch = match Watch::open(name.as_str(), running.guard(), fleet.uplink()) {
                Ok(watch) => watch,
                Err(error) => {
                    running.leave();
                    return Err(Lost::because(report(&error)));
                }
            };
            if let Some(open) = past.open.iter().find(|open| !open.has_outcome) {
                let still = "omertad died meanwhile, and the next one has it stand still: when it began to is not recorded";
                let paused = open.outcome(Deed::Paused, still);
                fleet.incidents().record(clock::now(), paused);
            }
            let now = clock::now().0;
            let left = kept.seen.ends_at.map(|ends| ends.saturating_sub(now));
            let fate = Fate::Adopted {
                state,
                resume_ordered_at: Monotonic(kept.seen.resumed_at.unwrap_or_default()),
                public_key: kept.seen.public_key,
                handshake: kept.seen.handshake,
            };
            let guest = FoundGuest {
                id: kept.grant.id,
                name: kept.grant.name,
                on_violation: order.on_violation,
                fate,
            };
            let adopted = Adopted {
                running,
                watch,
                slot: Slot(kept.grant.slot),
                left: left.map(Duration::from_nanos),
                event,
                endpoints: kept.seen.endpoints,
                since: Monotonic(kept.seen.resumed_at.unwrap_or_default()),
                past,
            };
            tracing::info!(guest = %name, "took over a guest that an omertad before had left");
            fleet.adopt(guest, &order, adopted);
            Ok(())
        }
        Err(lost) => {
            running.leave();
            Err(lost)
        }
    }
}

/// Leaves a guest to its guard whose row cannot be understood: unknown is not dead. It keeps what its row holds.
fn leave_alone(fleet: &Fleet, kept: &Kept, why: &str) {
    let Grant {
        name,
        slot,
        request,
        ..
    } = &kept.grant;
    fleet.withhold(name, Some(Slot(*slot)), Some(request));
    let pid = kept.traces.process.map_or(0, |(pid, _)| pid);
    tracing::error!(
        guest = name,
        pid,
        why,
        "the row of a guest that runs cannot be understood: it runs on behind its guard, and nobody looks after it. \
         Start the omertad again that ran it, or end this process and start omertad again, which removes what is left"
    );
}

/// Removes what is left of a guest whose row is broken, where what it is to be removed by can be read and it is proven
/// dead. Otherwise it is left to its guard, and keeps what its row holds.
async fn clear(fleet: &Arc<Fleet>, broken: Broken, open: Vec<Open>) {
    let Broken {
        row,
        name,
        slot,
        request,
        remains,
        columns,
    } = broken;
    let called = name.unwrap_or_else(|| format!("row {row}"));
    let hold = || fleet.withhold(&called, slot.map(Slot), request.as_deref());
    let Some(remains) = remains else {
        hold();
        tracing::error!(
            guest = called,
            row,
            columns,
            "the row of a guest is broken: whether it runs cannot be told. It is left behind its guard, and nobody looks after it. \
             Once its QEMU has ended and omertad is stopped, `DELETE FROM guests WHERE id = {row}` in guests.db frees what it holds"
        );
        return;
    };
    let booted = remains.boot != fleet.store().boot();
    if !booted && remains.traces.may_live().await {
        hold();
        let pid = remains.traces.process.map_or(0, |(pid, _)| pid);
        tracing::error!(
            guest = called,
            row,
            columns,
            pid,
            "the row of a guest that runs is broken: it runs on behind its guard, and nobody looks after it. \
             End this process and start omertad again, which removes what is left"
        );
        return;
    }
    let why = format!("its row is broken ({columns}), and it does not run");
    let unwound = remove(fleet, remains, booted, &why, open).await;
    if !unwound.leftovers.is_empty() {
        hold();
    }
}

/// Brings a guest to stand as its row says, and tells how it stands and what has befallen it. One that is `condemned` was to
/// stand still for what the record says of it, whatever its row says.
async fn settle(
    running: &Running,
    found: Found,
    kept: &Kept,
    order: &Order,
    condemned: bool,
) -> Result<(GuestState, Option<GuestEvent>), Lost> {
    let stop = || async {
        let paused = running.control().pause().await;
        paused.map_err(|error| Lost::because(error.report()))
    };
    let stands = match kept.seen.stands {
        _ if condemned => Stands::Suspended,
        stands => stands,
    };
    match (stands, found) {
        (Stands::Suspended, Found::Running) => {
            stop().await?;
            Ok((GuestState::Suspended, None))
        }
        (Stands::Suspended, _) => Ok((GuestState::Suspended, None)),
        (Stands::Held, Found::Running) => {
            stop().await?;
            Ok((GuestState::Held, None))
        }
        (Stands::Held, Found::Still) => Ok((GuestState::Held, None)),
        (_, Found::Panicked) => Ok((GuestState::Running, Some(GuestEvent::Panicked))),
        (Stands::Running, Found::Running) => Ok((GuestState::Running, None)),
        (Stands::Stopping, Found::Running) => {
            let left = kept
                .seen
                .stop_by
                .unwrap_or_default()
                .saturating_sub(clock::now().0);
            let seconds = u32::try_from(left.div_ceil(Monotonic::SECOND)).unwrap_or(u32::MAX);
            let deadline_seconds = seconds;
            Ok((
                GuestState::Running,
                Some(GuestEvent::StopRequested { deadline_seconds }),
            ))
        }
        // Nobody but omertad stops a guest, for rogue traffic or a guard that was lost, and it had no
        // time to say so.
        (Stands::Running | Stands::Stopping, Found::Still) => match order.on_violation {
            OnViolation::Pause => Ok((GuestState::Suspended, None)),
            _ => Err(Lost::because(
                "omertad had stopped it when it died, and had not said why",
            )),
        },
    }
}

/// Removes all that is left of a guest, and tells what became of it.
async fn undo(fleet: &Arc<Fleet>, kept: Kept, why: Lost, open: Vec<Open>) {
    let Grant {
        id, name, run_dir, ..
    } = kept.grant.clone();
    let remains = Remains {
        id,
        name: name.clone(),
        run_dir,
        boot: kept.grant.boot.clone(),
        traces: kept.traces.clone(),
    };
    let booted = matches!(why.cause, Cause::Rebooted);
    let Unwound {
        leftovers,
        scrubbed,
    } = remove(fleet, remains, booted, &why.message, open).await;
    if !leftovers.is_empty() {
        let slot = Some(Slot(kept.grant.slot));
        fleet.withhold(&name, slot, Some(&kept.grant.request));
    }
    match understand(kept, fleet.settings()) {
        Ok(Known {
            kept,
            order,
            mut spec,
        }) => {
            // Where its consumer was last; the guard that would tell is gone.
            if let Some(SocketAddr::V4(last)) = kept.seen.endpoints.first() {
                spec.consumer.endpoint = *last;
            }
            let ending = Ending {
                cause: why.cause,
                incident: None,
                message: Some(why.message),
                leftovers,
            };
            let found = FoundGuest {
                id,
                name,
                on_violation: order.on_violation,
                fate: Fate::Ended(ending),
            };
            fleet.bury(found, &order, spec, scrubbed);
        }
        Err(message) => tracing::error!(guest = name, message, "its row cannot be understood"),
    }
}

/// Removes all that is left of a guest, and its row where that is all; its cases are then told to their end.
async fn remove(
    fleet: &Fleet,
    remains: Remains,
    booted: bool,
    why: &str,
    open: Vec<Open>,
) -> Unwound {
    let Remains {
        id,
        name,
        run_dir,
        traces,
        ..
    } = remains;
    // Of another boot, numbers mean others.
    let traces = if booted { Traces::default() } else { traces };
    let tap = tap_name(&name);
    let removing = move || {
        let owner = OWNER.parse().ok();
        let mut unwound = unwind(&tap, Path::new(&run_dir), owner.as_ref(), &traces);
        // Its driver has ended with the omertad that had it.
        let socket = directory_of(Path::new(&run_dir));
        if let Err(error) = std::fs::remove_dir_all(&socket)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            let leftover = format!("directory {}: {error}", socket.display());
            unwound.leftovers.push(leftover);
        }
        unwound
    };
    let unwound = spawn_blocking(removing).await;
    let unwound = unwound.unwrap_or_else(|error| Unwound {
        leftovers: vec![format!("unknown: removing it broke off: {error}")],
        scrubbed: None,
    });
    let mut said = vec![format!(
        "an omertad after the one that caught it has removed it: {why}"
    )];
    said.extend(unwound.leftovers.iter().cloned());
    close(fleet, open, &said.join("; "));
    if unwound.leftovers.is_empty() {
        if let Err(error) = fleet.store().change(Change::Remove(id)).await {
            tracing::error!(
                guest = name,
                error = report(&error),
                "its row cannot be removed"
            );
        }
        tracing::info!(guest = name, why, "removed what was left of a guest");
    } else {
        let left = unwound.leftovers.join("; ");
        tracing::error!(
            guest = name,
            left,
            "something is left of a guest: it holds what it held"
        );
    }
    unwound
}

fn understand(kept: Kept, settings: &Settings) -> Result<Known, String> {
    let Grant {
        request,
        accel,
        machine,
        run_dir,
        slot,
        name,
        consumer_name,
        ..
    } = &kept.grant;
    let request = serde_json::from_str(request).map_err(|error| error.to_string())?;
    let order = Order::of_a_running_guest(request, settings).map_err(|error| error.message)?;
    let order = order.of_consumer(consumer_name.as_deref().map(name_of).transpose()?);
    let accel = [Accel::Kvm, Accel::Tcg]
        .into_iter()
        .find(|known| known.word() == accel)
        .ok_or_else(|| format!("`{accel}` is no accelerator"))?;
    let machine = machine
        .parse()
        .map_err(|error: omerta_vm_launcher::MachineTypeError| error.to_string())?;
    let platform = Platform { accel, machine };
    let parent = Path::new(run_dir).parent().unwrap_or(Path::new("/"));
    let spec = order
        .spec(Slot(*slot).addresses(), tap_name(name), platform, parent)
        .map_err(|error| error.message)?;
    Ok(Known { kept, order, spec })
}

fn name_of(text: &str) -> Result<PeerName, String> {
    match text.parse() {
        Ok(PeerEndpoint::Name { host, port }) => Ok(PeerName { host, port }),
        _ => Err(format!("`{}` is no consumer's name", text.escape_default())),
    }
}
