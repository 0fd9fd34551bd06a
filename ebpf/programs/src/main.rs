//! The two programs that judge for all guards of a network namespace. A guard's own programs, on a guest's
//! interface by TCX or clsact, do no more than name the guard and go on here (`ebpf/dataplane/src/entry.rs`).
//! Each is a shell: it makes the headers readable, asks the verdict, counts the outcome and carries it out.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch, core_intrinsics)]
#![allow(internal_features, reason = "compare-and-swap, order of loads")]

mod accounting;
mod answer;
mod buffer;
mod diagnostics;
mod flows;
mod state;

use aya_ebpf::{bindings::__sk_buff, macros::classifier, programs::TcContext};
use omerta_verdict::{
    Direction, Failure, OWN_ANSWERS_COUNTER, Outcome, RX_COUNTER, Reason, Verdict, general_egress,
    general_ingress, is_answer_for_guest, question_egress, question_ingress, usual_egress,
    usual_ingress,
};

use crate::accounting::{Counters, count_unguarded};
use crate::buffer::{PlainBuffer, SocketBuffer};
use crate::diagnostics::tell;
use crate::state::{KernelGuard, place_of};

/// `TCX_NEXT` (`TC_ACT_UNSPEC`): the guard objects to nothing; what else the operator attached
/// behind it still decides.
const NEXT: i32 = -1;
/// `TC_ACT_SHOT`.
const SHOT: i32 = 2;

const ALLOWED: u32 = Outcome::Allowed.index() as u32;
const ANSWERED: u32 = Outcome::Answered.index() as u32;
/// Of a guard without policy, and where the reasons begin.
const FIRST_REASON: u32 = Outcome::Dropped(Reason::NoPolicy).index() as u32;
const UNREADABLE: u32 = Outcome::Dropped(Reason::Unreadable).index() as u32;
const ANSWER_FAILED: u32 = Outcome::Dropped(Reason::AnswerFailed).index() as u32;
const POLICY_CHANGING: u32 = Outcome::Dropped(Reason::PolicyChanging).index() as u32;
/// No outcome: the frame is to be judged (again).
const OPEN: u32 = u32::MAX;
/// No outcome: the frame asks for a neighbour.
const QUESTION: u32 = u32::MAX - 1;
/// How often a frame is judged while its policy changes.
const TRIES: u32 = 4;

/// What the guest sends: the interface's ingress hook.
#[classifier]
pub fn guest_egress(context: TcContext) -> i32 {
    let Some((guard, counters)) = guarded(&context, Direction::Egress) else {
        return SHOT;
    };
    if answer::is_marked(&context) && settled(|| is_own_answer(context.skb.skb)) == 1 {
        counters.count(OWN_ANSWERS_COUNTER as u32, context.len());
        answer::clear_mark(&context);
        return NEXT;
    }
    carry_out(&context, &guard, counters, Direction::Egress)
}

/// What is sent to the guest: the interface's egress hook.
#[classifier]
pub fn guest_ingress(context: TcContext) -> i32 {
    match guarded(&context, Direction::Ingress) {
        Some((guard, counters)) => carry_out(&context, &guard, counters, Direction::Ingress),
        None => SHOT,
    }
}

/// The guard of the frame's tap and its counters. Where it is not in its place, the frame is counted apart.
#[inline(always)]
fn guarded(context: &TcContext, direction: Direction) -> Option<(KernelGuard, Counters)> {
    let guard = KernelGuard::of_tap(context.skb.skb);
    let found = guard.and_then(|guard| Some((guard, Counters::of(guard.place(), direction)?)));
    if found.is_none() {
        count_unguarded(context.len());
    }
    found
}

#[inline(always)]
fn carry_out(
    context: &TcContext,
    guard: &KernelGuard,
    counters: Counters,
    direction: Direction,
) -> i32 {
    let (skb, length) = (context.skb.skb, context.len());
    counters.count(RX_COUNTER as u32, length);
    let mut outcome = judge_usual(context, guard, direction);
    if outcome == OPEN {
        outcome = settled(|| match direction {
            Direction::Egress => judge_egress(skb),
            Direction::Ingress => judge_ingress(skb),
        });
        if outcome == QUESTION {
            outcome = settled(|| match direction {
                Direction::Egress => answer_egress(skb),
                Direction::Ingress => answer_ingress(skb),
            });
        }
    }
    if outcome == ALLOWED {
        counters.count(ALLOWED, length);
        return NEXT;
    }
    if outcome == ANSWERED {
        let action = send_answer(skb, direction as u32);
        if action != SHOT {
            counters.count(ANSWERED, length);
            return action;
        }
        outcome = ANSWER_FAILED;
    }
    counters.count(outcome, length);
    report(skb, direction as u32, outcome - FIRST_REASON, length);
    SHOT
}

/// What `judge` says of one policy, or [`POLICY_CHANGING`].
#[inline(always)]
fn settled(judge: impl Fn() -> u32) -> u32 {
    let mut tries = 0;
    while tries < TRIES {
        let outcome = judge();
        if outcome != OPEN {
            return outcome;
        }
        tries += 1;
    }
    POLICY_CHANGING
}

/// The outcome of what is usual, without a call; [`OPEN`] for what is not.
#[inline(always)]
fn judge_usual(context: &TcContext, guard: &KernelGuard, direction: Direction) -> u32 {
    let Some(frame) = PlainBuffer::of(context) else {
        return OPEN;
    };
    let Some(straight) = guard.straight() else {
        return OPEN;
    };
    let verdict = match direction {
        Direction::Egress => usual_egress(&frame, &straight),
        Direction::Ingress => usual_ingress(&frame, &straight),
    };
    match verdict {
        // A flow that is not known yet; a transport header that is not in the linear part, where the
        // straight line looks for it.
        Some(Verdict::Drop(Reason::FlowQuota | Reason::TransportHeader)) => OPEN,
        Some(verdict) if guard.holds() => verdict.outcome().index() as u32,
        _ => OPEN,
    }
}

// The verifier judges each of these functions once and for itself, whatever led to the call. They
// take and give plain numbers, so no path through one multiplies the paths through another.

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn judge_egress(skb: *mut __sk_buff) -> u32 {
    judge(&TcContext::new(skb), Direction::Egress)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn judge_ingress(skb: *mut __sk_buff) -> u32 {
    judge(&TcContext::new(skb), Direction::Ingress)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn answer_egress(skb: *mut __sk_buff) -> u32 {
    judge_question(&TcContext::new(skb), Direction::Egress)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn answer_ingress(skb: *mut __sk_buff) -> u32 {
    judge_question(&TcContext::new(skb), Direction::Ingress)
}

/// 1 where the frame is no more than an answer that this guard could have given for its guest;
/// [`OPEN`] where the policy has changed meanwhile.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn is_own_answer(skb: *mut __sk_buff) -> u32 {
    let context = TcContext::new(skb);
    let Ok(frame) = SocketBuffer::readable(&context) else {
        return 0;
    };
    let Some(guard) = KernelGuard::read(place_of(context.skb.skb)) else {
        return 0;
    };
    let own = is_answer_for_guest(&frame, &guard) as u32;
    if guard.holds() { own } else { OPEN }
}

/// What the program is to return, or `SHOT` where the answer could not be written.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn send_answer(skb: *mut __sk_buff, direction: u32) -> i32 {
    answer::send(&TcContext::new(skb), named(direction)).unwrap_or(SHOT)
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn report(skb: *mut __sk_buff, direction: u32, reason: u32, length: u32) -> u32 {
    accounting::report(&TcContext::new(skb), named(direction), reason as u8, length);
    0
}

/// The direction of a number, which is all that the functions above may be given.
#[inline(always)]
fn named(direction: u32) -> Direction {
    if direction == Direction::Egress as u32 {
        Direction::Egress
    } else {
        Direction::Ingress
    }
}

/// The outcome's index, or [`QUESTION`]; [`OPEN`] where the policy has changed meanwhile.
#[inline(always)]
fn judge(context: &TcContext, direction: Direction) -> u32 {
    let frame = match SocketBuffer::readable(context) {
        Ok(frame) => frame,
        Err(error) => {
            tell(place_of(context.skb.skb), Failure::Unreadable, error);
            return UNREADABLE;
        }
    };
    let Some(guard) = KernelGuard::read(place_of(context.skb.skb)) else {
        return FIRST_REASON;
    };
    let verdict = match direction {
        Direction::Egress => general_egress(&frame, &guard),
        Direction::Ingress => general_ingress(&frame, &guard),
    };
    let outcome = match verdict {
        Some(verdict) => verdict.outcome().index() as u32,
        None => QUESTION,
    };
    if guard.holds() { outcome } else { OPEN }
}

/// The outcome's index for a frame that [`judge`] has found to be a question, whose headers it has
/// made readable; an answer is kept for [`send_answer`].
#[inline(always)]
fn judge_question(context: &TcContext, direction: Direction) -> u32 {
    let frame = SocketBuffer::as_it_is(context);
    let Some(guard) = KernelGuard::read(place_of(context.skb.skb)) else {
        return FIRST_REASON;
    };
    let verdict = match direction {
        Direction::Egress => question_egress(&frame, &guard),
        Direction::Ingress => question_ingress(&frame, &guard),
    };
    let outcome = match &verdict {
        Verdict::Answer(answer) if !answer::keep(answer) => ANSWER_FAILED,
        verdict => verdict.outcome().index() as u32,
    };
    if guard.holds() { outcome } else { OPEN }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
