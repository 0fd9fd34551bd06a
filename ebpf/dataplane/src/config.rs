//! What a guard is asked to be, and whether it can be.

use std::net::IpAddr;
use std::num::NonZero;
use std::time::Duration;

use omerta_verdict::{Address, Direction, Endpoint, MAX_ADDRESSES, Mac, Meter, Mode, Policy, Rate};
use serde::Serialize;

use crate::{GuardError, Owner, interface};

/// One frame in this many is judged against the allowlist in sampled mode.
const SAMPLE_EVERY: u32 = 16;

/// Events of one guard in a second, and at once, of each kind: held against the guest or not. What
/// exceeds them is counted, not told.
const EVENTS: Rate = Rate::per_second(1000, 250);
/// Duplicate-address probes in a second, and at once: a guest probes each of its addresses when its
/// interface comes up.
const PROBES: Rate = Rate::per_second(1, 16);
/// Bursts last this part of a second, and hold at least the frames below.
const BURST_PARTS: u64 = 8;
/// As many as the longest frame is cut into: 128 datagrams (`UDP_MAX_SEGMENTS`), 122 segments of the smallest usual size.
const BURST_FRAMES: u64 = 128;
/// What the longest frame may hold: 64 KiB that the host is to cut, and headers.
const LONGEST_FRAME: u64 = 65_549;

/// How much may travel in one direction; `None` is without limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Frames a second. What the host is to cut counts as what it becomes.
    pub packets_per_second: Option<NonZero<u64>>,
    /// Bits a second, of whole frames with their Ethernet headers. What the host is to cut counts as what it becomes.
    pub bits_per_second: Option<NonZero<u64>>,
}

impl Limits {
    /// Limits `direction` in `policy`.
    pub(crate) fn put(self, direction: Direction, policy: &mut Policy) {
        let number = |limit: Option<NonZero<u64>>| limit.map_or(0, NonZero::get);
        let packets = number(self.packets_per_second);
        let bits = number(self.bits_per_second);
        let bytes = bits.div_ceil(8);
        policy.limits[direction as usize] = [packets, bits];
        let [of_packets, of_bytes] = match direction {
            Direction::Egress => [Meter::EgressPackets, Meter::EgressBytes],
            Direction::Ingress => [Meter::IngressPackets, Meter::IngressBytes],
        };
        policy.rates[of_packets as usize] =
            Rate::per_second(packets, (packets / BURST_PARTS).max(BURST_FRAMES));
        policy.rates[of_bytes as usize] =
            Rate::per_second(bytes, (bytes / BURST_PARTS).max(2 * LONGEST_FRAME));
    }

    /// The limits of `direction` in `policy`.
    pub(crate) fn of(direction: Direction, policy: &Policy) -> Self {
        let [packets, bits] = policy.limits[direction as usize];
        Self {
            packets_per_second: NonZero::new(packets),
            bits_per_second: NonZero::new(bits),
        }
    }
}

/// Whose interface it is and whom its guest may reach.
#[derive(Clone, Debug)]
pub struct GuardConfig {
    /// The guest's MAC.
    pub mac: Mac,
    /// The guest's addresses: one to eight.
    pub addresses: Vec<IpAddr>,
    /// At most one gateway for each family.
    pub gateways: Vec<IpAddr>,
    /// Where the guest's IP frames must go; `None` for the interface's own MAC.
    pub gateway_mac: Option<Mac>,
    /// How frames are judged.
    pub mode: Mode,
    /// The allowlist.
    pub allow: Vec<Endpoint>,
    /// What the guest may send.
    pub egress: Limits,
    /// What the guest may be sent.
    pub ingress: Limits,
    /// How long the guard lets anything pass unless the lease is renewed; `None` is for ever.
    pub lease: Option<Duration>,
    /// Who alone may change and remove the guard; `None` for everybody.
    pub owner: Option<Owner>,
}

impl GuardConfig {
    /// The policy of a guard of `interface`, checked; its epoch and allowlist are still to come.
    pub fn policy(&self, interface: &str) -> Result<Policy, GuardError> {
        let refuse = |problem: String| Err(GuardError::Config { problem });
        if !self.mac.is_unicast() {
            return refuse(format!(
                "{} is not a unicast MAC: a guest's MAC must be",
                self.mac
            ));
        }
        let gateway_mac = match self.gateway_mac {
            Some(mac) => mac,
            None => interface::mac(interface)?,
        };
        if !gateway_mac.is_unicast() || gateway_mac == self.mac {
            return refuse(format!(
                "{gateway_mac} cannot be the gateway's MAC: give a unicast MAC other than the guest's"
            ));
        }
        let count = self.addresses.len();
        if count == 0 || count > MAX_ADDRESSES {
            return refuse(format!(
                "a guest owns 1 to {MAX_ADDRESSES} addresses, not {count}"
            ));
        }
        let mut policy = Policy {
            mode: self.mode as u32,
            sample_every: SAMPLE_EVERY,
            mac: self.mac,
            gateway_mac,
            ..Policy::EMPTY
        };
        policy.rates[Meter::Probes as usize] = PROBES;
        policy.rates[Meter::Events as usize] = EVENTS;
        policy.rates[Meter::Violations as usize] = EVENTS;
        self.egress.put(Direction::Egress, &mut policy);
        self.ingress.put(Direction::Ingress, &mut policy);
        for (index, address) in self.addresses.iter().enumerate() {
            let owned = Address::from(*address);
            let mapped = matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
            if mapped || !owned.is_unicast() {
                return refuse(format!(
                    "{address} cannot be a guest's address: give a unicast address"
                ));
            }
            if policy.addresses.contains(&owned) {
                return refuse(format!("the address {address} is given twice"));
            }
            policy.addresses[index] = owned;
        }
        for gateway in &self.gateways {
            let place = usize::from(gateway.is_ipv6());
            let address = Address::from(*gateway);
            let mapped = matches!(gateway, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
            if mapped || !address.is_unicast() || policy.owns(address) {
                return refuse(format!(
                    "{gateway} cannot be a gateway: give a unicast address that is not the guest's"
                ));
            }
            if !policy.gateways[place].is_unspecified() {
                return refuse(format!(
                    "a second gateway of one family: {gateway}; give one for each family"
                ));
            }
            policy.gateways[place] = address;
        }
        Ok(policy)
    }
}
