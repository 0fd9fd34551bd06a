//! Sends the guard's own ARP and neighbour answers back the way the question came.

use aya_ebpf::{
    bindings::BPF_F_INGRESS,
    helpers::{bpf_redirect, bpf_skb_change_tail, bpf_skb_store_bytes},
    macros::map,
    maps::PerCpuArray,
    programs::TcContext,
};
use omerta_verdict::{ANSWER_CAPACITY, Answer, Direction, Failure};

use crate::diagnostics::tell;
use crate::state::place_of;

/// Marks answers given for the guest, which enter by the interface's ingress hook and so pass
/// `guest_egress`. Random for each network namespace, set at load; 0 marks nothing. No guest can set a
/// mark, and the content is judged besides, by the tap's own guard.
#[unsafe(no_mangle)]
static MARK: u32 = 0;

/// Where an answer waits, and is composed: a program's stack has no room for it.
pub struct Scratch {
    answer: Answer,
    frame: [u8; ANSWER_CAPACITY],
}

/// Per CPU.
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

#[inline(always)]
fn mark() -> u32 {
    // SAFETY: the constant is this program's own; the read is volatile because the loader has
    // replaced the value that the compiler saw.
    unsafe { core::ptr::read_volatile(&raw const MARK) }
}

#[inline(always)]
pub fn is_marked(context: &TcContext) -> bool {
    let mark = mark();
    // SAFETY: the context's socket buffer is valid for the whole run of the program.
    mark != 0 && unsafe { (*context.skb.skb).mark == mark }
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

/// Keeps `answer` for [`send`]; false where there is no place for it.
#[inline(always)]
pub fn keep(answer: &Answer) -> bool {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: the element is this CPU's own, and programs do not preempt one another on a CPU
    // while the network stack runs them (bottom halves are off).
    unsafe { (*scratch).answer = *answer };
    true
}

/// Turns the question's buffer into the answer kept, and redirects it. `None` where that failed:
/// the buffer must then be dropped.
#[inline(always)]
pub fn send(context: &TcContext, direction: Direction) -> Option<i32> {
    let skb = context.skb.skb;
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: as above; [`keep`] has filled the answer in, and until then it is all zero, which
    // is an answer too.
    let Scratch { answer, frame } = unsafe { &mut *scratch };
    answer.compose(frame);
    let [arp, advertisement] = Answer::LENGTHS;
    let written = if answer.length() == arp {
        overwrite(context, frame, arp as u32)
    } else {
        overwrite(context, frame, advertisement as u32)
    };
    if written != 0 {
        tell(place_of(skb), Failure::Answer, written);
        return None;
    }
    let flags = match direction {
        Direction::Egress => 0,
        Direction::Ingress => {
            set_mark(context, mark());
            BPF_F_INGRESS as u64
        }
    };
    // SAFETY: `skb` is valid for the whole run of the program.
    Some(unsafe { bpf_redirect((*skb).ifindex, flags) } as i32)
}

/// Makes the buffer hold the first `length` bytes of `frame`; 0, or the error. Inlined, so that the
/// verifier sees a constant length.
#[inline(always)]
fn overwrite(context: &TcContext, frame: &[u8; ANSWER_CAPACITY], length: u32) -> i64 {
    let skb = context.skb.skb;
    // SAFETY: `skb` is valid for the whole run of the program, and `frame` holds
    // `ANSWER_CAPACITY` bytes, which no answer's length exceeds.
    unsafe {
        match bpf_skb_change_tail(skb, length, 0) {
            0 => bpf_skb_store_bytes(skb.cast(), 0, frame.as_ptr().cast(), length, 0),
            error => error,
        }
    }
}
