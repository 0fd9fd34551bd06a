//! The guard's two programs, attached by TCX to a guest's interface. Each is a shell: it makes
//! the headers readable, asks the verdict, counts the outcome and carries it out.
#![no_std]
#![no_main]

mod accounting;
mod answer;
mod buffer;
mod state;

use aya_ebpf::{macros::classifier, programs::TcContext};
use omerta_verdict::{Direction, Outcome, Reason, Verdict, egress, ingress, is_answer_for_guest};

use crate::buffer::SocketBuffer;
use crate::state::KernelGuard;

/// `TCX_NEXT` (`TC_ACT_UNSPEC`): the guard objects to nothing; what else the operator attached
/// behind it still decides.
const NEXT: i32 = -1;
/// `TC_ACT_SHOT`.
const SHOT: i32 = 2;

/// What the guest sends: the interface's TCX ingress hook.
#[classifier]
pub fn guest_egress(context: TcContext) -> i32 {
    if answer::is_marked(&context) {
        let frame = SocketBuffer::readable(&context);
        let guard = KernelGuard::read();
        if let (Some(frame), Some(policy)) = (frame, omerta_verdict::Guard::policy(&guard)) {
            if is_answer_for_guest(&frame, policy) {
                answer::clear_mark(&context);
                return NEXT;
            }
        }
    }
    judge(&context, Direction::Egress)
}

/// What is sent to the guest: the interface's TCX egress hook.
#[classifier]
pub fn guest_ingress(context: TcContext) -> i32 {
    judge(&context, Direction::Ingress)
}

#[inline(always)]
fn judge(context: &TcContext, direction: Direction) -> i32 {
    let length = context.len();
    let guard = KernelGuard::read();
    let verdict = match SocketBuffer::readable(context) {
        Some(frame) => match direction {
            Direction::Egress => egress(&frame, &guard),
            Direction::Ingress => ingress(&frame, &guard),
        },
        None => Verdict::Drop(Reason::Unreadable),
    };
    match verdict {
        Verdict::Allow => {
            accounting::count(direction, Outcome::Allowed, length);
            NEXT
        }
        Verdict::Answer(reply) => match answer::send(context, &reply, direction) {
            Some(action) => {
                accounting::count(direction, Outcome::Answered, length);
                action
            }
            None => drop(context, direction, Reason::AnswerFailed, length),
        },
        Verdict::Drop(reason) => drop(context, direction, reason, length),
    }
}

#[inline(always)]
fn drop(context: &TcContext, direction: Direction, reason: Reason, length: u32) -> i32 {
    accounting::count(direction, Outcome::Dropped(reason), length);
    accounting::report(context, direction, reason, length);
    SHOT
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
