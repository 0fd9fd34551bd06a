//! What the launcher's tests share: a namespace with a runtime of its own, guests of a few
//! instructions, and the search for what a guest may have left behind.
#![allow(dead_code, unused_imports, reason = "each test file uses its part")]

use std::collections::BTreeSet;
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use omerta_dataplane::{DirectionLimits, Guard};
use omerta_test_support::{Namespace, write_bare_guest};
use omerta_verdict::Mode;
use omerta_vm_launcher::{
    Accel, Consumer, GuestEvent, Image, Jail, MachineType, Running, Spec, Tunnel, WgPublicKey,
};

pub use omerta_test_support::{CHATTER, IDLE, PANIC, POWER_OFF, RESET};

/// A namespace, a directory and an image of `program`, all gone with it.
pub struct Stage {
    pub namespace: Namespace,
    pub directory: tempfile::TempDir,
}

impl Stage {
    pub fn new(program: &[u8]) -> Self {
        // As the unit has it: what is made for QEMU must not depend on it.
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
        let namespace = Namespace::new("vml").expect("a namespace takes root");
        let directory = tempfile::tempdir().unwrap();
        write_bare_guest(directory.path(), program).unwrap();
        Self {
            namespace,
            directory,
        }
    }

    pub fn spec(&self) -> Spec {
        spec(
            Image::open(self.directory.path()).unwrap(),
            self.directory.path().join("web-1"),
        )
    }

    /// Runs `work` in the namespace, on a thread and a runtime of its own.
    pub fn run<T: Send, F: Future<Output = T>>(&self, work: impl FnOnce(Spec) -> F + Send) -> T {
        let spec = self.spec();
        self.namespace
            .enter(|| {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .unwrap();
                runtime.block_on(work(spec))
            })
            .unwrap()
    }

    /// Everything of a guest that exists now, one line each.
    pub fn traces(&self) -> BTreeSet<String> {
        let run_dir = self.directory.path().join("web-1");
        let mut traces: BTreeSet<String> = self
            .namespace
            .enter(|| {
                let interfaces = nix::net::if_::if_nameindex().unwrap();
                let interfaces = interfaces
                    .iter()
                    .map(|i| i.name().to_string_lossy().into_owned())
                    .filter(|name| name != "lo")
                    .map(|name| format!("interface {name}"));
                let guards = Guard::list()
                    .unwrap()
                    .into_iter()
                    .map(|name| format!("guard {name}"));
                interfaces.chain(guards).collect()
            })
            .unwrap();
        if run_dir.exists() {
            traces.insert("run directory".to_owned());
        }
        let pins = self.pins();
        for pinned in fs::read_dir(pins).into_iter().flatten().flatten() {
            traces.insert(format!("pin {}", pinned.path().display()));
        }
        for pid in qemus_of(&run_dir) {
            traces.insert(format!("process {pid}"));
        }
        traces
    }

    fn pins(&self) -> PathBuf {
        Path::new("/sys/fs/bpf/omerta").join(self.namespace.inode().unwrap().to_string())
    }

    pub fn assert_nothing_is_left(&self) {
        assert_eq!(self.traces(), BTreeSet::new());
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Tests that detach a guard behind the launcher's back leave the namespace's directory.
        let _ = fs::remove_dir_all(self.pins());
        // Those that are killed leave their jails.
        omerta_vm_launcher::sweep_jails(&Jail::default());
    }
}

/// The pids of all QEMUs of `run_dir`, by their environment.
pub fn qemus_of(run_dir: &Path) -> Vec<u32> {
    let run_dir = run_dir.to_str().unwrap().as_bytes();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        if environment
            .windows(run_dir.len())
            .any(|part| part == run_dir)
        {
            found.push(pid);
        }
    }
    found
}

pub fn spec(image: Image, run_dir: PathBuf) -> Spec {
    Spec {
        name: "web-1".parse().unwrap(),
        image,
        layer: None,
        ssh_key: None,
        cpus: 1,
        memory_mib: 64,
        mac: "52:54:00:12:34:56".parse().unwrap(),
        address: "10.77.0.2".parse().unwrap(),
        gateway: "10.77.0.1".parse().unwrap(),
        tap: "omweb-1".into(),
        consumer: Consumer {
            public_key: WgPublicKey::try_from([7; 32]).unwrap(),
            endpoint: "192.0.2.10:51820".parse().unwrap(),
        },
        tunnel: Tunnel {
            address: "10.66.0.2".parse().unwrap(),
            prefix: 24,
            peer: "10.66.0.1".parse().unwrap(),
        },
        preshared_key: None,
        keepalive: Spec::KEEPALIVE,
        reach: Vec::new(),
        mode: Mode::Filtered,
        limits: DirectionLimits::default(),
        console_shell: false,
        accel: Accel::Tcg,
        machine: MachineType::Q35,
        run_dir,
        jail: Jail::default(),
        guard_owner: None,
        guard_lease: None,
        redirect: false,
        outlives_launcher: false,
        agent: None,
    }
}

/// The first event that `wanted` takes, within three minutes: an emulated boot takes one where other
/// work keeps the processors busy.
pub async fn event(running: &mut Running, wanted: impl Fn(&GuestEvent) -> bool) -> GuestEvent {
    let found = async {
        let mut before = Vec::new();
        loop {
            let event = running.next_event().await;
            if wanted(&event) {
                return event;
            }
            let has_ended = matches!(event, GuestEvent::Exited { .. });
            before.push(event);
            let console = || std::fs::read_to_string(running.console_log()).unwrap_or_default();
            assert!(
                !has_ended,
                "QEMU ended before the event: {before:?}\n{}",
                console()
            );
        }
    };
    tokio::time::timeout(Duration::from_secs(180), found)
        .await
        .expect("the event did not come")
}

/// Waits until `condition` holds; gives how long that took.
pub fn within(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Duration {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    started.elapsed()
}
