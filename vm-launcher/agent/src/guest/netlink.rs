//! Questions to the kernel by netlink, each answered within two seconds or not at all.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use netlink_packet_core::{NlaBuffer, NlasIterator};
use netlink_sys::{Socket, SocketAddr};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::SealError;

const DONE: u16 = 3;
const ERROR: u16 = 2;
const FLAG_REQUEST: u16 = 1;
const FLAG_DUMP: u16 = 0x300;
const FLAG_INTERRUPTED: u16 = 0x10;
const HEADER: usize = 16;
const PATIENCE_MS: u16 = 2000;
/// A dump that the kernel changed meanwhile is asked for again, as often.
const TRIES: u32 = 5;

/// A netlink socket.
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the socket's, which lives as long as what is borrowed from it.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }
}

impl Netlink {
    /// A socket of `protocol`, which is told of changes to `groups`.
    pub(crate) fn open(protocol: isize, groups: &[u32]) -> Result<Self, SealError> {
        let opened = || -> std::io::Result<Socket> {
            let mut socket = Socket::new(protocol)?;
            socket.bind_auto()?;
            socket.set_non_blocking(true)?;
            for group in groups {
                socket.add_membership(*group)?;
            }
            Ok(socket)
        };
        Ok(Self {
            socket: opened().map_err(SealError::Netlink)?,
            sequence: 0,
        })
    }

    /// The payloads of what the kernel answers to a question of `kind`; `None` where it has nothing of that kind.
    pub(crate) fn dump(
        &mut self,
        kind: u16,
        payload: &[u8],
    ) -> Result<Option<Vec<Vec<u8>>>, SealError> {
        for _ in 0..TRIES {
            self.ask(kind, FLAG_DUMP, payload)?;
            match self.answers(true)? {
                Answers::Whole(answers) => return Ok(Some(answers)),
                Answers::Interrupted => {}
                Answers::Nothing => return Ok(None),
            }
        }
        Err(SealError::KeepsChanging)
    }

    /// The one answer to a question of `kind`; `None` where the kernel has nothing of that kind.
    pub(crate) fn get(&mut self, kind: u16, payload: &[u8]) -> Result<Option<Vec<u8>>, SealError> {
        self.ask(kind, 0, payload)?;
        match self.answers(false)? {
            Answers::Whole(answers) => Ok(answers.into_iter().next()),
            Answers::Interrupted | Answers::Nothing => Ok(None),
        }
    }

    /// Throws away what the socket was told; only that it was told counts.
    pub(crate) fn forget(&self) {
        // An error (too much was told) counts as told, and is taken by the read.
        while self.socket.recv_from_full().is_ok() {}
    }

    fn ask(&mut self, kind: u16, flags: u16, payload: &[u8]) -> Result<(), SealError> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = ((HEADER + payload.len()) as u32).to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend((FLAG_REQUEST | flags).to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend([0; 4]);
        message.extend(payload);
        self.socket
            .send_to(&message, &SocketAddr::new(0, 0), 0)
            .map_err(SealError::Netlink)?;
        Ok(())
    }

    fn answers(&self, many: bool) -> Result<Answers, SealError> {
        let mut answers = Vec::new();
        let mut interrupted = false;
        loop {
            let mut ready = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::from(PATIENCE_MS)).map_err(SealError::Poll)? == 0 {
                return Err(SealError::Silent);
            }
            let (bytes, _) = self.socket.recv_from_full().map_err(SealError::Netlink)?;
            let mut rest = &bytes[..];
            while let Some((message, after)) = first_message(rest) {
                rest = after;
                if message.sequence != self.sequence {
                    continue;
                }
                interrupted |= message.flags & FLAG_INTERRUPTED != 0;
                match message.kind {
                    DONE if interrupted => return Ok(Answers::Interrupted),
                    DONE => return Ok(Answers::Whole(answers)),
                    ERROR => return refused(message.payload),
                    _ => answers.push(message.payload.to_vec()),
                }
                if !many {
                    return Ok(Answers::Whole(answers));
                }
            }
        }
    }
}

enum Answers {
    Whole(Vec<Vec<u8>>),
    Interrupted,
    Nothing,
}

struct Head<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

/// The first message in `bytes`, and what follows it.
fn first_message(bytes: &[u8]) -> Option<(Head<'_>, &[u8])> {
    let header = bytes.first_chunk::<HEADER>()?;
    let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
    let message = Head {
        kind: u16::from_ne_bytes([header[4], header[5]]),
        flags: u16::from_ne_bytes([header[6], header[7]]),
        sequence: u32::from_ne_bytes([header[8], header[9], header[10], header[11]]),
        payload: bytes.get(HEADER..length)?,
    };
    Some((
        message,
        bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]),
    ))
}

fn refused(payload: &[u8]) -> Result<Answers, SealError> {
    let code = payload
        .first_chunk()
        .map_or(i32::MIN, |code| i32::from_ne_bytes(*code));
    match -code {
        0 => Ok(Answers::Whole(Vec::new())),
        libc::ENOENT | libc::ENODEV | libc::EOPNOTSUPP | libc::EINVAL | libc::EPROTONOSUPPORT => {
            Ok(Answers::Nothing)
        }
        code => Err(SealError::Netlink(std::io::Error::from_raw_os_error(code))),
    }
}

/// The attributes in `bytes`, as far as they are sound.
pub(crate) fn attributes(bytes: &[u8]) -> impl Iterator<Item = NlaBuffer<&[u8]>> {
    NlasIterator::new(bytes).map_while(Result::ok)
}

/// The value of the first attribute of `kind` in `bytes`.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<Vec<u8>> {
    attributes(bytes)
        .find(|attribute| attribute.kind() == kind)
        .map(|attribute| attribute.value().to_vec())
}

/// An attribute's bytes.
pub(crate) fn encoded(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = 4 + value.len();
    let mut bytes = (length as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(length.next_multiple_of(4), 0);
    bytes
}
