//! The jail around each QEMU, seen from outside by /proc and the cgroups, and from inside by a program
//! in QEMU's place that tries what a taken-over QEMU would.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

mod stage;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use omerta_vm_launcher::{GuestEvent, JailError, LaunchError, Part, Paused, Running, Spec};
use stage::{CHATTER, IDLE, Stage};

async fn run(spec: Spec) -> Running {
    let guarded = Paused::launch(spec).await.unwrap().guard().await.unwrap();
    guarded.resume().await.unwrap()
}

fn of(pid: u32, file: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap()
}

/// The value of a line `NAME:\tVALUE`.
fn field(text: &str, name: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name} in {text}"))
        .trim_start_matches(':')
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn qemu_is_nobody_and_can_become_nobody_else() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async {
        let running = run(spec).await;
        let status = of(running.pid(), "status");
        let uid = field(&status, "Uid");
        let (first, _) = uid.split_once(' ').unwrap();
        assert!(first.parse::<u32>().unwrap() >= 1_900_000_000, "{uid}");
        assert_eq!(
            uid,
            [first; 4].join(" "),
            "real, effective, saved, of files"
        );
        assert_eq!(field(&status, "Gid"), uid);
        assert_eq!(field(&status, "Groups"), "");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(&status, set), "0000000000000000", "{set}");
        }
        assert_eq!(field(&status, "NoNewPrivs"), "1");
        assert_eq!(field(&status, "Seccomp"), "2");
        running.kill().await;
    });
    stage.assert_nothing_is_left();
}

#[test]
fn two_guests_have_a_user_each_and_give_it_back() {
    let (stage, other) = (Stage::new(IDLE), Stage::new(IDLE));
    let user = |running: &Running| field(&of(running.pid(), "status"), "Uid");
    let mut second = other.spec();
    second.tap = "omweb-2".into();
    second.address = "10.77.0.6".parse().unwrap();
    second.gateway = "10.77.0.5".parse().unwrap();
    let uids = stage.run(|spec| async {
        let (first, second) = (run(spec).await, run(second).await);
        let uids = [user(&first), user(&second)];
        for running in [first, second] {
            assert_eq!(running.kill().await.leftovers, [""; 0]);
        }
        uids
    });
    assert_ne!(uids[0], uids[1]);
    for uid in uids {
        let (uid, _) = uid.split_once(' ').unwrap();
        assert_eq!(cgroups_named(uid), Vec::<PathBuf>::new());
    }
    stage.assert_nothing_is_left();
}

/// Every cgroup of the guest whose QEMU is this user's.
fn cgroups_named(uid: &str) -> Vec<PathBuf> {
    let found = Command::new("find")
        .args(["/sys/fs/cgroup", "-type", "d", "-name"])
        .arg(format!("omerta-guest-{uid}"))
        .output()
        .unwrap();
    let found = String::from_utf8(found.stdout).unwrap();
    found.lines().map(PathBuf::from).collect()
}

#[test]
fn qemu_sees_its_own_files_devices_and_namespaces() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async {
        let running = run(spec).await;
        let pid = running.pid();
        for namespace in ["net", "mnt", "ipc", "uts"] {
            let [its, ours] = [pid.to_string(), "thread-self".into()]
                .map(|of| fs::read_link(format!("/proc/{of}/ns/{namespace}")).unwrap());
            assert_ne!(its, ours, "{namespace}");
        }
        // With lo and nothing else, and nothing listening.
        let interfaces = of(pid, "net/dev");
        assert_eq!(interfaces.lines().count(), 3, "{interfaces}");

        let root = PathBuf::from(format!("/proc/{pid}/root"));
        let names = |directory: &str| -> BTreeSet<String> {
            let entries = fs::read_dir(root.join(directory)).unwrap();
            entries
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect()
        };
        let known = ["boot", "dev", "etc", "lib", "lib64", "usr"];
        let here = names("");
        assert!(here.iter().all(|n| known.contains(&n.as_str())), "{here:?}");
        let boot: Vec<_> = names("boot").into_iter().collect();
        assert_eq!(boot, ["initrd"], "the kernel has gone once it was read");
        let devices: Vec<_> = names("dev").into_iter().collect();
        assert_eq!(devices, ["null", "urandom", "zero"]);
        let configuration: Vec<_> = names("etc").into_iter().collect();
        assert_eq!(configuration, ["ld.so.cache"]);

        for line in of(pid, "mountinfo").lines() {
            let fields: Vec<_> = line.split(' ').collect();
            let (place, options) = (fields[4], fields[5]);
            let has = |wanted| options.split(',').any(|option| option == wanted);
            assert!(has("nosuid"), "{line}");
            if place.starts_with("/dev/") {
                assert!(has("noexec"), "{line}");
            } else {
                assert!(has("ro") && has("nodev"), "{line}");
            }
        }
        running.kill().await;
    });
    stage.assert_nothing_is_left();
}

#[test]
fn qemu_has_only_the_descriptors_that_it_was_handed() {
    let stage = Stage::new(IDLE);
    // Opened without close-on-exec, as a library might.
    let secret = fs::File::open("/etc/passwd").unwrap();
    nix::fcntl::fcntl(
        &secret,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
    )
    .unwrap();
    let run_dir = stage.spec().run_dir;
    stage.run(|spec| async {
        let running = run(spec).await;
        for entry in fs::read_dir(format!("/proc/{}/fd", running.pid())).unwrap() {
            let Ok(target) = fs::read_link(entry.unwrap().path()) else {
                continue;
            };
            let is_its = ["socket:", "anon_inode:", "pipe:"]
                .iter()
                .any(|kind| target.to_string_lossy().starts_with(kind))
                || target.starts_with(&run_dir)
                || target.ends_with("net/tun")
                || target.ends_with("dev/null")
                || target.ends_with("dev/urandom")
                || target.to_string_lossy().contains("boot/initrd");
            assert!(is_its, "{}", target.display());
        }
        running.kill().await;
    });
    drop(secret);
    stage.assert_nothing_is_left();
}

/// What the cgroup that QEMU is in says, by the first of these files that there is.
fn limit(cgroups: &[PathBuf], names: [&str; 2]) -> String {
    let found = cgroups
        .iter()
        .flat_map(|cgroup| names.map(|name| cgroup.join(name)))
        .find_map(|file| fs::read_to_string(file).ok());
    found
        .unwrap_or_else(|| panic!("{names:?} in {cgroups:?}"))
        .trim()
        .to_owned()
}

#[test]
fn the_cgroup_limits_memory_processes_and_cpu() {
    let stage = Stage::new(CHATTER);
    stage.run(|spec| async {
        let memory_mib = u64::from(spec.memory_mib);
        let running = run(spec).await;
        let pid = running.pid();
        let status = of(pid, "status");
        let uid = field(&status, "Uid");
        let cgroups = cgroups_named(uid.split_once(' ').unwrap().0);
        assert!(!cgroups.is_empty());
        for cgroup in &cgroups {
            let inside = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
            assert_eq!(inside.trim(), pid.to_string(), "{}", cgroup.display());
        }
        let memory = limit(&cgroups, ["memory.max", "memory.limit_in_bytes"]);
        let memory: u64 = memory.parse().unwrap();
        assert!(memory > memory_mib << 20 && memory < (memory_mib + 300) << 20);
        assert_eq!(limit(&cgroups, ["pids.max", "pids.max"]), "81");
        let cpu = limit(&cgroups, ["cpu.max", "cpu.cfs_quota_us"]);
        assert_eq!(cpu.split(' ').next(), Some("150000"));
        let used = limit(&cgroups, ["memory.peak", "memory.max_usage_in_bytes"]);
        assert_eq!(of(pid, "oom_score_adj").trim(), "500");
        println!("measured: {used} of {memory} bytes used at most");
        running.kill().await;
    });
    stage.assert_nothing_is_left();
}

/// A directory with `script` in QEMU's place.
fn fake_qemu(script: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qemu-system-x86_64");
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// Runs the ignored test `name` of this file in a process of its own, where that is QEMU.
fn with_fake(name: &str, fake: &Path) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--nocapture"])
        .env("PATH", fake)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    text
}

/// Where a script's interpreter is.
fn with_interpreters(mut spec: Spec) -> Spec {
    spec.jail.paths = vec!["/bin".into(), "/usr".into()];
    spec
}

/// Tries each way out, and prints those that were open.
const BREAKS_OUT: &str = r#"#!/usr/bin/perl
use Socket;
my @open;
sub tries { my ($name, $works) = @_; push @open, $name if $works; }
tries("password", open(my $a, "<", "/etc/shadow"));
tries("listing", opendir(my $b, "/root"));
tries("processes", opendir(my $c, "/proc/1"));
tries("kernel", opendir(my $d, "/sys/kernel"));
tries("disk", open(my $e, "<", "/dev/mem"));
tries("tun", open(my $f, "+<", "/dev/net/tun"));
tries("write", open(my $g, ">", "/omerta-test") || open($g, ">", "/usr/omerta-test") || open($g, ">", "/tmp/omerta-test"));
socket(my $h, AF_INET, SOCK_STREAM, 0);
tries("tcp", connect($h, sockaddr_in($TCP, inet_aton("127.0.0.1"))));
socket(my $i, AF_UNIX, SOCK_STREAM, 0);
tries("unix", connect($i, sockaddr_un("$UNIX")));
socket(my $j, AF_UNIX, SOCK_STREAM, 0);
tries("abstract", connect($j, sockaddr_un("\0$ABSTRACT")));
socket(my $k, AF_INET, SOCK_DGRAM, 0);
my $request = pack("a16 x24", "$INTERFACE");
tries("interface", ioctl($k, 0x8933, $request));
tries("kill", kill(0, $PID));
tries("root", do { $> = 0; $> == 0 });
tries("chroot", chroot("/"));
tries("namespace", syscall(272, 0x00020000) == 0);
print STDERR "open: [@open]\n";
exit 3;
"#;

/// Whether each way is one that is open outside: else the test would prove nothing.
#[test]
fn a_program_in_qemus_place_gets_at_nothing_of_the_hosts() {
    if !Path::new("/usr/bin/perl").exists() {
        println!("skipped: the program is written in Perl, which is not installed");
        return;
    }
    let stage = Stage::new(IDLE);
    let socket = stage.directory.path().join("host.sock");
    let _unix = UnixListener::bind(&socket).unwrap();
    let name = format!("omerta-jail-test-{}", std::process::id());
    let address =
        <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(
            &name,
        )
        .unwrap();
    let (tcp, port, _abstract) = stage
        .namespace
        .enter(|| {
            let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let port = tcp.local_addr().unwrap().port();
            (tcp, port, UnixListener::bind_addr(&address).unwrap())
        })
        .unwrap();
    let script = BREAKS_OUT
        .replace("$TCP", &port.to_string())
        .replace("$UNIX", socket.to_str().unwrap())
        .replace("$ABSTRACT", &name)
        .replace("$INTERFACE", "lo-out")
        .replace("$PID", &std::process::id().to_string());
    stage
        .namespace
        .enter(|| omerta_test_support::ip("link set lo name lo-out").unwrap())
        .unwrap();
    let fake = fake_qemu(&script);

    let program = fake.path().join("qemu-system-x86_64");
    let mut outside = stage.namespace.command(program.to_str().unwrap());
    let outside = outside.output().unwrap();
    let said = String::from_utf8_lossy(&outside.stderr);
    for way in [
        "password",
        "listing",
        "processes",
        "kernel",
        "write",
        "tcp",
        "unix",
        "abstract",
        "interface",
        "kill",
        "root",
        "chroot",
        "namespace",
    ] {
        assert!(said.contains(way), "{way} is closed outside: {said}");
    }
    for path in ["/omerta-test", "/usr/omerta-test", "/tmp/omerta-test"] {
        let _ = fs::remove_file(path);
    }

    let told = with_fake("break_out", fake.path());
    assert!(told.contains("told: open: []"), "{told}");
    drop(tcp);
}

#[test]
#[ignore = "run by a_program_in_qemus_place_gets_at_nothing_of_the_hosts, with it on PATH"]
fn break_out() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async move {
        let error = Paused::launch(with_interpreters(spec)).await.unwrap_err();
        let line = error.report();
        let said = line.split("): ").nth(1).unwrap_or(&line);
        println!("told: {}", said.split(';').next().unwrap());
    });
    stage.assert_nothing_is_left();
}

#[test]
fn memory_beyond_the_limit_ends_the_program_and_nobody_else() {
    if !Path::new("/usr/bin/perl").exists() {
        println!("skipped: the program is written in Perl, which is not installed");
        return;
    }
    let fake = fake_qemu(
        "#!/usr/bin/perl\nmy @all; push @all, 'x' x (16 << 20) while @all < 64;\nexit 3;\n",
    );
    let told = with_fake("eat_memory", fake.path());
    assert!(told.contains("told: signal 9"), "{told}");
}

#[test]
#[ignore = "run by memory_beyond_the_limit_ends_the_program_and_nobody_else, with it on PATH"]
fn eat_memory() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async move {
        let line = Paused::launch(with_interpreters(spec))
            .await
            .unwrap_err()
            .report();
        let told = if line.contains("signal 9") {
            "signal 9"
        } else {
            &line
        };
        println!("told: {told}");
    });
    stage.assert_nothing_is_left();
}

#[test]
fn more_threads_than_allowed_are_not_made() {
    let fake = fake_qemu(
        "#!/usr/bin/perl\nmy $n = 0; while (1) { my $p = fork(); last unless defined $p; if (!$p) { sleep 600 } $n++; last if $n > 300 }\nprint STDERR \"made $n\\n\"; exit 3;\n",
    );
    if !Path::new("/usr/bin/perl").exists() {
        println!("skipped: the program is written in Perl, which is not installed");
        return;
    }
    let told = with_fake("fork_on", fake.path());
    assert!(told.contains("told: made 80"), "{told}");
}

#[test]
#[ignore = "run by more_threads_than_allowed_are_not_made, with it on PATH"]
fn fork_on() {
    let stage = Stage::new(IDLE);
    stage.run(|spec| async move {
        let line = Paused::launch(with_interpreters(spec))
            .await
            .unwrap_err()
            .report();
        let said = line.split("): ").nth(1).unwrap_or(&line);
        println!("told: {}", said.split(';').next().unwrap());
    });
    stage.assert_nothing_is_left();
}

#[test]
fn a_path_that_is_not_there_is_named_and_nothing_runs() {
    let stage = Stage::new(IDLE);
    stage.run(|mut spec| async move {
        spec.jail.paths = vec!["/opt/not/there".into()];
        let error = Paused::launch(spec).await.unwrap_err();
        assert!(matches!(error, LaunchError::Jail(JailError::Path { .. })));
        let line = error.report();
        assert!(
            line.contains("/opt/not/there") && line.contains("[jail]"),
            "{line}"
        );
    });
    stage.assert_nothing_is_left();
}

#[test]
fn more_guests_than_users_are_refused() {
    let stage = Stage::new(IDLE);
    stage.run(|mut spec| async move {
        // One that no other test has.
        let uid = 1_800_000_000 + std::process::id();
        spec.jail.uids = format!("{uid}-{uid}").parse().unwrap();
        let running = run(spec.clone()).await;
        let error = Paused::launch(spec.clone()).await.unwrap_err();
        assert!(
            matches!(error, LaunchError::Jail(JailError::NoUid(_))),
            "{error}"
        );
        running.kill().await;
        run(spec).await.kill().await;
    });
    stage.assert_nothing_is_left();
}

#[test]
fn what_the_operator_allows_to_lack_is_no_refusal() {
    let stage = Stage::new(stage::POWER_OFF);
    stage.run(|mut spec| async move {
        spec.jail.without = Part::ALL.into();
        let mut running = run(spec).await;
        stage::event(&mut running, |e| *e == GuestEvent::Shutdown).await;
        running.kill().await;
    });
    stage.assert_nothing_is_left();
}

/// A launcher with a hundred guests holds more descriptors open than a QEMU may.
#[test]
fn a_launcher_with_more_descriptors_than_qemu_may_have_runs_guests() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    if most < 4096 {
        return println!("skipped: this process may have no more than {most} descriptors");
    }
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let held: Vec<_> = (0..1100)
        .map(|_| fs::File::open("/dev/null").unwrap())
        .collect();
    let stage = Stage::new(IDLE);
    stage.run(|spec| async {
        let running = run(spec).await;
        let limits = of(running.pid(), "limits");
        assert_eq!(field(&limits, "Max open files"), "1024 1024 files");
        running.kill().await;
    });
    drop(held);
    stage.assert_nothing_is_left();
}
