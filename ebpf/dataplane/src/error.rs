//! What can go wrong with a guard.

use std::io;
use std::path::PathBuf;

use aya::maps::MapError;
use aya::programs::ProgramError;
use aya::programs::links::LinkError;

use crate::{Owner, Standing};

/// What kind of failure an error is, for exit codes and API answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The interface or its guard does not exist.
    NotFound,
    /// The request cannot be right.
    Usage,
    /// The state of the interface forbids the request.
    Refused,
    /// The system failed.
    Failed,
}

/// An operation on a guard that did not take place.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// No interface of that name in this network namespace.
    #[error("no interface {interface} in this network namespace (see `ip link`)")]
    NoInterface {
        /// Its name.
        interface: String,
    },
    /// The interface has no guard.
    #[error("{interface} has no guard: attach one with `omerta guard attach {interface} ...`")]
    NotGuarded {
        /// Its name.
        interface: String,
    },
    /// The interface has a guard already.
    #[error(
        "{interface} is guarded already: change its policy, or `omerta guard detach {interface}` first"
    )]
    AlreadyGuarded {
        /// Its name.
        interface: String,
    },
    /// The pins of a guard exist but the kernel does not run it on this interface.
    #[error(
        "the guard of {interface} is not in force ({why}): attach it again with `omerta guard attach {interface} ...`"
    )]
    NotInForce {
        /// Its name.
        interface: String,
        /// What is missing.
        why: &'static str,
    },
    /// The interface that was guarded under this name has another name now.
    #[error(
        "the guard attached to {interface} is in force on {now}, as that interface is called now: use that name, or rename it back"
    )]
    Renamed {
        /// The name that the guard was attached under.
        interface: String,
        /// The interface's name now.
        now: String,
    },
    /// The interface that was guarded under this name is in another network namespace now.
    #[error(
        "the guard attached to {interface} is in force in another network namespace, on the interface of index {ifindex}: bring that interface back to reach its guard"
    )]
    Elsewhere {
        /// The name that the guard was attached under.
        interface: String,
        /// The index of the interface that it guards.
        ifindex: u32,
    },
    /// The guard that this handle was opened on has been removed and another attached.
    #[error(
        "the guard of {interface} is another one by now; nothing was changed: look at it with `omerta guard show {interface}`, and try again"
    )]
    Replaced {
        /// The interface's name.
        interface: String,
    },
    /// Something stands among a guard's pins that is not the guard's.
    #[error("{} is not a guard's, so nothing was removed: remove it (`rm -r`, which detaches what is pinned there), and try again", path.display())]
    Foreign {
        /// What it is.
        path: PathBuf,
    },
    /// A guard judges, but not as it should: not first, not all of it, or elsewhere.
    #[error("the guard of {interface} is {word}: {why}; {remedy}", word = standing.word(), why = standing.why(), remedy = remedy(*standing, interface))]
    Broken {
        /// The interface's name.
        interface: String,
        /// How the guard stands.
        standing: Standing,
    },
    /// The guard judges by maps that are laid out in a way that this build does not know.
    #[error(
        "the guard of {interface} was made by another version of omerta, whose policy this one cannot read; it stays in force: use that version, or `omerta guard detach {interface}` while the guest is down, and attach anew"
    )]
    OtherPolicyLayout {
        /// The interface's name.
        interface: String,
    },
    /// The guard counts and tells in a way that this build does not know.
    #[error(
        "the guard of {interface} was made by another version of omerta, whose counters this one cannot read; it stays in force: `omerta guard upgrade {interface}`, and they begin at 0"
    )]
    OtherAccountsLayout {
        /// The interface's name.
        interface: String,
    },
    /// The directory of the programs that judge for the guard was removed, or its place in it.
    #[error(
        "somebody has removed {}, by which the allowlist of {interface} is reached; its guard stays in force as it is: `omerta guard detach {interface}` while the guest is down, and attach anew", path.display()
    )]
    ProgramsLost {
        /// The interface's name.
        interface: String,
        /// The directory.
        path: PathBuf,
    },
    /// Another process changes the guard and does not end.
    #[error("the guard of {interface} is being changed by another process that does not end: see which (`fuser -v {}`), end it, and try again", path.display())]
    Busy {
        /// The interface's name.
        interface: String,
        /// The directory that the other process has locked.
        path: PathBuf,
    },
    /// Somebody other than root could take guards away.
    #[error("{} is not root's alone, so guards pinned there are not safe: mount bpffs with mode 0700 and remove that directory", path.display())]
    Untrusted {
        /// The directory.
        path: PathBuf,
    },
    /// The guard belongs to somebody else.
    #[error(
        "the guard of {interface} is {owner}'s to change or remove: `omerta vm stop NAME` ends its guest and with it the guard; where {owner} is gone, its next start removes it"
    )]
    Owned {
        /// The interface's name.
        interface: String,
        /// Whose it is.
        owner: Owner,
    },
    /// The guard belongs to nobody, and was asked for by an owner.
    #[error(
        "the guard of {interface} was not made by {owner}: `omerta guard detach {interface}` removes it"
    )]
    NotOwned {
        /// The interface's name.
        interface: String,
        /// Who asked.
        owner: Owner,
    },
    /// The configuration contradicts itself.
    #[error("{problem}")]
    Config {
        /// What is wrong and what to do.
        problem: String,
    },
    /// More endpoints than the allowlist has room for.
    #[error(
        "{count} endpoints do not fit the allowlist of {interface}, which holds {limit}; nothing was changed"
    )]
    AllowlistFull {
        /// The interface's name.
        interface: String,
        /// How many were asked for.
        count: usize,
        /// How many fit.
        limit: usize,
    },
    /// An endpoint that the guest could never reach.
    #[error(
        "{endpoint} can never be reached from {interface}: its guest has no {family} address; nothing was changed: leave it out"
    )]
    NoAddressOfFamily {
        /// The interface's name.
        interface: String,
        /// The endpoint.
        endpoint: String,
        /// IPv4 or IPv6.
        family: &'static str,
    },
    /// An endpoint that is the guest itself.
    #[error("{endpoint} is the guest of {interface} itself; nothing was changed: leave it out")]
    OwnAddress {
        /// The interface's name.
        interface: String,
        /// The endpoint.
        endpoint: String,
    },
    /// Conntrack mode was asked for where the guard was attached in another.
    #[error(
        "the guard of {interface} has no room for flows, which conntrack mode needs: `omerta guard detach {interface}`, and attach it with --mode conntrack"
    )]
    NoRoomForFlows {
        /// The interface's name.
        interface: String,
    },
    /// The endpoint to revoke is not on the allowlist.
    #[error("{endpoint} is not on the allowlist of {interface}; nothing was changed")]
    NotListed {
        /// The interface's name.
        interface: String,
        /// The endpoint.
        endpoint: String,
    },
    /// Something that is no guard's is where the guard must be, on a kernel without TCX.
    #[error(
        "{what} of {interface} is in the guard's way: remove it (`{remedy}`), and attach again"
    )]
    HookTaken {
        /// The interface's name.
        interface: String,
        /// What it is.
        what: &'static str,
        /// A command that removes it.
        remedy: String,
    },
    /// Neither TCX nor all that guards need without it.
    #[error(
        "this kernel ({release}) is too old for guards: use Linux 6.6 or newer, which has TCX, or 5.15 at least"
    )]
    KernelTooOld {
        /// `uname -r`.
        release: String,
    },
    /// The caller may not load BPF programs.
    #[error(
        "guards need root (CAP_SYS_ADMIN, which CAP_BPF and CAP_NET_ADMIN do not replace): run with sudo"
    )]
    NotPermitted,
    /// bpffs could not be used.
    #[error("cannot {action} {path}: guards need bpffs, mounted writable, at /sys/fs/bpf")]
    Bpffs {
        /// What was attempted.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The programs could not be loaded.
    #[error("the kernel did not load the guard's programs for {interface}")]
    Load {
        /// The interface's name.
        interface: String,
        /// Why.
        #[source]
        source: Box<aya::EbpfError>,
    },
    /// A program could not be verified or attached.
    #[error("the kernel did not accept the guard's program {program} on {interface}")]
    Program {
        /// The program's name.
        program: &'static str,
        /// The interface's name.
        interface: String,
        /// Why.
        #[source]
        source: Box<ProgramError>,
    },
    /// The verifier refused a program, with reasons that fill pages.
    #[error(
        "the kernel's verifier did not accept the guard's {program} on {interface}: `--verbose` prints its last words; report them, and use a kernel that this release supports"
    )]
    Verifier {
        /// The program's name.
        program: &'static str,
        /// The interface's name.
        interface: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
        /// What the verifier wrote.
        log: String,
    },
    /// A link could not be read or made.
    #[error("cannot {action} the guard's link on {interface}")]
    Link {
        /// What was attempted.
        action: &'static str,
        /// The interface's name.
        interface: String,
        /// Why it failed.
        #[source]
        source: LinkError,
    },
    /// A map could not be read or written.
    #[error("cannot {action} the guard's map {map} of {interface}")]
    Map {
        /// What was attempted.
        action: &'static str,
        /// The map.
        map: &'static str,
        /// The interface's name.
        interface: String,
        /// Why it failed.
        #[source]
        source: Box<MapError>,
    },
    /// Another system call failed.
    #[error("cannot {action} for the guard of {interface}")]
    System {
        /// What was attempted.
        action: &'static str,
        /// The interface's name.
        interface: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl GuardError {
    /// The kernel's refusal of `program`, with the verifier's words apart from the message.
    pub(crate) fn of_program(program: &'static str, interface: &str, error: ProgramError) -> Self {
        let interface = interface.to_owned();
        match error {
            ProgramError::LoadError {
                io_error: source,
                verifier_log,
            } => Self::Verifier {
                program,
                interface,
                source,
                log: verifier_log.to_string(),
            },
            source => Self::Program {
                program,
                interface,
                source: Box::new(source),
            },
        }
    }

    /// What the kernel's verifier wrote, where it refused a program.
    pub fn verifier_log(&self) -> Option<&str> {
        match self {
            Self::Verifier { log, .. } => Some(log),
            _ => None,
        }
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoInterface { .. } | Self::NotGuarded { .. } | Self::NotListed { .. } => {
                ErrorKind::NotFound
            }
            Self::Config { .. } => ErrorKind::Usage,
            Self::AlreadyGuarded { .. }
            | Self::Elsewhere { .. }
            | Self::Renamed { .. }
            | Self::Replaced { .. }
            | Self::OtherPolicyLayout { .. }
            | Self::OtherAccountsLayout { .. }
            | Self::ProgramsLost { .. }
            | Self::Foreign { .. }
            | Self::HookTaken { .. }
            | Self::Untrusted { .. }
            | Self::NoRoomForFlows { .. }
            | Self::NoAddressOfFamily { .. }
            | Self::OwnAddress { .. }
            | Self::Owned { .. }
            | Self::NotOwned { .. }
            | Self::AllowlistFull { .. } => ErrorKind::Refused,
            _ => ErrorKind::Failed,
        }
    }
}

/// What to do about a guard of `interface` that stands so.
fn remedy(standing: Standing, interface: &str) -> String {
    match standing {
        Standing::Elsewhere => {
            "bring the interface back to this network namespace to reach it".to_owned()
        }
        Standing::Preceded => format!(
            "remove that program (`bpftool net show dev {interface}` names it; `ip link set dev {interface} xdp off` where it is of XDP), or, where it stands on the guard's hook, `omerta guard detach {interface}` and attach the guard anew, which puts it first"
        ),
        _ => format!(
            "`omerta guard detach {interface}` removes what is left of it, and attach guards anew"
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    #[test]
    fn the_verifiers_words_are_kept_and_not_in_the_message() {
        let log = (0..100).map(|line| format!("{line}: (bf) r1 = r0\n"));
        let refused = io::Error::from_raw_os_error(libc::EINVAL);
        let error = GuardError::Verifier {
            program: "guest_egress",
            interface: "tap0".into(),
            source: refused,
            log: log.collect(),
        };
        let mut shown = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            shown += &error.to_string();
            cause = error.source();
        }
        assert!(
            !shown.contains("r1 = r0") && !shown.contains('\n'),
            "{shown}"
        );
        assert!(error.verifier_log().unwrap().contains("99: (bf) r1 = r0"));
    }
}
