//! IP: addresses and headers (RFC 791, RFC 8200).

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::Frame;
use crate::reason::Reason;

/// Length of an Ethernet II header.
pub(crate) const ETHERNET_HEADER: usize = 14;
/// Ethernet pads frames up to this length (without the check sequence).
pub(crate) const ETHERNET_MINIMUM: u32 = 60;
const IPV4_HEADER: usize = 20;
/// Length of an IPv6 header without extensions.
pub(crate) const IPV6_HEADER: usize = 40;
const MAPPED_PREFIX: u64 = 0xffff_0000_0000;

/// An IPv4 or IPv6 address as two words, so that the kernel compares it in two instructions.
/// IPv4 is held in its mapped form (RFC 4291, 2.5.5.2); a real IPv6 address of that form is never
/// taken from the wire, so the two cannot be confused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct Address {
    high: u64,
    low: u64,
}

impl Address {
    /// `::`, which nobody owns.
    pub const UNSPECIFIED: Self = Self { high: 0, low: 0 };

    #[inline(always)]
    pub(crate) const fn v4(bytes: [u8; 4]) -> Self {
        Self {
            high: 0,
            low: MAPPED_PREFIX | u32::from_be_bytes(bytes) as u64,
        }
    }

    #[inline(always)]
    pub(crate) const fn v6(bytes: [u8; 16]) -> Self {
        let number = u128::from_be_bytes(bytes);
        Self {
            high: (number >> 64) as u64,
            low: number as u64,
        }
    }

    /// An address of an IPv6 header or of neighbour discovery. A mapped one, which would pass for the IPv4 address that it
    /// holds, is read as the loopback address: neither owned by a guest nor a peer.
    #[inline(always)]
    pub(crate) const fn v6_on_wire(bytes: [u8; 16]) -> Self {
        let address = Self::v6(bytes);
        if address.is_v4() {
            Self { high: 0, low: 1 }
        } else {
            address
        }
    }

    /// The upper and lower half, each a big-endian number.
    #[inline(always)]
    pub const fn words(self) -> (u64, u64) {
        (self.high, self.low)
    }

    /// The address whose [`Address::words`] these are.
    pub const fn from_words(high: u64, low: u64) -> Self {
        Self { high, low }
    }

    /// The 16 bytes in network order.
    #[inline(always)]
    pub(crate) const fn octets(self) -> [u8; 16] {
        (((self.high as u128) << 64) | self.low as u128).to_be_bytes()
    }

    #[inline(always)]
    pub(crate) const fn equals(self, other: Self) -> bool {
        (self.high ^ other.high) | (self.low ^ other.low) == 0
    }

    /// Whether this is `::`.
    #[inline(always)]
    pub const fn is_unspecified(self) -> bool {
        self.high | self.low == 0
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(self) -> bool {
        self.high == 0 && self.low >> 32 == MAPPED_PREFIX >> 32
    }

    /// Whether this is one interface's address: not unspecified, not "this network", loopback,
    /// multicast or reserved (RFC 6890, RFC 4291).
    #[inline(always)]
    pub const fn is_unicast(self) -> bool {
        if self.is_v4() {
            let first = (self.low >> 24) as u8;
            return first != 0 && first != 127 && first < 224;
        }
        // ::/96 and ::ffff:0:0/96 hold loopback, compatible and mapped addresses.
        self.high | (self.low >> 48) != 0 && self.high >> 56 != 0xff
    }

    /// Whether a station that has no address of the network may speak from this one.
    #[inline(always)]
    pub(crate) const fn is_of_link_alone(self) -> bool {
        self.is_unspecified() || self.equals(Self::v4([0; 4])) || self.is_link_local()
    }

    /// Whether this is of 169.254.0.0/16, where hosts serve metadata, or fe80::/10.
    #[inline(always)]
    pub const fn is_link_local(self) -> bool {
        if self.is_v4() {
            self.low >> 16 == (MAPPED_PREFIX >> 16) | 0xa9fe
        } else {
            self.high >> 54 == 0xfe80 >> 6
        }
    }

    /// Whether a gateway would take this IPv6 address for an IPv4 one: NAT64 (RFC 6052, RFC 8215),
    /// SIIT (RFC 2765, 2.1), 6to4 (RFC 3056), Teredo (RFC 4380).
    #[inline(always)]
    pub const fn stands_for_v4(self) -> bool {
        self.high == 0x0064_ff9b << 32
            || self.high >> 16 == 0x0064_ff9b_0001
            || (self.high == 0 && self.low >> 32 == 0xffff_0000)
            || self.high >> 48 == 0x2002
            || self.high >> 32 == 0x2001_0000
    }

    /// Whether this is an IPv6 address for one host's or site's own use that hosts serve metadata at, or
    /// that nobody has: site-local (RFC 3879), discard-only (RFC 6666), and the metadata services of two
    /// large providers, `fd00:ec2::254` and `fd20:ce::254`.
    #[inline(always)]
    const fn is_metadata_or_nobodys(self) -> bool {
        self.high >> 54 == 0xfec0 >> 6
            || self.high == 0x0100 << 48
            || (self.low == 0x254
                && (self.high == 0xfd00_0ec2 << 32 || self.high == 0xfd20_00ce << 32))
    }

    /// Whether a frame could rightly travel between a guest and this address: unicast, of more
    /// than this link, and no other address in disguise.
    #[inline(always)]
    pub const fn is_possible_peer(self) -> bool {
        self.is_unicast()
            && !self.is_link_local()
            && !self.stands_for_v4()
            && !self.is_metadata_or_nobodys()
    }
}

/// What may be said of an address without asking anybody. A kernel program finds it out in one call:
/// each question has two answers for each family, and the verifier would go all ways through them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressClass(u32);

impl AddressClass {
    const UNICAST: u32 = 1;
    const LINK_LOCAL: u32 = 1 << 1;
    const OF_LINK_ALONE: u32 = 1 << 2;
    const POSSIBLE_PEER: u32 = 1 << 3;

    /// The class of an address.
    #[inline(always)]
    pub const fn of(address: Address) -> Self {
        let mut bits = 0;
        if address.is_unicast() {
            bits |= Self::UNICAST;
        }
        if address.is_link_local() {
            bits |= Self::LINK_LOCAL;
        }
        if address.is_of_link_alone() {
            bits |= Self::OF_LINK_ALONE;
        }
        if address.is_possible_peer() {
            bits |= Self::POSSIBLE_PEER;
        }
        Self(bits)
    }

    /// As a number, and back.
    #[inline(always)]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// The class whose [`AddressClass::bits`] these are.
    #[inline(always)]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// [`Address::is_unicast`].
    #[inline(always)]
    pub(crate) const fn is_unicast(self) -> bool {
        self.0 & Self::UNICAST != 0
    }

    /// [`Address::is_link_local`].
    #[inline(always)]
    pub(crate) const fn is_link_local(self) -> bool {
        self.0 & Self::LINK_LOCAL != 0
    }

    /// [`Address::is_of_link_alone`].
    #[inline(always)]
    pub(crate) const fn is_of_link_alone(self) -> bool {
        self.0 & Self::OF_LINK_ALONE != 0
    }

    /// [`Address::is_possible_peer`].
    #[inline(always)]
    pub const fn is_possible_peer(self) -> bool {
        self.0 & Self::POSSIBLE_PEER != 0
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Self::v4(v4.octets()),
            IpAddr::V6(v6) => Self::v6(v6.octets()),
        }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        if address.is_v4() {
            Ipv4Addr::from(address.low as u32).into()
        } else {
            Ipv6Addr::from(address.octets()).into()
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

/// An IP header whose version is proven and nothing else yet.
pub(crate) struct Packet {
    /// Whether this is IPv4: what both addresses are, told by one bit.
    pub(crate) v4: bool,
    pub(crate) source: Address,
    pub(crate) destination: Address,
    pub(crate) protocol: u8,
    pub(crate) hop_limit: u8,
    /// Offset of the transport header in the frame.
    pub(crate) payload_offset: usize,
    /// Length of transport header and data in bytes, by the IP header.
    pub(crate) payload_length: u32,
}

impl Packet {
    /// Judges lengths, options, fragments and extension headers. Kept apart from reading the
    /// addresses, so that a sender is proven before the shape is named; and asked of the frame when
    /// it is needed: what it says, kept, would multiply the ways through a kernel program.
    #[inline(always)]
    pub(crate) fn shape<F: Frame + ?Sized>(&self, frame: &F) -> Result<(), Reason> {
        if self.v4 {
            let header = frame
                .bytes::<IPV4_HEADER>(ETHERNET_HEADER)
                .ok_or(Reason::Runt)?;
            Self::shape_v4(header, frame.length())
        } else {
            let header = frame
                .bytes::<IPV6_HEADER>(ETHERNET_HEADER)
                .ok_or(Reason::Runt)?;
            Self::shape_v6(header, frame.length())
        }
    }

    /// Whether the destination names a group (RFC 5771, RFC 4291).
    #[inline(always)]
    pub(crate) const fn is_to_group(&self) -> bool {
        let (high, low) = self.destination.words();
        if self.v4 {
            (low >> 28) as u8 & 0xf == 0xe
        } else {
            high >> 56 == 0xff
        }
    }

    /// Whether this is a whole message of multicast membership, to a group, as a host's stack sends
    /// it: an IGMP report (versions 1 to 3) or leave (RFC 3376, 4), which may have the router alert,
    /// or MLD behind the hop-by-hop header that it must have (RFC 3810, 5).
    #[inline(always)]
    pub(crate) fn is_membership<F: Frame + ?Sized>(&self, frame: &F) -> bool {
        const IGMP: u8 = 2;
        if !self.is_to_group() {
            return false;
        }
        if self.v4 {
            return self.protocol == IGMP
                && !is_fragment(frame)
                && matches!(self.igmp_type(frame), Some(0x12 | 0x16 | 0x17 | 0x22));
        }
        if self.protocol != 0 || !matches!(self.shape(frame), Err(Reason::ExtensionHeader)) {
            return false;
        }
        match frame.bytes::<9>(self.payload_offset) {
            // Reports and done; a query (130) is a router's.
            Some(h) => h[0] == 58 && h[1] == 0 && matches!(h[8], 131 | 132 | 143),
            None => false,
        }
    }

    /// The type of an IGMP message without options, or with the router alert (RFC 2113) alone.
    #[inline(always)]
    fn igmp_type<F: Frame + ?Sized>(&self, frame: &F) -> Option<u8> {
        match self.shape(frame) {
            Ok(()) => {}
            Err(Reason::IpOptions) => {
                if frame.bytes::<1>(ETHERNET_HEADER)?[0] & 0x0f != 6 {
                    return None;
                }
                return match frame.bytes::<5>(self.payload_offset)? {
                    [0x94, 4, 0, 0, kind] => Some(*kind),
                    _ => None,
                };
            }
            Err(_) => return None,
        }
        Some(frame.bytes::<1>(self.payload_offset)?[0])
    }

    #[inline(always)]
    pub(crate) fn read_v4<F: Frame + ?Sized>(frame: &F) -> Result<Self, Reason> {
        let header = frame
            .bytes::<IPV4_HEADER>(ETHERNET_HEADER)
            .ok_or(Reason::Runt)?;
        if header[0] >> 4 != 4 {
            return Err(Reason::IpHeader);
        }
        let total = u16::from_be_bytes([header[2], header[3]]) as u32;
        Ok(Self {
            v4: true,
            source: Address::v4([header[12], header[13], header[14], header[15]]),
            destination: Address::v4([header[16], header[17], header[18], header[19]]),
            protocol: header[9],
            hop_limit: header[8],
            payload_offset: ETHERNET_HEADER + IPV4_HEADER,
            payload_length: total.wrapping_sub(IPV4_HEADER as u32),
        })
    }

    #[inline(always)]
    fn shape_v4(header: &[u8; IPV4_HEADER], frame: u32) -> Result<(), Reason> {
        const RESERVED_FLAG: u16 = 0x8000;
        match header[0] & 0x0f {
            5 => {}
            0..5 => return Err(Reason::IpHeader),
            _ => return Err(Reason::IpOptions),
        }
        let fragment = u16::from_be_bytes([header[6], header[7]]);
        if fragment & MORE_FRAGMENTS_AND_OFFSET != 0 {
            return Err(Reason::Fragment);
        }
        if fragment & RESERVED_FLAG != 0 || header[8] == 0 {
            return Err(Reason::IpHeader);
        }
        let total = u16::from_be_bytes([header[2], header[3]]) as u32;
        if total < IPV4_HEADER as u32 {
            return Err(Reason::IpLength);
        }
        length_fits(total, frame)
    }

    #[inline(always)]
    pub(crate) fn read_v6<F: Frame + ?Sized>(frame: &F) -> Result<Self, Reason> {
        let header = frame
            .bytes::<IPV6_HEADER>(ETHERNET_HEADER)
            .ok_or(Reason::Runt)?;
        if header[0] >> 4 != 6 {
            return Err(Reason::IpHeader);
        }
        let payload_length = u16::from_be_bytes([header[4], header[5]]) as u32;
        Ok(Self {
            v4: false,
            source: Address::v6_on_wire(address_at(header, 8)),
            destination: Address::v6_on_wire(address_at(header, 24)),
            protocol: header[6],
            hop_limit: header[7],
            payload_offset: ETHERNET_HEADER + IPV6_HEADER,
            payload_length,
        })
    }

    #[inline(always)]
    fn shape_v6(header: &[u8; IPV6_HEADER], frame: u32) -> Result<(), Reason> {
        let payload_length = u16::from_be_bytes([header[4], header[5]]) as u32;
        match header[6] {
            _ if header[7] == 0 => Err(Reason::IpHeader),
            44 => Err(Reason::Fragment),
            // Hop-by-hop, routing, ESP, AH, no next header, destination options, mobility, HIP,
            // shim6, experiments (IANA "IPv6 Extension Header Types").
            0 | 43 | 50 | 51 | 59 | 60 | 135 | 139 | 140 | 253 | 254 => {
                Err(Reason::ExtensionHeader)
            }
            _ => length_fits(payload_length + IPV6_HEADER as u32, frame),
        }
    }
}

#[inline(always)]
fn address_at(header: &[u8; IPV6_HEADER], at: usize) -> [u8; 16] {
    let mut bytes = [0; 16];
    let mut index = 0;
    while index < 16 {
        bytes[index] = header[at + index];
        index += 1;
    }
    bytes
}

/// An IP header that an ICMP error quotes.
pub(crate) struct Quote {
    pub(crate) source: Address,
    pub(crate) destination: Address,
    pub(crate) protocol: u8,
    /// Offset of the quoted transport header in the frame.
    pub(crate) transport: usize,
}

impl Quote {
    /// The quoted header at `offset`, or `None` where no guest's packet looks like it. Its length
    /// says nothing: what is quoted may be cut.
    #[inline(always)]
    pub(crate) fn read<F: Frame + ?Sized>(frame: &F, offset: usize, v4: bool) -> Option<Self> {
        if v4 {
            let header = frame.bytes::<IPV4_HEADER>(offset)?;
            let fragment = u16::from_be_bytes([header[6], header[7]]) & !0x4000;
            if header[0] != 0x45 || fragment != 0 {
                return None;
            }
            return Some(Self {
                source: Address::v4([header[12], header[13], header[14], header[15]]),
                destination: Address::v4([header[16], header[17], header[18], header[19]]),
                protocol: header[9],
                transport: offset + IPV4_HEADER,
            });
        }
        let header = frame.bytes::<IPV6_HEADER>(offset)?;
        if header[0] >> 4 != 6 {
            return None;
        }
        Some(Self {
            source: Address::v6_on_wire(address_at(header, 8)),
            destination: Address::v6_on_wire(address_at(header, 24)),
            protocol: header[6],
            transport: offset + IPV6_HEADER,
        })
    }

    /// Length of the quoted IP header in bytes.
    #[inline(always)]
    pub(crate) const fn header_length(v4: bool) -> u32 {
        if v4 {
            IPV4_HEADER as u32
        } else {
            IPV6_HEADER as u32
        }
    }
}

const MORE_FRAGMENTS_AND_OFFSET: u16 = 0x3fff;

/// Whether an IPv4 header says that the packet is a part of another.
#[inline(always)]
fn is_fragment<F: Frame + ?Sized>(frame: &F) -> bool {
    match frame.bytes::<2>(ETHERNET_HEADER + 6) {
        Some(field) => u16::from_be_bytes(*field) & MORE_FRAGMENTS_AND_OFFSET != 0,
        None => true,
    }
}

/// The packet must end where the frame does, but for the padding of a minimal frame.
#[inline(always)]
fn length_fits(packet: u32, frame: u32) -> Result<(), Reason> {
    let framed = packet + ETHERNET_HEADER as u32;
    if framed == frame || (framed < frame && frame <= ETHERNET_MINIMUM) {
        Ok(())
    } else {
        Err(Reason::IpLength)
    }
}
