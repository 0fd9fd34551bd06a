//! The hooks that the running kernel has, and what judges on them.

use std::io;
use std::process::Command;

use aya::programs::{SchedClassifier, TcAttachType};
use omerta_dataplane::{GuardError, Hook};

/// The kinds of hooks that guards can be put on here; with `OMERTA_HOOKS=own`, only the one that
/// the kernel's guards use by themselves.
///
/// # Errors
/// Where the kernel is too old for guards.
pub fn hooks() -> Result<&'static [Hook], GuardError> {
    let own = std::env::var_os("OMERTA_HOOKS").is_some_and(|hooks| hooks == "own");
    Ok(match Hook::of_this_kernel()? {
        Hook::Tcx if own => &[Hook::Tcx],
        Hook::Tcx => &[Hook::Tcx, Hook::Clsact],
        Hook::Clsact => &[Hook::Clsact],
    })
}

/// How many programs, or filters, stand on the interface's ingress and egress hooks.
///
/// # Errors
/// Where the kernel cannot be asked.
pub fn judging(hook: Hook, interface: &str) -> io::Result<[usize; 2]> {
    let count = |kind, word| match hook {
        Hook::Tcx => SchedClassifier::query_tcx(interface, kind)
            .map(|(_, programs)| programs.len())
            .map_err(io::Error::other),
        // Each filter has a line of its own with its handle.
        Hook::Clsact => tc(&format!("filter show dev {interface} {word}")).map(|shown| {
            shown
                .lines()
                .filter(|line| line.contains(" handle "))
                .count()
        }),
    };
    Ok([
        count(TcAttachType::Ingress, "ingress")?,
        count(TcAttachType::Egress, "egress")?,
    ])
}

/// Runs tc(8) in the network namespace of this thread, with arguments separated by blanks; what it
/// prints.
///
/// # Errors
/// Where it is missing or refuses.
pub fn tc(arguments: &str) -> io::Result<String> {
    let output = Command::new("tc").args(arguments.split(' ')).output()?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        return Err(io::Error::other(format!("tc {arguments}: {complaint}")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
