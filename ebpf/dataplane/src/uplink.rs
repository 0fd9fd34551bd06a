//! Early drops at the host's uplinks (ebpf/programs/uplink): what the guard of a tap would drop for its
//! endpoint is dropped where it arrives. The program and its maps live as long as the process that
//! attached them: nothing is pinned, so nothing of a process that died drops anything.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::EbpfLoader;
use aya::maps::{HashMap, Map, MapData, PerCpuArray, PerCpuValues};
use aya::programs::{ProgramError, SchedClassifier, Xdp};
use aya::util::nr_cpus;
use omerta_verdict::{Address, Direction};

use crate::bpffs::failed;
use crate::counters::Count;
use crate::map::{self, Put};
use crate::store::{PolicyStore, Value, map_error};
use crate::{Guard, GuardError, Hook, interface, link, own};

static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("OMERTA_UPLINK"));

const BY_TCX: &str = "uplink_ingress";
const BY_XDP: &str = "uplink_xdp";
/// How many uplinks there may be. As in ebpf/programs/uplink.
const MAC_PLACES: usize = 8;
/// How many guests there may be. As in ebpf/programs/uplink.
const PLACES: usize = 4096;

/// Where at an uplink frames are dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UplinkHook {
    /// On its TCX hook, as the first program.
    #[default]
    Tcx,
    /// In its driver, by XDP, before there is a socket buffer; on its TCX hook where the driver has no XDP of
    /// its own, or another program is there.
    Xdp,
}

impl UplinkHook {
    /// The word used in the configuration and in metrics.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Xdp => "xdp",
        }
    }
}

/// The program that drops early, on the host's uplinks. Dropping it leaves all to the guards.
pub struct Uplink {
    links: Vec<UplinkLink>,
    guests: Mutex<Guests>,
    states: OwnedFd,
    dropped: Mutex<PerCpuArray<MapData, Count>>,
}

/// The program on one interface.
struct UplinkLink {
    interface: String,
    hook: UplinkHook,
    link: OwnedFd,
}

struct Guests {
    places: HashMap<MapData, Value<Address>, u32>,
    /// By place: whose it is, by the tap's name.
    taken: Vec<Option<String>>,
}

impl std::fmt::Debug for Uplink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uplink")
            .field("interfaces", &self.interfaces().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl Uplink {
    /// Attaches the program to `interfaces`, by `hook` or what it falls back to. It drops nothing until
    /// guests enter.
    pub fn attach(interfaces: &[String], hook: UplinkHook) -> Result<Arc<Self>, GuardError> {
        let names = interfaces.join(" ");
        if Hook::of_this_kernel()? != Hook::Tcx {
            return Err(GuardError::Config {
                problem: format!(
                    "this kernel has no TCX (Linux 6.6), which early drops need: leave {names} out, and guards drop all at the taps"
                ),
            });
        }
        if interfaces.len() > MAC_PLACES {
            return Err(GuardError::Config {
                problem: format!("at most {MAC_PLACES} uplinks can drop early"),
            });
        }
        let mut macs = [[0_u8; 6]; MAC_PLACES];
        for (place, name) in macs.iter_mut().zip(interfaces) {
            *place = interface::mac(name)?.0;
        }
        let macs = macs.as_flattened();
        let mut ebpf = EbpfLoader::new()
            .btf(None)
            .override_global("MACS", macs, true)
            .load(OBJECT)
            .map_err(|source| GuardError::Load {
                interface: names.clone(),
                source: Box::new(source),
            })?;
        let absent = |program| GuardError::of_program(program, &names, ProgramError::NotLoaded);
        let program = |program| {
            let names = &names;
            move |error| GuardError::of_program(program, names, error)
        };
        let keep = |fd: BorrowedFd<'_>| {
            fd.try_clone_to_owned()
                .map_err(|source| GuardError::System {
                    action: "keep what drops early",
                    interface: names.clone(),
                    source,
                })
        };
        let by_tcx: &mut SchedClassifier = match ebpf.program_mut(BY_TCX) {
            Some(found) => found.try_into().map_err(program(BY_TCX))?,
            None => return Err(absent(BY_TCX)),
        };
        by_tcx.load().map_err(program(BY_TCX))?;
        let by_tcx = keep(by_tcx.fd().map_err(program(BY_TCX))?.as_fd())?;
        let by_xdp = match hook {
            UplinkHook::Tcx => None,
            UplinkHook::Xdp => {
                let by_xdp: &mut Xdp = match ebpf.program_mut(BY_XDP) {
                    Some(found) => found.try_into().map_err(program(BY_XDP))?,
                    None => return Err(absent(BY_XDP)),
                };
                by_xdp.load().map_err(program(BY_XDP))?;
                Some(keep(by_xdp.fd().map_err(program(BY_XDP))?.as_fd())?)
            }
        };
        let links = interfaces
            .iter()
            .map(|name| UplinkLink::make(name, by_xdp.as_ref(), &by_tcx))
            .collect::<Result<_, _>>()?;
        let mut take = |name| ebpf.take_map(name).ok_or_else(|| absent(BY_TCX));
        let error = |name| {
            let names = &names;
            move |source| map_error(names, "open", name, source)
        };
        let places = take("GUESTS")?.try_into().map_err(error("GUESTS"))?;
        let dropped = take("DROPPED")?.try_into().map_err(error("DROPPED"))?;
        let Map::ArrayOfMaps(states) = take("STATES")? else {
            return Err(absent(BY_TCX));
        };
        let states = keep(states.fd().as_fd())?;
        Ok(Arc::new(Self {
            links,
            guests: Mutex::new(Guests {
                places,
                taken: vec![None; PLACES],
            }),
            states,
            dropped: Mutex::new(dropped),
        }))
    }

    /// Each interface, by what is dropped there, and whether that still runs: on an interface that was made
    /// anew nothing does.
    pub fn interfaces(&self) -> impl Iterator<Item = (&str, UplinkHook, bool)> {
        self.links.iter().map(|link| {
            // The kernel's word for an interface that is gone, and for a link that was cut.
            let runs = link::info_of(&link.link).is_ok_and(|info| info.ifindex != 0);
            (link.interface.as_str(), link.hook, runs)
        })
    }

    /// From now on drops what is for the guest of `guard` and of none of its endpoints, by the policy that
    /// is then in force, until what is returned is dropped. That must be before the guard is exchanged,
    /// and before the guest's addresses become another's.
    pub fn enter(self: &Arc<Self>, guard: &Guard) -> Result<AtUplink, GuardError> {
        let name = guard.interface();
        guard.judging()?;
        let policy = PolicyStore::open(name, &guard.pins)?.policy()?;
        let path = guard.pins.path(own::STATE.shape.name);
        let state = link::open(&path).map_err(failed("open", &path))?;
        let system = |source| GuardError::System {
            action: "enter a guard at the uplink",
            interface: name.to_owned(),
            source,
        };
        let addresses = policy.addresses.into_iter().filter(|a| a.is_v4());
        let mut guests = self.guests();
        let Some(place) = guests.taken.iter().position(Option::is_none) else {
            return Err(GuardError::Config {
                problem: format!("an uplink looks for {PLACES} guests and no more"),
            });
        };
        // Nothing leads there yet.
        let put = Put {
            table: self.states.as_fd(),
            number: place as u32,
            map: state.as_fd(),
        };
        map::put(&[put]).map_err(system)?;
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

impl UplinkLink {
    fn make(name: &str, by_xdp: Option<&OwnedFd>, by_tcx: &OwnedFd) -> Result<Self, GuardError> {
        const BPF_XDP: u32 = 37;
        /// `XDP_FLAGS_DRV_MODE`: what the driver does not do itself costs more than it saves.
        const BY_DRIVER: u32 = 1 << 2;
        let ifindex = interface::index(name)?;
        let (hook, link) = match by_xdp
            .map(|program| link::create(program.as_fd(), ifindex, BPF_XDP, BY_DRIVER))
        {
            Some(Ok(link)) => (UplinkHook::Xdp, Ok(link)),
            _ => (
                UplinkHook::Tcx,
                // What arrives at the uplink comes in as what a guest sends does at its tap.
                link::first(by_tcx.as_fd(), ifindex, Direction::Egress),
            ),
        };
        let link = link.map_err(|source| GuardError::System {
            action: "drop early",
            interface: name.to_owned(),
            source,
        })?;
        Ok(Self {
            interface: name.to_owned(),
            hook,
            link,
        })
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
