//! A guest that has a user and a root, and no process.

use tokio::task::spawn_blocking;

use crate::disk::Disks;
use crate::image::LeaseEnd;
use crate::jail::{Cell, Root};
use crate::lifecycle::machine::Machine;
use crate::lifecycle::{Paused, Traces};
use crate::{ImageError, LaunchError, Spec};

/// A user is reserved, its cgroups are made, and what boots is copied. Dropping it undoes that.
#[derive(Debug)]
pub struct Prepared {
    machine: Machine,
    root: Root,
    lease_end: LeaseEnd,
}

impl Prepared {
    /// Reserves a user and copies what the guest boots.
    ///
    /// # Errors
    /// Whatever fails; everything made until then is gone.
    pub async fn new(spec: Spec) -> Result<Self, LaunchError> {
        // Once it is launched QEMU holds the image, or nobody does.
        let lease_end = spec.image.lease_end();
        spec.validate()?;
        if !nix::unistd::geteuid().is_root() {
            return Err(LaunchError::NotRoot);
        }
        // The image may lie on a file system that hangs; this thread serves other guests too.
        let wanted = spec.clone();
        let building = move || -> Result<_, LaunchError> {
            let (cell, root) = Cell::build(&wanted)?;
            Ok((cell, root, Disks::prepare(&wanted)?))
        };
        let built = spawn_blocking(building).await;
        let (cell, root, disks) = built.map_err(|error| ImageError::Copy {
            path: spec.image.kernel.clone(),
            source: std::io::Error::other(error),
        })??;
        let mut machine = Machine::new(spec);
        machine.disks = disks;
        machine.cell = Some(cell);
        Ok(Self {
            machine,
            root,
            lease_end,
        })
    }

    /// What tells what there is of this guest: the user that QEMU will run as, which is nobody else's,
    /// and its cgroups.
    pub fn traces(&self) -> Traces {
        self.machine.traces()
    }

    /// Makes the run directory and the tap, starts QEMU stopped, and speaks with it.
    ///
    /// # Errors
    /// Whatever fails; everything made until then is gone.
    pub async fn launch(self) -> Result<Paused, LaunchError> {
        let _lease_end = self.lease_end;
        Paused::start_in(self.machine, self.root).await
    }
}
