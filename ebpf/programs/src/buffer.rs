//! A socket buffer as a [`Frame`].

use aya_ebpf::programs::TcContext;
use omerta_verdict::Frame;

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
