//! The stage's own behaviour, on real namespaces. Needs root.

use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use omerta_test_support::{
    Capture, FrameSender, Namespace, Process, Tap, Travel, Veth, index_of, ip,
};

/// An Ethernet frame of an EtherType set aside for experiments, which no stack answers.
fn frame(marker: u8) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];
    frame.resize(60, marker);
    frame
}

#[test]
fn namespace_is_apart_and_gone_on_drop() {
    let outside = fs::read_link("/proc/thread-self/ns/net").unwrap();
    let namespace = Namespace::new("omt").unwrap();
    let inside = namespace
        .enter(|| fs::read_link("/proc/thread-self/ns/net").unwrap())
        .unwrap();
    assert_ne!(inside, outside);
    assert_eq!(fs::read_link("/proc/thread-self/ns/net").unwrap(), outside);
    assert_eq!(
        inside.to_str().unwrap(),
        format!("net:[{}]", namespace.inode().unwrap())
    );
    let path = namespace.path();
    assert!(path.exists());
    drop(namespace);
    assert!(!path.exists());
}

#[test]
fn command_runs_inside() {
    let namespace = Namespace::new("omt").unwrap();
    let output = namespace
        .command("readlink")
        .arg("/proc/self/ns/net")
        .output()
        .unwrap();
    let expected = format!("net:[{}]\n", namespace.inode().unwrap());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
}

#[test]
fn tap_carries_frames_both_ways_and_capture_sees_them() {
    let namespace = Namespace::new("omt").unwrap();
    namespace.disable_ipv6().unwrap();
    let (tap, capture, sender) = namespace
        .enter(|| {
            let tap = Tap::create("tap0").unwrap();
            tap.up().unwrap();
            (
                tap,
                Capture::open("tap0").unwrap(),
                FrameSender::open("tap0").unwrap(),
            )
        })
        .unwrap();
    tap.send(&frame(1)).unwrap();
    sender.send(&frame(2)).unwrap();
    assert_eq!(tap.recv(Duration::from_secs(1)).unwrap(), Some(frame(2)));
    let seen = capture.frames().unwrap();
    let seen: Vec<_> = seen
        .into_iter()
        .map(|frame| (frame.travel, frame.bytes))
        .collect();
    assert_eq!(
        seen,
        [(Travel::Incoming, frame(1)), (Travel::Outgoing, frame(2))]
    );
    assert_eq!(capture.lost().unwrap(), 0);
    assert_eq!(tap.recv(Duration::from_millis(20)).unwrap(), None);
}

#[test]
fn tap_is_gone_on_drop() {
    let namespace = Namespace::new("omt").unwrap();
    namespace
        .enter(|| {
            let tap = Tap::create("tap0").unwrap();
            assert!(index_of("tap0").is_ok());
            assert!(Tap::create("tap0").is_err(), "a name is taken once");
            drop(tap);
            assert!(index_of("tap0").is_err());
        })
        .unwrap();
}

#[test]
fn veth_joins_two_namespaces() {
    let near = Namespace::new("omt").unwrap();
    let far = Namespace::new("omt").unwrap();
    Veth::across((&near, "v0"), (&far, "v1")).unwrap();
    for (namespace, name) in [(&near, "v0"), (&far, "v1")] {
        namespace.disable_ipv6().unwrap();
        namespace.ip(&format!("link set {name} up")).unwrap();
    }
    let capture = far.enter(|| Capture::open("v1")).unwrap().unwrap();
    let sender = near.enter(|| FrameSender::open("v0")).unwrap().unwrap();
    let mut seen = Vec::new();
    // What is sent before the kernel has taken note of the carrier is lost.
    for _ in 0..100 {
        sender.send(&frame(7)).unwrap();
        thread::sleep(Duration::from_millis(10));
        seen.extend(capture.frames().unwrap());
        if !seen.is_empty() {
            break;
        }
    }
    assert!(!seen.is_empty());
    assert_eq!(seen[0].bytes, frame(7));
}

#[test]
fn capture_outlives_its_interface() {
    let namespace = Namespace::new("omt").unwrap();
    namespace.disable_ipv6().unwrap();
    let (tap, capture) = namespace
        .enter(|| {
            let tap = Tap::create("tap0").unwrap();
            tap.up().unwrap();
            (tap, Capture::open("tap0").unwrap())
        })
        .unwrap();
    tap.send(&frame(3)).unwrap();
    drop(tap);
    let seen = capture.frames().unwrap();
    assert_eq!(
        seen.into_iter()
            .map(|frame| frame.bytes)
            .collect::<Vec<_>>(),
        [frame(3)]
    );
    assert_eq!(capture.frames().unwrap().len(), 0);
}

#[test]
fn refusal_of_ip_is_told() {
    let error = ip("link show dev no-such-link").unwrap_err().to_string();
    assert!(error.contains("no-such-link"), "{error}");
}

#[test]
fn process_and_its_children_end_with_their_owner() {
    let mut command = Command::new("sh");
    command
        .args(["-c", "sleep 600 & echo $!; wait"])
        .stdout(Stdio::piped());
    let mut process = Process::spawn(command).unwrap();
    let mut line = String::new();
    let output = process.child().stdout.take().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line).unwrap();
    let (parent, child) = (process.pid(), line.trim().to_owned());
    assert!(fs::exists(format!("/proc/{child}")).unwrap());
    drop(process);
    assert!(!fs::exists(format!("/proc/{parent}")).unwrap());
    // The orphan was sent SIGKILL too; whoever adopted it may not have reaped it yet.
    let is_dead = || {
        let state = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        state.is_empty() || state.contains(") Z ") || state.contains(") X ")
    };
    for _ in 0..100 {
        if is_dead() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("{child} outlived its owner by a second");
}
