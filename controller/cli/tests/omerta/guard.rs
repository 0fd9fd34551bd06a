//! `omerta guard` on real taps in network namespaces of their own.

use std::time::Duration;

use omerta_dataplane::Guard;
use omerta_test_support::{Namespace, Tap};
use serde_json::{Value, json};

use crate::run::{OMERTA, Ran, fed, prepare};

/// A namespace that holds one tap, up, with the MAC 52:54:00:00:00:fe.
pub struct Stage {
    namespace: Namespace,
    pub tap: Tap,
    /// The tap's name.
    pub name: String,
}

/// The arguments of `guard attach` for the stage's guest.
pub const GUEST: &str = "--mac 52:54:00:00:00:01 --ip 10.77.0.2 --gateway 10.77.0.1";

impl Stage {
    /// `None`, told on stderr, where this machine cannot hold guards.
    pub fn set() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: guards and taps need root");
            return None;
        }
        if let Err(error) = omerta_dataplane::Hook::of_this_kernel() {
            eprintln!("skipped: {error}");
            return None;
        }
        let namespace = Namespace::new("omcli").unwrap();
        // A killed test may have left pins of a namespace whose number this one has now.
        namespace
            .enter(|| {
                for left in Guard::pinned().unwrap() {
                    Guard::remove_stale(&left.interface, None).unwrap();
                }
            })
            .unwrap();
        namespace.disable_ipv6().unwrap();
        // A namespace of its own makes the name unique.
        let name = "omt0".to_owned();
        let tap = namespace.enter(|| Tap::create(&name)).unwrap().unwrap();
        namespace
            .ip(&format!("link set {name} address 52:54:00:00:00:fe"))
            .unwrap();
        tap.up().unwrap();
        Some(Self {
            namespace,
            tap,
            name,
        })
    }

    /// Runs `omerta guard VERB TAP OPTIONS` on the stage.
    pub fn guard(&self, verb: &str, options: &str) -> Ran {
        self.omerta(&format!("guard {verb} {} {options}", self.name))
    }

    /// Runs `omerta` in the namespace.
    pub fn omerta(&self, arguments: &str) -> Ran {
        self.command(arguments).output().unwrap().into()
    }

    pub fn command(&self, arguments: &str) -> std::process::Command {
        let mut command = self.namespace.command(OMERTA);
        prepare(&mut command, arguments);
        command
    }

    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// The JSON of `guard show`.
    pub fn shown(&self) -> Value {
        serde_json::from_str(&self.guard("show", "-o json").done().stdout).unwrap()
    }

    /// What is pinned for this namespace, wherever a guard can be pinned.
    /// The guards', and the programs' that judge for them, which are there as long as guards are.
    pub fn pins(&self) -> Vec<String> {
        let directory = format!("/sys/fs/bpf/omerta/{}", self.namespace.inode().unwrap());
        let mut found: Vec<_> = match std::fs::read_dir(directory) {
            Ok(entries) => entries
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect(),
            Err(_) => Vec::new(),
        };
        found.sort();
        let programs = found.iter().filter(|name| name.starts_with(":programs-"));
        assert_eq!(
            programs.count(),
            usize::from(!found.is_empty()),
            "{found:?}"
        );
        found.retain(|name| !name.starts_with(":programs-"));
        found
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // The pins outlive the namespace; a test that failed must not leave them behind.
        let _ = self
            .command(&format!("guard detach {}", self.name))
            .output();
    }
}

/// An Ethernet frame with an IPv4 UDP packet of the guest to `destination`, port 51820.
fn datagram(destination: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0x52, 0x54, 0, 0, 0, 0xfe, 0x52, 0x54, 0, 0, 0, 1, 0x08, 0];
    let mut ip = vec![0x45, 0, 0, 46, 0, 1, 0x40, 0, 64, 17, 0, 0, 10, 77, 0, 2];
    ip.extend(destination);
    let sum: u32 = ip
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(ip);
    frame.extend([0xc3, 0x50, 0xca, 0x6c, 0, 26, 0, 0]);
    frame.extend([0; 18]);
    frame
}

#[test]
fn guard_lives_from_attach_to_detach() {
    let Some(stage) = Stage::set() else { return };
    let ran = stage
        .guard("attach", &format!("{GUEST} --allow udp:192.0.2.10:51820"))
        .done();
    assert_eq!(ran.stdout, "omt0: guarded, filtered, 1 endpoint, epoch 1\n");
    // The command that attached it has ended; the guard has not.
    assert_eq!(stage.pins(), ["omt0"]);

    stage.tap.send(&datagram([192, 0, 2, 10])).unwrap();
    stage.tap.send(&datagram([198, 51, 100, 1])).unwrap();
    stage.tap.send(&datagram([198, 51, 100, 1])).unwrap();
    assert!(stage.tap.recv(Duration::from_millis(50)).unwrap().is_none());
    let shown = stage.shown();
    assert_eq!(shown["interface"], "omt0");
    assert_eq!(shown["mode"], "filtered");
    assert_eq!(shown["epoch"], 1);
    assert_eq!(shown["allow"], json!(["udp:192.0.2.10:51820"]));
    let index = stage
        .namespace()
        .enter(|| omerta_test_support::index_of("omt0"))
        .unwrap()
        .unwrap();
    assert_eq!(shown["ifindex"], index);
    assert_eq!(shown["egress"]["rx"], 3);
    assert_eq!(shown["egress"]["allowed"], 1);
    assert_eq!(shown["egress"]["answered"], 0);
    assert_eq!(shown["egress"]["dropped"]["endpoint"], 2);
    for direction in ["egress", "ingress"] {
        let counters = &shown[direction];
        let dropped: u64 = counters["dropped"]
            .as_object()
            .unwrap()
            .values()
            .map(|n| n.as_u64().unwrap())
            .sum();
        let sum = counters["allowed"].as_u64().unwrap()
            + counters["answered"].as_u64().unwrap()
            + dropped;
        assert_eq!(counters["rx"], sum, "{direction}");
    }

    let text = stage.guard("show", "").done().stdout;
    let text = text.replace(&format!("(index {index})"), "(index N)");
    assert_eq!(text, include_str!("golden/guard_show.txt"));
    assert_eq!(
        stage.omerta("guard list").done().stdout,
        include_str!("golden/guard_list.txt")
    );
    let list: Value =
        serde_json::from_str(&stage.omerta("guard list -o json").done().stdout).unwrap();
    assert_eq!(list, json!([shown]));

    assert_eq!(
        stage.guard("detach", "").done().stdout,
        "omt0: no longer guarded\n"
    );
    assert_eq!(stage.pins(), [""; 0]);
    assert_eq!(stage.omerta("guard list").done().stdout, "");
    assert_eq!(stage.omerta("guard list -o json").done().stdout, "[]\n");
}

#[test]
fn guard_attached_below_another_sys_outlives_it() {
    let Some(stage) = Stage::set() else { return };
    // `ip netns exec` gives its command a /sys of its own, which goes with it.
    let mut command = std::process::Command::new("ip");
    command.args(["netns", "exec", stage.namespace().name(), OMERTA]);
    prepare(&mut command, &format!("guard attach omt0 {GUEST}"));
    Ran::from(command.output().unwrap()).done();
    assert_eq!(stage.shown()["interface"], "omt0");
    assert_eq!(stage.pins(), ["omt0"]);
}

#[test]
fn every_option_of_attach_reaches_the_guard() {
    let Some(stage) = Stage::set() else { return };
    stage
        .guard(
            "attach",
            "--mac 52:54:00:00:00:01 --ip 10.77.0.2 --ip 2001:db8::2 --gateway 10.77.0.1 \
             --gateway fe80::1 --gateway-mac 52:54:00:00:00:aa --allow tcp:[2001:db8:1::1]:443 \
             --allow icmp:192.0.2.10 --mode conntrack",
        )
        .done();
    let shown = stage.shown();
    assert_eq!(shown["mode"], "conntrack");
    assert_eq!(shown["mac"], "52:54:00:00:00:01");
    assert_eq!(shown["gateway_mac"], "52:54:00:00:00:aa");
    assert_eq!(shown["addresses"], json!(["10.77.0.2", "2001:db8::2"]));
    assert_eq!(shown["gateways"], json!(["10.77.0.1", "fe80::1"]));
    assert_eq!(
        shown["allow"],
        json!(["icmp:192.0.2.10", "tcp:[2001:db8:1::1]:443"])
    );
}

#[test]
fn allowlist_changes_raise_the_epoch() {
    let Some(stage) = Stage::set() else { return };
    stage.guard("attach", GUEST).done();
    let ran = stage
        .guard("allow", "udp:192.0.2.1:1 udp:192.0.2.2:2 udp:192.0.2.3:3")
        .done();
    assert_eq!(ran.stdout, "omt0: epoch 2 in force\n");
    stage.guard("revoke", "udp:192.0.2.2:2").done();
    assert_eq!(
        stage.shown()["allow"],
        json!(["udp:192.0.2.1:1", "udp:192.0.2.3:3"])
    );

    let list = b"# new\n\ntcp:192.0.2.9:9 # web\r\nudp:192.0.2.3:3\nudp:192.0.2.3:3\n";
    let ran = fed(stage.command("guard replace omt0 --file -"), list).done();
    assert_eq!(ran.stdout, "omt0: epoch 4 in force\n");
    assert_eq!(
        stage.shown()["allow"],
        json!(["tcp:192.0.2.9:9", "udp:192.0.2.3:3"])
    );

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("none");
    std::fs::write(&file, "# nobody\n").unwrap();
    stage
        .guard("replace", &format!("--file {}", file.display()))
        .done();
    assert_eq!(stage.shown()["allow"], json!([]));
}

#[test]
fn mode_changes_with_the_next_frame() {
    let Some(stage) = Stage::set() else { return };
    stage.guard("attach", GUEST).done();
    let allowed = || {
        stage.tap.send(&datagram([192, 0, 2, 10])).unwrap();
        stage.shown()["egress"]["allowed"].clone()
    };
    assert_eq!(allowed(), 0);
    let ran = stage.guard("mode", "direct").done();
    assert_eq!(ran.stdout, "omt0: epoch 2 in force\n");
    assert_eq!(stage.shown()["mode"], "direct");
    assert_eq!(allowed(), 1);
    stage.guard("mode", "filtered").done();
    assert_eq!(allowed(), 1);
    stage
        .guard("mode", "conntrack")
        .failed(4, &["omt0", "--mode conntrack"]);
    stage.guard("mode", "open").failed(2, &["open", "filtered"]);
    assert_eq!(stage.shown()["epoch"], 3);
}

#[test]
fn limits_and_lease_are_set_shown_and_lifted() {
    let Some(stage) = Stage::set() else { return };
    let options = "--limit egress-packets=20k --limit ingress-bits=100M/s --lease 12h";
    stage.guard("attach", &format!("{GUEST} {options}")).done();
    let shown = stage.shown();
    let none = json!({ "packets_per_second": null, "bits_per_second": null });
    let [mut egress, mut ingress] = [none.clone(), none];
    egress["packets_per_second"] = json!(20_000);
    ingress["bits_per_second"] = json!(100_000_000);
    assert_eq!(
        shown["limits"],
        json!({ "egress": egress, "ingress": ingress })
    );
    assert_eq!(shown["standing"], "in_force");
    assert_eq!(shown["lease"]["expired"], false);
    let left = shown["lease"]["remaining_seconds"].as_u64().unwrap();
    assert!((43_000..=43_200).contains(&left), "{left}");
    let text = stage.guard("show", "").done().stdout;
    let limits = "limit      egress-packets=20k/s\n           ingress-bits=100M/s\n";
    assert!(text.contains(limits), "{text}");
    assert!(text.contains("\nlease      ends in 4"), "{text}");

    let ran = stage
        .guard("limit", "egress-packets=none egress-bits=1001")
        .done();
    assert_eq!(ran.stdout, "omt0: epoch 2 in force\n");
    egress["packets_per_second"] = Value::Null;
    egress["bits_per_second"] = json!(1001);
    assert_eq!(
        stage.shown()["limits"],
        json!({ "egress": egress, "ingress": ingress })
    );
    // What is so already keeps the epoch.
    let ran = stage.guard("limit", "egress-bits=1001").done();
    assert_eq!(ran.stdout, "omt0: epoch 2 in force\n");
    let ran = stage.guard("lease", "off").done();
    assert_eq!(ran.stdout, "omt0: no lease, in force for ever\n");
    assert_eq!(stage.shown()["lease"], Value::Null);
}

#[test]
fn limit_lets_its_burst_through_and_no_more() {
    let Some(stage) = Stage::set() else { return };
    let options = "--allow udp:192.0.2.10:51820 --limit egress-packets=1";
    stage.guard("attach", &format!("{GUEST} {options}")).done();
    for _ in 0..500 {
        stage.tap.send(&datagram([192, 0, 2, 10])).unwrap();
    }
    let egress = stage.shown()["egress"].clone();
    let count = |value: &Value| value.as_u64().unwrap();
    assert_eq!(count(&egress["rx"]), 500);
    assert!(count(&egress["allowed"]) >= 128, "{egress}");
    assert!(count(&egress["dropped"]["policed"]) > 300, "{egress}");
}

#[test]
fn lease_that_ran_out_denies_all_until_it_is_renewed() {
    let Some(stage) = Stage::set() else { return };
    let options = "--allow udp:192.0.2.10:51820 --lease 1s";
    stage.guard("attach", &format!("{GUEST} {options}")).done();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while stage.shown()["lease"]["expired"] != true {
        assert!(std::time::Instant::now() < deadline, "it ends some time");
        std::thread::sleep(Duration::from_millis(20));
    }
    // The programs' clock is that of the last tick.
    std::thread::sleep(Duration::from_millis(50));
    let before = stage.shown()["egress"]["allowed"].clone();
    stage.tap.send(&datagram([192, 0, 2, 10])).unwrap();
    let shown = stage.shown();
    assert_eq!(shown["egress"]["allowed"], before);
    assert_eq!(shown["egress"]["dropped"]["lease_expired"], 1);
    assert_eq!(shown["standing"], "in_force");
    let text = stage.guard("show", "").done().stdout;
    assert!(text.contains("lease      has ended"), "{text}");

    let ran = stage.guard("lease", "15m").done();
    assert_eq!(
        ran.stdout,
        "omt0: drops everything in 900 s unless it is renewed\n"
    );
    stage.tap.send(&datagram([192, 0, 2, 10])).unwrap();
    let shown = stage.shown();
    assert_eq!(shown["egress"]["dropped"]["lease_expired"], 1);
    assert_ne!(shown["egress"]["allowed"], before);
    assert_eq!(shown["epoch"], 1, "a lease is no policy");
}

/// The run showed what it could and failed, in one line that holds every one of `words`.
#[track_caller]
fn shown_and_failed(ran: &Ran, words: &[&str]) {
    assert_eq!(ran.code, 1, "{ran:?}");
    assert_eq!(ran.stderr.matches('\n').count(), 1, "{ran:?}");
    for word in words {
        assert!(ran.stderr.contains(word), "{word:?} is missing in {ran:?}");
    }
}

#[test]
fn guard_that_is_not_whole_is_shown_with_what_to_do() {
    let Some(stage) = Stage::set() else { return };
    let options = "--allow udp:192.0.2.10:51820 --limit egress-bits=1M";
    stage.guard("attach", &format!("{GUEST} {options}")).done();
    stage.tap.send(&datagram([198, 51, 100, 1])).unwrap();
    let inode = stage.namespace().inode().unwrap();
    std::fs::remove_file(format!("/sys/fs/bpf/omerta/{inode}/omt0/link_ingress")).unwrap();
    let ran = stage.guard("show", "-o json");
    shown_and_failed(&ran, &["omt0", "partial", "omerta guard detach omt0"]);
    let shown: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(shown["standing"], "partial");
    assert_eq!(shown["allow"], json!(["udp:192.0.2.10:51820"]));
    assert_eq!(shown["egress"]["dropped"]["endpoint"], 1);
    let ran = stage.guard("show", "");
    shown_and_failed(&ran, &["partial"]);
    for line in [
        "state      partial",
        "limit      egress-bits=1M/s",
        "dropped: endpoint",
    ] {
        assert!(ran.stdout.contains(line), "{ran:?}");
    }
    stage.guard("detach", "").done();
    assert_eq!(stage.pins(), [""; 0]);
}

#[test]
fn guard_of_an_interface_that_moved_away_is_shown() {
    let Some(stage) = Stage::set() else { return };
    let away = Namespace::new("omcli-away").unwrap();
    stage
        .namespace()
        .ip("link add omv0 type veth peer name omv1")
        .unwrap();
    stage.omerta(&format!("guard attach omv0 {GUEST}")).done();
    let move_to = |from: &Namespace, to: &Namespace| {
        from.ip(&format!("link set omv0 netns {}", to.name()))
            .unwrap();
    };
    move_to(stage.namespace(), &away);
    let ran = stage.omerta("guard show omv0 -o json");
    shown_and_failed(&ran, &["omv0", "elsewhere", "bring the interface back"]);
    let shown: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(shown["standing"], "elsewhere");
    move_to(&away, stage.namespace());
    stage.omerta("guard show omv0").done();
    stage.omerta("guard detach omv0").done();
}

#[test]
fn what_is_left_of_a_guard_whose_interface_is_gone_is_not_found_and_removed_once() {
    let Some(stage) = Stage::set() else { return };
    stage.guard("attach", GUEST).done();
    stage.namespace().ip("link del omt0").unwrap();
    assert_eq!(stage.pins(), ["omt0"]);
    for line in [
        "show omt0",
        "mode omt0 direct",
        "lease omt0 off",
        "log omt0",
        "upgrade omt0",
    ] {
        stage.omerta(&format!("guard {line}")).failed(3, &["omt0"]);
    }
    assert_eq!(stage.omerta("guard list").done().stdout, "");
    let ran = stage.guard("detach", "").done();
    assert!(
        ran.stdout.contains("what was left of it is removed"),
        "{ran:?}"
    );
    assert_eq!(stage.pins(), [""; 0]);
    stage.guard("detach", "").failed(3, &["omt0"]);
}
