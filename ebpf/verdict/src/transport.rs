//! Transport headers: ports for UDP and TCP, identifiers for ICMP echo (RFC 768, 9293, 792, 4443).

use crate::network::Packet;
use crate::reason::{Direction, Reason};
use crate::{Frame, Protocol};

pub(crate) const ICMPV6: u8 = 58;

/// What the allowlist needs of a transport header.
pub(crate) struct Segment {
    pub(crate) protocol: Protocol,
    pub(crate) guest_port: u16,
    pub(crate) peer_port: u16,
    /// Offset of the checksum field in the transport header.
    checksum_field: u32,
}

impl Segment {
    #[inline(always)]
    pub(crate) fn read<F: Frame + ?Sized>(
        frame: &F,
        packet: &Packet,
        direction: Direction,
    ) -> Result<Self, Reason> {
        let v4 = packet.source.is_v4();
        match packet.protocol {
            17 => Self::udp(frame, packet, direction),
            6 => Self::tcp(frame, packet, direction),
            1 if v4 => Self::echo(frame, packet, if is_egress(direction) { 8 } else { 0 }),
            ICMPV6 if !v4 => {
                Self::echo(frame, packet, if is_egress(direction) { 128 } else { 129 })
            }
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
            Protocol::Udp,
            6,
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
            Protocol::Tcp,
            16,
            [header[0], header[1], header[2], header[3]],
            direction,
        ))
    }

    #[inline(always)]
    fn echo<F: Frame + ?Sized>(frame: &F, packet: &Packet, kind: u8) -> Result<Self, Reason> {
        let header = header::<F, 8>(frame, packet)?;
        if header[0] != kind || header[1] != 0 {
            return Err(Reason::IcmpType);
        }
        let identifier = u16::from_be_bytes([header[4], header[5]]);
        Ok(Self {
            protocol: Protocol::Icmp,
            guest_port: identifier,
            peer_port: 0,
            checksum_field: 2,
        })
    }

    #[inline(always)]
    fn ports(
        protocol: Protocol,
        checksum_field: u32,
        ports: [u8; 4],
        direction: Direction,
    ) -> Self {
        let source = u16::from_be_bytes([ports[0], ports[1]]);
        let destination = u16::from_be_bytes([ports[2], ports[3]]);
        let (guest_port, peer_port) = if is_egress(direction) {
            (source, destination)
        } else {
            (destination, source)
        };
        Self {
            protocol,
            guest_port,
            peer_port,
            checksum_field,
        }
    }

    /// Judges what the host was asked to do to the frame after the verdict: it may fill in the
    /// transport header's own checksum, and cut TCP into segments.
    #[inline(always)]
    pub(crate) fn offload<F: Frame + ?Sized>(
        &self,
        frame: &F,
        packet: &Packet,
    ) -> Result<(), Reason> {
        // The host cuts UDP either into datagrams or into fragments (UFO), as the guest's offload
        // header asks, and only the latter is told from the former by what no program may read.
        if frame.segment_size() != 0 && !matches!(self.protocol, Protocol::Tcp) {
            return Err(Reason::Fragment);
        }
        match frame.pending_checksum() {
            Some(pending)
                if pending.start != packet.payload_offset as u32
                    || pending.field != pending.start.wrapping_add(self.checksum_field) =>
            {
                Err(Reason::ChecksumOffload)
            }
            _ => Ok(()),
        }
    }
}

#[inline(always)]
fn is_egress(direction: Direction) -> bool {
    matches!(direction, Direction::Egress)
}

#[inline(always)]
fn header<'a, F: Frame + ?Sized, const N: usize>(
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
