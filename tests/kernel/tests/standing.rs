//! A guard that is no longer whole is told from one that is, and nobody but its owner, and no
//! command about another interface, takes the rest of it away.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests"
)]

use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use aya::programs::links::PinnedLink;
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType};
use omerta_dataplane::{ErrorKind, Guard, GuardConfig, GuardError, Owner, Programs, Standing};
use omerta_kernel_tests::{config, remove_left_overs};
use omerta_test_support::{Namespace, Tap, ip};
use omerta_verdict::{Direction, Mode};

/// Runs `work` in a namespace of its own that has taps `guest` and `other`; it is given the
/// directory of the namespace's pins.
fn with_taps(work: impl FnOnce(PathBuf) + Send) {
    let namespace = Namespace::new("ot-stand").unwrap();
    let pins = PathBuf::from(format!("/sys/fs/bpf/omerta/{}", namespace.inode().unwrap()));
    namespace
        .enter(|| {
            remove_left_overs().unwrap();
            let taps = ["guest", "other"].map(|name| Tap::create(name).unwrap());
            work(pins);
            drop(taps);
        })
        .unwrap();
}

fn owned() -> (Owner, GuardConfig) {
    let owner: Owner = "omertad".parse().unwrap();
    let mut config = config(Mode::Filtered);
    config.owner = Some(owner.clone());
    (owner, config)
}

fn standing(interface: &str) -> Standing {
    let pinned = Guard::pinned().unwrap();
    let found = pinned.iter().find(|guard| guard.interface == interface);
    found.unwrap().standing
}

/// Waits until so many programs judge: the kernel lets go of a link some time after its last pin.
#[track_caller]
fn judged_by(interface: &str, count: usize) {
    let judging = || -> usize {
        let hooks = [TcAttachType::Ingress, TcAttachType::Egress];
        let on = |hook| SchedClassifier::query_tcx(interface, hook).unwrap().1.len();
        hooks.map(on).into_iter().sum()
    };
    let deadline = Instant::now() + Duration::from_secs(2);
    while judging() != count && Instant::now() < deadline {
        sleep(Duration::from_millis(2));
    }
    assert_eq!(judging(), count);
}

#[track_caller]
fn not_in_force<T: std::fmt::Debug>(result: Result<T, GuardError>, words: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, GuardError::NotInForce { .. }), "{error}");
    assert!(error.to_string().contains(words), "{error}");
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, GuardError>) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    assert!(error.to_string().contains("omertad"), "{error}");
}

#[test]
fn another_program_before_the_guard_shows_in_its_state() {
    with_taps(|_| {
        let guard = Guard::attach("guest", &config(Mode::Filtered)).unwrap();
        assert_eq!(guard.status().unwrap().state, "in_force");
        let mut foreign = Programs::load("foreign", Mode::Filtered).unwrap();
        let first = TcAttachOptions::TcxOrder(LinkOrder::first());
        let program = foreign.program(Direction::Egress).unwrap();
        program
            .attach_with_options("guest", TcAttachType::Ingress, first)
            .unwrap();
        assert_eq!(standing("guest"), Standing::Preceded);
        let guard = Guard::open("guest").unwrap();
        assert_eq!(guard.status().unwrap().state, "preceded");
        not_in_force(guard.verify(), "before it");
        drop(foreign);
        guard.verify().unwrap();
        guard.detach().unwrap();
    });
}

/// Pins an XDP program that passes everything at `pin`.
fn pin_xdp(pin: &std::path::Path) {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log: [u64; 4],
        name: [u8; 16],
    }
    #[repr(C)]
    struct Pin {
        path: u64,
        fd: u32,
        flags: u32,
    }
    // r0 = XDP_PASS; exit
    let instructions: [u64; 2] = [0x0000_0002_0000_00b7, 0x95];
    let load = Load {
        kind: 6,
        count: 2,
        instructions: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
        log: [0; 4],
        name: *b"foreign\0\0\0\0\0\0\0\0\0",
    };
    let path = std::ffi::CString::new(pin.to_str().unwrap()).unwrap();
    // SAFETY: BPF_PROG_LOAD and BPF_OBJ_PIN read requests, instructions and strings, which outlive the
    // calls.
    unsafe {
        let call = |command: i32, request: *const u8, size: usize| {
            nix::libc::syscall(nix::libc::SYS_bpf, command, request, size)
        };
        let fd = call(5, (&raw const load).cast(), size_of::<Load>());
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        let request = Pin {
            path: path.as_ptr() as u64,
            fd: fd as u32,
            flags: 0,
        };
        let pinned = call(6, (&raw const request).cast(), size_of::<Pin>());
        assert_eq!(pinned, 0, "{}", std::io::Error::last_os_error());
        nix::libc::close(fd as i32);
    }
}

#[test]
fn an_xdp_program_on_the_tap_shows_as_one_before_the_guard() {
    for hook in omerta_kernel_tests::hooks().unwrap() {
        with_taps(|_| {
            let pin = PathBuf::from(format!(
                "/sys/fs/bpf/omerta-test-xdp-{}",
                std::process::id()
            ));
            pin_xdp(&pin);
            let guard = Guard::attach_by(*hook, "guest", &config(Mode::Filtered)).unwrap();
            let watch = omerta_dataplane::GuardWatch::begin(&guard).unwrap();
            for way in ["xdpdrv", "xdpgeneric"] {
                let pinned = pin.display();
                ip(&format!("link set dev guest {way} pinned {pinned}")).unwrap();
                assert_eq!(standing("guest"), Standing::Preceded, "{way}");
                not_in_force(guard.verify(), "XDP");
                not_in_force(watch.check(), "XDP");
                ip(&format!("link set dev guest {way} off")).unwrap();
                guard.verify().unwrap();
                watch.check().unwrap();
            }
            // One that is there first does not keep the guard away.
            guard.detach().unwrap();
            ip(&format!(
                "link set dev guest xdpgeneric pinned {}",
                pin.display()
            ))
            .unwrap();
            let guard = Guard::attach_by(*hook, "guest", &config(Mode::Filtered)).unwrap();
            assert_eq!(guard.status().unwrap().state, "preceded");
            guard.detach().unwrap();
            fs::remove_file(&pin).unwrap();
        });
    }
}

#[test]
fn a_link_that_runs_another_program_is_no_guard() {
    with_taps(|pins| {
        let (owner, config) = owned();
        let guard = Guard::attach("guest", &config).unwrap();
        let mut foreign = Programs::load("foreign", Mode::Filtered).unwrap();
        let link = PinnedLink::from_pin(pins.join("guest/link_egress")).unwrap();
        // Exchanges the program for as long as the link lives.
        let program = foreign.program(Direction::Egress).unwrap();
        let link: SchedClassifierLink =
            aya::programs::links::FdLink::from(link).try_into().unwrap();
        let id = program.attach_to_link(link).unwrap();
        assert_eq!(standing("guest"), Standing::Exchanged);
        assert!(Guard::list().unwrap().is_empty());
        not_in_force(guard.verify(), "another program");
        not_in_force(guard.replace(&[]), "another program");
        not_in_force(Guard::open("guest"), "another program");
        refused(Guard::remove_stale("guest", None));
        refused(Guard::attach("guest", &config_of_nobody()));
        drop(program.take_link(id).unwrap());
        assert!(Guard::remove_stale("guest", Some(&owner)).unwrap());
        judged_by("guest", 0);
    });
}

fn config_of_nobody() -> GuardConfig {
    config(Mode::Direct)
}

#[test]
fn the_rest_of_an_owned_guard_is_its_owners_alone() {
    for cut in ["link_ingress", "link_egress"] {
        with_taps(|pins| {
            let (owner, config) = owned();
            Guard::attach("guest", &config).unwrap();
            fs::remove_file(pins.join("guest").join(cut)).unwrap();
            assert_eq!(standing("guest"), Standing::Partial);
            judged_by("guest", 1);
            assert!(Guard::open("guest").is_err());
            refused(Guard::remove_stale("guest", None));
            refused(Guard::attach("guest", &config_of_nobody()));
            judged_by("guest", 1);
            // The owner makes it whole.
            Guard::attach("guest", &config).unwrap().verify().unwrap();
            judged_by("guest", 2);
            Guard::open_as("guest", &owner).unwrap().detach().unwrap();
            judged_by("guest", 0);
        });
    }
}

#[test]
fn what_an_interrupted_command_left_judging_is_put_back_in_its_place() {
    with_taps(|pins| {
        let (owner, config) = owned();
        Guard::attach("guest", &config).unwrap();
        // As a process leaves it that is killed before the last rename, or after the first.
        fs::rename(pins.join("guest"), pins.join("guest%aside0")).unwrap();
        Guard::attach("other", &config_of_nobody()).unwrap();
        judged_by("guest", 2);
        Guard::open_as("guest", &owner).unwrap().verify().unwrap();
        assert_eq!(Guard::list().unwrap(), ["guest", "other"]);
        Guard::open_as("guest", &owner).unwrap().detach().unwrap();
        Guard::open("other").unwrap().detach().unwrap();
        assert!(Guard::pinned().unwrap().is_empty());
    });
}

#[test]
fn what_an_interrupted_command_left_half_is_named_and_left_to_a_command_about_it() {
    with_taps(|pins| {
        Guard::attach("guest", &config_of_nobody()).unwrap();
        fs::rename(pins.join("guest"), pins.join("guest%aside0")).unwrap();
        fs::remove_file(pins.join("guest%aside0/link_egress")).unwrap();
        Guard::attach("other", &config_of_nobody()).unwrap();
        judged_by("guest", 1);
        assert_eq!(standing("guest"), Standing::Partial);
        not_in_force(Guard::open("guest"), "interrupted");
        let guard = Guard::attach("guest", &config_of_nobody()).unwrap();
        guard.verify().unwrap();
        judged_by("guest", 2);
        guard.detach().unwrap();
        Guard::open("other").unwrap().detach().unwrap();
        assert!(Guard::pinned().unwrap().is_empty());
    });
}

#[test]
fn an_odd_entry_of_another_interface_stands_in_nobodys_way() {
    with_taps(|pins| {
        Guard::attach("other", &config_of_nobody()).unwrap();
        fs::create_dir_all(pins.join("odd/link_egress")).unwrap();
        std::os::unix::fs::symlink("no name", pins.join("odd/owner")).unwrap();
        Guard::attach("guest", &config_of_nobody())
            .unwrap()
            .detach()
            .unwrap();
        assert_eq!(standing("odd"), Standing::Gone);
        assert_eq!(Guard::list().unwrap(), ["other"]);
        fs::remove_file(pins.join("odd/owner")).unwrap();
        fs::remove_dir(pins.join("odd/link_egress")).unwrap();
        fs::remove_dir(pins.join("odd")).unwrap();
        Guard::open("other").unwrap().detach().unwrap();
    });
}

#[test]
fn an_interface_without_an_ethernet_address_is_refused() {
    with_taps(|_| {
        let mut with_gateway = config(Mode::Filtered);
        with_gateway.gateway_mac = Some("52:54:00:00:00:fe".parse().unwrap());
        let error = Guard::attach("lo", &with_gateway).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
    });
}

#[test]
fn an_alternative_name_is_as_good_as_the_name() {
    with_taps(|_| {
        omerta_test_support::ip("link property add dev guest altname consumer-7").unwrap();
        let guard = Guard::attach("consumer-7", &config_of_nobody()).unwrap();
        assert_eq!(guard.interface(), "guest");
        Guard::open("consumer-7").unwrap().verify().unwrap();
        guard.detach().unwrap();
        judged_by("guest", 0);
    });
}
