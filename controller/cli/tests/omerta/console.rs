//! `omerta vm console` on a real pseudo-terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::Pid;
use serde_json::json;

use crate::omertad::{Omertad, guest};
use crate::run::{Ran, command, fed};

const PATIENCE: Duration = Duration::from_secs(10);

/// An omertad with one guest, whose console is the test's.
struct Guest {
    omertad: Omertad,
    console: UnixListener,
    _dir: tempfile::TempDir,
}

impl Guest {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.sock");
        let console = UnixListener::bind(&path).unwrap();
        let mut guest = guest("alpha", "running");
        guest["console"] = json!(path);
        Self {
            omertad: Omertad::always(200, guest),
            console,
            _dir: dir,
        }
    }

    fn arguments(&self) -> String {
        format!(
            "--socket {} vm console alpha",
            self.omertad.socket().display()
        )
    }
}

/// A session on a terminal that the test holds the other end of.
struct Session {
    child: Child,
    console: UnixStream,
    keys: File,
    screen: Receiver<Vec<u8>>,
    seen: Vec<u8>,
    terminal: OwnedFd,
    before: Termios,
}

impl Session {
    fn start(guest: &Guest) -> Self {
        let pty = openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let mut command = command(&guest.arguments());
        let end = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = command
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let (console, _) = guest.console.accept().unwrap();
        let keys = File::from(pty.master);
        let mut master = keys.try_clone().unwrap();
        let (shown, screen) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length) = master.read(&mut buffer) {
                if shown.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        let mut session = Self {
            child,
            console,
            keys,
            screen,
            seen: Vec::new(),
            terminal: pty.slave,
            before,
        };
        session.sees("Ctrl-] detaches");
        assert!(
            !tcgetattr(&session.terminal)
                .unwrap()
                .local_flags
                .contains(LocalFlags::ICANON)
        );
        session
    }

    /// Waits until `text` has been shown.
    fn sees(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(error) => panic!(
                    "{text:?} was not shown ({error}): {:?}",
                    String::from_utf8_lossy(&self.seen)
                ),
            }
        }
    }

    /// Waits for the end, which must be a good one and leave the terminal as it was.
    fn ends(mut self) -> String {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the session does not end");
            thread::sleep(Duration::from_millis(5));
        };
        let after = tcgetattr(self.terminal.as_fd()).unwrap();
        assert_eq!(after, self.before);
        self.sees("\x1b[0m\x1b[?25h");
        while let Ok(bytes) = self.screen.recv_timeout(Duration::from_millis(50)) {
            self.seen.extend(bytes);
        }
        assert_eq!(
            status.code(),
            Some(0),
            "{:?}",
            String::from_utf8_lossy(&self.seen)
        );
        String::from_utf8_lossy(&self.seen).into_owned()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn keys_reach_the_guest_and_its_answer_the_screen() {
    let guest = Guest::new();
    let mut session = Session::start(&guest);
    // Ctrl-C and Ctrl-Z are the guest's, not this terminal's.
    session.keys.write_all(b"ls\r\x03\x1a").unwrap();
    let mut typed = [0; 5];
    session.console.read_exact(&mut typed).unwrap();
    assert_eq!(&typed, b"ls\r\x03\x1a");
    session
        .console
        .write_all(b"\x1b[32mbin\x1b[0m\r\n")
        .unwrap();
    session.sees("\x1b[32mbin\x1b[0m\r\n");
    // What was typed before Ctrl-] is the guest's, what follows is nobody's.
    session.keys.write_all(b"x\x1dy").unwrap();
    let screen = session.ends();
    assert!(screen.contains("detached from alpha"), "{screen:?}");
}

#[test]
fn hostile_sequences_do_not_reach_the_terminal() {
    let guest = Guest::new();
    let mut session = Session::start(&guest);
    session
        .console
        .write_all(b"a\x1b]52;c;cm0gLXJm\x07b\x1b[6nc\x1b]0;ti")
        .unwrap();
    session
        .console
        .write_all(b"tle\x1b\\d\x1b[?1049he\r\n")
        .unwrap();
    session.sees("abcde\r\n");
    session.keys.write_all(b"\x1d").unwrap();
    let screen = session.ends();
    assert!(
        !screen.contains("\x1b]") && !screen.contains("6n") && !screen.contains("1049"),
        "{screen:?}"
    );
}

#[test]
fn terminal_is_given_back_when_the_guest_ends() {
    let guest = Guest::new();
    let session = Session::start(&guest);
    session.console.shutdown(std::net::Shutdown::Both).unwrap();
    let screen = session.ends();
    assert!(screen.contains("alpha closed its console"), "{screen:?}");
}

#[test]
fn terminal_is_given_back_on_a_signal() {
    for signal in [
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
    ] {
        let guest = Guest::new();
        let session = Session::start(&guest);
        kill(Pid::from_raw(session.child.id() as i32), signal).unwrap();
        session.ends();
    }
}

#[test]
fn pipes_carry_bytes_as_they_are() {
    let guest = Guest::new();
    let arguments = guest.arguments();
    let console = guest.console.try_clone().unwrap();
    let talk = thread::spawn(move || {
        let (mut console, _) = console.accept().unwrap();
        let mut asked = [0; 4];
        console.read_exact(&mut asked).unwrap();
        console.write_all(b"\x1b[6n\x1b]0;t\x07\xff").unwrap();
        asked
    });
    let mut child = command(&arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"a\x1dc\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(&talk.join().unwrap(), b"a\x1dc\n");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(output.stdout, b"\x1b[6n\x1b]0;t\x07\xff");
    assert_eq!(output.stderr, b"");
}

/// Runs a session whose input is `input`, against a console that `talk` serves and that stays
/// open; the session must end by itself.
fn piped(
    input: &'static [u8],
    talk: impl FnOnce(&mut UnixStream) + Send + 'static,
    signal: Option<Signal>,
) -> std::process::Output {
    let guest = Guest::new();
    let listener = guest.console.try_clone().unwrap();
    let (talked, has_talked) = channel();
    let console = thread::spawn(move || {
        let (mut console, _) = listener.accept().unwrap();
        talk(&mut console);
        talked.send(console).unwrap();
    });
    let mut child = command(&format!("{} --linger 1", guest.arguments()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let typist = thread::spawn(move || {
        // A session that ends early takes no more.
        let _ = stdin.write_all(input);
    });
    let console_stays_open = has_talked.recv_timeout(PATIENCE).unwrap();
    if let Some(signal) = signal {
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
    }
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() >= deadline {
            child.kill().unwrap();
            panic!("the session does not end: {:?}", child.wait_with_output());
        }
        thread::sleep(Duration::from_millis(5));
    }
    drop(console_stays_open);
    console.join().unwrap();
    typist.join().unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn a_piped_command_is_answered_and_the_session_ends() {
    let answer = |console: &mut UnixStream| {
        let mut asked = [0; 3];
        console.read_exact(&mut asked).unwrap();
        assert_eq!(&asked, b"ls\n");
        console.write_all(b"bin\r\n").unwrap();
    };
    let output = piped(b"ls\n", answer, None);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(output.stdout, b"bin\r\n");
    assert_eq!(output.stderr, b"");
}

#[test]
fn a_session_without_input_shows_what_comes_and_ends() {
    let speak = |console: &mut UnixStream| console.write_all(b"hello").unwrap();
    let output = piped(b"", speak, None);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(output.stdout, b"hello");
}

/// More than the socket, the pipe and the session together hold.
static MUCH: [u8; 4 << 20] = [b'x'; 4 << 20];

#[test]
fn a_guest_that_takes_no_input_cannot_keep_a_signal_out() {
    let begin = |console: &mut UnixStream| console.read_exact(&mut [0]).unwrap();
    let output = piped(&MUCH, begin, Some(Signal::SIGTERM));
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn a_guest_that_takes_no_input_still_shows_what_it_prints() {
    let speak = |console: &mut UnixStream| {
        console.read_exact(&mut [0]).unwrap();
        console.write_all(b"hello").unwrap();
    };
    let output = piped(&MUCH, speak, None);
    assert_eq!(output.stdout, b"hello", "{output:?}");
}

#[test]
fn input_that_is_not_taken_is_a_failure() {
    let output = piped(&MUCH, |_| {}, None);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(
        line.contains("takes no input") && line.contains("vm logs alpha"),
        "{line}"
    );
}

#[test]
fn console_that_is_gone_is_named() {
    let guest = Guest::new();
    let path = guest
        .console
        .local_addr()
        .unwrap()
        .as_pathname()
        .unwrap()
        .to_owned();
    std::fs::remove_file(&path).unwrap();
    let ran: Ran = fed(command(&guest.arguments()), b"");
    ran.failed(
        1,
        &[
            "guest alpha",
            &path.display().to_string(),
            "omerta vm show alpha",
        ],
    );
}
