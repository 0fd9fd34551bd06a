//! File systems that do not answer: they hold up the guest that needs them and nothing else.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use omerta_test_support::IDLE;

use crate::daemon::{Answer, Daemon};
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
