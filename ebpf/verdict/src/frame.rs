//! The bytes under judgement.

use crate::solicitation_sum;

/// An Ethernet frame as some shell holds it: a socket buffer in the kernel, a slice elsewhere.
///
/// All offsets are from the first byte of the destination MAC.
pub trait Frame {
    /// Length of the whole frame in bytes, also of parts that are not linear in memory.
    fn length(&self) -> u32;

    /// The longest IP packet that the interface carries, in bytes; 0 where that is not known.
    fn mtu(&self) -> u32;

    /// Whether a VLAN tag travels beside the bytes (hardware offload).
    fn is_tagged(&self) -> bool;

    /// Payload bytes of each segment that the host is still to cut the frame into; 0 where it
    /// leaves the frame whole.
    fn segment_size(&self) -> u32;

    /// Whether the host is to cut the frame into segments of `kind`, and to do nothing else with
    /// it. Asked where [`Frame::segment_size`] is not 0.
    fn is_cut_into(&self, kind: Segments) -> bool;

    /// The checksum that the host, or its network card, is still to write; `None` where the bytes
    /// stay as they are.
    fn pending_checksum(&self) -> Option<PendingChecksum>;

    /// `N` bytes at `offset`, or `None` where the frame does not reach that far.
    fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]>;

    /// [`solicitation_sum`] of this frame; a shell may keep it apart.
    #[inline(always)]
    fn solicitation_sum(&self, count: u32, expected: u64) -> Option<u64> {
        solicitation_sum(self, count, expected)
    }
}

/// What the host may be asked to cut a frame into (`SKB_GSO_*` in include/linux/skbuff.h) such that
/// each part has the headers that were judged. Fragments of IP and tunnels are not among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Segments {
    /// `SKB_GSO_TCPV4`.
    TcpV4 = 0,
    /// `SKB_GSO_TCPV6`.
    TcpV6 = 1,
    /// `SKB_GSO_UDP_L4`: datagrams of either IP version.
    Udp = 2,
}

impl Segments {
    /// How many kinds there are.
    pub const COUNT: usize = 3;
}

/// A checksum left to whoever sends the frame on (`CHECKSUM_PARTIAL` in include/linux/skbuff.h).
/// On an interface with offload headers (virtio-net) a guest chooses both places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingChecksum {
    /// Offset in the frame of the first byte that is summed.
    pub start: u32,
    /// Offset in the frame of the two bytes that are overwritten.
    pub field: u32,
}

impl Frame for [u8] {
    fn length(&self) -> u32 {
        u32::try_from(self.len()).unwrap_or(u32::MAX)
    }

    fn mtu(&self) -> u32 {
        u32::MAX
    }

    fn is_tagged(&self) -> bool {
        false
    }

    fn segment_size(&self) -> u32 {
        0
    }

    fn is_cut_into(&self, _kind: Segments) -> bool {
        false
    }

    fn pending_checksum(&self) -> Option<PendingChecksum> {
        None
    }

    fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]> {
        self.get(offset..)?.first_chunk()
    }
}
