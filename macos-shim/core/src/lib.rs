//! The packet verdict behind a C ABI, declared in `include/omerta_verdict.h`: for network
//! extensions on hosts without BPF, which hold a frame in memory and ask what to do with it.
//!
//! Only filtered mode: conntrack and sampled need state that belongs to the host's own shell.

mod guard;
mod outcome;

use std::ffi::{c_char, c_int};

use omerta_verdict::{ANSWER_CAPACITY, Outcome, Verdict, egress, ingress};

pub use guard::{CAddress, CEndpoint, CPolicy, OwnedGuard};

const INVALID: c_int = -1;

/// `omerta_guard_new`.
///
/// # Safety
/// `policy` is null or points to a policy whose arrays hold as many elements as it says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omerta_guard_new(policy: *const CPolicy) -> *mut OwnedGuard {
    // SAFETY: the caller's promise.
    let guard = unsafe { policy.as_ref().and_then(|policy| OwnedGuard::new(policy)) };
    guard.map_or(std::ptr::null_mut(), |guard| Box::into_raw(Box::new(guard)))
}

/// `omerta_guard_free`.
///
/// # Safety
/// `guard` is null or came from [`omerta_guard_new`], and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omerta_guard_free(guard: *mut OwnedGuard) {
    if !guard.is_null() {
        // SAFETY: the caller's promise: it came from `Box::into_raw` and is freed once.
        drop(unsafe { Box::from_raw(guard) });
    }
}

/// `omerta_decide`.
///
/// # Safety
/// `guard` is null or live; `frame` is null or holds `frame_length` bytes; `answer` is null or
/// holds [`ANSWER_CAPACITY`] bytes; `answer_length` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn omerta_decide(
    guard: *const OwnedGuard,
    direction: c_int,
    frame: *const u8,
    frame_length: usize,
    answer: *mut [u8; ANSWER_CAPACITY],
    answer_length: *mut usize,
) -> c_int {
    // SAFETY: the caller's promise for each of the three.
    let (guard, answer, answer_length) =
        unsafe { (guard.as_ref(), answer.as_mut(), answer_length.as_mut()) };
    let (Some(guard), Some(answer), Some(answer_length)) = (guard, answer, answer_length) else {
        return INVALID;
    };
    *answer_length = 0;
    if frame.is_null() || frame_length > isize::MAX as usize {
        return INVALID;
    }
    // SAFETY: not null, not longer than a slice may be, and readable by the caller's promise.
    let frame = unsafe { std::slice::from_raw_parts(frame, frame_length) };
    let verdict = match direction {
        0 => egress(frame, &guard.as_guard()),
        1 => ingress(frame, &guard.as_guard()),
        _ => return INVALID,
    };
    if let Verdict::Answer(reply) = &verdict {
        reply.compose(answer);
        *answer_length = reply.length();
    }
    outcome::number(verdict.outcome())
}

/// `omerta_outcome_word`. The text lives as long as the program.
#[unsafe(no_mangle)]
pub extern "C" fn omerta_outcome_word(outcome: c_int) -> *const c_char {
    outcome::word(outcome).map_or(std::ptr::null(), |word| word.as_ptr())
}

// The header's constants are the verdict's own.
const _: () = assert!(ANSWER_CAPACITY == 86);
const _: () = assert!(Outcome::Allowed.index() == 0 && Outcome::Answered.index() == 1);
