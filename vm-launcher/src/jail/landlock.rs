//! What Landlock allows in the jail: a second fence behind the mount namespace, and on newer kernels
//! no TCP, no abstract sockets and no signals to anybody outside.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};

use super::JailError;
use super::root::{BindKind, Root};

/// The newest interface that is understood. On an older kernel what it lacks is left out.
const KNOWN: ABI = ABI::V6;

/// Whether the kernel has Landlock.
pub(super) fn is_there() -> bool {
    let rules = Ruleset::default()
        .handle_access(AccessFs::Execute)
        .and_then(Ruleset::create);
    rules.is_ok_and(|rules| Option::<OwnedFd>::from(rules).is_some())
}

/// The rules for `root` and what is bound into it, or `None` where the kernel has no Landlock.
pub(super) fn ruleset(root: &Root) -> Result<Option<OwnedFd>, JailError> {
    build(root).map_err(|error| JailError::Make {
        action: "make Landlock's rules",
        source: io::Error::other(error),
    })
}

fn build(root: &Root) -> Result<Option<OwnedFd>, Box<dyn Error + Send + Sync>> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?
        .add_rule(PathBeneath::new(root.as_fd(), read))?;
    for bind in root.binds() {
        let allowed: BitFlags<AccessFs> = match bind.kind {
            BindKind::Directory => read | AccessFs::Execute,
            BindKind::File => AccessFs::ReadFile | AccessFs::Execute,
            BindKind::Device => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev,
        };
        // Rules are about what is there, not about its path.
        let path = File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(&bind.path)?;
        rules = rules.add_rule(PathBeneath::new(path, allowed))?;
    }
    Ok(rules.into())
}
