//! A socket buffer as a [`Frame`].

use core::arch::asm;

use aya_ebpf::{
    bindings::{__sk_buff, bpf_func_id},
    helpers::bpf_probe_read_kernel,
    programs::TcContext,
};
use omerta_verdict::{
    Frame, PendingChecksum, ReadInPlace, Segments, SocketBufferLayout, solicitation_sum,
};

/// Set at load.
#[unsafe(no_mangle)]
static SKB: SocketBufferLayout = SocketBufferLayout::UNKNOWN;

/// The furthest that the verdict reads: an ICMPv6 error with what it quotes (14 + 40 + 8 + 40 + 8),
/// or a neighbour solicitation with four options (14 + 40 + 24 + 32).
const HEADERS: usize = 110;

/// Frames of this length fit every interface: the least MTU (RFC 791, 3.2) and an Ethernet header.
const ALWAYS_FITS: u32 = 68 + 14;

/// The linear start of a socket buffer, long enough for every header that the verdict reads.
pub struct SocketBuffer<'a> {
    context: &'a TcContext,
    start: usize,
    end: usize,
}

impl<'a> SocketBuffer<'a> {
    /// Makes the headers linear where they are not (a guest chooses how its frames are laid out). Fails
    /// with the helper's error, or 0 where they are not linear all the same.
    #[inline(always)]
    pub fn readable(context: &'a TcContext) -> Result<Self, i64> {
        let wanted = if (context.len() as usize) < HEADERS {
            context.len() as usize
        } else {
            HEADERS
        };
        if context.data() + wanted > context.data_end() {
            context.pull_data(wanted as u32)?;
            if context.data() + wanted > context.data_end() {
                return Err(0);
            }
        }
        Ok(Self::as_it_is(context))
    }

    /// The linear part, however long.
    #[inline(always)]
    pub fn as_it_is(context: &'a TcContext) -> Self {
        Self {
            context,
            start: context.data(),
            end: context.data_end(),
        }
    }
}

/// [`omerta_verdict::solicitation_sum`] of a frame that was made readable, or [`UNSOUND`]. Nearly all
/// ways through a verdict lead through its loops: the verifier goes them here once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn solicitation(skb: *mut __sk_buff, count: u32, expected: u64) -> u64 {
    let context = TcContext::new(skb);
    solicitation_sum(&SocketBuffer::as_it_is(&context), count, expected).unwrap_or(UNSOUND)
}

/// More than any sum of a solicitation's few words.
const UNSOUND: u64 = u64::MAX;

/// What cannot be read counts as a checksum in a place that no header has.
const NOWHERE: u64 = u64::MAX;

/// A field of [`SKB`]: of them, a frame needs one or two.
#[inline(always)]
fn fixed<T>(field: *const T) -> T {
    // SAFETY: the constant is this program's own; the read is volatile because the loader has
    // replaced the value that the compiler saw.
    unsafe { core::ptr::read_volatile(field) }
}

/// `gso_type`, or more than 32 bits hold where it cannot be read.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn segment_kinds(skb: *mut __sk_buff) -> u64 {
    let kinds = || {
        let head: u64 = kernel(skb, fixed(&raw const SKB.head))?;
        let end: u32 = kernel(skb, fixed(&raw const SKB.end))?;
        let at = head
            .wrapping_add(end as u64)
            .wrapping_add(fixed(&raw const SKB.segment_kinds) as u64);
        // SAFETY: the helper takes any address.
        unsafe { bpf_probe_read_kernel(at as *const u32) }.ok()
    };
    match kinds() {
        Some(kinds) => kinds as u64,
        None => u64::MAX,
    }
}

/// Where a checksum is to be written: its start << 32 | its field.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn checksum_places(skb: *mut __sk_buff) -> u64 {
    pending(skb).unwrap_or(NOWHERE)
}

/// Whether a checksum is still to be written; what cannot be read counts so.
///
/// A helper reads the byte of `ip_summed`, unless the loader has put a load in its place: see
/// [`ReadInPlace`].
#[inline(always)]
fn is_checksum_pending(skb: *mut __sk_buff) -> bool {
    let field = (skb as u64).wrapping_add(fixed(&raw const SKB.summed) as u64);
    let mut byte = 0_u8;
    let mut result: u64;
    // SAFETY: `bpf_probe_read_kernel(&byte, 1, field)`: it writes one byte, and takes any address. At
    // run time the context is the address of the `struct sk_buff` itself. What stands before the call
    // are marks for the loader in a register that the call sets.
    unsafe {
        asm!(
            "r0 = {mark}",
            "r0 = {mark}",
            "call {helper}",
            "r0 = r0",
            mark = const ReadInPlace::SUMMED,
            helper = const bpf_func_id::BPF_FUNC_probe_read_kernel,
            out("r0") result,
            inout("r1") &raw mut byte => _,
            inout("r2") 1_u64 => _,
            inout("r3") field => _,
            inout("r4") skb => _,
            out("r5") _,
            options(nostack),
        );
    }
    // One of the two is 0: the helper's result, or what it has not written. More than a byte is an
    // error.
    let byte = result | byte as u64;
    let mask = fixed(&raw const SKB.summed_mask) as u64;
    byte > u8::MAX as u64 || byte & mask == mask
}

#[inline(always)]
fn pending(skb: *mut __sk_buff) -> Option<u64> {
    let head: u64 = kernel(skb, fixed(&raw const SKB.head))?;
    let data: u64 = kernel(skb, fixed(&raw const SKB.data))?;
    let start: u16 = kernel(skb, fixed(&raw const SKB.checksum_start))?;
    let offset: u16 = kernel(skb, fixed(&raw const SKB.checksum_offset))?;
    let start = (start as u32).wrapping_sub(data.wrapping_sub(head) as u32);
    Some((start as u64) << 32 | start.wrapping_add(offset as u32) as u64)
}

/// What the kernel's own socket buffer holds at `offset`, which the context does not show.
#[inline(always)]
fn kernel<T>(skb: *mut __sk_buff, offset: u32) -> Option<T> {
    let field = skb.cast::<u8>().wrapping_add(offset as usize);
    // SAFETY: at run time the context is the address of the `struct sk_buff` itself (the verifier
    // rewrites loads from it, and only those); the helper takes any address.
    unsafe { bpf_probe_read_kernel(field.cast::<T>().cast_const()).ok() }
}

/// The MTU of the interface that the frame is on, or 0. A helper tells it, unless the loader has put
/// loads in its place: see [`ReadInPlace`].
#[inline(always)]
fn mtu(context: &TcContext) -> u32 {
    let mut told = 0_u32;
    let mut read: u64;
    // SAFETY: `bpf_check_mtu(context, 0, &told, 0, 0)`: the context's socket buffer is valid for the
    // whole run of the program, and the helper writes one word: the MTU, or nothing where it fails.
    // What it answers takes a frame that is yet to be cut as fitting (bpf_skb_check_mtu in
    // net/core/filter.c), so only the MTU is of use. What stands before the call is a mark for the
    // loader in a register that the call sets.
    unsafe {
        asm!(
            "r0 = {mark}",
            "call {helper}",
            "r0 = 0",
            "r0 = r0",
            mark = const ReadInPlace::MTU,
            helper = const bpf_func_id::BPF_FUNC_check_mtu,
            out("r0") read,
            inout("r1") context.skb.skb => _,
            inout("r2") 0_u64 => _,
            inout("r3") &raw mut told => _,
            inout("r4") 0_u64 => _,
            inout("r5") 0_u64 => _,
            options(nostack),
        );
    }
    // One of the two is 0.
    told | read as u32
}

#[inline(always)]
fn is_tagged(context: &TcContext) -> bool {
    // SAFETY: the context's socket buffer is valid for the whole run of the program, and the
    // verifier rewrites this load to the kernel's own field.
    unsafe { (*context.skb.skb).vlan_present != 0 }
}

#[inline(always)]
fn segment_size(context: &TcContext) -> u32 {
    // SAFETY: as above; the verifier rewrites this load to the shared info's field.
    unsafe { (*context.skb.skb).gso_size }
}

/// A socket buffer of which nothing is left to be done and which holds no tag: all that the verdict
/// asks for beside bytes is known before.
pub struct PlainBuffer {
    start: usize,
    end: usize,
    length: u32,
    mtu: u32,
}

impl PlainBuffer {
    /// `None` where a tag, a checksum or a cut is pending.
    #[inline(always)]
    pub fn of(context: &TcContext) -> Option<Self> {
        let length = context.len();
        let mtu = if length > ALWAYS_FITS {
            mtu(context)
        } else {
            u32::MAX
        };
        if is_checksum_pending(context.skb.skb) || is_tagged(context) || segment_size(context) != 0
        {
            return None;
        }
        Some(Self {
            start: context.data(),
            end: context.data_end(),
            length,
            mtu,
        })
    }
}

/// The bytes of a buffer's linear part.
///
/// # Safety
///
/// `start..end` is the linear part, to which nothing writes while the bytes are held.
#[inline(always)]
unsafe fn linear<'a, const N: usize>(
    start: usize,
    end: usize,
    offset: usize,
) -> Option<&'a [u8; N]> {
    let from = start + offset;
    if from + N > end {
        return None;
    }
    // SAFETY: the part holds `N` bytes at `from` (just compared, and proven again by the verifier).
    Some(unsafe { &*(from as *const [u8; N]) })
}

impl Frame for PlainBuffer {
    #[inline(always)]
    fn length(&self) -> u32 {
        self.length
    }

    #[inline(always)]
    fn mtu(&self) -> u32 {
        self.mtu
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        false
    }

    #[inline(always)]
    fn segment_size(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn is_cut_into(&self, _kind: Segments) -> bool {
        false
    }

    #[inline(always)]
    fn pending_checksum(&self) -> Option<PendingChecksum> {
        None
    }

    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]> {
        // SAFETY: these are the linear part's bounds; the verdict only reads.
        unsafe { linear(self.start, self.end, offset) }
    }
}

impl Frame for SocketBuffer<'_> {
    #[inline(always)]
    fn length(&self) -> u32 {
        self.context.len()
    }

    #[inline(always)]
    fn mtu(&self) -> u32 {
        mtu(self.context)
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        is_tagged(self.context)
    }

    #[inline(always)]
    fn segment_size(&self) -> u32 {
        segment_size(self.context)
    }

    #[inline(always)]
    fn is_cut_into(&self, kind: Segments) -> bool {
        let kinds = segment_kinds(self.context.skb.skb);
        kinds <= u32::MAX as u64 && fixed(&raw const SKB).is_cut_into(kinds as u32, kind)
    }

    #[inline(always)]
    fn pending_checksum(&self) -> Option<PendingChecksum> {
        if !is_checksum_pending(self.context.skb.skb) {
            return None;
        }
        let places = checksum_places(self.context.skb.skb);
        Some(PendingChecksum {
            start: (places >> 32) as u32,
            field: places as u32,
        })
    }

    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]> {
        // SAFETY: these are the linear part's bounds; the verdict only reads.
        unsafe { linear(self.start, self.end, offset) }
    }

    #[inline(always)]
    fn solicitation_sum(&self, count: u32, expected: u64) -> Option<u64> {
        match solicitation(self.context.skb.skb, count, expected) {
            UNSOUND => None,
            sum => Some(sum),
        }
    }
}
