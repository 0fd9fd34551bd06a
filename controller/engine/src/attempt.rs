//! What a guest tried, inferred from the frames that its guard dropped. A name for people: what is done
//! never depends on it.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::net::IpAddr;

use omerta_verdict::Reason;

use crate::{Monotonic, RogueFrame};

/// How far back frames are taken together.
const WINDOW: u64 = 10 * Monotonic::SECOND;
/// As many frames are looked at.
const LOOKED_AT: usize = 128;
/// So many addresses, or ports of one address, are a scan.
const SCAN: usize = 5;
/// An echo with more than what `ping` sends, and so many at all, carry something.
const ECHO_BYTES: u32 = 14 + 20 + 8 + 56;
const ECHOES: usize = 10;

/// Whom a dropped frame was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// The IP protocol's number; `None` for ARP.
    pub protocol: Option<u8>,
    /// The address that it was for, or asked for.
    pub address: IpAddr,
    /// The port, where the protocol has some.
    pub port: Option<u16>,
}

/// What a guest tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Attempt {
    /// To be somebody else.
    Spoof,
    /// To ask a cloud's metadata service.
    Metadata,
    /// To find hosts or ports.
    Scan,
    /// To resolve names.
    Dns,
    /// To reach another guest, or the host's end of one's own link.
    OtherGuest,
    /// To send something out in echoes.
    IcmpExfiltration,
    /// To send something out in lengths or room that the headers do not account for.
    LengthExfiltration,
    /// To reach something on the provider's networks.
    LanProbe,
    /// To get a frame of a kind past that no guest needs.
    Crafted,
    /// To reach somebody who is not its consumer.
    Stranger,
}

impl Attempt {
    /// Every attempt.
    pub const ALL: [Self; 10] = [
        Self::Spoof,
        Self::Metadata,
        Self::Scan,
        Self::Dns,
        Self::OtherGuest,
        Self::IcmpExfiltration,
        Self::LengthExfiltration,
        Self::LanProbe,
        Self::Crafted,
        Self::Stranger,
    ];

    /// The word used in JSON and text.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Spoof => "spoof",
            Self::Metadata => "metadata",
            Self::Scan => "scan",
            Self::Dns => "dns",
            Self::OtherGuest => "other_guest",
            Self::IcmpExfiltration => "icmp_exfiltration",
            Self::LengthExfiltration => "length_exfiltration",
            Self::LanProbe => "lan_probe",
            Self::Crafted => "crafted",
            Self::Stranger => "stranger",
        }
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// An attempt, and what it was inferred from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inference {
    /// What was tried.
    pub attempt: Attempt,
    /// What says so.
    pub from: String,
}

/// The network that guests' addresses are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestNetwork {
    /// Its address.
    pub address: std::net::Ipv4Addr,
    /// How many bits of it.
    pub prefix: u8,
}

impl GuestNetwork {
    fn contains(self, address: IpAddr) -> bool {
        let IpAddr::V4(address) = address else {
            return false;
        };
        let shift = 32_u32.saturating_sub(self.prefix.into());
        let bits = |address: std::net::Ipv4Addr| u32::from(address).checked_shr(shift);
        bits(address).unwrap_or(0) == bits(self.address).unwrap_or(0)
    }
}

/// The last frames of one guest.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attempts {
    seen: VecDeque<(Monotonic, Target)>,
}

impl Attempts {
    /// What `frame` and those before it say.
    pub(crate) fn infer(&mut self, frame: &RogueFrame, network: Option<GuestNetwork>) -> Inference {
        while self
            .seen
            .front()
            .is_some_and(|(at, _)| frame.at.is_after(*at, WINDOW))
        {
            self.seen.pop_front();
        }
        if let Some(target) = frame.target {
            if self.seen.len() == LOOKED_AT {
                self.seen.pop_front();
            }
            self.seen.push_back((frame.at, target));
        }
        let reason = frame.reason;
        let of = |attempt, from: String| Inference { attempt, from };
        match reason {
            Reason::SourceMac | Reason::SourceAddress | Reason::ArpSender => {
                return of(Attempt::Spoof, format!("its frame was dropped as {reason}"));
            }
            Reason::Overlength | Reason::IpLength => {
                return of(
                    Attempt::LengthExfiltration,
                    format!("a frame of {} bytes was dropped as {reason}", frame.length),
                );
            }
            Reason::Endpoint
            | Reason::PeerAddress
            | Reason::ArpTarget
            | Reason::DestinationAddress
            | Reason::DestinationMac
            | Reason::Neighbour
            | Reason::IcmpType
            | Reason::Protocol => {}
            _ => {
                return of(
                    Attempt::Crafted,
                    format!("its frame was dropped as {reason}"),
                );
            }
        }
        let Some(target) = frame.target else {
            return of(
                Attempt::Crafted,
                format!("its frame was dropped as {reason}"),
            );
        };
        let (address, port) = (target.address, target.port.unwrap_or(0));
        if is_metadata(address) {
            return of(Attempt::Metadata, format!("it asked {address}"));
        }
        if let Some(from) = self.scan(target) {
            return of(Attempt::Scan, from);
        }
        if matches!(port, 53 | 853 | 5353) {
            return of(Attempt::Dns, format!("port {port} of {address}"));
        }
        if network.is_some_and(|network| network.contains(address)) {
            return of(
                Attempt::OtherGuest,
                format!("{address} is of the guests' network"),
            );
        }
        if let Some(from) = self.echoes(target, frame.length) {
            return of(Attempt::IcmpExfiltration, from);
        }
        if target.protocol.is_none() || is_local(address) {
            return of(Attempt::LanProbe, format!("{address} is a local address"));
        }
        of(
            Attempt::Stranger,
            format!("{address} is not its consumer's"),
        )
    }

    /// What shows that hosts or ports are looked for.
    fn scan(&self, target: Target) -> Option<String> {
        let targets = || self.seen.iter().map(|(_, target)| *target);
        let addresses: BTreeSet<IpAddr> = targets().map(|seen| seen.address).collect();
        if addresses.len() >= SCAN {
            return Some(format!("{} addresses in 10 s", addresses.len()));
        }
        let ports: BTreeSet<_> = targets()
            .filter(|seen| seen.address == target.address)
            .filter_map(|seen| Some((seen.protocol, seen.port?)))
            .collect();
        (ports.len() >= SCAN)
            .then(|| format!("{} ports of {} in 10 s", ports.len(), target.address))
    }

    /// What shows that echoes carry something.
    fn echoes(&self, target: Target, length: u32) -> Option<String> {
        let is_echo = |target: Target| matches!(target.protocol, Some(1 | 58));
        if !is_echo(target) {
            return None;
        }
        if length > ECHO_BYTES {
            return Some(format!("an ICMP message of {length} bytes"));
        }
        let count = self.seen.iter().filter(|(_, seen)| is_echo(*seen)).count();
        (count >= ECHOES).then(|| format!("{count} ICMP messages in 10 s"))
    }
}

fn is_metadata(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            // Most clouds; Alibaba; Azure's wire server.
            matches!(
                address.octets(),
                [169, 254, 169, 254] | [100, 100, 100, 200] | [168, 63, 129, 16]
            )
        }
        IpAddr::V6(address) => address.segments() == [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254],
    }
}

fn is_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            address.is_private()
                || address.is_link_local()
                || address.is_loopback()
                || address.is_multicast()
                || address.is_broadcast()
        }
        IpAddr::V6(address) => {
            address.is_unique_local()
                || address.is_unicast_link_local()
                || address.is_loopback()
                || address.is_multicast()
        }
    }
}

#[cfg(test)]
mod tests {
    use omerta_verdict::Direction;
    use proptest::prelude::*;

    use super::*;

    const NETWORK: GuestNetwork = GuestNetwork {
        address: std::net::Ipv4Addr::new(10, 77, 0, 0),
        prefix: 16,
    };

    fn frame(reason: Reason, target: Option<Target>) -> RogueFrame {
        RogueFrame {
            at: Monotonic(1),
            direction: Direction::Egress,
            reason,
            length: 98,
            description: "frame".into(),
            target,
        }
    }

    fn target(protocol: u8, address: &str, port: u16) -> Option<Target> {
        Some(Target {
            protocol: Some(protocol),
            address: address.parse().unwrap(),
            port: (port > 0).then_some(port),
        })
    }

    fn first(frame: &RogueFrame) -> Attempt {
        Attempts::default().infer(frame, Some(NETWORK)).attempt
    }

    #[test]
    fn one_frame_names_what_was_tried() {
        let asked = |address: &str| {
            let address = address.parse().unwrap();
            Some(Target {
                protocol: None,
                address,
                port: None,
            })
        };
        for (reason, target, attempt) in [
            (Reason::SourceMac, None, Attempt::Spoof),
            (
                Reason::SourceAddress,
                target(17, "192.0.2.10", 51820),
                Attempt::Spoof,
            ),
            (Reason::ArpSender, asked("10.77.0.1"), Attempt::Spoof),
            (
                Reason::Endpoint,
                target(6, "169.254.169.254", 80),
                Attempt::Metadata,
            ),
            (
                Reason::Endpoint,
                target(17, "198.51.100.1", 53),
                Attempt::Dns,
            ),
            (
                Reason::Endpoint,
                target(6, "10.77.3.2", 22),
                Attempt::OtherGuest,
            ),
            (Reason::ArpTarget, asked("10.77.0.9"), Attempt::OtherGuest),
            (Reason::ArpTarget, asked("192.168.1.1"), Attempt::LanProbe),
            (
                Reason::Endpoint,
                target(6, "192.168.1.1", 22),
                Attempt::LanProbe,
            ),
            (
                Reason::Endpoint,
                target(6, "198.51.100.1", 443),
                Attempt::Stranger,
            ),
            (
                Reason::Endpoint,
                target(1, "198.51.100.1", 0),
                Attempt::Stranger,
            ),
            (Reason::Overlength, None, Attempt::LengthExfiltration),
            (Reason::IpLength, None, Attempt::LengthExfiltration),
            (
                Reason::Fragment,
                target(17, "192.0.2.10", 0),
                Attempt::Crafted,
            ),
            (Reason::Vlan, None, Attempt::Crafted),
            (Reason::Endpoint, None, Attempt::Crafted),
        ] {
            assert_eq!(
                first(&frame(reason, target)),
                attempt,
                "{reason} {target:?}"
            );
        }
    }

    #[test]
    fn five_addresses_or_ports_are_a_scan_and_one_asked_for_again_is_none() {
        for step in [0, 1] {
            let mut attempts = Attempts::default();
            let mut last = Attempt::Crafted;
            for number in 0..5_u16 {
                let address = format!("192.168.1.{}", 1 + step * number);
                let port = 20 + (1 - step) * number;
                let seen = frame(Reason::Endpoint, target(6, &address, port));
                last = attempts.infer(&seen, None).attempt;
                assert_eq!(last == Attempt::Scan, number == 4, "{number}");
            }
            assert_eq!(last, Attempt::Scan);
        }
        let mut attempts = Attempts::default();
        for _ in 0..100 {
            let seen = frame(Reason::ArpTarget, target(6, "192.168.1.1", 0));
            assert_eq!(attempts.infer(&seen, None).attempt, Attempt::LanProbe);
        }
    }

    #[test]
    fn echoes_that_are_long_or_many_carry_something() {
        let mut long = frame(Reason::Endpoint, target(1, "198.51.100.1", 0));
        long.length = 1000;
        assert_eq!(first(&long), Attempt::IcmpExfiltration);
        let mut attempts = Attempts::default();
        let short = frame(Reason::Endpoint, target(1, "198.51.100.1", 0));
        let last = (0..ECHOES)
            .map(|_| attempts.infer(&short, None).attempt)
            .last();
        assert_eq!(last, Some(Attempt::IcmpExfiltration));
    }

    #[test]
    fn what_lies_long_apart_is_no_scan() {
        let mut attempts = Attempts::default();
        for number in 0..20_u64 {
            let mut seen = frame(
                Reason::Endpoint,
                target(6, &format!("192.168.1.{number}"), 22),
            );
            seen.at = Monotonic(number * WINDOW / 3);
            assert_eq!(
                attempts.infer(&seen, None).attempt,
                Attempt::LanProbe,
                "{number}"
            );
        }
    }

    proptest! {
        #[test]
        fn every_frame_has_a_name_and_what_is_remembered_is_bounded(
            frames in prop::collection::vec(
                (any::<u64>(), 0..Reason::ALL.len(), any::<Option<(u8, u32, Option<u16>)>>(), any::<u32>()),
                0..300,
            ),
            prefix in 0..=32_u8,
        ) {
            let mut attempts = Attempts::default();
            for (at, reason, target, length) in frames {
                let mut seen = frame(Reason::ALL[reason], target.map(|(protocol, address, port)| Target {
                    protocol: Some(protocol),
                    address: std::net::Ipv4Addr::from(address).into(),
                    port,
                }));
                (seen.at, seen.length) = (Monotonic(at), length);
                let network = GuestNetwork { prefix, ..NETWORK };
                let inference = attempts.infer(&seen, Some(network));
                prop_assert!(!inference.from.is_empty() && inference.from.len() < 200);
                prop_assert!(attempts.seen.len() <= LOOKED_AT);
            }
        }
    }
}
