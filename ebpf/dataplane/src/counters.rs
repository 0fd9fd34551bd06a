//! What came, and what became of it, summed over CPUs.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use aya::maps::MapData;
use aya::util::nr_cpus;
use omerta_verdict::{
    DIRECTION_COUNTERS, Direction, OWN_ANSWERS_COUNTER, Outcome, RX_COUNTER, Reason,
};

use crate::GuardError;
use crate::bpf::lookup_batch;
use crate::pins::Pins;
use crate::store::map_error;
use crate::upgrade::require_accounts;

const COUNTERS: &str = "COUNTERS";
const LOST: &str = "LOST";
const DIRECTIONS: usize = Direction::ALL.len();
/// Why an event may be lost: elements of the map `LOST`.
const CAUSES: usize = 2;

/// Frames and their bytes (whole frames, with Ethernet headers).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Count {
    /// Frames.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

// SAFETY: `Count` is two `u64`: no padding, every bit pattern valid.
unsafe impl aya::Pod for Count {}

impl std::ops::AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.packets = self.packets.wrapping_add(other.packets);
        self.bytes = self.bytes.wrapping_add(other.bytes);
    }
}

/// One direction's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirectionCounters {
    /// Everything that came, counted on entry.
    pub received: Count,
    /// Passed on.
    pub allowed: Count,
    /// Answered by the guard itself.
    pub answered: Count,
    /// Dropped: every reason in index order, also those that never occurred.
    pub dropped: Vec<(Reason, Count)>,
    /// The guard's own answers that entered again on their way out; not among what came.
    pub own_answers: Count,
}

impl DirectionCounters {
    /// Everything that came. Equal to [`DirectionCounters::outcomes`], or the guard is at fault:
    /// the two are counted apart, on entry and by outcome.
    pub fn rx(&self) -> Count {
        self.received
    }

    /// Everything that was judged: allowed, answered and dropped.
    pub fn outcomes(&self) -> Count {
        let mut sum = self.allowed;
        sum += self.answered;
        for (_, count) in &self.dropped {
            sum += *count;
        }
        sum
    }

    /// The frames dropped for `reason`.
    pub fn dropped_for(&self, reason: Reason) -> Count {
        self.dropped
            .iter()
            .find(|(r, _)| *r == reason)
            .map_or(Count::default(), |(_, count)| *count)
    }

    fn of(row: &Row) -> Self {
        let at = |outcome: Outcome| row.0[outcome.index()];
        Self {
            received: row.0[RX_COUNTER],
            allowed: at(Outcome::Allowed),
            answered: at(Outcome::Answered),
            dropped: Reason::ALL
                .iter()
                .map(|reason| (*reason, at(Outcome::Dropped(*reason))))
                .collect(),
            own_answers: row.0[OWN_ANSWERS_COUNTER],
        }
    }
}

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

/// One direction's counters on one CPU, as the programs keep them.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Row([Count; DIRECTION_COUNTERS]);

impl Row {
    const NOTHING: Self = Self(
        [Count {
            packets: 0,
            bytes: 0,
        }; DIRECTION_COUNTERS],
    );

    /// Whether no program was between counting a frame's entry and its outcome when it was read.
    fn is_settled(&self) -> bool {
        let mut sum = Count::default();
        // What follows are no outcomes.
        for count in &self.0[..RX_COUNTER] {
            sum += *count;
        }
        sum == self.0[RX_COUNTER]
    }

    fn add(&mut self, other: &Self) {
        for (sum, count) in self.0.iter_mut().zip(other.0) {
            *sum += count;
        }
    }
}

/// Times that a row is read until it is found settled. Under a flood every other row is; one that
/// never is, is shown as it is.
const READS: usize = 100;

/// Reads the counters of one guard, by two system calls.
#[derive(Debug)]
pub struct CounterReader {
    interface: String,
    counters: MapData,
    lost: MapData,
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
            counters: open(COUNTERS, size_of::<Row>(), DIRECTIONS)?,
            lost: open(LOST, size_of::<Count>(), CAUSES)?,
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
        let mut lost = vec![Count::default(); CAUSES * self.cpus];
        // SAFETY: the map's values are counts, one of each CPU.
        unsafe { self.look_up::<_, CAUSES>(&self.lost, &mut lost) }?;
        let [events_lost, events_limited] = [0, 1].map(|cause| {
            let mut total = Count::default();
            for count in &lost[cause * self.cpus..][..self.cpus] {
                total += *count;
            }
            total
        });
        let mut sum = Counters {
            events_lost,
            events_limited,
            ..self.rows()?
        };
        sum.events_lost += events_limited;
        Ok(sum)
    }

    /// What the programs count of frames.
    fn rows(&self) -> Result<Counters, GuardError> {
        let mut last = vec![Row::NOTHING; DIRECTIONS * self.cpus];
        let mut settled = vec![None; last.len()];
        for _ in 0..READS {
            // SAFETY: the map's values are rows, one of each CPU.
            unsafe { self.look_up::<_, DIRECTIONS>(&self.counters, &mut last) }?;
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
            DirectionCounters::of(&sum)
        };
        Ok(Counters {
            egress: direction(Direction::Egress),
            ingress: direction(Direction::Ingress),
            ..Counters::default()
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
