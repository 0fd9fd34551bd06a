//! The fence of `omerta guard watch`: what is made and set up at once reaches nothing before its guard, and
//! nothing reaches it.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use omerta_dataplane::{Guard, Standing};
use omerta_test_support::{FrameSender, Tap, ip};
use tempfile::TempDir;

use crate::guard::Stage;
use crate::watch::{TAP, Watched, file, frame, hostile, received, service};

const ROUNDS: u32 = 100;
/// For how long a tap that nobody guards is watched.
const A_WHILE: Duration = Duration::from_millis(300);

fn fenced() -> String {
    format!("[fence]\ninterfaces = [\"omt*\"]\n{TAP}")
}

/// A namespace without a tap, watched, with a fence that stands.
fn set(text: &str) -> Option<Watched> {
    let stage = Stage::set()?;
    let removed = || ip("link del omt0");
    stage.namespace().enter(removed).unwrap().unwrap();
    let watched = Watched::declaring(stage, text);
    watched.soon("the fence stands", || stands(&watched.stage));
    Some(watched)
}

fn stands(stage: &Stage) -> bool {
    let shown = stage.omerta("guard fence -o json").done().stdout;
    let rules: serde_json::Value = serde_json::from_str(&shown).unwrap();
    rules.as_array().unwrap().len() == 8
}

/// How many packets the fence has dropped `from` or `to` interfaces.
fn dropped(stage: &Stage, direction: &str) -> u64 {
    let shown = stage.omerta("guard fence -o json").done().stdout;
    let rules: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let rules = rules.as_array().unwrap().iter();
    rules
        .filter(|rule| rule["direction"] == direction)
        .map(|rule| rule["packets"].as_u64().unwrap())
        .sum()
}

fn signal(watched: &Watched, signal: Signal) {
    kill(Pid::from_raw(watched.watch.id().cast_signed()), signal).unwrap();
}

/// The tap, made and set up at once, with an address of the host's by which it reaches the guest.
fn made(watched: &Watched) -> Tap {
    watched.within(|| {
        let tap = Tap::create("omt0").unwrap();
        ip("link set omt0 address 52:54:00:00:00:fe").unwrap();
        tap.up().unwrap();
        ip("addr add 10.77.0.1/24 dev omt0").unwrap();
        ip("neigh replace 10.77.0.2 lladdr 52:54:00:00:00:01 dev omt0 nud permanent").unwrap();
        tap
    })
}

/// Sends both ways for a while; what passed from the tap, and what to it.
fn exchange(watched: &Watched, tap: &Tap, host: &UdpSocket, time: Duration) -> (u32, u32) {
    let (mut from, mut to) = (0, 0);
    let to_guest = watched.within(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    let since = Instant::now();
    while since.elapsed() < time {
        // It may be set down meanwhile, or its route be gone with that.
        let _ = tap.send(&hostile());
        let _ = to_guest.send_to(b"to the guest", "10.77.0.2:1");
        from += received(host);
        while tap.recv(Duration::ZERO).is_ok_and(|frame| frame.is_some()) {
            to += 1;
        }
    }
    (from, to)
}

#[test]
fn without_a_fence_what_is_made_while_no_watch_lives_is_open() {
    let Some(stage) = Stage::set() else { return };
    stage.namespace().ip("link del omt0").unwrap();
    let mut watched = Watched::declaring(stage, TAP);
    let host = watched.within(service);
    watched.watch.kill().unwrap();
    watched.watch.wait().unwrap();
    let tap = made(&watched);
    let (from, to) = exchange(&watched, &tap, &host, A_WHILE);
    assert!(
        from > 0 && to > 0,
        "or the tests below show nothing: {from}, {to}"
    );
}

#[test]
fn a_tap_that_is_made_again_reaches_nothing_before_its_guard() {
    let Some(watched) = set(&fenced()) else {
        return;
    };
    let host = watched.within(service);
    let (mut sent, mut passed) = (0_u32, 0);
    for _ in 0..ROUNDS {
        let tap = watched.within(|| Tap::create("omt0").unwrap());
        tap.up().unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        // As a guest does that sends from its first instant.
        while watched.standing() != Some(Standing::InForce) {
            assert!(Instant::now() < end, "not guarded");
            for _ in 0..16 {
                sent += u32::from(tap.send(&hostile()).is_ok());
            }
            passed += received(&host);
        }
        for _ in 0..16 {
            sent += u32::from(tap.send(&hostile()).is_ok());
        }
        watched.within(|| tap.remove());
    }
    std::thread::sleep(Duration::from_millis(50));
    passed += received(&host);
    println!("made again {ROUNDS} times: {passed} of {sent} hostile frames passed");
    assert!(sent > ROUNDS);
    assert_eq!(passed, 0, "LEAKED");
}

#[test]
fn nothing_passes_either_way_while_the_watch_is_dead_or_stopped() {
    const SERVICE: &str = "udp:10.99.0.1:9999";
    let allowing = fenced().replace("\"udp:192.0.2.10:51820\"", &format!("\"{SERVICE}\""));
    let Some(watched) = set(&allowing) else {
        return;
    };
    let host = watched.within(service);
    signal(&watched, Signal::SIGSTOP);
    let tap = made(&watched);
    assert_eq!(
        exchange(&watched, &tap, &host, A_WHILE),
        (0, 0),
        "LEAKED: stopped"
    );
    signal(&watched, Signal::SIGCONT);
    watched.soon("it is guarded", || {
        watched.standing() == Some(Standing::InForce)
    });
    // From then on the guard says what passes.
    watched.soon("what is declared passes", || {
        let _ = tap.send(&frame([0x52, 0x54, 0, 0, 0, 0xfe]));
        received(&host) > 0
    });
    let mut watched = watched;
    watched.watch.kill().unwrap();
    watched.watch.wait().unwrap();
    watched.soon("it passes without a watch", || {
        let _ = tap.send(&frame([0x52, 0x54, 0, 0, 0, 0xfe]));
        received(&host) > 0
    });
    watched.within(|| tap.remove());
    for _ in 0..3 {
        let tap = made(&watched);
        assert_eq!(
            exchange(&watched, &tap, &host, A_WHILE),
            (0, 0),
            "LEAKED: dead"
        );
        watched.within(|| tap.remove());
    }
    assert!(dropped(&watched.stage, "from") > 0 && dropped(&watched.stage, "to") > 0);
    watched.stage.omerta("guard fence --remove").done();
    let tap = made(&watched);
    let (from, _) = exchange(&watched, &tap, &host, A_WHILE);
    assert!(from > 0, "open without fence and watch");
}

/// The kernel gives an index again only to who asks for it by number.
#[test]
fn another_interface_of_the_same_index_and_name_is_fenced_too() {
    let Some(watched) = set(&fenced()) else {
        return;
    };
    let host = watched.within(service);
    let tap = made(&watched);
    let in_group = || {
        let shown = watched.within(|| {
            let shown = std::process::Command::new("ip")
                .args(["link", "show", "omt0"])
                .output();
            String::from_utf8(shown.unwrap().stdout).unwrap()
        });
        shown.contains("group 28525")
    };
    watched.soon("it is let through", in_group);
    let index = watched.within(|| Guard::open("omt0").unwrap().ifindex());
    signal(&watched, Signal::SIGSTOP);
    watched.within(|| tap.remove());
    let far = watched.within(|| {
        ip(&format!(
            "link add omt0 index {index} type veth peer name far"
        ))
        .unwrap();
        ip("link set far up").unwrap();
        ip("link set omt0 up").unwrap();
        FrameSender::open("far").unwrap()
    });
    assert!(!in_group());
    for _ in 0..100 {
        far.send(&hostile()).unwrap();
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(received(&host), 0, "LEAKED");
    signal(&watched, Signal::SIGCONT);
    watched.soon("it is guarded", || {
        watched.standing() == Some(Standing::InForce)
    });
    watched.soon("it is let through", in_group);
}

#[test]
fn a_fenced_port_of_a_bridge_is_cut_off_both_ways() {
    let Some(mut watched) = set(&fenced()) else {
        return;
    };
    watched.watch.kill().unwrap();
    watched.watch.wait().unwrap();
    let other = watched.within(|| {
        ip("link add br0 type bridge").unwrap();
        ip("link set br0 up").unwrap();
        let other = Tap::create("other").unwrap();
        ip("link set other master br0").unwrap();
        other.up().unwrap();
        other
    });
    let bridged = |name: &str| {
        watched.within(|| {
            let tap = Tap::create(name).unwrap();
            ip(&format!("link set {name} master br0")).unwrap();
            tap.up().unwrap();
            tap
        })
    };
    let crossed = |tap: &Tap| {
        let mut seen = [0, 0];
        let is_ours = |frame: &[u8]| frame.ends_with(b"leak");
        for _ in 0..50 {
            tap.send(&hostile()).unwrap();
            other.send(&hostile()).unwrap();
            for (seen, at) in seen.iter_mut().zip([&other, tap]) {
                while let Some(frame) = at.recv(Duration::from_millis(1)).unwrap() {
                    *seen += u32::from(is_ours(&frame));
                }
            }
        }
        seen
    };
    let open = bridged("open0");
    watched.soon("the bridge forwards", || {
        let [from, to] = crossed(&open);
        from > 0 && to > 0
    });
    let fenced = bridged("omt0");
    assert_eq!(crossed(&fenced), [0, 0], "LEAKED");
}

/// Who removes a guard, and not what makes guards, decides that the tap is one that nobody guards.
#[test]
fn a_tap_whose_guard_is_removed_while_no_watch_lives_is_fenced() {
    let Some(mut watched) = set(&fenced()) else {
        return;
    };
    let host = watched.within(service);
    let tap = made(&watched);
    watched.soon("guarded", || is_let_through(&watched));
    is_fenced_once_detached(&mut watched, &tap, &host);
}

/// So it is where the guard is one that the watch has put in the place of another.
#[test]
fn a_tap_that_was_guarded_anew_is_fenced_when_its_guard_is_removed() {
    for is_started_anew in [false, true] {
        let Some(mut watched) = set(&fenced()) else {
            return;
        };
        let host = watched.within(service);
        let tap = made(&watched);
        watched.soon("guarded", || is_let_through(&watched));
        if is_started_anew {
            // Nothing is left of the guard but the group.
            watched.watch.kill().unwrap();
            watched.watch.wait().unwrap();
            let inode = watched.stage.namespace().inode().unwrap();
            std::fs::remove_dir_all(format!("/sys/fs/bpf/omerta/{inode}/omt0")).unwrap();
            watched.start_again();
            watched.soon("guarded again", || {
                is_let_through(&watched) && notes_its_group(&watched)
            });
        } else {
            watched.lose_pins(|| ());
        }
        is_fenced_once_detached(&mut watched, &tap, &host);
    }
}

fn is_let_through(watched: &Watched) -> bool {
    watched.standing() == Some(Standing::InForce) && group_of_tap(watched) != 0
}

/// The watch dies, and its guard is removed.
fn is_fenced_once_detached(watched: &mut Watched, tap: &Tap, host: &UdpSocket) {
    watched.watch.kill().unwrap();
    watched.watch.wait().unwrap();
    watched.stage.omerta("guard detach omt0").done();
    assert_eq!(group_of_tap(watched), 0);
    let passed = exchange(watched, tap, host, A_WHILE);
    assert_eq!(passed, (0, 0), "LEAKED");
}

fn notes_its_group(watched: &Watched) -> bool {
    let inode = watched.stage.namespace().inode().unwrap();
    std::fs::read_link(format!("/sys/fs/bpf/omerta/{inode}/omt0/group")).is_ok()
}

fn group_of_tap(watched: &Watched) -> u32 {
    let all = watched.within(|| omerta_dataplane::links::all().unwrap());
    let tap = all.into_iter().find(|one| one.name == "omt0");
    tap.map_or(0, |tap| tap.group)
}

#[test]
fn a_fence_that_somebody_removes_or_changes_stands_again() {
    let Some(watched) = set(&fenced()) else {
        return;
    };
    let nft = |text: &str| {
        let command = watched.stage.namespace().command("nft").arg(text).status();
        assert!(command.unwrap().success(), "{text}");
    };
    for text in [
        "flush ruleset",
        "delete table bridge omerta_fence",
        "flush chain inet omerta_fence from",
        "insert rule arp omerta_fence to accept",
    ] {
        nft(text);
        watched.soon(text, || {
            let listed = watched
                .stage
                .namespace()
                .command("nft")
                .args(["list", "ruleset"])
                .output();
            let listed = String::from_utf8(listed.unwrap().stdout).unwrap();
            stands(&watched.stage) && !listed.contains("\t\taccept")
        });
    }
}

/// What a bridge sends of its own accord, and what is for bridges alone, goes another way than the rest.
#[test]
fn spanning_tree_does_not_reach_a_fenced_port() {
    let Some(watched) = set(&fenced()) else {
        return;
    };
    let bpdus = |name: &str| {
        let tap = watched.within(|| {
            let tap = Tap::create(name).unwrap();
            ip(&format!("link set {name} master br0")).unwrap();
            tap.up().unwrap();
            tap
        });
        let end = Instant::now() + Duration::from_secs(3);
        let mut seen = 0;
        while Instant::now() < end {
            if let Some(frame) = tap.recv(Duration::from_millis(100)).unwrap() {
                seen += u32::from(frame.starts_with(&[0x01, 0x80, 0xc2, 0, 0, 0]));
            }
        }
        seen
    };
    signal(&watched, Signal::SIGSTOP);
    watched.within(|| ip("link add br0 up type bridge stp_state 1 hello_time 100").unwrap());
    assert!(bpdus("open0") > 0, "or this shows nothing");
    assert_eq!(bpdus("omt0"), 0, "LEAKED");
    signal(&watched, Signal::SIGCONT);
}

#[test]
fn two_watches_do_not_undo_each_others_fence() {
    let Some(watched) = set(&fenced()) else {
        return;
    };
    let files = TempDir::new().unwrap();
    let path = file(&files, &fenced().replace("omt*", "vnet*"));
    let other = watched
        .stage
        .omerta(&format!("guard watch --config {}", path.display()));
    other.failed(1, &["another `omerta guard watch`"]);
    assert!(stands(&watched.stage));
}

/// Where somebody has given the group a name, nft tells that in the number's place.
#[test]
fn a_fence_whose_group_has_a_name_is_shown_all_the_same() {
    let Some(watched) = set(&fenced()) else {
        return;
    };
    let names = ["/etc/iproute2/group", "/usr/share/iproute2/group"];
    let names = names
        .into_iter()
        .find(|path| std::path::Path::new(path).exists());
    let files = TempDir::new().unwrap();
    let named = files.path().join("group");
    std::fs::write(&named, "28525 guarded\n").unwrap();
    let script = format!(
        "mount --bind {} {} && exec {} guard fence -o json",
        named.display(),
        names.unwrap(),
        crate::run::OMERTA
    );
    let mut command = watched.stage.namespace().command("unshare");
    let shown = command.args(["-m", "sh", "-c", &script]).output().unwrap();
    let rules: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
    let rules = rules.as_array().unwrap();
    assert_eq!(rules.len(), 8, "{shown:?}");
    assert!(rules.iter().all(|rule| rule["group"] == 28_525));
}

#[test]
fn without_a_fence_there_is_nothing_to_show_or_remove() {
    let Some(stage) = Stage::set() else { return };
    assert_eq!(stage.omerta("guard fence -o json").done().stdout, "[]\n");
    let ran = stage.omerta("guard fence --remove").done();
    assert_eq!(ran.stdout, "there is no fence\n");
    // What cannot be made is told, and `--once` fails; what can be guarded is guarded all the same.
    let files = TempDir::new().unwrap();
    let path = file(&files, &fenced());
    let without_nft = |arguments: &str| -> crate::run::Ran {
        let mut command = stage.command(arguments);
        let ran = command.env("PATH", files.path()).output();
        ran.unwrap().into()
    };
    let ran = without_nft(&format!("guard watch --once --config {}", path.display()));
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stderr.contains("install nftables"), "{ran:?}");
    assert!(ran.stdout.contains("omt0"), "{ran:?}");
    // Nor is there none because nobody can be asked.
    let ran = without_nft("guard fence --remove");
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stderr.contains("install nftables"), "{ran:?}");
}
