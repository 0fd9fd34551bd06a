//! The guard's two programs, attached by TCX or clsact to a guest's interface. Each is a shell: it
//! makes the headers readable, asks the verdict, counts the outcome and carries it out.
#![no_std]
#![no_main]
#![feature(core_intrinsics)]
#![allow(internal_features, reason = "compare-and-swap")]

mod accounting;
mod answer;
mod buffer;
mod diagnostics;
mod flows;
mod state;

use aya_ebpf::{bindings::__sk_buff, macros::classifier, programs::TcContext};
use omerta_verdict::{
    Direction, OWN_ANSWERS_COUNTER, Outcome, RX_COUNTER, Reason, Verdict, egress, ingress,
    is_answer_for_guest,
};

use crate::accounting::Counters;
use crate::buffer::SocketBuffer;
use crate::diagnostics::{Failure, tell};
use crate::state::KernelGuard;

/// `TCX_NEXT` (`TC_ACT_UNSPEC`): the guard objects to nothing; what else the operator attached
/// behind it still decides.
const NEXT: i32 = -1;
/// `TC_ACT_SHOT`.
const SHOT: i32 = 2;

const ALLOWED: u32 = Outcome::Allowed.index() as u32;
const ANSWERED: u32 = Outcome::Answered.index() as u32;
const FIRST_REASON: u32 = Outcome::Dropped(Reason::NoPolicy).index() as u32;
const UNREADABLE: u32 = Outcome::Dropped(Reason::Unreadable).index() as u32;
const ANSWER_FAILED: u32 = Outcome::Dropped(Reason::AnswerFailed).index() as u32;

/// What the guest sends: the interface's ingress hook.
#[classifier]
pub fn guest_egress(context: TcContext) -> i32 {
    let Some(counters) = Counters::of(Direction::Egress) else {
        return SHOT;
    };
    if answer::is_marked(&context) && is_own_answer(context.skb.skb) == 1 {
        counters.count(OWN_ANSWERS_COUNTER as u32, context.len());
        answer::clear_mark(&context);
        return NEXT;
    }
    carry_out(&context, counters, Direction::Egress)
}

/// What is sent to the guest: the interface's egress hook.
#[classifier]
pub fn guest_ingress(context: TcContext) -> i32 {
    match Counters::of(Direction::Ingress) {
        Some(counters) => carry_out(&context, counters, Direction::Ingress),
        None => SHOT,
    }
}

#[inline(always)]
fn carry_out(context: &TcContext, counters: Counters, direction: Direction) -> i32 {
    let (skb, length) = (context.skb.skb, context.len());
    counters.count(RX_COUNTER as u32, length);
    let outcome = match direction {
        Direction::Egress => judge_egress(skb),
        Direction::Ingress => judge_ingress(skb),
    };
    if outcome == ALLOWED {
        counters.count(ALLOWED, length);
        return NEXT;
    }
    let mut outcome = outcome;
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

/// 1 where the frame is no more than an answer that this guard could have given for its guest.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn is_own_answer(skb: *mut __sk_buff) -> u32 {
    let context = TcContext::new(skb);
    match SocketBuffer::readable(&context) {
        Ok(frame) => is_answer_for_guest(&frame, &KernelGuard::read()) as u32,
        Err(_) => 0,
    }
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

/// The outcome's index; an answer is kept for [`send_answer`].
#[inline(always)]
fn judge(context: &TcContext, direction: Direction) -> u32 {
    let frame = match SocketBuffer::readable(context) {
        Ok(frame) => frame,
        Err(error) => {
            tell(Failure::Unreadable, direction, error);
            return UNREADABLE;
        }
    };
    let guard = KernelGuard::read();
    let verdict = match direction {
        Direction::Egress => egress(&frame, &guard),
        Direction::Ingress => ingress(&frame, &guard),
    };
    match &verdict {
        Verdict::Answer(answer) if !answer::keep(answer) => ANSWER_FAILED,
        verdict => verdict.outcome().index() as u32,
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
