//! What came, and what became of it, summed over CPUs.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use aya::maps::MapData;
use aya::util::nr_cpus;
use omerta_verdict::{COUNTER_ROWS, Direction, LOST_ROW};

use crate::GuardError;
use crate::bpf::lookup_batch;
use crate::count::Row;
pub use crate::count::{Count, DirectionCounters};
use crate::pins::Pins;
use crate::store::map_error;
use crate::upgrade::require_accounts;

const COUNTERS: &str = "COUNTERS";
const DIRECTIONS: usize = Direction::ALL.len();

// SAFETY: `Count` is two `u64`: no padding, every bit pattern valid.
unsafe impl aya::Pod for Count {}

/// Both directions' counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// From the guest.
    pub egress: DirectionCounters,
    /// To the guest.
    pub ingress: DirectionCounters,
    /// Dropped frames of which no event tells.
    pub events_lost: Count,
    /// Those of them that exceeded the guard's rate of events; the others did not fit the ring.
    pub events_limited: Count,
}

/// Times that a row is read until it is found settled. Under a flood every other row is; one that
/// never is, is shown as it is.
const READS: usize = 100;

/// Reads the counters of one guard, by one system call where no frame comes meanwhile.
#[derive(Debug)]
pub struct CounterReader {
    interface: String,
    counters: MapData,
    cpus: usize,
    pin: PathBuf,
    inode: u64,
}

impl CounterReader {
    pub(crate) fn open(interface: &str, pins: &Pins) -> Result<Self, GuardError> {
        require_accounts(interface, pins)?;
        let system = |action| {
            move |source| GuardError::System {
                action,
                interface: interface.to_owned(),
                source,
            }
        };
        let open = |name: &'static str, value: usize, elements: usize| {
            let failed = |source| map_error(interface, "open", name, source);
            let map = MapData::from_pin(pins.path(name)).map_err(failed)?;
            let info = map.info().map_err(failed)?;
            if (info.value_size() as usize, info.max_entries() as usize) == (value, elements) {
                return Ok(map);
            }
            let other = io::Error::other("they are of another version");
            Err(system("read the counters")(other))
        };
        let pin = pins.path(COUNTERS);
        // Looked at first: where it is exchanged meanwhile, that shows.
        let look = fs::symlink_metadata(&pin).map_err(system("look at the pinned counters"))?;
        Ok(Self {
            interface: interface.to_owned(),
            counters: open(COUNTERS, size_of::<Row>(), COUNTER_ROWS)?,
            cpus: nr_cpus().map_err(|(_, source)| system("ask for the number of CPUs")(source))?,
            inode: look.ino(),
            pin,
        })
    }

    /// Whether these are still the counters that are pinned in this place.
    pub fn is_current(&self) -> bool {
        fs::symlink_metadata(&self.pin).is_ok_and(|pin| pin.ino() == self.inode)
    }

    /// The counters since the guard was attached.
    pub fn read(&self) -> Result<Counters, GuardError> {
        let mut last = vec![Row::NOTHING; COUNTER_ROWS * self.cpus];
        let mut settled = vec![None; DIRECTIONS * self.cpus];
        for _ in 0..READS {
            // SAFETY: the map's values are rows, one of each CPU.
            unsafe { self.look_up::<_, COUNTER_ROWS>(&self.counters, &mut last) }?;
            for (kept, row) in settled.iter_mut().zip(&last) {
                if kept.is_none() && row.is_settled() {
                    *kept = Some(*row);
                }
            }
            if settled.iter().all(Option::is_some) {
                break;
            }
        }
        let direction = |direction: Direction| {
            let mut sum = Row::NOTHING;
            let first = direction as usize * self.cpus;
            for (kept, row) in settled.iter().zip(&last).skip(first).take(self.cpus) {
                sum.add(kept.as_ref().unwrap_or(row));
            }
            sum.direction()
        };
        let mut lost = Row::NOTHING;
        for row in &last[LOST_ROW as usize * self.cpus..] {
            lost.add(row);
        }
        // By `Lost` in ebpf/programs/src/accounting.rs.
        let Row([ring_full, events_limited, ..]) = lost;
        let mut events_lost = ring_full;
        events_lost += events_limited;
        Ok(Counters {
            egress: direction(Direction::Egress),
            ingress: direction(Direction::Ingress),
            events_lost,
            events_limited,
        })
    }

    /// Reads the `ELEMENTS` values of an array that each CPU has for itself: those of the first element,
    /// by CPU, then those of the next.
    ///
    /// # Safety
    /// Each CPU's value is a `V`, a multiple of eight bytes long; `values` has room for one of each CPU
    /// and element.
    unsafe fn look_up<V, const ELEMENTS: usize>(
        &self,
        map: &MapData,
        values: &mut [V],
    ) -> Result<(), GuardError> {
        debug_assert_eq!(values.len(), ELEMENTS * self.cpus);
        let mut keys = [0_u32; ELEMENTS];
        // SAFETY: keys of arrays are words; the rest by the caller's promise.
        let found = unsafe { lookup_batch(map.fd().as_fd(), None, &mut keys, values) };
        let cause = match found {
            // An array's elements come in order.
            Ok(found) if found.count == ELEMENTS => return Ok(()),
            Ok(_) => io::Error::other("it has fewer elements"),
            Err(error) => error,
        };
        Err(GuardError::System {
            action: "read the counters",
            interface: self.interface.clone(),
            source: cause,
        })
    }
}
