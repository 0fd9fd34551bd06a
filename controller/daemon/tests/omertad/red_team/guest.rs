//! The red team's guest: the image that is built, and on top of it what the red team brings.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::{Value, json};

use crate::daemon::{Daemon, namespace};
use crate::guests::request;

#[derive(Clone, Copy)]
pub enum Image {
    /// With the red team at its console.
    RedTeam,
    /// With a network that is set up wrongly.
    BrokenVpn,
    /// With a workload at its console that means no harm.
    Honest,
}

impl Image {
    const fn name(self) -> &'static str {
        match self {
            Self::RedTeam => "red-team",
            Self::BrokenVpn => "broken-vpn",
            Self::Honest => "honest",
        }
    }
}

/// An omertad with all images that gives agents so long to answer; `None`, said aloud, where no image is built.
pub fn start(deadline_seconds: u32) -> Option<Daemon> {
    let built = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/image");
    let built = std::env::var_os("OMERTA_IMAGE_DIR").map_or_else(built, PathBuf::from);
    if !built.join("omerta-agent").exists() {
        println!("skipped: {} holds no image with an agent", built.display());
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("omertad.toml");
    // An emulated guest takes its time to boot where other work keeps the processors busy.
    let agent = format!(
        "[agent]\narrival_seconds = 240\ninterval_seconds = 1\ndeadline_seconds = {deadline_seconds}\n"
    );
    fs::write(&config, agent).unwrap();
    let arguments = ["--metrics", "off", "--config", config.to_str().unwrap()];
    let daemon = Daemon::start_in(namespace(), directory, &arguments);
    let images = daemon.path().join("state/images");
    let inittab = b"::sysinit:/bin/true\n::respawn:/bin/acpid -f -l /dev/null\nttyS0::respawn:/bin/workload\n";
    let workloads: [(_, &[u8]); 2] = [
        (Image::RedTeam, include_bytes!("red-team.sh")),
        (Image::Honest, include_bytes!("honest.sh")),
    ];
    for (image, script) in workloads {
        let brings = Archive::default().file("bin/workload", 0o755, script).file(
            "etc/inittab",
            0o644,
            inittab,
        );
        write(&built, &images.join(image.name()), brings);
    }
    let network = include_bytes!("broken-vpn.sh");
    let brings = Archive::default().file("usr/lib/omerta/network", 0o755, network);
    write(&built, &images.join(Image::BrokenVpn.name()), brings);
    Some(daemon)
}

/// Runs one of them, with what is said beside.
pub fn run(daemon: &Daemon, name: &str, image: Image, more: Value) -> Value {
    let mut body: Value = serde_json::from_str(&request(name, image.name())).unwrap();
    body["memory_mib"] = json!(256);
    body["console_shell"] = json!(true);
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    let answer = daemon.post("/v1/guests", &body.to_string());
    assert_eq!(answer.status, 201, "{answer:?}");
    answer.json()
}

/// The other end of the red team's console.
pub struct Console {
    to_guest: UnixStream,
    /// What the red team says.
    said: Receiver<String>,
    is_ready: bool,
}

impl Console {
    /// Connects before the guest has booted, and reads as long as there is something.
    pub fn of(guest: &Value) -> Self {
        let to_guest = UnixStream::connect(guest["console"].as_str().unwrap()).unwrap();
        let lines = BufReader::new(to_guest.try_clone().unwrap()).split(b'\n');
        let (sender, said) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if let Some((_, word)) = line.split_once("workload: ")
                    && sender.send(word.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        Self {
            to_guest,
            said,
            is_ready: false,
        }
    }

    /// Asks for an attack, once the red team waits for that.
    pub fn say(&mut self, attack: &str) {
        if !std::mem::replace(&mut self.is_ready, true) {
            // A guest that had booted before says so no more: it begins anew at the end of an empty line.
            self.hear("ready");
        }
        writeln!(self.to_guest, "{attack}").unwrap();
    }

    /// The guest boots again.
    pub const fn begins_anew(&mut self) {
        self.is_ready = false;
    }

    /// The same, and waits until it is done, or the guest is ended for it.
    pub fn ask(&mut self, attack: &str) {
        self.say(attack);
        self.hear(&format!("done {attack}"));
    }

    fn hear(&self, word: &str) {
        loop {
            match self.said.recv_timeout(Duration::from_secs(240)) {
                Ok(said) if said == word => return,
                Ok(_) => {}
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return,
                Err(error) => panic!("the red team does not say `{word}`: {error}"),
            }
        }
    }
}

fn write(built: &Path, directory: &Path, brings: Archive) {
    fs::create_dir_all(directory).unwrap();
    for file in ["vmlinuz", "omerta-agent"] {
        fs::copy(built.join(file), directory.join(file)).unwrap();
    }
    // A kernel unpacks one archive after the other; they begin at a multiple of four bytes.
    let mut initrd = fs::read(built.join("initrd.img")).unwrap();
    initrd.resize(initrd.len().next_multiple_of(512), 0);
    initrd.extend(brings.end());
    fs::write(directory.join("initrd.img"), initrd).unwrap();
}

/// A cpio archive ("newc").
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    count: u32,
}

impl Archive {
    fn file(mut self, name: &str, mode: u32, content: &[u8]) -> Self {
        self.count += 1;
        let size = u32::try_from(content.len()).unwrap();
        self.entry(name, self.count, 0o100_000 | mode, size);
        self.bytes.extend(content);
        self.align();
        self
    }

    fn end(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, 0, 0);
        self.bytes
    }

    fn entry(&mut self, name: &str, inode: u32, mode: u32, size: u32) {
        let length = u32::try_from(name.len() + 1).unwrap();
        // inode, mode, owner, group, links, time, size, device twice two, the name's length, checksum.
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, length, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
