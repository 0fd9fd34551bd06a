//! In network namespaces of their own, with the tools that a workload would use.

use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};

use super::*;

/// Runs `test` in a new network namespace whose loopback is up; false where this process may make none.
fn in_new_network(test: impl FnOnce() + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: network namespaces need root");
        return;
    }
    let inside = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        run("ip link set lo up");
        test();
    });
    if let Err(panic) = inside.join() {
        std::panic::resume_unwind(panic);
    }
}

fn run(command: &str) {
    let mut words = command.split(' ');
    let done = Command::new(words.next().unwrap())
        .args(words)
        .output()
        .unwrap();
    assert!(
        done.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
}

fn names(seal: &mut Seal) -> Vec<&'static str> {
    let (changes, error) = seal.changes();
    assert!(error.is_none(), "{error:?}");
    changes.names().collect()
}

#[test]
fn what_nobody_touches_has_not_changed() {
    in_new_network(|| {
        run("nft add table inet filter");
        let mut seal = Seal::new().unwrap();
        for _ in 0..20 {
            assert_eq!(names(&mut seal), [""; 0]);
        }
    });
}

#[test]
fn a_changed_rule_shows_also_when_it_is_changed_back() {
    in_new_network(|| {
        run("nft add table inet filter");
        run(
            "nft add chain inet filter output { type filter hook output priority 0 ; policy drop ; }",
        );
        let mut seal = Seal::new().unwrap();
        run("nft flush ruleset");
        assert_eq!(names(&mut seal), ["firewall"]);
        run("nft add table inet filter");
        run(
            "nft add chain inet filter output { type filter hook output priority 0 ; policy drop ; }",
        );
        assert_eq!(names(&mut seal), ["firewall"]);
    });
}

#[test]
fn each_way_to_lead_packets_elsewhere_shows_as_routes() {
    for command in [
        "ip route add 192.0.2.0/24 dev lo",
        "ip rule add from 192.0.2.1 lookup 100",
        "ip addr add 192.0.2.1/32 dev lo",
        "ip link add veth0 type veth peer name veth1",
        "ip link set lo mtu 1000",
        "ip link set lo down",
        "ip route replace local 127.0.0.0/8 dev lo table local src 127.0.0.2",
    ] {
        in_new_network(move || {
            let mut seal = Seal::new().unwrap();
            run(command);
            assert_eq!(names(&mut seal), ["routes"], "{command}");
        });
    }
}

#[test]
fn the_kernel_tells_of_a_change_at_once() {
    in_new_network(|| {
        let mut seal = Seal::new().unwrap();
        let told = |seal: &Seal| {
            let mut ready = seal
                .told_by()
                .map(|fd| nix::poll::PollFd::new(fd, nix::poll::PollFlags::POLLIN));
            nix::poll::poll(&mut ready, nix::poll::PollTimeout::from(50_u16)).unwrap()
        };
        assert_eq!(told(&seal), 0);
        run("nft add table inet filter");
        assert_eq!(told(&seal), 1);
        run("ip link set lo mtu 1000");
        assert_eq!(told(&seal), 2);
        assert_eq!(names(&mut seal), ["firewall", "routes"]);
        assert_eq!(told(&seal), 0);
    });
}

#[test]
fn old_iptables_rules_count_and_their_counters_do_not() {
    if !Command::new("iptables-legacy")
        .args(["-t", "filter", "-L"])
        .output()
        .is_ok_and(|out| out.status.success())
    {
        println!("skipped: this host has no old iptables");
        return;
    }
    in_new_network(|| {
        run("iptables-legacy -A OUTPUT -p udp --dport 9 -j ACCEPT");
        let mut seal = Seal::new().unwrap();
        run("ping -c 1 -q 127.0.0.1");
        assert_eq!(names(&mut seal), [""; 0]);
        run("iptables-legacy -R OUTPUT 1 -p udp --dport 10 -j ACCEPT");
        assert_eq!(names(&mut seal), ["firewall"]);
    });
}

const RULES: [&str; 3] = [
    "add table inet filter",
    "add chain inet filter output { type filter hook output priority 0 ; policy drop ; }",
    "add rule inet filter output udp dport 51820 accept",
];

/// As the images load theirs: all in one change.
fn load(port: u16) {
    let rules = RULES.map(|rule| rule.replace("51820", &port.to_string()));
    let script = format!("flush ruleset\n{}\n", rules.join("\n"));
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), script).unwrap();
    run(&format!("nft -f {}", file.path().display()));
}

fn sealed() -> (Seal, SocketAddrV4) {
    load(51820);
    run("ip addr add 192.0.2.1/24 dev lo");
    (Seal::new().unwrap(), "198.51.100.7:4500".parse().unwrap())
}

#[test]
fn a_guest_that_follows_its_consumer_is_sealed_as_it_is_then() {
    in_new_network(|| {
        let (mut seal, consumer) = sealed();
        let follow = || {
            run("ip route replace 198.51.100.7 dev lo");
            load(4500);
            Ok(())
        };
        seal.follow(consumer, follow).unwrap();
        assert_eq!(names(&mut seal), [""; 0]);
        // And to another port of the same address, whose route is there.
        let follow = || {
            run("ip route replace 198.51.100.7 dev lo");
            load(4501);
            Ok(())
        };
        seal.follow("198.51.100.7:4501".parse().unwrap(), follow)
            .unwrap();
        assert_eq!(names(&mut seal), [""; 0]);
        load(4502);
        assert_eq!(names(&mut seal), ["firewall"]);
    });
}

#[test]
fn whatever_else_changes_while_a_guest_follows_is_not_sealed() {
    for (more, shows) in [
        ("nft add table inet other", "firewall"),
        ("ip route add 203.0.113.0/24 dev lo", "routes"),
        ("ip route add 198.51.100.8 dev lo", "routes"),
        ("ip route add 198.51.100.0/24 dev lo", "routes"),
        ("ip addr del 192.0.2.1/24 dev lo", "routes"),
        ("ip rule add from 192.0.2.1 lookup 100", "routes"),
    ] {
        in_new_network(move || {
            let (mut seal, consumer) = sealed();
            let follow = || {
                load(4500);
                run(more);
                Ok(())
            };
            let refused = seal.follow(consumer, follow).unwrap_err();
            assert!(matches!(refused, FollowError::More), "{more}: {refused}");
            assert!(names(&mut seal).contains(&shows), "{more}");
        });
    }
}

#[test]
fn nothing_is_followed_where_something_has_changed_before_and_what_fails_is_not_sealed() {
    in_new_network(|| {
        let (mut seal, consumer) = sealed();
        let failing = || {
            load(4500);
            Err(FollowError::Slow("it"))
        };
        seal.follow(consumer, failing).unwrap_err();
        assert_eq!(names(&mut seal), ["firewall"]);
        let refused = seal
            .follow(consumer, || panic!("it was called"))
            .unwrap_err();
        assert!(matches!(refused, FollowError::Changed), "{refused}");
    });
}
