//! A WireGuard device, whichever program drives it.

use std::io;
use std::num::NonZero;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use crate::{Change, Namespace, Peer, Peers, PublicKey, Secret, plan};

/// A device's own side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Its private key.
    pub private_key: Secret,
    /// The port that it listens on; one that is free where absent.
    pub listen_port: Option<NonZero<u16>>,
}

/// What a device says of itself. It tells no private key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The port that it listens on.
    pub listen_port: u16,
    /// Its peers, in order of key.
    pub peers: Vec<PeerStatus>,
}

/// What a device says of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    /// The peer as the device has it: where it roamed, at its latest endpoint.
    pub peer: Peer,
    /// When the latest handshake was, by the wall's clock.
    pub last_handshake: Option<SystemTime>,
    /// Bytes sent to it.
    pub sent_bytes: u64,
    /// Bytes received from it.
    pub received_bytes: u64,
}

/// Why a device does not do as it is told.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The kernel has no WireGuard.
    #[error(
        "this kernel has no WireGuard: load the module `wireguard`, or use the userspace back end"
    )]
    NoWireGuard,
    /// The userspace program is not there.
    #[error("cannot run {program}: install the package that has it")]
    Program {
        /// The program.
        program: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The userspace program has ended, or was slow to come.
    #[error("the program that drives {interface} {why}")]
    Driver {
        /// The interface.
        interface: String,
        /// What it did.
        why: String,
    },
    /// A file or socket.
    #[error("cannot {action} {}", path.display())]
    Path {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A request was refused.
    #[error("cannot {action} {interface}")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// The interface.
        interface: String,
        /// The answer.
        #[source]
        source: io::Error,
    },
    /// The answer cannot be understood.
    #[error("the answer about {interface} cannot be understood: {what}")]
    Answer {
        /// The interface.
        interface: String,
        /// What of it.
        what: &'static str,
    },
}

/// One WireGuard device. Dropping it removes the interface.
pub trait Device {
    /// The back end's word, for people.
    const BACK_END: &'static str;

    /// The interface's name.
    fn interface(&self) -> &str;

    /// Moves the interface, which must be down, to another network namespace. The socket that its tunnels go by stays
    /// where the device was made.
    ///
    /// # Errors
    /// See [`DeviceError`]. It may be there then, or not; dropping it removes it all the same.
    fn move_to(&mut self, namespace: &Namespace) -> Result<(), DeviceError>;

    /// Sets its own side. Peers stay.
    ///
    /// # Errors
    /// See [`DeviceError`].
    fn set_up(&mut self, setup: &Setup) -> Result<(), DeviceError>;

    /// Carries out changes, in order. Peers that none of them names are not touched.
    ///
    /// # Errors
    /// See [`DeviceError`]. Changes before the one that failed may have been made: look, and plan anew.
    fn apply(&mut self, changes: &[Change]) -> Result<(), DeviceError>;

    /// What it says of itself.
    ///
    /// # Errors
    /// See [`DeviceError`].
    fn status(&mut self) -> Result<Status, DeviceError>;

    /// Brings the device from whatever it has to what is wanted, and tells how many changes that took. `before` is what was
    /// wanted last.
    ///
    /// # Errors
    /// See [`DeviceError`].
    fn sync(&mut self, before: &Peers, wanted: &Peers) -> Result<usize, DeviceError> {
        let had: Vec<Peer> = self
            .status()?
            .peers
            .into_iter()
            .map(|status| status.peer)
            .collect();
        let changes = plan(before, wanted, &had);
        self.apply(&changes)?;
        Ok(changes.len())
    }
}

impl Status {
    /// What it says of one peer.
    pub fn peer(&self, public_key: &PublicKey) -> Option<&PeerStatus> {
        self.peers
            .iter()
            .find(|status| status.peer.public_key == *public_key)
    }
}

/// A moment of the wall's clock as devices tell it; the beginning of time is none.
pub(crate) fn moment(seconds: u64, nanoseconds: u32) -> Option<SystemTime> {
    if seconds == 0 && nanoseconds == 0 {
        return None;
    }
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds.min(999_999_999)))
}
