//! What is fixed when a program is loaded.

/// Byte offsets in `struct sk_buff` (include/linux/skbuff.h), found by userspace in the running
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
    };
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
