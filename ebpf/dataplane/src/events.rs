//! Dropped frames, as the programs report them.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use aya::maps::{Map, MapData, MapError, RingBuf};
use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};
use omerta_verdict::{Direction, EventRecord, Reason};

use crate::GuardError;
use crate::pins::Pins;
use crate::store::map_error;
use crate::upgrade::require_accounts;

/// A dropped frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameEvent {
    /// Time of the verdict: nanoseconds of `CLOCK_MONOTONIC`.
    pub at_ns: u64,
    /// The interface's index.
    pub ifindex: u32,
    /// Which way the frame travelled.
    pub direction: Direction,
    /// Why it was dropped.
    pub reason: Reason,
    /// Length of the whole frame in bytes.
    pub length: u32,
    /// Its first bytes, at most 96.
    pub head: Vec<u8>,
}

impl FrameEvent {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (record, direction, reason) = EventRecord::parse(bytes)?;
        Some(Self {
            at_ns: record.at_ns,
            ifindex: record.ifindex,
            direction,
            reason,
            length: record.length,
            head: record.head().to_vec(),
        })
    }

    /// Where a UDP datagram was to go, as far as its head tells.
    pub fn udp_destination(&self) -> Option<std::net::SocketAddr> {
        let packet = LaxSlicedPacket::from_ethernet(&self.head).ok()?;
        let address = match &packet.net {
            Some(LaxNetSlice::Ipv4(v4)) => v4.header().destination_addr().into(),
            Some(LaxNetSlice::Ipv6(v6)) => std::net::IpAddr::from(v6.header().destination_addr()),
            _ => return None,
        };
        match &packet.transport {
            Some(TransportSlice::Udp(udp)) => Some((address, udp.destination_port()).into()),
            _ => None,
        }
    }

    /// The frame in one line of plain text, as far as its head tells.
    pub fn describe(&self) -> String {
        describe(&self.head)
    }

    /// Whom the frame was for, as far as its head tells: the IP protocol's number (none for ARP, which
    /// asks for an address), the address, and the port where there is one.
    pub fn target(&self) -> Option<(Option<u8>, IpAddr, Option<u16>)> {
        let packet = LaxSlicedPacket::from_ethernet(&self.head).ok()?;
        let port = match &packet.transport {
            Some(TransportSlice::Udp(udp)) => Some(udp.destination_port()),
            Some(TransportSlice::Tcp(tcp)) => Some(tcp.destination_port()),
            _ => None,
        };
        match &packet.net {
            Some(LaxNetSlice::Ipv4(v4)) => {
                let header = v4.header();
                let address = header.destination_addr().into();
                Some((Some(header.protocol().0), address, port))
            }
            Some(LaxNetSlice::Ipv6(v6)) => {
                let header = v6.header();
                let address = header.destination_addr().into();
                Some((Some(header.next_header().0), address, port))
            }
            _ => {
                let kind = self.head.get(12..14)?;
                let asked: [u8; 4] = *self.head.get(38..)?.first_chunk()?;
                (kind == [0x08, 0x06]).then(|| (None, IpAddr::from(asked), None))
            }
        }
    }
}

/// Reads the events of one guard. Readiness of its descriptor says that there may be some.
pub struct EventStream {
    ring: RingBuf<MapData>,
}

impl EventStream {
    pub(crate) fn open(interface: &str, pins: &Pins) -> Result<Self, GuardError> {
        require_accounts(interface, pins)?;
        MapData::from_pin(pins.path("EVENTS"))
            .and_then(|data| Self::of(Map::RingBuf(data)))
            .map_err(|source| map_error(interface, "open", "EVENTS", source))
    }

    pub(crate) fn of(map: Map) -> Result<Self, MapError> {
        Ok(Self {
            ring: map.try_into()?,
        })
    }

    /// The next event, or `None` where there is none yet.
    #[expect(clippy::should_implement_trait, reason = "`None` is not the end")]
    pub fn next(&mut self) -> Option<FrameEvent> {
        // Records come from the programs alone; one that does not parse is of another version.
        while let Some(item) = self.ring.next() {
            if let Some(event) = FrameEvent::parse(&item) {
                return Some(event);
            }
        }
        None
    }
}

impl AsFd for EventStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl AsRawFd for EventStream {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

/// An Ethernet frame in one line of plain text, as far as its first bytes tell.
pub fn describe(frame: &[u8]) -> String {
    let Ok(packet) = LaxSlicedPacket::from_ethernet(frame) else {
        return format!("{} bytes, no Ethernet header", frame.len());
    };
    let ports = match &packet.transport {
        Some(TransportSlice::Udp(udp)) => Some(("udp", udp.source_port(), udp.destination_port())),
        Some(TransportSlice::Tcp(tcp)) => Some(("tcp", tcp.source_port(), tcp.destination_port())),
        _ => None,
    };
    let (source, destination, protocol) = match &packet.net {
        Some(LaxNetSlice::Ipv4(v4)) => {
            let header = v4.header();
            let fragment = if header.is_fragmenting_payload() {
                " fragment"
            } else {
                ""
            };
            (
                std::net::IpAddr::from(header.source_addr()),
                std::net::IpAddr::from(header.destination_addr()),
                format!("{}{fragment}", protocol_word(header.protocol().0)),
            )
        }
        Some(LaxNetSlice::Ipv6(v6)) => {
            let header = v6.header();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
                protocol_word(header.next_header().0),
            )
        }
        _ => return describe_link(frame),
    };
    let mut line = String::new();
    let written = match ports {
        Some((word, from, to)) => {
            let (from, to) = (
                std::net::SocketAddr::new(source, from),
                std::net::SocketAddr::new(destination, to),
            );
            write!(line, "{word} {from} → {to}")
        }
        None => write!(line, "{protocol} {source} → {destination}"),
    };
    debug_assert!(written.is_ok());
    line
}

fn protocol_word(number: u8) -> String {
    match number {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "icmpv6".to_owned(),
        other => format!("protocol {other}"),
    }
}

fn describe_link(frame: &[u8]) -> String {
    let mac = |at: usize| -> String {
        frame.get(at..at + 6).map_or_else(String::new, |bytes| {
            bytes
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<Vec<_>>()
                .join(":")
        })
    };
    let kind = frame
        .get(12..14)
        .map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
    let kind = match (kind, frame.get(38..42)) {
        (0x0806, Some(target)) => {
            format!(
                "arp for {}.{}.{}.{}",
                target[0], target[1], target[2], target[3]
            )
        }
        _ => format!("ethertype 0x{kind:04x}"),
    };
    format!("{kind}, {} → {}", mac(6), mac(0))
}
