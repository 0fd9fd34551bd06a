//! Any interleaving of allow, revoke, replace, mode changes, reopening and a writer's death against plain
//! sets: the allowlist, the epoch and the kernel's verdicts on frames, answers and errors agree with them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use omerta_dataplane::{ErrorKind, Guard, Owner};
use omerta_kernel_tests::{
    GATEWAY_MAC, GUEST, GUEST_MAC, Ipv4, STRANGER, config, ethernet, icmp_unreachable,
    remove_left_overs, tcp, udp, victim,
};
use omerta_test_support::{FrameSender, Namespace, Tap};
use omerta_verdict::{Endpoint, Flow, Mode, Protocol, Reason, SentFlow};

const RUNS: u64 = 6;
const STEPS: usize = 60;

/// The endpoints that a run uses: few, so that changes meet the same ones often.
fn world() -> Vec<Endpoint> {
    let mut world = Vec::new();
    for protocol in [Protocol::Udp, Protocol::Tcp] {
        for host in 1..=3 {
            for port in 1..=4 {
                world.push(Endpoint {
                    protocol,
                    address: IpAddr::from(Ipv4Addr::new(192, 0, 2, host)).into(),
                    port,
                });
            }
        }
    }
    world
}

/// A packet between the guest and place `index` of [`world`].
fn packet(index: usize, from_guest: bool) -> Vec<u8> {
    let (host, port) = (1 + index / 4 % 3, 1 + index as u16 % 4);
    let peer = Ipv4Addr::new(192, 0, 2, host as u8);
    let ((from, source), (to, destination)) = if from_guest {
        ((GUEST, 4000), (peer, port))
    } else {
        ((peer, port), (GUEST, 4000))
    };
    let (number, segment) = match world()[index].protocol {
        Protocol::Udp => (17, udp(source, destination, b"omerta")),
        _ => (6, tcp(source, destination)),
    };
    Ipv4::new(from, to, number).packet(&segment)
}

/// Where outside of conntrack mode is remembered that the guest has sent there.
fn place(endpoint: &Endpoint) -> usize {
    let guest = (IpAddr::from(GUEST).into(), 4000);
    let flow = Flow::new(endpoint.protocol, guest, (endpoint.address, endpoint.port));
    SentFlow::place_and_check(&flow, 0, 0).0
}

/// A frame of the guest to place `index` of [`world`].
fn frame(index: usize) -> Vec<u8> {
    ethernet(GUEST_MAC, GATEWAY_MAC, 0x0800, &packet(index, true))
}

/// An answer to it.
fn answer(index: usize) -> Vec<u8> {
    ethernet(GATEWAY_MAC, GUEST_MAC, 0x0800, &packet(index, false))
}

/// An error about it.
fn error(index: usize) -> Vec<u8> {
    let message = icmp_unreachable(&packet(index, true));
    let packet = Ipv4::new(STRANGER, GUEST, 1).packet(&message);
    ethernet(GATEWAY_MAC, GUEST_MAC, 0x0800, &packet)
}

fn subset(world: &[Endpoint], random: &mut fastrand::Rng, odds: u32) -> Vec<Endpoint> {
    let mut chosen: Vec<_> = world
        .iter()
        .copied()
        .filter(|_| random.u32(..odds) == 0)
        .collect();
    random.shuffle(&mut chosen);
    if !chosen.is_empty() && random.bool() {
        chosen.push(chosen[0]);
    }
    chosen
}

/// What a guard must be.
struct Model {
    listed: BTreeSet<Endpoint>,
    /// To which the guest has sent in conntrack mode since they are listed.
    opened: BTreeSet<Endpoint>,
    /// To which the guest has sent in another mode since the last change, and last of their [`place`].
    sent: BTreeSet<Endpoint>,
    epoch: u64,
    mode: Mode,
}

impl Model {
    /// The epoch after a change to `listed`: it rises where something changes.
    fn becomes(&mut self, listed: BTreeSet<Endpoint>) -> u64 {
        if listed != self.listed {
            self.epoch += 1;
            self.sent.clear();
            self.opened.retain(|endpoint| listed.contains(endpoint));
        }
        self.listed = listed;
        self.epoch
    }

    /// Likewise after a change of the mode.
    fn judges(&mut self, mode: Mode) -> u64 {
        if mode != self.mode {
            self.epoch += 1;
            self.sent.clear();
        }
        self.mode = mode;
        self.epoch
    }

    /// Whether what is listed as `listed` may come in, of a flow that is `live`.
    fn lets_in(&self, is_error: bool, listed: bool, (opened, sent): (bool, bool)) -> bool {
        match self.mode {
            Mode::Conntrack => listed && opened,
            Mode::Filtered => listed && (sent || !is_error),
            Mode::Sampled | Mode::Direct => sent || !is_error,
        }
    }

    /// Sends an answer and an error for each place of the world to the guest.
    fn holds_inwards(&self, guard: &Guard, to_guest: &FrameSender) {
        for (index, endpoint) in world().iter().enumerate() {
            for (is_error, frame) in [(false, answer(index)), (true, error(index))] {
                let passed = || guard.counters().unwrap().ingress.allowed.packets;
                let before = passed();
                // A drop on the way out is told to the sender (ENOBUFS): the counters decide.
                let _ = to_guest.send(&frame);
                let listed = self.listed.contains(endpoint);
                let live = (self.opened.contains(endpoint), self.sent.contains(endpoint));
                let mut expected = u64::from(self.lets_in(is_error, listed, live));
                let came = passed() - before;
                if self.mode == Mode::Sampled && !listed {
                    // Chance decides over what is not listed.
                    expected = expected.min(came);
                }
                assert_eq!(
                    came, expected,
                    "{endpoint}, error: {is_error}, {:?}",
                    self.mode
                );
            }
        }
    }

    fn holds(&mut self, guard: &Guard, tap: &Tap, to_guest: &FrameSender) {
        self.holds_inwards(guard, to_guest);
        let status = guard.status().unwrap();
        let listed: Vec<_> = self.listed.iter().map(ToString::to_string).collect();
        assert_eq!((&status.allow, status.epoch), (&listed, self.epoch));
        assert_eq!(status.mode, self.mode.word());
        for (index, endpoint) in world().iter().enumerate() {
            let before = guard.counters().unwrap().egress;
            tap.send(&frame(index)).unwrap();
            let after = guard.counters().unwrap().egress;
            let allowed = after.allowed.packets - before.allowed.packets;
            let dropped = after.dropped_for(Reason::Endpoint).packets
                - before.dropped_for(Reason::Endpoint).packets;
            assert_eq!(allowed + dropped, 1, "{endpoint}");
            let expected = match self.mode {
                Mode::Direct => 1,
                // Chance decides over what is not listed.
                Mode::Sampled => u64::from(self.listed.contains(endpoint)).max(allowed),
                Mode::Filtered | Mode::Conntrack => u64::from(self.listed.contains(endpoint)),
            };
            assert_eq!(allowed, expected, "{endpoint}");
            if allowed == 1 {
                if self.mode == Mode::Conntrack {
                    self.opened.insert(*endpoint);
                } else {
                    // Whoever stood in its place is forgotten.
                    self.sent.retain(|other| place(other) != place(endpoint));
                    self.sent.insert(*endpoint);
                }
            }
        }
        self.holds_inwards(guard, to_guest);
        while tap.recv(Duration::ZERO).unwrap().is_some() {}
    }
}

fn run(seed: u64, tap: &Tap, to_guest: &FrameSender, owner: Option<Owner>) {
    let mut random = fastrand::Rng::with_seed(seed);
    let world = world();
    let flows = seed.is_multiple_of(3);
    let mut start = config(if flows {
        Mode::Conntrack
    } else {
        Mode::Filtered
    });
    start.owner = owner.clone();
    if seed % 4 < 2 {
        start.addresses.retain(IpAddr::is_ipv4);
        start.gateways.retain(IpAddr::is_ipv4);
    }
    start.allow = subset(&world, &mut random, 2);
    let open = || match &owner {
        Some(owner) => Guard::open_as("guest", owner).unwrap(),
        None => Guard::open("guest").unwrap(),
    };
    let mut model = Model {
        listed: start.allow.iter().copied().collect(),
        opened: BTreeSet::new(),
        sent: BTreeSet::new(),
        epoch: 1,
        mode: start.mode,
    };
    let mut guard = Guard::attach("guest", &start).unwrap();
    for step in 0..STEPS {
        match random.u32(..8) {
            0 => {
                let added = subset(&world, &mut random, 6);
                let listed = model.listed.iter().chain(&added).copied().collect();
                assert_eq!(guard.allow(&added).unwrap(), model.becomes(listed));
            }
            1 => {
                let gone = subset(&world, &mut random, 8);
                let result = guard.revoke(&gone);
                if gone.iter().all(|endpoint| model.listed.contains(endpoint)) {
                    let mut listed = model.listed.clone();
                    listed.retain(|endpoint| !gone.contains(endpoint));
                    assert_eq!(result.unwrap(), model.becomes(listed));
                } else {
                    assert_eq!(result.unwrap_err().kind(), ErrorKind::NotFound);
                }
            }
            2 => {
                let list = subset(&world, &mut random, 3);
                let listed = list.iter().copied().collect();
                assert_eq!(guard.replace(&list).unwrap(), model.becomes(listed));
            }
            // Some of those listed, so that it always succeeds.
            3 => {
                let listed: Vec<_> = model.listed.iter().copied().collect();
                let gone = subset(&listed, &mut random, 3);
                let kept = listed.into_iter().filter(|e| !gone.contains(e)).collect();
                assert_eq!(guard.revoke(&gone).unwrap(), model.becomes(kept));
            }
            // Out of the guest's reach: nothing changes.
            4 => {
                let mut list = subset(&world, &mut random, 3);
                let far = "udp:[2001:db8::1]:1".parse().unwrap();
                list.push(far);
                if start.addresses.iter().any(IpAddr::is_ipv6) {
                    let listed = list.iter().copied().collect();
                    assert_eq!(guard.replace(&list).unwrap(), model.becomes(listed));
                } else {
                    assert_eq!(guard.replace(&list).unwrap_err().kind(), ErrorKind::Refused);
                }
            }
            // Somebody is killed while replacing the list: it has happened or it has not.
            5 => {
                let list = subset(&world, &mut random, 3);
                let listed: BTreeSet<_> = list.iter().copied().collect();
                let words: Vec<_> = list.iter().map(ToString::to_string).collect();
                let mut writer = victim::begin("replace_once", &words.join(" ")).unwrap();
                std::thread::sleep(Duration::from_micros(random.u64(..40_000)));
                writer.kill().unwrap();
                writer.wait().unwrap();
                if guard.status().unwrap().epoch > model.epoch {
                    model.becomes(listed);
                }
            }
            6 => {
                let mode = Mode::ALL[random.usize(..Mode::ALL.len())];
                let result = guard.set_mode(mode);
                if mode == Mode::Conntrack && !flows {
                    assert_eq!(result.unwrap_err().kind(), ErrorKind::Refused);
                } else {
                    assert_eq!(result.unwrap(), model.judges(mode));
                }
            }
            _ => guard = open(),
        }
        if step % 5 == 0 {
            model.holds(&guard, tap, to_guest);
        }
    }
    model.holds(&guard, tap, to_guest);
    guard.detach().unwrap();
}

#[test]
#[ignore = "killed by another test"]
fn replace_once() {
    let list: Vec<Endpoint> = victim::list()
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    let owner = Guard::pinned().unwrap()[0].owner.clone();
    let guard = match owner {
        Some(owner) => Guard::open_as("guest", &owner).unwrap(),
        None => Guard::open("guest").unwrap(),
    };
    victim::has_begun();
    guard.replace(&list).unwrap();
}

#[test]
fn a_guard_agrees_with_a_set_of_endpoints() {
    let namespace = Namespace::new("ot-model").unwrap();
    namespace
        .enter(|| {
            remove_left_overs().unwrap();
            let tap = Tap::create("guest").unwrap();
            tap.up().unwrap();
            let to_guest = FrameSender::open("guest").unwrap();
            for seed in 0..RUNS {
                let owner = (seed % 2 == 0).then(|| "omertad".parse().unwrap());
                run(seed, &tap, &to_guest, owner);
            }
        })
        .unwrap();
    println!("{RUNS} runs of {STEPS} changes agree");
}
