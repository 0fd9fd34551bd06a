//! A guard held open: it judges for as long as it is, whatever becomes of its pins.

use std::io;
use std::os::fd::OwnedFd;

use omerta_verdict::Direction;

use crate::link;
use crate::{Guard, GuardError};

/// The links of a guard, or the programs of its filters, held open.
#[derive(Debug)]
pub struct HeldGuard {
    interface: String,
    ifindex: u32,
    identity: [u32; 2],
    links: Option<[OwnedFd; 2]>,
}

impl Guard {
    /// Holds the guard's links open. Filters need no holder: they are their interface's.
    pub fn hold(&self) -> Result<HeldGuard, GuardError> {
        let failed = |source| GuardError::System {
            action: "hold a link",
            interface: self.interface().to_owned(),
            source,
        };
        let links = match self.pins.filters()? {
            Some(_) => None,
            None => {
                let open = |direction| link::open(&self.pins.link_path(direction));
                let egress = open(Direction::Egress).map_err(failed)?;
                Some([egress, open(Direction::Ingress).map_err(failed)?])
            }
        };
        let held = HeldGuard {
            interface: self.interface().to_owned(),
            ifindex: self.ifindex(),
            identity: self.identity(),
            links,
        };
        // What is held now must be what the handle knows.
        self.judging()?;
        Ok(held)
    }
}

impl HeldGuard {
    /// Whether `guard` is the one that is held.
    pub fn is(&self, guard: &Guard) -> bool {
        self.ifindex == guard.ifindex() && self.identity == guard.identity()
    }

    /// Whether both links are on the interface of index `ifindex` still, so that what they run judges
    /// there, also where their pins are lost. Filters cannot tell.
    pub fn is_on(&self, ifindex: u32) -> Result<bool, GuardError> {
        let Some(links) = &self.links else {
            return Ok(false);
        };
        let all = links
            .iter()
            .map(|link| Ok(link::info_of(link)?.ifindex == ifindex));
        all.collect::<io::Result<Vec<bool>>>()
            .map(|on| on.into_iter().all(|on| on))
            .map_err(|source| GuardError::System {
                action: "ask for a link",
                interface: self.interface.clone(),
                source,
            })
    }
}
