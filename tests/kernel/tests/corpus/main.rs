//! Every frame of the corpus (`tests/corpus`): natively, through `BPF_PROG_TEST_RUN`, and through
//! real guarded taps, routed and bridged.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::collections::HashSet;
use std::net::IpAddr;

mod layout;
mod native;
mod passage;
mod test_run;

use omerta_corpus::{Case, Special, cases};
use omerta_dataplane::{GuardConfig, Hook};
use omerta_kernel_tests::hooks;
use omerta_verdict::{MAX_ADDRESSES, Meter, Mode, Outcome, Policy, Rate};

use test_run::Kernel;

use layout::{Layout, Link};

/// The corpus, or the cases whose name holds `OMERTA_CASE`.
fn corpus() -> Vec<Case> {
    let only = std::env::var("OMERTA_CASE").unwrap_or_default();
    let cases =
        cases().unwrap_or_else(|error| panic!("{error}: {:?}", std::error::Error::source(&error)));
    cases
        .into_iter()
        .filter(|case| case.name.contains(&only))
        .collect()
}

/// The guest's guard: with as many addresses as a guest may own, the last of which is
/// `guest-eighth` in the cast.
fn guest_config(mode: Mode) -> GuardConfig {
    let mut config = omerta_kernel_tests::config(mode);
    let more = (11..=15).map(|last| IpAddr::from([10, 77, 0, last]));
    config.addresses.extend(more);
    assert_eq!(config.addresses.len(), MAX_ADDRESSES);
    config
}

/// Its policy in a case of `guard`.
fn guest_policy(mode: Mode, guard: Special) -> Policy {
    let mut config = guest_config(mode);
    if guard == Special::LinkGateway {
        config.gateways[1] = "fe80::1".parse().unwrap();
    }
    let mut policy = config.policy("guest").unwrap();
    // Without a rate of events: each drop is told of.
    policy.rates = Default::default();
    if guard == Special::RatesUsedUp {
        policy.rates = [Rate::per_second(1, 0); Meter::COUNT];
        for events in [Meter::Events, Meter::Violations] {
            policy.rates[events as usize] = Rate::UNLIMITED;
        }
    }
    policy
}

fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Allowed => "allowed",
        Outcome::Answered => "answered",
        Outcome::Dropped(reason) => reason.word(),
    }
}

/// Fails where any case did, naming all of them.
fn judge(what: &str, count: usize, wrong: Vec<String>) {
    let failed = wrong.len();
    assert!(
        wrong.is_empty(),
        "{what}: {failed} of {count} cases are wrong:\n{}",
        wrong.join("\n")
    );
    println!("{what}: {count} cases, each as expected");
    assert!(count > 0 || std::env::var_os("OMERTA_CASE").is_some());
}

#[test]
fn the_verdict_is_as_each_case_says() {
    let cases = corpus();
    let all = omerta_corpus::cases().unwrap();
    let mut wrong = Vec::new();
    for case in &cases {
        let seen = native::outcome(case, &all);
        if seen != case.present() {
            wrong.push(format!(
                "{}: {} and not {}",
                case.name,
                word(seen),
                word(case.present())
            ));
        }
    }
    judge("native", cases.len(), wrong);
    for case in cases.iter().filter(|case| case.today.is_some()) {
        let (today, expect) = (word(case.present()), word(case.expect));
        println!("to do: {} is {today} and ought to be {expect}", case.name);
    }
}

#[test]
fn the_kernels_verdict_is_as_each_case_says() {
    let all = omerta_corpus::cases().unwrap();
    let cases: Vec<_> = corpus().into_iter().filter(test_run::takes).collect();
    let mut wrong = Vec::new();
    let guards: HashSet<_> = cases.iter().map(|case| (case.mode, case.guard)).collect();
    for (mode, guard) in guards {
        let mut kernel = Kernel::new(mode, guard);
        let cases = cases
            .iter()
            .filter(|case| (case.mode, case.guard) == (mode, guard));
        wrong.extend(cases.filter_map(|case| kernel.differs(case, &all)));
    }
    judge("TEST_RUN", cases.len(), wrong);
}

/// Whether what the guest's guard allows passes the stack by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Path {
    Stack,
    Redirect,
}

fn through_taps(link: Link, path: Path) {
    let (mut count, mut wrong) = (0, Vec::new());
    let all = omerta_corpus::cases().unwrap();
    for hook in hooks().unwrap() {
        if path == Path::Redirect && *hook != Hook::Tcx {
            continue;
        }
        for offload in [false, true] {
            let mut layout = Layout::new(link, offload, *hook);
            if path == Path::Redirect {
                layout.redirect();
            }
            for mode in Mode::ALL {
                let cases: Vec<_> = corpus()
                    .into_iter()
                    .filter(|case| case.mode == mode && case.vnet.is_some() == offload)
                    // What is not yet judged as it must be may go anywhere.
                    .filter(|case| case.today.is_none() && case.guard == Special::Usual)
                    // Only a bridge keeps a tag beside the bytes that it has taken off.
                    .filter(|case| case.vlan.is_none() || link == Link::Bridged)
                    .collect();
                if cases.is_empty() {
                    continue;
                }
                count += cases.len();
                layout.set_mode(mode);
                for case in &cases {
                    if let Err(problem) = passage::passes(&mut layout, case, &all) {
                        let (name, why) = (&case.name, &case.why);
                        wrong.push(format!(
                            "{}, {} mode, {name} ({why}): {problem}",
                            hook.word(),
                            mode.word()
                        ));
                    }
                }
                wrong.extend(
                    layout
                        .strays()
                        .into_iter()
                        .map(|stray| format!("late: {stray}")),
                );
            }
            if path == Path::Redirect && std::env::var_os("OMERTA_CASE").is_none() {
                let (redirected, _) = layout.redirected();
                assert!(redirected > 0, "nothing passed the stack by");
            }
        }
    }
    judge(&format!("real taps, {link:?}"), count, wrong);
}

#[test]
fn routed_taps_carry_what_each_case_says_and_nothing_else() {
    through_taps(Link::Routed, Path::Stack);
}

#[test]
fn what_is_redirected_arrives_as_each_case_says_and_nothing_else_does() {
    // Where the kernel has no TCX nothing can be redirected.
    if hooks().unwrap().contains(&Hook::Tcx) {
        through_taps(Link::Routed, Path::Redirect);
    }
}

#[test]
fn bridged_taps_carry_what_each_case_says_and_nothing_else() {
    through_taps(Link::Bridged, Path::Stack);
}
