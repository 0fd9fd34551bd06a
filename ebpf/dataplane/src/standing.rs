//! How what is pinned for a guard stands in the kernel: one judgement for every command.

use omerta_verdict::Direction;

use crate::attach::attached;
use crate::clsact::{self, Filter};
use crate::notes::Filters;
use crate::pins::Pins;
use crate::{GuardError, interface, links};

/// How a guard stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Both programs judge, before any other.
    InForce,
    /// Both programs judge, but another (also of XDP) stands before one of them and may let frames pass
    /// it by.
    Preceded,
    /// A program that is not the guard's runs in the place of one of its own.
    Exchanged,
    /// One program judges; the other was cut off, or attaching or removing was interrupted.
    Partial,
    /// In force on an interface of another network namespace.
    Elsewhere,
    /// Nothing judges: what is pinned is left over.
    Gone,
}

impl Standing {
    /// The word used in JSON and messages.
    pub const fn word(self) -> &'static str {
        match self {
            Self::InForce => "in_force",
            Self::Preceded => "preceded",
            Self::Exchanged => "exchanged",
            Self::Partial => "partial",
            Self::Elsewhere => "elsewhere",
            Self::Gone => "gone",
        }
    }

    /// Whether both of the guard's own programs judge.
    pub const fn is_whole(self) -> bool {
        matches!(self, Self::InForce | Self::Preceded)
    }

    /// What is wrong.
    pub(crate) const fn why(self) -> &'static str {
        match self {
            Self::InForce => "nothing is wrong with it",
            Self::Preceded => {
                "another program stands before it, on the hook or by XDP, and may let frames pass it by"
            }
            Self::Exchanged => "another program was put in place of one of its own",
            Self::Partial => "only one of its two programs judges",
            Self::Elsewhere => "its interface is in another network namespace",
            Self::Gone => "the interface was re-created, or its programs were cut off",
        }
    }
}

/// What was found of one directory of pins.
#[derive(Clone, Debug)]
pub struct Look {
    /// How the guard stands.
    pub standing: Standing,
    /// The index of the interface on which a program judges; 0 where none does.
    pub ifindex: u32,
    /// That interface's name in this network namespace.
    pub interface: Option<String>,
}

impl Look {
    /// Whether a program of the guard judges on the interface of this index and name.
    pub fn is_on(&self, interface: &str, ifindex: u32) -> bool {
        self.ifindex == ifindex && self.interface.as_deref() == Some(interface)
    }
}

/// Looks at both links or filters, at the programs in them, and at the hooks. What cannot be found
/// out is an error, never "gone".
pub fn look(pins: &Pins) -> Result<Look, GuardError> {
    match pins.filters()? {
        Some(filters) => look_at_filters(pins, filters),
        None => look_at_links(pins),
    }
}

const NOTHING: Look = Look {
    standing: Standing::Gone,
    ifindex: 0,
    interface: None,
};

/// Filters go with their interface, and when it moves to another network namespace: where it is
/// not here, nothing judges.
fn look_at_filters(pins: &Pins, filters: Filters) -> Result<Look, GuardError> {
    let ifindex = filters.ifindex;
    let Some(interface) = interface::name(ifindex) else {
        return Ok(NOTHING);
    };
    let failed = |source| GuardError::System {
        action: "ask for the filters",
        interface: interface.clone(),
        source,
    };
    let (mut judging, mut preceded, mut exchanged) = (0, false, false);
    for direction in Direction::ALL {
        match place_of_filter(pins, ifindex, direction)? {
            Some(place) => {
                judging += 1;
                preceded |= place > 0;
            }
            None => {
                let filters = clsact::filters(ifindex, direction).map_err(failed)?;
                exchanged |= filters.iter().any(Filter::is_in_place);
            }
        }
    }
    preceded |= judging > 0 && links::has_xdp(ifindex).map_err(failed)?;
    let standing = match judging {
        // The index may be another interface's by now, and the filters another guard's.
        0 => return Ok(NOTHING),
        1 if exchanged => Standing::Exchanged,
        1 => Standing::Partial,
        _ if preceded => Standing::Preceded,
        _ => Standing::InForce,
    };
    Ok(Look {
        standing,
        ifindex,
        interface: Some(interface),
    })
}

/// Where one of the guard's own programs judges by a filter.
fn place_of_filter(
    pins: &Pins,
    ifindex: u32,
    direction: Direction,
) -> Result<Option<usize>, GuardError> {
    let mut known = Vec::new();
    loop {
        let own = pins.programs(direction)?;
        for program in &own {
            let place = clsact::place(ifindex, direction, *program);
            let failed = |source| GuardError::System {
                action: "ask for the filters",
                interface: pins.made_for(),
                source,
            };
            if let Some(place) = place.map_err(failed)? {
                return Ok(Some(place));
            }
        }
        // Another may just have taken its place.
        if own == known {
            return Ok(None);
        }
        known = own;
    }
}

fn look_at_links(pins: &Pins) -> Result<Look, GuardError> {
    let mut found = NOTHING;
    let (mut living, mut elsewhere, mut preceded, mut exchanged) = (0, false, false, false);
    for direction in Direction::ALL {
        // Another of its own may take the program's place while all this is asked.
        let mut own = pins.programs(direction)?;
        let Some(link) = pins.link(direction)? else {
            continue;
        };
        // The kernel's word for an interface that is gone, and for a link that was cut.
        if link.ifindex == 0 {
            continue;
        }
        living += 1;
        found.ifindex = link.ifindex;
        // Another namespace's interface may have the same index, so the program decides.
        let name = interface::name(link.ifindex);
        let chain = match &name {
            Some(name) => attached(name, direction)?,
            None => Vec::new(),
        };
        own.extend(pins.programs(direction)?);
        let is_there = |program: &u32| *program == link.program_id || own.contains(program);
        match chain.iter().position(is_there) {
            Some(place) => {
                found.interface = name;
                preceded |= place > 0;
            }
            None => elsewhere = true,
        }
        exchanged |= !own.contains(&link.program_id);
    }
    if let Some(interface) = &found.interface {
        let failed = |source| GuardError::System {
            action: "ask for an XDP program",
            interface: interface.clone(),
            source,
        };
        preceded |= links::has_xdp(found.ifindex).map_err(failed)?;
    }
    found.standing = match living {
        0 => Standing::Gone,
        _ if elsewhere => Standing::Elsewhere,
        1 => Standing::Partial,
        _ if exchanged => Standing::Exchanged,
        _ if preceded => Standing::Preceded,
        _ => Standing::InForce,
    };
    Ok(found)
}
