//! Whether this kernel can run guards: it loads the programs, or refuses all of it in one word.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use omerta_dataplane::{Guard, GuardError, Programs, kernel_support};
use omerta_kernel_tests::config;
use omerta_test_support::{Namespace, Tap};
use omerta_verdict::Mode;

#[test]
fn a_kernel_loads_every_mode_or_is_refused() {
    let Err(refusal) = kernel_support() else {
        for mode in Mode::ALL {
            Programs::load("support", mode).unwrap();
        }
        return;
    };
    assert!(matches!(refusal, GuardError::KernelTooOld { .. }));
    let namespace = Namespace::new("ot-old").unwrap();
    let attached = namespace.enter(|| {
        let _tap = Tap::create("guest").unwrap();
        Guard::attach("guest", &config(Mode::Filtered)).map(drop)
    });
    assert!(matches!(
        attached.unwrap(),
        Err(GuardError::KernelTooOld { .. })
    ));
    // The kernel matrix reads this.
    println!("refused: {refusal}");
}
