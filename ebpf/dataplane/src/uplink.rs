//! Early drops at the host's uplinks (ebpf/programs/uplink): what the guard of a tap would drop for its
//! endpoint is dropped where it arrives. The program and its maps live as long as the process that
//! attached them: nothing is pinned, so nothing of a process that died drops anything.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::EbpfLoader;
use aya::maps::{HashMap, Map, MapData, PerCpuArray, PerCpuValues};
use aya::programs::links::FdLink;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::util::nr_cpus;
use omerta_verdict::{Address, Direction};

use crate::attach::attached;
use crate::counters::Count;
use crate::store::{PolicyStore, Value, map_error};
use crate::{Guard, GuardError, Hook, bank, interface};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("OMERTA_UPLINK"));

const PROGRAM: &str = "uplink_ingress";
/// How many guests there may be. As in ebpf/programs/uplink.
const PLACES: usize = 4096;

/// The program that drops early, on the host's uplinks. Dropping it leaves all to the guards.
pub struct Uplink {
    interfaces: Vec<String>,
    program: u32,
    guests: Mutex<Guests>,
    states: OwnedFd,
    dropped: Mutex<PerCpuArray<MapData, Count>>,
    _links: Vec<FdLink>,
}

struct Guests {
    places: HashMap<MapData, Value<Address>, u32>,
    /// By place: whose it is, by the tap's name.
    taken: Vec<Option<String>>,
}

impl std::fmt::Debug for Uplink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uplink")
            .field("interfaces", &self.interfaces)
            .finish_non_exhaustive()
    }
}

impl Uplink {
    /// Attaches the program to `interfaces`. It drops nothing until guests enter.
    pub fn attach(interfaces: &[String]) -> Result<Arc<Self>, GuardError> {
        let names = interfaces.join(" ");
        let of_program = |error| GuardError::of_program(PROGRAM, &names, error);
        if Hook::of_this_kernel()? != Hook::Tcx {
            return Err(GuardError::Config {
                problem: format!(
                    "this kernel has no TCX (Linux 6.6), which early drops need: leave {names} out, and guards drop all at the taps"
                ),
            });
        }
        let mut ebpf =
            EbpfLoader::new()
                .btf(None)
                .load(OBJECT)
                .map_err(|source| GuardError::Load {
                    interface: names.clone(),
                    source: Box::new(source),
                })?;
        let mut take = |name| {
            ebpf.take_map(name)
                .ok_or(of_program(ProgramError::NotLoaded))
        };
        let error = |name| {
            let names = &names;
            move |source| map_error(names, "open", name, source)
        };
        let places = take("GUESTS")?.try_into().map_err(error("GUESTS"))?;
        let dropped = take("DROPPED")?.try_into().map_err(error("DROPPED"))?;
        let Map::ArrayOfMaps(states) = take("STATES")? else {
            return Err(of_program(ProgramError::NotLoaded));
        };
        let states = states.fd().as_fd().try_clone_to_owned();
        let program: &mut SchedClassifier = match ebpf.program_mut(PROGRAM) {
            Some(program) => program.try_into().map_err(of_program)?,
            None => return Err(of_program(ProgramError::NotLoaded)),
        };
        program.load().map_err(of_program)?;
        let mut links = Vec::with_capacity(interfaces.len());
        for name in interfaces {
            interface::index(name)?;
            let of_program = |error| GuardError::of_program(PROGRAM, name, error);
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            let id = program
                .attach_with_options(name, TcAttachType::Ingress, options)
                .map_err(of_program)?;
            let link = program.take_link(id).map_err(of_program)?;
            links.push(FdLink::try_from(link).map_err(|source| GuardError::Link {
                action: "make",
                interface: name.clone(),
                source,
            })?);
        }
        Ok(Arc::new(Self {
            program: program.info().map_err(of_program)?.id(),
            guests: Mutex::new(Guests {
                places,
                taken: vec![None; PLACES],
            }),
            states: states.map_err(|source| GuardError::System {
                action: "keep the table of guards",
                interface: names.clone(),
                source,
            })?,
            dropped: Mutex::new(dropped),
            interfaces: interfaces.to_vec(),
            _links: links,
        }))
    }

    /// Each interface, and whether the program still runs there: an interface that was made anew has none.
    pub fn interfaces(&self) -> impl Iterator<Item = (&str, bool)> {
        self.interfaces.iter().map(|name| {
            let programs = attached(name, Direction::Egress);
            let runs = programs.is_ok_and(|programs| programs.contains(&self.program));
            (name.as_str(), runs)
        })
    }

    /// From now on drops what is for the guest of `guard` and of none of its endpoints, by the policy that
    /// is then in force, until what is returned is dropped. That must be before the guard is exchanged,
    /// and before the guest's addresses become another's.
    pub fn enter(self: &Arc<Self>, guard: &Guard) -> Result<AtUplink, GuardError> {
        let name = guard.interface();
        guard.judging()?;
        let policy = PolicyStore::open(name, &guard.pins)?.policy()?;
        let state = MapData::from_pin(guard.pins.path("STATE"))
            .map_err(|source| map_error(name, "open", "STATE", source))?;
        let system = |source| GuardError::System {
            action: "enter a guard at the uplink",
            interface: name.to_owned(),
            source,
        };
        let state = state.fd().as_fd().try_clone_to_owned().map_err(system)?;
        let addresses = policy.addresses.into_iter().filter(|a| a.is_v4());
        let mut guests = self.guests();
        let Some(place) = guests.taken.iter().position(Option::is_none) else {
            return Err(GuardError::Config {
                problem: format!("an uplink looks for {PLACES} guests and no more"),
            });
        };
        // Nothing leads there yet.
        bank::put(&self.states, place as u32, state).map_err(system)?;
        self.forget_count(name, place)?;
        guests.taken[place] = Some(name.to_owned());
        let mut entered = AtUplink {
            uplink: Arc::clone(self),
            interface: name.to_owned(),
            place,
            addresses: Vec::new(),
        };
        let mut problem = None;
        for address in addresses {
            if guests.places.get(&Value(address), 0).is_ok() {
                let taken = format!("{address} is another guest's at the uplink");
                problem = Some(GuardError::Config { problem: taken });
                break;
            }
            if let Err(source) = guests.places.insert(Value(address), place as u32, 0) {
                problem = Some(map_error(name, "write", "GUESTS", source));
                break;
            }
            entered.addresses.push(address);
        }
        // What has entered leaves by itself.
        drop(guests);
        problem.map_or(Ok(entered), Err)
    }

    /// What was dropped early that was for the guest of the tap `interface`; `None` where it has not entered.
    pub fn dropped_for(&self, interface: &str) -> Result<Option<Count>, GuardError> {
        let guests = self.guests();
        let mut taken = guests.taken.iter();
        let place = taken.position(|by| by.as_deref() == Some(interface));
        place.map(|place| self.count(interface, place)).transpose()
    }

    fn count(&self, interface: &str, place: usize) -> Result<Count, GuardError> {
        let counts = self
            .dropped()
            .get(&(place as u32), 0)
            .map_err(|source| map_error(interface, "read", "DROPPED", source))?;
        let mut sum = Count::default();
        for count in counts.iter() {
            sum += *count;
        }
        Ok(sum)
    }

    fn guests(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dropped(&self) -> MutexGuard<'_, PerCpuArray<MapData, Count>> {
        self.dropped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget_count(&self, name: &str, place: usize) -> Result<(), GuardError> {
        let cpus = nr_cpus().map_err(|(_, source)| GuardError::System {
            action: "ask for the number of CPUs",
            interface: name.to_owned(),
            source,
        })?;
        PerCpuValues::try_from(vec![Count::default(); cpus])
            .map_err(Into::into)
            .and_then(|nothing| self.dropped().set(place as u32, nothing, 0))
            .map_err(|source| map_error(name, "write", "DROPPED", source))
    }
}

/// A guest for whom is dropped early; until this is dropped.
#[derive(Debug)]
pub struct AtUplink {
    uplink: Arc<Uplink>,
    interface: String,
    place: usize,
    addresses: Vec<Address>,
}

impl AtUplink {
    /// What was dropped early, and so never came to the guard.
    pub fn dropped(&self) -> Result<Count, GuardError> {
        self.uplink.count(&self.interface, self.place)
    }
}

impl Drop for AtUplink {
    fn drop(&mut self) {
        let mut guests = self.uplink.guests();
        let mut left = true;
        for address in &self.addresses {
            // What cannot be removed leads to a place that is given to nobody else.
            left &= guests.places.remove(&Value(*address)).is_ok();
        }
        if left {
            guests.taken[self.place] = None;
        }
    }
}
