//! omertad is killed between any two steps, and at random: what is left is taken over or removed.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use omerta_test_support::{IDLE, Namespace};
use tempfile::TempDir;

use crate::daemon::{Daemon, command};
use crate::guests::{give_image, request};
use crate::recovery::{show, traces};

/// Stands before libc in omertad, and kills it just after so many calls of those by which it makes
/// something on the host: commits of the store, directories, files' removals, taps and processes.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int calls;

static void step(void) {
    int before = errno;
    const char *armed = getenv("OMERTA_TEST_ARMED"), *last = getenv("OMERTA_TEST_LAST_CALL");
    if (armed && last && access(armed, F_OK) == 0
        && __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST) == atoi(last))
        kill(getpid(), SIGKILL);
    errno = before;
}

#define AFTER(result, name, parameters, arguments)                                        \
    result name parameters {                                                              \
        static result (*next) parameters;                                                 \
        if (!next) next = (result (*) parameters)dlsym(RTLD_NEXT, #name);                 \
        result made = next arguments;                                                     \
        step();                                                                           \
        return made;                                                                      \
    }

AFTER(int, fdatasync, (int fd), (fd))
AFTER(int, fsync, (int fd), (fd))
AFTER(int, mkdir, (const char *path, mode_t mode), (path, mode))
AFTER(int, rmdir, (const char *path), (path))
AFTER(int, unlink, (const char *path), (path))
AFTER(int, unlinkat, (int directory, const char *path, int flags), (directory, path, flags))
AFTER(int, rename, (const char *from, const char *to), (from, to))

/* The child goes on as it is; its parent is killed just after. */
pid_t fork(void) {
    static pid_t (*next)(void);
    if (!next) next = (pid_t (*)(void))dlsym(RTLD_NEXT, "fork");
    pid_t made = next();
    if (made > 0) step();
    return made;
}

int ioctl(int fd, unsigned long request, ...) {
    static int (*next)(int, unsigned long, ...);
    if (!next) next = (int (*)(int, unsigned long, ...))dlsym(RTLD_NEXT, "ioctl");
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    int made = next(fd, request, argument);
    if (request == 0x400454caUL) step(); /* TUNSETIFF */
    return made;
}
"#;

struct Shim {
    directory: TempDir,
}

impl Shim {
    fn build() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("shim.c");
        std::fs::write(&source, SHIM).unwrap();
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(directory.path().join("shim.so"))
            .arg(&source)
            .arg("-ldl")
            .status()
            .unwrap();
        assert!(built.success());
        Self { directory }
    }

    fn armed(&self) -> PathBuf {
        self.directory.path().join("armed")
    }

    /// An omertad that is killed after its call of that number, counted from when it is armed.
    fn start(&self, stage: (Namespace, TempDir), last: u32) -> Daemon {
        let _ = std::fs::remove_file(self.armed());
        let mut command = command(&stage.0, stage.1.path());
        command
            .args(["--metrics", "off"])
            .env("LD_PRELOAD", self.directory.path().join("shim.so"))
            .env("OMERTA_TEST_ARMED", self.armed())
            .env("OMERTA_TEST_LAST_CALL", last.to_string());
        Daemon::start_by(command, stage.0, stage.1)
    }

    fn arm(&self) {
        std::fs::write(self.armed(), b"").unwrap();
    }
}

/// Posts to an omertad that may die of it, and does not answer then.
fn ask(socket: &Path, path: &str, body: &str) {
    let Ok(mut stream) = UnixStream::connect(socket) else {
        return;
    };
    let length = body.len();
    let request = format!("POST {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}");
    let _ = stream.write_all(request.as_bytes());
    let _ = stream.read_to_end(&mut Vec::new());
}

/// Asks for something of an omertad that may die of it; whether it has.
fn dies_of(daemon: &mut Daemon, ask: impl FnOnce(&Daemon)) -> bool {
    ask(daemon);
    // A kill that is under way is seen at once; one that did not happen never is.
    let ended = daemon.process.wait(Duration::from_millis(200)).unwrap();
    if let Some(status) = ended {
        assert_eq!(
            status.signal(),
            Some(Signal::SIGKILL as i32),
            "{}",
            daemon.log()
        );
    }
    ended.is_some()
}

/// Of a guest that is not there nothing is, and one that is runs; killed, it leaves nothing either.
fn assert_whole(daemon: &Daemon, case: &str) {
    let state = show(daemon, "alpha")["state"].clone();
    if state == "running" || state == "stopping" {
        let found = traces(&daemon.namespace, daemon.path());
        assert_eq!(found.len(), 4, "{case}: {found:?}: {}", daemon.log());
        let killed = daemon.post("/v1/guests/alpha/kill", "");
        assert!(matches!(killed.status, 200 | 404), "{case}: {killed:?}");
    }
    assert_eq!(traces(&daemon.namespace, daemon.path()), [""; 0], "{case}");
    assert_nothing_is_kept(case);
    // Its name, its address and its user are free again.
    let again = daemon.post("/v1/guests", &request("alpha", "bare"));
    assert_eq!(again.status, 201, "{case}: {again:?}");
    assert_eq!(
        daemon.post("/v1/guests/alpha/kill", "").status,
        200,
        "{case}"
    );
}

/// No user of a dead guest is reserved, and no cgroup is left of one: those are named by the user.
fn assert_nothing_is_kept(case: &str) {
    for user in std::fs::read_dir("/var/lib/omerta/guest-uids")
        .into_iter()
        .flatten()
    {
        let path = user.unwrap().path();
        // Another test's may be given back at this very moment.
        let end = Instant::now() + Duration::from_secs(20);
        while omerta_vm_launcher::LockFile::is_abandoned(&path) {
            assert!(Instant::now() < end, "{case}: {} is left", path.display());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Kills at every call in turn, until the request is answered with no call left to be killed at.
fn at_every_step(prepare: impl Fn(&Daemon), ask: impl Fn(&Daemon)) -> u32 {
    let shim = Shim::build();
    let mut stage = (crate::daemon::namespace(), tempfile::tempdir().unwrap());
    for last in 1.. {
        let mut daemon = shim.start(stage, last);
        give_image(&daemon, IDLE);
        prepare(&daemon);
        shim.arm();
        let died = dies_of(&mut daemon, &ask);
        stage = daemon.die();
        let daemon = Daemon::start_in(stage.0, stage.1, &["--metrics", "off"]);
        assert_whole(&daemon, &format!("call {last}"));
        stage = daemon.die();
        if !died {
            return last - 1;
        }
    }
    0
}

#[test]
fn killed_after_any_step_of_a_run_it_leaves_a_guest_that_runs_or_nothing() {
    let steps = at_every_step(
        |_| {},
        |daemon| {
            ask(&daemon.socket(), "/v1/guests", &request("alpha", "bare"));
        },
    );
    println!("measured: killed after each of {steps} steps of a run");
    assert!(steps >= 10, "{steps} steps: the shim sees too little");
}

#[test]
fn killed_after_any_step_of_an_end_it_leaves_nothing() {
    for order in ["kill", "stop"] {
        let steps = at_every_step(
            |daemon| {
                let ran = daemon.post("/v1/guests", &request("alpha", "bare"));
                assert_eq!(ran.status, 201, "{ran:?}");
            },
            |daemon| {
                let body = if order == "stop" {
                    r#"{"deadline_seconds":1}"#
                } else {
                    ""
                };
                ask(&daemon.socket(), &format!("/v1/guests/alpha/{order}"), body);
            },
        );
        println!("measured: killed after each of {steps} steps of a {order}");
        assert!(steps >= 4, "{steps} steps: the shim sees too little");
    }
}

/// A generator of its own, so that a failure is found again by the seed that it prints.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % bound
    }
}

/// `OMERTA_RANDOM_KILLS` says how many; a dozen in every run of the tests.
#[test]
fn killed_at_random_under_load_it_leaves_guests_that_run_or_nothing() {
    let kills = std::env::var("OMERTA_RANDOM_KILLS");
    let kills: u32 = kills.ok().and_then(|text| text.parse().ok()).unwrap_or(12);
    let seed = std::env::var("OMERTA_RANDOM_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("measured: {kills} random kills, seed {seed}");
    let mut random = Random(seed);
    let mut stage = (crate::daemon::namespace(), tempfile::tempdir().unwrap());
    let names = ["alpha", "beta", "gamma"];
    for kill in 0..kills {
        let daemon = Daemon::start_in(stage.0, stage.1, &["--metrics", "off"]);
        give_image(&daemon, IDLE);
        let socket = daemon.socket();
        let after = Duration::from_millis(random.below(1500));
        let orders: Vec<(&str, u64)> = names.iter().map(|name| (*name, random.below(4))).collect();
        std::thread::scope(|threads| {
            for (name, order) in &orders {
                let socket = &socket;
                threads.spawn(move || {
                    let (path, body) = match order {
                        0 => (format!("/v1/guests/{name}/kill"), String::new()),
                        1 => (format!("/v1/guests/{name}/pause"), String::new()),
                        _ => ("/v1/guests".to_owned(), request(name, "bare")),
                    };
                    ask(socket, &path, &body);
                });
            }
            std::thread::sleep(after);
            daemon.process.signal(Signal::SIGKILL).unwrap();
        });
        stage = daemon.die();
        let daemon = Daemon::start_in(stage.0, stage.1, &["--metrics", "off"]);
        let mut living = 0;
        for name in names {
            let guest = show(&daemon, name);
            let state = guest["state"].as_str().unwrap_or("none").to_owned();
            assert!(
                ["running", "held", "ended", "none"].contains(&state.as_str()),
                "kill {kill}: {guest}"
            );
            living += usize::from(state == "running" || state == "held");
        }
        let left = traces(&daemon.namespace, daemon.path());
        assert_eq!(
            left.len(),
            4 * living,
            "kill {kill}: {left:?}: {}",
            daemon.log()
        );
        stage = daemon.die();
    }
    let daemon = Daemon::start_in(stage.0, stage.1, &["--metrics", "off"]);
    for name in names {
        daemon.post(&format!("/v1/guests/{name}/kill"), "");
    }
    assert_eq!(traces(&daemon.namespace, daemon.path()), [""; 0]);
    assert_nothing_is_kept("at the end");
}
