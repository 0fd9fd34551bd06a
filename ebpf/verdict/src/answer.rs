//! ARP (RFC 826) and neighbour discovery (RFC 4861): the guard answers for the gateway towards
//! the guest and for the guest towards its network, so neither learns from the other's frames.

use crate::decide::{Ethernet, Verdict};
use crate::network::{ETHERNET_HEADER, Packet};
use crate::reason::Reason;
use crate::{Address, Frame, Mac, Policy};

/// Length of the longest answer: a neighbour advertisement with its option.
pub const ANSWER_CAPACITY: usize = 86;
const ARP_LENGTH: usize = 28;
const ARP_FRAME: usize = ETHERNET_HEADER + ARP_LENGTH;
const REQUEST: u16 = 1;
const REPLY: u16 = 2;

const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Type, code, checksum, flags, target.
const DISCOVERY_LENGTH: u32 = 24;
const LINK_OPTION_LENGTH: u32 = 8;
const SOURCE_LINK_OPTION: [u8; 2] = [1, 1];
const TARGET_LINK_OPTION: [u8; 2] = [2, 1];
const FLAG_ROUTER: u8 = 0x80;
const FLAGS_SOLICITED_OVERRIDE: u8 = 0x60;

/// What to send back: a claim that `claimed` is at `from`, addressed to who asked. Kept as facts
/// and composed only where there is room for a frame (a kernel program's stack has none).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    kind: Kind,
    from: Mac,
    to: Mac,
    claimed: Address,
    asker: Address,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Arp,
    Router,
    Neighbour,
}

impl Answer {
    /// The two lengths that an answer can have: ARP, neighbour advertisement.
    pub const LENGTHS: [usize; 2] = [ARP_FRAME, ANSWER_CAPACITY];

    /// The frame's length in bytes, one of [`Answer::LENGTHS`].
    #[inline(always)]
    pub fn length(&self) -> usize {
        match self.kind {
            Kind::Arp => ARP_FRAME,
            Kind::Router | Kind::Neighbour => ANSWER_CAPACITY,
        }
    }

    /// Writes the frame to the start of `bytes`.
    #[inline(always)]
    pub fn compose(&self, bytes: &mut [u8; ANSWER_CAPACITY]) {
        put(bytes, 0, self.to.0);
        put(bytes, 6, self.from.0);
        match self.kind {
            Kind::Arp => self.compose_arp(bytes),
            Kind::Router => {
                self.compose_advertisement(bytes, FLAG_ROUTER | FLAGS_SOLICITED_OVERRIDE)
            }
            Kind::Neighbour => self.compose_advertisement(bytes, FLAGS_SOLICITED_OVERRIDE),
        }
    }

    #[inline(always)]
    fn compose_arp(&self, bytes: &mut [u8; ANSWER_CAPACITY]) {
        put(bytes, 12, [8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
        put(bytes, 22, self.from.0);
        put(bytes, 28, v4_octets(self.claimed));
        put(bytes, 32, self.to.0);
        put(bytes, 38, v4_octets(self.asker));
    }

    #[inline(always)]
    fn compose_advertisement(&self, bytes: &mut [u8; ANSWER_CAPACITY], flags: u8) {
        // EtherType; version, class, flow; payload length 32; ICMPv6; hop limit 255.
        put(bytes, 12, [0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255]);
        put(bytes, 22, self.claimed.octets());
        put(bytes, 38, self.asker.octets());
        put(bytes, 54, [ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0]);
        put(bytes, 62, self.claimed.octets());
        put(bytes, 78, TARGET_LINK_OPTION);
        put(bytes, 80, self.from.0);
        let sum = checksum(bytes);
        put(bytes, 56, sum.to_be_bytes());
    }
}

struct Arp {
    operation: u16,
    sender_mac: Mac,
    sender: Address,
    target_mac: Mac,
    target: Address,
}

impl Arp {
    #[inline(always)]
    fn read<F: Frame + ?Sized>(frame: &F) -> Result<Self, Reason> {
        let b = frame
            .bytes::<ARP_LENGTH>(ETHERNET_HEADER)
            .ok_or(Reason::Runt)?;
        // Ethernet, IPv4, 6 and 4 bytes.
        if [b[0], b[1], b[2], b[3], b[4], b[5]] != [0, 1, 8, 0, 6, 4] {
            return Err(Reason::ArpMalformed);
        }
        Ok(Self {
            operation: u16::from_be_bytes([b[6], b[7]]),
            sender_mac: Mac([b[8], b[9], b[10], b[11], b[12], b[13]]),
            sender: Address::v4([b[14], b[15], b[16], b[17]]),
            target_mac: Mac([b[18], b[19], b[20], b[21], b[22], b[23]]),
            target: Address::v4([b[24], b[25], b[26], b[27]]),
        })
    }

    /// The reply that says `mac` is at the target of this request.
    #[inline(always)]
    fn reply(&self, mac: Mac) -> Answer {
        Answer {
            kind: Kind::Arp,
            from: mac,
            to: self.sender_mac,
            claimed: self.target,
            asker: self.sender,
        }
    }
}

/// ARP from the guest: a request for the gateway by the guest's true pair, and nothing else.
#[inline(always)]
pub(crate) fn arp_for_gateway<F: Frame + ?Sized>(
    frame: &F,
    policy: &Policy,
    ethernet: &Ethernet,
) -> Result<Answer, Reason> {
    let arp = Arp::read(frame)?;
    if arp.operation != REQUEST || !arp.sender_mac.equals(policy.mac) || !policy.owns(arp.sender) {
        return Err(Reason::ArpSender);
    }
    if !policy.is_gateway(arp.target) {
        return Err(Reason::ArpTarget);
    }
    if !ethernet.destination.equals(Mac::BROADCAST)
        && !ethernet.destination.equals(policy.gateway_mac)
    {
        return Err(Reason::DestinationMac);
    }
    Ok(arp.reply(policy.gateway_mac))
}

/// ARP to the guest: requests for it are answered on its behalf; the only reply let through is
/// the guard's own.
#[inline(always)]
pub(crate) fn arp_to_guest<F: Frame + ?Sized>(
    frame: &F,
    policy: &Policy,
    ethernet: &Ethernet,
) -> Result<Verdict, Reason> {
    let arp = Arp::read(frame)?;
    if !arp.sender_mac.equals(ethernet.source) {
        return Err(Reason::ArpMalformed);
    }
    if !policy.owns(arp.target) {
        return Err(Reason::ArpTarget);
    }
    let for_guest = ethernet.destination.equals(policy.mac);
    match arp.operation {
        REQUEST if policy.owns(arp.sender) || arp.sender_mac.equals(policy.mac) => {
            Err(Reason::ArpSender)
        }
        REQUEST if for_guest || ethernet.destination.equals(Mac::BROADCAST) => {
            Ok(Verdict::Answer(arp.reply(policy.mac)))
        }
        REQUEST => Err(Reason::DestinationMac),
        REPLY
            if for_guest
                && arp.target_mac.equals(policy.mac)
                && arp.sender_mac.equals(policy.gateway_mac)
                && policy.is_gateway(arp.sender) =>
        {
            Ok(Verdict::Allow)
        }
        _ => Err(Reason::ArpSender),
    }
}

#[inline(always)]
pub(crate) fn is_arp_reply_of_guest<F: Frame + ?Sized>(
    frame: &F,
    policy: &Policy,
    ethernet: &Ethernet,
) -> bool {
    Arp::read(frame).is_ok_and(|arp| {
        arp.operation == REPLY
            && arp.sender_mac.equals(policy.mac)
            && policy.owns(arp.sender)
            && arp.target_mac.equals(ethernet.destination)
    })
}

/// Whether an ICMPv6 packet is of types 133 to 137, which only routers and neighbours may speak.
#[inline(always)]
pub(crate) fn is_neighbour_discovery<F: Frame + ?Sized>(frame: &F, packet: &Packet) -> bool {
    !packet.source.is_v4()
        && frame
            .bytes::<1>(packet.payload_offset)
            .is_some_and(|kind| matches!(kind[0], 133..=137))
}

/// Discovery from the guest: a solicitation of the gateway, and nothing else.
#[inline(always)]
pub(crate) fn neighbour_for_gateway<F: Frame + ?Sized>(
    frame: &F,
    policy: &Policy,
    packet: &Packet,
) -> Result<Answer, Reason> {
    let target = solicited(frame, packet, policy.mac)?;
    if !policy.is_gateway(target) {
        return Err(Reason::Neighbour);
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
pub(crate) fn neighbour_to_guest<F: Frame + ?Sized>(
    frame: &F,
    policy: &Policy,
    ethernet: &Ethernet,
    packet: &Packet,
) -> Result<Verdict, Reason> {
    let from_gateway =
        ethernet.source.equals(policy.gateway_mac) && policy.is_gateway(packet.source);
    if from_gateway
        && ethernet.destination.equals(policy.mac)
        && policy.owns(packet.destination)
        && is_advertisement_of(frame, packet, packet.source, policy.gateway_mac)
    {
        return Ok(Verdict::Allow);
    }
    if packet.source.is_unspecified() || policy.owns(packet.source) {
        return Err(Reason::Neighbour);
    }
    let target = solicited(frame, packet, ethernet.source)?;
    if !policy.owns(target) {
        return Err(Reason::Neighbour);
    }
    Ok(Verdict::Answer(Answer {
        kind: Kind::Neighbour,
        from: policy.mac,
        to: ethernet.source,
        claimed: target,
        asker: packet.source,
    }))
}

/// The target of a well-formed solicitation, whose link-layer option, where there is one, is the
/// only option and names `sender`.
#[inline(always)]
fn solicited<F: Frame + ?Sized>(
    frame: &F,
    packet: &Packet,
    sender: Mac,
) -> Result<Address, Reason> {
    let (kind, target) = discovery(frame, packet)?;
    if kind != SOLICITATION {
        return Err(Reason::Neighbour);
    }
    if packet.payload_length != DISCOVERY_LENGTH {
        let option = link_option(frame, packet)?;
        if [option[0], option[1]] != SOURCE_LINK_OPTION || !option_mac(option).equals(sender) {
            return Err(Reason::Neighbour);
        }
    }
    let (_, target_low) = target.words();
    let solicited_node = Address::from_words(
        0xff02 << 48,
        0x0000_0001_ff00_0000 | (target_low & 0x00ff_ffff),
    );
    if !packet.destination.equals(solicited_node) && !packet.destination.equals(target) {
        return Err(Reason::Neighbour);
    }
    Ok(target)
}

/// Whether this is an advertisement that says `address` is at `mac`, as [`advertisement`] makes it.
#[inline(always)]
pub(crate) fn is_advertisement_of<F: Frame + ?Sized>(
    frame: &F,
    packet: &Packet,
    address: Address,
    mac: Mac,
) -> bool {
    if packet.source.is_v4() || packet.protocol != crate::transport::ICMPV6 {
        return false;
    }
    let Ok((kind, target)) = discovery(frame, packet) else {
        return false;
    };
    let Ok(option) = link_option(frame, packet) else {
        return false;
    };
    kind == ADVERTISEMENT
        && target.equals(address)
        && [option[0], option[1]] == TARGET_LINK_OPTION
        && option_mac(option).equals(mac)
}

/// Type and target of a discovery message (RFC 4861, 7.1: hop limit 255, code 0).
#[inline(always)]
fn discovery<F: Frame + ?Sized>(frame: &F, packet: &Packet) -> Result<(u8, Address), Reason> {
    if packet.hop_limit != 255 || packet.payload_length < DISCOVERY_LENGTH {
        return Err(Reason::Neighbour);
    }
    let b = frame
        .bytes::<24>(packet.payload_offset)
        .ok_or(Reason::TransportHeader)?;
    if b[1] != 0 {
        return Err(Reason::Neighbour);
    }
    let target = Address::v6([
        b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15], b[16], b[17], b[18], b[19], b[20],
        b[21], b[22], b[23],
    ]);
    Ok((b[0], target))
}

#[inline(always)]
fn link_option<'a, F: Frame + ?Sized>(
    frame: &'a F,
    packet: &Packet,
) -> Result<&'a [u8; 8], Reason> {
    if packet.payload_length != DISCOVERY_LENGTH + LINK_OPTION_LENGTH {
        return Err(Reason::Neighbour);
    }
    frame
        .bytes::<8>(packet.payload_offset + DISCOVERY_LENGTH as usize)
        .ok_or(Reason::TransportHeader)
}

#[inline(always)]
fn option_mac(o: &[u8; 8]) -> Mac {
    Mac([o[2], o[3], o[4], o[5], o[6], o[7]])
}

/// ICMPv6 checksum over addresses, pseudo-header and message (RFC 4443, 2.3), its field still zero.
#[inline(always)]
fn checksum(frame: &[u8; ANSWER_CAPACITY]) -> u16 {
    let mut sum: u32 = 32 + 58;
    let mut at = 22;
    while at < ANSWER_CAPACITY {
        sum += u16::from_be_bytes([frame[at], frame[at + 1]]) as u32;
        at += 2;
    }
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

#[inline(always)]
fn put<const N: usize>(bytes: &mut [u8; ANSWER_CAPACITY], at: usize, value: [u8; N]) {
    let mut index = 0;
    while index < N {
        bytes[at + index] = value[index];
        index += 1;
    }
}

#[inline(always)]
fn v4_octets(address: Address) -> [u8; 4] {
    (address.words().1 as u32).to_be_bytes()
}
