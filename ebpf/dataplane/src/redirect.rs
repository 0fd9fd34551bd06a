//! The way past the host's stack: a program behind a guard, which sends what the guard has allowed to
//! its next hop (ebpf/programs/redirect). It is pinned among the guard's pins and goes with them, before
//! the guard does. It knows what the guard allows from the guard's counters, and leaves to the stack
//! all that it cannot prove to be allowed, so a guard that is cut off or exchanged takes it out of
//! action.

use std::fs;
use std::io;
use std::path::Path;

use aya::maps::{Map, MapData, PerCpuArray};
use aya::programs::links::{FdLink, LinkError};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use omerta_verdict::Direction;
use serde::Serialize;

use crate::attach::attached;
use crate::bpffs::failed;
use crate::counters::Count;
use crate::link;
use crate::pins::{Pins, is_pin};
use crate::store::map_error;
use crate::upgrade::{self, Counting};
use crate::{Guard, GuardError, interface, notes};

pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("OMERTA_REDIRECT"));

const PROGRAM: &str = "guest_redirect";
const PROGRAM_PIN: &str = "program_redirect";
/// The pin of its link.
pub const LINK_PIN: &str = "link_redirect";
const MAP: &str = "REDIRECTED";
/// As in ebpf/programs/redirect.
const PEER_PLACES: usize = 8;
const WAYS: usize = 4;

/// One CPU's element of the map.
#[derive(Clone, Copy)]
#[repr(C)]
struct Row {
    seen: Count,
    answers: u64,
    refreshed: u64,
    ways: [Count; WAYS],
}

// SAFETY: words alone, without padding.
unsafe impl aya::Pod for Row {}

/// What passes the stack by, and what does not. What the guard has allowed is their sum, but for frames
/// that it allowed while nothing was redirected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RedirectStatus {
    /// Whether the program runs, behind the guard; else all is left to the stack.
    pub in_force: bool,
    /// Frames sent to a neighbour.
    pub to_neighbours: u64,
    /// Frames handed to a peer in another network namespace.
    pub to_peers: u64,
    /// Frames left to the stack.
    pub to_stack: u64,
    /// Frames left to the stack since it was not proven that the guard has allowed them.
    pub unproven: u64,
}

impl Guard {
    /// Sends what the guest's guard allows past the host's stack, where the host routes for the guest.
    /// `peers` are veths whose peers, in other network namespaces, own the addresses that are routed to
    /// them: they are handed frames without the way through the veth. Netfilter (with address
    /// translation), IPsec policies and taps of the stack see nothing of what is redirected.
    pub fn redirect(&self, peers: &[&str]) -> Result<(), GuardError> {
        let name = self.interface();
        let _lock = self.pins.lock()?;
        self.judging()?;
        self.authorise()?;
        let refuse = |problem: String| Err(GuardError::Config { problem });
        if self.pins.filters()?.is_some() {
            return refuse(format!(
                "this kernel has no TCX (Linux 6.6), which redirecting needs: {name} stays guarded without"
            ));
        }
        if self.gateway_mac()? != interface::mac(name)? {
            return refuse(format!(
                "the guest of {name} sends to another MAC than {name}'s own, so the host does not route for it and nothing can be redirected"
            ));
        }
        if peers.len() > PEER_PLACES {
            return refuse(format!("at most {PEER_PLACES} peers can be handed frames"));
        }
        let mut places = [0_u32; PEER_PLACES];
        for (place, peer) in places.iter_mut().zip(peers) {
            *place = interface::index(peer)?;
        }
        remove(&self.pins)?;
        let peers: Vec<_> = places.iter().map(ToString::to_string).collect();
        self.pins.set_note(notes::PEERS, &peers.join(","))?;
        install(name, &self.pins, &places)
    }

    /// Leaves everything to the stack again.
    pub fn stop_redirecting(&self) -> Result<(), GuardError> {
        let _lock = self.pins.lock()?;
        self.judging()?;
        self.authorise()?;
        remove(&self.pins)
    }
}

fn of_program(name: &str) -> impl Fn(ProgramError) -> GuardError {
    move |error| GuardError::of_program(PROGRAM, name, error)
}

fn install(name: &str, pins: &Pins, peers: &[u32; PEER_PLACES]) -> Result<(), GuardError> {
    let of_link = |source: LinkError| GuardError::Link {
        action: "make",
        interface: name.to_owned(),
        source,
    };
    let mut ebpf = load(name, peers, &pins.path("COUNTERS"), None)?;
    pin_map(name, &ebpf, &pins.path(MAP))?;
    let program = program(name, &mut ebpf, &pins.path(PROGRAM_PIN))?;
    // Whatever else judges on the hook has its say first.
    let options = TcAttachOptions::TcxOrder(LinkOrder::last());
    let id = program
        .attach_with_options(name, TcAttachType::Ingress, options)
        .map_err(of_program(name))?;
    let link = program.take_link(id).map_err(of_program(name))?;
    let path = pins.path(LINK_PIN);
    FdLink::try_from(link)
        .map_err(of_link)?
        .pin(&path)
        .map_err(|error| failed("pin", &path)(io::Error::other(error)))?;
    Ok(())
}

/// The object, to go by the guard's `counters`, and to count on in a map of its own that is pinned.
fn load(
    name: &str,
    peers: &[u32; PEER_PLACES],
    counters: &Path,
    own: Option<&Path>,
) -> Result<Ebpf, GuardError> {
    let mut loader = EbpfLoader::new();
    loader
        .btf(None)
        .map_pin_path("COUNTERS", counters)
        .override_global("PEERS", peers, true);
    if let Some(own) = own {
        loader.map_pin_path(MAP, own);
    }
    loader.load(OBJECT).map_err(|source| GuardError::Load {
        interface: name.to_owned(),
        source: Box::new(source),
    })
}

fn pin_map(name: &str, ebpf: &Ebpf, path: &Path) -> Result<(), GuardError> {
    match ebpf.map(MAP) {
        Some(map) => map
            .pin(path)
            .map_err(|error| failed("pin", path)(io::Error::other(error))),
        None => Err(of_program(name)(ProgramError::NotLoaded)),
    }
}

/// The program, verified and pinned.
fn program<'a>(
    name: &str,
    ebpf: &'a mut Ebpf,
    path: &Path,
) -> Result<&'a mut SchedClassifier, GuardError> {
    let program: &mut SchedClassifier = match ebpf.program_mut(PROGRAM) {
        Some(program) => program.try_into().map_err(of_program(name))?,
        None => return Err(of_program(name)(ProgramError::NotLoaded)),
    };
    program.load().map_err(of_program(name))?;
    program
        .pin(path)
        .map_err(|error| failed("pin", path)(io::Error::other(error)))?;
    Ok(program)
}

/// Pins, beside the program of an upgraded guard, one of this build that is to take its place; nothing
/// where nothing is redirected.
pub fn prepare_next(name: &str, pins: &Pins, counting: Counting) -> Result<(), GuardError> {
    let path = pins.path(PROGRAM_PIN);
    if !is_pin(&pins.path(LINK_PIN))? || !is_pin(&path)? {
        return Ok(());
    }
    let mut peers = [0_u32; PEER_PLACES];
    for (place, peer) in peers.iter_mut().zip(pins.peers()?) {
        *place = peer;
    }
    let [counters, own] = ["COUNTERS", MAP].map(|map| pins.path(map));
    let mut ebpf = match counting {
        Counting::Continued => load(name, &peers, &counters, Some(&own))?,
        Counting::Afresh => {
            let ebpf = load(name, &peers, &pins.next(&counters), None)?;
            pin_map(name, &ebpf, &pins.next(&own))?;
            ebpf
        }
    };
    program(name, &mut ebpf, &pins.next(&path)).map(drop)
}

/// Has the program that was prepared redirect, where one was.
pub fn put_next_in_force(name: &str, pins: &Pins) -> Result<(), GuardError> {
    let (path, link_path) = (pins.path(PROGRAM_PIN), pins.path(LINK_PIN));
    let next_path = pins.next(&path);
    let Some(next) = pins.program_at(&next_path)? else {
        return Ok(());
    };
    let link = link::info(&link_path).map_err(failed("read the link", &link_path))?;
    if link.ifindex == 0 || link.program_id == next {
        return Ok(());
    }
    upgrade::update(&link_path, &path, &next_path).map_err(|source| GuardError::System {
        action: "put another program that redirects in place",
        interface: name.to_owned(),
        source,
    })
}

/// Removes the program's pins, its link first, whatever is there of them.
fn remove(pins: &Pins) -> Result<(), GuardError> {
    for name in [LINK_PIN, PROGRAM_PIN, MAP, notes::PEERS] {
        let path = pins.path(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// How the redirection of the guard of `pins` stands; `None` where it has none.
pub(crate) fn read(name: &str, pins: &Pins) -> Result<Option<RedirectStatus>, GuardError> {
    let [link_path, program_path, map_path] = [LINK_PIN, PROGRAM_PIN, MAP].map(|n| pins.path(n));
    // The link is made last.
    if !link_path.exists() {
        return Ok(None);
    }
    let link = link::info(&link_path).map_err(failed("read the link", &link_path))?;
    let own = [&program_path, &pins.next(&program_path)].map(|path| pins.program_at(path));
    let mut is_own = false;
    for program in own {
        is_own |= program? == Some(link.program_id);
    }
    let in_force = link.ifindex != 0
        && interface::index(name).is_ok_and(|index| index == link.ifindex)
        && is_own
        && is_behind(name, pins, link.program_id)?;
    let rows: PerCpuArray<MapData, Row> = MapData::from_pin(&map_path)
        .and_then(|data| Map::PerCpuArray(data).try_into())
        .map_err(|source| map_error(name, "open", MAP, source))?;
    let rows = rows
        .get(&0, 0)
        .map_err(|source| map_error(name, "read", MAP, source))?;
    let sum = |way: usize| rows.iter().map(|row| row.ways[way].packets).sum();
    Ok(Some(RedirectStatus {
        in_force,
        to_neighbours: sum(0),
        to_peers: sum(1),
        to_stack: sum(2),
        unproven: sum(3),
    }))
}

/// Whether the guard's program comes before `program` on the hook of what the guest sends.
fn is_behind(name: &str, pins: &Pins, program: u32) -> Result<bool, GuardError> {
    let own = pins.programs(Direction::Egress)?;
    let chain = attached(name, Direction::Egress)?;
    let place = |programs: &[u32]| chain.iter().position(|id| programs.contains(id));
    Ok(match (place(&own), place(&[program])) {
        (Some(guard), Some(program)) => guard < program,
        _ => false,
    })
}
