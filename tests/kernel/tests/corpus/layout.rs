//! A provider with two guarded taps, an uplink to the world and a network of its own, which says
//! nothing by itself.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::thread::sleep;
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use omerta_dataplane::{Guard, GuardConfig, Hook};
use omerta_kernel_tests::*;
use omerta_test_support::{Capture, FrameSender, Namespace, Tap, Veth, mac_of};
use omerta_verdict::{Direction, Flow, Mac, Mode, Outcome};

const WORLD_MAC: Mac = Mac([0x52, 0x54, 0x00, 0x00, 0x00, 0xcc]);
const NEIGHBOUR_MAC: Mac = Mac([0x52, 0x54, 0x00, 0x00, 0x00, 0x09]);
/// Longer than any frame of the corpus that is to pass.
pub const MTU: u32 = 9500;

/// How the taps are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// The host forwards by IP.
    Routed,
    /// The taps are ports of a bridge, the uplink another.
    Bridged,
}

/// Packets by direction and outcome, those that are not zero.
pub type Tally = BTreeMap<(Direction, usize), u64>;

/// The network.
pub struct Layout {
    pub link: Link,
    provider: Namespace,
    world: Namespace,
    /// The guest under judgement, and another.
    pub guest: Tap,
    pub neighbour: Tap,
    /// Every other interface: the provider's own, then the world's.
    captures: Vec<(&'static str, Capture)>,
    /// Sends on the taps' way to their guests.
    pub to_guest: FrameSender,
    pub to_neighbour: FrameSender,
    from_world: FrameSender,
    uplink_mac: Mac,
}

impl Layout {
    /// With the guest's guard in conntrack mode, which alone has room for flows.
    pub fn new(link: Link, offload: bool, hook: Hook) -> Self {
        let provider = Namespace::new("oc-prov").unwrap();
        let world = Namespace::new("oc-world").unwrap();
        provider.enter(silence).unwrap();
        world.disable_ipv6().unwrap();
        for (near, far) in [("uplink", "inet"), ("lan", "office")] {
            Veth::across((&provider, near), (&world, far)).unwrap();
            provider
                .ip(&format!("link set {near} mtu {MTU} up"))
                .unwrap();
            world.ip(&format!("link set {far} mtu {MTU} up")).unwrap();
        }
        world
            .ip(&format!("link set inet address {WORLD_MAC}"))
            .unwrap();
        let create = if offload {
            Tap::create_with_offload_header
        } else {
            Tap::create
        };
        let guest = provider.enter(|| create("guest")).unwrap().unwrap();
        let neighbour = provider.enter(|| Tap::create("other")).unwrap().unwrap();
        for tap in ["guest", "other"] {
            provider.ip(&format!("link set {tap} mtu {MTU}")).unwrap();
            if link == Link::Routed {
                provider
                    .ip(&format!("link set {tap} address {GATEWAY_MAC}"))
                    .unwrap();
            }
        }
        let guest_config = crate::guest_config(Mode::Conntrack);
        for (tap, config) in [("guest", guest_config), ("other", neighbours_config())] {
            provider
                .enter(|| Guard::attach_by(hook, tap, &config).map(drop))
                .unwrap()
                .unwrap();
        }
        for tap in [&guest, &neighbour] {
            provider.enter(|| tap.up()).unwrap().unwrap();
        }
        for step in match link {
            Link::Routed => ROUTED,
            Link::Bridged => BRIDGED,
        } {
            provider.ip(step).unwrap();
        }
        if link == Link::Bridged {
            for (mac, port) in [(GATEWAY_MAC, "uplink"), (GUEST_MAC, "guest")] {
                let fdb = format!("fdb add {mac} dev {port} master static");
                let output = provider
                    .command("bridge")
                    .args(fdb.split(' '))
                    .output()
                    .unwrap();
                assert!(output.status.success(), "{output:?}");
            }
        }
        let open = |namespace: &Namespace, name| {
            (
                name,
                namespace
                    .enter(move || Capture::open(name))
                    .unwrap()
                    .unwrap(),
            )
        };
        let mut captures = vec![open(&provider, "uplink"), open(&provider, "lan")];
        captures.extend([open(&world, "inet"), open(&world, "office")]);
        let sender = |namespace: &Namespace, name| {
            namespace
                .enter(move || FrameSender::open(name))
                .unwrap()
                .unwrap()
        };
        let layout = Self {
            link,
            to_guest: sender(&provider, "guest"),
            to_neighbour: sender(&provider, "other"),
            from_world: sender(&world, "inet"),
            uplink_mac: Mac(provider.enter(|| mac_of("uplink")).unwrap().unwrap()),
            provider,
            world,
            guest,
            neighbour,
            captures,
        };
        layout.assert_silent();
        layout
    }

    /// A host that speaks by itself would be counted as the case's doing.
    fn assert_silent(&self) {
        sleep(Duration::from_millis(50));
        assert_eq!(self.strays(), [""; 0]);
        assert_eq!(
            (self.tally("guest"), self.tally("other")),
            Default::default()
        );
    }

    /// Sends what the guest's guard allows past the stack from now on.
    pub fn redirect(&self) {
        let redirect = || Guard::open("guest").and_then(|guard| guard.redirect(&[]));
        self.provider.enter(redirect).unwrap().unwrap();
    }

    /// How many frames have passed the stack by, and how many were not proven to be allowed.
    pub fn redirected(&self) -> (u64, u64) {
        let status = || Guard::open("guest").and_then(|guard| guard.status());
        let status = self.provider.enter(status).unwrap().unwrap();
        let redirect = status.redirect.unwrap();
        assert!(redirect.in_force);
        (redirect.to_neighbours, redirect.unproven)
    }

    /// Judges the guest by `mode` from now on. (Loading programs for each takes an emulated machine
    /// minutes.)
    pub fn set_mode(&self, mode: Mode) {
        let set = || Guard::open("guest").and_then(|guard| guard.set_mode(mode));
        self.provider.enter(set).unwrap().unwrap();
    }

    /// Forgets the guest's flows, as if it had sent nothing in `mode`, which is the guard's.
    pub fn forget(&self, mode: Mode) {
        // Outside of conntrack mode each change of the policy does.
        for mode in [Mode::Conntrack, mode] {
            self.set_mode(mode);
        }
        type Key = [u8; size_of::<Flow>()];
        let inode = self.provider.inode().unwrap();
        let pin = format!("/sys/fs/bpf/omerta/{inode}/guest/FLOWS");
        let flows = Map::HashMap(MapData::from_pin(pin).unwrap());
        let mut flows: HashMap<_, Key, u64> = flows.try_into().unwrap();
        let open: Vec<Key> = flows.keys().map(Result::unwrap).collect();
        for flow in open {
            flows.remove(&flow).unwrap();
        }
    }

    /// What the guard of `tap` has counted.
    pub fn tally(&self, tap: &'static str) -> Tally {
        let counters = self
            .provider
            .enter(|| Guard::open(tap).and_then(|guard| guard.counters()))
            .unwrap()
            .unwrap();
        let mut tally = Tally::new();
        for (direction, counted) in [
            (Direction::Egress, counters.egress),
            (Direction::Ingress, counters.ingress),
        ] {
            let dropped = counted
                .dropped
                .iter()
                .map(|(r, c)| (Outcome::Dropped(*r), c.packets));
            let passed = [
                (Outcome::Allowed, counted.allowed.packets),
                (Outcome::Answered, counted.answered.packets),
            ];
            for (outcome, packets) in passed.into_iter().chain(dropped) {
                if packets > 0 {
                    tally.insert((direction, outcome.index()), packets);
                }
            }
        }
        tally
    }

    /// Everything that was seen outside of the taps since the last call: interface and bytes.
    pub fn seen(&self) -> Vec<(&'static str, Vec<u8>)> {
        let mut seen = Vec::new();
        for (name, capture) in &self.captures {
            assert_eq!(
                capture.lost().unwrap(),
                0,
                "the capture on {name} lost frames"
            );
            seen.extend(
                capture
                    .frames()
                    .unwrap()
                    .into_iter()
                    .map(|frame| (*name, frame.bytes)),
            );
        }
        seen
    }

    /// What was seen though nobody asked for it.
    pub fn strays(&self) -> Vec<String> {
        sleep(Duration::from_millis(20));
        let mut strays: Vec<_> = self
            .seen()
            .iter()
            .map(|(name, bytes)| format!("{name}: {bytes:02x?}"))
            .collect();
        for (name, tap) in [("guest", &self.guest), ("other", &self.neighbour)] {
            while let Some(bytes) = tap.recv(Duration::ZERO).unwrap() {
                strays.push(format!("{name}: {bytes:02x?}"));
            }
        }
        strays
    }

    /// Sends a frame from the world, by way of the uplink.
    pub fn send_from_world(&self, frame: &[u8]) {
        let mut frame = frame.to_vec();
        if self.link == Link::Routed {
            frame[..6].copy_from_slice(&self.uplink_mac.0);
            frame[6..12].copy_from_slice(&WORLD_MAC.0);
        }
        self.from_world.send(&frame).unwrap();
    }

    /// Sends with a VLAN tag beside the bytes: the kernel takes it off at the uplink, and the
    /// bridge forwards the frame with it.
    pub fn send_tagged(&self, vlan: u16, frame: &[u8]) {
        let [high, low] = vlan.to_be_bytes();
        let tagged = [&frame[..12], &[0x81, 0x00, high, low], &frame[12..]].concat();
        self.from_world.send(&tagged).unwrap();
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        for tap in ["guest", "other"] {
            // Pins outlive the namespace; a test that failed has more to say than this.
            let detach = || Guard::open(tap).and_then(Guard::detach);
            let _ = self.provider.enter(detach);
        }
        let _ = &self.world;
    }
}

fn neighbours_config() -> GuardConfig {
    GuardConfig {
        mac: NEIGHBOUR_MAC,
        addresses: ["10.77.0.9", "2001:db8:0:1::9"]
            .map(|a| a.parse::<IpAddr>().unwrap())
            .into(),
        ..config(Mode::Filtered)
    }
}

/// Has the namespace forward both families and say nothing of its own: interfaces to come have no
/// link-local address, send no reports and are no routers, so they join no groups to report.
fn silence() {
    for (name, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
        ("ipv4/conf/all/send_redirects", "0"),
        ("ipv4/conf/default/send_redirects", "0"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv6/conf/default/forwarding", "0"),
        ("ipv6/conf/default/addr_gen_mode", "1"),
        ("ipv6/conf/default/router_solicitations", "0"),
        ("ipv6/conf/default/accept_ra", "0"),
        ("ipv6/conf/default/accept_dad", "0"),
    ] {
        fs::write(format!("/proc/sys/net/{name}"), value)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

const ROUTED: &[&str] = &[
    "link set lo up",
    "addr add 10.77.0.1/32 dev guest",
    "-6 addr add 2001:db8:0:1::1/128 dev lo",
    "route add 10.77.0.2/32 dev guest",
    "route add 10.77.0.3/32 dev guest",
    "route add 10.77.0.15/32 dev guest",
    "route add 10.77.0.9/32 dev other",
    "addr add 203.0.113.1/24 dev uplink",
    "addr add 192.168.1.1/24 dev lan",
    "route add default via 203.0.113.9",
    "-6 route add 2001:db8:0:1::2/128 dev guest",
    "-6 route add 2001:db8:0:1::9/128 dev other",
    "-6 route add 2001:db8:0:2::10/128 dev uplink",
    "-6 route add 2001:db8:0:3::1/128 dev uplink",
    "neigh replace 203.0.113.9 lladdr 52:54:00:00:00:cc dev uplink nud permanent",
    "neigh replace 10.77.0.2 lladdr 52:54:00:00:00:01 dev guest nud permanent",
    "neigh replace 10.77.0.15 lladdr 52:54:00:00:00:01 dev guest nud permanent",
    "neigh replace 10.77.0.3 lladdr 52:54:00:00:00:01 dev guest nud permanent",
    "neigh replace 10.77.0.9 lladdr 52:54:00:00:00:09 dev other nud permanent",
    "-6 neigh replace 2001:db8:0:1::2 lladdr 52:54:00:00:00:01 dev guest nud permanent",
    "-6 neigh replace 2001:db8:0:1::9 lladdr 52:54:00:00:00:09 dev other nud permanent",
    "-6 neigh replace 2001:db8:0:2::10 lladdr 52:54:00:00:00:cc dev uplink nud permanent",
    "-6 neigh replace 2001:db8:0:3::1 lladdr 52:54:00:00:00:cc dev uplink nud permanent",
];

const BRIDGED: &[&str] = &[
    "link add bridge mtu 9500 type bridge stp_state 0 mcast_snooping 0 forward_delay 0",
    "link set uplink master bridge",
    "link set lan master bridge",
    "link set guest master bridge",
    "link set other master bridge",
    "link set bridge up",
];
