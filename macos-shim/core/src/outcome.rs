//! Outcomes as numbers, and their words as C strings.

use std::ffi::{CStr, CString, c_int};
use std::sync::LazyLock;

use omerta_verdict::{Outcome, Reason};

static WORDS: LazyLock<Vec<CString>> = LazyLock::new(|| {
    let reasons = Reason::ALL.iter().map(|reason| reason.word());
    let words = ["allowed", "answered"].into_iter().chain(reasons);
    // No word holds a zero byte; were there one, it would read as the empty word.
    words
        .map(|word| CString::new(word).unwrap_or_default())
        .collect()
});

pub fn number(outcome: Outcome) -> c_int {
    // Outcomes are counted in one byte.
    outcome.index() as c_int
}

pub fn word(number: c_int) -> Option<&'static CStr> {
    WORDS
        .get(usize::try_from(number).ok()?)
        .map(CString::as_c_str)
}
