//! Sends the guard's own ARP and neighbour answers back the way the question came.

use aya_ebpf::{
    bindings::BPF_F_INGRESS,
    helpers::{bpf_redirect, bpf_skb_change_tail, bpf_skb_store_bytes},
    macros::map,
    maps::PerCpuArray,
    programs::TcContext,
};
use omerta_verdict::{ANSWER_CAPACITY, Answer, Direction};

/// Marks answers given for the guest, which enter by the interface's ingress hook and so pass
/// `guest_egress`. No guest can set a mark, and the content is judged besides.
const MARK: u32 = 0x6f6d_7274;

/// Per CPU: where an answer is composed; the program's stack has no room for it.
#[map]
static SCRATCH: PerCpuArray<[u8; ANSWER_CAPACITY]> = PerCpuArray::with_max_entries(1, 0);

#[inline(always)]
pub fn is_marked(context: &TcContext) -> bool {
    // SAFETY: the context's socket buffer is valid for the whole run of the program.
    unsafe { (*context.skb.skb).mark == MARK }
}

#[inline(always)]
pub fn clear_mark(context: &TcContext) {
    set_mark(context, 0);
}

#[inline(always)]
fn set_mark(context: &TcContext, mark: u32) {
    // SAFETY: the verifier allows writes to `mark` alone of the fields used here.
    unsafe { (*context.skb.skb).mark = mark }
}

/// Turns the question's buffer into the answer and redirects it. `None` where that failed: the
/// buffer must then be dropped.
#[inline(always)]
pub fn send(context: &TcContext, answer: &Answer, direction: Direction) -> Option<i32> {
    let skb = context.skb.skb;
    let [arp, advertisement] = Answer::LENGTHS;
    // The verifier wants constant lengths.
    let length = if answer.length() == arp {
        arp
    } else {
        advertisement
    };
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: the element is this CPU's own, and programs do not preempt one another on a CPU
    // while the network stack runs them (bottom halves are off).
    let buffer = unsafe { &mut *scratch };
    answer.compose(buffer);
    // SAFETY: `skb` is valid for the whole run; `buffer` holds `ANSWER_CAPACITY` bytes, and both
    // lengths are no greater.
    unsafe {
        if bpf_skb_change_tail(skb, length as u32, 0) != 0 {
            return None;
        }
        let stored = if length == arp {
            bpf_skb_store_bytes(skb.cast(), 0, buffer.as_ptr().cast(), arp as u32, 0)
        } else {
            bpf_skb_store_bytes(
                skb.cast(),
                0,
                buffer.as_ptr().cast(),
                advertisement as u32,
                0,
            )
        };
        if stored != 0 {
            return None;
        }
        let ifindex = (*skb).ifindex;
        let flags = match direction {
            Direction::Egress => 0,
            Direction::Ingress => {
                set_mark(context, MARK);
                BPF_F_INGRESS as u64
            }
        };
        Some(bpf_redirect(ifindex, flags) as i32)
    }
}
