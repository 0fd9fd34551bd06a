//! A guard that is attached while QEMU starts: the kernel takes about as long to verify the programs.

use std::io;
use std::thread::{self, JoinHandle};

use omerta_dataplane::{Guard, GuardConfig, GuardError};

use crate::Spec;

/// The thread that attaches. Whoever has it takes what it makes, or leaves it to the machine, which does.
#[derive(Debug)]
pub(super) struct Attaching {
    interface: String,
    thread: JoinHandle<Result<Guard, GuardError>>,
}

impl Attaching {
    /// Begins to attach the guest's guard to its tap, in the network namespace of the calling thread. In
    /// doubt, what is attached early keeps more out.
    pub(super) fn begin(spec: &Spec) -> Result<Self, GuardError> {
        let config = GuardConfig {
            mac: spec.mac,
            addresses: vec![spec.address.into()],
            gateways: vec![spec.gateway.into()],
            gateway_mac: Some(spec.gateway_mac()),
            mode: spec.mode,
            allow: spec.allowlist(),
            egress: spec.limits.egress,
            ingress: spec.limits.ingress,
            lease: spec.guard_lease,
            owner: spec.guard_owner.clone(),
        };
        let (interface, redirect) = (spec.tap.clone(), spec.redirect);
        let attach = move || {
            // The tap is new, so what is pinned under its name is a dead launcher's and guards nothing.
            if Guard::remove_stale(&interface, config.owner.as_ref())? {
                tracing::info!(
                    tap = interface,
                    "removed the pins of a guard whose tap is gone"
                );
            }
            let guard = Guard::attach(&interface, &config)?;
            // A new one redirects nothing.
            if redirect {
                redirect_as_asked(&guard, redirect);
            }
            Ok(guard)
        };
        // A thread begins in its parent's network namespace.
        let thread = thread::Builder::new().name("attach".to_owned());
        match thread.spawn(attach) {
            Ok(thread) => Ok(Self {
                interface: spec.tap.clone(),
                thread,
            }),
            Err(source) => Err(failed(&spec.tap, source)),
        }
    }

    /// Waits for the guard, blocking the thread.
    pub(super) fn end(self) -> Result<Guard, GuardError> {
        self.thread.join().unwrap_or_else(|_| {
            let source = io::Error::other("it broke off: see the log");
            Err(failed(&self.interface, source))
        })
    }
}

/// Has what `guard` allows pass the host's stack by, or go through it. Where that cannot be done the way is as
/// it was, and the guest as guarded.
pub(super) fn redirect_as_asked(guard: &Guard, redirect: bool) {
    let followed = guard.status().and_then(|status| {
        let in_force = status.redirect.is_some_and(|redirect| redirect.in_force);
        match (redirect, status.redirect.is_some()) {
            (true, _) if !in_force => guard.redirect(&[]),
            (false, true) => guard.stop_redirecting(),
            _ => Ok(()),
        }
    });
    if let Err(error) = followed {
        let error = error.to_string();
        let wanted = if redirect {
            "redirected"
        } else {
            "left to the stack"
        };
        tracing::warn!(
            tap = guard.interface(),
            error,
            "what the guest sends cannot be {wanted}"
        );
    }
}

fn failed(interface: &str, source: io::Error) -> GuardError {
    GuardError::System {
        action: "attach the guard on a thread of its own",
        interface: interface.to_owned(),
        source,
    }
}
