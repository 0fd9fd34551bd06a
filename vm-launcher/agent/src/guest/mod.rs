//! The guest's side: what is sealed at the start, and compared with.

mod firewall;
mod netlink;
mod routes;
mod tunnel;

use std::fs;
use std::io;
use std::net::SocketAddrV4;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use omerta_agent::message::Changes;
use sha2::{Digest, Sha256};

use firewall::Firewall;
use routes::Routes;
use tunnel::Tunnels;

/// Why the state of the guest cannot be known. It counts as changed then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SealError {
    #[error("cannot ask the kernel by netlink")]
    Netlink(#[source] io::Error),
    #[error("cannot wait for the kernel's answer")]
    Poll(#[source] Errno),
    #[error("the kernel does not answer")]
    Silent,
    #[error("the kernel's answer is cut short")]
    Short,
    #[error("what the kernel is asked for keeps changing")]
    KeepsChanging,
    #[error("cannot read the rules of iptables")]
    Tables(#[source] Errno),
    #[error("cannot read the agent's program at {path}")]
    Program {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Why the guest does not follow its consumer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FollowError {
    #[error("something has changed before")]
    Changed,
    #[error("more has changed than one set of rules and a route to it")]
    More,
    #[error("cannot run {program}")]
    Run {
        program: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{program} has failed ({status})")]
    Failed {
        program: &'static str,
        status: std::process::ExitStatus,
    },
    #[error("{0} does not end")]
    Slow(&'static str),
    #[error(transparent)]
    Look(#[from] SealError),
}

/// How long the image may take to set a tunnel's peers anew.
const PEERS_ANEW: Duration = Duration::from_secs(2);

/// What must not change.
struct State {
    firewall: firewall::Known,
    routes: routes::Known,
    tunnel: tunnel::Known,
    program: [u8; 32],
}

/// What was there at the start, and the means to look again.
pub(crate) struct Seal {
    firewall: Firewall,
    routes: Routes,
    tunnels: Tunnels,
    program: PathBuf,
    sealed: State,
}

impl Seal {
    /// Seals what there is now.
    pub(crate) fn new() -> Result<Self, SealError> {
        let program = std::env::current_exe().map_err(|source| SealError::Program {
            path: "/proc/self/exe".into(),
            source,
        })?;
        let (mut firewall, mut routes, mut tunnels) =
            (Firewall::open()?, Routes::open()?, Tunnels::open()?);
        let sealed = State {
            firewall: firewall.look()?,
            routes: routes.look()?,
            tunnel: tunnels.settled(PEERS_ANEW)?,
            program: digest_of(&program)?,
        };
        Ok(Self {
            firewall,
            routes,
            tunnels,
            program,
            sealed,
        })
    }

    /// SHA-256 of the agent's program.
    pub(crate) const fn program(&self) -> [u8; 32] {
        self.sealed.program
    }

    /// What the kernel tells changes by.
    pub(crate) fn told_by(&self) -> [BorrowedFd<'_>; 2] {
        [self.firewall.changes.as_fd(), self.routes.changes.as_fd()]
    }

    /// What is not as it was sealed, and why where that could not be found out.
    pub(crate) fn changes(&mut self) -> (Changes, Option<SealError>) {
        self.firewall.changes.forget();
        self.routes.changes.forget();
        let (mut changes, mut error) = (Changes::NONE, None);
        let mut note = |changed: Result<bool, SealError>, what: Changes| match changed {
            Ok(false) => {}
            Ok(true) => changes = changes.and(what),
            Err(failed) => {
                changes = changes.and(what);
                error = Some(failed);
            }
        };
        let sealed = &mut self.sealed;
        note(
            self.firewall.look().map(|now| now != sealed.firewall),
            Changes::FIREWALL,
        );
        note(
            self.routes.look().map(|now| now != sealed.routes),
            Changes::ROUTES,
        );
        note(
            self.tunnels.look().map(|now| {
                let changed = !sealed.tunnel.is_still(&now);
                sealed.tunnel.shaken |= now.shaken;
                changed
            }),
            Changes::TUNNEL,
        );
        note(
            digest_of(&self.program).map(|now| now != sealed.program),
            Changes::AGENT,
        );
        (changes, error)
    }
}

impl Seal {
    /// Has the guest follow its consumer by `follow`, and seals what that was to change: one change of nftables' rules, and a
    /// route to where the consumer is. Whatever else has changed meanwhile shows as changed from then on. Nothing is done
    /// where something has changed before.
    pub(crate) fn follow(
        &mut self,
        consumer: SocketAddrV4,
        follow: impl FnOnce() -> Result<(), FollowError>,
    ) -> Result<(), FollowError> {
        if !self.changes().0.is_none() {
            return Err(FollowError::Changed);
        }
        follow()?;
        let (firewall, routes) = (self.firewall.look()?, self.routes.look()?);
        let sealed = &mut self.sealed;
        if sealed.firewall.is_one_change_before(&firewall)
            && sealed.routes.is_but_for_a_route_to(*consumer.ip(), &routes)
        {
            sealed.firewall = firewall;
            sealed.routes = routes;
            Ok(())
        } else {
            Err(FollowError::More)
        }
    }
}

fn digest_of(path: &Path) -> Result<[u8; 32], SealError> {
    let bytes = fs::read(path).map_err(|source| SealError::Program {
        path: path.to_owned(),
        source,
    })?;
    Ok(Sha256::digest(bytes).into())
}

#[cfg(test)]
mod tests;
