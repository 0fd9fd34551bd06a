//! libFuzzer's binary; `OMERTA_FUZZ` names the target.

#![no_main]
#![allow(clippy::panic, reason = "a wrong name must not fuzz another target")]

use std::sync::OnceLock;

use omerta_fuzz::{Target, target};

static TARGET: OnceLock<Target> = OnceLock::new();

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let run = TARGET.get_or_init(|| {
        let name = std::env::var("OMERTA_FUZZ").unwrap_or_default();
        target(&name).unwrap_or_else(|| panic!("OMERTA_FUZZ names no target: {name:?}"))
    });
    run(bytes);
});
