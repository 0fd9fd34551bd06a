//! The interfaces of this thread's network namespace, as rtnetlink(7) tells of them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use crate::netlink::{
    Object, Subject, all_changes, append, attribute, change, dump, firewall_changes, get, word,
};

// include/uapi/linux/if_link.h.
const IFLA_IFNAME: u16 = 3;
const IFLA_GROUP: u16 = 27;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_ATTACHED: u16 = 2;
const IFF_UP: u32 = libc::IFF_UP as u32;

/// An interface as it was when it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is set up.
    pub is_up: bool,
    /// The group that somebody has put it into; each interface begins in 0.
    pub group: u32,
}

/// Every interface.
///
/// # Errors
/// Where the kernel cannot be asked, or the interfaces changed meanwhile.
pub fn all() -> io::Result<Vec<Interface>> {
    let found = dump(libc::RTM_GETLINK, Subject::default())?;
    Ok(found.iter().filter_map(interface).collect())
}

fn interface(object: &Object) -> Option<Interface> {
    let name = object.attribute(IFLA_IFNAME)?;
    let name = name.strip_suffix(b"\0").unwrap_or(name);
    Some(Interface {
        index: object.subject.ifindex,
        name: String::from_utf8_lossy(name).into_owned(),
        is_up: object.subject.handle & IFF_UP != 0,
        group: object
            .attribute(IFLA_GROUP)
            .and_then(|group| word(group, 0))
            .unwrap_or(0),
    })
}

/// Whether the interface of that index is in `group`; none is in a group that is gone.
pub(crate) fn in_group(index: u32, group: u32) -> io::Result<bool> {
    let subject = Subject {
        ifindex: index,
        ..Subject::default()
    };
    if index == 0 {
        return Ok(false);
    }
    let found = get(libc::RTM_GETLINK, subject, &[])?;
    let found = found.iter().filter_map(interface);
    let mut found = found.filter(|one| one.index == index);
    Ok(found.any(|one| one.group == group))
}

/// Whether an XDP program, native, generic or offloaded, is on the interface of that index: it sees what
/// comes before any program of TC does, and may send it on past them.
pub fn has_xdp(index: u32) -> io::Result<bool> {
    let subject = Subject {
        ifindex: index,
        ..Subject::default()
    };
    let found = get(libc::RTM_GETLINK, subject, &[])?;
    let link = found.iter().find(|link| link.subject.ifindex == index);
    let link = link.ok_or_else(|| io::Error::other("the kernel does not tell of it"))?;
    let attached = link
        .attribute(IFLA_XDP)
        .map(|xdp| attribute(xdp, IFLA_XDP_ATTACHED));
    Ok(match attached {
        // A kernel that does not know XDP for it.
        None => false,
        Some(kind) => kind != Some(&[0]),
    })
}

/// Sets the interface of that index up or down.
///
/// # Errors
/// Where it is gone, or the kernel refuses.
pub fn set_up(index: u32, up: bool) -> io::Result<()> {
    let subject = Subject {
        ifindex: index,
        handle: if up { IFF_UP } else { 0 },
        parent: IFF_UP,
        info: 0,
    };
    change(libc::RTM_NEWLINK, 0, subject, &[])
}

/// Puts the interface of that index into a group, which it leaves with its end alone.
///
/// # Errors
/// Where it is gone, or the kernel refuses.
pub fn set_group(index: u32, group: u32) -> io::Result<()> {
    let subject = Subject {
        ifindex: index,
        ..Subject::default()
    };
    let mut attributes = Vec::new();
    append(&mut attributes, IFLA_GROUP, &group.to_ne_bytes());
    change(libc::RTM_SETLINK, 0, subject, &attributes)
}

/// Occasions to look: its descriptor becomes readable when the kernel has changed something.
#[derive(Debug)]
pub struct Changes(OwnedFd);

impl Changes {
    /// Of the interfaces of this thread's network namespace and of what judges on them, from now on.
    ///
    /// # Errors
    /// Without a descriptor.
    pub fn of_interfaces() -> io::Result<Self> {
        all_changes().map(Self)
    }

    /// Of the rules of nftables(8) there.
    ///
    /// # Errors
    /// Without a descriptor.
    pub fn of_firewall() -> io::Result<Self> {
        firewall_changes().map(Self)
    }

    /// Takes all that there are; whether there was any. What they say is not read: some may have been lost,
    /// and whoever is told looks at everything.
    ///
    /// # Errors
    /// Where the kernel does not tell any more.
    pub fn take(&self) -> io::Result<bool> {
        let (mut told, mut any) = ([0; 4096], false);
        loop {
            match recv(self.0.as_raw_fd(), &mut told, MsgFlags::MSG_DONTWAIT) {
                Ok(_) | Err(Errno::ENOBUFS) => any = true,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(any),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Changes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
