//! A socket buffer as a [`Frame`].

use aya_ebpf::{helpers::bpf_probe_read_kernel, programs::TcContext};
use omerta_verdict::{Frame, PendingChecksum, SocketBufferLayout};

/// Set at load.
#[unsafe(no_mangle)]
static SKB: SocketBufferLayout = SocketBufferLayout::UNKNOWN;

/// Ethernet, IPv6 and a TCP header without options, or a neighbour solicitation with its option:
/// the furthest that the verdict reads (14 + 40 + 32).
const HEADERS: usize = 86;

/// The linear start of a socket buffer, long enough for every header that the verdict reads.
pub struct SocketBuffer<'a> {
    context: &'a TcContext,
    start: usize,
    end: usize,
}

impl<'a> SocketBuffer<'a> {
    /// Makes the headers linear where they are not (a guest chooses how its frames are laid out).
    #[inline(always)]
    pub fn readable(context: &'a TcContext) -> Option<Self> {
        let wanted = if (context.len() as usize) < HEADERS {
            context.len() as usize
        } else {
            HEADERS
        };
        if context.data() + wanted > context.data_end() {
            context.pull_data(wanted as u32).ok()?;
            if context.data() + wanted > context.data_end() {
                return None;
            }
        }
        Some(Self {
            context,
            start: context.data(),
            end: context.data_end(),
        })
    }
}

const NOWHERE: PendingChecksum = PendingChecksum {
    start: u32::MAX,
    field: u32::MAX,
};

impl SocketBuffer<'_> {
    #[inline(always)]
    fn checksum_places(&self, layout: &SocketBufferLayout) -> Option<PendingChecksum> {
        let (head, data): (u64, u64) = (self.kernel(layout.head)?, self.kernel(layout.data)?);
        let start: u16 = self.kernel(layout.checksum_start)?;
        let offset: u16 = self.kernel(layout.checksum_offset)?;
        let start = (start as u32).wrapping_sub(data.wrapping_sub(head) as u32);
        Some(PendingChecksum {
            start,
            field: start.wrapping_add(offset as u32),
        })
    }

    /// What the kernel's own socket buffer holds at `offset`, which the context does not show.
    #[inline(always)]
    fn kernel<T>(&self, offset: u32) -> Option<T> {
        let skb: *const u8 = self.context.skb.skb.cast();
        // SAFETY: at run time the context is the address of the `struct sk_buff` itself (the
        // verifier rewrites loads from it, and only those); the helper takes any address.
        unsafe { bpf_probe_read_kernel(skb.wrapping_add(offset as usize).cast::<T>()).ok() }
    }
}

impl Frame for SocketBuffer<'_> {
    #[inline(always)]
    fn length(&self) -> u32 {
        self.context.len()
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: the context's socket buffer is valid for the whole run of the program, and the
        // verifier rewrites this load to the kernel's own field.
        unsafe { (*self.context.skb.skb).vlan_present != 0 }
    }

    #[inline(always)]
    fn segment_size(&self) -> u32 {
        // SAFETY: as above; the verifier rewrites this load to the shared info's field.
        unsafe { (*self.context.skb.skb).gso_size }
    }

    #[inline(always)]
    fn pending_checksum(&self) -> Option<PendingChecksum> {
        // SAFETY: the constant is this program's own; the read is volatile because the loader
        // has replaced the value that the compiler saw.
        let layout = unsafe { core::ptr::read_volatile(&raw const SKB) };
        match self.kernel::<u8>(layout.summed) {
            Some(summed) if summed as u32 & layout.summed_mask != layout.summed_mask => None,
            // What cannot be read counts as a checksum in a place that no header has.
            _ => Some(self.checksum_places(&layout).unwrap_or(NOWHERE)),
        }
    }

    #[inline(always)]
    fn bytes<const N: usize>(&self, offset: usize) -> Option<&[u8; N]> {
        let from = self.start + offset;
        if from + N > self.end {
            return None;
        }
        // SAFETY: `start..end` is the buffer's linear part, which holds `N` bytes at `from` (just
        // compared, and proven again by the verifier); nothing writes to it while `self` lives.
        Some(unsafe { &*(from as *const [u8; N]) })
    }
}
