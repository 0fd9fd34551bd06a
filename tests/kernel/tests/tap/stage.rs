//! A small routed network around one guarded tap.

use std::thread::sleep;
use std::time::{Duration, Instant};

use omerta_dataplane::{Guard, GuardConfig, GuardError, Hook};
use omerta_kernel_tests::*;
use omerta_test_support::{Capture, FrameSender, Namespace, StageError, Tap, Veth, mac_of};
use omerta_verdict::{Direction, Mac, Mode, Reason};

pub const PATIENCE: Duration = Duration::from_secs(2);
/// Long enough for a frame to cross two interfaces of one machine, hundreds of times over.
pub const SETTLE: Duration = Duration::from_millis(20);
pub const WORLD_MAC: Mac = Mac([0x52, 0x54, 0x00, 0x00, 0x00, 0xcc]);

/// A provider with a guarded tap and an uplink to the world; the guest is the tap's descriptor.
pub struct Stage {
    pub provider: Namespace,
    pub world: Namespace,
    pub tap: Tap,
}

impl Stage {
    pub fn new(mode: Mode) -> Self {
        Self::with_tap(mode, || Tap::create("guest"))
    }

    pub fn with_tap(mode: Mode, create: impl FnOnce() -> Result<Tap, StageError> + Send) -> Self {
        Self::with_guard(&config(mode), create)
    }

    pub fn with_guard(
        guard: &GuardConfig,
        create: impl FnOnce() -> Result<Tap, StageError> + Send,
    ) -> Self {
        Self::by(Hook::of_this_kernel().unwrap(), guard, create)
    }

    pub fn by(
        hook: Hook,
        guard: &GuardConfig,
        create: impl FnOnce() -> Result<Tap, StageError> + Send,
    ) -> Self {
        let provider = Namespace::new("ot-prov").unwrap();
        let world = Namespace::new("ot-world").unwrap();
        for namespace in [&provider, &world] {
            namespace.disable_ipv6().unwrap();
        }
        provider.enable_forwarding().unwrap();
        Veth::across((&provider, "uplink"), (&world, "inet")).unwrap();
        provider.ip("link set uplink up").unwrap();
        world.ip("link set inet up").unwrap();
        let tap = provider.enter(create).unwrap().unwrap();
        provider
            .ip(&format!("link set guest address {GATEWAY_MAC}"))
            .unwrap();
        // Guarded before up: the guest has no unguarded instant.
        provider
            .enter(|| Guard::attach_by(hook, "guest", guard).map(drop))
            .unwrap()
            .unwrap();
        provider.enter(|| tap.up()).unwrap().unwrap();
        world
            .ip(&format!("link set inet address {WORLD_MAC}"))
            .unwrap();
        for step in [
            "addr add 10.77.0.1/32 dev guest",
            "route add 10.77.0.2/32 dev guest",
            "route add 10.77.0.3/32 dev guest",
            "addr add 203.0.113.1/24 dev uplink",
            "route add default via 203.0.113.9",
        ] {
            provider.ip(step).unwrap();
        }
        provider
            .ip(&format!(
                "neigh replace 203.0.113.9 lladdr {WORLD_MAC} dev uplink nud permanent"
            ))
            .unwrap();
        Self {
            provider,
            world,
            tap,
        }
    }

    pub fn guarded<T: Send>(&self, work: impl FnOnce(&Guard) -> Result<T, GuardError> + Send) -> T {
        self.provider
            .enter(|| Guard::open("guest").and_then(|guard| work(&guard)))
            .unwrap()
            .unwrap()
    }

    pub fn dropped(&self, direction: Direction, reason: Reason) -> u64 {
        let counters = self.guarded(Guard::counters);
        match direction {
            Direction::Egress => counters.egress.dropped_for(reason).packets,
            Direction::Ingress => counters.ingress.dropped_for(reason).packets,
        }
    }

    pub fn arrivals(&self) -> Capture {
        self.world.enter(|| Capture::open("inet")).unwrap().unwrap()
    }

    /// Spares the provider the question who has the guest's address.
    pub fn know_the_guest(&self) {
        self.provider
            .ip(&format!(
                "neigh replace 10.77.0.2 lladdr {GUEST_MAC} dev guest nud permanent"
            ))
            .unwrap();
    }

    /// Sends a packet from the world into the provider's uplink.
    pub fn send_from_world(&self, packet: &[u8]) {
        let uplink = self.provider.enter(|| mac_of("uplink")).unwrap().unwrap();
        let sender = self
            .world
            .enter(|| FrameSender::open("inet"))
            .unwrap()
            .unwrap();
        sender
            .send(&ethernet(WORLD_MAC, Mac(uplink), 0x0800, packet))
            .unwrap();
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Pins outlive the namespace; a test that failed has more to say than this.
        let _ = self
            .provider
            .enter(|| Guard::open("guest").and_then(Guard::detach));
    }
}

/// Waits for `found` to give something.
pub fn soon<T>(mut found: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match found() {
            Some(value) => return Some(value),
            None if Instant::now() > deadline => return None,
            None => sleep(Duration::from_millis(2)),
        }
    }
}

pub fn udp_payload(frame: &[u8]) -> Option<&[u8]> {
    (frame.get(12..14)? == [8, 0] && frame.get(23)? == &17).then(|| &frame[42..])
}
