//! The maps of one guard, which are pinned beside its links, and which the programs find in the guard's
//! place in their tables.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use aya::maps::{MapData, MapError};
use omerta_verdict::{COUNTER_ROWS, FLOWS, Flow, Live, State};

use crate::GuardError;
use crate::bpffs::failed;
use crate::count::Row;
use crate::link;
use crate::map::{
    self, BPF_F_MMAPABLE, BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_PERCPU_ARRAY,
    BPF_MAP_TYPE_RINGBUF, Put, Shape,
};
use crate::pins::{Pins, is_pin};
use crate::shared::{Shared, Table};

/// Bytes of a ring of events.
const EVENTS_BYTES: u32 = 16 * 1024;

/// One of a guard's maps. The name of its shape is that of its pin.
#[derive(Clone, Copy, Debug)]
pub struct Own {
    pub shape: Shape,
    /// Where the programs look for it.
    table: Table,
    use_of: Use,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// What is judged by.
    Judging,
    /// Likewise, in conntrack mode.
    Flows,
    /// What is counted and told.
    Accounts,
}

pub const STATE: Own = array("STATE", Table::States, size_of::<State>(), BPF_F_MMAPABLE);
pub const LIVE: Own = array("LIVE", Table::Lives, size_of::<Live>(), 0);
pub const COUNTERS: Own = Own {
    shape: Shape {
        name: "COUNTERS",
        map_type: BPF_MAP_TYPE_PERCPU_ARRAY,
        key: size_of::<u32>(),
        value: size_of::<Row>(),
        entries: COUNTER_ROWS as u32,
        flags: 0,
    },
    table: Table::Counters,
    use_of: Use::Accounts,
};
pub const EVENTS: Own = Own {
    shape: Shape {
        name: "EVENTS",
        map_type: BPF_MAP_TYPE_RINGBUF,
        key: 0,
        value: 0,
        entries: EVENTS_BYTES,
        flags: 0,
    },
    table: Table::Events,
    use_of: Use::Accounts,
};
pub const FLOW_TABLE: Own = Own {
    shape: Shape {
        name: "FLOWS",
        map_type: BPF_MAP_TYPE_HASH,
        key: size_of::<Flow>(),
        value: size_of::<u64>(),
        entries: FLOWS,
        flags: 0,
    },
    table: Table::Flows,
    use_of: Use::Flows,
};
const FLOW_PLACES: Own = Own {
    shape: Shape {
        entries: FLOWS,
        ..array("FLOW_PLACES", Table::FlowPlaces, size_of::<Flow>(), 0).shape
    },
    table: Table::FlowPlaces,
    use_of: Use::Flows,
};
const ALL: [Own; 6] = [STATE, LIVE, COUNTERS, EVENTS, FLOW_TABLE, FLOW_PLACES];

const fn array(name: &'static str, table: Table, value: usize, flags: u32) -> Own {
    Own {
        shape: Shape {
            name,
            map_type: BPF_MAP_TYPE_ARRAY,
            key: size_of::<u32>(),
            value,
            entries: 1,
            flags,
        },
        table,
        use_of: Use::Judging,
    }
}

/// The maps of one guard, open.
#[derive(Debug)]
pub struct OwnMaps {
    maps: Vec<(Own, OwnedFd)>,
}

impl OwnMaps {
    /// New ones, which can judge in conntrack mode if they are `with_flows`.
    pub fn create(with_flows: bool) -> io::Result<Self> {
        let wanted = ALL.into_iter();
        let wanted = wanted.filter(|own| with_flows || own.use_of != Use::Flows);
        let maps = wanted.map(|own| Ok((own, map::create(&own.shape)?)));
        Ok(Self {
            maps: maps.collect::<io::Result<_>>()?,
        })
    }

    /// Those that are pinned; new ones instead of what is counted and told where that is to begin
    /// `afresh`.
    pub fn open(pins: &Pins, afresh: bool) -> Result<Self, GuardError> {
        let mut maps = Vec::new();
        for own in ALL {
            let path = pins.path(own.shape.name);
            if afresh && own.use_of == Use::Accounts {
                let made = map::create(&own.shape).map_err(failed("make another of", &path))?;
                maps.push((own, made));
            } else if own.use_of != Use::Flows || is_pin(&path)? {
                maps.push((own, link::open(&path).map_err(failed("open", &path))?));
            }
        }
        Ok(Self { maps })
    }

    /// One of them, by the name of its pin.
    pub fn get(&self, own: Own) -> Result<BorrowedFd<'_>, MapError> {
        let mut maps = self.maps.iter();
        let found = maps.find(|(one, _)| one.shape.name == own.shape.name);
        let missing = MapError::InvalidName {
            name: own.shape.name.into(),
        };
        found.map(|(_, map)| map.as_fd()).ok_or(missing)
    }

    /// The same, as aya has it.
    pub fn data(&self, own: Own) -> Result<MapData, MapError> {
        let map = self.get(own)?.try_clone_to_owned();
        MapData::from_fd(map.map_err(MapError::IoError)?)
    }

    /// Whether they can judge in conntrack mode.
    pub fn with_flows(&self) -> bool {
        self.get(FLOW_TABLE).is_ok()
    }

    /// Pins them all.
    pub fn pin(&self, pins: &Pins) -> Result<(), GuardError> {
        self.pin_those(&self.maps, |name| pins.path(name))
    }

    /// Pins what is counted and told beside what an upgrade is to put it in the place of.
    pub fn pin_next_accounts(&self, pins: &Pins) -> Result<(), GuardError> {
        let accounts = self.maps.iter();
        let accounts = accounts.filter(|(own, _)| own.use_of == Use::Accounts);
        self.pin_those(accounts, |name| pins.next(&pins.path(name)))
    }

    fn pin_those<'a>(
        &self,
        maps: impl IntoIterator<Item = &'a (Own, OwnedFd)>,
        path: impl Fn(&str) -> std::path::PathBuf,
    ) -> Result<(), GuardError> {
        for (own, map) in maps {
            let path = path(own.shape.name);
            link::pin(map.as_fd(), &path).map_err(failed("pin", &path))?;
        }
        Ok(())
    }

    /// Has the programs find them in `place`: the state last, without which they do not look for anything.
    pub fn put(&self, shared: &Shared, place: u32) -> io::Result<()> {
        let puts: Vec<_> = self
            .maps
            .iter()
            .map(|(own, map)| Put {
                table: shared.table(own.table),
                number: place,
                map: map.as_fd(),
            })
            .collect();
        // The state is the first of ALL.
        let (state, others) = puts.split_at(1);
        map::put(others)?;
        map::put(state)
    }
}
