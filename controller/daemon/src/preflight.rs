//! What this host must have before a guest can be guarded on it.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use thiserror::Error;

/// Why omertad does not start on this host.
#[derive(Debug, Error)]
pub(crate) enum PreflightError {
    #[error("omertad needs root, for taps and guards: run it with sudo")]
    NotRoot,
    #[error("cannot raise the limit of open files")]
    Descriptors(#[source] nix::Error),
    #[error(transparent)]
    Kernel(#[from] omerta_dataplane::GuardError),
}

/// Checks what would make every guest fail, and warns of what would keep every guest from its
/// consumer.
pub(crate) fn check() -> Result<(), PreflightError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(PreflightError::NotRoot);
    }
    omerta_dataplane::Hook::of_this_kernel()?;
    match std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward") {
        Ok(value) if value.trim() == "0" => tracing::warn!(
            "IPv4 forwarding is off in this network namespace, so no guest will reach its consumer: turn it on with `sysctl -w net.ipv4.ip_forward=1`"
        ),
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "cannot tell whether IPv4 forwarding is on"),
    }
    Ok(())
}

/// Allows as many descriptors as the system does: a guest takes up to two dozen, and one that cannot
/// be looked after is ended.
pub(crate) fn raise_descriptor_limit() -> Result<(), PreflightError> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(PreflightError::Descriptors)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(PreflightError::Descriptors)?;
    }
    Ok(())
}
