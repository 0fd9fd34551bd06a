//! Whether this kernel can run guards: it loads the programs, and has a hook for them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use omerta_dataplane::{Guard, Hook, Programs};
use omerta_kernel_tests::{config, judging, remove_left_overs};
use omerta_test_support::{Namespace, Tap};
use omerta_verdict::Mode;

#[test]
fn a_kernel_loads_the_programs_and_has_a_hook_for_them() {
    let hook = Hook::of_this_kernel().unwrap();
    // Those of the other modes are the same as the first.
    for mode in [Mode::Filtered, Mode::Conntrack] {
        Programs::load("support", mode).unwrap();
    }
    let namespace = Namespace::new("ot-hook").unwrap();
    namespace
        .enter(|| {
            remove_left_overs().unwrap();
            let _tap = Tap::create("guest").unwrap();
            let guard = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
            guard.verify().unwrap();
            assert_eq!(judging(hook, "guest").unwrap(), [1, 1]);
            guard.detach().unwrap();
        })
        .unwrap();
    // The kernel matrix reads this.
    println!("hook: {}", hook.word());
}
