//! What the guard answers, for the gateway towards the guest and for the guest towards its network, so
//! that neither learns from the other's frames: ARP replies and neighbour advertisements.

use crate::discovery::ADVERTISEMENT;
use crate::network::ETHERNET_HEADER;
use crate::reason::Reason;
use crate::{Address, Guard, Mac, Meter, Policy};

/// Length of the longest answer: a neighbour advertisement with its option.
pub const ANSWER_CAPACITY: usize = 86;
pub(crate) const ARP_LENGTH: usize = 28;
const ARP_FRAME: usize = ETHERNET_HEADER + ARP_LENGTH;

/// Of a neighbour advertisement's option: type and length.
pub(crate) const TARGET_LINK_OPTION: u64 = 0x0201;
const FLAG_ROUTER: u8 = 0x80;
const FLAGS_SOLICITED_OVERRIDE: u8 = 0x60;
const FLAG_OVERRIDE: u8 = 0x20;
/// Of what the guard answers for the gateway.
pub(crate) const GATEWAYS_FLAGS: u8 = FLAG_ROUTER | FLAGS_SOLICITED_OVERRIDE;

/// What to send back: a claim that `claimed` is at `from`, addressed to who asked. Kept as facts
/// and composed only where there is room for a frame (a kernel program's stack has none).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub(crate) kind: Kind,
    pub(crate) from: Mac,
    pub(crate) to: Mac,
    pub(crate) claimed: Address,
    pub(crate) asker: Address,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Arp,
    Router,
    Neighbour,
    Taken,
}

impl Answer {
    /// The two lengths that an answer can have: ARP, neighbour advertisement.
    pub const LENGTHS: [usize; 2] = [ARP_FRAME, ANSWER_CAPACITY];

    /// The frame's length in bytes, one of [`Answer::LENGTHS`].
    #[inline(always)]
    pub fn length(&self) -> usize {
        match self.kind {
            Kind::Arp => ARP_FRAME,
            Kind::Router | Kind::Neighbour | Kind::Taken => ANSWER_CAPACITY,
        }
    }

    /// Writes the frame to the start of `bytes`.
    #[inline(always)]
    pub fn compose(&self, bytes: &mut [u8; ANSWER_CAPACITY]) {
        put(bytes, 0, self.to.0);
        put(bytes, 6, self.from.0);
        let flags = match self.kind {
            Kind::Arp => return self.compose_arp(bytes),
            Kind::Router => FLAG_ROUTER | FLAGS_SOLICITED_OVERRIDE,
            Kind::Neighbour => FLAGS_SOLICITED_OVERRIDE,
            Kind::Taken => FLAG_OVERRIDE,
        };
        self.compose_advertisement(bytes, flags);
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
        put(bytes, 78, (TARGET_LINK_OPTION as u16).to_be_bytes());
        put(bytes, 80, self.from.0);
        // Read back: left alone, the compiler keeps every byte of the frame on a program's stack.
        let sum = checksum(core::hint::black_box(bytes));
        put(bytes, 56, sum.to_be_bytes());
    }
}

/// The reason for which a probe of the guest's is dropped, as long as there are few.
#[inline(always)]
pub(crate) fn tolerated<G: Guard + ?Sized>(guard: &G, policy: &Policy) -> Reason {
    if guard.take(Meter::Probes, policy.rates[Meter::Probes as usize], 1) {
        Reason::AddressProbe
    } else {
        Reason::Policed
    }
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
