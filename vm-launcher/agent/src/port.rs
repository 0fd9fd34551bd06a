//! The virtio-serial port to the host.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use omerta_agent::message::{Message, PORT_NAME};

const PORTS: &str = "/sys/class/virtio-ports";
/// How long the kernel may take to find the port.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the host has not taken yet: the first word and two answers.
const MOST_WAITING: usize = 512;

/// Why there is no port.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PortError {
    #[error("it gives no port {PORT_NAME}")]
    None,
    #[error("cannot open its port {path}")]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The open port. It never waits for the host.
pub(crate) struct Port {
    file: File,
    waiting: VecDeque<u8>,
    gone: Option<Instant>,
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Port {
    pub(crate) fn open() -> Result<Self, PortError> {
        let until = Instant::now() + PATIENCE;
        let path = loop {
            if let Some(path) = find(Path::new(PORTS)) {
                break path;
            }
            if Instant::now() >= until {
                return Err(PortError::None);
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(|source| PortError::Open { path, source })?;
        Ok(Self {
            file,
            waiting: VecDeque::new(),
            gone: None,
        })
    }

    /// Says `message` as soon as the host takes it; what it does not take is bounded, and what is beyond is not said.
    pub(crate) fn say(&mut self, message: &Message) {
        let bytes = message.encode();
        if self.waiting.len() + bytes.len() <= MOST_WAITING {
            self.waiting.extend(bytes);
        }
        self.flush();
    }

    /// What the host has said meanwhile.
    pub(crate) fn hear(&mut self) -> Vec<u8> {
        self.flush();
        let mut bytes = vec![0; 1024];
        let heard = self.file.read(&mut bytes).unwrap_or(0);
        bytes.truncate(heard);
        bytes
    }

    pub(crate) fn has_more_to_say(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether it is worth waiting for: one that the host has left is looked at again after a while.
    pub(crate) fn is_connected(&self) -> bool {
        self.gone
            .is_none_or(|since| since.elapsed() >= Duration::from_secs(1))
    }

    pub(crate) fn is_gone(&mut self, gone: bool) {
        self.gone = gone
            .then(Instant::now)
            .or(self.gone.filter(|_| !self.is_connected()));
    }

    fn flush(&mut self) {
        while let Ok(written @ 1..) = self.file.write(self.waiting.make_contiguous()) {
            self.waiting.drain(..written);
        }
    }
}

/// The device of the port with this name.
fn find(ports: &Path) -> Option<PathBuf> {
    fs::read_dir(ports).ok()?.flatten().find_map(|port| {
        let name = fs::read_to_string(port.path().join("name")).ok()?;
        (name.trim_end() == PORT_NAME).then(|| Path::new("/dev").join(port.file_name()))
    })
}
