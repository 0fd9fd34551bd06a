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

/// Marks in the compiled programs where the loader may put loads from the kernel's own structures in
/// the place of a helper's call, which costs more than what it reads. Each mark is the constant of a
/// `r0 = mark`.
///
/// The kernel must have `bpf_rdonly_cast` (Linux 6.2), which makes an address one of a structure that
/// may be read, at no cost.
pub struct ReadInPlace;

impl ReadInPlace {
    /// `r0 = mark; r0 = mark; call bpf_probe_read_kernel; r0 = r0`, the `struct sk_buff` in `r4`, becomes
    /// `r1 = r4; r2 = (type of struct sk_buff); call bpf_rdonly_cast; r0 = (its byte of ip_summed)`.
    pub const SUMMED: i32 = 0x6f6d_7301;
    /// `r0 = mark; call bpf_check_mtu; r0 = 0; r0 = r0`, the `struct sk_buff` in `r1`, becomes
    /// `r2 = (type of struct sk_buff); call bpf_rdonly_cast; r0 = dev; r0 = (its mtu)`.
    pub const MTU: i32 = 0x6f6d_7302;
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
