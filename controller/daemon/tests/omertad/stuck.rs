//! File systems that do not answer: they hold up the guest that needs them and nothing else.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use omerta_test_support::{IDLE, Process, write_bare_guest};

use crate::daemon::{Answer, Daemon, command, exchange, namespace};
use crate::guests::{give_image, request, run, start};

/// More than omertad has threads for its tasks.
const MANY: usize = 24;

/// A mounted file system whose server never answers: whoever looks into it waits until it is
/// dropped, or is killed.
struct Stuck {
    path: PathBuf,
    _server: File,
}

impl Stuck {
    fn at(path: &Path) -> Option<Self> {
        std::fs::create_dir_all(path).unwrap();
        let server = File::options().read(true).write(true).open("/dev/fuse");
        let mounted = server.and_then(|server| {
            let fd = server.as_raw_fd();
            let options = format!("fd={fd},rootmode=40000,user_id=0,group_id=0");
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
            mount(
                Some("stuck"),
                path,
                Some("fuse"),
                flags,
                Some(options.as_str()),
            )?;
            Ok(server)
        });
        match mounted {
            Ok(server) => Some(Self {
                path: path.to_owned(),
                _server: server,
            }),
            Err(error) => {
                println!("skipped: no FUSE here ({error})");
                None
            }
        }
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH | MntFlags::MNT_FORCE);
    }
}

/// Asks for many guests of this image at once.
fn ask_for_many(daemon: &Arc<Daemon>, image: &'static str) -> Vec<thread::JoinHandle<Answer>> {
    let ask = |number| {
        let daemon = Arc::clone(daemon);
        thread::spawn(move || {
            daemon.post("/v1/guests", &request(&format!("stuck-{number}"), image))
        })
    };
    (0..MANY).map(ask).collect()
}

/// What others do meanwhile.
fn others_go_on(daemon: &Daemon, waiting: &[thread::JoinHandle<Answer>]) {
    assert_eq!(daemon.get("/v1/version").status, 200);
    run(daemon, "alpha");
    assert!(daemon.get("/v1/guests").body.contains("alpha"));
    assert_eq!(daemon.post("/v1/guests/alpha/kill", "").status, 200);
    let answered = waiting.iter().filter(|ask| ask.is_finished()).count();
    println!("measured: {answered} of {MANY} were answered meanwhile");
}

#[test]
fn image_that_does_not_answer_holds_up_its_own_guests_alone() {
    let daemon = Arc::new(start(IDLE));
    let Some(_stuck) = Stuck::at(&daemon.path().join("state/images/stuck")) else {
        return;
    };
    let waiting = ask_for_many(&daemon, "stuck");
    others_go_on(&daemon, &waiting);
    for ask in waiting {
        let message = ask.join().unwrap().refusal(500, "failed");
        assert!(
            message.contains("image `stuck`") && message.contains("file system"),
            "{message}"
        );
    }
}

#[test]
fn run_directory_that_does_not_answer_holds_up_its_own_guest_alone() {
    let daemon = Arc::new(Daemon::start());
    give_image(&daemon, IDLE);
    let mut stuck = Vec::new();
    for number in 0..MANY {
        let run_dir = daemon.path().join(format!("run/stuck-{number}"));
        match Stuck::at(&run_dir) {
            Some(one) => stuck.push(one),
            None => return,
        }
    }
    let waiting = ask_for_many(&daemon, "bare");
    others_go_on(&daemon, &waiting);
    drop(stuck);
    for ask in waiting {
        // Whatever its directory is by now, it is answered.
        let answer = ask.join().unwrap();
        assert!(matches!(answer.status, 201 | 500), "{answer:?}");
    }
}

#[test]
fn log_that_nobody_reads_holds_nothing_up() {
    let directory = tempfile::tempdir().unwrap();
    let namespace = namespace();
    let (_unread, mut full) = std::io::pipe().unwrap();
    fcntl(&full, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    full.write_all(&[b'.'; 4096]).unwrap();
    let mut command = command(&namespace, directory.path());
    command.args(["--metrics", "off"]).stderr(full);
    write_bare_guest(&directory.path().join("state/images/bare"), IDLE).unwrap();
    let mut process = Process::spawn(command).unwrap();
    let socket = directory.path().join("omertad.sock");
    let end = Instant::now() + Duration::from_secs(30);
    let connect = || loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => {
                stream
                    .set_read_timeout(Some(Duration::from_secs(30)))
                    .unwrap();
                return stream;
            }
            Err(error) => assert!(Instant::now() < end, "no omertad: {error}"),
        }
        thread::sleep(Duration::from_millis(10));
    };
    let request = request("alpha", "bare");
    let guest = exchange(connect(), "POST", "/v1/guests", &request);
    assert_eq!(guest.status, 201, "{guest:?}");
    let ended = exchange(connect(), "POST", "/v1/guests/alpha/kill", "");
    assert_eq!(ended.status, 200, "{ended:?}");
    process.signal(Signal::SIGTERM).unwrap();
    let status = process.wait(Duration::from_secs(20)).unwrap();
    assert_eq!(status.and_then(|status| status.code()), Some(0));
}
