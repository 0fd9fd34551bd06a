//! What is fixed when a program is loaded.

use crate::Segments;

/// Byte offsets in `struct sk_buff` and what goes with it (include/linux/skbuff.h), found by userspace in the running
/// kernel's own type information and fixed when a program is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SocketBufferLayout {
    /// `head`: address of the buffer's first byte.
    pub head: u32,
    /// `data`: address of the frame's first byte, within the buffer.
    pub data: u32,
    /// `csum_start`, counted from `head`.
    pub checksum_start: u32,
    /// `csum_offset`, counted from `csum_start`.
    pub checksum_offset: u32,
    /// The byte that holds `ip_summed`.
    pub summed: u32,
    /// The bits of that byte that are `ip_summed`; all are set for `CHECKSUM_PARTIAL`.
    pub summed_mask: u32,
    /// `end`: where `struct skb_shared_info` starts, counted from `head`; four bytes.
    pub end: u32,
    /// `gso_type` in `struct skb_shared_info`; four bytes.
    pub segment_kinds: u32,
    /// The bit of `gso_type` for each of [`Segments`]; 0 where the kernel has none.
    pub segments: [u32; Segments::COUNT],
    /// The bits of `gso_type` that may stand beside: who asked, and details of TCP.
    pub segment_details: u32,
}

impl SocketBufferLayout {
    /// Not filled in.
    pub const UNKNOWN: Self = Self {
        head: 0,
        data: 0,
        checksum_start: 0,
        checksum_offset: 0,
        summed: 0,
        summed_mask: 0,
        end: 0,
        segment_kinds: 0,
        segments: [0; Segments::COUNT],
        segment_details: 0,
    };

    /// Whether `gso_type` asks for segments of `kind` and nothing else.
    #[inline(always)]
    pub const fn is_cut_into(&self, gso_type: u32, kind: Segments) -> bool {
        let bit = match kind {
            Segments::TcpV4 => self.segments[0],
            Segments::TcpV6 => self.segments[1],
            Segments::Udp => self.segments[2],
        };
        bit != 0 && gso_type & !self.segment_details == bit
    }
}

/// What a program takes from the world besides frames and maps. Tests fix it at load, so that the
/// same verdict can be computed again; otherwise clock and chance are the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct FixedInputs {
    /// The time in nanoseconds of `CLOCK_MONOTONIC`; 0 where nothing is fixed.
    pub now_ns: u64,
    /// The random number.
    pub random: u32,
    /// Zero.
    pub padding: u32,
}

impl FixedInputs {
    /// Clock and chance are the kernel's.
    pub const NONE: Self = Self {
        now_ns: 0,
        random: 0,
        padding: 0,
    };
}
