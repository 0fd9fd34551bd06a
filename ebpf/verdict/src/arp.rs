//! ARP (RFC 826): the guest asks for the gateway, its network for the guest, and the guard answers both.

use crate::answer::{ARP_LENGTH, Answer, Kind, tolerated};
use crate::decide::{Ethernet, Verdict};
use crate::network::{ETHERNET_HEADER, ETHERNET_MINIMUM};
use crate::reason::Reason;
use crate::{Address, Frame, Guard, Mac, Policy};

const REQUEST: u16 = 1;
const REPLY: u16 = 2;
const NO_V4: Address = Address::v4([0; 4]);

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
        if frame.length() > ETHERNET_MINIMUM {
            return Err(Reason::Overlength);
        }
        let b = frame
            .bytes::<ARP_LENGTH>(ETHERNET_HEADER)
            .ok_or(Reason::Runt)?;
        // Ethernet, IPv4, 6 and 4 bytes.
        if [b[0], b[1], b[2], b[3], b[4], b[5]] != [0, 1, 8, 0, 6, 4] {
            return Err(Reason::ArpMalformed);
        }
        let operation = u16::from_be_bytes([b[6], b[7]]);
        // Others are of reverse and inverse ARP, and of other media.
        if operation != REQUEST && operation != REPLY {
            return Err(Reason::ArpMalformed);
        }
        Ok(Self {
            operation,
            sender_mac: Mac([b[8], b[9], b[10], b[11], b[12], b[13]]),
            sender: Address::v4([b[14], b[15], b[16], b[17]]),
            target_mac: Mac([b[18], b[19], b[20], b[21], b[22], b[23]]),
            target: Address::v4([b[24], b[25], b[26], b[27]]),
        })
    }

    /// Whether the field that a request asks for is zero, as RFC 5227, 1.1 wants it, or repeats what some
    /// stacks put there: the frame's destination, or what they last knew of `asked`.
    #[inline(always)]
    fn names_no_other_than(&self, asked: Mac, ethernet: &Ethernet) -> bool {
        self.target_mac.number() == 0
            || self.target_mac.equals(ethernet.destination)
            || self.target_mac.equals(asked)
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

/// ARP from the guest: a request for the gateway by the guest's true pair, and nothing else. A
/// probe of the guest's own address (RFC 5227, 2.1) is tolerated in silence.
#[inline(always)]
pub(crate) fn for_gateway<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
    policy: &Policy,
    ethernet: &Ethernet,
) -> Result<Answer, Reason> {
    let arp = Arp::read(frame)?;
    if arp.operation != REQUEST || !arp.sender_mac.equals(policy.mac) {
        return Err(Reason::ArpSender);
    }
    if !guard.owns(policy, arp.sender) {
        let probe = arp.sender.equals(NO_V4) && guard.owns(policy, arp.target);
        return Err(if probe {
            tolerated(guard, policy)
        } else {
            Reason::ArpSender
        });
    }
    if !policy.is_gateway(arp.target) {
        return Err(Reason::ArpTarget);
    }
    if !ethernet.destination.equals(Mac::BROADCAST)
        && !ethernet.destination.equals(policy.gateway_mac)
    {
        return Err(Reason::DestinationMac);
    }
    if !arp.names_no_other_than(policy.gateway_mac, ethernet) {
        return Err(Reason::ArpMalformed);
    }
    Ok(arp.reply(policy.gateway_mac))
}

/// ARP to the guest: requests for it are answered on its behalf; the only reply let through is
/// the guard's own.
#[inline(always)]
pub(crate) fn to_guest<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
    policy: &Policy,
    ethernet: &Ethernet,
) -> Result<Verdict, Reason> {
    let arp = Arp::read(frame)?;
    if !arp.sender_mac.equals(ethernet.source) {
        return Err(Reason::ArpMalformed);
    }
    if !guard.owns(policy, arp.target) {
        return Err(Reason::ArpTarget);
    }
    let for_guest = ethernet.destination.equals(policy.mac);
    match arp.operation {
        // Who probes has no address yet; nobody else asks without one, or in the guest's name.
        REQUEST
            if guard.owns(policy, arp.sender)
                || !(arp.sender.is_unicast() || arp.sender.equals(NO_V4)) =>
        {
            Err(Reason::ArpSender)
        }
        REQUEST if !for_guest && !ethernet.destination.equals(Mac::BROADCAST) => {
            Err(Reason::DestinationMac)
        }
        REQUEST if !arp.names_no_other_than(policy.mac, ethernet) => Err(Reason::ArpMalformed),
        REQUEST => Ok(Verdict::Answer(arp.reply(policy.mac))),
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
pub(crate) fn is_reply_of_guest<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
    policy: &Policy,
    ethernet: &Ethernet,
) -> bool {
    Arp::read(frame).is_ok_and(|arp| {
        arp.operation == REPLY
            && arp.sender_mac.equals(policy.mac)
            && guard.owns(policy, arp.sender)
            && arp.target_mac.equals(ethernet.destination)
    })
}
