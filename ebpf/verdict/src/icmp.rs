//! ICMP (RFC 792, RFC 4443): echo, and the errors that a guest needs to hear of.

use crate::network::{Packet, Quote};
use crate::reason::{Direction, Reason};
use crate::transport::{ICMPV6, MINIMUM_MTU, Segment, header, is_egress};
use crate::{Address, Frame, Protocol};

/// Type, code, checksum, and four bytes that each type uses in its own way.
const HEADER: u32 = 8;
/// What an error quotes of the transport header at least (RFC 792).
const QUOTED_TRANSPORT: u32 = 8;
/// RFC 8200, 5.
const MINIMUM_MTU_V6: u32 = 1280;

/// The numbers of one family's messages.
struct Numbers {
    request: u8,
    reply: u8,
}

const V4: Numbers = Numbers {
    request: 8,
    reply: 0,
};
const V6: Numbers = Numbers {
    request: 128,
    reply: 129,
};

/// The highest code of each type of error that is let in; `None` for any other type.
#[inline(always)]
const fn highest_code(v4: bool, kind: u8) -> Option<u8> {
    match (v4, kind) {
        // Destination unreachable (also "fragmentation needed"), time exceeded, bad parameter.
        (true, 3) => Some(15),
        (true, 11) => Some(1),
        (true, 12) => Some(2),
        // Destination unreachable, packet too big, time exceeded, bad parameter.
        (false, 1) => Some(8),
        (false, 2) => Some(0),
        (false, 3) => Some(1),
        (false, 4) => Some(3),
        _ => None,
    }
}

/// Echo in the direction that a guest's own questions and their answers take; inbound errors,
/// which count as of the flow that they quote.
#[inline(always)]
pub(crate) fn segment<F: Frame + ?Sized>(
    frame: &F,
    packet: &Packet,
    direction: Direction,
) -> Result<Segment, Reason> {
    let v4 = packet.v4;
    let numbers = if v4 { V4 } else { V6 };
    let message = header::<F, 8>(frame, packet)?;
    let (kind, code) = (message[0], message[1]);
    let (echo, guest, peer) = if is_egress(direction) {
        (numbers.request, packet.source, packet.destination)
    } else {
        (numbers.reply, packet.destination, packet.source)
    };
    if kind == echo && code == 0 {
        let identifier = u16::from_be_bytes([message[4], message[5]]);
        return Ok(icmp(Protocol::Icmp, guest, peer, [identifier, 0]));
    }
    match highest_code(v4, kind) {
        Some(highest) if !is_egress(direction) && code <= highest => {}
        _ => return Err(Reason::IcmpType),
    }
    // No path carries less than its family's minimum, so who reports less means harm (RFC 8201, 4).
    let reported = u32::from_be_bytes([message[4], message[5], message[6], message[7]]);
    let too_small = match (v4, kind, code) {
        (true, 3, 4) => reported & 0xffff < MINIMUM_MTU,
        (false, 2, _) => reported < MINIMUM_MTU_V6,
        _ => false,
    };
    if too_small {
        return Err(Reason::IcmpQuote);
    }
    let segment = quoted(frame, packet, v4)?;
    Ok(Segment {
        is_error: true,
        ..segment
    })
}

/// The flow that an error is about. Whoever sends the error, what it quotes must be a packet that
/// the guest could have sent; the caller asks whether the guest may send it.
#[inline(always)]
fn quoted<F: Frame + ?Sized>(frame: &F, packet: &Packet, v4: bool) -> Result<Segment, Reason> {
    let wanted = HEADER + Quote::header_length(v4) + QUOTED_TRANSPORT;
    if packet.payload_length < wanted {
        return Err(Reason::IcmpQuote);
    }
    let quote =
        Quote::read(frame, packet.payload_offset + HEADER as usize, v4).ok_or(Reason::IcmpQuote)?;
    if !quote.source.equals(packet.destination) {
        return Err(Reason::IcmpQuote);
    }
    // Routers may report from an address of their link.
    if !packet.source.is_unicast() || packet.source.stands_for_v4() {
        return Err(Reason::PeerAddress);
    }
    let t = frame.bytes::<8>(quote.transport).ok_or(Reason::IcmpQuote)?;
    let ports = [
        u16::from_be_bytes([t[0], t[1]]),
        u16::from_be_bytes([t[2], t[3]]),
    ];
    let (protocol, ports) = match quote.protocol {
        17 => (Protocol::Udp, ports),
        6 => (Protocol::Tcp, ports),
        1 if v4 && t[0] == V4.request => (Protocol::Icmp, [u16::from_be_bytes([t[4], t[5]]), 0]),
        ICMPV6 if !v4 && t[0] == V6.request => {
            (Protocol::Icmp, [u16::from_be_bytes([t[4], t[5]]), 0])
        }
        _ => return Err(Reason::IcmpQuote),
    };
    Ok(icmp(protocol, quote.source, quote.destination, ports))
}

/// A segment whose own transport header is ICMP's, whatever `protocol` its flow is of.
#[inline(always)]
fn icmp(protocol: Protocol, guest: Address, peer: Address, ports: [u16; 2]) -> Segment {
    Segment {
        protocol,
        guest,
        peer,
        guest_port: ports[0],
        peer_port: ports[1],
        checksum_field: 2,
        header_length: HEADER,
        is_error: false,
    }
}
