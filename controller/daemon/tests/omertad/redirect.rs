//! What guards allow passes the host's stack by where the configuration says so.

use omerta_dataplane::{Guard, Hook};
use omerta_test_support::IDLE;
use serde_json::Value;

use crate::daemon::{Daemon, namespace};
use crate::guests::{give_image, run};

/// Whether the guest's tap redirects.
fn redirects(daemon: &Daemon, interface: &str) -> bool {
    let status = daemon
        .namespace
        .enter(|| Guard::open(interface).and_then(|guard| guard.status()));
    let redirect = status.unwrap().unwrap().redirect;
    redirect.is_some_and(|redirect| redirect.in_force)
}

#[test]
fn guests_are_redirected_as_the_configuration_says_also_those_that_are_taken_over() {
    if Hook::of_this_kernel().unwrap() != Hook::Tcx {
        println!("skipped: this kernel has no TCX");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("omertad.toml");
    let path = file.display().to_string();
    let configure = |text: &str| std::fs::write(&file, text).unwrap();
    let arguments = ["--metrics", "off", "--config", &path];
    let start_again = |daemon: Daemon, text: &str| {
        let (namespace, directory) = daemon.die();
        configure(text);
        Daemon::start_in(namespace, directory, &arguments)
    };

    configure("redirect = true\n");
    let daemon = Daemon::start_in(namespace(), directory, &arguments);
    give_image(&daemon, IDLE);
    let guest = run(&daemon, "alpha");
    let tap = guest["interface"].as_str().unwrap();
    assert!(redirects(&daemon, tap), "{}", daemon.log());

    let daemon = start_again(daemon, "");
    assert!(!redirects(&daemon, tap), "{}", daemon.log());
    let daemon = start_again(daemon, "redirect = true\n");
    assert!(redirects(&daemon, tap), "{}", daemon.log());
    let ended = daemon.post("/v1/guests/alpha/kill", "").json();
    assert_eq!(ended["ended"]["leftovers"], Value::Null, "{ended}");
}
