//! Requests to the kernel's traffic control and about its interfaces (rtnetlink(7)), and what it answers.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    socket,
};

/// `struct nlmsghdr` and `struct tcmsg`, in bytes.
const HEADER: usize = 16;
const BODY: usize = 20;
/// `struct ifinfomsg`, in bytes: as `struct tcmsg`, but without the last word.
const LINK_BODY: usize = 16;
/// The head of `struct nlattr`.
const ATTRIBUTE: usize = 4;
/// A dump comes in datagrams of at most 32 KiB (`netlink_dump` in net/netlink/af_netlink.c).
const LARGEST: usize = 64 << 10;
/// The bits of an attribute's type that are flags.
const TYPE_MASK: u16 = 0x3fff;

/// `struct tcmsg` or `struct ifinfomsg`: what a request or an answer is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    pub ifindex: u32,
    /// Of interfaces: their flags.
    pub handle: u32,
    /// Of interfaces: which flags change.
    pub parent: u32,
    /// Of filters: preference << 16 | protocol, in network byte order.
    pub info: u32,
}

/// One object of a dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    pub subject: Subject,
    attributes: Vec<u8>,
}

impl Object {
    /// The value of the attribute `kind`.
    pub fn attribute(&self, kind: u16) -> Option<&[u8]> {
        attribute(&self.attributes, kind)
    }
}

/// The value of the attribute `kind` among `attributes`.
pub fn attribute(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(half(attributes, 0)?);
        let value = attributes.get(ATTRIBUTE..length)?;
        if half(attributes, 2)? & TYPE_MASK == kind {
            return Some(value);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

/// Appends an attribute.
pub fn append(attributes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // Nothing that is sent here is longer than a name.
    let length = (ATTRIBUTE + value.len()) as u16;
    attributes.extend(length.to_ne_bytes());
    attributes.extend(kind.to_ne_bytes());
    attributes.extend(value);
    attributes.resize(attributes.len().next_multiple_of(4), 0);
}

/// Has the kernel do `kind`, one of `RTM_*`.
pub fn change(kind: u16, flags: i32, subject: Subject, attributes: &[u8]) -> io::Result<()> {
    exchange(kind, libc::NLM_F_ACK | flags, subject, attributes).map(drop)
}

/// Everything of `kind`, one of `RTM_GET*`, that the kernel finds for `subject`.
pub fn dump(kind: u16, subject: Subject) -> io::Result<Vec<Object>> {
    exchange(kind, libc::NLM_F_DUMP, subject, &[])
}

/// What the kernel finds for `subject`, one answer alone.
pub fn get(kind: u16, subject: Subject, attributes: &[u8]) -> io::Result<Vec<Object>> {
    exchange(kind, libc::NLM_F_ACK, subject, attributes)
}

/// A socket that is told, from now on, of every change to the traffic control of this thread's
/// network namespace.
pub fn changes() -> io::Result<OwnedFd> {
    open(SockFlag::SOCK_NONBLOCK, RTMGRP_TC)
}

/// As [`changes`], and of every change to its interfaces.
pub fn all_changes() -> io::Result<OwnedFd> {
    open(
        SockFlag::SOCK_NONBLOCK,
        RTMGRP_TC | libc::RTMGRP_LINK as u32,
    )
}

/// A socket that is told, from now on, of every change to the rules of nftables(8) in this thread's network
/// namespace.
pub fn firewall_changes() -> io::Result<OwnedFd> {
    /// `NFNLGRP_NFTABLES` of include/uapi/linux/netfilter/nfnetlink.h, the seventh group.
    const NFTABLES: u32 = 1 << 6;
    open_for(
        SockProtocol::NetlinkNetFilter,
        SockFlag::SOCK_NONBLOCK,
        NFTABLES,
    )
}

/// include/uapi/linux/rtnetlink.h.
const RTMGRP_TC: u32 = 8;

/// Bytes of what stands before the attributes of messages of `kind`.
fn body_of(kind: u16) -> usize {
    match kind {
        libc::RTM_NEWLINK..=libc::RTM_SETLINK => LINK_BODY,
        _ => BODY,
    }
}

fn open(flags: SockFlag, groups: u32) -> io::Result<OwnedFd> {
    open_for(SockProtocol::NetlinkRoute, flags, groups)
}

fn open_for(protocol: SockProtocol, flags: SockFlag, groups: u32) -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC | flags,
        protocol,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    Ok(socket)
}

fn exchange(kind: u16, flags: i32, subject: Subject, attributes: &[u8]) -> io::Result<Vec<Object>> {
    let socket = open(SockFlag::empty(), 0)?;
    let body = body_of(kind);
    let mut message = Vec::with_capacity(HEADER + BODY + attributes.len());
    message.extend(((HEADER + body + attributes.len()) as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
    // Sequence and port: the socket is this exchange's own.
    message.extend([0; 8]);
    message.extend([0; 4]);
    for word in [
        subject.ifindex,
        subject.handle,
        subject.parent,
        subject.info,
    ] {
        message.extend(word.to_ne_bytes());
    }
    message.truncate(HEADER + body);
    message.extend(attributes);
    send(socket.as_raw_fd(), &message, MsgFlags::empty())?;

    let mut found = Vec::new();
    let mut buffer = vec![0; LARGEST];
    loop {
        let length = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC) {
            Err(Errno::EINTR) => continue,
            length => length?,
        };
        let datagram = buffer.get(..length).ok_or_else(malformed)?;
        if read(datagram, &mut found)? {
            return Ok(found);
        }
    }
}

/// Adds the objects of a datagram to `found`; whether nothing follows it.
fn read(mut datagram: &[u8], found: &mut Vec<Object>) -> io::Result<bool> {
    while !datagram.is_empty() {
        let length = word(datagram, 0).ok_or_else(malformed)? as usize;
        let body = datagram.get(HEADER..length).ok_or_else(malformed)?;
        let flags = i32::from(half(datagram, 6).ok_or_else(malformed)?);
        if flags & libc::NLM_F_DUMP_INTR != 0 {
            return Err(io::Error::other("it changed while it was read: try again"));
        }
        let kind = half(datagram, 4).ok_or_else(malformed)?;
        match i32::from(kind) {
            // Both begin with an error number below 0, or 0.
            libc::NLMSG_ERROR | libc::NLMSG_DONE => {
                return match word(body, 0).ok_or_else(malformed)? as i32 {
                    0 => Ok(true),
                    error => Err(io::Error::from_raw_os_error(error.wrapping_neg())),
                };
            }
            libc::NLMSG_NOOP => {}
            _ => {
                let word = |at| word(body, at).ok_or_else(malformed);
                let length = body_of(kind);
                found.push(Object {
                    subject: Subject {
                        ifindex: word(4)?,
                        handle: word(8)?,
                        parent: word(12)?,
                        info: if length == BODY { word(16)? } else { 0 },
                    },
                    attributes: body.get(length..).ok_or_else(malformed)?.to_vec(),
                });
            }
        }
        datagram = datagram
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Ok(false)
}

fn malformed() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the kernel's answer cannot be read",
    )
}

/// Two bytes of `bytes`.
fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Four bytes of `bytes`.
pub fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message of `kind` with `body`.
    fn message(kind: i32, body: &[u8]) -> Vec<u8> {
        let mut message = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        message.extend((kind as u16).to_ne_bytes());
        message.extend([0; 10]);
        message.extend(body);
        message
    }

    #[test]
    fn attributes_are_found_by_type_whatever_their_flags() {
        let mut attributes = Vec::new();
        append(&mut attributes, 1, b"bpf\0");
        append(&mut attributes, 2 | 1 << 15, &[1, 2, 3]);
        append(&mut attributes, 3, &[4]);
        assert_eq!(attributes.len() % 4, 0);
        assert_eq!(attribute(&attributes, 1), Some(&b"bpf\0"[..]));
        assert_eq!(attribute(&attributes, 2), Some(&[1, 2, 3][..]));
        assert_eq!(attribute(&attributes, 3), Some(&[4][..]));
        assert_eq!(attribute(&attributes, 4), None);
    }

    #[test]
    fn what_is_cut_off_or_without_end_is_found_nowhere() {
        assert_eq!(attribute(&[0, 0, 9, 0], 1), None);
        assert_eq!(attribute(&[3, 0, 1, 0], 1), None);
        assert_eq!(attribute(&[200, 0, 1, 0], 1), None);
        let mut found = Vec::new();
        assert!(read(&[1, 2, 3], &mut found).is_err());
        assert!(read(&[0; 16], &mut found).is_err());
        assert!(read(&message(44, &[0; 19]), &mut found).is_err());
        assert!(found.is_empty());
    }

    #[test]
    fn an_interface_is_read_to_its_own_length() {
        let mut found = Vec::new();
        let mut body = vec![0; 4];
        for word in [7u32, 1, 0] {
            body.extend(word.to_ne_bytes());
        }
        append(&mut body, 3, b"tap0\0");
        let kind = i32::from(libc::RTM_NEWLINK);
        assert!(!read(&message(kind, &body), &mut found).unwrap());
        assert_eq!((found[0].subject.ifindex, found[0].subject.handle), (7, 1));
        assert_eq!(found[0].attribute(3), Some(&b"tap0\0"[..]));
        assert!(read(&message(kind, &[0; 15]), &mut found).is_err());
    }

    #[test]
    fn a_dump_ends_with_its_last_message_and_an_error_is_one() {
        let mut found = Vec::new();
        let mut body = vec![0; 4];
        for word in [7u32, 1, 0xffff_fff2, 1 << 16] {
            body.extend(word.to_ne_bytes());
        }
        assert!(!read(&message(44, &body), &mut found).unwrap());
        assert_eq!((found[0].subject.ifindex, found[0].subject.handle), (7, 1));
        assert!(read(&message(libc::NLMSG_DONE, &[0; 4]), &mut found).unwrap());
        let refused = message(libc::NLMSG_ERROR, &(-libc::EEXIST).to_ne_bytes());
        let error = read(&refused, &mut found).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EEXIST));
    }
}
