//! Early drops at the host's uplinks.

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use omerta_dataplane::Hook;
use omerta_test_support::{IDLE, Tap};

use crate::daemon::{Daemon, command, complaint, exchange, namespace, run_to_end};
use crate::guests::{give_image, run};

fn configure(directory: &Path, uplink: &str, hook: &str) -> String {
    let file = directory.join("omertad.toml");
    let text = format!("uplinks = [\"{uplink}\"]\nuplink_hook = \"{hook}\"\n");
    std::fs::write(&file, text).unwrap();
    file.display().to_string()
}

/// A datagram, as the next router sends it.
fn datagram(from: [u8; 4], port: u16, to: [u8; 4]) -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 50, 0, 1, 0x40, 0, 64, 17, 0, 0];
    ip.extend(from);
    ip.extend(to);
    let words = ip
        .chunks(2)
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = vec![0x52, 0x54, 0, 0, 0, 0xdd, 0x52, 0x54, 0, 0, 0, 0xcc, 8, 0];
    frame.extend(ip);
    frame.extend(port.to_be_bytes());
    // To port 40000, 30 bytes, no checksum.
    frame.extend([0x9c, 0x40, 0, 30, 0, 0]);
    frame.extend([0; 22]);
    frame
}

#[test]
fn uplink_that_is_not_there_is_named_and_omertad_does_not_start() {
    let directory = tempfile::tempdir().unwrap();
    let config = configure(directory.path(), "wan7", "tcx");
    let mut command = command(&namespace(), directory.path());
    command.args(["--metrics", "off", "--config", &config]);
    let line = complaint(&run_to_end(command), 1);
    assert!(line.contains("wan7"), "{line}");
}

#[test]
fn what_is_of_no_endpoint_ends_at_the_uplink_while_its_guest_lives() {
    for hook in ["tcx", "xdp"] {
        ends_at_the_uplink(hook);
    }
}

fn ends_at_the_uplink(hook: &str) {
    if Hook::of_this_kernel().unwrap() != Hook::Tcx {
        println!("skipped: this kernel has no TCX");
        return;
    }
    let namespace = namespace();
    let wan = namespace.enter(|| Tap::create("wan").unwrap()).unwrap();
    for step in ["link set wan address 52:54:00:00:00:dd", "link set wan up"] {
        namespace.ip(step).unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    let config = configure(directory.path(), "wan", hook);
    let arguments = ["--metrics", "127.0.0.1:0", "--config", &config];
    let daemon = Daemon::start_in(namespace, directory, &arguments);
    give_image(&daemon, IDLE);
    let told = |line: &str| {
        let scraped = exchange(daemon.connect_to_metrics(), "GET", "/metrics", "").body;
        scraped.lines().any(|told| told == line)
    };
    let dropped = |name: &str, count: u32| {
        told(&format!(
            "omerta_guest_uplink_dropped_packets_total{{guest=\"{name}\"}} {count}"
        ))
    };
    // A guest enters just before it runs.
    let enter = |name: &str| {
        let guest = run(&daemon, name);
        let end = Instant::now() + Duration::from_secs(60);
        while !dropped(name, 0) {
            assert!(Instant::now() < end, "{name} has not entered in a minute");
            std::thread::sleep(Duration::from_millis(10));
        }
        let address: Ipv4Addr = guest["address"].as_str().unwrap().parse().unwrap();
        address.octets()
    };
    let stranger = |to| wan.send(&datagram([198, 51, 100, 1], 51820, to)).unwrap();

    let alpha = enter("alpha");
    assert!(told(&format!(
        "omerta_uplink_in_force{{hook=\"{hook}\",uplink=\"wan\"}} 1"
    )));
    stranger(alpha);
    wan.send(&datagram([192, 0, 2, 10], 51820, alpha)).unwrap();
    wan.send(&datagram([192, 0, 2, 10], 51821, alpha)).unwrap();
    assert!(dropped("alpha", 2));

    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
    stranger(alpha);
    assert!(!dropped("alpha", 2) && !dropped("alpha", 3), "it has left");
    let beta = enter("beta");
    stranger(beta);
    assert!(dropped("beta", 1));
}
