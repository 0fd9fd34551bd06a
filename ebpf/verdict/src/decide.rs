//! The order of judgement: first who sends, then shape, then the allowlist. Nothing is allowed
//! before its source is proven, and what no line allows is dropped.

use crate::answer::Answer;
use crate::arp;
use crate::discovery::{self, ADVERTISEMENT, ROUTER_SOLICITATION, SOLICITATION};
use crate::network::{ETHERNET_HEADER, Packet};
use crate::reason::{Direction, Outcome, Reason};
use crate::transport::{self, Segment, Sent};
use crate::{Flow, Frame, Guard, Mac, Meter, Mode, Policy};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// Smaller values are 802.3 lengths (IEEE 802.3, 3.2.6).
const ETHERTYPE_MINIMUM: u16 = 0x0600;

/// What to do with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Pass it on.
    Allow,
    /// Send [`Answer`] back the way the frame came and consume the frame.
    Answer(Answer),
    /// Discard it.
    Drop(Reason),
}

impl Verdict {
    /// The counter that the verdict belongs to.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Allow => Outcome::Allowed,
            Self::Answer(_) => Outcome::Answered,
            Self::Drop(reason) => Outcome::Dropped(*reason),
        }
    }
}

impl From<Result<Verdict, Reason>> for Verdict {
    #[inline(always)]
    fn from(result: Result<Verdict, Reason>) -> Self {
        match result {
            Ok(verdict) => verdict,
            Err(reason) => Self::Drop(reason),
        }
    }
}

/// Judges a frame that the guest sent.
#[inline(always)]
pub fn egress<F: Frame + ?Sized, G: Guard + ?Sized>(frame: &F, guard: &G) -> Verdict {
    general_egress(frame, guard).unwrap_or_else(|| question_egress(frame, guard))
}

/// Judges a frame on its way to the guest.
#[inline(always)]
pub fn ingress<F: Frame + ?Sized, G: Guard + ?Sized>(frame: &F, guard: &G) -> Verdict {
    general_ingress(frame, guard).unwrap_or_else(|| question_ingress(frame, guard))
}

/// The policy in force, with a mode that this program knows, while the lease lasts.
#[inline(always)]
fn in_force<G: Guard + ?Sized>(guard: &G) -> Result<(&Policy, Mode), Reason> {
    let policy = guard.policy().ok_or(Reason::NoPolicy)?;
    let mode = Mode::from_number(policy.mode).ok_or(Reason::NoPolicy)?;
    let until = guard.lease_until();
    if until != 0 && guard.now() >= until {
        return Err(Reason::LeaseExpired);
    }
    Ok((policy, mode))
}

/// [`egress`] of every frame but ARP and neighbour discovery, which are for [`question_egress`]: a
/// kernel program judges each of the two in a function of its own.
#[inline(always)]
pub fn general_egress<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
) -> Option<Verdict> {
    judge_egress(frame, guard).unwrap_or_else(|reason| Some(Verdict::Drop(reason)))
}

/// [`general_egress`]; `Ok(None)` for a question.
#[inline(always)]
fn judge_egress<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
) -> Result<Option<Verdict>, Reason> {
    let (policy, mode) = in_force(guard)?;
    let ethernet = Ethernet::read(frame)?.of_guest(policy)?;
    let Payload::Ip(packet) = ethernet.payload(frame)? else {
        return Ok(None);
    };
    if discovery::kind(frame, &packet) != 0 {
        return Ok(None);
    }
    let owned = guard.owns(policy, packet.source);
    // A guest's stack names no address of the network where it speaks to its link by itself.
    if packet.is_membership(frame) && (owned || guard.class(packet.source).is_of_link_alone()) {
        return Err(Reason::MulticastListener);
    }
    if !owned {
        return Err(Reason::SourceAddress);
    }
    // Of what extension headers and fragments hide the shape is judged before the MAC: it may be
    // discovery, which goes to groups.
    packet.shape(frame)?;
    to_peer(frame, guard, policy, mode, &ethernet, &packet).map(Some)
}

/// [`egress`] of ARP and neighbour discovery.
#[inline(always)]
pub fn question_egress<F: Frame + ?Sized, G: Guard + ?Sized>(frame: &F, guard: &G) -> Verdict {
    judge_question_egress(frame, guard).into()
}

#[inline(always)]
fn judge_question_egress<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
) -> Result<Verdict, Reason> {
    let (policy, _) = in_force(guard)?;
    let ethernet = Ethernet::read(frame)?.of_guest(policy)?;
    let packet = match ethernet.payload(frame)? {
        Payload::Arp => {
            let answer = arp::for_gateway(frame, guard, policy, &ethernet)?;
            unchanged(frame)?;
            return consume(frame, guard, policy, answer);
        }
        Payload::Ip(packet) => packet,
    };
    let kind = discovery::kind(frame, &packet);
    let owned = guard.owns(policy, packet.source);
    let of_link = guard.class(packet.source).is_of_link_alone();
    // A guest's stack looks for a router by itself, with an address of the network or without.
    if kind == ROUTER_SOLICITATION
        && (owned || of_link)
        && packet.is_to_group()
        && packet.shape(frame).is_ok()
    {
        return Err(Reason::RouterSolicitation);
    }
    // So it does to find its gateway, and to probe whether its own address is taken.
    let solicits = of_link && kind == SOLICITATION;
    if !owned && !solicits {
        return Err(Reason::SourceAddress);
    }
    packet.shape(frame)?;
    unchanged(frame)?;
    let answer = discovery::for_gateway(frame, guard, policy, &ethernet, &packet, kind)?;
    consume(frame, guard, policy, answer)
}

/// [`egress`] of IPv4 with UDP or TCP under the guest's MAC, which nearly all that a guest sends is;
/// `None` for every other frame. Short enough to stand in a program's straight line.
#[inline(always)]
pub fn usual_egress<F: Frame + ?Sized, G: Guard + ?Sized>(frame: &F, guard: &G) -> Option<Verdict> {
    let (policy, mode) = in_force(guard).ok()?;
    let ethernet = Ethernet::read(frame).ok()?.of_guest(policy).ok()?;
    // Asked at once: the fewer values wait for their turn, the less a program keeps on its stack.
    if !ethernet.destination.equals(policy.gateway_mac) {
        return None;
    }
    let packet = ethernet.usual_packet(frame)?;
    if !guard.owns(policy, packet.source) {
        return Some(Verdict::Drop(Reason::SourceAddress));
    }
    Some(to_peer(frame, guard, policy, mode, &ethernet, &packet).into())
}

/// What the guest sends to its peers, its source address proven.
#[inline(always)]
fn to_peer<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
    policy: &Policy,
    mode: Mode,
    ethernet: &Ethernet,
    packet: &Packet,
) -> Result<Verdict, Reason> {
    if !ethernet.destination.equals(policy.gateway_mac) {
        return Err(Reason::DestinationMac);
    }
    let segment = Segment::read(frame, packet, Direction::Egress)?;
    let sent = segment.offload(frame, packet)?;
    let flow = segment.flow();
    admit(guard, policy, mode, &segment, &flow)?;
    police(guard, policy, Direction::Egress, sent)?;
    // Last, so that only what passes lets anything in: a frame that a rate drops opens no flow.
    if !matches!(mode, Mode::Conntrack) {
        guard.note_sent(&flow);
    } else if !guard.open_flow(&flow) {
        return Err(Reason::FlowQuota);
    }
    Ok(Verdict::Allow)
}

/// As [`general_egress`].
#[inline(always)]
pub fn general_ingress<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
) -> Option<Verdict> {
    judge_ingress(frame, guard).unwrap_or_else(|reason| Some(Verdict::Drop(reason)))
}

#[inline(always)]
fn judge_ingress<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
) -> Result<Option<Verdict>, Reason> {
    let (policy, mode) = in_force(guard)?;
    let ethernet = Ethernet::read(frame)?.of_others(policy)?;
    let Payload::Ip(packet) = ethernet.payload(frame)? else {
        return Ok(None);
    };
    if discovery::kind(frame, &packet) != 0 {
        return Ok(None);
    }
    if packet.is_membership(frame) {
        return Err(Reason::MulticastListener);
    }
    packet.shape(frame)?;
    from_peer(frame, guard, policy, mode, &ethernet, &packet).map(Some)
}

/// [`ingress`] of ARP and neighbour discovery.
#[inline(always)]
pub fn question_ingress<F: Frame + ?Sized, G: Guard + ?Sized>(frame: &F, guard: &G) -> Verdict {
    judge_question_ingress(frame, guard).into()
}

#[inline(always)]
fn judge_question_ingress<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
) -> Result<Verdict, Reason> {
    let (policy, _) = in_force(guard)?;
    let ethernet = Ethernet::read(frame)?.of_others(policy)?;
    let verdict = match ethernet.payload(frame)? {
        Payload::Arp => {
            let verdict = arp::to_guest(frame, guard, policy, &ethernet)?;
            unchanged(frame)?;
            verdict
        }
        Payload::Ip(packet) => {
            packet.shape(frame)?;
            let kind = discovery::kind(frame, &packet);
            unchanged(frame)?;
            discovery::to_guest(frame, guard, policy, &ethernet, &packet, kind)?
        }
    };
    finish(frame, guard, policy, verdict)
}

/// As [`usual_egress`].
#[inline(always)]
pub fn usual_ingress<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
) -> Option<Verdict> {
    let (policy, mode) = in_force(guard).ok()?;
    let ethernet = Ethernet::read(frame).ok()?.of_others(policy).ok()?;
    if !ethernet.destination.equals(policy.mac) {
        return None;
    }
    let packet = ethernet.usual_packet(frame)?;
    Some(from_peer(frame, guard, policy, mode, &ethernet, &packet).into())
}

/// What peers send to the guest.
#[inline(always)]
fn from_peer<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
    policy: &Policy,
    mode: Mode,
    ethernet: &Ethernet,
    packet: &Packet,
) -> Result<Verdict, Reason> {
    if !ethernet.destination.equals(policy.mac) {
        return Err(Reason::DestinationMac);
    }
    if !guard.owns(policy, packet.destination) {
        return Err(Reason::DestinationAddress);
    }
    let segment = Segment::read(frame, packet, Direction::Ingress)?;
    // A guest does not report to itself.
    if segment.is_error && guard.owns(policy, packet.source) {
        return Err(Reason::PeerAddress);
    }
    let sent = segment.offload(frame, packet)?;
    let flow = segment.flow();
    admit(guard, policy, mode, &segment, &flow)?;
    let is_live = |seen: Option<u64>| match seen {
        Some(seen) => flow.is_live(seen, guard.now()),
        None => false,
    };
    if matches!(mode, Mode::Conntrack) {
        if !is_live(guard.flow_seen(&flow)) {
            return Err(Reason::NoFlow);
        }
    } else if segment.is_error && !is_live(guard.last_sent(&flow)) {
        // Whoever makes an error up would have to know a flow that the guest uses.
        return Err(Reason::IcmpQuote);
    }
    police(guard, policy, Direction::Ingress, sent)?;
    Ok(Verdict::Allow)
}

/// `answer` to a frame of the guest's.
#[inline(always)]
fn consume<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
    policy: &Policy,
    answer: Answer,
) -> Result<Verdict, Reason> {
    police(guard, policy, Direction::Egress, Sent::whole(frame))?;
    Ok(Verdict::Answer(answer))
}

/// `verdict` on a question to the guest, or on an answer to it.
#[inline(always)]
fn finish<F: Frame + ?Sized, G: Guard + ?Sized>(
    frame: &F,
    guard: &G,
    policy: &Policy,
    verdict: Verdict,
) -> Result<Verdict, Reason> {
    police(guard, policy, Direction::Ingress, Sent::whole(frame))?;
    Ok(verdict)
}

/// Questions and answers are not to be changed after the verdict: a pending checksum or cut would
/// be carried out on the guard's answer.
#[inline(always)]
fn unchanged<F: Frame + ?Sized>(frame: &F) -> Result<(), Reason> {
    if frame.segment_size() != 0 {
        return Err(Reason::Fragment);
    }
    if frame.pending_checksum().is_some() {
        return Err(Reason::ChecksumOffload);
    }
    Ok(())
}

/// The guard's rates, which only frames that would pass use up. A frame that the host is to cut
/// counts as the frames that it becomes, each with its headers.
#[inline(always)]
fn police<G: Guard + ?Sized>(
    guard: &G,
    policy: &Policy,
    direction: Direction,
    sent: Sent,
) -> Result<(), Reason> {
    let (packets, bytes) = match direction {
        Direction::Egress => (Meter::EgressPackets, Meter::EgressBytes),
        Direction::Ingress => (Meter::IngressPackets, Meter::IngressBytes),
    };
    let rate = |meter: Meter| policy.rates[meter as usize];
    if !guard.take(packets, rate(packets), sent.frames) {
        return Err(Reason::Policed);
    }
    if !guard.take(bytes, rate(bytes), sent.bytes) {
        guard.put_back(packets, rate(packets), sent.frames);
        return Err(Reason::Policed);
    }
    Ok(())
}

/// The allowlist, as far as the mode asks for it. It is asked for every frame of a flow, so an
/// endpoint that is revoked is cut with its next frame.
#[inline(always)]
fn admit<G: Guard + ?Sized>(
    guard: &G,
    policy: &Policy,
    mode: Mode,
    segment: &Segment,
    flow: &Flow,
) -> Result<(), Reason> {
    if !guard.may_be_peer(flow.peer) {
        return Err(Reason::PeerAddress);
    }
    let listed = match mode {
        Mode::Filtered | Mode::Conntrack => true,
        Mode::Sampled => match policy.sample_every {
            0 | 1 => true,
            every => guard.random().is_multiple_of(every),
        },
        Mode::Direct => false,
    };
    // A guest's own address is never on its allowlist.
    if listed && guard.lists(policy, segment.protocol, flow.peer, segment.peer_port) {
        return Ok(());
    }
    // Nobody needs the network to talk to itself; what claims to comes from somebody else.
    if guard.owns(policy, flow.peer) {
        return Err(Reason::PeerAddress);
    }
    if listed {
        Err(Reason::Endpoint)
    } else {
        Ok(())
    }
}

/// Whether a frame entering from the guest's side is an answer that the guard itself gave for the
/// guest: what [`ingress`] composed, turned around by the shell. The shell marks its answers out
/// of band; this proves that the content is no more than the truth.
#[inline(always)]
pub fn is_answer_for_guest<F: Frame + ?Sized, G: Guard + ?Sized>(frame: &F, guard: &G) -> bool {
    let Some(policy) = guard.policy() else {
        return false;
    };
    let Ok(ethernet) = Ethernet::read(frame) else {
        return false;
    };
    if !ethernet.source.equals(policy.mac) {
        return false;
    }
    match ethernet.payload(frame) {
        Ok(Payload::Arp) => arp::is_reply_of_guest(frame, guard, policy, &ethernet),
        Ok(Payload::Ip(packet)) => {
            packet.shape(frame).is_ok()
                && discovery::kind(frame, &packet) == ADVERTISEMENT
                && guard.owns(policy, packet.source)
                && discovery::is_advertisement_of(frame, &packet, packet.source, policy.mac)
        }
        Err(_) => false,
    }
}

pub(crate) struct Ethernet {
    pub(crate) destination: Mac,
    pub(crate) source: Mac,
    kind: u16,
}

pub(crate) enum Payload {
    Arp,
    Ip(Packet),
}

impl Ethernet {
    #[inline(always)]
    fn read<F: Frame + ?Sized>(frame: &F) -> Result<Self, Reason> {
        if frame.is_tagged() {
            return Err(Reason::Vlan);
        }
        let h = frame.bytes::<ETHERNET_HEADER>(0).ok_or(Reason::Runt)?;
        Ok(Self {
            destination: Mac([h[0], h[1], h[2], h[3], h[4], h[5]]),
            source: Mac([h[6], h[7], h[8], h[9], h[10], h[11]]),
            kind: u16::from_be_bytes([h[12], h[13]]),
        })
    }

    /// From the guest, by its source MAC.
    #[inline(always)]
    fn of_guest(self, policy: &Policy) -> Result<Self, Reason> {
        if !self.source.equals(policy.mac) {
            return Err(Reason::SourceMac);
        }
        self.beyond_the_link()
    }

    /// From anybody but the guest, by its source MAC, which nobody else has.
    #[inline(always)]
    fn of_others(self, policy: &Policy) -> Result<Self, Reason> {
        if !self.source.is_unicast() || self.source.equals(policy.mac) {
            return Err(Reason::SourceMac);
        }
        self.beyond_the_link()
    }

    #[inline(always)]
    fn beyond_the_link(self) -> Result<Self, Reason> {
        if self.destination.is_bridge_control() {
            return Err(Reason::BridgeControl);
        }
        Ok(self)
    }

    /// A sound header of IPv4 with UDP or TCP; `None` for anything else.
    #[inline(always)]
    fn usual_packet<F: Frame + ?Sized>(&self, frame: &F) -> Option<Packet> {
        if self.kind != ETHERTYPE_IPV4 {
            return None;
        }
        let packet = Packet::read_v4(frame).ok()?;
        let usual = matches!(packet.protocol, transport::UDP | transport::TCP);
        (usual && packet.shape(frame).is_ok()).then_some(packet)
    }

    #[inline(always)]
    fn payload<F: Frame + ?Sized>(&self, frame: &F) -> Result<Payload, Reason> {
        match self.kind {
            ETHERTYPE_IPV4 => Packet::read_v4(frame).map(Payload::Ip),
            ETHERTYPE_ARP => Ok(Payload::Arp),
            ETHERTYPE_IPV6 => Packet::read_v6(frame).map(Payload::Ip),
            // 802.1Q, 802.1ad, and the pre-standard QinQ type.
            0x8100 | 0x88a8 | 0x9100 => Err(Reason::Vlan),
            0..ETHERTYPE_MINIMUM => Err(Reason::Llc),
            _ => Err(Reason::Ethertype),
        }
    }
}
