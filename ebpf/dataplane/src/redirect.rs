//! The way past the host's stack: a program behind a guard, which sends what the guard has allowed to
//! its next hop (ebpf/programs/redirect). It is pinned among the guard's pins and goes with them, before
//! the guard does. It knows what the guard allows from the guard's counters, and leaves to the stack
//! all that it cannot prove to be allowed, so a guard that is cut off or exchanged takes it out of
//! action.

use std::fs;
use std::io;

use aya::EbpfLoader;
use aya::maps::{Map, MapData, PerCpuArray};
use aya::programs::links::{FdLink, LinkError};
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use omerta_verdict::Direction;
use serde::Serialize;

use crate::attach::attached;
use crate::bpffs::failed;
use crate::counters::Count;
use crate::link;
use crate::pins::Pins;
use crate::store::map_error;
use crate::{Guard, GuardError, interface};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("OMERTA_REDIRECT"));

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

fn install(name: &str, pins: &Pins, peers: &[u32; PEER_PLACES]) -> Result<(), GuardError> {
    let of_program = |error| GuardError::of_program(PROGRAM, name, error);
    let of_link = |source: LinkError| GuardError::Link {
        action: "make",
        interface: name.to_owned(),
        source,
    };
    let mut ebpf = EbpfLoader::new()
        .btf(None)
        .map_pin_path("COUNTERS", pins.path("COUNTERS"))
        .override_global("PEERS", peers, true)
        .load(OBJECT)
        .map_err(|source| GuardError::Load {
            interface: name.to_owned(),
            source: Box::new(source),
        })?;
    let path = pins.path(MAP);
    match ebpf.map(MAP) {
        Some(map) => map
            .pin(&path)
            .map_err(|error| failed("pin", &path)(io::Error::other(error)))?,
        None => return Err(of_program(ProgramError::NotLoaded)),
    }
    let program: &mut SchedClassifier = match ebpf.program_mut(PROGRAM) {
        Some(program) => program.try_into().map_err(of_program)?,
        None => return Err(of_program(ProgramError::NotLoaded)),
    };
    program.load().map_err(of_program)?;
    let path = pins.path(PROGRAM_PIN);
    program
        .pin(&path)
        .map_err(|error| failed("pin", &path)(io::Error::other(error)))?;
    // Whatever else judges on the hook has its say first.
    let options = TcAttachOptions::TcxOrder(LinkOrder::last());
    let id = program
        .attach_with_options(name, TcAttachType::Ingress, options)
        .map_err(of_program)?;
    let link = program.take_link(id).map_err(of_program)?;
    let path = pins.path(LINK_PIN);
    FdLink::try_from(link)
        .map_err(of_link)?
        .pin(&path)
        .map_err(|error| failed("pin", &path)(io::Error::other(error)))?;
    Ok(())
}

/// Removes the program's pins, its link first, whatever is there of them.
fn remove(pins: &Pins) -> Result<(), GuardError> {
    for name in [LINK_PIN, PROGRAM_PIN, MAP] {
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
    let program =
        link::program_id(&program_path).map_err(failed("read the program", &program_path))?;
    let in_force = link.ifindex != 0
        && interface::index(name).is_ok_and(|index| index == link.ifindex)
        && link.program_id == program
        && is_behind(name, pins, program)?;
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
    let Some(guard) = pins.program(Direction::Egress)? else {
        return Ok(false);
    };
    let chain = attached(name, Direction::Egress)?;
    let place = |id: u32| chain.iter().position(|attached| *attached == id);
    Ok(match (place(guard), place(program)) {
        (Some(guard), Some(program)) => guard < program,
        _ => false,
    })
}
