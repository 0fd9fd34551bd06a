//! Running an omertad of one's own.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use omerta_test_support::{Namespace, Orphans, Process};
use serde_json::Value;
use tempfile::TempDir;

/// How long anything here may take on a loaded machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// An omertad in a directory and a network namespace of its own. Killed on drop.
pub struct Daemon {
    pub process: Process,
    /// After the process, which would tell of their end.
    orphans: Orphans,
    pins: Pins,
    pub namespace: Namespace,
    directory: TempDir,
}

/// What is pinned for the namespace, removed with it: its number is given again, also to other tests' namespaces.
struct Pins(Option<PathBuf>);

impl Drop for Pins {
    fn drop(&mut self) {
        if let Some(directory) = &self.0 {
            // There may be none.
            let _ = std::fs::remove_dir_all(directory);
        }
    }
}

/// An HTTP answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: String,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("not JSON: {self:?}"))
    }

    /// Asserts an error answer of this status and kind, on one line, and gives its message.
    pub fn refusal(&self, status: u16, kind: &str) -> String {
        assert_eq!(self.status, status, "{self:?}");
        let json = self.json();
        assert_eq!(json["error"], kind, "{self:?}");
        let message = json["message"].as_str().unwrap().to_owned();
        assert_eq!(message.lines().count(), 1, "{message:?}");
        message
    }
}

/// The command that starts an omertad which keeps everything in `directory`.
pub fn command(namespace: &Namespace, directory: &Path) -> Command {
    let mut command = namespace.command(env!("CARGO_BIN_EXE_omertad"));
    command
        .arg("--socket")
        .arg(directory.join("omertad.sock"))
        .arg("--run-dir")
        .arg(directory.join("run"))
        .arg("--state-dir")
        .arg(directory.join("state"))
        .arg("--image-dir")
        .arg(directory.join("state/images"))
        .args(["--accel", "tcg"])
        .stdin(Stdio::null());
    command
}

pub fn namespace() -> Namespace {
    Namespace::new("omertad").unwrap()
}

/// Runs an omertad that is expected to end by itself.
pub fn run_to_end(mut command: Command) -> Output {
    command.output().unwrap()
}

/// The one line that an omertad which did not start has to say.
pub fn complaint(output: &Output, code: i32) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{text}");
    let line = text.lines().last().unwrap_or_default().to_owned();
    assert!(line.starts_with("omertad: "), "{text}");
    line
}

impl Daemon {
    /// Starts one with metrics off.
    pub fn start() -> Self {
        Self::start_with(tempfile::tempdir().unwrap(), &["--metrics", "off"])
    }

    /// Starts one in a directory that may hold something already.
    pub fn start_with(directory: TempDir, arguments: &[&str]) -> Self {
        Self::start_in(namespace(), directory, arguments)
    }

    /// Starts one where something may be left of another.
    pub fn start_in(namespace: Namespace, directory: TempDir, arguments: &[&str]) -> Self {
        let mut command = command(&namespace, directory.path());
        command.args(arguments);
        Self::start_by(command, namespace, directory)
    }

    /// Starts one by this command.
    pub fn start_by(mut command: Command, namespace: Namespace, directory: TempDir) -> Self {
        let log = std::fs::File::create(directory.path().join("log")).unwrap();
        command.stderr(log);
        let process = Process::spawn(command).unwrap();
        let daemon = Self {
            process,
            orphans: Orphans::below(directory.path()),
            pins: Pins(Some(PathBuf::from(format!(
                "/sys/fs/bpf/omerta/{}",
                namespace.inode().unwrap()
            )))),
            namespace,
            directory,
        };
        let end = Instant::now() + DEADLINE;
        while !daemon.log().contains("is ready") {
            assert!(Instant::now() < end, "not ready: {}", daemon.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        daemon
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("omertad.sock")
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Kills it as a crash would; its guests live on.
    pub fn die(mut self) -> (Namespace, TempDir) {
        self.process.signal(Signal::SIGKILL).unwrap();
        self.process.wait(DEADLINE).unwrap();
        self.orphans.let_live();
        self.pins.0 = None;
        (self.namespace, self.directory)
    }

    /// Gives up the process, not the namespace, with what is pinned.
    pub fn into_namespace(mut self) -> Namespace {
        self.pins.0 = None;
        self.namespace
    }

    /// Gives up the process, not the directory.
    pub fn into_directory(self) -> TempDir {
        self.directory
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    /// Connects to where metrics are served.
    pub fn connect_to_metrics(&self) -> TcpStream {
        let log = self.log();
        let ready = log.lines().find(|line| line.contains("is ready")).unwrap();
        let (_, address) = ready.split_once("metrics=\"").unwrap();
        let (address, _) = address.split_once('"').unwrap();
        let connect = || TcpStream::connect(address).unwrap();
        self.namespace.enter(connect).unwrap()
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        let open = format!("/proc/{}/fd", self.process.pid());
        std::fs::read_dir(open).unwrap().count()
    }

    pub fn get(&self, path: &str) -> Answer {
        self.request("GET", path, "")
    }

    pub fn post(&self, path: &str, body: &str) -> Answer {
        self.request("POST", path, body)
    }

    pub fn request(&self, method: &str, path: &str, body: &str) -> Answer {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        exchange(stream, method, path, body)
    }
}

/// One request over HTTP/1.0, whose answer ends with the connection.
pub fn exchange(mut stream: impl Read + Write, method: &str, path: &str, body: &str) -> Answer {
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    // The daemon may answer and close before it has read a body that is too large.
    let _ = stream.write_all(body.as_bytes());
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    let text = String::from_utf8(answer).unwrap();
    let Some((headers, body)) = text.split_once("\r\n\r\n") else {
        panic!("not an answer: {text:?} ({read:?})")
    };
    let status = headers.split(' ').nth(1).unwrap().parse().unwrap();
    Answer {
        status,
        headers: headers.to_ascii_lowercase(),
        body: body.to_owned(),
    }
}
