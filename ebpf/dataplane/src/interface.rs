//! Interfaces of the calling thread's network namespace.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;

use nix::errno::Errno;
use nix::net::if_::{if_indextoname, if_nametoindex};
use omerta_verdict::Mac;

use crate::GuardError;

/// The index of `interface`.
pub fn index(interface: &str) -> Result<u32, GuardError> {
    if_nametoindex(interface).map_err(|errno| match errno {
        // What could not be asked (no descriptor was left, say) tells nothing of the interface.
        Errno::ENODEV | Errno::ENXIO | Errno::EINVAL => GuardError::NoInterface {
            interface: interface.to_owned(),
        },
        errno => GuardError::System {
            action: "look for the interface",
            interface: interface.to_owned(),
            source: errno.into(),
        },
    })
}

/// The MAC of `interface`, which must be an Ethernet one: other kinds may have addresses of six bytes
/// too, and put other headers before their packets.
pub fn mac(interface: &str) -> Result<Mac, GuardError> {
    // Not /sys/class/net: its mount may belong to another network namespace.
    let request = asked(interface, libc::SIOCGIFHWADDR).map_err(|source| GuardError::System {
        action: "ask for the address of",
        interface: interface.to_owned(),
        source,
    })?;
    // SAFETY: the kernel has written this member, and every bit pattern of it is valid.
    let address = unsafe { request.ifr_ifru.ifru_hwaddr };
    let [a, b, c, d, e, f, ..] = address.sa_data.map(|byte| byte.to_ne_bytes()[0]);
    Some(Mac([a, b, c, d, e, f]))
        .filter(|mac| address.sa_family == libc::ARPHRD_ETHER && mac.is_unicast())
        .ok_or_else(|| GuardError::Config {
            problem: format!(
                "{interface} has no Ethernet address: only Ethernet interfaces can be guarded"
            ),
        })
}

/// The longest IP packet that `interface` carries, in bytes.
pub fn mtu(interface: &str) -> io::Result<u32> {
    let request = asked(interface, libc::SIOCGIFMTU)?;
    // SAFETY: the kernel has written this member, and every bit pattern of it is valid.
    Ok(u32::try_from(unsafe { request.ifr_ifru.ifru_mtu }).unwrap_or(0))
}

/// What the kernel tells of `interface` for one of the requests that read (netdevice(7)).
fn asked(interface: &str, what: libc::Ioctl) -> io::Result<libc::ifreq> {
    let socket = UnixDatagram::unbound()?;
    // SAFETY: ifreq is plain data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte is left: the name ends with a zero.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(interface.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    // SAFETY: the kernel reads and writes the request, which outlives the call.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw mut request) };
    match done {
        0.. => Ok(request),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The name of the interface that has `index`, or `None` where this network namespace has none.
pub fn name(index: u32) -> Option<String> {
    // nix 0.32 takes the null of a failed call for success, and leaves the name empty.
    let name = if_indextoname(index).ok()?;
    (!name.is_empty()).then(|| name.to_string_lossy().into_owned())
}
