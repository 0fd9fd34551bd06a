//! `omerta guard watch`: declared taps are guarded whenever they appear, and nothing passes without.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use omerta_dataplane::{Guard, Standing};
use omerta_test_support::{Tap, ip};
use tempfile::TempDir;

use crate::guard::Stage;
use crate::run::{Ran, command, omerta};

const PATIENCE: Duration = Duration::from_secs(20);
/// Where a hostile frame arrives that nothing has stopped.
const HOST: [u8; 4] = [10, 99, 0, 1];
const PORT: u16 = 9999;
const FILE: &str = "taps.toml";

pub const TAP: &str = r#"
[[tap]]
name = "omt0"
mac = "52:54:00:00:00:01"
ip = ["10.77.0.2"]
gateway = ["10.77.0.1"]
allow = ["udp:192.0.2.10:51820"]
"#;

pub struct Watched {
    // Ended before the namespace goes.
    pub watch: Child,
    pub stage: Stage,
    files: TempDir,
}

impl Watched {
    /// A namespace without a tap, with `omerta guard watch` in it.
    pub fn set() -> Option<Self> {
        let stage = Stage::set()?;
        stage
            .namespace()
            .enter(|| ip("link del omt0"))
            .unwrap()
            .unwrap();
        Some(Self::over(stage))
    }

    fn over(stage: Stage) -> Self {
        Self::declaring(stage, TAP)
    }

    pub fn declaring(stage: Stage, text: &str) -> Self {
        let files = TempDir::new().unwrap();
        let path = file(&files, text);
        let watch = watching(&stage, &path);
        Self {
            watch,
            stage,
            files,
        }
    }

    /// Another watch of the same file, in the place of one that has ended.
    pub fn start_again(&mut self) {
        self.watch = watching(&self.stage, &self.files.path().join(FILE));
    }

    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.stage.namespace().enter(work).unwrap()
    }

    pub fn standing(&self) -> Option<Standing> {
        // While it is exchanged, much may be said of it.
        self.within(|| Guard::open("omt0").and_then(|guard| guard.status()))
            .ok()
            .map(|status| status.standing)
    }

    /// Removes the guard's pins, and does `meanwhile` until there is another with pins.
    pub fn lose_pins(&self, meanwhile: impl Fn()) {
        let inode = self.stage.namespace().inode().unwrap();
        let identity = || self.within(|| Guard::open("omt0").map(|guard| guard.identity()).ok());
        let before = identity();
        std::fs::remove_dir_all(format!("/sys/fs/bpf/omerta/{inode}/omt0")).unwrap();
        self.soon("it is pinned again", || {
            meanwhile();
            identity().is_some_and(|now| Some(now) != before)
        });
    }

    #[track_caller]
    pub fn soon(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !is_so() {
            assert!(Instant::now() < end, "{what}: not yet");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ = self.watch.kill();
        let _ = self.watch.wait();
    }
}

pub fn file(directory: &TempDir, text: &str) -> PathBuf {
    let path = directory.path().join(FILE);
    std::fs::write(&path, text).unwrap();
    path
}

fn watching(stage: &Stage, path: &Path) -> Child {
    let mut command = stage.command(&format!("guard watch --config {}", path.display()));
    command.stdout(Stdio::null()).spawn().unwrap()
}

/// A frame to the host itself, which its stack takes whatever MAC the tap has.
pub fn hostile() -> Vec<u8> {
    frame([0xff; 6])
}

/// A frame to the host's service.
pub fn frame(gateway: [u8; 6]) -> Vec<u8> {
    let mut frame = gateway.to_vec();
    frame.extend([0x52, 0x54, 0, 0, 0, 1, 0x08, 0]);
    let mut header = vec![0x45, 0, 0, 32, 0, 1, 0x40, 0, 64, 17, 0, 0, 10, 77, 0, 2];
    header.extend(HOST);
    let sum: u32 = header
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]))
        .sum();
    let sum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(header);
    frame.extend([0xc3, 0x50]);
    frame.extend(PORT.to_be_bytes());
    frame.extend([0, 12, 0, 0]);
    frame.extend(*b"leak");
    frame
}

/// The host's own service that no guest may reach.
pub fn service() -> UdpSocket {
    for step in ["link set lo up", "addr add 10.99.0.1/32 dev lo"] {
        // The second time it is there already.
        let _ = ip(step);
    }
    for scope in ["all", "default"] {
        let path = format!("/proc/thread-self/net/../../sys/net/ipv4/conf/{scope}/rp_filter");
        let _ = std::fs::write(path, "0");
    }
    let socket = UdpSocket::bind(("10.99.0.1", PORT)).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

pub fn received(service: &UdpSocket) -> u32 {
    let mut buffer = [0; 16];
    let mut count = 0;
    while service.recv(&mut buffer).is_ok() {
        count += 1;
    }
    count
}

#[test]
fn a_tap_that_is_made_again_under_its_name_is_guarded_again() {
    const TIMES: u32 = 50;
    let Some(watched) = Watched::set() else {
        return;
    };
    let service = watched.within(service);
    let (mut sent, mut leaked) = (0_u32, 0);
    let mut open = Vec::new();
    for _ in 0..TIMES {
        let tap = watched.within(|| Tap::create("omt0").unwrap());
        tap.up().unwrap();
        let since = Instant::now();
        let mut passed = Duration::ZERO;
        // As a guest does that sends from its first instant, until it is set down.
        while tap.send(&hostile()).is_ok() && since.elapsed() < Duration::from_secs(1) {
            sent += 1;
            let through = received(&service);
            if through > 0 {
                leaked += through;
                passed = since.elapsed();
            }
        }
        open.push(passed);
        watched.soon("it is guarded", || {
            watched.standing() == Some(Standing::InForce)
        });
        watched.soon("it is up again", || tap.send(&hostile()).is_ok());
        std::thread::sleep(Duration::from_millis(5));
        let late = received(&service);
        assert_eq!(late, 0, "LEAKED between its being set down and its guard");
        // From here on nothing.
        for _ in 0..100 {
            tap.send(&hostile()).unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(received(&service), 0, "LEAKED past the guard");
        let dropped = watched.within(|| Guard::open("omt0").unwrap().counters().unwrap().egress);
        assert!(dropped.rx().packets >= 100);
        assert_eq!(dropped.allowed.packets, 0);
        watched.within(|| tap.remove());
    }
    open.sort();
    println!(
        "made again {TIMES} times: {leaked} of {sent} frames that were sent before the guard passed; open for {:?} in half of them, {:?} in nine of ten, {:?} at most",
        open[open.len() / 2],
        open[open.len() * 9 / 10],
        open[open.len() - 1]
    );
}

#[test]
fn what_exists_is_guarded_at_the_start_and_stays_so_when_the_watch_is_killed() {
    let Some(stage) = Stage::set() else { return };
    let mut watched = Watched::over(stage);
    watched.soon("it is guarded", || {
        watched.standing() == Some(Standing::InForce)
    });
    watched.soon("it is up", || watched.stage.tap.send(&hostile()).is_ok());
    let _ = watched.watch.kill();
    watched.watch.wait().unwrap();
    assert_eq!(watched.standing(), Some(Standing::InForce));
    let identity = || watched.within(|| Guard::open("omt0").unwrap().identity());
    let before = identity();
    // The next one takes it as it is.
    let files = TempDir::new().unwrap();
    let path = file(&files, TAP);
    let ran = watched
        .stage
        .omerta(&format!("guard watch --once --config {}", path.display()))
        .done();
    assert!(ran.stdout.contains("in force"), "{ran:?}");
    assert_eq!(identity(), before);
}

#[test]
fn a_guard_that_is_taken_away_or_cut_comes_back() {
    let Some(stage) = Stage::set() else { return };
    let watched = Watched::over(stage);
    let guarded = || watched.standing() == Some(Standing::InForce);
    watched.soon("it is guarded", guarded);
    watched.within(|| Guard::open("omt0").and_then(Guard::detach).unwrap());
    watched.soon("it is guarded again", guarded);
    // Its pins alone: what they pinned judges on, so it was never set down.
    watched.lose_pins(|| {});
    watched.soon("it is guarded still", guarded);
}

#[test]
fn what_is_declared_to_be_redirected_is_again_after_its_pins_are_lost() {
    let Some(stage) = Stage::set() else { return };
    if omerta_dataplane::Hook::of_this_kernel().unwrap() != omerta_dataplane::Hook::Tcx {
        // Where there is no TCX nothing can be redirected.
        return;
    }
    let watched = Watched::declaring(stage, &format!("{TAP}redirect = true\n"));
    let redirected = || {
        let status = watched.within(|| Guard::open("omt0").and_then(|guard| guard.status()));
        status.is_ok_and(|status| status.redirect.is_some_and(|redirect| redirect.in_force))
    };
    watched.soon("it is redirected", redirected);
    watched.lose_pins(|| {});
    watched.soon("it is redirected again", redirected);
}

#[test]
fn what_was_revoked_or_has_ended_stays_so_when_the_pins_are_lost() {
    const SERVICE: &str = "udp:10.99.0.1:9999";
    let Some(stage) = Stage::set() else { return };
    let declared = TAP.replace("\"udp:192.0.2.10:51820\"", &format!("\"{SERVICE}\""));
    let watched = Watched::declaring(stage, &declared);
    let service = watched.within(service);
    watched.soon("it is guarded", || {
        watched.standing() == Some(Standing::InForce)
    });
    watched.soon("it is up", || watched.stage.tap.send(&hostile()).is_ok());
    let send = || {
        for _ in 0..50 {
            // Where it is set down, nothing passes.
            let _ = watched.stage.tap.send(&frame([0x52, 0x54, 0, 0, 0, 0xfe]));
        }
    };
    let passed = || {
        send();
        std::thread::sleep(Duration::from_millis(50));
        received(&service)
    };
    assert!(passed() > 0, "what is declared is allowed");

    watched.stage.guard("revoke", SERVICE).done();
    assert_eq!(passed(), 0, "revoked");
    watched.lose_pins(send);
    assert_eq!(passed(), 0, "LEAKED to what was revoked");
    assert_eq!(watched.stage.shown()["allow"], serde_json::json!([]));

    watched.stage.guard("allow", SERVICE).done();
    watched.stage.guard("mode", "direct").done();
    watched.stage.guard("limit", "egress-packets=20k").done();
    watched.stage.guard("lease", "1s").done();
    watched.soon("the lease ends", || {
        watched.stage.shown()["lease"]["expired"] == true
    });
    let _ = passed();
    let enforced = |shown: serde_json::Value| {
        ["allow", "mode", "limits", "lease", "gateway_mac"].map(|key| shown[key].clone())
    };
    let before = enforced(watched.stage.shown());
    watched.lose_pins(send);
    assert_eq!(passed(), 0, "LEAKED after the lease");
    assert_eq!(enforced(watched.stage.shown()), before);
    watched.stage.guard("lease", "off").done();
    assert!(passed() > 0, "renewed by a command");
}

#[test]
fn what_is_no_file_is_refused_at_once() {
    let files = TempDir::new().unwrap();
    let pipe = files.path().join("taps.toml");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for path in [&pipe, files.path()] {
        omerta(&format!("guard watch --config {}", path.display()))
            .failed(2, &["not a regular file"]);
    }
}

#[test]
fn a_tap_that_is_renamed_keeps_its_guard_and_the_next_of_its_name_gets_one() {
    let Some(stage) = Stage::set() else { return };
    let watched = Watched::over(stage);
    watched.soon("it is guarded", || {
        watched.standing() == Some(Standing::InForce)
    });
    watched.within(|| {
        ip("link set omt0 down").unwrap();
        ip("link set omt0 name omt9").unwrap();
        ip("link set omt9 up").unwrap();
    });
    let second = watched.within(|| Tap::create("omt0").unwrap());
    watched.soon("the second is guarded", || {
        watched.standing() == Some(Standing::InForce)
    });
    let both = watched.within(|| Guard::list().unwrap());
    assert_eq!(both, ["omt0", "omt9"]);
    watched.within(|| {
        Guard::open("omt9").and_then(Guard::detach).unwrap();
        second.remove();
    });
}

/// As `guard attach` does.
#[test]
fn a_tap_is_declared_by_any_of_its_names() {
    let Some(stage) = Stage::set() else { return };
    let other = "consumer-7";
    stage
        .namespace()
        .ip(&format!("link property add dev omt0 altname {other}"))
        .unwrap();
    let files = TempDir::new().unwrap();
    let path = file(&files, &TAP.replace("omt0", other));
    let once = || stage.omerta(&format!("guard watch --once --config {}", path.display()));
    assert!(once().done().stdout.contains("guarded"));
    assert_eq!(stage.shown()["state"], "in_force");
    // It is known again.
    assert!(once().done().stdout.contains("in force"));
    stage.guard("detach", "").done();
}

#[test]
fn what_cannot_be_guarded_is_left_down_and_told() {
    let Some(stage) = Stage::set() else { return };
    let files = TempDir::new().unwrap();
    let path = file(&files, TAP);
    let once =
        || -> Ran { stage.omerta(&format!("guard watch --once --config {}", path.display())) };
    // What is another's is neither changed nor replaced.
    let inode = stage.namespace().inode().unwrap();
    let foreign = format!("/sys/fs/bpf/omerta/{inode}/omt0");
    std::fs::create_dir_all(format!("{foreign}/foreign")).unwrap();
    let ran = once();
    std::fs::remove_dir_all(&foreign).unwrap();
    assert_eq!(ran.code, 1, "{ran:?}");
    for words in [
        "omt0: not guarded, and left down",
        "foreign",
        "1 of the declared",
    ] {
        assert!(ran.stderr.contains(words), "{ran:?}");
    }
    assert!(stage.tap.send(&hostile()).is_err(), "it is down");
    let ran = once().done();
    assert!(ran.stdout.contains("guarded"), "{ran:?}");
}

#[test]
fn a_file_that_is_wrong_guards_nothing() {
    omerta("guard watch --config /nowhere/taps.toml").failed(3, &["/nowhere/taps.toml"]);
    let files = TempDir::new().unwrap();
    let path = file(&files, "[[tap]]\nname = \"omt0\"\nport = 1\n");
    let mut watch = command(&format!("guard watch --config {}", path.display()));
    Ran::from(watch.output().unwrap()).failed(2, &["taps.toml", "port"]);
}

#[test]
fn more_changes_than_are_told_lose_no_tap() {
    let Some(watched) = Watched::set() else {
        return;
    };
    let pid = Pid::from_raw(watched.watch.id().cast_signed());
    kill(pid, Signal::SIGSTOP).unwrap();
    let files = TempDir::new().unwrap();
    let batch = files.path().join("batch");
    let changes = (0..4000).map(|turn| format!("link set lo mtu {}\n", 2000 + turn % 2));
    std::fs::write(&batch, changes.collect::<String>()).unwrap();
    let tap = watched.within(|| {
        // What is made in the middle is not told: the socket has no room for so much.
        ip(&format!("-batch {}", batch.display())).unwrap();
        let tap = Tap::create("omt0").unwrap();
        ip(&format!("-batch {}", batch.display())).unwrap();
        tap.up().unwrap();
        tap
    });
    kill(pid, Signal::SIGCONT).unwrap();
    watched.soon("it is guarded", || {
        watched.standing() == Some(Standing::InForce)
    });
    watched.soon("it is up", || tap.send(&hostile()).is_ok());
}

#[test]
fn without_any_bpffs_a_watched_tap_is_judged_until_its_pins_are_back() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: guards and taps need root");
        return;
    }
    let output = std::process::Command::new("unshare")
        .args([
            "--pid",
            "--fork",
            "--kill-child",
            "--mount",
            "--mount-proc",
            "--",
        ])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "watch::unmount_every_bpffs_under_a_watch",
            "--ignored",
            "--nocapture",
        ])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let passed = output.status.success() && said.contains("1 passed");
    assert!(passed, "{said}{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
#[ignore = "run by another test, with mounts of its own"]
fn unmount_every_bpffs_under_a_watch() {
    assert_eq!(std::process::id(), 1, "only where nobody else's mounts are");
    let mounts = [
        "mount --make-rprivate /",
        "mount -t tmpfs -o mode=0755 tmpfs /run",
        "while mountpoint -q /sys/fs/bpf; do umount /sys/fs/bpf; done",
        "mount -t bpf -o mode=0700 bpf /sys/fs/bpf",
    ];
    shell(&mounts.join(" && "));
    let Some(stage) = Stage::set() else { return };
    if omerta_dataplane::Hook::of_this_kernel().unwrap() != omerta_dataplane::Hook::Tcx {
        // Filters are their interface's: they need no mount.
        return;
    }
    let watched = Watched::over(stage);
    let service = watched.within(service);
    watched.soon("it is guarded", || {
        watched.standing() == Some(Standing::InForce)
    });
    watched.soon("it is up", || watched.stage.tap.send(&hostile()).is_ok());
    received(&service);
    let identity = || watched.within(|| Guard::open("omt0").unwrap().identity());
    let before = identity();
    let is_bpffs = || shell_says("stat -f -c %T /sys/fs/bpf") == "bpf_fs\n";
    assert!(is_bpffs());
    shell("umount -l /sys/fs/bpf && umount -l /run/omerta-bpf");
    let (mut sent, end) = (0, Instant::now() + PATIENCE);
    // Whoever looks for the guard mounts a bpffs too, so nothing is asked before the watch has.
    while !is_bpffs() {
        assert!(Instant::now() < end, "bpffs is not mounted again");
        for _ in 0..50 {
            watched.stage.tap.send(&hostile()).unwrap();
            sent += 1;
        }
    }
    watched.soon("its pins are back", || {
        watched.stage.tap.send(&hostile()).unwrap();
        sent += 1;
        watched.standing() == Some(Standing::InForce)
    });
    assert_ne!(identity(), before);
    for _ in 0..50 {
        watched.stage.tap.send(&hostile()).unwrap();
    }
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(received(&service), 0, "LEAKED");
    println!("{sent} hostile frames while bpffs was lost: none passed");
}

fn shell(script: &str) {
    let done = std::process::Command::new("sh")
        .args(["-c", script])
        .status();
    assert!(done.unwrap().success(), "{script}");
}

fn shell_says(script: &str) -> String {
    let said = std::process::Command::new("sh")
        .args(["-c", script])
        .output();
    String::from_utf8(said.unwrap().stdout).unwrap()
}
