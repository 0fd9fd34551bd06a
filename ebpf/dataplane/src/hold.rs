//! A guard held open: it judges for as long as it is, whatever becomes of its pins.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use omerta_verdict::{Direction, Endpoint, Mode, Policy, Table};

use crate::link;
use crate::pins::is_pin;
use crate::shared::JUDGES;
use crate::{Guard, GuardError, PolicyStore, Standing};

/// The links and the policy of a guard, held open.
pub struct HeldGuard {
    interface: String,
    ifindex: u32,
    identity: [u32; 2],
    links: Option<[HeldLink; 2]>,
    /// By which the guard's programs get to those that judge.
    _judges: Option<OwnedFd>,
    /// `None` where it is laid out in a way that this build cannot read.
    policy: Option<PolicyStore>,
}

#[derive(Debug)]
struct HeldLink {
    link: OwnedFd,
    /// The guard's own, which the link ran when it was held.
    program: u32,
}

/// What a guard enforces.
pub(crate) struct Enforced {
    pub policy: Policy,
    pub allow: Vec<Endpoint>,
    /// As in `STATE`: a lease that has ended stays so.
    pub lease_until_ns: u64,
    /// The group that the interface may be in already, as one that is guarded.
    pub group: Option<u32>,
}

impl fmt::Debug for HeldGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldGuard")
            .field("interface", &self.interface)
            .field("links", &self.links)
            .finish_non_exhaustive()
    }
}

impl Guard {
    /// Holds the guard's links and policy open. Filters need no holder: they are their interface's.
    pub fn hold(&self) -> Result<HeldGuard, GuardError> {
        let failed = |source| GuardError::System {
            action: "hold a link",
            interface: self.interface().to_owned(),
            source,
        };
        let links = match self.pins.filters()? {
            Some(_) => None,
            None => {
                let hold = |direction| {
                    let link = link::open(&self.pins.link_path(direction)).map_err(failed)?;
                    let program = link::info_of(&link).map_err(failed)?.program_id;
                    if !self.pins.programs(direction)?.contains(&program) {
                        return Err(GuardError::NotInForce {
                            interface: self.interface().to_owned(),
                            why: Standing::Exchanged.why(),
                        });
                    }
                    Ok(HeldLink { link, program })
                };
                Some([hold(Direction::Egress)?, hold(Direction::Ingress)?])
            }
        };
        let policy = match PolicyStore::open(self.interface(), &self.pins) {
            Ok(policy) => Some(policy),
            Err(GuardError::OtherPolicyLayout { .. }) => None,
            Err(error) => return Err(error),
        };
        let judges = self.pins.path(JUDGES);
        let judges = match is_pin(&judges)? {
            true => Some(link::open(&judges).map_err(failed)?),
            // Programs of an earlier build, which judge themselves.
            false => None,
        };
        let held = HeldGuard {
            interface: self.interface().to_owned(),
            ifindex: self.ifindex(),
            identity: self.identity(),
            links,
            _judges: judges,
            policy,
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

    /// Whether both links are on the interface of index `ifindex` still and run the programs that they ran
    /// when they were held, so that the guard judges there, also where its pins are lost. Filters cannot
    /// tell; after an upgrade the guard is to be held anew.
    pub fn is_on(&self, ifindex: u32) -> Result<bool, GuardError> {
        let Some(links) = &self.links else {
            return Ok(false);
        };
        let all = links.iter().map(|held| {
            let now = link::info_of(&held.link)?;
            Ok(now.ifindex == ifindex && now.program_id == held.program)
        });
        all.collect::<io::Result<Vec<bool>>>()
            .map(|on| on.into_iter().all(|on| on))
            .map_err(|source| GuardError::System {
                action: "ask for a link",
                interface: self.interface.clone(),
                source,
            })
    }

    /// How it judges.
    ///
    /// # Errors
    /// Where that cannot be read.
    pub fn mode(&self) -> Result<Mode, GuardError> {
        let policy = self.store()?.settled()?.1;
        Mode::from_number(policy.mode).ok_or_else(|| self.unreadable())
    }

    /// What it enforces, also where its pins are lost, on an interface in `group`.
    pub(crate) fn enforced(&self, group: Option<u32>) -> Result<Enforced, GuardError> {
        let store = self.store()?;
        let (_, policy, buckets) = store.settled()?;
        Ok(Enforced {
            policy,
            allow: Table::endpoints(&buckets).collect(),
            lease_until_ns: store.lease_until_ns(),
            group,
        })
    }

    fn store(&self) -> Result<&PolicyStore, GuardError> {
        self.policy.as_ref().ok_or_else(|| self.unreadable())
    }

    fn unreadable(&self) -> GuardError {
        GuardError::OtherPolicyLayout {
            interface: self.interface.clone(),
        }
    }
}
