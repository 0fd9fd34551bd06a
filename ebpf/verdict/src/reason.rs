//! The one vocabulary of outcomes. A reason's word is the map index, the log field, the metric
//! label, what the CLI prints and what the documents say.

use core::fmt;

/// Which way a frame travels, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Direction {
    /// From the guest.
    Egress = 0,
    /// To the guest.
    Ingress = 1,
}

impl Direction {
    /// Both directions, in index order.
    pub const ALL: [Self; 2] = [Self::Egress, Self::Ingress];

    /// The word used in logs, labels and JSON.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Egress => "egress",
            Self::Ingress => "ingress",
        }
    }

    /// The direction whose discriminant is `index`.
    pub fn from_index(index: u8) -> Option<Self> {
        Self::ALL.get(index as usize).copied()
    }
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $word:literal,)+) => {
        /// Why a frame was dropped.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Reason { $($(#[doc = $doc])+ $name,)+ }

        impl Reason {
            /// Every reason, in index order.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The word used in logs, labels, JSON and documents.
            pub const fn word(self) -> &'static str {
                match self { $(Self::$name => $word),+ }
            }

            /// What the reason means, for `omerta guard reasons` and the documents made from it.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+)),+ }
            }
        }
    };
}

reasons! {
    /// The guard has no policy it can read; everything is dropped.
    NoPolicy = "no_policy",
    /// The guard's lease has run out; everything is dropped until it is renewed.
    LeaseExpired = "lease_expired",
    /// The kernel could not make the frame's headers readable.
    Unreadable = "unreadable",
    /// Shorter than its headers say it is, or than an Ethernet header.
    Runt = "runt",
    /// Longer than the interface's MTU allows, or ARP with more than padding behind it.
    Overlength = "overlength",
    /// Carries a VLAN tag, in its bytes or beside them.
    Vlan = "vlan",
    /// Not Ethernet II: an 802.3 length stands where the EtherType should.
    Llc = "llc",
    /// An EtherType other than ARP, IPv4 or IPv6.
    Ethertype = "ethertype",
    /// The sender's MAC is not the guest's, or a group address.
    SourceMac = "source_mac",
    /// Sent to a bridge's control address (01:80:c2:...): spanning tree, pause frames, LLDP.
    BridgeControl = "bridge_control",
    /// Not sent to the gateway's MAC (egress) or to the guest's (ingress).
    DestinationMac = "destination_mac",
    /// ARP whose fields are not Ethernet/IPv4, or contradict the frame.
    ArpMalformed = "arp_malformed",
    /// ARP that claims an address that the sender does not own, or is unsolicited.
    ArpSender = "arp_sender",
    /// ARP for an address other than the gateway's (egress) or the guest's (ingress).
    ArpTarget = "arp_target",
    /// The source address is not the guest's.
    SourceAddress = "source_address",
    /// The destination address is not the guest's.
    DestinationAddress = "destination_address",
    /// The IP version does not match the EtherType, the header length is wrong, TTL or hop limit is 0, or IPv4's reserved flag is set.
    IpHeader = "ip_header",
    /// IPv4 options.
    IpOptions = "ip_options",
    /// The IP length does not agree with the frame's.
    IpLength = "ip_length",
    /// A fragment, or a frame that the host was asked to cut into anything but TCP segments or UDP datagrams.
    Fragment = "fragment",
    /// An IPv6 extension header.
    ExtensionHeader = "extension_header",
    /// A transport protocol other than UDP, TCP and ICMP.
    Protocol = "protocol",
    /// A transport header that is cut short or whose lengths are wrong.
    TransportHeader = "transport_header",
    /// The host was asked to write a checksum elsewhere than into the transport header's field.
    ChecksumOffload = "checksum_offload",
    /// An ICMP message other than echo, or in the wrong direction.
    IcmpType = "icmp_type",
    /// An ICMP error that quotes no packet that the guest could have sent and has sent of late, or reports a smaller MTU
    /// than its IP version allows.
    IcmpQuote = "icmp_quote",
    /// A multicast membership report (IGMP, MLD) or leave, which leads nowhere here.
    MulticastListener = "multicast_listener",
    /// A guest's router solicitation: no router is there to find.
    RouterSolicitation = "router_solicitation",
    /// A guest's duplicate-address probe: nobody else owns its address, so nobody answers.
    AddressProbe = "address_probe",
    /// Neighbour discovery other than a solicitation of the gateway (egress) or guest (ingress).
    Neighbour = "neighbour",
    /// A peer that can never be right: loopback, unspecified, multicast, broadcast, link-local,
    /// reserved, the guest itself, or an IPv6 address that stands for an IPv4 one.
    PeerAddress = "peer_address",
    /// The peer is not on the allowlist.
    Endpoint = "endpoint",
    /// Conntrack mode: the guest opened no such flow, or it has timed out.
    NoFlow = "no_flow",
    /// Conntrack mode: the guest has as many flows open as it may have.
    FlowQuota = "flow_quota",
    /// More frames or bytes than the guest's rate allows.
    Policed = "policed",
    /// The guard's own answer could not be written into the frame.
    AnswerFailed = "answer_failed",
    /// The policy changed again and again while the frame was judged.
    PolicyChanging = "policy_changing",
}

impl Reason {
    /// The reason whose index is `index`.
    pub fn from_index(index: u8) -> Option<Self> {
        Self::ALL.get(index as usize).copied()
    }

    /// Whether a frame that was dropped for this is held against the guest. Only what the guest sent is;
    /// and of that neither what a stock kernel sends by itself (when its interface comes up, or as an
    /// error in answer to what others sent to it), nor what is dropped for the provider's own sake: rates,
    /// quotas, leases, failures.
    pub const fn is_violation(self, direction: Direction) -> bool {
        let excused = matches!(
            self,
            Self::AddressProbe
                | Self::MulticastListener
                | Self::RouterSolicitation
                | Self::IcmpType
                | Self::Policed
                | Self::FlowQuota
                | Self::LeaseExpired
                | Self::NoPolicy
                | Self::PolicyChanging
                | Self::Unreadable
                | Self::AnswerFailed
        );
        matches!(direction, Direction::Egress) && !excused
    }

    /// The reasons of [`Reason::is_violation`], a bit for each by its index.
    pub const VIOLATIONS: u64 = {
        assert!(Self::ALL.len() <= 64);
        let (mut bits, mut index) = (0, 0);
        while index < Self::ALL.len() {
            if Self::ALL[index].is_violation(Direction::Egress) {
                bits |= 1 << index;
            }
            index += 1;
        }
        bits
    };

    /// The reason whose word is `word`.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|reason| reason.word() == word)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// What became of a frame: the index of its counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Passed on.
    Allowed,
    /// Answered by the guard itself.
    Answered,
    /// Dropped.
    Dropped(Reason),
}

impl Outcome {
    /// How many outcomes one direction has.
    pub const COUNT: usize = Reason::ALL.len() + 2;

    /// The outcome's counter within its direction.
    pub const fn index(self) -> usize {
        match self {
            Self::Allowed => 0,
            Self::Answered => 1,
            Self::Dropped(reason) => reason as usize + 2,
        }
    }
}

/// The counter, within its direction, of everything that came: counted on entry, so that it can
/// be held against the sum of the outcomes.
pub const RX_COUNTER: usize = Outcome::COUNT;
/// The counter, within its direction, of the guard's own answers that entered again on their way
/// out. They are no frames of the guest's or of its network's, so they are not in [`RX_COUNTER`].
pub const OWN_ANSWERS_COUNTER: usize = Outcome::COUNT + 1;
/// How many counters one direction has.
pub const DIRECTION_COUNTERS: usize = Outcome::COUNT + 2;

#[cfg(test)]
mod tests {
    use super::*;
    extern crate alloc;

    /// The table is what `omerta guard reasons -o markdown` prints.
    #[test]
    fn the_table_in_the_documents_is_that_of_the_code() {
        let mut lines = include_str!("../REASONS.md").lines().skip(2);
        for reason in Reason::ALL {
            let (word, meaning) = (reason.word(), reason.meaning().trim());
            let line = alloc::format!("| `{word}` | {meaning} |");
            assert_eq!(lines.next(), Some(&line[..]));
        }
        assert_eq!(lines.next(), None);
    }

    #[test]
    fn every_word_names_one_reason() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(Reason::from_index(index as u8), Some(*reason));
            assert_eq!(Reason::from_word(reason.word()), Some(*reason));
            assert!(!reason.meaning().is_empty());
        }
        assert_eq!(Reason::from_index(Reason::ALL.len() as u8), None);
    }
}
