//! omertad dies; guests that run live on, and of others nothing is left.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use omerta_dataplane::Guard;
use omerta_test_support::{Cgroup, FrameSender, IDLE, Namespace, Orphans};
use omerta_verdict::Reason;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::daemon::{Daemon, command, complaint, namespace, run_to_end};
use crate::guests::{give_image, request, run};

const METRICS_OFF: [&str; 2] = ["--metrics", "off"];

fn start_again(stage: (Namespace, TempDir)) -> Daemon {
    Daemon::start_in(stage.0, stage.1, &METRICS_OFF)
}

fn start() -> Daemon {
    let daemon = Daemon::start();
    give_image(&daemon, IDLE);
    daemon
}

/// All that a guest may leave on this host. What belongs to other omertads is not among it.
pub fn traces(namespace: &Namespace, directory: &Path) -> Vec<String> {
    let mut traces = Vec::new();
    for pid in Orphans::living(directory) {
        traces.push(format!("process {pid}"));
    }
    let taps = namespace.enter(|| {
        let links = std::fs::read_dir("/proc/thread-self/net/dev_snmp6")
            .into_iter()
            .flatten();
        let links = links
            .flatten()
            .map(|entry| entry.file_name().into_string().unwrap());
        let guards = Guard::pinned()
            .unwrap()
            .into_iter()
            .map(|guard| guard.interface);
        (
            links
                .filter(|name| name.starts_with("om"))
                .collect::<Vec<_>>(),
            guards.collect::<Vec<_>>(),
        )
    });
    let (taps, guards) = taps.unwrap();
    traces.extend(taps.into_iter().map(|tap| format!("interface {tap}")));
    traces.extend(guards.into_iter().map(|tap| format!("guard of {tap}")));
    for entry in std::fs::read_dir(directory.join("run"))
        .into_iter()
        .flatten()
    {
        let path = entry.unwrap().path();
        if path.is_dir() {
            traces.push(format!("directory {}", path.display()));
        }
    }
    traces
}

pub fn show(daemon: &Daemon, name: &str) -> Value {
    daemon.get(&format!("/v1/guests/{name}")).json()
}

fn within_a_minute(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < end, "{what}: not in a minute");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn guest_of_a_killed_omertad_runs_on_and_is_taken_over_with_all_that_was_known() {
    let daemon = start();
    let mut body: Value = serde_json::from_str(&request("alpha", "bare")).unwrap();
    body["labels"] = json!({ "owner": "me" });
    let body = body.to_string();
    assert_eq!(daemon.post("/v1/guests", &body).status, 201);
    let before = show(&daemon, "alpha");
    let stage = daemon.die();
    assert_eq!(Orphans::living(stage.1.path()).len(), 1, "it runs on");

    let daemon = start_again(stage);
    let after = show(&daemon, "alpha");
    assert_eq!(after["state"], "running", "{}", daemon.log());
    for same in [
        "pid",
        "address",
        "mac",
        "interface",
        "consumer",
        "labels",
        "memory_mib",
        "image",
    ] {
        assert_eq!(after[same], before[same], "{same}");
    }
    let events = daemon.get("/v1/events?guest=alpha").body;
    assert!(events.contains("\"adopted\""), "{events}");

    // What it holds is held, and it obeys.
    let again = daemon.post("/v1/guests", &request("alpha", "bare"));
    assert!(
        again
            .refusal(409, "refused")
            .contains("exists and is running")
    );
    let other = run(&daemon, "beta");
    assert_ne!(other["address"], after["address"]);
    for (order, state) in [("pause", "held"), ("resume", "running")] {
        let answer = daemon.post(&format!("/v1/guests/alpha/{order}"), "");
        assert_eq!(
            (answer.status, answer.json()["state"].clone()),
            (200, json!(state))
        );
    }
    for name in ["alpha", "beta"] {
        let ended = daemon.post(&format!("/v1/guests/{name}/kill"), "");
        assert_eq!(ended.json()["ended"]["leftovers"], json!(null), "{ended:?}");
    }
    assert_eq!(traces(&daemon.namespace, daemon.path()), [""; 0]);
}

/// A restart by hand, or another unit: the guests' cgroups are where the dead omertad was.
#[test]
fn guest_is_taken_over_by_an_omertad_in_another_cgroup_and_leaves_nothing_in_the_first() {
    let [first, second] = [Cgroup::new().unwrap(), Cgroup::new().unwrap()];
    let start_in = |cgroup: &Cgroup, (namespace, directory): (Namespace, TempDir)| {
        let mut command = command(&namespace, directory.path());
        command.args(METRICS_OFF);
        cgroup.contain(&mut command).unwrap();
        Daemon::start_by(command, namespace, directory)
    };
    let daemon = start_in(&first, (namespace(), tempfile::tempdir().unwrap()));
    give_image(&daemon, IDLE);
    let before = run(&daemon, "alpha");
    let guests = |cgroup: &Cgroup| {
        let mut all = cgroup.below();
        all.retain(|path| path.to_string_lossy().contains("omerta-guest-"));
        all
    };
    assert_ne!(guests(&first), [""; 0].map(PathBuf::from));

    let daemon = start_in(&second, daemon.die());
    let after = show(&daemon, "alpha");
    assert_eq!(after["state"], "running", "{after}");
    assert_eq!(after["pid"], before["pid"]);
    let ended = daemon.post("/v1/guests/alpha/kill", "").json();
    assert_eq!(ended["ended"]["leftovers"], json!(null), "{ended}");
    assert_eq!(guests(&first), [""; 0].map(PathBuf::from));

    // One that does not live on is found there too.
    run(&daemon, "beta");
    let (namespace, directory) = daemon.die();
    let store = rusqlite::Connection::open(directory.path().join("state/guests.db")).unwrap();
    store
        .execute("UPDATE guests SET step = 'launched'", [])
        .unwrap();
    drop(store);
    let daemon = start_in(&first, (namespace, directory));
    assert_eq!(show(&daemon, "beta")["ended"]["cause"], "abandoned");
    assert_eq!(guests(&second), [""; 0].map(PathBuf::from));
    assert_eq!(traces(&daemon.namespace, daemon.path()), [""; 0]);
}

#[test]
fn guard_of_an_older_omertad_gets_other_programs_and_the_guest_runs_on() {
    let daemon = start();
    let tap = run(&daemon, "alpha")["interface"]
        .as_str()
        .unwrap()
        .to_owned();
    let stage = daemon.die();
    let inode = stage.0.inode().unwrap();
    let note = format!("/sys/fs/bpf/omerta/{inode}/{tap}/programs");
    let current = std::fs::read_link(&note).unwrap();
    std::fs::remove_file(&note).unwrap();
    std::os::unix::fs::symlink("0000000000000001", &note).unwrap();
    let daemon = start_again(stage);
    assert_eq!(
        show(&daemon, "alpha")["state"],
        "running",
        "{}",
        daemon.log()
    );
    assert_eq!(std::fs::read_link(&note).unwrap(), current);
    // Nobody takes that for another's doing.
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(
        show(&daemon, "alpha")["state"],
        "running",
        "{}",
        daemon.log()
    );
    let ended = daemon.post("/v1/guests/alpha/kill", "");
    assert_eq!(ended.json()["ended"]["leftovers"], json!(null), "{ended:?}");
}

#[test]
fn adopted_guest_whose_process_ends_is_told_as_ended() {
    let daemon = start();
    let pid = run(&daemon, "alpha")["pid"].as_i64().unwrap();
    let daemon = start_again(daemon.die());
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
    within_a_minute("its end is told", || {
        show(&daemon, "alpha")["state"] == "ended"
    });
    assert_eq!(show(&daemon, "alpha")["ended"]["cause"], "exited");
    assert_eq!(traces(&daemon.namespace, daemon.path()), [""; 0]);
}

#[test]
fn guest_that_was_held_stays_held() {
    let daemon = start();
    run(&daemon, "alpha");
    assert_eq!(daemon.post("/v1/guests/alpha/pause", "").status, 200);
    let daemon = start_again(daemon.die());
    assert_eq!(show(&daemon, "alpha")["state"], "held", "{}", daemon.log());
    assert_eq!(
        daemon.post("/v1/guests/alpha/resume", "").json()["state"],
        "running"
    );
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
}

#[test]
fn guest_that_ended_while_no_omertad_was_there_leaves_nothing_and_its_name_is_free() {
    let daemon = start();
    let pid = run(&daemon, "alpha")["pid"].as_i64().unwrap();
    let stage = daemon.die();
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
    within_a_minute("it is gone", || Orphans::living(stage.1.path()).is_empty());
    let daemon = start_again(stage);
    let ended = show(&daemon, "alpha");
    assert_eq!(ended["ended"]["cause"], "abandoned", "{ended}");
    assert_eq!(traces(&daemon.namespace, daemon.path()), [""; 0]);
    run(&daemon, "alpha");
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
}

/// Each thing that was proven before the guest ran is proven again, or the guest ends.
#[test]
fn guest_whose_guard_is_not_what_it_was_is_ended() {
    type Tamper = fn(&Guard);
    let tampers: [(&str, Tamper); 2] = [
        ("its policy", |guard| {
            guard
                .allow(&["udp:198.51.100.1:1".parse().unwrap()])
                .unwrap();
        }),
        ("removed", |guard| {
            Guard::open_as(guard.interface(), &"omertad".parse().unwrap())
                .unwrap()
                .detach()
                .unwrap();
        }),
    ];
    for (what, tamper) in tampers {
        let daemon = start();
        run(&daemon, "alpha");
        let stage = daemon.die();
        let tampered = stage.0.enter(|| {
            tamper(&Guard::open_as("omalpha", &"omertad".parse().unwrap()).unwrap());
        });
        tampered.unwrap();
        let daemon = start_again(stage);
        let guest = show(&daemon, "alpha");
        assert_eq!(guest["ended"]["cause"], "abandoned", "{what}: {guest}");
        assert_eq!(traces(&daemon.namespace, daemon.path()), [""; 0], "{what}");
    }
}

/// Unknown is not dead: it runs on behind its guard, keeps its name, and is removed once its process is gone.
#[test]
fn guest_whose_row_cannot_be_understood_is_left_running_behind_its_guard_and_told() {
    let daemon = start();
    let pid = run(&daemon, "alpha")["pid"].as_i64().unwrap();
    let pid = Pid::from_raw(i32::try_from(pid).unwrap());
    let stage = daemon.die();
    let store = rusqlite::Connection::open(stage.1.path().join("state/guests.db")).unwrap();
    store
        .execute("UPDATE guests SET request = '{'", [])
        .unwrap();
    drop(store);
    let daemon = start_again(stage);
    let log = daemon.log();
    assert!(
        log.contains("cannot be understood") && log.contains(&format!("pid={pid}")),
        "{log}"
    );
    kill(pid, None).expect("it lives");
    let guarded = || Guard::open("omalpha").and_then(|guard| guard.verify());
    daemon.namespace.enter(guarded).unwrap().unwrap();
    let again = daemon.post("/v1/guests", &request("alpha", "bare"));
    assert!(again.status >= 400, "{again:?}");
    kill(pid, None).expect("it lives");
    let stage = daemon.die();
    kill(pid, Signal::SIGKILL).unwrap();
    within_a_minute("it is gone", || Orphans::living(stage.1.path()).is_empty());
    let daemon = start_again(stage);
    let log = daemon.log();
    assert!(log.contains("removed what was left"), "{log}");
    assert_eq!(traces(&daemon.namespace, daemon.path()), [""; 0]);
    run(&daemon, "alpha");
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
}

#[test]
fn after_a_boot_of_the_host_guests_are_told_as_ended_by_it_and_hold_nothing() {
    let daemon = start();
    run(&daemon, "alpha");
    let stage = daemon.die();
    // As a boot leaves it: the processes, the taps and the pins are gone, the store is there.
    drop(Orphans::below(stage.1.path()));
    within_a_minute("it is gone", || Orphans::living(stage.1.path()).is_empty());
    let store = rusqlite::Connection::open(stage.1.path().join("state/guests.db")).unwrap();
    store
        .execute("UPDATE guests SET boot = 'another'", [])
        .unwrap();
    drop(store);
    let daemon = start_again(stage);
    let ended = show(&daemon, "alpha");
    assert_eq!(ended["ended"]["cause"], "rebooted", "{ended}");
    assert_eq!(traces(&daemon.namespace, daemon.path()), [""; 0]);
}

#[test]
fn second_omertad_is_refused_the_store_of_the_first() {
    let first = Daemon::start();
    let elsewhere = tempfile::tempdir().unwrap();
    let at = |name: &str| elsewhere.path().join(name);
    let mut second = first.namespace.command(env!("CARGO_BIN_EXE_omertad"));
    second.arg("--socket").arg(at("omertad.sock"));
    second.arg("--run-dir").arg(at("run"));
    second.args(["--metrics", "off", "--guest-pool", "10.99.0.0/16"]);
    second.arg("--state-dir").arg(first.path().join("state"));
    let line = complaint(&run_to_end(second), 1);
    assert!(
        line.contains("guests.db") && line.contains("--state-dir"),
        "{line}"
    );
}

/// A file system of so many bytes, until dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn at(path: &Path, bytes: usize) -> Self {
        use nix::mount::{MsFlags, mount};
        std::fs::create_dir_all(path).unwrap();
        let size = format!("size={bytes}");
        let none = MsFlags::empty();
        mount(
            Some("tmpfs"),
            path,
            Some("tmpfs"),
            none,
            Some(size.as_str()),
        )
        .unwrap();
        Self(path.to_owned())
    }

    fn fill(&self) {
        let mut filler = std::fs::File::create(self.0.join("filler")).unwrap();
        while std::io::Write::write(&mut filler, &[0; 512]).is_ok() {}
    }

    fn make_room(&self) {
        std::fs::remove_file(self.0.join("filler")).unwrap();
    }

    fn make_read_only(&self) {
        use nix::mount::{MsFlags, mount};
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, &self.0, None::<&str>, flags, None::<&str>).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn on_a_full_disk_guests_are_refused_and_those_that_run_go_on_and_end() {
    let directory = tempfile::tempdir().unwrap();
    let disk = SmallDisk::at(&directory.path().join("state"), 1 << 20);
    let daemon = Daemon::start_with(directory, &METRICS_OFF);
    give_image(&daemon, IDLE);
    run(&daemon, "alpha");
    run(&daemon, "beta");
    disk.fill();
    let refused = daemon.post("/v1/guests", &request("gamma", "bare"));
    assert!(refused.status >= 400, "{refused:?}");
    assert!(
        refused.body.contains("the disk of the store is full"),
        "{refused:?}"
    );
    assert_eq!(show(&daemon, "alpha")["state"], "running");
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
    // Once there is room nothing of it is in the way of the next of its name.
    disk.make_room();
    run(&daemon, "alpha");
    let daemon = start_again(daemon.die());
    for name in ["alpha", "beta"] {
        assert_eq!(show(&daemon, name)["state"], "running", "{}", daemon.log());
        assert_eq!(
            daemon.post(&format!("/v1/guests/{name}/kill"), "").status,
            200
        );
    }
    assert_eq!(traces(&daemon.namespace, daemon.path()), [""; 0]);
    drop(daemon);
    drop(disk);
}

#[test]
fn on_a_read_only_disk_it_does_not_start_and_says_why_and_guests_run_on() {
    let directory = tempfile::tempdir().unwrap();
    let disk = SmallDisk::at(&directory.path().join("state"), 1 << 20);
    let daemon = Daemon::start_with(directory, &METRICS_OFF);
    give_image(&daemon, IDLE);
    let before = run(&daemon, "alpha");
    let (namespace, directory) = daemon.die();
    disk.make_read_only();
    let mut command = command(&namespace, directory.path());
    command.args(METRICS_OFF);
    let line = complaint(&run_to_end(command), 1);
    assert!(
        line.contains("store") && line.contains("read-only"),
        "{line}"
    );
    assert_eq!(Orphans::living(directory.path()).len(), 1, "it runs on");
    nix::mount::mount(
        None::<&str>,
        &disk.0,
        None::<&str>,
        nix::mount::MsFlags::MS_REMOUNT,
        None::<&str>,
    )
    .unwrap();
    let daemon = start_again((namespace, directory));
    assert_eq!(show(&daemon, "alpha")["pid"], before["pid"]);
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
    drop(daemon);
    drop(disk);
}

#[test]
fn told_to_keep_guests_it_leaves_them_to_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("omertad.toml");
    std::fs::write(&file, "[recovery]\non_stop = \"keep\"\n").unwrap();
    let arguments = ["--metrics", "off", "--config", file.to_str().unwrap()];
    let mut daemon = Daemon::start_with(directory, &arguments);
    give_image(&daemon, IDLE);
    let before = run(&daemon, "alpha");
    daemon.process.signal(Signal::SIGTERM).unwrap();
    let status = daemon.process.wait(Duration::from_secs(10)).unwrap();
    assert_eq!(
        status.and_then(|status| status.code()),
        Some(0),
        "{}",
        daemon.log()
    );
    let daemon = start_again(daemon.die());
    assert_eq!(
        show(&daemon, "alpha")["pid"],
        before["pid"],
        "{}",
        daemon.log()
    );
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
}

/// Starts one whose configuration is this file's.
pub fn start_configured((namespace, directory): (Namespace, TempDir), config: &str) -> Daemon {
    let file = directory.path().join("omertad.toml");
    std::fs::write(&file, config).unwrap();
    let arguments = ["--metrics", "off", "--config", file.to_str().unwrap()];
    let mut command = namespace.command(env!("CARGO_BIN_EXE_omertad"));
    let at = |name: &str| directory.path().join(name);
    command.arg("--socket").arg(at("omertad.sock"));
    command.arg("--run-dir").arg(at("run"));
    command.arg("--state-dir").arg(at("state"));
    command.args(arguments);
    Daemon::start_by(command, namespace, directory)
}

/// The row says what the guest is; what the configuration says by now is for those that come.
#[test]
fn guest_is_taken_over_as_it_was_run_whatever_the_configuration_has_become() {
    let stage = (namespace(), tempfile::tempdir().unwrap());
    let images = format!("image_dir = {:?}\n", stage.1.path().join("state/images"));
    let old = format!(
        "{images}accel = \"tcg\"\non_violation = \"drop\"\nguest_pool = \"10.98.0.0/16\"\n[limits.egress]\npackets_per_second = 5000\n"
    );
    let daemon = start_configured(stage, &old);
    give_image(&daemon, IDLE);
    let before = [run(&daemon, "alpha"), run(&daemon, "beta")];
    let new = "accel = \"kvm\"\nmachine = \"microvm\"\non_violation = \"pause\"\nguest_pool = \"10.99.0.0/29\"\nmax_guests = 1\n\
        max_vcpus = 1\nmemory_reserve_mib = 100000000\n[limits.ingress]\nbits_per_second = 9000\n\
        [jail]\nuids = \"70000-70001\"\npaths = [\"/opt\"]\n[images]\nstore = \"/nonexistent\"\n[recovery]\nlease = \"1h\"\n";
    let daemon = start_configured(daemon.die(), new);
    for before in before {
        let name = before["name"].as_str().unwrap();
        let after = show(&daemon, name);
        assert_eq!(after["state"], "running", "{after}: {}", daemon.log());
        for same in [
            "id",
            "pid",
            "address",
            "mac",
            "on_violation",
            "limits",
            "cpus",
        ] {
            assert_eq!(after[same], before[same], "{same}");
        }
        let ended = daemon.post(&format!("/v1/guests/{name}/kill"), "").json();
        assert_eq!(ended["ended"]["leftovers"], json!(null), "{ended}");
    }
    assert_eq!(traces(&daemon.namespace, daemon.path()), [""; 0]);
}

fn lease_of(namespace: &Namespace) -> Option<omerta_dataplane::Lease> {
    let look = || Guard::open("omalpha").unwrap().status().unwrap().lease;
    namespace.enter(look).unwrap()
}

#[test]
fn without_a_lease_guests_go_on_and_with_one_they_are_cut_off_until_an_omertad_is_back() {
    let stage = (namespace(), tempfile::tempdir().unwrap());
    let images = format!("image_dir = {:?}\n", stage.1.path().join("state/images"));
    let leased = format!("{images}[recovery]\nlease = \"10s\"\n");
    let daemon = start_configured(stage, &leased);
    give_image(&daemon, IDLE);
    let before = run(&daemon, "alpha");
    let dropped = |namespace: &Namespace| {
        namespace
            .enter(|| {
                let sender = FrameSender::open("omalpha").unwrap();
                // It says so where the guard drops the frame.
                let _ = sender.send(&[0x52; 60]);
                let counters = Guard::open("omalpha").unwrap().counters().unwrap();
                let expired = |(reason, count): &(Reason, omerta_dataplane::Count)| {
                    (*reason == Reason::LeaseExpired).then_some(count.packets)
                };
                counters.ingress.dropped.iter().find_map(expired).unwrap()
            })
            .unwrap()
    };
    let stage = daemon.die();
    within_a_minute("its lease is over", || lease_of(&stage.0).unwrap().expired);
    // The programs ask the clock once in a tick.
    within_a_minute("a frame is dropped for that", || dropped(&stage.0) > 0);
    assert_eq!(Orphans::living(stage.1.path()).len(), 1, "it lives on");

    let daemon = start_configured(stage, &leased);
    assert_eq!(show(&daemon, "alpha")["pid"], before["pid"]);
    within_a_minute("its lease is renewed", || {
        !lease_of(&daemon.namespace).unwrap().expired
    });
    let known = dropped(&daemon.namespace);
    assert_eq!(dropped(&daemon.namespace), known, "no frame more");

    let daemon = start_configured(daemon.die(), &images);
    within_a_minute("it has no lease any more", || {
        lease_of(&daemon.namespace).is_none()
    });
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
}

#[test]
fn store_is_roots_alone() {
    let daemon = Daemon::start();
    let store = std::fs::metadata(daemon.path().join("state/guests.db")).unwrap();
    assert_eq!(store.permissions().mode() & 0o777, 0o600);
}
