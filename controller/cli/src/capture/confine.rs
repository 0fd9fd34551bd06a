//! What a capture gives up once all is open: it reads what strangers send.

use std::error::Error;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, Scope,
};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};

/// The newest interface that is understood. On an older kernel what it lacks is left out.
const KNOWN: ABI = ABI::V6;

/// Leaves this thread no capability but to read the guard's maps, and no file but those that are open and
/// those in `directory`.
pub fn to(directory: Option<&Path>) -> Result<(), Box<dyn Error>> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?;
    if let Some(directory) = directory {
        let write =
            AccessFs::WriteFile | AccessFs::Truncate | AccessFs::MakeReg | AccessFs::RemoveFile;
        rules = rules.add_rule(PathBeneath::new(PathFd::new(directory)?, write))?;
    }
    set_no_new_privs(true)?;
    rules.restrict_self()?;
    // A long allowlist is a map that is opened anew with each change (Linux asks for this where it keeps
    // bpf(2) from everybody else).
    let bpf = CapabilitySet::BPF;
    set_capabilities(
        None,
        CapabilitySets {
            effective: bpf,
            permitted: bpf,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    Ok(())
}
