//! Neighbour discovery (RFC 4861): the guest solicits the gateway, its network the guest, and the guard
//! answers both.

use crate::answer::{Answer, GATEWAYS_FLAGS, Kind, TARGET_LINK_OPTION, tolerated};
use crate::decide::{Ethernet, Verdict};
use crate::network::{ETHERNET_HEADER, IPV6_HEADER, Packet};
use crate::reason::Reason;
use crate::transport::ICMPV6;
use crate::{Address, Frame, Guard, Mac, Policy};

pub(crate) const ROUTER_SOLICITATION: u8 = 133;
pub(crate) const SOLICITATION: u8 = 135;
pub(crate) const ADVERTISEMENT: u8 = 136;
/// Type, code, checksum, flags, target.
const DISCOVERY_LENGTH: u32 = 24;
/// Options are multiples of this; their own length field counts in this unit.
const OPTION_LENGTH: u32 = 8;
/// How long a solicitation's options may be together, in that unit.
const MAX_OPTIONS: u32 = 4;
/// The types of the two options that say whose MAC is whose.
const SOURCE_LINK: u8 = 1;
const TARGET_LINK: u8 = 2;
/// Type and length.
const SOURCE_LINK_OPTION: u64 = 0x0101;
const ALL_NODES: Address = Address::from_words(0xff02 << 48, 1);

/// The type of a discovery message (133 to 137, which only routers and neighbours may speak), or 0.
#[inline(always)]
pub(crate) fn kind<F: Frame + ?Sized>(frame: &F, packet: &Packet) -> u8 {
    if packet.v4 || packet.protocol != ICMPV6 {
        return 0;
    }
    match frame.bytes::<1>(packet.payload_offset) {
        Some([kind]) if matches!(kind, 133..=137) => *kind,
        _ => 0,
    }
}

/// Discovery from the guest: a solicitation of the gateway, from an address of the guest's or of its
/// link, and nothing else. Where it asks without
/// an address whether its own, or one of the link alone, is taken (RFC 4862, 5.4), nobody has it,
/// and silence says so.
#[inline(always)]
pub(crate) fn for_gateway<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
    policy: &Policy,
    ethernet: &Ethernet,
    packet: &Packet,
    kind: u8,
) -> Result<Answer, Reason> {
    if kind != SOLICITATION {
        return Err(Reason::Neighbour);
    }
    let probe = packet.source.is_unspecified();
    let target = solicited(frame, packet, if probe { None } else { Some(policy.mac) })?;
    let gateway = policy.is_gateway(target);
    let own = guard.owns(policy, target) || (guard.class(target).is_link_local() && !gateway);
    if !(if probe { own } else { gateway }) {
        return Err(Reason::Neighbour);
    }
    is_sent_to(ethernet, packet, policy.gateway_mac)?;
    if probe {
        return Err(tolerated(guard, policy));
    }
    Ok(Answer {
        kind: Kind::Router,
        from: policy.gateway_mac,
        to: policy.mac,
        claimed: target,
        asker: packet.source,
    })
}

/// Discovery to the guest: solicitations of it are answered on its behalf; the only advertisement
/// let through is the guard's own.
#[inline(always)]
pub(crate) fn to_guest<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
    policy: &Policy,
    ethernet: &Ethernet,
    packet: &Packet,
    kind: u8,
) -> Result<Verdict, Reason> {
    if kind == ADVERTISEMENT {
        let from_gateway =
            ethernet.source.equals(policy.gateway_mac) && policy.is_gateway(packet.source);
        return if from_gateway
            && ethernet.destination.equals(policy.mac)
            // The guest may have asked from an address of its link.
            && (guard.owns(policy, packet.destination) || guard.class(packet.destination).is_link_local())
            // One without these flags could make the guest give up its router (RFC 4861, 7.2.5).
            && matches!(frame.bytes::<1>(packet.payload_offset + 4), Some([GATEWAYS_FLAGS]))
            && is_advertisement_of(frame, packet, packet.source, policy.gateway_mac)
        {
            Ok(Verdict::Allow)
        } else {
            Err(Reason::Neighbour)
        };
    }
    if kind != SOLICITATION || guard.owns(policy, packet.source) {
        return Err(Reason::Neighbour);
    }
    let probe = packet.source.is_unspecified();
    if !probe && !guard.class(packet.source).is_unicast() {
        return Err(Reason::Neighbour);
    }
    let sender = if probe { None } else { Some(ethernet.source) };
    let target = solicited(frame, packet, sender)?;
    if !guard.owns(policy, target) {
        return Err(Reason::Neighbour);
    }
    is_sent_to(ethernet, packet, policy.mac)?;
    // Who probes has no address yet, so all nodes are told that this one is taken (RFC 4861, 7.2.4),
    // of which the frame goes to the one that asked (RFC 6085).
    let (kind, asker) = if probe {
        (Kind::Taken, ALL_NODES)
    } else {
        (Kind::Neighbour, packet.source)
    };
    Ok(Verdict::Answer(Answer {
        kind,
        from: policy.mac,
        to: ethernet.source,
        claimed: target,
        asker,
    }))
}

/// A solicitation goes to its group's MAC (RFC 2464, 7) or to whom it asks.
#[inline(always)]
fn is_sent_to(ethernet: &Ethernet, packet: &Packet, asked: Mac) -> Result<(), Reason> {
    let expected = if packet.is_to_group() {
        0x3333_0000_0000 | (packet.destination.words().1 & 0xffff_ffff)
    } else {
        asked.number()
    };
    if ethernet.destination.number() == expected {
        Ok(())
    } else {
        Err(Reason::DestinationMac)
    }
}

/// The target of a well-formed solicitation (RFC 4861, 7.1.1). Its link-layer option, which may
/// be missing, names `sender`; where there is none, the sender has no address yet and no option.
#[inline(always)]
fn solicited<F: Frame + ?Sized>(
    frame: &F,
    packet: &Packet,
    sender: Option<Mac>,
) -> Result<Address, Reason> {
    let target = discovery(frame, packet)?;
    let options = packet.payload_length - DISCOVERY_LENGTH;
    if !options.is_multiple_of(OPTION_LENGTH) || options > MAX_OPTIONS * OPTION_LENGTH {
        return Err(Reason::Neighbour);
    }
    let (_, target_low) = target.words();
    let solicited_node = Address::from_words(
        0xff02 << 48,
        0x0000_0001_ff00_0000 | (target_low & 0x00ff_ffff),
    );
    let direct = sender.is_some() && packet.destination.equals(target);
    if !direct && !packet.destination.equals(solicited_node) {
        return Err(Reason::Neighbour);
    }
    let expected = match sender {
        Some(mac) => link_option(SOURCE_LINK_OPTION, mac),
        None => 0,
    };
    match frame.solicitation_sum(options / OPTION_LENGTH, expected) {
        Some(sum) if is_summed_right(packet, sum) => Ok(target),
        _ => Err(Reason::Neighbour),
    }
}

/// The sum of a solicitation's halves, if its `count` (at most [`MAX_OPTIONS`]) units of options are
/// sound: each whole, and of those that name a link-layer address none but `expected`, once; where
/// that is 0, none at all.
#[inline(always)]
pub fn solicitation_sum<F: Frame + ?Sized>(frame: &F, count: u32, expected: u64) -> Option<u64> {
    const MESSAGE: usize = ETHERNET_HEADER + IPV6_HEADER;
    let mut expected = expected;
    // At once: a comparison for each would end in arithmetic on the packet's end.
    let m = frame.bytes::<{ DISCOVERY_LENGTH as usize }>(MESSAGE)?;
    let mut sum = halves(u64::from_be_bytes([
        m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7],
    ])) + halves(u64::from_be_bytes([
        m[8], m[9], m[10], m[11], m[12], m[13], m[14], m[15],
    ])) + halves(u64::from_be_bytes([
        m[16], m[17], m[18], m[19], m[20], m[21], m[22], m[23],
    ]));
    let mut next = 0;
    let mut index = 0;
    while index < MAX_OPTIONS {
        if index >= count {
            break;
        }
        let place = MESSAGE + (DISCOVERY_LENGTH + index * OPTION_LENGTH) as usize;
        let option = u64::from_be_bytes(*frame.bytes::<8>(place)?);
        sum += halves(option);
        if index == next {
            let length = (option >> 48) as u8 as u32;
            match (option >> 56) as u8 {
                // Once is enough.
                SOURCE_LINK if option == expected && expected != 0 => expected = 0,
                SOURCE_LINK | TARGET_LINK => return None,
                // What a receiver does not know, it ignores (RFC 4861, 4.6); nonces are such.
                _ => {}
            }
            if length == 0 || length > count - index {
                return None;
            }
            next = index + length;
        }
        index += 1;
    }
    Some(sum)
}

/// Whether the checksum of a solicitation is right, whose halves amount to `message`. One's complement
/// sums are the same in numbers of any size (RFC 1071, 2).
#[inline(always)]
fn is_summed_right(packet: &Packet, message: u64) -> bool {
    let (a, b) = packet.source.words();
    let (c, d) = packet.destination.words();
    let mut sum = message + packet.payload_length as u64 + ICMPV6 as u64;
    sum += halves(a) + halves(b) + halves(c) + halves(d);
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum == 0xffff
}

#[inline(always)]
const fn halves(number: u64) -> u64 {
    (number >> 32) + (number & 0xffff_ffff)
}

/// Whether an advertisement says that `address` is at `mac`, as [`Answer`] makes it.
#[inline(always)]
pub(crate) fn is_advertisement_of<F: Frame + ?Sized>(
    frame: &F,
    packet: &Packet,
    address: Address,
    mac: Mac,
) -> bool {
    if packet.payload_length != DISCOVERY_LENGTH + OPTION_LENGTH {
        return false;
    }
    let Ok(target) = discovery(frame, packet) else {
        return false;
    };
    let Ok(option) = option(frame, packet, 0) else {
        return false;
    };
    target.equals(address) && option == link_option(TARGET_LINK_OPTION, mac)
}

/// Target of a solicitation or advertisement (RFC 4861, 7.1: hop limit 255, code 0).
#[inline(always)]
fn discovery<F: Frame + ?Sized>(frame: &F, packet: &Packet) -> Result<Address, Reason> {
    if packet.hop_limit != 255 || packet.payload_length < DISCOVERY_LENGTH {
        return Err(Reason::Neighbour);
    }
    let b = frame
        .bytes::<24>(packet.payload_offset)
        .ok_or(Reason::TransportHeader)?;
    if b[1] != 0 {
        return Err(Reason::Neighbour);
    }
    Ok(Address::v6_on_wire([
        b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15], b[16], b[17], b[18], b[19], b[20],
        b[21], b[22], b[23],
    ]))
}

/// The eight bytes at `index`, in units of as many, as a number: type first, then the length.
#[inline(always)]
fn option<F: Frame + ?Sized>(frame: &F, packet: &Packet, index: u32) -> Result<u64, Reason> {
    let offset = DISCOVERY_LENGTH + index * OPTION_LENGTH;
    match frame.bytes::<8>(packet.payload_offset + offset as usize) {
        Some(option) => Ok(u64::from_be_bytes(*option)),
        None => Err(Reason::TransportHeader),
    }
}

/// The option that says whose MAC is `mac`, as a number.
#[inline(always)]
const fn link_option(kind: u64, mac: Mac) -> u64 {
    kind << 48 | mac.number()
}
