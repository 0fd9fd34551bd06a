//! What `omerta guard` refuses on a real machine, and that a refusal changes nothing.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use omerta_dataplane::{Guard, GuardConfig, Limits};
use omerta_verdict::Mode;

use crate::guard::{GUEST, Stage};
use crate::run::{OMERTA, Ran, fed, prepare};

#[test]
fn unknown_interface_is_not_found() {
    let Some(stage) = Stage::set() else { return };
    for interface in [
        "omnone0",
        "omnone0.100",
        "a-name-longer-than-interfaces-have",
    ] {
        for (verb, options) in [
            ("attach", GUEST),
            ("allow", "udp:192.0.2.1:1"),
            ("revoke", "udp:192.0.2.1:1"),
            ("replace", "--file /dev/null"),
            ("show", ""),
            ("show", "-o json"),
            ("detach", ""),
        ] {
            stage
                .omerta(&format!("guard {verb} {interface} {options}"))
                .failed(3, &[interface, "ip link"]);
        }
    }
    assert_eq!(stage.pins(), [""; 0]);
}

#[test]
fn unguarded_interface_is_not_found() {
    let Some(stage) = Stage::set() else { return };
    for (verb, options) in [
        ("allow", "udp:192.0.2.1:1"),
        ("revoke", "udp:192.0.2.1:1"),
        ("replace", "--file /dev/null"),
        ("show", ""),
        ("detach", ""),
    ] {
        stage
            .guard(verb, options)
            .failed(3, &["omt0", "omerta guard attach omt0"]);
    }
    assert_eq!(stage.pins(), [""; 0]);
}

#[test]
fn guarded_interface_is_not_guarded_again() {
    let Some(stage) = Stage::set() else { return };
    stage
        .guard("attach", &format!("{GUEST} --allow udp:192.0.2.1:1"))
        .done();
    let before = stage.shown();
    stage
        .guard(
            "attach",
            "--mac 52:54:00:00:00:02 --ip 10.77.0.3 --gateway 10.77.0.1",
        )
        .failed(4, &["omt0", "guarded already", "omerta guard detach omt0"]);
    assert_eq!(stage.shown(), before);
}

#[test]
fn a_pipe_or_a_file_that_is_cut_off_is_no_list_and_is_not_waited_for() {
    let Some(stage) = Stage::set() else { return };
    stage
        .guard("attach", &format!("{GUEST} --allow udp:192.0.2.1:1"))
        .done();
    let before = stage.shown();
    let files = tempfile::TempDir::new().unwrap();
    let pipe = files.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let path = pipe.to_str().unwrap();
    stage
        .guard("replace", &format!("--file {path}"))
        .failed(2, &[path, "is a pipe"]);
    let list = files.path().join("list");
    std::fs::write(&list, "udp:192.0.2.2:2\nudp:192.0.2.3:518").unwrap();
    stage
        .guard("replace", &format!("--file {}", list.display()))
        .failed(2, &["line 2", "udp:192.0.2.3:518", "nothing was changed"]);
    assert_eq!(stage.shown(), before);
}

#[test]
fn bad_list_changes_nothing() {
    let Some(stage) = Stage::set() else { return };
    stage
        .guard("attach", &format!("{GUEST} --allow udp:192.0.2.1:1"))
        .done();
    let before = stage.shown();
    fed(
        stage.command("guard replace omt0 --file -"),
        b"udp:192.0.2.2:2\nudp:nobody:1\n",
    )
    .failed(2, &["line 2", "udp:nobody:1", "nothing was changed"]);
    stage
        .guard("allow", "udp:192.0.2.2:2 udp:192.0.2.3:0")
        .failed(2, &["udp:192.0.2.3:0"]);
    stage
        .guard("revoke", "udp:192.0.2.1:1 udp:192.0.2.9:9")
        .failed(
            3,
            &[
                "udp:192.0.2.9:9",
                "not on the allowlist of omt0",
                "nothing was changed",
            ],
        );
    stage
        .guard("allow", "udp:192.0.2.2:2 udp:[2001:db8::1]:1")
        .failed(
            4,
            &[
                "udp:[2001:db8::1]:1",
                "omt0",
                "no IPv6 address",
                "nothing was changed",
            ],
        );
    fed(
        stage.command("guard replace omt0 --file -"),
        b"icmp:[2001:db8::1]\n",
    )
    .failed(4, &["icmp:[2001:db8::1]", "leave it out"]);
    let too_many: String = (0..1_000_001)
        .map(|n| format!("udp:192.0.2.{}:{}\n", n / 50_000, 1 + n % 50_000))
        .collect();
    let refused = fed(
        stage.command("guard replace omt0 --file -"),
        too_many.as_bytes(),
    );
    refused.failed(
        4,
        &["1000001", "holds 1000000", "omt0", "nothing was changed"],
    );
    assert_eq!(stage.shown(), before);
}

#[test]
fn interface_that_is_no_ethernet_is_refused() {
    let Some(stage) = Stage::set() else { return };
    stage
        .omerta(&format!("guard attach lo {GUEST}"))
        .failed(2, &["lo", "Ethernet"]);
    // An address of six bytes does not make it one.
    stage
        .namespace()
        .ip("link set lo address 52:54:00:00:00:0a")
        .unwrap();
    stage
        .omerta(&format!("guard attach lo {GUEST}"))
        .failed(2, &["lo", "Ethernet"]);
    assert_eq!(stage.pins(), [""; 0]);
}

#[test]
fn guard_of_a_recreated_interface_is_not_in_force_and_can_be_cleared() {
    let Some(stage) = Stage::set() else { return };
    stage
        .namespace()
        .ip("link add omv0 type veth peer name omv1")
        .unwrap();
    stage.omerta(&format!("guard attach omv0 {GUEST}")).done();
    stage.namespace().ip("link delete omv0").unwrap();
    stage
        .omerta("guard show omv0")
        .failed(3, &["omv0", "ip link"]);
    stage
        .namespace()
        .ip("link add omv0 type veth peer name omv1")
        .unwrap();
    stage
        .omerta("guard show omv0")
        .failed(1, &["omv0", "not in force", "omerta guard attach omv0"]);
    assert_eq!(stage.omerta("guard list").done().stdout, "");
    stage.omerta("guard detach omv0").done();
    assert_eq!(stage.pins(), [""; 0]);
    stage
        .omerta("guard show omv0")
        .failed(3, &["omv0", "no guard"]);
}

#[test]
fn without_root_the_remedy_is_sudo() {
    let Some(stage) = Stage::set() else { return };
    // The target directory may be closed to others.
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let copy = dir.path().join("omerta");
    fs::copy(OMERTA, &copy).unwrap();
    for (verb, options) in [
        ("attach omt0", GUEST),
        ("allow omt0", "udp:192.0.2.1:1"),
        ("show omt0", ""),
        ("detach omt0", ""),
        ("list", ""),
    ] {
        let ran: Ran = stage
            .namespace()
            .enter(|| {
                let mut command = Command::new(&copy);
                prepare(&mut command, &format!("guard {verb} {options}"));
                command.uid(65534).gid(65534).output()
            })
            .unwrap()
            .unwrap()
            .into();
        ran.failed(1, &["root", "sudo"]);
    }
    assert_eq!(stage.pins(), [""; 0]);
}

/// CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON and CAP_SYS_ADMIN (capabilities(7)).
const BPF_CAPABILITIES: [libc::c_ulong; 4] = [39, 12, 38, 21];

#[test]
fn root_without_the_capabilities_leaves_nothing_half_made() {
    let Some(stage) = Stage::set() else { return };
    // Root in a container: the pins' directory is open to it, loading programs is not.
    stage.omerta("guard list").done();
    let mut command = stage.command(&format!("guard attach omt0 {GUEST}"));
    // SAFETY: between fork and exec the closure makes one system call a round, which touches no
    // memory; the array is a constant.
    unsafe {
        command.pre_exec(|| {
            for capability in BPF_CAPABILITIES {
                if libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    Ran::from(command.output().unwrap()).failed(1, &["CAP_BPF", "sudo"]);
    assert_eq!(stage.pins(), [""; 0]);
}

#[test]
fn kernel_too_old_is_named_with_the_versions_that_are_not() {
    let Some(stage) = Stage::set() else { return };
    // Distributions tell the version in places that cannot be disguised.
    let version = nix::sys::utsname::uname().unwrap();
    if fs::exists("/proc/version_signature").unwrap()
        || version.version().to_string_lossy().contains("Debian")
    {
        eprintln!("skipped: this distribution's kernel version cannot be disguised");
        return;
    }
    /// Makes uname(2) tell 2.6.x (personality(2)).
    const UNAME26: libc::c_ulong = 0x0020000;
    let mut command = stage.command(&format!("guard attach omt0 {GUEST}"));
    // SAFETY: between fork and exec the closure makes one system call, which touches no memory.
    unsafe {
        command.pre_exec(|| match libc::personality(UNAME26) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    Ran::from(command.output().unwrap()).failed(1, &["2.6.", "too old", "6.6", "5.15"]);
    assert_eq!(stage.pins(), [""; 0]);
}

#[test]
fn owned_guard_is_shown_and_not_changed() {
    let Some(stage) = Stage::set() else { return };
    let config = GuardConfig {
        mac: "52:54:00:00:00:01".parse().unwrap(),
        addresses: vec!["10.77.0.2".parse().unwrap()],
        gateways: vec!["10.77.0.1".parse().unwrap()],
        gateway_mac: None,
        mode: Mode::Filtered,
        allow: vec!["udp:192.0.2.1:1".parse().unwrap()],
        egress: Limits::default(),
        ingress: Limits::default(),
        lease: None,
        owner: Some("omertad".parse().unwrap()),
    };
    let guard = stage
        .namespace()
        .enter(|| Guard::attach("omt0", &config))
        .unwrap()
        .unwrap();
    let before = stage.shown();
    assert_eq!(before["owner"], "omertad");
    let text = stage.guard("show", "").done().stdout;
    assert!(text.contains("owner      omertad\n"), "{text}");
    for (verb, options) in [
        ("allow", "udp:192.0.2.2:2"),
        ("revoke", "udp:192.0.2.1:1"),
        ("replace", "--file /dev/null"),
        ("limit", "egress-bits=1M"),
        ("lease", "1s"),
        ("detach", ""),
    ] {
        stage
            .guard(verb, options)
            .failed(4, &["omt0", "omertad", "omerta vm stop"]);
    }
    assert_eq!(stage.shown(), before);
    stage.namespace().enter(|| guard.detach()).unwrap().unwrap();
    assert_eq!(stage.pins(), [""; 0]);
}

#[test]
fn renamed_interface_is_guarded_by_its_new_name_alone() {
    let Some(stage) = Stage::set() else { return };
    stage
        .namespace()
        .ip("link add omv0 type veth peer name omv1")
        .unwrap();
    stage.omerta(&format!("guard attach omv0 {GUEST}")).done();
    stage.namespace().ip("link set omv0 name omv9").unwrap();
    let shown = stage.omerta("guard show omv9").done().stdout;
    assert!(shown.contains("interface  omv9"), "{shown}");
    stage
        .omerta(&format!("guard attach omv9 {GUEST}"))
        .failed(4, &["omv9", "guarded already"]);
    stage
        .omerta("guard detach omv0")
        .failed(4, &["omv0", "omv9"]);
    stage.omerta("guard detach omv9").done();
    assert_eq!(stage.pins(), [""; 0]);
}

#[test]
fn foreign_pins_are_named_with_their_real_path() {
    let Some(stage) = Stage::set() else { return };
    let place = format!(
        "/sys/fs/bpf/omerta/{}/omt0",
        stage.namespace().inode().unwrap()
    );
    // Below another /sys the pins are reached through a descriptor.
    let below = |arguments: &str| -> Ran {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", stage.namespace().name(), OMERTA]);
        prepare(&mut command, arguments);
        command.output().unwrap().into()
    };
    below(&format!("guard attach omt0 {GUEST}")).done();
    let foreign = format!("{place}/foreign");
    fs::create_dir(&foreign).unwrap();
    below("guard detach omt0").failed(4, &[&foreign, "rm -r"]);
    stage.guard("show", "").done();
    fs::remove_dir(&foreign).unwrap();
    below("guard detach omt0").done();
    assert_eq!(stage.pins(), [""; 0]);
}

#[test]
fn bad_limits_and_leases_change_nothing() {
    let Some(stage) = Stage::set() else { return };
    for (options, words) in [
        ("--limit egress-packets", &["egress-packets=N"][..]),
        ("--limit egress=5", &["egress=5", "ingress-bits=N"]),
        ("--limit egress-packets=fast", &["fast", "20k"]),
        ("--limit egress-bits=0", &["none"]),
        (
            "--limit egress-bits=1 --limit egress-bits=2",
            &["egress-bits", "twice"],
        ),
        ("--lease 90", &["90", "15m"]),
        ("--lease 0s", &["0s", "off"]),
        ("--lease 9999d", &["9999d", "3650d"]),
    ] {
        stage
            .guard("attach", &format!("{GUEST} {options}"))
            .failed(2, words);
    }
    assert_eq!(stage.pins(), [""; 0]);
    for (verb, options, words) in [
        ("limit", "egress-bits=1M", "no guard"),
        ("lease", "1h", "no guard"),
    ] {
        stage.guard(verb, options).failed(3, &["omt0", words]);
    }
    stage.guard("attach", GUEST).done();
    let before = stage.shown();
    for (verb, options, words) in [
        ("limit", "", "WHAT=N"),
        ("limit", "egress-bits=1 egress-packets", "egress-packets"),
        ("limit", "egress-bits=1 egress-bits=none", "twice"),
        ("lease", "", "TIME"),
        ("lease", "soon", "15m"),
    ] {
        stage.guard(verb, options).failed(2, &[words]);
    }
    assert_eq!(stage.shown(), before);
}

/// A guest that may reach itself by way of the gateway is sent frames in its own name (land).
#[test]
fn the_guests_own_address_is_no_endpoint() {
    let Some(stage) = Stage::set() else { return };
    stage
        .guard("attach", &format!("{GUEST} --allow udp:10.77.0.2:1"))
        .failed(2, &["udp:10.77.0.2:1"]);
    assert_eq!(stage.pins(), [""; 0]);
    stage.guard("attach", GUEST).done();
    stage
        .guard("allow", "udp:10.77.0.2:1")
        .failed(4, &["udp:10.77.0.2:1", "nothing was changed"]);
}
