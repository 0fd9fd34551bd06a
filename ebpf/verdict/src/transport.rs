//! Transport headers: the ports of UDP and TCP (RFC 768, RFC 9293).

use crate::network::{ETHERNET_HEADER, Packet};
use crate::reason::{Direction, Reason};
use crate::{Address, Flow, Frame, Protocol, Segments, icmp};

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;
/// Every interface carries as much (RFC 791, 3.2; `ETH_MIN_MTU` in include/uapi/linux/if_ether.h).
pub(crate) const MINIMUM_MTU: u32 = 68;

/// What the allowlist needs of a transport header.
pub(crate) struct Segment {
    pub(crate) protocol: Protocol,
    pub(crate) guest: Address,
    pub(crate) peer: Address,
    pub(crate) guest_port: u16,
    pub(crate) peer_port: u16,
    /// Offset of the checksum field in the transport header.
    pub(crate) checksum_field: u32,
    /// Length of the transport header in bytes.
    pub(crate) header_length: u32,
    /// Whether this is an ICMP error, and the flow that of what it quotes.
    pub(crate) is_error: bool,
}

impl Segment {
    #[inline(always)]
    pub(crate) fn read<F: Frame + ?Sized>(
        frame: &F,
        packet: &Packet,
        direction: Direction,
    ) -> Result<Self, Reason> {
        let v4 = packet.v4;
        match packet.protocol {
            UDP => Self::udp(frame, packet, direction),
            TCP => Self::tcp(frame, packet, direction),
            1 if v4 => icmp::segment(frame, packet, direction),
            ICMPV6 if !v4 => icmp::segment(frame, packet, direction),
            _ => Err(Reason::Protocol),
        }
    }

    #[inline(always)]
    fn udp<F: Frame + ?Sized>(
        frame: &F,
        packet: &Packet,
        direction: Direction,
    ) -> Result<Self, Reason> {
        let header = header::<F, 8>(frame, packet)?;
        if u16::from_be_bytes([header[4], header[5]]) as u32 != packet.payload_length {
            return Err(Reason::TransportHeader);
        }
        Ok(Self::ports(
            packet,
            (Protocol::Udp, 6, 8),
            [header[0], header[1], header[2], header[3]],
            direction,
        ))
    }

    #[inline(always)]
    fn tcp<F: Frame + ?Sized>(
        frame: &F,
        packet: &Packet,
        direction: Direction,
    ) -> Result<Self, Reason> {
        let header = header::<F, 20>(frame, packet)?;
        let data_offset = ((header[12] >> 4) as u32) * 4;
        if data_offset < 20 || data_offset > packet.payload_length {
            return Err(Reason::TransportHeader);
        }
        Ok(Self::ports(
            packet,
            (Protocol::Tcp, 16, data_offset),
            [header[0], header[1], header[2], header[3]],
            direction,
        ))
    }

    #[inline(always)]
    fn ports(
        packet: &Packet,
        (protocol, checksum_field, header_length): (Protocol, u32, u32),
        ports: [u8; 4],
        direction: Direction,
    ) -> Self {
        let source = u16::from_be_bytes([ports[0], ports[1]]);
        let destination = u16::from_be_bytes([ports[2], ports[3]]);
        if is_egress(direction) {
            Self {
                protocol,
                guest: packet.source,
                peer: packet.destination,
                guest_port: source,
                peer_port: destination,
                checksum_field,
                header_length,
                is_error: false,
            }
        } else {
            Self {
                protocol,
                guest: packet.destination,
                peer: packet.source,
                guest_port: destination,
                peer_port: source,
                checksum_field,
                header_length,
                is_error: false,
            }
        }
    }

    /// The flow that the segment, or what it quotes, belongs to.
    #[inline(always)]
    pub(crate) fn flow(&self) -> Flow {
        Flow::new(
            self.protocol,
            (self.guest, self.guest_port),
            (self.peer, self.peer_port),
        )
    }

    /// Judges what the host was asked to do to the frame after the verdict: it may fill in the
    /// transport header's own checksum, and cut TCP and UDP into segments that the interface carries. Gives what
    /// becomes of it.
    #[inline(always)]
    pub(crate) fn offload<F: Frame + ?Sized>(
        &self,
        frame: &F,
        packet: &Packet,
    ) -> Result<Sent, Reason> {
        let ethernet = ETHERNET_HEADER as u32;
        let (sent, longest) = match frame.segment_size() {
            0 => (Sent::whole(frame), frame.length().wrapping_sub(ethernet)),
            size => {
                // The host cuts UDP either into datagrams or into fragments (UFO), as the guest's
                // offload header asks.
                let kind = match (packet.protocol, packet.v4) {
                    (TCP, true) => Segments::TcpV4,
                    (TCP, false) => Segments::TcpV6,
                    (UDP, _) => Segments::Udp,
                    _ => return Err(Reason::Fragment),
                };
                if !frame.is_cut_into(kind) {
                    return Err(Reason::Fragment);
                }
                let headers = packet.payload_offset as u32 - ethernet + self.header_length;
                let payload = frame.length().saturating_sub(ethernet + headers);
                let frames = payload.div_ceil(size).max(1);
                // Each has the headers.
                let bytes = payload.saturating_add(frames.saturating_mul(ethernet + headers));
                (Sent { frames, bytes }, headers.saturating_add(size))
            }
        };
        if longest > MINIMUM_MTU && longest > frame.mtu() {
            return Err(Reason::Overlength);
        }
        match frame.pending_checksum() {
            Some(pending)
                if pending.start != packet.payload_offset as u32
                    || pending.field != pending.start.wrapping_add(self.checksum_field) =>
            {
                Err(Reason::ChecksumOffload)
            }
            _ => Ok(sent),
        }
    }
}

/// What becomes of a frame on its way: itself, or the segments that the host cuts it into.
#[derive(Clone, Copy)]
pub(crate) struct Sent {
    pub(crate) frames: u32,
    /// With their Ethernet headers.
    pub(crate) bytes: u32,
}

impl Sent {
    /// A frame that is not cut.
    #[inline(always)]
    pub(crate) fn whole<F: Frame + ?Sized>(frame: &F) -> Self {
        Self {
            frames: 1,
            bytes: frame.length(),
        }
    }
}

#[inline(always)]
pub(crate) fn is_egress(direction: Direction) -> bool {
    matches!(direction, Direction::Egress)
}

#[inline(always)]
pub(crate) fn header<'a, F: Frame + ?Sized, const N: usize>(
    frame: &'a F,
    packet: &Packet,
) -> Result<&'a [u8; N], Reason> {
    if (N as u32) > packet.payload_length {
        return Err(Reason::TransportHeader);
    }
    frame
        .bytes::<N>(packet.payload_offset)
        .ok_or(Reason::TransportHeader)
}
